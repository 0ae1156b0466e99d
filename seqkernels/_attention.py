"""Attention behind the layers: torch's ``scaled_dot_product_attention`` on top of `seqkernels.ops.attention`.

The public function is `seqkernels.functional.scaled_dot_product_attention`; the layers use `attend`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .cells import DTYPES, accumulate_dtype
from .ops.attention import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(scale query key^T + attn_mask) value``: ``torch.nn.functional.scaled_dot_product_attention``.

    The same arguments, results and kinds of error, with these differences: a row whose keys are all masked gives 0
    and zero gradients, and NaN in masked keys and values has no influence, on every path; `attn_mask` and
    `is_causal` together always mean both (torch allows it on some paths and refuses it on others); `attn_mask` may
    have fewer than two dimensions. The matrix of scores is not stored, masks and grouped heads are not expanded;
    only with more than two batch dimensions may a mask have to be copied.

    Dropout, head sizes over 512 and empty heads run as plain tensor operations, which `seqkernels.explain` tells;
    under the same seed dropout drops what torch's own composite implementation drops. Nested tensors are passed on
    to torch.

    Args:
        query: (..., Hq, L, E), float32, float64, bfloat16 or float16; any number of batch dimensions, none included;
            those of `query`, `key` and `value` are broadcast.
        key: (..., H, S, E).
        value: (..., H, S, Ev).
        attn_mask: broadcastable to (..., Hq, L, S). Boolean: ``True`` takes part. Floating point, of the dtype of
            `query` or float32: added to the scores; has a gradient. Also a ``torch.nn.attention.bias.CausalBias``.
        dropout_p: probability to drop a weight; applied whenever it is positive.
        is_causal: query i sees keys 0..i, aligned top-left.
        scale: factor on ``query key^T``; 1/sqrt(E) by default.
        enable_gqa: Hq may be a multiple of H; query head h reads key head ``h // (Hq // H)``.

    Returns:
        (..., Hq, L, Ev) of the dtype of `query`, under autocast of the autocast dtype; with a dimension of heads laid
        out in memory as (..., L, Hq, Ev), so that the heads of a row can be joined without a copy.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a ``CausalBias`` together with `is_causal`.
        RuntimeError: shapes, dtypes, devices or `dropout_p` do not fit; the message names the argument.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: expected a Tensor or None, got {type(attn_mask).__name__}")
    if query.is_nested or key.is_nested or value.is_nested:
        backends.note("nested tensors: scaled_dot_product_attention is torch's own")
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and type(attn_mask) not in (Tensor, torch.nn.Parameter):
        attn_mask, is_causal = _causal_bias(attn_mask, is_causal, query.device)
    query, key, value, attn_mask = _lower(query, key, value, attn_mask)
    _check_inputs(query, key, value, attn_mask)
    q, k, v = query, key, value
    batch = q.shape[:-2]
    if not batch == k.shape[:-2] == v.shape[:-2]:
        batch = _batch_shape(query, key, value, enable_gqa)
        kv_heads = _kv_heads(batch, key, value, enable_gqa)
        q = q.expand(*batch, -1, -1)
        k = k.expand(*kv_heads, -1, -1)
        v = v.expand(*kv_heads, -1, -1)
    if attn_mask is not None:
        attn_mask = _broadcast_mask(attn_mask, (*batch, q.shape[-2], k.shape[-2]))
    if len(batch) != 2:
        split = _split(batch, attn_mask, grouped=k.shape[:-2] != batch)
        q, k, v = (_fold(x, split) for x in (q, k, v))
        attn_mask = None if attn_mask is None else _fold(_expand_mixed(attn_mask, batch, split), split)
    mask, bias = (attn_mask, None) if attn_mask is None or attn_mask.dtype == torch.bool else (None, attn_mask)
    out, _ = attend(q, k, v, mask, bias, scale=scale, is_causal=is_causal, dropout_p=dropout_p)
    return out if len(batch) == 2 else out.reshape(*batch, *out.shape[2:])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of heads by the fused op where it serves the call, else as tensor operations, with a note.

    Args:
        q: (B, Hq, M, D).
        k: (B, Hk, N, D), Hq a multiple of Hk.
        v: (B, Hk, N, Dv).
        mask: bool, four dimensions, each 1 or as in (B, Hq, M, N); ``True`` keeps a key.
        bias: like `mask`, of the dtype of `q` or float32; added to the scores. float32 with 16-bit `q` makes the
            whole computation one in float32, as it is inside torch's kernels.
        scale: factor on ``q k^T``; 1/sqrt(D) by default.
        is_causal: query i sees keys 0..i.
        dropout_p: probability to drop a weight.
        need_weights: return the weights too.

    Returns:
        ``out`` (B, Hq, M, Dv) and, if wanted, the weights (B, Hq, M, N) after dropout, of the dtype of `q`.

    Raises:
        RuntimeError: `dropout_p` is not in 0..1.
    """
    kind = q.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        q, k, v, bias = _lower(q, k, v, bias)
        with torch.autocast(kind, enabled=False):
            return attend(
                q,
                k,
                v,
                mask,
                bias,
                scale=scale,
                is_causal=is_causal,
                dropout_p=dropout_p,
                need_weights=need_weights,
            )
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"dropout_p: dropout probability has to be between 0 and 1, but got {dropout_p}")
    dtype = q.dtype
    if bias is not None and bias.dtype != dtype:
        acc = accumulate_dtype(dtype)
        q, k, v, bias = q.to(acc), k.to(acc), v.to(acc), bias.to(acc)
    if scale is None:
        scale = q.shape[3] ** -0.5 if q.shape[3] > 0 else 1.0
    reason = _why_dense(q, k, v, dropout_p, need_weights)
    if reason is None:
        out, _ = attention(q, k, v, mask, bias, scale=float(scale), is_causal=is_causal)
        return out if out.dtype == dtype else out.to(dtype), None
    backends.note(f"attention with its (M, N) weights in memory: {reason}")
    out, weights = _dense(q, k, v, mask, bias, scale, is_causal, dropout_p)
    return out.to(dtype), weights.to(dtype) if need_weights else None


