"""The Python on ``docs/recurrent-layers.md`` runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recurrent-layers.md"


@pytest.mark.filterwarnings("ignore:seqkernels runs .* on the slow reference implementation:UserWarning")
def test_python_blocks_run() -> None:
    text = PAGE.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "example"}
    for block in blocks:
        # Empty lines in front make the line numbers of a traceback those of the page.
        exec(compile("\n" * text[: block.start(1)].count("\n") + block[1], str(PAGE), "exec"), namespace)
