"""How fast the environments are: decisions per CPU-second and per second, and training through the adapter.

    python scripts/bench_env.py [--repeats 5] [--steps 1000] [--no-training] [--json]

Everything is warmed up first; a figure is the median over the repeats. CPU seconds are those of all threads
of the process (`time.process_time`): what repeats on a shared machine; wall time stands beside them.

Environments: observations of 16 waiting and 16 running slots, masks and rewards included, and all that
Gymnasium asks of a step; episodes that end are drawn anew within it. Actions are random legal ones. They are
drawn before, by a compiled sampler that reads only the mask, in a pass of its own from the same seeds, and
then given again: so that the sampler's time is not in the figures. A third of that pass is left out of what
is timed: until then the environments, which all begin empty, have filled. The time of CartPole, scalar and as
Gymnasium's own vector environment, is taken in the same way in the same run.

Training: Stable-Baselines3's PPO and sb3-contrib's MaskablePPO, networks of 64x64, 256 environments, 128
steps of each per update, on one thread of PyTorch. Its other defaults suit one environment: 64 transitions a
minibatch, taken 10 times. Here a minibatch has 4,096 (an eighth of what is collected), taken once or 4 times.
"own" policies are SB3's, "quick" ones those of agents/sb3_policies.py, the same networks with a quicker
distribution. "free" is the same training with an environment that costs nothing: what SB3 allows.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numba
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

import llmsched_env.envs  # noqa: F401  (registers the ids)

IDS = ("llmsched/Decision-v0", "llmsched/Batch-v0", "llmsched/Dispatch-v0")
SCENARIO = "azure-conv"
WINDOW: dict[str, Any] = {"waiting_slots": 16, "running_slots": 16}
SMALL: dict[str, Any] = {"waiting_slots": 4, "running_slots": 4, "chunk_levels": (256,)}
NUM_ENVS, STEPS_PER_UPDATE, BATCH = 256, 128, 4096


def clock(work: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds and wall seconds of some work."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def rates(count: int, work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """How many are done per CPU-second, and per second: the medians."""
    cpu, wall = zip(*[clock(work) for _ in range(repeats)], strict=True)
    return count / statistics.median(cpu), count / statistics.median(wall)


# ---------------------------------------------------------------------- environments


@numba.njit(cache=True)
def sample(masks: Any, parts: Any, state: Any, actions: Any) -> None:
    """A random legal choice for each part of each action."""
    for i in range(masks.shape[0]):
        first = 0
        for j in range(len(parts)):
            count = 0
            for k in range(first, first + parts[j]):
                count += masks[i, k]
            state[0] ^= state[0] << np.uint64(13)
            state[0] ^= state[0] >> np.uint64(7)
            state[0] ^= state[0] << np.uint64(17)
            left = np.int64((state[0] >> np.uint64(33)) % np.uint64(count))
            k = first
            while masks[i, k] == 0 or left > 0:
                left -= masks[i, k]
                k += 1
            actions[i, j] = k - first
            first += parts[j]


def parts_of(space: gym.Space[Any]) -> NDArray[np.int64]:
    """Numbers of the mask for each part of an action."""
    if isinstance(space, gym.spaces.MultiDiscrete):
        return space.nvec.astype(np.int64)
    assert isinstance(space, gym.spaces.Discrete)
    return np.array([space.n], np.int64)


def vector(env_id: str, num_envs: int, threads: int, steps: int, repeats: int) -> dict[str, Any]:
    """Decisions of a native vector environment."""
    env: Any = gym.make_vec(
        env_id,
        num_envs,
        vectorization_mode="vector_entry_point",
        scenario=SCENARIO,
        copy=False,
        num_threads=threads,
        **WINDOW,
    ).unwrapped
    parts, state = parts_of(env.single_action_space), np.full(1, 88172645463325252, np.uint64)
    warm = steps // 2
    script = np.zeros((warm + steps, num_envs, len(parts)), np.int64)
    env.reset(seed=0)
    ended = 0
    for actions in script:
        sample(env.action_masks().view(np.uint8), parts, state, actions)
        _, _, terminated, truncated, _ = env.step(actions.reshape(env.action_space.shape))
        ended += int(np.count_nonzero(terminated | truncated))
    script = script.reshape((len(script), *env.action_space.shape))
    seconds = []
    for _ in range(repeats):
        env.reset(seed=0)
        for actions in script[:warm]:
            env.step(actions)

        def work() -> None:
            for actions in script[warm:]:
                env.step(actions)

        seconds.append(clock(work))
    env.close()
    cpu, wall = (statistics.median(times) for times in zip(*seconds, strict=True))
    return {
        "decisions_per_cpu_s": num_envs * steps / cpu,
        "decisions_per_s": num_envs * steps / wall,
        "num_envs": num_envs,
        "threads": threads,
        "episodes_ended": ended,
    }


def scalar(env_id: str, steps: int, repeats: int) -> dict[str, float]:
    """Steps of the environment that `gym.make` gives."""
    env = gym.make(env_id, scenario=SCENARIO, **WINDOW)
    parts, state = parts_of(env.action_space), np.full(1, 88172645463325252, np.uint64)
    masks: Callable[[], NDArray[np.bool_]] = env.get_wrapper_attr("action_masks")
    given, script = np.zeros((1, len(parts)), np.int64), []
    env.reset(seed=0)
    for _ in range(steps):
        sample(masks().view(np.uint8)[None], parts, state, given)
        action: Any = (
            int(given[0, 0]) if isinstance(env.action_space, gym.spaces.Discrete) else given[0].copy()
        )
        script.append(action)
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    cpu, wall = rates(steps, lambda: play(env, script), repeats)
    return {"scalar_steps_per_cpu_s": cpu, "scalar_steps_per_s": wall}


def play(env: gym.Env[Any, Any], script: list[Any]) -> None:
    """Take these actions from the beginning."""
    env.reset(seed=0)
    step, reset = env.step, env.reset
    for action in script:
        _, _, terminated, truncated, _ = step(action)
        if terminated or truncated:
            reset()


def cartpole(steps: int, repeats: int) -> dict[str, float]:
    """Gymnasium's own environment, for comparison."""
    rng = np.random.default_rng(0)
    env = gym.make("CartPole-v1")
    script = rng.integers(0, 2, 20 * steps).tolist()
    play(env, script)
    many = gym.make_vec("CartPole-v1", NUM_ENVS, vectorization_mode="vector_entry_point")
    many.reset(seed=0)
    for_many = rng.integers(0, 2, (steps, NUM_ENVS))

    def work() -> None:
        for actions in for_many:
            many.step(actions)

    work()
    return {
        "cartpole_scalar_per_cpu_s": rates(len(script), lambda: play(env, script), repeats)[0],
        "cartpole_vector_per_cpu_s": rates(for_many.size, work, repeats)[0],
    }


