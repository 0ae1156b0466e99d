"""Bilinear alignment attention between two sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional


class BilinearAttention(nn.Module):
    """Attention of one sequence over another, scored by a bilinear form.

    ``score = y W h^T``; the softmax over the positions of `h` weighs a sum of `h`. This is scaled dot-product
    attention with ``q = y W``, ``k = v = h`` and scale 1, so a fused kernel of that serves it.

    Source: the "general" score of Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine
    Translation", 2015.

    Args:
        y_dim: features of the sequence that attends.
        h_dim: features of the sequence attended to.
        attention: the function that does the work, with the signature of
            ``torch.nn.functional.scaled_dot_product_attention``; that of `seqkernels.functional` by default.
        device: of the parameter.
        dtype: of the parameter.

    Attributes:
        weight: (y_dim, h_dim), the form W.
    """

    def __init__(
        self,
        y_dim: int,
        h_dim: int,
        attention: Callable[..., Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("y_dim", y_dim), ("h_dim", h_dim)):
            if size < 1:
                raise ValueError(f"{name}: expected a positive number of features, got {size}")
        self.y_dim = y_dim
        self.h_dim = h_dim
        self.attention = functional.scaled_dot_product_attention if attention is None else attention
        self.weight = nn.Parameter(torch.empty(y_dim, h_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W so that scores of inputs with unit variance have a variance near 1."""
        nn.init.normal_(self.weight, std=(self.y_dim * self.h_dim) ** -0.5)

    def forward(self, y: Tensor, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from each position of `y` over all positions of `h`.

        Args:
            y: (..., M, y_dim), the batch dimensions of `h`, any number of them.
            h: (..., N, h_dim).
            mask: bool, broadcastable to (..., M, N), ``True`` keeps a position of `h`; ``None`` keeps all.

        Returns:
            (..., M, h_dim), the weighted sums of `h`.

        Raises:
            ValueError, TypeError: the message names the argument, what it was and what is allowed.
        """
        self._check(y, h, mask)
        # One head: kernels are chosen for four dimensions.
        q, k = (y @ self.weight).unsqueeze(-3), h.unsqueeze(-3)
        return self.attention(q, k, k, None if mask is None else mask.unsqueeze(-3), scale=1.0).squeeze(-3)

    def weights(self, y: Tensor, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """The alignment itself, (..., M, N), each row summing to 1: what `forward` weighs `h` with.

        Arguments and errors as in `forward`. For looking at; computed without the fused kernel.
        """
        self._check(y, h, mask)
        scores = y @ self.weight @ h.mT
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)

    def extra_repr(self) -> str:
        """Sizes, for the printed form."""
        return f"y_dim={self.y_dim}, h_dim={self.h_dim}"

    def _check(self, y: Tensor, h: Tensor, mask: Tensor | None) -> None:
        for name, x, size in (("y", y, self.y_dim), ("h", h, self.h_dim)):
            if x.dim() < 2 or x.shape[-1] != size:
                raise ValueError(f"{name}: expected shape (..., length, {size}), got {tuple(x.shape)}")
        if y.shape[:-2] != h.shape[:-2]:
            raise ValueError(f"h: expected the batch dimensions {tuple(y.shape[:-2])} of y, got {tuple(h.shape[:-2])}")
        if mask is None:
            return
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
        full = (*y.shape[:-1], h.shape[-2])
        if mask.dim() != len(full) or any(have not in (1, want) for have, want in zip(mask.shape, full, strict=True)):
            raise ValueError(f"mask: expected {len(full)} dimensions, each 1 or as in {full}, got {tuple(mask.shape)}")
