"""Where the sequences of a batch lie in the (T, B) steps of a recurrence, and what its `control` says of each step.

Every form of input (padded with `lengths`, the rows of a ``PackedSequence``, documents behind one another) becomes
padded steps and one tensor of bits for each direction. All of it is computed on the device of the input, and nothing
waits for a value of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import DETACH, HOLD

INTEGERS = (torch.int32, torch.int64)
#: How many times more steps documents may take as sequences of their own than in joint rows.
_WASTE = 2


class Layout(NamedTuple):
    """Where sequences lie in the padded steps.

    Attributes:
        steps: T.
        batch: B, the number of sequences.
        packed: whether the data are rows (N, ...) instead of padded steps (T, B, ...).
        rows: (N,) int64, the row of the flattened (T*B) steps in which each packed row lies; ``None`` where data are
            padded or fill all steps.
        lengths: (B,) int64; ``None`` where every sequence has T steps.
        hold: (T, B) bool, steps past a sequence's end; ``None`` with `lengths`.
        control: (T, B) uint8, of the forward direction, or ``None``.
        control_reverse: the same of the reverse direction.
        ends: where the B rows hold several documents each, the first and the last step of every document, (N_docs,)
            rows of the flattened (T*B) steps, and whether it has steps, (N_docs,) bool.
        counts: with `ends`, how many steps of its document lie before and behind each step, (T, B) int64 each.
    """

    steps: int
    batch: int
    packed: bool = False
    rows: Tensor | None = None
    lengths: Tensor | None = None
    hold: Tensor | None = None
    control: Tensor | None = None
    control_reverse: Tensor | None = None
    ends: tuple[Tensor, Tensor, Tensor] | None = None
    counts: tuple[Tensor, Tensor] | None = None

    def pad(self, x: Tensor) -> Tensor:
        """Data in their own form as steps (T, B, F); past the ends 0 or, of padded data, what lies there."""
        if self.rows is not None:
            steps = x.new_zeros(self.steps * self.batch, *x.shape[1:]).index_copy_(0, self.rows, x)
            return steps.view(self.steps, self.batch, *x.shape[1:])
        if self.packed:
            return x.reshape(self.steps, self.batch, *x.shape[1:])
        return x

    def clear(self, x: Tensor) -> Tensor:
        """Padded steps (T, B, ...) with 0 past the ends, whatever lies there."""
        if self.hold is None:
            return x
        return x.masked_fill(self.hold.view(self.steps, self.batch, *[1] * (x.dim() - 2)), 0)

    def restore(self, x: Tensor) -> Tensor:
        """Steps (T, B, ...) in the form of the data, 0 past the ends."""
        if self.packed:
            rows = x.flatten(0, 1)
            return rows if self.rows is None else rows.index_select(0, self.rows)
        return self.clear(x)

    def first(self, reverse: bool) -> Tensor | None:
        """(B,) row of the flattened (T*B) steps in which a direction meets each sequence first.

        ``None`` where it is the first, or last, step of all. A sequence without steps gets its first, held step.
        """
        if not reverse or self.lengths is None:
            return None
        row = torch.arange(self.batch, device=self.lengths.device)
        return (self.lengths - 1).clamp(min=0) * self.batch + row


def require(holds: Tensor, values: Tensor, text: str, error: type[Exception] = ValueError) -> None:
    """Raise unless all of `holds` is true, where its values are and without waiting for them.

    Args:
        holds: bool, of any shape.
        values: of an argument, for the message where they are at hand.
        text: names the argument and what is allowed.
        error: what to raise; on other devices and in compiled programs it is torch's.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(holds.all(), text)
        return
    try:
        torch._assert_async(_bare(holds).all(), text)
    except RuntimeError as found:
        if text not in str(found):
            raise
        raise error(f"{text}, got {_bare(values).tolist()}") from None


