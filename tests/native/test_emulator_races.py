"""How blocks of persistent recurrences, and warps of a block, wait for each other: under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def _program(folder: Path, *left_out: str) -> Path:
    program = folder / "races"
    flags = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-pthread", "-w", f"-I{ROOT / 'csrc'}"]
    flags += ["-DSEQKERNELS_THREADS", *(f"-DSEQKERNELS_WITHOUT_{name}" for name in left_out)]
    source = Path(__file__).with_name("emulator_races.cpp")
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    return program


def _reported(program: Path, only: str = "") -> str:
    # Where addresses are placed at random in more bits than the sanitizer knows, it does not start.
    fixed = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    options = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66", "PATH": "/usr/bin:/bin"}
    command = [*fixed, str(program), *([only] if only else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=options, timeout=300, check=False)
    assert done.returncode == 0 or "ThreadSanitizer" in done.stderr, done.stderr
    if done.returncode == 0:
        assert done.stdout.count("blocks") == (1 if only else 56)
    return done.stderr


def test_there_are_no_races(tmp_path: Path) -> None:
    program = _program(tmp_path)
    assert _reported(program) == ""
    assert _reported(program, only="norms") == ""


def test_races_would_be_found_without_release(tmp_path: Path) -> None:
    program = _program(tmp_path, "RELEASE")
    assert "data race" in _reported(program)
    assert "data race" in _reported(program, only="norms")


def test_races_would_be_found_without_synchronization(tmp_path: Path) -> None:
    assert "data race" in _reported(_program(tmp_path, "SYNC"))
