"""Inference engines beside the backends: a recurrent layer of torch as an ONNX graph, run without copies.

The graph is built from the layer's parameters with the operators LSTM, GRU and RNN of ONNX, one for each layer of the
stack with both its directions. ONNX orders the gates of the LSTM i, o, f, g and those of the GRU z, r, n (in its own
letters iofc and zrh); torch orders them i, f, g, o and r, z, n. Inputs and results live in memory of torch that the
engines read and write in place; sizes are fixed, so that an engine can plan its memory.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .cases import Recurrence

PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
"""What has to be importable for each of `benchmarks.cases.ENGINES`."""

ORDERS = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}
"""Torch's number of each gate of ONNX."""

OPSET, IR_VERSION = 14, 8
"""The first operator set with the recurrent operators of today, and a file version that every engine reads."""

SPIN_SECONDS = 2e-3
"""How long a thread of ONNX Runtime waits busily for the next call; by its own default for tens of milliseconds."""

Call = Callable[[], tuple[Tensor, ...]]


class Weights(NamedTuple):
    """Parameters of one layer of a stack as ONNX wants them, D directions.

    Attributes:
        w: (D, G*H, I).
        r: (D, G*H, H).
        b: (D, 2*G*H), the bias of the input before that of the state.
    """

    w: np.ndarray[Any, np.dtype[np.float32]]
    r: np.ndarray[Any, np.dtype[np.float32]]
    b: np.ndarray[Any, np.dtype[np.float32]]


def missing(engine: str) -> str | None:
    """``None`` where `engine` can be used, else what cannot be imported and how to install it."""
    for package in PACKAGES[engine]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"{engine} cannot be timed ({error}); install it: make bench-engines, or the extra bench-engines"
    return None


def build(engine: str, case: Recurrence, layer: nn.Module, x: Tensor) -> Call:
    """The call of `layer` as `engine` makes it, on as many threads as torch has now.

    Args:
        engine: a key of `PACKAGES`.
        case: a float32 layer, no cell.
        layer: torch's layer of `case`.
        x: (T, B, I), contiguous; read at each call.

    Returns:
        A function that returns what the torch layer does: output, last hidden state and, of an LSTM, last cell state;
        always the same tensors, written anew by each call.

    Raises:
        ValueError: `case` is a cell or not float32.
    """
    if case.single or case.dtype != torch.float32:
        raise ValueError(f"case: expected a float32 layer, got {case.name}")
    results = {name: torch.empty(shape) for name, shape in _shapes(case).items()}
    run = {"onnxruntime": _onnxruntime, "openvino": _openvino}[engine](graph(case, layer), x.detach(), results)
    returned = (results["out"].flatten(1, -2), *list(results.values())[1:])

    # The engines hold addresses only: the default argument keeps the input alive.
    def call(x: Tensor = x) -> tuple[Tensor, ...]:
        run()
        return returned

    return call


def _shapes(case: Recurrence) -> dict[str, tuple[int, ...]]:
    """Of the results of the graph. With one direction ``out`` is what the operator gives, (T, 1, B, H)."""
    state = (case.layers * (2 if case.bidirectional else 1), case.batch, case.hidden)
    wide = (case.steps, case.batch, 2 * case.hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "out": wide if case.bidirectional else (case.steps, 1, case.batch, case.hidden),
        "h_n": state,
    }
    return shapes | {"c_n": state} if case.cell == "lstm" else shapes


