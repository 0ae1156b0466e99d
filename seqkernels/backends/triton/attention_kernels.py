"""Attention in blocks: forward with an online softmax, backward in two passes that recompute the weights.

A program of the forward pass, and of the backward pass of q, owns BLOCK_M rows of queries and visits the keys they
read; one of the backward pass of k and v owns BLOCK_N keys and visits the rows that read them, of every query head of
its group, so that nothing is added up atomically and every run gives the same bits. Tiles that every row reads whole
are apart from those that bounds cut.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_scores import LN2, LOG2E, document, drop, exp_of, key_rows, place, score, tanh, weight_of

#: Arguments whose values kernels are not compiled for: one program serves all lengths, batch sizes, numbers of heads.
LENGTHS = (
    *("batch", "heads", "group", "rows", "most_queries", "most_keys"),
    *("splits", "split_keys", "split_out", "split_lse"),
)


@triton.jit
def load_rows(pointers, there, columns, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a head; what is not there is 0. All rows are there if `there` is ``None``."""
    if there is not None:
        mask = there[:, None]
        if SIZE < BLOCK:
            mask = mask & (columns < SIZE)[None, :]
        x = tl.load(pointers[:, None] + columns[None, :], mask=mask, other=0.0)
    elif SIZE < BLOCK:
        x = tl.load(pointers[:, None] + columns[None, :], mask=(columns < SIZE)[None, :], other=0.0)
    else:
        x = tl.load(pointers[:, None] + columns[None, :])
    return x


@triton.jit
def finite(x):
    """`x` with 0 for what is no number: no weight, 0 included, may meet it."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def reach(begin, end, terms, diagonal, keys, BLOCK_N: tl.constexpr):
    """The keys that rows [begin, end) read: first and last tile that one of them reads, that all of them read."""
    first, last = 0, keys
    whole_first, whole_last = 0, keys
    if terms.left is not None:
        first = tl.maximum(begin + diagonal - terms.left, 0)
        whole_first = tl.maximum(end - 1 + diagonal - terms.left, 0)
    if terms.right is not None:
        last = tl.minimum(tl.maximum(end + diagonal + terms.right, 0), keys)
        whole_last = tl.minimum(tl.maximum(begin + 1 + diagonal + terms.right, 0), keys)
    first = first // BLOCK_N * BLOCK_N
    whole_first = tl.maximum((whole_first + BLOCK_N - 1) // BLOCK_N * BLOCK_N, first)
    whole_last = tl.maximum(whole_last // BLOCK_N * BLOCK_N, whole_first)
    return first, last, whole_first, whole_last


@triton.jit
def spoil(
    acc, v, terms, b, entry, head, kv_head, i, j_begin, j_end, first_k, queries, keys, diagonal, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Acc with NaN where a row reads a value that is no number: `forward_tiles` takes those for 0.

    A loop of its own, which hardly a call needs: what it holds would take the registers of that one, so its tiles are
    small too.
    """
    n, dv = tl.arange(0, 16), tl.arange(0, BLOCK_DV)
    for j_next in tl.range(j_begin, j_end, 16, num_stages=1):
        j0 = j_next + first_k * 0
        j = j0 + n
        there = j < keys
        vt = load_rows(key_rows(v, terms, b, entry, kv_head, first_k, j0, n, there), there, dv, DV, BLOCK_DV)
        raw = tl.zeros((BLOCK_M, 16), tl.float32)
        s, keep = score(raw, terms, b, head[:, None], i[:, None], j[None, :], queries, keys, diagonal, True)
        odd = tl.abs(vt) < float("inf")
        seen = tl.dot(keep.to(tl.float16), (~odd).to(tl.float16))
        acc = tl.where(seen > 0, float("nan"), acc)
    return acc


