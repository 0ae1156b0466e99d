"""The recurrent cells give torch's results, gradients, errors and text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels.testing import assert_within_budget

from ..twins import applies, judge

CELLS = ("RNNCell", "LSTMCell", "GRUCell")


def twins(kind: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    theirs = getattr(torch.nn, kind)(*args, **kwargs)
    ours = getattr(seqkernels.nn, kind)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def flip(x: Tensor, hidden_size: int, weight: bool) -> Tensor:
    """A tensor of the same cell whose features and hidden units come in reverse order: other rounding errors."""
    if weight:
        x = x.unflatten(0, (-1, hidden_size)).flip(1).flatten(0, 1)
    return x if weight and x.dim() == 1 else x.flip(-1)


def results(cell: Any, x: Tensor, states: list[Tensor] | None, dtype: torch.dtype, flipped: bool = False) -> Tensor:
    """Outputs and the gradients of everything in one vector."""

    def turn(x: Tensor, weight: bool = False) -> Tensor:
        return flip(x, cell.hidden_size, weight) if flipped else x

    cell = copy.deepcopy(cell).to(dtype)
    for weight in cell.parameters():
        weight.data = turn(weight.data, True)
    x = turn(x).to(dtype).requires_grad_()
    leaves = [] if states is None else [turn(state).to(dtype).requires_grad_() for state in states]
    output = cell(x, None if states is None else tuple(leaves) if len(leaves) == 2 else leaves[0])
    outputs = list(output) if isinstance(output, tuple) else [output]
    loss: Any = sum((out * turn(torch.linspace(-1, 1, out.numel()).view_as(out)).to(dtype)).sum() for out in outputs)
    found = [*outputs, *torch.autograd.grad(loss, [x, *leaves], retain_graph=True)]
    assert [value.shape for value in found] == [value.shape for value in (*outputs, x, *leaves)]
    weights = torch.autograd.grad(loss, list(cell.parameters()))
    everything = [*(turn(value) for value in found), *(turn(value, True) for value in weights)]
    assert {value.dtype for value in everything} == {dtype}
    return torch.cat([value.flatten() for value in everything])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batch", [(), (0,), (7,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "more"), [*((kind, {}) for kind in CELLS), ("RNNCell", {"nonlinearity": "relu"})], ids=str
)
def test_results_and_gradients(
    kind: str, more: dict[str, Any], bias: bool, batch: tuple[int, ...], given: bool, other_backend: str
) -> None:
    torch.manual_seed(0)
    theirs, ours = twins(kind, 11, 17, bias=bias, **more)
    assert repr(ours) == repr(theirs)
    x = torch.randn(*batch, 11)
    states = [torch.randn(*batch, 17) for _ in range(2 if kind == "LSTMCell" else 1)] if given else None
    baselines = [results(theirs, x, states, torch.float32, flipped) for flipped in (False, True)]
    oracle = results(theirs, x, states, torch.float64)
    with seqkernels.use_backend(other_backend):
        for dtype in (torch.float32, torch.float64):
            assert_within_budget(results(ours, x, states, dtype), oracle, baselines, str(dtype))


def test_steps_of_a_cell_are_a_layer() -> None:
    torch.manual_seed(0)
    layer = torch.nn.LSTM(3, 4)
    cell = seqkernels.nn.LSTMCell(3, 4)
    cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in layer.state_dict().items()})
    x = torch.randn(5, 2, 3)
    state, outputs = None, []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0])
    judge([torch.stack(outputs), *(part[None] for part in state)], applies(layer, x))


def test_states_can_be_detached_in_place() -> None:
    h, c = seqkernels.nn.LSTMCell(3, 4)(torch.randn(2, 3))
    h.detach_()
    c.mul_(2)


@pytest.mark.parametrize(
    "inputs",
    [
        lambda h: (torch.randn(2, 5), None),
        lambda h: (torch.randn(2, 2, 3), None),
        lambda h: (torch.tensor(1.0), None),
        lambda h: (torch.randn(2, 3), h(3, 4)),
        lambda h: (torch.randn(2, 3), h(2, 5)),
        lambda h: (torch.randn(2, 3), h(4)),
        lambda h: (torch.randn(2, 3), h(2, 2, 4)),
        lambda h: (torch.randn(2, 3, dtype=torch.float64), None),
    ],
)
@pytest.mark.parametrize("kind", CELLS)
def test_errors(kind: str, inputs: Callable[..., tuple[Any, Any]]) -> None:
    def hidden(*shape: int) -> Any:
        h = torch.zeros(shape)
        return (h, h) if kind == "LSTMCell" else h

    x, hx = inputs(hidden)
    caught = []
    for cell in twins(kind, 3, 4):
        with pytest.raises((RuntimeError, ValueError)) as error:
            cell(x, hx)
        caught.append((error.type, str(error.value)))
    assert caught[1] == caught[0]


def test_unknown_nonlinearity() -> None:
    for cell in twins("RNNCell", 3, 4, nonlinearity="sine"):
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: sine"):
            cell(torch.randn(2, 3))


@pytest.mark.parametrize("kind", CELLS)
def test_autocast_gives_the_dtypes_of_torch(kind: str) -> None:
    found = []
    for cell in twins(kind, 3, 4):
        with torch.autocast("cpu", torch.bfloat16):
            output = cell(torch.ones(2, 3))
        found.append([out.dtype for out in (output if isinstance(output, tuple) else (output,))])
    assert found[1] == found[0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_without_graph_breaks() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    theirs, ours = twins("LSTMCell", 3, 4)
    x = torch.randn(2, 3)
    judge(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), applies(theirs, x))
