"""Models that differ in how long they remember before any training: RNN, GRU, LSTM by their weights, and attention.

Sources: the forget bias of 1 is from Jozefowicz, Zaremba and Sutskever, "An Empirical Exploration of Recurrent Network
Architectures", 2015; forget gates for all distances from Tallec and Ollivier, "Can Recurrent Neural Networks Warp
Time?", 2018.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import seqkernels

INPUTS, HIDDEN = 8, 32
Begin = Callable[[nn.Module, int], None]


class Attention(nn.Module):
    """One query, the last step, on all steps."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(inputs, hidden)
        self.attention = seqkernels.nn.MultiheadAttention(hidden, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """(T, B, I) to (1, B, H)."""
        y = self.embedding(x)
        return self.attention(y[-1:], y, y, need_weights=False)[0], None


def gain(value: float) -> Begin:
    """Recurrent weights of standard deviation `value` / sqrt(H)."""
    return lambda layer, steps: nn.init.normal_(layer.weight_hh_l0, std=value / HIDDEN**0.5)


def orthogonal(layer: nn.Module, steps: int) -> None:
    """Recurrent weights that keep the length of a vector."""
    nn.init.orthogonal_(layer.weight_hh_l0)


@torch.no_grad()
def forget_bias(layer: nn.Module, steps: int) -> None:
    """A bias of 1 for the forget gates."""
    layer.bias_ih_l0[HIDDEN : 2 * HIDDEN], layer.bias_hh_l0[HIDDEN : 2 * HIDDEN] = 1.0, 0.0


@torch.no_grad()
def chrono(layer: nn.Module, steps: int) -> None:
    """Forget gates that keep for 1 to `steps` - 1 steps, and input gates that let in as little as is forgotten."""
    bias = (1 + torch.rand(HIDDEN) * max(0, steps - 2)).log()
    layer.bias_ih_l0[: 2 * HIDDEN], layer.bias_hh_l0[: 2 * HIDDEN] = torch.cat((-bias, bias)), 0.0


def as_torch(layer: nn.Module, steps: int) -> None:
    """The weights that torch draws, too."""


MODELS: dict[str, tuple[Callable[[int, int], nn.Module], Begin]] = {
    "RNN": (seqkernels.nn.RNN, as_torch),
    "RNN, weights x 3.5": (seqkernels.nn.RNN, gain(2.0)),
    "RNN, orthogonal": (seqkernels.nn.RNN, orthogonal),
    "GRU": (seqkernels.nn.GRU, as_torch),
    "LSTM": (seqkernels.nn.LSTM, as_torch),
    "LSTM, forget bias 1": (seqkernels.nn.LSTM, forget_bias),
    "LSTM, forget bias to ln T": (seqkernels.nn.LSTM, chrono),
    "attention": (Attention, as_torch),
}


def make(name: str, steps: int, dtype: torch.dtype) -> nn.Module:
    """A model with new weights, for sequences of `steps`."""
    torch.manual_seed(1)
    kind, begin = MODELS[name]
    model = kind(INPUTS, HIDDEN)
    begin(model, steps)
    return model.to(dtype)
