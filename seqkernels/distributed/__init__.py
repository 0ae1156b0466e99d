"""Sequences and tensors shared among processes, on top of ``torch.distributed``.

`ring_attention` is exact attention over a sequence of which each process holds a part; `shard_sequence` and
`unshard_sequence` cut it and put it together again. `register_sharding` has the ops take ``DTensor``.
``docs/distributed.md`` says what else works with several processes, and how.
"""

from __future__ import annotations

from .ring import ring_attention
from .sequence import shard_sequence, unshard_sequence
from .sharding import register_sharding

__all__ = ["register_sharding", "ring_attention", "shard_sequence", "unshard_sequence"]
