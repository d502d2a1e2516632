"""Learn to schedule a network of agents: PPO on `llmsched/AgentNetwork-v0`, held against named disciplines.

    python scripts/train_network.py [NETWORK ...] [--load 0.9] [--seeds 5] [--steps 655360] [--episodes 40]
        [--horizon 300] [--report-horizon 2000] [--route] [--json FILE]

Networks are rybko-stolyar and fork-join unless named. Episodes of a training are short; the report is over
longer ones that no training has seen, the same jobs for all: mean jobs in the system, which by Little's law
is the rate of arrival times the mean latency, with 95 % intervals over episodes and trainings. What grows
without bound shows in "second half / first", of the jobs in the system over the halves of an episode.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import ConvertCallback
from stable_baselines3.common.logger import Logger

from agents.evaluation import FIRST_SEED, VALIDATION_SEED
from agents.ppo import SchedulingPPO
from agents.sb3 import SB3VecEnv
from agents.sb3_policies import MaskablePolicy
from agents.statistics import Bootstrap, difference, mean
from llmsched_env.errors import InputError, exit_with
from llmsched_env.files import writing
from llmsched_env.networks import disciplines, simulate_network

ID = "llmsched/AgentNetwork-v0"
_SEEDS = 2**40  # of training are above it
_OFTEN, _VALIDATION = 2, 16  # updates between validations, and their episodes


def train(network: str, seed: int, options: argparse.Namespace) -> SchedulingPPO:
    """One training; eight lanes share their jobs and are each other's baseline. The best is kept.

    What a choice of classes leads to shows only when queues have built up: a discount or a trace that fades
    sooner teaches exit-first, which is good at once and unstable.
    """
    th.set_num_threads(1)
    th.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (Stable-Baselines3 shuffles with it)
    rng = np.random.default_rng(seed)
    env = SB3VecEnv.make(
        ID,
        64,
        network=network,
        load=options.load,
        horizon_s=options.horizon,
        observation="flat",
        route=options.route,
    )
    venv: Any = env.venv.unwrapped
    rate = 1.0 / (30.0 * venv.time_scale_s)
    steps = 1024
    model = SchedulingPPO(
        MaskablePolicy,
        env,
        discount_rate=rate,
        group=8,
        learning_rate=lambda left: 1e-3 * left,
        n_steps=steps,
        batch_size=4096,
        n_epochs=4,
        gae_lambda=0.999,
        ent_coef=0.03,
        target_kl=0.03,
        policy_kwargs={"net_arch": [64, 64]},
    )
    model.set_logger(Logger(None, []))
    callback = ConvertCallback(None)
    callback.init_callback(model)
    rollout = 64 * steps
    model.begin(_SEEDS + rng.integers(_SEEDS, size=8))
    best, kept = np.inf, model.policy.state_dict()
    for update in range(-(-options.steps // rollout)):
        model._update_current_progress_remaining(update * rollout, options.steps)
        model.collect_rollouts(env, callback, model.rollout_buffer, steps)
        model.train()
        if update % _OFTEN == 0 or (update + 1) * rollout >= options.steps:
            found = play(model, network, options, VALIDATION_SEED, _VALIDATION, 2 * options.horizon).mean()
            if found < best:
                best, kept = found, copy.deepcopy(model.policy.state_dict())
    env.close()
    model.policy.load_state_dict(kept)
    return model


def play(
    model: SchedulingPPO, network: str, options: argparse.Namespace, seed: int, count: int, horizon_s: float
) -> NDArray[np.float64]:
    """(2, count) mean jobs in the system in the halves of each episode, of a policy that does what it thinks
    best."""
    env = episodes(network, options, count, horizon_s)
    half = np.zeros(count)
    seen, _ = env.reset(seed=seed)
    over = np.zeros(count, np.bool_)
    policy: Any = model.policy
    while not over.all():
        with th.no_grad():
            actions = policy.get_distribution(th.as_tensor(seen), env.action_masks()).mode()
        seen, _, terminated, truncated, _ = env.step(actions.numpy())
        early = env.clocks <= 0.5 * horizon_s
        half[early] = env.job_seconds[early]
        over |= terminated | truncated
    return np.stack([half, env.job_seconds - half]) / (0.5 * horizon_s)


def simulate(
    discipline: str, network: str, options: argparse.Namespace, seed: int, count: int
) -> NDArray[np.float64]:
    """What `play` returns, of a discipline, on the same jobs."""
    env = episodes(network, options, count, options.report_horizon)
    env.reset(seed=seed)
    halves = np.zeros((2, count))
    for i, own in enumerate(env.episode_seeds.tolist()):
        for k, until in enumerate((0.5 * options.report_horizon, options.report_horizon)):
            jobs = env.jobs_of(own)
            found = simulate_network(env.network, discipline, jobs=jobs, horizon_s=until, seed=own)
            halves[k, i] = found.mean_jobs * (k + 1)
    halves[1] -= halves[0]
    return halves


def episodes(network: str, options: argparse.Namespace, count: int, horizon_s: float) -> Any:
    """The environments of a validation or the report."""
    return gym.make_vec(
        ID,
        count,
        vectorization_mode="vector_entry_point",
        autoreset_mode="disabled",
        network=network,
        load=options.load,
        horizon_s=horizon_s,
        observation="flat",
        route=options.route,
    ).unwrapped


def report(network: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and print how it compares."""
    trained = []
    for seed in range(options.seeds):
        began = time.perf_counter()
        model = train(network, seed, options)
        trained.append(play(model, network, options, FIRST_SEED, options.episodes, options.report_horizon))
        spent = time.perf_counter() - began
        print(
            f"{network}, seed {seed}: {trained[-1].mean():.2f} jobs in the system, {spent:.0f} s", flush=True
        )
    values: dict[str, NDArray[np.float64]] = {f"PPO, {options.seeds} trainings": np.stack(trained)}
    for name in disciplines.names():
        values[name] = simulate(name, network, options, FIRST_SEED, options.episodes)[None]
    bootstrap, fcfs = Bootstrap(), values["fcfs"].mean(axis=1)
    table = Table(
        "policy",
        "jobs in system",
        "fewer than fcfs by",
        "second half / first",
        title=f"{network}, load {options.load}",
    )
    told = {}
    for name, found in sorted(values.items(), key=lambda item: item[1].mean()):
        jobs = found.mean(axis=1)
        level, gain = bootstrap.estimate(mean, jobs), bootstrap.estimate(difference, fcfs, jobs)
        growth = float(found[:, 1].mean() / found[:, 0].mean())
        table.add_row(
            name,
            f"{level.value:.2f} [{level.low:.2f}, {level.high:.2f}]",
            f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]",
            f"{growth:.2f}",
        )
        told[name] = {"jobs": jobs.tolist(), "growth": growth}
    Console(width=120).print(table)
    return told


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=["rybko-stolyar", "fork-join"], metavar="network")
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=655_360, help="decisions of a training")
    parser.add_argument("--episodes", type=int, default=40, help="of the report")
    parser.add_argument("--horizon", type=float, default=300.0, help="seconds of an episode of a training")
    parser.add_argument("--report-horizon", type=float, default=2000.0, help="likewise of the report")
    parser.add_argument("--route", action="store_true", help="PPO also says where calls go, not the pools")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.seeds < 1:
        raise InputError(f"--seeds must be at least 1, not {options.seeds}")
    told = {}
    for network in options.networks:
        told[network] = report(network, options)
        if options.json:
            with writing(options.json) as path:
                path.write_text(json.dumps(told))
    return 0


if __name__ == "__main__":
    exit_with(main)
