"""Wrong arguments of flash-attn's functions get an error that names them, and the cache stays as it is."""

from __future__ import annotations

import pytest
import torch

from seqkernels.functional import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

INT = torch.int32
DOCUMENTS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]


def cu_seqlens(lengths, first=0):
    return torch.tensor([first, *(first + sum(lengths[: i + 1]) for i in range(len(lengths)))], dtype=INT)


Q, K = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8)
FUNC = [
    ({"q": [1]}, TypeError, "q: expected a Tensor, got list"),
    ({"q": Q[0]}, ValueError, r"q: expected \(batch_size, seqlen, nheads, headdim\), got shape \(3, 4, 8\)"),
    ({"q": Q.long()}, TypeError, r"q: expected one of .*, got torch\.int64"),
    ({"k": None}, TypeError, "k: expected a Tensor, got NoneType"),
    ({"k": K.half()}, TypeError, r"k: expected torch\.float32 as q, got torch\.float16"),
    ({"k": K.to("meta")}, ValueError, r"k: expected on cpu as q, got meta"),
    ({"k": K[:1], "v": K[:1]}, ValueError, r"k: expected batch_size 2 as q, got shape \(1, 5, 2, 8\)"),
    ({"k": K[..., :7]}, ValueError, r"k: expected headdim 8 as q and .*, got shape \(2, 5, 2, 7\)"),
    ({"k": K.expand(2, 5, 2, 8).repeat(1, 1, 2, 1)[:, :, :3]}, ValueError, r"k: .* divides its 4, got shape"),
    ({"v": K[:, 1:]}, ValueError, r"v: expected \(2, 5, 2\) as k, and headdim, got \(2, 4, 2, 8\)"),
    ({"v": K[..., :0]}, ValueError, "v: expected headdim from 1 to 512, got 0"),
    ({"window_size": (-2, 0)}, ValueError, r"window_size: expected at least 0, or -1 for no bound, got \(-2, 0\)"),
    ({"window_size": 3}, TypeError, r"window_size: expected \(left, right\), got 3"),
    ({"window_size": (1.5, 0)}, TypeError, "window_size: expected an integer, got float"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p: expected a probability from 0 to 1, got 1.5"),
    ({"dropout_p": -0.5}, ValueError, "dropout_p: expected a probability from 0 to 1, got -0.5"),
    ({"softcap": float("inf")}, ValueError, "softcap: expected a positive number, or 0 for none, got inf"),
    ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes: expected shape \(4,\) or \(2, 4\), got \(3,\)"),
    ({"alibi_slopes": torch.zeros(4).double()}, TypeError, r"alibi_slopes: expected torch\.float32, got"),
]


@pytest.mark.parametrize(
    ("wrong", "error", "message"), FUNC, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_errors(wrong, error, message):
    with pytest.raises(error, match=message):
        flash_attn_func(**({"q": Q, "k": K, "v": K} | wrong))


VARLEN = [
    ({"cu_seqlens_q": [0, 6]}, TypeError, "cu_seqlens_q: expected a Tensor, got list"),
    ({"cu_seqlens_q": torch.tensor([0, 6])}, TypeError, r"cu_seqlens_q: expected torch\.int32, got torch\.int64"),
    ({"cu_seqlens_q": torch.zeros(0, dtype=INT)}, ValueError, r"cu_seqlens_q: expected \(batch_size \+ 1,\), got"),
    (
        {"cu_seqlens_k": cu_seqlens((5,))},
        ValueError,
        r"cu_seqlens_k: expected \(3,\) as cu_seqlens_q, got shape \(2,\)",
    ),
    ({"cu_seqlens_q": cu_seqlens((3, 4))}, ValueError, "cu_seqlens_q: .* to at most 6, the rows of q, got"),
    ({"cu_seqlens_q": cu_seqlens((3, -1))}, ValueError, "cu_seqlens_q: expected to ascend"),
    ({"cu_seqlens_k": cu_seqlens((3, 4), -1)}, ValueError, "cu_seqlens_k: expected to ascend from 0 or more"),
    ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q: expected at least 3, the longest of cu_seqlens_q, got 2"),
    ({"max_seqlen_k": 4}, ValueError, "max_seqlen_k: expected at least 5, the longest of cu_seqlens_k, got 4"),
    ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: expected at least 0, got -1"),
    ({"max_seqlen_q": 3.0}, TypeError, "max_seqlen_q: expected an integer, got float"),
    ({"block_table": torch.zeros(2, 1, dtype=INT)}, ValueError, r"k: expected \(num_blocks, page_block_size, "),
]


@pytest.mark.parametrize(
    ("wrong", "error", "message"), VARLEN, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_errors_of_documents(wrong, error, message):
    right = {"q": Q.flatten(0, 1), "k": K.flatten(0, 1), "v": K.flatten(0, 1)}
    right |= dict(zip(DOCUMENTS, (cu_seqlens((3, 3)), cu_seqlens((5, 5)), 3, 5), strict=True))
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**(right | wrong))


PAGES = [
    ({"block_table": torch.zeros(2, 1, dtype=INT)}, ValueError, "block_table: expected pages for 5 keys, got 1 of 3"),
    ({"block_table": torch.full((2, 2), 4, dtype=INT)}, ValueError, "block_table: expected pages from 0 to 3"),
    ({"block_table": torch.zeros(1, 2, dtype=INT)}, ValueError, r"block_table: expected \(2, max_num_blocks_per_seq\)"),
    ({"block_table": torch.zeros(2, 2)}, TypeError, r"block_table: expected torch\.int32, got torch\.float32"),
    ({"k": torch.zeros(4, 0, 2, 8), "v": torch.zeros(4, 0, 2, 8)}, ValueError, "k: expected pages of at least one key"),
]


@pytest.mark.parametrize(
    ("wrong", "error", "message"), PAGES, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_errors_of_pages(wrong, error, message):
    pages = torch.zeros(4, 3, 2, 8)
    right = {"q": Q.flatten(0, 1), "k": pages, "v": pages, "block_table": torch.zeros(2, 2, dtype=INT)}
    right |= dict(zip(DOCUMENTS, (cu_seqlens((3, 3)), cu_seqlens((5, 5)), 3, 5), strict=True))
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**(right | wrong))


@pytest.mark.parametrize(
    ("fn", "x", "message"),
    [
        (flash_attn_qkvpacked_func, Q, r"qkv: expected \(batch_size, seqlen, 3, nheads, headdim\), got shape"),
        (flash_attn_varlen_qkvpacked_func, Q, r"qkv: expected \(total, 3, nheads, headdim\), got shape \(2, 3, 4, 8\)"),
    ],
)
def test_errors_of_packed_tensors(fn, x, message):
    args = (cu_seqlens((2,)), 2) if fn is flash_attn_varlen_qkvpacked_func else ()
    x = x if not args else x[:, :2]
    with pytest.raises(ValueError, match=message.replace("2, 3, 4", "2, 2, 4")):
        fn(x, *args)
    with pytest.raises(TypeError, match="qkv: expected a Tensor, got NoneType"):
        fn(None, *args)


CACHE, NEW = torch.zeros(3, 9, 2, 8), torch.zeros(2, 2, 2, 8)
ANGLES = torch.zeros(9, 3)
ERRORS = [
    ({"q": Q[0]}, ValueError, r"q: expected \(batch_size, seqlen, nheads, headdim\), got shape \(3, 4, 8\)"),
    ({"k_cache": CACHE[:1], "v_cache": CACHE[:1]}, ValueError, r"k_cache: expected at least 2 rows, the batch_size"),
    ({"k_cache": CACHE[0]}, ValueError, r"k_cache: expected \(batch_size_cache, seqlen_cache, nheads_k, headdim\)"),
    ({"k_cache": CACHE.half()}, TypeError, r"k_cache: expected torch\.float32 as q, got torch\.float16"),
    ({"v_cache": CACHE[:, 1:]}, ValueError, r"v_cache: expected \(3, 9, 2\) as k_cache, and headdim"),
    ({"v": None}, ValueError, "k, v: expected both or neither"),
    ({"k": NEW[..., :7]}, ValueError, r"k: expected \(2, 2, 2, 8\) to match q, k and k_cache, got \(2, 2, 2, 7\)"),
    ({"v": NEW[:, 1:]}, ValueError, r"v: expected \(2, 2, 2, 8\) to match q, k and v_cache, got \(2, 1, 2, 8\)"),
    ({"k": NEW.double()}, TypeError, r"k: expected torch\.float32 as q, got torch\.float64"),
    ({"cache_seqlens": None}, ValueError, "cache_seqlens: expected an integer or a Tensor, as k and v are given"),
    ({"cache_seqlens": 8}, ValueError, "cache_seqlens: expected from 0 to 7, as the cache holds 9 keys .* got 8"),
    ({"cache_seqlens": -1}, ValueError, "cache_seqlens: expected from 0 to 7, .* got -1"),
    ({"cache_seqlens": 2.5}, TypeError, "cache_seqlens: expected an integer, got float"),
    ({"cache_seqlens": torch.tensor([1, 8], dtype=INT)}, ValueError, "cache_seqlens: expected from 0 to 7"),
    ({"cache_seqlens": torch.tensor([1, 2])}, TypeError, r"cache_seqlens: expected torch\.int32, got torch\.int64"),
    ({"cache_seqlens": torch.zeros(3, dtype=INT)}, ValueError, r"cache_seqlens: expected \(2,\), got shape \(3,\)"),
    ({"cache_batch_idx": torch.tensor([0, 3], dtype=INT)}, ValueError, "cache_batch_idx: expected rows of k_cache fro"),
    ({"cache_leftpad": torch.tensor([0, 5], dtype=INT)}, ValueError, "cache_leftpad: expected from 0 to cache_seqlens"),
    ({"block_table": torch.zeros(1, 2, dtype=INT)}, ValueError, r"block_table: expected \(2, max_num_blocks_per_seq\)"),
    ({"block_table": torch.full((2, 2), 3, dtype=INT)}, ValueError, "block_table: expected pages from 0 to 2 up to"),
    (
        {"block_table": torch.zeros(2, 2, dtype=INT), "cache_batch_idx": torch.zeros(2, dtype=INT)},
        ValueError,
        "cache_batch_idx: expected None with block_table",
    ),
    (
        {"block_table": torch.zeros(2, 2, dtype=INT), "k_cache": CACHE[:, :0], "v_cache": CACHE[:, :0]},
        ValueError,
        "k_cache: expected pages of at least one key",
    ),
    ({"rotary_cos": ANGLES}, ValueError, "rotary_cos, rotary_sin: expected both or neither"),
    ({"rotary_cos": ANGLES, "rotary_sin": 3}, TypeError, "rotary_sin: expected a Tensor, got int"),
    ({"rotary_cos": ANGLES.long(), "rotary_sin": ANGLES}, TypeError, "rotary_cos: expected a floating point dtype"),
    ({"rotary_cos": ANGLES, "rotary_sin": ANGLES[1:]}, ValueError, "rotary_sin: expected .*, the same of both"),
    (
        {"rotary_cos": ANGLES.repeat(1, 2), "rotary_sin": ANGLES.repeat(1, 2)},
        ValueError,
        r"rotary_cos: expected .* rotary_dim at most 8, got \(9, 6\)",
    ),
    (
        {"rotary_cos": ANGLES[:6], "rotary_sin": ANGLES[:6], "causal": True},
        ValueError,
        r"rotary_cos, rotary_sin: expected at least 7 positions, got shape \(6, 3\)",
    ),
    (
        {"rotary_cos": ANGLES, "rotary_sin": ANGLES, "k": None, "v": None},
        ValueError,
        "rotary_cos, rotary_sin: expected with k and v only, which are None",
    ),
    ({"window_size": (0, -2)}, ValueError, "window_size: expected at least 0, or -1"),
    ({"alibi_slopes": torch.zeros(2)}, ValueError, r"alibi_slopes: expected shape \(4,\) or \(2, 4\), got \(2,\)"),
    ({"softcap": float("nan")}, ValueError, "softcap: expected a positive number, or 0 for none, got nan"),
]


@pytest.mark.parametrize(
    ("wrong", "error", "message"), ERRORS, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_errors_leave_the_cache_as_it_is(wrong, error, message):
    right = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "k": NEW + 1, "v": NEW + 1, "cache_seqlens": 4}
    given = right | wrong
    before = [given[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(**given)
    assert all(torch.equal(given[name], x) for name, x in zip(("k_cache", "v_cache"), before, strict=True))
