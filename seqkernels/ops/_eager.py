"""When an op may be called without the dispatcher, which takes longer than many a kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_PLAIN = frozenset((Tensor, Parameter, type(None)))


def undisturbed() -> bool:
    """Whether nothing listens to operations: no compilation, tracing, dispatch mode or functional transform."""
    return not (_is_compiling() or _dispatch_modes() or _transforms_active() or _tracing_state() is not None)


def eager(*tensors: Tensor | None) -> bool:
    """Whether `tensors` are plain ones on the CPU (the first is never ``None``), and `undisturbed`."""
    first = tensors[0]
    assert first is not None
    return undisturbed() and first.is_cpu and _PLAIN.issuperset(map(type, tensors))
