"""Subword tokenizers of Hugging Face tokenizers, learned from texts: as GPT-2, BERT and T5 have them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

try:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
except ImportError as error:
    raise ImportError("tokenizers is not installed: pip install 'seqkernels[examples]'") from error

#: Special tokens of each kind, in the order of their ids, where no others are given.
SPECIAL_TOKENS = {
    "bpe": ("<|endoftext|>",),
    "wordpiece": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "unigram": ("<pad>", "</s>", "<unk>"),
}
# What stands for characters that were not in the texts. Bytes need none.
_UNKNOWN = {"wordpiece": "[UNK]", "unigram": "<unk>"}
_CONTINUED = "##"
# Of scores around -10; the trainer's order of sums moves their eleventh digit.
_DIGITS = 4


def train_tokenizer(
    texts: Iterable[str], kind: str = "bpe", vocab_size: int = 8192, special_tokens: Sequence[str] | None = None
) -> Tokenizer:
    r"""Learn a vocabulary of words and their parts from texts.

    - ``"bpe"``: byte-level byte-pair encoding as in GPT-2. Any text is spelled, and decoding gives it back exactly.
      Source: Sennrich et al., 2016; Radford et al., 2019.
    - ``"wordpiece"``: as in BERT, uncased. Decoding gives back words in lower case without accents, with one space
      between them and around punctuation: not reversible. Characters that `texts` lack make a word ``[UNK]``.
      Source: Schuster & Nakajima, 2012; Devlin et al., 2019.
    - ``"unigram"``: as in SentencePiece and T5, spaces as U+2581, but without normalisation of the text. Decoding gives
      the text back, except: a space that it begins with, U+2581 itself, which becomes a space, and characters that
      `texts` lack, which are lost. Source: Kudo, 2018.

    The same texts give the same tokenizer. With ``"unigram"`` the library adds floating point numbers up in another
    order each time: scores are rounded here and pieces of the same score sorted, but where pieces are equally good to
    the last digit, as in texts made from a pattern, another one may be in the vocabulary.

    Special tokens get the first ids, in their order; where a text has one spelled out, it is read as that token, and
    decoding leaves it out unless told otherwise. Nothing is added to a text: begin it with ``[CLS]`` yourself.

    Args:
        texts: what to learn from, read once; all but ``"bpe"`` keep a copy while they learn.
        kind: one of the above.
        vocab_size: the most tokens, special ones included; fewer where `texts` have no more parts.
        special_tokens: those of the model by default, see `SPECIAL_TOKENS`; ``()`` for none. ``"wordpiece"`` needs
            ``[UNK]`` and ``"unigram"`` ``<unk>`` among them.

    Returns:
        A ``tokenizers.Tokenizer``: ``encode``, ``decode``, ``save`` and the rest are documented there.

    Raises:
        ImportError: tokenizers is not installed (when this module is imported).
        TypeError: `texts` is one text, or has something else than texts.
        ValueError: the message names the argument, what it was and what is allowed.

    Example:
        >>> tokenizer = train_tokenizer(lines, "wordpiece", 1000)
        >>> tokenizer.encode("[CLS] a text").ids
    """
    if kind not in SPECIAL_TOKENS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, SPECIAL_TOKENS))}, got {kind!r}")
    special = list(SPECIAL_TOKENS[kind] if special_tokens is None else special_tokens)
    _check_special_tokens(special, special_tokens, kind)
    if isinstance(texts, str):
        raise TypeError("texts: expected an iterable of texts, got one text")
    if vocab_size < 1:
        raise ValueError(f"vocab_size: expected a positive number, got {vocab_size}")
    tokenizer: Tokenizer = _TRAIN[kind](_checked(texts), vocab_size, special)
    _check_vocab_size(vocab_size, tokenizer.get_vocab_size())
    return tokenizer


def _check_special_tokens(special: list[str], given: Sequence[str] | None, kind: str) -> None:
    if isinstance(given, str):
        raise TypeError(f"special_tokens: expected a sequence of tokens, got {given!r}")
    if "" in special or len(set(special)) < len(special):
        raise ValueError(f"special_tokens: expected different ones with a character at least, got {special}")
    unknown = _UNKNOWN.get(kind)
    if unknown is not None and unknown not in special:
        raise ValueError(f"special_tokens: expected {unknown!r} among them for {kind!r}, got {special}")


def _checked(texts: Iterable[str]) -> Iterable[str]:
    found = False
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts: expected texts, got {type(text).__name__}")
        found = found or bool(text.strip())
        yield text
    if not found:
        raise ValueError("texts: expected some text, got none")


def _check_vocab_size(vocab_size: int, needed: int) -> None:
    if needed > vocab_size:
        raise ValueError(
            f"vocab_size: expected at least {needed}, for all characters and special tokens, got {vocab_size}"
        )


def _train_bpe(texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _wordpiece(vocab: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=_UNKNOWN["wordpiece"]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUED)
    return tokenizer


def _train_wordpiece(texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    learner = _wordpiece({})
    texts = [learner.normalizer.normalize_str(text) for text in texts]
    words = {word for text in texts for word, _ in learner.pre_tokenizer.pre_tokenize_str(text)}
    # The trainer numbers these as it meets them, in another order each time, and ties are broken by numbers; in front
    # of everything they have numbers already.
    continued = sorted({_CONTINUED + character for word in words for character in word[1:]} - set(special))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=special + continued,
        continuing_subword_prefix=_CONTINUED,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    tokenizer = _wordpiece(learner.get_vocab())
    tokenizer.add_special_tokens(special)
    return tokenizer


def _unigram(*vocab: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram(*vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _train_unigram(texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    texts, learner, unknown = list(texts), _unigram(), _UNKNOWN["unigram"]
    # With fewer, the trainer may search for ever; one longer piece it has in any case.
    _check_vocab_size(vocab_size, len({"\u2581", *"".join(texts)} - {" "}) + 1 + len(special))
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token=unknown, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    pieces = [(piece, round(score, _DIGITS)) for piece, score in json.loads(learner.to_str())["model"]["vocab"]]
    pieces = pieces[: len(special)] + sorted(pieces[len(special) :], key=lambda piece: (-piece[1], piece[0]))
    tokenizer = _unigram(pieces, special.index(unknown), False)
    tokenizer.add_special_tokens(special)
    return tokenizer


_TRAIN: dict[str, Callable[[Iterable[str], int, list[str]], Tokenizer]] = {
    "bpe": _train_bpe,
    "wordpiece": _train_wordpiece,
    "unigram": _train_unigram,
}
