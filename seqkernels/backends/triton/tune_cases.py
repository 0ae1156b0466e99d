"""What `tune` measures: a call for each row of the tables of tiles, and which tiles are near another."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...cells import CELLS, HOLD, RESET, Weights
from ...scores import Scores
from . import attention, recurrence, tiles
from .configs import ROOMY, blocks_of, products
from .recurrence_configs import sequence_tiles, shared_memory
from .tiles import Tile

#: A call, or some, and the results.
Run = Callable[[], list[Tensor]]

_MANY = " of many terms"
_QKV = tuple[Tensor, Tensor, Tensor]


class Prepared(NamedTuple):
    """A case with its tensors on a device.

    Attributes:
        timed: the call that is measured.
        checked: calls with the options that need most of a program, whose results are compared too.
    """

    timed: Run
    checked: Run


class Case(NamedTuple):
    """A row of the tables.

    Attributes:
        row: its name, see `tiles`.
        eps: of the numbers that are multiplied.
        shipped: its tile on a device without own ones.
        near: tiles that may be better than one, other than it.
        prepare: makes tensors on a device.
    """

    row: str
    eps: float
    shipped: Callable[[torch.device], Tile]
    near: Callable[[Tile], Sequence[Tile]]
    prepare: Callable[[torch.device], Prepared]


class Sizes(NamedTuple):
    """How large the measured calls are: enough for a GPU to be busy with, for longer than a launch takes.

    Attributes:
        batch: B of attention.
        width: heads times their size.
        length: queries and keys.
        cached: batch entries and keys of few queries.
        rows: B of recurrences.
        steps: T.
    """

    batch: int = 4
    width: int = 1024
    length: int = 2048
    cached: tuple[int, int] = (8, 8192)
    rows: int = 64
    steps: int = 128


def _around(n: int, least: int, most: int) -> list[int]:
    return [m for m in (n // 2, 2 * n) if least <= m <= most]


def near_attention(tile: Tile, few: bool = False) -> Sequence[Tile]:
    """Tiles of attention with half or twice the rows, keys or warps of another, or a stage more or less.

    Args:
        tile: rows, keys, warps and stages.
        few: whether the rows stay what they are, since there are no more.
    """
    m, n, warps, stages = tile
    rows, keys = [] if few else _around(m, 16, 256), _around(n, 16, 256)
    found = [(x, n, warps, stages) for x in rows] + [(m, x, warps, stages) for x in keys]
    # As many scores, in another form.
    found += [(x, m * n // x, warps, stages) for x in rows if m * n // x in keys]
    found += [(m, n, x, stages) for x in _around(warps, 2, 16)]
    return found + [(m, n, warps, x) for x in (stages - 1, stages + 1) if 1 <= x <= 5]


def near_recurrence(tile: Tile, hidden: int, resident: bool) -> Sequence[Tile]:
    """Tiles of a recurrence with half or twice the rows, columns, depth or warps of another, or a load more or less.

    Args:
        tile: rows, columns, depth, ahead and warps.
        hidden: H.
        resident: whether the weights stay, so that loads go ahead.
    """
    rows, columns, depth, ahead, warps = tile
    found = [(x, columns, depth, ahead, warps) for x in _around(rows, 16, 128)]
    found += [(rows, x, depth, ahead, warps) for x in _around(columns, 16, max(hidden, 16))]
    found += [(rows, columns, x, ahead, warps) for x in _around(depth, 16, max(hidden, 16))]
    if resident:
        found += [(rows, columns, depth, x, warps) for x in (ahead - 1, ahead + 1) if 0 <= x <= 15]
    return found + [(rows, columns, depth, ahead, x) for x in _around(warps, 2, 16)]


def _random(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def _every_term(q: Tensor, keys: int, plain: Scores, bias: Tensor) -> Scores:
    """`plain` with everything that may go into scores."""
    batch, heads, queries, _ = q.shape
    slopes = torch.linspace(0.01, 0.1, heads, device=q.device)
    mask = _random(q.device, torch.float32, batch, 1, queries, keys) > -1.0
    seed = torch.tensor(12345, device=q.device)
    return plain._replace(
        mask=mask,
        bias=bias,
        alibi_slopes=slopes,
        softcap=30.0,
        dropout_p=0.1,
        seed=seed,
        left=keys // 2,
        right=keys // 2,
    )


def _attention(
    kernel: str, dtype: torch.dtype, size: int, precision: str, sizes: Sizes, device: torch.device
) -> Prepared:
    few, many = kernel.startswith("few_rows"), kernel.endswith(_MANY) or kernel == "backward_bias"
    heads = max(sizes.width // size, 1)
    batch, keys = sizes.cached if few else (sizes.batch, sizes.length)
    # Of few queries, the heads of a group share the rows of a tile.
    q_heads, queries = (4 * heads, 1) if few else (heads, keys)
    draw = functools.partial(_random, device, dtype)
    q, k, v = (
        draw(batch, q_heads, queries, size),
        draw(batch, heads, keys, size),
        draw(batch, heads, keys, size).flip(2),
    )
    plain = Scores(1 / math.sqrt(size), precision=precision)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
    lengths[0] = keys // 2 + 1
    bounded = plain._replace(left=keys // 2, right=0, bottom_right=True, key_lengths=lengths)
    # One for all batch entries, and of the whole shape, whose gradient goes with that of q.
    bias, whole = draw(1, q_heads, queries, keys), draw(min(batch, 2), q_heads, queries, keys)
    every = functools.partial(_every_term, keys=keys)
    two = q[: whole.shape[0]], k[: whole.shape[0]], v[: whole.shape[0]]
    # Worth as much as the keys: without one, the gradients of a row's scores add up to zero, but for errors.
    sink = torch.full((q_heads,), math.log(keys), device=device)
    if many:
        timed = [plain._replace(bias=bias, right=-1 if few else 0)]
        checked = [(two, every(two[0], plain=plain, bias=whole)), ((q, k, v), plain._replace(bias=bias))]
    else:
        timed = [plain] if few else [plain, plain._replace(right=0)]
        checked = [((q, k, v), bounded)]
    if kernel == "backward_bias":
        sums = [draw(batch, q_heads, 1, keys), draw(batch, q_heads, queries, 1), draw(1, 1, 1, 1)]
        checked = [((q, k, v), every(q, plain=plain, bias=x)) for x in (bias, *sums)]
    checked = [(x, scores._replace(sink=sink)) for x, scores in checked]
    if kernel.startswith(("forward", "few_rows")):
        checked += [_paged(x, scores) for x, scores in checked]

        def forward(given: _QKV, scores: Scores) -> list[Tensor]:
            return list(attention.attention_forward(*given, scores))

        return Prepared(
            lambda: [x for scores in timed for x in forward((q, k, v), scores)],
            lambda: [x for given, scores in checked for x in forward(given, scores)],
        )
    needs = {"backward_q": (True, False, False, True), "backward_kv": (False, True, True, False)}
    wanted = needs.get(kernel.removesuffix(_MANY), (False, False, False, True))

    def back(given: _QKV, scores: Scores, wanted: tuple[bool, ...]) -> Run:
        found = attention.attention_forward(*given, scores)
        grad = draw(*found[0].shape)
        return lambda: [
            x for x in attention.attention_backward(grad, None, *given, *found, scores, wanted) if x.numel()
        ]

    # A bias that is broadcast has a kernel of its own, which is not that of q.
    q_alone = (True, False, False, False) if wanted[0] else wanted
    runs = [back((q, k, v), scores, q_alone) for scores in timed]
    checks = [back(x, y, wanted if wanted[3] and (x is two or not wanted[0]) else q_alone) for x, y in checked]
    return Prepared(lambda: [x for run in runs for x in run()], lambda: [x for run in checks for x in run()])


def _paged(given: _QKV, scores: Scores) -> tuple[_QKV, Scores]:
    """The same call with keys and values in pages."""
    q, k, v = given
    batch, heads, keys, size = k.shape
    page = next(x for x in (16, 10, 5, 1) if keys % x == 0)

    def pages(x: Tensor) -> Tensor:
        return x.unflatten(2, (keys // page, page)).transpose(1, 2).reshape(-1, heads, page, size)

    table = torch.arange(batch * keys // page, dtype=torch.int32, device=q.device).view(batch, -1)
    return (q, pages(k), pages(v)), scores._replace(block_table=table)


def _eps(dtype: torch.dtype, precision: str) -> float:
    return 2.0**-10 if precision == "tf32" else torch.finfo(dtype).eps


def attention_case(
    kernel: str, dtype: torch.dtype, size: int, sizes: Sizes | None = None, precision: str = "ieee"
) -> Case:
    """The case of a row of attention.

    Args:
        kernel: a row of the tables of `configs`.
        dtype: of q, k and v.
        size: D and Dv.
        sizes: of the call; those for a GPU by default.
        precision: of products of float32 matrices.
    """
    few = kernel.startswith("few_rows")

    def shipped(device: torch.device) -> Tile:
        architecture, shared = attention.limits(device) if device.type == "cuda" else (90, ROOMY)
        plain = kernel.removesuffix(_MANY)
        many = plain != kernel
        found = blocks_of(
            plain,
            dtype,
            size,
            size,
            many_terms=many,
            precision=precision,
            architecture=architecture,
            shared=shared,
        )
        return found.m, found.n, found.warps, found.stages

    return Case(
        tiles.attention_row(kernel, dtype, size, precision),
        _eps(dtype, precision),
        shipped,
        functools.partial(near_attention, few=few),
        functools.partial(_attention, kernel, dtype, size, precision, sizes or Sizes()),
    )


def _recurrence(
    kernel: str, cell: str, dtype: torch.dtype, hidden: int, precision: str, sizes: Sizes, device: torch.device
) -> Prepared:
    gates, states, _ = CELLS[cell]
    steps, batch = sizes.steps, sizes.rows
    draw = functools.partial(_random, device, dtype)
    weight = draw(gates * hidden, hidden, scale=0.6 * hidden**-0.5)
    x, state0 = draw(steps, batch, gates * hidden), draw(states, batch, hidden, scale=0.5)
    plain = Weights(None, weight, None, draw(gates * hidden, scale=0.5))
    every = plain._replace(
        reset_state=draw(states, hidden, scale=0.5),
        peephole=draw(3, hidden, scale=0.5) if cell == "lstm" else None,
        recurrent_mask=(draw(batch, hidden) > 0).to(dtype) * 2,
        zoneout=torch.full((states,), 0.25, device=device),
        seed=torch.tensor(12345, device=device),
    )
    bits = torch.arange(steps * batch, device=device) % 7
    control = (RESET * (bits == 3) + HOLD * (bits == 5)).to(torch.uint8).view(steps, batch)
    calls = [(plain, None, False), (every, control, True)]

    def fits() -> None:
        # What does not is run step by step, which is not what is measured.
        if device.type == "cuda":
            needed, limit = shared_memory(cell, dtype, hidden, precision, device=device), attention.limits(device)[1]
            if needed > limit:
                raise triton.OutOfResources(needed, limit, "shared memory")

    def forward(weights: Weights, control: Tensor | None, reverse: bool) -> list[Tensor]:
        fits()
        found = recurrence.recurrence_forward(x, weights, state0, control, cell, reverse, True, 0, precision)
        return list(found[:2] if control is not None else found)

    if kernel == "forward":
        return Prepared(lambda: forward(*calls[0]), lambda: forward(*calls[1]))
    grads = [draw(steps, batch, hidden), None, draw(states, batch, hidden), None]

    def back(weights: Weights, control: Tensor | None, reverse: bool) -> Run:
        every_state, _, reserve = recurrence.recurrence_forward(
            x, weights, state0, control, cell, reverse, True, 0, precision
        )
        # Of weights no product over all steps, which is not the kernel's.
        summed = ("peephole", "reset_state")
        needs = [True, True, *(name in summed and y is not None for name, y in weights._asdict().items())]

        def run() -> list[Tensor]:
            fits()
            found = recurrence.recurrence_backward(
                grads, x, weights, every_state, reserve, control, cell, reverse, needs, 0, precision
            )
            return [y for y in found if y.numel()]

        return run

    return Prepared(back(*calls[0]), back(*calls[1]))


def recurrence_case(
    kernel: str, cell: str, dtype: torch.dtype, hidden: int, sizes: Sizes | None = None, precision: str = "ieee"
) -> Case:
    """The case of a row of a recurrence.

    Args:
        kernel: ``"forward"`` or ``"backward"``.
        cell: a key of `seqkernels.cells.CELLS`.
        dtype: of the input.
        hidden: H.
        sizes: of the call; those for a GPU by default.
        precision: of products of float32 matrices.
    """
    found = sequence_tiles(kernel, cell, dtype, hidden, precision)
    tile = tuple(getattr(found, name) for name in tiles.RECURRENCE)
    return Case(
        tiles.recurrence_row(kernel, cell, dtype, hidden, precision),
        _eps(dtype, precision),
        lambda device: tile,
        functools.partial(near_recurrence, hidden=hidden, resident=found.resident),
        functools.partial(_recurrence, kernel, cell, dtype, hidden, precision, sizes or Sizes()),
    )


def cases() -> Iterator[Case]:
    """Every row of the tables, those of 16-bit numbers and common sizes first."""
    kernels = [f"{name}{more}" for name in ("forward", "backward_q", "backward_kv", "few_rows") for more in ("", _MANY)]
    kinds = [(dtype, "ieee") for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    for dtype, precision in (*kinds, (torch.float32, "tf32"), (torch.float32, "tf32x3")):
        for size in (128, 64, 256, 512):
            if products(dtype, precision, size, size) != precision:
                continue
            for kernel in (*kernels, "backward_bias"):
                yield attention_case(kernel, dtype, size, precision=precision)
        for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            for hidden in (256, 512, 1024, 128, 64):
                for way in ("forward", "backward"):
                    yield recurrence_case(way, cell, dtype, hidden, precision=precision)
