"""Checkpoints: stored states every k steps, gradients of the same bits, and errors where they cannot be."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

import seqkernels
from seqkernels import backends, testing
from seqkernels.backends import Call
from seqkernels.cells import CELLS, DTYPES, accumulate_dtype
from seqkernels.ops.recurrence import backward_op, forward_op, recurrence

from ..conftest import INTERPRETED
from .judging import judge

# Torch's own, from Dynamo when it traces an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

T, B, H, SIZE = 7, 3, 19, 6
EVERY = (2, T + 5) if INTERPRETED else (1, 2, 3, T - 1, T, T + 5)

CAPABLE = [
    name
    for name in backends.NAMES
    if backends.why_not(name, Call("recurrence", "cpu", torch.float32, "lstm", ("checkpoint", "control"))) is None
]


@pytest.fixture(params=CAPABLE)
def capable(request):
    """Insists on each implementation that has checkpoints; fresh memory holds NaN."""
    with seqkernels.use_backend(request.param), testing.threads(1), testing.poisoned_empty():
        yield request.param


def _options(name, cell):
    """The options of a cell that an implementation has besides checkpoints."""

    def has(option):
        feature = {"norm_h": "norm", "norm_c": "norm", "seed": "zoneout"}.get(option, option)
        if option in ("weight_ih", "bias_ih"):
            return True
        features = tuple(sorted(("checkpoint", feature)))
        return backends.why_not(name, Call("recurrence", "cpu", torch.float32, cell, features)) is None

    return [o for o in testing.OPTIONS if (cell == "lstm" or o not in ("peephole", "norm_c")) and has(o)]


def _alone(name):
    return {"bias_ih": ("weight_ih", "bias_ih"), "seed": ("zoneout", "seed")}.get(name, (name,))


def _call(cell, shape=(T, B, H), dtype=torch.float32, names=(), **more):
    size = SIZE if "weight_ih" in names else None
    layout = more.get("layout", "contiguous")
    inputs = testing.recurrence_inputs(cell, *shape, dtype, input_size=size, **more)
    return inputs, testing.recurrence_options(cell, *shape[1:], dtype, names=names, input_size=size, layout=layout)


def _results(inputs, options, every, **more):
    """Hidden states, last states, and the gradient of every tensor that has one, for a random gradient of each."""
    hidden, cells, state_n = recurrence(*inputs, every=every, **options, **more)
    assert cells is None or not every
    grads = list(testing.random_grads({"hidden": hidden, "state_n": state_n}).values())
    leaves = [x for x in (*inputs, *options.values()) if x is not None and x.requires_grad]
    return [hidden.detach(), state_n.detach(), *torch.autograd.grad((hidden, state_n), leaves, grads)]


def _assert_same(inputs, options, every, **more):
    whole = _results(inputs, options, 0, **more)
    for k in every:
        for x, y in zip(_results(inputs, options, k, **more), whole, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y), (k, x.shape)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits(capable, cell, dtype, reverse):
    for control in (False, True):
        inputs, options = _call(cell, dtype=dtype, names=("weight_ih", "bias_ih"), control=control, detach=True)
        _assert_same(inputs, options, EVERY, cell=cell, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_with_each_option(capable, cell, reverse):
    for name in _options(capable, cell):
        inputs, options = _call(cell, names=_alone(name), control=True, bias=reverse)
        _assert_same(inputs, options, (3,) if INTERPRETED else (1, 3, T), cell=cell, reverse=reverse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_with_all_options(capable, cell, dtype):
    names = _options(capable, cell)
    for reverse, every in ((False, (1, 3)), (True, (2, T - 1))):
        inputs, options = _call(cell, dtype=dtype, names=names, control=True, detach=True)
        _assert_same(inputs, options, every, cell=cell, reverse=reverse)


@hypothesis.given(data=st.data(), cell=st.sampled_from(list(CELLS)), layout=st.sampled_from(testing.LAYOUTS))
def test_same_bits_of_anything(capable, data, cell, layout):
    shape = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(1, 35)), "shape")
    drawn = data.draw(st.sets(st.sampled_from(_options(capable, cell))), "options")
    names = [name for name in testing.OPTIONS if any(name in _alone(other) for other in drawn)]
    flags = {name: data.draw(st.booleans(), name) for name in ("reverse", "bias", "control")}
    served = [x for x in DTYPES if backends.why_not(capable, Call("recurrence", "cpu", x)) is None]
    dtype = data.draw(st.sampled_from(served), "dtype")
    reverse = flags.pop("reverse")
    inputs, options = _call(cell, shape, dtype, names, detach=True, layout=layout, **flags)
    _assert_same(inputs, options, [data.draw(st.integers(1, 12), "every")], cell=cell, reverse=reverse)


@pytest.mark.many
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_of_many_rows(capable, cell):
    """So many that products are cut into blocks and go to several threads."""
    inputs, options = _call(cell, (37, 65, 48), names=("weight_ih", "bias_ih"))
    for count in (1, 2):
        with testing.threads(count):
            _assert_same(inputs, options, (1, 5, 36), cell=cell)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_stored(capable, cell, dtype):
    """The hidden states, and the unrounded state before every k-th step of the loop."""
    inputs, _ = _call(cell, dtype=dtype, requires_grad=False)
    weights = testing.recurrence_weights(inputs.weight_hh, inputs.bias_hh)
    for reverse in (False, True):
        call = (inputs.input, weights, inputs.state0, None, cell, reverse, True)
        whole, whole_n, _ = forward_op(*call)
        for every in EVERY:
            states, state_n, checkpoints = forward_op(*call, every)
            assert torch.equal(states, whole[:1])
            assert torch.equal(state_n, whole_n)
            assert checkpoints.dtype == accumulate_dtype(dtype)
            assert checkpoints.shape == (-(-T // every), CELLS[cell].states, B, H)
            for k, state in enumerate(checkpoints):
                at = T - k * every if reverse else k * every
                assert torch.equal(state.to(dtype), whole[:, at])
    if dtype == torch.bfloat16:
        assert not torch.equal(forward_op(*call, 1)[2].to(dtype).float(), forward_op(*call, 1)[2])


@pytest.mark.parametrize("cell", CELLS)
def test_only_what_is_needed_is_given(capable, cell):
    inputs, options = _call(cell, names=("weight_ih", "bias_ih"), requires_grad=False)
    weights = testing.recurrence_weights(
        inputs.weight_hh, inputs.bias_hh, **{name: x.detach() for name, x in options.items()}
    )
    states, state_n, checkpoints = forward_op(inputs.input, weights, inputs.state0, None, cell, False, True, 3)
    grads = (states[0, 1:].cos(), None, state_n.cos(), None)
    call = (grads, inputs.input, weights, states, checkpoints, None, cell, False)
    given = [x is not None for x in (inputs.input, inputs.state0, *weights)]
    every = backward_op(*call, given, 3)
    for k, x in enumerate(every):
        assert (x.numel() > 0) == given[k]
        for j, y in enumerate(backward_op(*call, [j == k for j in range(len(given))], 3)):
            assert torch.equal(y, x) if j == k else y.shape == (0,)


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("reader", CAPABLE)
@pytest.mark.parametrize("cell", CELLS)
def test_what_one_saves_another_reads(capable, cell, reader):
    inputs, _ = _call(cell, dtype=torch.float64, requires_grad=False)
    weights = testing.recurrence_weights(inputs.weight_hh, inputs.bias_hh)
    states, state_n, checkpoints = forward_op(inputs.input, weights, inputs.state0, None, cell, True, True, 3)
    needs = [x is not None for x in (inputs.input, inputs.state0, *weights)]
    grads = {"hidden": states[0, :-1].cos().float().double(), "state_n": state_n.cos().float().double()}
    call = ((grads["hidden"], None, grads["state_n"], None), inputs.input, weights, states, checkpoints, None)
    with seqkernels.use_backend(reader):
        found = backward_op(*call, cell, True, needs, 3)
    names = ("input", "state0", *weights._fields)
    judge(
        {f"grad_{n}": x for n, x in zip(names, found, strict=True) if x.numel()}, inputs, grads, cell=cell, reverse=True
    )


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "rnn_relu"])
def test_second_derivatives(capable, cell):
    inputs, options = _call(cell, (4, 2, 2), torch.float64, _options(capable, cell), control=True)

    def outputs(*tensors):
        hidden, _, state_n = recurrence(*tensors[:4], inputs.control, cell=cell, every=3, **options)
        return hidden, state_n

    leaves = inputs[:4]
    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves, fast_mode=True)


def _stored(inputs, options, **more):
    """Bytes that autograd keeps apart from the arguments and the output, each memory once."""
    own = {x.untyped_storage().data_ptr() for x in (*inputs, *options.values()) if x is not None}
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        hidden, _, _ = recurrence(*inputs, **options, **more)
    own.add(hidden.untyped_storage().data_ptr())
    return sum(size for pointer, size in sizes.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_memory(capable, cell, dtype):
    """Apart from the arguments and the output: one state for every k steps, and nothing else."""
    state = CELLS[cell].states * B * H * torch.empty(0, dtype=accumulate_dtype(dtype)).itemsize
    for steps in (12,) if INTERPRETED else (12, 96):
        inputs, options = _call(cell, (steps, B, H), dtype, names=("weight_ih", "bias_ih"), control=True)
        for every in (1, 4, 5, 12, 1000):
            assert _stored(inputs, options, cell=cell, every=every) == -(-steps // every) * state
        if CELLS[cell].reserve:
            assert _stored(inputs, options, cell=cell) >= steps * CELLS[cell].reserve * B * H * 4


@pytest.mark.parametrize("cell", CELLS)
def test_without_gradients_it_changes_nothing(capable, cell):
    inputs, options = _call(cell, names=("weight_ih", "bias_ih"))
    with torch.no_grad():
        plain = recurrence(*inputs, cell=cell, **options)
        for x, y in zip(recurrence(*inputs, cell=cell, every=2, **options), plain, strict=True):
            assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_compile(capable, cell):
    torch._dynamo.reset()
    inputs, options = _call(cell, (5, B, H), torch.float64, ("weight_ih", "bias_ih"), control=True)
    leaves = [x for x in (*inputs, *options.values()) if x.requires_grad]

    def loss():
        hidden, _, state_n = recurrence(*inputs, cell=cell, every=2, **options)
        return hidden.square().sum() + state_n.cos().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(), leaves), torch.autograd.grad(loss(), leaves), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_opcheck(capable, cell):
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if capable == CAPABLE[0]:
        checks.append("test_aot_dispatch_dynamic")
    for steps in (5, 0):
        inputs, _ = _call(cell, (steps, B, H), requires_grad=False)
        weights = testing.recurrence_weights(inputs.weight_hh, inputs.bias_hh)
        call = (inputs.input, weights, inputs.state0, None, cell, False, True, 2)
        torch.library.opcheck(forward_op, call, test_utils=checks)
        states, state_n, checkpoints = forward_op(*call)
        needs = [x is not None for x in (inputs.input, inputs.state0, *weights)]
        grads = (states[0, 1:].cos(), None, state_n.cos(), None)
        saved = (inputs.input, weights, states, checkpoints, None, cell, False)
        torch.library.opcheck(backward_op, (grads, *saved, needs, 2), test_utils=checks)


def test_who_has_checkpoints():
    call = Call("recurrence", "cpu", torch.float32, "lstm", ("checkpoint",))
    assert backends.why_not("reference", call) is None
    if backends.backend("native").unavailable() is None:
        assert backends.why_not("native", call) is None
    if backends.backend("numba").unavailable() is None:
        assert backends.why_not("numba", call) == "has no checkpoint"


def test_who_declines_says_so():
    pytest.importorskip("numba")
    inputs, _ = _call("lstm")
    with seqkernels.use_backend("numba"), pytest.raises(seqkernels.BackendError, match=r"numba.*has no checkpoint"):
        recurrence(*inputs, cell="lstm", every=2)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"every": -1}, ValueError, "every: expected 0 or a number of steps, got -1"),
        ({"every": 2.0}, TypeError, "every: expected an int, got float"),
        ({"every": True}, TypeError, "every: expected an int, got bool"),
        ({"every": None}, TypeError, "every: expected an int, got NoneType"),
        ({"every": 2, "gates": True}, ValueError, "gates: expected False with every"),
        ({"every": 2, "states": True}, ValueError, "states: expected False with every"),
    ],
)
def test_errors(arguments, kind, text):
    inputs, _ = _call("lstm")
    with pytest.raises(kind, match=text):
        recurrence(*inputs, cell="lstm", **arguments)
