"""GPU kernels in Triton; without a GPU they run in Triton's interpreter, for tests, where it was switched on."""

from __future__ import annotations

import torch

from .. import Call

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unavailable() -> str | None:
    """``None`` where Triton imports and there is a device for it, else why not."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if triton.knobs.runtime.interpret or torch.cuda.is_available():
        return None
    return "there is no CUDA device, and Triton's interpreter is off"


def unsupported(call: Call) -> str | None:
    """``None`` for calls that the kernels serve on a GPU, else why they cannot."""
    import triton

    interpreted = triton.knobs.runtime.interpret
    if call.device != ("cpu" if interpreted else "cuda"):
        return f"runs on {'cpu (interpreted)' if interpreted else 'cuda'} only, not on {call.device}"
    if call.op not in ("attention", "recurrence"):
        return f"has no kernel for {call.op}"
    if "weights" in call.features:
        return "has no weights"
    if call.dtype not in _DTYPES:
        return f"has no {call.dtype}"
    if interpreted and call.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies torch.bfloat16 wrongly"
    return None
