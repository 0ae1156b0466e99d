"""Models written once and told whose layers to use: ``torch.nn`` or ``seqkernels.nn``."""

from __future__ import annotations

from ._model import Model
from .bert import BERT, BERTConfig, mask_tokens
from .forecaster import Forecaster, ForecasterConfig
from .generation import beam_search, draw, sample
from .gpt import GPT, GPTCache, GPTConfig
from .recurrent import RecurrentLM, RecurrentLMConfig
from .seq2seq import Seq2Seq, Seq2SeqConfig
from .training import Training

__all__ = [
    "BERT",
    "GPT",
    "BERTConfig",
    "Forecaster",
    "ForecasterConfig",
    "GPTCache",
    "GPTConfig",
    "Model",
    "RecurrentLM",
    "RecurrentLMConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Training",
    "beam_search",
    "draw",
    "mask_tokens",
    "sample",
]
