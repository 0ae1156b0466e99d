"""The peers of the GPU benchmarks compute what ours do: on the CPU, those that are not installed by stand-ins."""

from __future__ import annotations

import functools
import importlib.machinery
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu, gpu_bars, gpu_cases, gpu_providers  # noqa: E402
from benchmarks.cases import Attention, Recurrence  # noqa: E402
from seqkernels.backends.cuda import emulator  # noqa: E402

ROUNDINGS = 40 * torch.finfo(torch.float32).eps
"""Of the norm of a result of float32 cases this small."""

MODES = pytest.mark.parametrize("mode", ["forward", "forward_backward"])
ROUNDED = f"{gpu.OURS} tf32"
FLASH = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface"}


def _stand_in(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def _rows(case, mode):
    with torch.set_grad_enabled(mode == "forward_backward"):
        found = {row.provider: row for row in gpu.time_case(case, mode, "cpu", budget=0.0, rounds=1)}
    # It has no gradients on a CPU, and says so.
    found.pop("flex", None)
    for row in found.values():
        assert row.note == ""
        assert row.difference < ROUNDINGS, row.provider
    return found


@MODES
@pytest.mark.parametrize("cell", gpu_providers.CELLS)
@pytest.mark.parametrize("form", [{}, {"layers": 2, "bidirectional": True}], ids=["one", "stacked"])
def test_a_loop_over_cells(cell, form, mode):
    case = Recurrence(cell, 5, 3, 4, 6, tags=gpu_cases.CELLS, **form)
    assert list(_rows(case, mode)) == [gpu.OURS, ROUNDED, "torch", "compiled cell"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("cell", gpu_providers.CELLS)
def test_a_cell_is_one_graph(cell, monkeypatch):
    """It compiles whole, once for all steps, with its gradients; the generated code is left to torch."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(gpu_providers.CELLS[cell], backend=backend, fullgraph=True)
    monkeypatch.setitem(gpu_providers.CELLS, cell, compiled)
    assert "compiled cell" in _rows(Recurrence(cell, 5, 2, 4, 6, tags=gpu_cases.CELLS), "forward_backward")
    # One of the first step, whose state needs no gradient, and one of the others.
    assert len(graphs) == 2


@MODES
@pytest.mark.parametrize("cell", gpu_providers.CELLS)
@pytest.mark.skipif(not emulator.in_use(), reason="the emulator of the CUDA kernels is not built, or there is a GPU")
def test_the_cuda_kernels(cell, mode, monkeypatch):
    """Emulated; what they cannot do is left to others."""
    monkeypatch.setattr(gpu_providers, "CUDA_DEVICE", "cpu")
    for form in ({}, {"layers": 2, "bidirectional": True}):
        found = list(_rows(Recurrence(cell, 5, 3, 4, 6, **form), mode))
        assert found == [gpu.OURS, gpu.CUDA, ROUNDED, "torch"]
    double = Recurrence(cell, 2, 1, 4, 6, dtype=torch.float64)
    assert gpu.CUDA not in [maker.name for maker in gpu_providers.providers(double, "forward", "cpu")]


def test_cases_of_the_cuda_kernels():
    names = [case.name for case in gpu_cases.PERSISTENT]
    assert len(set(names)) == len(names)
    for hidden in (128, 256, 512, 640, 1024):
        assert {f"lstm_T512_B{batch}_I{hidden}_H{hidden}_bfloat16" for batch in (1, 8, 16, 32, 64)} <= set(names)
    assert all(case.modes == ("forward", "forward_backward") for case in gpu_cases.PERSISTENT)


def test_each_bar_has_cases():
    for bar in gpu_bars.BARS:
        assert sum(bar.holds(case) for case in gpu_cases.PERSISTENT) >= 2, bar.name
    assert sum(gpu_bars.BARS[0].holds(case) for case in gpu_cases.PERSISTENT) == 25


def _timed(case, provider, ms, mode="forward", note=""):
    return gpu.Row(case.name, case.group, mode, provider, ms, ms / 2, 0.0, 0.0, None, note)


def test_bars_are_judged():
    first, second = (case for case in gpu_cases.PERSISTENT if case.layers == 2 and not case.bidirectional)
    rows = [
        *(_timed(first, "ours", 1.0), _timed(first, "theirs", 8.0)),
        *(_timed(second, "ours", 2.0), _timed(second, "theirs", 4.0)),
        *(_timed(first, "ours", 1.0, "forward_backward"), _timed(first, "theirs", 2.0, "forward_backward")),
        _timed(second, "theirs", float("nan"), "forward_backward", "failed"),
    ]
    table = gpu_bars.bars(rows, gpu_cases.PERSISTENT, "ours", "theirs")
    forward, both = (row for row in table.rows if row[0] == "two layers, one direction")
    assert forward[1:] == ("forward", "3", "4.00", "2.00", "4.00", "2 of 2", "yes", second.name)
    assert both[1:] == ("forward+backward", "3", "2.00", "2.00", "2.00", "1 of 2", "no", first.name)
    others = [row for row in table.rows if row not in (forward, both)]
    assert {row[7] for row in others} == {"not measured"}
    # The worst case counts where the bar names one.
    grid = [case for case in gpu_cases.PERSISTENT if gpu_bars.BARS[0].holds(case)][:2]
    rows = [
        _timed(case, name, ms)
        for case, ms in zip(grid, (10.0, 1.1), strict=True)
        for name, ms in (("ours", 1.0), ("theirs", ms))
    ]
    table = gpu_bars.bars(rows, gpu_cases.PERSISTENT, "ours", "theirs")
    assert table.rows[0][2:8] == ("3, worst 1.2", "3.32", "1.10", "3.32", "2 of 25", "no")


def test_a_group_is_chosen(tmp_path, monkeypatch, capsys):
    timed = []
    monkeypatch.setattr(gpu, "time_case", lambda case, *_, **__: timed.append(case) or [])
    assert gpu.main(["--dry", "--only", "persistent", "--json", str(tmp_path / "gpu.json")]) == 0
    assert set(timed) == {case for case in gpu_cases.DRY_CASES if isinstance(case, Recurrence)}
    with pytest.raises(SystemExit):
        gpu.main(["--only", "others"])
    assert "invalid choice: 'others'" in capsys.readouterr().err


def test_loops_over_cells_are_affordable():
    """Few cases have one, of few steps, since each is compiled in seconds and launched a step at a time."""
    tagged = [case for case in gpu_cases.CASES if case.tags & gpu_cases.CELLS]
    assert 5 <= len(tagged) <= 10
    for case in tagged:
        assert case.steps * case.layers * (2 if case.bidirectional else 1) <= gpu_providers.MOST_CELLS
    long = Recurrence("lstm", gpu_providers.MOST_CELLS // 2 + 1, 1, 4, 4, layers=2, tags=gpu_cases.CELLS)
    untagged = Recurrence("lstm", 2, 1, 4, 4)
    for case in (long, untagged):
        assert "compiled cell" not in [maker.name for maker in gpu_providers.providers(case, "forward", "cpu")]


def _flash_attn_func(q, k, v, causal=False):
    """(batch, rows, heads, size), fewer heads of keys and values among them."""
    turned = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*turned, is_causal=causal, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("peer", FLASH)
@MODES
def test_flash_attn(peer, mode, monkeypatch):
    _stand_in(monkeypatch, FLASH[peer], flash_attn_func=_flash_attn_func)
    for kv_heads in (None, 2):
        assert peer in _rows(Attention(2, 4, 9, 9, 8, kv_heads=kv_heads, causal=True), mode)


def test_flash_attn_3_with_a_log_sum_exp(monkeypatch):
    def function(*args, **options):
        return _flash_attn_func(*args, **options), None

    _stand_in(monkeypatch, "flash_attn_interface", flash_attn_func=function)
    assert "flash-attn-3" in _rows(Attention(2, 4, 9, 9, 8), "forward")


@pytest.mark.parametrize("peer", FLASH)
def test_flash_attn_decodes_with_a_cache(peer, monkeypatch):
    """By the function that splits the keys."""
    _stand_in(monkeypatch, FLASH[peer], flash_attn_with_kvcache=_flash_attn_func)
    assert peer in _rows(Attention(2, 4, 1, 9, 8, kv_heads=2, inference=True), "forward")


def test_options_leave_flash_attn_out(monkeypatch):
    for name in FLASH.values():
        _stand_in(monkeypatch, name)
    case = Attention(1, 2, 9, 9, 8, causal=True, option="alibi")
    assert [maker.name for maker in gpu_providers.providers(case, "forward", "cpu")] == [gpu.OURS, ROUNDED, "flex"]


def _flashrnn(product, weight, bias, function, backend, dtype):
    """As FlashRNN's documentation has it: (B, T, gates, heads, H) to (states, B, T, heads, H)."""
    assert (backend, dtype) == ("cuda_fused", "float32")
    h = c = product.new_zeros(product.shape[0], *product.shape[3:])
    states = []
    for row in product.unbind(1):
        of_h = torch.einsum("gndp,bnp->gbnd", weight, h)
        x = row.transpose(0, 1)
        if function == "gru":
            n, r, z, more = of_h[0] + bias[0], x[0] + of_h[1] + bias[1], x[1] + of_h[2] + bias[2], x[2] + bias[3]
            z = torch.sigmoid(z)
            h = z * h + (1 - z) * torch.tanh(more + torch.sigmoid(r) * n)
            states.append(torch.stack((h,)))
        elif function == "lstm":
            i, f, g, o = x + of_h + bias[:, None]
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(torch.stack((h, c)))
        else:
            assert function == "elman"
            h = torch.tanh(x[0] + of_h[0] + bias[0])
            states.append(torch.stack((h,)))
    return torch.stack(states, 2), states[-1]


@MODES
@pytest.mark.parametrize("cell", gpu_providers.FLASHRNN)
def test_flashrnn(cell, mode, monkeypatch):
    _stand_in(monkeypatch, "flashrnn", flashrnn=_flashrnn)
    assert list(_rows(Recurrence(cell, 5, 3, 4, 6), mode)) == [gpu.OURS, ROUNDED, "torch", "flashrnn"]


def test_flashrnn_has_one_layer_and_no_relu(monkeypatch):
    _stand_in(monkeypatch, "flashrnn", flashrnn=_flashrnn)
    for form in (
        functools.partial(Recurrence, "lstm", layers=2),
        functools.partial(Recurrence, "gru", bidirectional=True),
        functools.partial(Recurrence, "rnn_relu"),
    ):
        case = form(steps=2, batch=1, inputs=4, hidden=4)
        assert [maker.name for maker in gpu_providers.providers(case, "forward", "cpu")] == [gpu.OURS, ROUNDED, "torch"]


def test_a_peer_that_fails_says_why(monkeypatch):
    def function(*args, **options):
        raise RuntimeError("it is not compiled for this device")

    _stand_in(monkeypatch, "flashrnn", flashrnn=function)
    with torch.no_grad():
        rows = gpu.time_case(Recurrence("lstm", 2, 1, 4, 4), "forward", "cpu", budget=0.0, rounds=1)
    notes = {row.provider: row.note for row in rows}
    assert notes["flashrnn"] == "RuntimeError: it is not compiled for this device"
    assert notes[gpu.OURS] == notes["torch"] == ""


def test_a_peer_that_differs_is_named(monkeypatch):
    def function(*args, **options):
        states, last = _flashrnn(*args, **options)
        return 1.5 * states, last

    _stand_in(monkeypatch, "flashrnn", flashrnn=function)
    with torch.no_grad():
        rows = gpu.time_case(Recurrence("lstm", 2, 1, 4, 4), "forward", "cpu", budget=0.0, rounds=1)
    said = gpu.render(rows, {})
    assert "flashrnn differs by 0.5" in said
    assert said.count("differs") == 1
