"""Autocast of CUDA devices where there is none: torch's own switch and layers over tensors that have no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree

import seqkernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_autocast_on_gpu.py has numbers too"),
]

#: How a layer is made, how often it takes its input, the dtypes of its results ("lower" is autocast's), and whether
#: torch's runs without memory.
CASES: dict[str, tuple[Callable[[Any], nn.Module], int, list[str], bool]] = {
    "LSTM": (lambda layers: layers.LSTM(4, 5, 2, bidirectional=True), 1, ["lower"] * 3, True),
    "LSTM, projected": (lambda layers: layers.LSTM(4, 5, proj_size=2), 1, ["lower"] * 3, True),
    "GRU": (lambda layers: layers.GRU(4, 5), 1, ["lower"] * 2, False),
    "RNN": (lambda layers: layers.RNN(4, 5), 1, ["lower"] * 2, True),
    "MultiheadAttention": (lambda layers: layers.MultiheadAttention(4, 2), 3, ["lower", "float32"], False),
    "TransformerEncoderLayer": (
        lambda layers: layers.TransformerEncoderLayer(4, 2, 8),
        1,
        ["float32"],
        False,
    ),
}


def _on_gpu(mode: FakeTensorMode, x: Tensor) -> Tensor:
    return FakeTensor(mode, torch.empty(x.shape, dtype=x.dtype, device="meta"), torch.device("cuda", 0))


def _dtypes(layers: Any, kind: str) -> list[torch.dtype]:
    make, count, _, _ = CASES[kind]
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer: Any = make(layers)
        for module in layer.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(_on_gpu(mode, weight), requires_grad=False))
        found = layer(*[_on_gpu(mode, torch.zeros(3, 2, 4))] * count)
    return [x.dtype for x in _pytree.tree_leaves(found) if isinstance(x, Tensor)]


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def lower(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    # ``torch.autocast`` itself would look for a device.
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", request.param)
    torch.set_autocast_enabled("cuda", True)
    yield request.param
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


@pytest.mark.parametrize("kind", CASES)
def test_dtypes(kind: str, lower: torch.dtype) -> None:
    *_, names, of_torch = CASES[kind]
    expected = [lower if name == "lower" else getattr(torch, name) for name in names]
    assert _dtypes(seqkernels.nn, kind) == expected
    if of_torch:
        assert _dtypes(nn, kind) == expected
