"""The one list of benchmark cases: shapes, dtypes, and how much work and traffic each one is.

T time, B batch, I input, H hidden size; for attention B batch, Hq and Hk query and key heads, M queries, N keys,
D head size. The flops are the useful ones: the products only, of the keys that are read, half of them under a causal
mask. The bytes are the compulsory ones: each argument, result and gradient passes the memory bus once for each pass
that needs it, whatever a cache or an implementation makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

Mode = Literal["forward", "forward_backward"]
MODES: tuple[Mode, ...] = ("forward", "forward_backward")

PROVIDERS = ("torch", "native", "numba", "reference")
"""torch is ``torch.nn`` or ``F.scaled_dot_product_attention``; the others are backends of seqkernels."""

ENGINES = ("onnxruntime", "openvino")
"""Inference engines that are timed where asked for, on float32 recurrent layers without gradients."""

TAGS = {
    "grid": "the shapes of the measured baselines, each cell at each shape",
    "small": "what a policy network, a forecaster or a small transformer uses",
    "overhead": "one step of one row: the cost of the call",
    "quick": "part of the quick form",
    "numba": "small enough for the numba backend to be timed beside torch",
    "reference": "small enough for the reference backend to be timed beside torch",
    "cells": "timed on a GPU beside a loop over compiled cells too, which take seconds to compile",
}

LIMIT_OF = {"numba": (12e9, 1e9), "reference": (2e9, 30e6)}
"""Useful flops of forward and backward, and bytes of forward, above which a case leaves a slow provider out."""

_OF_NUMBA = ("", "padding", "bias", "learned")
"""Options of attention that the numba backend has."""

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class Phase(NamedTuple):
    """A part of a call that ends before the next one begins.

    Attributes:
        flops: useful floating point operations.
        bytes: of the data that the part reads again and again: its working set.
        times: how often it reads them.
    """

    flops: int
    bytes: int
    times: int


@dataclass(frozen=True)
class Recurrence:
    """A call of a recurrent layer on a sequence, or of a cell.

    Attributes:
        cell: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        steps, batch, inputs, hidden: T, B, I, H; the input is (T, B, I).
        dtype: of input and parameters.
        layers: stacked layers.
        bidirectional: both directions.
        single: the ``LSTMCell`` form: input (B, I) and the state given; T is 1.
        tags: keys of `TAGS`.
    """

    cell: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    dtype: torch.dtype = torch.float32
    layers: int = 1
    bidirectional: bool = False
    single: bool = False
    tags: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Unique; made of word characters, so that ``pytest -k`` can pick it."""
        kind = f"{self.cell}cell" if self.single else self.cell
        size = f"B{self.batch}_I{self.inputs}_H{self.hidden}"
        shape = size if self.single else f"T{self.steps}_{size}"
        stack = (f"_L{self.layers}" if self.layers > 1 else "") + ("_bidirectional" if self.bidirectional else "")
        return f"{kind}_{shape}{stack}{_suffix(self.dtype)}"

    @property
    def group(self) -> str:
        """What the report averages over."""
        if self.single:
            return "cells"
        kind = "RNN" if self.cell.startswith("rnn") else self.cell.upper()
        return kind if self.dtype == torch.float32 else f"{kind} {_short(self.dtype)}"

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Modes in which the case is timed."""
        return MODES

    def baseline(self, mode: Mode) -> str:
        """What torch does."""
        return f"torch.nn.{self.cell.upper().partition('_')[0]}{'Cell' if self.single else ''}"

    def flops(self, mode: Mode) -> int:
        """Useful floating point operations of one call: the input and recurrent products; thrice with backward."""
        products = sum(rows * columns for rows, columns in self._weights())
        return 2 * self.steps * self.batch * products * (1 if mode == "forward" else 3)

    def bytes(self, mode: Mode) -> int:
        """Compulsory memory traffic of one call.

        Forward reads input, state and parameters and writes output and state; backward reads these and the gradient
        of the output, and writes the gradients of input and parameters.
        """
        directions = 2 if self.bidirectional else 1
        rows = GATES[self.cell] * self.hidden
        parameters = sum(a * b for a, b in self._weights()) + 2 * rows * self.layers * directions
        x = self.steps * self.batch * self.inputs
        out = self.steps * self.batch * self.hidden * directions
        state = self.batch * self.hidden * self.layers * directions * (2 if self.cell == "lstm" else 1)
        forward = x + parameters + out + state
        backward = (x + parameters + 2 * out) + (x + parameters)
        return (forward if mode == "forward" else forward + backward) * self.dtype.itemsize

    def phases(self, mode: Mode) -> list[Phase]:
        """The parts of one call, layer by layer, the directions of a layer at once.

        Forward is the input projection, which reads ``weight_ih`` once, and the time loop, which reads ``weight_hh``
        at each step. Backward is the loop again, and the products after it, which read ``weight_ih`` once.
        """
        directions = 2 if self.bidirectional else 1
        parts = []
        weights = self._weights()
        for (rows, columns), (_, hidden) in zip(weights[:: 2 * directions], weights[1 :: 2 * directions], strict=True):
            projection, loop = (directions * rows * n for n in (columns, hidden))
            times = 2 * self.steps * self.batch
            forward = Phase(times * loop, loop * self.dtype.itemsize, self.steps)
            read = projection * self.dtype.itemsize
            parts += [Phase(times * projection, read, 1), forward]
            if mode == "forward_backward":
                parts += [forward, Phase(times * (2 * projection + loop), read, 1)]
        return parts

    def _weights(self) -> list[tuple[int, int]]:
        directions = 2 if self.bidirectional else 1
        rows = GATES[self.cell] * self.hidden
        shapes = []
        for layer in range(self.layers):
            columns = self.inputs if layer == 0 else directions * self.hidden
            shapes += [(rows, columns), (rows, self.hidden)] * directions
        return shapes


Option = Literal["", "padding", "bias", "learned", "dropout", "window", "alibi", "softcap", "documents", "cache"]

DROPOUT = 0.1
WINDOW = 256
"""Keys that a query of the option ``"window"`` reads: its own and those before."""
SOFTCAP = 50.0

_GROUP_OF = {
    "padding": "masks",
    "bias": "masks",
    "learned": "masks",
    "alibi": "ALiBi",
    **{name: name for name in ("dropout", "window", "softcap", "documents", "cache")},
}

_SDPA = "F.scaled_dot_product_attention"
_FLEX = "FlexAttention, compiled, with a block mask"
_BASELINE_OF: dict[str, tuple[str, str]] = {
    "padding": (f"{_SDPA} with a boolean mask",) * 2,
    "bias": (f"{_SDPA} with a float mask",) * 2,
    "learned": (f"{_SDPA} with a float mask",) * 2,
    "dropout": (f"{_SDPA} with dropout_p",) * 2,
    # FlexAttention has no backward pass on the CPU.
    "window": (_FLEX, f"{_SDPA} with a float mask"),
    # Measured to be faster than FlexAttention with the slopes in its score_mod.
    "alibi": (f"{_SDPA} with a float mask",) * 2,
    "softcap": (_FLEX, "the formula on all scores, compiled"),
    "documents": (f"{_SDPA} with a boolean mask on documents padded to one length; padding and its removal not timed",)
    * 2,
    "cache": (f"an assignment to the cache, then {_SDPA} with a boolean mask",) * 2,
}


@dataclass(frozen=True)
class Attention:
    """A call of scaled dot-product attention.

    Attributes:
        batch, heads, queries, keys, size: B, Hq, M, N, D.
        kv_heads: Hk; `heads` by default.
        dtype: of q, k, v and the bias.
        causal: query i sees keys 0..i.
        option: ``"padding"``: a boolean mask (B, 1, 1, N) that ends each row of the batch at another key; ``"bias"``:
            an additive (1, Hq, M, N); ``"learned"``: the same, and its gradient is wanted; ``"dropout"``: `DROPOUT` of
            the weights are dropped; ``"window"``: query i sees `WINDOW` keys, the last of them its own; ``"alibi"``: a
            slope for each head; ``"softcap"``: scores within `SOFTCAP`; ``"documents"``: B documents of other lengths,
            the longest of M = N, behind one another; ``"cache"``: one step of generation, which writes a key and a
            value for each row behind those it has, another number in each, and reads them all.
        inference: timed without gradients only.
        tags: keys of `TAGS`.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    size: int
    kv_heads: int | None = None
    dtype: torch.dtype = torch.float32
    causal: bool = False
    option: Option = ""
    inference: bool = False
    tags: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Unique; made of word characters, so that ``pytest -k`` can pick it."""
        heads = f"H{self.heads}" + (f"_K{self.kv_heads}" if self.kv_heads else "")
        length = f"S{self.keys}" if self.queries == self.keys else f"M{self.queries}_N{self.keys}"
        form = ("_causal" if self.causal else "") + (f"_{self.option}" if self.option else "")
        return f"attention_B{self.batch}_{heads}_{length}_D{self.size}{form}{_suffix(self.dtype)}"

    @property
    def group(self) -> str:
        """What the report averages over."""
        if self.option:
            return f"attention {_GROUP_OF[self.option]}"
        if self.queries == 1:
            return "attention calls" if self.keys == 1 else "attention decode"
        if self.kv_heads:
            return "attention grouped"
        if self.size <= 32:
            return "attention small heads"
        return "attention" if self.dtype == torch.float32 else f"attention {_short(self.dtype)}"

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Modes in which the case is timed."""
        return MODES[:1] if self.inference else MODES

    @property
    def lengths(self) -> tuple[int, ...]:
        """Keys of each row of the batch, which are its queries too where it is a document."""
        shortest = {"padding": 2, "documents": 8, "cache": 2}.get(self.option)
        if shortest is None:
            return (self.keys,) * self.batch
        return tuple(torch.linspace(self.keys / shortest, self.keys, self.batch).long().tolist())

    def baseline(self, mode: Mode) -> str:
        """What torch does: the fastest way it has on a CPU that gives the same result."""
        return _BASELINE_OF.get(self.option, (_SDPA, _SDPA))[MODES.index(mode)]

    def flops(self, mode: Mode) -> int:
        """Useful floating point operations of one call: two products forward, five backward, of the keys that are read.

        Half of them count under causality, and the exact number under a window.
        """
        forward = 4 * self.heads * self.size * self._pairs()
        return forward if mode == "forward" else forward * 7 // 2

    def _pairs(self) -> int:
        """How many keys the queries of all batch rows read together, in each head."""
        if self.option == "window":
            return self.batch * sum(min(i + 1, WINDOW) for i in range(self.queries))
        if self.option == "documents":
            pairs = sum(length**2 for length in self.lengths)
        else:
            pairs = self.queries * sum(self.lengths)
        return pairs // 2 if self.causal else pairs

    def bytes(self, mode: Mode) -> int:
        """Compulsory memory traffic of one call.

        Forward reads q, the keys and values that a query reads, and the mask, and writes the output; backward reads
        these and the gradient of the output, and writes the gradients of q, k, v and of a learned bias.
        """
        rows = sum(self.lengths)
        documents = self.option == "documents"
        q = (rows if documents else self.batch * self.queries) * self.heads * self.size
        of_a_row = 2 * (self.kv_heads or self.heads) * self.size
        kv = rows * of_a_row
        grad_kv = kv if documents else self.batch * self.keys * of_a_row
        bias = self.heads * self.queries * self.keys if self.option in ("bias", "learned") else 0
        padding = self.batch * self.keys if self.option == "padding" else 0
        forward = 2 * q + kv + bias
        backward = (3 * q + kv + bias) + (q + grad_kv + (bias if self.option == "learned" else 0))
        if mode == "forward":
            return forward * self.dtype.itemsize + padding
        return (forward + backward) * self.dtype.itemsize + 2 * padding

    def phases(self, mode: Mode) -> list[Phase]:
        """One part: all products, and the compulsory traffic once."""
        return [Phase(self.flops(mode), self.bytes(mode), 1)]


