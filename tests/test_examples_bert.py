"""The example of masked tokens and packages: its functions, the split by files, the trainings and their report."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from seqkernels.testing import threads

for needed in ("tokenizers", "matplotlib", "tqdm"):
    pytest.importorskip(needed)

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module(name)


bert, stdlib_text = load("bert"), load("stdlib_text")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def test_functions_are_the_outer_ones_and_not_the_short() -> None:
    source = (
        "class A:\n    def f(self):\n        def g():\n            a\n            b\n            c\n        return g\n"
        "def short(): pass\nif x:\n    async def h():\n        a\n\n        b\n"
    )
    f = "def f(self):\n    def g():\n        a\n        b\n        c\n    return g"
    assert sorted(stdlib_text.find_functions(source)) == ["async def h():\n    a\n\n    b", f]


def test_held_out_functions_are_in_no_file_to_learn_from() -> None:
    library = stdlib_text.read_library(4)
    assert len(library.packages) > 1
    text = "\n".join(line.strip() for source in library.texts for line in source.splitlines())
    for functions, present in ((library.train, True), (library.held_out, False)):
        assert {function.package for function in functions} == set(library.packages)
        for function in functions[::7]:
            body = "\n".join(line.strip() for line in function.text.splitlines())
            assert (body in text) == present, function
    every = [function.text for function in library.train + library.held_out]
    assert len(set(every)) == len(every)
    assert stdlib_text.read_library(4) == library


def test_rows_are_padded_and_cut() -> None:
    tokens, lengths = bert.pad([[5, 6], [5, 6, 7, 8], []], 4)
    assert tokens.tolist() == [[1, 5, 6, 0], [1, 5, 6, 7], [1, 0, 0, 0]]
    assert lengths.tolist() == [3, 4, 1]


def test_training_and_its_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bert.main(["--quick", "--picture", str(tmp_path / "bert.png")])
    text = capsys.readouterr().out
    rows = {line[:28].strip(): line[28:].split() for line in text.splitlines()}
    assert float(rows["seqkernels.nn"][1]) < 5.7
    for name in ("", "pretrained, ", "from scratch, "):
        theirs, ours = (float(rows[f"{name}{layers}"][1]) for layers in bert.LAYERS)
        # Losses have four digits, and some 60 steps of rounding between them.
        assert abs(theirs - ours) < 0.01
    shares = [float(share) for share in re.findall(r"([\d.]+)%", text)]
    assert len(shares) == 5
    assert all(0 < share < 100 for share in shares)
    assert "times as fast in all trainings together" in text
    assert (tmp_path / "bert.png").stat().st_size > 10_000


def test_counts_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bert.main(["--steps", "0"])
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err


def test_how_often_each_is_taken_for_each() -> None:
    config = bert.BERTConfig(9, 4, 8, 1, 1, 0.0, 3)
    model = bert.BERT(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    found = bert.confusion(model, torch.full((70, 4), 5), torch.full((70,), 4), torch.arange(70) % 3)
    assert found.tolist() == [[0, 24, 0], [0, 23, 0], [0, 23, 0]]