def _why_dense(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, need_weights: bool) -> str | None:
    """``None`` where the op can run, else why not."""
    if need_weights:
        return "need_weights=True asks for them, need_weights=False runs a fused kernel"
    if dropout_p > 0.0:
        return "the kernels have no dropout"
    if not (1 <= q.shape[3] <= 512 and 1 <= v.shape[3] <= 512):
        return f"the kernels have head sizes 1 to 512, not {q.shape[3]} and {v.shape[3]}"
    return "there are no heads" if k.shape[1] == 0 else None


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    is_causal: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Attention and its weights, computed in float32 for 16-bit inputs, differentiable any number of times.

    Without a mask these are torch's own operations. With one, rows whose keys are all masked get 0, and what is in
    masked keys and values has no influence.
    """
    acc = accumulate_dtype(q.dtype)
    heads = q.shape[1]
    q, k, v = q.to(acc) * scale, _repeat_heads(k, heads).to(acc), _repeat_heads(v, heads).to(acc)
    keep = _kept_keys(q, k, mask, bias, is_causal)
    if keep is None:
        weights = (q @ k.transpose(2, 3)).softmax(-1)
        weights = F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights
        return weights @ v, weights
    k_bad, v_bad = (~x.isfinite().all(-1, keepdim=True) for x in (k, v))
    scores = q @ k.masked_fill(k_bad, 0).transpose(2, 3)
    scores = scores.masked_fill(k_bad.transpose(2, 3), torch.nan)
    if bias is not None:
        scores = scores + bias
    alive = keep.any(-1, keepdim=True)
    scores = scores.masked_fill(~keep, -torch.inf).masked_fill(~alive, 0)
    weights = scores.softmax(-1).masked_fill(~alive, 0)
    weights = F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights
    leaks = (keep & v_bad.transpose(2, 3)).any(-1, keepdim=True)
    poison = torch.zeros_like(leaks, dtype=acc).masked_fill(leaks, torch.nan)
    return weights @ v.masked_fill(v_bad, 0) + poison, weights


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _kept_keys(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, is_causal: bool) -> Tensor | None:
    """Bool, broadcastable to (B, Hq, M, N): the keys each query may read; ``None`` for all of them."""
    keep = mask
    if bias is not None:
        present = bias != -torch.inf
        keep = present if keep is None else keep & present
    if is_causal:
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        keep = causal if keep is None else keep & causal
    return keep


def _lower(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors as torch's autocast hands them to attention: in its dtype, except float64 and masks of bool."""
    kind = q.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return q, k, v, bias
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (x.to(dtype) if _lowered(x) else x for x in (q, k, v))
    return q, k, v, bias if bias is None or not _lowered(bias) else bias.to(dtype)


def _lowered(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype != torch.float64


def check_float_mask(name: str, mask: Tensor, dtype: torch.dtype) -> None:
    """Raise for a mask that is neither bool, nor float32, nor of the dtype of the query.

    Raises:
        RuntimeError: names `name`.
    """
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        raise RuntimeError(
            f"{name}: Expected {name} dtype to be bool or float or to match query dtype, but got"
            f" {name}.dtype: {mask.dtype} and query.dtype: {dtype} instead."
        )


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    if query.dtype not in DTYPES:
        raise RuntimeError(f"query: expected one of {DTYPES}, got {query.dtype}")
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        raise RuntimeError(
            "Expected query, key, and value to all be at least 2 dimensional, but got query.dim:"
            f" {query.dim()} key.dim: {key.dim()} and value.dim: {value.dim()} instead."
        )
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            "Expected query, key, and value to have the same dtype, but got query.dtype:"
            f" {query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype} instead."
        )
    if not query.device == key.device == value.device:
        raise RuntimeError(
            "Expected query, key, and value to have the same device type, but got query.device:"
            f" {query.device} key.device: {key.device} and value.device: {value.device} instead."
        )
    if key.shape[-1] != query.shape[-1]:
        raise RuntimeError(f"key: expected a last dimension of {query.shape[-1]} as in query, got {tuple(key.shape)}")
    if value.shape[-2] != key.shape[-2]:
        raise RuntimeError(f"value: expected length {key.shape[-2]} as key, got {tuple(value.shape)}")
    if attn_mask is not None:
        check_float_mask("attn_mask", attn_mask, query.dtype)
        if attn_mask.device != query.device:
            raise RuntimeError(f"attn_mask: expected on {query.device} as query, got {attn_mask.device}")


