"""``convert`` changes the type of a module and nothing else, and ``revert`` changes it back."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

import seqkernels
from seqkernels import convert, revert

from .twins import applies, cast, judge, same

KINDS: dict[str, Callable[[], torch.nn.Module]] = {
    "RNN": lambda: torch.nn.RNN(3, 4, 2, "relu", dropout=0.1),
    "LSTM": lambda: torch.nn.LSTM(3, 4, 2, proj_size=2),
    "GRU": lambda: torch.nn.GRU(3, 4, bidirectional=True, bias=False),
    "RNNCell": lambda: torch.nn.RNNCell(3, 4, nonlinearity="relu"),
    "LSTMCell": lambda: torch.nn.LSTMCell(3, 4, bias=False),
    "GRUCell": lambda: torch.nn.GRUCell(3, 4),
    "MultiheadAttention": lambda: torch.nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True),
}


def call(kind: str, module: Any) -> Any:
    """Results of a module in its own dtype, for the same numbers."""
    generator = torch.Generator().manual_seed(0)
    x, q = (cast(torch.randn(5, 2, n, generator=generator), next(module.parameters()).dtype) for n in (3, 4))
    if kind == "MultiheadAttention":
        return module(q, x, x, need_weights=False)[0]
    return module(x[0]) if kind.endswith("Cell") else module(x)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_type_changes(kind: str) -> None:
    torch.manual_seed(0)
    module = KINDS[kind]().eval()
    module.note = "kept"
    module.register_buffer("buffer", torch.ones(1))
    parameters = dict(module.named_parameters())
    next(iter(parameters.values())).requires_grad_(False)
    seen: list[str] = []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.register_forward_pre_hook(lambda *_: seen.append("pre"))
    module.register_state_dict_post_hook(lambda *_: seen.append("state_dict"))
    twin, expected = copy.deepcopy(module), call(kind, module)
    names, text, attributes = list(module.state_dict()), repr(module), set(vars(module))

    report = convert(module)
    assert report.swapped == [("", f"torch.nn.{kind}", f"seqkernels.nn.{kind}")]
    assert type(module) is getattr(seqkernels.nn, kind)
    assert {name: id(p) for name, p in module.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert [p.requires_grad for p in module.parameters()] == [False] + [True] * (len(parameters) - 1)
    assert (module.training, module.note, list(module.state_dict()), repr(module)) == (False, "kept", names, text)
    seen.clear()
    found = call(kind, module)
    assert seen == ["pre", "forward"]
    judge(found, applies(functools.partial(call, kind), twin))

    report = revert(module)
    assert report.swapped == [("", f"seqkernels.nn.{kind}", f"torch.nn.{kind}")]
    assert type(module) is getattr(torch.nn, kind)
    assert set(vars(module)) == attributes
    assert {name: id(p) for name, p in module.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert same(call(kind, module), expected)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.LSTM(3, 4)
        self.shared = self.encoder
        self.inner = torch.nn.ModuleDict({"cell": torch.nn.GRUCell(4, 4), "linear": torch.nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.encoder(x)
        again, _ = self.shared(x)
        return self.inner["linear"](self.inner["cell"]((output + again)[-1]))


def test_report_of_a_model() -> None:
    model = Model()
    report = convert(model)
    assert [swap.name for swap in report.swapped] == ["encoder", "inner.cell"]
    assert report.left == []
    assert model.shared is model.encoder
    assert str(report).splitlines() == [
        "swapped 2, left 0",
        "  encoder: torch.nn.LSTM -> seqkernels.nn.LSTM",
        "  inner.cell: torch.nn.GRUCell -> seqkernels.nn.GRUCell",
    ]


def test_twice_is_once() -> None:
    model = Model()
    convert(model)
    assert convert(model) == seqkernels.Report()
    revert(model)
    assert revert(model) == seqkernels.Report()


def test_dry_run_changes_nothing() -> None:
    model = Model()
    report = convert(model, dry_run=True)
    assert str(report).startswith("would swap 2, left 0")
    assert type(model.encoder) is torch.nn.LSTM
    assert convert(model).swapped == report.swapped


def test_an_optimizer_built_before_goes_on() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(5, 2, 3)

    def train(model: Model, x: Tensor, between: Callable[[Model], object] | None = None) -> dict[str, Tensor]:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        if between is not None:
            between(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return model.state_dict()

    judge(train(copy.deepcopy(model), x, convert), applies(train, model, x))


class Mine(torch.nn.LSTM):
    pass


class Own(torch.nn.RNNBase):
    pass


@pytest.mark.parametrize("swap", [seqkernels.convert, seqkernels.revert])
def test_what_is_no_model(swap: Any) -> None:
    for given, said in ((None, "NoneType"), (torch.nn.LSTM, "the class LSTM"), ({"a": torch.nn.LSTM(2, 3)}, "dict")):
        with pytest.raises(TypeError, match=f"^model: expected a Module, got {said}$"):
            swap(given)


def test_what_is_left_and_why() -> None:
    patched = torch.nn.GRU(3, 4)
    patched.forward = patched.forward
    model = torch.nn.ModuleList([Mine(3, 4), Own("GRU", 3, 4), patched, seqkernels.nn.GRU(3, 4)])
    report = convert(model)
    assert report.swapped == []
    assert report.left == [
        ("0", f"{__name__}.Mine", "a subclass of torch.nn.LSTM"),
        ("1", f"{__name__}.Own", "a type without a twin"),
        ("2", "torch.nn.GRU", "its forward is replaced on the instance"),
    ]
    assert f"0: {__name__}.Mine left: a subclass of torch.nn.LSTM" in str(report)
    assert [type(module) for module in model[:3]] == [Mine, Own, torch.nn.GRU]


def test_subclasses_of_ours_stay_in_a_revert() -> None:
    class Ours(seqkernels.nn.LSTM):
        pass

    model = torch.nn.ModuleList([Ours(3, 4), torch.nn.LSTM(3, 4), Mine(3, 4)])
    assert [(left.name, left.reason) for left in revert(model).left] == [("0", "a subclass of seqkernels.nn.LSTM")]
    assert [left.name for left in convert(model).left] == ["2"]


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_parametrized_modules(kind: str) -> None:
    torch.manual_seed(0)
    name = "weight_ih" if kind.endswith("Cell") else "weight_ih_l0"
    module: Any = getattr(torch.nn, kind)(3, 4)
    weight_norm(module, name)
    twin, expected = copy.deepcopy(module), call(kind, module)
    derived = type(module)
    assert convert(module).swapped == [("", f"torch.nn.{kind}", f"seqkernels.nn.{kind}")]
    assert isinstance(module, getattr(seqkernels.nn, kind))
    assert is_parametrized(module, name)
    assert type(module).__name__ == derived.__name__
    output = call(kind, module)
    judge(output, applies(functools.partial(call, kind), twin))
    assert same(call(kind, copy.deepcopy(module)), output)
    grads = torch.autograd.grad(output[0].sum(), list(module.parametrizations[name].parameters()))
    assert all(grad.any() for grad in grads)
    assert convert(module).swapped == []
    revert(module)
    assert isinstance(module, getattr(torch.nn, kind))
    assert same(call(kind, module), expected)
    convert(module)
    remove_parametrizations(module, name)
    assert type(module) is getattr(seqkernels.nn, kind)


def test_copies_of_a_converted_model() -> None:
    torch.manual_seed(0)
    model = Model()
    convert(model)
    x = torch.randn(5, 2, 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.encoder) is seqkernels.nn.LSTM
        assert torch.equal(twin(x), model(x))
        revert(twin)
        assert type(twin.encoder) is torch.nn.LSTM
        judge(model(x), applies(twin, x))
    assert type(model.encoder) is seqkernels.nn.LSTM


def test_a_reverted_layer_follows_its_weights() -> None:
    layer = torch.nn.GRU(3, 4)
    convert(layer)
    layer.weight_hh_l0 = torch.nn.Parameter(torch.zeros(12, 4))
    revert(layer)
    assert layer._flat_weights[1] is layer.weight_hh_l0
    x = torch.randn(5, 2, 3)
    twin = torch.nn.GRU(3, 4)
    twin.load_state_dict(layer.state_dict())
    assert same(layer(x), twin(x))


TRANSFORMERS: dict[str, Callable[[], torch.nn.Module]] = {
    "TransformerEncoderLayer": lambda: torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    "TransformerDecoderLayer": lambda: torch.nn.TransformerDecoderLayer(4, 2, 8, norm_first=True),
    "TransformerEncoder": lambda: torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, torch.nn.LayerNorm(4)
    ),
    "TransformerDecoder": lambda: torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(4, 2, 8), 1),
    "Transformer": lambda: torch.nn.Transformer(4, 2, 1, 1, 8, batch_first=True),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers(kind: str) -> None:
    torch.manual_seed(0)
    module: Any = TRANSFORMERS[kind]().eval()
    inputs = [torch.randn(3, 3, 4) for _ in range(1 if "Encoder" in kind else 2)]
    # torch's fast path would cut padding off.
    masks = {"src_key_padding_mask": torch.arange(3) > torch.tensor([[1], [2], [2]])} if "Enc" in kind else {}
    before = {name: type(part) for name, part in module.named_modules()}
    parameters = {name: id(p) for name, p in module.named_parameters()}
    attributes, text, twin = set(vars(module)), repr(module), copy.deepcopy(module).train()
    for part in twin.modules():
        if isinstance(part, (torch.nn.Dropout, torch.nn.MultiheadAttention)):
            part.p = part.dropout = 0.0

    report = convert(module)
    swapped = {name: cls for name, cls in before.items() if hasattr(seqkernels.nn, cls.__name__)}
    assert [swap.name for swap in report.swapped] == list(swapped)
    assert not report.left
    assert not report.notes
    for name, cls in swapped.items():
        assert type(module.get_submodule(name)) is getattr(seqkernels.nn, cls.__name__)
    assert {name: id(p) for name, p in module.named_parameters()} == parameters
    assert repr(module) == text
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            found = module(*inputs, **masks)
        judge(found, applies(lambda model, inputs, masks: model(*inputs, **masks), twin, inputs, masks))
    assert convert(module) == seqkernels.Report()
    assert same(pickle.loads(pickle.dumps(module))(*inputs, **masks), found)

    report = revert(module)
    assert [swap.name for swap in report.swapped] == list(swapped)
    assert {name: type(part) for name, part in module.named_modules()} == before
    assert set(vars(module)) == attributes
    assert {name: id(p) for name, p in module.named_parameters()} == parameters
    judge(module(*inputs), applies(twin, *inputs))


def test_what_was_built_from_ours_can_be_reverted() -> None:
    torch.manual_seed(0)
    layer = seqkernels.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = seqkernels.nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 4), torch.arange(5) > torch.tensor([[2], [3]])
    expected = model(x, src_key_padding_mask=padding)
    revert(model)
    assert {type(part).__module__.partition(".")[0] for part in model.modules()} == {"torch"}
    with torch.no_grad():
        assert model(x, src_key_padding_mask=padding).shape == expected.shape


class Encoder(torch.nn.TransformerEncoderLayer):
    pass


def test_subclasses_of_transformer_layers_come_with_a_note() -> None:
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoder(Encoder(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 3, 4)
    twin = copy.deepcopy(model)
    report = convert(model)
    assert [swap.name for swap in report.swapped] == ["", "layers.0.self_attn", "layers.1.self_attn"]
    assert [left.reason for left in report.left] == ["a subclass of torch.nn.TransformerEncoderLayer"] * 2
    assert len(report.notes) == 2
    assert report.notes[0].startswith("layers.0: in eval mode without gradients this Encoder may take torch's fused")
    assert report.notes[0] in str(report)
    judge(model(x), applies(twin, x))


def test_compiled_models_can_be_converted() -> None:
    layer = torch.nn.LSTM(3, 4)
    compiled = torch.compile(layer, backend="eager")
    convert(compiled)
    assert type(layer) is seqkernels.nn.LSTM


OPTIONS = {
    "zoneout": 0.1,
    "recurrent_dropout": 0.1,
    "layer_norm": True,
    "peephole": True,
    "learn_reset_state": True,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_layer_with_an_option_stays_in_a_revert(option: str) -> None:
    layer = seqkernels.nn.LSTM(3, 4, **{option: OPTIONS[option]})
    report = seqkernels.revert(layer)
    assert type(layer) is seqkernels.nn.LSTM
    assert [(left.name, left.reason) for left in report.left] == [("", f"torch.nn has no {option}")]
