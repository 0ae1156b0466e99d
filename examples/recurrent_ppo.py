"""Recurrent PPO on a CartPole without velocities: its LSTM run step by step by torch, and in one call with ``reset=``.

Episodes end inside a rollout, and the state is zeroed where the next one begins. With ``torch.nn`` that takes a Python
loop over the steps; with `seqkernels.nn` it is an argument of the layer. Both agents start from the same weights and
draw from the same seeds; their updates alternate, so that whatever else the machine does slows both. After CleanRL's
``ppo_atari_lstm.py``; PPO is https://arxiv.org/abs/1707.06347.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import seqkernels

STEPS, ENVS, HIDDEN, EPOCHS, MINIBATCHES = 128, 16, 64, 4, 4
RATE, GAMMA, LAMBDA, CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT, MAX_NORM = 2e-3, 0.99, 0.95, 0.2, 0.5, 0.005, 0.5
#: Brings returns near 1: the gradient of the values would otherwise take up all of `MAX_NORM`.
REWARD_SCALE = 0.05
State = tuple[Tensor, Tensor]


def step_by_step(lstm: nn.Module, x: Tensor, hx: State, starts: Tensor) -> tuple[Tensor, State]:
    """The loop of today's libraries: `lstm` over `x` (T, B, I), its state zeroed where `starts` (T, B) is true."""
    outputs = []
    for x_t, start in zip(x, starts, strict=True):
        keep = 1.0 - start.to(x.dtype).view(1, -1, 1)
        output, hx = lstm(x_t.unsqueeze(0), (keep * hx[0], keep * hx[1]))
        outputs.append(output)
    return torch.cat(outputs), hx


def one_call(lstm: nn.Module, x: Tensor, hx: State, starts: Tensor) -> tuple[Tensor, State]:
    """The same by one call of a layer of `seqkernels.nn`."""
    return lstm(x, hx, reset=starts)


VARIANTS = {"torch.nn, step by step": (nn.LSTM, step_by_step), "seqkernels.nn, reset=": (seqkernels.nn.LSTM, one_call)}


class Agent(nn.Module):
    """Policy and value of what was observed so far: encoder, LSTM, heads; `name` is a key of `VARIANTS`."""

    def __init__(self, name: str, observation_size: int, actions: int) -> None:
        super().__init__()
        layer, self.unroll = VARIANTS[name]
        self.encoder = nn.Sequential(nn.Linear(observation_size, HIDDEN), nn.Tanh())
        self.lstm = layer(HIDDEN, HIDDEN)
        self.policy, self.value = nn.Linear(HIDDEN, actions), nn.Linear(HIDDEN, 1)
        nn.init.orthogonal_(self.policy.weight, 0.01)

    def forward(self, observations: Tensor, hx: State, starts: Tensor) -> tuple[Tensor, Tensor, State]:
        """Log-probabilities (T, B, A), values (T, B) and the state after `observations` (T, B, O)."""
        output, hx = self.unroll(self.lstm, self.encoder(observations), hx, starts)
        return self.policy(output).log_softmax(-1), self.value(output).squeeze(-1), hx


class Rollout(NamedTuple):
    """T steps of B environments, (T, B, ...), and the state before them, (1, B, H).

    `starts` marks observations that open an episode; `valid` is false where a step only reset the environment.
    """

    observations: Tensor
    starts: Tensor
    valid: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    h: Tensor
    c: Tensor


class Run:
    """One of the trainings: agent, vectorised environments that reset in the step after an episode's end, outcome."""

    def __init__(self, name: str, env: Any, updates: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.env, self.random = env, torch.Generator().manual_seed(seed)
        self.observation = observe(env.reset(seed=seed)[0])
        self.agent = Agent(name, self.observation.size(1), int(env.single_action_space.n))
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=RATE, eps=1e-5)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, updates)
        batch = env.num_envs
        self.start, self.ended = torch.ones(batch, dtype=torch.bool), torch.zeros(batch, dtype=torch.bool)
        self.state: State = (torch.zeros(1, batch, HIDDEN), torch.zeros(1, batch, HIDDEN))
        self.score = torch.zeros(batch)
        self.losses: list[float] = []
        self.scores: list[list[float]] = []
        self.seconds: list[tuple[float, float]] = []

    def curve(self) -> list[float]:
        """Mean return of the last 30 episodes, after each update; NaN before the first has ended."""
        ends = [sum(map(len, self.scores[: i + 1])) for i in range(len(self.scores))]
        flat = torch.tensor([score for scores in self.scores for score in scores])
        return [flat[max(0, end - 30) : end].mean().item() for end in ends]

    def update(self) -> None:
        """Act for `STEPS` steps, then learn from them."""
        begin = time.perf_counter()
        rollout = self.act()
        middle = time.perf_counter()
        self.learn(rollout)
        self.seconds.append((middle - begin, time.perf_counter() - middle))

    @torch.no_grad()
    def act(self) -> Rollout:
        """A rollout with generalised advantages, https://arxiv.org/abs/1506.02438; a time limit is not a failure."""
        state, kept, scores = self.state, [], []
        for _ in range(STEPS):
            observation, start, valid = self.observation, self.start, ~self.ended
            log_probs, value, self.state = self.agent(observation[None], self.state, start[None])
            action = torch.multinomial(log_probs[0].exp(), 1, generator=self.random)
            following, reward, failed, cut, _ = self.env.step(action.squeeze(1).numpy())
            reward, failed, cut = map(torch.tensor, (reward, failed, cut))
            # The step after the last of an episode returns the first observation of the next one.
            self.observation, self.start, self.ended = observe(following), self.ended, failed | cut
            self.score += reward
            scores += self.score[self.ended].tolist()
            self.score[self.ended] = 0.0
            log_prob = log_probs[0].gather(1, action).squeeze(1)
            kept.append((observation, start, valid, action.squeeze(1), log_prob, value[0], reward, failed, self.ended))
        self.scores.append(scores)
        columns = [torch.stack(column) for column in zip(*kept, strict=True)]
        values, rewards, failed, ended = columns[5:]
        last = self.agent(self.observation[None], self.state, self.start[None])[1]
        errors = REWARD_SCALE * rewards + GAMMA * torch.cat([values[1:], last]) * ~failed - values
        advantages = torch.zeros_like(errors)
        ahead = torch.zeros_like(errors[0])
        for t in reversed(range(STEPS)):
            advantages[t] = ahead = errors[t] + GAMMA * LAMBDA * ahead * ~ended[t]
        return Rollout._make([*columns[:5], advantages, advantages + values, *state])

    def learn(self, rollout: Rollout) -> None:
        """`EPOCHS` passes over the rollout in minibatches of whole environments, from the state it began with."""
        batch = rollout.starts.size(1)
        for _ in range(EPOCHS):
            for rows in torch.randperm(batch, generator=self.random).chunk(MINIBATCHES):
                loss = loss_of(self.agent, Rollout._make(x[:, rows] for x in rollout))
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.agent.parameters(), MAX_NORM)
                self.optimizer.step()
                self.losses.append(loss.item())
        self.schedule.step()


