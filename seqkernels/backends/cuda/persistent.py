"""The loop over time in one launch, its weights on chip from the first step to the last.

The layout is a plan of the compiled module, see ``csrc/core/persistent_plan.h``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._through_time import Gradients, Loop

_PRODUCTS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def product_of(dtype: torch.dtype, precision: str) -> str:
    """The kind of product of a call. ``"tf32"`` is served by the three products of ``"tf32x3"``, which are finer."""
    return _PRODUCTS.get(dtype) or ("exact" if precision == "ieee" else "tf32x3")


class Persistent:
    """A `seqkernels.backends._through_time.Path` of launches.

    Args:
        kernels: the compiled module.
        choose: gives the plan of a loop, and whether it is one back.
    """

    def __init__(self, kernels: ModuleType, choose: Callable[[Loop, bool], Any]) -> None:
        self._kernels = kernels
        self._choose = choose

    def _exchange(self, plan: Any, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        if plan.flags == 0:
            return None, None
        exchange = torch.empty(plan.exchange_bytes, dtype=torch.uint8, device=device)
        return exchange, torch.zeros(plan.flags, dtype=torch.int32, device=device)

    def forward(
        self, loop: Loop, carry: Tensor, states: Tensor, reserve: Tensor | None, begin: int, end: int, base: int
    ) -> None:
        """As `Path.forward`."""
        assert loop.gates_x is not None
        plan = self._choose(loop, False)
        self._kernels.recurrence_forward(
            plan,
            loop.gates_x.float(),
            loop.weight_hh,
            carry,
            states,
            reserve,
            loop.control,
            tuple(loop.parts),
            loop.cell,
            loop.reverse,
            loop.order(begin, end)[0],
            end - begin,
            base,
            *self._exchange(plan, carry.device),
        )

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
        plan = self._choose(loop, True)
        # Two gradients that were added up, of an RNN's gates and of its states, are float32.
        grad_hidden = None if grads.hidden is None else grads.hidden.to(states.dtype)
        self._kernels.recurrence_backward(
            plan,
            loop.weight_hh,
            carry,
            (grad_hidden, grads.cells, grads.gates),
            (grads.sums.reset_state, grads.sums.peephole),
            states,
            reserve if loop.cell in ("lstm", "gru") else None,
            None if loop.gates_x is None else loop.gates_x.float(),
            grads.product,
            loop.control,
            tuple(loop.parts),
            loop.cell,
            loop.reverse,
            loop.order(begin, end)[-1],
            end - begin,
            base,
            grads.of_x,
            grads.of_u,
            *self._exchange(plan, carry.device),
        )
