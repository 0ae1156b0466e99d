"""The error of the kernels' exp, sigmoid and tanh, in units of the last place of the exact result."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from seqkernels import testing
from seqkernels.backends.native.extension import extension, load_error

pytestmark = pytest.mark.skipif(load_error() is not None, reason=str(load_error()))

#: Largest error allowed, in ulp.
LIMIT = {"exp": 1.1, "sigmoid": 2.0, "tanh": 2.0}
EXACT = {"exp": torch.exp, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
#: Arguments whose results are normal float32 numbers.
RANGE = {"exp": (-87.0, 88.0), "sigmoid": (-87.0, 30.0), "tanh": (-20.0, 20.0)}


def run(name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    extension().activation(name, x, y)
    return y


def ulps(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error of float32 `y` against float64 `exact`."""
    _, exponent = torch.frexp(exact.abs())
    return ((y.double() - exact).abs() / torch.exp2(exponent.double() - 24)).max().item()


@pytest.fixture(params=extension().isas() if load_error() is None else [])
def isa(request: pytest.FixtureRequest):
    with testing.force_isa(request.param):
        yield request.param


@pytest.mark.parametrize("name", LIMIT)
def test_float32(name: str, isa: str) -> None:
    low, high = RANGE[name]
    dense = torch.linspace(low, high, 1_000_003)
    small = torch.logspace(-30, 0, 300_001, base=10.0)
    x = torch.cat((dense, small[small < high], -small[-small > low]))
    assert ulps(run(name, x), EXACT[name](x.double())) <= LIMIT[name]


@pytest.mark.parametrize("name", LIMIT)
def test_float64(name: str, isa: str) -> None:
    low, high = RANGE[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(2_000, dtype=torch.float64).uniform_(low, high, generator=generator)
    x[::2] *= torch.logspace(-12, 0, 1_000, dtype=torch.float64)
    exact = {"exp": mpmath.exp, "tanh": mpmath.tanh, "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v))}[name]
    with mpmath.workdps(40):
        for value, got in zip(x.tolist(), run(name, x).tolist(), strict=True):
            want = exact(mpmath.mpf(value))
            assert abs(got - want) <= LIMIT[name] * math.ulp(float(want)), (value, got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(dtype: torch.dtype, isa: str) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e4, -1e4, 1e-320, -1e-40], dtype=dtype)
    assert run("exp", x).tolist()[:4] == [1, 1, math.inf, 0]
    assert run("exp", x).tolist()[5:7] == [math.inf, 0]
    assert run("tanh", x).tolist()[:4] == [0, 0, 1, -1]
    assert math.copysign(1, run("tanh", x)[1].item()) == -1
    assert run("tanh", x).tolist()[5:7] == [1, -1]
    sigmoid = run("sigmoid", x)
    assert sigmoid.tolist()[:3] == [0.5, 0.5, 1]
    assert 0 <= sigmoid[3].item() < torch.finfo(dtype).tiny * 4
    for name in LIMIT:
        assert run(name, x).isnan().tolist() == x.isnan().tolist()


def test_every_tail(isa: str) -> None:
    x = torch.randn(37)
    for count in range(1, 37):
        assert torch.equal(run("tanh", x[:count]), run("tanh", x)[:count])
