"""``scaled_dot_product_attention`` against torch's, in float64 and within the error budget in other dtypes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import seqkernels
from seqkernels import backends
from seqkernels.functional import scaled_dot_product_attention
from seqkernels.scores import Scores
from seqkernels.testing import LAYOUTS, assert_within_budget, cast, lay_out, poisoned_empty, torch_tiled_attention


def able(*features: str) -> list[str]:
    """Names of the implementations that say they have all of these."""
    call = backends.Call("attention", "cpu", torch.float64, "", features)
    return [name for name in backends.NAMES if backends.why_not(name, call) is None]


#: Probability of dropout, and an implementation that has it.
DROPOUTS = [*((0.0, name) for name in able()), *((0.5, name) for name in able("dropout"))]


class Shapes(NamedTuple):
    """Of query, key, value and, if any, the mask."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    mask: tuple[int, ...] | None = None
    gqa: bool = False


SHAPES = [
    Shapes((3, 4), (5, 4), (5, 6), (3, 5)),
    Shapes((3, 4), (5, 4), (5, 6), (1, 5)),
    Shapes((2, 3, 4), (2, 5, 4), (2, 5, 6), (2, 1, 5)),
    Shapes((2, 3, 4), (2, 5, 4), (2, 5, 6), (3, 1)),
    Shapes((3, 4), (2, 5, 4), (2, 5, 6)),
    Shapes((2, 3, 4), (7, 2, 5, 4), (1, 2, 5, 4), (7, 1, 3, 5)),
    Shapes((2, 3, 3, 4), (2, 3, 5, 4), (2, 3, 5, 6), (2, 3, 3, 5)),
    Shapes((2, 3, 3, 4), (2, 3, 5, 4), (2, 3, 5, 6), (1, 3, 1, 5)),
    Shapes((2, 3, 3, 4), (2, 3, 5, 4), (2, 3, 5, 6), (2, 1, 1, 5)),
    Shapes((2, 3, 3, 4), (2, 1, 5, 4), (2, 1, 5, 6), (3, 3, 5)),
    Shapes((2, 3, 3, 4), (2, 1, 5, 4), (2, 3, 5, 6), (3, 5)),
    Shapes((1, 3, 3, 4), (2, 3, 5, 4), (2, 3, 5, 6), (2, 1, 3, 5)),
    Shapes((2, 1, 3, 4), (2, 1, 5, 4), (2, 3, 5, 6)),
    Shapes((2, 6, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6), (2, 6, 3, 5), True),
    Shapes((2, 6, 3, 4), (1, 2, 5, 4), (1, 2, 5, 6), (6, 1, 5), True),
    Shapes((6, 3, 4), (2, 5, 4), (2, 5, 6), (6, 3, 5), True),
    Shapes((2, 2, 6, 3, 4), (2, 2, 3, 5, 4), (2, 2, 3, 5, 6), (2, 1, 1, 3, 5), True),
    Shapes((2, 2, 3, 3, 4), (2, 2, 3, 5, 4), (2, 2, 3, 5, 6)),
    Shapes((2, 2, 3, 3, 4), (2, 2, 3, 5, 4), (2, 2, 3, 5, 6), (2, 1, 1, 3, 5)),
    Shapes((2, 2, 3, 3, 4), (2, 2, 3, 5, 4), (2, 2, 3, 5, 6), (1, 2, 1, 1, 5)),
    Shapes((2, 2, 3, 3, 4), (2, 2, 3, 5, 4), (2, 2, 3, 5, 6), (2, 1, 3, 3, 5)),
    Shapes((2, 2, 3, 3, 4), (1, 2, 1, 5, 4), (2, 1, 1, 5, 6), (3, 3, 5)),
    Shapes((2, 2, 2, 3, 3, 4), (2, 2, 2, 3, 5, 4), (2, 2, 2, 3, 5, 6), (2, 1, 2, 1, 3, 5)),
    Shapes((2, 3, 0, 4), (2, 3, 5, 4), (2, 3, 5, 6)),
    Shapes((2, 3, 3, 4), (2, 3, 0, 4), (2, 3, 0, 6)),
    Shapes((0, 3, 3, 4), (0, 3, 5, 4), (0, 3, 5, 6)),
    Shapes((2, 0, 3, 4), (2, 0, 5, 4), (2, 0, 5, 6)),
    Shapes((2, 3, 3, 0), (2, 3, 5, 0), (2, 3, 5, 6), (3, 5)),
    Shapes((2, 3, 3, 4), (2, 3, 5, 4), (2, 3, 5, 0)),
    Shapes((1, 2, 3, 520), (1, 2, 5, 520), (1, 2, 5, 3), (3, 5)),
]


