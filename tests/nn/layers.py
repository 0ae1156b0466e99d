"""Layers, inputs and results that the tests of the recurrent layers share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import seqkernels

I, H, P = 3, 11, 4  # noqa: E741
KINDS = ("RNN", "LSTM", "projected", "GRU")
#: Results by name, gradients as ``"grad of "`` something, in a dtype for a seed.
Run = Callable[[torch.dtype, int], dict[str, Tensor]]
_CLASSES = {"ReLU": "RNN", "projected": "LSTM"}
_ARGUMENTS: dict[str, dict[str, Any]] = {"ReLU": {"nonlinearity": "relu"}, "projected": {"proj_size": P}}


def build(kind: str, package: Any, dtype: torch.dtype, seed: int, *, train: bool = True, **options: Any) -> Any:
    """A layer of `package` whose parameters are exact in float32; ``"ReLU"`` and ``"projected"`` are kinds too."""
    torch.manual_seed(seed)
    cls = getattr(package, _CLASSES.get(kind, kind))
    return cls(I, H, **_ARGUMENTS.get(kind, {}), **options).to(dtype).train(train)


def widths(layer: Any) -> tuple[int, ...]:
    """The sizes of the hidden and, of an LSTM, the cell state."""
    return (layer.proj_size or H, H) if layer.mode == "LSTM" else (H,)


def draw_input(
    layer: Any, steps: int, batch: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, tuple[Tensor, ...], torch.Generator]:
    """Input (T, B, I), initial states, and the generator to draw more from."""
    generator = torch.Generator().manual_seed(seed)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    x = torch.randn(steps, batch, I, generator=generator).to(dtype)
    states = [torch.randn(rows, batch, width, generator=generator).to(dtype) for width in widths(layer)]
    return x.requires_grad_(), tuple(state.requires_grad_() for state in states), generator


def hidden_of(states: Sequence[Tensor]) -> Any:
    """States as a layer takes them."""
    return tuple(states) if len(states) == 2 else states[0]


def outputs_of(output: Tensor, hidden: Any, *_: Any) -> list[Tensor]:
    """Output and states as a layer returns them, in one list."""
    return [output, *(hidden if isinstance(hidden, tuple) else (hidden,))]


def graded(
    outputs: Sequence[Tensor] | Mapping[str, Tensor], layer: Any, x: Tensor, states: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """Outputs by name, and the gradients of everything for random gradients of the outputs."""
    if not isinstance(outputs, Mapping):
        outputs = dict(zip(("output", "h_n", "c_n"), outputs, strict=False))
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs.values()]
    leaves = {"x": x, **{f"hx[{k}]": s for k, s in enumerate(states)}, **dict(layer.named_parameters())}
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads, materialize_grads=True)
    named = {name: out.detach() for name, out in outputs.items()}
    return named | {f"grad of {name}": grad for name, grad in zip(leaves, found, strict=True)}


@functools.cache
def results(run: Callable[..., Any], draw: Callable[..., Any], package: Any, kind: str, **options: Any) -> Run:
    """Results of a layer, the same object for the same arguments.

    Args:
        run: takes the layer and what `draw` returns; gives outputs, in a list or by name.
        draw: takes the layer, a dtype and a seed; gives the input, the states, and whatever `run` needs.
        package: ``torch.nn`` or ``seqkernels.nn``.
        kind: as for `build`.
        options: as for `build`.
    """

    def compute(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        layer = build(kind, package, dtype, seed, **options)
        x, states, *rest = draw(layer, dtype, seed)
        return graded(run(layer, x, states, *rest), layer, x, states)

    return compute


@functools.cache
def by_reference(run: Run) -> Run:
    """`run` on the reference, forward and backward, to judge others by; the same object for the same argument."""

    def compute(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        with seqkernels.use_backend("reference"):
            return run(dtype, seed)

    return compute


@functools.cache
def without_gradients(run: Run) -> Run:
    """`run` without the gradients; the same object for the same argument."""

    def compute(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        return {name: x for name, x in run(dtype, seed).items() if not name.startswith("grad of ")}

    return compute
