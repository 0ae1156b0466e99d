"""The recurrence contract.

A recurrence is the sequential part of an RNN layer in one direction. The input projection of all steps,
``gates_x = F.linear(x, weight_ih, bias)``, is one GEMM that happens before; the kernel adds ``weight_hh h``,
applies the cell and carries the state. The formulas are in `seqkernels.cells`, the mathematics of the backward
pass in ``docs/recurrence.md``.

T time, B batch, H hidden size; G, S, R are gates, states and reserve of the cell (`seqkernels.cells.CELLS`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..cells import CELLS, DTYPES, accumulate_dtype

_library = torch.library.Library("seqkernels", "FRAGMENT")
_library.define(
    "recurrence_forward(Tensor gates_x, Tensor weight_hh, Tensor? bias_hh, Tensor state0, Tensor? control,"
    " str cell, bool reverse, bool save) -> (Tensor states, Tensor state_n, Tensor reserve)"
)
_library.define(
    "recurrence_backward(Tensor? grad_hidden, Tensor? grad_cells, Tensor? grad_state_n, Tensor weight_hh,"
    " Tensor states, Tensor reserve, Tensor? control, str cell, bool reverse)"
    " -> (Tensor grad_gates_x, Tensor grad_weight_hh, Tensor grad_bias_hh, Tensor grad_state0)"
)


def _call(x: Tensor, control: Tensor | None, cell: str) -> backends.Call:
    return backends.Call("recurrence", x.device.type, x.dtype, cell, () if control is None else ("control",))


def _forward(
    gates_x: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    module = backends.implementation(_call(gates_x, control, cell))
    return module.recurrence_forward(gates_x, weight_hh, bias_hh, state0, control, cell, reverse, save)


def _backward(
    grad_hidden: Tensor | None,
    grad_cells: Tensor | None,
    grad_state_n: Tensor | None,
    weight_hh: Tensor,
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = backends.implementation(_call(states, control, cell))
    return module.recurrence_backward(
        grad_hidden, grad_cells, grad_state_n, weight_hh, states, reserve, control, cell, reverse
    )


def _forward_fake(
    gates_x: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    steps, batch, _ = gates_x.shape
    num_states, _, hidden = state0.shape
    states = gates_x.new_empty((num_states if save else 1, steps + 1, batch, hidden))
    state_n = gates_x.new_empty((num_states, batch, hidden))
    shape = (steps, batch, CELLS[cell].reserve, hidden) if save else (0,)
    return states, state_n, gates_x.new_empty(shape, dtype=accumulate_dtype(gates_x.dtype))


def _backward_fake(
    grad_hidden: Tensor | None,
    grad_cells: Tensor | None,
    grad_state_n: Tensor | None,
    weight_hh: Tensor,
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_states, steps, batch, hidden = states.shape
    return (
        states.new_empty((steps - 1, batch, weight_hh.shape[0])),
        weight_hh.new_empty(weight_hh.shape),
        weight_hh.new_empty((weight_hh.shape[0],)),
        states.new_empty((num_states, batch, hidden)),
    )


_library.impl("recurrence_forward", _forward, "CompositeExplicitAutograd")
_library.impl("recurrence_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("seqkernels::recurrence_forward", _forward_fake, lib=_library)
torch.library.register_fake("seqkernels::recurrence_backward", _backward_fake, lib=_library)

forward_op = torch.ops.seqkernels.recurrence_forward.default
backward_op = torch.ops.seqkernels.recurrence_backward.default


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gates_x: Tensor,
        weight_hh: Tensor,
        bias_hh: Tensor | None,
        state0: Tensor,
        control: Tensor | None,
        cell: str,
        reverse: bool,
    ) -> tuple[Tensor, ...]:
        states, state_n, reserve = forward_op(gates_x, weight_hh, bias_hh, state0, control, cell, reverse, True)
        ctx.save_for_backward(gates_x, weight_hh, bias_hh, state0, control, states, reserve)
        ctx.cell, ctx.reverse = cell, reverse
        ctx.set_materialize_grads(False)
        return *_step_states(states, reverse), state_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, weight_hh, bias_hh, _, control, states, reserve = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_differentiable_backward(ctx, grads), None, None, None
        grad_cells = grads[1] if CELLS[ctx.cell].states == 2 else None
        grad_gates_x, grad_weight_hh, grad_bias_hh, grad_state0 = backward_op(
            grads[0], grad_cells, grads[-1], weight_hh, states, reserve, control, ctx.cell, ctx.reverse
        )
        return grad_gates_x, grad_weight_hh, None if bias_hh is None else grad_bias_hh, grad_state0, None, None, None


def _step_states(states: Tensor, reverse: bool) -> tuple[Tensor, ...]:
    steps = states.shape[1] - 1
    return tuple(states.narrow(1, 0 if reverse else 1, steps).unbind(0))


def _differentiable_backward(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients as a graph, for the second order: the reference recurrence, recomputed from the saved inputs."""
    from ..backends.reference.recurrence import recurrence as reference

    gates_x, weight_hh, bias_hh, state0, control, _, _ = ctx.saved_tensors
    inputs = (gates_x, weight_hh, bias_hh, state0)
    with torch.enable_grad():
        states, state_n, _ = reference(*inputs, control, ctx.cell, ctx.reverse)
        outputs = (*_step_states(states, ctx.reverse), state_n)
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=True, allow_unused=True
            )
        )
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[:4])


