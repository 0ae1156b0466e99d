"""Attention on the CPU in tiles with an online softmax: memory grows with M and N, never with their product.

Keys and values are repacked once per call into the panels that the matrix product wants (`simd.panels`); q, mask
and bias are read where they lie, with their strides. The forward pass divides its work by blocks of queries, the
backward pass by heads. Mathematics: ``docs/attention.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...cells import accumulate_dtype
from ...scores import Scores
from .simd import PANEL_BYTES, Array, add_product, exp, exp_minus, flat, kernel, panels, strided
from .team import run, team_size

QUERY_BLOCK = 64
#: A multiple of the columns of a panel.
KEY_BLOCK = 128
CHUNKS_PER_THREAD = 4

_Strides = tuple[int, ...]


class _Inputs(NamedTuple):
    """What the scores are computed from, in both directions. W: columns of a panel."""

    q: Array  # (B, Hq, M, D), strided
    q_strides: _Strides
    keys: Array  # (B, Hk, P, D, W): panels of k transposed
    poison: Array  # (B, Hk, N): NaN for keys with a component that is not finite, else 0; empty if there is none
    mask: Array  # (B, Hq, M, N), strided; empty if there is none
    mask_strides: _Strides
    bias: Array  # likewise
    bias_strides: _Strides
    heads: int
    kv_heads: int
    num_queries: int
    num_keys: int
    size: int
    value_size: int
    scale: float
    is_causal: bool


@kernel
def _line(x: Array, at: int, step: int, count: int, scratch: Array) -> Array:
    """`count` elements of x from `at`, `step` apart, as a contiguous array."""
    if step == 1:
        return x[at : at + count]
    for j in range(count):
        scratch[j] = x[at + j * step]
    return scratch[:count]


@kernel
def _scores(x: _Inputs, b: int, h: int, m0: int, rows: int, n0: int, count: int, s: Array) -> None:
    """Scores of `rows` queries from m0 and `count` keys from n0; -inf where masked and beyond the keys.

    `s` is (QUERY_BLOCK, KEY_BLOCK); its columns are filled up to a whole panel.
    """
    width = PANEL_BYTES // s.itemsize
    columns = -(-count // width)
    end = columns * width
    kv = b * x.kv_heads + h // (x.heads // x.kv_heads)
    scale = s.dtype.type(x.scale)
    low = s.dtype.type(-np.inf)
    origin, row_stride = np.intp(0), np.intp(KEY_BLOCK)
    s_flat = s.reshape(-1)
    s[:rows, :end] = s.dtype.type(0)
    panel = x.size * width
    add_product(
        x.q, b * x.q_strides[0] + h * x.q_strides[1] + m0 * x.q_strides[2], x.q_strides[2], x.q_strides[3],
        x.keys, (kv * (-(-x.num_keys // width)) + n0 // width) * panel, panel, x.size,
        s_flat, origin, row_stride, rows, columns,
    )  # fmt: skip
    biases = np.empty(KEY_BLOCK, s.dtype)
    kept = np.empty(KEY_BLOCK, np.bool_)
    for r in range(rows):
        line = s[r, :end]
        for j in range(end):
            line[j] *= scale
        part = line[:count]
        if x.poison.size:
            part += x.poison[kv * x.num_keys + n0 : kv * x.num_keys + n0 + count]
        if x.bias.size:
            b_s = x.bias_strides
            added = _line(x.bias, b * b_s[0] + h * b_s[1] + (m0 + r) * b_s[2] + n0 * b_s[3], b_s[3], count, biases)
            for j in range(count):
                part[j] = low if added[j] == low else part[j] + added[j]
        if x.mask.size:
            m_s = x.mask_strides
            keep = _line(x.mask, b * m_s[0] + h * m_s[1] + (m0 + r) * m_s[2] + n0 * m_s[3], m_s[3], count, kept)
            for j in range(count):
                part[j] = part[j] if keep[j] else low
        if x.is_causal:
            line[max(0, min(end, m0 + r + 1 - n0)) :] = low
        line[count:] = low


@kernel
def _highest(line: Array, lanes: Array) -> float:
    """The greatest element that is not NaN; the size of `line` is a multiple of that of `lanes`, which is scratch."""
    lanes[:] = line[: lanes.size]
    for start in range(lanes.size, line.size, lanes.size):
        part = line[start : start + lanes.size]
        for j in range(lanes.size):
            lanes[j] = part[j] if part[j] > lanes[j] else lanes[j]
    highest = lanes.dtype.type(-np.inf)
    for j in range(lanes.size):
        highest = lanes[j] if lanes[j] > highest else highest
    return highest


@kernel
def _forward(
    x: _Inputs,
    values: Array,  # (B, Hk, P, N, W): panels of v
    taint: Array,  # (B, Hk, N, Dv): NaN where v is not finite, else 0; empty if there is none
    out: Array,  # (B, M, Hq, Dv), out
    lse: Array,  # (B, Hq, M), out
    begin: int,
    end: int,
) -> None:
    """Blocks `begin` to `end` of the queries of all heads."""
    width = PANEL_BYTES // out.itemsize
    value_columns = -(-x.value_size // width)
    low, zero = out.dtype.type(-np.inf), out.dtype.type(0)
    origin, adjacent, row_stride = np.intp(0), np.intp(1), np.intp(KEY_BLOCK)
    s = np.empty((QUERY_BLOCK, KEY_BLOCK), out.dtype)
    lanes = np.empty(width, out.dtype)
    acc = np.empty((QUERY_BLOCK, value_columns * width), out.dtype)
    top = np.empty(QUERY_BLOCK, out.dtype)
    total = np.empty(QUERY_BLOCK, out.dtype)
    blocks = -(-x.num_queries // QUERY_BLOCK)
    for unit in range(begin, end):
        b, h = unit // blocks // x.heads, unit // blocks % x.heads
        kv = b * x.kv_heads + h // (x.heads // x.kv_heads)
        m0 = unit % blocks * QUERY_BLOCK
        rows = min(QUERY_BLOCK, x.num_queries - m0)
        limit = min(x.num_keys, m0 + rows) if x.is_causal else x.num_keys
        acc[:rows] = zero
        top[:] = low
        total[:] = zero
        for n0 in range(0, limit, KEY_BLOCK):
            count = min(KEY_BLOCK, limit - n0)
            _scores(x, b, h, m0, rows, n0, count, s)
            padded = -(-count // width) * width
            for r in range(rows):
                line, sums = s[r, :padded], acc[r]
                if taint.size:
                    for j in range(count):
                        if line[j] != low:
                            at = (kv * x.num_keys + n0 + j) * x.value_size
                            sums[: x.value_size] += taint[at : at + x.value_size]
                highest = _highest(line, lanes)
                highest = max(highest, top[r])
                shift = highest if highest > low else zero
                faded = exp(top[r] - shift)
                top[r] = highest
                exp_minus(line, shift)
                line_sum = zero
                for j in range(padded):
                    line_sum += line[j]
                total[r] = total[r] * faded + line_sum
                for j in range(sums.size):
                    sums[j] *= faded
            add_product(
                s.reshape(-1), origin, row_stride, adjacent,
                values, (kv * value_columns * x.num_keys + n0) * width, x.num_keys * width, count,
                acc.reshape(-1), origin, acc.shape[1], rows, value_columns,
            )  # fmt: skip
        for r in range(rows):
            at = ((b * x.num_queries + m0 + r) * x.heads + h) * x.value_size
            line = out[at : at + x.value_size]
            at = (b * x.heads + h) * x.num_queries + m0 + r
            if total[r] == zero:
                line[:] = zero
                lse[at] = low
            else:
                for j in range(x.value_size):
                    line[j] = acc[r, j] / total[r]
                lse[at] = (top[r] if top[r] > low else zero) + np.log(total[r])


@kernel
def _backward(
    x: _Inputs,
    grad: Array,  # (B, Hq, M, Dv), strided
    grad_strides: _Strides,
    grad_panels: Array,  # (B, Hq, P, M, W)
    query_panels: Array,  # (B, Hq, P, M, W)
    key_panels: Array,  # (B, Hk, P, N, W)
    values: Array,  # (B, Hk, P, Dv, W): panels of v transposed
    lse: Array,  # (B, Hq, M)
    delta: Array,  # (B, Hq, M)
    grad_q: Array,  # (B, Hq, M, P*W), zeros, out; without the factor scale
    grad_k: Array,  # (B, Hq, N, P*W), likewise, per query head
    grad_v: Array,  # (B, Hq, N, P*W), zeros, out; per query head
    grad_bias: Array,  # zeros, out; empty unless wanted
    grad_bias_strides: _Strides,
    begin: int,
    end: int,
) -> None:
    """Heads `begin` to `end` of the B * Hq."""
    width = PANEL_BYTES // lse.itemsize
    columns, value_columns = -(-x.size // width), -(-x.value_size // width)
    low, zero = lse.dtype.type(-np.inf), lse.dtype.type(0)
    origin, adjacent, row_stride = np.intp(0), np.intp(1), np.intp(KEY_BLOCK)
    weights = np.empty((QUERY_BLOCK, KEY_BLOCK), lse.dtype)
    grads = np.empty((QUERY_BLOCK, KEY_BLOCK), lse.dtype)
    w_flat, g_flat = weights.reshape(-1), grads.reshape(-1)
    queries, keys = x.num_queries, x.num_keys
    for unit in range(begin, end):
        b, h = unit // x.heads, unit % x.heads
        kv = b * x.kv_heads + h // (x.heads // x.kv_heads)
        for m0 in range(0, queries, QUERY_BLOCK):
            rows = min(QUERY_BLOCK, queries - m0)
            limit = min(keys, m0 + rows) if x.is_causal else keys
            for n0 in range(0, limit, KEY_BLOCK):
                count = min(KEY_BLOCK, limit - n0)
                key_columns = -(-count // width)
                padded = key_columns * width
                _scores(x, b, h, m0, rows, n0, count, weights)
                grads[:rows, :padded] = zero
                add_product(
                    grad, b * grad_strides[0] + h * grad_strides[1] + m0 * grad_strides[2], grad_strides[2],
                    grad_strides[3],
                    values, (kv * (-(-keys // width)) + n0 // width) * x.value_size * width, x.value_size * width,
                    x.value_size, g_flat, origin, row_stride, rows, key_columns,
                )  # fmt: skip
                for r in range(rows):
                    line, grad_line = weights[r, :padded], grads[r, :padded]
                    row = unit * queries + m0 + r
                    if lse[row] == lse[row]:
                        exp_minus(line, lse[row] if lse[row] != low else zero)
                    else:
                        for j in range(padded):
                            line[j] = zero if line[j] == low else lse[row]
                    of_row = delta[row]
                    for j in range(padded):
                        grad_line[j] = zero if line[j] == zero else line[j] * (grad_line[j] - of_row)
                    if grad_bias.size:
                        strides = grad_bias_strides
                        at = b * strides[0] + h * strides[1] + (m0 + r) * strides[2] + n0 * strides[3]
                        if strides[3] == 0:
                            line_sum = np.float64(0)
                            for j in range(count):
                                line_sum += grad_line[j]
                            grad_bias[at] += line_sum
                        else:
                            of_line = grad_bias[at : at + count]
                            for j in range(count):
                                of_line[j] += grad_line[j]
                add_product(
                    w_flat, origin, adjacent, row_stride,
                    grad_panels, (unit * value_columns * queries + m0) * width, queries * width, rows,
                    grad_v, (unit * keys + n0) * value_columns * width, value_columns * width, count, value_columns,
                )  # fmt: skip
                add_product(
                    g_flat, origin, adjacent, row_stride,
                    query_panels, (unit * columns * queries + m0) * width, queries * width, rows,
                    grad_k, (unit * keys + n0) * columns * width, columns * width, count, columns,
                )  # fmt: skip
                add_product(
                    g_flat, origin, row_stride, adjacent,
                    key_panels, (kv * columns * keys + n0) * width, keys * width, count,
                    grad_q, (unit * queries + m0) * columns * width, columns * width, rows, columns,
                )  # fmt: skip


def _finite(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """`x` with 0 for what is not finite, and (only if there is such an element) NaN in its places, 0 elsewhere."""
    # The sum of finite numbers may overflow: the exact test decides then.
    if math.isfinite(x.sum().item()):
        return x, None
    finite = x.isfinite()
    zero = x.new_zeros(())
    return torch.where(finite, x, zero), torch.where(finite, zero, torch.nan)


def _inputs(
    q: Tensor, k: Tensor, poison: Tensor | None, value_size: int, mask: Tensor | None, bias: Tensor | None,
    scale: float, is_causal: bool,
) -> _Inputs:  # fmt: skip
    """Arrays over tensors of the accumulation dtype; `k` finite."""
    full = (*q.shape[:3], k.shape[2])
    nowhere = (0, 0, 0, 0)
    no_mask, no_bias = np.empty(0, np.bool_), strided(q.new_empty(0))[0]
    q_array, q_strides = strided(q)
    mask_array, mask_strides = (no_mask, nowhere) if mask is None else strided(mask.detach().expand(full))
    bias_array, bias_strides = (no_bias, nowhere) if bias is None else strided(bias.detach().to(q.dtype).expand(full))
    return _Inputs(
        q=q_array,
        q_strides=q_strides,
        keys=flat(panels(k.transpose(2, 3))),
        poison=no_bias if poison is None else flat(poison.sum(-1)),
        mask=mask_array,
        mask_strides=mask_strides,
        bias=bias_array,
        bias_strides=bias_strides,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        num_queries=q.shape[2],
        num_keys=k.shape[2],
        size=q.shape[3],
        value_size=value_size,
        scale=scale,
        is_causal=is_causal,
    )


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """``seqkernels::attention_forward``; the arguments are those of `seqkernels.ops.attention.attention`.

    Returns:
        ``out`` (B, Hq, M, Dv), laid out in memory as (B, M, Hq, Dv), and ``lse`` (B, Hq, M).
    """
    mask, bias, scale, is_causal = scores.mask, scores.bias, scores.scale, scores.right == 0
    acc = accumulate_dtype(q.dtype)
    batch, heads, num_queries, size = q.shape
    num_keys, value_size = v.shape[2:]
    out = q.new_empty((batch, num_queries, heads, value_size), dtype=acc)
    lse = q.new_empty((batch, heads, num_queries), dtype=acc)
    if num_keys == 0:
        out.zero_()
        lse.fill_(-torch.inf)
    elif out.numel() > 0:
        keys, poison = _finite(k.detach().to(acc))
        values, taint = _finite(v.detach().to(acc))
        inputs = _inputs(q.detach().to(acc), keys, poison, value_size, mask, bias, scale, is_causal)
        value_panels = flat(panels(values))
        taints = strided(out.new_empty(0))[0] if taint is None else flat(taint.contiguous())
        out_array, lse_array = flat(out), flat(lse)

        def task(begin: int, end: int, chunk: int) -> None:
            _forward(inputs, value_panels, taints, out_array, lse_array, begin, end)

        units = batch * heads * -(-num_queries // QUERY_BLOCK)
        work = 2.0 * batch * heads * num_queries * num_keys * (size + value_size + 8)
        threads = team_size(units, work)
        run(task, units, threads, CHUNKS_PER_THREAD * threads if threads > 1 else 1)
    return out.to(q.dtype).transpose(1, 2), lse


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scores: Scores,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``seqkernels::attention_backward``.

    Args:
        grad_out: (B, Hq, M, Dv), or ``None`` for zeros.
        grad_lse: (B, Hq, M), or ``None`` for zeros.
        q, k, v, scores: as in the forward pass.
        out, lse: of the forward pass.
        needs: which gradients are wanted.

    Returns:
        Gradients of q, k, v, laid out in memory as (B, L, H, D), and of bias; empty where they are not wanted.
    """
    mask, bias, scale, is_causal = scores.mask, scores.bias, scores.scale, scores.right == 0
    bias_grad = needs[3]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    acc = accumulate_dtype(q.dtype)
    batch, heads, num_queries, size = q.shape
    kv_heads, num_keys, value_size = v.shape[1:]
    x, grad = q.detach().to(acc), grad_out.detach().to(acc)
    keys, poison = _finite(k.detach().to(acc))
    values, _ = _finite(v.detach().to(acc))
    width = PANEL_BYTES // x.element_size()
    wide, value_wide = -(-size // width) * width, -(-value_size // width) * width
    grad_q = x.new_zeros((batch, heads, num_queries, wide))
    grad_k = x.new_zeros((batch, heads, num_keys, wide))
    grad_v = x.new_zeros((batch, heads, num_keys, value_wide))
    units = batch * heads
    threads = team_size(units, 2.0 * units * num_queries * num_keys * (3 * size + 2 * value_size + 8))
    chunks = CHUNKS_PER_THREAD * threads if threads > 1 else 1
    grad_bias, each = x.new_zeros((1, 0)), 0
    bias_strides: _Strides = (0, 0, 0, 0)
    if bias is not None and bias_grad:
        if bias.shape[0] != batch or bias.shape[1] != heads:
            # Heads that share a gradient: each chunk sums into a copy of its own.
            chunks, each = threads, 1
        grad_bias = x.new_zeros((1 + each * (threads - 1), *bias.shape))
        bias_strides = tuple(
            0 if length == 1 else stride for length, stride in zip(bias.shape, grad_bias[0].stride(), strict=True)
        )
    if units * num_queries * num_keys > 0:
        inputs = _inputs(x, keys, poison, value_size, mask, bias, scale, is_causal)
        arrays = [flat(panels(t)) for t in (grad, x, keys, values.transpose(2, 3))]
        arrays += [flat(t.contiguous()) for t in (lse.detach(), delta.detach())]
        arrays += [flat(t) for t in (grad_q, grad_k, grad_v)]
        grad_array = strided(grad)

        def task(begin: int, end: int, chunk: int) -> None:
            of_bias = flat(grad_bias[chunk * each])
            _backward(inputs, *grad_array, *arrays, of_bias, bias_strides, begin, end)

        run(task, units, threads, chunks)
    grad_q.mul_(scale)
    grad_k.mul_(scale)
    return (
        _result(grad_q, heads, size, q.dtype) if needs[0] else q.new_empty(0),
        _result(grad_k, kv_heads, size, q.dtype) if needs[1] else q.new_empty(0),
        _result(grad_v, kv_heads, value_size, q.dtype) if needs[2] else q.new_empty(0),
        grad_bias.sum(0).to(q.dtype),
    )


def _result(grad: Tensor, heads: int, size: int, dtype: torch.dtype) -> Tensor:
    """A gradient without padding, summed over the query heads of each group, laid out in memory as (B, L, H, D)."""
    grad = grad[..., :size]
    if heads != grad.shape[1]:
        grad = grad.unflatten(1, (heads, -1)).sum(2)
    return grad.transpose(1, 2).to(dtype).contiguous().transpose(1, 2)
