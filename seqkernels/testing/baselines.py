"""The contracts by the differentiable reference, for float64, and by torch's own functions, for the error to beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.reference.attention import attention as reference_attention
from ..backends.reference.recurrence import recurrence as reference_recurrence
from ..cells import CELLS, HOLD, RESET, Weights, accumulate_dtype

Recurrence = Callable[..., tuple[Tensor | None, ...]]
Attention = Callable[..., tuple[Tensor | None, ...]]


def recurrence_oracle(
    gates_x: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None = None,
    *,
    cell: str,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`seqkernels.ops.recurrence.recurrence` by the differentiable reference, without ops or a registry between."""
    weights = Weights(None, weight_hh, bias_hh=bias_hh)
    states, state_n, _ = reference_recurrence(gates_x, weights, state0, control, cell, reverse)
    per_step = states.narrow(1, 0 if reverse else 1, gates_x.shape[0]).unbind(0)
    return per_step[0], per_step[1] if cell == "lstm" else None, state_n


def torch_recurrence(
    gates_x: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None = None,
    *,
    cell: str,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`seqkernels.ops.recurrence.recurrence` by torch's own cells, every rounding in the dtype of the inputs."""
    cells: dict[str, Callable[..., Any]] = {
        "rnn_tanh": torch.rnn_tanh_cell,
        "rnn_relu": torch.rnn_relu_cell,
        "gru": torch.gru_cell,
        "lstm": torch.lstm_cell,
    }
    identity = torch.eye(gates_x.shape[2], dtype=gates_x.dtype)
    zero = None if bias_hh is None else torch.zeros_like(bias_hh)
    steps, batch, _ = gates_x.shape
    state = state0
    history: list[Tensor] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        hold = None
        if control is not None:
            reset, hold = ((control[t] & bit).bool().unsqueeze(1) for bit in (RESET, HOLD))
            state = state.masked_fill(reset, 0)
        hx = list(state) if cell == "lstm" else state[0]
        new = cells[cell](gates_x[t], hx, identity, weight_hh, zero, bias_hh)
        new = torch.stack(new if cell == "lstm" else (new,))
        state = new if hold is None else torch.where(hold, state, new)
        history.append(state)
    if reverse:
        history.reverse()
    empty = gates_x.new_empty((state0.shape[0], 0, batch, state0.shape[2]))
    per_step = torch.stack(history, 1) if history else empty
    return per_step[0], per_step[1] if cell == "lstm" else None, state


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """`seqkernels.ops.attention.attention` by the differentiable reference, without ops or a registry between."""
    return reference_attention(q, k, v, mask, bias, q.shape[3] ** -0.5 if scale is None else scale, is_causal)


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
        gates_x: Tensor,
        weight_hh: Tensor,
        bias_hh: Tensor | None,
        state0: Tensor,
        control: Tensor | None = None,
        *,
        cell: str,
        reverse: bool = False,
    ) -> tuple[Tensor | None, ...]:
        def flip(gates: Tensor, dim: int) -> Tensor:
            return gates.unflatten(dim, (CELLS[cell].gates, -1)).flip(dim + 1).flatten(dim, dim + 1)

        outputs = fn(
            flip(gates_x, 2),
            flip(weight_hh, 0).flip(1),
            None if bias_hh is None else flip(bias_hh, 0),
            state0.flip(2),
            control,
            cell=cell,
            reverse=reverse,
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
