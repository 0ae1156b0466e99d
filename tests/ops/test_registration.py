"""The ops as torch sees them: schema, fakes, tracing, compilation."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

import seqkernels
from seqkernels import testing
from seqkernels.cells import CELLS, CONSTANTS, DTYPES, Weights
from seqkernels.ops import attention as attention_ops
from seqkernels.ops import recurrence as recurrence_ops
from seqkernels.ops.attention import attention
from seqkernels.ops.recurrence import recurrence
from seqkernels.scores import Scores

# Torch's own, from Dynamo when it traces an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
# What no implementation sees.
TRACING = (*CHECKS, "test_aot_dispatch_dynamic")


def _options(cell):
    return [name for name in testing.OPTIONS[2:] if cell == "lstm" or name not in ("peephole", "norm_c")]


def _recurrence_calls(cell, dtype=torch.float32, shape=(4, 3, 5), options=()):
    """Arguments of the forward and of the backward op, with and without what is optional."""
    for reverse, save in ((False, True), (True, False)):
        inputs = testing.recurrence_inputs(cell, *shape, dtype, bias=save, control=save, requires_grad=False)
        weights = testing.recurrence_weights(inputs.weight_hh, inputs.bias_hh)
        yield recurrence_ops.forward_op, (inputs.input, weights, inputs.state0, inputs.control, cell, reverse, save)
    inputs = testing.recurrence_inputs(cell, *shape, dtype, input_size=6, control=True, requires_grad=False)
    names = ("weight_ih", "bias_ih", *options)
    given = testing.recurrence_options(cell, *shape[1:], dtype, names=names, input_size=6, requires_grad=False)
    weights = testing.recurrence_weights(inputs.weight_hh, inputs.bias_hh, **given)
    call = (inputs.input, weights, inputs.state0, inputs.control, cell, True, True)
    yield recurrence_ops.forward_op, call
    states, state_n, reserve = recurrence_ops.forward_op(*call)
    saved = (inputs.input, weights, states, reserve, inputs.control, cell, True)
    given = [x is not None for x in (inputs.input, inputs.state0, *weights)]
    every = [need and name not in CONSTANTS for need, name in zip(given, ("", "", *Weights._fields), strict=True)]
    some = [need and k % 2 == 0 for k, need in enumerate(every)]
    cells = torch.ones_like(states[1, 1:]) if cell == "lstm" else None
    yield recurrence_ops.backward_op, ((None, None, torch.ones_like(state_n), None), *saved, every)
    yield recurrence_ops.backward_op, ((torch.ones_like(states[0, 1:]), cells, None, None), *saved, some)


def _attention_calls(dtype=torch.float32, lengths=(5, 7)):
    for mask, bias in ((None, None), ("B11N", "1HMN")):
        inputs = testing.attention_inputs(
            2, 4, *lengths, 8, dtype, value_size=6, kv_heads=2, mask=mask, bias=bias, requires_grad=False
        )
        packed = Scores(0.3, inputs.mask, inputs.bias, right=0).pack()
        call = (*inputs[:3], *packed)
        yield attention_ops.forward_op, call
        out, lse = attention_ops.forward_op(*call)
        saved = (*inputs[:3], out, lse, *packed)
        yield attention_ops.backward_op, ([torch.ones_like(out), None], *saved, [True] * 3 + [bias is not None])
        yield attention_ops.backward_op, ([torch.ones_like(out), torch.ones_like(lse)], *saved, [False, True] * 2)
        yield attention_ops.backward_op, ([None, torch.ones_like(lse)], *saved, [True, False, False, False])


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_of_the_recurrence(plain_runner, cell):
    for op, args in _recurrence_calls(cell):
        torch.library.opcheck(op, args, test_utils=CHECKS)


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_of_the_recurrence_with_options(options_backend, cell):
    for op, args in _recurrence_calls(cell, options=_options(cell)):
        torch.library.opcheck(op, args, test_utils=CHECKS)
        _same_metadata(op, args)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_tracing_of_the_recurrence(cell):
    with seqkernels.use_backend("reference"):
        for op, args in (*_recurrence_calls(cell), *_recurrence_calls(cell, options=_options(cell))):
            torch.library.opcheck(op, args, test_utils=TRACING)


def test_opcheck_of_attention(plain_runner):
    for op, args in _attention_calls():
        torch.library.opcheck(op, args, test_utils=CHECKS if plain_runner.backend != "reference" else TRACING)


def _same_metadata(op, args):
    with FakeTensorMode() as mode:
        fake = op(*tree_map_only(torch.Tensor, mode.from_tensor, args))
    for real, imitated in zip(op(*args), fake, strict=True):
        assert real.shape == imitated.shape
        assert real.dtype == imitated.dtype
        assert real.numel() == 0 or real.stride() == imitated.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fakes_have_the_metadata_of_real_results(plain_runner, dtype):
    for cell in CELLS:
        for shape in ((4, 3, 5), (0, 3, 5), (1, 0, 5)):
            for op, args in _recurrence_calls(cell, dtype, shape):
                _same_metadata(op, args)
    for lengths in ((5, 7), (0, 7), (5, 0)):
        for op, args in _attention_calls(dtype, lengths):
            _same_metadata(op, args)


def _network(input, weight_hh, bias_hh, state0, bias, recurrence=recurrence, attention=attention):
    hidden, cells, state_n = recurrence(input, weight_hh, bias_hh, state0, cell="lstm")
    heads = hidden.unflatten(2, (2, -1)).permute(1, 2, 0, 3)
    out, lse = attention(heads, heads, heads, None, bias, is_causal=True)
    return out.sum() + lse.square().sum() + cells.cos().sum() + state_n.sum()


def _network_inputs(steps):
    input, weight_hh, bias_hh, state0, _ = testing.recurrence_inputs("lstm", steps, 3, 8)
    return input, weight_hh, bias_hh, state0, torch.zeros(1, 2, 1, 1, requires_grad=True)


def _value_and_gradients(fn, inputs, *more):
    value = fn(*inputs, *more)
    return value.detach(), *torch.autograd.grad(value, inputs)


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])])
def test_compile_without_graph_breaks(backend):
    torch._dynamo.reset()
    inputs = _network_inputs(6)
    found = _value_and_gradients(torch.compile(_network, fullgraph=True, backend=backend), inputs)
    doubled = [testing.cast(x, torch.float64) for x in inputs]
    exact = _value_and_gradients(_network, doubled, testing.recurrence_oracle, testing.attention_oracle)
    own = _value_and_gradients(_network, inputs, testing.torch_recurrence, testing.torch_attention)
    # All at once, each as large as the others: one number alone may be exact by luck.
    sizes = [2 ** -x.abs().max().log2().ceil() for x in exact]
    every = (torch.cat([x.flatten() * s.to(x) for x, s in zip(r, sizes, strict=True)]) for r in (found, exact, own))
    testing.assert_within_budget(*every)


def test_another_length_does_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_network, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for steps in (6, 9, 13):
        inputs = _network_inputs(steps)
        value, *grads = _value_and_gradients(compiled, inputs)
        assert torch.equal(value, _network(*inputs))
        assert grads[0].shape == inputs[0].shape
        frames.append(counter.frame_count)
    assert frames == [frames[0]] * 3


def test_compile_without_gradients():
    torch._dynamo.reset()
    inputs = _network_inputs(6)

    def infer(*tensors):
        with torch.no_grad():
            return recurrence(*tensors[:4], cell="lstm")[0]

    assert torch.equal(torch.compile(infer, fullgraph=True, backend="aot_eager")(*inputs), infer(*inputs))


@pytest.mark.parametrize(("cell", "gates"), [("rnn_relu", True), ("gru", False), ("lstm", False), ("lstm", True)])
def test_compile_with_options(options_backend, cell, gates):
    torch._dynamo.reset()
    inputs = testing.recurrence_inputs(cell, 4, 3, 5, torch.float64, input_size=6, control=True, detach=True)
    options = testing.recurrence_options(
        cell, 3, 5, torch.float64, names=("weight_ih", "bias_ih", *_options(cell)), input_size=6
    )
    leaves = [x for x in (*inputs, *options.values()) if x.requires_grad]

    def loss():
        outputs = recurrence(*inputs, cell=cell, gates=gates, **options)
        return sum(x.square().sum() for x in outputs if x is not None)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(), leaves), torch.autograd.grad(loss(), leaves), strict=True):
        assert torch.equal(x, y)
    with torch.no_grad():
        assert torch.equal(compiled(), loss())


def _targets(graph):
    return {str(node.target) for node in graph.nodes}


def test_traces_hold_the_ops():
    inputs = [x.detach() for x in _network_inputs(6)]

    def infer(input, weight_hh, bias_hh, state0, bias):
        hidden = recurrence(input, weight_hh, bias_hh, state0, cell="lstm")[0]
        heads = hidden.unflatten(2, (2, -1)).permute(1, 2, 0, 3)
        return attention(heads, heads, heads, None, bias)[0]

    wanted = {"seqkernels.recurrence_forward.default", "seqkernels.attention_forward.default"}
    assert wanted <= _targets(make_fx(infer, tracing_mode="symbolic")(*inputs).graph)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return infer(*tensors)

    program = torch.export.export(Module(), tuple(inputs))
    assert wanted <= _targets(program.graph)
    assert torch.equal(program.module()(*inputs), infer(*inputs))
