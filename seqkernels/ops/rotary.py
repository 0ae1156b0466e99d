"""The rotation of rotary position embeddings (Su et al., "RoFormer", 2021).

Pairs of elements of each vector are turned by angles of their own,

    out_a = a cos - b sin,  out_b = b cos + a sin,

in the accumulation dtype, and rounded once. It is linear, and its gradient the rotation back: one op, which knows both
directions, has derivatives of any order. It is a pass of its own before attention, which takes little more than a copy;
``docs/decisions/0007`` says why.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import backends
from ..cells import DTYPES, accumulate_dtype
from ._eager import as_in_forward, batched, eager, insisted, records, refuse_tangents, transformed

_library = torch.library.Library("seqkernels", "FRAGMENT")
_library.define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor")

#: Of `x`; more are for plain operations.
MAX_DIMS = 4


def _empty_like(x: Tensor) -> Tensor:
    """Memory in the order of that of `x`, but for a last dimension that is contiguous."""
    out = torch.empty_like(x)
    if x.shape[-1] <= 1 or out.stride(-1) == 1:
        return out
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    refuse_tangents(x, cos, sin)
    out = _empty_like(x)
    _implementation(x).rotary(x, cos, sin, interleaved, inverse, out)
    return out


def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return _empty_like(x)


_library.impl("rotary", _rotary, "CompositeExplicitAutograd")
torch.library.register_fake("seqkernels::rotary", _rotary_fake, lib=_library)

rotary_op = torch.ops.seqkernels.rotary.default


def _implementation(x: Tensor) -> Any:
    call = backends.Call("rotary", x.device.type, x.dtype)
    if backends.choice(call) is None:
        # Who insists on an implementation means the kernels that it has.
        backends.note("rotary embedding: the implementation asked for has no kernel for it")
        return backends.module("reference", "rotary")
    return backends.implementation(call)


_modules: dict[torch.dtype, ModuleType | None] = {}


def _compiled(x: Tensor, cos: Tensor, sin: Tensor) -> ModuleType | None:
    """The module to call at once, without the dispatcher: for plain tensors in eager mode, where it is native's."""
    try:
        if not eager(x, cos, sin) or not 1 <= x.dim() <= MAX_DIMS or not backends.may_repeat("native"):
            return None
        # A bit that memory does not show; the dispatcher does what it says.
        if x.is_neg() or cos.is_neg() or sin.is_neg():
            return None
        dtype = x.dtype
    except AttributeError:
        return None  # `check` says what is wrong
    if dtype not in _modules:
        chosen = backends.choice(backends.Call("rotary", "cpu", dtype))
        _modules[dtype] = backends.module("native", "rotary") if chosen == "native" else None
    return _modules[dtype]


