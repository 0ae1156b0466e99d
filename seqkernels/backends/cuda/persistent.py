"""The loop over time in one launch, its weights on chip from the first step to the last.

The layout is a plan of the compiled module, see ``csrc/core/persistent_plan.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...cells import CELLS, NORM_EPS, RESET
from .._through_time import Gradients, Loop

if TYPE_CHECKING:
    from .extension import _C_cuda

_PRODUCTS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def product_of(dtype: torch.dtype, precision: str) -> str:
    """The kind of product of a call. ``"tf32"`` is served by the three products of ``"tf32x3"``, which are finer."""
    return _PRODUCTS.get(dtype) or ("exact" if precision == "ieee" else "tf32x3")


class Part(NamedTuple):
    """The steps [begin, end) of a loop, with the arguments of `seqkernels.backends._through_time.Path`.

    Attributes:
        grads: of a backward pass.
    """

    loop: Loop
    carry: Tensor
    states: Tensor
    reserve: Tensor | None
    begin: int
    end: int
    base: int
    grads: Gradients | None = None


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (n, B, N) float32 normalised over its last dimension, and 1 over its deviation (n, B)."""
    normal, _, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, NORM_EPS)
    return normal, scale.view(x.shape[:2])


def _normalised(
    loop: Loop, grads: Gradients, states: Tensor, reserve: Tensor, begin: int, end: int
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """What norms of the steps [begin, end) saw, all at once: a loop back would have to meet for it in each step.

    Returns:
        the recurrent product (n, B, G*H), normalised with `norm_h`; then 1 over its deviation, c normalised (n, B, H)
        and 1 over its deviation. All float32, ``None`` where no step needs it.
    """
    product, scale, cells, cell_scale = grads.product, None, None, None
    if product is not None:
        product = product[begin:end]
    if product is not None and loop.parts.norm_h is not None:
        product, scale = _normal(product)
    if loop.parts.norm_c is not None:
        before = states[1, 1:] if loop.reverse else states[1, :-1]
        if loop.control is not None:
            fresh = before.new_zeros(()) if loop.parts.reset_state is None else loop.parts.reset_state[1]
            before = torch.where((loop.control[begin:end] & RESET).bool().unsqueeze(2), fresh, before)
        i, f, g, _ = reserve.unbind(2)
        cells, cell_scale = _normal(torch.addcmul(i * g, f, before.float()))
    return product, (scale, cells, cell_scale)


class Persistent:
    """A `seqkernels.backends._through_time.Path` of launches.

    Args:
        kernels: the compiled module.
        choose: gives the plan of a loop, and whether it is one back.
    """

    def __init__(self, kernels: ModuleType, choose: Callable[[Loop, bool], Any]) -> None:
        self._kernels = kernels
        self._choose = choose

    def forward(
        self, loop: Loop, carry: Tensor, states: Tensor, reserve: Tensor | None, begin: int, end: int, base: int
    ) -> None:
        """As `Path.forward`."""
        self.together(self._choose(loop, False), [Part(loop, carry, states, reserve, begin, end, base)])

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
        self.together(self._choose(loop, True), [Part(loop, carry, states, reserve, begin, end, base, grads)])

    def together(self, plan: _C_cuda.Plan, parts: Sequence[Part]) -> None:
        """One launch of parts that need nothing of each other.

        Args:
            plan: of all of them; whether it is one back says what is run.
            parts: up to ``MOST_JOBS`` of the module, none of them empty.
        """
        run = self._kernels.recurrence_backward if plan.backward else self._kernels.recurrence_forward
        run(plan, *(job_of(part, *_exchange(plan, part.carry.device)) for part in parts))


def _exchange(plan: _C_cuda.Plan, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    if plan.flags == 0:
        return None, None
    exchange = torch.empty(plan.exchange_bytes, dtype=torch.uint8, device=device)
    return exchange, torch.zeros(plan.flags, dtype=torch.int32, device=device)


def job_of(part: Part, exchange: Tensor | None = None, flags: Tensor | None = None) -> tuple[Any, ...]:
    """A job as the compiled module is given it.

    Args:
        part: one back where it has gradients.
        exchange: memory that blocks exchange through, where they do.
        flags: zeros, likewise.
    """
    loop, grads = part.loop, part.grads
    order = loop.order(part.begin, part.end)
    shared = (
        loop.weight_hh,
        part.carry,
        part.states,
        loop.control,
        tuple(loop.parts),
        loop.cell,
        loop.reverse,
        order[0 if grads is None else -1],
        len(order),
        part.base,
        exchange,
        flags,
    )
    gates_x = None if loop.gates_x is None else loop.gates_x.float()
    if grads is None:
        return shared, gates_x, part.reserve
    assert part.reserve is not None
    product, norms = _normalised(loop, grads, part.states, part.reserve, part.begin, part.end)
    # Two gradients that were added up, of an RNN's gates and of its states, are float32.
    grad_hidden = None if grads.hidden is None else grads.hidden.to(part.states.dtype)
    return (
        shared,
        (grad_hidden, grads.cells, grads.gates),
        tuple(grads.sums),
        part.reserve if CELLS[loop.cell].reserve else None,
        gates_x,
        product,
        grads.of_x,
        grads.of_u,
        grads.of_product,
        norms,
    )
