"""A quick test of every implementation that can run here, by the rule of correctness, as ``info --check`` has it.

Small cases of each operation, forward and backward, against the reference in float64. It says whether this
installation computes what it should on this machine; `tests/` says whether the code is right.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.reference.rotary import rotate as plain_rotation
from ..cells import accumulate_dtype
from ..ops import attention as attention_op
from ..ops import recurrence as recurrence_op
from ..ops.rotary import rotate
from .baselines import ATTENTIONS, RECURRENCES, attention_oracle, recurrence_oracle
from .budget import Results, evaluate, evaluate_in, judge, random_grads
from .inputs import attention_inputs, draw, recurrence_inputs
from .switches import threads

#: Of each case.
DTYPES = (torch.float32, torch.bfloat16)
#: How many times torch's own error an error may be: one more than in tests of the code, since torch is exact by luck
#: in some element of a small case, and sums of a GPU are in another order.
TIMES = 3

OK, WRONG, NOT_RUN = "ok", "wrong", "not run"


class Row(NamedTuple):
    """What came of one case with one implementation.

    Attributes:
        case: the operation, or ``"everything"`` of an implementation that cannot run at all.
        backend: the implementation.
        device: the device type; empty where it cannot run at all.
        dtype: ``"float32"`` for example; likewise.
        state: ``"ok"``, ``"wrong"`` or ``"not run"``.
        detail: which result has the largest error for its budget; what is wrong; or why it was not run.
        share: that error as a share of the budget; ``None`` unless the case was run to its end.
        seconds: of processor time that it took, with what was compiled on the way.
    """

    case: str
    backend: str
    device: str
    dtype: str
    state: str
    detail: str
    share: float | None
    seconds: float


class _Case(NamedTuple):
    """Tensors and what to do with them; `kind` as in `seqkernels.backends.Call`."""

    name: str
    op: str
    kind: str
    inputs: Callable[[torch.dtype], Any]
    options: dict[str, Any]


def _rotary_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, angles = draw((2, 3, 20, 32), generator, dtype), 9 * draw((20, 16), generator, torch.float32)
    return x.requires_grad_(), angles.cos().to(accumulate_dtype(dtype)), angles.sin().to(accumulate_dtype(dtype))


def _cases() -> tuple[_Case, ...]:
    def attention(**options: Any) -> Callable[[torch.dtype], Any]:
        return lambda dtype: attention_inputs(2, 2, 20, 24, 16, dtype, **options)

    def recurrence(cell: str) -> Callable[[torch.dtype], Any]:
        return lambda dtype: recurrence_inputs(cell, 6, 5, 12, dtype)

    cells = {"rnn": "rnn_tanh", "lstm": "lstm", "gru": "gru"}
    return (
        *(_Case(name, "recurrence", cell, recurrence(cell), {"cell": cell}) for name, cell in cells.items()),
        _Case("attention, causal", "attention", "", attention(), {"is_causal": True}),
        _Case("attention, masked", "attention", "", attention(mask="BHMN"), {}),
        _Case("rotary", "rotary", "", _rotary_inputs, {}),
    )


_CASES = _cases()


class _Judges(NamedTuple):
    """Inputs of a case, gradients of its outputs, what the oracle makes of them, and what torch does."""

    inputs: Any
    grads: Mapping[str, Tensor]
    expected: Results
    own: Sequence[Results]


@functools.cache
def _judges(number: int, dtype: torch.dtype) -> _Judges:
    """Of a case of `_CASES`; the same for every implementation."""
    case = _CASES[number]
    inputs = case.inputs(dtype)
    with threads(1):
        if case.op == "rotary":
            grads = random_grads({"out": inputs[0]})
            exact = _turn(plain_rotation, [x.detach().double() for x in inputs], grads)
            return _Judges(inputs, grads, exact, [_turn(plain_rotation, inputs, grads)])
        recurrent = case.op == "recurrence"
        oracle, baselines = (recurrence_oracle, RECURRENCES) if recurrent else (attention_oracle, ATTENTIONS)
        with torch.no_grad():
            grads = random_grads(evaluate(oracle, inputs, {}, **case.options))
        expected = evaluate_in(oracle, torch.float64, [inputs], grads, case.options)
        own = [evaluate_in(baseline, dtype, [inputs], grads, case.options) for baseline in baselines]
    return _Judges(inputs, grads, expected, own)


def _turn(fn: Callable[..., Tensor], inputs: Sequence[Tensor], grads: Mapping[str, Tensor]) -> Results:
    x = inputs[0].detach().requires_grad_()
    out = fn(x, *inputs[1:], False)
    (grad,) = torch.autograd.grad(out, x, grads["out"].to(out))
    return {"out": out.detach(), "grad_x": grad}


def _moved(x: Tensor | None, device: str) -> Tensor | None:
    return x if x is None else x.detach().to(device).requires_grad_(x.requires_grad)


def _results(case: _Case, judges: _Judges, device: str) -> Results:
    """Of the implementation in use, on the CPU again."""
    grads = {name: x.to(device) for name, x in judges.grads.items()}
    moved = [_moved(x, device) for x in judges.inputs]
    if case.op == "rotary":
        found = _turn(rotate, [x for x in moved if x is not None], grads)
    else:
        fn = recurrence_op.recurrence if case.op == "recurrence" else attention_op.attention
        found = evaluate(fn, type(judges.inputs)._make(moved), grads, **case.options)
    return {name: x.cpu() for name, x in found.items()}


def _compare(found: Results, judges: _Judges) -> tuple[str, str, float]:
    """State, detail and share of a `Row`."""
    missing = judges.expected.keys() - found.keys()
    if missing:
        return WRONG, f"no {', '.join(sorted(missing))}", torch.inf
    judged = {
        name: judge(found[name], wanted, [own[name] for own in judges.own], name, TIMES)
        for name, wanted in judges.expected.items()
    }
    problems = [judgement.problem for judgement in judged.values() if judgement.problem is not None]
    worst = max(judged, key=lambda name: judged[name].share)
    return (WRONG, "; ".join(problems), judged[worst].share) if problems else (OK, worst, judged[worst].share)


def _row(case: _Case, name: str, device: str, dtype: torch.dtype, judges: _Judges) -> Row:
    start = time.process_time()
    what = (case.name, name, device, str(dtype).removeprefix("torch."))
    reason = backends.why_not(name, backends.Call(case.op, device, dtype, case.kind))
    if reason is not None:
        return Row(*what, NOT_RUN, reason, None, 0.0)
    share: float | None = None
    try:
        with backends.use_backend(name):
            found = _results(case, judges, device)
        state, detail, share = _compare(found, judges)
    except backends.BackendError as error:
        state, detail = NOT_RUN, str(error)
    except Exception as error:  # whatever a broken installation raises is what there is to report
        state, detail = WRONG, f"{type(error).__name__}: {error}"
    return Row(*what, state, detail, share, time.process_time() - start)


def _devices(name: str) -> list[str]:
    """Where an implementation that can run at all runs."""
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    calls = [backends.Call("recurrence", "", torch.float32, "lstm"), backends.Call("attention", "", torch.float32)]
    return [device for device in here if any(backends.why_not(name, c._replace(device=device)) is None for c in calls)]


def selftest(names: Sequence[str] = backends.NAMES, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Row]:
    """Run every case with every implementation, on every device that it runs on.

    Args:
        names: of implementations.
        dtypes: of the inputs.

    Yields:
        A `Row` for each implementation, device, dtype and case, when it is known; of an implementation that cannot
        run at all one row.
    """
    for name in names:
        reason = backends.backend(name).unavailable()
        devices = [] if reason is not None else _devices(name)
        if not devices:
            yield Row("everything", name, "", "", NOT_RUN, reason or "there is no device for it", None, 0.0)
        for device in devices:
            for number, case in enumerate(_CASES):
                for dtype in dtypes:
                    yield _row(case, name, device, dtype, _judges(number, dtype))
