"""Models written once and told whose layers to use: ``torch.nn`` or ``seqkernels.nn``."""

from __future__ import annotations

from .seq2seq import Seq2Seq, Seq2SeqConfig

__all__ = ["Seq2Seq", "Seq2SeqConfig"]
