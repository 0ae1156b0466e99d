"""Recurrences that share launches: both directions of a layer, or layers as a wavefront.

Layers are cut into parts of steps. Part k of one layer runs beside part k - 1 of the next, whose input is multiplied
between the launches; on the way back the layers come in the opposite order. `plans.waves` says how many parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...cells import CELLS, Weights
from .._through_time import BackwardPass, ForwardPass, Loop, as_given, gates_x, product, rounded_product
from . import plans
from .persistent import Part, Persistent
from .recurrence import Planned, choice_of, kernels, plan_of


def _waves(count: int, loop: Loop, fed: bool, backward: bool) -> plans.Waves:
    """How `count` recurrences like `loop` share launches; in turn, if no plan has room for more."""

    def cycles_of(jobs: int) -> float:
        return choice_of(loop, backward, jobs).cycles

    return plans.waves(count, loop.steps, fed, cycles_of, kernels().MOST_JOBS)


def _launch(parts: Sequence[Part], backward: bool) -> None:
    plan = plan_of(parts[0].loop, backward, len(parts))
    if plan.tier != "steps":
        return Persistent(kernels(), plan_of).together(plan, parts)
    path = Planned()
    for loop, carry, states, reserve, begin, end, base, grads in parts:
        if grads is None:
            path.forward(loop, carry, states, reserve, begin, end, base)
        else:
            assert reserve is not None
            path.backward(loop, grads, carry, states, reserve, begin, end, base)
    return None


def _bounds(steps: int, parts: int, reverse: bool) -> list[tuple[int, int]]:
    """Begin and end in time of each part, in the order of the loop."""
    ends = [steps * k // parts for k in range(parts + 1)]
    bounds = list(itertools.pairwise(ends))
    return [(steps - end, steps - begin) for begin, end in bounds] if reverse else bounds


def _wavefront(width: int, parts: int) -> Iterator[list[tuple[int, int]]]:
    """For each launch the recurrences that run in it, and which part of them."""
    for launch in range(parts + width - 1):
        yield [(k, launch - k) for k in range(width) if 0 <= launch - k < parts]


def _run(
    count: int, waves: plans.Waves, fed: bool, feed: Callable[[int, int], None], start: Callable[..., None]
) -> None:
    """Runs recurrences 0 to `count` - 1, of which each may need what the one before it made.

    Args:
        count: of recurrences.
        waves: how they share launches.
        fed: as in `plans.waves`.
        feed: is called with a recurrence and a part that the one before it has made.
        start: with all of a launch, pairs of a recurrence and a part.
    """
    for first in range(0, count, waves.width):
        width = min(waves.width, count - first)
        launches = _wavefront(width, waves.parts) if fed else [[(k, 0) for k in range(width)]]
        for launch in launches:
            here = [(first + k, part) for k, part in launch]
            for k, part in here:
                if fed and k > 0:
                    feed(k, part)
            start(here)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask).to(x.dtype)


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b`` of two matrices, float32."""
    if a.dtype != torch.float32 and a.is_cuda and a.numel() and b.numel():
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    elif a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        out.copy_(product(a, b))


