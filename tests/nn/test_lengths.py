"""``lengths=`` equals torch on the PackedSequence; ``cu_seqlens=`` equals each document by itself."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import seqkernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning"),
]

I, H, P, T = 3, 11, 4, 8  # noqa: E741
LENGTHS = (3, 8, 1, 5, 8)
B = len(LENGTHS)
KINDS = ("RNN", "LSTM", "projected", "GRU")


def build(kind: str, package: Any, dtype: torch.dtype, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    more = {"projected": {"proj_size": P}}.get(kind, {})
    return getattr(package, "LSTM" if kind == "projected" else kind)(I, H, **more, **options).to(dtype)


def draw(layer: Any, lengths: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Input with NaN past the ends, and states."""
    generator = torch.Generator().manual_seed(seed)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = (layer.proj_size or H, H) if layer.mode == "LSTM" else (H,)
    steps = max(T, *lengths)
    x = torch.randn(steps, len(lengths), I, generator=generator).to(dtype)
    x[torch.arange(steps).unsqueeze(1) >= torch.tensor(lengths)] = torch.nan
    states = (torch.randn(rows, len(lengths), width, generator=generator).to(dtype) for width in widths)
    return x.requires_grad_(), tuple(state.requires_grad_() for state in states)


def hidden_of(states: Any) -> Any:
    return tuple(states) if len(states) == 2 else states[0]


def outputs_of(output: Tensor, hidden: Any, *_: Any) -> list[Tensor]:
    return [output, *(hidden if isinstance(hidden, tuple) else (hidden,))]


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


