"""BilinearAttention and AdditiveAttention: their formulas, masks, gradients, memory, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqkernels
from seqkernels.functional import scaled_dot_product_attention
from seqkernels.nn import AdditiveAttention, BilinearAttention
from seqkernels.testing import assert_within_budget, torch_tiled_attention

from ..sizes import Largest
from ..twins import applies, judge, leaves

ATTENTIONS = [scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention]


def layer(attention: Callable[..., Tensor] | None = None, dtype: torch.dtype = torch.float32) -> BilinearAttention:
    torch.manual_seed(0)
    return BilinearAttention(6, 10, attention).to(dtype)


def draw(*batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y, h = torch.randn(*batch, 5, 6, generator=generator), torch.randn(*batch, 7, 10, generator=generator)
    mask = torch.rand(*batch, 5, 7, generator=generator) < 0.7
    mask[..., 0] = True
    return y, h, mask


def formula(weight: Tensor, y: Tensor, h: Tensor, mask: Tensor | None) -> Tensor:
    scores = y @ weight @ h.mT
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ h


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_formula_and_gradients(attention: Callable[..., Tensor], batch: tuple[int, ...], masked: bool) -> None:
    y, h, mask = draw(*batch)
    grad = torch.randn(*batch, 5, 10, generator=torch.Generator().manual_seed(2))

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (layer().weight, y, h)]
        out = function(*inputs, mask if masked else None)
        return out, *torch.autograd.grad(out, inputs, grad.to(dtype))

    def ours(weight: Tensor, *args: Tensor | None) -> Tensor:
        return torch.func.functional_call(layer(attention), {"weight": weight}, args)

    oracle, baseline = run(formula, torch.float64), run(formula, torch.float32)
    for name, *values in zip(("out", "weight", "y", "h"), run(ours, torch.float32), oracle, baseline, strict=True):
        assert_within_budget(*values, name)


def test_weights_are_the_alignment() -> None:
    y, h, mask = draw(2)
    for dtype in (torch.float32, torch.float64):
        module, queries, keys = layer(dtype=dtype), y.to(dtype), h.to(dtype)
        for keep in (mask, None):
            alignment = module.weights(queries, keys, keep)
            assert keep is None or not alignment[~keep].any()
            for found in (alignment @ keys, module(queries, keys, keep)):
                judge(found, applies(formula, module.weight, y, h, keep))


def test_nan_behind_the_mask_has_no_influence() -> None:
    y, h, mask = draw(2)
    mask = mask[:, :1].clone()
    mask[:, :, 3] = False
    clean = layer()(y, h, mask)
    h[:, 3] = torch.nan
    assert torch.equal(layer()(y, h, mask), clean)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("y", lambda y, h, mask: (y[..., :5], h, mask), ValueError),
        ("h", lambda y, h, mask: (y, h[..., :5], mask), ValueError),
        ("h", lambda y, h, mask: (y, h[:1], mask), ValueError),
        ("keep", lambda y, h, mask: (y, h, mask.float()), TypeError),
        ("keep", lambda y, h, mask: (y, h, mask[..., :3]), ValueError),
        ("keep", lambda y, h, mask: (y, h, mask[0]), ValueError),
    ],
)
def test_bad_input_is_named(name: str, change: Callable[..., tuple[Tensor, ...]], error: type[Exception]) -> None:
    inputs = change(*draw(2))
    for function in (layer(), layer().weights):
        with pytest.raises(error, match=f"^{name}: expected"):
            function(*inputs)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"h_dim: .* got 0"):
        BilinearAttention(3, 0)


def test_bad_softmax_dims_are_named() -> None:
    with pytest.raises(ValueError, match=r"softmax_dim: .* got 0"):
        BilinearAttention(3, 4, softmax_dim=0)
    with pytest.raises(ValueError, match="attention: expected None with softmax_dim=-2"):
        BilinearAttention(3, 4, scaled_dot_product_attention, softmax_dim=-2)


def test_repr() -> None:
    assert repr(layer()) == "BilinearAttention(y_dim=6, h_dim=10)"
    assert repr(BilinearAttention(6, 10, softmax_dim=-2)) == "BilinearAttention(y_dim=6, h_dim=10, softmax_dim=-2)"
    assert repr(AdditiveAttention(6, 10, 8)) == "AdditiveAttention(query_dim=6, key_dim=10, hidden_dim=8)"
    assert repr(AdditiveAttention(6, 10, 8, 3)).endswith("hidden_dim=8, chunk_size=3)")


def over_first_dimension(weight: Tensor, y: Tensor, h: Tensor) -> Tensor:
    """The alignment whose softmax goes over the positions of `y`, two-dimensional."""
    score = torch.matmul(torch.matmul(y, weight), h.T)
    return torch.matmul(F.softmax(score, dim=0), h)


def competing(weight: Tensor, y: Tensor, h: Tensor, keep: Tensor | None) -> Tensor:
    """The same, batched and masked."""
    scores = y @ weight @ h.mT
    if keep is None:
        return scores.softmax(-2) @ h
    return scores.masked_fill(~keep, -1e30).softmax(-2).masked_fill(~keep, 0) @ h


def gradients(function: Callable[..., Tensor], *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """The result and the gradients of the inputs that are floating point."""
    leaves = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return (out.detach(), *torch.autograd.grad(out, wanted, grad))


def by_normalisers(weight: Tensor, y: Tensor, h: Tensor, keep: Tensor | None) -> Tensor:
    """`competing` as the layer does it, with torch's operations that round as tiled kernels do."""
    q, k = (x.reshape(-1, 1, *x.shape[-2:]) for x in (y @ weight, h))
    if keep is not None:
        keep = keep.expand(*y.shape[:-1], h.shape[-2]).reshape(len(q), 1, y.shape[-2], h.shape[-2])
    _, columns = torch_tiled_attention(k, q, q, None if keep is None else keep.mT, scale=1.0)
    bias = -columns.masked_fill(columns == -torch.inf, 0).unsqueeze(-2)
    out, rows = torch_tiled_attention(q, k, k, keep, bias, scale=1.0)
    return (out * rows.exp().unsqueeze(-1)).reshape(*y.shape[:-1], h.shape[-1])


