"""Models written once and told whose layers to use: ``torch.nn`` or ``seqkernels.nn``."""

from __future__ import annotations

from .gpt import GPT, GPTConfig
from .seq2seq import Seq2Seq, Seq2SeqConfig

__all__ = ["GPT", "GPTConfig", "Seq2Seq", "Seq2SeqConfig"]
