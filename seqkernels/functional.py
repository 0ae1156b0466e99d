"""Functions behind the layers: validation and layout, then the operations of `seqkernels.ops`."""

from __future__ import annotations
