"""What the models do with a text: every number, from the kernels where they return it.

Letters: T tokens, V different ones, E embedding size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, functional
from .._attention import attend
from ..cells import DTYPES

#: What can be shown, in the order in which it is.
MODELS = ("rnn", "lstm", "gru", "attention")
#: Of embeddings and states; heads of attention are no larger.
LARGEST = 512

KERNEL, DERIVED, DRAWN = "kernel", "derived", "drawn"

_UNITS_IN_WORDS = 4


class Quantity(NamedTuple):
    """Numbers and what they are.

    Attributes:
        values: one token's vector, or a matrix with a row for each token.
        source: ``"kernel"`` for what a kernel returned, ``"derived"`` for what was computed from its inputs and
            results, ``"drawn"`` for inputs.
        meaning: in words.
    """

    values: Tensor
    source: str
    meaning: str


Quantities = dict[str, Quantity]


class Section(NamedTuple):
    """What one model did.

    Attributes:
        model: one of `MODELS`.
        about: what it is, in words.
        steps: quantities of each token, in order; of attention none.
        whole: quantities of the whole text: of attention all.
        ran: which implementation ran each operation, in the words of `seqkernels.explain`.
    """

    model: str
    about: str
    steps: tuple[Quantities, ...]
    whole: Quantities
    ran: tuple[str, ...]


class Exploration(NamedTuple):
    """A text and what the models made of it.

    Attributes:
        tokens: T of them.
        vocabulary: the number of each different token, in order of first appearance.
        seed: of the random numbers.
        is_causal: whether attention reads no later tokens.
        parameters: by name; ``embedding`` (V, E) has a row for each number of the vocabulary.
        sections: one for each model.
    """

    tokens: tuple[str, ...]
    vocabulary: dict[str, int]
    seed: int
    is_causal: bool
    parameters: dict[str, Tensor]
    sections: tuple[Section, ...]


def explore(
    text: str,
    *,
    seed: int = 42,
    embedding: int = 2,
    hidden: int = 2,
    models: Sequence[str] = MODELS,
    dtype: torch.dtype = torch.float32,
    is_causal: bool = False,
    device: torch.device | str = "cpu",
) -> Exploration:
    """Run the models over the tokens of a text, with random weights and no biases.

    Weights are drawn in float32, all of them whatever `models` says, so a seed means the same weights in each model,
    dtype and selection.

    Args:
        text: tokens with spaces between them.
        seed: of the weights.
        embedding: E, from 1 to 512.
        hidden: H, from 1 to 512; attention has the size of the embedding.
        models: some of `MODELS`.
        dtype: in which everything is computed.
        is_causal: attention of a token reads that token and earlier ones alone.
        device: where it is computed; results are on the CPU.

    Raises:
        ValueError, TypeError: the message names the argument, what it was and what is allowed.
    """
    tokens = tuple(text.split())
    if not tokens:
        raise ValueError(f"text: expected tokens with spaces between them, got {text!r}")
    for name, size in (("embedding", embedding), ("hidden", hidden)):
        if not 1 <= size <= LARGEST:
            raise ValueError(f"{name}: expected from 1 to {LARGEST}, got {size}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected from 0 to 2**63 - 1, got {seed}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {DTYPES}, got {dtype}")
    if isinstance(models, str):
        raise TypeError(f"models: expected a sequence of names, got the text {models!r}")
    if not models:
        raise ValueError(f"models: expected some of {', '.join(map(repr, MODELS))}, got none")
    for model in models:
        if model not in MODELS:
            raise ValueError(f"models: {model!r} is not one of {', '.join(map(repr, MODELS))}")
    _check_device(device)
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    drawn = {n: x.to(device, dtype) for n, x in draw(len(vocabulary), embedding, hidden, seed).items()}
    x = drawn["embedding"][[vocabulary[token] for token in tokens]]
    with torch.no_grad():
        sections = tuple(
            _attention(x, drawn, is_causal) if model == "attention" else _RECURRENT[model](x, drawn)
            for model in MODELS
            if model in models
        )
    parameters = {name: value.cpu() for name, value in drawn.items()}
    return Exploration(tokens, vocabulary, seed, is_causal, parameters, sections)


def draw(vocabulary: int, embedding: int, hidden: int, seed: int) -> dict[str, Tensor]:
    """Random parameters in float32, by name: standard normal, each drawn behind the others in this order.

    Args:
        vocabulary: V.
        embedding: E.
        hidden: H.
        seed: of a generator of their own.

    Returns:
        ``embedding`` (V, E); factors on the right of a row vector ``rnn_input`` (E, H) and ``rnn_memory`` (H, H);
        ``lstm`` (E + H, 4*H), of the token and then the state, for i, f, g, o; ``query``, ``key``, ``value`` (E, E);
        ``gru_input`` (E, 3*H) and ``gru_memory`` (H, 3*H), for r, z, n.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding": (vocabulary, embedding),
        "rnn_input": (embedding, hidden),
        "rnn_memory": (hidden, hidden),
        "lstm": (embedding + hidden, 4 * hidden),
        "query": (embedding, embedding),
        "key": (embedding, embedding),
        "value": (embedding, embedding),
        "gru_input": (embedding, 3 * hidden),
        "gru_memory": (hidden, 3 * hidden),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class _Run(NamedTuple):
    """What a recurrence gave for each token: ``states`` one behind the last, ``gates`` (T, G, H); all on the CPU."""

    x: Tensor
    states: Tensor
    cells: Tensor
    gates: Tensor
    from_input: Tensor
    from_memory: Tensor
    ran: tuple[str, ...]


