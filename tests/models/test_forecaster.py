"""The forecaster with the layers of torch and of seqkernels: same weights, results, gradients and training.

Two cells whose numbers were once worked out by hand come out of the layers, too.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels.models import Forecaster, ForecasterConfig
from seqkernels.testing import assert_within_budget

CELLS = ("rnn", "gru", "lstm")
LAYERS = [torch.nn, seqkernels.nn]


def config(cell: str, **others: Any) -> ForecasterConfig:
    return ForecasterConfig(**{"features": 2, "horizon": 3, "hidden_size": 10, "num_layers": 2, **others, "cell": cell})


def make(cell: str, layers: ModuleType, dtype: torch.dtype = torch.float32, **others: Any) -> Forecaster:
    torch.manual_seed(3)
    return Forecaster(config(cell, **others), layers).to(dtype)


def series(length: int = 15) -> Tensor:
    """Waves (4, length, 2)."""
    generator = torch.Generator().manual_seed(4)
    phase, speed = 6 * torch.rand(4, 1, 2, generator=generator), 0.3 + torch.rand(4, 1, 2, generator=generator)
    return (phase + speed * torch.arange(length).view(1, -1, 1)).sin()


def loss_of(model: Forecaster) -> Tensor:
    """Mean square error of the forecasts of all horizons."""
    x = series().to(model.output.weight.dtype)
    later = x[:, 1:].unfold(1, 3, 1).transpose(2, 3)
    return (model(x)[:, : later.shape[1]] - later).square().mean()


def results(model: Forecaster) -> dict[str, Tensor]:
    """The forecasts and all gradients."""
    found = model(series().to(model.output.weight.dtype))
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    found.backward(grad.to(found.dtype))
    return {"forecasts": found.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_both_give_the_same_forecasts_and_gradients(cell: str, dtype: torch.dtype) -> None:
    oracle, baseline = results(make(cell, torch.nn, torch.float64)), results(make(cell, torch.nn))
    actual = results(make(cell, seqkernels.nn, dtype))
    assert actual.keys() == oracle.keys() == {"forecasts", *dict(make(cell, torch.nn).named_parameters())}
    for name, value in actual.items():
        assert value.dtype == dtype
        assert_within_budget(value, oracle[name], baseline[name], name)


@pytest.mark.parametrize("cell", CELLS)
def test_both_are_the_same_after_training(cell: str) -> None:
    found = []
    for layers, dtype in ((seqkernels.nn, torch.float32), (torch.nn, torch.float64), (torch.nn, torch.float32)):
        model = make(cell, layers, dtype)
        # With momentum, or larger steps, a rounding grows from step to step, and the RNN's training is chaos.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(50):
            loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_within_budget(*found, "parameters")


@pytest.mark.parametrize("cell", CELLS)
def test_forecasts_are_read_as_values(cell: str) -> None:
    """A state carried from piece to piece gives what reading everything again gives."""
    for dtype in (torch.float32, torch.float64):
        found, known = make(cell, seqkernels.nn, dtype).forecast(series().to(dtype), 7), []
        for kind in (torch.float64, torch.float32):
            model, x = make(cell, torch.nn, kind), series().to(kind)
            for _ in range(3):
                x = torch.cat((x, model(x)[:, -1].detach()), dim=1)
            known.append(x[:, 15:22])
        assert found.shape == (4, 7, 2)
        assert_within_budget(found, *known, "forecasts")


def test_an_output_of_zero_is_the_naive_forecast() -> None:
    model = make("gru", seqkernels.nn)
    for parameter in model.output.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model(series()), series()[:, :, None].expand(-1, -1, 3, -1))
    assert torch.equal(model.forecast(series(), 5), series()[:, -1:].expand(-1, 5, -1))
    assert model.forecast(series(), 0).shape == (4, 0, 2)


def test_equal_seeds_drop_the_same() -> None:
    found = []
    for layers, dtype in ((seqkernels.nn, torch.float32), (torch.nn, torch.float64), (torch.nn, torch.float32)):
        model = make("lstm", layers, dtype, dropout=0.4)
        torch.manual_seed(6)
        found.append(model(series().to(dtype)).detach())
    assert_within_budget(*found, "forecasts")
    assert not torch.equal(found[0], make("lstm", seqkernels.nn)(series()))


def test_a_file_gives_the_same_model_with_either_layers(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = make("gru", seqkernels.nn)
    model.save(tmp_path / "model.safetensors")
    for layers in LAYERS:
        found = Forecaster.load(tmp_path / "model.safetensors", layers)
        assert found.config == model.config
        for name, parameter in found.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name))


def test_a_neuron_of_two_inputs() -> None:
    """tanh of a weighted sum and a linear output, for the numbers 1 and 2, with the weights of seed 42."""
    draws = np.random.RandomState(42).randn(6)
    hidden, output = seqkernels.nn.RNN(2, 1, dtype=torch.float64), nn.Linear(1, 1, dtype=torch.float64)
    w1, w2, b1, b2, w3, b3 = torch.from_numpy(draws)
    with torch.no_grad():
        hidden.weight_ih_l0.copy_(torch.stack((w1, w2))[None])
        hidden.bias_ih_l0.copy_(b1)
        hidden.bias_hh_l0.copy_(b2)
        output.weight.copy_(w3)
        output.bias.copy_(b3)
        h, _ = hidden(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
        y = output(h)
    # Printed with eight digits.
    assert f"{h.item():.8f} {b3.item():.8f} {y.item():.8f}" == "0.98337764 -0.23413696 -0.46439815"


def _by_hand(weights: dict[str, Tensor], x: Tensor, h: Tensor) -> Tensor:
    """The recurrence written out, and its sigmoid output."""
    for value in x:
        h = torch.tanh(weights["W_hh"] * h + weights["W_xh"] * value + weights["b_h"])
    return torch.sigmoid(weights["W_hy"] * h + weights["b_y"])


def _by_kernels(weights: dict[str, Tensor], x: Tensor, h: Tensor) -> Tensor:
    """The same by the layer's function."""
    flat = [weights[name].view(1, 1) for name in ("W_xh", "W_hh")] + [weights["b_h"].view(1), x.new_zeros(1)]
    output, _ = seqkernels.functional.rnn(x.view(-1, 1, 1), h.view(1, 1, 1), flat, True, 1, 0.0, True, False, False)
    return torch.sigmoid(weights["W_hy"] * output[-1, 0, 0] + weights["b_y"])


