"""One step of a cell through ``seqkernels._C``, for a few rows: the weights are read where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...cells import CELLS, accumulate_dtype
from .extension import _C
from .recurrence import gradient

_C.set_plain_types(Tensor, torch.nn.Parameter)
_empty_like = torch.empty_like
_threads = torch.get_num_threads


def _gradient(x: Tensor) -> Tensor:
    """Memory for the gradient of `x`."""
    return _empty_like(x) if x.is_contiguous() else _empty_like(x, memory_format=torch.contiguous_format)


def step_forward(
    input: Tensor,
    hidden: Tensor | None,
    cells: Tensor | None,
    weights: Sequence[Any],
    cell: str,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The next hidden and (LSTM) cell states, and with `save` what the backward pass needs.

    Args:
        input: (B, I) or, as a layer has it, (1, B, I); then the states have three dimensions too.
        hidden: (B, H), or ``None`` for zeros.
        cells: (B, H), LSTM only, or ``None`` for zeros.
        weights: weight_ih (G*H, I), weight_hh (G*H, H), bias_ih and bias_hh (G*H,) or ``None``.
        cell: a key of `CELLS`.
        save: whether a backward pass may follow.

    Raises:
        ValueError, TypeError: a tensor does not fit, has rows that are not contiguous, or is a subclass.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    if hidden is not None and hidden.is_contiguous():
        next_hidden = _empty_like(hidden)
    else:
        next_hidden = input.new_empty((*input.shape[:-1], weight_hh.shape[1]))
    next_cells = _empty_like(next_hidden) if cell == "lstm" else None
    reserve = None
    if save:
        shape = (input.shape[-2], CELLS[cell].reserve, weight_hh.shape[1])
        dtype = input.dtype
        wide = accumulate_dtype(dtype)
        reserve = input.new_empty(*shape) if wide == dtype else input.new_empty(shape, dtype=wide)
    _C.step_forward(
        input,
        hidden,
        cells,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        cell,
        next_hidden,
        next_cells,
        reserve,
        _threads(),
    )
    return next_hidden, next_cells, reserve


def step_backward(
    grads: Sequence[Tensor | None],
    input: Tensor,
    hidden: Tensor | None,
    cells: Tensor | None,
    weights: Sequence[Any],
    saved: Sequence[Any],
    cell: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of input, hidden, cells and the four weights, ``None`` where not needed.

    Args:
        grads: of the next hidden and cell states, (B, H) or ``None``.
        input, hidden, cells, weights, cell: as `step_forward` took them.
        saved: what it returned.
        needs: for input, hidden, cells and the weights whether their gradient is wanted.
    """
    next_hidden, next_cells, reserve = saved
    weight_ih, weight_hh, _, _ = weights
    results: list[Tensor | None] = [
        _gradient(x) if need and x is not None else None
        for x, need in zip((input, hidden, cells, *weights), needs, strict=True)
    ]
    if next_hidden is not None and not next_hidden.numel():
        return [None if x is None else x.zero_() for x in results]
    _C.step_backward(
        gradient(grads[0]),
        gradient(grads[1]),
        input,
        hidden,
        cells,
        weight_ih,
        weight_hh,
        cell,
        next_hidden,
        next_cells,
        reserve,
        results[0],
        results[1],
        results[2],
        results[3],
        results[4],
        results[5],
        results[6],
        _threads(),
    )
    return results
