"""A decoder of text: pre-norm transformer blocks with causal attention, and generation from a cache of keys and values.

Attention is called as a function on the heads, since no layer of torch takes keys and values from a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from .. import functional
from .. import nn as seqkernels_nn
from . import generation
from ._model import (
    Attention,
    Model,
    attention_of,
    check_choice,
    check_dropout,
    check_ints,
    check_sizes,
    check_tokens,
    integer,
)

POSITIONS = ("rotary", "learned", "sinusoidal", "alibi", "none")


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`.

    Attributes:
        vocab_size: tokens of the vocabulary.
        context: the most tokens of a sequence. With learned positions that many are parameters; with all others it is
            a bound alone, so that a model may be given one beyond the lengths that it is trained with, and weights
            fit models of any context.
        embed_size: features of a token, a multiple of `num_heads`.
        num_layers: blocks.
        num_heads: heads of the queries.
        num_kv_heads: heads of the keys and values, a divisor of `num_heads`; as many as those by default.
        dropout: probability with which a feature of the embedding, or of what a block adds, is dropped in training;
            weights of attention are not, so that equal seeds drop the same with both kinds of layers.
        positions: how tokens know their places: ``"rotary"`` (Su et al., 2021), ``"learned"``, ``"sinusoidal"``
            (Vaswani et al., 2017: added to the embedding, which is multiplied by the root of its size), ``"alibi"``
            (Press et al., 2022) or ``"none"``, by the causal mask alone (Haviv et al., "Transformer Language Models
            without Positional Encodings Still Learn Positional Information", 2022).

    Raises:
        ValueError: the message names the attribute, what it was and what is allowed.
        TypeError: likewise, of an attribute of another type.
    """

    vocab_size: int
    context: int = 256
    embed_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    dropout: float = 0.0
    positions: str = "rotary"

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "context", "embed_size", "num_layers", "num_heads")
        if self.num_kv_heads is not None:
            check_ints(self, "num_kv_heads")
        if self.embed_size % self.num_heads:
            raise ValueError(f"embed_size: expected a multiple of {self.num_heads} heads, got {self.embed_size}")
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads: expected a divisor of {self.num_heads} heads, got {self.num_kv_heads}")
        check_dropout(self.dropout)
        check_choice(self, "positions", POSITIONS)
        if self.positions == "rotary" and self.embed_size // self.num_heads % 2:
            text = f"expected an even number for each of {self.num_heads} heads with rotary"
            raise ValueError(f"embed_size: {text}, got {self.embed_size}")


class GPTCache:
    """Keys and values of the tokens seen so far, in memory for all that may come; filled in place.

    Args:
        config: of the model.
        batch: B.
        capacity: the most tokens.
        like: a tensor of the dtype and on the device of the model.

    Attributes:
        length: tokens seen so far.
        keys: for each block (B, Hk, capacity, D).
        values: likewise.
    """

    def __init__(self, config: GPTConfig, batch: int, capacity: int, like: Tensor) -> None:
        heads, size = config.num_kv_heads or config.num_heads, config.embed_size // config.num_heads
        self.length = 0
        shape = (batch, heads, capacity, size)
        self.keys = [like.new_empty(shape) for _ in range(config.num_layers)]
        self.values = [like.new_empty(shape) for _ in range(config.num_layers)]

    def extend(self, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values behind those of block `number`.

        Args:
            number: of the block.
            k: (B, Hk, M, D).
            v: likewise.

        Returns:
            Views of all keys and values so far, (B, Hk, length + M, D). `length` stays as it is.
        """
        end = self.length + k.shape[2]
        for store, new in ((self.keys[number], k), (self.values[number], v)):
            store[:, :, self.length : end] = new
        return self.keys[number][:, :, :end], self.values[number][:, :, :end]

    def reorder(self, rows: Tensor) -> GPTCache:
        """Take other rows of the batch, as a beam search does.

        Args:
            rows: int64, any number of them; a row may be there several times or not.

        Returns:
            The cache itself.
        """
        for stores in (self.keys, self.values):
            for number, store in enumerate(stores):
                new = store.new_empty(len(rows), *store.shape[1:])
                new[:, :, : self.length] = store[:, :, : self.length].index_select(0, rows)
                stores[number] = new
        return self


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and added to its input.

    Args:
        config: the sizes.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size = config.embed_size
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.size = size // config.num_heads
        self.norm_1 = nn.LayerNorm(size)
        self.qkv = nn.Linear(size, size + 2 * self.kv_heads * self.size)
        self.out = nn.Linear(size, size)
        self.norm_2 = nn.LayerNorm(size)
        self.up = nn.Linear(size, 4 * size)
        self.down = nn.Linear(4 * size, size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        attention: Attention,
        rotary: seqkernels_nn.RotaryEmbedding | None,
        cache: GPTCache | None = None,
        number: int = 0,
    ) -> Tensor:
        """The block's output, (B, M, E) as `x`; with a cache the M tokens follow those in it."""
        parts = self.qkv(self.norm_1(x)).unflatten(-1, (-1, self.size)).transpose(1, 2)
        q, k, v = parts.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if rotary is not None:
            q, k = rotary(q, k, offset=0 if cache is None else cache.length)
        if cache is not None:
            k, v = cache.extend(number, k, v)
        y = attention(q, k, v)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm_2(x)))))


