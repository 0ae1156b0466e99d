"""``lengths=`` equals torch on the PackedSequence; ``cu_seqlens=`` equals each document by itself."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import seqkernels

from .layers import (
    KINDS,
    H,
    I,
    build,
    by_reference,
    draw_input,
    hidden_of,
    outputs_of,
    results,
    widths,
    without_gradients,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning"),
]

T = 8
LENGTHS = (3, 8, 1, 5, 8)
B = len(LENGTHS)


def draw(
    layer: Any, dtype: torch.dtype, seed: int, lengths: tuple[int, ...] = LENGTHS
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Input with NaN past the ends, and states."""
    steps = max(T, *lengths)
    x, states, _ = draw_input(layer, steps, len(lengths), dtype, seed)
    past = torch.arange(steps).unsqueeze(1) >= torch.tensor(lengths)
    return x.detach().masked_fill(past.unsqueeze(2), torch.nan).requires_grad_(), states


def padded(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    return outputs_of(*layer(x, hidden_of(states), lengths=torch.tensor(LENGTHS)))


def packed(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    output, hidden = layer(pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False), hidden_of(states))
    return outputs_of(pad_packed_sequence(output, total_length=T)[0], hidden)


def alone(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    rows = []
    for b, n in enumerate(LENGTHS):
        output, *finals = outputs_of(*layer(x[:n, b : b + 1], hidden_of([s[:, b : b + 1] for s in states])))
        rows.append([torch.nn.functional.pad(output, (0, 0, 0, 0, 0, T - n)), *finals])
    return [torch.cat(parts, 1) for parts in zip(*rows, strict=True)]


def documents(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    rows = torch.cat([x[:n, b] for b, n in enumerate(LENGTHS)])
    cu_seqlens = torch.tensor((0, *LENGTHS), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    output, *finals = outputs_of(*layer(rows, hidden_of(states), cu_seqlens=cu_seqlens))
    parts = output.split(LENGTHS)
    return [torch.nn.utils.rnn.pad_sequence(list(parts)), *finals]


def of_layer(form: Any, kind: str, package: Any = seqkernels.nn, **options: Any) -> Any:
    return results(form, draw, package, kind, **options)


@pytest.mark.parametrize("form", [padded, documents])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch(
    kind: str, num_layers: int, bidirectional: bool, form: Any, plain_runner: Any, judge: Any
) -> None:
    options = {"num_layers": num_layers, "bidirectional": bidirectional}
    theirs = [of_layer(run, kind, torch.nn, **options) for run in (packed, alone)]
    judge(of_layer(form, kind, **options), *theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_options_of_the_cell_go_with_lengths(kind: str, capable: str, judge: Any) -> None:
    """In evaluation, where nothing is random, a sequence gives what it gives alone."""
    peephole = {"peephole": True, "zoneout": (0.0, 0.25)} if kind in ("LSTM", "projected") else {"zoneout": 0.25}
    options = {"bidirectional": True, "layer_norm": True, "train": False, **peephole}
    theirs = [by_reference(of_layer(form, kind, **options)) for form in (alone, packed)]
    for form in (padded, packed, documents):
        judge(of_layer(form, kind, **options), *theirs)


@functools.cache
def truncated(form: Any, tbptt: int) -> Any:
    def run(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
        return form(functools.partial(layer, tbptt=tbptt), x, states)

    return run


@pytest.mark.parametrize("tbptt", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_gradients_count_from_where_each_sequence_begins(
    kind: str, tbptt: int, plain_runner: Any, judge: Any
) -> None:
    ours = [of_layer(truncated(form, tbptt), kind, bidirectional=True) for form in (padded, packed, documents)]
    theirs = [by_reference(run) for run in (of_layer(truncated(alone, tbptt), kind, bidirectional=True), *ours)]
    for run in ours:
        judge(run, *theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_the_padding_does_not_exist(kind: str, plain_runner: Any) -> None:
    layer = build(kind, seqkernels.nn, torch.float32, 0, num_layers=2, bidirectional=True)
    for given in (False, True):
        x, states = draw(layer, torch.float32, 0)
        layer.zero_grad()
        output, *finals = outputs_of(*layer(x, hidden_of(states) if given else None, lengths=torch.tensor(LENGTHS)))
        padding = torch.arange(T).unsqueeze(1) >= torch.tensor(LENGTHS)
        assert not output[padding].any()
        assert output[~padding].all()
        sum(out.square().sum() for out in (output, *finals)).backward()
        assert not x.grad[padding].any()
        for grad in [x.grad, *(p.grad for p in layer.parameters())]:
            assert grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_without_steps_keep_their_state(kind: str, plain_runner: Any) -> None:
    layer = build(kind, seqkernels.nn, torch.float64, 0, num_layers=2, bidirectional=True)
    lengths = (0, 3, 0)
    x, states = draw(layer, torch.float64, 0, lengths)
    rows = x[:3, 1]
    for documents in (False, True):
        for hx in (None, hidden_of(states)):
            if documents:
                cu_seqlens = torch.tensor([0, 0, 3, 3])
                output, *finals = outputs_of(*layer(rows, hx, cu_seqlens=cu_seqlens))
            else:
                output, *finals = outputs_of(*layer(x, hx, lengths=torch.tensor(lengths)))
                assert not output[:, ::2].any()
            for final, state in zip(finals, states, strict=True):
                expected = torch.zeros_like(state) if hx is None else state
                torch.testing.assert_close(final[:, ::2], expected[:, ::2], rtol=0, atol=0)
            (grad,) = torch.autograd.grad(finals[-1][:, 0].sum(), states[-1:], allow_unused=True)
            assert grad is None if hx is None else (grad[:, 0] == 1).all() and not grad[:, 1:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_at_all(kind: str, plain_runner: Any) -> None:
    layer = build(kind, seqkernels.nn, torch.float32, 0, bidirectional=True)
    none = torch.zeros(1, dtype=torch.int64)
    output, *finals = outputs_of(*layer(torch.randn(0, I), cu_seqlens=none))
    assert output.shape[0] == finals[0].shape[1] == 0
    output, *finals = outputs_of(*layer(torch.randn(0, I), cu_seqlens=none.repeat(4)))
    assert output.shape[0] == 0
    assert finals[0].shape[1] == 3
    assert not finals[0].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_forms_of_the_lengths(dtype: torch.dtype, plain_runner: Any) -> None:
    layer = build("LSTM", seqkernels.nn, torch.float64, 0, bidirectional=True)
    x, states = draw(layer, torch.float64, 0)
    expected = padded(layer, x, states)
    layer.batch_first = True
    lengths = torch.tensor(LENGTHS, dtype=dtype).repeat_interleave(2)[::2]
    found = outputs_of(*layer(x.transpose(0, 1), hidden_of(states), lengths=lengths))
    assert torch.equal(found[0], expected[0].transpose(0, 1))
    assert torch.equal(found[1], expected[1])
    rows = torch.cat([x[:n, b] for b, n in enumerate(LENGTHS)])
    cu_seqlens = torch.tensor((0, *LENGTHS)).cumsum(0).to(dtype)
    for longest in (None, T, T + 3):
        output, _ = layer(rows, hidden_of(states), cu_seqlens=cu_seqlens, max_seqlen=longest)
        assert torch.equal(output, torch.cat([found[0][b, :n] for b, n in enumerate(LENGTHS)]))


def flags() -> Tensor:
    """Resets, those in the padding, where there is no step, among them."""
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True
    reset[torch.arange(T).unsqueeze(1) >= torch.tensor(LENGTHS)] = True
    reset[0, 1] = True
    return reset


def reset_padded(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    return outputs_of(*layer(x, hidden_of(states), reset=flags(), lengths=torch.tensor(LENGTHS)))


def reset_alone(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    rows = []
    for b, n in enumerate(LENGTHS):
        output, *finals = outputs_of(*layer(x[:n, b], hidden_of([s[:, b] for s in states]), reset=flags()[:n, b]))
        rows.append([torch.nn.functional.pad(output, (0, 0, 0, T - n)), *finals])
    return [torch.stack(parts, 1) for parts in zip(*rows, strict=True)]


def test_resets_go_with_lengths(plain_runner: Any, judge: Any) -> None:
    options = {"num_layers": 2, "bidirectional": True}
    judge(of_layer(reset_padded, "LSTM", **options), by_reference(of_layer(reset_alone, "LSTM", **options)))


UNEVEN = (1, 0, 9, 2, 1, 1, 1, 0, 3, 1, 1, 0, 2, 1, 1, 1, 2, 1, 9, 1, 1, 0)


def draw_rows(layer: Any, dtype: torch.dtype, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Documents in one row, without states."""
    x, _, _ = draw_input(layer, sum(UNEVEN), 1, dtype, seed)
    return x.detach()[:, 0].requires_grad_(), ()


def joined(layer: Any, x: Tensor, states: tuple[()]) -> list[Tensor]:
    return outputs_of(*layer(x, cu_seqlens=torch.tensor([0, *UNEVEN]).cumsum(0)))


def each(layer: Any, x: Tensor, states: tuple[()]) -> list[Tensor]:
    found = [outputs_of(*layer(row)) for row in x.split(UNEVEN) if len(row)]
    finals = []
    for column in list(zip(*found, strict=True))[1:]:
        there = iter(column)
        finals.append(torch.stack([next(there) if n else torch.zeros_like(column[0]) for n in UNEVEN], 1))
    return [torch.cat([out[0] for out in found]), *finals]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_uneven_documents_share_rows(kind: str, bidirectional: bool, plain_runner: Any, judge: Any) -> None:
    """One long document among short ones, which are not all padded to its length."""
    options = {"num_layers": 2, "bidirectional": bidirectional}
    judge(*(results(run, draw_rows, of, kind, **options) for run, of in ((joined, seqkernels.nn), (each, torch.nn))))
    layer = build(kind, seqkernels.nn, torch.float64, 0, bidirectional=bidirectional)
    shapes = []
    with seqkernels.use_backend("reference"), Sizes(shapes):
        joined(layer, *draw_rows(layer, torch.float64, 0))
    assert max(shapes) <= 2 * (sum(UNEVEN) + 2 * max(UNEVEN))


class Sizes(TorchDispatchMode):
    """Notes the steps of each recurrence, of all rows."""

    def __init__(self, found: list[int]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.seqkernels.recurrence_forward.default,):
            self.found.append(args[0].shape[0] * args[0].shape[1])
        return func(*args, **(kwargs or {}))


def everything(layer: Any, x: Tensor, given: bool) -> dict[str, Tensor]:
    hx = hidden_of([torch.zeros(2, len(UNEVEN), width, dtype=x.dtype) for width in widths(layer)]) if given else None
    cu_seqlens = torch.tensor([0, *UNEVEN]).cumsum(0)
    *outputs, traces = layer(x, hx, cu_seqlens=cu_seqlens, tbptt=2, return_states=True, return_gates=True)
    parts = {f"{name} {k}": x for k, trace in enumerate(traces) for name, x in trace._asdict().items()}
    return {str(k): x for k, x in enumerate(outputs_of(*outputs))} | {n: x for n, x in parts.items() if x is not None}


def sharing(layer: Any, x: Tensor, states: tuple[()]) -> dict[str, Tensor]:
    return everything(layer, x, False)


def apart(layer: Any, x: Tensor, states: tuple[()]) -> dict[str, Tensor]:
    return everything(layer, x, True)


@pytest.mark.parametrize("kind", KINDS)
def test_uneven_documents_with_everything(kind: str, capable: str, judge: Any) -> None:
    """Rows of several documents give what documents in rows of their own give, to which an initial state leads."""
    options = {"bidirectional": True, "train": False}
    for norm in (False, True):
        runs = [results(run, draw_rows, seqkernels.nn, kind, layer_norm=norm, **options) for run in (sharing, apart)]
        # The gradient of a norm enlarges rounding errors 300 times where a document begins, with a state of zero.
        ours, theirs = map(without_gradients, runs) if norm else runs
        judge(ours, by_reference(theirs), by_reference(ours))


class NoWaiting(TorchDispatchMode):
    """Raises where a value is read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_a_value(kind: str) -> None:
    layer = build(kind, seqkernels.nn, torch.float32, 0, num_layers=2, bidirectional=True)
    x, states = draw(layer, torch.float32, 0)
    lengths, reset = torch.tensor(LENGTHS), torch.rand(T, B) < 0.3
    rows, cu_seqlens = x[:, 0].detach(), torch.tensor([0, 2, 5, 8])
    with NoWaiting(), seqkernels.use_backend("reference"):
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            lengths[0].item()
        output, _ = layer(x, hidden_of(states), lengths=lengths, reset=reset, tbptt=2)
        output.sum().backward()
        layer(rows, cu_seqlens=cu_seqlens, max_seqlen=3)
    meta = layer.to("meta")
    output, _ = meta(x.to("meta"), lengths=lengths.to("meta"), reset=reset.to("meta"))
    assert output.shape == (T, B, output.shape[2])
    output, _ = meta(rows.to("meta"), cu_seqlens=cu_seqlens.to("meta"), max_seqlen=3)
    assert output.shape[0] == T


@hypothesis.settings(max_examples=10)
@hypothesis.given(data=st.data())
def test_any_lengths(data: st.DataObject, plain_runner: Any, judge: Any) -> None:
    kind, bidirectional = data.draw(st.sampled_from(KINDS)), data.draw(st.booleans())
    lengths = data.draw(st.lists(st.integers(0, 6), max_size=5))
    longest = max([*lengths, 1]) + data.draw(st.integers(0, 2))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def drawn(dtype: torch.dtype, seed: int) -> tuple[Any, list[Tensor]]:
        layer = build(kind, seqkernels.nn, dtype, seed, bidirectional=bidirectional)
        return layer, [torch.randn(n, I).to(dtype) for n in lengths]

    def ours(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        layer, rows = drawn(dtype, seed)
        x = torch.full((longest, len(lengths), I), torch.nan, dtype=dtype)
        for b, row in enumerate(rows):
            x[: len(row), b] = row
        output, *finals = outputs_of(*layer(x, lengths=torch.tensor(lengths, dtype=torch.int64)))
        flat, *flat_finals = outputs_of(*layer(torch.cat([*rows, x[:0, :0].flatten(0, 1)]), cu_seqlens=cu_seqlens))
        found: dict[str, Tensor] = {}
        for b, n in enumerate(lengths):
            assert not output[n:, b].any()
            if n:
                start = cu_seqlens[b]
                every = [output[:n, b], flat[start : start + n], *(s[:, b] for s in (*finals, *flat_finals))]
                found |= {f"{b} {k}": out for k, out in enumerate(every)}
        return found

    def alone(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        layer, rows = drawn(dtype, seed)
        found: dict[str, Tensor] = {}
        for b, row in enumerate(rows):
            if len(row):
                output, *finals = outputs_of(*layer(row))
                found |= {f"{b} {k}": out for k, out in enumerate([output, output, *finals, *finals])}
        return found

    judge(ours, by_reference(alone))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_gradcheck(kind: str, plain_runner: Any) -> None:
    layer = getattr(seqkernels.nn, kind)(2, 3, bidirectional=True).double()
    lengths = torch.tensor([1, 0, 3])
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 3, 2), *[(2, 3, 3)] * (2 if kind == "LSTM" else 1)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]

    def run(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs_of(*layer(x, hidden_of(states), lengths=lengths)))

    assert torch.autograd.gradcheck(run, leaves)


# torch's own tracer of autograd functions warns that it instantiates them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "options"), [("projected", {}), ("GRU", {"bidirectional": True})], ids=["LSTM", "GRU"]
)
def test_compile_without_graph_breaks(kind: str, options: dict[str, Any], judge: Any) -> None:
    torch._dynamo.reset()

    def run(layer: Any, x: Tensor, states: tuple[Tensor, ...]) -> dict[str, Tensor]:
        hx = hidden_of(states)
        rows = torch.cat([x[:n, b] for b, n in enumerate(LENGTHS)])
        cu_seqlens, uneven = torch.tensor((0, *LENGTHS)).cumsum(0), torch.tensor([0, 1, 2, 3, 21, 22, 23, 24, 25, 25])
        outputs = outputs_of(*layer(x, hx, lengths=torch.tensor(LENGTHS), tbptt=4))
        outputs += outputs_of(*layer(rows, hx, cu_seqlens=cu_seqlens, max_seqlen=T))
        outputs += outputs_of(*layer(rows, cu_seqlens=uneven, max_seqlen=18))
        return {str(k): out for k, out in enumerate(outputs)}

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager = by_reference(of_layer(run, kind, **options))
    judge(of_layer(compiled, kind, **options), eager, seeds=1, dtypes=(torch.float32,))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"lengths": [1, 2]}, TypeError, "lengths: expected a Tensor, got list"),
        ({"lengths": torch.tensor([1.0, 2.0])}, ValueError, r"lengths: expected \(2,\) .* got \(2,\) torch\.float32"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths: expected \(2,\) .* on cpu, got \(1,\) torch\.int64"),
        ({"lengths": torch.tensor([1, 2], device="meta")}, ValueError, "lengths: expected .* on cpu, got .* on meta"),
        ({"lengths": torch.tensor([1, 9])}, RuntimeError, r"lengths: expected values from 0 to T, .* got \[1, 9\]"),
        ({"lengths": torch.tensor([-1, 8])}, RuntimeError, "lengths: expected values from 0 to T"),
        ({"lengths": torch.tensor(3), "input": torch.randn(T, I)}, ValueError, "lengths: input without a batch has"),
        (
            {"lengths": torch.tensor([2]), "input": pack_sequence([torch.randn(2, I)])},
            ValueError,
            "lengths: a PackedSequence has lengths of its own",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 2]), "input": pack_sequence([torch.randn(2, I)])},
            ValueError,
            "cu_seqlens: a PackedSequence has lengths of its own",
        ),
        ({"max_seqlen": 3}, ValueError, "max_seqlen: expected cu_seqlens too"),
        ({"cu_seqlens": torch.tensor([0, 8])}, RuntimeError, "input must have 2 dimensions, got 3"),
        ({"documents": [0, 8]}, TypeError, "cu_seqlens: expected a Tensor, got list"),
        ({"documents": torch.tensor([0.0, 8.0])}, ValueError, r"cu_seqlens: expected 1 .* got \(2,\) torch\.float32"),
        ({"documents": torch.tensor(8)}, ValueError, r"cu_seqlens: expected 1 dimension .* got \(\) torch\.int64"),
        ({"documents": torch.ones(0).int()}, ValueError, r"cu_seqlens: .* at least 1 element .* got \(0,\)"),
        (
            {"documents": torch.tensor([0, 7])},
            RuntimeError,
            r"cu_seqlens: expected to ascend from 0 to N, .* got \[0, 7\]",
        ),
        ({"documents": torch.tensor([1, 8])}, RuntimeError, "cu_seqlens: expected to ascend from 0 to N"),
        ({"documents": torch.tensor([0, 5, 3, 8])}, RuntimeError, "cu_seqlens: expected to ascend from 0 to N"),
        (
            {"documents": torch.tensor([0, 5, 8]), "max_seqlen": 4},
            RuntimeError,
            "cu_seqlens: .* in steps of at most max_seqlen",
        ),
        ({"documents": torch.tensor([0, 8]), "max_seqlen": -1}, ValueError, "max_seqlen: expected an integer of at"),
        (
            {"documents": torch.tensor([0, 8]), "lengths": torch.tensor([8])},
            ValueError,
            "lengths: cu_seqlens says the lengths already",
        ),
        (
            {"documents": torch.tensor([0, 8]), "hx": torch.zeros(1, 2, H)},
            RuntimeError,
            r"hx: expected size \(1, 1, 11\), got \(1, 2, 11\)",
        ),
    ],
)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = seqkernels.nn.GRU(I, H)
    arguments = {"input": torch.randn(T, 2, I), **changed}
    if "documents" in arguments:
        arguments |= {"input": torch.randn(T, I), "cu_seqlens": arguments.pop("documents")}
    with pytest.raises(error, match=message):
        layer(arguments.pop("input"), **arguments)


def test_longest_document_is_needed_where_nothing_may_wait() -> None:
    layer = seqkernels.nn.GRU(I, H, device="meta")
    with pytest.raises(ValueError, match="max_seqlen: the length of the longest document is needed where cu_seqlens"):
        layer(torch.randn(T, I, device="meta"), cu_seqlens=torch.tensor([0, T], device="meta"))
