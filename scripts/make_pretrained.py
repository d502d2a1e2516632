"""Put trained agents into the package, each with a card.

    python scripts/make_pretrained.py RUNS [--episodes 64]

RUNS has a folder for each configuration (its name is the agent's), with a run of each seed in it, as
`llmsched train --run RUNS/NAME --seeds 0,1,2,3,4` leaves it. Of each, the agent that was best on the
validation episodes goes into agents/pretrained/NAME; the card reports all seeds, on episodes that no
training has seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

from agents.agent import Agent
from agents.comparison import METRICS, Row, compare
from agents.config import COSTS
from agents.runs import Run
from llmsched_env.errors import InputError, exit_with

LONG = 10_000  # decisions: fresh weights preempt for ever; all others are long through by then
FOLDER = Path(__file__).parents[1] / "agents" / "pretrained"


def best_of(runs: list[Run]) -> Run:
    """The run whose agent was best on the validation episodes."""

    def value(run: Run) -> float:
        metric = run.config.metric
        rows = run.read_rows("validation")
        found = [float(r[metric]) for r in rows if float(r["served"]) == 1.0 or not METRICS[metric].whole]
        if not found:
            return -np.inf
        return -min(found) if metric in COSTS else max(found)

    return max(runs, key=value)


def card(name: str, runs: list[Run], episodes: int) -> str:
    """What there is to know of an agent, as Markdown."""
    run = best_of(runs)
    config = run.config
    after = int(Agent.load(run.folder).about["steps"])
    found = compare(
        {
            "trained (all seeds)": ",".join(str(r.folder) for r in runs),
            "shipped": str(run.folder),
            "untrained": f"untrained:{run.folder}",
            **{rival: rival for rival in ("vllm-v1", *RIVALS.get(name, ()))},
        },
        config.scenario,
        num_episodes=episodes,
        metric=config.metric,
        max_steps=LONG,
    )
    curve = "\n".join(
        f"| {int(row['steps']):,} | {float(row[config.metric]):.4g} |" for row in run.read_rows("validation")
    )
    return CARD.format(
        name=name,
        env=config.env,
        scenario=config.scenario,
        metric=config.metric,
        steps=f"{config.steps:,}",
        after=f"{after:,}",
        before=" (what its teacher made of it)" if after == 0 and config.teacher else "",
        seeds=", ".join(str(r.config.seed) for r in runs),
        seed=run.config.seed,
        validation=config.validation_episodes,
        episodes=episodes,
        rows="\n".join(as_row(row) for row in found.rows),
        curve=curve,
    )


CARD = """# {name}

Acts in `{env}` on the scenario `{scenario}`; trained for `{metric}` with {steps} decisions. Seeds trained:
{seeds}; shipped is seed {seed}, the best on {validation} validation episodes, as it was after {after}
decisions{before}.

`{metric}` on {episodes} held-out episodes (the first after `reset(seed=1_000_000 + i)`), 95 % intervals:

| policy | mean | interval | better than vLLM V1 by |
|---|--:|--:|--:|
{rows}

Validation during the shipped training:

| decisions | {metric} |
|--:|--:|
{curve}

Limits: it is known to work on this scenario, with its load, engine and cost profile; elsewhere compare first
(`llmsched evaluate --policy pretrained:{name} --policy vllm-v1 --scenario ...`).

Made by `llmsched train` with the configuration in agent.json (`about.config`), and
`python scripts/make_pretrained.py`.
"""


def as_row(row: Row) -> str:
    """A policy's line of the table."""
    mean, gap = row.mean, row.difference
    return (
        f"| {row.policy} | {mean.value:.4g} | {mean.low:.4g} to {mean.high:.4g} "
        f"| {gap.value:+.3g} ({gap.low:+.3g} to {gap.high:+.3g}) |"
    )


# The strongest schedulers with the same information, on each scenario.
RIVALS = {
    "slo-mix": ("rank-i", "tuned:slo-mix-goodput"),
    "priorities": ("rank-i", "vllm-v1-priority", "tuned:priorities-goodput"),
    "azure-conv": ("rank-i", "tuned:azure-conv-goodput"),
    "azure-code": ("rank-i", "tuned:azure-code-goodput"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--episodes", type=int, default=64)
    options = parser.parse_args()
    for folder in sorted(path for path in options.runs.iterdir() if path.is_dir()):
        runs = [Run.open(path.parent) for path in sorted(folder.glob("*/config.yaml"))]
        if not runs:
            raise InputError(f"{folder} has no runs")
        run = best_of(runs)
        agent = Agent.load(run.folder)
        about = {key: value for key, value in agent.about.items() if key != "scores"}
        target = FOLDER / folder.name
        text = card(folder.name, runs, options.episodes)
        shutil.rmtree(target, ignore_errors=True)
        dataclasses.replace(agent, name=folder.name, about=about).save(target)
        (target / "README.md").write_text(text)
        print(target, json.dumps({"seeds": len(runs), "shipped": run.config.seed}))
    return 0


if __name__ == "__main__":
    exit_with(main)
