"""Wrappers for libraries that want the environments in a form of their own."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class MaskInObservation(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """The mask as part of the observation: {"observation": ..., "action_mask": ...}, as RLlib, Tianshou and
    TorchRL take it.

    `action_mask` is int8 of shape (A,), 1 where an action is legal, of MultiDiscrete actions one entry's
    choices after the other's. It wraps an environment that has `action_masks()`, also through other wrappers.

    >>> import gymnasium as gym
    >>> env = MaskInObservation(gym.make("llmsched/Decision-v0", observation="flat"))
    >>> observation, info = env.reset(seed=0)
    >>> sorted(observation), bool((observation["action_mask"] == info["action_mask"]).all())
    (['action_mask', 'observation'], True)
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._masks = env.get_wrapper_attr("action_masks")
        self.observation_space = gym.spaces.Dict(
            {
                "action_mask": gym.spaces.Box(0, 1, (len(self._masks()),), np.int8),
                "observation": env.observation_space,
            }
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """As the environment's, with the mask in the observation."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._with_mask(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the environment's, with the mask in the observation."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._with_mask(observation), reward, terminated, truncated, info

    def _with_mask(self, observation: Any) -> dict[str, Any]:
        return {"action_mask": self._masks().astype(np.int8), "observation": observation}
