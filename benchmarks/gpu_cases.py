"""The cases of ``make gpu-bench`` in the order in which they are timed: of each kind those that matter most first.

Groups of other cases are timed where they are asked for, ``python -m benchmarks.gpu --only persistent``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from .cases import Attention, Case, Option, Recurrence

HALF = torch.bfloat16

#: Tokens of a batch in the sweep over lengths, and columns of all heads: the sweep of FlashAttention-3's paper.
TOKENS, COLUMNS = 16384, 2048

CELLS = frozenset({"cells"})

#: Of the recurrences of `PERSISTENT`.
STEPS = 512


def _sweep() -> list[Case]:
    cases: list[Case] = []
    for length in (16384, 4096, 1024):
        for size in (128, 64):
            for causal in (False, True):
                batch, heads = TOKENS // length, COLUMNS // size
                cases.append(Attention(batch, heads, length, length, size, causal=causal, dtype=HALF))
    return cases


def _others() -> list[Case]:
    options: tuple[Option, ...] = ("window", "alibi", "softcap", "bias")
    return [
        Attention(16, 16, 512, 512, 64, dtype=HALF),
        Attention(16, 16, 512, 512, 64, causal=True, dtype=HALF),
        Attention(16, 32, 1, 8192, 128, kv_heads=8, dtype=HALF, inference=True),
        Attention(1, 32, 1, 8192, 128, kv_heads=8, dtype=HALF, inference=True),
        *(Attention(4, 16, 4096, 4096, 64, causal=True, dtype=HALF, option=option) for option in options),
        Attention(4, 16, 2048, 2048, 128, causal=True, dtype=torch.float16),
        Attention(4, 16, 1024, 1024, 64, causal=True),
        Attention(4, 32, 4096, 4096, 128, kv_heads=8, causal=True, dtype=HALF),
    ]


def _recurrences() -> list[Case]:
    cases: list[Case] = []
    for dtype in (HALF, torch.float32):
        for cell in ("lstm", "gru"):
            for batch, hidden in ((8, 128), (16, 256), (32, 512), (128, 512), (16, 1024)):
                tags = CELLS if hidden in (256, 512) and batch <= 32 else frozenset()
                cases.append(Recurrence(cell, 512, batch, hidden, hidden, dtype=dtype, tags=tags))
    cases.append(Recurrence("lstm", 512, 32, 512, 512, dtype=HALF, layers=2, bidirectional=True))
    cases.append(Recurrence("gru", 512, 32, 512, 512, dtype=HALF, layers=2))
    cases.append(Recurrence("lstm", 512, 16, 512, 512, dtype=torch.float16))
    cases.append(Recurrence("rnn_tanh", 512, 16, 512, 512, dtype=HALF, tags=CELLS))
    return cases


def _persistent() -> list[Case]:
    """Recurrences around what decides about those in one launch: where they should win, and where cuDNN has its own."""

    def cases(cell: str, dtype: torch.dtype, sizes: Iterable[tuple[int, int]], **form: Any) -> list[Case]:
        return [Recurrence(cell, STEPS, batch, hidden, hidden, dtype=dtype, **form) for hidden, batch in sizes]

    return _in_turns(
        cases("lstm", HALF, itertools.product((512, 256, 1024, 128, 640), (8, 32, 1, 64, 16))),
        cases("gru", HALF, itertools.product((512, 256, 1024), (8, 32, 64))),
        cases("gru", torch.float16, itertools.product((512, 256, 1024), (8, 32))),
        # In cuDNN's persistent regime: H % 128 == 0, B % 8 == 0.
        cases("lstm", torch.float16, itertools.product((512, 256, 1024, 128), (8, 32))),
        [
            case
            for cell in ("lstm", "gru")
            for form in ({"layers": 2}, {"bidirectional": True}, {"layers": 2, "bidirectional": True})
            for case in cases(cell, HALF, [(512, 16)], **form)
        ],
        # More than 128 units, and many rows: they leave a block's registers, and a small cluster has to do.
        cases("lstm", HALF, [(192, 64), (160, 40), (192, 128)]) + cases("gru", HALF, [(192, 64), (160, 40)]),
        cases("lstm", torch.float32, [(256, 16), (512, 16), (128, 32)]) + cases("gru", torch.float32, [(256, 16)]),
        cases("lstm", HALF, [(64, 32), (32, 1), (72, 8)]) + cases("gru", HALF, [(64, 32), (72, 8)]),
        # A product a step: many rows, or weights that fit nowhere.
        cases("lstm", HALF, [(1024, 256), (2048, 128), (1024, 1024)]) + cases("gru", HALF, [(1024, 512), (3072, 64)]),
    )


def _in_turns(*kinds: list[Case]) -> list[Case]:
    """One of each, then the next of each: where time runs out, some of all are done."""
    longest = max(map(len, kinds))
    return [kind[index] for index in range(longest) for kind in kinds if index < len(kind)]


CASES: tuple[Case, ...] = tuple(_in_turns(_sweep(), _others(), _recurrences()))

PERSISTENT: tuple[Case, ...] = tuple(_persistent())

#: The same at sizes that a processor can do, to check the code of the benchmark.
DRY_CASES: tuple[Case, ...] = (
    Attention(2, 4, 40, 40, 16, causal=True),
    Attention(2, 4, 1, 48, 16, kv_heads=2, inference=True),
    Attention(1, 2, 300, 300, 16, causal=True, option="window"),
    Attention(1, 2, 30, 30, 16, causal=True, option="alibi"),
    Attention(1, 2, 30, 30, 16, causal=True, option="softcap"),
    Attention(1, 2, 30, 30, 16, causal=True, option="bias"),
    Attention(2, 4, 40, 40, 16, kv_heads=2, causal=True),
    Recurrence("lstm", 7, 3, 8, 8, tags=CELLS),
    Recurrence("gru", 7, 3, 8, 8, layers=2, bidirectional=True, tags=CELLS),
    Recurrence("rnn_tanh", 7, 3, 8, 8, tags=CELLS),
    Recurrence("rnn_relu", 7, 3, 8, 8, tags=CELLS),
)

#: By name: the cases on a GPU, and those of a check on a processor.
GROUPS: dict[str, tuple[tuple[Case, ...], tuple[Case, ...]]] = {
    "default": (CASES, DRY_CASES),
    "persistent": (PERSISTENT, tuple(case for case in DRY_CASES if isinstance(case, Recurrence))),
}
