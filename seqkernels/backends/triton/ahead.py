"""Kernels compiled ahead of time, without a GPU, and what they need of one: registers, spills and shared memory.

``python -m seqkernels compile`` shows it and holds it to the reviewed ``budget.json``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from . import attention_kernels, recurrence_ahead
from .attention import ROWS_OF_SUMS
from .attention_scores import Full, Rows, Terms
from .configs import Blocks, blocks_of, products
from .recurrence_ahead import RecurrenceVariant

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
BUDGET = Path(__file__).with_name("budget.json")
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_DTYPES = {name: dtype for dtype, name in _TYPES.items()} | {"i32": torch.int32, "i64": torch.int64, "u8": torch.uint8}
#: Kinds of products: dtypes, and of float32 its precisions.
_PRODUCTS = (*((dtype, "ieee") for dtype in _TYPES), *((torch.float32, name) for name in ("tf32", "tf32x3")))
_FEATURES = {
    64: ("plain", "causal", "all"),
    128: ("plain", "causal", "all"),
    256: ("plain", "causal", "all"),
    512: ("causal", "all"),
}
# Sizes of q and k, and of v, whose tiles have columns that are not there.
_ODD_SIZES = ((80, 80), (96, 96), (192, 128))
_SUMS = ("all sum_rows", "all sum_keys", "all sum_rows sum_keys")


class Pointer(NamedTuple):
    """Stands for a tensor whose memory begins at a multiple of 16 bytes."""

    type: str


class Tiles(NamedTuple):
    """Stands for the descriptor of tiles."""

    type: str
    shape: tuple[int, ...]


class Variant(NamedTuple):
    """A kernel as it is shipped: for a dtype, a head size, and what a call uses beyond plain softmax.

    Attributes:
        kernel: ``"merge"``, ``"delta"``, or one that `configs.blocks_of` has tiles for.
        dtype: of q, k and v.
        size: D, of q and k.
        features: ``"plain"``; ``"causal"``; ``"pages"``, causal over keys in pages; or ``"all"``, what goes into
            scores, documents and bounds. Of the gradient of a bias ``"sum_rows"`` and ``"sum_keys"`` follow, where it
            is broadcast over them. ``"all"`` that ``"delta"`` has is the gradient of the log-sum-exp.
        value_size: Dv; `size` by default.
    """

    kernel: str
    dtype: torch.dtype
    size: int
    features: str
    precision: str = "ieee"
    value_size: int | None = None

    def __str__(self) -> str:
        kind = _TYPES[self.dtype] if self.precision == "ieee" else self.precision
        size = f"D={self.size}" + ("" if self.value_size is None else f" Dv={self.value_size}")
        return f"{self.kernel} {kind} {size} {self.features}"

    @property
    def multiplies(self) -> bool:
        """Whether it has a matrix product for tensor cores."""
        matrices = self.dtype != torch.float32 or self.precision != "ieee"
        return matrices and self.kernel not in ("merge", "delta")


Variants = Variant | RecurrenceVariant


class Needs(NamedTuple):
    """What a compiled kernel needs: registers of a thread, bytes of them that spill, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int
    tensor_cores: bool


def is_shipped(variant: Variants, architecture: str) -> bool:
    """Whether calls on an architecture take a kernel: tiles come by descriptors on Hopper alone."""
    return "descriptors" not in variant.features or architecture == "sm_90"


def variants() -> Iterator[Variants]:
    """Every kernel in every configuration that is shipped, on some architecture."""
    for size in _FEATURES:
        for dtype, precision in _PRODUCTS:
            if products(dtype, precision, size, size) != precision:
                continue
            for features in _FEATURES[size]:
                for kernel in ("forward", "few_rows", "backward_q", "backward_kv"):
                    yield Variant(kernel, dtype, size, features, precision)
                if features == "all":
                    yield Variant("backward_bias", dtype, size, features, precision)
    yield from _bfloat16_variants()
    yield from recurrence_ahead.variants(_TYPES, _PRODUCTS)


def _bfloat16_variants() -> Iterator[Variant]:
    """Kernels and configurations of which another dtype would tell nothing new."""
    dtype = torch.bfloat16
    for size in _FEATURES:
        yield Variant("merge", dtype, size, "plain")
        yield Variant("delta", dtype, size, "plain")
    yield Variant("delta", dtype, 128, "all")
    for size in (64, 128, 256):
        yield Variant("forward", dtype, size, "pages")
        yield Variant("few_rows", dtype, size, "pages")
        for features in ("plain", "causal"):
            yield Variant("few_rows", dtype, size, f"{features} unsplit")
    for size in (64, 80, 128):
        for features in ("causal", "all"):
            yield Variant("forward", dtype, size, f"{features} by descriptors")
    for size in (64, 128):
        for features in _SUMS:
            yield Variant("backward_bias", dtype, size, features)
    for size, value_size in _ODD_SIZES:
        for kernel in ("forward", "few_rows", "backward_q", "backward_kv"):
            yield Variant(kernel, dtype, size, "causal", value_size=None if value_size == size else value_size)


