"""Functions behind the layers: validation and layout, then the operations of `seqkernels.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention import scaled_dot_product_attention as scaled_dot_product_attention
from .cells import CELLS, HOLD
from .ops.recurrence import recurrence


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


class _Weights(NamedTuple):
    """Parameters of one layer in one direction; P is the size of the projected hidden state, else H."""

    ih: Tensor  # (G*H, I)
    hh: Tensor  # (G*H, P)
    bias_ih: Tensor | None  # (G*H,)
    bias_hh: Tensor | None  # (G*H,)
    hr: Tensor | None  # (P, H)


class _Packing(NamedTuple):
    """Where the N rows of packed data lie in the padded (T, B) steps."""

    steps: int
    batch: int
    rows: Tensor  # (N,) row of the flattened (T*B) steps
    last: Tensor  # (B,) packed row of each sequence's last step
    control: Tensor  # (T, B) uint8


def _bind(cell: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    packed = (
        "data" in kwargs
        or "batch_sizes" in kwargs
        or (len(args) > 2 and ("params" in kwargs or (len(args) > 3 and isinstance(args[3], list | tuple))))
    )
    if packed:
        if "batch_first" in kwargs:
            raise TypeError("batch_first: packed data has no batch dimension")
        given = {"input" if name == "data" else name: value for name, value in kwargs.items()}
        call = _Call(*args, **{**given, "batch_first": False})
    elif args:
        call = _Call(args[0], None, *args[1:], **kwargs)
    else:
        call = _Call(batch_sizes=None, **kwargs)
    if call.hx is None:
        return call
    states = tuple(call.hx) if cell == "lstm" else (call.hx,)
    if len(states) != CELLS[cell].states:
        raise RuntimeError(f"hx: lstm expects two hidden states, got {len(states)}")
    return call._replace(hx=states)


def _weights(cell: str, call: _Call) -> list[_Weights]:
    params = call.params
    projected = cell == "lstm" and len(params) > 1 and params[1].shape[0] != 4 * params[1].shape[1]
    count = (4 if call.has_biases else 2) + projected
    total = count * call.num_layers * (2 if call.bidirectional else 1)
    if len(params) != total:
        raise RuntimeError(
            f"params: got an incorrect number of RNN parameters: expected {count} for each layer and direction,"
            f" {total} in all, got {len(params)}"
        )
    weights = []
    for k in range(0, total, count):
        bias_ih, bias_hh = params[k + 2 : k + 4] if call.has_biases else (None, None)
        weights.append(
            _Weights(params[k], params[k + 1], bias_ih, bias_hh, params[k + count - 1] if projected else None)
        )
    return weights


def _check(cell: str, call: _Call, weights: list[_Weights]) -> None:
    x, sizes = call.input, call.batch_sizes
    dims = 3 if sizes is None else 2
    if x.dim() != dims:
        raise RuntimeError(f"input: expected {dims} dimensions, got {x.dim()}")
    if sizes is None:
        batch, steps = x.shape[:2] if call.batch_first else (x.shape[1], x.shape[0])
    else:
        if sizes.dim() != 1 or sizes.dtype != torch.int64 or sizes.device.type != "cpu":
            raise RuntimeError(
                "batch_sizes: expected a 1-dimensional torch.int64 tensor on the CPU,"
                f" got {sizes.dim()} dimensions of {sizes.dtype} on {sizes.device}"
            )
        if int(sizes.sum()) != x.shape[0]:
            raise RuntimeError(f"batch_sizes: expected a sum of {x.shape[0]}, the rows of data, got {int(sizes.sum())}")
        steps = sizes.shape[0]
        batch = int(sizes[0]) if steps else 0
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    widths = (weights[0].hh.shape[1], weights[0].hh.shape[0] // CELLS[cell].gates)
    for k, state in enumerate(call.hx or ()):
        name = f"hx[{k}]" if cell == "lstm" else "hx"
        expected = (len(weights), batch, widths[k])
        if state.shape != expected:
            raise RuntimeError(f"{name}: expected size {expected}, got {tuple(state.shape)}")
        if state.dtype != x.dtype:
            raise RuntimeError(f"{name}: expected {x.dtype} as the input, got {state.dtype}")


def _packing(batch_sizes: Tensor, device: torch.device) -> _Packing:
    row = torch.arange(int(batch_sizes[0]))
    valid = row < batch_sizes.unsqueeze(1)
    rows = valid.flatten().nonzero().squeeze(1)
    last = (batch_sizes.cumsum(0) - batch_sizes)[valid.sum(0) - 1] + row
    control = valid.logical_not().to(torch.uint8) * HOLD
    rows, last, control = (x.to(device, non_blocking=True) for x in (rows, last, control))
    return _Packing(valid.shape[0], valid.shape[1], rows, last, control)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` that keeps a batch-major layout in memory, so that no input is copied."""
    if x.dim() == 3 and not x.is_contiguous() and x.transpose(0, 1).is_contiguous():
        return F.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
    return F.linear(x, weight, bias)


