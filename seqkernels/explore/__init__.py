"""Every intermediate number of an RNN, an LSTM, a GRU and self-attention over a few tokens.

``python -m seqkernels explore "a b c"`` shows it. States, gates, attention's output, weights and log-sum-exp are what
the kernels return; what no kernel returns, such as the two parts of a sum, is computed beside it and called derived.
The weights are random: this is how the numbers flow, not what a trained model does.

Letters: T tokens, V different ones, E embedding size, H hidden size.
"""

from __future__ import annotations

from .models import MODELS, Exploration, Quantity, Section, draw, explore
from .output import as_json, numbers, picture, show

__all__ = [
    "MODELS",
    "Exploration",
    "Quantity",
    "Section",
    "as_json",
    "draw",
    "explore",
    "numbers",
    "picture",
    "show",
]
