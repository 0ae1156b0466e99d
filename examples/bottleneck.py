"""The bottleneck of sequence-to-sequence models: what a vector of one size can hold, and what attention adds.

Two `seqkernels.models.Seq2Seq` learn to repeat pieces of Python's standard library (``stdlib_text.py``) of 5 to 97
tokens. In one the decoder has the encoder's last states alone, in the other it attends to all of them; sizes, data and
order are the same. Both see every length in training, so that long pieces are new to neither.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import stdlib_text
import torch
import torch.nn.functional as F
from torch import Tensor

from seqkernels.models import Seq2Seq, Seq2SeqConfig, Training

if __name__ == "bottleneck":
    # Pandas asks for a library of this name, and a program's own folder is the first to be looked in.
    raise ImportError("bottleneck: this is an example, not the library Bottleneck")

SHORTEST, LONGEST = 5, 97
RATE, BATCH = 3e-3, 32
PAD, BOS, EOS = range(3)
KINDS = {"none": "the last state alone", "bilinear": "with attention"}


def draw_pieces(data: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` random pieces of the text, (count, length), ids behind those of the special tokens."""
    return stdlib_text.draw_batch(data, count, length - 1, generator) + EOS + 1


def loss_of(model: Seq2Seq, pieces: Tensor) -> Tensor:
    """Mean cross entropy of the tokens of pieces (B, N) and of their ends."""
    lengths = torch.full((len(pieces),), pieces.shape[1])
    logits = model(pieces, lengths, F.pad(pieces, (1, 0), value=BOS))
    return F.cross_entropy(logits.flatten(0, 1), F.pad(pieces, (0, 1), value=EOS).flatten())


class Run:
    """A training with or without attention."""

    def __init__(self, attention: str, vocab_size: int, size: int, steps: int, data: Tensor) -> None:
        torch.manual_seed(0)
        config = Seq2SeqConfig(
            vocab_size + EOS + 1, size // 2, size, dropout=0.0, pad=PAD, bos=BOS, eos=EOS, attention=attention
        )
        self.name, self.model = KINDS[attention], Seq2Seq(config)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 50) * (1 + math.cos(math.pi * min(1, step / steps))) / 2
        )

        def draw_pieces_of_a_length(generator: torch.Generator) -> Tensor:
            length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
            return draw_pieces(data, length, BATCH, generator)

        self.training = Training(self.model, optimizer, loss_of, draw_pieces_of_a_length, schedule=schedule, clip=1.0)

    def accuracy(self, pieces: Tensor) -> float:
        """Share of the tokens that are repeated at their places, written out token by token."""
        lengths = torch.full((len(pieces),), pieces.shape[1])
        found = self.model.translate(pieces, lengths, max_length=pieces.shape[1])
        pairs = zip(found, pieces.tolist(), strict=True)
        right = sum(a == b for row, piece in pairs for a, b in zip(row, piece, strict=False))
        return right / pieces.numel()


def draw(path: Path, lengths: list[int], accuracies: dict[str, list[float]], runs: list[Run]) -> None:
    """Draw the accuracies against the length, and the losses against the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        left.plot(lengths, accuracies[run.name], "o-", markersize=4, label=run.name)
        means = torch.tensor(run.training.losses).unfold(0, min(50, len(run.training.losses)), 1).mean(1)
        right.plot(means.tolist(), label=run.name)
    left.set(xlabel="tokens of the source", ylabel="tokens repeated at their places", ylim=(0, 1.02))
    right.set(xlabel="steps", ylabel="training loss per token, mean of 50 steps")
    left.legend()
    for panel in (left, right):
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Train both, measure by length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of training, of each model (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of small models: does it run")
    parser.add_argument("--picture", type=Path, default=Path("report/bottleneck.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    every, vocab_size, size, steps = (40, 300, 32, 12) if options.quick else (1, 512, 256, options.steps)
    _, data, held_out = stdlib_text.load(every, vocab_size)
    runs = [Run(attention, vocab_size, size, steps, data) for attention in KINDS]
    for run in runs:
        print(f"{run.name}: {sum(p.numel() for p in run.model.parameters())} parameters")

    for run in runs:
        run.training.run(steps)

    lengths = [*range(SHORTEST, LONGEST, 51 if options.quick else 8), LONGEST]
    generator = torch.Generator().manual_seed(1)
    pieces_of = {length: draw_pieces(held_out, length, 4 if options.quick else 64, generator) for length in lengths}
    accuracies: dict[str, list[float]] = {}
    for run in runs:
        run.model.eval()
        accuracies[run.name] = [run.accuracy(pieces_of[length]) for length in lengths]
    print(
        f"\nTokens repeated at their places, one training of {steps} steps each:\n{'tokens':>8}"
        + "".join(f"{run.name:>24}" for run in runs)
    )
    for number, length in enumerate(lengths):
        print(f"{length:>8}" + "".join(f"{accuracies[run.name][number]:>24.1%}" for run in runs))
    alone, attending = (accuracies[run.name] for run in runs)
    print(
        f"\nFrom {SHORTEST} to {LONGEST} tokens of held-out text, a state of {2 * size} numbers (h and c) goes from"
        f" {alone[0]:.0%} to {alone[-1]:.0%} of the tokens; with attention it is {attending[0]:.0%} and"
        f" {attending[-1]:.0%}."
    )
    draw(options.picture, lengths, accuracies, runs)
    print(f"Accuracy by length: {options.picture}")


if __name__ == "__main__":
    main()
