"""A forecaster of series: a recurrent layer that reads the values so far, and a linear map to the next ones."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as seqkernels_nn
from ._model import CELLS, Model, check_choice, check_dropout, check_sizes, check_tensor, integer


@dataclass(frozen=True)
class ForecasterConfig:
    """Sizes of a `Forecaster`.

    Attributes:
        features: F, series that are read and forecast together.
        horizon: K, steps that are forecast at once.
        hidden_size: units of the recurrent layer.
        num_layers: recurrent layers.
        cell: ``"rnn"`` (Elman's, with tanh), ``"lstm"`` or ``"gru"``.
        dropout: probability with which a feature is dropped between the parts in training.

    Raises:
        ValueError: the message names the attribute, what it was and what is allowed.
        TypeError: likewise, of an attribute of another type.
    """

    features: int = 1
    horizon: int = 1
    hidden_size: int = 64
    num_layers: int = 1
    cell: str = "lstm"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, "features", "horizon", "hidden_size", "num_layers")
        check_choice(self, "cell", CELLS)
        check_dropout(self.dropout)


class Forecaster(Model):
    """Recurrent regression, written once for the layers of torch and of seqkernels.

    After each step it forecasts the next K values at once, each as the last value and a change. A model whose output
    is zero is therefore the naive forecast, and a trend goes on beyond the values seen in training. Values should be
    of the order of 1.

    B batch, T steps, F features, K steps of a forecast.

    Args:
        config: the sizes.
        layers: ``seqkernels.nn`` or ``torch.nn``: whose RNN, GRU or LSTM to use.

    Raises:
        ValueError: `layers` is neither.
    """

    Config = ForecasterConfig
    config: ForecasterConfig

    def __init__(self, config: ForecasterConfig, layers: ModuleType = seqkernels_nn) -> None:
        super().__init__(config, layers)
        size, between = config.hidden_size, config.dropout if config.num_layers > 1 else 0.0
        layer = getattr(layers, config.cell.upper())
        self.recurrent = layer(config.features, size, config.num_layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(size, config.horizon * config.features)

    def read(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Forecast after each step of a piece of the series.

        Args:
            x: (B, T, F), of the dtype of the model.
            state: from the call on the piece before; ``None`` at the beginning.

        Returns:
            The forecasts (B, T, K, F) and the state after the last step.

        Raises:
            ValueError: `x` has another shape, or no steps.
            TypeError: `x` is no tensor.
        """
        self._check(x)
        hidden, state = self.recurrent(x, state)
        change = self.output(self.dropout(hidden)).unflatten(-1, (self.config.horizon, self.config.features))
        return x.unsqueeze(2) + change, state

    def forward(self, x: Tensor) -> Tensor:
        """Forecast after each step.

        Args:
            x: (B, T, F), of the dtype of the model.

        Returns:
            (B, T, K, F): element k behind step t stands for step ``t + 1 + k``.

        Raises:
            ValueError: `x` has another shape, or no steps.
            TypeError: `x` is no tensor.
        """
        return self.read(x)[0]

    @torch.no_grad()
    def forecast(self, x: Tensor, steps: int) -> Tensor:
        """Continue series. Beyond K steps, forecasts are read as if they were values, K at a time.

        Call ``eval()`` before, or dropout is active.

        Args:
            x: (B, T, F), of the dtype of the model.
            steps: how many to forecast.

        Returns:
            (B, steps, F).

        Raises:
            ValueError: `x` has another shape, or no steps; or `steps` is negative.
            TypeError: `x` is no tensor, or `steps` no integer.
        """
        self._check(x)
        steps = integer(steps, "steps")
        if steps < 0:
            raise ValueError(f"steps: expected at least 0, got {steps}")
        state, parts = None, [x.new_empty(len(x), 0, self.config.features)]
        for _ in range(0, steps, self.config.horizon):
            found, state = self.read(x, state)
            x = found[:, -1]
            parts.append(x)
        return torch.cat(parts, dim=1)[:, :steps]

    def _check(self, x: Tensor) -> None:
        check_tensor(x, "x")
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != self.config.features:
            raise ValueError(f"x: expected (B, T, {self.config.features}) with T at least 1, got {tuple(x.shape)}")
