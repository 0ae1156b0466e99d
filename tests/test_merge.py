"""Attention over parts of the keys, put together."""

from __future__ import annotations

import functools
import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import seqkernels
from seqkernels import testing
from seqkernels.cells import DTYPES, accumulate_dtype
from seqkernels.functional import attention, merge
from seqkernels.testing.baselines import ATTENTIONS


@pytest.fixture(autouse=True)
def _reference():
    with seqkernels.use_backend("reference"):
        yield


def _parts(dtype=torch.float32, shape=(2, 3, 40, 4), seed=0, requires_grad=True, empty=True):
    """Two outputs and their log-sum-exp; a quarter of the rows of each is empty."""
    generator = torch.Generator().manual_seed(seed)
    rows = shape[:3] if len(shape) == 4 else (shape[1], shape[0])
    for _ in range(2):
        out = torch.randn(shape, generator=generator).to(dtype)
        lse = (4 * torch.randn(rows, generator=generator)).to(accumulate_dtype(dtype))
        if empty:
            lse[torch.rand(rows, generator=generator) < 0.25] = -torch.inf
        yield from (out.requires_grad_(requires_grad), lse.requires_grad_(requires_grad))


def _naive(out1, lse1, out2, lse2):
    """By exponentials, with rows of nothing as 0."""
    weights = [lse.exp().unsqueeze(-1) for lse in (lse1, lse2)]
    total = weights[0] + weights[1]
    level = torch.where(total == 0, 1, total)
    out = (weights[0] * out1.to(lse1.dtype) + weights[1] * out2.to(lse1.dtype)) / level
    return out.to(out1.dtype), torch.where(total == 0, -torch.inf, level.log()).squeeze(-1)


def _evaluate(fn, tensors, grads):
    tensors = [testing.cast(x, x.dtype) for x in tensors]
    outputs = fn(*tensors)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, tensors, grads)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype):
    tensors = list(_parts(dtype))
    grads = list(testing.random_grads({"out": tensors[0], "lse": tensors[1]}).values())
    found = _evaluate(merge, tensors, grads)
    exact = _evaluate(_naive, [testing.cast(x, torch.float64) for x in tensors], [x.double() for x in grads])
    to = torch.float32 if dtype == torch.float64 else dtype
    same = [testing.cast(x, accumulate_dtype(to) if k % 2 else to) for k, x in enumerate(tensors)]
    own = _evaluate(_naive, same, [grads[0].to(to), grads[1].to(accumulate_dtype(to))])
    for k, (x, y, z) in enumerate(zip(found, exact, own, strict=True)):
        assert x.dtype == (accumulate_dtype(dtype) if k % 2 else dtype)
        testing.assert_within_budget(x, y, z, str(k))


def test_log_sum_exp_of_any_size():
    out1, lse1, out2, lse2 = _parts(empty=False, requires_grad=False)
    out, lse = merge(out1, lse1, out2, lse2)
    for offset in (-1e4, 1e4):
        # Rounded like the sum, the two keep their distance.
        one, two = lse1 + offset, lse2 + offset
        other, level = merge(out1, one, out2, two)
        assert other.isfinite().all()
        assert torch.equal(level, torch.logaddexp(one, two))
        exact, _ = merge(out1.double(), one.double(), out2.double(), two.double())
        testing.assert_within_budget(other, exact, out)
    far, _ = merge(out1, lse1 - 1e5, out2, lse2)
    assert torch.equal(far, out2)
    assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_part_alone_stays_as_it_is(dtype):
    out, lse, *_ = _parts(dtype, empty=False)
    grads = list(testing.random_grads({"out": out, "lse": lse}).values())
    # What an empty part holds does not count.
    nothing = torch.full_like(out, torch.nan).requires_grad_()
    never = torch.full_like(lse, -torch.inf).requires_grad_()
    for parts in ((out, lse, nothing, never), (nothing, never, out, lse)):
        results = merge(*parts)
        assert torch.equal(results[0], out)
        assert torch.equal(results[1], lse)
        found = dict(zip(map(id, parts), torch.autograd.grad(results, parts, grads), strict=True))
        assert torch.equal(found[id(out)], grads[0])
        assert torch.equal(found[id(lse)], grads[1])
        assert (found[id(nothing)] == 0).all()
        assert (found[id(never)] == 0).all()


def test_two_empty_parts():
    tensors = list(_parts())
    tensors[1::2] = [torch.full_like(x, -torch.inf).requires_grad_() for x in tensors[1::2]]
    out, lse = merge(*tensors)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all((x == 0).all() for x in torch.autograd.grad((out, lse), tensors, (out + 1, torch.ones_like(lse))))


