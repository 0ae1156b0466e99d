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

from seqkernels.integrations.opacus import register  # noqa: E402

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


def test_options_that_opacus_lacks_are_named() -> None:
    register()
    model = nn.Sequential(
        seqkernels.nn.LSTM(3, 4, proj_size=2, zoneout=(0.0, 0.5)),
        seqkernels.nn.MultiheadAttention(4, 2, batch_first=True),
    )
    fixed = ModuleValidator.fix(model)
    assert [type(layer) for layer in fixed] == [seqkernels.nn.LSTM, seqkernels.nn.MultiheadAttention]
    assert [str(error) for error in ModuleValidator.validate(fixed)] == [
        "seqkernels.nn.LSTM: Opacus has no right layer with proj_size, zoneout",
        "seqkernels.nn.MultiheadAttention: Opacus has no right layer with batch_first",
    ]