# ---------------------------------------------------------------------- training


class Free(gym.vector.VectorEnv[Any, Any, Any]):
    """What costs nothing: the observations, rewards and masks of other environments at one time, for ever."""

    def __init__(self, like: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        self.num_envs = like.num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = like.single_observation_space
        self.single_action_space = like.single_action_space
        self.observation_space, self.action_space = like.observation_space, like.action_space
        self.seen = like.reset(seed=0)[0].copy()
        self.masks = like.unwrapped.action_masks().copy()
        self.rewards, self.flags = np.zeros(self.num_envs), np.zeros(self.num_envs, np.bool_)

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return self.seen, {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        return self.seen, self.rewards, self.flags, self.flags, {}

    def action_masks(self) -> NDArray[np.bool_]:
        masks: NDArray[np.bool_] = self.masks
        return masks


def training(repeats: int) -> list[dict[str, Any]]:
    """Steps of training per CPU-second, of different kinds."""
    import torch
    from sb3_contrib import MaskablePPO
    from stable_baselines3 import PPO

    from agents.sb3 import SB3VecEnv
    from agents.sb3_policies import MaskablePolicy, Policy

    torch.set_num_threads(1)
    torch.distributions.Distribution.set_default_validate_args(False)
    rows = []
    kinds: tuple[tuple[Any, Any], ...] = ((PPO, Policy), (MaskablePPO, MaskablePolicy))
    for window, epochs in ((WINDOW, 1), (WINDOW, 4), (SMALL, 4)):
        for algorithm, quick in kinds:
            for policy, free in ((quick, False), ("MlpPolicy", False), (quick, True)):
                env: Any = SB3VecEnv.make(IDS[0], NUM_ENVS, scenario=SCENARIO, observation="flat", **window)
                model = algorithm(
                    policy,
                    SB3VecEnv(Free(env.venv)) if free else env,
                    n_steps=STEPS_PER_UPDATE,
                    batch_size=BATCH,
                    n_epochs=epochs,
                    seed=0,
                    device="cpu",
                )
                count = NUM_ENVS * STEPS_PER_UPDATE
                model.learn(2 * count)

                def learn(model: Any = model, count: int = count) -> None:
                    model.learn(count, reset_num_timesteps=False)

                cpu, wall = rates(count, learn, repeats)
                rows.append(
                    {
                        "algorithm": algorithm.__name__,
                        "policy": "own" if policy == "MlpPolicy" else "quick",
                        "env": "free" if free else IDS[0],
                        "features": env.observation_space.shape[0],
                        "actions": int(env.action_space.n),
                        "n_epochs": epochs,
                        "steps_per_cpu_s": cpu,
                        "steps_per_s": wall,
                    }
                )
    return rows


# ---------------------------------------------------------------------- all of it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000, help="of each environment, in each repeat")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # what importing torch says of itself

    report: dict[str, Any] = {}
    for env_id in IDS:
        kinds = [(NUM_ENVS, 1), (NUM_ENVS, 2), (1024, 1), (1024, 2)]
        rows = [vector(env_id, n, threads, options.steps, options.repeats) for n, threads in kinds]
        report[env_id] = {**rows[0], **scalar(env_id, 20 * options.steps, options.repeats), "all": rows}
    report |= cartpole(options.steps, options.repeats)
    if not options.no_training:
        rows = report["training"] = training(options.repeats)
        for algorithm, name in (("PPO", "ppo"), ("MaskablePPO", "maskable_ppo")):
            row = next(row for row in rows if row["algorithm"] == algorithm)
            report[f"{name}_steps_per_cpu_s"] = row["steps_per_cpu_s"]
    report |= {
        "scenario": SCENARIO,
        "repeats": options.repeats,
        "steps": options.steps,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "gymnasium": gym.__version__,
    }
    print(json.dumps(report, indent=1) if options.json else as_text(report))


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []

    def add(what: str, cpu: float, wall: float | None = None) -> None:
        per_second = "" if wall is None else f"{wall:12,.0f} per second"
        lines.append(f"{what:72s} {cpu:12,.0f} per CPU-second {per_second}".rstrip())

    for env_id in IDS:
        for row in report[env_id]["all"]:
            what = f"{env_id}, {row['num_envs']} environments, {row['threads']} threads: decisions"
            add(what, row["decisions_per_cpu_s"], row["decisions_per_s"])
        one = report[env_id]
        add(f"{env_id}, gym.make: steps", one["scalar_steps_per_cpu_s"], one["scalar_steps_per_s"])
    for kind in ("scalar", "vector"):
        add(f"CartPole-v1, {kind}: steps", report[f"cartpole_{kind}_per_cpu_s"])
    for row in report.get("training", []):
        what = f"{row['algorithm']}, {row['policy']} policy, {row['features']} features, "
        what += f"{row['actions']} actions, {row['n_epochs']} epochs"
        what += ", free" if row["env"] == "free" else ""
        add(what, row["steps_per_cpu_s"], row["steps_per_s"])
    return "\n".join(lines)


if __name__ == "__main__":
    main()
