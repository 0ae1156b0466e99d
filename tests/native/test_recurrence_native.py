"""The compiled recurrence on sizes that several threads share, which the small ones of tests/ops are not."""

from __future__ import annotations

import pytest
import torch

import seqkernels
from seqkernels import testing
from seqkernels.backends import native
from seqkernels.backends.native.extension import extension, load_error
from seqkernels.cells import CELLS

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@pytest.mark.parametrize("shape", [(10, 3, 120), (10, 9, 67)], ids=["groups", "rows"])
@pytest.mark.parametrize("cell", CELLS)
def test_threads_share_all_options(cell: str, shape: tuple[int, int, int]) -> None:
    """Threads own groups of hidden units, or batch rows; layer norms need what the others made."""
    names = [name for name in testing.OPTIONS if cell == "lstm" or name not in ("peephole", "norm_c")]
    inputs = testing.recurrence_inputs(cell, *shape, input_size=20, control=True, detach=True)
    options = testing.recurrence_options(cell, *shape[1:], names=names, input_size=20)
    for threads in (1, 2, 3):
        with seqkernels.use_backend("native"), testing.threads(threads), testing.poisoned_empty():
            testing.check_recurrence(inputs, cell=cell, reverse=shape[1] == 9, gates=True, **options)


@pytest.mark.parametrize("isa", extension().isas() if load_error() is None else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_large_weights_and_one_sequence(cell: str, dtype: torch.dtype, isa: str) -> None:
    """The input is packed then, not the weight: whole vectors of steps, parts of them, and more than one panel."""
    hidden = 37
    inputs = (1 << 20) // (CELLS[cell].gates * hidden * dtype.itemsize) + 3
    for steps, reverse, layout in ((2, False, "contiguous"), (20, True, "strided"), (83, False, "transposed")):
        drawn = testing.recurrence_inputs(cell, steps, 1, hidden, dtype, input_size=inputs, layout=layout)
        weights = testing.recurrence_options(
            cell, 1, hidden, names=("weight_ih", "bias_ih"), input_size=inputs, dtype=dtype
        )
        with seqkernels.use_backend("native"), testing.force_isa(isa), testing.threads(1 + steps % 2):
            testing.check_recurrence(drawn, cell=cell, reverse=reverse, **weights)
