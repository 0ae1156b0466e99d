"""Threads for kernels that release the GIL: Python threads, so that torch's OpenMP runtime stays the only one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

#: Floating-point operations that are worth waking one more thread: some hundred microseconds of work.
WORK_PER_THREAD = 8_000_000

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


def run(task: Callable[[int, int, int], None], units: int, threads: int, chunks: int, multiple: int = 1) -> None:
    """Call ``task(begin, end, chunk)`` for ranges that cover ``0..units`` and wait for all.

    Threads take the next range when they are free, the caller's among them: after a parallel region of torch the
    other cores are busy spinning for some milliseconds, and the caller does not wait for what nobody has begun.

    Args:
        task: called from several threads, with the number of the range last.
        units: independent pieces of work.
        threads: from `team_size`.
        chunks: how many ranges.
        multiple: ranges begin at multiples of this number.
    """
    blocks = -(-units // multiple)
    bounds = [min(units, blocks * i // chunks * multiple) for i in range(chunks + 1)]
    pending = deque((bounds[i], bounds[i + 1], i) for i in range(chunks) if bounds[i] < bounds[i + 1])

    def work() -> None:
        while True:
            try:
                chunk = pending.popleft()
            except IndexError:
                return
            task(*chunk)

    helpers = [_pool(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        pending.clear()
        begun = [helper for helper in helpers if not helper.cancel()]
        errors = [helper.exception() for helper in begun]
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
