"""Times several callables in turns, so that their ratios hold on a machine whose speed changes while they run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from math import ceil
from typing import NamedTuple

from .workloads import Workload


class Plan(NamedTuple):
    """How long to measure.

    Attributes:
        round_seconds: a round repeats a call until it lasts about this long.
        budget_seconds: time for all rounds of one callable.
        min_rounds, max_rounds: bounds of the number of rounds; the lower one goes before the budget.
        pause_seconds: rest before each turn, in which the threads of the others stop waiting busily for work. After a
            rest a call that is shorter is made once before it is timed.
    """

    round_seconds: float = 0.5e-3
    budget_seconds: float = 0.3
    min_rounds: int = 5
    max_rounds: int = 200
    pause_seconds: float = 0.0

    def with_pauses(self) -> Plan:
        """This plan for callables that have threads of their own, with rests and fewer rounds.

        The threads of OpenMP wait for up to 8 ms for the next parallel region, on the cores that the next callable
        needs, unless both use the same OpenMP.
        """
        return self._replace(max_rounds=min(self.max_rounds, 60), pause_seconds=0.01)


FULL = Plan()
QUICK = Plan(budget_seconds=0.2, max_rounds=40)


class Samples(NamedTuple):
    """What was measured of one callable.

    Attributes:
        calls: calls per round.
        seconds: of one call, by number of the round.
    """

    calls: int
    seconds: dict[int, float]


class Clock:
    """A clock that moves only when a replayed sample says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        """Seconds."""
        return self.now

    def replay(self, seconds: Iterator[float]) -> None:
        """Advance by the next sample."""
        self.now += next(seconds)


clock = Clock()
"""The clock of the replaying benchmarks."""


class Ratio(NamedTuple):
    """Baseline time over own time, round by round: median and quartiles."""

    median: float
    q1: float
    q3: float


def interleave(
    workloads: Mapping[str, Workload], plan: Plan, timer: Callable[[], float] = time.perf_counter
) -> dict[str, Samples]:
    """Time `workloads` in turns; the one that begins changes from round to round.

    The first callable is the baseline and takes part in every round; another one that is too slow for as many rounds
    sits out some, evenly spread.

    Args:
        workloads: callables by name, each called at least once before (caches filled, code compiled).
        plan: how long to measure.
        timer: a clock in seconds.

    Returns:
        Samples by name.
    """
    calls, rounds, warm = {}, {}, {}
    for name, workload in workloads.items():
        with workload.context():
            seconds = _time(workload.run, 1, timer)
            if seconds < plan.budget_seconds:
                seconds = min(seconds, _time(workload.run, 1, timer))
        calls[name] = max(1, ceil(plan.round_seconds / max(seconds, 1e-9)))
        # A short call is made once before: the last callable's data leaves the caches, and its threads stop spinning.
        warm[name] = calls[name] > 1 or seconds < plan.pause_seconds
        fitting = int(plan.budget_seconds / max(seconds * calls[name], 1e-9))
        rounds[name] = min(max(fitting, plan.min_rounds), plan.max_rounds)
    names = list(workloads)
    total = rounds[names[0]]
    samples = {name: Samples(calls[name], {}) for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(total):
            for name in names[index % len(names) :] + names[: index % len(names)]:
                share = min(rounds[name], total)
                if (index + 1) * share // total > index * share // total:
                    if plan.pause_seconds:
                        time.sleep(plan.pause_seconds)
                    with workloads[name].context():
                        if warm[name]:
                            workloads[name].run()
                        seconds = _time(workloads[name].run, calls[name], timer)
                    samples[name].seconds[index] = seconds / calls[name]
    finally:
        if collecting:
            gc.enable()
    return samples


def ratio(baseline: Samples, own: Samples) -> Ratio:
    """The ratio of the times of `baseline` and `own` over the rounds in which both took part, at least the last."""
    both = baseline.seconds.keys() & own.seconds.keys()
    found = [baseline.seconds[index] / own.seconds[index] for index in both]
    if len(found) == 1:
        return Ratio(found[0], found[0], found[0])
    q1, median, q3 = statistics.quantiles(found, n=4, method="inclusive")
    return Ratio(median, q1, q3)


def _time(run: Callable[[], object], calls: int, timer: Callable[[], float]) -> float:
    start = timer()
    for _ in range(calls):
        run()
    return timer() - start
