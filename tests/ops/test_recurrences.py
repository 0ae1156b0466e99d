"""Several recurrences in one op: what the same ones give one after the other."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels import testing
from seqkernels.cells import CELLS, CONSTANTS, Weights
from seqkernels.ops import together
from seqkernels.ops.recurrence import recurrence
from seqkernels.ops.together import recurrences

from ..conftest import widest

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
OPTIONS = ("reset_state", "recurrent_mask", "zoneout", "seed")


class Given(NamedTuple):
    """Arguments of `recurrences`, by position."""

    input: Tensor
    weights: list[Weights]
    state0: list[Tensor]
    controls: list[Tensor | None]
    masks: list[Tensor | None]

    def to(self, dtype: torch.dtype) -> Given:
        def cast(x: Tensor) -> Tensor:
            x = x.detach().to(dtype) if x.is_floating_point() else x
            return x.requires_grad_(x.is_floating_point())

        weights = [
            Weights._make(x if x is None or name in CONSTANTS else cast(x) for name, x in own._asdict().items())
            for own in self.weights
        ]
        weights = [
            own._replace(recurrent_mask=None if own.recurrent_mask is None else own.recurrent_mask.to(dtype))
            for own in weights
        ]
        masks = [None if x is None else x.to(torch.promote_types(dtype, x.dtype)) for x in self.masks]
        return Given(cast(self.input), weights, [cast(x) for x in self.state0], self.controls, masks)

    def leaves(self) -> dict[str, Tensor]:
        """Tensors with a gradient."""
        found = {"input": self.input} | {f"state0[{k}]": x for k, x in enumerate(self.state0)}
        for k, own in enumerate(self.weights):
            found |= {f"{name}[{k}]": x for name, x in own._asdict().items() if x is not None and name not in CONSTANTS}
        return {name: x for name, x in found.items() if x.requires_grad}


def given_of(cell, count, shape, dtype, chained, *, control=True, masked=False, names=(), input_size=7, seed=0):
    """Random arguments of `count` recurrences."""
    _, batch, hidden = shape
    weights, state0, controls, masks, first = [], [], [], [], None
    generator = torch.Generator().manual_seed(seed)
    for k in range(count):
        size = hidden if chained and k else input_size
        inputs = testing.recurrence_inputs(
            cell, *shape, dtype, input_size=size, control=control, detach=True, seed=seed + k
        )
        options = testing.recurrence_options(
            cell, batch, hidden, dtype, names=("weight_ih", "bias_ih", *names), input_size=size, seed=seed + k
        )
        first = inputs.input if first is None else first
        weights.append(testing.recurrence_weights(inputs.weight_hh, inputs.bias_hh, **options))
        state0.append(inputs.state0)
        controls.append(inputs.control)
        drops = masked and chained and k
        masks.append(1.25 * (torch.rand(shape, generator=generator) < 0.8).to(dtype) if drops else None)
    return Given(first, weights, state0, controls, masks)


def in_turn(given, *, cell, reverse, chained, gates=False, states=False):
    """`recurrences` by one `recurrence` after the other."""
    found, x = [], given.input
    for k, own in enumerate(given.weights):
        options = own._asdict()
        hidden, cells, state_n, *more = recurrence(
            x, options.pop("weight_hh"), options.pop("bias_hh"), given.state0[k], given.controls[k],
            cell=cell, reverse=reverse[k], gates=gates, states=states, **options,
        )  # fmt: skip
        found.append((hidden, cells, state_n, more[0] if gates else None))
        if chained and k + 1 < len(given.weights):
            mask = given.masks[k + 1]
            x = hidden if mask is None else (hidden * mask).to(hidden.dtype)
    return found


def results(fn, given, grads=None, **settings):
    """Outputs and gradients by name; of random gradients, or of those of `grads`."""
    outputs = {}
    for k, of_one in enumerate(fn(given, **settings)):
        outputs |= {f"{name}[{k}]": x for name, x in zip(("h", "c", "n", "g"), of_one, strict=True) if x is not None}
    recorded = {name: x for name, x in outputs.items() if x.requires_grad}
    grads = testing.random_grads(recorded) if grads is None else grads
    leaves = given.leaves()
    named = [name for name in recorded if name in grads]
    found = torch.autograd.grad(
        [outputs[name] for name in named], list(leaves.values()),
        [grads[name].to(outputs[name].dtype) for name in named], allow_unused=True,
    )  # fmt: skip
    gradients = {f"grad_{name}": x for name, x in zip(leaves, found, strict=True) if x is not None}
    return {name: x.detach() for name, x in outputs.items()} | gradients, grads


def call(given, **settings):
    return recurrences(*given, **settings)


def check(given, dtype, **settings):
    """Asserts that errors are within the budget, beside those of the reference one after the other."""
    found, grads = results(call, given.to(dtype), **settings)
    with seqkernels.use_backend("reference"):
        exact, _ = results(in_turn, given.to(torch.float64), grads, **settings)
        own, _ = results(in_turn, given.to(min(dtype, torch.float32, key=lambda d: d.itemsize)), grads, **settings)
    assert found.keys() == exact.keys()
    for name, x in found.items():
        testing.assert_within_budget(x, exact[name], own[name], name)


WAYS = [(True, (False, False, False)), (True, (True, True)), (False, (False, True)), (False, (False,) * 6)]


@pytest.mark.parametrize(("chained", "reverse"), WAYS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_results(plain_runner, cell, chained, reverse):
    dtype = widest(plain_runner.backend)
    for shape, masked in (((5, 3, 9), False), ((4, 9, 17), True), ((1, 1, 8), False)):
        given = given_of(cell, len(reverse), shape, torch.float32, chained, masked=masked)
        gates = masked and plain_runner.backend != "numba"  # which has none
        check(given, dtype, cell=cell, reverse=reverse, chained=chained, gates=gates)


@pytest.mark.parametrize("cell", CELLS)
def test_options(options_backend, cell):
    names = [*OPTIONS, "peephole"] if cell == "lstm" else OPTIONS
    given = given_of(cell, 3, (4, 3, 9), torch.float32, True, names=names, masked=True)
    check(given, torch.float32, cell=cell, reverse=(False,) * 3, chained=True, gates=True, states=True)


def test_no_steps_or_rows(plain_runner):
    dtype = widest(plain_runner.backend)
    for shape in ((0, 3, 4), (3, 0, 4)):
        for chained in (True, False):
            given = given_of("lstm", 2, shape, torch.float32, chained)
            check(given, dtype, cell="lstm", reverse=(False, False), chained=chained)


def test_without_gradients(plain_runner):
    given = given_of("lstm", 3, (4, 3, 9), torch.float32, True, masked=True)
    settings = {"cell": "lstm", "reverse": (False,) * 3, "chained": True}
    with torch.no_grad():
        found = call(given, **settings)
        for states in (True, False):
            expected = call(given, **settings, states=states)
            for (hidden, cells, state_n, gates), (same, with_cells, last, _) in zip(found, expected, strict=True):
                assert cells is None
                assert gates is None
                assert (with_cells is not None) == states
                assert torch.equal(hidden, same)
                assert torch.equal(state_n, last)
    for (hidden, _, _, _), (same, _, _, _) in zip(found, call(given, **settings), strict=True):
        assert torch.equal(hidden, same)


@pytest.mark.parametrize("chained", [True, False])
def test_only_some_gradients(plain_runner, chained):
    """Of one output, and to one tensor."""
    settings = {"cell": "gru", "reverse": (False,) * 3, "chained": chained}

    def fresh():
        given = given_of("gru", 3, (4, 3, 9), torch.float32, chained, control=False, masked=True)
        return given.to(widest(plain_runner.backend))

    def of_second(given):
        state_n = call(given, **settings)[1][2]
        leaves = {name: x for name, x in given.leaves().items() if x.requires_grad}
        found = torch.autograd.grad(state_n.sum(), list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, found, strict=True))

    every = of_second(fresh())
    for name, x in every.items():
        read = "[1]" in name or name == "input" or ("[0]" in name and chained)
        assert read == (x is not None and bool((x != 0).any())), name
        given = fresh()
        for other, leaf in given.leaves().items():
            leaf.requires_grad_(other == name)
        if not read:
            continue
        (alone,) = of_second(given).values()
        assert torch.equal(alone, x), name


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrences_without_gradients(plain_runner, cell, chained):
    """Of those that nothing wants a gradient of no gates are kept, and no backward pass is run."""
    dtype = widest(plain_runner.backend)
    settings = {"cell": cell, "reverse": (False,) * 3, "chained": chained}
    frozen = 2 if chained else 1

    def given():
        found = given_of(cell, 3, (4, 3, 9), torch.float32, chained, masked=True).to(dtype)
        found.input.requires_grad_(False)
        for k in range(frozen):
            for x in (found.state0[k], *found.weights[k]):
                if x is not None and x.is_floating_point():
                    x.requires_grad_(False)
        return found

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        outputs = call(given(), **settings)
    reserve = (4, 3, CELLS[cell].reserve, 9)
    assert kept.count(reserve) == 3 - frozen
    for k, of_one in enumerate(outputs):
        assert all(x is None or x.requires_grad == (k >= frozen) for x in of_one)
        # As of one recurrence: cell states that nothing asked for are not there.
        assert (of_one[1] is not None) == (cell == "lstm" and k >= frozen)
    found, grads = results(call, given(), states=True, **settings)
    expected, _ = results(in_turn, given(), grads, states=True, **settings)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text)
    # The second order, and many gradients at once.
    leaves = given()
    hidden, _, state_n, _ = call(leaves, **settings)[-1]
    wanted = [leaves.weights[-1].weight_hh, leaves.weights[-1].weight_ih, leaves.state0[-1]]
    first = torch.autograd.grad(hidden.square().sum() + state_n.sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), wanted, retain_graph=True)
    twice = torch.stack([2 * hidden.detach(), 4 * hidden.detach()])
    many = torch.autograd.grad(hidden, wanted, twice, is_grads_batched=True, retain_graph=True)
    others = given()
    hidden, _, state_n, _ = in_turn(others, **settings)[-1]
    wanted = [others.weights[-1].weight_hh, others.weights[-1].weight_ih, others.state0[-1]]
    first = torch.autograd.grad(hidden.square().sum() + state_n.sum(), wanted, create_graph=True)
    expected = torch.autograd.grad(sum(x.square().sum() for x in first), wanted, retain_graph=True)
    of_hidden = torch.autograd.grad(hidden.square().sum(), wanted)
    for a, b, c, d in zip(second, expected, many, of_hidden, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(c, torch.stack([d, 2 * d]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chained", [True, False])
def test_second_order(plain_runner, chained):
    given = given_of("lstm", 2, (2, 2, 2), torch.float64, chained, control=False, masked=True, input_size=2)
    settings = {"cell": "lstm", "reverse": (False, False), "chained": chained}
    # Float64 is the reference's, and numba's and the CPU kernels'; what computes the second order is the same for all.
    name = "reference" if plain_runner.backend in ("cuda", "triton") else plain_runner.backend
    leaves = given.leaves()

    def outputs(*tensors):
        at = dict(zip(leaves, tensors, strict=True))
        weights = [
            own._replace(**{n: at[f"{n}[{k}]"] for n in own._fields if f"{n}[{k}]" in at})
            for k, own in enumerate(given.weights)
        ]
        state0 = [at[f"state0[{k}]"] for k in range(2)]
        found = recurrences(at["input"], weights, state0, given.controls, given.masks, **settings)
        return tuple(x for of_one in found for x in of_one if x is not None)

    with seqkernels.use_backend(name):
        assert torch.autograd.gradcheck(outputs, tuple(leaves.values()), fast_mode=True)
        assert torch.autograd.gradgradcheck(outputs, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])
def test_negated_by_a_bit(plain_runner, cell):
    """Parts of complex numbers, whose memory has the other sign."""
    dtype = widest(plain_runner.backend)
    settings = {"cell": cell, "reverse": (False, False), "chained": True}
    given = given_of(cell, 2, (1, 1, 1), dtype, True, control=False, input_size=1).to(dtype)
    expected, grads = results(call, given, **settings)

    def negated(x):
        return None if x is None else torch.complex(torch.zeros_like(x), -x.detach()).conj().imag.requires_grad_()

    given = given._replace(
        input=negated(given.input),
        weights=[Weights._make(map(negated, own)) for own in given.weights],
        state0=list(map(negated, given.state0)),
    )
    assert given.input.is_neg()
    found, _ = results(call, given, {name: negated(x).detach() for name, x in grads.items()}, **settings)
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text)


def test_many_gradients_at_once(plain_runner):
    dtype = widest(plain_runner.backend)
    given = given_of("gru", 2, (3, 2, 4), dtype, True)
    output = call(given, cell="gru", reverse=(False, False), chained=True)[-1][0]
    leaves = list(given.leaves().values())
    grads = torch.randn(5, *output.shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    many = torch.autograd.grad(output, leaves, grads, retain_graph=True, is_grads_batched=True)
    for k in range(5):
        for x, y in zip(many, torch.autograd.grad(output, leaves, grads[k], retain_graph=True), strict=True):
            torch.testing.assert_close(x[k], y, rtol=1e-5, atol=1e-6)


def _op_calls(cell, chained, gates):
    given = given_of(cell, 2, (4, 3, 5), torch.float32, chained, masked=True)
    given = Given(
        given.input.detach(),
        [Weights._make(None if x is None else x.detach() for x in own) for own in given.weights],
        [x.detach() for x in given.state0],
        *given[3:],
    )
    flat = [x for own in given.weights for x in own]
    reverse = [False, not chained]
    for save in ([False, False], [False, True], [True, True]):
        arguments = (given.input, flat, given.state0, given.controls, given.masks, cell, reverse, chained, save)
        yield together.forward_op, arguments
    made = together.forward_op(*arguments)
    grads = []
    for k in range(2):
        states, state_n, reserve = made[3 * k : 3 * k + 3]
        of_gates = torch.ones_like(reserve[:, :, : CELLS[cell].gates]) if CELLS[cell].reserve and gates else None
        grads += [torch.ones_like(states[0, 1:]), None, torch.ones_like(state_n), of_gates if k else None]
    needs = [True]
    for own in given.weights:
        needs += [True, *(x is not None and name not in CONSTANTS for name, x in own._asdict().items())]
    saved = (given.input, flat, made[::3], made[2::3], given.controls, given.masks, cell, reverse, chained)
    yield together.backward_op, (grads, *saved, needs)
    yield together.backward_op, (grads, *saved, [need and k % 3 != 0 for k, need in enumerate(needs)])


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_opcheck(plain_runner, cell, chained):
    for op, arguments in _op_calls(cell, chained, plain_runner.backend != "numba"):
        torch.library.opcheck(op, arguments, test_utils=CHECKS)


def _with(given, **changes):
    return given._replace(**changes)


def test_errors():
    given = given_of("gru", 2, (3, 2, 4), torch.float32, True)
    settings = {"cell": "gru", "reverse": (False, False), "chained": True}
    call(given, **settings)
    with pytest.raises(ValueError, match=r"state0: expected 2, one for each of weights, got 1"):
        call(_with(given, state0=given.state0[:1]), **settings)
    with pytest.raises(ValueError, match=r"weights: expected one or more, got none"):
        recurrences(given.input, [], [], [], [], cell="gru", reverse=(), chained=True)
    with pytest.raises(ValueError, match=r"reverse: expected the same of all that are chained, got \(False, True\)"):
        call(given, **settings | {"reverse": (False, True)})
    other = given_of("gru", 1, (3, 2, 6), torch.float32, True, input_size=4)
    both = {"weights": [given.weights[0], other.weights[0]], "state0": [given.state0[0], other.state0[0]]}
    with pytest.raises(ValueError, match=r"weights: expected H = 4 of all, got 6"):
        call(_with(given, **both), **settings)
    bare = given.weights[1]._replace(weight_ih=None, bias_ih=None)
    with pytest.raises(ValueError, match=r"weights: expected a weight_ih of each that another one feeds, got None"):
        call(_with(given, weights=[given.weights[0], bare]), **settings)
    with pytest.raises(ValueError, match=r"weight_ih: expected shape \(12, 4\), got \(12, 7\)"):
        call(_with(given, weights=[given.weights[0], given.weights[0]]), **settings)
    with pytest.raises(TypeError, match=r"weight_hh: expected a Tensor, got NoneType"):
        call(_with(given, weights=[given.weights[0]._replace(weight_hh=None), given.weights[1]]), **settings)


def test_errors_of_masks():
    given = given_of("gru", 2, (3, 2, 4), torch.float32, True)
    settings = {"cell": "gru", "reverse": (False, False), "chained": True}
    ones = torch.ones(3, 2, 4)
    for mask, error, text in (
        (torch.ones(2, 4), ValueError, r"expected \(3, 2, 4\) on cpu as input or None, got \(2, 4\) on cpu"),
        (ones.to("meta"), ValueError, r"expected \(3, 2, 4\) on cpu as input or None, got \(3, 2, 4\) on meta"),
        (ones.bool(), TypeError, r"expected a floating point dtype, got torch\.bool"),
        (ones.clone().requires_grad_(), ValueError, r"expected no requires_grad, since they have no gradient"),
        (0.5, TypeError, r"expected a Tensor or None, got float"),
    ):
        with pytest.raises(error, match="masks: " + text):
            call(_with(given, masks=[None, mask]), **settings)
    text = r"masks: expected None for a recurrence that no other one feeds, got a mask"
    with pytest.raises(ValueError, match=text):
        call(_with(given, masks=[ones, None]), **settings)
    given = given_of("gru", 2, (3, 2, 4), torch.float32, False)
    with pytest.raises(ValueError, match=text):
        call(_with(given, masks=[None, ones]), **settings | {"chained": False})