def _one_step(forward: Any, values: list[float], h: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradients and weights after a step of Adam: the five of W_xh, W_hh, b_h, W_hy and b_y."""
    names = ("W_xh", "W_hh", "b_h", "W_hy", "b_y")
    weights = {n: torch.tensor(v, dtype=dtype, requires_grad=True) for n, v in zip(names, values, strict=True)}
    optimizer = torch.optim.Adam(weights.values(), lr=0.1)
    y = forward(weights, torch.tensor([1, 5, 7, 4], dtype=dtype), torch.tensor(h, dtype=dtype))
    loss = nn.functional.mse_loss(y, torch.tensor(15, dtype=dtype))
    loss.backward()
    grads = torch.stack([w.grad for w in weights.values() if w.grad is not None])
    optimizer.step()
    return loss.detach(), grads, torch.stack([w.detach() for w in weights.values()])


def test_a_step_of_a_recurrence_written_out() -> None:
    """Its weights are so large that tanh is -1 to the last bit: nothing inside the recurrence has a gradient."""
    loss, grads, weights = _one_step(_by_kernels, [-10, 10, 0, 4, 5], -1, torch.float32)
    known = _one_step(_by_hand, [-10, 10, 0, 4, 5], -1, torch.float32)
    assert f"{loss:.4f}" == "203.6027"
    for actual, expected in zip((loss, grads, weights), known, strict=True):
        assert torch.equal(actual, expected)
    assert grads[:3].eq(0).all()
    assert grads[3:].ne(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_where_tanh_has_a_slope(dtype: torch.dtype) -> None:
    values = [-0.1, 1.1, 0.2, 0.4, 0.5]
    found = _one_step(_by_kernels, values, -0.3, dtype)
    oracle, baseline = (_one_step(_by_hand, values, -0.3, kind) for kind in (torch.float64, torch.float32))
    assert oracle[1].ne(0).all()
    for name, *parts in zip(("loss", "gradients", "weights"), found, oracle, baseline, strict=True):
        assert_within_budget(*parts, name)


BAD: dict[str, dict[str, Any]] = {
    "features: expected a positive number, got 0": {"features": 0},
    "horizon: expected a positive number, got -1": {"horizon": -1},
    "hidden_size: expected a positive number": {"hidden_size": 0},
    "num_layers: expected a positive number": {"num_layers": 0},
    "cell: expected one of 'rnn', 'lstm', 'gru', got 'LSTM'": {"cell": "LSTM"},
    "dropout: expected 0 <= dropout < 1, got 1": {"dropout": 1.0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_sizes(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForecasterConfig(**BAD[message])


def test_bad_arguments() -> None:
    model = make("rnn", seqkernels.nn)
    with pytest.raises(ValueError, match=r"layers: expected torch\.nn or seqkernels\.nn, got torch"):
        Forecaster(model.config, torch)
    for shape in ((15, 2), (4, 0, 2), (4, 15, 1)):
        with pytest.raises(ValueError, match=r"x: expected \(B, T, 2\) with T at least 1, got"):
            model(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"x: expected \(B, T, 2\) with T at least 1, got"):
            model.forecast(torch.zeros(shape), 0)
    with pytest.raises(ValueError, match="steps: expected at least 0, got -1"):
        model.forecast(series(), -1)
