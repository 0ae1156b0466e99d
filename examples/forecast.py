"""Forecast a sequence of numbers, then the sunspots of each month since 1749, by RNN, GRU and LSTM of both libraries.

The sunspots come with statsmodels (monthly means, National Geophysical Data Center, public domain). The models learn
from the years before 1960 and forecast the 11 years, a solar cycle, that follow each month since, beside the naive
forecast (the last value) and the seasonal naive one (the value a cycle ago). The models of torch.nn and seqkernels.nn
start from the same weights, see the same batches, and train by turns.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import seqkernels
from seqkernels.models import Forecaster, ForecasterConfig

LAYERS = {"torch.nn": torch.nn, "seqkernels.nn": seqkernels.nn}
CELLS = ("rnn", "gru", "lstm")
FIRST_YEAR, SPLIT_YEAR, CYCLE = 1749, 1960, 132
BATCH, RATE, TURN = 32, 3e-3, 10
NAIVE, SEASONAL = "naive", "seasonal naive"


def count_up() -> None:
    """Learn 1, 2, ..., 10 as pairs of numbers and the next one, and count on."""
    numbers = torch.arange(1.0, 11.0) / 10
    pairs, following = numbers.unfold(0, 2, 1)[:-1, :, None], numbers[2:]
    torch.manual_seed(0)
    model = Forecaster(ForecasterConfig(hidden_size=8, cell="rnn"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(300):
        loss = (model(pairs)[:, -1, 0, 0] - following).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for _ in range(5):
        numbers = torch.cat((numbers, model.forecast(numbers[None, -2:, None], 1).flatten()))
    rest = ", ".join(f"{10 * x:.2f}" for x in numbers[10:].tolist())
    print(f"1 to 10 in pairs, squared error {loss.item():.1e}: after 9, 10 the RNN counts {rest}.\n")


def load_sunspots() -> Tensor:
    """Monthly mean sunspot numbers from January 1749 to June 2009, (3126,)."""
    try:
        from statsmodels.datasets import sunspots
    except ImportError as error:
        raise ImportError("the sunspots come with statsmodels: pip install 'seqkernels[examples]'") from error
    lines = (Path(sunspots.__file__).parent / "src" / "sunspots_monthly.dat").read_text("ascii").splitlines()
    rows = [line.split() for line in lines if line[:4].isdigit()]
    if [int(row[0]) for row in rows] != list(range(FIRST_YEAR, FIRST_YEAR + len(rows))):
        raise ValueError("sunspots_monthly.dat: expected a line for each year since 1749")
    return torch.tensor([float(value) for row in rows for value in row[1:]])


def scale(sunspots: Tensor) -> Tensor:
    """Roots, as the noise of a count grows with its root, to the order of 1. Medians stay medians."""
    return sunspots.sqrt() / 5


def unscale(x: Tensor) -> Tensor:
    """What `scale` came from."""
    return (5 * x.clamp(min=0)).square()


class Run:
    """A training of a cell with the layers of one library.

    Attributes:
        losses: of each update, mean absolute error of scaled values.
        seconds: of training.
    """

    def __init__(self, cell: str, library: str, hidden: int, horizon: int, updates: int) -> None:
        torch.manual_seed(0)
        self.cell, self.library = cell, library
        self.model = Forecaster(ForecasterConfig(1, horizon, hidden, cell=cell), LAYERS[library])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, RATE, total_steps=updates)
        self.losses: list[float] = []
        self.seconds = 0.0

    def loss_of(self, batch: Tensor) -> Tensor:
        """Mean absolute error of all forecasts within (B, steps + horizon) scaled values."""
        horizon = self.model.config.horizon
        return (self.model(batch[:, :-horizon, None])[..., 0] - batch[:, 1:].unfold(1, horizon, 1)).abs().mean()

    def train(self, batches: Tensor) -> None:
        """One turn."""
        begin = time.perf_counter()
        for batch in batches:
            loss = self.loss_of(batch)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.losses.append(loss.item())
        self.seconds += time.perf_counter() - begin

    @torch.no_grad()
    def forecast(self, sunspots: Tensor, origins: Tensor) -> Tensor:
        """From the whole past of each origin the values from there on, (origins, horizon)."""
        return unscale(self.model(scale(sunspots)[None, :, None])[0, origins - 1, :, 0])


def train(runs: list[Run], data: Tensor, steps: int, updates: int) -> None:
    """Train all by turns of `TURN` updates, on pieces of `steps` scaled values and what follows them."""
    generator, length = torch.Generator().manual_seed(0), steps + runs[0].model.config.horizon
    for run in runs:  # the first calls load or compile kernels
        run.loss_of(data[:length].expand(BATCH, -1)).backward()
    with tqdm(total=updates, unit="update") as bar:
        for turn, begin in enumerate(range(0, updates, TURN)):
            count = min(TURN, updates - begin)
            starts = torch.randint(len(data) - length + 1, (count, BATCH, 1), generator=generator)
            for run in runs[:: 1 if turn % 2 == 0 else -1]:
                run.train(data[starts + torch.arange(length)])
            bar.update(count)
            bar.set_postfix({run.cell: f"{run.losses[-1]:.3f}" for run in runs if run.library == "seqkernels.nn"})


def naive_forecasts(sunspots: Tensor, origins: Tensor, horizon: int) -> dict[str, Tensor]:
    """The last value again, and the values a cycle ago; (origins, horizon) each."""
    ahead = torch.arange(horizon)
    return {
        NAIVE: sunspots[origins - 1, None].expand(-1, horizon),
        SEASONAL: sunspots[origins[:, None] - CYCLE + ahead % CYCLE],
    }


def report(errors: dict[str, Tensor], unit: float, runs: list[Run]) -> None:
    """Print mean absolute errors, in all and of some months ahead, MASE and seconds, and which forecast is best.

    MASE is the error in units of that of the seasonal naive forecast in the years trained on (Hyndman and Koehler,
    "Another Look at Measures of Forecast Accuracy", 2006).
    """
    horizon = len(next(iter(errors.values())))
    shown = [month for month in (1, 6, 12, 36, 60, 96, CYCLE) if month <= horizon]
    print(f"{'months ahead':22}{'MAE':>7}{'MASE':>7}{'to seasonal':>13}  " + "".join(f"{month:>7}" for month in shown))
    for name, by_month in errors.items():
        mean = by_month.mean().item()
        relative = mean / errors[SEASONAL].mean().item()
        columns = "".join(f"{by_month[month - 1]:>7.1f}" for month in shown)
        print(f"{name:22}{mean:>7.2f}{mean / unit:>7.3f}{relative:>13.3f}  {columns}")
    for theirs, ours in zip(runs[::2], runs[1::2], strict=True):
        (first, last), (begin, end) = ((run.losses[0], run.losses[-1]) for run in (theirs, ours))
        losses = f"losses {first:.6f} and {begin:.6f} first, {last:.4f} and {end:.4f} last"
        seconds = f"{theirs.seconds:.1f} s by torch.nn, {ours.seconds:.1f} by seqkernels.nn"
        print(f"{ours.cell.upper()}: {seconds}, {theirs.seconds / ours.seconds:.2f} times as fast; {losses}.")
    means = {name: by_month.mean().item() for name, by_month in errors.items()}
    best = min(means, key=lambda name: means[name])
    beaten = sum(means[run.cell.upper()] < means[SEASONAL] for run in runs[1::2])
    print(
        f"\nThe best forecast is that of {best}; {beaten} of {len(runs) // 2} cells beat the seasonal naive forecast."
    )


def draw(
    path: Path, sunspots: Tensor, forecasts: dict[str, Tensor], origins: Tensor, errors: dict[str, Tensor]
) -> None:
    """Draw the series, forecasts from some origins, and the errors by months ahead."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplot_mosaic([["series", "series"], ["forecasts", "errors"]])
    year = FIRST_YEAR + torch.arange(len(sunspots)) / 12
    first = int(origins[0])
    panels["series"].plot(year, sunspots, color="0.4", linewidth=0.7)
    panels["series"].axvspan(year[first], year[-1], alpha=0.15, label="held out")
    panels["series"].set(ylabel="sunspots, monthly mean", title="Sunspots since 1749")
    panels["series"].legend(loc="upper left")
    panels["forecasts"].plot(year[first - 60 :], sunspots[first - 60 :], color="0.75", linewidth=0.8)
    for number, (name, found) in enumerate(forecasts.items()):
        for row in range(0, len(origins), CYCLE):
            begin = int(origins[row])
            style = ":" if name in (NAIVE, SEASONAL) else "-"
            months = year[begin : begin + found.shape[1]]
            panels["forecasts"].plot(months, found[row], style, color=f"C{number}")
        panels["errors"].plot(range(1, found.shape[1] + 1), errors[name], color=f"C{number}", label=name)
    panels["forecasts"].set(title="A forecast of every eleven years", ylabel="sunspots")
    panels["errors"].set(title="Error by distance", xlabel="months ahead", ylabel="mean absolute error")
    panels["errors"].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Train all, forecast, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=300, help="of training, of each model (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few updates of small models: does it run")
    parser.add_argument("--picture", type=Path, default=Path("report/forecast.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.updates < 1:
        parser.error(f"--updates: expected at least 1, got {options.updates}")
    hidden, steps, horizon, updates = (8, 24, 24, 5) if options.quick else (64, 2 * CYCLE, CYCLE, options.updates)
    count_up()
    sunspots = load_sunspots()
    known = 12 * (SPLIT_YEAR - FIRST_YEAR)
    runs = [Run(cell, library, hidden, horizon, updates) for cell in CELLS for library in LAYERS]
    print(
        f"{known} months until {SPLIT_YEAR}, {len(sunspots) - known} held out, {updates} updates of {BATCH} x {steps},"
        " one training each"
    )
    train(runs, scale(sunspots[:known]), steps, updates)
    origins = torch.arange(known, len(sunspots) - horizon + 1)
    truth = sunspots[origins[:, None] + torch.arange(horizon)]
    forecasts = naive_forecasts(sunspots, origins, horizon)
    for run in runs:
        name = run.cell.upper() + ("" if run.library == "seqkernels.nn" else ", torch.nn")
        forecasts[name] = run.forecast(sunspots, origins)
    errors = {name: (found - truth).abs().mean(0) for name, found in forecasts.items()}
    unit = (sunspots[CYCLE:known] - sunspots[: known - CYCLE]).abs().mean().item()
    report(errors, unit, runs)
    shown = {name: found for name, found in forecasts.items() if "torch" not in name}
    draw(options.picture, sunspots, shown, origins, errors)
    print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
