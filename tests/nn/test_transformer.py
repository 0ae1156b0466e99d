"""Transformer layers against torch's over the product of their options."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqkernels

from ..twins import applies, judge
from .layers import Run

BATCH, SOURCE, TARGET, SIZE, HEADS, WIDE = 2, 5, 4, 12, 3, 16
FORMS = ("batch_first", "sequence_first", "unbatched")
#: Options of the constructor and names of masks, in turn.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"norm_first": True},
    {"activation": "gelu", "bias": False},
    {"activation": F.silu, "layer_norm_eps": 1e-3, "norm_first": True},
]
MASKS = list(itertools.product((None, "bool", "float"), (None, "bool", "float", "causal", "heads")))

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")


@pytest.fixture
def reference() -> Iterator[None]:
    """For what does not depend on the implementation of the op."""
    with seqkernels.use_backend("reference"):
        yield


def build(package: Any, kind: str, form: str = "batch_first", **options: Any) -> Any:
    """``"encoder"`` and ``"decoder"`` are two layers and a norm, ``"encoder layer"`` and ``"decoder layer"`` one,
    ``"transformer"`` all of it. Norms and biases are random.
    """
    options = {"dropout": 0.0, "batch_first": form == "batch_first"} | options
    if kind == "transformer":
        return randomised(package.Transformer(SIZE, HEADS, 1, 1, WIDE, **options))
    name = "Encoder" if kind.startswith("encoder") else "Decoder"
    layer = getattr(package, f"Transformer{name}Layer")(SIZE, HEADS, WIDE, **options)
    if kind.endswith("layer"):
        return randomised(layer)
    flags = {"enable_nested_tensor": False} if name == "Encoder" else {}
    stack = getattr(package, f"Transformer{name}")(layer, 2, torch.nn.LayerNorm(SIZE), **flags)
    return randomised(stack)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def draw_mask(kind: str | None, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    """A mask that leaves every query the first key."""
    if kind is None:
        return None
    if kind == "causal":
        return torch.ones(shape, dtype=torch.bool).triu(1)
    hidden = torch.rand(shape, generator=generator) < 0.4
    hidden[..., 0] = False
    if kind in ("bool", "heads"):
        return hidden
    return torch.randn(shape, generator=generator).masked_fill(hidden, -torch.inf)


def draw_masks(kind: str, form: str, padding: str | None, mask: str | None, generator: torch.Generator) -> Any:
    """Masks by the names of a module's arguments."""
    rows = () if form == "unbatched" else (BATCH,)
    heads = (HEADS * (1 if form == "unbatched" else BATCH),) if mask == "heads" else ()
    encoder = {"src_key_padding_mask": (*rows, SOURCE), "src_mask": (*heads, SOURCE, SOURCE)}
    decoder = {
        "tgt_key_padding_mask": (*rows, TARGET),
        "tgt_mask": (*heads, TARGET, TARGET),
        "memory_key_padding_mask": (*rows, SOURCE),
        "memory_mask": (*heads, TARGET, SOURCE),
    }
    if kind == "transformer":
        decoder |= encoder
    shapes = encoder if kind.startswith("encoder") else decoder
    drawn = {n: draw_mask(padding if "padding" in n else mask, s, generator) for n, s in shapes.items()}
    found = {n: x for n, x in drawn.items() if x is not None}
    return {"mask" if (kind, n) == ("encoder", "src_mask") else n: x for n, x in found.items()}


