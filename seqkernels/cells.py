"""The recurrent cells: how many gates and states each has, under torch's names.

Gate order, formulas and parameter layout are torch's, so a ``state_dict`` moves both ways unchanged:

* ``rnn_tanh``, ``rnn_relu``: ``h' = act(x + W h)``
* ``lstm`` (gates i, f, g, o): ``c' = f c + i g``, ``h' = o tanh(c')``
* ``gru`` (gates r, z, n): ``n = tanh(x_n + r (W_n h + b_n))``, ``h' = (1 - z) n + z h``
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Cell(NamedTuple):
    """What the kernels need to know of a cell besides its formula.

    Attributes:
        gates: G, rows of ``weight_hh`` per hidden unit.
        states: S, state vectors carried from step to step (hidden first).
        reserve: R, vectors of size H that the forward pass saves per step for the backward pass.
    """

    gates: int
    states: int
    reserve: int


CELLS: dict[str, Cell] = {
    "rnn_tanh": Cell(gates=1, states=1, reserve=0),
    "rnn_relu": Cell(gates=1, states=1, reserve=0),
    "lstm": Cell(gates=4, states=2, reserve=4),
    "gru": Cell(gates=3, states=1, reserve=4),
}

#: Bits of the ``control`` tensor of the recurrence.
RESET = 1
HOLD = 2

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels accumulate and carry the cell state: float32 for 16-bit inputs."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
