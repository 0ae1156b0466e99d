"""Attention of batches and of sequences behind one another, under flash-attn's names."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ops._eager import readable
from ..ops.attention_check import check
from ..ops.weights import weights
from ..scores import Scores
from .arguments import build_scores, check_heads, check_int32, integer, run

#: ``out``, or with `return_attn_probs` ``out``, ``softmax_lse`` and ``S_dmask``.
Attended = Tensor | tuple[Tensor, Tensor, Tensor]

_BATCHED = "(batch_size, seqlen, nheads, headdim)"
_PACKED = "(total, nheads, headdim)"
_PAGED = "(num_blocks, page_block_size, nheads_k, headdim)"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """Attention of batches, ``flash_attn.flash_attn_func``; what differs is in the docstring of `seqkernels._flash`.

    Query i stands at key ``i + seqlen_k - seqlen_q``: the last query at the last key. For 2 queries and 5 keys, and
    for 5 queries and 2 keys, `causal` keeps ::

        1 1 1 1 0        0 0
        1 1 1 1 1        0 0
                         0 0
                         1 0
                         1 1

    Args:
        q: (batch_size, seqlen_q, nheads, headdim), float32, float64, bfloat16 or float16.
        k: (batch_size, seqlen_k, nheads_k, headdim), of the same dtype.
        v: (batch_size, seqlen_k, nheads_k, headdim_v).
        dropout_p: probability to drop a weight, whenever it is positive: give 0 in evaluation. The seed is drawn from
            torch's default generator of the CPU.
        softmax_scale: factor on ``q k^T``; 1/sqrt(headdim) by default.
        causal: a query reads no key behind its own.
        window_size: (left, right), how many keys before and behind its own a query reads; -1 for all. `causal` makes
            the right side 0.
        softcap: scores s become ``softcap tanh(s / softcap)``, before ALiBi; 0 or less for none.
        alibi_slopes: (nheads,) or (batch_size, nheads) float32: ``-slope |i + seqlen_k - seqlen_q - j|`` is added to
            the score of query i and key j (Press et al., 2022). Has no gradient.
        deterministic: accepted; all results are.
        return_attn_probs: return `softmax_lse` and `S_dmask` too.

    Returns:
        ``out`` (batch_size, seqlen_q, nheads, headdim_v), contiguous, of the dtype of `q`. With `return_attn_probs`
        also ``softmax_lse`` (batch_size, nheads, seqlen_q) in float32 (float64 for float64), the log-sum-exp of each
        row of scores; and ``S_dmask``, meant for tests: with dropout (batch_size, nheads, seqlen_q, seqlen_k) of the
        dtype of `q`, the softmax without a gradient, negative where a weight was dropped; without dropout empty.
        flash-attn rounds both lengths up to multiples of 128.

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed.
    """
    check_heads(q, k, v, _BATCHED, _BATCHED)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected batch_size {q.shape[0]} as q, got shape {tuple(k.shape)}")
    scores = build_scores(
        q, q.shape[1], k.shape[1], softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p
    )
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    check(q, k, v, scores)
    out, lse = run(q, k, v, scores)
    out = out.transpose(1, 2)
    return (out, lse, _signed_weights(q, k, lse, scores)) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Attended:
    """Attention of sequences of any lengths that lie behind one another: ``flash_attn.flash_attn_varlen_func``.

    Args:
        q: (total_q, nheads, headdim).
        k: (total_k, nheads_k, headdim); with `block_table` (num_blocks, page_block_size, nheads_k, headdim).
        v: likewise with headdim_v.
        cu_seqlens_q: (batch_size + 1,) int32, where each sequence begins among the rows of `q`, and where the last one
            ends.
        cu_seqlens_k: likewise of `k` and `v`; with `block_table` only the lengths between its elements count.
        max_seqlen_q: the length of the longest sequence of queries, or more.
        max_seqlen_k: likewise of keys.
        dropout_p: this and the following as in `flash_attn_func`, with the lengths of each sequence.
        softmax_scale: likewise.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.
        alibi_slopes: likewise.
        deterministic: likewise.
        return_attn_probs: likewise.
        block_table: (batch_size, max_num_blocks_per_seq) int32, the pages with the keys and values of each sequence,
            in order; pages behind its length are not read. Pages of any size; there are no gradients then. With
            dropout and `return_attn_probs` the keys are gathered for `S_dmask`.

    Returns:
        ``out`` (total_q, nheads, headdim_v), contiguous; rows of `q` that belong to no sequence are 0. With
        `return_attn_probs` also ``softmax_lse`` (nheads, total_q) and ``S_dmask``, see `flash_attn_func`, with dropout
        (batch_size, nheads, max_seqlen_q, max_seqlen_k).

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed. With `block_table` an
            input that requires a gradient is refused while gradients are recorded.
    """
    check_heads(q, k, v, _PACKED, _PACKED if block_table is None else _PAGED)
    batch = _check_documents(cu_seqlens_q, cu_seqlens_k, q)
    max_seqlen_q, max_seqlen_k = _length("max_seqlen_q", max_seqlen_q), _length("max_seqlen_k", max_seqlen_k)
    _check_lengths("q", cu_seqlens_q, max_seqlen_q, q.shape[0])
    _check_lengths("k", cu_seqlens_k, max_seqlen_k, k.shape[0] if block_table is None else None)
    if block_table is not None:
        check_int32("block_table", block_table, f"({batch}, max_num_blocks_per_seq)", (batch, None), q)
        if k.shape[1] == 0:
            raise ValueError(f"k: expected pages of at least one key, got {tuple(k.shape)}")
    scores = build_scores(
        q, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p
    )._replace(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        block_table=block_table,
    )
    q = q.transpose(0, 1).unsqueeze(0)
    k, v = (x.transpose(0, 1).unsqueeze(0) if block_table is None else x.transpose(1, 2) for x in (k, v))
    check(q, k, v, scores)
    out, lse = run(q, k, v, scores)
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0), _signed_weights(q, k, lse, scores)) if return_attn_probs else out


def _unpack(name: str, x: Any, layout: str, parts: int) -> tuple[Tensor, ...]:
    """The queries, keys and values that `x` holds in the dimension before the heads."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dim() != layout.count(",") + 1 or x.shape[-3] != parts:
        raise ValueError(f"{name}: expected {layout}, got shape {tuple(x.shape)}")
    return x.unbind(-3)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """`flash_attn_func` of queries, keys and values in one tensor: ``flash_attn.flash_attn_qkvpacked_func``.

    Args:
        qkv: (batch_size, seqlen, 3, nheads, headdim); nothing is copied.
        dropout_p: this and the following as in `flash_attn_func`.
        softmax_scale: likewise.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.
        alibi_slopes: likewise.
        deterministic: likewise.
        return_attn_probs: likewise.

    Returns:
        As `flash_attn_func`; raises the same.
    """
    q, k, v = _unpack("qkv", qkv, "(batch_size, seqlen, 3, nheads, headdim)", 3)
    rest = (softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, dropout_p, *rest)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """`flash_attn_func` of keys and values in one tensor: ``flash_attn.flash_attn_kvpacked_func``.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim).
        kv: (batch_size, seqlen_k, 2, nheads_k, headdim); nothing is copied.
        dropout_p: this and the following as in `flash_attn_func`.
        softmax_scale: likewise.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.
        alibi_slopes: likewise.
        deterministic: likewise.
        return_attn_probs: likewise.

    Returns:
        As `flash_attn_func`; raises the same.
    """
    k, v = _unpack("kv", kv, "(batch_size, seqlen, 2, nheads_k, headdim)", 2)
    rest = (softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, dropout_p, *rest)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """`flash_attn_varlen_func` of one tensor: ``flash_attn.flash_attn_varlen_qkvpacked_func``.

    Args:
        qkv: (total, 3, nheads, headdim); nothing is copied.
        cu_seqlens: (batch_size + 1,) int32, of queries and keys, see `flash_attn_varlen_func`.
        max_seqlen: the length of the longest sequence, or more.
        dropout_p: this and the following as in `flash_attn_func`.
        softmax_scale: likewise.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.
        alibi_slopes: likewise.
        deterministic: likewise.
        return_attn_probs: likewise.

    Returns:
        As `flash_attn_varlen_func`; raises the same.
    """
    q, k, v = _unpack("qkv", qkv, "(total, 3, nheads, headdim)", 3)
    rest = (softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, *rest)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """`flash_attn_varlen_func` of keys and values in one tensor: ``flash_attn.flash_attn_varlen_kvpacked_func``.

    Args:
        q: (total_q, nheads, headdim).
        kv: (total_k, 2, nheads_k, headdim); nothing is copied.
        cu_seqlens_q: as in `flash_attn_varlen_func`.
        cu_seqlens_k: likewise.
        max_seqlen_q: likewise.
        max_seqlen_k: likewise.
        dropout_p: this and the following as in `flash_attn_func`.
        softmax_scale: likewise.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.
        alibi_slopes: likewise.
        deterministic: likewise.
        return_attn_probs: likewise.

    Returns:
        As `flash_attn_varlen_func`; raises the same.
    """
    k, v = _unpack("kv", kv, "(total, 2, nheads_k, headdim)", 2)
    rest = (softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, *rest)


