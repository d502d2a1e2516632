"""Tune the priority rule for the main scenarios, and compare it on episodes that its search has not seen.

    python scripts/tune_rule.py --budget 4000 --output tuned
    python scripts/tune_rule.py slo-mix:goodput --length-info class

Prints a line for each scenario: vLLM V1, the named scheduler that does best on the validation episodes with
the same information, and the tuned rule, with paired 95 % intervals of the differences. Writes
FOLDER/NAME.json, a scheduler by the name tuned:FOLDER/NAME.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import baselines
from agents.comparison import METRICS, compare
from agents.tuning import best_named, tune
from baselines.bench import interval
from llmsched_env.errors import exit_with

MAIN = (
    "slo-mix:goodput",
    "priorities:goodput",
    "azure-conv:latency_s",
    "azure-code:latency_s",
    "reasoning:latency_s",
    "infermax-contention:latency_s",
    "multi-tenant:latency_s",
)


def line(name: str, metric: str, options: argparse.Namespace) -> str:
    """A row of the table; writes the parameters."""
    settings: dict[str, Any] = {"metric": metric, "length_info": options.length_info}
    began = time.perf_counter()
    found = tune(name, budget=options.budget, seed=options.seed, **settings)
    seconds = time.perf_counter() - began
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        found.save(options.output / f"{found.scenario}.json")
    rival = best_named(name, **settings)
    policies = {one: baselines.get(one) for one in dict.fromkeys(("vllm-v1", rival))}
    held = compare({**policies, "tuned": found.scheduler()}, name, options.episodes, **settings)
    vllm, best, own = (held.values(one)[0] for one in ("vllm-v1", rival, "tuned"))
    sign = 1 if METRICS[metric].larger else -1
    cells = [f"{name} {metric}", f"{vllm.mean():.4g}", f"{best.mean():.4g} ({rival})", f"{own.mean():.4g}"]
    for other in (vllm, best):
        mean, half = interval(sign * (own - other))
        cells.append(f"{mean:+.4g} ± {half:.2g} ({100 * mean / abs(other.mean()):+.1f} %)")
    return f"| {' | '.join(cells)} | {found.episodes} | {seconds:.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("scenarios", nargs="*", default=MAIN, help="NAME:METRIC")
    parser.add_argument("--budget", type=int, default=4000, help="episodes to simulate for each")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--episodes", type=int, default=48, help="of the comparison")
    parser.add_argument("--length-info", default="predicted", help="oracle, predicted, class or none")
    parser.add_argument("--output", type=Path, help="folder for the parameters")
    options = parser.parse_args()
    print(
        f"{options.episodes} held-out episodes each, lengths: {options.length_info}; a positive difference: "
        "the tuned rule is better"
    )
    columns = ("scenario", "vllm-v1", "best named", "tuned", "over vllm-v1", "over best named", "spent", "s")
    print(f"| {' | '.join(columns)} |\n| :-- |{' --: |' * (len(columns) - 1)}", flush=True)
    for spec in options.scenarios:
        name, _, metric = spec.partition(":")
        print(line(name, metric or "latency_s", options), flush=True)
    return 0


if __name__ == "__main__":
    exit_with(main)
