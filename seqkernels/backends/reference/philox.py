"""Philox4x32-10, the counter-based generator of zoneout and dropout, in tensor arithmetic.

Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Words of 32 bits lie in int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of ``x * factor``, for a factor from 2^31: without 2^32 of it nothing overflows."""
    product = x * (factor - 2**32)
    return (product >> 32) + x, product & _WORD


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of words, of shapes that broadcast.
        key: two likewise.

    Returns:
        Four int64 tensors of random words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def words(seed: Tensor, index: Tensor) -> Words:
    """Four random words for each index.

    Args:
        seed: () int64; its low and high 32 bits are the key.
        index: any shape, int64, not negative; its low and high 32 bits are the first two words of the counter.

    Returns:
        Four int64 tensors of the shape of `index`, with words of 32 bits.
    """
    zero = torch.zeros_like(index)
    return philox((index & _WORD, index >> 32, zero, zero), (seed & _WORD, (seed >> 32) & _WORD))


def uniform(seed: Tensor, index: Tensor) -> Tensor:
    """Random numbers in [0, 1), multiples of 2^-24, each a function of `seed` and of its index alone.

    Args:
        seed: () int64; its low and high 32 bits are the key.
        index: any shape, int64, not negative; its low and high 32 bits are the first two words of the counter.

    Returns:
        float32 of the shape of `index`.
    """
    return (words(seed, index)[0] >> 8).to(torch.float32) * 2.0**-24
