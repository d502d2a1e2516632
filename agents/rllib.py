"""RLlib (its new API stack) on the environments, with masks.

from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from agents.rllib import MaskedModule, register

config = PPOConfig().environment(register(), env_config={"scenario": "toy"})
config.rl_module(rl_module_spec=RLModuleSpec(module_class=MaskedModule))
config.build_algo().train()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import llmsched_env.envs  # noqa: F401  (registers the ids)
from llmsched_env.envs.wrappers import MaskInObservation

try:
    import torch
    from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
    from ray.rllib.core.columns import Columns
    from ray.tune import register_env
except ImportError:
    raise ImportError('agents.rllib needs RLlib and PyTorch; pip install "llmsched-env[interop]"') from None

_ILLEGAL = 1e8  # less of a logit: a probability of 0, and a finite logarithm


def make(config: Mapping[str, Any]) -> gym.Env[Any, Any]:
    """The environment that RLlib asks for: {"observation": (D,), "action_mask": (A,)}.

    Args:
        config: `env_config`: keywords of the environment, and `env_id` and `max_episode_steps`.
    """
    keywords = {"observation": "flat", "env_id": "llmsched/Decision-v0", **config}
    return MaskInObservation(gym.make(keywords.pop("env_id"), **keywords))


def register(name: str = "llmsched") -> str:
    """Make `make` known to RLlib by this name, which is returned."""
    register_env(name, make)
    return name


class MaskedModule(DefaultPPOTorchRLModule):
    """RLlib's own networks for PPO; what is not legal has probability 0. For all three environments."""

    def __init__(self, observation_space: Any = None, **keywords: Any) -> None:
        # The networks are made, in here, for what they see; RLlib is then told of all there is.
        super().__init__(observation_space=observation_space["observation"], **keywords)
        self.observation_space = observation_space

    def _forward(self, batch: dict[str, Any], **keywords: Any) -> dict[str, Any]:
        return _masked(batch, super()._forward(_without_mask(batch), **keywords))

    def _forward_train(self, batch: dict[str, Any], **keywords: Any) -> dict[str, Any]:
        return _masked(batch, super()._forward_train(_without_mask(batch), **keywords))

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Any:
        """Values (n,)."""
        return super().compute_values(_without_mask(batch), embeddings)

    def best(self, seen: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The likeliest actions (n,) of one Discrete choice: a policy for `agents.evaluation.evaluate`."""
        observation = {"observation": torch.as_tensor(seen), "action_mask": torch.as_tensor(masks)}
        with torch.no_grad():
            logits = self._forward({Columns.OBS: observation})[Columns.ACTION_DIST_INPUTS]
        actions: NDArray[np.int64] = logits.argmax(1).numpy()
        return actions


def _without_mask(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, Columns.OBS: batch[Columns.OBS]["observation"]}


def _masked(batch: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    legal = batch[Columns.OBS]["action_mask"].to(outputs[Columns.ACTION_DIST_INPUTS].dtype)
    outputs[Columns.ACTION_DIST_INPUTS] = outputs[Columns.ACTION_DIST_INPUTS] + (legal - 1.0) * _ILLEGAL
    return outputs
