"""``make gpu-bench``: the backends on a GPU beside their peers, ``python -m benchmarks.gpu [--only GROUP] [-k WORD]``.

Of each case all providers are timed in turns, round by round, with device events around some calls; each call uses the
next of several sets of inputs, together larger than the last cache. A second figure is that of the same calls in a CUDA
graph, which shows what the launches cost. Results of 16 bits are compared with those of the first provider.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import seqkernels
from seqkernels import backends

from . import report
from .cases import Attention, Case, Mode
from .gpu_bars import Row, bars
from .gpu_cases import GROUPS
from .gpu_providers import CUDA, OURS, PACKAGES, Provider, providers

ROOT = Path(__file__).resolve().parents[1]
LARGEST_DIFFERENCE = 0.05
"""Relative, in norm, of the results of 16 bits that two providers have of the same inputs."""


class Clock:
    """Times calls with device events; on a processor with its clock."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call."""
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def _graph(provider: Provider) -> Callable[[], object] | None:
    """All calls of a provider in one CUDA graph; ``None`` where they cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side), provider.context():
            for call in provider.calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with provider.context(), torch.cuda.graph(graph):
            for call in provider.calls:
                call()
    except (RuntimeError, AssertionError):
        torch.cuda.synchronize()
        return None
    replay: Callable[[], object] = graph.replay
    return replay


def _all(provider: Provider) -> None:
    with provider.context():
        for call in provider.calls:
            call()


def time_case(case: Case, mode: Mode, device: str, budget: float, rounds: int = 15) -> list[Row]:
    """Times all providers of a case in turns; a provider that fails has a row that says why."""
    # Compiled code of other cases counts for a limit, beyond which FlexAttention would run without being compiled.
    torch._dynamo.reset()
    clock = Clock(device)
    timed: dict[str, Provider] = {}
    results: dict[str, tuple[Tensor, ...]] = {}
    rows: list[Row] = []
    for name, make in providers(case, mode, device):
        try:
            provider = make()
            with provider.context():
                results[name] = tuple(x.detach().float() for x in provider.calls[0]())
            _all(provider)
            timed[name] = provider
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            rows.append(Row(case.name, case.group, mode, name, float("nan"), None, 0.0, 0.0, None, said))
    differences = {name: _difference(name, results) for name in results}
    results.clear()
    graphs = {name: _graph(provider) if clock.on_gpu else None for name, provider in timed.items()}
    samples: dict[str, list[float]] = {name: [] for name in timed}
    replays: dict[str, list[float]] = {name: [] for name, graph in graphs.items() if graph is not None}
    start, names = time.perf_counter(), list(timed)
    for index in range(rounds):
        for name in names[index % max(len(names), 1) :] + names[: index % max(len(names), 1)]:
            count = len(timed[name].calls)
            samples[name].append(clock.seconds(functools.partial(_all, timed[name])) / count)
            graph = graphs[name]
            if graph is not None:
                replays[name].append(clock.seconds(graph) / count)
        if time.perf_counter() - start > budget and index >= 2:
            break
    for name in names:
        seconds = statistics.median(samples[name])
        replayed = statistics.median(replays[name]) if replays.get(name) else None
        best = min(seconds, replayed or seconds)
        rows.append(
            Row(
                case.name,
                case.group,
                mode,
                name,
                seconds * 1e3,
                None if replayed is None else replayed * 1e3,
                _flops(case, mode) / best / 1e12,
                case.bytes(mode) / best / 1e9,
                differences[name],
                "",
            )
        )
    return rows


def _flops(case: Case, mode: Mode) -> float:
    """As the field counts them: attention's backward pass has 2.5 times the products of the forward pass."""
    if isinstance(case, Attention):
        return case.flops("forward") * (1.0 if mode == "forward" else 3.5)
    return case.flops(mode)


def _difference(provider: str, results: dict[str, tuple[Tensor, ...]]) -> float | None:
    """The largest relative difference in norm of ours from those of the first peer, of a peer from ours."""
    ours = provider.startswith(OURS)
    found, others = results[provider], [x for name, x in results.items() if name.startswith(OURS) != ours]
    if not others:
        return None
    differences = [
        float((x - y).norm() / y.norm().clamp_min(1e-30)) for x, y in zip(found, others[0], strict=True) if x.numel()
    ]
    return max(x if isfinite(x) else inf for x in differences)


