"""What the machine can do, measured in the same run as the cases, and which of its limits a case is nearest to.

Three limits bound a call from below: the arithmetic at the rate of a large product of ``torch.mm``; the reading of
weights, keys and values at the rate at which the processor sums as much data over and over; and the shortest call of
the run, which does next to nothing. `limit` names the largest of the three and its share of the measured time.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .cases import Phase

SIZE = 1024
"""Rows and columns of the matrices of the measured product."""

WORKING_SETS = tuple(kib << 10 for kib in (32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 262144))
"""Bytes, of all threads together, that are summed over and over."""

SWEEP_BYTES = 512 << 20
"""At least as much is read for one measurement, so that starting the threads does not count."""


class Roofline(NamedTuple):
    """Rates of the machine, each the best of several tries.

    Attributes:
        gflops: of ``torch.mm`` of two square matrices of `SIZE`, by dtype.
        bandwidth: (bytes, GB/s) of reading a working set over and over, by size.
        caches: bytes of all threads together by level, ``"L1"`` and so on; empty where the system does not say.
    """

    gflops: dict[str, float]
    bandwidth: list[tuple[int, float]]
    caches: dict[str, int]

    def better(self, other: Roofline) -> Roofline:
        """The better of two measurements, rate by rate."""
        gflops = {dtype: max(rate, other.gflops[dtype]) for dtype, rate in self.gflops.items()}
        pairs = zip(self.bandwidth, other.bandwidth, strict=True)
        return Roofline(gflops, [(size, max(rate, again)) for (size, rate), (_, again) in pairs], self.caches)

    def rate(self, size: int) -> float:
        """GB/s at which `size` bytes are read over and over, between the measured sizes by their logarithm."""
        sizes, rates = zip(*self.bandwidth, strict=True)
        return float(np.interp(math.log(max(size, 1)), np.log(sizes), rates))

    def level(self, size: int) -> str:
        """The smallest cache that holds `size` bytes, ``"memory"`` where none does, ``""`` where it is not known.

        Where the last cache holds more than half of them it is named too, as in ``"L3+memory"``.
        """
        if not self.caches:
            return ""
        fitting = [name for name, capacity in sorted(self.caches.items()) if size <= capacity]
        if fitting:
            return fitting[0]
        last = max(self.caches)
        return f"{last}+memory" if size < 2 * self.caches[last] else "memory"

    def peak(self, dtype: str) -> float:
        """GFLOP/s of products; those of 16 bits may be made in float32, of the same numbers.

        ``torch.mm`` of float16 is not measured: where the processor has no such instruction it is tens of times slower
        than of float32, and no limit.
        """
        return max(self.gflops["float32"], self.gflops.get(dtype, 0.0))

    def to_json(self) -> dict[str, Any]:
        """As plain values, see `from_json`."""
        return self._asdict()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Roofline:
        """What `to_json` gave."""
        return cls(data["gflops"], [(size, rate) for size, rate in data["bandwidth"]], data["caches"])


class Limit(NamedTuple):
    """What bounds a call.

    Attributes:
        name: ``"compute"``; ``"L1"``, ``"L2"``, ``"L3"``, ``"L3+memory"`` or ``"memory"``, from where most is read,
            ``"reading"`` where the caches are not known; or ``"call"``.
        seconds: the time that this limit alone would take.
    """

    name: str
    seconds: float


def measure() -> Roofline:
    """The rates of this machine on as many threads as torch has now; takes about a second."""
    threads = torch.get_num_threads()
    return Roofline(
        {str(dtype).removeprefix("torch."): _product(dtype) for dtype in (torch.float32, torch.bfloat16)},
        _bandwidth(threads),
        caches(threads),
    )


def limit(phases: Iterable[Phase], shortest: float, gflops: float, machine: Roofline) -> Limit:
    """The limit that a call is bound by.

    Each phase takes at least as long as its arithmetic and at least as long as reading its data, if nothing of it
    stays in registers; the call takes at least the sum over its phases, and at least as long as the shortest one.

    Args:
        phases: of the call.
        shortest: seconds of the shortest call of the same kind in the run, 0 if that is not known.
        gflops: the rate of arithmetic.
        machine: the other rates.
    """
    arithmetic = 0.0
    reading: dict[str, float] = {}
    for phase in phases:
        compute = phase.flops / (gflops * 1e9)
        read = phase.bytes * phase.times / (machine.rate(phase.bytes) * 1e9)
        if compute >= read:
            arithmetic += compute
        else:
            level = machine.level(phase.bytes) or "reading"
            reading[level] = reading.get(level, 0.0) + read
    total = arithmetic + sum(reading.values())
    if shortest >= total:
        return Limit("call", shortest)
    if arithmetic >= total / 2:
        return Limit("compute", total)
    return Limit(max(reading, key=lambda level: reading[level]), total)


def caches(threads: int, root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of the data caches that `threads` threads on as many cores have, by level; empty where not known.

    A cache that several cores share counts once, however many of them there are.
    """
    found = {}
    for index in sorted(root.glob("index*")):
        level, kind, size, shared = (
            (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
        )
        if kind != "Instruction" and size.endswith("K"):
            own = level in ("1", "2") or not set(shared) & set(",-")
            found[f"L{level}"] = int(size[:-1]) * 1024 * (threads if own else 1)
    return found


def _product(dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator).to(dtype) for _ in range(2))
    with torch.no_grad():
        seconds = _best(lambda: torch.mm(a, b), 15)
    return 2 * SIZE**3 / seconds / 1e9


@functools.cache
def _sweep() -> Callable[[Any, int], float]:
    import numba

    @numba.njit("float32(float32[::1], int64)", fastmath=True, nogil=True)
    def sweep(x: Any, times: int) -> Any:
        total = np.float32(0)
        for _ in range(times):
            for i in range(x.size):
                total += x[i]
        return total

    compiled: Callable[[Any, int], float] = sweep
    return compiled


def _bandwidth(threads: int) -> list[tuple[int, float]]:
    sweep = _sweep()
    memory = np.ones(max(WORKING_SETS) // 4, np.float32)
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for size in WORKING_SETS:
            parts = np.array_split(memory[: size // 4], threads)
            times = max(1, SWEEP_BYTES // size)

            def read(parts: Sequence[Any] = parts, times: int = times) -> None:
                for future in [pool.submit(sweep, part, times) for part in parts]:
                    future.result()

            found.append((size, size * times / _best(read, 5) / 1e9))
    return found


def _best(call: Callable[[], object], tries: int) -> float:
    call()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
