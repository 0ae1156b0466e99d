"""sb3-contrib's ``RecurrentPPO`` as it is, and with its LSTMs converted and its loop over time replaced by one call.

Two lines change an existing model, `accelerate`; seeds, weights, buffers and the algorithm are the library's. Both
models see the same random numbers, and their updates alternate, so that whatever else the machine does slows both. The
task is CartPole without velocities, with the sizes that RL Zoo has for it, at a constant learning rate.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import seqkernels
from seqkernels.nn import LSTM

ENVS, STEPS = 8, 32
SETTINGS = {
    "n_steps": STEPS,
    "batch_size": 256,
    "n_epochs": 20,
    "gae_lambda": 0.8,
    "gamma": 0.98,
    "learning_rate": 1e-3,
}
LOSSES = ("policy_gradient_loss", "value_loss", "entropy_loss", "loss")
State = tuple[Tensor, Tensor]


def one_call(features: Tensor, lstm_states: State, episode_starts: Tensor, lstm: LSTM) -> tuple[Tensor, State]:
    """What ``RecurrentActorCriticPolicy._process_sequence`` computes, without its loop over time.

    Args:
        features: (N*T, I), the steps of N sequences of T one after another.
        lstm_states: hidden and cell state (L, N, H) before the first step of each sequence.
        episode_starts: (N*T,), 1.0 where an episode begins, else 0.0.
        lstm: over time first, with L layers and H features.

    Returns:
        The output (N*T, H) in the order of `features`, and the states after the last step.
    """
    rows = lstm_states[0].size(1)
    sequences = features.reshape(rows, -1, lstm.input_size).transpose(0, 1)
    reset = episode_starts.reshape(rows, -1).transpose(0, 1) != 0
    output, lstm_states = lstm(sequences, lstm_states, reset=reset)
    return output.transpose(0, 1).flatten(0, 1), lstm_states


def accelerate(policy: Any) -> None:
    """Give a ``RecurrentActorCriticPolicy`` the layers of seqkernels and `one_call`; its parameters stay the same."""
    seqkernels.convert(policy)
    policy._process_sequence = one_call


class Run:
    """One of the two trainings: a model of ``RecurrentPPO``, and what each of its updates gave.

    Args:
        model: not trained yet, its random numbers just seeded.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        _, self.callback = model._setup_learn(total_timesteps=0)
        self.random = torch.get_rng_state(), np.random.get_state()
        self.actions: list[np.ndarray] = []
        self.losses: list[dict[str, float]] = []
        self.seconds: list[tuple[float, float]] = []

    def update(self) -> None:
        """Collect a rollout and train on it, with the random numbers that this run would see alone."""
        torch.set_rng_state(self.random[0])
        np.random.set_state(self.random[1])
        begin = time.perf_counter()
        self.model.collect_rollouts(self.model.env, self.callback, self.model.rollout_buffer, self.model.n_steps)
        self.actions.append(self.model.rollout_buffer.actions.copy())
        middle = time.perf_counter()
        self.model.train()
        self.seconds.append((middle - begin, time.perf_counter() - middle))
        logged = self.model.logger.name_to_value
        self.losses.append({name: float(logged[f"train/{name}"]) for name in LOSSES})
        self.random = torch.get_rng_state(), np.random.get_state()

    def score(self) -> float:
        """Mean return of the last 100 episodes."""
        return float(np.mean([episode["r"] for episode in self.model.ep_info_buffer]))


def same_updates(theirs: Run, ours: Run) -> int:
    """How many updates pass until the actions of both runs differ for the first time."""
    equal = [np.array_equal(a, b) for a, b in zip(theirs.actions, ours.actions, strict=True)]
    return equal.index(False) if False in equal else len(equal)


@torch.no_grad()
def gaps_at_equal_weights(theirs: Run, ours: Run) -> list[tuple[float, float]]:
    """Largest difference and size of values and log-probabilities on the last rollout, with the weights of `ours`."""
    theirs.model.policy.load_state_dict(ours.model.policy.state_dict())
    data = next(ours.model.rollout_buffer.get())
    inputs = data.observations, data.actions.long().flatten(), data.lstm_states, data.episode_starts
    pairs = zip(*(run.model.policy.evaluate_actions(*inputs)[:2] for run in (theirs, ours)), strict=True)
    rows = ((a.flatten()[data.mask > 0], b.flatten()[data.mask > 0]) for a, b in pairs)
    return [((a - b).abs().max().item(), a.abs().max().item()) for a, b in rows]


def make_model(seed: int) -> Any:
    """A ``RecurrentPPO`` on `ENVS` CartPoles that show position and angle only."""
    from gymnasium import spaces
    from gymnasium.wrappers import TransformObservation
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    def hide_velocities(env: Any) -> Any:
        space = env.observation_space
        return TransformObservation(env, lambda x: x[::2], spaces.Box(space.low[::2], space.high[::2]))

    env = make_vec_env("CartPole-v1", ENVS, wrapper_class=hide_velocities)
    return RecurrentPPO("MlpLstmPolicy", env, seed=seed, device="cpu", **SETTINGS)


def report(theirs: Run, ours: Run) -> None:
    """Print what both took, and how equal they were."""
    print(f"{'':24}{'s collecting':>13}{'s training':>12}{'s':>8}{'steps/s':>9}{'mean return at the end':>24}")
    rows = []
    for name, run in (("sb3-contrib", theirs), ("with seqkernels", ours)):
        collecting, training = map(sum, zip(*run.seconds, strict=True))
        rows.append((collecting, training, collecting + training))
        speed = run.model.num_timesteps / rows[-1][2]
        print(f"{name:24}{collecting:>13.2f}{training:>12.2f}{rows[-1][2]:>8.2f}{speed:>9.0f}{run.score():>24.1f}")
    collecting, training, both = (a / b for a, b in zip(*rows, strict=True))
    print(f"{'times as fast':24}{collecting:>13.2f}{training:>12.2f}{both:>8.2f}")
    same, count = same_updates(theirs, ours), len(ours.actions)
    print(f"Same actions in the first {same} of {count} updates of {ours.actions[0].size} actions.")
    for name in LOSSES:
        a, b = theirs.losses[0][name], ours.losses[0][name]
        print(f"  first update, {name:22}{a:>14.8f} and {b:.8f}, difference {abs(a - b):.1e}")
    for name, (gap, size) in zip(("values", "log-probabilities"), gaps_at_equal_weights(theirs, ours), strict=True):
        print(f"  equal weights after training, {name} of up to {size:.3g}: differ by at most {gap:.1e}")


def main(arguments: list[str] | None = None) -> None:
    """Train both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=50, help=f"of {ENVS} x {STEPS} steps each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("updates", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    theirs = Run(make_model(options.seed))
    model = make_model(options.seed)
    accelerate(model.policy)
    ours = Run(model)
    print(f"{model.policy.lstm_actor}, one for the actor and one for the critic; {options.threads} threads")
    for number in tqdm(range(options.updates), unit="update"):
        for run in (theirs, ours) if number % 2 == 0 else (ours, theirs):
            run.update()
    report(theirs, ours)


if __name__ == "__main__":
    main()
