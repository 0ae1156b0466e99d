"""Drop-in layers: the constructor, arguments, parameters, results and errors of their ``torch.nn`` originals.

Beside them are layers that ``torch.nn`` lacks: alignment attention and positional encodings.
"""

from __future__ import annotations

from ..functional import Trace
from .alignment import AdditiveAttention, BilinearAttention
from .attention import MultiheadAttention
from .cells import GRUCell, LSTMCell, RNNCell
from .positional import ALiBi, LearnedEncoding, RotaryEmbedding, SinusoidalEncoding
from .rnn import GRU, LSTM, RNN
from .transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ALiBi",
    "AdditiveAttention",
    "BilinearAttention",
    "GRUCell",
    "LSTMCell",
    "LearnedEncoding",
    "MultiheadAttention",
    "RNNCell",
    "RotaryEmbedding",
    "SinusoidalEncoding",
    "Trace",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
