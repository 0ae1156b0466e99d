"""Judging layers against loops over ``torch.nn`` and over plain formulas."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels import backends
from seqkernels.testing import assert_within_budget, poisoned_empty

from .layers import Run

OPTIONS = ("gates", "norm", "peephole", "recurrent_mask", "zoneout")


def _having(*features: str) -> list[str]:
    """Implementations that have these features of a recurrence; numba keeps to the plain contract."""
    call = backends.Call("recurrence", "cpu", torch.float32, "lstm", features)
    return [name for name in backends.NAMES if backends.why_not(name, call) is None]


@pytest.fixture(params=_having(*OPTIONS))
def capable(request: pytest.FixtureRequest) -> Iterator[str]:
    """Insists on each implementation that has the options of the cells; fresh memory holds NaN."""
    with seqkernels.use_backend(request.param), poisoned_empty():
        yield request.param


@pytest.fixture(params=_having("reset_state"))
def resettable(request: pytest.FixtureRequest) -> Iterator[str]:
    """Insists on each implementation that has reset states; fresh memory holds NaN."""
    with seqkernels.use_backend(request.param), poisoned_empty():
        yield request.param


def _together(oracle: dict[str, Tensor], found: dict[str, Tensor], grads: bool) -> Tensor:
    """All outputs, or all gradients, each scaled to its size in the oracle by a power of two, which rounds nothing."""
    parts = []
    for name in oracle:
        if name.startswith("grad of ") == grads and oracle[name].numel():
            largest = oracle[name].abs().max()
            size = largest.log2().ceil() if largest else torch.zeros(())
            parts.append(found[name].flatten() * (2**-size).to(found[name].dtype))
    return torch.cat(parts) if parts else torch.empty(0)


def _draws(run: Run, dtype: torch.dtype, seeds: int) -> dict[str, Tensor]:
    return {f"{name} {seed}": x.detach() for seed in range(seeds) for name, x in run(dtype, seed).items()}


# The same oracle and baselines judge every implementation.
_known = functools.lru_cache(maxsize=1024)(_draws)


def _judge(
    ours: Run,
    theirs: Run,
    *others: Run,
    seeds: int = 3,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
) -> None:
    """Assert that what `ours` computes is within the budget of `theirs`.

    Args:
        ours: gives results by name, gradients as ``"grad of "`` something, in a dtype for a seed whose numbers are
            exact in float32.
        theirs: the same, the oracle in float64 and the baseline in float32. What it gives is kept, so it must not
            depend on the implementation that the test insists on.
        others: more baselines, equal but for rounding, of which the least exact counts.
        seeds: how many draws are judged together; one alone may be exact by luck.
        dtypes: in which `ours` is judged.
    """
    oracle = _known(theirs, torch.float64, seeds)
    baselines = [_known(run, torch.float32, seeds) for run in (theirs, *others)]
    for dtype in dtypes:
        actual = _draws(ours, dtype, seeds)
        assert actual.keys() == oracle.keys()
        for name, value in actual.items():
            assert value.dtype == dtype, name
            assert value.shape == oracle[name].shape, name
        for grads in (False, True):
            found, exact, *own = (_together(oracle, results, grads) for results in (actual, oracle, *baselines))
            assert_within_budget(found, exact, own, "gradients" if grads else "outputs")


@pytest.fixture
def judge() -> Callable[..., None]:
    """The function `_judge`."""
    return _judge
