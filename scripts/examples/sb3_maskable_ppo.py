"""sb3-contrib's MaskablePPO learns to schedule, against vLLM V1 on the same requests.

python scripts/examples/sb3_maskable_ppo.py [--scenario toy] [--timesteps 500000]
    [--seconds 60] [--seed 0] [--save model.zip]
"""

from __future__ import annotations

import argparse
import math

import torch
from sb3_contrib import MaskablePPO

from agents.evaluation import evaluate
from agents.sb3 import SB3VecEnv, StopAfter
from agents.sb3_policies import MaskablePolicy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", default="toy")
    parser.add_argument("--timesteps", type=int, default=500_000, help="train for so many decisions")
    parser.add_argument("--seconds", type=float, default=math.inf, help="but not longer than this")
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="write the model to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)  # networks of this size get slower with more

    options = {"scenario": args.scenario, "observation": "flat", "waiting_slots": 8, "running_slots": 8}
    env = SB3VecEnv.make("llmsched/Decision-v0", args.num_envs, **options)
    model = MaskablePPO(
        MaskablePolicy,
        env,
        n_steps=32,
        batch_size=4 * args.num_envs,
        n_epochs=4,
        learning_rate=1e-3,
        gamma=1.0,  # episodes end, and their mean latency is what counts
        seed=args.seed,
        device="cpu",
        verbose=1,
    )
    model.learn(args.timesteps, callback=StopAfter(args.seconds))
    if args.save:
        model.save(args.save)
    for name, policy in (("MaskablePPO", model), ("vLLM V1", "vllm-v1")):
        found = evaluate(policy, max_episode_steps=20_000, **options)
        print(f"{name:12s} mean latency {found['latency_s'].mean():.3f} s, score {found['score'].mean():.3f}")


if __name__ == "__main__":
    main()
