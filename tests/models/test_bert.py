"""The encoder with the layers of torch and of seqkernels: same weights, results, gradients and training; its masks."""

from __future__ import annotations

import copy
import dataclasses
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqkernels
from seqkernels.models import BERT, BERTConfig, mask_tokens
from seqkernels.models.bert import IGNORED
from seqkernels.testing import assert_within_budget

from .parity import assert_same_training

CONFIG = BERTConfig(23, context=12, embed_size=32, num_layers=2, num_heads=4, dropout=0.0, num_classes=3)
LAYERS = [torch.nn, seqkernels.nn]
LENGTHS = torch.tensor([7, 11, 1, 4, 0])
TARGETS = torch.tensor([0, 2, 1, 1])

Batch = tuple[Tensor, Tensor, Tensor]


def make(layers: ModuleType, dtype: torch.dtype = torch.float32, config: BERTConfig = CONFIG) -> BERT:
    torch.manual_seed(3)
    model = BERT(config, layers).to(dtype)
    # Larger than models begin with, so that attention prefers something.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model


def batch() -> Batch:
    """Tokens (5, 11) of lengths 11 to 0, and segments."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(CONFIG.num_special, CONFIG.vocab_size, (5, 11), generator=generator)
    tokens[torch.arange(11) >= LENGTHS[:, None]] = CONFIG.pad
    return tokens, LENGTHS, (torch.arange(11) > 2).long().expand(5, -1)


def results(model: BERT) -> dict[str, Tensor]:
    """The logits of both heads, and all gradients."""
    found = {"tokens": model(*batch()), "classes": model.classify(*batch())}
    for seed, logits in enumerate(found.values()):
        # A row of no tokens is looked at by nobody.
        grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
        logits.backward(grad.to(logits.dtype) * (LENGTHS > 0).view(-1, *[1] * (logits.dim() - 1)))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: x.detach() for name, x in found.items()}, **gradients}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_give_the_same_logits_and_gradients(dtype: torch.dtype) -> None:
    oracle, baseline = results(make(torch.nn, torch.float64)), results(make(torch.nn))
    actual = results(make(seqkernels.nn, dtype))
    assert actual.keys() == oracle.keys() == {"tokens", "classes", *dict(make(torch.nn).named_parameters())}
    for name in ("tokens", "classes"):
        assert_within_budget(actual[name], oracle[name], baseline[name], name)
    gradients = [
        torch.cat([found[name].flatten() for name, _ in make(torch.nn).named_parameters()])
        for found in (actual, oracle, baseline)
    ]
    assert_within_budget(*gradients, "gradients")


@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: layers.__name__)
def test_without_gradients(layers: ModuleType) -> None:
    # Torch then takes another way.
    oracle, baseline = (results(make(torch.nn, dtype)) for dtype in (torch.float64, torch.float32))
    model, real = make(layers).eval(), torch.arange(11) < LENGTHS[:, None]
    with torch.inference_mode():
        tokens, classes = model(*batch()), model.classify(*batch())
    assert_within_budget(tokens[real], oracle["tokens"][real], baseline["tokens"][real], "tokens")
    assert_within_budget(classes[:4], oracle["classes"][:4], baseline["classes"][:4], "classes")
    assert classes.isfinite().all()


def test_training_goes_the_same_way() -> None:
    """On both heads."""
    tokens, lengths, segments = (x[:4] for x in batch())
    inputs, hidden = mask_tokens(tokens, CONFIG, torch.Generator().manual_seed(7), 0.3)

    def loss(model: BERT, step: int, roll: int) -> Tensor:
        rolled = (x.roll(roll, 0) for x in (tokens, lengths, segments, inputs, hidden, TARGETS))
        read, sizes, parts, masked, wanted, classes = rolled
        chosen = wanted != IGNORED
        logits = model.predict(model.encode(masked, sizes, parts)[chosen])
        told = model.classify(read, sizes, parts)
        return F.cross_entropy(logits, wanted[chosen]) + F.cross_entropy(told, classes)

    assert_same_training(make, loss, rate=0.02)


def test_dropout_is_for_training() -> None:
    model = make(seqkernels.nn, config=dataclasses.replace(CONFIG, dropout=0.3))

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.classify(*batch()).detach()

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    model.eval()
    assert torch.equal(draw(0), make(seqkernels.nn).classify(*batch()))


def test_same_seed_gives_the_same_weights() -> None:
    theirs, ours = (BERT(CONFIG, layers) for layers in LAYERS)
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = make(torch.nn), make(seqkernels.nn)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: layers.__name__)
def test_padding_does_not_change_results(layers: ModuleType) -> None:
    tokens, lengths, segments = batch()
    real = torch.arange(11) < lengths[:, None]
    oracle, baseline = (results(make(torch.nn, dtype)) for dtype in (torch.float64, torch.float32))
    batches = {
        "another token": [(tokens.where(real, 9), lengths, segments)],
        "more of it": [(F.pad(tokens, (0, 1)), lengths.int(), F.pad(segments, (0, 1)))],
        "none": [(tokens[i : i + 1, :n], None, segments[i : i + 1, :n]) for i, n in enumerate(lengths[:4].tolist())],
    }
    model = make(layers)
    for name, parts in batches.items():
        with torch.no_grad():
            rows = [row for part in parts for row in model(*part)]
            classes = torch.cat([model.classify(*part) for part in parts])[:4]
        logits = [row[:length] for row, length in zip(rows, lengths[:4], strict=False)]
        assert_within_budget(torch.cat(logits), oracle["tokens"][real], baseline["tokens"][real], name)
        assert_within_budget(classes, oracle["classes"][:4], baseline["classes"][:4], name)


@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: layers.__name__)
def test_rows_of_no_tokens_are_finite(layers: ModuleType) -> None:
    tokens, _, segments = batch()
    for model in (make(layers), make(layers).eval()):
        assert model(tokens, torch.zeros(5, dtype=torch.int64), segments).isfinite().all()
        logits = model.classify(tokens, LENGTHS, segments)
        assert logits.isfinite().all()
        logits.sum().backward()
        for parameter in model.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all()


def test_every_token_is_read_from_both_sides() -> None:
    model, (tokens, _, _) = make(seqkernels.nn), batch()
    changed = tokens.clone()
    changed[:, 5] = CONFIG.mask
    assert bool((model(tokens) != model(changed)).any(-1).all())
    assert not torch.equal(model(tokens), model(tokens, segments=torch.ones_like(tokens)))


# names in transformers, and ours
HEADS = {
    "bert.embeddings.word_embeddings.weight": "embedding.weight",
    "bert.embeddings.position_embeddings.weight": "positions.weight",
    "bert.embeddings.token_type_embeddings.weight": "segments.weight",
    "bert.embeddings.LayerNorm.": "norm.",
    "cls.predictions.transform.dense.": "transform.",
    "cls.predictions.transform.LayerNorm.": "transform_norm.",
    "cls.predictions.bias": "bias",
}
BLOCKS = {
    "attention.output.dense.": "self_attn.out_proj.",
    "attention.output.LayerNorm.": "norm1.",
    "intermediate.dense.": "linear1.",
    "output.dense.": "linear2.",
    "output.LayerNorm.": "norm2.",
}


def of_transformers(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of their ``BertForMaskedLM`` by our names."""
    found = {}
    for name, value in theirs.items():
        if name.startswith("bert.encoder.layer."):
            number, rest = name.removeprefix("bert.encoder.layer.").split(".", 1)
            for begin, ours in BLOCKS.items():
                if rest.startswith(begin):
                    found[f"blocks.{number}.{ours}{rest.removeprefix(begin)}"] = value
        else:
            for begin, ours in HEADS.items():
                if name.startswith(begin):
                    found[ours + name.removeprefix(begin)] = value
    for number in range(CONFIG.num_layers):
        for kind in ("weight", "bias"):
            parts = [
                theirs[f"bert.encoder.layer.{number}.attention.self.{x}.{kind}"] for x in ("query", "key", "value")
            ]
            found[f"blocks.{number}.self_attn.in_proj_{kind}"] = torch.cat(parts)
    return found


