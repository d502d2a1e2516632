"""What policies of all kinds come to on the same episodes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import baselines
import llmsched_env.envs  # noqa: F401  (registers the ids)
from llmsched_env.errors import InputError

FIRST_SEED = 1_000_000  # training that begins with small seeds does not see the episodes from here on


def evaluate(
    policy: Any,
    env_id: str = "llmsched/Decision-v0",
    *,
    num_episodes: int = 32,
    seed: int = FIRST_SEED,
    prepare: Callable[[Any], Any] | None = None,
    max_episode_steps: int | None = 100_000,
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
    env: Any = gym.make_vec(
        env_id,
        num_episodes,
        vectorization_mode="vector_entry_point",
        autoreset_mode="disabled",
        max_episode_steps=max_episode_steps,
        **options,
    )
    act = _actor(policy, env.unwrapped, prepare)
    seen, _ = env.reset(seed=seed)
    over = np.zeros(num_episodes, np.bool_)
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
    env.close()
    return metrics


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
