"""PPO with masks in one file, in the style of CleanRL: PyTorch and a native vector environment, nothing else.

    python scripts/examples/cleanrl_ppo.py [--scenario toy] [--timesteps 1000000] [--seconds 60] [--seed 0]

Vector environments of Gymnasium begin anew, unless told otherwise, in the step after the one in which an
episode ends. That step ignores the action and has no reward: it is left out of the loss. In return the
observation before it is the episode's last, whose value counts if the episode was cut.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import llmsched_env.envs  # noqa: F401  (registers the ids)
from agents.evaluation import evaluate

OPTIONS: dict[str, Any] = {"observation": "flat", "waiting_slots": 8, "running_slots": 8}


@dataclass
class Settings:
    """What is asked for on the command line, and what PPO is set to."""

    scenario: str = "toy"
    timesteps: int = 1_000_000
    seconds: float = math.inf
    seed: int = 0
    num_envs: int = 256
    num_steps: int = 32  # of each environment, between two updates
    minibatch: int = 1024
    epochs: int = 4
    learning_rate: float = 2e-3
    gamma: float = 1.0  # episodes end, and their mean latency is what counts
    lam: float = 0.95
    clip: float = 0.2


class Agent(nn.Module):
    """A policy and a value of observations (n, D), which are brought to unit variance first."""

    count: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor

    def __init__(self, features: int, actions: int, width: int = 64) -> None:
        super().__init__()
        self.policy, self.value = _network(features, actions, width, 0.01), _network(features, 1, width, 1.0)
        self.register_buffer("count", torch.tensor(1e-4))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))

    def watch(self, seen: torch.Tensor) -> None:
        """Take observations (n, D) into the mean and the variance."""
        total, shift = self.count + len(seen), seen.mean(0) - self.mean
        squares = self.variance * self.count + seen.var(0, correction=0) * len(seen)
        self.variance = (squares + shift**2 * self.count * len(seen) / total) / total
        self.mean += shift * len(seen) / total
        self.count = total

    def prepare(self, seen: torch.Tensor) -> torch.Tensor:
        return ((seen - self.mean) / torch.sqrt(self.variance + 1e-8)).clamp(-10.0, 10.0)

    def forward(self, seen: torch.Tensor, legal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logarithms of the probabilities of actions (n, A), and values (n,), of prepared observations."""
        logits = self.policy(seen).masked_fill(~legal, -1e8)
        return torch.log_softmax(logits, 1), self.value(seen).squeeze(1)

    @torch.no_grad()
    def best(self, seen: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The likeliest actions (n,): a policy for `evaluate`."""
        logs, _ = self(self.prepare(torch.as_tensor(seen)), torch.as_tensor(masks))
        return logs.argmax(1).numpy()


def _network(features: int, outputs: int, width: int, last: float) -> nn.Sequential:
    layers = [nn.Linear(features, width), nn.Linear(width, width), nn.Linear(width, outputs)]
    for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), last), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def advantages(
    rewards: NDArray[Any], values: NDArray[Any], terminated: NDArray[Any], over: NDArray[Any], a: Settings
) -> NDArray[np.float32]:
    """Generalised advantage estimates (T, n).

    Args:
        rewards, terminated, over: (T, n) of steps; over: terminated or truncated.
        values: (T + 1, n) of what was seen before each step, and after the last: after a step in which an
            episode ends that is its own last observation, so that cut ones are bootstrapped rightly.
        a: for gamma and lam.
    """
    found, later = np.zeros_like(rewards), np.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        surprise = rewards[t] + a.gamma * values[t + 1] * ~terminated[t] - values[t]
        found[t] = later = surprise + a.gamma * a.lam * later * ~over[t]
    return found


def train(a: Settings) -> Agent:
    """Train an agent."""
    torch.manual_seed(a.seed)
    rng = np.random.default_rng(a.seed)
    env = gym.make_vec("llmsched/Decision-v0", a.num_envs, scenario=a.scenario, **OPTIONS)
    features, actions = env.single_observation_space.shape[0], int(env.single_action_space.n)  # type: ignore
    agent = Agent(features, actions)
    optimiser = torch.optim.Adam(agent.parameters(), a.learning_rate, eps=1e-5)
    shape = (a.num_steps, a.num_envs)
    seen_at, legal_at = torch.zeros(*shape, features), torch.zeros(*shape, actions, dtype=torch.bool)
    action_at, log_at = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    rewards, values = np.zeros(shape, np.float32), np.zeros((a.num_steps + 1, a.num_envs), np.float32)
    terminated, over = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    real = np.zeros(shape, np.bool_)  # but not the steps in which an environment begins anew
    begins = np.zeros(a.num_envs, np.bool_)

    raw, info = env.reset(seed=a.seed)
    agent.watch(torch.as_tensor(raw))
    start, done, latencies = time.perf_counter(), 0, []
    while done < a.timesteps and time.perf_counter() - start < a.seconds:
        for t in range(a.num_steps):
            seen, legal = agent.prepare(torch.as_tensor(raw)), torch.as_tensor(info["action_mask"]).bool()
            with torch.no_grad():
                logs, value = agent(seen, legal)
                action = (logs - torch.empty_like(logs).exponential_().log()).argmax(1)  # Gumbel: a sample
            seen_at[t], legal_at[t], action_at[t], values[t] = seen, legal, action, value.numpy()
            log_at[t] = logs.gather(1, action[:, None]).squeeze(1)
            raw, rewards[t], terminated[t], truncated, info = env.step(action.numpy())
            over[t], real[t] = terminated[t] | truncated, ~begins
            begins = over[t]
            if "metrics" in info:
                latencies.extend(info["metrics"]["latency_s"][info["_metrics"]])
        with torch.no_grad():
            values[-1] = agent(agent.prepare(torch.as_tensor(raw)), legal)[1].numpy()
        found = advantages(rewards, values, terminated, over, a)
        chosen = torch.as_tensor(real)
        batch = [x[chosen] for x in (seen_at, legal_at, action_at, log_at)]
        batch += [torch.as_tensor(x)[chosen] for x in (found, found + values[:-1])]
        for _ in range(a.epochs):
            order = torch.as_tensor(rng.permutation(len(batch[0])))
            for part in order.split(a.minibatch):
                loss = _loss(agent, a, [x[part] for x in batch])
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimiser.step()
        agent.watch(torch.as_tensor(raw))
        done += len(batch[0])
        if latencies:
            speed = done / (time.perf_counter() - start)
            print(f"{done:9d} decisions, {speed:7.0f} a second: mean latency {np.mean(latencies):.3f} s")
            latencies.clear()
    return agent


def _loss(agent: Agent, a: Settings, batch: list[torch.Tensor]) -> torch.Tensor:
    """PPO's loss of a minibatch."""
    seen, legal, action, old, advantage, returns = batch
    logs, value = agent(seen, legal)
    ratio = (logs.gather(1, action[:, None]).squeeze(1) - old).exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - a.clip, 1 + a.clip) * advantage).mean()
    return 0.5 * nn.functional.mse_loss(value, returns) - gain


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", default=Settings.scenario)
    parser.add_argument(
        "--timesteps", type=int, default=Settings.timesteps, help="train for so many decisions"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="but not longer than this")
    parser.add_argument("--num-envs", type=int, default=Settings.num_envs)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    a = Settings(**vars(parser.parse_args()))
    torch.set_num_threads(1)  # networks of this size get slower with more
    agent = train(a)
    for name, policy in (("PPO", agent.best), ("vLLM V1", "vllm-v1")):
        found = evaluate(policy, scenario=a.scenario, max_episode_steps=20_000, **OPTIONS)
        print(f"{name:12s} mean latency {found['latency_s'].mean():.3f} s, score {found['score'].mean():.3f}")


if __name__ == "__main__":
    main()
