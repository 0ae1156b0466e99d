"""Threads for kernels that release the GIL: Python threads, so that torch's OpenMP runtime stays the only one."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

#: Floating-point operations that are worth waking one more thread (some ten microseconds of work).
WORK_PER_THREAD = 2_000_000

_pools: dict[int, ThreadPoolExecutor] = {}


def team_size(units: int, work: float) -> int:
    """How many threads to use.

    Args:
        units: independent pieces of work.
        work: floating-point operations of all pieces together.

    Returns:
        At least 1, at most `units` and ``torch.get_num_threads()``, and fewer for little work.
    """
    return max(1, min(torch.get_num_threads(), units, int(work / WORK_PER_THREAD)))


def run(task: Callable[[int, int, int], None], units: int, threads: int, multiple: int = 1) -> None:
    """Call ``task(begin, end, thread)`` for ranges that cover ``0..units``, one per thread, and wait for all.

    Args:
        task: the caller's thread takes the first range.
        units: independent pieces of work.
        threads: from `team_size`.
        multiple: ranges begin at multiples of this number.
    """
    blocks = -(-units // multiple)
    bounds = [min(units, blocks * i // threads * multiple) for i in range(threads + 1)]
    waiting = [
        _pool(threads - 1).submit(task, bounds[i], bounds[i + 1], i)
        for i in range(1, threads)
        if bounds[i] < bounds[i + 1]
    ]
    try:
        task(bounds[0], bounds[1], 0)
    finally:
        errors = [future.exception() for future in waiting]
    for error in errors:
        if error is not None:
            raise error


def _pool(threads: int) -> ThreadPoolExecutor:
    pool = _pools.get(threads)
    if pool is None:
        pool = _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="seqkernels")
    return pool


# A forked child has none of the threads of its parent, only the pools that believe in them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)
