"""Attention written down as an attention function of transformers, and the whole mask that goes with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils


def dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention written down, with the mask and the dtype that it is given."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), 3)
    weights = torch.where((scores == -torch.inf).all(-1, True), 0, scores.softmax(-1))[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous(), None


def every_mask(*args: Any, **kwargs: Any) -> Tensor:
    """The mask of `dense`: transformers' own, which then is never left out."""
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(*args, **kwargs)
