"""Attention on a GPU: what the kernels of `attention_kernels` need, and their launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

from ...cells import accumulate_dtype
from ...scores import Scores, dropout_threshold
from . import attention_kernels as kernels
from .attention_scores import Full, Rows, Terms
from .configs import FEW_ROWS, ROOMY, Blocks, blocks_of

Parameters = ParamSpec("Parameters")
Results = TypeVar("Results")

#: Rows of a program that multiplies no matrices.
ROWS_OF_SUMS = 16


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> Rows:
    return Rows(x, x.stride(0), x.stride(1), x.stride(2))


def _full(x: Tensor | None) -> Full | None:
    """A tensor of four dimensions with strides of 0 where it is broadcast."""
    if x is None:
        return None
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return Full(x.view(torch.uint8) if x.dtype == torch.bool else x, *strides)


def _terms(scores: Scores, shape: tuple[int, int, int, int], k: Tensor) -> Terms:
    """What the kernels do to scores; plain ones of 16-bit numbers are worth a factor rounded twice."""
    _, _, queries, keys = shape
    slopes, table = scores.alibi_slopes, scores.block_table
    dropped = scores.dropout_p > 0.0
    # Bounds beyond all rows and keys are none, and what is left fits 32 bits.
    left, right = (bound if 0 <= bound < queries + keys else None for bound in (scores.left, scores.right))
    more = scores.softcap != 0.0 or scores.bias is not None or slopes is not None
    return Terms(
        scores.scale,
        None if more or scores.scale <= 0.0 or k.dtype == torch.float32 else 1,
        scores.softcap or None,
        left,
        right,
        1 if scores.bottom_right else None,
        _full(scores.mask),
        _full(scores.bias),
        None if slopes is None else slopes.contiguous(),
        None if slopes is None else 0 if slopes.dim() == 1 else slopes.shape[1],
        None if scores.key_lengths is None else scores.key_lengths.contiguous(),
        None if scores.cu_seqlens_q is None else scores.cu_seqlens_q.contiguous(),
        None if scores.cu_seqlens_k is None else scores.cu_seqlens_k.contiguous(),
        None if table is None else table.contiguous(),
        None if table is None else table.shape[1],
        None if table is None else k.shape[2],
        scores.seed if dropped else None,
        dropout_threshold(scores.dropout_p) if dropped else None,
        1.0 / max(1.0 - scores.dropout_p, 2.0**-60) if dropped else None,
    )


def _rows_of_heads(x: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (B, H, L, size) like `x` (B, H, L, ...), in memory (B, L, H, size)."""
    batch, heads, length, _ = x.shape
    return x.new_empty((batch, length, heads, size), dtype=dtype).transpose(1, 2)


