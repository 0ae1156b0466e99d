"""Fixtures for the options of the recurrence, which not every implementation has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

import seqkernels
from seqkernels import backends, testing

_FEATURES = ("control", "gates", "norm", "peephole", "recurrent_mask", "reset_state", "zoneout")


def _has(name: str, *features: str) -> bool:
    return backends.why_not(name, backends.Call("recurrence", "cpu", torch.float32, "lstm", features)) is None


#: Implementations that say they have all options of the recurrence; that they should is tested once.
WITH_OPTIONS = [name for name in backends.NAMES if _has(name, *_FEATURES)]


def _isas(name: str) -> list[str | None]:
    if name != "native":
        return [None]
    from seqkernels.backends.native.extension import extension

    return [*extension().isas()]


_THREADS = {"reference": (1,), "triton": (1,), "cuda": (1,), "x86-64-v2": (1,), "x86-64-v3": (2,)}
RUNS = [
    (name, isa, threads)
    for name in WITH_OPTIONS
    for isa in _isas(name)
    for threads in _THREADS.get(isa or name, (1, 2))
]


@pytest.fixture(params=RUNS, ids=lambda run: "-".join(str(part) for part in run if part is not None))
def options_runner(request: pytest.FixtureRequest) -> Iterator[str]:
    """Insists on one implementation, instruction set and thread count; fresh memory holds NaN."""
    name, isa, threads = request.param
    with contextlib.ExitStack() as stack:
        stack.enter_context(seqkernels.use_backend(name))
        stack.enter_context(testing.threads(threads))
        stack.enter_context(testing.poisoned_empty())
        if isa is not None:
            stack.enter_context(testing.force_isa(isa))
        yield name


@pytest.fixture(params=WITH_OPTIONS)
def options_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Like `options_runner`, for what does not depend on instruction set and threads."""
    with seqkernels.use_backend(request.param), testing.threads(1), testing.poisoned_empty():
        yield request.param


@pytest.fixture(params=WITH_OPTIONS)
def options_reader(request: pytest.FixtureRequest) -> str:
    """The name of each implementation that has the options of the recurrence."""
    return request.param
