"""What the arguments of the attention contract have to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cells import DTYPES, accumulate_dtype
from ..precision import check_precision
from ..scores import UNBOUNDED, Scores
from ._eager import readable

#: The most that a bound of a window may be, so that sums with places of keys are numbers of 64 bits.
FARTHEST = 1 << 62
#: The most rows of a document: where documents begin are numbers of 32 bits.
LONGEST = (1 << 31) - 1


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, paged: bool) -> None:
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
    batch, heads, _, size = q.shape
    kv_heads = k.shape[1]
    if (k.shape[0] != batch and not paged) or k.shape[3] != size or kv_heads == 0 or heads % kv_heads != 0:
        expected = f"(pages, Hk, page_size, {size})" if paged else f"({batch}, Hk, N, {size})"
        raise ValueError(
            f"k: expected shape {expected} with Hk a divisor of {heads} to match q {tuple(q.shape)},"
            f" got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected shape {(*k.shape[:3], 'Dv')} to match k, got {tuple(v.shape)}")
    if not 1 <= size <= 512 or not 1 <= v.shape[3] <= 512:
        raise ValueError(f"q, v: head sizes from 1 to 512 are allowed, got {size} and {v.shape[3]}")


def _check_tensor(
    name: str, x: Any, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...], q: Tensor
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected on {q.device} as q, got {x.device}")
    if tuple(x.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")


def check(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> None:
    """Raise the error that names the argument which breaks the contract of `attention`."""
    _check_inputs(q, k, v, scores.block_table is not None)
    check_precision(scores.precision)
    if scores.cu_seqlens_q is not None or scores.cu_seqlens_k is not None:
        _check_documents(q, scores)
    if scores.block_table is not None:
        _check_table(scores.block_table, q, scores)
    full = scores.shape(q, k)
    acc = accumulate_dtype(q.dtype)
    for name, extra, dtypes in (("mask", scores.mask, (torch.bool,)), ("bias", scores.bias, (q.dtype, acc))):
        if extra is None:
            continue
        _check_tensor(name, extra, tuple(dict.fromkeys(dtypes)), (tuple(getattr(extra, "shape", ())),), q)
        if extra.dim() != 4 or any(have != 1 and have != want for have, want in zip(extra.shape, full, strict=True)):
            raise ValueError(f"{name}: expected 4 dimensions, each 1 or as in {full}, got {tuple(extra.shape)}")
    for name, bound in (("left", scores.left), ("right", scores.right)):
        if not UNBOUNDED <= bound <= FARTHEST:
            raise ValueError(f"{name}: expected from 0 to {FARTHEST}, or {UNBOUNDED} for no bound, got {bound}")
    batch, heads = full[:2]
    if scores.key_lengths is not None:
        _check_tensor("key_lengths", scores.key_lengths, (torch.int32,), ((batch,),), q)
    if scores.block_table is not None:
        _check_pages(scores.block_table, k, scores)
    if scores.alibi_slopes is not None:
        _check_tensor("alibi_slopes", scores.alibi_slopes, (torch.float32,), ((heads,), (batch, heads)), q)
        if scores.alibi_slopes.requires_grad:
            raise ValueError("alibi_slopes: has no gradient; a bias has one")
    if scores.sink is not None:
        _check_tensor("sink", scores.sink, (acc,), ((heads,),), q)
    # What is more or less has no inverse in the accumulation dtype.
    least = torch.finfo(acc).tiny
    if scores.softcap != 0.0 and not least <= scores.softcap <= 1 / least:
        raise ValueError(
            f"softcap: expected a positive number, or 0 for none, got {scores.softcap}; with {q.dtype} from"
            f" {least:.3g} to {1 / least:.3g}"
        )
    if not 0.0 <= scores.dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {scores.dropout_p}")
    if scores.dropout_p > 0.0:
        if scores.seed is None:
            raise ValueError("seed: expected a Tensor, as dropout_p is not 0, got None")
        _check_tensor("seed", scores.seed, (torch.int64,), ((),), q)


def _check_documents(q: Tensor, scores: Scores) -> None:
    if scores.cu_seqlens_q is None or scores.cu_seqlens_k is None:
        raise ValueError("cu_seqlens_q, cu_seqlens_k: expected both or neither")
    if q.shape[0] != 1:
        raise ValueError(f"q: expected one batch entry, with cu_seqlens_q, got {tuple(q.shape)}")
    for name, x in (("cu_seqlens_q", scores.cu_seqlens_q), ("cu_seqlens_k", scores.cu_seqlens_k)):
        shape = tuple(getattr(x, "shape", ()))
        _check_tensor(name, x, (torch.int32,), (shape,), q)
        if len(shape) != 1 or shape[0] == 0 or shape != tuple(scores.cu_seqlens_q.shape):
            raise ValueError(
                f"{name}: expected one dimension, the number of documents plus 1,"
                f" {tuple(scores.cu_seqlens_q.shape)} as cu_seqlens_q, got {shape}"
            )
    for name, most in (("max_seqlen_q", scores.max_seqlen_q), ("max_seqlen_k", scores.max_seqlen_k)):
        if not 0 <= most <= LONGEST:
            raise ValueError(f"{name}: expected from 0 to {LONGEST}, got {most}")


def _check_table(block_table: Tensor, q: Tensor, scores: Scores) -> None:
    shape = tuple(getattr(block_table, "shape", ()))
    _check_tensor("block_table", block_table, (torch.int32,), (shape,), q)
    batch = q.shape[0] if scores.cu_seqlens_q is None else scores.cu_seqlens_q.shape[0] - 1
    if len(shape) != 2 or shape[0] != batch:
        raise ValueError(f"block_table: expected shape ({batch}, blocks), got {shape}")


def _check_pages(block_table: Tensor, k: Tensor, scores: Scores) -> None:
    """Raise if an entry may read what is no page, as far as values can be read."""
    starts, lengths = scores.cu_seqlens_k, scores.key_lengths
    if not (readable(block_table) and readable(starts) and readable(lengths)):
        return
    blocks, (pages, _, page, _) = block_table.shape[1], k.shape
    there = torch.full((block_table.shape[0],), blocks * page)
    if starts is not None:
        there = starts.diff().clamp(max=scores.max_seqlen_k)
    if lengths is not None:
        there = torch.minimum(there, lengths)
    most = int(there.max()) if there.numel() else 0
    if most > blocks * page:
        raise ValueError(f"block_table: expected pages for {most} keys, got {blocks} of {page}")
    used = torch.arange(blocks) * page < there.unsqueeze(1)
    if bool((used & ((block_table < 0) | (block_table >= pages))).any()):
        raise ValueError(f"block_table: expected pages from 0 to {pages - 1} up to each length, got {block_table}")
