"""Sizes of the tiles of the recurrence, by cell, dtype and hidden size; time and batch have no part in them."""

from __future__ import annotations

from typing import NamedTuple

import triton


class StepTiles(NamedTuple):
    """Rows and columns of the tile of a program that does one step, and its warps."""

    rows: int
    columns: int
    warps: int


def power_of_2(size: int) -> int:
    """The next power of 2."""
    return 1 << max(size - 1, 0).bit_length()


def step_tiles(hidden: int, whole: bool) -> StepTiles:
    """The tiles of the kernels of one step.

    Args:
        hidden: H.
        whole: whether a program must own whole rows, for a norm.
    """
    columns = power_of_2(hidden)
    if triton.knobs.runtime.interpret:
        # Small tests shall still have several tiles.
        return StepTiles(4, columns if whole else min(columns, 16), 1)
    if not whole:
        columns = min(columns, 256)
    return StepTiles(max(512 // columns, 1), columns, 4 if columns <= 1024 else 8 if columns <= 2048 else 16)
