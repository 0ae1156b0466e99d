"""The translator with the layers of torch and of seqkernels: same weights, results and gradients."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels.models import Seq2Seq, Seq2SeqConfig
from seqkernels.testing import assert_within_budget

from .parity import assert_same_training

SIZES: dict[str, Any] = {"vocab_size": 23, "embed_size": 10, "hidden_size": 16, "dropout": 0.0}
CONFIG = Seq2SeqConfig(**SIZES)
CONFIGS = {
    "lstm": CONFIG,
    "rnn": Seq2SeqConfig(**SIZES, cell="rnn"),
    "gru": Seq2SeqConfig(**SIZES, cell="gru"),
    "bottleneck": Seq2SeqConfig(**SIZES, cell="lstm", attention="none"),
}
RATES = {"lstm": 0.3, "rnn": 0.1, "gru": 0.1, "bottleneck": 0.3}
LAYERS = [torch.nn, seqkernels.nn]


def make(layers: ModuleType, dtype: torch.dtype = torch.float32, config: Seq2SeqConfig = CONFIG) -> Seq2Seq:
    torch.manual_seed(3)
    return Seq2Seq(config, layers).to(dtype)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Sources (5, 9) of lengths 9 to 1, and targets (5, 6)."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([4, 9, 1, 7, 2])
    source = torch.randint(3, CONFIG.vocab_size, (5, 9), generator=generator)
    source[torch.arange(9) >= lengths[:, None]] = CONFIG.pad
    return source, lengths, torch.randint(1, CONFIG.vocab_size, (5, 6), generator=generator)


def results(model: Seq2Seq, roll: int = 0) -> dict[str, Tensor]:
    """The logits and every gradient, with the rows of the batch rolled so far: the same but for rounding."""
    logits = model(*(x.roll(roll, 0) for x in batch())).roll(-roll, 0)
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    logits.backward(grad.to(logits.dtype))
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_layer_sets_give_the_same_logits_and_gradients(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    oracle = results(make(torch.nn, torch.float64, config))
    # A few gradients may be exact by luck: torch's are the least exact of three.
    baselines = [results(make(torch.nn, config=config), roll) for roll in range(3)]
    actual = results(make(seqkernels.nn, dtype, config))
    assert actual.keys() == oracle.keys() == {"logits", *dict(make(torch.nn, config=config).named_parameters())}
    for part, value in actual.items():
        assert value.dtype == dtype
        assert_within_budget(value, oracle[part], [baseline[part] for baseline in baselines], part)


@pytest.mark.parametrize("name", RATES)
def test_training_goes_the_same_way(name: str) -> None:
    def loss(model: Seq2Seq, step: int, roll: int) -> Tensor:
        source, lengths, target = (x.roll(roll, 0) for x in batch())
        forcing = 0.5 if step % 10 == 0 else 1.0
        logits = model(source, lengths, target[:, :-1], forcing, torch.Generator().manual_seed(step))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())

    assert_same_training(lambda layers, dtype: make(layers, dtype, CONFIGS[name]), loss, RATES[name])


def test_parameters_and_their_order() -> None:
    recurrent = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    encoder = [f"encoder.{name}{end}" for end in ("", "_reverse") for name in recurrent]
    decoder = [f"decoder.{name}" for name in recurrent]
    ends = ["attention.weight", "combine.weight", "combine.bias", "output.weight", "output.bias"]
    names = ["embedding.weight", *encoder, "bridge.weight", "bridge.bias", *decoder]
    assert list(make(seqkernels.nn).state_dict()) == [*names, *ends]
    assert list(make(seqkernels.nn, config=CONFIGS["bottleneck"]).state_dict()) == [*names, *ends[-2:]]


@pytest.mark.parametrize("name", ["gru", "bottleneck"])
@pytest.mark.parametrize("layers", LAYERS)
def test_the_decoder_is_fed_its_own_tokens(name: str, layers: ModuleType) -> None:
    model = make(layers, torch.float64, CONFIGS[name])
    source, lengths, target = batch()
    with torch.no_grad():
        for forcing in (0.0, 0.4, 0.9):
            own = torch.rand(5, generator=torch.Generator().manual_seed(8)) >= forcing
            memory, state = model.encode(source, lengths)
            token, steps = target[:, :1], []
            for place in range(6):
                logits, state = model.decode(token, memory, state)
                steps.append(logits)
                if place < 5:
                    token = logits[:, -1:].argmax(-1) if own[place] else target[:, place + 1 : place + 2]
            found = model(source, lengths, target, forcing, torch.Generator().manual_seed(8))
            torch.testing.assert_close(found, torch.cat(steps, dim=1))
        assert model(source, lengths, target[:, :1], 0.0).shape == (5, 1, 23)


def test_all_tokens_of_a_teacher_take_one_call_and_no_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make(seqkernels.nn), []
    original = model.decode
    monkeypatch.setattr(model, "decode", lambda *arguments: calls.append(1) or original(*arguments))
    before = torch.get_rng_state()
    model(*batch())
    assert len(calls) == 1
    assert torch.equal(torch.get_rng_state(), before)
    model(*batch(), teacher_forcing=0.0)
    assert len(calls) == 1 + 6


def test_without_attention_a_state_is_all_that_goes_over() -> None:
    source, lengths, target = batch()
    model = make(seqkernels.nn, config=CONFIGS["bottleneck"]).eval()
    memory, state = model.encode(source, lengths)
    assert memory is None
    assert [x.shape for x in state] == [(1, 5, 16)] * 2
    assert str(seqkernels.explain(model, source, lengths, target)).count("attention of") == 0
    with pytest.raises(RuntimeError, match="align: expected a model with attention 'bilinear'"):
        model.align(source, lengths, target)


def test_dropout_draws_the_same_masks() -> None:
    config = Seq2SeqConfig(**{**CONFIG.__dict__, "dropout": 0.3})
    found = []
    for model in (
        make(torch.nn, torch.float64, config),
        make(torch.nn, config=config),
        make(seqkernels.nn, config=config),
    ):
        torch.manual_seed(6)
        found.append(model(*batch()).detach())
    oracle, baseline, actual = found
    assert_within_budget(actual, oracle, baseline)


def test_same_seed_gives_the_same_weights() -> None:
    theirs, ours = make(torch.nn).state_dict(), make(seqkernels.nn).state_dict()
    assert list(theirs) == list(ours)
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name


@pytest.mark.parametrize(("source", "target"), [LAYERS, LAYERS[::-1]])
def test_weights_move_both_ways(source: ModuleType, target: ModuleType) -> None:
    trained = make(source)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.5)
    moved, same = Seq2Seq(CONFIG, target), make(target)
    moved.load_state_dict(trained.state_dict())
    with torch.no_grad():
        for parameter in same.parameters():
            parameter.mul_(1.5)
    assert torch.equal(moved(*batch()), same(*batch()))


@pytest.mark.parametrize("layers", LAYERS)
def test_padding_does_not_change_the_result(layers: ModuleType) -> None:
    source, lengths, target = batch()
    padded = torch.nn.functional.pad(source, (0, 5), value=CONFIG.pad)
    with torch.no_grad():
        oracle = make(torch.nn, torch.float64)(source, lengths, target)
        baseline = make(torch.nn)(source, lengths, target)
        assert_within_budget(make(layers)(padded, lengths, target), oracle, baseline, "padded")
        padded[torch.arange(14) >= lengths[:, None]] = 7
        assert_within_budget(make(layers)(padded, lengths, target), oracle, baseline, "another token as padding")
        for row in range(5):
            alone = make(layers)(source[row : row + 1, : lengths[row]], lengths[row : row + 1], target[row : row + 1])
            assert_within_budget(alone, oracle[row : row + 1], baseline, f"row {row} alone")


@pytest.mark.parametrize("layers", LAYERS)
def test_steps_with_carried_state_equal_one_call(layers: ModuleType) -> None:
    source, lengths, target = batch()
    model = make(layers)
    with torch.no_grad():
        memory, state = model.encode(source, lengths)
        steps = []
        for token in target.split(1, dim=1):
            logits, state = model.decode(token, memory, state)
            steps.append(logits)
        oracle = make(torch.nn, torch.float64)(source, lengths, target)
        assert_within_budget(torch.cat(steps, dim=1), oracle, make(torch.nn)(source, lengths, target))


@pytest.mark.parametrize("layers", LAYERS)
def test_translate_is_greedy(layers: ModuleType) -> None:
    source, lengths, _ = batch()
    model = make(layers).eval()
    start = torch.tensor([5, 6, 7, 8, 9])
    found = model.translate(source, lengths, start=start, max_length=7)
    assert len(found) == 5
    for row, tokens in enumerate(found):
        assert CONFIG.eos not in tokens
        target = torch.tensor([[int(start[row]), *tokens]])
        best = model(source[row : row + 1], lengths[row : row + 1], target)[0].argmax(-1).tolist()
        assert best[: len(tokens)] == tokens
        assert len(tokens) == 7 or best[len(tokens)] == CONFIG.eos


def test_drawn_translations() -> None:
    source, lengths, _ = batch()
    model = make(seqkernels.nn).eval()

    def draw(seed: int, **options: Any) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return model.translate(source, lengths, max_length=20, generator=generator, **options)

    likeliest = draw(0)
    assert draw(0, temperature=1.0) == draw(0, temperature=1.0)
    assert draw(0, temperature=1.0) not in (draw(1, temperature=1.0), likeliest)
    assert draw(0, temperature=1.0, top_k=1) == draw(0, temperature=1.0, top_p=1e-6) == likeliest
    with pytest.raises(ValueError, match=r"top_p: expected a number above 0 and at most 1, got 2\.0"):
        draw(0, temperature=1.0, top_p=2.0)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9}, {"beams": 3, "length_penalty": 1.0}]
)
@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: layers.__name__)
def test_translations_as_tokens(layers: ModuleType, options: dict[str, Any]) -> None:
    source, lengths, _ = batch()
    model = make(layers).eval()
    with torch.no_grad():
        # So that some end.
        model.output.bias[CONFIG.eos] += 0.3
    for start in (None, torch.tensor([5, 6, 7, 8, 9], dtype=torch.int32)):
        found = model.generate(source, lengths, 8, generator=torch.Generator().manual_seed(1), start=start, **options)
        assert found.shape == (5, 9)
        assert found.dtype == (torch.int64 if start is None else torch.int32)
        assert torch.equal(found[:, 0], torch.full((5,), CONFIG.bos) if start is None else start)
        generator = torch.Generator().manual_seed(1)
        rows = model.translate(source, lengths, start, 8, generator=generator, **options)
        assert [[*row, *[CONFIG.eos] * (8 - len(row))] for row in rows] == found[:, 1:].tolist()
        assert 0 < sum(map(len, rows)) < 40
        if not options:
            logits = model(source, lengths, found)
            ended = (found[:, 1:] == CONFIG.eos).cumsum(1) > 1
            assert torch.equal(logits[:, :-1].argmax(-1).masked_fill(ended, CONFIG.eos), found[:, 1:].long())
    assert torch.equal(model.generate(source, lengths, 0), torch.full((5, 1), CONFIG.bos))
    assert not found.requires_grad


@pytest.mark.parametrize("layers", LAYERS)
def test_translate_stops_at_eos(layers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    source, lengths, _ = batch()
    model = make(layers).eval()
    script = torch.tensor([[8, 2, 2, 9], [2, 8, 8, 8], [8, 8, 2, 2], [2, 2, 2, 2], [9, 8, 2, 8]])
    calls = []

    def decode(token: Tensor, memory: object, state: object) -> tuple[Tensor, object]:
        calls.append(token.clone())
        return torch.nn.functional.one_hot(script[:, len(calls) - 1, None], CONFIG.vocab_size).float(), state

    monkeypatch.setattr(model, "decode", decode)
    assert model.translate(source, lengths) == [[8], [], [8, 8], [], [9, 8]]
    assert len(calls) == 3
    assert calls[0].tolist() == [[CONFIG.bos]] * 5
    calls.clear()
    assert model.translate(source, lengths, max_length=1) == [[8], [], [8], [], [9]]
    assert model.translate(source, lengths, max_length=0) == [[]] * 5


@pytest.mark.parametrize("name", ["lstm", "gru", "bottleneck"])
def test_beams_find_the_best_translation(name: str) -> None:
    config = Seq2SeqConfig(**{**CONFIGS[name].__dict__, "vocab_size": 4})
    source, lengths, _ = batch()
    source = source % 4
    model = make(seqkernels.nn, torch.float64, config).eval()
    with torch.no_grad():
        # Larger than models begin with, so that translations differ.
        for parameter in model.parameters():
            parameter.mul_(4)
        found = model.translate(source, lengths, max_length=3, beams=64, length_penalty=1.5)
        best: list[tuple[float, list[int]]] = [(-torch.inf, [])] * 5
        for tokens in itertools.product(range(4), repeat=3):
            length = tokens.index(2) + 1 if 2 in tokens else 3
            target = torch.tensor([[config.bos, *tokens[: length - 1]]]).expand(5, -1)
            said = torch.tensor(tokens[:length]).expand(5, -1).unsqueeze(-1)
            scores = model(source, lengths, target).log_softmax(-1).gather(2, said).flatten(1).sum(1)
            for row, score in enumerate((scores / ((5 + length) / 6) ** 1.5).tolist()):
                best[row] = max(best[row], (score, [t for t in tokens[:length] if t != 2]))
    assert found == [tokens for _, tokens in best]
    assert len(set(map(len, found))) > 1
    one = model.translate(source, lengths, max_length=9, beams=1, length_penalty=1.5)
    assert one == model.translate(source, lengths, max_length=9)
    few = model.translate(source, lengths, max_length=9, beams=3)
    alone = [model.translate(source[i : i + 1], lengths[i : i + 1], max_length=9, beams=3)[0] for i in range(5)]
    assert few == alone


@pytest.mark.parametrize("layers", LAYERS)
def test_alignment_is_what_the_attention_weighs_with(layers: ModuleType) -> None:
    source, lengths, target = batch()
    model = make(layers, torch.float64).eval()
    alignment = model.align(source, lengths, target)
    assert alignment.shape == (5, 6, 9)
    own = make(torch.nn).eval().align(source, lengths, target)
    assert_within_budget(alignment.sum(-1), torch.ones(5, 6, dtype=torch.float64), own.sum(-1))
    assert not alignment[(torch.arange(9) >= lengths[:, None])[:, None].expand(-1, 6, -1)].any()
    assert (alignment[2, :, 0] == 1).all()


def test_the_kernels_of_seqkernels_serve_the_model() -> None:
    source, lengths, target = batch()
    ours = str(seqkernels.explain(make(seqkernels.nn), source, lengths, target))
    assert ours.count("lstm recurrence") == 3
    assert ours.count("attention of") == 1
    assert "not fused" not in ours
    assert str(seqkernels.explain(make(torch.nn), source, lengths, target)).startswith("no operation of seqkernels")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 0),
        ("embed_size", 0),
        ("hidden_size", 7),
        ("dropout", 1.0),
        ("pad", 23),
        ("bos", -1),
        ("eos", 99),
        ("cell", "LSTM"),
        ("attention", "dot"),
    ],
)
def test_bad_sizes_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*{value}"):
        Seq2SeqConfig(**{**CONFIG.__dict__, name: value})


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers: expected torch\.nn or .*, got torch\.nn\.functional"):
        Seq2Seq(CONFIG, torch.nn.functional)


def test_bad_arguments() -> None:
    source, lengths, target = batch()
    model = make(seqkernels.nn)
    with pytest.raises(ValueError, match=r"teacher_forcing: expected a probability from 0 to 1, got 1\.5"):
        model(source, lengths, target, 1.5)
    with pytest.raises(ValueError, match="max_length: expected at least 0, got -1"):
        model.translate(source, lengths, max_length=-1)
    with pytest.raises(ValueError, match="beams: expected at least 1, got 0"):
        model.translate(source, lengths, beams=0)
    with pytest.raises(ValueError, match=r"target: expected \(B, M\), got \("):
        model.align(source, lengths, target[0])
    with pytest.raises(ValueError, match=r"target: expected at least one token in each row, got \(5, 0\)"):
        model.align(source, lengths, target[:, :0])


@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: layers.__name__)
def test_tensors_that_do_not_fit_are_named(layers: ModuleType) -> None:
    source, lengths, target = batch()
    model = make(layers)
    for arguments, error, message in (
        ((source[0], lengths, target), ValueError, r"source: expected \(B, M\), got \(9,\)"),
        ((source.float(), lengths, target), TypeError, r"source: expected int64 or int32, got torch\.float32"),
        ((source, lengths.float(), target), TypeError, r"lengths: expected int64 or int32, got torch\.float32"),
        ((source, lengths[:4], target), ValueError, r"lengths: expected \(5,\), got \(4,\)"),
        ((source, lengths - 1, target), ValueError, r"lengths: expected values from 1 to N, .* \[3, 8, 0, 6, 1\]"),
        ((source, lengths + 1, target), ValueError, r"lengths: expected values from 1 to N, .* \[5, 10, 2, 8, 3\]"),
        ((source, lengths, target[0]), ValueError, r"target: expected \(B, M\), got \(6,\)"),
        ((source, lengths, target[:, :0]), ValueError, r"target: expected at least one in each row, got \(5, 0\)"),
        ((source, lengths, target.float()), TypeError, "target: expected int64 or int32"),
    ):
        with pytest.raises(error, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match=r"start: expected \(5,\), got \(1,\)"):
        model.translate(source, lengths, target[:1, 0])
    with pytest.raises(TypeError, match=r"start: expected int64 or int32, got torch\.float32"):
        model.generate(source, lengths, 1, start=torch.ones(5))
    with pytest.raises(ValueError, match="steps: expected at least 0, got -1"):
        model.generate(source, lengths, -1)
    with pytest.raises(ValueError, match="temperature: expected 0 with 2 beams, got 1"):
        model.generate(source, lengths, 1, temperature=1.0, beams=2)
