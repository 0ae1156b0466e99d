"""The recurrences of the CUDA module with plans that the test chooses, run by their emulation."""

from __future__ import annotations

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from seqkernels import testing
from seqkernels.backends.cuda import emulator
from seqkernels.backends.cuda import recurrence as of_cuda
from seqkernels.backends.cuda.persistent import Persistent
from seqkernels.cells import CELLS

from ..planned import OPTIONS, PRODUCTS, Case, Judge, call_of, run

pytestmark = pytest.mark.skipif(not emulator.in_use(), reason="the emulator was not built, or there is a GPU")

#: Around the sizes of tiles and of what blocks have.
EDGES = (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 130)
UNITS = {"block": (0,), "cluster": (16, 32, 48), "grid": (16, 32, 48), "steps": (0,)}
TEAMS = [tier for tier in UNITS if tier != "steps"]
CHOICES = [(), OPTIONS, ("reset_state", "zoneout"), ("recurrent_mask",), ("zoneout", "seed"), ("peephole",)]
NORMS = [("norm_h",), ("norm_c",), ("norm_h", "norm_c"), OPTIONS, ("norm_h", "norm_c", "peephole", "reset_state")]
#: Hidden units and those of a block, of which the last one's are not all there, down to one; and a whole one.
UNEVEN = [(9, 8), (17, 16), (21, 16), (33, 32), (47, 24), (48, 16), (70, 24), (75, 8)]


