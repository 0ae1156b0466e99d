"""The benchmarks measure what they say: cases, calls, the turns; and one tiny run of them."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import seqkernels
from seqkernels.testing import assert_within_budget

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cases, conftest, engines, floor, gpu, gpu_cases, measure, roofline, workloads  # noqa: E402

EVERY = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)


def test_names_are_unique():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)


@EVERY
def test_case_is_well_formed(case):
    assert case.tags <= set(cases.TAGS)
    assert case.modes[0] == "forward"
    assert case.name.isidentifier()
    for mode in case.modes:
        assert case.bytes(mode) > 0
        assert sum(phase.flops for phase in case.phases(mode)) == case.flops(mode) > 0
        assert all(phase.bytes > 0 and phase.times > 0 for phase in case.phases(mode))
    assert {"torch", "native"} <= set(cases.providers(case, "forward")) <= {*cases.PROVIDERS, *cases.ENGINES}
    assert set(cases.providers(case, "forward_backward")) <= set(cases.PROVIDERS)


def test_every_shape_of_the_grid_is_there_for_each_cell():
    found = {
        (case.cell, case.steps, case.batch, case.inputs, case.hidden)
        for case in cases.with_tag("grid")
        if isinstance(case, cases.Recurrence) and case.dtype == torch.float32
    }
    assert found == {(cell, *shape) for cell in ("lstm", "gru", "rnn_tanh") for shape in cases.GRID_RECURRENCE}


def test_what_the_targets_name_is_there():
    recurrences = [case for case in cases.CASES if isinstance(case, cases.Recurrence)]
    single = {(case.cell, case.batch, case.hidden) for case in recurrences if case.single}
    assert single == {(cell, 1, hidden) for cell in ("lstm", "gru", "rnn_tanh") for hidden in (64, 256)}
    assert {case.cell for case in recurrences if case.dtype == torch.bfloat16} == {"lstm", "gru"}
    stacks = [case for case in recurrences if case.layers == 2 and case.bidirectional]
    assert ("lstm", 128, 16, 128) in [(case.cell, case.steps, case.batch, case.hidden) for case in stacks]


def test_attention_has_what_the_targets_name():
    groups: dict[str, list[cases.Attention]] = {}
    for case in cases.CASES:
        if isinstance(case, cases.Attention):
            groups.setdefault(case.group, []).append(case)
    for group in ("attention", "attention bfloat16", "attention float16"):
        shapes = {(case.batch, case.heads, case.keys, case.size, case.causal) for case in groups[group]}
        assert shapes == set(cases.GRID_ATTENTION)
        assert all(case.queries == case.keys and case.modes == cases.MODES for case in groups[group])
    named = {
        "attention small heads": {(64, 4, 32, 32, 16), (64, 4, 128, 128, 32)},
        "attention calls": {(1, 1, 1, 1, 64)},
        "attention masks": {(4, 8, 256, 256, 64), (2, 8, 1024, 1024, 64)},
        "attention dropout": {(4, 8, 512, 512, 64)},
        "attention window": {(1, 4, 4096, 4096, 64)},
        "attention ALiBi": {(1, 4, 4096, 4096, 64)},
        "attention softcap": {(1, 4, 4096, 4096, 64)},
        "attention documents": {(8, 8, 512, 512, 64)},
        "attention grouped": {(1, 32, 512, 512, 128)},
        "attention decode": {(1, 32, 1, 4096, 128), (8, 32, 1, 4096, 128)},
        "attention cache": {(8, 32, 1, 4096, 128)},
    }
    assert set(groups) - {"attention", "attention bfloat16", "attention float16"} == set(named)
    for group, shapes in named.items():
        assert {(case.batch, case.heads, case.queries, case.keys, case.size) for case in groups[group]} == shapes
    decode = groups["attention decode"]
    assert {(case.batch, case.dtype, case.kv_heads) for case in decode} == set(
        itertools.product((1, 8), (torch.float32, torch.bfloat16), (8,))
    )
    numba = {case.option for found in groups.values() for case in found if "numba" in case.tags}
    assert numba == {"", "padding", "bias", "learned"}


def test_engines_run_float32_layers_without_gradients():
    layer = cases.Recurrence("gru", 3, 2, 3, 4)
    assert set(cases.ENGINES) <= set(cases.providers(layer, "forward"))
    others = [
        (layer, "forward_backward"),
        (cases.Recurrence("gru", 1, 2, 3, 4, single=True), "forward"),
        (cases.Recurrence("gru", 3, 2, 3, 4, dtype=torch.bfloat16), "forward"),
        (cases.Attention(2, 2, 4, 4, 8), "forward"),
    ]
    for case, mode in others:
        assert set(cases.ENGINES).isdisjoint(cases.providers(case, mode))
    with pytest.raises(ValueError, match=r"case: expected a float32 layer, got gru_T3_B2_I3_H4_bfloat16"):
        engines.build("openvino", others[2][0], torch.nn.GRU(3, 4), torch.zeros(3, 2, 3))


def test_phases_of_a_recurrence():
    case = cases.Recurrence("gru", 10, 2, 3, 4, bidirectional=True, layers=2, dtype=torch.bfloat16)
    # Two directions of 12 rows each, 3 then 8 columns from below, 4 of the state.
    read = [(2 * 12 * 3 * 2, 1), (2 * 12 * 4 * 2, 10), (2 * 12 * 8 * 2, 1), (2 * 12 * 4 * 2, 10)]
    assert [(phase.bytes, phase.times) for phase in case.phases("forward")] == read
    assert [phase.flops for phase in case.phases("forward")] == [20 * size for size, _ in read]
    assert len(case.phases("forward_backward")) == 8


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


def test_flops_and_bytes_of_what_is_read():
    window = cases.Attention(2, 3, 300, 300, 16, causal=True, option="window", dtype=torch.bfloat16)
    kept = torch.ones(300, 300).tril().triu(1 - cases.WINDOW).sum().item()
    assert window.flops("forward") == 4 * 2 * 3 * 16 * kept
    assert window.bytes("forward") == 2 * 4 * (2 * 3 * 300 * 16)
    padding = cases.Attention(3, 2, 8, 8, 4, option="padding")
    assert padding.lengths == (4, 6, 8)
    assert padding.flops("forward") == 4 * 2 * 4 * 8 * (4 + 6 + 8)
    assert padding.bytes("forward") == 4 * (2 * 3 * 2 * 8 * 4 + 2 * (4 + 6 + 8) * 2 * 4) + 3 * 8
    # Whoever reads no more than these keys writes all gradients.
    assert padding.bytes("forward_backward") - 2 * padding.bytes("forward") == 4 * (2 + 2) * 3 * 2 * 8 * 4
    documents = cases.Attention(3, 2, 16, 16, 4, option="documents")
    assert documents.lengths == (2, 9, 16)
    assert documents.flops("forward") == 4 * 2 * 4 * (4 + 81 + 256)
    assert documents.bytes("forward") == 4 * 4 * (2 + 9 + 16) * 2 * 4
    cache = cases.Attention(2, 4, 1, 8, 4, kv_heads=2, option="cache")
    assert cache.flops("forward") == 4 * 4 * 4 * (4 + 8)
    assert cache.bytes("forward") == 4 * (2 * 2 * 4 * 4 + 2 * (4 + 8) * 2 * 4)


SMALL = [
    cases.Recurrence("lstm", 3, 2, 3, 4, layers=2, bidirectional=True),
    cases.Recurrence("rnn_relu", 3, 2, 3, 4),
    cases.Recurrence("gru", 3, 2, 3, 4, dtype=torch.bfloat16),
    cases.Recurrence("lstm", 1, 2, 3, 4, single=True),
    cases.Recurrence("gru", 1, 2, 3, 4, single=True),
    cases.Attention(2, 2, 4, 4, 8, causal=True),
    cases.Attention(2, 2, 4, 4, 8, option="padding"),
    cases.Attention(2, 2, 4, 4, 8, option="learned"),
    cases.Attention(2, 4, 1, 6, 8, kv_heads=2),
    cases.Attention(1, 1, 1, 1, 8),
    cases.Attention(2, 2, 4, 4, 8, option="bias", dtype=torch.float16),
    cases.Attention(2, 2, 7, 7, 8, option="dropout"),
    cases.Attention(1, 2, 300, 300, 8, causal=True, option="window"),
    cases.Attention(1, 2, 9, 9, 8, causal=True, option="alibi"),
    cases.Attention(1, 2, 9, 9, 8, causal=True, option="softcap"),
    cases.Attention(3, 2, 9, 9, 8, option="documents"),
    cases.Attention(3, 4, 1, 9, 8, kv_heads=2, option="cache", inference=True),
]


def results_of(case, mode, backend="reference"):
    results = {}
    for provider, dtype in (("exact", torch.float64), ("torch", None), (backend, None)):
        workload = workloads.build(case, mode, "torch" if provider == "exact" else provider, dtype)
        with workload.context():
            results[provider] = [result.detach() for result in workload.compared(workload.run())]
    return results


@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, mode) for case in SMALL for mode in case.modes],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_providers_make_the_same_call(case, mode, monkeypatch):
    # What a program computes does not depend on whether it is compiled.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    results = results_of(case, mode)
    # torch's own is judged by the rounding of its dtype alone.
    assert workloads.errors(results["torch"], results["exact"], results["exact"]).to_torch < 100
    own = workloads.errors(results["torch"], results["torch"], results["exact"])
    found = workloads.errors(results["reference"], results["torch"], results["exact"])
    assert own.to_torch <= 1
    # Few values and a maximum: rounding alone can pass twice torch's own. Another formula errs by millions.
    assert found.of_budget < 100


@pytest.mark.slow
def test_torch_compiles_what_it_is_timed_with():
    case = cases.Attention(1, 2, 300, 300, 8, causal=True, option="window")
    assert case.baseline("forward").startswith("FlexAttention, compiled")
    results = results_of(case, "forward")
    assert workloads.errors(results["torch"], results["exact"], results["exact"]).to_torch < 100


def test_what_is_compared_of_dropout_are_the_weights_that_we_drop():
    case = cases.Attention(2, 2, 7, 7, 8, option="dropout")
    workload = workloads.build(case, "forward", "torch")
    with workload.context():
        assert not torch.equal(workload.run()[0], workload.run()[0])
        first, second = (workload.compared(workload.run())[0] for _ in range(2))
    assert torch.equal(first, second)


LAYERS = [
    cases.Recurrence(cell, 4, 3, 5, 6, layers=layers, bidirectional=bidirectional)
    for cell in cases.GATES
    for layers, bidirectional in ((1, False), (1, True), (2, False), (3, True))
]
BY_NAME = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)


def by_onnx(case: cases.Recurrence, layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The layer by the formulas of the ONNX operators, in their gate order."""
    last: dict[str, list[torch.Tensor]] = {"h": [], "c": []}
    for weights in engines.weights(case, layer):
        w, r, b = (torch.from_numpy(array).double() for array in weights)
        sides = []
        for direction in range(w.shape[0]):
            b_w, b_r = b[direction].chunk(2)
            h = c = torch.zeros(case.batch, case.hidden, dtype=torch.float64)
            outputs = []
            for x_t in reversed(x) if direction else x:
                xs = (x_t @ w[direction].T + b_w).chunk(cases.GATES[case.cell], 1)
                hs = (h @ r[direction].T + b_r).chunk(cases.GATES[case.cell], 1)
                if case.cell == "lstm":
                    i, o, f = (torch.sigmoid(a + b) for a, b in zip(xs[:3], hs[:3], strict=True))
                    c = f * c + i * torch.tanh(xs[3] + hs[3])
                    h = o * torch.tanh(c)
                elif case.cell == "gru":
                    z, reset = (torch.sigmoid(a + b) for a, b in zip(xs[:2], hs[:2], strict=True))
                    h = (1 - z) * torch.tanh(xs[2] + reset * hs[2]) + z * h
                else:
                    h = torch.tanh(xs[0] + hs[0]) if case.cell == "rnn_tanh" else torch.relu(xs[0] + hs[0])
                outputs.append(h)
            sides.append(torch.stack(outputs[::-1] if direction else outputs))
            last["h"].append(h)
            last["c"].append(c)
        x = torch.cat(sides, 2)
    states = [torch.stack(last["h"]), torch.stack(last["c"])]
    return [x, *(states if case.cell == "lstm" else states[:1])]


