"""Calls the compiled module ``seqkernels._C``."""

from __future__ import annotations

from .. import Call


def unavailable() -> str | None:
    """``None`` where the compiled module loads, else why it does not."""
    from .extension import load_error

    return load_error()


def unsupported(call: Call) -> str | None:
    """``None`` where the compiled module serves `call`, else why it does not."""
    if call.device != "cpu":
        return f"runs on cpu only, not on {call.device}"
    # What a layer norm saw of a chunk of steps is made again from stored states, of which a segment has too few.
    return "has no checkpoint with norm" if {"checkpoint", "norm"} <= set(call.features) else None
