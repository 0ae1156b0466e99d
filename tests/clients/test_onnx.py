"""Models with layers of seqkernels in ONNX Runtime."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import seqkernels
from seqkernels import functional
from seqkernels.scores import Scores
from seqkernels.testing import assert_within_budget

from ..twins import cast, leaves

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from seqkernels.integrations.onnx import _is_plain, export  # noqa: E402

# Of torch's exporter, which copies specifications of trees and reads a version.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
ANY = torch.export.Dim.DYNAMIC


def session(model: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = str(model) if isinstance(model, Path) else model.model_proto.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def judge(program: Any, model: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Assert that ONNX Runtime's results are within the budget, each by itself."""
    of_onnx = session(program)
    names = [given.name for given in of_onnx.get_inputs()]
    found = of_onnx.run(None, {name: x.numpy() for name, x in zip(names, args, strict=True)})
    with torch.no_grad():
        own, exact = leaves(model(*args)), leaves(copy.deepcopy(model).double()(*cast(args, torch.float64)))
    assert len(found) == len(own)
    for k, (array, baseline, oracle) in enumerate(zip(found, own, exact, strict=True)):
        assert_within_budget(torch.from_numpy(array), oracle, baseline, f"result {k}")


def operators(program: Any) -> Counter[str]:
    return Counter(node.op_type for node in program.model.graph)


class Recurrences(nn.Module):
    """Every form that ONNX has."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = seqkernels.nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
        self.gru = seqkernels.nn.GRU(8, 4, bias=False)
        self.rnn = seqkernels.nn.RNN(4, 5, nonlinearity="relu", bidirectional=True)
        self.peephole = seqkernels.nn.LSTM(10, 3, peephole=True)
        self.cell = seqkernels.nn.LSTMCell(3, 3)

    def forward(self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor) -> Any:
        first, states = self.lstm(x, (h, c), lengths=lengths)
        second, h_gru = self.gru(first.transpose(0, 1), h[:1])
        third, h_rnn = self.rnn(second, tbptt=2)
        fourth, last = self.peephole(third, checkpoint_every=2)
        weights = list(self.gru.parameters())
        again, _ = functional.gru(first, h[:1], weights, False, 1, 0.0, False, False, True)
        return first, states, second, h_gru, third, h_rnn, fourth, last, self.cell(fourth[0]), again


def recurrence_inputs(batch: int, steps: int) -> tuple[Tensor, ...]:
    lengths = torch.arange(batch) % steps + 1
    return torch.randn(batch, steps, 3), torch.randn(4, batch, 4), torch.randn(4, batch, 4), lengths


def test_recurrences() -> None:
    torch.manual_seed(0)
    model = Recurrences().eval()
    shapes = ({0: ANY, 1: ANY}, {1: ANY}, {1: ANY}, {0: ANY})
    program = export(model, recurrence_inputs(3, 4), dynamic_shapes=shapes)
    count = operators(program)
    assert (count["LSTM"], count["GRU"], count["RNN"]) == (4, 2, 1)
    for node in program.model.graph:
        if node.op_type in ("LSTM", "GRU", "RNN"):
            weights = [node.inputs[k] for k in (1, 2, 3, 7) if k < len(node.inputs)]
            assert all(value is None or value.const_value is not None for value in weights), node
    for batch, steps in ((3, 4), (5, 7)):
        judge(program, model, recurrence_inputs(batch, steps))


class Attentions(nn.Module):
    """What the operator says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = seqkernels.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        masked, weights = self.layer(x, x, x, key_padding_mask=padding, attn_mask=mask, is_causal=True)
        q = x.unflatten(2, (4, 2)).transpose(1, 2)
        k = v = q[:, :2]
        biased = functional.scaled_dot_product_attention(q, k, v, x.mean(2)[:, None, None], enable_gqa=True)
        return masked, weights, biased, functional.scaled_dot_product_attention(q, q, q, is_causal=True)


class Window(nn.Module):
    """What it does not say."""

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q = x.unsqueeze(1)
        return functional.attention(q, q, q, drop=padding[:, None, None], window=(2, 0), softcap=2.0)


def attention_inputs(batch: int, steps: int) -> tuple[Tensor, Tensor]:
    padding = torch.arange(steps) < torch.arange(batch)[:, None]  # so that first queries see no key
    return torch.randn(batch, steps, 8), padding


@pytest.mark.parametrize(("module", "opset", "count"), [(Attentions, 23, 3), (Window, 20, 0)])
def test_attention(module: type[nn.Module], opset: int, count: int) -> None:
    torch.manual_seed(0)
    model = module().eval()
    shapes = ({1: ANY}, {1: ANY})
    program = export(model, attention_inputs(3, 4), dynamic_shapes=shapes, opset_version=opset)
    assert operators(program)["Attention"] == count
    judge(program, model, attention_inputs(3, 6))


