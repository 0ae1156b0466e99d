"""Errors of recurrences and attention against float64, as a page: ``python -m benchmarks.errors``.

Layers of seqkernels and of torch run on the same inputs and weights, forward and backward, and their results are
compared with those of torch's layer in float64; attention likewise. An error is given as the largest one and as the
root mean square, both over the largest absolute value of the tensor, and the largest one in units in the last place
(ulp) of that value. For a layer each is the worst over the tensors of a call: output and last states, or gradients of
input, weights and biases.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import seqkernels
from seqkernels.backends.native.extension import extension, load_error
from seqkernels.ops.attention import attention
from seqkernels.testing import torch_attention

from . import workloads
from .cases import GATES, Recurrence
from .report import COLORS, Table, render

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "errors.json"
STEPS = (1, 16, 256, 4096)
BATCH, SIZE = 4, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PROVIDERS = ("torch", "native", "numba")

LENGTHS = (64, 512, 4096)
HEAD = 64
ATTENTION_DTYPES = DTYPES[:3]
ATTENTION_PROVIDERS = PROVIDERS[:2]
FORMS = {
    "full": "every query reads every key",
    "causal": "query i reads keys 0..i",
    "padding mask": "a boolean mask keeps the first three quarters of the keys",
    "bias": "an additive bias of each query and key, with its gradient",
    "GQA": "two query heads read one key head",
    "window": "causal, and no further back than a quarter of the keys",
    "ALiBi": "causal, with a slope of 1/16",
    "softcap": "scores within 5",
    "sink": "one more key of score 1, whose value is 0, with the gradient of the score",
    "dropout": "a tenth of the weights dropped, the same ones everywhere",
}

HEADER = """# Errors against float64

Written by `python -m benchmarks.errors`.

*max* and *RMS* are the largest and the root mean square error over the largest value of the tensor; *ulp* is the
largest error in units in the last place of that value.
"""

RECURRENCES = """## Recurrences

A layer with B = {batch} and I = H = {size}, forward and backward, and torch's own layer in the same dtype; both
against torch's layer in float64 on the same numbers. float64 itself is compared with torch's float64: its columns say
how far two equally good computations are apart. Each error is the worst over the tensors of a call: outputs are the
output and the last states, gradients those of input, weights and biases.

The derivative of ReLU jumps at 0. In 16 bits a few pre-activations of `rnn_relu` are rounded to the other side, whoever
computes them, and the largest error of the gradients is then that of the jump.
"""

ATTENTION = """## Attention

One head (GQA: two) of size {size}, N queries and keys, standard normal values and gradient of the output. Torch's own
is `F.scaled_dot_product_attention` in the same dtype, with a mask where it has no option; softcap, sink and dropout it
does not have, and they are the formula with scores and softmax in float32 and weights rounded to the dtype. The
log-sum-exp (lse), which it does not return, is float32 and computed from all scores. The oracle is the same in float64
on the same numbers. Of the gradient of a sink, float32 as well, the units in the last place are those of the dtype.
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
    """What was found for a tensor, or for several of a call.

    Attributes:
        dtype: of the call.
        length: of the sequences.
        results: which tensors.
        errors: by provider, those that could run.
    """

    dtype: torch.dtype
    length: int
    results: str
    errors: dict[str, Error]


