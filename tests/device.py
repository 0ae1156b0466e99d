"""Contract tests on a GPU: tensors are drawn and judged on the CPU, and each call of a kernel carries them over.

Strides, offsets and what lies around a tensor in memory travel with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqkernels import backends


def to_device(x: Any) -> Any:
    """Tensors, also in tuples and lists, on the GPU, in a copy of all their memory."""
    if isinstance(x, Tensor):
        if x.device.type != "cpu" or x._is_zerotensor():
            return x
        there = torch.empty(0, dtype=x.dtype, device="cuda")
        return there.set_(x.untyped_storage().cuda(), x.storage_offset(), x.shape, x.stride())
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(to_device, x))
    return type(x)(map(to_device, x)) if isinstance(x, tuple | list) else x


def from_device(x: Any) -> Any:
    """The inverse of `to_device`, of results."""
    if isinstance(x, Tensor):
        return x.cpu()
    return type(x)(map(from_device, x)) if isinstance(x, tuple | list) else x


def _of_cpu(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.device.type == "cpu"
    return any(map(_of_cpu, x)) if isinstance(x, tuple | list) else False


def _carried(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        if not _of_cpu(args):
            return fn(*args, **options)
        options = {name: to_device(x) for name, x in options.items()}
        return from_device(fn(*map(to_device, args), **options))

    return call


def carry(name: str) -> None:
    """Lets implementation `name`, which runs on a GPU, serve calls with tensors of the CPU, for good."""
    package: Any = backends.backend(name)
    asked = package.unsupported
    package.unsupported = lambda call: asked(call._replace(device="cuda" if call.device == "cpu" else call.device))
    for op in ("attention", "recurrence"):
        if asked(backends.Call(op, "cuda", torch.float32, "lstm" if op == "recurrence" else "")) is not None:
            continue
        modules = {op: op}
        if op == "recurrence" and backends.has_together(name):
            modules["together"] = "recurrences"
        for name_of_module, stem in modules.items():
            module = importlib.import_module(f"{package.__name__}.{name_of_module}")
            for direction in ("forward", "backward"):
                function = f"{stem}_{direction}"
                setattr(module, function, _carried(getattr(module, function)))
