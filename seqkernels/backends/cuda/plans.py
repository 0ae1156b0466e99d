"""Which tier serves a recurrence, and how it is cut: the one table, with its reasons.

A tier is how the blocks that share a recurrence exchange what they make (``csrc/core/persistent_plan.h``):

* ``block``: one block has all the weights. Nothing is exchanged.
* ``cluster``: up to 16 blocks of a Hopper or Blackwell GPU write into each other's shared memory.
* ``grid``: blocks of the whole device meet at flags in memory; all of them have to be on it at once.
* ``steps``: nothing stays on chip. Each step is a product of torch's and a pass over the elements
  (``csrc/core/stepwise.h``), in a CUDA graph of several steps. It serves every size.

Of all cuts that a device has the memory for, and the last tier, the one whose step takes the fewest cycles by `cycles`
and `cycles_of_steps` is taken. Their constants are estimates: latencies are published ones, which
``python -m benchmarks.cuda_latency`` measures for exchanges; rates are those of data sheets.
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
#: Cycles of a layer norm in a step, beside its exchange: two sums of a warp over each of its rows, and joining them.
NORM = 400
#: Cycles that a quarter of a multiprocessor takes for a tile of weights by 8 rows of the batch.
TILE = {"float16": 8.0, "bfloat16": 8.0, "tf32x3": 40.0, "exact": 40.0}
#: Bytes that shared memory gives in a cycle.
SHARED_BYTES = 128
#: The share of multiprocessors that clusters find a place on, whose groups are no multiples of a cluster.
IN_CLUSTERS = 0.85

#: Cycles of a launch until its first step: weights are loaded, and what its input is made of is multiplied before.
LAUNCH = 20000

#: Multiply-adds of 16 bits that the tensor cores of a multiprocessor do in a cycle, from a compute capability on: an
#: A100 does 312 TFLOPS with 108 of them at 1.41 GHz, an H100 989 with 132 at 1.83, a B200 2250 with 148 at 1.85, an RTX
#: 5090 210 with 170 at 2.41.
TENSOR_CORES = {80: 1024, 86: 256, 90: 2048, 100: 4096, 120: 256}
#: Those of float32 without tensor cores, whose products torch forms so but for precision ``"tf32"``.
PLAIN_CORES = 128
#: The share of these that a library's product of a step reaches, whose tiles are few.
PRODUCT_SHARE = 0.5
#: Cycles of two kernels that wait for each other in a CUDA graph, some 1.3 us each: the way from the end of one to the
#: beginning of the next, its first reads, its last writes.
LAUNCHES = 4500
#: Bytes that memory, and the second cache or a cluster, give a multiprocessor in a cycle: 3.35 TB/s and some 7 TB/s of
#: an H100.
MEMORY_BYTES, CACHE_BYTES = 13, 30
#: Bytes that stay in the second cache from step to step.
CACHED = 32 << 20
#: Bytes of an element that a step reads and writes in memory, whatever the tier, beside those of its gates; and those
#: of workspaces in the second cache, which tier "steps" has alone.
STREAMED, KEPT = 8, 16

#: The largest sizes that plans of a launch are made for.
MOST_HIDDEN, MOST_BATCH = 1 << 14, 1 << 24

_UNITS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
_ROWS = (8, 16, 32, 64)
_TILE_BYTES = 512
_THREADS = 256


class Steps(NamedTuple):
    """The plan of tier ``"steps"``, which has nothing to choose."""

    tier: str = "steps"


STEPS = Steps()


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


class Norms(NamedTuple):
    """The layer norms of a step.

    Attributes:
        h: whether the recurrent product is normalised.
        c: whether c is where it becomes h.
    """

    h: bool = False
    c: bool = False


NO_NORMS = Norms()


def _stored(product: str) -> int:
    """Bytes of an element."""
    return 2 if product in ("float16", "bfloat16") else 4


def _received(plan: Any, product: str) -> int:
    """Bytes that a block has from the others in a step: h of all units, or back every block's part of its units'."""
    each = 4 * plan.column_warps if plan.backward else _stored(product)
    return int(plan.rows * plan.blocks * plan.units * each)


def cycles(plan: Any, product: str, device: Device, jobs: int = 1) -> float:
    """An estimate of the cycles of a step, of all rows of the batch and of so many recurrences at once."""
    warps = plan.row_warps * plan.column_warps
    tiles = plan.tile_rows_of_warp * plan.columns
    passes = plan.rows // 8
    products = -(-warps // 4) * tiles * passes * TILE[product]
    moved = passes * warps * (plan.tail_tiles * _TILE_BYTES + plan.columns * plan.batches * 8 * 32)
    latency = EXCHANGE[plan.tier] + EXCHANGE_OF_BLOCK[plan.tier] * plan.blocks
    exchange = 0.0 if plan.tier == "block" else max(latency, _received(plan, product) / CACHE_BYTES)
    exchange += latency * plan.norms
    step = REST * max(plan.rows * plan.units / _THREADS, 1) + NORM * plan.norms * (plan.rows // 8)
    share = IN_CLUSTERS if plan.tier == "cluster" and plan.blocks > 1 else 1.0
    turns = -(-jobs * plan.slices // max(int(device.processors * share) // plan.blocks, 1))
    return turns * (step + max(products, moved / SHARED_BYTES) + exchange)


def _gates_bytes(cell: str, batch: int, hidden: int) -> int:
    """Of all gates of a step, float32."""
    return 4 * CELLS[cell].gates * batch * hidden


def _streamed(cell: str, batch: int, hidden: int, device: Device) -> float:
    """Cycles for what a step reads and writes in memory: gates or their gradients, what is kept of them, states."""
    moved = 2 * _gates_bytes(cell, batch, hidden) + STREAMED * batch * hidden
    return moved / (device.processors * MEMORY_BYTES)


def cycles_of_steps(cell: str, product: str, hidden: int, batch: int, device: Device) -> float:
    """`cycles` of tier ``"steps"``, forward or backward."""
    stored = _stored(product)
    weights = CELLS[cell].gates * hidden * hidden
    rate = TENSOR_CORES[max(x for x in TENSOR_CORES if x <= max(device.capability, 80))] if stored == 2 else PLAIN_CORES
    products = weights * batch / (device.processors * rate * PRODUCT_SHARE)
    read = weights * stored / (device.processors * (CACHE_BYTES if weights * stored <= CACHED else MEMORY_BYTES))
    workspaces = 2 * _gates_bytes(cell, batch, hidden) + KEPT * batch * hidden
    passes = _streamed(cell, batch, hidden, device) + workspaces / (device.processors * CACHE_BYTES)
    return LAUNCHES + max(products, read) + passes


def _candidates(hidden: int) -> Iterator[tuple[str, int]]:
    whole = -(-hidden // 8) * 8
    if whole <= _UNITS[-1]:
        yield "block", whole
    for units in _UNITS:
        if units < whole:
            yield "cluster", units
            yield "grid", units


def _fits(plan: Any, device: Device, jobs: int) -> bool:
    places = {"block": 1, "cluster": device.cluster, "grid": device.processors}[plan.tier]
    # All blocks of a cooperative launch have to be there at once, also those that do not meet.
    blocks = plan.blocks * (jobs if plan.tier == "grid" else 1)
    return bool(plan.shared_memory <= device.shared_memory and blocks <= places)


class Choice(NamedTuple):
    """The plan that a call takes.

    Attributes:
        plan: of the compiled module, or `STEPS`; ``None`` where nothing serves the call.
        words: what it is, or why there is none.
        cycles: of a step, as `cycles` estimates them; infinite where several cannot run at once.
    """

    plan: Any
    words: str
    cycles: float

    def __str__(self) -> str:
        return self.words


@functools.lru_cache(maxsize=1024)
def choose(
    kernels: ModuleType,
    device: Device,
    cell: str,
    product: str,
    backward: bool,
    hidden: int,
    batch: int,
    norms: Norms = NO_NORMS,
    jobs: int = 1,
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
        norms: that it has.
        jobs: how many recurrences like that are to run at once.
    """
    best: Any = None if any(norms) else STEPS
    least = jobs * cycles_of_steps(cell, product, hidden, batch, device) if best is STEPS else math.inf
    streamed = _streamed(cell, batch, hidden, device)
    small = hidden <= MOST_HIDDEN and batch <= MOST_BATCH
    for tier, units in _candidates(hidden) if small else ():
        for rows in _ROWS:
            plan = kernels.plan(tier, cell, product, backward, hidden, batch, units, rows, *norms)
            if not _fits(plan, device, jobs):
                break
            found = max(cycles(plan, product, device, jobs), jobs * streamed)
            if found < least:
                best, least = plan, found
            if rows >= batch:
                break
    if best is None:
        size = f"{CELLS[cell].gates} x {hidden} x {hidden}"
        return Choice(None, f"norms of layers need weights on chip, and those of {size} fit no tier", math.inf)
    if best is STEPS and jobs > 1:
        least = math.inf
    return Choice(best, describe(best), least)


def describe(plan: Any) -> str:
    """A plan in words, as `seqkernels.explain` shows it."""
    if plan.tier == "steps":
        return "a product and a fused cell a step, in a CUDA graph"
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