class GPT(Model):
    """Language model, written once for the attention of torch and of seqkernels; the output shares the embedding.

    Parameters are created in the same order for both, so the same seed gives the same weights, and their names are
    the same, so a ``state_dict`` moves both ways.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

    B batch, M tokens, V vocabulary size.

    Args:
        config: the sizes.
        layers: ``seqkernels.nn`` or ``torch.nn``: whose attention to use.

    Raises:
        ValueError: `layers` is neither.
    """

    Config = GPTConfig
    config: GPTConfig

    def __init__(self, config: GPTConfig, layers: ModuleType = seqkernels_nn) -> None:
        super().__init__(config, layers)
        self.embedding = nn.Embedding(config.vocab_size, config.embed_size)
        self.positions = nn.Embedding(config.context, config.embed_size) if config.positions == "learned" else None
        size, kind = config.embed_size // config.num_heads, config.positions
        self.rotary = seqkernels_nn.RotaryEmbedding(size) if kind == "rotary" else None
        self.sinusoidal = seqkernels_nn.SinusoidalEncoding(config.embed_size) if kind == "sinusoidal" else None
        self.alibi = seqkernels_nn.ALiBi(config.num_heads) if kind == "alibi" else None
        self.attention = attention_of(layers)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.embed_size)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream is scaled by the number of its addends.
                addends = 2 * config.num_layers if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(addends))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, cache: GPTCache | None = None) -> Tensor:
        """Score the tokens that follow each of `tokens`.

        Args:
            tokens: (B, M) int64 or int32.
            cache: of the tokens before, of B rows; `tokens` are added to it, in place: without gradients.

        Returns:
            Logits (B, M, V).

        Raises:
            ValueError: there are more tokens than the model, or the cache, is made for, or not two dimensions of them.
            TypeError: `tokens` are no tensor of integers.
        """
        check_tokens(tokens)
        if cache is not None and cache.keys[0].shape[0] != tokens.shape[0]:
            raise ValueError(f"cache: expected one of {tokens.shape[0]} rows, got {cache.keys[0].shape[0]}")
        before = 0 if cache is None else cache.length
        end = before + tokens.shape[1]
        most = self.config.context if cache is None else min(self.config.context, cache.keys[0].shape[2])
        if end > most:
            raise ValueError(f"tokens: expected at most {most}, those of the cache included, got {end}")
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[before:end]
        elif self.sinusoidal is not None:
            x = self.sinusoidal(x * math.sqrt(self.config.embed_size), offset=before)
        x = self.dropout(x)
        attention = self._attention(before, end, x.dtype)
        for number, block in enumerate(self.blocks):
            x = block(x, attention, self.rotary, cache, number)
        if cache is not None:
            cache.length = end
        return nn.functional.linear(self.norm(x), self.embedding.weight)

    def _attention(self, before: int, end: int, dtype: torch.dtype) -> Attention:
        """Attention of the tokens from `before` to `end`, each to all up to itself; they end where the keys do."""
        grouped = self.config.num_kv_heads not in (None, self.config.num_heads)
        if self.alibi is None:
            # One token reads all that there are; several behind others are aligned at their end.
            several = end - before > 1
            mask = causal_lower_right(end - before, end) if several and before else None
            return partial(self.attention, attn_mask=mask, is_causal=several and not before, enable_gqa=grouped)
        if self.attention is functional.scaled_dot_product_attention:
            attention: Callable[..., Any] = functional.attention
            slopes = self.alibi.slopes
            return partial(attention, is_causal=True, alignment="bottom_right", alibi_slopes=slopes)
        bias = self.alibi.bias(end - before, end, bottom_right=True)
        behind = torch.ones_like(bias[0], dtype=torch.bool).triu(before + 1)
        return partial(self.attention, attn_mask=bias.masked_fill(behind, -torch.inf).to(dtype), enable_gqa=grouped)

    def generate(
        self,
        tokens: Tensor,
        steps: int,
        cache: bool = True,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        *,
        top_p: float | None = None,
        beams: int = 1,
        eos: int | None = None,
        length_penalty: float = 0.0,
    ) -> Tensor:
        """Continue sequences, token by token. Call ``eval()`` before, or dropout is active.

        Args:
            tokens: (B, M) int64, M at least 1: what to continue.
            steps: how many tokens to add.
            cache: keep keys and values, instead of computing those of all tokens again in each step.
            temperature: logits are divided by it before one is drawn; 0 takes the likeliest.
            top_k: draw among so many of the likeliest; among all by default.
            generator: of the draws, on the model's device; torch's own by default.
            top_p: draw among the fewest of the likeliest that have this probability together, see `generation.draw`.
            beams: width of a beam search for the likeliest continuation; 1, the default, does not search. Only with
                a temperature of 0.
            eos: the token that ends a sequence; none does by default.
            length_penalty: of the beam search, see `generation.beam_search`.

        Returns:
            (B, M + steps): `tokens` and what follows, with `eos` in all places behind the first one that follows.

        Raises:
            ValueError: the message names the argument, what it was and what is allowed.
            TypeError: likewise, of an argument of another type.
        """
        check_tokens(tokens)
        steps = integer(steps, "steps")
        batch, length = tokens.shape
        if length > self.config.context:
            raise ValueError(f"tokens: expected at most {self.config.context} in a row, got {length}")
        if steps < 0 or length + steps > self.config.context:
            raise ValueError(f"steps: expected from 0 to {self.config.context - length} after {length}, got {steps}")

        def cached(new: Tensor, store: GPTCache) -> tuple[Tensor, GPTCache]:
            return self(new, store)[:, -1], store

        def whole(new: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
            before = torch.cat((before, new), dim=1)
            return self(before)[:, -1], before

        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        options |= {"beams": beams, "eos": eos, "length_penalty": length_penalty}
        if cache:
            store = GPTCache(self.config, batch, length + steps, self.embedding.weight)
            new = generation.generate(cached, tokens, store, GPTCache.reorder, steps, **options)
        else:
            new = generation.generate(whole, tokens, tokens[:, :0], _rows, steps, **options)
        return torch.cat((tokens, new), dim=1)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(0, rows)
