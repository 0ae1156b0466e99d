"""Turns a case into calls: the same inputs and parameters for torch and for each backend of seqkernels.

A call is the whole layer call a user makes, input projection included. In the mode ``forward_backward`` it also
takes the gradients of input and parameters for a fixed random gradient of the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from math import isfinite
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqkernels

from . import engines
from .cases import ENGINES, Attention, Case, Mode, Recurrence

LAYERS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}


class Workload(NamedTuple):
    """A call to be timed.

    Attributes:
        run: makes the call; returns outputs and, in the mode ``forward_backward``, gradients.
        context: returns the context in which `run` is called; entered outside the timed part.
    """

    run: Callable[[], tuple[Tensor, ...]]
    context: Callable[[], AbstractContextManager[object]]


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
    if isinstance(case, Recurrence):
        run = _recurrence(case, training, provider, dtype, generator)
    else:
        run = _attention(case, training, provider, dtype, generator)

    def context() -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(torch.set_grad_enabled(training))
        if provider != "torch" and provider not in ENGINES:
            stack.enter_context(seqkernels.use_backend(provider))
        return stack

    return Workload(run, context)


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

    def forward_backward() -> tuple[Tensor, ...]:
        results = forward()
        return (*results, *torch.autograd.grad(results[: len(grads)], wanted, grads))

    return forward_backward if training else forward


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
) -> Callable[[], tuple[Tensor, ...]]:
    function = (
        F.scaled_dot_product_attention if provider == "torch" else seqkernels.functional.scaled_dot_product_attention
    )
    q_shape = (case.batch, case.heads, case.queries, case.size)
    kv_shape = (case.batch, case.kv_heads or case.heads, case.keys, case.size)
    q, k, v = (_randn(generator, case, dtype, *s).requires_grad_(training) for s in (q_shape, kv_shape, kv_shape))
    wanted = [q, k, v]
    mask = None
    if case.mask == "padding":
        lengths = torch.linspace(case.keys / 2, case.keys, case.batch).long()
        mask = (torch.arange(case.keys) < lengths[:, None])[:, None, None, :]
    elif case.mask:
        mask = _randn(generator, case, dtype, 1, case.heads, case.queries, case.keys)
        if case.mask == "learned":
            wanted.append(mask.requires_grad_(training))
    grad = _randn(generator, case, dtype, *q_shape)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": case.causal, "enable_gqa": bool(case.kv_heads)}

    def forward() -> tuple[Tensor, ...]:
        return (function(q, k, v, **options),)

    def forward_backward() -> tuple[Tensor, ...]:
        results = forward()
        return (*results, *torch.autograd.grad(results, wanted, (grad,)))

    return forward_backward if training else forward
