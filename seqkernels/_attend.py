"""Attention with every option of the contract by name, and the exact sum of partial attentions.

The public functions are `seqkernels.functional.attention` and `seqkernels.functional.merge`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._sequences import require
from .cells import DTYPES, accumulate_dtype
from .ops import weights
from .ops.attention import attend
from .ops.attention_check import FARTHEST, LONGEST, check
from .precision import check_precision, of_products
from .scores import UNBOUNDED, Scores

_INTEGERS = (torch.int32, torch.int64)
_ALIGNMENTS = ("top_left", "bottom_right")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    alignment: str = "top_left",
    window: int | tuple[int | None, int | None] | None = None,
    keep: Tensor | None = None,
    drop: Tensor | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool | None = None,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    precision: str = "ieee",
    return_lse: bool = False,
    column_sums: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``softmax(scores) v`` with masks, biases and dropout of every kind, freely combined, in O(N) memory.

    The score of query i and key j is ``s = scale q_i k_j``, then ``softcap tanh(s / softcap)``, then plus `bias` and
    ``-slope |i + diagonal - j|``. B batch entries, Hq query heads, Hk key and value heads, M queries, N keys, D and Dv
    the sizes of heads and values. With `cu_seqlens`, B documents lie behind one another: q is (total, Hq, D), k and v
    have their rows likewise, and M and N are `max_seqlen_q` and `max_seqlen_k`.

    Differentiable in q, k, v, `bias` and `sink`, also through the log-sum-exp and the column sums. Under autocast q,
    k, v and `bias` go to its dtype, except float64.

    Args:
        q: (B, Hq, M, D), float32, float64, bfloat16 or float16, D from 1 to 512; any strides.
        k: (B, Hk, N, D), Hq a multiple of Hk: query head h reads key head ``h // (Hq // Hk)``.
        v: (B, Hk, N, Dv), Dv from 1 to 512.
        is_causal: query i reads keys up to the diagonal alone, whatever `window` says of those behind it.
        alignment: where the diagonal of `is_causal`, `window` and `alibi_slopes` lies: ``"top_left"``, from the first
            query and the first key on, or ``"bottom_right"``, up to the last query and the last key (by `key_lengths`,
            or of the document).
        window: how many keys before and behind the diagonal a query reads, besides the one on it: a number for both
            sides or (left, right), ``None`` for no bound (Beltagy, Peters & Cohan, "Longformer", 2020).
        keep: bool, can be broadcast to (B, Hq, M, N): ``True`` where a query may read a key.
        drop: the same with ``True`` where it may not. At most one of the two.
        bias: of the dtype of q or float32 (float64 for float64), can be broadcast to (B, Hq, M, N): added to the
            scores; -inf masks a key.
        key_lengths: (B,) int32 or int64: how many of the keys of each batch entry or document there are.
        cu_seqlens: (B + 1,) int32 or int64, ascending: the row where each document begins, and the row behind the
            last one. Rows before the first and behind the last belong to no document.
        cu_seqlens_q: the same of q alone, with `cu_seqlens_k`, in place of `cu_seqlens`.
        cu_seqlens_k: the same of k and v alone.
        max_seqlen_q: length of the longest document in q, or more. By default computed, where `cu_seqlens` is on the
            CPU and no program is being compiled.
        max_seqlen_k: likewise in k; with `cu_seqlens` the default is `max_seqlen_q` where that is given.
        alibi_slopes: (Hq,) or (B, Hq), floating point, without a gradient (Press, Smith & Lewis, "Train short, test
            long: attention with linear biases", 2022).
        softcap: bound of the scores (Gemma 2, 2024); ``None`` or 0 for none.
        sink: (Hq,), floating point: the score of one more key for every query, whose value is 0 (gpt-oss, 2025; Xiao
            et al., "Efficient streaming language models with attention sinks", 2024).
        dropout_p: probability to drop a weight; the others grow by ``1 / (1 - dropout_p)``. What is dropped depends on
            `seed` and on the place (b, h, i, j) among (B, Hq, M, N) alone: it is the same on every backend and device
            and under recomputation, and another than that of torch's functions.
        training: whether there is dropout; must be given where `dropout_p` is not 0.
        seed: of the dropout, an integer of 64 bits or () int64. By default drawn from torch's generator of the CPU, so
            that ``torch.manual_seed`` makes it reproducible.
        scale: factor on ``q k^T``; 1/sqrt(D) by default.
        precision: of products of float32 matrices on GPUs, whatever torch's flags say: ``"ieee"``, the default,
            ``"tf32"`` or ``"tf32x3"``, see `seqkernels.precision`. On processors and for other dtypes no difference.
        return_lse: return the log-sum-exp too.
        column_sums: return the attention that each key receives too.

    Returns:
        ``out`` (B, Hq, M, Dv) of the dtype of q, laid out in memory as (B, M, Hq, Dv), or (total, Hq, Dv). A query
        that may read no key gets 0 and zero gradients, and so do rows of no document; what lies in keys, values and
        biases that are not read has no influence, NaN included.

        With `return_lse` or `column_sums` a tuple of it and, in this order: the log-sum-exp of the scores of each
        query, that of the sink included, -inf where nothing is read, (B, Hq, M) or (Hq, total) in float32 (float64 for
        float64); the sums over the queries of the weights before dropout, (B, Hq, N) or (Hq, total of k), likewise.

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed.
        RuntimeError: values of `key_lengths` or `cu_seqlens` in a compiled program, or on another device, do not fit.

    Example:
        >>> out, lse = attention(q, k, v, is_causal=True, window=(256, None), key_lengths=lengths, return_lse=True)
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if alignment not in _ALIGNMENTS:
        raise ValueError(f"alignment: expected 'top_left' or 'bottom_right', got {alignment!r}")
    kind = q.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    if autocast:
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = (x.to(dtype) if _lowered(x) else x for x in (q, k, v))
        bias = bias.to(dtype) if bias is not None and _lowered(bias) else bias
    if cu_seqlens is None and cu_seqlens_q is None and cu_seqlens_k is None:
        _check_dimensions(q, k, v, "4 dimensions (B, heads, length, size)", 4)
    else:
        _check_rows(q, k, v)
    documents = _documents(q, k, cu_seqlens, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if documents.cu_seqlens_q is not None:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    left, right = _window(window, is_causal)
    scores = Scores(
        scale=_number("scale", scale, q.shape[3] ** -0.5 if q.shape[3] > 0 else 1.0),
        left=left,
        right=right,
        bottom_right=alignment == "bottom_right",
        softcap=_number("softcap", softcap, 0.0),
        precision=of_products(check_precision(precision), q),
        **documents._asdict(),
    )
    full = scores.shape(q, k)
    scores = scores._replace(
        mask=_mask(keep, drop, full, q.device),
        bias=None if bias is None else _broadcastable("bias", bias, full),
        key_lengths=_key_lengths(key_lengths, scores, full),
        alibi_slopes=None if alibi_slopes is None else _floating("alibi_slopes", alibi_slopes).to(torch.float32),
        sink=None if sink is None else _floating("sink", sink).to(accumulate_dtype(q.dtype)),
        **_dropout(dropout_p, training, seed, q.device),
    )
    check(q, k, v, scores)
    if autocast:
        # What the reference computes with is no business of autocast.
        with torch.autocast(kind, enabled=False):
            found = _compute(q, k, v, scores, column_sums)
    else:
        found = _compute(q, k, v, scores, column_sums)
    if scores.cu_seqlens_q is not None:
        found = (found[0].squeeze(0).transpose(0, 1), *(x.squeeze(0) for x in found[1:]))
    if not return_lse:
        found = (found[0], *found[2:])
    return found if len(found) > 1 else found[0]


def _compute(q: Tensor, k: Tensor, v: Tensor, scores: Scores, sums: bool) -> tuple[Tensor, ...]:
    out, lse = attend(q, k, v, scores)
    if not sums:
        return out, lse
    return out, lse, weights.column_sums(q, k, lse, scores._replace(dropout_p=0.0, seed=None))


def _lowered(x: Tensor) -> bool:
    """Whether autocast changes the dtype of `x`."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _check_dimensions(q: Tensor, k: Tensor, v: Tensor, expected: str, count: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != count:
            raise ValueError(f"{name}: expected {expected}, got {tuple(x.shape)}")


