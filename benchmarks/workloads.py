"""Turns a case into calls: the same inputs and parameters for torch and for each backend of seqkernels.

A call is the whole layer call a user makes, input projection included. In the mode ``forward_backward`` it also
takes the gradients of input and parameters for a fixed random gradient of the output. Masks, block masks and the
lengths of documents are made outside the call.
"""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from math import isfinite
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqkernels
from seqkernels.testing import torch_attention

from . import engines
from .cases import DROPOUT, ENGINES, SOFTCAP, WINDOW, Attention, Case, Mode, Recurrence

LAYERS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}


_Run = Callable[[], tuple[Tensor, ...]]
_Compared = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


class Workload(NamedTuple):
    """A call to be timed.

    Attributes:
        run: makes the call; returns outputs and, in the mode ``forward_backward``, gradients.
        context: returns the context in which `run` is called; entered outside the timed part.
        compared: what of the results is compared with the other providers', outside the timed part: they themselves,
            but for torch where it pads documents, or drops weights that nobody else drops.
    """

    run: _Run
    context: Callable[[], AbstractContextManager[object]]
    compared: _Compared = tuple


class Errors(NamedTuple):
    """Errors against the float64 result, the worst over all results of a call.

    Attributes:
        largest: largest error over the largest absolute value of the result; where a result vanishes beside the
            others (it is zero but for rounding), over the largest value of them all, here and below.
        to_torch: largest error over torch's own in the same dtype, which counts at least as one rounding of the
            largest value of the result.
        of_budget: largest error over what the tests allow: twice torch's own and one rounding.
    """

    largest: float
    to_torch: float
    of_budget: float


def build(case: Case, mode: Mode, provider: str, dtype: torch.dtype | None = None) -> Workload:
    """The call of `case` as `provider` makes it.

    Args:
        case: what to call.
        mode: with or without gradients.
        provider: ``"torch"``, a backend of seqkernels, or one of `ENGINES` where `providers` names it for the case.
        dtype: compute in another dtype than the case's, on the same values.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    training = mode == "forward_backward"
    dtype = dtype or case.dtype
    compared: _Compared = tuple
    if isinstance(case, Recurrence):
        run = _recurrence(case, training, provider, dtype, generator)
    elif case.option == "cache":
        run = _generation(case, provider, dtype, generator)
    elif case.option == "documents":
        run, compared = _documents(case, training, provider, dtype, generator)
    else:
        run, compared = _attention(case, training, provider, dtype, generator)

    def context() -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(torch.set_grad_enabled(training))
        if provider != "torch" and provider not in ENGINES:
            stack.enter_context(seqkernels.use_backend(provider))
        return stack

    return Workload(run, context, compared)


def errors(results: Sequence[Tensor], torch_results: Sequence[Tensor], exact: Sequence[Tensor]) -> Errors:
    """Judge `results`, beside torch's in the same dtype, by the results in float64.

    Raises:
        ValueError: results differ in number or shape, or are not finite where the exact ones are.
    """
    scales = [oracle.abs().max().item() for oracle in exact]
    found = []
    for index, (ours, theirs, oracle) in enumerate(zip(results, torch_results, exact, strict=True)):
        if ours.shape != oracle.shape:
            raise ValueError(f"result {index}: expected shape {tuple(oracle.shape)}, got {tuple(ours.shape)}")
        eps = torch.finfo(ours.dtype).eps
        scale = scales[index] if scales[index] > eps * max(scales) else max(scales)
        error = (ours.double() - oracle).abs().max().item()
        if not isfinite(error):
            raise ValueError(f"result {index}: not finite")
        own = (theirs.double() - oracle).abs().max().item()
        found.append((error / scale, error / max(own, eps * scale), error / (2 * own + eps * scale)))
    return Errors(*map(max, zip(*found, strict=True)))


def _randn(generator: torch.Generator, case: Case, dtype: torch.dtype, *shape: int) -> Tensor:
    """Standard normal values of the case's dtype, held in `dtype`."""
    return torch.randn(shape, generator=generator).to(case.dtype).to(dtype)


def _recurrence(
    case: Recurrence, training: bool, provider: str, dtype: torch.dtype, generator: torch.Generator
) -> Callable[[], tuple[Tensor, ...]]:
    layer = _layer(case, provider, generator).to(case.dtype).to(dtype)
    x_shape = (case.batch, case.inputs) if case.single else (case.steps, case.batch, case.inputs)
    x = _randn(generator, case, dtype, *x_shape).requires_grad_(training)
    if provider in ENGINES:
        return engines.build(provider, case, layer, x)
    inputs: tuple[object, ...] = (x,)
    wanted = [x, *layer.parameters()]
    if case.single:
        count = 2 if case.cell == "lstm" else 1
        state = [_randn(generator, case, dtype, case.batch, case.hidden).requires_grad_(training) for _ in range(count)]
        inputs = (x, tuple(state) if count == 2 else state[0])
        wanted += state
        grads = [_randn(generator, case, dtype, case.batch, case.hidden) for _ in range(count)]
    else:
        columns = case.hidden * (2 if case.bidirectional else 1)
        grads = [_randn(generator, case, dtype, case.steps, case.batch, columns)]

    def forward() -> tuple[Tensor, ...]:
        returned = layer(*inputs)
        if isinstance(returned, Tensor):
            return (returned,)
        first, last = returned
        return (first, last) if isinstance(last, Tensor) else (first, *last)

    return _differentiated(forward, wanted, grads) if training else forward


