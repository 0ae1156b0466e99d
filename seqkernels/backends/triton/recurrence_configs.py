"""Sizes of the tiles of the recurrence, by cell, dtype and hidden size; time and batch have no part in them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from ...cells import CELLS
from . import tiles as own_tiles


class StepTiles(NamedTuple):
    """Rows and columns of the tile of a program that does one step, and its warps."""

    rows: int
    columns: int
    warps: int


def cell_constants(cell: str, hidden: int) -> dict[str, object]:
    """What every kernel has to know of a cell of H hidden units, as the kernels name it."""
    gates, states, _ = CELLS[cell]
    return {"H": hidden, "CELL": cell, "GATES": gates, "STATES": states}


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
        return StepTiles(4, columns if whole else max(columns // 4, 16), 1)
    if not whole:
        columns = min(columns, 256)
    return StepTiles(max(512 // columns, 1), columns, 4 if columns <= 1024 else 8 if columns <= 2048 else 16)


class SequenceTiles(NamedTuple):
    """The tile of a program that does a sequence of steps.

    Attributes:
        rows: of the batch, 16 or more for tensor cores.
        columns: hidden units, of all gates.
        depth: rows of the weights in one product.
        lanes: gates beside each other in a product, a power of 2; 1 where they are one behind the other.
        resident: whether the weights stay with the program through the loop.
        ahead: loads on their way before the product of the first, where the weights stay.
        warps: of a program.
        stages: of the loads of weights that do not stay.
        precision: of the products of float32 matrices.
    """

    rows: int
    columns: int
    depth: int
    lanes: int
    resident: bool
    ahead: int
    warps: int
    stages: int
    precision: str = "ieee"

    def constants(self) -> dict[str, object]:
        """As the kernels name them."""
        return {
            "LANES": self.lanes,
            "BLOCK_B": self.rows,
            "BLOCK_C": self.columns,
            "BLOCK_K": self.depth,
            "RESIDENT": self.resident,
            "AHEAD": self.ahead,
            "STAGES": self.stages,
            "PRECISION": self.precision,
        }

    def options(self) -> dict[str, object]:
        """Of a launch. The loop over time is never pipelined: a load must not be moved to the step before."""
        return {"num_warps": self.warps, "num_stages": 1}


#: The largest hidden size whose steps go into one launch.
MOST_HIDDEN = 1024


def sequence_tiles(
    kernel: str,
    cell: str,
    dtype: torch.dtype,
    hidden: int,
    precision: str = "ieee",
    *,
    options: bool = False,
    device: torch.device | None = None,
) -> SequenceTiles:
    """The tiles of the kernels of a sequence.

    Args:
        kernel: ``"forward"`` or ``"backward"``.
        cell: a key of `seqkernels.cells.CELLS`.
        dtype: of the input.
        hidden: H, up to `MOST_HIDDEN`.
        precision: of products of float32 matrices.
        options: whether the state is reset, dropped or kept by zoneout, or gates see it through peepholes.
        device: whose own tiles come first, see `tiles`; ``None`` for those that are shipped.
    """
    shipped = _shipped(kernel, cell, dtype, hidden, precision)
    if options and kernel == "forward" and not triton.knobs.runtime.interpret:
        shipped = _with_options(shipped, dtype)
    own = own_tiles.own(device, own_tiles.recurrence_row, kernel, cell, dtype, hidden, precision)
    if own is None:
        return shipped
    rows, columns, depth, ahead, warps = own
    return shipped._replace(rows=rows, columns=columns, depth=depth, ahead=ahead, warps=warps)


def _shipped(kernel: str, cell: str, dtype: torch.dtype, hidden: int, precision: str) -> SequenceTiles:
    lanes = 1 if CELLS[cell].gates == 1 else 4
    size = max(power_of_2(hidden), 16)
    if triton.knobs.runtime.interpret:
        # Small tests shall still have several tiles; both kinds of loops over weights are run.
        columns = max(size // 4, 16)
        return SequenceTiles(4 if size <= 64 else 8, columns, columns, lanes, hidden <= 24, 1, 1, 1, precision)
    if dtype == torch.float32:
        return _tiles_of_floats(kernel, lanes, size, precision)
    if lanes == 1:
        # One program has the weights of all units where that is up to 128 KiB.
        columns = size if size <= 256 else 32
        return SequenceTiles(16, columns, min(size, 256), 1, True, 3, 4 if size <= 128 else 8, 1)
    if size <= 64:
        return SequenceTiles(16, size, min(size, 64), lanes if kernel == "forward" else 1, True, 3, 8, 1)
    # All of a forward pass; in the backward pass they are four times as large, and shared memory ends.
    ahead = 7 if kernel == "forward" else 3 if size <= 512 else 1
    return SequenceTiles(16, 32 if size <= 256 else 16, 128, lanes, True, ahead, 4 if size <= 512 else 8, 1)


def _with_options(tiles: SequenceTiles, dtype: torch.dtype) -> SequenceTiles:
    """What of the tiles of a forward pass takes the registers that options need too."""
    if not tiles.resident:
        return tiles
    if dtype == torch.float32:
        if tiles.lanes == 1:
            return tiles._replace(depth=min(tiles.depth, 32), ahead=1)
        return tiles._replace(warps=8, ahead=1)
    return tiles._replace(columns=min(tiles.columns, 128)) if tiles.lanes == 1 else tiles._replace(warps=8)


def _tiles_of_floats(kernel: str, lanes: int, size: int, precision: str) -> SequenceTiles:
    if precision == "ieee":
        return SequenceTiles(16, 16, 16, lanes, False, 0, 4, 3, precision)
    if precision == "tf32x3" or (lanes > 1 and size > 512):
        # Weights in parts, or large ones, are more than shared memory holds.
        return SequenceTiles(16, 16, 32, lanes, False, 0, 4, 3, precision)
    if lanes == 1:
        columns = size if size <= 128 else 32
        return SequenceTiles(16, columns, min(size, 128), 1, True, 3, 4 if size <= 64 else 8, 1, precision)
    if size <= 64:
        return SequenceTiles(16, min(size, 32), size, lanes, True, 3, 8, 1, precision)
    ahead = 3 if kernel == "forward" or size <= 256 else 1
    return SequenceTiles(16, 32 if size <= 128 else 16, 64, lanes, True, ahead, 4, 1, precision)


def shared_memory(
    cell: str, dtype: torch.dtype, hidden: int, precision: str = "ieee", *, device: torch.device | None = None
) -> int:
    """Bytes of shared memory that a program of a sequence needs: weights that stay, and tiles at work.

    Args:
        cell, dtype, hidden, precision, device: as in `sequence_tiles`.
    """
    found = 0
    for kernel in ("forward", "backward"):
        tiles = sequence_tiles(kernel, cell, dtype, hidden, precision, device=device)
        behind = CELLS[cell].gates if kernel == "backward" and tiles.lanes == 1 else 1
        chunks = -(-hidden * behind // tiles.depth)
        weights = chunks * tiles.depth * tiles.lanes * tiles.columns * dtype.itemsize
        beside = tiles.lanes if kernel == "backward" else 1
        factors = min(tiles.ahead + 1, chunks) * tiles.rows * tiles.depth * beside * dtype.itemsize
        products = tiles.rows * tiles.lanes * tiles.columns * 4
        if tiles.resident:
            found = max(found, weights + max(factors, products))
    return found
