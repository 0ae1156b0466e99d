"""What came out of ``bert.py``, as a picture."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor


def draw(
    path: Path,
    curves: dict[str, tuple[list[float], list[float]]],
    accuracy: dict[str, float],
    matrix: Tensor,
    packages: list[str],
) -> None:
    """Draw the losses of pretraining against seconds, the accuracies, and a confusion matrix.

    Args:
        path: of the picture; its folder is made.
        curves: for each pretraining the seconds and the loss of each turn.
        accuracy: of each model.
        matrix: (P, P), how many functions of each of the P packages were told to be of each.
        packages: their names.
    """
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for style, (name, (seconds, losses)) in zip(("-", "--"), curves.items(), strict=True):
        left.plot(list(itertools.accumulate(seconds)), losses, style, label=name)
    left.set(xlabel="seconds of pretraining", ylabel="loss per masked token")
    left.legend()
    bars = middle.barh(list(accuracy), [100 * x for x in accuracy.values()])
    middle.bar_label(bars, fmt="%.1f", padding=2)
    middle.invert_yaxis()
    middle.set(xlabel="accuracy on files not seen, %", xlim=(0, 105))
    image = right.imshow((matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy(), cmap="magma_r", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the package's functions")
    right.set_xticks(range(len(packages)), packages, rotation=60, ha="right")
    right.set_yticks(range(len(packages)), packages)
    right.set(xlabel="told", ylabel="package", title="pretrained, seqkernels.nn")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
