"""The examples of sequences: forecasts of sunspots, gradients through time, positions beyond the lengths trained on."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from seqkernels.models import GPTConfig
from seqkernels.testing import threads

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module(name)


forecast, gradients, positions = map(load, ("forecast", "gradients", "positions"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def test_no_example_hides_a_package() -> None:
    """A script's folder comes first where modules are sought, by pandas too, which imports bottleneck if it can."""
    optional = pytest.importorskip("pandas.compat._optional").VERSIONS
    installed = importlib.metadata.packages_distributions()
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    # That one says, when it is imported as a library, that it is none.
    assert names & {*sys.stdlib_module_names, *installed, *optional} <= {"bottleneck"}


def test_sunspots_are_those_of_each_month() -> None:
    pytest.importorskip("statsmodels")
    sunspots = forecast.load_sunspots()
    assert sunspots.shape == (3126,)
    assert [round(x, 1) for x in sunspots[[0, 11, 12, 12 * (1957 - 1749) + 9, -1]].tolist()] == [
        58,
        85.2,
        73.3,
        253.8,
        2.6,
    ]
    torch.testing.assert_close(forecast.unscale(forecast.scale(sunspots)), sunspots)


def test_naive_forecasts_know_the_past_alone() -> None:
    months = torch.arange(400.0)
    found = forecast.naive_forecasts(months, torch.tensor([200, 250]), 140)
    assert torch.equal(found["naive"], torch.tensor([199.0, 249.0])[:, None].expand(-1, 140))
    assert torch.equal(found["seasonal naive"][0], torch.cat((months[68:200], months[68:76])))
    assert found["seasonal naive"][1].max() == 249


def test_forecasts_of_models_know_the_past_alone() -> None:
    run, months = forecast.Run("gru", "seqkernels.nn", 8, 5, 10), torch.rand(60) * 100
    changed = months.clone()
    changed[40:] += 50
    origins = torch.tensor([30, 40, 41])
    before, after = run.forecast(months, origins), run.forecast(changed, origins)
    assert before.shape == (3, 5)
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])


def test_both_libraries_train_by_turns_on_the_same() -> None:
    runs = [forecast.Run("lstm", library, 8, 12, 30) for library in forecast.LAYERS]
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(a, b)
    forecast.train(runs, 1 + (torch.arange(300) / 4).sin(), 24, 30)
    theirs, ours = (torch.tensor(run.losses) for run in runs)
    assert len(theirs) == len(ours) == 30
    assert theirs[-5:].max() < theirs[:5].min()
    torch.testing.assert_close(ours[:5], theirs[:5])


def test_forecast_and_its_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("statsmodels")
    forecast.main(["--quick", "--picture", str(tmp_path / "forecast.png")])
    text = capsys.readouterr().out
    assert "after 9, 10 the RNN counts 11.0" in text
    rows = {line[:22].strip(): [float(x) for x in line[22:].split()] for line in text.splitlines()[4:12]}
    assert list(rows) == [
        "naive",
        "seasonal naive",
        *(n for c in ("RNN", "GRU", "LSTM") for n in (f"{c}, torch.nn", c)),
    ]
    best = min(rows, key=lambda name: rows[name][0])
    assert f"The best forecast is that of {best};" in text
    assert (tmp_path / "forecast.png").stat().st_size > 10_000