@BY_NAME
def test_weights_for_the_engines(case):
    generator = torch.Generator().manual_seed(3)
    layer = workloads._layer(case, "onnxruntime", generator)
    x = torch.randn(case.steps, case.batch, case.inputs, generator=generator, dtype=torch.float64)
    found = by_onnx(case, layer, x)
    with torch.no_grad():
        out, last = layer.double()(x)
    for ours, theirs in zip(found, [out, *(last if case.cell == "lstm" else [last])], strict=True):
        assert_within_budget(ours, theirs, theirs.float())


@pytest.mark.parametrize("engine", cases.ENGINES)
@BY_NAME
def test_engines_make_the_same_call(case, engine):
    reason = engines.missing(engine)
    if reason is not None:
        with pytest.raises(ImportError):
            workloads.build(case, "forward", engine)
        return
    results = {}
    for provider, dtype in (("exact", torch.float64), ("torch", None), (engine, None)):
        workload = workloads.build(case, "forward", "torch" if provider == "exact" else provider, dtype)
        with workload.context():
            workload.run()
            results[provider] = [result.clone() for result in workload.run()]
    found = workloads.errors(results[engine], results["torch"], results["exact"])
    assert found.of_budget < conftest.WRONG


@pytest.mark.parametrize("engine", cases.ENGINES)
def test_a_missing_engine_says_how_to_install_it(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert engines.missing(engine).startswith(f"{engine} cannot be timed (")
    assert engines.missing(engine).endswith("install it: make bench-engines, or the extra bench-engines")


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


def test_rests_between_turns(monkeypatch):
    simulation = Simulation()
    plan = measure.Plan(1, 3, 3, 3, pause_seconds=2)
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(simulation, "order", simulation.order + "-"))
    workloads_ = {"a": simulation.workload("a", 1.0), "b": simulation.workload("b", 5.0)}
    samples = measure.interleave(workloads_, plan, lambda: simulation.now)
    # Two calls of a and, over the budget, one of b; then a is called once more in each turn, since it is short.
    assert simulation.order == "aab" + "-aa-b" + "-b-aa" + "-aa-b"
    assert set(samples["a"].seconds.values()) == {1.0}
    rests = measure.FULL.with_pauses()
    assert (rests.pause_seconds, rests.budget_seconds) == (0.01, measure.FULL.budget_seconds)
    assert measure.QUICK.with_pauses().max_rounds <= measure.QUICK.max_rounds


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
    few = measure.Samples(1, {0: 100.0, 3: slower[3], 7: slower[7]})
    assert measure.ratio(few, own) == (1, 1, 1)


