"""Loads ``seqkernels._C`` once and keeps the reason where that fails."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

_module: ModuleType | None = None
_error: str | None = None

try:
    _module = importlib.import_module("seqkernels._C")
except ImportError as error:
    _error = f"the compiled module seqkernels._C does not load: {error}"


def load_error() -> str | None:
    """Why the compiled module is not there; ``None`` where it is."""
    return _error


def extension() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it was not built, or does not load; the message says why.
    """
    if _module is None:
        raise ImportError(_error)
    return _module


if TYPE_CHECKING:
    from ... import _C as _C
else:

    def __getattr__(name: str) -> Any:
        """``_C``, the module that `extension` returns, with the types of its stub.

        Raises:
            ImportError: as `extension`.
        """
        if name != "_C":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return extension()