def test_gradcheck():
    tensors = list(_parts(torch.float64, (1, 2, 4, 3)))

    def outputs(*parts):
        out, lse = merge(*parts)
        return out, torch.where(lse == -torch.inf, 0, lse)

    assert any((x == -torch.inf).any() for x in tensors[1::2])
    finite = [x.isfinite() for x in tensors[1::2]]

    def fixed(out1, lse1, out2, lse2):
        # No finite difference is taken at an infinity.
        return outputs(out1, torch.where(finite[0], lse1, -torch.inf), out2, torch.where(finite[1], lse2, -torch.inf))

    given = [x.detach().nan_to_num(neginf=0).requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(fixed, given)
    assert torch.autograd.gradgradcheck(fixed, given)


def _whole_by_parts(q, k, v, *_, cuts):
    """Attention over the keys between the cuts, merged from left to right."""
    parts = [
        attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in itertools.pairwise([0, *cuts, k.shape[2]])
    ]
    return functools.reduce(lambda x, y: merge(*x, *y), parts)


@hypothesis.given(
    lengths=st.tuples(st.integers(0, 9), st.integers(1, 20)),
    cuts=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_parts_make_the_whole(lengths, cuts, sizes):
    """Also empty parts."""
    cuts = sorted(min(cut, lengths[1]) for cut in cuts)
    judged = {}
    for seed in range(6):
        inputs = testing.attention_inputs(2, 4, *lengths, sizes[0], value_size=sizes[1], kv_heads=2, seed=seed)
        grads = testing.random_grads(testing.evaluate(testing.attention_oracle, inputs, {}))
        double = inputs._make(testing.cast(x, torch.float64) for x in inputs), {n: x.double() for n, x in grads.items()}
        found = testing.evaluate(_whole_by_parts, *double, cuts=cuts)
        exact = testing.evaluate(testing.attention_oracle, *double)
        own = [testing.evaluate(fn, inputs, grads) for fn in ATTENTIONS]
        for name, x in found.items():
            judged.setdefault(name, []).append((x, exact[name], *(each[name] for each in own)))
    for name, columns in judged.items():
        # Judged as if in float32: what is meant, not how exactly it is computed.
        found, exact, *own = (torch.stack(column) for column in zip(*columns, strict=True))
        testing.assert_within_budget(found.float(), exact, own, name)


def test_documents_and_sinks():
    """Rows of documents, and a sink that belongs to one part."""
    inputs = testing.attention_inputs(1, 4, 9, 12, 8, torch.float64, kv_heads=2, requires_grad=False)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in inputs[:3])
    rows = torch.tensor([1, 4, 9])
    sink = torch.randn(4, dtype=torch.float64)

    shared = {"cu_seqlens_q": rows, "cu_seqlens_k": torch.tensor([0, 5, 12]), "return_lse": True}
    lengths = torch.tensor([2, 3])
    left = attention(q, k, v, key_lengths=lengths, sink=sink, **shared)
    right = attention(q, k, v, drop=torch.arange(7) < lengths.view(2, 1, 1, 1), **shared)
    whole = attention(q, k, v, sink=sink, **shared)
    for x, y in zip(merge(*left, *right), whole, strict=True):
        testing.assert_within_budget(x.float(), y, y.float())


WRONG = [
    ("out1", lambda x: x.tolist(), TypeError, "out1: expected a Tensor, got list"),
    ("lse1", lambda x: None, TypeError, "lse1: expected a Tensor, got NoneType"),
    ("out1", lambda x: x.long(), TypeError, r"out1: expected one of .*, got torch\.int64"),
    ("out1", lambda x: x[0, 0], ValueError, r"out1: expected \(B, Hq, M, Dv\) or \(total, Hq, Dv\), got \(40, 4\)"),
    ("lse1", lambda x: x.half(), TypeError, r"lse1: expected torch\.float32, got torch\.float16"),
    ("lse2", lambda x: x.double(), TypeError, r"lse2: expected torch\.float32, got torch\.float64"),
    ("out2", lambda x: x.half(), TypeError, r"out2: expected torch\.float32, got torch\.float16"),
    ("out2", lambda x: x[..., 1:], ValueError, r"out2: expected shape \(2, 3, 40, 4\), got \(2, 3, 40, 3\)"),
    ("lse1", lambda x: x.unsqueeze(3), ValueError, r"lse1: expected shape \(2, 3, 40\), got \(2, 3, 40, 1\)"),
    ("lse2", lambda x: x[:1], ValueError, r"lse2: expected shape \(2, 3, 40\), got \(1, 3, 40\)"),
    ("out2", lambda x: x.to("meta"), ValueError, "out2: expected on cpu as out1, got meta"),
]


@pytest.mark.parametrize(("name", "spoil", "kind", "text"), WRONG)
def test_errors(name, spoil, kind, text):
    given = dict(zip(("out1", "lse1", "out2", "lse2"), _parts(requires_grad=False), strict=True))
    with pytest.raises(kind, match=text):
        merge(**given | {name: spoil(given[name])})


def test_compiles():
    torch._dynamo.reset()
    tensors = list(_parts())
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(*tensors), merge(*tensors), strict=True):
        assert torch.equal(x, y)
