"""Tiles of keys and values by descriptors: the same bits as by pointers, and pointers where there can be none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqkernels import functional
from seqkernels.backends import use_backend
from seqkernels.backends.triton import attention, attention_kernels, tiles
from seqkernels.backends.triton.launches import Launch

KEYS = 70


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    # The processor's, in Triton's interpreter; a device's where there is one.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().to(device)


def _inputs(size: int, value_size: int | None = None, batch: int = 2) -> tuple[torch.Tensor, ...]:
    return (
        _draw(batch, 4, 40, size),
        _draw(batch, 2, KEYS, size, seed=1),
        _draw(batch, 2, KEYS, value_size or size, seed=2),
    )


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Of each forward pass whether keys, and values, came by descriptors. On any device, and for few keys."""
    given: list[tuple[bool, bool]] = []

    class Noting(Launch):
        def __call__(self, *args: Any) -> None:
            if self._kernel is attention_kernels.forward_kernel:
                given.append((args[3] is not None, args[4] is not None))
            super().__call__(*args)

    monkeypatch.setattr(attention, "Launch", Noting)
    monkeypatch.setattr(attention, "by_descriptors", lambda *_: True)
    tiles.forget()
    yield given
    tiles.forget()


def _compare(
    described: list[tuple[bool, bool]],
    monkeypatch: pytest.MonkeyPatch,
    inputs: tuple[torch.Tensor, ...],
    **options: Any,
) -> list[tuple[bool, bool]]:
    found = []
    with use_backend("triton"):
        for by_descriptors in (True, False):
            monkeypatch.setattr(attention, "by_descriptors", lambda *_, way=by_descriptors: way)
            tiles.forget()
            described.clear()
            found.append(functional.attention(*inputs, return_lse=True, **options))
            if by_descriptors:
                noted = list(described)
            else:
                assert described == [(False, False)]
    assert all(map(torch.equal, *found))
    return noted


LENGTHS = torch.tensor([33, 64])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window": (20, 3), "alignment": "bottom_right"},
        {"key_lengths": LENGTHS},
        {"softcap": 3.0, "sink": torch.randn(4)},
    ],
    ids=["plain", "causal", "window", "lengths", "softcap"],
)
@pytest.mark.parametrize(("size", "value_size"), [(16, None), (40, None), (32, 64)])
def test_same_bits(described, monkeypatch, size, value_size, options):
    inputs = _inputs(size, value_size)
    options = {name: x.to(inputs[0].device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    assert _compare(described, monkeypatch, inputs, **options) == [(True, True)]


def test_what_is_masked_has_no_influence(described, monkeypatch):
    """Descriptors bring rows behind a length too."""
    q, k, v = _inputs(16)
    for x in (k, v):
        x[0, :, 33:], x[1, :, 64:] = torch.nan, torch.inf
    options = {"key_lengths": LENGTHS.to(q.device)}
    assert _compare(described, monkeypatch, (q, k, v), **options) == [(True, True)]
    with use_backend("triton"):
        assert functional.attention(q, k, v, **options).isfinite().all()


def test_documents(described, monkeypatch):
    q, k, v = (x[0].transpose(0, 1) for x in _inputs(16, batch=1))
    starts = torch.tensor([0, 3, 3, 40]), torch.tensor([0, 40, 41, 70])
    options = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), (x.to(q.device) for x in starts), strict=True))
    options |= {"max_seqlen_q": 37, "max_seqlen_k": 40}
    assert _compare(described, monkeypatch, (q, k, v), **options, is_causal=True) == [(True, True)]


def test_no_rows(described, monkeypatch):
    """Fewer than the documents might have: there is nothing to describe."""
    q, k, v = (x[0].transpose(0, 1) for x in _inputs(16, batch=1))
    starts = torch.tensor([0, 5]), torch.tensor([0, 0])
    options = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), (x.to(q.device) for x in starts), strict=True))
    options |= {"max_seqlen_q": 5, "max_seqlen_k": 40}
    assert _compare(described, monkeypatch, (q[:5], k[:0], v[:0]), **options) == [(False, False)]


def test_layouts(described, monkeypatch):
    q, k, v = _inputs(16)
    apart = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert _compare(described, monkeypatch, (q, apart, v)) == [(True, True)]
    one = v[:1].as_strided((1, 2, KEYS, 16), (7, *v.stride()[1:]))
    assert _compare(described, monkeypatch, (q[:1], k[:1], one)) == [(True, True)]


def test_pointers_where_there_can_be_no_descriptor(described, monkeypatch):
    q, k, v = _inputs(16)
    flat = _draw(k.numel() + 1)
    shifted = flat[1:].view(k.shape)
    wide = _draw(2, 2, KEYS, 20)[..., :16]
    assert _compare(described, monkeypatch, (q, shifted, v)) == [(False, True)]
    assert _compare(described, monkeypatch, (q, k, wide)) == [(True, False)]
    assert _compare(described, monkeypatch, (q, k[:, :1].expand(-1, 2, -1, -1), v)) == [(False, True)]
    assert _compare(described, monkeypatch, (q, k, v.transpose(2, 3).contiguous().transpose(2, 3))) == [(True, False)]