def test_the_best_forecast_may_be_the_naive_one(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [forecast.Run("rnn", library, 2, 1, 1) for library in forecast.LAYERS]
    for run in runs:
        run.losses, run.seconds = [1.0], 1.0
    errors = {name: torch.tensor([x]) for name, x in (("naive", 1.0), ("seasonal naive", 2.0), ("RNN", 3.0))}
    forecast.report(errors, 4.0, runs)
    text = capsys.readouterr().out
    assert "The best forecast is that of naive; 0 of 1 cells beat the seasonal naive forecast." in text
    assert text.splitlines()[3].split() == ["RNN", "3.00", "0.750", "1.500", "3.0"]


def test_gradients_of_cells_are_those_of_a_loop() -> None:
    """The gradient of c seven steps before the end, by torch's cell."""
    lstm, (x, direction) = gradients.make("LSTM", 20, torch.float64), gradients.noise(20)
    cell = torch.nn.LSTMCell(gradients.INPUTS, gradients.HIDDEN, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    h = c = x.new_zeros(x.shape[1], gradients.HIDDEN)
    for row in x[:13]:
        h, c = cell(row, (h, c))
    h, first = h.detach(), c.detach().requires_grad_()
    c = first
    for row in x[13:]:
        h, c = cell(row, (h, c))
    (grad,) = torch.autograd.grad((h * direction).sum(), first)
    (norm,), (kept,) = gradients.of_cells(lstm, x, direction, [7])
    assert norm == pytest.approx(grad.norm(dim=-1).mean().item(), rel=1e-12)
    # Forget gates of about a half.
    assert 0.4**7 < kept < 0.6**7


def test_gradients_of_inputs_by_distance() -> None:
    found = {
        name: gradients.of_inputs(gradients.make(name, 41, torch.float64), *gradients.noise(41))
        for name in gradients.MODELS
    }
    for norms in found.values():
        assert norms.shape == (41,)
        assert norms[0] == 1
    assert found["RNN"][40] < found["LSTM"][40] < found["LSTM, forget bias 1"][40] < found["attention"][40] * 1e-2
    assert found["RNN, weights x 3.5"][40] > 1
    far = found["attention"][1:]
    assert far.max() < 1.2 * far.min()


def test_rates_where_gradients_underflow_or_overflow() -> None:
    for rate, steps in ((0.5, 40), (0.25, 2001), (4.0, 2001), (1.0, 11)):
        norms = rate ** torch.arange(float(steps), dtype=torch.float64)
        assert gradients.rate_of(norms) == pytest.approx(rate, rel=1e-12)


def test_gradients_and_their_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gradients.main(["--quick", "--picture", str(tmp_path / "gradients.png")])
    text = capsys.readouterr().out
    assert "An LSTM with torch's weights loses it, too" in text
    assert "Able to remember for 20 steps after training: none." in text
    assert (tmp_path / "gradients.png").stat().st_size > 10_000


@pytest.mark.parametrize("open_", [True, False])
def test_recall_is_learned_where_gates_are_open(open_: bool) -> None:
    share = gradients.recall("LSTM, forget bias to ln T" if open_ else "LSTM", 30, 120)
    assert share > 0.9 if open_ else share < 0.6


def test_positions_and_their_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    positions.main(["--quick", "--picture", str(tmp_path / "positions.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-4:] == ["16", "32", "64", "128"]
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[2:7]}
    assert list(rows) == list(positions.POSITIONS)
    for values in rows.values():
        assert all(50 < value < 300 for value in values)
    assert (tmp_path / "positions.png").stat().st_size > 10_000


def test_losses_in_pieces() -> None:
    """Pieces of a round of a text that repeats itself are all the same, and know nothing of one another."""
    data, config = torch.arange(4000) % 8, GPTConfig(8, 64, 16, 1, 2, positions="sinusoidal")
    model = positions.train(config, data, 8, 20)
    long, pieces = positions.read(model, data, 64, 2), positions.read(model, data, 8, 2)
    assert long.shape == pieces.shape == (64,)
    torch.testing.assert_close(pieces, pieces[:8].repeat(8))
    torch.testing.assert_close(long[:8], pieces[:8])
    assert not torch.allclose(long[8:], pieces[8:], rtol=1e-3)


def test_only_what_gains_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    near, far = torch.full((64,), 3.0), torch.full((64,), 3.1)
    positions.report({"alibi": {8: far, 64: near}, "none": {8: near, 64: far}})
    assert "than those trained on: alibi." in capsys.readouterr().out
    positions.report({"none": {8: near, 64: far}})
    text = capsys.readouterr().out
    assert "multiply the perplexity: none 1.105." in text
    assert "than those trained on: not one." in text


@pytest.mark.parametrize(
    ("example", "option"), [(forecast, "--updates"), (gradients, "--steps"), (positions, "--length")]
)
def test_counts_are_checked(example: ModuleType, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main([option, "0"])
    assert f"{option}: expected at least" in capsys.readouterr().err
