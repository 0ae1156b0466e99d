"""The options of the recurrence in the reference, against a loop of plain formulas, and its generator."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from seqkernels import testing
from seqkernels.backends.reference.philox import philox, uniform
from seqkernels.cells import CELLS, DETACH, HOLD, RESET

# Known answers of Random123 (Salmon et al. 2011) for philox4x32-10: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text):
    return [int(word, 16) for word in text.split()]


def _philox(counter, key):
    """Philox4x32-10 on Python's integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (y >> 32) ^ b ^ k, y & 0xFFFFFFFF, (x >> 32) ^ d ^ m, x & 0xFFFFFFFF
        k, m = (k + 0x9E3779B9) & 0xFFFFFFFF, (m + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, words):
    found = philox(tuple(map(torch.tensor, _words(counter))), tuple(map(torch.tensor, _words(key))))
    assert [int(word) for word in found] == _words(words)
    assert _philox(_words(counter), _words(key)) == _words(words)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345678])
def test_uniform(seed):
    index = torch.tensor([[0, 1, 2**31, 2**32 - 1], [2**32, 2**40 + 5, 2**62, 7]])
    key = [seed % 2**32, (seed >> 32) % 2**32]
    found = uniform(torch.tensor(seed), index)
    expected = [(_philox([n % 2**32, n >> 32, 0, 0], key)[0] >> 8) / 2**24 for n in index.flatten().tolist()]
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == expected


def test_uniform_fills_its_range():
    found = uniform(torch.tensor(5), torch.arange(100_000)).double()
    assert found.min() >= 0
    assert found.max() < 1
    counts = found.histc(20, 0, 1)
    # 19 degrees of freedom: the chance of more than 50 is 1e-4.
    assert ((counts - 5000).square() / 5000).sum() < 50


def _norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _kept(seed, t, batch, states, hidden, p):
    """(S, B, H): 1 where zoneout keeps an element."""
    key = [seed % 2**32, (seed >> 32) % 2**32]
    kept = torch.empty(states, batch, hidden, dtype=p.dtype)
    for b in range(batch):
        for s in range(states):
            for u in range(hidden):
                n = ((t * batch + b) * states + s) * hidden + u
                kept[s, b, u] = (_philox([n % 2**32, n >> 32, 0, 0], key)[0] >> 8) / 2**24 < p[s].item()
    return kept


def _loop(
    input, weight_hh, bias_hh, state0, control, *, cell, reverse, gates=False, weight_ih=None, bias_ih=None,
    reset_state=None, peephole=None, recurrent_mask=None, norm_h=None, norm_c=None, zoneout=None, seed=None,
):  # fmt: skip
    steps, batch, _ = input.shape
    hidden = weight_hh.shape[1]
    state, history, seen = state0, [None] * steps, [None] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        bits = torch.zeros(batch, dtype=torch.uint8) if control is None else control[t]
        reset, hold, detach = (bits.bitwise_and(bit).bool().unsqueeze(1) for bit in (RESET, HOLD, DETACH))
        state = torch.where(detach, state.detach(), state)
        state = torch.where(reset, 0 if reset_state is None else reset_state.unsqueeze(1), state)
        h = state[0]
        x = input[t] if weight_ih is None else linear(input[t], weight_ih, bias_ih)
        u = (h if recurrent_mask is None else h * recurrent_mask) @ weight_hh.t()
        u = u if norm_h is None else _norm(u) * norm_h
        u = u if bias_hh is None else u + bias_hh
        if cell == "lstm":
            c = state[1]
            pi, pf, po = (0, 0, 0) if peephole is None else peephole
            i, f, g, o = (x + u).chunk(4, 1)
            i, f, g = torch.sigmoid(i + pi * c), torch.sigmoid(f + pf * c), torch.tanh(g)
            c = f * c + i * g
            o = torch.sigmoid(o + po * c)
            new = torch.stack((o * torch.tanh(c if norm_c is None else _norm(c) * norm_c[0] + norm_c[1]), c))
            active = (i, f, g, o)
        elif cell == "gru":
            xr, xz, xn = x.chunk(3, 1)
            ur, uz, un = u.chunk(3, 1)
            r, z = torch.sigmoid(xr + ur), torch.sigmoid(xz + uz)
            n = torch.tanh(xn + r * un)
            new, active = ((1 - z) * n + z * h).unsqueeze(0), (r, z, n)
        else:
            new, active = (torch.tanh if cell == "rnn_tanh" else torch.relu)(x + u).unsqueeze(0), None
        if zoneout is not None:
            p = zoneout.to(input.dtype).view(-1, 1, 1)
            if seed is not None:
                p = _kept(seed.item(), t, batch, len(state0), hidden, zoneout).to(input.dtype)
            new = p * state + (1 - p) * new
        state = torch.where(hold, state, new)
        history[t] = state
        seen[t] = state[0].unsqueeze(1) if active is None else torch.stack(active, 1).masked_fill(hold.unsqueeze(2), 0)
    hidden, cells = torch.stack([s[0] for s in history]), None
    if cell == "lstm":
        cells = torch.stack([s[1] for s in history])
    return (hidden, cells, state, torch.stack(seen)) if gates else (hidden, cells, state)


CASES = [
    *(
        (cell, (name,))
        for cell in CELLS
        for name in ("weight_ih", "reset_state", "recurrent_mask", "norm_h", "zoneout")
    ),
    *((cell, names) for cell in CELLS for names in (("weight_ih", "bias_ih"), ("zoneout", "seed"), testing.OPTIONS)),
    *(("lstm", names) for names in (("peephole",), ("norm_c",), ("peephole", "norm_c"))),
    *((cell, ()) for cell in CELLS),
]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("cell", "names"), CASES)
def test_options_are_their_formulas(cell, names, reverse):
    """In float64, values and all gradients."""
    names = [name for name in names if cell == "lstm" or name not in ("peephole", "norm_c")]
    shape, size = (6, 3, 5), 4 if "weight_ih" in names else None
    results = {"ours": [], "loop": [], "rounded": []}
    for draw in range(4):
        for dtype in (torch.float64, torch.float32):
            common = {"input_size": size, "seed": draw}
            inputs = testing.recurrence_inputs(cell, *shape, dtype, control=True, detach=True, **common)
            options = testing.recurrence_options(cell, *shape[1:], dtype, names=names, **common)
            more = {"cell": cell, "reverse": reverse, "gates": True, **options}
            grads = testing.random_grads(testing.evaluate(_loop, inputs, {}, **more))
            if dtype == torch.float64:
                results["ours"].append(testing.evaluate(testing.recurrence_oracle, inputs, grads, **more))
            which = "loop" if dtype == torch.float64 else "rounded"
            results[which].append(testing.evaluate(_loop, inputs, grads, **more))
    assert results["ours"][0].keys() == results["loop"][0].keys()
    for name in results["ours"][0]:
        testing.assert_within_budget(*(torch.stack([x[name] for x in draws]) for draws in results.values()), name)
