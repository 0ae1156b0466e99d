"""Attention on a GPU: what the kernels of `attention_kernels` need, and their launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...cells import accumulate_dtype
from ...scores import Scores, dropout_threshold
from . import attention_kernels as kernels
from . import tiles
from .attention_scores import Full, Rows, Terms
from .configs import FEW_ROWS, ROOMY, Blocks, blocks_of, by_descriptors, products
from .launches import Launch

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
        float(scores.scale),
        None if more or scores.scale <= 0.0 or k.dtype == torch.float32 else 1,
        float(scores.softcap) or None,
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


@functools.cache
def limits(device: torch.device) -> tuple[int, int]:
    """10 times the compute capability, and bytes of shared memory that a program may have."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _limits(q: Tensor) -> tuple[int, int]:
    return limits(q.device) if q.is_cuda else (90, ROOMY)


def _blocks(kernel: str, q: Tensor, v: Tensor, scores: Scores) -> Blocks:
    terms = scores.mask, scores.bias, scores.alibi_slopes
    many = any(x is not None for x in terms) or scores.softcap != 0.0 or scores.dropout_p > 0.0
    architecture, shared = _limits(q)
    return blocks_of(
        kernel,
        q.dtype,
        q.shape[3],
        v.shape[3],
        many_terms=many,
        pages=scores.block_table is not None,
        precision=_precision(q, v, scores),
        architecture=architecture,
        shared=shared,
        device=q.device,
    )


def _precision(q: Tensor, v: Tensor, scores: Scores) -> str:
    return products(q.dtype, scores.precision, q.shape[3], v.shape[3])


def _options(blocks: Blocks) -> dict[str, int]:
    return {"num_warps": blocks.warps, "num_stages": blocks.stages}


#: What was found out about a call, for all calls that this module and Triton treat alike.
_plans: dict[Any, Any] = {}
_MOST_PLANS = 1024


def _kind(x: Tensor) -> tuple[Any, ...]:
    """What matters of a tensor but its values."""
    return x.dtype, x.shape, x.stride(), x.data_ptr() % 16


def _has_tensors(scores: Scores) -> bool:
    _, mask, bias, _, _, _, lengths, cu_q, _, _, _, slopes, _, sink, _, seed, table, _ = scores
    return not (mask is bias is lengths is cu_q is slopes is sink is seed is table is None)


def _run(kind: Callable[..., Callable[..., Results]], scores: Scores, needs: Any, *tensors: Tensor | None) -> Results:
    """Run the plan of `kind` for calls like this one, on the device of its tensors, where Triton would not look."""
    first = tensors[0]
    assert first is not None
    device = first.get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(kind, scores, needs, *tensors)
    given: Any = scores
    if _has_tensors(scores):
        given = tuple(_kind(x) if isinstance(x, Tensor) else x for x in scores)
    key = (kind, device, tiles.changes(), given, needs, *[x if x is None else _kind(x) for x in tensors])
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            # The older half: calls whose lengths always change leave a plan each.
            for old in list(_plans)[: _MOST_PLANS // 2]:
                _plans.pop(old, None)
        plan = _plans[key] = kind(scores, needs, *tensors)
    found: Results = plan(scores, *tensors)
    return found


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores, save: bool = True) -> tuple[Tensor, Tensor]:
    """``seqkernels::attention_forward``; the log-sum-exp is made whether or not it is to be kept, by `save`."""
    return _run(_Forward, scores, None, q, k, v)


class _Rows(NamedTuple):
    """How the kernels read, or write, a kind of tensor."""

    copy: bool
    strides: tuple[int, int, int]

    def __call__(self, x: Tensor) -> Rows:
        return Rows(x.contiguous() if self.copy else x, *self.strides)


def _reader(x: Tensor) -> _Rows:
    given = _last_contiguous(x)
    return _Rows(given is not x, (given.stride(0), given.stride(1), given.stride(2)))


class _Described(NamedTuple):
    """How tiles (1, 1, rows, columns) of a kind of tensor (B, H, L, size) are described to a device."""

    shape: list[int]
    strides: list[int]
    tile: list[int]

    def __call__(self, x: Tensor) -> TensorDescriptor:
        return TensorDescriptor(x, self.shape, self.strides, self.tile)


def _described(x: Tensor, rows: int, columns: int) -> _Described | None:
    """Descriptions of tiles of `x`, if the device can have them: all rows begin at multiples of 16 bytes."""
    # Along a dimension of 1 nothing moves.
    strides = [16 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride(), strict=False)]
    apart = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides)
    if not apart or x.data_ptr() % 16 or x.stride(3) != 1 or x.numel() == 0:
        return None
    return _Described(list(x.shape), [*strides, 1], [1, 1, rows, columns])


class _New(NamedTuple):
    """A kind of tensor that is made for results: (B, H, L, size), in memory (B, L, H, size)."""

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device

    def __call__(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)

    def rows(self, x: Tensor) -> Rows:
        batch, head, row, _ = self.strides
        return Rows(x, batch, head, row)


