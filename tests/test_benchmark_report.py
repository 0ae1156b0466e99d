"""The pages of the benchmarks say what was measured: tables and picture of a run, its limits, and the errors."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cases, errors, report, roofline  # noqa: E402


def entry(case: str, mode: str, provider: str, ratio: float, **more: object) -> dict[str, object]:
    info = {
        "case": case,
        "group": "LSTM" if case.startswith("lstm") else "attention",
        "mode": mode,
        "provider": provider,
        "flops": 2_000_000,
        "bytes": 1000,
        "phases": [[2_000_000, 1000, 1]],
        "shape": {"dtype": "float32"},
        "tags": ["overhead"] if case == "attention_small" else [],
        "baseline": "torch.nn.LSTM",
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
    for case, engine, over in (
        ("lstm_small", "openvino", 2.0),
        ("lstm_large", "openvino", 8.0),
        ("lstm_small", "onnxruntime", 4.5),
        ("lstm_large", "onnxruntime", 0.5),
    ):
        native = {"median": over, "q1": over, "q3": over}
        benchmarks.append(entry(case, "forward", engine, 0.5, native=native))
    reason = "backend 'numba' cannot run attention of torch.float32 on cpu: it rains: again"
    data = {
        "machine_info": {
            "cpu": {"brand_raw": "A Processor"},
            "python_version": "3.11.1",
            "threads": 2,
            "isa": "x86-64-v3",
            "torch": "2.13.0",
            "seqkernels": "0.1.0",
            "engines": {"openvino": "2026.4.1"},
        },
        "roofline": {
            "gflops": {"float32": 4.0, "bfloat16": 8.0},
            "bandwidth": [[1024, 200.0], [1 << 20, 1.0]],
            "caches": {"L1": 2048, "L2": 1 << 16},
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
    # Both would be 4 times as fast as torch at those 8 GFLOP/s; of attention nothing is shorter than its only call.
    assert ["LSTM", "forward", "native", "2.00", "1.00", "4.00", "2", "lstm_small"] in rows
    assert ["attention", "forward+backward", "native", "3.00", "3.00", "3.00", "1", "attention_small"] in rows
    large = ["lstm_large", "forward", "1", "4.00", "(3.60-4.40)", *["0.50", "(0.45-0.55)"] * 2, "-"]
    # That is the most that anybody reached, so that this case takes as long as its products.
    assert [*large, "8.0", "0.00", "compute", "100%", "1.00"] in rows
    assert ["LSTM", "onnxruntime", "1.50", "0.50", "2", "lstm_large"] in rows
    assert ["LSTM", "openvino", "4.00", "2.00", "2", "lstm_small"] in rows
    assert ["all", "the", "faster", "one", "1.00", "0.50", "2", "lstm_large"] in rows
    product = ["torch.mm,", "1024", "x", "1024,", "float32", "4", "GFLOP/s", "8", "GFLOP/s"]
    assert [*product, "native", "on", "lstm_large"] in rows
    assert ["reading", "1", "KiB", "(L1)", "200", "GB/s", "-", "-"] in rows
    assert "A Processor, 2 threads, x86-64-v3; torch 2.13.0, seqkernels 0.1.0, openvino 2026.4.1, Python" in text
    assert "numba not timed 1 times: it rains: again" in text
    assert "numba on lstm_small forward: error 5.00 times torch's own, 2.50 of what the tests allow" in text
    assert png.read_bytes().startswith(b"\x89PNG")


def test_report_of_one_query_and_of_16_bits(file, tmp_path, capsys):
    data = json.loads(file.read_text())
    phases = [[1000, 1 << 19, 1]]
    for provider, ratio in (("torch", 1.0), ("native", 4.0)):
        way = "F.scaled_dot_product_attention with a boolean mask"
        more = {"group": "attention cache", "bytes": 1 << 19, "phases": phases, "flops": 1000, "baseline": way}
        data["benchmarks"].append(
            entry("attention_one", "forward", provider, ratio, shape={"dtype": "float16"}, **more)
        )
    path = tmp_path / "one.json"
    path.write_text(json.dumps(data))
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    # A quarter of a millisecond for half a MiB, from no cache that is known; memory is read at 1 GB/s.
    found = roofline.Roofline.from_json(data["roofline"]).rate(1 << 19)
    share = [f"{2.097 / found:.0%}", "(memory)"]
    assert ["attention_one", "native", "0", "2.1", "210%", *share] in rows
    assert "torch on attention cache, forward: F.scaled_dot_product_attention with a boolean mask" in text
    product = ["torch.mm,", "1024", "x", "1024,", "float32", "for", "float16", "4", "GFLOP/s", "0", "GFLOP/s"]
    assert [*product, "native", "on", "attention_one"] in rows


def test_report_in_markdown(file, capsys):
    assert report.main([str(file), "--markdown"]) == 0
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(tables) == (6 + 2) + (7 + 2) + (6 + 2) + (4 + 2)
    assert all(line.endswith(" |") for line in tables)
    assert {line.count("|") for line in tables} == {12, 9, 7, 5}


MACHINE = roofline.Roofline({"float32": 100.0}, [(1 << 10, 100.0), (1 << 20, 10.0)], {"L1": 1 << 12, "L2": 1 << 20})


def test_what_is_kept_says_the_same(file, tmp_path, capsys):
    data = json.loads(file.read_text())
    for bench in data["benchmarks"]:
        bench["stats"]["data"] = [1.0] * 1000
    file.write_text(json.dumps(data))
    kept = tmp_path / "kept.json"
    assert report.main([str(file), "--keep", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert report.main([str(kept)]) == 0
    assert capsys.readouterr().out == printed
    assert kept.stat().st_size < 1000 * len(data["benchmarks"])


def test_rates_of_working_sets():
    assert MACHINE.rate(0) == MACHINE.rate(1 << 10) == 100
    assert MACHINE.rate(1 << 15) == pytest.approx(55)
    assert MACHINE.rate(1 << 30) == 10
    levels = [MACHINE.level(size) for size in (1, 1 << 12, (1 << 12) + 1, (1 << 20) + 1, 1 << 21)]
    assert levels == ["L1", "L1", "L2", "L2+memory", "memory"]
    both = MACHINE._replace(gflops={"float32": 100.0, "bfloat16": 50.0})
    assert [both.peak(dtype) for dtype in ("float32", "bfloat16", "float16")] == [100, 100, 100]
    assert both._replace(gflops={"float32": 100.0, "bfloat16": 200.0}).peak("bfloat16") == 200
    assert MACHINE._replace(caches={}).level(1) == ""
    faster = MACHINE._replace(gflops={"float32": 50.0}, bandwidth=[(1 << 10, 90.0), (1 << 20, 20.0)])
    assert MACHINE.better(faster) == MACHINE._replace(bandwidth=[(1 << 10, 100.0), (1 << 20, 20.0)])
    assert roofline.Roofline.from_json(json.loads(json.dumps(MACHINE.to_json()))) == MACHINE


def test_limits():
    products = cases.Phase(flops=10**9, bytes=1 << 10, times=1)
    loop = cases.Phase(flops=10**6, bytes=1 << 20, times=1000)
    assert roofline.limit([products], 0, 100, MACHINE) == ("compute", pytest.approx(0.01))
    name, seconds = roofline.limit([products, loop], 0, 100, MACHINE)
    assert (name, seconds) == ("L2", pytest.approx(0.01 + 1000 * (1 << 20) / 10e9))
    assert roofline.limit([loop], 0, 100, MACHINE._replace(caches={})).name == "reading"
    assert roofline.limit([products], 0.02, 100, MACHINE) == ("call", 0.02)


def test_caches_of_the_threads(tmp_path):
    rows = (("1", "Data", "32K", "0"), ("1", "Instruction", "64K", "0"), ("2", "Unified", "1024K", "0,8"))
    for index, values in enumerate((*rows, ("3", "Unified", "32768K", "0-7"))):
        (tmp_path / f"index{index}").mkdir()
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
            (tmp_path / f"index{index}" / name).write_text(value + "\n")
    assert roofline.caches(2, tmp_path) == {"L1": 64 << 10, "L2": 2 << 20, "L3": 32 << 20}
    assert roofline.caches(2, tmp_path / "none") == {}


def test_report_refuses_other_benchmarks(tmp_path):
    data = {"benchmarks": [{"fullname": "test_other", "extra_info": {}, "stats": {"median": 1}}]}
    with pytest.raises(ValueError, match="test_other is not a benchmark of seqkernels"):
        report.entries(data)


def test_error_in_units_in_the_last_place():
    exact = [torch.tensor([3.0, -0.5], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    eps = torch.finfo(torch.float32).eps
    results = [torch.tensor([3.0 + 2 * eps, -0.5]), torch.zeros(2)]
    found = errors.error(results, exact)
    # One unit in the last place of 3 is 2 eps.
    assert found == pytest.approx((2 * eps / 3, 2 * eps / 3 / 2**0.5, 1.0))
    assert errors.error(results, exact, torch.float16).ulp == pytest.approx(2.0**-13)
    assert errors.error(exact, exact) == (0, 0, 0)
    assert errors.error([torch.ones(2), torch.ones(2)], exact).ulp == float("inf")
    with pytest.raises(ValueError, match="result 1: not finite"):
        errors.error([results[0], torch.tensor([0.0, torch.nan])], exact)


def test_the_table_of_errors(tmp_path, capsys):
    page = tmp_path / "docs" / "errors.md"
    kept = ["--output", str(page), "--json", str(tmp_path / "errors.json")]
    arguments = ["--cells", "lstm", "--steps", "1", "3", "--forms", "--allow-missing", *kept]
    assert errors.main(arguments) == 0
    written = page.read_text()
    page.unlink()
    assert errors.main(["--page", *kept]) == 0
    assert page.read_text() == written
    errors.plot(json.loads((tmp_path / "errors.json").read_text()), tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 10_000
    assert str(page) in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines() if "|" in line]
    assert rows[0] == ["dtype", "T", "of"] + [
        f"{name} {what}" for name in errors.PROVIDERS for what in ("max", "RMS", "ulp")
    ]
    dtypes = ("float32", "bfloat16", "float16", "float64")
    named = list(itertools.product(dtypes, ("1", "3"), ("outputs", "gradients")))
    assert [tuple(row[:3]) for row in rows[2:]] == named
    for row in rows[2:]:
        # torch in float64 is what the others are compared with.
        assert (row[3] == "-") == (row[0] == "float64")
        for number in row[9:] if row[0] == "float64" else row[3:6] + row[9:]:
            assert float(number) < 100
    with pytest.raises(SystemExit):
        errors.main(["--steps", "0", "--allow-missing"])
    assert "--steps: at least 1 each, not 0" in capsys.readouterr().err


def test_the_table_of_errors_of_attention(tmp_path, compiled):
    page = tmp_path / "errors.md"
    kept = ["--output", str(page), "--json", str(tmp_path / "errors.json")]
    assert errors.main(["--cells", "--lengths", "5", "9", "--allow-missing", *kept]) == 0
    parts = page.read_text().split("\n**")
    assert [part.split(":")[0] for part in parts[1:]] == list(errors.FORMS)
    for form, part in zip(errors.FORMS, parts[1:], strict=True):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if "|" in line][2:]
        results = ["out", "lse", "dq", "dk", "dv", *{"bias": ["dbias"], "sink": ["dsink"]}.get(form, [])]
        named = list(itertools.product(("float32", "bfloat16", "float16"), ("5", "9"), results))
        assert [tuple(row[:3]) for row in rows] == named
        for row in rows:
            assert all(float(number) < 100 for number in row[3:6])
            assert all(float(number) < 100 for number in row[6:]) if compiled else row[6:] == ["-"] * 3
    with pytest.raises(SystemExit):
        errors.main(["--lengths", "0", "--allow-missing"])


def test_errors_of_attention_see_another_formula():
    softcap = errors._attend(errors.torch_attention, "softcap", 9, torch.float32, torch.float64)
    full = errors._attend(errors.torch_attention, "full", 9, torch.float32, torch.float32)
    assert errors.error([full["out"]], [softcap["out"]]).ulp > 1000


def test_both_dtypes_of_16_bits_hold_the_values():
    by_dtype = [
        errors._attend(errors.torch_attention, "bias", 64, values, dtype)
        for values, dtype in (
            (torch.bfloat16, torch.float64),
            (torch.float16, torch.float64),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.bfloat16),
        )
    ]
    exact = by_dtype[0]
    assert all(torch.equal(exact[name], by_dtype[1][name]) for name in exact)
    # Scores of values that were rounded once more would be further away.
    assert errors.error([by_dtype[2]["lse"]], [exact["lse"]]).ulp < 10
    assert errors.error([by_dtype[3]["lse"]], [exact["lse"]]).ulp < 10


def test_pages_are_made_of_the_results_that_are_kept():
    root = Path(errors.__file__).resolve().parents[1]
    assert errors.page(json.loads(errors.KEPT.read_text())) == (root / "docs" / "errors.md").read_text()
    written = (root / "docs" / "benchmarks.md").read_text()
    names = report.REGION.findall(written)
    assert {name for name, _, _ in names} == {path.stem for path in (root / "benchmarks/results").glob("*epyc*.json")}
    assert report.updated(written, root / "benchmarks" / "results") == written
