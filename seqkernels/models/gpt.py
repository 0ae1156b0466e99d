"""A decoder of text: pre-norm transformer blocks with causal attention, and generation from a cache of keys and values.

Attention is called as a function on the heads, since no layer of torch takes keys and values from a cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from .. import nn as seqkernels_nn
from ._model import Attention, Model, attention_of


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`.

    Attributes:
        vocab_size: tokens of the vocabulary.
        context: the most tokens of a sequence.
        embed_size: features of a token, a multiple of `num_heads`.
        num_layers: blocks.
        num_heads: heads of the queries.
        num_kv_heads: heads of the keys and values, a divisor of `num_heads`; as many as those by default.
        dropout: probability with which a feature of the embedding, or of what a block adds, is dropped in training;
            weights of attention are not, so that equal seeds drop the same with both kinds of layers.
        positions: ``"rotary"`` (Su et al., 2021) or ``"learned"``.

    Raises:
        ValueError: the message names the attribute, what it was and what is allowed.
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
        for name in ("vocab_size", "context", "embed_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.embed_size % self.num_heads:
            raise ValueError(f"embed_size: expected a multiple of {self.num_heads} heads, got {self.embed_size}")
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads: expected a divisor of {self.num_heads} heads, got {self.num_kv_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")
        if self.positions not in ("rotary", "learned"):
            raise ValueError(f"positions: expected 'rotary' or 'learned', got {self.positions!r}")
        if self.positions == "rotary" and self.embed_size // self.num_heads % 2:
            raise ValueError(f"embed_size: expected an even number for each of {self.num_heads} heads with rotary")


class Cache:
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


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and added to its input.

    Args:
        config: the sizes.
        attention: ``scaled_dot_product_attention`` of torch or of seqkernels.
    """

    def __init__(self, config: GPTConfig, attention: Attention) -> None:
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
        self.attention = attention

    def forward(
        self, x: Tensor, rotary: seqkernels_nn.RotaryEmbedding | None, cache: Cache | None = None, number: int = 0
    ) -> Tensor:
        """The block's output, (B, M, E) as `x`; with a cache the M tokens follow those in it."""
        before = 0 if cache is None else cache.length
        parts = self.qkv(self.norm_1(x)).unflatten(-1, (-1, self.size)).transpose(1, 2)
        q, k, v = parts.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if rotary is not None:
            q, k = rotary(q, k, offset=before)
        if cache is not None:
            k, v = cache.extend(number, k, v)
        # One token reads all that there are; several behind a cache are aligned at its end.
        several = x.shape[1] > 1
        mask = causal_lower_right(x.shape[1], k.shape[2]) if several and before else None
        grouped = self.heads != self.kv_heads
        y = self.attention(q, k, v, attn_mask=mask, is_causal=several and not before, enable_gqa=grouped)
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
        size = config.embed_size // config.num_heads
        self.rotary = seqkernels_nn.RotaryEmbedding(size) if config.positions == "rotary" else None
        self.dropout = nn.Dropout(config.dropout)
        attention = attention_of(layers)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.embed_size)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream is scaled by the number of its addends.
                addends = 2 * config.num_layers if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(addends))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Score the tokens that follow each of `tokens`.

        Args:
            tokens: (B, M) int64 or int32.
            cache: of the tokens before; `tokens` are added to it.

        Returns:
            Logits (B, M, V).

        Raises:
            ValueError: there are more tokens than the model, or the cache, is made for, or not two dimensions of them.
            TypeError: `tokens` are not integers.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens: expected (B, M), got {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"tokens: expected int64 or int32, got {tokens.dtype}")
        before = 0 if cache is None else cache.length
        end = before + tokens.shape[1]
        most = self.config.context if cache is None else min(self.config.context, cache.keys[0].shape[2])
        if end > most:
            raise ValueError(f"tokens: expected at most {most}, those of the cache included, got {end}")
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[before:end]
        x = self.dropout(x)
        for number, block in enumerate(self.blocks):
            x = block(x, self.rotary, cache, number)
        if cache is not None:
            cache.length = end
        return nn.functional.linear(self.norm(x), self.embedding.weight)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        steps: int,
        cache: bool = True,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue sequences, token by token. Call ``eval()`` before, or dropout is active.

        Args:
            tokens: (B, M) int64, M at least 1: what to continue.
            steps: how many tokens to add.
            cache: keep keys and values, instead of computing those of all tokens again in each step.
            temperature: logits are divided by it before one is drawn; 0 takes the likeliest.
            top_k: draw among so many of the likeliest; among all by default.
            generator: of the draws; torch's own by default.

        Returns:
            (B, M + steps): `tokens` and what follows.

        Raises:
            ValueError: the message names the argument, what it was and what is allowed.
        """
        batch, length = tokens.shape
        if length < 1:
            raise ValueError(f"tokens: expected at least one in each row, got {tuple(tokens.shape)}")
        if steps < 0 or length + steps > self.config.context:
            raise ValueError(f"steps: expected from 0 to {self.config.context - length} after {length}, got {steps}")
        if temperature < 0:
            raise ValueError(f"temperature: expected a positive number, or 0, got {temperature}")
        if top_k is not None and not 1 <= top_k <= self.config.vocab_size:
            raise ValueError(f"top_k: expected from 1 to {self.config.vocab_size}, got {top_k}")
        found = torch.cat((tokens, tokens.new_empty(batch, steps)), dim=1)
        store = Cache(self.config, batch, length + steps, self.embedding.weight) if cache else None
        begin = 0
        for end in range(length, length + steps):
            logits = self(found[:, begin:end], store)[:, -1]
            found[:, end] = _draw(logits, temperature, top_k, generator)
            begin = end if cache else 0
        return found


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """A token for each row of `logits` (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, numbers = logits.topk(top_k or logits.shape[-1])
    drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
    return numbers.gather(1, drawn).squeeze(1)
