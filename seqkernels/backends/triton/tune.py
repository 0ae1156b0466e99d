"""Tiles measured on the device at hand: ``python -m seqkernels tune``.

For each row of the tables of tiles a call is run with the shipped tile and with others near it, by turns; from the best
one on the search goes on, until nothing near is better. Every tile is checked against the results of the shipped one
before it counts.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.errors import TritonError

from . import tiles, tune_cases
from .tiles import Tile
from .tune_cases import Case, Prepared, Run

#: A tile counts as faster from this ratio of times on.
GAIN = 1.03

#: Rounds in which tiles take turns, and those in which the best one and the shipped one do at the end.
ROUNDS, LAST_ROUNDS = 7, 15

#: Errors of a number, of float32 and of less, that tiles may differ by, of the size of a row and of a typical one.
_TIMES = {torch.finfo(torch.float32).eps: 64}
_FEW_TIMES = 8

#: Measures a call: its time, in any unit.
Clock = Callable[[Run], float]


class Found(NamedTuple):
    """What was measured of a row.

    Attributes:
        row: its name.
        shipped: the tile that is shipped.
        best: the fastest one, which is the shipped one where no other gains `GAIN`.
        gain: time of the shipped one by that of the best.
        tried: tiles that were measured beside the shipped one.
        passed_over: tiles that do not compile or run, in the call that is measured or, where that was fast, in others,
            and why.
        wrong: tiles with other results.
        skipped: why nothing was measured, or empty.
    """

    row: str
    shipped: Tile
    best: Tile
    gain: float = 1.0
    tried: int = 0
    passed_over: tuple[tuple[Tile, str], ...] = ()
    wrong: tuple[Tile, ...] = ()
    skipped: str = ""


def device_clock(run: Run) -> float:
    """Milliseconds of a call by events of the current device, over as many calls as take a few of them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls = 1
    while True:
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        took: float = begin.elapsed_time(end)
        if took >= 4.0 or calls >= 64:
            return took / calls
        calls = min(64, calls * 4)


def differs(found: Sequence[Tensor], expected: Sequence[Tensor], eps: float) -> bool:
    """Whether results are not those of another tile, more than the order of sums in a dtype explains.

    Args:
        found, expected: the results.
        eps: of the numbers that were multiplied.
    """
    for x, y in zip(found, expected, strict=True):
        mine, theirs = x.float(), y.float()
        finite = theirs.isfinite()
        if not torch.equal(finite, mine.isfinite()) or not torch.equal(mine[~finite], theirs[~finite]):
            return True
        mine, theirs = mine.where(finite, 0.0), theirs.where(finite, 0.0)
        sizes = theirs.norm(dim=-1)
        allowed = _TIMES.get(eps, _FEW_TIMES) * eps * (sizes + sizes.square().mean().sqrt())
        if bool(((mine - theirs).norm(dim=-1) > allowed).any()):
            return True
    return False


class _Search:
    """The search for the tile of a row."""

    def __init__(self, case: Case, device: torch.device, clock: Clock):
        self.case, self.device, self.clock = case, device, clock
        self.shipped = case.shipped(device)
        self.passed_over: list[tuple[Tile, str]] = []
        self.wrong: list[Tile] = []
        self.known: set[Tile] = {self.shipped}
        with self._trying(self.shipped):
            self.prepared: Prepared = case.prepare(device)
            self.expected = {run: self._results(run) for run in self.prepared}

    def _trying(self, tile: Tile) -> contextlib.AbstractContextManager[None]:
        return tiles.trying(self.device, self.case.row, None if tile == self.shipped else tile)

    def _results(self, run: Run) -> list[Tensor]:
        found = [x.clone() for x in run()]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return found

    def _is_right(self, tile: Tile, run: Run) -> bool:
        """Whether a tile has the results of the shipped one in some calls; where not, it is noted why."""
        try:
            with self._trying(tile):
                found = self._results(run)
        except (TritonError, RuntimeError) as error:
            # RuntimeError is what Triton's passes and launches raise. A device that is lost fails the next call too.
            self.passed_over.append((tile, (str(error).splitlines() or [type(error).__name__])[0]))
            return False
        if differs(found, self.expected[run], self.case.eps):
            self.wrong.append(tile)
            return False
        return True

    def _race(self, runners: Sequence[Tile], rounds: int) -> dict[Tile, float]:
        """The median time of each tile over rounds in which they take turns."""
        times: dict[Tile, list[float]] = {tile: [] for tile in runners}
        for turn in range(rounds):
            for tile in runners if turn % 2 == 0 else reversed(runners):
                with self._trying(tile):
                    times[tile].append(self.clock(self.prepared.timed))
        return {tile: statistics.median(taken) for tile, taken in times.items()}

    def run(self, own: Tile | None) -> Found:
        best, tried = self.shipped, 0
        while True:
            wanted = [*self.case.near(best), *([own] if own is not None else [])]
            fresh = [tile for tile in dict.fromkeys(wanted) if tile not in self.known]
            self.known.update(fresh)
            right = [tile for tile in fresh if self._is_right(tile, self.prepared.timed)]
            tried += len(right)
            times = self._race([best, *right], ROUNDS) if right else {}
            faster = sorted((tile for tile in right if times[tile] < times[best]), key=times.__getitem__)
            # The calls with other options are other programs, which are compiled for tiles that may be taken alone.
            winner = next((tile for tile in faster if self._is_right(tile, self.prepared.checked)), None)
            if winner is None:
                break
            best = winner
        gain = 1.0
        if best != self.shipped:
            # Once more, since the fastest of many was lucky too.
            times = self._race([self.shipped, best], LAST_ROUNDS)
            gain = times[self.shipped] / times[best]
            if gain < GAIN:
                best, gain = self.shipped, 1.0
        return Found(self.case.row, self.shipped, best, gain, tried, tuple(self.passed_over), tuple(self.wrong))