def run(
    package: Any,
    kind: str,
    form: str,
    padding: str | None,
    mask: str | None,
    options: dict[str, Any],
    hints: dict[str, Any] | None = None,
) -> Run:
    """Results and the gradients of inputs, floating point masks and parameters."""

    def compute(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        module = build(package, kind, form, **options).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        lengths = {"encoder": [SOURCE], "decoder": [TARGET, SOURCE], "transformer": [SOURCE, TARGET]}
        shape: dict[str, Callable[[int], tuple[int, ...]]] = {
            "batch_first": lambda length: (BATCH, length, SIZE),
            "sequence_first": lambda length: (length, BATCH, SIZE),
            "unbatched": lambda length: (length, SIZE),
        }
        inputs = {
            f"input {i}": torch.randn(shape[form](length), generator=generator).to(dtype).requires_grad_()
            for i, length in enumerate(lengths[kind.split()[0]])
        }
        masks = draw_masks(kind, form, padding, mask, generator)
        masks = {n: x.to(dtype).requires_grad_() if x.is_floating_point() else x for n, x in masks.items()}
        out = module(*inputs.values(), **masks, **(hints or {}))
        grad = torch.randn(out.shape, generator=generator).to(dtype)
        wanted = inputs | {n: x for n, x in masks.items() if x.requires_grad} | dict(module.named_parameters())
        found = torch.autograd.grad(out, list(wanted.values()), grad, materialize_grads=True, allow_unused=True)
        return {"out": out.detach()} | {f"grad of {n}": g for n, g in zip(wanted, found, strict=True)}

    return compute


def check(*arguments: Any) -> None:
    """One budget for all results of three draws: gradients of masks alone nearly cancel."""

    def every(compute: Run, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        return [compute(dtype, seed) for seed in range(3)]

    for dtype in (torch.float32, torch.float64):
        ours = every(run(seqkernels.nn, *arguments), dtype)
        judge(ours, functools.partial(every, run(torch.nn, *arguments)))


KINDS = ("encoder layer", "encoder", "decoder layer", "decoder", "transformer")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["encoder layer", "decoder layer"])
@pytest.mark.usefixtures("reference")
def test_layers_match_torch(kind: str, form: str) -> None:
    for i, (padding, mask) in enumerate(MASKS):
        arguments = (kind, form, padding, mask, SETTINGS[i % len(SETTINGS)])
        check(*arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
@pytest.mark.usefixtures("reference")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_stacks_match_torch(kind: str, form: str) -> None:
    for i, (padding, mask) in enumerate([(None, "causal"), ("bool", "float"), ("bool", "causal"), ("float", "heads")]):
        arguments = (kind, form, padding, mask, SETTINGS[i % len(SETTINGS)])
        check(*arguments)


@pytest.mark.parametrize("kind", ["encoder layer", "decoder layer"])
@pytest.mark.parametrize("padding", [None, "bool"])
@pytest.mark.usefixtures("reference")
def test_hints_match_torch(kind: str, padding: str | None) -> None:
    hints = {"is_causal": True} if kind.startswith("encoder") else {"tgt_is_causal": True, "memory_is_causal": True}
    arguments = (kind, "batch_first", padding, "causal", {}, hints)
    check(*arguments)


@pytest.mark.parametrize("kind", ["encoder layer", "decoder layer"])
def test_implementations_match_torch(kind: str, plain_runner: object) -> None:
    for padding, mask in ((None, None), ("bool", "bool"), ("bool", "float")):
        arguments = (kind, "batch_first", padding, mask, {"norm_first": True})
        check(*arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_parameters_and_states_are_torchs(kind: str) -> None:
    torch.manual_seed(0)
    theirs = build(torch.nn, kind)
    torch.manual_seed(0)
    ours = build(seqkernels.nn, kind)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, x in theirs.state_dict().items():
        assert torch.equal(x, ours.state_dict()[name]), name
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    attentions = [m for m in ours.modules() if isinstance(m, torch.nn.MultiheadAttention)]
    assert attentions
    assert {type(m) for m in attentions} == {seqkernels.nn.MultiheadAttention}
    inputs = [torch.randn(2, 3, SIZE) for _ in range(1 if kind.startswith("encoder") else 2)]
    with seqkernels.use_backend("reference"):
        expected = ours(*inputs)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(twin) is type(ours)
            assert torch.equal(twin(*inputs), expected)


def encoder(**options: Any) -> Any:
    torch.manual_seed(0)
    layer = seqkernels.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return seqkernels.nn.TransformerEncoder(layer, 2)


@pytest.mark.usefixtures("reference")
def test_evaluation_is_training_without_dropout_and_keeps_the_shape() -> None:
    x = torch.randn(3, 6, 8)
    padding = torch.arange(6) >= torch.tensor([[2], [4], [3]])
    for options in ({}, {"norm_first": True}):
        trained = encoder(dropout=0.0, **options)
        model = encoder(dropout=0.5, **options).eval()
        expected = trained(x, src_key_padding_mask=padding)
        assert expected.shape == x.shape
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                assert torch.equal(model(x, src_key_padding_mask=padding), expected)
                layer = model.layers[0]
                assert torch.equal(
                    layer(x, src_key_padding_mask=padding), trained.layers[0](x, src_key_padding_mask=padding)
                )


@pytest.mark.parametrize("batch_first", [False, True])
def test_nothing_is_warned_of(batch_first: bool) -> None:
    for options in ({}, {"norm_first": True}, {"bias": False}, {"activation": torch.tanh}):
        layer = seqkernels.nn.TransformerEncoderLayer(8, 1, 16, batch_first=batch_first, **options)
        for enable in (True, False):
            stack = seqkernels.nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable)
            assert stack.enable_nested_tensor is enable
    seqkernels.nn.Transformer(8, 1, 1, 1, 16, batch_first=batch_first)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("train", [False, True])
def test_positions_without_keys_are_finite(train: bool) -> None:
    model = encoder(dropout=0.0).train(train)
    x = torch.randn(2, 4, 8, requires_grad=True)
    padding = torch.tensor([[False, False, True, True], [True] * 4])
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1] = True
    out = model(x, mask, padding)
    judge(out[:1, :2], applies(model, x[:1, :2], mask[:2, :2]))
    grads = torch.autograd.grad(out.sum(), [x, *model.parameters()])
    assert all(torch.isfinite(g).all() for g in (out, *grads))
    layer = seqkernels.nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True)
    out = layer(x, x, tgt_mask=mask, memory_key_padding_mask=padding)
    grads = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
    assert all(torch.isfinite(g).all() for g in (out, *grads))


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_dropout_in_training(kind: str) -> None:
    inputs = [torch.randn(2, 5, SIZE) for _ in range(1 if kind == "encoder" else 2)]
    model = build(seqkernels.nn, kind, dropout=0.4)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model(*inputs))
        grads = torch.autograd.grad(outs[-1].square().sum(), list(model.parameters()))
        assert all(torch.isfinite(g).all() for g in grads)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], model.eval()(*inputs))


