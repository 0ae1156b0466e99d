"""Pairs of names from the Unicode CLDR, as Babel ships it: English to French, German, Spanish, Italian, Portuguese.

Names of territories, languages, currencies and units of measurement, the latter two as singular and plural.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from babel import Locale
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

#: The languages translated into, and their names.
LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish", "it": "Italian", "pt": "Portuguese"}
KINDS = ("territory", "language", "currency", "unit")
#: Names longer than this many characters are left out.
LONGEST = 32
PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"

_EXPLAINED = re.compile(r"[0-9()]")
_SPACES = re.compile(r"\s+")


class Pair(NamedTuple):
    """One English name and its translation.

    Attributes:
        source: the English name.
        target: the name in the other language.
        language: a key of `LANGUAGES`.
        kind: one of `KINDS`.
        code: what CLDR calls it, ``"NO"`` for example; singular and plural share it.
    """

    source: str
    target: str
    language: str
    kind: str
    code: str


def _names(locale: Locale) -> dict[tuple[str, str, str], str]:
    """The names that a locale gives, by kind, code and form."""
    data = locale._data
    found: dict[tuple[str, str, str], str] = {}
    for kind, group in (("territory", "territories"), ("language", "languages"), ("currency", "currency_names")):
        found.update({(kind, code, "name"): name for code, name in data[group].items()})
    for code, forms in data["currency_names_plural"].items():
        found["currency", code, "plural"] = forms.get("other", "")
    for code, forms in data["unit_display_names"].items():
        found["unit", code, "name"] = forms.get("long", "")
        pattern = data["unit_patterns"].get(code, {}).get("long", {}).get("one", "")
        found["unit", code, "one"] = pattern.replace("{0}", "")
    return {key: _SPACES.sub(" ", name).strip().replace("\u2019", "'") for key, name in found.items()}


def load_pairs() -> list[Pair]:
    """All clean pairs, without duplicates, in an order that does not depend on the machine.

    Left out: names that are missing in one of the two languages, that are the bare code, that have digits or
    brackets (currencies with the years in which they were valid), and names of more than `LONGEST` characters.
    """
    english = _names(Locale("en"))
    pairs: dict[tuple[str, str, str], Pair] = {}
    for language in LANGUAGES:
        translated = _names(Locale(language))
        for kind, code, form in sorted(english.keys() & translated.keys()):
            source, target = english[kind, code, form], translated[kind, code, form]
            if not source or not target or max(len(source), len(target)) > LONGEST:
                continue
            if code in (source, target) or _EXPLAINED.search(source + target):
                continue
            pairs.setdefault((source, target, language), Pair(source, target, language, kind, code))
    return list(pairs.values())


def _held_out(pair: Pair, part: float) -> bool:
    digest = hashlib.sha256(pair.source.casefold().encode()).digest()
    return int.from_bytes(digest[:4], "big") < part * 2**32


def split(pairs: Iterable[Pair], part: float = 0.09) -> tuple[list[Pair], list[Pair]]:
    """Divide pairs into training and held-out ones by a hash of the English name, so always in the same way.

    All translations of one English name go to the same side. The singular of a held-out plural may be trained on.

    Args:
        pairs: from `load_pairs`.
        part: share of the names that is held out.

    Returns:
        The training pairs and the held-out pairs; no English name is in both, letter case ignored.
    """
    train: list[Pair] = []
    held_out: list[Pair] = []
    for pair in pairs:
        (held_out if _held_out(pair, part) else train).append(pair)
    return train, held_out


def leading_tokens(pair: Pair) -> tuple[str, str]:
    """The tokens that stand before the English name: the wanted language and the kind of thing.

    The kind decides what a name alone does not: whether it is written with a capital letter, for example.
    """
    return f"<{pair.language}>", f"<{pair.kind}>"


def train_tokenizer(pairs: Iterable[Pair], vocab_size: int) -> Tokenizer:
    """A byte-pair encoding shared by both sides, learned from the names of `pairs`.

    Args:
        pairs: the training pairs.
        vocab_size: number of tokens, special tokens and single characters included.

    Returns:
        The tokenizer; the ids of `PAD`, `BOS`, `EOS` and `UNKNOWN` are 0 to 3.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, UNKNOWN, *(f"<{name}>" for name in (*LANGUAGES, *KINDS))],
        show_progress=False,
    )
    tokenizer.train_from_iterator((name for pair in pairs for name in (pair.source, pair.target)), trainer)
    return tokenizer
