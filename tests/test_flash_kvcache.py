"""flash-attn's attention over a cache does what its docstring says, and changes the cache as it says."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import seqkernels
from seqkernels import testing
from seqkernels.cells import DTYPES, accumulate_dtype
from seqkernels.functional import flash_attn_func, flash_attn_with_kvcache

from .flash_dense import dense, judge, on_all

INT = torch.int32


class Case(NamedTuple):
    """A cache, and how it is used. Whatever may not be read is NaN."""

    q: Tensor  # (B, M, H, D)
    k_cache: Tensor  # (B, S, Hk, D), each sequence in its place
    v_cache: Tensor
    new: tuple[Tensor, Tensor] | None
    rotary: tuple[Tensor, Tensor] | None
    lengths: list[int]  # before the call
    leftpad: list[int] | None


def draw(
    *,
    seed=0,
    dtype=torch.float32,
    queries=3,
    heads=(2, 2),
    size=16,
    value_size=16,
    capacity=20,
    lengths=(5, 0, 11),
    leftpad=None,
    new=2,
    rotary=None,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    batch, kv_heads = len(lengths), heads[0]
    caches = normal(batch, capacity, kv_heads, size), normal(batch, capacity, kv_heads, value_size)
    for b, length in enumerate(lengths):
        for cache in caches:
            cache[b, length:] = torch.nan
            cache[b, : leftpad[b] if leftpad else 0] = torch.nan
    angles = torch.rand(capacity + 8, (rotary or 0) // 2, generator=generator) * 6.3
    return Case(
        normal(batch, queries, kv_heads * heads[1], size),
        *caches,
        None if new is None else (normal(batch, new, kv_heads, size), normal(batch, new, kv_heads, value_size)),
        None if rotary is None else (angles.cos().to(dtype), angles.sin().to(dtype)),
        list(lengths),
        leftpad,
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, place: int, interleaved: bool) -> Tensor:
    """One vector per head (H, D), element by element."""
    acc, half = accumulate_dtype(x.dtype), cos.shape[1]
    out = x.to(acc).clone()
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = cos[place, i].to(acc), sin[place, i].to(acc)
        out[:, a] = x[:, a].to(acc) * c - x[:, b].to(acc) * s
        out[:, b] = x[:, b].to(acc) * c + x[:, a].to(acc) * s
    return out.to(x.dtype)


def expected(case: Case, variant, to, *, interleaved=True, **options):
    """Output, log-sum-exp and the cache afterwards, in the dtype `to`."""
    q, k_cache, v_cache = (x.to(to).clone() for x in case[:3])
    local = options.get("causal") or options.get("window_size", (-1, -1)) != (-1, -1)
    new = 0
    if case.new is not None:
        k, v = (x.to(to).clone() for x in case.new)
        new = k.shape[1]
        if case.rotary is not None:
            cos, sin = (x.to(to) for x in case.rotary)
            for b, length in enumerate(case.lengths):
                for i in range(new):
                    k[b, i] = rotate(k[b, i], cos, sin, length + i, interleaved)
                for i in range(q.shape[1]):
                    q[b, i] = rotate(q[b, i], cos, sin, length + i if local else length, interleaved)
        for b, length in enumerate(case.lengths):
            k_cache[b, length : length + new], v_cache[b, length : length + new] = k[b], v[b]
    sequences = []
    for b, length in enumerate(case.lengths):
        keys = slice(case.leftpad[b] if case.leftpad else 0, length + new)
        sequences.append((q[b], k_cache[b, keys], v_cache[b, keys]))
    outs, levels = dense(sequences, variant, **options)
    return torch.stack(outs), torch.stack(levels), k_cache, v_cache


class Stored(NamedTuple):
    """Where `flash_attn_with_kvcache` finds a case's cache, and what it is told."""

    k_cache: Tensor
    v_cache: Tensor
    arguments: dict[str, object]

    def rows(self, which: int) -> Tensor:
        """The keys (0) or values (1) of each sequence, NaN where it has no pages."""
        cache = self[which]
        if "block_table" in self.arguments:
            # The page -1 is the last one, which no sequence has.
            return cache[self.arguments["block_table"].long()].flatten(1, 2)
        return cache[self.arguments["cache_batch_idx"].long()] if "cache_batch_idx" in self.arguments else cache


