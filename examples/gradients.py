"""How far a gradient reaches back: RNN, GRU, LSTM and attention, before training, and what they can learn to remember.

A loss on the last of T outputs is differentiated with respect to each input and, from the states that `return_states`
gives, to the cell states of an LSTM, beside the product of the forget gates between. Then each model is trained to say
at the end which of two marks it saw in the first step, T steps of noise ago.

Source: Bengio, Simard and Frasconi, "Learning Long-Term Dependencies with Gradient Descent is Difficult", 1994; of the
weights that the models begin with, see ``memory_models.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from memory_models import HIDDEN, INPUTS, MODELS, make
from torch import Tensor, nn
from tqdm import tqdm

BATCH = 32


def noise(steps: int) -> tuple[Tensor, Tensor]:
    """Inputs (steps, B, I), and for each row a direction (B, H) in which the last output is differentiated."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps, BATCH, INPUTS, generator=generator, dtype=torch.float64)
    return x, F.normalize(torch.randn(BATCH, HIDDEN, generator=generator, dtype=torch.float64), dim=1)


def of_inputs(model: nn.Module, x: Tensor, direction: Tensor) -> Tensor:
    """Norms of the gradients of the inputs, by distance from the end, relative to that of the last input; (T,)."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((model(x)[0][-1] * direction).sum(), x)
    norms = grad.norm(dim=-1).mean(1).flip(0)
    return norms / norms[0]


def of_cells(lstm: nn.Module, x: Tensor, direction: Tensor, distances: list[int]) -> tuple[list[float], list[float]]:
    """Norms of the gradients of c so far from the end, of a last h whose own is 1; mean products of forget gates."""
    _, _, (trace,) = lstm(x, return_states=True, return_gates=True)
    norms, kept = [], []
    for end in (len(x) - distance for distance in distances):
        # The states behind step `end` - 1 are what the rest of the sequence begins with.
        h, c = (states[end - 1 : end].detach().requires_grad_() for states in (trace.hidden, trace.cells))
        (grad,) = torch.autograd.grad((lstm(x[end:], (h, c))[0][-1] * direction).sum(), c)
        norms.append(grad.norm(dim=-1).mean().item())
        kept.append(trace.gates[end:, :, 1].prod(0).mean().item())
    return norms, kept


def recall(name: str, steps: int, updates: int) -> float:
    """Train to say which mark, 1 or -1, was the first step's; the share of 1000 new sequences told right."""
    model, generator = make(name, steps, torch.float32), torch.Generator().manual_seed(0)
    output = nn.Linear(HIDDEN, 1)
    parameters = [*model.parameters(), *output.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)

    def judge(batch: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(steps, batch, INPUTS, generator=generator)
        mark = torch.randint(2, (batch,), generator=generator).float()
        x[:, :, 0] = 0.0
        x[0, :, 0] = 2 * mark - 1
        return output(model(x)[0][-1])[:, 0], mark

    for _ in range(updates):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(*judge(BATCH)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        score, mark = judge(1000)
    return ((score > 0) == (mark > 0)).double().mean().item()


def draw(
    path: Path,
    inputs: dict[str, Tensor],
    cells: dict[str, tuple[list[float], list[float]]],
    distances: list[int],
    delays: list[int],
    right: dict[str, list[float]],
) -> None:
    """Draw gradients against distance, those of cell states beside products of gates, and what was remembered."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    left, middle, last = figure.subplots(1, 3)
    colours = {name: f"C{number}" for number, name in enumerate(MODELS)}
    for name, norms in inputs.items():
        left.semilogy(norms, color=colours[name], label=name)
    left.set(ylim=(1e-20, 1e6), title="Gradients of inputs before training", xlabel="steps before the last")
    left.set_ylabel("norm, relative to the last input's")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(inputs), fontsize=9)
    for name, (norms, kept) in cells.items():
        middle.semilogy(distances, norms, color=colours[name])
        middle.semilogy(distances, kept, ":", color=colours[name])
    middle.plot([], [], "k:", label="product of the forget gates")
    middle.set(ylim=(1e-22, 10), title="Gradients of cell states", xlabel="steps before the last", ylabel="norm")
    middle.legend(fontsize=9, loc="lower right")
    last.imshow(list(right.values()), cmap="RdYlGn", vmin=0.4, vmax=1.1, aspect="auto")
    for row, shares in enumerate(right.values()):
        for column, share in enumerate(shares):
            last.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=8)
    last.set(title="Marks told right after training", xlabel="steps to remember")
    last.set_xticks(range(len(delays)), map(str, delays))
    last.set_yticks(range(len(right)), right, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def rate_of(norms: Tensor) -> float:
    """By what a step multiplies norms (T,), in the later half of those that float64 holds."""
    held = norms.isfinite() & (norms > torch.finfo(norms.dtype).tiny)
    far = int(held.nonzero().max())
    return (norms[far] / norms[far // 2]).item() ** (1 / (far - far // 2))


def report(inputs: dict[str, Tensor], delays: list[int], right: dict[str, list[float]]) -> None:
    """Print both tables, and what they say about the claim that an LSTM keeps what an RNN forgets."""
    far = len(inputs["RNN"]) - 1
    shown = [distance for distance in (1, 3, 10, 30, 100, 200) if distance <= far]
    rate = {name: rate_of(norms) for name, norms in inputs.items()}
    print(f"Gradient of an input so many steps before the last, relative to the last's, {far + 1} steps, float64:")
    print(f"{'':26}" + "".join(f"{distance:>9}" for distance in shown) + f"{'a step':>9}")
    for name, norms in inputs.items():
        print(f"{name:26}" + "".join(f"{norms[distance]:>9.0e}" for distance in shown) + f"{rate[name]:>9.3f}")
    print("\nShare told right of marks seen so many steps before the last (one training each):")
    print(f"{'':26}" + "".join(f"{delay:>9}" for delay in delays))
    for name, shares in right.items():
        print(f"{name:26}" + "".join(f"{share:>9.1%}" for share in shares))
    left = f"{inputs['RNN'][shown[-1]]:.0e} is left {shown[-1]} steps back"
    print(
        f"\nOf the RNN's gradient {left}; with large weights a step multiplies it by {rate['RNN, weights x 3.5']:.2f}."
    )
    kept = [name for name in rate if name.startswith("LSTM") and rate[name] > 0.98]
    loses = "loses it, too" if "LSTM" not in kept else "keeps it"
    print(f"An LSTM with torch's weights {loses}: {rate['LSTM']:.2f} a step, the RNN {rate['RNN']:.2f}.", end=" ")
    print(f"Cell states are a highway where forget gates are open: {', '.join(kept) or 'in none of these'}.")
    able = [name for name, shares in right.items() if shares[-1] > 0.95]
    print(f"Able to remember for {delays[-1]} steps after training: {', '.join(able) or 'none'}.")


def main(arguments: list[str] | None = None) -> None:
    """Measure, train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=201, help="T of the gradients (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="short sequences, little training: does it run")
    parser.add_argument("--picture", type=Path, default=Path("report/gradients.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.steps < 11:
        parser.error(f"--steps: expected at least 11, got {options.steps}")
    steps, delays, updates = (41, [2, 20], 10) if options.quick else (options.steps, [5, 10, 20, 50, 100, 200], 200)
    x, direction = noise(steps)
    inputs = {name: of_inputs(make(name, steps, torch.float64), x, direction) for name in MODELS}
    distances = list(range(1, steps, 5))
    lstms = {name: make(name, steps, torch.float64) for name in MODELS if name.startswith("LSTM")}
    cells = {name: of_cells(lstm, x, direction, distances) for name, lstm in lstms.items()}
    right: dict[str, list[float]] = {name: [] for name in MODELS}
    with tqdm(total=len(delays) * len(MODELS), unit="training") as bar:
        for delay in delays:
            for name, shares in right.items():
                bar.set_postfix_str(f"{name}, {delay} steps")
                shares.append(recall(name, delay, updates))
                bar.update()
    report(inputs, delays, right)
    draw(options.picture, inputs, cells, distances, delays, right)
    print(f"\nPicture: {options.picture}")


if __name__ == "__main__":
    main()