def _bias(variant: Variant, kind: str) -> Full:
    """A bias, or its gradient, with strides of 0 where it is broadcast."""
    rows, keys = ("sum_rows" in variant.features), ("sum_keys" in variant.features)
    return Full(Pointer(kind), 4096, 4096, 0 if rows else 1 if keys else 4096, 0 if keys else 1)


def _terms(variant: Variant) -> Terms:
    none = Terms(0.125, None if variant.dtype == torch.float32 else 1, *[None] * 17)
    if variant.features.startswith("plain"):
        return none
    if variant.features.startswith("causal"):
        return none._replace(right=0)
    pointer = Pointer("i32")
    if variant.features == "pages":
        return none._replace(right=0, bottom_right=1, key_lengths=pointer, table=pointer, table_batch=64, page=256)
    dtype = _TYPES[variant.dtype]
    return Terms(
        0.125,
        None,
        30.0,
        1024,
        1024,
        1,
        Full(Pointer("u8"), 4096, 4096, 4096, 1),
        _bias(variant, dtype),
        Pointer("fp32"),
        32,
        pointer,
        pointer,
        pointer,
        None,
        None,
        None,
        Pointer("i64"),
        1 << 28,
        1.1,
    )


def _arguments(variant: Variant, architecture: int) -> tuple[triton.JITFunction, dict[str, Any], Blocks]:
    """The kernel, its arguments by name, with `Pointer` for tensors, and its tiles."""
    dtype, size = _TYPES[variant.dtype], variant.size
    value_size = variant.value_size or size
    all_of_it = variant.features.startswith("all")
    rows, values = (Rows(Pointer(dtype), 16 * 4096 * n, n, 16 * n) for n in (size, value_size))
    sums = Pointer("fp32")
    if variant.kernel in ("merge", "delta"):
        return _sums_of_rows(variant, values, sums)
    blocks = blocks_of(
        variant.kernel,
        variant.dtype,
        size,
        value_size,
        many_terms=all_of_it,
        precision=variant.precision,
        pages=variant.features == "pages",
        architecture=architecture,
    )
    constants = {"D": size, "DV": value_size, "PRECISION": variant.precision, **blocks.constants()}
    sizes = {"heads": 16, "group": 2, "rows": 4096, "most_queries": 4096, "most_keys": 4096}
    given: dict[str, Any] = {"q": rows, "k": rows, "v": values, "terms": _terms(variant), **sizes, **constants}
    if variant.kernel in ("forward", "few_rows"):
        few = variant.kernel == "few_rows"
        described = "descriptors" in variant.features
        given["tiles_k"] = Tiles(dtype, (1, 1, blocks.n, blocks.d)) if described else None
        given["tiles_v"] = Tiles(dtype, (1, 1, blocks.n, blocks.dv)) if described else None
        # Few rows have keys split over programs, whose parts are sums, unless there are rows enough for all of those.
        split = few and "unsplit" not in variant.features
        out = values._replace(data=sums) if split else values
        given |= {"out": out, "lse": sums, "sink": Pointer("fp32") if all_of_it else None, "PACK": 4 if few else 1}
        given |= dict.fromkeys(("split_keys", "split_out", "split_lse"), 1 << 20 if split else None)
        return attention_kernels.forward_kernel, given, blocks
    given |= {"grad": values, "lse": sums, "delta": Pointer("fp32")}
    # The gradient of a bias that is broadcast is a sum.
    kind = "fp32" if variant.kernel == "backward_bias" else dtype
    bias = _bias(variant, kind) if all_of_it else None
    if variant.kernel == "backward_q":
        return attention_kernels.backward_q_kernel, given | {"grad_q": rows, "grad_bias": bias}, blocks
    if variant.kernel == "backward_bias":
        over = {f"SUM_{name.upper()}": f"sum_{name}" in variant.features for name in ("rows", "keys")}
        return attention_kernels.backward_bias_kernel, given | {"grad_bias": bias, "batch": 4, **over}, blocks
    return attention_kernels.backward_kv_kernel, given | {"grad_k": rows, "grad_v": values}, blocks


def _sums_of_rows(variant: Variant, values: Rows, sums: Pointer) -> tuple[triton.JITFunction, dict[str, Any], Blocks]:
    """As `_arguments`, of the kernels that multiply no matrices, whose warps and stages are Triton's own."""
    tiles = blocks_of("few_rows", variant.dtype, variant.size, variant.size)
    blocks = tiles._replace(m=ROWS_OF_SUMS, warps=4, stages=3)
    given: dict[str, Any] = {"out": values, "heads": 16, "rows": 4096, "DV": variant.size, **blocks.constants()}
    if variant.kernel == "merge":
        parts = {"parts": values._replace(data=sums), "parts_lse": sums, "lse": sums}
        splits = dict.fromkeys(("splits", "split_out", "split_lse"), 1 << 20)
        return attention_kernels.merge_kernel, given | parts | splits, blocks
    lse = Rows(sums, 16 * 4096, 4096, 1) if variant.features == "all" else None
    return attention_kernels.delta_kernel, given | {"grad": values, "grad_lse": lse, "delta": sums}, blocks


