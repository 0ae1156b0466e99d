"""Recurrent cells with the interface of ``torch.nn``'s, run by `seqkernels.functional`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.rnn import RNNCellBase

from .. import functional
from .._recurrent import step
from ..ops.step import step as quick_step
from . import _fx
from ._quantization import Refusal


class _Cell(RNNCellBase):
    """What the cells share: input with or without a batch, states given or absent."""

    qconfig = Refusal()

    def _check(self, input: Tensor, states: dict[str, Tensor]) -> None:
        name = self._get_name()
        for what, tensor in {"input": input, **states}.items():
            if tensor.dim() not in (1, 2):
                raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {tensor.dim()}D instead")

    def _zeros(self, input: Tensor) -> Tensor:
        return input.new_zeros(input.size(0), self.hidden_size)

    def _weights(self) -> tuple[Any, Any, Any, Any]:
        own = self._parameters
        try:
            return own["weight_ih"], own["weight_hh"], own["bias_ih"], own["bias_hh"]
        except KeyError:  # a parametrized weight is no parameter of the cell itself
            return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def _next(self, cell: str, input: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Any, ...] | None:
        """The next states (B, H), or ``None`` where an argument does not fit at first sight."""
        weight_ih, weight_hh, bias_ih, bias_hh = self._weights()
        quick = quick_step(cell, input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
        if quick is not None:
            return quick
        shape, dtype = input.shape, input.dtype
        if len(shape) != 2 or shape[1] != self.input_size or dtype != weight_ih.dtype:
            return None
        hx = None if h is None else (h,) if c is None else (h, c)
        if hx is not None:
            expected = (shape[0], self.hidden_size)
            for state in hx:
                if state.shape != expected or state.dtype != dtype:
                    return None
        return step(cell, input, hx, weight_ih, weight_hh, bias_ih, bias_hh)

    def _kind(self) -> str:
        raise NotImplementedError

    def _step(self, input: Tensor, hx: Tensor) -> Tensor:
        raise NotImplementedError

    def _forward(self, input: Any, hx: Tensor | None) -> Any:
        if isinstance(input, Proxy):
            return _fx.call(input, self, input, hx)
        states = self._next(self._kind(), input, hx, None)
        if states is not None:
            return states[0]
        self._check(input, {} if hx is None else {"hidden": hx})
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else hx.unsqueeze(0)
        result = self._step(input, self._zeros(input) if hx is None else hx)
        return result if batched else result.squeeze(0)


class RNNCell(_Cell):
    """One step of an Elman RNN: drop-in for ``torch.nn.RNNCell``.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        bias: whether there are biases. Default: ``True``.
        nonlinearity: ``"tanh"`` or ``"relu"``. Default: ``"tanh"``.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]  # noqa: RUF012
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def _kind(self) -> str:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return "rnn_tanh" if self.nonlinearity == "tanh" else "rnn_relu"

    def _step(self, input: Tensor, hx: Tensor) -> Tensor:
        return functional.rnn_cell(input, hx, *self._weights(), nonlinearity=self.nonlinearity)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step.

        Args:
            input: (B, I) or (I,).
            hx: hidden state (B, H) or (H,); ``None`` for zeros.

        Returns:
            The next hidden state, in the form of `hx`.

        Raises:
            ValueError, RuntimeError: torch's, where `input` or `hx` does not fit.
        """
        result: Tensor = self._forward(input, hx)
        return result


class LSTMCell(_Cell):
    """One step of an LSTM: drop-in for ``torch.nn.LSTMCell``.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the states.
        bias: whether there are biases. Default: ``True``.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Run one step.

        Args:
            input: (B, I) or (I,).
            hx: hidden and cell state, (B, H) or (H,) each; ``None`` for zeros.

        Returns:
            The next hidden and cell state, in the form of `hx`.

        Raises:
            ValueError, RuntimeError: torch's, where `input` or `hx` does not fit.
        """
        traced: Any = input
        if isinstance(traced, Proxy):
            return _fx.call(traced, self, input, hx)
        if hx is None or len(hx) == 2:
            states = self._next("lstm", input, *(hx or (None, None)))
            if states is not None:
                return states[0], states[1]
        self._check(input, {} if hx is None else {f"hx[{k}]": state for k, state in enumerate(hx)})
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        if hx is None:
            zeros = self._zeros(input)
            hx = (zeros, zeros)
        h, c = functional.lstm_cell(input, hx, *self._weights())
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


class GRUCell(_Cell):
    """One step of a GRU: drop-in for ``torch.nn.GRUCell``; arguments as `LSTMCell`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def _kind(self) -> str:
        return "gru"

    def _step(self, input: Tensor, hx: Tensor) -> Tensor:
        return functional.gru_cell(input, hx, *self._weights())

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step; arguments, result and errors as `RNNCell.forward`."""
        result: Tensor = self._forward(input, hx)
        return result
