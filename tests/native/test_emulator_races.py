"""How blocks of persistent recurrences, and warps of a block, wait for each other: under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("races") / "races"
    flags = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-pthread", "-w", f"-I{ROOT / 'csrc'}"]
    source = Path(__file__).with_name("emulator_races.cpp")
    subprocess.run(["g++", *flags, "-DSEQKERNELS_THREADS", str(source), "-o", str(path)], check=True)
    return path


def _reported(program: Path, *arguments: str) -> str:
    # Where addresses are placed at random in more bits than the sanitizer knows, it does not start.
    fixed = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    options = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66", "PATH": "/usr/bin:/bin"}
    command = [*fixed, str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=options, timeout=300, check=False)
    assert done.returncode == 0 or "ThreadSanitizer" in done.stderr, done.stderr
    if done.returncode == 0:
        assert done.stdout.count("blocks") == (1 if "norms" in arguments else 56)
    return done.stderr


def test_there_are_no_races(program: Path) -> None:
    assert _reported(program) == ""
    assert _reported(program, "norms") == ""


def test_races_would_be_found_without_release(program: Path) -> None:
    assert "data race" in _reported(program, "without-release")
    assert "data race" in _reported(program, "norms", "without-release")


def test_races_would_be_found_without_synchronization(program: Path) -> None:
    assert "data race" in _reported(program, "without-sync")
