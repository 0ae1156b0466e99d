"""Kernels compiled on the CPU by numba at their first call: fast where the compiled module is absent."""

from __future__ import annotations

from .. import Call

#: Features of recurrences that it leaves to others.
_DECLINED = ("checkpoint", "gates", "norm", "peephole", "recurrent_mask", "reset_state", "zoneout")


def unavailable() -> str | None:
    """``None`` where numba imports, else why it does not."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return f"numba cannot be imported: {error}"
    return None


def unsupported(call: Call) -> str | None:
    """``None`` for every call on the CPU without options of the cell, else why it cannot run."""
    if call.device != "cpu":
        return f"runs on cpu only, not on {call.device}"
    declined = [name for name in call.features if name in _DECLINED]
    return f"has no {', '.join(declined)}" if declined else None
