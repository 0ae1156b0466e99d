"""Alignment attention between two sequences: bilinear and additive scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import backends, functional
from ..cells import accumulate_dtype
from ..ops._eager import transformed
from ..ops.attention import attention as attention_op

#: Elements of the largest intermediate of `AdditiveAttention` where no `chunk_size` is given.
_CHUNK_ELEMENTS = 1 << 22
#: The largest head size of the kernels.
_MAX_HEAD_SIZE = 512


class BilinearAttention(nn.Module):
    """Attention of one sequence over another, scored by a bilinear form.

    ``score = y W h^T``; its softmax over the positions of `h` weighs a sum of `h`. This is scaled dot-product
    attention with ``q = y W``, ``k = v = h`` and scale 1, so a fused kernel of that serves it.

    With ``softmax_dim=-2`` the softmax goes over the positions of `y`: these compete for each position of `h`, whose
    weights sum to 1 (as in Slot Attention, Locatello et al. 2020). That is two fused calls: one from `h` to `y` for
    the normalisers, and one in which they are a bias.

    Source: the "general" score of Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine
    Translation", 2015.

    Args:
        y_dim: features of the sequence that attends.
        h_dim: features of the sequence attended to.
        attention: the function that does the work, with the signature of
            ``torch.nn.functional.scaled_dot_product_attention``; that of `seqkernels.functional` by default. Only
            with ``softmax_dim=-1``.
        softmax_dim: the dimension of the (..., M, N) scores that the softmax goes over: -1, the positions of `h`, or
            -2, those of `y`. Default: -1.
        device: of the parameter.
        dtype: of the parameter.

    Attributes:
        weight: (y_dim, h_dim), the form W.

    Raises:
        ValueError: names the argument, what it was and what is allowed.
    """

    def __init__(
        self,
        y_dim: int,
        h_dim: int,
        attention: Callable[..., Tensor] | None = None,
        softmax_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(y_dim=y_dim, h_dim=h_dim)
        if softmax_dim not in (-1, -2):
            raise ValueError(f"softmax_dim: expected -1 or -2, got {softmax_dim}")
        if attention is not None and softmax_dim == -2:
            raise ValueError(
                f"attention: expected None with softmax_dim=-2, which needs the normalisers, got {attention}"
            )
        self.y_dim = y_dim
        self.h_dim = h_dim
        self.attention = functional.scaled_dot_product_attention if attention is None else attention
        self.softmax_dim = softmax_dim
        self.weight = nn.Parameter(torch.empty(y_dim, h_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W so that scores of inputs with unit variance have a variance near 1."""
        nn.init.normal_(self.weight, std=(self.y_dim * self.h_dim) ** -0.5)

    def forward(self, y: Tensor, h: Tensor, keep: Tensor | None = None) -> Tensor:
        """Attend from each position of `y` over all positions of `h`.

        Args:
            y: (..., M, y_dim), the batch dimensions of `h`, any number of them.
            h: (..., N, h_dim).
            keep: bool, broadcastable to (..., M, N), ``True`` keeps a position of `h`; ``None`` keeps all.

        Returns:
            (..., M, h_dim), the weighted sums of `h`; 0 where no position is kept.

        Raises:
            ValueError, TypeError: the message names the argument, what it was and what is allowed.
        """
        self._check(y, h, keep)
        q = y @ self.weight
        if self.softmax_dim == -2:
            return self._compete(q, h, keep)
        # One head: kernels are chosen for four dimensions.
        q, k = q.unsqueeze(-3), h.unsqueeze(-3)
        return self.attention(q, k, k, None if keep is None else keep.unsqueeze(-3), scale=1.0).squeeze(-3)

    def _compete(self, q: Tensor, h: Tensor, keep: Tensor | None) -> Tensor:
        """``softmax(q h^T, -2) h``: exp(score - log-sum-exp of the column) is exp(row's own) times a row softmax."""
        if self.h_dim > _MAX_HEAD_SIZE:
            backends.note(f"BilinearAttention: the kernels have head sizes 1 to {_MAX_HEAD_SIZE}, not {self.h_dim}")
            return _softmax(q @ h.mT, keep, -2) @ h
        shape, dtype = q.shape, torch.promote_types(q.dtype, h.dtype)
        # The normalisers are not rounded to 16 bits.
        acc = accumulate_dtype(dtype)
        size = math.prod(shape[:-2])
        q, k = (x.reshape(size, 1, *x.shape[-2:]).to(acc) for x in (q, h))
        if keep is not None:
            if any(n != 1 for n in keep.shape[:-2]):
                keep = keep.expand(*shape[:-2], -1, -1)
            keep = keep.reshape(math.prod(keep.shape[:-2]), 1, *keep.shape[-2:])
        _, columns = attention_op(k, q, q[..., :1].detach(), None if keep is None else keep.mT, scale=1.0)
        # A column that no position keeps has none, and is not read either.
        bias = -columns.masked_fill(columns == -torch.inf, 0).unsqueeze(-2)
        out, rows = attention_op(q, k, k, keep, bias, scale=1.0)
        return (out * rows.exp().unsqueeze(-1)).reshape(shape).to(dtype)

    def weights(self, y: Tensor, h: Tensor, keep: Tensor | None = None) -> Tensor:
        """The alignment itself, (..., M, N), summing to 1 over ``softmax_dim``: what `forward` weighs `h` with.

        Arguments and errors as in `forward`. For looking at; computed without the fused kernel.
        """
        self._check(y, h, keep)
        return _softmax(y @ self.weight @ h.mT, keep, self.softmax_dim)

    def extra_repr(self) -> str:
        """Sizes, for the printed form."""
        text = f"y_dim={self.y_dim}, h_dim={self.h_dim}"
        return text if self.softmax_dim == -1 else f"{text}, softmax_dim={self.softmax_dim}"

    def _check(self, y: Tensor, h: Tensor, keep: Tensor | None) -> None:
        _check_sequences(y=(y, self.y_dim), h=(h, self.h_dim))
        _check_keep(keep, (*y.shape[:-1], h.shape[-2]))


