"""Sequences and tensors shared among processes, on top of ``torch.distributed``.

`ring_attention` is exact attention over a sequence of which each process holds a part; `shard_sequence` and
`unshard_sequence` cut it and put it together again. ``docs/distributed.md`` says what else works with several
processes, and how.
"""

from __future__ import annotations

from .ring import ring_attention
from .sequence import shard_sequence, unshard_sequence

__all__ = ["ring_attention", "shard_sequence", "unshard_sequence"]
