"""TorchRL's PPO with masks learns to schedule, against vLLM V1 on the same requests.

    python scripts/examples/torchrl_ppo.py [--scenario toy] [--timesteps 100000] [--seconds 60] [--seed 0]

It needs `pip install "llmsched-env[interop]"`. TorchRL steps scalar environments, one after the other.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import (
    ActionMask,
    Compose,
    DTypeCastTransform,
    GymWrapper,
    RewardSum,
    SerialEnv,
    TransformedEnv,
)
from torchrl.modules import MaskedCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import llmsched_env.envs  # noqa: F401  (registers the ids)
from agents.evaluation import evaluate
from llmsched_env.envs.wrappers import MaskInObservation


def make(**options: Any) -> TransformedEnv:
    """One environment: `observation` (D,), `action_mask` (A,) bool, `action` a number."""
    env = MaskInObservation(gym.make("llmsched/Decision-v0", observation="flat", **options))
    legal = DTypeCastTransform(torch.int8, torch.bool, in_keys=["action_mask"])
    return TransformedEnv(
        GymWrapper(env, categorical_action_encoding=True), Compose(legal, ActionMask(), RewardSum())
    )


def network(features: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", default="toy")
    parser.add_argument("--timesteps", type=int, default=100_000, help="train for so many decisions")
    parser.add_argument("--seconds", type=float, default=math.inf, help="but not longer than this")
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4096, help="decisions between two updates")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # networks of this size get slower with more
    torch.manual_seed(args.seed)

    options = {"scenario": args.scenario, "waiting_slots": 8, "running_slots": 8}
    env = SerialEnv(args.num_envs, lambda: make(**options))
    env.set_seed(args.seed)
    features, actions = env.observation_spec["observation"].shape[-1], env.action_spec.space.n
    logits = network(features, actions)
    actor = ProbabilisticActor(
        TensorDictModule(logits, in_keys=["observation"], out_keys=["logits"]),
        in_keys={"logits": "logits", "mask": "action_mask"},
        distribution_class=MaskedCategorical,
        return_log_prob=True,
    )
    critic = ValueOperator(network(features, 1), in_keys=["observation"])
    estimate = GAE(gamma=1.0, lmbda=0.95, value_network=critic)
    objective = ClipPPOLoss(actor, critic, entropy_bonus=False, critic_coeff=0.5, normalize_advantage=True)
    optimiser = torch.optim.Adam(objective.parameters(), 1e-3)
    collector = Collector(env, actor, frames_per_batch=args.batch, total_frames=args.timesteps)
    start, done = time.perf_counter(), 0
    for found in collector:
        for _ in range(4):
            with torch.no_grad():
                estimate(found)
            flat = found.reshape(-1)
            for part in torch.randperm(len(flat)).split(args.batch // 8):
                losses = objective(flat[part])
                optimiser.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(objective.parameters(), 0.5)
                optimiser.step()
        done += found.numel()
        returns = found["next", "episode_reward"][found["next", "done"]]
        print(f"{done:9d} decisions: mean return {returns.mean():.3f}", flush=True)
        if time.perf_counter() - start > args.seconds:
            break
    collector.shutdown()

    @torch.no_grad()
    def best(seen: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        legal = torch.as_tensor(masks)
        return logits(torch.as_tensor(seen)).masked_fill(~legal, -math.inf).argmax(1).numpy()

    for name, policy in (("PPO", best), ("vLLM V1", "vllm-v1")):
        found = evaluate(policy, observation="flat", max_episode_steps=20_000, **options)
        print(f"{name:12s} mean latency {found['latency_s'].mean():.3f} s, score {found['score'].mean():.3f}")


if __name__ == "__main__":
    main()
