"""Keys and values in pages, found by a block table, for every implementation that says it has them."""

from __future__ import annotations

import functools
import itertools
import re

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import seqkernels
from seqkernels import backends, testing
from seqkernels.cells import DTYPES
from seqkernels.ops.attention import attention, backward_op, forward_op, weights_op
from seqkernels.ops.weights import column_sums, weights
from seqkernels.scores import Scores

from ..conftest import INTERPRETED
from .judging import expected, judge_draws

DENSE = [name for name in testing.ATTENTION_OPTIONS if name != "varlen"]
INT = torch.int32


def _lengths(inputs, options):
    """First row and number of keys of each batch entry or document."""
    if "cu_seqlens_k" in options:
        starts = options["cu_seqlens_k"].tolist()
        found = [(first, end - first) for first, end in itertools.pairwise(starts)]
    else:
        found = [(0, inputs.k.shape[2])] * inputs.k.shape[0]
    if "key_lengths" not in options:
        return found
    return [(first, min(n, m)) for (first, n), m in zip(found, options["key_lengths"].tolist(), strict=True)]


def in_pages(inputs, options, page, *, shared=False, together=False, seed=0):
    """A call's keys and values in pages, in any order, and what is then said of them.

    All that may not be read is NaN, or no page. With `shared`, all entries have the first page of the first one, in the
    inputs that are returned too. With `together` the heads of a key lie side by side, as flash-attn has them.
    """
    places = _lengths(inputs, options)
    varlen = "cu_seqlens_k" in options
    longest = max((n for _, n in places), default=0) if varlen else inputs.k.shape[2]
    blocks = -(-longest // page)
    assert varlen or blocks * page == longest
    k, v = inputs.k.detach().clone(), inputs.v.detach().clone()
    if shared:
        for x in (k, v):
            x[:, :, :page] = x[:1, :, :page]
    count = len(places) * blocks + 3
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(places), blocks), -7, dtype=INT)
    stored = []
    for x in (k, v):
        shape = (count, page, x.shape[1], x.shape[3]) if together else (count, x.shape[1], page, x.shape[3])
        pages = x.new_full(shape, torch.nan)
        stored.append(pages.transpose(1, 2) if together else pages)
    for b, (first, length) in enumerate(places):
        for n in range(-(-length // page)):
            mine = b * blocks + n
            if shared and n == 0 and b > 0 and length >= page and places[0][1] >= page:
                mine = 0
            table[b, n] = order[mine]
            for x, pages in zip((k, v), stored, strict=True):
                rows = x[0 if varlen else b, :, first + n * page : first + min(length, (n + 1) * page)]
                pages[order[mine], :, : rows.shape[1]] = rows
    more = dict(options, block_table=table)
    if varlen:
        # Only the lengths between the elements count.
        more["cu_seqlens_k"] = options["cu_seqlens_k"] + 1000
    return inputs._replace(k=k, v=v), inputs._replace(k=stored[0], v=stored[1]), more


def _served(runner, inputs, options):
    """Whether the implementation has all options; if not, it says so itself."""
    features = Scores(1.0, inputs.mask, inputs.bias, **options).features(inputs.q, inputs.k)
    reason = backends.why_not(runner.backend, backends.Call("attention", "cpu", inputs.q.dtype, "", features))
    if reason is not None:
        # Of dtypes, one says so first that has not all of them.
        assert "block_table" in reason or str(inputs.q.dtype) in reason
        with pytest.raises(seqkernels.BackendError, match=re.escape(reason)):
            attention(*inputs, **options)
    return reason is None


def _in_pages(draws, options, page, **how):
    """Calls with pages, and the inputs of the same calls without."""
    calls = [in_pages(inputs, options, page, seed=seed, **how) for seed, inputs in enumerate(draws)]
    return [(paged, more) for _, paged, more in calls], [plain for plain, _, _ in calls]


def _judge(calls, by):
    """Results from pages are within the budget of the call without pages."""
    found = []
    for paged, more in calls:
        out, lse = attention(*paged, **more)
        assert out.dtype == paged.q.dtype
        assert out.transpose(1, 2).is_contiguous()
        found.append({"out": out, "lse": lse})
    judge_draws(found, by)


def _check(runner, draws, options, page, **how):
    calls, plain = _in_pages(draws, options, page, **how)
    if _served(runner, *calls[0]):
        _judge(calls, [expected(inputs, **options) for inputs in plain])


def _draws(batch, heads, lengths, size, dtype=torch.float32, *, count=2, **more):
    return [
        testing.attention_inputs(batch, heads, *lengths, size, dtype, seed=seed, requires_grad=False, **more)
        for seed in range(count)
    ]


@functools.cache
def _entries(dtype, page, queries, how):
    """Calls with lengths of none, one, an odd number, all, and what their results are judged by."""
    keys = -(-(100 if INTERPRETED else 300) // page) * page
    options = {"key_lengths": torch.tensor([0, 1, keys // 2 + 1 - keys // 2 % 2, keys], dtype=INT)}
    if how == "shared":
        options |= {"right": 0, "left": 37, "bottom_right": True}
    draws = _draws(4, 8, (queries, keys), 24, dtype, value_size=40, kv_heads=2)
    calls, plain = _in_pages(draws, options, page, **{how: True})
    return calls, [expected(inputs, **options) for inputs in plain]


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("page", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages(runner, dtype, page, queries):
    """Decoding and a prompt."""
    for how in ("together", "shared"):
        calls, by = _entries(dtype, page, queries, how)
        if _served(runner, *calls[0]):
            _judge(calls, by)


@hypothesis.given(
    names=st.lists(st.sampled_from(DENSE), unique=True),
    queries=st.sampled_from([1, 2, 3, 9, 20]),
    page=st.sampled_from([1, 2, 5, 16, 17, 33]),
    blocks=st.integers(1, 6),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    sizes=st.tuples(st.sampled_from([3, 16, 33]), st.sampled_from([5, 16, 32])),
    mask=st.sampled_from([None, "B11N", "11MN", "BHMN"]),
    bias=st.sampled_from([None, "1HM1", "B11N", "BHMN"]),
    dtype=st.sampled_from(DTYPES),
    shared=st.booleans(),
    together=st.booleans(),
    varlen=st.booleans(),
    seed=st.integers(0, 5),
)
def test_options(
    plain_runner, names, queries, page, blocks, heads, sizes, mask, bias, dtype, shared, together, varlen, seed
):
    lengths = (queries, page * blocks)
    if varlen:
        names = [*names, "varlen"]
        lengths = (5 * queries, 3 * page * blocks)
    options = testing.attention_options(names, 3, heads[0], *lengths, dtype, seed=seed, requires_grad=False)
    full = options.get("max_seqlen_q", lengths[0]), options.get("max_seqlen_k", lengths[1])
    extra = testing.attention_inputs(3, heads[0], *full, 1, dtype, mask=mask, bias=bias, seed=seed, requires_grad=False)
    draws = _draws(
        1 if varlen else 3, heads[0], lengths, sizes[0], dtype, value_size=sizes[1], kv_heads=heads[1], count=4
    )
    draws = [inputs._replace(mask=extra.mask, bias=extra.bias) for inputs in draws]
    _check(plain_runner, draws, options, page, shared=shared and not varlen, together=together)


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_masked_does_not_show_and_what_is_read_does(runner, dtype, queries):
    for page in (1, 5, 16, 35):
        (inputs,) = _draws(2, 4, (queries, -(-70 // page) * page), 16, dtype, kv_heads=2, mask="B11N", count=1)
        plain, paged, more = in_pages(inputs, {}, page)
        if not _served(runner, paged, more):
            return
        clean = attention(*paged, **more)
        hidden = ~inputs.mask[:, 0, 0]
        for x in (plain.k, plain.v):
            x.transpose(1, 2)[hidden] = torch.nan
        _, paged, more = in_pages(plain, {}, page)
        assert all(torch.equal(x, y) for x, y in zip(clean, attention(*paged, **more), strict=True))
        # One key that is read, of the second entry alone.
        key = int((~hidden[1]).nonzero()[-1])
        plain.v[1, 0, key, 3] = torch.inf
        _, paged, more = in_pages(plain, {}, page)
        out, _ = attention(*paged, **more)
        assert out[0].isfinite().all()
        assert not out[1, :2, :, 3].isfinite().any()
        assert out[1, 2:].isfinite().all()


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_page_for_each_entry(runner, dtype, queries):
    """Rows of a cache, picked by number: the same as these rows."""
    (inputs,) = _draws(5, 4, (queries, 300), 32, dtype, kv_heads=2, count=1)
    rows = torch.tensor([3, 0, 3], dtype=INT)
    wide = torch.stack((rows, rows - 9), 1)
    for table in (rows[:, None], wide[:, :1]):
        picked = inputs._replace(q=inputs.q[:3])
        for options in ({}, {"key_lengths": torch.tensor([300, 17, 0], dtype=INT), "right": 0, "bottom_right": True}):
            if not _served(runner, picked, options | {"block_table": table}):
                return
            found = attention(*picked, **options, block_table=table)
            by = attention(picked.q, inputs.k[rows.long()], inputs.v[rows.long()], **options)
            assert all(torch.equal(x, y) for x, y in zip(found, by, strict=True))


def test_nothing_to_read(runner):
    q, pages = torch.ones(2, 4, 3, 8), torch.ones(5, 2, 4, 8)
    for k, table, lengths in (
        (pages, torch.zeros(2, 0, dtype=INT), None),
        (pages[:, :, :0], torch.full((2, 3), 9, dtype=INT), None),
        (pages[:0], torch.full((2, 3), 9, dtype=INT), torch.tensor([0, 0], dtype=INT)),
    ):
        options = {"block_table": table, "key_lengths": lengths}
        if not _served(runner, testing.AttentionInputs(q, k, k, None, None), options):
            return
        out, lse = attention(q, k, k, **options)
        assert not out.any()
        assert (lse == -torch.inf).all()
    out, _ = attention(q[:0], pages, pages, block_table=torch.zeros(0, 2, dtype=INT))
    assert out.shape == (0, 4, 3, 8)


@pytest.mark.parametrize("layout", [name for name in testing.LAYOUTS if name not in ("expanded", "scalar")])
def test_layouts(plain_runner, layout):
    for queries in (1, 20):
        draws = _draws(2, 4, (queries, 48), 16, kv_heads=2, count=1)
        plain, paged, more = in_pages(draws[0], {}, 16)
        if not _served(plain_runner, paged, more):
            return
        given = paged._make(None if x is None else testing.lay_out(x, layout) for x in paged)
        more["block_table"] = testing.lay_out(more["block_table"], layout)
        out, lse = attention(*given, **more)
        judge_draws([{"out": out, "lse": lse}], [expected(plain)])


WRONG = [
    ({"block_table": [[0]]}, TypeError, "block_table: expected a Tensor, got list"),
    ({"block_table": torch.zeros(2, 2)}, TypeError, r"block_table: expected torch\.int32, got torch\.float32"),
    ({"block_table": torch.zeros(1, 2, dtype=INT)}, ValueError, r"block_table: expected shape \(2, blocks\), got"),
    ({"block_table": torch.zeros(2, dtype=INT)}, ValueError, r"block_table: expected shape \(2, blocks\), got \(2,\)"),
    ({"block_table": torch.zeros(2, 2, dtype=INT, device="meta")}, ValueError, "block_table: expected on cpu as q"),
    ({"block_table": torch.full((2, 2), 5, dtype=INT)}, ValueError, "block_table: expected pages from 0 to 4 up to"),
    ({"block_table": torch.full((2, 2), -1, dtype=INT)}, ValueError, "block_table: expected pages from 0 to 4 up to"),
    ({"k": torch.zeros(5, 2, 4, 9)}, ValueError, r"k: expected shape \(pages, Hk, page_size, 8\) with Hk a divisor"),
    ({"v": torch.zeros(4, 2, 4, 8)}, ValueError, r"v: expected shape \(5, 2, 4, 'Dv'\) to match k"),
    ({"mask": torch.ones(1, 1, 1, 7, dtype=torch.bool)}, ValueError, r"mask: .* each 1 or as in \(2, 4, 3, 8\)"),
]


def _right():
    return {
        "q": torch.ones(2, 4, 3, 8),
        "k": torch.ones(5, 2, 4, 8),
        "v": torch.ones(5, 2, 4, 8),
        "block_table": torch.zeros(2, 2, dtype=INT),
    }


@pytest.mark.parametrize(("change", "error", "text"), WRONG, ids=[text[:40] for _, _, text in WRONG])
def test_errors(change, error, text):
    with pytest.raises(error, match=text):
        attention(**_right() | change)


@pytest.mark.parametrize(
    ("entries", "lengths"), [([[0, 5], [0, 0]], [8, 8]), ([[0, 0], [-1, 0]], [8, 1]), ([[0, 0], [0, 0]], [1, 9])]
)
@pytest.mark.parametrize("varlen", [False, True])
def test_kernels_never_read_what_is_no_page(entries, lengths, varlen):
    """Where nobody looked before, in a graph for example."""
    q, k, v, _ = _right().values()
    table, there = torch.tensor(entries, dtype=INT), torch.tensor(lengths, dtype=INT)

    def run(there):
        scores = Scores(1.0, block_table=table, key_lengths=there)
        rows = q
        if varlen:
            starts = torch.cat((there.new_zeros(1), there.cumsum(0, dtype=INT)))
            more = {"cu_seqlens_q": starts.new_tensor([0, 3, 6]), "cu_seqlens_k": starts}
            scores = Scores(1.0, block_table=table, max_seqlen_q=3, max_seqlen_k=9, **more)
            rows = q.transpose(0, 1).flatten(1, 2).unsqueeze(0)
        return forward_op(rows, k, v, *scores.pack())[0]

    with seqkernels.use_backend("native"):
        if varlen or max(lengths) <= 8:
            with pytest.raises(ValueError, match="block_table: expected pages"):
                run(there)
        out = run(torch.tensor([4, 0], dtype=INT))
    assert (out.flatten(0, 1)[:4, :3] == 1).all()


def test_no_gradients(plain_runner):
    given = _right()
    if not _served(
        plain_runner,
        testing.AttentionInputs(*list(given.values())[:3], None, None),
        {"block_table": given["block_table"]},
    ):
        return
    for name in ("q", "k", "v"):
        with pytest.raises(ValueError, match="block_table: expected None where q, k, v, the bias or"):
            attention(**given | {name: given[name].clone().requires_grad_()})
    with torch.no_grad():
        out, lse = attention(**given | {"q": given["q"].clone().requires_grad_()})
    assert not out.requires_grad
    q, k, v, table = given.values()
    packed = Scores(1.0, block_table=table).pack()
    for refused in (
        lambda: backward_op([out, None], q, k, v, out, lse, *packed, [True] * 4),
        lambda: weights_op(q, k, lse, *packed, True),
        lambda: column_sums(q, k, lse, Scores(1.0, block_table=table)),
    ):
        with pytest.raises(ValueError, match="block_table: expected None"):
            refused()


@pytest.mark.parametrize("names", [[], ["key_lengths", "dropout"], ["varlen"], ["varlen", "key_lengths"]], ids="-".join)
def test_weights_of_pages(names):
    draws = _draws(1 if "varlen" in names else 2, 4, (6, 24), 8, kv_heads=2, count=1)
    options = testing.attention_options(names, 2, 4, 6, 24, requires_grad=False)
    plain, paged, more = in_pages(draws[0], options, 4)
    with seqkernels.use_backend("reference"):
        _, lse = attention(*plain, **options, scale=0.3)
        for average in (False, True):
            by = weights(plain.q, plain.k, lse, Scores(0.3, **options), average)
            assert torch.equal(weights(plain.q, paged.k, lse, Scores(0.3, **more), average), by)


def _calls(dtype=torch.float32):
    for names in ([], DENSE, [*DENSE, "varlen"]):
        options = testing.attention_options(names, 2, 4, 10, 24, dtype, requires_grad=False)
        (inputs,) = _draws(1 if "varlen" in names else 2, 4, (10, 24), 8, dtype, kv_heads=2, value_size=6, count=1)
        yield in_pages(inputs, options, 4)[1:]


def test_opcheck(plain_runner):
    for paged, options in _calls(torch.bfloat16):
        if not _served(plain_runner, paged, options):
            return
        call = (*paged[:3], *Scores(0.3, **options).pack())
        torch.library.opcheck(
            forward_op, call, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )


def test_compiled(plain_runner):
    compiled = torch.compile(lambda paged, options: attention(*paged, **options), fullgraph=True, backend="aot_eager")
    for paged, options in _calls():
        if not _served(plain_runner, paged, options):
            return
        found = compiled(paged, options)
        assert all(torch.equal(x, y) for x, y in zip(found, attention(*paged, **options), strict=True))
        torch._dynamo.reset()


def test_on_meta():
    given = {name: x.to("meta") for name, x in _right().items()}
    out, lse = attention(**given)
    assert out.shape == (2, 4, 3, 8)
    assert lse.shape == (2, 4, 3)
