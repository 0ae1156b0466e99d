"""The loop over time of the recurrence in plain PyTorch, over all steps or a segment of them.

Running a segment again from the state before it gives the same bits: each step computes from tensors of the same
shape in memory of its own, and the input projection is always that of all steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cells import CELLS, DETACH, HOLD, RESET, Weights
from .recurrence_step import States, recurrent_part, step, zone_out


def seen(input: Tensor, control: Tensor | None) -> Tensor:
    """`input` (T, B, ...) with 0 in held steps, which do not look at it."""
    return input if control is None else input.masked_fill((control & HOLD).bool().unsqueeze(2), 0)


def input_part(x: Tensor, weights: Weights) -> Tensor:
    """The input part of the gates of all steps (T, B, G*H), of what `seen` returned."""
    return x if weights.weight_ih is None else F.linear(x, weights.weight_ih, weights.bias_ih)


def begin_with(state: Tensor) -> States:
    """The states of `state` (S, B, H), each in memory of its own."""
    return tuple(s.clone(memory_format=torch.contiguous_format) for s in state)


def segments(steps: int, every: int, reverse: bool) -> list[tuple[int, int]]:
    """Begin and end in time of each segment of `every` steps, in the order of the loop; one of all if 0."""
    size = every or max(steps, 1)
    ends = [(first, min(first + size, steps)) for first in range(0, steps, size)]
    return [(steps - end, steps - first) for first, end in ends] if reverse else ends


def run(
    gates_x: Tensor,
    state: States,
    weights: Weights,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    segment: tuple[int, int],
) -> tuple[Tensor, States, Tensor]:
    """The steps of one segment, differentiable by autograd.

    Args:
        gates_x: (T, B, G*H), of `input_part`, of all steps.
        state: S tensors (B, H), before the segment.
        weights, control, cell, reverse: as in `seqkernels.ops.recurrence.recurrence`.
        segment: its first step in time and the one behind its last.

    Returns:
        For n steps ``states`` (S, n+1, B, H) in the order of time; the state after them; ``reserve`` (n, B, R, H).
    """
    fresh = tuple(gates_x.new_zeros(len(state), 1) if weights.reset_state is None else weights.reset_state)
    history, reserve = [state], []
    for t in reversed(range(*segment)) if reverse else range(*segment):
        hold = None
        if control is not None:
            reset, hold, detach = ((control[t] & bit).bool().unsqueeze(1) for bit in (RESET, HOLD, DETACH))
            state = tuple(torch.where(detach, s.detach(), s) for s in state)
            state = tuple(torch.where(reset, f, s) for f, s in zip(fresh, state, strict=True))
        new, saved = step(gates_x[t], recurrent_part(state[0], weights), state, weights, cell)
        if weights.zoneout is not None:
            new = zone_out(state, new, weights.zoneout, weights.seed, t)
        if hold is not None:
            new = tuple(torch.where(hold, s, n) for s, n in zip(state, new, strict=True))
            saved = saved.masked_fill(hold.unsqueeze(2), 0)
        state = new
        history.append(state)
        reserve.append(saved)
    if reverse:
        history.reverse()
        reserve.reverse()
    states = torch.stack([torch.stack(column) for column in zip(*history, strict=True)])
    batch, hidden = state[0].shape
    empty = gates_x.new_empty(0, batch, CELLS[cell].reserve, hidden)
    return states, state, torch.stack(reserve) if reserve else empty
