"""Recurrent layers with the interface of ``torch.nn``'s, and what it lacks, run by `seqkernels.functional`.

They subclass ``RNNBase``, not ``torch.nn.LSTM`` and its like, at which Dynamo breaks the graph; so ``isinstance(layer,
torch.nn.LSTM)`` is false. TorchScript does not compile them. The output of a layer in one direction is memory that its
backward pass reads: while gradients are recorded, to modify it in place is an error, as for torch's LSTM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Parameter, init
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from .._options import Options, Trace, check, probability, zoneout_of
from .._recurrent import run
from .._sequences import check_reset
from ..cells import CELLS
from ..precision import check_precision
from . import _fx
from ._quantization import Refusal

_CELLS = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}


class _Layer(RNNBase):
    """What RNN, LSTM and GRU share: one forward pass for every form of input, over weights read by name."""

    qconfig = Refusal()
    _input_error = ""
    # Of the class, so that a layer that was torch's has them too.
    zoneout: Any = 0.0
    recurrent_dropout: float = 0.0
    layer_norm: bool = False
    peephole: bool = False
    learn_reset_state: bool = False
    precision: str = "ieee"

    def __init__(
        self,
        mode: str,
        *args: Any,
        zoneout: float | Sequence[float] = 0.0,
        recurrent_dropout: float = 0.0,
        layer_norm: bool = False,
        peephole: bool = False,
        learn_reset_state: bool = False,
        precision: str = "ieee",
        **kwargs: Any,
    ) -> None:
        super().__init__(mode, *args, **kwargs)
        cell = _CELLS[mode]
        flags = {"layer_norm": layer_norm, "peephole": peephole, "learn_reset_state": learn_reset_state}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
        if peephole and cell != "lstm":
            raise ValueError("peephole: only an LSTM has it")
        chances = zoneout_of(cell, zoneout, self.proj_size > 0)
        options = {
            "zoneout": chances if len(chances) > 1 and any(chances) else chances[0],
            "recurrent_dropout": probability("recurrent_dropout", recurrent_dropout),
            **flags,
        }
        if check_precision(precision) != "ieee":
            self.precision = precision
        for name, value in options.items():
            if value:
                setattr(self, name, value)
        gates, states, _ = CELLS[cell]
        size, like = self.hidden_size, getattr(self, self._flat_weights_names[0])
        for suffix in self._suffixes():
            for name, shape in {
                **({"norm_ih": (gates * size,), "norm_hh": (gates * size,)} if layer_norm else {}),
                **({"norm_c": (2, size)} if layer_norm and cell == "lstm" else {}),
                **({"weight_peephole": (3, size)} if peephole else {}),
                **({"reset_state": (states, size)} if learn_reset_state else {}),
            }.items():
                setattr(self, f"{name}_{suffix}", Parameter(torch.empty(shape, device=like.device, dtype=like.dtype)))
        self._reset_options()

    def _suffixes(self) -> list[str]:
        """``l0``, ``l0_reverse``, ``l1``, ..., in the order of layers and directions."""
        return [names[0].removeprefix("weight_ih_") for names in self._all_weights]

    def _listed(self, name: str) -> list[Tensor]:
        return [getattr(self, f"{name}_{suffix}") for suffix in self._suffixes()]

    def reset_parameters(self) -> None:
        """Draw weights, biases and peepholes as torch does; gains of norms become 1, reset states and shifts 0."""
        super().reset_parameters()
        self._reset_options()

    def _reset_options(self) -> None:
        if self.peephole:
            bound = 1 / math.sqrt(self.hidden_size)
            for weight in self._listed("weight_peephole"):
                init.uniform_(weight, -bound, bound)
        if self.layer_norm:
            for gain in self._listed("norm_ih") + self._listed("norm_hh"):
                init.ones_(gain)
            if self.mode == "LSTM":
                for norm in self._listed("norm_c"):
                    with torch.no_grad():
                        norm[0].fill_(1)
                        norm[1].fill_(0)
        if self.learn_reset_state:
            for state in self._listed("reset_state"):
                init.zeros_(state)

    def extra_repr(self) -> str:
        """Text of the constructor arguments, those of torch first."""
        text = super().extra_repr()
        for name in ("zoneout", "recurrent_dropout", "layer_norm", "peephole", "learn_reset_state"):
            if getattr(self, name):
                text += f", {name}={getattr(self, name)}"
        return text if self.precision == "ieee" else f"{text}, precision={self.precision!r}"

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

    def _check_kind(self, hx: Any) -> None:
        """Raise the error that says what the initial state should be made of."""
        if not isinstance(hx, Tensor):
            raise TypeError(f"hx: expected a Tensor, got {type(hx).__name__}")

    def _check_rank(self, hx: Any, batched: bool) -> None:
        rank = 3 if batched else 2
        if hx.dim() != rank:
            raise RuntimeError(
                f"For {'batched' if batched else 'unbatched'} {rank}-D input, hx should also be {rank}-D"
                f" but got {hx.dim()}-D tensor"
            )

    def _states(self, hx: Any) -> tuple[Tensor, ...]:
        """`hx` as the states of the cell; `_join` undoes it."""
        return (hx,)

    def _join(self, states: Sequence[Tensor]) -> Any:
        return states[0]

    def _fits(self, input: Tensor, hx: Any, dtype: torch.dtype) -> bool:
        """Whether `input` is padded and all arguments fit at first sight."""
        try:
            return self._fit(input, hx, dtype)
        except AttributeError:  # no tensors: `_general` says which
            return False

    def _fit(self, input: Tensor, hx: Any, dtype: torch.dtype) -> bool:
        shape = input.shape
        if len(shape) != 3 or shape[2] != self.input_size or input.dtype != dtype:
            return False
        batch, steps = shape[:2] if self.batch_first else (shape[1], shape[0])
        if steps == 0:
            return False
        if hx is None:
            return True
        rows = self.num_layers * 2 if self.bidirectional else self.num_layers
        expected = (rows, batch, self.hidden_size)
        if self.mode != "LSTM":
            return hx.shape == expected and hx.dtype == dtype
        if len(hx) != 2:
            return False
        projected = (rows, batch, self.proj_size) if self.proj_size else expected
        h, c = hx
        return h.shape == projected and c.shape == expected and h.dtype == dtype and c.dtype == dtype

    def _weights(self) -> list[Any]:
        own = self._parameters
        try:
            return [own[name] for name in self._flat_weights_names]
        except KeyError:  # a parametrized weight is no parameter of the layer itself
            return [getattr(self, name) for name in self._flat_weights_names]

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        tbptt: int | None = None,
        return_states: bool = False,
        return_gates: bool = False,
        checkpoint_every: int | None = None,
    ) -> tuple[Any, ...]:
        """Run the layer. The keyword arguments are what ``torch.nn`` has not; ``docs/recurrent-layers.md`` shows them.

        Args:
            input: (T, B, I), (B, T, I) if ``batch_first``, (T, I) without a batch, or a ``PackedSequence``.
            hx: initial hidden state (L*D, B, H), (L*D, H) without a batch; of an LSTM h_0 (L*D, B, P) and c_0
                (L*D, B, H); ``None`` for zeros.
            reset: (T, B) bool or uint8, (B, T) if ``batch_first``, (T,) without a batch: ``True`` at the first step of
                every document or episode. The state is zero there, or the learnt ``reset_state``, instead of what the
                steps before left: nothing passes between documents, values or gradients, in either direction. Forward
                this is the loop ``h = h * (1 - reset[t])`` before each step; the reverse direction enters a document
                at its last step, so it is reset before the step that lies in front of a flag.
            lengths: (B,) int32 or int64 on the device of the input: sequence b has ``lengths[b]`` steps, in any
                order. Past them the input is not looked at, the output is 0, and final states and the reverse
                direction's begin are at each sequence's own end, as with a ``PackedSequence``. Nothing waits for the
                values. A sequence without steps ends in `hx`.
            cu_seqlens: (N_docs + 1,) int32 or int64 on the device of the input, which is then (N, I), documents behind
                one another: document d has the rows from ``cu_seqlens[d]`` to ``cu_seqlens[d + 1]``, and B is the
                number of documents. Each runs as if alone.
            max_seqlen: length of the longest document, or more; found out where absent, which takes `cu_seqlens` on
                the CPU and no compilation.
            tbptt: k, truncated back-propagation through time: gradients stop before the steps k, 2k, ... of each
                direction, counted from where it begins. Values stay what they are.
            return_states: also return the states of every step.
            return_gates: also return the gates of every step.
            checkpoint_every: k, of at least 1: of the states store those of every k-th step alone, for each layer and
                direction, and compute the others again in the backward pass. Outputs and gradients have the same
                bits, and besides inputs and outputs the memory is that of T/k steps. ``None`` stores what the backward
                pass needs of every step. Not with `return_states` and `return_gates`.

        Returns:
            The output, in the form of the input with D*P features; the final states, in the form of `hx`; with
            `return_states` or `return_gates` a list of `seqkernels.nn.Trace`, for each layer and direction in the
            order of torch's weights.

        Raises:
            ValueError, RuntimeError: torch's, where `input` or `hx` does not fit.
            ValueError, TypeError: another argument is not allowed; the message names it.
        """
        if isinstance(input, Proxy):
            extras = {"max_seqlen": max_seqlen, "tbptt": tbptt, "checkpoint_every": checkpoint_every}
            extras |= {"return_states": return_states, "return_gates": return_gates}
            return _fx.call(input, self, input, hx, reset=reset, lengths=lengths, cu_seqlens=cu_seqlens, **extras)
        weights = self._weights()
        if (
            reset is not None
            or lengths is not None
            or cu_seqlens is not None
            or max_seqlen is not None
            or tbptt is not None
            or return_states
            or return_gates
            or checkpoint_every is not None
            or self.zoneout
            or self.recurrent_dropout
            or self.layer_norm
            or self.peephole
            or self.precision != "ieee"
        ):
            norm = self.layer_norm
            options = Options(
                reset,
                self._listed("reset_state") if self.learn_reset_state and reset is not None else None,
                lengths,
                cu_seqlens,
                max_seqlen,
                tbptt,
                return_states,
                return_gates,
                self.zoneout,
                self.recurrent_dropout,
                self._listed("norm_ih") if norm else None,
                self._listed("norm_hh") if norm else None,
                self._listed("norm_c") if norm and self.mode == "LSTM" else None,
                self._listed("weight_peephole") if self.peephole else None,
                checkpoint_every,
                self.precision,
            )
            return self._general(input, hx, weights, options)
        if isinstance(input, PackedSequence) or not self._fits(input, hx, weights[0].dtype):
            return self._general(input, hx, weights, None)
        flags = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first)
        output, *states = run(_CELLS[self.mode], input, None, None if hx is None else self._states(hx), weights, *flags)
        return output, self._join(states)

    def step(self, input: Tensor, hx: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """Run one time step: for a stream or a policy that acts, in a loop that carries the state.

        A sequence fed step by step gives what `forward` gives of the whole, and memory does not grow under
        ``torch.no_grad()``.

        Args:
            input: (B, I), or (I,) without a batch.
            hx: the state that the last step returned, as in `forward`; ``None`` for zeros.
            reset: (B,) bool or uint8, () without a batch: where ``True``, the state is zero before this step.

        Returns:
            The output (B, P), or (P,), and the state to give to the next step.

        Raises:
            RuntimeError: the layer is bidirectional, or has ``recurrent_dropout`` and is in training, whose mask is
                that of a whole sequence.
        """
        if self.bidirectional:
            raise RuntimeError("step: a bidirectional layer needs the whole sequence")
        if self.recurrent_dropout and self.training:
            raise RuntimeError("step: recurrent_dropout has one mask for a whole sequence; call eval() first")
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
        if input.dim() not in (1, 2):
            raise ValueError(f"input: expected (B, I) or (I,), got {tuple(input.shape)}")
        if reset is not None:
            check_reset(reset, tuple(input.shape[:-1]), input.device)
        time = 1 if self.batch_first and input.dim() == 2 else 0
        if reset is None:
            output, hx = self(input.unsqueeze(time), hx)
        else:
            output, hx = self(input.unsqueeze(time), hx, reset=reset.unsqueeze(time))
        return output.squeeze(time), hx

    def _general(self, input: Any, hx: Any, weights: list[Any], options: Options | None) -> tuple[Any, ...]:
        """Every form of input, with the errors of torch and of `seqkernels.functional`."""
        batch_sizes = sorted_indices = unsorted_indices = None
        batched, batch_dim = True, 0 if self.batch_first else 1
        documents = options is not None and options.cu_seqlens is not None
        packed = isinstance(input, PackedSequence)
        if packed:
            input, batch_sizes, sorted_indices, unsorted_indices = input
        elif not isinstance(input, Tensor):
            raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(input).__name__}")
        if hx is not None:
            self._check_kind(hx)
        if not documents and not packed:
            if input.dim() not in (2, 3):
                raise ValueError(self._input_error.format(input.dim()))
            batched = input.dim() == 3
            if hx is not None:
                self._check_rank(hx, batched)
            if not batched:
                input = input.unsqueeze(batch_dim)
                hx = None if hx is None else self._join([state.unsqueeze(1) for state in self._states(hx)])
                options = None if options is None else self._unbatched(options, batch_dim)
        if documents:
            # The rows of the documents are checked as those of a PackedSequence.
            self.check_input(input, options.cu_seqlens)  # type: ignore[union-attr]
        elif hx is None:
            self.check_input(input, batch_sizes)
        else:
            self.check_forward_args(input, hx, batch_sizes)
            hx = self.permute_hidden(hx, sorted_indices)
        states = None if hx is None else self._states(hx)
        cell, layers = _CELLS[self.mode], (self.num_layers, self.bidirectional, self.batch_first)
        check(cell, input, batch_sizes, states, weights, self.bias, *layers, options)
        settings = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first)
        output, *results = run(cell, input, batch_sizes, states, weights, *settings, options)
        traces = results.pop() if len(results) > CELLS[cell].states else None

        def restore(x: Any) -> Any:
            if packed:
                return PackedSequence(x, batch_sizes, sorted_indices, unsorted_indices)
            return x if batched else x.squeeze(batch_dim)

        hidden = self._join(results if batched else [state.squeeze(1) for state in results])
        if packed:
            hidden = self.permute_hidden(hidden, unsorted_indices)
        if traces is None:
            return restore(output), hidden
        restored = [Trace(*(None if part is None else restore(part) for part in trace)) for trace in traces]
        return restore(output), hidden, restored

    def _unbatched(self, options: Options, batch_dim: int) -> Options:
        if options.lengths is not None:
            raise ValueError("lengths: input without a batch has one length, that of the input")
        if not isinstance(options.reset, Tensor):
            return options
        if options.reset.dim() != 1:
            raise ValueError(f"reset: expected 1 dimension as the input has no batch, got {options.reset.dim()}")
        return options._replace(reset=options.reset.unsqueeze(batch_dim))


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
        zoneout: a number, as of `LSTM`. Keyword only, as those below. Default: 0.
        recurrent_dropout: as of `LSTM`. Default: 0.
        layer_norm: as of `LSTM`; parameters ``norm_ih_l0`` and ``norm_hh_l0`` (H,). Default: ``False``.
        learn_reset_state: as of `LSTM`; parameters ``reset_state_l0`` (1, H). Default: ``False``.
        precision: as of `LSTM`. Default: ``"ieee"``.

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
        zoneout: probability that an element of the state keeps its value in a step, or two, for h and c: in training
            by chance, in evaluation in expectation (Krueger et al., "Zoneout: regularizing RNNs by randomly
            preserving hidden activations", 2016). Keyword only, as those below. Default: 0.
        recurrent_dropout: probability in training of dropping an element of h in the recurrent product, the same
            elements in all steps of a sequence (Gal & Ghahramani, "A theoretically grounded application of dropout in
            recurrent neural networks", 2016). Default: 0.
        layer_norm: whether ``W_ih x``, ``W_hh h`` and, where it becomes h, c go through layer norms (Ba, Kiros &
            Hinton, "Layer normalization", 2016, as in haste's ``LayerNormLSTM``). Parameters ``norm_ih_l0`` (4*H,),
            ``norm_hh_l0`` (4*H,) and ``norm_c_l0`` (2, H), gain and shift, for each layer and direction. Default:
            ``False``.
        peephole: whether the gates see c by ``weight_peephole_l0`` (3, H): i and f the last one, o the new one (Gers
            & Schmidhuber, "Recurrent nets that time and count", 2000). Default: ``False``.
        learn_reset_state: whether `reset` of `forward` makes h and c the parameters ``reset_state_l0`` (2, H), zero at
            first, instead of zero. Default: ``False``.
        precision: of products of float32 matrices on GPUs, whatever torch's flags say: ``"ieee"``, ``"tf32"`` or
            ``"tf32x3"``, see `seqkernels.precision`; of a projection torch's flags decide. Default: ``"ieee"``.

    With a projection these options act on h before it is projected, and zoneout is for c alone.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it.
    """

    _input_error = "LSTM: Expected input to be 2D or 3D, got {}D instead"
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def _check_kind(self, hx: Any) -> None:
        if not isinstance(hx, tuple | list):
            raise TypeError(f"hx: expected a tuple (h_0, c_0), got {type(hx).__name__}")
        if len(hx) != 2:
            raise RuntimeError(f"hx: lstm expects two hidden states, got {len(hx)}")
        for k, state in enumerate(hx):
            if not isinstance(state, Tensor):
                raise TypeError(f"hx[{k}]: expected a Tensor, got {type(state).__name__}")

    def _check_rank(self, hx: Any, batched: bool) -> None:
        rank = 3 if batched else 2
        if hx[0].dim() != rank or hx[1].dim() != rank:
            raise RuntimeError(
                f"For {'batched' if batched else 'unbatched'} {rank}-D input, hx and cx should also be {rank}-D"
                f" but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )

    def _states(self, hx: Any) -> tuple[Tensor, ...]:
        return tuple(hx)

    def _join(self, states: Sequence[Tensor]) -> Any:
        return tuple(states)


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
        zoneout: a number, as of `LSTM`. Keyword only, as those below. Default: 0.
        recurrent_dropout: as of `LSTM`. Default: 0.
        layer_norm: as of `LSTM`; parameters ``norm_ih_l0`` and ``norm_hh_l0`` (3*H,). Default: ``False``.
        learn_reset_state: as of `LSTM`; parameters ``reset_state_l0`` (1, H). Default: ``False``.
        precision: as of `LSTM`. Default: ``"ieee"``.

    Raises:
        ValueError, TypeError: an argument is not allowed; the message names it.
    """

    _input_error = "GRU: Expected input to be 2D or 3D, got {}D instead"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)
