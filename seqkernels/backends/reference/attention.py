"""Attention in plain PyTorch, with the whole (M, N) matrix in memory.

`attention` is differentiable by autograd and serves as the oracle; `attention_backward` is the same mathematics by
hand (``docs/attention.md``), as the op needs it, and is tested against autograd. Documents behind one another
(`Scores.cu_seqlens_q`) are padded to the longest one first, pages (`Scores.block_table`) gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...cells import accumulate_dtype
from ...scores import UNBOUNDED, Scores, dropout_threshold
from .philox import words

#: Keys whose weights are dropped by the words of the same 16 counters.
DROPOUT_BLOCK = 64


def dropped(seed: Tensor, shape: Sequence[int], dropout_p: float, head: int | None = None) -> Tensor:
    """Which weights of attention the dropout takes: a function of the seed and of the place of a weight alone.

    Weight (b, h, i, j) has row ``r = (b Hq + h) M + i``; its random word is word ``(j % 64) // 16`` of Philox4x32-10
    at counter ``(r ceil(N / 64) + j // 64) 16 + j % 16`` with the seed as key, and it is dropped if the word is less
    than ``dropout_p 2^32``.

    Args:
        seed: () int64.
        shape: (B, Hq, M, N).
        dropout_p: probability to drop a weight.
        head: the only one of the Hq heads that is wanted; all of them by default.

    Returns:
        (B, Hq, M, N) bool, or of one head (B, 1, M, N).
    """
    batch, heads, queries, keys = shape
    blocks, counters = -(-keys // DROPOUT_BLOCK), DROPOUT_BLOCK // 4
    rows = torch.arange(batch * heads * queries, device=seed.device).view(batch, heads, queries, 1, 1, 1)
    rows = rows if head is None else rows[:, head : head + 1]
    counter = rows * (blocks * counters) + torch.arange(blocks * counters, device=seed.device).view(blocks, 1, counters)
    found = torch.cat(words(seed, counter), 4).view(*rows.shape[:3], blocks * DROPOUT_BLOCK)
    return found[..., :keys] < dropout_threshold(dropout_p)


def drop(x: Tensor, gone: Tensor | None, dropout_p: float) -> Tensor:
    """Weights, or their gradient, after dropout of those that are `gone`; without dropout as they are."""
    return x if gone is None else torch.where(gone, 0, x / max(1.0 - dropout_p, 2.0**-60))


def _heads(x: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated so that each query head has its own."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _ungroup(grad: Tensor, x: Tensor) -> Tensor:
    """Gradients of repeated heads summed over each group."""
    return grad if grad.shape[1] == x.shape[1] else grad.unflatten(1, (x.shape[1], -1)).sum(2)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)


def _lengths(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens[1:] - cu_seqlens[:-1]


def _places(cu_seqlens: Tensor, longest: int, total: int) -> tuple[Tensor, Tensor]:
    """Where position (b, i) of the padded documents lies among all of them, and whether it is one."""
    step = torch.arange(longest, device=cu_seqlens.device)
    real = step < _lengths(cu_seqlens).unsqueeze(1)
    return (cu_seqlens[:-1].unsqueeze(1) + step).clamp(max=max(total - 1, 0)), real


def pad(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Documents (1, H, total, ...) behind one another as (B, H, longest, ...), with zeros behind each."""
    places, real = _places(cu_seqlens, longest, x.shape[2])
    if x.shape[2] == 0:
        return x.new_zeros((places.shape[0], x.shape[1], longest, *x.shape[3:]))
    padded = x[0][:, places].transpose(0, 1)
    return torch.where(real.view(real.shape[0], 1, longest, *[1] * (x.dim() - 3)), padded, 0)


def unpad(x: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """The inverse of `pad`; rows that belong to no document are 0."""
    places, real = _places(cu_seqlens, x.shape[2], total)
    rows = x.transpose(1, 2)[real]
    return x.new_zeros((total, *rows.shape[1:])).index_put((places[real],), rows).transpose(0, 1).unsqueeze(0)


def unpaged(k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor, Scores]:
    """Keys and values without pages, and what the call then says of them; as they are where there are none.

    Returns:
        k and v (B, Hk, N, ...), or of documents (1, Hk, B blocks page_size, ...), and the scores, both without a
        `Scores.block_table`.
    """
    table, starts, lengths = scores.block_table, scores.cu_seqlens_k, scores.key_lengths
    if table is None:
        return k, v, scores
    if starts is not None:
        lengths = _lengths(starts) if lengths is None else torch.minimum(_lengths(starts), lengths)
    pages = table
    if lengths is not None:
        # What lies behind the last key need not be a page.
        first = torch.arange(table.shape[1], device=table.device) * k.shape[2]
        pages = torch.where(first < lengths.unsqueeze(1), table, 0)
    k, v = (
        (x[pages] if x.shape[0] > 0 else x.new_zeros(*pages.shape, *x.shape[1:])).transpose(1, 2).flatten(2, 3)
        for x in (k, v)
    )
    scores = scores._replace(block_table=None, key_lengths=lengths)
    if starts is None:
        return k, v, scores
    # Each document has the room of all its pages.
    starts = torch.arange(starts.shape[0], device=k.device, dtype=torch.int32) * k.shape[2]
    k, v = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (k, v))
    return k, v, scores._replace(cu_seqlens_k=starts)


class _Scored(NamedTuple):
    """What both directions compute first, with all N keys of every query, in the accumulation dtype."""

    q: Tensor  # (B, Hq, M, D)
    keys: Tensor  # (B, Hq, N, D), 0 where not finite
    values: Tensor  # (B, Hq, N, Dv)
    keep: Tensor  # (B, Hq, M, N) bool: which keys each query may read
    raw: Tensor  # scale q k^T of these keys
    scores: Tensor  # -inf where not kept
    dropped: Tensor | None


def _keep(scores: Scores, shape: tuple[int, int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, Hq, M, N) bool: which keys each query may read; and (B, 1, M, N), how far each is behind the diagonal."""
    i = torch.arange(shape[2], device=device).view(1, 1, -1, 1)
    j = torch.arange(shape[3], device=device)
    queries: Tensor | int = shape[2]
    keys: Tensor | int = shape[3]
    keep = torch.ones(shape, dtype=torch.bool, device=device)
    if scores.cu_seqlens_q is not None and scores.cu_seqlens_k is not None:
        queries, keys = (_lengths(x).view(-1, 1, 1, 1) for x in (scores.cu_seqlens_q, scores.cu_seqlens_k))
        keep = keep & (i < queries) & (j < keys)
    if scores.key_lengths is not None:
        # A document's length is never less than what it was said to have.
        keys = torch.clamp(scores.key_lengths.view(-1, 1, 1, 1), max=keys)
        keep = keep & (j < keys)
    behind = j - i - (keys - queries if scores.bottom_right else 0)
    if scores.left != UNBOUNDED:
        keep = keep & (behind >= -scores.left)
    if scores.right != UNBOUNDED:
        keep = keep & (behind <= scores.right)
    if scores.mask is not None:
        keep = keep & scores.mask
    if scores.bias is not None:
        keep = keep & (scores.bias != -torch.inf)
    return keep, behind


def _score(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> _Scored:
    acc = accumulate_dtype(q.dtype)
    shape = scores.shape(q, k)
    if scores.cu_seqlens_q is not None and scores.cu_seqlens_k is not None:
        q = pad(q, scores.cu_seqlens_q, scores.max_seqlen_q)
        k, v = (pad(x, scores.cu_seqlens_k, scores.max_seqlen_k) for x in (k, v))
    q, k, v = q.to(acc), _heads(k, shape[1]).to(acc), _heads(v, shape[1]).to(acc)
    keep, behind = _keep(scores, shape, q.device)
    poison = torch.where(k.isfinite().all(-1), 0.0, torch.nan).to(acc).unsqueeze(2)
    k = _finite(k)
    raw = q @ k.transpose(2, 3) * scores.scale
    # The derivative of tanh is not to meet what is not finite.
    found = (raw if scores.softcap == 0.0 else scores.softcap * (raw / scores.softcap).tanh()) + poison
    if scores.bias is not None:
        bias = scores.bias.to(acc)
        found = found + torch.where(bias == -torch.inf, 0, bias)
    if scores.alibi_slopes is not None:
        slopes = scores.alibi_slopes.to(acc).expand(shape[0], -1)[..., None, None]
        found = found - slopes * behind.abs()
    gone = None
    if scores.dropout_p > 0.0 and scores.seed is not None:
        gone = dropped(scores.seed, shape, scores.dropout_p)
    return _Scored(q, k, v, keep, raw, torch.where(keep, found, -torch.inf), gone)


def _log_sum_exp(scored: _Scored, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, Hq, M): whether a row reads anything, the sink included, and its log-sum-exp."""
    acc = scored.scores.dtype
    alive = scored.keep.any(-1)
    lse = torch.where(scored.keep, scored.scores, torch.finfo(acc).min)
    lse = torch.where(alive, lse.logsumexp(-1), -torch.inf) if lse.shape[-1] > 0 else lse.sum(-1) - torch.inf
    if sink is None:
        return alive, lse
    rows = sink.to(acc).view(-1, 1).expand(lse.shape)
    # Rows of an lse of -inf have no gradients.
    rows = torch.where(rows == -torch.inf, -torch.inf, rows)
    # The sum with -inf has no gradient that is a number.
    return alive | (rows != -torch.inf), torch.where(alive, torch.where(alive, lse, 0).logaddexp(rows), rows)


def _weigh(scored: _Scored, alive: Tensor, lse: Tensor) -> Tensor:
    """Weights before dropout."""
    return torch.where(scored.keep, (scored.scores - torch.where(alive, lse, 0).unsqueeze(-1)).exp(), 0)


def weigh(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[_Scored, Tensor, Tensor]:
    """The scores, the weights before dropout, and the log-sum-exp (B, Hq, M); documents are padded."""
    scored = _score(q, k, v, scores)
    alive, lse = _log_sum_exp(scored, scores.sink)
    return scored, _weigh(scored, alive, lse), lse


def attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attention as differentiable dense tensor operations.

    Args:
        q, k, v: as in `seqkernels.ops.attention.attention`.
        scores: likewise.

    Returns:
        ``out`` (B, Hq, M, Dv) and ``lse`` (B, Hq, M).
    """
    k, v, scores = unpaged(k, v, scores)
    scored, weights, lse = weigh(q, k, v, scores)
    out = drop(weights, scored.dropped, scores.dropout_p) @ _finite(scored.values)
    leaks = scored.keep.to(out.dtype) @ (~scored.values.isfinite()).to(out.dtype) > 0
    out = torch.where(leaks, torch.nan, out)
    if scores.cu_seqlens_q is not None:
        out = unpad(out, scores.cu_seqlens_q, q.shape[2])
        lse = _unpad_lse(lse, scores, q.shape[2])
    return out.to(q.dtype), lse


def _unpad_lse(lse: Tensor, scores: Scores, total: int) -> Tensor:
    """`lse` of the documents behind one another, -inf in rows of none."""
    assert scores.cu_seqlens_q is not None
    found = unpad(lse, scores.cu_seqlens_q, total)
    row = torch.arange(total, device=lse.device)
    return torch.where((row >= scores.cu_seqlens_q[0]) & (row < scores.cu_seqlens_q[-1]), found, -torch.inf)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """``seqkernels::attention_forward``."""
    out, lse = attention(q, k, v, scores)
    return _rows_of_heads(out), lse.contiguous()


def _rows(x: Tensor | None, scores: Scores) -> Tensor | None:
    """What belongs to the queries, (B, Hq, M, ...) whether documents are behind one another or not."""
    if x is None or scores.cu_seqlens_q is None:
        return x
    return pad(x, scores.cu_seqlens_q, scores.max_seqlen_q)


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
    """``seqkernels::attention_backward``.

    Args:
        grad_out: (B, Hq, M, Dv), or ``None`` for zeros.
        grad_lse: (B, Hq, M), or ``None`` for zeros.
        q, k, v, scores: as in the forward pass.
        out, lse: of the forward pass.
        needs: which of the gradients are wanted.

    Returns:
        Gradients of q, k, v and the bias, empty where they are not wanted.
    """
    scored = _score(q, k, v, scores)
    acc = scored.q.dtype
    rows, keys = scores.cu_seqlens_q, scores.cu_seqlens_k
    lse_rows = _rows(lse, scores)
    assert lse_rows is not None
    alive = lse_rows != -torch.inf
    weights = _weigh(scored, alive, lse_rows)
    padded = _rows(torch.zeros_like(out) if grad_out is None else grad_out, scores)
    padded_out, padded_lse = _rows(out, scores), _rows(grad_lse, scores)
    assert padded is not None
    assert padded_out is not None
    grad = padded.to(acc)
    delta = (grad * padded_out).sum(-1)
    if padded_lse is not None:
        delta = delta - padded_lse
    grad_weights = drop(grad @ _finite(scored.values).transpose(2, 3), scored.dropped, scores.dropout_p)
    grad_scores = torch.where(scored.keep, weights * (grad_weights - delta.unsqueeze(-1)), 0)
    grad_raw = grad_scores
    if scores.softcap != 0.0:
        grad_raw = torch.where(scored.keep, grad_scores * (1 - (scored.raw / scores.softcap).tanh() ** 2), 0)
    grad_q = grad_raw @ scored.keys * scores.scale
    grad_k = _ungroup(grad_raw.transpose(2, 3) @ scored.q * scores.scale, k)
    grad_v = _ungroup(drop(weights, scored.dropped, scores.dropout_p).transpose(2, 3) @ grad, v)
    if rows is not None and keys is not None:
        grad_q = unpad(grad_q, rows, q.shape[2])
        grad_k, grad_v = unpad(grad_k, keys, k.shape[2]), unpad(grad_v, keys, k.shape[2])
    grad_bias = q.new_empty(0)
    if needs[3] and scores.bias is not None:
        grad_bias = grad_scores.sum_to_size(scores.bias.shape).to(scores.bias.dtype)
    found = [
        _rows_of_heads(x.to(q.dtype)) if need else x.new_empty(0, dtype=q.dtype)
        for x, need in zip((grad_q, grad_k, grad_v), needs, strict=False)
    ]
    return found[0], found[1], found[2], grad_bias


def attention_weights(q: Tensor, k: Tensor, lse: Tensor, scores: Scores, average: bool) -> Tensor:
    """``seqkernels::attention_weights``.

    Args:
        q, k, scores: as in the forward pass.
        lse: (B, Hq, M), of the forward pass.
        average: over the heads.

    Returns:
        The weights after dropout, (B, Hq, M, N), or their mean over the heads (B, M, N), in the accumulation dtype.
    """
    scored = _score(q, k, k[..., :1], scores)
    rows = _rows(lse, scores)
    assert rows is not None
    weights = drop(_weigh(scored, rows != -torch.inf, rows), scored.dropped, scores.dropout_p)
    return weights.mean(1) if average else weights


def _rows_of_heads(x: Tensor) -> Tensor:
    """`x` (B, H, L, D) laid out in memory as (B, L, H, D), as the contract has it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
