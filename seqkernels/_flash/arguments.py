"""What the functions of flash-attn have in common: checks of arguments, and the scores that they make."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ..cells import DTYPES
from ..ops.attention import attend
from ..scores import UNBOUNDED, Scores


def check_tensor(name: str, x: Any, layout: str, q: Any) -> None:
    """Raise unless `x` is a tensor with the dimensions of `layout`, of the dtype and on the device of `q`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{name}: expected {layout}, got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {DTYPES}, got {x.dtype}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: expected {q.dtype} as q, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected on {q.device} as q, got {x.device}")


def check_int32(name: str, x: Any, shape: str, sizes: tuple[int | None, ...], q: Tensor) -> None:
    """Raise unless `x` is an int32 tensor of `sizes`, ``None`` for any, on the device of `q`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected torch.int32, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected on {q.device} as q, got {x.device}")
    if x.dim() != len(sizes) or any(want not in (None, have) for have, want in zip(x.shape, sizes, strict=True)):
        raise ValueError(f"{name}: expected {shape}, got shape {tuple(x.shape)}")


def check_heads(q: Any, k: Any, v: Any, layout: str, key_layout: str, names: tuple[str, str] = ("k", "v")) -> None:
    """Raise unless heads, head sizes, dtypes and devices of `q`, keys and values fit."""
    check_tensor("q", q, layout, q)
    for name, x in zip(names, (k, v), strict=True):
        check_tensor(name, x, key_layout, q)
    heads, size = q.shape[-2:]
    if k.shape[-1] != size or k.shape[-2] == 0 or heads % k.shape[-2] != 0:
        raise ValueError(
            f"{names[0]}: expected headdim {size} as q and a number of heads that divides its {heads},"
            f" got shape {tuple(k.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"{names[1]}: expected {tuple(k.shape[:-1])} as {names[0]}, and headdim, got {tuple(v.shape)}")
    for name, x in (("q", q), (names[1], v)):
        if not 1 <= x.shape[-1] <= 512:
            raise ValueError(f"{name}: expected headdim from 1 to 512, got {x.shape[-1]}")


def build_scores(
    q: Tensor,
    queries: int,
    keys: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float = 0.0,
) -> Scores:
    """What the arguments that all functions share make of the scores, of at most this many `queries` and `keys`."""
    left, right = check_window(window_size)
    if causal:
        right = 0
    # No bound that every key of every query keeps: then plain kernels serve the call.
    if left >= keys - 1:
        left = UNBOUNDED
    if right >= queries - 1:
        right = UNBOUNDED
    return Scores(
        scale=q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale),
        left=left,
        right=right,
        bottom_right=left != UNBOUNDED or right != UNBOUNDED or alibi_slopes is not None,
        alibi_slopes=alibi_slopes,
        softcap=max(float(softcap), 0.0),
        dropout_p=float(dropout_p),
        seed=torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu").to(q.device) if dropout_p > 0.0 else None,
    )


def check_window(window_size: Any) -> tuple[int, int]:
    """(left, right) of a window.

    Raises:
        ValueError, TypeError: names `window_size`.
    """
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"window_size: expected (left, right), got {window_size!r}")
    left, right = (integer("window_size", x) for x in window_size)
    if left < UNBOUNDED or right < UNBOUNDED:
        raise ValueError(f"window_size: expected at least 0, or {UNBOUNDED} for no bound, got {(left, right)}")
    return left, right


def integer(name: str, x: Any) -> int:
    """`x` as a number; raises a TypeError that names it."""
    if isinstance(x, int):
        return x
    try:
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(x).__name__}") from None


def run(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attention of (B, H, L, D) in the dtype of its inputs, also under autocast, as flash-attn has it."""
    kind = q.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return attend(q, k, v, scores)
    return attend(q, k, v, scores)
