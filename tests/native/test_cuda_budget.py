"""What the compiled CUDA kernels need, held to the reviewed budget, and the instructions they are made of."""

from __future__ import annotations

import json

import pytest

from seqkernels import __main__ as cli
from seqkernels.backends.cuda import budget, resources
from seqkernels.backends.cuda.extension import extension, load_error

THREAD_REGISTERS = 255
"""That a thread of a block of 256 can have."""
STEP_REGISTERS = 128
"""That leave a multiprocessor two blocks of a step's pass: what it waits for is memory."""
STACK = {"exact": 32, "tall tf32x3": 16}
"""Bytes, of a thread, that kernels of float32 may spill."""

built = [
    pytest.mark.skipif(load_error() is not None, reason=str(load_error())),
    pytest.mark.skipif(resources.find_tool() is None, reason="there is no cuobjdump"),
]
CELLS = ("lstm", "gru", "rnn")
NAMES = {
    f"{cell} {kind} {product}"
    for cell in CELLS
    for kind in ("forward", "backward", "backward tall")
    for product in ("float16", "bfloat16", "tf32x3", "exact")
    if (kind, product) != ("backward tall", "exact")
}
STORAGES = ("float16", "bfloat16", "float32")
NAMES |= {f"{cell} {kind} step {storage}" for cell in CELLS for kind in ("forward", "backward") for storage in STORAGES}
NAMES |= {f"begin {storage}" for storage in STORAGES}


@pytest.mark.skipif(load_error() is not None, reason=str(load_error()))
@pytest.mark.skipif(resources.find_tool() is None, reason="there is no cuobjdump")
def test_the_module_keeps_its_budget() -> None:
    found = budget.read(extension().__file__)
    targets = extension().build_info()["targets"].split()
    assert set(found) == {(target, name) for target in targets if target.startswith("sm_") for name in NAMES}
    version = extension().build_info()["cuda"]
    if version != budget.CUDA:
        pytest.skip(f"the budget is of CUDA {budget.CUDA}, the module of {version}")
    assert budget.breaches(found, budget.allowed()) == []
    assert budget.unused(found, budget.allowed()) == []


def test_the_budget_itself() -> None:
    allowed = budget.allowed()
    for rows in allowed.values():
        assert set(rows) == NAMES
        for name, (registers, stack) in rows.items():
            assert registers <= (STEP_REGISTERS if "step" in name or "begin" in name else THREAD_REGISTERS)
            assert stack <= max((most for end, most in STACK.items() if name.endswith(end)), default=0), name


def _needs(registers: int = 200, stack: int = 0, *opcodes: str) -> resources.Resources:
    return resources.Resources(registers, stack, 1024, frozenset(opcodes))


OF_80 = ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E")
OF_90 = (
    *OF_80,
    "STAS.128",
    "SYNCS.EXCH.64",
    "SYNCS.ARRIVE.TRANS64",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT",
    "UCGABAR_ARV",
    "UCGABAR_WAIT",
)


@pytest.mark.parametrize(
    ("key", "needs", "said"),
    [
        (("sm_80", "gru forward float16"), _needs(200, 0, *OF_80), []),
        (("sm_90a", "gru forward float16"), _needs(200, 0, *OF_90), []),
        (("sm_90a", "gru forward float16"), _needs(200, 0, *OF_80), ["no STAS", "no SYNCS.EXCH"]),
        (
            ("sm_80", "gru forward float16"),
            _needs(201, 8, *OF_80),
            ["registers 201, allowed 200", "stack 8, allowed 0"],
        ),
        (("sm_80", "gru forward float16"), _needs(200, 0, *OF_80, "STL.64"), ["STL, where nothing spills"]),
        (("sm_80", "gru forward bfloat16"), _needs(200, 0, *OF_80), ["no HMMA.16816.F32.BF16"]),
        (("sm_80", "gru forward tf32x3"), _needs(200, 0, *OF_80), ["no HMMA.1688.F32.TF32"]),
        (("sm_80", "gru forward exact"), _needs(200, 0, "FFMA", "LDGSTS.E"), []),
        (("sm_80", "gru forward exact"), _needs(200, 0, "FFMA", *OF_80), ["HMMA, where products are exact"]),
        (("sm_80", "gru forward exact"), _needs(200, 0, "LDGSTS.E"), ["no FFMA"]),
        (("sm_80", "gru forward step float16"), _needs(90, 0, "LDG.E.128.CONSTANT"), []),
        (("sm_80", "gru forward step float16"), _needs(90, 0, "LDG.E.64"), ["no LDG.E.128"]),
        (("sm_80", "lstm forward float16"), _needs(), ["has no budget"]),
        (("sm_100a", "gru forward float16"), _needs(), ["has no budget"]),
    ],
)
def test_breaches_are_named(key: tuple[str, str], needs: resources.Resources, said: list[str]) -> None:
    row = {f"gru forward {product}": [200, 0] for product in ("float16", "bfloat16", "tf32x3", "exact")}
    row["gru forward step float16"] = [100, 0]
    limits = {"sm_80": row, "sm_90a": row}
    found = {key: needs}
    assert budget.breaches(found, limits)[: len(said) or None] == [f"{' '.join(key)}: {word}" for word in said]
    unused = budget.unused(found, limits)
    assert len(unused) == (10 if "has no budget" in said else 9)
    assert "sm_80 gru forward tf32x3: has a budget and no kernel" in unused or key == ("sm_80", "gru forward tf32x3")


