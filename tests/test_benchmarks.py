"""The benchmarks measure what they say: cases, the turns, the errors, the report; and one tiny run of them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cases, measure, report, workloads  # noqa: E402

EVERY = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)


def test_names_are_unique():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)


@EVERY
def test_case_is_well_formed(case):
    assert case.tags <= set(cases.TAGS)
    assert case.modes[0] == "forward"
    assert case.name.isidentifier()
    assert all(case.flops(mode) > 0 and case.bytes(mode) > 0 for mode in case.modes)
    assert {"torch", "native"} <= set(cases.providers(case)) <= set(cases.PROVIDERS)


def test_every_shape_of_the_grid_is_there_for_each_cell():
    found = {
        (case.cell, case.steps, case.batch, case.inputs, case.hidden)
        for case in cases.with_tag("grid")
        if isinstance(case, cases.Recurrence) and case.dtype == torch.float32
    }
    assert found == {(cell, *shape) for cell in ("lstm", "gru", "rnn_tanh") for shape in cases.GRID_RECURRENCE}


def test_the_quick_form_has_each_operation():
    groups = {case.group for case in cases.with_tag("quick")}
    assert {"LSTM", "GRU", "RNN", "cells", "attention"} <= groups
    assert {case.name for case in cases.with_tag("quick")} == cases.QUICK


def test_unknown_tag_is_an_error():
    with pytest.raises(ValueError, match=r"tag: 'slow' is not one of 'grid'"):
        cases.with_tag("slow")


def test_flops_of_a_recurrence():
    # Two products of 512 rows with 128 columns for each of 128 x 16 steps and rows.
    case = cases.Recurrence("lstm", 128, 16, 128, 128)
    assert case.flops("forward") == 2 * 128 * 16 * 512 * 256
    assert case.flops("forward_backward") == 3 * case.flops("forward")
    both = cases.Recurrence("lstm", 128, 16, 128, 128, layers=2, bidirectional=True)
    assert both.flops("forward") == 2 * 128 * 16 * 512 * (2 * (128 + 128) + 2 * (256 + 128))


def test_bytes_of_a_recurrence():
    case = cases.Recurrence("gru", 10, 2, 3, 4)
    parameters = sum(p.numel() for p in torch.nn.GRU(3, 4).parameters())
    forward = 10 * 2 * 3 + parameters + 10 * 2 * 4 + 2 * 4
    assert case.bytes("forward") == 4 * forward
    assert case.bytes("forward_backward") == 4 * (forward + 2 * (10 * 2 * 3 + parameters) + 2 * 10 * 2 * 4)


def test_flops_and_bytes_of_attention():
    full = cases.Attention(4, 8, 128, 128, 64)
    causal = cases.Attention(4, 8, 128, 128, 64, causal=True)
    assert full.flops("forward") == 4 * 4 * 8 * 128 * 128 * 64 == 2 * causal.flops("forward")
    assert full.flops("forward_backward") == 3.5 * full.flops("forward")
    assert full.bytes("forward") == 4 * 4 * (4 * 8 * 128 * 64)
    grouped = cases.Attention(1, 32, 1, 4096, 128, kv_heads=8)
    assert grouped.bytes("forward") == 4 * (2 * 32 * 128 + 2 * 8 * 4096 * 128)


SMALL = [
    cases.Recurrence("lstm", 3, 2, 3, 4, layers=2, bidirectional=True),
    cases.Recurrence("rnn_relu", 3, 2, 3, 4),
    cases.Recurrence("gru", 3, 2, 3, 4, dtype=torch.bfloat16),
    cases.Recurrence("lstm", 1, 2, 3, 4, single=True),
    cases.Recurrence("gru", 1, 2, 3, 4, single=True),
    cases.Attention(2, 2, 4, 4, 8, causal=True),
    cases.Attention(2, 2, 4, 4, 8, mask="padding"),
    cases.Attention(2, 2, 4, 4, 8, mask="learned"),
    cases.Attention(2, 4, 1, 6, 8, kv_heads=2),
    cases.Attention(1, 1, 1, 1, 8),
]


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_providers_make_the_same_call(case, mode):
    results = {}
    for provider, dtype in (("exact", torch.float64), ("torch", None), ("reference", None)):
        workload = workloads.build(case, mode, "torch" if provider == "exact" else provider, dtype)
        with workload.context():
            results[provider] = [result.detach() for result in workload.run()]
    own = workloads.errors(results["torch"], results["torch"], results["exact"])
    found = workloads.errors(results["reference"], results["torch"], results["exact"])
    assert own.to_torch <= 1
    # Few values and a maximum: rounding alone can pass twice torch's own. Another formula errs by millions.
    assert found.of_budget < 100


def test_errors_of_a_wrong_result():
    exact = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    good = [x.float() for x in exact]
    assert workloads.errors(good, good, exact) == (0, 0, 0)
    wrong = workloads.errors([torch.tensor([1.0, 2.5]), good[1]], good, exact)
    assert wrong.largest == 0.25
    assert wrong.of_budget == 0.25 / torch.finfo(torch.float32).eps
    with pytest.raises(ValueError, match="result 1: not finite"):
        workloads.errors([good[0], torch.tensor([0.0, torch.nan])], good, exact)
    with pytest.raises(ValueError, match=r"result 0: expected shape \(2,\), got \(1,\)"):
        workloads.errors([good[0][:1], good[1]], good, exact)


class Simulation:
    """Calls that take a known time on a clock of their own, which runs slower and slower."""

    def __init__(self) -> None:
        self.now, self.pace, self.order = 0.0, 1.0, ""

    def workload(self, name: str, seconds: float) -> workloads.Workload:
        def run() -> tuple[torch.Tensor, ...]:
            self.now += seconds * self.pace
            self.order += name
            return ()

        return workloads.Workload(run, torch.no_grad)


def test_rounds_are_taken_in_turns():
    simulation = Simulation()
    plan = measure.Plan(round_seconds=1, budget_seconds=4, min_rounds=1, max_rounds=100)
    workloads_ = {name: simulation.workload(name, 1.0) for name in "abc"}
    samples = measure.interleave(workloads_, plan, lambda: simulation.now)
    # Two calls each to calibrate, then four rounds, each begun by the next one.
    assert simulation.order == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert all(list(own.seconds) == [0, 1, 2, 3] and own.calls == 1 for own in samples.values())


def test_short_calls_are_repeated_and_slow_ones_sit_out():
    simulation = Simulation()
    plan = measure.Plan(round_seconds=1, budget_seconds=12, min_rounds=2, max_rounds=8)
    workloads_ = {"a": simulation.workload("a", 0.25), "b": simulation.workload("b", 4.0)}
    samples = measure.interleave(workloads_, plan, lambda: simulation.now)
    assert samples["a"].calls == 4
    assert samples["b"].calls == 1
    assert list(samples["a"].seconds) == list(range(8))
    assert list(samples["b"].seconds) == [2, 5, 7]
    assert set(samples["a"].seconds.values()) == {0.25}
    assert measure.ratio(samples["a"], samples["b"]) == (0.0625, 0.0625, 0.0625)


def test_ratio_is_paired():
    pace = itertools.accumulate(itertools.repeat(1.5, 8), lambda a, b: a * b)
    slower = dict(enumerate(pace))
    torch_ = measure.Samples(1, {i: 3 * seconds for i, seconds in slower.items()})
    own = measure.Samples(1, {i: seconds for i, seconds in slower.items() if i % 2})
    assert measure.ratio(torch_, own) == (3, 3, 3)


def entry(case: str, mode: str, provider: str, ratio: float, **more: object) -> dict[str, object]:
    info = {
        "case": case,
        "group": "LSTM" if case.startswith("lstm") else "attention",
        "mode": mode,
        "provider": provider,
        "flops": 2_000_000,
        "bytes": 1000,
        "ratio": {"median": ratio, "q1": ratio * 0.9, "q3": ratio * 1.1},
        "error_to_torch": 1.0,
        "error_of_budget": 0.5,
        **more,
    }
    return {"fullname": case, "stats": {"median": 0.001 / ratio}, "extra_info": info}


@pytest.fixture
def file(tmp_path):
    benchmarks = []
    for mode in cases.MODES:
        for case, ratio in (("lstm_small", 1.0), ("attention_small", 3.0), ("lstm_large", 4.0)):
            benchmarks.append(entry(case, mode, "torch", 1.0))
            benchmarks.append(entry(case, mode, "native", ratio))
    benchmarks.append(entry("lstm_small", "forward", "numba", 0.5, error_to_torch=5.0, error_of_budget=2.5))
    reason = "backend 'numba' cannot run attention of torch.float32 on cpu: it rains: again"
    data = {
        "machine_info": {
            "cpu": {"brand_raw": "A Processor"},
            "python_version": "3.11.1",
            "threads": 2,
            "isa": "x86-64-v3",
            "torch": "2.13.0",
            "seqkernels": "0.1.0",
        },
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": benchmarks,
        "unavailable": [{"case": "attention_small", "mode": "forward", "provider": "numba", "reason": reason}],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(data))
    return path


def test_report_prints_tables_and_draws(file, tmp_path, capsys):
    png = tmp_path / "out" / "bench.png"
    assert report.main([str(file), "--png", str(png)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert ["LSTM", "forward", "native", "2.00", "1.00", "2", "lstm_small"] in rows
    assert ["attention", "forward+backward", "native", "3.00", "3.00", "1", "attention_small"] in rows
    assert ["lstm_large", "forward", "1", "4.00", "(3.60-4.40)", "-", "8.0", "0.00", "1.00"] in rows
    assert "A Processor, 2 threads, x86-64-v3; torch 2.13.0" in text
    assert "numba not timed 1 times: it rains: again" in text
    assert "numba on lstm_small forward: error 5.00 times torch's own, 2.50 of what the tests allow" in text
    assert png.read_bytes().startswith(b"\x89PNG")


def test_report_in_markdown(file, capsys):
    assert report.main([str(file), "--markdown"]) == 0
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(tables) == (6 + 2) + (5 + 2)
    assert all(line.endswith(" |") for line in tables)
    assert {line.count("|") for line in tables} == {8, 9}


def test_report_refuses_other_benchmarks(tmp_path):
    data = {"benchmarks": [{"fullname": "test_other", "extra_info": {}, "stats": {"median": 1}}]}
    with pytest.raises(ValueError, match="test_other is not a benchmark of seqkernels"):
        report.entries(data)


def test_a_tiny_run(tmp_path):
    path = tmp_path / "bench.json"
    arguments = ["--quick", "--allow-missing", "--threads=1", "--providers=torch,reference", f"--json={path}"]
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *arguments, "-k", "lstmcell_B1_I64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[  2/2" in done.stdout
    data = json.loads(path.read_text())
    assert path.with_suffix(".png").exists()
    assert data["machine_info"]["threads"] == 1
    assert data["machine_info"]["torch"] == torch.__version__
    infos = [bench["extra_info"] for bench in data["benchmarks"]]
    assert [(info["mode"], info["provider"]) for info in infos] == list(
        itertools.product(cases.MODES, ("torch", "reference"))
    )
    for bench, info in zip(data["benchmarks"], infos, strict=True):
        assert info["flops"] > 0
        assert info["threads"] == 1
        assert info["error_to_torch"] < 100
        assert info["ratio"]["q1"] <= info["ratio"]["median"] <= info["ratio"]["q3"]
        assert 5 <= bench["stats"]["rounds"] <= 40
    assert infos[0]["ratio"]["median"] == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--threads=0", "--threads: at least 1, not 0"),
        ("--providers=torch,jax", "--providers: jax is not among torch, native, numba, reference"),
        ("--isa=z80", "--isa: "),
    ],
)
def test_bad_options_are_named(argument, message, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--allow-missing", argument]
    done = subprocess.run([*command, f"--json={tmp_path / 'x.json'}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 4
    assert message in done.stdout + done.stderr
