"""Kernels of a GPU on the processor, for tests: ``seqkernels._emulator`` runs their text (``csrc/core/emulator.h``)."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from .plans import Device, Norms

#: A small device: few multiprocessors, so that small tests have several blocks and several turns.
DEVICE = Device(capability=90, processors=12, shared_memory=227 * 1024, cluster=8)

#: What gives a plan for (cell, product, backward, hidden, batch, norms) in place of the table.
Planner = Callable[[str, str, bool, int, int, Norms], Any]

_module: ModuleType | None = None
_planner: ContextVar[Planner | None] = ContextVar("seqkernels_planner", default=None)


def use() -> None:
    """Has backend ``"cuda"`` emulate its kernels from now on, for tensors of the processor, in this process.

    Raises:
        ImportError: the emulator was not built; builds with ``SEQKERNELS_EMULATOR=1`` have it.
    """
    global _module
    _module = importlib.import_module("seqkernels._emulator")


def in_use() -> bool:
    """Whether kernels are emulated."""
    return _module is not None


def module() -> ModuleType:
    """The compiled module of the emulator.

    Raises:
        RuntimeError: `use` was not called.
    """
    if _module is None:
        raise RuntimeError("the emulator is not in use")
    return _module


@contextlib.contextmanager
def planned(planner: Planner) -> Iterator[None]:
    """Inside the block plans are those of `planner`, on a GPU too."""
    token = _planner.set(planner)
    try:
        yield
    finally:
        _planner.reset(token)


def forced_plan(cell: str, product: str, backward: bool, hidden: int, batch: int, norms: Norms) -> Any:
    """The plan that `planned` asks for; ``None`` where nothing does."""
    planner = _planner.get()
    return None if planner is None else planner(cell, product, backward, hidden, batch, norms)