def _stand_in(value: Any) -> Any:
    """`value` with tensors of the processor in place of `Pointer`, and descriptors in place of `Tiles`."""
    if isinstance(value, Pointer):
        return torch.empty(16, dtype=_DTYPES[value.type])
    if isinstance(value, Tiles):
        shape = list(value.shape)
        return TensorDescriptor.from_tensor(torch.empty(shape, dtype=_DTYPES[value.type]), shape)
    if isinstance(value, tuple):
        found = map(_stand_in, value)
        return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
    return value


def _source(kernel: Any, given: dict[str, Any], target: GPUTarget, options: dict[str, Any]) -> tuple[ASTSource, Any]:
    """What Triton makes of a call before it compiles it, and its options: so a call finds what is compiled here."""
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments = {parameter.name: _stand_in(given[parameter.name]) for parameter in kernel.params}
    bound, specialization, others = binder(**arguments, **options)
    packed = kernel._pack_args(backend, {**arguments, **options}, bound, specialization, others)
    full_options, signature, constants, attributes = packed
    return ASTSource(kernel, signature, constants, attributes), full_options


def compile_variant(variant: Variants, architecture: str) -> Needs:
    """Compiles a kernel for an architecture, into Triton's cache, and says what it needs.

    Raises:
        ValueError: `architecture` is not one of `ARCHITECTURES`.
    """
    _check_architecture(architecture)
    number = int(architecture.removeprefix("sm_"))
    if isinstance(variant, RecurrenceVariant):
        kernel, given, options = recurrence_ahead.arguments(variant, Pointer)
    else:
        kernel, given, blocks = _arguments(variant, number)
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    target = GPUTarget("cuda", number, 32)
    source, full_options = _source(kernel, given, target, options)
    compiled = triton.compile(source, target=target, options=full_options.__dict__)
    ptx: str = compiled.asm["ptx"]
    registers, spilled = _resources(compiled.asm["cubin"])
    return Needs(registers, spilled, compiled.metadata.shared, "mma" in ptx)


def _check_architecture(name: str) -> None:
    if name not in ARCHITECTURES:
        raise ValueError(f"arch: expected some of {', '.join(ARCHITECTURES)}, got {name!r}")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of it on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"{tool} -res-usage did not name registers: {text}")
    return int(found[1]), int(found[2])


Found = dict[tuple[str, Variants], Needs]


def compile_all(architectures: Sequence[str], only: str = "") -> Found:
    """Compiles every variant whose description has `only` in it, in as many processes as there are cores.

    Returns:
        What each needs, by architecture and variant.

    Raises:
        ValueError: an architecture is not one of `ARCHITECTURES`, or Triton's interpreter is on.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("Triton's interpreter is on (TRITON_INTERPRET), which compiles nothing")
    for architecture in architectures:
        _check_architecture(architecture)
    wanted = [variant for variant in variants() if only in str(variant)]
    jobs = [(architecture, x) for architecture in architectures for x in wanted if is_shipped(x, architecture)]
    found: Found = {}
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        waiting = {
            pool.submit(compile_variant, variant, architecture): (architecture, variant)
            for architecture, variant in jobs
        }
        for done in tqdm(as_completed(waiting), total=len(waiting), unit="kernel", disable=None):
            found[waiting[done]] = done.result()
    return {job: found[job] for job in jobs}


def as_json(found: Found) -> str:
    """What kernels need in the form of ``budget.json``: registers, spilled and shared bytes, a line for each kernel."""
    table: dict[str, dict[str, str]] = {}
    for (architecture, variant), needs in found.items():
        numbers = [needs.registers, needs.spilled, needs.shared]
        table.setdefault(architecture, {})[str(variant)] = json.dumps(numbers)
    parts = []
    for architecture, rows in table.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {numbers}" for name, numbers in rows.items())
        parts.append(f" {json.dumps(architecture)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}"


def render(found: Found) -> str:
    """A table of what kernels need."""
    lines = [f"{'':8}{'kernel':44}{'registers':>10}{'spilled':>9}{'shared':>9}  tensor cores"]
    for (architecture, variant), needs in found.items():
        numbers = f"{needs.registers:>10}{needs.spilled:>9}{needs.shared:>9}"
        lines.append(f"{architecture:8}{variant!s:44}{numbers}  {'yes' if needs.tensor_cores else 'no'}")
    return "\n".join(lines)


def breaches(found: Found) -> list[str]:
    """What needs more than ``budget.json`` allows, or has no place in it, or no tensor cores for 16-bit numbers."""
    allowed = json.loads(BUDGET.read_text())
    said = []
    for (architecture, variant), needs in found.items():
        limits = allowed.get(architecture, {}).get(str(variant))
        if limits is None:
            said.append(f"{architecture} {variant}: has no budget")
            continue
        for name, need, limit in zip(Needs._fields, needs, limits, strict=False):
            if need > limit:
                said.append(f"{architecture} {variant}: {name} {need}, allowed {limit}")
        if not needs.tensor_cores and variant.multiplies:
            said.append(f"{architecture} {variant}: no tensor-core instructions")
    return said