def test_gradcheck(plain_runner: object) -> None:
    torch.manual_seed(0)
    layer = seqkernels.nn.TransformerEncoderLayer(4, 2, 3, 0.0, F.gelu, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def call(x: Tensor, bias: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x, bias))

    assert torch.autograd.gradcheck(call, (x, bias, *parameters.values()))


def test_parts_handed_to_the_transformer_stay() -> None:
    parts = [torch.nn.Linear(8, 8), torch.nn.Identity()]
    model = seqkernels.nn.Transformer(8, 2, custom_encoder=parts[0], custom_decoder=parts[1], batch_first=True)
    assert model.encoder is parts[0]
    assert model.decoder is parts[1]
    assert (model.d_model, model.nhead, model.batch_first) == (8, 2, True)


class Spy(torch.nn.Module):
    """A layer of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.seen: list[Any] = []

    def forward(self, src: Tensor, **options: Any) -> Tensor:
        self.seen.append(options)
        return src


@pytest.mark.usefixtures("reference")
def test_layers_of_others_get_what_torch_hands_on() -> None:
    x = torch.randn(2, 3, 8)
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False, False, True], [False] * 3])
    seen = []
    for package in (torch.nn, seqkernels.nn):
        stack = package.TransformerEncoder(Spy(), 1, enable_nested_tensor=False)
        stack(x, mask, padding)
        stack(x)
        seen.append(stack.layers[0].seen)
    for theirs, ours in zip(*seen, strict=True):
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value) if isinstance(value, Tensor) else ours[name] is value, name


def test_a_causal_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hints: list[Any] = []
    forward = seqkernels.nn.MultiheadAttention.forward

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        hints.append((options["is_causal"], options["attn_mask"] is None or options["attn_mask"].dtype))
        return forward(self, *args, **options)

    monkeypatch.setattr(seqkernels.nn.MultiheadAttention, "forward", spy)
    boolean = torch.ones(SOURCE, SOURCE, dtype=torch.bool).triu(1)
    floating = torch.nn.Transformer.generate_square_subsequent_mask(SOURCE)
    with seqkernels.use_backend("reference"):
        for form, kind in itertools.product(FORMS, ("encoder", "decoder")):
            model = build(seqkernels.nn, kind, form)
            x = torch.randn((SOURCE, SIZE) if form == "unbatched" else (SOURCE, SOURCE, SIZE))
            inputs = (x,) if kind == "encoder" else (x, x)
            name = "mask" if kind == "encoder" else "tgt_mask"
            hint = "is_causal" if kind == "encoder" else "tgt_is_causal"
            for mask, options, expected in (
                (boolean, {}, (True, torch.bool)),
                (floating, {}, (True, torch.float32)),
                (boolean, {hint: False}, (False, torch.bool)),
                (boolean.clone().fill_(False), {}, (False, torch.bool)),
                (floating.clone().requires_grad_(), {}, (False, torch.float32)),
            ):
                hints.clear()
                model(*inputs, **{name: mask}, **options)
                assert hints[0] == expected
                assert len(hints) == 2 * len(inputs)


@pytest.mark.usefixtures("reference")
def test_hooks_and_replaced_parts_are_honoured_in_evaluation() -> None:
    model = encoder().eval()
    seen: list[str] = []
    model.layers[0].linear1.register_forward_hook(lambda *_: seen.append("linear1"))
    model.layers[1].self_attn.register_forward_pre_hook(lambda *_: seen.append("self_attn"))
    model.layers[1].linear2 = torch.nn.Sequential(model.layers[1].linear2, torch.nn.Identity())
    with torch.no_grad():
        model(torch.randn(2, 3, 8))
    assert seen == ["linear1", "self_attn"]


def gradient(model: Callable[..., Tensor], src: Tensor, tgt: Tensor, masks: dict[str, Tensor]) -> Tensor:
    src = src.detach().requires_grad_()
    return torch.autograd.grad(model(src, tgt, **masks).square().sum(), src)[0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    theirs = build(torch.nn, "transformer")
    model = build(seqkernels.nn, "transformer")
    model.load_state_dict(theirs.state_dict())
    src, tgt = torch.randn(2, 4, SIZE), torch.randn(2, 4, SIZE)
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    masks = {"src_mask": causal, "tgt_mask": causal, "src_key_padding_mask": torch.arange(4) > torch.tensor([[1], [3]])}
    with seqkernels.use_backend("reference"):
        found = gradient(torch.compile(model, fullgraph=True, backend="aot_eager"), src, tgt, masks)
    judge(found, applies(gradient, theirs, src, tgt, masks))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_served_or_refused_as_by_torch() -> None:
    theirs = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    ours = encoder().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with torch.no_grad():
        for found, expected in zip(ours(x).unbind(), theirs(x).unbind(), strict=True):
            assert torch.equal(found, expected)
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
        ours(x)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("default:Support for mismatched:UserWarning")
@pytest.mark.usefixtures("reference")
def test_masks_of_different_types_are_warned_of_once(padded: bool) -> None:
    x = torch.randn(2, 3, 8)
    boolean, floating = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3, 3)
    with pytest.warns(UserWarning, match="mismatched src_key_padding_mask and mask is deprecated") as caught:
        encoder()(x, floating, boolean)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="mismatched src_key_padding_mask and src_mask is deprecated") as caught:
        encoder().layers[0](x, floating, boolean)
    assert len(caught) == 1


X = torch.randn(2, 5, SIZE)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("encoder layer", {"src": torch.randn(2, 5, SIZE + 1)}),
        ("encoder layer", {"src": X, "src_mask": torch.zeros(5, 5).long()}),
        ("encoder layer", {"src": X, "src_mask": torch.zeros(4, 5)}),
        ("encoder layer", {"src": X, "src_key_padding_mask": torch.zeros(2, 5).int()}),
        ("encoder layer", {"src": X, "src_key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}),
        ("encoder layer", {"src": X, "is_causal": True}),
        ("encoder", {"src": X, "mask": torch.zeros(5, 5).long()}),
        ("encoder", {"src": X, "is_causal": True}),
        ("decoder layer", {"tgt": X, "memory": X, "tgt_is_causal": True}),
        ("decoder layer", {"tgt": X, "memory": X[:, :, 1:]}),
        ("decoder", {"tgt": X, "memory": X, "memory_mask": torch.zeros(5, 6)}),
        ("transformer", {"src": X, "tgt": X[:1]}),
        ("transformer", {"src": X, "tgt": X[..., 1:]}),
    ],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_bad_input_gives_the_error_of_torch(kind: str, arguments: dict[str, Any]) -> None:
    errors = []
    for package in (torch.nn, seqkernels.nn):
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            build(package, kind)(**arguments)
        errors.append((type(caught.value), str(caught.value)))
    if "mat1" not in errors[0][1] and "hape" not in errors[0][1]:
        assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("arguments", [(8, 3), (8, 0), (8, 2, 16, 0.1, "tanh"), (8, 2, 16, 2.0)])
def test_constructor_gives_the_error_of_torch(name: str, arguments: tuple[Any, ...]) -> None:
    errors = []
    for package in (torch.nn, seqkernels.nn):
        with pytest.raises((AssertionError, ValueError, RuntimeError)) as caught:
            getattr(package, name)(*arguments)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.usefixtures("reference")
def test_under_autocast() -> None:
    model = functools.partial(encoder().eval(), torch.randn(2, 3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert model().isfinite().all()
