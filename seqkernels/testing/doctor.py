"""The self-test of this installation and what to do about what is wrong with it, as ``info --check`` says it."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import backends
from .selftest import NOT_RUN, WRONG, Row

#: The first version of torch with what the compiled modules read tensors through; as in ``pyproject.toml``.
LEAST_TORCH = (2, 11)
#: First letters of the files of OpenMP runtimes.
_OPENMP = ("libgomp", "libomp", "libiomp")
_BUILD = "SEQKERNELS_BUILD=1 pip install . in its sources builds it, or says what is missing"
#: Seconds beyond which a case has compiled something.
_LONG = 2.0


class Advice(NamedTuple):
    """What to do about something, in a line.

    Attributes:
        text: what is found, and what to do.
        broken: whether results are wrong or missing because of it; else it is for speed.
    """

    text: str
    broken: bool


class Diagnosis(NamedTuple):
    """What ``info --check`` found.

    Attributes:
        rows: of `seqkernels.testing.selftest.selftest`.
        advice: what to do.
        healthy: whether every case that ran is within its budget, and nothing is broken.
        verdict: that in a line, with the seconds of processor time of all cases.
    """

    rows: tuple[Row, ...]
    advice: tuple[Advice, ...]
    healthy: bool
    verdict: str


def diagnose(rows: Iterable[Row]) -> Diagnosis:
    """Look at a self-test, and at the machine.

    Args:
        rows: all of them; what they loaded is looked at too.
    """
    rows = tuple(rows)
    advice = (*_torch(), *_native(), *_gpu(), *_openmp(), *_wrong(rows), *_cold(rows))
    ran = [row for row in rows if row.state != NOT_RUN]
    wrong = [row for row in ran if row.state == WRONG]
    broken = sum(found.broken for found in advice)
    if wrong:
        verdict = f"broken: {len(wrong)} of {len(ran)} cases are wrong"
    elif broken or not ran:
        verdict = f"broken: {broken} to mend, see above" if broken else "broken: no case was run"
    else:
        names = ", ".join(dict.fromkeys(row.backend for row in ran))
        seconds = sum(row.seconds for row in rows)
        verdict = f"healthy: all {len(ran)} cases are within their error budgets, on {names}, in {seconds:.1f} s"
    return Diagnosis(rows, advice, not wrong and not broken and bool(ran), verdict)


def _torch() -> list[Advice]:
    version = str(torch.__version__)
    numbers = tuple(int(part) for part in version.partition("+")[0].split(".")[:2])
    if numbers >= LEAST_TORCH:
        return []
    least = ".".join(map(str, LEAST_TORCH))
    return [Advice(f"torch is {version}, older than {least}: pip install 'torch>={least}'", broken=True)]


def _native() -> list[Advice]:
    reason = backends.backend("native").unavailable()
    if reason is None:
        extension = backends.module("native", "extension").extension()
        missing = sorted(_names(Path(extension.__file__ or "").with_name("_C.pyi")) - set(dir(extension)))
        if not missing:
            return []
        found = f"the compiled module is older than the package, it lacks {', '.join(missing)}"
        return [Advice(f"{found}: {_BUILD}", broken=True)]
    calls = [
        backends.Call("recurrence", "cpu", torch.float32, "lstm"),
        backends.Call("attention", "cpu", torch.float32),
    ]
    others = ", ".join(dict.fromkeys(str(backends.choice(call)) for call in calls))
    return [Advice(f"{reason}; {others} does its work, slower: {_BUILD}", broken=False)]


def _names(stub: Path) -> set[str]:
    """What a stub says a compiled module has."""
    body = ast.parse(stub.read_text(encoding="utf-8")).body
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    attributes = {ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign)}
    return defined | attributes


def _gpu() -> list[Advice]:
    if not torch.cuda.is_available():
        if _has_nvidia() and torch.version.cuda is None:
            found = f"there is an NVIDIA GPU, but torch {torch.__version__} is built without CUDA"
            return [Advice(f"{found}: https://pytorch.org/get-started/locally has the command to install one", False)]
        return []
    reason = backends.backend("triton").unavailable()
    if reason is None:
        return []
    return [Advice(f"there is a GPU, but {reason}: pip install 'seqkernels[triton]'", broken=False)]


def _has_nvidia() -> bool:
    """Whether there is a driver of NVIDIA's, with a device, on Linux."""
    return Path("/proc/driver/nvidia/version").exists() and Path("/dev/nvidia0").exists()


def _openmp() -> list[Advice]:
    runtimes = _runtimes()
    if len(runtimes) < 2:
        return []
    found = f"{len(runtimes)} OpenMP runtimes are loaded, with threads of their own ({', '.join(runtimes)})"
    return [Advice(f"{found}: import torch first, and have what brings the others from where torch is from", False)]


def _runtimes() -> list[str]:
    """Files of OpenMP runtimes in this process; on other systems than Linux none is found."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return sorted({os.path.realpath(path) for path in paths if path.rpartition("/")[2].startswith(_OPENMP)})


def _wrong(rows: Sequence[Row]) -> list[Advice]:
    what = {
        "native": f"the compiled module is not of this version, or its compiler is at fault: {_BUILD}",
        "cuda": f"the CUDA module is not of this version, or its driver is at fault: SEQKERNELS_CUDA=1 {_BUILD}",
        "numba": "its cache may be of another version: delete seqkernels/backends/numba/__pycache__ and try again",
        "triton": "its cache may be of another version: delete ~/.triton/cache and try again",
        "reference": "it is plain PyTorch, so torch itself is at fault: reinstall it",
    }
    names = dict.fromkeys(row.backend for row in rows if row.state == WRONG)
    return [Advice(f"{name} is wrong: {what[name]}; use_backend chooses another meanwhile", True) for name in names]


def _cold(rows: Sequence[Row]) -> list[Advice]:
    """Not about the installation: why it took so long."""
    found = []
    for name in ("numba", "triton"):
        seconds = sum(row.seconds for row in rows if row.backend == name and row.seconds > _LONG)
        if seconds:
            found.append(Advice(f"{name} compiled kernels for {seconds:.0f} s, once: its cache has them now", False))
    return found


def render(row: Row) -> str:
    """A row as a line of text."""
    what = f"{row.case:18} {row.backend:10} {row.device:5} {row.dtype:9} {row.state:8}"
    if row.share is None:
        return f"{what} {row.detail}".rstrip()
    return f"{what} {row.share:4.2f} of the error budget ({row.detail})"


def as_dict(found: Diagnosis) -> dict[str, Any]:
    """What JSON has of a `Diagnosis`."""
    rows = [{**row._asdict(), "share": _finite(row.share)} for row in found.rows]
    advice = [thing._asdict() for thing in found.advice]
    return {"healthy": found.healthy, "verdict": found.verdict, "advice": advice, "cases": rows}


def _finite(share: float | None) -> float | None:
    return None if share is None or share == float("inf") else share
