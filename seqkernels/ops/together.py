"""Several recurrences in one op, for implementations that run them at the same time.

They are all alike but for their tensors: both directions of a layer, which read the same input, or layers of which each
reads the hidden states of the one before it. What `recurrence` says of one of them holds here too. n is their number.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..cells import CELLS, Weights, accumulate_dtype
from ..precision import check_precision, of_products
from ._eager import apart, as_in_forward, batched, eager, gradients, insisted, records, refuse_tangents, transformed
from .recurrence import _backward as _one_backward
from .recurrence import _call, _gates, _own_step_states, _resolved, _step_states, check
from .recurrence import _forward as _one_forward

_library = torch.library.Library("seqkernels", "FRAGMENT")
_library.define(
    "recurrences_forward(Tensor input, Tensor?[] weights, Tensor[] state0, Tensor?[] controls, Tensor?[] masks,"
    " str cell, bool[] reverse, bool chained, bool[] save, str precision='ieee') -> Tensor[]"
)
_library.define(
    "recurrences_backward(Tensor?[] grads, Tensor input, Tensor?[] weights, Tensor[] states, Tensor[] reserves,"
    " Tensor?[] controls, Tensor?[] masks, str cell, bool[] reverse, bool chained, bool[] needs,"
    " str precision='ieee') -> Tensor[]"
)
_FIELDS = len(Weights._fields)
_OUTPUTS = 4  # of each recurrence: the hidden states, the cell states, the last state and the gates
_SETTINGS = 8  # arguments of `_Recurrences` before the tensors of which each recurrence has its own

Optional = Tensor | None


def _each(tensors: Sequence[Optional]) -> list[Weights]:
    return [Weights._make(tensors[k : k + _FIELDS]) for k in range(0, len(tensors), _FIELDS)]


def _choice_of(
    x: Tensor, weights: Sequence[Weights], controls: Sequence[Optional], cell: str, gates: bool = False
) -> backends.Call:
    """What the choice of an implementation depends on: all that one of them uses."""
    calls = [_call(x, own, control, cell, 0, gates) for own, control in zip(weights, controls, strict=True)]
    features = tuple(sorted({name for call in calls for name in call.features}))
    return calls[0]._replace(features=features, together=len(calls))


def serves(x: Tensor, weights: Weights, control: Optional, cell: str, count: int) -> bool:
    """Whether the implementation that gets `count` recurrences like this one can run them at the same time.

    In a program that is being compiled for a CUDA device the op is taken, and sees to it when it runs.
    """
    if transformed():
        return False
    if torch.compiler.is_compiling():
        return x.is_cuda
    if not x.is_cuda and backends.insisted() != "cuda":
        return False
    name = backends.choice(_call(x, weights, control, cell, 0)._replace(together=count))
    return name is not None and backends.has_together(name)


def _masked(x: Tensor, mask: Optional) -> Tensor:
    return x if mask is None else (x * mask).to(x.dtype)


def _hidden(states: Tensor, reverse: bool) -> Tensor:
    return _step_states(states, reverse)[0]


def _forward(
    input: Tensor,
    weights: Sequence[Optional],
    state0: Sequence[Tensor],
    controls: Sequence[Optional],
    masks: Sequence[Optional],
    cell: str,
    reverse: Sequence[bool],
    chained: bool,
    save: Sequence[bool],
    precision: str = "ieee",
) -> list[Tensor]:
    refuse_tangents(input, *state0, *weights)
    call = _choice_of(input, _each(weights), controls, cell)
    name = backends.choice(call)
    if input.shape[2] <= 1 or state0[0].shape[2] <= 1:
        # As of one recurrence: the kernels see memory, not the bit that negates it.
        input, *others = _resolved(input, *state0, *weights)
        state0, weights = others[: len(state0)], others[len(state0) :]
    each = _each(weights)
    if name is not None and backends.has_together(name):
        backends.select(call)
        run = backends.module(name, "together").recurrences_forward
        found = run(input, each, state0, controls, masks, cell, reverse, chained, save, precision)
        return [x for results in found for x in results]
    flat: list[Tensor] = []
    for k, own in enumerate(each):
        x = _masked(_hidden(flat[-3], reverse[k - 1]), masks[k]) if chained and k else input
        flat += _one_forward(x, own, state0[k], controls[k], cell, reverse[k], save[k], 0, precision)
    return flat


def _backward(
    grads: Sequence[Optional],
    input: Tensor,
    weights: Sequence[Optional],
    states: Sequence[Tensor],
    reserves: Sequence[Tensor],
    controls: Sequence[Optional],
    masks: Sequence[Optional],
    cell: str,
    reverse: Sequence[bool],
    chained: bool,
    needs: Sequence[bool],
    precision: str = "ieee",
) -> list[Tensor]:
    """Gradients of the input, and of the state and the weights of each recurrence; empty ones that nobody needs."""
    refuse_tangents(*grads, input, *weights)
    if input.shape[2] <= 1 or states[0].shape[3] <= 1:
        input, *others = _resolved(input, *grads, *weights)
        grads, weights = others[: len(grads)], others[len(grads) :]
    each, count = _each(weights), len(states)
    given = [list(grads[k * _OUTPUTS : (k + 1) * _OUTPUTS]) for k in range(count)]
    own = [[False, *needs[1 + k * (1 + _FIELDS) : 1 + (k + 1) * (1 + _FIELDS)]] for k in range(count)]
    call = _choice_of(input, each, controls, cell, any(of_one[3] is not None for of_one in given))
    name = backends.choice(call)
    if name is not None and backends.has_together(name):
        backends.select(call)
        wanted = [dict(zip(("input", "state0", *Weights._fields), of_one, strict=True)) for of_one in own]
        for k, of_one in enumerate(wanted):
            of_one["input"] = needs[0] and (k == 0 or not chained)
        run = backends.module(name, "together").recurrences_backward
        found = run(given, input, each, states, reserves, controls, masks, cell, reverse, chained, wanted, precision)
    else:
        found = []
        for k in reversed(range(count)):
            behind = chained and k > 0
            x = _masked(_hidden(states[k - 1], reverse[k - 1]), masks[k]) if behind else input
            own[k][0] = behind or needs[0]
            found.append(
                _one_backward(
                    given[k], x, each[k], states[k], reserves[k], controls[k], cell, reverse[k], own[k], 0, precision
                )
            )
            if behind:
                of_x, of_hidden = _masked(found[-1][0], masks[k]), given[k - 1][0]
                given[k - 1][0] = of_x if of_hidden is None else of_x + of_hidden
        found.reverse()
    of_input = [of_one[0] for of_one in found[: 1 if chained else count]]
    total = of_input[0]
    for x in of_input[1:]:
        total = total + x
    return [total, *(x for of_one in found for x in of_one[1:])]


def _forward_fake(
    input: Tensor,
    weights: Sequence[Optional],
    state0: Sequence[Tensor],
    controls: Sequence[Optional],
    masks: Sequence[Optional],
    cell: str,
    reverse: Sequence[bool],
    chained: bool,
    save: Sequence[bool],
    precision: str = "ieee",
) -> list[Tensor]:
    steps, batch, _ = input.shape
    found = []
    for state, saves in zip(state0, save, strict=True):
        count, _, hidden = state.shape
        saved = (steps, batch, CELLS[cell].reserve, hidden) if saves else (0,)
        found += [
            input.new_empty((count if saves else 1, steps + 1, batch, hidden)),
            input.new_empty(state.shape),
            input.new_empty(saved, dtype=accumulate_dtype(input.dtype)),
        ]
    return found


def _backward_fake(
    grads: Sequence[Optional],
    input: Tensor,
    weights: Sequence[Optional],
    states: Sequence[Tensor],
    reserves: Sequence[Tensor],
    controls: Sequence[Optional],
    masks: Sequence[Optional],
    cell: str,
    reverse: Sequence[bool],
    chained: bool,
    needs: Sequence[bool],
    precision: str = "ieee",
) -> list[Tensor]:
    shapes: list[Any] = [input.shape]
    for k, own in enumerate(_each(weights)):
        _, _, batch, hidden = states[k].shape
        shapes += [(CELLS[cell].states, batch, hidden), *(None if x is None else x.shape for x in own)]
    return [
        input.new_empty(shape if need and shape is not None else (0,))
        for shape, need in zip(shapes, needs, strict=True)
    ]


_library.impl("recurrences_forward", _forward, "CompositeExplicitAutograd")
_library.impl("recurrences_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("seqkernels::recurrences_forward", _forward_fake, lib=_library)
torch.library.register_fake("seqkernels::recurrences_backward", _backward_fake, lib=_library)

forward_op = torch.ops.seqkernels.recurrences_forward.default
backward_op = torch.ops.seqkernels.recurrences_backward.default


class _Recurrences(torch.autograd.Function):
    """All recurrences; `recorded` says of which the backward pass has gradients, of others nothing is kept for it."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        cell: str,
        reverse: tuple[bool, ...],
        chained: bool,
        recorded: tuple[bool, ...],
        save: tuple[bool, ...],
        gates: bool,
        precision: str,
        *tensors: Optional,
    ) -> tuple[Tensor, ...]:
        count = len(reverse)
        state0: Any = tensors[:count]
        controls, masks, weights = tensors[count : 2 * count], tensors[2 * count : 3 * count], tensors[3 * count :]
        forward = _forward if eager(input, *tensors) else forward_op
        found = forward(input, weights, state0, controls, masks, cell, reverse, chained, save, precision)
        which = [k for k in range(count) if recorded[k]]
        x = input
        if chained and which[0] > 0:
            before = which[0] - 1
            x = _masked(_hidden(found[3 * before], reverse[before]), masks[which[0]])
        ctx.save_for_backward(x, *_of(which, tensors, count), *(found[3 * k + i] for i in (0, 2) for k in which))
        ctx.settings = cell, tuple(reverse[k] for k in which), chained, gates, precision
        ctx.which, ctx.save = which, save
        ctx.insisted = insisted()
        ctx.set_materialize_grads(False)
        outputs: list[Tensor] = []
        constant: list[Tensor] = []
        for k in range(count):
            states, state_n, reserve = found[3 * k : 3 * k + 3]
            of_one = [*_step_states(states, reverse[k]), state_n]
            if gates:
                of_one.append(_gates(reserve, cell, input.dtype))
            outputs += of_one
            if not recorded[k]:
                constant += of_one
        if constant:
            ctx.mark_non_differentiable(*constant)
        return tuple(outputs)

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, *grads: Optional) -> tuple[Optional, ...]:
        cell, reverse, chained, gates, precision = ctx.settings
        which, every = ctx.which, len(ctx.save)
        count = len(which)
        x, *saved = ctx.saved_tensors
        tensors, states, reserves = saved[: -2 * count], saved[-2 * count : -count], saved[-count:]
        controls, masks, weights = tensors[count : 2 * count], tensors[2 * count : 3 * count], tensors[3 * count :]
        needs = [ctx.needs_input_grad[0], *_of(which, ctx.needs_input_grad[_SETTINGS:], every)]
        each = _outputs(grads, cell, ctx.save, gates)
        ordered = [grad for k in which for grad in each[k]]
        found: Sequence[Optional]
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or any(map(batched, ordered))):
            # The second order, or many gradients at once, which tensor operations alone can take.
            found = _by_operations(ctx.settings, ordered, x, tensors, needs)
        else:
            of_weights = needs[1 + 3 * count :]
            wanted = [needs[0]]
            for k in range(count):
                wanted += [needs[1 + k], *of_weights[k * _FIELDS : (k + 1) * _FIELDS]]
            backward = _backward if eager(x, *ordered, *tensors) else backward_op
            op = backward(
                ordered, x, weights, states, reserves, controls, masks, cell, reverse, chained, wanted, precision
            )
            made = [x if need else None for x, need in zip(op, wanted, strict=True)]
            of_each = [made[1 + k * (1 + _FIELDS) : 1 + (k + 1) * (1 + _FIELDS)] for k in range(count)]
            found = [
                made[0], *(of_one[0] for of_one in of_each), *(None,) * (2 * count),
                *(x for of_one in of_each for x in of_one[1:]),
            ]  # fmt: skip
        places = _of(which, range(every * (3 + _FIELDS)), every)
        returned: list[Optional] = [None] * (every * (3 + _FIELDS))
        for place, grad in zip(places, found[1:], strict=True):
            returned[place] = grad
        return found[0], *(None,) * (_SETTINGS - 1), *returned