def check(found: Any, theirs: Callable[..., Any], *others: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Judge by the least exact of equally good computations of torch, all results as one vector."""
    exact, *own = (applies(run, *args)(dtype) for run, dtype in [(theirs, torch.float64), (theirs, torch.float32)])
    own += [applies(run, *args)(torch.float32) for run in others]
    assert [x.shape for x in leaves(found)] == [x.shape for x in leaves(exact)]
    vectors = [torch.cat([x.detach().flatten() for x in leaves(value)]) for value in (found, exact, *own)]
    assert_within_budget(vectors[0], vectors[1], vectors[2:])


def graded(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *inputs: gradients(function, *inputs)


def with_weight(module: BilinearAttention) -> Callable[..., Tensor]:
    return lambda weight, *args: torch.func.functional_call(module, {"weight": weight}, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softmax_over_the_positions_of_y(dtype: torch.dtype, plain_runner: object) -> None:
    """Two-dimensional, as in the textbook form of the layer."""
    torch.manual_seed(0)
    module = BilinearAttention(6, 10, softmax_dim=-2)
    for rows, columns in ((5, 5), (40, 70), (1, 3)):
        args = (module.weight, torch.randn(rows, 6), torch.randn(columns, 10))
        weight, y, h = (x.to(dtype) for x in args)
        tiled = graded(lambda *inputs: by_normalisers(*inputs, None))
        found = gradients(with_weight(module), weight, y, h)
        check(found, graded(over_first_dimension), tiled, args=args)
        twin = BilinearAttention(6, 10, softmax_dim=-2, dtype=dtype)
        twin.load_state_dict(module.state_dict())
        assert torch.equal(twin(y, h), found[0])
        check(twin.weights(y, h) @ h, over_first_dimension, args=args)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_softmax_over_the_positions_of_y_with_masks(batch: tuple[int, ...], plain_runner: object) -> None:
    y, h, mask = draw(*batch)
    mask[..., 1:, 2] = False
    mask[..., 2, :] = False
    mask[..., :, 3] = False
    weight = layer().weight
    module = BilinearAttention(6, 10, softmax_dim=-2)
    keeps = (None, mask, mask[..., :1, :], mask[..., :, 1:2], mask[(slice(0, 1),) * len(batch)])

    def each(function: Callable[..., Tensor]) -> Callable[..., list[tuple[Tensor, ...]]]:
        return lambda *inputs: [gradients(function, *inputs, keep) for keep in keeps]

    check(each(with_weight(module))(weight, y, h), each(competing), each(by_normalisers), args=(weight, y, h))
    out = torch.func.functional_call(module, {"weight": weight}, (y, h, mask))
    assert not out[..., 2, :].any()
    h[..., 3, :] = torch.nan
    assert torch.equal(torch.func.functional_call(module, {"weight": weight}, (y, h, mask)), out)


def test_softmax_over_the_positions_of_y_in_16_bits_and_wide() -> None:
    torch.manual_seed(0)
    y, h = torch.randn(2, 9, 6), torch.randn(2, 11, 10)
    weight = layer().weight
    for dtype in (torch.bfloat16, torch.float16):
        inputs = [x.to(dtype) for x in (weight, y, h)]
        exact = competing(*(x.double() for x in inputs), None)
        with seqkernels.use_backend("reference"):
            found = with_weight(BilinearAttention(6, 10, softmax_dim=-2))(*inputs)
        assert_within_budget(found, exact, competing(*inputs, None))
    module, h = BilinearAttention(6, 520, softmax_dim=-2), torch.randn(2, 11, 520)
    judge(module(y, h), applies(competing, module.weight, y, h, None))
    assert "head sizes 1 to 512" in str(seqkernels.explain(module, y, h))


def additive(dtype: torch.dtype = torch.float32, **options: Any) -> AdditiveAttention:
    torch.manual_seed(0)
    return AdditiveAttention(6, 10, 8, **options).to(dtype)


def additive_formula(
    w: Tensor, u: Tensor, v: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None = None
) -> Tensor:
    """Score by score."""
    scores = torch.stack([(key @ u.T + w @ q).tanh() @ v for q in query])
    weights = (scores if keep is None else scores.masked_fill(~keep, -torch.inf)).softmax(-1)
    return weights @ value


def dense_additive(w: Tensor, u: Tensor, v: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Any) -> Tensor:
    """All at once."""
    scores = ((query @ w.T).unsqueeze(-2) + (key @ u.T).unsqueeze(-3)).tanh() @ v
    return (scores if keep is None else scores.masked_fill(~keep, -torch.inf)).softmax(-1) @ value


def rows_of(function: Callable[..., Tensor], batch: tuple[int, ...]) -> Callable[..., Tensor]:
    """`additive_formula` for each entry of a batch."""

    def run(w: Tensor, u: Tensor, v: Tensor, *inputs: Tensor | None) -> Tensor:
        flat = [None if x is None else x.reshape(-1, *x.shape[len(batch) :]) for x in inputs]
        entries = [function(w, u, v, *(None if x is None else x[i] for x in flat)) for i in range(len(flat[0]))]
        return torch.stack(entries).reshape(*batch, *entries[0].shape)

    return run


def functional_additive(module: AdditiveAttention) -> Callable[..., Tensor]:
    def run(w: Tensor, u: Tensor, v: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Any = None) -> Tensor:
        weights = {"weight_query": w, "weight_key": u, "weight_score": v}
        return torch.func.functional_call(module, weights, (query, key, value), {"keep": keep})

    return run


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 9])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_additive_formula_and_gradients(batch: tuple[int, ...], chunk_size: int | None) -> None:
    query, key, mask = draw(*batch)
    value = torch.randn(*batch, 7, 4)
    module = additive(chunk_size=chunk_size)
    weights = list(module.parameters())
    for keep in (None, mask):
        for dtype in (torch.float32, torch.float64):
            inputs = [x.to(dtype) for x in (*weights, query, key, value)]
            found = gradients(functional_additive(module), *inputs, keep)
            args = (*weights, query, key, value, keep)
            check(found, graded(rows_of(additive_formula, batch)), graded(dense_additive), args=args)


def test_additive_values_are_keys_by_default() -> None:
    query, key, keep = draw(2)
    module = additive()
    assert torch.equal(module(query, key, keep=keep), module(query, key, key, keep=keep))
    projected = module.project(key)
    assert torch.equal(module(query, key, keep=keep, projected=projected), module(query, key, keep=keep))
    with torch.no_grad():
        steps = [module(query[:, i : i + 1], key, keep=keep[:, i : i + 1], projected=projected) for i in range(5)]
        judge(torch.cat(steps, 1), applies(lambda m, q, k, keep: m(q, k, keep=keep), module, query, key, keep))


def test_additive_weights_are_the_alignment() -> None:
    query, key, keep = draw(2)
    for module in (additive(), additive(chunk_size=2)):
        for mask in (None, keep, keep[:, :1], keep[:1]):
            weights = module.weights(query, key, keep=mask)
            assert weights.shape == (2, 5, 7)
            assert mask is None or not weights[~mask.expand(2, 5, 7)].any()
            judge(weights @ key, applies(lambda m, q, k, keep: m(q, k, keep=keep), module, query, key, mask))


def test_additive_lengths_and_rows_without_keys() -> None:
    query, key, keep = draw(3)
    lengths = torch.tensor([4, 0, 7])
    key.requires_grad_()
    for chunk_size in (None, 2):
        module = additive(chunk_size=chunk_size)
        expected = module(query, key, keep=torch.arange(7) < lengths[:, None, None])
        out = module(query, key, lengths=lengths)
        assert torch.equal(out, expected)
        assert not out[1].any()
        both = module(query, key, lengths=lengths.int(), keep=keep)
        assert torch.equal(both, module(query, key, keep=keep & (torch.arange(7) < lengths[:, None, None])))
        broken = key.detach().clone()
        broken[0, 4:] = torch.nan
        broken[1] = torch.inf
        broken.requires_grad_()
        assert torch.equal(module(query, broken, lengths=lengths), out)
        projected = module.project(broken)
        assert torch.equal(module(query, broken, lengths=lengths, projected=projected), out)
        grads = torch.autograd.grad(module(query, broken, lengths=lengths).sum(), [broken, *module.parameters()])
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[0][0, 4:].any()


def test_additive_edges() -> None:
    module = additive()
    for m, n in ((0, 3), (3, 0), (0, 0)):
        out = module(torch.randn(2, m, 6), torch.randn(2, n, 10))
        assert out.shape == (2, m, 10)
        assert not out.any()
        assert module.weights(torch.randn(2, m, 6), torch.randn(2, n, 10)).shape == (2, m, n)
    for dtype in (torch.bfloat16, torch.float16):
        query, key, _ = (x.to(dtype) if x.is_floating_point() else x for x in draw())
        found = additive(dtype)(query, key)
        weights = [x.detach().to(dtype) for x in additive().parameters()]
        exact = additive_formula(*(x.double() for x in (*weights, query, key, key)))
        assert_within_budget(found, exact, additive_formula(*weights, query, key, key))


def test_additive_second_order() -> None:
    query, key, mask = (x[0] for x in draw(1))
    module = additive(torch.float64, chunk_size=2)
    inputs = [x.detach().double().requires_grad_() for x in (*module.parameters(), query[:3], key[:4], key[:4, :2])]
    assert torch.autograd.gradcheck(functional_additive(module), (*inputs, mask[:3, :4]))
    assert torch.autograd.gradgradcheck(functional_additive(module), (*inputs, mask[:3, :4]))


def test_additive_memory_is_that_of_a_chunk() -> None:
    module = AdditiveAttention(4, 4, 16, chunk_size=3)
    query, key = torch.randn(60, 4), torch.randn(50, 4)
    saved: dict[int, int] = {}

    def save(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            out = module(query, key)
        out.sum().backward()
    assert largest.elements == 3 * 50 * 16
    assert 0 < sum(saved.values()) < 60 * 50
    whole = AdditiveAttention(4, 4, 16)
    with Largest() as largest, torch.no_grad():
        whole(query, key)
    assert largest.elements == 60 * 50 * 16
    with Largest() as largest, torch.no_grad():
        AdditiveAttention(4, 4, 64)(torch.randn(900, 4), torch.randn(400, 4))
    assert largest.elements <= 1 << 22


def input_gradient(module: Any, query: Tensor, key: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    return gradients(lambda x: module(x, key, keep=keep), query)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_layers_compile_without_graph_breaks() -> None:
    query, key, keep = draw(2)
    for module in (additive(chunk_size=2), BilinearAttention(6, 10, softmax_dim=-2)):
        torch._dynamo.reset()
        with seqkernels.use_backend("reference"):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            found = gradients(lambda x, run=compiled: run(x, key, keep=keep), query)
            judge(found, applies(input_gradient, module, query, key, keep))


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("query", {"query": torch.zeros(2, 5, 5)}, ValueError),
        ("key", {"key": torch.zeros(2, 7, 9)}, ValueError),
        ("key", {"key": torch.zeros(1, 7, 10)}, ValueError),
        ("value", {"value": torch.zeros(2, 6, 4)}, ValueError),
        ("keep", {"keep": torch.zeros(2, 5, 7)}, TypeError),
        ("keep", {"keep": torch.zeros(5, 7, dtype=torch.bool)}, ValueError),
        ("lengths", {"lengths": torch.zeros(2)}, TypeError),
        ("lengths", {"lengths": torch.zeros(3).long()}, ValueError),
        ("projected", {"projected": torch.zeros(2, 7, 9)}, ValueError),
    ],
)
def test_bad_input_of_additive_is_named(name: str, change: dict[str, Tensor], error: type[Exception]) -> None:
    query, key, _ = draw(2)
    arguments = {"query": query, "key": key} | change
    with pytest.raises(error, match=f"^{name}: expected"):
        additive()(**arguments)
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="_dim: expected a positive number, got 0"):
            AdditiveAttention(*sizes)
    with pytest.raises(ValueError, match="chunk_size: expected a positive number"):
        additive(chunk_size=0)