def results(run: Any, package: Any, kind: str, **options: Any) -> Any:
    def compute(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        layer = build(kind, package, dtype, seed, **options)
        x, states = draw(layer, LENGTHS, dtype, seed)
        outputs = run(layer, x, states)
        generator = torch.Generator().manual_seed(7)
        grads = [torch.randn(out.shape, generator=generator).to(dtype) for out in outputs]
        leaves = {"x": x, **{f"hx[{k}]": s for k, s in enumerate(states)}, **dict(layer.named_parameters())}
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        named = dict(zip(("output", "h_n", "c_n"), outputs, strict=False))
        return named | {f"grad of {name}": grad for name, grad in zip(leaves, found, strict=True)}

    return compute


@pytest.mark.parametrize("form", [padded, documents])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch(
    kind: str, num_layers: int, bidirectional: bool, form: Any, plain_runner: Any, judge: Any
) -> None:
    options = {"num_layers": num_layers, "bidirectional": bidirectional}
    theirs = [results(run, torch.nn, kind, **options) for run in (packed, alone)]
    judge(results(form, seqkernels.nn, kind, **options), *theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_options_of_the_cell_go_with_lengths(kind: str, capable: str) -> None:
    """In evaluation, where nothing is random, a sequence gives what it gives alone."""
    peephole = {"peephole": True, "zoneout": (0.0, 0.25)} if kind in ("LSTM", "projected") else {"zoneout": 0.25}
    options = {"num_layers": 2, "bidirectional": True, "layer_norm": True, **peephole}
    layer = build(kind, seqkernels.nn, torch.float64, 0, **options).eval()
    x, states = draw(layer, LENGTHS, torch.float64, 0)
    leaves = [x, *states, *layer.parameters()]
    expected = alone(layer, x, states)
    grads = torch.autograd.grad(sum(out.square().sum() for out in expected), leaves)
    for form in (padded, packed, documents):
        found = form(layer, x, states)
        for result, value in zip(found, expected, strict=True):
            torch.testing.assert_close(result, value)
        torch.testing.assert_close(torch.autograd.grad(sum(out.square().sum() for out in found), leaves), grads)


@pytest.mark.parametrize("tbptt", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_gradients_count_from_where_each_sequence_begins(kind: str, tbptt: int, plain_runner: Any) -> None:
    layer = build(kind, seqkernels.nn, torch.float64, 0, num_layers=2, bidirectional=True)
    x, states = draw(layer, LENGTHS, torch.float64, 0)
    leaves = [x, *states, *layer.parameters()]

    class Truncated:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return layer(*args, tbptt=tbptt, **kwargs)

    expected = alone(Truncated(), x, states)
    grads = torch.autograd.grad(sum(out.square().sum() for out in expected), leaves)
    for form in (padded, packed, documents):
        found = form(Truncated(), x, states)
        for result, value in zip(found, expected, strict=True):
            torch.testing.assert_close(result, value)
        torch.testing.assert_close(torch.autograd.grad(sum(out.square().sum() for out in found), leaves), grads)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_the_padding_does_not_exist(kind: str, plain_runner: Any) -> None:
    layer = build(kind, seqkernels.nn, torch.float32, 0, num_layers=2, bidirectional=True)
    for given in (False, True):
        x, states = draw(layer, LENGTHS, torch.float32, 0)
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
    x, states = draw(layer, lengths, torch.float64, 0)
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
    x, states = draw(layer, LENGTHS, torch.float64, 0)
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


def test_resets_go_with_lengths(plain_runner: Any) -> None:
    """Flags in the padding, where there is no step, say nothing."""
    layer = build("LSTM", seqkernels.nn, torch.float64, 0, num_layers=2, bidirectional=True)
    x, states = draw(layer, LENGTHS, torch.float64, 0)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True
    reset[torch.arange(T).unsqueeze(1) >= torch.tensor(LENGTHS)] = True
    reset[0, 1] = True
    found = outputs_of(*layer(x, states, reset=reset, lengths=torch.tensor(LENGTHS)))
    for b, n in enumerate(LENGTHS):
        hx = tuple(s[:, b] for s in states)
        expected = outputs_of(*layer(x[:n, b], hx, reset=reset[:n, b]))
        torch.testing.assert_close(found[0][:n, b], expected[0])
        for state, value in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(state[:, b], value)


UNEVEN = (1, 0, 9, 2, 1, 1, 1, 0, 3, 1, 1, 0, 2, 1, 1, 1, 2, 1, 9, 1, 1, 0)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_uneven_documents_share_rows(kind: str, bidirectional: bool, plain_runner: Any, judge: Any) -> None:
    """One long document among short ones, which are not all padded to its length."""
    rows = torch.arange(sum(UNEVEN)) % 7

    def draw_rows(dtype: torch.dtype, seed: int) -> Tensor:
        noise = torch.randn(sum(UNEVEN), I, generator=torch.Generator().manual_seed(seed))
        return (noise + rows.unsqueeze(1) / 8).to(dtype).requires_grad_()

    def joined(layer: Any, x: Tensor) -> list[Tensor]:
        return outputs_of(*layer(x, cu_seqlens=torch.tensor([0, *UNEVEN]).cumsum(0)))

    def each(layer: Any, x: Tensor) -> list[Tensor]:
        found = [outputs_of(*layer(row)) for row in x.split(UNEVEN) if len(row)]
        finals = []
        for states in list(zip(*found, strict=True))[1:]:
            there = iter(states)
            finals.append(torch.stack([next(there) if n else torch.zeros_like(states[0]) for n in UNEVEN], 1))
        return [torch.cat([out[0] for out in found]), *finals]

    def results_of(run: Any, package: Any) -> Any:
        def compute(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
            layer = build(kind, package, dtype, seed, num_layers=2, bidirectional=bidirectional)
            x = draw_rows(dtype, seed)
            outputs = run(layer, x)
            leaves = {"x": x, **dict(layer.named_parameters())}
            grads = torch.autograd.grad(sum(out.square().sum() for out in outputs), list(leaves.values()))
            named = dict(zip(("output", "h_n", "c_n"), outputs, strict=False))
            return named | {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}

        return compute

    judge(results_of(joined, seqkernels.nn), results_of(each, torch.nn))
    layer = build(kind, seqkernels.nn, torch.float64, 0, bidirectional=bidirectional)
    x = draw_rows(torch.float64, 0)
    shapes = []
    with seqkernels.use_backend("reference"), Sizes(shapes):
        joined(layer, x)
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


@pytest.mark.parametrize("kind", KINDS)
def test_uneven_documents_with_everything(kind: str, capable: str) -> None:
    """Rows of several documents give what documents in rows of their own give, to which an initial state leads."""
    options = {"num_layers": 2, "bidirectional": True, "layer_norm": True}
    layer = build(kind, seqkernels.nn, torch.float64, 0, **options).eval()
    x = torch.randn(sum(UNEVEN), I, dtype=torch.float64, requires_grad=True)
    widths = (layer.proj_size or H, H) if layer.mode == "LSTM" else (H,)
    zeros = [torch.zeros(4, len(UNEVEN), width, dtype=torch.float64) for width in widths]
    arguments = {"cu_seqlens": torch.tensor([0, *UNEVEN]).cumsum(0), "tbptt": 2, "return_states": True}
    leaves = [x, *layer.parameters()]
    found, expected = (layer(x, hx, **arguments, return_gates=True) for hx in (None, hidden_of(zeros)))
    for result, value in zip(outputs_of(*found), outputs_of(*expected), strict=True):
        torch.testing.assert_close(result, value)
    for trace, trace_alone in zip(found[2], expected[2], strict=True):
        for part, value in zip(trace, trace_alone, strict=True):
            assert part is value is None or torch.testing.assert_close(part, value) is None
    grads = (
        torch.autograd.grad(sum(out.square().sum() for out in outputs_of(*outputs)), leaves)
        for outputs in (found, expected)
    )
    torch.testing.assert_close(*grads)


class NoWaiting(TorchDispatchMode):
    """Raises where a value is read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_a_value(kind: str) -> None:
    layer = build(kind, seqkernels.nn, torch.float32, 0, num_layers=2, bidirectional=True)
    x, states = draw(layer, LENGTHS, torch.float32, 0)
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


@hypothesis.settings(max_examples=20)
@hypothesis.given(data=st.data())
def test_any_lengths(data: st.DataObject, plain_runner: Any) -> None:
    layer = build(
        data.draw(st.sampled_from(KINDS)), seqkernels.nn, torch.float64, 0, bidirectional=data.draw(st.booleans())
    )
    lengths = data.draw(st.lists(st.integers(0, 6), max_size=5))
    longest = max([*lengths, 1]) + data.draw(st.integers(0, 2))
    x = torch.full((longest, len(lengths), I), torch.nan, dtype=torch.float64)
    rows = [torch.randn(n, I, dtype=torch.float64) for n in lengths]
    for b, row in enumerate(rows):
        x[: len(row), b] = row
    output, *finals = outputs_of(*layer(x, lengths=torch.tensor(lengths, dtype=torch.int64)))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    joined = torch.cat([*rows, torch.empty(0, I, dtype=torch.float64)])
    flat, *flat_finals = outputs_of(*layer(joined, cu_seqlens=cu_seqlens))
    for b, row in enumerate(rows):
        torch.testing.assert_close(flat[cu_seqlens[b] : cu_seqlens[b + 1]], output[: len(row), b])
        assert not output[len(row) :, b].any()
        if len(row):
            expected = outputs_of(*layer(row))
            torch.testing.assert_close(output[: len(row), b], expected[0])
            for final, flat_final, value in zip(finals, flat_finals, expected[1:], strict=True):
                torch.testing.assert_close(final[:, b], value)
                torch.testing.assert_close(flat_final[:, b], value)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, plain_runner: Any) -> None:
    layer = build(kind, seqkernels.nn, torch.float64, 0, bidirectional=True)
    lengths = torch.tensor([1, 0, 3])
    x, states = draw(layer, (3, 3, 3), torch.float64, 0)

    def run(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs_of(*layer(x[:3], hidden_of(states), lengths=lengths)))

    assert torch.autograd.gradcheck(run, (x.detach()[:3].requires_grad_(), *states))


# torch's own tracer of autograd functions warns that it instantiates them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_compile_without_graph_breaks(kind: str) -> None:
    torch._dynamo.reset()
    layer = build(kind, seqkernels.nn, torch.float32, 0, num_layers=2, bidirectional=True)
    x, states = draw(layer, LENGTHS, torch.float32, 0)
    rows = torch.cat([x[:n, b] for b, n in enumerate(LENGTHS)]).detach().requires_grad_()
    cu_seqlens = torch.tensor((0, *LENGTHS)).cumsum(0)
    uneven = torch.tensor([0, 1, 2, 3, 21, 22, 23, 24, 25, 25])

    def run(x: Tensor, rows: Tensor, lengths: Tensor, cu_seqlens: Tensor, *states: Tensor) -> list[Tensor]:
        hx = hidden_of(states)
        first = outputs_of(*layer(x, hx, lengths=lengths, tbptt=4))
        second = outputs_of(*layer(rows, hx, cu_seqlens=cu_seqlens, max_seqlen=T))
        return first + second + outputs_of(*layer(rows, cu_seqlens=uneven, max_seqlen=18))

    arguments = (x, rows, torch.tensor(LENGTHS), cu_seqlens, *states)
    leaves = [x, rows, *states, *layer.parameters()]
    found, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments), run(*arguments)
    for result, value in zip(found, expected, strict=True):
        torch.testing.assert_close(result, value)
    grads = (torch.autograd.grad(sum(out.square().sum() for out in outputs), leaves) for outputs in (found, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"lengths": [1, 2]}, TypeError, "lengths: expected a Tensor, got list"),
        ({"lengths": torch.tensor([1.0, 2.0])}, ValueError, r"lengths: expected \(2,\) .* got \(2,\) torch\.float32"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths: expected \(2,\) .* on cpu, got \(1,\) torch\.int64"),
        ({"lengths": torch.tensor([1, 2], device="meta")}, ValueError, "lengths: expected .* on cpu, got .* on meta"),
        ({"lengths": torch.tensor([1, 9])}, RuntimeError, "lengths: expected values from 0 to T"),
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
        ({"documents": torch.tensor([0, 7])}, RuntimeError, "cu_seqlens: expected to ascend from 0 to N"),
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
