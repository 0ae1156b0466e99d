"""Weights and dropout of ``MultiheadAttention``: of one call with the output, only as large as what is returned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels import backends
from seqkernels.nn import MultiheadAttention
from seqkernels.testing import assert_within_budget, poisoned_empty

from ..sizes import Largest

SIZE, HEADS, QUERIES, KEYS, BATCH = 12, 3, 5, 7, 2
FORMS = ("batch_first", "sequence_first", "unbatched")
FEATURES = ("bias", "causal", "dropout", "mask", "weights")
ABLE = [
    name
    for name in backends.NAMES
    if backends.why_not(name, backends.Call("attention", "cpu", torch.float64, "", FEATURES)) is None
]


@pytest.fixture(params=ABLE)
def able(request: pytest.FixtureRequest) -> Iterator[str]:
    """Insists on an implementation that computes weights and drops them; fresh memory holds NaN."""
    torch.manual_seed(0)
    with seqkernels.use_backend(request.param), poisoned_empty():
        yield request.param


def layer(form: str = "batch_first", dropout: float = 0.4, **options: Any) -> MultiheadAttention:
    return MultiheadAttention(SIZE, HEADS, dropout, batch_first=form == "batch_first", **options)


def inputs(form: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    shapes = [(length, SIZE) for length in (QUERIES, KEYS)]
    if form != "unbatched":
        shapes = [(BATCH, *s) if form == "batch_first" else (s[0], BATCH, s[1]) for s in shapes]
    query, memory = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return query, memory


def masks(form: str) -> dict[str, Tensor]:
    """A row without keys, and padding."""
    padding = torch.arange(KEYS) >= torch.tensor([[KEYS], [4]])
    attn = torch.rand(QUERIES, KEYS) < 0.3
    attn[1] = True
    return {"key_padding_mask": padding[1] if form == "unbatched" else padding, "attn_mask": attn}


def weighed(layer: MultiheadAttention, memory: Tensor, weights: Tensor, form: str) -> Tensor:
    """The layer's output from its weights (B, H, L, S) or (H, L, S), by plain operations."""
    if form == "sequence_first":
        memory = memory.transpose(0, 1)
    w, b = layer.in_proj_weight[2 * SIZE :], layer.in_proj_bias[2 * SIZE :]
    values = torch.nn.functional.linear(memory, w, b).unflatten(-1, (HEADS, -1)).transpose(-3, -2)
    heads = (weights @ values).transpose(-3, -2).flatten(-2)
    out = layer.out_proj(heads)
    return out.transpose(0, 1) if form == "sequence_first" else out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_output_is_the_weights_times_the_values(able: str, form: str, dtype: torch.dtype) -> None:
    """In training with dropout: both drop the same."""
    ours = layer(form, dtype=dtype)
    query, memory = inputs(form, dtype)
    given = masks(form)
    torch.manual_seed(3)
    out, weights = ours(query, memory, memory, **given, average_attn_weights=False)
    assert weights.dtype == dtype
    double = copy.deepcopy(ours).double()
    exact = weighed(double, memory.double(), weights.double(), form)
    own = weighed(copy.deepcopy(ours).float(), memory.float(), weights.float(), form)
    assert_within_budget(out, exact, own)
    assert not weights[..., 1, :].any()
    # About two fifths of those that are not masked.
    kept = torch.zeros_like(weights, dtype=torch.bool) | ~given["attn_mask"]
    assert 0.2 < (weights[kept] == 0).double().mean() < 0.8
    torch.manual_seed(3)
    _, mean = ours(query, memory, memory, **given)
    assert_within_budget(mean, weights.double().mean(-3), weights.float().mean(-3))
    _, other = ours(query, memory, memory, **given, average_attn_weights=False)
    assert not other.equal(weights)
    _, undropped = ours.eval()(query, memory, memory, **given, average_attn_weights=False)
    drop = given["attn_mask"] | given["key_padding_mask"][..., None, None, :]
    drop = drop.expand(undropped.shape)
    assert not undropped[drop].any()
    sums = undropped.sum(-1)[~drop.all(-1)]
    assert_within_budget(sums, torch.ones_like(sums).double(), undropped.softmax(-1).float().sum(-1)[~drop.all(-1)])


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_lazy_weights_are_the_same(able: str, form: str, average: bool) -> None:
    ours = layer(form, dtype=torch.float64, add_bias_kv=True)
    query, memory = inputs(form)
    given = masks(form)
    wanted = [query, memory, ours.in_proj_weight, ours.bias_k]

    def results(need_weights: bool | str) -> list[Tensor]:
        torch.manual_seed(4)
        out, weights = ours(query, memory, memory, **given, need_weights=need_weights, average_attn_weights=average)
        weights = weights if need_weights is True else weights.compute(average=average)
        return [out, weights, *torch.autograd.grad(out.sum() + weights.square().sum(), wanted)]

    for a, b in zip(results(True), results("lazy"), strict=True):
        assert a.equal(b)


