"""The examples of reinforcement learning: rollouts, losses, the replaced loops, on environments of the test's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import seqkernels
from seqkernels.testing import assert_within_budget, threads

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module(name)


ppo = load("recurrent_ppo")
sb3 = load("sb3_recurrent_ppo")
State = tuple[Tensor, Tensor]


class Episodes:
    """Environments that reset in the step after an episode's last, with episodes of given lengths.

    Row b has episodes of ``lengths[b]`` steps, which fail where ``fails[b]`` and reach a time limit elsewhere. An
    observation holds the row, the episode, the step in it, and 1.
    """

    def __init__(self, lengths: list[int], fails: list[bool]) -> None:
        self.num_envs, self.lengths, self.fails = len(lengths), np.array(lengths), np.array(fails)
        self.single_action_space = SimpleNamespace(n=3)
        self.actions: list[np.ndarray] = []

    def _observation(self) -> np.ndarray:
        columns = (np.arange(self.num_envs), self.episode, self.step_in_episode, np.ones(self.num_envs))
        return np.stack(columns, axis=1).astype(np.float32) / 8

    def reset(self, *, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        self.episode, self.step_in_episode = np.zeros((2, self.num_envs))
        return self._observation(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        assert actions.shape == (self.num_envs,)
        self.actions.append(actions.copy())
        resets = self.step_in_episode == self.lengths
        self.episode += resets
        self.step_in_episode = np.where(resets, 0, self.step_in_episode + 1)
        ends = self.step_in_episode == self.lengths
        reward = np.where(resets, 0, self.step_in_episode).astype(np.float32)
        return self._observation(), reward, ends & self.fails, ends & ~self.fails, {}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 14, "HIDDEN": 8, "MINIBATCHES": 2, "EPOCHS": 2}.items():
        monkeypatch.setattr(ppo, name, value)


def make_run(name: str, updates: int = 1) -> Any:
    return ppo.Run(name, Episodes([3, 5, 20, 1], [True, False, True, False]), updates, seed=0)


#: (lstm, x, (h, c), starts) to output and states.
Process = Callable[[nn.Module, Tensor, State, Tensor], tuple[Tensor, State]]
#: Results of so many draws are judged together: with few elements, torch is too often exact by luck.
DRAWS = 4


def assert_equal_to_loop(
    loop: Process, call: Process, shape: tuple[int, ...], rows: int, layers: int, rate: float
) -> None:
    """`call` on a converted layer is as close to `loop` in float64 as `loop` in float32 is, gradients included.

    The input has the given shape and features, `starts` the shape, the states so many rows and layers.
    """
    parts: dict[str, list[tuple[Tensor, ...]]] = {"outputs": [], "gradients": []}
    for _ in range(DRAWS):
        weights = nn.LSTM(5, 6, layers).state_dict()
        starts = torch.rand(shape) < rate
        drawn = [torch.randn(s) for s in ((*shape, 5), (layers, rows, 6), (layers, rows, 6), (*shape, 6))]
        outputs, gradients = [], []
        for process, dtype in ((call, torch.float32), (loop, torch.float64), (loop, torch.float32)):
            lstm = nn.LSTM(5, 6, layers, dtype=dtype)
            lstm.load_state_dict(weights)
            if process is call:
                seqkernels.convert(lstm)
            x, h, c, grad = (tensor.to(dtype).requires_grad_() for tensor in drawn)
            output, state = process(lstm, x, (h, c), starts)
            outputs.append((output, *state))
            gradients.append(torch.autograd.grad(output, [x, h, c, *lstm.parameters()], grad))
        parts["outputs"] += zip(*outputs, strict=True)
        parts["gradients"] += zip(*gradients, strict=True)
    for what, triples in parts.items():
        scaled = zip(*map(to_one_size, triples), strict=True)
        assert_within_budget(*map(torch.cat, scaled), what)


def to_one_size(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Results flattened and scaled, by a power of two, which rounds nothing, to a size of 1 in the second."""
    largest = results[1].abs().max()
    size = 2 ** largest.log2().ceil() if largest else torch.ones(())
    return [(result / size.to(result.dtype)).flatten() for result in results]


