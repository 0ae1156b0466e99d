"""Activation checkpointing: the forward pass once more gives the same bits, unless a policy keeps what the ops give."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import seqkernels

OPS = torch.ops.seqkernels
KEPT = (OPS.recurrence_forward.default, OPS.attention_forward.default)


class _Counting(TorchDispatchMode):
    """Calls of the ops that the policy names."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op in KEPT
        return op(*args, **(kwargs or {}))


def _policy(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


SELECTED = functools.partial(create_selective_checkpoint_contexts, _policy)


def _lstm():
    return seqkernels.nn.LSTM(4, 5, num_layers=2, dropout=0.5, recurrent_dropout=0.2, zoneout=0.1)


def _encoder():
    return seqkernels.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2)


# Of options that numba has not, in an installation without the compiled module.
@pytest.mark.filterwarnings("ignore:.*on the slow reference implementation")
@pytest.mark.parametrize(("make", "calls"), [(_lstm, 2), (_encoder, 1)])
def test_same_bits(make, calls):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(6, 3, 4, requires_grad=True)

    def output(x):
        found = layer(x)
        return found[0] if isinstance(found, tuple) else found

    def run(call):
        torch.manual_seed(1)
        found = call(x)
        return found, *torch.autograd.grad(found.square().sum(), [x, *layer.parameters()])

    whole = run(output)
    for more, times in (({}, 2), ({"context_fn": SELECTED}, 1)):
        again = functools.partial(checkpoint, output, use_reentrant=False, **more)
        counting = _Counting()
        with counting:
            counted = run(again)
        assert counting.count == times * calls
        # Without anybody looking on, kernels are called at once.
        for results in (counted, run(again)):
            assert all(map(torch.equal, results, whole))
