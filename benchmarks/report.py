"""Turns a JSON file of the benchmarks into tables of ratios to torch, and a picture.

``python -m benchmarks.report report/bench.json [--markdown] [--png report/bench.png]``; with ``--page`` instead of
a file, the tables of docs/benchmarks.md are written anew from the runs that are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .cases import ENGINES, Phase
from .roofline import SIZE, Limit, Roofline, limit

ROOT = Path(__file__).resolve().parents[1]
#: In a page: the tables of a run that is kept, its name and which of `TABLES`.
REGION = re.compile(r"<!-- ([\w-]+): ([\w ]+) -->\n(.*?)<!-- end -->", re.DOTALL)
TABLES = ("cases", "groups", "engines", "reading", "rates")
ORDER = ("torch", "native", *ENGINES, "numba", "reference")
MODES = {"forward": "forward", "forward_backward": "forward+backward"}
COLORS = {
    "native": "#1f5fbf",
    "onnxruntime": "#2a9d4b",
    "openvino": "#8e44ad",
    "numba": "#e08214",
    "reference": "#999999",
}


SPARSE = ("attention ALiBi",)
"""Groups whose flops count keys that have no weight and may be left out."""


class Entry(NamedTuple):
    """One case, mode and provider.

    Attributes:
        seconds: median time of a call.
        ratio: torch's time over `seconds`, median and quartiles of the paired rounds; ``None`` without torch.
        error: largest error against float64 over torch's own.
        budget: the error over what the tests allow.
        native: of an engine, `seconds` over native's, median and quartiles of the paired rounds.
        dtype: ``"float32"`` and so on.
        phases: parts of the call.
        overhead: whether it is one step of one row.
        baseline: what torch does for the case and mode; ``""`` in files that do not say it.
    """

    case: str
    group: str
    mode: str
    provider: str
    seconds: float
    flops: int
    bytes: int
    ratio: tuple[float, float, float] | None
    error: float
    budget: float
    native: tuple[float, float, float] | None
    dtype: str
    phases: tuple[Phase, ...]
    overhead: bool
    baseline: str

    @property
    def kind(self) -> str:
        """Calls of one kind pass through the same code: layers, cells, or attention."""
        return self.group if self.group == "cells" else "attention" if self.group.startswith("attention") else "layers"


class Table(NamedTuple):
    """Text in rows.

    Attributes:
        title: a sentence above.
        columns: their names.
        rows: one text for each column.
        words: numbers of the columns that hold words and are aligned to the left.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int]


def entries(data: dict[str, Any]) -> list[Entry]:
    """The entries of a JSON of pytest-benchmark that these benchmarks wrote, those of a group together.

    Raises:
        ValueError: a benchmark in it is not one of these.
    """
    found = []
    for bench in data["benchmarks"]:
        info = bench["extra_info"]
        if "provider" not in info:
            raise ValueError(f"FILE: {bench['fullname']} is not a benchmark of seqkernels")
        ratio, native = info.get("ratio"), info.get("native")
        found.append(
            Entry(
                info["case"],
                info["group"],
                info["mode"],
                info["provider"],
                bench["stats"]["median"],
                info["flops"],
                info["bytes"],
                (ratio["median"], ratio["q1"], ratio["q3"]) if ratio else None,
                info["error_to_torch"],
                info["error_of_budget"],
                (native["median"], native["q1"], native["q3"]) if native else None,
                info["shape"]["dtype"],
                tuple(Phase(*phase) for phase in info["phases"]),
                "overhead" in info["tags"],
                info.get("baseline", ""),
            )
        )
    groups = _unique(entry.group for entry in found)
    return sorted(found, key=lambda entry: groups.index(entry.group))


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive values."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def summary(found: Sequence[Entry], machine: Roofline | None) -> Table:
    """Geometric mean and worst ratio of each group, mode and provider; the mean if every call ran at its limit."""
    rows = []
    bounds = {} if machine is None else limits(found, machine)

    def at_limit(entry: Entry) -> float:
        return _median(entry) * entry.seconds / bounds[entry.case, entry.mode, entry.provider].seconds

    for group in _unique(entry.group for entry in found):
        for mode, words in MODES.items():
            for provider in ORDER[1:]:
                chosen = [
                    entry
                    for entry in found
                    if (entry.group, entry.mode, entry.provider) == (group, mode, provider) and entry.ratio
                ]
                if chosen:
                    worst = min(chosen, key=_median)
                    mean = geometric_mean(_median(entry) for entry in chosen)
                    best = f"{geometric_mean(map(at_limit, chosen)):.2f}" if bounds else "-"
                    numbers = (f"{mean:.2f}", f"{_median(worst):.2f}", best, str(len(chosen)))
                    rows.append((group, words, provider, *numbers, worst.case))
    columns = ("group", "mode", "provider", "geomean", "worst", "at the limits", "cases", "worst case")
    return Table("Speed over torch by group: torch's time over the provider's", columns, rows, frozenset({0, 1, 2, 7}))


