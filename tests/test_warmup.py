"""``warmup`` runs every kernel of a model and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch

import seqkernels
from seqkernels import warmup


class Tagger(torch.nn.Module):
    """Everything that a call may change: running statistics, random numbers, gradients, modes."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 8)
        self.lstm = seqkernels.nn.LSTM(8, 8, 2, dropout=0.5)
        self.norm = torch.nn.BatchNorm1d(8)
        self.seen = []

    def forward(self, tokens, scale=None):
        self.seen.append((torch.is_grad_enabled(), tokens.dtype, tokens.device.type))
        found = self.norm(self.lstm(self.embedding(tokens))[0].flatten(0, 1))
        return found if scale is None else found * scale


def _state(model):
    grads = [None if x.grad is None else x.grad.clone() for x in model.parameters()]
    objects = [id(x) for x in (*model.parameters(), *model.buffers(), *(x.grad for x in model.parameters()))]
    flags = [x.requires_grad for x in model.parameters()] + [x.training for x in model.modules()]
    return [*copy.deepcopy(model.state_dict()).values(), *grads, torch.get_rng_state()], [objects, flags]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_nothing_is_changed(train, backward):
    torch.manual_seed(0)
    model = Tagger().train(train)
    model.embedding.eval()
    model.lstm.weight_hh_l0.requires_grad_(False)
    model.embedding.weight.grad = torch.ones(10, 8)
    before = _state(model)
    warmup(model, [(5, 3), (4, 2)], dtype=torch.int64, backward=backward, progress=False)
    after = _state(model)
    assert all(x is y if x is None else torch.equal(x, y) for x, y in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]
    assert model.seen == [(backward, torch.int64, "cpu")] * 2


def test_buffers_that_a_call_replaces_are_put_back():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("kept", None)

        def forward(self, x):
            self.calls, self.kept = self.calls + 1, x
            raise ValueError("an error of the model")

    model = Counting().train()
    calls = model.calls
    with pytest.raises(ValueError, match="an error of the model"):
        warmup(model, [torch.zeros(2)])
    assert model.calls is calls
    assert calls == 0
    assert model.kept is None


def test_what_ran_is_recorded():
    model = torch.nn.LSTM(8, 16)
    seqkernels.convert(model)
    found = warmup(model, [(5, 2, 8), ((3, 2, 8), ((1, 2, 16), (1, 2, 16)))])
    assert [call.case for call in found.calls] == ["(5, 2, 8)", "((3, 2, 8), ((1, 2, 16), (1, 2, 16)))"]
    for call in found.calls:
        assert call.seconds > 0
        (decision,) = call.explanation.entries
        assert decision.call == seqkernels.backends.Call("recurrence", "cpu", torch.float32, "lstm")


def test_the_backward_pass_is_recorded():
    model = seqkernels.nn.GRU(8, 16).double()
    (call,) = warmup(model, [(5, 2, 8)], backward=True).calls
    assert [entry.call.dtype for entry in call.explanation.entries] == [torch.float64] * 2


def test_functions_have_gradients_of_their_arguments():
    """By name, and where parameters are not those of a module."""
    layer = seqkernels.nn.LSTM(8, 16)
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    attend = seqkernels.functional.scaled_dot_product_attention
    shape = (1, 2, 5, 8)
    for model, case in (
        (attend, {"query": q, "key": shape, "value": shape, "is_causal": True}),
        (attend, (shape, shape, shape)),
        (lambda x: layer(x)[0], (5, 2, 8)),
    ):
        found = warmup(model, [case], dtype=torch.float32, device="cpu", backward=True)
        assert len(found.calls[0].explanation.entries) == 2
    assert q.grad is None
    assert all(x.grad is None for x in layer.parameters())


def test_as_text(monkeypatch):
    layer = seqkernels.nn.LSTM(8, 16, 2)
    with seqkernels.use_backend("reference"):
        text = str(warmup(layer, [(5, 2, 8), torch.zeros(4, 2, 8)]))
    lines = [line.partition(": ")[0] if line[-1] == "s" else line for line in text.splitlines()]
    ran = "  lstm recurrence of torch.float32 on cpu -> reference (2 times)"
    assert lines == ["(5, 2, 8)", ran, "(4, 2, 8) float32", ran]
    monkeypatch.setitem(seqkernels.backends.PREFERENCE, ("recurrence", "cpu"), ("native", "reference"))
    monkeypatch.setattr(seqkernels.backends.backend("native"), "unavailable", lambda: "it was not built")
    monkeypatch.setattr(seqkernels.backends, "_decisions", {})
    monkeypatch.setattr(seqkernels.backends, "_choices", {})
    text = str(warmup(layer, [(5, 2, 8)]))
    assert text.endswith("-> reference (native: it was not built) (2 times)")
    text = str(warmup(torch.nn.ReLU(), [torch.zeros(3)]))
    assert text.endswith("s\n  no operation of seqkernels was called")


def test_without_a_terminal_there_is_no_bar(capfd):
    warmup(seqkernels.nn.RNN(3, 4), [(2, 1, 3)])
    assert capfd.readouterr() == ("", "")


def test_inside_the_capture_of_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="warmup: a CUDA graph is being captured"):
        warmup(seqkernels.nn.RNN(3, 4), [(2, 1, 3)])


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        ([], ValueError, "shapes: expected at least one case, got none"),
        ((5, 2, 8), TypeError, r"shapes: expected a sequence of cases, such as \[\(5, 2, 8\)\], got \(5, 2, 8\)"),
        (torch.zeros(5, 2, 8), TypeError, "shapes: expected a sequence of cases"),
        ([(5, 2, 8), 3], TypeError, r"shapes\[1\]: expected a shape, a Tensor, or a tuple, list or dict .*, got 3"),
    ],
)
def test_errors(shapes, error, message):
    with pytest.raises(error, match=message):
        warmup(seqkernels.nn.RNN(8, 4), shapes)


def test_errors_of_what_cannot_be_known():
    with pytest.raises(ValueError, match=r"dtype: expected one for shape \(2, 3\), since the model has no parameters"):
        warmup(torch.nn.ReLU(), [(2, 3)])
    with pytest.raises(ValueError, match="device: expected one for shape"):
        warmup(torch.nn.ReLU(), [(2, 3)], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"backward: expected a result with a gradient, got none for \(2, 3\)"):
        warmup(lambda x: x.detach(), [(2, 3)], dtype=torch.float32, device="cpu", backward=True)


def test_buffers_that_cannot_be_written_to_stay():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("wide", torch.zeros(1).expand(4))
            with torch.inference_mode():
                self.register_buffer("inferred", torch.ones(4))

        def forward(self, x):
            return x + self.wide + self.inferred

    model = Model()
    before = dict(model.named_buffers())
    seqkernels.warmup(model, [(2, 4)], dtype=torch.float32, device="cpu")
    assert all(model.get_buffer(name) is buffer for name, buffer in before.items())


def test_a_packed_sequence_is_one_argument():
    layer = seqkernels.nn.GRU(3, 4)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    (call,) = seqkernels.warmup(layer, [packed]).calls
    assert call.explanation.entries