def test_lazy_weights_heed_the_causal_hint_as_the_output_does(able: str) -> None:
    ours = layer(dropout=0.0, dtype=torch.float64)
    x = inputs("batch_first")[0]
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    _, lazy = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights="lazy")
    assert lazy.scores.mask is None
    _, weights = ours(x, x, x, attn_mask=mask, is_causal=True)
    assert lazy.compute().equal(weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_dtype(able: str, dtype: torch.dtype) -> None:
    ours = layer(dtype=torch.float32)
    x = torch.randn(BATCH, QUERIES, SIZE)
    results = []
    for need_weights in (True, "lazy"):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype):
            out, weights = ours(x, x, x, need_weights=need_weights)
            weights = weights if need_weights is True else weights.compute()
        assert out.dtype == weights.dtype == dtype
        results.append(weights)
    assert results[0].equal(results[1])


@pytest.mark.parametrize("need_weights", [True, "lazy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_other_devices(
    able: str, dtype: torch.dtype, need_weights: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where softmax is of float32 weights are too, and not rounded in between; what attention gives is not."""
    monkeypatch.setattr("seqkernels._attention._LOWER_SOFTMAX", ())
    ours = layer(dtype=torch.float32)
    x = torch.randn(BATCH, QUERIES, SIZE)
    with torch.autocast("cpu", dtype):
        out, weights = ours(x, x, x, need_weights=need_weights)
        weights = weights if need_weights is True else weights.compute()
    assert (out.dtype, weights.dtype) == (dtype, torch.float32)
    assert not torch.equal(weights, weights.to(dtype).float())
    assert ours.double()(x.double(), x.double(), x.double())[1].dtype == torch.float64


@pytest.mark.parametrize("need_weights", [True, "lazy", False])
def test_weights_of_all_heads_are_never_stored(able: str, need_weights: bool | str) -> None:
    """Outside of the op, and in its gradient; dropout included."""
    heads, length = 8, 48
    ours = MultiheadAttention(heads, heads, 0.3, batch_first=True)
    x = torch.randn(1, length, heads, requires_grad=True)
    with Largest() as largest:
        out, weights = ours(x, x, x, need_weights=need_weights)
        loss = out.sum() + (weights.square().sum() if need_weights is True else 0)
        loss.backward()
    if need_weights is True:
        # Three tensors of random words of one head at most, where there are 64 for 48 keys.
        assert length * length <= largest.elements <= length * 64
    else:
        assert largest.elements <= length * heads * 3


def test_explain_tells_who_computes_weights(able: str) -> None:
    ours = layer(dtype=torch.float64)
    query, memory = inputs("batch_first")
    for need_weights in (True, "lazy", False):
        explanation = seqkernels.explain(ours, query, memory, memory, need_weights=need_weights)
        features = [entry.call.features for entry in explanation.entries]
        assert features == [("dropout",), ("dropout", "weights")][: 1 + (need_weights is True)]
        assert "not fused" not in str(explanation)


def test_weights_come_without_a_warning() -> None:
    """Also where only the reference computes them."""
    x = torch.randn(1, 4, SIZE)
    _, weights = layer().eval()(x, x, x)
    assert weights.shape == (1, 4, 4)


@pytest.mark.parametrize("average", [False, True])
def test_second_derivative_with_dropout(able: str, average: bool) -> None:
    ours = MultiheadAttention(4, 2, 0.4, dtype=torch.float64)
    query, memory = torch.randn(2, 1, 4, dtype=torch.float64), torch.randn(3, 1, 4, dtype=torch.float64)
    mask = torch.randn(2, 3, dtype=torch.float64)
    mask[0] = -torch.inf

    def fn(query: Tensor, memory: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        return torch.func.functional_call(
            ours,
            {"in_proj_weight": weight},
            (query, memory, memory),
            {"attn_mask": mask, "average_attn_weights": average},
        )

    leaves = [x.detach().requires_grad_() for x in (query, memory, ours.in_proj_weight)]
    torch.autograd.gradcheck(fn, leaves)
    torch.autograd.gradgradcheck(fn, leaves)


# Dynamo itself instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("need_weights", [True, "lazy"])
def test_compiles_to_one_graph(need_weights: bool | str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    ours = layer(dtype=torch.float64)
    query, memory = inputs("batch_first")
    given = masks("batch_first")

    def fn() -> Tensor:
        out, weights = ours(query, memory, memory, **given, need_weights=need_weights)
        weights = weights if need_weights is True else weights.compute()
        return out.sum() + weights.square().sum()

    results = []
    with seqkernels.use_backend("reference"):
        for run in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(1)
            loss = run()
            results.append((loss, *torch.autograd.grad(loss, [query, memory, ours.in_proj_weight])))
    for a, b in zip(*results, strict=True):
        assert_within_budget(a, b.double(), b.float())


def test_bad_need_weights_is_named() -> None:
    x = torch.randn(1, 4, SIZE)
    with pytest.raises(ValueError, match="need_weights: expected a bool or 'lazy', got 'later'"):
        layer()(x, x, x, need_weights="later")
