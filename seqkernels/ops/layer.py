"""A layer without options, where the way to the kernel takes as long as a small kernel.

`recurrence` gives the same. Here the compiled module is called at once, for plain tensors in eager mode, and its own
checks of the arguments are the only ones; ``docs/decisions/0006`` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._eager import apart, batched, compiled, eager, gradients, records
from .recurrence import recurrence


def layer(
    cell: str,
    input: Tensor,
    hidden: Tensor | None,
    cells: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> tuple[Tensor, ...] | None:
    """The hidden states and the final ones, or ``None`` where the call has to go through `recurrence`.

    It has to for tensors on other devices and subclasses, last dimensions that are not contiguous, other
    implementations, sizes of 1, under compilation, tracing, dispatch modes, functional transforms and forward-mode
    gradients, and where an argument does not fit, since `recurrence` says why. Autocast is the caller's to see to.

    Args:
        cell: a key of `seqkernels.cells.CELLS`.
        input: (T, B, I).
        hidden: (1, B, H), or ``None`` for zeros.
        cells: (1, B, H), LSTM only, or ``None`` for zeros.
        weight_ih: (G*H, I).
        weight_hh: (G*H, H).
        bias_ih: (G*H,) or ``None``.
        bias_hh: (G*H,) or ``None``.

    Returns:
        The hidden state after each step (T, B, H), the final hidden state (1, B, H), and of an LSTM the final cell
        state (1, B, H).
    """
    if not eager(input, hidden, cells, weight_ih, weight_hh, bias_ih, bias_hh):
        return None
    # Of one element a row may be part of a complex number, negated by a bit that memory does not show.
    if input.shape[-1] <= 1 or weight_hh.shape[-1] <= 1:
        return None
    module = compiled(input.dtype, cell, "layer")
    if module is None:
        return None
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    try:
        if torch.is_grad_enabled() and records(input, hidden, cells, *weights):
            results: tuple[Tensor, ...] = _apply(cell, module, input, hidden, cells, *weights)
            return results
        states, _, *finals = module.layer_forward(cell, input, hidden, cells, weights, False)
        # Unsafe only in name: no view to autograd, so it may be modified and detached.
        return (states.unsafe_split_with_sizes((1, states.shape[0] - 1))[1], *finals)
    except (TypeError, ValueError):
        # `recurrence` can run it, or knows what is wrong.
        return None


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        module: ModuleType,
        input: Tensor,
        hidden: Tensor | None,
        cells: Tensor | None,
        *weights: Tensor | None,
    ) -> Any:
        states, reserve, *finals = module.layer_forward(cell, input, hidden, cells, weights, True)
        ctx.save_for_backward(input, hidden, cells, *weights, states, reserve)
        ctx.cell, ctx.module = cell, module
        ctx.set_materialize_grads(False)
        return (states.select(0, 0).narrow(0, 1, states.shape[1] - 1), *finals)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *tensors, states, reserve = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or any(map(batched, grads)):
            return None, None, *_gradients(ctx.cell, grads, tensors, needs)
        input, _, _, *weights = tensors
        return None, None, *ctx.module.layer_backward(ctx.cell, grads, input, weights, states, reserve, needs)


# `Function.apply` without what it does for functional transforms, of which there are none.
_apply = super(torch.autograd.Function, _Layer).apply


def _gradients(
    cell: str, grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients by operations, for the second order and for many at once, through `recurrence`."""
    with torch.enable_grad():
        tensors = apart(tensors)
        input, hidden, cells, weight_ih, weight_hh, bias_ih, bias_hh = tensors
        assert input is not None
        assert weight_hh is not None
        zeros = input.new_zeros(1, input.shape[1], weight_hh.shape[1])
        states = [zeros if x is None else x for x in ((hidden, cells) if cell == "lstm" else (hidden,))]
        output, _, state_n = recurrence(
            input, weight_hh, bias_hh, torch.cat(states), cell=cell, weight_ih=weight_ih, bias_ih=bias_ih
        )
        outs = (output, *state_n.split(1))
    return gradients(outs, grads, tensors, needs)
