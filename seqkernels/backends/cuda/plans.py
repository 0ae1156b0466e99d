"""Which tier serves a recurrence, and how it is cut: the one table, with its reasons.

A tier is how the blocks that share a recurrence exchange what they make (``csrc/core/persistent_plan.h``):

* ``block``: one block has all the weights. Nothing is exchanged.
* ``cluster``: up to 16 blocks of a Hopper or Blackwell GPU write into each other's shared memory.
* ``grid``: blocks of the whole device meet at flags in memory; all of them have to be on it at once.

Of all cuts that a device has the memory for, the one whose step takes the fewest cycles by `cycles` is taken. Its
constants are estimates from published latencies; ``python -m benchmarks.cuda_latency`` measures them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from ...cells import CELLS

#: Cycles of an exchange between the blocks of a team: none, through a cluster, through memory with flags.
EXCHANGE = {"block": 0, "cluster": 700, "grid": 2400}
#: And for each block more that takes part in it.
EXCHANGE_OF_BLOCK = {"block": 0.0, "cluster": 10.0, "grid": 4.0}
#: Cycles of a step that no product takes: two synchronisations, the cell, the sums.
REST = 250
#: Cycles that a quarter of a multiprocessor takes for a tile of weights by 8 rows of the batch.
TILE = {"float16": 8.0, "bfloat16": 8.0, "tf32x3": 40.0, "exact": 40.0}
#: Bytes that shared memory gives in a cycle.
SHARED_BYTES = 128
#: The share of multiprocessors that clusters find a place on, whose groups are no multiples of a cluster.
IN_CLUSTERS = 0.85

#: Cycles of a launch until its first step: weights are loaded, and what its input is made of is multiplied before.
LAUNCH = 20000

#: The largest sizes that plans are made for.
MOST_HIDDEN, MOST_BATCH = 1 << 14, 1 << 24

_UNITS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
_ROWS = (8, 16, 32, 64)
_TILE_BYTES = 512
_THREADS = 256


class Device(NamedTuple):
    """What plans depend on.

    Attributes:
        capability: the compute capability, 90 for 9.0.
        processors: multiprocessors.
        shared_memory: bytes that a block may have.
        cluster: blocks that a cluster may have; 0 for none.
    """

    capability: int
    processors: int
    shared_memory: int
    cluster: int


def cycles(plan: Any, product: str, device: Device, jobs: int = 1) -> float:
    """An estimate of the cycles of a step, of all rows of the batch and of so many recurrences at once."""
    warps = plan.row_warps * plan.column_warps
    tiles = plan.tile_rows_of_warp * plan.columns
    passes = plan.rows // 8
    products = -(-warps // 4) * tiles * passes * TILE[product]
    moved = passes * warps * (plan.tail_tiles * _TILE_BYTES + plan.columns * plan.batches * 8 * 32)
    exchange = EXCHANGE[plan.tier] + EXCHANGE_OF_BLOCK[plan.tier] * plan.blocks
    step = REST * max(plan.rows * plan.units / _THREADS, 1)
    share = IN_CLUSTERS if plan.tier == "cluster" and plan.blocks > 1 else 1.0
    turns = -(-jobs * plan.slices // max(int(device.processors * share) // plan.blocks, 1))
    return turns * (step + max(products, moved / SHARED_BYTES) + exchange)


def _candidates(hidden: int) -> Iterator[tuple[str, int]]:
    whole = -(-hidden // 8) * 8
    if whole <= _UNITS[-1]:
        yield "block", whole
    for units in _UNITS:
        if units < whole:
            yield "cluster", units
            yield "grid", units


def _misses(plan: Any, device: Device, jobs: int) -> str | None:
    """Why a device cannot have a plan; ``None`` where it can."""
    if plan.shared_memory > device.shared_memory:
        return f"{plan.shared_memory} bytes of shared memory, of {device.shared_memory}"
    # All blocks of a cooperative launch have to be there at once, also those that do not meet.
    blocks = plan.blocks * (jobs if plan.tier == "grid" else 1)
    places = {"block": 1, "cluster": device.cluster, "grid": device.processors}[plan.tier]
    return None if blocks <= places else f"{blocks} blocks that meet, of {places}"


def _leading(text: str) -> int:
    return int(text.split()[0])


class Choice(NamedTuple):
    """The plan that a call takes, or why there is none.

    Attributes:
        plan: of the compiled module, or ``None``.
        reason: how it is, or why there is none.
        cycles: of a step, as `cycles` estimates them.
    """

    plan: Any | None
    reason: str
    cycles: float = float("inf")

    def __str__(self) -> str:
        return self.reason


@functools.lru_cache(maxsize=1024)
def choose(
    kernels: ModuleType, device: Device, cell: str, product: str, backward: bool, hidden: int, batch: int, jobs: int = 1
) -> Choice:
    """The plan of a call.

    Args:
        kernels: the compiled module that has `plan`.
        device: that it runs on.
        cell: a key of `seqkernels.cells.CELLS`.
        product: as `persistent.product_of` gives it.
        backward: whether it is the backward pass.
        hidden: H, 1 or more.
        batch: B, 1 or more.
        jobs: how many recurrences like that are to run at once.
    """
    if hidden > MOST_HIDDEN or batch > MOST_BATCH:
        return Choice(None, f"has no plans beyond {MOST_HIDDEN} hidden units or {MOST_BATCH} rows")
    best, least, misses = None, float("inf"), []
    for tier, units in _candidates(hidden):
        for rows in _ROWS:
            plan = kernels.plan(tier, cell, product, backward, hidden, batch, units, rows)
            missing = _misses(plan, device, jobs)
            if missing is not None:
                misses.append(missing)
                break
            found = cycles(plan, product, device, jobs)
            if found < least:
                best, least = plan, found
            if rows >= batch:
                break
    if best is None:
        size = f"the weights of {CELLS[cell].gates} x {hidden} x {hidden}"
        return Choice(None, f"{size} do not fit: the cuts need {min(misses, key=_leading)}, for example")
    return Choice(best, describe(best), least)


def describe(plan: Any) -> str:
    """A plan in words, as `seqkernels.explain` shows it."""
    teams = f"{plan.slices} x {plan.rows} rows"
    if plan.tier == "block":
        return f"a block each for {teams}"
    kind = "cluster" if plan.tier == "cluster" else "grid"
    return f"{kind} of {plan.blocks} blocks with {plan.units} units each, for {teams}"


class Waves(NamedTuple):
    """How several recurrences share launches.

    Attributes:
        width: how many run at once; where there are more, so many follow the ones before them.
        parts: into how many parts their steps are cut. Where each is fed by the one before it, part k of one runs
            beside part k - 1 of the next: a wavefront through layers and time.
    """

    width: int
    parts: int


def waves(count: int, steps: int, fed: bool, cycles_of: Callable[[int], float], most: int) -> Waves:
    """The waves of the fewest cycles.

    Args:
        count: recurrences, all alike.
        steps: of each.
        fed: whether each has the hidden states of the one before it as its input.
        cycles_of: of a step of so many at once; infinite where they do not fit.
        most: that a launch can have.
    """

    def cost(found: Waves) -> float:
        launches = found.parts + (found.width - 1 if fed else 0)
        return -(-count // found.width) * launches * (steps / found.parts * cycles_of(found.width) + LAUNCH)

    def parts(width: int) -> int:
        if not fed or width == 1:
            return 1
        # Where the derivative of the cost is 0.
        best = math.sqrt(steps * min(cycles_of(width), 1e9) * (width - 1) / LAUNCH)
        return min(max(round(best), 1), steps)

    return min((Waves(width, parts(width)) for width in range(1, min(count, most) + 1)), key=cost)
