"""Calls the compiled module ``seqkernels._C``."""

from __future__ import annotations

from .. import Call

_ATTENTION = ("bias", "causal", "grouped", "mask")


def unavailable() -> str | None:
    """``None`` where the compiled module loads, else why it does not."""
    from .extension import load_error

    return load_error()


def unsupported(call: Call) -> str | None:
    """``None`` where the compiled module serves `call`, else why it does not."""
    if call.device != "cpu":
        return f"runs on cpu only, not on {call.device}"
    missing = [name for name in call.features if call.op == "attention" and name not in _ATTENTION]
    return f"has no {', '.join(missing)}" if missing else None
