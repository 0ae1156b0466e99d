"""How models generate: the draw of a token, token by token or by beam search, over any state that a model carries.

B rows of start tokens, R rows that a model is asked for, W beams, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ._model import check_tensor, integer, number

S = TypeVar("S")
#: Scores the next token: tokens (R, M) behind those in a state -> logits (R, V) and the state behind them.
Step = Callable[[Tensor, S], tuple[Tensor, S]]
#: The state of some rows of a state, in the order of the indices, int64; a row may be there several times or not.
Reorder = Callable[[S, Tensor], S]


def draw(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token for each row. Where both `top_k` and `top_p` are given, the nucleus is one of the `top_k` likeliest.

    Source of `top_p`: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.

    Args:
        logits: (R, V), floating point; -inf for what shall not be drawn.
        temperature: logits are divided by it; 0 takes the likeliest token, whatever `top_k` and `top_p` say.
        top_k: draw among so many of the likeliest tokens; among all by default.
        top_p: draw among the fewest of the likeliest tokens whose probabilities, those after `temperature`, add up to
            at least this much; among all by default.
        generator: of the draws, on the device of `logits`; torch's own by default.

    Returns:
        (R,) int64.

    Raises:
        ValueError: the message names the argument, what it was and what is allowed.
        TypeError: likewise, of an argument of another type.
    """
    check_tensor(logits, "logits")
    if logits.dim() != 2:
        raise ValueError(f"logits: expected (R, V), got {tuple(logits.shape)}")
    temperature, top_k, top_p = _choice(temperature, top_k, top_p)
    if not temperature >= 0:
        raise ValueError(f"temperature: expected a positive number, or 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k: expected from 1 to {logits.shape[1]}, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0 and at most 1, got {top_p}")
    if temperature == 0:
        return logits.argmax(-1)
    logits, numbers = logits.to(_wide(logits)).topk(top_k or logits.shape[1])
    # In the range where it and its inverse are normal numbers, and less the largest: no temperature makes a NaN.
    tiny = torch.finfo(logits.dtype).tiny
    temperature = min(max(temperature, tiny), 1 / tiny)
    probabilities = ((logits - logits[:, :1]) / temperature).softmax(-1)
    # Rounded sums reach 1 before the last tokens do.
    if top_p is not None and top_p < 1:
        likelier = probabilities.cumsum(-1) - probabilities
        likelier[:, 0] = 0
        probabilities = probabilities.masked_fill(likelier >= top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return numbers.gather(1, drawn).squeeze(1)


@torch.no_grad()
def sample(
    step: Step[S],
    start_tokens: Tensor,
    state: S,
    steps: int,
    eos: int | None = None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row token by token; see `draw` for the arguments that are not here.

    Args:
        step: of the model, called with `start_tokens` first and then with one token for each row.
        start_tokens: (B, M), M at least 1: what to continue.
        state: what `step` takes first.
        steps: how many tokens to add at most.
        eos: the token that ends a row; no token does by default. Ends early once all rows have it.

    Returns:
        (B, steps) of the dtype of `start_tokens`: what follows them, with `eos` in all places behind the first one.

    Raises:
        ValueError: the message names the argument, what it was and what is allowed.
        TypeError: likewise, of an argument of another type.
    """
    steps, eos = _check(start_tokens, steps, eos)
    temperature, top_k, top_p = _choice(temperature, top_k, top_p)
    found = start_tokens.new_full((len(start_tokens), steps), 0 if eos is None else eos)
    ended = torch.zeros(len(found), dtype=torch.bool, device=found.device)
    tokens = start_tokens
    for place in range(steps):
        logits, state = step(tokens, state)
        _check_eos(eos, logits)
        new = draw(logits, temperature, top_k, top_p, generator)
        if eos is not None:
            new = new.masked_fill(ended, eos)
            ended = ended | (new == eos)
        found[:, place] = new
        tokens = found[:, place : place + 1]
        if eos is not None and bool(ended.all()):
            break
    return found


@torch.no_grad()
def beam_search(
    step: Step[S],
    start_tokens: Tensor,
    state: S,
    reorder: Reorder[S],
    width: int,
    steps: int,
    eos: int | None = None,
    length_penalty: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The likeliest continuation of each row that a beam search finds.

    Of each row, the `width` best hypotheses are kept; one that has ended stays as it is for as long as it is among
    them. They are ranked by the log-probability divided by ``((5 + length) / 6) ** length_penalty`` (Wu et al.,
    "Google's Neural Machine Translation System", 2016), the length being that of the tokens added, `eos` included. A
    width of 1 is the greedy choice.

    Args:
        step: of the model, called with `start_tokens` first and then with one token for each of B * W rows, those of
            the same start behind one another.
        start_tokens: (B, M), M at least 1: what to continue.
        state: what `step` takes first.
        reorder: of the model; called with B * W rows, first of B, then of B * W, where each stays among those of its
            start.
        width: W, at least 1.
        steps: how many tokens to add at most.
        eos: the token that ends a hypothesis; no token does by default.
        length_penalty: 0, the default, ranks by log-probability, which prefers short ones; above that longer ones are
            preferred, below even shorter ones.

    Returns:
        Tokens (B, steps) of the dtype of `start_tokens`, with `eos` in all places behind the first one, and their
        log-probabilities (B,), not divided, in float32 (float64 for float64 logits).

    Raises:
        ValueError: the message names the argument, what it was and what is allowed.
        TypeError: likewise, of an argument of another type.
    """
    steps, eos = _check(start_tokens, steps, eos)
    width, length_penalty = integer(width, "width"), number(length_penalty, "length_penalty")
    if width < 1:
        raise ValueError(f"width: expected at least 1 beam, got {width}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty: expected a finite number, got {length_penalty}")
    batch, device = len(start_tokens), start_tokens.device
    found = start_tokens.new_full((batch, width, steps), 0 if eos is None else eos)
    if steps == 0:
        return found[:, 0], torch.zeros(batch, device=device)
    first = torch.arange(batch, device=device).unsqueeze(1)
    logits, state = step(start_tokens, state)
    _check_eos(eos, logits)
    wide = _wide(logits)
    # All beams of a row begin alike: only the first one counts.
    origin = torch.zeros(batch, width, dtype=torch.int64, device=device)
    scores = torch.full((batch, width), -torch.inf, dtype=wide, device=device)
    scores[:, 0] = 0
    lengths, ended = torch.zeros_like(origin), torch.zeros_like(origin, dtype=torch.bool)
    rows = first.expand(-1, width).flatten()
    logits = logits.index_select(0, rows)
    for place in range(steps):
        state = reorder(state, rows)
        if place > 0:
            logits, state = step(found[:, :, place - 1].reshape(-1, 1), state)
        added = logits.log_softmax(-1, dtype=wide).view(batch, width, logits.shape[1])
        if eos is not None:
            # What has ended has one successor, itself.
            stays = added.new_full(logits.shape[1:], -torch.inf).index_fill(0, torch.tensor(eos, device=device), 0)
            added = torch.where(ended.unsqueeze(-1), stays, added)
        totals = scores.unsqueeze(-1) + added
        lengths = lengths + ~ended
        ranked = totals
        if length_penalty != 0:
            # No power of a finite penalty overflows, or makes all hypotheses alike.
            weight = (-length_penalty * ((5 + lengths.double()) / 6).log()).clamp(-700, 700).exp()
            ranked = (totals * weight.unsqueeze(-1)).masked_fill(totals == -torch.inf, -torch.inf)
        best = ranked.flatten(1).topk(width).indices
        origin, tokens = best // added.shape[-1], best % added.shape[-1]
        scores = totals.flatten(1).gather(1, best)
        found = found.gather(1, origin.unsqueeze(-1).expand(-1, -1, steps))
        found[:, :, place] = tokens
        lengths, ended = lengths.gather(1, origin), ended.gather(1, origin)
        rows = (first * width + origin).flatten()
        if eos is not None:
            ended = ended | (tokens == eos)
            # Without a preference for long ones nothing that goes on can overtake.
            if bool((ended if length_penalty > 0 else ended[:, :1]).all()):
                break
    return found[:, 0], scores[:, 0]


def generate(
    step: Step[S],
    start_tokens: Tensor,
    state: S,
    reorder: Reorder[S],
    steps: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    beams: int = 1,
    eos: int | None = None,
    length_penalty: float = 0.0,
) -> Tensor:
    """`sample`, or with several `beams` the tokens of `beam_search`; arguments and result as theirs.

    Raises:
        ValueError: also where there are several beams and a temperature, since these draw nothing.
        TypeError: also of an option that is not used.
    """
    beams, length_penalty = integer(beams, "beams"), number(length_penalty, "length_penalty")
    temperature, top_k, top_p = _choice(temperature, top_k, top_p)
    if beams == 1:
        return sample(
            step,
            start_tokens,
            state,
            steps,
            eos,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
    if beams < 1:
        raise ValueError(f"beams: expected at least 1, got {beams}")
    if temperature != 0:
        raise ValueError(f"temperature: expected 0 with {beams} beams, got {temperature}")
    return beam_search(step, start_tokens, state, reorder, beams, steps, eos, length_penalty)[0]


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _check(start_tokens: Tensor, steps: int, eos: int | None) -> tuple[int, int | None]:
    check_tensor(start_tokens, "tokens")
    steps, eos = integer(steps, "steps"), None if eos is None else integer(eos, "eos")
    if start_tokens.dim() != 2 or start_tokens.shape[1] < 1:
        raise ValueError(f"tokens: expected (B, M) with at least one in each row, got {tuple(start_tokens.shape)}")
    if steps < 0:
        raise ValueError(f"steps: expected at least 0, got {steps}")
    return steps, eos


def _choice(temperature: float, top_k: int | None, top_p: float | None) -> tuple[float, int | None, float | None]:
    """What `draw` chooses by, of the right types."""
    top_k = None if top_k is None else integer(top_k, "top_k")
    top_p = None if top_p is None else number(top_p, "top_p")
    return number(temperature, "temperature"), top_k, top_p


def _check_eos(eos: int | None, logits: Tensor) -> None:
    if eos is not None and not 0 <= eos < logits.shape[1]:
        raise ValueError(f"eos: expected a token below {logits.shape[1]}, got {eos}")
