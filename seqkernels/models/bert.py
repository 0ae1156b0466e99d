"""An encoder of text that reads in both directions: masked tokens to learn from, a class of a text to tell."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from .. import nn as seqkernels_nn
from .._sequences import require
from ._model import Model, check_dropout, check_integers, check_ints, check_sizes, check_tokens, number

#: The target of tokens that are not to be predicted, which ``cross_entropy`` leaves out.
IGNORED = -100
# Of the paper's code, for weights and for layer norms.
_STD, _EPS = 0.02, 1e-12


@dataclass(frozen=True)
class BERTConfig:
    """Sizes of a `BERT`, and which tokens are special.

    Attributes:
        vocab_size: tokens of the vocabulary.
        context: the most tokens of a sequence.
        embed_size: features of a token, a multiple of `num_heads`.
        num_layers: blocks.
        num_heads: heads of attention.
        dropout: probability with which a feature of the embedding, of a block, or of the pooled text is dropped in
            training, and a weight of attention. Equal seeds drop other ones with the two kinds of layers.
        num_classes: of the texts; 0 for a model that tells none.
        num_segments: kinds of segments, as of the two sentences of a pair.
        num_special: tokens below this are special: neither masked nor drawn in place of another.
        pad: the special token that fills sequences up.
        mask: the special token in place of what is to be predicted.

    Raises:
        ValueError: the message names the attribute, what it was and what is allowed.
        TypeError: likewise, of an attribute of another type.
    """

    vocab_size: int
    context: int = 128
    embed_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    dropout: float = 0.1
    num_classes: int = 0
    num_segments: int = 2
    num_special: int = 5
    pad: int = 0
    mask: int = 4

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "context", "embed_size", "num_layers", "num_heads", "num_segments")
        check_ints(self, "num_classes", "num_special", "pad", "mask")
        if self.embed_size % self.num_heads:
            raise ValueError(f"embed_size: expected a multiple of {self.num_heads} heads, got {self.embed_size}")
        check_dropout(self.dropout)
        if self.num_classes < 0 or self.num_classes == 1:
            raise ValueError(f"num_classes: expected 0, or 2 or more, got {self.num_classes}")
        if not 2 <= self.num_special < self.vocab_size:
            raise ValueError(f"num_special: expected from 2 to {self.vocab_size - 1}, got {self.num_special}")
        for name in ("pad", "mask"):
            if not 0 <= getattr(self, name) < self.num_special:
                raise ValueError(f"{name}: expected from 0 to {self.num_special - 1}, got {getattr(self, name)}")
        if self.pad == self.mask:
            raise ValueError(f"mask: expected another token than pad, got {self.mask} for both")


def mask_tokens(
    tokens: Tensor, config: BERTConfig, generator: torch.Generator | None = None, probability: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Hide tokens at random, to be predicted.

    Of those chosen 80 % become ``config.mask``, 10 % a random token, and 10 % stay. Special tokens, padding among
    them, are never chosen and never drawn.

    Source: Devlin et al., 2019, appendix A.1.

    Args:
        tokens: int64 or int32, of any shape, with ids from 0 to ``config.vocab_size - 1``.
        config: of the model.
        generator: of the draws, on the device of `tokens`; torch's own by default.
        probability: that a token is chosen, each by itself. Default: that of the paper.

    Returns:
        The tokens to read, as `tokens`, and those to predict, int64, `IGNORED` (-100) where none was chosen: a mean
        over the targets of a batch in which nothing was chosen is NaN.

    Raises:
        TypeError: `tokens` are no tensor of integers, or `probability` is no number.
        ValueError: `probability` is none.
    """
    check_integers(tokens, "tokens")
    probability = number(probability, "probability")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: expected from 0 to 1, got {probability}")
    drawn = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    other = torch.randint(
        config.num_special,
        config.vocab_size,
        tokens.shape,
        generator=generator,
        device=tokens.device,
        dtype=tokens.dtype,
    )
    drawn = drawn.masked_fill(tokens < config.num_special, 1.0)
    chosen = drawn < probability
    inputs = tokens.where(drawn >= 0.9 * probability, other).masked_fill(drawn < 0.8 * probability, config.mask)
    return inputs, tokens.long().masked_fill(~chosen, IGNORED)


