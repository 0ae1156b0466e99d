"""Who runs a call, and what is said about it."""

from __future__ import annotations

import contextlib
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import seqkernels
from seqkernels import backends, testing
from seqkernels.backends import Call, native
from seqkernels.ops import attention as attention_ops
from seqkernels.ops.attention import attention
from seqkernels.ops.recurrence import recurrence

CALL = Call("recurrence", "cpu", torch.float32, "lstm")


@pytest.fixture
def fresh(monkeypatch):
    """A registry that remembers no decision, loaded module or warning."""
    for name, kind in (("_decisions", dict), ("_choices", dict), ("_modules", dict), ("_warned", set)):
        monkeypatch.setattr(backends, name, kind())


@pytest.fixture
def alone(fresh, monkeypatch):
    """Nothing but the reference can be used; the others say why."""

    def package(name):
        reason = None if name == "reference" else f"{name} is on holiday"
        return types.SimpleNamespace(unavailable=lambda: reason, unsupported=lambda call: None)

    monkeypatch.setattr(backends, "backend", package)


def _lstm(**options):
    return recurrence(*testing.recurrence_inputs("lstm", 3, 2, 4, **options), cell="lstm")


def test_the_compiled_module_is_there(pure):
    reason = backends.backend("native").unavailable()
    if pure:
        assert "seqkernels._C" in reason
    else:
        assert reason is None, f"{reason} (run with --pure where that is on purpose)"


def test_without_the_compiled_module_numba_is_chosen(compiled):
    assert backends.select(CALL).chosen == ("native" if compiled else "numba")


def test_order():
    assert backends.order(CALL) == ("native", "numba", "reference")
    assert backends.order(CALL._replace(device="meta")) == ("reference",)
    for op, device in backends.PREFERENCE:
        assert backends.order(Call(op, device, torch.float32))[-1] == "reference"


def test_the_first_that_can_run_it_is_chosen(fresh, monkeypatch):
    can = {"native": "no", "numba": None, "reference": None}
    monkeypatch.setattr(backends, "why_not", lambda name, call: can[name])
    decision = backends.select(CALL)
    assert decision == (CALL, "numba", {"native": "no", "numba": None})


def test_nobody_can_run_it(fresh, monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name, call: f"{name} will not")
    with pytest.raises(seqkernels.BackendError, match=r"no backend can run lstm recurrence .*native: native will not"):
        backends.select(CALL)


def test_use_backend_insists(other_backend):
    with seqkernels.use_backend(other_backend):
        assert backends.select(CALL).chosen == other_backend
        assert backends.select(CALL._replace(op="attention", kind="")).chosen == other_backend


def test_use_backend_covers_the_backward_pass(fresh, monkeypatch):
    used = []
    implementation = backends.implementation

    def spy(call):
        used.append(backends.select(call).chosen)
        return implementation(call)

    monkeypatch.setattr(backends, "implementation", spy)
    with seqkernels.use_backend("reference"):
        _lstm()[0].sum().backward()
    assert used == ["reference", "reference"]


def test_use_backend_nests_and_ends():
    before = backends.select(CALL).chosen
    with seqkernels.use_backend("numba"):
        with seqkernels.use_backend("reference"):
            assert backends.select(CALL).chosen == "reference"
        assert backends.select(CALL).chosen == "numba"
    with pytest.raises(ZeroDivisionError), seqkernels.use_backend("reference"):
        raise ZeroDivisionError
    assert backends.select(CALL).chosen == before


def test_use_backend_raises_with_the_reason(alone):
    with seqkernels.use_backend("numba"), pytest.raises(seqkernels.BackendError) as caught:
        _lstm(control=True)
    assert str(caught.value) == (
        "backend 'numba' cannot run lstm recurrence of torch.float32 on cpu with control: numba is on holiday"
    )


def test_a_device_without_kernels(fresh):
    call = CALL._replace(device="meta")
    for name in ("native", "numba"):
        if backends.backend(name).unavailable() is None:
            assert backends.why_not(name, call) == "runs on cpu only, not on meta"


def test_unknown_name():
    with (
        pytest.raises(
            ValueError, match=r"backend: 'cudnn' is not one of 'native', 'numba', 'cuda', 'triton', 'reference'"
        ),
        seqkernels.use_backend("cudnn"),
    ):
        pass


def test_the_slow_choice_warns_once(alone):
    with pytest.warns(UserWarning, match=r"slow reference .* \(native: native is on holiday; numba: numba is"):
        _lstm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _lstm()
    with pytest.warns(UserWarning, match=r"float64"):
        _lstm(dtype=torch.float64)


def test_asking_for_the_reference_does_not_warn(alone):
    with warnings.catch_warnings(), seqkernels.use_backend("reference"):
        warnings.simplefilter("error")
        _lstm()


