"""``MultiheadAttention`` against torch's over the product of its options."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqkernels
from seqkernels import backends
from seqkernels.nn import MultiheadAttention
from seqkernels.testing import LAYOUTS, assert_within_budget, lay_out, poisoned_empty

BATCH, QUERIES, KEYS, SIZE, HEADS = 2, 4, 5, 12, 3
KINDS = ("self", "memory", "distinct", "sizes")
FORMS = ("batch_first", "sequence_first", "unbatched")
FLAGS = [
    dict(zip(("bias", "add_bias_kv", "add_zero_attn"), flags, strict=True))
    for flags in itertools.product((True, False), repeat=3)
]
MASKS = list(itertools.product((None, "bool", "float"), (None, "bool", "float"), (2, 3)))

WITH_WEIGHTS = backends.Call("attention", "cpu", torch.float64, "", ("weights",))
PLAIN = backends.Call("attention", "cpu", torch.float32)
#: Whether weights are asked for, and an implementation that can.
RUNS = [
    (need_weights, name)
    for need_weights in (False, True)
    for name in backends.NAMES
    if backends.why_not(name, WITH_WEIGHTS if need_weights else PLAIN) is None
]

# Some pairs of masks mix types, of which torch warns, and so do we.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def reference() -> Iterator[None]:
    """For what does not depend on the implementation of the op."""
    with seqkernels.use_backend("reference"):
        yield


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[1]}-{'weights' if run[0] else 'none'}")
def need_weights_runner(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether to ask for weights, of one implementation; fresh memory holds NaN."""
    with seqkernels.use_backend(request.param[1]), poisoned_empty():
        yield request.param[0]


