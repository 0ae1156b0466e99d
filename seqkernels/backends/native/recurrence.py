"""The recurrence through ``seqkernels._C``: allocation here; loop over time, projection and weight gradients there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ...cells import CELLS, CONSTANTS, Weights, accumulate_dtype
from .extension import _C


@overload
def last_contiguous(x: Tensor) -> Tensor: ...
@overload
def last_contiguous(x: Tensor | None) -> Tensor | None: ...
def last_contiguous(x: Tensor | None) -> Tensor | None:
    """`x`, copied only where its last dimension is not contiguous."""
    return x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def gradient(x: Tensor | None) -> Tensor | None:
    """`x` as `last_contiguous` gives it; ``None`` where it is zero and has no memory."""
    return None if x is None or x._is_zerotensor() else last_contiguous(x)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _ready(weights: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """`weights` in the layout of the compiled module."""
    return (
        last_contiguous(weights[0]),
        last_contiguous(weights[1]),
        *[x if x is None else x.contiguous() for x in weights[2:]],
    )


def recurrence_forward(
    input: Tensor,
    weights: Sequence[Tensor | None],
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    save: bool,
    every: int = 0,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """``seqkernels::recurrence_forward`` in one call of the compiled module."""
    steps, batch, _ = input.shape
    num_states, _, hidden = state0.shape
    every = every if save else 0
    states = input.new_empty((num_states if save and not every else 1, steps + 1, batch, hidden))
    state_n = input.new_empty((num_states, batch, hidden))
    shape: tuple[int, ...] = (steps, batch, CELLS[cell].reserve, hidden) if save else (0,)
    if every:
        shape = (-(-steps // every), num_states, batch, hidden)
    reserve = input.new_empty(shape, dtype=accumulate_dtype(input.dtype))
    _C.recurrence_forward(
        last_contiguous(input),
        _ready(weights),
        state0.contiguous(),
        control,
        cell,
        reverse,
        states,
        state_n,
        reserve if save else None,
        every,
        torch.get_num_threads(),
    )
    return states, state_n, reserve


def _made(input: Tensor, weights: Weights, states: Tensor, control: Tensor | None, cell: str, reverse: bool) -> Tensor:
    """The hidden states (T, B, H) that an RNN made before zoneout, which are not kept.

    The states before each step are known, so all steps are one step of T*B rows.
    """
    steps, batch, _ = input.shape
    before = states.narrow(1, 1 if reverse else 0, steps).flatten(1, 2)
    mask = None if weights.recurrent_mask is None else weights.recurrent_mask.repeat(steps, 1)
    plain = weights._replace(recurrent_mask=mask, zoneout=None, seed=None)
    bits = None if control is None else control.flatten().unsqueeze(0)
    _, made, _ = recurrence_forward(input.flatten(0, 1).unsqueeze(0), plain, before, bits, cell, False, False)
    return made.view(steps, batch, states.shape[3])


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
    every: int = 0,
    precision: str = "ieee",
) -> list[Tensor]:
    """``seqkernels::recurrence_backward`` in one call of the compiled module."""
    dtype, acc = states.dtype, accumulate_dtype(states.dtype)
    num_states, (_, _, batch, hidden) = CELLS[cell].states, states.shape
    named = Weights._make(weights)
    # Nothing runs where there is no state or no step: the gradients are zero.
    allocate = torch.empty if input.shape[0] * batch * hidden else torch.zeros
    results = (
        allocate(input.shape, dtype=dtype) if needs[0] else None,
        allocate((num_states, batch, hidden), dtype=acc),
        *[
            allocate(w.shape, dtype=acc) if w is not None and need and name not in CONSTANTS else None
            for name, w, need in zip(Weights._fields, weights, needs[2:], strict=True)
        ],
    )
    # With a seed an element either is what the cell made, or has no gradient to give it.
    mixed = CELLS[cell].reserve == 0 and named.zoneout is not None and named.seed is None
    _C.recurrence_backward(
        (gradient(grads[0]), gradient(grads[1]), _contiguous(gradient(grads[2])), gradient(grads[3])),
        last_contiguous(input),
        _ready(weights),
        states.contiguous(),
        reserve.contiguous(),
        _made(input, named, states, control, cell, reverse) if mixed else None,
        control,
        cell,
        reverse,
        results,
        every,
        torch.get_num_threads(),
    )
    return [
        states.new_empty(0) if x is None or not need else x.to(dtype) for x, need in zip(results, needs, strict=True)
    ]
