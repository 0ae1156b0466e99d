"""``precision=``: how products of float32 matrices are formed on GPUs; what it does elsewhere, and to torch's flags."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import seqkernels
from seqkernels import functional, nn, precision
from seqkernels.ops.attention import attention
from seqkernels.ops.recurrence import recurrence

TF32 = ["tf32", "tf32x3"]
REFUSED = re.escape("precision: expected one of 'ieee', 'tf32', 'tf32x3', got 'high'")


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


def test_unknown() -> None:
    q, x = _draw(1, 2, 3, 4), _draw(3, 2, 4)
    weights = [_draw(16, 4), _draw(16, 4)]
    for call in (
        lambda **named: functional.attention(q, q, q, **named),
        lambda **named: attention(q, q, q, **named),
        lambda **named: functional.lstm(x, None, weights, False, 1, 0.0, False, False, False, **named),
        lambda **named: recurrence(x, weights[1], None, _draw(2, 2, 4), cell="lstm", weight_ih=weights[0], **named),
        lambda **named: nn.GRU(4, 4, **named),
        lambda **named: nn.MultiheadAttention(4, 2, **named),
        lambda **named: seqkernels.convert(torch.nn.LSTM(4, 4), **named),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            call(precision="high")


@pytest.mark.parametrize("name", TF32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_difference_on_a_processor(dtype: torch.dtype, name: str) -> None:
    q, x = _draw(2, 2, 7, 8).to(dtype), _draw(5, 2, 8).to(dtype)
    torch.manual_seed(0)
    pairs: list[tuple[Any, Any]] = [
        (functional.attention(q, q, q, is_causal=True), functional.attention(q, q, q, is_causal=True, precision=name))
    ]
    for kind in ("RNN", "LSTM", "GRU"):
        plain = getattr(nn, kind)(8, 6, num_layers=2, bidirectional=True, dtype=dtype)
        other = getattr(nn, kind)(8, 6, num_layers=2, bidirectional=True, dtype=dtype, precision=name)
        other.load_state_dict(plain.state_dict())
        assert other.extra_repr() == f"{plain.extra_repr()}, precision={name!r}"
        pairs.append((plain(x)[0], other(x)[0]))
    heads = nn.MultiheadAttention(8, 2, dtype=dtype)
    others = nn.MultiheadAttention(8, 2, dtype=dtype, precision=name)
    others.load_state_dict(heads.state_dict())
    pairs.append((heads(x, x, x)[0], others(x, x, x)[0]))
    for expected, found in pairs:
        assert torch.equal(expected, found)
        wanted = [
            torch.autograd.grad(out.sum(), (x if out.dim() == 3 else q), retain_graph=True) for out in (expected, found)
        ]
        assert torch.equal(*(grads[0] for grads in wanted))


@pytest.mark.parametrize("name", TF32)
def test_of_a_whole_model(name: str) -> None:
    model = torch.nn.ModuleList(
        [torch.nn.LSTM(4, 4), torch.nn.TransformerEncoderLayer(4, 2, 8), torch.nn.GRUCell(4, 4)]
    )
    seqkernels.convert(model, dry_run=True, precision=name)
    assert not any(hasattr(module, "precision") for module in model.modules())
    seqkernels.convert(model, precision=name)
    assert model[0].precision == model[1].self_attn.precision == name
    seqkernels.convert(model)
    assert model[0].precision == name
    seqkernels.convert(model, precision="ieee")
    assert model[0].precision == model[1].self_attn.precision == "ieee"
    seqkernels.revert(model)
    assert not any(hasattr(module, "precision") for module in model.modules())


@pytest.fixture
def flags() -> Any:
    """torch's own flags of matrix products, as before when the test has ended."""
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"


def _set(how: str) -> None:
    if how in ("highest", "high"):
        torch.set_float32_matmul_precision(how)
    elif how.startswith("all "):
        torch.backends.fp32_precision = how.removeprefix("all ")
    else:
        torch.backends.cuda.matmul.fp32_precision = how


@pytest.mark.parametrize("name", precision.PRECISIONS)
@pytest.mark.parametrize("how", ["highest", "high", "ieee", "tf32", "all tf32", "all ieee"])
def test_products_of_torch(flags: Any, how: str, name: str) -> None:
    x: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    _set(how)
    before = flags.fp32_precision
    with precision.torch_products(name, x):
        assert flags.fp32_precision in (("tf32",) if name == "tf32" else ("ieee", "none"))
    assert flags.fp32_precision == before
    if how.startswith("all "):
        # It still follows what it followed.
        other = "ieee" if how == "all tf32" else "tf32"
        _set(f"all {other}")
        assert flags.fp32_precision == other
    elif how in ("highest", "high"):
        assert torch.get_float32_matmul_precision() == how


def test_flags_after_an_error(flags: Any) -> None:
    x: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))

    def fails() -> None:
        with precision.torch_products("tf32", x):
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert flags.fp32_precision == "none"


def test_threads_wait_for_each_other(flags: Any) -> None:
    """Else the one that ends last would restore what the other one had set."""
    x: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    inside, leave, seen = threading.Event(), threading.Event(), []

    def first() -> None:
        with precision.torch_products("tf32", x):
            inside.set()
            leave.wait(10)
            seen.append(("first", flags.fp32_precision))

    def second() -> None:
        inside.wait(10)
        with precision.torch_products("ieee", x):
            seen.append(("second", flags.fp32_precision))

    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(first), pool.submit(second)]
        inside.wait(10)
        # Time enough for the second one to enter, were it let in.
        assert not wait(ends[1:], timeout=0.2).done
        leave.set()
        for end in ends:
            end.result()
    assert seen == [("first", "tf32"), ("second", "none")]
    assert flags.fp32_precision == "none"


@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, "cuda"), (torch.float32, "cpu")], ids=str)
def test_other_products_leave_the_flags_alone(flags: Any, dtype: torch.dtype, device: str) -> None:
    _set("high")
    x: Any = SimpleNamespace(dtype=dtype, device=torch.device(device))
    with precision.torch_products("ieee", x):
        assert flags.fp32_precision == "tf32"
