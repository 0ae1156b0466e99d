"""Recurrent layers under tensors and arguments that nobody should give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

import seqkernels
from seqkernels import functional
from seqkernels.testing import assert_within_budget

LAYERS = ("RNN", "LSTM", "GRU")


def layer(kind: str, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return getattr(seqkernels.nn, kind)(*args, **kwargs)


def negated(*shape: int) -> Tensor:
    """Numbers whose sign is a bit of the tensor instead of one of each element, as in `imag` of a conjugate."""
    x = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    return x


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("steps", "inputs", "hidden"), [(4, 1, 5), (1, 1, 5), (4, 5, 1), (1, 5, 1), (4, 1, 1)])
def test_negation_by_a_bit(kind: str, steps: int, inputs: int, hidden: int) -> None:
    model = layer(kind, inputs, hidden)
    x, grad = negated(steps, 3, inputs), negated(steps, 3, hidden)
    with torch.no_grad():
        assert torch.equal(model(x)[0], model(x.resolve_neg())[0])
    found = []
    for once in (x, x.resolve_neg()):
        output, _ = model(once)
        kept = grad if steps > 1 else grad.resolve_neg()
        found.append([output, *torch.autograd.grad(output, list(model.parameters()), kept)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_transforms_run_plain_operations(kind: str, steps: int) -> None:
    """grad, vmap, forward mode and their compositions, of a layer that torch's own answers for."""
    ours = layer(kind, 3, 4).double()
    theirs = getattr(torch.nn, kind)(3, 4).double()
    theirs.load_state_dict(ours.state_dict())
    x, tangent = torch.randn(2, 5, steps, 2, 3, dtype=torch.float64).unbind(0)

    def loss(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x)[0].square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        torch.stack([loss(theirs)(one) for one in leaf]), leaf, torch.ones(5, dtype=leaf.dtype)
    )
    torch.testing.assert_close(torch.func.grad(loss(ours))(x[0]), expected[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss(ours)))(x), expected)
    found, along, *_ = torch.func.jvp(loss(ours), (x[0],), (tangent[0],))
    torch.testing.assert_close(found, loss(theirs)(x[0]))
    torch.testing.assert_close(along, (expected[0] * tangent[0]).sum())
    with forward_ad.dual_level():
        dual = loss(ours)(forward_ad.make_dual(x[0], tangent[0]))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along)


def test_compiled_transforms() -> None:
    model = layer("LSTM", 3, 4)
    gradient = torch.func.grad(lambda x: model(x)[0].square().sum())
    x = torch.randn(2, 2, 3)
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager", fullgraph=True)(x), gradient(x))


