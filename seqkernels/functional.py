"""Functions behind the layers: validation and layout, then the operations of `seqkernels.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attend import attention as attention
from ._attend import merge as merge
from ._attention import scaled_dot_product_attention as scaled_dot_product_attention
from ._flash import flash_attn_func as flash_attn_func
from ._flash import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from ._flash import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from ._flash import flash_attn_varlen_func as flash_attn_varlen_func
from ._flash import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
from ._flash import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
from ._flash import flash_attn_with_kvcache as flash_attn_with_kvcache
from ._options import Options, check
from ._options import Trace as Trace
from ._recurrent import run, step
from .cells import CELLS


class _Call(NamedTuple):
    """A call in either form, in torch's order, with `hx` a tuple of the cell's states or ``None``."""

    input: Tensor
    batch_sizes: Tensor | None
    hx: Any
    params: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool


def _bind(cell: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    packed = (
        "data" in kwargs
        or "batch_sizes" in kwargs
        or (len(args) > 2 and ("params" in kwargs or (len(args) > 3 and isinstance(args[3], list | tuple))))
    )
    if packed:
        if "batch_first" in kwargs:
            raise TypeError("batch_first: packed data has no batch dimension")
        kwargs = {"input" if name == "data" else name: value for name, value in kwargs.items()}
        kwargs["batch_first"] = False
    elif args:
        args = (args[0], None, *args[1:])
    else:
        kwargs = {**kwargs, "batch_sizes": None}
    try:
        call = _Call(*args, **kwargs)
    except TypeError as error:
        # Python's own words for arguments that are missing, unknown or given twice.
        raise TypeError(str(error).replace("_Call.__new__", cell.split("_")[0])) from None
    if call.hx is None:
        return call
    states = tuple(call.hx) if cell == "lstm" else (call.hx,)
    if len(states) != CELLS[cell].states:
        raise RuntimeError(f"hx: lstm expects two hidden states, got {len(states)}")
    return call._replace(hx=states)


def _recurrent(cell: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    own = {name: kwargs.pop(name) for name in Options._fields if name in kwargs}
    options = Options(**own) if own else None
    call = _bind(cell, args, kwargs)
    check(
        cell,
        call.input,
        call.batch_sizes,
        call.hx,
        call.params,
        call.has_biases,
        call.num_layers,
        call.bidirectional,
        call.batch_first,
        options,
    )
    return run(cell, *call, options)


def lstm(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Multi-layer LSTM over padded or packed sequences: ``torch.lstm``, and what that lacks.

    ``lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)`` or, packed,
    ``lstm(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)``.

    Args:
        input: (T, B, I), or (B, T, I) if `batch_first`.
        data: (N, I), the rows of a ``PackedSequence``.
        batch_sizes: (T,) torch.int64 on the CPU, rows of each step, of a ``PackedSequence``.
        hx: h_0 (L*D, B, P) and c_0 (L*D, B, H) in the dtype of the input, with L layers in D directions, and P the
            projected size, else H; ``None`` for zeros.
        params: for each layer and direction ``weight_ih`` (4*H, I), ``weight_hh`` (4*H, P), then ``bias_ih`` and
            ``bias_hh`` (4*H,) if `has_biases`, then ``weight_hr`` (P, H) if projected.
        has_biases: whether `params` has biases.
        num_layers: L.
        dropout: probability of dropping an output of all but the last layer.
        train: whether dropout applies; nothing else depends on it.
        bidirectional: whether D is 2; the reverse direction's parameters then follow each layer's forward ones.
        batch_first: whether the batch is the first dimension of `input` and of the output.
        reset: (T, B) bool or uint8, (B, T) if `batch_first`: where the state is zero, or `reset_state`, before a step,
            in the reverse direction before the one in front of it; see `seqkernels.nn.LSTM.forward`.
        reset_state: L*D tensors (2, H), h and c after a reset instead of zero; h is the one before any projection.
        lengths: (B,) int32 or int64 on the device of the input: the steps of each sequence, in any order.
        cu_seqlens: (B + 1,) int32 or int64 on the device of the input (N, I), which holds B documents behind one
            another: the row where each begins, and N. `batch_first` then says nothing.
        max_seqlen: length of the longest document, or more; needed where `cu_seqlens` is not on the CPU and in
            compiled programs.
        tbptt: gradients stop before every step of this multiple.
        checkpoint_every: k, store the states of every k-th step alone and compute the others again in the backward
            pass, see `seqkernels.nn.LSTM.forward`; ``None`` to store what the backward pass needs of every step.
        return_states: return the states of every step.
        return_gates: return the gates of every step.
        zoneout: probability that an element of the state keeps its value in a step, or two for h and c; in training
            by chance, else in expectation (Krueger et al., "Zoneout", 2016).
        recurrent_dropout: probability of dropping an element of h in the recurrent product, in training, the same
            elements in all steps (Gal & Ghahramani, 2016).
        norm_ih: L*D tensors (4*H,), gains of a layer norm of ``W_ih x``, before the bias (Ba et al., 2016).
        norm_hh: L*D tensors (4*H,), gains of a layer norm of ``W_hh h``, before the bias.
        norm_c: L*D tensors (2, H), gain and bias of a layer norm of c where it becomes h.
        peephole: L*D tensors (3, H), weights of c in the gates i, f and o (Gers & Schmidhuber, 2000).
        precision: of the products of float32 matrices on GPUs, see `seqkernels.nn.LSTM`.
        *args: the positional ones of these.
        **kwargs: the others, by name; those from `reset` on only by name.

    Returns:
        The output, in the form of the input with D*P features; h_n and c_n in the form of `hx`; with `return_states`
        or `return_gates` a list of `Trace`, for each layer and direction.

    Raises:
        RuntimeError: an argument of torch does not fit the others; the message names it.
        ValueError, TypeError: another argument is not allowed; the message names it.
    """
    return _recurrent("lstm", args, kwargs)


