"""Attention over a sequence in parts, against the whole sequence in one process."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import seqkernels
from seqkernels import testing
from seqkernels.distributed import ring, ring_attention, sequence, shard_sequence, unshard_sequence
from seqkernels.functional import attention
from seqkernels.testing import attention_oracle, budget
from seqkernels.testing.baselines import ATTENTIONS

BALANCES = ("zigzag", "contiguous")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class _Copied(torch.autograd.Function):
    """A tensor that each process has, whose gradient is the mean over them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad / dist.get_world_size()


def _in_parts(q, k, v, mask=None, bias=None, *, balance="zigzag", **options):
    """The contract of attention by parts of the sequence; every process computes the same loss from the whole."""
    own = [shard_sequence(_Copied.apply(x), 2, balance=balance) for x in (q, k, v)]
    found = ring_attention(*own, balance=balance, return_lse=True, **options)
    return [unshard_sequence(x, 2, balance=balance) for x in found]


def _agrees(dtype, lengths=(24, 24), kv_heads=2, balance="zigzag", **options):
    inputs = testing.attention_inputs(2, 4, *lengths, 8, dtype, value_size=6, kv_heads=kv_heads)

    def parts(*tensors, **given):
        return _in_parts(*tensors, balance=balance, **given)

    def judge(actual, *rest):
        # One process judges for all.
        if dist.get_rank() == 0:
            assert_within_budget(actual, *rest)

    assert_within_budget = budget.assert_within_budget
    with mock.patch.object(budget, "assert_within_budget", judge):
        budget._check(parts, attention_oracle, ATTENTIONS, [inputs], None, {"scale": None, **options})


def _agree():
    for dtype, is_causal, balance in itertools.product(DTYPES, (False, True), BALANCES):
        _agrees(dtype, is_causal=is_causal, balance=balance)
    _agrees(torch.float64, (16, 40), kv_heads=4)
    _agrees(torch.float32, kv_heads=1, scale=0.3, is_causal=True)


def test_two_processes(pair):
    pair.run(_agree)


def test_four_processes(four):
    four.run(_agree)


def _every_backend(names):
    for name in names:
        with seqkernels.use_backend(name):
            _agrees(torch.float64, is_causal=True)


def test_every_implementation(pair):
    pair.run(_every_backend, [name for name in ("reference", "numba", "native") if name in _served()])


def _served():
    from seqkernels import backends

    call = backends.Call("attention", "cpu", torch.float64)
    return [name for name in backends.NAMES if backends.why_not(name, call) is None]


def _of_a_group():
    """Two rings of processes that are no neighbours, each with a sequence of its own."""
    groups = [dist.new_group([first, first + 2]) for first in range(2)]
    number = dist.get_rank() % 2
    mine, others = groups[number], groups[1 - number]
    q, k, v = (torch.randn(1, 2, 8, 4, dtype=torch.float64, generator=_generator(number)) for _ in range(3))
    own = [shard_sequence(x, 2, mine) for x in (q, k, v)]
    found = unshard_sequence(ring_attention(*own, mine, is_causal=True), 2, mine)
    torch.testing.assert_close(found, attention(q, k, v, is_causal=True))
    with pytest.raises(ValueError, match="group: expected one that this process belongs to"):
        ring_attention(*own, others)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def test_groups(four):
    four.run(_of_a_group)


def _gradients():
    x = torch.randn(3, 1, 2, 8, 4, generator=_generator(0), dtype=torch.float64)
    q, k, v = (shard_sequence(part, 2) for part in x)
    whole = [part.clone().requires_grad_() for part in x]
    _, lse = attention(*whole, return_lse=True)
    expected = torch.autograd.grad(lse.square().sum(), whole[:2])
    # Of the log-sum-exp alone, and of the keys alone.
    own = q.requires_grad_(), k.requires_grad_(), v
    _, lse = ring_attention(*own, return_lse=True)
    for grad, exact in zip(torch.autograd.grad(lse.square().sum(), own[:2]), expected, strict=True):
        torch.testing.assert_close(grad, shard_sequence(exact, 2))
    _, lse = ring_attention(q.detach(), k, v, return_lse=True)
    torch.testing.assert_close(torch.autograd.grad(lse.square().sum(), k)[0], shard_sequence(expected[1], 2))
    # The second order, which every process refuses before it sends anything.
    for outcome, name in ((ring_attention(*own), "ring_attention"), (unshard_sequence(q, 2), "unshard_sequence")):
        with pytest.raises(NotImplementedError, match=f"{name}: gradients of gradients"):
            torch.autograd.grad(outcome.sum(), q, create_graph=True)


