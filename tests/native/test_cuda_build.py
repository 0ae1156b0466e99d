"""The compiled module of CUDA kernels, as far as it goes without a GPU: what was built, and what it refuses."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from seqkernels import backends
from seqkernels.backends import cuda, native
from seqkernels.backends.cuda import emulator, resources
from seqkernels.backends.cuda.extension import device_error, extension, load_error
from seqkernels.backends.native.extension import extension as native_extension

NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which(f"{os.environ.get('CUDA_HOME', '')}/bin/nvcc")
TARGETS = os.environ.get("SEQKERNELS_CUDA_TARGETS", "sm_80 sm_90a sm_100a sm_120 compute_90").split()
SANITIZED = native.unavailable() is None and native_extension().build_info()["sanitizers"]

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc on PATH, in CUDA_HOME or in CUDACXX"),
    pytest.mark.skipif(bool(SANITIZED), reason="builds with sanitizers are without CUDA"),
]
no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def without_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "_module", None)


def test_it_is_there() -> None:
    assert load_error() is None, f"{load_error()} (SEQKERNELS_CUDA=1 shows why it was not built)"


def test_build_info() -> None:
    info = extension().build_info()
    assert info["targets"].split() == TARGETS
    assert info["cuda"].split(".")[0] in info["compiler"]


def test_loading_it_is_left_until_it_is_asked_for() -> None:
    code = (
        "import sys, torch, seqkernels; print([m for m in sys.modules if m == 'seqkernels._C_cuda']);"
        "import seqkernels._C_cuda; print(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]


def test_the_runtime_in_it_is_nobody_elses() -> None:
    """A runtime of another version in the process, torch's for example, would take over calls by the same names."""
    library = ctypes.CDLL(extension().__file__)
    assert hasattr(library, "PyInit__C_cuda")
    assert not hasattr(library, "cudaMalloc")
    if shutil.which("ldd") is not None:
        linked = subprocess.run(["ldd", extension().__file__], capture_output=True, text=True, check=True).stdout
        assert "libcuda" not in linked
        assert "torch" not in linked


@no_device
def test_without_a_driver_it_says_why(without_emulation: None) -> None:
    reason = extension().device_error()
    assert "CUDA" in reason
    assert extension().device_error() == reason
    assert cuda.unavailable() == device_error() == f"there is no CUDA device for seqkernels._C_cuda: {reason}"


def test_what_it_has_no_kernels_for(without_emulation: None) -> None:
    call = backends.Call("recurrence", "cpu", torch.float32, "lstm")
    assert cuda.unsupported(call._replace(op="attention", kind="")) == "has no kernel for attention"
    assert cuda.unsupported(call) == "runs on cuda only, not on cpu"
    assert cuda.unsupported(call._replace(device="cuda", dtype=torch.float64)) == "has no torch.float64"


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(4), ValueError, "gates_x: expected a tensor on a CUDA device, got one on the CPU"),
        (np.zeros(4), ValueError, "gates_x: expected a tensor on a CUDA device, got one on the CPU"),
        (None, TypeError, "gates_x: expected a tensor, got None"),
        ([1.0], TypeError, "gates_x: expected a tensor, got <class 'list'>"),
    ],
)
def test_names_what_does_not_fit(x: object, error: type[Exception], message: str) -> None:
    plan = extension().plan("block", "lstm", "exact", False, 4, 2, 16, 8)
    loop = (*[None] * 4, (None,) * 9, "lstm", False, 0, 1, 0, None, None)
    with pytest.raises(error, match=message):
        extension().recurrence_forward(plan, (loop, x, None))


class _View(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


_SHAPE = (ctypes.c_int64 * 1)(4)
_STREAM = 0x5EED


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_View))
def _view(tensor: Elsewhere, out: ctypes._Pointer[_View]) -> int:
    shape = ctypes.addressof(_SHAPE)
    out[0] = _View(16, tensor.device_type, tensor.device_id, 1, 2, 32, 1, shape, None, 0)
    return 0


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
def _stream(device_type: int, device_id: int, out: ctypes._Pointer[ctypes.c_void_p]) -> int:
    Elsewhere.asked.append((device_type, device_id))
    out[0] = _STREAM
    return 0


