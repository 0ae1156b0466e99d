"""Both ways through time of the Triton recurrence: a launch for each step, and a sequence of steps in a launch."""

from __future__ import annotations

import pytest
import torch

import seqkernels
from seqkernels import testing
from seqkernels.cells import CELLS, Weights
from seqkernels.ops.recurrence import recurrence

# T, B, H: several tiles of rows and of columns, one of each, and sizes that fill none.
SHAPES = [(3, 9, 40), (4, 5, 16), (1, 1, 1), (5, 4, 23), (2, 17, 65)]
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 2, 0)]


@pytest.fixture(params=["steps", "sequence"])
def path(request, monkeypatch):
    """Insists on one way; yields which were taken."""
    from seqkernels.backends.triton import recurrence_sequence, recurrence_steps

    taken = set()

    def noted(run, *key):
        def noting(*args):
            taken.add(key)
            run(*args)

        return noting

    for name, module in (("steps", recurrence_steps), ("sequence", recurrence_sequence)):
        for way in ("forward", "backward"):
            monkeypatch.setattr(module, way, noted(getattr(module, way), name, way))
    if request.param == "steps":
        monkeypatch.setattr(recurrence_sequence, "serves", lambda loop: False)
    with seqkernels.use_backend("triton"), testing.poisoned_empty():
        yield request.param, taken


def _options(cell, batch, hidden, dtype=torch.float32):
    names = ["weight_ih", "bias_ih", "reset_state", "recurrent_mask", "zoneout", "seed"]
    names += ["peephole"] if cell == "lstm" else []
    return testing.recurrence_options(cell, batch, hidden, dtype, names=names, input_size=6)


