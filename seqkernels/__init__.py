"""Compiled kernels for sequence models in PyTorch: drop-in recurrences and attention."""

from __future__ import annotations

# torch first: the compiled module then shares torch's OpenMP runtime instead of loading a second one.
import torch as _torch  # noqa: F401

from . import functional, nn
from ._version import __version__
from .backends import BackendError, Explanation, explain, use_backend
from .convert import Report, convert, revert
from .warmup import Warmup, warmup

__all__ = [
    "BackendError",
    "Explanation",
    "Report",
    "Warmup",
    "__version__",
    "convert",
    "explain",
    "functional",
    "nn",
    "revert",
    "use_backend",
    "warmup",
]