def _check_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The shapes of documents, in words of their own."""
    _check_dimensions(q, k, v, "3 dimensions (total, heads, size), with cu_seqlens", 3)
    heads, size = q.shape[1:]
    if k.shape[2] != size or k.shape[1] == 0 or heads % k.shape[1] != 0:
        raise ValueError(
            f"k: expected shape (total, Hk, {size}) with Hk a divisor of {heads} to match q {tuple(q.shape)},"
            f" got {tuple(k.shape)}"
        )
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v: expected shape {(*k.shape[:2], 'Dv')} to match k, got {tuple(v.shape)}")


def _number(name: str, x: float | None, default: float) -> float:
    if x is None:
        return default
    if isinstance(x, bool | Tensor) or not isinstance(x, int | float):
        raise TypeError(f"{name}: expected a number or None, got {type(x).__name__}")
    if not -math.inf < x < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {x}")
    return float(x)


def _is_integer(x: object) -> bool:
    return isinstance(x, int | torch.SymInt) and not isinstance(x, bool)


def _window(window: Any, is_causal: bool) -> tuple[int, int]:
    """Left and right bound, as the ops carry them."""
    sides = window if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2 or any(side is not None and not _is_integer(side) for side in sides):
        raise TypeError(f"window: expected an integer, a pair (left, right) of integers or None, got {window!r}")
    if any(side is not None and side < 0 for side in sides):
        raise ValueError(f"window: expected at least 0, or None for no bound, got {window!r}")
    left, right = (UNBOUNDED if side is None else min(side, FARTHEST) for side in sides)
    return left, 0 if is_causal else right


def _broadcastable(name: str, x: Tensor, full: tuple[int, ...]) -> Tensor:
    """`x` with four dimensions, each 1 or as in `full`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(x).__name__}")
    missing = 4 - x.dim()
    shape = (1,) * missing + tuple(x.shape)
    if missing < 0 or any(have != 1 and have != want for have, want in zip(shape, full, strict=True)):
        raise ValueError(f"{name}: expected a shape that can be broadcast to {tuple(full)}, got {tuple(x.shape)}")
    return x[(None,) * missing] if missing else x


