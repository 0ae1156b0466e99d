"""One step of each cell on a tile of rows (R, 1) and hidden columns (1, C), forward and backward, in float32.

Both ways through time, step by step or a sequence in one launch, are made of these functions. What belongs to the
gates travels in tuples of four, whatever a cell has of them; what is not there is 0 and costs nothing. Names are those
of ``docs/recurrence.md``: x and u are the input and the recurrent part of the gates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...cells import DETACH, HOLD, NORM_EPS, RESET
from .attention_scores import tanh

_RESET = tl.constexpr(RESET)
_HOLD = tl.constexpr(HOLD)
_CUT = tl.constexpr(RESET | DETACH)
_EPS = tl.constexpr(NORM_EPS)


@triton.jit
def sigmoid(x):
    """The logistic function; infinities are its arguments too."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def load_gates(data, at, step, mask, GATES: tl.constexpr):
    """Tiles of each gate, `step` elements apart."""
    x0 = tl.load(data + at, mask=mask, other=0.0).to(tl.float32)
    x1, x2, x3 = tl.zeros_like(x0), tl.zeros_like(x0), tl.zeros_like(x0)
    if GATES > 1:
        x1 = tl.load(data + at + step, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(data + at + 2 * step, mask=mask, other=0.0).to(tl.float32)
    if GATES > 3:
        x3 = tl.load(data + at + 3 * step, mask=mask, other=0.0).to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def store_gates(data, at, step, x, mask, GATES: tl.constexpr):
    """The tiles of `x`, `step` elements apart."""
    kind = data.dtype.element_ty
    tl.store(data + at, x[0].to(kind), mask=mask)
    if GATES > 1:
        tl.store(data + at + step, x[1].to(kind), mask=mask)
        tl.store(data + at + 2 * step, x[2].to(kind), mask=mask)
    if GATES > 3:
        tl.store(data + at + 3 * step, x[3].to(kind), mask=mask)


@triton.jit
def load_bias(data, j, there, H: tl.constexpr, GATES: tl.constexpr):
    """Of each gate (1, C); 0 where there is none."""
    if data is not None:
        found = load_gates(data, j, H, there, GATES)
    else:
        zero = (j * 0).to(tl.float32)
        found = (zero, zero, zero, zero)
    return found


@triton.jit
def add_gates(x, y):
    """The sum for each gate."""
    return x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3]


@triton.jit
def column(data, k, j, there, H: tl.constexpr):
    """Row k of a (., H), as (1, C)."""
    return tl.load(data + k * H + j, mask=there, other=0.0).to(tl.float32)


@triton.jit
def control_of(control, t, b, mine, batch):
    """The bits of step t (R, 1)."""
    return tl.load(control + t * batch + b, mask=mine, other=0)


@triton.jit
def replace(h, c, bits, parts, j, there, H: tl.constexpr, CELL: tl.constexpr):
    """The states before a step, after its resets."""
    reset = (bits & _RESET) != 0
    fresh_h, fresh_c = 0.0, 0.0
    if parts.reset_state is not None:
        fresh_h = column(parts.reset_state, 0, j, there, H)
        if CELL == "lstm":
            fresh_c = column(parts.reset_state, 1, j, there, H)
    h = tl.where(reset, fresh_h, h)
    if CELL == "lstm":
        c = tl.where(reset, fresh_c, c)
    return h, c


@triton.jit
def mean_of(x, there, count):
    """The mean of each row (R, 1)."""
    return tl.sum(tl.where(there, x, 0.0), 1)[:, None] / count


@triton.jit
def norm_of(x, there, H: tl.constexpr):
    """`x` normalised along its rows, and 1 over their standard deviation."""
    x = x - mean_of(x, there, H)
    scale = 1.0 / tl.sqrt_rn(mean_of(x * x, there, H) + _EPS)
    return x * scale, scale


@triton.jit
def mean_of_gates(x, there, H: tl.constexpr, GATES: tl.constexpr):
    """The mean of each row over all gates (R, 1)."""
    total = mean_of(x[0], there, H)
    if GATES > 1:
        total += mean_of(x[1], there, H) + mean_of(x[2], there, H)
    if GATES > 3:
        total += mean_of(x[3], there, H)
    return total / GATES


