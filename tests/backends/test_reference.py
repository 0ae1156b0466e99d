"""The reference against torch in float64: everything else is judged by it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from seqkernels import testing
from seqkernels.backends import reference
from seqkernels.backends.reference.recurrence import recurrence_forward
from seqkernels.cells import CELLS, HOLD, accumulate_dtype
from seqkernels.testing.baselines import ATTENTIONS

from ..twins import applies, judge


def _compare(ours, theirs, inputs, **options):
    """Against each of torch's computations in float64: what the others and those in float32 err makes the budget."""
    grads = testing.random_grads(testing.evaluate(ours, inputs, {}, **options))
    found = testing.evaluate(ours, inputs, grads, **options)
    exact = [testing.evaluate(fn, inputs, grads, **options) for fn in theirs]
    inputs = type(inputs)._make(testing.cast(x, torch.float32) for x in inputs)
    grads = {name: x.float() for name, x in grads.items()}
    own = exact + [testing.evaluate(fn, inputs, grads, **options) for fn in theirs]
    for expected in exact:
        assert found.keys() == expected.keys()
        for name, x in found.items():
            testing.assert_within_budget(x, expected[name], [each[name] for each in own], name)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrence_is_torchs(cell):
    for reverse, bias, control in itertools.product((False, True), repeat=3):
        inputs = testing.recurrence_inputs(cell, 6, 3, 7, torch.float64, bias=bias, control=control)
        _compare(testing.recurrence_oracle, (testing.torch_recurrence,), inputs, cell=cell, reverse=reverse)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrence_is_a_layer_of_torch(cell):
    """Against the layer itself, whose weights and gate order the contract shares."""
    torch.manual_seed(0)
    layer = {
        "rnn_tanh": torch.nn.RNN(5, 7),
        "rnn_relu": torch.nn.RNN(5, 7, nonlinearity="relu"),
        "lstm": torch.nn.LSTM(5, 7),
        "gru": torch.nn.GRU(5, 7),
    }[cell]
    x, state0 = torch.randn(6, 3, 5), torch.randn(CELLS[cell].states, 3, 7)
    theirs = applies(layer, x, tuple(state0.unsqueeze(1)) if cell == "lstm" else state0)
    layer = copy.deepcopy(layer).double()
    gates = torch.nn.functional.linear(x.double(), layer.weight_ih_l0, layer.bias_ih_l0)
    state0 = state0.double()
    hidden, _, state_n = testing.recurrence_oracle(gates, layer.weight_hh_l0, layer.bias_hh_l0, state0, cell=cell)
    judge((hidden, state_n.unsqueeze(1).unbind()), theirs)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bias", [None, "BHMN", "1H1N", "11M1"])
@pytest.mark.parametrize("mask", [None, "BHMN", "B11N"])
def test_attention_is_torchs(mask, bias, is_causal):
    for kv_heads, scale in ((4, None), (2, 0.7), (1, -0.2)):
        inputs = testing.attention_inputs(
            2, 4, 6, 9, 5, torch.float64, value_size=3, kv_heads=kv_heads, mask=mask, bias=bias
        )
        if mask is not None:
            # Rows without keys have no gradient of lse in torch.
            inputs.mask[..., 0] = True
        _compare(testing.attention_oracle, ATTENTIONS, inputs, scale=scale, is_causal=is_causal)


def test_gradcheck():
    for cell in CELLS:
        inputs = testing.recurrence_inputs(cell, 3, 2, 2, torch.float64, control=True)

        def outputs(*tensors, control=inputs.control, cell=cell):
            return tuple(x for x in testing.recurrence_oracle(*tensors, control, cell=cell) if x is not None)

        assert torch.autograd.gradcheck(outputs, inputs[:4])
    q, k, v, _, bias = testing.attention_inputs(1, 2, 3, 4, 2, torch.float64, bias="1HMN")
    assert torch.autograd.gradcheck(
        lambda *x: testing.attention_oracle(*x[:3], None, x[3], is_causal=True), (q, k, v, bias)
    )


@pytest.mark.parametrize("cell", CELLS)
def test_shapes_of_what_is_saved(cell):
    for steps, batch, dtype in itertools.product((0, 4), (0, 3), (torch.float32, torch.bfloat16)):
        inputs = testing.recurrence_inputs(cell, steps, batch, 5, dtype, requires_grad=False)
        _, num_states, num_reserve = CELLS[cell]
        call = (inputs.input, testing.recurrence_weights(*inputs[1:3]), inputs.state0, None, cell, False)
        states, state_n, reserve = recurrence_forward(*call, True)
        assert states.shape == (num_states, steps + 1, batch, 5)
        assert state_n.shape == (num_states, batch, 5)
        assert reserve.shape == (steps, batch, num_reserve, 5)
        assert reserve.dtype == accumulate_dtype(dtype)
        assert torch.equal(states[:, 0], inputs.state0)
        assert torch.equal(states[:, steps], state_n)
        states, _, reserve = recurrence_forward(*call, False)
        assert states.shape == (1, steps + 1, batch, 5)
        assert reserve.shape == (0,)


def test_everything_held_is_the_initial_state():
    inputs = testing.recurrence_inputs("gru", 4, 3, 5, requires_grad=False)
    inputs = inputs._replace(control=torch.full((4, 3), HOLD, dtype=torch.uint8))
    hidden, _, state_n = testing.recurrence_oracle(*inputs, cell="gru")
    assert torch.equal(hidden, inputs.state0.expand(4, 3, 5))
    assert torch.equal(state_n, inputs.state0)


def test_runs_anywhere():
    assert reference.unavailable() is None
    common = {"input_size": 2, "requires_grad": False}
    inputs = testing.recurrence_inputs("lstm", 4, 3, 5, control=True, **common)
    options = testing.recurrence_options("lstm", 3, 5, names=testing.OPTIONS, **common)
    there = {name: x.to("meta") for name, x in options.items()}
    hidden = testing.recurrence_oracle(*(x.to("meta") for x in inputs), cell="lstm", **there)[0]
    assert hidden.shape == (4, 3, 5)
    assert hidden.device.type == "meta"
