"""Whole models as one graph, of any batch and length: torch.export and torch.compile."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import seqkernels
from seqkernels.models import (
    BERT,
    GPT,
    BERTConfig,
    Forecaster,
    ForecasterConfig,
    GPTConfig,
    RecurrentLM,
    RecurrentLMConfig,
    Seq2Seq,
    Seq2SeqConfig,
)
from seqkernels.testing import assert_within_budget

from ..twins import cast, leaves

# Torch's own, from Dynamo when it traces an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
ANY = torch.export.Dim.DYNAMIC


class Classifier(nn.Module):
    """The final states of two layers in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.lstm = seqkernels.nn.LSTM(6, 4, 2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.embedding(tokens), lengths=lengths)
        return self.out(torch.cat((hidden[-2], hidden[-1]), -1))


class Logits(nn.Module):
    """A recurrent language model of which the state is not asked."""

    def __init__(self, model: RecurrentLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, reset: Tensor) -> Tensor:
        return self.model(tokens, reset=reset)[0]


def encoder() -> nn.Module:
    layer = seqkernels.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return seqkernels.nn.TransformerEncoder(layer, 1)


def some(batch: int, steps: int) -> Tensor:
    return torch.arange(batch) % steps + 1


class Model(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], tuple[Any, ...]]
    dynamic: tuple[Any, ...]
    ops: dict[str, int]


MODELS = {
    "classifier": Model(
        Classifier,
        lambda b, t: (torch.randint(7, (b, t)), some(b, t)),
        ({0: ANY, 1: ANY}, {0: ANY}),
        {"recurrence_forward": 4},
    ),
    "seq2seq": Model(
        lambda: Seq2Seq(Seq2SeqConfig(7, 6, 8, dropout=0.0)),
        lambda b, t: (torch.randint(7, (b, t)), some(b, t), torch.randint(7, (b, t + 2))),
        ({0: ANY, 1: ANY}, {0: ANY}, {0: ANY, 1: ANY}),
        {"recurrence_forward": 3, "attention_forward": 1},
    ),
    "gpt": Model(
        lambda: GPT(GPTConfig(7, 32, 8, 1, 2)),
        lambda b, t: (torch.randint(7, (b, t)),),
        ({0: ANY, 1: ANY},),
        {"attention_forward": 1, "rotary": 2},
    ),
    "bert": Model(
        lambda: BERT(BERTConfig(7, 32, 8, 1, 2, dropout=0.0)),
        lambda b, t: (torch.randint(7, (b, t)), some(b, t)),
        ({0: ANY, 1: ANY}, {0: ANY}),
        {"attention_forward": 1},
    ),
    "recurrent": Model(
        lambda: Logits(RecurrentLM(RecurrentLMConfig(7, 6, 8, 1, "gru"))),
        lambda b, t: (torch.randint(7, (b, t)), torch.rand(b, t) < 0.3),
        ({0: ANY, 1: ANY}, {0: ANY, 1: ANY}),
        {"recurrence_forward": 1},
    ),
    "forecaster": Model(
        lambda: Forecaster(ForecasterConfig(2, 3, 8)),
        lambda b, t: (torch.randn(b, t, 2),),
        ({0: ANY, 1: ANY},),
        {"recurrence_forward": 1},
    ),
    "encoder": Model(
        encoder,
        lambda b, t: (torch.randn(b, t, 8), None, torch.arange(t) >= some(b, t)[:, None]),
        ({0: ANY, 1: ANY}, None, {0: ANY, 1: ANY}),
        {"attention_forward": 1},
    ),
}
BY_NAME = pytest.mark.parametrize("name", MODELS)


@BY_NAME
def test_an_exported_model_serves_other_sizes(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, dynamic, ops = MODELS[name]
    model = make().eval()
    program = torch.export.export(model, inputs(3, 5), dynamic_shapes=dynamic)
    targets = Counter(str(node.target) for node in program.graph.nodes)
    assert {f"seqkernels.{op}.default": count for op, count in ops.items()}.items() <= targets.items()
    exported = program.module()
    for sizes in ((3, 5), (2, 9)):
        args = inputs(*sizes)
        assert torch.equal(exported(*args), model(*args))


def value_and_gradients(call: Callable[..., Tensor], model: nn.Module, args: tuple[Any, ...]) -> Tensor:
    found = call(*args)
    grads = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    return torch.cat([x.detach().flatten() for x in leaves((found, grads))])


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "aot_eager") for name in ("seq2seq", "gpt", "bert", "recurrent", "forecaster")),
        # As torch.compile does it by itself, with what it makes of the layers around ours.
        pytest.param("recurrent", "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_serves_other_sizes(name: str, backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, inputs, _, _ = MODELS[name]
    model = make()
    exact = copy.deepcopy(model).double()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for sizes in ((3, 5), (2, 9)):
        args = inputs(*sizes)
        found, own = (value_and_gradients(call, model, args) for call in (compiled, model))
        doubled = tuple(x if x is None else cast(x, torch.float64) for x in args)
        assert_within_budget(found, value_and_gradients(exact, exact, doubled), own)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 2


def test_scheduled_sampling_is_one_graph() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, inputs, _, _ = MODELS["seq2seq"]
    model, (source, lengths, target) = make(), inputs(3, 2)
    exact = copy.deepcopy(model).double()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)

    def found(call: Callable[..., Tensor], model: nn.Module, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return value_and_gradients(call, model, (source, lengths, target[:, :3], 0.5))

    results = []
    for seed in range(5):
        results.append(found(compiled, model, seed))
        assert_within_budget(results[-1], found(exact, exact, seed), found(model, model, seed))
        if seed == 0:
            frames = counter.frame_count
    assert counter.frame_count == frames
    assert not all(torch.allclose(result, results[0]) for result in results)


@torch.no_grad()
def test_graphs_do_not_grow_with_the_length() -> None:
    make, inputs, _, _ = MODELS["classifier"]
    model, counts = make(), []
    for steps in (4, 300):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        torch.compile(model, fullgraph=True, backend=counter, dynamic=False)(*inputs(2, steps))
        counts.append((counter.frame_count, counter.op_count))
    assert counts[0] == counts[1]
