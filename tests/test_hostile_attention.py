"""Attention under arguments that nobody should give, and in surroundings that somebody will have.

What `tests/ops` and `tests/nn` test of every option in its ordinary range is not repeated here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

import seqkernels
from seqkernels import functional as F
from seqkernels import testing
from seqkernels.ops import attention as ops
from seqkernels.ops import weights as of_weights
from seqkernels.scores import Scores


def inputs(dtype: torch.dtype = torch.float64, queries: int = 5, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    drawn = testing.attention_inputs(2, 4, queries, 7, 8, dtype, kv_heads=2, value_size=6, **given)
    return drawn.q, drawn.k, drawn.v


def attention(*args: Any, **options: Any) -> Tensor:
    """The output alone."""
    found = F.attention(*args, **options)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("far", [2**40, sys.maxsize, 2**70])
@pytest.mark.parametrize("queries", [5, 9])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_a_window_of_any_width_keeps_every_key(far: int, queries: int, alignment: str) -> None:
    q, k, v = inputs(queries=queries)
    expected = attention(q, k, v)
    for window in (far, (far, None), (None, far)):
        assert torch.equal(attention(q, k, v, window=window, alignment=alignment), expected)


@pytest.mark.parametrize("name", ["left", "right"])
def test_bounds_that_overflow_are_refused(name: str) -> None:
    options: dict[str, Any] = {name: sys.maxsize}
    with pytest.raises(ValueError, match=f"^{name}: expected from 0 to"):
        ops.attention(*inputs(), **options)


@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
@pytest.mark.parametrize("most", [2**31, 2**61, 2**62, 2**70])
def test_documents_longer_than_there_can_be_are_refused(name: str, most: int) -> None:
    q = torch.randn(12, 2, 8)
    starts = torch.tensor([0, 5, 12])
    with pytest.raises(ValueError, match=f"^{name}: expected from 0 to 2147483647, got {most}"):
        attention(q, q, q, cu_seqlens=starts, **{name: most})
    options: dict[str, Any] = {"cu_seqlens_q": starts.int(), "cu_seqlens_k": starts.int()}
    options |= {"max_seqlen_q": 7, "max_seqlen_k": 7, name: most}
    with pytest.raises(ValueError, match=f"^{name}: "):
        ops.attention(*[q.transpose(0, 1).unsqueeze(0)] * 3, **options)


@pytest.mark.parametrize("softcap", [-1.0, 1e-40, 1e-300, 1e38, 1e300, math.inf, math.nan])
def test_softcap_without_an_inverse_is_refused(softcap: float) -> None:
    q, k, v = inputs(torch.float32)
    for call in (attention, ops.attention):
        with pytest.raises(ValueError, match=r"^softcap: "):
            call(q, k, v, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softcap_at_its_bounds(dtype: torch.dtype) -> None:
    """The smallest makes all scores alike, the largest leaves them as they are."""
    q, k, v = inputs(dtype)
    least = torch.finfo(dtype).tiny
    assert torch.equal(attention(q, k, v, softcap=least), attention(q, k, v, scale=0.0))
    # A power of two: nothing is rounded, and the scores divided by it are normal numbers yet.
    assert torch.equal(attention(q, k, v, softcap=least**-0.5), attention(q, k, v))


@pytest.mark.parametrize("name", ["keep", "drop"])
def test_masks_elsewhere_are_named_as_they_were_given(name: str) -> None:
    options: dict[str, Any] = {name: torch.ones(5, 7, dtype=torch.bool, device="meta")}
    with pytest.raises(ValueError, match=f"^{name}: expected on cpu as q, got meta"):
        attention(*inputs(), **options)


@pytest.mark.parametrize("name", ["bias", "sink", "alibi_slopes"])
def test_negated_options_of_weights_and_sums(name: str) -> None:
    q, k, _ = inputs(requires_grad=False)
    shape = {"bias": (1, 4, 5, 7), "sink": (4,), "alibi_slopes": (4,)}[name]
    value = torch.randn(shape, dtype=torch.float32 if name == "alibi_slopes" else q.dtype)
    given: list[dict[str, Any]] = [{name: value}, {name: torch._neg_view(-value)}]
    plain, negated = (Scores(0.5, **options) for options in given)
    out, lse = ops.attend(q, k, k, plain)
    for average in (False, True):
        expected = of_weights.weights(q, k, lse, plain, average)
        assert torch.equal(of_weights.weights(q, k, lse, negated, average), expected)
    assert torch.equal(of_weights.column_sums(q, k, lse, negated), of_weights.column_sums(q, k, lse, plain))
    assert torch.equal(ops.forward_op(q, k, k, *negated.pack())[0], out)
    grad = torch.randn(out.shape, dtype=out.dtype)
    needs = [True, True, True, name == "bias"]
    expected = ops.backward_op([grad, None], q, k, k, out, lse, *plain.pack(), needs)
    found = ops.backward_op([torch._neg_view(-grad), None], q, k, k, out, lse, *negated.pack(), needs)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias
    return scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -math.inf).softmax(-1) @ v


def by_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attention(q, k, v, is_causal=True, bias=bias)


def by_torchs_name(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=True, enable_gqa=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # of make_dual itself
@pytest.mark.parametrize("function", [by_attention, by_torchs_name])
@pytest.mark.parametrize("place", range(4))
def test_transforms(function: Callable[..., Tensor], place: int) -> None:
    """Values and derivatives of every kind, as those of plain operations."""
    given = (*inputs(requires_grad=False), torch.randn(5, 7, dtype=torch.float64))
    x = given[place]
    few = torch.stack([x, x.flip(-1)])

    def of_one(f: Callable[..., Tensor], x: Tensor) -> Tensor:
        return f(*given[:place], x, *given[place + 1 :])

    def loss(f: Callable[..., Tensor], x: Tensor) -> Tensor:
        return of_one(f, x).square().sum()

    def every(f: Callable[..., Tensor]) -> list[Tensor]:
        gradient = torch.func.grad(partial(loss, f))
        return [
            gradient(x),
            torch.func.jvp(partial(of_one, f), (x,), (x,))[1],
            torch.func.jvp(gradient, (x,), (x,))[1],
            torch.vmap(partial(of_one, f))(few),
            torch.vmap(gradient)(few),
            by_dual_numbers(partial(of_one, f), x),
        ]

    for found, expected in zip(every(function), every(dense), strict=True):
        torch.testing.assert_close(found, expected)


def by_dual_numbers(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x.clone().requires_grad_(), x))).tangent
        assert tangent is not None
        return tangent


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # of make_dual itself
def test_ops_do_not_lose_tangents() -> None:
    q, k, v = inputs(requires_grad=False)
    lse = q.new_zeros(q.shape[:3])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="without a tangent"):
            ops.forward_op(dual, k, v, *Scores(1.0).pack())
        with pytest.raises(NotImplementedError, match="without a tangent"):
            of_weights.weights(dual, k, lse, Scores(1.0))


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing() -> None:
    layer = seqkernels.nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    x, longer = torch.randn(2, 3, 8), torch.randn(3, 5, 8)
    traced = torch.jit.trace(lambda x: layer(x, x, x), (x,))
    for found, expected in zip(traced(longer), layer(longer, longer, longer), strict=True):
        torch.testing.assert_close(found, expected)
    lengths = torch.tensor([4, 2, 5])
    q = longer.unsqueeze(1)
    traced = torch.jit.trace(lambda q, n: F.attention(q, q, q, key_lengths=n), (q, lengths))
    torch.testing.assert_close(traced(q, lengths - 1), attention(q, q, q, key_lengths=lengths - 1))


def test_transforms_in_compiled_programs() -> None:
    q, k, v = inputs(requires_grad=False)

    def program(q: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.func.grad(lambda q: attention(q, k, v, is_causal=True).square().sum())
        return gradient(q), torch.vmap(lambda q: attention(q, k, v))(q.unsqueeze(0))

    torch._dynamo.reset()
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(q), program(q), strict=True):
        torch.testing.assert_close(found, expected)


def test_sizes_that_change_between_calls_of_a_compiled_program() -> None:
    """One program serves them after the second call."""

    def of_documents(q: Tensor, starts: Tensor) -> Tensor:
        return attention(q, q, q, cu_seqlens=starts, max_seqlen_q=12)

    def padded(q: Tensor, lengths: Tensor) -> Tensor:
        return attention(q, q, q, key_lengths=lengths)

    for program in (of_documents, padded):
        counter = CompileCounter()
        torch._dynamo.reset()
        compiled: Callable[..., Tensor] = torch.compile(program, backend=counter, fullgraph=True)
        for rows in (12, 13, 15, 17, 16):
            given = (torch.randn(rows, 2, 8), torch.tensor([0, rows - 11, rows]))
            if program is padded:
                given = (torch.randn(2, 2, rows, 8), torch.tensor([11, rows]))
            torch.testing.assert_close(compiled(*given), program(*given), rtol=0, atol=0)
        assert counter.frame_count == 2


def test_numbers_that_change_between_calls_of_a_compiled_program() -> None:
    def program(q: Tensor, starts: Tensor, longest: int, window: int) -> Tensor:
        return attention(q, q, q, cu_seqlens=starts, max_seqlen_q=longest, window=window)

    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(program, backend="aot_eager", fullgraph=True)
    for longest, window in ((7, 3), (9, 2), (12, sys.maxsize)):
        given = (torch.randn(13, 2, 8), torch.tensor([0, 13 - longest, 13]), longest, window)
        torch.testing.assert_close(compiled(*given), program(*given), rtol=0, atol=0)


def test_weights_of_layers_have_tangents() -> None:
    layer = seqkernels.nn.MultiheadAttention(8, 2, batch_first=True).double().requires_grad_(False)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    step = 1e-6
    found = torch.func.jvp(lambda x: layer(x, x, x)[1], (x,), (x,))[1]
    behind, before = (layer(y, y, y)[1] for y in (x * (1 + step), x * (1 - step)))
    torch.testing.assert_close(found, (behind - before) / (2 * step), rtol=1e-5, atol=1e-8)


def test_seeds_are_drawn_on_the_cpu() -> None:
    q, k, v = inputs()
    torch.manual_seed(3)
    expected = attention(q, k, v, dropout_p=0.5, training=True)
    torch.manual_seed(3)
    with torch.device("meta"):
        assert torch.equal(attention(q, k, v, dropout_p=0.5, training=True), expected)


def test_numbers_that_change_are_read_in_each_call() -> None:
    q, _, _ = inputs(torch.float32)
    scale: Any = torch.tensor(0.5)
    is_causal: Any = torch.tensor(True)
    for value in (0.5, 2.0):
        scale.fill_(value)
        expected = F.scaled_dot_product_attention(q, q, q, scale=value)
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, scale=scale), expected)
    for flag in (True, False):
        is_causal.fill_(flag)
        expected = F.scaled_dot_product_attention(q, q, q, is_causal=flag)
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=is_causal), expected)


@pytest.mark.parametrize("name", ["scale", "dropout_p"])
@pytest.mark.parametrize("wrong", ["1", [0.5], torch.tensor(0.5, requires_grad=True)], ids=str)
def test_what_is_no_number_is_refused(name: str, wrong: object) -> None:
    options: dict[str, Any] = {name: wrong}
    with pytest.raises(TypeError, match=f"^{name}: expected a number, got "):
        F.scaled_dot_product_attention(*inputs(), enable_gqa=True, **options)


def test_heads_of_no_size() -> None:
    q, k, v = torch.randn(2, 2, 3, 0), torch.randn(2, 2, 4, 0), torch.randn(2, 2, 4, 5)
    found = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found, v.mean(2, keepdim=True).expand(2, 2, 3, 5))
