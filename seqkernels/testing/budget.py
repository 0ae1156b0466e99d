"""The rule of correctness, and checks of the contracts by it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cells import accumulate_dtype
from ..ops import attention as attention_op
from ..ops import recurrence as recurrence_op
from .baselines import ATTENTIONS, RECURRENCES, attention_oracle, recurrence_oracle
from .inputs import AttentionInputs, RecurrenceInputs, cast, draw, lay_out
from .switches import threads

#: How many times torch's own error an error may be; `assert_within_budget` has one more for float64.
TIMES = 2

Results = dict[str, Tensor]
Contract = Callable[..., tuple[Tensor | None, ...]]


def assert_within_budget(
    actual: Tensor, oracle: Tensor, baseline: Tensor | Sequence[Tensor], name: str = "result"
) -> None:
    """Assert that `actual` is as close to `oracle` as the project's rule of correctness asks.

    The error, in the maximum and in the root mean square, is at most twice that of `baseline` plus one rounding of
    the result in the dtype of `actual`. NaN and infinities are where `oracle` has them and nowhere else. Elements
    where `baseline` is not finite do not count for its error.

    Args:
        actual: the result to judge.
        oracle: the result in float64.
        baseline: torch's own result in the dtype of `actual`, or results of which the least exact counts; for
            float64 results in float32, whose errors are scaled.
        name: for the message.

    Raises:
        AssertionError: with the errors, what was allowed, and where the largest one is.
    """
    problem = judge(actual, oracle, baseline, name).problem
    if problem is not None:
        raise AssertionError(problem)


class Judgement(NamedTuple):
    """How close a result is to the oracle.

    Attributes:
        share: the error as a share of what is allowed, the larger of those in the maximum and in the root mean
            square; infinite where there is none, at another shape or other numbers that are not finite.
        problem: ``None`` within the budget, else what is wrong.
    """

    share: float
    problem: str | None


def judge(
    actual: Tensor,
    oracle: Tensor,
    baseline: Tensor | Sequence[Tensor],
    name: str = "result",
    times: int | None = None,
) -> Judgement:
    """What `assert_within_budget` asserts, which has the other arguments.

    Args:
        actual, oracle, baseline, name: see there.
        times: how many times torch's own error the error may be; `TIMES` by default, one more for float64.
    """
    if actual.shape != oracle.shape:
        return Judgement(torch.inf, f"{name}: expected shape {tuple(oracle.shape)}, got {tuple(actual.shape)}")
    if actual.numel() == 0:
        return Judgement(0.0, None)
    eps = torch.finfo(actual.dtype).eps
    value, exact = actual.detach().double(), oracle.detach().double()
    finite = exact.isfinite()
    same = torch.where(finite, value.isfinite(), (value == exact) | (value.isnan() & exact.isnan()))
    if not bool(same.all()):
        where = tuple((~same).nonzero()[0].tolist())
        return Judgement(
            torch.inf,
            f"{name}: {int((~same).sum())} of {same.numel()} elements differ from the reference in being NaN or"
            f" infinite, the first at {where}: {value[where].item()} instead of {exact[where].item()}",
        )
    exact = torch.where(finite, exact, 0)
    error = torch.where(finite, value - exact, 0).abs()
    factor = (TIMES if times is None else times) + (actual.dtype == torch.float64)
    own = []
    for other in (baseline,) if isinstance(baseline, Tensor) else baseline:
        ratio = eps / torch.finfo(other.dtype).eps if actual.dtype == torch.float64 else 1.0
        difference = torch.where(finite, other.detach().double() - exact, 0).abs()
        own.append(torch.where(difference.isfinite(), difference, 0) * ratio)
    share = 0.0
    for what, reduce in (("max", lambda x: x.max().item()), ("rms", lambda x: x.square().mean().sqrt().item())):
        worst = max(map(reduce, own))
        allowed = factor * worst + eps * reduce(exact.abs())
        found = reduce(error)
        share = max(share, found / allowed if allowed else torch.inf if found else 0.0)
        if found > allowed:
            where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
            return Judgement(
                share,
                f"{name}: {what} error {found:.3g} is over the budget {allowed:.3g} in {actual.dtype} (torch's own"
                f" error {worst:.3g}, size of the result {reduce(exact.abs()):.3g}); the largest error is at {where}:"
                f" {value[where].item():.9g} instead of {exact[where].item():.9g}",
            )
    return Judgement(share, None)


def evaluate(
    fn: Contract,
    inputs: RecurrenceInputs | AttentionInputs,
    grads: Mapping[str, Tensor],
    **options: object,
) -> Results:
    """Outputs of a contract function, and the gradients of its inputs.

    Args:
        fn: `seqkernels.ops.recurrence.recurrence`, `seqkernels.ops.attention.attention`, or a function alike.
        inputs: its tensors; those that require a gradient get one.
        grads: gradients of outputs by name: ``hidden``, ``cells``, ``state_n``, ``gates``; ``out``, ``lse``. Outputs
            not named get none. Empty for no backward pass.
        options: keyword arguments of `fn`; tensors among them that require a gradient get one too.

    Returns:
        The outputs by name and the gradients as ``grad_`` and the name of the input.
    """
    names = ("hidden", "cells", "state_n", "gates") if isinstance(inputs, RecurrenceInputs) else ("out", "lse")
    found = fn(*inputs, **options)
    outputs = {n: x for n, x in zip(names[: len(found)], found, strict=True) if x is not None}
    results = {n: x.detach() for n, x in outputs.items()}
    given = inputs._asdict() | options
    wanted = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    named = [n for n in grads if n in outputs]
    taken = [n for n in named if outputs[n].requires_grad]
    if wanted and named:
        # Outputs that depend on nothing, as those of documents without rows, have gradients of zero.
        gradients: Sequence[Tensor] = [torch.zeros_like(x) for x in wanted.values()]
        if taken:
            gradients = torch.autograd.grad(
                [outputs[n] for n in taken], list(wanted.values()), [grads[n] for n in taken], materialize_grads=True
            )
        results |= {f"grad_{n}": x for n, x in zip(wanted, gradients, strict=True)}
    return results


def random_grads(outputs: Mapping[str, Tensor], layout: str = "contiguous", seed: int = 1) -> Results:
    """Random gradients of outputs (or of any tensors), by the same names.

    Args:
        outputs: tensors by name; only their shapes and dtypes are used.
        layout: see `lay_out`.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    return {n: lay_out(draw(tuple(x.shape), generator, x.dtype), layout) for n, x in outputs.items()}


