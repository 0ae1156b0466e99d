"""Drives CMake once and places the compiled modules in the package.

SEQKERNELS_BUILD=auto (default) builds where a compiler is found and otherwise says why and installs the
pure-Python package; 0 does not build; 1 fails where the build fails. SEQKERNELS_CUDA does the same for the module
of CUDA kernels, which needs nvcc. SEQKERNELS_SANITIZE=address,undefined builds with sanitizers, without CUDA;
SEQKERNELS_WERROR=1 makes warnings errors; SEQKERNELS_EMULATOR=1 also builds what tests emulate GPUs with. torch is
no build requirement: compiled modules read tensors through DLPack and link nothing of torch.
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


def setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}: expected auto, 0 or 1, got {value!r}")
    return value


def reason(error: Exception) -> str:
    failed = isinstance(error, subprocess.CalledProcessError)
    return f"cmake failed with status {error.returncode}, see above" if failed else str(error)


def compile_targets(build: Path, *targets: str) -> None:
    jobs = str(os.cpu_count() or 1)
    subprocess.run(["cmake", "--build", str(build), "--target", *targets, "--parallel", jobs], check=True)


class CMakeBuild(build_ext):
    def run(self) -> None:
        mode, cuda = setting("SEQKERNELS_BUILD"), setting("SEQKERNELS_CUDA")
        if (mode, cuda) == ("0", "1"):
            raise SystemExit("SEQKERNELS_CUDA: expected auto or 0 where SEQKERNELS_BUILD is 0, got '1'")
        if mode == "0":
            return
        try:
            build = self.configure(cuda)
            # Those that have to be there at once, so that no core waits for the last source of each.
            emulator = ["_emulator"] if setting("SEQKERNELS_EMULATOR") == "1" else []
            compile_targets(build, *emulator, "_C", *(["cuda"] if cuda == "1" else []))
        except (OSError, subprocess.CalledProcessError) as error:
            if "1" in (mode, cuda):
                modules = "native and CUDA modules" if cuda == "1" else "native module"
                raise SystemExit(f"seqkernels: the {modules} could not be built: {reason(error)}") from error
            print(
                f"seqkernels: the native module was not built: {reason(error)}",
                "seqkernels: installing the pure-Python package (numba and reference implementations)",
                "seqkernels: SEQKERNELS_BUILD=1 shows the failure, SEQKERNELS_BUILD=0 skips the attempt",
                sep="\n",
                file=sys.stderr,
            )
            return
        if cuda == "auto":
            try:
                compile_targets(build, "cuda")
            except subprocess.CalledProcessError as error:
                print(f"seqkernels: the CUDA module was not built: {reason(error)}", file=sys.stderr)

    def configure(self, cuda: str) -> Path:
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
            f"-DSEQKERNELS_CUDA={cuda}",
            f"-DSEQKERNELS_SANITIZE={os.environ.get('SEQKERNELS_SANITIZE', '')}",
            f"-DSEQKERNELS_WERROR={os.environ.get('SEQKERNELS_WERROR', '0')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]
        ninja = shutil.which("ninja")
        if ninja is not None:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run(configure, check=True)
        return build

    def get_outputs(self) -> list[str]:
        return [str(p) for p in (Path(self.build_lib) / "seqkernels").glob("_C*") if p.suffix in (".so", ".pyd")]


setup(ext_modules=[Extension("seqkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
