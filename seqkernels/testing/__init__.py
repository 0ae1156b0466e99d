"""Tools to test an implementation of the contracts: inputs, torch's own results, error budgets, forced choices.

The rule of correctness: against a float64 reference, the error of a result is at most twice that of torch's own
implementation in the same dtype, plus one rounding of the result, in the maximum and in the root mean square. For
float64, where nothing more exact is at hand, torch's error is its error in float32 scaled by the ratio of the machine
epsilons, and counts three times, since the reference has it too; all inputs drawn here are exact in float32, so both
see the same numbers.

Shape letters are those of `seqkernels.ops.recurrence` and `seqkernels.ops.attention`.
"""

from __future__ import annotations

from .baselines import attention_oracle, recurrence_oracle, torch_attention, torch_recurrence, torch_tiled_attention
from .budget import assert_within_budget, check_attention, check_recurrence, evaluate, random_grads
from .inputs import (
    ATTENTION_OPTIONS,
    LAYOUTS,
    OPTIONS,
    AttentionInputs,
    RecurrenceInputs,
    attention_inputs,
    attention_options,
    cast,
    lay_out,
    recurrence_inputs,
    recurrence_options,
    recurrence_weights,
)
from .switches import force_isa, poisoned_empty, threads

__all__ = [
    "ATTENTION_OPTIONS",
    "LAYOUTS",
    "OPTIONS",
    "AttentionInputs",
    "RecurrenceInputs",
    "assert_within_budget",
    "attention_inputs",
    "attention_options",
    "attention_oracle",
    "cast",
    "check_attention",
    "check_recurrence",
    "evaluate",
    "force_isa",
    "lay_out",
    "poisoned_empty",
    "random_grads",
    "recurrence_inputs",
    "recurrence_options",
    "recurrence_oracle",
    "recurrence_weights",
    "threads",
    "torch_attention",
    "torch_recurrence",
    "torch_tiled_attention",
]