def beside_engines(found: Sequence[Entry]) -> Table | None:
    """Native over each engine by cell, and over the faster one in each case; ``None`` without both."""
    measured = {(e.case, e.provider): e.native[0] for e in found if e.native}
    groups = {e.case: e.group for e in found if e.native}
    names = [name for name in ENGINES if any(provider == name for _, provider in measured)]
    rows = []
    for group in (*_unique(groups.values()), "all"):
        chosen = [case for case in groups if group in (groups[case], "all")]
        over = {name: {case: measured[case, name] for case in chosen if (case, name) in measured} for name in names}
        if len(names) > 1:
            over["the faster one"] = {
                case: min(ratios[case] for ratios in over.values() if case in ratios) for case in chosen
            }
        for name, ratios in over.items():
            if ratios:
                worst = min(ratios, key=lambda case: ratios[case])
                numbers = (f"{geometric_mean(ratios.values()):.2f}", f"{ratios[worst]:.2f}", str(len(ratios)))
                rows.append((group, name, *numbers, worst))
    columns = ("group", "engine", "geomean", "worst", "cases", "worst case")
    title = "native beside inference engines: the engine's time over native's, forward"
    return Table(title, columns, rows, frozenset({0, 1, 5})) if rows else None


def rates(found: Sequence[Entry], machine: Roofline) -> Table:
    """What the machine was measured to do, and the most that a case reached of it."""
    rows = []
    for dtype in _unique((*machine.gflops, *(e.dtype for e in found))):
        best = max((e for e in found if e.dtype == dtype and e.group not in SPARSE), key=_gflops, default=None)
        reached = ("-", "-") if best is None else (f"{_gflops(best):.0f} GFLOP/s", f"{best.provider} on {best.case}")
        name = dtype if dtype in machine.gflops else f"float32 for {dtype}"
        gflops = machine.gflops.get(dtype, machine.gflops["float32"])
        rows.append((f"torch.mm, {SIZE} x {SIZE}, {name}", f"{gflops:.0f} GFLOP/s", *reached))
    for size, gigabytes in machine.bandwidth:
        amount = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        where = machine.level(size)
        rows.append((f"reading {amount}" + (f" ({where})" if where else ""), f"{gigabytes:.0f} GB/s", "-", "-"))
    columns = ("limit", "measured", "largest rate reached", "by")
    return Table("What the machine can do, measured in the same run", columns, rows, frozenset({0, 3}))


def reading(found: Sequence[Entry], machine: Roofline) -> Table | None:
    """The bandwidth that one query reaches; ``None`` where no case has one query and many keys.

    Cases are called over and over, so that a cache may hold keys and values; the last column says how fast that is.
    """
    memory = machine.bandwidth[-1][1]
    rows = []
    for entry in found:
        if entry.group in ("attention decode", "attention cache"):
            rate = entry.bytes / entry.seconds / 1e9
            where = machine.level(entry.bytes)
            share = f"{rate / machine.rate(entry.bytes):.0%}" + (f" ({where})" if where else "")
            size = f"{entry.bytes / (1 << 20):.0f}"
            rows.append((entry.case, entry.provider, size, f"{rate:.1f}", f"{rate / memory:.0%}", share))
    columns = ("case", "provider", "MiB", "GB/s", "of memory", "of reading as many bytes over and over")
    title = f"One query: keys and values read, beside the {memory:.0f} GB/s of reading memory"
    return Table(title, columns, rows, frozenset({0, 1})) if rows else None


