"""``python -m seqkernels info --check``: what is well is said to be, and what is broken too."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch

from seqkernels import __main__ as cli
from seqkernels import backends
from seqkernels.backends.reference import attention, recurrence
from seqkernels.testing import doctor
from seqkernels.testing.selftest import NOT_RUN, OK, WRONG, Row, selftest

from .conftest import INTERPRETED

HERE = [name for name in ("native", "reference") if backends.backend(name).unavailable() is None]
CASES = ["rnn", "lstm", "gru", "attention, causal", "attention, masked", "rotary"]
FINE = Row("lstm", "native", "cpu", "float32", OK, "out", 0.5, 0.1)


def reference(*cases):
    return [row for row in selftest(["reference"], [torch.float32]) if not cases or row.case in cases]


def run(monkeypatch, names, *words):
    """The exit status of the command with few implementations."""
    few = functools.partial(selftest, names, [torch.float32])
    monkeypatch.setattr("seqkernels.testing.selftest.selftest", few)
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", "--check", *words])
    return stop.value.code


@pytest.fixture
def healthy(monkeypatch):
    """A machine without anything to be said of it."""
    for part in ("_torch", "_native", "_gpu", "_openmp"):
        monkeypatch.setattr(doctor, part, list)


def test_all_is_well():
    rows = list(selftest(HERE))
    assert len(rows) >= len(HERE) * len(CASES) * 2
    assert {row.case for row in rows} == set(CASES)
    assert {row.dtype for row in rows} == {"float32", "bfloat16"}
    assert [row for row in rows if row.state != OK and row.device == "cpu"] == []
    assert all(0 < row.share <= 1 for row in rows if row.state == OK)


def test_every_implementation_is_there():
    rows = {}
    for name in backends.NAMES:
        found = next(selftest([name], [torch.float32])) if name != "numba" else FINE
        rows[name] = found
        if backends.backend(name).unavailable() is not None:
            assert found[:5] == ("everything", name, "", "", NOT_RUN)
            assert found.detail == backends.backend(name).unavailable()
    assert rows["reference"].case == "rnn"


def test_what_a_backend_does_not_have_is_not_run():
    judged = {row.case: row for row in selftest(["numba"], [torch.float32]) if row.case in ("rotary", "everything")}
    assert {row.state for row in judged.values()} == {NOT_RUN}
    if "rotary" in judged:
        assert judged["rotary"].detail == "has no kernel for rotary"


def broken_forward(change):
    def call(*args, **kwargs):
        states, state_n, reserve = whole(*args, **kwargs)
        return change(states), state_n, reserve

    whole = recurrence.recurrence_forward
    return call


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x * 1.001, "hidden: max error"),
        (lambda x: torch.where(x == x.max(), torch.nan, x), "being NaN or infinite"),
        (lambda x: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["inexact", "nan", "raises"],
)
def test_a_broken_implementation_is_found(change, words, monkeypatch, capsys):
    monkeypatch.setattr(recurrence, "recurrence_forward", broken_forward(change))
    rows = reference()
    assert {row.case for row in rows if row.state == WRONG} == {"rnn", "lstm", "gru"}
    assert all(words in row.detail for row in rows if row.state == WRONG)
    assert run(monkeypatch, ["reference"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "broken: 3 of 6 cases are wrong"
    assert sum("!! reference is wrong: " in line for line in lines) == 1


def test_a_broken_gradient_is_found(monkeypatch):
    whole = attention.attention_backward
    monkeypatch.setattr(attention, "attention_backward", lambda *args: (whole(*args)[0] * 1.01, *whole(*args)[1:]))
    rows = {row.case: row for row in reference()}
    for case in ("attention, causal", "attention, masked"):
        assert rows[case].state == WRONG
        assert "grad_q: max error" in rows[case].detail
        assert rows[case].share > 1
    assert rows["lstm"].state == OK


def test_json(monkeypatch, capsys, healthy):
    assert run(monkeypatch, ["reference"], "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["torch"] == str(torch.__version__)
    check = info["check"]
    assert check["healthy"] is True
    assert check["advice"] == []
    assert check["verdict"].startswith("healthy: all ")
    assert [case["case"] for case in check["cases"] if case["device"] == "cpu"] == CASES
    assert all(case["state"] == "ok" and 0 < case["share"] <= 1 for case in check["cases"])


def test_json_of_what_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(recurrence, "recurrence_forward", broken_forward(lambda x: x * torch.nan))
    assert run(monkeypatch, ["reference"], "--json") == 1
    check = json.loads(capsys.readouterr().out)["check"]
    assert check["healthy"] is False
    assert [(case["state"], case["share"]) for case in check["cases"]][:3] == [("wrong", None)] * 3


def test_text(monkeypatch, capsys, healthy):
    assert run(monkeypatch, HERE) == 0
    lines = capsys.readouterr().out.splitlines()
    line = re.compile(r"attention, causal +reference +cpu +float32 +ok +0\.\d\d of the error budget")
    assert any(map(line.match, lines))
    assert re.fullmatch(
        rf"healthy: all \d+ cases are within their error budgets, on {', '.join(HERE)}, in \d\.\d s", lines[-1]
    )


def test_info_alone_stays_fast(monkeypatch, capsys):
    monkeypatch.setattr("seqkernels.testing.selftest.selftest", lambda: pytest.fail("the test was run"))
    cli.main(["info"])
    assert "budget" not in capsys.readouterr().out


def test_torch_too_old(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu130")
    (advice,) = doctor._torch()
    assert advice == ("torch is 2.10.1+cu130, older than 2.11: pip install 'torch>=2.11'", True)
    found = doctor.diagnose([FINE])
    assert not found.healthy
    assert found.verdict == "broken: 1 to mend, see above"
    for version in ("2.11.0", "2.13.0+cpu", "3.0.1"):
        monkeypatch.setattr(torch, "__version__", version)
        assert doctor._torch() == []


def test_least_torch_is_that_of_the_package():
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    assert f'torch>={".".join(map(str, doctor.LEAST_TORCH))}"' in pyproject.read_text()


def test_compiled_module_missing(monkeypatch):
    monkeypatch.setattr(backends.backend("native"), "unavailable", lambda: "it was not built")
    monkeypatch.setattr(backends, "_choices", {})
    (advice,) = doctor._native()
    assert not advice.broken
    assert advice.text.startswith("it was not built; ")
    assert "does its work, slower: SEQKERNELS_BUILD=1 pip install ." in advice.text


@pytest.mark.skipif("native" not in HERE, reason="the compiled module is not there")
def test_compiled_module_too_old(monkeypatch):
    assert doctor._native() == []
    monkeypatch.delattr("seqkernels._C.rotary")
    (advice,) = doctor._native()
    assert advice.broken
    assert advice.text.startswith("the compiled module is older than the package, it lacks rotary: SEQKERNELS_BUILD=1")


@pytest.mark.skipif(INTERPRETED, reason="triton's interpreter is on")
def test_gpu_without_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends.backend("triton"), "unavailable", lambda: "triton cannot be imported: no")
    assert doctor._gpu() == [
        ("there is a GPU, but triton cannot be imported: no: pip install 'seqkernels[triton]'", False)
    ]


def test_gpu_without_torch_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "_has_nvidia", lambda: True)
    (advice,) = doctor._gpu()
    assert advice.text.startswith("there is an NVIDIA GPU, but torch ")
    monkeypatch.setattr(doctor, "_has_nvidia", lambda: False)
    assert doctor._gpu() == []


def test_openmp_runtimes(monkeypatch):
    for path in doctor._runtimes():
        assert Path(path).name.startswith(("libgomp", "libomp", "libiomp"))
        assert Path(path).exists()
    monkeypatch.setattr(doctor, "_runtimes", lambda: ["/a/libgomp.so.1"])
    assert doctor._openmp() == []
    monkeypatch.setattr(doctor, "_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    (advice,) = doctor._openmp()
    assert "2 OpenMP runtimes are loaded" in advice.text
    assert "import torch first" in advice.text
    assert not advice.broken


def test_a_cold_cache_is_told(healthy):
    rows = [FINE, FINE._replace(backend="numba", seconds=7.4), FINE._replace(backend="numba")]
    found = doctor.diagnose(rows)
    assert [advice.text for advice in found.advice] == ["numba compiled kernels for 7 s, once: its cache has them now"]
    assert found.healthy
    assert found.verdict == "healthy: all 3 cases are within their error budgets, on native, numba, in 7.6 s"


def test_nothing_was_run(healthy):
    found = doctor.diagnose([FINE._replace(state=NOT_RUN, share=None)])
    assert not found.healthy
    assert found.verdict == "broken: no case was run"
