"""Calls the compiled module ``seqkernels._C``."""

from __future__ import annotations

from .. import Call


def unavailable() -> str | None:
    """``None`` where the compiled module loads, else why it does not."""
    from .extension import load_error

    return load_error()


def unsupported(call: Call) -> str | None:
    """``None`` where the compiled module serves `call`, else why it does not."""
    return None if call.device == "cpu" else f"runs on cpu only, not on {call.device}"