def _whole(hidden):
    return -(-hidden // 16) * 16


@pytest.fixture(autouse=True)
def _one_thread():
    with testing.threads(1):
        yield


def _steady(case):
    """The case, or one like it without steps that are made again from what was rounded to 16 bits.

    Elements of `rnn_relu` may then be on the other side of 0; `rnn_tanh` runs the same text. The gradients of an RNN's
    gates and of its states are added up before the loop, and rounded to 16 bits there: float32 shows that they are.
    """
    if case.cell.startswith("rnn") and case.dtype.itemsize == 2:
        case = case._replace(others=False)
    if case.cell == "rnn_relu" and case.dtype.itemsize == 2:
        return case._replace(every=0, options=tuple(name for name in case.options if name not in ("zoneout", "seed")))
    return case


def _case(index, cell, product, tier, units, hidden):
    """Shapes and options, others for each index."""
    steps, batch = ((1, 3), (4, 9), (3, 1), (2, 8), (5, 17))[index % 5]
    return _steady(
        Case(
            cell,
            product,
            tier,
            units or _whole(hidden),
            rows=(8, 16)[(index + index // 7) % 2],
            shape=(steps, batch, hidden),
            reverse=index // 2 % 2 == 1,
            control=index % 3 == 1,
            options=CHOICES[index % len(CHOICES)],
            every=(0, 0, 2)[index // 5 % 3],
            others=index % 4 < 2,
            seed=index,
        )
    )


@pytest.mark.parametrize("tier", UNITS)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("cell", CELLS)
def test_edges(cell, product, tier):
    judge = Judge()
    for index, (hidden, units) in enumerate(itertools.product(EDGES, UNITS[tier])):
        if tier == "cluster" and hidden <= units:
            continue  # a cluster has several blocks
        judge.run(_case(index, cell, product, tier, units, hidden))
    judge.verdict(PRODUCTS[product][0])


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=50)
def test_any_sizes(data):
    """Those that nobody chose by hand; errors are judged beside those of a case of a usual size."""
    cell, product = (
        data.draw(st.sampled_from(list(CELLS)), "cell"),
        data.draw(st.sampled_from(list(PRODUCTS)), "product"),
    )
    tier = data.draw(st.sampled_from(list(UNITS)), "tier")
    hidden = data.draw(st.integers(9 if tier == "cluster" else 1, 96), "hidden")
    units = _whole(hidden) if tier == "block" else 8 * data.draw(st.integers(1, 10), "units")
    if tier == "cluster":
        units = min(units, (hidden - 1) // 8 * 8)  # a cluster has several blocks
    judge = Judge()
    case = Case(
        cell,
        product,
        tier,
        units=units,
        rows=8 * data.draw(st.integers(1, 3), "rows"),
        shape=(data.draw(st.integers(1, 7), "steps"), data.draw(st.integers(1, 27), "batch"), hidden),
        reverse=data.draw(st.booleans(), "reverse"),
        control=data.draw(st.booleans(), "control"),
        options=tuple(sorted(data.draw(st.sets(st.sampled_from(OPTIONS)), "options"))),
        every=data.draw(st.integers(0, 3), "every"),
        others=data.draw(st.booleans(), "others"),
    )
    # Norms divide by a deviation that is now and then small: the errors have outliers.
    for seed in range(10 if {"norm_h", "norm_c"} & set(case.options) else 3):
        judge.run(_steady(case._replace(seed=seed)))
    judge.run(_steady(case._replace(shape=(7, 9, 40), units=48, tier="block", rows=8, seed=1)))
    judge.verdict(PRODUCTS[product][0])


@pytest.mark.parametrize("tier", TEAMS)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("cell", CELLS)
def test_norms(cell, product, tier):
    """With blocks that have units to spare, which no mean may count."""
    judge = Judge()
    for index, (hidden, units) in enumerate(UNEVEN):
        case = _case(index, cell, product, tier, 0 if tier == "block" else units, hidden)
        judge.run(_steady(case._replace(control=index % 2 == 0, options=NORMS[index % len(NORMS)])))
    judge.verdict(PRODUCTS[product][0])


@pytest.mark.parametrize("tier", TEAMS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_norms_of_long_loops(cell, tier):
    """Again and again the same places for what blocks give each other; and the same bits each time."""
    case = Case(cell, "exact", tier, 16 if tier == "block" else 8, 8, (40, 3, 12), control=True, options=NORMS[2])
    judge = Judge()
    first = judge.run(case)
    judge.verdict(case.dtype)
    again = judge.run(case)
    assert all(torch.equal(first[name], again[name]) for name in first)
    parts = judge.run(case._replace(every=11))
    assert all(torch.equal(first[name], parts[name]) for name in first if name not in ("states", "reserve"))


#: Of more blocks than a warp has lanes.
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_norms_of_many_blocks(cell):
    judge = Judge()
    judge.run(Case(cell, "exact", "grid", 8, 16, (3, 9, 275), options=NORMS[2], others=True))
    judge.verdict(torch.float32)


def test_a_plan_has_the_norms_of_its_call():
    case = Case("lstm", "exact", "block", 16, 8, (2, 3, 10), options=NORMS[2])
    call = call_of(case)
    for names, message in ((("norm_h",), "norm_c: expected None, as"), (OPTIONS, "norm_c: expected a tensor, as")):
        other = call._replace(weights=call.weights._replace(norm_c=None)) if names == OPTIONS else call
        path = Persistent(
            of_cuda.kernels(), lambda _, backward, names=names: case._replace(options=names).plan(backward)
        )
        with pytest.raises(ValueError, match=message):
            run(case, other, path)


#: Plans with what small ones lack.
LARGE = [
    ("lstm", "exact", "grid", 16, 8, (3, 5, 600)),
    ("lstm", "bfloat16", "cluster", 16, 8, (3, 5, 300)),
    ("lstm", "exact", "block", 144, 8, (3, 5, 135)),
    ("lstm", "float16", "block", 256, 8, (3, 9, 250)),
    ("gru", "tf32x3", "block", 144, 8, (3, 5, 144)),
    ("gru", "exact", "grid", 64, 64, (4, 70, 200)),
    ("gru", "bfloat16", "grid", 32, 8, (3, 5, 1100)),
    ("lstm", "tf32x3", "cluster", 64, 32, (4, 40, 190)),
    ("rnn_tanh", "tf32x3", "grid", 16, 8, (3, 5, 530)),
    ("rnn_relu", "exact", "grid", 48, 8, (3, 20, 560)),
    ("gru", "float16", "cluster", 48, 8, (3, 5, 200)),
    ("rnn_tanh", "float16", "grid", 128, 16, (3, 20, 1050)),
    ("lstm", "float16", "grid", 48, 8, (3, 5, 200)),
]


@pytest.mark.parametrize("large", LARGE, ids=str)
def test_large(large):
    judge = Judge()
    judge.run(Case(*large, control=True, options=("reset_state",), others=True))
    judge.verdict(PRODUCTS[large[1]][0])


def test_large_ones_have_what_small_ones_lack():
    seen = set()
    for large, backward in itertools.product(LARGE, (False, True)):
        plan = Case(*large).plan(backward)
        seen |= {
            (backward, name)
            for name, has in {
                "tall": plan.tall,
                "tail": plan.tail_tiles > 0,
                "batches": plan.batches > 1,
                "warps share rows": plan.column_warps > 1,
                "idle warps": plan.row_warps * plan.column_warps < 8,
                "two stages": plan.stages == 2,
                "three stages": plan.stages == 3,
                "slices": plan.slices > 1,
            }.items()
            if has
        }
    assert len(seen) == 15, sorted(seen)  # no forward pass is tall
