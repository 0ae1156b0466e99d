"""Tokenizers learned from texts: what they spell, what decoding gives back, and that others learn the same."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from seqkernels.integrations.tokenizers import SPECIAL_TOKENS, train_tokenizer

TEXTS = [
    f"def f_{i}(x, y={i}):\n    return x + y * {i}  # caf\u00e9 {'lower' if i % 2 else 'Lowest'}\n" for i in range(60)
]
UNSEEN = " Def g(x):\n\tpass  # \u4e2d \u2581 \U0001f916 x.\n"


@pytest.mark.parametrize("kind", SPECIAL_TOKENS)
def test_special_tokens_come_first_and_are_read(kind: str) -> None:
    tokenizer = train_tokenizer(TEXTS, kind, 320)
    special = list(SPECIAL_TOKENS[kind])
    assert tokenizer.get_vocab_size() <= 320
    assert [tokenizer.token_to_id(token) for token in special] == list(range(len(special)))
    ids = tokenizer.encode(special[0] + "return").ids
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "return"
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith(special[0])


def test_bytes_spell_any_text() -> None:
    tokenizer = train_tokenizer(iter(TEXTS), "bpe", 300, ())
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.encode("    return").tokens[-1] == "\u0120return"
    for text in (UNSEEN, TEXTS[0], "", "  ", "\x00\r\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_pieces_give_known_characters_back() -> None:
    tokenizer = train_tokenizer(TEXTS, "unigram", 200)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    found = tokenizer.encode("x \u4e2d y")
    assert tokenizer.token_to_id("<unk>") in found.ids
    assert tokenizer.decode(found.ids) == "x  y"
    assert tokenizer.decode(tokenizer.encode("  x\u2581y ").ids) == " x y "


def test_words_and_their_parts() -> None:
    tokenizer = train_tokenizer(TEXTS, "wordpiece", 150)
    assert tokenizer.decode(tokenizer.encode("Return  (caf\u00e9):\n").ids) == "return ( cafe ) :"
    parts = tokenizer.encode("lowers").tokens
    assert len(parts) > 1
    assert all(part.startswith("##") for part in parts[1:])
    assert "".join(part.removeprefix("##") for part in parts) == "lowers"
    assert tokenizer.encode("x \u4e2d").tokens == ["x", "[UNK]"]


def test_another_process_learns_the_same() -> None:
    # Hash maps of the library are in another order in each process.
    program = (
        "from seqkernels.integrations.tokenizers import train_tokenizer\n"
        f"for kind in ('bpe', 'wordpiece'): print(train_tokenizer({TEXTS!r}, kind, 310).to_str())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stdout.split("\n")[:2] == [train_tokenizer(TEXTS, kind, 310).to_str() for kind in ("bpe", "wordpiece")]


def test_pieces_are_in_an_order_that_does_not_depend_on_rounding() -> None:
    vocabulary = json.loads(train_tokenizer(TEXTS, "unigram", 200).to_str())["model"]["vocab"][3:]
    assert vocabulary == sorted(vocabulary, key=lambda piece: (-piece[1], piece[0]))
    assert all(score == round(score, 4) for _, score in vocabulary)
    assert len({score for _, score in vocabulary}) < len(vocabulary) < 200


BAD: dict[str, tuple[Any, ...]] = {
    "kind: expected one of 'bpe', 'wordpiece', 'unigram', got 'words'": (TEXTS, "words"),
    "vocab_size: expected a positive number, got 0": (TEXTS, "bpe", 0),
    "vocab_size: expected at least 257, for all characters and special tokens, got 256": (TEXTS, "bpe", 256),
    "vocab_size: expected at least 13, for all .*, got 12": (["ab cd"], "wordpiece", 12, ["[UNK]", *"123456"]),
    "vocab_size: expected at least 7, for all .*, got 6": (["abcd"], "unigram", 6, ["<unk>"]),
    "texts: expected some text, got none": ([" ", "\n"], "unigram"),
    "special_tokens: expected different ones": (TEXTS, "bpe", 300, ["<a>", "<a>"]),
    r"special_tokens: expected '\[UNK\]' among them for 'wordpiece', got \['a'\]": (TEXTS, "wordpiece", 300, ["a"]),
    "special_tokens: expected '<unk>' among them for 'unigram'": (TEXTS, "unigram", 300, ()),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(*BAD[message])


def test_texts_are_texts() -> None:
    with pytest.raises(TypeError, match="texts: expected an iterable of texts, got one text"):
        train_tokenizer("a text")
    with pytest.raises(TypeError, match="texts: expected texts, got bytes"):
        train_tokenizer([b"a text"])
    with pytest.raises(TypeError, match="special_tokens: expected a sequence of tokens, got '<unk>'"):
        train_tokenizer(TEXTS, special_tokens="<unk>")
