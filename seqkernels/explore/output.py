"""What `explore` returns as JSON, as tables and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .models import Exploration, Quantities, Section

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_NEEDS = "pip install 'seqkernels[examples]' has it"
_CELLS_WITH_NUMBERS = 64


def as_json(found: Exploration) -> str:
    """All numbers of an `Exploration`, with where each is from, as JSON."""

    def plain(quantities: Quantities) -> dict[str, Any]:
        return {n: {"values": _finite(q.values.tolist()), "source": q.source} for n, q in quantities.items()}

    content = {
        "tokens": found.tokens,
        "vocabulary": found.vocabulary,
        "seed": found.seed,
        "is_causal": found.is_causal,
        "dtype": _dtype(found),
        "parameters": {name: x.tolist() for name, x in found.parameters.items()},
        "models": {
            section.model: {
                "ran": section.ran,
                "steps": [plain(step) for step in section.steps],
                **plain(section.whole),
            }
            for section in found.sections
        },
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


def _finite(values: Any) -> Any:
    """Numbers in lists, with ``None`` for a score that was masked: JSON has no infinity."""
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return None if values == float("-inf") else values


def _dtype(found: Exploration) -> str:
    return str(found.parameters["embedding"].dtype).removeprefix("torch.")


def numbers(x: Tensor, width: int = 0) -> list[str]:
    """The rows of a matrix, or the one of a vector, as torch prints them: four digits, in brackets, equally wide."""
    rows = [[f"{value:.4f}" for value in row] for row in (x if x.dim() == 2 else x.unsqueeze(0)).tolist()]
    width = max(width, *(len(text) for row in rows for text in row))
    return [f"[{', '.join(text.rjust(width) for text in row)}]" for row in rows]


def show(found: Exploration, console: Console | None = None) -> None:
    """Print tables of an `Exploration`.

    Args:
        found: what `explore` returned.
        console: of rich; by default one for the standard output, as wide as the terminal, or 80 columns in a pipe.

    Raises:
        ImportError: there is no rich.
    """
    console = console or _console()
    for part in _parts(found):
        console.print(part, markup=False, emoji=False, highlight=False)  # tokens are no markup


def _console() -> Console:
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError(f"tables are drawn by rich: {error}; {_NEEDS}") from error
    return Console()


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _words(name: str) -> str:
    return name.replace("_", " ")


def _parts(found: Exploration) -> Iterator[Any]:
    yield f"{' '.join(found.tokens)}    (seed {found.seed}, {_dtype(found)}, no biases)"
    yield (
        "Where numbers are from: kernel, a result of the implementation that ran; derived, computed beside it; drawn,"
        " an input."
    )
    yield ""
    yield "Embeddings: a vector for each different token"
    rows = zip(
        found.vocabulary, map(str, found.vocabulary.values()), numbers(found.parameters["embedding"]), strict=True
    )
    yield _table(("token", "number", "vector"), rows)
    for section in found.sections:
        yield f"\n=== {_TITLES[section.model]} ===\n{section.about}"
        if section.model == "attention":
            yield from _attention_parts(found, section.whole)
        for t, step in enumerate(section.steps):
            yield f"\nStep {t + 1}: {found.tokens[t]!r}"
            yield _step_table(step)
        if section.steps:
            yield "\nIn the end"
            yield _step_table(section.whole)
        yield "\n" + "\n".join(f"ran: {line}" for line in section.ran)


_TITLES = {
    "rnn": "RNN (recurrent neural network)",
    "lstm": "LSTM (long short-term memory)",
    "gru": "GRU (gated recurrent unit)",
    "attention": "Self-attention (the heart of the transformer)",
}


def _step_table(quantities: Quantities) -> Table:
    width = max(len(text) for x in quantities.values() for text in numbers(x.values)[0][1:-1].split(", "))
    rows = [(_words(n), numbers(x.values, width)[0], x.source, x.meaning) for n, x in quantities.items()]
    return _table(("", "numbers", "from", "what it is"), rows)


def _attention_parts(found: Exploration, whole: Quantities) -> Iterator[Any]:
    labels = [f"{i + 1} {token}" for i, token in enumerate(found.tokens)]
    for group in (("queries", "keys", "values"), ("scores",), ("lse", "weights"), ("output",)):
        columns = [numbers(whole[name].values.view(len(labels), -1)) for name in group]
        rows = [[label, *row] for label, *row in zip(labels, *columns, strict=True)]
        heads = ["token", *(_words(name) for name in group)]
        if group[-1] in ("scores", "weights"):
            heads[-1] += f" of {', '.join(found.tokens)}"
        if group[-1] == "weights":
            heads.append("reads most of")
            best = whole["weights"].values.max(1)
            for row, weight, key in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
                row.append(f"{labels[key]} ({100 * weight:.0f}%)")
        yield "\n" + "\n".join(f"{_words(name)} ({whole[name].source}): {whole[name].meaning}" for name in group)
        yield _table(heads, rows)


def picture(found: Exploration, path: str) -> None:
    """Gates, states and attention weights as heat maps, in one PNG.

    Args:
        found: what `explore` returned.
        path: of the file to write.

    Raises:
        ImportError: there is no matplotlib.
        OSError: it cannot be written there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures are drawn by matplotlib: {error}; {_NEEDS}") from error
    panels = [_panels(section) for section in found.sections]
    columns = max(map(len, panels))
    across = min(max(1.7, 0.45 * len(found.tokens)), 8.0)
    heights = [1.2 + min(4.0, 0.3 * max(x.shape[0] for x in row.values())) for row in panels]
    figure = Figure(figsize=(1.5 + columns * across, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, section, row in zip(parts, found.sections, panels, strict=True):
        part.suptitle(_TITLES[section.model], fontsize=10, x=0.01, ha="left")
        axes = part.subplots(1, columns, squeeze=False)[0]
        for unused in axes[len(row) :]:
            unused.set_axis_off()
        largest = max(x[x.isfinite()].abs().max().item() for name, x in row.items() if name not in _SHARES)
        scales = {}
        for axis, (name, values) in zip(axes, row.items(), strict=False):
            image = _heat_map(axis, values, found.tokens, 0.0 if name in _SHARES else largest)
            axis.set_title(_words(name), fontsize=9)
            if name in _OF_QUERIES:
                axis.set_yticks(range(len(found.tokens)), found.tokens, fontsize=8, parse_math=False)
            scales[name in _SHARES] = image
        for _, image in sorted(scales.items()):
            part.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
    figure.savefig(path, format="png", dpi=150)


#: Heat maps of each model.
_PANELS = {
    "rnn": ("input", "input_contribution", "memory_contribution", "state"),
    "lstm": ("input_gate", "forget_gate", "candidate", "output_gate", "cell", "state"),
    "gru": ("reset_gate", "update_gate", "candidate", "kept_part", "new_part", "state"),
    "attention": ("queries", "keys", "values", "scores", "weights", "output"),
}
#: From 0 to 1.
_SHARES = ("input_gate", "forget_gate", "output_gate", "reset_gate", "update_gate", "weights")
#: Rows are queries in place of units.
_OF_QUERIES = ("scores", "weights")


def _panels(section: Section) -> dict[str, Tensor]:
    """Values of the heat maps of a model: units, or queries, by tokens."""
    if section.steps:
        return {n: torch.stack([step[n].values for step in section.steps], 1) for n in _PANELS[section.model]}
    values = {name: section.whole[name].values for name in _PANELS[section.model]}
    return {name: x if name in _OF_QUERIES else x.t() for name, x in values.items()}


def _heat_map(axis: Any, values: Tensor, tokens: Sequence[str], largest: float) -> Any:
    """From 0 to 1 in shades, or, where there is a `largest` number of either sign, in two colours."""
    shown = values.double().masked_fill(~values.isfinite(), torch.nan).numpy()
    low, high = (-largest, largest) if largest else (0.0, 1.0)
    image = axis.imshow(shown, cmap="RdBu_r" if largest else "viridis", vmin=low, vmax=high, aspect="auto")
    rotation = 90 if max(map(len, tokens)) > 4 else 0
    axis.set_xticks(range(len(tokens)), tokens, fontsize=8, rotation=rotation, parse_math=False)
    axis.set_yticks([])
    if shown.size <= _CELLS_WITH_NUMBERS:
        for (i, j), value in np.ndenumerate(shown):
            light = value < 0.6 if not largest else abs(value) > 0.6 * largest
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if light else "black")
    return image
