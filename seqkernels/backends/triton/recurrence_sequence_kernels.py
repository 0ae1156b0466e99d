"""All steps of the recurrence in one launch, for cells without norms.

A program owns BLOCK_B rows and BLOCK_C hidden columns, of all gates, and holds the weights of these columns through
the loop where they fit. Between two steps it needs what all programs of its rows made: they meet at a counter, which
is why all of them have to run at once, or each step is a launch (SYNC is off, and one step or one program). Rows need
nothing of other rows, so any number of tiles of them goes into a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .recurrence_cells import (
    _HOLD,
    _RESET,
    add_gates,
    backward_step,
    control_of,
    finish_step,
    forward_step,
    load_bias,
    load_gates,
    replace,
    store_gates,
)

# Times and numbers of steps and rows are in no key of a compiled kernel.
_FREE = ("batch", "first", "count", "after", "first_tile", "base", "reverse", "stride")


@triton.jit
def meet(counter, target, SYNC: tl.constexpr):
    """Waits until all programs of the rows have written what they made in this step."""
    tl.debug_barrier()
    if SYNC:
        tl.atomic_add(counter, 1, sem="release", scope="gpu")
        while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
            pass
        tl.debug_barrier()


@triton.jit
def of_lanes(acc, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr):
    """The tiles of each gate, from one whose columns are a hidden unit's gates beside each other."""
    if LANES == 1:
        zero = tl.zeros_like(acc)
        found = (acc, zero, zero, zero)
    else:
        even, odd = tl.split(tl.reshape(acc, (BLOCK_B, BLOCK_C, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        found = (x0, x1, x2, x3)
    return found


@triton.jit
def weight_tile(weight, k0, row, valid, H: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows `row` of the weights as columns, and columns [k0, k0 + BLOCK_K) as rows."""
    k = k0 + tl.arange(0, BLOCK_K)
    return tl.load(weight + row[None, :] * H + k[:, None], mask=valid[None, :] & (k < H)[:, None], other=0.0)


@triton.jit
def entering_tile(
    states, row, bits, parts, b, mine, k0, H: tl.constexpr, BLOCK_K: tl.constexpr, CONTROLLED: tl.constexpr
):  # fmt: skip
    """What enters the recurrent product: columns [k0, k0 + BLOCK_K) of the hidden states of `row` (BLOCK_B, 1)."""
    k = (k0 + tl.arange(0, BLOCK_K))[None, :]
    h = tl.load(states + row * H + k, mask=mine & (k < H), other=0.0, cache_modifier=".cg")
    if CONTROLLED:
        reset = (bits & _RESET) != 0
        if parts.reset_state is not None:
            fresh = tl.load(parts.reset_state + k, mask=k < H, other=0.0)
            h = tl.where(reset, fresh, h)
        else:
            h = tl.where(reset, 0.0, h).to(h.dtype)
    if parts.recurrent_mask is not None:
        factor = tl.load(parts.recurrent_mask + b.to(tl.int64) * H + k, mask=mine & (k < H), other=0.0)
        h = (h.to(tl.float32) * factor.to(tl.float32)).to(h.dtype)
    return h


@triton.jit(do_not_specialize=_FREE)
def sequence_forward_kernel(
    gates_x,  # (T, B, G*H)
    weight,  # (G*H, H)
    carry,  # (S, B, H), float32: the states, before and after
    states,  # (S or 1, n+1, B, H)
    reserve,  # (n, B, 4, H), float32, or None
    control,  # (T, B) or None
    counters,  # (tiles of rows,) int32, zero, or None
    parts,
    batch,
    first,  # step
    count,  # steps
    first_tile,
    base,  # step of the first row of `states` and `reserve`
    reverse,
    stride,
    H: tl.constexpr,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    STATES: tl.constexpr,
    EVERY_STATE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    SYNC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """States and reserve of `count` steps."""
    tile = first_tile + tl.program_id(1)
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    j = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mine, there = b < batch, j < H
    mask = mine & there
    CONTROLLED: tl.constexpr = control is not None
    CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    lane = tl.arange(0, LANES * BLOCK_C)
    unit = tl.program_id(0) * BLOCK_C + lane // LANES
    row_of = lane % LANES * H + unit
    valid = (lane % LANES < GATES) & (unit < H)
    weights = ()
    if RESIDENT:
        for k0 in tl.static_range(0, H, BLOCK_K):
            weights = weights + (weight_tile(weight, k0, row_of, valid, H, BLOCK_K),)  # type: ignore[assignment]  # noqa: RUF005
    bias_x, bias_h = load_bias(parts.bias_ih, j, there, H, GATES), load_bias(parts.bias_hh, j, there, H, GATES)
    at = b.to(tl.int64) * H + j
    of_cells = batch.to(tl.int64) * H
    h = tl.load(carry + at, mask=mask, other=0.0)
    c = h
    if CELL == "lstm":
        c = tl.load(carry + of_cells + at, mask=mask, other=0.0)
    kind = states.dtype.element_ty
    along = 1 - 2 * reverse
    x0, x1, x2, x3 = load_gates(gates_x, (first.to(tl.int64) * batch + b) * (GATES * H) + j, H, mask, GATES)
    for s in tl.range(0, count, num_stages=1):
        t = (first + s * along).to(tl.int64)
        bits = 0
        if CONTROLLED:
            bits = control_of(control, t, b, mine, batch)
            h, c = replace(h, c, bits, parts, j, there, H, CELL)
        row = (t - base + reverse) * batch + b
        acc = tl.zeros((BLOCK_B, LANES * BLOCK_C), tl.float32)
        if RESIDENT:
            loaded = ()
            for i in tl.static_range(0, CHUNKS + AHEAD):
                if i < CHUNKS:
                    entered = entering_tile(states, row, bits, parts, b, mine, i * BLOCK_K, H, BLOCK_K, CONTROLLED)
                    loaded = loaded + (entered,)  # type: ignore[assignment]  # noqa: RUF005
                if i >= AHEAD:
                    acc = tl.dot(loaded[i - AHEAD], weights[i - AHEAD], acc, input_precision=PRECISION)
        else:
            for k0 in tl.range(0, H, BLOCK_K, num_stages=STAGES):
                entered = entering_tile(states, row, bits, parts, b, mine, k0, H, BLOCK_K, CONTROLLED)
                of_k = weight_tile(weight, k0, row_of, valid, H, BLOCK_K)
                acc = tl.dot(entered, of_k, acc, input_precision=PRECISION)
        u = add_gates(of_lanes(acc, BLOCK_B, BLOCK_C, LANES), bias_h)
        x = add_gates((x0, x1, x2, x3), bias_x)
        h, c, saved = forward_step(x, u, h, c, bits, parts, t, b, j, there, batch, H, CELL, GATES, STATES, CONTROLLED)
        to = ((t - base + 1 - reverse) * batch + b) * H + j
        tl.store(states + to, h.to(kind), mask=mask)
        if EVERY_STATE and CELL == "lstm":
            tl.store(states + stride.to(tl.int64) + to, c.to(kind), mask=mask)
        if reserve is not None:
            store_gates(reserve, ((t - base) * batch + b) * (4 * H) + j, H, saved, mask, 4)
        # Of the next step, on their way while the programs meet.
        more = mask & (s + 1 < count)
        x0, x1, x2, x3 = load_gates(gates_x, ((t + along) * batch + b) * (GATES * H) + j, H, more, GATES)
        meet(counters + tile if SYNC else counters, tl.num_programs(0) * (s + 1), SYNC)
    tl.store(carry + at, h, mask=mask)
    if CELL == "lstm":
        tl.store(carry + of_cells + at, c, mask=mask)


@triton.jit
def saved_of(
    grad_hidden, grad_cells, states, reserve, t, base, reverse, stride, b, j, mask, batch, H: tl.constexpr,
    CELL: tl.constexpr,
):  # fmt: skip
    """What a step back starts from: gradients of its states, the states before and after it, and its reserve."""
    row = t * batch + b
    grad_h = tl.zeros(mask.shape, tl.float32)
    grad_c = grad_h
    if grad_hidden is not None:
        grad_h = tl.load(grad_hidden + row * H + j, mask=mask, other=0.0).to(tl.float32)
    if grad_cells is not None:
        grad_c = tl.load(grad_cells + row * H + j, mask=mask, other=0.0).to(tl.float32)
    before = ((t - base + reverse) * batch + b) * H + j
    h_prev = tl.load(states + before, mask=mask, other=0.0).to(tl.float32)
    c_prev, h_new, r0, r1, r2, r3 = h_prev, h_prev, h_prev, h_prev, h_prev, h_prev
    if CELL == "lstm":
        c_prev = tl.load(states + stride.to(tl.int64) + before, mask=mask, other=0.0).to(tl.float32)
    if CELL == "lstm" or CELL == "gru":
        r0, r1, r2, r3 = load_gates(reserve, ((t - base) * batch + b) * (4 * H) + j, H, mask, 4)
    else:
        after = ((t - base + 1 - reverse) * batch + b) * H + j
        h_new = tl.load(states + after, mask=mask, other=0.0).to(tl.float32)
    return grad_h, grad_c, h_prev, c_prev, h_new, r0, r1, r2, r3


@triton.jit
def weight_rows(weight, k0, j, H: tl.constexpr, GATES: tl.constexpr, LANES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows [k0, k0 + BLOCK_K) of each gate of the weights, columns j: (LANES, BLOCK_K, BLOCK_C), or without LANES."""
    k = k0 + tl.arange(0, BLOCK_K)
    if LANES == 1:
        found = tl.load(weight + k[:, None] * H + j, mask=(k < GATES * H)[:, None] & (j < H), other=0.0)
    else:
        g = tl.arange(0, LANES)[:, None, None]
        row = g * H + k[None, :, None]
        valid = (g < GATES) & (k < H)[None, :, None]
        found = tl.load(weight + row * H + j[None, :, :], mask=valid & (j < H)[None, :, :], other=0.0)
    return found


@triton.jit
def product_rows(
    data, row, mine, k0, H: tl.constexpr, GATES: tl.constexpr, LANES: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Columns [k0, k0 + BLOCK_K) of each gate of rows (BLOCK_B, 1): (LANES, BLOCK_B, BLOCK_K), or without LANES."""
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    at = row * (GATES * H)
    if LANES == 1:
        found = tl.load(data + at + k, mask=mine & (k < GATES * H), other=0.0, cache_modifier=".cg")
    else:
        g = tl.arange(0, LANES)[:, None, None]
        valid = (g < GATES) & (k < H)[None, :, :] & mine[None, :, :]
        found = tl.load(
            data + at[None, :, :] + g * H + k[None, :, :], mask=valid, other=0.0, cache_modifier=".cg"
        )  # fmt: skip
    return found


@triton.jit
def add_lanes(acc, a, w, LANES: tl.constexpr, PRECISION: tl.constexpr):
    """Acc + a w, summed over the lanes."""
    if LANES == 1:
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    else:
        acc += tl.sum(tl.dot(a, w, input_precision=PRECISION), 0)
    return acc


@triton.jit
def sent_back(
    to_product, row, mine, weight, weights, j, H: tl.constexpr, GATES: tl.constexpr, LANES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, RESIDENT: tl.constexpr, AHEAD: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The product of the gradients in `row` with the weights, columns j."""
    DEPTH: tl.constexpr = GATES * H if LANES == 1 else H
    sent = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    if RESIDENT:
        CHUNKS: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
        loaded = ()
        for i in tl.static_range(0, CHUNKS + AHEAD):
            if i < CHUNKS:
                a = product_rows(to_product, row, mine, i * BLOCK_K, H, GATES, LANES, BLOCK_K)
                loaded = loaded + (a,)  # type: ignore[assignment]  # noqa: RUF005
            if i >= AHEAD:
                sent = add_lanes(sent, loaded[i - AHEAD], weights[i - AHEAD], LANES, PRECISION)
    else:
        for k0 in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
            a = product_rows(to_product, row, mine, k0, H, GATES, LANES, BLOCK_K)
            of_k = weight_rows(weight, k0, j, H, GATES, LANES, BLOCK_K)
            sent = add_lanes(sent, a, of_k, LANES, PRECISION)
    return sent


@triton.jit(do_not_specialize=_FREE)
def sequence_backward_kernel(
    carry,  # (S, B, H), float32: the gradients of the states, before and after
    weight,  # (G*H, H)
    grad_hidden,  # (T, B, H) or None
    grad_cells,  # (T, B, H) or None
    grad_gates,  # (T, B, G, H) or None
    states,  # (S, n+1, B, H)
    reserve,  # (n, B, 4, H), float32; empty for an RNN
    gates_x,  # (T, B, G*H) of an RNN with zoneout, else None
    product,  # (T, B, G*H), float32, of an RNN with zoneout, else None
    of_x,  # (T, B, G*H)
    of_u,  # (T, B, G*H) where it is another than of_x, else None
    control,  # (T, B) or None
    counters,  # (tiles of rows,) int32, zero, or None
    parts,
    sums,
    batch,
    first,  # step: the last one of the loop
    count,  # steps
    after,  # step that came behind `first` in the loop, whose product is not done; -1 for none
    first_tile,
    base,
    reverse,
    stride,
    H: tl.constexpr,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    SYNC: tl.constexpr,
    STEPWISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Back through `count` steps. With STEPWISE, one or none, the product of a step is left to the next launch."""
    tile = first_tile + tl.program_id(1)
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    j = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mine, there = b < batch, j < H
    mask = mine & there
    CONTROLLED: tl.constexpr = control is not None
    # Gates are beside each other, or one behind the other as rows of the weights.
    DEPTH: tl.constexpr = GATES * H if LANES == 1 else H
    weights = ()
    if RESIDENT and not STEPWISE:
        for k0 in tl.static_range(0, DEPTH, BLOCK_K):
            weights = weights + (weight_rows(weight, k0, j, H, GATES, LANES, BLOCK_K),)  # type: ignore[assignment]  # noqa: RUF005
    at = b.to(tl.int64) * H + j
    of_cells = batch.to(tl.int64) * H
    grad_h = tl.load(carry + at, mask=mask, other=0.0)
    grad_c = tl.zeros_like(grad_h)
    if CELL == "lstm":
        grad_c = tl.load(carry + of_cells + at, mask=mask, other=0.0)
    to_product = of_x if of_u is None else of_u
    if STEPWISE:  # noqa: SIM102
        if after >= 0:
            bits = 0
            if CONTROLLED:
                bits = control_of(control, after.to(tl.int64), b, mine, batch)
            sent = sent_back(
                to_product, after.to(tl.int64) * batch + b, mine, weight, weights, j, H, GATES, LANES, BLOCK_B, BLOCK_C,
                BLOCK_K, False, AHEAD, STAGES, PRECISION,
            )  # fmt: skip
            grad_h, grad_c = finish_step(
                grad_h, grad_c, sent, bits, parts, sums, b, j, there, mask, batch, H, CELL, CONTROLLED
            )  # fmt: skip
    along = 2 * reverse - 1
    more_h, more_c, h_prev, c_prev, h_new, r0, r1, r2, r3 = saved_of(
        grad_hidden, grad_cells, states, reserve, first.to(tl.int64), base, reverse, stride, b, j,
        mask & (count > 0), batch, H, CELL,
    )  # fmt: skip
    for s in tl.range(0, count, num_stages=1):
        t = (first + s * along).to(tl.int64)
        row = t * batch + b
        gates = row * (GATES * H) + j
        grad_h += more_h
        grad_c += more_c
        zero = tl.zeros_like(grad_h)
        of_gates, x, raw = (zero, zero, zero, zero), (zero, zero, zero, zero), (zero, zero, zero, zero)
        if grad_gates is not None:
            of_gates = load_gates(grad_gates, gates, H, mask, GATES)
        bits = 0
        if CONTROLLED:
            bits = control_of(control, t, b, mine, batch)
            h_prev, c_prev = replace(h_prev, c_prev, bits, parts, j, there, H, CELL)
        if product is not None:
            raw = load_gates(product, gates, H, mask, GATES)
        if gates_x is not None:
            x = load_gates(gates_x, gates, H, mask, GATES)
            if CONTROLLED:
                x = (tl.where((bits & _HOLD) != 0, 0.0, x[0]), x[1], x[2], x[3])
        found = backward_step(
            grad_h, grad_c, of_gates, h_prev, c_prev, h_new, x, raw, (r0, r1, r2, r3), bits, parts, sums, t, b, j,
            there, mask, batch, H, CELL, GATES, STATES, CONTROLLED,
        )  # fmt: skip
        past_h, past_c = found[3], found[4]
        store_gates(of_x, gates, H, found[0], mask, GATES)
        if of_u is not None:
            store_gates(of_u, gates, H, found[1], mask, GATES)
        # Of the next step, on their way while the programs meet.
        more_h, more_c, h_prev, c_prev, h_new, r0, r1, r2, r3 = saved_of(
            grad_hidden, grad_cells, states, reserve, t + along, base, reverse, stride, b, j, mask & (s + 1 < count),
            batch, H, CELL,
        )  # fmt: skip
        if STEPWISE:
            grad_h, grad_c = past_h, past_c
        else:
            meet(counters + tile if SYNC else counters, tl.num_programs(0) * (s + 1), SYNC)
            sent = sent_back(
                to_product, row, mine, weight, weights, j, H, GATES, LANES, BLOCK_B, BLOCK_C, BLOCK_K, RESIDENT, AHEAD,
                STAGES, PRECISION,
            )  # fmt: skip
            grad_h, grad_c = finish_step(
                past_h, past_c, sent, bits, parts, sums, b, j, there, mask, batch, H, CELL, CONTROLLED
            )  # fmt: skip
    tl.store(carry + at, grad_h, mask=mask)
    if CELL == "lstm":
        tl.store(carry + of_cells + at, grad_c, mask=mask)
