"""What the kernels in a compiled module need: registers, stack, shared memory, and the instructions they are made of.

``cuobjdump`` and ``nvdisasm`` read them from the machine code; they are in CUDA's toolkit and in Triton's package. No
GPU is needed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


class Kernel(NamedTuple):
    """A kernel for one architecture.

    Attributes:
        architecture: ``"sm_90a"`` for example.
        name: as in the source, ``"void seqkernels::cuda::(anonymous namespace)::step<float>(float*, int)"``.
    """

    architecture: str
    name: str


class Resources(NamedTuple):
    """What a kernel needs.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread in local memory: spilled registers, and arrays that are indexed by variables.
        shared: bytes of a block that are declared in the source, and 1024 of CUDA's own from sm_90 on; not those that
            a launch asks for.
        opcodes: names of its instructions with their modifiers, ``"HMMA.16816.F32.BF16"`` for example.
    """

    registers: int
    stack: int
    shared: int
    opcodes: frozenset[str]

    def uses(self, opcode: str) -> bool:
        """Whether there is an instruction of that name, with whatever modifiers: ``"HMMA"``, ``"HMMA.16816"``."""
        return any(f"{found}.".startswith(f"{opcode}.") for found in self.opcodes)


_FUNCTION = re.compile(r"^\s*Function\s*:\s+(\w+)", re.MULTILINE)
#: The architecture of what follows, the function of what follows, or what it needs.
_USAGE = re.compile(
    r"^arch = (\w+)|^\s*Function\s*:?\s+(\w+)|^\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE
)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/ +(?:@!?\w+ +)?([A-Z][\w.]*)")
# nvcc gives the anonymous namespace of each file a name of its own, whose length stands before it: of a hash, the
# length of the file's name, that name, and something unique.
_ANONYMOUS = re.compile(r"(\d+)(_GLOBAL__N__[0-9a-f]{8}_\d+_)")


def find_tool() -> str | None:
    """Path of ``cuobjdump``: the one on ``PATH``, else that of Triton's package; ``None`` where there is neither."""
    on_path = shutil.which("cuobjdump")
    if on_path is not None and shutil.which("nvdisasm") is not None:
        return on_path
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or ()) if triton is not None else ():
        tool = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.exists():
            return str(tool)
    return None


def demangled(name: str) -> str:
    """The name of a kernel as in its source; `name` itself where it is no C++ name.

    Args:
        name: ``"_ZN10seqkernels4cuda4stepEPf"`` for example.
    """
    while (found := _ANONYMOUS.search(name)) is not None:
        # The name before it may end in digits too, which make the number too large.
        begin = next((i for i in range(*found.span(1)) if found.end(1) + int(name[i : found.end(1)]) < len(name)), None)
        if begin is None:
            return name
        name = f"{name[:begin]}12_GLOBAL__N_1{name[found.end(1) + int(name[begin : found.end(1)]) :]}"
    library = ctypes.CDLL("libstdc++.so.6")
    demangle, free = library.__cxa_demangle, ctypes.CDLL(None).free
    demangle.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    status = ctypes.c_int()
    text = demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value != 0:
        return name
    try:
        return ctypes.string_at(text).decode()
    finally:
        free(text)


def resources(module: str | Path, architecture: str | None = None) -> dict[Kernel, Resources]:
    """What each kernel of a module needs on each architecture that it has machine code for.

    Args:
        module: path of the compiled module, or of an object or cubin.
        architecture: look at this one only, ``"sm_90a"`` for example.

    Raises:
        FileNotFoundError: there is no ``cuobjdump``.
        RuntimeError: ``cuobjdump`` cannot read the module.
    """
    chosen = () if architecture is None else ("-arch", architecture)
    usage = list(_USAGE.finditer(_said("-res-usage", *chosen, str(module))))
    architectures = {found[1]: None for found in usage if found[1]}
    # Instructions of many kernels fill hundreds of megabytes, which take their time: an architecture for each core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        instructions = pool.map(functools.partial(_opcodes, module), architectures)
        opcodes = dict(zip(architectures, instructions, strict=True))
    needs: dict[Kernel, Resources] = {}
    where = name = ""
    for found in usage:
        if found[1]:
            where, name = found[1], ""
        elif found[2]:
            name = found[2]
        else:
            registers, stack, shared, local = map(int, found.groups()[2:])
            of_kernel = opcodes[where].get(name, frozenset())
            needs[Kernel(where, demangled(name))] = Resources(registers, stack + local, shared, of_kernel)
    return needs


def _opcodes(module: str | Path, architecture: str) -> dict[str, frozenset[str]]:
    """Of each function the names of its instructions."""
    parts = _FUNCTION.split(_said("-sass", "-arch", architecture, str(module)))[1:]
    found: dict[str, frozenset[str]] = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        found[name] = found.get(name, frozenset()) | frozenset(_INSTRUCTION.findall(text))
    return found


def _said(*arguments: str) -> str:
    """What ``cuobjdump`` prints."""
    tool = find_tool()
    if tool is None:
        raise FileNotFoundError("cuobjdump and nvdisasm are neither on PATH nor in a package triton")
    done = subprocess.run([tool, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} {' '.join(arguments)}: {done.stdout.strip().rpartition(chr(10))[2]}")
    return done.stdout
