"""Pretrain a BERT on masked tokens of Python's standard library, then let it tell the package of a function.

Everything is done twice, with the layers of torch and with those of seqkernels: `seqkernels.models.BERT` from the same
weights on the same batches, by turns, so that whatever else the machine does slows both. Functions to judge by are in
files that no model has seen. What pretraining is good for shows beside models that begin with random weights.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import bert_picture
import stdlib_text
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import seqkernels
from seqkernels.integrations.tokenizers import train_tokenizer
from seqkernels.models import BERT, BERTConfig, mask_tokens

LAYERS = {"torch.nn": torch.nn, "seqkernels.nn": seqkernels.nn}
SPECIAL = ["[PAD]", "[CLS]", "[MASK]"]
TURN = 20
Batch = tuple[Tensor, ...]


def masked_loss(model: BERT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the masked tokens."""
    chosen = targets >= 0
    return F.cross_entropy(model.predict(model.encode(inputs)[chosen]), targets[chosen])


def class_loss(model: BERT, tokens: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the packages."""
    return F.cross_entropy(model.classify(tokens, lengths), targets)


class Run:
    """A training, and what it gave: loss and seconds of each turn."""

    def __init__(self, name: str, model: BERT, rate: float, steps: int) -> None:
        self.name, self.model = name, model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) * 10 / steps, (1 + math.cos(math.pi * min(1, step / steps))) / 2),
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def train(self, loss_of: Callable[..., Tensor], batches: list[Batch]) -> None:
        """One turn."""
        begin, total = time.perf_counter(), 0.0
        for batch in batches:
            self.optimizer.zero_grad()
            loss = loss_of(self.model, *batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            total += loss.item()
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(total / len(batches))


def train(what: str, runs: list[Run], loss_of: Callable[..., Tensor], draw: Callable[[], Batch], steps: int) -> None:
    """Train all by turns of `TURN` steps."""
    with tqdm(total=steps, unit="step", desc=what) as bar:
        for turn, begin in enumerate(range(0, steps, TURN)):
            batches = [draw() for _ in range(min(TURN, steps - begin))]
            for run in runs[:: 1 if turn % 2 == 0 else -1]:
                run.train(loss_of, batches)
            bar.update(len(batches))
            bar.set_postfix_str(", ".join(f"{run.losses[-1]:.3f}" for run in runs))


def pad(rows: list[list[int]], context: int) -> tuple[Tensor, Tensor]:
    """Rows that begin with [CLS], (B, context), and their lengths (B,)."""
    rows = [[1, *row][:context] for row in rows]
    tokens = torch.tensor([row + [0] * (context - len(row)) for row in rows])
    return tokens, torch.tensor([len(row) for row in rows])


@torch.no_grad()
def confusion(model: BERT, tokens: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
    """How many functions of each package are told to be of each, (classes, classes)."""
    parts = zip(tokens.split(64), lengths.split(64), strict=True)
    found = torch.cat([model.eval().classify(*part).argmax(-1) for part in parts])
    classes = model.config.num_classes
    return torch.bincount(targets * classes + found, minlength=classes**2).view(classes, classes)


def main(arguments: list[str] | None = None) -> None:
    """Pretrain, fine-tune, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of pretraining, of each model (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of a small model: does it run")
    parser.add_argument("--picture", type=Path, default=Path("report/bert.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    quick, full = (5, 340, 32, 16, 4, 40, 20), (1, 2048, 128, 128, 16, options.steps, 200)
    every, vocab_size, size, context, batch, steps, tuning = quick if options.quick else full
    library = stdlib_text.read_library(every)
    tokenizer = train_tokenizer(library.texts, "bpe", vocab_size, SPECIAL)
    data = stdlib_text.encode(tokenizer, library.texts)
    config = BERTConfig(
        vocab_size, context, size, 4, size // 32, 0.0, len(library.packages), num_special=len(SPECIAL), mask=2
    )
    labelled = []
    for functions in (library.train, library.held_out):
        rows = [found.ids for found in tokenizer.encode_batch([function.text for function in functions])]
        targets = torch.tensor([library.packages.index(function.package) for function in functions])
        labelled.append((*pad(rows, context), targets))
    (tokens, lengths, targets), held_out = labelled
    generator = torch.Generator().manual_seed(0)

    def draw_masked() -> Batch:
        pieces = stdlib_text.draw_batch(data, batch, context - 1, generator)
        pieces[:, 0] = 1
        return mask_tokens(pieces, config, generator)

    def draw_labelled() -> Batch:
        rows = torch.randint(len(targets), (batch,), generator=generator)
        longest = int(lengths[rows].max())
        return tokens[rows, :longest], lengths[rows], targets[rows]

    def new(name: str) -> BERT:
        torch.manual_seed(0)
        return BERT(config, LAYERS[name])

    pretraining = [Run(name, new(name), 1e-3, steps) for name in LAYERS]
    print(f"{len(data)} tokens of {vocab_size}, {sum(p.numel() for p in pretraining[0].model.parameters())} parameters")
    print(f"{len(targets)} functions to learn from, {len(held_out[2])} in files that are held out, of")
    print(f"{', '.join(library.packages)}; {torch.get_num_threads()} threads")
    for run in pretraining:  # the first calls load or compile kernels
        masked_loss(run.model, *draw_masked()).backward()
    train("pretraining", pretraining, masked_loss, draw_masked, steps)
    fine = [Run(f"pretrained, {run.name}", run.model, 5e-4, tuning) for run in pretraining]
    fine += [Run(f"from scratch, {name}", new(name), 5e-4, tuning) for name in LAYERS]
    train("fine-tuning", fine, class_loss, draw_labelled, tuning)
    matrices = {run.name: confusion(run.model, *held_out) for run in fine}
    accuracy = {name: float(x.diagonal().sum() / x.sum()) for name, x in matrices.items()}
    usual = int(targets.bincount().argmax())
    accuracy[f"always {library.packages[usual]}"] = float((held_out[2] == usual).float().mean())
    print(f"{'':28}{'s':>9}{'last loss':>11}{'held out':>10}")
    for run in pretraining + fine:
        right = f"{accuracy[run.name]:>10.1%}" if run.name in accuracy else ""
        print(f"{run.name:28}{sum(run.seconds):>9.2f}{run.losses[-1]:>11.4f}{right}")
    theirs, ours = (sum(sum(run.seconds) for run in pretraining + fine if key in run.name) for key in LAYERS)
    print(f"Held out, always the most usual package is right in {list(accuracy.values())[-1]:.1%}.")
    print(f"seqkernels.nn is {theirs / ours:.2f} times as fast in all trainings together.")
    curves = {run.name: (run.seconds, run.losses) for run in pretraining}
    bert_picture.draw(options.picture, curves, accuracy, matrices["pretrained, seqkernels.nn"], library.packages)
    print(f"Losses, accuracies, and which package is taken for which: {options.picture}")


if __name__ == "__main__":
    main()
