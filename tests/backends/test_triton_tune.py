"""``tune`` from the first call of a kernel to the file, with a clock that says what the test wants."""

from __future__ import annotations

import pytest
import torch
import triton

from seqkernels import __main__, testing
from seqkernels.backends.triton import attention, attention_kernels, tiles, tune, tune_cases
from seqkernels.backends.triton.launches import Launch
from seqkernels.cells import CELLS
from seqkernels.scores import Scores

from ..conftest import INTERPRETED

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
SIZES = tune_cases.Sizes(batch=2, width=32, length=20, cached=(2, 30), rows=3, steps=3)
ROW = "forward fp32 D=64"
FAST, SLOW = (16, 16, 1, 1), (64, 16, 1, 1)
KERNELS = ["forward", "few_rows", "backward_q", "backward_kv"]
ATTENTION = [name + more for name in KERNELS for more in ("", " of many terms")] + ["backward_bias"]


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    monkeypatch.setattr(triton.knobs.cache, "home_dir", str(tmp_path))
    tiles.ignore(False)
    yield tiles.path_of(tiles.device_name(DEVICE))
    tiles.ignore()


def _case(*near):
    """Attention of which these tiles are near every other."""
    return tune_cases.attention_case("forward", torch.float32, 16, SIZES)._replace(near=lambda tile: near)


def _clock(times):
    """Says how long the tile of a call takes; the shipped one 1."""
    return lambda run: times.get(tiles._rows_of(DEVICE).get(ROW), 1.0)


def _tiles_of_calls(monkeypatch):
    """Rows and keys of the tiles of each launch of the forward kernel to come."""
    seen = []

    class Noting(Launch):
        def __call__(self, *args):
            if self._kernel is attention_kernels.forward_kernel:
                seen.append((self._constants["BLOCK_M"], self._constants["BLOCK_N"]))
            super().__call__(*args)

    monkeypatch.setattr(attention, "Launch", Noting)
    # Plans that are there have launches that note nothing.
    tiles.forget()
    return seen


def test_from_the_search_to_the_next_call(file, monkeypatch):
    other = {"forward fp32 D=512": (16, 16, 8, 1)}
    tiles.write(file, tiles.device_name(DEVICE), other)
    launched = _tiles_of_calls(monkeypatch)
    times = {FAST[:2]: 0.5, SLOW[:2]: 2.0}

    def clock(run):
        before = len(launched)
        run()
        (tile,) = set(launched[before:])
        return times.get(tile, 1.0)

    (found,) = tune.tune([_case(FAST, SLOW)], DEVICE, clock=clock)
    shipped = found.shipped
    assert found == tune.Found(ROW, shipped, FAST, 2.0, 2)
    assert tiles.read(file) == {**other, ROW: FAST}
    tiles.forget()
    del launched[:]
    q, k, v = (torch.randn(1, 2, 40, 16, device=DEVICE) for _ in range(3))
    out, _ = attention.attention_forward(q, k, v, Scores(0.25))
    assert launched == [FAST[:2]]
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_search_goes_on_from_the_best(file):
    """And never comes back."""
    around = {(32, 16): [SLOW, FAST], FAST[:2]: [(16, 32, 1, 1)], (16, 32): [FAST, SLOW]}
    case = _case()._replace(near=lambda tile: around.get(tile[:2], []), shipped=lambda device: (32, 16, 1, 1))
    times = {FAST: 0.8, (16, 32, 1, 1): 0.5}
    (found,) = tune.tune([case], DEVICE, clock=_clock(times))
    assert (found.best, found.gain, found.tried) == ((16, 32, 1, 1), 2.0, 3)


@pytest.mark.parametrize(("time", "kept"), [(0.98, False), (0.96, True)])
def test_a_small_gain_is_none(file, time, kept):
    (found,) = tune.tune([_case(FAST)], DEVICE, clock=_clock({FAST: time}))
    assert tiles.read(file) == ({ROW: FAST} if kept else {})
    assert file.exists() == kept
    assert found.gain == (1 / time if kept else 1.0)


def test_a_row_that_is_measured_again(file):
    """Its own tile takes part, and goes where it is slow by now."""
    tiles.write(file, tiles.device_name(DEVICE), {ROW: FAST})
    (found,) = tune.tune([_case(SLOW)], DEVICE, clock=_clock({FAST: 0.5}))
    assert (found.best, found.tried) == (FAST, 2)
    assert tiles.read(file) == {ROW: FAST}
    (found,) = tune.tune([_case(SLOW)], DEVICE, clock=_clock({}))
    assert found.best == found.shipped
    assert tiles.read(file) == {}


