"""Attention in plain PyTorch, with the whole (M, N) matrix in memory.

`attention` is differentiable by autograd and serves as the oracle; `attention_backward` is the same mathematics by
hand (``docs/attention.md``), as the op needs it, and is tested against autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...cells import accumulate_dtype


def _heads(x: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated so that each query head has its own."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)


def _keep(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, is_causal: bool) -> Tensor:
    """(B, Hq, M, N) bool: which keys each query may read."""
    shape = (*q.shape[:3], k.shape[2])
    keep = torch.ones(shape, dtype=torch.bool, device=q.device)
    if mask is not None:
        keep = keep & mask
    if bias is not None:
        keep = keep & (bias != -torch.inf)
    return keep.tril() if is_causal else keep


def _scores(q: Tensor, k: Tensor, keep: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(B, Hq, M, N) scaled scores, -inf where a key is masked; q, k and bias in the accumulation dtype."""
    poison = torch.where(k.isfinite().all(-1), 0.0, torch.nan).to(q.dtype).unsqueeze(2)
    scores = q @ _finite(k).transpose(2, 3) * scale + poison
    if bias is not None:
        scores = scores + torch.where(bias == -torch.inf, 0, bias)
    return torch.where(keep, scores, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 in rows whose keys are all masked."""
    return (scores - torch.where(lse == -torch.inf, 0, lse).unsqueeze(-1)).exp()


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention as differentiable dense tensor operations.

    Args:
        q, k, v, mask, bias, scale, is_causal: as in `seqkernels.ops.attention.attention`.

    Returns:
        ``out`` (B, Hq, M, Dv) and ``lse`` (B, Hq, M).
    """
    acc = accumulate_dtype(q.dtype)
    heads = q.shape[1]
    keys, values = _heads(k, heads).to(acc), _heads(v, heads).to(acc)
    keep = _keep(q, k, mask, bias, is_causal)
    scores = _scores(q.to(acc), keys, keep, None if bias is None else bias.to(acc), scale)
    alive = keep.any(-1)
    lse = torch.where(alive, torch.where(keep, scores, torch.finfo(acc).min).logsumexp(-1), -torch.inf)
    weights = torch.where(keep, (scores - torch.where(alive, lse, 0).unsqueeze(-1)).exp(), 0)
    out = weights @ _finite(values)
    leaks = keep.to(acc) @ (~values.isfinite()).to(acc) > 0
    out = torch.where(leaks, torch.nan, out)
    return out.to(q.dtype), lse


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """``seqkernels::attention_forward``."""
    out, lse = attention(q, k, v, mask, bias, scale, is_causal)
    return _rows_of_heads(out), lse


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    is_causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``seqkernels::attention_backward``.

    Args:
        grad_out: (B, Hq, M, Dv).
        q, k, v, mask, bias, scale, is_causal: as in the forward pass.
        lse: (B, Hq, M), from the forward pass.
        delta: (B, Hq, M), the row sums of ``grad_out * out``, less the gradient of lse.
        bias_grad: whether the gradient of `bias` is wanted.

    Returns:
        Gradients of q, k, v and bias (empty unless wanted).
    """
    acc = accumulate_dtype(q.dtype)
    heads = q.shape[1]
    keys, values = _heads(k, heads).to(acc), _heads(v, heads).to(acc)
    keep = _keep(q, k, mask, bias, is_causal)
    scores = _scores(q.to(acc), keys, keep, None if bias is None else bias.to(acc), scale)
    weights = torch.where(keep, _probabilities(scores, lse), 0)
    grad = grad_out.to(acc)
    grad_weights = grad @ _finite(values).transpose(2, 3)
    grad_scores = torch.where(keep, weights * (grad_weights - delta.unsqueeze(-1)), 0)
    grad_q = grad_scores @ _finite(keys) * scale
    grad_k = grad_scores.transpose(2, 3) @ q.to(acc) * scale
    grad_v = weights.transpose(2, 3) @ grad
    grad_bias = grad_scores.sum_to_size(bias.shape) if bias is not None and bias_grad else grad_q.new_empty(0)
    return (
        _rows_of_heads(grad_q.to(q.dtype)),
        _rows_of_heads(_ungroup(grad_k, k).to(q.dtype)),
        _rows_of_heads(_ungroup(grad_v, v).to(q.dtype)),
        grad_bias.to(q.dtype),
    )


def _ungroup(grad: Tensor, x: Tensor) -> Tensor:
    """Gradients of repeated heads summed over each group."""
    return grad if grad.shape[1] == x.shape[1] else grad.unflatten(1, (x.shape[1], -1)).sum(2)


def _rows_of_heads(x: Tensor) -> Tensor:
    """`x` (B, H, L, D) laid out in memory as (B, L, H, D), as the contract has it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
