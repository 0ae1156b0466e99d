"""A short table of seqkernels against torch: a few layers, forward and backward, both in turn."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import seqkernels

Step = Callable[[], None]


def _step(function: Callable[[], Tensor], grad: Tensor) -> Step:
    return lambda: function().backward(grad)


def recurrence(kind: str, steps: int, batch: int, hidden: int) -> tuple[Step, Step]:
    """Forward and backward of a layer of torch and of its twin with the same weights."""
    theirs = getattr(torch.nn, kind)(hidden, hidden)
    ours = getattr(seqkernels.nn, kind)(hidden, hidden)
    ours.load_state_dict(theirs.state_dict())
    x, grad = torch.randn(steps, batch, hidden, requires_grad=True), torch.randn(steps, batch, hidden)
    return _step(lambda: theirs(x)[0], grad), _step(lambda: ours(x)[0], grad)


def attention(batch: int, heads: int, length: int, size: int, is_causal: bool) -> tuple[Step, Step]:
    """Forward and backward of scaled dot-product attention by torch and by seqkernels."""
    q, k, v = (torch.randn(batch, heads, length, size, requires_grad=True) for _ in range(3))
    grad = torch.randn(batch, heads, length, size)
    theirs, ours = F.scaled_dot_product_attention, seqkernels.functional.scaled_dot_product_attention
    return (
        _step(lambda: theirs(q, k, v, is_causal=is_causal), grad),
        _step(lambda: ours(q, k, v, is_causal=is_causal), grad),
    )


CASES: dict[str, Callable[[], tuple[Step, Step]]] = {
    "LSTM, 16 steps, batch 64, hidden 64": lambda: recurrence("LSTM", 16, 64, 64),
    "LSTM, 128 steps, batch 16, hidden 128": lambda: recurrence("LSTM", 128, 16, 128),
    "GRU, 16 steps, batch 64, hidden 64": lambda: recurrence("GRU", 16, 64, 64),
    "GRU, 128 steps, batch 16, hidden 128": lambda: recurrence("GRU", 128, 16, 128),
    "attention, 8 x 4 heads, 128 x 32": lambda: attention(8, 4, 128, 32, False),
    "attention, 2 x 8 heads, 512 x 64, causal": lambda: attention(2, 8, 512, 64, True),
}


def compare(theirs: Step, ours: Step, seconds: float) -> tuple[float, float, float]:
    """Median seconds of both, run in turn for `seconds` (at least 3 times), and the median of their ratios."""
    theirs(), ours()
    samples: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(samples[0]) < 3 or time.perf_counter() < end:
        for i in (0, 1) if len(samples[0]) % 2 else (1, 0):
            begin = time.perf_counter()
            (theirs, ours)[i]()
            samples[i].append(time.perf_counter() - begin)
    ratio = statistics.median(a / b for a, b in zip(*samples, strict=True))
    return statistics.median(samples[0]), statistics.median(samples[1]), ratio


def main(arguments: list[str] | None = None) -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three rounds of each case")
    seconds = 0.0 if parser.parse_args(arguments).quick else 1.5
    print(f"{'forward + backward, float32':<44}{'torch ms':>10}{'seqkernels ms':>15}{'ratio':>8}")
    for name, make in CASES.items():
        torch.manual_seed(0)
        theirs, ours, ratio = compare(*make(), seconds)
        print(f"{name:<44}{theirs * 1e3:>10.2f}{ours * 1e3:>15.2f}{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
