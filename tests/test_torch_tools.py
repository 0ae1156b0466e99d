"""What torch brings for modules, on ours: parametrizations, averaged copies, quantization."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import seqkernels

from .twins import judge


@pytest.mark.parametrize("parametrization", [weight_norm, spectral_norm, orthogonal])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "LSTMCell"])
def test_parametrized_weights_take_the_steps_of_an_optimizer(kind: str, parametrization: Callable[..., Any]) -> None:
    name = "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
    torch.manual_seed(0)
    layer: nn.Module = getattr(nn, kind)(3, 4)
    parametrization(layer, name)
    args: tuple[Any, ...] = (torch.randn(5, 2, 3).double(),)
    if kind.endswith("Cell"):
        args = (args[0][0], tuple(torch.randn(2, 2, 4).double()))

    def trained(ours: bool) -> tuple[list[Tensor], Tensor]:
        model: Any = copy.deepcopy(layer).double().eval()  # in which no look at a spectral norm changes it
        if ours:
            assert len(seqkernels.convert(model).swapped) == 1
        before = getattr(model, name).detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            if not ours and not kind.endswith("Cell"):
                # Torch's layers go on with the weight they had when it was parametrized.
                model._flat_weights = [getattr(model, weight) for weight in model._flat_weights_names]
            model(*args)[0].square().sum().backward()
            optimizer.step()
        return [weight.detach() for weight in model.parameters()], (getattr(model, name) - before).abs().max()

    weights, moved = trained(True)
    assert moved > 1e-3
    torch.testing.assert_close(weights, trained(False)[0])


@pytest.mark.parametrize("decay", [None, 0.9])
def test_averaged_copies(decay: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(seqkernels.nn.GRU(3, 4))
    attention = seqkernels.nn.MultiheadAttention(4, 2)
    model.append(attention)
    average = AveragedModel(model, multi_avg_fn=None if decay is None else get_ema_multi_avg_fn(decay))
    seen = []
    for _ in range(2):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        average.update_parameters(model)
        seen.append(copy.deepcopy(model.state_dict()))
    assert type(average.module[0]) is seqkernels.nn.GRU
    expected = copy.deepcopy(model)
    share = 0.5 if decay is None else 1 - decay
    expected.load_state_dict({name: seen[0][name].lerp(seen[1][name], share) for name in seen[0]})
    for mean, weight in zip(average.module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mean, weight)
    x = torch.randn(5, 2, 3)
    model[0].load_state_dict(average.module[0].state_dict())
    assert torch.equal(average.module[0](x)[0], model[0](x)[0])
    model.load_state_dict(seen[1])
    assert not torch.equal(average.module[0](x)[0], model[0](x)[0])


# Torch's own.
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
def test_quantization_knows_torchs_layers_alone() -> None:
    """As the text of `convert` says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(3, 4)).eval()
    model.append(nn.Linear(4, 2))
    x = torch.randn(5, 2, 3)
    expected = model[0](x)[0]
    seqkernels.convert(model)
    with pytest.warns(UserWarning, match=r"seqkernels\.nn\.LSTM is not quantized, it stays in floating point"):
        quantized = torch.ao.quantization.quantize_dynamic(model)
    assert type(quantized[0]) is seqkernels.nn.LSTM
    assert quantized[0].weight_hh_l0.dtype == torch.float32
    assert "Quantized" in type(quantized[1]).__name__ or "quantized" in type(quantized[1]).__module__
    judge(quantized[0](x)[0], lambda dtype: copy.deepcopy(model[0]).to(dtype)(x.to(dtype))[0])
    seqkernels.revert(model)
    torch.testing.assert_close(model[0](x)[0], expected)
    assert "quantized" in type(torch.ao.quantization.quantize_dynamic(model)[0]).__module__


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "layer", [seqkernels.nn.GRU(3, 4), seqkernels.nn.RNNCell(3, 4), seqkernels.nn.MultiheadAttention(4, 2)]
)
def test_quantization_of_our_layers_is_refused(layer: Any) -> None:
    name = f"seqkernels.nn.{type(layer).__name__}"
    with pytest.raises(TypeError, match=rf"qconfig: expected None, .*: {re.escape(name)} cannot be quantized; call"):
        torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {type(layer)})
    model = nn.Sequential(layer, nn.Linear(4, 4))
    model.qconfig = torch.ao.quantization.default_qconfig
    with pytest.raises(TypeError, match="qconfig: expected None"):
        torch.ao.quantization.prepare(model)
    assert not hasattr(layer, "qconfig")
    with pytest.warns(UserWarning, match="is not quantized"):
        layer.qconfig = None
    assert copy.deepcopy(layer).qconfig is None
    seqkernels.revert(model)
    assert not hasattr(layer, "qconfig")
    seqkernels.convert(model)
    assert not hasattr(layer, "qconfig")


TRANSFORMERS: dict[str, tuple[Callable[[Any], nn.Module], int]] = {
    "encoder layer": (lambda layers: layers.TransformerEncoderLayer(4, 2, 8), 1),
    "pre-norm encoder layer": (lambda layers: layers.TransformerEncoderLayer(4, 2, 8, norm_first=True), 1),
    "decoder layer": (lambda layers: layers.TransformerDecoderLayer(4, 2, 8), 2),
    "transformer": (lambda layers: layers.Transformer(4, 2, 1, 1, 8), 2),
}


# Of torch's encoder, on a path that it does not take.
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_autocast_gives_the_dtypes_of_torch(name: str, dtype: torch.dtype, train: bool) -> None:
    make, count = TRANSFORMERS[name]
    args = [torch.randn(3, 2, 4, dtype=dtype) for _ in range(count)]
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
        ours, theirs = (make(layers).train(train)(*args) for layers in (seqkernels.nn, nn))
    assert ours.dtype == theirs.dtype