def gru(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Multi-layer GRU over padded or packed sequences: ``torch.gru``, and what that lacks.

    Takes the arguments of `lstm` but `norm_c` and `peephole`, with `hx` one tensor (L*D, B, H), reset states (1, H),
    one number for `zoneout`, and 3*H rows in the weights and norms; raises the same.

    Returns:
        The output, in the form of the input with D*H features, and h_n (L*D, B, H); with `return_states` or
        `return_gates` a list of `Trace`, for each layer and direction.
    """
    return _recurrent("gru", args, kwargs)


def _rnn(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: {nonlinearity!r} is not 'tanh' or 'relu'")
    return f"rnn_{nonlinearity}"


def rnn(*args: Any, nonlinearity: str = "tanh", **kwargs: Any) -> tuple[Any, ...]:
    """Multi-layer Elman RNN over packed or padded sequences: ``torch.rnn_tanh``, ``torch.rnn_relu``, and more.

    Takes the arguments of `gru`, with H rows in the weights and norms.

    Args:
        *args: positional arguments of `gru`.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        **kwargs: keyword arguments of `gru`.

    Returns:
        As `gru`.

    Raises:
        RuntimeError: an argument of torch does not fit the others; the message names it.
        ValueError, TypeError: `nonlinearity` or another argument is not allowed; the message names it.
    """
    return _recurrent(_rnn(nonlinearity), args, kwargs)


def _cell(
    cell: str,
    input: Tensor,
    states: tuple[Tensor, ...],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> tuple[Tensor, ...]:
    if input.shape[1] != weight_ih.shape[1]:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {weight_ih.shape[1]}")
    if input.dtype != weight_ih.dtype and not torch._C._is_any_autocast_enabled():
        F.linear(input, weight_ih, bias_ih)  # raises, in torch's words
    for k, state in enumerate(states):
        if state.shape[0] != input.shape[0]:
            raise RuntimeError(f"Input batch size {input.shape[0]} doesn't match hidden{k} batch size {state.shape[0]}")
        if state.shape[1] != weight_hh.shape[1]:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, expected {weight_hh.shape[1]}"
            )
        if state.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(f"hidden{k}: expected {input.dtype} as the input, got {state.dtype}")
    return step(cell, input, states, weight_ih, weight_hh, bias_ih, bias_hh)


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: ``torch.lstm_cell``.

    Args:
        input: (B, I).
        hx: h and c, (B, H) each, in the dtype of the input.
        w_ih: (4*H, I).
        w_hh: (4*H, H).
        b_ih: (4*H,) or ``None``.
        b_hh: (4*H,) or ``None``.

    Returns:
        The next h and c.

    Raises:
        RuntimeError: sizes or dtypes do not fit.
    """
    if len(hx) != 2:
        raise RuntimeError("lstm_cell expects two hidden states")
    h, c = _cell("lstm", input, tuple(hx), w_ih, w_hh, b_ih, b_hh)
    return h, c


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One step of a GRU: ``torch.gru_cell``; arguments as `lstm_cell`, with `hx` (B, H) and 3*H rows."""
    return _cell("gru", input, (hx,), w_ih, w_hh, b_ih, b_hh)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of an Elman RNN: ``torch.rnn_tanh_cell``, or ``torch.rnn_relu_cell`` if `nonlinearity` is ``"relu"``.

    Other arguments as `lstm_cell`, with `hx` (B, H) and H rows.

    Raises:
        RuntimeError: sizes or dtypes do not fit.
        ValueError: `nonlinearity` is neither of the two.
    """
    return _cell(_rnn(nonlinearity), input, (hx,), w_ih, w_hh, b_ih, b_hh)[0]
