"""Runs the benchmarks and prints the report: ``python benchmarks/run.py [--quick] [--threads N] [-k EXPRESSION]``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = [f"benchmarks/bench_{stem}.py" for stem in ("recurrence", "attention", "overhead")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the selected cases, write the JSON and the picture, print the tables.

    Returns:
        0, or what pytest or the report ended with: not 0 where a provider failed or the compiled module is missing.
    """
    parser = argparse.ArgumentParser(description="Time torch and the backends of seqkernels on the same cases.")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds: a check that takes a minute")
    parser.add_argument("--threads", type=int, help="threads of torch and of each backend (torch's default)")
    parser.add_argument("--isa", help="instruction set of the compiled module (the best that the processor has)")
    parser.add_argument("--providers", help="who is timed: torch,native,numba,reference (these), onnxruntime,openvino")
    parser.add_argument("-k", metavar="EXPRESSION", help="only the cases that match, as in pytest")
    parser.add_argument("--json", type=Path, default=ROOT / "report" / "bench.json", help="result (%(default)s)")
    parser.add_argument("--png", type=Path, help="picture (beside the JSON)")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--allow-missing", action="store_true", help="go on where the compiled module is missing")
    options = parser.parse_args(arguments)

    json = options.json.resolve()
    json.parent.mkdir(parents=True, exist_ok=True)
    json.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *FILES, "-q", "--no-header", "-rfE", "-p", "no:cacheprovider"]
    command += ["-o", "console_output_style=classic"]
    command += ["--benchmark-quiet", f"--benchmark-json={json}"]
    command += ["--quick"] if options.quick else []
    command += [f"--threads={options.threads}"] if options.threads is not None else []
    command += [f"--isa={options.isa}"] if options.isa is not None else []
    command += [f"--providers={options.providers}"] if options.providers is not None else []
    command += ["--allow-missing"] if options.allow_missing else []
    command += ["-k", options.k] if options.k is not None else []
    status = subprocess.run(command, cwd=ROOT).returncode
    if not json.exists():
        return status or 1

    png = (options.png or json.with_suffix(".png")).resolve()
    report = [sys.executable, "-m", "benchmarks.report", str(json), f"--png={png}"]
    report += ["--markdown"] if options.markdown else []
    return status or subprocess.run(report, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
