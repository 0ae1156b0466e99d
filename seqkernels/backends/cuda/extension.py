"""Loads ``seqkernels._C_cuda`` once, when it is first asked for, and keeps the reason where that fails.

Loading it neither needs a driver nor touches a device.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

_module: ModuleType | None = None
_error: str | None = None

try:
    _module = importlib.import_module("seqkernels._C_cuda")
except ImportError as error:
    _error = f"the compiled module seqkernels._C_cuda does not load: {error}"


def load_error() -> str | None:
    """Why the compiled module is not there; ``None`` where it is."""
    return _error


def device_error() -> str | None:
    """Why the compiled module has no device to run on, in CUDA's words; ``None`` where it has one.

    Raises:
        ImportError: the module does not load.
    """
    reason = extension().device_error()
    return None if reason is None else f"there is no CUDA device for seqkernels._C_cuda: {reason}"


def extension() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it was not built, or does not load; the message says why.
    """
    if _module is None:
        raise ImportError(_error)
    return _module


if TYPE_CHECKING:
    from ... import _C_cuda as _C_cuda
else:

    def __getattr__(name: str) -> Any:
        """``_C_cuda``, the module that `extension` returns, with the types of its stub.

        Raises:
            ImportError: as `extension`.
        """
        if name != "_C_cuda":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return extension()
