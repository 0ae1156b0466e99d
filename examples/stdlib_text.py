"""The source of Python's standard library, that of the interpreter which runs this, as byte-pair tokens."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

#: Folders that are no part of the library, or only test it.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def read_sources(every: int) -> tuple[list[str], list[str]]:
    """Every so many files of the standard library, to train on and, a twentieth of them by their names, held out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not LEFT_OUT.intersection(p.relative_to(root).parts))[::every]
    parts: tuple[list[str], list[str]] = ([], [])
    for path in paths:
        name = path.relative_to(root).as_posix().encode()
        parts[hashlib.sha256(name).digest()[0] < 13].append(path.read_text("utf-8", "replace"))
    return parts


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-pair encoding, which can spell any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts behind one another, (N,) int64."""
    return torch.tensor([token for found in tokenizer.encode_batch(texts) for token in found.ids])


def load(every: int, vocab_size: int) -> tuple[Tokenizer, Tensor, Tensor]:
    """A tokenizer learned from every so many files, and the tokens to train on and held out."""
    texts, held_out = read_sources(every)
    tokenizer = train_tokenizer(texts, vocab_size)
    return tokenizer, encode(tokenizer, texts), encode(tokenizer, held_out)


def draw_batch(data: Tensor, size: int, context: int, generator: torch.Generator) -> Tensor:
    """`size` random pieces, (size, context + 1)."""
    starts = torch.randint(len(data) - context, (size, 1), generator=generator)
    return data[starts + torch.arange(context + 1)]
