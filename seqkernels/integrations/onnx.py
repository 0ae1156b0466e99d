"""Models with layers of seqkernels as ONNX models of standard operators, for ONNX Runtime and other engines.

RNN, LSTM and GRU layers, their cells and functions become the operators of these names, one for each layer, with both
directions in it; attention becomes the operator ``Attention`` (opset 23), or products and a softmax where that operator
cannot say it. The rest of a model is torch's own exporter's. Recurrences without a counterpart in ONNX are refused.

Letters: T time, B batch, I input size, H hidden size, D directions, G gates; Hq query heads, M queries, N keys.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._options import Options, Tensors, zoneout_of
from ..cells import CELLS
from ..ops import _eager
from ..ops.attention import attend_densely
from ..scores import UNBOUNDED, Scores

#: The oldest set of operators that has ``Attention``.
OPSET = 23

_OPERATORS = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU"}
# Which of torch's gates each of ONNX's is: i o f g of an LSTM, z r n of a GRU.
_GATES = {"rnn_tanh": (0,), "rnn_relu": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}
#: Inputs of the operators that are made of weights: W, R, B and the LSTM's P.
_OF_WEIGHTS = (1, 2, 3, 7)


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | Path | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int = OPSET,
) -> torch.onnx.ONNXProgram:
    """Export a model whose layers may be seqkernels' to ONNX.

    Recurrent layers may have initial states, directions, layers, `lengths`, which have to be 1 or more in ONNX Runtime,
    and peepholes. Masked attention multiplies masked values by 0, so that NaN in them shows, other than here.

    Args:
        model: in evaluation mode; float32 for ONNX Runtime's kernels of recurrences on CPUs.
        args: positional arguments of its ``forward``, as examples; sizes that shall be dynamic are best 2 or more.
        path: of the file to write, or ``None``.
        kwargs: keyword arguments of its ``forward``, likewise.
        dynamic_shapes: which sizes may be others, as in ``torch.export.export``: for each argument a mapping from
            dimensions to ``torch.export.Dim.DYNAMIC`` or a ``Dim`` with a name. ``None`` for none.
        input_names: of the ONNX model, in order; by default those of the arguments.
        output_names: likewise of the results.
        opset_version: of the ONNX operators; below 23 attention is products and a softmax. Default: 23.

    Returns:
        The program, whose ``model_proto`` is the ONNX model.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: `model` is in training mode, or does what ONNX has no operator for: the message names the argument.

    Example:
        >>> model = torch.nn.Sequential(seqkernels.nn.GRU(8, 16)).eval()
        >>> any_size = {0: torch.export.Dim("steps"), 1: torch.export.Dim("batch")}
        >>> seqkernels.integrations.onnx.export(model, (x,), "gru.onnx", dynamic_shapes=(any_size,))
    """
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"exporting needs {name}: pip install 'seqkernels[onnx]'")
    if model.training:
        raise ValueError("model: expected in evaluation mode, got one in training mode; call model.eval()")
    with torch.no_grad(), _exporting(_Exporter(opset_version)):
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    found = torch.onnx.export(
        program,
        dynamo=True,
        input_names=input_names,
        output_names=output_names,
        opset_version=opset_version,
        verbose=False,
    )
    assert found is not None  # as it is with dynamo
    _fold_weights(found)
    if path is not None:
        found.save(path)
    return found


#: Held while there is an exporter: one thread after another traces its model.
_lock = threading.RLock()


@contextlib.contextmanager
def _exporting(exporter: _eager.Exporter) -> Iterator[None]:
    with _lock:
        before, _eager.exporter = _eager.exporter, exporter
        try:
            yield
        finally:
            _eager.exporter = before


class _Exporter:
    """Recurrences and attention as ONNX operators in a graph of torch.export."""

    def __init__(self, opset_version: int) -> None:
        self.opset_version = opset_version
        self.thread = threading.get_ident()

    def run(
        self,
        cell: str,
        x: Tensor,
        batch_sizes: Tensor | None,
        hx: Tensors | None,
        params: Tensors,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        options: Options | None = None,
    ) -> tuple[Any, ...]:
        """`seqkernels._recurrent.run` as one operator for each layer; its check refused packed data already."""
        options = options or Options()
        _refuse(cell, params, has_biases, train and (dropout > 0 or options.recurrent_dropout > 0), options)
        lengths = None if options.lengths is None else options.lengths.to(torch.int32)
        directions, each = 2 if bidirectional else 1, 4 if has_biases else 2
        x = x.transpose(0, 1) if batch_first else x
        finals = []
        for first in range(0, num_layers * directions, directions):
            which = range(first, first + directions)
            weights = [params[each * k : each * (k + 1)] for k in which]
            peepholes = None if options.peephole is None else [options.peephole[k] for k in which]
            states = None if hx is None else [state.narrow(0, first, directions) for state in hx]
            x, *last = _operator(cell, x, weights, peepholes, lengths, states)
            x = x.transpose(1, 2).flatten(2) if bidirectional else x.squeeze(1)
            finals.append(last)
        joined = [torch.cat(parts) if num_layers > 1 else parts[0] for parts in zip(*finals, strict=True)]
        return x.transpose(0, 1) if batch_first else x, *joined

    def step(
        self, cell: str, x: Tensor, states: Tensors | None, weight_ih: Tensor, weight_hh: Tensor, *biases: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`seqkernels._recurrent.step` as an operator that runs one step."""
        _refuse_autocast()
        weights = [weight_ih, weight_hh]
        if any(bias is not None for bias in biases):
            # The operator has both or none.
            weights += [weight_ih.new_zeros(weight_ih.shape[0]) if bias is None else bias for bias in biases]
        state0 = None if states is None else [state.unsqueeze(0) for state in states]
        _, *last = _operator(cell, x.unsqueeze(0), [weights], None, None, state0)
        return tuple(state.squeeze(0) for state in last)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """`seqkernels.ops.attention.attend`: the output by an operator where one gives it."""
        if scores.dropout_p > 0.0:
            raise ValueError(f"dropout_p: expected 0 in an exported model, got {scores.dropout_p}")
        if self.opset_version < OPSET or not _is_plain(scores):
            return attend_densely(q, k, v, scores)
        return _attention(q, k, v, scores)


