"""One step of the recurrence in one launch, around a matrix product of torch: for every cell, option and size.

A program owns a tile of rows and columns, or whole rows where a norm needs them. The states, and in the backward pass
their gradients, go from launch to launch in `carry` (S, B, H), float32, each element read and written by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .recurrence_cells import (
    _HOLD,
    add_gates,
    backward_step,
    control_of,
    finish_step,
    forward_step,
    load_bias,
    load_gates,
    recurrent_part,
    replace,
    store_gates,
)

# Times and numbers of steps and rows are in no key of a compiled kernel.
_FREE = ("batch", "steps", "t", "t_next", "t_after", "base", "reverse", "stride")


@triton.jit
def load_state(data, place, state, stride, b, j, mask, batch, H: tl.constexpr):
    """A tile of `states` (S, n+1, B, H), whose states are `stride` elements apart."""
    at = state * stride.to(tl.int64) + (place.to(tl.int64) * batch + b) * H + j
    return tl.load(data + at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=_FREE)
def step_forward_kernel(
    gates_x,  # (T, B, G*H)
    product,  # (B, G*H), float32
    carry,  # (S, B, H), float32: the states, before and after
    states,  # (S or 1, n+1, B, H)
    reserve,  # (n, B, 4, H), float32, or None
    entering,  # (B, H): what enters the product of the next step, or None where that is h itself
    control,  # (T, B) or None
    parts,
    batch,
    t,
    t_next,  # -1 after the last step
    base,  # step of the first row of `states` and `reserve`
    reverse,
    stride,
    H: tl.constexpr,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    STATES: tl.constexpr,
    EVERY_STATE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """States and reserve of step t."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    j = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    mine, there = b < batch, j < H
    mask = mine & there
    time = t.to(tl.int64)
    row = time * batch + b
    CONTROLLED: tl.constexpr = control is not None
    at = b.to(tl.int64) * H + j
    h = tl.load(carry + at, mask=mask, other=0.0)
    c = h
    if CELL == "lstm":
        c = tl.load(carry + batch.to(tl.int64) * H + at, mask=mask, other=0.0)
    bits = 0
    if CONTROLLED:
        bits = control_of(control, time, b, mine, batch)
        h, c = replace(h, c, bits, parts, j, there, H, CELL)
    x = add_gates(
        load_gates(gates_x, row * (GATES * H) + j, H, mask, GATES), load_bias(parts.bias_ih, j, there, H, GATES)
    )
    u = load_gates(product, b.to(tl.int64) * (GATES * H) + j, H, mask, GATES)
    u = recurrent_part(u, parts, load_bias(parts.bias_hh, j, there, H, GATES), j, there, H, GATES)
    h, c, saved = forward_step(x, u, h, c, bits, parts, time, b, j, there, batch, H, CELL, GATES, STATES, CONTROLLED)
    tl.store(carry + at, h, mask=mask)
    place = time - base + 1 - reverse
    kind = states.dtype.element_ty
    to = (place * batch + b) * H + j
    tl.store(states + to, h.to(kind), mask=mask)
    if CELL == "lstm":
        tl.store(carry + batch.to(tl.int64) * H + at, c, mask=mask)
        if EVERY_STATE:
            tl.store(states + stride.to(tl.int64) + to, c.to(kind), mask=mask)
    if reserve is not None:
        store_gates(reserve, ((time - base) * batch + b) * (4 * H) + j, H, saved, mask, 4)
    if entering is not None:
        h = h.to(kind).to(tl.float32)
        if CONTROLLED:
            next_bits = control_of(control, t_next.to(tl.int64), b, mine & (t_next >= 0), batch)
            h, c = replace(h, c, next_bits, parts, j, there, H, CELL)
        if parts.recurrent_mask is not None:
            h *= tl.load(parts.recurrent_mask + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(entering + at, h.to(kind), mask=mask)


@triton.jit(do_not_specialize=_FREE)
def step_backward_kernel(
    carry,  # (S, B, H), float32: the gradients of the states, before and after
    of_entering,  # (B, H), float32: the gradient that the product of step `t_after` sends back, or None
    grad_hidden,  # (T, B, H) or None
    grad_cells,  # (T, B, H) or None
    grad_gates,  # (T, B, G, H) or None
    states,  # (S, n+1, B, H)
    reserve,  # (n, B, 4, H), float32; empty for an RNN
    gates_x,  # (T, B, G*H) of an RNN with zoneout, else None
    product,  # (T, B, G*H), float32, with `norm_h` and of an RNN with zoneout, else None
    of_x,  # (T, B, G*H)
    of_u,  # (T, B, G*H) where it is another than of_x, else None
    of_product,  # (T, B, G*H) where it is another than of_u, else None
    control,  # (T, B) or None
    parts,
    sums,
    batch,
    t,
    t_after,
    base,
    reverse,
    stride,
    H: tl.constexpr,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    STATES: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The rest of step `t_after`, which came after step t in the loop, and step t, but for its product."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    j = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    mine, there = b < batch, j < H
    mask = mine & there
    CONTROLLED: tl.constexpr = control is not None
    at = b.to(tl.int64) * H + j
    grad_h = tl.load(carry + at, mask=mask, other=0.0)
    grad_c = tl.zeros_like(grad_h)
    if CELL == "lstm":
        grad_c = tl.load(carry + batch.to(tl.int64) * H + at, mask=mask, other=0.0)
    bits = 0
    if of_entering is not None:
        if CONTROLLED:
            bits = control_of(control, t_after.to(tl.int64), b, mine, batch)
        sent = tl.load(of_entering + at, mask=mask, other=0.0)
        grad_h, grad_c = finish_step(
            grad_h, grad_c, sent, bits, parts, sums, b, j, there, mask, batch, H, CELL, CONTROLLED
        )  # fmt: skip
    if STEP:
        time = t.to(tl.int64)
        row = time * batch + b
        gates = row * (GATES * H) + j
        if grad_hidden is not None:
            grad_h += tl.load(grad_hidden + row * H + j, mask=mask, other=0.0).to(tl.float32)
        if grad_cells is not None:
            grad_c += tl.load(grad_cells + row * H + j, mask=mask, other=0.0).to(tl.float32)
        zero = tl.zeros_like(grad_h)
        of_gates, x, saved, raw = (
            (zero, zero, zero, zero),
            (zero, zero, zero, zero),
            (zero, zero, zero, zero),
            (zero, zero, zero, zero),
        )
        if grad_gates is not None:
            of_gates = load_gates(grad_gates, gates, H, mask, GATES)
        before, after = time - base + reverse, time - base + 1 - reverse
        h_prev = load_state(states, before, 0, stride, b, j, mask, batch, H).to(tl.float32)
        h_new = load_state(states, after, 0, stride, b, j, mask, batch, H).to(tl.float32)
        c_prev = h_prev
        if CELL == "lstm":
            c_prev = load_state(states, before, 1, stride, b, j, mask, batch, H).to(tl.float32)
        if CONTROLLED:
            bits = control_of(control, time, b, mine, batch)
            h_prev, c_prev = replace(h_prev, c_prev, bits, parts, j, there, H, CELL)
        if CELL == "lstm" or CELL == "gru":
            saved = load_gates(reserve, ((time - base) * batch + b) * (4 * H) + j, H, mask, 4)
        if product is not None:
            raw = load_gates(product, gates, H, mask, GATES)
        if gates_x is not None:
            x = load_gates(gates_x, gates, H, mask, GATES)
            if CONTROLLED:
                x = (tl.where((bits & _HOLD) != 0, 0.0, x[0]), x[1], x[2], x[3])
        found_x, found_u, found_product, grad_h, grad_c = backward_step(
            grad_h, grad_c, of_gates, h_prev, c_prev, h_new, x, raw, saved, bits, parts, sums, time, b, j, there, mask,
            batch, H, CELL, GATES, STATES, CONTROLLED,
        )  # fmt: skip
        store_gates(of_x, gates, H, found_x, mask, GATES)
        if of_u is not None:
            store_gates(of_u, gates, H, found_u, mask, GATES)
        if of_product is not None:
            store_gates(of_product, gates, H, found_product, mask, GATES)
    tl.store(carry + at, grad_h, mask=mask)
    if CELL == "lstm":
        tl.store(carry + batch.to(tl.int64) * H + at, grad_c, mask=mask)
