"""Calls the compiled module ``seqkernels._C``."""

from __future__ import annotations

from .. import Call

#: Features of recurrences that the kernel has not.
_DECLINED = ("checkpoint",)


def unavailable() -> str | None:
    """``None`` where the compiled module loads, else why it does not."""
    from .extension import load_error

    return load_error()


def unsupported(call: Call) -> str | None:
    """``None`` where the compiled module serves `call`, else why it does not."""
    if call.device != "cpu":
        return f"runs on cpu only, not on {call.device}"
    declined = [name for name in call.features if name in _DECLINED]
    return f"has no {', '.join(declined)}" if declined else None
