"""The compiled kernels over many sizes, in buffers of just these sizes.

Every output is filled with NaN before and must be finite after. Values are compared in tests/ops; here the calls are
many and cheap, so that `make sanitize` sees each way to an edge, for every instruction set and dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels import testing
from seqkernels.backends import native
from seqkernels.backends.native.extension import extension
from seqkernels.cells import CELLS, DTYPES, accumulate_dtype
from seqkernels.ops import attention, recurrence
from seqkernels.ops import weights as of_weights
from seqkernels.ops.rotary import rotary_op
from seqkernels.scores import UNBOUNDED, Scores

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

#: T, B, H: one to several of every block, and what is left over.
RECURRENCES = [
    (1, 1, 1),
    (2, 1, 2),
    (3, 2, 3),
    (2, 3, 7),
    (1, 4, 8),
    (2, 5, 9),
    (3, 6, 15),
    (2, 7, 16),
    (1, 8, 17),
    (2, 9, 31),
    (2, 13, 33),
    (1, 16, 47),
    (3, 1, 64),
    (2, 17, 65),
    (1, 33, 5),
    (0, 2, 3),
    (2, 0, 3),
]
#: M, N, D, Dv.
ATTENTIONS = [
    (1, 1, 1, 1),
    (1, 7, 3, 2),
    (2, 3, 8, 8),
    (5, 16, 15, 17),
    (7, 1, 16, 5),
    (8, 33, 31, 16),
    (16, 17, 33, 64),
    (31, 65, 24, 7),
    (33, 32, 64, 33),
    (65, 63, 7, 31),
    (3, 129, 65, 1),
    (130, 4, 80, 80),
    (2, 5, 512, 511),
    (0, 3, 4, 4),
    (3, 0, 4, 4),
]
#: M, N, D, Dv with options; the first ones of one query are what decoding asks for.
OPTIONED = [
    (1, 1, 1, 1),
    (1, 300, 24, 40),
    (1, 1025, 65, 7),
    (2, 129, 33, 64),
    (7, 33, 16, 5),
    (9, 65, 31, 17),
    (33, 64, 64, 33),
    (70, 131, 8, 80),
    (5, 0, 8, 8),
    (0, 5, 8, 8),
]
ATTENTION_OPTIONS = [
    (),
    ("window",),
    ("window", "bottom_right"),
    ("causal", "bottom_right", "key_lengths"),
    ("alibi", "softcap", "sink"),
    ("dropout",),
    ("varlen",),
    ("varlen", "causal", "window", "bottom_right"),
    tuple(name for name in testing.ATTENTION_OPTIONS if name not in ("causal", "varlen")),
    tuple(name for name in testing.ATTENTION_OPTIONS if name != "causal"),
]
#: Queries and keys of documents: none of one, of the other, of both, one, odd numbers, several blocks.
DOCUMENTS = [
    ([0, 1, 7, 0, 33, 1], [5, 0, 9, 0, 64, 1]),
    ([1, 1, 1], [257, 3, 1]),
    ([65], [63]),
    ([3, 129, 0], [3, 129, 0]),
    ([0], [0]),
    ([], []),
]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with seqkernels.use_backend("native"), testing.poisoned_empty():
        yield


def settings() -> Iterator[None]:
    """Each instruction set with two threads, of which small calls use one, and the last with one."""
    isas = extension().isas()
    for isa, count in [*((isa, 2) for isa in isas), (isas[-1], 1)]:
        with testing.force_isa(isa), testing.threads(count):
            yield


def finite(*tensors: torch.Tensor) -> None:
    for x in tensors:
        assert x.isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
def test_recurrence(cell: str, dtype: torch.dtype) -> None:
    gates, num_states, _ = CELLS[cell]
    for case, ((steps, batch, hidden), control) in enumerate(itertools.product(RECURRENCES, (False, True))):
        reverse, project = case % 3 == 0, case % 4 != 0
        inputs = testing.recurrence_inputs(
            cell, steps, batch, hidden, dtype, bias=steps % 2 == 0, control=control, requires_grad=False
        )
        width = case % 70 + 1 if project else gates * hidden
        weights = [
            torch.ones(gates * hidden, width, dtype=dtype) / width if project else None,
            inputs.weight_hh,
            inputs.bias_hh if project else None,
            inputs.bias_hh,
            torch.ones(num_states, hidden, dtype=dtype) if case % 5 == 0 else None,
            *[None] * 6,
        ]
        x = torch.ones(steps, batch, width, dtype=dtype)
        grad = torch.ones(steps, batch, hidden, dtype=dtype)
        needs = [True, True, *(w is not None for w in weights)]
        for _ in settings():
            rest = (inputs.state0, inputs.control, cell, reverse)
            hidden_only, state_n, _ = recurrence.forward_op(x, weights, *rest, False)
            finite(hidden_only, state_n)
            states, state_n, reserve = recurrence.forward_op(x, weights, *rest, True)
            finite(states, state_n, reserve)
            for grads in (
                (grad, None, state_n, None),
                (None, grad if cell == "lstm" else None, None, None),
            ):
                results = recurrence.backward_op(grads, x, weights, states, reserve, *rest[1:], needs)
                finite(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrence_with_options(cell: str, dtype: torch.dtype) -> None:
    """All options at once and, in turn over the sizes, each alone."""
    names = [name for name in testing.OPTIONS if cell == "lstm" or name not in ("peephole", "norm_c")]
    alone = [
        ("zoneout", "seed") if name == "seed" else (name,) for name in names if name not in ("weight_ih", "bias_ih")
    ]
    for case, (steps, batch, hidden) in enumerate(RECURRENCES):
        for chosen in (tuple(names), alone[case % len(alone)]):
            inputs = testing.recurrence_inputs(
                cell,
                steps,
                batch,
                hidden,
                dtype,
                input_size=5 if "weight_ih" in chosen else None,
                control=case % 2 == 0,
                detach=True,
                requires_grad=False,
            )
            options = testing.recurrence_options(
                cell, batch, hidden, dtype, names=chosen, input_size=5, requires_grad=False
            )
            weights = testing.recurrence_weights(inputs.weight_hh, inputs.bias_hh, **options)
            needs = [True, True, *(w is not None for w in weights)]
            for _ in settings():
                rest = (inputs.state0, inputs.control, cell, case % 3 == 0)
                hidden_only, state_n, _ = recurrence.forward_op(inputs.input, weights, *rest, False)
                finite(hidden_only, state_n)
                states, state_n, reserve = recurrence.forward_op(inputs.input, weights, *rest, True)
                finite(states, state_n, reserve)
                of_steps = torch.ones(steps, batch, hidden, dtype=dtype)
                of_gates = torch.ones(steps, batch, CELLS[cell].gates, hidden, dtype=dtype)
                cells = of_steps if cell == "lstm" else None
                for grads in ((of_steps, cells, state_n, of_gates), (of_steps, None, None, None)):
                    finite(*recurrence.backward_op(grads, inputs.input, weights, states, reserve, *rest[1:], needs))


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
def test_attention(heads: tuple[int, int], dtype: torch.dtype) -> None:
    patterns = [(None, None), ("B11N", None), ("11MN", "BHMN"), (None, "1HM1"), ("1111", "11MN")]
    for case, ((queries, keys, size, value_size), (mask, bias)) in enumerate(itertools.product(ATTENTIONS, patterns)):
        is_causal = case % 2 == 0
        inputs = testing.attention_inputs(
            2,
            heads[0],
            queries,
            keys,
            size,
            dtype,
            value_size=value_size,
            kv_heads=heads[1],
            mask=mask,
            bias=bias,
            requires_grad=False,
        )
        for _ in settings():
            packed = Scores(0.3, inputs.mask, inputs.bias, right=0 if is_causal else UNBOUNDED).pack()
            out, lse = attention.forward_op(*inputs[:3], *packed)
            finite(out)
            assert not lse.isnan().any()
            needs = [True] * 3 + [bias is not None]
            finite(*attention.backward_op([out, None], *inputs[:3], out, lse, *packed, needs))


def attend_both_ways(q: Tensor, k: Tensor, v: Tensor, scores: Scores, turn: int) -> None:
    """Everything that the compiled module computes of attention, with one of `settings`, in turn."""
    packed = scores.pack()
    wanted = [scores.bias is not None]
    every = len(extension().isas()) + 1
    for _ in itertools.islice(settings(), turn % every, turn % every + 1):
        out, lse = attention.forward_op(q, k, v, *packed)
        finite(out, of_weights.column_sums(q, k, lse, scores))
        assert not lse.isnan().any()
        for average in (False, True):
            finite(of_weights.weights(q, k, lse, scores, average))
        of_lse = torch.ones_like(lse)
        for grads, needs in (
            ([out, None], [True] * 3),
            ([out, of_lse], [True] * 3),
            ([None, of_lse], [True, False, False]),
            ([out, None], [False, True, False]),
            ([out, None], [False, False, True]),
        ):
            finite(*attention.backward_op(grads, q, k, v, out, lse, *packed, needs + wanted))


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=str)
def test_attention_with_options(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Options with masks and biases of all patterns in turn, in the dtype of the queries and the accumulation dtype."""
    patterns = [(None, None), ("B11N", None), (None, "1HM1"), ("11MN", "BHMN"), (None, "B11N"), ("BH1N", "11MN")]
    for case, (shape, names) in enumerate(itertools.product(OPTIONED, ATTENTION_OPTIONS)):
        (queries, keys, size, value_size), turn = shape, case + case // len(ATTENTION_OPTIONS) + heads[0]
        mask, bias = patterns[case % len(patterns)]
        batch = 1 if "varlen" in names else 2
        q, k, v, _, _ = testing.attention_inputs(
            batch, heads[0], queries, keys, size, dtype, value_size=value_size, kv_heads=heads[1], requires_grad=False
        )
        drawn = testing.attention_options(names, 2, heads[0], queries, keys, dtype, requires_grad=False, seed=case)
        full = Scores(0.3, **drawn).shape(q, k)
        extra = testing.attention_inputs(*full, 1, torch.float32, mask=mask, bias=bias, requires_grad=False)
        added = extra.bias
        if added is not None:
            added = added.to(dtype if case % 4 else accumulate_dtype(dtype))
            added[added < -1.25] = -torch.inf
        attend_both_ways(q, k, v, Scores(0.3, extra.mask, added, **drawn), turn)