@triton.jit
def norm_of_gates(x, there, H: tl.constexpr, GATES: tl.constexpr):
    """`norm_of` over all gates together."""
    mean = mean_of_gates(x, there, H, GATES)
    y = (x[0] - mean, x[1] - mean, x[2] - mean, x[3] - mean)
    squares = (y[0] * y[0], y[1] * y[1], y[2] * y[2], y[3] * y[3])
    scale = 1.0 / tl.sqrt_rn(mean_of_gates(squares, there, H, GATES) + _EPS)
    return (y[0] * scale, y[1] * scale, y[2] * scale, y[3] * scale), scale


@triton.jit
def recurrent_part(u, parts, bias, j, there, H: tl.constexpr, GATES: tl.constexpr):
    """What the recurrent product becomes: normalised, and with its bias."""
    if parts.norm_h is not None:
        normal = norm_of_gates(u, there, H, GATES)[0]
        gain = load_gates(parts.norm_h, j, H, there, GATES)
        u = (normal[0] * gain[0], normal[1] * gain[1], normal[2] * gain[2], normal[3] * gain[3])
    return add_gates(u, bias)


@triton.jit
def seen_cell(c, parts, j, there, H: tl.constexpr):
    """The cell state as the output sees it."""
    if parts.norm_c is not None:
        normal = norm_of(c, there, H)[0]
        c = normal * column(parts.norm_c, 0, j, there, H) + column(parts.norm_c, 1, j, there, H)
    return c


@triton.jit
def step_of(x, u, h, c, parts, j, there, H: tl.constexpr, CELL: tl.constexpr):
    """The states that a cell makes of those before, and its reserve."""
    if CELL == "lstm":
        a0, a1, a2, a3 = x[0] + u[0], x[1] + u[1], x[2] + u[2], x[3] + u[3]
        if parts.peephole is not None:
            a0 += column(parts.peephole, 0, j, there, H) * c
            a1 += column(parts.peephole, 1, j, there, H) * c
        i, f, g = sigmoid(a0), sigmoid(a1), tanh(a2)
        new_c = f * c + i * g
        if parts.peephole is not None:
            a3 += column(parts.peephole, 2, j, there, H) * new_c
        o = sigmoid(a3)
        new_h = o * tanh(seen_cell(new_c, parts, j, there, H))
        saved = (i, f, g, o)
    elif CELL == "gru":
        r, z = sigmoid(x[0] + u[0]), sigmoid(x[1] + u[1])
        n = tanh(x[2] + r * u[2])
        new_h, new_c = (1.0 - z) * n + z * h, c
        saved = (r, z, n, u[2])
    else:
        a = x[0] + u[0]
        new_h = tanh(a) if CELL == "rnn_tanh" else tl.where(a < 0.0, 0.0, a)
        new_c = c
        saved = (a, a, a, a)
    return new_h, new_c, saved


@triton.jit
def kept(parts, state, t, b, j, batch, H: tl.constexpr, STATES: tl.constexpr):
    """How much of a state stays what it was."""
    p = tl.load(parts.zoneout + state)
    if parts.seed is not None:
        n = ((t * batch + b).to(tl.int64) * STATES + state) * H + j
        low, high = n.to(tl.uint32), (n >> 32).to(tl.uint32)
        word = tl.philox(tl.load(parts.seed), low, high, low * 0, low * 0)[0]
        found = tl.where((word >> 8).to(tl.float32) * 5.9604644775390625e-8 < p, 1.0, 0.0)
    else:
        found = (b * 0 + j * 0).to(tl.float32) + p
    return found


@triton.jit
def mix(old, new, k):
    """`old` where k is 1, `new` where it is 0."""
    return tl.where(k == 0.0, new, tl.where(k == 1.0, old, k * old + (1.0 - k) * new))


@triton.jit
def forward_step(
    x, u, h, c, bits, parts, t, b, j, there, batch, H: tl.constexpr, CELL: tl.constexpr, GATES: tl.constexpr,
    STATES: tl.constexpr, CONTROLLED: tl.constexpr,
):  # fmt: skip
    """The states after step t and its reserve, from x and u with their biases and the states after any reset."""
    new_h, new_c, saved = step_of(x, u, h, c, parts, j, there, H, CELL)
    if parts.zoneout is not None:
        new_h = mix(h, new_h, kept(parts, 0, t, b, j, batch, H, STATES))
        if CELL == "lstm":
            new_c = mix(c, new_c, kept(parts, 1, t, b, j, batch, H, STATES))
    if CONTROLLED:
        hold = (bits & _HOLD) != 0
        new_h, new_c = tl.where(hold, h, new_h), tl.where(hold, c, new_c)
        saved = (
            tl.where(hold, 0.0, saved[0]),
            tl.where(hold, 0.0, saved[1]),
            tl.where(hold, 0.0, saved[2]),
            tl.where(hold, 0.0, saved[3]),
        )
    return new_h, new_c, saved