@functools.cache
def limits(device: torch.device) -> tuple[int, int]:
    """10 times the compute capability, and bytes of shared memory that a program may have."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _blocks(kernel: str, q: Tensor, v: Tensor, scores: Scores) -> Blocks:
    terms = scores.mask, scores.bias, scores.alibi_slopes
    many = any(x is not None for x in terms) or scores.softcap != 0.0 or scores.dropout_p > 0.0
    architecture, shared = limits(q.device) if q.is_cuda else (90, ROOMY)
    return blocks_of(
        kernel,
        q.dtype,
        q.shape[3],
        v.shape[3],
        many_terms=many,
        architecture=architecture,
        shared=shared,
        device=q.device,
    )


def _options(blocks: Blocks) -> dict[str, int]:
    return {"num_warps": blocks.warps, "num_stages": blocks.stages}


def _on_its_device(fn: Callable[Parameters, Results]) -> Callable[Parameters, Results]:
    """Triton launches on the current device, so that of the call is made the current one."""

    @functools.wraps(fn)
    def call(*args: Parameters.args, **options: Parameters.kwargs) -> Results:
        q = next(x for x in args if isinstance(x, Tensor) and x.dim() == 4)
        if not q.is_cuda or q.device.index == torch.cuda.current_device():
            return fn(*args, **options)
        with torch.cuda.device(q.device):
            return fn(*args, **options)

    return call


@_on_its_device
def attention_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """``seqkernels::attention_forward``."""
    q, k, v = (_last_contiguous(x) for x in (q, k, v))
    batch, heads, queries, keys = shape = scores.shape(q, k)
    out = _rows_of_heads(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    if scores.cu_seqlens_q is not None:
        # Documents may leave rows before and behind them.
        out.zero_()
        lse.fill_(-torch.inf)
    if batch * heads * queries == 0:
        return out, lse
    group = heads // k.shape[1]
    few = queries * group <= FEW_ROWS
    blocks = _blocks("few_rows" if few else "forward", q, v, scores)
    # All heads of a group share the rows of a tile where they have room in it.
    pack = group if few else 1
    programs = batch * heads // pack * -(-queries * pack // blocks.m)
    splits, split_keys = _splits(programs, keys, blocks.n, q)
    parts, parts_lse = out, lse
    if splits > 1:
        parts = q.new_empty((splits, q.shape[0], heads, q.shape[2], v.shape[3]), dtype=lse.dtype)
        parts_lse = lse.new_full((splits, *lse.shape), -torch.inf)
    first, first_lse = (parts[0], parts_lse[0]) if splits > 1 else (out, lse)
    sink = scores.sink
    kernels.forward_kernel[(programs, splits)](
        _rows(q),
        _rows(k),
        _rows(v),
        _rows(first),
        first_lse,
        None if sink is None else sink.contiguous(),
        _terms(scores, shape, k),
        heads,
        group,
        q.shape[2],
        queries,
        keys,
        split_keys,
        parts.stride(0) if splits > 1 else None,
        parts_lse.stride(0) if splits > 1 else None,
        D=q.shape[3],
        DV=v.shape[3],
        PACK=pack,
        PRECISION="ieee",
        **blocks.constants(),
        **_options(blocks),
    )
    if splits > 1:
        kernels.merge_kernel[(q.shape[0] * heads * -(-q.shape[2] // ROWS_OF_SUMS),)](
            _rows(first),
            parts_lse,
            _rows(out),
            lse,
            heads,
            q.shape[2],
            splits,
            parts.stride(0),
            parts_lse.stride(0),
            DV=v.shape[3],
            BLOCK_M=ROWS_OF_SUMS,
            BLOCK_DV=blocks.dv,
        )
    return out, lse


def _splits(programs: int, keys: int, tile: int, q: Tensor) -> tuple[int, int | None]:
    """Parts of the keys, so that a few rows keep all multiprocessors busy, and the keys of each part."""
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    wanted = min(2 * processors // programs, -(-keys // (2 * tile)), 128)
    if wanted < 2:
        return 1, None
    split_keys = -(-keys // wanted // tile) * tile
    return -(-keys // split_keys), split_keys


@_on_its_device
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
    """``seqkernels::attention_backward``."""
    q, k, v, out = (_last_contiguous(x) for x in (q, k, v, out))
    lse = lse.contiguous()
    batch, heads, queries, keys = shape = scores.shape(q, k)
    bias = scores.bias
    needs_bias = bias is not None and needs[3]
    whole = needs_bias and bias is not None and tuple(bias.shape) == shape
    grads = [
        _rows_of_heads(x, x.shape[3]) if need else x.new_empty(0) for x, need in zip((q, k, v), needs, strict=False)
    ]
    grad_q, grad_k, grad_v = grads
    empty = batch * heads * queries * keys == 0
    if empty or scores.cu_seqlens_q is not None:
        for grad in grads:
            grad.zero_()
    grad_bias = q.new_empty(0)
    if needs_bias and bias is not None:
        # One that is broadcast is a sum.
        grad_bias = bias.new_zeros(bias.shape, dtype=bias.dtype if whole else lse.dtype)
    if empty:
        return grad_q, grad_k, grad_v, grad_bias if bias is None else grad_bias.to(bias.dtype)
    # A gradient that is zero may have no memory.
    grad_out, grad_lse = (None if x is None or x._is_zerotensor() else x for x in (grad_out, grad_lse))
    grad_out = torch.zeros_like(out) if grad_out is None else _last_contiguous(grad_out)
    terms = _terms(scores, shape, k)
    group = heads // k.shape[1]
    delta = torch.empty_like(lse)
    blocks = _blocks("backward_q", q, v, scores)
    rows = q.shape[0] * heads * -(-q.shape[2] // ROWS_OF_SUMS)
    kernels.delta_kernel[(rows,)](
        _rows(grad_out),
        _rows(out),
        None if grad_lse is None else _rows(grad_lse.unsqueeze(3)),
        delta,
        heads,
        q.shape[2],
        DV=v.shape[3],
        BLOCK_M=ROWS_OF_SUMS,
        BLOCK_DV=blocks.dv,
    )
    common = (_rows(grad_out), _rows(q), _rows(k), _rows(v), lse, delta)
    sizes = (heads, group, q.shape[2], queries, keys)
    constants = {"D": q.shape[3], "DV": v.shape[3], "PRECISION": "ieee"}
    if needs[0] or whole:
        kernels.backward_q_kernel[(batch * heads * -(-queries // blocks.m),)](
            *common,
            _rows(grad_q) if needs[0] else None,
            _full(grad_bias) if whole else None,
            terms,
            *sizes,
            **constants,
            **blocks.constants(),
            **_options(blocks),
        )
    if needs_bias and bias is not None and not whole:
        blocks = _blocks("backward_bias", q, v, scores)
        sums = tuple(size == 1 and full > 1 for size, full in zip(bias.shape, shape, strict=True))
        apart = sums[2] or sums[3]
        target = grad_bias
        if apart:
            target = grad_bias.new_zeros((batch, heads, *bias.shape[2:]))
        tiles = (1 if sums[2] else -(-queries // blocks.m)) * (1 if sums[3] else -(-keys // blocks.n))
        kernels.backward_bias_kernel[(target.shape[0] * target.shape[1] * tiles,)](
            *common,
            _full(target),
            terms,
            batch,
            *sizes,
            SUM_ROWS=sums[2],
            SUM_KEYS=sums[3],
            **constants,
            **blocks.constants(),
            **_options(blocks),
        )
        if apart:
            grad_bias = target.sum_to_size(bias.shape)
    if needs[1] or needs[2]:
        blocks = _blocks("backward_kv", q, v, scores)
        kernels.backward_kv_kernel[(batch * k.shape[1] * -(-keys // blocks.n),)](
            *common,
            _rows(grad_k) if needs[1] else None,
            _rows(grad_v) if needs[2] else None,
            terms,
            *sizes,
            **constants,
            **blocks.constants(),
            **_options(blocks),
        )
    return grad_q, grad_k, grad_v, grad_bias if bias is None else grad_bias.to(bias.dtype)
