"""Drop-in layers: the constructor, arguments, parameters, results and errors of their ``torch.nn`` originals."""

from __future__ import annotations

from .alignment import BilinearAttention
from .attention import MultiheadAttention
from .rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "BilinearAttention", "GRUCell", "LSTMCell", "MultiheadAttention", "RNNCell"]
