"""Through time in as few launches as a device allows: for cells without norms, up to `MOST_HIDDEN` hidden units."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._through_time import Gradients, Loop
from . import recurrence_sequence_kernels as kernels
from .recurrence_configs import MOST_HIDDEN, SequenceTiles, cell_constants, sequence_tiles, shared_memory

#: Tiles of rows in a launch, which are the second axis of its grid.
MOST_TILES = 65535


def serves(loop: Loop) -> bool:
    """Whether the kernels of a sequence can run a call, both passes of it."""
    if loop.parts.norm_h is not None or loop.parts.norm_c is not None or loop.hidden > MOST_HIDDEN:
        return False
    weight = loop.weight_hh
    if not weight.is_cuda:
        return True
    needed = shared_memory(loop.cell, weight.dtype, loop.hidden, loop.precision, device=weight.device)
    return needed <= _limits(weight.device)[1]


@functools.cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a device, and bytes of shared memory that a program may have."""
    found = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return found["multiprocessor_count"], found["max_shared_mem"]


class Launch(NamedTuple):
    """Some steps of some rows.

    Attributes:
        first: step in time.
        steps: their number.
        tile: the first tile of rows.
        tiles: their number.
        sync: whether programs meet.
        after: of a backward pass whose launches are steps, the step before in its order; -1 for none.
    """

    first: int
    steps: int
    tile: int
    tiles: int
    sync: bool = False
    after: int | None = None


def launches(order: range, columns: int, rows: int, processors: int, backward: bool = False) -> Iterator[Launch]:
    """The launches of a loop.

    Args:
        order: its steps.
        columns: programs that share rows and have to meet after each step.
        rows: tiles of rows.
        processors: of the device, each of which runs a program at a time; 0 for one that runs no programs at once.
        backward: whether it is a loop back, which needs a launch more where each is a step.
    """
    if columns == 1:
        for tile in range(0, rows, MOST_TILES):
            yield Launch(order[0], len(order), tile, min(MOST_TILES, rows - tile))
    elif columns <= processors and (backward or len(order) > 1):
        together = processors // columns
        for tile in range(0, rows, together):
            yield Launch(order[0], len(order), tile, min(together, rows - tile), True)
    else:
        # Nobody has to wait within a step, of which a loop back needs a launch more.
        steps = zip((*order, order[-1]), (-1, *order), strict=True) if backward else ((t, None) for t in order)
        for t, after in steps:
            for tile in range(0, rows, MOST_TILES):
                yield Launch(t, int(t != after), tile, min(MOST_TILES, rows - tile), after=after)


def _each_launch(
    loop: Loop, order: range, tiles: SequenceTiles, carry: Tensor, backward: bool = False
) -> Iterator[tuple[tuple[int, int], Launch, Tensor | None, dict[str, object]]]:
    """For each launch its grid, its part of the loop, its counters and its constants and options."""
    columns, rows = triton.cdiv(loop.hidden, tiles.columns), triton.cdiv(loop.batch, tiles.rows)
    processors = _limits(carry.device)[0] if carry.is_cuda else 0
    counters = None
    for launch in launches(order, columns, rows, processors, backward):
        options = {
            **cell_constants(loop.cell, loop.hidden),
            **tiles.constants(),
            "SYNC": launch.sync,
            **tiles.options(),
        }
        if launch.sync:
            options["launch_cooperative_grid"] = True
            if counters is None:
                counters = torch.zeros(rows, dtype=torch.int32, device=carry.device)
        yield (columns, launch.tiles), launch, counters if launch.sync else None, options


def forward(loop: Loop, carry: Tensor, states: Tensor, reserve: Tensor | None, begin: int, end: int, base: int) -> None:
    """The steps [begin, end), as in `Path.forward`."""
    parts = loop.parts
    busy = any(x is not None for x in (parts.reset_state, parts.peephole, parts.recurrent_mask, parts.zoneout))
    tiles = sequence_tiles(
        "forward", loop.cell, states.dtype, loop.hidden, loop.precision, options=busy, device=states.device
    )
    for grid, launch, counters, options in _each_launch(loop, loop.order(begin, end), tiles, carry):
        kernels.sequence_forward_kernel[grid](
            loop.gates_x,
            loop.weight_hh,
            carry,
            states,
            reserve,
            loop.control,
            counters,
            loop.parts,
            loop.batch,
            launch.first,
            launch.steps,
            launch.tile,
            base,
            int(loop.reverse),
            states.stride(0),
            EVERY_STATE=states.shape[0] > 1,
            **options,
        )


def backward(
    loop: Loop, grads: Gradients, carry: Tensor, states: Tensor, reserve: Tensor, begin: int, end: int, base: int
) -> None:
    """Back through the steps [begin, end), as in `Path.backward`."""
    tiles = sequence_tiles("backward", loop.cell, states.dtype, loop.hidden, loop.precision, device=states.device)
    for grid, launch, counters, options in _each_launch(loop, loop.order(begin, end)[::-1], tiles, carry, True):
        kernels.sequence_backward_kernel[grid](
            carry,
            loop.weight_hh,
            grads.hidden,
            grads.cells,
            grads.gates,
            states,
            reserve,
            loop.gates_x,
            grads.product,
            grads.of_x,
            grads.of_u,
            loop.control,
            counters,
            loop.parts,
            grads.sums,
            loop.batch,
            launch.first,
            launch.steps,
            -1 if launch.after is None else launch.after,
            launch.tile,
            base,
            int(loop.reverse),
            states.stride(0),
            STEPWISE=launch.after is not None,
            **options,
        )
