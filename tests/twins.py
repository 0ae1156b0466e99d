"""Judging what seqkernels gives by what torch's modules and functions give for the same numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels.testing import assert_within_budget


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a result, in order: a tensor, packed data, or mappings and sequences of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    parts = value.values() if isinstance(value, Mapping) else value
    return [leaf for part in parts for leaf in leaves(part)]


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Detached, with every floating point tensor in `dtype`; what else there is stays."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value
    if isinstance(value, PackedSequence):
        return value._replace(data=cast(value.data, dtype))
    if isinstance(value, Mapping):
        return {name: cast(part, dtype) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cast(part, dtype) for part in value)
    return value


def applies(function: Callable[..., Any], *args: Any) -> Callable[[torch.dtype], Any]:
    """What `function` gives for the arguments in a dtype; a module among them, or as the function, is copied."""

    def turn(value: Any, dtype: torch.dtype) -> Any:
        return copy.deepcopy(value).to(dtype) if isinstance(value, torch.nn.Module) else cast(value, dtype)

    return lambda dtype: turn(function, dtype)(*(turn(arg, dtype) for arg in args))


def same(found: Any, expected: Any) -> bool:
    """Whether two results are equal, element by element."""
    return all(torch.equal(*pair) for pair in zip(leaves(found), leaves(expected), strict=True))


def judge(found: Any, theirs: Callable[[torch.dtype], Any], name: str = "result") -> None:
    """Assert that `found` has the shapes of torch's result and, as one vector, is within the budget.

    Args:
        found: tensors in one dtype, alone or in mappings and sequences.
        theirs: torch's result in a dtype, from numbers that are exact in float32. In float64 it is the oracle, in
            float32, with and without oneDNN, the baseline.
        name: for the message.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN", UserWarning)
        warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN", UserWarning)
        exact, own = theirs(torch.float64), [theirs(torch.float32)]
        with torch.backends.mkldnn.flags(enabled=False):
            own.append(theirs(torch.float32))
    assert [x.shape for x in leaves(found)] == [x.shape for x in leaves(exact)], name
    assert len({x.dtype for x in leaves(found)}) == 1, name
    vectors = [torch.cat([x.detach().flatten() for x in leaves(value)]) for value in (found, exact, *own)]
    assert_within_budget(vectors[0], vectors[1], vectors[2:], name)
