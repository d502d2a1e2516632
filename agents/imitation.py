"""A warm start: a network first learns to decide as a scheduler or an optimal schedule does.

First in what its teacher gets into, then in what it gets into itself (DAgger, Ross, Gordon and Bagnell 2011):
a student that only saw its teacher at work does not know what to do after a mistake of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from numpy.typing import NDArray

import baselines
from agents.evaluation import MOST_STEPS
from agents.sb3_policies import NetPolicy
from llmsched_env.errors import InputError

Policy = Callable[[NDArray[np.float32], NDArray[np.bool_]], NDArray[np.int64]]

_WORTH = 0.5  # weight of the error in the value beside that in the actions
_RATE = 2e-3
_AT_ONCE = 16384  # steps that are judged in one go: memory


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """What a teacher did, or would have done, step by step.

    Attributes:
        seen: (n, D) float32. masks: (n, A) bool. actions: (n,) int64, or (n, entries).
        returns: (n,) float32: discounted rewards from there to the end of the episode, or its cut.
    """

    seen: NDArray[np.float32]
    masks: NDArray[np.bool_]
    actions: NDArray[np.int64]
    returns: NDArray[np.float32]

    def __add__(self, other: Demonstrations) -> Demonstrations:
        names = [field.name for field in dataclasses.fields(self)]
        return Demonstrations(**{n: np.concatenate([getattr(self, n), getattr(other, n)]) for n in names})


def demonstrate(
    teacher: str,
    env_id: str,
    scenario: str,
    num_episodes: int,
    *,
    seed: int,
    discount_rate: float = 0.0,
    scale: Callable[[NDArray[np.int64]], NDArray[np.float64]] | None = None,
    student: Policy | None = None,
    share: float = 1.0,
    most_steps: int = MOST_STEPS,
    **options: Any,
) -> Demonstrations:
    """Let a teacher play episodes, or say what it would do in those that a student plays.

    Args:
        teacher: a scheduler's name, or "optimum": the best schedule that `baselines.optimal` finds in 20 s an
            episode; where that is too little, how far it gets depends on the machine.
        env_id, scenario, options: of the environment; flat observations.
        seed: of the first episode. discount_rate: 1/s. scale: divides rewards, as in `SchedulingPPO`.
        student: its actions, of observations (n, D) and masks (n, A); None: the teacher plays.
        share: of the decisions that the student takes, drawn one by one; the teacher takes the others.
        most_steps: after which an episode is cut: a student may preempt for ever.

    Raises:
        InputError: an unknown teacher, one that these actions cannot follow, or the optimum as the teacher of
            a student: it knows one schedule, and nothing of where others lead.
    """
    keywords = {"scenario": scenario, "observation": "flat", "discount_rate": discount_rate, **options}
    if teacher != "optimum":
        played = _play_scheduler(teacher, env_id, num_episodes, seed, keywords, student, share, most_steps)
    elif student is None:
        played = _play_optimum(env_id, num_episodes, seed, keywords)
    else:
        raise InputError("the optimum cannot teach in what a student gets into; set teacher_rounds=0")
    seen, masks, actions, rewards, dt, lane, seeds = played
    scales = np.ones(num_episodes) if scale is None else scale(seeds)
    returns = np.zeros(len(rewards), np.float32)
    after = np.zeros(num_episodes)
    for t in range(len(rewards) - 1, -1, -1):
        i = lane[t]
        after[i] = rewards[t] / scales[i] + np.exp(-discount_rate * dt[t]) * after[i]
        returns[t] = after[i]
    return Demonstrations(seen, masks, actions, returns)


def _play_scheduler(
    teacher: str,
    env_id: str,
    num_episodes: int,
    seed: int,
    keywords: dict[str, Any],
    student: Policy | None,
    share: float,
    most_steps: int,
) -> Any:
    """All episodes at once; the steps of an episode in order."""
    env: Any = gym.make_vec(
        env_id,
        num_episodes,
        vectorization_mode="vector_entry_point",
        autoreset_mode="disabled",
        max_episode_steps=most_steps,
        **keywords,
    ).unwrapped
    expert = baselines.expert(teacher, strict=False)  # near enough for a beginning
    seen, _ = env.reset(seed=[seed + i for i in range(num_episodes)])
    seeds = env.episode_seeds.copy()
    over = np.zeros(num_episodes, np.bool_)
    rng = np.random.default_rng(seed)
    steps: list[tuple[Any, ...]] = []
    while not over.all():
        here, masks = np.flatnonzero(~over), env.action_masks()
        actions = np.asarray(expert(env))
        now = seen[here].copy(), masks[here].copy(), actions[here].copy()
        if student is not None:
            chosen, own = student(now[0], now[1]), rng.random(len(here)) < share
            actions[here[own]] = chosen[own]
        seen, rewards, terminated, truncated, info = env.step(actions)
        steps.append((*now, rewards[here].copy(), info["dt"][here].copy(), here))
        over |= terminated | truncated
    env.close()
    return (*(np.concatenate(parts) for parts in zip(*steps, strict=True)), seeds)


def _play_optimum(env_id: str, num_episodes: int, seed: int, keywords: dict[str, Any]) -> Any:
    """One episode after the other, each as its best known schedule has it."""
    from baselines import optimal

    env: Any = gym.make(env_id, **keywords).unwrapped
    steps: list[tuple[Any, ...]] = []
    seeds = np.zeros(num_episodes, np.int64)
    for i in range(num_episodes):
        instance = optimal.Instance.of_scenario(env.problem.scenario, seed + i)
        best = optimal.solve(instance, time_limit_s=20)
        if best.schedule is None:
            raise InputError(
                f"no schedule of episode {i} was found to teach; take a scheduler as the teacher"
            )
        expert, over = baselines.expert(best), False
        seen, _ = env.reset(seed=seed + i)
        seeds[i] = env.episode_seed
        while not over:
            mask, action = env.action_masks().copy(), expert(env)
            now = seen.copy(), mask, np.asarray(action)
            seen, reward, terminated, truncated, info = env.step(action)
            over = terminated or truncated
            steps.append((*now, reward, info["dt"], i))
    env.close()
    return (*(np.stack(parts) for parts in zip(*steps, strict=True)), seeds)


def imitate(policy: NetPolicy, shown: Demonstrations, *, epochs: int, batch_size: int, seed: int) -> float:
    """Teach a policy; returns the share of actions that it chooses as its teacher did, at the end."""
    rng = np.random.default_rng(seed)
    optimizer = th.optim.Adam(policy.parameters(), lr=_RATE)
    seen, actions = th.as_tensor(shown.seen), th.as_tensor(shown.actions)
    returns = th.as_tensor(shown.returns)
    spread = float(returns.std()) + 1e-6  # errors of the value count in units of it
    n = len(seen)
    policy.set_training_mode(True)
    for _ in range(epochs):
        order = rng.permutation(n)
        for at in range(0, n, batch_size):
            rows = order[at : at + batch_size]
            values, log_prob, _ = policy.evaluate_actions(seen[rows], actions[rows], shown.masks[rows])
            worth = ((values[:, 0] - returns[rows]) / spread).square().mean()
            loss = -log_prob.mean() + _WORTH * worth
            optimizer.zero_grad()
            loss.backward()
            th.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
    policy.set_training_mode(False)
    same = best_actions(policy)(shown.seen, shown.masks) == shown.actions
    return float(same.reshape(n, -1).all(1).mean())


def best_actions(policy: NetPolicy) -> Policy:
    """What the policy holds for best."""

    def choose(seen: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        chosen = []
        with th.no_grad():
            for at in range(0, len(seen), _AT_ONCE):
                part = slice(at, at + _AT_ONCE)
                chosen.append(policy.get_distribution(th.as_tensor(seen[part]), masks[part]).mode().numpy())
        found = np.concatenate(chosen)
        return found.reshape(len(seen), *(policy.action_space.shape or ()))

    return choose