def _outputs(given: Sequence[Any], cell: str, save: Sequence[bool], gates: bool) -> list[tuple[Any, Any, Any, Any]]:
    """What `_Recurrences` returns, or the gradients of it, by recurrence, ``None`` for what one does not return.

    `_Recurrences` itself does not return ``None``: dynamo counts only tensors, and so finds others without gradient.
    """
    there, found = iter(given), []
    for saves in save:
        has_cells = saves and CELLS[cell].states == 2
        found.append((next(there), next(there) if has_cells else None, next(there), next(there) if gates else None))
    return found


def _of(which: Sequence[int], tensors: Sequence[Any], count: int) -> list[Any]:
    """Of `tensors`, or of what there is one of for each, those of some recurrences of `count`."""
    firsts = [tensors[i * count + k] for i in range(3) for k in which]
    return firsts + [tensors[3 * count + k * _FIELDS + i] for k in which for i in range(_FIELDS)]


def _by_operations(
    settings: tuple[str, Sequence[bool], bool, bool, str],
    grads: Sequence[Optional],
    input: Tensor,
    tensors: Sequence[Optional],
    needs: Sequence[bool],
) -> list[Optional]:
    """Gradients of `input` and `tensors`, as a graph or of many gradients, by the reference's operations."""
    from ..backends.reference.recurrence import recurrence as reference

    cell, reverse, chained, gates, _ = settings
    count = len(reverse)
    with torch.enable_grad():
        copies = apart([input, *tensors])
        x: Any = copies[0]
        state0, controls, masks = (copies[1 + k * count : 1 + (k + 1) * count] for k in range(3))
        outs: list[Any] = []
        for k, own in enumerate(_each(copies[1 + 3 * count :])):
            state: Any = state0[k]
            states, state_n, reserve = reference(x, own, state, controls[k], cell, reverse[k])
            hidden, *cells = _step_states(states, reverse[k])
            if chained and k + 1 < count:
                x = _masked(hidden, masks[k + 1])
            outs += [hidden, cells[0] if cells else None, state_n, None]
            if gates:
                outs[-1] = _gates(reserve, cell, input.dtype)
    return gradients(outs, grads, copies, needs)