def check(
    gates_x: Tensor, weight_hh: Tensor, bias_hh: Tensor | None, state0: Tensor, control: Tensor | None, cell: str
) -> None:
    """Raise the error that names the argument which breaks the contract of `recurrence`."""
    if cell not in CELLS:
        raise ValueError(f"cell: {cell!r} is not one of {', '.join(map(repr, CELLS))}")
    gates, num_states, _ = CELLS[cell]
    if not isinstance(gates_x, Tensor):
        raise TypeError(f"gates_x: expected a Tensor, got {type(gates_x).__name__}")
    if not isinstance(weight_hh, Tensor):
        raise TypeError(f"weight_hh: expected a Tensor, got {type(weight_hh).__name__}")
    if gates_x.dim() != 3:
        raise ValueError(f"gates_x: expected 3 dimensions (T, B, G*H), got shape {tuple(gates_x.shape)}")
    if gates_x.dtype not in DTYPES:
        raise TypeError(f"gates_x: expected one of {DTYPES}, got {gates_x.dtype}")
    _, batch, rows = gates_x.shape
    if weight_hh.dim() != 2 or weight_hh.shape[0] != rows or weight_hh.shape[0] != gates * weight_hh.shape[1]:
        raise ValueError(
            f"weight_hh: expected shape (G*H, H) with G = {gates} and G*H = {rows} as in gates_x,"
            f" got {tuple(weight_hh.shape)}"
        )
    hidden = weight_hh.shape[1]
    expected: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("weight_hh", weight_hh, (rows, hidden)),
        ("state0", state0, (num_states, batch, hidden)),
        ("bias_hh", bias_hh, (rows,)),
        ("control", control, (gates_x.shape[0], batch)),
    )
    for name, tensor, shape in expected:
        if tensor is None and name != "state0":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != gates_x.device:
            raise ValueError(f"{name}: expected on {gates_x.device} as gates_x, got {tensor.device}")
        dtype = torch.uint8 if name == "control" else gates_x.dtype
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}{'' if name == 'control' else ' as gates_x'}, got {tensor.dtype}")


def recurrence(
    gates_x: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None = None,
    *,
    cell: str,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run a recurrence over all steps.

    Args:
        gates_x: (T, B, G*H), float32, float64, bfloat16 or float16; the input part of the gates, input bias
            included; any strides.
        weight_hh: (G*H, H), dtype of `gates_x`, torch's gate order.
        bias_hh: (G*H,) or ``None``; needed apart from the input bias only by the GRU.
        state0: (S, B, H), the initial state: hidden, then (LSTM) cell.
        control: (T, B) uint8 or ``None``: the sum of `seqkernels.cells.RESET` (the state of this row is zeroed
            before this step) and `HOLD` (this step is padding: its gates are ignored, the state is carried on).
        cell: a key of `seqkernels.cells.CELLS`.
        reverse: run from step T-1 to step 0.

    Returns:
        ``hidden`` (T, B, H), the hidden state after each step; ``cells`` (T, B, H), the LSTM's cell states,
        ``None`` for other cells and for an LSTM when no gradient is recorded; ``state_n`` (S, B, H), the state
        after the last step. In held steps `hidden` is the carried state: a layer that wants 0 there masks it.

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed.
    """
    check(gates_x, weight_hh, bias_hh, state0, control, cell)
    if torch.is_grad_enabled() and (
        gates_x.requires_grad
        or weight_hh.requires_grad
        or state0.requires_grad
        or (bias_hh is not None and bias_hh.requires_grad)
    ):
        outputs = _Recurrence.apply(gates_x, weight_hh, bias_hh, state0, control, cell, reverse)
        return outputs[0], outputs[1] if len(outputs) == 3 else None, outputs[-1]
    states, state_n, _ = forward_op(gates_x, weight_hh, bias_hh, state0, control, cell, reverse, False)
    return _step_states(states, reverse)[0], None, state_n
