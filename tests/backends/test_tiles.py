"""The file of a user's own tiles: where it is, what is in it, and when it is ignored."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import triton

import seqkernels
from seqkernels.backends.triton import configs, recurrence_configs, tiles
from seqkernels.cells import CELLS
from seqkernels.precision import PRECISIONS

CPU = torch.device("cpu")
ROWS = {"forward bf16 D=128": (64, 32, 4, 3), "recurrence_forward lstm fp16 H=256": (32, 64, 128, 2, 8)}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(triton.knobs.cache, "home_dir", str(tmp_path))
    tiles.ignore(False)
    yield tmp_path
    tiles.ignore()


@pytest.fixture
def written():
    path = tiles.path_of("interpreter")
    tiles.write(path, "interpreter", ROWS)
    return path


def test_where_the_file_is(monkeypatch):
    name = "NVIDIA H100 80GB HBM3 (a/b) sm_90"
    file = "triton-NVIDIA-H100-80GB-HBM3-a-b-sm_90.json"
    monkeypatch.setattr(triton.knobs.cache, "home_dir", "here")
    assert tiles.path_of(name) == Path("here", ".triton", "seqkernels", file)


def test_the_name_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert tiles.device_name(torch.device("cuda", 0)) == "NVIDIA A100 sm_80"
    assert tiles.device_name(CPU) == "interpreter"


@pytest.mark.parametrize("rows", [ROWS, {}], ids=["rows", "none"])
def test_what_is_written_is_read(cache, rows):
    path = cache / "new" / "triton-x.json"
    tiles.write(path, "x", rows)
    assert tiles.read(path) == rows
    assert list(path.parent.iterdir()) == [path]
    found = json.loads(path.read_text())
    assert found["seqkernels"] == seqkernels.__version__
    assert found["triton"] == triton.__version__
    assert found["device"] == "x"


def test_a_failed_replacement_leaves_nothing_behind(written, monkeypatch):
    def fail(*_):
        raise PermissionError("no")

    before = written.read_text()
    monkeypatch.setattr(tiles.os, "replace", fail)
    with pytest.raises(PermissionError):
        tiles.write(written, "interpreter", {})
    assert [path.read_text() for path in tiles.folder().iterdir()] == [before]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 0}, "it does not have format 1 of the table"),
        ({"triton": "2.0"}, f"it was measured with triton 2.0, and this is {triton.__version__}"),
        ({"rows": []}, "it has no rows"),
        ({"rows": {"forward bf16 D=64": [64, 32, 4]}}, r"its row 'forward bf16 D=64' is \[64, 32, 4\], not 4 integers"),
        ({"rows": {"forward bf16 D=64": [64, 32, 4, 2.0]}}, ".*, not 4 integers"),
        ({"rows": {"recurrence_forward lstm bf16 H=64": [1, 2, 3, 4]}}, ".*, not 5 integers"),
        (None, "it cannot be read"),
    ],
)
def test_what_is_ignored(written, change, why):
    """With one warning, by all calls."""
    text = "{" if change is None else json.dumps(json.loads(written.read_text()) | change)
    written.write_text(text)
    with pytest.warns(UserWarning, match=f"seqkernels ignores the tiles in .*triton-interpreter.json: {why}") as said:
        found = [configs.blocks_of("forward", torch.bfloat16, 128, 128, device=CPU) for _ in range(3)]
    assert len(said) == 1
    assert found == [configs.blocks_of("forward", torch.bfloat16, 128, 128)] * 3


def _attention(size, value_size=16, kernel="forward", dtype=torch.bfloat16, device=CPU, **options):
    found = configs.blocks_of(kernel, dtype, size, value_size, device=device, **options)
    return found.m, found.n, found.warps, found.stages


def test_which_calls_take_a_tile_of_attention(written):
    own = ROWS["forward bf16 D=128"]
    assert own not in (_attention(128, device=None), _attention(64), _attention(129), _attention(128, dtype=torch.half))
    assert own not in (_attention(128, many_terms=True), _attention(128, kernel="few_rows"))
    assert own == _attention(128) == _attention(16, 128) == _attention(128, shared=1)
    # Heads of other sizes, and pages, have rows of their own.
    assert own not in (_attention(65), _attention(128, pages=True))
    assert configs.blocks_of("forward", torch.bfloat16, 80, 16, device=CPU)[2:4] == (128, 16)


def test_which_calls_take_a_tile_of_a_recurrence(written):
    own = ROWS["recurrence_forward lstm fp16 H=256"]

    def tile(hidden, kernel="forward", cell="lstm", dtype=torch.half, device=CPU):
        found = recurrence_configs.sequence_tiles(kernel, cell, dtype, hidden, device=device)
        shipped = recurrence_configs.sequence_tiles(kernel, cell, dtype, hidden)
        assert (found.lanes, found.resident, found.stages) == (shipped.lanes, shipped.resident, shipped.stages)
        return found.rows, found.columns, found.depth, found.ahead, found.warps

    assert own == tile(256) == tile(129)
    assert own not in (tile(128), tile(257), tile(256, "backward"), tile(256, cell="gru"), tile(256, device=None))


def test_shared_memory_is_that_of_the_own_tile(written, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    arguments = ("lstm", torch.half, 256)
    assert recurrence_configs.shared_memory(*arguments, device=CPU) > recurrence_configs.shared_memory(*arguments)


def test_names_of_rows_are_those_of_the_tables():
    """Sizes that share a row have one name, and others have not."""
    for sizes in ((1, 16, 64), (65, 80, 128), (129, 256), (257, 512)):
        names = {tiles.attention_row("forward", torch.float16, size) for size in sizes}
        assert names == {f"forward fp16 D={sizes[-1]}"}
    for hidden in ((1, 16), (17, 32), (33, 64), (129, 256), (513, 1024)):
        names = {tiles.recurrence_row("backward", cell, torch.float32, size) for size in hidden for cell in CELLS}
        assert names == {f"recurrence_backward {cell} fp32 H={hidden[-1]}" for cell in CELLS}


def test_the_file_is_read_once(written):
    own = _attention(128)
    written.unlink()
    assert _attention(128) == own
    tiles.forget()
    assert _attention(128) != own


def test_own_tiles_may_be_ignored(written):
    own, before = _attention(128), tiles.changes()
    tiles.ignore()
    assert _attention(128) == _attention(128, device=None) != own
    tiles.ignore(False)
    assert _attention(128) == own
    assert tiles.changes() > before


def test_each_precision_has_tiles_of_its_own():
    names = {name: tiles.attention_row("forward", torch.float32, 64, name) for name in PRECISIONS}
    assert names == {"ieee": "forward fp32 D=64", "tf32": "forward tf32 D=64", "tf32x3": "forward tf32x3 D=64"}
    assert tiles.recurrence_row("forward", "gru", torch.float32, 64, "tf32") == "recurrence_forward gru tf32 H=64"


def test_a_tile_on_trial(written):
    own, shipped, row = ROWS["forward bf16 D=128"], _attention(128, device=None), "forward bf16 D=128"
    with tiles.trying(CPU, row, None):
        assert _attention(128) == shipped
        with tiles.trying(CPU, row, (16, 16, 1, 1)):
            assert _attention(128) == (16, 16, 1, 1)
        assert _attention(128) == shipped
    assert _attention(128) == own
    with pytest.raises(RuntimeError), tiles.trying(CPU, "forward bf16 D=64", (16, 16, 1, 1)):
        raise RuntimeError
    assert _attention(64) == _attention(64, device=None)


def test_reading_nothing_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _attention(128) == _attention(128, device=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tune_without_a_device():
    done = subprocess.run([sys.executable, "-m", "seqkernels", "tune"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("tune: ")
