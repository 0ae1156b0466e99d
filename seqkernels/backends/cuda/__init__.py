"""Calls the compiled module of CUDA kernels, ``seqkernels._C_cuda``."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

import torch

from .. import Call

#: There is a module ``together``.
TOGETHER = True
if TYPE_CHECKING:
    from .plans import Norms

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unavailable() -> str | None:
    """``None`` where the module loads and there is a device for its kernels, else why not."""
    from . import emulator
    from .extension import device_error, load_error

    return None if emulator.in_use() else load_error() or device_error()


def unsupported(call: Call) -> str | None:
    """``None`` where the module serves `call`, else why it does not."""
    from . import emulator

    if call.op != "recurrence":
        return f"has no kernel for {call.op}"
    device = "cpu" if emulator.in_use() else "cuda"
    if call.device != device:
        return f"runs on {device}{' (emulated)' if emulator.in_use() else ''} only, not on {call.device}"
    if call.dtype not in _DTYPES:
        return f"has no {call.dtype}"
    return _too_large(call)


def _norms(call: Call) -> Norms:
    """All that a cell may have where a call has any: features do not say which."""
    from .plans import Norms

    return Norms("norm" in call.features, "norm" in call.features and call.kind == "lstm")


def _too_large(call: Call) -> str | None:
    from .recurrence import choice, device_of

    if call.hidden == 0:
        return None
    for backward in (False, True):
        found = choice(device_of(None), call.kind, call.dtype, "ieee", backward, call.hidden, 1, _norms(call))
        if found.plan is None:
            return str(found)
    return None


def not_by_default(call: Call) -> str | None:
    """Why `call` is served only where `seqkernels.use_backend` asks for it; ``None`` where it is by itself."""
    return "was not measured to be faster on a GPU yet; use_backend('cuda') has it run"


def detail(call: Call) -> str:
    """How `call` is served, for `seqkernels.explain`."""
    from .recurrence import choice, device_of, kernels

    if call.hidden == 0:
        return "nothing to do"
    here = (device_of(None), call.kind, call.dtype, "ieee", False, call.hidden, max(call.batch, 1), _norms(call))
    alone = str(choice(*here))
    if call.together == 1:
        return alone
    most = kernels().MOST_JOBS
    width = max(n for n in range(1, min(call.together, most) + 1) if n == 1 or isfinite(choice(*here, n).cycles))
    return f"{alone}, in turn" if width == 1 else f"{choice(*here, width)}, {width} at once"
