# ruff: noqa: N999
"""The compiled CPU kernels of seqkernels.

As pybind11-stubgen makes it, with integers and tuples in short; ``tests/test_stubs.py`` holds it to the module.
"""

import typing

import torch

def activation(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
    """exp, sigmoid or tanh of x into y, as the kernels compute them."""

def attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: tuple[typing.Any, ...],
    grad_q: torch.Tensor | None,
    grad_k: torch.Tensor | None,
    grad_v: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    threads: int,
    /,
) -> None:
    """Back-propagate through attention into those of grad_q, grad_k, grad_v and grad_bias (zero on entry) that are
    not None.
    """

def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: tuple[typing.Any, ...],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    threads: int,
    /,
) -> None:
    """Attention into out and, unless None, lse. scores: a seqkernels.scores.Scores. Rows of no document are left as
    they are.
    """

def attention_weights(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scores: object, weights: torch.Tensor, threads: int
) -> None:
    """The weights after dropout (B, Hq, M, N), or their mean over the heads (B, M, N)."""

def build_info() -> dict[str, str]:
    """How this module was compiled."""

def isa() -> str:
    """The instruction set in use."""

def isas() -> list[str]:
    """Instruction sets that were built and that this processor has, best last."""

def layer_forward(
    input: torch.Tensor,
    weights: tuple[torch.Tensor | None, ...],
    hidden0: torch.Tensor | None,
    cells0: torch.Tensor | None,
    cell: str,
    states: torch.Tensor,
    reserve: torch.Tensor | None,
    hidden_n: torch.Tensor,
    cells_n: torch.Tensor | None,
    threads: int,
) -> None:
    """Run a recurrence from hidden0 and cells0, None for zeros, into states, hidden_n, cells_n (LSTM, else None)
    and, unless None, reserve.
    """

def recurrence_backward(
    grads: tuple[torch.Tensor | None, ...],
    input: torch.Tensor,
    weights: tuple[torch.Tensor | None, ...],
    states: torch.Tensor,
    reserve: torch.Tensor,
    made: torch.Tensor | None,
    control: torch.Tensor | None,
    cell: str,
    reverse: bool,
    results: tuple[torch.Tensor | None, ...],
    every: int,
    threads: int,
) -> None:
    """Back-propagate through a recurrence into the results that are not None."""

def recurrence_forward(
    input: torch.Tensor,
    weights: tuple[torch.Tensor | None, ...],
    state0: torch.Tensor,
    control: torch.Tensor | None,
    cell: str,
    reverse: bool,
    states: torch.Tensor,
    state_n: torch.Tensor,
    reserve: torch.Tensor | None,
    every: int,
    threads: int,
) -> None:
    """Run a recurrence into states, state_n and, unless None, reserve."""

def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    inverse: bool,
    out: torch.Tensor,
    threads: int,
    /,
) -> None:
    """Turn pairs of elements of x (..., D) by the angles of cos and sin (..., P) into out, or back."""

def set_isa(name: str | None) -> None:
    """Use one of isas(); None for the best."""

def set_plain_types(first: type[typing.Any], second: type[typing.Any]) -> None:
    """The types of tensors that step_forward takes; it raises TypeError for others, subclasses too."""

def step_backward(
    grad_hidden: torch.Tensor | None,
    grad_cells: torch.Tensor | None,
    input: torch.Tensor,
    hidden: torch.Tensor | None,
    cells: torch.Tensor | None,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    cell: str,
    next_hidden: torch.Tensor,
    next_cells: torch.Tensor | None,
    reserve: torch.Tensor,
    grad_input: torch.Tensor | None,
    grad_hidden0: torch.Tensor | None,
    grad_cells0: torch.Tensor | None,
    grad_weight_ih: torch.Tensor | None,
    grad_weight_hh: torch.Tensor | None,
    grad_bias_ih: torch.Tensor | None,
    grad_bias_hh: torch.Tensor | None,
    threads: int,
    /,
) -> None:
    """Back-propagate through one step of a cell into the gradients that are not None."""

def step_forward(
    input: torch.Tensor,
    hidden: torch.Tensor | None,
    cells: torch.Tensor | None,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None,
    bias_hh: torch.Tensor | None,
    cell: str,
    next_hidden: torch.Tensor,
    next_cells: torch.Tensor | None,
    reserve: torch.Tensor | None,
    threads: int,
    /,
) -> None:
    """Run one step of a cell into next_hidden, next_cells (LSTM, else None) and, unless None, reserve."""
