"""Who is timed on a GPU: our operations, and the peers that each case has.

A peer whose package does not import has no part in the benchmark; one that fails has a row that says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqkernels
from seqkernels import backends

from .cases import GATES, SOFTCAP, WINDOW, Attention, Case, Mode, Recurrence
from .workloads import LAYERS

OURS = "seqkernels"
CUDA = f"{OURS} cuda"
"""The compiled CUDA kernels, which take a recurrence where they are asked to."""
CUDA_DEVICE = "cuda"
"""The type of device they run on; tests have them emulated on another one."""
ROTATED = 160 << 20
"""Bytes of all sets of inputs together, more than three times the last cache of an H100."""

PACKAGES = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface", "flashrnn": "flashrnn"}
"""The module of each peer that is not part of torch."""

MOST_CELLS = 512
"""Steps, of all layers and directions, up to which a loop over compiled cells is timed."""

Call = Callable[[], tuple[Tensor, ...]]
State = tuple[Tensor, ...]


class Provider(NamedTuple):
    """Who is timed: the calls on each set of inputs, and the context they are made in."""

    name: str
    calls: list[Call]
    context: Callable[[], AbstractContextManager[object]]


class Maker(NamedTuple):
    """A provider by name, and what makes it, which may fail."""

    name: str
    make: Callable[[], Provider]


def providers(case: Case, mode: Mode, device: str) -> Iterator[Maker]:
    """Who is timed on `case`, ours first, all on the same inputs.

    Args:
        case: what is called.
        mode: with or without gradients.
        device: where inputs lie; on ``"cpu"`` nothing is compiled.
    """
    if isinstance(case, Attention):
        return _attention(case, mode, device)
    return _recurrence(case, mode, device)


def _forward_backward(forward: Callable[[], Tensor], wanted: Sequence[Tensor], grad: Tensor | None) -> Call:
    def call() -> tuple[Tensor, ...]:
        out = forward()
        return (out,) if grad is None else (out, *torch.autograd.grad(out, wanted, grad))

    return call


def _copies(case: Case, mode: Mode) -> int:
    return max(1, min(8, ROTATED // max(case.bytes(mode), 1)))


def _randn(case: Case, device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(case.dtype)


def _there(peer: str) -> bool:
    return importlib.util.find_spec(PACKAGES[peer]) is not None


def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    return function if device == "cpu" else torch.compile(function, dynamic=False, fullgraph=True)


def _attention(case: Attention, mode: Mode, device: str) -> Iterator[Maker]:
    training = mode == "forward_backward"
    kv_heads = case.kv_heads or case.heads
    sets = []
    for _ in range(_copies(case, mode)):
        q = _randn(case, device, case.batch, case.heads, case.queries, case.size).requires_grad_(training)
        k, v = (
            _randn(case, device, case.batch, kv_heads, case.keys, case.size).requires_grad_(training) for _ in range(2)
        )
        sets.append((q, k, v, _randn(case, device, *q.shape) if training else None))

    def provider(name: str, form: Callable[..., Tensor], context: Any) -> Provider:
        calls = [_forward_backward(functools.partial(form, q, k, v), (q, k, v), grad) for q, k, v, grad in sets]
        return Provider(name, calls, context)

    for name, form, context in _attention_forms(case, device):
        yield Maker(name, functools.partial(provider, name, form, context))


def _attention_forms(case: Attention, device: str) -> Iterator[tuple[str, Callable[..., Tensor], Any]]:
    """Each provider's name, its function of q, k and v, and its context."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ours: dict[str, Any] = {"is_causal": case.causal}
    slopes = 2.0 ** (torch.arange(1, case.heads + 1, device=device) * (-8 / case.heads))
    bias = _randn(case, device, 1, case.heads, case.queries, case.keys) if case.option == "bias" else None
    if case.option == "window":
        ours["window"] = (WINDOW - 1, None)
    elif case.option == "alibi":
        ours["alibi_slopes"] = slopes
    elif case.option == "softcap":
        ours["softcap"] = SOFTCAP
    elif bias is not None:
        ours["bias"] = bias
    if case.option or device == "cpu":
        attention: Any = functools.partial(seqkernels.functional.attention, **ours)
        yield OURS, attention, nullcontext
    else:
        yield OURS, _sdpa(case, seqkernels.functional), nullcontext
    if case.dtype == torch.float32:
        rounded: Any = functools.partial(seqkernels.functional.attention, precision="tf32", **ours)
        yield f"{OURS} tf32", rounded, nullcontext
    if not case.option:
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ):
            yield name, _sdpa(case, F), functools.partial(sdpa_kernel, [backend] if device != "cpu" else list(_MATH))
        for peer in ("flash-attn", "flash-attn-3"):
            if _there(peer):
                yield peer, functools.partial(_flash_attn, case, PACKAGES[peer]), nullcontext
    yield "flex", _flex(case, slopes, bias, device), nullcontext


