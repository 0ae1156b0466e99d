"""The attention contract.

``out = softmax(scores) v`` over the keys that each query may read, together with the log-sum-exp of each row's scores;
`seqkernels.scores.Scores` says what the scores are made of. Tiled implementations never store the (M, N) matrix. The
mathematics is in ``docs/attention.md``.

B batch, Hq query heads, Hk key/value heads (Hq a multiple of Hk), M queries, N keys, D head size, Dv value size.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from .. import backends
from ..cells import accumulate_dtype
from ..precision import torch_products
from ..scores import UNBOUNDED, Scores
from . import _eager
from ._eager import (
    as_in_forward,
    batched,
    eager,
    eager_on_gpu,
    insisted,
    plain_on_gpu,
    records,
    refuse_tangents,
    transformed,
)
from .attention_check import check

_library = torch.library.Library("seqkernels", "FRAGMENT")
_PACKED = "Tensor?[] tensors, float[] numbers, int[] settings"
_library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_PACKED}) -> (Tensor out, Tensor lse)")
_library.define(
    f"attention_backward(Tensor?[] grads, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_PACKED},"
    " bool[] needs) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)"
)
_library.define(f"attention_weights(Tensor q, Tensor k, Tensor lse, {_PACKED}, bool average) -> Tensor")

_Tensors = list[Tensor | None]


def _implementation(q: Tensor, k: Tensor, scores: Scores, *more: str) -> Any:
    features = scores.features(q, k)
    if more:
        features = tuple(sorted((*features, *more)))
    return backends.implementation(backends.Call("attention", q.device.type, q.dtype, "", features))


def _unpacked(tensors: _Tensors, numbers: list[float], settings: list[int]) -> Scores:
    return Scores.unpack([_resolved(x) for x in tensors], numbers, settings)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, tensors: _Tensors, numbers: list[float], settings: list[int]
) -> tuple[Tensor, Tensor]:
    refuse_tangents(q, k, v, *tensors)
    scores = _unpacked(tensors, numbers, settings)
    found: tuple[Tensor, Tensor] = _implementation(q, k, scores).attention_forward(q, k, v, scores)
    return found


def _backward(
    grads: _Tensors,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tensors: _Tensors,
    numbers: list[float],
    settings: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    refuse_tangents(*grads, q, k, v, *tensors)
    scores = _unpacked(tensors, numbers, settings)
    refuse_pages(scores)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _implementation(q, k, scores).attention_backward(
        *map(_resolved, grads), q, k, v, out, lse, scores, needs
    )
    return found


def _weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    tensors: _Tensors,
    numbers: list[float],
    settings: list[int],
    average: bool,
) -> Tensor:
    refuse_tangents(q, k, lse, *tensors)
    scores = _unpacked(tensors, numbers, settings)
    refuse_pages(scores)
    with torch_products(scores.precision, q):
        found: Tensor = _implementation(q, k, scores, "weights").attention_weights(q, k, lse, scores, average)
    return found


def refuse_pages(scores: Scores) -> None:
    """Raise a ValueError for keys and values in pages, which have the forward pass alone."""
    if scores.block_table is not None:
        raise ValueError("block_table: expected None, as pages have the forward pass alone, got a Tensor")


def rows_of_heads(x: Tensor, size: int) -> Tensor:
    """An empty (B, H, L, size) tensor like `x` (B, H, L, ...) that lies in memory as (B, L, H, size)."""
    batch, heads, length = x.shape[:3]
    return x.new_empty((batch, length, heads, size)).transpose(1, 2)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, tensors: _Tensors, numbers: list[float], settings: list[int]
) -> tuple[Tensor, Tensor]:
    return rows_of_heads(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


def _backward_fake(
    grads: _Tensors,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tensors: _Tensors,
    numbers: list[float],
    settings: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = Scores.unpack(tensors, numbers, settings).bias
    grad_q, grad_k, grad_v = (
        rows_of_heads(x, x.shape[3]) if need else x.new_empty(0) for x, need in zip((q, k, v), needs, strict=False)
    )
    grad_bias = q.new_empty(0) if bias is None or not needs[3] else bias.new_empty(bias.shape)
    return grad_q, grad_k, grad_v, grad_bias


def _weights_fake(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    tensors: _Tensors,
    numbers: list[float],
    settings: list[int],
    average: bool,
) -> Tensor:
    batch, heads, queries, keys = Scores.unpack(tensors, numbers, settings).shape(q, k)
    return lse.new_empty((batch, queries, keys) if average else (batch, heads, queries, keys))


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("attention_weights", _weights, "CompositeExplicitAutograd")
torch.library.register_fake("seqkernels::attention_forward", _forward_fake, lib=_library)
torch.library.register_fake("seqkernels::attention_backward", _backward_fake, lib=_library)
torch.library.register_fake("seqkernels::attention_weights", _weights_fake, lib=_library)

forward_op = torch.ops.seqkernels.attention_forward.default
backward_op = torch.ops.seqkernels.attention_backward.default
weights_op = torch.ops.seqkernels.attention_weights.default


#: Places of the bias and the sink among the packed tensors, which are arguments 3 and on of the Function.
_BIAS, _SINK = 1, 6


class _Attention(torch.autograd.Function):
    """Arguments: q, k, v, the packed scores, and the module to call at once, or ``None`` for the ops."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, numbers, settings, module = args
        if module is None:
            out, lse = forward_op(q, k, v, tensors, numbers, settings)
        else:
            out, lse = module.attention_forward(q, k, v, Scores.unpack(tensors, numbers, settings))
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.numbers, ctx.settings, ctx.module, ctx.insisted = numbers, settings, module, insisted()
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        given = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(given)
        if grad_out is None and grad_lse is None:
            return tuple(grads)
        needs = [given[0], given[1], given[2], given[3 + _BIAS]]
        grad_out, grad_lse = _resolved(grad_out), _resolved(grad_lse)
        compiling = torch.compiler.is_compiling()
        if not compiling and (torch.is_grad_enabled() or batched(grad_out) or batched(grad_lse)):
            needs.append(given[3 + _SINK])
            found = _differentiable_backward(ctx, needs, grad_out, grad_lse)
            grads[3 + _SINK] = found[4]
        else:
            q, k, v, out, lse, *tensors = ctx.saved_tensors
            packed = (tensors, ctx.numbers, ctx.settings)
            found = (None,) * 4
            if True in needs:
                direct = ctx.module is not None and backends.may_repeat(_direct(q))
                if direct and _passes(grad_out) and _passes(grad_lse):
                    scores = Scores.unpack(*packed)
                    found = ctx.module.attention_backward(grad_out, grad_lse, q, k, v, out, lse, scores, needs)
                else:
                    found = backward_op([grad_out, grad_lse], q, k, v, out, lse, *packed, needs)
            if given[3 + _SINK]:
                grads[3 + _SINK] = _sink_gradient(tensors[_SINK], grad_out, grad_lse, out, lse)
        for place, need, grad in zip((0, 1, 2, 3 + _BIAS), needs, found, strict=False):
            if need:
                grads[place] = grad
        return tuple(grads)


