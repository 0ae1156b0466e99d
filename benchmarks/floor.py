"""What each case of ``make gpu-bench`` must do and what the kernels do: ``python -m benchmarks.floor``.

From shapes and tiles alone, without a GPU. The floor is the larger of the time of the useful products at the rate of
the tensor cores (float32: of the other cores, since those products round as IEEE asks) and of the compulsory bytes at
the rate of the memory, both those of NVIDIA's data sheet of the H100 SXM5. What kernels read again comes from the
second level cache where it fits. A recurrence's floor says nothing of its steps, which wait for each other.
"""

from __future__ import annotations

import sys
from math import ceil
from typing import NamedTuple

import torch

from seqkernels.backends.triton.configs import FEW_ROWS, blocks_of
from seqkernels.backends.triton.recurrence_configs import MOST_HIDDEN, sequence_tiles
from seqkernels.cells import CELLS

from .cases import Attention, Case, Mode, Recurrence
from .gpu_cases import CASES

PEAK_TFLOPS = {torch.float16: 989.4, torch.bfloat16: 989.4, torch.float32: 66.9}
BANDWIDTH_TBYTES = 3.35


class Work(NamedTuple):
    """Of one call.

    Attributes:
        flops: useful ones; the backward pass of attention is five products for two of the forward pass.
        bytes: compulsory.
        done_flops: of the kernels.
        moved: bytes that the kernels load and store, from whatever memory.
        floor_ms: milliseconds that an H100 needs at least.
    """

    flops: float
    bytes: float
    done_flops: float
    moved: float
    floor_ms: float


def work(case: Case, mode: Mode) -> Work:
    """What `case` must do and what is done."""
    must = case.flops("forward") * (1.0 if mode == "forward" else 3.5 if isinstance(case, Attention) else 3.0)
    moved, done = _attention(case, mode) if isinstance(case, Attention) else _recurrence(case, mode)
    seconds = max(must / (PEAK_TFLOPS[case.dtype] * 1e12), case.bytes(mode) / (BANDWIDTH_TBYTES * 1e12))
    return Work(must, case.bytes(mode), done, moved, seconds * 1e3)


def _attention(case: Attention, mode: Mode) -> tuple[float, float]:
    """Bytes that are moved and flops that are done; the two passes back compute scores twice, seven products in all."""
    size, item = case.size, case.dtype.itemsize
    forward = case.flops("forward")
    pairs = forward / (4 * size)
    group = case.heads // (case.kv_heads or case.heads)
    rows = case.batch * case.heads * case.queries * size * item
    columns = case.batch * case.heads // group * case.keys * size * item
    many = case.option in ("padding", "bias", "learned", "alibi", "softcap", "dropout")

    def tile(kernel: str) -> tuple[int, int]:
        blocks = blocks_of(kernel, case.dtype, size, size, many_terms=many)
        return blocks.m, blocks.n

    few = case.queries * group <= FEW_ROWS
    shared_by = case.queries * group if few else min(tile("forward")[0], case.queries)
    moved = 2 * rows + pairs / shared_by * 2 * size * item
    done: float = forward
    if mode == "forward_backward":
        moved += 2 * rows  # delta
        moved += 3 * rows + pairs / tile("backward_q")[0] * 2 * size * item
        moved += 4 * columns + pairs / tile("backward_kv")[1] * 2 * size * item
        done += 3.5 * forward
    return moved, done


def _recurrence(case: Recurrence, mode: Mode) -> tuple[float, float]:
    """Bytes that are moved and flops that are done, of all layers and directions."""
    item = case.dtype.itemsize
    gates, states, saved = CELLS[case.cell]
    cells = case.steps * case.batch * case.hidden
    weights = gates * case.hidden**2 * item
    moved = 0.0
    for direction in ("forward", "backward")[: 1 + (mode == "forward_backward")]:
        moved += 2 * gates * cells * item + states * cells * item
        if case.hidden <= MOST_HIDDEN:
            tiles = sequence_tiles(direction, case.cell, case.dtype, case.hidden)
            rows, columns = ceil(case.batch / tiles.rows), ceil(case.hidden / tiles.columns)
            # Each program of some columns reads all that goes into the product.
            moved += columns * cells * item * (1 if direction == "forward" else gates)
            moved += weights * rows * (1 if tiles.resident else case.steps)
        else:
            moved += case.steps * (weights + 2 * gates * case.batch * case.hidden * 4)
        if mode == "forward_backward":
            moved += saved * cells * 4
    count = case.layers * (2 if case.bidirectional else 1)
    return moved * count, case.flops(mode)


def render() -> str:
    """The table of all cases."""
    lines = [f"{'H100 SXM5, by data sheet':62}{'must':>9}{'does':>9}{'must':>10}{'does':>10}{'floor':>11}"]
    lines.append(f"{'':62}{'GFLOP':>9}{'GFLOP':>9}{'MB':>10}{'MB':>10}{'ms':>11}")
    for case in CASES:
        for mode in case.modes:
            found = work(case, mode)
            name = f"{case.name} {mode.replace('_', '+')}"
            flops = f"{found.flops / 1e9:9.1f}{found.done_flops / 1e9:9.1f}"
            lines.append(f"{name:62}{flops}{found.bytes / 1e6:10.1f}{found.moved / 1e6:10.1f}{found.floor_ms:11.4f}")
    return "\n".join(lines)


def main() -> int:
    """Print the table."""
    print(render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
