"""The recurrence through ``seqkernels._C``: allocation here, the loop over time there, weight gradients as GEMMs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cells import CELLS, RESET, accumulate_dtype
from .extension import extension

_C = extension()


def _last_contiguous(x: Tensor | None) -> Tensor | None:
    """`x`, copied only where its last dimension is not contiguous."""
    return x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def recurrence_forward(
    gates_x: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``seqkernels::recurrence_forward`` in one call of the compiled module."""
    steps, batch, _ = gates_x.shape
    num_states, _, hidden = state0.shape
    states = gates_x.new_empty((num_states if save else 1, steps + 1, batch, hidden))
    state_n = gates_x.new_empty((num_states, batch, hidden))
    shape = (steps, batch, CELLS[cell].reserve, hidden) if save else (0,)
    reserve = gates_x.new_empty(shape, dtype=accumulate_dtype(gates_x.dtype))
    _C.recurrence_forward(
        _last_contiguous(gates_x),
        _last_contiguous(weight_hh),
        _contiguous(bias_hh),
        state0.contiguous(),
        control,
        cell,
        reverse,
        states,
        state_n,
        reserve if save else None,
        torch.get_num_threads(),
    )
    return states, state_n, reserve


def recurrence_backward(
    grad_hidden: Tensor | None,
    grad_cells: Tensor | None,
    grad_state_n: Tensor | None,
    weight_hh: Tensor,
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``seqkernels::recurrence_backward``: the loop in the compiled module, then one GEMM for the weight."""
    dtype, acc = states.dtype, accumulate_dtype(states.dtype)
    num_states, steps, batch, hidden = states.shape
    steps -= 1
    rows = weight_hh.shape[0]
    grad_gates_x = states.new_empty((steps, batch, rows), dtype=acc)
    grad_gates_h = torch.empty_like(grad_gates_x) if cell == "gru" else None
    grad_state0 = states.new_empty((num_states, batch, hidden), dtype=acc)
    _C.recurrence_backward(
        _last_contiguous(grad_hidden),
        _last_contiguous(grad_cells),
        _contiguous(grad_state_n),
        _last_contiguous(weight_hh),
        states.contiguous(),
        reserve.contiguous(),
        control,
        cell,
        reverse,
        grad_gates_x,
        grad_gates_h,
        grad_state0,
        torch.get_num_threads(),
    )
    gates = (grad_gates_x if grad_gates_h is None else grad_gates_h).view(-1, rows)
    before = states[0].narrow(0, 1 if reverse else 0, steps).to(acc)
    if control is not None:
        before = before.masked_fill((control & RESET).bool().unsqueeze(2), 0)
    grad_weight = gates.t().mm(before.reshape(-1, hidden))
    return grad_gates_x.to(dtype), grad_weight.to(dtype), gates.sum(0).to(dtype), grad_state0.to(dtype)