def recurrences_forward(
    input: Tensor,
    weights: Sequence[Weights],
    state0: Sequence[Tensor],
    controls: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    cell: str,
    reverse: Sequence[bool],
    chained: bool,
    save: Sequence[bool],
    precision: str = "ieee",
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``seqkernels::recurrences_forward``: of each recurrence what `recurrence_forward` returns."""
    with as_given(input, precision):
        steps, batch, _ = input.shape
        passes = []
        for k, own in enumerate(weights):
            # Those of one that is fed get their memory when it begins.
            rows = own.weight_hh.shape[0]
            known = k == 0 or not chained
            # Kernels read float32: not to be made of all steps for each part.
            gates = gates_x(input, own).float() if known else input.new_empty(()).expand(steps, batch, rows)
            passes.append(
                ForwardPass(gates, own, state0[k], controls[k], cell, reverse[k], save[k], precision=precision)
            )
        if not passes[0].loop.has_work(0, steps):
            return [found.results() for found in passes]
        waves = _waves(len(passes), passes[0].loop, chained, False)
        bounds = [_bounds(steps, waves.parts, way) for way in reverse]

        def feed(k: int, part: int) -> None:
            begin, end = bounds[k][part]
            x, weight_ih = passes[k], weights[k].weight_ih
            if part == 0:
                shape = (steps, batch, x.loop.weight_hh.shape[0])
                x.loop = x.loop._replace(gates_x=torch.empty(shape, dtype=torch.float32, device=input.device))
            gates = x.loop.gates_x
            assert weight_ih is not None
            assert gates is not None
            mask = masks[k]
            read = _masked(passes[k - 1].hidden(begin, end), None if mask is None else mask[begin:end])
            _product_into(gates[begin:end].flatten(0, 1), read.flatten(0, 1), weight_ih.t())

        def start(launch: list[tuple[int, int]]) -> None:
            parts = []
            for k, part in launch:
                x, (begin, end) = passes[k], bounds[k][part]
                parts.append(Part(x.loop, x.carry, x.states, x.reserve, begin, end, 0))
            _launch(parts, False)
            for k, part in launch:
                if part + 1 == waves.parts:
                    passes[k].loop = passes[k].loop._replace(gates_x=None)

        _run(len(passes), waves, chained, feed, start)
        return [found.results() for found in passes]


def recurrences_backward(
    grads: Sequence[Sequence[Tensor | None]],
    input: Tensor,
    weights: Sequence[Weights],
    states: Sequence[Tensor],
    reserves: Sequence[Tensor],
    controls: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    cell: str,
    reverse: Sequence[bool],
    chained: bool,
    needs: Sequence[dict[str, bool]],
    precision: str = "ieee",
) -> list[list[Tensor]]:
    """``seqkernels::recurrences_backward``: of each recurrence what `recurrence_backward` returns.

    The gradient of the input is with each that reads it; where they are chained, with the first one.
    """
    count, steps = len(weights), input.shape[0]

    def made(k: int) -> BackwardPass:
        given, wanted, x = list(grads[k]), dict(needs[k]), input
        if chained:
            wanted["input"] = wanted["input"] and k == 0
            if k > 0:
                first = 0 if reverse[k] else 1
                x = _masked(states[k - 1][0, first : first + steps], masks[k])
            if k + 1 < count:
                # What comes from the next one is written before a part is run.
                given[0] = states[k].new_empty((steps, *states[k].shape[2:]))
                given[3] = given[3] if CELLS[cell].reserve else None
        return BackwardPass(
            given, x, weights[k], states[k], reserves[k], controls[k], cell, reverse[k], wanted, precision=precision
        )

    with as_given(input, precision):
        if 0 in (steps, *states[0].shape[2:]):
            return [made(k).results() for k in range(count)]
        own = [_of_hidden(of_one, cell) for of_one in grads]
        return _back(made, own, weights, masks, reverse, chained)


def _of_hidden(given: Sequence[Tensor | None], cell: str) -> Tensor | None:
    """The gradient of the hidden states themselves (T, B, H), of which an RNN's gate is one more name."""
    of_hidden, of_gates = given[0], given[3]
    if CELLS[cell].reserve or of_gates is None:
        return of_hidden
    return of_gates[:, :, 0] if of_hidden is None else of_gates[:, :, 0] + of_hidden


def _back(
    made: Callable[[int], BackwardPass],
    own: Sequence[Tensor | None],
    weights: Sequence[Weights],
    masks: Sequence[Tensor | None],
    reverse: Sequence[bool],
    chained: bool,
) -> list[list[Tensor]]:
    """The results of all passes, each of which has memory from its first launch until nothing reads it any more.

    Args:
        made: makes the pass of a recurrence.
        own: gradients of hidden states, without those of what reads them.
        weights, masks, reverse, chained: of all.
    """
    last = len(weights) - 1
    passes = {last: made(last)}
    waves = _waves(len(weights), passes[last].loop, chained, True)
    bounds = [_bounds(passes[last].loop.steps, waves.parts, not way) for way in reverse]
    results: dict[int, list[Tensor]] = {}

    def feed(turn: int, part: int) -> None:
        k = last - turn
        if k not in passes:
            passes[k] = made(k)
        begin, end = bounds[k][part]
        weight_ih, into = weights[k + 1].weight_ih, passes[k].grads.hidden
        assert weight_ih is not None
        assert into is not None
        found = rounded_product(passes[k + 1].grads.of_x[begin:end].flatten(0, 1), weight_ih).view_as(into[begin:end])
        mask, given = masks[k + 1], own[k]
        found = _masked(found, None if mask is None else mask[begin:end])
        into[begin:end] = found if given is None else found + given[begin:end]
        if part + 1 == waves.parts:
            results[k + 1] = passes.pop(k + 1).results()

    def start(launch: list[tuple[int, int]]) -> None:
        parts = []
        for turn, part in launch:
            k = last - turn
            if k not in passes:
                passes[k] = made(k)
            x, (begin, end) = passes[k], bounds[k][part]
            # The states of these steps alone: what norms saw is made again of them, for a part at a time.
            states, reserve = x.states[:, begin : end + 1], x.reserve[begin:end]
            parts.append(Part(x.backward_loop, x.carry, states, reserve, begin, end, begin, x.grads))
        _launch(parts, True)
        if not chained:
            results.update({last - turn: passes.pop(last - turn).results() for turn, _ in launch})

    _run(len(weights), waves, chained, feed, start)
    results.update({k: found.results() for k, found in passes.items()})
    return [results[k] for k in range(len(weights))]
