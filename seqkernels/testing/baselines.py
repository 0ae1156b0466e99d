"""The contracts by the differentiable reference, for float64, and by torch's own functions, for the error to beat."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.reference.attention import attention as reference_attention
from ..backends.reference.attention import drop, dropped
from ..backends.reference.recurrence import recurrence as reference_recurrence
from ..backends.reference.recurrence_step import States, recurrent_part, step, zone_out
from ..cells import CELLS, DETACH, HOLD, RESET, Weights, accumulate_dtype
from ..scores import UNBOUNDED, Scores
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


def attention_oracle(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`seqkernels.ops.attention.attention` by the differentiable reference, without ops or a registry between."""
    return reference_attention(*_arguments(*tensors, **options))


def torch_attention(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`seqkernels.ops.attention.attention` by ``F.scaled_dot_product_attention``, document by document.

    Caps, sinks and dropout, which that function lacks or draws otherwise, are operations as in it: scores and softmax
    in the accumulation dtype, weights rounded to that of v. So is the log-sum-exp, which it does not return.
    """
    return _attention(_fused, *tensors, **options)


def torch_tiled_attention(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`seqkernels.ops.attention.attention` by dense torch operations that round as tiled kernels do.

    Tiled kernels take the gradient of a score as ``p (dp - delta)`` with ``delta`` from the rounded rows of ``out``
    and their gradient, as torch's own fused kernels; the dense softmax does not, and its rounding errors cancel where
    few keys dominate.
    """
    return _attention(_tiled, *tensors, **options)


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Scores]:
    """Those of `seqkernels.ops.attention.attention`, as its implementations get them."""
    if is_causal:
        options["right"] = 0
    return q, k, v, Scores(q.shape[3] ** -0.5 if scale is None else scale, mask, bias, **options)


class _Dense(NamedTuple):
    """What is done to the scores of queries and keys of one length each, whatever their places mean.

    All but the last three can be broadcast to (B, Hq, M, N).
    """

    keep: Tensor | None
    bias: Tensor | None
    distance: Tensor | None  # subtracted, in the accumulation dtype
    dropped: Tensor | None
    sink: Tensor | None
    scores: Scores  # for its numbers
    causal: bool  # whether `keep` is ``is_causal`` of torch

    def flip(self) -> _Dense:
        """The same for keys in reverse order."""
        keep, bias, distance, gone = (None if x is None else x.flip(3) for x in self[:4])
        return _Dense(keep, bias, distance, gone, self.sink, self.scores, False)


_Core = Callable[[Tensor, Tensor, Tensor, _Dense], tuple[Tensor, Tensor]]


def _attention(core: _Core, *tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The contract by a computation that knows no places and no documents."""
    q, k, v, scores = _arguments(*tensors, **options)
    gone = None
    if scores.dropout_p > 0.0 and scores.seed is not None:
        gone = dropped(scores.seed, scores.shape(q, k), scores.dropout_p)
    if scores.cu_seqlens_q is None or scores.cu_seqlens_k is None:
        return core(q, k, v, _dense(q, k, scores, gone))
    starts_q, starts_k = scores.cu_seqlens_q.tolist(), scores.cu_seqlens_k.tolist()
    parts = [_unread(q[:, :, : starts_q[0]], v)]
    for b, (first, end, first_k, end_k) in enumerate(zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)):
        rows, keys, values = q[:, :, first:end], k[:, :, first_k:end_k], v[:, :, first_k:end_k]
        one = (_of_document(x, b, end - first, end_k - first_k) for x in (scores.mask, scores.bias, gone))
        mask, bias, gone_of_one = one
        slopes = scores.alibi_slopes
        of_document = scores._replace(
            mask=mask,
            bias=bias,
            key_lengths=None if scores.key_lengths is None else scores.key_lengths[b : b + 1],
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b],
        )
        parts.append(core(rows, keys, values, _dense(rows, keys, of_document, gone_of_one)))
    parts.append(_unread(q[:, :, starts_q[-1] :], v))
    out, lse = (torch.cat(column, 2) for column in zip(*parts, strict=True))
    return out, lse


def _unread(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The results of rows of no document."""
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulate_dtype(q.dtype))
    return q.new_zeros((*q.shape[:3], v.shape[3])), lse


def _of_document(x: Tensor | None, b: int, queries: int, keys: int) -> Tensor | None:
    return None if x is None else (x if x.shape[0] == 1 else x[b : b + 1])[:, :, :queries, :keys]


