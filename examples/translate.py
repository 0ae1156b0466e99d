"""Train a translator twice, with the layers of torch and with those of seqkernels, and compare.

The model is `seqkernels.models.Seq2Seq`, the data are names from the Unicode CLDR (``cldr.py``). Both models start
from the same weights and see the same batches and dropout masks; their epochs alternate, so that whatever else the
machine does slows both. Losses and an alignment are drawn into ``report/demo.png``.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cldr
import compare_kernels
import torch
import torch.nn.functional as F
import translation_report
from cldr import Pair
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import seqkernels
from seqkernels.models import Seq2Seq, Seq2SeqConfig

LAYERS = {"torch.nn": torch.nn, "seqkernels.nn": seqkernels.nn}
BATCH = 32
#: Batches of similar length are formed among the pairs of this many random batches.
BUCKET = 20
RATE = 4e-3


class Batch(NamedTuple):
    """Token ids of B pairs: `source` (B, N), `lengths` (B,) of the sources, `target` (B, M), and the pairs' numbers."""

    source: Tensor
    lengths: Tensor
    target: Tensor
    numbers: list[int]


class Data:
    """Pairs as token ids, in batches of similar length."""

    def __init__(self, pairs: list[Pair], tokenizer: Tokenizer) -> None:
        self.pairs = pairs
        eos = tokenizer.token_to_id(cldr.EOS)
        self.rows: list[tuple[Tensor, Tensor]] = []
        for pair in pairs:
            lead = [tokenizer.token_to_id(token) for token in cldr.leading_tokens(pair)]
            source, target = tokenizer.encode(pair.source).ids, tokenizer.encode(pair.target).ids
            # The wanted language opens the target too.
            self.rows.append((torch.tensor([*lead, *source, eos]), torch.tensor([lead[0], *target, eos])))

    def batches(self, shuffle: random.Random | None = None) -> list[Batch]:
        """All pairs once; without `shuffle` sorted by length."""
        order = list(range(len(self.rows)))
        bucket = len(order)
        if shuffle is not None:
            shuffle.shuffle(order)
            bucket = BATCH * BUCKET
        chunks = []
        for begin in range(0, len(order), bucket):
            near = sorted(order[begin : begin + bucket], key=lambda i: [len(row) for row in self.rows[i]])
            chunks += [near[i : i + BATCH] for i in range(0, len(near), BATCH)]
        if shuffle is not None:
            shuffle.shuffle(chunks)
        return [self.batch(chunk) for chunk in chunks]

    def batch(self, numbers: list[int]) -> Batch:
        """The pairs with these numbers."""
        sources, targets = zip(*(self.rows[i] for i in numbers), strict=True)
        lengths = torch.tensor([len(source) for source in sources])
        return Batch(pad_sequence(sources, batch_first=True), lengths, pad_sequence(targets, batch_first=True), numbers)


@dataclass
class Run:
    """One of the two trainings: the model with its optimiser, and what each epoch gave."""

    name: str
    model: Seq2Seq
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    bar: tqdm
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def make_run(name: str, config: Seq2SeqConfig, steps: int, position: int) -> Run:
    """A model of the layers `name` with weights from seed 0; the learning rate warms up, then falls to 0."""
    torch.manual_seed(0)
    model = Seq2Seq(config, LAYERS[name])
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    warm_up = steps / 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * min(1, step / steps))) / 2)
    )
    return Run(name, model, optimizer, schedule, tqdm(total=steps, desc=f"{name:>13}", position=position, unit="batch"))


