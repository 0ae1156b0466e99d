"""What both ways through time share: the tensors of a loop, and products of matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...cells import CELLS
from .recurrence_cells import Parts, Sums


class Loop(NamedTuple):
    """The tensors of a call that every step reads, contiguous.

    Attributes:
        gates_x: (T, B, G*H), without `bias_ih`; ``None`` where no step needs it.
        weight_hh: (G*H, H).
        control: (T, B) or ``None``.
        parts: what works on elements.
        cell: as in the contract.
        reverse: as in the contract.
        steps: T.
        batch: B.
        hidden: H.
        precision: of products of float32 matrices.
    """

    gates_x: Tensor | None
    weight_hh: Tensor
    control: Tensor | None
    parts: Parts
    cell: str
    reverse: bool
    steps: int
    batch: int
    hidden: int
    precision: str = "ieee"

    def order(self, begin: int, end: int) -> range:
        """Steps [begin, end) in the order of the loop."""
        return range(end - 1, begin - 1, -1) if self.reverse else range(begin, end)

    def constants(self) -> dict[str, object]:
        """As the kernels name them."""
        gates, states, _ = CELLS[self.cell]
        return {"H": self.hidden, "CELL": self.cell, "GATES": gates, "STATES": states}


class Gradients(NamedTuple):
    """Gradients that go into a loop, and those that it makes.

    Attributes:
        hidden: (T, B, H) or ``None``.
        cells: (T, B, H) or ``None``.
        gates: (T, B, G, H) or ``None``.
        product: (T, B, G*H), float32, the recurrent product of all steps, where a step needs it.
        of_x: (T, B, G*H), written.
        of_u: likewise, where it is another than `of_x`.
        of_product: likewise, where it is another than `of_u`.
        sums: written.
    """

    hidden: Tensor | None
    cells: Tensor | None
    gates: Tensor | None
    product: Tensor | None
    of_x: Tensor
    of_u: Tensor | None
    of_product: Tensor | None
    sums: Sums

    def to_product(self) -> Tensor:
        """The gradient of the recurrent product (T, B, G*H)."""
        found = self.of_u if self.of_product is None else self.of_product
        return self.of_x if found is None else found


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices, float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda and a.numel() and b.numel():
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices, rounded to their dtype at the end alone."""
    return torch.mm(a, b) if a.is_cuda else product(a, b).to(a.dtype)


def entering(h: Tensor, control: Tensor | None, parts: Parts, reset: int) -> Tensor:
    """What enters the recurrent product of steps.

    Args:
        h: (n, B, H), the hidden states before them.
        control: (n, B) of them, or ``None``.
        parts: of the loop.
        reset: the bit of a reset.
    """
    if control is not None:
        at = (control & reset).bool().unsqueeze(2)
        h = h.masked_fill(at, 0) if parts.reset_state is None else torch.where(at, parts.reset_state[0], h)
    return h if parts.recurrent_mask is None else h * parts.recurrent_mask
