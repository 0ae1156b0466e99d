"""The quick way of a layer without options: the bits of the recurrence, or no answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import seqkernels
from seqkernels import testing
from seqkernels.backends import native
from seqkernels.cells import CELLS, DTYPES
from seqkernels.ops.layer import layer as quick
from seqkernels.ops.recurrence import recurrence

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


def _arguments(
    cell: str, steps: int = 3, batch: int = 2, inputs: int = 5, hidden: int = 7, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    gates, states, _ = CELLS[cell]

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape) / 4).to(dtype)

    return {
        "input": draw(steps, batch, inputs),
        "hidden": draw(1, batch, hidden),
        "cells": draw(1, batch, hidden) if states == 2 else None,
        "weight_ih": draw(gates * hidden, inputs),
        "weight_hh": draw(gates * hidden, hidden),
        "bias_ih": draw(gates * hidden),
        "bias_hh": draw(gates * hidden),
    }


def _both(cell: str, arguments: dict[str, Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The results of the quick way and of `recurrence`."""
    named = dict(arguments)
    input, hidden, cells = named.pop("input"), named.pop("hidden"), named.pop("cells")
    zeros = input.new_zeros(1, input.shape[1], named["weight_hh"].shape[1])
    states = [zeros if hidden is None else hidden, zeros if cells is None else cells][: CELLS[cell].states]
    with testing.poisoned_empty():
        found = quick(cell, **arguments)
        expected, _, state_n = recurrence(input, state0=torch.cat(states), cell=cell, **named)
    assert found is not None
    return found, (expected, *state_n.split(1))


def _assert_same(cell: str, arguments: dict[str, Any]) -> None:
    with torch.no_grad():
        found, expected = _both(cell, arguments)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    given = [x.requires_grad_() for x in arguments.values() if x is not None]
    results = _both(cell, arguments)
    grads = [torch.randn(x.shape).to(x.dtype) for x in expected]
    for count in (1, len(expected)):
        one, other = (
            torch.autograd.grad(r[:count], given, grads[:count], retain_graph=True, allow_unused=True) for r in results
        )
        for x, y in zip(one, other, strict=True):
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x, y)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits(cell: str, dtype: torch.dtype, threads: int) -> None:
    with testing.threads(threads):
        _assert_same(cell, _arguments(cell, 9, 6, 20, 40, dtype))


@given(
    st.sampled_from(list(CELLS)),
    st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(2, 18), st.integers(2, 18)),
    st.sets(st.sampled_from(["hidden", "cells", "bias_ih", "bias_hh"])),
    st.booleans(),
)
def test_shapes_and_what_is_not_given(
    cell: str, shape: tuple[int, int, int, int], without: set[str], batch_first: bool
) -> None:
    arguments = _arguments(cell, *shape) | dict.fromkeys(without)
    if batch_first:
        arguments["input"] = arguments["input"].transpose(0, 1).contiguous().transpose(0, 1)
    _assert_same(cell, arguments)


class _Subclass(Tensor):
    pass


@pytest.mark.parametrize("name", ["input", "hidden", "weight_ih", "weight_hh"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat_interleave(2, -1),
        lambda x: x.as_subclass(_Subclass),
        lambda x: x.unsqueeze(0).unsqueeze(0),
    ],
    ids=["dtype", "stride", "size", "subclass", "rank"],
)
def test_declines_what_does_not_fit(name: str, change: Any) -> None:
    arguments = _arguments("lstm")
    before = arguments[name]
    arguments[name] = change(before)
    with torch.no_grad():
        found = quick("lstm", **arguments)
    strided = type(arguments[name]) is Tensor and arguments[name].dtype == before.dtype
    if name == "hidden" and strided and arguments[name].shape == before.shape:
        _assert_same("lstm", arguments)
    else:
        assert found is None


@pytest.mark.parametrize("size", [0, 1])
def test_declines_small_rows(size: int) -> None:
    """A row of one element is contiguous in a part of a complex tensor, which may be negated."""
    assert quick("gru", **_arguments("gru", inputs=size)) is None
    assert quick("gru", **_arguments("gru", hidden=size)) is None


def test_declines_where_something_listens() -> None:
    arguments = _arguments("gru")
    assert quick("gru", **arguments) is not None
    with seqkernels.use_backend("reference"):
        assert quick("gru", **arguments) is None
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert quick("gru", **arguments) is None


@pytest.mark.parametrize("cell", CELLS)
def test_second_order(cell: str) -> None:
    arguments = _arguments(cell, 2, 2, 3, 2, torch.float64)
    names = [name for name, x in arguments.items() if x is not None]
    values = [arguments[name].requires_grad_() for name in names]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = quick(cell, **(arguments | dict(zip(names, tensors, strict=True))))
        assert found is not None
        return found

    if cell == "rnn_relu":
        torch.manual_seed(1)
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)


@pytest.mark.parametrize("steps", [1, 3])
def test_second_order_of_one_tensor_in_two_places(steps: int) -> None:
    layer = seqkernels.nn.LSTM(6, 6, dtype=torch.float64)
    x = torch.randn(steps, 2, 6, dtype=torch.float64)
    state = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda both: layer(x, (both, both))[0], (state,))


@pytest.mark.parametrize("name", ["input", "hidden", "cells", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_one_gradient_alone(name: str) -> None:
    arguments = _arguments("lstm")
    arguments[name].requires_grad_()
    found, expected = _both("lstm", arguments)
    one, other = (torch.autograd.grad(x[0].sum(), arguments[name])[0] for x in (found, expected))
    assert torch.equal(one, other)


def test_saved_tensors_are_guarded() -> None:
    layer = seqkernels.nn.LSTM(4, 5)
    output, _ = layer(torch.randn(3, 2, 4))
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_explain_sees_it() -> None:
    layer = seqkernels.nn.GRU(4, 5)
    found = seqkernels.explain(layer, torch.randn(3, 2, 4))
    assert [entry.chosen for entry in found.entries if not isinstance(entry, str)] == ["native"]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_results_are_memory_of_their_own(kind: str) -> None:
    """Final states may be changed in place, as those of torch.nn."""
    layer = getattr(seqkernels.nn, kind)(4, 5)
    x = torch.randn(3, 2, 4)
    with torch.no_grad():
        output, states = layer(x)
        before = output.clone()
        for state in states if kind == "LSTM" else (states,):
            state.zero_()
        assert torch.equal(output, before)
        again, _ = layer(x)
    assert torch.equal(again, before)
