"""What ``warmup`` promises on a GPU: nothing is compiled after it, and graphs can be captured."""

from __future__ import annotations

import pytest
import torch

import seqkernels
from seqkernels.backends.triton import recurrence_sequence_kernels as kernels

SHAPE = (7, 3, 32)


def _layer(**options):
    return seqkernels.nn.LSTM(32, 48, **options).to("cuda", torch.bfloat16)


def _count():
    both = (kernels.sequence_forward_kernel, kernels.sequence_backward_kernel)
    return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in both]


def test_nothing_is_compiled_after_it():
    layer = _layer()
    (call,) = seqkernels.warmup(layer, [SHAPE], backward=True).calls
    assert [entry.chosen for entry in call.explanation.entries] == ["triton", "triton"]
    before = _count()
    layer(torch.randn(20, 5, 32, device="cuda", dtype=torch.bfloat16))[0].sum().backward()
    assert _count() == before


def test_generators_of_the_device_are_left_alone():
    layer = _layer(num_layers=2, dropout=0.5)
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    seqkernels.warmup(layer, [SHAPE])
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_inside_a_capture():
    layer = _layer()
    x = torch.zeros(2, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x += 1
        with pytest.raises(RuntimeError, match="warmup: a CUDA graph is being captured"):
            seqkernels.warmup(layer, [SHAPE])