def draw(shapes: Shapes, masked: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in zip(("query", "key", "value"), shapes[:3], strict=True)
    }
    if masked == "bool":
        inputs["attn_mask"] = torch.rand(shapes.mask, generator=generator) < 0.7
    elif masked == "float":
        inputs["attn_mask"] = torch.randn(shapes.mask, generator=generator).to(dtype)
    return inputs


def run(fn: Any, inputs: dict[str, Tensor], layout: str = "contiguous", **options: Any) -> dict[str, Tensor]:
    """The output and the gradients of all floating point inputs, for one fixed gradient of the output."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    out = fn(**leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), lay_out(grad, layout))
    return {"out": out.detach()} | {f"grad_{name}": g for name, g in zip(wanted, grads, strict=True)}


def torch_math(**arguments: Any) -> Tensor:
    """Torch's composite implementation, which like its tiled ones gives 0 in fully masked rows."""
    mask = arguments.get("attn_mask")
    if arguments.get("is_causal") and mask is not None:
        causal = torch.ones(arguments["query"].shape[-2], arguments["key"].shape[-2], dtype=torch.bool).tril()
        mask = mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -torch.inf)
        arguments |= {"attn_mask": mask, "is_causal": False}
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(**arguments)


def torch_tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Dense operations that round as torch's tiled kernels do, with all batch dimensions in one."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    batch = torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))
    q, k, v = (x.expand(*batch, -1, -1).reshape(-1, 1, *x.shape[-2:]) for x in (query, key, value))
    mask = bias = None
    if attn_mask is not None:
        full = attn_mask.expand(*batch, q.shape[2], k.shape[2]).reshape(-1, 1, q.shape[2], k.shape[2])
        mask, bias = (full, None) if full.dtype == torch.bool else (None, full)
    out, _ = torch_tiled_attention(q, k, v, mask, bias, scale=scale, is_causal=is_causal)
    return out.reshape(*batch, *out.shape[2:])


def assert_together_within_budget(
    actual: dict[str, Tensor], exact: dict[str, Tensor], torchs: list[dict[str, Tensor]]
) -> None:
    """One budget for all results, which are of one magnitude: each has too few elements to judge its rounding."""
    for name, x in actual.items():
        assert x.shape == exact[name].shape, name
    as_one = [torch.cat([results[name].flatten() for name in actual]) for results in (actual, exact, *torchs)]
    assert_within_budget(as_one[0], as_one[1], as_one[2:])


def check(inputs: dict[str, Tensor], layout: str = "contiguous", **options: Any) -> None:
    dtype = inputs["query"].dtype
    lower = torch.float32 if dtype == torch.float64 else dtype
    actual = run(scaled_dot_product_attention, inputs, layout, **options)
    exact = run(torch_math, {name: cast(x, torch.float64) for name, x in inputs.items()}, layout, **options)
    copies = {name: cast(x, lower) for name, x in inputs.items()}
    torchs = [run(torch_math, copies, layout, **options)]
    if all(x.numel() > 0 for x in inputs.values()):
        torchs += [run(torch_tiled, x, layout, **options) for x in ([copies, inputs] if dtype != lower else [copies])]
    for name, value in actual.items():
        of = inputs["query"] if name == "out" else inputs[name.removeprefix("grad_")]
        assert value.dtype == of.dtype
    assert_together_within_budget(actual, exact, torchs)