@given(st.integers(1, 12), st.integers(1, 4), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_one_call_is_the_loop(steps: int, batch: int, rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    assert_equal_to_loop(ppo.step_by_step, ppo.one_call, (steps, batch), batch, 1, rate)


def test_the_agent_sees_no_velocity() -> None:
    shown = ppo.observe(np.array([[1, 100, 0.1, 100], [2, -100, 0.2, -100]]))
    torch.testing.assert_close(shown, torch.tensor([[1.0, 1.0], [2.0, 2.0]]), rtol=0, atol=0)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", list(ppo.VARIANTS))
def test_rollout(name: str) -> None:
    run = make_run(name)
    rollout = run.act()
    starts, valid = rollout.starts, rollout.valid
    # Episodes of 3 steps: first step, two more, then a step that only resets.
    assert starts[:, 0].tolist() == [t % 4 == 0 for t in range(14)]
    assert valid[:, 0].tolist() == [t % 4 != 3 for t in range(14)]
    assert starts[:, 2].tolist() == [t == 0 for t in range(14)]
    assert valid[:, 2].all()
    assert starts[:, 3].tolist() == [t % 2 == 0 for t in range(14)]
    assert np.array_equal(rollout.actions.numpy(), np.stack(run.env.actions))
    # Rewards are the number of the step: 1 + 2 + 3, and so on.
    assert sorted(run.scores[0]) == [1.0] * 7 + [6.0] * 3 + [15.0] * 2
    assert run.curve() == [pytest.approx((7 + 18 + 30) / 12, rel=1e-6)]


@pytest.mark.usefixtures("small")
def test_advantages_end_with_their_episode() -> None:
    run = make_run("seqkernels.nn, reset=")
    rollout = run.act()
    values = (rollout.returns - rollout.advantages).double()
    with torch.no_grad():
        after = run.agent(run.observation[None], run.state, run.start[None])[1].double()
    values = torch.cat([values, after])
    for row, (length, fails) in enumerate(zip(run.env.lengths, run.env.fails, strict=True)):
        for t in rollout.valid[:, row].nonzero().flatten().tolist():
            step = t % (length + 1)
            expected, weight = 0.0, 1.0
            for k in range(t, min(14, t - step + length)):
                number = k - t + step + 1
                failed = bool(fails) and number == length
                ahead = 0.0 if failed else float(values[k + 1, row])
                expected += weight * (ppo.REWARD_SCALE * number + ppo.GAMMA * ahead - float(values[k, row]))
                weight *= ppo.GAMMA * ppo.LAMBDA
            assert float(rollout.advantages[t, row]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.usefixtures("small")
def test_both_variants_act_alike_and_have_the_same_loss() -> None:
    theirs, ours = (make_run(name) for name in ppo.VARIANTS)
    rollouts = [theirs.act(), ours.act()]
    for name in ("observations", "starts", "valid", "actions"):
        assert torch.equal(*(getattr(rollout, name) for rollout in rollouts)), name
    own = ppo.loss_of(theirs.agent, rollouts[0])
    found = ppo.loss_of(ours.agent, rollouts[0])
    exact = ppo.loss_of(
        theirs.agent.double(), ppo.Rollout(*(x.double() if x.is_floating_point() else x for x in rollouts[0]))
    )
    assert_within_budget(found, exact, own, "loss")


@pytest.mark.usefixtures("small")
def test_steps_that_only_reset_count_for_nothing() -> None:
    run = make_run("seqkernels.nn, reset=")
    rollout = run.act()
    loss = ppo.loss_of(run.agent, rollout)
    for name in ("advantages", "returns", "log_probs"):
        getattr(rollout, name)[~rollout.valid] = 1e3
    assert torch.equal(ppo.loss_of(run.agent, rollout), loss)


@pytest.mark.usefixtures("small")
def test_training_and_its_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = {name: make_run(name, updates=3) for name in ppo.VARIANTS}
    before = [x.clone() for x in runs["seqkernels.nn, reset="].agent.parameters()]
    ppo.train(runs, 3)
    ppo.report(runs)
    text = capsys.readouterr().out
    for name, run in runs.items():
        assert name in text
        assert len(run.losses) == 3 * 2 * 2
        assert len(run.seconds) == len(run.curve()) == 3
        assert np.isfinite(run.losses).all()
    for x, old in zip(runs["seqkernels.nn, reset="].agent.parameters(), before, strict=True):
        assert not torch.equal(x, old)
    pytest.importorskip("matplotlib")
    ppo.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_training_on_cartpole(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gymnasium")
    ppo.main(["--updates", "2"])
    assert "times as fast" in capsys.readouterr().out


@pytest.mark.parametrize("module", [ppo, sb3], ids=["recurrent_ppo", "sb3_recurrent_ppo"])
@pytest.mark.parametrize("option", ["--updates", "--threads"])
def test_counts_are_checked(module: ModuleType, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.main([option, "0"])
    assert f"{option}: expected at least 1, got 0" in capsys.readouterr().err


def library_loop(features: Tensor, states: State, starts: Tensor, lstm: nn.Module) -> tuple[Tensor, State]:
    """The semantics of sb3-contrib's method: state times one minus the flag, before each step."""
    rows = states[0].size(1)
    outputs = []
    for x, start in zip(
        features.view(rows, -1, lstm.input_size).unbind(1), starts.view(rows, -1).unbind(1), strict=True
    ):
        keep = (1.0 - start).view(1, rows, 1)
        output, states = lstm(x.unsqueeze(0), (keep * states[0], keep * states[1]))
        outputs.append(output[0])
    return torch.stack(outputs, dim=1).flatten(0, 1), states


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 2), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_one_call_is_the_loop_of_the_library(steps: int, rows: int, layers: int, rate: float, seed: int) -> None:
    def process(function: Callable[..., tuple[Tensor, State]]) -> Process:
        return lambda lstm, x, hx, starts: function(x, hx, starts.to(x.dtype), lstm)

    torch.manual_seed(seed)
    assert_equal_to_loop(process(library_loop), process(sb3.one_call), (rows * steps,), rows, layers, rate)


class Policy(nn.Module):
    """The part of sb3-contrib's policy that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm_actor, self.lstm_critic = nn.LSTM(5, 6), nn.LSTM(5, 6)

    _process_sequence = staticmethod(library_loop)


def test_accelerate_keeps_the_parameters() -> None:
    policy, other = Policy(), Policy()
    parameters = dict(policy.named_parameters())
    sb3.accelerate(policy)
    for name, x in policy.named_parameters():
        assert x is parameters[name]
    assert list(policy.state_dict()) == list(other.state_dict())
    assert type(policy.lstm_actor) is type(policy.lstm_critic) is seqkernels.nn.LSTM
    assert policy._process_sequence is sb3.one_call
    assert other._process_sequence is library_loop
    assert type(other.lstm_actor) is nn.LSTM


def test_same_updates_counts_up_to_the_first_difference() -> None:
    def run(*actions: int) -> SimpleNamespace:
        return SimpleNamespace(actions=[np.array([x, 0]) for x in actions])

    assert sb3.same_updates(run(1, 2, 3), run(1, 2, 3)) == 3
    assert sb3.same_updates(run(1, 2, 3), run(1, 4, 3)) == 1
    assert sb3.same_updates(run(1), run(2)) == 0


def test_the_library_with_seqkernels(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sb3_contrib")
    sb3.main(["--updates", "1"])
    assert "Same actions in the first 1 of 1 updates of 256 actions" in capsys.readouterr().out
