"""The recurrence contract.

A recurrence is one direction of one layer of an RNN: the input projection of all steps, one GEMM, and the loop over
time, which adds the recurrent product to it, applies the cell and carries the state. What may be added to a cell
travels in `seqkernels.cells.Weights`. Formulas and the backward pass: ``docs/recurrence.md``.

T time, B batch, I input size, H hidden size; G, S, R are gates, states and reserve of the cell
(`seqkernels.cells.CELLS`); K is G, the number of gates that are returned.

The forward op with `save` returns what the backward op needs: states (S, T+1, B, H) in the dtype of the input and
reserve (T, B, R, H) in the accumulation dtype. With `every` = k > 0 these are the hidden states (1, T+1, B, H), which
are the output, and checkpoints (ceil(T/k), S, B, H): the unrounded state before the steps 0, k, 2k, ... of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from .. import backends
from ..cells import CELLS, CONSTANTS, DTYPES, Weights, accumulate_dtype
from ..precision import check_precision, of_products
from ._eager import as_in_forward, batched, eager, insisted, records, refuse_tangents, transformed

if TYPE_CHECKING:
    from typing_extensions import Unpack

_library = torch.library.Library("seqkernels", "FRAGMENT")
_library.define(
    "recurrence_forward(Tensor input, Tensor?[] weights, Tensor state0, Tensor? control, str cell, bool reverse,"
    " bool save, int every=0, str precision='ieee') -> (Tensor states, Tensor state_n, Tensor reserve)"
)
_library.define(
    "recurrence_backward(Tensor?[] grads, Tensor input, Tensor?[] weights, Tensor states, Tensor reserve,"
    " Tensor? control, str cell, bool reverse, bool[] needs, int every=0, str precision='ieee') -> Tensor[]"
)


def _plain(weights: Weights) -> bool:
    """Whether there are no options, decided quickly: most calls have none."""
    _, _, _, _, reset_state, peephole, recurrent_mask, norm_h, norm_c, zoneout, seed = weights
    return (
        reset_state is None
        and peephole is None
        and recurrent_mask is None
        and norm_h is None
        and norm_c is None
        and zoneout is None
        and seed is None
    )


def _call(
    x: Tensor, weights: Weights, control: Tensor | None, cell: str, every: int, gates: bool = False
) -> backends.Call:
    hidden = batch = 0
    if x.is_cuda or backends.insisted() == "cuda":
        hidden = weights.weight_hh.shape[1]
        batch = x.shape[1] if backends.explained() else 0
    features: tuple[str, ...] = ("checkpoint",) if every else ()
    if control is not None:
        features += ("control",)
    if gates or not _plain(weights):
        used = {
            "gates": gates,
            "norm": weights.norm_h is not None or weights.norm_c is not None,
            "peephole": weights.peephole is not None,
            "recurrent_mask": weights.recurrent_mask is not None,
            "reset_state": weights.reset_state is not None,
            "zoneout": weights.zoneout is not None,
        }
        features += tuple(name for name, used in used.items() if used)
    return backends.Call("recurrence", x.device.type, x.dtype, cell, features, hidden, batch)


def _resolved(*tensors: Tensor | None) -> list[Any]:
    """`tensors` in memory that holds their values, where parts of complex numbers may be negated by a bit alone."""
    return [x if x is None else x.resolve_neg() for x in tensors]


def _forward(
    input: Tensor,
    weights: Sequence[Tensor | None],
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    save: bool,
    every: int = 0,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    refuse_tangents(input, state0, *weights)
    if input.shape[2] <= 1 or state0.shape[2] <= 1:
        # Only rows of one element are contiguous in a part of a complex tensor; others are copied.
        input, state0, *weights = _resolved(input, state0, *weights)
    named = Weights._make(weights)
    module = backends.implementation(_call(input, named, control, cell, every))
    more: dict[str, Any] = {} if precision == "ieee" else {"precision": precision}
    if every and save:
        # Checkpoints behind the last step are none.
        more["every"] = min(every, max(input.shape[0], 1))
    return module.recurrence_forward(input, named, state0, control, cell, reverse, save, **more)


def _backward(
    grads: Sequence[Tensor | None],
    input: Tensor,
    weights: Sequence[Tensor | None],
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    needs: Sequence[bool],
    every: int = 0,
    precision: str = "ieee",
) -> list[Tensor]:
    refuse_tangents(*grads, input, *weights)
    if input.shape[2] <= 1 or states.shape[3] <= 1:
        input, *others = _resolved(input, *grads, *weights)
        grads, weights = others[:4], others[4:]
    named = Weights._make(weights)
    every = min(every, max(input.shape[0], 1))
    module = backends.implementation(_call(input, named, control, cell, every, grads[3] is not None))
    arguments = (grads, input, named, states, reserve, control, cell, reverse, needs)
    more: dict[str, Any] = {} if precision == "ieee" else {"precision": precision}
    if every:
        more["every"] = every
    return module.recurrence_backward(*arguments, **more)


def _forward_fake(
    input: Tensor,
    weights: Sequence[Tensor | None],
    state0: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    save: bool,
    every: int = 0,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    steps, batch, _ = input.shape
    num_states, _, hidden = state0.shape
    states = input.new_empty((num_states if save and not every else 1, steps + 1, batch, hidden))
    state_n = input.new_empty((num_states, batch, hidden))
    shape: tuple[int, ...] = (0,)
    if save:
        of_steps = (steps, batch, CELLS[cell].reserve, hidden)
        shape = (-(-steps // every), num_states, batch, hidden) if every else of_steps
    return states, state_n, input.new_empty(shape, dtype=accumulate_dtype(input.dtype))


def _backward_fake(
    grads: Sequence[Tensor | None],
    input: Tensor,
    weights: Sequence[Tensor | None],
    states: Tensor,
    reserve: Tensor,
    control: Tensor | None,
    cell: str,
    reverse: bool,
    needs: Sequence[bool],
    every: int = 0,
    precision: str = "ieee",
) -> list[Tensor]:
    _, _, batch, hidden = states.shape
    shapes = [input.shape, (CELLS[cell].states, batch, hidden), *(None if x is None else x.shape for x in weights)]
    return [
        input.new_empty(shape if need and shape is not None else (0,))
        for shape, need in zip(shapes, needs, strict=True)
    ]


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
        input: Tensor,
        state0: Tensor,
        control: Tensor | None,
        cell: str,
        reverse: bool,
        gates: bool,
        every: int,
        precision: str,
        *weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        forward = _forward if eager(input, state0, control, *weights) else forward_op
        states, state_n, reserve = forward(input, weights, state0, control, cell, reverse, True, every, precision)
        ctx.save_for_backward(input, state0, control, states, reserve, *weights)
        ctx.cell, ctx.reverse, ctx.gates, ctx.every, ctx.precision = cell, reverse, gates, every, precision
        ctx.insisted = insisted()
        ctx.set_materialize_grads(False)
        outputs = (*_step_states(states, reverse), state_n)
        return (*outputs, _gates(reserve, cell, input.dtype)) if gates else outputs

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grads)


def _step_states(states: Tensor, reverse: bool) -> tuple[Tensor, ...]:
    steps = states.shape[1] - 1
    return tuple(states.narrow(1, 0 if reverse else 1, steps).unbind(0))


def _own_step_states(states: Tensor, reverse: bool) -> tuple[Tensor, ...]:
    """`_step_states` that no backward pass reads: no views to autograd, so they may be modified and detached."""
    count, steps = states.shape[0], states.shape[1] - 1
    parts = states.flatten(0, 1).unsafe_split_with_sizes(([steps, 1] if reverse else [1, steps]) * count)
    return tuple(parts[0 if reverse else 1 :: 2])


def _gates(reserve: Tensor, cell: str, dtype: torch.dtype) -> Tensor:
    return reserve.narrow(2, 0, CELLS[cell].gates).to(dtype)


def _gradients(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    input, state0, control, states, reserve, *weights = ctx.saved_tensors
    needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[8:])
    of_steps = 1 if ctx.every else CELLS[ctx.cell].states
    ordered = (grads[0], grads[1] if of_steps == 2 else None, grads[of_steps], grads[-1] if ctx.gates else None)
    found: Sequence[Tensor | None]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # A graph of the gradients is wanted, for the second order.
        from ..backends.reference.recurrence import gradients

        found = gradients(ordered, input, state0, Weights._make(weights), control, ctx.cell, ctx.reverse, needs)
    else:
        backward = _backward if eager(input, *ordered, control, *weights) else backward_op
        try:
            settings = (ctx.cell, ctx.reverse, needs, ctx.every, ctx.precision)
            op = backward(ordered, input, weights, states, reserve, control, *settings)
            found = [x if need else None for x, need in zip(op, needs, strict=True)]
        except RuntimeError:
            if not any(map(batched, ordered)):
                raise
            # Many gradients at once, of `is_grads_batched` and ``vmap``, which tensor operations alone can take.
            from ..backends.reference.recurrence import gradients

            found = gradients(ordered, input, state0, Weights._make(weights), control, ctx.cell, ctx.reverse, needs)
            found = [x if x is None else x.clone() for x in found]  # without their graph
    return *found[:2], None, None, None, None, None, None, *found[2:]


def check(input: Tensor, weights: Weights, state0: Tensor, control: Tensor | None, cell: str) -> None:
    """Raise the error that names the argument which breaks the contract of `recurrence`.

    Args:
        input, state0, control, cell: as in `recurrence`.
        weights: its other tensors.

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed.
    """
    if cell not in CELLS:
        raise ValueError(f"cell: {cell!r} is not one of {', '.join(map(repr, CELLS))}")
    gates, num_states, _ = CELLS[cell]
    weight_ih, weight_hh = weights[:2]
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
    if not isinstance(weight_hh, Tensor):
        raise TypeError(f"weight_hh: expected a Tensor, got {type(weight_hh).__name__}")
    if input.dim() != 3:
        last = "G*H" if weight_ih is None else "I"
        raise ValueError(f"input: expected 3 dimensions (T, B, {last}), got shape {tuple(input.shape)}")
    if input.dtype not in DTYPES:
        raise TypeError(f"input: expected one of {DTYPES}, got {input.dtype}")
    steps, batch, size = input.shape
    if weight_hh.dim() != 2 or weight_hh.shape[0] != gates * weight_hh.shape[1]:
        raise ValueError(
            f"weight_hh: expected shape (G*H, H) with G = {gates} for {cell!r}, got {tuple(weight_hh.shape)}"
        )
    rows, hidden = weight_hh.shape
    if weight_ih is None and size != rows:
        raise ValueError(
            f"input: expected shape (T, B, {rows}) with G*H of weight_hh where there is no weight_ih,"
            f" got {tuple(input.shape)}"
        )
    dtype, device = input.dtype, input.device
    for name, tensor, shape in (
        ("state0", state0, (num_states, batch, hidden)),
        ("weight_hh", weight_hh, (rows, hidden)),
        ("weight_ih", weight_ih, (rows, size)),
        ("bias_ih", weights.bias_ih, (rows,)),
        ("bias_hh", weights.bias_hh, (rows,)),
    ):
        if tensor is None and name != "state0":
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            _check_tensor(name, tensor, shape, input)
    if weights.bias_ih is not None and weight_ih is None:
        raise ValueError("bias_ih: expected None where weight_ih is None")
    if control is not None:
        _check_tensor("control", control, (steps, batch), input, torch.uint8)
    if not _plain(weights):
        _check_options(input, weights, batch, hidden, cell)


def _check_options(input: Tensor, weights: Weights, batch: int, hidden: int, cell: str) -> None:
    gates, num_states, _ = CELLS[cell]
    shapes: dict[str, tuple[int, ...]] = {
        "reset_state": (num_states, hidden),
        "peephole": (3, hidden),
        "recurrent_mask": (batch, hidden),
        "norm_h": (gates * hidden,),
        "norm_c": (2, hidden),
        "zoneout": (num_states,),
        "seed": (),
    }
    for name, shape in shapes.items():
        tensor = getattr(weights, name)
        if tensor is None:
            continue
        _check_tensor(name, tensor, shape, input, _OWN_DTYPES.get(name))
        if name in CONSTANTS and tensor.requires_grad:
            raise ValueError(f"{name}: expected no requires_grad, since it has no gradient; detach it")
        if name in ("peephole", "norm_c") and cell != "lstm":
            raise ValueError(f"{name}: expected None for {cell!r}, only an 'lstm' has one")
    if weights.seed is not None and weights.zoneout is None:
        raise ValueError("seed: expected None where zoneout is None")


_OWN_DTYPES = {"zoneout": torch.float32, "seed": torch.int64}


def _check_tensor(
    name: str, tensor: object, shape: tuple[int, ...], input: Tensor, dtype: torch.dtype | None = None
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != input.device:
        raise ValueError(f"{name}: expected on {input.device} as input, got {tensor.device}")
    if tensor.dtype != (dtype or input.dtype):
        raise TypeError(f"{name}: expected {dtype or f'{input.dtype} as input'}, got {tensor.dtype}")


def _check_every(every: object, gates: bool, states: bool) -> None:
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"every: expected an int, got {type(every).__name__}")
    if every < 0:
        raise ValueError(f"every: expected 0 or a number of steps, got {every}")
    for name, asked in (("gates", gates), ("states", states)):
        if asked:
            raise ValueError(f"{name}: expected False with every, since what it returns of every step would be stored")


class Options(TypedDict, total=False):
    """The optional tensors of `recurrence`, fields of `seqkernels.cells.Weights`."""

    weight_ih: Tensor | None
    bias_ih: Tensor | None
    reset_state: Tensor | None
    peephole: Tensor | None
    recurrent_mask: Tensor | None
    norm_h: Tensor | None
    norm_c: Tensor | None
    zoneout: Tensor | None
    seed: Tensor | None


_Results = tuple[Tensor, Tensor | None, Tensor]
_ResultsWithGates = tuple[Tensor, Tensor | None, Tensor, Tensor]


@overload
def recurrence(
    input: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None = None,
    *,
    cell: str,
    reverse: bool = False,
    gates: Literal[False] = False,
    states: bool = False,
    every: int = 0,
    precision: str = "ieee",
    **options: Unpack[Options],
) -> _Results: ...
@overload
def recurrence(
    input: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None = None,
    *,
    cell: str,
    reverse: bool = False,
    gates: Literal[True],
    states: bool = False,
    every: int = 0,
    precision: str = "ieee",
    **options: Unpack[Options],
) -> _ResultsWithGates: ...
@overload
def recurrence(
    input: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None = None,
    *,
    cell: str,
    reverse: bool = False,
    gates: bool,
    states: bool = False,
    every: int = 0,
    precision: str = "ieee",
    **options: Unpack[Options],
) -> _Results | _ResultsWithGates: ...
def recurrence(
    input: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    state0: Tensor,
    control: Tensor | None = None,
    *,
    cell: str,
    reverse: bool = False,
    weight_ih: Tensor | None = None,
    bias_ih: Tensor | None = None,
    reset_state: Tensor | None = None,
    peephole: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    norm_h: Tensor | None = None,
    norm_c: Tensor | None = None,
    zoneout: Tensor | None = None,
    seed: Tensor | None = None,
    gates: bool = False,
    states: bool = False,
    every: int = 0,
    precision: str = "ieee",
) -> _Results | _ResultsWithGates:
    """Run one direction of one layer over all steps.

    Args:
        input: (T, B, I), float32, float64, bfloat16 or float16, any strides. Without `weight_ih` (T, B, G*H), the
            input part of the gates, input bias included. All other floating point tensors have its dtype but for
            `zoneout`.
        weight_hh: (G*H, H), torch's gate order.
        bias_hh: (G*H,) or ``None``; needed apart from the input bias only by the GRU and after `norm_h`.
        state0: (S, B, H), the initial state: hidden, then (LSTM) cell.
        control: (T, B) uint8 or ``None``: for each step and row the sum of `seqkernels.cells.RESET` (the state is
            `reset_state` before this step, and no gradient goes to the steps before), `HOLD` (this step is padding:
            its input is not looked at, not even for NaN, and the state is carried on) and `DETACH` (the state
            before this step counts as a constant: truncated back-propagation; nothing more where there is a reset).
        cell: a key of `seqkernels.cells.CELLS`.
        reverse: run from step T-1 to step 0.
        weight_ih: (G*H, I) or ``None``.
        bias_ih: (G*H,) or ``None``, only with `weight_ih`.
        reset_state: (S, H) or ``None`` for zero: the state after a reset.
        peephole: (3, H) or ``None``, LSTM only: what i, f and o see of the cell state, i and f of the previous one
            (Gers & Schmidhuber, "Recurrent nets that time and count", IJCNN 2000).
        recurrent_mask: (B, H) or ``None``: factors of the hidden state in the product with `weight_hh` and nowhere
            else, the same in all steps, 1/(1-p) included: variational dropout (Gal & Ghahramani, "A theoretically
            grounded application of dropout in recurrent neural networks", NIPS 2016). A constant.
        norm_h: (G*H,) or ``None``: gain of a layer norm over the G*H elements of the product with `weight_hh`,
            before `bias_hh` is added; epsilon 1e-5 (Ba, Kiros & Hinton, "Layer normalization", 2016, in the form of
            haste's ``LayerNormLSTM``).
        norm_c: (2, H) or ``None``, LSTM only: gain and bias of a layer norm of the cell state where it becomes h;
            the state that is carried is not normalised.
        zoneout: (S,) float32 or ``None``: the probabilities that an element of the state keeps its value in a step
            (Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", 2016). The
            LSTM's h is made of the cell state before zoneout. A constant.
        seed: () int64 or ``None``, only with `zoneout`: with it zoneout is random, by Philox4x32-10 (Salmon et al.,
            SC 2011) on the seed and the element's place, the same on each implementation; without, the expectation
            ``p * old + (1 - p) * new``, as in evaluation.
        gates: whether to return the gates.
        states: whether to return the cell states where no gradient is recorded too.
        every: 0 or k > 0: what the backward pass needs of the states is stored before the steps 0, k, 2k, ... of the
            loop alone, and computed again from there, one segment of k steps at a time. Gradients have the same bits.
            Without gradient recording it changes no more than which implementations can run the call.
        precision: of products of float32 matrices on GPUs, see `seqkernels.precision`; no difference elsewhere.

    Returns:
        ``hidden`` (T, B, H), the hidden state after each step; ``cells`` (T, B, H), the LSTM's cell states,
        ``None`` for other cells, and for an LSTM with `every`, and when no gradient is recorded and neither `states`
        nor `gates` asks; ``state_n`` (S, B, H), the state after the last step; with `gates` also (T, B, K, H), the
        gates after their activations: i, f, g, o of an LSTM, r, z, n of a GRU, 0 in held steps; h itself of an RNN.
        In held steps `hidden` is the carried state: a layer that wants 0 there masks it.

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed.
    """
    weights = Weights(
        weight_ih, weight_hh, bias_ih, bias_hh, reset_state, peephole, recurrent_mask, norm_h, norm_c, zoneout, seed
    )
    check(input, weights, state0, control, cell)
    precision = of_products(check_precision(precision), input)
    if every != 0:
        _check_every(every, gates, states)
    stored = gates and CELLS[cell].reserve > 0
    if transformed():
        from ..backends.reference.recurrence import recurrence as reference

        backends.note("torch.func, forward mode or tracing: the recurrence as a loop of plain operations")
        every_state, state_n, reserve = reference(input, weights, state0, control, cell, reverse)
        hidden, *rest = _step_states(every_state, reverse)
        of_steps = _gates(reserve, cell, input.dtype) if stored else None
    elif torch.is_grad_enabled() and records(input, state0, *weights):
        hidden, *rest = _Recurrence.apply(input, state0, control, cell, reverse, stored, every, precision, *weights)
        of_steps = rest.pop() if stored else None
        state_n = rest.pop()
    else:
        direct = eager(input, state0, control, *weights)
        forward = _forward if direct else forward_op
        settings = (cell, reverse, stored or states, every, precision)
        saved, state_n, reserve = forward(input, weights, state0, control, *settings)
        hidden, *rest = (_own_step_states if direct else _step_states)(saved, reverse)
        of_steps = _gates(reserve, cell, input.dtype) if stored else None
    cells = rest[0] if rest else None
    if not gates:
        return hidden, cells, state_n
    return hidden, cells, state_n, hidden.unsqueeze(2) if of_steps is None else of_steps
