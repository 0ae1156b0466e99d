"""``torch.func`` over layers: ensembles, gradients of each sample, forward mode, against a loop over torch's layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import seqkernels
from seqkernels.models import BERT, BERTConfig

from ..twins import leaves


class Attend(nn.MultiheadAttention):
    """Self-attention as a function of one tensor."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)


class OurAttend(seqkernels.nn.MultiheadAttention):
    """Likewise."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)


class Decode(nn.Module):
    """A decoder layer that reads its own input."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layer = layers.TransformerDecoderLayer(4, 2, 8, dropout=0.0)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, x)


def encoder(layers: Any) -> nn.Module:
    return layers.TransformerEncoderLayer(4, 2, 8, dropout=0.0)


MODULES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "rnn": (lambda layers: layers.RNN(4, 3, nonlinearity="relu"), (3, 2, 4)),
    "gru": (lambda layers: layers.GRU(4, 3, bidirectional=True, bias=False), (3, 2, 4)),
    "lstm": (lambda layers: layers.LSTM(4, 3, 2, proj_size=2), (3, 2, 4)),
    "rnn cell": (lambda layers: layers.RNNCell(4, 3), (2, 4)),
    "gru cell": (lambda layers: layers.GRUCell(4, 3), (2, 4)),
    "lstm cell": (lambda layers: layers.LSTMCell(4, 3), (2, 4)),
    "attention": (lambda layers: (Attend if layers is nn else OurAttend)(4, 2), (3, 2, 4)),
    "encoder": (encoder, (3, 2, 4)),
    "decoder": (Decode, (3, 2, 4)),
}


@pytest.fixture(params=MODULES)
def case(request: pytest.FixtureRequest) -> tuple[list[nn.Module], list[nn.Module], Tensor]:
    """Three modules of torch with other weights, their twins, and inputs of each, in float64."""
    torch.manual_seed(0)
    make, shape = MODULES[request.param]
    theirs = [make(nn).double() for _ in range(3)]
    ours = [make(seqkernels.nn).double() for _ in range(3)]
    for one, twin in zip(ours, theirs, strict=True):
        one.load_state_dict(twin.state_dict())
    return ours, theirs, torch.randn(3, *shape, dtype=torch.float64)


def call(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    return leaves(functional_call(module, weights, (x,)))


def loss(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return sum((part.square().sum() for part in call(module, weights, x)), x.new_zeros(()))


def stacked(results: list[Any]) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*map(leaves, results), strict=True)]


def test_many_inputs(case: Any) -> None:
    ours, theirs, xs = case
    weights = dict(ours[0].named_parameters())
    torch.testing.assert_close(vmap(lambda x: call(ours[0], weights, x))(xs), stacked([theirs[0](x) for x in xs]))


def test_an_ensemble(case: Any) -> None:
    ours, theirs, xs = case
    weights, _ = stack_module_state(ours)
    expected = stacked([module(x) for module, x in zip(theirs, xs, strict=True)])
    torch.testing.assert_close(vmap(lambda own, x: call(ours[0], own, x))(weights, xs), expected)


def test_gradients_of_each_sample(case: Any) -> None:
    ours, theirs, xs = case
    weights = {name: weight.detach() for name, weight in ours[0].named_parameters()}
    found = vmap(grad(lambda own, x: loss(ours[0], own, x)), (None, 0))(weights, xs)
    own = list(theirs[0].parameters())
    names = [name for name, _ in theirs[0].named_parameters()]
    one_by_one = [torch.autograd.grad(loss(theirs[0], dict(zip(names, own, strict=True)), x), own) for x in xs]
    torch.testing.assert_close(leaves(found), stacked(one_by_one))


def test_forward_mode(case: Any) -> None:
    """Along weights and input at once: the product of the gradient and the direction."""
    ours, theirs, xs = case
    module, x = copy.deepcopy(theirs[0]), xs[0].clone().requires_grad_()
    weights = {name: weight.detach() for name, weight in ours[0].named_parameters()}
    along = {name: torch.randn_like(weight) for name, weight in weights.items()}
    value, tangent = jvp(lambda own, x: loss(ours[0], own, x), (weights, xs[0]), (along, xs[1]))
    expected = loss(module, dict(module.named_parameters()), x)
    grads = torch.autograd.grad(expected, [*module.parameters(), x])
    product = sum((a * b).sum() for a, b in zip(grads, [*along.values(), xs[1]], strict=True))
    torch.testing.assert_close((value, tangent), (expected.detach(), product))


