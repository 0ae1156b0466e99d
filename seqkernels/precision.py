"""How precisely products of float32 matrices are formed on GPUs, for each call, whatever torch's global flags say.

``"ieee"``: float32 as it is, without tensor cores. ``"tf32"``: factors are rounded to 10 bits of mantissa and the
products added up in float32, on tensor cores. ``"tf32x3"``: three such products of the parts of each factor, nearly as
precise as float32 (Ootomo & Yokota, "Recovering single precision accuracy from Tensor Cores", 2022). The latter two
say what is good enough: processors compute in float32 all the same, and so do products of other dtypes in theirs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

PRECISIONS = ("ieee", "tf32", "tf32x3")

_lock = threading.RLock()


def check_precision(precision: object) -> str:
    """`precision`, if it is one of `PRECISIONS`.

    Raises:
        ValueError: it is not.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    return str(precision)


def of_products(precision: str, x: Tensor) -> str:
    """`precision`, ``"ieee"`` where it would make no difference: for `x` of other dtypes than float32."""
    return precision if x.dtype == torch.float32 else "ieee"


@contextlib.contextmanager
def torch_products(precision: str, x: Tensor) -> Iterator[None]:
    """Have torch form products of float32 matrices on the device of `x` in TF32 for ``"tf32"``, else exactly.

    torch's flag is one of the process, so blocks in other threads wait. Products that are none of ours, which another
    thread starts meanwhile, follow it too.
    """
    if x.dtype != torch.float32 or x.device.type != "cuda":
        yield
        return
    flags = torch.backends.cuda.matmul
    wanted = "tf32" if precision == "tf32" else "ieee"
    with _lock:
        before = flags.fp32_precision
        if before == wanted or (before, wanted) == ("none", "ieee"):
            yield
            return
        # What it would be without a value of its own: then it goes back to having none.
        flags.fp32_precision = "none"
        inherited = flags.fp32_precision
        flags.fp32_precision = wanted
        try:
            yield
        finally:
            flags.fp32_precision = "none" if inherited == before else before
