"""States and gates of every step, and layers run step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import seqkernels

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

I, H, P, T, B = 3, 11, 4, 6, 5  # noqa: E741
KINDS = ("RNN", "ReLU", "LSTM", "projected", "GRU")
GATES = {"RNN": 1, "ReLU": 1, "LSTM": 4, "projected": 4, "GRU": 3}


def build(kind: str, package: Any, dtype: torch.dtype, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    more = {"projected": {"proj_size": P}, "ReLU": {"nonlinearity": "relu"}}.get(kind, {})
    cls = getattr(package, {"projected": "LSTM", "ReLU": "RNN"}.get(kind, kind))
    return cls(I, H, **more, **options).to(dtype)


def draw(layer: Any, dtype: torch.dtype, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = (layer.proj_size or H, H) if layer.mode == "LSTM" else (H,)
    x = torch.randn(T, B, I, generator=generator).to(dtype)
    states = (torch.randn(rows, B, width, generator=generator).to(dtype) for width in widths)
    return x.requires_grad_(), tuple(state.requires_grad_() for state in states)


def hidden_of(states: Any) -> Any:
    return tuple(states) if len(states) == 2 else states[0]


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


def results(run: Any, package: Any, kind: str, **options: Any) -> Any:
    def compute(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        layer = build(kind, package, dtype, seed, **options)
        x, states = draw(layer, dtype, seed)
        outputs = run(layer, x, states)
        generator = torch.Generator().manual_seed(7)
        grads = [torch.randn(out.shape, generator=generator).to(dtype) for out in outputs.values()]
        leaves = {"x": x, **{f"hx[{k}]": s for k, s in enumerate(states)}, **dict(layer.named_parameters())}
        found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads)
        return outputs | {f"grad of {name}": grad for name, grad in zip(leaves, found, strict=True)}

    return compute


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gates_equal_the_loop(kind: str, bidirectional: bool, capable: str, judge: Any) -> None:
    options = {"bidirectional": bidirectional}
    judge(results(traced, seqkernels.nn, kind, **options), results(loop, torch.nn, kind, **options))


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


@pytest.mark.parametrize("kind", KINDS)
def test_traces_have_the_form_of_the_output(kind: str, capable: str) -> None:
    layer = build(kind, seqkernels.nn, torch.float64, 0, num_layers=2, bidirectional=True)
    x, _ = draw(layer, torch.float64, 0)
    lengths = (2, 6, 0, 4, 1)
    flags = {"return_states": True, "return_gates": True}
    padding = torch.arange(T).unsqueeze(1) >= torch.tensor(lengths)
    _, _, padded = layer(x, lengths=torch.tensor(lengths), **flags)
    rows = [x[:n, b] for b, n in enumerate(lengths)]
    _, _, documents = layer(torch.cat(rows), cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), **flags)
    some = [row for row in rows if len(row)]
    packed = pack_sequence(some, enforce_sorted=False)
    _, _, packs = layer(packed, **flags)
    alone = [layer(row, **flags)[2] for row in some]
    layer.batch_first = True
    _, _, turned = layer(x.transpose(0, 1), lengths=torch.tensor(lengths), **flags)
    for k, trace in enumerate(padded):
        for j, part in enumerate(trace):
            if part is None:
                assert documents[k][j] is packs[k][j] is turned[k][j] is None
                continue
            assert not part[padding].any()
            joined = torch.cat([row[k][j] for row in alone])
            torch.testing.assert_close(documents[k][j], joined)
            torch.testing.assert_close(torch.cat([part[:n, b] for b, n in enumerate(lengths)]), joined)
            assert torch.equal(turned[k][j], part.transpose(0, 1))
            assert packs[k][j].batch_sizes is packed.batch_sizes
            shortest = pack_sequence([row[k][j] for row in alone], enforce_sorted=False)
            torch.testing.assert_close(packs[k][j].data, shortest.data)


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
    assert torch.autograd.gradgradcheck(lambda x: run(x, *weights), x)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_step_by_step(kind: str, batch_first: bool, plain_runner: Any) -> None:
    layer = build(kind, seqkernels.nn, torch.float64, 0, num_layers=2, batch_first=batch_first)
    x, states = draw(layer, torch.float64, 0)
    reset = torch.rand(T, B) < 0.3
    whole = (x.transpose(0, 1), reset.t()) if batch_first else (x, reset)
    output, hidden = layer(whole[0], hidden_of(states), reset=whole[1])
    output = output.transpose(0, 1) if batch_first else output
    hx, rows = hidden_of(states), []
    for t in range(T):
        y, hx = layer.step(x[t], hx, reset=reset[t])
        rows.append(y)
    torch.testing.assert_close((torch.stack(rows), hx), (output, hidden))
    leaves = [x, *states, *layer.parameters()]
    grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (torch.stack(rows), output))
    torch.testing.assert_close(*grads)
    row = layer.step(x[0, 2])
    torch.testing.assert_close(row[0], layer.step(x[0])[0][2])
    state = row[1][0] if isinstance(row[1], tuple) else row[1]
    assert state.shape == (2, y.shape[1])
    torch.testing.assert_close(layer.step(x[0, 2], row[1], reset=torch.tensor(True))[0], row[0])


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
    layer = seqkernels.nn.LSTM(1, 2)
    x = torch.randn(1, 1, 1).expand(steps, batch, 1).contiguous()
    output, (h_n, c_n) = layer(x)
    (grad,) = torch.autograd.grad(output[-1].sum(), layer.bias_ih_l0)
    few = layer(x[-200:, :3])[0]
    assert output.shape == (steps, batch, 2)
    torch.testing.assert_close(output[-1, -1], few[-1, -1])
    assert torch.equal(output[-1:], h_n)
    assert c_n.isfinite().all()
    (expected,) = torch.autograd.grad(few[-1].sum(), layer.bias_ih_l0)
    torch.testing.assert_close(grad / batch, expected / few.shape[1])