def test_second_order(case: Any) -> None:
    ours, _, xs = case
    names, weights = zip(*ours[0].named_parameters(), strict=True)
    inputs = (xs[0].requires_grad_(), *weights)
    assert torch.autograd.gradgradcheck(
        lambda x, *own: loss(ours[0], dict(zip(names, own, strict=True)), x), inputs, fast_mode=True
    )


class Noted(TorchDispatchMode):
    """The operations that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "MultiheadAttention"])
def test_first_order_stays_fused(kind: str) -> None:
    """One operation forward and one backward, as many others whatever the length, though there is a second order."""
    layer = getattr(seqkernels.nn, kind)(4, 2)
    op = "attention" if kind == "MultiheadAttention" else "recurrence"
    counts = []
    for steps in (3, 40):
        x = torch.randn(steps, 2, 4, requires_grad=True)
        given = (x, x, x, None, False) if op == "attention" else (x,)
        with Noted() as noted:
            torch.autograd.grad(layer(*given)[0].square().sum(), [x, *layer.parameters()])
        ours = [name for name in noted.names if name.startswith("seqkernels::")]
        assert ours == [f"seqkernels::{op}_forward", f"seqkernels::{op}_backward"]
        counts.append(len(noted.names))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["AdditiveAttention", "BilinearAttention"])
def test_alignment(kind: str) -> None:
    torch.manual_seed(0)
    layer = getattr(seqkernels.nn, kind)(4, 3, *([5] if kind == "AdditiveAttention" else [])).double()
    names, weights = zip(*layer.named_parameters(), strict=True)
    query, key = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 6, 3, dtype=torch.float64)

    def value(own: tuple[Tensor, ...], query: Tensor, key: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, own, strict=True)), (query, key)).square().sum()

    frozen = tuple(weight.detach() for weight in weights)
    found = vmap(grad(value), (None, 0, 0))(frozen, query, key)
    one_by_one = [torch.autograd.grad(value(weights, *pair), weights) for pair in zip(query, key, strict=True)]
    torch.testing.assert_close(list(found), stacked(one_by_one))
    along = tuple(map(torch.ones_like, frozen))
    _, tangent = jvp(lambda *own: value(own, query, key), frozen, along)
    torch.testing.assert_close(tangent, sum((part.sum() for grads in one_by_one for part in grads), torch.zeros(())))
    inputs = (*weights, query.requires_grad_(), key.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda *x: value(x[:-2], *x[-2:]), inputs, fast_mode=True)


def test_lengths_of_each_sample() -> None:
    """Lengths that are mapped too, and looked at all the same."""
    torch.manual_seed(0)
    lstm = seqkernels.nn.LSTM(4, 3, 2, bidirectional=True)
    xs, lengths = torch.randn(3, 5, 2, 4), torch.tensor([[5, 2], [0, 1], [3, 3]])
    found = vmap(lambda x, own: lstm(x, lengths=own)[0])(xs, lengths)
    torch.testing.assert_close(
        found, torch.stack([lstm(x, lengths=own)[0] for x, own in zip(xs, lengths, strict=True)])
    )
    said = r"lengths: expected values from 0 to T, .* got \[\[6, 3\], \[1, 2\], \[4, 4\]\]"
    with pytest.raises(RuntimeError, match=said):
        vmap(lambda x, own: lstm(x, lengths=own)[0])(xs, lengths + 1)
    q = torch.randn(3, 2, 2, 5, 4)
    attention = seqkernels.functional.attention
    found = vmap(lambda q, own: attention(q, q, q, key_lengths=own))(q, lengths)
    torch.testing.assert_close(
        found, torch.stack([attention(x, x, x, key_lengths=own) for x, own in zip(q, lengths, strict=True)])
    )


def test_gradients_of_each_text() -> None:
    """Of a model whose lengths are mapped."""
    torch.manual_seed(0)
    model = BERT(BERTConfig(11, context=6, embed_size=4, num_layers=1, num_heads=2, dropout=0.0)).double()
    names, weights = zip(*model.named_parameters(), strict=True)
    tokens, lengths = torch.randint(5, 11, (3, 6)), torch.tensor([6, 1, 4])

    def value(own: tuple[Tensor, ...], tokens: Tensor, length: Tensor) -> Tensor:
        given = (tokens.unsqueeze(0), length.unsqueeze(0))
        return functional_call(model, dict(zip(names, own, strict=True)), given).square().mean()

    found = vmap(grad(value), (None, 0, 0))(tuple(weight.detach() for weight in weights), tokens, lengths)
    one_by_one = [
        torch.autograd.grad(value(weights, *pair), weights, allow_unused=True, materialize_grads=True)
        for pair in zip(tokens, lengths, strict=True)
    ]
    torch.testing.assert_close(list(found), stacked(one_by_one))
