"""Every weight of a persistent recurrence is multiplied once, and every sum reaches the unit that it is of.

One step of integers, or of their halves, is exact in whatever order its products are added up: a weight that is held
twice or nowhere, or a sum that goes elsewhere, is another result.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from seqkernels import testing
from seqkernels.backends.cuda import emulator
from seqkernels.cells import CELLS

from ..planned import PRODUCTS, plan_of

pytestmark = pytest.mark.skipif(not emulator.in_use(), reason="the emulator was not built, or there is a GPU")

SIZES = range(1, 71)
#: `rnn_tanh` runs the same text as `rnn_relu`, "bfloat16" that of "float16".
KINDS = ["rnn_relu", "lstm", "gru"]
OF_PRODUCTS = ["float16", "tf32x3", "exact"]
BATCH = 6
_NO_PARTS = (None,) * 9


@pytest.fixture(autouse=True)
def _one_thread():
    with testing.threads(1):
        yield


def _plans(cell, product, backward, hidden):
    whole = -(-hidden // 8) * 8
    for tier, units in [("block", whole), *itertools.product(("cluster", "grid"), (8, 24, 32, 40))]:
        # A cluster has several blocks; a grid may be one, here with units to spare.
        if tier == "block" or units < whole + (16 if tier == "grid" else 0):
            yield plan_of(tier, cell, product, backward, hidden, BATCH, units, 8)


def _exchange(plan):
    if not plan.flags:
        return None, None
    return torch.empty(plan.exchange_bytes, dtype=torch.uint8), torch.zeros(plan.flags, dtype=torch.int32)


def _integers(most, *shape):
    return torch.randint(-most, most + 1, shape).float()


def _forward(plan, cell, gates_x, weight, h, c):
    """The states after one step, and the gates that it kept."""
    _, states, saved = CELLS[cell]
    hidden = h.shape[1]
    carry = torch.stack((h, c)[:states])
    stored = torch.zeros(states, 2, BATCH, hidden, dtype=weight.dtype)
    reserve = torch.full((1, BATCH, saved, hidden), torch.nan) if saved else None
    emulator.module().recurrence_forward(
        plan, ((weight, carry, stored, None, _NO_PARTS, cell, False, 0, 1, 0, *_exchange(plan)), gates_x, reserve)
    )
    return carry, reserve


@pytest.mark.parametrize("product", OF_PRODUCTS)
@pytest.mark.parametrize("cell", KINDS)
def test_forward(cell, product):
    torch.manual_seed(0)
    gates = CELLS[cell].gates
    dtype = PRODUCTS[product][0]
    for hidden in SIZES:
        weight, h, c = (
            _integers(8, gates * hidden, hidden) / 64,
            _integers(4, BATCH, hidden),
            _integers(1, BATCH, hidden),
        )
        sums = h @ weight.t()
        # All sums of an RNN are above 0, where it changes nothing.
        gates_x = torch.full((1, BATCH, gates * hidden), 256.0 if gates == 1 else 0.0)
        for plan in _plans(cell, product, False, hidden):
            carry, reserve = _forward(plan, cell, gates_x, weight.to(dtype), h, c)
            if gates == 1:
                assert torch.equal(carry[0], 256 + sums), (hidden, plan.tier, plan.units)
                continue
            # Without weights, what they made comes with the input; but a GRU's last product goes its own way.
            there = sums.unsqueeze(0).clone()
            if cell == "gru":
                assert torch.equal(reserve[0, :, 3], sums[:, 2 * hidden :]), (hidden, plan.tier, plan.units)
                there[:, :, 2 * hidden :] = 0
            expected, kept = _forward(plan, cell, there, torch.zeros_like(weight, dtype=dtype), h, c)
            count = 2 if cell == "gru" else 4
            assert torch.equal(reserve[:, :, :count], kept[:, :, :count]), (hidden, plan.tier, plan.units)
            assert cell == "gru" or torch.equal(carry, expected), (hidden, plan.tier, plan.units)


@pytest.mark.parametrize("product", OF_PRODUCTS)
@pytest.mark.parametrize("cell", KINDS)
def test_backward(cell, product):
    torch.manual_seed(0)
    gates, states, saved = CELLS[cell]
    dtype = PRODUCTS[product][0]
    for hidden in SIZES:
        weight, grad = _integers(8, gates * hidden, hidden), _integers(2, states, BATCH, hidden)
        stored = torch.full((states, 2, BATCH, hidden), 1.0 if gates == 1 else 0.0, dtype=dtype)
        # Gates of 1/2, a candidate of 0.
        reserve = torch.full((1, BATCH, saved, hidden), 0.5) if saved else None
        if reserve is not None:
            reserve[:, :, 2] = 0
        of_gates = _integers(4, 1, BATCH, gates, hidden).to(dtype) if saved else None
        for plan in _plans(cell, product, True, hidden):
            carry = grad.clone()
            of_x, of_u = (torch.full((1, BATCH, gates * hidden), torch.nan, dtype=dtype) for _ in range(2))
            emulator.module().recurrence_backward(
                plan,
                (
                    (weight.to(dtype), carry, stored, None, _NO_PARTS, cell, False, 0, 1, 0, *_exchange(plan)),
                    (None, None, of_gates),
                    (None,) * 4,
                    reserve,
                    None,
                    None,
                    of_x,
                    of_u if cell == "gru" else None,
                    None,
                    (None,) * 3,
                ),
            )
            given = (of_u if cell == "gru" else of_x)[0].float()
            assert (given != 0).any()
            expected = given @ weight + (grad[0] / 2 if cell == "gru" else 0)
            assert torch.equal(carry[0], expected), (hidden, plan.tier, plan.units)
