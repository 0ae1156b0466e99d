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


def test_json(capsys):
    cli.main(["info", "--json"])
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["seqkernels"] == seqkernels.__version__
    assert info["versions"]["python"] == platform.python_version()
    assert info["versions"]["torch"] == str(torch.__version__)
    assert info["threads"] == torch.get_num_threads()
    assert info["cpu"]
    assert set(info["backends"]) == {op for op, _ in backends.PREFERENCE}
    for op, reasons in info["backends"].items():
        assert list(reasons) == list(backends.PREFERENCE[op, "cpu"])
        assert reasons["reference"] is None
        assert info["native"].get("unavailable") in (None, reasons["native"])


def test_json_of_the_compiled_module(compiled):
    native = cli.collect()["native"]
    if compiled:
        assert native["instruction_set"] in native["instruction_sets"]
        assert native["build"]["compiler"]
    else:
        assert "seqkernels._C" in native["unavailable"]


def test_text(capsys, compiled):
    cli.main(["info"])
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    assert lines["torch"] == str(torch.__version__)
    assert lines["recurrence: reference"] == lines["attention: reference"] == "available"
    assert ("compiled module" in lines) != compiled
    assert ("chosen" in lines) == compiled


def test_text_says_what_is_missing():
    info = cli.collect()
    info["versions"]["triton"] = None
    info["native"] = {"unavailable": "it was not built"}
    info["backends"]["attention"]["native"] = "it was not built"
    lines = [line.split() for line in cli.render(info).splitlines()]
    assert ["triton", "not", "installed"] in lines
    assert ["compiled", "module", "it", "was", "not", "built"] in lines
    assert ["attention:", "native", "it", "was", "not", "built"] in lines


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "seqkernels", "info", "--json"], capture_output=True, check=True)
    assert json.loads(done.stdout)["versions"]["seqkernels"] == seqkernels.__version__


def test_usage(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    assert "info" in capsys.readouterr().err
