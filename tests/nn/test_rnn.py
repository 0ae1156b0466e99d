"""The recurrent layers give torch's results, gradients, errors and text in every documented form."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import seqkernels
from seqkernels.testing import assert_within_budget

from ..twins import applies, judge

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning"),
]

I, H, P, T, B = 5, 13, 6, 9, 4  # noqa: E741
LENGTHS = (4, 9, 1, 9)
KINDS = ("RNN", "ReLU", "LSTM", "projected", "GRU")
FORMS = ("padded", "unbatched", "packed", "uniform", "empty")


class Options(NamedTuple):
    kind: str
    form: str
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    given: bool = True  # hx

    def __str__(self) -> str:
        flags = ("bidirectional", "bias", "batch_first", "given")
        return "-".join([self.kind, self.form, str(self.num_layers), *(f for f in flags if getattr(self, f))])


PRODUCT = [
    Options(*options) for options in itertools.product(KINDS, FORMS, (1, 2), *[(False, True)] * 4)
]  # fmt: skip


def build(options: Options, package: Any, *dtypes: torch.dtype, **more: Any) -> Any:
    """The same weights for the same options, in torch's or our layer, rounded to one dtype after the other."""
    named = {"ReLU": {"nonlinearity": "relu"}, "projected": {"proj_size": P}}
    cls = getattr(package, {"ReLU": "RNN", "projected": "LSTM"}.get(options.kind, options.kind))
    arguments = dict(zip(options._fields[2:6], options[2:6], strict=True), **named.get(options.kind, {}), **more)
    torch.manual_seed(3)
    layer = cls(I, H, **arguments)
    for dtype in dtypes:
        layer.to(dtype)
    return layer


def draw(options: Options, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Input and hx in float32, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).float()

    batch: tuple[int, ...] = (B,)
    if options.form in ("packed", "uniform"):
        x = pack_sequence(
            [randn(n, I) for n in (LENGTHS if options.form == "packed" else (T,) * B)], enforce_sorted=False
        )
    else:
        batch = {"padded": (B,), "unbatched": (), "empty": (0,)}[options.form]
        x = randn(*batch, T, I) if options.batch_first else randn(T, *batch, I)
    rows = options.num_layers * (2 if options.bidirectional else 1)
    h = randn(rows, *batch, P if options.kind == "projected" else H)
    c = randn(rows, *batch, H)
    return x, None if not options.given else (h, c) if options.kind in ("LSTM", "projected") else h


