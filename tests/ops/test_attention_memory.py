"""Memory of attention grows with the number of queries and keys, never with their product: peaks of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from seqkernels.backends import native

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux alone"),
]

_PROGRAM = """
import resource, sys
import torch
from seqkernels.functional import attention

torch.set_num_threads(2)
case, longest = sys.argv[1], int(sys.argv[2])

def run(length):
    q, k, v = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
    options = {
        "full": {},
        "causal": {"is_causal": True},
        "all": {
            "is_causal": True, "window": (length // 2, 0), "alibi_slopes": torch.rand(2), "softcap": 5.0,
            "sink": torch.randn(2, requires_grad=True), "dropout_p": 0.1, "training": True,
            "bias": torch.randn(1, 2, 1, length, requires_grad=True), "keep": torch.rand(length) < 0.9,
        },
        "sums": {"column_sums": True, "return_lse": True},
    }[case]
    found = attention(q, k, v, **options)
    outs = found if isinstance(found, tuple) else (found,)
    sum(x.square().sum() for x in outs).backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

run(256)
before = peak()
run(longest)
print(peak() - before)
"""


def _growth(case: str, length: int) -> int:
    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM, case, str(length)], check=True, capture_output=True, text=True
    )
    return int(found.stdout)


@pytest.mark.parametrize("case", ["full", "causal", "all", "sums"])
def test_peak_does_not_grow_with_the_scores(case: str) -> None:
    length = 8192
    # A quarter of the scores of one head.
    assert _growth(case, length) < length * length * 4 / 4
