"""The recurrence in plain PyTorch: a loop over time, differentiable by autograd, and the oracle of the tests.

A step is in ``recurrence_step.py``, the backward pass by hand in ``recurrence_backward.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cells import CELLS, DETACH, HOLD, RESET, Weights, accumulate_dtype
from .recurrence_backward import through_time
from .recurrence_step import recurrent_part, step, zone_out

_BITS = (RESET, HOLD, DETACH)


def recurrence(
    input: Tensor, weights: Weights, state0: Tensor, control: Tensor | None, cell: str, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence as a differentiable loop.

    Args:
        input, state0, control, cell, reverse: as in `seqkernels.ops.recurrence.recurrence`.
        weights: its other tensors.

    Returns:
        ``states`` (S, T+1, B, H), where step t ends in ``[:, t + 1]`` (``[:, t]`` in reverse) and the other end is
        `state0`; ``state_n`` (S, B, H); ``reserve`` (T, B, R, H): the activated gates i, f, g, o of the LSTM;
        r, z, n and the recurrent part of n of the GRU; 0 in held steps.
    """
    dtype = input.dtype
    acc = accumulate_dtype(dtype)
    w = weights.to(acc)
    state = tuple(state0.to(acc).unbind(0))
    x = input.to(acc)
    reset, hold, detach = (None if control is None else (control & bit).bool().unsqueeze(2) for bit in _BITS)
    if hold is not None:
        x = x.masked_fill(hold, 0)
    if w.weight_ih is not None:
        x = F.linear(x, w.weight_ih, w.bias_ih)
    fresh = tuple(x.new_zeros(len(state), 1) if w.reset_state is None else w.reset_state)
    steps = x.shape[0]
    history, reserve = [state], []
    for t in reversed(range(steps)) if reverse else range(steps):
        if reset is not None and detach is not None:
            state = tuple(torch.where(detach[t], s.detach(), s) for s in state)
            state = tuple(torch.where(reset[t], f, s) for f, s in zip(fresh, state, strict=True))
        new, saved = step(x[t], recurrent_part(state[0], w), state, w, cell)
        if w.zoneout is not None:
            new = zone_out(state, new, w.zoneout, w.seed, t)
        if hold is not None:
            new = tuple(torch.where(hold[t], s, n) for s, n in zip(state, new, strict=True))
            saved = saved.masked_fill(hold[t].unsqueeze(2), 0)
        state = new
        history.append(state)
        reserve.append(saved)
    if reverse:
        history.reverse()
        reserve.reverse()
    states = torch.stack([torch.stack(column) for column in zip(*history, strict=True)])
    shape = (0, x.shape[1], CELLS[cell].reserve, state0.shape[2])
    saved = torch.stack(reserve) if reserve else x.new_empty(shape)
    return states.to(dtype), torch.stack(state).to(dtype), saved


def gradients(
    grads: Sequence[Tensor | None],
    input: Tensor,
    state0: Tensor,
    weights: Weights,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiable gradients, by running the loop again under autograd.

    Args:
        grads, input, weights, control, cell, reverse, needs: as in `recurrence_backward`.
        state0: (S, B, H).

    Returns:
        For each of `needs` the gradient, ``None`` where there is no need and where nothing depends on the tensor.
    """
    inputs = (input, state0, *weights)
    with torch.enable_grad():
        states, state_n, reserve = recurrence(input, weights, state0, control, cell, reverse)
        hidden, *cells = states.narrow(1, 0 if reverse else 1, input.shape[0]).unbind(0)
        gates = reserve[:, :, : CELLS[cell].gates].to(input.dtype) if CELLS[cell].reserve else hidden.unsqueeze(2)
        outputs = hidden, cells[0] if cells else None, state_n, gates
        # Without steps the states depend on the initial one alone.
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, grads, strict=True)
            if out is not None and grad is not None and out.requires_grad
        ]
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need and x is not None]
        if not pairs or not wanted:
            return [None] * len(inputs)
        cotangents = [grad for _, grad in pairs]
        found = iter(
            torch.autograd.grad([out for out, _ in pairs], wanted, cotangents, create_graph=True, allow_unused=True)
        )
    return [next(found) if need and x is not None else None for x, need in zip(inputs, needs, strict=True)]


def recurrence_forward(
    input: Tensor,
    weights: Weights,
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``seqkernels::recurrence_forward``: `recurrence`, without what only a backward pass needs unless `save`."""
    states, state_n, reserve = recurrence(input, weights, state0, control, cell, reverse)
    if not save:
        return states[:1].clone(), state_n, reserve.new_empty(0)
    return states, state_n, reserve


def recurrence_backward(
    grads: Sequence[Tensor | None],
    input: Tensor,
    weights: Weights,
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """``seqkernels::recurrence_backward``: back-propagation through time.

    Args:
        grads: gradients of the hidden and of the cell states of each step (T, B, H), of ``state_n`` (S, B, H) and of
            the activated gates (T, B, K, H), any of them ``None``.
        input, weights, control, cell, reverse: as in the forward pass.
        states, reserve: from the forward pass.
        needs: whether the gradient is wanted, of the input, of the initial state, of each of `weights`.

    Returns:
        For each of `needs` the gradient, in shape and dtype of its tensor; empty where there is no need.
    """
    found = through_time(grads, input, weights, states, reserve, control, cell, reverse, needs)
    like = (input, states[:, 0], *weights)
    return [
        input.new_empty(0) if grad is None or x is None else grad.to(x.dtype).contiguous()
        for grad, x in zip(found, like, strict=True)
    ]
