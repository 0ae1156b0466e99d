"""What a run of ``python -m benchmarks.gpu`` found, and what persistent recurrences have to reach beside cuDNN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from .cases import Case, Mode, Recurrence
from .report import Table, geometric_mean


class Row(NamedTuple):
    """One line of the result: median milliseconds of a call, launched one by one and in a CUDA graph."""

    case: str
    group: str
    mode: str
    provider: str
    ms: float
    graph_ms: float | None
    tflops: float
    gbytes: float
    difference: float | None
    note: str


class Bar(NamedTuple):
    """How many times as fast as `nn.LSTM`, `nn.GRU` and `nn.RNN` calls have to be.

    Attributes:
        name: of the group.
        holds: whether a case is of the group.
        mean: the least geometric mean.
        worst: the least of a case.
    """

    name: str
    holds: Callable[[Recurrence], bool]
    mean: float
    worst: float


_HALVES = (torch.float16, torch.bfloat16)


def _plain(case: Recurrence) -> bool:
    return case.layers == 1 and not case.bidirectional


def _of_cudnn(case: Recurrence) -> bool:
    """Whether cuDNN has its persistent algorithm for it, by ATen's rule."""
    return (
        case.cell == "lstm"
        and case.dtype == torch.float16
        and _plain(case)
        and case.hidden % 128 == case.inputs % 128 == case.batch % 8 == 0
        and case.hidden <= 1024
        and case.batch <= 128
    )


BARS = (
    Bar(
        "bfloat16 LSTM, H 128 to 1024, B 1 to 64",
        lambda c: (
            _plain(c) and c.cell == "lstm" and c.dtype == torch.bfloat16 and c.hidden % 128 == 0 and c.batch <= 64
        ),
        3.0,
        1.2,
    ),
    Bar(
        "16-bit GRU, H 256 to 1024",
        lambda c: _plain(c) and c.cell == "gru" and c.dtype in _HALVES and 256 <= c.hidden <= 1024,
        3.0,
        0.0,
    ),
    Bar("two layers, one direction", lambda c: c.layers == 2 and not c.bidirectional, 3.0, 0.0),
    Bar("two directions", lambda c: c.bidirectional, 3.0, 0.0),
    Bar("128 < H <= 192, B 40 and more", lambda c: _plain(c) and 128 < c.hidden <= 192 and c.batch >= 40, 5.0, 0.0),
    Bar("where cuDNN is persistent: float16 LSTM", _of_cudnn, 1.0, 0.0),
    Bar("float32, exact", lambda c: _plain(c) and c.dtype == torch.float32, 1.5, 0.0),
    Bar("H up to 72", lambda c: _plain(c) and c.hidden <= 72, 0.95, 0.0),
)


def bars(rows: Iterable[Row], cases: Sequence[Case], ours: str, theirs: str) -> Table:
    """A line for each bar and mode: the geometric mean, the worst case, and whether both are reached.

    Args:
        rows: of a run.
        cases: that were asked for.
        ours: the provider that has to be faster.
        theirs: than this one.
    """
    found = {(row.case, row.mode, row.provider): row for row in rows if not row.note}
    lines = []
    for bar in BARS:
        of_group = [case for case in cases if isinstance(case, Recurrence) and bar.holds(case)]
        modes: tuple[Mode, ...] = ("forward", "forward_backward")
        for mode in modes:
            pairs = [
                (case.name, found.get((case.name, mode, ours)), found.get((case.name, mode, theirs)))
                for case in of_group
            ]
            ratios = {name: his.ms / mine.ms for name, mine, his in pairs if mine is not None and his is not None}
            graphs = [
                his.graph_ms / mine.graph_ms
                for _, mine, his in pairs
                if mine is not None and his is not None and mine.graph_ms and his.graph_ms
            ]
            asked = f"{bar.mean:g}" + (f", worst {bar.worst:g}" if bar.worst else "")
            words = mode.replace("_", "+")
            if not ratios:
                lines.append((bar.name, words, asked, "-", "-", "-", f"0 of {len(of_group)}", "not measured", "-"))
                continue
            mean, worst = geometric_mean(ratios.values()), min(ratios, key=lambda name: ratios[name])
            reached = mean >= bar.mean and ratios[worst] >= bar.worst
            in_graphs = f"{geometric_mean(graphs):.2f}" if graphs else "-"
            numbers = (f"{mean:.2f}", f"{ratios[worst]:.2f}", in_graphs, f"{len(ratios)} of {len(of_group)}")
            lines.append((bar.name, words, asked, *numbers, "yes" if reached else "no", worst))
    columns = ("group", "mode", "asked", "geomean", "worst", "in a CUDA graph", "cases", "reached", "worst case")
    title = f"{theirs}'s time over that of {ours}"
    return Table(title, columns, lines, frozenset({0, 1, 2, 7, 8}))
