"""Recurrences of a product and a pass in each step: what graphs of them share, by emulation.

A tape takes the place of a CUDA graph: it does what was recorded on the first call's memory for every later call.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import types

import pytest
import torch

import seqkernels
from seqkernels import testing
from seqkernels.backends.cuda import emulator
from seqkernels.backends.cuda.plans import STEPS
from seqkernels.backends.cuda.stepwise import Capture, Form, Graphs, Stepwise, Tape, graphs_of
from seqkernels.cells import CELLS

from ..planned import OPTIONS, PRODUCTS, Case, Judge, call_of, run

pytestmark = pytest.mark.skipif(not emulator.in_use(), reason="the emulator was not built, or there is a GPU")


@pytest.fixture(autouse=True)
def _one_thread():
    with testing.threads(1):
        yield


class Counted(Tape):
    """Counts what happens to it."""

    made: list[Counted]

    def __init__(self):
        self.replays = self.drained = self.inside = 0
        type(self).made.append(self)

    def record(self, operations, product):
        product()  # as a capture does before
        replay = super().record(operations, product)

        def counted():
            assert self.inside == 1
            self.replays += 1
            replay()

        return counted

    def enter(self):
        self.inside += 1

    def leave(self):
        self.inside -= 1

    def drain(self):
        assert self.inside == 0
        self.drained += 1


@pytest.fixture
def tapes():
    Counted.made = []
    return Counted.made


def _graphs(length=2, **limits):
    return Graphs(emulator.module(), Counted, length=length, **limits)


def _case(cell, product="bfloat16", shape=(5, 3, 8), **form):
    return Case(cell, product, "steps", 0, 0, shape, **form)


def _same(case, call, graphs):
    """Whether a call by graphs has the bits of one without; results by graphs."""
    with_graphs = run(case, call, Stepwise(emulator.module(), graphs))
    without = run(case, call, Stepwise(emulator.module(), None))
    for name, x in without.items():
        assert torch.equal(with_graphs[name], x), (name, case)
    return with_graphs


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("cell", CELLS)
def test_calls_of_all_lengths_share_a_graph(cell, product, tapes):
    graphs, judge, replays = _graphs(length=4), Judge(), 0
    options = ((), ("reset_state", "peephole"), ("recurrent_mask",)) if cell == "rnn_relu" else ((), OPTIONS)
    kinds = itertools.cycle(itertools.product(options, (False, True), (False, True)))
    for index, steps in enumerate((4, 1, 9, 3, 16, 13, 2, 8, 6)):
        chosen, control, reverse = next(kinds)
        others = not cell.startswith("rnn")
        case = _case(
            cell,
            product,
            (steps, 3, 7),
            options=chosen,
            control=control,
            reverse=reverse,
            others=others,
            every=(0, 6)[index % 2] if cell != "rnn_relu" else 0,
            seed=index,
        )
        judge.run(case, path=Stepwise(emulator.module(), graphs))
        _same(case, call_of(case), graphs)
        segments = [steps] if case.every == 0 else [6] * (steps // 6) + [steps % 6]
        # Twice, by the judge and here; with checkpoints forward again on the way back.
        replays += 2 * sum(segment // 4 for segment in segments) * (2 if case.every == 0 else 3)
    judge.verdict(PRODUCTS[product][0])
    assert len(tapes) == len(graphs) == 2  # forward and back
    assert sum(tape.replays for tape in tapes) == replays > 0
    assert not any(tape.inside or tape.drained for tape in tapes)


def test_weights_may_change_where_they_are(tapes):
    case, graphs = _case("lstm", shape=(4, 3, 8)), _graphs()
    call = call_of(case)
    first = _same(case, call, graphs)
    call.weights.weight_hh.mul_(2)
    second = _same(case, call, graphs)
    assert not torch.equal(first["states"], second["states"])
    assert len(tapes) == 2


@pytest.mark.parametrize("hidden", [8, 12, 7])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_tensors_that_begin_anywhere(cell, hidden):
    """With rows of a multiple of four units, in tensors that begin at none, elements are read one by one."""
    judge = Judge()
    for seed, offset in itertools.product(range(2), (0, 1, 2, 4)):
        case = _case(cell, "float16", (4, 3, hidden), control=True, others=cell != "rnn_tanh", seed=seed)
        call = call_of(case)
        memory = torch.full((call.input.numel() + 8,), float("nan"), dtype=call.input.dtype)
        moved = memory[offset : offset + call.input.numel()].view_as(call.input).copy_(call.input)
        bias = torch.cat([call.weights.bias_hh.new_zeros(offset), call.weights.bias_hh])[offset:]
        elsewhere = call._replace(input=moved, weights=call.weights._replace(bias_hh=bias))
        found, plain = (_same(case, x, _graphs()) for x in (elsewhere, call))
        for name, x in plain.items():
            assert torch.equal(found[name], x), name
        judge.run(case)
    judge.verdict(torch.float16)


@pytest.mark.parametrize("product", ["bfloat16", "exact"])
@pytest.mark.parametrize("cell", CELLS)
def test_many_rows(cell, product):
    judge = Judge()
    for shape in ((17, 1, 5), (3, 300, 9), (1, 300, 4), (2, 1, 1)):
        steps = shape if cell != "rnn_relu" else (2, *shape[1:])
        judge.run(_case(cell, product, steps, control=True, options=("reset_state",), reverse=True))
    judge.verdict(PRODUCTS[product][0])


def test_those_used_last_are_kept(tapes):
    graphs = _graphs(most=4)
    cases = {hidden: _case("gru", shape=(4, 2, hidden)) for hidden in (4, 8, 12)}
    form = lambda hidden, backward: Form("gru", torch.bfloat16, backward, 2, hidden, False)  # noqa: E731
    for hidden in (4, 8, 4, 12):
        _same(cases[hidden], call_of(cases[hidden]), graphs)
    assert len(graphs) == 4
    assert all(form(hidden, backward) in graphs for hidden in (4, 12) for backward in (False, True))
    assert [tape.drained for tape in tapes] == [0, 0, 1, 1, 0, 0]
    _same(cases[8], call_of(cases[8]), graphs)
    assert len(tapes) == 8
    assert sum(tape.drained for tape in tapes) == 4


def test_memory_has_a_limit(tapes):
    graphs = _graphs(most_bytes=5000)
    for hidden in (4, 8, 32, 4):  # of 32 units, weights alone have 8192 bytes
        case = _case("lstm", shape=(2, 2, hidden))
        _same(case, call_of(case), graphs)
    assert len(graphs) == 2
    assert [tape.drained for tape in tapes] == [1, 1, 1, 1, 1, 1, 0, 0]


def test_threads_take_turns():
    graphs, errors = Graphs(emulator.module(), Tape, length=2), []
    cases = [_case("lstm", shape=(8, 2, 8), seed=seed) for seed in range(4)]
    expected = [run(case, call_of(case), Stepwise(emulator.module(), None)) for case in cases]

    def work(index):
        call = call_of(cases[index])
        for _ in range(20):
            try:
                with seqkernels.backends.cuda.emulator.planned(lambda *call: STEPS):
                    found = run(cases[index], call, Stepwise(emulator.module(), graphs))
                assert all(torch.equal(found[name], x) for name, x in expected[index].items())
            except BaseException as error:
                errors.append(error)
                raise

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_an_error_leaves_the_graph_as_it_was(tapes):
    case, graphs = _case("lstm", shape=(4, 3, 8)), _graphs()
    call = call_of(case)
    _same(case, call, graphs)
    wrong = call._replace(control=torch.zeros((4, 2), dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"control: expected shape \(4, 3\)"):
        _forward(case, wrong, graphs)
    assert all(tape.inside == 0 for tape in tapes)
    _same(case, call, graphs)
    assert len(tapes) == 2


def _forward(case, call, graphs):
    from seqkernels.backends import _through_time

    _through_time.recurrence_forward(Stepwise(emulator.module(), graphs), *call[:4], case.cell, False, False)


def test_a_graph_made_in_inference_mode_serves_others():
    torch.manual_seed(0)
    layer, x = seqkernels.nn.GRU(6, 11), torch.randn(33, 2, 6)
    form = Form("gru", torch.float32, False, 2, 11, False)
    assert form not in graphs_of(emulator.module(), torch.device("cpu"))
    with seqkernels.use_backend("cuda"), emulator.planned(lambda *call: STEPS):
        with torch.inference_mode():
            first = layer(x)[0]
        second = layer(x)[0]
        second.sum().backward()
        with torch.inference_mode():
            third = layer(x)[0]
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert form in graphs_of(emulator.module(), torch.device("cpu"))


def test_a_layer_by_steps():
    layer = seqkernels.nn.LSTM(6, 10, num_layers=2, bidirectional=True)
    x = torch.randn(40, 3, 6, requires_grad=True)
    found, expected = [], []
    for results, backend in ((found, "cuda"), (expected, "reference")):
        with seqkernels.use_backend(backend), emulator.planned(lambda *call: STEPS):
            output, (h_n, c_n) = layer(x)
            results += [output, h_n, c_n, *torch.autograd.grad(output.sum() + c_n.sum(), [x, *layer.parameters()])]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    forms = (Form("lstm", torch.float32, backward, 3, 10, False) for backward in (False, True))
    assert all(form in graphs_of(emulator.module(), torch.device("cpu")) for form in forms)


class Log:
    """torch.cuda's streams, events and graphs, which write down what is asked of them."""

    def __init__(self, monkeypatch):
        self.said: list[str] = []
        self.current, self.made = "caller", 0
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "current_stream", lambda device: self.stream(self.current))
        monkeypatch.setattr(cuda, "ExternalStream", lambda pointer, device: self.stream(f"own {pointer}"))
        monkeypatch.setattr(cuda, "stream", self.inside)
        monkeypatch.setattr(cuda, "device", lambda index: contextlib.nullcontext())
        monkeypatch.setattr(cuda, "current_blas_handle", lambda: self.note("handle"))
        monkeypatch.setattr(cuda, "Event", lambda: self.thing("event", "synchronize", record="name"))
        graph = lambda: self.thing("graph", "capture_begin", "capture_end", "replay", "reset")  # noqa: E731
        monkeypatch.setattr(cuda, "CUDAGraph", graph)
        monkeypatch.setattr(Capture, "_free", {})

    def note(self, text):
        self.said.append(f"{self.current}: {text}")

    def thing(self, name, *methods, **with_argument):
        named = {method: (lambda m: lambda **_: self.note(f"{name} {m}"))(method) for method in methods}
        given = {
            method: (lambda m: lambda other: self.note(f"{name} {m} {other.name}"))(method) for method in with_argument
        }
        return types.SimpleNamespace(name=name, **named, **given)

    def stream(self, name):
        return self.thing(name, wait_stream="name", wait_event="name")

    @contextlib.contextmanager
    def inside(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def make_stream(self, device):
        self.made += 1
        return self.made


def test_what_a_capture_asks_of_torch(monkeypatch):
    log = Log(monkeypatch)
    capture = Capture(types.SimpleNamespace(make_stream=log.make_stream), torch.device("cuda", 0))
    product, own = (functools.partial(log.note, name) for name in ("product", "pass"))
    caller = threading.get_ident()
    assert capture.allocate(lambda: log.note("memory") or threading.get_ident()) != caller
    replay = capture.record([product, own], product)
    capture.enter()
    replay()
    capture.leave()
    log.current = "another"
    capture.enter()
    replay()
    capture.leave()
    capture.drain()
    assert log.said == [
        "own 1: memory",
        "caller: product",
        "caller: handle",
        "own 1: graph capture_begin",
        "own 1: product",
        "own 1: pass",
        "own 1: graph capture_end",
        "caller: graph replay",
        "caller: event record caller",
        "another: another wait_event event",
        "another: graph replay",
        "another: event record another",
        "another: event synchronize",
        "another: graph reset",
    ]
    for _ in range(2):  # the stream that is free, then a new one
        Capture(types.SimpleNamespace(make_stream=log.make_stream), torch.device("cuda", 0))
    assert log.made == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 0}, "hidden: expected 1 or more, got 0"),
        ({"batch": 0}, "batch: expected 1 or more, got 0"),
        ({"cell": "peephole"}, "cell: expected 'rnn_tanh', 'rnn_relu', 'lstm' or 'gru', got 'peephole'"),
        ({"operand": torch.zeros(3, 4)}, r"operand: expected shape \(3, 8\), got \(3, 4\)"),
        ({"product_tensor": torch.zeros(3, 8)}, r"product_tensor: expected shape \(3, 32\), got \(3, 8\)"),
        ({"space": torch.zeros(8, dtype=torch.uint8)}, "space: expected shape"),
    ],
    ids=str,
)
def test_errors(change, message):
    kernels = emulator.module()
    arguments = {
        "cell": "lstm",
        "product": "exact",
        "backward": False,
        "hidden": 8,
        "batch": 3,
        "space": torch.zeros(kernels.SPACE_BYTES, dtype=torch.uint8),
        "operand": torch.zeros(3, 8),
        "product_tensor": torch.zeros(3, 32),
    }
    with pytest.raises(ValueError, match=message):
        kernels.Steps(**arguments | change)
    with pytest.raises(ValueError, match="turn: expected 0 or 1, got 2"):
        kernels.Steps(**arguments).step(2)
