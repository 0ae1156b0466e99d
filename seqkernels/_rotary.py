"""The rotation of rotary position embeddings, for the layer and for the cache of keys."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs among the first elements of each vector turned (Su et al., "RoFormer", 2021).

    Args:
        x: (..., D).
        cos: cosines of the angles, of the dtype to compute in, can be broadcast to (..., P): P, at most D / 2, is the
            number of pairs.
        sin: likewise the sines.
        interleaved: pairs are elements 0 and 1, 2 and 3, ...; else the first half of all their elements with the
            second.

    Returns:
        Shape and dtype of `x`, rounded once.
    """
    half = cos.shape[-1]
    pairs, sizes = (-1, (half, 2)) if interleaved else (-2, (2, half))
    a, b = x[..., : 2 * half].to(cos.dtype).unflatten(-1, sizes).unbind(pairs)
    both = (torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin))
    turned = torch.stack(both, pairs).flatten(-2).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), -1)
