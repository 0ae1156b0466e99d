"""Attention behind the layers: torch's ``scaled_dot_product_attention`` on top of `seqkernels.ops.attention`.

The public function is `seqkernels.functional.scaled_dot_product_attention`; the layers use `attend`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .cells import DTYPES, accumulate_dtype
from .ops._eager import transformed
from .ops.attention import attend as fused_attention
from .ops.attention import attend_plainly, plain_weights
from .ops.attention_check import check
from .ops.weights import dense_attention, weights
from .precision import of_products
from .scores import UNBOUNDED, Scores

_autocast = torch.is_autocast_enabled
#: Devices whose autocast leaves softmax, and so the weights, in the lower dtype; that of others makes it float32.
_LOWER_SOFTMAX = ("cpu",)


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

    Dropout is part of the kernels: what it drops is a function of a seed, drawn from torch's default generator of the
    CPU in each call, and of the place of a weight. So ``torch.manual_seed`` makes it reproducible, and one seed drops
    the same weights on every implementation, device and number of threads, and when the backward pass or
    ``torch.utils.checkpoint`` computes them again; they are other ones than torch's own functions drop.

    Head sizes over 512 and empty heads run as plain tensor operations, which `seqkernels.explain` tells. Nested
    tensors are passed on to torch.

    Args:
        query: (..., Hq, L, E), float32, float64, bfloat16 or float16; any number of batch dimensions, none included;
            those of `query`, `key` and `value` are broadcast.
        key: (..., H, S, E).
        value: (..., H, S, Ev).
        attn_mask: broadcastable to (..., Hq, L, S). Boolean: ``True`` takes part. Floating point, of the dtype of
            `query` or float32: added to the scores; has a gradient. Also a ``torch.nn.attention.bias.CausalBias``,
            of which no matrix is made.
        dropout_p: probability to drop a weight; applied whenever it is positive.
        is_causal: query i sees keys 0..i, aligned top-left.
        scale: factor on ``query key^T``; 1/sqrt(E) by default.
        enable_gqa: Hq may be a multiple of H; query head h reads key head ``h // (Hq // H)``.

    Returns:
        (..., Hq, L, Ev) of the dtype of `query`, under autocast of the autocast dtype; with a dimension of heads laid
        out in memory as (..., L, Hq, Ev), so that the heads of a row can be joined without a copy.

    Raises:
        TypeError: an argument is not a tensor, or not a number.
        ValueError: a ``CausalBias`` together with `is_causal`.
        RuntimeError: shapes, dtypes, devices or `dropout_p` do not fit; the message names the argument.
    """
    if (
        attn_mask is None
        and not dropout_p
        and not _autocast("cpu")
        and type(query) is type(key) is type(value) is Tensor
    ):
        found = attend_plainly(query, key, value, scale, is_causal, enable_gqa)
        if found is not None:
            return found
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: expected a Tensor or None, got {type(attn_mask).__name__}")
    dropout_p = _number("dropout_p", dropout_p)
    scale = scale if scale is None else _number("scale", scale)
    if query.is_nested or key.is_nested or value.is_nested:
        backends.note("nested tensors: scaled_dot_product_attention is torch's own")
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    bottom_right = False
    if attn_mask is not None and type(attn_mask) not in (Tensor, torch.nn.Parameter):
        lengths = query.shape[-2:-1] + key.shape[-2:-1]
        attn_mask, is_causal, bottom_right = _causal_bias(attn_mask, is_causal, lengths)
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
    out, _ = attend(
        q, k, v, mask, bias, scale=scale, is_causal=is_causal, bottom_right=bottom_right, dropout_p=dropout_p
    )
    return out if len(batch) == 2 else out.reshape(*batch, *out.shape[2:])


def _number(name: str, x: Any) -> Any:
    """`x` as torch reads arguments that are numbers: also from a tensor of one element without a gradient."""
    if isinstance(x, int | float | torch.SymFloat | torch.SymInt):
        return x
    try:
        if isinstance(x, str) or (isinstance(x, Tensor) and x.requires_grad):
            raise TypeError
        return float(x)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}") from None


