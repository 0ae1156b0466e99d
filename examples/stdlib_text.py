"""The source of Python's standard library, that of the interpreter which runs this, as byte-pair tokens."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from seqkernels.integrations import tokenizers

#: Folders that are no part of the library, or only test it.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
#: A package is well filled with so many files that have functions, and so many functions.
FILES, FUNCTIONS = 10, 250


class Function(NamedTuple):
    """A function of the library, or a method: its package and its source."""

    package: str
    text: str


class Library(NamedTuple):
    """Functions of well-filled packages, to train on and, those of a quarter of the files, held out; other text."""

    packages: list[str]
    train: list[Function]
    held_out: list[Function]
    texts: list[str]


def list_files() -> list[tuple[str, Path]]:
    """Names inside the library and paths of its files, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    names = ((path.relative_to(root), path) for path in sorted(root.rglob("*.py")))
    return [(name.as_posix(), path) for name, path in names if not LEFT_OUT.intersection(name.parts)]


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def read_sources(every: int) -> tuple[list[str], list[str]]:
    """Every so many files of the standard library, to train on and, a twentieth of them by their names, held out."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name, path in list_files()[::every]:
        parts[_digest(name)[0] < 13].append(path.read_text("utf-8", "replace"))
    return parts


def find_functions(source: str) -> list[str]:
    """The functions of four lines and more that are not inside of others, without what they are indented by."""
    lines, found = source.split("\n"), []  # as ast counts them: a form feed ends none
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in old sources
        pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = lines[node.lineno - 1 : node.end_lineno]
                found += [textwrap.dedent("\n".join(text))] if len(text) > 3 else []
            else:
                pending.append(node)
    return found


def read_library(every: int) -> Library:
    """The functions of packages that are well filled, each function once, and all files that are not held out.

    Args:
        every: read every so many files; a package then is well filled with fewer.
    """
    files: dict[str, list[tuple[str, list[str]]]] = {}
    sources = {name: path.read_text("utf-8", "replace") for name, path in list_files()[::every]}
    for name, source in sources.items():
        functions = find_functions(source) if "/" in name else []
        if functions:
            files.setdefault(name.split("/")[0], []).append((name, functions))
    counts = {package: len({text for _, texts in found for text in texts}) for package, found in files.items()}
    packages = [
        package
        for package, count in counts.items()
        if count * every >= FUNCTIONS and len(files[package]) * every >= FILES and len(files[package]) > 1
    ]
    seen: Counter[str] = Counter()
    parts: tuple[list[Function], list[Function]] = ([], [])
    for package in packages:
        found = sorted(files[package], key=lambda file: _digest(file[0]))
        for number, (name, texts) in enumerate(found):
            held_out = number < max(1, len(found) // 4)
            if held_out:
                del sources[name]
            parts[held_out].extend(Function(package, text) for text in texts)
            seen.update(texts)
    train, held_out = ([function for function in part if seen[function.text] == 1] for part in parts)
    return Library(packages, train, held_out, list(sources.values()))


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-pair encoding, which can spell any text."""
    return tokenizers.train_tokenizer(texts, "bpe", vocab_size, ())


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
