"""The way of one step from a cell to the compiled module: sizes around the vector length, odd arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import seqkernels
from seqkernels import backends
from seqkernels.testing import assert_within_budget

CELLS = ("RNNCell", "LSTMCell", "GRUCell")
CALL = backends.Call("recurrence", "cpu", torch.float32, "lstm")
pytestmark = pytest.mark.skipif(
    backends.why_not("native", CALL) is not None, reason="the way to the compiled module needs the compiled module"
)


def values(cell: Any, x: Tensor, states: list[Tensor], dtype: torch.dtype, flipped: bool = False) -> Tensor:
    """Outputs and all gradients in one vector; `flipped`, with features and units in reverse order."""

    def turn(value: Tensor, weight: bool = False) -> Tensor:
        if not flipped:
            return value
        if weight:
            value = value.unflatten(0, (-1, cell.hidden_size)).flip(1).flatten(0, 1)
        return value if weight and value.dim() == 1 else value.flip(-1)

    leaves = [turn(value).to(dtype).requires_grad_() for value in (x, *states)]
    weights = {name: turn(p.detach(), True).to(dtype).requires_grad_() for name, p in cell.named_parameters()}
    hx = leaves[1] if len(states) == 1 else tuple(leaves[1:])
    output = torch.func.functional_call(cell, weights, (leaves[0], hx))
    outputs = list(output) if isinstance(output, tuple) else [output]
    seeds = [turn(torch.linspace(-1, 1, out.numel()).view_as(out)).to(dtype) for out in outputs]
    found = torch.autograd.grad(outputs, leaves + list(weights.values()), seeds)
    count = len(leaves)
    everything = [*map(turn, outputs), *map(turn, found[:count]), *(turn(value, True) for value in found[count:])]
    return torch.cat([value.flatten() for value in everything])


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(CELLS),
    batch=st.integers(1, 4),
    inputs=st.sampled_from((1, 3, 8, 15, 16, 17, 31, 32, 33, 40, 64, 65)),
    hidden=st.sampled_from((1, 2, 7, 16, 17, 33, 48, 63)),
    bias=st.booleans(),
)
def test_results_around_the_vector_length(kind: str, batch: int, inputs: int, hidden: int, bias: bool) -> None:
    torch.manual_seed(batch * 1000 + inputs + hidden)
    theirs = getattr(torch.nn, kind)(inputs, hidden, bias=bias)
    ours = getattr(seqkernels.nn, kind)(inputs, hidden, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    x, states = torch.randn(batch, inputs), [torch.randn(batch, hidden) for _ in range(2 if kind == "LSTMCell" else 1)]
    oracle = values(theirs, x, states, torch.float64)
    baselines = [values(theirs, x, states, torch.float32, flipped) for flipped in (False, True)]
    with seqkernels.use_backend("native"):
        assert_within_budget(values(ours, x, states, torch.float32), oracle, baselines, kind)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("grad", [False, True])
def test_tensor_that_outlived_its_transform(kind: str, grad: bool) -> None:
    leaked: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        leaked.append(x)
        return x.sum()

    x = torch.randn(1, 8)
    torch.func.grad(loss)(x)
    cell = getattr(seqkernels.nn, kind)(8, 8)
    with torch.set_grad_enabled(grad):
        found, expected = cell(leaked[0]), cell(x)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def arguments(**changed: Any) -> list[Any]:
    """Of the compiled module's ``step_forward`` for an Elman cell, in order."""
    from seqkernels.backends.native import step

    assert step  # registers the types of plain tensors
    x = torch.zeros(1, 4)
    named: dict[str, Any] = {"input": x, "hidden": x, "cells": None, "weight_ih": x.new_zeros(4, 4)}
    named |= {"weight_hh": x.new_zeros(4, 4), "bias_ih": None, "bias_hh": None, "cell": "rnn_tanh"}
    named |= {"next_hidden": torch.empty(1, 4), "next_cells": None, "reserve": None, "threads": 1}
    return list((named | changed).values())


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"cell": "elman"}, ValueError, "cell: expected 'rnn_tanh'"),
        ({"cell": 3}, TypeError, None),
        ({"threads": 0}, ValueError, "threads: expected at least 1, got 0"),
        ({"threads": "1"}, TypeError, None),
        ({"input": None}, TypeError, "input: expected a tensor, got None"),
        ({"hidden": torch.zeros(1, 5)}, ValueError, r"hidden: expected shape \(1, 4\), got \(1, 5\)"),
        ({"weight_hh": torch.zeros(4, 4).double()}, TypeError, "weight_hh: expected float32, got float64"),
    ],
)
def test_arguments_that_do_not_fit(changed: dict[str, Any], error: type[Exception], words: str | None) -> None:
    from seqkernels.backends.native.extension import extension

    with pytest.raises(error, match=words):
        extension().step_forward(*arguments(**changed))


def test_number_of_arguments() -> None:
    from seqkernels.backends.native.extension import extension

    for count in (0, 11):
        with pytest.raises(TypeError):
            extension().step_forward(*arguments()[:count])
    with pytest.raises(TypeError):
        extension().step_backward(*arguments())
