"""`seqkernels.functional.attention`: its arguments, what they are in the contract, and its errors."""

from __future__ import annotations

import pytest
import torch

import seqkernels
from seqkernels import testing
from seqkernels.functional import attention
from seqkernels.ops.attention import attention as contract

# Torch's own, from Dynamo when it traces an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

B, H, M, N, D = 2, 4, 5, 7, 8
LENGTHS = torch.tensor([3, 7])
SEED = torch.tensor(11)


@pytest.fixture(autouse=True)
def _reference():
    with seqkernels.use_backend("reference"):
        yield


def _inputs(dtype=torch.float32, requires_grad=False, **options):
    return testing.attention_inputs(B, H, M, N, D, dtype, kv_heads=2, requires_grad=requires_grad, **options)


def _rows(total_q=9, total_k=12, requires_grad=False):
    """q, k and v of documents behind one another."""
    inputs = testing.attention_inputs(1, H, total_q, total_k, D, kv_heads=2, requires_grad=False)
    return [x.squeeze(0).transpose(0, 1).contiguous().requires_grad_(requires_grad) for x in inputs[:3]]


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINK = torch.tensor([0.5, -1.0, 0.0, 2.0])
MASK = torch.rand(B, 1, M, N, generator=torch.Generator().manual_seed(3)) < 0.75
BIAS = torch.randn(H, M, N, generator=torch.Generator().manual_seed(4))

SAME = [
    ({}, {}),
    ({"scale": 0.3}, {"scale": 0.3}),
    ({"scale": 0}, {"scale": 0.0}),
    ({"is_causal": True}, {"right": 0}),
    ({"is_causal": True, "alignment": "bottom_right"}, {"right": 0, "bottom_right": True}),
    ({"window": 2}, {"left": 2, "right": 2}),
    ({"window": (1, 3)}, {"left": 1, "right": 3}),
    ({"window": [0, 0]}, {"left": 0, "right": 0}),
    ({"window": (None, 3)}, {"right": 3}),
    ({"window": (3, None), "alignment": "bottom_right"}, {"left": 3, "bottom_right": True}),
    ({"window": (None, None)}, {}),
    ({"window": 2, "is_causal": True}, {"left": 2, "right": 0}),
    ({"keep": MASK}, {"mask": MASK}),
    ({"drop": MASK}, {"mask": ~MASK}),
    ({"keep": MASK[0, 0]}, {"mask": MASK[:1]}),
    ({"drop": MASK[0, 0, 0]}, {"mask": ~MASK[:1, :, :1]}),
    ({"bias": BIAS}, {"bias": BIAS.unsqueeze(0)}),
    ({"bias": BIAS[0, 0]}, {"bias": BIAS[None, :1, :1]}),
    ({"key_lengths": LENGTHS}, {"key_lengths": LENGTHS.int()}),
    ({"key_lengths": LENGTHS.int()}, {"key_lengths": LENGTHS.int()}),
    ({"alibi_slopes": SLOPES.double()}, {"alibi_slopes": SLOPES}),
    ({"alibi_slopes": SLOPES.expand(B, H)}, {"alibi_slopes": SLOPES.expand(B, H)}),
    ({"softcap": 1.5}, {"softcap": 1.5}),
    ({"softcap": 0}, {}),
    ({"sink": SINK.bfloat16()}, {"sink": SINK}),
    ({"dropout_p": 0.4, "training": True, "seed": 11}, {"dropout_p": 0.4, "seed": SEED}),
    ({"dropout_p": 0.4, "training": True, "seed": SEED}, {"dropout_p": 0.4, "seed": SEED}),
    ({"dropout_p": 0.4, "training": False, "seed": 11}, {}),
    ({"dropout_p": 0.0, "seed": 11}, {}),
    ({"dropout_p": 1, "training": True, "seed": -3}, {"dropout_p": 1.0, "seed": torch.tensor(-3)}),
]


@pytest.mark.parametrize(("given", "meant"), SAME)
def test_arguments_are_those_of_the_contract(given, meant):
    inputs = _inputs()
    out, lse = contract(*inputs[:3], **meant)
    assert torch.equal(attention(*inputs[:3], **given), out)
    found = attention(*inputs[:3], return_lse=True, **given)
    assert torch.equal(found[0], out)
    assert torch.equal(found[1], lse)
    assert found[0].transpose(1, 2).is_contiguous()


