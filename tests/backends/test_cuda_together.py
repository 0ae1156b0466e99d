"""Recurrences that share launches, by the emulation: directions, wavefronts, and the layers built on them."""

from __future__ import annotations

import itertools
import math
import weakref

import pytest
import torch

import seqkernels
from seqkernels import testing
from seqkernels.backends.cuda import emulator, plans, together
from seqkernels.backends.cuda.plans import Waves, waves
from seqkernels.cells import CELLS

from ..ops.test_recurrences import check, given_of
from ..planned import plan_of

pytestmark = [
    pytest.mark.skipif(not emulator.in_use(), reason="the emulator was not built, or there is a GPU"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo's own
]

TIERS = {"block": (24, 8), "cluster": (8, 8), "grid": (16, 8)}


@pytest.fixture(autouse=True)
def _on_the_kernels():
    with seqkernels.use_backend("cuda"), testing.threads(1), testing.poisoned_empty():
        yield


@pytest.fixture
def launches(monkeypatch):
    """How many parts each launch has."""
    seen = []
    launch = together._launch

    def counted(parts, backward):
        seen.append([(part.begin, part.end) for part in parts])
        launch(parts, backward)

    monkeypatch.setattr(together, "_launch", counted)
    return seen


def _cheap_launches(monkeypatch):
    """As many parts as there are steps."""
    monkeypatch.setattr(plans, "LAUNCH", 1e-9)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cell", CELLS)
def test_wavefront(cell, tier, monkeypatch, launches):
    _cheap_launches(monkeypatch)
    hidden, rows = TIERS[tier]
    names = ("reset_state", "zoneout", "seed", "norm_h") if cell != "rnn_relu" else ()
    names = ("norm_h", "norm_c", "peephole") if cell == "lstm" else names

    def planner(kind, product, backward, size, batch, norms):
        return plan_of(tier, kind, product, backward, size, batch, hidden, rows, norms)

    given = given_of(cell, 3, (4, 9, 20), torch.float32, True, names=names, masked=True)
    with emulator.planned(planner):
        check(given, torch.float32, cell=cell, reverse=(False,) * 3, chained=True, gates=True, states=True)
    # Layers from the first on, then from the last on, each a step behind the one before it.
    forward = [[(k - layer, k - layer + 1) for layer in range(3) if 0 <= k - layer < 4] for k in range(6)]
    assert launches[:6] == forward
    assert launches[6:] == [[(4 - end, 4 - begin) for begin, end in parts] for parts in forward]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chained", [True, False])
def test_16_bits(dtype, chained, monkeypatch):
    _cheap_launches(monkeypatch)
    for cell in ("lstm", "gru"):
        given = given_of(cell, 3, (3, 9, 16), dtype, chained, masked=True)
        check(given, dtype, cell=cell, reverse=(False,) * 3, chained=chained)


def test_another_default_dtype(monkeypatch):
    _cheap_launches(monkeypatch)
    given = given_of("lstm", 3, (3, 4, 8), torch.float32, True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        check(given, torch.float32, cell="lstm", reverse=(False,) * 3, chained=True)
    finally:
        torch.set_default_dtype(before)


def test_gates_that_are_given_are_widened_once(monkeypatch):
    _cheap_launches(monkeypatch)
    given = given_of("gru", 2, (5, 3, 8), torch.bfloat16, True)
    first = given.weights[0]._replace(weight_ih=None, bias_ih=None)
    given = given._replace(input=torch.randn(5, 3, 24), weights=[first, given.weights[1]])
    read, launch = set(), together._launch

    def seen(parts, backward):
        read.update(part.loop.gates_x.dtype for part in parts if not backward)
        launch(parts, backward)

    monkeypatch.setattr(together, "_launch", seen)
    check(given, torch.bfloat16, cell="gru", reverse=(False, False), chained=True)
    assert read == {torch.float32}


def test_more_than_a_launch_has(monkeypatch, launches):
    _cheap_launches(monkeypatch)
    most = together.kernels().MOST_JOBS
    for reverse in (False, True):
        launches.clear()
        given = given_of("gru", most + 2, (3, 2, 8), torch.float32, True)
        check(given, torch.float32, cell="gru", reverse=(reverse,) * (most + 2), chained=True)
        assert max(map(len, launches)) <= most
        first = sorted(itertools.chain.from_iterable(launches))
        assert first == sorted([(0, 1), (1, 2), (2, 3)] * 2 * (most + 2))
    with pytest.raises(ValueError, match=rf"jobs: expected 1 to {most}, got 0"):
        together.kernels().recurrence_forward(plan_of("block", "gru", "exact", False, 8, 1, 8, 8))


def test_memory_of_the_way_back(monkeypatch):
    """A layer's gradients of gates are there while it runs, and until the one below has read them."""
    _cheap_launches(monkeypatch)
    most, alive, passes = together.kernels().MOST_JOBS, [], weakref.WeakSet()
    launch, made = together._launch, together.BackwardPass

    class Pass(made):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            passes.add(self)

    def counted(parts, backward):
        alive.append(len(passes))
        launch(parts, backward)

    monkeypatch.setattr(together, "BackwardPass", Pass)
    monkeypatch.setattr(together, "_launch", counted)
    for chained in (True, False):
        alive.clear()
        given = given_of("gru", 3 * most, (6, 2, 8), torch.float32, chained)
        check(given, torch.float32, cell="gru", reverse=(False,) * (3 * most), chained=chained)
        # One more is the last of the wave before.
        assert max(alive) == most + chained
    assert not passes


def test_one_part_where_launches_are_dear(launches):
    given = given_of("lstm", 2, (4, 2, 8), torch.float32, True)
    check(given, torch.float32, cell="lstm", reverse=(False, False), chained=True)
    assert launches == [[(0, 4)]] * 4
    launches.clear()
    given = given_of("lstm", 2, (4, 2, 8), torch.float32, False)
    check(given, torch.float32, cell="lstm", reverse=(False, True), chained=False)
    assert launches == [[(0, 4), (0, 4)]] * 2


def _cost(found, count, steps, fed, cycles_of):
    launches = found.parts + (found.width - 1 if fed else 0)
    return math.ceil(count / found.width) * launches * (steps / found.parts * cycles_of(found.width) + plans.LAUNCH)


@pytest.mark.parametrize("fed", [True, False])
def test_the_waves_are_the_cheapest(fed):
    for count, steps, first in itertools.product((1, 2, 3, 5, 8), (1, 40, 512, 5000), (600, 3000)):
        for more in (0.0, 0.3, 1.0, math.inf):

            def cycles_of(jobs, first=first, more=more):
                return first if jobs == 1 else first * (1 + more * (jobs - 1))

            found = waves(count, steps, fed, cycles_of, 4)
            widths, parts = range(1, min(count, 4) + 1), range(1, min(steps, 300) + 1) if fed else (1,)
            best = min(_cost(Waves(width, some), count, steps, fed, cycles_of) for width in widths for some in parts)
            assert _cost(found, count, steps, fed, cycles_of) <= 1.01 * best, (count, steps, first, more, found)
    assert waves(2, 512, fed, lambda jobs: 1000.0, 4).width == 2
    assert waves(2, 512, fed, lambda jobs: 1000.0 * jobs, 4).width == (1 if fed else 2)


def test_plans_for_several_on_an_h100():
    h100 = plans.Device(90, 132, 227 * 1024, 16)
    kernels = emulator.module()

    def plan(hidden, batch, jobs):
        return plans.choose(kernels, h100, "lstm", "bfloat16", False, hidden, batch, jobs=jobs)

    for jobs in (2, 4):
        # Blocks that meet have to be there together, those of all recurrences.
        found = plan(1024, 16, jobs)
        assert found.plan.tier != "grid" or found.plan.blocks * jobs <= 132
    assert plan(1024, 16, 2).plan.tier == "grid"
    assert plan(2048, 16, 1).plan.tier == "grid"
    assert plan(2048, 16, 2).plan.tier == "steps"
    assert plan(2048, 16, 2).cycles == math.inf
    # Two of a size that leaves half of the device to itself cost what one does.
    assert plan(512, 16, 2).cycles < 1.1 * plan(512, 16, 1).cycles
    assert plans.cycles(plan(512, 256, 2).plan, "bfloat16", h100, 2) > plan(512, 256, 1).cycles


LAYERS = [
    {"num_layers": 3},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "dropout": 0.4},
    {"num_layers": 2, "dropout": 0.4, "bidirectional": True, "bias": False},
    {"num_layers": 6, "batch_first": True},
]


def _evaluate(layer, x, hx, lengths=None):
    """Outputs, final states and gradients of the input, the states and the parameters, of random gradients."""
    torch.manual_seed(7)
    leaves = [x, *hx, *layer.parameters()]
    leaves = [leaf.detach().requires_grad_() if k < 1 + len(hx) else leaf for k, leaf in enumerate(leaves)]
    given = leaves[1 : 1 + len(hx)]
    if lengths is not None:
        packed = torch.nn.utils.rnn.pack_padded_sequence(leaves[0], lengths, layer.batch_first, enforce_sorted=False)
        output, states = layer(packed, tuple(given) if len(given) == 2 else given[0])
        output = output.data
    else:
        output, states = layer(leaves[0], tuple(given) if len(given) == 2 else given[0])
    outs = [output, *(states if isinstance(states, tuple) else (states,))]
    grads = testing.random_grads({str(k): x for k, x in enumerate(outs)})
    found = torch.autograd.grad(outs, leaves, [x.to(outs[0].dtype) for x in grads.values()])
    return [*(x.detach() for x in outs), *found]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("settings", LAYERS, ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_layers_are_those_of_torch(name, settings, packed, launches, monkeypatch):
    _cheap_launches(monkeypatch)
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(6, 12, **settings)
    ours = getattr(seqkernels.nn, name)(6, 12, **settings)
    ours.load_state_dict(theirs.state_dict())
    rows = settings["num_layers"] * (2 if settings.get("bidirectional") else 1)
    x = torch.randn(5, 4, 6)
    hx = [torch.randn(rows, 5 if settings.get("batch_first") else 4, 12) for _ in range(2 if name == "LSTM" else 1)]
    lengths = None
    if packed:
        lengths = torch.tensor([4, 1, 3, 2, 4] if settings.get("batch_first") else [5, 1, 3, 2])
    found = _evaluate(ours, x, hx, lengths)
    assert max(map(len, launches)) > 1
    # Masks of dropout too are torch's.
    expected = _evaluate(theirs, x, hx, lengths)
    for k, (x, y) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6, msg=lambda text, k=k: f"{k}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options_of_layers(dtype, monkeypatch, launches):
    """Everything that a layer may ask for, in waves and in turn; random draws are the same."""
    _cheap_launches(monkeypatch)
    reset = torch.zeros(5, 4, dtype=torch.bool)
    reset[2, 1] = reset[4, 3] = True
    x = torch.randn(5, 4, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    kinds = {
        "several": (
            {"zoneout": 0.2, "recurrent_dropout": 0.3, "dropout": 0.4},
            {"reset": reset, "lengths": torch.tensor([5, 2, 4, 0])},
        ),
        "traces": ({"peephole": True}, {"return_states": True, "return_gates": True, "tbptt": 2}),
        "documents": ({}, {"cu_seqlens": torch.tensor([0, 3, 4, 9])}),
    }
    for (made, asked), bidirectional in itertools.product(kinds.values(), (False, True)):
        torch.manual_seed(1)
        layer = seqkernels.nn.LSTM(6, 12, 3, bidirectional=bidirectional, dtype=dtype, **made)
        data = x.flatten(0, 1)[:9] if "cu_seqlens" in asked else x
        found = []
        for together_too in (True, False):
            with monkeypatch.context() as patch:
                if not together_too:
                    patch.setattr("seqkernels._recurrent.serves", lambda *_: False)
                launches.clear()
                torch.manual_seed(2)
                given = data.clone().requires_grad_()
                outputs = torch.utils._pytree.tree_leaves(layer(given, **asked))
                outputs = [out for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad]
                grads = testing.random_grads({str(k): out for k, out in enumerate(outputs)})
                leaves = [given, *layer.parameters()]
                gradients = torch.autograd.grad(outputs, leaves, list(grads.values()))
                assert (max(map(len, launches), default=0) > 1) == together_too
                found.append([*(out.detach() for out in outputs), *gradients])
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for x_, y_ in zip(*found, strict=True):
            size = y_.abs().max().item() + 1e-3
            torch.testing.assert_close(x_, y_, rtol=0, atol=tolerance * size)


def test_what_is_done_in_turn(launches):
    """Where other operations are between the recurrences, or within them in the backward pass."""
    x = torch.randn(4, 3, 6)
    for made, asked in (({"proj_size": 5}, {}), ({}, {"checkpoint_every": 2}), ({"num_layers": 1}, {})):
        layer = seqkernels.nn.LSTM(6, 12, **({"num_layers": 2} | made))
        layer(x, **asked)[0].sum().backward()
        assert launches == []


@pytest.mark.parametrize("bidirectional", [False, True])
def test_frozen_layers(launches, bidirectional):
    """They run in the wave, but have no backward pass; what is returned of them needs no gradient."""
    torch.manual_seed(0)
    ours = seqkernels.nn.GRU(6, 12, 3, bidirectional=bidirectional)
    theirs = torch.nn.GRU(6, 12, 3, bidirectional=bidirectional)
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("_l2" in name)
    x = torch.randn(4, 3, 6)
    output, _, traces = ours(x, return_gates=True)
    forward = len(launches)
    assert [trace.gates.requires_grad for trace in traces] == (
        [False, False, True] if not bidirectional else [False] * 4 + [True] * 2
    )
    output.square().sum().backward()
    assert sum(map(len, launches[forward:])) == (2 if bidirectional else 1)
    theirs(x)[0].square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None, name
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_explain():
    layer = seqkernels.nn.GRU(6, 12, 2, bidirectional=True)
    found = str(seqkernels.explain(layer, torch.randn(4, 3, 6)))
    assert found.count("2 x gru recurrence of torch.float32 on cpu -> cuda") == 2
    call = seqkernels.backends.Call("recurrence", "cpu", torch.float32, "gru", (), 12, 3, together=2)
    assert seqkernels.backends.backend("cuda").detail(call) == "a block each for 1 x 8 rows, 2 at once"
    assert seqkernels.backends.backend("cuda").detail(call._replace(together=9)).endswith(", 4 at once")
    # Of the emulated device's 12 multiprocessors each has a part of it.
    large = call._replace(hidden=600, dtype=torch.bfloat16)
    assert seqkernels.backends.backend("cuda").detail(large).endswith(", in turn")


def test_compiled(monkeypatch):
    monkeypatch.setattr("seqkernels._recurrent.serves", lambda *_: True)
    for settings, frozen in (
        ({"num_layers": 3, "dropout": 0.3}, ()),
        ({"num_layers": 3, "dropout": 0.3}, ("_l0", "_l1")),
        ({"bidirectional": True}, ()),
        ({"bidirectional": True}, ("_reverse",)),
    ):
        torch.manual_seed(0)
        layer = seqkernels.nn.GRU(6, 12, **settings)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not name.endswith(frozen))
        compiled = torch.compile(lambda x, layer=layer: layer(x)[0], fullgraph=True, backend="aot_eager")
        found = []
        for fn in (compiled, lambda x, layer=layer: layer(x)[0]):
            torch.manual_seed(1)
            x = torch.ones(4, 3, 6, requires_grad=not frozen)
            output = fn(x)
            leaves = [leaf for leaf in (x, *layer.parameters()) if leaf.requires_grad]
            found.append([output.detach(), *torch.autograd.grad(output.sum(), leaves)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
