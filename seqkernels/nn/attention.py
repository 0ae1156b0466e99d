"""Multi-head attention with the parameters and arguments of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from .. import backends
from .._attention import attend, check_float_mask
from ..precision import check_precision
from . import _fx
from ._quantization import Refusal


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` on fused kernels: same constructor, parameters, arguments, results and errors.

    A ``state_dict`` moves both ways unchanged. The output comes from a fused kernel, dropout included, that never
    stores the (L, S) weights, and masks are not expanded to batch and heads. With ``need_weights=True``, torch's
    default, the weights are then computed from the queries and keys, averaged ones without storing those of each head
    where the implementation can; with ``need_weights="lazy"`` only when somebody asks for them.

    Dropout draws a seed from torch's default generator of the CPU in each call, so ``torch.manual_seed`` makes it
    reproducible; the weights that a seed drops are the same on every implementation and device, and others than those
    that torch's layer drops.

    Different from torch: a query whose keys are all masked gives weights and output 0 (before ``out_proj``) and zero
    gradients, where torch gives NaN with ``need_weights=True``; NaN in masked keys and values does not reach the
    output. (A gradient of the projection weights still reads every row of `key` and `value`, so NaN there shows in
    it.) Nested tensors are passed on to torch.

    Source: Vaswani et al., "Attention Is All You Need", 2017.

    Args: those of ``torch.nn.MultiheadAttention``, see there, and, keyword only, ``precision``: of the products of
        float32 queries, keys and values on GPUs, see `seqkernels.precision`; projections follow torch's flags.
        Default: ``"ieee"``.

    Raises:
        ValueError: `embed_dim` or `num_heads` is not positive, or `precision` is none.
        AssertionError: `num_heads` does not divide `embed_dim`.

    Example:
        >>> layer = seqkernels.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> out, _ = layer(x, x, x, key_padding_mask=padding, need_weights=False)
    """

    qconfig = Refusal()

    # Of the class, so that a layer that was torch's has it too.
    precision: str = "ieee"

    def __init__(self, *args: Any, precision: str = "ieee", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if check_precision(precision) != "ieee":
            self.precision = precision

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | str = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Any]:
        """Attend from `query` over `key`. B batch, L queries, S keys, E ``embed_dim``, H ``num_heads``.

        Args:
            query: (L, B, E), (B, L, E) with ``batch_first``, or (L, E) without a batch.
            key: (S, B, kdim), (B, S, kdim) or (S, kdim).
            value: (S, B, vdim), (B, S, vdim) or (S, vdim).
            key_padding_mask: (B, S) or (S,); bool, ``True`` is ignored; or floating point, added to the scores.
            need_weights: return the weights too, which stores them; or ``"lazy"``, return an object whose method
                ``compute(average=True)`` returns them. It keeps the queries and keys alive, nothing else.
            attn_mask: (L, S) or (B*H, L, S); bool, ``True`` is *not* attended to; or floating point, added to the
                scores. Floating point masks are float32 or of the dtype of the query and have a gradient.
            average_attn_weights: average the returned weights over the heads; ``compute`` has its own argument.
            is_causal: a promise that `attn_mask` is the causal mask, which then need not be read.

        Returns:
            The output, in shape and layout of `query`, and the weights after dropout, (B, L, S), with
            ``average_attn_weights=False`` (B, H, L, S), without a batch without B; ``None`` for
            ``need_weights=False``, a `LazyWeights` for ``"lazy"``. Under autocast the output is of its dtype; so are
            the weights on the CPU; those on a GPU, where softmax is of float32, are float32.

        Raises:
            AssertionError, RuntimeError: shapes or dtypes do not fit; the message names the argument.
            ValueError: `need_weights` is another string, or ``"lazy"`` for nested tensors.
        """
        traced: Any = query
        if isinstance(traced, Proxy):
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return _fx.call(traced, self, query, key, value, *masks)
        lazy = isinstance(need_weights, str)
        if lazy and need_weights != "lazy":
            raise ValueError(f"need_weights: expected a bool or 'lazy', got {need_weights!r}")
        if query.is_nested or key.is_nested or value.is_nested:
            if lazy:
                raise ValueError("need_weights: 'lazy' does not serve nested tensors, expected a bool")
            backends.note("nested tensors: MultiheadAttention is torch's own")
            return super().forward(
                query, key, value, key_padding_mask, bool(need_weights), attn_mask, average_attn_weights, is_causal
            )
        is_batched = _check_dims(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        batch_first = self.batch_first or not is_batched
        self._check_sizes(query, key, value)
        _check_mask_dtypes(key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method"
                " `generate_square_subsequent_mask` to create this mask."
            )
        q, k, v = (
            _heads_first(x if is_batched else x.unsqueeze(0), batch_first) for x in self._project(query, key, value)
        )
        queries, keys = q.shape[2], k.shape[2]
        k, v = self._add_keys(k, v)
        extra = k.shape[2] - keys
        eager = bool(need_weights) and not lazy
        if attn_mask is not None and is_causal and (eager or key_padding_mask is not None):
            # Torch heeds the hint only without padding; beside it, the mask may go only where nobody can tell.
            is_causal = not eager and extra == 0 and queries == keys and not attn_mask.requires_grad
        attn_mask = None if is_causal else self._attn_mask_of_heads(attn_mask, q, keys, extra)
        key_padding_mask = _padding_mask_of_heads(key_padding_mask, q, keys, extra)
        mask, bias = _combine(key_padding_mask, attn_mask)
        out, weights = attend(
            q,
            k,
            v,
            mask,
            bias,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            precision=self.precision,
        )
        out = out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)
        out = F.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        out = out if is_batched else out.squeeze(0)
        if not need_weights:
            return out, None
        weights = weights._replace(is_batched=is_batched)
        return out, weights if lazy else weights.compute(average_attn_weights)

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
            )
        for name, x, size in (("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != size:
                raise RuntimeError(f"{name}: expected {size} features, got shape {tuple(x.shape)}")
        if query.dim() == 3:
            batch = 0 if self.batch_first else 1
            if key.shape[batch] != query.shape[batch]:
                raise RuntimeError(
                    f"key: expected batch size {query.shape[batch]} as in query, got shape {tuple(key.shape)}"
                )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as (..., H, D): one GEMM for equal inputs, two where key is value, else three."""
        heads = (self.num_heads, self.head_dim)
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if self._qkv_same_embed_dim and key is value:
            if query is key:
                q, k, v = F.linear(query, weight, bias).unflatten(-1, (3, *heads)).unbind(-3)
                return q, k, v
            sizes = [self.embed_dim, 2 * self.embed_dim]
            w_q, w_kv = weight.split(sizes)
            b_q, b_kv = (None, None) if bias is None else bias.split(sizes)
            k, v = F.linear(key, w_kv, b_kv).unflatten(-1, (2, *heads)).unbind(-3)
            return F.linear(query, w_q, b_q).unflatten(-1, heads), k, v
        if self._qkv_same_embed_dim:
            weights = weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, heads) for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

    def _add_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, S, D), then the learned key (``add_bias_kv``) and the zero key (``add_zero_attn``)."""
        more_k, more_v = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            shape = (1, self.num_heads, 1, self.head_dim)
            more_k.append(self.bias_k.view(shape).expand(k.shape[0], -1, -1, -1).to(k.dtype))
            more_v.append(self.bias_v.view(shape).expand(v.shape[0], -1, -1, -1).to(v.dtype))
        if self.add_zero_attn:
            zero = k.new_zeros(()).expand(*k.shape[:2], 1, self.head_dim)
            more_k.append(zero)
            more_v.append(zero)
        return (k, v) if len(more_k) == 1 else (torch.cat(more_k, 2), torch.cat(more_v, 2))

    def _attn_mask_of_heads(self, attn_mask: Tensor | None, q: Tensor, keys: int, extra: int) -> Tensor | None:
        """`attn_mask` as (1, 1, L, S) or (B, H, L, S), with a column per key of `_add_keys`."""
        if attn_mask is None:
            return None
        batch, heads, queries = q.shape[:3]
        expected = (queries, keys) if attn_mask.dim() == 2 else (batch * heads, queries, keys)
        if attn_mask.shape != expected:
            raise RuntimeError(
                f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {expected}."
            )
        check_float_mask("attn_mask", attn_mask, q.dtype)
        attn_mask = F.pad(attn_mask, (0, extra)) if extra else attn_mask
        return attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads))


