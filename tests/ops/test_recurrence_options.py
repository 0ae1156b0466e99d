"""The options of the recurrence, for every implementation that has them."""

from __future__ import annotations

import functools
import itertools
import math
import re

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import seqkernels
from seqkernels import backends, testing
from seqkernels.backends import Call
from seqkernels.backends.cuda import emulator
from seqkernels.cells import CELLS, CONSTANTS, DETACH, DTYPES, HOLD, RESET, Weights
from seqkernels.ops.recurrence import backward_op, forward_op, recurrence

from ..conftest import widest
from .judging import expected, judge, judge_draws

SIZE = 6


def _names(cell):
    """The options of a cell."""
    return [name for name in testing.OPTIONS if cell == "lstm" or name not in ("peephole", "norm_c")]


def _alone(name):
    """An option with what it needs."""
    return {"bias_ih": ("weight_ih", "bias_ih"), "seed": ("zoneout", "seed")}.get(name, (name,))


def _call(cell, shape, dtype=torch.float32, names=(), *, count=1, layout="contiguous", requires_grad=True, **options):
    """Inputs (several draws of them) and options."""
    size = SIZE if "weight_ih" in names else None
    common = {"input_size": size, "layout": layout, "requires_grad": requires_grad}
    inputs = [testing.recurrence_inputs(cell, *shape, dtype, seed=k, **common, **options) for k in range(count)]
    return inputs, testing.recurrence_options(cell, *shape[1:], dtype, names=names, **common)


def _count(shape, layout="contiguous"):
    """So many draws of a shape that their results have some hundred elements together that are not alike."""
    alike = {"scalar": math.prod(shape), "expanded": shape[0]}.get(layout, 1)
    return min(64, 1 + 200 * max(1, alike) // max(1, math.prod(shape)))


CASES = [(cell, name) for cell in CELLS for name in _names(cell)]


def _feature(name):
    """The word of an option in `Call.features`; empty for what everybody has."""
    return {"weight_ih": "", "bias_ih": "", "norm_h": "norm", "norm_c": "norm", "seed": "zoneout"}.get(name, name)


@pytest.mark.parametrize(("cell", "name"), CASES)
def test_each_option(runner, cell, name):
    """It is right, or declined with the reason."""
    features = tuple(filter(None, ["control", _feature(name)]))
    reason = backends.why_not(runner.backend, Call("recurrence", "cpu", torch.float32, cell, features))
    for reverse in (False, True):
        # Norms divide by a deviation that is now and then small: the errors have outliers.
        more = {"control": True, "detach": reverse, "bias": reverse, "count": 6 if name.startswith("norm") else 1}
        draws, options = _call(cell, (5, 3, 19), names=_alone(name), **more)
        if reason is None:
            results = testing.check_recurrence(*draws, cell=cell, reverse=reverse, **options)
            assert (f"grad_{name}" in results) == (name not in CONSTANTS)
        else:
            assert _feature(name) in reason
            text = rf"'{runner.backend}' cannot run {cell} recurrence .* with .*{_feature(name)}: {re.escape(reason)}"
            with pytest.raises(seqkernels.BackendError, match=text):
                recurrence(*draws[0], cell=cell, reverse=reverse, **options)


def test_who_has_the_options():
    every = ("control", "gates", "norm", "peephole", "recurrent_mask", "reset_state", "zoneout")
    for cell, dtype in itertools.product(CELLS, DTYPES):
        call = Call("recurrence", "cpu", dtype, cell, every)
        assert backends.why_not("reference", call) is None
        if backends.backend("native").unavailable() is None:
            assert backends.why_not("native", call) is None
        if backends.backend("cuda").unavailable() is None and dtype in (torch.float32, torch.float16, torch.bfloat16):
            on = "cpu" if emulator.in_use() else "cuda"
            assert backends.why_not("cuda", call._replace(device=on, hidden=64)) is None
        if backends.backend("numba").unavailable() is None:
            assert backends.why_not("numba", call) == f"has no {', '.join(every[1:])}"


@functools.cache
def _all_options(cell, shape, dtype, names):
    """Draws, gradients and options of a call, and what its results are judged by."""
    draws, options = _call(cell, shape, dtype, names, count=4, control=True, detach=True)
    options |= {"cell": cell, "reverse": shape[0] == 4, "gates": True}
    with torch.no_grad():
        grads = testing.random_grads(testing.evaluate(testing.recurrence_oracle, draws[0], {}, **options))
    if cell == "rnn_relu" and dtype.itemsize == 2:
        # Rounding moves elements over 0, which changes gradients by more than any budget.
        grads = {}
    return draws, grads, options, [expected(inputs, grads, **options) for inputs in draws]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_all_options(options_runner, cell, dtype):
    for shape in ((3, 2, 24), (6, 4, 33), (4, 9, 16)):
        draws, grads, options, by = _all_options(cell, shape, dtype, tuple(_names(cell)))
        found = [testing.evaluate(recurrence, inputs, grads, **options) for inputs in draws]
        assert found[0].keys() == by[0].exact.keys()
        assert all(x.dtype == dtype for x in found[0].values())
        judge_draws(found, by)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 2, 0)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(options_backend, cell, shape):
    inputs, options = _call(cell, shape, names=_names(cell), control=True)
    testing.check_recurrence(*inputs, cell=cell, gates=True, **options)