def _autocast():
    q, k, v = (shard_sequence(x, 2) for x in torch.randn(3, 1, 2, 8, 4, generator=_generator(0)))
    with torch.autocast("cpu", torch.bfloat16):
        found = ring_attention(q, k, v)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, ring_attention(*(x.bfloat16() for x in (q, k, v))))


def _sequences():
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.arange(6 * world).view(2, 3 * world)
    assert torch.equal(shard_sequence(x, 1, balance="contiguous"), x[:, 3 * rank : 3 * rank + 3])
    x = torch.arange(4 * world)
    ends = [2 * rank, 2 * rank + 1, 4 * world - 2 * rank - 2, 4 * world - 2 * rank - 1]
    assert shard_sequence(x, -1).tolist() == ends
    for balance in BALANCES:
        assert torch.equal(unshard_sequence(shard_sequence(x, 0, balance=balance), 0, balance=balance), x)


def _errors():
    q = torch.randn(1, 2, 3, 4)
    count = 2 * dist.get_world_size()
    for call, kind, text in (
        (
            lambda: shard_sequence(q, 2),
            ValueError,
            f"x: expected a length in dimension 2 that is a multiple of {count}",
        ),
        (lambda: unshard_sequence(q, 2), ValueError, "x: expected an even length in dimension 2 .* got 3"),
        (lambda: shard_sequence(q, 2, balance="head"), ValueError, "balance: expected one of 'zigzag', .* got 'head'"),
        (lambda: ring_attention(q, q, q, balance=""), ValueError, "balance: expected one of 'zigzag', .* got ''"),
        (lambda: ring_attention(q, q, q, is_causal=True), ValueError, "q: expected an even number of queries .* got 3"),
        (
            lambda: ring_attention(q, q[:, :, :2], q[:, :, :2], is_causal=True),
            ValueError,
            "k: expected as many keys as queries, 3, with is_causal, got 2",
        ),
        (lambda: ring_attention(q, q, q.double()), TypeError, r"v: expected torch\.float32 as q, got torch\.float64"),
        (lambda: ring_attention(q, None, q), TypeError, "k: expected a Tensor, got NoneType"),
        (lambda: ring_attention(q, q, q, scale="1"), TypeError, "scale: expected a number or None, got str"),
        (lambda: ring_attention(q, q, q, precision="half"), ValueError, "precision: expected one of .* got 'half'"),
        (lambda: ring_attention(*[q.to("meta")] * 3), ValueError, "q: expected on a device that sends .* got meta"),
        (lambda: ring_attention(q, q, q, is_causal="yes"), TypeError, "is_causal: expected a bool, got str"),
        (
            lambda: torch.func.vmap(lambda k: ring_attention(q, k, q))(q.unsqueeze(0)),
            NotImplementedError,
            r"k: ring attention has no rules for torch\.func",
        ),
        (lambda: shard_sequence(q, 4), IndexError, "dim: expected from -4 to 3, got 4"),
        (lambda: unshard_sequence(q, -5), IndexError, "dim: expected from -4 to 3, got -5"),
        (lambda: unshard_sequence(q.sum(), 0), IndexError, "dim: expected none, x having no dimension, got 0"),
        (lambda: shard_sequence(q, "2"), TypeError, "dim: expected an integer, got str"),
        (lambda: unshard_sequence([q], 2), TypeError, "x: expected a Tensor, got list"),
        (lambda: ring_attention(q, q, q, "cpu"), TypeError, "group: expected a ProcessGroup .* or None, got str"),
    ):
        with pytest.raises(kind, match=text):
            call()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    spread = distribute_tensor(q, mesh, [Shard(1)])
    with pytest.raises(TypeError, match="q: expected this process's part as a plain Tensor, got a DTensor"):
        ring_attention(spread, spread, spread)


