"""Zoneout, recurrent dropout, layer norms, peepholes and truncated gradients are those of a plain loop."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqkernels
from seqkernels.backends.reference.philox import uniform

from . import layers
from .layers import H, I, draw_input, graded, hidden_of, outputs_of

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

T, B = 6, 4
KINDS = ("RNN", "ReLU", "LSTM", "projected", "GRU")
SINGLE: list[dict[str, Any]] = [
    {"zoneout": 0.25},
    {"zoneout": (0.0, 0.375)},
    {"recurrent_dropout": 0.4},
    {"layer_norm": True},
    {"peephole": True},
    {"tbptt": 2},
]


def allowed(kind: str, options: dict[str, Any]) -> bool:
    zoneout = options.get("zoneout", 0.0)
    lstm = kind in ("LSTM", "projected")
    if options.get("peephole") or isinstance(zoneout, tuple):
        return lstm
    return not (zoneout and kind == "projected")


def build(kind: str, dtype: torch.dtype, seed: int, **options: Any) -> Any:
    """A layer whose every parameter is random and exact in float32."""
    layer = layers.build(kind, seqkernels.nn, torch.float32, seed, **options)
    for name, weight in layer.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if name.startswith("norm") else 0.0, 0.3)
    return layer.to(dtype)


def draw(layer: Any, dtype: torch.dtype, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    return draw_input(layer, T, B, dtype, seed)[:2]


def norm(order: int, x: Tensor, gain: Tensor, shift: Tensor | None = None) -> Tensor:
    if order % 2:
        return F.layer_norm(x, gain.shape, gain, shift)
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
    return scaled if shift is None else scaled + shift


def cell(layer: Any, w: dict[str, Tensor], ih: Tensor, hh: Tensor, state: list[Tensor], order: int) -> list[Tensor]:
    """One step as in the papers: the next states from the two products and the states."""
    if layer.layer_norm:
        ih, hh = norm(order, ih, w["norm_ih"]), norm(order, hh, w["norm_hh"])
    ih, hh = ih + w["bias_ih"], hh + w["bias_hh"]
    if layer.mode == "GRU":
        (ri, zi, ni), (rh, zh, nh) = ih.chunk(3, -1), hh.chunk(3, -1)
        r, z = (ri + rh).sigmoid(), (zi + zh).sigmoid()
        return [(1 - z) * (ni + r * nh).tanh() + z * state[0]]
    if layer.mode != "LSTM":
        return [(ih + hh).relu() if layer.mode == "RNN_RELU" else (ih + hh).tanh()]
    i, f, g, o = (ih + hh).chunk(4, -1)
    if layer.peephole:
        i, f = i + w["weight_peephole"][0] * state[1], f + w["weight_peephole"][1] * state[1]
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    if layer.peephole:
        o = o + w["weight_peephole"][2] * c
    seen = norm(order, c, *w["norm_c"]) if layer.layer_norm else c
    return [o.sigmoid() * seen.tanh(), c]


def product(x: Tensor, weight: Tensor, order: int) -> Tensor:
    permutation = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(order))
    return x[..., permutation] @ weight[:, permutation].t() if order else x @ weight.t()


def direction(
    layer: Any, suffix: str, x: Tensor, hx: list[Tensor], tbptt: int | None, order: int
) -> tuple[Tensor, list[Tensor]]:
    """One layer in one direction. Of a projected LSTM the options act on what is projected; h_0 is a projection."""
    w = {n.removesuffix(f"_{suffix}"): p for n, p in layer.named_parameters() if n.endswith(f"_{suffix}")}
    project = w.get("weight_hr", torch.eye(H, dtype=x.dtype)).t()
    chances = layer.zoneout if isinstance(layer.zoneout, tuple) else (layer.zoneout,) * len(hx)
    mask, seed, size = x.new_ones(B, H), None, len(hx) * B * H
    if layer.training and layer.recurrent_dropout:
        mask = F.dropout(mask, layer.recurrent_dropout)
    if layer.training and any(chances):
        seed = torch.randint(2**63 - 1, ())
    state, history = hx, {}
    steps = list(range(len(x)))
    for count, t in enumerate(reversed(steps) if "reverse" in suffix else steps):
        if tbptt and count and count % tbptt == 0:
            state = [s.detach() for s in state]
        if count == 0:
            hh = product(state[0] if "weight_hr" in w else state[0] * mask, w["weight_hh"], order)
        elif order % 2:
            hh = product(state[0] * mask, w["weight_hh"] @ project.t(), order)
        else:
            hh = product((state[0] * mask) @ project, w["weight_hh"], order)
        new = cell(layer, w, product(x[t], w["weight_ih"], order), hh, state, order)
        if any(chances):
            places = torch.arange(t * size, (t + 1) * size).view(B, len(hx), H)
            for s, p in enumerate(chances):
                keep = p if seed is None else (uniform(seed, places)[:, s] < p).to(x)
                new[s] = keep * state[s] + (1 - keep) * new[s] if p else new[s]
        history[t], state = new[0] @ project, new
    return torch.stack([history[t] for t in steps]), [state[0] @ project, *state[1:]]


def loop(layer: Any, x: Tensor, hx: tuple[Tensor, ...], tbptt: int | None = None, order: int = 0) -> list[Tensor]:
    """Output and final states of `layer`, step by step; draws the random numbers that the layer draws.

    Numbers other than 0 of `order` sum in another order, odd ones with torch's layer norm: other rounding errors.
    """
    finals: list[list[Tensor]] = []
    for k in range(layer.num_layers):
        if k and layer.dropout and layer.training:
            x = F.dropout(x, layer.dropout)
        outputs = []
        for suffix in (f"l{k}", f"l{k}_reverse")[: 2 if layer.bidirectional else 1]:
            output, final = direction(layer, suffix, x, [s[len(finals)] for s in hx], tbptt, order)
            outputs.append(output)
            finals.append(final)
        x = torch.cat(outputs, -1)
    return [x, *(torch.stack(s) for s in zip(*finals, strict=True))]


def of_layer(layer: Any, x: Tensor, hx: tuple[Tensor, ...], tbptt: int | None = None) -> list[Tensor]:
    return outputs_of(*layer(x, hidden_of(hx), tbptt=tbptt))


@functools.cache
def results(order: int | None, kind: str, tbptt: int | None = None, **options: Any) -> Any:
    """Results of the layer itself, or of the loop in an order."""
    run = of_layer if order is None else functools.partial(loop, order=order)

    def compute(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        layer = build(kind, dtype, seed, **options)
        x, hx = draw(layer, dtype, seed)
        torch.manual_seed(100 + seed)
        return graded(run(layer, x, hx, tbptt), layer, x, hx)

    return compute


def compare(options: dict[str, Any], kind: str, train: bool, judge: Any) -> None:
    """Norms, which enlarge rounding errors, are judged by more orders of summation and over more draws."""
    orders, seeds = (4, 4) if options.get("layer_norm") else (2, 2)
    runs = [results(order, kind, **options, train=train) for order in (None, *range(orders))]
    judge(*runs, seeds=seeds)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", SINGLE, ids=lambda options: "-".join(options))
def test_option(kind: str, options: dict[str, Any], train: bool, capable: str, judge: Any) -> None:
    if not allowed(kind, options):
        if "peephole" in options or isinstance(options["zoneout"], tuple):
            with pytest.raises((TypeError, ValueError), match=next(iter(options))):
                build(kind, torch.float32, 0, **options)
        return
    compare({**options, "bidirectional": True, "num_layers": 2}, kind, train, judge)


@hypothesis.settings(max_examples=12)
@hypothesis.given(data=st.data())
def test_product_of_options(data: st.DataObject, capable: str, judge: Any) -> None:
    kind = data.draw(st.sampled_from([kind for kind in KINDS if kind != "ReLU"]))
    lstm = kind in ("LSTM", "projected")
    zoneouts = {"LSTM": [0.0, 0.25, (0.5, 0.0)], "projected": [0.0, (0.0, 0.25)]}.get(kind, [0.0, 0.25])
    layers = data.draw(st.integers(1, 2))
    options = {
        "zoneout": data.draw(st.sampled_from(zoneouts)),
        "recurrent_dropout": data.draw(st.sampled_from([0.0, 0.5])),
        "layer_norm": data.draw(st.booleans()),
        "peephole": lstm and data.draw(st.booleans()),
        "tbptt": data.draw(st.sampled_from([None, 1, 3, 100])),
        "bidirectional": data.draw(st.booleans()),
        "num_layers": layers,
        "dropout": data.draw(st.sampled_from([0.0, 0.5])) if layers > 1 else 0.0,
    }
    compare(options, kind, data.draw(st.booleans()), judge)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "projected", "GRU"])
def test_gradcheck(kind: str, train: bool, capable: str) -> None:
    options: dict[str, Any] = {"layer_norm": True, "recurrent_dropout": 0.25, "bidirectional": True}
    lstm = {"peephole": True, "zoneout": (0.0 if kind == "projected" else 0.5, 0.25)}
    layer = build(kind, torch.float64, 0, **options, **(lstm if kind in ("LSTM", "projected") else {"zoneout": 0.25}))
    layer.train(train)
    names, weights = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        parameters = dict(zip(names, weights, strict=True))
        return tuple(outputs_of(*torch.func.functional_call(layer, parameters, (x,))))

    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: run(x, *weights), x, fast_mode=True)


def test_seed_of_torch_governs() -> None:
    layer = build("LSTM", torch.float32, 0, zoneout=0.5, recurrent_dropout=0.5, num_layers=2)
    x, _ = draw(layer, torch.float32, 0)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)[0]

    with seqkernels.use_backend("reference"):
        assert torch.equal(run(1), run(1))
        assert not torch.equal(run(1), run(2))
        layer.eval()
        assert torch.equal(run(1), run(2))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_options_that_are_off_leave_the_layer_as_it_is(kind: str) -> None:
    off: dict[str, Any] = dict.fromkeys(("layer_norm", "peephole", "learn_reset_state"), False)
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(I, H, 2, bidirectional=True)
    torch.manual_seed(0)
    ours = getattr(seqkernels.nn, kind)(I, H, 2, bidirectional=True, zoneout=0, recurrent_dropout=0.0, **off)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys() - {"_flat_weights"}
    for (name, weight), (expected_name, expected) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == expected_name
        assert torch.equal(weight, expected)


def test_parameters_of_the_options() -> None:
    options = {"layer_norm": True, "peephole": True, "learn_reset_state": True}
    layer = seqkernels.nn.LSTM(I, H, 2, bidirectional=True, zoneout=(0.1, 0.2), **options, dtype=torch.float64)
    assert "zoneout=(0.1, 0.2), layer_norm=True, peephole=True, learn_reset_state=True" in repr(layer)
    plain = set(torch.nn.LSTM(I, H, 2, bidirectional=True).state_dict())
    shapes = {"norm_ih": (4 * H,), "norm_hh": (4 * H,), "norm_c": (2, H), "weight_peephole": (3, H)}
    shapes |= {"reset_state": (2, H)}
    suffixes = ("l0", "l0_reverse", "l1", "l1_reverse")
    expected = {f"{name}_{suffix}": shape for name, shape in shapes.items() for suffix in suffixes}
    extra = {name: tuple(x.shape) for name, x in layer.state_dict().items() if name not in plain}
    assert extra == expected
    assert {x.dtype for x in layer.state_dict().values()} == {torch.float64}
    for _ in range(2):
        assert (layer.norm_ih_l0 == 1).all()
        assert (layer.norm_hh_l1_reverse == 1).all()
        assert torch.equal(layer.norm_c_l0, torch.stack((torch.ones(H), torch.zeros(H))).double())
        assert layer.weight_peephole_l0.abs().max() <= H**-0.5
        assert layer.weight_peephole_l0.any()
        assert not layer.reset_state_l1.any()
        torch.nn.init.normal_(layer.norm_c_l0)
        layer.reset_parameters()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert repr(twin) == repr(layer)
    gru = seqkernels.nn.GRU(I, H, layer_norm=True, zoneout=0.1)
    assert {name for name, _ in gru.named_parameters()} >= {"norm_ih_l0", "norm_hh_l0"}
    assert not hasattr(gru, "norm_c_l0")


def test_options_of_the_class_do_not_outlive_the_layer() -> None:
    seqkernels.nn.GRU(I, H, zoneout=0.5, layer_norm=True)
    assert seqkernels.nn.GRU(I, H).zoneout == 0.0
    converted = torch.nn.Sequential(torch.nn.GRU(I, H))
    seqkernels.convert(converted)
    assert converted[0].zoneout == 0.0
    assert not converted[0].layer_norm
    seqkernels.revert(converted)
    assert type(converted[0]) is torch.nn.GRU


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("GRU", {"zoneout": 1.5}, ValueError, r"zoneout: expected a number in \[0, 1\], got 1\.5"),
        ("GRU", {"zoneout": (0.1, 0.1)}, ValueError, r"zoneout: expected a number, or two .*, got \(0\.1, 0\.1\)"),
        ("LSTM", {"zoneout": (0.1,)}, ValueError, r"zoneout: expected a number, or two .*, got \(0\.1,\)"),
        ("LSTM", {"zoneout": (0.1, True)}, ValueError, r"zoneout: expected a number in \[0, 1\], got True"),
        ("LSTM", {"zoneout": 0.1, "proj_size": 2}, ValueError, r"zoneout: expected 0 for the hidden state of a proj"),
        ("RNN", {"recurrent_dropout": -1}, ValueError, r"recurrent_dropout: expected a number in \[0, 1\], got -1"),
        ("RNN", {"recurrent_dropout": "a"}, ValueError, "recurrent_dropout: expected a number"),
        ("GRU", {"peephole": True}, ValueError, "peephole: only an LSTM has it"),
        ("GRU", {"layer_norm": 1}, TypeError, "layer_norm: expected a bool, got int"),
        ("GRU", {"learn_reset_state": None}, TypeError, "learn_reset_state: expected a bool, got NoneType"),
    ],
)
def test_errors_of_construction(kind: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(seqkernels.nn, kind)(I, H, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tbptt": 0}, ValueError, "tbptt: expected an integer of at least 1, got 0"),
        ({"tbptt": 1.5}, ValueError, r"tbptt: expected an integer of at least 1, got 1\.5"),
        ({"norm_ih": [torch.ones(4 * H)]}, ValueError, "norm_ih: expected 2 tensors, one for each .*, got 1"),
        ({"norm_hh": [torch.ones(H)] * 2}, ValueError, rf"norm_hh\[0\]: expected \({4 * H},\) torch\.float32, got"),
        ({"peephole": [torch.ones(3, H).double()] * 2}, ValueError, r"peephole\[0\]: .* got \(3, 11\) torch\.float64"),
        ({"reset_state": [torch.ones(2, H)] * 2}, ValueError, "reset_state: expected reset too"),
        ({"zoneout": 2}, ValueError, r"zoneout: expected a number in \[0, 1\], got 2"),
        ({"recurrent_dropout": 2}, ValueError, r"recurrent_dropout: expected a number in \[0, 1\], got 2"),
        ({"window": 2}, TypeError, "window"),
    ],
)
def test_errors_of_the_functions(options: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = torch.nn.LSTM(I, H, 2)
    arguments = (torch.randn(T, B, I), None, layer._flat_weights, True, 2, 0.0, False, False, False)
    with pytest.raises(error, match=message):
        seqkernels.functional.lstm(*arguments, **options)


@pytest.mark.parametrize("name", ["norm_c", "peephole"])
def test_only_an_lstm_has_a_cell_state(name: str) -> None:
    layer = torch.nn.GRU(I, H)
    shape = (2 if name == "norm_c" else 3, H)
    arguments = (torch.randn(T, B, I), None, layer._flat_weights, True, 1, 0.0, False, False, False)
    with pytest.raises(ValueError, match=f"{name}: only an LSTM has it"):
        seqkernels.functional.gru(*arguments, **{name: [torch.ones(shape)]})


def test_functions_take_what_layers_have(capable: str) -> None:
    layer = build("LSTM", torch.float64, 0, layer_norm=True, peephole=True, zoneout=(0.25, 0.5), num_layers=2)
    x, hx = draw(layer, torch.float64, 0)
    names = {"norm_ih": "norm_ih", "norm_hh": "norm_hh", "norm_c": "norm_c", "peephole": "weight_peephole"}
    lists = {name: [getattr(layer, f"{own}_l{k}") for k in range(2)] for name, own in names.items()}
    arguments = (x, hx, layer._flat_weights, True, 2, 0.0, False, False, False)
    found = seqkernels.functional.lstm(*arguments, **lists, zoneout=(0.25, 0.5), tbptt=2)
    expected = of_layer(layer.eval(), x, hx, 2)
    for result, value in zip(found, expected, strict=True):
        assert torch.equal(result, value)


def test_autocast_takes_the_options(capable: str) -> None:
    layer = build("LSTM", torch.float32, 0, layer_norm=True, peephole=True, learn_reset_state=True, zoneout=0.25)
    x, _ = draw(layer, torch.float32, 0)
    reset = torch.zeros(T, B, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        output, _, traces = layer(x, reset=reset, return_states=True, return_gates=True)
    assert {output.dtype, *(part.dtype for part in traces[0])} == {torch.bfloat16}
    output.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


# torch's own tracer of autograd functions warns that it instantiates them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_without_graph_breaks() -> None:
    torch._dynamo.reset()
    layer = build("LSTM", torch.float32, 0, layer_norm=True, bidirectional=True, zoneout=0.25, peephole=True).eval()
    x, hx = draw(layer, torch.float32, 0)
    with seqkernels.use_backend("reference"):
        compiled = torch.compile(of_layer, fullgraph=True, backend="aot_eager")
        for found, expected in zip(compiled(layer, x, hx, 2), of_layer(layer, x, hx, 2), strict=True):
            assert torch.equal(found, expected)
        layer.train()
        layer.recurrent_dropout = 0.5
        assert compiled(layer, x, hx, 2)[0].isfinite().all()
