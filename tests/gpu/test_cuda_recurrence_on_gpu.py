"""Persistent recurrences on a GPU, each tier forced, at and around what a device has room for.

A block that waits for another one for ten seconds ends its kernel: a protocol that hangs is a failed launch here,
not a machine that has to be restarted; every later test of the process fails with it.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import seqkernels
from seqkernels import testing
from seqkernels.backends.cuda import emulator
from seqkernels.backends.cuda import recurrence as of_cuda
from seqkernels.backends.cuda.extension import load_error
from seqkernels.cells import CELLS

from ..planned import PRODUCTS, Case, Judge, call_of, plan_of, run

pytestmark = pytest.mark.skipif(load_error() is not None, reason=str(load_error()))

#: Around tiles, one block, a cluster, and what registers hold.
SIZES = (1, 16, 17, 63, 64, 72, 127, 128, 129, 192, 256, 257, 512, 513, 640, 641, 768, 1024, 1800)
TIERS = ("block", "cluster", "grid")


def _fitting(cell, product, tier, hidden, batch):
    """Units of a block that the device has room for in both passes, fewest and most."""
    device = of_cuda.device_of(None)
    places = {"block": 1, "cluster": device.cluster, "grid": device.processors}[tier]
    whole, found = -(-hidden // 8) * 8, []
    for units in (whole,) if tier == "block" else (8, 16, 24, 32, 40, 48, 64, 80, 96, 128):
        if units > 256 or (tier == "cluster" and units >= whole) or (tier == "grid" and units >= whole + 16):
            continue
        plans = [plan_of(tier, cell, product, backward, hidden, batch, units, 8) for backward in (False, True)]
        if all(plan.blocks <= places and plan.shared_memory <= device.shared_memory for plan in plans):
            found.append(units)
    return sorted({found[0], found[-1]}) if found else []


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("cell", CELLS)
def test_sizes(cell, product, tier):
    judge, index = Judge(), 0
    for hidden in SIZES:
        for units in _fitting(cell, product, tier, hidden, 20):
            index += 1
            steps = 2 if cell == "rnn_relu" else 6
            case = Case(
                cell, product, tier, units, 8 * (1 + index % 2), (steps, 20, hidden), index % 3 == 1, index % 2 == 1
            )
            judge.run(case, "cuda")
    assert index > 0 or (tier == "cluster" and of_cuda.device_of(None).cluster == 0)
    if index:
        judge.verdict(PRODUCTS[product][0])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("cell", CELLS)
def test_norms(cell, product, tier):
    judge = Judge()
    for index, hidden in enumerate((17, 63, 72, 128, 300, 513)):
        for units in _fitting(cell, product, tier, hidden, 20):
            shape = (2 if cell == "rnn_relu" else 6, 20, hidden)
            options = (("norm_h",), ("norm_c",), ("norm_h", "norm_c", "reset_state"))[index % 3]
            case = Case(cell, product, tier, units, 8, shape, control=index % 2 == 0, options=options)
            plans = [case.plan(backward) for backward in (False, True)]
            if all(plan.shared_memory <= of_cuda.device_of(None).shared_memory for plan in plans):
                judge.run(case, "cuda")
    if tier != "cluster" or of_cuda.device_of(None).cluster:
        judge.verdict(PRODUCTS[product][0])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_ten_thousand_launches_have_the_same_bits(cell, tier):
    hidden = {"block": 64, "cluster": 256, "grid": 512}[tier]
    units = _fitting(cell, "bfloat16", tier, hidden, 16)
    if not units:
        pytest.skip("the device has no clusters")
    case = Case(cell, "bfloat16", tier, units[0], 8, (12, 16, hidden), control=True)
    call = call_of(case, "cuda")
    first, different = run(case, call), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(5000):  # two launches each
        for name, x in run(case, call).items():
            different += (x.view(torch.uint8) != first[name].view(torch.uint8)).sum()
    assert different.item() == 0


@pytest.mark.parametrize("tier", TIERS)
def test_seventy_thousand_steps(tier):
    units = _fitting("gru", "float16", tier, 40, 2)
    if not units:
        pytest.skip("the device has no clusters")
    case = Case("gru", "float16", tier, units[0], 8, (70_000, 2, 40), control=True)
    call = call_of(case, "cuda")
    # The reference would take minutes; that parts of it are right is known.
    whole, parts = run(case, call), run(case._replace(every=7001), call)
    for name in parts.keys() - {"reserve"}:
        assert whole[name].isfinite().all()
        assert torch.equal(whole[name], parts[name]), name


def test_blocks_that_find_no_place_are_refused():
    places = of_cuda.device_of(None).processors
    hidden = 8 * (places + 1)
    planned = lambda *call: plan_of("grid", *call[:-1], 8, 8, call[-1])  # noqa: E731
    layer = seqkernels.nn.RNN(4, hidden).to("cuda", torch.float16)
    x = torch.zeros(3, 2, 4, device="cuda", dtype=torch.float16)
    with seqkernels.use_backend("cuda"), emulator.planned(planned), pytest.raises(RuntimeError, match="at once"):
        layer(x)


def test_teams_without_a_place_take_turns():
    judge = Judge()
    places = of_cuda.device_of(None).processors
    batch = 8 * (places // 4) + 9
    judge.run(Case("lstm", "bfloat16", "grid", 16, 8, (5, batch, 64)), "cuda")
    judge.verdict(torch.bfloat16)


@pytest.mark.parametrize(("tier", "cell"), itertools.product(TIERS, ("lstm", "gru")))
def test_under_a_sanitizer(tier, cell):
    """Small ones, which `make gpu-test` runs under memcheck and racecheck too."""
    units = _fitting(cell, "bfloat16", tier, 72, 9)
    judge = Judge()
    for u in units:
        judge.run(Case(cell, "bfloat16", tier, u, 8, (4, 9, 72), control=True, options=("reset_state",)), "cuda")
    if units:
        judge.verdict(torch.bfloat16)


def _results(layer, x, grad):
    """The output and all gradients."""
    x = x.detach().requires_grad_()
    output = layer(x)[0]
    return [output.detach(), *torch.autograd.grad(output, [x, *layer.parameters()], grad)]


@pytest.mark.parametrize("settings", [{"num_layers": 3}, {"bidirectional": True}, {"num_layers": 6}], ids=str)
@pytest.mark.parametrize("hidden", [64, 320, 1024])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_layers_at_once_are_as_exact_as_in_turn(name, hidden, settings, monkeypatch):
    """Wavefronts and both directions; captured in a CUDA graph too."""
    torch.manual_seed(0)
    layer = getattr(seqkernels.nn, name)(48, hidden, **settings).to("cuda", torch.bfloat16)
    x = torch.randn(100, 16, 48, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(layer(x)[0])
    exact = getattr(torch.nn, name)(48, hidden, **settings).to("cuda", torch.float64)
    exact.load_state_dict(layer.state_dict())
    with seqkernels.use_backend("cuda"):
        found = _results(layer, x, grad)
        monkeypatch.setattr("seqkernels._recurrent.serves", lambda *_: False)
        in_turn = _results(layer, x, grad)
    names = ("output", "input", *(name for name, _ in layer.named_parameters()))
    for which, *three in zip(names, found, _results(exact, x.double(), grad.double()), in_turn, strict=True):
        testing.assert_within_budget(*three, which)
    monkeypatch.undo()
    layer.eval()
    with torch.no_grad(), seqkernels.use_backend("cuda"):
        expected = layer(x)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)[0]
        for _ in range(3):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, expected)