def _direction(
    cell: str, x: Tensor, state: tuple[Tensor, ...] | None, w: _Weights, reverse: bool, packing: _Packing | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction over padded (T, B, I) or packed (N, I) input; states are (1, B, P or H)."""
    bias, recurrent_bias = w.bias_ih, w.bias_hh
    if cell != "gru" and bias is not None and recurrent_bias is not None:
        bias, recurrent_bias = bias + recurrent_bias, None
    gates = _project(x, w.ih, bias)
    weight_hh = w.hh
    if w.hr is not None:
        # h W_hh^T = (o tanh c) (W_hh W_hr)^T: the recurrence runs over the unprojected state. The given h_0 is
        # projected already, so its product goes straight into the gates of the first step.
        weight_hh = w.hh @ w.hr
        if state is not None:
            entering = F.linear(state[0].squeeze(0), w.hh)
            if packing is None:
                gates[-1 if reverse else 0].add_(entering)
            elif reverse:
                gates.index_add_(0, packing.last, entering)
            else:
                gates[: packing.batch].add_(entering)
            state = (torch.zeros_like(state[1]), state[1])
    hidden_size, control = weight_hh.shape[1], None
    if packing is not None:
        control = packing.control
        steps = gates.new_zeros(packing.steps * packing.batch, gates.shape[1]).index_copy_(0, packing.rows, gates)
        gates = steps.view(packing.steps, packing.batch, -1)
    if state is None:
        state0 = gates.new_zeros(CELLS[cell].states, gates.shape[1], hidden_size)
    else:
        state0 = torch.cat(state) if len(state) > 1 else state[0]
    hidden, _, state_n = recurrence(gates, weight_hh, recurrent_bias, state0, control, cell=cell, reverse=reverse)
    if packing is not None:
        hidden = hidden.reshape(-1, hidden_size).index_select(0, packing.rows)
    final = (state_n.narrow(0, 0, 1), state_n.narrow(0, 1, 1)) if cell == "lstm" else (state_n,)
    if w.hr is not None:
        return F.linear(hidden, w.hr), (F.linear(final[0], w.hr), *final[1:])
    return hidden, final


def _stack(
    cell: str,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    weights: list[_Weights],
    dropout: float,
    bidirectional: bool,
    packing: _Packing | None,
) -> tuple[Tensor, ...]:
    """All layers and directions; dropout falls where ATen's layer stack has it, so masks are torch's."""
    directions = 2 if bidirectional else 1
    finals: list[tuple[Tensor, ...]] = []
    for first in range(0, len(weights), directions):
        if first and dropout:
            x = F.dropout(x, dropout)
        outputs = []
        for k in range(first, first + directions):
            state = None if states is None else tuple(s.narrow(0, k, 1) for s in states)
            output, final = _direction(cell, x, state, weights[k], k > first, packing)
            outputs.append(output)
            finals.append(final)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    if len(finals) == 1 and len(finals[0]) == 1:
        return x, *finals[0]
    return x, *(torch.cat(s) for s in zip(*finals, strict=True))


def _run(cell: str, call: _Call) -> tuple[Tensor, ...]:
    """Check, then bring padded or packed input to `_stack` and its output back to the form of the input."""
    weights = _weights(cell, call)
    _check(cell, call, weights)
    x, sizes = call.input, call.batch_sizes
    dropout = call.dropout if call.train else 0.0
    packing = None
    uniform = sizes is not None and int(sizes[-1]) == int(sizes[0])
    if sizes is None:
        x = x.transpose(0, 1) if call.batch_first else x
    elif uniform:
        x = x.reshape(sizes.shape[0], -1, x.shape[1])
    else:
        packing = _packing(sizes, x.device)
    output, *finals = _stack(cell, x, call.hx, weights, dropout, call.bidirectional, packing)
    if call.batch_first:
        output = output.transpose(0, 1)
    return output.flatten(0, 1) if uniform else output, *finals


def _autocast_dtype(device: str) -> torch.dtype | None:
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _lower(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast's own rule: float64 stays what it is."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def _recurrent(cell: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    call = _bind(cell, args, kwargs)
    x, states = call.input, call.hx
    device = x.device.type
    low = _autocast_dtype(device)
    if low is None:
        return _run(cell, call)
    lowered = call._replace(
        input=_lower(x, low),
        hx=None if states is None else tuple(_lower(s, low) for s in states),
        params=[_lower(p, low) for p in call.params],
    )
    with torch.autocast(device, enabled=False):
        results = _run(cell, lowered)
    if device != "cpu" or cell.startswith("rnn") or results[0].dtype != low:
        return results
    # On the CPU torch lets the dtype of the initial state widen the results of these forms.
    wide = torch.promote_types(low, x.dtype if states is None else states[-1].dtype)
    if cell == "lstm" and results[1].shape[-1] != results[2].shape[-1]:
        return (*results[:2], results[2].to(wide))
    return tuple(r.to(wide) for r in results) if cell == "gru" or call.batch_sizes is not None else results


def lstm(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Multi-layer LSTM over padded or packed sequences: ``torch.lstm``.

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
        *args: the positional ones of these.
        **kwargs: the others, by name.

    Returns:
        The output, in the form of the input with D*P features; h_n and c_n in the form of `hx`.

    Raises:
        RuntimeError: an argument does not fit the others; the message names it.
    """
    output, h_n, c_n = _recurrent("lstm", args, kwargs)
    return output, h_n, c_n


def gru(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Multi-layer GRU over padded or packed sequences: ``torch.gru``.

    Takes the arguments of `lstm`, with `hx` one tensor (L*D, B, H) and 3*H rows in the weights; raises the same.

    Returns:
        The output, in the form of the input with D*H features, and h_n (L*D, B, H).
    """
    output, h_n = _recurrent("gru", args, kwargs)
    return output, h_n


def _rnn(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: {nonlinearity!r} is not 'tanh' or 'relu'")
    return f"rnn_{nonlinearity}"


def rnn(*args: Any, nonlinearity: str = "tanh", **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Multi-layer Elman RNN over padded or packed sequences: ``torch.rnn_tanh`` and ``torch.rnn_relu``.

    Takes the arguments of `gru`, with H rows in the weights.

    Args:
        *args: positional arguments of `gru`.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        **kwargs: keyword arguments of `gru`.

    Returns:
        The output, in the form of the input with D*H features, and h_n (L*D, B, H).

    Raises:
        RuntimeError: an argument does not fit the others; the message names it.
        ValueError: `nonlinearity` is neither of the two.
    """
    output, h_n = _recurrent(_rnn(nonlinearity), args, kwargs)
    return output, h_n


def _cell(
    cell: str,
    input: Tensor,
    states: tuple[Tensor, ...],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> tuple[Tensor, ...]:
    device = input.device.type
    low = _autocast_dtype(device)
    if low is not None:
        x, w_ih, w_hh, *lowered = (_lower(t, low) for t in (input, weight_ih, weight_hh, *states))
        bias_ih, bias_hh = (None if b is None else _lower(b, low) for b in (bias_ih, bias_hh))
        with torch.autocast(device, enabled=False):
            results = _cell(cell, x, tuple(lowered), w_ih, w_hh, bias_ih, bias_hh)
        wide = low if device != "cpu" or cell.startswith("rnn") else torch.promote_types(low, states[-1].dtype)
        return tuple(r.to(wide) if r.dtype == low else r for r in results)
    if input.shape[1] != weight_ih.shape[1]:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {weight_ih.shape[1]}")
    for k, state in enumerate(states):
        if state.shape[0] != input.shape[0]:
            raise RuntimeError(f"Input batch size {input.shape[0]} doesn't match hidden{k} batch size {state.shape[0]}")
        if state.shape[1] != weight_hh.shape[1]:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, expected {weight_hh.shape[1]}"
            )
        if state.dtype != input.dtype:
            raise RuntimeError(f"hidden{k}: expected {input.dtype} as the input, got {state.dtype}")
    bias, recurrent_bias = bias_ih, bias_hh
    if cell != "gru" and bias_ih is not None and bias_hh is not None:
        bias, recurrent_bias = bias_ih + bias_hh, None
    gates = F.linear(input, weight_ih, bias).unsqueeze(0)
    _, _, state_n = recurrence(gates, weight_hh, recurrent_bias, torch.stack(states), cell=cell)
    return tuple(s.clone() for s in state_n.unbind(0))


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
