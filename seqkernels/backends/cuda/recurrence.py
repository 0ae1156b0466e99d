"""The recurrence on a GPU: products over all steps by torch, the loop over time by one launch of a compiled kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...cells import Weights
from .. import BackendError, _through_time
from .._through_time import Loop
from . import emulator
from .extension import extension
from .persistent import Persistent, product_of
from .plans import Choice, Device, choose


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
    jobs: int = 1,
) -> Choice:
    """The plan of a pass, or of so many at once, or why there is none; sizes of at least 1."""
    forced = emulator.forced_plan(cell, product_of(dtype, precision), backward, hidden, batch)
    if forced is not None:
        return Choice(forced, "as a test asks", 1000.0)
    return choose(kernels(), device, cell, product_of(dtype, precision), backward, hidden, batch, jobs)


def choice_of(loop: Loop, backward: bool, jobs: int = 1) -> Choice:
    """The plan of a loop, or of so many like it at once."""
    weight = loop.weight_hh
    device = device_of(weight.device.index)
    return choice(device, loop.cell, weight.dtype, loop.precision, backward, loop.hidden, loop.batch, jobs)


def plan_of(loop: Loop, backward: bool, jobs: int = 1) -> Any:
    """The plan of `choice_of`.

    Raises:
        BackendError: there is none.
    """
    found = choice_of(loop, backward, jobs)
    if found.plan is None:
        raise BackendError(f"backend 'cuda' cannot run a {loop.cell} with {loop.hidden} hidden units: {found}")
    return found.plan


def _path() -> Persistent:
    return Persistent(kernels(), plan_of)


def recurrence_forward(
    input: Tensor,
    weights: Weights,
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    save: bool,
    every: int = 0,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """``seqkernels::recurrence_forward``."""
    return _through_time.recurrence_forward(
        _path(), input, weights, state0, control, cell, reverse, save, every, precision
    )


def recurrence_backward(
    grads: Sequence[Tensor | None],
    input: Tensor,
    weights: Weights,
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    needs: Sequence[bool],
    every: int = 0,
    precision: str = "ieee",
) -> list[Tensor]:
    """``seqkernels::recurrence_backward``."""
    return _through_time.recurrence_backward(
        _path(), grads, input, weights, states, reserve, control, cell, reverse, needs, every, precision
    )
