"""Judging results that were computed in another way than by a call of the contract."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seqkernels import testing
from seqkernels.cells import accumulate_dtype
from seqkernels.testing.baselines import ATTENTIONS, RECURRENCES

Inputs = testing.RecurrenceInputs | testing.AttentionInputs


def judge(
    found: Mapping[str, Tensor], inputs: Inputs, grads: Mapping[str, Tensor] | None = None, **options: object
) -> None:
    """Assert that results are within the error budget of what the contract makes of `inputs`.

    Args:
        found: results by the names that `testing.evaluate` gives them.
        inputs: of the contract; tensors with a gradient in `found` are given one.
        grads: gradients of outputs by name, those from which `found` has gradients.
        options: other keyword arguments of the contract.
    """
    dtype = inputs[0].dtype
    recurrent = isinstance(inputs, testing.RecurrenceInputs)
    oracle = testing.recurrence_oracle if recurrent else testing.attention_oracle

    def run(fn: object, to: torch.dtype) -> dict[str, Tensor]:
        def leaf(name: str, x: object) -> object:
            if not isinstance(x, Tensor) or not x.is_floating_point() or name == "zoneout":
                return x
            return x.detach().to(to).requires_grad_(f"grad_{name}" in found)

        given = type(inputs)(**{name: leaf(name, x) for name, x in inputs._asdict().items()})
        others = {name: leaf(name, x) for name, x in options.items()}
        cotangents = {n: x.detach().to(accumulate_dtype(to) if n == "lse" else to) for n, x in (grads or {}).items()}
        return testing.evaluate(fn, given, cotangents, **others)

    exact = run(oracle, torch.float64)
    baselines = RECURRENCES if recurrent else ATTENTIONS
    own = [run(fn, to) for fn in baselines for to in {torch.float32 if dtype == torch.float64 else dtype, dtype}]
    for name, x in found.items():
        assert x.dtype == (torch.promote_types(dtype, torch.float32) if name == "lse" else dtype), name
        testing.assert_within_budget(x, exact[name], [results[name] for results in own], name)
