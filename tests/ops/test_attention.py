"""The attention contract, for every implementation that can run here."""

from __future__ import annotations

import itertools
import random

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import seqkernels
from seqkernels import testing
from seqkernels.cells import DTYPES
from seqkernels.ops.attention import attention, backward_op, forward_op
from seqkernels.scores import Scores

from .judging import judge

PATTERNS = ["".join(letters) for letters in itertools.product(*(("1", letter) for letter in "BHMN"))]
PAIRS = [(mask, bias) for mask in PATTERNS for bias in PATTERNS]
CASES = [
    *((mask, None) for mask in PATTERNS),
    *((None, bias) for bias in PATTERNS),
    *random.Random(0).sample(PAIRS, 16),
]
# M, N
LENGTHS = [(1, 1), (1, 9), (9, 1), (5, 33), (33, 5), (70, 70), (130, 67)]
EMPTY = [(0, 3), (3, 0), (0, 0)]
SIZES = [(1, 3), (3, 1), (8, 8), (24, 59), (59, 24), (80, 80), (111, 7), (192, 64), (256, 256), (320, 33), (512, 512)]
MASKS = [(None, None, False), ("B11N", None, False), ("BHMN", "1HMN", True), (None, "11MN", True), (None, None, True)]


def _names(results, prefix):
    return {n: x for n, x in results.items() if n.startswith(prefix)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_are_within_the_budget(runner, dtype):
    for (mask, bias, is_causal), kv_heads in itertools.product(MASKS, (4, 2, 1)):
        inputs = testing.attention_inputs(2, 4, 19, 21, 16, dtype, kv_heads=kv_heads, mask=mask, bias=bias)
        testing.check_attention(inputs, is_causal=is_causal)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(runner, lengths):
    for mask, bias, is_causal in MASKS:
        # Few elements are judged over several draws.
        draws = [
            testing.attention_inputs(1, 2, *lengths, 24, mask=mask, bias=bias, seed=3 + seed)
            for seed in range(8 if lengths == (1, 1) else 1)
        ]
        testing.check_attention(*draws, is_causal=is_causal)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_head_sizes(runner, sizes):
    inputs = testing.attention_inputs(1, 2, 6, 11, sizes[0], value_size=sizes[1], mask="B1MN", bias="1H1N")
    testing.check_attention(inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_head_sizes_in_other_dtypes(plain_runner, sizes, dtype):
    draws = [
        testing.attention_inputs(1, 2, 6, 11, sizes[0], dtype, value_size=sizes[1], seed=seed) for seed in range(2)
    ]
    testing.check_attention(*draws, is_causal=True)


@pytest.mark.parametrize(("mask", "bias"), CASES)
def test_broadcast_masks_and_biases(plain_runner, mask, bias):
    for is_causal in (False, True):
        # The gradient of a bias of few elements is judged over several.
        draws = [
            testing.attention_inputs(2, 4, 5, 7, 8, kv_heads=2, mask=mask, bias=bias, seed=seed)
            for seed in range(1 if bias is None else 1 + 4 * bias.count("1"))
        ]
        testing.check_attention(*draws, is_causal=is_causal)


@pytest.mark.parametrize("lengths", EMPTY, ids=str)
def test_empty_lengths(plain_runner, lengths):
    for mask, bias, is_causal in MASKS:
        inputs = testing.attention_inputs(2, 2, *lengths, 8, mask=mask, bias=bias)
        results = testing.check_attention(inputs, is_causal=is_causal)
        assert (results["out"] == 0).all()
        assert (results["lse"] == -torch.inf).all()
        assert all((x == 0).all() for x in _names(results, "grad_").values())


@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0)])
def test_no_batch(plain_runner, batch, heads):
    inputs = testing.attention_inputs(batch, heads, 3, 4, 8, kv_heads=max(heads, 1), mask="B1MN", bias="BH1N")
    results = testing.evaluate(attention, inputs, {})
    results = testing.evaluate(attention, inputs, testing.random_grads(results))
    assert all((x == 0).all() for x in _names(results, "grad_").values())


@pytest.mark.dtype(torch.float64)
@hypothesis.given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    lengths=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mask=st.sampled_from([None, *PATTERNS]),
    bias=st.sampled_from([None, *PATTERNS]),
    is_causal=st.booleans(),
    scale=st.sampled_from([None, 0.0, 0.3, -1.0]),
    layout=st.sampled_from(testing.LAYOUTS[:-2]),
)
def test_any_shape(plain_runner, batch, groups, kv_heads, lengths, sizes, mask, bias, is_causal, scale, layout):
    inputs = testing.attention_inputs(
        batch,
        groups * kv_heads,
        *lengths,
        sizes[0],
        torch.float64,
        value_size=sizes[1],
        kv_heads=kv_heads,
        mask=mask,
        bias=bias,
        layout=layout,
    )
    testing.check_attention(inputs, is_causal=is_causal, scale=scale)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(plain_runner, layout):
    for mask, bias, is_causal in MASKS:
        draws = [
            testing.attention_inputs(2, 4, 6, 9, 12, kv_heads=2, mask=mask, bias=bias, layout=layout, seed=seed)
            for seed in range(2)
        ]
        outputs = testing.evaluate(testing.attention_oracle, draws[0], {})
        testing.check_attention(*draws, is_causal=is_causal, grads=testing.random_grads(outputs, layout))


