"""The language model with the attention of torch and of seqkernels: same weights, results, gradients and text."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels.models import GPT, GPTCache, GPTConfig
from seqkernels.testing import assert_within_budget

from .parity import assert_same_training

SIZES: dict[str, Any] = {"vocab_size": 23, "context": 24, "embed_size": 32, "num_layers": 2, "num_heads": 4}
CONFIGS = {
    "rotary": GPTConfig(**SIZES),
    "learned": GPTConfig(**SIZES, positions="learned"),
    "grouped": GPTConfig(**SIZES, num_kv_heads=2),
    "sinusoidal": GPTConfig(**SIZES, positions="sinusoidal"),
    "alibi": GPTConfig(**SIZES, num_kv_heads=1, positions="alibi"),
    "none": GPTConfig(**SIZES, positions="none"),
}
LAYERS = [torch.nn, seqkernels.nn]


def make(config: GPTConfig, layers: ModuleType, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(3)
    model = GPT(config, layers).to(dtype)
    # Larger than models begin with, so that attention prefers something.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model


def tokens(length: int = 13, rows: int = 3) -> Tensor:
    return torch.randint(23, (rows, length), generator=torch.Generator().manual_seed(4))


def results(model: GPT) -> dict[str, Tensor]:
    """The logits and all gradients."""
    logits = model(tokens())
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    logits.backward(grad.to(logits.dtype))
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_give_the_same_logits_and_gradients(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    oracle, baseline = results(make(config, torch.nn, torch.float64)), results(make(config, torch.nn))
    actual = results(make(config, seqkernels.nn, dtype))
    assert actual.keys() == oracle.keys() == {"logits", *dict(make(config, torch.nn).named_parameters())}
    assert_within_budget(actual["logits"], oracle["logits"], baseline["logits"], "logits")
    gradients = [
        torch.cat([found[n].flatten() for n in oracle if n != "logits"]) for found in (actual, oracle, baseline)
    ]
    assert_within_budget(*gradients, "gradients")


@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: layers.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_with_a_cache_in_pieces(name: str, layers: ModuleType) -> None:
    config = CONFIGS[name]
    oracle, baseline = (make(config, torch.nn, dtype)(tokens()).detach() for dtype in (torch.float64, torch.float32))
    for dtype in (torch.float32, torch.float64):
        model = make(config, layers, dtype)
        with torch.no_grad():
            cache = GPTCache(config, 3, 13, model.embedding.weight)
            parts = [model(tokens()[:, begin:end], cache) for begin, end in ((0, 5), (5, 6), (6, 10), (10, 13))]
        assert cache.length == 13
        assert_within_budget(torch.cat(parts, 1), oracle, baseline, "logits")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_text_with_and_without_a_cache(name: str) -> None:
    found = [
        make(CONFIGS[name], layers).eval().generate(tokens(4), 20, cache=cache)
        for layers in LAYERS
        for cache in (False, True)
    ]
    assert found[0].shape == (3, 24)
    assert torch.equal(found[0][:, :4], tokens(4))
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_beams_end_whatever_the_length_is_worth() -> None:
    model = make(CONFIGS["rotary"], seqkernels.nn).eval()
    for penalty in (60.0, 400.0, -400.0):
        found = model.generate(tokens(4), 20, beams=4, eos=1, length_penalty=penalty)[:, 4:]
        for row in found.tolist():
            assert 1 not in row or set(row[row.index(1) :]) == {1}


def test_caches_and_lengths_of_other_calls_are_refused() -> None:
    model = make(CONFIGS["rotary"], seqkernels.nn).eval()
    cache = GPTCache(model.config, 4, 8, model.embedding.weight)
    with pytest.raises(ValueError, match="cache: expected one of 1 rows, got 4"):
        model(tokens(1, 1), cache)
    long = torch.zeros(1, model.config.context + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"tokens: expected at most {model.config.context} in a row"):
        model.generate(long, 0)


def test_drawn_text() -> None:
    model = make(CONFIGS["rotary"], seqkernels.nn).eval()

    def draw(seed: int, **options: Any) -> Tensor:
        return model.generate(tokens(4), 20, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(0, temperature=1.0), draw(0, temperature=1.0))
    assert not torch.equal(draw(0, temperature=1.0), draw(1, temperature=1.0))
    assert torch.equal(draw(0, temperature=1.0, top_k=1), draw(0))
    assert torch.equal(draw(0, temperature=1.0, top_p=1e-6), draw(0))
    assert torch.equal(draw(0, beams=1, length_penalty=1.0), draw(0))
    assert torch.equal(draw(0, temperature=1e-4), draw(0))


@pytest.mark.parametrize("name", ["rotary", "learned", "grouped", "sinusoidal", "alibi"])
def test_training_goes_the_same_way(name: str) -> None:
    def loss(model: GPT, step: int, roll: int) -> Tensor:
        text = tokens(14, 6)[step % 2 :: 2].roll(roll, 0)
        return torch.nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    assert_same_training(lambda layers, dtype: make(CONFIGS[name], layers, dtype), loss, rate=0.01)


def test_no_positions_are_none_and_the_others_some() -> None:
    text = tokens(13, 1)
    swapped = text[:, [1, 0, *range(2, 13)]]
    for name, config in CONFIGS.items():
        # Of one block: the mask alone tells later blocks where tokens are.
        model = make(dataclasses.replace(config, num_layers=1), seqkernels.nn, torch.float64)
        change = (model(text) - model(swapped))[0, -1].abs().max()
        assert (change < 1e-12) == (name == "none"), name


@pytest.mark.parametrize("name", CONFIGS)
def test_beyond_the_lengths_of_training(name: str) -> None:
    model, longer = make(CONFIGS[name], seqkernels.nn), dataclasses.replace(CONFIGS[name], context=40)
    beyond = GPT(longer)
    if name == "learned":
        with pytest.raises(RuntimeError, match=r"size mismatch for positions\.weight"):
            beyond.load_state_dict(model.state_dict())
        return
    beyond.load_state_dict(model.state_dict())
    oracle, baseline = (make(longer, torch.nn, dtype)(tokens(40)).detach() for dtype in (torch.float64, torch.float32))
    assert_within_budget(beyond(tokens(40)), oracle, baseline, "logits")


@pytest.mark.parametrize("name", ["rotary", "alibi"])
def test_beams_with_a_cache_equal_those_without(name: str) -> None:
    found = [
        make(CONFIGS[name], layers, torch.float64).eval().generate(tokens(4), 12, cache, beams=3, eos=5)
        for layers, cache in ((torch.nn, True), (seqkernels.nn, True), (seqkernels.nn, False))
    ]
    for other in found[1:]:
        assert torch.equal(other, found[0])
    model = make(CONFIGS[name], seqkernels.nn, torch.float64).eval()
    assert not torch.equal(found[0], model.generate(tokens(4), 12, eos=5))

    def score(text: Tensor) -> Tensor:
        likely = model(text[:, :-1]).log_softmax(-1).gather(2, text[:, 1:, None]).squeeze(2)[:, 3:]
        return likely.where((text[:, 4:] == 5).cumsum(1) - (text[:, 4:] == 5).long() == 0, 0).sum(1)

    assert (score(found[0]) >= score(model.generate(tokens(4), 12, eos=5))).all()


def test_equal_seeds_drop_the_same() -> None:
    config = GPTConfig(**SIZES, dropout=0.3)
    found = []
    for layers, dtype in ((seqkernels.nn, torch.float32), (torch.nn, torch.float64), (torch.nn, torch.float32)):
        model = make(config, layers, dtype)
        torch.manual_seed(6)
        found.append(model(tokens()).detach())
    assert_within_budget(*found, "logits")


def test_state_dict_moves_both_ways() -> None:
    theirs, ours = (GPT(CONFIGS["learned"], layers) for layers in LAYERS)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)


def test_causal() -> None:
    model, changed = make(CONFIGS["rotary"], seqkernels.nn), tokens().clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 23
    assert torch.equal(model(tokens())[:, :7], model(changed)[:, :7])
    assert not torch.equal(model(tokens())[:, 7:], model(changed)[:, 7:])


def test_it_learns() -> None:
    model = GPT(CONFIGS["rotary"], seqkernels.nn)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    text = torch.arange(46).view(2, 23) % 23
    losses = []
    for _ in range(90):
        loss = torch.nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < 2 < losses[0]
    assert model.generate(text[:1, :3], 15)[0].tolist() == list(range(18))


BAD: dict[str, dict[str, Any]] = {
    "vocab_size": {"vocab_size": 0},
    "context": {"context": -1},
    "embed_size: expected a multiple": {"embed_size": 30},
    "embed_size: expected an even number": {"embed_size": 12},
    "num_kv_heads": {"num_kv_heads": 3},
    "dropout": {"dropout": 1.0},
    "positions": {"positions": "absolute"},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sizes(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        GPTConfig(**{**SIZES, **BAD[name]})


def test_bad_arguments() -> None:
    model = GPT(CONFIGS["learned"])
    with pytest.raises(ValueError, match="layers: expected"):
        GPT(CONFIGS["learned"], torch)
    with pytest.raises(ValueError, match="tokens: expected at most 24"):
        model(tokens(25))
    with pytest.raises(ValueError, match="tokens: expected at most 5"):
        model(tokens(6), GPTCache(model.config, 3, 5, model.embedding.weight))
    with pytest.raises(ValueError, match=r"tokens: .* at least one in each row"):
        model.generate(tokens(0), 1)
    with pytest.raises(ValueError, match="steps: expected from 0 to 20 after 4"):
        model.generate(tokens(4), 21)
    with pytest.raises(ValueError, match="temperature"):
        model.generate(tokens(4), 1, temperature=-1.0)
    with pytest.raises(ValueError, match="top_k"):
        model.generate(tokens(4), 1, top_k=24)
    with pytest.raises(ValueError, match="top_p"):
        model.generate(tokens(4), 1, temperature=1.0, top_p=1.1)
    with pytest.raises(ValueError, match="temperature: expected 0 with 4 beams"):
        model.generate(tokens(4), 1, temperature=1.0, beams=4)
    with pytest.raises(ValueError, match="eos: expected a token below 23"):
        model.generate(tokens(4), 1, eos=23)
    assert torch.equal(model.generate(tokens(4), 0), tokens(4))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), ValueError, r"tokens: expected \(B, M\), got \(3,\)"),
        (torch.zeros(1, 3), TypeError, "tokens: expected int64 or int32, got torch.float32"),
    ],
)
def test_tokens_that_are_none(tokens, error, message):
    model = make(CONFIGS["rotary"], seqkernels.nn)
    for call in (model, lambda tokens: model.generate(tokens, 1)):
        with pytest.raises(error, match=message):
            call(tokens)
