"""Train GPTs that know places by five kinds of positions on short texts, and read longer ones.

The text is the source of Python's standard library (``stdlib_text.py``). All models see the same pieces of `--length`
tokens. Then the same held-out text is read in pieces of that length, and of twice, four times and eight times as many
tokens: a model that generalises gains by longer pieces, since it sees more text before a token.

Sources: the comparison is that of Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases Enables
Input Length Extrapolation", 2022; without positions, Kazemnejad et al., "The Impact of Positional Encoding on Length
Generalization in Transformers", 2023.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import stdlib_text
import torch
import torch.nn.functional as F
from torch import Tensor

from seqkernels.models import GPT, GPTConfig, Training

POSITIONS = ("sinusoidal", "learned", "rotary", "alibi", "none")
RATE, BATCH, LONGER = 3e-3, 16, (2, 4, 8)


def losses_of(model: GPT, batch: Tensor, length: int) -> Tensor:
    """Cross entropy of each next token in (B, M + 1), read in pieces of `length`, a divisor of M; (B, M)."""
    tokens, following = batch[:, :-1].reshape(-1, length), batch[:, 1:].reshape(-1, length)
    return F.cross_entropy(model(tokens).transpose(1, 2), following, reduction="none").view(len(batch), -1)


def train(config: GPTConfig, data: Tensor, length: int, steps: int) -> GPT:
    """A model trained on pieces of `length` tokens, the same for each configuration."""
    torch.manual_seed(0)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    training = Training(
        model,
        optimizer,
        lambda model, batch: losses_of(model, batch, length).mean(),
        functools.partial(stdlib_text.draw_batch, data, BATCH, length),
        schedule=schedule,
        clip=1.0,
    )
    training.run(steps)
    return model.eval()


@torch.no_grad()
def read(model: GPT, data: Tensor, length: int, count: int) -> Tensor:
    """Mean loss at each place of `count` x 8 texts, always the same ones, read in pieces of `length`; (context,)."""
    context, generator = model.config.context, torch.Generator().manual_seed(1)
    texts = (stdlib_text.draw_batch(data, 8, context, generator) for _ in range(count))
    return torch.stack([losses_of(model, text, length).mean(0) for text in texts]).mean(0)


def report(found: dict[str, dict[int, Tensor]]) -> None:
    """Print perplexities by the length of pieces, and who gains by longer ones."""
    lengths = list(found["none"])
    perplexity = {name: [losses.mean().exp().item() for losses in tested.values()] for name, tested in found.items()}
    print(f"{'perplexity, pieces of':24}" + "".join(f"{length:>9}" for length in lengths))
    for name, values in perplexity.items():
        print(f"{name:24}" + "".join(f"{value:>9.2f}" for value in values))
    growth = {name: values[-1] / values[0] for name, values in perplexity.items()}
    ratios = ", ".join(f"{name} {growth[name]:.3f}" for name in sorted(growth, key=lambda name: growth[name]))
    print(f"Pieces of {lengths[-1]} instead of {lengths[0]}, the length trained on, multiply the perplexity: {ratios}.")
    gains = [name for name, ratio in growth.items() if ratio < 0.995]
    said = ", ".join(gains) or "not one"
    print(f"Positions that gain half a percent by longer texts than those trained on: {said}.")


def draw(path: Path, found: dict[str, dict[int, Tensor]]) -> None:
    """Draw perplexity by the length of pieces, and what the longest change at each place."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = list(found["none"])
    for name, tested in found.items():
        left.plot(lengths, [losses.mean().exp() for losses in tested.values()], "o-", label=name)
        width = lengths[0]
        means = (tested[lengths[-1]] - tested[lengths[0]]).unfold(0, width, width).mean(1).exp()
        right.plot(width * (torch.arange(len(means)) + 0.5), means)
    left.set(xscale="log", xlabel="tokens of a piece", ylabel="perplexity of held-out text")
    left.set_xticks(lengths, map(str, lengths))
    left.minorticks_off()
    left.legend()
    right.axvspan(0, lengths[0], alpha=0.15)
    right.set(xlabel=f"place in pieces of {lengths[-1]}; trained on the shaded ones")
    right.set_ylabel(f"the same over that in pieces of {lengths[0]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Train all, read longer texts, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training, of each model (default %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a piece to train on (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of small models: does it run")
    parser.add_argument("--picture", type=Path, default=Path("report/positions.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    for name, least in (("steps", 20), ("length", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    quick, full = (80, 280, 32, 16, 20, 1), (4, 512, 128, options.length, options.steps, 16)
    every, vocab_size, features, length, steps, count = quick if options.quick else full
    _, data, held_out = stdlib_text.load(every, vocab_size)
    training = f"{steps} steps of {BATCH} x {length} tokens, one training each"
    print(f"{len(data)} tokens of {vocab_size}, {len(held_out)} held out; {training}")
    found: dict[str, dict[int, Tensor]] = {}
    for kind in POSITIONS:
        # Learned positions behind the length trained on stay as they were drawn.
        config = GPTConfig(vocab_size, LONGER[-1] * length, features, num_layers=3, num_heads=4, positions=kind)
        model = train(config, data, length, steps)
        found[kind] = {size: read(model, held_out, size, count) for size in (length, *(length * x for x in LONGER))}
    report(found)
    draw(options.picture, found)
    print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
