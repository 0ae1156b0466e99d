"""The recurrence on a GPU: products over all steps by torch, the loop over time by kernels.

Where no norm needs whole rows, the kernels of `recurrence_sequence` run a sequence of steps in one launch, their
weights at hand; else each step is a product of torch and a launch of `recurrence_steps`.
"""

from __future__ import annotations

import functools

from torch import Tensor

from .. import _through_time
from .._through_time import Gradients, Loop, Path
from . import recurrence_sequence, recurrence_steps


def _way(loop: Loop) -> Path:
    return recurrence_sequence if recurrence_sequence.serves(loop) else recurrence_steps


class _Ways:
    """Each part of the loop on the way that serves it."""

    def forward(
        self, loop: Loop, carry: Tensor, states: Tensor, reserve: Tensor | None, begin: int, end: int, base: int
    ) -> None:
        _way(loop).forward(loop, carry, states, reserve, begin, end, base)

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
        _way(loop).backward(loop, grads, carry, states, reserve, begin, end, base)


_PATH = _Ways()

#: ``seqkernels::recurrence_forward`` and ``seqkernels::recurrence_backward``, whose loops `_PATH` runs.
recurrence_forward = functools.partial(_through_time.recurrence_forward, _PATH)
recurrence_backward = functools.partial(_through_time.recurrence_backward, _PATH)