def weights(case: Recurrence, layer: nn.Module) -> list[Weights]:
    """Parameters of each layer of the stack in the layout and gate order of ONNX."""
    order = ORDERS[case.cell]

    def ordered(name: str) -> Tensor:
        parameter: Tensor = getattr(layer, name).detach()
        return parameter.unflatten(0, (len(order), case.hidden))[list(order)].flatten(0, 1)

    found = []
    for index in range(case.layers):
        ends = (f"l{index}", f"l{index}_reverse") if case.bidirectional else (f"l{index}",)
        w, r, b_ih, b_hh = (
            torch.stack([ordered(f"{stem}_{end}") for end in ends])
            for stem in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        found.append(Weights(w.numpy(), r.numpy(), torch.cat((b_ih, b_hh), 1).numpy()))
    return found


def graph(case: Recurrence, layer: nn.Module) -> bytes:
    """`layer` as a serialised ONNX model.

    Its input is ``x`` (T, B, I); its outputs are ``out``, (T, B, 2*H) or (T, 1, B, H), ``h_n`` (L*D, B, H) and, of an
    LSTM, ``c_n``. Nothing stands behind an operator whose result has the right order in memory already.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    directions = 2 if case.bidirectional else 1
    operator = "RNN" if case.cell.startswith("rnn") else case.cell.upper()
    options: dict[str, Any] = {
        "hidden_size": case.hidden,
        "direction": "bidirectional" if case.bidirectional else "forward",
    }
    if operator == "RNN":
        options["activations"] = [case.cell.removeprefix("rnn_").capitalize()] * directions
    if operator == "GRU":
        options["linear_before_reset"] = 1
    shapes = _shapes(case)
    states = list(shapes)[1:]
    flat = np.array([case.steps, case.batch, directions * case.hidden], np.int64)
    constants = [numpy_helper.from_array(flat, "flat")] if case.layers > 1 or case.bidirectional else []
    nodes = []
    source = "x"
    for index, tensors in enumerate(weights(case, layer)):
        last = index == case.layers - 1
        names = [f"{letter}{index}" for letter in "wrb"]
        constants += [numpy_helper.from_array(array, name) for array, name in zip(tensors, names, strict=True)]
        y = "out" if last and not case.bidirectional else f"y{index}"
        ends = [f"{state}{index}" if case.layers > 1 else state for state in states]
        # The sequence lengths and the first states are left out: none, and zeros.
        nodes.append(helper.make_node(operator, [source, *names], [y, *ends], **options))
        if case.bidirectional:
            nodes.append(helper.make_node("Transpose", [y], [f"turned{index}"], perm=[0, 2, 1, 3]))
            y = f"turned{index}"
        if y != "out":
            source = "out" if last else f"out{index}"
            nodes.append(helper.make_node("Reshape", [y, "flat"], [source]))
    if case.layers > 1:
        for state in states:
            parts = [f"{state}{index}" for index in range(case.layers)]
            nodes.append(helper.make_node("Concat", parts, [state], axis=0))

    def value(name: str, *sizes: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)

    inputs = [value("x", case.steps, case.batch, case.inputs)]
    outputs = [value(name, *shape) for name, shape in shapes.items()]
    model = helper.make_model(
        helper.make_graph(nodes, case.name, inputs, outputs, constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    checker.check_model(model)
    serialised: bytes = model.SerializeToString()
    return serialised


def _onnxruntime(model: bytes, x: Tensor, results: dict[str, Tensor]) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(round(SPIN_SECONDS * 1e6)))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, list(x.shape), x.data_ptr())
    for name, tensor in results.items():
        binding.bind_output(name, "cpu", 0, np.float32, list(tensor.shape), tensor.data_ptr())
    return functools.partial(session.run_with_iobinding, binding)


def _openvino(model: bytes, x: Tensor, results: dict[str, Tensor]) -> Callable[[], object]:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        # Torch's threads are not bound to cores either; without it a call is shorter by two microseconds.
        "ENABLE_CPU_PINNING": False,
    }
    core = _openvino_core()
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    for name, tensor in (("x", x), *results.items()):
        request.set_tensor(name, openvino.Tensor(tensor.numpy(), shared_memory=True))
    return functools.partial(request.infer, share_outputs=True)


@functools.cache
def _openvino_core() -> Any:
    import openvino

    return openvino.Core()
