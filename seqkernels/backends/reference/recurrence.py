"""The recurrence in plain PyTorch: a loop over time, and the backward pass written out.

`recurrence` is differentiable by autograd and serves as the oracle; `recurrence_backward` is the same mathematics
by hand (``docs/recurrence.md``), as the op needs it, and is tested against autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...cells import CELLS, HOLD, RESET, accumulate_dtype


def step(gates_x: Tensor, gates_h: Tensor, state: tuple[Tensor, ...], cell: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """One step of a cell: new states, and what the backward pass needs of it.

    Args:
        gates_x: (B, G*H), input part of the gates.
        gates_h: (B, G*H), recurrent part of the gates, bias included.
        state: S tensors (B, H).
        cell: a key of `CELLS`.

    Returns:
        S tensors (B, H) and the reserve (B, R, H).
    """
    h = state[0]
    if cell == "lstm":
        i, f, g, o = (gates_x + gates_h).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * state[1] + i * g
        return (o * c.tanh(), c), torch.stack((i, f, g, o), 1)
    if cell == "gru":
        rx, zx, nx = gates_x.chunk(3, 1)
        rh, zh, nh = gates_h.chunk(3, 1)
        r, z = (rx + rh).sigmoid(), (zx + zh).sigmoid()
        n = (nx + r * nh).tanh()
        return ((1 - z) * n + z * h,), torch.stack((r, z, n, nh), 1)
    gates = gates_x + gates_h
    return (gates.tanh() if cell == "rnn_tanh" else gates.relu(),), h.new_empty(h.shape[0], 0, h.shape[1])


def recurrence(
    gates_x: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence as a differentiable loop.

    Args:
        gates_x, weight_hh, bias_hh, state0, control, cell, reverse: as in `seqkernels.ops.recurrence.recurrence`.

    Returns:
        ``states`` (S, T+1, B, H), where step t ends in ``[:, t + 1]`` (``[:, t]`` in reverse) and the other end is
        `state0`; ``state_n`` (S, B, H); ``reserve`` (T, B, R, H): the activated gates i, f, g, o of the LSTM;
        r, z, n and ``weight_hn h + bias_hn`` of the GRU.
    """
    dtype = gates_x.dtype
    acc = accumulate_dtype(dtype)
    weight_t = weight_hh.to(acc).t()
    bias = None if bias_hh is None else bias_hh.to(acc)
    steps = gates_x.shape[0]
    state = tuple(state0.to(acc).unbind(0))
    history, reserve = [state], []
    for t in reversed(range(steps)) if reverse else range(steps):
        hold = None
        if control is not None:
            reset = (control[t] & RESET).bool().unsqueeze(1)
            hold = (control[t] & HOLD).bool().unsqueeze(1)
            state = tuple(s.masked_fill(reset, 0) for s in state)
        x = gates_x[t].to(acc)
        if hold is not None:
            x = x.masked_fill(hold, 0)
        gates_h = state[0] @ weight_t
        new, saved = step(x, gates_h if bias is None else gates_h + bias, state, cell)
        state = new if hold is None else tuple(torch.where(hold, s, n) for s, n in zip(state, new, strict=True))
        history.append(state)
        reserve.append(saved)
    if reverse:
        history.reverse()
        reserve.reverse()
    states = torch.stack([torch.stack(column) for column in zip(*history, strict=True)])
    shape = (0, gates_x.shape[1], CELLS[cell].reserve, weight_hh.shape[1])
    saved = torch.stack(reserve) if reserve else gates_x.new_empty(shape, dtype=acc)
    return states.to(dtype), torch.stack(state).to(dtype), saved


