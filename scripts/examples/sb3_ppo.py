"""Stable-Baselines3's PPO picks the settings of the scheduling routine before each iteration (Dispatch-v0),
against vLLM V1 on the same requests.

    python scripts/examples/sb3_ppo.py [--scenario infermax-contention] [--timesteps 500000] [--seconds 60]
        [--seed 0] [--save model.zip]
"""

from __future__ import annotations

import argparse
import math

import torch
from stable_baselines3 import PPO

from agents.evaluation import evaluate
from agents.sb3 import SB3VecEnv, StopAfter


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", default="infermax-contention")
    parser.add_argument("--timesteps", type=int, default=500_000, help="train for so many iterations")
    parser.add_argument("--seconds", type=float, default=math.inf, help="but not longer than this")
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="write the model to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)  # networks of this size get slower with more

    env_id, options = "llmsched/Dispatch-v0", {"scenario": args.scenario, "observation": "flat"}
    env = SB3VecEnv.make(env_id, args.num_envs, **options)
    model = PPO(
        "MlpPolicy",
        env,
        n_steps=128,
        batch_size=8 * args.num_envs,
        n_epochs=4,
        gamma=0.999,
        seed=args.seed,
        device="cpu",
        verbose=1,
    )
    model.learn(args.timesteps, callback=StopAfter(args.seconds))
    if args.save:
        model.save(args.save)
    for name, policy in (("PPO", model), ("vLLM V1", "vllm-v1")):
        found = evaluate(policy, env_id, max_episode_steps=20_000, **options)
        print(f"{name:12s} mean latency {found['latency_s'].mean():.3f} s, score {found['score'].mean():.3f}")


if __name__ == "__main__":
    main()
