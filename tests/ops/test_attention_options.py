"""The options of attention, freely combined, for every implementation that says it has them."""

from __future__ import annotations

import itertools
import math
import re

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import seqkernels
from seqkernels import backends, testing
from seqkernels.backends.reference.attention import dropped
from seqkernels.cells import DTYPES, accumulate_dtype
from seqkernels.ops.attention import attention, backward_op, forward_op, weights_op
from seqkernels.scores import Scores
from seqkernels.testing.baselines import ATTENTIONS

from ..conftest import INTERPRETED, examples

OPTIONS = testing.ATTENTION_OPTIONS
DENSE = [name for name in OPTIONS if name != "varlen"]
PATTERNS = ["".join(letters) for letters in itertools.product(*(("1", letter) for letter in "BHMN"))]


def _call(
    names, lengths=(5, 7), dtype=torch.float32, *, batch=2, heads=4, kv_heads=2, size=8, value_size=None, mask=None,
    bias=None, bias_dtype=None, layout="contiguous", count=None, seed=0, requires_grad=True,
):  # fmt: skip
    """Several draws of inputs, and options; with ``"varlen"`` the lengths are those of all documents together."""
    if count is None:
        # Few scores, or elements, are judged over more draws; where there are none, all is zero in each.
        few = 600 // (1 + min(lengths) * min(size, value_size or size, 8)) if min(lengths) else 0
        count = min(2 if INTERPRETED else 24, 2 + few)
    common = {"layout": layout, "requires_grad": requires_grad}
    options = testing.attention_options(names, batch, heads, *lengths, dtype, seed=seed, **common)
    full = options.get("max_seqlen_q", lengths[0]), options.get("max_seqlen_k", lengths[1])
    extra = testing.attention_inputs(batch, heads, *full, 1, dtype, mask=mask, bias=bias, seed=seed, **common)
    if bias_dtype is not None and extra.bias is not None:
        extra = extra._replace(bias=extra.bias.detach().to(bias_dtype).requires_grad_(requires_grad))
    entries = 1 if "varlen" in names else batch
    draws = [
        testing.attention_inputs(
            entries, heads, *lengths, size, dtype, value_size=value_size, kv_heads=kv_heads, seed=k, **common
        )._replace(mask=extra.mask, bias=extra.bias)
        for k in range(count)
    ]
    return draws, options


def _why_not(backend, inputs, options):
    """What the implementation has against a call, ``None`` if nothing."""
    features = Scores(1.0, inputs.mask, inputs.bias, **options).features(inputs.q, inputs.k)
    if inputs.q.shape[2] == inputs.k.shape[2] and not {"varlen", "key_lengths"} & set(features):
        # Both diagonals are one.
        features = tuple(name for name in features if name != "bottom_right")
    return backends.why_not(backend, backends.Call("attention", "cpu", inputs.q.dtype, "", features))


def _served(runner, inputs, options):
    """Whether the implementation has all options; if not, it says so itself."""
    reason = _why_not(runner.backend, inputs, options)
    if reason is not None:
        with pytest.raises(seqkernels.BackendError, match=re.escape(reason)):
            attention(*inputs, **options)
    return reason is None


def _check(runner, draws, options, **more):
    """The results, within the budget; ``None`` where the call is declined."""
    return testing.check_attention(*draws, **options, **more) if _served(runner, draws[0], options) else None


