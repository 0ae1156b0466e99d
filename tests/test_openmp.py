"""One OpenMP runtime in the process: torch's (docs/decisions/0003-own-openmp.md)."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from seqkernels.backends import native

RUNTIMES = ("libgomp", "libomp", "libiomp")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
@pytest.mark.skipif(native.unavailable() is not None, reason="the compiled module is not there")
@pytest.mark.parametrize("first", ["seqkernels", "torch"])
def test_one_openmp_runtime_is_loaded(first: str) -> None:
    program = f"""
        import {first}
        import seqkernels, torch
        torch.set_num_threads(2)
        with seqkernels.use_backend("native"):
            seqkernels.nn.LSTM(64, 128)(torch.randn(64, 16, 64))[0].sum().backward()
        paths = {{line.split()[-1] for line in open("/proc/self/maps") if "/" in line}}
        print(*sorted(path for path in paths if path.rpartition("/")[2].startswith({RUNTIMES})), sep="\\n")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    loaded = result.stdout.split()
    assert len(loaded) == 1, loaded
