"""The micro-benchmarks of exchanges between blocks, as far as it goes without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cuda_latency  # noqa: E402

NVCC = cuda_latency.find_nvcc()
with_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
LINE = {"exchange": "flags", "teams": 1, "blocks": 8, "bytes": 512, "ns": 1500.5, "cycles": 2600, "wrong": 0}


@with_nvcc
def test_clusters_compile_where_there_are_none(tmp_path):
    assert cuda_latency.build(NVCC, "cluster", "sm_80", tmp_path).exists()


@with_nvcc
def test_dry(capsys, tmp_path):
    assert cuda_latency.main(["--dry", "--only", "cluster", "--json", str(tmp_path / "found.json")]) == 0
    assert capsys.readouterr().out == "cluster.cu compiles for sm_90a\n"
    assert not list(tmp_path.iterdir())


@with_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys):
    assert cuda_latency.main(["--arch", "sm_80", "--only", "grid"]) == 1
    assert "cuda_latency: grid-sm_80: cudaDeviceGetAttribute: " in capsys.readouterr().err


def _program(folder, *lines):
    program = folder / "program"
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(map(json.dumps, lines)) + "\nEND\n")
    program.chmod(0o755)
    return program


def test_results(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_latency, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_latency, "build", lambda *_: _program(tmp_path, LINE, LINE | {"blocks": 16}))
    assert cuda_latency.main(["--only", "grid", "--json", str(tmp_path / "report" / "found.json")]) == 0
    found = json.loads((tmp_path / "report" / "found.json").read_text())
    assert found["rows"] == [LINE, LINE | {"blocks": 16}]
    assert capsys.readouterr().out.splitlines()[2].split() == ["flags", "1", "16", "512", "1500", "2600"]


def test_what_came_wrong_is_no_result(tmp_path):
    with pytest.raises(RuntimeError, match="program: 3 wrong of Row"):
        cuda_latency.measure(_program(tmp_path, LINE, LINE | {"wrong": 3}))


def test_arguments_are_checked(capsys, monkeypatch):
    monkeypatch.setattr(cuda_latency, "find_nvcc", lambda: "nvcc")
    assert cuda_latency.main(["--only", "ring"]) == 1
    assert "--only: expected a part of cluster, grid, got 'ring'" in capsys.readouterr().err
    monkeypatch.setattr(cuda_latency, "find_nvcc", lambda: None)
    assert cuda_latency.main([]) == 1
    assert "there is no nvcc" in capsys.readouterr().err