def check_recurrence(
    *draws: RecurrenceInputs,
    cell: str,
    reverse: bool = False,
    grads: Mapping[str, Tensor] | None = None,
    **options: Tensor | bool,
) -> Results:
    """Assert that `seqkernels.ops.recurrence.recurrence` is within the error budget.

    Args:
        draws: inputs as `recurrence_inputs` draws them, all of the same shapes. Results of all are judged together:
            where one has few elements, torch is too often exact by luck.
        cell: as in the contract.
        reverse: as in the contract.
        grads: gradients of the outputs; random ones for every output by default.
        options: other keyword arguments of the contract, as `recurrence_options` draws them.

    Returns:
        What was computed, see `evaluate`; of several draws, stacked.

    Raises:
        AssertionError: an output or a gradient is beyond the budget.
    """
    every = {"cell": cell, "reverse": reverse, **options}
    return _check(recurrence_op.recurrence, recurrence_oracle, RECURRENCES, draws, grads, every)


def check_attention(
    *draws: AttentionInputs,
    scale: float | None = None,
    is_causal: bool = False,
    grads: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Results:
    """Assert that `seqkernels.ops.attention.attention` is within the error budget.

    Args:
        draws: inputs as `attention_inputs` draws them, all of the same shapes, judged together.
        scale: as in the contract.
        is_causal: as in the contract.
        grads: gradients of the outputs; random ones for every output by default.
        options: other keyword arguments of the contract, as `attention_options` draws them.

    Returns:
        What was computed, see `evaluate`; of several draws, stacked.

    Raises:
        AssertionError: an output or a gradient is beyond the budget.
    """
    every = {"scale": scale, "is_causal": is_causal, **options}
    return _check(attention_op.attention, attention_oracle, ATTENTIONS, draws, grads, every)


def _check(
    fn: Contract,
    oracle: Contract,
    baselines: Sequence[Contract],
    draws: Sequence[RecurrenceInputs | AttentionInputs],
    grads: Mapping[str, Tensor] | None,
    options: Mapping[str, object],
) -> Results:
    dtype = draws[0][0].dtype
    if grads is None:
        with torch.no_grad():
            grads = random_grads(evaluate(oracle, draws[0], {}, **options))
    actual = _stack([evaluate(fn, inputs, grads, **options) for inputs in draws])
    tensors = {n: x for n, x in options.items() if isinstance(x, Tensor)}
    rest = [fn, {n: x for n, x in options.items() if n not in tensors}, list(tensors), list(grads)]
    key = _digest([x for inputs in draws for x in inputs] + [*tensors.values(), *grads.values()], rest)
    if key not in _known:
        if len(_known) == _KNOWN_AT_MOST:
            _known.clear()
        dtypes = (torch.float32, torch.float64) if dtype == torch.float64 else (dtype,)
        with threads(1):
            own = [evaluate_in(baseline, to, draws, grads, options) for baseline in baselines for to in dtypes]
            _known[key] = evaluate_in(oracle, torch.float64, draws, grads, options), own
    expected, own = _known[key]
    given = draws[0]._asdict() | dict(options)
    for name, value in actual.items():
        if name == "lse":
            wanted = accumulate_dtype(dtype)
        else:
            wanted = given[name.removeprefix("grad_")].dtype if name.startswith("grad_") else dtype
        assert value.dtype == wanted, f"{name}: expected {wanted}, got {value.dtype}"
        assert_within_budget(value, expected[name], [results[name] for results in own], name)
    missing = (expected.keys() & own[0].keys()) - actual.keys() - {"cells"}
    assert not missing, f"no {', '.join(sorted(missing))}"
    return actual


#: Options in float32 whatever the dtype of the call.
_FIXED = ("zoneout", "alibi_slopes")

# What the reference and torch make of the inputs seen last: the same inputs go to every implementation.
_known: dict[str, tuple[Results, list[Results]]] = {}
_KNOWN_AT_MOST = 512


def _digest(tensors: Sequence[Tensor | None], rest: object) -> str:
    digest = hashlib.blake2b(repr(rest).encode())
    for x in tensors:
        digest.update(repr(None if x is None else (x.dtype, x.shape, x.requires_grad)).encode())
        if x is not None:
            # NumPy has no bfloat16; a seed does not fit into a double.
            values = x.detach().double() if x.is_floating_point() else x
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def evaluate_in(
    fn: Contract,
    dtype: torch.dtype,
    draws: Sequence[RecurrenceInputs | AttentionInputs],
    grads: Mapping[str, Tensor],
    options: Mapping[str, object],
) -> Results:
    """`evaluate` on copies in `dtype`, or the one it is accumulated in where that is the dtype of a tensor."""
    acc, given = accumulate_dtype(dtype), draws[0][0].dtype
    cotangents = {n: x.detach().to(acc if n == "lse" else dtype) for n, x in grads.items()}

    def copy(x: Any) -> Any:
        return cast(x, dtype if x.dtype == given else acc) if isinstance(x, Tensor) else x

    copies = (type(inputs)._make(map(copy, inputs)) for inputs in draws)
    others = {n: x if n in _FIXED else copy(x) for n, x in options.items()}
    return _stack([evaluate(fn, inputs, cotangents, **others) for inputs in copies])


def _stack(draws: list[Results]) -> Results:
    return draws[0] if len(draws) == 1 else {n: torch.stack([results[n] for results in draws]) for n in draws[0]}
