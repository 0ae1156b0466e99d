"""What Python spends on launches, measured without a GPU: ``python -m benchmarks.launches``.

Triton's own launcher runs, on a stub of the CUDA driver that does nothing, with tensors on the processor. So the times
are those of a call until its kernels are launched, less what a driver does. Each form takes turns with the others;
processor time counts, and medians.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from seqkernels.backends.triton import attention, launches
from seqkernels.scores import Scores

_STUB = r"""
#include "cuda.h"
#define STUB CUresult
STUB cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return 0; }
STUB cuCtxGetLimit(size_t *v, CUlimit l) { *v = 1 << 20; return 0; }
STUB cuCtxSetCurrent(CUcontext c) { return 0; }
STUB cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
STUB cuDeviceGet(CUdevice *d, int i) { *d = i; return 0; }
STUB cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = 232448; return 0; }
STUB cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return 0; }
STUB cuDriverGetVersion(int *v) { *v = 13000; return 0; }
STUB cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) { *v = 1024; return 0; }
STUB cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
STUB cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
STUB cuGetErrorString(CUresult r, const char **s) { *s = "error"; return 0; }
STUB cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **e) { return 0; }
STUB cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) { *f = (CUfunction)2; return 0; }
STUB cuModuleLoadData(CUmodule *m, const void *d) { *m = (CUmodule)3; return 0; }
STUB cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return 0; }
STUB cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)v = p; return 0; }
STUB cuPointerGetAttributes(unsigned n, CUpointer_attribute *a, void **v, CUdeviceptr p) { return 0; }
"""


def _use_stub(folder: Path) -> None:
    """Has Triton launch on a driver that does nothing."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget

    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("launches: a C compiler is needed for the stub of the driver")
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text(_STUB)
    include = Path(nvidia.__path__[0]) / "include"
    command = [compiler, "-shared", "-fPIC", "-O1", f"-I{include}", source, "-o", library]
    subprocess.run([*map(str, command), "-Wl,-soname,libcuda.so.1"], check=True)
    # Triton asks the loader for this name, which it then knows.
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    triton.knobs.nvidia.libcuda_path = str(folder)
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    class Driver:
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())


class _ThroughTriton(launches.Launch):
    """A launch that looks for its program each time, as calls of kernels do."""

    def __call__(self, *args: Any) -> None:
        self._kernel[self._grid](*args, **self._constants, **self._options)


PASSES = ("forward", "backward", "forward, new lengths")


def _forms() -> dict[str, list[Callable[[], object]]]:
    """For each way of launching the `PASSES`, warmed up."""
    q, k, v, grad = (torch.randn(1, 1, 16, 64, dtype=torch.bfloat16) for _ in range(4))
    scores, needs = Scores(0.125), [True, True, True, False]

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        return attention.attention_forward(q, k, v, scores)

    out, lse = forward()

    def backward() -> object:
        return attention.attention_backward(grad, None, q, k, v, out, lse, scores, needs)

    def through(launch: type[launches.Launch], call: Callable[[], object], known: bool) -> Callable[[], object]:
        plans: dict[Any, Any] = {}

        def run() -> object:
            attention._plans = plans if known else {}
            attention.Launch = launch  # type: ignore[attr-defined]
            return call()

        for _ in range(3):
            run()
        return run

    ways = {"direct": launches.Launch, "through Triton": _ThroughTriton}
    calls = ((forward, True), (backward, True), (forward, False))
    return {name: [through(launch, *call) for call in calls] for name, launch in ways.items()}


def main(rounds: int = 15, calls: int = 300) -> int:
    """Print microseconds of the `PASSES` for each way of launching.

    Args:
        rounds: in which the forms take turns.
        calls: of a form in each round.

    Returns:
        0.
    """
    with tempfile.TemporaryDirectory() as folder:
        _use_stub(Path(folder))
        forms = _forms()
        times: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds):
            for name, passes in forms.items():
                for index, call in enumerate(passes):
                    begin = time.process_time()
                    for _ in range(calls):
                        call()
                    times.setdefault((name, index), []).append((time.process_time() - begin) / calls * 1e6)
    medians = {key: statistics.median(taken) for key, taken in times.items()}
    for index, what in enumerate(PASSES):
        direct, slow = medians["direct", index], medians["through Triton", index]
        print(f"{what:20} direct {direct:6.1f} us, through Triton {slow:6.1f} us, {slow / direct:.1f} times as long")
    return 0


if __name__ == "__main__":
    sys.exit(main())
