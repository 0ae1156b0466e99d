"""Which kind of model trains faster, and what attention adds to an encoder and a decoder: the examples, in small."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import seqkernels
from seqkernels.testing import threads

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    for needed in ("tokenizers", "matplotlib", "tqdm"):
        pytest.importorskip(needed)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        # By another name: there are libraries called like some of them.
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def test_pandas_does_not_take_an_example_for_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(ImportError, match="this is an example"):
        importlib.import_module("bottleneck")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def test_models_of_the_race_are_of_one_size() -> None:
    race = load("race")
    sizes = [race.parameters(make(seqkernels.nn)) for make in race.models(2048, 160, 256).values()]
    assert max(sizes) < 1.02 * min(sizes)
    assert max(sizes) > 1_500_000


def test_the_race_and_its_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    race = load("race")
    race.main(["--quick", "--picture", str(tmp_path / "race.png")])
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.split()[:1] in ([kind] for kind in race.KINDS)]
    assert [row[:2] for row in rows] == [[kind, name] for kind in race.KINDS for name in race.LAYERS]
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        assert theirs[2] == ours[2]
        assert float(ours[4]) == pytest.approx(float(theirs[4]), abs=1e-3)  # rounding, after 20 steps
    assert "times as fast as with torch.nn" in text
    assert (tmp_path / "race.png").stat().st_size > 10_000


def test_learning_rates_are_tried(capsys: pytest.CaptureFixture[str]) -> None:
    race = load("race")
    race.main(["--quick", "--tune"])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows) == list(race.KINDS)
    for losses in rows.values():
        assert len({float(loss) for loss in losses}) == len(race.TRIED)


def test_a_race_that_not_all_finish() -> None:
    race, nan = load("race"), float("nan")
    assert race.reached([nan, 2.0, 3.0, float("inf")]) == race.reached([3.0, nan, 2.0]) == 3.0
    assert math.isnan(race.reached([nan, nan]))
    run = race.Run("lstm", "seqkernels.nn", race.models(20, 8, 4)["lstm"], 10, torch.arange(20), 4)
    run.losses, run.seconds = [4.0, 2.5, nan], [1.0, 2.0, 4.0]
    assert [run.until(loss) for loss in (4.0, 3.0)] == [1.0, 3.0]
    assert math.isnan(run.until(2.0))
    assert race.compared(nan, 3.0) == "one of them diverged"
    assert race.compared(9.4, 3.0).startswith("9.40 times to a loss of 3.00: not ten times,")
    assert race.compared(9.6, 3.0).startswith("9.60 times to a loss of 3.00: ten times,")


def test_pieces_of_the_bottleneck_are_of_the_text() -> None:
    bottleneck = load("bottleneck")
    found = bottleneck.draw_pieces(torch.arange(50), 7, 20, torch.Generator().manual_seed(0))
    assert found.shape == (20, 7)
    assert torch.equal(found - found[:, :1], torch.arange(7).expand(20, -1))
    assert int(found.min()) > max(bottleneck.PAD, bottleneck.BOS, bottleneck.EOS)


def test_accuracy_counts_tokens_at_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    bottleneck = load("bottleneck")
    run = bottleneck.Run("none", 20, 8, 10, torch.arange(20))
    monkeypatch.setattr(run.model, "translate", lambda *_, **__: [[4, 5, 6], [4], []])
    assert run.accuracy(torch.tensor([[4, 5, 7], [4, 5, 6], [4, 5, 6]])) == pytest.approx(3 / 9)


def test_the_bottleneck_and_its_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bottleneck = load("bottleneck")
    bottleneck.main(["--quick", "--picture", str(tmp_path / "bottleneck.png")])
    text = capsys.readouterr().out
    assert "the last state alone" in text
    # An LSTM of 32 units carries two states over.
    assert "From 5 to 97 tokens of held-out text, a state of 64 numbers (h and c) goes from" in text
    assert (tmp_path / "bottleneck.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["race", "bottleneck"])
def test_counts_are_checked(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(name).main(["--steps", "0"])
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err
