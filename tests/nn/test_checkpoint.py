"""``checkpoint_every`` of the layers: the same bits, less memory, in every form of input."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkernels
from seqkernels import backends, testing
from seqkernels.backends import Call

from . import layers
from .layers import H, I, by_reference, draw_input, outputs_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:seqkernels runs .* on the slow reference implementation:UserWarning"),
]

T, B = 7, 4
EVERY = (1, 2, 3, T - 1, T, T + 5)
KINDS = ("RNN", "ReLU", "LSTM", "projected", "GRU")


def _having(*features: str) -> list[str]:
    call = Call("recurrence", "cpu", torch.float32, "lstm", tuple(sorted(("checkpoint", "control", *features))))
    return [name for name in backends.NAMES if backends.why_not(name, call) is None]


@pytest.fixture(params=_having("reset_state"))
def storing(request: pytest.FixtureRequest) -> Any:
    """Insists on each implementation that has checkpoints; fresh memory holds NaN."""
    with seqkernels.use_backend(request.param), testing.threads(1), testing.poisoned_empty():
        yield request.param


@pytest.fixture(params=_having("norm", "peephole", "recurrent_mask", "zoneout"))
def storing_options(request: pytest.FixtureRequest) -> Any:
    """Likewise, with the options of the cells."""
    with seqkernels.use_backend(request.param), testing.threads(1), testing.poisoned_empty():
        yield request.param


def build(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return layers.build(kind, seqkernels.nn, dtype, 1, **options)


def results(layer: Any, x: Any, hx: Any = None, **call: Any) -> list[Tensor]:
    """Output, final states, and the gradients of the input, the states and the parameters."""
    torch.manual_seed(2)
    data = x.data if isinstance(x, PackedSequence) else x
    data = data.detach().requires_grad_()
    output, final = layer(x._replace(data=data) if isinstance(x, PackedSequence) else data, hx, **call)
    outputs = [output.data if isinstance(output, PackedSequence) else output]
    outputs += final if isinstance(final, tuple) else (final,)
    leaves = [data, *layer.parameters()]
    if hx is not None:
        leaves += hx if isinstance(hx, tuple) else (hx,)
    grads = testing.random_grads({str(k): x for k, x in enumerate(outputs)})
    found = torch.autograd.grad(outputs, leaves, list(grads.values()), allow_unused=True)
    return [*outputs, *(x for x in found if x is not None)]


def assert_same(layer: Any, x: Any, hx: Any = None, every: tuple[int, ...] = EVERY, **call: Any) -> None:
    whole = results(layer, x, hx, **call)
    for k in every:
        for a, b in zip(results(layer, x, hx, checkpoint_every=k, **call), whole, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), (k, a.shape)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def states(layer: Any) -> Any:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    dtype = layer.weight_hh_l0.dtype
    h = draw(rows, B, layer.proj_size or H, dtype=dtype).requires_grad_()
    return (h, draw(rows, B, H, dtype=dtype).requires_grad_()) if layer.mode == "LSTM" else h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_directions(storing: str, kind: str, dtype: torch.dtype) -> None:
    layer = build(kind, dtype, num_layers=2, bidirectional=True, dropout=0.3)
    assert_same(layer, draw(T, B, I, dtype=dtype))
    assert_same(layer, draw(T, B, I, dtype=dtype), states(layer), (3,))
    assert_same(build(kind, dtype, batch_first=True), draw(B, T, I, dtype=dtype), every=(3,))
    assert_same(build(kind, dtype), draw(T, I, dtype=dtype), every=(3,))
    assert_same(build(kind, dtype), draw(1, B, I, dtype=dtype), every=(1, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_input(storing: str, kind: str) -> None:
    layer = build(kind, bidirectional=True, learn_reset_state=True)
    x = draw(T, B, I)
    lengths = torch.tensor([7, 3, 0, 5])
    assert_same(layer, x, lengths=lengths)
    assert_same(layer, x, states(layer), lengths=lengths, every=(2, 3))
    assert_same(layer, x, reset=draw(T, B) > 0.5, tbptt=3)
    packed = pack_padded_sequence(x, torch.tensor([7, 3, 1, 5]), enforce_sorted=False)
    assert_same(layer, packed, every=(1, 3, 20))
    assert_same(layer, x.flatten(0, 1), cu_seqlens=torch.tensor([0, 6, 6, 13, 28]))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_very_different_lengths(storing: str, kind: str, judge: Any) -> None:
    """Rows that several of them share do not hold the cell states at their ends."""
    cu_seqlens = torch.tensor([0, 20, *range(21, 41)])

    def drawn(layer: Any, dtype: torch.dtype, seed: int) -> tuple[Tensor, tuple[()]]:
        return draw_input(layer, 40, 1, dtype, seed)[0].detach()[:, 0].requires_grad_(), ()

    def documents(every: int | None, layer: Any, x: Tensor, _: Any) -> list[Tensor]:
        return outputs_of(*layer(x, cu_seqlens=cu_seqlens, checkpoint_every=every))

    kept, whole = (
        layers.results(functools.partial(documents, every), drawn, seqkernels.nn, kind) for every in (6, None)
    )
    if kind in ("LSTM", "projected"):
        judge(kept, by_reference(whole), by_reference(kept))
    else:
        found = kept(torch.float64, 0)
        assert all(torch.equal(found[name], x) for name, x in whole(torch.float64, 0).items())
    layer = build(kind, torch.float64)
    x = draw(40, I, dtype=torch.float64)
    with torch.no_grad():
        found, expected = (documents(every, layer, x, ()) for every in (6, None))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_options(storing_options: str, kind: str, train: bool) -> None:
    options: dict[str, Any] = {"recurrent_dropout": 0.4, "layer_norm": True, "learn_reset_state": True}
    options["zoneout"] = {"LSTM": (0.2, 0.4), "projected": (0.0, 0.4)}.get(kind, 0.3)
    options["peephole"] = kind in ("LSTM", "projected")
    layer = build(kind, num_layers=2, bidirectional=True, **options).train(train)
    assert_same(layer, draw(T, B, I), every=(1, 3), reset=draw(T, B) > 0.5, lengths=torch.tensor([7, 3, 0, 5]), tbptt=3)
    assert_same(layer, draw(T, B, I), states(layer), (2, T - 1, T + 5))


def stored(layer: Any, x: Tensor, **call: Any) -> int:
    """Bytes that autograd keeps apart from input, parameters and output."""
    own = {y.untyped_storage().data_ptr() for y in (x, *layer.parameters())}
    sizes: dict[int, int] = {}

    def pack(y: Tensor) -> Tensor:
        sizes[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    with saved_tensors_hooks(pack, lambda y: y):
        output, _ = layer(x, **call)
    own.add(output.untyped_storage().data_ptr())
    return sum(size for pointer, size in sizes.items() if pointer not in own)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_memory(storing: str, kind: str) -> None:
    """The initial state, which is zero, and one state for every k steps."""
    layer = build(kind)
    state = (2 if kind == "LSTM" else 1) * B * H * 4
    for steps in (24, 96):
        for k in (1, 4, 7, 200):
            assert stored(layer, draw(steps, B, I), checkpoint_every=k) == (1 + -(-steps // k)) * state
        if kind != "RNN":
            assert stored(layer, draw(steps, B, I)) >= 4 * steps * B * H * 4


@pytest.mark.parametrize("kind", ["ReLU", "projected", "GRU"])
def test_functions_and_compilation(storing: str, kind: str) -> None:
    torch._dynamo.reset()
    layer = build(kind, torch.float64, bidirectional=True)
    x = draw(T, B, I, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = list(layer.parameters())
    expected = torch.autograd.grad(layer(x)[0].square().sum(), leaves)
    for a, b in zip(
        torch.autograd.grad(compiled(x, checkpoint_every=3)[0].square().sum(), leaves), expected, strict=True
    ):
        assert torch.equal(a, b)
    name = {"ReLU": "rnn", "projected": "lstm"}.get(kind, kind.lower())
    more = {"nonlinearity": "relu"} if kind == "ReLU" else {}
    output = getattr(seqkernels.functional, name)(
        x, None, layer._flat_weights, True, 1, 0.0, True, True, False, checkpoint_every=3, **more
    )[0]
    for a, b in zip(torch.autograd.grad(output.square().sum(), leaves), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "projected", "GRU"])
def test_second_derivatives(storing: str, kind: str) -> None:
    layer = build(kind, torch.float64)
    x = draw(4, 2, I, dtype=torch.float64).requires_grad_()
    found = []
    for call in ({}, {"checkpoint_every": 2}):
        output = layer(x, **call)[0].square().sum()
        (grad,) = torch.autograd.grad(output, x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *layer.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_it_changes_nothing(storing: str, kind: str) -> None:
    layer = build(kind)
    with torch.no_grad():
        assert torch.equal(layer(draw(T, B, I), checkpoint_every=2)[0], layer(draw(T, B, I))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(storing: str, kind: str) -> None:
    """The backward pass, too, which computes states again that were made with autocast off."""
    layer = build(kind, bidirectional=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(layer, draw(T, B, I))
        inside = results(layer, draw(T, B, I))
        output = layer(draw(T, B, I), checkpoint_every=2)[0]
    outside = torch.autograd.grad(output.sum(), layer.weight_hh_l0)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(draw(T, B, I), checkpoint_every=2)[0]
        assert torch.equal(output, inside[0])
        assert torch.equal(torch.autograd.grad(output.sum(), layer.weight_hh_l0)[0], outside[0])


def test_explain_says_who_has_no_checkpoint() -> None:
    text = str(seqkernels.explain(build("GRU"), draw(T, B, I), checkpoint_every=2))
    assert "with checkpoint" in text
    if backends.backend("numba").unavailable() is None:
        assert "numba: has no checkpoint" in text


@pytest.mark.parametrize(
    ("call", "text"),
    [
        *(
            ({"checkpoint_every": k}, f"checkpoint_every: expected None or an integer of at least 1, got {k!r}")
            for k in (0, -1, 2.0, True, "2")
        ),
        *(
            ({"checkpoint_every": 2, name: True}, f"checkpoint_every: expected None with {name}, which stores every")
            for name in ("return_states", "return_gates")
        ),
    ],
)
def test_errors(call: dict[str, Any], text: str) -> None:
    layer = build("LSTM")
    with pytest.raises(ValueError, match=text):
        layer(draw(T, B, I), **call)
    with pytest.raises(ValueError, match=text):
        seqkernels.functional.lstm(draw(T, B, I), None, layer._flat_weights, True, 1, 0.0, True, False, False, **call)