def observe(observation: Any) -> Tensor:
    """What the agent sees of CartPole: position and angle, scaled, without their velocities; (B, 4) to (B, 2)."""
    return torch.as_tensor(observation, dtype=torch.float32)[:, ::2] * torch.tensor([1.0, 10.0])


def loss_of(agent: Agent, rollout: Rollout) -> Tensor:
    """PPO's clipped objective, the error of the values and the entropy."""
    log_probs, values, _ = agent(rollout.observations, (rollout.h, rollout.c), rollout.starts)
    valid = rollout.valid
    log_prob = log_probs.gather(2, rollout.actions[..., None]).squeeze(2)
    ratio = (log_prob - rollout.log_probs)[valid].exp()
    advantages = rollout.advantages[valid]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    error = (values - rollout.returns)[valid].square().mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1)[valid].mean()
    return VALUE_WEIGHT * error - gain - ENTROPY_WEIGHT * entropy


def train(runs: dict[str, Run], updates: int) -> None:
    """Train all runs, update by update in turn."""
    bar = tqdm(range(updates), unit="update")
    for number in bar:
        for run in list(runs.values())[:: 1 if number % 2 == 0 else -1]:
            run.update()
        bar.set_postfix({name: f"{run.curve()[-1]:.0f}" for name, run in runs.items()})


def report(runs: dict[str, Run]) -> None:
    """Print what both trainings took and reached."""
    print(
        f"{'':24}{'s acting':>10}{'s learning':>12}{'steps/s':>9}{'learning steps/s':>18}{'mean return at the end':>24}"
    )
    speeds = []
    for name, run in runs.items():
        acting, learning = map(sum, zip(*run.seconds, strict=True))
        steps = len(run.seconds) * STEPS * run.env.num_envs
        speeds.append((steps / (acting + learning), EPOCHS * steps / learning))
        columns = f"{acting:>10.2f}{learning:>12.2f}{speeds[-1][0]:>9.0f}{speeds[-1][1]:>18.0f}"
        print(f"{name:24}{columns}{run.curve()[-1]:>24.1f}")
    print(f"{'times as fast':46}{speeds[1][0] / speeds[0][0]:>9.2f}{speeds[1][1] / speeds[0][1]:>18.2f}")
    theirs, ours = (run.losses[0] for run in runs.values())
    print(f"From the same weights and seed, the first losses are {theirs:.9f} and {ours:.9f}.")


def draw(runs: dict[str, Run], path: Path) -> None:
    """Draw both learning curves, against steps and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for style, (name, run) in zip(("-", "--"), runs.items(), strict=True):
        numbers = torch.arange(1, len(run.seconds) + 1)
        panels[0].plot(numbers * STEPS * run.env.num_envs, run.curve(), style, label=name)
        panels[1].plot(torch.tensor(run.seconds).sum(1).cumsum(0), run.curve(), style, label=name)
    panels[0].set(xlabel="steps of the environments", ylabel="mean return of the last 30 episodes")
    panels[1].set(xlabel="seconds")
    panels[1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Train with both layers and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=50, help=f"of {ENVS} x {STEPS} steps each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw the learning curves into this file")
    options = parser.parse_args(arguments)
    for name in ("updates", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    import gymnasium

    torch.set_num_threads(options.threads)
    print(f"{options.updates} updates of {ENVS} x {STEPS} steps, {HIDDEN} features, {options.threads} threads")
    runs = {}
    for name in VARIANTS:
        runs[name] = Run(name, gymnasium.make_vec("CartPole-v1", ENVS), options.updates, options.seed)
    train(runs, options.updates)
    report(runs)
    if options.plot is not None:
        draw(runs, options.plot)
        print(f"Learning curves: {options.plot}")


if __name__ == "__main__":
    main()
