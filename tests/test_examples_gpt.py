"""The examples of language models: the text and its tokens, the training by turns, the table, the pictures."""

from __future__ import annotations

import importlib
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


gpt, stdlib_text = load("gpt"), load("stdlib_text")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def test_sources_are_the_librarys_and_split_by_their_names() -> None:
    train, held_out = stdlib_text.read_sources(1)
    assert len(train) > 400
    assert 0.02 < len(held_out) / len(train) < 0.09
    assert not set(filter(str.strip, held_out)) & set(train)
    assert any("class LifoQueue" in text for text in train + held_out)
    assert stdlib_text.read_sources(1) == (train, held_out)


def test_tokens_spell_the_text() -> None:
    texts = ["def f(x):\n    return x + 1\n", "for x in y:\n\tpass  # \u00e4\u4e2d\n"]
    tokenizer = stdlib_text.train_tokenizer(texts, 270)
    tokens = stdlib_text.encode(tokenizer, [*texts, "unseen \u20ac"])
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens.tolist()) == "".join(texts) + "unseen \u20ac"


def test_batches_are_pieces_of_the_text() -> None:
    data = torch.arange(100)
    batch = stdlib_text.draw_batch(data, 50, 90, torch.Generator().manual_seed(0))
    assert batch.shape == (50, 91)
    assert torch.equal(batch - batch[:, :1], torch.arange(91).expand(50, -1))
    assert set(batch[:, 0].tolist()) == set(range(10))


def test_turns_alternate_and_both_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [gpt.Run(name, GPTConfig(50, 8, 32, 1, 1), 45) for name in gpt.LAYERS]
    order: list[tuple[str, torch.Tensor]] = []
    original = gpt.Run.train

    def train(self: gpt.Run, batches: list[torch.Tensor]) -> None:
        order.append((self.name, torch.stack(batches)))
        original(self, batches)

    monkeypatch.setattr(gpt.Run, "train", train)
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(a, b)
    gpt.train(runs, torch.arange(400) % 50, 45)
    theirs, ours = gpt.LAYERS
    assert [name for name, _ in order] == [theirs, ours, ours, theirs, theirs, ours]
    assert [len(batches) for _, batches in order] == [20, 20, 20, 20, 5, 5]
    for (_, first), (_, second) in zip(order[::2], order[1::2], strict=True):
        assert torch.equal(first, second)
    for run in runs:
        assert len(run.losses) == len(run.seconds) == 3
        assert run.losses[-1] < run.losses[0]


def test_training_and_its_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gpt.main(["--quick", "--picture", str(tmp_path / "gpt.png")])
    text = capsys.readouterr().out
    assert "seqkernels.nn trains" in text
    assert "generated texts are equal: True" in text
    assert "class Queue:" in text
    assert (tmp_path / "gpt.png").stat().st_size > 10_000


def test_counts_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpt.main(["--steps", "0"])
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err


def test_models_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    verbosity = transformers.logging.get_verbosity()
    huggingface = load("huggingface")
    huggingface.main(["--quick"])
    transformers.logging.set_verbosity(verbosity)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    names = [" ".join(name.split()) for name in huggingface.MODELS]
    for name in names:
        found = [row for row in rows if " ".join(row).startswith(name)]
        assert len(found) == (2 if name == "BERT" else 3)
        for row in found:
            assert torch.tensor([float(x) for x in row[-4:]]).isfinite().all()


@pytest.mark.parametrize("padding", ["BERT", "Llama"])
def test_batches_are_padded(padding: str) -> None:
    pytest.importorskip("transformers")
    batch, real = load("huggingface").make_batch(padding, 3, 8)
    assert real.sum(1).tolist() == [8, 6, 4]
    assert bool(real[:, 0 if padding == "BERT" else -1].all())
    assert torch.equal(batch["attention_mask"].bool(), real)
    assert not batch["input_ids"][~real].any()


@pytest.mark.parametrize("option", ["--length", "--rounds"])
def test_counts_of_the_comparison_are_checked(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit):
        load("huggingface").main([option, "0"])
    assert f"{option}: expected at least 1, got 0" in capsys.readouterr().err
