"""Kernels compiled on the CPU by numba at their first call: fast where the compiled module is absent."""

from __future__ import annotations

from .. import Call

#: Features that it leaves to others.
_DECLINED = {
    "recurrence": ("checkpoint", "gates", "norm", "peephole", "recurrent_mask", "reset_state", "zoneout"),
    "attention": (
        "alibi",
        "bias32",
        "block_table",
        "bottom_right",
        "dropout",
        "key_lengths",
        "sink",
        "softcap",
        "varlen",
        "weights",
        "window",
    ),
}


def unavailable() -> str | None:
    """``None`` where numba imports, else why it does not."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return f"numba cannot be imported: {error}"
    return None


def unsupported(call: Call) -> str | None:
    """``None`` for plain calls on the CPU, else why it cannot run."""
    if call.device != "cpu":
        return f"runs on cpu only, not on {call.device}"
    if call.op not in _DECLINED:
        return f"has no kernel for {call.op}"
    declined = [name for name in call.features if name in _DECLINED[call.op]]
    return f"has no {', '.join(declined)}" if declined else None