class _Table(ctypes.Structure):
    _fields_: ClassVar = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("others", ctypes.c_void_p * 3),
        ("view", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    ]


_NAME = b"dlpack_exchange_api"
_TABLE = _Table(1, 3, None, (ctypes.c_void_p * 3)(), *(ctypes.cast(f, ctypes.c_void_p) for f in (_view, _stream)))
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Elsewhere:
    """Says that it lies on a device, where nothing is."""

    asked: ClassVar[list[tuple[int, int]]] = []
    __dlpack_c_exchange_api__ = _new_capsule(ctypes.addressof(_TABLE), _NAME, None)

    def __init__(self, device_id: int = 0, device_type: int = 2) -> None:
        self.device_id, self.device_type = device_id, device_type


def test_the_module_of_the_processor_refuses_tensors_elsewhere() -> None:
    with pytest.raises(ValueError, match="x: expected a tensor on the CPU, got one on cuda:1"):
        native_extension().activation("tanh", Elsewhere(1), torch.empty(4))


def test_all_tensors_of_a_call_lie_on_one_device() -> None:
    with pytest.raises(ValueError, match="second: expected a tensor on cuda:0, as first, got one on cuda:1"):
        extension().work(Elsewhere(0), Elsewhere(1))
    with pytest.raises(
        ValueError, match="first: expected a tensor on a CUDA device, got one on a device of DLPack's type 4"
    ):
        extension().work(Elsewhere(device_type=4))


@no_device
def test_the_stream_is_the_callers_and_errors_are_cudas() -> None:
    Elsewhere.asked.clear()
    with pytest.raises(RuntimeError, match=r"cudaGetDevice: .* \(cudaError\w+\)"):
        extension().work(Elsewhere(3))
    assert Elsewhere.asked == [(2, 3)]


SOURCE = """
namespace {
__global__ void scale(float* x, float by) { x[threadIdx.x] *= by; }
__global__ void pick(int* x) {
  int all[16] = {};
  for (int i = 16; i < 64; ++i) all[x[i] & 15] += i;
  for (int i = 0; i < 16; ++i) x[i] = all[i];
}
}
void* kernels[] = {reinterpret_cast<void*>(&scale), reinterpret_cast<void*>(&pick)};
"""


def test_resources_of_kernels(tmp_path: Path) -> None:
    source = tmp_path / "some.cu"
    source.write_text(SOURCE)
    targets = [f"--generate-code=arch=compute_{x},code=sm_{x}" for x in ("80", "90a")]
    options = ["--compress-mode=size", *targets, "-c", "-o", str(tmp_path / "some.o")]
    subprocess.run([str(NVCC), *options, str(source)], check=True)
    found = resources.resources(tmp_path / "some.o")
    names = ["(anonymous namespace)::pick(int*)", "(anonymous namespace)::scale(float*, float)"]
    assert sorted(found) == [resources.Kernel(target, name) for target in ("sm_80", "sm_90a") for name in names]
    for (_, name), needs in found.items():
        assert 8 <= needs.registers <= 40
        assert needs.stack == (64 if name == names[0] else 0)
        assert needs.uses("STG")
        assert needs.uses("STG.E")
        assert not needs.uses("ST")
        assert needs.uses("STL") == needs.uses("LDL") == (name == names[0])
    one = resources.resources(tmp_path / "some.o", "sm_90a")
    assert one == {kernel: needs for kernel, needs in found.items() if kernel.architecture == "sm_90a"}


def test_resources_of_what_has_no_kernels() -> None:
    with pytest.raises(RuntimeError, match="does not contain device code"):
        resources.resources(Path(__file__))


def test_names_in_sources() -> None:
    assert resources.demangled("_ZN2sk36_GLOBAL__N__bbcab5a5_4_t_cu_38691f391kIfEEvPT_i") == (
        "void sk::(anonymous namespace)::k<float>(float*, int)"
    )
    assert resources.demangled("_ZN3sk238_GLOBAL__N__609f5295_7_some_cu_kernels4pickEPi") == (
        "sk2::(anonymous namespace)::pick(int*)"
    )
    assert resources.demangled("extern_c_kernel") == "extern_c_kernel"
