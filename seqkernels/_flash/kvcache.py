"""Attention over a cache of keys and values that grows in place, under flash-attn's name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cells import accumulate_dtype
from ..ops._eager import readable
from ..ops.attention_check import check
from ..ops.rotary import rotate
from .arguments import (
    build_scores,
    check_heads,
    check_int32,
    check_tensor,
    check_window,
    integer,
    run,
)

_LAYOUT = "(batch_size, seqlen, nheads, headdim)"
_CACHE = "(batch_size_cache, seqlen_cache, nheads_k, headdim)"
_PAGES = "(num_blocks, page_block_size, nheads_k, headdim)"


class _Filled(NamedTuple):
    """How many keys each sequence has in the cache before the call.

    Attributes:
        lengths: (B,) int64.
        least: of `lengths`; ``None`` where it cannot be read without waiting.
        most: likewise.
    """

    lengths: Tensor
    least: int | None
    most: int | None

    @property
    def even(self) -> bool:
        """Whether all sequences are known to have as many keys."""
        return self.least is not None and self.least == self.most


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over cached keys and values, appended to in place first: ``flash_attn.flash_attn_with_kvcache``.

    For generation: no gradients. Causality, windows and ALiBi count from the last query and the last key, those
    appended included, see `flash_attn_func`; differences to flash-attn are in the docstring of `seqkernels._flash`.
    A sequence without a key gives 0.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim), float32, float64, bfloat16 or float16.
        k_cache: (batch_size_cache, seqlen_cache, nheads_k, headdim) of the same dtype, the sequences of the batch
            first; with `block_table` (num_blocks, page_block_size, nheads_k, headdim), pages of any size. Written to
            where `k` is given.
        v_cache: likewise with headdim_v.
        k: (batch_size, seqlen_new, nheads_k, headdim), keys to write into the cache from `cache_seqlens` on, rotated
            if there are `rotary_cos` and `rotary_sin`.
        v: (batch_size, seqlen_new, nheads_k, headdim_v), likewise, not rotated.
        rotary_cos: (seqlen_ro, rotary_dim / 2), of any floating point dtype: cosines of the angles at each position,
            for the first rotary_dim elements of `k` and `q` (Su et al., "RoFormer", 2021). Key i of `k` is at position
            ``cache_seqlens + i``. So is query i with `causal` or a window; else all queries are at `cache_seqlens`.
            The rotation is computed in float32 (float64 for float64) and rounded once.
        rotary_sin: likewise the sines.
        cache_seqlens: how many keys each sequence has in the cache, one number or (batch_size,) int32; the keys behind
            are not read. All of the cache by default, which `k` does not allow.
        cache_batch_idx: (batch_size,) int32, the row of the cache of each sequence; 0, 1, ... by default. With a row
            twice and `k`, what the row then holds comes from any of the two. Not together with `block_table`.
        cache_leftpad: (batch_size,) int32, how many keys at the beginning of each sequence are padding, which is
            counted in `cache_seqlens` but not read.
        block_table: (batch_size, max_num_blocks_per_seq) int32, the pages of each sequence in order; those behind its
            length, new keys included, are not read.
        softmax_scale: factor on ``q k^T``; 1/sqrt(headdim) by default.
        causal: a query reads no key behind its own.
        window_size: (left, right), how many keys before and behind its own a query reads; -1 for all.
        softcap: scores s become ``softcap tanh(s / softcap)``; 0 or less for none.
        rotary_interleaved: rotate elements 0 and 1, 2 and 3, ...; else the first half of rotary_dim with the second.
        alibi_slopes: (nheads,) or (batch_size, nheads) float32, see `flash_attn_func`.
        num_splits: accepted for compatibility and not used. On a GPU it says into how many parts, computed at the
            same time, the keys are split; here an implementation does that as it needs, and no result depends on it.
        return_softmax_lse: return the log-sum-exp too.

    Returns:
        ``out`` (batch_size, seqlen_q, nheads, headdim_v), contiguous, of the dtype of `q`; with `return_softmax_lse`
        also ``softmax_lse`` (batch_size, nheads, seqlen_q) in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed. The cache is then as
            it was. An input that requires a gradient is refused while gradients are recorded.
    """
    _check_tensors(q, k_cache, v_cache, k, v, cache_batch_idx, block_table)
    _check_rotary(q, rotary_cos, rotary_sin, k)
    _check_gradients(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    page = k_cache.shape[1]
    capacity = page if block_table is None else page * block_table.shape[1]
    new = 0 if k is None else k.shape[1]
    filled = _filled(cache_seqlens, capacity, new, q)
    size = capacity if filled.most is None else filled.most + new
    table, length = _table(cache_batch_idx, block_table, size, k_cache, q)
    local = causal or check_window(window_size) != (-1, -1)
    scores = build_scores(q, q.shape[1], size, softmax_scale, causal, window_size, softcap, alibi_slopes)
    scores = scores._replace(block_table=table)
    if not filled.even or length != size:
        scores = scores._replace(key_lengths=(filled.lengths + new).to(torch.int32))
    if cache_leftpad is not None:
        _check_leftpad(cache_leftpad, filled, q)
        scores = scores._replace(mask=(torch.arange(length, device=q.device) >= cache_leftpad[:, None])[:, None, None])
    stored = (_stored(x, q.shape[0], size, cache_batch_idx, block_table) for x in (k_cache, v_cache))
    keys, values = (x.transpose(1, 2) for x in stored)
    # Everything that is wrong is found before the cache changes.
    check(q.transpose(1, 2), keys, values, scores)
    with torch.no_grad():
        if rotary_cos is not None and rotary_sin is not None and k is not None:
            # Without causality and a window all queries are at the first place.
            turned = q.shape[1] if local else min(1, q.shape[1])
            cos, sin = (_angles(x, filled, max(new, turned), q.dtype) for x in (rotary_cos, rotary_sin))
            k = rotate(k, cos[:, :new], sin[:, :new], rotary_interleaved)
            q = rotate(q, cos[:, :turned], sin[:, :turned], rotary_interleaved)
        if k is not None and v is not None:
            where = _behind(k_cache, k, filled, cache_batch_idx, block_table)
            k_cache[where], v_cache[where] = k, v
        out, lse = run(q.transpose(1, 2), keys, values, scores)
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _check_tensors(q: Any, k_cache: Any, v_cache: Any, k: Any, v: Any, cache_batch_idx: Any, block_table: Any) -> None:
    check_heads(q, k_cache, v_cache, _LAYOUT, _CACHE if block_table is None else _PAGES, ("k_cache", "v_cache"))
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither")
    batch = q.shape[0]
    if cache_batch_idx is None and block_table is None and k_cache.shape[0] < batch:
        raise ValueError(f"k_cache: expected at least {batch} rows, the batch_size of q, got {tuple(k_cache.shape)}")
    if k is not None:
        for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
            check_tensor(name, x, _LAYOUT, q)
            if x.shape[0] != batch or x.shape[1] != k.shape[1] or x.shape[2:] != cache.shape[2:]:
                raise ValueError(
                    f"{name}: expected ({batch}, {k.shape[1]}, {cache.shape[2]}, {cache.shape[3]}) to match q, k and"
                    f" {name}_cache, got {tuple(x.shape)}"
                )
    if block_table is not None:
        check_int32("block_table", block_table, f"({batch}, max_num_blocks_per_seq)", (batch, None), q)
        if k_cache.shape[1] == 0:
            raise ValueError(f"k_cache: expected pages of at least one key, got {tuple(k_cache.shape)}")
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx: expected None with block_table, which has the pages of each sequence")


def _check_rotary(q: Tensor, cos: Any, sin: Any, k: Tensor | None) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("rotary_cos, rotary_sin: expected both or neither")
    if k is None:
        raise ValueError("rotary_cos, rotary_sin: expected with k and v only, which are None")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected on {q.device} as q, got {x.device}")
        if x.dim() != 2 or 2 * x.shape[1] > q.shape[3] or x.shape != cos.shape:
            raise ValueError(
                f"{name}: expected (seqlen_ro, rotary_dim / 2), the same of both and rotary_dim at most {q.shape[3]},"
                f" got {tuple(x.shape)}"
            )


def _check_gradients(**tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(f"{name}: requires a gradient, which a cache does not give; call it under torch.no_grad()")


def _filled(cache_seqlens: Any, capacity: int, new: int, q: Tensor) -> _Filled:
    batch = q.shape[0]
    if cache_seqlens is None:
        if new:
            raise ValueError("cache_seqlens: expected an integer or a Tensor, as k and v are given, got None")
        cache_seqlens = capacity
    lengths: Tensor
    if isinstance(cache_seqlens, Tensor):
        check_int32("cache_seqlens", cache_seqlens, f"({batch},)", (batch,), q)
        lengths = cache_seqlens.to(torch.int64)
        if not readable(lengths):
            return _Filled(lengths, None, None)
        values = lengths.tolist()
        least, most = min(values, default=0), max(values, default=0)
    else:
        least = most = integer("cache_seqlens", cache_seqlens)
        lengths = torch.full((batch,), most, dtype=torch.int64, device=q.device)
    if least < 0 or most + new > capacity:
        raise ValueError(
            f"cache_seqlens: expected from 0 to {capacity - new}, as the cache holds {capacity} keys of a sequence and"
            f" {new} are new, got {cache_seqlens}"
        )
    return _Filled(lengths, least, most)


def _check_leftpad(cache_leftpad: Any, filled: _Filled, q: Tensor) -> None:
    check_int32("cache_leftpad", cache_leftpad, f"({q.shape[0]},)", (q.shape[0],), q)
    if readable(cache_leftpad) and bool(((cache_leftpad < 0) | (cache_leftpad > filled.lengths)).any()):
        raise ValueError(f"cache_leftpad: expected from 0 to cache_seqlens, got {cache_leftpad}")


def _table(rows: Any, block_table: Tensor | None, size: int, k_cache: Tensor, q: Tensor) -> tuple[Tensor | None, int]:
    """The pages with the first `size` keys of each sequence, `rows` of the cache being one each, and their length."""
    if block_table is not None:
        page = k_cache.shape[1]
        count = -(-size // page)
        return block_table[:, :count], count * page
    if rows is None:
        return None, size
    check_int32("cache_batch_idx", rows, f"({q.shape[0]},)", (q.shape[0],), q)
    count = k_cache.shape[0]
    if readable(rows) and bool(((rows < 0) | (rows >= count)).any()):
        raise ValueError(f"cache_batch_idx: expected rows of k_cache from 0 to {count - 1}, got {rows}")
    return rows[:, None], size


def _angles(table: Tensor, filled: _Filled, count: int, dtype: torch.dtype) -> Tensor:
    """Rows of `table` for the `count` places of each sequence behind what is filled, (B or 1, count, 1, half)."""
    if filled.most is not None and filled.most + count > table.shape[0]:
        raise ValueError(
            f"rotary_cos, rotary_sin: expected at least {filled.most + count} positions, got shape {tuple(table.shape)}"
        )
    if filled.most is not None and filled.even:
        found = table[filled.most : filled.most + count].unsqueeze(0)
    else:
        found = table[filled.lengths[:, None] + torch.arange(count, device=table.device)]
    return found.to(accumulate_dtype(dtype)).unsqueeze(2)


def _behind(
    cache: Tensor, x: Tensor, filled: _Filled, rows: Tensor | None, block_table: Tensor | None
) -> tuple[slice, slice] | tuple[Tensor, Tensor]:
    """The index of the place in the cache of `x` (B, L, H, D), behind what is filled."""
    batch, new = x.shape[:2]
    if filled.most is not None and filled.even and rows is None and block_table is None:
        return slice(batch), slice(filled.most, filled.most + new)
    places = filled.lengths[:, None] + torch.arange(new, device=x.device)
    if block_table is not None:
        return block_table.long().gather(1, places // cache.shape[1]), places % cache.shape[1]
    rows = torch.arange(batch, device=x.device) if rows is None else rows.long()
    return rows[:, None], places


def _stored(cache: Tensor, batch: int, size: int, rows: Tensor | None, block_table: Tensor | None) -> Tensor:
    """The first `size` keys or values of each sequence, or of all rows or pages of which a table picks some."""
    if block_table is not None:
        return cache
    return cache[:batch, :size] if rows is None else cache[:, :size]
