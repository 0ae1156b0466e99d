"""What both passes of attention do to a tile of ``q k^T``, in either orientation, and which keys a row may read.

Rows are numbered i, keys j; a tile has them as (rows, 1) and (1, keys), or the other way round.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A tensor (batch, heads, length, size): the elements of a row lie beside each other."""

    data: Any
    batch: int
    head: int
    row: int


class Full(NamedTuple):
    """A tensor broadcast to (batch, heads, queries, keys), by strides of 0."""

    data: Any
    batch: int
    head: int
    row: int
    key: int


class Terms(NamedTuple):
    """`seqkernels.scores.Scores` as the kernels take it; ``None`` for what a call does not use."""

    scale: float
    plain: int | None  # 1 where scores are the scaled products alone, and the scale is positive
    softcap: float | None
    left: int | None
    right: int | None
    bottom_right: Any
    mask: Full | None
    bias: Full | None
    slopes: Any  # (data, batch stride)
    slopes_batch: int | None
    key_lengths: Any
    starts_q: Any
    starts_k: Any
    table: Any
    table_batch: int | None
    page: int | None
    seed: Any
    threshold: int | None
    kept: float | None


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """4 units in the last place; Triton has none outside libdevice, which the interpreter lacks."""
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = (p * z - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def document(terms, b, queries, keys):
    """Where batch entry b lies: entry, first row and number of queries, first row and number of keys, diagonal."""
    entry, first_q, first_k = b, 0, 0
    if terms.starts_q is not None:
        first_q = tl.load(terms.starts_q + b)
        queries = tl.minimum(tl.load(terms.starts_q + b + 1) - first_q, queries)
        first_k = tl.load(terms.starts_k + b)
        keys = tl.minimum(tl.load(terms.starts_k + b + 1) - first_k, keys)
        entry = b * 0
    if terms.key_lengths is not None:
        keys = tl.minimum(tl.load(terms.key_lengths + b), keys)
    diagonal = 0
    if terms.bottom_right:
        diagonal = keys - queries
    return entry, first_q, queries, first_k, keys, diagonal


@triton.jit
def key_rows(x, terms, b, entry, head, first_k, j0, n, there):
    """Pointers to the rows of keys, or values, j0 + n, of which those `there` are; n is the same in all tiles."""
    if terms.table is not None:
        j = j0 + n
        at = terms.table + b.to(tl.int64) * terms.table_batch + j // terms.page
        if there is not None:
            block = tl.load(at, mask=there, other=0)
        else:
            block = tl.load(at)
        rows = x.data + head.to(tl.int64) * x.head + block.to(tl.int64) * x.batch
        return rows + (j % terms.page).to(tl.int64) * x.row
    else:
        start = entry.to(tl.int64) * x.batch + head.to(tl.int64) * x.head
        return x.data + start + (first_k + j0 + n).to(tl.int64) * x.row


@triton.jit
def score(raw, terms, b, h, i, j, queries, keys, diagonal, BOUNDED: tl.constexpr):
    """The scores of a tile, -inf where a row may not read a key; and what may be read.

    Plain ones lack the scale, which `exp_of` and `weight_of` have in their factor.
    """
    keep = (i < queries) & (j < keys)
    behind = j - i - diagonal
    if BOUNDED:
        if terms.left is not None:
            keep = keep & (behind >= -terms.left)
        if terms.right is not None:
            keep = keep & (behind <= terms.right)
    s = raw
    if terms.plain is None:
        s = raw * terms.scale
    if terms.softcap is not None:
        s = terms.softcap * tanh(s / terms.softcap)
    if terms.mask is not None:
        at = place(terms.mask, b, h, i, j)
        keep = keep & (tl.load(terms.mask.data + at, mask=keep, other=0) != 0)
    if terms.bias is not None:
        at = place(terms.bias, b, h, i, j)
        bias = tl.load(terms.bias.data + at, mask=keep, other=0.0).to(tl.float32)
        keep = keep & (bias != float("-inf"))
        s = s + bias
    if terms.slopes is not None:
        s = s - tl.load(terms.slopes + b * terms.slopes_batch + h) * tl.abs(behind).to(tl.float32)
    if BOUNDED or terms.mask is not None or terms.bias is not None:
        s = tl.where(keep, s, float("-inf"))
    return s, keep


@triton.jit
def exp_of(s, base, terms):
    """The exponential of scores less a base in the same units."""
    if terms.plain is not None:
        factor = terms.scale * LOG2E
        power = s * factor - base * factor
    else:
        power = (s - base) * LOG2E
    return tl.exp2(power)


@triton.jit
def weight_of(s, lse, terms):
    """The exponential of scores less a log-sum-exp, which has the scale in it."""
    if terms.plain is not None:
        power = s * (terms.scale * LOG2E) - lse * LOG2E
    else:
        power = (s - lse) * LOG2E
    return tl.exp2(power)


@triton.jit
def place(x, b, h, i, j):
    """Offsets of a tile in a `Full`."""
    return b.to(tl.int64) * x.batch + h.to(tl.int64) * x.head + i.to(tl.int64) * x.row + j.to(tl.int64) * x.key


@triton.jit
def drop(x, terms, b, h, i, j, heads, most_queries, most_keys):
    """Weights after dropout: word ``j % 64 // 16`` of Philox4x32-10 at the counter of row and key decides."""
    if terms.seed is not None:
        row = (b.to(tl.int64) * heads + h) * most_queries + i
        counter = (row * ((most_keys + 63) // 64) + j // 64) * 16 + j % 16
        low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
        zero = low * 0
        w0, w1, w2, w3 = tl.philox(tl.load(terms.seed), low, high, zero, zero)
        which = (j % 64) // 16
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
        x = tl.where(word.to(tl.int64) < terms.threshold, 0.0, x * terms.kept)
    return x