@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
def test_documents(lengths: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    """Documents that fill the tensors, and those with rows of none before and behind them."""
    starts = [torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in lengths]
    longest = max(lengths[0], default=0), max(lengths[1], default=0)
    of_documents = [names for names in ATTENTION_OPTIONS if "varlen" not in names]
    for case, (around, names) in enumerate(itertools.product((0, 3), of_documents)):
        count, size = len(lengths[0]), 17 + 16 * (case % 2)
        q, k, v, _, _ = testing.attention_inputs(
            1,
            4,
            sum(lengths[0]) + 2 * around,
            sum(lengths[1]) + 2 * around,
            size,
            dtype,
            value_size=5,
            kv_heads=2,
            requires_grad=False,
        )
        drawn = testing.attention_options(names, count, 4, *longest, dtype, requires_grad=False, seed=case)
        if "key_lengths" in drawn:
            drawn["key_lengths"] = (starts[1].diff() - case % 3).clamp(min=0)
        documents = Scores(
            0.3,
            cu_seqlens_q=starts[0] + around,
            cu_seqlens_k=starts[1] + around,
            max_seqlen_q=longest[0] + case % 2,
            max_seqlen_k=longest[1],
        )
        attend_both_ways(q, k, v, documents._replace(**drawn), case + count)


@pytest.mark.parametrize("page", [1, 5, 16, 40])
def test_pages(page: int, dtype: torch.dtype) -> None:
    """Pages in tensors of no more than these, in order and in reverse."""
    names = [(), ("window", "bottom_right"), tuple(name for name in testing.ATTENTION_OPTIONS if name != "varlen")]
    for case, ((queries, size, value_size), chosen) in enumerate(
        itertools.product([(1, 1, 1), (1, 65, 7), (3, 24, 40), (9, 31, 17), (33, 64, 80)], names)
    ):
        blocks = case % 3 + 300 // page
        keys = blocks * page
        drawn = testing.attention_options(chosen, 2, 4, queries, keys, dtype, requires_grad=False, seed=case)
        drawn["key_lengths"] = torch.tensor([keys, keys - page // 2 - 1], dtype=torch.int32)
        table = torch.arange(2 * blocks, dtype=torch.int32).view(2, blocks)
        q, *_ = testing.attention_inputs(2, 4, queries, 0, size, dtype, requires_grad=False)
        _, k, v, *_ = testing.attention_inputs(
            2 * blocks, 2, 0, page, size, dtype, value_size=value_size, requires_grad=False
        )
        if case % 2:
            table = table.flip(0, 1)
        for _ in settings():
            scores = Scores(0.3, block_table=table, **drawn)
            out, lse = attention.forward_op(q, k, v, *scores.pack())
            finite(out)
            assert not lse.isnan().any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool, dtype: torch.dtype) -> None:
    """Every rest of a vector, of elements and of pairs, alone and behind other rows."""
    wide = accumulate_dtype(dtype)
    for case, size in enumerate((*range(1, 36), 63, 64, 65, 66, 127, 128, 129, 200)):
        for pairs in {0, size // 4, size // 2}:
            leading = [(), (1,), (3,), (2, 3), (2, 2, 3), (0, 3)][case % 6]
            x = torch.ones(*leading, size, dtype=dtype)
            cos, sin = (torch.ones(*leading[-1:], pairs, dtype=wide) for _ in range(2))
            for _ in settings():
                finite(rotary_op(x, cos, sin, interleaved, case % 2 == 0))
    # Rows in another order, enough for two threads.
    x = torch.ones(2, 133, 5, 65, dtype=dtype).transpose(1, 2)
    cos, sin = (torch.ones(133, 31, dtype=wide) for _ in range(2))
    for _ in settings():
        finite(rotary_op(x, cos, sin, interleaved, False))
