"""What recurrent layers can do that ``torch.nn`` cannot: the arguments, and the check of all arguments of a call.

Letters: T time, B batch, I input size, H hidden size, P projected size (else H), L layers, D directions; G gates and
S states of the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _sequences
from .cells import CELLS
from .precision import check_precision

Tensors = Sequence[Tensor]


class Trace(NamedTuple):
    """What one layer in one direction did at every step, in the form of the layer's output, with gradient.

    Past a sequence's end everything is 0.

    Attributes:
        hidden: (T, B, P), the hidden states; ``None`` unless ``return_states``.
        cells: (T, B, H), the cell states of an LSTM; ``None`` for other cells and unless ``return_states``.
        gates: (T, B, G, H), the gates after their activations: i, f, g, o of the LSTM, r, z, n of the GRU, the hidden
            state of the RNN; ``None`` unless ``return_gates``.
    """

    hidden: Any
    cells: Any
    gates: Any


class Options(NamedTuple):
    """What ``torch.nn`` does not have; see ``seqkernels.functional.lstm`` for each. Lists have L*D tensors."""

    reset: Tensor | None = None
    reset_state: Tensors | None = None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    tbptt: int | None = None
    return_states: bool = False
    return_gates: bool = False
    zoneout: float | Sequence[float] = 0.0
    recurrent_dropout: float = 0.0
    norm_ih: Tensors | None = None
    norm_hh: Tensors | None = None
    norm_c: Tensors | None = None
    peephole: Tensors | None = None
    checkpoint_every: int | None = None
    precision: str = "ieee"


LISTS = ("reset_state", "norm_ih", "norm_hh", "norm_c", "peephole")


def probability(name: str, value: Any) -> float:
    """`value` as a float, or the error that names it as `name`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return float(value)


