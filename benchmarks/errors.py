"""Errors of the recurrences against float64, as a page: ``python -m benchmarks.errors``.

Layers of seqkernels and of torch run on the same inputs and weights, forward and backward, and their results are
compared with those of torch's layer in float64. An error is given as the largest one and as the root mean square, both
over the largest absolute value of the tensor, and the largest one in units in the last place (ulp) of that value; each
is the worst over the tensors of a call: output and last states, or gradients of input, weights and biases.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import seqkernels
from seqkernels.backends.native.extension import extension, load_error

from . import workloads
from .cases import GATES, Recurrence
from .report import Table, render

ROOT = Path(__file__).resolve().parents[1]
STEPS = (1, 16, 256, 4096)
BATCH, SIZE = 4, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PROVIDERS = ("torch", "native", "numba")

HEADER = """# Errors of the recurrences

Written by `python -m benchmarks.errors`.

A layer with B = {batch} and I = H = {size}, forward and backward, and torch's own layer in the same dtype; both
against torch's layer in float64 on the same numbers. float64 itself is compared with torch's float64: its columns say
how far two equally good computations are apart. *max* and *RMS* are the largest and the root mean square error over
the largest value of the tensor; *ulp* is the largest error in units in the last place of that value. Each is the
worst over the tensors of a call: outputs are the output and the last states, gradients those of input, weights and
biases.

The derivative of ReLU jumps at 0. In 16 bits a few pre-activations of `rnn_relu` are rounded to the other side, whoever
computes them, and the largest error of the gradients is then that of the jump.
"""


class Error(NamedTuple):
    """Errors of results, the worst over their tensors.

    Attributes:
        largest: largest error over the largest absolute value of the tensor.
        rms: root mean square of the error over the same.
        ulp: largest error in units in the last place of the largest value.
    """

    largest: float
    rms: float
    ulp: float


class Row(NamedTuple):
    """What was found for a layer, forward or backward.

    Attributes:
        case: the layer.
        results: ``"outputs"`` or ``"gradients"``.
        errors: by provider, those that could run.
    """

    case: Recurrence
    results: str
    errors: dict[str, Error]


def error(results: Iterable[Tensor], exact: Iterable[Tensor]) -> Error:
    """The errors of `results`.

    Args:
        results: tensors of one dtype.
        exact: the same in float64.

    Raises:
        ValueError: a result is not finite, or results differ in number.
    """
    found = []
    for index, (ours, oracle) in enumerate(zip(results, exact, strict=True)):
        difference = (ours.double() - oracle).abs()
        largest, size = difference.max().item(), oracle.abs().max().item()
        if not math.isfinite(largest):
            raise ValueError(f"result {index}: not finite")
        if size == 0:
            found.append((0.0, 0.0, 0.0) if largest == 0 else (math.inf, math.inf, math.inf))
            continue
        ulp = torch.finfo(ours.dtype).eps * 2.0 ** math.floor(math.log2(size))
        found.append((largest / size, difference.square().mean().sqrt().item() / size, largest / ulp))
    return Error(*map(max, zip(*found, strict=True)))


def measure(case: Recurrence) -> tuple[list[Row], dict[str, str]]:
    """The errors of every provider on `case`, outputs and gradients, and why a provider could not run it."""

    def run(provider: str, dtype: torch.dtype) -> list[Tensor]:
        workload = workloads.build(case, "forward_backward", provider, dtype)
        with workload.context():
            return [result.detach() for result in workload.run()]

    exact = run("torch", torch.float64)
    outputs = 3 if case.cell == "lstm" else 2
    rows = [Row(case, "outputs", {}), Row(case, "gradients", {})]
    reasons = {}
    for provider in PROVIDERS:
        if provider == "torch" and case.dtype == torch.float64:
            continue
        try:
            results = run(provider, case.dtype)
        except seqkernels.BackendError as reason:
            reasons[provider] = str(reason)
            continue
        rows[0].errors[provider] = error(results[:outputs], exact[:outputs])
        rows[1].errors[provider] = error(results[outputs:], exact[outputs:])
    return rows, reasons


def table(cell: str, rows: Iterable[Row]) -> Table:
    """The rows of one cell: max, RMS and ulp of each provider."""
    lines = []
    for row in rows:
        line = [str(row.case.dtype).removeprefix("torch."), str(row.case.steps), row.results]
        for provider in PROVIDERS:
            found = row.errors.get(provider)
            line += ["-"] * 3 if found is None else [f"{found.largest:.1e}", f"{found.rms:.1e}", f"{found.ulp:.1f}"]
        lines.append(line)
    numbers = [f"{provider} {what}" for provider in PROVIDERS for what in ("max", "RMS", "ulp")]
    return Table(cell, ("dtype", "T", "of", *numbers), lines, frozenset({0, 2}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the errors and write the page."""
    parser = argparse.ArgumentParser(description="Write the errors of the recurrences against float64 as a page.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "errors.md", help="the page (%(default)s)")
    parser.add_argument("--cells", nargs="+", choices=GATES, default=list(GATES), help="which cells (all)")
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS), help="lengths of sequences (%(default)s)")
    parser.add_argument("--allow-missing", action="store_true", help="go on where the compiled module is missing")
    options = parser.parse_args(arguments)
    if min(options.steps) < 1:
        parser.error(f"--steps: at least 1 each, not {min(options.steps)}")
    if load_error() is not None and not options.allow_missing:
        parser.error(f"native has no errors to show ({load_error()}); build it, or pass --allow-missing")

    cases = [
        Recurrence(cell, steps, BATCH, SIZE, SIZE, dtype=dtype)
        for cell in options.cells
        for dtype in DTYPES
        for steps in options.steps
    ]
    rows: list[Row] = []
    reasons: dict[str, str] = {}
    for case in tqdm(cases, desc="errors", unit="layer"):
        found, missing = measure(case)
        rows += found
        # "backend 'name' cannot run <call>: <reason>"
        reasons |= {provider: reason.partition(": ")[2] for provider, reason in missing.items()}

    isa = extension().isa() if load_error() is None else "no compiled module"
    parts = [HEADER.format(batch=BATCH, size=SIZE)]
    parts += [render(table(cell, [r for r in rows if r.case.cell == cell]), markdown=True) for cell in options.cells]
    parts.append(f"torch {torch.__version__}, seqkernels {seqkernels.__version__}, {isa}.")
    parts += [f"{provider} has no errors where it cannot run: {reason}." for provider, reason in reasons.items()]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
