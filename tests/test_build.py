"""What ``SEQKERNELS_BUILD`` and ``SEQKERNELS_CUDA`` do where the compilers do not work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(tree: Path, mode: str, cuda: str | None = None) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "seqkernels", tree / "seqkernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    settings = {"SEQKERNELS_BUILD": mode, "CXX": "/bin/false"} | ({} if cuda is None else {"SEQKERNELS_CUDA": cuda})
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, **settings)


def run(command: list[str], folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    # The setting of a sanitizer run is not that of this build.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SEQKERNELS_", "LD_PRE"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=folder, env={**environment, "PATH": path, **settings}, capture_output=True, text=True, check=False
    )


def configure(folder: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", f"-S{ROOT}", f"-B{folder}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options]
    return run([*command, f"-DPython_EXECUTABLE={sys.executable}"], folder, **settings)


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


@pytest.mark.parametrize("mode", ["", "yes"])
def test_other_settings_of_cuda_are_refused(tmp_path: Path, mode: str) -> None:
    result = build(tmp_path, "auto", mode)
    assert result.returncode != 0
    assert f"SEQKERNELS_CUDA: expected auto, 0 or 1, got {mode!r}" in result.stderr


def test_cuda_1_fails_where_nothing_may_be_built(tmp_path: Path) -> None:
    result = build(tmp_path, "0", "1")
    assert result.returncode != 0
    assert "SEQKERNELS_CUDA: expected auto or 0 where SEQKERNELS_BUILD is 0, got '1'" in result.stderr


def test_cuda_1_fails_where_the_native_module_does(tmp_path: Path) -> None:
    result = build(tmp_path, "auto", "1")
    assert result.returncode != 0
    assert "could not be built: cmake failed" in result.stderr


def test_cuda_auto_says_why_in_a_line_and_goes_on(tmp_path: Path) -> None:
    result = configure(tmp_path, CUDACXX="/bin/false")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("seqkernels:")]
    assert line.startswith("seqkernels: the CUDA module is not built: nvcc (/bin/false) compiles nothing; ")


def test_cuda_1_fails(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DSEQKERNELS_CUDA=1", CUDACXX="/bin/false")
    assert result.returncode != 0
    assert "seqkernels: the CUDA module is not built: nvcc (/bin/false) compiles nothing; " in result.stderr


def test_cuda_0_does_not_try(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DSEQKERNELS_CUDA=0", CUDACXX="/bin/false")
    assert result.returncode == 0, result.stderr
    assert "CUDA" not in result.stdout + result.stderr


def test_builds_with_sanitizers_leave_cuda_out(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DSEQKERNELS_SANITIZE=address")
    assert result.returncode == 0, result.stderr
    assert "seqkernels: the CUDA module is not built: builds with sanitizers are without it" in result.stderr