def test_it_is_the_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=128, max_position_embeddings=12)
    torch.manual_seed(3)
    theirs = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    ours = BERT(dataclasses.replace(CONFIG, num_classes=0)).eval()
    ours.load_state_dict(of_transformers(theirs.state_dict()))
    tokens, lengths, segments = batch()
    real = torch.arange(11) < lengths[:, None]
    with torch.no_grad():
        baseline, oracle = (
            model(tokens, attention_mask=real.long(), token_type_ids=segments).logits[real]
            for model in (theirs, copy.deepcopy(theirs).double())
        )
        assert_within_budget(ours(tokens, lengths, segments)[real], oracle, baseline, "logits")


def test_masked_tokens_are_those_of_the_paper() -> None:
    config = BERTConfig(1005)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 1005, (400, 500), generator=generator)
    special = torch.rand(tokens.shape, generator=generator) < 0.3
    tokens[special] = torch.randint(5, tokens.shape, generator=generator)[special]
    before = tokens.clone()
    inputs, targets = mask_tokens(tokens, config, generator)
    assert torch.equal(tokens, before)
    chosen = targets != IGNORED
    assert not bool((chosen & special).any())
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert torch.equal(targets[chosen], tokens[chosen])

    def close(part: Tensor, of: Tensor, expected: float) -> None:
        count = int(of.sum())
        deviation = (expected * (1 - expected) / count) ** 0.5
        assert abs(int(part.sum()) / count - expected) < 5 * deviation

    close(chosen & ~special, ~special, 0.15)
    masked = chosen & (inputs == config.mask)
    kept = chosen & (inputs == tokens)
    drawn = chosen & ~masked & ~kept
    close(masked, chosen, 0.8)
    close(kept, chosen, 0.1 + 0.1 / 1000)
    assert inputs[drawn].min() == 5
    assert inputs[drawn].max() == 1004
    assert len(inputs[drawn].unique()) > 850


