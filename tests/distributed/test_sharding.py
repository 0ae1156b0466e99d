"""Tensors split among processes go through the ops, and give what whole tensors do."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

import seqkernels
from seqkernels.cells import RESET, Weights
from seqkernels.distributed import register_sharding
from seqkernels.functional import attention
from seqkernels.ops.attention import attend
from seqkernels.ops.recurrence import recurrence
from seqkernels.ops.together import recurrences
from seqkernels.ops.weights import weights
from seqkernels.scores import Scores

REPLICATED = (Replicate(),)


def _mesh():
    register_sharding()
    register_sharding()
    torch.manual_seed(0)
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def _split(x, mesh, *placements):
    return distribute_tensor(x.detach(), mesh, placements).requires_grad_(x.requires_grad)


def _same(found, expected):
    """Elements that are not split are the same to the last bits; sums over the processes are in another order."""
    assert isinstance(found, DTensor)
    found = found.full_tensor()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if expected.numel():
        # Roundings of what is added, some hundred numbers around 1; a bias of keys has a gradient of nothing else.
        allowed = 256 * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
        assert (found - expected).abs().max() <= allowed


def _layers():
    mesh = _mesh()
    for kind, options in (
        ("LSTM", {}),
        ("GRU", {"num_layers": 2, "bidirectional": True}),
        ("LSTM", {"layer_norm": True, "peephole": True}),
        ("RNN", {"bias": False}),
        ("LSTM", {"proj_size": 2}),
        ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    ):
        layer = getattr(seqkernels.nn, kind)(4, 5, batch_first=True, dtype=torch.float64, **options)
        # A batch that the processes do not divide; norms go through operations of torch, which refuse it.
        x = _random(4 if options.keys() & {"layer_norm", "proj_size"} else 3, 6, 4).requires_grad_()
        output, final = layer(x)
        grad = _random(*output.shape)
        expected = torch.autograd.grad(output, [x, *layer.parameters()], grad)
        split = _split(x, mesh, Shard(0))
        spread = distribute_module(layer, mesh)
        found, last = spread(split)
        assert found.placements == (Shard(0),)
        _same(found, output)
        for state, exact in zip(*([s] if kind != "LSTM" else s for s in (last, final)), strict=True):
            _same(state, exact)
        # In the layout of torch's own losses, steps first in memory.
        grad_found = _split(grad, mesh, Shard(0)).transpose(0, 1).contiguous().transpose(0, 1)
        grads = torch.autograd.grad(found, [split, *spread.parameters()], grad_found)
        assert [x.placements for x in grads] == [(Shard(0),), *[(Partial(),)] * (len(grads) - 1)]
        for one, exact in zip(grads, expected, strict=True):
            _same(one, exact)


def _parts_of_results():
    """A gradient of one final state alone, and cells, whose batch the processes do not divide."""
    mesh = _mesh()
    x, final = _random(6, 3, 4), _random(3, 4)
    for layer, given, part in (
        (seqkernels.nn.LSTM(4, 5, dtype=torch.float64), x, lambda found: found[1][1]),
        (seqkernels.nn.LSTM(4, 5, 2, bidirectional=True, dtype=torch.float64), x, lambda found: found[1][0]),
        (seqkernels.nn.LSTMCell(4, 5, dtype=torch.float64), final, lambda found: found[1]),
        (seqkernels.nn.GRUCell(4, 5, dtype=torch.float64), final, lambda found: found),
    ):
        whole = part(layer(given))
        expected = torch.autograd.grad(whole.square().sum(), list(layer.parameters()))
        spread = distribute_module(layer, mesh)
        found = part(spread(_split(given, mesh, Shard(given.dim() - 2))))
        _same(found, whole)
        grads = torch.autograd.grad(found.square().sum(), list(spread.parameters()))
        for one, exact in zip(grads, expected, strict=True):
            _same(one, exact)


def _checkpoints_and_several():
    """What layers reach on a GPU, or with options, alone."""
    mesh = _mesh()
    x, states = _random(4, 2, 3).requires_grad_(), [_random(2, 2, 5).requires_grad_() for _ in range(2)]
    plain = [Weights(_random(20, 3 if k == 0 else 5), _random(20, 5), None, _random(20)) for k in range(2)]
    masks = [None, _random(4, 2, 5)]
    named = {"cell": "lstm", "reverse": [False, False], "chained": True}

    def outputs(x, states, params, masks):
        found = recurrences(x, params, states, [None, None], masks, **named)
        first = params[0]
        # Which rows begin anew is a plain tensor.
        control = torch.tensor([[0, 0], [RESET, 0], [0, 0], [0, RESET]], dtype=torch.uint8)
        hidden, _, _ = recurrence(
            x, first.weight_hh, None, states[0], control, cell="lstm", weight_ih=first.weight_ih, every=2
        )
        return found[1][0], found[0][2], hidden

    for weight in plain:
        for tensor in weight:
            if tensor is not None:
                tensor.requires_grad_()
    whole = outputs(x, states, plain, masks)
    inputs = [x, *states, *(y for own in plain for y in own if y is not None)]
    expected = torch.autograd.grad(whole, inputs, [torch.ones_like(y) for y in whole])
    params = [Weights(*(None if y is None else _split(y, mesh, Replicate()) for y in own)) for own in plain]
    split = [_split(y, mesh, Shard(1)) for y in (x, *states)]
    found = outputs(split[0], split[1:], params, [None, _split(masks[1], mesh, Shard(1))])
    for one, exact in zip(found, whole, strict=True):
        _same(one, exact)
    every = [*split, *(y for own in params for y in own if y is not None)]
    for one, exact in zip(torch.autograd.grad([y.sum() for y in found], every), expected, strict=True):
        _same(one, exact)


_EXTRAS = (
    {"is_causal": True, "bias": (2, 1, 1, 6), "sink": (4,)},
    {"bias": (1, 4, 6, 6), "alibi_slopes": (2, 4)},
)


def _attention():
    mesh = _mesh()
    inputs = [_random(2, heads, 6, 4).requires_grad_() for heads in (4, 2, 2)]
    # Placements of q, k and v, and of what comes out; along the sequence nothing is split.
    for before, after in ((Shard(0), Shard(0)), (Shard(1), Shard(1)), (Shard(2), Replicate())):
        for extra in _EXTRAS:
            given = {key: _random(*x) if isinstance(x, tuple) else x for key, x in extra.items()}
            leaves = [x.requires_grad_() for key, x in given.items() if key in ("bias", "sink")]
            whole = attention(*inputs, return_lse=True, **given)
            grads = [_random(*x.shape) for x in whole]
            expected = torch.autograd.grad(whole, inputs + leaves, grads)
            split = [_split(x, mesh, before) for x in inputs]
            given = {
                key: _split(x, mesh, Replicate()) if isinstance(x, torch.Tensor) else x for key, x in given.items()
            }
            found = attention(*split, return_lse=True, **given)
            assert found[0].placements == found[1].placements == (after,)
            split += [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
            results = torch.autograd.grad(found, split, [_split(x, mesh, Replicate()) for x in grads])
            for one, exact in zip((*found, *results), (*whole, *expected), strict=True):
                _same(one, exact)


def _weights():
    """The weights of attention, of heads and averaged, with their gradients, and rotary embeddings before them."""
    mesh = _mesh()
    rotary = seqkernels.nn.RotaryEmbedding(4).double()
    inputs = [*(_random(2, heads, 6, 4).requires_grad_() for heads in (4, 2)), _random(1, 1, 6, 6).requires_grad_()]

    def outputs(q, k, bias):
        q, k = rotary(q, k)
        scores = Scores(0.5, bias=bias)
        _, lse = attend(q, k, k, scores)
        return [weights(q, k, lse, scores, average) for average in (False, True)]

    whole = outputs(*inputs)
    grads = [_random(*x.shape) for x in whole]
    expected = torch.autograd.grad(whole, inputs, grads)
    for placement in (Shard(0), Shard(1)):
        split = [*(_split(x, mesh, placement) for x in inputs[:2]), _split(inputs[2], mesh, Replicate())]
        with implicit_replication():
            found = outputs(*split)
            results = torch.autograd.grad(found, split, [_split(x, mesh, Replicate()) for x in grads])
        assert found[0].placements == (placement,)
        for one, exact in zip((*found, *results), (*whole, *expected), strict=True):
            _same(one, exact)


def _not_split():
    mesh = _mesh()
    q = _random(2, 3, 4, 4)
    # Three heads on two processes; and dropout, which is drawn by the place in the whole.
    assert attention(*(_split(q, mesh, Shard(1)),) * 3).placements == REPLICATED
    dropped = attention(*(_split(q, mesh, Shard(0)),) * 3, dropout_p=0.5, training=True, seed=1)
    assert dropped.placements == REPLICATED
    _same(dropped, attention(q, q, q, dropout_p=0.5, training=True, seed=1))
    with pytest.raises(TypeError, match=r"expected DTensors alone.* got a plain Tensor \(2, 3, 4, 4\)"):
        attention(_split(q, mesh, Shard(0)), q, q)


def _two_dimensions():
    """Batch and heads at once, on a mesh of two by two."""
    register_sharding()
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2))
    inputs = [_random(2, heads, 6, 4).requires_grad_() for heads in (4, 2, 2)]
    bias = _random(1, 1, 6, 6).requires_grad_()
    whole = attention(*inputs, bias=bias)
    split = [*(_split(x, mesh, Shard(0), Shard(1)) for x in inputs), _split(bias, mesh, Replicate(), Replicate())]
    found = attention(*split[:3], bias=split[3])
    assert found.placements == (Shard(0), Shard(1))
    _same(found, whole)
    expected = torch.autograd.grad(whole.sum(), [*inputs, bias])
    for one, exact in zip(torch.autograd.grad(found.sum(), split), expected, strict=True):
        _same(one, exact)


JOBS = [_layers, _parts_of_results, _checkpoints_and_several, _attention, _weights, _not_split]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__[1:])
def test_two_processes(pair, job):
    pair.run(job)


def test_mesh_of_two_dimensions(four):
    four.run(_two_dimensions)
