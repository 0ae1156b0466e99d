"""``functional.lstm``, ``gru`` and ``rnn`` take torch's arguments, in both forms, by position and by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import seqkernels
from seqkernels import functional

from .twins import applies, judge, same

TWINS: dict[str, tuple[Callable[..., Any], Callable[..., Any], torch.nn.RNNBase]] = {
    "lstm": (functional.lstm, torch.lstm, torch.nn.LSTM(3, 4, 2, bidirectional=True)),
    "gru": (functional.gru, torch.gru, torch.nn.GRU(3, 4, 2, bidirectional=True)),
    "rnn_tanh": (functional.rnn, torch.rnn_tanh, torch.nn.RNN(3, 4, 2, bidirectional=True)),
    "rnn_relu": (
        lambda *args, **kwargs: functional.rnn(*args, nonlinearity="relu", **kwargs),
        torch.rnn_relu,
        torch.nn.RNN(3, 4, 2, "relu", bidirectional=True),
    ),
}
NAMES = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
SETTINGS = (True, 2, 0.0, False, True)


def state(kind: str, batch: int) -> Any:
    h = torch.randn(4, batch, 4)
    return (h, torch.randn(4, batch, 4)) if kind == "lstm" else h


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", TWINS)
def test_padded(kind: str, batch_first: bool) -> None:
    ours, theirs, layer = TWINS[kind]
    torch.manual_seed(0)
    layer.reset_parameters()
    x, hx, params = torch.randn(2, 2, 3), state(kind, 2), layer._flat_weights
    named = dict(zip(NAMES, SETTINGS, strict=True), batch_first=batch_first)
    found = ours(x, hx, params, *SETTINGS, batch_first)
    judge(found, applies(theirs, x, hx, params, *SETTINGS, batch_first))
    assert same(ours(x, hx, params, **named), found)
    assert same(ours(input=x, hx=hx, params=params, **named), found)


@pytest.mark.parametrize("kind", TWINS)
def test_packed(kind: str) -> None:
    ours, theirs, layer = TWINS[kind]
    torch.manual_seed(0)
    layer.reset_parameters()
    data, batch_sizes, _, _ = pack_sequence([torch.randn(n, 3) for n in (4, 2, 2)])
    hx, params = state(kind, 3), tuple(layer._flat_weights)
    named = dict(zip(NAMES, SETTINGS, strict=True))
    found = ours(data, batch_sizes, hx, params, *SETTINGS)
    judge(found, applies(theirs, data, batch_sizes, hx, params, *SETTINGS))
    assert same(ours(data, batch_sizes, hx, params=params, **named), found)
    assert same(ours(data=data, batch_sizes=batch_sizes, hx=hx, params=params, **named), found)


@pytest.mark.parametrize("kind", TWINS)
def test_absent_state_is_zero(kind: str) -> None:
    ours, _, layer = TWINS[kind]
    x = torch.randn(5, 2, 3)
    zeros = torch.zeros(4, 2, 4)
    hx = (zeros, zeros) if kind == "lstm" else zeros
    given = ours(x, hx, layer._flat_weights, *SETTINGS, False)
    absent = ours(x, None, layer._flat_weights, *SETTINGS, False)
    assert same(absent, given)


def lstm(**changed: Any) -> Any:
    layer = torch.nn.LSTM(3, 4)
    h = torch.zeros(1, 2, 4)
    arguments: dict[str, Any] = {
        "input": torch.randn(5, 2, 3),
        "hx": (h, h),
        "params": layer._flat_weights,
        "has_biases": True,
        "num_layers": 1,
        "dropout": 0.0,
        "train": False,
        "bidirectional": False,
        "batch_first": False,
    }
    arguments |= changed
    return functional.lstm(**{name: value for name, value in arguments.items() if value is not ...})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input": torch.randn(5, 3)}, RuntimeError, "input: expected 3 dimensions, got 2"),
        ({"input": torch.randn(0, 2, 3)}, RuntimeError, "Expected sequence length to be larger than 0 in RNN"),
        ({"input": torch.randn(5, 2, 7)}, RuntimeError, "input: expected 3 features as in weight_ih, got 7"),
        (
            {"input": torch.randn(5, 2, 3).double(), "hx": None},
            RuntimeError,
            r"input: expected the dtype of the parameters, torch\.float32, got torch\.float64",
        ),
        ({"hx": (torch.zeros(1, 2, 4),)}, RuntimeError, "hx: lstm expects two hidden states, got 1"),
        ({"hx": (torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))}, RuntimeError, r"hx\[1\]: expected size \(1, 2, 4\)"),
        ({"params": ()}, RuntimeError, "params: .* expected 4 for each layer and direction, 4 in all, got 0"),
        ({"num_layers": 2}, RuntimeError, "params: .* 8 in all, got 4"),
        ({"has_biases": False}, RuntimeError, "params: .* expected 2 for each"),
        ({"batch_first": ...}, TypeError, "batch_first"),
        (
            {"input": torch.randn(5, 3), "batch_sizes": torch.tensor([3, 3]), "batch_first": ...},
            RuntimeError,
            "batch_sizes: expected a sum of 5, the rows of data, got 6",
        ),
        (
            {"input": torch.randn(5, 3), "batch_sizes": torch.tensor([3.0, 2.0]), "batch_first": ...},
            RuntimeError,
            r"batch_sizes: .* torch\.int64 .* got 1 dimensions of torch\.float32 on cpu",
        ),
        ({"batch_sizes": torch.tensor([5])}, TypeError, "batch_first: packed data has no batch dimension"),
    ],
)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lstm(**changed)


def test_unknown_nonlinearity() -> None:
    layer = torch.nn.RNN(3, 4)
    with pytest.raises(ValueError, match="nonlinearity: 'sine' is not 'tanh' or 'relu'"):
        functional.rnn(torch.randn(5, 2, 3), None, layer._flat_weights, *SETTINGS, False, nonlinearity="sine")


def test_cell_functions() -> None:
    torch.manual_seed(0)
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    for ours, theirs, cell, hx in (
        (functional.lstm_cell, torch.lstm_cell, torch.nn.LSTMCell(3, 4), (h, h)),
        (functional.gru_cell, torch.gru_cell, torch.nn.GRUCell(3, 4), h),
        (functional.rnn_cell, torch.rnn_tanh_cell, torch.nn.RNNCell(3, 4), h),
    ):
        weights = tuple(cell.parameters())
        for given in (weights, weights[:2]):
            judge(ours(x, hx, *given), applies(theirs, x, hx, *given))
    with pytest.raises(RuntimeError, match="lstm_cell expects two hidden states"):
        functional.lstm_cell(x, (h,), *weights)


def test_nan_in_padding_does_not_exist() -> None:
    """Packed steps of short sequences read nothing of what lies beyond their ends."""
    lengths = (6, 3, 1)
    layer = seqkernels.nn.GRU(3, 4, bidirectional=True)
    with seqkernels.testing.poisoned_empty():
        output, _ = layer(pack_sequence([torch.randn(n, 3) for n in lengths]))
    assert output.data.isfinite().all()


def test_one_sequence_in_a_pack_is_that_sequence() -> None:
    torch.manual_seed(0)
    twin = torch.nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    layer = seqkernels.nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    layer.load_state_dict(twin.state_dict())
    sequences: list[Tensor] = [torch.randn(n, 3, dtype=torch.float32) for n in (5, 2, 4)]
    packed, (h_n, c_n) = layer(pack_sequence(sequences, enforce_sorted=False))
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed)
    for k, sequence in enumerate(sequences):
        judge((padded[: lengths[k], k], h_n[:, k], c_n[:, k]), applies(twin, sequence))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", TWINS)
def test_what_torch_has_not(kind: str, batch_first: bool) -> None:
    """The functions give what the layers give."""
    ours, _, layer = TWINS[kind]
    name = type(layer).__name__
    more = {"nonlinearity": "relu"} if kind == "rnn_relu" else {}
    twin = getattr(seqkernels.nn, name)(3, 4, 2, bidirectional=True, batch_first=batch_first, **more)
    twin.load_state_dict(layer.state_dict())
    x, hx = torch.randn(5, 5, 3), state(kind, 5)
    arguments = (hx, layer._flat_weights, *SETTINGS, batch_first)
    options: dict[str, Any] = {"reset": torch.rand(5, 5) < 0.3, "lengths": torch.tensor([5, 1, 0, 3, 2]), "tbptt": 2}
    output, *finals, traces = ours(x, *arguments, **options, return_states=True)
    expected, hidden, expected_traces = twin(x, hx, **options, return_states=True)
    assert same((output, finals), (expected, hidden if kind == "lstm" else [hidden]))
    assert same([trace.hidden for trace in traces], [trace.hidden for trace in expected_traces])
    cu_seqlens = torch.tensor([0, 3, 3, 5, 9, 10])
    output, *finals = ours(x[0].repeat(2, 1), *arguments, cu_seqlens=cu_seqlens, max_seqlen=4)
    expected, hidden = twin(x[0].repeat(2, 1), hx, cu_seqlens=cu_seqlens)
    assert same((output, finals), (expected, hidden if kind == "lstm" else [hidden]))


@pytest.mark.parametrize("kind", TWINS)
def test_reset_states_are_given_by_layer_and_direction(kind: str) -> None:
    ours, theirs, layer = TWINS[kind]
    torch.manual_seed(0)
    layer.reset_parameters()
    x, begin = torch.randn(5, 2, 3), torch.zeros(5, 2, dtype=torch.bool)
    begin[0] = True
    states = [torch.randn(2 if kind == "lstm" else 1, 4) for _ in range(4)]
    arguments = (layer._flat_weights, *SETTINGS, False)
    initial = [torch.stack(rows).unsqueeze(1).expand(-1, 2, -1) for rows in zip(*states, strict=True)]
    # The flags of the first step are for the forward directions; the reverse ones begin with zeros here.
    initial = [torch.where((torch.arange(4) % 2 == 0).view(-1, 1, 1), rows, 0) for rows in initial]
    zeros = torch.zeros(4, 2, 4)
    found = ours(x, (zeros, zeros) if kind == "lstm" else zeros, *arguments, reset=begin, reset_state=states)
    judge(found, applies(theirs, x, tuple(initial) if kind == "lstm" else initial[0], *arguments))
