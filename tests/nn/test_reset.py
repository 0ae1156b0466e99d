"""``reset=`` equals the loop ``h = h * (1 - done)``, in every layer and direction."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

import seqkernels

from .layers import KINDS, H, I, build, by_reference, draw_input, hidden_of, outputs_of, results, widths

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

T, B = 8, 5


def draw(layer: Any, dtype: torch.dtype, seed: int) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Input, states and resets, some of them in the first and in the last step."""
    x, states, generator = draw_input(layer, T, B, dtype, seed)
    reset = torch.rand(T, B, generator=generator) < 0.3
    reset[:, 0] = False
    reset[:, 1] = True
    return x, states, reset


def loop(layer: Any, x: Tensor, states: tuple[Tensor, ...], reset: Tensor) -> list[Tensor]:
    """What is run today: one call for each step."""
    output = []
    for t in range(len(x)):
        states = tuple(s * (1 - reset[t].to(x.dtype)).view(1, -1, 1) for s in states)
        y, *states = outputs_of(*layer(x[t : t + 1], hidden_of(states)))
        output.append(y)
    return [torch.cat(output), *states]


def documents(layer: Any, x: Tensor, states: tuple[Tensor, ...], reset: Tensor) -> list[Tensor]:
    """Each document by itself: the given states enter its row's first forward, and its last in reverse."""
    rows = []
    reverse = torch.arange(len(states[0])) % 2 == 1 if layer.bidirectional else torch.zeros(len(states[0])).bool()
    for b in range(x.shape[1]):
        borders = [0, *(t for t in range(1, len(x)) if reset[t, b]), len(x)]
        outputs = []
        for begin, end in itertools.pairwise(borders):
            keep_forward = begin == 0 and not reset[0, b]
            keep = torch.where(reverse, end == len(x), keep_forward).view(-1, 1, 1)
            hx = hidden_of([s[:, b : b + 1] * keep for s in states])
            outputs.append(outputs_of(*layer(x[begin:end, b : b + 1], hx)))
        first, last = outputs[0], outputs[-1]
        finals = [torch.where(reverse.view(-1, 1, 1), f, n) for f, n in zip(first[1:], last[1:], strict=True)]
        rows.append([torch.cat([out[0] for out in outputs]), *finals])
    return [torch.cat(parts, 1) for parts in zip(*rows, strict=True)]


def ours(layer: Any, x: Tensor, states: tuple[Tensor, ...], reset: Tensor) -> list[Tensor]:
    return outputs_of(*layer(x, hidden_of(states), reset=reset))