def test_expanded_masks(plain_runner):
    """A mask given as an expanded view is the same as the smaller one broadcast."""
    inputs = testing.attention_inputs(2, 4, 6, 9, 12, mask="B11N", bias="11MN")
    wide = inputs._replace(
        mask=inputs.mask.expand(2, 4, 6, 9), bias=inputs.bias.detach().expand(2, 4, 6, 9).requires_grad_()
    )
    small, large = testing.check_attention(inputs), testing.check_attention(wide)
    assert torch.equal(small["out"], large["out"])
    grads = testing.random_grads({n: small[n] for n in ("out", "lse")})
    judge({"grad_bias": large["grad_bias"].sum((0, 1), keepdim=True)}, inputs, grads)


def test_layout_of_the_output(plain_runner):
    inputs = testing.attention_inputs(2, 4, 6, 9, 12, value_size=5)
    out, lse = attention(*inputs)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0, -0.5])
def test_scale(plain_runner, scale):
    testing.check_attention(testing.attention_inputs(2, 2, 5, 7, 8, bias="1H11"), scale=scale)


@pytest.mark.parametrize("name", ["out", "lse"])
def test_each_output_alone(plain_runner, name):
    for mask, bias, is_causal in MASKS:
        inputs = testing.attention_inputs(2, 4, 5, 7, 8, kv_heads=2, mask=mask, bias=bias)
        outputs = testing.evaluate(testing.attention_oracle, inputs, {})
        testing.check_attention(inputs, is_causal=is_causal, grads={name: testing.random_grads(outputs)[name]})


@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_each_input_alone(plain_runner, name):
    inputs = testing.attention_inputs(2, 4, 5, 7, 8, kv_heads=2, mask="B1MN", bias="BH1N")
    some = inputs._make(x if n == "mask" else x.detach().requires_grad_(n == name) for n, x in inputs._asdict().items())
    results = testing.check_attention(some)
    assert list(_names(results, "grad_")) == [f"grad_{name}"]


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize(("mask", "bias", "is_causal"), MASKS)
def test_gradcheck(plain_runner, mask, bias, is_causal):
    inputs = testing.attention_inputs(
        1, 4, 3, 4, 3, torch.float64, value_size=2, kv_heads=2, mask=mask, bias=bias, seed=1
    )

    def outputs(q, k, v, bias=None):
        return attention(q, k, v, inputs.mask, bias, is_causal=is_causal)

    if inputs.mask is not None:
        # A row without keys has an lse of -inf, which no finite difference checks.
        inputs.mask[..., 0] = True
    assert torch.autograd.gradcheck(outputs, [x for x in (*inputs[:3], inputs.bias) if x is not None])


@pytest.mark.dtype(torch.float64)
def test_gradgradcheck(plain_runner):
    inputs = testing.attention_inputs(1, 2, 2, 3, 2, torch.float64, kv_heads=1, bias="1HMN", seed=1)

    def outputs(q, k, v, bias):
        return attention(q, k, v, None, bias, is_causal=True)

    assert torch.autograd.gradgradcheck(outputs, (*inputs[:3], inputs.bias))