def tune_case(case: Case, device: torch.device, clock: Clock = device_clock, own: Tile | None = None) -> Found:
    """The fastest tile of a row.

    Args:
        case: the row.
        device: with an index, or the CPU for Triton's interpreter.
        clock: measures a call.
        own: a tile to try first, beside those near the shipped one.
    """
    try:
        search = _Search(case, device, clock)
    except triton.OutOfResources as error:
        shipped = case.shipped(device)
        return Found(case.row, shipped, shipped, skipped=str(error))
    return search.run(own)


def tune(
    cases: Iterable[Case],
    device: torch.device,
    *,
    clock: Clock = device_clock,
    minutes: float | None = None,
    now: Callable[[], float] = time.monotonic,
) -> list[Found]:
    """Measures rows, and keeps the tiles that are faster than the shipped ones in the file of the device.

    A row that is measured again is replaced, or goes where nothing is faster; the others stay. What was found is
    written after each row, and taken by later calls of this process too.

    Args:
        cases: the rows.
        device: with an index, or the CPU for Triton's interpreter.
        clock: measures a call.
        minutes: no row is begun after so many; ``None`` for all of them.
        now: seconds of a clock.

    Returns:
        What was found of each row that was measured.
    """
    name = tiles.device_name(device)
    path = tiles.path_of(name)
    cases, found, begin = list(cases), [], now()
    with tqdm(cases, unit="row", disable=None) as bar:
        for case in bar:
            if minutes is not None and now() - begin > 60 * minutes:
                break
            bar.set_postfix_str(case.row)
            rows = tiles.read(path)
            result = tune_case(case, device, clock, rows.get(case.row))
            found.append(result)
            kept = {row: tile for row, tile in rows.items() if row != result.row or result.skipped}
            if result.best != result.shipped:
                kept[result.row] = result.best
            if kept != rows:
                tiles.write(path, name, kept)
                tiles.forget()
    return found


def _tile(tile: Tile) -> str:
    return "x".join(map(str, tile))


def render(found: Sequence[Found]) -> str:
    """A table of what was found."""
    head = f"{'kernel':44}{'shipped':>16}{'best':>16}{'gain':>8}{'tried':>7}{'passed over':>13}"
    lines = [head]
    for x in found:
        end = f"  {x.skipped}" if x.skipped else ""
        gain = f"{x.gain:.2f}" if x.best != x.shipped else "-"
        best = _tile(x.best) if x.best != x.shipped else "-"
        lines.append(f"{x.row:44}{_tile(x.shipped):>16}{best:>16}{gain:>8}{x.tried:>7}{len(x.passed_over):>13}{end}")
    return "\n".join(lines)


def main(device: str | None, only: str, minutes: float | None) -> tuple[str, list[str]]:
    """``python -m seqkernels tune``.

    Args:
        device: name of a CUDA device; ``None`` for the current one.
        only: rows whose names have this in them.
        minutes: no row is begun after so many; ``None`` for all of them.

    Returns:
        The table, and what else is to be said: wrong tiles, rows that were not measured, the file.

    Raises:
        ValueError: there is no CUDA device, or none with that name; Triton's interpreter is on; no row has that name;
            `minutes` is not positive.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("Triton's interpreter is on (TRITON_INTERPRET), which has no times to measure")
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device to measure on")
    try:
        chosen = torch.device("cuda" if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"device: expected a CUDA device, got {device!r}") from error
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    if chosen.type != "cuda" or index >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {device!r}")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes: expected a positive number, got {minutes}")
    wanted = [case for case in tune_cases.cases() if only in case.row]
    if not wanted:
        raise ValueError(f"no row has {only!r} in its name")
    chosen = torch.device("cuda", index)
    with torch.cuda.device(chosen):
        found = tune(wanted, chosen, minutes=minutes)
    said = [f"{x.row}: tile {_tile(tile)} has other results than the shipped one" for x in found for tile in x.wrong]
    if len(found) < len(wanted):
        said.append(f"{len(wanted) - len(found)} of {len(wanted)} rows were not measured in {minutes:g} minutes")
    path = tiles.path_of(tiles.device_name(chosen))
    said.append(f"rows in {path}: {len(tiles.read(path))}")
    return render(found), said