@triton.jit
def accumulate(data, k, value, b, j, mask, batch, H: tl.constexpr):
    """Adds to a gradient of `Sums`; every element belongs to one program."""
    at = data + (k * batch + b).to(tl.int64) * H + j
    tl.store(at, tl.load(at, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def lstm_backward(
    of_h, of_c, of_gates, c_prev, saved, parts, sums, b, j, there, mask, batch, H: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates before their activations, and of the cell state before the step."""
    i, f, g, o = saved[0], saved[1], saved[2], saved[3]
    c = f * c_prev + i * g
    if parts.norm_c is not None:
        normal, scale = norm_of(c, there, H)
        gain = column(parts.norm_c, 0, j, there, H)
        y = tanh(normal * gain + column(parts.norm_c, 1, j, there, H))
    else:
        y = tanh(c)
    of_o = (of_gates[3] + of_h * y) * o * (1.0 - o)
    of_seen = of_h * o * (1.0 - y * y)
    if parts.norm_c is not None:
        if sums.norm_c is not None:
            accumulate(sums.norm_c, 0, of_seen * normal, b, j, mask, batch, H)
            accumulate(sums.norm_c, 1, of_seen, b, j, mask, batch, H)
        q = of_seen * gain
        of_seen = scale * (q - mean_of(q, there, H) - normal * mean_of(q * normal, there, H))
    of_c = of_c + of_seen
    if parts.peephole is not None:
        of_c += of_o * column(parts.peephole, 2, j, there, H)
    of_i = (of_gates[0] + of_c * g) * i * (1.0 - i)
    of_f = (of_gates[1] + of_c * c_prev) * f * (1.0 - f)
    of_g = (of_gates[2] + of_c * i) * (1.0 - g * g)
    of_prev = of_c * f
    if parts.peephole is not None:
        of_prev += of_i * column(parts.peephole, 0, j, there, H) + of_f * column(parts.peephole, 1, j, there, H)
        if sums.peephole is not None:
            accumulate(sums.peephole, 0, of_i * c_prev, b, j, mask, batch, H)
            accumulate(sums.peephole, 1, of_f * c_prev, b, j, mask, batch, H)
            accumulate(sums.peephole, 2, of_o * c, b, j, mask, batch, H)
    return (of_i, of_f, of_g, of_o), of_prev


@triton.jit
def gru_backward(of_h, of_gates, h_prev, saved):
    """Gradients of the input and of the recurrent part of the gates, and directly of the state before the step."""
    r, z, n, m = saved[0], saved[1], saved[2], saved[3]
    of_n = (of_gates[2] + of_h * (1.0 - z)) * (1.0 - n * n)
    of_z = (of_gates[1] + of_h * (h_prev - n)) * z * (1.0 - z)
    of_r = (of_gates[0] + of_n * m) * r * (1.0 - r)
    zero = tl.zeros_like(of_n)
    return (of_r, of_z, of_n, zero), (of_r, of_z, of_n * r, zero), of_h * z


@triton.jit
def product_backward(of_u, product, parts, sums, b, j, there, mask, batch, H: tl.constexpr, GATES: tl.constexpr):
    """The gradient of the recurrent product from that of the recurrent part."""
    if parts.norm_h is not None:
        normal, scale = norm_of_gates(product, there, H, GATES)
        if sums.norm_h is not None:
            accumulate(sums.norm_h, 0, of_u[0] * normal[0], b, j, mask, batch, H)
            if GATES > 1:
                accumulate(sums.norm_h, 1, of_u[1] * normal[1], b, j, mask, batch, H)
                accumulate(sums.norm_h, 2, of_u[2] * normal[2], b, j, mask, batch, H)
            if GATES > 3:
                accumulate(sums.norm_h, 3, of_u[3] * normal[3], b, j, mask, batch, H)
        gain = load_gates(parts.norm_h, j, H, there, GATES)
        q = (of_u[0] * gain[0], of_u[1] * gain[1], of_u[2] * gain[2], of_u[3] * gain[3])
        mean = mean_of_gates(q, there, H, GATES)
        along = (q[0] * normal[0], q[1] * normal[1], q[2] * normal[2], q[3] * normal[3])
        slope = mean_of_gates(along, there, H, GATES)
        of_u = (
            scale * (q[0] - mean - normal[0] * slope),
            scale * (q[1] - mean - normal[1] * slope),
            scale * (q[2] - mean - normal[2] * slope),
            scale * (q[3] - mean - normal[3] * slope),
        )
    return of_u


@triton.jit
def backward_step(
    grad_h, grad_c, of_gates, h_prev, c_prev, h_new, x, product, saved, bits, parts, sums, t, b, j, there, mask, batch,
    H: tl.constexpr, CELL: tl.constexpr, GATES: tl.constexpr, STATES: tl.constexpr, CONTROLLED: tl.constexpr,
):  # fmt: skip
    """Back through step t, but for the product with the weights.

    Args:
        grad_h, grad_c: gradients of the states after the step.
        of_gates: those of the gates that were returned.
        h_prev, c_prev: the states before the step, after any reset.
        h_new: the state after it, of an RNN without zoneout; with it `x` and `product` give what the cell made.

    Returns:
        Gradients of x, of u and of the recurrent product, and of the states before the step but for what the product
        sends them.
    """
    of_h, of_c = grad_h, grad_c
    if CONTROLLED:
        hold = (bits & _HOLD) != 0
        of_h, of_c = tl.where(hold, 0.0, of_h), tl.where(hold, 0.0, of_c)
        of_gates = (
            tl.where(hold, 0.0, of_gates[0]),
            tl.where(hold, 0.0, of_gates[1]),
            tl.where(hold, 0.0, of_gates[2]),
            tl.where(hold, 0.0, of_gates[3]),
        )
    past_h, past_c = tl.zeros_like(of_h), tl.zeros_like(of_c)
    if parts.zoneout is not None:
        k = kept(parts, 0, t, b, j, batch, H, STATES)
        past_h, of_h = k * of_h, (1.0 - k) * of_h
        if CELL == "lstm":
            k = kept(parts, 1, t, b, j, batch, H, STATES)
            past_c, of_c = k * of_c, (1.0 - k) * of_c
    if CELL == "lstm":
        of_x, of_prev = lstm_backward(
            of_h, of_c, of_gates, c_prev, saved, parts, sums, b, j, there, mask, batch, H
        )  # fmt: skip
        past_c += of_prev
        of_u = of_x
    elif CELL == "gru":
        of_x, of_u, direct = gru_backward(of_h, of_gates, h_prev, saved)
        past_h += direct
    else:
        if parts.zoneout is not None:
            u = recurrent_part(product, parts, load_bias(parts.bias_hh, j, there, H, GATES), j, there, H, GATES)
            x = add_gates(x, load_bias(parts.bias_ih, j, there, H, GATES))
            h_new = step_of(x, u, h_prev, c_prev, parts, j, there, H, CELL)[0]
        of_a = of_h * (1.0 - h_new * h_new) if CELL == "rnn_tanh" else tl.where(h_new > 0.0, of_h, 0.0)
        of_x = (of_a, of_a, of_a, of_a)
        of_u = of_x
    of_product = product_backward(of_u, product, parts, sums, b, j, there, mask, batch, H, GATES)
    if CONTROLLED:
        past_h, past_c = tl.where(hold, grad_h, past_h), tl.where(hold, grad_c, past_c)
    return of_x, of_u, of_product, past_h, past_c


@triton.jit
def finish_step(
    past_h, past_c, of_entering, bits, parts, sums, b, j, there, mask, batch, H: tl.constexpr, CELL: tl.constexpr,
    CONTROLLED: tl.constexpr,
):  # fmt: skip
    """The gradients of the states that the step before left, with what the product of the step sends back."""
    if parts.recurrent_mask is not None:
        factor = tl.load(parts.recurrent_mask + b.to(tl.int64) * H + j, mask=mask, other=0.0)
        of_entering = of_entering * factor.to(tl.float32)
    grad_h, grad_c = past_h + of_entering, past_c
    if CONTROLLED:
        grad_h = tl.where((bits & _HOLD) != 0, past_h, grad_h)
        if sums.reset_state is not None:
            reset = (bits & _RESET) != 0
            accumulate(sums.reset_state, 0, tl.where(reset, grad_h, 0.0), b, j, mask, batch, H)
            if CELL == "lstm":
                accumulate(sums.reset_state, 1, tl.where(reset, grad_c, 0.0), b, j, mask, batch, H)
        cut = (bits & _CUT) != 0
        grad_h, grad_c = tl.where(cut, 0.0, grad_h), tl.where(cut, 0.0, grad_c)
    return grad_h, grad_c
