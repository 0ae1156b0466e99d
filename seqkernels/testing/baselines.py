"""The contracts by the differentiable reference, for float64, and by torch's own functions, for the error to beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.reference.attention import attention as reference_attention
from ..backends.reference.recurrence import recurrence as reference_recurrence
from ..backends.reference.recurrence_step import States, recurrent_part, step, zone_out
from ..cells import CELLS, DETACH, HOLD, RESET, Weights, accumulate_dtype
from ..scores import Scores
from .inputs import OPTIONS, recurrence_weights

Recurrence = Callable[..., tuple[Tensor | None, ...]]
Attention = Callable[..., tuple[Tensor | None, ...]]


def recurrence_oracle(
    input: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None = None,
    *,
    cell: str,
    reverse: bool = False,
    gates: bool = False,
    **options: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """`seqkernels.ops.recurrence.recurrence` by the differentiable reference, without ops or a registry between."""
    weights = recurrence_weights(weight_hh, bias_hh, **options)
    states, state_n, reserve = reference_recurrence(input, weights, state0, control, cell, reverse)
    hidden, *rest = states.narrow(1, 0 if reverse else 1, input.shape[0]).unbind(0)
    outputs = hidden, rest[0] if rest else None, state_n
    return (*outputs, _gates(hidden, reserve, cell)) if gates else outputs


def _gates(hidden: Tensor, reserve: Tensor, cell: str) -> Tensor:
    return reserve[:, :, : CELLS[cell].gates].to(hidden.dtype) if CELLS[cell].reserve else hidden.unsqueeze(2)


def torch_recurrence(
    input: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None = None,
    *,
    cell: str,
    reverse: bool = False,
    gates: bool = False,
    **options: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """`seqkernels.ops.recurrence.recurrence` by torch, every rounding in the dtype of the inputs.

    By torch's own cells where they can do it, else (options of the cell, or its gates) operation by operation.
    """
    weights = recurrence_weights(weight_hh, bias_hh, **options)
    plain = not gates and all(options.get(name) is None for name in OPTIONS if name not in _OUTSIDE)
    steps, batch, _ = input.shape
    state = tuple(state0)
    fresh = state0.new_zeros(len(state), 1) if weights.reset_state is None else weights.reset_state
    history: list[States] = []
    reserve: list[Tensor] = []
    projected = input if plain or weights.weight_ih is None else F.linear(input, weights.weight_ih, weights.bias_ih)
    for t in reversed(range(steps)) if reverse else range(steps):
        if control is not None:
            reset, hold, detach = ((control[t] & bit).bool().unsqueeze(1) for bit in (RESET, HOLD, DETACH))
            state = tuple(torch.where(detach, s.detach(), s) for s in state)
            state = tuple(torch.where(reset, f, s) for f, s in zip(fresh, state, strict=True))
        if plain:
            new = _torch_cell(input[t], state, weights, cell)
        else:
            new, saved = step(projected[t], recurrent_part(state[0], weights), state, weights, cell)
            reserve.append(saved if control is None else saved.masked_fill(hold.unsqueeze(2), 0))
        if weights.zoneout is not None:
            new = zone_out(state, new, weights.zoneout, weights.seed, t)
        if control is not None:
            new = tuple(torch.where(hold, s, n) for s, n in zip(state, new, strict=True))
        state = new
        history.append(state)
    if reverse:
        history.reverse()
        reserve.reverse()
    empty = input.new_empty((0, batch, weight_hh.shape[1]))
    hidden, *rest = (torch.stack(column) for column in zip(*history, strict=True)) if history else [empty] * len(state)
    outputs = hidden, rest[0] if rest else None, torch.stack(state)
    if not gates:
        return outputs
    saved = torch.stack(reserve) if reserve else empty.new_empty(0, batch, CELLS[cell].reserve, weight_hh.shape[1])
    return *outputs, _gates(hidden, saved, cell)


#: Options that are no business of the cell.
_OUTSIDE = ("weight_ih", "bias_ih", "reset_state")


def _torch_cell(x: Tensor, state: States, weights: Weights, cell: str) -> States:
    cells: dict[str, Callable[..., Any]] = {
        "rnn_tanh": torch.rnn_tanh_cell,
        "rnn_relu": torch.rnn_relu_cell,
        "gru": torch.gru_cell,
        "lstm": torch.lstm_cell,
    }
    weight_ih = torch.eye(x.shape[1], dtype=x.dtype) if weights.weight_ih is None else weights.weight_ih
    biases: list[Tensor | None] = [weights.bias_ih, weights.bias_hh]
    if any(b is not None for b in biases):
        biases = [x.new_zeros(weight_ih.shape[0]) if b is None else b for b in biases]
    new = cells[cell](x, list(state) if cell == "lstm" else state[0], weight_ih, weights.weight_hh, *biases)
    return tuple(new) if cell == "lstm" else (new,)


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`seqkernels.ops.attention.attention` by the differentiable reference, without ops or a registry between."""
    if is_causal:
        options["right"] = 0
    scores = Scores(q.shape[3] ** -0.5 if scale is None else scale, mask, bias, **options)
    return reference_attention(q, k, v, scores)


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """`seqkernels.ops.attention.attention` by ``F.scaled_dot_product_attention``.

    The log-sum-exp, which that function does not return, is a dense computation in the accumulation dtype.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    keep = _keep(q, k, mask, is_causal)
    additive = keep
    if bias is not None:
        additive = bias if keep is None else bias.masked_fill(~keep, -torch.inf)
    alone = is_causal and mask is None and bias is None
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, None if alone else additive, 0.0, alone, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out, _scores(q, k, keep, bias, scale).logsumexp(-1)


def torch_tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """`seqkernels.ops.attention.attention` by dense torch operations that round as tiled kernels do.

    Tiled kernels take the gradient of a score as ``p (dp - delta)`` with ``delta`` from the rows of ``out`` and its
    gradient, as torch's own fused kernels; the dense softmax does not, and its rounding errors cancel where few keys
    dominate. The last term of the output is zero and has the gradient ``-delta`` for the log-sum-exp.
    """
    acc = accumulate_dtype(q.dtype)
    keep = _keep(q, k, mask, is_causal)
    scores = _scores(q, k, keep, bias, q.shape[3] ** -0.5 if scale is None else scale)
    lse = scores.logsumexp(-1)
    level = torch.where(lse.isfinite(), lse, 0).unsqueeze(-1)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1).to(acc)
    out = (scores - level.detach()).exp() @ values
    return (out - out.detach() * (level - level.detach())).to(q.dtype), lse


def _keep(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    if not is_causal:
        return mask
    causal = torch.ones((1, 1, q.shape[2], k.shape[2]), dtype=torch.bool).tril()
    return causal if mask is None else mask & causal


def _scores(q: Tensor, k: Tensor, keep: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    acc = accumulate_dtype(q.dtype)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.to(acc) @ keys.to(acc).transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias.to(acc)
    return scores if keep is None else scores.masked_fill(~keep, -torch.inf)


def reversed_recurrence(fn: Recurrence) -> Recurrence:
    """`fn` with the hidden units in reverse order: the same recurrence, other rounding errors."""

    def run(
        input: Tensor,
        weight_hh: Tensor,
        bias_hh: Tensor | None,
        state0: Tensor,
        control: Tensor | None = None,
        *,
        cell: str,
        **options: Any,
    ) -> tuple[Tensor | None, ...]:
        if options.get("seed") is not None:
            # Random zoneout depends on a unit's place.
            return fn(input, weight_hh, bias_hh, state0, control, cell=cell, **options)

        def flip(gates: Tensor, dim: int) -> Tensor:
            return gates.unflatten(dim, (CELLS[cell].gates, -1)).flip(dim + 1).flatten(dim, dim + 1)

        moved = {name: x for name, x in options.items() if x is not None}
        for name in moved.keys() & {"weight_ih", "bias_ih", "norm_h"}:
            moved[name] = flip(moved[name], 0)
        for name in moved.keys() & {"reset_state", "peephole", "recurrent_mask", "norm_c"}:
            moved[name] = moved[name].flip(-1)
        outputs = fn(
            flip(input, 2) if "weight_ih" not in moved else input,
            flip(weight_hh, 0).flip(1),
            None if bias_hh is None else flip(bias_hh, 0),
            state0.flip(2),
            control,
            cell=cell,
            **moved,
        )
        return tuple(None if x is None else x.flip(-1) for x in outputs)

    return run


def reversed_attention(fn: Attention) -> Attention:
    """`fn` with the keys and the elements of q and k in reverse order: the same attention, other rounding errors."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        scale: float | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor | None, ...]:
        keep = _keep(q, k, mask, is_causal)
        return fn(
            q.flip(3),
            k.flip(2, 3),
            v.flip(2),
            None if keep is None else keep.flip(3),
            None if bias is None else bias.flip(3),
            scale=scale,
        )

    return run


#: Equally good computations by torch, whose worst error counts: one alone is often right by luck where results are few.
RECURRENCES = (torch_recurrence, reversed_recurrence(torch_recurrence))
ATTENTIONS = (
    torch_attention,
    torch_tiled_attention,
    reversed_attention(torch_attention),
    reversed_attention(torch_tiled_attention),
)
