"""Registration of the implementation and of what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from seqkernels.testing import threads


@pytest.fixture(autouse=True, scope="session")
def registered() -> Iterator[None]:
    """``"seqkernels"``, registered twice, and ``"dense"``; transformers keeps quiet."""
    transformers = pytest.importorskip("transformers")
    from seqkernels.integrations.transformers import register

    from .dense import dense, every_mask

    register()
    register()
    transformers.AttentionInterface.register("dense", dense)
    transformers.AttentionMaskInterface.register("dense", every_mask)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with threads(1):
        yield
    transformers.logging.set_verbosity(verbosity)
