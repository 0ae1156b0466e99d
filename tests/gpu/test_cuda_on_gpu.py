"""The compiled module of CUDA kernels on a GPU: devices, streams and graphs are its callers'."""

from __future__ import annotations

import pytest
import torch

import seqkernels
from seqkernels.backends.cuda.extension import device_error, extension, load_error

pytestmark = pytest.mark.skipif(load_error() is not None, reason=str(load_error()))
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")


def test_it_has_a_device():
    assert device_error() is None


def _layer(device="cuda"):
    torch.manual_seed(0)
    return seqkernels.nn.LSTM(8, 24).to(device, torch.bfloat16).requires_grad_(False)


def _call(layer, x):
    with seqkernels.use_backend("cuda"):
        return layer(x)[0]


def _expected(layer, x):
    with seqkernels.use_backend("reference"):
        return layer(x)[0]


def _close(found, expected):
    return bool(((found.float() - expected.float()).norm() <= 0.02 * expected.float().norm()).item())


@pytest.mark.parametrize("batch", [1, 9, 300])
def test_it_writes_what_it_should(batch):
    layer, x = _layer(), torch.randn(5, batch, 8, device="cuda", dtype=torch.bfloat16)
    assert _close(_call(layer, x), _expected(layer, x))


def test_the_stream_is_the_callers():
    layer, stream = _layer(), torch.cuda.Stream()
    x, later = (
        torch.zeros(6, 4, 8, device="cuda", dtype=torch.bfloat16),
        torch.randn(6, 4, 8).to("cuda", torch.bfloat16),
    )
    _call(layer, x)
    assert extension().work(x) == (0, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        assert extension().work(x) == (0, stream.cuda_stream)
        torch.cuda._sleep(10**8)
        x.copy_(later)
        found = _call(layer, x)
    stream.synchronize()
    assert _close(found, _expected(layer, later))


def test_in_a_graph():
    layer, x = _layer(), torch.zeros(6, 4, 8, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        _call(layer, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _call(layer, x)
    x.normal_()
    graph.replay()
    assert _close(found, _expected(layer, x))


@two_devices
def test_the_device_is_that_of_the_tensors():
    layer, x = _layer("cuda:1"), torch.randn(6, 4, 8).to("cuda:1", torch.bfloat16)
    assert extension().work(x)[0] == 1
    assert _close(_call(layer, x), _expected(layer, x))
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="second: expected a tensor on cuda:0, as first, got one on cuda:1"):
        extension().work(torch.zeros(8, device="cuda:0"), x)
