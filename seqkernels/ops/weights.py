"""The weights of attention, for who asks to see them, and what each key receives of them.

`weights` has its own op, whose gradient, ``dS = p (dP - sum_j p dP)``, is computed head by head in plain operations.
`column_sums` needs no kernel of its own: the sums ``c_j = sum_i p_ij`` are the gradient of values of size 1,
``c = dL/dg`` with ``L = sum_i (sum_j p_ij g_j)``, and their gradient for a cotangent g is that of L, attention with g
as the values.

B batch, Hq query heads, Hk key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..cells import accumulate_dtype
from ..precision import torch_products
from ..scores import Scores
from ._eager import apart, as_in_forward, gradients, insisted
from .attention import (
    _BIAS,
    _PACKED,
    _SINK,
    _library,
    _sink_gradient,
    _Tensors,
    attend,
    forward_op,
    refuse_pages,
    weights_op,
)
from .attention import backward_op as attention_backward_op

_library.define(
    f"attention_weights_backward(Tensor grad, Tensor q, Tensor k, {_PACKED}, bool average, bool[] needs)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_bias, Tensor grad_sink)"
)

#: Places of q, k, the bias and the sink among the arguments of the Functions.
_PLACES = (0, 1, 3 + _BIAS, 3 + _SINK)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """`seqkernels.ops.attention.attend` as plain operations with the (M, N) matrix in memory: for any head size."""
    from ..backends.reference.attention import attention

    return attention(q, k, v, scores)


def _dense_weights(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
    """(B, Hq, M, N) weights after dropout, differentiable any number of times."""
    from ..backends.reference.attention import drop, weigh

    scored, weights, _ = weigh(q, k, k[..., :1], scores)
    return drop(weights, scored.dropped, scores.dropout_p)


def of_heads(scores: Scores, heads: slice) -> Scores:
    """What `scores` says of some of the heads, as views. Not for dropout, which counts all heads."""

    def cut(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[1] == 1 else x[:, heads]

    slopes, sink = scores.alibi_slopes, scores.sink
    return scores._replace(
        mask=cut(scores.mask),
        bias=cut(scores.bias),
        alibi_slopes=None if slopes is None else slopes[..., heads].contiguous(),
        sink=None if sink is None else sink[heads],
    )


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, scores: Scores, average: bool, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, bias and sink by the matrices (M, N) of one head at a time; differentiable.

    The log-sum-exp is computed again: one that was rounded otherwise than the scores here makes the difference
    ``dP - sum_j p dP`` wrong by as much as the sum is larger than it.
    """
    from ..backends.reference.attention import drop, dropped, unpad, weigh

    group = q.shape[1] // max(k.shape[1], 1)
    parts: list[list[Tensor]] = [[], [], [], []]
    for head in range(q.shape[1]):
        one = slice(head, head + 1)
        key = k[:, head // group : head // group + 1]
        part = of_heads(scores, one)._replace(dropout_p=0.0, seed=None)
        scored, weights, level = weigh(q[:, one], key, key[..., :1], part)
        cotangent = grad.unsqueeze(1) / q.shape[1] if average else grad[:, one]
        if scores.dropout_p > 0.0 and scores.seed is not None:
            gone = dropped(scores.seed, scores.shape(q, k), scores.dropout_p, head)
            cotangent = drop(cotangent, gone, scores.dropout_p)
        weighed = torch.where(weights != 0, weights * cotangent, 0)
        sums = weighed.sum(-1)
        grad_scores = weighed - weights * sums.unsqueeze(-1)
        if needs[2] and part.bias is not None:
            parts[2].append(grad_scores.sum_to_size(part.bias.shape))
        if needs[3] and part.sink is not None:
            alone = torch.where(level == -torch.inf, -torch.inf, part.sink.view(-1, 1) - level).exp()
            parts[3].append(-(alone * sums).sum((0, 2)))
        if part.softcap != 0.0:
            slope = 1 - (scored.raw / part.softcap).tanh().square()
            grad_scores = torch.where(weights != 0, grad_scores * slope, 0)
        rows, keys = part.cu_seqlens_q, part.cu_seqlens_k
        if needs[0]:
            found = grad_scores @ scored.keys * part.scale
            parts[0].append(found if rows is None else unpad(found, rows, q.shape[2]))
        if needs[1]:
            found = grad_scores.transpose(2, 3) @ scored.q * part.scale
            parts[1].append(found if keys is None else unpad(found, keys, k.shape[2]))
    return [
        _join(column, x) if need and x is not None else None
        for column, x, need in zip(parts, (q, k, scores.bias, scores.sink), needs, strict=True)
    ]


def _join(parts: list[Tensor], x: Tensor) -> Tensor:
    """Gradients by query head as one of `x`, whose heads (dimension 1, of a sink 0) each had as many of them."""
    if not parts:
        return torch.zeros_like(x)
    dim = min(1, x.dim() - 1)
    group = len(parts) // x.shape[dim]
    sums = [sum(parts[first + 1 : first + group], parts[first]) for first in range(0, len(parts), group)]
    return torch.cat(sums, dim).to(x.dtype)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    tensors: _Tensors,
    numbers: list[float],
    settings: list[int],
    average: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = Scores.unpack(tensors, numbers, settings)
    with torch_products(scores.precision, q):
        found = _gradients(grad, q, k, scores, average, needs)
    a, b, c, d = (q.new_empty(0) if x is None else x.contiguous() for x in found)
    return a, b, c, d


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    tensors: _Tensors,
    numbers: list[float],
    settings: list[int],
    average: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (q, k, tensors[_BIAS], tensors[_SINK])
    a, b, c, d = (
        x.new_empty(x.shape) if need and x is not None else q.new_empty(0) for x, need in zip(given, needs, strict=True)
    )
    return a, b, c, d


_library.impl("attention_weights_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("seqkernels::attention_weights_backward", _backward_fake, lib=_library)

backward_op = torch.ops.seqkernels.attention_weights_backward.default


def _needs(ctx: Any) -> list[bool]:
    return [ctx.needs_input_grad[place] for place in _PLACES]


def _placed(ctx: Any, needs: list[bool], found: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for place, need, grad in zip(_PLACES, needs, found, strict=True):
        grads[place] = grad if need else None
    return tuple(grads)


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, lse: Tensor, *args: Any) -> Tensor:
        *tensors, numbers, settings, average = args
        ctx.save_for_backward(q, k, *tensors)
        ctx.numbers, ctx.settings, ctx.average, ctx.insisted = numbers, settings, average, insisted()
        found: Tensor = weights_op(q, k, lse, tensors, numbers, settings, average)
        return found

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, *tensors = ctx.saved_tensors
        needs = _needs(ctx)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            scores = Scores.unpack(tensors, ctx.numbers, ctx.settings)
            return _placed(ctx, needs, _gradients(grad, q, k, scores, ctx.average, needs))
        found = backward_op(grad, q, k, tensors, ctx.numbers, ctx.settings, ctx.average, needs)
        return _placed(ctx, needs, found)


class _ColumnSums(torch.autograd.Function):
    """One key head for each query head, inputs in the accumulation dtype, no dropout."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, lse: Tensor, *args: Any) -> Tensor:
        *tensors, numbers, settings = args
        ctx.save_for_backward(q, k, *tensors)
        ctx.numbers, ctx.settings, ctx.insisted = numbers, settings, insisted()
        one = q.new_ones(())
        rows, values = one.expand(*q.shape[:3], 1), one.expand(*k.shape[:3], 1)
        needs = [False, False, True, False]
        found = attention_backward_op([rows, None], q, k, values, rows, lse, tensors, numbers, settings, needs)
        sums: Tensor = found[2].squeeze(3)
        return sums.contiguous()

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, *tensors = ctx.saved_tensors
        needs = _needs(ctx)
        values = grad.unsqueeze(3)
        rows = q.new_ones(()).expand(*q.shape[:3], 1)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            scores = Scores.unpack(tensors, ctx.numbers, ctx.settings)
            inputs = apart((q, k, scores.bias, scores.sink))
            q, k, bias, sink = inputs
            assert q is not None
            assert k is not None
            out, _ = attend(q, k, values, scores._replace(bias=bias, sink=sink))
            return _placed(ctx, needs, gradients([out], [rows], inputs, needs))
        out, lse = forward_op(q, k, values, tensors, ctx.numbers, ctx.settings)
        some = [needs[0], needs[1], False, needs[2]]
        found = attention_backward_op([rows, None], q, k, values, out, lse, tensors, ctx.numbers, ctx.settings, some)
        sink = _sink_gradient(tensors[_SINK], rows, None, out, lse) if needs[3] else None
        return _placed(ctx, needs, (found[0], found[1], found[3], sink))


def _differentiated(q: Tensor, k: Tensor, scores: Scores) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, scores.bias, scores.sink))


def _plain(q: Tensor, k: Tensor, scores: Scores) -> Scores:
    """`scores` without an alignment that says nothing, as `attend` has it."""
    square = scores.cu_seqlens_q is None and scores.key_lengths is None and q.shape[2] == k.shape[2]
    return scores._replace(bottom_right=False) if square else scores


def weights(q: Tensor, k: Tensor, lse: Tensor, scores: Scores, average: bool = False) -> Tensor:
    """The weights that attention gave its values.

    They are stored only as they are returned: averaged ones by one head at a time where the implementation can, and so
    are their gradients.

    Args:
        q: (B, Hq, M, D), as in the call of `seqkernels.ops.attention.attention`.
        k: (B, Hk, N, D), likewise; pages are gathered.
        lse: (B, Hq, M), which that call returned. A function of the others here: what it requires of a gradient goes
            to `q`, `k`, the bias and the sink.
        scores: of that call. With its dropout the weights are those after it.
        average: over the heads.

    Returns:
        (B, Hq, M, N), or with `average` (B, M, N), in the accumulation dtype (float32; float64 for float64); of
        documents (`Scores.cu_seqlens_q`), with B documents, M `max_seqlen_q` and N `max_seqlen_k`. Rows whose keys are
        all masked are 0. Differentiable in `q`, `k`, the bias and the sink, any number of times.
    """
    if scores.block_table is not None:
        from ..backends.reference.attention import unpaged

        backends.note("block_table: keys are gathered before their weights are computed")
        k, _, scores = unpaged(k, k[..., :1], scores)
    scores = _plain(q, k, scores)
    if not 1 <= q.shape[3] <= 512 or k.shape[1] == 0:
        every = _dense_weights(q, k, scores)
        return every.mean(1) if average else every
    if not _differentiated(q, k, scores):
        found: Tensor = weights_op(q, k, lse, *scores.pack(), average)
        return found
    if torch.compiler.is_compiling():
        # Dynamo takes no tensor twice as an argument of a Function.
        k = k.view_as(k)
    tensors, numbers, settings = scores.pack()
    return _Weights.apply(q, k, lse.detach(), *tensors, numbers, settings, average)


def column_sums(q: Tensor, k: Tensor, lse: Tensor, scores: Scores) -> Tensor:
    """The attention that each key receives: the sum of its weights over the queries, before dropout.

    Memory is O(N), in the backward pass too. This is what token eviction ("heavy hitters", Zhang et al., "H2O", 2023)
    ranks keys by.

    Args:
        q: (B, Hq, M, D), as in the call of `seqkernels.ops.attention.attention`; D from 1 to 512.
        k: (B, Hk, N, D), likewise.
        lse: (B, Hq, M), which that call returned. A function of the others here: what it requires of a gradient goes
            to `q`, `k`, the bias and the sink.
        scores: of that call, without pages.

    Returns:
        (B, Hq, N), of each query head, in the accumulation dtype (float32; float64 for float64); of documents
        (`Scores.cu_seqlens_q`) (1, Hq, all keys). Keys that no query reads have 0. Differentiable in `q`, `k`, the
        bias and the sink, any number of times.
    """
    refuse_pages(scores)
    acc = accumulate_dtype(q.dtype)
    bias = None if scores.bias is None else scores.bias.to(acc)
    scores = _plain(q, k, scores)._replace(bias=bias, dropout_p=0.0, seed=None)
    q, k, lse = q.to(acc), k.to(acc), lse.detach()
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads == kv_heads:
        return _column_sums(q, k, lse, scores)
    group = heads // kv_heads
    found = []
    for head in range(kv_heads):
        part = slice(head * group, (head + 1) * group)
        key = k[:, head : head + 1].expand(-1, group, -1, -1)
        found.append(_column_sums(q[:, part], key, lse[:, part], of_heads(scores, part)))
    return torch.cat(found, 1)


def _column_sums(q: Tensor, k: Tensor, lse: Tensor, scores: Scores) -> Tensor:
    if torch.compiler.is_compiling():
        k = k.view_as(k)
    tensors, numbers, settings = scores.pack()
    return _ColumnSums.apply(q, k, lse, *tensors, numbers, settings)
