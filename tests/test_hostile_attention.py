"""Attention under arguments that nobody should give, and in surroundings that somebody will have.

What `tests/ops` and `tests/nn` test of every option in its ordinary range is not repeated here.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from seqkernels import functional as F
from seqkernels import testing
from seqkernels.ops import attention as ops
from seqkernels.ops import weights as of_weights
from seqkernels.scores import Scores


def inputs(dtype: torch.dtype = torch.float64, queries: int = 5, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    drawn = testing.attention_inputs(2, 4, queries, 7, 8, dtype, kv_heads=2, value_size=6, **given)
    return drawn.q, drawn.k, drawn.v


def attention(*args: Any, **options: Any) -> Tensor:
    """The output alone."""
    found = F.attention(*args, **options)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("far", [2**40, sys.maxsize, 2**70])
@pytest.mark.parametrize("queries", [5, 9])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_a_window_of_any_width_keeps_every_key(far: int, queries: int, alignment: str) -> None:
    q, k, v = inputs(queries=queries)
    expected = attention(q, k, v)
    for window in (far, (far, None), (None, far)):
        assert torch.equal(attention(q, k, v, window=window, alignment=alignment), expected)


@pytest.mark.parametrize("name", ["left", "right"])
def test_bounds_that_overflow_are_refused(name: str) -> None:
    options: dict[str, Any] = {name: sys.maxsize}
    with pytest.raises(ValueError, match=f"^{name}: expected from 0 to"):
        ops.attention(*inputs(), **options)


@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
@pytest.mark.parametrize("most", [2**31, 2**61, 2**62, 2**70])
def test_documents_longer_than_there_can_be_are_refused(name: str, most: int) -> None:
    q = torch.randn(12, 2, 8)
    starts = torch.tensor([0, 5, 12])
    with pytest.raises(ValueError, match=f"^{name}: expected from 0 to 2147483647, got {most}"):
        attention(q, q, q, cu_seqlens=starts, **{name: most})
    options: dict[str, Any] = {"cu_seqlens_q": starts.int(), "cu_seqlens_k": starts.int()}
    options |= {"max_seqlen_q": 7, "max_seqlen_k": 7, name: most}
    with pytest.raises(ValueError, match=f"^{name}: "):
        ops.attention(*[q.transpose(0, 1).unsqueeze(0)] * 3, **options)


@pytest.mark.parametrize("softcap", [-1.0, 1e-40, 1e-300, 1e38, 1e300, math.inf, math.nan])
def test_softcap_without_an_inverse_is_refused(softcap: float) -> None:
    q, k, v = inputs(torch.float32)
    for call in (attention, ops.attention):
        with pytest.raises(ValueError, match=r"^softcap: "):
            call(q, k, v, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softcap_at_its_bounds(dtype: torch.dtype) -> None:
    """The smallest makes all scores alike, the largest leaves them as they are."""
    q, k, v = inputs(dtype)
    least = torch.finfo(dtype).tiny
    assert torch.equal(attention(q, k, v, softcap=least), attention(q, k, v, scale=0.0))
    # A power of two: nothing is rounded, and the scores divided by it are normal numbers yet.
    assert torch.equal(attention(q, k, v, softcap=least**-0.5), attention(q, k, v))


@pytest.mark.parametrize("name", ["keep", "drop"])
def test_masks_elsewhere_are_named_as_they_were_given(name: str) -> None:
    options: dict[str, Any] = {name: torch.ones(5, 7, dtype=torch.bool, device="meta")}
    with pytest.raises(ValueError, match=f"^{name}: expected on cpu as q, got meta"):
        attention(*inputs(), **options)


@pytest.mark.parametrize("name", ["bias", "sink", "alibi_slopes"])
def test_negated_options_of_weights_and_sums(name: str) -> None:
    q, k, _ = inputs(requires_grad=False)
    shape = {"bias": (1, 4, 5, 7), "sink": (4,), "alibi_slopes": (4,)}[name]
    value = torch.randn(shape, dtype=torch.float32 if name == "alibi_slopes" else q.dtype)
    given: list[dict[str, Any]] = [{name: value}, {name: torch._neg_view(-value)}]
    plain, negated = (Scores(0.5, **options) for options in given)
    out, lse = ops.attend(q, k, k, plain)
    for average in (False, True):
        expected = of_weights.weights(q, k, lse, plain, average)
        assert torch.equal(of_weights.weights(q, k, lse, negated, average), expected)
    assert torch.equal(of_weights.column_sums(q, k, lse, negated), of_weights.column_sums(q, k, lse, plain))
    assert torch.equal(ops.forward_op(q, k, k, *negated.pack())[0], out)
    grad = torch.randn(out.shape, dtype=out.dtype)
    needs = [True, True, True, name == "bias"]
    expected = ops.backward_op([grad, None], q, k, k, out, lse, *plain.pack(), needs)
    found = ops.backward_op([torch._neg_view(-grad), None], q, k, k, out, lse, *negated.pack(), needs)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