_MATH = (torch.nn.attention.SDPBackend.MATH,)


def _sdpa(case: Attention, module: Any) -> Callable[..., Tensor]:
    return functools.partial(
        module.scaled_dot_product_attention, is_causal=case.causal, enable_gqa=case.kv_heads is not None
    )


def _flash_attn(case: Attention, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Flash-attn 2 or 3; in inference the function that splits long keys of a few queries over programs."""
    module = importlib.import_module(name)
    function = module.flash_attn_with_kvcache if case.inference else module.flash_attn_func
    found = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=case.causal)
    # Some versions of flash-attn 3 return the log-sum-exp beside it.
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out.transpose(1, 2)


def _flex(case: Attention, slopes: Tensor, bias: Tensor | None, device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    change: Any = None
    if case.option == "softcap":

        def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return SOFTCAP * torch.tanh(score / SOFTCAP)

    elif case.option == "alibi":

        def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slopes[h] * (i - j)

    elif bias is not None:

        def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[0, h, i, j]

    block_mask = None
    if case.causal:

        def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < WINDOW) if case.option == "window" else i >= j

        block_mask = create_block_mask(keep, None, None, case.queries, case.keys, device=device)
    bound: Callable[..., Tensor] = functools.partial(
        flex_attention, score_mod=change, block_mask=block_mask, enable_gqa=case.kv_heads is not None
    )
    return _compiled(bound, device)


def _recurrence(case: Recurrence, mode: Mode, device: str) -> Iterator[Maker]:
    training = mode == "forward_backward"
    options: dict[str, Any] = {"num_layers": case.layers, "bidirectional": case.bidirectional}
    if case.cell.startswith("rnn"):
        options["nonlinearity"] = case.cell[4:]
    theirs = getattr(nn, LAYERS[case.cell])(case.inputs, case.hidden, **options).to(device, case.dtype)
    mine = getattr(seqkernels.nn, LAYERS[case.cell])(case.inputs, case.hidden, **options).to(device, case.dtype)
    mine.load_state_dict(theirs.state_dict())
    inputs = [
        _randn(case, device, case.steps, case.batch, case.inputs).requires_grad_(training)
        for _ in range(_copies(case, mode))
    ]
    directions = 2 if case.bidirectional else 1
    grad = _randn(case, device, case.steps, case.batch, case.hidden * directions) if training else None

    def provider(
        name: str, layer: nn.Module, form: Callable[[Tensor], Tensor], sets: Sequence[Tensor], context: Any
    ) -> Provider:
        wanted = tuple(layer.parameters())
        calls = [_forward_backward(functools.partial(form, x), (x, *wanted), grad) for x in sets]
        return Provider(name, calls, context)

    def of(
        name: str,
        layer: nn.Module,
        form: Callable[[Tensor], Tensor],
        sets: Sequence[Tensor] = inputs,
        context: Any = nullcontext,
    ) -> Maker:
        return Maker(name, functools.partial(provider, name, layer, form, sets, context))

    yield of(OURS, mine, lambda x: mine(x)[0])
    if device == CUDA_DEVICE and backends.why_not("cuda", _call(case, device)) is None:
        yield of(CUDA, mine, lambda x: mine(x)[0], context=functools.partial(seqkernels.use_backend, "cuda"))
    if case.dtype == torch.float32:
        # As cuDNN does it unless told otherwise.
        rounded = getattr(seqkernels.nn, LAYERS[case.cell])(case.inputs, case.hidden, precision="tf32", **options)
        rounded.to(device).load_state_dict(theirs.state_dict())
        yield of(f"{OURS} tf32", rounded, lambda x: rounded(x)[0])
    yield of("torch", theirs, lambda x: theirs(x)[0])
    if "cells" in case.tags and case.steps * case.layers * directions <= MOST_CELLS:
        # One set of inputs: what a step reads is small, and launching the steps takes long.
        cell = _compiled(CELLS[case.cell], device)
        yield of("compiled cell", theirs, functools.partial(_by_cells, case, theirs, cell), inputs[:1])
    if case.cell in FLASHRNN and case.layers == directions == 1 and _there("flashrnn"):
        yield of("flashrnn", theirs, functools.partial(_flashrnn, case, theirs))


def _call(case: Recurrence, device: str) -> backends.Call:
    return backends.Call("recurrence", device, case.dtype, case.cell, hidden=case.hidden)


def _lstm_cell(x: Tensor, state: State, w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor) -> State:
    h, c = state
    i, f, g, o = (F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_cell(x: Tensor, state: State, w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor) -> State:
    (h,) = state
    r_x, z_x, n_x = F.linear(x, w_x, b_x).chunk(3, 1)
    r_h, z_h, n_h = F.linear(h, w_h, b_h).chunk(3, 1)
    z = torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    return (n + z * (h - n),)


def _tanh_cell(x: Tensor, state: State, w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor) -> State:
    return (torch.tanh(F.linear(x, w_x, b_x) + F.linear(state[0], w_h, b_h)),)


def _relu_cell(x: Tensor, state: State, w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor) -> State:
    return (torch.relu(F.linear(x, w_x, b_x) + F.linear(state[0], w_h, b_h)),)


CELLS: dict[str, Callable[..., State]] = {
    "lstm": _lstm_cell,
    "gru": _gru_cell,
    "rnn_tanh": _tanh_cell,
    "rnn_relu": _relu_cell,
}
"""One step as one who writes a cell of their own has it, which is compiled and called in a loop of Python."""


def _by_cells(case: Recurrence, layer: nn.Module, cell: Callable[..., State], x: Tensor) -> Tensor:
    """The output of `layer`, each step of each layer and direction a call of `cell`."""
    zero = x.new_zeros(case.batch, case.hidden)
    for number in range(case.layers):
        both = []
        for backwards in (False, True)[: 2 if case.bidirectional else 1]:
            suffix = f"_l{number}" + ("_reverse" if backwards else "")
            weights = [getattr(layer, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            state: State = (zero, zero) if case.cell == "lstm" else (zero,)
            found = []
            for row in reversed(x.unbind(0)) if backwards else x.unbind(0):
                state = cell(row, state, *weights)
                found.append(state[0])
            both.append(torch.stack(found[::-1] if backwards else found))
        x = torch.cat(both, 2) if case.bidirectional else both[0]
    return x


FLASHRNN = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "elman"}
"""Our name of a cell to that of FlashRNN, which has one layer in one direction, and no projection of the input."""


def _flashrnn(case: Recurrence, layer: nn.Module, x: Tensor) -> Tensor:
    """The output of `layer` by FlashRNN: products (B, T, gates, heads, H), of one head, to states (2 or 1, B, T, 1, H).

    It compiles itself for each batch and hidden size. Its gates are i, f, g, o, as torch's are. Those of the GRU are
    r, z, n in the products of the input, n, r, z in those of the state, and its biases are of n of the state, of r, of
    z, and of n of the input; as we have those of the input in its products, the last is 0.
    """
    flashrnn = importlib.import_module(PACKAGES["flashrnn"]).flashrnn
    gates, size = GATES[case.cell], case.hidden
    product = F.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
    weight = layer.weight_hh_l0.view(gates, 1, size, size)
    bias = layer.bias_hh_l0.view(gates, 1, size)
    if case.cell == "gru":
        weight, bias = weight.roll(1, 0), torch.cat((bias.roll(1, 0), torch.zeros_like(bias[:1])))
    states, _ = flashrnn(
        product.view(case.steps, case.batch, gates, 1, size).transpose(0, 1),
        weight,
        bias,
        function=FLASHRNN[case.cell],
        backend="cuda_fused",
        dtype=str(case.dtype).removeprefix("torch."),
    )
    out: Tensor = states[0].squeeze(2).transpose(0, 1)
    return out