def loss_of(model: Seq2Seq, batch: Batch) -> Tensor:
    """Mean cross entropy of the target tokens."""
    logits = model(batch.source, batch.lengths, batch.target[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch.target[:, 1:].flatten(), ignore_index=model.config.pad)


def train_epoch(run: Run, batches: list[Batch], seed: int) -> None:
    """One pass over `batches`; appends the mean loss and the seconds to `run`."""
    torch.manual_seed(seed)
    run.model.train()
    total = 0.0
    begin = time.perf_counter()
    for batch in batches:
        run.optimizer.zero_grad()
        loss = loss_of(run.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.schedule.step()
        total += loss.item()
        run.bar.update()
    run.seconds.append(time.perf_counter() - begin)
    run.losses.append(total / len(batches))


def same_weights_gap(runs: list[Run], batch: Batch) -> float:
    """By how much the losses of a batch differ when the first model has the weights of the second."""
    theirs, ours = (run.model.eval() for run in runs)
    own = copy.deepcopy(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        gap = abs(loss_of(theirs, batch).item() - loss_of(ours, batch).item())
    theirs.load_state_dict(own)
    return gap


def train(runs: list[Run], data: Data, epochs: int) -> None:
    """Train both runs, epoch by epoch in turn, and print their losses side by side.

    Rounding differs in the last bit, and training makes small differences grow, in torch alone as well: so the
    last column has the difference for the same weights.
    """
    for run in runs:  # the first calls load or compile kernels
        loss_of(run.model, data.batches()[0]).backward()
    head = "".join(f"{run.name + ' loss':>20}{'seconds':>9}" for run in runs)
    tqdm.write(f"epoch{head}{'difference':>12}{'at equal weights':>18}")
    for epoch in range(epochs):
        batches = data.batches(random.Random(epoch))
        for run in runs if epoch % 2 == 0 else reversed(runs):
            train_epoch(run, batches, seed=epoch)
        row = "".join(f"{run.losses[-1]:>20.6f}{run.seconds[-1]:>9.2f}" for run in runs)
        difference = abs(runs[0].losses[-1] - runs[1].losses[-1])
        tqdm.write(f"{epoch + 1:>5}{row}{difference:>12.1e}{same_weights_gap(runs, batches[0]):>18.1e}")
    for run in runs:
        run.bar.close()
    theirs, ours = (sum(run.seconds) for run in runs)
    print(f"{'all':>5}{theirs:>29.2f}{ours:>29.2f}   seqkernels.nn is {theirs / ours:.2f} times as fast")


def translate(model: Seq2Seq, data: Data, tokenizer: Tokenizer) -> list[str]:
    """Greedy translations of all pairs of `data`, in their order."""
    model.eval()
    found = [""] * len(data.pairs)
    for batch in data.batches():
        rows = model.translate(batch.source, batch.lengths, start=batch.target[:, 0], max_length=cldr.LONGEST)
        for number, text in zip(batch.numbers, tokenizer.decode_batch(rows), strict=True):
            found[number] = text
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=14, help="passes over the training pairs (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two epochs of a small model on few pairs: does it run")
    parser.add_argument("--picture", type=Path, default=Path("report/demo.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    epochs, every, hidden = (2, 16, 32) if options.quick else (options.epochs, 1, 160)

    train_pairs, held_out = (part[::every] for part in cldr.split(cldr.load_pairs()))
    tokenizer = cldr.train_tokenizer(train_pairs, vocab_size=130)
    data, test = Data(train_pairs, tokenizer), Data(held_out, tokenizer)
    config = Seq2SeqConfig(tokenizer.get_vocab_size(), embed_size=64, hidden_size=hidden)
    batches = data.batches()
    runs = [make_run(name, config, epochs * len(batches), i) for i, name in enumerate(LAYERS)]
    languages = ", ".join(cldr.LANGUAGES.values())
    print(f"A translator of names from English to {languages}, trained with torch.nn and with seqkernels.nn.")
    print(
        f"{len(train_pairs)} pairs to train on, {len(held_out)} held out (other English names), {epochs} epochs,"
        f" {config.vocab_size} tokens, {sum(p.numel() for p in runs[0].model.parameters())} parameters,"
        f" {torch.get_num_threads()} threads. With seqkernels.nn it runs:"
    )
    explanation = seqkernels.explain(runs[1].model, *batches[0][:3])
    for line in dict.fromkeys(line for line in str(explanation).splitlines() if "->" in line):
        print(f"  {line}")

    train(runs, data, epochs)
    found = {run.name: translate(run.model, test, tokenizer) for run in runs}
    print("\nHeld-out names:")
    translation_report.print_accuracy(test.pairs, found)
    print()
    translation_report.print_examples(test.pairs, found)
    print()
    compare_kernels.main(["--quick"] if options.quick else [])

    # The longest name that is translated exactly.
    texts = found["seqkernels.nn"]
    number = max(range(len(texts)), key=lambda i: (texts[i] == test.pairs[i].target, len(test.pairs[i].source)))
    batch = test.batch([number])
    ids = runs[1].model.translate(batch.source, batch.lengths, start=batch.target[:, 0], max_length=cldr.LONGEST)[0]
    alignment = runs[1].model.align(batch.source, batch.lengths, torch.tensor([[int(batch.target[0, 0]), *ids]]))
    tokens = [[tokenizer.id_to_token(i) for i in row] for row in (batch.source[0].tolist(), [*ids, config.eos])]
    curves = {run.name: (run.seconds, run.losses) for run in runs}
    translation_report.draw(options.picture, curves, alignment[0], *tokens)
    print(f"\nLoss against seconds, and an alignment: {options.picture}")


if __name__ == "__main__":
    main()
