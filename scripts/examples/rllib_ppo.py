"""RLlib's PPO with masks learns to schedule, against vLLM V1 on the same requests.

    python scripts/examples/rllib_ppo.py [--scenario toy] [--timesteps 100000] [--seconds 60] [--seed 0]

It needs `pip install "llmsched-env[interop]"`. RLlib steps scalar environments, one after the other in each
process: for speed give it processes (`--num-env-runners`), or take one of the other examples.
"""

from __future__ import annotations

import argparse
import logging
import math
import time

import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from agents.evaluation import evaluate
from agents.rllib import MaskedModule, register


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", default="toy")
    parser.add_argument("--timesteps", type=int, default=100_000, help="train for so many decisions")
    parser.add_argument("--seconds", type=float, default=math.inf, help="but not longer than this")
    parser.add_argument("--num-envs", type=int, default=16, help="in each process")
    parser.add_argument("--num-env-runners", type=int, default=0, help="processes beside this one")
    parser.add_argument("--batch", type=int, default=4096, help="decisions between two updates")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # networks of this size get slower with more

    options = {"scenario": args.scenario, "observation": "flat", "waiting_slots": 8, "running_slots": 8}
    layers = DefaultModelConfig(fcnet_hiddens=[64, 64], vf_share_layers=False)
    config = (
        PPOConfig()
        .environment(register(), env_config=options)
        .env_runners(num_env_runners=args.num_env_runners, num_envs_per_env_runner=args.num_envs)
        .rl_module(rl_module_spec=RLModuleSpec(module_class=MaskedModule, model_config=layers))
        .training(train_batch_size=args.batch, minibatch_size=args.batch // 8, num_epochs=4)
        .training(lr=1e-3, gamma=1.0, lambda_=0.95)
        .debugging(seed=args.seed, log_level="ERROR")
    )
    ray.init(num_cpus=1 + args.num_env_runners, include_dashboard=False, logging_level=logging.ERROR)
    algorithm = config.build_algo()
    start, done = time.perf_counter(), 0
    while done < args.timesteps and time.perf_counter() - start < args.seconds:
        found = algorithm.train()["env_runners"]
        done = int(found["num_env_steps_sampled_lifetime"])
        print(
            f"{done:9d} decisions: mean return {found.get('episode_return_mean', math.nan):.3f}", flush=True
        )
    for name, policy in (("PPO", algorithm.get_module().best), ("vLLM V1", "vllm-v1")):
        found = evaluate(policy, max_episode_steps=20_000, **options)
        print(f"{name:12s} mean latency {found['latency_s'].mean():.3f} s, score {found['score'].mean():.3f}")
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