STARTS = torch.tensor([1, 4, 4, 9])
STARTS_K = torch.tensor([0, 3, 5, 12])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_documents(dtype):
    q, k, v = _rows()
    starts, starts_k = STARTS.to(dtype), STARTS_K.to(dtype)
    meant = {"cu_seqlens_q": STARTS.int(), "cu_seqlens_k": STARTS_K.int(), "max_seqlen_q": 5, "max_seqlen_k": 7}
    out, lse = contract(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), **meant)
    for lengths in ({}, {"max_seqlen_q": 5}, {"max_seqlen_k": 7}):
        found = attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts_k, return_lse=True, **lengths)
        assert found[0].shape == (9, H, D)
        assert found[0].is_contiguous()
        assert torch.equal(found[0], out.squeeze(0).transpose(0, 1))
        assert torch.equal(found[1], lse.squeeze(0))
    more = {"max_seqlen_q": 30, "max_seqlen_k": 40}
    longer = attention(q.double(), k.double(), v.double(), cu_seqlens_q=starts, cu_seqlens_k=starts_k, **more)
    testing.assert_within_budget(out.squeeze(0).transpose(0, 1), longer, longer.float())
    for lengths in ({}, {"max_seqlen_q": 5}, {"max_seqlen_q": 5, "max_seqlen_k": 5}):
        both = attention(q, k[:9], v[:9], cu_seqlens=starts, **lengths)
        apart = attention(q, k[:9], v[:9], cu_seqlens_q=starts, cu_seqlens_k=starts)
        assert torch.equal(both, apart)