def test_what_the_operator_cannot_say() -> None:
    some = torch.zeros(2)
    assert _is_plain(Scores(0.5, right=0, mask=some, bias=some))
    for beyond in ({"right": 1}, {"left": 0}, {"softcap": 1.0}, {"sink": some}, {"alibi_slopes": some}):
        assert not _is_plain(Scores(0.5, **beyond))


def test_a_whole_model_in_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True, dropout=0.0)
            self.out = nn.Linear(12, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.lstm(self.encoder(self.embedding(tokens)))[0])

    model = Tagger().eval()
    assert len(seqkernels.convert(model).swapped) == 3
    tokens, path = torch.randint(11, (2, 5)), tmp_path / "tagger.onnx"
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("steps")}
    program = export(model, (tokens,), path, dynamic_shapes=(sizes,), input_names=["tokens"], output_names=["scores"])
    count = operators(program)
    assert (count["LSTM"], count["Attention"]) == (1, 1)
    of_file = session(path)
    assert [given.name for given in of_file.get_inputs()] == ["tokens"]
    assert [made.name for made in of_file.get_outputs()] == ["scores"]
    judge(path, model, (torch.randint(11, (4, 9)),))


def layer(kind: str, **options: Any) -> Any:
    return getattr(seqkernels.nn, kind)(3, 4, **options)


X = torch.randn(5, 2, 3)
REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (lambda: layer("LSTM", proj_size=2), {}, "proj_size: ONNX has no .*; expected 0, got a projection"),
    # Three weights for each of two layers could be two for each of three.
    (lambda: layer("LSTM", num_layers=2, bias=False, proj_size=2), {}, "proj_size: ONNX has no "),
    (lambda: layer("GRU"), {"reset": torch.zeros(5, 2).bool()}, "reset: ONNX has .* expected None, got a Tensor"),
    (lambda: layer("GRU"), {"return_states": True}, "return_states: .* expected False, got True"),
    (lambda: layer("GRU"), {"return_gates": True}, "return_gates: .* expected False, got True"),
    (lambda: layer("RNN", zoneout=0.5), {}, r"zoneout: .* expected 0, got 0\.5"),
    (lambda: layer("LSTM", layer_norm=True), {}, "layer_norm: .* expected False, got True"),
]


@pytest.mark.parametrize(("make", "kwargs", "text"), REFUSED)
def test_what_onnx_cannot_say(make: Callable[[], nn.Module], kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        export(make().eval(), (X,), kwargs=kwargs)
    assert seqkernels.ops._eager.exporter is None


class Holder(nn.Module):
    """Calls a layer in some way."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.layer, x)


def test_wrong_states_of_a_model() -> None:
    model = layer("GRU", num_layers=2, dropout=0.5)
    with pytest.raises(ValueError, match=r"^model: .* call model.eval\(\)$"):
        export(model, (X,))
    holder = Holder(model, lambda layer, x: layer(x)).eval()
    model.train()
    with pytest.raises(ValueError, match=r"^dropout: .* expected layers in evaluation mode"):
        export(holder, (X,))
    holder = Holder(model, lambda layer, x: layer(pack_sequence([x[:, 0], x[:2, 1]]))[1]).eval()
    with pytest.raises(RuntimeError, match=r"^batch_sizes: torch\.export cannot trace packed data"):
        export(holder, (X,))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"^autocast: expected off"):
        export(layer("GRU").eval(), (X,))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"^autocast: expected off"):
        export(layer("GRUCell").eval(), (X[0],))


def test_functions_with_what_layers_have_not() -> None:
    torch.manual_seed(0)
    weights = [weight.detach() for weight in layer("LSTM").parameters()]

    def normed(_: nn.Module, x: Tensor) -> Any:
        h = x.new_zeros(1, 2, 4)
        norm_c = [x.new_ones(2, 4)]
        return functional.lstm(x, (h, h), weights, True, 1, 0.0, False, False, False, norm_c=norm_c)

    with pytest.raises(ValueError, match=r"^layer_norm: ONNX has no "):
        export(Holder(nn.Identity(), normed).eval(), (X,))

    def one_bias(_: nn.Module, x: Tensor) -> Any:
        h = torch.zeros(2, 4, dtype=x.dtype)
        w_ih, w_hh, _, b_hh = (weight.to(x.dtype) for weight in weights)
        return functional.lstm_cell(x, (h, h), w_ih, w_hh, None, b_hh)

    model = Holder(nn.Identity(), one_bias).eval()
    judge(export(model, (X[0],)), model, (X[0],))


def test_other_threads_compute_meanwhile() -> None:
    torch.manual_seed(0)
    other = layer("LSTM").eval()
    q = torch.randn(1, 2, 3, 4)
    found: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            found.extend([other(X)[0], other.step(X[0])[0], functional.attention(q, q, q)])

    run()

    def in_between(layer: nn.Module, x: Tensor) -> Any:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return layer(x)

    export(Holder(layer("GRU"), in_between).eval(), (X,))
    assert len(found) == 6
    for own, meanwhile in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(meanwhile, own)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ImportError, match=r"onnxscript: pip install 'seqkernels\[onnx\]'"):
        export(layer("GRU").eval(), (X,))
