"""Who can run a call, in which order, and why not.

An implementation is a package beside this file. It says whether it can be used at all
(``unavailable() -> str | None``), whether it serves a call (``unsupported(call) -> str | None``) and has one
module per operation (``recurrence``, ``attention``, and ``rotary`` where it has a kernel for it) with the functions
of the contract. It is imported when it is first asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch

#: Implementations in order of preference, per operation and device type.
PREFERENCE: dict[tuple[str, str], tuple[str, ...]] = {
    ("recurrence", "cpu"): ("native", "numba", "reference"),
    ("attention", "cpu"): ("native", "numba", "reference"),
    ("rotary", "cpu"): ("native", "reference"),
    ("recurrence", "cuda"): ("cuda", "triton", "reference"),
    ("attention", "cuda"): ("triton", "reference"),
}
#: On devices without a row in `PREFERENCE`.
FALLBACK = ("reference",)
NAMES = ("native", "numba", "cuda", "triton", "reference")


class Call(NamedTuple):
    """What the choice of an implementation may depend on: metadata of a call, never its values.

    Attributes:
        op: ``"recurrence"``, ``"attention"`` or ``"rotary"``.
        device: the device type, ``"cpu"`` for example.
        dtype: dtype of the main input.
        kind: the cell of a recurrence; else empty.
        features: what the call uses beyond the plain contract, sorted; of attention those of
            `seqkernels.scores.Scores.features`, and ``"weights"`` where they are asked for; of the recurrence
            ``"checkpoint"`` (recomputation in the backward pass), ``"control"``, ``"gates"`` (in the backward pass,
            where the gates have a gradient), ``"norm"``, ``"peephole"``, ``"recurrent_mask"``, ``"reset_state"``,
            ``"zoneout"``.
        hidden: H of a recurrence, on devices whose kernels hold its weights; else 0.
        batch: B of a recurrence that `explain` looks at; else 0.
        together: how many recurrences like that one op is given.
    """

    op: str
    device: str
    dtype: torch.dtype
    kind: str = ""
    features: tuple[str, ...] = ()
    hidden: int = 0
    batch: int = 0
    together: int = 1


class Decision(NamedTuple):
    """One call and what was decided: the chosen implementation, and for each one looked at ``None`` or why not."""

    call: Call
    chosen: str
    reasons: dict[str, str | None]


class BackendError(RuntimeError):
    """An implementation that was asked for by name cannot run the call."""


_forced: ContextVar[str | None] = ContextVar("seqkernels_backend", default=None)
_recorder: ContextVar[list[Decision | str] | None] = ContextVar("seqkernels_recorder", default=None)
_decisions: dict[tuple[str | None, Call], Decision] = {}
_choices: dict[tuple[str | None, Call], str] = {}
_modules: dict[tuple[str, str], ModuleType] = {}
_warned: set[Call] = set()


def backend(name: str) -> ModuleType:
    """The package of an implementation, imported on first use.

    Raises:
        ValueError: no implementation has that name.
    """
    if name not in NAMES:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(map(repr, NAMES))}")
    return importlib.import_module(f"{__name__}.{name}")


def why_not(name: str, call: Call) -> str | None:
    """``None`` where implementation `name` can run `call`, else the reason why not."""
    package = backend(name)
    reason: str | None = package.unavailable()
    return reason if reason is not None else package.unsupported(call)


def why_not_by_itself(name: str, call: Call) -> str | None:
    """`why_not`; and of one that can run `call`, why it does so only when asked for by name, where that is so."""
    found = why_not(name, call)
    asked = getattr(backend(name), "not_by_default", None)
    return asked(call) if found is None and asked is not None else found


def order(call: Call) -> tuple[str, ...]:
    """Implementations for `call`, preferred first."""
    return PREFERENCE.get((call.op, call.device), FALLBACK)


def _decide(forced: str | None, call: Call) -> Decision:
    if forced is not None:
        reason = why_not(forced, call)
        if reason is not None:
            raise BackendError(f"backend {forced!r} cannot run {describe(call)}: {reason}")
        return Decision(call, forced, {forced: None})
    reasons: dict[str, str | None] = {}
    for name in order(call):
        reasons[name] = why_not_by_itself(name, call)
        if reasons[name] is None:
            return Decision(call, name, reasons)
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendError(f"no backend can run {describe(call)}: {listed}")


def describe(call: Call) -> str:
    """A call in words, for messages: ``lstm recurrence of torch.float32 on cpu with control``."""
    words = f"{call.kind} {call.op}".strip() + f" of {call.dtype} on {call.device}"
    words = f"{call.together} x {words}" if call.together > 1 else words
    return words + (f" with {', '.join(call.features)}" if call.features else "")


def select(call: Call) -> Decision:
    """Choose the implementation for `call`: the one insisted on by `use_backend`, else the first that can run it.

    Raises:
        BackendError: the implementation insisted on cannot run the call, or none can.
    """
    forced = _forced.get()
    decision = _decisions.get((forced, call))
    if decision is None:
        decision = _decisions[forced, call] = _decide(forced, call)
    recorder = _recorder.get()
    # Weights of attention fill (M, N) elements whoever computes them; a rotation is a few passes over its input.
    slow = decision.chosen == "reference" and "weights" not in call.features and call.op != "rotary"
    if recorder is not None:
        recorder.append(decision)
    elif slow and forced is None and call not in _warned:
        _warned.add(call)
        others = "; ".join(f"{name}: {why}" for name, why in decision.reasons.items() if why)
        warnings.warn(
            f"seqkernels runs {describe(call)} on the slow reference implementation"
            f" ({others or 'no compiled implementation for this device'})",
            stacklevel=2,
        )
    return decision


def choice(call: Call) -> str | None:
    """Name of the implementation that `select` would choose, ``None`` for none; neither warned of nor recorded."""
    forced = _forced.get()
    known = _choices.get((forced, call))
    if known is not None:
        return known
    if forced is not None:
        found = forced if why_not(forced, call) is None else None
    else:
        found = next((name for name in order(call) if why_not_by_itself(name, call) is None), None)
    if found is not None:
        _choices[forced, call] = found
    return found


def unobserved() -> bool:
    """Whether neither `use_backend` nor `explain` is at work, so that an earlier decision may be taken again."""
    return _forced.get() is None and _recorder.get() is None


def may_repeat(name: str) -> bool:
    """Whether a decision for `name` may be taken again unasked: no `explain`, no `use_backend` of another one."""
    return _recorder.get() is None and _forced.get() in (None, name)


def insisted() -> str | None:
    """The implementation that `use_backend` insists on here."""
    return _forced.get()


@contextlib.contextmanager
def insisting(name: str | None) -> Iterator[None]:
    """Insist on one implementation where `name` is one."""
    if name is None:
        yield
        return
    with use_backend(name):
        yield


def explained() -> bool:
    """Whether `explain` is at work, which wants to see each operation once."""
    return _recorder.get() is not None


def implementation(call: Call) -> ModuleType:
    """The module that implements ``call.op`` in the implementation chosen for `call`."""
    return module(select(call).chosen, call.op)


def module(name: str, stem: str) -> ModuleType:
    """A module of an implementation, imported on first use."""
    found = _modules.get((name, stem))
    if found is None:
        found = _modules[name, stem] = importlib.import_module(f"{__name__}.{name}.{stem}")
    return found


def has_together(name: str) -> bool:
    """Whether an implementation runs several recurrences at the same time: it has a module ``together``."""
    return bool(getattr(backend(name), "TOGETHER", False))


def note(text: str) -> None:
    """Let `explain` know of work that no kernel of the contracts does, and why; nothing while tracing a graph."""
    recorder = None if torch.compiler.is_compiling() else _recorder.get()
    if recorder is not None:
        recorder.append(text)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Insist on one implementation for every call made inside the block, and for its backward pass.

    The backward pass may be run outside of the block, in another one, or, as on a GPU, in a thread that knows nothing
    of it: it uses what its forward pass was made with.

    Args:
        name: ``"native"``, ``"numba"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: no implementation has that name.
        BackendError: from the call itself, where `name` cannot run it; it says why.

    Example:
        >>> with seqkernels.use_backend("numba"):
        ...     output, h_n = layer(x)
    """
    backend(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


class Explanation(NamedTuple):
    """What `explain` found: one entry per call of an operation, or a sentence about work outside the contracts."""

    entries: tuple[Decision | str, ...]

    def __str__(self) -> str:
        if not self.entries:
            return "no operation of seqkernels was called"
        lines = []
        for entry in self.entries:
            if isinstance(entry, str):
                lines.append(f"not fused: {entry}")
                continue
            lines.append(f"{describe(entry.call)} -> {entry.chosen}")
            for name in order(entry.call):
                if name == entry.chosen:
                    how = getattr(backend(name), "detail", None)
                    lines.append(f"  {name}: chosen" + (f", {how(entry.call)}" if how is not None else ""))
                    continue
                reason = why_not_by_itself(name, entry.call)
                lines.append(f"  {name}: {reason or 'could run it, comes later in the order'}")
        return "\n".join(lines)


@contextlib.contextmanager
def recording() -> Iterator[list[Decision | str]]:
    """Yields a list to which the calls of this thread inside the block are added, as `explain` has them."""
    entries: list[Decision | str] = []
    token = _recorder.set(entries)
    try:
        yield entries
    finally:
        _recorder.reset(token)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Call ``fn(*args, **kwargs)`` without gradients and say which implementation ran each operation, and why.

    Args:
        fn: a layer or a function.

    Returns:
        An `Explanation`; print it.

    Example:
        >>> print(seqkernels.explain(seqkernels.nn.LSTM(8, 16), torch.randn(5, 2, 8)))
        lstm recurrence of torch.float32 on cpu -> native
          native: chosen
          numba: could run it, comes later in the order
          reference: could run it, comes later in the order
    """
    with recording() as entries, torch.no_grad():
        fn(*args, **kwargs)
    return Explanation(tuple(entries))
