from torch.nn import MultiheadAttention  # noqa: F401
