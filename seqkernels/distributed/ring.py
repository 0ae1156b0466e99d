"""Attention over a sequence of which each process of a group holds a part.

Keys and values go round a ring of processes while each computes with those it has (Liu, Zaharia & Abbeel, "Ring
Attention with Blockwise Transformers for Near-Infinite Context", 2023). What a process gets for the keys of each other
one is merged by the log-sum-exp; ``docs/attention.md`` has the formulas. The backward pass sends them round once more,
and the gradients of keys and values travel one step behind them, collected on the way home: each part of it needs only
the log-sum-exp and the output of all keys, which the forward pass left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..functional import merge
from ..ops._eager import as_in_forward, insisted
from ..ops.attention import attend, backward_op
from ..ops.attention_check import check
from ..precision import of_products
from ..scores import UNBOUNDED, Scores
from .sequence import check_alike, check_balance, place, refuse_second_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ALL = slice(None)


class Part(NamedTuple):
    """Which queries of a process read which keys of one process."""

    queries: slice
    keys: slice
    is_causal: bool


def part_of(rank: int, other: int, length: int, is_causal: bool, balance: str) -> Part | None:
    """What the queries of process `rank` read of the keys of process `other`, or ``None`` for nothing.

    Args:
        rank: whose queries.
        other: whose keys.
        length: of the sequence's part that each has.
        is_causal: whether the place of a key in the sequence must not be behind the query's.
        balance: see `seqkernels.distributed.shard_sequence`.
    """
    if not is_causal or other == rank:
        # Both have the same places, in order.
        return Part(_ALL, _ALL, is_causal)
    if balance == "contiguous":
        return Part(_ALL, _ALL, False) if other < rank else None
    # Chunks, from the first: the head of the lesser process, that of the greater, its tail, that of the lesser.
    half = length // 2
    return Part(_ALL, slice(half), False) if other < rank else Part(slice(half, None), _ALL, False)


_KEYS, _GRADIENTS = 0, 1  # tags of the messages


class _Ring:
    """Messages from each process of `group` to the next one."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.world = place(group)
        whole: Any = dist.group.WORLD if group is None else group
        self.behind, self.ahead = (dist.get_global_rank(whole, (self.rank + step) % self.world) for step in (-1, 1))

    def start(self, x: Tensor, tag: int) -> tuple[Tensor, list[dist.Work]]:
        """Memory for what comes from the process behind while `x` goes to the one ahead, and what to wait for."""
        arriving = torch.empty_like(x)
        sent = dist.P2POp(dist.isend, x, self.ahead, self.group, tag)
        return arriving, dist.batch_isend_irecv([sent, dist.P2POp(dist.irecv, arriving, self.behind, self.group, tag)])

    def rounds(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each process, from this one backwards, with its keys and values; the next ones arrive meanwhile."""
        message, keys, values = k, k, v
        if self.world > 1:
            message = _joined(k, v, k.dtype)
        for step in range(self.world):
            last = step + 1 == self.world
            if not last:
                arriving, works = self.start(message, _KEYS)
            yield (self.rank - step) % self.world, keys, values
            if not last:
                _wait(works)
                message = arriving
                keys, values = _apart(message, k, v)


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _joined(k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys and values as one message."""
    message = k.new_empty(k.numel() + v.numel(), dtype=dtype)
    for place_of, x in zip(_apart(message, k, v), (k, v), strict=True):
        place_of.copy_(x)
    return message


def _apart(message: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The two tensors in a message, in the shapes of `k` and `v`."""
    first, second = message.split((k.numel(), v.numel()))
    return first.view(k.shape), second.view(v.shape)


class _Call(NamedTuple):
    """What a call is beside its tensors."""

    ring: _Ring
    scores: Scores
    is_causal: bool
    balance: str

    def part(self, other: int, length: int) -> tuple[Part, Scores] | None:
        """What `length` queries of this process read of the keys of process `other`."""
        found = part_of(self.ring.rank, other, length, self.is_causal, self.balance)
        return found and (found, self.scores._replace(right=0 if found.is_causal else UNBOUNDED))


def _forward(call: _Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp over all keys, in the dtype that q is accumulated in."""
    out = lse = q.new_empty(0)
    for other, keys, values in call.ring.rounds(k, v):
        part = call.part(other, q.shape[2])
        if part is None:
            continue
        (rows, columns, _), scores = part
        new, new_lse = attend(q[:, :, rows], keys[:, :, columns], values[:, :, columns], scores)
        new = new.to(new_lse.dtype)
        if other == call.ring.rank:
            out, lse = new, new_lse  # the first, of all rows
        else:
            out[:, :, rows], lse[:, :, rows] = merge(out[:, :, rows], lse[:, :, rows], new, new_lse)
    return out, lse


def _backward(
    call: _Call,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in the dtype that q is accumulated in."""
    ring = call.ring
    grad_q = collected = arriving = q.new_empty(0)
    works: list[dist.Work] = []
    for other, keys, values in ring.rounds(k, v):
        part = call.part(other, q.shape[2])
        found = None
        if part is not None:
            (rows, columns, _), scores = part
            *found, _ = backward_op(
                [None if x is None else x[:, :, rows] for x in (grad_out, grad_lse)],
                q[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                *scores.pack(),
                [True, True, True, False],
            )
        if other == ring.rank:
            assert found is not None
            grad_q = found[0].to(lse.dtype)
            collected = _joined(found[1], found[2], lse.dtype)
        else:
            _wait(works)
            collected = arriving
            if found is not None:
                grad_q[:, :, rows] += found[0]
                for total, new in zip(_apart(collected, k, v), found[1:], strict=True):
                    total[:, :, columns] += new
        if ring.world > 1:
            # To the process that has these keys next; after the last round that is theirs.
            arriving, works = ring.start(collected, _GRADIENTS)
    if ring.world > 1:
        _wait(works)
        collected = arriving
    return grad_q, *_apart(collected, k, v)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        group: ProcessGroup | None,
        is_causal: bool,
        balance: str,
        scale: float,
        precision: str,
    ) -> tuple[Tensor, Tensor]:
        call = _Call(_Ring(group), Scores(scale, precision=precision), is_causal, balance)
        out, lse = _forward(call, q, k, v)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.insisted = call, insisted()
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_order("ring_attention")
        q, k, v, out, lse = ctx.saved_tensors
        found = _backward(ctx.call, grad_out, grad_lse, q, k, v, out, lse)
        grads = [x.to(q.dtype) if need else None for x, need in zip(found, ctx.needs_input_grad, strict=False)]
        return *grads, None, None, None, None, None


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: ProcessGroup | None = None,
    *,
    is_causal: bool = False,
    balance: str = "zigzag",
    scale: float | None = None,
    precision: str = "ieee",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this process's queries over the keys of all processes of a group, exactly.

    A sequence too long for one device is cut by `shard_sequence`, and every process calls this with its part of the
    queries, keys and values. Its memory is that of the part, and of two more parts of keys and values on their way;
    keys travel while those before them are computed with. Partial results are merged in float32 (float64 for float64).
    Under a causal mask, parts that nobody reads are not computed; with ``balance="zigzag"`` each process has the same
    work then.

    Differentiable once, also through the log-sum-exp. Gradients of k and v are sums over the queries of all processes:
    those of the sum of the losses of all processes, of which each computes its own. All processes have to call this
    function, and run its backward pass, in the same order with the same shapes, dtypes and arguments, or they wait for
    one another for ever, or take each other's numbers for what they are not; ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` makes
    them compare those in each call. In programs that are compiled it runs as it is, between their parts.

    Under autocast q, k and v go to its dtype, except float64.

    Source: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023.

    B batch, Hq query heads, Hk key and value heads, D and Dv the sizes of heads and values, M queries and N keys of
    each process.

    Args:
        q: (B, Hq, M, D), float32, float64, bfloat16 or float16, D from 1 to 512; any strides.
        k: (B, Hk, N, D), Hq a multiple of Hk: query head h reads key head ``h // (Hq // Hk)``.
        v: (B, Hk, N, Dv), Dv from 1 to 512.
        group: the processes, in the order of the parts; all by default. Of a ``DeviceMesh`` its ``get_group()``.
        is_causal: a query reads keys up to its own place in the sequence; N is then M.
        balance: how `shard_sequence` cut the sequence: ``"zigzag"`` or ``"contiguous"``.
        scale: factor on ``q k^T``; 1/sqrt(D) by default.
        precision: of products of float32 matrices on GPUs, see `seqkernels.precision`.
        return_lse: return the log-sum-exp too.

    Returns:
        ``out`` (B, Hq, M, Dv) of the dtype of q, for this process's queries, laid out in memory as (B, M, Hq, Dv); with
        `return_lse` also the log-sum-exp of their scores, (B, Hq, M) in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed.
        RuntimeError: there are no process groups yet.
        NotImplementedError: under ``vmap``, ``grad`` and ``jvp`` of ``torch.func``; in the backward pass, for gradients
            of gradients.

    Example:
        >>> q, k, v = (shard_sequence(x, 2) for x in (q, k, v))
        >>> out = ring_attention(q, k, v, is_causal=True)
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
        if type(x) is not Tensor and is_traceable_wrapper_subclass(x):
            # Of a DTensor, which says by itself which part is whose.
            raise TypeError(f"{name}: expected this process's part as a plain Tensor, got a {type(x).__name__}")
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            raise NotImplementedError(f"{name}: ring attention has no rules for torch.func, got what it has wrapped")
    check_balance(balance)
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal: expected a bool, got {type(is_causal).__name__}")
    kind = q.device.type
    if kind == "meta":
        raise ValueError("q: expected on a device that sends messages, got meta")
    autocast = torch.is_autocast_enabled(kind)
    if autocast:
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    check(q, k, v, Scores(1.0, precision=precision))
    if scale is None:
        scale = q.shape[3] ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    length = q.shape[2]
    if is_causal and k.shape[2] != length:
        raise ValueError(f"k: expected as many keys as queries, {length}, with is_causal, got {k.shape[2]}")
    if is_causal and balance == "zigzag" and length % 2:
        raise ValueError(f"q: expected an even number of queries with balance 'zigzag' and is_causal, got {length}")
    check_alike(group, q=q, k=k, v=v, is_causal=is_causal, balance=balance, scale=scale, precision=precision)
    # What the reference computes with is no business of autocast.
    with torch.autocast(kind, enabled=False):
        out, lse = _RingAttention.apply(q, k, v, group, is_causal, balance, scale, of_products(precision, q))
    return (out, lse) if return_lse else out
