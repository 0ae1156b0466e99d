"""Positional encodings: their formulas, transformers' rotary embeddings, tables, gradients, errors."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from seqkernels.nn import ALiBi, LearnedEncoding, RotaryEmbedding, SinusoidalEncoding
from seqkernels.testing import LAYOUTS, assert_within_budget, lay_out

SCALINGS: dict[str | None, dict[str, Any]] = {
    None: {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0, "original_max_position": 16},
    "yarn": {"factor": 4.0, "original_max_position": 16},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def frequency(scaling: str | None, base: float, dim: int, pair: int, length: int) -> float:
    """The frequency of a pair, number by number, with the options of `SCALINGS`."""
    plain = base ** (-2 * pair / dim)
    options = SCALINGS[scaling]
    if scaling is None:
        return plain
    factor, trained = options["factor"], options.get("original_max_position", 0)
    if scaling == "linear":
        return plain / factor
    if scaling == "dynamic":
        if length <= trained:
            return plain
        larger = base * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))
        return larger ** (-2 * pair / dim)
    ends = [dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1)]
    low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), dim - 1)
    share = min(max((pair - low) / (high - low if high != low else 0.001), 0), 1)
    return plain / factor * share + plain * (1 - share)


def turned(x: Tensor, positions: Tensor, rope: RotaryEmbedding, length: int, dtype: torch.dtype) -> Tensor:
    """The embedding pair by pair with complex numbers, from angles in `dtype`; `positions` fit the rows of `x`."""
    out, half = x.clone(), rope.dim // 2
    gain = 0.1 * math.log(4.0) + 1 if rope.scaling == "yarn" else 1.0
    for pair in range(half):
        i, j = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + half)
        angle = positions.to(dtype) * frequency(rope.scaling, rope.base, rope.dim, pair, length)
        cos, sin = angle.cos() * gain, angle.sin() * gain
        out[..., i] = (x[..., i] * cos - x[..., j] * sin).to(x.dtype)
        out[..., j] = (x[..., j] * cos + x[..., i] * sin).to(x.dtype)
    return out


def check(found: Tensor, x: Tensor, positions: Tensor, rope: RotaryEmbedding, length: int) -> None:
    exact = turned(x.double(), positions, rope, length, torch.float64)
    own = torch.float32 if x.dtype in (torch.float64, torch.float32) else x.dtype
    baseline = turned(x.to(own), positions, rope, length, torch.float32)
    assert found.dtype == x.dtype
    assert_within_budget(found, exact, baseline)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_formula(scaling: str | None, interleaved: bool, dtype: torch.dtype) -> None:
    rope = RotaryEmbedding(8, interleaved=interleaved, scaling=scaling, **SCALINGS[scaling])
    generator = torch.Generator().manual_seed(0)
    for length, offset, size in ((5, 0, 8), (12, 9, 12), (0, 3, 8), (70, 0, 9), (1, 30, 8)):
        q = torch.randn(2, 3, length, size, generator=generator).to(dtype)
        k = torch.randn(2, 1, length, size, generator=generator).to(dtype)
        positions = torch.arange(offset, offset + length)
        for x, found in zip((q, k), rope(q, k, offset=offset), strict=True):
            check(found, x, positions, rope, offset + length)
            assert torch.equal(found[..., 8:], x[..., 8:])
        assert torch.equal(rope(q, offset=offset), rope(q, positions=positions))


@hypothesis.given(
    dim=st.integers(1, 20).map(lambda n: 2 * n),
    extra=st.integers(0, 3),
    batch=st.lists(st.integers(0, 3), max_size=3),
    length=st.integers(0, 9),
    interleaved=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    base=st.sampled_from([100.0, 10000.0, 5e5]),
)
def test_rotary_shapes(
    dim: int, extra: int, batch: list[int], length: int, interleaved: bool, layout: str, base: float
) -> None:
    rope = RotaryEmbedding(dim, base, interleaved)
    x = torch.randn(*batch, length, dim + extra, generator=torch.Generator().manual_seed(0))
    x = lay_out(x, layout) if x.numel() else x
    check(rope(x), x, torch.arange(length), rope, length)


def test_rotary_positions_of_batch_entries() -> None:
    rope = RotaryEmbedding(6, scaling="dynamic", **SCALINGS["dynamic"])
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    for positions in (
        torch.tensor([[0, 1, 2, 3], [9, 8, 20, 20]]),
        torch.tensor([[5, 6, 7, 100]], dtype=torch.int32),
        torch.randint(0, 40, (2, 3, 4), generator=torch.Generator().manual_seed(1)),
    ):
        rows = positions.unsqueeze(1) if positions.dim() == 2 else positions
        check(rope(x, positions=positions), x, rows, rope, int(positions.max()) + 1)


def test_rotary_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, k = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 40, 16)
    positions = torch.arange(40)
    more = {"yarn": {"original_max_position_embeddings": 16}}
    for scaling, options in SCALINGS.items():
        rope = RotaryEmbedding(16, 10000.0, scaling=scaling, **options)
        parameters = {"rope_type": scaling or "default", "rope_theta": 10000.0, **more.get(scaling or "", {})}
        if scaling:
            parameters["factor"] = options["factor"]
        config = transformers.LlamaConfig(
            hidden_size=64, num_attention_heads=4, max_position_embeddings=16, rope_parameters=parameters
        )
        theirs = LlamaRotaryEmbedding(config)
        cos, sin = theirs(q, positions[None])
        for x, found, expected in zip((q, k), rope(q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            assert_within_budget(found, turned(x.double(), positions, rope, 40, torch.float64), expected, str(scaling))
        for found, expected in zip(rope.tables(40), (cos, sin), strict=True):
            exact = [turned(x.double(), positions, rope, 40, torch.float64) for x in unit_pairs()]
            assert_within_budget(found, exact[0 if expected is cos else 1][:, :8], expected[0, :, :8], str(scaling))


def unit_pairs() -> tuple[Tensor, Tensor]:
    """Vectors that a rotation turns into its cosines and sines."""
    ones, zeros = torch.ones(40, 8), torch.zeros(40, 8)
    return torch.cat((ones, zeros), -1), torch.cat((zeros, -ones), -1)


def test_rotary_keeps_distances_and_lengths() -> None:
    rope = RotaryEmbedding(32).double()
    x = torch.randn(2, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    products = [(rope(x[0], offset=i) @ rope(x[1], offset=i + 7).mT).item() for i in (0, 3, 1000)]
    assert max(products) - min(products) < 1e-12 * x.norm().item() ** 2


def test_far_positions_are_exact() -> None:
    rope = RotaryEmbedding(4)
    x = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    for position in (10**5, 10**6 + 1):
        exact = torch.tensor([[math.cos(position), math.cos(position / 100), math.sin(position)]], dtype=torch.float64)
        for found in (rope(x, offset=position), rope(x, positions=torch.tensor([position]))):
            assert torch.equal(found[:, :3], exact.float())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", [None, "yarn"])
def test_rotary_gradients(scaling: str | None, interleaved: bool) -> None:
    rope = RotaryEmbedding(4, interleaved=interleaved, scaling=scaling, **SCALINGS[scaling])
    q = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, offset=2), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: rope(q, k, offset=2), (q, k))


def test_tables_grow_are_kept_and_are_no_state() -> None:
    rope = RotaryEmbedding(4)
    x = torch.randn(3, 4)
    with torch.inference_mode():
        rope(x)
    key = (x.device, torch.float32)
    first = rope._tables[key][0]
    rope(x.requires_grad_()).sum().backward()
    assert rope._tables[key][0] is first
    rope(torch.randn(len(first) + 1, 4))
    assert torch.equal(rope._tables[key][0][: len(first)], first)
    assert rope.half()(x.half()).dtype == torch.float16
    assert rope._tables[key][0].dtype == torch.float32
    assert not rope.state_dict()
    for twin in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert not twin._tables
        assert torch.equal(twin(x), rope(x))
    buffer = io.BytesIO()
    torch.save(rope, buffer)
    assert buffer.tell() < 4000


def test_meta_tensors_have_shapes() -> None:
    x = torch.empty(2, 3, 4, device="meta")
    for layer in (RotaryEmbedding(4), SinusoidalEncoding(4), LearnedEncoding(3, 4, device="meta")):
        assert layer(x).shape == x.shape
        assert layer(x).device.type == "meta"


COMPILED: dict[str, Callable[[], torch.nn.Module]] = {
    "rotary": lambda: RotaryEmbedding(8),
    "dynamic": lambda: RotaryEmbedding(8, scaling="dynamic", **SCALINGS["dynamic"]),
    "yarn": lambda: RotaryEmbedding(8, interleaved=True, scaling="yarn", **SCALINGS["yarn"]),
    "sinusoidal": lambda: SinusoidalEncoding(8),
    "learned": lambda: LearnedEncoding(40, 8),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compiles_without_graph_breaks(kind: str) -> None:
    torch._dynamo.reset()
    layer = COMPILED[kind]()
    function = torch.compile(lambda x, **options: layer(x, **options), fullgraph=True, backend="aot_eager")
    for length in (5, 9, 30):
        x = torch.randn(2, length, 8)
        for options in ({"offset": 3}, {"positions": torch.randint(0, length, (2, length))}):
            with torch.no_grad():
                assert torch.equal(function(x, **options), layer(x, **options))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20])
def test_alibi_slopes(heads: int) -> None:
    power = 2 ** math.floor(math.log2(heads))
    expected = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    expected += [2 ** (-8 * (2 * h + 1) / (2 * power)) for h in range(heads - power)]
    alibi = ALiBi(heads)
    assert torch.equal(alibi.slopes, torch.tensor(expected))
    assert not alibi.state_dict()
    for module in (alibi.to(torch.bfloat16), alibi.half(), alibi.double(), copy.deepcopy(alibi)):
        assert torch.equal(module.slopes, torch.tensor(expected))


def test_alibi_of_other_beginnings() -> None:
    """Built without memory, made empty, or under another default dtype: the slopes are there."""
    expected = ALiBi(6).slopes
    with torch.device("meta"):
        empty = torch.nn.Sequential(ALiBi(6))
    assert empty[0].slopes.is_meta
    assert torch.equal(empty.to_empty(device="cpu")[0].slopes, expected)
    assert torch.equal(ALiBi(6).to_empty(device="cpu").slopes, expected)
    shared = ALiBi(6)
    memory = shared.slopes
    assert shared.share_memory().slopes is memory
    forgotten = ALiBi(6, device="meta")
    forgotten.reset_parameters()
    assert torch.equal(forgotten.slopes, expected)
    default = torch.get_default_dtype()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found = ALiBi(6).double().slopes
        finally:
            torch.set_default_dtype(default)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_alibi_bias() -> None:
    alibi = ALiBi(6)
    for queries, keys in ((4, 7), (7, 4), (1, 5), (0, 3), (3, 0)):
        for bottom_right in (False, True):
            diagonal = keys - queries if bottom_right else 0
            bias = alibi.bias(queries, keys, bottom_right)
            assert bias.shape == (6, queries, keys)
            for head in range(6):
                for i in range(queries):
                    for j in range(keys):
                        assert bias[head, i, j] == -alibi.slopes[head] * abs(i + diagonal - j)


def sinusoids(x: Tensor, positions: Tensor, base: float, dtype: torch.dtype) -> Tensor:
    """`x` (..., L, dim) with the encoding of `positions` added element by element."""
    rows = torch.empty(*positions.shape, x.shape[-1], dtype=dtype)
    for i in range(x.shape[-1]):
        angle = positions.to(dtype) / base ** (2 * (i // 2) / x.shape[-1])
        rows[..., i] = angle.cos() if i % 2 else angle.sin()
    return (x + rows).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 8])
def test_sinusoidal_formula(dim: int, dtype: torch.dtype) -> None:
    layer = SinusoidalEncoding(dim)
    own = torch.float32 if dtype == torch.float64 else dtype
    for length, offset in ((5, 0), (100, 7), (0, 0)):
        x = torch.randn(2, length, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
        positions = torch.arange(offset, offset + length)
        exact = sinusoids(x.double(), positions, 10000.0, torch.float64)
        found = layer(x, offset=offset)
        assert found.dtype == dtype
        assert_within_budget(found, exact, sinusoids(x.to(own), positions, 10000.0, torch.float32))
        assert torch.equal(layer(x, positions=positions), found)
        rows = SinusoidalEncoding(dim, batch_first=False)(x.transpose(0, 1), offset=offset)
        assert torch.equal(rows.transpose(0, 1), found)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_encodings_of_given_positions(kind: str) -> None:
    layer = COMPILED[kind]()
    x = torch.randn(2, 4, 8, requires_grad=True)
    positions = torch.tensor([[0, 3, 9, 9], [5, 4, 30, 1]])
    each = torch.stack([layer(row, positions=p) for row, p in zip(x, positions, strict=True)])
    assert torch.equal(layer(x, positions=positions), each)
    one = torch.stack([layer(x[:, i : i + 1], offset=int(positions[0, i])) for i in range(4)], 1).squeeze(2)
    assert torch.equal(layer(x, positions=positions[0]), one)
    layer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_learned_encoding() -> None:
    torch.manual_seed(0)
    layer = LearnedEncoding(6, 4)
    x = torch.randn(2, 3, 4)
    assert torch.equal(layer(x, offset=2), x + layer.weight[2:5])
    rows = LearnedEncoding(6, 4, batch_first=False)
    rows.load_state_dict(layer.state_dict())
    assert torch.equal(rows(x.transpose(0, 1)).transpose(0, 1), layer(x))
    layer(x, positions=torch.tensor([[0, 0, 5], [1, 2, 0]])).sum().backward()
    assert torch.equal(layer.weight.grad, torch.tensor([3.0, 1, 1, 0, 0, 1])[:, None].expand(6, 4))
    assert list(layer.state_dict()) == ["weight"]
    with pytest.raises(ValueError, match=r"x: expected at most 6 positions, got 7 \(offset 4\)"):
        layer(x, offset=4)
    with pytest.raises(IndexError):
        layer(x, positions=torch.tensor([0, 1, 6]))


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: RotaryEmbedding(5), "dim"),
        (lambda: RotaryEmbedding(0), "dim"),
        (lambda: RotaryEmbedding(4, base=1.0), "base"),
        (lambda: RotaryEmbedding(4, scaling="ntk", factor=2.0), "scaling"),
        (lambda: RotaryEmbedding(4, scaling="linear"), "factor"),
        (lambda: RotaryEmbedding(4, factor=2.0), "factor"),
        (lambda: RotaryEmbedding(4, scaling="linear", factor=0.5), "factor"),
        (lambda: RotaryEmbedding(4, scaling="linear", factor=math.nan), "factor"),
        (lambda: RotaryEmbedding(4, base=math.inf), "base"),
        (lambda: RotaryEmbedding(4, scaling="linear", factor=2.0, original_max_position=8), "original_max_position"),
        (lambda: RotaryEmbedding(4, scaling="yarn", factor=2.0), "original_max_position"),
        (lambda: RotaryEmbedding(2, scaling="dynamic", factor=2.0, original_max_position=8), "dim"),
        (lambda: RotaryEmbedding(4, scaling="dynamic", factor=2.0, original_max_position=0), "original_max_position"),
        (lambda: RotaryEmbedding(4, beta_fast=1.0), "beta_slow"),
        (lambda: RotaryEmbedding(4, beta_fast=math.inf), "beta_fast"),
        (
            lambda: RotaryEmbedding(4, scaling="yarn", factor=2.0, original_max_position=8, attention_factor=math.nan),
            "attention_factor",
        ),
        (lambda: RotaryEmbedding(4, attention_factor=1.5), "attention_factor"),
        (lambda: RotaryEmbedding(4).tables(-1), "length"),
        (lambda: RotaryEmbedding(8)(X), "q"),
        (lambda: RotaryEmbedding(4)(X[0, 0]), "q"),
        (lambda: RotaryEmbedding(4)(X, X[:, :2]), "k"),
        (lambda: RotaryEmbedding(4)(X, X.double()), "k"),
        (lambda: RotaryEmbedding(4)(X, offset=-1), "offset"),
        (lambda: RotaryEmbedding(4)(X, positions=torch.arange(3), offset=1), "offset"),
        (lambda: RotaryEmbedding(4)(X, positions=torch.arange(2)), "positions"),
        (lambda: RotaryEmbedding(4)(X, positions=torch.zeros(3, 3).long()), "positions"),
        (lambda: RotaryEmbedding(4)(X, positions=torch.zeros(2, 3, 4).long()), "positions"),
        (lambda: ALiBi(0), "num_heads"),
        (lambda: ALiBi(2).bias(-1, 2), "queries"),
        (lambda: SinusoidalEncoding(0), "dim"),
        (lambda: SinusoidalEncoding(4, base=0.0), "base"),
        (lambda: SinusoidalEncoding(5)(X), "x"),
        (lambda: SinusoidalEncoding(4, batch_first=False)(X, positions=torch.zeros(2, 3).long()), "positions"),
        (lambda: LearnedEncoding(0, 4), "max_length"),
        (lambda: LearnedEncoding(9, 0), "dim"),
    ],
)
def test_bad_values_are_named(make: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: (expected|only)"):
        make()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ALiBi(1.5), "num_heads"),
        (lambda: RotaryEmbedding(4)(X.long()), "q"),
        (lambda: RotaryEmbedding(4)([1.0]), "q"),
        (lambda: RotaryEmbedding(4)(X, positions=torch.arange(3.0)), "positions"),
        (lambda: RotaryEmbedding(4)(X, positions=[0, 1, 2]), "positions"),
        (lambda: SinusoidalEncoding(4)(X.int()), "x"),
    ],
)
def test_bad_types_are_named(call: Callable[[], object], name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected"):
        call()


def test_repr() -> None:
    assert repr(RotaryEmbedding(8)) == "RotaryEmbedding(8, base=10000, interleaved=False)"
    yarn = RotaryEmbedding(8, scaling="yarn", factor=2.0, original_max_position=4)
    assert repr(yarn) == "RotaryEmbedding(8, base=10000, interleaved=False, scaling='yarn', factor=2)"
    assert repr(ALiBi(8)) == "ALiBi(8)"
    assert repr(SinusoidalEncoding(8)) == "SinusoidalEncoding(8, base=10000, batch_first=True)"
    assert repr(LearnedEncoding(3, 8)) == "LearnedEncoding(3, 8, batch_first=True)"
