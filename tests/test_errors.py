"""Bad input gets an error that names the argument, what it was and what is allowed."""

from __future__ import annotations

import re

import pytest
import torch

import seqkernels
from seqkernels import testing
from seqkernels.ops.attention import attention
from seqkernels.ops.recurrence import recurrence

T, B, H = 4, 3, 5

RECURRENCE = [
    ("input", lambda x: x[0], ValueError, r"input: expected 3 dimensions \(T, B, G\*H\), got shape \(3, 20\)"),
    ("input", lambda x: x.long(), TypeError, r"input: expected one of .*, got torch\.int64"),
    ("input", lambda x: x[..., 1:], ValueError, r"input: expected shape \(T, B, 20\) .* got \(4, 3, 19\)"),
    ("input", lambda x: x[:, 1:], ValueError, r"state0: expected shape \(2, 2, 5\), got \(2, 3, 5\)"),
    ("weight_hh", lambda x: x.t(), ValueError, r"weight_hh: expected shape \(G\*H, H\) with G = 4 .*, got \(5, 20\)"),
    ("weight_hh", lambda x: x[0], ValueError, r"weight_hh: .* got \(5,\)"),
    ("state0", lambda x: x[:1], ValueError, r"state0: expected shape \(2, 3, 5\), got \(1, 3, 5\)"),
    ("state0", lambda x: x[0], ValueError, r"state0: expected shape \(2, 3, 5\), got \(3, 5\)"),
    ("state0", lambda x: None, TypeError, "state0: expected a Tensor, got NoneType"),
    ("control", lambda x: x.bool(), TypeError, r"control: expected torch\.uint8, got torch\.bool"),
    ("control", lambda x: x[1:], ValueError, r"control: expected shape \(4, 3\), got \(3, 3\)"),
    *(
        (name, lambda x: x.tolist(), TypeError, f"{name}: expected a Tensor, got list")
        for name in ("input", "weight_hh", "bias_hh", "state0", "control")
    ),
    *(
        (name, lambda x: x.to("meta"), ValueError, rf"{name}: expected on cpu as input, got meta")
        for name in ("weight_hh", "bias_hh", "state0", "control")
    ),
    *(
        (name, lambda x: x.half(), TypeError, rf"{name}: expected torch\.float32 as input, got torch\.float16")
        for name in ("weight_hh", "bias_hh", "state0")
    ),
    ("bias_hh", lambda x: x[1:], ValueError, r"bias_hh: expected shape \(20,\), got \(19,\)"),
]

SHAPES = {
    "weight_ih": "(20, 7)",
    "bias_ih": "(20,)",
    "reset_state": "(2, 5)",
    "peephole": "(3, 5)",
    "recurrent_mask": "(3, 5)",
    "norm_h": "(20,)",
    "norm_c": "(2, 5)",
    "zoneout": "(2,)",
    "seed": "()",
}
OPTIONS = [
    ("input", lambda x: x[0], ValueError, r"input: expected 3 dimensions \(T, B, I\), got shape \(3, 7\)"),
    *(
        (name, lambda x: x.unsqueeze(0), ValueError, f"{name}: expected shape {re.escape(shape)}, got \\(1, ")
        for name, shape in SHAPES.items()
        if name != "seed"
    ),
    ("seed", lambda x: x.view(1), ValueError, r"seed: expected shape \(\), got \(1,\)"),
    *((name, lambda x: x.tolist(), TypeError, f"{name}: expected a Tensor, got ") for name in SHAPES),
    *((name, lambda x: x.to("meta"), ValueError, f"{name}: expected on cpu as input, got meta") for name in SHAPES),
    *(
        (name, lambda x: x.double(), TypeError, rf"{name}: expected torch\.float32 as input, got torch\.float64")
        for name in SHAPES
        if name not in ("zoneout", "seed")
    ),
    ("zoneout", lambda x: x.double(), TypeError, r"zoneout: expected torch\.float32, got torch\.float64"),
    ("seed", lambda x: x.int(), TypeError, r"seed: expected torch\.int64, got torch\.int32"),
    *(
        (name, lambda x: x.clone().requires_grad_(), ValueError, f"{name}: expected no requires_grad, .* detach it")
        for name in ("recurrent_mask", "zoneout")
    ),
    ("weight_ih", lambda x: None, ValueError, r"input: expected shape \(T, B, 20\) .* no weight_ih, got \(4, 3, 7\)"),
    ("zoneout", lambda x: None, ValueError, r"seed: expected None where zoneout is None"),
]