class _Rotary(torch.autograd.Function):
    """Arguments: x, cos, sin, interleaved, inverse, and the compiled module to call at once, or ``None`` for the op."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, module: ModuleType | None
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.inverse, ctx.insisted = interleaved, inverse, insisted()
        ctx.set_materialize_grads(False)
        if module is None:
            found: Tensor = rotary_op(x, cos, sin, interleaved, inverse)
            return found
        out = _empty_like(x)
        module.rotary(x, cos, sin, interleaved, inverse, out)
        return out

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        found = None
        if grad is not None:
            cos, sin = ctx.saved_tensors
            if torch.compiler.is_compiling():
                found = rotary_op(grad, cos, sin, ctx.interleaved, not ctx.inverse)
            elif batched(grad):
                found = _plainly(grad, cos, sin, ctx.interleaved, not ctx.inverse)
            else:
                module = _compiled(grad, cos, sin)
                found = _turn(grad, cos, sin, ctx.interleaved, not ctx.inverse, module)
        return found, None, None, None, None, None


# `Function.apply` without what it does for functional transforms, of which there are none.
_apply = super(torch.autograd.Function, _Rotary).apply


def _plainly(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    from ..backends.reference.rotary import rotate as reference

    return reference(x, cos, sin, interleaved, inverse)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, module: ModuleType | None) -> Tensor:
    """By the compiled module or the op; differentiable in `x`."""
    recorded = torch.is_grad_enabled() and x.requires_grad
    if module is not None:
        try:
            if recorded:
                found: Tensor = _apply(x, cos, sin, interleaved, inverse, module)
                return found
            out = _empty_like(x)
            module.rotary(x, cos, sin, interleaved, inverse, out)
            return out
        except (TypeError, ValueError, RuntimeError):
            # The op can run it, or the check knows what is wrong.
            check(x, cos, sin)
    if recorded:
        found = _Rotary.apply(x, cos, sin, interleaved, inverse, None)
        return found
    found = rotary_op(x, cos, sin, interleaved, inverse)
    return found


def check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise the error that names the argument which breaks the contract of `rotate`."""
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.dim() == 0:
            raise ValueError(f"{name}: expected at least 1 dimension, got 0")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} as x, got {tensor.device}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected one of {DTYPES}, got {x.dtype}")
    size, pairs = x.shape[-1], cos.shape[-1]
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.dtype != accumulate_dtype(x.dtype):
            raise TypeError(f"{name}: expected {accumulate_dtype(x.dtype)} for x of {x.dtype}, got {tensor.dtype}")
        places = x.shape[x.dim() - tensor.dim() : -1]
        fits = tensor.dim() <= x.dim() and tensor.shape[-1] == pairs and 2 * pairs <= size
        if not fits or any(have not in (1, want) for have, want in zip(tensor.shape[:-1], places, strict=True)):
            raise ValueError(
                f"{name}: expected shape (..., P) with P at most half of the last dimension of x {tuple(x.shape)}, the"
                f" same of cos and sin, and each other dimension 1 or as in x, got {tuple(tensor.shape)}"
            )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Pairs among the first elements of each vector turned.

    Plain operations serve other devices than the CPU, subclasses that wrap other tensors, more than 4 dimensions,
    gradients of `cos` and `sin`, ``torch.func``, forward mode and ``torch.jit.trace``.

    Args:
        x: (..., D), float32, float64, bfloat16 or float16; any strides.
        cos: (..., P), cosines of the angles, float32 (float64 for float64); P, at most D / 2, is the number of pairs;
            leading dimensions are as in `x`, 1, or not there.
        sin: likewise the sines.
        interleaved: pairs are elements 0 and 1, 2 and 3, ...; else the first half of all their elements with the
            second. Default: ``False``.

    Returns:
        Shape and dtype of `x`, rounded once; the elements behind the pairs as they were. Its memory has the order of
        that of `x` where the last dimension of `x` is contiguous. Differentiable any number of times.

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed.
    """
    module = _compiled(x, cos, sin)
    if module is None or _wants_gradient(cos, sin):
        why = _why_plain(x, cos, sin)
        if why is not None:
            backends.note(f"rotary embedding: {why}")
            return _plainly(x, cos, sin, interleaved, False)
    return _turn(x, cos, sin, interleaved, False, module)


def _wants_gradient(cos: Tensor, sin: Tensor) -> bool:
    return torch.is_grad_enabled() and records(cos, sin)


def _why_plain(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """``None`` where the op takes the call, which is checked, else why not."""
    if transformed():
        return "torch.func, forward mode or tracing"  # where sizes are no numbers to check
    check(x, cos, sin)
    if x.device.type != "cpu":
        return f"no kernel for {x.device.type}"
    if x.dim() > MAX_DIMS:
        return f"{x.dim()} dimensions, more than {MAX_DIMS}"
    if _wants_gradient(cos, sin):
        return "gradients of cosines and sines"
    if any(map(is_traceable_wrapper_subclass, (x, cos, sin))):
        return "a subclass that wraps other tensors"
    return None
