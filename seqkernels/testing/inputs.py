"""Random inputs of the contracts, in every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS, CONSTANTS, DETACH, DTYPES, HOLD, RESET, Weights, accumulate_dtype

#: Layouts of `lay_out`.
LAYOUTS = ("contiguous", "strided", "swapped", "transposed", "sliced", "expanded", "scalar")

#: Optional tensors of the recurrence that an LSTM has; all cells but for the last two.
OPTIONS = (
    *(n for n in Weights._fields if n not in ("weight_hh", "bias_hh", "peephole", "norm_c")),
    *("peephole", "norm_c"),
)

#: Options of attention beside its mask and bias, as `seqkernels.scores.Scores.features` names them.
ATTENTION_OPTIONS = (
    "alibi",
    "bottom_right",
    "causal",
    "dropout",
    "key_lengths",
    "sink",
    "softcap",
    "varlen",
    "window",
)


class RecurrenceInputs(NamedTuple):
    """The positional tensors of `seqkernels.ops.recurrence.recurrence`, in its order."""

    input: Tensor
    weight_hh: Tensor
    bias_hh: Tensor | None
    state0: Tensor
    control: Tensor | None


class AttentionInputs(NamedTuple):
    """The tensors of `seqkernels.ops.attention.attention`, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None


def lay_out(x: Tensor, layout: str) -> Tensor:
    """`x` with other strides, in memory whose other elements are NaN (1 for integers).

    Args:
        x: any tensor.
        layout: ``"contiguous"``; ``"strided"``, every second element of the last dimension; ``"swapped"``, second and
            third dimension from the right swapped in memory; ``"transposed"``, all dimensions reversed in memory;
            ``"sliced"``, the inside of a larger tensor; ``"expanded"``, one row repeated along the first dimension
            with stride 0; ``"scalar"``, one element repeated with strides 0. The last two change the values.

    Raises:
        ValueError: `layout` is none of these.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r} is not one of {', '.join(map(repr, LAYOUTS))}")
    other = torch.nan if x.is_floating_point() else 1
    last = x.dim() - 1
    if layout == "contiguous" or x.dim() == 0:
        return x.contiguous()
    if layout == "strided":
        return x.new_full((*x.shape[:-1], 2 * x.shape[last]), other)[..., ::2].copy_(x)
    if layout == "swapped" and x.dim() > 2:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout in ("swapped", "transposed"):
        reverse = tuple(range(last, -1, -1))
        return x.permute(reverse).contiguous().permute(reverse)
    if layout == "sliced":
        whole = x.new_full([size + 3 for size in x.shape], other)
        return whole[tuple(slice(1, 1 + size) for size in x.shape)].copy_(x)
    if x.numel() == 0:
        return x.contiguous()
    one = x[:1] if layout == "expanded" else x.flatten()[:1].view((1,) * x.dim())
    return one.clone().expand(x.shape)


def draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normally distributed numbers, rounded to float32 and `dtype`."""
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def recurrence_inputs(
    cell: str,
    steps: int,
    batch: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    *,
    input_size: int | None = None,
    bias: bool = True,
    control: bool = False,
    detach: bool = False,
    layout: str = "contiguous",
    requires_grad: bool = True,
    seed: int = 0,
) -> RecurrenceInputs:
    """Random inputs of a recurrence, of the magnitudes of a freshly initialised layer.

    Args:
        cell: a key of `seqkernels.cells.CELLS`.
        steps: T.
        batch: B.
        hidden: H.
        dtype: of all tensors but `control`.
        input_size: I, the size of the input of a recurrence with a ``weight_ih`` (from `recurrence_options`); by
            default the input is the input part of the gates.
        bias: whether there is a ``bias_hh``.
        control: whether there is a ``control``: resets, holds and both at random.
        detach: whether that has detached states too.
        layout: of every tensor, see `lay_out`.
        requires_grad: of the floating point tensors.
        seed: of the generator.

    Raises:
        ValueError, TypeError: `cell`, `dtype` or `layout` is not one of those allowed.
    """
    if cell not in CELLS:
        raise ValueError(f"cell: {cell!r} is not one of {', '.join(map(repr, CELLS))}")
    _check_dtype(dtype)
    generator = torch.Generator().manual_seed(seed)
    gates, states, _ = CELLS[cell]
    rows = gates * hidden
    bits = RESET + HOLD + (DETACH if detach else 0)
    drawn = RecurrenceInputs(
        draw((steps, batch, rows if input_size is None else input_size), generator, dtype),
        draw((rows, hidden), generator, dtype, 0.6 * max(hidden, 1) ** -0.5),
        draw((rows,), generator, dtype, 0.5) if bias else None,
        draw((states, batch, hidden), generator, dtype, 0.5),
        torch.randint(0, bits + 1, (steps, batch), generator=generator, dtype=torch.uint8) if control else None,
    )
    return RecurrenceInputs._make(_finish(drawn, layout, requires_grad))