ATTENTION = [
    *(
        (name, lambda x: x[0], ValueError, rf"{name}: expected 4 dimensions \(batch, heads, length, size\), got \(")
        for name in "qkv"
    ),
    *((name, lambda x: x.tolist(), TypeError, f"{name}: expected a Tensor, got list") for name in "qkv"),
    *((name, lambda x: x.int(), TypeError, rf"{name}: expected one of .*, got torch\.int32") for name in "qkv"),
    *((name, lambda x: x.double(), TypeError, rf"{name}: expected torch\.float32 as q, got") for name in "kv"),
    *((name, lambda x: x.to("meta"), ValueError, rf"{name}: expected on cpu as q, got meta") for name in "kv"),
    ("k", lambda x: x[:1], ValueError, r"k: expected shape \(2, Hk, N, 8\) .* got \(1, 2, 7, 8\)"),
    ("k", lambda x: x[..., 1:], ValueError, r"k: expected shape \(2, Hk, N, 8\) .* got \(2, 2, 7, 7\)"),
    ("k", lambda x: x[:, :0], ValueError, r"k: expected shape .* Hk a divisor of 4 .* got \(2, 0, 7, 8\)"),
    ("k", lambda x: x.repeat(1, 3, 1, 1)[:, :3], ValueError, r"k: expected .* Hk a divisor of 4 .* got \(2, 3, 7, 8\)"),
    ("v", lambda x: x[:, :, 1:], ValueError, r"v: expected shape \(2, 2, 7, 'Dv'\) to match k, got \(2, 2, 6, 8\)"),
    ("v", lambda x: x[:, :1], ValueError, r"v: expected shape .* got \(2, 1, 7, 8\)"),
    ("v", lambda x: x[..., :0], ValueError, r"head sizes from 1 to 512 are allowed, got 8 and 0"),
    ("v", lambda x: x.repeat(1, 1, 1, 65), ValueError, r"head sizes from 1 to 512 are allowed, got 8 and 520"),
    ("mask", lambda x: x.float(), TypeError, r"mask: expected torch\.bool, got torch\.float32"),
    (
        "mask",
        lambda x: x[0],
        ValueError,
        r"mask: expected 4 dimensions, each 1 or as in \(2, 4, 5, 7\), got \(4, 5, 7\)",
    ),
    ("mask", lambda x: x[..., :3], ValueError, r"mask: expected .* got \(2, 4, 5, 3\)"),
    ("mask", lambda x: x.to("meta"), ValueError, r"mask: expected on cpu as q, got meta"),
    ("bias", lambda x: x.double(), TypeError, r"bias: expected torch\.float32, got torch\.float64"),
    ("bias", lambda x: x[:, :2], ValueError, r"bias: expected 4 dimensions, each 1 or as in .* got \(2, 2, 5, 7\)"),
    ("bias", lambda x: x.to("meta"), ValueError, r"bias: expected on cpu as q, got meta"),
]


@pytest.mark.parametrize(("name", "spoil", "kind", "text"), RECURRENCE)
def test_recurrence(name, spoil, kind, text):
    inputs = testing.recurrence_inputs("lstm", T, B, H, control=True, requires_grad=False)
    with pytest.raises(kind, match=text):
        recurrence(*inputs._replace(**{name: spoil(getattr(inputs, name))}), cell="lstm")


@pytest.mark.parametrize(("name", "spoil", "kind", "text"), OPTIONS)
def test_options_of_the_recurrence(name, spoil, kind, text):
    common = {"input_size": 7, "requires_grad": False}
    inputs = testing.recurrence_inputs("lstm", T, B, H, control=True, **common)
    options = testing.recurrence_options("lstm", B, H, names=testing.OPTIONS, **common)
    with seqkernels.use_backend("reference"):
        recurrence(*inputs, cell="lstm", **options)
    if name == "input":
        inputs = inputs._replace(input=spoil(inputs.input))
    else:
        options[name] = spoil(options[name])
    with pytest.raises(kind, match=text):
        recurrence(*inputs, cell="lstm", **options)


def test_options_that_other_cells_have():
    inputs = testing.recurrence_inputs("gru", T, B, H)
    for name, shape in (("peephole", (3, H)), ("norm_c", (2, H))):
        with pytest.raises(ValueError, match=f"{name}: expected None for 'gru', only an 'lstm' has one"):
            recurrence(*inputs, cell="gru", **{name: torch.ones(shape)})
    with pytest.raises(ValueError, match="bias_ih: expected None where weight_ih is None"):
        recurrence(*inputs, cell="gru", bias_ih=torch.ones(3 * H))


def test_unknown_cell():
    inputs = testing.recurrence_inputs("lstm", T, B, H)
    with pytest.raises(ValueError, match=r"cell: 'mgu' is not one of 'rnn_tanh', 'rnn_relu', 'lstm', 'gru'"):
        recurrence(*inputs, cell="mgu")
    with pytest.raises(ValueError, match=r"weight_hh: .* G = 3"):
        recurrence(*inputs, cell="gru")


