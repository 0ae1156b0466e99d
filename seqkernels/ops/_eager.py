"""When an op may be called without the dispatcher, which takes longer than many a kernel."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import backends
from ..cells import DTYPES

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_PLAIN = frozenset((Tensor, Parameter, type(None)))


class Exporter(Protocol):
    """What writes a traced program in the terms of another format, in place of ops that the format has not.

    Attributes:
        thread: the one that exports, as ``threading.get_ident()`` gives it.
    """

    thread: int

    def run(self, *args: Any) -> tuple[Any, ...]:
        """Stand in for `seqkernels._recurrent.run`."""

    def step(self, *args: Any) -> tuple[Tensor, ...]:
        """Stand in for `seqkernels._recurrent.step`."""

    def attend(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Stand in for `seqkernels.ops.attention.attend`."""


#: Set by an integration while it exports, else ``None``. What is there may be another thread's: see `exporting`.
exporter: Exporter | None = None


def exporting() -> Exporter | None:
    """The exporter that looks on in this thread; other threads compute meanwhile."""
    found = exporter
    return None if found is None or found.thread != threading.get_ident() else found


def undisturbed() -> bool:
    """Whether nothing listens: no compilation, tracing, dispatch mode, functional transform, forward-mode gradient."""
    return not (
        _is_compiling()
        or _dispatch_modes()
        or _transforms_active()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def transformed() -> bool:
    """Whether ``torch.func``, forward-mode gradients, ``torch.jit.trace`` or an exporter to a format without our ops
    look on, which plain operations serve.
    """
    if _is_compiling():
        # The first of them by the name that dynamo knows.
        return torch._C._are_functorch_transforms_active() or exporting() is not None
    return _transforms_active() or forward_ad._current_level >= 0 or _tracing_state() is not None


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise where one of `tensors` has a forward-mode gradient, of which no result would know.

    Raises:
        NotImplementedError: one of `tensors` is a dual tensor.
    """
    if forward_ad._current_level < 0:
        return
    for x in tensors:
        if x is not None and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                "expected tensors without a tangent, got a dual tensor; the ops of this package have no forward-mode"
                " gradients, only those of the backward pass"
            )


def insisted() -> str | None:
    """What `use_backend` insists on, for `as_in_forward`; ``None`` in programs being compiled."""
    return None if _is_compiling() else backends.insisted()


def as_in_forward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Have the backward pass of a ``Function`` use what the forward pass was `insisted` to, kept in its context."""

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Tensor | None) -> Any:
        if ctx.insisted is None:
            return backward(ctx, *grads)
        with backends.insisting(ctx.insisted):
            return backward(ctx, *grads)

    return call


def readable(x: Tensor | None) -> bool:
    """Whether the values of `x`, if it is one, can be looked at without waiting for a device or breaking a graph."""
    return x is None or (x.device.type == "cpu" and not _is_compiling())


def eager(*tensors: Tensor | None) -> bool:
    """Whether `tensors` are plain ones on the CPU (the first is never ``None``), and `undisturbed`."""
    first = tensors[0]
    assert first is not None
    return undisturbed() and first.is_cpu and _PLAIN.issuperset(map(type, tensors))


def eager_on_gpu(*tensors: Tensor | None) -> bool:
    """Whether `tensors` are plain ones on a CUDA device whose memory holds their values, and `undisturbed`."""
    first = tensors[0]
    assert first is not None
    if not (first.is_cuda and undisturbed() and _PLAIN.issuperset(map(type, tensors))):
        return False
    return not any(x is not None and (x.is_neg() or x._is_zerotensor()) for x in tensors)


def plain_on_gpu(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q (B, Hq, M, D), k (B, Hk, N, D) and v (B, Hk, N, Dv) fit, and are `eager_on_gpu`, without autocast."""
    shape, dtype, device = k.shape, q.dtype, q.get_device()
    return (
        eager_on_gpu(q, k, v)
        and not torch.is_autocast_enabled("cuda")
        and q.dim() == len(shape) == v.dim() == 4
        and k.get_device() == v.get_device() == device
        and dtype == k.dtype == v.dtype
        and dtype in DTYPES
        and shape[0] == q.shape[0]
        and shape[3] == q.shape[3]
        and shape[:3] == v.shape[:3]
        and shape[1] > 0
        and q.shape[1] % shape[1] == 0
    )


def records(*tensors: Tensor | None) -> bool:
    """Whether one of `tensors` wants a gradient."""
    for x in tensors:  # noqa: SIM110 - any() takes twice as long
        if x is not None and x.requires_grad:
            return True
    return False


def batched(x: Tensor | None) -> bool:
    """Whether `x` is many tensors at once, of ``is_grads_batched`` or ``vmap``."""
    functorch = torch._C._functorch
    return x is not None and (functorch.is_legacy_batchedtensor(x) or functorch.is_batchedtensor(x))


def apart(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Views: one argument may be another, or come from it, and yet gets a gradient of its own."""
    return [x if x is None else x.view_as(x) for x in tensors]


def gradients(
    outs: Sequence[Tensor], grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `outs` as a graph, if gradients are recorded, else as values: ``None`` where `needs` says so.

    Args:
        outs: made of `tensors` with a graph.
        grads: of `outs`, or ``None``.
        tensors: whose gradients are asked for.
        needs: of which of them.
    """
    pairs = [(out, grad) for out, grad in zip(outs, grads, strict=True) if grad is not None]
    wanted = [x for x, need in zip(tensors, needs, strict=True) if need and x is not None]
    keep = torch.is_grad_enabled()
    # With a graph in either case: gradients that are many at once go through operations alone then.
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=True, allow_unused=True
        )
    )
    made = [next(found) if need and x is not None else None for x, need in zip(tensors, needs, strict=True)]
    return made if keep else [x if x is None else x.clone() for x in made]


_modules: dict[tuple[torch.dtype, str, str], ModuleType] = {}


def compiled(dtype: torch.dtype, cell: str, stem: str) -> ModuleType | None:
    """Module `stem` of the native implementation where the registry gives `cell` to it, else ``None``.

    ``None`` too while `explain` looks on: a call that turns out not to fit would be seen twice.
    """
    key = (dtype, cell, stem)
    found = _modules.get(key) if backends.may_repeat("native") else None
    if found is None:
        if backends.explained():
            return None
        chosen = backends.select(backends.Call("recurrence", "cpu", dtype, cell)).chosen
        if chosen != "native":
            return None
        found = _modules[key] = backends.module(chosen, stem)
    return found
