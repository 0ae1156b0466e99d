"""The recurrence on a GPU: products over all steps by torch, the loop over time by kernels.

Where no norm needs whole rows, the kernels of `recurrence_sequence` run a sequence of steps in one launch, their
weights at hand; else each step is a product of torch and a launch of `recurrence_steps`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...cells import CELLS, HOLD, RESET, Weights, accumulate_dtype
from ...precision import torch_products
from . import recurrence_sequence, recurrence_steps
from .recurrence_cells import Parts, Sums
from .recurrence_loop import Gradients, Loop, entering, product, rounded_product


@contextlib.contextmanager
def _as_given(x: Tensor, precision: str) -> Iterator[None]:
    """No gradients, autocast or flags, since the op has all from its arguments; launches go to their device."""
    device = x.device
    with torch.no_grad(), torch_products(precision, x), contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if torch.amp.is_autocast_available(device.type) and torch._C._is_any_autocast_enabled():
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _parts(weights: Weights) -> Parts:
    return Parts._make(None if x is None else x.contiguous() for x in (getattr(weights, n) for n in Parts._fields))


def _gates_x(input: Tensor, weights: Weights) -> Tensor:
    """The input part of the gates (T, B, G*H) without its bias; in held steps anything."""
    if weights.weight_ih is None:
        return input.contiguous()
    steps, batch, size = input.shape
    return product(input.reshape(steps * batch, size), weights.weight_ih.t()).view(
        steps, batch, weights.weight_hh.shape[0]
    )


def _segments(steps: int, every: int, reverse: bool) -> list[tuple[int, int]]:
    """Begin and end in time of each segment of `every` steps, in the order of the loop; one of all if 0."""
    size = every or max(steps, 1)
    ends = [(first, min(first + size, steps)) for first in range(0, steps, size)]
    return [(steps - end, steps - first) for first, end in ends] if reverse else ends


def _forward(
    loop: Loop, carry: Tensor, states: Tensor, reserve: Tensor | None, begin: int, end: int, base: int
) -> None:
    if loop.batch and loop.hidden and begin < end:
        path = recurrence_sequence if recurrence_sequence.serves(loop) else recurrence_steps
        path.forward(loop, carry, states, reserve, begin, end, base)


def _backward(
    loop: Loop, grads: Gradients, carry: Tensor, states: Tensor, reserve: Tensor, begin: int, end: int, base: int
) -> None:
    if loop.batch and loop.hidden and begin < end:
        path = recurrence_sequence if recurrence_sequence.serves(loop) else recurrence_steps
        path.backward(loop, grads, carry, states, reserve, begin, end, base)


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
    """``seqkernels::recurrence_forward``."""
    with _as_given(input, precision):
        steps, batch, _ = input.shape
        num_states, _, hidden = state0.shape
        every = every if save else 0
        acc = accumulate_dtype(input.dtype)
        loop = Loop(
            _gates_x(input, weights),
            weights.weight_hh.contiguous(),
            None if control is None else control.contiguous(),
            _parts(weights),
            cell,
            reverse,
            steps,
            batch,
            hidden,
            precision,
        )
        states = input.new_empty((num_states if save and not every else 1, steps + 1, batch, hidden))
        states[:, steps if reverse else 0] = state0[: states.shape[0]]
        # A copy even where nothing changes: the loop writes to it.
        carry = torch.empty(state0.shape, dtype=acc, device=state0.device).copy_(state0)
        shape = (steps, batch, CELLS[cell].reserve, hidden) if save and not every else (0,)
        segments = _segments(steps, every, reverse)
        if every:
            shape = (len(segments), num_states, batch, hidden)
        saved = torch.empty(shape, dtype=acc, device=input.device)
        reserve = saved if save and not every and CELLS[cell].reserve else None
        for k, (begin, end) in enumerate(segments):
            if every:
                saved[k] = carry
            _forward(loop, carry, states, reserve, begin, end, 0)
        return states, carry.to(input.dtype), saved


def _given(grad: Tensor | None) -> Tensor | None:
    """`grad`, contiguous; ``None`` where it is zero and has no memory."""
    return None if grad is None or grad._is_zerotensor() else grad.contiguous()


def _sums(weights: Weights, needs: dict[str, bool], batch: int, hidden: int) -> Sums:
    def zeros(name: str) -> Tensor | None:
        x = getattr(weights, name)
        if x is None or not needs[name]:
            return None
        return torch.zeros((max(x.numel() // max(hidden, 1), 1), batch, hidden), device=x.device)

    return Sums._make(map(zeros, Sums._fields))


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
    """``seqkernels::recurrence_backward``."""
    with _as_given(input, precision):
        names = ("input", "state0", *Weights._fields)
        wanted = dict(zip(names, needs, strict=True))
        found = _through_time(grads, input, weights, states, reserve, control, cell, reverse, wanted, every, precision)
        like = (input, states, *weights)
        return [
            input.new_empty(0) if x is None or not need or name not in found else found[name].to(x.dtype).contiguous()
            for name, x, need in zip(names, like, needs, strict=True)
        ]


def _through_time(
    grads: Sequence[Tensor | None],
    input: Tensor,
    weights: Weights,
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    needs: dict[str, bool],
    every: int,
    precision: str,
) -> dict[str, Tensor]:
    """The gradients that are wanted, by the name of what they are of."""
    steps, batch, _ = input.shape
    hidden = states.shape[3]
    num_gates, num_states, num_saved = CELLS[cell]
    dtype, acc = states.dtype, accumulate_dtype(states.dtype)
    parts = _parts(weights)
    control = None if control is None else control.contiguous()
    grad_hidden, grad_cells, grad_state_n, grad_gates = map(_given, grads)
    if num_saved == 0 and grad_gates is not None:
        # The one gate is the hidden state itself.
        own = grad_gates.view(steps, batch, hidden)
        grad_hidden, grad_gates = own if grad_hidden is None else own.to(acc) + grad_hidden, None
    made_again = num_saved == 0 and parts.zoneout is not None
    loop = Loop(
        _gates_x(input, weights) if every or made_again else None,
        weights.weight_hh.contiguous(),
        control,
        parts,
        cell,
        reverse,
        steps,
        batch,
        hidden,
        precision,
    )
    before = states[0, 1:] if reverse else states[0, :-1]
    entered = entering(before, control, parts, RESET).reshape(steps * batch, hidden)
    recurrent = None
    if parts.norm_h is not None or made_again:
        recurrent = product(entered, loop.weight_hh.t()).view(steps, batch, num_gates * hidden)

    def gradient() -> Tensor:
        return torch.empty((steps, batch, num_gates * hidden), dtype=dtype, device=input.device)

    pending = Gradients(
        grad_hidden,
        grad_cells,
        grad_gates,
        recurrent,
        gradient(),
        gradient() if cell == "gru" else None,
        gradient() if parts.norm_h is not None else None,
        _sums(weights, needs, batch, hidden),
    )
    carry = torch.zeros((num_states, batch, hidden), dtype=acc, device=input.device)
    if grad_state_n is not None:
        carry.copy_(grad_state_n)
    for k, (begin, end) in reversed(list(enumerate(_segments(steps, every, reverse)))):
        part_states, part_reserve, base = states, reserve, 0
        if every:
            base = begin
            part_states = states.new_empty((num_states, end - begin + 1, batch, hidden))
            part_reserve = reserve.new_empty((end - begin, batch, num_saved, hidden))
            again = reserve[k].clone()
            part_states[:, end - begin if reverse else 0] = again
            _forward(loop, again, part_states, part_reserve if num_saved else None, begin, end, base)
        backward_loop = loop if made_again else loop._replace(gates_x=None)
        _backward(backward_loop, pending, carry, part_states, part_reserve, begin, end, base)
    found = {"state0": carry}
    of_x = pending.of_x.view(steps * batch, num_gates * hidden)
    of_u = of_x if pending.of_u is None else pending.of_u.view_as(of_x)
    if needs["input"]:
        of_input = of_x if weights.weight_ih is None else rounded_product(of_x, weights.weight_ih)
        found["input"] = of_input.view(input.shape)
    if needs["weight_ih"] and weights.weight_ih is not None:
        seen = input if control is None else input.masked_fill((control & HOLD).bool().unsqueeze(2), 0)
        found["weight_ih"] = product(of_x.t(), seen.reshape(steps * batch, seen.shape[2]))
    if needs["weight_hh"]:
        found["weight_hh"] = product(pending.to_product().view_as(of_x).t(), entered)
    if needs["bias_ih"]:
        found["bias_ih"] = of_x.sum(0, dtype=acc)
    if needs["bias_hh"]:
        found["bias_hh"] = of_u.sum(0, dtype=acc)
    for name, rows in pending.sums._asdict().items():
        if rows is not None:
            found[name] = rows.sum(1).view(getattr(weights, name).shape)
    return found
