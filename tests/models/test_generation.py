"""Draws of tokens, and searches against all that could be found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from seqkernels.models.generation import beam_search, draw, generate, sample

V, STEPS, EOS = 4, 4, 2
TABLE = torch.randn(STEPS, V, V, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64).mul(1.5)
STARTS = torch.tensor([[0, 1], [3, 3], [1, 2]])


def step(tokens: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    """A model whose state is all tokens so far, and whose logits depend on their number and the last two."""
    history = torch.cat((history, tokens), dim=1)
    return TABLE[history.shape[1] - 2, history[:, -2], history[:, -1]], history


def reorder(history: Tensor, rows: Tensor) -> Tensor:
    return history.index_select(0, rows)


def exhaustive(start: Tensor, eos: int | None, penalty: float) -> tuple[list[int], float]:
    """The best of all continuations, which has the same token behind `eos`, and its log-probability."""
    found: dict[tuple[int, ...], tuple[float, float]] = {}
    for tokens in itertools.product(range(V), repeat=STEPS):
        length = tokens.index(eos) + 1 if eos in tokens else STEPS
        history, total = start.tolist(), 0.0
        for place, token in enumerate(tokens[:length]):
            total += TABLE[place, history[-2], history[-1]].log_softmax(-1)[token].item()
            history.append(token)
        ended = (*tokens[:length], *(EOS for _ in tokens[length:]))
        found[ended] = total / ((5 + length) / 6) ** penalty, total
    best = max(found, key=lambda tokens: found[tokens])
    return list(best), found[best][1]


@pytest.mark.parametrize(("eos", "penalty"), [(None, 0.0), (EOS, 0.0), (EOS, 4.0), (EOS, -2.0)])
def test_a_beam_as_wide_as_all_there_is_finds_the_best(eos: int | None, penalty: float) -> None:
    found, scores = beam_search(step, STARTS, STARTS[:, :0], reorder, V**STEPS, STEPS, eos, penalty)
    for start, tokens, score in zip(STARTS, found, scores, strict=True):
        best, total = exhaustive(start, eos, penalty)
        assert tokens.tolist() == best
        # Sums of four terms in another order.
        assert score.item() == pytest.approx(total, rel=8 * torch.finfo(torch.float64).eps)


def test_the_length_penalty_matters() -> None:
    found = [[exhaustive(start, EOS, penalty)[0].count(EOS) for start in STARTS] for penalty in (-2.0, 0.0, 4.0)]
    assert found == sorted(found, key=sum, reverse=True)
    assert len(set(map(sum, found))) == 3


@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_scores_are_those_of_what_is_found(width: int) -> None:
    found, scores = beam_search(step, STARTS, STARTS[:, :0], reorder, width, STEPS)
    history, total = STARTS[:, :0], torch.zeros(3, dtype=torch.float64)
    tokens = STARTS
    for place in range(STEPS):
        logits, history = step(tokens, history)
        tokens = found[:, place : place + 1]
        total += logits.log_softmax(-1).gather(1, tokens).squeeze(1)
    torch.testing.assert_close(scores, total, rtol=8 * torch.finfo(torch.float64).eps, atol=0)
    assert found.dtype == STARTS.dtype
    for row in range(3):
        alone = beam_search(step, STARTS[row : row + 1], STARTS[:1, :0], reorder, width, STEPS)
        assert torch.equal(alone[0], found[row : row + 1])


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_width_of_one_is_greedy(eos: int | None, penalty: float) -> None:
    found, _ = beam_search(step, STARTS, STARTS[:, :0], reorder, 1, STEPS, eos, penalty)
    assert torch.equal(found, sample(step, STARTS, STARTS[:, :0], STEPS, eos))


@pytest.mark.parametrize(("penalty", "best"), [(0.0, [2, 2, 2]), (3.0, [1, 1, 1])])
def test_long_ones_overtake_those_that_have_ended(penalty: float, best: list[int]) -> None:
    def likes_to_end(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Half ends at once, nearly half goes on for ever."""
        later = torch.tensor([0.0, 1.0, 0.0, 0.0])
        return torch.where(tokens[:, -1:] == 1, later, torch.tensor([0.03, 0.45, 0.5, 0.02])).log(), state

    start = torch.zeros(1, 1, dtype=torch.int64)
    found, scores = beam_search(likes_to_end, start, start, reorder, 2, 3, EOS, penalty)
    assert found.tolist() == [best]
    assert scores.item() == pytest.approx(math.log(0.45 if penalty else 0.5))


