"""Attention's ways of sharing out the work, which depend on sizes and threads, for every instruction set."""

from __future__ import annotations

import pytest
import torch

import seqkernels
from seqkernels import testing
from seqkernels.backends import native
from seqkernels.backends.native.extension import extension
from seqkernels.ops.attention import attention

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

#: Query heads, key heads, M, N, D, Dv, mask, bias, causal of one batch row.
SHAPES = {
    "panels shared by the threads": (4, 4, 150, 600, 64, 64, None, None, False),
    "panels shared, causal": (3, 3, 531, 531, 40, 72, None, None, True),
    "panels shared, keys beyond the last query": (2, 2, 100, 700, 64, 64, "BHMN", "11MN", True),
    "rows of several heads in a block": (8, 2, 9, 520, 64, 32, "B11N", None, False),
    "rows of several heads in a block, causal": (12, 2, 7, 60, 96, 128, None, "1HMN", True),
    "few rows, one head, keys split": (1, 1, 1, 5000, 128, 128, None, None, False),
    "few rows of a group, masked, keys split": (4, 1, 2, 4001, 65, 50, "BHMN", "1H1N", False),
    "gradient of keys split, one head": (1, 1, 300, 700, 64, 64, None, "11MN", False),
    "gradient of keys split, causal": (3, 1, 260, 400, 33, 64, None, None, True),
    "bias gradient of all heads": (6, 6, 60, 130, 64, 64, None, "B1MN", False),
    "bias gradient of one number, keys split": (1, 1, 130, 500, 64, 64, "B1M1", "1111", False),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def inputs_and_causality(request: pytest.FixtureRequest) -> tuple[testing.AttentionInputs, bool]:
    heads, kv_heads, queries, keys, size, value_size, mask, bias, is_causal = request.param
    inputs = testing.attention_inputs(
        1, heads, queries, keys, size, value_size=value_size, kv_heads=kv_heads, mask=mask, bias=bias
    )
    return inputs, is_causal


def test_work_is_shared_out(inputs_and_causality):
    inputs, is_causal = inputs_and_causality
    *others, best = extension().isas()
    for isa, threads in [(best, 1), (best, 2), (best, 3), *((isa, 2) for isa in others)]:
        with (
            seqkernels.use_backend("native"),
            testing.force_isa(isa),
            testing.threads(threads),
            testing.poisoned_empty(),
        ):
            testing.check_attention(inputs, is_causal=is_causal)


def test_packed_keys_are_limited():
    """Two heads of 64 MB each are packed one after the other."""
    inputs = testing.attention_inputs(1, 2, 9, 16500, 512, requires_grad=False)
    with seqkernels.use_backend("native"), testing.threads(2), testing.poisoned_empty():
        together = attention(*inputs)
        apart = [attention(*(x[:, h : h + 1] for x in inputs[:3])) for h in range(2)]
    for i, x in enumerate(together):
        torch.testing.assert_close(x, torch.cat([one[i] for one in apart], 1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_values_behind_masks_do_not_show(queries, dtype):
    """Neither in the copies of 16-bit rows nor where rows are read as they lie."""
    for kind in (dtype, torch.float32):
        inputs = testing.attention_inputs(1, 4, queries, 70, 32, kind, kv_heads=2, mask="B11N", requires_grad=False)
        assert inputs.mask is not None
        hidden = ~inputs.mask[0, 0, 0]
        k, v = inputs.k.clone(), inputs.v.clone()
        with seqkernels.use_backend("native"):
            expected = attention(inputs.q, k, v, inputs.mask)
            k[:, :, hidden], v[:, :, hidden] = torch.nan, torch.inf
            found = attention(inputs.q, k, v, inputs.mask)
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


def test_memory_is_taken_for_what_there_is():
    lengths = torch.tensor([0, 3, 20, 21], dtype=torch.int32)
    q, k, v = (torch.randn(1, 4, 21, 8, requires_grad=True) for _ in range(3))
    found = []
    for longest in (17, 2**31 - 1):
        out, _ = attention(
            q, k, v, cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=longest, max_seqlen_k=longest, right=0
        )
        found.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)
