"""The backward pass of the recurrence written out: the mathematics of ``docs/recurrence.md``, as the op needs it.

An op's implementation may run where autograd does not record, so nothing here is left to it. It is tested against
autograd through the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...cells import CELLS, CONSTANTS, DETACH, HOLD, NORM_EPS, RESET, Weights, accumulate_dtype
from .recurrence_loop import begin_with, input_part, run, seen, segments
from .recurrence_step import keep, recurrent_part, step

Sums = dict[str, Tensor]


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
    every: int = 0,
) -> list[Tensor | None]:
    """Back-propagation through time, of one segment after the other where there are checkpoints.

    Args:
        grads, input, weights, states, reserve, control, cell, reverse, needs, every: as in ``recurrence_backward``.

    Returns:
        For each of `needs` the gradient in the accumulation dtype, ``None`` where there is no need.
    """
    acc = accumulate_dtype(states.dtype)
    num_states = CELLS[cell].states
    _, steps, batch, hidden = states.shape
    steps -= 1
    w = weights.to(acc)
    x = seen(input.to(acc), control)
    gates_x = input_part(x, w)
    grad_hidden, grad_cells, grad_state_n, grad_gates = (None if g is None else g.to(acc) for g in grads)
    if cell.startswith("rnn") and grad_gates is not None:
        # The one gate is the hidden state itself.
        grad_hidden = grad_gates[:, :, 0] + (0 if grad_hidden is None else grad_hidden)
    grad = list(x.new_zeros(num_states, batch, hidden) if grad_state_n is None else grad_state_n)
    fresh = x.new_zeros(num_states, 1) if w.reset_state is None else w.reset_state
    sums: Sums = {n: torch.zeros_like(p) for n, p in w._asdict().items() if p is not None and n not in CONSTANTS}
    # Gradients of the input part of the gates, of their recurrent part, and of the recurrent product.
    of_x, of_h, of_product = (x.new_zeros(steps, batch, w.weight_hh.shape[0]) for _ in range(3))
    entering = x.new_zeros(steps, batch, hidden)
    for t, old, new, saved in _against_the_loop(states, reserve, gates_x, w, control, cell, reverse, every):
        grad = [g if of is None else g + of[t] for g, of in zip(grad, (grad_hidden, grad_cells), strict=False)]
        prev, of_new = list(old), grad
        of_gates = x.new_zeros(()) if grad_gates is None else grad_gates[t]
        if control is not None:
            reset, hold, detach = ((control[t] & bit).bool().unsqueeze(1) for bit in (RESET, HOLD, DETACH))
            prev = [torch.where(reset, f, p) for f, p in zip(fresh, prev, strict=True)]
            of_new = [g.masked_fill(hold, 0) for g in grad]
            of_gates = of_gates.masked_fill(hold.unsqueeze(2), 0)
        of_prev = [torch.zeros_like(g) for g in grad]
        if w.zoneout is not None:
            kept = [k.to(acc) for k in keep(w.zoneout, w.seed, t, batch, hidden)]
            of_prev = [k * g for k, g in zip(kept, of_new, strict=True)]
            of_new = [(1 - k) * g for k, g in zip(kept, of_new, strict=True)]
        if cell == "lstm":
            of_x[t], of_c = _lstm(of_new[0], of_new[1], of_gates, prev[1], saved, w, sums)
            of_h[t] = of_x[t]
            of_prev[1] = of_prev[1] + of_c
        elif cell == "gru":
            of_x[t], of_h[t], direct = _gru(of_new[0], of_gates, prev[0], saved)
            of_prev[0] = of_prev[0] + direct
        else:
            if w.zoneout is not None:
                new = step(gates_x[t], recurrent_part(prev[0], w), (prev[0],), w, cell)[0][0]
            of_x[t] = of_h[t] = of_new[0] * (1 - new * new if cell == "rnn_tanh" else (new > 0).to(acc))
        of_product[t], entering[t], of_recurrent = _recurrent_part(of_h[t], prev[0], w, sums)
        of_prev[0] = of_prev[0] + of_recurrent
        if control is not None:
            of_prev = [torch.where(hold, g, p) for g, p in zip(grad, of_prev, strict=True)]
            if w.reset_state is not None:
                sums["reset_state"] += torch.stack([g.masked_fill(~reset, 0).sum(0) for g in of_prev])
            of_prev = [g.masked_fill(reset | detach, 0) for g in of_prev]
        grad = of_prev
    products: dict[str, Callable[[], Tensor]] = {
        "input": lambda: of_x if w.weight_ih is None else of_x @ w.weight_ih,
        "state0": lambda: torch.stack(grad),
        "weight_ih": lambda: torch.einsum("tbg,tbi->gi", of_x, x),
        "weight_hh": lambda: torch.einsum("tbg,tbh->gh", of_product, entering),
        "bias_ih": lambda: of_x.sum((0, 1)),
        "bias_hh": lambda: of_h.sum((0, 1)),
    }
    return [
        None if not need else products[name]() if name in products else sums.get(name)
        for name, need in zip(("input", "state0", *Weights._fields), needs, strict=True)
    ]


def _against_the_loop(
    states: Tensor,
    reserve: Tensor,
    gates_x: Tensor,
    weights: Weights,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    every: int,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each step, last of the loop first: t, the states before it (S, B, H), h after it (B, H), its reserve.

    What is not stored is computed again, one segment at a time.
    """
    dtype, acc = states.dtype, accumulate_dtype(states.dtype)
    for k, (begin, end) in reversed(list(enumerate(segments(gates_x.shape[0], every, reverse)))):
        if every:
            exact, _, saved = run(gates_x, begin_with(reserve[k]), weights, control, cell, reverse, (begin, end))
            # Rounded as they would have been stored.
            all_states = exact.to(dtype).to(acc)
        else:
            all_states, saved = states.to(acc), reserve
        for t in range(begin, end) if reverse else reversed(range(begin, end)):
            before, after = (t + 1 - begin, t - begin) if reverse else (t - begin, t + 1 - begin)
            # Memory of its own: products may round otherwise where rows are aligned otherwise.
            yield t, all_states[:, before].clone(), all_states[0, after], saved[t - begin]


