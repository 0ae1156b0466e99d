"""Dropout of ``scaled_dot_product_attention``: a function of a seed, the same everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import seqkernels
from seqkernels.backends.reference.attention import dropped
from seqkernels.functional import scaled_dot_product_attention
from seqkernels.testing import cast

from .test_functional_attention import SHAPES, Shapes, able, assert_together_within_budget, draw, run


def drawn_seed() -> Tensor:
    """What a call draws from torch's generator."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64)


def torch_dropping(seed: int, dropout_p: float) -> Any:
    """Attention in torch's dense operations with the dropout of the contract, which counts heads and rows alone."""

    def fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        enable_gqa: bool = False,
        dropout_p: float = dropout_p,
    ) -> Tensor:
        if enable_gqa:
            group = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool)
        keep = keep.tril() if is_causal else keep
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            keep = keep & attn_mask
        elif attn_mask is not None:
            scores = scores + attn_mask
        scores = torch.where(keep, scores, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).masked_fill(~keep.any(-1, keepdim=True), 0)
        torch.manual_seed(seed)
        drop = dropped(drawn_seed(), (1, scores[..., 0, 0].numel(), *scores.shape[-2:]), dropout_p)
        return torch.where(drop.view(scores.shape), 0, weights / (1 - dropout_p)) @ value

    return fn


@pytest.mark.parametrize("masked", ["none", "bool", "float"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shapes", [SHAPES[0], SHAPES[2], SHAPES[8], SHAPES[13], SHAPES[20], SHAPES[-1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", able("dropout"))
def test_dropout_is_a_function_of_its_seed(
    name: str, dtype: torch.dtype, shapes: Shapes, is_causal: bool, masked: str
) -> None:
    inputs = draw(shapes, masked, dtype)

    def of(fn: Any, to: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(7)
        copies = {name: cast(x, to) for name, x in inputs.items()}
        with seqkernels.use_backend(name):
            return run(fn, copies, is_causal=is_causal, dropout_p=0.4, enable_gqa=shapes.gqa)

    lower = torch.float32 if dtype == torch.float64 else dtype
    dense = torch_dropping(7, 0.4)
    exact, own = of(dense, torch.float64), of(dense, lower)
    assert_together_within_budget(of(scaled_dot_product_attention, dtype), exact, [own])


@pytest.mark.parametrize("name", able("dropout"))
def test_dropout_drops_as_often_as_asked(name: str) -> None:
    equal = torch.ones(2, 3, 50, 8), torch.zeros(2, 3, 80, 8), torch.ones(2, 3, 80, 1)
    with seqkernels.use_backend(name):
        for dropout_p in (0.1, 0.5, 0.9):
            torch.manual_seed(0)
            # Equal scores: each row of the output is the share of 80 weights that are left.
            shares = [scaled_dot_product_attention(*equal, None, dropout_p) for _ in range(2)]
            assert not shares[0].equal(shares[1])
            kept = torch.stack(shares) * (1 - dropout_p)
            deviation = (dropout_p * (1 - dropout_p) / (80 * kept.numel())) ** 0.5
            assert abs(kept.mean() - (1 - dropout_p)) < 5 * deviation
            # Rows and heads do not drop alike: the variance is that of 80 independent draws.
            assert 0.8 < kept.var() / (dropout_p * (1 - dropout_p) / 80) < 1.25
            torch.manual_seed(0)
            assert scaled_dot_product_attention(*equal, None, dropout_p).equal(shares[0])


@pytest.mark.parametrize("name", able("dropout"))
def test_dropout_is_the_same_when_recomputed(name: str) -> None:
    inputs = draw(SHAPES[6], "none", torch.float64)

    def fn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, dropout_p=0.5)

    def checkpointed(**leaves: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(fn, *leaves.values(), use_reentrant=False)

    with seqkernels.use_backend(name):
        torch.manual_seed(2)
        expected = run(fn, inputs)
        torch.manual_seed(2)
        for key, x in run(checkpointed, inputs).items():
            assert x.equal(expected[key]), key


@pytest.mark.parametrize("name", able("dropout"))
def test_dropout_of_everything_is_zero(name: str) -> None:
    with seqkernels.use_backend(name):
        for x in run(scaled_dot_product_attention, draw(SHAPES[6], "float", torch.float32), dropout_p=1.0).values():
            assert not x.any()