def recurrence_forward(
    gates_x: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``seqkernels::recurrence_forward``: `recurrence`, without what only a backward pass needs unless `save`."""
    states, state_n, reserve = recurrence(gates_x, weight_hh, bias_hh, state0, control, cell, reverse)
    if not save:
        return states[:1].clone(), state_n, reserve.new_empty(0)
    return states, state_n, reserve


def recurrence_backward(
    grad_hidden: Tensor | None,
    grad_cells: Tensor | None,
    grad_state_n: Tensor | None,
    weight_hh: Tensor,
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``seqkernels::recurrence_backward``: back-propagation through time.

    Args:
        grad_hidden, grad_cells: (T, B, H) or ``None``, gradients of the states of each step.
        grad_state_n: (S, B, H) or ``None``.
        weight_hh: (G*H, H).
        states, reserve: from the forward pass.
        control, cell, reverse: as in the forward pass.

    Returns:
        Gradients of gates_x (T, B, G*H), weight_hh, bias_hh (G*H,) and state0 (S, B, H).
    """
    dtype = states.dtype
    acc = accumulate_dtype(dtype)
    num_states, steps, batch, hidden = states.shape
    steps -= 1
    weight = weight_hh.to(acc)
    h = states.to(acc)
    grad = list(h.new_zeros(num_states, batch, hidden) if grad_state_n is None else grad_state_n.to(acc))
    grad_gates_x = h.new_zeros(steps, batch, weight_hh.shape[0])
    grad_weight = torch.zeros_like(weight)
    grad_bias = torch.zeros_like(weight[:, 0])
    for t in range(steps) if reverse else reversed(range(steps)):
        before, after = (t + 1, t) if reverse else (t, t + 1)
        for s, of_step in enumerate((grad_hidden, grad_cells)[:num_states]):
            if of_step is not None:
                grad[s] = grad[s] + of_step[t].to(acc)
        prev = [h[s, before] for s in range(num_states)]
        reset = hold = None
        if control is not None:
            reset = (control[t] & RESET).bool().unsqueeze(1)
            hold = (control[t] & HOLD).bool().unsqueeze(1)
            prev = [p.masked_fill(reset, 0) for p in prev]
        new_grad, gates_x_grad, gates_h_grad = _step_backward(
            grad, prev, [h[s, after] for s in range(num_states)], reserve[t], cell
        )
        if hold is not None:
            gates_x_grad, gates_h_grad = gates_x_grad.masked_fill(hold, 0), gates_h_grad.masked_fill(hold, 0)
        new_grad[0] = new_grad[0] + gates_h_grad @ weight
        if hold is not None:
            new_grad = [torch.where(hold, old, new) for old, new in zip(grad, new_grad, strict=True)]
        if reset is not None:
            new_grad = [g.masked_fill(reset, 0) for g in new_grad]
        grad = new_grad
        grad_gates_x[t] = gates_x_grad
        grad_weight += gates_h_grad.t() @ prev[0]
        grad_bias += gates_h_grad.sum(0)
    return grad_gates_x.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype), torch.stack(grad).to(dtype)


def _step_backward(
    grad: list[Tensor], prev: list[Tensor], new: list[Tensor], reserve: Tensor, cell: str
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Through one cell: gradients of the previous states (without the recurrent product) and of both gate parts."""
    if cell == "lstm":
        i, f, g, o = reserve.unbind(1)
        tanh_c = new[1].tanh()
        grad_c = grad[1] + grad[0] * o * (1 - tanh_c * tanh_c)
        gates = torch.cat(
            (
                grad_c * g * i * (1 - i),
                grad_c * prev[1] * f * (1 - f),
                grad_c * i * (1 - g * g),
                grad[0] * tanh_c * o * (1 - o),
            ),
            1,
        )
        return [torch.zeros_like(grad_c), grad_c * f], gates, gates
    if cell == "gru":
        r, z, n, nh = reserve.unbind(1)
        grad_n = grad[0] * (1 - z) * (1 - n * n)
        grad_z = grad[0] * (prev[0] - n) * z * (1 - z)
        grad_r = grad_n * nh * r * (1 - r)
        return (
            [grad[0] * z],
            torch.cat((grad_r, grad_z, grad_n), 1),
            torch.cat((grad_r, grad_z, grad_n * r), 1),
        )
    slope = 1 - new[0] * new[0] if cell == "rnn_tanh" else (new[0] > 0).to(new[0].dtype)
    gates = grad[0] * slope
    return [torch.zeros_like(gates)], gates, gates
