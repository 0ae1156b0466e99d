"""Do transformers train faster than LSTMs? LSTM, GRU and transformer of equal size on one text, loss against seconds.

The models are `seqkernels.models.RecurrentLM` and `GPT`, each with torch's layers and with ours; the text is in
``stdlib_text.py``. All six see the same batches and train by turns, so that whatever else the machine does slows all.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import stdlib_text
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import seqkernels
from seqkernels.models import GPT, GPTConfig, Model, RecurrentLM, RecurrentLMConfig, Training

LAYERS = {"torch.nn": torch.nn, "seqkernels.nn": seqkernels.nn}
KINDS = ("lstm", "gru", "transformer")
#: The learning rates with which each kind comes furthest, of those that ``--tune`` tries.
RATES = {"lstm": 2e-2, "gru": 2e-2, "transformer": 2e-3}
TRIED = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
BATCH, TURN = 8, 10


def parameters(model: nn.Module) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in model.parameters())


def models(vocab_size: int, size: int, context: int) -> dict[str, Callable[[ModuleType], Model]]:
    """What makes each kind of model; recurrent ones have as many units as the transformer has parameters for."""
    gpt = GPTConfig(vocab_size, context, size, num_layers=4, num_heads=max(1, size // 32))
    found: dict[str, Callable[[ModuleType], Model]] = {"transformer": lambda layers: GPT(gpt, layers)}
    with torch.device("meta"):
        wanted = parameters(GPT(gpt))
        for cell in ("lstm", "gru"):
            config = min(
                (RecurrentLMConfig(vocab_size, size, 8 * units, 2, cell) for units in range(1, size)),
                key=lambda config: abs(parameters(RecurrentLM(config)) - wanted),
            )
            found[cell] = lambda layers, config=config: RecurrentLM(config, layers)  # type: ignore[misc]
    return {kind: found[kind] for kind in KINDS}


def loss_of(model: Model, batch: Tensor) -> Tensor:
    """Mean cross entropy of each next token."""
    found = model(batch[:, :-1])
    logits = found[0] if isinstance(found, tuple) else found
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class Run:
    """A training of one kind of model with one kind of layers: loss and seconds of each turn."""

    def __init__(
        self,
        kind: str,
        name: str,
        make: Callable[[ModuleType], Model],
        steps: int,
        data: Tensor,
        context: int,
        rate: float | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.kind, self.name, self.model = kind, name, make(LAYERS[name])
        rate = RATES[kind] if rate is None else rate
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) * 10 / steps, (1 + math.cos(math.pi * min(1, step / steps))) / 2)
        )
        draw_batch = functools.partial(stdlib_text.draw_batch, data, BATCH, context)
        self.training = Training(self.model, optimizer, loss_of, draw_batch, schedule=schedule, clip=1.0)
        loss_of(self.model, draw_batch(torch.Generator())).backward()  # the first call loads or compiles kernels
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def train(self, steps: int) -> None:
        """One turn."""
        begin = time.perf_counter()
        self.losses.append(statistics.mean(self.training.run(steps, progress=False)))
        self.seconds.append(time.perf_counter() - begin)

    def until(self, loss: float) -> float:
        """Seconds until the mean loss of a turn is at most `loss`; NaN where none is."""
        turns = (number for number, found in enumerate(self.losses, 1) if found <= loss)
        number = next(turns, None)
        return math.nan if number is None else sum(self.seconds[:number])


def train(runs: list[Run], steps: int) -> None:
    """Train all by turns of `TURN` steps, each turn in another order."""
    with tqdm(total=steps, unit="step") as bar:
        for turn, begin in enumerate(range(0, steps, TURN)):
            first = turn % len(runs)
            for run in runs[first:] + runs[:first]:
                run.train(min(TURN, steps - begin))
            bar.update(min(TURN, steps - begin))
            bar.set_postfix({run.kind: f"{run.losses[-1]:.3f}" for run in runs if run.name == "seqkernels.nn"})


def tune(makers: dict[str, Callable[[ModuleType], Model]], steps: int, data: Tensor, context: int) -> None:
    """Print the last training loss of each kind of model with each learning rate."""
    print(f"loss of the last {TURN} of {steps} steps\n{'':13}" + "".join(f"{rate:>10g}" for rate in TRIED))
    for kind, make in makers.items():
        runs = [Run(kind, "seqkernels.nn", make, steps, data, context, rate) for rate in TRIED]
        for run in tqdm(runs, desc=kind, leave=False):
            run.train(steps)
        means = [statistics.mean(run.training.losses[-TURN:]) for run in runs]
        print(f"{kind:13}" + "".join(f"{mean:>10.4f}" for mean in means))


@torch.no_grad()
def held_out_loss(run: Run, data: Tensor, context: int, count: int) -> float:
    """Mean loss on `count` batches of held-out text, always the same ones."""
    generator = torch.Generator().manual_seed(1)
    batches = (stdlib_text.draw_batch(data, BATCH, context, generator) for _ in range(count))
    return statistics.mean(loss_of(run.model, batch).item() for batch in batches)


def reached(losses: list[float]) -> float:
    """The largest of the last losses, to which all have come but those that diverged; NaN where all did."""
    return max((loss for loss in losses if math.isfinite(loss)), default=math.nan)


def compared(ratio: float, loss: float) -> str:
    """What a ratio of the seconds to a loss says about the claim of ten times; NaN where one has not come to it."""
    if math.isnan(ratio):
        return "one of them diverged"
    ten = "ten times" if ratio >= 9.5 else "not ten times"
    return f"{ratio:.2f} times to a loss of {loss:.2f}: {ten}, at this size, length and hardware"


def draw(runs: list[Run], path: Path) -> None:
    """Draw the losses against tokens and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for run in runs:
        color, style = f"C{KINDS.index(run.kind)}", "-" if run.name == "seqkernels.nn" else "--"
        panels[1].plot(list(itertools.accumulate(run.seconds)), run.losses, style, color=color)
        if run.name == "seqkernels.nn":
            panels[0].plot(run.losses, color=color, label=run.kind)
    panels[0].set(xlabel=f"turns of {TURN} steps, the same for all", ylabel="training loss per token")
    panels[0].legend()
    panels[1].set(xlabel="seconds; dashed with torch's layers")
    for panel in panels:
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Train all six, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of training, of each model (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of small models: does it run")
    parser.add_argument("--tune", action="store_true", help="print what each learning rate gives, and end")
    parser.add_argument("--picture", type=Path, default=Path("report/race.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    quick, full = (40, 400, 32, 32, 20), (1, 2048, 160, 256, options.steps)
    every, vocab_size, size, context, steps = quick if options.quick else full
    _, data, held_out = stdlib_text.load(every, vocab_size)
    makers = models(vocab_size, size, context)
    if options.tune:
        tune(makers, steps, data, context)
        return
    runs = [Run(kind, name, make, steps, data, context) for kind, make in makers.items() for name in LAYERS]
    print(f"{steps} steps of {BATCH} x {context} tokens, {torch.get_num_threads()} threads, one training each")
    train(runs, steps)

    common = reached([run.losses[-1] for run in runs])
    print(f"\n{'':13}{'layers':15}{'parameters':>10}{'tokens/s':>10}{'held-out':>10}{f's to {common:.2f}':>12}")
    for run in runs:
        loss = held_out_loss(run, held_out, context, 2 if options.quick else 20)
        rate = steps * BATCH * context / sum(run.seconds)
        print(
            f"{run.kind:13}{run.name:15}{parameters(run.model):>10}{rate:>10.0f}{loss:>10.4f}{run.until(common):>12.1f}"
        )
    print()
    by = {(run.kind, run.name): run for run in runs}
    for name in LAYERS:
        lstm, transformer = by["lstm", name], by["transformer", name]
        each = sum(lstm.seconds) / sum(transformer.seconds)
        found = compared(lstm.until(common) / transformer.until(common), common)
        print(f"With {name} the transformer is {each:.2f} times as fast as the LSTM for each token, and {found}.")
    for kind in KINDS:
        ratio = sum(by[kind, "torch.nn"].seconds) / sum(by[kind, "seqkernels.nn"].seconds)
        print(f"With seqkernels.nn the {kind} trains {ratio:.2f} times as fast as with torch.nn.")
    draw(runs, options.picture)
    print(f"\nLosses: {options.picture}")


if __name__ == "__main__":
    main()
