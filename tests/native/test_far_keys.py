"""Keys that ALiBi leaves no weight, and rows read as they lie: what the kernel reads in ways of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels import testing
from seqkernels.backends import native
from seqkernels.backends.native.extension import extension
from seqkernels.functional import attention

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

FORMS: dict[str, dict[str, Any]] = {
    "causal": {"right": 0},
    "causal from the other corner": {"right": 0, "bottom_right": True},
    "both directions": {},
    "window": {"left": 500, "right": 7},
    "softcap": {"softcap": 3.0},
    "lengths": {"key_lengths": torch.tensor([350], dtype=torch.int32)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(400, 400), (90, 700), (450, 260)], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_far_keys_weigh_nothing(form, lengths, dtype):
    """Slopes from one that leaves some 50 keys to one that leaves all, and one that prefers far keys."""
    inputs = testing.attention_inputs(1, 4, *lengths, 24, dtype, kv_heads=2)
    slopes = torch.tensor([3.0, 0.5, 0.01, -0.5])
    for isa in extension().isas():
        with seqkernels.use_backend("native"), testing.force_isa(isa), testing.poisoned_empty():
            testing.check_attention(inputs, alibi_slopes=slopes, **form)


def _finite(backend: str, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    copies = [x.clone().requires_grad_() for x in tensors]
    with seqkernels.use_backend(backend):
        out = attention(*copies, alibi_slopes=torch.tensor([4.0, 1.0]))
        return [x.isfinite() for x in (out, *torch.autograd.grad(out, copies, grad))]


@pytest.mark.parametrize("place", [0, 299, 599])
@pytest.mark.parametrize("which", ["q", "k", "v", "gradient"])
def test_far_keys_that_are_nan_are_met(which, place):
    """As if every weight was computed: what is left out is no reason to hide a NaN."""
    generator = torch.Generator().manual_seed(place)
    *tensors, grad = (torch.randn(1, 2, 600, 8, generator=generator) for _ in range(4))
    dict(zip(["q", "k", "v", "gradient"], [*tensors, grad], strict=True))[which][0, 1, place, 3] = torch.nan
    for found, expected in zip(_finite("native", tensors, grad), _finite("reference", tensors, grad), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", range(1, 9))
def test_few_rows(rows, dtype):
    """Any number of keys, of any size, from several places at a time."""
    sizes = [1, 31, 32, 33, 64, 96, 100, 129, 200]
    for i, keys in enumerate([1, 2, 3, 15, 17, 63, 64, 65, 255, 257, 300, 531]):
        size, value_size = sizes[i % len(sizes)], sizes[-1 - i % len(sizes)]
        kv_heads = 1 if rows % 2 else 2
        inputs = testing.attention_inputs(
            1, rows * kv_heads, 1, keys, size, dtype, value_size=value_size, kv_heads=kv_heads, requires_grad=False
        )
        for isa in extension().isas():
            with seqkernels.use_backend("native"), testing.force_isa(isa), testing.poisoned_empty():
                testing.check_attention(inputs)