def layers(form: str = "batch_first", kind: str = "self", **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Torch's layer with random biases, and ours with its ``state_dict``."""
    sizes = {"kdim": 7, "vdim": 9} if kind == "sizes" else {}
    arguments = {"batch_first": form == "batch_first"} | sizes | options
    theirs = torch.nn.MultiheadAttention(SIZE, HEADS, **arguments)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "bias" in name:
                parameter.normal_()
    ours = MultiheadAttention(SIZE, HEADS, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def draw(form: str, kind: str, queries: int = QUERIES) -> list[Tensor]:
    """The distinct tensors among query, key and value."""

    def one(length: int, size: int) -> Tensor:
        shapes = {"batch_first": (BATCH, length, size), "sequence_first": (length, BATCH, size)}
        return torch.randn(shapes.get(form, (length, size)))

    if kind == "self":
        return [one(KEYS, SIZE)]
    if kind == "memory":
        return [one(queries, SIZE), one(KEYS, SIZE)]
    return [one(queries, SIZE), one(KEYS, 7 if kind == "sizes" else SIZE), one(KEYS, 9 if kind == "sizes" else SIZE)]


def draw_masks(form: str, padding: str | None, attn: str | None, dims: int, queries: int) -> dict[str, Tensor]:
    """Masks that leave every query the first key."""
    rows = () if form == "unbatched" else (BATCH,)
    heads = HEADS * (1 if form == "unbatched" else BATCH)
    shapes = {
        "key_padding_mask": (padding, (*rows, KEYS)),
        "attn_mask": (attn, (queries, KEYS) if dims == 2 else (heads, queries, KEYS)),
    }
    masks = {}
    for name, (kind, shape) in shapes.items():
        if kind == "bool":
            masks[name] = torch.rand(shape) < 0.4
            masks[name][..., 0] = False
        elif kind == "float":
            masks[name] = torch.randn(shape)
            masks[name][..., 1:].masked_fill_(torch.rand(*shape[:-1], KEYS - 1) < 0.3, -torch.inf)
    return masks


def run(
    layer: torch.nn.Module,
    inputs: list[Tensor],
    masks: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    seed: int | None = None,
    layout: str = "contiguous",
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs and gradients of all inputs, float masks and parameters, in `dtype`."""
    layer = copy.deepcopy(layer).to(dtype)
    leaves = [lay_out(x.to(dtype), layout).detach().requires_grad_() for x in inputs]
    floats = {name: x.to(dtype).requires_grad_() for name, x in masks.items() if x.is_floating_point()}
    if seed is not None:
        torch.manual_seed(seed)
    query, key, value = (leaves[min(i, len(leaves) - 1)] for i in range(3))
    out, weights = layer(query, key, value, **(masks | floats), **options)
    results = {"out": out} | ({} if weights is None else {"weights": weights})
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in results.values()]
    wanted = {f"input {i}": x for i, x in enumerate(leaves)} | floats | dict(layer.named_parameters())
    # With the hint, torch does not read the mask.
    found = torch.autograd.grad(
        list(results.values()), list(wanted.values()), grads, allow_unused=True, materialize_grads=True
    )
    return {name: x.detach() for name, x in results.items()} | {
        f"grad of {name}": x for name, x in zip(wanted, found, strict=True)
    }


def assert_parity(ours: dict[str, Tensor], exact: dict[str, Tensor], theirs: list[dict[str, Tensor]]) -> None:
    """One budget for all results: most have too few elements to judge their rounding alone."""
    assert ours.keys() == exact.keys()
    for name, x in ours.items():
        assert x.shape == exact[name].shape, name
    as_one = [torch.cat([results[name].flatten() for name in ours]) for results in (ours, exact, *theirs)]
    assert_within_budget(as_one[0], as_one[1], as_one[2:])


@contextlib.contextmanager
def softmax_of_tiles() -> Iterator[None]:
    """Torch's layer with weights from the log-sum-exp of their rows, as tiled kernels have them and round them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "softmax", lambda x, dim: (x - x.logsumexp(dim, keepdim=True)).exp())
        yield


def check(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    inputs: list[Tensor],
    masks: dict[str, Tensor],
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> None:
    lower = torch.float32 if dtype == torch.float64 else dtype
    inputs = [x.to(lower).float() for x in inputs]
    rounded = copy.deepcopy(theirs).to(lower).float()
    masks = {name: x.to(lower).float() if x.is_floating_point() else x for name, x in masks.items()}
    actual = run(ours, inputs, masks, dtype, **options)
    exact = run(rounded, inputs, masks, torch.float64, **options)
    own = [run(theirs, inputs, masks, lower, **options)]
    if options.get("need_weights", True):
        with softmax_of_tiles():
            own.append(run(theirs, inputs, masks, lower, **options))
    assert_parity(actual, exact, own)


@pytest.mark.parametrize("weights", [None, "average", "heads"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("reference")
def test_options_match_torch_in_float64(kind: str, form: str, weights: str | None) -> None:
    queries = KEYS if kind == "self" else QUERIES
    flags = itertools.cycle(FLAGS)
    for padding, attn, dims in MASKS:
        if attn is None and dims == 3:
            continue
        for _ in range(2):
            ours, theirs = layers(form, kind, **next(flags))
            masks = draw_masks(form, padding, attn, dims, queries)
            options = {"need_weights": weights is not None, "average_attn_weights": weights != "heads"}
            check(ours, theirs, draw(form, kind), masks, **options)
        next(flags)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", [None, "bool"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("reference")
def test_is_causal_is_a_hint(form: str, padding: str | None, need_weights: bool) -> None:
    for flags in FLAGS:
        ours, theirs = layers(form, **flags)
        masks = draw_masks(form, padding, None, 2, KEYS)
        masks["attn_mask"] = torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1)
        inputs = draw(form, "self")
        check(ours, theirs, inputs, masks, is_causal=True, need_weights=need_weights)
        masks["attn_mask"] = torch.nn.Transformer.generate_square_subsequent_mask(KEYS)
        check(ours, theirs, inputs, masks, is_causal=True, need_weights=need_weights)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_implementations_match_torch(kind: str, form: str, need_weights_runner: bool) -> None:
    queries = KEYS if kind == "self" else QUERIES
    for padding, attn in (("bool", "bool"), ("bool", "float"), (None, None)):
        ours, theirs = layers(form, kind)
        masks = draw_masks(form, padding, attn, 3, queries)
        check(ours, theirs, draw(form, kind), masks, need_weights=need_weights_runner)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("reference")
def test_dtypes_are_within_budget(dtype: torch.dtype, need_weights: bool) -> None:
    for kind, form, padding, attn in (
        ("self", "batch_first", "bool", "bool"),
        ("memory", "sequence_first", "float", "float"),
        ("sizes", "unbatched", None, "float"),
    ):
        ours, theirs = layers(form, kind, add_bias_kv=True)
        masks = draw_masks(form, padding, attn, 2, KEYS if kind == "self" else QUERIES)
        check(ours, theirs, draw(form, kind), masks, dtype, need_weights=need_weights)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("reference")
def test_any_layout(form: str, layout: str) -> None:
    ours, theirs = layers(form, "distinct")
    masks = draw_masks(form, "bool", "float", 3, QUERIES)
    for need_weights in (False, True):
        check(ours, theirs, draw(form, "distinct"), masks, layout=layout, need_weights=need_weights)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1)])
def test_empty_and_single(sizes: tuple[int, int, int], need_weights_runner: bool) -> None:
    batch, queries, keys = sizes
    ours, theirs = layers("batch_first", "memory")
    inputs = [torch.randn(batch, queries, SIZE), torch.randn(batch, keys, SIZE)]
    check(ours, theirs, inputs, {}, need_weights=need_weights_runner)


@pytest.mark.parametrize("form", ["batch_first", "sequence_first"])
@pytest.mark.usefixtures("reference")
def test_fast_path_of_torch_gives_the_same(form: str) -> None:
    arguments = {"batch_first": form == "batch_first", "dtype": torch.float64}
    theirs = torch.nn.MultiheadAttention(SIZE, 2, **arguments).eval()
    ours = MultiheadAttention(SIZE, 2, **arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    x = draw(form, "self")[0].double()
    padding = draw_masks(form, "bool", None, 2, KEYS)["key_padding_mask"]
    for options in ({}, {"average_attn_weights": False}, {"key_padding_mask": padding}):
        with torch.no_grad():
            expected, actual = (layer(x, x, x, **options) for layer in (theirs, ours))
            single = copy.deepcopy(theirs).float()(*[x.float()] * 3, **options)
            with softmax_of_tiles():
                tiled = copy.deepcopy(theirs).float().train()(*[x.float()] * 3, **options)
        for a, b, *own in zip(actual, expected, single, tiled, strict=True):
            assert_within_budget(a, b, own)


@pytest.mark.parametrize("kind", ["bool", "float", "padding"])
@pytest.mark.parametrize("form", FORMS)
def test_masked_rows_give_zero(form: str, kind: str, need_weights_runner: bool) -> None:
    ours = layers(form, "memory")[0].double()
    query, memory = (x.double().requires_grad_() for x in draw(form, "memory"))
    if kind == "padding":
        masks = draw_masks(form, "bool", None, 2, QUERIES)
        masks["key_padding_mask"][..., :] = True
    else:
        masks = draw_masks(form, None, kind, 2, QUERIES)
        masks["attn_mask"] = masks["attn_mask"].double() if kind == "float" else masks["attn_mask"]
        masks["attn_mask"][1] = -torch.inf if kind == "float" else True
    out, weights = ours(query, memory, memory, **masks, need_weights=need_weights_runner)
    dead = slice(None) if kind == "padding" else 1
    rows = out if form == "unbatched" else out.transpose(0, 1) if form == "batch_first" else out
    assert rows[dead].eq(ours.out_proj.bias).all()
    if weights is not None:
        assert not weights[..., dead, :].any()
    out.square().sum().backward()
    of_query = query.grad if form != "batch_first" else query.grad.transpose(0, 1)
    assert not of_query[dead].any()
    for name, x in (("memory", memory), *ours.named_parameters()):
        assert x.grad.isfinite().all(), name
    assert bool(ours.in_proj_weight.grad.any()) == (kind != "padding")


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_nan_in_padded_keys_does_not_reach_the_output(kind: str, need_weights_runner: bool) -> None:
    ours, _ = layers("batch_first", "memory")
    query, memory = draw("batch_first", "memory")
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, 3:] = padding[1, 1:] = True
    mask = padding if kind == "bool" else torch.zeros(BATCH, KEYS).masked_fill(padding, -torch.inf)
    clean = ours(query, memory, memory, mask, need_weights_runner)
    memory[padding] = torch.nan
    for actual, expected in zip(ours(query, memory, memory, mask, need_weights_runner), clean, strict=True):
        assert actual is expected or actual.equal(expected)


def test_second_derivative(need_weights_runner: bool) -> None:
    layer = MultiheadAttention(4, 2, add_zero_attn=True, dtype=torch.float64)
    query, memory = torch.randn(2, 1, 4, dtype=torch.float64), torch.randn(3, 1, 4, dtype=torch.float64)
    mask = torch.randn(2, 3, dtype=torch.float64)
    mask[0] = -torch.inf

    def fn(query: Tensor, memory: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        results = torch.func.functional_call(
            layer,
            {"in_proj_weight": weight},
            (query, memory, memory),
            {"attn_mask": mask, "need_weights": need_weights_runner},
        )
        return tuple(x for x in results if x is not None)

    leaves = [x.detach().requires_grad_() for x in (query, memory, layer.in_proj_weight)]
    torch.autograd.gradcheck(fn, leaves)
    torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("reference")
def test_autocast_dtype(dtype: torch.dtype, need_weights: bool) -> None:
    ours, theirs = layers()
    x = draw("batch_first", "self")[0]
    mask = torch.randn(KEYS, KEYS)
    exact = copy.deepcopy(theirs).double()(x.double(), x.double(), x.double(), attn_mask=mask.double())
    with torch.autocast("cpu", dtype):
        actual = ours(x, x, x, attn_mask=mask, need_weights=need_weights)
        expected = theirs(x, x, x, attn_mask=mask, need_weights=need_weights)
    for a, b, c in zip(actual, expected, exact, strict=True):
        if a is None:
            assert b is None
            continue
        assert a.dtype == b.dtype == dtype
        assert_within_budget(a, c, b)
    actual[0].sum().backward()
    assert ours.in_proj_weight.grad.dtype == torch.float32


# Dynamo itself instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("form", "need_weights"), [("batch_first", False), ("sequence_first", True)])
@pytest.mark.usefixtures("reference")
def test_compiles_to_one_graph(form: str, need_weights: bool) -> None:
    torch._dynamo.reset()
    ours = layers(form, "memory")[0].double()
    query, memory = (x.double() for x in draw(form, "memory"))
    masks = draw_masks(form, "bool", "bool", 2, QUERIES)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")

    def results(layer: Any) -> dict[str, Tensor]:
        out, _ = layer(query, memory, memory, **masks, need_weights=need_weights)
        return {"out": out.detach()} | dict(
            zip(
                ("in", "out_proj"),
                torch.autograd.grad(out.sum(), [ours.in_proj_weight, ours.out_proj.weight]),
                strict=True,
            )
        )

    expected = results(ours)
    assert_parity(results(compiled), expected, [{name: x.float() for name, x in expected.items()}])


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("kind", ["self", "sizes"])
def test_is_torchs_layer_but_for_forward(kind: str, flags: dict[str, bool]) -> None:
    sizes = {"kdim": 7, "vdim": 9} if kind == "sizes" else {}
    ours, theirs = (
        cls(SIZE, HEADS, 0.1, **flags, **sizes) for cls in (MultiheadAttention, torch.nn.MultiheadAttention)
    )
    assert isinstance(ours, torch.nn.MultiheadAttention)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    for state, other in ((ours.state_dict(), theirs), (theirs.state_dict(), ours)):
        other.load_state_dict(state)
        assert [*state] == [*other.state_dict()]
    torch.manual_seed(3)
    drawn = MultiheadAttention(SIZE, HEADS, **flags, **sizes).state_dict()
    torch.manual_seed(3)
    for name, x in torch.nn.MultiheadAttention(SIZE, HEADS, **flags, **sizes).state_dict().items():
        assert x.equal(drawn[name]), name


@pytest.mark.usefixtures("reference")
def test_serves_torchs_transformer_layers() -> None:
    theirs = torch.nn.TransformerDecoderLayer(SIZE, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    for name in ("self_attn", "multihead_attn"):
        layer = MultiheadAttention(SIZE, HEADS, batch_first=True, dtype=torch.float64)
        layer.load_state_dict(getattr(theirs, name).state_dict())
        setattr(ours, name, layer)
    x, memory = torch.randn(2, 4, SIZE, dtype=torch.float64), torch.randn(2, 5, SIZE, dtype=torch.float64)
    options = {
        "tgt_mask": torch.ones(4, 4, dtype=torch.bool).triu(1),
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.arange(5) > torch.tensor([[2], [4]]),
    }
    expected = theirs(x, memory, **options)
    assert_within_budget(ours(x, memory, **options), expected, expected.float())


def test_one_product_per_distinct_input_and_no_expanded_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(*tensors: Tensor | None, **options: object) -> tuple[Tensor, None]:
        seen[:] = tensors
        return torch.zeros(tensors[0].shape), None

    monkeypatch.setattr("seqkernels.nn.attention.attend", spy)
    layer = MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(3, 6, 16)
    padding, attn = torch.zeros(3, 6, dtype=torch.bool), torch.randn(6, 6)
    layer(x, x, x, padding, False, attn)
    q, k, v, mask, bias = seen
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert mask.shape == (3, 1, 1, 6)
    assert bias.shape == (1, 1, 6, 6)
    assert bias.data_ptr() == attn.data_ptr()
    layer(x, x, x, None, False, torch.randn(12, 6, 6).bool())
    assert seen[3].shape == (3, 4, 6, 6)
    memory = torch.randn(3, 5, 16)
    layer(x, memory, memory, need_weights=False)
    assert seen[1].untyped_storage().data_ptr() == seen[2].untyped_storage().data_ptr()
    assert seen[3] is seen[4] is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_served_or_refused_as_by_torch() -> None:
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    ours = MultiheadAttention(8, 2, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
        ours(x, x, x)
    with pytest.raises(ValueError, match="need_weights: 'lazy' does not serve nested tensors"):
        ours(x, x, x, need_weights="lazy")
    with torch.no_grad():
        actual, expected = (layer.eval()(x, x, x, need_weights=False)[0] for layer in (ours, theirs))
    for a, b in zip(actual.unbind(), expected.unbind(), strict=True):
        assert a.equal(b)


def bad(**changes: Any) -> dict[str, Any]:
    x = torch.randn(2, 5, SIZE)
    return {"query": x, "key": x, "value": x} | changes


X2, X3, X4 = torch.randn(5, SIZE), torch.randn(2, 5, SIZE), torch.randn(1, 2, 5, SIZE)


@pytest.mark.parametrize(
    "arguments",
    [
        bad(query=X4),
        bad(key=X2),
        bad(query=X2),
        bad(query=X2, key=X2, value=X3),
        bad(key_padding_mask=torch.zeros(5, dtype=torch.bool)),
        bad(query=X2, key=X2, value=X2, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool)),
        bad(attn_mask=torch.zeros(5, dtype=torch.bool)),
        bad(query=X2, key=X2, value=X2, attn_mask=torch.zeros(5, dtype=torch.bool)),
        bad(query=X2, key=X2, value=X2, attn_mask=torch.zeros(2, 5, 5)),
        bad(attn_mask=torch.zeros(5, 6)),
        bad(attn_mask=torch.zeros(2, 5, 5)),
        bad(key_padding_mask=torch.zeros(3, 5)),
        bad(key_padding_mask=torch.zeros(2, 6)),
        bad(query=torch.randn(2, 5, SIZE + 1)),
        bad(is_causal=True),
        bad(is_causal=True, need_weights=False),
    ],
)
def test_bad_input_gives_the_error_of_torch(arguments: dict[str, Any]) -> None:
    ours, theirs = layers()
    errors = []
    for layer in (ours, theirs):
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            layer(**arguments)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            bad(key=torch.randn(3, 5, SIZE), value=torch.randn(3, 5, SIZE)),
            RuntimeError,
            r"key: .*2 .* got .*\(3, 5, 12\)",
        ),
        (
            bad(value=torch.randn(2, 4, SIZE)),
            AssertionError,
            "key shape .*2, 5, 12.* does not match value shape .*2, 4, 12",
        ),
        (bad(key=torch.randn(2, 5, 7), value=torch.randn(2, 5, 7)), RuntimeError, "key: expected 12 features"),
        (bad(attn_mask=torch.zeros(5, 5, dtype=torch.int64)), AssertionError, "types of attn_mask are .*int64"),
        (bad(key_padding_mask=torch.zeros(2, 5).int()), AssertionError, "types of key_padding_mask are .*int32"),
        (bad(attn_mask=torch.zeros(5, 5).double()), RuntimeError, "attn_mask.dtype: torch.float64"),
        (bad(key_padding_mask=torch.zeros(2, 5).half()), RuntimeError, "key_padding_mask.dtype: torch.float16"),
    ],
)
@pytest.mark.parametrize("need_weights", [False, True])
def test_bad_input_is_named(arguments: dict[str, Any], error: Any, message: str, need_weights: bool) -> None:
    with pytest.raises(error, match=message):
        layers()[0](**arguments, need_weights=need_weights)


@pytest.mark.parametrize("arguments", [(0, 1), (8, 3), (8, 0)])
def test_constructor_gives_the_error_of_torch(arguments: tuple[int, int]) -> None:
    errors = []
    for cls in (MultiheadAttention, torch.nn.MultiheadAttention):
        with pytest.raises((AssertionError, ValueError)) as caught:
            cls(*arguments)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.filterwarnings("default:Support for mismatched:UserWarning")
@pytest.mark.usefixtures("reference")
def test_masks_of_different_types_are_warned_of() -> None:
    masks = draw_masks("batch_first", "bool", "float", 2, KEYS)
    x = draw("batch_first", "self")[0]
    with pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask is deprecated"):
        layers()[0](x, x, x, **masks)