def test_tiles_that_do_not_run_or_are_wrong(file, monkeypatch):
    def forward(q, k, v, scores):
        tile = tiles._rows_of(DEVICE).get(ROW)
        if tile == SLOW:
            raise triton.OutOfResources(300_000, 232_448, "shared memory")
        out, lse = genuine(q, k, v, scores)
        if tile == FAST:
            out[0, 0, 0] *= 1.001
        return out, lse

    genuine = attention.attention_forward
    monkeypatch.setattr(attention, "attention_forward", forward)
    (found,) = tune.tune([_case(FAST, SLOW)], DEVICE, clock=_clock({FAST: 0.1, SLOW: 0.1}))
    assert found.best == found.shipped
    assert found.tried == 0
    assert found.wrong == (FAST,)
    ((tile, why),) = found.passed_over
    assert tile == SLOW
    assert "Required: 300000, Hardware limit: 232448" in why
    assert not file.exists()


def test_tiles_that_are_wrong_with_other_options(file):
    """The next fastest is taken; what is slow anyway is not run with them."""
    ran = []

    def prepare(device):
        def checked():
            tile = tiles._rows_of(DEVICE).get(ROW)
            ran.append(tile)
            return [torch.ones(3, device=device) * (2 if tile == FAST else 1)]

        return tune_cases.Prepared(lambda: [torch.ones(3, device=device)], checked)

    other = (32, 32, 1, 1)
    case = _case(FAST, SLOW, other)._replace(prepare=prepare)
    (found,) = tune.tune([case], DEVICE, clock=_clock({FAST: 0.5, SLOW: 2.0, other: 0.8}))
    assert (found.best, found.tried, found.wrong) == (other, 3, (FAST,))
    assert ran == [None, FAST, other]


def test_a_row_whose_shipped_tile_does_not_run(file, monkeypatch):
    def forward(*_):
        raise triton.OutOfResources(300_000, 232_448, "shared memory")

    tiles.write(file, tiles.device_name(DEVICE), {ROW: FAST})
    monkeypatch.setattr(attention, "attention_forward", forward)
    (found,) = tune.tune([_case(FAST)], DEVICE, clock=_clock({}))
    assert "Hardware limit: 232448" in found.skipped
    assert found.skipped in tune.render([found])
    assert tiles.read(file) == {ROW: FAST}


def test_minutes(file):
    seconds = iter((0.0, 30.0, 61.0))
    cases = [_case(FAST)] * 3
    assert len(tune.tune(cases, DEVICE, clock=_clock({}), minutes=1, now=lambda: next(seconds))) == 1


def test_device_clock_measures_as_many_calls_as_take_long(monkeypatch):
    made = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(made)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 0.3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert tune.device_clock(lambda: made.append(0)) == pytest.approx(0.3)
    assert len(made) == 1 + 4 + 16


