"""Which tier serves a recurrence, and how it is cut, for devices that are not here."""

from __future__ import annotations

import importlib.util

import pytest

from seqkernels.cells import CELLS

if importlib.util.find_spec("seqkernels._emulator") is None:
    pytest.skip("the emulator was not built (SEQKERNELS_EMULATOR=1)", allow_module_level=True)

from seqkernels import _emulator
from seqkernels.backends.cuda.plans import (
    EXCHANGE,
    LAUNCHES,
    STEPS,
    Device,
    Norms,
    choose,
    cycles,
    cycles_of_steps,
    describe,
)

H100 = Device(capability=90, processors=132, shared_memory=227 * 1024, cluster=16)
A100 = Device(capability=80, processors=108, shared_memory=163 * 1024, cluster=0)
SMALL = Device(capability=120, processors=30, shared_memory=99 * 1024, cluster=8)
PRODUCTS = ("float16", "bfloat16", "tf32x3", "exact")


def _plan(device, cell, product, backward, hidden, batch):
    return choose(_emulator, device, cell, product, backward, hidden, batch).plan


@pytest.mark.parametrize("device", [H100, A100, SMALL], ids=["H100", "A100", "small"])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_chosen_fits_the_device(device, cell):
    for product in PRODUCTS:
        for hidden in (1, 15, 16, 17, 72, 128, 129, 192, 256, 300, 512, 640, 739, 1024, 1800, 2112):
            for batch in (1, 8, 9, 40, 128, 1000):
                for backward in (False, True):
                    plan = _plan(device, cell, product, backward, hidden, batch)
                    if plan.tier == "steps":
                        assert hidden > 64
                        continue
                    assert plan.shared_memory <= device.shared_memory
                    assert plan.blocks * plan.units >= hidden > (plan.blocks - 1) * plan.units
                    assert plan.slices * plan.rows >= batch > (plan.slices - 1) * plan.rows
                    most = {"block": 1, "cluster": device.cluster, "grid": device.processors}[plan.tier]
                    assert 1 <= plan.blocks <= most
                    assert plan.row_warps * plan.column_warps <= 8
                    assert plan.stages in (2, 3)


@pytest.mark.parametrize(
    ("cell", "product", "hidden", "tier"),
    [
        ("lstm", "bfloat16", 72, "block"),
        ("lstm", "bfloat16", 512, "cluster"),
        ("gru", "float16", 512, "cluster"),
        ("lstm", "bfloat16", 1024, "grid"),
        ("lstm", "float16", 1800, "grid"),
        ("lstm", "exact", 1024, "grid"),
    ],
)
def test_tiers_of_a_hopper_gpu(cell, product, hidden, tier):
    for backward in (False, True):
        assert _plan(H100, cell, product, backward, hidden, 16).tier == tier


def test_without_clusters_there_are_none():
    for hidden in (64, 256, 1024):
        assert _plan(A100, "lstm", "bfloat16", False, hidden, 16).tier in ("block", "grid")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("device", "product", "hidden", "batch"),
    [
        (SMALL, "exact", 4096, 8),
        (A100, "bfloat16", 2048, 1),
        (H100, "bfloat16", 3000, 16),
        (H100, "float16", 1 << 15, 1),
        (H100, "bfloat16", 1024, 512),
        (H100, "bfloat16", 2048, 256),
        (A100, "bfloat16", 1024, 256),
    ],
)
def test_weights_that_fit_nowhere_and_many_rows_go_by_steps(device, product, hidden, batch, backward):
    assert _plan(device, "lstm", product, backward, hidden, batch) is STEPS


def test_an_estimate_of_steps_grows_with_what_they_do():
    found = [
        cycles_of_steps("lstm", "bfloat16", hidden, batch, H100) for hidden, batch in ((64, 1), (64, 512), (512, 512))
    ]
    assert LAUNCHES < found[0] < found[1] < found[2]
    half, whole = (cycles_of_steps("lstm", product, 512, 512, H100) for product in ("bfloat16", "exact"))
    assert whole > 2 * half
    old, new = (cycles_of_steps("lstm", "bfloat16", 512, 512, device) for device in (A100, H100))
    assert old > new


def test_a_plan_in_words():
    plan = _plan(H100, "lstm", "bfloat16", False, 512, 16)
    assert describe(plan) == "cluster of 16 blocks with 32 units each, for 2 x 8 rows"
    assert describe(_plan(H100, "lstm", "bfloat16", False, 64, 3)) == "a block each for 1 x 8 rows"
    assert describe(STEPS) == "a product and a fused cell a step, in a CUDA graph"


def test_more_turns_take_more_cycles():
    few, many = (_emulator.plan("cluster", "lstm", "bfloat16", False, 512, batch, 32, 8) for batch in (56, 57))
    assert cycles(many, "bfloat16", H100) == 2 * cycles(few, "bfloat16", H100)


def test_norms_take_exchanges_and_memory():
    for tier in EXCHANGE:
        units = 64 if tier == "block" else 32
        for backward in (False, True):
            plain, one, both = (
                _emulator.plan(tier, "lstm", "bfloat16", backward, 64, 16, units, 8, *norms)
                for norms in ((False, False), (False, True), (True, True))
            )
            assert (plain.norms, one.norms, both.norms) == (0, 1, 2)
            assert plain.shared_memory < one.shared_memory < both.shared_memory
            # A pair of each norm, row and block, whichever of the norms there are.
            more = 2 * 2 * plain.rows * plain.blocks * 8 if tier == "grid" else 0
            assert one.exchange_bytes == both.exchange_bytes == plain.exchange_bytes + more
            costs = [cycles(plan, "bfloat16", H100) for plan in (plain, one, both)]
            assert costs[1] - costs[0] == costs[2] - costs[1] > EXCHANGE[tier]


def test_what_is_chosen_for_norms_fits_the_device():
    for hidden in (16, 128, 300, 640, 1024):
        for backward in (False, True):
            plan = choose(_emulator, H100, "lstm", "bfloat16", backward, hidden, 16, Norms(True, True)).plan
            assert plan.norms == 2
            assert plan.shared_memory <= H100.shared_memory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("block", "gru", "exact", False, 8, 8, 16, 8, True, True), "norm_c: expected False but for an LSTM, got True"),
        (
            ("cloud", "lstm", "exact", False, 8, 8, 16, 8),
            "tier: expected one of 'block', 'cluster', 'grid', got 'cloud'",
        ),
        (
            ("block", "lstm", "fp8", False, 8, 8, 16, 8),
            "product: expected one of 'float16', 'bfloat16', 'tf32x3', 'exact'",
        ),
        (("block", "lstm", "exact", False, 8, 8, 15, 8), "units: expected a multiple of 8 up to 256, got 15"),
        (("block", "lstm", "exact", False, 8, 8, 16, 7), "rows: expected a multiple of 8 up to 64, got 7"),
        (("block", "lstm", "exact", False, 17, 8, 16, 8), "units: expected all 17 where the tier is 'block', got 16"),
        (("grid", "lstm", "exact", False, 0, 8, 16, 8), "hidden: expected 1 or more, got 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        _emulator.plan(*arguments)
