"""Kernels compiled on the CPU by numba at their first call: fast where the compiled module is absent."""

from __future__ import annotations

from .. import Call


def unavailable() -> str | None:
    """``None`` where numba imports, else why it does not."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return f"numba cannot be imported: {error}"
    return None


def unsupported(call: Call) -> str | None:
    """``None`` for every call on the CPU, else why it cannot run."""
    if call.device != "cpu":
        return f"runs on cpu only, not on {call.device}"
    return None
