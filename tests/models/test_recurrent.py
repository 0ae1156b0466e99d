"""The recurrent language model with the layers of torch and of seqkernels: same results, training and text."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels.models import RecurrentLM, RecurrentLMConfig
from seqkernels.testing import assert_within_budget

from .parity import assert_same_training

SIZES: dict[str, Any] = {"vocab_size": 23, "embed_size": 12}
CONFIGS = {
    "rnn": RecurrentLMConfig(**SIZES, cell="rnn"),
    "lstm": RecurrentLMConfig(**SIZES, cell="lstm", hidden_size=10),
    "gru": RecurrentLMConfig(**SIZES, cell="gru", num_layers=1),
}
RATES = {"rnn": 0.03, "lstm": 0.1, "gru": 0.03}
LAYERS = [torch.nn, seqkernels.nn]


def make(config: RecurrentLMConfig, layers: ModuleType, dtype: torch.dtype = torch.float32) -> RecurrentLM:
    torch.manual_seed(3)
    model = RecurrentLM(config, layers).to(dtype)
    # Larger than models begin with, so that tokens matter.
    with torch.no_grad():
        model.embedding.weight.mul_(10)
    return model


def tokens(length: int = 13, rows: int = 3) -> Tensor:
    return torch.randint(23, (rows, length), generator=torch.Generator().manual_seed(4))


def resets() -> Tensor:
    reset = torch.zeros(3, 13, dtype=torch.bool)
    reset[0, 0] = reset[0, 5] = reset[1, 5] = reset[2, 12] = True
    return reset


def parts(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def results(model: RecurrentLM, **options: Any) -> dict[str, Tensor]:
    """Logits, final states and all gradients."""
    logits, state = model(tokens(), **options)
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * grad).sum().backward()
    states = torch.stack(parts(state)).detach()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "states": states, **gradients}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("reset", [False, True])
def test_both_give_the_same_results_and_gradients(name: str, reset: bool) -> None:
    config, options = CONFIGS[name], {"reset": resets()} if reset else {}
    oracle = results(make(config, torch.nn, torch.float64), **options)
    baseline = results(make(config, torch.nn), **options)
    for dtype in (torch.float32, torch.float64):
        actual = results(make(config, seqkernels.nn, dtype), **options)
        assert actual.keys() == oracle.keys() == {"logits", "states", *dict(make(config, torch.nn).named_parameters())}
        for kind in ("logits", "states"):
            assert_within_budget(actual[kind], oracle[kind], baseline[kind], kind)
        gradients = [
            torch.cat([found[n].flatten() for n in oracle if n not in ("logits", "states")])
            for found in (actual, oracle, baseline)
        ]
        assert_within_budget(*gradients, "gradients")


@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: layers.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_documents_run_as_if_alone(name: str, layers: ModuleType) -> None:
    model = make(CONFIGS[name], layers, torch.float64)
    with torch.no_grad():
        found, state = model(tokens(), reset=resets())
        also, _ = model(tokens(), model(tokens(4))[1], reset=resets().byte())
        for row, begin, end in ((0, 0, 5), (0, 5, 13), (1, 0, 5), (1, 5, 13), (2, 0, 12), (2, 12, 13)):
            alone, last = model(tokens()[row : row + 1, begin:end])
            torch.testing.assert_close(found[row, begin:end], alone[0])
            # The others go on from the state that was given.
            if (row, begin) not in ((1, 0), (2, 0)):
                torch.testing.assert_close(also[row, begin:end], alone[0])
            if end == 13:
                for mine, its in zip(parts(state), parts(last), strict=True):
                    torch.testing.assert_close(mine[:, row], its[:, 0])


@pytest.mark.parametrize("name", CONFIGS)
def test_training_goes_the_same_way(name: str) -> None:
    def loss(model: RecurrentLM, step: int, roll: int) -> Tensor:
        text = tokens(14, 6)[step % 2 :: 2].roll(roll, 0)
        logits, _ = model(text[:, :-1], reset=resets().roll(roll, 0) if step % 3 == 0 else None)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())

    assert_same_training(lambda layers, dtype: make(CONFIGS[name], layers, dtype), loss, RATES[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_state_is_a_cache(name: str) -> None:
    found = []
    for layers in LAYERS:
        model = make(CONFIGS[name], layers, torch.float64).eval()
        text = tokens(4)
        for _ in range(12):
            text = torch.cat((text, model(text)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
        found += [text, model.generate(tokens(4), 12)]
        beams = model.generate(tokens(4), 12, beams=3, eos=7)
        for row in range(3):
            assert torch.equal(beams[row : row + 1], model.generate(tokens(4)[row : row + 1], 12, beams=3, eos=7))
        found.append(found[-1] if layers is torch.nn else found[0])
    for other in found[1:]:
        assert torch.equal(other, found[0])
    draws = [model.generate(tokens(4), 12, 1.0, 9, torch.Generator().manual_seed(0), top_p=0.9) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], found[0])


def likelihood(model: RecurrentLM, text: Tensor) -> Tensor:
    likely = model(text[:, :-1])[0].log_softmax(-1).gather(2, text[:, 1:, None]).squeeze(2)
    return likely[:, 3:].sum(1)


def test_beams_find_likelier_text() -> None:
    model = make(CONFIGS["gru"], seqkernels.nn, torch.float64).eval()
    greedy, beams = (likelihood(model, model.generate(tokens(4, 8), 9, beams=beams)) for beams in (1, 4))
    assert (beams > greedy - 1e-9).all()
    assert (beams > greedy + 0.1).any()


def test_equal_seeds_drop_the_same() -> None:
    config = RecurrentLMConfig(**SIZES, dropout=0.3)
    found = []
    for layers, dtype in ((seqkernels.nn, torch.float32), (torch.nn, torch.float64), (torch.nn, torch.float32)):
        model = make(config, layers, dtype)
        torch.manual_seed(6)
        found.append(model(tokens())[0].detach())
    assert_within_budget(*found, "logits")


def test_a_converted_model_resets_too() -> None:
    model = make(CONFIGS["lstm"], torch.nn, torch.float64)
    expected = model(tokens(), reset=resets())[0]
    assert [swap.name for swap in seqkernels.convert(model).swapped] == ["recurrent"]
    assert str(seqkernels.explain(model, tokens(), None, resets())).count("lstm recurrence") == 2
    torch.testing.assert_close(model(tokens(), reset=resets())[0], expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("vocab_size", 0), ("embed_size", 0), ("hidden_size", -2), ("num_layers", 0), ("cell", "LSTM"), ("dropout", 1.0)],
)
def test_bad_sizes_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*{value}"):
        RecurrentLMConfig(**{**SIZES, name: value})


@pytest.mark.parametrize("layers", LAYERS, ids=lambda layers: layers.__name__)
def test_bad_arguments(layers: ModuleType) -> None:
    model = make(CONFIGS["gru"], layers)
    with pytest.raises(ValueError, match=r"tokens: expected \(B, M\), got \(3,\)"):
        model(tokens()[:, 0])
    with pytest.raises(TypeError, match=r"tokens: expected int64 or int32, got torch\.float32"):
        model(tokens().float())
    for empty in (None, resets()[:, :0]):
        with pytest.raises(ValueError, match=r"tokens: expected at least one in each row, got \(3, 0\)"):
            model(tokens(0), reset=empty)
    with pytest.raises(ValueError, match=r"reset: expected \(3, 13\)"):
        model(tokens(), reset=resets()[:, 1:])
    with pytest.raises(TypeError, match="reset: expected"):
        model(tokens(), reset=resets().float())
    with pytest.raises(ValueError, match="steps: expected at least 0, got -1"):
        model.generate(tokens(), -1)
    with pytest.raises(ValueError, match=r"tokens: .* at least one in each row"):
        model.generate(tokens(0), 1)