def test_render():
    found = tune.Found(ROW, (32, 16, 4, 2), (64, 16, 8, 3), 1.254, 7, ((SLOW, "no"),), (FAST,))
    lines = tune.render([found, found._replace(best=found.shipped, gain=1.0)]).splitlines()
    assert lines[1].split() == [*ROW.split(), "32x16x4x2", "64x16x8x3", "1.25", "7", "1"]
    assert lines[2].split() == [*ROW.split(), "32x16x4x2", "-", "-", "7", "1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ATTENTION)
def test_cases_of_attention(kernel, dtype, monkeypatch):
    _check(tune_cases.attention_case(kernel, dtype, 16, SIZES), (32, 32, 4, 1), monkeypatch)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("cell", CELLS)
def test_cases_of_recurrences(cell, kernel, monkeypatch):
    _check(tune_cases.recurrence_case(kernel, cell, torch.float16, 40, SIZES), (16, 32, 32, 0, 4), monkeypatch)


def _check(case, other, monkeypatch):
    """What is measured and what is checked take the row's tile, and another tile gives the same results."""
    asked = []
    own = tiles.own
    monkeypatch.setattr(tiles, "own", lambda device, name, *key: asked.append(name(*key)) or own(device, name, *key))
    with testing.poisoned_empty():
        prepared = case.prepare(DEVICE)
        for run in prepared:
            asked.clear()
            expected = run()
            assert case.row in asked
            assert expected
            with tiles.trying(DEVICE, case.row, other):
                assert not tune.differs(run(), expected, case.eps)
    assert case.shipped(DEVICE) not in case.near(case.shipped(DEVICE))


def test_every_row_has_a_case():
    rows = [case.row for case in tune_cases.cases()]
    # 16-bit dtypes, float32 and TF32; three TF32 products for heads up to 128 alone.
    assert len(rows) == len(set(rows)) == 4 * (9 * 4 + 4 * 5 * 2) + 9 * 2 + 4 * 5 * 2


def test_differs():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    x[3, 0], x[4, 0], x[5] = torch.inf, -torch.inf, 0.0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        eps = torch.finfo(dtype).eps
        assert not tune.differs([x * (1 + eps), x[0]], [x, x[0]], eps)
        wrong = x.clone()
        wrong[7] *= 1 + 200 * eps
        assert tune.differs([wrong], [x], eps)
        for place, value in (((3, 0), 5.0), ((9, 9), torch.nan), ((3, 0), -torch.inf), ((5, 5), 200 * eps)):
            wrong = x.clone()
            wrong[place] = value * (10 if place == (5, 5) else 1)
            assert tune.differs([wrong], [x], eps)


def test_near_attention():
    near = tune_cases.near_attention((64, 32, 4, 2))
    assert set(near) == {
        (32, 32, 4, 2), (128, 32, 4, 2), (64, 16, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (128, 16, 4, 2),
        (64, 32, 2, 2), (64, 32, 8, 2), (64, 32, 4, 1), (64, 32, 4, 3),
    }  # fmt: skip
    assert {tile[0] for tile in tune_cases.near_attention((16, 64, 4, 3), few=True)} == {16}
    assert all(16 <= m <= 256 and 16 <= n <= 256 for m, n, _, _ in tune_cases.near_attention((16, 16, 4, 1)))


def test_near_recurrence():
    assert set(tune_cases.near_recurrence((16, 32, 128, 0, 4), 256, True)) == {
        (32, 32, 128, 0, 4), (16, 16, 128, 0, 4), (16, 64, 128, 0, 4), (16, 32, 64, 0, 4), (16, 32, 256, 0, 4),
        (16, 32, 128, 1, 4), (16, 32, 128, 0, 2), (16, 32, 128, 0, 8),
    }  # fmt: skip
    assert {tile[3] for tile in tune_cases.near_recurrence((16, 16, 16, 0, 4), 64, False)} == {0}


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")
def test_the_command_in_the_interpreter(capsys):
    with pytest.raises(SystemExit) as status:
        __main__.main(["tune"])
    assert status.value.code == 1
    said = "tune: Triton's interpreter is on (TRITON_INTERPRET), which has no times to measure\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "no such row"], "no row has 'no such row' in its name"),
        (["--device", "cpu"], "device: expected one of 1 CUDA devices, got 'cpu'"),
        (["--device", "cuda:1"], "device: expected one of 1 CUDA devices, got 'cuda:1'"),
        (["--device", "gpu"], "device: expected a CUDA device, got 'gpu'"),
        (["--minutes", "0"], "minutes: expected a positive number, got 0.0"),
    ],
)
def test_arguments_of_the_command(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for name, found in (("is_available", True), ("device_count", 1), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    with pytest.raises(SystemExit) as status:
        __main__.main(["tune", *arguments])
    assert status.value.code == 1
    assert capsys.readouterr().err == f"tune: {said}\n"


def test_the_command(file, monkeypatch, capsys):
    """With a device that is said to be there."""
    monkeypatch.setattr(tune_cases, "cases", lambda: iter([_case(FAST), _case(FAST)._replace(row="another")]))
    wrong = tune.Found(ROW, (32, 16, 1, 1), FAST, 1.5, 3, wrong=(SLOW,))
    monkeypatch.setattr(tune, "tune", lambda wanted, device, minutes: [wrong][: len(wanted)])
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for name, found in (("is_available", True), ("device_count", 1), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    monkeypatch.setattr(torch.cuda, "device", lambda device: testing.threads(1))
    monkeypatch.setattr(tiles, "device_name", lambda device: "interpreter")
    tiles.write(tiles.path_of("interpreter"), "interpreter", {ROW: FAST})
    with pytest.raises(SystemExit) as status:
        __main__.main(["tune", "--minutes", "3"])
    assert status.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-3:] == ["1.50", "3", "0"]
    assert lines[2:] == [
        f"{ROW}: tile 64x16x1x1 has other results than the shipped one",
        "1 of 2 rows were not measured in 3 minutes",
        f"rows in {tiles.path_of('interpreter')}: 1",
    ]
