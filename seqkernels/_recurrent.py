"""Recurrent layers as functions: layers, directions, projection and options around `seqkernels.ops.recurrence`.

Letters: T time, B batch, I input size, H hidden size, P projected size (else H), L layers, D directions; G gates and
S states of the cell.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _sequences
from ._options import LISTS, Options, Tensors, Trace, zoneout_of
from .cells import CELLS, NORM_EPS, RESET, Weights
from .ops import _eager
from .ops.layer import layer
from .ops.recurrence import recurrence
from .ops.step import step as quick_step
from .ops.together import recurrences, serves


class Parameters(NamedTuple):
    """Parameters of one layer in one direction."""

    ih: Tensor  # (G*H, I)
    hh: Tensor  # (G*H, P)
    bias_ih: Tensor | None  # (G*H,)
    bias_hh: Tensor | None  # (G*H,)
    hr: Tensor | None  # (P, H)


def run(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensors | None,
    params: Tensors,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    options: Options | None = None,
) -> tuple[Any, ...]:
    """A stack of recurrent layers, under autocast too, whose arguments were checked.

    Args:
        cell: a key of `CELLS`.
        x: (T, B, I), (B, T, I) if `batch_first`; (N, I) with `batch_sizes` or ``options.cu_seqlens``.
        batch_sizes: of a ``PackedSequence``, or ``None``.
        hx: S states (L*D, B, P or H), or ``None`` for zeros.
        params: torch's flat weights.
        has_biases, num_layers, dropout, train, bidirectional, batch_first: torch's.
        options: what torch does not have, or ``None``.

    Returns:
        The output in the form of the input, the S final states, and with ``return_states`` or ``return_gates`` a
        list of `Trace`, for each layer and direction.
    """
    if _eager.exporter is not None and (exporter := _eager.exporting()) is not None:
        settings = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
        return exporter.run(cell, x, batch_sizes, hx, params, *settings, options)
    if torch._C._is_any_autocast_enabled():
        device = x.device.type
        low = autocast_dtype(device)
        if low is not None:
            settings = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
            return _lowered(cell, device, low, x, batch_sizes, hx, params, settings, options)
    if options is not None and options.precision != "ieee" and (x.dtype != torch.float32 or x.device.type == "cpu"):
        # No difference, so that the short ways below are open.
        options = options._replace(precision="ieee")
        options = None if options == _PLAIN else options
    if (
        options is not None
        and options.checkpoint_every
        and batch_sizes is None
        and options.cu_seqlens is None
        and x.shape[1 if batch_first else 0] == 1
    ):
        # One step stores what a checkpoint would; without other options it is a plain call.
        options = options._replace(checkpoint_every=None)
        options = None if options == _PLAIN else options
    if batch_sizes is None and options is None and len(params) == (4 if has_biases else 2):
        # One layer in one direction: the shortest way to the kernel.
        x = x.transpose(0, 1) if batch_first else x
        weight_ih, weight_hh = params[0], params[1]
        bias_ih, bias_hh = (params[2], params[3]) if has_biases else (None, None)
        h_0 = None if hx is None else hx[0]
        c_0 = None if hx is None or len(hx) == 1 else hx[1]
        if x.shape[0] == 1:
            next_states = quick_step(cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
            if next_states is not None:
                h, c = next_states
                output = h.transpose(0, 1) if batch_first else h
                # Final states may be modified and detached in place: no views, nor what the backward pass reads.
                if c is None:
                    return output, h.clone()
                return output, h.clone(), c.clone() if c.requires_grad else c
        results = layer(cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
        if results is not None:
            return (results[0].transpose(0, 1), *results[1:]) if batch_first else results
        state0 = _zeros(cell, x, x.shape[1], weight_hh.shape[1]) if hx is None else _join(hx)
        output, _, state_n = recurrence(x, weight_hh, bias_hh, state0, cell=cell, weight_ih=weight_ih, bias_ih=bias_ih)
        finals = _halves(state_n) if cell == "lstm" else (state_n,)
        return (output.transpose(0, 1) if batch_first else output, *finals)
    packed = batch_sizes is not None or (options is not None and options.cu_seqlens is not None)
    if batch_first and not packed:
        x = x.transpose(0, 1)
    # States and masks of their own ask for a row of their own, as do the cell states at ends that are not stored.
    alone = hx is not None
    if options is not None and not alone:
        sparse = options.checkpoint_every is not None and torch.is_grad_enabled()
        alone = (train and options.recurrent_dropout > 0) or (sparse and cell == "lstm")
    layout = _layout(x, batch_sizes, batch_first, bidirectional, options, alone)
    count = len(params) // (num_layers * (2 if bidirectional else 1))
    weights = [
        Parameters(
            params[k],
            params[k + 1],
            params[k + 2] if has_biases else None,
            params[k + 3] if has_biases else None,
            params[k + count - 1] if count % 2 else None,
        )
        for k in range(0, len(params), count)
    ]
    stack = _Stack(cell, layout, weights, hx, dropout if train else 0.0, train, bidirectional, options)
    output, states, traces = stack.run(layout.pad(x))

    def restore(x: Tensor) -> Tensor:
        x = layout.restore(x)
        return x.transpose(0, 1) if batch_first and not packed else x

    if options is None or not (options.return_states or options.return_gates):
        return restore(output), *states
    restored = [Trace(*(None if part is None else restore(part) for part in trace)) for trace in traces]
    return restore(output), *states, restored


def _layout(
    x: Tensor,
    batch_sizes: Tensor | None,
    batch_first: bool,
    bidirectional: bool,
    options: Options | None,
    alone: bool,
) -> _sequences.Layout:
    """The layout of input that is padded (T, B, I) or packed (N, I)."""
    options = options or _PLAIN
    reset = options.reset
    if batch_sizes is not None:
        layout = _sequences.packed(x, batch_sizes)
    elif options.cu_seqlens is not None:
        layout = _sequences.documents(x, options.cu_seqlens, options.max_seqlen, alone)
    else:
        layout = _sequences.padded(x, options.lengths)
        reset = reset.t() if batch_first and reset is not None else reset
    return _sequences.controlled(layout, reset, options.tbptt, bidirectional, x.device)


def _zeros(cell: str, x: Tensor, batch: int, hidden: int) -> Tensor:
    return x.new_zeros((CELLS[cell].states, batch, hidden))


def _spread(x: Tensor) -> bool:
    """Whether `x` is a DTensor or the like, which has no rules for some operations."""
    return type(x) is not Tensor and is_traceable_wrapper_subclass(x)


def _projected(hidden: Tensor, weight: Tensor) -> Tensor:
    """Hidden states (T, B, P) by way of `weight` (P, H)."""
    if _spread(hidden):
        # A linear layer views its gradient as a matrix, which a DTensor refuses where the batch lies first.
        return torch.bmm(hidden, weight.t().expand(hidden.shape[0], -1, -1))
    return F.linear(hidden, weight)


def _halves(state_n: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden and cell states from both, one behind the other, as tensors that may be modified."""
    if _spread(state_n):
        # Where only one of the chunks has a gradient, that of the other is a plain zero, which a DTensor refuses.
        size = state_n.shape[0] // 2
        return state_n.narrow(0, 0, size).clone(), state_n.narrow(0, size, size).clone()
    # Unsafe only in name: the parts are tensors of their own, and nothing is copied.
    return state_n.unsafe_chunk(2)  # type: ignore[return-value]


