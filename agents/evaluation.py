"""What policies of all kinds come to on the same episodes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import baselines
from llmsched_env.envs import IDS
from llmsched_env.errors import InputError, unknown

# Training that begins with small seeds sees none of the episodes that are reported, from here on, ...
FIRST_SEED = 1_000_000
# ... nor of those by which the best state of a training is chosen, which are others still.
VALIDATION_SEED = 2_000_000
MOST_STEPS = 100_000  # of an episode: a bad policy can preempt for ever


def evaluate(
    policy: Any,
    env_id: str = "llmsched/Decision-v0",
    *,
    num_episodes: int = 32,
    seed: int = FIRST_SEED,
    prepare: Callable[[Any], Any] | None = None,
    max_episode_steps: int | None = MOST_STEPS,
    **options: Any,
) -> dict[str, NDArray[Any]]:
    """What a policy achieves; policies that are given the same seed and options serve the same requests.

    Args:
        policy: the name of a scheduler (see `baselines.expert`), an expert, a model of Stable-Baselines3 (at
            its best, not sampled; with the mask if it takes one), or a function of n observations and masks,
            (n, A) bool, that returns n actions.
        env_id: of the environments.
        num_episodes: how many; each is played once, all at the same time.
        seed: episode i is that of an environment after `reset(seed=seed + i)`.
        prepare: what observations go through before a model sees them, such as `VecNormalize.normalize_obs`.
        max_episode_steps: steps after which an episode is cut (fewer are `finished` then): a bad policy can
            preempt for ever. None: never.
        options: keywords of the environment.

    Returns:
        `llmsched_env.envs.fleet.Fleet.metrics`: name -> array (num_episodes,).

    Raises:
        InputError: what is no policy; an unknown scheduler or option; a scheduler whose plans these actions
            cannot express; actions of another shape.
    """
    if isinstance(policy, str):
        policy = baselines.expert(policy)
    if not callable(policy) and not hasattr(policy, "predict"):
        raise InputError(f"a policy is a scheduler's name, an expert, a model or a function, not {policy!r}")
    env = make(env_id, num_episodes, max_episode_steps=max_episode_steps, **options)
    try:
        return play(policy, env, seed, prepare)
    finally:
        env.close()


def make(
    env_id: str, num_episodes: int, *, max_episode_steps: int | None = MOST_STEPS, **options: Any
) -> Any:
    """A vector environment in which `play` plays an episode in each of its environments.

    Raises:
        InputError: an unknown id, with the nearest match, or options that do not fit.
    """
    if env_id not in IDS:
        raise unknown("environment", env_id, IDS)
    return gym.make_vec(
        env_id,
        num_episodes,
        vectorization_mode="vector_entry_point",
        autoreset_mode="disabled",
        max_episode_steps=max_episode_steps,
        **options,
    )


def play(
    policy: Any, env: Any, seed: int = FIRST_SEED, prepare: Callable[[Any], Any] | None = None
) -> dict[str, NDArray[Any]]:
    """The metrics of the first episodes after `env.reset(seed=seed)`; the rest is as in `evaluate`.

    Args:
        env: of `make`.
    """
    act = _actor(policy, env.unwrapped, prepare)
    seen, _ = env.reset(seed=seed)
    over = np.zeros(env.num_envs, np.bool_)
    metrics: dict[str, NDArray[Any]] = {}
    while not over.all():
        actions = np.asarray(act(seen))
        if actions.shape != env.action_space.shape:
            raise InputError(
                f"the policy must return actions of shape {env.action_space.shape}, not {actions.shape}"
            )
        seen, _, terminated, truncated, info = env.step(actions)
        over |= terminated | truncated  # and stays so: an episode that is over is told of once
        if "metrics" in info:
            ended = info["_metrics"]
            for name, values in info["metrics"].items():
                if not name.startswith("_"):
                    metrics.setdefault(name, np.zeros_like(values))[ended] = values[ended]
    return metrics


def random_policy(space: gym.Space[Any], seed: int = 0) -> Callable[[Any, NDArray[np.bool_]], NDArray[Any]]:
    """A policy that takes any legal action, each as likely as another.

    Args:
        space: the actions of one environment, Discrete or MultiDiscrete; of the latter each entry is drawn on
            its own.
        seed: of the lots.
    """
    rng = np.random.default_rng(seed)
    parts = [int(space.n)] if isinstance(space, gym.spaces.Discrete) else space.nvec.tolist()  # type: ignore[attr-defined]
    stops = np.cumsum(parts)[:-1]

    def policy(seen: Any, masks: NDArray[np.bool_]) -> NDArray[Any]:
        lots = np.where(masks, rng.random(masks.shape), -1.0)
        drawn = [part.argmax(axis=1) for part in np.split(lots, stops, axis=1)]
        return np.stack(drawn, axis=1) if space.shape else drawn[0]

    return policy


def _actor(policy: Any, env: Any, prepare: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    """The policy as a function of what is seen."""
    if isinstance(policy, baselines.Expert):
        return lambda seen: policy(env)
    if not hasattr(policy, "predict"):
        return lambda seen: policy(seen, env.action_masks())
    masked = "action_masks" in inspect.signature(policy.predict).parameters

    def best(seen: Any) -> Any:
        masks = {"action_masks": env.action_masks()} if masked else {}
        return policy.predict(prepare(seen) if prepare else seen, deterministic=True, **masks)[0]

    return best
