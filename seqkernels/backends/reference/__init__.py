"""Plain PyTorch: readable, slow, on any device and dtype. The oracle of the tests."""

from __future__ import annotations

from .. import Call


def unavailable() -> str | None:
    """``None``: this implementation needs nothing but torch."""
    return None


def unsupported(call: Call) -> str | None:
    """``None``: this implementation runs every call."""
    return None