def _like(x: Tensor, size: int) -> _New:
    batch, heads, length, _ = x.shape
    strides = (length * heads * size, size, heads * size, 1)
    return _New((batch, heads, length, size), strides, x.dtype, x.device)


class _Forward:
    """Forward passes of one kind."""

    def __init__(self, scores: Scores, _: None, q: Tensor, k: Tensor, v: Tensor) -> None:
        batch, heads, queries, keys = self.shape = scores.shape(q, k)
        self.out, self.readers = _like(q, v.shape[3]), (_reader(q), _reader(k), _reader(v))
        self.terms = None if _has_tensors(scores) else _terms(scores, self.shape, k)
        self.accumulate = accumulate_dtype(q.dtype)
        self.lse_shape = q.shape[:3]
        self.empty = batch * heads * queries == 0
        if self.empty:
            return
        group = heads // k.shape[1]
        few = queries * group <= FEW_ROWS
        blocks = _blocks("few_rows" if few else "forward", q, v, scores)
        # All heads of a group share the rows of a tile where they have room in it.
        pack = group if few else 1
        programs = batch * heads // pack * -(-queries * pack // blocks.m)
        self.splits, split_keys = _splits(programs, keys, blocks.n, q)
        rows = q.shape[2]
        split: tuple[int | None, int | None] = (None, None)
        if self.splits > 1:
            split = (q.shape[0] * heads * rows * v.shape[3], q.shape[0] * heads * rows)
        self.sizes = (heads, group, rows, queries, keys, split_keys, *split)
        self.tiles_k = self.tiles_v = None
        architecture = _limits(q)[0]
        if (
            not few
            and scores.block_table is None
            and by_descriptors(q.dtype, max(blocks.d, blocks.dv), keys, architecture)
        ):
            self.tiles_k, self.tiles_v = _described(k, blocks.n, blocks.d), _described(v, blocks.n, blocks.dv)
        constants = {"D": q.shape[3], "DV": v.shape[3], **blocks.constants(), "PACK": pack}
        self.launch = Launch(
            kernels.forward_kernel,
            (programs, self.splits),
            {**constants, "PRECISION": _precision(q, v, scores)},
            _options(blocks),
        )
        if self.splits > 1:
            self.merged = (heads, rows, self.splits, *split)
            self.merge = Launch(
                kernels.merge_kernel,
                (q.shape[0] * heads * -(-rows // ROWS_OF_SUMS),),
                {"DV": v.shape[3], "BLOCK_M": ROWS_OF_SUMS, "BLOCK_DV": blocks.dv},
            )

    def __call__(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = self.out()
        lse = torch.empty(self.lse_shape, dtype=self.accumulate, device=self.out.device)
        if scores.cu_seqlens_q is not None:
            # Documents may leave rows before and behind them.
            out.zero_()
            lse.fill_(-torch.inf)
        if self.empty:
            return out, lse
        terms = self.terms
        if terms is None:
            terms = _terms(scores, self.shape, k)
        sink = None if scores.sink is None else scores.sink.contiguous()
        of_q, of_k, of_v = self.readers
        first, first_lse, parts_lse = self.out.rows(out), lse, lse
        if self.splits > 1:
            parts = torch.empty((self.splits, *out.shape), dtype=lse.dtype, device=out.device)
            parts_lse = lse.new_full((self.splits, *lse.shape), -torch.inf)
            first, first_lse = _rows(parts[0]), parts_lse[0]
        tiles_k = None if self.tiles_k is None else self.tiles_k(k)
        tiles_v = None if self.tiles_v is None else self.tiles_v(v)
        self.launch(of_q(q), of_k(k), of_v(v), tiles_k, tiles_v, first, first_lse, sink, terms, *self.sizes)
        if self.splits > 1:
            self.merge(first, parts_lse, self.out.rows(out), lse, *self.merged)
        return out, lse


def _splits(programs: int, keys: int, tile: int, q: Tensor) -> tuple[int, int | None]:
    """Parts of the keys, so that a few rows keep all multiprocessors busy, and the keys of each part."""
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    wanted = min(2 * processors // programs, -(-keys // (2 * tile)), 128)
    if wanted < 2:
        return 1, None
    split_keys = -(-keys // wanted // tile) * tile
    return -(-keys // split_keys), split_keys


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
    # A gradient that is zero may have no memory.
    grad_out, grad_lse = (None if x is None or x._is_zerotensor() else x for x in (grad_out, grad_lse))
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    return _run(_Backward, scores, tuple(needs[:4]), q, k, v, grad_out, grad_lse, out, lse)


class _Backward:
    """Backward passes of one kind."""

    def __init__(
        self,
        scores: Scores,
        needs: tuple[bool, bool, bool, bool],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        batch, heads, queries, keys = self.shape = scores.shape(q, k)
        bias = scores.bias
        needs_bias = bias is not None and needs[3]
        self.whole = needs_bias and bias is not None and tuple(bias.shape) == self.shape
        self.grads = tuple(_like(x, x.shape[3]) if need else None for x, need in zip((q, k, v), needs, strict=False))
        self.needs_bias = needs_bias
        self.empty = batch * heads * queries * keys == 0
        self.readers = tuple(map(_reader, (grad_out, q, k, v)))
        self.of_out = _reader(out)
        self.terms = None if _has_tensors(scores) else _terms(scores, self.shape, k)
        if self.empty:
            return
        group, rows = heads // k.shape[1], q.shape[2]
        self.sizes = (heads, group, rows, queries, keys)
        constants = {"D": q.shape[3], "DV": v.shape[3], "PRECISION": _precision(q, v, scores)}
        blocks = _blocks("backward_q", q, v, scores)
        self.delta = Launch(
            kernels.delta_kernel,
            (q.shape[0] * heads * -(-rows // ROWS_OF_SUMS),),
            {"DV": v.shape[3], "BLOCK_M": ROWS_OF_SUMS, "BLOCK_DV": blocks.dv},
        )

        def launch(kernel: Any, programs: int, blocks: Blocks, **more: bool) -> Launch:
            return Launch(kernel, (programs,), {**constants, **more, **blocks.constants()}, _options(blocks))

        self.of_q = self.of_kv = self.of_bias = None
        if needs[0] or self.whole:
            self.of_q = launch(kernels.backward_q_kernel, batch * heads * -(-queries // blocks.m), blocks)
        if needs_bias and bias is not None and not self.whole:
            blocks = _blocks("backward_bias", q, v, scores)
            sums = tuple(size == 1 and full > 1 for size, full in zip(bias.shape, self.shape, strict=True))
            # Sums over rows or keys are made of parts, for each batch entry and head.
            self.parts = (batch, heads, *bias.shape[2:]) if sums[2] or sums[3] else None
            owners = bias.shape[0] * bias.shape[1] if self.parts is None else batch * heads
            tiles = (1 if sums[2] else -(-queries // blocks.m)) * (1 if sums[3] else -(-keys // blocks.n))
            self.of_bias = launch(
                kernels.backward_bias_kernel, owners * tiles, blocks, SUM_ROWS=sums[2], SUM_KEYS=sums[3]
            )
        if needs[1] or needs[2]:
            blocks = _blocks("backward_kv", q, v, scores)
            self.of_kv = launch(kernels.backward_kv_kernel, batch * k.shape[1] * -(-keys // blocks.n), blocks)

    def __call__(
        self,
        scores: Scores,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lse, bias = lse.contiguous(), scores.bias
        grads = [q.new_empty(0) if new is None else new() for new in self.grads]
        if self.empty or scores.cu_seqlens_q is not None:
            for grad in grads:
                grad.zero_()
        grad_bias = None
        if self.needs_bias and bias is not None:
            # One that is broadcast is a sum.
            grad_bias = bias.new_zeros(bias.shape, dtype=bias.dtype if self.whole else lse.dtype)
        if not self.empty:
            grad_bias = self._launch(scores, (grad_out, q, k, v), grad_lse, out, lse, grads, grad_bias)
        grad_q, grad_k, grad_v = grads
        if grad_bias is None or bias is None:
            return grad_q, grad_k, grad_v, q.new_empty(0)
        return grad_q, grad_k, grad_v, grad_bias.to(bias.dtype)

    def _launch(
        self,
        scores: Scores,
        inputs: Sequence[Tensor],
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        grads: Sequence[Tensor],
        grad_bias: Tensor | None,
    ) -> Tensor | None:
        """The gradients, in `grads` but for that of the bias, which may be another tensor than that given."""
        terms = self.terms
        if terms is None:
            terms = _terms(scores, self.shape, inputs[2])
        rows = [reader(x) for reader, x in zip(self.readers, inputs, strict=True)]
        delta = torch.empty_like(lse)
        of_lse = None if grad_lse is None else _rows(grad_lse.unsqueeze(3))
        self.delta(rows[0], self.of_out(out), of_lse, delta, self.sizes[0], self.sizes[2])
        grad_q, grad_k, grad_v = (
            None if new is None else new.rows(x) for new, x in zip(self.grads, grads, strict=True)
        )
        if self.of_q is not None:
            self.of_q(*rows, lse, delta, grad_q, _full(grad_bias) if self.whole else None, terms, *self.sizes)
        if self.of_bias is not None and grad_bias is not None:
            target = grad_bias if self.parts is None else grad_bias.new_zeros(self.parts)
            self.of_bias(*rows, lse, delta, _full(target), terms, self.shape[0], *self.sizes)
            grad_bias = grad_bias if self.parts is None else target.sum_to_size(grad_bias.shape)
        if self.of_kv is not None:
            self.of_kv(*rows, lse, delta, grad_k, grad_v, terms, *self.sizes)
        return grad_bias
