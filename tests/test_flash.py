"""flash-attn's functions of batches and documents do what its docstrings say, under its signatures."""

from __future__ import annotations

import inspect

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import seqkernels
from seqkernels import functional, testing
from seqkernels._flash import arguments
from seqkernels.cells import DTYPES
from seqkernels.functional import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

from .flash_dense import dense, dense_batch, evaluate, judge, on_all

OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
DOCUMENTS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
#: Names without and with defaults, as flash-attn 2.8 has them.
SIGNATURES = {
    "flash_attn_func": (["q", "k", "v"], OPTIONS),
    "flash_attn_qkvpacked_func": (["qkv"], OPTIONS),
    "flash_attn_kvpacked_func": (["q", "kv"], OPTIONS),
    "flash_attn_varlen_func": (["q", "k", "v", *DOCUMENTS], OPTIONS | {"block_table": None}),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], OPTIONS),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *DOCUMENTS], OPTIONS),
    "flash_attn_with_kvcache": (
        ["q", "k_cache", "v_cache"],
        {
            **dict.fromkeys(["k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx"]),
            **dict.fromkeys(["cache_leftpad", "block_table", "softmax_scale"]),
            "causal": False,
            "window_size": (-1, -1),
            "softcap": 0.0,
            "rotary_interleaved": True,
            "alibi_slopes": None,
            "num_splits": 0,
            "return_softmax_lse": False,
        },
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    required, defaults = SIGNATURES[name]
    parameters = inspect.signature(getattr(functional, name)).parameters
    assert list(parameters) == [*required, *defaults]
    assert {n: p.default for n, p in parameters.items() if p.default is not p.empty} == defaults


def draw(seed: int, dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def batch(seed, dtype, batch, queries, keys, heads, kv_heads, size, value_size):
    return draw(
        seed,
        dtype,
        q=(batch, queries, heads, size),
        k=(batch, keys, kv_heads, size),
        v=(batch, keys, kv_heads, value_size),
    )


def slopes_of(kind: str | None, batch: int, heads: int) -> torch.Tensor | None:
    shape = {None: (), "heads": (heads,), "batch": (batch, heads)}[kind]
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 0.3 if shape else None


def check(tensors, **options):
    """Outputs and gradients of `flash_attn_func`, by every implementation."""

    def run(**leaves):
        return flash_attn_func(**leaves, **options, return_attn_probs=True)

    def oracle(variant, **leaves):
        return dense_batch(**leaves, variant=variant, **options)

    with torch.no_grad():
        grads = testing.random_grads(evaluate(lambda **x: oracle((False, False), **x), tensors))
    for _, found in on_all(lambda: evaluate(run, tensors, grads)):
        judge(found, oracle, tensors, grads)


PLENTY = [
    {},
    {"causal": True},
    {"softmax_scale": 0.3, "window_size": (3, 2)},
    {"causal": True, "window_size": (4, 7), "alibi_slopes": slopes_of("heads", 2, 4)},
    {"softcap": 2.0, "alibi_slopes": slopes_of("batch", 2, 4), "window_size": (-1, 3)},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(12, 19), (19, 12), (1, 19), (16, 16)], ids=str)
def test_batches(dtype, lengths):
    for kv_heads, options in zip((4, 2, 1, 2, 4), PLENTY, strict=True):
        check(batch(0, dtype, 2, *lengths, 4, kv_heads, 16, 24), **options)


WINDOWS = st.tuples(st.integers(-1, 25), st.integers(-1, 25))
SHARED = {
    "softmax_scale": st.sampled_from([None, 0.3, -1.0]),
    "causal": st.booleans(),
    "window_size": WINDOWS,
    "softcap": st.sampled_from([0.0, 1.5]),
}


@hypothesis.given(
    sizes=st.tuples(*(st.integers(low, high) for low, high in ((1, 3), (0, 20), (0, 20), (1, 2), (1, 3), (3, 20)))),
    value_size=st.integers(3, 20),
    alibi=st.sampled_from([None, "heads", "batch"]),
    options=st.fixed_dictionaries(SHARED),
)
def test_any_batch(sizes, value_size, alibi, options):
    count, queries, keys, kv_heads, groups, size = sizes
    heads = kv_heads * groups
    tensors = batch(1, torch.float64, count, queries, keys, heads, kv_heads, size, value_size)
    check(tensors, alibi_slopes=slopes_of(alibi, count, heads), **options)


@pytest.mark.parametrize(
    ("lengths", "options", "picture"),
    [
        ((2, 5), {"causal": True}, "11110 11111"),
        ((5, 2), {"causal": True}, "00 00 00 10 11"),
        ((3, 5), {"window_size": (1, 0)}, "01100 00110 00011"),
        ((3, 5), {"window_size": (0, 1)}, "00110 00011 00001"),
        ((5, 3), {"window_size": (1, 1)}, "000 100 110 111 011"),
        ((3, 5), {"window_size": (1, 4), "causal": True}, "01100 00110 00011"),
        ((2, 3), {"window_size": (-1, 0)}, "110 111"),
        ((2, 3), {"window_size": (0, -1)}, "011 001"),
    ],
    ids=str,
)
def test_pictures_of_masks(lengths, options, picture):
    """Equal scores: a query's output is the mean of the values it reads, here one element each."""
    keep = torch.tensor([[int(x) for x in row] for row in picture.split()])
    q, k = torch.zeros(1, lengths[0], 1, 4), torch.zeros(1, lengths[1], 1, 4)
    v = torch.eye(lengths[1]).view(1, lengths[1], 1, lengths[1])
    for _, found in on_all(lambda: evaluate(lambda: flash_attn_func(q, k, v, **options, return_attn_probs=True), {})):
        assert torch.equal(found["out"][0, :, 0] > 0, keep.bool())
        assert torch.equal(found["lse"][0, 0] == -torch.inf, keep.sum(1) == 0)
        testing.assert_within_budget(
            found["out"][0, :, 0], keep.double() / keep.sum(1, keepdim=True).clamp(min=1), torch.zeros(keep.shape)
        )


def cu_seqlens(lengths, first=0):
    return torch.tensor([first, *(first + sum(lengths[: i + 1]) for i in range(len(lengths)))], dtype=torch.int32)


def documents(x, lengths, first=0):
    return x[first : first + sum(lengths)].split(list(lengths))


def dense_documents(q, k, v, variant, q_lengths, k_lengths, first=0, **options):
    """`dense` with rows of no document as they should be."""
    parts = [documents(x, n, first) for x, n in ((q, q_lengths), (k, k_lengths), (v, k_lengths))]
    outs, levels = dense(list(zip(*parts, strict=True)), variant, **options)
    rest = q.shape[0] - first - sum(q_lengths)
    no_level = levels[0].new_full((q.shape[1], 1), -torch.inf)
    zeros = q.new_zeros(1, q.shape[1], v.shape[2])
    out = torch.cat([zeros.expand(first, -1, -1), *outs, zeros.expand(rest, -1, -1)])
    return out, torch.cat([no_level.expand(-1, first), *levels, no_level.expand(-1, rest)], 1)


def check_documents(tensors, q_lengths, k_lengths, first=0, **options):
    where = (cu_seqlens(q_lengths, first), cu_seqlens(k_lengths, first), max(q_lengths) + 1, max(k_lengths))

    def run(q, k, v):
        return flash_attn_varlen_func(q, k, v, *where, **options, return_attn_probs=True)

    def oracle(variant, **leaves):
        return dense_documents(
            **leaves, variant=variant, q_lengths=q_lengths, k_lengths=k_lengths, first=first, **options
        )

    with torch.no_grad():
        grads = testing.random_grads(evaluate(lambda **x: oracle((False, False), **x), tensors))
    for _, found in on_all(lambda: evaluate(run, tensors, grads)):
        judge(found, oracle, tensors, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents(dtype):
    q_lengths, k_lengths = (3, 12, 0, 7), (9, 5, 4, 0)
    for first in (0, 2):
        for kv_heads, options in zip((4, 2, 1, 2, 4), PLENTY, strict=True):
            options = dict(options)
            if options.get("alibi_slopes", torch.empty(0)).dim() == 2:
                options["alibi_slopes"] = slopes_of("batch", 4, 4)
            tensors = draw(
                2, dtype, q=(22 + 2 * first, 4, 16), k=(18 + 2 * first, kv_heads, 16), v=(18 + 2 * first, kv_heads, 24)
            )
            check_documents(tensors, q_lengths, k_lengths, first, **options)


@hypothesis.given(
    lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    alibi=st.sampled_from([None, "heads", "batch"]),
    options=st.fixed_dictionaries(SHARED),
)
def test_any_documents(lengths, heads, alibi, options):
    q_lengths, k_lengths = zip(*lengths, strict=True)
    count = heads[0] * heads[1]
    tensors = draw(
        3,
        torch.float64,
        q=(sum(q_lengths) + 1, count, 8),
        k=(sum(k_lengths) + 1, heads[0], 8),
        v=(sum(k_lengths) + 1, heads[0], 5),
    )
    check_documents(tensors, q_lengths, k_lengths, alibi_slopes=slopes_of(alibi, len(lengths), count), **options)


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_pages_of_documents_are_the_same_as_none(size):
    q_lengths, k_lengths = (3, 6, 1), (9, 0, 7)
    tensors = draw(4, torch.float32, q=(10, 4, 8), k=(16, 2, 8), v=(16, 2, 8))
    count = -(-max(k_lengths) // size)
    table = torch.full((3, count), -7, dtype=torch.int32)
    order = torch.randperm(3 * count + 2, generator=torch.Generator().manual_seed(0)).tolist()
    pages = {name: torch.full((3 * count + 2, size, 2, 8), torch.nan) for name in "kv"}
    for b, (of_k, of_v) in enumerate(zip(*(documents(tensors[name], k_lengths) for name in "kv"), strict=True)):
        for n, (part_k, part_v) in enumerate(zip(of_k.split(size), of_v.split(size), strict=True)):
            if len(part_k):
                table[b, n] = order.pop()
                pages["k"][table[b, n], : len(part_k)] = part_k
                pages["v"][table[b, n], : len(part_v)] = part_v
    where = (cu_seqlens(q_lengths), cu_seqlens(k_lengths), 6, 9)
    k, v = pages.values()

    def run(k, v, **options):
        out, lse, _ = flash_attn_varlen_func(tensors["q"], k, v, *where, causal=True, return_attn_probs=True, **options)
        return {"out": out, "lse": lse}

    plain = dict(on_all(lambda: run(tensors["k"], tensors["v"])))
    for name, found in on_all(lambda: run(k, v, block_table=table)):
        assert torch.equal(found["out"], plain[name]["out"])
        assert torch.equal(found["lse"], plain[name]["lse"])
    # Only the lengths between the elements count.
    shifted = (where[0], where[1] + 100, *where[2:])
    with seqkernels.use_backend("reference"):
        out = flash_attn_varlen_func(tensors["q"], k, v, *shifted, causal=True, block_table=table)
    assert torch.equal(out, plain["reference"]["out"])
    with pytest.raises(ValueError, match="block_table: expected None where q, k, v, "):
        flash_attn_varlen_func(tensors["q"].requires_grad_(), k, v, *where, block_table=table)


def test_dropped_weights_of_pages():
    """`S_dmask`, the one thing for which pages are gathered, which is told."""
    tensors = draw(4, torch.float32, q=(10, 4, 8), k=(5, 4, 2, 8), v=(5, 4, 2, 8))
    table = torch.tensor([[3, 0], [1, 9], [4, 2]], dtype=torch.int32)
    lengths = (7, 3, 8)
    gathered = {
        name: torch.cat([tensors[name][table[b, : -(-n // 4)].long()].flatten(0, 1)[:n] for b, n in enumerate(lengths)])
        for name in "kv"
    }
    where = (cu_seqlens((3, 6, 1)), cu_seqlens(lengths), 6, 9)

    def run(k, v, **options):
        torch.manual_seed(3)
        return flash_attn_varlen_func(tensors["q"], k, v, *where, 0.4, return_attn_probs=True, **options)

    with seqkernels.use_backend("reference"):
        for x, y in zip(run(**gathered), run(tensors["k"], tensors["v"], block_table=table), strict=True):
            assert torch.equal(x, y)
        explanation = seqkernels.explain(run, tensors["k"], tensors["v"], block_table=table)
    assert "not fused: block_table: keys are gathered" in str(explanation)


PACKED = [
    (flash_attn_qkvpacked_func, flash_attn_func, (2, 6, 3, 4, 8), 2, ()),
    (flash_attn_kvpacked_func, flash_attn_func, (2, 6, 2, 2, 8), 2, ()),
    (flash_attn_varlen_qkvpacked_func, flash_attn_varlen_func, (12, 3, 4, 8), 1, (cu_seqlens((5, 7)), 7)),
    (
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_func,
        (12, 2, 2, 8),
        1,
        (cu_seqlens((5, 7)), cu_seqlens((8, 4)), 7, 8),
    ),
]


@pytest.mark.parametrize(("packed", "plain", "shape", "dim", "where"), PACKED, ids=lambda x: getattr(x, "__name__", ""))
def test_packed_tensors(packed, plain, shape, dim, where):
    tensors = draw(6, torch.float32, x=shape, q=(*shape[:dim], 4, 8), grad=(*shape[:dim], 4, 8))
    options = {"causal": True, "window_size": (3, -1), "softmax_scale": 0.4, "softcap": 3.0}
    options["alibi_slopes"] = slopes_of("heads", 2, 4)
    x, q = tensors["x"].requires_grad_(), tensors["q"].requires_grad_()
    parts = x.unbind(dim)
    unpacked = parts if len(parts) == 3 else (q, *parts)
    ends = where * 2 if len(where) == 2 else where
    ends = (ends[0], ends[2], ends[1], ends[3]) if len(where) == 2 else ends

    def run(fn, *args):
        outs = fn(*args, **options, return_attn_probs=True)
        return [*outs, *torch.autograd.grad(outs[0], (x, q), tensors["grad"], allow_unused=True)]

    given = (x,) if len(parts) == 3 else (q, x)
    with seqkernels.use_backend("reference"):
        found, expected = run(packed, *given, *where), run(plain, *unpacked, *ends)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_dropout():
    """The third result says what was dropped, and the output and the gradients are those of that."""
    tensors = batch(7, torch.float32, 2, 40, 50, 4, 2, 16, 8)
    options = {"causal": True, "softcap": 4.0}

    def run(**leaves):
        torch.manual_seed(3)
        return flash_attn_func(**leaves, **options, dropout_p=0.25, return_attn_probs=True)

    for _, found in on_all(lambda: dict(enumerate(run(**tensors)))):
        signed = found[2]
        dropped = signed < 0
        assert signed.shape == (2, 4, 40, 50)
        assert signed.dtype == torch.float32
        assert not signed.requires_grad
        read = signed != 0
        expected = torch.ones(40, 50, dtype=torch.bool).tril(10)
        assert torch.equal(read, expected.expand_as(read))
        rate = dropped.sum().item() / read.sum().item()
        assert abs(rate - 0.25) < 5 * (0.25 * 0.75 / read.sum().item()) ** 0.5

        def oracle(variant, dropped=dropped, **leaves):
            return dense_batch(**leaves, variant=variant, dropped=dropped, dropout_p=0.25, **options)

        grads = testing.random_grads({"out": found[0], "lse": found[1]})
        judge(evaluate(run, tensors, grads), oracle, tensors, grads)


def test_dropout_of_documents():
    tensors = draw(8, torch.float32, q=(20, 2, 8), k=(24, 1, 8), v=(24, 1, 8))
    where = (cu_seqlens((13, 7)), cu_seqlens((9, 15)), 13, 15)

    def run(**leaves):
        torch.manual_seed(4)
        return flash_attn_varlen_func(**leaves, **dict(zip(DOCUMENTS, where, strict=True)), **options)

    options = {"dropout_p": 0.5, "return_attn_probs": True}
    for _, found in on_all(lambda: dict(enumerate(run(**tensors)))):
        assert found[2].shape == (2, 2, 13, 15)
        dropped = found[2] < 0

        def oracle(variant, dropped=dropped, **leaves):
            lengths = {"q_lengths": (13, 7), "k_lengths": (9, 15)}
            return dense_documents(**leaves, variant=variant, dropped=dropped, dropout_p=0.5, **lengths)

        judge(evaluate(run, tensors), oracle, tensors)


def test_dropout_draws_from_torchs_generator():
    q, k, v = batch(9, torch.float32, 1, 9, 9, 2, 2, 8, 8).values()
    with seqkernels.use_backend("reference"):
        torch.manual_seed(0)
        first, second = (flash_attn_func(q, k, v, 0.5) for _ in range(2))
        torch.manual_seed(0)
        again = flash_attn_func(q, k, v, 0.5)
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        assert (flash_attn_func(q, k, v, 1.0) == 0).all()
        state = torch.get_rng_state()
        out, lse, signed = flash_attn_func(q, k, v, return_attn_probs=True)
        assert torch.equal(torch.get_rng_state(), state)
    assert out.shape == (1, 9, 2, 8)
    assert lse.shape == (1, 2, 9)
    assert signed.shape == (0,)


def test_gradcheck():
    tensors = batch(10, torch.float64, 1, 3, 4, 2, 1, 3, 2)
    leaves = [x.requires_grad_() for x in tensors.values()]

    def outputs(q, k, v):
        return flash_attn_func(q, k, v, 0.0, 0.7, True, (2, -1), 2.0, slopes_of("heads", 1, 2), True, True)[:2]

    with seqkernels.use_backend("reference"):
        assert torch.autograd.gradcheck(outputs, leaves)


def test_what_is_not_read_does_not_leak():
    q, k, v = batch(11, torch.float32, 1, 4, 9, 2, 2, 8, 8).values()
    k[:, :4] = v[:, :4] = torch.nan
    with seqkernels.use_backend("reference"):
        assert flash_attn_func(q, k, v, window_size=(1, 0)).isfinite().all()


def test_layouts_and_no_copies(monkeypatch):
    tensors = batch(12, torch.float32, 2, 6, 7, 4, 2, 8, 8)
    seen = []
    attend = arguments.attend
    monkeypatch.setattr(arguments, "attend", lambda *args: seen.append(args[:3]) or attend(*args))
    with seqkernels.use_backend("reference"):
        out, lse, _ = flash_attn_func(**tensors, return_attn_probs=True)
        where = dict(zip(DOCUMENTS, (cu_seqlens((2, 4)), cu_seqlens((3, 4)), 4, 4), strict=True))
        rows, _, _ = flash_attn_varlen_func(**{n: x[0] for n, x in tensors.items()}, **where, return_attn_probs=True)
    for args in seen:
        assert [x.data_ptr() for x in args] == [x.data_ptr() for x in tensors.values()]
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert rows.is_contiguous()
    swapped = {name: x.transpose(1, 3).contiguous().transpose(1, 3) for name, x in tensors.items()}
    with seqkernels.use_backend("reference"):
        assert torch.equal(flash_attn_func(**swapped), out)


def test_plain_calls_are_plain():
    """Bounds that every key keeps are none, so that kernels without windows serve the call."""
    q, k, v = batch(13, torch.float32, 2, 1, 40, 4, 2, 8, 8).values()

    def features(**options):
        explanation = seqkernels.explain(flash_attn_func, q, k, v, **options)
        return [entry.call.features for entry in explanation.entries]

    assert features(causal=True, window_size=(39, 0), softcap=0.0) == [("grouped",)]
    q = q.expand(2, 40, 4, 8)
    assert features(causal=True, window_size=(39, 39)) == [("causal", "grouped")]


def test_autocast_changes_nothing():
    tensors = batch(14, torch.float32, 1, 5, 5, 2, 2, 8, 8)
    with seqkernels.use_backend("reference"):
        plain = flash_attn_func(**tensors, window_size=(2, 0))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(flash_attn_func(**tensors, window_size=(2, 0)), plain)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_compiled():
    tensors = batch(15, torch.float32, 2, 6, 7, 4, 2, 8, 8)
    where = (cu_seqlens((2, 4)), cu_seqlens((3, 4)), 4, 4)

    def both(q, k, v):
        out = flash_attn_func(q, k, v, causal=True, window_size=(3, 0))
        rows = flash_attn_varlen_func(q[0], k[0], v[0], *where, causal=True)
        return out, rows

    with seqkernels.use_backend("reference"):
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        leaves = [x.requires_grad_() for x in tensors.values()]
        for found, expected in zip(compiled(*leaves), both(*leaves), strict=True):
            assert torch.equal(found, expected)
            grads = [torch.autograd.grad(x.square().sum(), leaves, retain_graph=True) for x in (found, expected)]
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
