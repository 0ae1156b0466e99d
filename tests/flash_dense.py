"""Attention as flash-attn's docstrings describe it, sequence by sequence and head by head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import seqkernels
from seqkernels import backends, testing
from seqkernels.cells import accumulate_dtype

Results = dict[str, Tensor]
#: Whether elements and keys are taken in reverse order, and whether gradients round as those of tiled kernels.
VARIANTS = [(False, False), (True, False), (False, True), (True, True)]


def one_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: tuple[bool, bool],
    *,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    slope: Tensor | None,
    dropped: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Queries (M, D), keys (N, D) and values (N, Dv) of one head: (M, Dv) and (M,)."""
    dtype, acc = q.dtype, accumulate_dtype(q.dtype)
    queries, keys = q.shape[0], k.shape[0]
    back = (lambda x, *dims: x.flip(dims)) if variant[0] else (lambda x, *dims: x)
    i, j = torch.arange(queries).unsqueeze(1) + keys - queries, torch.arange(keys)
    keep = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        keep &= j <= i
    if window[0] >= 0:
        keep &= j >= i - window[0]
    if window[1] >= 0 and not causal:
        keep &= j <= i + window[1]
    s = back(q, 1).to(acc) @ back(k, 1).to(acc).t() * (q.shape[1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        s = softcap * (s / softcap).tanh()
    if slope is not None:
        s = s - slope.to(acc) * (i - j).abs()
    alive = keep.any(1, keepdim=True)
    s = back(torch.where(alive, s.masked_fill(~keep, -torch.inf), 0), 1)
    level = s.logsumexp(1, keepdim=True) if keys else s.sum(1, keepdim=True)
    p = (s - (level.detach() if variant[1] else level)).exp()
    p = torch.where(back(keep, 1), p, 0)
    if dropped is not None:
        p = torch.where(back(dropped, 1), 0, p / max(1 - dropout_p, 2.0**-60))
    out = p.to(dtype) @ back(v, 0)
    if variant[1]:
        out = out - (out.detach() * (level - level.detach())).to(dtype)
    return out, torch.where(alive, level, -torch.inf).squeeze(1)


def dense(
    sequences: Sequence[tuple[Tensor, Tensor, Tensor]],
    variant: tuple[bool, bool] = (False, False),
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropped: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries (M, H, D), keys and values of each sequence: (M, H, Dv) and (H, M) of each."""
    outs, levels = [], []
    for b, (q, k, v) in enumerate(sequences):
        heads = []
        for h in range(q.shape[1]):
            slope = None if alibi_slopes is None else alibi_slopes.expand(len(sequences), -1)[b, h]
            of = h // (q.shape[1] // k.shape[1])
            heads.append(
                one_head(
                    q[:, h],
                    k[:, of],
                    v[:, of],
                    variant,
                    scale=softmax_scale,
                    causal=causal,
                    window=window_size,
                    softcap=softcap,
                    slope=slope,
                    dropped=None if dropped is None else dropped[b, h, : q.shape[0], : k.shape[0]],
                    dropout_p=dropout_p,
                )
            )
        outs.append(torch.stack([out for out, _ in heads], 1))
        levels.append(torch.stack([level for _, level in heads]))
    return outs, levels


def dense_batch(q: Tensor, k: Tensor, v: Tensor, variant: tuple[bool, bool], **options: Any) -> tuple[Tensor, Tensor]:
    """`dense` of (B, M, H, D), (B, N, Hk, D) and (B, N, Hk, Dv): (B, M, H, Dv) and (B, H, M)."""
    outs, levels = dense(list(zip(q, k, v, strict=True)), variant, **options)
    return torch.stack(outs), torch.stack(levels)


def everywhere() -> Iterator[str]:
    """Each implementation in turn, insisted on."""
    for name in backends.NAMES:
        if backends.backend(name).unavailable() is None:
            with seqkernels.use_backend(name), testing.threads(1), testing.poisoned_empty():
                yield name


def on_all(fn: Callable[[], Results]) -> Iterator[tuple[str, Results]]:
    """What `fn` gives with each implementation that can run its call; the reference can run every call."""
    for name in everywhere():
        try:
            found = fn()
        except backends.BackendError:
            assert name != "reference"
            continue
        yield name, found


def evaluate(fn: Callable[..., Any], tensors: Mapping[str, Tensor], grads: Results | None = None) -> Results:
    """``out``, ``lse`` and the gradients of `tensors` from `grads`."""
    leaves = {name: x.detach().requires_grad_(grads is not None) for name, x in tensors.items()}
    out, lse = fn(**leaves)[:2]
    results = {"out": out.detach(), "lse": lse.detach()}
    if grads is not None:
        cotangents = [grads["out"].to(out.dtype), grads["lse"].to(lse.dtype)]
        found = torch.autograd.grad((out, lse), list(leaves.values()), cotangents, materialize_grads=True)
        results |= {f"grad_{name}": x for name, x in zip(leaves, found, strict=True)}
    return results


def judge(
    found: Results,
    oracle: Callable[..., tuple[Tensor, Tensor]],
    tensors: Mapping[str, Tensor],
    grads: Results | None = None,
) -> None:
    """Assert that `found` is within the error budget of `oracle`, which takes `tensors` and ``variant``."""
    dtype = found["out"].dtype

    def run(to: torch.dtype, variant: tuple[bool, bool]) -> Results:
        cast = {name: x.detach().to(to) for name, x in tensors.items()}
        return evaluate(lambda **leaves: oracle(**leaves, variant=variant), cast, grads)

    exact = run(torch.float64, VARIANTS[0])
    dtypes = (torch.float32, torch.float64) if dtype == torch.float64 else (dtype,)
    own = [run(to, variant) for to in dtypes for variant in VARIANTS]
    for name, x in found.items():
        assert x.dtype == (accumulate_dtype(dtype) if name == "lse" else dtype), name
        # A log-sum-exp near 0 is the difference of a score and a logarithm, and has their errors.
        lift = 1.0 if name == "lse" else 0.0
        testing.assert_within_budget(x + lift, exact[name] + lift, [results[name] + lift for results in own], name)
