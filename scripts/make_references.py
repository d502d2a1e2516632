"""Compute what is known of the best schedules of scenarios' held-out episodes, and write it beside them.

    python scripts/make_references.py azure-conv slo-mix --seeds 16 --evaluations 100000

Of each episode, the first after `reset(seed=1_000_000 + i)`: the mean latency of the best schedule that the
search finds, a bound that no schedule beats, and the mean latency of vLLM V1. A schedule may cut prompts,
pause and preempt, as the environments allow it. With --evaluations the result is the same on every machine.
Writes FOLDER/NAME.json, by default where the package's scenarios look for it; a scenario names it in its
YAML: `references: references/NAME.json`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import baselines
from baselines import optimal
from baselines.optimal import Instance
from baselines.optimal.improve import improve
from llmsched_env import scenarios, simulate
from llmsched_env.errors import InputError, exit_with
from llmsched_env.scenarios import Reference, reference

FIRST_SEED = 1_000_000  # as agents.evaluation
FOLDER = Path(scenarios.__file__).with_name("data") / "references"


def reference_of(scenario: str, seed: int, time_limit_s: float, evaluations: int | None) -> Reference:
    """What is known of the first episode after `reset(seed=seed)`."""
    instance = Instance.of_scenario(scenario, seed)
    if evaluations is None:
        found = optimal.solve(instance, time_limit_s=time_limit_s)
        effort = f"{time_limit_s:g} s"
    else:
        found = improve(instance, time_limit_s=math.inf, max_evaluations=evaluations)
        effort = f"{evaluations} evaluations"
    n = len(instance)
    vllm = simulate(instance.requests, baselines.get("vllm-v1"), instance.profile, instance.engine)
    own = math.fsum(vllm.finish_s - instance.requests.arrival_s)
    method = f"{found.method}, {effort}"
    return Reference(
        best_known=min(found.objective, own) / n,
        bound=found.bound / n,
        vllm_v1=own / n,
        method=method if found.objective <= own else "vllm-v1",
        seed=seed,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("scenarios", nargs="+", help="names")
    parser.add_argument("--seeds", type=int, default=16, help="how many episodes of each")
    parser.add_argument("--first", type=int, default=FIRST_SEED, help="the first seed")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds of search an episode")
    parser.add_argument("--evaluations", type=int, help="schedules to try for an episode, instead of a time")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    for name in options.scenarios:
        if math.isfinite(scenarios.get(name).horizon_s):
            raise InputError(
                f"scenario {name} is a window of an endless stream: no optimum is defined for it"
            )
        rows = []
        for seed in range(options.first, options.first + options.seeds):
            row = reference_of(name, seed, options.time_limit, options.evaluations)
            rows.append(row)
            print(
                f"{name} {seed}: best known {row.best_known:.4f} s, bound {row.bound:.4f} s, "
                f"vLLM V1 {row.vllm_v1:.4f} s",
                flush=True,
            )
        options.folder.mkdir(parents=True, exist_ok=True)
        about = {
            "scenario": name,
            "what": "mean latencies in seconds",
            "made_by": "scripts/make_references.py",
        }
        reference.save(rows, options.folder / f"{name}.json", **about)
    return 0


if __name__ == "__main__":
    exit_with(main)
