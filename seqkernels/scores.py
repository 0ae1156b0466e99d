"""What attention does to its scores, beside ``scale * q k^T``, and how that travels through the ops.

B batch, Hq query heads, M queries, N keys; with `cu_seqlens_q` B documents behind one another.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .precision import PRECISIONS

#: A window without a bound on a side, as the ops carry it.
UNBOUNDED = -1


class Scores(NamedTuple):
    """Everything about a call of attention but q, k and v. Every part may be combined with every other.

    The score of query i and key j is ``s = scale q_i k_j``, then ``softcap tanh(s / softcap)``, then plus bias and
    ``-slope |i + diagonal - j|``. Query i may read key j if `mask` is true there, the bias is not -inf, j is among the
    first ``key_lengths[b]`` keys, and ``i + diagonal - left <= j <= i + diagonal + right``. The diagonal is 0, or with
    `bottom_right` the number of keys less that of queries, of each batch entry or document.

    Attributes:
        scale: factor on ``q k^T``.
        mask: bool, four dimensions, each 1 or as in (B, Hq, M, N); ``True`` keeps a key.
        bias: likewise, of the dtype of q or the one it is accumulated in (float32 for 16-bit q). Has a gradient.
        left: keys before the diagonal that a query reads; ``UNBOUNDED`` for all.
        right: keys behind the diagonal that a query reads; ``UNBOUNDED`` for all; 0 is causal.
        bottom_right: the diagonal ends at the last query and the last key, instead of beginning at the first ones.
        key_lengths: (B,) int32, how many of the N keys there are.
        cu_seqlens_q: (B + 1,) int32, where the queries of each document begin in the third dimension of q, whose first
            is 1, and the number of all of them. M is then `max_seqlen_q`.
        cu_seqlens_k: likewise of k and v; N is then `max_seqlen_k`.
        max_seqlen_q: the most queries of a document; 0 without `cu_seqlens_q`.
        max_seqlen_k: the most keys of a document; 0 without `cu_seqlens_q`.
        block_table: (B, blocks) int32: k and v are pages (pages, Hk, page_size, D) with page_size keys each, and key j
            of batch entry or document b is key ``j % page_size`` of page ``block_table[b, j // page_size]``. N is
            ``blocks * page_size``; with `cu_seqlens_q` it is `max_seqlen_k` as ever, and of `cu_seqlens_k` only the
            lengths between its elements count. Pages behind the last key are not looked at. Without gradients.
        alibi_slopes: (Hq,) or (B, Hq) float32. A constant.
        softcap: bound of the scores; 0 for none.
        sink: (Hq,) in the dtype that q is accumulated in: the score of one more key, whose value is 0. Has a gradient.
        dropout_p: probability to drop a weight; the others grow by ``1 / (1 - dropout_p)``.
        seed: () int64, of the dropout, see `seqkernels.backends.reference.attention.dropped`. A constant.
        precision: of products of float32 matrices on GPUs, one of `seqkernels.precision.PRECISIONS`.
    """

    scale: float
    mask: Tensor | None = None
    bias: Tensor | None = None
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    bottom_right: bool = False
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    alibi_slopes: Tensor | None = None
    softcap: float = 0.0
    sink: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    block_table: Tensor | None = None
    precision: str = "ieee"

    def pack(self) -> tuple[list[Tensor | None], list[float], list[int]]:
        """Tensors, numbers and settings, as the ops take them."""
        return (
            [
                self.mask,
                self.bias,
                self.key_lengths,
                self.cu_seqlens_q,
                self.cu_seqlens_k,
                self.alibi_slopes,
                self.sink,
                self.seed,
                self.block_table,
            ],
            [self.scale, self.softcap, self.dropout_p],
            [
                self.left,
                self.right,
                int(self.bottom_right),
                self.max_seqlen_q,
                self.max_seqlen_k,
                PRECISIONS.index(self.precision),
            ],
        )

    @staticmethod
    def unpack(tensors: list[Tensor | None], numbers: list[float], settings: list[int]) -> Scores:
        """The inverse of `pack`."""
        mask, bias, key_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sink, seed, block_table = tensors
        scale, softcap, dropout_p = numbers
        left, right, bottom_right, max_seqlen_q, max_seqlen_k, precision = settings
        return Scores(
            scale,
            mask,
            bias,
            left,
            right,
            bool(bottom_right),
            key_lengths,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            alibi_slopes,
            softcap,
            sink,
            dropout_p,
            seed,
            block_table,
            PRECISIONS[precision],
        )

    def shape(self, q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
        """(B, Hq, M, N) of all scores."""
        if self.cu_seqlens_q is None:
            blocks = 1 if self.block_table is None else self.block_table.shape[1]
            return q.shape[0], q.shape[1], q.shape[2], blocks * k.shape[2]
        return self.cu_seqlens_q.shape[0] - 1, q.shape[1], self.max_seqlen_q, self.max_seqlen_k

    def features(self, q: Tensor, k: Tensor) -> tuple[str, ...]:
        """What the call uses beyond the plain softmax, sorted, as `seqkernels.backends.Call` has it."""
        found = []
        if self.alibi_slopes is not None:
            found.append("alibi")
        if self.bias is not None:
            found.append("bias" if self.bias.dtype == q.dtype else "bias32")
        if self.block_table is not None:
            found.append("block_table")
        if self.bottom_right:
            found.append("bottom_right")
        if self.right == 0 and self.left < 0:
            found.append("causal")
        if self.dropout_p > 0.0:
            found.append("dropout")
        if q.shape[1] != k.shape[1]:
            found.append("grouped")
        if self.key_lengths is not None:
            found.append("key_lengths")
        if self.mask is not None:
            found.append("mask")
        if self.sink is not None:
            found.append("sink")
        if self.softcap != 0.0:
            found.append("softcap")
        if self.cu_seqlens_q is not None:
            found.append("varlen")
        if self.left >= 0 or self.right > 0:
            found.append("window")
        return tuple(found)


def dropout_threshold(dropout_p: float) -> int:
    """Random words of 32 bits below this drop a weight."""
    return min(1 << 32, math.ceil(dropout_p * (1 << 32)))
