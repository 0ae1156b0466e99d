"""Gradients of each sample by Opacus, of models with layers of seqkernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqkernels
from seqkernels.testing import assert_within_budget

opacus = pytest.importorskip("opacus")

from opacus.validators import ModuleValidator  # noqa: E402

from seqkernels.integrations.opacus import register, sample_gradients  # noqa: E402

# Of Opacus' hooks on a model whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


class Recurrent(nn.Module):
    """Outputs and final states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = seqkernels.nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
        self.gru = seqkernels.nn.GRU(8, 4, batch_first=True)
        self.rnn = seqkernels.nn.RNN(4, 3, nonlinearity="relu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x, (_, c_n) = self.lstm(x)
        x, h_n = self.gru(x)
        return self.rnn(x)[0].sum((1, 2)) + h_n.square().sum((0, 2)) + c_n.square().sum((0, 2))


class Attention(nn.Module):
    """(T, B, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = seqkernels.nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].square().sum((0, 2))


def one_by_one(model: nn.Module, x: Tensor, dim: int) -> list[Tensor]:
    weights = list(model.parameters())
    found = [torch.autograd.grad(model(row).sum(), weights) for row in x.split(1, dim)]
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def of_torch(name: str, of_opacus: dict[str, Any]) -> Tensor:
    """What Opacus found for a weight of torch's layer, of which it may have made three."""
    if name in of_opacus:
        return of_opacus[name].grad_sample
    layer, _, weight = name.rpartition(".in_proj_")
    return torch.cat([of_opacus[f"{layer}.{part}linear.{weight}"].grad_sample for part in "qkv"], 1)


@pytest.mark.parametrize(("kind", "dim"), [(Recurrent, 0), (Attention, 1)])
def test_gradients_of_each_sample(kind: type[nn.Module], dim: int) -> None:
    register()
    register()
    torch.manual_seed(0)
    model = kind()
    x = torch.randn(3, 5, 4 if dim else 3)
    own, exact = one_by_one(model, x, dim), one_by_one(copy.deepcopy(model).double(), x.double(), dim)
    errors = [str(error) for error in ModuleValidator.validate(model)]
    assert len(errors) == len(list(model.children()))
    assert all(error.startswith("seqkernels.nn.") and "call ModuleValidator.fix" in error for error in errors)
    fixed = ModuleValidator.fix(model)
    assert not ModuleValidator.validate(fixed)
    wrapped: Any = opacus.GradSampleModule(fixed, batch_first=dim == 0, loss_reduction="sum")
    wrapped(x).sum().backward()
    found = {name.removeprefix("_module."): weight for name, weight in wrapped.named_parameters()}
    # All at once: an error of one weight's gradient alone may be zero by luck.
    vectors = [[of_torch(name, found) for name, _ in model.named_parameters()], exact, own]
    assert_within_budget(*(torch.cat([part.flatten() for part in parts]) for parts in vectors))


def test_dtypes_and_frozen_weights_stay() -> None:
    register()
    model = nn.Sequential(
        seqkernels.nn.LSTM(4, 4, bidirectional=True),
        seqkernels.nn.MultiheadAttention(4, 2, add_bias_kv=True),
        seqkernels.nn.MultiheadAttention(4, 2, kdim=3),
    ).double()
    for name in ("0.weight_ih_l0_reverse", "0.bias_hh_l0", "1.in_proj_weight", "1.bias_k", "2.k_proj_weight"):
        model.get_parameter(name).requires_grad_(False)
    fixed = ModuleValidator.fix(model)
    assert {weight.dtype for weight in fixed.parameters()} == {torch.float64}
    assert {name for name, weight in fixed.named_parameters() if not weight.requires_grad} == {
        "0.weight_ih_l0_reverse",
        "0.bias_hh_l0",
        *(f"1.{part}linear.weight" for part in "qkv"),
        "1.seq_bias_k.bias",
        "2.klinear.weight",
    }


def test_options_that_opacus_lacks_are_named() -> None:
    register()
    model = nn.Sequential(
        seqkernels.nn.LSTM(3, 4, proj_size=2, zoneout=(0.0, 0.5)),
        seqkernels.nn.MultiheadAttention(4, 2, batch_first=True),
        seqkernels.nn.GRUCell(3, 4),
    )
    fixed = ModuleValidator.fix(model)
    assert [type(layer) for layer in fixed] == [type(layer) for layer in model]
    assert [str(error) for error in ModuleValidator.validate(fixed)] == [
        "seqkernels.nn.LSTM: Opacus has no right layer with proj_size, zoneout",
        "seqkernels.nn.MultiheadAttention: Opacus has no right layer with batch_first",
        "seqkernels.nn.GRUCell: Opacus has hooks for its own cells only; use sample_gradients",
    ]


def test_gradients_of_each_sample_by_our_own_layers() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    model.unused = nn.Linear(2, 2)
    frozen = model.gru.weight_hh_l0.requires_grad_(False)
    x, target = torch.randn(4, 5, 3), torch.randn(4)

    def loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return (model(x) - target).square().sum()

    wrapped = opacus.grad_sample.GradSampleModuleNoOp(model, batch_first=True, loss_reduction="sum")
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        expected_batch_size=4,
        loss_reduction="sum",
    )
    losses = sample_gradients(wrapped, loss, x, target)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    torch.testing.assert_close(losses, (model(x) - target).square().detach(), rtol=1e-5, atol=1e-6)
    rows = [[torch.zeros_like(weight) for weight in weights.values()] for _ in range(4)]
    for row, grads in enumerate(rows):
        loss(model, x[row : row + 1], target[row : row + 1]).backward()
        for number, weight in enumerate(weights.values()):
            if weight.grad is not None:
                grads[number], weight.grad = weight.grad, None
    for number, (name, weight) in enumerate(weights.items()):
        assert torch.equal(weight.grad_sample, torch.stack([grads[number] for grads in rows])), name
    assert not hasattr(frozen, "grad_sample") or frozen.grad_sample is None

    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer.step()
    norms = [torch.cat([grad.flatten() for grad in grads]).norm() for grads in rows]
    for number, (name, weight) in enumerate(weights.items()):
        clipped = sum(
            grads[number] * min(1.0, 0.5 / (norm.item() + 1e-6)) for grads, norm in zip(rows, norms, strict=True)
        )
        torch.testing.assert_close(weight, before[name] - 0.1 * clipped)


def test_samples_and_losses_are_checked() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"batch: expected tensors with one number of samples, got \[2, 3\]"):
        sample_gradients(model, lambda *_: torch.zeros(()), torch.zeros(2, 2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"batch: .* got none"):
        sample_gradients(model, lambda *_: torch.zeros(()))
    with pytest.raises(ValueError, match=r"loss: expected one number, got \(1, 2\)"):
        sample_gradients(model, lambda model, x: model(x), torch.zeros(2, 2))
    assert sample_gradients(model, lambda model, x: model(x).sum(), torch.zeros(0, 2)).shape == (0,)
    assert model.weight.grad_sample.shape == (0, 2, 2)