def of_layer(run: Any, kind: str, package: Any = seqkernels.nn, **options: Any) -> Any:
    return results(run, draw, package, kind, **options)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loop(kind: str, num_layers: int, plain_runner: Any, judge: Any) -> None:
    theirs = [of_layer(run, kind, torch.nn, num_layers=num_layers) for run in (loop, documents)]
    judge(of_layer(ours, kind, num_layers=num_layers), *theirs)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_see_one_document(kind: str, num_layers: int, plain_runner: Any, judge: Any) -> None:
    options = {"num_layers": num_layers, "bidirectional": True}
    judge(of_layer(ours, kind, **options), of_layer(documents, kind, torch.nn, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_the_flags(kind: str, plain_runner: Any) -> None:
    layer = build(kind, seqkernels.nn, torch.float64, 0, bidirectional=True)
    x, states, reset = draw(layer, torch.float64, 0)
    hx = hidden_of(states)
    expected = outputs_of(*layer(x, hx, reset=reset))
    for same in (reset.to(torch.uint8), reset.to(torch.uint8) * 200, reset.t().contiguous().t()):
        for found, value in zip(outputs_of(*layer(x, hx, reset=same)), expected, strict=True):
            assert torch.equal(found, value)
    layer.batch_first = True
    found = outputs_of(*layer(x.transpose(0, 1), hx, reset=reset.t()))
    assert torch.equal(found[0], expected[0].transpose(0, 1))


def one_row(layer: Any, x: Tensor, states: tuple[Tensor, ...], reset: Tensor) -> list[Tensor]:
    return ours(layer, x[:, 2], tuple(s[:, 2] for s in states), reset[:, 2])


def one_of_all(layer: Any, x: Tensor, states: tuple[Tensor, ...], reset: Tensor) -> list[Tensor]:
    return [out[:, 2] for out in ours(layer, x, states, reset)]


@pytest.mark.parametrize("kind", KINDS)
def test_input_without_a_batch(kind: str, plain_runner: Any, judge: Any) -> None:
    runs = [of_layer(run, kind, bidirectional=True) for run in (one_row, one_of_all)]
    judge(runs[0], by_reference(runs[1]))


def test_absent_state_is_zero(plain_runner: Any) -> None:
    layer = build("LSTM", seqkernels.nn, torch.float32, 0, num_layers=2, bidirectional=True)
    x, states, reset = draw(layer, torch.float32, 0)
    given = outputs_of(*layer(x, tuple(map(torch.zeros_like, states)), reset=reset))
    absent = outputs_of(*layer(x, reset=reset))
    for found, expected in zip(absent, given, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_across_a_reset_are_exactly_zero(kind: str, plain_runner: Any) -> None:
    layer = build(kind, seqkernels.nn, torch.float32, 0, num_layers=2, bidirectional=True)
    x, states, _ = draw(layer, torch.float32, 0)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, 2] = True
    output, _ = layer(x, hidden_of(states), reset=reset)
    for steps, others in ((slice(0, 3), slice(3, T)), (slice(3, T), slice(0, 3))):
        grad, *_ = torch.autograd.grad(output[steps, 2].sum(), [x, *states], retain_graph=True)
        assert grad[steps, 2].all()
        assert not grad[others, 2].any()
    grad, *_ = torch.autograd.grad(output[:3, 1].sum(), [x])
    assert grad[3:, 1].any()


def test_nothing_leaks_from_a_document_of_nan(plain_runner: Any) -> None:
    layer = build("GRU", seqkernels.nn, torch.float32, 0, bidirectional=True)
    x, _, _ = draw(layer, torch.float32, 0)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[4] = True
    spoilt = x.detach().clone()
    spoilt[:4] = torch.nan
    output, _ = layer(spoilt, reset=reset)
    assert torch.equal(output[4:], layer(x, reset=reset)[0][4:])
    assert output[:4].isnan().all()


def learnt_loop(layer: Any, x: Tensor, states: tuple[Tensor, ...], reset: Tensor) -> list[Tensor]:
    """One layer in one direction, whose state becomes the learnt one."""
    plain = getattr(torch.nn, layer._get_name())(I, H)
    weights = {name: x for name, x in layer.named_parameters() if not name.startswith("reset")}
    output = []
    for t in range(len(x)):
        flags = reset[t].view(1, -1, 1)
        states = tuple(torch.where(flags, r, s) for r, s in zip(layer.reset_state_l0, states, strict=True))
        y, *states = outputs_of(*torch.func.functional_call(plain, weights, (x[t : t + 1], hidden_of(states))))
        output.append(y)
    return [torch.cat(output), *states]


@functools.cache
def drawn(run: Any) -> Any:
    def with_states(layer: Any, *args: Any) -> list[Tensor]:
        with torch.no_grad():
            for name, state in layer.named_parameters():
                if name.startswith("reset"):
                    state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(len(name))))
        return run(layer, *args)

    return with_states


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_learnt_reset_state(kind: str, resettable: str, judge: Any) -> None:
    runs = [of_layer(drawn(run), kind, learn_reset_state=True) for run in (ours, learnt_loop)]
    judge(*runs)


def reset_once(layer: Any, x: Tensor, states: tuple[Tensor, ...], _: Tensor) -> list[Tensor]:
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    return outputs_of(*layer(x, hidden_of(states), reset=reset))[:1]


def two_calls(layer: Any, x: Tensor, states: tuple[Tensor, ...], _: Tensor) -> list[Tensor]:
    """What begins with the reset, in either direction, begins with the learnt state."""
    learnt = list(zip(*(getattr(layer, f"reset_state_{s}") for s in layer._suffixes()), strict=True))
    if layer.proj_size:
        learnt[0] = tuple(
            getattr(layer, f"weight_hr_{s}") @ m for s, m in zip(layer._suffixes(), learnt[0], strict=True)
        )
    fresh = [torch.stack(s).unsqueeze(1).expand(-1, B, -1) for s in learnt]
    reverse = (torch.arange(4) % 2 == 1).view(-1, 1, 1)
    first = hidden_of([torch.where(reverse, f, s) for f, s in zip(fresh, states, strict=True)])
    second = hidden_of([torch.where(reverse, s, f) for f, s in zip(fresh, states, strict=True)])
    return [torch.cat((layer(x[:3], first)[0], layer(x[3:], second)[0]))]


