"""The kernels of the recurrence as `ahead` compiles them: which there are, and their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ...cells import CELLS
from .._through_time import Parts, Sums
from . import recurrence_kernels, recurrence_sequence_kernels
from .recurrence_configs import cell_constants, sequence_tiles, step_tiles

_HIDDEN = (64, 128, 256, 512, 1024)


class RecurrenceVariant(NamedTuple):
    """A kernel as it is shipped: for a cell, a dtype and a hidden size.

    Attributes:
        kernel: ``"forward"``, ``"backward"``, of a sequence, or ``"step_forward"``, ``"step_backward"``.
        cell: a key of `seqkernels.cells.CELLS`.
        dtype: of the input.
        type: its name in Triton.
        size: H.
        features: ``"plain"``, ``"all"`` options that the kernel has, or ``"apart"``, plain steps that are launches.
        precision: of products of float32 matrices.
    """

    kernel: str
    cell: str
    dtype: torch.dtype
    type: str
    size: int
    features: str
    precision: str = "ieee"

    def __str__(self) -> str:
        kind = self.type if self.precision == "ieee" else self.precision
        return f"recurrence_{self.kernel} {self.cell} {kind} H={self.size} {self.features}"

    @property
    def multiplies(self) -> bool:
        """Whether it has a matrix product for tensor cores."""
        matrices = self.dtype != torch.float32 or self.precision != "ieee"
        return not self.kernel.startswith("step") and matrices


def variants(
    types: Mapping[torch.dtype, str], products: Sequence[tuple[torch.dtype, str]]
) -> Iterator[RecurrenceVariant]:
    """Every kernel in every configuration that is shipped, of dtypes with these names and these kinds of products."""
    for cell in ("rnn_tanh", "lstm", "gru"):
        for dtype, precision in products:
            name = types[dtype]
            for size in _HIDDEN:
                for kernel in ("forward", "backward"):
                    yield RecurrenceVariant(kernel, cell, dtype, name, size, "plain", precision)
                    if size == 256:
                        yield RecurrenceVariant(kernel, cell, dtype, name, size, "all", precision)
                        yield RecurrenceVariant(kernel, cell, dtype, name, size, "apart", precision)
            if precision == "ieee":
                # Without products, which torch has in those.
                for kernel in ("step_forward", "step_backward"):
                    yield RecurrenceVariant(kernel, cell, dtype, name, 1024, "all")
    # But for its activation it is rnn_tanh.
    dtype = torch.bfloat16
    for kernel in ("forward", "backward"):
        for features in ("plain", "all"):
            yield RecurrenceVariant(kernel, "rnn_relu", dtype, types[dtype], 256, features)
    for kernel in ("step_forward", "step_backward"):
        yield RecurrenceVariant(kernel, "rnn_relu", dtype, types[dtype], 1024, "all")


def arguments(variant: RecurrenceVariant, pointer: Callable[[str], Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The kernel, its arguments by name, with what `pointer` makes for tensors, and its options."""
    gates = CELLS[variant.cell].gates
    own, exact = pointer(variant.type), pointer("fp32")
    # No number is 1 or divisible by 16, which would be in the key of a kernel.
    given: dict[str, Any] = dict.fromkeys(
        ("batch", "steps", "t", "t_next", "t_after", "first", "count", "after", "first_tile", "base", "reverse"), 33
    )
    everything = variant.features == "all"
    lstm, whole = variant.cell == "lstm", variant.kernel.startswith("step")
    parts = Parts(None, own, None, None, None, None, None, None, None)
    sums = Sums(None, None, None, None)
    if everything:
        parts = Parts(own, own, own, own if lstm else None, own, own, own if lstm else None, exact, pointer("i64"))
        sums = Sums(exact, exact if lstm else None, exact, exact if lstm else None)
        if not whole:
            parts, sums = parts._replace(norm_h=None, norm_c=None), sums._replace(norm_h=None, norm_c=None)
    made_again = exact if everything and gates == 1 else None
    given |= {
        "stride": 333,
        "gates_x": exact if "forward" in variant.kernel else made_again,
        "weight": own,
        "product": exact if everything and whole else made_again,
        "carry": exact,
        "states": own,
        "reserve": exact if gates > 1 or "backward" in variant.kernel else None,
        "entering": own,
        "of_entering": exact,
        "control": pointer("u8") if everything else None,
        "parts": parts,
        "sums": sums,
        "grad_hidden": own,
        "grad_cells": own if everything and lstm else None,
        "grad_gates": own if everything and gates > 1 else None,
        "of_x": own,
        "of_u": own if variant.cell == "gru" else None,
        "of_product": own if everything else None,
        **cell_constants(variant.cell, variant.size),
        "EVERY_STATE": lstm,
        "STEP": True,
    }
    if whole:
        step = step_tiles(variant.size, everything)
        kernel = getattr(recurrence_kernels, f"{variant.kernel}_kernel")
        return kernel, given | {"BLOCK_B": step.rows, "BLOCK_H": step.columns}, {"num_warps": step.warps}
    key = (variant.kernel, variant.cell, variant.dtype, variant.size, variant.precision)
    tiles = sequence_tiles(*key, options=everything)
    apart = variant.features == "apart"
    sync = variant.size > tiles.columns and not apart
    given |= {"counters": pointer("i32") if sync else None, "SYNC": sync, "STEPWISE": apart, **tiles.constants()}
    options = tiles.options()
    if sync:
        options["launch_cooperative_grid"] = True
    return getattr(recurrence_sequence_kernels, f"sequence_{variant.kernel}_kernel"), given, options
