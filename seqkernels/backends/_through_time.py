"""What a recurrence does around its loop over time, whatever runs the loop: a backend of GPU kernels shares all this.

Products over all steps are torch's: the input part of the gates before the loop, the gradients of weights after it. The
loop itself is a `Path`, which a backend brings, and which is given one segment of steps after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..cells import CELLS, HOLD, RESET, Weights, accumulate_dtype
from ..precision import torch_products


class Parts(NamedTuple):
    """Tensors of `seqkernels.cells.Weights` that work on elements, contiguous; ``None`` for what a call lacks."""

    bias_ih: Tensor | None
    bias_hh: Tensor | None
    reset_state: Tensor | None
    peephole: Tensor | None
    recurrent_mask: Tensor | None
    norm_h: Tensor | None
    norm_c: Tensor | None
    zoneout: Tensor | None
    seed: Tensor | None


class Sums(NamedTuple):
    """Gradients that are sums over the steps, float32, of each row of the batch apart; ``None`` if not wanted."""

    reset_state: Tensor | None  # (S, B, H)
    peephole: Tensor | None  # (3, B, H)
    norm_h: Tensor | None  # (G, B, H)
    norm_c: Tensor | None  # (2, B, H)


class Loop(NamedTuple):
    """The tensors of a call that every step reads, contiguous.

    Attributes:
        gates_x: (T, B, G*H), without `bias_ih`; ``None`` where no step needs it.
        weight_hh: (G*H, H).
        control: (T, B) or ``None``.
        parts: what works on elements.
        cell: as in the contract.
        reverse: as in the contract.
        steps: T.
        batch: B.
        hidden: H.
        precision: of products of float32 matrices.
    """

    gates_x: Tensor | None
    weight_hh: Tensor
    control: Tensor | None
    parts: Parts
    cell: str
    reverse: bool
    steps: int
    batch: int
    hidden: int
    precision: str = "ieee"

    def order(self, begin: int, end: int) -> range:
        """Steps [begin, end) in the order of the loop."""
        return range(end - 1, begin - 1, -1) if self.reverse else range(begin, end)

    def has_work(self, begin: int, end: int) -> bool:
        """Whether steps [begin, end) have any element."""
        return begin < end and self.batch > 0 and self.hidden > 0


class Gradients(NamedTuple):
    """Gradients that go into a loop, and those that it makes.

    Attributes:
        hidden: (T, B, H) or ``None``.
        cells: (T, B, H) or ``None``.
        gates: (T, B, G, H) or ``None``.
        product: (T, B, G*H), float32, the recurrent product of all steps, where a step needs it.
        of_x: (T, B, G*H), written.
        of_u: likewise, where it is another than `of_x`.
        of_product: likewise, where it is another than `of_u`.
        sums: written.
    """

    hidden: Tensor | None
    cells: Tensor | None
    gates: Tensor | None
    product: Tensor | None
    of_x: Tensor
    of_u: Tensor | None
    of_product: Tensor | None
    sums: Sums

    def to_product(self) -> Tensor:
        """The gradient of the recurrent product (T, B, G*H)."""
        found = self.of_u if self.of_product is None else self.of_product
        return self.of_x if found is None else found


class Path(Protocol):
    """What runs a part of the loop. It is called for no part that is empty."""

    def forward(
        self, loop: Loop, carry: Tensor, states: Tensor, reserve: Tensor | None, begin: int, end: int, base: int
    ) -> None:
        """The steps [begin, end).

        Args:
            loop: of the call.
            carry: (S, B, H), float32, the states before the steps; those after them are written to it.
            states: (S or 1, n+1, B, H), whose row ``t - base`` is for the state before step t in time.
            reserve: (n, B, 4, H), float32, whose row ``t - base`` is for step t, or ``None``.
            begin: first step in time.
            end: the one behind the last.
            base: see `states`.
        """

    def backward(
        self,
        loop: Loop,
        grads: Gradients,
        carry: Tensor,
        states: Tensor,
        reserve: Tensor,
        begin: int,
        end: int,
        base: int,
    ) -> None:
        """Back through the steps [begin, end).

        Args:
            loop: of the call.
            grads: of the call.
            carry: (S, B, H), float32, the gradients of the states after the steps; those of the states before them are
                written to it.
            states, reserve, begin, end, base: as in `forward`.
        """


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices, float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda and a.numel() and b.numel():
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices, rounded to their dtype at the end alone."""
    return torch.mm(a, b) if a.is_cuda else product(a, b).to(a.dtype)


