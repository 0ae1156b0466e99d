"""Weights of attention and their column sums, against a dense computation of its own, with every option."""

from __future__ import annotations

from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import seqkernels
from seqkernels import backends, testing
from seqkernels.backends.reference.attention import dropped
from seqkernels.cells import DTYPES, accumulate_dtype
from seqkernels.ops import weights as ops
from seqkernels.ops.attention import attend
from seqkernels.ops.attention_check import check
from seqkernels.ops.weights import column_sums, weights
from seqkernels.scores import Scores

from ..sizes import Largest

FEATURES = (
    *("alibi", "bias", "bottom_right", "causal", "dropout", "grouped", "key_lengths", "mask", "sink", "softcap"),
    *("varlen", "window"),
)
#: What is computed, and the features beyond the options that it needs.
WANTED = {"heads": ("weights",), "average": ("weights",), "sums": ()}


def able(name: str, *features: str) -> bool:
    call = backends.Call("attention", "cpu", torch.float64, "", tuple(sorted(features)))
    return backends.why_not(name, call) is None


RUNS = [(what, name) for what, needed in WANTED.items() for name in backends.NAMES if able(name, *needed)]
OPTIONS = {name: [option for option in FEATURES if able(name, option)] for name in backends.NAMES}


LOG2E = 1.4426950408889634


class Case(NamedTuple):
    """One call of attention: tensors that have gradients, and the other fields of `Scores`."""

    q: Tensor
    k: Tensor
    bias: Tensor | None
    sink: Tensor | None
    options: dict[str, Any]

    def scores(self) -> Scores:
        return Scores(0.6, bias=self.bias, sink=self.sink, **self.options)

    def to(self, dtype: torch.dtype) -> Case:
        acc = accumulate_dtype(dtype)
        q, k, bias = (testing.cast(x, dtype) for x in self[:3])
        return Case(q, k, bias, testing.cast(self.sink, acc), self.options)