def _check_mask(mask: object, shape: tuple[int, ...], input: Tensor, fed: bool) -> None:
    if mask is None:
        return
    if not fed:
        raise ValueError("masks: expected None for a recurrence that no other one feeds, got a mask")
    if not isinstance(mask, Tensor):
        raise TypeError(f"masks: expected a Tensor or None, got {type(mask).__name__}")
    if mask.shape != shape or mask.device != input.device:
        raise ValueError(
            f"masks: expected {shape} on {input.device} as input or None, got {tuple(mask.shape)} on {mask.device}"
        )
    if not mask.is_floating_point():
        raise TypeError(f"masks: expected a floating point dtype, got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError("masks: expected no requires_grad, since they have no gradient; detach them")


def _recorded(input: Tensor, weights: Sequence[Weights], state0: Sequence[Tensor], chained: bool) -> tuple[bool, ...]:
    """Of which recurrences a gradient is wanted, or of what they read."""
    if not torch.is_grad_enabled():
        return (False,) * len(weights)
    found = [records(input, state, *own) for state, own in zip(state0, weights, strict=True)]
    return tuple(itertools.accumulate(found, operator.or_) if chained else found)


def recurrences(
    input: Tensor,
    weights: Sequence[Weights],
    state0: Sequence[Tensor],
    controls: Sequence[Optional],
    masks: Sequence[Optional],
    *,
    cell: str,
    reverse: Sequence[bool],
    chained: bool,
    gates: bool = False,
    states: bool = False,
    precision: str = "ieee",
) -> list[tuple[Tensor, Optional, Tensor, Optional]]:
    """Run n recurrences of one kind and size. Not for ``torch.func`` and forward-mode gradients: see `serves`.

    Args:
        input: (T, B, I), of all of them; of the first one, if they are `chained`.
        weights: n, with a `weight_ih` of each that is not the first.
        state0: n initial states (S, B, H).
        controls: n of (T, B) uint8 or ``None``.
        masks: n of (T, B, H) or ``None``, factors of the hidden states that a `chained` one reads, so ``None`` for the
            first and where nothing is `chained`: dropout between layers. Constants; in float32 too, where factors are
            no 16-bit numbers.
        cell: a key of `seqkernels.cells.CELLS`.
        reverse: n, whether one runs from the last step to the first; the same of all, if they are `chained`.
        chained: whether each reads the hidden states of the one before it.
        gates, states, precision: as of `recurrence`.

    Returns:
        For each what `recurrence` returns: ``hidden``, ``cells``, ``state_n`` and the gates, or ``None`` for those.

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed.
    """
    count = len(weights)
    for name, given in (("state0", state0), ("controls", controls), ("masks", masks), ("reverse", reverse)):
        if len(given) != count:
            raise ValueError(f"{name}: expected {count}, one for each of weights, got {len(given)}")
    if count == 0:
        raise ValueError("weights: expected one or more, got none")
    if chained and len(set(reverse)) > 1:
        raise ValueError(f"reverse: expected the same of all that are chained, got {tuple(reverse)}")
    x = input
    for k, own in enumerate(weights):
        if chained and k and own.weight_ih is None:
            raise ValueError("weights: expected a weight_ih of each that another one feeds, got None")
        check(x, own, state0[k], controls[k], cell)
        hidden = weights[0].weight_hh.shape[1]
        if own.weight_hh.shape[1] != hidden:
            raise ValueError(f"weights: expected H = {hidden} of all, got {own.weight_hh.shape[1]}")
        _check_mask(masks[k], (*input.shape[:2], hidden), input, fed=chained and k > 0)
        if chained:
            x = input.new_empty(()).expand(*input.shape[:2], hidden)
    precision = of_products(check_precision(precision), input)
    stored = gates and CELLS[cell].reserve > 0
    flat = [t for own in weights for t in own]
    found: list[tuple[Tensor, Optional, Tensor, Optional]] = []
    recorded = _recorded(input, weights, state0, chained)
    save = [own or stored or states for own in recorded]
    if any(recorded):
        tensors: Sequence[Optional] = (*state0, *controls, *masks, *flat)
        if torch.compiler.is_compiling():
            # Dynamo takes no tensor twice, and zeros and controls are often those of all.
            tensors = apart(tensors)
        settings = (cell, tuple(reverse), chained, recorded, tuple(save), stored, precision)
        outputs = _Recurrences.apply(input, *settings, *tensors)
        found = _outputs(outputs, cell, save, stored)
    else:
        direct = eager(input, *state0, *controls, *masks, *flat)
        forward = _forward if direct else forward_op
        made = forward(input, flat, state0, controls, masks, cell, reverse, chained, save, precision)
        for k in range(count):
            saved, state_n, reserve = made[3 * k : 3 * k + 3]
            of_steps = (_own_step_states if direct else _step_states)(saved, reverse[k])
            of_gates = _gates(reserve, cell, input.dtype) if stored else None
            found.append((of_steps[0], of_steps[1] if len(of_steps) == 2 else None, state_n, of_gates))
    if not gates or stored:
        return found
    return [(*of_one[:3], of_one[0].unsqueeze(2)) for of_one in found]
