"""``python -m seqkernels info``."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch

import seqkernels
from seqkernels import __main__ as cli
from seqkernels import backends
from seqkernels.backends.cuda import extension as cuda

from .conftest import INTERPRETED


def test_json(capsys):
    cli.main(["info", "--json"])
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["seqkernels"] == seqkernels.__version__
    assert info["versions"]["python"] == platform.python_version()
    assert info["versions"]["torch"] == str(torch.__version__)
    assert info["threads"] == torch.get_num_threads()
    assert info["cpu"]
    assert set(info["backends"]) == {op for op, _ in backends.PREFERENCE}
    for op, devices in info["backends"].items():
        assert list(devices) == ["cpu", "cuda"]
        assert list(devices["cpu"]) == list(backends.PREFERENCE[op, "cpu"])
        assert list(devices["cuda"]) == list(backends.PREFERENCE.get((op, "cuda"), backends.FALLBACK))
        assert devices["cpu"]["reference"] is None
        assert info["native"].get("unavailable") in (None, devices["cpu"]["native"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of the CPU")
def test_without_a_gpu():
    info = cli.collect()
    assert info["gpus"] == []
    triton = backends.why_not("triton", backends.Call("attention", "cuda", torch.float32))
    assert triton is not None
    for op in ("recurrence", "attention"):
        cuda = backends.why_not("cuda", backends.Call(op, "cuda", torch.float32, "lstm"))
        also = {"cuda": cuda} if op == "recurrence" else {}
        assert cuda is not None
        assert info["backends"][op]["cuda"] == {**also, "triton": triton, "reference": "there is no CUDA device"}
    lines = cli.render(info).splitlines()
    assert sum(line.startswith("attention on cuda: triton ") and line.endswith(triton) for line in lines) == 1
    assert ["gpu", "none"] in [line.split() for line in lines]


def test_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Device {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    info = cli.collect()
    assert info["gpus"] == ["Device 0 (sm_90)", "Device 1 (sm_91)"]
    lines = [line.split() for line in cli.render(info).splitlines()]
    assert ["gpu", "Device", "0", "(sm_90)"] in lines
    assert ["gpu", "Device", "1", "(sm_91)"] in lines


def test_json_of_the_compiled_module(compiled):
    native = cli.collect()["native"]
    if compiled:
        assert native["instruction_set"] in native["instruction_sets"]
        assert native["build"]["compiler"]
    else:
        assert "seqkernels._C" in native["unavailable"]


def test_json_of_the_cuda_module():
    found = cli.collect()["cuda"]
    if cuda.load_error() is None:
        assert found == {"build": cuda.extension().build_info(), "device": cuda.device_error()}
    else:
        assert found == {"unavailable": cuda.load_error()}
        assert "seqkernels._C_cuda" in cuda.load_error()


def test_text_of_the_cuda_module():
    info = cli.collect()
    for module, line in (
        ({"unavailable": "it was not built"}, ["CUDA", "module", "it", "was", "not", "built"]),
        ({"build": {"targets": "sm_90a sm_120"}, "device": "no driver"}, ["CUDA", "module", "no", "driver"]),
        ({"build": {"targets": "sm_90a sm_120"}, "device": None}, ["CUDA", "build:", "targets", "sm_90a", "sm_120"]),
    ):
        lines = [text.split() for text in cli.render({**info, "cuda": module}).splitlines()]
        assert line in lines
        assert (["CUDA", "module", "has", "a", "device"] in lines) == (module.get("device", "") is None)


def test_text(capsys, compiled):
    cli.main(["info"])
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    assert lines["torch"] == str(torch.__version__)
    assert lines["recurrence on cpu: reference"] == lines["attention on cpu: reference"] == "available"
    assert ("compiled module" in lines) != compiled
    assert ("chosen" in lines) == compiled


def test_text_says_what_is_missing():
    info = cli.collect()
    info["versions"]["triton"] = None
    info["native"] = {"unavailable": "it was not built"}
    info["backends"]["attention"]["cpu"]["native"] = "it was not built"
    lines = [line.split() for line in cli.render(info).splitlines()]
    assert ["triton", "not", "installed"] in lines
    assert ["compiled", "module", "it", "was", "not", "built"] in lines
    assert ["attention", "on", "cpu:", "native", "it", "was", "not", "built"] in lines


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "seqkernels", "info", "--json"], capture_output=True, check=True)
    assert json.loads(done.stdout)["versions"]["seqkernels"] == seqkernels.__version__


def test_usage(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    assert "info" in capsys.readouterr().err
