"""How the benchmarks are measured: one case and mode at a time, all providers in turns, in one process.

Each entry of the JSON is one test: a case, a mode and a provider. The first test of a case and mode measures every
provider that is selected, and torch, round by round in turns (`benchmarks.measure.interleave`), and checks their
results against float64. Each test of the group then replays the samples of its provider through
``benchmark.pedantic`` on a virtual clock, so that pytest-benchmark's statistics, JSON and comparison see what was
measured in turns. The ratio to torch is the median over rounds of torch's time over the provider's own, so that a
machine that slows down for a while slows down both. A provider that cannot run a case is skipped with its reason,
which also goes into the JSON; one that raises or returns values that are not finite fails its own test only.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import ExitStack
from importlib import metadata
from typing import Any, NamedTuple

import pytest
import torch

import seqkernels
from seqkernels.backends.native.extension import extension, load_error
from seqkernels.testing import force_isa

from . import engines, measure, roofline, workloads
from .cases import ENGINES, PROVIDERS, Case, Mode, providers, with_tag

WRONG = 100.0
"""Times the error that the tests allow: rounding stays far below, another formula is far beyond."""


class Group(NamedTuple):
    """What was measured of one case and mode.

    Attributes:
        samples, ratios, errors: by provider.
        native: native's speed over each engine, from the rounds that both took part in.
        reasons: why a provider cannot run the case.
        failures: what a provider raised.
    """

    samples: dict[str, measure.Samples]
    ratios: dict[str, measure.Ratio]
    native: dict[str, measure.Ratio]
    errors: dict[str, workloads.Errors]
    reasons: dict[str, str]
    failures: dict[str, Exception]


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("seqkernels benchmarks")
    options.addoption("--threads", type=int, help="threads of torch and of each backend (torch's default)")
    options.addoption("--isa", help="instruction set of the compiled module (the best that the processor has)")
    options.addoption("--quick", action="store_true", help="few cases, few rounds: a check that takes a minute")
    options.addoption(
        "--providers",
        default=",".join(PROVIDERS),
        help=f"who is timed (%(default)s); where installed also {', '.join(ENGINES)}",
    )
    options.addoption("--allow-missing", action="store_true", help="go on where the compiled module is missing")


def pytest_configure(config: pytest.Config) -> None:
    # It would be a second error beside each failure.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    threads = config.getoption("threads")
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads: at least 1, not {threads}")
        torch.set_num_threads(threads)
    isa = config.getoption("isa")
    if isa is not None:
        stack = ExitStack()
        try:
            stack.enter_context(force_isa(isa))
        except (ImportError, ValueError) as error:
            raise pytest.UsageError(f"--isa: {error}") from error
        config.add_cleanup(stack.close)
    selected = config.getoption("providers").split(",")
    known = (*PROVIDERS, *ENGINES)
    unknown = set(selected) - set(known)
    if unknown:
        raise pytest.UsageError(f"--providers: {', '.join(sorted(unknown))} is not among {', '.join(known)}")
    absent = [reason for name in ENGINES if name in selected and (reason := engines.missing(name)) is not None]
    if absent:
        raise pytest.UsageError(f"--providers: {'; '.join(absent)}")
    if load_error() is not None and "native" in selected and not config.getoption("allow_missing"):
        raise pytest.UsageError(f"native cannot be timed ({load_error()}); build it, or pass --allow-missing")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" not in metafunc.fixturenames:
        return
    selected = metafunc.config.getoption("providers").split(",")
    quick = with_tag("quick") if metafunc.config.getoption("quick") else None
    parameters = [
        pytest.param(case, mode, provider, id=f"{case.name}-{mode}-{provider}")
        for case in metafunc.module.CASES
        if quick is None or case in quick
        for mode in case.modes
        for provider in providers(case, mode)
        if provider in selected
    ]
    metafunc.parametrize(("case", "mode", "provider"), parameters)


class Session:
    """The groups of a run: measures each once, keeps the last, and says how far the run is."""

    def __init__(self, config: pytest.Config) -> None:
        self.plan = measure.QUICK if config.getoption("quick") else measure.FULL
        self.machine: roofline.Roofline | None = None
        self.wanted: dict[tuple[str, Mode], list[str]] = defaultdict(list)
        self.unavailable: list[dict[str, str]] = []
        self.news = ""
        self._start = time.monotonic()
        self._done = 0
        self._last: tuple[tuple[str, Mode], Group] | None = None

    def group(self, case: Case, mode: Mode) -> Group:
        """What was measured of `case` and `mode`; measured now unless it was the last one asked for."""
        key = (case.name, mode)
        if self._last is None or self._last[0] != key:
            self._last = None
            if self.machine is None:
                self.machine = roofline.measure()
            group = _measure(case, mode, self.wanted[key], self.plan)
            self._last = (key, group)
            self._done += 1
            for provider, reason in group.reasons.items():
                self.unavailable.append({"case": case.name, "mode": mode, "provider": provider, "reason": reason})
            self.news = self._line(case, mode, group)
        return self._last[1]

    def _line(self, case: Case, mode: Mode, group: Group) -> str:
        elapsed = int(time.monotonic() - self._start)
        parts = [f"[{self._done:3}/{len(self.wanted)} {elapsed // 60}:{elapsed % 60:02}]"]
        parts.append(f"{case.name} {mode.replace('_', '+')}".ljust(58))
        for provider, samples in group.samples.items():
            seconds = sorted(samples.seconds.values())
            text = f"{provider} {seconds[len(seconds) // 2] * 1e3:.4g} ms"
            if provider != "torch" and provider in group.ratios:
                text += f" ({group.ratios[provider].median:.2f}x)"
            parts.append(text)
        parts += [f"{provider} FAILED" for provider in group.failures]
        return "  ".join(parts)


session_key = pytest.StashKey[Session]()


def pytest_collection_finish(session: pytest.Session) -> None:
    state = session.config.stash[session_key] = Session(session.config)
    for item in session.items:
        parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
        if "provider" in parameters:
            state.wanted[parameters["case"].name, parameters["mode"]].append(parameters["provider"])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    state = item.config.stash[session_key]
    reporter = item.config.pluginmanager.get_plugin("terminalreporter")
    if state.news and reporter is not None:
        reporter.write_line(state.news)
        state.news = ""
    return result


def _measure(case: Case, mode: Mode, wanted: list[str], plan: measure.Plan) -> Group:
    group = Group({}, {}, {}, {}, {}, {})
    exact = _call(workloads.build(case, mode, "torch", torch.float64))
    baseline = exact
    ready = {}
    for provider in (*PROVIDERS, *ENGINES):
        if provider != "torch" and provider not in wanted:
            continue
        try:
            workload = workloads.build(case, mode, provider)
            results = _call(workload)
            if provider == "torch":
                baseline = results
            found = group.errors[provider] = workloads.errors(results, baseline, exact)
            if found.of_budget > WRONG:
                raise ValueError(f"wrong results: the error is {found.of_budget:.3g} times what the tests allow")
            ready[provider] = workload
        except seqkernels.BackendError as error:
            group.reasons[provider] = str(error)
        except Exception as error:
            group.failures[provider] = error
    del exact, baseline
    if ready:
        # With one thread nobody's threads wait busily.
        rest = torch.get_num_threads() > 1 and not ready.keys().isdisjoint(ENGINES)
        group.samples.update(measure.interleave(ready, plan.with_pauses() if rest else plan))
    if "torch" in ready:
        group.ratios.update({name: measure.ratio(group.samples["torch"], own) for name, own in group.samples.items()})
    if "native" in ready:
        group.native.update(
            {name: measure.ratio(group.samples[name], group.samples["native"]) for name in ready if name in ENGINES}
        )
    return group


def _call(workload: workloads.Workload) -> tuple[torch.Tensor, ...]:
    with workload.context():
        return tuple(result.detach() for result in workload.compared(workload.run()))


@pytest.fixture
def replay(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case, Mode, str], None]:
    """Replays what was measured of a case, a mode and a provider into pytest-benchmark."""
    session = request.config.stash[session_key]

    def replay(case: Case, mode: Mode, provider: str) -> None:
        group = session.group(case, mode)
        if provider in group.reasons:
            pytest.skip(group.reasons[provider])
        if provider in group.failures:
            raise group.failures[provider]
        samples = group.samples[provider]
        benchmark.group = f"{case.name} {mode}"
        benchmark.extra_info.update(_extra_info(case, mode, provider, group))
        seconds = iter(samples.seconds.values())
        benchmark.pedantic(measure.clock.replay, args=(seconds,), rounds=len(samples.seconds), iterations=1)

    return replay


def _extra_info(case: Case, mode: Mode, provider: str, group: Group) -> dict[str, Any]:
    shape = {
        field.name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for field in dataclasses.fields(case)
        if field.name != "tags" and (value := getattr(case, field.name)) is not None
    }
    info = {
        "case": case.name,
        "group": case.group,
        "mode": mode,
        "provider": provider,
        "shape": shape,
        "tags": sorted(case.tags),
        "threads": torch.get_num_threads(),
        "flops": case.flops(mode),
        "bytes": case.bytes(mode),
        "phases": [list(phase) for phase in case.phases(mode)],
        "baseline": case.baseline(mode),
        "calls_per_round": group.samples[provider].calls,
        "max_error": group.errors[provider].largest,
        "error_to_torch": group.errors[provider].to_torch,
        "error_of_budget": group.errors[provider].of_budget,
    }
    if provider in group.ratios:
        info["ratio"] = dict(group.ratios[provider]._asdict())
    if provider in group.native:
        info["native"] = dict(group.native[provider]._asdict())
    return info


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    # The lines of progress take the place of dots and letters.
    return (report.outcome, "", "") if report.when == "call" else None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node")
    machine_info["threads"] = torch.get_num_threads()
    machine_info["torch"] = torch.__version__
    machine_info["seqkernels"] = seqkernels.__version__
    machine_info["isa"] = extension().isa() if load_error() is None else None
    selected = config.getoption("providers").split(",")
    machine_info["engines"] = {name: metadata.version(name) for name in ENGINES if name in selected}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    session = config.stash[session_key]
    output_json["unavailable"] = session.unavailable
    # Measured before the first case and after the last one, since the machine may be slower for a while.
    machine = None if session.machine is None else session.machine.better(roofline.measure()).to_json()
    output_json["roofline"] = machine
