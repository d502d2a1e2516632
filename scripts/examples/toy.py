"""PPO finds the optimum of the scenario `toy`, which is known by hand: with the mask within seconds, and
sooner than without.

    python scripts/examples/toy.py [--seconds 30] [--seeds 3]

All options of the environment are as they come (146 actions, 404 numbers to see) but that observations are
flat. Seconds are those of one core, evaluation not counted, compiled beforehand (on a busy machine they
count for less: decisions stand beside them). What it finds is judged on 256 episodes of seeds that it has not
seen.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any, NamedTuple

import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecNormalize

from agents.evaluation import evaluate
from agents.sb3 import SB3VecEnv
from agents.sb3_policies import MaskablePolicy, Policy
from llmsched_env import scenarios

SETTINGS: dict[str, Any] = {
    "n_steps": 32,
    "batch_size": 1024,
    "n_epochs": 4,
    "learning_rate": 2e-3,
    "gamma": 1.0,  # episodes end, and their mean latency is what counts
    "gae_lambda": 0.95,
}
_MASKED: Any = (MaskablePPO, MaskablePolicy)
_UNMASKED: Any = (PPO, Policy)


def make(num_envs: int, **options: Any) -> VecNormalize:
    """Environments of the toy, observations brought to unit variance: short answers differ in the third
    decimal only."""
    made = SB3VecEnv.make("llmsched/Decision-v0", num_envs, scenario="toy", observation="flat", **options)
    return VecNormalize(made, norm_reward=False)


def mean_latency(model: Any, env: VecNormalize, num_episodes: int = 256, **options: Any) -> float:
    """Mean latency in seconds of what the model does at its best, on seeds that are held out."""
    found = evaluate(
        model,
        num_episodes=num_episodes,
        prepare=env.normalize_obs,
        max_episode_steps=1000,  # an untrained model may preempt for ever
        scenario="toy",
        observation="flat",
        **options,
    )
    return float(found["latency_s"].mean())


class Point(NamedTuple):
    """Of a training: CPU seconds and decisions so far, and the mean latency (s) on held-out seeds."""

    seconds: float
    decisions: int
    latency: float


def train(
    masked: bool, seed: int, seconds: float = math.inf, decisions: float = math.inf, **options: Any
) -> list[Point]:
    """Train for so many CPU seconds or decisions; what was learnt before, and after every second update."""
    algorithm, policy = _MASKED if masked else _UNMASKED
    env = make(256, **options)
    model = algorithm(policy, env, seed=seed, device="cpu", **SETTINGS)
    curve = [Point(0.0, 0, mean_latency(model, env, **options))]
    while curve[-1].seconds < seconds and curve[-1].decisions < decisions:
        start = time.process_time()
        model.learn(2 * env.num_envs * SETTINGS["n_steps"], reset_num_timesteps=False)
        spent = curve[-1].seconds + time.process_time() - start
        curve.append(Point(spent, model.num_timesteps, mean_latency(model, env, **options)))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="CPU seconds of each training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    optimum = scenarios.get("toy").optimum
    assert optimum is not None
    print(f"optimum {optimum:g} s, in order of arrival 36.75 s; mean latency on held-out seeds")
    for masked in (True, False):
        for seed in range(options.seeds):
            curve = train(masked, seed, options.seconds)
            near = next((point for point in curve if point.latency <= 1.02 * optimum), None)
            when = f"after {near.seconds:.1f} s, {near.decisions:,} decisions" if near else "never"
            spent, _, latency = curve[-1]
            above = 100 * (latency / optimum - 1)
            print(
                f"{'masked' if masked else 'unmasked':8s} seed {seed}: untrained {curve[0].latency:.2f} s, "
                f"after {spent:.1f} s {latency:.2f} s, {above:.2f} % above the optimum; "
                f"within 2 % {when}",
                flush=True,
            )


if __name__ == "__main__":
    main()
