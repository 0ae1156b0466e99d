"""Recurrences with plans that a test chooses, of the compiled kernels or of their emulation, and the reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkernels import testing
from seqkernels.backends import _through_time
from seqkernels.backends.cuda import recurrence as of_cuda
from seqkernels.backends.cuda.persistent import product_of
from seqkernels.backends.cuda.plans import STEPS
from seqkernels.backends.reference import recurrence as reference
from seqkernels.cells import CELLS, CONSTANTS, Weights, accumulate_dtype

#: Dtype and precision of each kind of product.
PRODUCTS = {
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "tf32x3": (torch.float32, "tf32x3"),
    "exact": (torch.float32, "ieee"),
}
#: Options that the kernels have, but for those of the input, which torch multiplies.
OPTIONS = ("reset_state", "recurrent_mask", "norm_h", "norm_c", "zoneout", "seed", "peephole")

Results = dict[str, Tensor]


class Case(NamedTuple):
    """A call and its plan.

    Attributes:
        shape: T, B, H.
        options: of `OPTIONS`; tier "steps" goes without those of norms, which it has not.
        every: as in the contract.
        others: whether there are gradients of c and of the gates, beside those of h and of the last state.
    """

    cell: str
    product: str
    tier: str
    units: int
    rows: int
    shape: tuple[int, int, int]
    reverse: bool = False
    control: bool = False
    options: tuple[str, ...] = ()
    every: int = 0
    others: bool = False
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return PRODUCTS[self.product][0]

    def plan(self, backward: bool) -> Any:
        """Of a pass, in the compiled module that is in use."""
        return plan_of(
            self.tier,
            self.cell,
            self.product,
            backward,
            self.shape[2],
            self.shape[1],
            self.units,
            self.rows,
            ("norm_h" in self.options, "norm_c" in self.options and self.cell == "lstm"),
        )


def plan_of(
    tier: str,
    cell: str,
    product: str,
    backward: bool,
    hidden: int,
    batch: int,
    units: int,
    rows: int,
    norms: tuple[bool, bool] = (False, False),
) -> Any:
    """The plan with these units and rows, whether or not a table would choose it; tier "steps" has neither."""
    if tier == "steps":
        return STEPS
    return of_cuda.kernels().plan(tier, cell, product, backward, hidden, batch, units, rows, *norms)


class Call(NamedTuple):
    """The tensors of a case."""

    input: Tensor
    weights: Weights
    state0: Tensor
    control: Tensor | None
    grads: tuple[Tensor | None, ...]

    def to(self, dtype: torch.dtype) -> Call:
        grads = tuple(None if x is None else x.to(dtype) for x in self.grads)
        return Call(self.input.to(dtype), self.weights.to(dtype), self.state0.to(dtype), self.control, grads)


def call_of(case: Case, device: str = "cpu") -> Call:
    """Random tensors of a case."""
    steps, batch, hidden = case.shape
    gates, states, saved = CELLS[case.cell]
    inputs = testing.recurrence_inputs(
        case.cell, *case.shape, case.dtype, control=case.control, detach=True, requires_grad=False, seed=case.seed
    )
    names = [name for name in case.options if name not in ("peephole", "norm_c") or case.cell == "lstm"]
    if case.tier == "steps":
        names = [name for name in names if not name.startswith("norm")]
    options = testing.recurrence_options(
        case.cell, batch, hidden, case.dtype, names=names, requires_grad=False, seed=case.seed
    )
    if "seed" in options and "zoneout" not in options:
        del options["seed"]
    like = {
        "hidden": inputs.input.new_empty(steps, batch, hidden),
        "cells": inputs.input.new_empty(steps, batch, hidden),
        "state_n": inputs.state0,
        "gates": inputs.input.new_empty(steps, batch, gates if saved else 1, hidden),
    }
    grads: dict[str, Tensor | None] = {**testing.random_grads(like, seed=case.seed + 1)}
    if not case.others or case.every:
        grads |= {"cells": None, "gates": None}
    if states == 1:
        grads["cells"] = None

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    weights = testing.recurrence_weights(inputs.weight_hh, inputs.bias_hh, **options)
    control = moved(inputs.control)
    return Call(
        inputs.input.to(device),
        Weights._make(map(moved, weights)),
        inputs.state0.to(device),
        control,
        tuple(map(moved, grads.values())),
    )


_FORWARD = ("states", "state_n", "reserve")
_BACKWARD = ("input", "state0", *Weights._fields)


def _needs(weights: Weights) -> list[bool]:
    given = {name: x is not None and name not in CONSTANTS for name, x in weights._asdict().items()}
    return [True, True, *given.values()]


def run(case: Case, call: Call, path: Any = None) -> Results:
    """Results of the kernels: of the forward pass, and gradients by ``grad_`` and a name.

    Args:
        path: what runs the loop, by default launches with the plan of the case.
    """
    path = path or of_cuda.Planned(lambda loop, backward: case.plan(backward))
    precision = PRODUCTS[case.product][1]
    with testing.poisoned_empty():
        forward = _through_time.recurrence_forward(
            path, *call[:4], case.cell, case.reverse, True, case.every, precision
        )
        found = _through_time.recurrence_backward(
            path,
            call.grads,
            call.input,
            call.weights,
            forward[0],
            forward[2],
            call.control,
            case.cell,
            case.reverse,
            _needs(call.weights),
            case.every,
            precision,
        )
    assert product_of(case.dtype, precision) == case.product
    return dict(zip(_FORWARD, forward, strict=True)) | _gradients(found)


def expected(case: Case, call: Call, found: Results, dtype: torch.dtype) -> Results:
    """Results of the reference in `dtype`; gradients are those where the forward pass left what it left in `found`."""
    given, acc = call.to(dtype), accumulate_dtype(dtype)
    forward = reference.recurrence_forward(*given[:4], case.cell, case.reverse, True, case.every)
    back = reference.recurrence_backward(
        given.grads,
        given.input,
        given.weights,
        found["states"].to(dtype),
        found["reserve"].to(acc),
        given.control,
        case.cell,
        case.reverse,
        _needs(given.weights),
        case.every,
    )
    return dict(zip(_FORWARD, forward, strict=True)) | _gradients(back)


def _gradients(found: list[Tensor]) -> Results:
    return {f"grad_{name}": x for name, x in zip(_BACKWARD, found, strict=True) if x.numel()}


def _rounded(case: Case, call: Call) -> Call:
    """The call in float64 with weights off by a rounding: what products of factors in 16 bits may make of it.

    The reference keeps gates and their gradients in float32 between products.
    """
    given = call.to(torch.float64)
    generator = torch.Generator().manual_seed(case.seed)
    signs = torch.randint(0, 2, given.weights.weight_hh.shape, generator=generator).to(given.input.device) * 2 - 1
    weights = given.weights._replace(weight_hh=given.weights.weight_hh * (1 + signs * torch.finfo(case.dtype).eps / 2))
    return given._replace(weights=weights)


class Judge:
    """Judges results of many cases together, since where one has few elements the reference is exact by luck.

    Errors count in units of about the largest element of their tensor.
    """

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[Case, Tensor, Tensor, Tensor, Tensor]]] = {}

    def run(self, case: Case, device: str = "cpu", path: Any = None) -> Results:
        """Runs a case, on `path` as in `run`, and takes down what came out; returns that."""
        call = call_of(case, device)
        found = run(case, call, path)
        exact = expected(case, call, found, torch.float64)
        own = expected(case, call, found, case.dtype)
        rounded = expected(case, _rounded(case, call), found, torch.float64) if case.dtype.itemsize == 2 else own
        assert found.keys() == exact.keys()
        for name, x in found.items():
            if x.numel() == 0:
                continue
            assert x.isfinite().all(), f"{name} of {case}"
            # A power of 2, so that nothing is rounded.
            size = exact[name].abs().max().clamp(min=1e-30).log2().ceil().exp2()
            self._seen.setdefault(name, []).append(
                (case, *((y.double() / size).flatten().cpu() for y in (x, exact[name], own[name], rounded[name])))
            )
        return found

    def verdict(self, dtype: torch.dtype) -> None:
        """Asserts that all errors are within the budget of `dtype`."""
        for name, seen in self._seen.items():
            cases, *rows = zip(*seen, strict=True)
            found, exact, *own = map(torch.cat, rows)
            try:
                testing.assert_within_budget(found.to(dtype), exact, own, name)
            except AssertionError as error:
                errors = [(x - y).abs().max().item() for _, x, y, *_ in seen]
                worst = max(range(len(errors)), key=errors.__getitem__)
                raise AssertionError(f"{error}; the most, {errors[worst]:.3g}, in {cases[worst]}") from error
