"""The compiled module on its own: tensors without an exchange table, and arguments that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seqkernels.backends.native.extension import extension, load_error

pytestmark = pytest.mark.skipif(load_error() is not None, reason=str(load_error()))


def test_reads_numpy_arrays_through_dlpack() -> None:
    x = np.linspace(-3, 3, 37, dtype=np.float32)
    y, same = np.empty_like(x), torch.empty(37)
    extension().activation("tanh", x, y)
    extension().activation("tanh", torch.from_numpy(x), same)
    assert y.tolist() == same.tolist()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x: expected a tensor, got <class 'list'>"),
        (None, TypeError, "x: expected a tensor, got None"),
        (torch.zeros(2, 3), ValueError, r"x: expected shape \(any\), got \(2, 3\)"),
        (torch.zeros(8)[::2], ValueError, r"x: expected a contiguous tensor, got strided \(4\)"),
        (torch.zeros(4, dtype=torch.int64), TypeError, "x: expected float32, .*, got int64"),
        (torch.zeros(1, 1, 1, 1, 1), ValueError, "x: expected at most 4 dimensions, got 5"),
    ],
)
def test_names_what_does_not_fit(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        extension().activation("tanh", x, torch.empty(4))


def test_instruction_set_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of .*, got x86-64-v9"):
        extension().set_isa("x86-64-v9")