@pytest.mark.parametrize(("name", "spoil", "kind", "text"), ATTENTION)
def test_attention(name, spoil, kind, text):
    inputs = testing.attention_inputs(2, 4, 5, 7, 8, kv_heads=2, mask="BHMN", bias="BHMN", requires_grad=False)
    with pytest.raises(kind, match=text):
        attention(*inputs._replace(**{name: spoil(getattr(inputs, name))}))


TESTING = {
    r"cell: 'mgu' is not one of 'rnn_tanh'": lambda: testing.recurrence_inputs("mgu", T, B, H),
    r"cell: 'mgu' is not one of 'rnn_tanh', ": lambda: testing.recurrence_options("mgu", B, H, names=()),
    r"names: 'dropout' is not one of 'weight_ih', ": lambda: testing.recurrence_options("gru", B, H, names=["dropout"]),
    r"input_size: .*'weight_ih', got None": lambda: testing.recurrence_options("gru", B, H, names=["weight_ih"]),
    r"layout: 'striped' is not one of 'contiguous'": lambda: testing.lay_out(torch.ones(2), "striped"),
    r"mask: expected 'BHMN' with some letters replaced by '1', got 'BN'": lambda: testing.attention_inputs(mask="BN"),
    r"bias: expected 'BHMN' .* got 'NMHB'": lambda: testing.attention_inputs(bias="NMHB"),
    r"count: expected at least 1, got 0": lambda: testing.threads(0).__enter__(),
}


@pytest.mark.parametrize("text", TESTING)
def test_testing(text):
    with pytest.raises(ValueError, match=text):
        TESTING[text]()


def test_dtypes_of_testing():
    with pytest.raises(TypeError, match=r"dtype: expected one of .*, got torch\.int8"):
        testing.attention_inputs(dtype=torch.int8)
    with pytest.raises(TypeError, match=r"dtype: expected one of .*, got torch\.int8"):
        testing.recurrence_inputs("gru", T, B, H, torch.int8)
    with pytest.raises(TypeError, match=r"dtype: expected one of .*, got torch\.int8"):
        testing.recurrence_options("gru", B, H, torch.int8, names=())


def test_force_isa(compiled):
    kind, text = (ValueError, r"name: 'mmx' is not one of '[-\w]+'") if compiled else (ImportError, r"seqkernels\._C")
    with pytest.raises(kind, match=text), testing.force_isa("mmx"):
        pass


def test_use_backend():
    with pytest.raises(ValueError, match=r"backend: 'Native' is not one of"), seqkernels.use_backend("Native"):
        pass


BUDGET = {
    "max error 0.1 is over the budget": ([1.0, 1.1], [1.0, 1.0], [1.0, 1.0]),
    "the largest error is at (1,): 1.10000002 instead of 1": ([1.0, 1.1], [1.0, 1.0], [1.0, 1.0]),
    "rms error": ([1.001] * 8, [1.0] * 8, [1.0] * 7 + [1.001]),
    "1 of 2 elements differ from the reference in being NaN or infinite, the first at (1,): nan instead of 1.0": (
        [1.0, float("nan")],
        [1.0, 1.0],
        [1.0, 1.0],
    ),
    "inf instead of -inf": ([float("inf")], [float("-inf")], [0.0]),
    "0.0 instead of nan": ([0.0], [float("nan")], [0.0]),
    "expected shape (1,), got (2,)": ([0.0, 0.0], [0.0], [0.0]),
}


@pytest.mark.parametrize("text", BUDGET)
def test_budget_can_fail(text):
    actual, oracle, baseline = BUDGET[text]
    with pytest.raises(AssertionError, match=re.escape(text)):
        testing.assert_within_budget(torch.tensor(actual), torch.tensor(oracle).double(), torch.tensor(baseline))


def test_budget_can_pass():
    eps = torch.finfo(torch.float32).eps
    oracle = torch.tensor([1.0, 2.0, torch.nan, -torch.inf], dtype=torch.float64)
    testing.assert_within_budget(oracle.float() * (1 + eps), oracle, oracle.float())
    testing.assert_within_budget(oracle.float() * 1.002, oracle, oracle.float() * 1.001)
    testing.assert_within_budget(oracle.float() * 1.002, oracle, (oracle.float(), oracle.float() * 1.001))


def test_poisoned_empty():
    state = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with testing.poisoned_empty():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(3).new_empty((2, 2), dtype=torch.bfloat16).isnan().all()
        assert torch.empty_like(torch.zeros(3)).isnan().all()
    assert state == (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_layouts_keep_the_values():
    x = torch.arange(24.0).view(2, 3, 4)
    for layout in testing.LAYOUTS[:-2]:
        assert torch.equal(testing.lay_out(x, layout), x)
    strides = {testing.lay_out(x, layout).stride() for layout in testing.LAYOUTS}
    assert strides == {(12, 4, 1), (24, 8, 2), (4, 8, 1), (1, 2, 6), (42, 7, 1), (0, 4, 1), (0, 0, 0)}
