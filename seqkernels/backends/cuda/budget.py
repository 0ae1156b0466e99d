"""What the compiled CUDA kernels may need of a GPU, and the instructions that they have to be made of.

``python -m seqkernels compile --cuda`` shows it and holds the built module to the reviewed ``budget.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from .resources import Kernel, Resources, resources

BUDGET = Path(__file__).with_name("budget.json")
#: The version of CUDA whose compiler the numbers are of; that of another one gives registers away differently.
CUDA = "13.0"

_NAME = re.compile(
    r"::(forward|backward)_kernel<.*?::(Lstm|Gru|Rnn)<.*::Of(Float16|BFloat16|Tf32x3|Exact)(?:, (true|false))?>"
)
_STEP_NAME = re.compile(r"::(begin|step)_kernel<(?:.*?::(Lstm|Gru|Rnn)<.*?>, )?(?:.*?::)?(\w+)(?:, (true|false))?>\(")
_STORAGES = {"Float16": "float16", "BFloat16": "bfloat16", "float": "float32"}
_PRODUCTS = {
    "float16": "HMMA.16816.F32",
    "bfloat16": "HMMA.16816.F32.BF16",
    "tf32x3": "HMMA.1688.F32.TF32",
    "exact": "FFMA",
}
#: From Hopper on: st.async, the three of a barrier that waits for it, and the two of a cluster's barrier.
_EXCHANGE = (
    "STAS",
    "SYNCS.EXCH",
    "SYNCS.ARRIVE",
    "SYNCS.PHASECHK",
    "UCGABAR_ARV",
    "UCGABAR_WAIT",
)

#: By architecture and short name.
Found = dict[tuple[str, str], Resources]


def short_name(kernel: str) -> str:
    """``"lstm backward tall float16"`` for the name of a kernel in the source; ``"lstm forward step float16"`` and
    ``"begin float16"`` for those of a recurrence of a launch for each step.

    Raises:
        ValueError: it is no kernel of a recurrence.
    """
    step = _STEP_NAME.search(kernel)
    if step is not None:
        way = {"true": ["backward"], "false": ["forward"], None: []}[step[4]]
        return " ".join((*([step[2].lower()] if step[2] else []), *way, step[1], _STORAGES[step[3]]))
    found = _NAME.search(kernel)
    if found is None:
        raise ValueError(f"kernel: expected one of a recurrence, got {kernel!r}")
    tall = ["tall"] if found[4] == "true" else []
    return " ".join((found[2].lower(), found[1], *tall, found[3].lower()))


def of_kernels(needs: Mapping[Kernel, Resources]) -> Found:
    """What `resources.resources` returns, by architecture and short name."""
    names = {(kernel.architecture, short_name(kernel.name)): kernel for kernel in needs}
    if len(names) != len(needs):
        raise ValueError("two kernels of a module have the same short name")
    return {key: needs[names[key]] for key in sorted(names, key=lambda key: (_number(key[0]), key[1]))}


def _number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture))


def read(module: str | Path, architectures: list[str] | None = None, only: str = "") -> Found:
    """What the kernels of a built module need.

    Args:
        module: its path.
        architectures: those to look at, all by default.
        only: a part of the short names of the kernels to look at.

    Raises:
        FileNotFoundError, RuntimeError: as `resources.resources` does.
        ValueError: a kernel of the module is none of a recurrence.
    """
    found: Found = {}
    for architecture in [None] if architectures is None else architectures:
        found |= of_kernels(resources(module, architecture))
    return {key: needs for key, needs in found.items() if only in key[1]}


def allowed() -> dict[str, dict[str, list[int]]]:
    """``budget.json``: of each architecture and kernel the registers and the bytes of stack of a thread."""
    table: dict[str, dict[str, list[int]]] = json.loads(BUDGET.read_text())
    return table


def as_json(found: Found) -> str:
    """What kernels need in the form of ``budget.json``, a line for each kernel."""
    table: dict[str, list[str]] = {}
    for (architecture, name), needs in found.items():
        table.setdefault(architecture, []).append(f"  {json.dumps(name)}: [{needs.registers}, {needs.stack}]")
    parts = [f' "{architecture}": {{\n' + ",\n".join(rows) + "\n }" for architecture, rows in table.items()]
    return "{\n" + ",\n".join(parts) + "\n}"


def render(found: Found) -> str:
    """A table of what kernels need."""
    lines = [f"{'':9}{'kernel':32}{'registers':>10}{'stack':>7}  instructions"]
    for (architecture, name), needs in found.items():
        has = ", ".join(x for x in _required(architecture, name) if needs.uses(x))
        lines.append(f"{architecture:9}{name:32}{needs.registers:>10}{needs.stack:>7}  {has}")
    return "\n".join(lines)


def _of_step(name: str) -> bool:
    return "step" in name.split() or name.startswith("begin")


def _required(architecture: str, name: str) -> list[str]:
    """Instructions that a kernel has to have.

    Of a step: reads of four numbers at once. Else those of its product, cp.async, ldmatrix, and those of the exchange
    in a cluster.
    """
    if _of_step(name):
        return ["LDG.E.128"]
    ldmatrix = [] if name.endswith("exact") else ["LDSM"]
    exchange = _EXCHANGE if _number(architecture) >= 90 else ()
    return [_PRODUCTS[name.split()[-1]], "LDGSTS", *ldmatrix, *exchange]


def breaches(found: Found, limits: Mapping[str, Mapping[str, list[int]]]) -> list[str]:
    """What needs more than `limits` allow or has no place in them, and instructions that lack or should not be there.

    Args:
        found: what kernels need.
        limits: in the form of `allowed`.
    """
    said = []
    for (architecture, name), needs in found.items():
        where = f"{architecture} {name}"
        limit = limits.get(architecture, {}).get(name)
        if limit is None:
            said.append(f"{where}: has no budget")
            continue
        for what, need, most in zip(("registers", "stack"), (needs.registers, needs.stack), limit, strict=True):
            if need > most:
                said.append(f"{where}: {what} {need}, allowed {most}")
        said += [f"{where}: no {x}" for x in _required(architecture, name) if not needs.uses(x)]
        if name.endswith("exact") and needs.uses("HMMA"):
            said.append(f"{where}: HMMA, where products are exact")
        if limit[1] == 0:
            said += [f"{where}: {x}, where nothing spills" for x in ("LDL", "STL") if needs.uses(x)]
    return said


def unused(found: Found, limits: Mapping[str, Mapping[str, list[int]]]) -> list[str]:
    """What has a budget, and is no kernel of the module."""
    names = [(architecture, name) for architecture, rows in limits.items() for name in rows]
    return [
        f"{architecture} {name}: has a budget and no kernel"
        for architecture, name in names
        if (architecture, name) not in found
    ]
