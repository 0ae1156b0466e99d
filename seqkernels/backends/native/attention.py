"""Attention through ``seqkernels._C``: allocation here, tiles and online softmax there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...cells import DTYPES, accumulate_dtype
from ...scores import Scores
from .extension import _C

_empty = torch.empty
_empty_like = torch.empty_like
_empty_strided = torch.empty_strided
_threads = torch.get_num_threads
_ACCUMULATE = {dtype: accumulate_dtype(dtype) for dtype in DTYPES}


def _last_contiguous(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not contiguous."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _rows_of_heads(x: Tensor, size: int) -> Tensor:
    """An empty (B, H, L, size) like `x` (B, H, L, ...), in memory (B, L, H, size)."""
    batch, heads, length, own = x.shape
    if (length == 1 or heads == 1) and own == size and x.is_contiguous():
        return _empty_like(x)
    strides = (length * heads * size, size, heads * size, 1)
    return _empty_strided((batch, heads, length, size), strides, dtype=x.dtype, device="cpu")


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, save: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``seqkernels::attention_forward`` in one call of the compiled module; no log-sum-exp without `save`."""
    out = _rows_of_heads(q, v.shape[3])
    lse = _empty(q.shape[:3], dtype=_ACCUMULATE[q.dtype], device="cpu") if save else None
    if scores.cu_seqlens_q is not None:
        # Documents may leave rows before and behind them.
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
    try:
        _C.attention_forward(q, k, v, scores, out, lse, _threads())
    except ValueError:
        rows = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
        flat = _contiguous(scores)
        if flat is scores and all(x is y for x, y in zip(rows, (q, k, v), strict=True)):
            raise
        _C.attention_forward(*rows, flat, out, lse, _threads())
    return out, lse


def _contiguous(scores: Scores) -> Scores:
    """`scores` with what has to be contiguous so."""
    made = {
        name: x.contiguous()
        for name in ("key_lengths", "cu_seqlens_q", "cu_seqlens_k", "sink", "block_table")
        if (x := getattr(scores, name)) is not None and not x.is_contiguous()
    }
    return scores._replace(**made) if made else scores


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
    bias = scores.bias
    grad_q = _rows_of_heads(q, q.shape[3]) if needs[0] else None
    grad_k = _rows_of_heads(k, k.shape[3]) if needs[1] else None
    grad_v = _rows_of_heads(v, v.shape[3]) if needs[2] else None
    if scores.cu_seqlens_q is not None:
        # Documents may leave rows before and behind them.
        for grad in (grad_q, grad_k, grad_v):
            if grad is not None:
                grad.zero_()
    grad_bias = None
    if bias is not None and needs[3]:
        grad_bias = bias.new_zeros(bias.shape, dtype=lse.dtype)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    results = (grad_q, grad_k, grad_v, grad_bias, _threads())
    try:
        _C.attention_backward(grad_out, grad_lse, q, k, v, out, lse, scores, *results)
    except ValueError:
        rows = (grad_out, q, k, v, out)
        flat_rows = [_last_contiguous(x) for x in rows]
        flat_grad_lse, flat_lse = None if grad_lse is None else grad_lse.contiguous(), lse.contiguous()
        flat = _contiguous(scores)
        pairs = zip((*flat_rows, flat_grad_lse, flat_lse, flat), (*rows, grad_lse, lse, scores), strict=True)
        if all(x is y for x, y in pairs):
            raise
        flat_grad_out, flat_q, flat_k, flat_v, flat_out = flat_rows
        _C.attention_backward(flat_grad_out, flat_grad_lse, flat_q, flat_k, flat_v, flat_out, flat_lse, flat, *results)
    found = [q.new_empty(0) if x is None else x for x in (grad_q, grad_k, grad_v)]
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
        _threads(),
    )
    return weights
