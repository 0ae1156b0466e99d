"""Compile what a model takes before it matters: a call for each kind of input, and what ran in it."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from .backends import Explanation, describe, recording


class Warmed(NamedTuple):
    """One call of `warmup`.

    Attributes:
        case: the input, in words.
        explanation: which implementation ran each operation, those of the backward pass included.
        seconds: the call took, with all that was compiled.
    """

    case: str
    explanation: Explanation
    seconds: float


@dataclass(frozen=True)
class Warmup:
    """What `warmup` did.

    Attributes:
        calls: one for each case, in the order given.
    """

    calls: tuple[Warmed, ...]

    def __str__(self) -> str:
        lines = []
        for case, explanation, seconds in self.calls:
            lines.append(f"{case}: {seconds:.2f} s")
            found = Counter(map(_line, explanation.entries))
            lines += [f"  {line}" + (f" ({count} times)" if count > 1 else "") for line, count in found.items()]
            if not found:
                lines.append("  no operation of seqkernels was called")
        return "\n".join(lines)


def _line(entry: Any) -> str:
    if isinstance(entry, str):
        return f"not fused: {entry}"
    others = "; ".join(f"{name}: {why}" for name, why in entry.reasons.items() if why)
    return f"{describe(entry.call)} -> {entry.chosen}" + (f" ({others})" if others else "")


def _is_shape(case: object) -> bool:
    return isinstance(case, tuple | list) and all(isinstance(n, int) and not isinstance(n, bool) for n in case)


def _words(case: object) -> str:
    """A case with the shape of each tensor in its place."""
    if isinstance(case, Tensor):
        return f"{tuple(case.shape)} {case.dtype}".replace("torch.", "")
    if _is_shape(case):
        return str(tuple(case))  # type: ignore[arg-type]
    if isinstance(case, Mapping):
        return ", ".join(f"{name}={_words(x)}" for name, x in case.items())
    if isinstance(case, tuple | list):
        return f"({', '.join(map(_words, case))})"
    return repr(case)


def _tensors(x: object) -> Iterator[Tensor]:
    """The tensors in tuples, lists and mappings."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from _tensors(value)
    elif isinstance(x, tuple | list):
        for value in x:
            yield from _tensors(value)


