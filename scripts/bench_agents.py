"""How fast agents are trained, and how fast they decide.

    python scripts/bench_agents.py [--updates 8] [--json]

Training: decisions a second from end to end, collecting and learning, 128 lanes of azure-conv, one thread
of PyTorch; the median over the updates after the first two. Deployment: microseconds for one decision of
an agent in NumPy, observation and mask given; the median of 2,000.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from agents.agent import Agent
from agents.config import Config
from agents.training import Progress, train

WINDOW = {
    "waiting_slots": 16,
    "running_slots": 8,
    "preempt": "forced",
    "work_conserving": True,
    "hold": "known",
}
CASES = {
    "pointer": Config("azure-conv", network="pointer", env_options=WINDOW),
    "pointer, dispatch": Config(
        "azure-conv", "llmsched/Dispatch-v0", env_options={"waiting_slots": 16, "running_slots": 8}
    ),
    "attention": Config("azure-conv", network="attention", env_options=WINDOW),
    "mlp": Config("azure-conv", network="mlp", env_options=WINDOW),
}


def training(config: Config, updates: int, folder: Path) -> tuple[float, Agent]:
    """Decisions a second, and the agent."""
    settled = config.replace(steps=updates * config.rollout, segment=updates, validation_episodes=1)
    rates: list[float] = []

    def note(now: Progress) -> None:
        rates.append(now.rate)

    run = train(settled, folder, progress=note)
    return statistics.median(rates[2:] or rates), Agent.load(run.folder)


def deciding(agent: Agent) -> float:
    """Microseconds a decision."""
    env = agent.make(1)
    seen, _ = env.reset(seed=0)
    mask, taken = env.action_masks()[0], []
    for _ in range(2000):
        start = time.perf_counter()
        agent.act(seen[0], mask)
        taken.append(time.perf_counter() - start)
    return 1e6 * float(np.median(taken))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in CASES.items():
            rate, agent = training(config, options.updates, Path(folder) / name.replace(", ", "-"))
            report[name] = {
                "epochs": config.epochs,
                "decisions_per_s": rate,
                "us_per_decision": deciding(agent),
            }
            if not options.json:
                print(name, {key: round(value) for key, value in report[name].items()}, flush=True)
    if options.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
