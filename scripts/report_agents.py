"""What agents learned: trains what is not trained yet, and prints every table.

    python scripts/report_agents.py [train] [control] [rivals] [gap] [matrix] [ablations] [curves]
        [--runs runs] [--seeds 5] [--episodes 48] [--jobs 2] [--only CASE ...] [--json FILE]

Without names all parts. A part that needs runs (RUNS/CONFIGURATION/seed-N) trains those that are missing.
Every figure is over all seeds and over held-out episodes, the same for all policies, with 95 % intervals;
differences are paired by episode.

    train      all presets
    control    lengths known, mean latency: against area-backfill and an untrained network
    rivals     requests in time: against the tuned rule, and the best here of the three named schedulers that
               know as much and do best on the validation episodes
    gap        mean latency: the share of the way from vLLM V1 to the best known schedules
    matrix     what was trained on one scenario, on the others; at other loads, on other GPUs, with other
               predictions of lengths
    ablations  azure-code without what its preset has: the pointer network, masks, the teacher, its
               corrections, the leave-one-out baseline, misses told when they happen
    curves     what each training validated at, as a table and a picture (RUNS/curves.png), and how many
               collapsed
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

import baselines
from agents.cluster import train_all
from agents.comparison import Comparison, compare, matrix
from agents.config import COSTS, Config, preset_names
from agents.runs import Run
from llmsched_env.errors import InputError, exit_with, unknown
from llmsched_env.files import writing

RIVALS = ("azure-code", "slo-mix", "priorities", "azure-conv")
CASES: dict[str, dict[str, Any]] = {  # of the ablations: what is changed
    "as preset": {},
    "mlp": {"network": "mlp"},
    "no masks in PPO": {"algo": "ppo"},
    "no teacher": {"teacher": "", "teacher_rounds": 0},
    "no corrections": {"teacher_rounds": 0, "teacher_episodes": 80, "teacher_epochs": 9},  # as many steps
    "no leave-one-out": {"lanes_per_trace": 1},
    "goodput, not violations": {"objective": "goodput"},
}
_LONG = 10_000  # steps: who learned nothing preempts for ever; all others are long through by then
PARTS = ("train", "control", "rivals", "gap", "matrix", "ablations", "curves")


class Report:
    """Runs in a folder, and what is said of them."""

    def __init__(self, runs: Path, seeds: int, episodes: int, jobs: int, only: list[str]) -> None:
        self.runs, self.seeds, self.episodes, self.jobs = runs, seeds, episodes, jobs
        self.only = only

    def trained(self, name: str, config: Config) -> str:
        """The policy that a configuration became, over all seeds; trained if it is not."""
        configs = {f"{name}/seed-{seed}": config.replace(seed=seed) for seed in range(self.seeds)}
        train_all(configs, self.runs, jobs=self.jobs)
        return ",".join(str(self.runs / of) for of in configs)

    def untrained(self, name: str) -> str:
        """The same with fresh weights."""
        return "untrained:" + ",".join(str(self.runs / name / f"seed-{seed}") for seed in range(self.seeds))

    # -------------------------------------------------------------------- parts

    def train(self) -> Iterator[Comparison]:
        for name in preset_names():
            self.trained(name, Config.preset(name))
        yield from ()

    def control(self) -> Iterator[Comparison]:
        name = "known-lengths"
        policies = {"trained": self.trained(name, Config.preset(name)), "untrained": self.untrained(name)}
        for rival in ("area-backfill", "svf", "vllm-v1"):
            policies[rival] = rival
        yield compare(policies, "azure-conv", self.episodes, baseline="area-backfill", length_info="oracle")

    def rivals(self) -> Iterator[Comparison]:
        for name in RIVALS:
            config = Config.preset(name)
            policies = {
                "trained": self.trained(name, config),
                "tuned rule": config.teacher,  # in 4,000 episodes (`scripts/tune_rule.py`)
                "vllm-v1": "vllm-v1",
            }
            best = strongest(config, self.episodes)
            policies |= {rival: rival for rival in best if rival != "vllm-v1"}
            found = compare(policies, config.scenario, self.episodes, metric=config.metric)
            means = {row.policy: row.mean.value for row in found.rows}  # of goodput
            yield found.against(max(best, key=means.__getitem__))
            yield found.against("tuned rule")

    def gap(self) -> Iterator[Comparison]:
        for name in RIVALS:
            policies = {"trained for goodput": self.trained(name, Config.preset(name)), "vllm-v1": "vllm-v1"}
            for rival in ("area-backfill", "sjf-prompt", "rank-i", "srpt"):
                policies[rival] = rival
            yield compare(policies, name, 16)  # the episodes that carry a reference

    def matrix(self) -> Iterator[Any]:
        policies = {f"of {name}": self.trained(name, Config.preset(name)) for name in RIVALS}
        policies |= {"vllm-v1": "vllm-v1", "rank-i": "rank-i", "sjf-prompt": "sjf-prompt"}
        episodes = max(8, self.episodes // 3)
        keywords: dict[str, Any] = {"metric": "goodput", "max_steps": _LONG}
        yield matrix(policies, RIVALS, num_episodes=episodes, **keywords)
        for key, values in (
            ("load", [0.7, 0.9, 1.3]),
            ("profile", ["a100-llama3-8b", "h100-llama3-8b"]),
            ("prediction", ["oracle", "lognormal:0.5", "lognormal:1.0"]),
        ):
            yield matrix(policies, ["azure-conv"], {key: values}, episodes, **keywords)

    def ablations(self) -> Iterator[Comparison]:
        base = Config.preset("azure-code")
        policies = {
            label: self.trained(
                f"ablation-{label.replace(',', '').replace(' ', '-')}" if changes else "azure-code",
                base.replace(**changes),
            )
            for label, changes in CASES.items()
            if not self.only or label in self.only
        }
        baseline = "as preset" if "as preset" in policies else next(iter(policies))
        keywords: dict[str, Any] = {"metric": base.metric, "max_steps": _LONG}
        yield compare(policies, base.scenario, self.episodes, baseline=baseline, **keywords)

    def curves(self) -> Iterator[Curves]:
        names = ["known-lengths", *RIVALS]
        for name in names:
            self.trained(name, Config.preset(name))
        found = {
            name: [Run.open(self.runs / name / f"seed-{seed}") for seed in range(self.seeds)]
            for name in names
        }
        yield Curves(found, self.runs / "curves.png")


class Curves:
    """What trainings validated at, over their decisions; by preset, a run for each seed."""

    def __init__(self, runs: dict[str, list[Run]], path: Path) -> None:
        self.runs = runs
        self._draw(path)

    def to_dict(self) -> dict[str, Any]:
        """For each preset: the metric, decisions, and values, a list for each seed."""
        return {name: self._values(runs) for name, runs in self.runs.items()}

    @staticmethod
    def _values(runs: list[Run]) -> dict[str, Any]:
        metric = runs[0].config.metric
        rows = [run.read_rows("validation") for run in runs]
        return {
            "metric": metric,
            "vllm_v1": float(rows[0][0]["vllm_v1"]),
            "decisions": [int(row["steps"]) for row in rows[0]],
            "values": [[float(row[metric]) for row in of] for of in rows],
        }

    def table(self) -> Table:
        """Medians over seeds; collapsed: its last network is worse than vLLM V1."""
        table = Table("preset", "metric", "decisions", "vLLM V1", "at first", "best", "last", "collapsed")
        for name, found in self.to_dict().items():
            values, costs = found["values"], found["metric"] in COSTS
            best = [min(of) if costs else max(of) for of in values]
            worse = [(of[-1] > found["vllm_v1"]) == costs for of in values]
            table.add_row(
                name,
                found["metric"],
                f"{found['decisions'][-1]:,}",
                f"{found['vllm_v1']:.4g}",
                f"{np.median([of[0] for of in values]):.4g}",
                f"{np.median(best):.4g}",
                f"{np.median([of[-1] for of in values]):.4g}",
                f"{sum(worse)} of {len(values)}",
            )
        return table

    def _draw(self, path: Path) -> None:
        figure = Figure(figsize=(3.2 * len(self.runs), 3), layout="constrained")
        for axes, (name, found) in zip(
            np.atleast_1d(figure.subplots(1, len(self.runs))), self.to_dict().items(), strict=True
        ):
            for of in found["values"]:
                axes.plot(found["decisions"], of, color="tab:blue", linewidth=0.7, alpha=0.6)
            axes.plot(found["decisions"], np.median(found["values"], axis=0), color="tab:blue")
            axes.axhline(found["vllm_v1"], color="black", linestyle=":", linewidth=1)
            axes.set_title(f"{name}: {found['metric']}", fontsize=9)
            axes.set_xlabel("decisions", fontsize=8)
            axes.ticklabel_format(axis="x", style="sci", scilimits=(3, 3))
            axes.tick_params(labelsize=8)
        with writing(path) as temporary:
            figure.savefig(temporary, dpi=110)


def strongest(config: Config, episodes: int) -> list[str]:
    """The three named schedulers that do best there with the same information, on validation episodes."""
    from agents.evaluation import VALIDATION_SEED

    found = compare(
        [name for name in baselines.names() if name != "random-feasible"],
        config.scenario,
        episodes,
        seed=VALIDATION_SEED,
        metric=config.metric,
    )
    rows = [row for row in found.rows if row.finished == 1.0]
    return [row.policy for row in sorted(rows, key=lambda row: -row.improvement.value)[:3]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=48)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="some of the ablations")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS:
            raise InputError(f"unknown part {part!r}; parts are {', '.join(PARTS)}")
    for label in options.only:
        if label not in CASES:
            raise unknown("case", label, CASES)
    if options.seeds < 1:
        raise InputError(f"--seeds must be at least 1, not {options.seeds}")
    options.runs.mkdir(parents=True, exist_ok=True)
    report = Report(options.runs, options.seeds, options.episodes, options.jobs, options.only)
    told: dict[str, list[Any]] = {}
    for part in options.parts or PARTS:
        for found in getattr(report, part)():
            print_table(found)
            told.setdefault(part, []).append(found.to_dict())
            if options.json:
                options.json.write_text(json.dumps(told))
    return 0


def print_table(found: Any) -> None:
    """In lines as long as they need to be."""
    from rich.console import Console

    Console(width=180).print(found.table())
    sys.stdout.flush()


if __name__ == "__main__":
    exit_with(main)