def _word(seed, row, j, keys):
    """The random word of a weight, in Python's integers."""
    index = (row * -(-keys // 64) + j // 64) * 16 + j % 16
    mask = 0xFFFFFFFF
    counter, key = [index & mask, index >> 32, 0, 0], [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        one, two = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(two >> 32) ^ counter[1] ^ key[0], two & mask, (one >> 32) ^ counter[3] ^ key[1], one & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter[j % 64 // 16]


def _at(x, *place):
    """An element of what is broadcast."""
    return x[tuple(0 if size == 1 else p for size, p in zip(x.shape, place, strict=True))]


def _documents(q, k, options):
    """Batch entry, first row of q, number of queries, first row of k and number of keys, of each document."""
    if "cu_seqlens_q" not in options:
        return [(b, 0, q.shape[2], 0, k.shape[2]) for b in range(q.shape[0])]
    q_rows, k_rows = options["cu_seqlens_q"].tolist(), options["cu_seqlens_k"].tolist()
    return [
        (0, q_rows[d], q_rows[d + 1] - q_rows[d], k_rows[d], k_rows[d + 1] - k_rows[d]) for d in range(len(q_rows) - 1)
    ]


def _places(b, i, queries, keys, options):
    """The place of query i on the axis of the keys, and the keys that its place lets it read."""
    if "key_lengths" in options:
        keys = min(keys, int(options["key_lengths"][b]))
    place = i + keys - queries if options.get("bottom_right") else i
    left, right = options.get("left", -1), options.get("right", -1)
    return place, [j for j in range(keys) if (left < 0 or j >= place - left) and (right < 0 or j <= place + right)]


def plain(q, k, v, mask=None, bias=None, *, scale=None, **options):
    """The contract, query by query."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    softcap, sink, slopes = options.get("softcap"), options.get("sink"), options.get("alibi_slopes")
    most = options.get("max_seqlen_q", q.shape[2]), options.get("max_seqlen_k", k.shape[2])
    outs = [[[q.new_zeros(v.shape[3])] * q.shape[2] for _ in range(heads)] for _ in range(q.shape[0])]
    lses = [[[q.new_tensor(-torch.inf)] * q.shape[2] for _ in range(heads)] for _ in range(q.shape[0])]
    for b, (entry, row, queries, first, keys) in enumerate(_documents(q, k, options)):
        for h, i in itertools.product(range(heads), range(queries)):
            place, columns = _places(b, i, queries, keys, options)
            scores, values = [], []
            for j in columns:
                if mask is not None and not _at(mask, b, h, i, j):
                    continue
                s = scale * (q[entry, h, row + i] * k[entry, h // group, first + j]).sum()
                if softcap:
                    s = softcap * torch.tanh(s / softcap)
                if bias is not None:
                    s = s + _at(bias, b, h, i, j)
                if slopes is not None:
                    s = s - (slopes[h] if slopes.dim() == 1 else slopes[b, h]) * abs(place - j)
                scores.append(s)
                values.append(v[entry, h // group, first + j])
                if "seed" in options:
                    p, r = options["dropout_p"], (b * heads + h) * most[0] + i
                    gone = _word(int(options["seed"]), r, j, most[1]) < math.ceil(p * 2**32)
                    values[-1] = values[-1] * (0.0 if gone else 1 / (1 - p))
            if sink is not None:
                scores.append(sink[h])
                values.append(torch.zeros_like(v[0, 0, 0]) if v.shape[2] else v.new_zeros(v.shape[3]))
            if scores:
                weights = torch.stack(scores).softmax(0)
                outs[entry][h][row + i] = (weights.unsqueeze(1) * torch.stack(values)).sum(0)
                lses[entry][h][row + i] = torch.stack(scores).logsumexp(0)
    if q.shape[2] == 0:
        return q.new_zeros((*q.shape[:3], v.shape[3])), q.new_zeros(q.shape[:3])
    return tuple(torch.stack([torch.stack([torch.stack(x) for x in y]) for y in z]) for z in (outs, lses))


def _in(dtype, inputs, options):
    """A call in another dtype."""

    def copy(x):
        return testing.cast(x, dtype) if isinstance(x, torch.Tensor) else x

    given = {n: x if n == "alibi_slopes" else copy(x) for n, x in options.items()}
    if "sink" in given:
        given["sink"] = testing.cast(given["sink"], accumulate_dtype(dtype))
    return type(inputs)._make(map(copy, inputs)), given


def _judge_meaning(draws, options, oracle):
    """Judge results as if in the next smaller dtype: what is meant, not how exactly it is computed."""
    coarse = torch.float32 if draws[0].q.dtype == torch.float64 else torch.bfloat16
    judged = {}
    for inputs in draws:
        grads = testing.random_grads(testing.evaluate(testing.attention_oracle, inputs, {}, **options))
        found = testing.evaluate(attention, inputs, grads, **options)
        results = []
        for fn, dtype in ((oracle, torch.float64), *((fn, coarse) for fn in ATTENTIONS)):
            same, others = _in(dtype, inputs, options)
            cotangents = {n: x.to(accumulate_dtype(dtype) if n == "lse" else dtype) for n, x in grads.items()}
            results.append(testing.evaluate(fn, same, cotangents, **others))
        for name, x in found.items():
            judged.setdefault(name, []).append((x, *(each[name] for each in results)))
    for name, columns in judged.items():
        found, exact, *own = (torch.stack(column) for column in zip(*columns, strict=True))
        testing.assert_within_budget(found.to(coarse), exact, own, name)


@hypothesis.given(
    names=st.sets(st.sampled_from(OPTIONS)),
    lengths=st.tuples(st.integers(0, 7), st.integers(0, 9)),
    groups=st.integers(1, 2),
    sizes=st.tuples(st.sampled_from([1, 3, 8]), st.sampled_from([1, 2, 7])),
    mask=st.sampled_from([None, *PATTERNS]),
    bias=st.sampled_from([None, *PATTERNS]),
    scale=st.sampled_from([None, 0.3, -1.0]),
    seed=st.integers(0, 9),
)
def test_any_options_against_loops(plain_runner, names, lengths, groups, sizes, mask, bias, scale, seed):
    draws, options = _call(
        names, lengths, torch.float64, heads=2, kv_heads=2 // groups, size=sizes[0], value_size=sizes[1], mask=mask,
        bias=bias, count=2, seed=seed,
    )  # fmt: skip
    if not _served(plain_runner, draws[0], options):
        return
    _judge_meaning(draws, options | {"scale": scale}, plain)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option(runner, name):
    for dtype, lengths in itertools.product(DTYPES, ((9, 21), (21, 9))):
        draws, options = _call([name], lengths, dtype)
        results = _check(runner, draws, options)
        assert results is None or ("grad_sink" in results) == (name == "sink")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [DENSE, OPTIONS], ids=["dense", "varlen"])
def test_all_options(runner, names, dtype):
    for k, lengths in enumerate(((37, 70), (130, 67), (3, 150))):
        some = [name for name in names if k != 1 or name != "causal"]
        more = {"mask": "B11N", "bias": "1HMN", "size": 24, "value_size": 17, "seed": k}
        draws, options = _call(some, lengths, dtype, **more)
        _check(runner, draws, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bias_of_the_accumulation_dtype(runner, dtype):
    for names in ((), ("sink", "softcap", "window"), ("varlen", "alibi")):
        draws, options = _call(names, (20, 33), dtype, bias="1HMN", bias_dtype=accumulate_dtype(dtype))
        _check(runner, draws, options)


@hypothesis.given(
    names=st.sets(st.sampled_from(OPTIONS)),
    batch=st.integers(1, 3),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    lengths=st.tuples(st.integers(0, 40), st.integers(0, 80)),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mask=st.sampled_from([None, *PATTERNS]),
    bias=st.sampled_from([None, *PATTERNS]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    layout=st.sampled_from(testing.LAYOUTS[:-2]),
    seed=st.integers(0, 9),
)
@hypothesis.settings(max_examples=examples(150))
def test_any_options(plain_runner, names, batch, heads, lengths, sizes, mask, bias, dtype, layout, seed):
    draws, options = _call(
        names, lengths, dtype, batch=batch, heads=heads[0] * heads[1], kv_heads=heads[0], size=sizes[0],
        value_size=sizes[1], mask=mask, bias=bias, layout=layout, count=2, seed=seed,
    )  # fmt: skip
    if _served(plain_runner, draws[0], options):
        _judge_meaning(draws, options, testing.attention_oracle)


@hypothesis.given(
    size=st.integers(1, 512), value_size=st.integers(1, 512), names=st.sampled_from([DENSE, ["varlen"], ["softcap"]])
)
@hypothesis.settings(max_examples=examples(20))
def test_head_sizes(plain_runner, size, value_size, names):
    draws, options = _call(names, (33, 40), size=size, value_size=value_size, heads=2, kv_heads=1, count=8)
    _check(plain_runner, draws, options)


@pytest.mark.parametrize("lengths", [(0, 0), (0, 1), (1, 0), (1, 1), (0, 5), (5, 0), (1, 9), (9, 1)], ids=str)
def test_empty_and_single(plain_runner, lengths):
    for names in (*([name] for name in OPTIONS), DENSE, OPTIONS):
        # Where one key is all of a row, gradients are what two sums of products leave of each other.
        draws, options = _call(names, lengths, size=24)
        _check(plain_runner, draws, options)


@pytest.mark.parametrize("names", [DENSE, OPTIONS], ids=["dense", "varlen"])
def test_no_batch(plain_runner, names):
    (inputs,), options = _call(names, batch=0, count=1)
    if _served(plain_runner, inputs, options):
        results = testing.evaluate(attention, inputs, {}, **options)
        results = testing.evaluate(attention, inputs, testing.random_grads(results), **options)
        assert all((x == 0).all() for name, x in results.items() if name != "lse")
        assert (results["lse"] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys(runner, dtype):
    """From key lengths of 0, windows beyond the keys, documents without keys, and rows of no document."""
    none = torch.tensor([0, 9], dtype=torch.int32)
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([2, 8, 8, 15], [1, 1, 4, 9]))
    documents = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "max_seqlen_q": 8, "max_seqlen_k": 5}
    read = torch.zeros(1, 4, 20, dtype=torch.bool)
    read[..., 8:15] = True
    cases = [
        (2, {"key_lengths": none}, torch.tensor([False, True]).view(2, 1, 1).expand(2, 4, 20)),
        (2, {"left": 3}, (torch.arange(20) < 9 + 3).expand(2, 4, 20)),
        (2, {"right": 0, "bottom_right": True}, (torch.arange(20) >= 20 - 9).expand(2, 4, 20)),
        (1, documents, read),
    ]
    for batch, options, alive in cases:
        inputs = testing.attention_inputs(batch, 4, 20, 9, 16, dtype, kv_heads=2)
        results = _check(runner, [inputs], options)
        if results is not None:
            assert torch.equal(results["lse"] == -torch.inf, ~alive)
            assert (results["out"][~alive] == 0).all()
            assert (results["grad_q"][~alive] == 0).all()
        sink = torch.tensor([0.5, -torch.inf, 0.0, 1.0], dtype=accumulate_dtype(dtype)).requires_grad_()
        results = _check(runner, [inputs], options | {"sink": sink})
        if results is not None:
            assert (results["out"][~alive] == 0).all()
            assert (results["grad_q"][~alive] == 0).all()
            assert results["grad_sink"].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "names",
    [["key_lengths"], ["window"], ["causal", "bottom_right"], ["varlen", "causal"], DENSE, OPTIONS],
    ids="-".join,
)
def test_what_is_not_read_does_not_leak(runner, names, bad):
    names = [name for name in names if name != "dropout"]
    spoilt = False
    for lengths, bias in itertools.product(((20, 90), (90, 20)), (None, "BHMN")):
        (clean,), options = _call(names, lengths, size=16, bias=bias, mask=bias and "B1MN", count=1)
        expected = _check(runner, [clean], options)
        if expected is None:
            return
        k, v = clean.k.detach().clone(), clean.v.detach().clone()
        unread = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool)
        hidden = torch.ones(1 if bias is None else clean.bias.shape, dtype=torch.bool)
        for b, (entry, _, queries, first, keys) in enumerate(_documents(clean.q, k, options)):
            for i in range(queries):
                columns = _places(b, i, queries, keys, options)[1]
                if bias is not None:
                    columns = [j for j in columns if clean.mask[b, 0, i, j]]
                    hidden[b, :, i, columns] = False
                unread[entry, [first + j for j in columns]] = False
        spoilt |= bool(unread.any()) or (bias is not None and bool(hidden.any()))
        for x in (k, v):
            x.transpose(1, 2)[unread] = bad
        dirty = clean._replace(k=k.requires_grad_(), v=v.requires_grad_())
        if bias is not None:
            dirty = dirty._replace(bias=clean.bias.detach().masked_fill(hidden, bad).requires_grad_())
        grads = testing.random_grads({n: expected[n] for n in ("out", "lse")})
        for name, x in testing.evaluate(attention, dirty, grads, **options).items():
            assert torch.equal(x, expected[name]), name
    assert spoilt


def _differentiable(inputs, options):
    """A function of the tensors with a gradient, and these."""
    given = inputs._asdict() | options
    names = [n for n, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad]

    def outputs(*tensors):
        out, lse = attention(**given | dict(zip(names, tensors, strict=True)))
        # No finite difference checks an infinite number.
        return out, torch.where(lse == -torch.inf, 0, lse)

    return outputs, [given[name] for name in names]


@pytest.mark.parametrize("names", [*([name] for name in OPTIONS), DENSE, OPTIONS], ids="-".join)
def test_gradcheck(plain_runner, names):
    more = {"heads": 2, "kv_heads": 1, "size": 3, "value_size": 2, "count": 1}
    for mask, bias in ((None, None), ("B11N", "1HMN")):
        (inputs,), options = _call(names, (4, 5), torch.float64, mask=mask, bias=bias, **more)
        if _served(plain_runner, inputs, options):
            assert torch.autograd.gradcheck(*_differentiable(inputs, options))


@pytest.mark.parametrize("names", [DENSE, OPTIONS], ids=["dense", "varlen"])
def test_gradgradcheck(plain_runner, names):
    more = {"heads": 2, "kv_heads": 1, "size": 2, "value_size": 1, "count": 1}
    (inputs,), options = _call(names, (3, 4), torch.float64, bias="1HMN", **more)
    if _served(plain_runner, inputs, options):
        assert torch.autograd.gradgradcheck(*_differentiable(inputs, options))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(plain_runner, layout):
    for names in (DENSE, OPTIONS):
        draws, options = _call(names, (12, 19), layout=layout, mask="B1MN", bias="BH1N")
        if _served(plain_runner, draws[0], options):
            outputs = testing.evaluate(testing.attention_oracle, draws[0], {}, **options)
            testing.check_attention(*draws, grads=testing.random_grads(outputs, layout), **options)


@pytest.mark.many
@pytest.mark.slow
@pytest.mark.parametrize(("batch", "heads"), [(70_000, 1), (1, 70_000)])
def test_many_heads(plain_runner, batch, heads):
    names = ["alibi", "dropout", "key_lengths", "sink", "softcap", "window"]
    draws, options = _call(names, (2, 3), batch=batch, heads=heads, kv_heads=heads, size=4, count=1)
    _check(plain_runner, draws, options)


@pytest.mark.many
def test_many_documents(plain_runner):
    starts = torch.arange(301, dtype=torch.int32)
    documents = {"cu_seqlens_q": starts, "cu_seqlens_k": starts * 2, "max_seqlen_q": 1, "max_seqlen_k": 2}
    inputs = testing.attention_inputs(1, 2, 300, 600, 8)
    _check(plain_runner, [inputs], documents)


def test_short_documents_beside_a_long_one(runner):
    """Blocks of rows hold more of the short ones together."""
    for longest in (20, 25, 47, 90):
        starts = torch.tensor([0, 10, 10 + longest, 33 + longest, 34 + longest], dtype=torch.int32)
        inputs = testing.attention_inputs(1, 4, 34 + longest, 34 + longest, 16, kv_heads=1)
        rows = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        _check(runner, [inputs], rows | {"max_seqlen_q": max(longest, 23), "max_seqlen_k": max(longest, 23)})


@pytest.mark.many
def test_a_long_row(runner):
    inputs = testing.attention_inputs(1, 2, 1, 200_000, 8, kv_heads=1)
    length = torch.tensor([199_990], dtype=torch.int32)
    slopes = torch.tensor([1e-4, 1e-5])
    _check(runner, [inputs], {"left": 150_000, "bottom_right": True, "alibi_slopes": slopes})
    seed = torch.tensor(5)
    _check(runner, [inputs], {"key_lengths": length, "softcap": 1.5, "dropout_p": 0.25, "seed": seed})


IDENTITY = [(2, 2, 5, n) for n in (1, 15, 17, 64)] + [(2, 2, 5, 65), (2, 2, 5, 130), (1, 3, 70, 33), (1, 1, 2, 512)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_drops_the_same_everywhere(runner, dtype):
    """Values that are unit vectors show the weights."""
    identity = IDENTITY[-3:-1] if INTERPRETED else IDENTITY
    for (b, h, m, n), p, value in itertools.product(identity, (0.0, 2.0**-32, 0.1, 0.5, 1.0), (7, -(2**62) - 3)):
        seed = torch.tensor(value)
        q, k = torch.zeros(b, h, m, 4, dtype=dtype), torch.ones(b, h, n, 4, dtype=dtype)
        v = torch.eye(n, dtype=dtype).expand(b, h, n, n)
        if not _served(runner, testing.AttentionInputs(q, k, v, None, None), {"dropout_p": p, "seed": seed}):
            continue
        out, lse = attention(q, k, v, dropout_p=p, seed=seed)
        gone = dropped(seed, (b, h, m, n), p)
        assert torch.equal(out == 0, gone)
        assert torch.equal(lse, attention(q, k, v)[1])
        # Parts of the keys that are merged round once more.
        kept = out[~gone].unique().double()
        assert kept.numel() == 0 or (kept.max() - kept.min()) <= 8 * torch.finfo(dtype).eps * kept.max()
        # The backward pass draws again.
        grad, keep = torch.ones_like(out[..., :1]), torch.zeros_like(v[..., :1]).requires_grad_()
        last = attention(q[:, :, -1:], k, keep, dropout_p=p, seed=seed)[0]
        (grad_v,) = torch.autograd.grad(last, keep, grad[:, :, -1:])
        assert torch.equal(grad_v[..., 0] == 0, dropped(seed, (b, h, 1, n), p)[:, :, 0])


def test_dropped_is_a_function_of_seed_and_place():
    shape, p = (2, 3, 5, 150), 0.25
    seeds = [torch.tensor(s) for s in (0, 1, 2**32, -1, 2**63 - 1)]
    masks = [dropped(seed, shape, p) for seed in seeds]
    assert all(not torch.equal(x, y) for x, y in itertools.combinations(masks, 2))
    for seed, mask in zip(seeds, masks, strict=True):
        assert torch.equal(mask, dropped(seed, shape, p))
        words = [_word(int(seed), r, j, 150) for r in range(30) for j in range(150)]
        assert torch.equal(mask.flatten(), torch.tensor([w < p * 2**32 for w in words]))
        assert (mask <= dropped(seed, shape, 0.5)).all()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate_of_dropout(p):
    count = 4 * 4 * 64 * 1024
    gone = dropped(torch.tensor(11), (4, 4, 64, 1024), p).double()
    # Five standard deviations, of all and of each column.
    assert abs(gone.mean() - p) < 5 * (p * (1 - p) / count) ** 0.5
    assert ((gone.mean((0, 1, 2)) - p).abs() < 5 * (p * (1 - p) / 1024) ** 0.5).all()


@pytest.mark.parametrize("names", [DENSE, OPTIONS], ids=["dense", "varlen"])
def test_runs_are_reproducible(runner, names):
    draws, options = _call(names, (70, 90), size=24, mask="B1MN", bias="11MN", count=1)
    if _served(runner, draws[0], options):
        first, second = (testing.check_attention(*draws, **options) for _ in range(2))
        assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize("names", [DENSE, OPTIONS], ids=["dense", "varlen"])
def test_inputs_are_not_written(plain_runner, names):
    draws, options = _call(names, (12, 19), mask="B1MN", bias="11MN", count=1)
    given = [x for x in (*draws[0], *options.values()) if isinstance(x, torch.Tensor)]
    before = [x.detach().clone() for x in given]
    _check(plain_runner, draws, options)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def _op_calls(names, dtype=torch.float32):
    """Arguments of the ops, as their inputs and options are drawn."""
    more = {"mask": "B11N", "bias": "1HMN", "value_size": 6, "count": 1, "requires_grad": False}
    (inputs,), options = _call(names, dtype=dtype, **more)
    packed = Scores(0.3, inputs.mask, inputs.bias, **options).pack()
    call = (*inputs[:3], *packed)
    yield forward_op, call
    out, lse = forward_op(*call)
    saved = (*inputs[:3], out, lse, *packed)
    yield backward_op, ([torch.ones_like(out), torch.ones_like(lse)], *saved, [True] * 4)
    yield backward_op, ([None, torch.ones_like(lse)], *saved, [False, True, False, True])
    yield backward_op, ([torch.ones_like(out), None], *saved, [True, False, True, False])
    for average in (False, True):
        yield weights_op, (*inputs[:2], lse, *packed, average)


@pytest.mark.parametrize("names", [*([name] for name in OPTIONS), DENSE, OPTIONS], ids="-".join)
def test_opcheck(plain_runner, names):
    (inputs,), options = _call(names, count=1, mask="B11N", bias="1HMN")
    if not _served(plain_runner, inputs, options):
        return
    for op, args in _op_calls(names, torch.float16 if INTERPRETED else torch.bfloat16):
        if op is weights_op and _no_weights(plain_runner.backend):
            continue
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def _no_weights(backend):
    return backends.why_not(backend, backends.Call("attention", "cpu", torch.float32, "", ("weights",)))


@pytest.mark.parametrize("names", [DENSE, OPTIONS], ids=["dense", "varlen"])
def test_what_one_saves_another_reads(plain_runner, other_backend, names):
    draws, options = _call(names, (12, 19), torch.float64, mask="B11N", bias="1HMN", requires_grad=False, count=1)
    (inputs,) = draws
    if not _served(plain_runner, inputs, options) or _why_not(other_backend, inputs, options) is not None:
        return
    scores = Scores(0.3, inputs.mask, inputs.bias, **options)
    out, lse = forward_op(*inputs[:3], *scores.pack())
    call = ([out.flip(-1), lse.nan_to_num(neginf=0)], *inputs[:3], out, lse, *scores.pack(), [True] * 4)
    ours = backward_op(*call)
    with seqkernels.use_backend(other_backend):
        theirs = backward_op(*call)
    for x, y in zip(ours, theirs, strict=True):
        # How exact they are, other tests judge.
        testing.assert_within_budget(x.float(), y, y.float())


def test_who_has_the_options():
    every = (
        "alibi",
        "bias32",
        "block_table",
        "bottom_right",
        "causal",
        "dropout",
        "grouped",
        "key_lengths",
        "mask",
        "sink",
        "softcap",
    )
    every = (*every, "varlen", "weights", "window")
    for dtype in DTYPES:
        call = backends.Call("attention", "cpu", dtype, "", every)
        assert backends.why_not("reference", call) is None
        if backends.backend("numba").unavailable() is None:
            declined = [name for name in every if name not in ("causal", "grouped", "mask")]
            assert backends.why_not("numba", call) == f"has no {', '.join(declined)}"