def _ran(entries: Sequence[backends.Decision | str]) -> tuple[str, ...]:
    return tuple(
        entry if isinstance(entry, str) else f"{backends.describe(entry.call)} -> {entry.chosen}" for entry in entries
    )


def _recurrent(layer: Callable[..., tuple[Any, ...]], x: Tensor, of_input: Tensor, of_memory: Tensor) -> _Run:
    weights = [of_input.t().contiguous(), of_memory.t().contiguous()]
    with backends.recording() as entries:
        *_, (trace,) = layer(
            x.unsqueeze(1), None, weights, False, 1, 0.0, False, False, False, return_states=True, return_gates=True
        )
    zero = x.new_zeros(1, of_memory.shape[0])
    states, cells = (zero if s is None else torch.cat((zero, s[:, 0])) for s in (trace.hidden, trace.cells))
    return _Run(
        x.cpu(),
        states.cpu(),
        cells.cpu(),
        trace.gates[:, 0].cpu(),
        (x @ of_input).cpu(),
        (states[:-1] @ of_memory).cpu(),
        _ran(entries),
    )


def _steps(run: _Run, made: Callable[[int, Quantities], None]) -> tuple[Quantities, ...]:
    """Quantities of each step: its input and its state before, and what `made` adds."""
    steps = []
    for t in range(run.x.shape[0]):
        source = KERNEL if t else DRAWN
        step = {
            "input": Quantity(run.x[t], DRAWN, "the token's embedding"),
            "state_before": Quantity(run.states[t], source, "what is remembered so far" if t else "nothing yet: zeros"),
        }
        made(t, step)
        steps.append(step)
    return tuple(steps)


def _summed(run: _Run, t: int, gates: str = "") -> Quantities:
    to = f" to {gates}, one behind another" if gates else ""
    return {
        "input_contribution": Quantity(run.from_input[t], DERIVED, f"input @ W_input: what the token adds{to}"),
        "memory_contribution": Quantity(run.from_memory[t], DERIVED, f"state before @ W_memory: what memory adds{to}"),
    }


def _rnn(x: Tensor, drawn: dict[str, Tensor]) -> Section:
    run = _recurrent(functional.rnn, x, drawn["rnn_input"], drawn["rnn_memory"])

    def made(t: int, step: Quantities) -> None:
        step |= _summed(run, t)
        step["state"] = Quantity(run.states[t + 1], KERNEL, "tanh of their sum, between -1 and 1: the new memory")

    about = (
        "It reads one token after another and keeps one vector, its hidden state. Every step mixes the token with the"
        " old state and squashes the sum, so early tokens fade: nothing decides what is worth keeping."
    )
    return Section("rnn", about, _steps(run, made), _last(run.states, "state"), run.ran)


def _lstm(x: Tensor, drawn: dict[str, Tensor]) -> Section:
    of_input, of_memory = drawn["lstm"].split([x.shape[1], drawn["lstm"].shape[0] - x.shape[1]])
    run = _recurrent(functional.lstm, x, of_input, of_memory)

    def made(t: int, step: Quantities) -> None:
        i, f, g, o = run.gates[t]
        source, words = (KERNEL, "long-term memory so far") if t else (DRAWN, "nothing yet: zeros")
        before, after = run.cells[t], run.cells[t + 1]
        step["cell_before"] = Quantity(before, source, words)
        step |= _summed(run, t, "i, f, g and o")
        step["input_gate"] = Quantity(i, KERNEL, f"i: near 0 shuts the candidate out, near 1 lets it in; {_share(i)}")
        step["forget_gate"] = Quantity(f, KERNEL, f"f: near 0 forgets the old cell, near 1 keeps it; {_share(f)}")
        step["candidate"] = Quantity(g, KERNEL, "g: what could be stored, between -1 and 1")
        step["output_gate"] = Quantity(o, KERNEL, f"o: near 0 keeps the cell to itself, near 1 shows it; {_share(o)}")
        step["kept_part"] = Quantity(f * before, DERIVED, "f * cell before: the old memory left after forgetting")
        step["new_part"] = Quantity(i * g, DERIVED, "i * g: what is written")
        step["cell"] = Quantity(after, KERNEL, "their sum: the new long-term memory")
        step["state"] = Quantity(run.states[t + 1], KERNEL, "o * tanh(cell): what the next step and others see")

    about = (
        "It carries a second vector, the cell state, that is only scaled and added to. Gates, numbers from 0 to 1 made"
        " of token and state, decide for each unit what is forgotten, what is written and what is shown. Training is"
        " what teaches them; these are random."
    )
    last = _last(run.states, "state") | _last(run.cells, "cell")
    return Section("lstm", about, _steps(run, made), last, run.ran)


