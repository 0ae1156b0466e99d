"""The attention and the mask function of the integration of transformers, against attention written down."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import seqkernels
from seqkernels.testing import assert_within_budget
from seqkernels.testing.baselines import ATTENTIONS

pytest.importorskip("transformers")

from transformers import masking_utils

from seqkernels.integrations import transformers as integration

from .dense import dense, every_mask

Results = dict[str, Tensor]


@st.composite
def masks(draw: Any) -> dict[str, Any]:
    """Arguments that transformers calls mask functions with."""
    batch, queries, before = draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(0, 6))
    dropped, behind = draw(st.integers(0, before)), draw(st.integers(0, 4))
    window = draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["causal", "both", "window", "window to both", "chunks", "own"]))
    function = {
        "causal": masking_utils.causal_mask_function,
        "both": masking_utils.bidirectional_mask_function,
        "window": masking_utils.sliding_window_causal_mask_function(window),
        "window to both": masking_utils.sliding_window_bidirectional_mask_function(window),
        "chunks": masking_utils.chunked_causal_mask_function(window, torch.zeros(batch, dtype=torch.int64)),
        "own": masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: (q + k) % 3 != 1),
    }[kind]
    keys = queries + before - dropped + behind
    padding = draw(st.sampled_from([None, "left", "right", "any", "all"]))
    mask = None
    if padding is not None:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        mask = torch.rand(batch, queries + before, generator=generator) < 0.7
        lengths = torch.randint(1, queries + before + 1, (batch, 1), generator=generator)
        positions = torch.arange(queries + before)
        if padding != "any":
            mask = positions < lengths if padding == "right" else positions >= positions[-1] + 1 - lengths
            mask = mask | (padding == "all")
    return {
        "batch_size": batch,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": torch.tensor(before) if draw(st.booleans()) else before,
        "kv_offset": dropped,
        "mask_function": function,
        "attention_mask": mask,
        # As transformers asks for it: full masks are never left out as causal ones, nor what users add.
        "allow_is_causal_skip": kind in ("causal", "window", "chunks") and draw(st.booleans()),
        "allow_is_bidirectional_skip": "both" in kind and draw(st.booleans()),
        "local_size": window if kind in ("window", "window to both", "chunks") else None,
    }


def module(is_causal: bool = True, training: bool = False) -> nn.Module:
    found = nn.Module().train(training)
    found.is_causal = is_causal
    return found


def draw_inputs(batch: int, queries: int, keys: int, seed: int = 3) -> list[Tensor]:
    """q of four heads, k and v of two."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 4, queries, 16), (batch, 2, keys, 16), (batch, 2, keys, 19)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype.is_floating_point else x