@hypothesis.given(data=st.data(), cell=st.sampled_from(list(CELLS)))
def test_any_options(options_backend, data, cell):
    shape = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 35)), "shape")
    drawn = data.draw(st.sets(st.sampled_from(_names(cell))), "options")
    names = [name for name in _names(cell) if any(name in _alone(other) for other in drawn)]
    # A norm of equal elements is nothing but their rounding errors, 300 times as large.
    layouts = testing.LAYOUTS[:-2] if {"norm_h", "norm_c"} & set(names) else testing.LAYOUTS
    layout = data.draw(st.sampled_from(layouts), "layout")
    flags = {name: data.draw(st.booleans(), name) for name in ("reverse", "gates", "bias", "control")}
    inputs, options = _call(
        cell, shape, widest(options_backend), names, count=_count(shape, layout), layout=layout, bias=flags.pop("bias"),
        control=flags.pop("control"), detach=True,
    )  # fmt: skip
    testing.check_recurrence(*inputs, cell=cell, **flags, **options)


def _differentiable(cell, inputs, options, **more):
    """A function of the tensors with a gradient, and these."""
    names = [name for name, x in options.items() if x.requires_grad]

    def outputs(*tensors):
        given = options | dict(zip(names, tensors[4:], strict=True))
        return tuple(
            x for x in recurrence(*tensors[:4], inputs.control, cell=cell, gates=True, **given, **more) if x is not None
        )

    return outputs, (*inputs[:4], *(options[name] for name in names))


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize(("cell", "name"), [*CASES, *((cell, "all") for cell in CELLS)])
def test_gradcheck(options_backend, cell, name):
    names = _names(cell) if name == "all" else _alone(name)
    (inputs,), options = _call(cell, (3, 2, 3), torch.float64, names, control=True)
    outputs, leaves = _differentiable(cell, inputs, options, reverse=len(name) % 2 == 0)
    # Of a kernel every element; the reference is autograd's own work.
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=options_backend == "reference")


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "rnn_relu"])
def test_gradgradcheck(options_backend, cell):
    (inputs,), options = _call(cell, (2, 2, 2), torch.float64, _names(cell), control=True)
    outputs, leaves = _differentiable(cell, inputs, options)
    assert torch.autograd.gradgradcheck(outputs, leaves, fast_mode=True)


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("cell", CELLS)
def test_first_order_is_the_same_where_the_second_is_wanted(options_backend, cell):
    (inputs,), options = _call(cell, (4, 3, 5), torch.float64, _names(cell), control=True, detach=True)
    outputs, leaves = _differentiable(cell, inputs, options)
    values = outputs(*leaves)
    names = ("hidden", "cells", "state_n", "gates") if cell == "lstm" else ("hidden", "state_n", "gates")
    grads = testing.random_grads(dict(zip(names, values, strict=True)))
    found = torch.autograd.grad(values, leaves, list(grads.values()), create_graph=True)
    assert all(x.requires_grad for x in found)
    names = (*inputs._fields[:4], *(name for name, x in options.items() if x.requires_grad))
    found = {f"grad_{name}": x for name, x in zip(names, found, strict=True)}
    judge(found, inputs, grads, cell=cell, gates=True, **options)