def test_documents_are_sequences_of_their_own():
    """With everything that depends on the place of a query."""
    q, k, v = _rows()
    options = {"is_causal": True, "window": (2, None), "alignment": "bottom_right", "alibi_slopes": SLOPES}
    out, lse = attention(q, k, v, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS_K, return_lse=True, **options)
    for d in range(3):
        rows, keys = slice(*STARTS[d : d + 2].tolist()), slice(*STARTS_K[d : d + 2].tolist())
        one = (x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[keys], v[keys]))
        alone, level = attention(*one, return_lse=True, **options)
        testing.assert_within_budget(out[rows].transpose(0, 1).unsqueeze(0), alone.double(), alone.double())
        testing.assert_within_budget(lse[:, rows].unsqueeze(0), level.double(), level.double())
    assert (out[0] == 0).all()
    assert (lse[:, 0] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_of_everything(dtype):
    inputs = _inputs(dtype, requires_grad=True)
    bias, sink = BIAS.to(dtype).requires_grad_(), SINK.double().requires_grad_()
    out, lse = attention(*inputs[:3], bias=bias, sink=sink, softcap=2.0, return_lse=True)
    leaves = [*inputs[:3], bias, sink]
    grads = torch.autograd.grad((out.float().sum(), lse.sum()), leaves)
    for x, grad in zip(leaves, grads, strict=True):
        assert grad.dtype == x.dtype
        assert grad.shape == x.shape
        assert (grad != 0).any()


def _dense_sums(q, k, mask, sink, scale=D**-0.5):
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * scale
    scores = torch.cat((scores.masked_fill(~mask, -torch.inf), sink.view(-1, 1, 1).expand(B, H, M, 1)), 3)
    return scores.softmax(3)[..., :-1].sum(2)


def test_column_sums():
    inputs = _inputs(torch.float64, requires_grad=True)
    sink = SINK.double().requires_grad_()
    more = {"keep": MASK, "sink": sink, "column_sums": True, "dropout_p": 0.5, "training": True}
    _, sums = attention(*inputs[:3], **more)
    assert len(attention(*inputs[:3], return_lse=True, **more)) == 3
    assert sums.shape == (B, H, N)
    leaves = (*inputs[:2], sink)
    grad = torch.linspace(-1, 1, sums.numel(), dtype=torch.float64).view(sums.shape)
    found = [sums.detach(), *torch.autograd.grad(sums, leaves, grad)]
    results = []
    for dtype in (torch.float64, torch.float32):
        q, k, s = (testing.cast(x, dtype) for x in leaves)
        sums = _dense_sums(q, k, MASK, s)
        results.append([sums.detach(), *torch.autograd.grad(sums, (q, k, s), grad.to(dtype))])
    for x, exact, own in zip(found, *results, strict=True):
        # Judged as if in float32: what is meant, not how exactly it is computed.
        testing.assert_within_budget(x.float(), exact, own)


def test_column_sums_of_documents():
    q, k, v = _rows()
    _, lse, sums = attention(
        q, k, v, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS_K, is_causal=True, return_lse=True, column_sums=True
    )
    assert sums.shape == (H, 12)
    read = (lse != -torch.inf).sum(1).to(sums)
    testing.assert_within_budget(sums.sum(1), read.double(), read + read * torch.finfo(read.dtype).eps)


def test_dropout_is_reproducible():
    inputs = _inputs()
    more = {"dropout_p": 0.5, "training": True}
    torch.manual_seed(5)
    first, second = attention(*inputs[:3], **more), attention(*inputs[:3], **more)
    torch.manual_seed(5)
    again = attention(*inputs[:3], **more)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(attention(*inputs[:3], seed=1, **more), attention(*inputs[:3], seed=2, **more))
    before = torch.get_rng_state()
    attention(*inputs[:3], dropout_p=0.5, training=False)
    attention(*inputs[:3], seed=1, **more)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast():
    inputs = _inputs(requires_grad=True)
    low = [x.detach().bfloat16() for x in inputs[:3]]
    expected = attention(*low, bias=BIAS.bfloat16(), sink=SINK, return_lse=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(*inputs[:3], bias=BIAS, sink=SINK, return_lse=True)
        double = attention(*(x.double() for x in inputs[:3]))
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert double.dtype == torch.float64
    assert torch.equal(double, attention(*(x.double() for x in inputs[:3])))
    (grad,) = torch.autograd.grad(found[0].float().sum(), inputs.q)
    assert grad.dtype == torch.float32


WRONG = [
    ({"q": [1.0]}, TypeError, "q: expected a Tensor, got list"),
    ({"q": torch.zeros(3, 4, 8)}, ValueError, r"q: expected 4 dimensions \(B, heads, length, size\), got \(3, 4, 8\)"),
    ({"q": torch.zeros(B, 3, M, D)}, ValueError, r"k: expected shape"),
    ({"q": torch.zeros(B, H, M, 0), "k": torch.zeros(B, 2, N, 0)}, ValueError, "head sizes from 1 to 512"),
    ({"alignment": "right"}, ValueError, "alignment: expected 'top_left' or 'bottom_right', got 'right'"),
    ({"window": -1}, ValueError, "window: expected at least 0, or None for no bound, got -1"),
    ({"window": (2, -3)}, ValueError, r"window: expected at least 0, .* got \(2, -3\)"),
    ({"window": (1, 2, 3)}, TypeError, r"window: expected an integer, a pair .* got \(1, 2, 3\)"),
    ({"window": True}, TypeError, "window: .* got True"),
    ({"window": 2.0}, TypeError, r"window: .* got 2\.0"),
    ({"keep": MASK, "drop": MASK}, ValueError, "keep, drop: expected at most one of the two, got both"),
    ({"keep": MASK.float()}, TypeError, r"keep: expected torch\.bool, got torch\.float32"),
    ({"drop": MASK.int()}, TypeError, r"drop: expected torch\.bool, got torch\.int32"),
    ({"drop": True}, TypeError, "drop: expected a Tensor or None, got bool"),
    ({"keep": MASK[..., 1:]}, ValueError, r"keep: .* broadcast to \(2, 4, 5, 7\), got \(2, 1, 5, 6\)"),
    ({"bias": BIAS[None, None]}, ValueError, r"bias: .* broadcast to \(2, 4, 5, 7\), got \(1, 1, 4, 5, 7\)"),
    ({"bias": BIAS.half()}, TypeError, r"bias: expected torch\.float32, got torch\.float16"),
    ({"key_lengths": [1, 2]}, TypeError, "key_lengths: expected a Tensor or None, got list"),
    ({"key_lengths": LENGTHS.float()}, TypeError, r"key_lengths: expected torch\.int32 or torch\.int64"),
    ({"key_lengths": LENGTHS[:1]}, ValueError, r"key_lengths: expected shape \(2,\), got \(1,\)"),
    ({"key_lengths": LENGTHS + 1}, ValueError, r"key_lengths: expected values from 0 to 7, got \[4, 8\]"),
    ({"key_lengths": LENGTHS - 4}, ValueError, r"key_lengths: .*, got \[-1, 3\]"),
    ({"key_lengths": LENGTHS + 2**32}, ValueError, "key_lengths: expected values from 0 to 7"),
    ({"key_lengths": LENGTHS.to("meta")}, ValueError, "key_lengths: expected on cpu as q, got meta"),
    ({"alibi_slopes": 0.5}, TypeError, "alibi_slopes: expected a Tensor or None, got float"),
    ({"alibi_slopes": SLOPES[1:]}, ValueError, r"alibi_slopes: expected shape \(4,\) or \(2, 4\), got \(3,\)"),
    ({"alibi_slopes": SLOPES.int()}, TypeError, r"alibi_slopes: expected one of .* got torch\.int32"),
    ({"alibi_slopes": SLOPES.clone().requires_grad_()}, ValueError, "alibi_slopes: has no gradient"),
    ({"softcap": -1.0}, ValueError, r"softcap: expected a positive number, or 0 for none, got -1\.0"),
    ({"softcap": torch.nan}, ValueError, "softcap: expected a finite number, got nan"),
    ({"softcap": torch.tensor(1.0)}, TypeError, "softcap: expected a number or None, got Tensor"),
    ({"scale": torch.inf}, ValueError, "scale: expected a finite number, got inf"),
    ({"sink": SINK[1:]}, ValueError, r"sink: expected shape \(4,\), got \(3,\)"),
    ({"sink": 1}, TypeError, "sink: expected a Tensor or None, got int"),
    ({"dropout_p": 0.1}, TypeError, "training: expected True or False, as dropout_p is not 0, got None"),
    ({"dropout_p": 1.1, "training": False}, ValueError, r"dropout_p: .* from 0 to 1, got 1\.1"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p: .* from 0 to 1, got -0\.1"),
    ({"dropout_p": 0.1, "training": True, "seed": 1.5}, TypeError, "seed: expected an integer, a Tensor or None"),
    ({"dropout_p": 0.1, "training": True, "seed": 2**63}, ValueError, "seed: expected an integer of 64 bits"),
    ({"dropout_p": 0.1, "training": True, "seed": SEED.int()}, TypeError, r"seed: expected torch\.int64"),
    ({"dropout_p": 0.1, "training": True, "seed": SEED.view(1)}, ValueError, r"seed: expected shape \(\)"),
    ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q: expected cu_seqlens with it, got 3 alone"),
    ({"cu_seqlens": STARTS}, ValueError, r"q: expected 3 dimensions \(total, heads, size\), with cu_seqlens"),
]


@pytest.mark.parametrize(("wrong", "kind", "text"), WRONG)
def test_errors(wrong, kind, text):
    given = dict(zip("qkv", _inputs()[:3], strict=True))
    with pytest.raises(kind, match=text):
        attention(**given | wrong)


WRONG_DOCUMENTS = [
    ({"cu_seqlens_k": None}, "cu_seqlens_q, cu_seqlens_k: expected both or neither, got one"),
    ({"cu_seqlens": STARTS}, "cu_seqlens: expected it or cu_seqlens_q and cu_seqlens_k, got both"),
    ({"cu_seqlens_q": STARTS.tolist()}, "cu_seqlens_q: expected a Tensor or None, got list"),
    ({"cu_seqlens_q": STARTS.float()}, r"cu_seqlens_q: expected torch\.int32 or torch\.int64, got torch\.float32"),
    ({"cu_seqlens_q": STARTS.view(2, 2)}, r"cu_seqlens_q: expected 1 dimension, got \(2, 2\)"),
    ({"cu_seqlens_q": STARTS[:0]}, "cu_seqlens_q: expected at least 1 element, got none"),
    ({"cu_seqlens_k": STARTS[:2]}, r"cu_seqlens_k: expected shape \(4,\) as cu_seqlens_q, got \(2,\)"),
    ({"cu_seqlens_q": STARTS.flip(0)}, r"cu_seqlens_q: expected to ascend .* at most 9, .*, got \[9, 4, 4, 1\]"),
    ({"cu_seqlens_q": STARTS - 2}, r"cu_seqlens_q: expected to ascend from at least 0 .*, got \[-1, 2, 2, 7\]"),
    ({"cu_seqlens_k": STARTS_K + 1}, r"cu_seqlens_k: .* at most 12, .*, got \[1, 4, 6, 13\]"),
    ({"max_seqlen_q": 4}, r"max_seqlen_q: expected no document of cu_seqlens_q longer than 4, got \[3, 0, 5\]"),
    ({"max_seqlen_k": 6}, r"max_seqlen_k: .* of cu_seqlens_k longer than 6, got \[3, 2, 7\]"),
    ({"max_seqlen_q": -1}, "max_seqlen_q: expected from 0 to 2147483647, got -1"),
    ({"max_seqlen_q": 5.0}, "max_seqlen_q: expected an integer or None, got float"),
    ({"key_lengths": torch.tensor([3, 3, 7])}, r"key_lengths: .* number of keys of each document, got \[3, 3, 7\]"),
    ({"cu_seqlens_q": STARTS.to("meta")}, "cu_seqlens_q: expected on cpu as q, got meta"),
    ({"v": torch.zeros(11, 2, D)}, r"v: expected shape \(12, 2, 'Dv'\) to match k, got \(11, 2, 8\)"),
    ({"k": torch.zeros(12, 3, D)}, r"k: expected shape \(total, Hk, 8\) with Hk a divisor of 4 .*, got \(12, 3, 8\)"),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG_DOCUMENTS)
def test_errors_of_documents(wrong, text):
    given = dict(zip("qkv", _rows(), strict=True)) | {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS_K}
    with pytest.raises((TypeError, ValueError), match=text):
        attention(**given | wrong)


def test_lengths_on_another_device():
    q, k, v = (x.to("meta") for x in _rows())
    starts = STARTS.to("meta")
    with pytest.raises(ValueError, match="max_seqlen_q: the length of the longest document is needed where cu_seqlens"):
        attention(q, k, v, cu_seqlens=starts)


COMPILED = [
    {},
    {"is_causal": True, "alignment": "bottom_right", "window": (3, None), "softcap": 1.5, "alibi_slopes": SLOPES},
    {"key_lengths": LENGTHS, "keep": MASK, "bias": BIAS, "dropout_p": 0.25, "training": True, "seed": 3},
    {"key_lengths": LENGTHS, "dropout_p": 0.25, "training": True, "seed": SEED, "column_sums": True},
]


@pytest.mark.parametrize("options", COMPILED, ids=lambda options: "-".join(options) or "plain")
def test_compiles_without_graph_breaks(options):
    torch._dynamo.reset()
    inputs = _inputs(requires_grad=True)
    sink = SINK.clone().requires_grad_()

    def loss(q, k, v, sink):
        return sum(x.square().sum() for x in attention(q, k, v, sink=sink, return_lse=True, **options))

    leaves = (*inputs[:3], sink)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*leaves), loss(*leaves)
    assert torch.equal(found, expected)
    for x, y in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        # Sums of several gradients may be taken in another order.
        testing.assert_within_budget(x, y.double(), y)


@pytest.mark.parametrize("seed", [3, None])
def test_documents_compile(seed):
    torch._dynamo.reset()
    leaves = _rows(requires_grad=True)
    more = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS_K, "dropout_p": 0.25, "training": True, "seed": seed}

    def run(q, k, v, **options):
        return attention(q, k, v, key_lengths=torch.tensor([2, 0, 5]), return_lse=True, **more, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    most = {"max_seqlen_q": 5, "max_seqlen_k": 7}
    torch.manual_seed(1)
    found = compiled(*leaves, **most)
    torch.manual_seed(1)
    expected = run(*leaves, **most)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    found[0].sum().backward()
    assert all(x.grad is not None for x in leaves)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="max_seqlen_q: the length of the longest document is needed"):
        compiled(*leaves)


def test_what_a_compiled_program_is_given_is_checked():
    torch._dynamo.reset()
    inputs = _inputs()
    compiled = torch.compile(lambda *x, n: attention(*x, key_lengths=n), fullgraph=True, backend="aot_eager")
    compiled(*inputs[:3], n=LENGTHS)
    with pytest.raises(RuntimeError, match="key_lengths: expected values from 0 to the number of keys"):
        compiled(*inputs[:3], n=LENGTHS + 1)
