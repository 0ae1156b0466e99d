"""Layers in graphs of ``torch.fx``: one call of a module each, as those of ``torch.nn``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.utils import _pytree

import seqkernels


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def leaves(value: Any) -> list[Tensor]:
    return [x for x in _pytree.tree_leaves(value) if isinstance(x, Tensor)]


def _mask() -> Tensor:
    return torch.ones(3, 3, dtype=torch.bool).triu(1)


#: A layer, and calls of it.
CASES: dict[str, tuple[Callable[[Any], nn.Module], list[tuple[tuple[Tensor, ...], dict[str, Any]]]]] = {
    "LSTM": (
        lambda layers: layers.LSTM(4, 3, 2, bidirectional=True),
        [((_x(5, 2, 4),), {}), ((_x(5, 2, 4), (_x(4, 2, 3), _x(4, 2, 3))), {})],
    ),
    "GRU": (lambda layers: layers.GRU(4, 3, batch_first=True), [((_x(2, 5, 4), _x(1, 2, 3)), {})]),
    "RNN": (lambda layers: layers.RNN(4, 3), [((_x(5, 2, 4),), {})]),
    "LSTMCell": (lambda layers: layers.LSTMCell(4, 3), [((_x(2, 4),), {}), ((_x(2, 4), (_x(2, 3), _x(2, 3))), {})]),
    "GRUCell": (lambda layers: layers.GRUCell(4, 3), [((_x(2, 4), _x(2, 3)), {})]),
    "RNNCell": (lambda layers: layers.RNNCell(4, 3), [((_x(2, 4),), {})]),
    "MultiheadAttention": (
        lambda layers: layers.MultiheadAttention(4, 2),
        [
            ((_x(3, 2, 4), _x(3, 2, 4), _x(3, 2, 4)), {}),
            ((_x(3, 2, 4), _x(3, 2, 4), _x(3, 2, 4)), {"attn_mask": _mask(), "average_attn_weights": False}),
            ((_x(3, 2, 4), _x(3, 2, 4), _x(3, 2, 4)), {"need_weights": False}),
        ],
    ),
    "TransformerEncoder": (
        lambda layers: layers.TransformerEncoder(layers.TransformerEncoderLayer(4, 2, 8, 0.0), 2),
        [((_x(3, 2, 4),), {"mask": _mask(), "is_causal": True}), ((_x(3, 2, 4),), {})],
    ),
    "TransformerEncoderLayer": (
        lambda layers: layers.TransformerEncoderLayer(4, 2, 8, 0.0),
        [((_x(3, 2, 4), _mask()), {}), ((_x(3, 2, 4),), {})],
    ),
    "TransformerDecoder": (
        lambda layers: layers.TransformerDecoder(layers.TransformerDecoderLayer(4, 2, 8, 0.0), 2),
        [((_x(3, 2, 4), _x(5, 2, 4)), {"tgt_mask": _mask()})],
    ),
    "TransformerDecoderLayer": (
        lambda layers: layers.TransformerDecoderLayer(4, 2, 8, 0.0),
        [((_x(3, 2, 4), _x(5, 2, 4)), {"tgt_mask": _mask(), "tgt_is_causal": True})],
    ),
    "Transformer": (
        lambda layers: layers.Transformer(4, 2, 1, 1, 8, 0.0),
        [((_x(5, 2, 4), _x(3, 2, 4)), {"tgt_mask": _mask(), "tgt_is_causal": True})],
    ),
}


class Call(nn.Module):
    """A layer inside a model, with options that are no inputs."""

    def __init__(self, layer: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer
        for name, value in options.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
        self.options = {name: value for name, value in options.items() if not isinstance(value, Tensor)}

    def named(self) -> dict[str, Any]:
        return {**self.options, **dict(self.named_buffers(recurse=False))}


class One(Call):
    """With one argument."""

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, **self.named())


class Two(Call):
    """With two, of which the second may be a tuple."""

    def forward(self, x: Tensor, y: Any) -> Any:
        return self.layer(x, y, **self.named())


class Three(Call):
    """With three."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:
        return self.layer(x, y, z, **self.named())


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # of torch's encoder
def test_a_layer_is_one_call(kind: str) -> None:
    make, calls = CASES[kind]
    torch.manual_seed(0)
    ours, theirs = make(seqkernels.nn), make(nn)
    theirs.load_state_dict(ours.state_dict())
    for given, options in calls:
        model = (One, Two, Three)[len(given) - 1](ours, options)
        traced = torch.fx.symbolic_trace(model)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer"]
        assert traced.layer is ours
        assert all(map(torch.equal, leaves(traced(*given)), leaves(model(*given))))
        torch.testing.assert_close(leaves(traced(*given)), leaves(theirs(*given, **options)))


def test_options_of_ours() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = seqkernels.nn.LSTM(4, 3, bidirectional=True)

        def forward(self, x: Tensor, lengths: Tensor, reset: Tensor) -> Any:
            return self.lstm(x, None, lengths=lengths, reset=reset, tbptt=2, return_states=True)

    model = Model()
    given = (_x(5, 2, 4), torch.tensor([5, 2]), torch.zeros(5, 2, dtype=torch.bool))
    traced = torch.fx.symbolic_trace(model)
    (node,) = (node for node in traced.graph.nodes if node.op == "call_module")
    assert set(node.kwargs) == {"lengths", "reset", "tbptt", "return_states"}
    assert all(map(torch.equal, leaves(traced(*given)), leaves(model(*given))))


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell", "MultiheadAttention"])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_quantization_is_refused(kind: str) -> None:
    make, calls = CASES[kind]
    (given, options), *_ = calls
    model = (One, Two, Three)[len(given) - 1](make(nn), options).eval()
    assert seqkernels.convert(model).swapped
    mapping = QConfigMapping().set_global(default_dynamic_qconfig)
    with pytest.raises(TypeError, match=rf"qconfig: expected None, got .*seqkernels\.nn\.{kind} cannot be quantized"):
        prepare_fx(model, mapping, given)
