"""How far certified bounds are from the best scheduler: python scripts/bench_bounds.py [N] [WORKLOAD ...]

For each embedded workload at loads 0.5, 0.85 and 1.1 (of a token budget of 2,048): the least total latency
that a few schedulers reach, each at several token budgets, the share of it that every bound reaches, and the
share of that run's GPU time that the bound "area" reaches. Llama-3-8B on an A100; lengths are known.
"""

from __future__ import annotations

import sys
import time

import baselines
from baselines.optimal import ALLOWANCES, Instance
from baselines.optimal.bounds import lower_bounds
from llmsched_env import profiles, simulate, workloads
from llmsched_env.core.config import EngineConfig
from llmsched_env.simulation import Result

PROFILE, BUDGET, SEATS = profiles.get("a100-llama3-8b"), 2048, 256
SCHEDULERS = ("area-backfill", "sarathi", "srpt", "sjf", "vllm-v1", "mc-sf")
TIGHT = 0.95  # of the best schedule known, for a bound to be called tight


def instance(workload: str, load: float, num_requests: int, seed: int = 1) -> Instance:
    """Requests of a workload on the whole engine; everything is allowed."""
    engine = EngineConfig(token_budget=BUDGET, max_num_seqs=SEATS)
    drawn = workloads.get(workload, num_requests=num_requests, load=load, seed=seed)
    requests = simulate(drawn, baselines.get("sarathi"), PROFILE, engine, oversized="drop").requests
    assert PROFILE.kv_tokens is not None
    return Instance.of(
        requests,
        PROFILE.kv_tokens,
        BUDGET,
        PROFILE,
        allow=ALLOWANCES,
        block_size=16,
        max_num_seqs=SEATS,
        name=f"{workload} {load:g}",
    )


def best_run(problem: Instance) -> tuple[str, Result]:
    """The run with the least total latency, and whose it is."""
    runs = {
        f"{name} C={budget}": simulate(
            problem.requests,
            baselines.get(name),
            PROFILE,
            problem.engine.replace(token_budget=budget, max_num_seqs=min(budget, SEATS)),
        )
        for name in SCHEDULERS
        for budget in (128, 192, 256, 512, 1024, 2048)
    }
    best = min(runs, key=lambda name: problem.value(runs[name]))
    return best, runs[best]


def main(num_requests: int, names: list[str]) -> None:
    """Print a line for each workload and load."""
    print(f"{num_requests} requests; shares of the best run's total latency, and of its GPU time")
    print(f"{'workload, load':<28}{'best run':<24}{'mean s':>8}", end="")
    print(
        "".join(f"{name:>8}" for name in ("alone", "order", "pairs", "prices")), f"{'area':>8}{'seconds':>9}"
    )
    for name in names:
        for load in (0.5, 0.85, 1.1):
            problem = instance(name, load, num_requests)
            who, run = best_run(problem)
            began = time.perf_counter()
            bounds = lower_bounds(problem)
            seconds = time.perf_counter() - began
            total = problem.value(run)
            area = lower_bounds(problem, "gpu_time")["area"] / run.busy_s
            shares = "".join(f"{value / total:8.3f}" for value in bounds.values())
            label = "tight" if max(bounds.values()) >= TIGHT * total else "loose"
            print(f"{problem.name:<28}{who:<24}{total / len(problem):8.2f}{shares} ", end="")
            print(f"{area:8.3f}{seconds:9.1f}  {label}", flush=True)


if __name__ == "__main__":
    wanted = sys.argv[2:] or workloads.names()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, wanted)
