"""Attention without the dispatcher between: the same results, and everything else goes the long way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels import testing
from seqkernels.backends import native
from seqkernels.cells import DTYPES
from seqkernels.functional import scaled_dot_product_attention
from seqkernels.ops import attention as ops
from seqkernels.scores import Scores

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


def _inputs(dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    return testing.attention_inputs(2, 4, 5, 7, 8, dtype, value_size=6, kv_heads=2, **more)[:3]


def _plainly(q: Tensor, k: Tensor, v: Tensor, grouped: bool = True) -> Tensor | None:
    return ops.attend_plainly(q, k, v, None, True, grouped)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", testing.LAYOUTS[:-2])
def test_same_bits(dtype: torch.dtype, layout: str) -> None:
    inputs = _inputs(dtype, layout=layout, requires_grad=False)
    scores = Scores(8**-0.5, right=0)
    out, lse = ops.forward_op(*inputs, *scores.pack())
    found = _plainly(*inputs)
    assert found is not None
    assert torch.equal(found, out)
    assert found.stride() == out.stride()
    for x, y in zip(ops.attend(*inputs, scores), (out, lse), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_gradients(dtype: torch.dtype) -> None:
    inputs = _inputs(dtype)
    grad = torch.randn(2, 4, 5, 6).to(dtype)
    packed = Scores(8**-0.5, right=0).pack()
    with torch.no_grad():
        out, lse = ops.forward_op(*inputs, *packed)
        expected = ops.backward_op([grad, None], *inputs, out, lse, *packed, [True, True, True, False])
    for cotangent in (grad, grad.transpose(1, 2).contiguous().transpose(1, 2), torch._neg_view(-grad)):
        found = _plainly(*inputs)
        assert found is not None
        for x, y in zip(torch.autograd.grad(found, inputs, cotangent), expected, strict=False):
            assert torch.equal(x, y)


def test_one_gradient_alone() -> None:
    for place in range(3):
        inputs = [x.detach().requires_grad_(k == place) for k, x in enumerate(_inputs())]
        found = _plainly(*inputs)
        assert found is not None
        (grad,) = torch.autograd.grad(found.sum(), inputs[place])
        whole = [x.detach().requires_grad_() for x in inputs]
        found = _plainly(*whole)
        assert found is not None
        assert torch.equal(grad, torch.autograd.grad(found.sum(), whole)[place])


def test_second_order_and_many_at_once() -> None:
    inputs = _inputs(torch.float64)

    def run(*tensors: Tensor) -> Tensor:
        found = _plainly(*tensors)
        assert found is not None
        return found

    assert torch.autograd.gradcheck(run, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_saved_tensors_are_guarded() -> None:
    q, k, v = _inputs()
    found = _plainly(q, k, v)
    assert found is not None
    with torch.no_grad():
        k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_the_way_back_may_be_another() -> None:
    inputs = _inputs(torch.float64)
    found = _plainly(*inputs)
    assert found is not None
    with seqkernels.use_backend("reference"):
        grads = torch.autograd.grad(found.sum(), inputs)
    with seqkernels.use_backend("native"):
        found = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        testing.assert_within_budget(torch.autograd.grad(found.sum(), inputs)[1], grads[1], [grads[1].float()])


@pytest.mark.parametrize("name", ["bias", "sink", "alibi_slopes"])
def test_negated_views_are_what_they_look_like(name: str) -> None:
    q, k, v = _inputs()
    value = torch.randn((1, 4, 1, 7) if name == "bias" else (4,))
    plain, negated = (ops.attention(q, k, v, **{name: x}) for x in (value, torch._neg_view(-value)))
    for x, y in zip(plain, negated, strict=True):
        assert torch.equal(x, y)


class _Own(Tensor):
    pass


def test_declines_what_is_not_for_it() -> None:
    q, k, v = _inputs(requires_grad=False)
    assert _plainly(q, k, v) is not None
    assert _plainly(q, k, v, grouped=False) is None
    assert _plainly(q[0], k, v) is None
    assert _plainly(q, k, v[:, :, :3]) is None
    assert _plainly(q, k.double(), v) is None
    assert _plainly(q, k, v.to("meta")) is None
    assert _plainly(q.as_subclass(_Own), k, v) is None
    assert _plainly(q[..., :1], k[..., :1], v) is None
    assert _plainly(*(torch.randn(1, 1, 2, 513) for _ in range(3))) is None
    assert _plainly(q.int(), k.int(), v.int()) is None
    with seqkernels.use_backend("native"):
        assert _plainly(q, k, v) is not None
    with seqkernels.use_backend("reference"):
        assert _plainly(q, k, v) is None
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert _plainly(q, k, v) is None


def test_transforms_and_autocast_go_the_long_way() -> None:
    q, k, v = (x.detach() for x in _inputs())
    expected = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_dot_product_attention(q, k, v, enable_gqa=True).dtype == torch.bfloat16
    found = torch.compile(scaled_dot_product_attention, backend="aot_eager", fullgraph=True)(q, k, v, enable_gqa=True)
    assert torch.equal(found, expected)


def test_explain_sees_it() -> None:
    q, k, v = _inputs()
    entries = seqkernels.explain(scaled_dot_product_attention, q, k, v, enable_gqa=True).entries
    assert [entry.chosen for entry in entries if not isinstance(entry, str)] == ["native"]
