"""A language model that carries a state: recurrent layers between an embedding and the same embedding.

What a `GPT` keeps in a cache that grows with the text, this one keeps in a state of one size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as seqkernels_nn
from .._sequences import check_reset
from . import generation
from ._model import CELLS, Model, State, check_choice, check_dropout, check_sizes, check_tokens, rows_of


@dataclass(frozen=True)
class RecurrentLMConfig:
    """Sizes of a `RecurrentLM`.

    Attributes:
        vocab_size: tokens of the vocabulary.
        embed_size: features of a token.
        hidden_size: units of each layer, as many as features by default; another number is projected to that of the
            features before the output.
        num_layers: recurrent layers.
        cell: ``"rnn"`` (Elman's, with tanh), ``"lstm"`` or ``"gru"``.
        dropout: probability with which a feature is dropped in training: of the embedding, between layers, and of what
            the last one gives (Zaremba et al., "Recurrent Neural Network Regularization", 2014).

    Raises:
        ValueError: the message names the attribute, what it was and what is allowed.
        TypeError: likewise, of an attribute of another type.
    """

    vocab_size: int
    embed_size: int = 128
    hidden_size: int | None = None
    num_layers: int = 2
    cell: str = "lstm"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "embed_size", "num_layers")
        if self.hidden_size is not None:
            check_sizes(self, "hidden_size")
        check_choice(self, "cell", CELLS)
        check_dropout(self.dropout)


class RecurrentLM(Model):
    """Recurrent language model, written once for the layers of torch and of seqkernels.

    Sources: Mikolov et al., "Recurrent neural network based language model", 2010; the output shares the embedding as
    in Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017.

    B batch, M tokens, V vocabulary size, L layers, H units.

    Args:
        config: the sizes.
        layers: ``seqkernels.nn`` or ``torch.nn``: whose recurrent layers to use.

    Raises:
        ValueError: `layers` is neither.
    """

    Config = RecurrentLMConfig
    config: RecurrentLMConfig

    def __init__(self, config: RecurrentLMConfig, layers: ModuleType = seqkernels_nn) -> None:
        super().__init__(config, layers)
        hidden = config.hidden_size or config.embed_size
        self.embedding = nn.Embedding(config.vocab_size, config.embed_size)
        # Hidden states begin small: with the small embedding of a transformer the logits, their products, stay so for
        # hundreds of steps, and the model learns no more than how frequent tokens are.
        nn.init.normal_(self.embedding.weight, std=0.3)
        between = config.dropout if config.num_layers > 1 else 0.0
        kind = getattr(layers, config.cell.upper())
        self.recurrent = kind(config.embed_size, hidden, config.num_layers, dropout=between, batch_first=True)
        self.project = nn.Linear(hidden, config.embed_size) if hidden != config.embed_size else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """Score the tokens that follow each of `tokens`.

        Args:
            tokens: (B, M) int64 or int32, M at least 1.
            state: of the tokens before: (L, B, H), of an LSTM a pair of such; zeros by default. Detach it between two
                pieces of a text that gradients shall not pass.
            reset: (B, M) bool or uint8: where the state is zero before a token, as at the first one of a document.
                Layers of torch, which cannot do this, run in pieces between the resets.

        Returns:
            Logits (B, M, V), and the state behind the last tokens.

        Raises:
            ValueError: `tokens` or `reset` have another shape.
            TypeError: `tokens` are no tensor of integers, or `reset` not booleans.
        """
        check_tokens(tokens)
        if tokens.shape[1] < 1:
            raise ValueError(f"tokens: expected at least one in each row, got {tuple(tokens.shape)}")
        x = self.dropout(self.embedding(tokens))
        if reset is None:
            y, last = self.recurrent(x, state)
        else:
            check_reset(reset, tuple(tokens.shape), tokens.device)
            # What convert() made of a layer of torch is none of those.
            if isinstance(self.recurrent, nn.RNN | nn.LSTM | nn.GRU):
                y, last = self._between_resets(x, state, reset.bool())
            else:
                y, last = self.recurrent(x, state, reset=reset)
        y = self.dropout(y)
        if self.project is not None:
            y = self.project(y)
        return nn.functional.linear(y, self.embedding.weight), last

    def _between_resets(self, x: Tensor, state: State | None, reset: Tensor) -> tuple[Tensor, Any]:
        cuts = reset.any(0).nonzero().flatten().tolist()
        found = []
        for begin, end in pairwise(sorted({0, *cuts, x.shape[1]})):
            if begin in cuts and state is not None:
                kept = ~reset[:, begin, None]
                state = state.where(kept, 0) if isinstance(state, Tensor) else tuple(s.where(kept, 0) for s in state)
            y, state = self.recurrent(x[:, begin:end], state)
            found.append(y)
        return torch.cat(found, dim=1), state

    def generate(
        self,
        tokens: Tensor,
        steps: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        *,
        top_p: float | None = None,
        beams: int = 1,
        eos: int | None = None,
        length_penalty: float = 0.0,
    ) -> Tensor:
        """Continue sequences, token by token, from the state. Call ``eval()`` before, or dropout is active.

        Args:
            tokens: (B, M) int64, M at least 1: what to continue.
            steps: how many tokens to add; any number.
            temperature: as of `GPT.generate`, and so the other arguments.
            top_k: draw among so many of the likeliest; among all by default.
            generator: of the draws, on the model's device; torch's own by default.
            top_p: draw among the fewest of the likeliest that have this probability together.
            beams: width of a beam search for the likeliest continuation; 1, the default, does not search.
            eos: the token that ends a sequence; none does by default.
            length_penalty: of the beam search, see `generation.beam_search`.

        Returns:
            (B, M + steps): `tokens` and what follows, with `eos` in all places behind the first one that follows.

        Raises:
            ValueError: the message names the argument, what it was and what is allowed.
            TypeError: likewise, of an argument of another type.
        """
        check_tokens(tokens)

        def step(new: Tensor, state: State | None) -> tuple[Tensor, State | None]:
            logits, state = self(new, state)
            return logits[:, -1], state

        def reorder(state: State | None, rows: Tensor) -> State | None:
            return None if state is None else rows_of(state, rows)

        new = generation.generate(
            step,
            tokens,
            None,
            reorder,
            steps,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            beams=beams,
            eos=eos,
            length_penalty=length_penalty,
        )
        return torch.cat((tokens, new), dim=1)
