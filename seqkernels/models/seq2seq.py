"""A translator: bidirectional LSTM encoder, LSTM decoder, and bilinear alignment attention between them.

The decoder does not feed the attended context back into itself, so that in training each of the three parts runs
over whole sequences in one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import nn as seqkernels_nn
from ..nn.alignment import BilinearAttention
from ._model import Model, attention_of


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes of a `Seq2Seq`.

    Attributes:
        vocab_size: tokens of the vocabulary that source and target share.
        embed_size: features of a token.
        hidden_size: units of the decoder; each direction of the encoder has half as many.
        dropout: probability with which a feature is dropped between the parts in training.
        pad: id of the token that fills up sources and targets.
        bos: id of the token that opens a target where no other is given.
        eos: id of the token that closes a target.

    Raises:
        ValueError: the message names the attribute, what it was and what is allowed.
    """

    vocab_size: int
    embed_size: int = 64
    hidden_size: int = 128
    dropout: float = 0.1
    pad: int = 0
    bos: int = 1
    eos: int = 2

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size: expected an even number, got {self.hidden_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")
        for name in ("pad", "bos", "eos"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name}: expected an id below {self.vocab_size}, got {getattr(self, name)}")


class Memory(NamedTuple):
    """What the decoder sees of a batch of sources.

    Attributes:
        hidden: (B, N, H), the encoder's states.
        mask: (B, 1, N) bool, ``False`` on padding.
    """

    hidden: Tensor
    mask: Tensor


class State(NamedTuple):
    """The decoder's state between two tokens.

    Attributes:
        hidden: (1, B, H).
        cell: (1, B, H).
    """

    hidden: Tensor
    cell: Tensor


class Seq2Seq(Model):
    """Sequence-to-sequence model with attention, written once for the layers of torch and of seqkernels.

    Parameters are created in the same order for both, so the same seed gives the same weights, and their names are
    the same, so a ``state_dict`` moves both ways.

    Sources: the encoder and decoder of Sutskever, Vinyals and Le, "Sequence to Sequence Learning with Neural
    Networks", 2014; attention after the decoder as in Luong, Pham and Manning, "Effective Approaches to
    Attention-based Neural Machine Translation", 2015.

    B batch, N source length, M target length, V vocabulary size.

    Args:
        config: the sizes.
        layers: ``seqkernels.nn`` or ``torch.nn``: whose LSTM, and whose attention, to use.

    Raises:
        ValueError: `layers` is neither.
    """

    Config = Seq2SeqConfig
    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig, layers: ModuleType = seqkernels_nn) -> None:
        super().__init__(config, layers)
        embed, hidden = config.embed_size, config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, embed, padding_idx=config.pad)
        self.encoder = layers.LSTM(embed, hidden // 2, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, 2 * hidden)
        self.decoder = layers.LSTM(embed, hidden, batch_first=True)
        self.attention = BilinearAttention(hidden, hidden, attention=attention_of(layers))
        self.combine = nn.Linear(2 * hidden, hidden)
        self.output = nn.Linear(hidden, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Memory, State]:
        """Read sources.

        Args:
            source: (B, N) int64 token ids, padded at the end.
            lengths: (B,) int64 on the CPU, the number of tokens of each source, at least 1.

        Returns:
            What the decoder sees, and the state it starts from.
        """
        embedded = self.dropout(self.embedding(source))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, (h_n, c_n) = self.encoder(packed)
        hidden, _ = pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        ends = torch.cat((h_n[0], h_n[1], c_n[0], c_n[1]), dim=-1)
        h_0, c_0 = self.bridge(ends).tanh().unsqueeze(0).chunk(2, dim=-1)
        positions = torch.arange(source.shape[1], device=source.device)
        mask = positions < lengths.to(source.device)[:, None, None]
        return Memory(self.dropout(hidden), mask), State(h_0, c_0)

    def decode(self, target: Tensor, memory: Memory, state: State) -> tuple[Tensor, State]:
        """Score the tokens that follow each token of `target`.

        Args:
            target: (B, M) int64 token ids: a whole target in training, one token in a step of `translate`.
            memory: from `encode`.
            state: from `encode` or from the call before.

        Returns:
            Logits (B, M, V) and the state after the last token.
        """
        y, (hidden, cell) = self.decoder(self.dropout(self.embedding(target)), tuple(state))
        context = self.attention(y, memory.hidden, memory.mask)
        combined = self.combine(self.dropout(torch.cat((y, context), dim=-1))).tanh()
        return self.output(self.dropout(combined)), State(hidden, cell)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Logits of the next token after each token of `target` (teacher forcing).

        Args:
            source: (B, N) int64 token ids, padded at the end.
            lengths: (B,) int64 on the CPU, the number of tokens of each source.
            target: (B, M) int64 token ids, the opening token first.

        Returns:
            (B, M, V).
        """
        memory, state = self.encode(source, lengths)
        return self.decode(target, memory, state)[0]

    @torch.no_grad()
    def translate(
        self, source: Tensor, lengths: Tensor, start: Tensor | None = None, max_length: int = 64
    ) -> list[list[int]]:
        """Translate greedily, token by token. Call ``eval()`` before, or dropout is active.

        Args:
            source: (B, N) int64 token ids, padded at the end.
            lengths: (B,) int64 on the CPU, the number of tokens of each source.
            start: (B,) int64, the token that opens each target; ``config.bos`` by default.
            max_length: tokens after which a translation is cut off.

        Returns:
            For each source the ids of its translation, without the opening and the closing token.
        """
        memory, state = self.encode(source, lengths)
        token = source.new_full((len(source),), self.config.bos) if start is None else start
        open_ = torch.ones_like(token, dtype=torch.bool)
        steps: list[Tensor] = []
        while len(steps) < max_length and bool(open_.any()):
            logits, state = self.decode(token[:, None], memory, state)
            token = logits[:, 0].argmax(dim=-1)
            open_ &= token != self.config.eos
            steps.append(token.where(open_, self.config.eos))
        rows: list[list[int]] = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in source]
        return [row[: row.index(self.config.eos)] if self.config.eos in row else row for row in rows]

    @torch.no_grad()
    def align(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Which source tokens each next token of `target` is read from. Arguments as in `forward`.

        Returns:
            (B, M, N), each row summing to 1, zero on padding.
        """
        memory, state = self.encode(source, lengths)
        y, _ = self.decoder(self.dropout(self.embedding(target)), tuple(state))
        return self.attention.weights(y, memory.hidden, memory.mask)
