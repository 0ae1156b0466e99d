"""Sizes of the tiles of each kernel, by dtype and head size; the number of rows, keys and heads has no part in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


#: Up to so many rows of all heads of a group, the tile of the forward pass has no more.
FEW_ROWS = 16


class Blocks(NamedTuple):
    """Rows and keys of a tile, head sizes rounded up to powers of 2, warps of a program, and stages of its loads."""

    m: int
    n: int
    d: int
    dv: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_D": self.d, "BLOCK_DV": self.dv}


def _power_of_2(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def blocks_of(kernel: str, dtype: torch.dtype, size: int, value_size: int) -> Blocks:
    """The tiles of a kernel.

    Args:
        kernel: ``"forward"``, ``"few_rows"`` (the forward pass of few queries), ``"backward_q"`` or
            ``"backward_kv"``.
        dtype: of q, k and v.
        size: D, of q and k.
        value_size: Dv.
    """
    d, dv = _power_of_2(size), _power_of_2(value_size)
    if triton.knobs.runtime.interpret:
        # Small tests shall still have several tiles.
        return Blocks(FEW_ROWS if kernel == "few_rows" else 32, 16, d, dv, 1, 1)
    widest = max(d, dv)
    wide = 2 if dtype == torch.float32 else 1
    if kernel == "few_rows":
        return Blocks(FEW_ROWS, 64 if widest * wide <= 256 else 32, d, dv, 4, 3)
    if kernel == "forward":
        m, n = (128, 64) if widest * wide <= 128 else (64, 32) if widest * wide <= 256 else (32, 16)
    else:
        m, n = (64, 64) if widest * wide <= 128 else (32, 32) if widest * wide <= 256 else (16, 16)
    return Blocks(m, n, d, dv, 4 if m * widest <= 64 * 64 else 8, 2)