def test_masks_are_drawn_by_the_generator() -> None:
    tokens = torch.arange(23).expand(50, -1).int()

    def draw(seed: int, probability: float = 0.15) -> list[Tensor]:
        return list(mask_tokens(tokens, CONFIG, torch.Generator().manual_seed(seed), probability))

    assert all(map(torch.equal, draw(0), draw(0)))
    assert not torch.equal(draw(0)[1], draw(1)[1])
    assert [x.dtype for x in draw(0)] == [torch.int32, torch.int64]
    assert torch.equal(draw(0, 0.0)[0], tokens)
    assert bool((draw(0, 0.0)[1] == IGNORED).all())
    assert torch.equal(draw(0, 1.0)[1] == IGNORED, tokens < 5)


BAD: dict[str, dict[str, Any]] = {
    "vocab_size": {"vocab_size": 0},
    "context: expected a positive number, got -1": {"context": -1},
    "embed_size: expected a multiple of 4 heads, got 30": {"embed_size": 30},
    "num_segments": {"num_segments": 0},
    "dropout: expected 0 <= dropout < 1": {"dropout": 1.0},
    "num_classes: expected 0, or 2 or more, got 1": {"num_classes": 1},
    "num_special: expected from 2 to 22, got 23": {"num_special": 23},
    "pad: expected from 0 to 4, got 5": {"pad": 5},
    "mask: expected from 0 to 4, got -1": {"mask": -1},
    "mask: expected another token than pad": {"mask": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_sizes(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **BAD[message])


def test_bad_arguments() -> None:
    model, (tokens, lengths, segments) = make(seqkernels.nn), batch()
    with pytest.raises(ValueError, match="layers: expected"):
        BERT(CONFIG, torch)
    with pytest.raises(ValueError, match=r"tokens: expected \(B, M\), got \(11,\)"):
        model(tokens[0])
    with pytest.raises(ValueError, match="tokens: expected at most 12 in a row, got 13"):
        model(F.pad(tokens, (0, 2)))
    with pytest.raises(TypeError, match=r"tokens: expected int64 or int32, got torch\.float32"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"lengths: expected \(5,\), got \(4,\)"):
        model(tokens, lengths[:4])
    with pytest.raises(TypeError, match=r"lengths: expected int64 or int32, got torch\.bool"):
        model(tokens, tokens[:, 0] > 3)
    for wrong in (12, -1):
        with pytest.raises(ValueError, match=rf"lengths: expected values from 0 to M, .*, got \[3, 3, {wrong}, 3, 3\]"):
            model(tokens, torch.tensor([3, 3, wrong, 3, 3]))
    with pytest.raises(ValueError, match=r"segments: expected \(5, 11\) as tokens, got \(5, 1\)"):
        model(tokens, lengths, segments[:, :1])
    with pytest.raises(ValueError, match=r"tokens: expected at least one in a row, got \(5, 0\)"):
        model.classify(tokens[:, :0])
    with pytest.raises(ValueError, match="num_classes: expected at least 2 to classify"):
        BERT(dataclasses.replace(CONFIG, num_classes=0)).classify(tokens)
    with pytest.raises(ValueError, match=r"probability: expected from 0 to 1, got 1\.5"):
        mask_tokens(tokens, CONFIG, probability=1.5)
    with pytest.raises(TypeError, match="tokens: expected int64 or int32"):
        mask_tokens(tokens.float(), CONFIG)