def _dense(q: Tensor, k: Tensor, scores: Scores, gone: Tensor | None) -> _Dense:
    queries, keys = q.shape[2], k.shape[2]
    there: Tensor | int = keys
    tests: list[Tensor] = []
    j = torch.arange(keys)
    if scores.key_lengths is not None:
        there = scores.key_lengths.clamp(max=keys).view(-1, 1, 1, 1)
        tests.append(j < there)
    behind = (j - torch.arange(queries).unsqueeze(1)).view(1, 1, queries, keys)
    if scores.bottom_right:
        behind = behind - (there - queries)
    if scores.left != UNBOUNDED:
        tests.append(behind >= -scores.left)
    if scores.right != UNBOUNDED:
        tests.append(behind <= scores.right)
    if scores.mask is not None:
        tests.append(scores.mask)
    keep = functools.reduce(torch.logical_and, tests) if tests else None
    distance = None
    if scores.alibi_slopes is not None:
        slopes = scores.alibi_slopes.to(accumulate_dtype(q.dtype))
        distance = slopes.view(-1, q.shape[1], 1, 1) * behind.abs()
    causal = len(tests) == 1 and scores.right == 0 and (not scores.bottom_right or queries == keys)
    return _Dense(keep, scores.bias, distance, gone, scores.sink, scores, causal)


def _fused(q: Tensor, k: Tensor, v: Tensor, dense: _Dense) -> tuple[Tensor, Tensor]:
    """By ``F.scaled_dot_product_attention`` if that can."""
    scores, keep, bias = dense.scores, dense.keep, dense.bias
    if scores.softcap != 0.0 or dense.sink is not None or dense.dropped is not None:
        return _composite(q, k, v, dense)
    if dense.distance is not None:
        bias = -dense.distance if bias is None else bias - dense.distance
    additive = keep
    if bias is not None:
        additive = bias if keep is None else bias.masked_fill(~keep, -torch.inf)
    alone = dense.causal and bias is None
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, None if alone else additive, 0.0, alone, scale=scores.scale, enable_gqa=grouped
    )
    return out, _columns(q, k, dense).logsumexp(-1)


def _composite(q: Tensor, k: Tensor, v: Tensor, dense: _Dense) -> tuple[Tensor, Tensor]:
    columns = _columns(q, k, dense)
    dead = (columns == -torch.inf).all(-1, keepdim=True)
    weights = columns.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)[..., : k.shape[2]]
    weights = drop(weights, dense.dropped, dense.scores.dropout_p).to(q.dtype)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), columns.logsumexp(-1)


def _tiled(q: Tensor, k: Tensor, v: Tensor, dense: _Dense, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """The last term of the output is zero and has the gradient ``-delta`` for the log-sum-exp, of rounded rows.

    With `narrow` the weights are rounded to the dtype of q where they are multiplied, as 16-bit products take them.
    """
    columns = _columns(q, k, dense)
    lse = columns.logsumexp(-1)
    level = torch.where(lse.isfinite(), lse, 0).unsqueeze(-1)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1).to(columns.dtype)
    weights = (columns[..., : k.shape[2]] - level.detach()).exp()
    weights = drop(weights, dense.dropped, dense.scores.dropout_p)
    if narrow:
        weights = weights + (weights.to(q.dtype).to(weights.dtype) - weights).detach()
    out = weights @ values
    return (out - out.detach().to(q.dtype) * (level - level.detach())).to(q.dtype), lse


def _columns(q: Tensor, k: Tensor, dense: _Dense) -> Tensor:
    """Scores in the accumulation dtype, (B, Hq, M, N), or N + 1 with the sink."""
    acc = accumulate_dtype(q.dtype)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.to(acc) @ keys.to(acc).transpose(2, 3) * dense.scores.scale
    if dense.scores.softcap != 0.0:
        scores = dense.scores.softcap * (scores / dense.scores.softcap).tanh()
    if dense.bias is not None:
        masked = dense.bias == -torch.inf
        scores = (scores + dense.bias.masked_fill(masked, 0).to(acc)).masked_fill(masked, -torch.inf)
    if dense.distance is not None:
        scores = scores - dense.distance
    if dense.keep is not None:
        scores = scores.masked_fill(~dense.keep, -torch.inf)
    if dense.sink is None:
        return scores
    return torch.cat((scores, dense.sink.to(acc).view(-1, 1, 1).expand(*scores.shape[:3], 1)), 3)


def _reversed(core: _Core) -> _Core:
    """`core` with the keys and all elements in reverse order: the same, with other rounding errors."""

    def run(q: Tensor, k: Tensor, v: Tensor, dense: _Dense) -> tuple[Tensor, Tensor]:
        out, lse = core(q.flip(3), k.flip(2, 3), v.flip(2, 3), dense.flip())
        return out.flip(3), lse

    return run


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


#: Equally good computations by torch, whose worst error counts: one alone is often right by luck where results are few.
RECURRENCES = (torch_recurrence, reversed_recurrence(torch_recurrence))
ATTENTIONS = (
    torch_attention,
    torch_tiled_attention,
    functools.partial(_attention, _reversed(_fused)),
    functools.partial(_attention, _reversed(_tiled)),
    functools.partial(_attention, functools.partial(_tiled, narrow=True)),
)
