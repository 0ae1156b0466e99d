"""A layer without options through ``seqkernels._C``: one call forward, one backward, the compiled module's checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...cells import CELLS, Weights, accumulate_dtype
from .extension import _C
from .recurrence import gradient

_empty = torch.empty
_empty_like = torch.empty_like
_threads = torch.get_num_threads
_NO_OPTIONS = (None,) * (len(Weights._fields) - 4)
_SIZES = {cell: (shape.states, shape.reserve) for cell, shape in CELLS.items()}


def layer_forward(
    cell: str,
    input: Tensor,
    hidden: Tensor | None,
    cells: Tensor | None,
    weights: tuple[Tensor | None, ...],
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor] | tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The states (S, T+1, B, H), (T+1, B, H) of the hidden one without `save`, the reserve, and the final states.

    Args:
        cell: a key of `CELLS`.
        input: (T, B, I).
        hidden: (1, B, H), or ``None`` for zeros.
        cells: (1, B, H), LSTM only, or ``None`` for zeros.
        weights: weight_ih (G*H, I), weight_hh (G*H, H), bias_ih and bias_hh (G*H,) or ``None``.
        save: whether a backward pass may follow.

    Raises:
        ValueError, TypeError: a tensor does not fit, or the last dimension of input or weights is not contiguous.
    """
    steps, batch, _ = input.shape
    weight_hh = weights[1]
    assert weight_hh is not None
    size, dtype = weight_hh.shape[1], input.dtype
    num_states, kept = _SIZES[cell]
    reserve = None
    if save:
        reserve = _empty((steps, batch, kept, size), dtype=accumulate_dtype(dtype), device="cpu")
        states = _empty((num_states, steps + 1, batch, size), dtype=dtype, device="cpu")
    else:
        states = _empty((steps + 1, batch, size), dtype=dtype, device="cpu")
    hidden_n = _empty((1, batch, size), dtype=dtype, device="cpu")
    cells_n = _empty_like(hidden_n) if num_states == 2 else None
    if hidden is not None and not hidden.is_contiguous():
        hidden = hidden.contiguous()
    if cells is not None and not cells.is_contiguous():
        cells = cells.contiguous()
    _C.layer_forward(input, weights + _NO_OPTIONS, hidden, cells, cell, states, reserve, hidden_n, cells_n, _threads())
    return (states, reserve, hidden_n) if cells_n is None else (states, reserve, hidden_n, cells_n)


def layer_backward(
    cell: str,
    grads: Sequence[Tensor | None],
    input: Tensor,
    weights: Sequence[Tensor | None],
    states: Tensor,
    reserve: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of input, initial hidden and cell state, and weights; ``None`` where `needs` says so.

    Args:
        cell: as in `layer_forward`.
        grads: of the hidden states (T, B, H) and of the final states (1, B, H) each, or ``None``.
        input, weights: as in `layer_forward`.
        states, reserve: what it returned.
        needs: whether a gradient is wanted, of input, hidden, cells and each weight.
    """
    num_states, dtype, acc = _SIZES[cell][0], input.dtype, reserve.dtype
    _, _, batch, size = states.shape
    grad_hidden, *finals = grads
    grad_state_n = None
    if any(x is not None for x in finals):
        grad_state_n = torch.cat([input.new_zeros(1, batch, size) if x is None else x for x in finals])
    allocate = _empty if states.shape[1] > 1 and batch * size else torch.zeros
    grad_input = allocate(input.shape, dtype=dtype, device="cpu") if needs[0] else None
    grad_state0 = allocate((num_states, batch, size), dtype=acc, device="cpu")
    grad_weights = [
        None if w is None or not need else allocate(w.shape, dtype=acc, device="cpu")
        for w, need in zip(weights, needs[3:], strict=True)
    ]
    _C.recurrence_backward(
        (gradient(grad_hidden), None, grad_state_n, None),
        input,
        (*weights, *_NO_OPTIONS),
        states,
        reserve,
        None,
        None,
        cell,
        False,
        (grad_input, grad_state0, *grad_weights, *_NO_OPTIONS),
        0,
        _threads(),
    )
    if acc != dtype:
        grad_weights = [None if x is None else x.to(dtype) for x in grad_weights]
        grad_state0 = grad_state0.to(dtype)
    grad_h0 = grad_state0.narrow(0, 0, 1) if needs[1] else None
    grad_c0 = grad_state0.narrow(0, 1, 1) if needs[2] else None
    return [grad_input, grad_h0, grad_c0, *grad_weights]