def test_explain(alone):
    def step():
        _lstm()
        backends.note("dropout of the weights")
        inputs = testing.attention_inputs(kv_heads=1, mask="B11N", bias="1HMN")
        attention(*inputs, is_causal=True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation = seqkernels.explain(step)
    assert str(explanation).splitlines() == [
        "lstm recurrence of torch.float32 on cpu -> reference",
        "  native: native is on holiday",
        "  numba: numba is on holiday",
        "  reference: chosen",
        "not fused: dropout of the weights",
        "attention of torch.float32 on cpu with bias, causal, grouped, mask -> reference",
        "  native: native is on holiday",
        "  numba: numba is on holiday",
        "  reference: chosen",
    ]


def test_explain_with_a_forced_choice():
    with seqkernels.use_backend("reference"):
        (entry,) = seqkernels.explain(_lstm).entries
    assert entry.chosen == "reference"


def test_explain_passes_arguments_and_finds_nothing():
    seen = []
    assert str(seqkernels.explain(lambda *a, **k: seen.append((a, k)), 1, x=2)) == (
        "no operation of seqkernels was called"
    )
    assert seen == [((1,), {"x": 2})]


def test_notes_outside_explain_are_dropped():
    backends.note("nobody listens")
    assert seqkernels.explain(lambda: None).entries == ()


def test_explain_ends_when_the_function_raises():
    with pytest.raises(ZeroDivisionError):
        seqkernels.explain(lambda: 1 / 0)
    assert backends._recorder.get() is None


def test_what_is_insisted_on_is_no_slower_way(monkeypatch):
    """Insisting on the implementation that runs anyway goes the same way, without the dispatcher; on another, not."""
    if native.unavailable() is not None:
        pytest.skip(str(native.unavailable()))
    q, seen, op = torch.randn(1, 1, 3, 8), [], attention_ops.forward_op
    monkeypatch.setattr(attention_ops, "forward_op", lambda *args: seen.append(args) or op(*args))
    for name, calls in (("native", 0), ("reference", 1)):
        with seqkernels.use_backend(name):
            seqkernels.functional.attention(q, q, q)
        assert len(seen) == calls


def _attention() -> torch.Tensor:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    return attention(q, q, q)[0]


def _weights() -> torch.Tensor:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    return seqkernels.functional.attention(q, q, q, column_sums=True)[1]


def _recurrence() -> torch.Tensor:
    return seqkernels.nn.LSTM(4, 4, zoneout=0.1)(torch.randn(3, 2, 4))[0]


def _rotary() -> torch.Tensor:
    return seqkernels.nn.RotaryEmbedding(4)(torch.randn(1, 2, 3, 4, requires_grad=True))


@pytest.mark.parametrize("call", [_attention, _weights, _recurrence, _rotary])
def test_the_backward_pass_in_another_thread_is_covered(call, fresh, monkeypatch):
    """As on a GPU, where autograd has threads of its own, which know nothing of the block."""
    chosen, select = [], backends.select

    def noting(call):
        decision = select(call)
        chosen.append(decision.chosen)
        return decision

    monkeypatch.setattr(backends, "select", noting)
    for within in (None, "numba"):
        with seqkernels.use_backend("reference"):
            out = call()
        chosen.clear()
        outer = contextlib.nullcontext() if within is None else seqkernels.use_backend(within)
        with outer, ThreadPoolExecutor(1) as pool:
            pool.submit(out.sum().backward).result()
        # The thread has a context of its own.
        assert set(chosen) == {"reference"}


def test_the_backward_pass_is_that_of_its_forward_pass(fresh, monkeypatch):
    """On a processor, too, where a block around it could be seen."""
    with seqkernels.use_backend("reference"):
        out = _attention()
    chosen, select = [], backends.select
    monkeypatch.setattr(backends, "select", lambda call: chosen.append(found := select(call)) or found)
    with seqkernels.use_backend("numba"):
        out.sum().backward()
    assert [decision.chosen for decision in chosen] == ["reference"]


def test_one_that_hesitates_runs_only_when_asked(fresh, monkeypatch):
    def package(name):
        why = {"numba": lambda call: "nobody has measured it"}.get(name, lambda call: None)
        return types.SimpleNamespace(unavailable=lambda: None, unsupported=lambda call: None, not_by_default=why)

    monkeypatch.setattr(backends, "backend", package)
    monkeypatch.setattr(backends, "order", lambda call: ("numba", "reference"))
    with pytest.warns(UserWarning, match="numba: nobody has measured it"):
        decision = backends.select(CALL)
    assert decision.chosen == backends.choice(CALL) == "reference"
    assert decision.reasons["numba"] == "nobody has measured it"
    assert "numba: nobody has measured it" in str(backends.Explanation((decision,)))
    with seqkernels.use_backend("numba"):
        assert backends.select(CALL).chosen == backends.choice(CALL) == "numba"


def test_a_choice_is_made_once(fresh, monkeypatch):
    """It is asked for before each call of layers on a GPU; only where nothing can run the call it may change."""
    asked, reasons = [], {"reference": "not yet"}

    def package(name):
        return types.SimpleNamespace(unavailable=lambda: reasons.get(name), unsupported=asked.append)

    monkeypatch.setattr(backends, "backend", package)
    monkeypatch.setattr(backends, "order", lambda call: ("reference",))
    assert backends.choice(CALL) is None
    reasons.clear()
    assert [backends.choice(CALL) for _ in range(3)] == ["reference"] * 3
    assert asked == [CALL]
    with seqkernels.use_backend("numba"):
        assert backends.choice(CALL) == "numba"


def test_how_a_call_is_served_is_explained(fresh, monkeypatch):
    def package(name):
        how = lambda call: f"{call.hidden} units"  # noqa: E731
        return types.SimpleNamespace(unavailable=lambda: None, unsupported=lambda call: None, detail=how)

    monkeypatch.setattr(backends, "backend", package)
    decision = backends.select(CALL._replace(hidden=3))
    assert "native: chosen, 3 units" in str(backends.Explanation((decision,)))