class Group:
    """Providers whose results and times are known."""

    def __init__(self, **values: float) -> None:
        self.values, self.simulation = values, Simulation()

    def build(self, case: object, mode: str, provider: str, dtype: object = None) -> workloads.Workload:
        seconds = {"torch": 4e-3, "native": 1e-3}.get(provider, 2e-3)
        workload = self.simulation.workload(provider, seconds)

        def run() -> tuple[torch.Tensor, ...]:
            workload.run()
            return (torch.full((3,), self.values.get(provider, 1.0), dtype=dtype),)

        return workloads.Workload(run, workload.context)


def measured(monkeypatch, group, *wanted):
    monkeypatch.setattr(workloads, "build", group.build)
    timed = measure.interleave
    monkeypatch.setattr(measure, "interleave", lambda ready, plan: timed(ready, plan, lambda: group.simulation.now))
    return conftest._measure(LAYERS[0], "forward", list(wanted), measure.Plan(1e-3, 1e-3, 5, 5))


def test_engines_are_measured_beside_native(monkeypatch):
    found = measured(monkeypatch, Group(), "native", "openvino")
    assert not found.failures
    assert set(found.samples) == {"torch", "native", "openvino"}
    assert found.native == {"openvino": pytest.approx((2, 2, 2))}
    assert found.ratios["native"] == pytest.approx((4, 4, 4))