class _Inputs(NamedTuple):
    """How tensors are made for shapes."""

    dtype: torch.dtype | None
    device: torch.device | None
    requires_grad: bool

    def tensor(self, shape: Sequence[int]) -> Tensor:
        for name, value in (("dtype", self.dtype), ("device", self.device)):
            if value is None:
                raise ValueError(f"{name}: expected one for shape {tuple(shape)}, since the model has no parameters")
        if self.dtype is not None and self.dtype.is_floating_point:
            return torch.randn(*shape, dtype=self.dtype, device=self.device, requires_grad=self.requires_grad)
        # A valid index into every table.
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def filled(self, x: Any) -> Any:
        """`x` with tensors in place of shapes, and tensors apart from any graph."""
        if isinstance(x, Tensor):
            return x.detach().requires_grad_(x.requires_grad)
        if _is_shape(x):
            return self.tensor(x)
        if isinstance(x, Mapping):
            return {name: self.filled(value) for name, value in x.items()}
        if hasattr(x, "_fields"):
            return type(x)(*map(self.filled, x))
        return type(x)(map(self.filled, x)) if isinstance(x, tuple | list) else x

    def arguments(self, case: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled = self.filled(case)
        if isinstance(filled, Mapping):
            return (), dict(filled)
        # A named tuple, a PackedSequence for example, is one argument.
        return ((filled,) if isinstance(filled, Tensor) or hasattr(filled, "_fields") else tuple(filled)), {}


@contextlib.contextmanager
def _untouched(model: object, devices: set[torch.device]) -> Iterator[None]:
    """Afterwards the buffers of `model`, modes and generators are what they were."""
    modules = list(model.modules()) if isinstance(model, Module) else []
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
    ]
    cuda = sorted({torch.cuda.current_device() if d.index is None else d.index for d in devices if d.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer
            # One that was not written to may be one that cannot be.
            if buffer is not None and before is not None and not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)


def _leaves(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a backward pass from `outputs` would give a gradient."""
    found: dict[Any, Tensor] = {}
    seen: set[Any] = set()
    pending = [torch.autograd.graph.get_gradient_edge(x).node for x in outputs]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[node] = node.variable
        pending += [following for following, _ in node.next_functions if following is not None]
    return list(found.values())


def _backward(result: object, case: str) -> None:
    outputs = [x for x in _tensors(result) if x.requires_grad]
    if not outputs:
        raise ValueError(f"backward: expected a result with a gradient, got none for {case}")
    # In this thread, which is recorded. Gradients that are returned meet neither .grad nor hooks of an optimizer.
    with torch.autograd.set_multithreading_enabled(False):
        torch.autograd.grad(outputs, _leaves(outputs), [torch.ones_like(x) for x in outputs], allow_unused=True)


def _each(cases: Sequence[Any], progress: bool) -> Iterator[Any]:
    # Not a dependency: where it is not installed, there is no bar.
    if not progress or importlib.util.find_spec("tqdm") is None:
        yield from cases
        return
    from tqdm import tqdm

    yield from tqdm(cases, desc="warmup", unit="case", disable=None)


def warmup(
    model: Callable[..., Any],
    shapes: Sequence[Any],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    backward: bool = False,
    progress: bool = True,
) -> Warmup:
    """Call a model once for each kind of input, so that every kernel it takes is compiled before it matters.

    On a GPU kernels are compiled when they are first called, which takes seconds: do it before a service answers, or
    before a CUDA graph is captured. Lengths, batch sizes and numbers of heads are in no key of a kernel, so one case
    for each dtype, head size or hidden size, and set of options is enough; only attention of few queries, as in
    decoding, has kernels of its own, and one more where its keys are many and rows few; of masks and biases there are
    kernels for numbers of keys that are multiples of 16, and for others, and of windows for such bounds and for others.

    The model is as it was afterwards: modes, parameters and their ``.grad``, buffers such as running statistics, and
    torch's generators on the processor and on the devices of the model and its inputs. It runs in the mode it is in.

    Args:
        model: a module or any function.
        shapes: a sequence of cases. A case is a shape, for a call with one tensor; a tensor; a tuple or list of the
            positional arguments, or a dict of those by name. In arguments, shapes stand for tensors, also inside
            tuples, lists and dicts; everything else is handed on as it is. Floating point numbers are random, others
            0.
        dtype: of tensors made for shapes; that of the model's first floating point parameter by default.
        device: of tensors made for shapes; that of the same parameter by default.
        backward: whether to run the backward pass too, from all results that have a gradient; where a loss reads
            some of them only, hand in a function that returns the loss. Checkpoints within the model need
            ``use_reentrant=False``. Otherwise calls are made without
            gradients, whose kernels differ. Default: ``False``.
        progress: show a bar where the output is a terminal and tqdm is installed. Default: ``True``.

    Returns:
        A `Warmup`; print it, and see that calls ran on ``triton`` and not on ``reference``.

    Raises:
        RuntimeError: inside the capture of a CUDA graph.
        ValueError: `shapes` has no case; there is no `dtype` or `device`, and no parameter to take it from; `backward`
            where no result has a gradient.
        TypeError: `shapes` is not a sequence of cases.

    Example:
        >>> print(seqkernels.warmup(seqkernels.nn.LSTM(8, 16), [(5, 2, 8)]))
        (5, 2, 8): 0.00 s
          lstm recurrence of torch.float32 on cpu -> native
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup: a CUDA graph is being captured; kernels have to be compiled before")
    if not isinstance(shapes, tuple | list) or (shapes and _is_shape(shapes)):
        raise TypeError(f"shapes: expected a sequence of cases, such as [(5, 2, 8)], got {shapes!r}")
    if not shapes:
        raise ValueError("shapes: expected at least one case, got none")
    for index, case in enumerate(shapes):
        if not isinstance(case, Tensor | Mapping | tuple | list):
            raise TypeError(
                f"shapes[{index}]: expected a shape, a Tensor, or a tuple, list or dict of arguments, got {case!r}"
            )
    parameters = list(model.parameters()) if isinstance(model, Module) else []
    first = next((x for x in parameters if x.is_floating_point()), None)
    if first is not None:
        dtype, device = dtype or first.dtype, first.device if device is None else device
    where = None if device is None else torch.device(device)
    inputs = _Inputs(dtype, where, backward and not any(x.requires_grad for x in parameters))
    devices = {x.device for x in (*parameters, *_tensors(shapes))} | ({where} if where is not None else set())
    calls = []
    with _untouched(model, devices), torch.set_grad_enabled(backward):
        for case in _each(shapes, progress):
            args, kwargs = inputs.arguments(case)
            begin = time.perf_counter()
            with recording() as entries:
                result = model(*args, **kwargs)
                if backward:
                    _backward(result, _words(case))
            for at in devices:
                if at.type == "cuda":
                    torch.cuda.synchronize(at)
            calls.append(Warmed(_words(case), Explanation(tuple(entries)), time.perf_counter() - begin))
    return Warmup(tuple(calls))