def limits(found: Sequence[Entry], machine: Roofline) -> dict[tuple[str, str, str], Limit]:
    """What bounds each entry: by case, mode and provider.

    The arithmetic counts at the rate of ``torch.mm`` (of 16 bits at least at that of float32), or at the largest rate
    that any case of the dtype reached if that is more, those aside that may leave out some of it;
    the call itself as the shortest one of one step and row, if there is one of that kind in the run.
    """
    peak = {
        dtype: max(machine.peak(dtype), *(_gflops(e) for e in found if e.dtype == dtype and e.group not in SPARSE))
        for dtype in _unique(entry.dtype for entry in found)
    }
    shortest: dict[tuple[str, str, str], float] = {}
    for entry in filter(lambda entry: entry.overhead, found):
        key = (entry.kind, entry.mode, entry.provider)
        shortest[key] = min(entry.seconds, shortest.get(key, math.inf))
    bounds = {}
    for entry in found:
        least = shortest.get((entry.kind, entry.mode, entry.provider), 0.0)
        bounds[entry.case, entry.mode, entry.provider] = limit(entry.phases, least, peak[entry.dtype], machine)
    return bounds


def per_case(found: Sequence[Entry], machine: Roofline | None) -> Table:
    """Times and ratios of each case and mode; rates, limits and errors of the preferred provider."""
    present = [name for name in ORDER[1:] if any(entry.provider == name for entry in found)]
    lead = present[0] if present else "torch"
    bounds = {} if machine is None else limits(found, machine)
    rows = []
    for case, mode in _unique((entry.case, entry.mode) for entry in found):
        by = {entry.provider: entry for entry in found if (entry.case, entry.mode) == (case, mode)}
        row = [case, MODES[mode], f"{by['torch'].seconds * 1e3:.4g}" if "torch" in by else "-"]
        for name in present:
            ratio = by[name].ratio if name in by else None
            row.append("{:.2f} ({:.2f}-{:.2f})".format(*ratio) if ratio else "-")
        first = by.get(lead)
        if first is None:
            row += ["-"] * 4
        else:
            row += [f"{_gflops(first):.1f}", f"{first.bytes / first.seconds / 1e9:.2f}"]
            bound = bounds.get((case, mode, lead))
            row.append(f"{bound.name} {bound.seconds / first.seconds:.0%}" if bound else "-")
            row.append(f"{first.error:.2f}")
        rows.append(row)
    columns = ("case", "mode", "torch ms", *present, f"{lead} GFLOP/s", "GB/s", "limit", "error/torch's")
    return Table("Each case: torch's time, speed over torch (quartiles)", columns, rows, frozenset({0, 1}))


def machine(data: dict[str, Any]) -> str:
    """One line: where and with what the numbers were measured."""
    info = data["machine_info"]
    cpu = info.get("cpu", {}).get("brand_raw", info.get("machine", "unknown processor"))
    isa = info.get("isa") or "no compiled module"
    threads = f"{info['threads']} thread" + ("s" if info["threads"] > 1 else "")
    engines = "".join(f", {name} {version}" for name, version in info["engines"].items())
    return (
        f"{cpu}, {threads}, {isa}; torch {info['torch']}, seqkernels {info['seqkernels']}{engines},"
        f" Python {info['python_version']}; {data['datetime'][:10]}"
    )