Case = Recurrence | Attention

GRID_RECURRENCE = (
    (1, 1, 64, 64),
    (128, 1, 64, 128),
    (128, 1, 256, 256),
    (64, 1, 512, 512),
    (64, 1, 1024, 1024),
    (128, 8, 64, 64),
    (128, 16, 128, 128),
    (128, 32, 256, 256),
    (64, 32, 512, 512),
    (32, 32, 1024, 1024),
)
"""(T, B, I, H) of the measured baselines."""

SMALL_RECURRENCE = ((16, 64, 4, 64), (32, 8, 32, 64), (24, 32, 8, 32))

GRID_ATTENTION = (
    (4, 8, 128, 64, False),
    (4, 8, 128, 64, True),
    (1, 8, 512, 64, False),
    (1, 8, 512, 64, True),
    (1, 8, 2048, 64, False),
    (1, 8, 2048, 64, True),
    (1, 8, 2048, 128, True),
    (1, 2, 8192, 64, True),
)
"""(B, H, S, D, causal) of the measured baselines."""

QUICK = frozenset(
    {
        "lstm_T128_B16_I128_H128",
        "lstm_T128_B1_I256_H256",
        "lstm_T16_B64_I4_H64",
        "gru_T128_B16_I128_H128",
        "rnn_tanh_T128_B16_I128_H128",
        "lstm_T128_B16_I128_H128_bfloat16",
        "lstmcell_B1_I64_H64",
        "attention_B4_H8_S128_D64",
        "attention_B1_H8_S512_D64_causal",
        "attention_B4_H8_S128_D64_bfloat16",
        "attention_B4_H8_S256_D64_padding",
        "attention_B4_H8_S512_D64_dropout",
        "attention_B8_H8_S512_D64_documents",
        "attention_B1_H32_K8_M1_N4096_D128",
    }
)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _suffix(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else f"_{_short(dtype)}"


def _tagged(case: Case, *tags: str) -> Case:
    """`case` with `tags`, and with those that follow from its name, its options and its flops."""
    found = set(tags)
    if case.name in QUICK:
        found.add("quick")
    for name, (flops, traffic) in LIMIT_OF.items():
        if name == "numba" and isinstance(case, Attention) and case.option not in _OF_NUMBA:
            continue
        if case.flops("forward_backward") <= flops and case.bytes("forward") <= traffic:
            found.add(name)
    return replace(case, tags=frozenset(found))


def _recurrences() -> list[Case]:
    cases: list[Case] = []
    for cell in ("lstm", "gru", "rnn_tanh"):
        for shape in GRID_RECURRENCE:
            one_step = ("overhead",) if shape[:2] == (1, 1) else ()
            cases.append(_tagged(Recurrence(cell, *shape), "grid", *one_step))
        cases.append(_tagged(Recurrence(cell, 1, 1, 256, 256), "overhead"))
        cases += [_tagged(Recurrence(cell, *shape), "small") for shape in SMALL_RECURRENCE]
    cases += [_tagged(Recurrence("rnn_relu", *shape)) for shape in ((64, 1, 512, 512), (128, 16, 128, 128))]
    cases.append(_tagged(Recurrence("lstm", 128, 16, 128, 128, layers=2, bidirectional=True)))
    for cell in ("lstm", "gru"):
        for shape in ((128, 1, 256, 256), (128, 16, 128, 128), (64, 32, 512, 512)):
            cases.append(_tagged(Recurrence(cell, *shape, dtype=torch.bfloat16)))
    for cell in ("lstm", "gru", "rnn_tanh"):
        for hidden in (64, 256):
            cases.append(_tagged(Recurrence(cell, 1, 1, hidden, hidden, single=True), "overhead"))
    return cases


def _attentions() -> list[Case]:
    cases: list[Case] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for batch, heads, length, size, causal in GRID_ATTENTION:
            cases.append(_tagged(Attention(batch, heads, length, length, size, causal=causal, dtype=dtype), "grid"))
    for batch, heads, length, size in ((64, 4, 32, 16), (64, 4, 128, 32)):
        cases.append(_tagged(Attention(batch, heads, length, length, size), "small"))
        cases.append(_tagged(Attention(batch, heads, length, length, size, causal=True), "small"))
    options: tuple[Option, ...] = ("padding", "bias")
    for length, batch in ((256, 4), (1024, 2)):
        for option in options:
            cases.append(_tagged(Attention(batch, 8, length, length, 64, option=option)))
    cases.append(_tagged(Attention(4, 8, 256, 256, 64, option="learned")))
    cases.append(_tagged(Attention(4, 8, 512, 512, 64, option="dropout")))
    options = ("window", "alibi", "softcap")
    for option in options:
        cases.append(_tagged(Attention(1, 4, 4096, 4096, 64, causal=True, option=option)))
    cases.append(_tagged(Attention(8, 8, 512, 512, 64, option="documents")))
    cases.append(_tagged(Attention(1, 32, 512, 512, 128, kv_heads=8, causal=True)))
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 8):
            cases.append(_tagged(Attention(batch, 32, 1, 4096, 128, kv_heads=8, dtype=dtype, inference=True)))
    cases.append(_tagged(Attention(8, 32, 1, 4096, 128, kv_heads=8, option="cache", inference=True)))
    cases.append(_tagged(Attention(1, 1, 1, 1, 64), "overhead"))
    return cases


CASES: tuple[Case, ...] = (*_recurrences(), *_attentions())


def with_tag(tag: str) -> list[Case]:
    """The cases that carry `tag`.

    Raises:
        ValueError: there is no such tag.
    """
    if tag not in TAGS:
        raise ValueError(f"tag: {tag!r} is not one of {', '.join(map(repr, TAGS))}")
    return [case for case in CASES if tag in case.tags]


def providers(case: Case, mode: Mode) -> tuple[str, ...]:
    """Who can be timed on `case`: torch and native always, the slower ones where the case carries their tag.

    The engines run float32 layers (no cells), without gradients.
    """
    own = tuple(name for name in PROVIDERS if name not in LIMIT_OF or name in case.tags)
    layer = isinstance(case, Recurrence) and not case.single
    return own + (ENGINES if layer and case.dtype == torch.float32 and mode == "forward" else ())