def _refuse(cell: str, params: Tensors, has_biases: bool, drops: bool, options: Options) -> None:
    """Raise for what the recurrent operators of ONNX have not."""
    _refuse_autocast()
    projected = cell == "lstm" and params[1].shape[0] != 4 * params[1].shape[1]
    normed = any(norm is not None for norm in (options.norm_ih, options.norm_hh, options.norm_c))
    what = {
        "proj_size": ("0", "a projection", projected),
        "dropout": ("layers in evaluation mode", "one that drops", drops),
        "reset": ("None", "a Tensor", options.reset is not None),
        "cu_seqlens": ("None", "a Tensor", options.cu_seqlens is not None),
        "return_states": ("False", "True", options.return_states),
        "return_gates": ("False", "True", options.return_gates),
        "zoneout": ("0", str(options.zoneout), any(zoneout_of(cell, options.zoneout, False))),
        "layer_norm": ("False", "True", normed),
    }
    for name, (expected, got, used) in what.items():
        if used:
            raise ValueError(f"{name}: ONNX has no recurrence with it; expected {expected}, got {got}")


def _refuse_autocast() -> None:
    if torch._C._is_any_autocast_enabled():
        raise ValueError(
            "autocast: expected off, since the operators of ONNX have one dtype; convert the model with .to"
        )