def _bare(x: Tensor) -> Tensor:
    """The tensor within those that ``torch.func`` has wrapped: of ``vmap`` all of its samples."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def padded(x: Tensor, lengths: Tensor | None) -> Layout:
    """The layout of steps (T, B, ...) of which sequence b has the first ``lengths[b]``."""
    steps, batch = x.shape[0], x.shape[1]
    if lengths is None:
        return Layout(steps, batch)
    if lengths.shape != (batch,) or lengths.dtype not in INTEGERS or lengths.device != x.device:
        raise ValueError(
            f"lengths: expected ({batch},) torch.int32 or torch.int64 on {x.device},"
            f" got {tuple(lengths.shape)} {lengths.dtype} on {lengths.device}"
        )
    # Checked where the values are, without waiting for them.
    text = "lengths: expected values from 0 to T, the steps of the input"
    require((lengths >= 0) & (lengths <= steps), lengths, text, RuntimeError)
    lengths = lengths.to(torch.int64)
    return Layout(steps, batch, lengths=lengths, hold=_past(steps, lengths))


def packed(x: Tensor, batch_sizes: Tensor) -> Layout:
    """The layout of the rows (N, ...) of a ``PackedSequence``; `batch_sizes` is on the CPU and was checked."""
    steps, batch = batch_sizes.shape[0], int(batch_sizes[0])
    if int(batch_sizes[-1]) == batch:
        return Layout(steps, batch, packed=True)
    valid = torch.arange(batch, device=batch_sizes.device) < batch_sizes.unsqueeze(1)
    rows = valid.flatten().nonzero().squeeze(1)
    rows, valid = rows.to(x.device, non_blocking=True), valid.to(x.device, non_blocking=True)
    return Layout(steps, batch, True, rows, valid.sum(0), valid.logical_not())


def documents(x: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, alone: bool) -> Layout:
    """The layout of documents that lie behind one another in rows (N, ...), from ``cu_seqlens[d]`` on.

    Each is a sequence of its own, unless that would be mostly padding and they need not be `alone`: then rows hold
    several documents, and `control` resets between them.

    Raises:
        ValueError: `cu_seqlens` or `max_seqlen` does not fit.
    """
    if (
        cu_seqlens.dim() != 1
        or not len(cu_seqlens)
        or cu_seqlens.dtype not in INTEGERS
        or cu_seqlens.device != x.device
    ):
        raise ValueError(
            f"cu_seqlens: expected 1 dimension of at least 1 element of torch.int32 or torch.int64 on {x.device},"
            f" got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}"
        )
    starts = cu_seqlens.to(torch.int64)
    lengths, batch, count = starts.diff(), starts.shape[0] - 1, x.shape[0]
    if max_seqlen is None:
        if starts.device.type != "cpu" or torch.compiler.is_compiling():
            raise ValueError(
                "max_seqlen: the length of the longest document is needed where cu_seqlens is not on the CPU and in"
                " compiled programs, which may not wait for its values"
            )
        max_seqlen = int(lengths.max()) if batch else 0
    elif isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 0:
        raise ValueError(f"max_seqlen: expected an integer of at least 0, got {max_seqlen!r}")
    # No document is longer than all rows, whose number a bound may exceed by far.
    max_seqlen = min(max_seqlen, count)
    text = "cu_seqlens: expected to ascend from 0 to N, the rows of the input, in steps of at most max_seqlen"
    fits = torch.cat((starts[:1] == 0, starts[-1:] == count, lengths >= 0, lengths <= max_seqlen))
    require(fits, starts, text, RuntimeError)
    steps = max(max_seqlen, 1)
    row = torch.arange(count, device=x.device)
    document = torch.searchsorted(starts, row, right=True) - 1
    before = row - starts.index_select(0, document)
    # Rows of two windows of `steps`, each for the documents that begin in its first window.
    windows = -(-count // steps)
    if alone or count == 0 or batch <= _WASTE * 2 * windows:
        return Layout(steps, batch, True, before * batch + document, lengths, _past(steps, lengths))
    window = (row - before) // steps
    rows = (row - window * steps) * windows + window
    behind = lengths.index_select(0, document) - 1 - before

    def spread(values: Tensor, otherwise: int) -> Tensor:
        steps_of_rows = values.new_full((2 * steps * windows,), otherwise)
        return steps_of_rows.index_copy_(0, rows, values).view(2 * steps, windows)

    hold = spread(torch.zeros_like(row), 1).bool()
    begin, end = (rows.index_select(0, at.clamp(0, count - 1)) for at in (starts[:-1], starts[1:] - 1))
    return Layout(
        2 * steps,
        windows,
        True,
        rows,
        hold=hold,
        ends=(begin, end, lengths > 0),
        counts=(spread(before, -1), spread(behind, -1)),
    )


def _past(steps: int, lengths: Tensor) -> Tensor:
    return torch.arange(steps, device=lengths.device).unsqueeze(1) >= lengths


def check_reset(reset: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise the error that names what does not fit of a `reset` that should have `shape`."""
    if not isinstance(reset, Tensor) or reset.dtype not in (torch.bool, torch.uint8):
        raise TypeError(
            "reset: expected a Tensor of torch.bool or torch.uint8,"
            f" got {reset.dtype if isinstance(reset, Tensor) else type(reset).__name__}"
        )
    if reset.shape != shape or reset.device != device:
        raise ValueError(f"reset: expected {shape} on {device}, got {tuple(reset.shape)} on {reset.device}")


