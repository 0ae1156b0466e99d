"""The recurrence on the CPU: one compiled call per thread runs all steps of its batch rows.

A step is one product of the states with the transposed weight, whose sums start from the input part of the gates,
and the cell on the sums while they are in the cache. The backward pass writes the gradients of the gates. The
products with the input and those for the weight gradients are torch's, over all steps at once. Formulas:
``docs/recurrence.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...cells import CELLS, DETACH, HOLD, RESET, Weights, accumulate_dtype
from .simd import PANEL_BYTES, TILE_ROWS, Array, add_product, flat, kernel, panels, sigmoid, tanh_all
from .team import run, team_size

_CODES = {cell: code for code, cell in enumerate(CELLS)}
_RNN_TANH, _LSTM, _GRU = _CODES["rnn_tanh"], _CODES["lstm"], _CODES["gru"]


@kernel
def _rnn_cell(gates: Array, h: Array, is_tanh: bool) -> None:
    h[:] = gates
    if is_tanh:
        tanh_all(h)
    else:
        zero = h.dtype.type(0)
        for j in range(h.size):
            # Not max(): NaN stays NaN.
            h[j] = zero if h[j] < zero else h[j]


@kernel
def _lstm_cell(gates: Array, h: Array, c: Array) -> None:
    size = h.size
    sigmoid(gates[: 2 * size])
    tanh_all(gates[2 * size : 3 * size])
    sigmoid(gates[3 * size :])
    i, f, g, o = gates[:size], gates[size : 2 * size], gates[2 * size : 3 * size], gates[3 * size :]
    for j in range(size):
        c[j] = f[j] * c[j] + i[j] * g[j]
    h[:] = c
    tanh_all(h)
    for j in range(size):
        h[j] *= o[j]


@kernel
def _gru_cell(gates: Array, x: Array, h: Array, n: Array) -> None:
    size = h.size
    sigmoid(gates[: 2 * size])
    r, z, recurrent = gates[:size], gates[size : 2 * size], gates[2 * size :]
    for j in range(size):
        n[j] = x[j] + r[j] * recurrent[j]
    tanh_all(n)
    one = h.dtype.type(1)
    for j in range(size):
        h[j] = (one - z[j]) * n[j] + z[j] * h[j]


@kernel
def _forward(
    gates_x: Array,  # (T, B, G*H)
    weight: Array,  # panels of the transposed weight_hh (H, G*H)
    bias: Array,  # (G*H,)
    state0: Array,  # (S, B, H)
    control: Array,  # (T, B) or empty
    states: Array,  # (S, T+1, B, H), out; S = 1 unless save
    state_n: Array,  # (S, B, H), out
    reserve: Array,  # (T, B, R, H), out
    cell: int,
    reverse: bool,
    save: bool,
    steps: int,
    batch: int,
    hidden: int,
    begin: int,
    end: int,
) -> None:
    """All steps of batch rows `begin` to `end`."""
    rows = end - begin
    gate_size = bias.size
    columns = weight.size // (hidden * (PANEL_BYTES // weight.itemsize))
    width = columns * (PANEL_BYTES // weight.itemsize)
    # Columns of gates_x that go into the sums; the GRU's n gate takes its part afterwards.
    summed = 2 * hidden if cell == _GRU else gate_size
    num_states = 2 if cell == _LSTM else 1
    zero = weight.dtype.type(0)
    origin, adjacent = np.intp(0), np.intp(1)
    gates = np.zeros((rows, width), weight.dtype)
    gates_flat = gates.reshape(-1)
    h = np.empty((rows, hidden), weight.dtype)
    h_flat = h.reshape(-1)
    c = np.empty((rows, hidden), weight.dtype)
    n = np.empty(hidden, weight.dtype)
    first = steps if reverse else 0
    for r in range(rows):
        at = (begin + r) * hidden
        h[r] = state0[at : at + hidden]
        if num_states == 2:
            at += batch * hidden
            c[r] = state0[at : at + hidden]
        for s in range(num_states if save else 1):
            at = ((s * (steps + 1) + first) * batch + begin + r) * hidden
            states[at : at + hidden] = c[r] if s else h[r]
    for step in range(steps):
        t = steps - 1 - step if reverse else step
        after = t if reverse else t + 1
        for r in range(rows):
            row = t * batch + begin + r
            bits = control[row] if control.size else 0
            if bits & RESET:
                h[r] = zero
                c[r] = zero
            total = gates[r]
            if bits & HOLD:
                total[:] = zero
            else:
                x = gates_x[row * gate_size : (row + 1) * gate_size]
                for j in range(summed):
                    total[j] = x[j] + bias[j]
                for j in range(summed, gate_size):
                    total[j] = bias[j]
        add_product(
            h_flat, origin, hidden, adjacent, weight, origin, width // columns * hidden, hidden,
            gates_flat, origin, width, rows, columns,
        )  # fmt: skip
        for r in range(rows):
            row = t * batch + begin + r
            held = control.size > 0 and control[row] & HOLD
            total = gates[r, :gate_size]
            saved = reserve[row * 4 * hidden : (row + 1) * 4 * hidden]
            if held:
                saved[:] = zero
            elif cell == _LSTM:
                _lstm_cell(total, h[r], c[r])
                if save:
                    saved[:] = total
            elif cell == _GRU:
                x = gates_x[row * gate_size + 2 * hidden : (row + 1) * gate_size]
                _gru_cell(total, x, h[r], n)
                if save:
                    saved[: 2 * hidden] = total[: 2 * hidden]
                    saved[2 * hidden : 3 * hidden] = n
                    saved[3 * hidden :] = total[2 * hidden :]
            else:
                _rnn_cell(total, h[r], cell == _RNN_TANH)
            at = (after * batch + begin + r) * hidden
            states[at : at + hidden] = h[r]
            if save and num_states == 2:
                at += (steps + 1) * batch * hidden
                states[at : at + hidden] = c[r]
    for r in range(rows):
        at = (begin + r) * hidden
        state_n[at : at + hidden] = h[r]
        if num_states == 2:
            at += batch * hidden
            state_n[at : at + hidden] = c[r]


def recurrence_forward(
    input: Tensor,
    weights: Weights,
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    save: bool,
    every: int = 0,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """``seqkernels::recurrence_forward``, without options of the cell.

    Args:
        input, state0, control, cell, reverse: as in `seqkernels.ops.recurrence.recurrence`.
        weights: of which ``weight_ih``, ``weight_hh`` and the biases are used.
        save: whether a backward pass will follow.
        every: 0; checkpoints are declined by ``unsupported``.
        precision: no difference here.

    Returns:
        ``states`` (S, T+1, B, H), only the hidden state unless `save`; ``state_n`` (S, B, H); ``reserve``
        (T, B, R, H), empty unless `save`.
    """
    dtype, acc = input.dtype, accumulate_dtype(input.dtype)
    steps, batch, _ = input.shape
    num_states, _, hidden = state0.shape
    x = input.detach().to(acc)
    if weights.weight_ih is not None:
        x = F.linear(x, weights.weight_ih.detach().to(acc), _maybe(weights.bias_ih, acc))
    x = x.contiguous()
    gate_size = x.shape[2]
    weight = panels(weights.weight_hh.detach().to(acc).t())
    bias = _maybe(weights.bias_hh, acc)
    bias = x.new_zeros(gate_size) if bias is None else bias.contiguous()
    start = state0.detach().to(acc).contiguous()
    states = x.new_empty((num_states if save else 1, steps + 1, batch, hidden))
    state_n = torch.empty_like(start)
    reserve = x.new_empty((steps, batch, CELLS[cell].reserve, hidden) if save else (0,))
    arrays = [flat(tensor) for tensor in (x, weight, bias, start, _bits(control), states, state_n, reserve)]

    def task(begin: int, end: int, chunk: int) -> None:
        _forward(*arrays, _CODES[cell], reverse, save, steps, batch, hidden, begin, end)

    work = 2.0 * steps * batch * gate_size * (hidden + 16)
    threads = team_size(batch, work)
    run(task, batch, threads, threads, TILE_ROWS if batch >= threads * TILE_ROWS else 1)
    return states.to(dtype), state_n.to(dtype), reserve


def _maybe(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype)


def _bits(control: Tensor | None) -> Tensor:
    return torch.empty(0, dtype=torch.uint8) if control is None else control.contiguous()


@kernel
def _lstm_cell_backward(
    grad_gates: Array, grad_h: Array, grad_c: Array, saved: Array, c: Array, tanh_c: Array, keep: bool, before: Array
) -> None:
    size = grad_h.size
    one = grad_h.dtype.type(1)
    i, f, g, o = saved[:size], saved[size : 2 * size], saved[2 * size : 3 * size], saved[3 * size :]
    tanh_c[:] = c
    tanh_all(tanh_c)
    for j in range(size):
        grad_c[j] += grad_h[j] * o[j] * (one - tanh_c[j] * tanh_c[j])
    out = grad_gates[:size]
    for j in range(size):
        out[j] = grad_c[j] * g[j] * i[j] * (one - i[j])
    out = grad_gates[size : 2 * size]
    if keep:
        for j in range(size):
            out[j] = grad_c[j] * before[j] * f[j] * (one - f[j])
    else:
        out[:] = grad_h.dtype.type(0)
    out = grad_gates[2 * size : 3 * size]
    for j in range(size):
        out[j] = grad_c[j] * i[j] * (one - g[j] * g[j])
    out = grad_gates[3 * size :]
    for j in range(size):
        out[j] = grad_h[j] * tanh_c[j] * o[j] * (one - o[j])
    for j in range(size):
        grad_c[j] *= f[j]
    grad_h[:] = grad_h.dtype.type(0)


@kernel
def _gru_cell_backward(
    grad_gates_x: Array, grad_gates_h: Array, grad_h: Array, saved: Array, keep: bool, before: Array
) -> None:
    size = grad_h.size
    one, zero = grad_h.dtype.type(1), grad_h.dtype.type(0)
    r, z, n, recurrent = saved[:size], saved[size : 2 * size], saved[2 * size : 3 * size], saved[3 * size :]
    grad_r, grad_z, grad_n = grad_gates_x[:size], grad_gates_x[size : 2 * size], grad_gates_x[2 * size :]
    for j in range(size):
        grad_n[j] = grad_h[j] * (one - z[j]) * (one - n[j] * n[j])
    for j in range(size):
        grad_z[j] = grad_h[j] * ((before[j] if keep else zero) - n[j]) * z[j] * (one - z[j])
    for j in range(size):
        grad_r[j] = grad_n[j] * recurrent[j] * r[j] * (one - r[j])
    grad_gates_h[: 2 * size] = grad_gates_x[: 2 * size]
    out = grad_gates_h[2 * size :]
    for j in range(size):
        out[j] = grad_n[j] * r[j]
    for j in range(size):
        grad_h[j] *= z[j]


@kernel
def _rnn_cell_backward(grad_gates: Array, grad_h: Array, h: Array, is_tanh: bool) -> None:
    one, zero = grad_h.dtype.type(1), grad_h.dtype.type(0)
    if is_tanh:
        for j in range(h.size):
            grad_gates[j] = grad_h[j] * (one - h[j] * h[j])
    else:
        for j in range(h.size):
            grad_gates[j] = grad_h[j] * (one if h[j] > zero else zero)
    grad_h[:] = zero


@kernel
def _backward(
    grad_hidden: Array,  # (T, B, H) or empty
    grad_cells: Array,  # (T, B, H) or empty
    grad_state_n: Array,  # (S, B, H)
    weight: Array,  # panels of weight_hh (G*H, H)
    states: Array,  # (S, T+1, B, H)
    reserve: Array,  # (T, B, R, H)
    control: Array,  # (T, B) or empty
    grad_gates_x: Array,  # (T, B, G*H), out
    grad_gates_h: Array,  # (T, B, G*H), out; the same array unless the cell is a GRU
    grad_state0: Array,  # (S, B, H), out
    cell: int,
    reverse: bool,
    steps: int,
    batch: int,
    hidden: int,
    gate_size: int,
    begin: int,
    end: int,
) -> None:
    """All steps of batch rows `begin` to `end`, last step first."""
    rows = end - begin
    columns = -(-hidden // (PANEL_BYTES // weight.itemsize))
    width = columns * (PANEL_BYTES // weight.itemsize)
    num_states = 2 if cell == _LSTM else 1
    zero = weight.dtype.type(0)
    origin, adjacent = np.intp(0), np.intp(1)
    grad_h = np.zeros((rows, width), weight.dtype)
    grad_h_flat = grad_h.reshape(-1)
    grad_c = np.zeros((rows, hidden), weight.dtype)
    tanh_c = np.empty(hidden, weight.dtype)
    plane = (steps + 1) * batch * hidden
    for r in range(rows):
        at = (begin + r) * hidden
        grad_h[r, :hidden] = grad_state_n[at : at + hidden]
        if num_states == 2:
            at += batch * hidden
            grad_c[r] = grad_state_n[at : at + hidden]
    for step in range(steps):
        t = step if reverse else steps - 1 - step
        before, after = (t + 1, t) if reverse else (t, t + 1)
        for r in range(rows):
            row = t * batch + begin + r
            bits = control[row] if control.size else 0
            dh = grad_h[r, :hidden]
            if grad_hidden.size:
                dh += grad_hidden[row * hidden : (row + 1) * hidden]
            if grad_cells.size:
                grad_c[r] += grad_cells[row * hidden : (row + 1) * hidden]
            out_x = grad_gates_x[row * gate_size : (row + 1) * gate_size]
            out_h = grad_gates_h[row * gate_size : (row + 1) * gate_size]
            saved = reserve[row * 4 * hidden : (row + 1) * 4 * hidden]
            old = (before * batch + begin + r) * hidden
            new = (after * batch + begin + r) * hidden
            keep = not (bits & RESET)
            if bits & HOLD:
                out_x[:] = zero
                out_h[:] = zero
            elif cell == _LSTM:
                c_new, c_old = states[plane + new : plane + new + hidden], states[plane + old : plane + old + hidden]
                _lstm_cell_backward(out_x, dh, grad_c[r], saved, c_new, tanh_c, keep, c_old)
            elif cell == _GRU:
                _gru_cell_backward(out_x, out_h, dh, saved, keep, states[old : old + hidden])
            else:
                _rnn_cell_backward(out_x, dh, states[new : new + hidden], cell == _RNN_TANH)
        add_product(
            grad_gates_h, (t * batch + begin) * gate_size, gate_size, adjacent,
            weight, origin, width // columns * gate_size, gate_size, grad_h_flat, origin, width, rows, columns,
        )  # fmt: skip
        if control.size:
            for r in range(rows):
                if control[t * batch + begin + r] & (RESET | DETACH):
                    grad_h[r] = zero
                    grad_c[r] = zero
    for r in range(rows):
        at = (begin + r) * hidden
        grad_state0[at : at + hidden] = grad_h[r, :hidden]
        if num_states == 2:
            at += batch * hidden
            grad_state0[at : at + hidden] = grad_c[r]


def recurrence_backward(
    grads: Sequence[Tensor | None],
    input: Tensor,
    weights: Weights,
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    needs: Sequence[bool],
    every: int = 0,
    precision: str = "ieee",
) -> list[Tensor]:
    """``seqkernels::recurrence_backward``: back-propagation through time, then products over all steps.

    Args:
        grads: gradients of the hidden state and of the LSTM's cell state of each step (T, B, H) and of the last state
            (S, B, H), any of them ``None``; a gradient of the gates is declined by ``unsupported``.
        input, weights, control, cell, reverse: as in the forward pass.
        states: (S, T+1, B, H), from the forward pass of any implementation.
        reserve: (T, B, R, H), likewise.
        needs: whether the gradient is wanted, of the input, of the initial state, of each of `weights`.
        every: 0; checkpoints are declined by ``unsupported``.
        precision: no difference here.

    Returns:
        For each of `needs` the gradient in shape and dtype of its tensor; empty where there is no need.
    """
    dtype, acc = states.dtype, accumulate_dtype(states.dtype)
    num_states, steps, batch, hidden = states.shape
    steps -= 1
    gate_size = weights.weight_hh.shape[0]
    history = states.detach().to(acc).contiguous()
    empty = history.new_empty(0)
    of_steps = [empty if grad is None else grad.detach().to(acc).contiguous() for grad in grads[:2]]
    of_end = _maybe(grads[2], acc)
    of_end = history.new_zeros((num_states, batch, hidden)) if of_end is None else of_end.contiguous()
    weight = panels(weights.weight_hh.detach().to(acc))
    bits = _bits(control)
    grad_gates_x = history.new_empty((steps, batch, gate_size))
    grad_gates_h = torch.empty_like(grad_gates_x) if cell == "gru" else grad_gates_x
    grad_state0 = torch.empty_like(of_end)
    tensors = (*of_steps, of_end, weight, history, reserve.detach().contiguous(), bits)
    arrays = [flat(tensor) for tensor in (*tensors, grad_gates_x, grad_gates_h, grad_state0)]

    def task(begin: int, end: int, chunk: int) -> None:
        _backward(*arrays, _CODES[cell], reverse, steps, batch, hidden, gate_size, begin, end)

    work = 2.0 * steps * batch * gate_size * (hidden + 16)
    threads = team_size(batch, work)
    run(task, batch, threads, threads, TILE_ROWS if batch >= threads * TILE_ROWS else 1)
    of_x, of_h = grad_gates_x.flatten(0, 1), grad_gates_h.flatten(0, 1)
    weight_ih = weights.weight_ih

    def of_input() -> Tensor:
        return grad_gates_x if weight_ih is None else grad_gates_x @ weight_ih.detach().to(acc)

    def of_weight_ih() -> Tensor:
        return of_x.t() @ _unless(input.detach().to(acc), control, HOLD).flatten(0, 1)

    def of_weight_hh() -> Tensor:
        before = history[0, 1:] if reverse else history[0, :-1]
        return of_h.t() @ _unless(before, control, RESET).flatten(0, 1)

    made: dict[str, Callable[[], Tensor]] = {
        "input": of_input,
        "state0": lambda: grad_state0,
        "weight_ih": of_weight_ih,
        "weight_hh": of_weight_hh,
        "bias_ih": lambda: of_x.sum(0),
        "bias_hh": lambda: of_h.sum(0),
    }
    given = ("input", "state0", *(n for n, x in zip(Weights._fields, weights, strict=True) if x is not None))
    return [
        made[name]().to(dtype) if need and name in given else input.new_empty(0)
        for name, need in zip(("input", "state0", *Weights._fields), needs, strict=True)
    ]


def _unless(x: Tensor, control: Tensor | None, bit: int) -> Tensor:
    """`x` (T, B, ...) with 0 in the steps of `control` that have `bit`."""
    return x if control is None else x.masked_fill((control & bit).bool().unsqueeze(2), 0)
