"""Recurrent layers on a GPU as a user calls them: results of the CPU, graphs, streams, compiled code."""

from __future__ import annotations

import copy

import pytest
import torch

import seqkernels
from seqkernels.backends.triton import recurrence_sequence_kernels

LAYERS = ["RNN", "LSTM", "GRU"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(3, 40), (17, 64), (5, 128), (40, 256), (9, 520), (200, 1024), (2, 1100)]


def _layer(name, inputs, hidden, dtype, **options):
    torch.manual_seed(hidden)
    return getattr(seqkernels.nn, name)(inputs, hidden, **options).to("cuda", dtype)


def _gradients(layer, x, **options):
    out, _ = layer(x, **options)
    return out, *torch.autograd.grad(out.float().square().sum(), (x, *layer.parameters()))


def _input(steps, batch, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, batch, size, generator=generator).to("cuda", dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "hidden"), SIZES)
@pytest.mark.parametrize("name", LAYERS)
def test_as_on_the_cpu(name, batch, hidden, dtype):
    """One program, several that meet, several launches of them, and the way step by step."""
    layer, x = _layer(name, 24, hidden, dtype), _input(12, batch, 24, dtype)
    own = copy.deepcopy(layer).cpu()
    exact = copy.deepcopy(own).double()
    rows = [x.detach().cpu().to(to).requires_grad_() for to in (dtype, torch.float64)]
    for found, theirs, expected in zip(
        _gradients(layer, x), _gradients(own, rows[0]), _gradients(exact, rows[1]), strict=True
    ):
        assert found.device.type == "cuda"
        allowed = 3 * (theirs.double() - expected).norm() + torch.finfo(dtype).eps * expected.norm()
        assert (found.detach().cpu().double() - expected).norm() <= allowed


@pytest.mark.parametrize("name", LAYERS)
def test_runs_are_reproducible(name):
    layer, x = _layer(name, 32, 512, torch.bfloat16), _input(40, 33, 32, torch.bfloat16)
    first, *others = (_gradients(layer, x) for _ in range(5))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("hidden", [64, 256])
def test_in_a_cuda_graph(name, hidden):
    layer, x = _layer(name, 32, hidden, torch.bfloat16), _input(20, 16, 32, torch.bfloat16)
    for _ in range(3):
        _gradients(layer, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _gradients(layer, x)
    with torch.no_grad():
        x.copy_(_input(20, 16, 32, torch.bfloat16, seed=1))
    for _ in range(2):
        graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, _gradients(layer, x), strict=True))


def test_two_streams_at_once():
    """Programs that meet do not wait for those of another launch."""
    layer, x = _layer("LSTM", 32, 1024, torch.bfloat16), _input(60, 16, 32, torch.bfloat16)
    expected = _gradients(layer, x)
    found = []
    streams = [torch.cuda.Stream() for _ in range(3)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.append(_gradients(layer, x))
    torch.cuda.synchronize()
    for other in found:
        assert all(torch.equal(x, y) for x, y in zip(expected, other, strict=True))


def test_lengths_and_resets():
    layer, x = _layer("LSTM", 32, 128, torch.float32), _input(20, 6, 32, torch.float32)
    own = copy.deepcopy(layer).cpu()
    lengths = torch.tensor([20, 3, 0, 7, 20, 1])
    out, (h_n, _) = layer(x, lengths=lengths.cuda())
    theirs, (h_own, _) = own(x.detach().cpu(), lengths=lengths)
    torch.testing.assert_close(out.cpu(), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(h_n.cpu(), h_own, rtol=1e-5, atol=1e-6)


def test_lengths_do_not_compile_again():
    kernel = recurrence_sequence_kernels.sequence_forward_kernel

    def count():
        return len(kernel.device_caches[torch.cuda.current_device()][0])

    layer = _layer("GRU", 32, 128, torch.float16)
    with torch.no_grad():
        for steps, batch in ((10, 16), (7, 3), (1, 1)):
            layer(_input(steps, batch, 32, torch.float16))
        before = count()
        for index in range(20):
            layer(_input(2 + 5 * index, 1 + 3 * index, 32, torch.float16))
    assert count() == before


@pytest.mark.parametrize("name", LAYERS)
def test_compiled(name):
    layer, x = _layer(name, 32, 128, torch.bfloat16), _input(12, 8, 32, torch.bfloat16)
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True)
    assert torch.equal(compiled(x), layer(x)[0])


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("hidden", [40, 256, 1100])
@pytest.mark.parametrize("name", LAYERS)
def test_precision_whatever_torch_allows(name, hidden, tf32, monkeypatch):
    """Errors of float32, of ten bits of mantissa, and nearly of float32 again, with the same bits under any flag."""
    x = _input(12, 9, 64, torch.float32)
    layers = {how: _layer(name, 64, hidden, torch.float32, precision=how) for how in ("ieee", "tf32", "tf32x3")}
    expected = _gradients(copy.deepcopy(layers["ieee"]).cpu().double(), x.detach().cpu().double().requires_grad_())
    found = {how: _gradients(layer, x) for how, layer in layers.items()}
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if tf32 else "ieee")
    for how, results in found.items():
        assert all(map(torch.equal, results, _gradients(layers[how], x)))
    for k, right in enumerate(expected):
        errors = {how: float((results[k].cpu() - right).norm() / right.norm()) for how, results in found.items()}
        assert 2e-5 < errors["tf32"] < 1e-2, errors
        assert errors["ieee"] < 1e-5, errors
        assert errors["tf32x3"] < 1e-5, errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "hidden"), [(1, 32), (40, 256), (3, 1024), (2, 1100)])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_as_on_the_cpu(name, batch, hidden, dtype):
    cell, x = _layer(name, 24, hidden, dtype), _input(1, batch, 24, dtype)[0].detach().requires_grad_()
    own = copy.deepcopy(cell).cpu()
    exact = copy.deepcopy(own).double()

    def gradients(cell, x):
        state = cell(x)
        h = state[0] if isinstance(state, tuple) else state
        return h, *torch.autograd.grad(h.float().square().sum(), (x, *cell.parameters()))

    rows = [x.detach().cpu().to(to).requires_grad_() for to in (dtype, torch.float64)]
    for found, theirs, expected in zip(
        gradients(cell, x), gradients(own, rows[0]), gradients(exact, rows[1]), strict=True
    ):
        assert found.device.type == "cuda"
        allowed = 3 * (theirs.double() - expected).norm() + torch.finfo(dtype).eps * expected.norm()
        assert (found.detach().cpu().double() - expected).norm() <= allowed