def counted(calls: list[tuple[int, ...]]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def ends(tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Row r says 1 r times, then 0, then what it likes."""
        calls.append(tuple(tokens.shape))
        wanted = torch.where(rows < len(calls), torch.where(rows == len(calls) - 1, 0, 3), 1)
        return torch.nn.functional.one_hot(wanted, V).float() * 50, rows

    return ends


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_end(beams: int) -> None:
    calls: list[tuple[int, ...]] = []
    arguments: tuple[Any, ...] = counted(calls), torch.ones(3, 2, dtype=torch.int64), torch.arange(3), reorder, 9
    found = generate(*arguments, beams=beams, eos=0)
    assert found.tolist() == [[0] * 9, [1] + [0] * 8, [1, 1] + [0] * 7]
    assert calls == [(3, 2), (3 * beams, 1), (3 * beams, 1)]
    calls.clear()
    assert generate(*arguments[:-1], 0, beams=beams, eos=0).shape == (3, 0)
    assert not calls


@pytest.mark.parametrize("beams", [1, 2])
def test_no_rows_at_all(beams: int) -> None:
    arguments: tuple[Any, ...] = counted([]), torch.ones(0, 2, dtype=torch.int64), torch.arange(0), reorder, 9
    assert generate(*arguments, beams=beams).shape == (0, 9)
    assert generate(*arguments, beams=beams, eos=0).shape == (0, 9)


LOGITS = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15]).log()


def frequencies(count: int = 20_000, **options: Any) -> Tensor:
    drawn = draw(LOGITS.expand(count, -1), generator=torch.Generator().manual_seed(1), **options)
    return torch.bincount(drawn, minlength=5) / count


@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({"temperature": 1.0}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"temperature": 0.5}, [0.05**2, 0.4**2, 0.1**2, 0.3**2, 0.15**2]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4, 0, 3, 0]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 4, 0, 3, 0]),
        ({"temperature": 1.0, "top_p": 0.72}, [0, 0.4, 0, 0.3, 0.15]),
        ({"temperature": 1.0, "top_p": 1.0}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [0, 4, 0, 3, 0]),
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.99}, [0, 4, 0, 3, 0]),
        ({"temperature": 0.25, "top_p": 0.7}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-30}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-60}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e60}, [1, 1, 1, 1, 1]),
        ({"temperature": 0.0, "top_p": 0.9}, [0, 1, 0, 0, 0]),
    ],
)
def test_draws_are_distributed_so(options: dict[str, float], probabilities: list[float]) -> None:
    wanted = torch.tensor(probabilities) / sum(probabilities)
    found = frequencies(**options)
    assert not found[wanted == 0].any()
    # Five standard deviations of a count.
    assert ((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / 20_000).sqrt()).all()


def test_the_nucleus_is_the_smallest_set() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(300, 9, generator=generator) * 2
    for top_p in (0.3, 0.6, 0.9):
        p = logits.double().softmax(-1)
        for _ in range(40):
            drawn = draw(logits, 1.0, None, top_p, generator).unsqueeze(1)
            assert (p.where(p > p.gather(1, drawn), 0).sum(1) < top_p).all()


def test_what_is_impossible_is_not_drawn() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], dtype=torch.bfloat16).expand(500, -1)
    for options in ({}, {"top_k": 3}, {"top_p": 0.99}, {"temperature": 1e60}, {"temperature": float("inf")}):
        drawn = draw(logits, generator=torch.Generator().manual_seed(3), **{"temperature": 1.0, **options})
        assert drawn.unique().tolist() == [0, 2]


def test_a_nucleus_of_one_is_all_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *args, **options: seen.append(p) or multinomial(p, *args))
    draw(torch.randn(20, 100_000, generator=torch.Generator().manual_seed(0)), 1.0, top_p=1.0)
    assert bool((seen[0] > 0).all())


@pytest.mark.parametrize("beams", [1, 2])
def test_options_of_other_types_are_named(beams: int) -> None:
    for name, value, what in (
        ("steps", 2.0, "an integer"),
        ("eos", 1.5, "an integer"),
        ("eos", True, "an integer"),
        ("beams", float(beams), "an integer"),
        ("beams", "2", "an integer"),
        ("top_k", 2.5, "an integer"),
        ("top_k", True, "an integer"),
        ("top_p", "a", "a number"),
        ("temperature", "0", "a number"),
        ("temperature", None, "a number"),
        ("length_penalty", False, "a number"),
    ):
        # Where nothing is to be generated, too.
        for steps in (0, 2):
            options: dict[str, Any] = {"steps": steps, "beams": beams, name: value}
            with pytest.raises(TypeError, match=f"^{name}: expected {what}, got {value!r}$"):
                generate(step, STARTS, STARTS[:, :0], reorder, **options)
    with pytest.raises(TypeError, match=r"^width: expected an integer, got 2\.0"):
        beam_search(step, STARTS, STARTS[:, :0], reorder, 2.0, 1)
    for call in (lambda: draw([[1.0]]), lambda: sample(step, STARTS.tolist(), STARTS[:, :0], 1)):
        with pytest.raises(TypeError, match=r"^(logits|tokens): expected a Tensor, got list"):
            call()


def test_numbers_of_numpy_are_numbers() -> None:
    def found(integer: Callable[[int], Any], number: Callable[[float], Any], **options: Any) -> Tensor:
        options |= {"generator": torch.Generator().manual_seed(0), "length_penalty": number(1.5)}
        return generate(step, STARTS, STARTS[:, :0], reorder, integer(STEPS), eos=integer(EOS), **options)

    for integer, number in ((numpy.int64, numpy.float32), (numpy.uint8, numpy.float64)):
        assert torch.equal(found(integer, number, beams=integer(2)), found(int, float, beams=2))
        drawn = found(integer, number, temperature=number(0.5), top_k=integer(3), top_p=number(0.75))
        assert torch.equal(drawn, found(int, float, temperature=0.5, top_k=3, top_p=0.75))


def test_bad_arguments() -> None:
    arguments = STARTS, STARTS[:, :0]
    for options, message in (
        ({"temperature": -0.5}, "temperature: expected a positive number, or 0, got -0.5"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"top_k": 6}, "top_k: expected from 1 to 5, got 6"),
        ({"top_k": 0}, "top_k: expected from 1 to 5, got 0"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, r"top_p: expected .*, got 1\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(LOGITS[None], **options)
    with pytest.raises(ValueError, match=r"logits: expected \(R, V\), got \(5,\)"):
        draw(LOGITS)
    with pytest.raises(ValueError, match="width: expected at least 1 beam, got 0"):
        beam_search(step, *arguments, reorder, 0, 1)
    for penalty in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="length_penalty: expected a finite number, got"):
            beam_search(step, *arguments, reorder, 2, 1, length_penalty=penalty)
    with pytest.raises(ValueError, match=r"tokens: expected \(B, M\) with at least one in each row, got \(3, 0\)"):
        beam_search(step, STARTS[:, :0], STARTS, reorder, 2, 1)
    with pytest.raises(ValueError, match="steps: expected at least 0, got -1"):
        sample(step, *arguments, -1)
    with pytest.raises(ValueError, match="temperature: expected 0 with 2 beams, got 1"):
        generate(step, *arguments, reorder, 1, beams=2, temperature=1.0)
    with pytest.raises(ValueError, match="beams: expected at least 1, got 0"):
        generate(step, *arguments, reorder, 1, beams=0)
    for beams in (1, 2):
        with pytest.raises(ValueError, match="eos: expected a token below 4, got 4"):
            generate(step, *arguments, reorder, 1, beams=beams, eos=4)