def _heads_first(x: Tensor, batch_first: bool) -> Tensor:
    """(B, L, H, D) or (L, B, H, D) as (B, H, L, D)."""
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _padding_mask_of_heads(mask: Tensor | None, q: Tensor, keys: int, extra: int) -> Tensor | None:
    """`key_padding_mask` (B, S) or (S,) as (B, 1, 1, S), with a column per added key."""
    if mask is None:
        return None
    mask = mask if mask.dim() == 2 else mask.unsqueeze(0)
    for dim, size, added in ((0, q.shape[0], 0), (1, keys, extra)):
        if mask.shape[dim] != size:
            raise AssertionError(
                f"Expected key_padded_mask.shape[{dim}] to be {size + added}, but got {mask.shape[dim] + added}"
            )
    check_float_mask("key_padding_mask", mask, q.dtype)
    mask = F.pad(mask, (0, extra)) if extra else mask
    return mask[:, None, None]


def _combine(padding: Tensor | None, attn: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Masks of torch's layer as the op's: bool with ``True`` for keys to keep, and the sum of the additive ones."""
    masks = [x for x in (attn, padding) if x is not None]
    drop = [x for x in masks if x.dtype == torch.bool]
    add = [x for x in masks if x.dtype != torch.bool]
    mask = None if not drop else ~(drop[0] if len(drop) == 1 else drop[0] | drop[1])
    bias = None if not add else add[0] if len(add) == 1 else add[0] + add[1]
    return mask, bias


def _check_dims(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
) -> bool:
    """Whether there is a batch dimension; raises what torch raises for other numbers of dimensions."""
    if query.dim() not in (2, 3):
        raise AssertionError(
            f"query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor"
        )
    is_batched = query.dim() == 3
    what = f"For {'batched (3-D)' if is_batched else 'unbatched (2-D)'} `query`, expected"
    if key.dim() != query.dim() or value.dim() != query.dim():
        raise AssertionError(
            f"{what} `key` and `value` to be {query.dim()}-D but found {key.dim()}-D and {value.dim()}-D tensors"
            " respectively"
        )
    if key_padding_mask is not None and key_padding_mask.dim() != query.dim() - 1:
        raise AssertionError(
            f"{what} `key_padding_mask` to be `None` or {query.dim() - 1}-D but found"
            f" {key_padding_mask.dim()}-D tensor instead"
        )
    if attn_mask is not None and attn_mask.dim() not in (2, 3):
        raise AssertionError(
            f"{what} `attn_mask` to be `None`, 2-D or 3-D but found {attn_mask.dim()}-D tensor instead"
        )
    if attn_mask is not None and attn_mask.dim() == 3 and not is_batched:
        expected = (num_heads, query.shape[0], key.shape[0])
        if attn_mask.shape != expected:
            raise AssertionError(f"Expected `attn_mask` shape to be {expected} but got {attn_mask.shape}")
    return is_batched


def _check_mask_dtypes(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
    if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
            stacklevel=3,
        )
