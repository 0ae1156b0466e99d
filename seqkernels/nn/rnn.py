from torch.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell  # noqa: F401
