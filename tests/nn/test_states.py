"""States and gates of every step, and layers run step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

import seqkernels

from ..twins import applies, judge
from .layers import H, I, build, by_reference, draw_input, hidden_of, outputs_of, results

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

T, B = 6, 5
KINDS = ("RNN", "ReLU", "LSTM", "projected", "GRU")
GATES = {"RNN": 1, "ReLU": 1, "LSTM": 4, "projected": 4, "GRU": 3}


def draw(layer: Any, dtype: torch.dtype, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    return draw_input(layer, T, B, dtype, seed)[:2]


def of_layer(run: Any, kind: str, package: Any = seqkernels.nn, **options: Any) -> Any:
    return results(run, draw, package, kind, **options)


def gates_of(layer: Any, x: Tensor, h: Tensor, suffix: str) -> Tensor:
    """(B, G, H) gates of one step after their activations."""
    w = {n.removesuffix(f"_{suffix}"): p for n, p in layer.named_parameters() if n.endswith(f"_{suffix}")}
    ih, hh = x @ w["weight_ih"].t() + w["bias_ih"], h @ w["weight_hh"].t() + w["bias_hh"]
    if layer.mode == "GRU":
        (ri, zi, ni), (rh, zh, nh) = ih.chunk(3, 1), hh.chunk(3, 1)
        r = (ri + rh).sigmoid()
        return torch.stack((r, (zi + zh).sigmoid(), (ni + r * nh).tanh()), 1)
    if layer.mode == "LSTM":
        i, f, g, o = (ih + hh).chunk(4, 1)
        return torch.stack((i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()), 1)
    return ((ih + hh).relu() if layer.mode == "RNN_RELU" else (ih + hh).tanh()).unsqueeze(1)


def loop(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """One layer in one or two directions: states of every step from calls of one step, gates from the formulas."""
    traces: dict[str, Tensor] = {}
    for k, suffix in enumerate(("l0", "l0_reverse")[: 2 if layer.bidirectional else 1]):
        single = getattr(torch.nn, layer.__class__.__name__)(
            I, H, **({"proj_size": layer.proj_size} if layer.proj_size else {})
        )
        if layer.mode == "RNN_RELU":
            single = torch.nn.RNN(I, H, nonlinearity="relu")
        weights = {n.replace(suffix, "l0"): p for n, p in layer.named_parameters() if n.endswith(f"_{suffix}")}
        state = [s[k : k + 1] for s in states]
        steps: dict[int, list[Tensor]] = {}
        for t in reversed(range(T)) if k else range(T):
            gates = gates_of(layer, x[t], state[0][0], suffix)
            _, hidden = torch.func.functional_call(single, weights, (x[t : t + 1], hidden_of(state)))
            state = list(hidden) if isinstance(hidden, tuple) else [hidden]
            steps[t] = [s[0] for s in state] + [gates]
        names = ("hidden", "cells", "gates") if len(state) == 2 else ("hidden", "gates")
        for j, name in enumerate(names):
            traces[f"{name} {k}"] = torch.stack([steps[t][j] for t in range(T)])
    return traces


def traced(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> dict[str, Tensor]:
    _, _, traces = layer(x, hidden_of(states), return_states=True, return_gates=True)
    return {
        f"{name} {k}": part
        for k, trace in enumerate(traces)
        for name, part in trace._asdict().items()
        if part is not None
    }


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gates_equal_the_loop(kind: str, bidirectional: bool, capable: str, judge: Any) -> None:
    options = {"bidirectional": bidirectional}
    judge(of_layer(traced, kind, **options), of_layer(loop, kind, torch.nn, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_see_the_states_of_the_layer_below(kind: str, capable: str) -> None:
    layer = build(kind, seqkernels.nn, torch.float64, 0, num_layers=2, bidirectional=True)
    x, states = draw(layer, torch.float64, 0)
    plain = layer(x, hidden_of(states))
    output, hidden, traces = layer(x, hidden_of(states), return_states=True)
    assert len(traces) == 4
    assert torch.equal(output, plain[0])
    assert torch.equal(torch.cat((traces[2].hidden, traces[3].hidden), -1), output)
    finals = hidden if isinstance(hidden, tuple) else (hidden,)
    for k, trace in enumerate(traces):
        assert trace.gates is None
        assert torch.equal(trace.hidden[0 if k % 2 else -1], finals[0][k])
        if len(finals) == 2:
            assert torch.equal(trace.cells[0 if k % 2 else -1], finals[1][k])
        else:
            assert trace.cells is None
    below = torch.cat((traces[0].hidden, traces[1].hidden), -1)
    (grad,) = torch.autograd.grad(output.sum(), below, allow_unused=True)
    assert grad is None or grad.any()
    with torch.no_grad():
        for found, expected in zip(layer(x, hidden_of(states), return_states=True)[2], traces, strict=True):
            for part, value in zip(found, expected, strict=True):
                assert part is value is None or torch.equal(part, value)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_alone(kind: str, capable: str) -> None:
    layer = build(kind, seqkernels.nn, torch.float32, 0, num_layers=2)
    x, _ = draw(layer, torch.float32, 0)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _, _, traces = layer(x, return_gates=True)
        for hidden, cells, gates in traces:
            assert hidden is None
            assert cells is None
            assert gates.shape == (T, B, GATES[kind], H)
            assert gates.requires_grad == grad


LENGTHS = (2, 6, 0, 4, 1)
FLAGS = {"return_states": True, "return_gates": True}


def rows_of(x: Tensor) -> list[Tensor]:
    return [x[:n, b] for b, n in enumerate(LENGTHS) if n]


def named(traces: Any) -> dict[str, Any]:
    return {f"{n} {k}": part for k, trace in enumerate(traces) for n, part in trace._asdict().items()}


def padded(layer: Any, x: Tensor, _: Any) -> dict[str, Tensor]:
    found = named(layer(x, lengths=torch.tensor(LENGTHS), **FLAGS)[2])
    return {name: torch.cat(rows_of(part)) for name, part in found.items() if part is not None}


def documents(layer: Any, x: Tensor, _: Any) -> dict[str, Tensor]:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    found = named(layer(torch.cat(rows_of(x)), cu_seqlens=cu_seqlens, **FLAGS)[2])
    return {name: part for name, part in found.items() if part is not None}


def packed(layer: Any, x: Tensor, _: Any) -> dict[str, Tensor]:
    found = named(layer(pack_sequence(rows_of(x), enforce_sorted=False), **FLAGS)[2])
    return {name: torch.cat(unpack_sequence(part)) for name, part in found.items() if part is not None}


def alone(layer: Any, x: Tensor, _: Any) -> dict[str, Tensor]:
    every = [named(layer(row, **FLAGS)[2]) for row in rows_of(x)]
    return {name: torch.cat([one[name] for one in every]) for name, part in every[0].items() if part is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_traces_of_sequences_are_those_of_each_alone(kind: str, capable: str, judge: Any) -> None:
    options = {"num_layers": 2, "bidirectional": True}
    for run in (padded, documents, packed):
        judge(of_layer(run, kind, **options), by_reference(of_layer(alone, kind, **options)))


@pytest.mark.parametrize("kind", KINDS)
def test_traces_have_the_form_of_the_output(kind: str, capable: str) -> None:
    layer = build(kind, seqkernels.nn, torch.float64, 0, num_layers=2, bidirectional=True)
    x, _ = draw(layer, torch.float64, 0)
    padding = torch.arange(T).unsqueeze(1) >= torch.tensor(LENGTHS)
    found = named(layer(x, lengths=torch.tensor(LENGTHS), **FLAGS)[2])
    sequences = pack_sequence(rows_of(x), enforce_sorted=False)
    packs = named(layer(sequences, **FLAGS)[2])
    layer.batch_first = True
    turned = named(layer(x.transpose(0, 1), lengths=torch.tensor(LENGTHS), **FLAGS)[2])
    for name, part in found.items():
        if part is None:
            assert name.startswith("cells")
            assert packs[name] is turned[name] is None
            continue
        assert not part[padding].any()
        assert torch.equal(turned[name], part.transpose(0, 1))
        assert packs[name].batch_sizes is sequences.batch_sizes


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_gradcheck_of_a_loss_on_states_and_gates(kind: str, capable: str) -> None:
    layer = getattr(seqkernels.nn, kind)(2, 3, bidirectional=True).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, weights, strict=True))
        flags = {"return_states": True, "return_gates": True}
        _, _, traces = torch.func.functional_call(layer, parameters, (x,), flags)
        return tuple(part for trace in traces for part in trace if part is not None)

    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(lambda x: run(x, *weights), x, fast_mode=True)


def flags(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) < 0.3


def whole(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    reset = flags(T, B)
    if not layer.batch_first:
        return outputs_of(*layer(x, hidden_of(states), reset=reset))
    output, *finals = outputs_of(*layer(x.transpose(0, 1), hidden_of(states), reset=reset.t()))
    return [output.transpose(0, 1), *finals]


def stepwise(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    reset, hx, rows = flags(T, B), hidden_of(states), []
    for t in range(T):
        y, hx = layer.step(x[t], hx, reset=reset[t])
        rows.append(y)
    return outputs_of(torch.stack(rows), hx)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_step_by_step(kind: str, batch_first: bool, plain_runner: Any, judge: Any) -> None:
    runs = [of_layer(run, kind, num_layers=2, batch_first=batch_first) for run in (stepwise, whole)]
    judge(runs[0], by_reference(runs[1]))


def one_row(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    first = outputs_of(*layer.step(x[0, 2]))
    assert first[1].shape == (2, first[0].shape[0])
    return [first[0], layer.step(x[0, 2], hidden_of(first[1:]), reset=torch.tensor(True))[0]]


def one_of_all(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    return [layer.step(x[0])[0][2]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_a_batch(kind: str, plain_runner: Any, judge: Any) -> None:
    runs = [of_layer(run, kind, num_layers=2) for run in (one_row, one_of_all)]
    judge(runs[0], by_reference(runs[1]), by_reference(runs[0]))


def test_a_stream_does_not_grow(plain_runner: Any) -> None:
    layer = build("LSTM", seqkernels.nn, torch.float32, 0, num_layers=2)
    x, hx = torch.randn(B, I), None
    with torch.no_grad():
        for _ in range(3):
            y, hx = layer.step(x, hx)
            assert sum(part.untyped_storage().nbytes() for part in hx) <= 2 * 4 * 2 * 2 * B * H
            assert y.untyped_storage().nbytes() <= 2 * 4 * B * H
            assert not any(part.requires_grad for part in (y, *hx))


def test_final_states_may_be_modified(plain_runner: Any) -> None:
    for kind in KINDS:
        for layers, steps, batch in ((1, T, B), (2, T, B), (1, 1, B), (1, 1, 1)):
            layer = build(kind, seqkernels.nn, torch.float32, 0, num_layers=layers)
            x, states = draw(layer, torch.float32, 0)
            _, hidden = layer(x[:steps, :batch], hidden_of([s[:, :batch] for s in states]))
            for state in hidden if isinstance(hidden, tuple) else (hidden,):
                state.mul_(2)
                state.sum().backward(retain_graph=True)
                state.detach_()


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        ({"bidirectional": True}, (torch.randn(B, I),), RuntimeError, "step: a bidirectional layer needs the whole"),
        ({"recurrent_dropout": 0.1}, (torch.randn(B, I),), RuntimeError, "step: recurrent_dropout has one mask"),
        ({}, (torch.randn(T, B, I),), ValueError, r"input: expected \(B, I\) or \(I,\), got \(6, 5, 3\)"),
        ({}, (torch.randn(B, I + 1),), RuntimeError, "Expected 3, got 4"),
    ],
)
def test_errors_of_step(options: dict[str, Any], call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        seqkernels.nn.GRU(I, H, **options).step(*call)


@pytest.mark.parametrize(("steps", "batch"), [(70_000, 1), (2, 70_000)])
def test_sizes_beyond_16_bits(steps: int, batch: int) -> None:
    torch.manual_seed(0)
    twin, layer = torch.nn.LSTM(1, 2), seqkernels.nn.LSTM(1, 2)
    layer.load_state_dict(twin.state_dict())
    x = torch.randn(1, 1, 1).expand(steps, batch, 1).contiguous()

    def run(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
        output, (h_n, c_n) = layer(x)
        assert output.shape == (*x.shape[:2], 2)
        assert torch.equal(output[-1:], h_n)
        return h_n, c_n, *torch.autograd.grad(output[-1].sum(), list(layer.parameters()))

    found = run(layer, x)
    # What lies 200 steps back is forgotten: its part in the last states is far below one rounding, also in float64.
    theirs = applies(run, twin, x[-200:])
    judge(found[:2], lambda dtype: theirs(dtype)[:2], "states")
    judge(found[2:], lambda dtype: theirs(dtype)[2:], "gradients")
