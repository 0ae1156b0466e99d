"""The recurrence on a GPU: products over all steps by torch, the loop over time by one launch of a compiled kernel, or
by a product and a launch for each step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import BackendError, _through_time
from .._through_time import Gradients, Loop
from . import emulator
from .extension import extension
from .persistent import Persistent, product_of
from .plans import NO_NORMS, Choice, Device, Norms, choose
from .stepwise import Stepwise, graphs_of


@functools.cache
def _device(index: int) -> Device:
    return Device(**extension().device(index))


def kernels() -> ModuleType:
    """The module that has the kernels: the emulator's where it is in use."""
    return emulator.module() if emulator.in_use() else extension()


def device_of(index: int | None) -> Device:
    """What plans depend on, of a CUDA device, ``None`` for the current one; or the emulated one."""
    if emulator.in_use():
        return emulator.DEVICE
    return _device(torch.cuda.current_device() if index is None else index)


def choice(
    device: Device,
    cell: str,
    dtype: torch.dtype,
    precision: str,
    backward: bool,
    hidden: int,
    batch: int,
    norms: Norms = NO_NORMS,
    jobs: int = 1,
) -> Choice:
    """The plan of a pass, or of so many at once; sizes of at least 1."""
    kind = product_of(dtype, precision)
    forced = emulator.forced_plan(cell, kind, backward, hidden, batch, norms)
    if forced is not None:
        return Choice(forced, "as a test asks", 1000.0)
    return choose(kernels(), device, cell, kind, backward, hidden, batch, norms, jobs)


def choice_of(loop: Loop, backward: bool, jobs: int = 1) -> Choice:
    """The plan of a loop, or of so many like it at once."""
    weight = loop.weight_hh
    norms = Norms(loop.parts.norm_h is not None, loop.parts.norm_c is not None)
    device, dtype = device_of(weight.device.index), weight.dtype
    return choice(device, loop.cell, dtype, loop.precision, backward, loop.hidden, loop.batch, norms, jobs)


def plan_of(loop: Loop, backward: bool, jobs: int = 1) -> Any:
    """The plan of `choice_of`.

    Raises:
        BackendError: there is none.
    """
    found = choice_of(loop, backward, jobs)
    if found.plan is None:
        raise BackendError(f"backend 'cuda' cannot run a {loop.cell} with {loop.hidden} hidden units: {found}")
    return found.plan


class Planned:
    """A `seqkernels.backends._through_time.Path` that runs each loop as its plan says.

    Args:
        choose: gives the plan of a loop, and whether it is one back.
    """

    def __init__(self, choose: Callable[[Loop, bool], Any] = plan_of) -> None:
        self._choose = choose

    def _path(self, loop: Loop, backward: bool) -> Persistent | Stepwise:
        plan = self._choose(loop, backward)
        if plan.tier == "steps":
            return Stepwise(kernels(), graphs_of(kernels(), loop.weight_hh.device))
        return Persistent(kernels(), lambda loop, backward: plan)

    def forward(
        self, loop: Loop, carry: Tensor, states: Tensor, reserve: Tensor | None, begin: int, end: int, base: int
    ) -> None:
        """As `Path.forward`."""
        self._path(loop, False).forward(loop, carry, states, reserve, begin, end, base)

    def backward(
        self,
        loop: Loop,
        grads: Gradients,
        carry: Tensor,
        states: Tensor,
        reserve: Tensor,
        begin: int,
        end: int,
        base: int,
    ) -> None:
        """As `Path.backward`."""
        self._path(loop, True).backward(loop, grads, carry, states, reserve, begin, end, base)


_PATH = Planned()

#: ``seqkernels::recurrence_forward`` and ``seqkernels::recurrence_backward``, whose loops `_PATH` runs.
recurrence_forward = functools.partial(_through_time.recurrence_forward, _PATH)
recurrence_backward = functools.partial(_through_time.recurrence_backward, _PATH)