def _operator(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensors],
    peepholes: Tensors | None,
    lengths: Tensor | None,
    states: Tensors | None,
) -> list[Tensor]:
    """One layer, in one direction or two, by the recurrent operator of ONNX.

    Args:
        cell: a key of `CELLS`.
        x: (T, B, I).
        weights: of each direction (G*H, I), (G*H, H) and, or not, two biases (G*H,).
        peepholes: of each direction (3, H), or ``None``.
        lengths: (B,) int32, or ``None``.
        states: S states (D, B, H), or ``None`` for zeros.

    Returns:
        (T, D, B, H), and the S final states (D, B, H).
    """
    directions = len(weights)
    steps, batch, _ = x.shape
    hidden = weights[0][1].shape[1]
    w, r, *biases = (_permuted(torch.stack(of_kind), cell) for of_kind in zip(*weights, strict=True))
    b = torch.cat(biases, 1) if biases else None
    inputs: list[Tensor | None] = [x, w, r, b, lengths]
    inputs += [None] * CELLS[cell].states if states is None else states
    if peepholes is not None:
        # Of i, o and f.
        inputs.append(torch.stack([torch.cat([p[0], p[2], p[1]]) for p in peepholes]))
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional" if directions == 2 else "forward"}
    if cell == "gru":
        attributes["linear_before_reset"] = 1
    if cell == "rnn_relu":
        attributes["activations"] = ["Relu"] * directions
    shapes = [(steps, directions, batch, hidden), *[(directions, batch, hidden)] * CELLS[cell].states]
    found = torch.onnx.ops.symbolic_multi_out(
        _OPERATORS[cell], inputs, attributes, dtypes=[x.dtype] * len(shapes), shapes=shapes
    )
    return list(found)


def _permuted(weights: Tensor, cell: str) -> Tensor:
    """Weights or biases (D, G*H, ...) with the gates in ONNX's order."""
    order = _GATES[cell]
    if len(order) == 1:
        return weights
    of_gates = weights.unflatten(1, (len(order), -1))
    return of_gates.index_select(1, torch.tensor(order, device=weights.device)).flatten(1, 2)


def _is_plain(scores: Scores) -> bool:
    """Whether the operator ``Attention`` can say what the scores are made of."""
    said = Scores(scores.scale, scores.mask, scores.bias, right=scores.right, precision=scores.precision)
    return scores.right in (UNBOUNDED, 0) and all(a is b or a == b for a, b in zip(scores, said, strict=True))


def _attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """The operator ``Attention``; rows whose keys are all masked give 0. What nobody reads is left out of the model."""
    keep, bias, causal = scores.mask, scores.bias, scores.right == 0
    group = q.shape[1] // k.shape[1]
    levels = q @ (k if group == 1 else k.repeat_interleave(group, 1)).transpose(2, 3) * scores.scale
    below = torch.ones(levels.shape[2:], dtype=torch.bool, device=q.device).tril()
    if keep is None and bias is None:
        out = torch.onnx.ops.attention(q, k, v, None, is_causal=causal, scale=scores.scale)[0]
        return out, (levels.masked_fill(~below, -torch.inf) if causal else levels).logsumexp(3)
    if keep is None:
        keep = torch.ones((), dtype=torch.bool, device=q.device)
    keep = (keep & below if causal else keep).expand(levels.shape)
    given = keep if bias is None else bias.masked_fill(~keep, -torch.inf)
    out = torch.onnx.ops.attention(q, k, v, given, is_causal=False, scale=scores.scale)[0]
    levels = (levels if bias is None else levels + bias).masked_fill(~keep, -torch.inf)
    alive = (keep if bias is None else given != -torch.inf).any(3)
    lse = levels.masked_fill(~alive.unsqueeze(3), 0).logsumexp(3).masked_fill(~alive, -torch.inf)
    return out.masked_fill(~alive.unsqueeze(3), 0), lse


def _fold_weights(program: torch.onnx.ONNXProgram) -> None:
    """Compute what recurrent operators get of weights now, which other engines may expect to be constants."""
    optimizer = importlib.import_module("onnxscript.optimizer")
    graph = program.model.graph
    pending = [
        node.inputs[k]
        for node in graph
        if node.op_type in _OPERATORS.values()
        for k in _OF_WEIGHTS
        if k < len(node.inputs)
    ]
    foldable: set[Any] = set()
    while pending:
        value = pending.pop()
        node = None if value is None else value.producer()
        if node is not None and node not in foldable:
            foldable.add(node)
            pending += node.inputs
    optimizer.fold_constants(
        program.model, onnx_shape_inference=False, should_fold=lambda node: node in foldable or None
    )
    optimizer.remove_unused_nodes(program.model)
