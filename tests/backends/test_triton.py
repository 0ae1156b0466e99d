"""What the Triton backend says of itself, and its kernels compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import triton

from seqkernels import __main__, backends
from seqkernels.backends.triton import ahead, attention_kernels
from seqkernels.backends.triton.ahead import RecurrenceVariant
from seqkernels.backends.triton.configs import ROOMY, blocks_of
from seqkernels.backends.triton.recurrence_configs import sequence_tiles
from seqkernels.cells import CELLS

from ..conftest import INTERPRETED

FORWARD = ahead.Variant("forward", torch.bfloat16, 128, "causal")
BUDGET = json.loads(ahead.BUDGET.read_text())


def _call(device="cuda", dtype=torch.bfloat16, op="attention", features=()):
    return backends.Call(op, device, dtype, "", features)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of the CPU")
def test_why_not():
    package = backends.backend("triton")
    assert package.unsupported(_call()) is None
    assert package.unsupported(_call(dtype=torch.float64)) == "has no torch.float64"
    assert package.unsupported(_call(op="rotary")) == "has no kernel for rotary"
    assert package.unsupported(_call(features=("weights",))) == "has no weights"
    if not torch.cuda.is_available():
        assert package.unavailable() == "there is no CUDA device, and Triton's interpreter is off"
        assert package.unsupported(_call("cpu")) == "runs on cuda only, not on cpu"


def test_importing_the_package_does_not_import_triton():
    code = "import sys, seqkernels; raise SystemExit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has tiles of its own")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["forward", "few_rows", "backward_q", "backward_kv", "backward_bias"])
def test_tiles(kernel, dtype):
    for size in (1, 15, 16, 17, 64, 65, 128, 129, 256, 257, 512):
        for many in (False, True):
            blocks = blocks_of(kernel, dtype, size, 1, many_terms=many)
            assert blocks.d >= max(size, 16) > blocks.d // 2 or size < 16
            assert blocks.dv == 16
            assert blocks == blocks_of(kernel, dtype, size, 1, many_terms=many, shared=ROOMY)
            small = blocks_of(kernel, dtype, size, 1, many_terms=many, shared=ROOMY - 1)
            assert small.n in (blocks.n // 2, 16)
            assert blocks_of(kernel, dtype, size, 1, many_terms=many, architecture=80).m <= blocks.m


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has tiles of its own")
def test_tiles_of_pages_and_padded_heads():
    """They have smaller tiles where columns or pointers take the registers; scores with many terms are before both."""

    def forward(size, value_size=None, **options):
        return blocks_of("forward", torch.bfloat16, size, value_size or size, **options)

    assert forward(96)[:2] == forward(80)[:2] == forward(128, 96)[:2] == forward(128, pages=True)[:2] == (128, 64)
    assert forward(128)[:2] == (128, 128)
    assert forward(256, pages=True).n == forward(192).n < forward(256).n
    assert forward(96, many_terms=True, pages=True) == forward(128, many_terms=True)
    for kernel in ("few_rows", "backward_q", "backward_kv"):
        assert blocks_of(kernel, torch.bfloat16, 96, 96, pages=True) == blocks_of(kernel, torch.bfloat16, 128, 128)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has tiles of its own")
def test_tiles_of_each_architecture():
    """Where products of a warp group, or of a memory of their own, take other registers."""

    def forward(architecture):
        return blocks_of("forward", torch.bfloat16, 128, 128, architecture=architecture)[:2]

    assert forward(80) == forward(89) == forward(100) == forward(120) == (128, 64)
    assert forward(90) == (128, 128)


def test_what_is_compiled():
    """All kernels of attention, for every kind of call that has a kernel of its own; all cells."""
    names = {str(variant) for variant in ahead.variants()}
    assert len(names) == len(list(ahead.variants()))
    kernels = {name.removesuffix("_kernel") for name in vars(attention_kernels) if name.endswith("_kernel")}
    compiled = {variant.kernel for variant in ahead.variants() if isinstance(variant, ahead.Variant)}
    assert compiled == kernels | {"few_rows"}
    assert {variant.cell for variant in ahead.variants() if isinstance(variant, RecurrenceVariant)} == set(CELLS)
    assert {"few_rows bf16 D=128 pages", "forward bf16 D=80 causal", "backward_kv bf16 D=192 Dv=128 causal"} <= names
    assert {f"backward_bias bf16 D=64 all {over}" for over in ("sum_rows", "sum_keys", "sum_rows sum_keys")} <= names


def test_every_kernel_has_a_budget():
    for name in ahead.ARCHITECTURES:
        assert BUDGET[name].keys() == {str(x) for x in ahead.variants() if ahead.is_shipped(x, name)}
    assert BUDGET.keys() == set(ahead.ARCHITECTURES)


def test_budget_keeps_the_rules():
    """Forward kernels of attention keep their numbers in registers; all fit the shared memory."""
    for architecture, room in (("sm_80", 163 * 1024), ("sm_90", 227 * 1024), ("sm_100", 227 * 1024)):
        for name, (registers, spilled, shared) in BUDGET[architecture].items():
            assert shared <= room, name
            assert registers <= 255
            if name.startswith(("forward", "few_rows", "merge")):
                assert spilled <= (8 if (architecture, name) == ("sm_100", "forward fp32 D=512 causal") else 0), name
            if name.startswith("recurrence_forward"):
                # Two numbers, in some of them.
                assert spilled <= 8, name


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has tiles of its own")
def test_tiles_of_recurrences_with_options():
    """Options take registers; the backward pass has them to spare."""

    def of(cell, dtype, precision="ieee", kernel="forward"):
        return [sequence_tiles(kernel, cell, dtype, 256, precision, options=options) for options in (False, True)]

    plain, busy = of("lstm", torch.bfloat16)
    assert (plain.warps, busy) == (4, plain._replace(warps=8))
    plain, busy = of("rnn_tanh", torch.bfloat16)
    assert (plain.columns, busy) == (256, plain._replace(columns=128))
    plain, busy = of("gru", torch.float32, "tf32")
    assert busy == plain._replace(warps=8, ahead=1)
    for plain, busy in (of("gru", torch.float32), of("lstm", torch.bfloat16, kernel="backward")):
        assert plain == busy


def test_breaches():
    registers, spilled, shared = BUDGET["sm_90"][str(FORWARD)]
    kept = ahead.Needs(registers, spilled, shared, True)
    assert ahead.breaches({("sm_90", FORWARD): kept}) == []
    over = ahead.Needs(registers + 1, spilled + 8, shared + 4, False)
    assert ahead.breaches({("sm_90", FORWARD): over}) == [
        f"sm_90 {FORWARD}: registers {registers + 1}, allowed {registers}",
        f"sm_90 {FORWARD}: spilled {spilled + 8}, allowed {spilled}",
        f"sm_90 {FORWARD}: shared {shared + 4}, allowed {shared}",
        f"sm_90 {FORWARD}: no tensor-core instructions",
    ]
    unknown = FORWARD._replace(size=97)
    assert ahead.breaches({("sm_90", unknown): kept}) == [f"sm_90 {unknown}: has no budget"]


def test_budget_as_it_is_written():
    needs = ahead.Needs(254, 0, 114688, True)
    found = {("sm_90", FORWARD): needs, ("sm_80", FORWARD): needs}
    assert json.loads(ahead.as_json(found)) == {name: {str(FORWARD): [254, 0, 114688]} for name in ("sm_90", "sm_80")}
    assert "254" in ahead.render(found)


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions cannot be compiled")
@pytest.mark.skipif(not triton.__version__.startswith("3.7."), reason="the budget is that of Triton 3.7")
@pytest.mark.parametrize(
    ("kernel", "tensor_cores"),
    [
        ("backward_q bf16 D=64 plain", "yes"),
        ("few_rows bf16 D=64 pages", "yes"),
        ("backward_bias bf16 D=64 all sum_rows sum_keys", "yes"),
        ("merge bf16 D=64 plain", "no"),
    ],
)
def test_compile(kernel, tensor_cores, capsys):
    """A kernel in a process of its own, held to the budget."""
    with pytest.raises(SystemExit) as status:
        __main__.main(["compile", "--arch", "sm_90", "--only", kernel])
    assert status.value.code == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if kernel in line)
    assert line.endswith(f"  {tensor_cores}")


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions cannot be compiled")
def test_compile_nothing(capsys):
    with pytest.raises(SystemExit) as status:
        __main__.main(["compile", "--only", "no such kernel"])
    assert status.value.code == 1
    assert "no kernel has 'no such kernel'" in capsys.readouterr().err


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions cannot be compiled")
def test_unknown_architecture(capsys):
    with pytest.raises(SystemExit) as status:
        __main__.main(["compile", "--arch", "sm_70"])
    assert status.value.code == 1
    assert capsys.readouterr().err == "compile: arch: expected some of sm_80, sm_90, sm_100, got 'sm_70'\n"


def test_compile_in_the_interpreter():
    """Says so in place of compiling functions that are interpreted."""
    command = [sys.executable, "-m", "seqkernels", "compile", "--only", "few_rows bf16 D=64 plain"]
    ended = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr == "compile: Triton's interpreter is on (TRITON_INTERPRET), which compiles nothing\n"
