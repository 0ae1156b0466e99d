"""Sizes of the tiles of each kernel, by dtype and head size; the number of rows, keys and heads has no part in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from . import tiles

#: Up to so many rows of all heads of a group, the tile of the forward pass has no more.
FEW_ROWS = 16

#: Bytes of shared memory that a program has at least on a device for which the first row of a table below is meant.
ROOMY = 160 * 1024


class Blocks(NamedTuple):
    """Rows and keys of a tile, head sizes rounded up to powers of 2, warps of a program, and stages of its loads."""

    m: int
    n: int
    d: int
    dv: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_D": self.d, "BLOCK_DV": self.dv}


# Rows, keys, warps and stages, for head sizes up to 64, 128, 256 and 512. The largest tiles that ptxas gives all their
# registers; float32 products without tensor cores take several for each element. Scores that a mask, a bias, ALiBi, a
# soft cap or dropout go into have the tables named "... of many terms". Pointers to pages and masks of columns that are
# not there take registers too: "... of pages", and "... of padded heads" whose size is no power of 2.
_HALF: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "forward": ((128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
    "forward of many terms": ((128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
    "forward of pages": ((128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 8, 2), (32, 16, 8, 2)),
    "forward of padded heads": ((128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 8, 2), (32, 32, 8, 2)),
    "few_rows": ((16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 8, 2), (16, 16, 8, 2)),
    "few_rows of many terms": ((16, 64, 8, 3), (16, 32, 8, 3), (16, 32, 8, 2), (16, 16, 8, 2)),
    "few_rows of pages": ((16, 64, 8, 3), (16, 64, 4, 3), (16, 64, 8, 2), (16, 16, 8, 2)),
    "backward_q": ((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
    "backward_q of many terms": ((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 8, 2), (16, 16, 8, 2)),
    "backward_kv": ((64, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
    "backward_kv of many terms": ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
    "backward_bias": ((64, 32, 8, 2), (64, 32, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
}
_FLOAT: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "forward": ((64, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2), (16, 16, 16, 1)),
    "forward of many terms": ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 1)),
    "few_rows": ((16, 32, 8, 2), (16, 16, 8, 2), (16, 16, 16, 2), (16, 16, 16, 1)),
    "few_rows of many terms": ((16, 16, 8, 2), (16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 1)),
    "backward_q": ((16, 32, 4, 2), (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 16, 1)),
    "backward_q of many terms": ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 1), (16, 16, 16, 1)),
    "backward_kv": ((32, 32, 4, 2), (16, 32, 4, 2), (16, 32, 8, 2), (16, 16, 16, 1)),
    "backward_kv of many terms": ((16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 8, 1), (16, 16, 8, 1)),
    "backward_bias": ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 1), (16, 16, 8, 1)),
}
_TF32: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "forward": ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
    "forward of many terms": ((128, 32, 8, 2), (32, 16, 4, 2), (32, 16, 8, 2), (16, 16, 8, 2)),
    "few_rows": ((16, 64, 8, 3), (16, 32, 8, 3), (16, 32, 8, 2), (16, 16, 8, 2)),
    "few_rows of many terms": ((16, 64, 8, 3), (16, 32, 4, 3), (16, 32, 8, 2), (16, 16, 8, 2)),
    "backward_q": ((128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 2)),
    "backward_q of many terms": ((32, 32, 8, 2), (16, 16, 4, 2), (16, 16, 8, 1), (16, 16, 8, 1)),
    "backward_kv": ((32, 64, 4, 2), (32, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 1)),
    "backward_kv of many terms": ((32, 32, 8, 2), (16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 1)),
    "backward_bias": ((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2), (16, 16, 8, 2)),
}
_TF32X3: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "forward": ((128, 32, 8, 2), (16, 32, 4, 2)),
    "forward of many terms": ((32, 16, 4, 2), (16, 16, 4, 2)),
    "few_rows": ((16, 64, 4, 3), (16, 32, 4, 3)),
    "few_rows of many terms": ((16, 32, 8, 3), (16, 32, 8, 3)),
    "backward_q": ((32, 32, 8, 2), (16, 16, 8, 1)),
    "backward_q of many terms": ((32, 32, 8, 2), (16, 16, 8, 2)),
    "backward_kv": ((16, 32, 8, 2), (16, 16, 4, 2)),
    "backward_kv of many terms": ((16, 32, 8, 2), (16, 16, 8, 2)),
    "backward_bias": ((16, 16, 4, 2), (16, 16, 8, 2)),
}
_TABLES = {"16 bits": _HALF, "ieee": _FLOAT, "tf32": _TF32, "tf32x3": _TF32X3}

# Rows in place of those above: on devices whose warps multiply each for itself, as before Hopper, and on those whose
# products have a memory of their own.
_BEFORE_HOPPER: dict[str, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    "16 bits": {
        "forward": ((128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 8, 2), (32, 32, 8, 2)),
        "forward of pages": ((128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 8, 2), (32, 16, 8, 2)),
        "forward of padded heads": ((128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 8, 2), (32, 32, 8, 2)),
        "few_rows": (*_HALF["few_rows"][:2], (16, 32, 8, 2), (16, 16, 8, 2)),
        "backward_q": (_HALF["backward_q"][0], (64, 64, 8, 2), *_HALF["backward_q"][2:]),
    },
    "tf32": {
        "forward": ((128, 64, 8, 2), (64, 32, 8, 2), *_TF32["forward"][2:]),
        "forward of many terms": ((32, 32, 4, 2), *_TF32["forward of many terms"][1:]),
    },
}
_AFTER_HOPPER: dict[str, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    "16 bits": {
        "forward": ((128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 8, 2), (32, 32, 8, 2)),
        "forward of pages": ((128, 64, 8, 2), *_HALF["forward of pages"][1:]),
        "forward of padded heads": ((128, 64, 8, 2), *_HALF["forward of padded heads"][1:]),
        "few_rows of padded heads": (*_HALF["few_rows"][:2], (16, 32, 4, 2), (16, 16, 8, 2)),
    },
    "ieee": {"forward": (*_FLOAT["forward"][:2], (16, 16, 16, 2), (16, 16, 16, 1))},
    "tf32": {"few_rows": (*_TF32["few_rows"][:2], (16, 32, 4, 2), _TF32["few_rows"][3])},
    "tf32x3": {"forward": ((64, 32, 8, 2), *_TF32X3["forward"][1:])},
}


def _power_of_2(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def products(dtype: torch.dtype, precision: str, size: int, value_size: int) -> str:
    """How the kernels form products: as `precision` says, or better where that takes more registers than there are.

    Args:
        dtype: of q, k and v.
        precision: one of `seqkernels.precision.PRECISIONS`.
        size: D, of q and k.
        value_size: Dv.
    """
    if dtype != torch.float32 or (precision == "tf32x3" and max(size, value_size) > 128):
        return "ieee"
    return precision


def by_descriptors(dtype: torch.dtype, size: int, keys: int, architecture: int) -> bool:
    """Whether the forward pass has tiles of keys and values brought by descriptors: on Hopper, of 16-bit numbers.

    Of larger heads than 128 registers would spill.

    A descriptor is made for each launch, which takes microseconds of the processor: not for few keys.

    Args:
        dtype: of q, k and v.
        size: the larger one of D and Dv.
        keys: N.
        architecture: 10 times the compute capability.
    """
    # Small tests shall have both ways.
    least = 32 if triton.knobs.runtime.interpret else 1024
    return dtype != torch.float32 and size <= 128 and 90 <= architecture < 100 and keys >= least


def blocks_of(
    kernel: str,
    dtype: torch.dtype,
    size: int,
    value_size: int,
    *,
    many_terms: bool = False,
    pages: bool = False,
    precision: str = "ieee",
    architecture: int = 90,
    shared: int = ROOMY,
    device: torch.device | None = None,
) -> Blocks:
    """The tiles of a kernel.

    Args:
        kernel: ``"forward"``, ``"few_rows"`` (the forward pass of few queries), ``"backward_q"``, ``"backward_kv"``
            or ``"backward_bias"``.
        dtype: of q, k and v.
        size: D, of q and k.
        value_size: Dv.
        many_terms: whether more goes into scores than the product and bounds.
        pages: whether keys and values lie in pages.
        precision: of products of float32 matrices.
        architecture: 10 times the compute capability.
        shared: bytes of shared memory that the device has for a program.
        device: whose own tiles come first, see `tiles`; ``None`` for those that are shipped.
    """
    d, dv = _power_of_2(size), _power_of_2(value_size)
    formed = products(dtype, precision, size, value_size)
    numbers = formed if dtype == torch.float32 else "16 bits"
    others = _AFTER_HOPPER if 100 <= architecture < 120 else _BEFORE_HOPPER if not 90 <= architecture < 100 else {}
    table = _TABLES[numbers] | others.get(numbers, {})
    padded = (d, dv) != (size, value_size)
    named = f"{kernel} of " + ("many terms" if many_terms else "pages" if pages else "padded heads" if padded else "")
    named = named if named in table else kernel
    own = tiles.own(device, tiles.attention_row, named, dtype, max(d, dv), formed)
    if own is not None:
        return Blocks(own[0], own[1], d, dv, *own[2:])
    if triton.knobs.runtime.interpret:
        # Small tests shall still have several tiles.
        return Blocks(FEW_ROWS if kernel == "few_rows" else 32, 16, d, dv, 1, 1)
    m, n, warps, stages = table[named][max((max(d, dv) - 1).bit_length() - 6, 0)]
    if shared < ROOMY:
        n = max(n // 2, 16)
    return Blocks(m, n, d, dv, warps, stages)