def error(results: Iterable[Tensor], exact: Iterable[Tensor], dtype: torch.dtype | None = None) -> Error:
    """The errors of `results`.

    Args:
        results: tensors of one dtype.
        exact: the same in float64.
        dtype: whose units in the last place to count; that of the results by default.

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
        ulp = torch.finfo(dtype or ours.dtype).eps * 2.0 ** math.floor(math.log2(size))
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
    rows = [Row(case.dtype, case.steps, name, {}) for name in ("outputs", "gradients")]
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


def measure_attention(form: str, length: int) -> list[Row]:
    """The errors of torch and, where it is built, of native on a form of attention, in every dtype, of every result.

    Args:
        form: of `FORMS`.
        length: N.
    """
    rows = []
    exact: dict[str, Tensor] = {}
    for dtype in ATTENTION_DTYPES:
        if dtype != torch.float16:
            # Both dtypes of 16 bits get the same values.
            exact = _attend(torch_attention, form, length, dtype, torch.float64)
        found = {"torch": _attend(torch_attention, form, length, dtype, dtype)}
        if load_error() is None:
            with seqkernels.use_backend("native"):
                found["native"] = _attend(attention, form, length, dtype, dtype)
        for name, oracle in exact.items():
            # The gradient of a sink is float32 like the sink, but made of rows that were rounded to `dtype`.
            unit = dtype if name == "dsink" else None
            errors = {provider: error([results[name]], [oracle], unit) for provider, results in found.items()}
            rows.append(Row(dtype, length, name, errors))
    return rows


def _attend(
    function: Callable[..., tuple[Tensor, Tensor]], form: str, length: int, values: torch.dtype, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Results and gradients in `dtype` for numbers that `values` holds, by name."""
    generator = torch.Generator().manual_seed(length)

    def randn(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        # bfloat16 has the fewer digits, float16 the smaller range.
        return (x if values == torch.float32 else x.bfloat16().half()).to(dtype)

    heads = 2 if form == "GQA" else 1
    inputs = {"q": randn(1, heads, length, HEAD), "k": randn(1, 1, length, HEAD), "v": randn(1, 1, length, HEAD)}
    grad = randn(1, heads, length, HEAD)
    options: dict[str, Any] = {}
    if form in ("causal", "window", "ALiBi"):
        options["is_causal"] = True
    if form == "padding mask":
        options["mask"] = (torch.arange(length) < 3 * length // 4).view(1, 1, 1, length)
    elif form == "bias":
        inputs["bias"] = randn(1, heads, length, length)
    elif form == "window":
        options["left"] = length // 4
    elif form == "ALiBi":
        options["alibi_slopes"] = torch.full((heads,), 1 / 16)
    elif form == "softcap":
        options["softcap"] = 5.0
    elif form == "sink":
        inputs["sink"] = torch.ones(heads, dtype=torch.promote_types(dtype, torch.float32))
    elif form == "dropout":
        options |= {"dropout_p": 0.1, "seed": torch.tensor(length)}
    for x in inputs.values():
        x.requires_grad_()
    out, lse = function(**inputs, **options)
    grads = torch.autograd.grad(out, list(inputs.values()), grad)
    return {"out": out.detach(), "lse": lse.detach()} | {f"d{name}": x for name, x in zip(inputs, grads, strict=True)}


def table(title: str, letter: str, providers: Sequence[str], rows: Iterable[Row]) -> Table:
    """`rows`, with max, RMS and ulp of each of `providers`; `letter` is the length's."""
    lines = []
    for row in rows:
        line = [str(row.dtype).removeprefix("torch."), str(row.length), row.results]
        for provider in providers:
            found = row.errors.get(provider)
            line += ["-"] * 3 if found is None else [f"{found.largest:.1e}", f"{found.rms:.1e}", f"{found.ulp:.1f}"]
        lines.append(line)
    numbers = [f"{provider} {what}" for provider in providers for what in ("max", "RMS", "ulp")]
    return Table(title, ("dtype", letter, "of", *numbers), lines, frozenset({0, 2}))


def _packed(rows: Iterable[Row]) -> list[list[Any]]:
    def rounded(found: Error) -> list[float]:
        return [float(f"{number:.3g}") for number in found]

    return [
        [str(row.dtype).removeprefix("torch."), row.length, row.results, {k: rounded(v) for k, v in row.errors.items()}]
        for row in rows
    ]


def _rows(packed: Iterable[Sequence[Any]]) -> list[Row]:
    return [
        Row(getattr(torch, dtype), length, results, {provider: Error(*found) for provider, found in errors.items()})
        for dtype, length, results, errors in packed
    ]


def page(data: dict[str, Any]) -> str:
    """The page of what `main` keeps as JSON."""
    parts = [HEADER]
    if data["recurrences"]:
        parts.append(RECURRENCES.format(batch=BATCH, size=SIZE))
    for cell, rows in data["recurrences"].items():
        parts.append(render(table(cell, "T", PROVIDERS, _rows(rows)), markdown=True))
    if data["attention"]:
        parts.append(ATTENTION.format(size=HEAD))
    for form, rows in data["attention"].items():
        found = table(f"{form}: {FORMS[form]}", "N", ATTENTION_PROVIDERS, _rows(rows))
        parts.append(render(found, markdown=True))
    parts.append("torch {torch}, seqkernels {seqkernels}, {instruction_set}.".format(**data["software"]))
    parts += [f"{name} has no errors where it cannot run: {reason}." for name, reason in data["missing"].items()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def plot(data: dict[str, Any], path: Path) -> None:
    """Draw the RMS errors of each cell's outputs and gradients against the number of steps, a panel for each dtype."""
    from matplotlib.figure import Figure

    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    figure = Figure(figsize=(11, 2.6 * len(data["recurrences"])), layout="constrained")
    panels = figure.subplots(len(data["recurrences"]), len(dtypes), sharex=True, squeeze=False)
    for (cell, packed), line in zip(data["recurrences"].items(), panels, strict=True):
        for dtype, panel in zip(dtypes, line, strict=True):
            for provider in PROVIDERS:
                for results, style in (("outputs", "-"), ("gradients", "--")):
                    rows = [row for row in packed if (row[0], row[2]) == (dtype, results) and provider in row[3]]
                    if rows:
                        lengths, found = [row[1] for row in rows], [row[3][provider][1] for row in rows]
                        label = f"{provider}, {results}"
                        panel.plot(lengths, found, style, marker=".", color=COLORS.get(provider, "black"), label=label)
            panel.set(xscale="log", yscale="log", title=f"{cell}, {dtype}")
            panel.title.set_fontsize(9)
            panel.grid(alpha=0.3)
        line[0].set_ylabel("RMS error")
    for panel in panels[-1]:
        panel.set_xlabel("T")
    panels[0][0].legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the errors, keep them as JSON and write the page of them."""
    parser = argparse.ArgumentParser(description="Write the errors against float64 as a page.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "errors.md", help="the page (%(default)s)")
    parser.add_argument("--json", type=Path, default=KEPT, help="what the page is made of (%(default)s)")
    parser.add_argument("--page", action="store_true", help="write the page of the JSON that is there, measure nothing")
    parser.add_argument("--cells", nargs="*", choices=GATES, default=list(GATES), help="which cells (all)")
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS), help="lengths of sequences (%(default)s)")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS), help="of attention (all)")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(LENGTHS), help="queries and keys of attention (%(default)s)"
    )
    parser.add_argument("--allow-missing", action="store_true", help="go on where the compiled module is missing")
    options = parser.parse_args(arguments)
    for name in ("steps", "lengths"):
        if min(getattr(options, name)) < 1:
            parser.error(f"--{name}: at least 1 each, not {min(getattr(options, name))}")
    if not options.page:
        if load_error() is not None and not options.allow_missing:
            parser.error(f"native has no errors to show ({load_error()}); build it, or pass --allow-missing")
        data = _measured(options.cells, options.steps, options.forms, options.lengths)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(_lines(data))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(json.loads(options.json.read_text())))
    print(options.output)
    return 0


def _measured(
    cells: Sequence[str], steps: Sequence[int], forms: Sequence[str], lengths: Sequence[int]
) -> dict[str, Any]:
    missing: dict[str, str] = {}
    recurrences: dict[str, Any] = {}
    for cell in tqdm(cells, desc="errors", unit="cell"):
        rows = []
        for dtype in DTYPES:
            for length in steps:
                found, reasons = measure(Recurrence(cell, length, BATCH, SIZE, SIZE, dtype=dtype))
                rows += found
                # "backend 'name' cannot run <call>: <reason>"
                missing |= {provider: reason.partition(": ")[2] for provider, reason in reasons.items()}
        recurrences[cell] = _packed(rows)
    attention: dict[str, Any] = {}
    for form in tqdm(forms, desc="errors", unit="form"):
        rows = [row for length in lengths for row in measure_attention(form, length)]
        rows.sort(key=lambda row: ATTENTION_DTYPES.index(row.dtype))
        attention[form] = _packed(rows)
    isa = extension().isa() if load_error() is None else "no compiled module"
    software = {"torch": str(torch.__version__), "seqkernels": seqkernels.__version__, "instruction_set": isa}
    return {"software": software, "missing": missing, "recurrences": recurrences, "attention": attention}


def _lines(data: dict[str, Any]) -> str:
    """JSON with a line for each row, so that a change of one is a change of one line."""
    text = json.dumps(data)
    return re.sub(r"(?<=[\[\]]), (?=\[\")|(?<=\[)(?=\[\")", lambda match: match[0].rstrip() + "\n", text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
