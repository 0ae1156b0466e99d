"""Recurrent layers and cells with the interface of ``torch.nn``'s, run by `seqkernels.functional`.

They subclass ``RNNBase`` and ``RNNCellBase`` rather than ``torch.nn.LSTM`` and its like, because Dynamo breaks the
graph at those types; ``isinstance(layer, torch.nn.LSTM)`` is therefore false. TorchScript does not compile them. The
output of a layer in one direction is memory that its backward pass reads: while gradients are recorded, modifying it
in place is an error, as it is for torch's LSTM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from .. import functional


class _Layer(RNNBase):
    """What RNN, LSTM and GRU share: one forward pass for every form of input, over weights read by name."""

    _input_error = ""

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """The weights as they are now; a stored list would go stale when one of them is replaced."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        """``RNNBase`` assigns a list, which the property has no need of."""

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels read each weight where it is. Here for programs written for torch's layers."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise torch's errors for an input that does not fit the layer."""
        dtype = getattr(self, self._flat_weights_names[0]).dtype
        if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        dims = 3 if batch_sizes is None else 2
        if input.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def _check_rank(self, hx: Any, batched: bool) -> None:
        rank = 3 if batched else 2
        if hx.dim() != rank:
            raise RuntimeError(
                f"For {'batched' if batched else 'unbatched'} {rank}-D input, hx should also be {rank}-D"
                f" but got {hx.dim()}-D tensor"
            )

    def _unsqueeze(self, hx: Any) -> Any:
        return hx.unsqueeze(1)

    def _squeeze(self, hx: Any) -> Any:
        return hx.squeeze(1)

    def _run(self, *args: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def _forward(self, input: Any, hx: Any) -> tuple[Any, Any]:
        batch_sizes = sorted_indices = unsorted_indices = None
        batched, batch_dim = True, 0 if self.batch_first else 1
        packed = isinstance(input, PackedSequence)
        if packed:
            input, batch_sizes, sorted_indices, unsorted_indices = input
        else:
            if input.dim() not in (2, 3):
                raise ValueError(self._input_error.format(input.dim()))
            batched = input.dim() == 3
            if hx is not None:
                self._check_rank(hx, batched)
            if not batched:
                input = input.unsqueeze(batch_dim)
                hx = None if hx is None else self._unsqueeze(hx)
        if hx is None:
            self.check_input(input, batch_sizes)
        else:
            self.check_forward_args(input, hx, batch_sizes)
            hx = self.permute_hidden(hx, sorted_indices)
        weights = [getattr(self, name) for name in self._flat_weights_names]
        settings = (weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if packed:
            data, hidden = self._run(input, batch_sizes, hx, *settings)
            hidden = self.permute_hidden(hidden, unsorted_indices)
            return PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices), hidden
        output, hidden = self._run(input, hx, *settings, self.batch_first)
        return (output, hidden) if batched else (output.squeeze(batch_dim), self._squeeze(hidden))


class RNN(_Layer):
    """Multi-layer Elman RNN, ``h' = act(W_ih x + b_ih + W_hh h + b_hh)``: drop-in for ``torch.nn.RNN``.

    Same constructor, parameters, ``state_dict``, results and errors; see torch for the formulas in full. Gradients
    flow in eval mode too, and `dropout` draws torch's masks from torch's generator. L layers, D directions.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        num_layers: L. Default: 1.
        nonlinearity: ``"tanh"`` or ``"relu"``. Default: ``"tanh"``.
        bias: whether there are biases. Default: ``True``.
        batch_first: whether padded input and output are (B, T, ...) instead of (T, B, ...). Default: ``False``.
        dropout: probability of dropping outputs of all but the last layer in training. Default: 0.
        bidirectional: whether D is 2. Default: ``False``.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it.
    """

    _input_error = "RNN: Expected input to be 2D or 3D, got {}D tensor instead"
    nonlinearity: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)

    def _run(self, *args: Any) -> tuple[Tensor, Any]:
        return functional.rnn(*args, nonlinearity="tanh" if self.mode == "RNN_TANH" else "relu")

    def forward(self, input: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        """Run the layer.

        Args:
            input: (T, B, I), (B, T, I) if ``batch_first``, (T, I) without a batch, or a ``PackedSequence``.
            hx: initial hidden state (L*D, B, H), (L*D, H) without a batch; ``None`` for zeros.

        Returns:
            The output, in the form of the input with D*H features, and the final state, in the form of `hx`.

        Raises:
            ValueError, RuntimeError: torch's, where `input` or `hx` does not fit.
        """
        return self._forward(input, hx)


class LSTM(_Layer):
    """Multi-layer LSTM, gates i, f, g, o, with optional projection: drop-in for ``torch.nn.LSTM``.

    Same constructor, parameters, ``state_dict``, results and errors; see torch for the formulas in full. Gradients
    flow in eval mode too, and `dropout` draws torch's masks from torch's generator. L layers, D directions.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        num_layers: L. Default: 1.
        bias: whether there are biases. Default: ``True``.
        batch_first: whether padded input and output are (B, T, ...) instead of (T, B, ...). Default: ``False``.
        dropout: probability of dropping outputs of all but the last layer in training. Default: 0.
        bidirectional: whether D is 2. Default: ``False``.
        proj_size: P, features to which the hidden state is projected (https://arxiv.org/abs/1402.1128); 0 for
            none, which leaves P = H. Default: 0.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it.
    """

    _input_error = "LSTM: Expected input to be 2D or 3D, got {}D instead"
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def _check_rank(self, hx: Any, batched: bool) -> None:
        rank = 3 if batched else 2
        if hx[0].dim() != rank or hx[1].dim() != rank:
            raise RuntimeError(
                f"For {'batched' if batched else 'unbatched'} {rank}-D input, hx and cx should also be {rank}-D"
                f" but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )

    def _unsqueeze(self, hx: Any) -> Any:
        return hx[0].unsqueeze(1), hx[1].unsqueeze(1)

    def _squeeze(self, hx: Any) -> Any:
        return hx[0].squeeze(1), hx[1].squeeze(1)

    def _run(self, *args: Any) -> tuple[Tensor, Any]:
        output, h_n, c_n = functional.lstm(*args)
        return output, (h_n, c_n)

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Run the layer.

        Args:
            input: (T, B, I), (B, T, I) if ``batch_first``, (T, I) without a batch, or a ``PackedSequence``.
            hx: initial hidden state (L*D, B, P) and cell state (L*D, B, H), without B where there is no batch;
                ``None`` for zeros.

        Returns:
            The output, in the form of the input with D*P features, and the final states, in the form of `hx`.

        Raises:
            ValueError, RuntimeError: torch's, where `input` or `hx` does not fit.
        """
        return self._forward(input, hx)


class GRU(_Layer):
    """Multi-layer GRU, gates r, z, n: drop-in for ``torch.nn.GRU``.

    Same constructor, parameters, ``state_dict``, results and errors; see torch for the formulas in full. Gradients
    flow in eval mode too, and `dropout` draws torch's masks from torch's generator. L layers, D directions.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        num_layers: L. Default: 1.
        bias: whether there are biases. Default: ``True``.
        batch_first: whether padded input and output are (B, T, ...) instead of (T, B, ...). Default: ``False``.
        dropout: probability of dropping outputs of all but the last layer in training. Default: 0.
        bidirectional: whether D is 2. Default: ``False``.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it.
    """

    _input_error = "GRU: Expected input to be 2D or 3D, got {}D instead"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    def _run(self, *args: Any) -> tuple[Tensor, Any]:
        return functional.gru(*args)

    def forward(self, input: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        """Run the layer; arguments, results and errors as `RNN.forward`."""
        return self._forward(input, hx)


class _Cell(RNNCellBase):
    """What the cells share: input with or without a batch, states given or absent."""

    def _check(self, input: Tensor, states: dict[str, Tensor]) -> None:
        name = self._get_name()
        for what, tensor in {"input": input, **states}.items():
            if tensor.dim() not in (1, 2):
                raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {tensor.dim()}D instead")

    def _zeros(self, input: Tensor) -> Tensor:
        return input.new_zeros(input.size(0), self.hidden_size)

    def _weights(self) -> tuple[Any, Any, Any, Any]:
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def _step(self, input: Tensor, hx: Tensor) -> Tensor:
        raise NotImplementedError

    def _forward(self, input: Tensor, hx: Tensor | None) -> Tensor:
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

    def _step(self, input: Tensor, hx: Tensor) -> Tensor:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
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
        return self._forward(input, hx)


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

    def _step(self, input: Tensor, hx: Tensor) -> Tensor:
        return functional.gru_cell(input, hx, *self._weights())

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step; arguments, result and errors as `RNNCell.forward`."""
        return self._forward(input, hx)
