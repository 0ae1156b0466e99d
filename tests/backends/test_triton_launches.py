"""Launches that go to the compiled program at once, and the plans of calls: what they may have in common."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from seqkernels.backends.triton import attention, launches
from seqkernels.backends.triton.launches import Launch
from seqkernels.scores import Scores

ROOT = Path(__file__).resolve().parents[2]
PASSES = ("forward", "backward", "forward, new lengths")


class _Program:
    """A compiled program, and what it was launched with."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launched.append((grid, args))


class _Kernel:
    """A kernel, and the calls that went through Triton."""

    arg_names = ("x", "n", "SECOND", "FIRST")
    params = tuple(SimpleNamespace(do_not_specialize=name == "n") for name in arg_names)

    def __init__(self) -> None:
        self.program, self.calls = _Program(), []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **named: Any) -> _Program:
            self.calls.append((grid, args, named))
            return self.program

        return call


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> _Kernel:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(launches, "_programs", {})
    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    return _Kernel()


def test_only_the_first_goes_through_triton(kernel: _Kernel) -> None:
    launch = Launch(kernel, (5, 2), {"FIRST": 1, "SECOND": 2}, {"num_warps": 4})
    for n in (7, 8, 9):
        launch("x", n)
    assert kernel.calls == [((5, 2), ("x", 7), {"FIRST": 1, "SECOND": 2, "num_warps": 4})]
    # Constants as the kernel orders them.
    assert kernel.program.launched == [((5, 2, 1), ("x", n, 2, 1)) for n in (8, 9)]


def _launched(kernel: _Kernel, x: Any, n: Any, second: int = 2, warps: int = 4) -> int:
    """Launch anew; how many went through Triton so far."""
    Launch(kernel, (n,), {"FIRST": 1, "SECOND": second}, {"num_warps": warps})(x, n)
    return len(kernel.calls)


def test_a_new_launch_finds_its_program(kernel: _Kernel) -> None:
    """By what Triton compiled it for; `n` is nothing of that."""
    flat = torch.zeros(64)
    alike = [(flat, None, 2.0, (flat, 32)), (flat[4:], None, 3.0, (flat[8:], 48))]
    assert [_launched(kernel, x, n) for x, n in zip(alike, (16, 17), strict=True)] == [1, 1]
    # Each goes by itself, and with its own grid.
    assert kernel.program.launched == [((17, 1, 1), (alike[1], 17, 2, 1))]
    others = [
        (flat[1:], None, 2.0, (flat, 32)),
        (flat.half(), None, 2.0, (flat, 32)),
        (flat, flat, 2.0, (flat, 32)),
        (flat, None, 2, (flat, 32)),
        (flat, None, 2.0, (flat, 33)),
        (flat, None, 2.0, (flat, 1)),
        (flat, None, 2.0, (flat, 1 << 31)),
        (flat, None, 2.0, (flat[1:], 32)),
    ]
    for count, x in enumerate(others, start=2):
        assert _launched(kernel, x, 5) == count
    assert _launched(kernel, alike[0], 5, second=3) == len(others) + 2
    assert _launched(kernel, alike[0], 5, warps=8) == len(others) + 3
    assert _launched(kernel, alike[0], 1 << 31) == len(others) + 4
    assert _launched(kernel, alike[1], 6) == len(others) + 4


