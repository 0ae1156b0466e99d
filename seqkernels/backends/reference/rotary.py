"""The rotation of rotary position embeddings in plain operations, which every transform knows.

Derivatives are of any order, and of cosines and sines too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool = False) -> Tensor:
    """`seqkernels.ops.rotary.rotate` for any number of dimensions; by the negative angles with `inverse`."""
    half = cos.shape[-1]
    wide = x[..., : 2 * half].to(cos.dtype)
    if interleaved:
        a, b = wide[..., ::2], wide[..., 1::2]
    else:
        a, b = wide[..., :half], wide[..., half:]
    sign = -1 if inverse else 1
    both = (torch.addcmul(a * cos, b, sin, value=-sign), torch.addcmul(b * cos, a, sin, value=sign))
    turned = torch.stack(both, -1).reshape(wide.shape) if interleaved else torch.cat(both, -1)
    turned = turned.to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), -1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, out: Tensor) -> None:
    """``seqkernels::rotary`` into `out`."""
    out.copy_(rotate(x, cos, sin, interleaved, inverse))
