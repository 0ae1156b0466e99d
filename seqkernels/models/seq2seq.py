"""A translator: bidirectional recurrent encoder, recurrent decoder, and bilinear alignment attention between them.

The decoder does not feed the attended context back into itself, so that in training each of the three parts runs
over whole sequences in one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import nn as seqkernels_nn
from .._sequences import require
from ..nn.alignment import BilinearAttention
from . import generation
from ._model import (
    CELLS,
    Model,
    attention_of,
    check_choice,
    check_dropout,
    check_integers,
    check_ints,
    check_sizes,
    check_tokens,
    integer,
    number,
)


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
        cell: ``"rnn"`` (Elman's, with tanh), ``"lstm"`` or ``"gru"``, of encoder and decoder.
        attention: ``"bilinear"``, or ``"none"``: then the decoder knows of a source what fits into the state that it
            starts from, and no more.

    Raises:
        ValueError: the message names the attribute, what it was and what is allowed.
        TypeError: likewise, of an attribute of another type.
    """

    vocab_size: int
    embed_size: int = 64
    hidden_size: int = 128
    dropout: float = 0.1
    pad: int = 0
    bos: int = 1
    eos: int = 2
    cell: str = "lstm"
    attention: str = "bilinear"

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "embed_size", "hidden_size")
        check_ints(self, "pad", "bos", "eos")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size: expected an even number, got {self.hidden_size}")
        check_dropout(self.dropout)
        for name in ("pad", "bos", "eos"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name}: expected an id below {self.vocab_size}, got {getattr(self, name)}")
        check_choice(self, "cell", CELLS)
        check_choice(self, "attention", ("bilinear", "none"))


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
        cell: (1, B, H), ``None`` where the cell is no LSTM.
    """

    hidden: Tensor
    cell: Tensor | None = None


class Seq2Seq(Model):
    """Sequence-to-sequence model with attention, written once for the layers of torch and of seqkernels.

    Parameters are created in the same order for both, so the same seed gives the same weights, and their names are
    the same, so a ``state_dict`` moves both ways.

    Sources: the encoder and decoder of Sutskever, Vinyals and Le, "Sequence to Sequence Learning with Neural
    Networks", 2014; attention after the decoder as in Luong, Pham and Manning, "Effective Approaches to
    Attention-based Neural Machine Translation", 2015. Without attention it is the model of the former alone.

    B batch, N source length, M target length, V vocabulary size.

    Args:
        config: the sizes.
        layers: ``seqkernels.nn`` or ``torch.nn``: whose recurrent layers, and whose attention, to use.

    Raises:
        ValueError: `layers` is neither.
    """

    Config = Seq2SeqConfig
    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig, layers: ModuleType = seqkernels_nn) -> None:
        super().__init__(config, layers)
        embed, hidden = config.embed_size, config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, embed, padding_idx=config.pad)
        recurrent = getattr(layers, config.cell.upper())
        states = 2 if config.cell == "lstm" else 1
        attends = config.attention == "bilinear"
        self.encoder = recurrent(embed, hidden // 2, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(states * hidden, states * hidden)
        self.decoder = recurrent(embed, hidden, batch_first=True)
        self.attention = BilinearAttention(hidden, hidden, attention=attention_of(layers)) if attends else None
        self.combine = nn.Linear(2 * hidden, hidden) if attends else None
        self.output = nn.Linear(hidden, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Memory | None, State]:
        """Read sources.

        Args:
            source: (B, N) int64 token ids, padded at the end.
            lengths: (B,) int64, the number of tokens of each source, from 1 to N; for torch's layers on the CPU, for
                those of seqkernels on any device.

        Returns:
            What the decoder sees, ``None`` without attention, and the state it starts from.

        Raises:
            ValueError: an argument has another shape, or a length is out of range (torch's error in a compiled program
                or on a GPU).
            TypeError: one is no tensor of integers.
        """
        check_tokens(source, "source")
        check_integers(lengths, "lengths")
        if lengths.shape != source.shape[:1]:
            raise ValueError(f"lengths: expected ({source.shape[0]},), got {tuple(lengths.shape)}")
        text = "lengths: expected values from 1 to N, the tokens of a row"
        require((lengths >= 1) & (lengths <= source.shape[1]), lengths, text)
        embedded = self.dropout(self.embedding(source))
        if isinstance(self.encoder, seqkernels_nn.RNN | seqkernels_nn.LSTM | seqkernels_nn.GRU):
            # Without packing, whose sizes depend on values, torch.compile and torch.export see one graph. Dropout
            # draws the masks of torch's layer for memory that is laid out like its output.
            hidden, ends = self.encoder(embedded, lengths=lengths.to(source.device))
            hidden = hidden.contiguous()
        else:
            packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            states, ends = self.encoder(packed)
            hidden, _ = pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        ends = torch.cat([end for part in (ends if isinstance(ends, tuple) else (ends,)) for end in part], dim=-1)
        start = self.bridge(ends).tanh().unsqueeze(0).split(self.config.hidden_size, dim=-1)
        # As cuDNN wants it.
        start = tuple(part.contiguous() for part in start)
        if self.attention is None:
            return None, State(*start)
        positions = torch.arange(source.shape[1], device=source.device)
        mask = positions < lengths.to(source.device)[:, None, None]
        return Memory(self.dropout(hidden), mask), State(*start)

    def decode(self, target: Tensor, memory: Memory | None, state: State) -> tuple[Tensor, State]:
        """Score the tokens that follow each token of `target`.

        Args:
            target: (B, M) int64 token ids: a whole target in training, one token in a step of `generate`.
            memory: from `encode`.
            state: from `encode` or from the call before.

        Returns:
            Logits (B, M, V) and the state after the last token.

        Raises:
            ValueError: `target` has another shape, or no tokens.
            TypeError: it is no tensor of integers.
        """
        check_tokens(target, "target")
        if target.shape[1] < 1:
            raise ValueError(f"target: expected at least one in each row, got {tuple(target.shape)}")
        y, state = self._run_decoder(target, state)
        if self.attention is not None and self.combine is not None and memory is not None:
            context = self.attention(y, memory.hidden, memory.mask)
            y = self.combine(self.dropout(torch.cat((y, context), dim=-1))).tanh()
        return self.output(self.dropout(y)), state

    def _run_decoder(self, target: Tensor, state: State) -> tuple[Tensor, State]:
        x = self.dropout(self.embedding(target))
        if state.cell is None:
            y, hidden = self.decoder(x, state.hidden)
            return y, State(hidden)
        y, states = self.decoder(x, tuple(state))
        return y, State(*states)

    def forward(
        self,
        source: Tensor,
        lengths: Tensor,
        target: Tensor,
        teacher_forcing: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Logits of the next token after each token of `target`.

        Args:
            source: (B, N) int64 token ids, padded at the end.
            lengths: (B,) int64, the number of tokens of each source, as of `encode`.
            target: (B, M) int64 token ids, M at least 1, the opening token first.
            teacher_forcing: probability with which the decoder is fed a token of `target`, but for the first one; else
                it is fed the token that it scored highest itself, in all rows of the batch (Bengio et al., "Scheduled
                Sampling for Sequence Prediction with Recurrent Neural Networks", 2015). With 1, the default, the
                decoder runs over whole targets in one call, otherwise in pieces up to where it is fed its own, and in
                a compiled program token by token, which is one graph for each M.
            generator: of that choice, a CPU's; torch's own by default, and always in a compiled program.

        Returns:
            (B, M, V).

        Raises:
            ValueError: `teacher_forcing` is no probability, or an argument has another shape.
            TypeError: `source`, `lengths` or `target` are no tensors of integers, or `teacher_forcing` is no number.
        """
        teacher_forcing = number(teacher_forcing, "teacher_forcing")
        if not 0 <= teacher_forcing <= 1:
            raise ValueError(f"teacher_forcing: expected a probability from 0 to 1, got {teacher_forcing}")
        check_tokens(target, "target")
        memory, state = self.encode(source, lengths)
        if teacher_forcing == 1:
            return self.decode(target, memory, state)[0]
        length = target.shape[1]
        count = max(length - 1, 0)
        place = "cpu" if generator is None else generator.device
        # torch.compile knows the call without a generator alone, where M is dynamic.
        chances = (
            torch.rand(count, device=place)
            if generator is None
            else torch.rand(count, generator=generator, device=place)
        )
        own = chances >= teacher_forcing
        # A program that is compiled knows not where: it asks before each token.
        asks = torch.compiler.is_compiling()
        cuts = range(1, length) if asks else (own.nonzero().flatten() + 1).tolist()
        own = own.to(target.device) if asks else own
        found: list[Tensor] = []
        for begin, end in pairwise([0, *cuts, length]):
            fed = target[:, begin:end]
            if found:
                token = found[-1][:, -1:].argmax(-1)
                token = torch.where(own[begin - 1], token, fed[:, :1]) if asks else token
                fed = torch.cat((token, fed[:, 1:]), dim=1)
            logits, state = self.decode(fed, memory, state)
            found.append(logits)
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        lengths: Tensor,
        steps: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        *,
        start: Tensor | None = None,
        top_p: float | None = None,
        beams: int = 1,
        length_penalty: float = 0.0,
    ) -> Tensor:
        """Translate, token by token; as tokens. Call ``eval()`` before, or dropout is active.

        Args:
            source: (B, N) int64 token ids, padded at the end.
            lengths: (B,) int64, the number of tokens of each source, as of `encode`.
            steps: how many tokens to add at most.
            temperature: as of `GPT.generate`, and so the next two; 0, the default, takes the likeliest token.
            top_k: draw among so many of the likeliest; among all by default.
            generator: of the draws, on the model's device; torch's own by default.
            start: (B,) int64, the token that opens each target; ``config.bos`` by default.
            top_p: draw among the fewest of the likeliest that have this probability together.
            beams: width of a beam search for the likeliest translation; 1, the default, does not search.
            length_penalty: of the beam search, see `generation.beam_search`.

        Returns:
            (B, 1 + steps): the opening token and what follows, with ``config.eos`` in all places behind the first one
            that follows.

        Raises:
            ValueError: the message names the argument, what it was and what is allowed.
            TypeError: likewise, of an argument of another type.
        """

        def step(tokens: Tensor, seen: tuple[Memory | None, State]) -> tuple[Tensor, tuple[Memory | None, State]]:
            logits, state = self.decode(tokens, *seen)
            return logits[:, -1], (seen[0], state)

        check_tokens(source, "source")
        if start is None:
            start = source.new_full(source.shape[:1], self.config.bos)
        check_integers(start, "start")
        if start.shape != source.shape[:1]:
            raise ValueError(f"start: expected ({source.shape[0]},), got {tuple(start.shape)}")
        tokens = start.unsqueeze(1)
        new = generation.generate(
            step,
            tokens,
            self.encode(source, lengths),
            _reorder,
            steps,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            beams=beams,
            eos=self.config.eos,
            length_penalty=length_penalty,
        )
        return torch.cat((tokens, new), dim=1)

    def translate(
        self,
        source: Tensor,
        lengths: Tensor,
        start: Tensor | None = None,
        max_length: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        beams: int = 1,
        length_penalty: float = 0.0,
    ) -> list[list[int]]:
        """Translate, token by token; as lists. Call ``eval()`` before, or dropout is active.

        Args:
            source: (B, N) int64 token ids, padded at the end.
            lengths: (B,) int64, the number of tokens of each source, as of `encode`.
            start: (B,) int64, the token that opens each target; ``config.bos`` by default.
            max_length: tokens after which a translation is cut off.
            temperature: as of `GPT.generate`, and so the next three; 0, the default, takes the likeliest token.
            top_k: draw among so many of the likeliest; among all by default.
            top_p: draw among the fewest of the likeliest that have this probability together.
            generator: of the draws, on the model's device; torch's own by default.
            beams: width of a beam search for the likeliest translation; 1, the default, does not search.
            length_penalty: of the beam search, see `generation.beam_search`.

        Returns:
            For each source the ids of its translation, without the opening and the closing token.

        Raises:
            ValueError: the message names the argument, what it was and what is allowed.
            TypeError: likewise, of an argument of another type.
        """
        max_length, eos = integer(max_length, "max_length"), self.config.eos
        if max_length < 0:
            raise ValueError(f"max_length: expected at least 0, got {max_length}")
        found = self.generate(
            source,
            lengths,
            max_length,
            temperature,
            top_k,
            generator,
            start=start,
            top_p=top_p,
            beams=beams,
            length_penalty=length_penalty,
        )
        rows: list[list[int]] = found[:, 1:].tolist()
        return [row[: row.index(eos)] if eos in row else row for row in rows]

    @torch.no_grad()
    def align(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Which source tokens each next token of `target` is read from. Arguments as in `forward`.

        Returns:
            (B, M, N), each row summing to 1, zero on padding.

        Raises:
            RuntimeError: the model has no attention.
            ValueError: an argument has another shape, or a length is out of range.
            TypeError: one is no tensor of integers.
        """
        check_tokens(target, "target")
        if target.shape[1] < 1:
            raise ValueError(f"target: expected at least one token in each row, got {tuple(target.shape)}")
        memory, state = self.encode(source, lengths)
        if self.attention is None or memory is None:
            raise RuntimeError("align: expected a model with attention 'bilinear', got one with 'none'")
        y, _ = self._run_decoder(target, state)
        return self.attention.weights(y, memory.hidden, memory.mask)


def _reorder(seen: tuple[Memory | None, State], rows: Tensor) -> tuple[Memory | None, State]:
    memory, state = seen
    if memory is not None and len(rows) != len(memory.hidden):
        # Only when beams begin: later rows stay among those of their source, which all have the same.
        memory = Memory(*(x.index_select(0, rows) for x in memory))
    return memory, State(*(None if x is None else x.index_select(1, rows) for x in state))  # type: ignore[arg-type]
