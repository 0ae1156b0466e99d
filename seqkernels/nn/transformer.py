"""Transformer layers with the parameters and arguments of ``torch.nn``, on fused attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from .. import backends
from . import _fx
from .attention import MultiheadAttention

_Activation = str | Callable[[Tensor], Tensor]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` on fused attention: same constructor, parameters, arguments and results.

    Self-attention is a `seqkernels.nn.MultiheadAttention`; a ``state_dict`` moves both ways unchanged, and under the
    same seed of torch both begin with the same parameters.

    Different from torch: there is no fast path, so evaluation gives what training gives with a dropout of 0, hooks
    and replaced submodules are honoured in both, and padded positions are computed like others. A position whose keys
    are all masked gets 0 from attention (before ``out_proj``) instead of NaN. Boolean masks are not turned into
    floating point ones. Under the same seed dropout drops other elements than torch's. Nested tensors are passed on
    to torch.

    Source: Vaswani et al., "Attention Is All You Need", 2017; `norm_first`: Xiong et al., "On Layer Normalization in
    the Transformer Architecture", 2020.

    Args: those of ``torch.nn.TransformerEncoderLayer``, see there.

    Raises:
        AssertionError, ValueError: `nhead` does not divide `d_model`, or one is not positive.
        RuntimeError: `activation` is a string other than ``"relu"`` and ``"gelu"``.

    Example:
        >>> layer = seqkernels.nn.TransformerEncoderLayer(512, 8, batch_first=True)
        >>> out = layer(x, src_key_padding_mask=padding)
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device=device,
            dtype=dtype,
        )
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Self-attention and the feed-forward block, each with its residual and norm. S positions, B batch, E sizes.

        Args:
            src: (S, B, E), (B, S, E) with ``batch_first``, or (S, E).
            src_mask: (S, S) or (B*H, S, S); bool, ``True`` is *not* attended to; or floating point, added.
            src_key_padding_mask: (B, S) or (S,); bool, ``True`` is ignored; or floating point, added.
            is_causal: a promise that `src_mask` is the causal mask, which then need not be read.

        Returns:
            The shape and dtype of `src`, always.

        Raises:
            AssertionError, RuntimeError: shapes or dtypes do not fit; the message names the argument.
        """
        traced: Any = src
        if isinstance(traced, Proxy):
            return _fx.call(traced, self, src, src_mask, src_key_padding_mask, is_causal)
        if src.is_nested:
            backends.note("nested tensors: TransformerEncoderLayer is torch's own")
            out: Tensor = super().forward(src, src_mask, src_key_padding_mask, is_causal)
            return out
        src_mask, padding = _masks("src_mask", src_mask, src_key_padding_mask, src.dtype)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), src_mask, padding, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, src_mask, padding, is_causal=is_causal))
        y: Tensor = self.norm2(x + self._ff_block(x))
        return y


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder`` without the detour over nested tensors.

    Different from torch: the result always has the shape of the input, in evaluation as in training, where torch's
    fast path cuts padding off at the longest sequence of the batch and sets padded positions to 0;
    ``enable_nested_tensor`` is accepted and nothing is warned of. Inside ``torch.compile`` a mask is not searched for
    being causal, which would break the graph; `is_causal` says it.

    Args: those of ``torch.nn.TransformerEncoder``, see there; `encoder_layer` may be any layer with the arguments of
        `TransformerEncoderLayer`, of which `num_layers` copies are made. A layer of ``torch.nn`` stays one:
        `seqkernels.convert` swaps it.

    Example:
        >>> layer = seqkernels.nn.TransformerEncoderLayer(512, 8, batch_first=True)
        >>> encoder = seqkernels.nn.TransformerEncoder(layer, 6)
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        # Torch's constructor warns where nested tensors cannot be used, which are not used here.
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)  # type: ignore[arg-type]
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """All layers in turn, then the norm.

        Args:
            src: as for `TransformerEncoderLayer`.
            mask: its `src_mask`.
            src_key_padding_mask: as there.
            is_causal: as there; by default a mask is compared with the causal one.

        Returns:
            The shape and dtype of `src`, always.

        Raises:
            AssertionError, RuntimeError: shapes or dtypes do not fit; the message names the argument.
        """
        traced: Any = src
        if isinstance(traced, Proxy):
            return _fx.call(traced, self, src, mask, src_key_padding_mask, is_causal)
        if src.is_nested:
            out: Tensor = super().forward(src, mask, src_key_padding_mask, is_causal)
            return out
        mask, padding = _masks("mask", mask, src_key_padding_mask, src.dtype)
        first: Any = self.layers[0]
        is_causal = _is_causal(mask, is_causal, src, first.self_attn.batch_first)
        if not all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers):
            # Layers of others were written for what torch's encoder hands on.
            mask, padding = (None if x is None else _floating(x, src.dtype) for x in (mask, padding))
        for layer in self.layers:
            src = layer(src, src_mask=mask, is_causal=is_causal, src_key_padding_mask=padding)
        return src if self.norm is None else self.norm(src)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer`` on fused attention: same constructor, parameters, arguments and results.

    Both attentions are `seqkernels.nn.MultiheadAttention`; a ``state_dict`` moves both ways unchanged, and under the
    same seed of torch both begin with the same parameters. A position whose keys are all masked gets 0 from that
    attention (before ``out_proj``); under the same seed dropout drops other elements than torch's.

    Args: those of ``torch.nn.TransformerDecoderLayer``, see there.

    Raises:
        AssertionError, ValueError: `nhead` does not divide `d_model`, or one is not positive.
        RuntimeError: `activation` is a string other than ``"relu"`` and ``"gelu"``.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device=device,
            dtype=dtype,
        )
        self.self_attn.__class__ = self.multihead_attn.__class__ = MultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Both attentions and the feed-forward block; arguments, result and errors as of `TransformerDecoder.forward`.

        Masks are not compared with the causal one: ``tgt_is_causal`` is ``False`` by default.
        """
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        traced: Any = tgt
        if isinstance(traced, Proxy):
            hints = (tgt_is_causal, memory_is_causal)
            return _fx.call(traced, self, tgt, memory, *masks, *hints)
        out: Tensor = super().forward(tgt, memory, *masks, tgt_is_causal, memory_is_causal)
        return out


class TransformerDecoder(nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder``.

    Different from torch: inside ``torch.compile`` a mask is not searched for being causal, which would break the
    graph; `tgt_is_causal` says it.

    Args: those of ``torch.nn.TransformerDecoder``, see there; `decoder_layer` may be any layer with the arguments of
        `TransformerDecoderLayer`, of which `num_layers` copies are made. A layer of ``torch.nn`` stays one:
        `seqkernels.convert` swaps it.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """All layers in turn, then the norm. T target positions, S of the memory, B batch, E sizes.

        Args:
            tgt: (T, B, E), (B, T, E) with ``batch_first``, or (T, E).
            memory: (S, B, E), (B, S, E) or (S, E).
            tgt_mask: (T, T) or (B*H, T, T); bool, ``True`` is *not* attended to; or floating point, added.
            memory_mask: (T, S) or (B*H, T, S), likewise.
            tgt_key_padding_mask: (B, T) or (T,); bool, ``True`` is ignored; or floating point, added.
            memory_key_padding_mask: (B, S) or (S,), likewise.
            tgt_is_causal: a promise that `tgt_mask` is the causal mask; by default it is compared with that.
            memory_is_causal: likewise of `memory_mask`. Default: ``False``.

        Returns:
            The shape and dtype of `tgt`.

        Raises:
            AssertionError, RuntimeError: shapes or dtypes do not fit; the message names the argument.
        """
        traced: Any = tgt
        if isinstance(traced, Proxy):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            hints = (tgt_is_causal, memory_is_causal)
            return _fx.call(traced, self, tgt, memory, *masks, *hints)
        first: Any = self.layers[0]
        out: Tensor = super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal if tgt.is_nested else _is_causal(tgt_mask, tgt_is_causal, tgt, first.self_attn.batch_first),
            memory_is_causal,
        )
        return out


class Transformer(nn.Transformer):
    """``torch.nn.Transformer`` of the layers above, with the same parameters under the same seed of torch.

    Args: those of ``torch.nn.Transformer``, see there. An encoder or decoder handed over stays as it is.

    Raises:
        AssertionError, ValueError: `nhead` does not divide `d_model`, or one is not positive.
        RuntimeError: `activation` is a string other than ``"relu"`` and ``"gelu"``.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)

        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(*sizes, device=device, dtype=dtype)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm())
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*sizes, device=device, dtype=dtype)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm())
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Encode `src` and decode `tgt` over it.

        Args:
            src: as of `TransformerEncoder.forward`, with its `mask` as `src_mask` and its `src_key_padding_mask`.
            tgt: as of `TransformerDecoder.forward`, with its other arguments.
            src_is_causal: a promise that `src_mask` is the causal mask; by default it is compared with that.

        Returns:
            The shape and dtype of `tgt`.

        Raises:
            AssertionError, RuntimeError: shapes or dtypes do not fit; the message names the argument.
        """
        masks = (src_mask, tgt_mask, memory_mask)
        padding = (src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask)
        traced: Any = src
        if isinstance(traced, Proxy):
            hints = (src_is_causal, tgt_is_causal, memory_is_causal)
            return _fx.call(traced, self, src, tgt, *masks, *padding, *hints)
        out: Tensor = super().forward(src, tgt, *masks, *padding, src_is_causal, tgt_is_causal, memory_is_causal)
        return out


def _floating(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as one of `dtype` with -inf where nothing is read; others as they are."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _masks(
    name: str, mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The masks as the layers take them: boolean ones stay, but where one is not, both become floating point.

    Raises:
        AssertionError: a mask is neither boolean nor floating point.
    """
    if any(x is not None and x.dtype != torch.bool for x in (mask, padding)):
        padding = F._canonical_mask(padding, "src_key_padding_mask", F._none_or_dtype(mask), name, dtype)
        mask = F._canonical_mask(mask, name, None, "", dtype, check_other=False)
    return mask, padding


def _is_causal(mask: Tensor | None, is_causal: bool | None, x: Tensor, batch_first: bool) -> bool:
    """The hint, or whether the mask (bool or floating point) is the causal one for the length of `x`."""
    if is_causal is not None or mask is None or mask.requires_grad or torch.compiler.is_compiling():
        return bool(is_causal)
    size = x.shape[1 if batch_first and x.dim() == 3 else 0]
    if mask.shape != (size, size):
        return False
    later = torch.ones(size, size, dtype=torch.bool, device=mask.device).triu(1)
    return torch.equal(mask, later if mask.dtype == torch.bool else _floating(later, mask.dtype))