def _join(hx: Tensors) -> Tensor:
    """The S states (1, B, H) of one layer in one direction as one tensor."""
    return hx[0] if len(hx) == 1 else torch.cat(hx)  # type: ignore[arg-type]


class _Stack(NamedTuple):
    """Layers and directions over padded steps (T, B, I)."""

    cell: str
    layout: _sequences.Layout
    weights: list[Parameters]
    hx: Tensors | None
    dropout: float
    train: bool
    bidirectional: bool
    options: Options | None

    def run(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Trace]]:
        """The output (T, B, D*P), the final states (L*D, B, P or H), and a trace for each layer and direction.

        Dropout falls where ATen's layer stack has it, so masks are torch's.
        """
        directions = 2 if self.bidirectional else 1
        finals, traces = [], []
        hidden = self.weights[0].hh.shape[0] // CELLS[self.cell].gates
        zeros = _zeros(self.cell, x, self.layout.batch, hidden) if self.hx is None else None
        # What runs at once: nothing else, the directions of a layer, or all layers of one direction.
        size = (directions if self.bidirectional else len(self.weights)) if self._at_once(x) else 1
        for first in range(0, len(self.weights), max(size, directions)):
            if first and self.dropout:
                x = self._drop(x)
            if size > 1:
                found = self._together(range(first, first + size), x, zeros)
            else:
                found = []
                for k in range(first, first + directions):
                    found.append(self._direction(k, x, self._state(k), zeros, k > first))
            outputs = [output for output, _, _ in found]
            finals += [state_n for _, state_n, _ in found]
            traces += [trace for _, _, trace in found]
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[-1]
        return x, self._finals(finals), traces

    def _state(self, k: int) -> Tensors | None:
        return None if self.hx is None else [s.narrow(0, k, 1) for s in self.hx]

    def _at_once(self, x: Tensor) -> bool:
        """Whether an implementation runs what is between the recurrences, too: plain products and dropout."""
        options = self.options or _PLAIN
        if len(self.weights) == 1 or self.weights[0].hr is not None:
            return False
        if options.norm_ih is not None or options.checkpoint_every is not None:
            return False
        zoneout = any(zoneout_of(self.cell, options.zoneout, False))
        # Of what is drawn only whether it is there counts.
        given = {
            "reset_state": options.reset_state,
            "peephole": options.peephole,
            "norm_h": options.norm_hh,
            "norm_c": options.norm_c,
            "recurrent_mask": [x] if self.train and options.recurrent_dropout else None,
            "zoneout": [x] if zoneout else None,
        }
        first = self.weights[0]
        used = [None if some is None else some[0] for some in map(given.get, Weights._fields[4:])]
        weights = Weights(first.ih, first.hh, first.bias_ih, first.bias_hh, *used)
        together = 2 if self.bidirectional else len(self.weights)
        return serves(x, weights, self.layout.control, self.cell, together)

    def _together(self, which: range, x: Tensor, zeros: Tensor | None) -> list[tuple[Tensor, Tensor, Trace]]:
        """`_direction` of both directions of a layer, or of all layers."""
        options, layout = self.options or _PLAIN, self.layout
        weights, controls, masks = [], [], []
        states: list[Any] = []
        for k in which:
            own, state = self.weights[k], self._state(k)
            drops = self.dropout and not self.bidirectional and k > which[0]
            masks.append(self._mask(x, own.ih.shape[1]) if drops else None)
            extras = {} if self.options is None else self._extras(k, x, options)
            weights.append(
                Weights(own.ih, own.hh, own.bias_ih, own.bias_hh, *(extras.get(name) for name in Weights._fields[4:]))
            )
            states.append(zeros if state is None else _join(state))
            controls.append(layout.control_reverse if self._reverse(k) else layout.control)
        found = recurrences(
            x,
            weights,
            states,
            controls,
            masks,
            cell=self.cell,
            reverse=[self._reverse(k) for k in which],
            chained=not self.bidirectional,
            gates=options.return_gates,
            states=self._wants_states(options),
            precision=options.precision,
        )
        return [self._finish(*results, self._reverse(k)) for k, results in zip(which, found, strict=True)]

    def _reverse(self, k: int) -> bool:
        return self.bidirectional and k % 2 == 1

    def _mask(self, x: Tensor, size: int) -> Tensor:
        """The factors (T, B, P) of dropout, drawn as `_drop` draws them."""
        rows = x.shape[:2] if self.layout.rows is None else self.layout.rows.shape
        mask = F.dropout(x.new_ones((*rows, size)), self.dropout)
        if x.is_cuda and x.dtype.itemsize == 2:
            # There dropout multiplies in float32, by a factor that 16 bits would round.
            mask = (mask != 0).float() * (0.0 if self.dropout == 1 else 1 / (1 - self.dropout))
        return mask if self.layout.rows is None else self.layout.pad(mask)

    def _drop(self, x: Tensor) -> Tensor:
        """Masks of packed data are drawn for its rows, as torch draws them."""
        if self.layout.rows is None:
            return F.dropout(x, self.dropout)
        return self.layout.pad(F.dropout(self.layout.restore(x), self.dropout))

    def _finals(self, finals: list[Tensor]) -> list[Tensor]:
        """The S final states (L*D, B, P or H), each memory that may be modified."""
        if self.cell != "lstm":
            return [finals[0] if len(finals) == 1 else torch.cat(finals)]
        parts = [_halves(state_n) for state_n in finals]
        h_n = [part[0] for part in parts]
        if self.weights[0].hr is not None:
            h_n = [F.linear(h, w.hr) for h, w in zip(h_n, self.weights, strict=True) if w.hr is not None]
            if self.hx is not None and self.layout.lengths is not None:
                # A sequence without steps ends in the given h_0, which the recurrence has not seen.
                none = (self.layout.lengths == 0).unsqueeze(1)
                h_n = [torch.where(none, self.hx[0].narrow(0, k, 1), h) for k, h in enumerate(h_n)]
        if len(finals) == 1:
            return [h_n[0], parts[0][1]]
        return [torch.cat(h_n), torch.cat([part[1] for part in parts])]

    def _direction(
        self, k: int, x: Tensor, state: Tensors | None, zeros: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, Trace]:
        """Hidden states (T, B, P), the final state (S, B, H) and the trace of layer and direction `k`."""
        w, options, layout = self.weights[k], self.options or _PLAIN, self.layout
        control = layout.control_reverse if reverse else layout.control
        weight_ih: Tensor | None = w.ih
        bias_ih, weight_hh, h_0 = w.bias_ih, w.hh, None
        if w.hr is not None:
            # h W_hh^T = (o tanh c) (W_hh W_hr)^T: the recurrence runs over the unprojected state. The given h_0 is
            # projected already, so its product goes straight into the gates of the first step.
            weight_hh = w.hh @ w.hr
            if state is not None:
                h_0, state = state[0].squeeze(0), (torch.zeros_like(state[1]), state[1])
        if h_0 is not None or options.norm_ih is not None:
            norm = None if options.norm_ih is None else options.norm_ih[k]
            # Unlike the recurrence, this product would carry NaN in the padding into the weight's gradient.
            x = _input_gates(layout.clear(x), w.ih, w.bias_ih, norm)
            weight_ih = bias_ih = None
        if h_0 is not None:
            norm = None if options.norm_hh is None else options.norm_hh[k]
            x = self._enter(x, F.linear(h_0, w.hh), norm, control, reverse)
        state0: Any = zeros if state is None else _join(state)
        named: dict[str, Any] = {"cell": self.cell, "reverse": reverse, "weight_ih": weight_ih, "bias_ih": bias_ih}
        if self.options is not None:
            named |= self._extras(k, x, self.options)
        hidden, cells, state_n, *gates = recurrence(x, weight_hh, w.bias_hh, state0, control, **named)
        hidden, state_n, trace = self._finish(hidden, cells, state_n, gates[0] if gates else None, reverse)
        if w.hr is None:
            return hidden, state_n, trace
        hidden = _projected(hidden, w.hr)
        return hidden, state_n, trace if trace.hidden is None else trace._replace(hidden=hidden)

    def _finish(
        self, hidden: Tensor, cells: Tensor | None, state_n: Tensor, gates: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, Trace]:
        """The hidden states, the final state (S, B, H) and the trace of what a recurrence returned."""
        layout = self.layout
        if layout.ends is not None:
            begin, end, there = layout.ends
            parts = [part.flatten(0, 1) for part in (hidden, cells) if part is not None]
            ends = torch.stack([part.index_select(0, begin if reverse else end) for part in parts])
            state_n = ends.masked_fill(there.logical_not().unsqueeze(1), 0)
        states = (self.options or _PLAIN).return_states
        return hidden, state_n, Trace(hidden if states else None, cells if states else None, gates)

    def _enter(
        self, gates: Tensor, entering: Tensor, norm: Tensor | None, control: Tensor | None, reverse: bool
    ) -> Tensor:
        """Input gates (T, B, G*H) to which the recurrent part (B, G*H) of each sequence's first step is added."""
        if norm is not None:
            entering = F.layer_norm(entering, norm.shape, norm, eps=NORM_EPS)
        if control is not None and not reverse:
            entering = entering.masked_fill((control[0] & RESET).bool().unsqueeze(1), 0)
        first = self.layout.first(reverse)
        if first is None:
            gates[-1 if reverse else 0].add_(entering)
            return gates
        return gates.flatten(0, 1).index_add(0, first, entering).view_as(gates)

    def _wants_states(self, options: Options) -> bool:
        """Whether the cell states of all steps are asked for."""
        return options.return_states or (self.layout.ends is not None and self.cell == "lstm")

    def _extras(self, k: int, x: Tensor, options: Options) -> dict[str, Any]:
        """Keyword arguments of the recurrence for layer and direction `k`, random ones from torch's generator."""
        states = self._wants_states(options)
        every = 0 if states or options.checkpoint_every is None else options.checkpoint_every
        extras: dict[str, Any] = {
            "states": states,
            "gates": options.return_gates,
            "every": every,
            "precision": options.precision,
        }
        for name, tensors in (
            ("reset_state", options.reset_state),
            ("norm_h", options.norm_hh),
            ("norm_c", options.norm_c),
            ("peephole", options.peephole),
        ):
            if tensors is not None:
                extras[name] = tensors[k]
        if self.train and options.recurrent_dropout:
            ones = x.new_ones(self.layout.batch, self.weights[k].hh.shape[0] // CELLS[self.cell].gates)
            extras["recurrent_mask"] = F.dropout(ones, options.recurrent_dropout)
        chances = zoneout_of(self.cell, options.zoneout, False)
        if any(chances):
            full = [torch.full((), p, dtype=torch.float32, device=x.device) for p in chances]
            extras["zoneout"] = torch.stack(full)
            if self.train:
                extras["seed"] = torch.randint(2**63 - 1, (), device=x.device)
        return extras


_PLAIN = Options()


def _input_gates(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None) -> Tensor:
    """The input part of the gates, outside of the recurrence; a batch-major layout stays, so nothing is copied."""
    if x.dim() == 3 and not x.is_contiguous() and x.transpose(0, 1).is_contiguous():
        return _input_gates(x.transpose(0, 1), weight, bias, norm).transpose(0, 1)
    if norm is None:
        return F.linear(x, weight, bias)
    return F.layer_norm(F.linear(x, weight), norm.shape, norm, bias, NORM_EPS)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on a device, or ``None`` where it is off."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def lower(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype` by autocast's own rule: float64 stays what it is."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def _lowered(
    cell: str,
    device: str,
    low: torch.dtype,
    x: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensors | None,
    params: Tensors,
    settings: tuple[bool, int, float, bool, bool, bool],
    options: Options | None,
) -> tuple[Any, ...]:
    """`run` under autocast to `low`."""
    if options is not None:
        lists: dict[str, Any] = {name: getattr(options, name) for name in LISTS}
        lists = {name: [lower(p, low) for p in tensors] for name, tensors in lists.items() if tensors is not None}
        options = options._replace(**lists)
    states = None if hx is None else [lower(s, low) for s in hx]
    with torch.autocast(device, enabled=False):
        results = run(
            cell, lower(x, low), batch_sizes, states, [lower(p, low) for p in params], *settings, options=options
        )
    if device != "cpu" or cell.startswith("rnn") or results[0].dtype != low:
        return results
    # On the CPU torch lets the dtype of the initial state widen the results of these forms.
    wide = torch.promote_types(low, x.dtype if hx is None else hx[-1].dtype)
    count = 1 + CELLS[cell].states
    if cell == "lstm" and results[1].shape[-1] != results[2].shape[-1]:
        return (*results[:2], results[2].to(wide), *results[count:])
    if cell == "gru" or batch_sizes is not None:
        return (*(r.to(wide) for r in results[:count]), *results[count:])
    return results


def step(
    cell: str,
    x: Tensor,
    states: Tensors | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> tuple[Tensor, ...]:
    """One step of a cell: the S next states (B, H), under autocast too, of arguments that were checked.

    Args:
        cell: a key of `CELLS`.
        x: (B, I).
        states: S states (B, H), or ``None`` for zeros.
        weight_ih, weight_hh, bias_ih, bias_hh: (G*H, I), (G*H, H), (G*H,) and (G*H,) or ``None``.
    """
    if _eager.exporter is not None and (exporter := _eager.exporting()) is not None:
        return exporter.step(cell, x, states, weight_ih, weight_hh, bias_ih, bias_hh)
    if torch._C._is_any_autocast_enabled():
        device = x.device.type
        low = autocast_dtype(device)
        if low is not None:
            tensors = [None if t is None else lower(t, low) for t in (x, weight_ih, weight_hh, bias_ih, bias_hh)]
            lowered, w_ih, w_hh, b_ih, b_hh = tensors
            given = None if states is None else [lower(s, low) for s in states]
            with torch.autocast(device, enabled=False):
                results = step(cell, lowered, given, w_ih, w_hh, b_ih, b_hh)  # type: ignore[arg-type]
            last = x.dtype if states is None else states[-1].dtype
            wide = low if device != "cpu" or cell.startswith("rnn") else torch.promote_types(low, last)
            return tuple(r.to(wide) if r.dtype == low else r for r in results)
    lstm = cell == "lstm"
    if states is None:
        state0 = _zeros(cell, x, x.shape[0], weight_hh.shape[1])
    else:
        state0 = torch.stack(states) if lstm else states[0].unsqueeze(0)  # type: ignore[arg-type]
    _, _, state_n = recurrence(
        x.unsqueeze(0), weight_hh, bias_hh, state0, cell=cell, weight_ih=weight_ih, bias_ih=bias_ih
    )
    if _spread(state_n):
        return tuple(state_n[k].clone() for k in range(CELLS[cell].states))
    # As in `run`: no views, and no copies.
    return state_n.flatten(0, 1).unsafe_chunk(2 if lstm else 1)
