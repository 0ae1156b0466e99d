"""The rotation of rotary position embeddings: its formula in every layout, derivatives, tracing, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch._dynamo.testing
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import seqkernels
from seqkernels import backends, testing
from seqkernels.backends import native
from seqkernels.cells import DTYPES, accumulate_dtype
from seqkernels.ops.rotary import rotary_op, rotate

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

# Torch's own, from Dynamo when it traces an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def formula(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotation with slices, rounded once, differentiable in `x`, `cos` and `sin`."""
    pairs = cos.shape[-1]
    a, b = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    wide = x.to(cos.dtype)
    out = wide.clone()
    out[..., a] = wide[..., a] * cos - wide[..., b] * sin
    out[..., b] = wide[..., b] * cos + wide[..., a] * sin
    return out.to(x.dtype)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """Cosines and sines, in the dtype to compute in for `dtype`."""
    found = draw(*shape, seed=1) * 9
    cos, sin = (testing.lay_out(x.to(accumulate_dtype(dtype)), layout) for x in (found.cos(), found.sin()))
    return cos, sin


def check(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, layout: str = "contiguous") -> None:
    """The rotation and its gradient are within the budget, and rows behind the pairs are as they were."""
    leaf = x.detach().requires_grad_()
    found = rotate(leaf, cos, sin, interleaved)
    grad = testing.lay_out(draw(*x.shape, dtype=x.dtype, seed=2), layout)
    (back,) = torch.autograd.grad(found, leaf, grad)
    with torch.no_grad():
        assert torch.equal(rotate(x, cos, sin, interleaved), found)
    pairs = cos.shape[-1]
    for given, result, turn in ((x, found, sin), (grad, back, -sin)):
        assert result.dtype == x.dtype
        exact = formula(given.double(), cos.double(), turn.double(), interleaved)
        low = torch.float32 if x.dtype == torch.float64 else accumulate_dtype(x.dtype)
        own = formula(given.to(low) if x.dtype == torch.float64 else given, cos.to(low), turn.to(low), interleaved)
        testing.assert_within_budget(result, exact, own)
        assert torch.equal(result[..., 2 * pairs :], given[..., 2 * pairs :])


