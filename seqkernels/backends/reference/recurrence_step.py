"""One step of the recurrence in plain PyTorch: the recurrent product, the cells, and what may be added to each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cells import NORM_EPS, Weights
from .philox import uniform

States = tuple[Tensor, ...]


def recurrent_part(h: Tensor, weights: Weights) -> Tensor:
    """The recurrent part of the gates (B, G*H) from the hidden state (B, H)."""
    if weights.recurrent_mask is not None:
        h = h * weights.recurrent_mask
    part = h @ weights.weight_hh.t()
    if weights.norm_h is not None:
        part = F.layer_norm(part, part.shape[-1:], eps=NORM_EPS) * weights.norm_h
    return part if weights.bias_hh is None else part + weights.bias_hh


def step(gates_x: Tensor, gates_h: Tensor, state: States, weights: Weights, cell: str) -> tuple[States, Tensor]:
    """One step of a cell: new states, and what the backward pass needs of it.

    Args:
        gates_x: (B, G*H), input part of the gates.
        gates_h: (B, G*H), recurrent part of the gates, see `recurrent_part`.
        state: S tensors (B, H).
        weights: of which ``peephole`` and ``norm_c`` are used.
        cell: a key of `seqkernels.cells.CELLS`.

    Returns:
        S tensors (B, H), before any zoneout, and the reserve (B, R, H).
    """
    h = state[0]
    if cell == "lstm":
        return _lstm(gates_x + gates_h, state[1], weights.peephole, weights.norm_c)
    if cell == "gru":
        rx, zx, nx = gates_x.chunk(3, 1)
        rh, zh, nh = gates_h.chunk(3, 1)
        r, z = (rx + rh).sigmoid(), (zx + zh).sigmoid()
        n = (nx + r * nh).tanh()
        return ((1 - z) * n + z * h,), torch.stack((r, z, n, nh), 1)
    gates = gates_x + gates_h
    return (gates.tanh() if cell == "rnn_tanh" else gates.relu(),), h.new_empty(h.shape[0], 0, h.shape[1])


def _lstm(gates: Tensor, c: Tensor, peephole: Tensor | None, norm_c: Tensor | None) -> tuple[States, Tensor]:
    i, f, g, o = gates.chunk(4, 1)
    if peephole is not None:
        i, f = i + peephole[0] * c, f + peephole[1] * c
    i, f, g = i.sigmoid(), f.sigmoid(), g.tanh()
    c = f * c + i * g
    if peephole is not None:
        o = o + peephole[2] * c
    o = o.sigmoid()
    seen = c if norm_c is None else F.layer_norm(c, c.shape[-1:], norm_c[0], norm_c[1], NORM_EPS)
    return (o * seen.tanh(), c), torch.stack((i, f, g, o), 1)


def keep(zoneout: Tensor, seed: Tensor | None, t: int, batch: int, hidden: int) -> tuple[Tensor, ...]:
    """How much of each state stays what it was in step `t`.

    Args:
        zoneout: (S,), probabilities.
        seed: () int64; ``None`` for the expectation.
        t: the index of the step in time, in which direction soever the loop runs.
        batch: B.
        hidden: H.

    Returns:
        S tensors: (B, H) bool with a seed, else the probabilities.
    """
    if seed is None:
        return tuple(zoneout)
    count = batch * len(zoneout) * hidden
    index = t * count + torch.arange(count, device=seed.device).view(batch, len(zoneout), hidden)
    return (uniform(seed, index) < zoneout.unsqueeze(1)).unbind(1)


def zone_out(old: States, new: States, zoneout: Tensor, seed: Tensor | None, t: int) -> States:
    """The states (B, H) after step `t`, of what they were and what the cell made of them; see `keep`."""
    kept = keep(zoneout, seed, t, *old[0].shape)
    if seed is None:
        return tuple(p * a + (1 - p) * b for p, a, b in zip(kept, old, new, strict=True))
    return tuple(torch.where(k, a, b) for k, a, b in zip(kept, old, new, strict=True))