def test_a_wrong_result_is_a_failure(monkeypatch):
    found = measured(monkeypatch, Group(openvino=1.01), "native", "openvino")
    assert set(found.failures) == {"openvino"}
    assert str(found.failures["openvino"]).startswith("wrong results: the error is 8.39e+04 times")
    assert set(found.samples) == {"torch", "native"}


def test_a_tiny_run(tmp_path):
    path = tmp_path / "bench.json"
    arguments = ["--quick", "--allow-missing", "--threads=1", "--providers=torch,reference", f"--json={path}"]
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *arguments, "-k", "lstmcell_B1_I64"]
    # In a worker of parallel tests, pytest-benchmark would think that it runs beside others.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=own)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[  2/2" in done.stdout
    data = json.loads(path.read_text())
    assert path.with_suffix(".png").exists()
    assert data["machine_info"]["threads"] == 1
    assert data["machine_info"]["torch"] == torch.__version__
    machine = roofline.Roofline.from_json(data["roofline"])
    assert all(rate > 0 for rate in machine.gflops.values())
    assert [size for size, _ in machine.bandwidth] == list(roofline.WORKING_SETS)
    assert "call 100%" in done.stdout
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
    ("option", "value", "message"),
    [
        ("threads", 0, "--threads: at least 1, not 0"),
        ("providers", "torch,jax", "--providers: jax is not among torch, native, numba, reference, onnxruntime,"),
        ("isa", "z80", "--isa: "),
    ],
)
def test_bad_options_are_named(option, value, message):
    options = {"threads": None, "isa": None, "providers": "torch", option: value}
    config = types.SimpleNamespace(getoption=options.__getitem__, addinivalue_line=lambda *_: None)
    with pytest.raises(pytest.UsageError, match=f"^{re.escape(message)}"):
        conftest.pytest_configure(config)