@pytest.mark.parametrize("kind", KINDS)
def test_learnt_reset_state_of_each_direction(kind: str, resettable: str, judge: Any) -> None:
    """A document that begins with a reset runs as one whose initial state is the learnt one."""
    options = {"num_layers": 2, "bidirectional": True, "learn_reset_state": True}
    runs = [of_layer(drawn(run), kind, **options) for run in (reset_once, two_calls)]
    found = runs[0](torch.float64, 0)
    assert all(grad.any() for name, grad in found.items() if name.startswith("grad of reset"))
    judge(runs[0], by_reference(runs[1]))


def test_learnt_reset_state_starts_as_zero_and_needs_a_reset(resettable: str) -> None:
    plain = build("LSTM", seqkernels.nn, torch.float32, 0)
    layer = build("LSTM", seqkernels.nn, torch.float32, 0, learn_reset_state=True)
    x, _, reset = draw(layer, torch.float32, 0)
    assert torch.equal(layer(x, reset=reset)[0], plain(x, reset=reset)[0])
    layer(x)[0].sum().backward()
    assert layer.reset_state_l0.grad is None


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_gradcheck(kind: str, resettable: str) -> None:
    layer = getattr(seqkernels.nn, kind)(2, 3, bidirectional=True, learn_reset_state=True).double()
    reset = torch.tensor([[0, 1], [1, 0], [0, 0]], dtype=torch.bool)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, weights, strict=True))
        return tuple(outputs_of(*torch.func.functional_call(layer, parameters, (x,), {"reset": reset})))

    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(lambda x: run(x, *weights), x, fast_mode=True)


@hypothesis.settings(max_examples=10)
@hypothesis.given(data=st.data())
def test_any_flags(data: st.DataObject, plain_runner: Any, judge: Any) -> None:
    """Every document gives what it gives alone, whatever the borders."""
    kind, bidirectional = data.draw(st.sampled_from(KINDS)), data.draw(st.booleans())
    steps, batch = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 3))
    flags = data.draw(st.lists(st.booleans(), min_size=steps * batch, max_size=steps * batch))
    reset = torch.tensor(flags, dtype=torch.bool).view(steps, batch)

    def run(each: bool, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        layer = build(kind, seqkernels.nn, dtype, seed, bidirectional=bidirectional)
        x = torch.randn(steps, batch, I).to(dtype)
        if each and batch:
            zeros = tuple(torch.zeros(1 + bidirectional, batch, width, dtype=dtype) for width in widths(layer))
            found = documents(layer, x, zeros, reset)
        else:
            found = outputs_of(*layer(x, reset=reset))
        return {str(k): out for k, out in enumerate(found)}

    judge(functools.partial(run, False), by_reference(functools.partial(run, True)))


# torch's own tracer of autograd functions warns that it instantiates them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["projected", "GRU"])
def test_compile_without_graph_breaks(kind: str, judge: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    eager = by_reference(of_layer(ours, kind, bidirectional=True))
    judge(of_layer(compiled, kind, bidirectional=True), eager, seeds=1, dtypes=(torch.float32,))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"reset": torch.zeros(T, B)}, TypeError, r"reset: .* torch\.bool or torch\.uint8, got torch\.float32"),
        ({"reset": [[False] * B] * T}, TypeError, "reset: expected a Tensor .*, got list"),
        ({"reset": torch.zeros(B, T).bool()}, ValueError, r"reset: expected \(8, 5\) on cpu, got \(5, 8\) on cpu"),
        ({"reset": torch.zeros(T).bool()}, ValueError, r"reset: expected \(8, 5\) on cpu, got \(8,\)"),
        ({"reset": torch.zeros(T, B, device="meta").bool()}, ValueError, "reset: expected .* on cpu, got .* on meta"),
        ({"input": torch.randn(T, I)}, ValueError, "reset: expected 1 dimension as the input has no batch, got 2"),
        (
            {"input": torch.nn.utils.rnn.pack_sequence([torch.randn(T, I)] * B)},
            ValueError,
            "reset: expected padded input, not a PackedSequence; give lengths",
        ),
        (
            {"input": torch.randn(T, I), "cu_seqlens": torch.tensor([0, T])},
            ValueError,
            "reset: expected padded input, not cu_seqlens; give lengths",
        ),
    ],
)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = seqkernels.nn.GRU(I, H)
    arguments = {"input": torch.randn(T, B, I), "reset": torch.zeros(T, B).bool(), **changed}
    with pytest.raises(error, match=message):
        layer(arguments.pop("input"), **arguments)
