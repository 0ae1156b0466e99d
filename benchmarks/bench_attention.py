"""Scaled dot-product attention, beside F.scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import cases
from .measure import clock

CASES = [case for case in cases.CASES if isinstance(case, cases.Attention) and "overhead" not in case.tags]


@pytest.mark.benchmark(timer=clock.read)
def test_attention(
    case: cases.Case, mode: cases.Mode, provider: str, replay: Callable[[cases.Case, cases.Mode, str], None]
) -> None:
    replay(case, mode, provider)
