"""BilinearAttention: the formula, masks, gradients, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seqkernels.functional import scaled_dot_product_attention
from seqkernels.nn import BilinearAttention
from seqkernels.testing import assert_within_budget

from ..twins import applies, judge

ATTENTIONS = [scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention]


def layer(attention: Callable[..., Tensor] | None = None, dtype: torch.dtype = torch.float32) -> BilinearAttention:
    torch.manual_seed(0)
    return BilinearAttention(6, 10, attention).to(dtype)


def draw(*batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y, h = torch.randn(*batch, 5, 6, generator=generator), torch.randn(*batch, 7, 10, generator=generator)
    mask = torch.rand(*batch, 5, 7, generator=generator) < 0.7
    mask[..., 0] = True
    return y, h, mask


def formula(weight: Tensor, y: Tensor, h: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("...my,yh,...nh->...mn", y, weight, h)
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ h


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_formula_and_gradients(attention: Callable[..., Tensor], batch: tuple[int, ...], masked: bool) -> None:
    y, h, mask = draw(*batch)
    grad = torch.randn(*batch, 5, 10, generator=torch.Generator().manual_seed(2))

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (layer().weight, y, h)]
        out = function(*inputs, mask if masked else None)
        return out, *torch.autograd.grad(out, inputs, grad.to(dtype))

    def ours(weight: Tensor, *args: Tensor | None) -> Tensor:
        return torch.func.functional_call(layer(attention), {"weight": weight}, args)

    oracle, baseline = run(formula, torch.float64), run(formula, torch.float32)
    for name, *values in zip(("out", "weight", "y", "h"), run(ours, torch.float32), oracle, baseline, strict=True):
        assert_within_budget(*values, name)


def test_weights_are_the_alignment() -> None:
    y, h, mask = draw(2)
    for dtype in (torch.float32, torch.float64):
        module, queries, keys = layer(dtype=dtype), y.to(dtype), h.to(dtype)
        for keep in (mask, None):
            alignment = module.weights(queries, keys, keep)
            assert keep is None or not alignment[~keep].any()
            for found in (alignment @ keys, module(queries, keys, keep)):
                judge(found, applies(formula, module.weight, y, h, keep))


def test_nan_behind_the_mask_has_no_influence() -> None:
    y, h, mask = draw(2)
    mask = mask[:, :1].clone()
    mask[:, :, 3] = False
    clean = layer()(y, h, mask)
    h[:, 3] = torch.nan
    assert torch.equal(layer()(y, h, mask), clean)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("y", lambda y, h, mask: (y[..., :5], h, mask), ValueError),
        ("h", lambda y, h, mask: (y, h[..., :5], mask), ValueError),
        ("h", lambda y, h, mask: (y, h[:1], mask), ValueError),
        ("mask", lambda y, h, mask: (y, h, mask.float()), TypeError),
        ("mask", lambda y, h, mask: (y, h, mask[..., :3]), ValueError),
        ("mask", lambda y, h, mask: (y, h, mask[0]), ValueError),
    ],
)
def test_bad_input_is_named(name: str, change: Callable[..., tuple[Tensor, ...]], error: type[Exception]) -> None:
    inputs = change(*draw(2))
    for function in (layer(), layer().weights):
        with pytest.raises(error, match=f"^{name}: expected"):
            function(*inputs)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"h_dim: .* got 0"):
        BilinearAttention(3, 0)


def test_repr() -> None:
    assert repr(layer()) == "BilinearAttention(y_dim=6, h_dim=10)"
