"""How long blocks of a GPU take to exchange what they have: ``python -m benchmarks.cuda_latency [--dry]``.

A round is what a step of a persistent recurrence has beside its product: each block sends its bytes to all others and
waits for theirs, through the shared memory of a cluster or through memory. The programs of ``benchmarks/cuda`` are
compiled by nvcc into a temporary folder and run one after another. Their cycles are what ``EXCHANGE`` in
``seqkernels/backends/cuda/plans.py`` estimates.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = Path(__file__).with_name("cuda")
PROGRAMS = ("cluster", "grid")
SECONDS = 120
"""That a program may take; a launch whose blocks wait for more than ten ends itself."""


class Row(NamedTuple):
    """A measured exchange.

    Attributes:
        exchange: ``"cluster"``, or through memory ``"flags"``, ``"grid_sync"``, ``"tagged"`` or ``"sentinel"``.
        teams: of blocks that exchange, side by side on the device.
        blocks: of a team.
        bytes: that each block makes, and all others of its team read.
        ns, cycles: of a round, medians; those of the cluster and of memory include reading what came.
        wrong: vectors or words that were not what they should be; has to be 0.
    """

    exchange: str
    teams: int
    blocks: int
    bytes: int
    ns: float
    cycles: float
    wrong: int


def find_nvcc() -> str | None:
    """Path of nvcc: in ``CUDACXX``, on ``PATH`` or in ``CUDA_HOME``; ``None`` where there is none."""
    return shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which(
        f"{os.environ.get('CUDA_HOME', '')}/bin/nvcc"
    )


def build(nvcc: str, program: str, architecture: str, folder: Path) -> Path:
    """Compiles a program of ``benchmarks/cuda``.

    Args:
        nvcc: path of the compiler.
        program: one of `PROGRAMS`.
        architecture: ``"native"``, or ``"sm_90a"`` for example.
        folder: where the program goes.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    out = folder / f"{program}-{architecture}"
    options = ["-std=c++20", "-O3", f"-arch={architecture}", "-Xcompiler=-Wall,-Wextra", "-o", str(out)]
    done = subprocess.run([nvcc, *options, str(SOURCES / f"{program}.cu")], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{program}.cu for {architecture}: {done.stdout}{done.stderr}")
    return out


def measure(program: Path) -> list[Row]:
    """What a compiled program prints.

    Raises:
        RuntimeError: it fails, takes too long, or something came wrong.
    """
    try:
        done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{program.name}: took more than {SECONDS} seconds") from error
    if done.returncode != 0:
        raise RuntimeError(f"{program.name}: {done.stderr.strip()}")
    rows = [Row(**json.loads(line)) for line in done.stdout.splitlines()]
    for row in rows:
        if row.wrong != 0:
            raise RuntimeError(f"{program.name}: {row.wrong} wrong of {row}")
    return rows


def render(rows: Iterable[Row]) -> str:
    """A table."""
    lines = [f"{'exchange':12}{'teams':>6}{'blocks':>8}{'bytes':>8}{'ns':>9}{'cycles':>9}"]
    lines += [f"{r.exchange:12}{r.teams:>6}{r.blocks:>8}{r.bytes:>8}{r.ns:>9.0f}{r.cycles:>9.0f}" for r in rows]
    return "\n".join(lines)


def _device() -> str:
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"]
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and run the programs, write the JSON, print the table.

    Returns:
        0; 1 where there is no nvcc, or a program does not compile or fails.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arch", default="native", help="architecture to compile for (%(default)s)")
    parser.add_argument("--only", default="", help="only the programs with this in their name")
    parser.add_argument("--json", type=Path, default=ROOT / "report" / "cuda_latency.json", help="result (%(default)s)")
    parser.add_argument(
        "--dry", action="store_true", help="compile, for sm_90a unless --arch is given, and run nothing"
    )
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_latency: there is no nvcc on PATH, in CUDA_HOME or in CUDACXX", file=sys.stderr)
        return 1
    programs = [program for program in PROGRAMS if options.only in program]
    if not programs:
        print(f"cuda_latency: --only: expected a part of {', '.join(PROGRAMS)}, got {options.only!r}", file=sys.stderr)
        return 1
    architecture = "sm_90a" if options.dry and options.arch == "native" else options.arch
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for program in programs:
                built = build(nvcc, program, architecture, Path(folder))
                if options.dry:
                    print(f"{program}.cu compiles for {architecture}")
                else:
                    rows += measure(built)
    except RuntimeError as error:
        print(f"cuda_latency: {error}", file=sys.stderr)
        return 1
    if options.dry:
        return 0
    options.json.parent.mkdir(parents=True, exist_ok=True)
    written = {"device": _device(), "rows": [row._asdict() for row in rows]}
    options.json.write_text(json.dumps(written, indent=1) + "\n")
    print(render(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
