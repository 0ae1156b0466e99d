"""Layers under autocast on a GPU give what torch's give there, in the same dtypes."""

from __future__ import annotations

import pytest
import torch

import seqkernels
from seqkernels.testing import assert_within_budget

from ..twins import leaves


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM", "MultiheadAttention"])
def test_autocast_gives_the_dtypes_of_torch(kind, dtype, lower):
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(16, 4 if kind == "MultiheadAttention" else 24).cuda()
    ours = getattr(seqkernels.nn, kind)(16, 4 if kind == "MultiheadAttention" else 24).cuda()
    ours.load_state_dict(theirs.state_dict())
    inputs = (torch.randn(9, 3, 16, device="cuda", dtype=dtype),) * (3 if kind == "MultiheadAttention" else 1)
    with torch.autocast("cuda", lower):
        expected, found = leaves(theirs(*inputs)), leaves(ours(*inputs))
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    exact = leaves(theirs.double()(*(x.double() for x in inputs)))
    for mine, oracle, own in zip(found, exact, expected, strict=True):
        assert_within_budget(mine, oracle, own)
    found[0].float().square().sum().backward()
    assert {x.grad.dtype for x in ours.parameters()} == {torch.float32}