def _mask(keep: Tensor | None, drop: Tensor | None, full: tuple[int, ...], device: torch.device) -> Tensor | None:
    if keep is not None and drop is not None:
        raise ValueError("keep, drop: expected at most one of the two, got both")
    for name, x in (("keep", keep), ("drop", drop)):
        if x is None:
            continue
        mask = _broadcastable(name, x, full)
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: expected torch.bool, got {mask.dtype}")
        if mask.device != device:
            raise ValueError(f"{name}: expected on {device} as q, got {mask.device}")
        return mask if name == "keep" else ~mask
    return None


def _floating(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {DTYPES}, got {x.dtype}")
    return x


def _integers(name: str, x: Any, like: Tensor) -> Tensor:
    """`x` in int64, after checks of everything but its values."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(x).__name__}")
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected torch.int32 or torch.int64, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} as q, got {x.device}")
    if x.dim() != 1:
        raise ValueError(f"{name}: expected 1 dimension, got {tuple(x.shape)}")
    return x.to(torch.int64)


def _readable(x: Tensor) -> bool:
    """Whether the values are at hand: other devices would be waited for, and programs being compiled have none."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def _told(number: int, words: str) -> str:
    """`number` in a message, or `words` in a program being compiled, which would then serve this number alone."""
    return words if torch.compiler.is_compiling() else str(number)


class _Documents(NamedTuple):
    """What `Scores` has of documents."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0


def _documents(
    q: Tensor,
    k: Tensor,
    both: Tensor | None,
    of_q: Tensor | None,
    of_k: Tensor | None,
    most_q: int | None,
    most_k: int | None,
) -> _Documents:
    if both is None and of_q is None and of_k is None:
        for name, most in (("max_seqlen_q", most_q), ("max_seqlen_k", most_k)):
            if most is not None:
                raise ValueError(f"{name}: expected cu_seqlens with it, got {most!r} alone")
        return _Documents()
    names = ("cu_seqlens_q", "cu_seqlens_k")
    if both is not None:
        if of_q is not None or of_k is not None:
            raise ValueError("cu_seqlens: expected it or cu_seqlens_q and cu_seqlens_k, got both")
        of_q = of_k = both
        names = ("cu_seqlens", "cu_seqlens")
        most_k = most_q if most_k is None else most_k
    elif of_q is None or of_k is None:
        raise ValueError("cu_seqlens_q, cu_seqlens_k: expected both or neither, got one")
    starts_q, longest_q = _starts(names[0], of_q, "max_seqlen_q", most_q, q, q)
    if both is not None and most_k == most_q and q.shape[:1] == k.shape[:1]:
        return _Documents(starts_q, starts_q, longest_q, longest_q)
    starts_k, longest_k = _starts(names[1], of_k, "max_seqlen_k", most_k, k, q)
    if starts_q.shape != starts_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected shape {tuple(starts_q.shape)} as cu_seqlens_q, got {tuple(starts_k.shape)}"
        )
    return _Documents(starts_q, starts_k, longest_q, longest_k)


def _starts(
    name: str, x: Tensor | None, name_of_most: str, most: int | None, rows: Tensor, q: Tensor
) -> tuple[Tensor, int]:
    """Where documents begin, in int32, and the length of the longest one, or more."""
    starts = _integers(name, x, q)
    if starts.shape[0] == 0:
        raise ValueError(f"{name}: expected at least 1 element, got none")
    lengths, total = starts.diff(), rows.shape[0]
    require(
        torch.cat((starts[:1] >= 0, lengths >= 0, starts[-1:] <= total)),
        starts,
        f"{name}: expected to ascend from at least 0 to at most {_told(total, 'as many as there are')}, the rows of its"
        " tensor",
    )
    if most is None:
        if not _readable(starts):
            raise ValueError(
                f"{name_of_most}: the length of the longest document is needed where {name} is not on the CPU and in"
                " compiled programs, which may not wait for its values"
            )
        return starts.to(torch.int32), int(lengths.max()) if lengths.shape[0] else 0
    if not _is_integer(most):
        raise TypeError(f"{name_of_most}: expected an integer or None, got {type(most).__name__}")
    if not 0 <= most <= LONGEST:
        raise ValueError(f"{name_of_most}: expected from 0 to {LONGEST}, got {most}")
    require(
        lengths <= most, lengths, f"{name_of_most}: expected no document of {name} longer than {_told(most, 'it says')}"
    )
    return starts.to(torch.int32), most


def _key_lengths(x: Tensor | None, scores: Scores, full: tuple[int, ...]) -> Tensor | None:
    if x is None:
        return None
    if not isinstance(x, Tensor) or scores.cu_seqlens_k is None:
        most: Tensor | int = full[3]
    else:
        most = scores.cu_seqlens_k.diff()
    lengths = _integers("key_lengths", x, x)
    if tuple(x.shape) != (full[0],):
        raise ValueError(f"key_lengths: expected shape {(full[0],)}, got {tuple(x.shape)}")
    if isinstance(most, int) or most.device == x.device:
        text = (
            f"from 0 to {_told(most, 'the number of keys')}"
            if isinstance(most, int)
            else "from 0 to the number of keys of each document"
        )
        require((lengths >= 0) & (lengths <= most), lengths, f"key_lengths: expected values {text}")
    return lengths.to(torch.int32)


def _dropout(dropout_p: float, training: bool | None, seed: int | Tensor | None, device: torch.device) -> Any:
    """`dropout_p` and `seed` as `Scores` has them."""
    p = _number("dropout_p", dropout_p, 0.0)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p}")
    if p > 0.0 and training is None:
        raise TypeError("training: expected True or False, as dropout_p is not 0, got None")
    if p == 0.0 or not training:
        return {}
    if seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu").to(device)
    elif not isinstance(seed, Tensor):
        if not _is_integer(seed):
            raise TypeError(f"seed: expected an integer, a Tensor or None, got {type(seed).__name__}")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
        seed = torch.tensor(seed, dtype=torch.int64, device=device)
    return {"dropout_p": p, "seed": seed}


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each: exact, and differentiable.

    The log-sum-exp of all keys is that of the two, and each part counts by its share of it (Dao et al.,
    "FlashAttention", 2022, section 3.1). So keys can be attended to in parts, in any order; a sink may belong to one
    part alone.

    Args:
        out1: (B, Hq, M, Dv), or (total, Hq, Dv) of documents, float32, float64, bfloat16 or float16: attention over
            the first keys, as `attention` with ``return_lse=True`` gives it.
        lse1: (B, Hq, M), or (Hq, total), in float32 (float64 for float64): its log-sum-exp; -inf where a query read
            no key, and `out1` then does not count.
        out2: as `out1`, over the other keys.
        lse2: as `lse1`, likewise.

    Returns:
        ``out``, as `out1`, and ``lse``, as `lse1`, of attention over all keys; 0 and -inf where a query read none.
        Where it read keys of one part alone, they are that part's to the last bit.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    _check_parts(out1, lse1, out2, lse2)
    dtype, acc = out1.dtype, lse1.dtype
    empty1, empty2 = lse1 == -torch.inf, lse2 == -torch.inf
    # Differences of infinities are never formed.
    level1, level2 = torch.where(empty1, 0, lse1), torch.where(empty2, 0, lse2)
    lse = torch.where(empty1, torch.where(empty2, -torch.inf, level2), level1)
    lse = torch.where(empty1 | empty2, lse, torch.logaddexp(level1, level2))
    share1 = torch.where(empty1, 0, torch.where(empty2, 1, (level1 - level2).sigmoid()))
    share2 = torch.where(empty2, 0, torch.where(empty1, 1, (level2 - level1).sigmoid()))
    if out1.dim() == 3:
        empty1, empty2, share1, share2 = (x.transpose(0, 1) for x in (empty1, empty2, share1, share2))
    out = torch.where(empty1.unsqueeze(-1), 0, out1.to(acc)) * share1.unsqueeze(-1)
    out = out + torch.where(empty2.unsqueeze(-1), 0, out2.to(acc)) * share2.unsqueeze(-1)
    return out.to(dtype), lse


def _check_parts(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> None:
    for name, x in (("out1", out1), ("lse1", lse1), ("out2", out2), ("lse2", lse2)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
        if x.device != out1.device:
            raise ValueError(f"{name}: expected on {out1.device} as out1, got {x.device}")
    if out1.dtype not in DTYPES:
        raise TypeError(f"out1: expected one of {DTYPES}, got {out1.dtype}")
    if out1.dim() not in (3, 4):
        raise ValueError(f"out1: expected (B, Hq, M, Dv) or (total, Hq, Dv), got {tuple(out1.shape)}")
    shape = tuple(out1.shape[:3]) if out1.dim() == 4 else (out1.shape[1], out1.shape[0])
    acc = accumulate_dtype(out1.dtype)
    for name, x, dtype, expected in (
        ("lse1", lse1, acc, shape),
        ("out2", out2, out1.dtype, tuple(out1.shape)),
        ("lse2", lse2, acc, shape),
    ):
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
        if tuple(x.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