def controlled(
    layout: Layout, reset: Tensor | None, tbptt: int | None, bidirectional: bool, device: torch.device
) -> Layout:
    """`layout` with the `control` of each direction.

    Args:
        layout: of the sequences.
        reset: (T, B) bool or uint8: a document begins here. Past a sequence's end it says nothing.
        tbptt: gradients stop before every step of this multiple, counted in each direction from where it begins.
        bidirectional: whether the reverse direction is needed.
        device: of the steps.
    """
    # Of any int: what goes beyond all steps has no effect.
    tbptt = None if tbptt is None else min(tbptt, 2**62)
    if layout.counts is not None:
        # The first step that a direction meets of a document is a reset.
        directions = [(count.eq(0).view(torch.uint8), count) for count in layout.counts]
        control, control_reverse = (_bits(layout, flags, step, tbptt) for flags, step in directions)
        return layout._replace(control=control, control_reverse=control_reverse)
    flags = None
    if reset is not None:
        flags = (reset if reset.dtype == torch.bool else reset.ne(0)).view(torch.uint8)
        if layout.hold is not None:
            flags = flags.masked_fill(layout.hold, 0)
    step = None if tbptt is None else torch.arange(layout.steps, device=device).unsqueeze(1)
    control = _bits(layout, flags, step, tbptt)
    if not bidirectional:
        return layout._replace(control=control)
    if flags is not None:
        # Backwards a document is entered at its last step, the one before the next document begins.
        flags = torch.cat((flags[1:], torch.zeros_like(flags[:1])))
    if step is not None:
        step = (layout.steps if layout.lengths is None else layout.lengths) - 1 - step
    return layout._replace(control=control, control_reverse=_bits(layout, flags, step, tbptt))


def _bits(layout: Layout, flags: Tensor | None, step: Tensor | None, tbptt: int | None) -> Tensor | None:
    """RESET where `flags` is 1, DETACH by `step`, and nothing but HOLD past the ends; (T, B) or ``None``."""
    if step is not None and tbptt is not None:
        detach = ((step > 0) & (step % tbptt == 0)).to(torch.uint8) * DETACH
        flags = detach if flags is None else flags | detach
    if layout.hold is not None:
        held = layout.hold.to(torch.uint8) * HOLD
        flags = held if flags is None else torch.where(layout.hold, held, flags)
    return None if flags is None else flags.expand(layout.steps, layout.batch).contiguous()