def test_bad_options_end_a_run(tmp_path):
    (tmp_path / "onnx.py").write_text("raise ImportError('no onnx here')")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--allow-missing"]
    done = subprocess.run(
        [*command, "--providers=torch,openvino", f"--json={tmp_path / 'x.json'}"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 4
    message = "--providers: openvino cannot be timed (no onnx here); install it: make bench-"
    assert message in done.stdout + done.stderr


def test_cases_of_the_gpu():
    names = [(case.name, mode) for case in gpu_cases.CASES for mode in case.modes]
    assert len(set(names)) == len(names)
    for named in ("attention_B1_H16_S16384_D128_causal_bfloat16", "attention_B16_H32_K8_M1_N8192_D128_bfloat16"):
        assert (named, "forward") in names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_benchmark_of_the_gpu_on_the_cpu(tmp_path, capsys):
    assert gpu.main(["--dry", "--json", str(tmp_path / "gpu.json")]) == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    found = {(row["case"], row["mode"]) for row in written["rows"] if row["provider"] == gpu.OURS and not row["note"]}
    assert found == {(case.name, mode) for case in gpu_cases.DRY_CASES for mode in case.modes}
    assert all(row["ms"] > 0 for row in written["rows"] if not row["note"])
    differences = [row["difference"] for row in written["rows"] if row["difference"] is not None]
    assert max(differences) < 100 * torch.finfo(torch.float32).eps
    recurrences = {case.name for case in gpu_cases.DRY_CASES if isinstance(case, cases.Recurrence)}
    assert {row["case"] for row in written["rows"] if row["provider"] == "compiled cell"} == recurrences
    assert "x the best" in capsys.readouterr().out


def test_a_failing_provider_is_named(monkeypatch, tmp_path, capsys):
    def fail(*args, **options):
        raise RuntimeError("out of order")

    monkeypatch.setattr(seqkernels.functional, "attention", fail)
    assert gpu.main(["--dry", "-k", "S40", "--json", str(tmp_path / "gpu.json")]) == 1
    assert "out of order" in capsys.readouterr().err


def test_gpu_benchmark_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "--dry" in capsys.readouterr().err


@pytest.mark.parametrize("case", dict.fromkeys(gpu_cases.CASES + gpu_cases.PERSISTENT), ids=lambda case: case.name)
def test_floors(case):
    for mode in case.modes:
        found = floor.work(case, mode)
        assert found.done_flops >= found.flops > 0
        assert found.moved > 0
        assert found.floor_ms * 1e-3 >= found.flops / (floor.PEAK_TFLOPS[case.dtype] * 1e12)
        assert found.floor_ms * 1e-3 >= found.bytes / (floor.BANDWIDTH_TBYTES * 1e12)


def test_what_decoding_moves():
    """The keys and values once for all heads of a group."""
    (case,) = (case for case in gpu_cases.CASES if case.name == "attention_B16_H32_K8_M1_N8192_D128_bfloat16")
    found = floor.work(case, "forward")
    assert found.moved == pytest.approx(2 * 16 * (8 * 8192 + 32) * 128 * 2)
    assert found.moved == pytest.approx(found.bytes, rel=0.01)
