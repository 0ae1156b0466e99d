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


def _rows_of_heads(x: Tensor, size: int) -> Tensor:
    batch, heads, length = x.shape[:3]
    return x.new_empty((batch, length, heads, size)).transpose(1, 2)


def _expand(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A mask or bias as a view of all scores, broadcast by strides of 0."""
    return None if x is None else x.expand(shape)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """``seqkernels::attention_forward`` in one call of the compiled module."""
    full = (*q.shape[:3], k.shape[2])
    out = _rows_of_heads(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    _C.attention_forward(
        _last_contiguous(q),
        _last_contiguous(k),
        _last_contiguous(v),
        _expand(scores.mask, full),
        _expand(scores.bias, full),
        scores.scale,
        scores.right == 0,
        out,
        lse,
        torch.get_num_threads(),
    )
    return out, lse


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
    full = (*q.shape[:3], k.shape[2])
    bias = scores.bias
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_q, grad_k, grad_v = (_rows_of_heads(x, x.shape[3]) for x in (q, k, v))
    wanted = bias is not None and needs[3]
    grad_bias = q.new_zeros(bias.shape if bias is not None and needs[3] else (0,), dtype=lse.dtype)
    _C.attention_backward(
        _last_contiguous(grad_out),
        _last_contiguous(q),
        _last_contiguous(k),
        _last_contiguous(v),
        _expand(scores.mask, full),
        _expand(bias, full),
        lse.contiguous(),
        delta.contiguous(),
        scores.scale,
        scores.right == 0,
        grad_q,
        grad_k,
        grad_v,
        grad_bias if wanted else None,
        torch.get_num_threads(),
    )
    found = [x if need else x.new_empty(0) for x, need in zip((grad_q, grad_k, grad_v), needs, strict=False)]
    return found[0], found[1], found[2], grad_bias.to(q.dtype)
