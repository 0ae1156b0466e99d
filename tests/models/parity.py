"""The same model with the layers of torch and of seqkernels: the same after training too."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import seqkernels
from seqkernels.testing import assert_within_budget, threads

STEPS = 50
#: A model with the same weights whatever the layers and the dtype.
Make = Callable[[ModuleType, torch.dtype], Any]
#: The loss of a model in a step, with the rows of the batch rolled so far: the same but for rounding.
Loss = Callable[[Any, int, int], Tensor]


def trained(model: torch.nn.Module, loss: Loss, rate: float, roll: int = 0) -> tuple[Tensor, list[float]]:
    """All parameters after `STEPS` steps of SGD with momentum, and the losses.

    Not of Adam: it divides gradients that are zero but for rounding, as those of the biases of keys, by their size.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(model, step, roll)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), losses


@threads(1)
def assert_same_training(make: Make, loss: Loss, rate: float) -> None:
    """Assert that training ends where torch's does, in float64 and, as far as rounding lets it, in float32.

    Rounding errors grow while a model trains, those of torch as well: the bound is what they become in torch. They grow
    along few directions, so that one training may be exact by luck: torch's is the least exact of three.
    """
    oracle, losses = trained(make(torch.nn, torch.float64), loss, rate)
    assert losses[-1] < 0.8 * losses[0], f"it has to learn, and had losses from {losses[0]} to {losses[-1]}"
    baselines = [trained(make(torch.nn, torch.float32), loss, rate, roll)[0] for roll in range(3)]
    for dtype in (torch.float64, torch.float32):
        actual, _ = trained(make(seqkernels.nn, dtype), loss, rate)
        assert_within_budget(actual, oracle, baselines, f"parameters after {STEPS} steps")