def _gru(x: Tensor, drawn: dict[str, Tensor]) -> Section:
    run = _recurrent(functional.gru, x, drawn["gru_input"], drawn["gru_memory"])

    def made(t: int, step: Quantities) -> None:
        r, z, n = run.gates[t]
        step |= _summed(run, t, "r, z and n")
        step["reset_gate"] = Quantity(r, KERNEL, f"r: near 0 the candidate ignores the old state; {_share(r)}")
        step["update_gate"] = Quantity(z, KERNEL, f"z: near 1 keeps the old state, near 0 replaces it; {_share(z)}")
        step["candidate"] = Quantity(n, KERNEL, "n: what the state could become, between -1 and 1")
        step["kept_part"] = Quantity(z * run.states[t], DERIVED, "z * state before: what stays")
        step["new_part"] = Quantity((1 - z) * n, DERIVED, "(1 - z) * n: what replaces the rest")
        step["state"] = Quantity(run.states[t + 1], KERNEL, "their sum: the new memory")

    about = (
        "It has gates like the LSTM but one vector only: the update gate keeps and replaces in one decision, so what is"
        " not kept is written anew."
    )
    return Section("gru", about, _steps(run, made), _last(run.states, "state"), run.ran)


_RECURRENT: dict[str, Callable[[Tensor, dict[str, Tensor]], Section]] = {"rnn": _rnn, "lstm": _lstm, "gru": _gru}


def _last(states: Tensor, name: str) -> Quantities:
    return {f"final_{name}": Quantity(states[-1], KERNEL, "after the last token: all that is left of the text")}


def _share(gate: Tensor) -> str:
    """How far a gate is open, of a few units each in percent."""
    values = [f"{100 * value:.0f}%" for value in gate.tolist()]
    if len(values) > _UNITS_IN_WORDS:
        return f"here from {100 * gate.min().item():.0f}% to {100 * gate.max().item():.0f}% open"
    return f"here {', '.join(values)} open"


def _attention(x: Tensor, drawn: dict[str, Tensor], is_causal: bool) -> Section:
    q, k, v = (x @ drawn[name] for name in ("query", "key", "value"))
    with backends.recording() as entries:
        out, lazy = attend(q[None, None], k[None, None], v[None, None], None, None, is_causal=is_causal)
        weights = lazy.compute()
    scores = q @ k.t() * x.shape[1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    whole = {
        "queries": Quantity(q, DERIVED, "x @ W_query: what each token looks for"),
        "keys": Quantity(k, DERIVED, "x @ W_key: what each token offers to be found by"),
        "values": Quantity(v, DERIVED, "x @ W_value: what each token hands over when it is read"),
        "scores": Quantity(
            scores, DERIVED, "query . key / sqrt(size): how well each fits" + "; later tokens are masked" * is_causal
        ),
        "lse": Quantity(lazy.lse[0, 0], KERNEL, "log of the sum of exp(scores): weight = exp(score - lse)"),
        "weights": Quantity(weights[0], KERNEL, "softmax of the scores: a row adds up to 1"),
        "output": Quantity(out[0, 0], KERNEL, "weights @ values: each token with what it read of the others"),
    }
    about = (
        "It reads all tokens at once. Each asks (query) what the others offer (key), and the better a key fits, the"
        " more of that token's value goes into the answer. There is no state that could fade: the first token is"
        " as near as the last."
    )
    if is_causal:
        about += " Causal: a token reads itself and those before it."
    here = {name: quantity._replace(values=quantity.values.cpu()) for name, quantity in whole.items()}
    return Section("attention", about, (), here, _ran(entries))


def _check_device(device: torch.device | str) -> None:
    try:
        torch.zeros(1, device=device).cpu()
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        # What torch says of a device that it is not built for, in one sentence.
        said = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device: expected one that torch can use here, got {str(device)!r}: {said}") from error
