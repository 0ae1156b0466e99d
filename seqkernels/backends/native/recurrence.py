"""The recurrence through ``seqkernels._C``: allocation here; loop over time, projection and weight gradients there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...cells import CELLS, accumulate_dtype
from .extension import extension

_C = extension()


def _last_contiguous(x: Tensor | None) -> Tensor | None:
    """`x`, copied only where its last dimension is not contiguous."""
    return x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def recurrence_forward(
    input: Tensor,
    weights: Sequence[Tensor | None],
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``seqkernels::recurrence_forward`` in one call of the compiled module."""
    weight_ih, weight_hh, bias_ih, bias_hh, reset_state = weights[:5]
    steps, batch, _ = input.shape
    num_states, _, hidden = state0.shape
    states = input.new_empty((num_states if save else 1, steps + 1, batch, hidden))
    state_n = input.new_empty((num_states, batch, hidden))
    shape = (steps, batch, CELLS[cell].reserve, hidden) if save else (0,)
    reserve = input.new_empty(shape, dtype=accumulate_dtype(input.dtype))
    _C.recurrence_forward(
        _last_contiguous(input),
        _last_contiguous(weight_ih),
        _last_contiguous(weight_hh),
        _contiguous(bias_ih),
        _contiguous(bias_hh),
        _contiguous(reset_state),
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
    grads: Sequence[Tensor | None],
    input: Tensor,
    weights: Sequence[Tensor | None],
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """``seqkernels::recurrence_backward`` in one call of the compiled module."""
    dtype, acc = states.dtype, accumulate_dtype(states.dtype)
    num_states, _, batch, hidden = states.shape
    weight_ih, weight_hh, bias_ih, bias_hh, reset_state = weights[:5]
    # Nothing runs where there is no state or no step: the gradients are zero.
    allocate = torch.empty if input.shape[0] * batch * hidden else torch.zeros

    def result(of: Tensor | None, wanted: bool, dtype: torch.dtype = acc) -> Tensor | None:
        return allocate(of.shape, dtype=dtype) if of is not None and wanted else None

    results = [
        result(input, needs[0], dtype),
        allocate((num_states, batch, hidden), dtype=acc),
        *(result(w, n) for w, n in zip((weight_ih, weight_hh, bias_ih, bias_hh, reset_state), needs[2:7], strict=True)),
    ]
    _C.recurrence_backward(
        _last_contiguous(grads[0]),
        _last_contiguous(grads[1]),
        _contiguous(grads[2]),
        _last_contiguous(input),
        _last_contiguous(weight_ih),
        _last_contiguous(weight_hh),
        _contiguous(reset_state),
        states.contiguous(),
        reserve.contiguous(),
        control,
        cell,
        reverse,
        results[0],
        *results[2:],
        results[1],
        torch.get_num_threads(),
    )
    absent = [states.new_empty(0)] * (len(needs) - len(results))
    return [states.new_empty(0) if x is None else x.to(dtype) for x in results] + absent