FORMS = [
    (shapes, masked) for shapes in SHAPES for masked in ("none", "bool", "float") if masked == "none" or shapes.mask
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("shapes", "masked"), FORMS, ids=str)
def test_forms_match_torch_in_float64(shapes: Shapes, masked: str, is_causal: bool) -> None:
    with seqkernels.use_backend("reference"):
        check(draw(shapes, masked, torch.float64), is_causal=is_causal, enable_gqa=shapes.gqa)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", ["bool", "float"])
@pytest.mark.parametrize("shapes", [SHAPES[0], SHAPES[8], SHAPES[9], SHAPES[13], SHAPES[20]], ids=str)
def test_implementations_match_torch(shapes: Shapes, masked: str, is_causal: bool, plain_runner: object) -> None:
    check(draw(shapes, masked, torch.float64), is_causal=is_causal, enable_gqa=shapes.gqa)


@pytest.mark.parametrize("masked", ["none", "bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_within_budget(dtype: torch.dtype, masked: str) -> None:
    shapes = Shapes((2, 4, 33, 24), (2, 2, 65, 24), (2, 2, 65, 40), (2, 1, 33, 65), True)
    with seqkernels.use_backend("reference"):
        check(draw(shapes, masked, dtype), enable_gqa=True, scale=0.3)


# Dynamo itself instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_mask_keeps_its_precision_with_16_bit_inputs(dtype: torch.dtype, plain_runner: object) -> None:
    inputs = draw(Shapes((2, 2, 9, 8), (2, 2, 17, 8), (2, 2, 17, 8), (9, 17)), "float", torch.float32)
    inputs = {name: x if name == "attn_mask" else x.to(dtype) for name, x in inputs.items()}
    inputs["attn_mask"] *= 20

    def float32(**arguments: Any) -> Tensor:
        parts = {name: x.float() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        return torch_math(**parts).to(dtype)

    torch._dynamo.reset()
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    exact = run(torch_math, {name: cast(x, torch.float64) for name, x in inputs.items()})
    own = [run(float32, inputs), run(torch_tiled, inputs)]
    for fn in (scaled_dot_product_attention, compiled):
        for name, value in run(fn, inputs).items():
            assert value.dtype == (torch.float32 if name == "grad_attn_mask" else dtype)
            assert_within_budget(value, exact[name], [results[name] for results in own], name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", ["bool", "float"])
@pytest.mark.parametrize("shapes", [SHAPES[6], SHAPES[20]], ids=str)
def test_any_layout(shapes: Shapes, masked: str, layout: str, plain_runner: object) -> None:
    inputs = {name: lay_out(x, layout) for name, x in draw(shapes, masked, torch.float64).items()}
    check(inputs, layout)


@given(
    batch=st.lists(st.integers(1, 3), max_size=3),
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    ones=st.lists(st.booleans(), min_size=5, max_size=5),
    masked=st.sampled_from(["none", "bool", "float"]),
    is_causal=st.booleans(),
)
def test_any_shape(
    batch: list[int],
    lengths: tuple[int, int],
    sizes: tuple[int, int],
    ones: list[bool],
    masked: str,
    is_causal: bool,
) -> None:
    (queries, keys), (size, value_size) = lengths, sizes
    full = (*batch, queries, keys)
    mask = tuple(1 if one else n for one, n in zip(ones, full, strict=False))
    shapes = Shapes((*batch, queries, size), (*batch, keys, size), (*batch, keys, value_size), mask)
    with seqkernels.use_backend("reference"):
        check(draw(shapes, masked, torch.float64), is_causal=is_causal)


@pytest.mark.parametrize(("dropout_p", "name"), DROPOUTS)
@pytest.mark.parametrize("masked", ["bool", "float", "causal"])
def test_masked_rows_and_nan_behind_masks(masked: str, dropout_p: float, name: str) -> None:
    torch.manual_seed(0)
    query, keys, value = torch.randn(3, 2, 2, 6, 4, dtype=torch.float64)
    keep = torch.rand(2, 1, 6, 6) < 0.7
    keep[..., 4:] = False
    keep[:, :, 2] = False
    if masked == "causal":
        keep = torch.ones(6, 6, dtype=torch.bool).tril()
        keep[0] = False
        query, keep = query[:, :, :4], keep[:4]
    mask = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf) if masked == "float" else keep
    options = {"dropout_p": dropout_p, "is_causal": masked == "causal"}

    def results(fill: float) -> dict[str, Tensor]:
        torch.manual_seed(1)
        inputs = {"query": query, "key": keys.clone(), "value": value.clone(), "attn_mask": mask}
        inputs["key"][:, :, 4:], inputs["value"][:, :, 4:] = fill, -fill
        with seqkernels.use_backend(name), poisoned_empty():
            return run(scaled_dot_product_attention, inputs, **options)

    clean = results(0.0)
    dead = ~keep.any(-1).expand(2, 2, -1)
    assert dead.any()
    assert not clean["out"][dead].any()
    assert not clean["grad_query"][dead].any()
    assert not clean["grad_key"][:, :, 4:].any()
    for fill in (torch.nan, torch.inf):
        for key, x in results(fill).items():
            assert x.equal(clean[key]), key


def test_nan_in_keys_that_are_read_shows() -> None:
    query, key, value = torch.randn(3, 1, 1, 4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    for bad in (key, value):
        bad[0, 0, 2] = torch.nan
        for dropout_p in (0.0, 0.1):
            with seqkernels.use_backend("reference"):
                out = scaled_dot_product_attention(query, key, value, mask, dropout_p)
            assert out.isnan().any(-1).flatten().tolist() == [False, False, True, True]
        bad[0, 0, 2] = 0


@pytest.mark.parametrize(("dropout_p", "name"), DROPOUTS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_second_derivative(is_causal: bool, dropout_p: float, name: str) -> None:
    inputs = draw(Shapes((1, 2, 2, 2), (1, 1, 3, 2), (1, 1, 3, 2), (2, 3)), "float", torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def fn(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return scaled_dot_product_attention(*tensors, dropout_p, is_causal)

    with seqkernels.use_backend(name):
        torch.autograd.gradcheck(fn, leaves)
        torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_one_tensor_as_several_inputs(create_graph: bool, plain_runner: object) -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

    def of(fn: Any, dtype: torch.dtype) -> Tensor:
        leaf = x.to(dtype).requires_grad_()
        out = fn(query=leaf, key=leaf, value=leaf) + fn(query=leaf, key=2 * leaf, value=leaf)
        return torch.autograd.grad(out.square().sum(), leaf, create_graph=create_graph)[0]

    own = [of(torch_math, torch.float32), of(torch_tiled, torch.float32), of(torch_tiled, torch.float64)]
    assert_within_budget(of(scaled_dot_product_attention, torch.float64), of(torch_math, torch.float64), own)


def test_only_the_mask_needs_a_gradient(plain_runner: object) -> None:
    query, key, value = torch.randn(3, 2, 2, 3, 4, dtype=torch.float64)
    mask = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda mask: scaled_dot_product_attention(query, key, value, mask), mask)


@pytest.mark.parametrize("masked", ["none", "bool", "float"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lowered", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_dtype(lowered: torch.dtype, dropout_p: float, masked: str) -> None:
    inputs = draw(SHAPES[6], masked, torch.float32)
    with seqkernels.use_backend("reference"), torch.autocast("cpu", lowered):
        out = scaled_dot_product_attention(**inputs, dropout_p=dropout_p)
        assert out.dtype == lowered
        expected = F.scaled_dot_product_attention(**inputs)
        if dropout_p == 0:
            exact = torch_math(**{name: cast(x.to(lowered), torch.float64) for name, x in inputs.items()})
            assert_within_budget(out, exact, expected)
        double = {name: cast(x, torch.float64) for name, x in inputs.items()}
        assert scaled_dot_product_attention(**double, dropout_p=dropout_p).dtype == torch.float64


# Dynamo itself instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("shapes", "masked", "dropout_p", "dynamic"),
    [(20, "float", 0.0, False), (13, "bool", 0.3, False), (7, "float", 0.0, True)],
)
def test_compiles_to_one_graph(shapes: int, masked: str, dropout_p: float, dynamic: bool) -> None:
    inputs = draw(SHAPES[shapes], masked, torch.float64)
    options = {"is_causal": True, "enable_gqa": SHAPES[shapes].gqa, "dropout_p": dropout_p}
    torch._dynamo.reset()
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with seqkernels.use_backend("reference"):
        torch.manual_seed(0)
        expected = run(scaled_dot_product_attention, inputs, **options)
        torch.manual_seed(0)
        actual = run(compiled, inputs, **options)
    assert_together_within_budget(actual, expected, [{name: x.float() for name, x in expected.items()}])


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("variant", ["upper_left", "lower_right"])
@pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")
def test_causal_bias(variant: str, sizes: tuple[int, int]) -> None:
    from torch.nn.attention import bias

    causal = getattr(bias, f"causal_{variant}")(*sizes)
    query, key, value = torch.randn(2, sizes[0], 8), torch.randn(2, sizes[1], 8), torch.randn(2, sizes[1], 8)
    diagonal = 0 if variant == "upper_left" else sizes[1] - sizes[0]
    mask = torch.ones(sizes, dtype=torch.bool).tril(diagonal)
    with seqkernels.use_backend("reference"):
        actual = scaled_dot_product_attention(query, key, value, causal)
        assert actual.equal(scaled_dot_product_attention(query, key, value, mask))
        with pytest.raises(ValueError, match="CausalBias"):
            scaled_dot_product_attention(query, key, value, causal, is_causal=True)
        (entry,) = seqkernels.explain(scaled_dot_product_attention, query, key, value, causal).entries
        aligned = ("bottom_right",) if variant == "lower_right" and sizes[0] != sizes[1] else ()
        assert entry.call.features == (*aligned, "causal")
        if aligned:
            with pytest.raises(RuntimeError, match=r"attn_mask: .* CausalBias of \(.*\) queries and keys, got"):
                scaled_dot_product_attention(query, key[:, 1:], value[:, 1:], causal)


def test_masks_and_heads_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor | None] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        seen[:] = q, k, v, scores.mask, scores.bias
        return torch.empty(0), torch.empty(0)

    monkeypatch.setattr("seqkernels._attention.fused_attention", spy)
    query, key, value = torch.randn(4, 8, 3, 16), torch.randn(4, 2, 5, 16), torch.randn(4, 2, 5, 16)
    mask = torch.ones(4, 1, 1, 5, dtype=torch.bool)
    scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    assert seen[4] is None
    for x, y in zip(seen, (query, key, value, mask), strict=False):
        assert (x.data_ptr(), x.shape, x.stride()) == (y.data_ptr(), y.shape, y.stride())
    bias = torch.randn(3, 5)
    scaled_dot_product_attention(query, key[:, :1], value[:, :1], bias)
    assert [x.data_ptr() for x in (seen[1], seen[2], seen[4])] == [x.data_ptr() for x in (key, value, bias)]
    assert seen[1].shape == (4, 1, 5, 16)
    assert seen[4].shape == (1, 1, 3, 5)


@pytest.mark.parametrize("chosen", ["native", "reference"])
def test_float32_mask_of_16_bit_inputs_goes_to_a_kernel_as_it_is(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, seen = [], []

    def choice(call: backends.Call) -> str:
        calls.append(call)
        return chosen

    def spy(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        seen[:] = q, k, v, scores.bias
        return q, q

    monkeypatch.setattr("seqkernels.backends.choice", choice)
    monkeypatch.setattr("seqkernels._attention.fused_attention", spy)
    inputs = torch.randn(3, 1, 2, 4, 8).to(torch.bfloat16)
    mask = torch.randn(4, 4)
    assert scaled_dot_product_attention(*inputs, mask).dtype == torch.bfloat16
    assert calls[0].dtype == torch.bfloat16
    assert calls[0].features == ("bias32",)
    assert seen[3].data_ptr() == mask.data_ptr()
    assert {x.dtype for x in seen[:3]} == {torch.bfloat16 if chosen == "native" else torch.float32}


def test_explain_tells_what_is_not_fused() -> None:
    query, key, value = torch.randn(3, 2, 2, 3, 4)
    with seqkernels.use_backend("reference"):
        fused = seqkernels.explain(scaled_dot_product_attention, query, key, value)
        dropping = seqkernels.explain(scaled_dot_product_attention, query, key, value, dropout_p=0.5)
    assert fused.entries[0].call.op == "attention"
    assert "with dropout -> reference" in str(dropping)
    assert "not fused" not in str(dropping)
    wide = torch.randn(1, 1, 2, 600)
    assert "600" in str(seqkernels.explain(scaled_dot_product_attention, wide, wide, wide))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_torchs() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    heads = nested.unflatten(-1, (2, 4)).transpose(1, 2)
    actual = scaled_dot_product_attention(heads, heads, heads)
    for x, y in zip(actual.unbind(), F.scaled_dot_product_attention(heads, heads, heads).unbind(), strict=True):
        assert x.equal(y)


GOOD = {"query": torch.randn(2, 4, 3, 8), "key": torch.randn(2, 4, 5, 8), "value": torch.randn(2, 4, 5, 6)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": 1.0}, TypeError, "query: expected a Tensor, got float"),
        ({"attn_mask": [True]}, TypeError, "attn_mask: expected a Tensor or None, got list"),
        ({"query": torch.randn(8)}, RuntimeError, "at least 2 dimensional, but got query.dim: 1"),
        ({"key": torch.randn(2, 4, 5, 8).double()}, RuntimeError, "same dtype.* key.dtype: torch.float64"),
        ({name: x.int() for name, x in GOOD.items()}, RuntimeError, "query: .*int32"),
        ({"value": torch.randn(2, 4, 5, 6, device="meta")}, RuntimeError, "value.device: meta"),
        ({"key": torch.randn(2, 4, 5, 7)}, RuntimeError, r"key: .* 8 as in query, got \(2, 4, 5, 7\)"),
        ({"value": torch.randn(2, 4, 6, 6)}, RuntimeError, r"value: expected length 5 .* got \(2, 4, 6, 6\)"),
        ({"key": torch.randn(3, 4, 5, 8)}, RuntimeError, "key: batch dimensions"),
        ({"value": torch.randn(2, 3, 5, 6)}, RuntimeError, "value: batch dimensions"),
        ({"key": torch.randn(2, 2, 5, 8), "value": torch.randn(2, 2, 5, 6)}, RuntimeError, "key: batch dimensions"),
        ({"key": torch.randn(2, 3, 5, 8), "value": torch.randn(2, 3, 5, 6), "enable_gqa": True}, RuntimeError, "heads"),
        ({"key": torch.randn(2, 2, 5, 8), "enable_gqa": True}, RuntimeError, "enable_gqa: .* 2, 4 and 4"),
        ({"key": torch.randn(5, 8), "value": torch.randn(5, 6), "enable_gqa": True}, RuntimeError, "enable_gqa"),
        ({"attn_mask": torch.ones(3, 5, dtype=torch.int32)}, RuntimeError, "attn_mask.dtype: torch.int32"),
        ({"attn_mask": torch.ones(3, 5).double()}, RuntimeError, "attn_mask.dtype: torch.float64"),
        ({"attn_mask": torch.ones(3, 6)}, RuntimeError, r"attn_mask: .*\(2, 4, 3, 5\), got \(3, 6\)"),
        ({"attn_mask": torch.ones(1, 1, 1, 3, 5)}, RuntimeError, "attn_mask: expected a shape"),
        ({"attn_mask": torch.ones(3, 5, device="meta")}, RuntimeError, "attn_mask: expected on cpu"),
        ({"dropout_p": 1.5}, RuntimeError, "dropout_p: .* between 0 and 1, but got 1.5"),
        ({"dropout_p": -0.5}, RuntimeError, "dropout_p"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**(GOOD | changes))


def test_scale_is_for_keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        scaled_dot_product_attention(*GOOD.values(), None, 0.0, False, 1.0)


def test_the_choice_is_a_constant_of_a_compiled_graph():
    """torch's decorator has an effect that ours repeats, without its import."""
    from seqkernels import _attention

    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked).items() <= vars(_attention._is_fused).items()
