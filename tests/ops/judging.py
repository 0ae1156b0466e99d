"""Judging results that were computed in another way than by a call of the contract, or with many options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkernels import testing
from seqkernels.cells import CONSTANTS, accumulate_dtype
from seqkernels.testing.baselines import ATTENTIONS, RECURRENCES

Inputs = testing.RecurrenceInputs | testing.AttentionInputs
Results = Mapping[str, Tensor]


class Expected(NamedTuple):
    """Results in float64, and those of torch's own computations, which are equally good."""

    exact: Results
    own: list[Results]


def _with_features_turned(shift: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """Torch's recurrence that sums the projection in another order: other rounding errors, also with a seed."""

    def run(input: Tensor, *args: Tensor | None, **options: Any) -> tuple[Tensor | None, ...]:
        if options.get("weight_ih") is not None:
            input, options["weight_ih"] = input.flip(2).roll(shift, 2), options["weight_ih"].flip(1).roll(shift, 1)
        return testing.torch_recurrence(input, *args, **options)

    return run


_RECURRENCES = (*RECURRENCES, _with_features_turned(0), _with_features_turned(2))


def expected(inputs: Inputs, grads: Results | None = None, **options: object) -> Expected:
    """What results are judged by.

    Args:
        inputs: of the contract; every floating point tensor gets a gradient.
        grads: gradients of outputs by name, those from which there are gradients.
        options: other keyword arguments of the contract.
    """
    dtype = inputs[0].dtype
    recurrent = isinstance(inputs, testing.RecurrenceInputs)
    oracle = testing.recurrence_oracle if recurrent else testing.attention_oracle
    baselines = _RECURRENCES if recurrent else ATTENTIONS

    def run(fn: Callable[..., Any], to: torch.dtype) -> Results:
        def leaf(name: str, x: object) -> object:
            if not isinstance(x, Tensor) or not x.is_floating_point() or name == "zoneout":
                return x
            return x.detach().to(to).requires_grad_(name not in CONSTANTS)

        given = type(inputs)(**{name: leaf(name, x) for name, x in inputs._asdict().items()})
        others = {name: leaf(name, x) for name, x in options.items()}
        cotangents = {n: x.detach().to(accumulate_dtype(to) if n == "lse" else to) for n, x in (grads or {}).items()}
        return testing.evaluate(fn, given, cotangents, **others)

    dtypes = {torch.float32 if dtype == torch.float64 else dtype, dtype}
    return Expected(run(oracle, torch.float64), [run(fn, to) for fn in baselines for to in dtypes])


def judge_draws(draws: Sequence[Results], by: Sequence[Expected]) -> None:
    """Assert that results of several draws, together, are within the error budget."""
    for name in draws[0]:
        found, exact = (torch.stack([results[name] for results in each]) for each in (draws, [e.exact for e in by]))
        own = [torch.stack([results[name] for results in each]) for each in zip(*(e.own for e in by), strict=True)]
        testing.assert_within_budget(found, exact, own, name)


def judge(found: Results, inputs: Inputs, grads: Results | None = None, **options: object) -> None:
    """Assert that results are within the error budget of what the contract makes of `inputs`.

    Args:
        found: results by the names that `testing.evaluate` gives them.
        inputs: of the contract.
        grads: gradients of outputs by name, those from which `found` has gradients.
        options: other keyword arguments of the contract.
    """
    dtype = inputs[0].dtype
    for name, x in found.items():
        assert x.dtype == (torch.promote_types(dtype, torch.float32) if name == "lse" else dtype), name
    judge_draws([found], [expected(inputs, grads, **options)])