def test_what_is_written_can_be_read() -> None:
    found = {("sm_80", "gru forward float16"): _needs(200, 8), ("sm_90a", "gru forward exact"): _needs(255, 0, "FFMA")}
    assert json.loads(budget.as_json(found)) == {
        "sm_80": {"gru forward float16": [200, 8]},
        "sm_90a": {"gru forward exact": [255, 0]},
    }
    assert budget.render(found).splitlines()[2].split() == ["sm_90a", "gru", "forward", "exact", "255", "0", "FFMA"]


def test_short_names() -> None:
    here, there = "seqkernels::(anonymous namespace)", "seqkernels::persistent::(anonymous namespace)"
    kernel = f"void {there}::backward_kernel<{here}::Rnn<float, true>, {there}::OfBFloat16, true>({here}::Launch)"
    assert budget.short_name(kernel) == "rnn backward tall bfloat16"
    assert budget.short_name(kernel.replace("6, true>", "6, false>")) == "rnn backward bfloat16"
    of_step = "void seqkernels::stepwise::(anonymous namespace)::"
    kernel = f"{of_step}step_kernel<{here}::Rnn<float, true>, seqkernels::BFloat16, false>(seqkernels::stepwise::Step)"
    assert budget.short_name(kernel) == "rnn forward step bfloat16"
    kernel = f"{of_step}step_kernel<{here}::Lstm<float>, float, true>(seqkernels::stepwise::Step)"
    assert budget.short_name(kernel) == "lstm backward step float32"
    kernel = f"{of_step}begin_kernel<seqkernels::Float16>(seqkernels::stepwise::Begin, int)"
    assert budget.short_name(kernel) == "begin float16"
    with pytest.raises(ValueError, match="kernel: expected one of a recurrence, got 'fill'"):
        budget.short_name("fill")


@pytest.mark.skipif(load_error() is not None, reason=str(load_error()))
def test_the_command(monkeypatch, capsys) -> None:
    asked = []
    # As if the compiler had given each kernel what it may have: to read the module takes half a minute.
    found = {
        (architecture, name): _needs(*limits, *budget._required(architecture, name))
        for architecture, rows in budget.allowed().items()
        for name, limits in rows.items()
    }

    def read(module, architectures, only):
        asked.append((architectures, only))
        return {key: needs for key, needs in found.items() if key[0] in architectures and only in key[1]}

    monkeypatch.setattr(budget, "read", read)
    with pytest.raises(SystemExit) as left:
        cli.main(["compile", "--cuda", "--arch", "sm_90a", "--only", "lstm forward", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert asked == [(["sm_90a"], "lstm forward")]
    assert set(said["sm_90a"]) == {name for name in NAMES if "lstm forward" in name}
    assert left.value.code == 0
    with pytest.raises(SystemExit) as left:
        cli.main(["compile", "--cuda", "--arch", "sm_90a", "--only", "no such"])
    assert left.value.code == 1
    assert "no kernel has 'no such' in its description" in capsys.readouterr().err
