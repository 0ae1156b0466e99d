"""Train a GPT on Python's standard library twice, with the attention of torch and with that of seqkernels, and compare.

The model is `seqkernels.models.GPT`, the text is in ``stdlib_text.py``. Both models start from the same weights and see
the same batches; they train by turns, so that whatever else the machine does slows both, and so they generate.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from pathlib import Path

import stdlib_text
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import seqkernels
from seqkernels.models import GPT, GPTConfig

LAYERS = {"torch.nn": torch.nn, "seqkernels.nn": seqkernels.nn}
RATE, BATCH, TURN = 3e-3, 4, 20
PROMPT = "class Queue:\n    def __init__(self, maxsize):\n"


def loss_of(model: GPT, batch: Tensor) -> Tensor:
    """Mean cross entropy of each next token."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class Run:
    """A training, and what it gave: loss and seconds of each turn, tokens per second of each generation."""

    def __init__(self, name: str, config: GPTConfig, steps: int) -> None:
        torch.manual_seed(0)
        self.name, self.model = name, GPT(config, LAYERS[name])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) * 10 / steps, (1 + math.cos(math.pi * min(1, step / steps))) / 2),
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.speeds: list[float] = []

    def train(self, batches: list[Tensor]) -> None:
        """One turn."""
        begin, total = time.perf_counter(), 0.0
        for batch in batches:
            self.optimizer.zero_grad()
            loss = loss_of(self.model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            total += loss.item()
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(total / len(batches))

    def generate(self, tokens: Tensor, steps: int) -> Tensor:
        """The likeliest continuation of `tokens`, from a cache."""
        begin = time.perf_counter()
        found = self.model.generate(tokens, steps)
        self.speeds.append(len(tokens) * steps / (time.perf_counter() - begin))
        return found


def train(runs: list[Run], data: Tensor, steps: int) -> None:
    """Train both by turns of `TURN` steps."""
    context, generator = runs[0].model.config.context, torch.Generator().manual_seed(0)
    for run in runs:  # the first calls load or compile kernels
        loss_of(run.model, stdlib_text.draw_batch(data, BATCH, context, torch.Generator())).backward()
    with tqdm(total=steps, unit="step") as bar:
        for turn, begin in enumerate(range(0, steps, TURN)):
            count = min(TURN, steps - begin)
            batches = [stdlib_text.draw_batch(data, BATCH, context, generator) for _ in range(count)]
            for run in runs[:: 1 if turn % 2 == 0 else -1]:
                run.train(batches)
            bar.update(count)
            bar.set_postfix({run.name: f"{run.losses[-1]:.3f}, {run.seconds[-1]:.1f} s" for run in runs})


@torch.no_grad()
def held_out_loss(model: GPT, data: Tensor, count: int) -> float:
    """Mean loss on `count` batches of held-out text, always the same ones."""
    context, generator = model.config.context, torch.Generator().manual_seed(1)
    batches = (stdlib_text.draw_batch(data, BATCH, context, generator) for _ in range(count))
    return statistics.mean(loss_of(model, batch).item() for batch in batches)


def draw(runs: list[Run], path: Path) -> None:
    """Draw the losses against turns and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for style, run in zip(("-", "--"), runs, strict=True):
        panels[0].plot(run.losses, style, label=run.name)
        panels[1].plot(list(itertools.accumulate(run.seconds)), run.losses, style, label=run.name)
    panels[0].set(xlabel=f"turns of {TURN} steps", ylabel="training loss per token")
    panels[1].set(xlabel="seconds")
    panels[1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Train both, compare, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of training, of each model (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of a small model: does it run")
    parser.add_argument("--picture", type=Path, default=Path("report/gpt.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    quick, full = (40, 400, 32, 48, 30), (1, 2048, 192, 512, options.steps)
    every, vocab_size, size, context, steps = quick if options.quick else full
    tokenizer, data, held_out = stdlib_text.load(every, vocab_size)
    config = GPTConfig(vocab_size, context, size, num_layers=4, num_heads=size // 32)
    theirs, ours = runs = [Run(name, config, steps) for name in LAYERS]
    print(f"{len(data)} tokens of {vocab_size}, {len(held_out)} more held out, {torch.get_num_threads()} threads")
    print(f"{sum(p.numel() for p in ours.model.parameters())} parameters, {steps} steps of {BATCH} x {context} tokens")
    train(runs, data, steps)
    losses = [held_out_loss(run.model.eval(), held_out, 2 if options.quick else 20) for run in runs]

    theirs.model.load_state_dict(ours.model.state_dict())
    gap = abs(held_out_loss(theirs.model, held_out, 1) - held_out_loss(ours.model, held_out, 1))
    prompt = torch.tensor([tokenizer.encode(PROMPT).ids])
    new = min(256, context - prompt.shape[1])
    for turn in range(4):
        texts = [run.generate(prompt.expand(8, -1), new) for run in runs[:: 1 if turn % 2 == 0 else -1]]
    print(f"{'':14}{'training: s':>12}{'tokens/s':>10}{'loss':>8}{'held-out':>10}{'generation: tokens/s':>22}")
    for run, loss in zip(runs, losses, strict=True):
        seconds = sum(run.seconds)
        columns = f"{seconds:>12.2f}{steps * BATCH * context / seconds:>10.0f}{run.losses[-1]:>8.4f}{loss:>10.4f}"
        print(f"{run.name:14}{columns}{statistics.median(run.speeds):>22.0f}")
    faster = sum(theirs.seconds) / sum(ours.seconds), statistics.median(ours.speeds) / statistics.median(theirs.speeds)
    print(f"seqkernels.nn trains {faster[0]:.2f} and generates {faster[1]:.2f} times as fast.")
    print(f"At equal weights held-out losses differ by {gap:.1e}; generated texts are equal: {torch.equal(*texts)}.")
    sample = ours.model.generate(prompt, new, temperature=0.8, top_k=50, generator=torch.Generator().manual_seed(0))
    draw(runs, options.picture)
    print(f"\n{tokenizer.decode(sample[0].tolist())}\n\nLosses: {options.picture}")


if __name__ == "__main__":
    main()
