"""Fixtures: one parameter for each implementation that can run here, at each instruction set and thread count."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import hypothesis
import pytest
import torch

import seqkernels
from seqkernels import backends, testing
from seqkernels.testing import budget

from .device import carry
from .interpreter import hasten

#: Whether Triton's interpreter runs its kernels here, a thousand times as slowly as a processor.
INTERPRETED = not torch.cuda.is_available() and backends.backend("triton").unavailable() is None


def examples(count: int) -> int:
    """So many examples, or the tenth where Triton's interpreter runs them."""
    return max(count // 10, 2) if INTERPRETED else count


hypothesis.settings.register_profile(
    "seqkernels",
    derandomize=True,
    deadline=None,
    max_examples=examples(30),
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("seqkernels")


def widest(backend: str) -> torch.dtype:
    """The dtype in which errors of an implementation are the least likely to be luck."""
    return torch.float32 if backend in ("triton", "cuda") else torch.float64


class Runner(NamedTuple):
    """An implementation and how it is run."""

    backend: str
    isa: str | None
    threads: int

    def __str__(self) -> str:
        return "-".join(str(part) for part in self if part is not None)


def _isas(name: str) -> list[str | None]:
    if name != "native":
        return [None]
    from seqkernels.backends.native.extension import extension

    return [*extension().isas()]


DEVICE = "cpu"

if not torch.cuda.is_available() and importlib.util.find_spec("seqkernels._emulator") is not None:
    # Kernels of GPUs, on the processor.
    importlib.import_module("seqkernels.backends.cuda.emulator").use()


def _serves(name: str) -> bool:
    """Whether an implementation can be used here, for a recurrence or for attention."""
    calls = [backends.Call("recurrence", device, torch.float32, "lstm") for device in ("cpu", "cuda")]
    calls += [call._replace(op="attention", kind="") for call in calls]
    return any(backends.why_not(name, call) is None for call in calls)


BACKENDS = [name for name in backends.NAMES if _serves(name)]
# Of an implementation alone, where it can run: `make interpret` and a machine with a GPU.
_OF_TRITON = [f"backends/test_triton_{name}.py" for name in ("descriptors", "precision", "recurrence", "tune")]
collect_ignore = [] if "triton" in BACKENDS else _OF_TRITON
if "triton" in BACKENDS:
    # Whatever somebody measured on this machine.
    importlib.import_module("seqkernels.backends.triton.tiles").ignore()
# The reference leaves threads to torch, GPUs have none; how threads share work is the same for each instruction set.
_THREADS = {"reference": (1,), "triton": (1,), "cuda": (1,), "x86-64-v2": (1,), "x86-64-v3": (2,)}
RUNNERS = [
    Runner(name, isa, threads)
    for name in BACKENDS
    for isa in _isas(name)
    for threads in _THREADS.get(isa or name, (1, 2))
]
# Each implementation once, with the instruction set that it chooses by itself.
PLAIN = [Runner(name, None, 1) for name in BACKENDS]


def pytest_configure(config: pytest.Config) -> None:
    # Ten thousand tests and the libraries of all of them are there to the end: looked through as often as Python does
    # by itself, they take a fourteenth of the time.
    gc.set_threshold(20_000, 20, 20)
    if torch.cuda.is_available():
        carry("triton")
        if backends.backend("cuda").unavailable() is None:
            carry("cuda")
    if INTERPRETED or torch.cuda.is_available():
        # Neither NumPy nor a GPU has the exponential of the CPU's libraries, and sums are in another order.
        budget.TIMES = 3
    if INTERPRETED:
        hasten()
        # Of NumPy, which computes for the interpreter: infinities and what is no number are among the inputs of tests.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_finish() -> None:
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pure", action="store_true", help="the package was installed without its compiled module, on purpose"
    )
    parser.addoption("--every", type=int, default=1, help="of each test function every N-th case only (%(default)s)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what an implementation says it does not serve, operations and dtypes, and what `--every` does."""
    every, kept, left_out = config.getoption("every"), [], []
    count: dict[str, int] = {}
    for item in items:
        function = item.nodeid.partition("[")[0]
        served = not _declined(item)
        if served:
            count[function] = count.get(function, -1) + 1
        (kept if served and count[function] % every == 0 else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


#: Parameters that name an implementation.
_CHOOSING = ("runner", "plain_runner", "other_backend", "options_backend", "options_reader", "capable", "reader")


def _declined(item: pytest.Item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    emulated = "cuda" in BACKENDS and not torch.cuda.is_available()
    if emulated and item.path.parent.name not in ("ops", "backends"):
        # The emulator is for the contract, not for what is built on it.
        names = [getattr(param, "backend", param) for param in params.values()]
        if any(isinstance(name, str) and name == "cuda" for name in names):
            return True
    used = {getattr(param, "backend", param) for name, param in params.items() if name in _CHOOSING}
    named = {"triton", "cuda"} & (used | {params.get("options_runner", ("",))[0]})
    if not named:
        return False
    stem = item.path.stem
    op = "recurrence" if "recurrence" in stem or "checkpoint" in stem else "rotary" if "rotary" in stem else "attention"
    marked = item.get_closest_marker("dtype")
    dtype = marked.args[0] if marked else params.get("dtype", torch.float32)
    return any(backends.why_not(name, backends.Call(op, DEVICE, dtype)) is not None for name in named)


@pytest.fixture
def pure(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--pure")


@pytest.fixture
def compiled() -> bool:
    """Whether the compiled module loads."""
    return "native" in BACKENDS


def _run_as(runner: Runner) -> Iterator[Runner]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(seqkernels.use_backend(runner.backend))
        stack.enter_context(testing.threads(runner.threads))
        stack.enter_context(testing.poisoned_empty())
        if runner.isa is not None:
            stack.enter_context(testing.force_isa(runner.isa))
        yield runner


@pytest.fixture(params=RUNNERS, ids=str)
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """Insists on one implementation, instruction set and thread count; fresh memory holds NaN."""
    yield from _run_as(request.param)


@pytest.fixture(params=PLAIN, ids=str)
def plain_runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """Like `runner`, for what does not depend on instruction set and threads."""
    yield from _run_as(request.param)


@pytest.fixture(params=BACKENDS)
def other_backend(request: pytest.FixtureRequest) -> str:
    """The name of each implementation that can run here."""
    return request.param