class LazyWeights(NamedTuple):
    """The weights of one call of attention, computed when asked for, from the queries and keys.

    It holds the queries and keys and the log-sum-exp of their scores, (B, H, L) numbers, and no weights.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    scores: Scores
    dtype: torch.dtype
    is_batched: bool = True

    def compute(self, average: bool = True) -> Tensor:
        """The weights after dropout, of the dtype of the query, under autocast of a GPU float32; differentiable.

        Args:
            average: over the heads, without storing those of all heads where the implementation can.

        Returns:
            (B, L, S), or (B, H, L, S) for ``average=False``; without B where the layer's input had none. Rows whose
            keys are all masked are 0.
        """
        with torch.autocast(_autocast_device(self.q), enabled=False):
            compute = plain_weights if transformed() else weights
            found = compute(self.q, self.k, self.lse, self.scores, average).to(self.dtype)
        return found if self.is_batched else found.squeeze(0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    bottom_right: bool = False,
    dropout_p: float = 0.0,
    precision: str = "ieee",
) -> tuple[Tensor, LazyWeights]:
    """Attention of heads by the fused op where it serves the call, else as tensor operations, with a note.

    Args:
        q: (B, Hq, M, D).
        k: (B, Hk, N, D), Hq a multiple of Hk.
        v: (B, Hk, N, Dv).
        mask: bool, four dimensions, each 1 or as in (B, Hq, M, N); ``True`` keeps a key.
        bias: like `mask`, of the dtype of `q` or float32; added to the scores. float32 with 16-bit `q` makes the
            whole computation one in float32 where no kernel reads it as it is.
        scale: factor on ``q k^T``; 1/sqrt(D) by default.
        is_causal: query i sees keys 0..i.
        bottom_right: with `is_causal`, query i sees keys 0..i + N - M instead.
        dropout_p: probability to drop a weight; the seed is drawn from torch's generator of the CPU.
        precision: see `seqkernels.precision`.

    Returns:
        ``out`` (B, Hq, M, Dv), and what computes the weights when asked.

    Raises:
        RuntimeError: `dropout_p` is not in 0..1.
    """
    kind = q.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        q, k, v, bias = _lower(q, k, v, bias)
        with torch.autocast(kind, enabled=False):
            out, weights = attend(
                q,
                k,
                v,
                mask,
                bias,
                scale=scale,
                is_causal=is_causal,
                bottom_right=bottom_right,
                dropout_p=dropout_p,
                precision=precision,
            )
        if kind not in _LOWER_SOFTMAX and weights.dtype != torch.float64:
            weights = weights._replace(dtype=torch.float32)
        return out, weights
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"dropout_p: dropout probability has to be between 0 and 1, but got {dropout_p}")
    dtype = q.dtype
    if scale is None:
        scale = q.shape[3] ** -0.5 if q.shape[3] > 0 else 1.0
    scores = Scores(
        float(scale),
        mask,
        bias,
        right=0 if is_causal else UNBOUNDED,
        bottom_right=is_causal and bottom_right,
        dropout_p=dropout_p,
        seed=_draw_seed(q.device) if dropout_p > 0.0 else None,
        precision=of_products(precision, q),
    )
    if bias is not None and bias.dtype != dtype and not _is_fused(kind, str(dtype), scores.features(q, k)):
        acc = accumulate_dtype(dtype)
        q, k, v, scores = q.to(acc), k.to(acc), v.to(acc), scores._replace(bias=bias.to(acc))
    reason = _why_dense(q, k, v)
    if reason is None:
        check(q, k, v, scores)
        out, lse = fused_attention(q, k, v, scores)
    else:
        backends.note(f"attention with its (M, N) weights in memory: {reason}")
        out, lse = dense_attention(q, k, v, scores)
    return out if out.dtype == dtype else out.to(dtype), LazyWeights(q, k, lse, scores, dtype)


def _draw_seed(device: torch.device) -> Tensor:
    """() int64 for the dropout, on `device`: from one generator, so that it is the same on every device."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu").to(device)


def _is_fused(device: str, dtype: str, features: tuple[str, ...]) -> bool:
    """Whether a call goes to another implementation than the reference."""
    call = backends.Call("attention", device, getattr(torch, dtype.removeprefix("torch.")), "", features)
    return backends.choice(call) not in (None, "reference")


# As torch.compiler.assume_constant_result does, which would import torch._dynamo: two seconds.
_is_fused._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _autocast_device(x: Tensor) -> str:
    return "cpu" if x.device.type == "meta" else x.device.type


def _why_dense(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """``None`` where the op can run, else why not."""
    if not (1 <= q.shape[3] <= 512 and 1 <= v.shape[3] <= 512):
        return f"the kernels have head sizes 1 to 512, not {q.shape[3]} and {v.shape[3]}"
    return "there are no heads" if k.shape[1] == 0 else None


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


def _causal_bias(attn_mask: Tensor, is_causal: bool, lengths: tuple[int, ...]) -> tuple[Tensor | None, bool, bool]:
    """A ``CausalBias``, which holds no values, as no mask and the causal flags; other tensors as they are."""
    # Importing this module at the top would cost seconds.
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(attn_mask, CausalBias):
        return attn_mask, is_causal, False
    if is_causal:
        raise ValueError("CausalBias should not be used with causal=True")
    sizes = attn_mask.seq_len_q, attn_mask.seq_len_kv
    if sizes[0] == sizes[1] or attn_mask.variant == CausalVariant.UPPER_LEFT:
        return None, True, False
    if sizes != lengths:
        raise RuntimeError(f"attn_mask: expected a CausalBias of {tuple(lengths)} queries and keys, got {sizes}")
    return None, True, True


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
