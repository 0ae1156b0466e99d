"""Attention on a GPU as a user calls it: streams, graphs, compiled code, and how often kernels are compiled."""

from __future__ import annotations

import pytest
import torch

import seqkernels
from seqkernels.backends.triton import attention_kernels
from seqkernels.functional import scaled_dot_product_attention as attend

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _inputs(batch=2, heads=4, queries=70, keys=90, size=64, kv_heads=2, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, size))
    return [torch.randn(s, generator=generator).to("cuda", dtype).requires_grad_() for s in shapes]


def _gradients(q, k, v, **options):
    out = attend(q, k, v, enable_gqa=True, **options)
    return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
def test_as_on_the_cpu(dtype, size):
    inputs = _inputs(dtype=dtype, size=size)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    own = _gradients(*(x.detach().cpu().requires_grad_() for x in inputs), is_causal=True)
    for found, expected, theirs in zip(
        _gradients(*inputs, is_causal=True), _gradients(*exact, is_causal=True), own, strict=True
    ):
        assert found.device.type == "cuda"
        allowed = 3 * (theirs.double() - expected).norm() + torch.finfo(dtype).eps * expected.norm()
        assert (found.cpu().double() - expected).norm() <= allowed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [64, 80, 128])
def test_long_keys_as_on_the_cpu(size, causal):
    """On Hopper their tiles come by descriptors."""
    inputs = _inputs(batch=1, queries=300, keys=1500, size=size)
    own, exact = ([x.detach().cpu().to(dtype) for x in inputs] for dtype in (torch.bfloat16, torch.float64))
    with torch.no_grad():
        found, theirs, expected = (attend(*x, is_causal=causal, enable_gqa=True) for x in (inputs, own, exact))
    allowed = 3 * (theirs.double() - expected).norm() + torch.finfo(torch.bfloat16).eps * expected.norm()
    assert (found.cpu().double() - expected).norm() <= allowed


def test_runs_are_reproducible():
    inputs = _inputs()
    first, *others = (_gradients(*inputs, is_causal=True) for _ in range(3))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_the_current_stream():
    inputs = _inputs()
    expected = _gradients(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = _gradients(*inputs)
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("queries", [1, 70])
def test_in_a_cuda_graph(queries):
    q, k, v = _inputs(queries=queries)
    for _ in range(3):
        _gradients(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _gradients(q, k, v)
    with torch.no_grad():
        for x, other in zip((q, k, v), _inputs(queries=queries, seed=1), strict=True):
            x.copy_(other)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, _gradients(q, k, v), strict=True))


def test_compiled():
    inputs = _inputs()
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, is_causal=True, enable_gqa=True), fullgraph=True)
    assert torch.equal(compiled(*inputs), attend(*inputs, is_causal=True, enable_gqa=True))


def test_lengths_do_not_compile_again():
    """Twenty shapes of one head size and dtype take the programs that the first ones compiled."""

    def count():
        caches = attention_kernels.forward_kernel.device_caches[torch.cuda.current_device()]
        return len(caches[0])

    def call(batch, heads, length):
        q = torch.randn(batch, heads, length, 64, device="cuda", dtype=torch.float16)
        attend(q, q, q, is_causal=True)

    # Long ones, few ones, and those whose keys are split.
    for batch, heads, length in ((2, 3, 100), (2, 3, 7), (1, 4, 400)):
        call(batch, heads, length)
    before = count()
    for index in range(20):
        call(1 + index % 5, 1 + index % 7, 33 + 31 * index)
    assert count() == before


def test_which_backend():
    inputs = _inputs()
    text = str(seqkernels.explain(attend, *inputs, enable_gqa=True))
    assert "triton" in text


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("queries", [1, 70])
def test_precision_whatever_torch_allows(queries, tf32, monkeypatch):
    """Errors of float32, of ten bits of mantissa, and nearly of float32 again, with the same bits under any flag."""
    inputs = _inputs(queries=queries, size=128, dtype=torch.float32)
    inputs[0] = (inputs[0] * 4).detach().requires_grad_()
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]

    def gradients(tensors, **options):
        out = seqkernels.functional.attention(*tensors, **options)
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    expected = gradients(exact)
    found = {name: gradients(inputs, precision=name) for name in ("ieee", "tf32", "tf32x3")}
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if tf32 else "ieee")
    for name, results in found.items():
        assert all(map(torch.equal, results, gradients(inputs, precision=name)))
    for k, right in enumerate(expected):
        errors = {name: float((results[k].cpu() - right).norm() / right.norm()) for name, results in found.items()}
        assert 1e-4 < errors["tf32"] < 1e-2, errors
        assert errors["ieee"] < 1e-5, errors
        assert errors["tf32x3"] < 1e-5, errors
