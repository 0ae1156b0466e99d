"""Drives CMake once and places the compiled module in the package.

SEQKERNELS_BUILD=auto (default) builds where a compiler is found and otherwise says why and installs the
pure-Python package; 0 does not build; 1 fails where the build fails. SEQKERNELS_SANITIZE=address,undefined builds
with sanitizers; SEQKERNELS_WERROR=1 makes warnings errors. torch is no build requirement: the compiled module
reads tensors through DLPack and links nothing of torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def run(self) -> None:
        mode = os.environ.get("SEQKERNELS_BUILD", "auto")
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"SEQKERNELS_BUILD: expected auto, 0 or 1, got {mode!r}")
        try:
            if mode != "0":
                self.build_native()
        except (OSError, subprocess.CalledProcessError) as error:
            failed = isinstance(error, subprocess.CalledProcessError)
            reason = f"cmake failed with status {error.returncode}, see above" if failed else str(error)
            if mode == "1":
                raise SystemExit(f"seqkernels: the native module could not be built: {reason}") from error
            print(
                f"seqkernels: the native module was not built: {reason}",
                "seqkernels: installing the pure-Python package (numba and reference implementations)",
                "seqkernels: SEQKERNELS_BUILD=1 shows the failure, SEQKERNELS_BUILD=0 skips the attempt",
                sep="\n",
                file=sys.stderr,
            )

    def build_native(self) -> None:
        import pybind11

        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        suffix = os.environ.get("SEQKERNELS_SANITIZE", "").replace(",", "-")
        build = build.with_name(f"{build.name}-{suffix}") if suffix else build
        target = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "seqkernels"
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSEQKERNELS_SANITIZE={os.environ.get('SEQKERNELS_SANITIZE', '')}",
            f"-DSEQKERNELS_WERROR={os.environ.get('SEQKERNELS_WERROR', '0')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]
        ninja = shutil.which("ninja")
        if ninja is not None:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)

    def get_outputs(self) -> list[str]:
        return [str(p) for p in (Path(self.build_lib) / "seqkernels").glob("_C*")]


setup(ext_modules=[Extension("seqkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