class AdditiveAttention(nn.Module):
    """Attention of one sequence over another, scored by a small network.

    ``score = v^T tanh(W query + U key)``; its softmax over the keys weighs a sum of the values.

    The tanh of every pair is of size (M, N, hidden_dim). It is computed for `chunk_size` queries at a time, and again
    in the backward pass, so that no more than one chunk is ever in memory, neither are the weights of all queries.

    Source: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015.

    Args:
        query_dim: features of the queries.
        key_dim: features of the keys.
        hidden_dim: features of the network's hidden layer.
        chunk_size: queries at a time; by default as many as make about 4 million elements, at least 1.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight_query: (hidden_dim, query_dim), W.
        weight_key: (hidden_dim, key_dim), U.
        weight_score: (hidden_dim,), v.

    Raises:
        ValueError: a size is not positive; the message names it.

    Example:
        >>> attention = seqkernels.nn.AdditiveAttention(512, 1024, 256)
        >>> projected = attention.project(states)  # once, for a decoder that takes one step at a time
        >>> context = attention(query, states, lengths=lengths, projected=projected)
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(query_dim=query_dim, key_dim=key_dim, hidden_dim=hidden_dim)
        if chunk_size is not None:
            _check_sizes(chunk_size=chunk_size)
        self.query_dim = query_dim
        self.key_dim = key_dim
        self.hidden_dim = hidden_dim
        self.chunk_size = chunk_size
        self.weight_query = nn.Parameter(torch.empty(hidden_dim, query_dim, device=device, dtype=dtype))
        self.weight_key = nn.Parameter(torch.empty(hidden_dim, key_dim, device=device, dtype=dtype))
        self.weight_score = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as ``torch.nn.Linear`` does, uniformly up to one by the root of the number of inputs."""
        for weight in (self.weight_query, self.weight_key, self.weight_score):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def project(self, key: Tensor) -> Tensor:
        """``U key``, (..., N, hidden_dim): what every call with the same keys has in common."""
        _check_sequences(key=(key, self.key_dim))
        return F.linear(key, self.weight_key)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        lengths: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> Tensor:
        """Attend from each query over all keys.

        Args:
            query: (..., M, query_dim), the batch dimensions of `key`, any number of them.
            key: (..., N, key_dim).
            value: (..., N, V); `key` by default.
            keep: bool, broadcastable to (..., M, N), ``True`` keeps a key; ``None`` keeps all.
            lengths: (...), int32 or int64: how many of the N keys there are; together with `keep`, both count.
            projected: what `project` gave for `key`, so that it is not computed again.

        Returns:
            (..., M, V), the weighted sums of the values, of their dtype; 0 where no key is kept. Keys and values that
            no query keeps have no influence, whatever is in them.

        Raises:
            ValueError, TypeError: the message names the argument, what it was and what is allowed.
        """
        value = key if value is None else value
        keep = self._check(query, key, value, keep, lengths, projected)
        dtype = value.dtype
        if keep is not None:
            unread = ~keep.any(-2).unsqueeze(-1)
            same, value = value is key, value.masked_fill(unread, 0)
            if projected is not None:
                projected = projected.masked_fill(unread, 0)
            else:
                key = value if same else key.masked_fill(unread, 0)
        q, k = self._projections(query, key, projected)
        score, value = self.weight_score, value.to(k.dtype)
        grads = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, score, value))
        # The transforms of torch.func refuse the hooks of a checkpoint.
        grads = grads and not transformed()
        parts = []
        for rows, mask in self._chunks(q, k, keep):
            inputs = (rows, k, score, value, mask)
            if grads:
                parts.append(checkpoint(_additive, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(_additive(*inputs))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -2)).to(dtype)

    def weights(
        self,
        query: Tensor,
        key: Tensor,
        *,
        keep: Tensor | None = None,
        lengths: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> Tensor:
        """The alignment itself, (..., M, N), each row summing to 1: what `forward` weighs the values with.

        Arguments and errors as in `forward`. For looking at; its backward pass needs (M, N, hidden_dim) numbers.
        """
        keep = self._check(query, key, key, keep, lengths, projected)
        q, k = self._projections(query, key, projected)
        parts = [_additive_weights(rows, k, self.weight_score, mask) for rows, mask in self._chunks(q, k, keep)]
        return torch.cat(parts, -2).to(key.dtype)

    def extra_repr(self) -> str:
        """Sizes, for the printed form."""
        text = f"query_dim={self.query_dim}, key_dim={self.key_dim}, hidden_dim={self.hidden_dim}"
        return text if self.chunk_size is None else f"{text}, chunk_size={self.chunk_size}"

    def _projections(self, query: Tensor, key: Tensor, projected: Tensor | None) -> tuple[Tensor, Tensor]:
        q = F.linear(query, self.weight_query)
        k = F.linear(key, self.weight_key) if projected is None else projected
        acc = accumulate_dtype(q.dtype)
        return q.to(acc), k.to(acc)

    def _chunks(self, q: Tensor, k: Tensor, keep: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """Queries, some at a time, and the mask of these."""
        step = self.chunk_size or max(1, _CHUNK_ELEMENTS // max(1, k.numel()))
        queries = q.split(step, -2)
        if keep is None or keep.shape[-2] == 1:
            return [(rows, keep) for rows in queries]
        return list(zip(queries, keep.split(step, -2), strict=True))

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keep: Tensor | None,
        lengths: Tensor | None,
        projected: Tensor | None,
    ) -> Tensor | None:
        """Raise for a wrong argument; `keep` and `lengths` as one mask."""
        _check_sequences(query=(query, self.query_dim), key=(key, self.key_dim))
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(f"value: expected shape {(*key.shape[:-1], 'V')}, got {tuple(value.shape)}")
        if projected is not None and projected.shape != (*key.shape[:-1], self.hidden_dim):
            raise ValueError(
                f"projected: expected shape {(*key.shape[:-1], self.hidden_dim)}, got {tuple(projected.shape)}"
            )
        _check_keep(keep, (*query.shape[:-1], key.shape[-2]))
        if lengths is None:
            return keep
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths: expected torch.int32 or torch.int64, got {lengths.dtype}")
        if lengths.shape != key.shape[:-2]:
            raise ValueError(f"lengths: expected shape {tuple(key.shape[:-2])}, got {tuple(lengths.shape)}")
        there = torch.arange(key.shape[-2], device=key.device) < lengths[..., None, None].to(key.device)
        return there if keep is None else keep & there


def _additive_weights(q: Tensor, k: Tensor, score: Tensor, keep: Tensor | None) -> Tensor:
    # The sum is fresh memory and its value needed by nobody.
    return _softmax((q.unsqueeze(-2) + k.unsqueeze(-3)).tanh_() @ score.to(k.dtype), keep, -1)


def _additive(q: Tensor, k: Tensor, score: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
    return _additive_weights(q, k, score, keep) @ value


def _softmax(scores: Tensor, keep: Tensor | None, dim: int) -> Tensor:
    """The softmax over what is kept; 0 elsewhere, also where nothing is kept."""
    if keep is None:
        return scores.softmax(dim)
    return scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(dim).masked_fill(~keep, 0)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected a positive number, got {size}")


def _check_sequences(**sequences: tuple[Tensor, int]) -> None:
    """Raise unless all are (..., length, size) with the batch dimensions of the first."""
    first, batch = "", torch.Size()
    for name, (x, size) in sequences.items():
        if x.dim() < 2 or x.shape[-1] != size:
            raise ValueError(f"{name}: expected shape (..., length, {size}), got {tuple(x.shape)}")
        if not first:
            first, batch = name, x.shape[:-2]
        elif x.shape[:-2] != batch:
            raise ValueError(
                f"{name}: expected the batch dimensions {tuple(batch)} of {first}, got {tuple(x.shape[:-2])}"
            )


def _check_keep(keep: Tensor | None, full: tuple[int, ...]) -> None:
    if keep is None:
        return
    if keep.dtype != torch.bool:
        raise TypeError(f"keep: expected torch.bool, got {keep.dtype}")
    if keep.dim() != len(full) or any(have not in (1, want) for have, want in zip(keep.shape, full, strict=True)):
        raise ValueError(f"keep: expected {len(full)} dimensions, each 1 or as in {full}, got {tuple(keep.shape)}")
