"""The recurrence in plain PyTorch: a loop over time, differentiable by autograd, and the oracle of the tests.

The loop is in ``recurrence_loop.py``, a step of it in ``recurrence_step.py``, the backward pass by hand in
``recurrence_backward.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ...cells import CELLS, Weights, accumulate_dtype
from .recurrence_backward import through_time
from .recurrence_loop import begin_with, input_part, run, seen, segments


def _as_given(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """No autocast: it may be on in one pass and off in the other, and the op has its dtypes from its arguments."""
    if not torch.amp.is_autocast_available(device.type) or not torch._C._is_any_autocast_enabled():
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


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
    gates_x = input_part(seen(input.to(acc), control), w)
    every_step = (0, input.shape[0])
    states, state, saved = run(gates_x, begin_with(state0.to(acc)), w, control, cell, reverse, every_step)
    return states.to(dtype), torch.stack(state).to(dtype), saved


def _checkpointed(
    input: Tensor, weights: Weights, state0: Tensor, control: Tensor | None, cell: str, reverse: bool, every: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`recurrence`, of which only hidden states (1, T+1, B, H) and checkpoints (ceil(T/every), S, B, H) are kept."""
    dtype = input.dtype
    acc = accumulate_dtype(dtype)
    w = weights.to(acc)
    gates_x = input_part(seen(input.to(acc), control), w)
    state = begin_with(state0.to(acc))
    order = segments(input.shape[0], every, reverse)
    checkpoints = gates_x.new_empty(len(order), *state0.shape)
    hidden = [state0[:1]]
    for k, segment in enumerate(order):
        checkpoints[k] = torch.stack(state)
        states, state, _ = run(gates_x, state, w, control, cell, reverse, segment)
        hidden.append((states[0, :-1] if reverse else states[0, 1:]).to(dtype))
    return torch.cat(hidden[::-1] if reverse else hidden).unsqueeze(0), torch.stack(state).to(dtype), checkpoints


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
    with torch.enable_grad(), _as_given(input.device):
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
    every: int = 0,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """``seqkernels::recurrence_forward``: `recurrence`, without what only a backward pass needs unless `save`.

    With `save` and `every` only hidden states (1, T+1, B, H), and in place of the reserve the checkpoints
    (ceil(T/every), S, B, H) in the accumulation dtype: the state before each segment of `every` steps.
    """
    with _as_given(input.device):
        if save and every:
            return _checkpointed(input, weights, state0, control, cell, reverse, every)
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
    every: int = 0,
    precision: str = "ieee",
) -> list[Tensor]:
    """``seqkernels::recurrence_backward``: back-propagation through time.

    Args:
        grads: gradients of the hidden and of the cell states of each step (T, B, H), of ``state_n`` (S, B, H) and of
            the activated gates (T, B, K, H), any of them ``None``.
        input, weights, control, cell, reverse: as in the forward pass.
        states, reserve: from the forward pass.
        needs: whether the gradient is wanted, of the input, of the initial state, of each of `weights`.
        every: as in the forward pass.
        precision: no difference here.

    Returns:
        For each of `needs` the gradient, in shape and dtype of its tensor; empty where there is no need.
    """
    with _as_given(input.device):
        found = through_time(grads, input, weights, states, reserve, control, cell, reverse, needs, every)
    like = (input, states, *weights)
    return [
        input.new_empty(0) if grad is None or x is None else grad.to(x.dtype).contiguous()
        for grad, x in zip(found, like, strict=True)
    ]
