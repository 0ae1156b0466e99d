"""Through time one step after the other: a product of torch and a launch each. Serves every call."""

from __future__ import annotations

import triton
from torch import Tensor

from ...cells import RESET
from .._through_time import Gradients, Loop, entering, product
from . import recurrence_kernels as kernels
from .launches import Launch
from .recurrence_configs import cell_constants, step_tiles


def forward(loop: Loop, carry: Tensor, states: Tensor, reserve: Tensor | None, begin: int, end: int, base: int) -> None:
    """The steps [begin, end), as in `Path.forward`."""
    order = loop.order(begin, end)
    weight = loop.weight_hh.t()
    control = None if loop.control is None else loop.control[order[0] : order[0] + 1]
    first = states[:1, order[0] - base + loop.reverse]
    fed = entering(first, control, loop.parts, RESET)[0].contiguous()
    written = None if loop.control is None and loop.parts.recurrent_mask is None else fed.clone()
    tiles = step_tiles(loop.hidden, loop.parts.norm_h is not None or loop.parts.norm_c is not None)
    grid = (triton.cdiv(loop.batch, tiles.rows), triton.cdiv(loop.hidden, tiles.columns))
    constants = {
        **cell_constants(loop.cell, loop.hidden),
        "EVERY_STATE": states.shape[0] > 1,
        "BLOCK_B": tiles.rows,
        "BLOCK_H": tiles.columns,
    }
    launch = Launch(kernels.step_forward_kernel, grid, constants, {"num_warps": tiles.warps})
    for k, t in enumerate(order):
        found = product(fed, weight)
        launch(
            loop.gates_x,
            found,
            carry,
            states,
            reserve,
            written,
            loop.control,
            loop.parts,
            loop.batch,
            t,
            order[k + 1] if k + 1 < len(order) else -1,
            base,
            int(loop.reverse),
            states.stride(0),
        )
        fed = states[0, t - base + 1 - loop.reverse] if written is None else written


def backward(
    loop: Loop, grads: Gradients, carry: Tensor, states: Tensor, reserve: Tensor, begin: int, end: int, base: int
) -> None:
    """Back through the steps [begin, end), as in `Path.backward`."""
    to_product = grads.to_product()
    tiles = step_tiles(loop.hidden, loop.parts.norm_h is not None or loop.parts.norm_c is not None)
    grid = (triton.cdiv(loop.batch, tiles.rows), triton.cdiv(loop.hidden, tiles.columns))
    constants = {**cell_constants(loop.cell, loop.hidden), "BLOCK_B": tiles.rows, "BLOCK_H": tiles.columns}
    options = {"num_warps": tiles.warps}
    # Nothing is sent to the first step, and the last launch is none.
    first, inner, last = (
        Launch(kernels.step_backward_kernel, grid, constants | {"STEP": step}, options) for step in (True, True, False)
    )
    sent, after = None, -1
    for t in (*reversed(loop.order(begin, end)), -1):
        launch = last if t < 0 else first if sent is None else inner
        launch(
            carry,
            sent,
            grads.hidden,
            grads.cells,
            grads.gates,
            states,
            reserve,
            loop.gates_x,
            grads.product,
            grads.of_x,
            grads.of_u,
            grads.of_product,
            loop.control,
            loop.parts,
            grads.sums,
            loop.batch,
            t,
            after,
            base,
            int(loop.reverse),
            states.stride(0),
        )
        if t >= 0:
            sent, after = product(to_product[t], loop.weight_hh), t