def store(case: Case, kind: str, page: int = 4, told: str = "tensor") -> Stored:
    """The cache of a case as it is, in other rows (``"rows"``), or in pages."""
    batch, capacity = case.k_cache.shape[:2]
    arguments: dict[str, object] = {"cache_seqlens": torch.tensor(case.lengths, dtype=INT)}
    if told == "number":
        arguments["cache_seqlens"] = case.lengths[0]
    if case.new is not None:
        arguments["k"], arguments["v"] = case.new
    if case.rotary is not None:
        arguments["rotary_cos"], arguments["rotary_sin"] = case.rotary
    if case.leftpad is not None:
        arguments["cache_leftpad"] = torch.tensor(case.leftpad, dtype=INT)
    generator = torch.Generator().manual_seed(7)
    caches = [case.k_cache.clone(), case.v_cache.clone()]
    if kind == "rows":
        index = torch.randperm(batch + 2, generator=generator)[:batch]
        arguments["cache_batch_idx"] = index.to(INT)
        caches = [x.new_full((batch + 2, *x.shape[1:]), torch.nan).index_copy(0, index, x) for x in caches]
    if kind == "pages":
        new = 0 if case.new is None else case.new[0].shape[1]
        count = -(-capacity // page)
        order = torch.cat((torch.randperm(batch * count + 2, generator=generator), torch.tensor([batch * count + 2])))
        table = order[: batch * count].view(batch, count).to(INT)
        stored = []
        for x in caches:
            padded = torch.cat([x, x.new_full((batch, count * page - capacity, *x.shape[2:]), torch.nan)], 1)
            pages = x.new_full((len(order), page, *x.shape[2:]), torch.nan)
            stored.append(pages.index_copy(0, table.flatten().long(), padded.view(-1, page, *x.shape[2:])))
        for b, length in enumerate(case.lengths):
            # Nobody looks behind the last key.
            table[b, -(-(length + new) // page) :] = -1
        caches, arguments["block_table"] = stored, table
    return Stored(*caches, arguments)


def check(case: Case, kind: str = "plain", page: int = 4, told: str = "tensor", *, interleaved=True, **options) -> None:
    """Output within the budget and every element of the cache as it should be, by every implementation."""

    def run():
        stored = store(case, kind, page, told)
        out, lse = flash_attn_with_kvcache(
            case.q,
            *stored[:2],
            **stored.arguments,
            **options,
            rotary_interleaved=interleaved,
            return_softmax_lse=True,
        )
        return {"out": out, "lse": lse, "stored": stored}

    def oracle(q, variant):
        return expected(case, variant, q.dtype, interleaved=interleaved, **options)[:2]

    size = 0 if case.new is None else case.new[0].shape[1]
    caches = [
        expected(case, (False, False), to, interleaved=interleaved)[2:]
        for to in (torch.float64, torch.float32, case.q.dtype)
    ]
    for _, found in on_all(run):
        stored, before = found.pop("stored"), store(case, kind, page, told)
        judge(found, oracle, {"q": case.q})
        for which in (0, 1):
            rows = stored.rows(which)
            for b, length in enumerate(case.lengths):
                written, exact, *own = (
                    x[b, length : length + size] for x in (rows, *(cache[which] for cache in caches))
                )
                if which == 0 and case.rotary is not None:
                    testing.assert_within_budget(written, exact, own, "k_cache")
                else:
                    assert torch.equal(written, own[-1])
            # All elements but those are what they were.
            changed = ~torch.isclose(stored[which], before[which], 0, 0, equal_nan=True)
            assert int(changed.sum()) <= (0 if case.new is None else case.new[which].numel())


PLENTY = [
    {},
    {"causal": True},
    {"window_size": (3, 1), "softmax_scale": 0.3},
    {"causal": True, "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.05])},
    {
        "softcap": 2.0,
        "window_size": (4, -1),
        "alibi_slopes": torch.rand(3, 4, generator=torch.Generator().manual_seed(1)),
    },
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "rows", "pages"])
def test_caches(dtype, kind):
    for new, rotary, options in zip((2, 3, None, 1, 3), (None, 16, None, 8, 4), PLENTY, strict=True):
        check(draw(dtype=dtype, new=new, rotary=rotary), kind, interleaved=rotary != 8, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "rows", "pages"])
def test_padding_on_the_left(dtype, kind):
    for new, options in zip((2, 3, None, 1, 3), PLENTY, strict=True):
        check(draw(dtype=dtype, new=new, leftpad=[3, 0, 6]), kind, **options)


@pytest.mark.parametrize("told", ["tensor", "number"])
def test_one_query(told):
    for options in PLENTY:
        check(draw(queries=1, new=1, rotary=8, lengths=(7, 7, 7)), told=told, **options)


@hypothesis.given(
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=3),
    even=st.booleans(),
    leftpad=st.booleans(),
    queries=st.integers(0, 5),
    new=st.sampled_from([None, 0, 1, 4]),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    sizes=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    rotary=st.sampled_from([None, 2, 4]),
    interleaved=st.booleans(),
    kind=st.sampled_from(["plain", "rows", "pages"]),
    page=st.sampled_from([1, 3, 16]),
    alibi=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "causal": st.booleans(),
            "window_size": st.tuples(st.integers(-1, 12), st.integers(-1, 12)),
            "softcap": st.sampled_from([0.0, 1.5]),
            "softmax_scale": st.sampled_from([None, 0.4]),
        }
    ),
)
def test_any_cache(lengths, even, leftpad, queries, new, heads, sizes, rotary, interleaved, kind, page, alibi, options):
    if even:
        lengths = lengths[:1] * len(lengths)
    if rotary is not None and (new is None or rotary > sizes[0]):
        rotary = None
    case = draw(
        dtype=torch.float64,
        lengths=lengths,
        leftpad=[n // 2 for n in lengths] if leftpad else None,
        queries=queries,
        new=new,
        heads=heads,
        size=sizes[0],
        value_size=sizes[1],
        rotary=rotary,
    )
    slopes = torch.linspace(0.1, 0.5, heads[0] * heads[1]) if alibi else None
    told = "number" if even else "tensor"
    check(case, kind, page, told, interleaved=interleaved, alibi_slopes=slopes, **options)


@pytest.mark.parametrize("kind", ["plain", "rows", "pages"])
@pytest.mark.parametrize("size", [2, 16])
def test_where_the_cache_lies_does_not_matter(kind, size):
    case = draw(rotary=8, new=3)
    options = {"causal": True, "window_size": (6, -1)}

    def run(stored):
        out = flash_attn_with_kvcache(case.q, *stored[:2], **stored.arguments, **options)
        return {"out": out}

    plain = {name: found["out"] for name, found in on_all(lambda: run(store(case, "plain")))}
    for name, found in on_all(lambda: run(store(case, kind, size))):
        # The reference has sums over whole pages, in another order.
        assert torch.equal(found["out"], plain[name]) or (name == "reference" and kind == "pages")


def test_generation_step_by_step_is_causal_attention():
    """A prompt and then one token after another give the rows of attention over the whole sequence."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 12, heads, 8, generator=generator) for heads in (4, 2, 2))

    def generate():
        k_cache, v_cache = (torch.full((2, 16, 2, 8), torch.nan) for _ in range(2))
        found = []
        for begin, end in itertools.pairwise([0, 5, 6, 7, 9, 12]):
            part = slice(begin, end)
            arguments = (q[:, part], k_cache, v_cache, k[:, part], v[:, part])
            found.append(flash_attn_with_kvcache(*arguments, cache_seqlens=begin, causal=True, return_softmax_lse=True))
        assert torch.equal(k_cache[:, :12], k)
        assert torch.equal(v_cache[:, :12], v)
        outs, levels = zip(*found, strict=True)
        return {"out": torch.cat(outs, 1), "lse": torch.cat(levels, 2)}

    for _, found in on_all(generate):
        judge(found, lambda q, variant: _causal(q, k, v, variant), {"q": q})


def _causal(q, k, v, variant):
    outs, levels = dense(list(zip(q, k.to(q.dtype), v.to(q.dtype), strict=True)), variant, causal=True)
    return torch.stack(outs), torch.stack(levels)


def test_all_of_the_cache_by_default():
    case = draw(lengths=(20, 20, 20), new=None)
    with seqkernels.use_backend("reference"):
        found = flash_attn_with_kvcache(*case[:3], causal=True)
        assert torch.equal(found, flash_attn_func(*case[:3], causal=True))
        # Rows of the cache behind those of the batch have no part.
        assert torch.equal(flash_attn_with_kvcache(case.q[:2], *case[1:3], causal=True), found[:2])
        # How the keys are split says nothing about the result.
        assert torch.equal(flash_attn_with_kvcache(*case[:3], causal=True, num_splits=3), found)


def test_plain_generation_runs_on_plain_kernels():
    case = draw(queries=1, new=1, lengths=(7, 7, 7))
    stored = store(case, "plain")
    explanation = seqkernels.explain(
        lambda: flash_attn_with_kvcache(case.q, *stored[:2], **stored.arguments, causal=True)
    )
    assert [entry.call.features for entry in explanation.entries] == [("grouped",)]


@pytest.mark.parametrize("kind", ["rows", "pages"])
def test_pages_and_rows_are_read_where_they_are(kind):
    case = draw()
    stored = store(case, kind)
    explanation = seqkernels.explain(flash_attn_with_kvcache, case.q, *stored[:2], **stored.arguments)
    assert [entry.call.features for entry in explanation.entries] == [("block_table", "grouped", "key_lengths")]


def test_strided_caches():
    """One tensor for keys and values, as inference engines have it."""
    case = draw(rotary=4)
    for kind in ("plain", "rows", "pages"):
        stored = store(case, kind)
        both = torch.stack(stored[:2], 1).transpose(2, 3).contiguous().transpose(2, 3)
        with seqkernels.use_backend("reference"):
            expected = flash_attn_with_kvcache(case.q, *stored[:2], **stored.arguments)
            found = flash_attn_with_kvcache(case.q, both[:, 0], both[:, 1], **stored.arguments)
        assert torch.equal(found, expected)
        assert torch.equal(both.nan_to_num(9), torch.stack(stored[:2], 1).nan_to_num(9))


def test_compiled():
    case = draw(rotary=4)

    def step(q, k_cache, v_cache, **arguments):
        return flash_attn_with_kvcache(q, k_cache, v_cache, **arguments, causal=True)

    with seqkernels.use_backend("reference"), torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for kind in ("plain", "rows", "pages"):
            stored, again = store(case, kind), store(case, kind)
            found = compiled(case.q, *stored[:2], **stored.arguments)
            judge(
                {"out": found, "lse": found.new_zeros(0)},
                lambda q, variant: (expected(case, variant, q.dtype, causal=True)[0], q.new_zeros(0)),
                {"q": case.q},
            )
            step(case.q, *again[:2], **again.arguments)
            for a, b in zip(stored[:2], again[:2], strict=True):
                assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))
            torch._dynamo.reset()


def test_no_gradients():
    case = draw()
    stored = store(case, "plain")
    with seqkernels.use_backend("reference"):
        for name in ("q", "k", "v"):
            given = {"q": case.q, **stored.arguments}
            given[name] = given[name].clone().requires_grad_()
            with pytest.raises(ValueError, match=f"{name}: requires a gradient, which a cache does not give"):
                flash_attn_with_kvcache(k_cache=stored.k_cache, v_cache=stored.v_cache, **given)
            with torch.no_grad():
                out = flash_attn_with_kvcache(k_cache=stored.k_cache, v_cache=stored.v_cache, **given)
            assert not out.requires_grad
        with pytest.raises(ValueError, match="k_cache: requires a gradient"):
            flash_attn_with_kvcache(case.q, stored.k_cache.requires_grad_(), stored.v_cache, **stored.arguments)