def _norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` normalised over its last dimension, and 1 over its standard deviation."""
    x = x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    return x * scale, scale


def _norm_backward(grad: Tensor, normal: Tensor, scale: Tensor) -> Tensor:
    """From the gradient of what `_norm` returned to that of its argument."""
    return scale * (grad - grad.mean(-1, keepdim=True) - normal * (grad * normal).mean(-1, keepdim=True))


def _recurrent_part(grad: Tensor, h: Tensor, w: Weights, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Through `recurrent_part`: the gradient of the product (B, G*H), what entered it (B, H), the gradient of h."""
    entering = h if w.recurrent_mask is None else h * w.recurrent_mask
    if w.norm_h is not None:
        normal, scale = _norm(entering @ w.weight_hh.t())
        sums["norm_h"] += (grad * normal).sum(0)
        grad = _norm_backward(grad * w.norm_h, normal, scale)
    of_h = grad @ w.weight_hh
    return grad, entering, of_h if w.recurrent_mask is None else of_h * w.recurrent_mask


def _lstm(
    of_h: Tensor, of_c: Tensor, of_gates: Tensor, c_prev: Tensor, gates: Tensor, w: Weights, sums: Sums
) -> tuple[Tensor, Tensor]:
    """Gradients of the gates before their activations (B, 4*H) and of the previous cell state."""
    i, f, g, o = gates.unbind(1)
    of_i, of_f, of_g, of_o = of_gates.expand_as(gates).unbind(1)
    c = f * c_prev + i * g
    seen = c
    if w.norm_c is not None:
        normal, scale = _norm(c)
        seen = normal * w.norm_c[0] + w.norm_c[1]
    tanh = seen.tanh()
    of_o = (of_o + of_h * tanh) * o * (1 - o)
    of_seen = of_h * o * (1 - tanh * tanh)
    if w.norm_c is not None:
        sums["norm_c"] += torch.stack(((of_seen * normal).sum(0), of_seen.sum(0)))
        of_seen = _norm_backward(of_seen * w.norm_c[0], normal, scale)
    of_c = of_c + of_seen
    if w.peephole is not None:
        of_c = of_c + of_o * w.peephole[2]
    of_i = (of_i + of_c * g) * i * (1 - i)
    of_f = (of_f + of_c * c_prev) * f * (1 - f)
    of_g = (of_g + of_c * i) * (1 - g * g)
    of_prev = of_c * f
    if w.peephole is not None:
        of_prev = of_prev + of_i * w.peephole[0] + of_f * w.peephole[1]
        sums["peephole"] += torch.stack(((of_i * c_prev).sum(0), (of_f * c_prev).sum(0), (of_o * c).sum(0)))
    return torch.cat((of_i, of_f, of_g, of_o), 1), of_prev


def _gru(of_h: Tensor, of_gates: Tensor, h_prev: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input and of the recurrent part of the gates (B, 3*H), and directly of the previous state."""
    r, z, n, recurrent = gates.unbind(1)
    of_r, of_z, of_n = of_gates.expand_as(gates[:, :3]).unbind(1)
    of_n = (of_n + of_h * (1 - z)) * (1 - n * n)
    of_z = (of_z + of_h * (h_prev - n)) * z * (1 - z)
    of_r = (of_r + of_n * recurrent) * r * (1 - r)
    return torch.cat((of_r, of_z, of_n), 1), torch.cat((of_r, of_z, of_n * r), 1), of_h * z
