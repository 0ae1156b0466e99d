"""What a call costs: one step of one row, layers, cells and attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import cases
from .measure import clock

CASES = [case for case in cases.CASES if "overhead" in case.tags]


@pytest.mark.benchmark(timer=clock.read)
def test_overhead(
    case: cases.Case, mode: cases.Mode, provider: str, replay: Callable[[cases.Case, cases.Mode, str], None]
) -> None:
    replay(case, mode, provider)
