"""Attention through ``seqkernels._C``: allocation here, tiles and online softmax there."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cells import accumulate_dtype
from .extension import extension

_C = extension()


def _last_contiguous(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not contiguous."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _rows_of_heads(x: Tensor, size: int) -> Tensor:
    batch, heads, length = x.shape[:3]
    return x.new_empty((batch, length, heads, size)).transpose(1, 2)


def _expand(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A mask or bias as a view of all scores, broadcast by strides of 0."""
    return None if x is None else x.expand(shape)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """``seqkernels::attention_forward`` in one call of the compiled module."""
    full = (*q.shape[:3], k.shape[2])
    out = _rows_of_heads(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    _C.attention_forward(
        _last_contiguous(q),
        _last_contiguous(k),
        _last_contiguous(v),
        _expand(mask, full),
        _expand(bias, full),
        scale,
        is_causal,
        out,
        lse,
        torch.get_num_threads(),
    )
    return out, lse


def attention_backward(
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
    """``seqkernels::attention_backward`` in one call of the compiled module."""
    full = (*q.shape[:3], k.shape[2])
    grad_q, grad_k, grad_v = (_rows_of_heads(x, x.shape[3]) for x in (q, k, v))
    wanted = bias is not None and bias_grad
    grad_bias = q.new_zeros(bias.shape if bias is not None and bias_grad else (0,), dtype=lse.dtype)
    _C.attention_backward(
        _last_contiguous(grad_out),
        _last_contiguous(q),
        _last_contiguous(k),
        _last_contiguous(v),
        _expand(mask, full),
        _expand(bias, full),
        lse.contiguous(),
        delta.contiguous(),
        scale,
        is_causal,
        grad_q,
        grad_k,
        grad_v,
        grad_bias if wanted else None,
        torch.get_num_threads(),
    )
    return grad_q, grad_k, grad_v, grad_bias.to(q.dtype)