def _unlike():
    """What each process has for itself, found out where torch is told to look."""
    rank = dist.get_rank()
    x = torch.randn(1, 2, 4, 4)
    longer, double, wider = torch.randn(1, 2, 4 + 2 * rank, 4), (x, x.double())[rank], torch.randn(1, 2, 4, 4 + rank)
    with_grad = x.clone().requires_grad_(bool(rank))
    shapes = [r"torch\.float32 of shape \(1, 2, 4, 4\)", r"torch\.float32 of shape \(1, 2, 6, 4\)"]
    dtypes = [shapes[0], r"torch\.float64 of shape \(1, 2, 4, 4\)"]
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        for call, name, said in (
            (lambda: ring_attention(longer, x, x), "q", shapes),
            (lambda: ring_attention(double, double, double), "q", dtypes),
            (lambda: ring_attention(x, x, wider), "v", None),
            (lambda: ring_attention(x, x, x, is_causal=bool(rank)), "is_causal", ["False", "True"]),
            (lambda: ring_attention(x, x, x, scale=0.5 + rank), "scale", ["0.5", "1.5"]),
            (lambda: ring_attention(x, x, x, balance=BALANCES[rank]), "balance", ["'zigzag'", "'contiguous'"]),
            (lambda: ring_attention(x, with_grad, x), "requires_grad", ["False", "True"]),
            (lambda: unshard_sequence(with_grad, 2), "requires_grad", ["False", "True"]),
            (lambda: unshard_sequence(longer, 2), "x", shapes),
            (lambda: unshard_sequence(x, rank + 1), "dim", ["1", "2"]),
        ):
            here, there = (said[rank], said[1 - rank]) if said else (".*", ".*")
            text = f"^{name}: expected the same on all processes of the group, got {here} here and {there} on process"
            with pytest.raises(ValueError, match=f"{text} {1 - rank}$"):
                call()
        ring_attention(x, x, x, is_causal=True)
        assert unshard_sequence(x, -2).shape == (1, 2, 8, 4)
    finally:
        dist.set_debug_level(level)


@pytest.mark.parametrize("job", [_gradients, _autocast, _sequences, _errors, _unlike], ids=lambda job: job.__name__[1:])
def test_more(pair, job):
    pair.run(job)


def test_no_processes():
    x = torch.randn(1, 2, 4, 4)
    for call in (lambda: ring_attention(x, x, x), lambda: shard_sequence(x, 2)):
        with pytest.raises(RuntimeError, match=r"group: expected torch\.distributed\.init_process_group"):
            call()


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_parts_are_what_causality_leaves(world, balance):
    """Each pair of places that a query may read is in one part, no other is; and zigzag shares the work equally."""
    size = 4
    places = torch.arange(world * size)
    chunks = places.view(-1, size // sequence.BALANCES[balance])
    own = [chunks[list(sequence.chunks_of(rank, world, balance))].flatten() for rank in range(world)]
    work = []
    for rank, rows in enumerate(own):
        seen = torch.zeros(size, world * size, dtype=torch.int)
        count = 0
        for other, columns in enumerate(own):
            part = ring.part_of(rank, other, size, True, balance)
            if part is None:
                continue
            mask = torch.ones(size, size, dtype=torch.int)
            read = torch.zeros_like(mask)
            read[part.queries, part.keys] = (mask.tril() if part.is_causal else mask)[part.queries, part.keys]
            seen[:, columns] += read
            count += int(read.sum())
        assert torch.equal(seen, (places <= rows.unsqueeze(1)).int())
        work.append(count)
    assert balance == "contiguous" or len(set(work)) == 1