def recurrence_options(
    cell: str,
    batch: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    *,
    names: Sequence[str],
    input_size: int | None = None,
    layout: str = "contiguous",
    requires_grad: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random values of optional tensors of a recurrence, by the names of its keyword arguments.

    Args:
        cell: a key of `seqkernels.cells.CELLS`.
        batch: B.
        hidden: H.
        dtype: of the tensors, where the contract does not fix another.
        names: of `OPTIONS`.
        input_size: I, for ``weight_ih``.
        layout: of every tensor, see `lay_out`.
        requires_grad: of the tensors that have a gradient.
        seed: of the generator.

    Raises:
        ValueError, TypeError: `cell`, `dtype`, `names` or `layout` is not one of those allowed, or `input_size` is
            missing.
    """
    if cell not in CELLS:
        raise ValueError(f"cell: {cell!r} is not one of {', '.join(map(repr, CELLS))}")
    _check_dtype(dtype)
    for name in names:
        if name not in OPTIONS:
            raise ValueError(f"names: {name!r} is not one of {', '.join(map(repr, OPTIONS))}")
    if input_size is None and "weight_ih" in names:
        raise ValueError("input_size: expected the input size for 'weight_ih', got None")
    size = input_size or 0
    generator = torch.Generator().manual_seed(seed + 1)
    gates, states, _ = CELLS[cell]
    rows = gates * hidden
    makers: dict[str, Callable[[], Tensor]] = {
        "weight_ih": lambda: draw((rows, size), generator, dtype, 0.8 * max(size, 1) ** -0.5),
        "bias_ih": lambda: draw((rows,), generator, dtype, 0.5),
        "reset_state": lambda: draw((states, hidden), generator, dtype, 0.5),
        "peephole": lambda: draw((3, hidden), generator, dtype, 0.5),
        "recurrent_mask": lambda: (torch.rand(batch, hidden, generator=generator) < 0.75).to(dtype) * 1.25,
        "norm_h": lambda: 0.7 + draw((rows,), generator, dtype, 0.2),
        "norm_c": lambda: 0.5 + draw((2, hidden), generator, dtype, 0.2),
        "zoneout": lambda: torch.linspace(0.25, 0.375, 2)[:states],
        "seed": lambda: torch.randint(-(2**62), 2**62, (), generator=generator),
    }
    drawn = {name: lay_out(makers[name](), layout) for name in names}
    return {name: x.requires_grad_(requires_grad and name not in CONSTANTS) for name, x in drawn.items()}


def recurrence_weights(weight_hh: Tensor, bias_hh: Tensor | None = None, **options: Tensor | None) -> Weights:
    """The `weights` of the ops of the recurrence, from the arguments of `seqkernels.ops.recurrence.recurrence`."""
    given: dict[str, Any] = {"weight_ih": None, "weight_hh": weight_hh, "bias_hh": bias_hh, **options}
    return Weights(**given)


def attention_inputs(
    batch: int = 2,
    heads: int = 2,
    queries: int = 5,
    keys: int = 7,
    size: int = 8,
    dtype: torch.dtype = torch.float32,
    *,
    value_size: int | None = None,
    kv_heads: int | None = None,
    mask: str | None = None,
    bias: str | None = None,
    layout: str = "contiguous",
    requires_grad: bool = True,
    seed: int = 0,
) -> AttentionInputs:
    """Random inputs of attention.

    Args:
        batch: B.
        heads: Hq.
        queries: M.
        keys: N.
        size: D.
        dtype: of all tensors but `mask`.
        value_size: Dv; D by default.
        kv_heads: Hk; Hq by default.
        mask: four characters that say where the mask is broadcast, for example ``"B11N"`` for shape (B, 1, 1, N);
            ``None`` for no mask. Three quarters of it are ``True``.
        bias: likewise.
        layout: of every tensor, see `lay_out`.
        requires_grad: of the floating point tensors.
        seed: of the generator.

    Raises:
        ValueError, TypeError: `mask`, `bias`, `dtype` or `layout` is not one of those allowed.
    """
    _check_dtype(dtype)
    generator = torch.Generator().manual_seed(seed)
    value_size = size if value_size is None else value_size
    kv_heads = heads if kv_heads is None else kv_heads
    full = (batch, heads, queries, keys)
    drawn = AttentionInputs(
        draw((batch, heads, queries, size), generator, dtype),
        draw((batch, kv_heads, keys, size), generator, dtype),
        draw((batch, kv_heads, keys, value_size), generator, dtype),
        None if mask is None else torch.rand(_broadcast("mask", mask, full), generator=generator) < 0.75,
        None if bias is None else draw(_broadcast("bias", bias, full), generator, dtype),
    )
    return AttentionInputs._make(_finish(drawn, layout, requires_grad))


def attention_options(
    names: Sequence[str],
    batch: int = 2,
    heads: int = 2,
    queries: int = 5,
    keys: int = 7,
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "contiguous",
    requires_grad: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Random values of options of attention, by the names of its keyword arguments.

    Args:
        names: of `ATTENTION_OPTIONS`.
        batch: B, with ``"varlen"`` the number of documents; their bounds are drawn among the rows of q and k, so that
            documents may be empty and the first and last rows may belong to none.
        heads: Hq.
        queries: M, with ``"varlen"`` all rows of q.
        keys: N, with ``"varlen"`` all rows of k.
        dtype: of q, k and v.
        layout: of every tensor, see `lay_out`.
        requires_grad: of the sink.
        seed: of the generator.

    Raises:
        ValueError, TypeError: `dtype`, `names` or `layout` is not one of those allowed.
    """
    _check_dtype(dtype)
    for name in names:
        if name not in ATTENTION_OPTIONS:
            raise ValueError(f"names: {name!r} is not one of {', '.join(map(repr, ATTENTION_OPTIONS))}")
    generator = torch.Generator().manual_seed(seed + 2)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    found: dict[str, Any] = {}
    if "varlen" in names:
        for letter, total in (("q", queries), ("k", keys)):
            # Few rows belong to none.
            few = total // 8
            bounds = few + integers(0, total - 2 * few + 1, batch + 1).sort()[0]
            bounds[0] = integers(0, few + 1)
            if batch:
                bounds[-1] = total - integers(0, few + 1)
            starts = lay_out(bounds.to(torch.int32), layout)
            found[f"cu_seqlens_{letter}"] = starts
            longest = int(starts.diff().max()) if batch else 0
            found[f"max_seqlen_{letter}"] = longest + int(integers(0, 3))
        keys = found["max_seqlen_k"]
    if "window" in names:
        # One key alone has gradients of nothing but rounding errors.
        found["left"] = int(integers(1 + keys // 8, 2 + keys // 2))
        found["right"] = int(integers(1 + keys // 8, 2 + keys // 2))
    if "causal" in names:
        found["right"] = 0
    if "bottom_right" in names:
        found["bottom_right"] = True
    if "key_lengths" in names:
        found["key_lengths"] = lay_out(keys - integers(0, keys * 3 // 4 + 1, batch).to(torch.int32), layout)
    if "alibi" in names:
        shape = (batch, heads) if int(integers(0, 2)) else (heads,)
        found["alibi_slopes"] = lay_out(draw(shape, generator, torch.float32, 0.25), layout)
    if "softcap" in names:
        found["softcap"] = 1.25
    if "sink" in names:
        sink = draw((heads,), generator, dtype).to(accumulate_dtype(dtype))
        found["sink"] = lay_out(sink, layout).requires_grad_(requires_grad)
    if "dropout" in names:
        found["dropout_p"] = 0.375
        found["seed"] = integers(-(2**62), 2**62)
    return found


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {DTYPES}, got {dtype}")


def _broadcast(name: str, pattern: str, full: tuple[int, ...]) -> tuple[int, ...]:
    if len(pattern) != 4 or any(have not in ("1", want) for have, want in zip(pattern, "BHMN", strict=True)):
        raise ValueError(f"{name}: expected 'BHMN' with some letters replaced by '1', got {pattern!r}")
    return tuple(1 if letter == "1" else size for letter, size in zip(pattern, full, strict=True))


def _finish(tensors: tuple[Tensor | None, ...], layout: str, requires_grad: bool) -> Iterator[Tensor | None]:
    for x in tensors:
        if x is None:
            yield None
        else:
            yield lay_out(x, layout).requires_grad_(requires_grad and x.is_floating_point())


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A new leaf with the values of `x` in `dtype`, same ``requires_grad``; integers and ``None`` stay as they are."""
    if x is None or not x.is_floating_point():
        return x
    return x.detach().to(dtype).requires_grad_(x.requires_grad)