@hypothesis.given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    size=st.integers(1, 200),
    missing=st.integers(0, 100),
    broadcast=st.integers(0, 7),
    interleaved=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(testing.LAYOUTS)] * 3),
    dtype=st.sampled_from(DTYPES),
)
def test_formula(
    runner: Any,
    leading: list[int],
    size: int,
    missing: int,
    broadcast: int,
    interleaved: bool,
    layouts: tuple[str, str, str],
    dtype: torch.dtype,
) -> None:
    pairs = max(size // 2 - missing, 0)
    x = testing.lay_out(draw(*leading, size, dtype=dtype), layouts[0])
    # Bits say which dimensions are 1; leading ones of 1 are not there.
    places = [1 if broadcast >> k & 1 else n for k, n in enumerate(leading)]
    while places and places[0] == 1:
        places.pop(0)
    check(x, *angles(*places, pairs, dtype=dtype, layout=layouts[1]), interleaved, layouts[2])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_size(runner: Any, dtype: torch.dtype, interleaved: bool) -> None:
    """Every way to the end of a vector, with memory of NaN around it."""
    for size in (*range(1, 40), 63, 64, 65, 66, 127, 128, 130, 200):
        for pairs in {size // 2, size // 4, 0}:
            x = testing.lay_out(draw(2, 3, size, dtype=dtype), "sliced")
            check(x, *angles(3, pairs, dtype=dtype, layout="sliced"), interleaved)


@pytest.mark.parametrize("swapped", [False, True])
def test_threads_share_rows(runner: Any, swapped: bool) -> None:
    """Enough work for several threads; documents and heads in either order in memory."""
    x = draw(3, 5, 171, 66)
    if swapped:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    for places in ((171,), (3, 1, 171), (3, 5, 1)):
        check(x, *angles(*places, 33), interleaved=swapped)


def test_infinities_and_nan(runner: Any) -> None:
    x = draw(4, 20)
    x[0, 3], x[1, 4], x[2, 19] = torch.inf, torch.nan, -torch.inf
    cos, sin = angles(4, 9)
    for interleaved in (False, True):
        found, expected = rotate(x, cos, sin, interleaved), formula(x, cos, sin, interleaved)
        testing.assert_within_budget(found, formula(x.double(), cos.double(), sin.double(), interleaved), expected)


def test_memory_keeps_the_order_of_the_input(plain_runner: Any) -> None:
    cos, sin = angles(7, 4)
    heads = draw(2, 7, 3, 8).transpose(1, 2)
    packed = draw(2, 7, 3 * 3 * 8)[..., 24:48].unflatten(2, (3, 8)).transpose(1, 2)
    for x in (heads, packed):
        out = rotate(x, cos, sin)
        assert out.transpose(1, 2).is_contiguous()
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(rotate(leaf, cos, sin), leaf, out)
        assert grad.transpose(1, 2).is_contiguous()
    assert rotate(draw(2, 3, 8, 7).transpose(2, 3), cos, sin).is_contiguous()


@pytest.mark.parametrize("interleaved", [False, True])
def test_derivatives(plain_runner: Any, interleaved: bool) -> None:
    x = draw(2, 2, 3, 7, dtype=torch.float64).requires_grad_()
    cos, sin = angles(3, 3, dtype=torch.float64)

    def turn(x: Tensor) -> Tensor:
        return rotate(x, cos, sin, interleaved)

    assert torch.autograd.gradcheck(turn, x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(turn, x, check_batched_grad=True)
    inputs = (x, cos.requires_grad_(), sin.requires_grad_())
    assert torch.autograd.gradcheck(lambda *tensors: rotate(*tensors, interleaved), inputs)
    assert torch.autograd.gradgradcheck(lambda *tensors: rotate(*tensors, interleaved), inputs)


def test_gradients_that_are_not_needed() -> None:
    x, (cos, sin) = draw(3, 8).requires_grad_(), angles(3, 4)
    kept = rotate(x, cos, sin)
    assert kept.requires_grad
    with torch.no_grad():
        assert not rotate(x, cos, sin).requires_grad
    assert not rotate(x.detach(), cos, sin).requires_grad
    # A gradient of zeros without memory, as torch makes it for one output of several.
    (zero,) = torch.autograd.grad(kept, x, torch._efficientzerotensor((3, 8)))
    assert torch.equal(zero, torch.zeros(3, 8))


def test_negated_parts_of_complex_tensors() -> None:
    x = torch.view_as_complex(draw(3, 8, 2)).conj().imag
    assert x.is_neg()
    cos, sin = angles(3, 4)
    assert torch.equal(rotate(x, cos, sin), rotate(x.resolve_neg().contiguous(), cos, sin))
    negated = torch.view_as_complex(torch.stack((cos, sin), 2)).conj().imag
    assert torch.equal(rotate(x, cos, negated), rotate(x, cos, negated.resolve_neg()))
    one = torch.view_as_complex(draw(3, 1, 2)).conj().imag
    assert torch.equal(rotate(one, cos[:, :0], sin[:, :0]), one.resolve_neg())
    y = draw(3, 8).requires_grad_()
    assert torch.equal(rotate(torch._neg_view(y), cos, sin), rotate(-y, cos, sin))
    assert torch.equal(rotate(y, torch._neg_view(cos), sin), rotate(y, -cos, sin))
    grads = [torch.autograd.grad(rotate(y, cos, sin), y, g)[0] for g in (torch._neg_view(x), -x)]
    assert torch.equal(*grads)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of sizes that are compared
def test_transforms_take_the_formula() -> None:
    x, (cos, sin) = draw(4, 3, 8), angles(3, 4)
    exact, own = formula(x.double(), cos.double(), sin.double(), False), formula(x, cos, sin, False)

    def turn(x: Tensor) -> Tensor:
        return rotate(x, cos, sin)

    def judge(found: Tensor) -> None:
        testing.assert_within_budget(found, exact, own)

    judge(torch.func.vmap(turn)(x))
    for result in torch.func.jvp(turn, (x,), (x,)):
        judge(result)
    _, pullback = torch.func.vjp(lambda x: rotate(x, cos, -sin), x)
    judge(pullback(x)[0])
    with forward_ad.dual_level():
        judge(forward_ad.unpack_dual(turn(forward_ad.make_dual(x, x))).tangent)
    judge(torch.jit.trace(turn, (x,))(x))


def test_more_dimensions_than_the_kernel_has() -> None:
    for leading in ((2, 1, 2, 3), (1, 2, 1, 2, 3)):
        check(draw(*leading, 9), *angles(3, 4), interleaved=True)
    explanation = str(seqkernels.explain(rotate, draw(1, 1, 1, 2, 8), *angles(2, 4)))
    assert "not fused: rotary embedding: 5 dimensions, more than 4" in explanation


def calls(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor, Tensor, bool, bool]]:
    return [
        (testing.lay_out(draw(*leading, size, dtype=dtype), layout), *angles(leading[-1], pairs, dtype=dtype), *flags)
        for (leading, size, pairs), layout, flags in zip(
            [((2, 3, 5), 8, 4), ((5,), 9, 3), ((2, 0), 4, 2), ((2, 3, 4), 8, 4), ((3, 2), 6, 0), ((2, 2, 2), 1, 0)],
            ["swapped", "sliced", "contiguous", "transposed", "expanded", "strided"],
            [(False, False), (True, False), (False, True), (True, True), (False, False), (False, True)],
            strict=True,
        )
    ]


def test_opcheck(plain_runner: Any) -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for call in calls():
        torch.library.opcheck(rotary_op, call, test_utils=tests)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fakes_have_the_metadata_of_real_results(plain_runner: Any, dtype: torch.dtype) -> None:
    for call in calls(dtype):
        real = rotary_op(*call)
        with FakeTensorMode() as mode:
            fake = rotary_op(*map(mode.from_tensor, call[:3]), *call[3:])
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        assert real.numel() == 0 or fake.stride() == real.stride()


def network(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    return (rotate(heads, cos, sin) * rotate(heads, cos, sin, True)).sum()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_without_graph_breaks(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    x, (cos, sin) = draw(2, 5, 16, dtype=torch.float64).requires_grad_(), angles(5, 3, dtype=torch.float64)
    for inputs in ((x, cos, sin), (x, cos.requires_grad_(), sin.requires_grad_())):
        wanted = [t for t in inputs if t.requires_grad]
        found, expected = compiled(*inputs), network(*inputs)
        torch.testing.assert_close(found, expected)
        pairs = zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, cos, sin), network(x, cos, sin))


def test_another_length_does_not_recompile() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter, dynamic=True)
    for length in (5, 9, 14):
        x, (cos, sin) = draw(2, length, 16).requires_grad_(), angles(length, 3)
        assert torch.equal(compiled(x, cos, sin), network(x, cos, sin))
        assert counter.frame_count == 1


def test_traces_hold_the_op() -> None:
    x, (cos, sin) = draw(2, 5, 16), angles(5, 3)
    graph = make_fx(network, tracing_mode="symbolic")(x, cos, sin).graph
    assert [str(node.target) for node in graph.nodes].count("seqkernels.rotary.default") == 2

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return network(*tensors)

    program = torch.export.export(Module(), (x, cos, sin))
    assert "seqkernels.rotary.default" in {str(node.target) for node in program.graph.nodes}
    assert torch.equal(program.module()(x, cos, sin), network(x, cos, sin))


def test_other_devices_and_subclasses_take_the_formula() -> None:
    meta = [t.to("meta") for t in (draw(2, 3, 8), *angles(3, 4))]
    assert rotate(*meta).shape == (2, 3, 8)

    class Named(torch.Tensor):
        pass

    x, (cos, sin) = draw(2, 3, 8), angles(3, 4)
    assert torch.equal(rotate(x.as_subclass(Named), cos, sin), rotate(x, cos, sin))


@needs_native
def test_explain() -> None:
    x, tables = draw(2, 3, 8), angles(3, 4)
    assert str(seqkernels.explain(rotate, x, *tables)) == (
        "rotary of torch.float32 on cpu -> native\n"
        "  native: chosen\n"
        "  reference: could run it, comes later in the order"
    )
    call = backends.Call("rotary", "cpu", torch.float32)
    assert backends.why_not("native", call) is None


def test_insisting_on_an_implementation_without_a_kernel(other_backend: str) -> None:
    x, tables = draw(2, 3, 8), angles(3, 4)
    with seqkernels.use_backend(other_backend):
        found = rotate(x, *tables)
        explanation = str(seqkernels.explain(rotate, x, *tables))
    exact = formula(x.double(), *(t.double() for t in tables), False)
    testing.assert_within_budget(found, exact, formula(x, *tables, False))
    assert ("no kernel for it" in explanation) == (other_backend == "numba")


@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        ("x", TypeError, lambda x, cos, sin: ([1.0], cos, sin)),
        ("x", TypeError, lambda x, cos, sin: (x.int(), cos, sin)),
        ("x", ValueError, lambda x, cos, sin: (x.sum(), cos, sin)),
        ("cos", TypeError, lambda x, cos, sin: (x, None, sin)),
        ("cos", TypeError, lambda x, cos, sin: (x, cos.double(), sin)),
        ("cos", TypeError, lambda x, cos, sin: (x.double(), cos, sin)),
        ("cos", TypeError, lambda x, cos, sin: (x.half(), cos.half(), sin)),
        ("cos", ValueError, lambda x, cos, sin: (x, cos.to("meta"), sin)),
        ("cos", ValueError, lambda x, cos, sin: (x, cos[:2], sin[:2])),
        ("cos", ValueError, lambda x, cos, sin: (x[..., :7], cos, sin)),
        ("cos", ValueError, lambda x, cos, sin: (x[0, 0, 0], cos, sin)),
        ("cos", ValueError, lambda x, cos, sin: (x, cos.expand(2, 2, 2, 3, 4), sin)),
        ("sin", ValueError, lambda x, cos, sin: (x, cos, sin[:, :3])),
        ("sin", ValueError, lambda x, cos, sin: (x, cos, sin.sum())),
    ],
)
def test_errors_name_the_argument(name: str, error: type[Exception], change: Callable[..., Any]) -> None:
    arguments = change(draw(2, 2, 3, 8), *angles(3, 4))
    with pytest.raises(error, match=rf"^{name}: expected .*, got "):
        rotate(*arguments)
    if all(isinstance(t, Tensor) for t in arguments):
        grad_given = arguments[0].requires_grad_() if arguments[0].is_floating_point() else arguments[0]
        with pytest.raises(error, match=rf"^{name}: expected .*, got "):
            rotate(grad_given, *arguments[1:])


