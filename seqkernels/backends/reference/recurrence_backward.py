"""The backward pass of the plain recurrence written out: the mathematics of ``docs/recurrence.md``, as the op needs it.

It is tested against autograd through the loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...cells import DETACH, HOLD, RESET, Weights, accumulate_dtype


def through_time(
    grads: Sequence[Tensor | None],
    input: Tensor,
    weights: Weights,
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Back-propagation through time, for cells without options.

    Args:
        grads, input, weights, states, reserve, control, cell, reverse, needs: as in ``recurrence_backward``.

    Returns:
        For each of `needs` the gradient in the accumulation dtype, ``None`` where there is no need.
    """
    acc = accumulate_dtype(states.dtype)
    num_states, steps, batch, hidden = states.shape
    steps -= 1
    weight = weights.weight_hh.to(acc)
    h = states.to(acc)
    grad_hidden, grad_cells, grad_state_n, _ = grads
    grad = list(h.new_zeros(num_states, batch, hidden) if grad_state_n is None else grad_state_n.to(acc))
    fresh = h.new_zeros(num_states, 1) if weights.reset_state is None else weights.reset_state.to(acc)
    grad_fresh = h.new_zeros(num_states, hidden)
    grad_gates_x = h.new_zeros(steps, batch, weight.shape[0])
    grad_gates_h = torch.zeros_like(grad_gates_x)
    entering = h.new_zeros(steps, batch, hidden)
    for t in range(steps) if reverse else reversed(range(steps)):
        before, after = (t + 1, t) if reverse else (t, t + 1)
        for s, of_step in enumerate((grad_hidden, grad_cells)[:num_states]):
            if of_step is not None:
                grad[s] = grad[s] + of_step[t].to(acc)
        prev = [h[s, before] for s in range(num_states)]
        if control is not None:
            reset, hold, detach = ((control[t] & bit).bool().unsqueeze(1) for bit in (RESET, HOLD, DETACH))
            prev = [torch.where(reset, f, p) for f, p in zip(fresh, prev, strict=True)]
        new_grad, of_x, of_h = _step(grad, prev, [h[s, after] for s in range(num_states)], reserve[t], cell)
        if control is not None:
            of_x, of_h = of_x.masked_fill(hold, 0), of_h.masked_fill(hold, 0)
        new_grad[0] = new_grad[0] + of_h @ weight
        if control is not None:
            new_grad = [torch.where(hold, old, new) for old, new in zip(grad, new_grad, strict=True)]
            grad_fresh += torch.stack([g.masked_fill(~reset, 0).sum(0) for g in new_grad])
            new_grad = [g.masked_fill(reset | detach, 0) for g in new_grad]
        grad, grad_gates_x[t], grad_gates_h[t], entering[t] = new_grad, of_x, of_h, prev[0]
    x = input.to(acc)
    if control is not None:
        x = x.masked_fill((control & HOLD).bool().unsqueeze(2), 0)
    inputs = ("input", "state0", *Weights._fields)
    found = {
        "input": lambda: grad_gates_x if weights.weight_ih is None else grad_gates_x @ weights.weight_ih.to(acc),
        "state0": lambda: torch.stack(grad),
        "weight_ih": lambda: torch.einsum("tbg,tbi->gi", grad_gates_x, x),
        "weight_hh": lambda: torch.einsum("tbg,tbh->gh", grad_gates_h, entering),
        "bias_ih": lambda: grad_gates_x.sum((0, 1)),
        "bias_hh": lambda: grad_gates_h.sum((0, 1)),
        "reset_state": lambda: grad_fresh,
    }
    return [found[name]() if need and name in found else None for name, need in zip(inputs, needs, strict=True)]


def _step(
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