def _ops_call(inputs, options, cell):
    weights = testing.recurrence_weights(inputs.weight_hh, inputs.bias_hh, **options)
    states, state_n, reserve = forward_op(inputs.input, weights, inputs.state0, inputs.control, cell, True, True)
    gates = reserve[:, :, : CELLS[cell].gates] if CELLS[cell].reserve else states[0, :-1].unsqueeze(2)
    # Exact in float32, as the inputs.
    outputs = states[0, :-1], states[1, :-1] if cell == "lstm" else None, state_n, gates
    grads = tuple(None if x is None else x.cos().float().double() for x in outputs)
    return grads, inputs.input, weights, states, reserve, inputs.control, cell, True


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("cell", CELLS)
def test_only_what_is_needed_is_given(options_backend, cell):
    (inputs,), options = _call(cell, (4, 3, 9), torch.float64, _names(cell), requires_grad=False, control=True)
    call = _ops_call(inputs, options, cell)
    fields = ("input", "state0", *Weights._fields)
    given = [x is not None for x in (True, True, *call[2])]
    every = backward_op(*call, [True] * len(fields))
    for name, x, has in zip(fields, every, given, strict=True):
        assert (x.numel() > 0) == (has and name not in CONSTANTS)
    for k, x in enumerate(every):
        for j, y in enumerate(backward_op(*call, [j == k for j in range(len(fields))])):
            assert torch.equal(y, x) if j == k else y.shape == (0,)


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("cell", CELLS)
def test_what_one_saves_another_reads(options_backend, options_reader, cell):
    common = {"requires_grad": False, "control": True, "detach": True}
    (inputs,), options = _call(cell, (4, 3, 9), torch.float64, _names(cell), **common)
    call = _ops_call(inputs, options, cell)
    assert (call[4][(call[5] & HOLD).bool()] == 0).all()
    needs = [x is not None for x in (True, True, *call[2])]
    with seqkernels.use_backend(options_reader):
        every = backward_op(*call, needs)
    found = {f"grad_{n}": x for n, x in zip(("input", "state0", *Weights._fields), every, strict=True) if x.numel()}
    grads = {n: x for n, x in zip(("hidden", "cells", "state_n", "gates"), call[0], strict=True) if x is not None}
    judge(found, inputs, grads, cell=cell, reverse=True, gates=True, **options)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_another_default_dtype_changes_nothing(options_backend, cell, default):
    names = ["weight_ih", "bias_ih", "reset_state", "norm_h", *(["peephole", "norm_c"] if cell == "lstm" else [])]
    inputs = testing.recurrence_inputs(cell, 5, 3, 8, control=True, input_size=6)
    options = testing.recurrence_options(cell, 3, 8, names=names, input_size=6)
    grads = testing.random_grads(testing.evaluate(recurrence, inputs, {}, cell=cell, **options))
    whole = testing.evaluate(recurrence, inputs, grads, cell=cell, **options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = testing.evaluate(recurrence, inputs, grads, cell=cell, **options)
    finally:
        torch.set_default_dtype(before)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("cell", CELLS)
def test_gates_are_those_of_the_step(options_backend, cell):
    (inputs,), options = _call(cell, (4, 3, 33), names=_names(cell)[:3], control=True, requires_grad=False)
    hidden, cells, _, gates = recurrence(*inputs, cell=cell, gates=True, states=True, **options)
    assert gates.shape == (4, 3, CELLS[cell].gates, 33)
    held = (inputs.control & HOLD).bool()
    assert cell not in ("lstm", "gru") or (gates[held] == 0).all()
    reset = (inputs.control & RESET).bool().unsqueeze(2)
    now = hidden.unsqueeze(0) if cells is None else torch.stack((hidden, cells))
    before = torch.cat((inputs.state0.unsqueeze(1), now[:, :-1]), 1)
    before = torch.where(reset, options["reset_state"].unsqueeze(1).unsqueeze(1), before)

    def made(dtype):
        """The states that the gates, rounded as they are, make of the states before."""
        state, parts = before.to(dtype), gates.to(dtype).unbind(2)
        if cell == "lstm":
            i, f, g, o = parts
            c = f * state[1] + i * g
            return torch.stack((o * c.tanh(), c))
        return ((1 - parts[1]) * parts[2] + parts[1] * state[0] if cell == "gru" else parts[0]).unsqueeze(0)

    testing.assert_within_budget(*(x[:, ~held] for x in (now, made(torch.float64), made(torch.float32))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_inference_equals_training(options_backend, cell, dtype):
    (inputs,), options = _call(cell, (5, 3, 9), dtype, _names(cell), control=True)
    trained = recurrence(*inputs, cell=cell, gates=True, **options)
    with torch.no_grad():
        plain = recurrence(*inputs, cell=cell, **options)
        with_states = recurrence(*inputs, cell=cell, states=True, **options)
        with_gates = recurrence(*inputs, cell=cell, gates=True, **options)
    assert plain[1] is None
    assert len(with_states) == len(plain) == 3
    for found in (plain, with_states, with_gates):
        for x, y in zip(found, trained, strict=False):
            assert y is None or y.dtype == dtype
            assert (x is None and (y is None or found is plain)) or torch.equal(x, y)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_gradient_ends_where_a_state_is_detached(options_backend, cell, reverse):
    names = [name for name in _names(cell) if name not in ("zoneout", "seed")]
    (inputs,), options = _call(cell, (6, 3, 9), names=names)
    control = torch.zeros(6, 3, dtype=torch.uint8)
    control[2, 0] = DETACH
    control[2, 1] = DETACH + HOLD
    control[2, 2] = DETACH + RESET
    free = inputs._replace(control=torch.where(control & RESET > 0, RESET, control & HOLD).to(torch.uint8))
    inputs = inputs._replace(control=control)
    last = {"state_n": testing.random_grads({"state_n": inputs.state0})["state_n"]}
    cut = testing.evaluate(recurrence, inputs, last, cell=cell, reverse=reverse, **options)
    whole = testing.evaluate(recurrence, free, last, cell=cell, reverse=reverse, **options)
    for name in ("hidden", "state_n"):
        assert torch.equal(cut[name], whole[name])
    before = slice(3, None) if reverse else slice(0, 2)
    assert (cut["grad_input"][before] == 0).all()
    assert (cut["grad_state0"] == 0).all()
    assert (whole["grad_state0"][:, :2] != 0).any(2).all()
    assert (cut["grad_input"][2, 0] != 0).any()
    for result in (cut, whole):
        assert (result["grad_reset_state"] != 0).any(1).all()


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("cell", CELLS)
def test_reset_state_is_the_state_before_a_reset(options_backend, cell):
    """The same as a run that begins there, values and gradients."""
    names = [name for name in _names(cell) if name != "seed"]
    (inputs,), options = _call(cell, (5, 2, 9), torch.float64, names)
    control = torch.zeros(5, 2, dtype=torch.uint8)
    control[2] = RESET
    whole = recurrence(*inputs[:4], control, cell=cell, **options)[2]
    start = options["reset_state"].unsqueeze(1).expand_as(inputs.state0)
    rest = recurrence(inputs.input[2:], *inputs[1:3], start, cell=cell, **options)[2]
    assert torch.equal(whole, rest)
    grads = testing.random_grads({"state_n": whole})
    found = torch.autograd.grad(rest, [options["reset_state"], inputs.weight_hh], grads["state_n"])
    found = {"grad_reset_state": found[0], "grad_weight_hh": found[1]}
    judge(found, inputs._replace(control=control), grads, cell=cell, **options)
    testing.check_recurrence(inputs._replace(control=control), cell=cell, grads=grads, **options)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_zoneout_at_its_ends(options_backend, cell, random):
    """Probability 0 is no zoneout, 1 leaves the state what it was."""
    (inputs,), options = _call(cell, (5, 3, 9), names=("zoneout", "seed") if random else ("zoneout",))
    plain = testing.evaluate(recurrence, inputs, {}, cell=cell)
    options["zoneout"] = torch.zeros(CELLS[cell].states)
    never = testing.evaluate(recurrence, inputs, {}, cell=cell, **options)
    judge(never, inputs, cell=cell)
    assert not random or all(torch.equal(never[name], x) for name, x in plain.items())
    options["zoneout"] = torch.ones(CELLS[cell].states)
    always = testing.evaluate(recurrence, inputs, {}, cell=cell, **options)
    assert torch.equal(always["state_n"], inputs.state0)


@pytest.mark.parametrize("cell", CELLS)
def test_random_zoneout_keeps_its_share(options_backend, cell):
    steps, batch, hidden = 20, 16, 64
    (inputs,), options = _call(cell, (steps, batch, hidden), names=("zoneout", "seed"), requires_grad=False)
    kept = []
    for seed in (1, 2):
        options["seed"] = torch.tensor(seed)
        hidden_states, cells, _ = recurrence(*inputs, cell=cell, states=True, **options)
        for k, x in enumerate(x for x in (hidden_states, cells) if x is not None):
            before = torch.cat((inputs.state0[k : k + 1], x[:-1]))
            kept.append((x == before) & (x != 0))
            share, count = options["zoneout"][k].item(), steps * batch * hidden
            if cell != "rnn_relu":
                assert abs(kept[-1].double().mean().item() - share) < 5 * (share * (1 - share) / count) ** 0.5
    half = len(kept) // 2
    assert not torch.equal(kept[0], kept[half])
    assert len(kept) == 2 or not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("cell", CELLS)
def test_a_recurrent_mask_of_ones_and_gains_that_do_nothing(options_backend, cell):
    (inputs,), options = _call(cell, (5, 3, 9), names=("recurrent_mask", *(("peephole",) if cell == "lstm" else ())))
    neutral = {"recurrent_mask": torch.ones(3, 9), "peephole": torch.zeros(3, 9)}
    for name in options:
        judge(testing.evaluate(recurrence, inputs, {}, cell=cell, **{name: neutral[name]}), inputs, cell=cell)


@pytest.mark.parametrize("cell", CELLS)
def test_runs_are_reproducible(options_runner, cell):
    (inputs,), options = _call(cell, (6, 9, 33), names=_names(cell), control=True)
    options |= {"cell": cell, "gates": True}
    grads = testing.random_grads(testing.evaluate(recurrence, inputs, {}, **options))
    first, second = (testing.evaluate(recurrence, inputs, grads, **options) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize("cell", CELLS)
def test_arguments_are_not_written(options_backend, cell):
    inputs, options = _call(cell, (4, 3, 9), names=_names(cell), control=True)
    tensors = [*inputs[0], *options.values()]
    before = [x.detach().clone() for x in tensors]
    testing.check_recurrence(*inputs, cell=cell, gates=True, **options)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_numba_gives_gates_and_declines_their_gradient():
    pytest.importorskip("numba")
    (inputs,), options = _call("lstm", (4, 3, 9), names=("weight_ih", "bias_ih"))
    with seqkernels.use_backend("numba"):
        found = recurrence(*inputs, cell="lstm", gates=True, **options)
        names = ("hidden", "cells", "state_n", "gates")
        judge(dict(zip(names, found, strict=True)), inputs, cell="lstm", gates=True, **options)
        found[0].sum().backward(retain_graph=True)
        with pytest.raises(seqkernels.BackendError, match="has no gates"):
            found[3].sum().backward()