def test_the_interpreter_has_no_program(kernel: _Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    launch = Launch(kernel, (1,), {"FIRST": 1, "SECOND": 2})
    for n in (7, 8):
        launch("x", n)
    assert [args for _, args, _ in kernel.calls] == [("x", 7), ("x", 8)]
    assert kernel.program.launched == []


def _inputs(size: int = 8, keys: int = 6, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, 4, length, size, dtype=dtype) for length in (5, keys, keys)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that were made, in place of those of attention."""
    found: list[Any] = []

    class Plan:
        def __init__(self, scores: Scores, needs: Any, *tensors: Any) -> None:
            found.append(self)

        def __call__(self, scores: Scores, *tensors: Any) -> Any:
            return self

    monkeypatch.setattr(attention, "_Forward", Plan)
    monkeypatch.setattr(attention, "_Backward", Plan)
    monkeypatch.setattr(attention, "_plans", {})
    return found


def test_calls_alike_have_one_plan(made: list[Any]) -> None:
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    for scores in (Scores(0.5), Scores(0.5, key_lengths=lengths), Scores(0.5, right=0, precision="tf32")):
        made.clear()
        plans = {
            attention.attention_forward(*_inputs(), scores._replace(key_lengths=x))
            for x in ([lengths, lengths + 1] if scores.key_lengths is not None else [None, None])
        }
        assert len(made) == len(plans) == 1


def test_calls_that_triton_tells_apart_have_their_own(made: list[Any]) -> None:
    q, k, v = _inputs()
    flat = torch.randn(q.numel() + 1)
    bias = torch.randn(1, 4, 5, 6)
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    calls = [
        ((q, k, v), Scores(0.5)),
        ((flat[1:].view_as(q), k, v), Scores(0.5)),  # another alignment
        ((q.transpose(1, 2).contiguous().transpose(1, 2), k, v), Scores(0.5)),
        (_inputs(size=16), Scores(0.5)),
        (_inputs(keys=7), Scores(0.5)),
        (_inputs(dtype=torch.float16), Scores(0.5)),
        ((q, k, v), Scores(0.25)),
        ((q, k, v), Scores(0.5, right=0)),
        ((q, k, v), Scores(0.5, softcap=3.0)),
        ((q, k, v), Scores(0.5, precision="tf32")),
        ((q, k, v), Scores(0.5, key_lengths=lengths)),
        ((q, k, v), Scores(0.5, bias=bias)),
        ((q, k, v), Scores(0.5, bias=bias[:, :1])),
        ((q, k, v), Scores(0.5, bias=bias.transpose(2, 3).contiguous().transpose(2, 3))),
        ((q, k, v), Scores(0.5, bias=bias.half())),
    ]
    for inputs, scores in calls:
        attention.attention_forward(*inputs, scores)
    assert len(made) == len(calls)
    out, lse = torch.randn_like(q), torch.randn(q.shape[:3])
    grads = [(out, None, [True, True, True, False]), (out, lse, [True, True, True, False])]
    grads += [
        (out, None, [True, False, False, False]),
        (out.expand(2, 4, 5, 8)[..., :1].expand_as(out), None, [True] * 4),
    ]
    for grad_out, grad_lse, needs in grads:
        attention.attention_backward(grad_out, grad_lse, q, k, v, out, lse, Scores(0.5), needs)
    assert len(made) == len(calls) + len(grads)


def test_numbers_of_scores_are_floats() -> None:
    """As an integer, 2 would be in the key of a program, but equal to 2.0 in that of a plan."""
    q, k, _ = _inputs()
    terms = attention._terms(Scores(2, softcap=30), Scores(2).shape(q, k), k)
    assert [type(terms.scale), type(terms.softcap)] == [float, float]


def test_plans_are_not_kept_without_end(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MOST_PLANS", 3)
    for keys in range(1, 20):
        attention.attention_forward(*_inputs(keys=keys), Scores(0.5))
        assert len(attention._plans) <= 3
    assert len(made) == 19


def test_the_measurement_without_a_gpu() -> None:
    """Triton's own launcher takes what a `Launch` hands it, on a driver that does nothing."""
    command = [sys.executable, "-c", "from benchmarks import launches; launches.main(rounds=1, calls=2)"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.partition(" direct ")[0].rstrip() for line in said.splitlines()] == list(PASSES)


_HITS = """
import sys, tempfile
from pathlib import Path
import torch
from benchmarks import launches
from seqkernels.backends.triton import ahead, attention
from seqkernels.scores import Scores

with tempfile.TemporaryDirectory() as folder:
    launches._use_stub(Path(folder))
    cache = Path(sys.argv[1])
    names = [f"{kernel} bf16 D=64 causal" for kernel in ("forward", "backward_q", "backward_kv", "few_rows")]
    names += ["delta bf16 D=64 plain", "merge bf16 D=64 plain"]
    for variant in ahead.variants():
        if str(variant) in names:
            ahead.compile_variant(variant, "sm_90")
    before = len(list(cache.glob("*/*.cubin")))
    q, k = torch.zeros(2, 8, 300, 64, dtype=torch.bfloat16), torch.zeros(2, 2, 8192, 64, dtype=torch.bfloat16)
    scores = Scores(0.125, right=0)
    found = attention.attention_forward(q, k[:, :, :300], k[:, :, :300], scores)
    attention.attention_backward(
        found[0], None, q, k[:, :, :300], k[:, :, :300], *found, scores, [True, True, True, False]
    )
    attention.attention_forward(q[:, :, :1], k, k, scores)
    print(before, len(list(cache.glob("*/*.cubin"))))
"""


def test_calls_find_what_was_compiled_ahead(tmp_path: Path) -> None:
    """Deployments compile before the first call: ``python -m seqkernels compile``."""
    command = [sys.executable, "-c", _HITS, str(tmp_path)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["6", "6"]