@pytest.mark.dtype(torch.float64)
def test_first_order_is_the_same_where_the_second_is_wanted(plain_runner):
    inputs = testing.attention_inputs(1, 2, 4, 5, 8, torch.float64, mask="B1MN", bias="1HMN")
    results = testing.check_attention(inputs)
    outputs = attention(*inputs)
    grads = testing.random_grads({n: results[n] for n in ("out", "lse")})
    leaves = {n: getattr(inputs, n) for n in ("q", "k", "v", "bias")}
    found = torch.autograd.grad(outputs, list(leaves.values()), list(grads.values()), create_graph=True)
    assert all(x.requires_grad for x in found)
    judge({f"grad_{name}": x for name, x in zip(leaves, found, strict=True)}, inputs, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys(runner, dtype):
    inputs = testing.attention_inputs(2, 4, 20, 21, 16, dtype, kv_heads=2, mask="B1MN", bias="BHMN")
    bias = inputs.bias.detach().clone()
    mask = inputs.mask.clone()
    mask[0, :, 3] = False
    mask[1] = False
    bias[0, 1, 7] = -torch.inf
    bias[0, 2, :, 5] = -torch.inf
    inputs = inputs._replace(mask=mask, bias=bias.requires_grad_())
    results = testing.check_attention(inputs)
    empty = torch.zeros(2, 4, 20, dtype=torch.bool)
    empty[0, :, 3] = empty[1] = empty[0, 1, 7] = True
    assert (results["out"][empty] == 0).all()
    assert torch.equal(results["lse"] == -torch.inf, empty)
    assert (results["grad_q"][empty] == 0).all()
    assert (results["grad_k"][1] == 0).all()
    assert (results["grad_v"][1] == 0).all()
    assert (results["grad_bias"][bias == -torch.inf] == 0).all()
    assert (results["grad_bias"].masked_select(~mask) == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_masked_does_not_leak(runner, bad):
    clean = testing.attention_inputs(2, 4, 20, 37, 16, kv_heads=2, mask="B1MN", bias="BHMN")
    mask = clean.mask.clone()
    mask[0, :, :, 30:] = mask[1, :, :, 4] = False
    clean = clean._replace(mask=mask)
    expected = testing.check_attention(clean)
    k, v, bias = (x.detach().clone() for x in (clean.k, clean.v, clean.bias))
    k[0, :, 30:] = v[0, :, 30:] = k[1, :, 4] = v[1, :, 4, 3] = bad
    bias[(~mask).expand(bias.shape)] = bad
    dirty = clean._replace(k=k.requires_grad_(), v=v.requires_grad_(), bias=bias.requires_grad_())
    grads = testing.random_grads({n: expected[n] for n in ("out", "lse")})
    for name, x in testing.evaluate(attention, dirty, grads).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_causality_hides_does_not_leak(runner, bad):
    clean = testing.attention_inputs(1, 2, 20, 37, 16)
    expected = testing.check_attention(clean, is_causal=True)
    k, v = (x.detach().clone() for x in (clean.k, clean.v))
    k[:, :, 20:] = v[:, :, 20:] = bad
    dirty = clean._replace(k=k.requires_grad_(), v=v.requires_grad_())
    grads = testing.random_grads({n: expected[n] for n in ("out", "lse")})
    for name, x in testing.evaluate(attention, dirty, grads, is_causal=True).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_visible_nan_shows(runner, name):
    inputs = testing.attention_inputs(1, 2, 20, 37, 16, requires_grad=False)
    getattr(inputs, name)[0, 0, 5, 2] = torch.nan
    out, lse = attention(*inputs, is_causal=True)
    rows = torch.arange(20)
    seen = rows == 5 if name == "q" else rows >= 5
    assert torch.equal(out[0, 0, :, 2].isnan(), seen)
    assert out[0, 1].isfinite().all()
    assert torch.equal(lse[0, 0].isnan(), seen & (name != "v"))


def test_scores_of_any_size(runner):
    draws = [testing.attention_inputs(1, 2, 9, 40, 16, bias="1HMN", seed=seed) for seed in range(4)]
    grads = testing.random_grads(testing.evaluate(testing.attention_oracle, draws[0], {}))
    for scale in (30.0, 1e4):
        results = testing.evaluate(attention, draws[0], grads, scale=scale)
        assert all(x.isfinite().all() for x in results.values())
    for offset in (-1e4, 1e4):
        shifted = [x._replace(bias=(x.bias.detach() + offset).requires_grad_()) for x in draws]
        testing.check_attention(*shifted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_one_saves_another_reads(plain_runner, other_backend, dtype):
    inputs = testing.attention_inputs(1, 4, 6, 9, 12, dtype, kv_heads=2, mask="B1MN", bias="1HMN", requires_grad=False)
    scores = Scores(inputs.q.shape[3] ** -0.5, inputs.mask, inputs.bias, right=0)
    out, lse = forward_op(*inputs[:3], *scores.pack())
    grad = out.flip(-1)
    with seqkernels.use_backend(other_backend):
        found = backward_op([grad, None], *inputs[:3], out, lse, *scores.pack(), [True] * 4)
    names = ("grad_q", "grad_k", "grad_v", "grad_bias")
    judge(dict(zip(names, found, strict=True)), inputs, {"out": grad}, scale=scores.scale, is_causal=True)


def test_runs_are_reproducible(runner):
    inputs = testing.attention_inputs(2, 4, 33, 70, 24, kv_heads=2, mask="B1MN", bias="11MN")
    first, second = (testing.check_attention(inputs) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_inputs_are_not_written(plain_runner):
    inputs = testing.attention_inputs(2, 4, 6, 9, 12, mask="B1MN", bias="11MN")
    before = [x.detach().clone() for x in inputs]
    testing.check_attention(inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
