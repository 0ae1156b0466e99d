"""The data of the demo, and the demo itself in its quick form."""

from __future__ import annotations

import importlib
import random
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for needed in ("babel", "tokenizers", "matplotlib", "tqdm"):
        pytest.importorskip(needed)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)


@pytest.fixture
def cldr(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("cldr", monkeypatch)


def test_pairs_are_clean(cldr: ModuleType) -> None:
    pairs = cldr.load_pairs()
    assert 7500 < len(pairs) < 9500
    assert set(Counter(pair.language for pair in pairs)) == set(cldr.LANGUAGES)
    kinds = Counter(pair.kind for pair in pairs)
    assert set(kinds) == set(cldr.KINDS)
    assert min(kinds.values()) > 1000
    assert len({pair[:3] for pair in pairs}) == len(pairs)
    for pair in pairs:
        for name in (pair.source, pair.target):
            assert 0 < len(name) <= cldr.LONGEST
            assert name == " ".join(name.split())
            assert not set("{}()0123456789") & set(name)
            assert name != pair.code
    known = {(pair.source, pair.language): pair.target for pair in pairs}
    assert known["Norwegian", "fr"] == "norvégien"
    assert known["Germany", "es"] == "Alemania"
    assert known["Swiss francs", "it"] == "franchi svizzeri"
    assert known["kilometers", "pt"] == "quilômetros"


def test_split_has_no_leak_and_is_always_the_same(cldr: ModuleType) -> None:
    pairs = cldr.load_pairs()
    assert cldr.load_pairs() == pairs
    train, held_out = cldr.split(pairs)
    assert len(train) + len(held_out) == len(pairs)
    assert 0.07 < len(held_out) / len(pairs) < 0.11
    assert not {pair.source.casefold() for pair in train} & {pair.source.casefold() for pair in held_out}
    assert {(pair.kind, pair.language) for pair in held_out} == {(pair.kind, pair.language) for pair in pairs}
    shuffled = random.Random(0).sample(pairs, len(pairs))
    assert set(cldr.split(shuffled)[1]) == set(held_out)


def test_tokenizer_knows_its_text_and_the_special_tokens(cldr: ModuleType) -> None:
    train, _ = cldr.split(cldr.load_pairs())
    tokenizer = cldr.train_tokenizer(train, vocab_size=300)
    assert tokenizer.get_vocab_size() == 300
    special = [cldr.PAD, cldr.BOS, cldr.EOS, cldr.UNKNOWN]
    assert [tokenizer.token_to_id(token) for token in special] == [0, 1, 2, 3]
    for pair in train[::37]:
        assert cldr.UNKNOWN not in [tokenizer.id_to_token(tokenizer.token_to_id(x)) for x in cldr.leading_tokens(pair)]
        for name in (pair.source, pair.target):
            assert tokenizer.decode(tokenizer.encode(name).ids) == name
    again = cldr.train_tokenizer(train, vocab_size=300)
    assert again.to_str() == tokenizer.to_str()


def test_the_demo_runs_and_both_trainings_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "report" / "demo.png"
    load("translate", monkeypatch).main(["--quick", "--picture", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert picture.stat().st_size > 10_000
    assert "lstm recurrence of torch.float32" in "\n".join(lines[:5])
    begin = next(i for i, line in enumerate(lines) if line.startswith("epoch"))
    for line in lines[begin + 1 : begin + 3]:
        _, theirs, _, ours, _, _, at_equal_weights = line.split()
        assert float(ours) == pytest.approx(float(theirs), rel=1e-4)
        assert float(at_equal_weights) < 1e-5 * float(theirs)
    assert sum(" exact (" in line for line in lines) == 2
    assert any(line.startswith("GRU, ") for line in lines)
