"""The rotation of rotary position embeddings through ``seqkernels._C``."""

from __future__ import annotations

import torch
from torch import Tensor

from .extension import _C
from .recurrence import last_contiguous

_threads = torch.get_num_threads


def _rows(x: Tensor) -> Tensor:
    return last_contiguous(x) if x.dim() else x


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, out: Tensor) -> None:
    """``seqkernels::rotary`` into `out`, one pass over the memory.

    Raises:
        ValueError, TypeError: a tensor does not fit.
    """
    try:
        _C.rotary(x, cos, sin, interleaved, inverse, out, _threads())
    except ValueError:
        given = _rows(x), _rows(cos), _rows(sin)
        if all(t is have for t, have in zip(given, (x, cos, sin), strict=True)):
            raise
        _C.rotary(*given, interleaved, inverse, out, _threads())