def _layer(case: Recurrence, provider: str, generator: torch.Generator) -> nn.Module:
    options: dict[str, object] = {"nonlinearity": case.cell[4:]} if case.cell.startswith("rnn") else {}
    if not case.single:
        options |= {"num_layers": case.layers, "bidirectional": case.bidirectional}
    module = nn if provider == "torch" or provider in ENGINES else seqkernels.nn
    layer: nn.Module = getattr(module, LAYERS[case.cell] + ("Cell" if case.single else ""))(
        case.inputs, case.hidden, **options
    )
    bound = case.hidden**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def _attention(
    case: Attention, training: bool, provider: str, dtype: torch.dtype, generator: torch.Generator
) -> tuple[_Run, _Compared]:
    q_shape = (case.batch, case.heads, case.queries, case.size)
    kv_shape = (case.batch, case.kv_heads or case.heads, case.keys, case.size)
    q, k, v = (_randn(generator, case, dtype, *s).requires_grad_(training) for s in (q_shape, kv_shape, kv_shape))
    wanted = [q, k, v]
    mask = None
    if case.option == "padding":
        mask = (torch.arange(case.keys) < torch.tensor(case.lengths)[:, None])[:, None, None, :]
    elif case.option in ("bias", "learned"):
        mask = _randn(generator, case, dtype, 1, case.heads, case.queries, case.keys)
        if case.option == "learned":
            wanted.append(mask.requires_grad_(training))
    grad = _randn(generator, case, dtype, *q_shape)
    exact = dtype != case.dtype
    compared: _Compared = tuple
    if case.option in ("", "padding", "bias", "learned"):
        options: dict[str, Any] = {"attn_mask": mask, "is_causal": case.causal, "enable_gqa": bool(case.kv_heads)}
        function = F if provider == "torch" else seqkernels.functional
        forward = functools.partial(function.scaled_dot_product_attention, q, k, v, **options)
    elif provider != "torch":
        forward = functools.partial(_ours(case), q, k, v)
    else:
        forward = functools.partial(_torch(case, training, exact, dtype), q, k, v)
        if case.option == "dropout" and not exact:
            # torch drops other weights: the formula with the same ones stands in for it.
            stand_in = _one_result(
                functools.partial(_torch(case, training, True, dtype), q, k, v), wanted, grad, training
            )

            def compared(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return stand_in()

    return _one_result(forward, wanted, grad, training), compared


def _one_result(forward: Callable[[], Tensor], wanted: Sequence[Tensor], grad: Tensor, training: bool) -> _Run:
    """A call with one result, and in training the gradients for `grad`."""

    def results() -> tuple[Tensor, ...]:
        return (forward(),)

    return _differentiated(results, wanted, [grad]) if training else results


def _differentiated(forward: _Run, wanted: Sequence[Tensor], grads: Sequence[Tensor]) -> _Run:
    """`forward`, and the gradients of its first results for `grads`."""

    def forward_backward() -> tuple[Tensor, ...]:
        results = forward()
        return (*results, *torch.autograd.grad(results[: len(grads)], wanted, grads))

    return forward_backward


def _seed(case: Attention) -> Tensor:
    return torch.tensor(zlib.crc32(case.name.encode()))


def _slopes(case: Attention) -> Tensor:
    """(Hq,), as of ALiBi's paper."""
    return 2.0 ** (torch.arange(1, case.heads + 1) * (-8 / case.heads))


def _ours(case: Attention) -> Callable[..., Any]:
    """The options that torch's function lacks, by their names."""
    options: dict[str, dict[str, Any]] = {
        "dropout": {"dropout_p": DROPOUT, "training": True, "seed": _seed(case)},
        "window": {"window": (WINDOW - 1, None)},
        "alibi": {"alibi_slopes": _slopes(case)},
        "softcap": {"softcap": SOFTCAP},
    }
    return functools.partial(seqkernels.functional.attention, is_causal=case.causal, **options[case.option])


def _torch(case: Attention, training: bool, exact: bool, dtype: torch.dtype) -> Callable[..., Any]:
    """The same by torch, as `Attention.baseline` says, or where `exact` by plain operations of any dtype."""
    if case.option == "dropout":
        if exact:
            seed = _seed(case)
            return lambda q, k, v: torch_attention(q, k, v, is_causal=case.causal, dropout_p=DROPOUT, seed=seed)[0]
        return functools.partial(F.scaled_dot_product_attention, dropout_p=DROPOUT, is_causal=case.causal)
    behind = torch.arange(case.queries)[:, None] - torch.arange(case.keys)
    drop = behind < 0
    if case.option == "alibi":
        return _masked(-_slopes(case).view(1, -1, 1, 1) * behind, drop, dtype)
    if case.option == "window":
        if training or exact:
            return _masked(torch.zeros(behind.shape), drop | (behind >= WINDOW), dtype)
        return _flex(case, lambda b, h, i, j: (i >= j) & (i - j < WINDOW), None)
    if training or exact:

        def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = SOFTCAP * torch.tanh(q @ k.transpose(2, 3) * (case.size**-0.5 / SOFTCAP))
            return scores.masked_fill(drop, -torch.inf).softmax(-1) @ v

        return formula if exact else _compiled(formula)
    return _flex(case, lambda b, h, i, j: i >= j, lambda score, b, h, i, j: SOFTCAP * torch.tanh(score / SOFTCAP))


def _masked(bias: Tensor, drop: Tensor, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Torch's function with a float mask made once: it would turn a boolean one into that in each call."""
    mask = bias.to(dtype).masked_fill(drop, -torch.inf)
    return functools.partial(F.scaled_dot_product_attention, attn_mask=mask)


def _flex(
    case: Attention, keep: Callable[..., Tensor], score_mod: Callable[..., Tensor] | None
) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(keep, None, None, case.queries, case.keys, device="cpu")
    return _compiled(functools.partial(flex_attention, score_mod=score_mod, block_mask=block_mask))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled by its first call, whose warnings are about torch's own imports."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    called = False

    def call(*inputs: Tensor) -> Any:
        nonlocal called
        if called:
            return compiled(*inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = compiled(*inputs)
        called = True
        return results

    return call


def _documents(
    case: Attention, training: bool, provider: str, dtype: torch.dtype, generator: torch.Generator
) -> tuple[_Run, _Compared]:
    lengths = torch.tensor(case.lengths)
    rows = [_randn(generator, case, dtype, sum(case.lengths), case.heads, case.size) for _ in range(4)]
    if provider != "torch":
        q, k, v = (x.requires_grad_(training) for x in rows[:3])
        starts = F.pad(lengths.cumsum(0), (1, 0)).int()
        attention: Any = functools.partial(
            seqkernels.functional.attention, cu_seqlens=starts, max_seqlen_q=case.queries
        )
        return _one_result(lambda: attention(q, k, v, is_causal=case.causal), (q, k, v), rows[3], training), tuple
    real = torch.arange(case.keys) < lengths[:, None]
    padded = []
    for x in rows:
        of_batch = x.new_zeros(*real.shape, *x.shape[1:])
        of_batch[real] = x
        padded.append(of_batch.transpose(1, 2).contiguous())
    q, k, v = (x.requires_grad_(training) for x in padded[:3])
    mask = real[:, None, None, :]
    run = _one_result(
        lambda: F.scaled_dot_product_attention(q, k, v, mask, is_causal=case.causal), (q, k, v), padded[3], training
    )
    return run, lambda results: tuple(x.transpose(1, 2)[real] for x in results)


def _generation(case: Attention, provider: str, dtype: torch.dtype, generator: torch.Generator) -> _Run:
    kv_heads = case.kv_heads or case.heads
    q = _randn(generator, case, dtype, case.batch, 1, case.heads, case.size)
    k_cache, v_cache = (_randn(generator, case, dtype, case.batch, case.keys, kv_heads, case.size) for _ in range(2))
    k, v = (_randn(generator, case, dtype, case.batch, 1, kv_heads, case.size) for _ in range(2))
    lengths = torch.tensor(case.lengths)
    filled = (lengths - 1).int()
    if provider != "torch":
        step: Any = functools.partial(seqkernels.functional.flash_attn_with_kvcache, cache_seqlens=filled)
        return lambda: (step(q, k_cache, v_cache, k, v).transpose(1, 2),)
    q, k_cache, v_cache = (x.transpose(1, 2).contiguous() for x in (q, k_cache, v_cache))
    mask = (torch.arange(case.keys) < lengths[:, None])[:, None, None, :]
    rows, places = torch.arange(case.batch), lengths - 1

    def run() -> tuple[Tensor, ...]:
        k_cache[rows, :, places] = k[:, 0]
        v_cache[rows, :, places] = v[:, 0]
        return (F.scaled_dot_product_attention(q, k_cache, v_cache, mask, enable_gqa=bool(case.kv_heads)),)

    return run
