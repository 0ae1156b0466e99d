"""Layers under what ``torch.distributed`` wraps around them, against one process with everything."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import seqkernels

BATCH = 4


def _recurrent():
    return seqkernels.nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True)


def _encoder():
    return seqkernels.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)


def _output(layer, x):
    found = layer(x)
    return found[0] if isinstance(found, tuple) else found


def _half(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def _close(found, expected):
    """Sums over the batch in two parts, in float64."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if expected.numel():
        # Roundings of what is added, some hundred numbers around 1; a bias of keys has a gradient of nothing else.
        allowed = 256 * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
        assert (found - expected).abs().max() <= allowed


def _given(make, size):
    torch.manual_seed(0)
    return make().double(), torch.randn(BATCH, 5, size, dtype=torch.float64)


def _data_parallel():
    for make, size in ((_recurrent, 4), (_encoder, 8)):
        layer, x = _given(make, size)
        wrapped = DistributedDataParallel(copy.deepcopy(layer))
        _output(layer, x).square().mean().backward()
        _output(wrapped, _half(x)).square().mean().backward()
        for own, exact in zip(wrapped.module.parameters(), layer.parameters(), strict=True):
            _close(own.grad, exact.grad)


def _step(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= 0.1 * parameter.grad


def _fully_sharded():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for make, size in ((_recurrent, 4), (_encoder, 8)):
        layer, x = _given(make, size)
        sharded = copy.deepcopy(layer)
        fully_shard(sharded, mesh=mesh)
        with warnings.catch_warnings():
            # Of batch_first: the output is transposed, as torch's.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            for each, part in ((layer, x), (sharded, _half(x))):
                _output(each, part).square().mean().backward()
                _step(each)
            # The weights after the step are those that the next call reads.
            _close(_output(sharded, x), _output(layer, x))
        state = layer.state_dict()
        for name, parameter in sharded.state_dict().items():
            _close(parameter.full_tensor(), state[name])


class _Attention(nn.Module):
    """Attention whose projections are layers of their own; `heads` are those of this process."""

    def __init__(self, size, heads, kv_heads):
        super().__init__()
        self.head_size = size // heads
        self.q = nn.Linear(size, size)
        self.k, self.v = (nn.Linear(size, kv_heads * self.head_size) for _ in range(2))
        self.out = nn.Linear(size, size)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = seqkernels.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def _heads_parallel():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer, x = _given(lambda: _Attention(16, 4, 2), 16)
    split = parallelize_module(
        copy.deepcopy(layer),
        mesh,
        {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "out": RowwiseParallel()},
    )
    _close(split(x), layer(x))
    for each in (layer, split):
        each(x).square().mean().backward()
    for (name, own), exact in zip(split.named_parameters(), layer.parameters(), strict=True):
        assert own.to_local().numel() == exact.numel() // (1 if name == "out.bias" else 2)
        _close(own.grad.full_tensor(), exact.grad)
    _packed_heads_parallel(mesh)


def _packed_heads_parallel(mesh):
    """A `MultiheadAttention` taken apart."""
    packed, x = _given(lambda: seqkernels.nn.MultiheadAttention(16, 4, batch_first=True), 16)
    apart = _Attention(16, 4, 4).to(x.dtype)
    rows = zip(packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3), strict=True)
    for part, (weight, bias) in zip((apart.q, apart.k, apart.v), rows, strict=True):
        part.load_state_dict({"weight": weight, "bias": bias})
    apart.out.load_state_dict(packed.out_proj.state_dict())
    plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "out": RowwiseParallel()}
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    expected, _ = packed(x, x, x, attn_mask=later, need_weights=False)
    _close(parallelize_module(apart, mesh, plan)(x), expected)


@pytest.mark.parametrize("job", [_data_parallel, _fully_sharded, _heads_parallel], ids=lambda job: job.__name__[1:])
def test_two_processes(pair, job):
    pair.run(job)
