"""Context managers that force what is otherwise chosen at run time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..backends.native.extension import extension


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill memory that ``torch.empty`` and its kin return with NaN (the largest value for integers).

    A result that a kernel forgot to store then shows. Uses torch's deterministic mode, which is restored after.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``torch.set_num_threads(count)``, then with the number from before.

    Raises:
        ValueError: `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Let the compiled module use one instruction set, whatever else the processor has.

    Args:
        name: ``"x86-64-v2"``, ``"x86-64-v3"``, ``"x86-64-v4"``, or ``"baseline"`` on other architectures.

    Raises:
        ImportError: there is no compiled module.
        ValueError: it has no kernels for `name`, or this processor cannot run them; says what there is.
    """
    module = extension()
    available = module.isas()
    if name not in available:
        raise ValueError(f"name: {name!r} is not one of {', '.join(map(repr, available))}, which this processor runs")
    before = module.isa()
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(before)