def _counts(value: object) -> bool:
    """Whether `value` is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def zoneout_of(cell: str, value: Any, projected: bool) -> tuple[float, ...]:
    """The probability of each state of `cell`, from one number for all or one for each of the LSTM's.

    Raises:
        ValueError: `value` is not allowed.
    """
    states = CELLS[cell].states
    if isinstance(value, tuple | list):
        if len(value) != states or states == 1:
            raise ValueError(f"zoneout: expected a number, or two for h and c of an LSTM, got {value!r}")
        chances = tuple(probability("zoneout", p) for p in value)
    else:
        chances = (probability("zoneout", value),) * states
    if projected and chances[0]:
        raise ValueError(
            f"zoneout: expected 0 for the hidden state of a projected LSTM, (0, {chances[-1]}), got {value!r}"
        )
    return chances


def check(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensors | None,
    params: Tensors,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    options: Options | None,
) -> None:
    """Raise the error that names the argument which does not fit the others; arguments as in `run`.

    Raises:
        RuntimeError: torch's arguments.
        ValueError, TypeError: those of `options`.
    """
    if not _counts(num_layers):
        raise RuntimeError(f"num_layers: expected an integer of at least 1, got {num_layers!r}")
    if not isinstance(x, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(x).__name__}")
    rows, dims = num_layers * (2 if bidirectional else 1), 3
    projected = cell == "lstm" and len(params) > 1 and params[1].shape[0] != 4 * params[1].shape[1]
    expected = (4 if has_biases else 2) + projected
    if len(params) != expected * rows:
        raise RuntimeError(
            f"params: got an incorrect number of RNN parameters: expected {expected} for each layer and direction,"
            f" {expected * rows} in all, got {len(params)}"
        )
    documents = None if options is None else options.cu_seqlens
    if documents is not None and not isinstance(documents, Tensor):
        raise TypeError(f"cu_seqlens: expected a Tensor, got {type(documents).__name__}")
    if batch_sizes is not None or documents is not None:
        dims = 2
    if x.dim() != dims:
        raise RuntimeError(f"input: expected {dims} dimensions, got {x.dim()}")
    weight_ih, weight_hh = params[:2]
    if x.shape[-1] != weight_ih.shape[1]:
        raise RuntimeError(f"input: expected {weight_ih.shape[1]} features as in weight_ih, got {x.shape[-1]}")
    if x.dtype != weight_ih.dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(f"input: expected the dtype of the parameters, {weight_ih.dtype}, got {x.dtype}")
    if batch_sizes is not None:
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "batch_sizes: torch.export cannot trace packed data, whose sizes are values; expected None, for which"
                " pass a padded Tensor with lengths="
            )
        if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
            raise RuntimeError(
                "batch_sizes: expected a 1-dimensional torch.int64 tensor on the CPU,"
                f" got {batch_sizes.dim()} dimensions of {batch_sizes.dtype} on {batch_sizes.device}"
            )
        if batch_sizes.numel() and (bool((batch_sizes.diff() > 0).any()) or int(batch_sizes[-1]) < 0):
            raise RuntimeError(
                f"batch_sizes: expected numbers of at least 0, none above the one before, got {batch_sizes.tolist()}"
            )
        if int(batch_sizes.sum()) != x.shape[0]:
            raise RuntimeError(
                f"batch_sizes: expected a sum of {x.shape[0]}, the rows of data, got {int(batch_sizes.sum())}"
            )
        steps = batch_sizes.shape[0]
        batch = int(batch_sizes[0]) if steps else 0
    elif documents is not None:
        steps, batch = 1, documents.numel() - 1
    else:
        batch, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    hidden = weight_hh.shape[0] // CELLS[cell].gates
    widths = (weight_hh.shape[1], hidden)
    for k, state in enumerate(hx or ()):
        name = f"hx[{k}]" if cell == "lstm" else "hx"
        shape = (rows, batch, widths[k])
        if not isinstance(state, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(state).__name__}")
        if state.shape != shape:
            raise RuntimeError(f"{name}: expected size {shape}, got {tuple(state.shape)}")
        # Autocast gives both the same dtype, but leaves float64 alone.
        if state.dtype != x.dtype and (
            torch.float64 in (state.dtype, x.dtype) or not torch._C._is_any_autocast_enabled()
        ):
            raise RuntimeError(f"{name}: expected {x.dtype} as the input, got {state.dtype}")
        if state.device != x.device:
            raise RuntimeError(f"{name}: expected on {x.device} as the input, got {state.device}")
    if options is not None:
        own = batch_sizes is not None
        flags = (batch, steps) if batch_first else (steps, batch)
        _check_options(cell, options, rows, hidden, weight_ih.dtype, own, flags, x.device, projected)


def _check_options(
    cell: str,
    options: Options,
    rows: int,
    hidden: int,
    dtype: torch.dtype,
    own_lengths: bool,
    steps: tuple[int, ...],
    device: torch.device,
    projected: bool,
) -> None:
    gates, states, _ = CELLS[cell]
    shapes = {
        "reset_state": (states, hidden),
        "norm_ih": (gates * hidden,),
        "norm_hh": (gates * hidden,),
        "norm_c": (2, hidden),
        "peephole": (3, hidden),
    }
    for name, shape in shapes.items():
        tensors = getattr(options, name)
        if tensors is None:
            continue
        if name in ("norm_c", "peephole") and cell != "lstm":
            raise ValueError(f"{name}: only an LSTM has it")
        if len(tensors) != rows:
            raise ValueError(f"{name}: expected {rows} tensors, one for each layer and direction, got {len(tensors)}")
        for k, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{k}]: expected a Tensor, got {type(tensor).__name__}")
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(f"{name}[{k}]: expected {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
    zoneout_of(cell, options.zoneout, projected)
    probability("recurrent_dropout", options.recurrent_dropout)
    check_precision(options.precision)
    if options.tbptt is not None and not _counts(options.tbptt):
        raise ValueError(f"tbptt: expected an integer of at least 1, got {options.tbptt!r}")
    every = options.checkpoint_every
    if every is not None and not _counts(every):
        raise ValueError(f"checkpoint_every: expected None or an integer of at least 1, got {every!r}")
    for name in ("return_states", "return_gates"):
        if not isinstance(getattr(options, name), bool):
            raise TypeError(f"{name}: expected a bool, got {getattr(options, name)!r}")
    if every is not None:
        for name in ("return_states", "return_gates"):
            if getattr(options, name):
                raise ValueError(f"checkpoint_every: expected None with {name}, which stores every step anyway")
    if options.reset_state is not None and options.reset is None:
        raise ValueError("reset_state: expected reset too, which says where the state becomes reset_state")
    if options.max_seqlen is not None and options.cu_seqlens is None:
        raise ValueError("max_seqlen: expected cu_seqlens too, whose longest document has this length")
    if options.lengths is not None and not isinstance(options.lengths, Tensor):
        raise TypeError(f"lengths: expected a Tensor, got {type(options.lengths).__name__}")
    for name in ("lengths", "cu_seqlens"):
        if own_lengths and getattr(options, name) is not None:
            raise ValueError(f"{name}: a PackedSequence has lengths of its own")
    if options.lengths is not None and options.cu_seqlens is not None:
        raise ValueError("lengths: cu_seqlens says the lengths already, expected one of the two")
    if options.reset is not None:
        if own_lengths or options.cu_seqlens is not None:
            what = "a PackedSequence" if own_lengths else "cu_seqlens"
            raise ValueError(f"reset: expected padded input, not {what}; give lengths instead")
        _sequences.check_reset(options.reset, steps, device)
