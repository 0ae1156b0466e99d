"""What ``SEQKERNELS_BUILD`` does where the compiler does not work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(tree: Path, mode: str) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "seqkernels", tree / "seqkernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    # The setting of a sanitizer run is not that of this build.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SEQKERNELS_", "LD_PRE"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={**environment, "PATH": path, "SEQKERNELS_BUILD": mode, "CXX": "/bin/false"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_auto_says_why_in_three_lines_and_goes_on(tmp_path: Path) -> None:
    result = build(tmp_path, "auto")
    lines = [line for line in result.stderr.splitlines() if line.startswith("seqkernels:")]
    assert result.returncode == 0
    assert len(lines) == 3
    assert "was not built: cmake failed" in lines[0]


def test_1_fails(tmp_path: Path) -> None:
    result = build(tmp_path, "1")
    assert result.returncode != 0
    assert "could not be built: cmake failed" in result.stderr


def test_0_does_not_try(tmp_path: Path) -> None:
    result = build(tmp_path, "0")
    assert (result.returncode, result.stderr) == (0, "")
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("mode", ["", "yes"])
def test_other_settings_are_refused(tmp_path: Path, mode: str) -> None:
    result = build(tmp_path, mode)
    assert result.returncode != 0
    assert f"SEQKERNELS_BUILD: expected auto, 0 or 1, got {mode!r}" in result.stderr