def draw(
    features: set[str],
    batch: int = 2,
    kv_heads: int = 2,
    queries: int = 5,
    keys: int = 7,
    size: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    def lengths(most: int, at_least: int = 0) -> Tensor:
        return torch.randint(at_least, most + 1, (batch,), generator=generator, dtype=torch.int32)

    heads = kv_heads * (2 if "grouped" in features else 1)
    options: dict[str, Any] = {}
    rows = (batch, queries, keys)
    if "varlen" in features:
        for side, most in (("q", queries), ("k", keys)):
            starts = F.pad(lengths(most).cumsum(0, dtype=torch.int32), (1, 0)) + 1
            options |= {f"cu_seqlens_{side}": starts, f"max_seqlen_{side}": most}
        rows = (1, int(options["cu_seqlens_q"][-1]) + 1, int(options["cu_seqlens_k"][-1]) + 2)
    if "mask" in features:
        options["mask"] = torch.rand(batch, 1, queries, keys, generator=generator) < 0.7
    if "key_lengths" in features:
        options["key_lengths"] = lengths(keys)
    if "bottom_right" in features:
        options["bottom_right"] = True
    if "causal" in features:
        options["right"] = 0
    if "window" in features:
        options["left"], options["right"] = 1, options.get("right", 2)
    if "alibi" in features:
        options["alibi_slopes"] = torch.rand(batch, heads, generator=generator)
    if "softcap" in features:
        options["softcap"] = 1.3
    if "dropout" in features:
        options |= {"dropout_p": 0.3, "seed": torch.randint(2**62, (), generator=generator)}
    bias = normal(1, heads, queries, keys) if "bias" in features else None
    if bias is not None:
        hidden = torch.rand(bias.shape, generator=generator) < 0.2
        bias = bias.detach().masked_fill(hidden, -torch.inf).requires_grad_()
    sink = normal(heads).detach().to(accumulate_dtype(dtype)).requires_grad_() if "sink" in features else None
    return Case(normal(rows[0], heads, rows[1], size), normal(rows[0], kv_heads, rows[2], size), bias, sink, options)


def _reads(case: Case, b: int, queries: int, keys: int) -> tuple[Tensor, int]:
    """(1 or H, queries, keys) bool, one pair after the other, and the diagonal."""
    options = case.options
    if "key_lengths" in options:
        keys = min(keys, int(options["key_lengths"][b]))
    diagonal = keys - queries if options.get("bottom_right") else 0
    left, right = options.get("left", -1), options.get("right", -1)
    found = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            after = j - i - diagonal
            found[i, j] = (left < 0 or -after <= left) and (right < 0 or after <= right)
    if "mask" in options:
        found = found & options["mask"][b, 0, :queries, :keys]
    if case.bias is not None:
        found = found & (case.bias[0, :, :queries, :keys] != -torch.inf)
    return (found if found.dim() == 3 else found.unsqueeze(0)), diagonal


def dense(case: Case, what: str, tiled: bool = False) -> Tensor:
    """Each batch entry or document by itself, in the dtype that results have.

    `tiled` is in powers of two with a log-sum-exp in natural units, as kernels have it and round it.
    """
    unit = LOG2E if tiled else 1.0
    options = case.options
    acc = accumulate_dtype(case.q.dtype)
    group = case.q.shape[1] // case.k.shape[1]
    shape = case.scores().shape(case.q, case.k)
    drop = torch.zeros(shape, dtype=torch.bool)
    if "dropout_p" in options and what != "sums":
        drop = dropped(options["seed"], shape, options["dropout_p"])
    found, sums = [], torch.zeros(case.k.shape[0], case.q.shape[1], case.k.shape[2], dtype=acc)
    for b in range(shape[0]):
        row, rows, columns = b, slice(None), slice(None)
        if "cu_seqlens_q" in options:
            row = 0
            rows, columns = (slice(*options[f"cu_seqlens_{side}"][b : b + 2].tolist()) for side in "qk")
        q, k = case.q[row, :, rows].to(acc), case.k[row, :, columns].to(acc).repeat_interleave(group, 0)
        queries, all_keys = q.shape[1], k.shape[1]
        keep, diagonal = _reads(case, b, queries, all_keys)
        keys = keep.shape[2]
        scores = (q * (0.6 * unit)) @ k[:, :keys].transpose(1, 2) if tiled else q @ k[:, :keys].transpose(1, 2) * 0.6
        if "softcap" in options:
            scores = (scores / (1.3 * unit)).tanh() * (1.3 * unit)
        if case.bias is not None:
            bias = case.bias[0, :, :queries, :keys].to(acc)
            scores = scores + torch.where(keep, bias, 0) * unit
        if "alibi_slopes" in options:
            away = (torch.arange(keys) - torch.arange(queries).view(-1, 1) - diagonal).abs()
            scores = scores - options["alibi_slopes"][b].to(acc).view(-1, 1, 1) * unit * away
        scores = scores.masked_fill(~keep, torch.finfo(acc).min / 4)
        if case.sink is not None:
            scores = torch.cat((scores, case.sink.view(-1, 1, 1).expand(-1, queries, 1) * unit), 2)
        if tiled and scores.shape[2] > 0:
            level = (scores / unit).logsumexp(2, keepdim=True)
            weights = (scores - level * unit).exp2()
        else:
            weights = scores.softmax(2)
        weights = weights[..., :keys].masked_fill(~keep, 0)
        at = drop[b, :, :queries, :keys]
        if "dropout_p" in options and what != "sums":
            weights = torch.where(at, 0, weights / (1 - options["dropout_p"]))
        found.append(F.pad(weights, (0, shape[3] - keys, 0, shape[2] - queries)))
        received = F.pad(weights.sum(1), (0, all_keys - keys))
        place = torch.zeros_like(sums)
        place[row, :, columns] = 1
        sums = sums.masked_scatter(place.bool(), received + sums[row, :, columns])
    if what == "sums":
        return sums
    together = torch.stack(found)
    return together.mean(1) if what == "average" else together


def fused(case: Case, what: str) -> Tensor:
    scores = case.scores()
    check(case.q, case.k, case.k, scores)
    with torch.no_grad():
        _, lse = attend(case.q, case.k, case.k, scores._replace(dropout_p=0.0))
    assert not lse.requires_grad
    if what == "sums":
        return column_sums(case.q, case.k, lse, scores)
    return weights(case.q, case.k, lse, scores, what == "average")


def run(
    fn: Any, case: Case, what: str, related: bool = False, *, create_graph: bool = False, **options: Any
) -> dict[str, Tensor]:
    """The result and the gradients of a quadratic function of it; `related` keys come from the queries."""
    result = fn(case._replace(k=case.k + case.q.mean((1, 2), keepdim=True)) if related else case, what, **options)
    slope = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    wanted = {name: x for name, x in zip(Case._fields[:4], case[:4], strict=True) if x is not None}
    grads = torch.autograd.grad(
        result, list(wanted.values()), slope + result, materialize_grads=True, create_graph=create_graph
    )
    assert not create_graph or all(x.requires_grad for x in grads)
    return {"result": result.detach()} | dict(zip(wanted, grads, strict=True))


def judge(case: Case, what: str, related: bool = False, *, create_graph: bool = False) -> None:
    dtype = case.q.dtype
    lower = torch.float32 if dtype == torch.float64 else dtype
    actual = run(fused, case, what, related, create_graph=create_graph)
    exact = run(dense, case.to(torch.float64), what, related)
    own = [run(dense, case.to(lower), what, related, tiled=tiled) for tiled in (False, True)]
    own += [run(dense, case, what, related, tiled=True)] if dtype == torch.float64 else []
    assert actual["result"].dtype == accumulate_dtype(dtype)
    for name, x in actual.items():
        assert x.shape == exact[name].shape, name
        assert name == "result" or x.dtype == getattr(case, name).dtype
    for some in [list(actual)] if dtype == torch.float64 else [[name] for name in actual]:
        # Of few elements, of one magnitude: judged together.
        joined = [torch.cat([of[name].flatten() for name in some]) for of in (actual, exact, *own)]
        testing.assert_within_budget(joined[0], joined[1], joined[2:], "/".join(some))


@pytest.mark.parametrize(("what", "name"), RUNS)
@hypothesis.given(
    data=st.data(),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    lengths=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    size=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(max_examples=60)
def test_options(
    what: str,
    name: str,
    data: st.DataObject,
    batch: int,
    kv_heads: int,
    lengths: tuple[int, int],
    size: int,
    seed: int,
) -> None:
    features = data.draw(st.sets(st.sampled_from(OPTIONS[name])))
    with seqkernels.use_backend(name), testing.poisoned_empty():
        judge(draw(features, batch, kv_heads, *lengths, size, seed=seed), what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("what", "name"), RUNS)
def test_dtypes(what: str, name: str, dtype: torch.dtype) -> None:
    for features in (OPTIONS[name], ["grouped", "causal"]):
        case = draw(set(features) - {"dropout"}, 2, 2, 33, 41, 16, dtype, seed=3)
        with seqkernels.use_backend(name), testing.poisoned_empty():
            judge(case, what)


@pytest.mark.parametrize("features", [[], ["bias", "sink", "softcap", "grouped"], FEATURES], ids=len)
@pytest.mark.parametrize(("what", "name"), RUNS)
def test_gradcheck(what: str, name: str, features: list[str]) -> None:
    case = draw(set(features) & set(OPTIONS[name]), 1, 1, 3, 3, 2, seed=4)
    leaves = [x for x in case[:4] if x is not None]
    if case.bias is not None:
        leaves[2] = case.bias.detach().clamp(min=-1).requires_grad_()

    def fn(q: Tensor, k: Tensor, *more: Tensor) -> Tensor:
        rest = iter(more)
        bias, sink = (None if x is None else next(rest) for x in case[2:4])
        return fused(Case(q, k, bias, sink, case.options), what)

    with seqkernels.use_backend(name):
        torch.autograd.gradcheck(fn, leaves)
        torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize(("what", "name"), RUNS)
def test_first_order_is_the_same_where_the_second_is_wanted(what: str, name: str) -> None:
    with seqkernels.use_backend(name):
        for related in (False, True):
            judge(draw(set(OPTIONS[name]), seed=5), what, related, create_graph=True)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(("what", "name"), RUNS)
def test_nan_behind_masks_has_no_influence(what: str, name: str, create_graph: bool) -> None:
    case = draw({"mask", "bias", "grouped", "softcap"}.intersection(OPTIONS[name]), seed=6)
    case.options["mask"][..., 3] = False
    with seqkernels.use_backend(name), testing.poisoned_empty():
        clean = run(fused, case, what, create_graph=create_graph)
        for bad in (torch.nan, torch.inf):
            k, bias = case.k.detach().clone(), case.bias.detach().clone()
            k[:, :, 3] = bias[..., 3] = bad
            spoilt = case._replace(k=k.requires_grad_(), bias=bias.requires_grad_())
            dirty = run(fused, spoilt, what, create_graph=create_graph)
            for key, x in dirty.items():
                assert x.equal(clean[key]), key
    received = clean["result"] if what == "sums" else clean["result"].sum(-2)
    assert not received[..., 3].any()


@pytest.mark.parametrize(("what", "name"), RUNS)
def test_strides(what: str, name: str) -> None:
    for layout in testing.LAYOUTS[:-2]:
        case = draw({"bias", "grouped"}, seed=7)
        laid = [testing.lay_out(x, layout).detach().requires_grad_() for x in case[:3]]
        with seqkernels.use_backend(name), testing.poisoned_empty():
            judge(Case(*laid, None, case.options), what)


def test_column_sums_add_up_to_the_weights_before_dropout() -> None:
    case = draw(set(FEATURES) - {"varlen"}, seed=8)
    with seqkernels.use_backend("reference"):
        of_all = fused(case._replace(options=case.options | {"dropout_p": 0.0}), "heads").sum(2)
        found = fused(case, "sums")
    testing.assert_within_budget(found, of_all, of_all.float())


def test_memory_is_that_of_the_result(plain_runner: object) -> None:
    """Of column sums O(N), of averaged weights (B, M, N), outside of the ops; gradients included."""
    length, heads, size = 100, 12, 4
    q = torch.randn(1, heads, length, size, requires_grad=True)
    k = torch.randn(1, heads // 2, length, size, requires_grad=True)
    scores = Scores(0.5, right=0)
    _, lse = attend(q, k, k, scores)
    for what in ("sums", "average"):
        if what == "average" and not able(plain_runner.backend, "weights", "causal", "grouped"):
            continue
        with Largest() as largest:
            found = column_sums(q, k, lse, scores) if what == "sums" else weights(q, k, lse, scores, True)
            found.square().sum().backward()
        assert largest.elements == (q.numel() if what == "sums" else length * length)


def test_dropout_of_one_head_is_that_of_all() -> None:
    seed = torch.tensor(-5)
    for shape in ((2, 3, 4, 5), (1, 2, 3, 64), (3, 2, 2, 130), (2, 2, 0, 3), (2, 2, 3, 0)):
        every = dropped(seed, shape, 0.4)
        for head in range(shape[1]):
            assert dropped(seed, shape, 0.4, head).equal(every[:, head : head + 1])


@pytest.mark.parametrize("features", [[], FEATURES], ids=len)
def test_opcheck_of_the_gradient(features: list[str]) -> None:
    case = draw(set(features), seed=9)
    q, k, bias, sink = (None if x is None else x.detach() for x in case[:4])
    scores = case.scores()._replace(bias=bias, sink=sink)
    with seqkernels.use_backend("reference"):
        _, lse = attend(q, k, k, scores)
        for average in (False, True):
            grad = torch.ones_like(weights(q, k, lse, scores, average))
            for needs in ([True, True, bias is not None, sink is not None], [False, True, False, False]):
                args = (grad, q, k, *scores.pack(), average, needs)
                checks = ("test_schema", "test_faketensor", "test_autograd_registration")
                torch.library.opcheck(ops.backward_op, args, test_utils=checks)


# Dynamo itself instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("what", WANTED)
def test_compiles_to_one_graph(what: str) -> None:
    torch._dynamo.reset()
    case = draw(set(FEATURES), seed=10)

    def compiled(case: Case, what: str) -> Tensor:
        fn = torch.compile(fused, fullgraph=True, backend="aot_eager")
        return fn(case, what)

    with seqkernels.use_backend("reference"):
        expected = run(fused, case, what)
        for name, x in run(compiled, case, what).items():
            testing.assert_within_budget(x, expected[name], expected[name].float(), name)


def test_head_sizes_of_no_kernel() -> None:
    q, k = (torch.randn(1, 2, 3, 600, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = weights(q, k, torch.empty(1, 2, 3), Scores(0.01, right=0), True)
    exact = run(dense, Case(q, k, None, None, {"right": 0}), "average")["result"]
    assert found.shape == exact.shape
    assert found[0].triu(1).eq(0).all()
    assert found.requires_grad