def _passes(grad: Tensor | None) -> bool:
    """Whether an implementation may have a gradient as it is."""
    return grad is None or eager(grad) or eager_on_gpu(grad)


def _direct(q: Tensor) -> str:
    """The implementation that is called without the dispatcher on the device of `q`."""
    return "triton" if q.is_cuda else "native"


def _resolved(x: Tensor | None) -> Tensor | None:
    """`x` in memory as it is: of tensors in lists the dispatcher does not resolve the negative bit."""
    return x if x is None or torch.compiler.is_compiling() or not x.is_neg() else x.resolve_neg()


# `Function.apply` without what it does for functional transforms, of which there are none.
_apply = super(torch.autograd.Function, _Attention).apply


def _sink_gradient(sink: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """The sink's weight in each row, times what its rise takes from the row."""
    loss = torch.zeros_like(lse) if grad_lse is None else -grad_lse
    if grad_out is not None:
        loss = loss + (grad_out.to(lse.dtype) * out).sum(-1)
    # Rows of no document have no log-sum-exp.
    weight = torch.where(lse == -torch.inf, 0, (sink.view(-1, 1) - lse).exp())
    return -(weight * loss).sum((0, 2))


def _differentiable_backward(
    ctx: Any, needs: list[bool], grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients by operations, for the second order and for many at once, from the saved inputs.

    A graph if gradients are recorded.
    """
    from ..backends.reference.attention import attention as reference

    q, k, v, _, _, *tensors = ctx.saved_tensors
    scores = Scores.unpack(tensors, ctx.numbers, ctx.settings)
    with torch.enable_grad():
        # Views: one input may be another, or come from it, and yet gets a gradient of its own.
        q, k, v = (x.view_as(x) for x in (q, k, v))
        bias, sink = (None if x is None else x.view_as(x) for x in (scores.bias, scores.sink))
        inputs = (q, k, v, bias, sink)
        outputs = reference(q, k, v, scores._replace(bias=bias, sink=sink))
        pairs = [(out, grad) for out, grad in zip(outputs, (grad_out, grad_lse), strict=True) if grad is not None]
        wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed and x is not None]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=True, allow_unused=True
            )
        )
    made = tuple(next(found) if needed else None for needed in needs)
    return made if torch.is_grad_enabled() else tuple(x if x is None else x.clone() for x in made)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention with its log-sum-exp.

    Args:
        q: (B, Hq, M, D), float32, float64, bfloat16 or float16, D from 1 to 512; any strides.
        k: (B, Hk, N, D), Hq a multiple of Hk: query head h reads key head ``h // (Hq // Hk)``.
        v: (B, Hk, N, Dv). With `block_table` k and v are (pages, Hk, page_size, ...), see there.
        mask: see `seqkernels.scores.Scores`, as all others.
        bias: likewise.
        scale: factor on ``q k^T``; 1/sqrt(D) by default.
        is_causal: short for ``right=0``: query i sees keys 0..i.
        **options: the other fields of `seqkernels.scores.Scores`.

    Returns:
        ``out`` (B, Hq, M, Dv), laid out in memory as (B, M, Hq, Dv), and ``lse`` (B, Hq, M) in float32 (float64
        for float64 inputs), with the sink in it. A row whose keys are all masked gives 0 and -inf and zero gradients;
        NaN in masked keys and values has no influence. So do rows of `q` that belong to no document.

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed.
    """
    if is_causal:
        options["right"] = 0
    scores = Scores(1.0 if scale is None else scale, mask, bias, **options)
    check(q, k, v, scores)
    return attend(q, k, v, scores._replace(scale=q.shape[3] ** -0.5) if scale is None else scores)


def attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """`attention` of arguments that are known to be right."""
    if scores.bottom_right and scores.cu_seqlens_q is None and scores.key_lengths is None:
        _, _, queries, keys = scores.shape(q, k)
        if queries == keys:
            scores = scores._replace(bottom_right=False)
    bias, sink, slopes = _resolved(scores.bias), _resolved(scores.sink), _resolved(scores.alibi_slopes)
    if bias is not scores.bias or sink is not scores.sink or slopes is not scores.alibi_slopes:
        scores = scores._replace(bias=bias, sink=sink, alibi_slopes=slopes)
    module = _compiled(q, k, v, scores)
    if module is None and _eager.exporter is not None and (exporter := _eager.exporting()) is not None:
        return exporter.attend(q, k, v, scores)
    if module is None and transformed():
        backends.note("torch.func, forward mode or tracing: attention with its (M, N) weights in memory")
        return attend_densely(q, k, v, scores)
    if torch.is_grad_enabled() and records(q, k, v, bias, sink):
        if scores.block_table is not None:
            raise ValueError(
                "block_table: expected None where q, k, v, the bias or the sink requires a gradient, which pages do not"
                " give; call it under torch.no_grad()"
            )
        if torch.compiler.is_compiling():
            # Dynamo takes no tensor twice as an argument of a Function.
            k, v = k.view_as(k), v.view_as(v)
        tensors, numbers, settings = scores.pack()
        if module is not None:
            found: tuple[Tensor, Tensor] = _apply(q, k, v, *tensors, numbers, settings, module)
            return found
        return _Attention.apply(q, k, v, *tensors, numbers, settings, None)
    if module is not None:
        found = module.attention_forward(q, k, v, scores)
        return found
    return forward_op(q, k, v, *scores.pack())


def attend_densely(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """`attend` as operations that every transform and exporter knows, with the (M, N) weights in memory."""
    from ..backends.reference.attention import attention as reference

    return reference(q, k, v, scores)


def plain_weights(q: Tensor, k: Tensor, lse: Tensor, scores: Scores, average: bool) -> Tensor:
    """`seqkernels.ops.weights.weights` as operations that every transform knows; `lse` too has its derivative."""
    from ..backends.reference.attention import attention_weights

    return attention_weights(q, k, lse, scores, average)


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, is_causal: bool, grouped: bool
) -> Tensor | None:
    """The output of plain attention where the way to the kernel takes as long as a small kernel.

    Args:
        q, k, v, scale, is_causal: as in `attention`; they need not be right, nor have four dimensions.
        grouped: whether q may have more heads than k.

    Returns:
        ``out``, or ``None`` where the call has to go through `attention`, which then says what is wrong with it: other
        devices, subclasses, strides that the compiled module does not take, transforms and the like.
    """
    try:
        if not (plain_on_gpu(q, k, v) if q.is_cuda else eager(q, k, v) and k.is_cpu and v.is_cpu):
            return None
        if not backends.may_repeat(_direct(q)):
            return None
        _, heads, _, size = q.shape
        _, kv_heads, _, value_size = v.shape
        if not 1 < size <= 512 or not 1 < value_size <= 512 or (heads != kv_heads and not grouped):
            return None
        # What can change without being another must not be part of the key.
        if type(is_causal) is not bool or (scale is not None and type(scale) is not float):
            return None
        call = (q.dtype, q.is_cuda, is_causal, size, scale)
        found = _plain_calls.get(call)
        if found is None:
            scores = Scores(size**-0.5 if scale is None else float(scale), right=0 if is_causal else UNBOUNDED)
            found = _plain_calls[call] = (scores, _compiled(q, k, v, scores))
            if len(_plain_calls) > _PLAIN_CALLS:
                _plain_calls.clear()
        scores, module = found
        if module is None:
            return None
        if not q.is_cuda:
            return _direct_output(module, q, k, v, scores)
    except (TypeError, ValueError, AttributeError):
        return None
    # All was looked at: what it raises is not for another way to try.
    return _direct_output(module, q, k, v, scores)


def _direct_output(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    if torch.is_grad_enabled() and records(q, k, v):
        tensors, numbers, settings = scores.pack()
        return cast(Tensor, _apply(q, k, v, *tensors, numbers, settings, module)[0])
    return cast(Tensor, module.attention_forward(q, k, v, scores, False)[0])


_plain_calls: dict[Any, tuple[Scores, ModuleType | None]] = {}
_PLAIN_CALLS = 256
_modules: dict[Any, ModuleType | None] = {}


def _compiled(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> ModuleType | None:
    """The module to call at once, without the dispatcher: native's or Triton's, for plain tensors in eager mode."""
    _, mask, bias, left, right, bottom_right, lengths, cu_q, cu_k, _, _, slopes, softcap, sink, _, seed, table, _ = (
        scores
    )
    plain = mask is bias is lengths is cu_q is slopes is sink is seed is table is None
    find = eager_on_gpu if q.is_cuda else eager
    if not (find(q, k, v) if plain else find(q, k, v, mask, bias, lengths, cu_q, cu_k, slopes, sink, seed, table)):
        return None
    # Of one element a row may be part of a complex number, negated by a bit that memory does not show.
    name = _direct(q)
    if q.shape[-1] <= 1 or v.shape[-1] <= 1 or not backends.may_repeat(name):
        return None
    if plain and softcap == 0.0 and left < 0 and not bottom_right:
        key: Any = (name, q.dtype, right, q.shape[1] == k.shape[1])
    else:
        key = (name, q.dtype, scores.features(q, k))
    if key not in _modules:
        chosen = backends.choice(backends.Call("attention", q.device.type, q.dtype, "", scores.features(q, k)))
        _modules[key] = backends.module(name, "attention") if chosen == name else None
    return _modules[key]
