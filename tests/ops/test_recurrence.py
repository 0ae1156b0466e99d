"""The recurrence contract, for every implementation that can run here."""

from __future__ import annotations

import itertools
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import seqkernels
from seqkernels import testing
from seqkernels.cells import CELLS, DETACH, DTYPES, HOLD, RESET
from seqkernels.ops.recurrence import backward_op, forward_op, recurrence

from ..conftest import widest
from .judging import judge

FLAGS = list(itertools.product((False, True), repeat=3))  # reverse, bias, control
# Every pair of values of two of them; hypothesis draws from all.
PAIRS = [flags for flags in FLAGS if sum(flags) % 2 == 0]
# T, B, H
SHAPES = [
    (1, 1, 1),
    (3, 1, 3),
    (1, 5, 17),
    (6, 4, 33),
    (4, 7, 65),
    (2, 3, 16),
    (5, 16, 8),
    (20, 9, 130),
]
EMPTY = [(0, 3, 4), (3, 0, 4), (0, 0, 4)]


def _inputs(cell, shape, dtype=torch.float32, **options):
    return testing.recurrence_inputs(cell, *shape, dtype, **options)


def _draws(cell, shape, dtype=torch.float32, layout="contiguous", **options):
    """So many inputs of a shape that their results have some hundred elements together that are not alike."""
    alike = {"scalar": math.prod(shape), "expanded": shape[0]}.get(layout, 1)
    count = min(32, 1 + 200 * max(1, alike) // max(1, math.prod(shape)))
    return [_inputs(cell, shape, dtype, layout=layout, seed=seed, **options) for seed in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients_are_within_the_budget(runner, cell, dtype):
    for reverse, bias, control in PAIRS:
        inputs = _inputs(cell, (7, 3, 19), dtype, bias=bias, control=control)
        testing.check_recurrence(inputs, cell=cell, reverse=reverse)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_shapes(runner, cell, shape):
    draws = _draws(cell, shape, control=shape[0] % 2 == 0)
    testing.check_recurrence(*draws, cell=cell, reverse=shape[1] % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 7), (3, 5, 35), (20, 9, 130)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_shapes_in_other_dtypes(plain_runner, cell, shape, dtype):
    if cell == "rnn_relu" and dtype.itemsize == 2:
        # A factor h rounded to 16 bits moves elements over 0 in the end, whose gradients are then others altogether.
        shape = (min(shape[0], 8), *shape[1:])
    testing.check_recurrence(*_draws(cell, shape, dtype, control=True), cell=cell)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(plain_runner, cell, shape):
    for reverse, bias, control in FLAGS:
        inputs = _inputs(cell, shape, bias=bias, control=control)
        results = testing.check_recurrence(inputs, cell=cell, reverse=reverse)
        if shape[0] == 0:
            assert torch.equal(results["state_n"], inputs.state0)


@hypothesis.given(
    cell=st.sampled_from(list(CELLS)),
    shape=st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(1, 40)),
    reverse=st.booleans(),
    bias=st.booleans(),
    control=st.booleans(),
    layout=st.sampled_from(testing.LAYOUTS),
)
def test_any_shape(plain_runner, cell, shape, reverse, bias, control, layout):
    dtype = widest(plain_runner.backend)
    draws = _draws(cell, shape, dtype, bias=bias, control=control, layout=layout)
    testing.check_recurrence(*draws, cell=cell, reverse=reverse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_the_projection_inside(runner, cell, dtype):
    for (reverse, bias, control), size in zip(PAIRS, (3, 8, 8, 40), strict=True):
        draws = [
            _inputs(cell, (7, 3, 19), dtype, bias=bias, control=control, detach=True, input_size=size, seed=seed)
            for seed in range(1 + 20 // size)
        ]
        names = ("weight_ih", "bias_ih") if bias else ("weight_ih",)
        options = testing.recurrence_options(cell, 3, 19, dtype, names=names, input_size=size)
        testing.check_recurrence(*draws, cell=cell, reverse=reverse, **options)


@hypothesis.given(
    cell=st.sampled_from(list(CELLS)),
    shape=st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(1, 40)),
    size=st.integers(0, 40),
    flags=st.sampled_from(FLAGS),
    input_bias=st.booleans(),
    layout=st.sampled_from(testing.LAYOUTS),
)
def test_any_projection(plain_runner, cell, shape, size, flags, input_bias, layout):
    reverse, bias, control = flags
    options = {"input_size": size, "layout": layout}
    dtype = widest(plain_runner.backend)
    draws = _draws(cell, shape, dtype, bias=bias, control=control, detach=True, **options)
    names = ("weight_ih", "bias_ih") if input_bias else ("weight_ih",)
    given = testing.recurrence_options(cell, *shape[1:], dtype, names=names, **options)
    testing.check_recurrence(*draws, cell=cell, reverse=reverse, **given)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_layouts(plain_runner, cell, layout):
    draws = _draws(cell, (4, 3, 9), control=True, layout=layout)
    outputs = testing.evaluate(testing.recurrence_oracle, draws[0], {}, cell=cell)
    testing.check_recurrence(*draws, cell=cell, grads=testing.random_grads(outputs, layout))


@pytest.mark.parametrize("cell", CELLS)
def test_each_output_alone(plain_runner, cell):
    inputs = _inputs(cell, (4, 3, 9), control=True)
    outputs = testing.evaluate(testing.recurrence_oracle, inputs, {}, cell=cell)
    for name, grad in testing.random_grads(outputs).items():
        testing.check_recurrence(inputs, cell=cell, grads={name: grad})


@pytest.mark.parametrize("cell", CELLS)
def test_each_input_alone(plain_runner, cell):
    inputs = _inputs(cell, (4, 3, 9))
    for name in ("input", "weight_hh", "bias_hh", "state0"):
        some = inputs._make(
            None if x is None else x.detach().requires_grad_(n == name) for n, x in inputs._asdict().items()
        )
        results = testing.check_recurrence(some, cell=cell)
        assert [n for n in results if n.startswith("grad_")] == [f"grad_{name}"]


def test_cells_only_from_an_lstm_that_records_gradients(plain_runner):
    for cell in CELLS:
        inputs = _inputs(cell, (4, 3, 9))
        cells = recurrence(*inputs, cell=cell)[1]
        assert (cells is not None) == (cell == "lstm")
        with torch.no_grad():
            assert recurrence(*inputs, cell=cell)[1] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_inference_equals_training(plain_runner, cell, dtype):
    for reverse, bias, control in FLAGS:
        inputs = _inputs(cell, (5, 3, 9), dtype, bias=bias, control=control)
        trained = recurrence(*inputs, cell=cell, reverse=reverse)
        with torch.no_grad():
            hidden, _, state_n = recurrence(*inputs, cell=cell, reverse=reverse)
        assert torch.equal(hidden, trained[0])
        assert torch.equal(state_n, trained[2])


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(plain_runner, cell):
    for reverse, bias, control in PAIRS:
        inputs = _inputs(cell, (3, 2, 3), torch.float64, bias=bias, control=control, seed=2)

        def outputs(*tensors, control=inputs.control, reverse=reverse):
            return tuple(x for x in recurrence(*tensors, control, cell=cell, reverse=reverse) if x is not None)

        assert torch.autograd.gradcheck(outputs, inputs[:4])


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "rnn_relu"])
def test_gradgradcheck(plain_runner, cell):
    inputs = _inputs(cell, (2, 2, 2), torch.float64, control=True, seed=2)

    def outputs(*tensors):
        return tuple(x for x in recurrence(*tensors, inputs.control, cell=cell) if x is not None)

    assert torch.autograd.gradgradcheck(outputs, inputs[:4])


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("cell", CELLS)
def test_first_order_is_the_same_where_the_second_is_wanted(plain_runner, cell):
    inputs = _inputs(cell, (4, 3, 5), torch.float64, control=True)
    leaves = inputs[:4]
    results = testing.check_recurrence(inputs, cell=cell)
    outputs = [x for x in recurrence(*inputs, cell=cell) if x is not None]
    grads = testing.random_grads({n: x for n, x in results.items() if not n.startswith("grad_")})
    found = torch.autograd.grad(outputs, leaves, list(grads.values()), create_graph=True)
    assert all(x.requires_grad for x in found)
    names = ("grad_input", "grad_weight_hh", "grad_bias_hh", "grad_state0")
    judge(dict(zip(names, found, strict=True)), inputs, grads, cell=cell)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_held_steps(plain_runner, cell, reverse):
    steps, batch, hidden = 6, 3, 5
    inputs = _inputs(cell, (steps, batch, hidden), requires_grad=False)
    control = torch.zeros(steps, batch, dtype=torch.uint8)
    control[1:3, 0] = HOLD
    control[:, 1] = HOLD
    input = inputs.input.clone()
    input[control == HOLD] = torch.nan
    inputs = inputs._replace(input=input, control=control)
    inputs = inputs._make(x.requires_grad_(x.is_floating_point()) for x in inputs)
    outputs = testing.evaluate(recurrence, inputs, {}, cell=cell, reverse=reverse)
    results = testing.evaluate(recurrence, inputs, testing.random_grads(outputs), cell=cell, reverse=reverse)
    assert all(x.isfinite().all() for x in results.values())
    assert (results["grad_input"][control == HOLD] == 0).all()
    assert torch.equal(results["state_n"][:, 1], inputs.state0[:, 1])
    assert torch.equal(results["hidden"][:, 1], inputs.state0[0, 1].expand(steps, hidden))
    clean = inputs._replace(input=input.detach().nan_to_num(0.5).requires_grad_())
    for name, x in testing.check_recurrence(clean, cell=cell, reverse=reverse).items():
        assert torch.equal(x, results[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_the_input_of_held_steps_is_not_looked_at(plain_runner, cell):
    inputs = _inputs(cell, (6, 3, 5), control=True, input_size=4)
    options = testing.recurrence_options(cell, 3, 5, names=("weight_ih", "bias_ih"), input_size=4)
    held = (inputs.control & HOLD).bool()
    assert held.any()
    spoilt = inputs.input.detach().masked_fill(held.unsqueeze(2), torch.nan).requires_grad_()
    clean = testing.check_recurrence(inputs, cell=cell, **options)
    grads = testing.random_grads({n: x for n, x in clean.items() if not n.startswith("grad_")})
    results = testing.evaluate(recurrence, inputs._replace(input=spoilt), grads, cell=cell, **options)
    for name, x in results.items():
        assert torch.equal(x, clean[name]), name
    assert (results["grad_input"][held] == 0).all()


@pytest.mark.parametrize("cell", CELLS)
def test_each_gradient_alone(plain_runner, cell):
    """What is not needed is not computed, and the rest stays as it was."""
    inputs = _inputs(cell, (4, 3, 9), control=True, input_size=5)
    options = testing.recurrence_options(cell, 3, 9, names=("weight_ih", "bias_ih"), input_size=5)
    every = testing.check_recurrence(inputs, cell=cell, **options)
    for name in ("input", "weight_hh", "bias_hh", "state0", "weight_ih", "bias_ih"):
        some = inputs._make(
            x.detach().requires_grad_(n == name) if x.is_floating_point() else x for n, x in inputs._asdict().items()
        )
        given = {n: x.detach().requires_grad_(n == name) for n, x in options.items()}
        results = testing.check_recurrence(some, cell=cell, **given)
        assert [n for n in results if n.startswith("grad_")] == [f"grad_{name}"]
        assert torch.equal(results[f"grad_{name}"], every[f"grad_{name}"])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_detached_states(plain_runner, cell, reverse):
    inputs = _inputs(cell, (6, 3, 33))
    control = torch.zeros(6, 3, dtype=torch.uint8)
    control[2, 0] = DETACH
    control[2, 1] = DETACH + HOLD
    cut = inputs._replace(control=control)
    results = testing.check_recurrence(cut, cell=cell, reverse=reverse)
    last = {"state_n": testing.random_grads(results)["state_n"]}
    free = inputs._replace(control=control & HOLD)
    whole = testing.check_recurrence(free, cell=cell, reverse=reverse, grads=last)
    results = testing.check_recurrence(cut, cell=cell, reverse=reverse, grads=last)
    for name in ("hidden", "state_n"):
        assert torch.equal(results[name], whole[name])
    before = slice(3, None) if reverse else slice(0, 2)
    assert (results["grad_input"][before, :2] == 0).all()
    assert (results["grad_state0"][:, :2] == 0).all()
    assert (whole["grad_state0"] != 0).any(2).all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_resets(plain_runner, cell, reverse):
    steps, batch, at = 6, 3, 2
    inputs = _inputs(cell, (steps, batch, 33))
    control = torch.zeros(steps, batch, dtype=torch.uint8)
    control[at, 0] = RESET
    control[steps - 1 if reverse else 0, 1] = RESET
    state0 = inputs.state0.detach().clone()
    state0[:, 1] = torch.nan
    inputs = inputs._replace(control=control, state0=state0.requires_grad_())
    outputs = testing.evaluate(recurrence, inputs, {}, cell=cell, reverse=reverse)
    grads = {"state_n": testing.random_grads(outputs)["state_n"]}
    results = testing.evaluate(recurrence, inputs, grads, cell=cell, reverse=reverse)
    assert all(x.isfinite().all() for x in results.values())
    blocked = results["grad_input"][at + 1 :, 0] if reverse else results["grad_input"][:at, 0]
    assert (blocked == 0).all()
    assert (results["grad_state0"][:, :2] == 0).all()
    assert (results["grad_state0"][:, 2] != 0).any()
    part = inputs.input.detach()[: at + 1 if reverse else None, :1][None if reverse else at :]
    alone = inputs._replace(input=part, state0=torch.zeros_like(state0[:, :1]), control=None)
    judge({"state_n": results["state_n"][:, :1]}, alone, cell=cell, reverse=reverse)
    clean = inputs._replace(state0=state0.detach().nan_to_num(0.5).requires_grad_())
    exact = testing.check_recurrence(clean, cell=cell, reverse=reverse, grads=grads)
    assert all(torch.equal(x, results[n]) for n, x in exact.items())


def test_visible_nan_shows(runner):
    for cell in CELLS:
        inputs = _inputs(cell, (4, 3, 20), requires_grad=False)
        inputs.input[1, 1] = torch.nan
        hidden = recurrence(*inputs, cell=cell)[0]
        assert hidden[1:, 1].isnan().all(), cell
        assert hidden[:, ::2].isfinite().all(), cell
        assert hidden[0].isfinite().all(), cell


@pytest.mark.parametrize("cell", CELLS)
def test_saturated_gates(plain_runner, cell):
    inputs = _inputs(cell, (3, 2, 20))
    input = (inputs.input.detach() * 60).requires_grad_()
    grads = testing.random_grads(testing.evaluate(testing.recurrence_oracle, inputs, {}, cell=cell))
    results = testing.check_recurrence(inputs._replace(input=input), cell=cell, grads=grads)
    assert all(x.isfinite().all() for x in results.values())
    huge = inputs._replace(input=input.detach().sign() * 3e38, state0=torch.zeros_like(inputs.state0))
    hidden = recurrence(*huge, cell=cell)[0]
    assert cell == "rnn_relu" or (hidden.abs() <= 1).all()


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("cell", CELLS)
def test_split_in_time_equals_one_run(plain_runner, cell):
    for reverse in (False, True):
        inputs = _inputs(cell, (7, 3, 9), torch.float64, control=True)
        whole = testing.check_recurrence(inputs, cell=cell, reverse=reverse)
        grads = testing.random_grads({n: x for n, x in whole.items() if not n.startswith("grad_")})

        def split(input, weight_hh, bias_hh, state, control, *, cell, reverse):
            parts, slices = [], [slice(0, 3), slice(3, 7)]
            for part in reversed(slices) if reverse else slices:
                hidden, cells, state = recurrence(
                    input[part], weight_hh, bias_hh, state, control[part], cell=cell, reverse=reverse
                )
                parts.append((hidden, cells))
            hidden, cells = zip(*(reversed(parts) if reverse else parts), strict=True)
            return torch.cat(hidden), torch.cat(cells) if cell == "lstm" else None, state

        found = testing.evaluate(split, inputs, grads, cell=cell, reverse=reverse)
        assert found.keys() == whole.keys()
        judge(found, inputs, grads, cell=cell, reverse=reverse)


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_of_the_batch_are_independent(plain_runner, cell):
    inputs = _inputs(cell, (5, 11, 9), torch.float64, control=True, requires_grad=False)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    moved = inputs._replace(
        input=inputs.input[:, order], state0=inputs.state0[:, order], control=inputs.control[:, order]
    )
    hidden, _, state_n = recurrence(*inputs, cell=cell)
    judge({"hidden": hidden[:, order], "state_n": state_n[:, order]}, moved, cell=cell)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_what_one_saves_another_reads(plain_runner, other_backend, cell, dtype):
    inputs = _inputs(cell, (4, 3, 9), dtype, input_size=5, control=True, detach=True, requires_grad=False)
    options = testing.recurrence_options(cell, 3, 9, dtype, names=("weight_ih", "bias_ih"), input_size=5)
    weights = testing.recurrence_weights(inputs.weight_hh, inputs.bias_hh, **options)
    needs = [x is not None for x in (inputs.input, inputs.state0, *weights)]
    for reverse in (False, True):
        states, state_n, reserve = forward_op(inputs.input, weights, inputs.state0, inputs.control, cell, reverse, True)
        assert (reserve[(inputs.control & HOLD).bool()] == 0).all()
        grads = [x.flip(-1) for x in (states[0, 1:], states[-1, 1:], state_n)]
        if cell != "lstm":
            grads[1] = None
        call = ((*grads, None), inputs.input, weights, states, reserve, inputs.control, cell, reverse, needs)
        with seqkernels.use_backend(other_backend):
            every = backward_op(*call)
        assert [x.numel() > 0 for x in every] == needs
        found = {f"grad_{n}": x for n, x in zip(("input", "state0", *weights._fields), every, strict=True) if x.numel()}
        given = {n: x for n, x in zip(("hidden", "cells", "state_n"), grads, strict=True) if x is not None}
        judge(found, inputs, given, cell=cell, reverse=reverse, **options)


@pytest.mark.parametrize("cell", CELLS)
def test_runs_are_reproducible(runner, cell):
    inputs = _inputs(cell, (6, 9, 33), control=True)
    first, second = (testing.check_recurrence(inputs, cell=cell) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_inputs_are_not_written(plain_runner):
    for cell in CELLS:
        inputs = _inputs(cell, (4, 3, 9), control=True)
        before = [x.detach().clone() for x in inputs]
        testing.check_recurrence(inputs, cell=cell)
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
