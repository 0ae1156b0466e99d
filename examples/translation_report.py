"""What came out of a comparison of translators: accuracy, examples, and a picture."""

from __future__ import annotations

import difflib
import itertools
import random
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from cldr import Pair
from torch import Tensor


def print_accuracy(pairs: list[Pair], found: dict[str, list[str]]) -> None:
    """Print how many translations are exact, in all and by kind, and how similar they are on average.

    Args:
        pairs: what was to be translated.
        found: for each model its translations of `pairs`.
    """
    for name, texts in found.items():
        exact: dict[str, list[bool]] = {}
        similar = 0.0
        for pair, text in zip(pairs, texts, strict=True):
            exact.setdefault(pair.kind, []).append(text == pair.target)
            similar += difflib.SequenceMatcher(None, text, pair.target, autojunk=False).ratio()
        right = sum(map(sum, exact.values())) / len(pairs)
        kinds = ", ".join(f"{kind} {sum(hits) / len(hits):.0%}" for kind, hits in sorted(exact.items()))
        print(f"{name:>13}: {right:.1%} exact ({kinds}), similarity of characters {similar / len(pairs):.1%}")


def print_examples(pairs: list[Pair], found: dict[str, list[str]], count: int = 10) -> None:
    """Print random pairs with the translations of each model; ``=`` marks the exact ones.

    Args:
        pairs: what was to be translated.
        found: for each model its translations of `pairs`.
        count: how many to print.
    """
    numbers = random.Random(1).sample(range(len(pairs)), min(count, len(pairs)))
    rows = [("English", "CLDR", *found)]
    for i in numbers:
        texts = (("= " if texts[i] == pairs[i].target else "  ") + texts[i] for texts in found.values())
        rows.append((f"{pairs[i].language}  {pairs[i].source}", pairs[i].target, *texts))
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    for row in rows:
        print("".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def draw(
    path: Path,
    curves: dict[str, tuple[list[float], list[float]]],
    alignment: Tensor,
    source: list[str],
    translation: list[str],
) -> None:
    """Draw the losses of the models against time, and an alignment as a heat map.

    Args:
        path: of the picture; its folder is made.
        curves: for each model the seconds and the loss of each epoch.
        alignment: (M, N), the weights of the N tokens of `source` for each of the M of `translation`.
        source: what was translated, as tokens.
        translation: into what, as tokens.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for style, (name, (seconds, losses)) in zip(("o-", "s--"), curves.items(), strict=True):
        left.plot(list(itertools.accumulate(seconds)), losses, style, label=name, markersize=4)
    left.set(xlabel="seconds of training", ylabel="training loss per token", title="Same model, same batches")
    left.legend()
    left.grid(alpha=0.3)
    image = right.imshow(alignment.numpy(), cmap="magma_r", aspect="auto", vmin=0, vmax=1)
    figure.colorbar(image, label="weight")
    right.set_xticks(range(len(source)), source, rotation=60)
    right.set_yticks(range(len(translation)), translation)
    right.set(xlabel="source", ylabel="translation", title="Alignment of a held-out name")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
