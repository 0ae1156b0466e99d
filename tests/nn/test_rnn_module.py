"""The recurrent layers as modules: constructors, text, errors, weights, copies, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import seqkernels
from seqkernels.testing import assert_within_budget

from ..twins import applies, judge

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

LAYERS = ("RNN", "LSTM", "GRU")
CONSTRUCTIONS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("RNN", (3, 4), {}),
    ("RNN", (3, 4, 2, "relu", False), {"batch_first": True}),
    ("RNN", (3, 4), {"nonlinearity": "relu", "bidirectional": True}),
    ("LSTM", (3, 4), {"proj_size": 2, "num_layers": 2, "dropout": 0.5}),
    ("LSTM", (3, 4, 2, False, True, 0.1, True, 2), {"dtype": torch.float64}),
    ("GRU", (3, 4, 3), {"bias": False, "bidirectional": True, "device": "meta"}),
    ("GRU", (), {"input_size": 3, "hidden_size": 4, "batch_first": True}),
]
WRONG_CONSTRUCTIONS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("RNN", (3, 4), {"nonlinearity": "sine"}),
    ("RNN", (3, 4), {"proj_size": 2}),
    ("GRU", (3, 4), {"proj_size": 2}),
    ("LSTM", (3, 4), {"proj_size": 4}),
    ("LSTM", (3, 4), {"proj_size": -1}),
    ("LSTM", (3, 4), {"dropout": 1.5}),
    ("LSTM", (3, 4), {"dropout": True}),
    ("LSTM", (0, 4), {}),
    ("LSTM", (3, 0), {}),
    ("LSTM", (3.0, 4), {}),
    ("GRU", (3, 4, 0), {}),
    ("GRU", (3, 4), {"bias": 1}),
    ("GRU", (3, 4), {"batch_first": None}),
    ("GRU", (3, 4), {"flavour": "plain"}),
    ("GRU", (3,), {}),
]


def twins(kind: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    theirs = getattr(torch.nn, kind)(*args, **kwargs)
    ours = getattr(seqkernels.nn, kind)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def message(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:
        call()
    return caught.type, str(caught.value)


@pytest.mark.parametrize(("kind", "args", "kwargs"), CONSTRUCTIONS)
def test_construction(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(*args, **kwargs)
    torch.manual_seed(0)
    ours = getattr(seqkernels.nn, kind)(*args, **kwargs)
    assert repr(ours) == repr(theirs)
    names = [name for name in vars(theirs) if not name.startswith("_")]
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert [len(weights) for weights in ours.all_weights] == [len(weights) for weights in theirs.all_weights]
    for (name, weight), (expected_name, expected) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == expected_name
        assert weight.dtype == expected.dtype
        assert weight.device == expected.device
        assert weight.is_meta or torch.equal(weight, expected)


def test_dropout_without_a_second_layer_warns() -> None:
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        seqkernels.nn.GRU(3, 4, dropout=0.5)


@pytest.mark.parametrize(("kind", "args", "kwargs"), WRONG_CONSTRUCTIONS)
def test_construction_errors(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    expected = message(lambda: getattr(torch.nn, kind)(*args, **kwargs))
    assert message(lambda: getattr(seqkernels.nn, kind)(*args, **kwargs)) == expected


def test_state_dict_moves_both_ways() -> None:
    torch.manual_seed(0)
    theirs, ours = twins("LSTM", 3, 4, 2, bidirectional=True, proj_size=2)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        ours.weight_hr_l1_reverse.mul_(2)
    theirs.load_state_dict(ours.state_dict())
    judge(ours(x), applies(theirs, x))


@pytest.mark.parametrize(
    "inputs",
    [
        lambda h: (torch.randn(3), None),
        lambda h: (torch.randn(5, 2, 2, 3), None),
        lambda h: (torch.randn(5, 2, 4), None),
        lambda h: (torch.randn(5, 4), None),
        lambda h: (torch.randn(5, 2, 3, dtype=torch.float64), None),
        lambda h: (torch.ones(5, 2, 3, dtype=torch.int64), None),
        lambda h: (torch.randn(0, 2, 3), None),
        lambda h: (torch.randn(5, 2, 3), h(1, 3, 4)),
        lambda h: (torch.randn(5, 2, 3), h(2, 2, 4)),
        lambda h: (torch.randn(5, 2, 3), h(1, 2, 5)),
        lambda h: (torch.randn(5, 2, 3), h(1, 4)),
        lambda h: (torch.randn(5, 3), h(1, 1, 4)),
        lambda h: (torch.randn(5, 3), h(2, 4)),
    ],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_errors(kind: str, inputs: Callable[..., tuple[Any, Any]]) -> None:
    def hidden(*shape: int) -> Any:
        h = torch.zeros(shape)
        return (h, h) if kind == "LSTM" else h

    theirs, ours = twins(kind, 3, 4)
    x, hx = inputs(hidden)
    assert message(lambda: ours(x, hx)) == message(lambda: theirs(x, hx))


def test_errors_of_the_cell_state() -> None:
    theirs, ours = twins("LSTM", 3, 4, proj_size=2)
    x, h = torch.randn(5, 2, 3), torch.zeros(1, 2, 2)
    assert message(lambda: ours(x, (h, h))) == message(lambda: theirs(x, (h, h)))


def test_state_of_another_dtype_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"hx: expected torch\.float32 as the input, got torch\.float64"):
        seqkernels.nn.GRU(3, 4)(torch.randn(5, 2, 3), torch.zeros(1, 2, 4, dtype=torch.float64))


@pytest.mark.parametrize("kind", LAYERS)
def test_errors_of_packed_input(kind: str) -> None:
    layer = getattr(seqkernels.nn, kind)(3, 4)
    with pytest.raises(RuntimeError, match="Expected 3, got 5"):
        layer(pack_sequence([torch.randn(2, 5)]))
    h = torch.zeros(1, 3, 4)
    packed = pack_sequence([torch.randn(2, 3), torch.randn(1, 3)])
    with pytest.raises(RuntimeError, match=r"size \(1, 2, 4\), got \[1, 3, 4\]"):
        layer(packed, (h, h) if kind == "LSTM" else h)


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_are_read_by_name(kind: str) -> None:
    torch.manual_seed(0)
    theirs, ours = twins(kind, 3, 4)
    x = torch.randn(5, 2, 3)
    other = {name: torch.randn_like(weight) for name, weight in ours.named_parameters()}
    judge(torch.func.functional_call(ours, other, x), applies(torch.func.functional_call, theirs, other, x))
    for layer in (theirs, ours):
        layer.weight_hh_l0.data = other["weight_hh_l0"]
        layer.bias_ih_l0 = torch.nn.Parameter(other["bias_ih_l0"])
        layer.flatten_parameters()
    judge(ours(x), applies(theirs, x))
    assert ours._flat_weights[2] is ours.bias_ih_l0


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("transport", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(kind: str, transport: Callable[[Any], Any]) -> None:
    layer = getattr(seqkernels.nn, kind)(3, 4, 2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    layer(x)
    twin = transport(layer)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    with torch.no_grad():
        twin.weight_ih_l0.zero_()
    assert not torch.equal(twin(x)[0], layer(x)[0])
    assert repr(twin) == repr(layer)
    twin.to(torch.float64)(x.double())


@pytest.mark.parametrize("parametrization", [weight_norm, spectral_norm])
@pytest.mark.parametrize("kind", LAYERS)
def test_parametrized_weights_learn(kind: str, parametrization: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    twin, layer = twins(kind, 3, 4)
    x = torch.randn(5, 2, 3)
    for each in (twin, layer):
        parametrization(each, "weight_hh_l0")
    if parametrization is weight_norm:
        judge(layer(x), applies(twin, x))
    originals = layer.parametrizations.weight_hh_l0.parameters()
    for original in originals:
        (grad,) = torch.autograd.grad(layer.eval()(x)[0].sum(), original)
        assert grad.any()
    before = layer(x)[0]
    with torch.no_grad():
        for original in layer.parametrizations.weight_hh_l0.parameters():
            original.add_(torch.randn_like(original))
    assert not torch.equal(layer(x)[0], before)
    assert torch.equal(copy.deepcopy(layer)(x)[0], layer(x)[0])
    after = layer(x)[0]
    remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is getattr(seqkernels.nn, kind)
    assert torch.equal(layer(x)[0], after)


def run(layer: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output, hidden = layer(x)
    outputs = [output, *(hidden if isinstance(hidden, tuple) else (hidden,))]
    return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), [x, *layer.parameters()])]


# torch's own tracer of autograd functions warns that it instantiates them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "layer",
    [
        seqkernels.nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True),
        seqkernels.nn.LSTM(3, 4, proj_size=2),
        seqkernels.nn.GRU(3, 4),
        seqkernels.nn.RNN(3, 4),
    ],
    ids=str,
)
def test_compile_without_graph_breaks(layer: Any) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer.reset_parameters()
    x = torch.randn(5, 2, 3)
    twin = copy.deepcopy(layer)
    seqkernels.revert(twin)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    judge(run(compiled, x), applies(run, twin, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_gives_the_dtypes_of_torch(kind: str, packed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs, ours = twins(kind, 3, 4)
    x: Any = torch.randn(5, 2, 3, dtype=dtype)
    if packed:
        x = pack_sequence([x[:, 0], x[:2, 1]])

    def outputs(layer: Any, x: Any) -> list[Tensor]:
        output, hidden = layer(x)
        data = output.data if isinstance(output, PackedSequence) else output
        return [data, *(hidden if isinstance(hidden, tuple) else (hidden,))]

    with torch.autocast("cpu", torch.bfloat16):
        expected, found = outputs(theirs, x), outputs(ours, x)
    # Without bfloat16 instructions torch takes another path for the LSTM, which keeps float32 states.
    if kind != "LSTM" or packed or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert [out.dtype for out in found] == [out.dtype for out in expected]
    exact = outputs(theirs.double(), x.double() if isinstance(x, Tensor) else x.to(torch.float64))
    judged, oracle, baseline = (torch.cat([out.flatten() for out in outs]) for outs in (found, exact, expected))
    assert_within_budget(judged.to(torch.bfloat16), oracle, baseline)
    found[0].sum().backward()
    assert ours.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_takes_states_of_another_dtype(kind: str, dtype: torch.dtype) -> None:
    """As those of the call before are: bfloat16, with an input of float32."""
    torch.manual_seed(0)
    theirs, ours = twins(kind, 3, 4)
    x = torch.randn(5, 2, 3, dtype=torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)
    hx: Any = torch.randn(1, 2, 4, dtype=dtype)
    hx = (hx, hx) if kind == "LSTM" else hx
    with torch.autocast("cpu", torch.bfloat16):
        (expected, _), (found, state) = theirs(x, hx), ours(x, hx)
        assert ours(x, state)[0].isfinite().all()
    if kind != "LSTM" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert found.dtype == expected.dtype
    wide = tuple(part.double() for part in hx) if kind == "LSTM" else hx.double()
    exact, _ = theirs.double()(x.double(), wide)
    assert_within_budget(found.to(torch.bfloat16), exact, expected)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"expected .* as the input"):
        ours(x, wide)


def test_autocast_leaves_float64_alone() -> None:
    torch.manual_seed(0)
    theirs, ours = twins("GRU", 3, 4)
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours.double()(x.double())
    assert found[0].dtype == torch.float64
    judge(found, applies(theirs, x))


def test_explain_shows_one_fused_call_for_each_layer_and_direction() -> None:
    layer = seqkernels.nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    explanation = seqkernels.explain(layer, torch.randn(5, 2, 3))
    assert len(explanation.entries) == 4
    assert "not fused" not in str(explanation)


@pytest.mark.parametrize("kind", LAYERS)
def test_shapes_on_the_meta_device(kind: str) -> None:
    layer = getattr(seqkernels.nn, kind)(3, 4, 2, bidirectional=True, device="meta")
    output, _ = layer(torch.empty(5, 2, 3, device="meta"))
    assert output.is_meta
    assert output.shape == (5, 2, 8)


@pytest.mark.parametrize("kind", LAYERS)
def test_final_states_have_their_own_memory(kind: str) -> None:
    output, hidden = getattr(seqkernels.nn, kind)(3, 4)(torch.randn(5, 2, 3))
    before = output.detach().clone()
    for state in hidden if isinstance(hidden, tuple) else (hidden,):
        state.detach_().zero_()
    assert torch.equal(output, before)