def remarks(data: dict[str, Any], found: Sequence[Entry]) -> list[str]:
    """What a reader of the tables should know besides.

    How torch does what has no function of its own, who could not run, and whose error is over the budget.
    """
    ways: dict[tuple[str, str], list[str]] = {}
    for entry in found:
        if entry.provider == "torch" and " " in entry.baseline:
            of_mode = ways.setdefault((entry.group, entry.baseline), [])
            of_mode += [MODES[entry.mode]] * (MODES[entry.mode] not in of_mode)
    lines = [f"torch on {group}, {' and '.join(modes)}: {way}" for (group, way), modes in ways.items()]
    count: Counter[tuple[str, str]] = Counter()
    for entry in data["unavailable"]:
        # "backend 'name' cannot run <call>: <reason>"
        count[entry["provider"], entry["reason"].partition(": ")[2]] += 1
    lines += [f"{provider} not timed {times} times: {reason}" for (provider, reason), times in count.items()]
    for entry in found:
        if entry.budget > 1:
            lines.append(
                f"{entry.provider} on {entry.case} {MODES[entry.mode]}: error {entry.error:.2f} times torch's own,"
                f" {entry.budget:.2f} of what the tests allow"
            )
    return lines


def render(table: Table, markdown: bool) -> str:
    """`table` as text for a terminal, or as Markdown."""
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]

    def line(cells: Sequence[str], separator: str) -> str:
        padded = [
            cell.ljust(width) if index in table.words else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return separator.join(padded).rstrip()

    if markdown:
        rule = [("-" if index in table.words else "-:").rjust(width, "-") for index, width in enumerate(widths)]
        body = [f"| {line(cells, ' | ')} |" for cells in (table.columns, rule, *table.rows)]
        return "\n".join((f"**{table.title}**", "", *body))
    rule = ["-" * width for width in widths]
    return "\n".join((table.title, "", *(line(cells, "  ") for cells in (table.columns, rule, *table.rows))))


def plot(found: Sequence[Entry], title: str, path: Path) -> None:
    """Write a picture of the ratio of each case: a dot at the median, a bar from quartile to quartile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    labels: list[tuple[str, str]] = []
    for group in _unique(entry.group for entry in found):
        labels.append((group, ""))
        labels += [(group, case) for case in _unique(entry.case for entry in found if entry.group == group)]
    modes = [mode for mode in MODES if any(entry.mode == mode for entry in found)]
    height = 1.6 + 0.19 * len(labels)
    figure, axes = plt.subplots(
        1, len(modes), figsize=(5.2 + 4 * len(modes), height), sharey=True, sharex=True, squeeze=False
    )
    position = {label: -index for index, label in enumerate(labels)}
    for axis, mode in zip(axes[0], modes, strict=True):
        for provider in reversed(ORDER[1:]):
            chosen = [e for e in found if (e.mode, e.provider) == (mode, provider) and e.ratio]
            if not chosen:
                continue
            middle, low, high = zip(*(e.ratio for e in chosen if e.ratio), strict=True)
            spread = [
                [m - q for m, q in zip(middle, low, strict=True)],
                [q - m for m, q in zip(middle, high, strict=True)],
            ]
            where = [position[e.group, e.case] for e in chosen]
            axis.errorbar(
                middle, where, xerr=spread, fmt="o", ms=4.5, lw=1, color=COLORS[provider], label=provider, zorder=3
            )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.axvline(1, color="black", lw=1)
        axis.grid(axis="x", color="#dddddd", lw=0.7)
        for label, y in position.items():
            if not label[1]:
                axis.axhspan(y - 0.5, y + 0.5, color="#eeeeee", zorder=0)
        axis.set_title(MODES[mode], fontsize=10, loc="left")
        axis.tick_params(axis="y", left=False)
        axis.set_xlabel("speed over torch (right is faster)", fontsize=9)
    first = axes[0][0]
    first.set_yticks([position[label] for label in labels])
    first.set_yticklabels([case or group for group, case in labels], fontsize=7)
    for tick, (_, case) in zip(first.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("normal" if case else "bold")
    first.set_ylim(-len(labels) + 0.3, 0.7)
    handles = {text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    shown = [name for name in ORDER if name in handles]
    if shown:
        axes[0][-1].legend(
            [handles[name] for name in shown],
            shown,
            fontsize=8,
            ncols=len(shown),
            loc="lower right",
            bbox_to_anchor=(1, 1),
        )
    figure.suptitle(title, fontsize=9, y=1 - 0.15 / height)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.2 / height))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def condensed(data: dict[str, Any]) -> str:
    """JSON of the same run to be kept beside documentation: no times of single rounds, no name of the machine."""
    wanted = {"group", "name", "fullname", "extra_info", "stats"}
    stats = {"median", "q1", "q3", "rounds"}
    lines = []
    for bench in data["benchmarks"]:
        kept = {key: bench[key] for key in bench if key in wanted}
        kept["stats"] = {key: value for key, value in kept["stats"].items() if key in stats}
        lines.append(json.dumps(kept))
    rest = {key: value for key, value in data.items() if key not in ("benchmarks", "commit_info")}
    rest["machine_info"] = {key: value for key, value in data["machine_info"].items() if key != "node"}
    return json.dumps(rest)[:-1] + ', "benchmarks": [\n' + ",\n".join(lines) + "\n]}\n"


def text(data: dict[str, Any], wanted: Sequence[str] = TABLES, markdown: bool = True) -> str:
    """Tables of a run, where it was, and what there is to remark.

    Args:
        data: as pytest-benchmark writes it.
        wanted: of `TABLES`.
        markdown: tables in Markdown.
    """
    found = entries(data)
    measured = Roofline.from_json(data["roofline"]) if data.get("roofline") else None
    tables = {
        "cases": lambda: per_case(found, measured),
        "groups": lambda: summary(found, measured),
        "engines": lambda: beside_engines(found),
        "reading": lambda: measured and reading(found, measured),
        "rates": lambda: measured and rates(found, measured),
    }
    made = [tables[name]() for name in wanted]
    lines = [f"- {line}" if markdown else line for line in remarks(data, found)]
    parts = [*(render(table, markdown) for table in made if table is not None), machine(data)]
    return "\n\n".join([*parts, "\n".join(lines)] if lines else parts)


def updated(page: str, folder: Path) -> str:
    """A page with the tables of each `REGION` made anew from the runs in `folder`."""

    def made(match: re.Match[str]) -> str:
        name, wanted = match[1], match[2].split()
        data = json.loads((folder / f"{name}.json").read_text())
        return f"<!-- {name}: {match[2]} -->\n\n{text(data, wanted)}\n\n<!-- end -->"

    return REGION.sub(made, page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of a JSON file and, where asked, write the picture."""
    parser = argparse.ArgumentParser(description="Tables and a picture of a JSON file of the benchmarks.")
    parser.add_argument("file", type=Path, nargs="?", help="JSON written by benchmarks/run.py")
    parser.add_argument("--png", type=Path, help="write the picture here")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--keep", type=Path, help="write the file here without the times of single rounds")
    parser.add_argument("--page", action="store_true", help="write the tables of docs/benchmarks.md anew instead")
    options = parser.parse_args(arguments)
    if options.page == (options.file is not None):
        parser.error("expected a file, or --page")
    if options.page:
        page = ROOT / "docs" / "benchmarks.md"
        page.write_text(updated(page.read_text(), ROOT / "benchmarks" / "results"))
        return 0
    data = json.loads(options.file.read_text())
    found = entries(data)
    if not found:
        parser.error(f"{options.file}: no benchmark in it")
    print(text(data, markdown=options.markdown))
    if options.keep is not None:
        options.keep.write_text(condensed(data))
    if options.png is not None:
        plot(found, machine(data), options.png)
    return 0


def _gflops(entry: Entry) -> float:
    return entry.flops / entry.seconds / 1e9


def _median(entry: Entry) -> float:
    assert entry.ratio is not None
    return entry.ratio[0]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    sys.exit(main())
