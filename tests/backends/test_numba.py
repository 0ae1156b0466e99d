"""What only the numba implementation has: its vector mathematics, its threads, how often it compiles."""

from __future__ import annotations

import itertools
import multiprocessing
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import seqkernels
from seqkernels import testing
from seqkernels.backends import Call
from seqkernels.backends import numba as backend

pytest.importorskip("numba")

from seqkernels.backends.numba import attention, recurrence, simd, team

DTYPES = [np.float32, np.float64]


def _ulps(found, exact):
    """Error in units of the last place of the exact result, where that is a normal number."""
    normal = np.abs(exact) >= np.finfo(found.dtype).tiny
    ulp = np.spacing(np.abs(exact[normal]).astype(found.dtype)).astype(np.longdouble)
    return np.abs(found[normal] - exact[normal]) / ulp


@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_are_exact_to_a_few_ulp(dtype):
    largest = 87 if dtype == np.float32 else 708
    small = 10.0 ** np.linspace(-30, 0, 20001)
    x = np.concatenate([np.linspace(-largest, 0, 200001), np.linspace(-3, 3, 200001), small, -small]).astype(dtype)
    exact = x.astype(np.longdouble)
    for function, expected, bound in (
        (lambda a: simd.exp_minus(a, a.dtype.type(0)), np.exp(exact), 1.5),
        (simd.sigmoid, 1 / (1 + np.exp(-exact)), 2.5),
        (simd.tanh_all, np.tanh(exact), 2),
    ):
        found = x.copy()
        function(found)
        assert _ulps(found, expected).max() < bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_at_the_ends(dtype):
    x = np.array([np.nan, np.inf, -np.inf, 2000, -2000, 0, -0.0], dtype)
    sigmoid, tanh, exp = x.copy(), x.copy(), np.array([np.nan, -np.inf, -2000, 0, -0.0], dtype)
    simd.sigmoid(sigmoid)
    simd.tanh_all(tanh)
    simd.exp_minus(exp, dtype(0))
    tiny = np.finfo(dtype).tiny
    np.testing.assert_allclose(sigmoid, [np.nan, 1, 0, 1, 0, 0.5, 0.5], rtol=0, atol=tiny)
    np.testing.assert_array_equal(tanh, np.array([np.nan, 1, -1, 1, -1, 0, 0], dtype))
    np.testing.assert_array_equal(exp, np.array([np.nan, 0, 0, 1, 1], dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product(dtype):
    generator = torch.Generator().manual_seed(0)
    for rows, depth, size in itertools.product((1, 3, 8, 21), (1, 15, 16, 33), (1, 16, 17, 70)):
        # Small integers: every order of summation is exact.
        a = torch.randint(-4, 5, (depth, rows), generator=generator).to(dtype)
        w = torch.randint(-4, 5, (depth, size), generator=generator).to(dtype)
        packed = simd.panels(w)
        columns, _, width = packed.shape
        assert width * packed.element_size() == simd.PANEL_BYTES
        c = torch.ones((rows + 1, columns * width), dtype=dtype)
        simd.add_product(
            simd.flat(a), 0, 1, rows, simd.flat(packed), 0, depth * width, depth,
            simd.flat(c), 0, columns * width, rows, columns,
        )  # fmt: skip
        assert torch.equal(c[:rows, :size], 1 + a.t() @ w)
        assert (c[:rows, size:] == 1).all()
        assert (c[rows] == 1).all()


def test_strided_reads_any_view():
    x = torch.arange(60.0).view(3, 4, 5)
    for view in (x, x.transpose(0, 2), x[1:, ::2, 3:], x[:, :1].expand(3, 4, 5), x[:0], x[2, 3, 4]):
        array, strides = simd.strided(view)
        assert array.flags.c_contiguous
        for place in itertools.product(*map(range, view.shape)):
            assert array[sum(i * s for i, s in zip(place, strides, strict=True))] == view[place]


@pytest.mark.parametrize("multiple", [1, 8])
def test_ranges_cover_all_units_once(multiple):
    for units, threads, chunks in itertools.product((0, 1, 7, 16, 33), (1, 2, 3), (1, 2, 5)):
        ranges = []
        team.run(lambda *chunk, ranges=ranges: ranges.append(chunk), units, threads, chunks, multiple)
        ranges.sort()
        assert [unit for begin, end, _ in ranges for unit in range(begin, end)] == list(range(units))
        assert all(begin % multiple == 0 for begin, _, _ in ranges)
        numbers = [number for *_, number in ranges]
        assert numbers == sorted(set(numbers))
        assert all(number < chunks for number in numbers)


def test_the_caller_does_not_wait_for_busy_threads():
    busy, done = threading.Event(), []
    blocker = team._pool(1).submit(busy.wait)
    team.run(lambda begin, end, chunk: done.append(threading.current_thread()), 4, 2, 4)
    assert done == [threading.current_thread()] * 4
    busy.set()
    assert blocker.result()


def test_team_size_follows_torch_and_the_work():
    with testing.threads(2):
        assert team.team_size(100, 1e12) == 2
        assert team.team_size(1, 1e12) == 1
        assert team.team_size(100, 1e3) == 1
    with testing.threads(1):
        assert team.team_size(100, 1e12) == 1


@pytest.mark.parametrize("caller", [True, False])
def test_errors_are_raised(caller):
    both = threading.Barrier(2, timeout=60)

    def task(begin, end, chunk):
        both.wait()
        if (threading.current_thread() is threading.main_thread()) == caller:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        team.run(task, 2, 2, 2)


@pytest.mark.skipif(not hasattr(multiprocessing, "get_context") or sys.platform == "win32", reason="no fork")
def test_a_forked_child_has_threads_of_its_own():
    script = """
import os, time
from seqkernels.backends.numba import team
team.run(lambda *_: time.sleep(0.01), 4, 2, 4)
child = os.fork()
if child == 0:
    team.run(lambda *_: time.sleep(0.01), 4, 2, 4)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", script], check=True, timeout=120)


def test_kernels_compile_once_per_dtype():
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16, torch.float64), testing.LAYOUTS[:-2]):
        for options in ({}, {"mask": "B11N"}, {"bias": "1HMN", "mask": "BHMN"}):
            inputs = testing.attention_inputs(2, 2, 3, 4, 5, dtype, layout=layout, **options)
            with seqkernels.use_backend("numba"):
                outputs = seqkernels.ops.attention.attention(*inputs)
                torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        for cell, control in itertools.product(("gru", "lstm"), (False, True)):
            inputs = testing.recurrence_inputs(cell, 3, 2, 4, dtype, control=control, layout=layout)
            with seqkernels.use_backend("numba"):
                seqkernels.ops.recurrence.recurrence(*inputs, cell=cell)[0].sum().backward()
    for module in (attention, recurrence):
        for kernel in (module._forward, module._backward):
            assert len(kernel.signatures) == 2


def test_availability(monkeypatch):
    assert backend.unavailable() is None
    call = Call("recurrence", "cpu", torch.float16, "gru", ("control",))
    assert backend.unsupported(call) is None
    assert backend.unsupported(call._replace(device="cuda")) == "runs on cpu only, not on cuda"
    more = ("control", "gates", "norm", "peephole", "recurrent_mask", "reset_state", "zoneout")
    declined = "has no gates, norm, peephole, recurrent_mask, reset_state, zoneout"
    assert backend.unsupported(call._replace(features=more)) == declined
    monkeypatch.setitem(sys.modules, "numba", None)
    assert backend.unavailable().startswith("numba cannot be imported: ")


def test_numba_is_imported_at_first_use_only():
    script = "import sys, seqkernels; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
