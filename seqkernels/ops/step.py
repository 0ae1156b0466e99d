"""One step of a cell for a few rows, where the way to a kernel takes longer than the kernel.

`recurrence` over one step gives the same. Here the compiled module is called without the dispatcher, for plain tensors
in eager mode, and a kernel of its own reads the weights without packing them; ``docs/decisions/0006`` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from ._eager import apart, batched, compiled, gradients, records, undisturbed
from .recurrence import recurrence

#: Rows up to which a step is quicker without packing.
MAX_ROWS = 4

_autocast = torch._C._is_any_autocast_enabled
_grad_enabled = torch.is_grad_enabled


def step(
    cell: str,
    input: Tensor,
    hidden: Tensor | None,
    cells: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> tuple[Tensor, Tensor | None] | None:
    """The next hidden and (LSTM) cell states, or ``None`` where the call has to go through `recurrence`.

    It has to for tensors on other devices, subclasses, rows that are not contiguous, more than `MAX_ROWS` rows, other
    implementations, sizes of 1, under autocast, compilation, tracing, dispatch modes, functional transforms and
    forward-mode gradients, and where an argument does not fit, since `recurrence` says why.

    Args:
        cell: a key of `seqkernels.cells.CELLS`.
        input: (B, I), or (1, B, I) as a layer has it; then the states have three dimensions too.
        hidden: (B, H), or ``None`` for zeros.
        cells: (B, H), LSTM only, or ``None`` for zeros.
        weight_ih: (G*H, I).
        weight_hh: (G*H, H).
        bias_ih: (G*H,) or ``None``.
        bias_hh: (G*H,) or ``None``.
    """
    if not undisturbed() or type(input) is not Tensor or not input.is_cpu:
        return None
    shape = input.shape
    rows = shape[0] if len(shape) == 2 else shape[1] if len(shape) == 3 and shape[0] == 1 else MAX_ROWS + 1
    if rows > MAX_ROWS or _autocast() or not (hidden is None or isinstance(hidden, Tensor)):
        return None
    # Of one element a row may be part of a complex number, negated by a bit that memory does not show.
    if shape[-1] <= 1 or weight_hh.shape[-1] <= 1:
        return None
    module = compiled(input.dtype, cell, "step")
    if module is None:
        return None
    try:
        if _grad_enabled() and records(weight_ih, weight_hh, bias_ih, bias_hh, input, hidden, cells):
            results = _apply(cell, module, input, hidden, cells, weight_ih, weight_hh, bias_ih, bias_hh)
            return results if cell == "lstm" else (results, None)
        weights = (weight_ih, weight_hh, bias_ih, bias_hh)
        next_hidden, next_cells, _ = module.step_forward(input, hidden, cells, weights, cell, False)
        return next_hidden, next_cells
    except (TypeError, ValueError):
        # `recurrence` can run it, or knows what is wrong.
        return None
    except RuntimeError:
        # A tensor that outlived its functional transform has no memory, but holds a tensor that does.
        given = (input, hidden, cells, weight_ih, weight_hh, bias_ih, bias_hh)
        held = unwrap_dead_wrappers(given)
        if all(x is y for x, y in zip(given, held, strict=True)):
            raise
        return step(cell, *held)


class _Step(torch.autograd.Function):
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
        next_hidden, next_cells, reserve = module.step_forward(input, hidden, cells, weights, cell, True)
        ctx.save_for_backward(input, hidden, cells, *weights, next_hidden, next_cells, reserve)
        ctx.cell, ctx.module = cell, module
        ctx.set_materialize_grads(False)
        return (next_hidden, next_cells) if cell == "lstm" else next_hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        input, hidden, cells, *rest = ctx.saved_tensors
        weights, saved, needs = rest[:4], rest[4:], ctx.needs_input_grad[2:]
        if _grad_enabled() or any(map(batched, grads)):
            return None, None, *_gradients(ctx.cell, grads, (input, hidden, cells, *weights), needs)
        both = grads if len(grads) == 2 else (grads[0], None)
        return None, None, *ctx.module.step_backward(both, input, hidden, cells, weights, saved, ctx.cell, needs)


# `Function.apply` without what it does for functional transforms, of which `step` has seen that there are none.
_apply = super(torch.autograd.Function, _Step).apply


def _gradients(
    cell: str, grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients by operations, for the second order and for many at once, through `recurrence`."""
    with torch.enable_grad():
        tensors = apart(tensors)
        input, hidden, cells, weight_ih, weight_hh, bias_ih, bias_hh = tensors
        assert input is not None
        assert weight_hh is not None
        layer = input.dim() == 3
        zeros = input.new_zeros(*input.shape[:-1], weight_hh.shape[1])
        states = [zeros if x is None else x for x in ((hidden, cells) if cell == "lstm" else (hidden,))]
        _, _, state_n = recurrence(
            input if layer else input.unsqueeze(0),
            weight_hh,
            bias_hh,
            torch.cat(states) if layer else torch.stack(states),
            cell=cell,
            weight_ih=weight_ih,
            bias_ih=bias_ih,
        )
        outs = state_n.split(1) if layer else state_n.unbind()
    return gradients(outs, grads, tensors, needs)