def attend(
    function: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The output of an attention function, and all gradients together: a single one may be exact by luck."""
    copies = [x.to(dtype).requires_grad_() for x in inputs]
    options = {n: cast(x, dtype) for n, x in options.items()}
    learned = [x.requires_grad_() for x in options.values() if isinstance(x, Tensor) and x.dtype == dtype]
    out, weights = function(module(), *copies, cast(mask, dtype), **options)
    assert weights is None
    assert out.is_contiguous()
    assert out.dtype == dtype
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = torch.autograd.grad(out, [*copies, *learned], grad)
    return out.detach().flatten(), torch.cat([x.flatten() for x in found])


def as_attention(baseline: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """A baseline of attention's contract as an attention function of transformers."""

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        batch = max(len(q), len(k))
        bias = options.get("position_bias")
        if mask.dtype != torch.bool:
            mask, bias = None, mask if bias is None else mask + bias
        more = {"softcap": options.get("softcap") or 0.0, "sink": options.get("s_aux")}
        out = baseline(q.expand(batch, -1, -1, -1), k, v, mask, bias, scale=options.get("scaling"), **more)[0]
        return out.transpose(1, 2).contiguous(), None

    return attention


def assert_like_dense(
    sizes: tuple[int, int, int],
    mask: Tensor | None,
    full: Tensor,
    shared: dict[str, Any] | None = None,
    queries_of_one: bool = False,
    **options: Any,
) -> None:
    """`integration.attention` with `mask` and `options` is `dense` with `full`, both with `shared`, in both dtypes."""
    shared = shared or {}

    def run(function: Callable[..., Any], dtype: torch.dtype, mask: Tensor | None, **options: Any) -> list[Tensor]:
        draws = []
        for seed in range(12):
            inputs = draw_inputs(*sizes, seed)
            if queries_of_one:
                inputs[0] = inputs[0][:1]
            draws.append(attend(function, inputs, dtype, mask, {**shared, **options}))
        return [torch.cat(parts) for parts in zip(*draws, strict=True)]

    oracle = run(dense, torch.float64, full)
    own = [run(function, torch.float32, full) for function in (dense, *map(as_attention, ATTENTIONS))]
    for dtype in (torch.float32, torch.float64):
        actual = run(integration.attention, dtype, mask, **options)
        for name, value, exact, *others in zip(("out", "gradients"), actual, oracle, *own, strict=True):
            assert_within_budget(value, exact, others, name)


@given(masks())
def test_masks_are_those_of_sdpa(arguments: dict[str, Any]) -> None:
    found = integration.make_mask(**arguments)
    full = every_mask(**arguments)
    if found is None:
        assert full.all() or torch.equal(full, torch.ones_like(full).tril())
    elif isinstance(found, integration.Mask):
        assert found.shape == full.shape
        assert found.dtype == torch.bool
        assert torch.equal(found & True, full)
    else:
        assert torch.equal(found, full)


@pytest.mark.parametrize("compiled", [False, True], ids=["chosen", "rule"])
@given(arguments=masks())
def test_rules_say_what_masks_say(arguments: dict[str, Any], compiled: bool) -> None:
    sizes = tuple(arguments[n] for n in ("batch_size", "q_length", "kv_length"))
    mask, full = integration.make_mask(**arguments), every_mask(**arguments)
    with pytest.MonkeyPatch.context() as patch:
        if compiled:
            # As if the compiled implementations had everything.
            patch.setattr(integration, "_compiled", lambda call: True)
        # Without a mask, the module says what it is.
        assert_like_dense(sizes, mask, full, is_causal=not bool(full.all()))
    if compiled and isinstance(mask, integration.Mask):
        assert mask.dense is None, "somebody made the matrix"


def tokens() -> Tensor:
    """(3, 12) bool, padding before the tokens."""
    return torch.arange(12) >= torch.tensor([[4], [0], [2]])


RULES = {
    "causal, padded": (masking_utils.causal_mask_function, 0, "left"),
    "causal behind keys": (masking_utils.causal_mask_function, 5, None),
    "window": (masking_utils.sliding_window_causal_mask_function(4), 0, None),
    "window behind padded keys": (masking_utils.sliding_window_causal_mask_function(4), 5, "left"),
    "window to both sides": (masking_utils.sliding_window_bidirectional_mask_function(2), 0, "right"),
    "padded": (masking_utils.bidirectional_mask_function, 0, "right"),
}


@pytest.mark.parametrize("rule", RULES)
def test_no_matrix_for(rule: str) -> None:
    function, before, padding = RULES[rule]
    mask = None
    if padding is not None:
        mask = tokens()[:, : 7 + before] if padding == "left" else tokens()[:, : 7 + before].flip(1)
    found = integration.make_mask(3, 7, 7 + before, before, 0, function, mask)
    assert isinstance(found, integration.Mask)
    assert (found.rule.lengths is not None) == (padding == "right")
    assert found.dense is None
    repr(found)
    assert found.dense is None


def test_what_reads_a_mask_gets_the_matrix() -> None:
    padding = tokens()[:2, :6]
    mask = integration.make_mask(2, 4, 6, 2, 0, attention_mask=padding)
    full = every_mask(2, 4, 6, 2, 0, attention_mask=padding)
    assert isinstance(mask, integration.Mask)
    assert type(mask[:, :, -2:]) is Tensor
    assert torch.equal(mask[:, :, -2:], full[:, :, -2:])
    assert torch.equal(torch.where(mask, 1.0, 0.0), full.float())
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert type(other) is Tensor
        assert torch.equal(other, full)
    assert mask.tolist() == full.tolist() == mask.numpy().tolist()
    # What is written into it counts.
    mask.logical_not_()
    assert_like_dense((2, 4, 6), mask, ~full)


def test_masks_serve_the_implementation_insisted_on(other_backend: str) -> None:
    function = masking_utils.sliding_window_causal_mask_function(4)
    mask = integration.make_mask(2, 9, 12, 3, 0, function, tokens()[:2])
    with seqkernels.use_backend(other_backend):
        assert_like_dense((2, 9, 12), mask, every_mask(2, 9, 12, 3, 0, function, tokens()[:2]))


def test_a_changed_mask_function_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_bounds", lambda function: (3, 0))
    assert type(integration.make_mask(1, 9, 9, allow_is_causal_skip=False)) is Tensor


@given(
    queries=st.integers(1, 7),
    more=st.integers(0, 5),
    mask=st.sampled_from(["none", "bool", "float"]),
    bias=st.booleans(),
    sink=st.booleans(),
    softcap=st.sampled_from([None, 0.0, 1.5]),
    scaling=st.sampled_from([None, 0.3]),
    is_causal=st.booleans(),
)
def test_options(
    queries: int,
    more: int,
    mask: str,
    bias: bool,
    sink: bool,
    softcap: float | None,
    scaling: float | None,
    is_causal: bool,
) -> None:
    sizes = (8, queries, queries + more)
    generator = torch.Generator().manual_seed(5)
    shared: dict[str, Any] = {"softcap": softcap, "scaling": scaling}
    if bias:
        shared["position_bias"] = torch.randn(1, 4, *sizes[1:], generator=generator)
    if sink:
        shared["s_aux"] = torch.randn(4, generator=generator)
    given_mask = None
    if mask == "bool":
        full = given_mask = torch.rand(8, 1, *sizes[1:], generator=generator) < 0.7
    elif mask == "float":
        full = given_mask = torch.randn(8, 1, *sizes[1:], generator=generator)
    else:
        full = torch.ones(1, 1, *sizes[1:], dtype=torch.bool).tril(0 if is_causal and queries > 1 else queries + more)
    assert_like_dense(sizes, given_mask, full, shared, is_causal=is_causal)


@given(queries=st.integers(1, 9), more=st.integers(0, 5), window=st.integers(1, 9), causal=st.booleans())
def test_windows_without_a_mask(queries: int, more: int, window: int, causal: bool) -> None:
    # One query is the last one.
    last = more if queries == 1 else 0
    behind = torch.arange(queries + more) - torch.arange(queries)[:, None] - last
    full = (behind > -window) & (behind <= 0 if causal else behind < window)
    assert_like_dense((8, queries, queries + more), None, full[None, None], sliding_window=window, is_causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_documents_by_their_ends(causal: bool) -> None:
    ends = torch.tensor([0, 4, 5, 9])
    numbers = torch.tensor([0] * 4 + [1] + [2] * 4)
    full = numbers[:, None] == numbers
    full = full.tril() if causal else full
    lengths = {"max_length_q": 4, "max_length_k": 4}
    ends_of_both = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    assert_like_dense((1, 9, 9), None, full[None, None], is_causal=causal, **ends_of_both, **lengths)


def test_one_row_of_queries_for_all() -> None:
    full = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    assert_like_dense((3, 2, 5), None, full, queries_of_one=True, is_causal=False)


@pytest.mark.parametrize(("own", "given_"), [(True, None), (False, None), (True, False), (False, True)])
def test_the_module_says_whether_it_is_causal(own: bool, given_: bool | None) -> None:
    inputs = draw_inputs(2, 4, 4)
    causal = own if given_ is None else given_
    full = torch.ones(4, 4, dtype=torch.bool).tril(0 if causal else 4)[None, None]
    found = integration.attention(module(own), *inputs, None, is_causal=given_)[0]
    assert torch.equal(found, integration.attention(module(own), *inputs, None, is_causal=causal)[0])
    oracle = dense(module(), *(x.double() for x in inputs), full)[0]
    assert_within_budget(found, oracle, dense(module(), *inputs, full)[0])


REFUSED: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "cache": (ValueError, {"cache": object()}),
    "output_attentions": (ValueError, {"output_attentions": True}),
    "block_indices": (ValueError, {"block_indices": torch.zeros(1)}),
    "cu_seq_lens_q": (ValueError, {"cu_seq_lens_q": torch.tensor([0, 4])}),
    "attention_mask: expected a Tensor": (TypeError, {"attention_mask": object()}),
    "attention_mask: expected 4 dimensions": (ValueError, {"attention_mask": torch.ones(2, 4).bool()}),
    "attention_mask: expected torch.bool or": (TypeError, {"attention_mask": torch.ones(2, 1, 4, 4).long()}),
    "sliding_window": (ValueError, {"sliding_window": 0}),
    "sliding_window: expected at least 1 key": (ValueError, {"sliding_window": 2.5}),
    "mask: expected 4 dimensions, each 1 or as in": (ValueError, {"attention_mask": torch.ones(2, 1, 4, 5).bool()}),
    "softcap": (ValueError, {"softcap": -1.0}),
    "sink": (ValueError, {"s_aux": torch.zeros(3)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    error, options = REFUSED[name]
    inputs = draw_inputs(2, 4, 4)
    with pytest.raises(error, match=name):
        integration.attention(module(), *inputs, **{"attention_mask": None, **options})


def test_documents_beside_another_mask_are_refused() -> None:
    mask = integration.make_mask(1, 4, 4, allow_is_causal_skip=False)
    inputs = draw_inputs(1, 4, 4)
    ends = torch.tensor([0, 1, 4])
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected no attention_mask"):
        integration.attention(module(), *inputs, mask, cu_seq_lens_q=ends, cu_seq_lens_k=ends)


def test_dropout_is_for_training_and_reproducible() -> None:
    inputs = draw_inputs(2, 40, 40)

    def run(training: bool, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return integration.attention(module(training=training), *inputs, None, dropout=0.5)[0]

    plain = integration.attention(module(training=True), *inputs, None)[0]
    assert torch.equal(run(False, 0), plain)
    assert torch.equal(run(True, 0), run(True, 0))
    assert not torch.equal(run(True, 0), run(True, 1))
    mean = torch.stack([run(True, seed) for seed in range(200)]).mean(0)
    assert (mean - plain).square().mean().sqrt() < 0.2 * plain.square().mean().sqrt()