def _draws(cell, shape, dtype=torch.float32, **options):
    size = shape[0] * shape[1] * shape[2]
    count = min(16, 1 + 200 // max(size, 1))
    return [testing.recurrence_inputs(cell, *shape, dtype, seed=seed, **options) for seed in range(count)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_each_way_is_right(path, cell, shape):
    name, taken = path
    draws = _draws(cell, shape, control=shape[0] > 2, detach=True)
    testing.check_recurrence(*draws, cell=cell, reverse=shape[0] % 2 == 0)
    assert taken == {(name, "forward"), (name, "backward")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_each_way_with_options(path, cell, dtype):
    name, taken = path
    for reverse in (False, True):
        draws = _draws(cell, (3, 5, 40), dtype, control=True, detach=True, input_size=6)
        testing.check_recurrence(*draws, cell=cell, reverse=reverse, gates=True, **_options(cell, 5, 40, dtype))
    assert taken == {(name, "forward"), (name, "backward")}


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_to_do(path, cell, shape):
    _, taken = path
    inputs = testing.recurrence_inputs(cell, *shape, control=True, input_size=6)
    options = _options(cell, *shape[1:])
    testing.check_recurrence(inputs, cell=cell, **options)
    hidden, _, state_n = recurrence(*inputs, cell=cell, every=2, **options)
    (hidden.sum() + state_n.sum()).backward()
    assert not taken


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(path, layout):
    shape = (3, 5, 20)
    draws = _draws("gru", shape, control=True, layout=layout)
    outputs = testing.evaluate(testing.recurrence_oracle, draws[0], {}, cell="gru")
    testing.check_recurrence(*draws, cell="gru", grads=testing.random_grads(outputs, layout))


@pytest.mark.parametrize("cell", CELLS)
def test_checkpoints_change_no_bit(path, cell):
    inputs = testing.recurrence_inputs(cell, 5, 3, 20, torch.float16, control=True, detach=True, input_size=6)
    options = _options(cell, 3, 20, torch.float16)
    leaves = [x for x in (*inputs, *options.values()) if x is not None and x.requires_grad]

    def results(every):
        hidden, _, state_n = recurrence(*inputs, cell=cell, every=every, **options)
        grads = list(testing.random_grads({"hidden": hidden, "state_n": state_n}).values())
        return [hidden, state_n, *torch.autograd.grad((hidden, state_n), leaves, grads)]

    whole = results(0)
    for every in (2, 5):
        assert all(torch.equal(x, y) for x, y in zip(results(every), whole, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_one_launch_equals_a_launch_for_each_step(monkeypatch, cell, reverse):
    """One program for all hidden units may run a sequence, also where programs run one after the other."""
    from seqkernels.backends.triton import recurrence_sequence

    inputs = testing.recurrence_inputs(cell, 4, 6, 16, control=True, detach=True, input_size=6)
    options = {"cell": cell, "reverse": reverse, **_options(cell, 6, 16)}
    with seqkernels.use_backend("triton"):
        grads = testing.random_grads(testing.evaluate(recurrence, inputs, {}, **options))
        whole = testing.evaluate(recurrence, inputs, grads, **options)
        counts = []

        def steps(order, columns, rows, processors, backward=False):
            assert columns == 1
            found = list(launches(order, 2, rows, 0, backward))
            counts.append(len(found))
            return found

        launches = recurrence_sequence.launches
        monkeypatch.setattr(recurrence_sequence, "launches", steps)
        apart = testing.evaluate(recurrence, inputs, grads, **options)
    assert counts == [4, 5]
    assert all(torch.equal(x, apart[name]) for name, x in whole.items())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("columns", "rows", "processors"), [(1, 7, 132), (4, 7, 132), (64, 5, 132), (64, 5, 63), (2, 3, 0), (3, 9, 8)]
)
def test_launches_cover_every_step_of_every_row_once(columns, rows, processors, backward):
    from seqkernels.backends.triton.recurrence_sequence import launches

    order = range(9, 4, -1)
    every = list(launches(order, columns, rows, processors, backward))
    done = []
    for launch in every:
        assert launch.sync == (columns > 1 and launch.steps == len(order))
        assert not launch.sync or columns * launch.tiles <= processors
        for tile in range(launch.tile, launch.tile + launch.tiles):
            done += [(tile, launch.first - s) for s in range(launch.steps)]
    assert sorted(done) == sorted((tile, t) for tile in range(rows) for t in order)
    if columns > processors and columns > 1 and backward:
        # The product of a step is in the launch behind it, in the last one alone.
        assert [launch.after for launch in every] == [-1, *order]


def test_one_step_waits_for_nobody():
    """A cell is a launch: its programs do not meet, and are not held to what runs at once."""
    from seqkernels.backends.triton.recurrence_sequence import MOST_TILES, launches

    assert list(launches(range(3, 4), 64, 500, 132)) == [(3, 1, 0, 500, False, None)]
    rows = 2 * MOST_TILES + 5
    every = list(launches(range(3, 4), 64, rows, 132))
    assert [launch.tiles for launch in every] == [MOST_TILES, MOST_TILES, 5]
    assert [launch.sync for launch in launches(range(3, 4), 64, 1, 132, backward=True)] == [True]


def test_what_the_sequence_serves():
    from seqkernels.backends._through_time import Loop, _parts
    from seqkernels.backends.triton.recurrence_sequence import serves

    def loop(hidden, **options):
        weight = torch.empty(0)
        return Loop(None, weight, None, _parts(Weights(None, weight, **options)), "lstm", False, 1, 1, hidden)

    some = torch.zeros(2)
    assert serves(loop(1))
    assert serves(loop(1024, peephole=some, recurrent_mask=some, zoneout=some, reset_state=some))
    assert not serves(loop(1025))
    assert not serves(loop(8, norm_h=some))
    assert not serves(loop(8, norm_c=some))


def test_shared_memory_is_enough_for_what_stays(monkeypatch):
    import triton

    from seqkernels.backends.triton import recurrence_configs as configs

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for cell in CELLS:
        for hidden in (1, 64, 100, 256, 650, 1024):
            tiles = configs.sequence_tiles("backward", cell, torch.float16, hidden)
            weights = CELLS[cell].gates * hidden * min(tiles.columns, hidden) * 2
            assert weights < configs.shared_memory(cell, torch.float16, hidden) < 227 * 1024
            assert configs.shared_memory(cell, torch.float32, hidden) == 0
