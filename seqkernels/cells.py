"""The recurrent cells: how many gates and states each has, under torch's names.

Gate order, formulas and parameter layout are torch's, so a ``state_dict`` moves both ways unchanged:

* ``rnn_tanh``, ``rnn_relu``: ``h' = act(x + W h)``
* ``lstm`` (gates i, f, g, o): ``c' = f c + i g``, ``h' = o tanh(c')``
* ``gru`` (gates r, z, n): ``n = tanh(x_n + r (W_n h + b_n))``, ``h' = (1 - z) n + z h``
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


class Weights(NamedTuple):
    """What a recurrence takes besides its input, its initial state and its control, in the order of the op.

    I is the input size; G and S are gates and states of the cell. All have the dtype of the input unless said
    otherwise; ``None`` is the plain cell. The formulas are in ``docs/recurrence.md``.

    Attributes:
        weight_ih: (G*H, I); ``None`` where the input is the input part of the gates already.
        weight_hh: (G*H, H).
        bias_ih: (G*H,), only with `weight_ih`.
        bias_hh: (G*H,).
        reset_state: (S, H), the state after a reset instead of zero.
        peephole: (3, H), LSTM only: the weights of the cell state in i, f and o (Gers & Schmidhuber 2000).
        recurrent_mask: (B, H), factors of the hidden state in the recurrent product alone, the same in all steps,
            scaled by 1/(1-p) already (Gal & Ghahramani 2016). A constant.
        norm_h: (G*H,), the gain of a layer norm of the recurrent product over all G*H (Ba et al. 2016).
        norm_c: (2, H), LSTM only: gain and bias of a layer norm of c where it goes into h.
        zoneout: (S,) float32, the probability that an element of the state stays what it was (Krueger et al. 2016).
            A constant.
        seed: () int64, of the random zoneout; ``None`` for its expectation. A constant.
    """

    weight_ih: Tensor | None
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    reset_state: Tensor | None = None
    peephole: Tensor | None = None
    recurrent_mask: Tensor | None = None
    norm_h: Tensor | None = None
    norm_c: Tensor | None = None
    zoneout: Tensor | None = None
    seed: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Weights:
        """All floating point tensors in `dtype`."""
        return Weights._make(x.to(dtype) if x is not None and x.is_floating_point() else x for x in self)


#: Fields of `Weights` without a gradient.
CONSTANTS = ("recurrent_mask", "zoneout", "seed")

CELLS: dict[str, Cell] = {
    "rnn_tanh": Cell(gates=1, states=1, reserve=0),
    "rnn_relu": Cell(gates=1, states=1, reserve=0),
    "lstm": Cell(gates=4, states=2, reserve=4),
    "gru": Cell(gates=3, states=1, reserve=4),
}

#: Bits of the ``control`` tensor of the recurrence, see `seqkernels.ops.recurrence.recurrence`.
RESET = 1
HOLD = 2
DETACH = 4

#: Added to the variance in the layer norms of the recurrence.
NORM_EPS = 1e-5

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels accumulate and carry the cell state: float32 for 16-bit inputs."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
