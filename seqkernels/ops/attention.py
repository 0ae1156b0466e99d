"""The attention contract.

``out = softmax(scale q k^T + bias) v`` over the keys that the mask and causality allow, together with the
log-sum-exp of each row's scores. Tiled implementations never store the (M, N) matrix. The mathematics is in
``docs/attention.md``.

B batch, Hq query heads, Hk key/value heads (Hq a multiple of Hk), M queries, N keys, D head size, Dv value size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..cells import DTYPES, accumulate_dtype

_library = torch.library.Library("seqkernels", "FRAGMENT")
_library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, float scale, bool is_causal)"
    " -> (Tensor out, Tensor lse)"
)
_library.define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor lse,"
    " Tensor delta, float scale, bool is_causal, bool bias_grad)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)"
)


def _call(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, is_causal: bool) -> backends.Call:
    features = []
    if bias is not None:
        features.append("bias")
    if is_causal:
        features.append("causal")
    if q.shape[1] != k.shape[1]:
        features.append("grouped")
    if mask is not None:
        features.append("mask")
    return backends.Call("attention", q.device.type, q.dtype, "", tuple(features))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    module = backends.implementation(_call(q, k, mask, bias, is_causal))
    return module.attention_forward(q, k, v, mask, bias, scale, is_causal)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    is_causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = backends.implementation(_call(q, k, mask, bias, is_causal))
    return module.attention_backward(grad_out, q, k, v, mask, bias, lse, delta, scale, is_causal, bias_grad)


def rows_of_heads(x: Tensor, size: int) -> Tensor:
    """An empty (B, H, L, size) tensor like `x` (B, H, L, ...) that lies in memory as (B, L, H, size)."""
    batch, heads, length = x.shape[:3]
    return x.new_empty((batch, length, heads, size)).transpose(1, 2)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    return rows_of_heads(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    is_causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        rows_of_heads(q, q.shape[3]),
        rows_of_heads(k, k.shape[3]),
        rows_of_heads(v, v.shape[3]),
        q.new_empty(bias.shape if bias is not None and bias_grad else (0,)),
    )


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("seqkernels::attention_forward", _forward_fake, lib=_library)
torch.library.register_fake("seqkernels::attention_backward", _backward_fake, lib=_library)

forward_op = torch.ops.seqkernels.attention_forward.default
backward_op = torch.ops.seqkernels.attention_backward.default


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scale: float,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward_op(q, k, v, mask, bias, scale, is_causal)
        ctx.save_for_backward(q, k, v, mask, bias, out, lse)
        ctx.scale, ctx.is_causal = scale, is_causal
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, mask, bias, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad_q, grad_k, grad_v, grad_bias = _differentiable_backward(ctx, grad_out, grad_lse)
            return grad_q, grad_k, grad_v, None, grad_bias, None, None
        bias_grad = ctx.needs_input_grad[4]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
            delta = torch.zeros_like(lse)
        else:
            delta = (grad_out.to(lse.dtype) * out).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse
        grad_q, grad_k, grad_v, grad_bias = backward_op(
            grad_out, q, k, v, mask, bias, lse, delta, ctx.scale, ctx.is_causal, bias_grad
        )
        return grad_q, grad_k, grad_v, None, grad_bias if bias_grad else None, None, None


def _differentiable_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients as a graph, for the second order: the dense reference, recomputed from the saved inputs."""
    from ..backends.reference.attention import attention as reference

    q, k, v, mask, bias, _, _ = ctx.saved_tensors
    inputs = (q, k, v, bias)
    needs = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[4])
    with torch.enable_grad():
        outputs = reference(q, k, v, mask, bias, ctx.scale, ctx.is_causal)
        pairs = [(out, grad) for out, grad in zip(outputs, (grad_out, grad_lse), strict=True) if grad is not None]
        wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=True, allow_unused=True
            )
        )
    return tuple(next(found) if needed else None for needed in needs)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    """Raise the error that names the argument which breaks the contract of `attention`."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (batch, heads, length, size), got {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected one of {DTYPES}, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} as q, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected on {q.device} as q, got {tensor.device}")
    batch, heads, queries, size = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if k.shape[0] != batch or k.shape[3] != size or kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"k: expected shape ({batch}, Hk, N, {size}) with Hk a divisor of {heads} to match q"
            f" {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected shape {(*k.shape[:3], 'Dv')} to match k, got {tuple(v.shape)}")
    if not 1 <= size <= 512 or not 1 <= v.shape[3] <= 512:
        raise ValueError(f"q, v: head sizes from 1 to 512 are allowed, got {size} and {v.shape[3]}")
    full = (batch, heads, queries, keys)
    extras: tuple[tuple[str, Tensor | None, torch.dtype], ...] = (("mask", mask, torch.bool), ("bias", bias, q.dtype))
    for name, extra, dtype in extras:
        if extra is None:
            continue
        if not isinstance(extra, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(extra).__name__}")
        if extra.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {extra.dtype}")
        if extra.device != q.device:
            raise ValueError(f"{name}: expected on {q.device} as q, got {extra.device}")
        if extra.dim() != 4 or any(have != 1 and have != want for have, want in zip(extra.shape, full, strict=True)):
            raise ValueError(f"{name}: expected 4 dimensions, each 1 or as in {full}, got {tuple(extra.shape)}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention with its log-sum-exp.

    Args:
        q: (B, Hq, M, D), float32, float64, bfloat16 or float16, D from 1 to 512; any strides.
        k: (B, Hk, N, D), Hq a multiple of Hk: query head h reads key head ``h // (Hq // Hk)``.
        v: (B, Hk, N, Dv).
        mask: bool, four dimensions, each 1 or as in (B, Hq, M, N); ``True`` keeps a key.
        bias: like `mask` but of the dtype of `q`; added to the scaled scores; has a gradient.
        scale: factor on ``q k^T``; 1/sqrt(D) by default.
        is_causal: query i sees keys 0..i (aligned top-left, as in torch).

    Returns:
        ``out`` (B, Hq, M, Dv), laid out in memory as (B, M, Hq, Dv), and ``lse`` (B, Hq, M) in float32 (float64
        for float64 inputs). A row whose keys are all masked gives 0 and -inf and zero gradients; NaN in masked
        keys and values has no influence.

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed.
    """
    check(q, k, v, mask, bias)
    if scale is None:
        scale = q.shape[3] ** -0.5
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    ):
        if torch.compiler.is_compiling():
            # Dynamo takes no tensor twice as an argument of a Function.
            k, v = k.view_as(k), v.view_as(v)
        return _Attention.apply(q, k, v, mask, bias, scale, is_causal)
    return forward_op(q, k, v, mask, bias, scale, is_causal)