def entering(h: Tensor, control: Tensor | None, parts: Parts, reset: int) -> Tensor:
    """What enters the recurrent product of steps.

    Args:
        h: (n, B, H), the hidden states before them.
        control: (n, B) of them, or ``None``.
        parts: of the loop.
        reset: the bit of a reset.
    """
    if control is not None:
        at = (control & reset).bool().unsqueeze(2)
        h = h.masked_fill(at, 0) if parts.reset_state is None else torch.where(at, parts.reset_state[0], h)
    return h if parts.recurrent_mask is None else h * parts.recurrent_mask


@contextlib.contextmanager
def as_given(x: Tensor, precision: str) -> Iterator[None]:
    """No gradients, autocast or flags, since the op has all from its arguments; launches go to their device."""
    device = x.device
    with torch.no_grad(), torch_products(precision, x), contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if torch.amp.is_autocast_available(device.type) and torch._C._is_any_autocast_enabled():
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _parts(weights: Weights) -> Parts:
    return Parts._make(None if x is None else x.contiguous() for x in (getattr(weights, n) for n in Parts._fields))


def gates_x(input: Tensor, weights: Weights) -> Tensor:
    """The input part of the gates (T, B, G*H) without its bias; in held steps anything."""
    if weights.weight_ih is None:
        return input.contiguous()
    steps, batch, size = input.shape
    return product(input.reshape(steps * batch, size), weights.weight_ih.t()).view(
        steps, batch, weights.weight_hh.shape[0]
    )


def _segments(steps: int, every: int, reverse: bool) -> list[tuple[int, int]]:
    """Begin and end in time of each segment of `every` steps, in the order of the loop; one of all if 0."""
    size = every or max(steps, 1)
    ends = [(first, min(first + size, steps)) for first in range(0, steps, size)]
    return [(steps - end, steps - first) for first, end in ends] if reverse else ends