def test_the_op_itself_refuses_tangents() -> None:
    x = torch.randn(2, 1, 3)
    weights = (torch.randn(12, 3), torch.randn(12, 3), *(None,) * 9)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="got a dual tensor"):
        torch.ops.seqkernels.recurrence_forward(
            forward_ad.make_dual(x, x), list(weights), torch.zeros(2, 1, 3), None, "lstm", False, False
        )


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_outputs_without_gradient_are_nobodys_views(kind: str, steps: int, reverse: bool) -> None:
    model, x = layer(kind, 3, 4, bidirectional=reverse), torch.randn(steps, 2, 3)
    with torch.no_grad():
        output, _ = model(x)
        expected = output.clone()
    scale = torch.full((output.shape[-1],), 2.0, requires_grad=True)
    output.mul_(scale)
    (grad,) = torch.autograd.grad(output.sum(), scale)
    assert torch.equal(grad, expected.sum((0, 1)))
    with torch.no_grad():
        output, _ = model(x, return_states=True)[:2]
    output.detach_()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_gradients_at_once(kind: str, dtype: torch.dtype) -> None:
    ours = layer(kind, 3, 4, 2, bidirectional=True).to(dtype)
    theirs = getattr(torch.nn, kind)(3, 4, 2, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    x, grads = torch.randn(5, 2, 3), torch.randn(3, 5, 2, 8)

    def one_by_one(model: Any, dtype: torch.dtype) -> list[Tensor]:
        wanted = [x.to(dtype).requires_grad_(), *model.to(dtype).parameters()]
        output, _ = model(wanted[0])
        found = [torch.autograd.grad(output, wanted, g.to(dtype), retain_graph=True) for g in grads]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    baseline, oracle = one_by_one(theirs, torch.float32), one_by_one(theirs, torch.float64)
    wanted = [x.to(dtype).requires_grad_(), *ours.parameters()]
    output, _ = ours(wanted[0])
    of_engine = torch.autograd.grad(output, wanted, grads.to(dtype), retain_graph=True, is_grads_batched=True)
    of_vmap = torch.vmap(lambda g: torch.autograd.grad(output, wanted, g, retain_graph=True))(grads.to(dtype))
    for found in (of_engine, of_vmap):
        for got, exact, other in zip(found, oracle, baseline, strict=True):
            assert not got.requires_grad
            assert_within_budget(got, exact, other)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("beyond", [10**6, 10**12, 2**70])
def test_numbers_far_beyond_the_steps(kind: str, beyond: int) -> None:
    model, x = layer(kind, 3, 4), torch.randn(5, 2, 3)
    documents = {"cu_seqlens": torch.tensor([0, 3, 4])}

    def run(**options: Any) -> list[Tensor]:
        rows = x[:4, 0] if "cu_seqlens" in options else x
        output, _ = model(rows, **options)
        return [output, *torch.autograd.grad(output.sum(), list(model.parameters()))]

    assert all(map(torch.equal, run(checkpoint_every=beyond), run()))
    assert all(map(torch.equal, run(tbptt=beyond), run()))
    assert all(map(torch.equal, run(**documents, max_seqlen=beyond), run(**documents)))
    assert all(map(torch.equal, run(**documents, tbptt=beyond), run(**documents)))


X = torch.zeros(5, 2, 3)
STATE = torch.zeros(1, 2, 4)
DOCUMENTS = torch.tensor([0, 2, 5])
WRONG: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    ("LSTM", lambda m: m([1.0]), TypeError, "input: expected a Tensor or a PackedSequence, got list"),
    ("GRU", lambda m: m(None), TypeError, "input: expected a Tensor or a PackedSequence, got NoneType"),
    ("GRU", lambda m: m.step([1.0]), TypeError, "input: expected a Tensor, got list"),
    ("GRU", lambda m: m(X, (STATE,)), TypeError, "hx: expected a Tensor, got tuple"),
    ("LSTM", lambda m: m(X, STATE), TypeError, r"hx: expected a tuple \(h_0, c_0\), got Tensor"),
    ("LSTM", lambda m: m(X, (STATE,)), RuntimeError, "hx: lstm expects two hidden states, got 1"),
    ("LSTM", lambda m: m(X, (STATE,) * 3), RuntimeError, "hx: lstm expects two hidden states, got 3"),
    ("LSTM", lambda m: m(X, (STATE, None)), TypeError, r"hx\[1\]: expected a Tensor, got NoneType"),
    ("LSTM", lambda m: m(X, (STATE, 0.0), tbptt=1), TypeError, r"hx\[1\]: expected a Tensor, got float"),
    ("GRU", lambda m: m(X, STATE.to("meta"), tbptt=1), RuntimeError, "hx: expected on cpu as the input, got meta"),
    ("RNN", lambda m: m(X, tbptt=True), ValueError, "tbptt: expected an integer of at least 1, got True"),
    ("RNN", lambda m: m(X, return_states="no"), TypeError, "return_states: expected a bool, got 'no'"),
    ("RNN", lambda m: m(X, return_gates=1), TypeError, "return_gates: expected a bool, got 1"),
    ("RNN", lambda m: m.step(X[0], reset=[True]), TypeError, "reset: expected a Tensor of .*, got list"),
    (
        "RNN",
        lambda m: m.step(X[0], reset=torch.ones(2, 1).bool()),
        ValueError,
        r"reset: expected \(2,\) on cpu, got \(2, 1\) on cpu",
    ),
    *[
        (
            "GRU",
            lambda m, bound=bound: m(X[:, 0], cu_seqlens=DOCUMENTS, max_seqlen=bound),
            ValueError,
            "max_seqlen: exp",
        )
        for bound in (3.0, "3", torch.tensor(3), True)
    ],
    *[
        (
            "LSTM",
            lambda m, sizes=sizes: m(PackedSequence(X[:, 0].new_zeros(6, 3), torch.tensor(sizes))),
            RuntimeError,
            r"batch_sizes: expected numbers of at least 0, none above the one before, got \[",
        )
        for sizes in ([3, 1, 2], [2, 3, 1], [4, 3, -1])
    ],
]


@pytest.mark.parametrize(("kind", "call", "error", "text"), WRONG)
def test_wrong_arguments(kind: str, call: Callable[[Any], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{text}"):
        call(layer(kind, 3, 4))


def test_wrong_arguments_of_functions() -> None:
    model = layer("LSTM", 3, 4)
    weights, state = list(model.parameters()), (STATE, STATE)
    settings = (True, 1, 0.0, False, False, False)
    with pytest.raises(TypeError, match=r"^lstm\(\) got an unexpected keyword argument 'length'"):
        functional.lstm(X, state, weights, *settings, length=3)
    with pytest.raises(TypeError, match=r"^rnn\(\) missing 6 required positional arguments: 'has_biases'"):
        functional.rnn(X, STATE, weights)
    with pytest.raises(TypeError, match=r"^norm_ih\[0\]: expected a Tensor, got float"):
        functional.lstm(X, state, weights, *settings, norm_ih=[1.0])
    with pytest.raises(RuntimeError, match=r"^num_layers: expected an integer of at least 1, got 0"):
        functional.lstm(X, state, [], True, 0, *settings[2:])
    with pytest.raises(TypeError, match=r"^input: expected a Tensor, got list"):
        functional.lstm([1.0], state, weights, *settings)


@pytest.mark.parametrize("kind", LAYERS)
def test_defaults_of_the_program_are_none_of_the_tensors(kind: str) -> None:
    model = layer(kind, 3, 4, zoneout=0.5, recurrent_dropout=0.5, layer_norm=True)
    sequences = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 3), [5, 3, 1])
    found = []
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "meta")):
        torch.manual_seed(1)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device), torch.no_grad():
                found.append(model(sequences)[0].data)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*found)
