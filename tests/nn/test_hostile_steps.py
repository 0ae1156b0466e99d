"""Cells and single layers, which go straight to the compiled module, under arguments that memory does not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import seqkernels
from seqkernels import testing

CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
LAYERS = ["RNN", "LSTM", "GRU"]


def _first(result: Any) -> Tensor:
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("kind", [*CELLS, *LAYERS])
def test_tangents_are_not_lost(kind: str) -> None:
    module = getattr(seqkernels.nn, kind)(4, 5).requires_grad_(False)
    x = torch.randn((3, 4) if kind in CELLS else (2, 3, 4))
    along = torch.ones_like(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(_first(module(forward_ad.make_dual(x, along)))).tangent
    leaf = x.clone().requires_grad_()
    total = _first(module(leaf)).sum()
    (grad,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(found.sum(), (grad * along).sum())


@pytest.mark.parametrize("kind", [*CELLS, *LAYERS])
@pytest.mark.parametrize(("inputs", "hidden"), [(1, 5), (4, 1), (1, 1)])
def test_signs_are_seen(kind: str, inputs: int, hidden: int) -> None:
    """The imaginary part of a conjugate is negated by a bit of the tensor, not in memory."""
    module = getattr(seqkernels.nn, kind)(inputs, hidden)
    shape = (3,) if kind in CELLS else (1, 3)
    x = torch.randn(*shape, inputs, dtype=torch.cfloat).conj().imag
    h = torch.randn(*shape, hidden, dtype=torch.cfloat).conj().imag
    grad = torch.randn(*shape, hidden, dtype=torch.cfloat).conj().imag
    results = []
    for a, b, c in ((x, h, grad), (x.clone(), h.clone(), grad.clone())):
        out = _first(module(a, (b, b) if kind.startswith("LSTM") else b))
        results.append((out, *torch.autograd.grad(out, list(module.parameters()), c)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [*CELLS, *LAYERS])
def test_many_gradients_at_once(kind: str) -> None:
    module = getattr(seqkernels.nn, kind)(4, 5).double()
    x = torch.randn((3, 4) if kind in CELLS else (2, 3, 4), dtype=torch.float64, requires_grad=True)
    out = _first(module(x))
    grads = torch.randn(6, *out.shape, dtype=torch.float64)
    (together,) = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(out, x, grad, retain_graph=True)[0] for grad in grads]
    twin = getattr(torch.nn, kind)(4, 5)
    twin.load_state_dict(module.state_dict())
    single = x.detach().float().requires_grad_()
    result = _first(twin(single))
    baseline = [torch.autograd.grad(result, single, grad.float(), retain_graph=True)[0] for grad in grads]
    testing.assert_within_budget(together, torch.stack(alone), torch.stack(baseline))


@pytest.mark.parametrize("kind", [*CELLS, *LAYERS])
def test_gradients_without_memory_are_zero(kind: str) -> None:
    module = getattr(seqkernels.nn, kind)(4, 5)
    x = torch.randn((3, 4) if kind in CELLS else (2, 3, 4), requires_grad=True)
    out = _first(module(x))
    (found,) = torch.autograd.grad(out, x, torch._efficientzerotensor(out.shape))
    assert torch.equal(found, torch.zeros_like(x))


def test_tensors_without_memory_are_named() -> None:
    layer = seqkernels.nn.GRU(4, 5)
    x = torch.randn(2, 3, 4)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="input: expected a tensor with memory"):
        layer(x)
