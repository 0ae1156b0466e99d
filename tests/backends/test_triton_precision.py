"""How products of float32 matrices are formed reaches every Triton kernel that has one.

What it does to numbers only a GPU shows: ``tests/gpu``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import seqkernels
from seqkernels import functional, testing
from seqkernels.cells import CELLS
from seqkernels.ops.recurrence import recurrence
from seqkernels.precision import PRECISIONS

pytestmark = pytest.mark.parametrize("precision", PRECISIONS)


class _Noting:
    """A kernel whose launches note how it forms products."""

    def __init__(self, kernel: Any, given: list[str]) -> None:
        self.kernel, self.given = kernel, given

    def __getitem__(self, grid: Any) -> Any:
        launch = self.kernel[grid]

        def call(*args: Any, **options: Any) -> Any:
            self.given.append(options["PRECISION"])
            return launch(*args, **options)

        return call


def _note(monkeypatch: pytest.MonkeyPatch, module: Any, *names: str) -> list[str]:
    given: list[str] = []
    for name in names:
        monkeypatch.setattr(module, name, _Noting(getattr(module, name), given))
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 20, 8), (1, 2, 1, 8)], ids=str)
def test_attention(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, precision: str) -> None:
    from seqkernels.backends.triton import attention
    from seqkernels.backends.triton import attention_kernels as kernels

    monkeypatch.setattr(attention, "_plans", {})
    names = ("forward_kernel", "backward_q_kernel", "backward_kv_kernel", "backward_bias_kernel")
    given = _note(monkeypatch, kernels, *names)
    q = torch.randn(shape, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(shape[0], 2, 20, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, 1, 1, 20, dtype=dtype, requires_grad=True)
    with seqkernels.use_backend("triton"):
        out: Any = functional.attention(q, k, v, bias=bias, precision=precision)
        out.sum().backward()
    # Products of 16-bit matrices have one form.
    assert given == [precision if dtype == torch.float32 else "ieee"] * 4


@pytest.mark.parametrize("cell", CELLS)
def test_recurrence(monkeypatch: pytest.MonkeyPatch, cell: str, precision: str) -> None:
    from seqkernels.backends.triton import recurrence_sequence_kernels as kernels

    given = _note(monkeypatch, kernels, "sequence_forward_kernel", "sequence_backward_kernel")
    with seqkernels.use_backend("triton"):
        hidden, _, _ = recurrence(*testing.recurrence_inputs(cell, 3, 2, 5), cell=cell, precision=precision, every=2)
        hidden.sum().backward()
    # Of two segments, each computed again in the backward pass.
    assert given.count(precision) == len(given) >= 6