class BERT(Model):
    """Bidirectional encoder with two heads, written once for the layers of torch and of seqkernels.

    Blocks are ``TransformerEncoderLayer`` with the norm behind each sum. Masked tokens are predicted by a
    perceptron whose output shares the embedding; a text is classified from its first token.

    Parameters are created in the same order for both, so the same seed gives the same weights, and their names are
    the same, so a ``state_dict`` moves both ways.

    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019.

    B batch, M tokens, E embedding size, V vocabulary size.

    Args:
        config: the sizes.
        layers: ``seqkernels.nn`` or ``torch.nn``: whose layers to use.

    Raises:
        ValueError: `layers` is neither.

    Example:
        >>> inputs, targets = mask_tokens(tokens, model.config)
        >>> hidden = model.encode(inputs, lengths)
        >>> chosen = targets != -100
        >>> loss = F.cross_entropy(model.predict(hidden[chosen]), targets[chosen])
    """

    Config = BERTConfig
    config: BERTConfig

    def __init__(self, config: BERTConfig, layers: ModuleType = seqkernels_nn) -> None:
        super().__init__(config, layers)
        size = config.embed_size
        self.embedding = nn.Embedding(config.vocab_size, size)
        self.positions = nn.Embedding(config.context, size)
        self.segments = nn.Embedding(config.num_segments, size)
        self.norm = nn.LayerNorm(size, _EPS)
        self.dropout = nn.Dropout(config.dropout)
        sizes = (size, config.num_heads, 4 * size, config.dropout, "gelu", _EPS)
        blocks = (layers.TransformerEncoderLayer(*sizes, batch_first=True) for _ in range(config.num_layers))
        self.blocks = nn.ModuleList(blocks)
        self.transform = nn.Linear(size, size)
        self.transform_norm = nn.LayerNorm(size, _EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.pooler = nn.Linear(size, size) if config.num_classes else None
        self.classifier = nn.Linear(size, config.num_classes) if config.num_classes else None
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def encode(self, tokens: Tensor, lengths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """What each token means among the others of its row.

        Args:
            tokens: (B, M) int64 or int32, padded at the end.
            lengths: (B,) int64 or int32, from 0 to M, tokens of each row before the padding, which is read by none;
                ``None`` where all are read, ``config.pad`` too. A row of no tokens gives numbers that mean nothing.
            segments: (B, M) int64 or int32, the segment of each token; the first for all by default.

        Returns:
            (B, M, E); that of padding means nothing.

        Raises:
            ValueError: there are more tokens than the model is made for, a shape is another, or a length out of range
                (torch's error in a compiled program or on a GPU).
            TypeError: an argument is no tensor of integers.
        """
        check_tokens(tokens)
        if tokens.shape[1] > self.config.context:
            raise ValueError(f"tokens: expected at most {self.config.context} in a row, got {tokens.shape[1]}")
        padding = None if lengths is None else _padding(tokens, lengths)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.positions(places) + self._segments_of(tokens, segments)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        return x

    def _segments_of(self, tokens: Tensor, segments: Tensor | None) -> Tensor:
        """Their embeddings, (B, M, E), or (E,) for all."""
        if segments is None:
            return self.segments.weight[0]
        check_integers(segments, "segments")
        if segments.shape != tokens.shape:
            raise ValueError(f"segments: expected {tuple(tokens.shape)} as tokens, got {tuple(segments.shape)}")
        found: Tensor = self.segments(segments)
        return found

    def predict(self, hidden: Tensor) -> Tensor:
        """Score the tokens that may have been masked. Give it the masked ones alone, and it need not score others.

        Args:
            hidden: (..., E), of `encode`.

        Returns:
            Logits (..., V).
        """
        hidden = self.transform_norm(nn.functional.gelu(self.transform(hidden)))
        return nn.functional.linear(hidden, self.embedding.weight, self.bias)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Score the token of each place: `predict` of `encode`. Arguments and errors as of `encode`.

        Returns:
            Logits (B, M, V).
        """
        return self.predict(self.encode(tokens, lengths, segments))

    def classify(self, tokens: Tensor, lengths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Score the classes of each text, from its first token. Arguments and errors as of `encode`.

        Returns:
            Logits (B, ``config.num_classes``).

        Raises:
            ValueError: the model has no classes, or no first token is there.
        """
        if self.pooler is None or self.classifier is None:
            raise ValueError("num_classes: expected at least 2 to classify, the model has 0")
        check_tokens(tokens)
        if tokens.shape[1] == 0:
            raise ValueError(f"tokens: expected at least one in a row, got {tuple(tokens.shape)}")
        first = self.encode(tokens, lengths, segments)[:, 0]
        logits: Tensor = self.classifier(self.dropout(self.pooler(first).tanh()))
        return logits


def _padding(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Where nothing is to be read, (B, M) bool."""
    check_integers(lengths, "lengths")
    if lengths.shape != tokens.shape[:1]:
        raise ValueError(f"lengths: expected ({tokens.shape[0]},), got {tuple(lengths.shape)}")
    text = "lengths: expected values from 0 to M, the tokens of a row"
    require((lengths >= 0) & (lengths <= tokens.shape[1]), lengths, text)
    # With nothing to read at all, torch's attention gives NaN: such a row reads its first place.
    lengths = lengths.to(tokens.device).clamp(min=1)
    return torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