@triton.jit
def forward_tiles(
    acc, total, most, odd, q, k, v, tiles_k, tiles_v, terms, b, entry, head, kv_head, i, j_begin, j_end, first_k,
    queries, keys, diagonal, heads, most_queries, most_keys, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Online softmax over tiles of keys from j_begin to j_end; `odd` is 1 after a value that was no number."""
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    guard: tl.constexpr = BOUNDED or terms.mask is not None or terms.bias is not None
    for j_next in range(j_begin, j_end, BLOCK_N):
        j0 = j_next + first_k * 0
        j = j0 + n
        there = j < keys if BOUNDED else None
        if tiles_k is not None:
            kt = tiles_k.load([entry, kv_head, first_k + j0, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            kt = load_rows(key_rows(k, terms, b, entry, kv_head, first_k, j0, n, there), there, d, D, BLOCK_D)
        raw = tl.dot(q, tl.trans(kt), input_precision=PRECISION)
        s, keep = score(raw, terms, b, head[:, None], i[:, None], j[None, :], queries, keys, diagonal, BOUNDED)
        higher = tl.maximum(most, tl.max(s, 1))
        base = higher
        if guard:
            base = tl.where(higher == float("-inf"), 0.0, higher)
        p = exp_of(s, base[:, None], terms)
        shrink = exp_of(most, base, terms)
        acc = acc * shrink[:, None]
        total = total * shrink + tl.sum(p, 1)
        p = drop(p, terms, b, head[:, None], i[:, None], j[None, :], heads, most_queries, most_keys)
        if tiles_v is not None:
            vt = tiles_v.load([entry, kv_head, first_k + j0, 0]).reshape(BLOCK_N, BLOCK_DV)
        else:
            vt = load_rows(key_rows(v, terms, b, entry, kv_head, first_k, j0, n, there), there, dv, DV, BLOCK_DV)
        if guard:
            number = tl.abs(vt) < float("inf")
            odd = tl.maximum(odd, 1 - tl.min(number.to(tl.int32)))
            vt = tl.where(number, vt, 0.0).to(vt.dtype)
        acc = tl.dot(p.to(vt.dtype), vt, acc, input_precision=PRECISION)
        most = higher
    return acc, total, most, odd


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q, k, v, tiles_k, tiles_v, out, lse, sink, terms, heads, group, rows, most_queries, most_keys, split_keys,
    split_out, split_lse,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The out and lse of BLOCK_M rows; the tiles with most keys first.

    Rows of PACK heads that read the same keys lie beside each other in a tile, for the sake of a few queries. With
    `split_keys` a program of the second axis of the grid reads that many keys alone and writes a part of `split_out`
    elements, and `split_lse`, which `merge_kernel` joins. Keys and values may come by descriptors of their tiles.
    """
    tiles = tl.cdiv(most_queries * PACK, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    packs = heads // PACK
    b, first_head = tl.program_id(0) // tiles // packs, tl.program_id(0) // tiles % packs * PACK
    entry, first_q, queries, first_k, keys, diagonal = document(terms, b, most_queries, most_keys)
    begin = tile * BLOCK_M
    if begin >= queries * PACK:
        return
    row = begin + tl.arange(0, BLOCK_M)
    i, head = row // PACK, first_head + row % PACK
    mine = i < queries
    from_row = entry.to(tl.int64) * q.batch + head.to(tl.int64) * q.head + (first_q + i).to(tl.int64) * q.row
    qt = load_rows(q.data + from_row, mine, tl.arange(0, BLOCK_D), D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    odd = begin * 0
    end = tl.minimum((begin + BLOCK_M - 1) // PACK + 1, queries)
    first, last, whole_first, whole_last = reach(begin // PACK, end, terms, diagonal, keys, BLOCK_N)
    part = tl.program_id(1)
    if split_keys is not None:
        first = tl.maximum(first, part * split_keys)
        last = tl.minimum(last, (part + 1) * split_keys)
        whole_first = tl.maximum(whole_first, first)
        whole_last = tl.maximum(tl.minimum(whole_last, (part + 1) * split_keys), whole_first)
    kv_head = first_head // group
    if terms.left is not None:
        acc, total, most, odd = forward_tiles(
            acc, total, most, odd, qt, k, v, tiles_k, tiles_v, terms, b, entry, head, kv_head, i, first,
            tl.minimum(whole_first, last), first_k, queries, keys, diagonal, heads, most_queries, most_keys, D, DV,
            BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    acc, total, most, odd = forward_tiles(
        acc, total, most, odd, qt, k, v, tiles_k, tiles_v, terms, b, entry, head, kv_head, i, whole_first, whole_last,
        first_k, queries, keys, diagonal, heads, most_queries, most_keys, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
        False,
    )  # fmt: skip
    acc, total, most, odd = forward_tiles(
        acc, total, most, odd, qt, k, v, tiles_k, tiles_v, terms, b, entry, head, kv_head, i, whole_last, last,
        first_k, queries, keys, diagonal, heads, most_queries, most_keys, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
        True,
    )  # fmt: skip
    if odd > 0:
        acc = spoil(
            acc, v, terms, b, entry, head, kv_head, i, first, last, first_k, queries, keys, diagonal, DV, BLOCK_M,
            BLOCK_DV,
        )  # fmt: skip
    if terms.plain is not None:
        most = most * terms.scale
    if sink is not None:
        extra = tl.load(sink + head)
        if split_keys is not None:
            extra = tl.where(part == 0, extra, float("-inf"))
        higher = tl.maximum(most, extra)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2((most - base) * LOG2E)
        total = total * shrink + tl.exp2((extra - base) * LOG2E)
        acc = acc * shrink[:, None]
        most = higher
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    found = tl.where(empty, float("-inf"), most + tl.log2(total) * LN2)
    acc = acc / total[:, None]
    acc = tl.where(tl.abs(acc) == float("inf"), float("nan"), acc)
    dv = tl.arange(0, BLOCK_DV)
    to = entry.to(tl.int64) * out.batch + head.to(tl.int64) * out.head + (first_q + i).to(tl.int64) * out.row
    to_lse = (entry.to(tl.int64) * heads + head) * rows + first_q + i
    if split_keys is not None:
        to += part.to(tl.int64) * split_out
        to_lse += part.to(tl.int64) * split_lse
    tl.store(
        out.data + to[:, None] + dv[None, :],
        acc.to(out.data.dtype.element_ty),
        mask=mine[:, None] & (dv < DV)[None, :],
    )
    tl.store(lse + to_lse, found, mask=mine)


@triton.jit(do_not_specialize=LENGTHS)
def merge_kernel(
    parts, parts_lse, out, lse, heads, rows, splits, split_out, split_lse,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The out and lse of BLOCK_M rows of one head, of parts that read different keys."""
    tiles = tl.cdiv(rows, BLOCK_M)
    b, h = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = i < rows
    dv = tl.arange(0, BLOCK_DV)
    from_lse = (b.to(tl.int64) * heads + h) * rows + i
    from_row = b.to(tl.int64) * parts.batch + h.to(tl.int64) * parts.head + i.to(tl.int64) * parts.row
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for part in range(splits):
        most = tl.maximum(most, tl.load(parts_lse + from_lse + part * split_lse, mask=mine, other=float("-inf")))
    base = tl.where(most == float("-inf"), 0.0, most)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in range(splits):
        found = tl.load(parts_lse + from_lse + part * split_lse, mask=mine, other=float("-inf"))
        weight = tl.exp2((found - base) * LOG2E)
        x = load_rows(parts.data + from_row + part * split_out, mine, dv, DV, BLOCK_DV)
        # A part without a weight may be anything, and one that is no number shows.
        acc += tl.where(weight[:, None] == 0.0, 0.0, x * weight[:, None])
        total += weight
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    to = b.to(tl.int64) * out.batch + h.to(tl.int64) * out.head + i.to(tl.int64) * out.row
    tl.store(
        out.data + to[:, None] + dv[None, :],
        (acc / total[:, None]).to(out.data.dtype.element_ty),
        mask=mine[:, None] & (dv < DV)[None, :],
    )
    tl.store(lse + from_lse, tl.where(empty, float("-inf"), base + tl.log2(total) * LN2), mask=mine)


@triton.jit(do_not_specialize=LENGTHS)
def delta_kernel(grad, out, grad_lse, delta, heads, rows, DV: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_DV: tl.constexpr):  # fmt: skip
    """The delta of each row, sum(grad out) - grad_lse."""
    tiles = tl.cdiv(rows, BLOCK_M)
    b, h = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = i < rows
    dv = tl.arange(0, BLOCK_DV)
    found = tl.zeros((BLOCK_M,), tl.float32)
    if grad is not None:
        row = b.to(tl.int64) * grad.batch + h.to(tl.int64) * grad.head + i.to(tl.int64) * grad.row
        x = load_rows(grad.data + row, mine, dv, DV, BLOCK_DV).to(tl.float32)
        row = b.to(tl.int64) * out.batch + h.to(tl.int64) * out.head + i.to(tl.int64) * out.row
        found += tl.sum(x * load_rows(out.data + row, mine, dv, DV, BLOCK_DV).to(tl.float32), 1)
    if grad_lse is not None:
        found -= tl.load(grad_lse.data + b.to(tl.int64) * grad_lse.batch + h.to(tl.int64) * grad_lse.head
                         + i.to(tl.int64) * grad_lse.row, mask=mine, other=0.0)  # fmt: skip
    tl.store(delta + (b.to(tl.int64) * heads + h) * rows + i, found, mask=mine)


@triton.jit
def gradients(raw, grad_p, lse, delta, terms, b, h, i, j, queries, keys, diagonal, heads, most_queries, most_keys):
    """Of a tile: the weights after dropout, the gradients of the scores and those of ``scale q k^T``."""
    s, keep = score(raw, terms, b, h, i, j, queries, keys, diagonal, True)
    # Rows that read nothing have a log-sum-exp of -inf.
    base = tl.where(lse == float("-inf"), float("inf"), lse)
    p = tl.where(keep, weight_of(s, base, terms), 0.0)
    grad_p = drop(grad_p, terms, b, h, i, j, heads, most_queries, most_keys)
    grad_s = tl.where(keep, p * (grad_p - delta), 0.0)
    grad_raw = grad_s
    if terms.softcap is not None:
        t = tanh(raw * terms.scale / terms.softcap)
        grad_raw = tl.where(keep, grad_s * (1.0 - t * t), 0.0)
    p = drop(p, terms, b, h, i, j, heads, most_queries, most_keys)
    return p, grad_s, grad_raw


@triton.jit(do_not_specialize=LENGTHS)
def backward_q_kernel(
    grad, q, k, v, lse, delta, grad_q, grad_bias, terms, heads, group, rows, most_queries, most_keys,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_M rows of q, and of their scores where the bias has one for each."""
    tiles = tl.cdiv(most_queries, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    b, h = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    entry, first_q, queries, first_k, keys, diagonal = document(terms, b, most_queries, most_keys)
    begin = tile * BLOCK_M
    if begin >= queries:
        return
    i = begin + tl.arange(0, BLOCK_M)
    head = h + i * 0
    mine = i < queries
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    row = (first_q + i).to(tl.int64)
    qt = load_rows(q.data + entry.to(tl.int64) * q.batch + h.to(tl.int64) * q.head + row * q.row, mine, d, D, BLOCK_D)
    gt = load_rows(
        grad.data + entry.to(tl.int64) * grad.batch + h.to(tl.int64) * grad.head + row * grad.row, mine, dv, DV,
        BLOCK_DV,
    )  # fmt: skip
    at = (entry.to(tl.int64) * heads + h) * rows + row
    row_lse = tl.load(lse + at, mask=mine, other=float("-inf"))
    row_delta = tl.load(delta + at, mask=mine, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = tl.minimum(begin + BLOCK_M, queries)
    first, last, whole_first, whole_last = reach(begin, end, terms, diagonal, keys, BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    for j_next in range(first, last, BLOCK_N):
        j0 = j_next + begin * 0
        j = j0 + n
        there = j < keys
        kt = load_rows(key_rows(k, terms, b, entry, h // group, first_k, j0, n, there), there, d, D, BLOCK_D)
        vt = load_rows(key_rows(v, terms, b, entry, h // group, first_k, j0, n, there), there, dv, DV, BLOCK_DV)
        kt, vt = finite(kt).to(kt.dtype), finite(vt).to(vt.dtype)
        raw = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
        grad_p = tl.dot(gt, tl.trans(vt), input_precision=PRECISION)
        p, grad_s, grad_raw = gradients(
            raw, grad_p, row_lse[:, None], row_delta[:, None], terms, b, head[:, None], i[:, None], j[None, :], queries,
            keys, diagonal, heads, most_queries, most_keys,
        )  # fmt: skip
        if grad_bias is not None:
            tl.store(
                grad_bias.data + place(grad_bias, b, head[:, None], i[:, None], j[None, :]),
                grad_s.to(grad_bias.data.dtype.element_ty),
                mask=mine[:, None] & there[None, :],
            )
        if grad_q is not None:
            acc = tl.dot(grad_raw.to(kt.dtype), kt, acc, input_precision=PRECISION)
    if grad_q is not None:
        to = entry.to(tl.int64) * grad_q.batch + h.to(tl.int64) * grad_q.head + row * grad_q.row
        tl.store(
            grad_q.data + to[:, None] + d[None, :],
            (acc * terms.scale).to(grad_q.data.dtype.element_ty),
            mask=mine[:, None] & (d < D)[None, :],
        )


@triton.jit(do_not_specialize=LENGTHS)
def backward_kv_kernel(
    grad, q, k, v, lse, delta, grad_k, grad_v, terms, heads, group, rows, most_queries, most_keys,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N rows of k and v."""
    tiles = tl.cdiv(most_keys, BLOCK_N)
    kv_heads = heads // group
    b, kv_head = tl.program_id(0) // tiles // kv_heads, tl.program_id(0) // tiles % kv_heads
    entry, first_q, queries, first_k, keys, diagonal = document(terms, b, most_queries, most_keys)
    begin = tl.program_id(0) % tiles * BLOCK_N
    own = most_keys
    if terms.starts_k is not None:
        own = tl.load(terms.starts_k + b + 1) - first_k
    if begin >= own:
        return
    n = tl.arange(0, BLOCK_N)
    j = begin + n
    there = j < keys
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    kt = load_rows(key_rows(k, terms, b, entry, kv_head, first_k, begin, n, there), there, d, D, BLOCK_D)
    vt = load_rows(key_rows(v, terms, b, entry, kv_head, first_k, begin, n, there), there, dv, DV, BLOCK_DV)
    kt, vt = finite(kt).to(kt.dtype), finite(vt).to(vt.dtype)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    i_begin, i_end = 0, queries
    if terms.right is not None:
        i_begin = tl.maximum(begin - diagonal - terms.right, 0) // BLOCK_M * BLOCK_M
    if terms.left is not None:
        i_end = tl.minimum(tl.minimum(begin + BLOCK_N, keys) - diagonal + terms.left, queries)
    if begin >= keys:
        i_end = 0
    for g in range(group):
        h = kv_head * group + g
        for i0 in range(i_begin, i_end, BLOCK_M):
            i = i0 + tl.arange(0, BLOCK_M)
            mine = i < queries
            row = (first_q + i).to(tl.int64)
            qt = load_rows(
                q.data + entry.to(tl.int64) * q.batch + h.to(tl.int64) * q.head + row * q.row, mine, d, D, BLOCK_D
            )
            gt = load_rows(
                grad.data + entry.to(tl.int64) * grad.batch + h.to(tl.int64) * grad.head + row * grad.row, mine, dv, DV,
                BLOCK_DV,
            )  # fmt: skip
            at = (entry.to(tl.int64) * heads + h) * rows + row
            row_lse = tl.load(lse + at, mask=mine, other=float("-inf"))
            row_delta = tl.load(delta + at, mask=mine, other=0.0)
            raw = tl.dot(kt, tl.trans(qt), input_precision=PRECISION)
            grad_p = tl.dot(vt, tl.trans(gt), input_precision=PRECISION)
            head = h + i * 0
            p, grad_s, grad_raw = gradients(
                raw, grad_p, row_lse[None, :], row_delta[None, :], terms, b, head[None, :], i[None, :], j[:, None],
                queries, keys, diagonal, heads, most_queries, most_keys,
            )  # fmt: skip
            acc_v = tl.dot(p.to(gt.dtype), gt, acc_v, input_precision=PRECISION)
            acc_k = tl.dot(grad_raw.to(qt.dtype), qt, acc_k, input_precision=PRECISION)
    written = j < own
    row = (first_k + j).to(tl.int64)
    if grad_k is not None:
        to = entry.to(tl.int64) * grad_k.batch + kv_head.to(tl.int64) * grad_k.head + row * grad_k.row
        tl.store(
            grad_k.data + to[:, None] + d[None, :],
            (acc_k * terms.scale).to(grad_k.data.dtype.element_ty),
            mask=written[:, None] & (d < D)[None, :],
        )
    if grad_v is not None:
        to = entry.to(tl.int64) * grad_v.batch + kv_head.to(tl.int64) * grad_v.head + row * grad_v.row
        tl.store(
            grad_v.data + to[:, None] + dv[None, :],
            acc_v.to(grad_v.data.dtype.element_ty),
            mask=written[:, None] & (dv < DV)[None, :],
        )


@triton.jit(do_not_specialize=LENGTHS)
def backward_bias_kernel(
    grad, q, k, v, lse, delta, grad_bias, terms, batch, heads, group, rows, most_queries, most_keys,
    SUM_ROWS: tl.constexpr, SUM_KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a bias that is broadcast.

    Over batch entries and heads alone: a program owns a tile and visits them. Over rows, or keys: a program owns a part
    of one head, and its sums lie in `grad_bias` (B, Hq, M or 1, N or 1).
    """
    row_tiles = 1 if SUM_ROWS else tl.cdiv(most_queries, BLOCK_M)
    key_tiles = 1 if SUM_KEYS else tl.cdiv(most_keys, BLOCK_N)
    pid = tl.program_id(0)
    own_keys, own_rows = pid % key_tiles * BLOCK_N, pid // key_tiles % row_tiles * BLOCK_M
    pid = pid // key_tiles // row_tiles
    if SUM_ROWS or SUM_KEYS:
        b_first, b_step, b_end = pid // heads, batch, batch
        h_first, h_step = pid % heads, heads
    else:
        # A stride of 0 says that the bias is the same for all.
        own_heads = 1 if grad_bias.head == 0 else heads
        b_first, b_step, b_end = pid // own_heads, 1 if grad_bias.batch == 0 else batch, batch
        h_first, h_step = pid % own_heads, 1 if grad_bias.head == 0 else heads
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b_next in range(b_first, b_end, b_step):
        b = b_next + pid * 0
        entry, first_q, queries, first_k, keys, diagonal = document(terms, b, most_queries, most_keys)
        row_end = queries if SUM_ROWS else tl.minimum(own_rows + 1, queries)
        key_end = keys if SUM_KEYS else tl.minimum(own_keys + 1, keys)
        for h_next in range(h_first, heads, h_step):
            h = h_next + pid * 0
            for i0 in range(own_rows, row_end, BLOCK_M):
                i = i0 + tl.arange(0, BLOCK_M)
                head = h + i * 0
                mine = i < queries
                row = (first_q + i).to(tl.int64)
                at = entry.to(tl.int64) * q.batch + h.to(tl.int64) * q.head + row * q.row
                qt = load_rows(q.data + at, mine, d, D, BLOCK_D)
                at = entry.to(tl.int64) * grad.batch + h.to(tl.int64) * grad.head + row * grad.row
                gt = load_rows(grad.data + at, mine, dv, DV, BLOCK_DV)
                at = (entry.to(tl.int64) * heads + h) * rows + row
                row_lse = tl.load(lse + at, mask=mine, other=float("-inf"))
                row_delta = tl.load(delta + at, mask=mine, other=0.0)
                for j_next in range(own_keys, key_end, BLOCK_N):
                    j0 = j_next + pid * 0
                    j = j0 + n
                    there = j < keys
                    kt = load_rows(
                        key_rows(k, terms, b, entry, h // group, first_k, j0, n, there), there, d, D, BLOCK_D
                    )
                    vt = load_rows(
                        key_rows(v, terms, b, entry, h // group, first_k, j0, n, there), there, dv, DV, BLOCK_DV
                    )
                    raw = tl.dot(qt, tl.trans(finite(kt).to(kt.dtype)), input_precision=PRECISION)
                    grad_p = tl.dot(gt, tl.trans(finite(vt).to(vt.dtype)), input_precision=PRECISION)
                    p, grad_s, grad_raw = gradients(
                        raw, grad_p, row_lse[:, None], row_delta[:, None], terms, b, head[:, None], i[:, None],
                        j[None, :], queries, keys, diagonal, heads, most_queries, most_keys,
                    )  # fmt: skip
                    acc += grad_s
    i, j = own_rows + tl.arange(0, BLOCK_M), own_keys + tl.arange(0, BLOCK_N)
    to = b_first.to(tl.int64) * grad_bias.batch + h_first.to(tl.int64) * grad_bias.head
    if SUM_ROWS and SUM_KEYS:
        tl.store(grad_bias.data + to, tl.sum(tl.sum(acc, 1), 0))
    elif SUM_ROWS:
        tl.store(grad_bias.data + to + j * grad_bias.key, tl.sum(acc, 0), mask=j < most_keys)
    elif SUM_KEYS:
        tl.store(grad_bias.data + to + i * grad_bias.row, tl.sum(acc, 1), mask=i < most_queries)
    else:
        at = i.to(tl.int64)[:, None] * grad_bias.row + j.to(tl.int64)[None, :] * grad_bias.key
        tl.store(grad_bias.data + to + at, acc, mask=(i < most_queries)[:, None] & (j < most_keys)[None, :])
