"""Attention through ``seqkernels._C``: allocation here, tiles and online softmax there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...cells import accumulate_dtype
from ...scores import Scores
from .extension import extension

_C = extension()


def _last_contiguous(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not contiguous."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _rows_of_heads(x: Tensor, size: int, clear: bool) -> Tensor:
    """(B, H, L, size) in memory as (B, L, H, size); zero where documents may leave rows between them."""
    batch, heads, length = x.shape[:3]
    shape = (batch, length, heads, size)
    return (x.new_zeros(shape) if clear else x.new_empty(shape)).transpose(1, 2)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """``seqkernels::attention_forward`` in one call of the compiled module."""
    documents = scores.cu_seqlens_q is not None
    out = _rows_of_heads(q, v.shape[3], documents)
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    if documents:
        lse.fill_(-torch.inf)
    _C.attention_forward(
        _last_contiguous(q),
        _last_contiguous(k),
        _last_contiguous(v),
        _contiguous(scores),
        out,
        lse,
        torch.get_num_threads(),
    )
    return out, lse


def _contiguous(scores: Scores) -> Scores:
    """`scores` with what is one-dimensional contiguous."""
    if scores.key_lengths is None and scores.cu_seqlens_q is None and scores.sink is None:
        return scores
    made = {
        name: x.contiguous()
        for name in ("key_lengths", "cu_seqlens_q", "cu_seqlens_k", "sink")
        if (x := getattr(scores, name)) is not None
    }
    return scores._replace(**made)


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scores: Scores,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``seqkernels::attention_backward`` in one call of the compiled module."""
    bias, documents = scores.bias, scores.cu_seqlens_q is not None
    grads = [
        _rows_of_heads(x, x.shape[3], documents) if need else None for x, need in zip((q, k, v), needs, strict=False)
    ]
    grad_bias = None
    if bias is not None and needs[3]:
        grad_bias = bias.new_zeros(bias.shape, dtype=lse.dtype)
    _C.attention_backward(
        _last_contiguous(torch.zeros_like(out) if grad_out is None else grad_out),
        None if grad_lse is None else grad_lse.contiguous(),
        _last_contiguous(q),
        _last_contiguous(k),
        _last_contiguous(v),
        _last_contiguous(out),
        lse.contiguous(),
        _contiguous(scores),
        *grads,
        grad_bias,
        torch.get_num_threads(),
    )
    found = [q.new_empty(0) if x is None else x for x in grads]
    if bias is None or grad_bias is None:
        return found[0], found[1], found[2], q.new_empty(0)
    return found[0], found[1], found[2], grad_bias.to(bias.dtype)


def attention_weights(q: Tensor, k: Tensor, lse: Tensor, scores: Scores, average: bool) -> Tensor:
    """``seqkernels::attention_weights`` in one call of the compiled module."""
    batch, heads, queries, keys = scores.shape(q, k)
    weights = lse.new_empty((batch, queries, keys) if average else (batch, heads, queries, keys))
    _C.attention_weights(
        _last_contiguous(q),
        _last_contiguous(k),
        lse.contiguous(),
        _contiguous(scores),
        weights,
        torch.get_num_threads(),
    )
    return weights