def launch_cost(calls: int = 200) -> dict[str, float]:
    """Microseconds that Python spends on a small call, which the GPU finishes before the next one."""
    q, k, v = (torch.randn(1, 1, 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    x, grad = torch.zeros(1, device="cuda"), torch.randn_like(q)

    def forward() -> object:
        with torch.no_grad():
            return seqkernels.functional.scaled_dot_product_attention(q, k, v)

    def backward() -> object:
        out = seqkernels.functional.scaled_dot_product_attention(q, k, v)
        return torch.autograd.grad(out, (q, k, v), grad)

    found = {}
    for name, call in (("empty kernel", lambda: x.zero_()), ("forward", forward), ("forward_backward", backward)):
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            taken.append((time.perf_counter() - start) / calls * 1e6)
            torch.cuda.synchronize()
        found[name] = statistics.median(taken)
    return found


def _versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine(device: str) -> dict[str, Any]:
    """What the run was made on: the device, its clocks and driver, versions, and its rates measured now."""
    found: dict[str, Any] = {"torch": torch.__version__, "seqkernels": seqkernels.__version__, "device": device}
    if device == "cpu":
        return found
    import triton

    asked = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    answer = ""
    if shutil.which("nvidia-smi") is not None:
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found |= {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "cudnn_rnn_precision": torch.backends.cudnn.rnn.fp32_precision,
        "matmul_precision": torch.backends.cuda.matmul.fp32_precision,
        **_versions(),
        "nvidia_smi": dict(zip(asked.split(","), answer.strip().split(", "), strict=False)),
    }
    clock = Clock(device)
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))

    def best(call: Callable[[], object]) -> float:
        call()
        return min(clock.seconds(call) for _ in range(10))

    found["copy_gbytes"] = 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9
    found["mm_tflops"] = 2 * 8192**3 / best(lambda: torch.mm(a, b)) / 1e12
    return found


def render(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The summary: a line for each case and mode, with milliseconds of each provider and our speed over the best."""
    lines = [", ".join(f"{name} {value}" for name, value in about.items() if not isinstance(value, dict | list))]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.mode), []).append(row)
    for (case, mode), of in groups.items():
        times = {row.provider: row.graph_ms or row.ms for row in of if not row.note}
        mine = min(
            (row for row in of if row.provider in (OURS, CUDA) and not row.note),
            key=lambda row: times[row.provider],
            default=None,
        )
        others = [ms for name, ms in times.items() if not name.startswith(OURS)]
        text = f"{case} {mode.replace('_', '+')}".ljust(64)
        if mine is not None:
            text += f" {mine.tflops:6.0f} TF {mine.gbytes:6.0f} GB/s"
            text += f"  {min(others) / times[mine.provider]:5.2f}x the best" if others else ""
        text += "  " + " ".join(f"{name} {ms:.4g}" for name, ms in times.items())
        text += "".join(f"  {row.provider}: {row.note}" for row in of if row.note)
        text += "".join(
            f"  {row.provider} differs by {row.difference:.2g}"
            for row in of
            if row.difference is not None and row.difference > LARGEST_DIFFERENCE
        )
        lines.append(text)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the cases until the time is up, write the JSON, print the summary.

    Returns:
        0; 1 where one of our own calls failed or differs from all others.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=7.0, help="cases that do not fit are left out (%(default)s)")
    parser.add_argument("--only", choices=GROUPS, default="default", help="the group of cases (%(default)s)")
    parser.add_argument("-k", metavar="WORD", default="", help="only the cases with this in their name")
    parser.add_argument("--json", type=Path, default=ROOT / "report" / "gpu.json", help="result (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="small cases on the processor: a check of this program")
    parser.add_argument("--own-tiles", action="store_true", help="those of python -m seqkernels tune, if there are any")
    options = parser.parse_args(arguments)
    device = "cpu" if options.dry else "cuda"
    if not options.dry and not torch.cuda.is_available():
        print("gpu: there is no CUDA device; --dry checks the program without one", file=sys.stderr)
        return 1
    reason = backends.backend("cuda").unavailable()
    if options.only == "persistent" and not options.dry and reason is not None:
        print(f"gpu: {reason}", file=sys.stderr)
        return 1
    if not options.dry and not options.own_tiles:
        from seqkernels.backends.triton import tiles

        tiles.ignore()
    torch.manual_seed(0)
    start = time.perf_counter()
    about = machine(device) | {"tiles": "own" if options.own_tiles else "shipped"}
    cases = [(c, m) for c in GROUPS[options.only][options.dry] if options.k in c.name for m in c.modes]
    rows: list[Row] = []
    left_out = []
    for case, mode in tqdm(cases, unit="case", disable=None):
        spent = time.perf_counter() - start
        if spent > options.minutes * 60:
            left_out.append(f"{case.name} {mode}")
            continue
        with torch.set_grad_enabled(mode == "forward_backward"):
            rows += time_case(case, mode, device, budget=1.0)
    if not options.dry:
        about |= {f"launch {name} us": round(us, 1) for name, us in launch_cost().items()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    written = {"machine": about, "rows": [row._asdict() for row in rows], "left_out": left_out}
    text = json.dumps(written, indent=1)
    options.json.write_text(re.sub(r": (NaN|Infinity)", ": null", text) + "\n")
    print(render(rows, about))
    if options.only == "persistent":
        asked = [case for case in GROUPS[options.only][options.dry] if options.k in case.name]
        print(report.render(bars(rows, asked, OURS if options.dry else CUDA, "torch"), markdown=False))
    if left_out:
        print(f"left out for time: {len(left_out)} of {len(cases)}")
    wrong = [
        row
        for row in rows
        if row.provider.startswith(OURS) and (row.note or (row.difference or 0.0) > LARGEST_DIFFERENCE)
    ]
    for row in wrong:
        print(f"gpu: {row.case} {row.mode}: {row.note or f'differs by {row.difference:.2g}'}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