def as_leaf(x: Any, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    """A copy in `dtype` that requires gradients, and its tensors."""
    if x is None:
        return None, []
    if isinstance(x, PackedSequence):
        data = x.data.to(dtype, copy=True).requires_grad_()
        return PackedSequence(data, *x[1:]), [data]
    if isinstance(x, tuple):
        leaves = [s.to(dtype, copy=True).requires_grad_() for s in x]
        return tuple(leaves), leaves
    leaf = x.to(dtype, copy=True).requires_grad_()
    return leaf, [leaf]


def flatten(output: Any, hidden: Any) -> dict[str, Tensor]:
    data = output.data if isinstance(output, PackedSequence) else output
    states = hidden if isinstance(hidden, tuple) else (hidden,)
    return {"output": data, **dict(zip(("h_n", "c_n"), states, strict=False))}


def shuffle(name: str, x: Tensor, layer: Any, seed: int, undo: bool = False) -> Tensor:
    """A tensor of the same layer whose features and hidden units come in another order: other rounding errors."""

    def order(x: Tensor, dim: int) -> Tensor:
        permutation = torch.randperm(x.shape[dim], generator=torch.Generator().manual_seed(seed))
        return x.index_select(dim, permutation.argsort() if undo else permutation) if seed else x

    if name == "output" or name.startswith("weight_ih_l1"):
        directions = x.unflatten(-1, (2 if layer.bidirectional else 1, -1))
        x = order(directions, directions.dim() - 1).flatten(-2)
    elif not name.startswith("bias"):
        x = order(x, x.dim() - 1)
    if name.startswith(("weight_ih", "weight_hh", "bias")):
        return order(x.unflatten(0, (-1, layer.hidden_size)), 1).flatten(0, 1)
    return order(x, 0) if name.startswith("weight_hr") else x


def results(layer: Any, x: Any, hx: Any, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Outputs and the gradients of everything for one loss, computed in the order of units that `seed` draws."""

    def turn(name: str, value: Any) -> Any:
        if isinstance(value, PackedSequence):
            return value._replace(data=shuffle(name, value.data, layer, seed))
        if isinstance(value, tuple):
            return tuple(shuffle(name, each, layer, seed) for each in value)
        return None if value is None else shuffle(name, value, layer, seed)

    x, x_leaves = as_leaf(turn("x", x), dtype)
    hx, hx_leaves = as_leaf(turn("hx", hx), dtype)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            weight.copy_(turn(name, weight))
    outputs = flatten(*layer(x, hx))
    generator = torch.Generator().manual_seed(7)
    grads = [turn(name, torch.randn(out.shape, generator=generator)).to(dtype) for name, out in outputs.items()]
    leaves = {"x": x_leaves[0], **{f"hx[{k}]": leaf for k, leaf in enumerate(hx_leaves)}}
    leaves |= dict(layer.named_parameters())
    found = dict(zip(leaves, torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads), strict=True))
    return {name: shuffle(name, out, layer, seed, True) for name, out in outputs.items()} | {
        f"grad of {name}": shuffle(name, grad, layer, seed, True) for name, grad in found.items()
    }


def together(what: str, oracle: dict[str, Tensor], found: dict[str, Tensor]) -> Tensor:
    """All outputs, or all gradients, each scaled to its size in the oracle by a power of two, which rounds nothing.

    Small tensors alone would make a noisy test: by luck torch is often much more exact than it is on average.
    """
    names = [name for name in found if name.startswith("grad of ") == bool(what) and found[name].numel()]
    sizes = [oracle[name].abs().max().log2().ceil() if oracle[name].any() else torch.zeros(()) for name in names]
    scaled = [found[name].flatten() * (2**-size).to(found[name].dtype) for name, size in zip(names, sizes, strict=True)]
    return torch.cat(scaled) if scaled else torch.empty(0)


def compare(options: Options, dtype: torch.dtype, *more: torch.dtype) -> None:
    """Judge our results in each dtype, from numbers that are exact in the first one."""
    x, hx = draw(options, dtype)

    def baseline(seed: int) -> dict[str, Tensor]:
        with torch.backends.mkldnn.flags(enabled=dtype == torch.float32):
            return results(build(options, torch.nn, dtype), x, hx, dtype, seed)

    oracle = results(build(options, torch.nn, dtype, torch.float64), x, hx, torch.float64)
    baselines = [baseline(seed) for seed in range(4)]
    for each in (dtype, *more):
        actual = results(build(options, seqkernels.nn, dtype, each), x, hx, each)
        for name, value in actual.items():
            assert value.dtype == each
            assert value.shape == oracle[name].shape, name
        for what in ("", "grad of "):
            judged = together(what, oracle, actual)
            assert_within_budget(
                judged, together(what, oracle, oracle), [together(what, oracle, own) for own in baselines], what
            )


@pytest.mark.parametrize("options", PRODUCT[::11], ids=str)
def test_results_and_gradients(options: Options) -> None:
    compare(options, torch.float32, torch.float64)


# ReLU has no place here: an input of it that rounding moves over 0 changes the result by more than any budget.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [o for o in PRODUCT[4::19] if o.kind != "ReLU"], ids=str)
def test_results_and_gradients_in_16_bits(options: Options, dtype: torch.dtype) -> None:
    compare(options, dtype)


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_implementation(kind: str, form: str, plain_runner: Any) -> None:
    compare(Options(kind, form, 2, bidirectional=True), torch.float32, torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("options", [Options("LSTM", "padded", batch_first=b) for b in (False, True)], ids=str)
def test_strided_and_expanded_input(options: Options, transposed: bool) -> None:
    x, _ = draw(options)
    layer, twin = build(options, seqkernels.nn), build(options, torch.nn)
    wide = torch.full((*x.shape[:2], 2 * I), torch.nan)
    wide[..., ::2] = x
    same = x.transpose(0, 1).contiguous().transpose(0, 1) if transposed else wide[..., ::2]
    judge(layer(same), applies(twin, x))
    row = x[:1, :1].expand_as(x)
    judge(layer(row), applies(twin, row.contiguous()))


def test_batch_first_output_is_laid_out_as_that_of_torch() -> None:
    layer = build(Options("GRU", "padded", batch_first=True), seqkernels.nn)
    output, _ = layer(torch.randn(B, T, I))
    assert output.shape == (B, T, H)
    assert output.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_order(enforce_sorted: bool) -> None:
    torch.manual_seed(0)
    sequences = [torch.randn(n, I) for n in ((9, 4, 4, 1) if enforce_sorted else LENGTHS)]
    packed = pack_sequence(sequences, enforce_sorted)
    options = Options("LSTM", "packed", 2, bidirectional=True)
    layer, twin = build(options, seqkernels.nn), build(options, torch.nn)
    output, (h_n, c_n) = layer(packed)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(output, name) is getattr(packed, name)
    judge((output, h_n, c_n), applies(twin, packed))
    alone = applies(twin, sequences[0])
    judge((h_n[:, 0], c_n[:, 0]), lambda dtype: alone(dtype)[1])


@pytest.mark.parametrize("options", [o for o in PRODUCT if o.num_layers == 2 and o.given][3::9], ids=str)
def test_dropout_has_the_masks_of_torch(options: Options) -> None:
    x, hx = draw(options)

    def run(package: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        layer = build(options, package, dtype, dropout=0.4)
        torch.manual_seed(11)
        return results(layer, x, hx, dtype)

    found, exact, own = run(seqkernels.nn, torch.float64), run(torch.nn, torch.float64), run(torch.nn, torch.float32)
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in exact.items()}
    for what in ("", "grad of "):
        assert_within_budget(*(together(what, exact, each) for each in (found, exact, own)), what)


def test_dropout_stays_out_of_eval_mode_and_gradients_flow_there() -> None:
    options = Options("LSTM", "padded", 2)
    x, hx = draw(options)
    plain = results(build(options, seqkernels.nn), x, hx, torch.float32)
    evaluated = results(build(options, seqkernels.nn, dropout=0.9).eval(), x, hx, torch.float32)
    for name, expected in plain.items():
        assert torch.equal(evaluated[name], expected), name


@pytest.mark.parametrize("kind", ["LSTM", "projected", "GRU"])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_second_order(kind: str, form: str) -> None:
    layer = seqkernels.nn.LSTM(2, 3, proj_size=2) if kind == "projected" else getattr(seqkernels.nn, kind)(2, 3)
    layer.double()
    lengths = torch.tensor([2, 1])

    def run(x: Tensor) -> tuple[Tensor, ...]:
        if form == "padded":
            return tuple(flatten(*layer(x)).values())
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
        return tuple(flatten(*layer(packed)).values())

    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def test_gradient_penalty_reaches_the_weights() -> None:
    def run(package: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        layer = build(Options("GRU", "padded"), package, dtype)
        x = torch.linspace(-1, 1, T * B * I).to(dtype).view(T, B, I).requires_grad_()
        (slope,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), list(layer.parameters()))

    for dtype in (torch.float32, torch.float64):
        judge(run(seqkernels.nn, dtype), lambda to: run(torch.nn, to), str(dtype))