class ForwardPass:
    """A recurrence whose loop is run one part after the other.

    Args:
        gates_x: (T, B, G*H), the input part of the gates without its bias; of steps that are not run yet anything.
        weights, state0, control, cell, reverse, save, every, precision: as in the contract.

    Attributes:
        loop: its tensors.
        carry: (S, B, H), float32, the states after the last step that was run.
        states, saved: what the forward op returns.
        reserve: of the steps, or ``None``.
    """

    def __init__(
        self,
        gates_x: Tensor,
        weights: Weights,
        state0: Tensor,
        control: Tensor | None,
        cell: str,
        reverse: bool,
        save: bool,
        every: int = 0,
        precision: str = "ieee",
    ) -> None:
        steps, batch, _ = gates_x.shape
        num_states, _, hidden = state0.shape
        self._every = every = every if save else 0
        acc = accumulate_dtype(state0.dtype)
        self.loop = Loop(
            gates_x,
            weights.weight_hh.contiguous(),
            None if control is None else control.contiguous(),
            _parts(weights),
            cell,
            reverse,
            steps,
            batch,
            hidden,
            precision,
        )
        self.states = state0.new_empty((num_states if save and not every else 1, steps + 1, batch, hidden))
        self.states[:, steps if reverse else 0] = state0[: self.states.shape[0]]
        # A copy even where nothing changes: the loop writes to it.
        self.carry = torch.empty(state0.shape, dtype=acc, device=state0.device).copy_(state0)
        shape = (steps, batch, CELLS[cell].reserve, hidden) if save and not every else (0,)
        self._segments = _segments(steps, every, reverse)
        if every:
            shape = (len(self._segments), num_states, batch, hidden)
        self.saved = torch.empty(shape, dtype=acc, device=state0.device)
        self.reserve = self.saved if save and not every and CELLS[cell].reserve else None

    def hidden(self, begin: int, end: int) -> Tensor:
        """The hidden states after steps [begin, end) (end - begin, B, H), which were run."""
        first = begin + (0 if self.loop.reverse else 1)
        return self.states[0, first : first + end - begin]

    def run(self, path: Path) -> None:
        """All steps, on `path`."""
        for k, (begin, end) in enumerate(self._segments):
            if self._every:
                self.saved[k] = self.carry
            if self.loop.has_work(begin, end):
                path.forward(self.loop, self.carry, self.states, self.reserve, begin, end, 0)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the forward op returns."""
        return self.states, self.carry.to(self.states.dtype), self.saved


def recurrence_forward(
    path: Path,
    input: Tensor,
    weights: Weights,
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    save: bool,
    every: int = 0,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """``seqkernels::recurrence_forward``, whose loop `path` runs."""
    with as_given(input, precision):
        found = ForwardPass(gates_x(input, weights), weights, state0, control, cell, reverse, save, every, precision)
        found.run(path)
        return found.results()


def _given(grad: Tensor | None) -> Tensor | None:
    """`grad`, contiguous; ``None`` where it is zero and has no memory."""
    return None if grad is None or grad._is_zerotensor() else grad.contiguous()


def _sums(weights: Weights, needs: dict[str, bool], batch: int, hidden: int) -> Sums:
    def zeros(name: str) -> Tensor | None:
        x = getattr(weights, name)
        if x is None or not needs[name]:
            return None
        return torch.zeros((max(x.numel() // max(hidden, 1), 1), batch, hidden), dtype=torch.float32, device=x.device)

    return Sums._make(map(zeros, Sums._fields))


class BackwardPass:
    """The gradients of a recurrence, whose loop is run one part after the other.

    Args:
        grads, input, weights, states, reserve, control, cell, reverse, every, precision: as in the contract.
        needs: which gradients are wanted, by the name of what they are of.

    Attributes:
        loop: its tensors.
        grads: that go into the loop, and that it makes.
        carry: (S, B, H), float32, the gradients of the states before the last step that was run.
        states, reserve: as given.
    """

    def __init__(
        self,
        grads: Sequence[Tensor | None],
        input: Tensor,
        weights: Weights,
        states: Tensor,
        reserve: Tensor,
        control: Tensor | None,
        cell: str,
        reverse: bool,
        needs: dict[str, bool],
        every: int = 0,
        precision: str = "ieee",
    ) -> None:
        steps, batch, _ = input.shape
        hidden = states.shape[3]
        num_gates, num_states, num_saved = CELLS[cell]
        dtype, acc = states.dtype, accumulate_dtype(states.dtype)
        parts = _parts(weights)
        control = None if control is None else control.contiguous()
        grad_hidden, grad_cells, grad_state_n, grad_gates = map(_given, grads)
        if num_saved == 0 and grad_gates is not None:
            # The one gate is the hidden state itself.
            own = grad_gates.view(steps, batch, hidden)
            grad_hidden, grad_gates = own if grad_hidden is None else own.to(acc) + grad_hidden, None
        made_again = num_saved == 0 and parts.zoneout is not None
        self.loop = Loop(
            gates_x(input, weights) if every or made_again else None,
            weights.weight_hh.contiguous(),
            control,
            parts,
            cell,
            reverse,
            steps,
            batch,
            hidden,
            precision,
        )
        before = states[0, 1:] if reverse else states[0, :-1]
        self._entered = entering(before, control, parts, RESET).reshape(steps * batch, hidden)
        recurrent = None
        if parts.norm_h is not None or made_again:
            recurrent = product(self._entered, self.loop.weight_hh.t()).view(steps, batch, num_gates * hidden)

        def gradient() -> Tensor:
            return torch.empty((steps, batch, num_gates * hidden), dtype=dtype, device=input.device)

        self.grads = Gradients(
            grad_hidden,
            grad_cells,
            grad_gates,
            recurrent,
            gradient(),
            gradient() if cell == "gru" else None,
            gradient() if parts.norm_h is not None else None,
            _sums(weights, needs, batch, hidden),
        )
        self.carry = torch.zeros((num_states, batch, hidden), dtype=acc, device=input.device)
        if grad_state_n is not None:
            self.carry.copy_(grad_state_n)
        self.states, self.reserve = states, reserve
        self._input, self._weights, self._needs, self._every = input, weights, needs, every
        self._made_again = made_again

    @property
    def backward_loop(self) -> Loop:
        """The loop of the way back, which reads the input part of the gates only where it makes them again."""
        return self.loop if self._made_again else self.loop._replace(gates_x=None)

    def run(self, path: Path) -> None:
        """Back through all steps, on `path`."""
        loop, num_saved = self.loop, CELLS[self.loop.cell].reserve
        num_states = self.carry.shape[0]
        for k, (begin, end) in reversed(list(enumerate(_segments(loop.steps, self._every, loop.reverse)))):
            states, reserve, base = self.states, self.reserve, 0
            if self._every:
                base = begin
                states = self.states.new_empty((num_states, end - begin + 1, loop.batch, loop.hidden))
                reserve = self.reserve.new_empty((end - begin, loop.batch, num_saved, loop.hidden))
                again = self.reserve[k].clone()
                states[:, end - begin if loop.reverse else 0] = again
                if loop.has_work(begin, end):
                    path.forward(loop, again, states, reserve if num_saved else None, begin, end, base)
            if loop.has_work(begin, end):
                path.backward(self.backward_loop, self.grads, self.carry, states, reserve, begin, end, base)

    def results(self) -> list[Tensor]:
        """What the backward op returns, of all steps."""
        found, like = self._found(), (self._input, self.states, *self._weights)
        return [
            self._input.new_empty(0)
            if x is None or not need or name not in found
            else found[name].to(x.dtype).contiguous()
            for (name, need), x in zip(self._needs.items(), like, strict=True)
        ]

    def _found(self) -> dict[str, Tensor]:
        input, weights, needs, control = self._input, self._weights, self._needs, self.loop.control
        found, acc = {"state0": self.carry}, self.carry.dtype
        of_x = self.grads.of_x.flatten(0, 1)
        of_u = of_x if self.grads.of_u is None else self.grads.of_u.view_as(of_x)
        if needs["input"]:
            of_input = of_x if weights.weight_ih is None else rounded_product(of_x, weights.weight_ih)
            found["input"] = of_input.view(input.shape)
        if needs["weight_ih"] and weights.weight_ih is not None:
            seen = input if control is None else input.masked_fill((control & HOLD).bool().unsqueeze(2), 0)
            found["weight_ih"] = product(of_x.t(), seen.reshape(of_x.shape[0], seen.shape[2]))
        if needs["weight_hh"]:
            found["weight_hh"] = product(self.grads.to_product().view_as(of_x).t(), self._entered)
        if needs["bias_ih"]:
            found["bias_ih"] = of_x.sum(0, dtype=acc)
        if needs["bias_hh"]:
            found["bias_hh"] = of_u.sum(0, dtype=acc)
        for name, rows in self.grads.sums._asdict().items():
            if rows is not None:
                found[name] = rows.sum(1).view(getattr(weights, name).shape)
        return found


#: What gradients are of, in the order of the backward op's.
NAMES = ("input", "state0", *Weights._fields)


def recurrence_backward(
    path: Path,
    grads: Sequence[Tensor | None],
    input: Tensor,
    weights: Weights,
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    needs: Sequence[bool],
    every: int = 0,
    precision: str = "ieee",
) -> list[Tensor]:
    """``seqkernels::recurrence_backward``, whose loop `path` runs."""
    with as_given(input, precision):
        wanted = dict(zip(NAMES, needs, strict=True))
        found = BackwardPass(grads, input, weights, states, reserve, control, cell, reverse, wanted, every, precision)
        found.run(path)
        return found.results()