def _signed_weights(q: Tensor, k: Tensor, lse: Tensor, scores: Scores) -> Tensor:
    """The weights before dropout, those that it dropped negative; empty without dropout."""
    if scores.dropout_p == 0.0:
        return q.new_empty(0)
    with torch.no_grad():
        kept = weights(q, k, lse, scores)
        every = weights(q, k, lse, scores._replace(dropout_p=0.0, seed=None))
        return torch.where(kept == 0, -every, every).to(q.dtype)


def _check_documents(cu_seqlens_q: Any, cu_seqlens_k: Any, q: Tensor) -> int:
    """The number of sequences."""
    check_int32("cu_seqlens_q", cu_seqlens_q, "(batch_size + 1,)", (None,), q)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q: expected (batch_size + 1,), got shape (0,)")
    check_int32("cu_seqlens_k", cu_seqlens_k, f"{tuple(cu_seqlens_q.shape)} as cu_seqlens_q", cu_seqlens_q.shape, q)
    return cu_seqlens_q.shape[0] - 1


def _check_lengths(which: str, cu_seqlens: Tensor, longest: int, total: int | None) -> None:
    """Raise if the values, where they can be read, reach behind `total` or contain a sequence over `longest`."""
    if not readable(cu_seqlens):
        return
    places = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(places)]
    if places[0] < 0 or min(lengths, default=0) < 0 or (total is not None and places[-1] > total):
        most = "" if total is None else f", to at most {total}, the rows of {which}"
        raise ValueError(f"cu_seqlens_{which}: expected to ascend from 0 or more{most}, got {cu_seqlens}")
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"max_seqlen_{which}: expected at least {max(lengths)}, the longest of cu_seqlens_{which}, got {longest}"
        )


def _length(name: str, x: Any) -> int:
    length = integer(name, x)
    if length < 0:
        raise ValueError(f"{name}: expected at least 0, got {length}")
    return length