@needs_native
@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        ("x", ValueError, lambda a: {"x": draw(1, 1, 2, 3, 8)}),
        ("x", ValueError, lambda a: {"x": draw(8, 3).T}),
        ("cos", ValueError, lambda a: {"cos": a["cos"][:2]}),
        ("cos", ValueError, lambda a: {"cos": draw(4, 3).T}),
        ("sin", ValueError, lambda a: {"sin": a["sin"][:, :3]}),
        ("sin", TypeError, lambda a: {"sin": a["sin"].double()}),
        ("out", ValueError, lambda a: {"out": draw(3, 7)}),
        ("out", TypeError, lambda a: {"out": draw(3, 8).half()}),
        ("threads", ValueError, lambda a: {"threads": 0}),
    ],
)
def test_errors_of_the_compiled_module(name: str, error: type[Exception], change: Callable[..., Any]) -> None:
    from seqkernels.backends.native.extension import extension

    x, (cos, sin) = draw(3, 8), angles(3, 4)
    arguments = {
        "x": x,
        "cos": cos,
        "sin": sin,
        "interleaved": False,
        "inverse": False,
        "out": torch.empty_like(x),
        "threads": 1,
    }
    with pytest.raises(error, match=rf"^{name}: expected .*, got "):
        extension().rotary(*(arguments | change(arguments)).values())