def _causal_bias(attn_mask: Tensor, is_causal: bool, device: torch.device) -> tuple[Tensor | None, bool]:
    """A ``CausalBias``, which holds no values, as a mask or the causal flag; other tensors as they are."""
    # Importing this module at the top would cost seconds.
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(attn_mask, CausalBias):
        return attn_mask, is_causal
    if is_causal:
        raise ValueError("CausalBias should not be used with causal=True")
    queries, keys = attn_mask.seq_len_q, attn_mask.seq_len_kv
    if queries == keys or attn_mask.variant == CausalVariant.UPPER_LEFT:
        return None, True
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries), False


def _batch_shape(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> torch.Size:
    """The batch dimensions of the result, heads of the query included."""
    shapes = [x.shape[:-2] for x in (query, key, value)]
    if enable_gqa:
        if not all(shapes):
            raise RuntimeError(
                "enable_gqa: expected query, key and value with a dimension of heads, got"
                f" {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )
        heads, kv_heads = query.shape[-3], key.shape[-3]
        if kv_heads != value.shape[-3] or kv_heads == 0 or heads % kv_heads != 0:
            raise RuntimeError(
                "enable_gqa: Number of heads in key and value must be equal and divide the number of heads in query,"
                f" got {kv_heads}, {value.shape[-3]} and {heads}"
            )
        shapes = [shape[:-1] for shape in shapes]
    size = max(map(len, shapes))
    columns = list(zip(*((1,) * (size - len(shape)) + tuple(shape) for shape in shapes), strict=True))
    batch = [next((n for n in column if n != 1), 1) for column in columns]
    for i, name in enumerate(("query", "key", "value")):
        if any(column[i] != 1 and column[i] != full for column, full in zip(columns, batch, strict=True)):
            raise RuntimeError(
                f"{name}: batch dimensions of query {tuple(query.shape)}, key {tuple(key.shape)} and value"
                f" {tuple(value.shape)} cannot be broadcast"
            )
    return torch.Size([*batch, query.shape[-3]] if enable_gqa else batch)


def _kv_heads(batch: torch.Size, key: Tensor, value: Tensor, enable_gqa: bool) -> torch.Size:
    """`batch` with the number of key heads last: a single head that all queries read need not be expanded."""
    if not batch:
        return batch
    heads = [x.shape[-3] if x.dim() > 2 else 1 for x in (key, value)]
    shared = enable_gqa or heads == [1, 1]
    return torch.Size([*batch[:-1], heads[0]]) if shared else batch


def _broadcast_mask(attn_mask: Tensor, full: tuple[int, ...]) -> Tensor:
    """`attn_mask` with as many dimensions as `full`, (..., Hq, L, S), each 1 or as there."""
    missing = len(full) - attn_mask.dim()
    shape = (1,) * missing + tuple(attn_mask.shape)
    if missing < 0 or any(have != 1 and have != want for have, want in zip(shape, full, strict=True)):
        raise RuntimeError(
            f"attn_mask: expected a shape that can be broadcast to {tuple(full)}, got {tuple(attn_mask.shape)}"
        )
    return attn_mask[(None,) * missing] if missing else attn_mask


def _split(batch: torch.Size, attn_mask: Tensor | None, grouped: bool) -> int:
    """How many of the batch dimensions become B, the rest being Hq: if possible so that the mask folds as a view."""
    # A lone batch dimension becomes B, which lets the result be contiguous.
    last = len(batch) if len(batch) < 2 and not grouped else len(batch) - 1
    if attn_mask is None or grouped:
        return last
    have = attn_mask.shape[:-2]
    for split in range(last, -1, -1):
        parts = (slice(split), slice(split, None))
        if all(have[part] == batch[part] or all(n == 1 for n in have[part]) for part in parts):
            return split
    return last


def _expand_mixed(attn_mask: Tensor, batch: torch.Size, split: int) -> Tensor:
    """`attn_mask` with the batch dimensions on either side of `split` all 1 or all as in `batch`."""
    have = list(attn_mask.shape[:-2])
    for part in (slice(split), slice(split, None)):
        if any(n != 1 for n in have[part]):
            have[part] = batch[part]
    return attn_mask.expand(*have, -1, -1)


def _fold(x: Tensor, split: int) -> Tensor:
    """(..., L, E) as (B, H, L, E): B has the dimensions before `split`."""
    return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:-2]), *x.shape[-2:])
