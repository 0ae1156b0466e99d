"""Recurrences of a product and a pass in each step on a GPU: their CUDA graphs, streams, and captures by others."""

from __future__ import annotations

import threading

import pytest
import torch

import seqkernels
from seqkernels.backends.cuda import emulator
from seqkernels.backends.cuda import recurrence as of_cuda
from seqkernels.backends.cuda.extension import extension, load_error
from seqkernels.backends.cuda.plans import STEPS
from seqkernels.backends.cuda.stepwise import Capture, Graphs, Stepwise, graphs_of
from seqkernels.cells import CELLS

from ..planned import OPTIONS, PRODUCTS, Case, Judge, call_of, run

pytestmark = pytest.mark.skipif(load_error() is not None, reason=str(load_error()))

SIZES = ((1, 1), (20, 17), (300, 64), (20, 257), (64, 513), (1, 1024), (513, 128), (7, 1800))


def _device():
    return torch.device("cuda", torch.cuda.current_device())


def _graphs(**limits):
    return Graphs(extension(), lambda: Capture(extension(), _device()), **limits)


def _case(cell="lstm", product="bfloat16", shape=(40, 64, 256), **form):
    return Case(cell, product, "steps", 0, 0, shape, **form)


def _plain(case, call):
    return run(case, call, Stepwise(extension(), None))


def _equal(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("cell", CELLS)
def test_sizes(cell, product):
    judge = Judge()
    for index, (batch, hidden) in enumerate(SIZES):
        steps = 2 if cell == "rnn_relu" else 19
        options = OPTIONS if index % 3 == 0 and cell in ("lstm", "gru") else ()
        judge.run(
            _case(
                cell,
                product,
                (steps, batch, hidden),
                reverse=index % 2 == 1,
                control=index % 3 < 2,
                options=options,
                others=not cell.startswith("rnn"),
                seed=index,
            ),
            "cuda",
        )
    judge.verdict(PRODUCTS[product][0])


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_graphs_have_the_bits_of_launches(cell, product):
    graphs = _graphs(length=4)
    for steps in (4, 17, 3, 8, 33):
        case = _case(cell, product, (steps, 24, 72), control=True, seed=steps)
        call = call_of(case, "cuda")
        _equal(run(case, call, Stepwise(extension(), graphs)), _plain(case, call))
    assert len(graphs) == 2


def test_a_graph_on_two_streams():
    graphs, case = _graphs(), _case(control=True)
    calls = [call_of(case._replace(seed=seed), "cuda") for seed in range(2)]
    expected = [_plain(case, call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(case, call, Stepwise(extension(), graphs)))
        torch.cuda.synchronize()
        for results, wanted in zip(found, expected, strict=True):
            _equal(results, wanted)
    assert len(graphs) == 2


def test_other_graphs_at_the_same_time():
    """Graphs of two forms on two streams, beside products of the streams' own."""
    graphs, cases = _graphs(), [_case(shape=(64, 24, 512)), _case("gru", shape=(64, 24, 512))]
    calls = [call_of(case, "cuda") for case in cases]
    expected = [_plain(case, call) for case, call in zip(cases, calls, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    x = torch.randn(64, 8192, device="cuda", dtype=torch.bfloat16)
    square = x @ x.t()
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, case, call in zip(streams, cases, calls, strict=False):
            with torch.cuda.stream(stream):
                found.append(run(case, call, Stepwise(extension(), graphs)))
        with torch.cuda.stream(streams[2]):
            squares = [x @ x.t() for _ in range(100)]
        torch.cuda.synchronize()
        assert all(torch.equal(found, square) for found in squares)
        for results, wanted in zip(found, expected, strict=True):
            _equal(results, wanted)


def test_threads():
    graphs, errors = _graphs(), []
    cases = [_case(shape=(40, 16, 128), seed=seed) for seed in range(3)]
    calls = [call_of(case, "cuda") for case in cases]
    expected = [_plain(case, call) for case, call in zip(cases, calls, strict=True)]
    torch.cuda.synchronize()

    def work(index):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    found = run(cases[index], calls[index], Stepwise(extension(), graphs))
                    torch.cuda.current_stream().synchronize()
                    _equal(found, expected[index])
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_graphs_that_go_leave_the_others():
    """A graph that is let go takes the workspace of its products along, and no other graph's."""
    graphs = _graphs(length=4, most=3)
    for round_ in range(4):
        for hidden in (64, 512, 128, 256):
            case = _case(shape=(9, 16, hidden), seed=round_)
            call = call_of(case, "cuda")
            _equal(run(case, call, Stepwise(extension(), graphs)), _plain(case, call))
            assert len(graphs) <= 3
        torch.cuda.empty_cache()


def _layer(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return seqkernels.nn.LSTM(8, 24).to("cuda", dtype)


def test_beside_graphs_of_torch_compile():
    """They use memory again that nobody is known to have, and have torch forget workspaces."""
    layer, x = _layer().requires_grad_(False), torch.randn(40, 64, 8, device="cuda", dtype=torch.bfloat16)
    with seqkernels.use_backend("cuda"), emulator.planned(lambda *call: STEPS), torch.no_grad():
        compiled = torch.compile(lambda x: layer(x)[0].sin(), mode="reduce-overhead")
        first = [compiled(x).clone() for _ in range(4)]
        others = [torch.randn(1 << 20, device="cuda") for _ in range(100)]
        expected = layer(x)[0].sin()
        del others
        for found in [*first, compiled(x)]:
            assert _close(found, expected)


def _close(found, expected):
    return bool(((found.float() - expected.float()).norm() <= 0.02 * expected.float().norm()).item())


def test_captured_by_its_user():
    layer, x = _layer(), torch.randn(40, 4, 8, device="cuda", dtype=torch.bfloat16)
    layer.requires_grad_(False)
    graphs = graphs_of(of_cuda.kernels(), _device())
    with seqkernels.use_backend("cuda"), emulator.planned(lambda *call: STEPS):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.synchronize()
        known, graph = len(graphs), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer(x)[0]
        assert len(graphs) == known
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(found, layer(x)[0])


def test_a_model_in_training():
    """Forward and back, whose calls come from two threads; weights that an optimizer changes where they are."""
    found = []
    for planned in (True, False):
        layer = _layer(torch.float32)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        generator = torch.Generator("cuda").manual_seed(0)
        for _ in range(5):
            x = torch.randn(40, 4, 8, device="cuda", generator=generator)
            with seqkernels.use_backend("cuda" if planned else "reference"), emulator.planned(lambda *call: STEPS):
                layer(x)[0].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([x.detach().clone() for x in layer.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_under_a_sanitizer(cell):
    """Small ones, which `make gpu-test` runs under memcheck and racecheck too."""
    judge = Judge()
    for hidden in (72, 9):
        judge.run(_case(cell, "bfloat16", (5, 9, hidden), control=True, options=("reset_state",)), "cuda")
    judge.verdict(torch.bfloat16)
