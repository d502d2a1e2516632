"""The benchmark: schedulers side by side on the same requests, over several loads and seeds.

Within a seed every scheduler sees the same requests (common random numbers), so that differences between
schedulers are far better known than the levels: `summarise` gives both, with 95 % confidence intervals over
the seeds. Predictions of lengths, for schedulers that use them, are the true lengths. A request that can
never fit under a scheduler (one that does not cut prompts, say) is turned away, as the real system does: the
table then says how many were served.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import baselines
from llmsched_env import EngineConfig, profiles, simulate, workloads
from llmsched_env.errors import InputError, unknown
from llmsched_env.files import require_writable_folder, writing
from llmsched_env.simulation import resolve
from llmsched_env.theory.capacity import capacity

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

BASELINE = "vllm-v1"
"""The scheduler that the others are compared with, seed by seed."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """What a benchmark runs: every scheduler on every case, load and seed.

    Attributes:
        cases: pairs of workload and cost profile.
        loads: offered loads, as shares of the engine's capacity for the workload.
        table_load: the one of them that the table and the frontier show.
        schedulers: names.
        num_requests: of one run.
        seeds: how many; seed i draws the same requests for every scheduler.
        ttft_target, tpot_target: seconds, for goodput.
    """

    name: str
    cases: tuple[tuple[str, str], ...]
    loads: tuple[float, ...]
    table_load: float
    schedulers: tuple[str, ...]
    num_requests: int
    seeds: int
    ttft_target: float = 2.0
    tpot_target: float = 0.1

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise InputError(f"seeds must be at least 1, not {self.seeds}")
        if self.num_requests < 1:
            raise InputError(f"num_requests must be at least 1, not {self.num_requests}")
        known = baselines.names()
        if not self.schedulers:
            raise InputError(f"no schedulers to compare; known: {', '.join(known)}")
        for name in self.schedulers:
            if name not in known:
                raise unknown("scheduler", name, known)
        object.__setattr__(self, "schedulers", tuple(dict.fromkeys(self.schedulers)))  # each once

    @property
    def runs(self) -> int:
        """How many simulations it is."""
        return len(self.cases) * len(self.loads) * self.seeds * len(self.schedulers)


QUICK = (
    "faster-transformer",
    "orca",
    "vllm-v0",
    "vllm-v1",
    "sarathi",
    "fastserve",
    "sglang",
    "trtllm-no-evict",
    "srf",
    "area-backfill",
)


UNSTABLE = ("dai-faster-transformer", "dai-orca", "dai-sarathi", "dai-vllm")
"""Set up in their paper to be unstable: left out of the full suite."""


def suite(name: str, *, schedulers: Sequence[str] = (), seeds: int | None = None) -> Suite:
    """The suite `quick` or `full`, perhaps with other schedulers or another number of seeds."""
    if name == "quick":
        return Suite(
            name,
            cases=(("azure-conv", "a100-llama3-8b"), ("azure-conv", "a100-llama2-7b")),
            loads=(0.3, 0.5, 0.7, 0.8, 0.9, 1.0),
            table_load=0.9,
            schedulers=tuple(schedulers) or QUICK,
            num_requests=2000,
            seeds=10 if seeds is None else seeds,
        )
    if name == "full":
        return Suite(
            name,
            cases=(
                ("azure-conv", "a100-llama3-8b"),
                ("azure-conv", "a100-llama2-7b"),
                ("azure-code", "h100-llama3-8b"),
                ("chatbot-arena", "a100-llama2-7b"),
                ("arxiv-summarization", "a100-llama2-70b-tp4"),
                ("deepseek-r1", "h100-llama2-70b-tp4"),
            ),
            loads=(0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.1),
            table_load=0.9,
            schedulers=tuple(schedulers) or tuple(name for name in baselines.names() if name not in UNSTABLE),
            num_requests=3000,
            seeds=10 if seeds is None else seeds,
        )
    raise unknown("suite", name, ("quick", "full"))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a suite gave.

    Attributes:
        suite: what was run.
        runs: a frame with a row for each run: workload, profile, load, seed, scheduler, `error` (empty when
            it went well) and the flattened metrics, such as `latency_mean`; times in seconds.
    """

    suite: Suite
    runs: pd.DataFrame

    @property
    def failures(self) -> list[str]:
        """A line for each case and scheduler with failed runs: how many, and why the first of them."""
        failed = self.runs[self.runs["error"] != ""]
        lines = []
        for (workload, profile, scheduler), group in failed.groupby(
            ["workload", "profile", "scheduler"], sort=False
        ):
            first = group.iloc[0]
            where = f"load {first['load']:g}, seed {first['seed']}"
            what = f"{len(group)} runs failed, the first ({where}) with {first['error']}"
            lines.append(f"{scheduler} on {workload}, {profile}: {what}")
        return lines


def run(
    suite: Suite, *, progress: Callable[[int], None] = lambda n: None, threads: int | None = None
) -> Outcome:
    """Run a suite.

    Args:
        progress: called with the number of runs done so far, after each; never by two threads at once.
        threads: how many runs go on at once (the compiled simulator releases the GIL); None: as many as there
            are cores, at most 8. The result does not depend on it.

    A run that fails is kept with its error; the others go on.
    """
    import pandas as pd

    lock = threading.Lock()
    done = 0

    def count() -> None:
        nonlocal done
        with lock:
            done += 1
            progress(done)

    def work(point: tuple[str, str, float, int]) -> list[dict[str, Any]]:
        return _compare(suite, *point, count)

    points = [
        (*case, load, seed) for case in suite.cases for load in suite.loads for seed in range(suite.seeds)
    ]
    pool = ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8))
    try:
        rows = [row for rows in pool.map(work, points) for row in rows]
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for what has not begun
    return Outcome(suite, pd.DataFrame(rows))


def _compare(
    suite: Suite, workload: str, profile: str, load: float, seed: int, count: Callable[[], None]
) -> list[dict[str, Any]]:
    """Every scheduler of the suite on the same requests: a row each."""
    recipe = workloads.get(workload, num_requests=suite.num_requests, load=load, seed=seed)
    requests = recipe.draw(capacity_rps(workload, profile))
    rows = []
    for name in suite.schedulers:
        row: dict[str, Any] = {"workload": workload, "profile": profile, "load": load, "seed": seed}
        row |= {"scheduler": name, "error": ""}
        try:
            result = simulate(requests, baselines.get(name), profile, seed=seed, oversized="drop")
            row |= flat(result.metrics(ttft_target=suite.ttft_target, tpot_target=suite.tpot_target))
        except Exception as error:  # whatever it is, it must not take the other runs with it
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        count()
    return rows


def capacity_rps(workload: str, profile: str) -> float:
    """Requests/s that loads are shares of: those of the engine as the baseline sets it up."""
    cost = profiles.get(profile)
    engine = resolve(EngineConfig(), baselines.get(BASELINE), cost)
    return capacity(workloads.get(workload).moments(), cost.time, engine).rps


def flat(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics with distributions laid out as columns: `latency_mean`, `latency_p50`, ..."""
    row: dict[str, Any] = {}
    for name, value in metrics.items():
        row |= {f"{name}_{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return row


def summarise(outcome: Outcome) -> pd.DataFrame:
    """A row for each workload, profile, load and scheduler.

    For every metric x of the runs: `x`, the mean over seeds, and `x_ci`, half the width of its 95 % interval;
    and for the mean latency and the 99th percentiles of TTFT and TPOT `x_change` and `x_change_ci`: by how
    much they differ from the baseline on the same requests, as a share of it. nan where a run failed or there
    is a single seed.
    """
    import pandas as pd

    runs = outcome.runs
    keys = ["workload", "profile", "load", "scheduler"]
    metrics = [c for c in runs.columns if c not in (*keys, "seed", "error")]
    if not metrics:
        return runs[keys].drop_duplicates().assign(seeds=0, failed=outcome.suite.seeds)
    base = runs[runs["scheduler"] == BASELINE].set_index(["workload", "profile", "load", "seed"])[metrics]
    rows = []
    for key, group in runs.groupby(keys, sort=False):
        well = group[group["error"] == ""]
        row = dict(zip(keys, key, strict=True), seeds=len(well), failed=len(group) - len(well))
        for metric in metrics:
            row[metric], row[f"{metric}_ci"] = interval(well[metric])
        paired = base.reindex(pd.MultiIndex.from_frame(group[["workload", "profile", "load", "seed"]]))
        for metric in ("latency_mean", "ttft_p99", "tpot_p99"):
            change = group[metric].to_numpy() / paired[metric].to_numpy() - 1
            row[f"{metric}_change"], row[f"{metric}_change_ci"] = interval(change[~np.isnan(change)])
        rows.append(row)
    return pd.DataFrame(rows)


# Student's t, 97.5 %, for 1 to 10 degrees of freedom.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table its expansion about the normal, good to 1e-4."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    terms = (z**3 + z, 5 * z**5 + 16 * z**3 + 3 * z, 3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z)
    return z + sum(t / (d * freedom**k) for k, (t, d) in enumerate(zip(terms, (4, 96, 384), strict=True), 1))


def interval(values: Iterable[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval by Student's t; nan for too few values."""
    x = np.asarray(list(values), dtype=np.float64)
    n = len(x)
    if n == 0:
        return math.nan, math.nan
    if n == 1:
        return float(x[0]), math.nan
    t = _student(n - 1)
    return float(x.mean()), float(t * x.std(ddof=1) / math.sqrt(n))


@dataclasses.dataclass(frozen=True)
class CaseTable:
    """The schedulers on one case at the suite's `table_load`, best mean latency first; all cells are text."""

    title: str
    note: str
    headings: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        view = Table(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for i, heading in enumerate(self.headings):
            view.add_column(heading, justify="right" if i else "left", no_wrap=i == 0)
        for row in self.rows:
            view.add_row(*row)
        return view

    def markdown(self) -> str:
        """For a README."""
        rule = [":--"] + ["--:"] * (len(self.headings) - 1)
        lines = (f"| {' | '.join(cells)} |\n" for cells in (self.headings, rule, *self.rows))
        return f"{self.title}; {self.note}.\n\n{''.join(lines)}"


def tables(outcome: Outcome, summary: pd.DataFrame) -> list[CaseTable]:
    """A table for each case of the suite."""
    return [_table(outcome.suite, workload, profile, summary) for workload, profile in outcome.suite.cases]


def _table(suite: Suite, workload: str, profile: str, summary: pd.DataFrame) -> CaseTable:
    rows = summary.query("workload == @workload and profile == @profile and load == @suite.table_load")
    if "latency_mean" in rows:
        # Who turns requests away comes last: the latency is of those served.
        rows = rows.sort_values(["finished", "latency_mean"], ascending=[False, True], na_position="last")
    columns: dict[str, Callable[[pd.Series], str]] = {
        "scheduler": lambda r: r["scheduler"] + (f" ({r['failed']} failed)" if r["failed"] else ""),
        "latency s": lambda r: _with_interval(r, "latency_mean", "{:.2f}"),
        f"against {BASELINE} %": lambda r: (
            "" if r["scheduler"] == BASELINE else _with_interval(r, "latency_mean_change", "{:+.1f}", 100)
        ),
        "TTFT p50 s": lambda r: f"{r['ttft_p50']:.3f}",
        "TTFT p99 s": lambda r: _with_interval(r, "ttft_p99", "{:.2f}"),
        "TPOT p50 ms": lambda r: f"{1000 * r['tpot_p50']:.1f}",
        "TPOT p99 ms": lambda r: _with_interval(r, "tpot_p99", "{:.1f}", 1000),
        "goodput /s": lambda r: f"{r['goodput_rps']:.2f}",
        "preemptions": lambda r: f"{r['preemptions']:.0f}",
        "GPU-s per 1k tokens": lambda r: f"{r['gpu_s_per_1k_tokens']:.3f}",
    }
    if "finished" in rows and (rows["finished"].dropna() < suite.num_requests).any():
        columns["served %"] = lambda r: f"{100 * r['finished'] / suite.num_requests:.1f}"
    return CaseTable(
        title=f"{workload} on {profile}, load {suite.table_load:g} of {capacity_rps(workload, profile):.2f} "
        f"requests/s: {suite.num_requests} requests, {suite.seeds} seeds, 95 % intervals",
        note=f"goodput: requests/s with TTFT up to {suite.ttft_target:g} s and TPOT up to "
        f"{1000 * suite.tpot_target:g} ms; lengths predicted for schedulers that ask are the true ones",
        headings=list(columns),
        rows=[
            [
                cell(row) if row["seeds"] else ("failed" if i else row["scheduler"])
                for i, cell in enumerate(columns.values())
            ]
            for _, row in rows.iterrows()
        ],
    )


def _with_interval(row: pd.Series, name: str, form: str, scale: float = 1.0) -> str:
    value, half = scale * row[name], scale * row[f"{name}_ci"]
    if math.isnan(value):
        return "-"
    return form.format(value) + ("" if math.isnan(half) else " ± " + form.replace("+", "").format(half))


def save(outcome: Outcome, summary: pd.DataFrame, folder: str | Path) -> list[Path]:
    """Write runs.csv, summary.csv, table.md, latency.png and frontier.png into `folder`: all, or none.

    Raises:
        InputError: the folder cannot be made or written.
    """
    from baselines import plots

    folder = Path(folder)
    require_writable_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Path], object]] = {
        "runs.csv": lambda path: outcome.runs.to_csv(path, index=False),
        "summary.csv": lambda path: summary.to_csv(path, index=False),
        "table.md": lambda path: path.write_text("\n".join(t.markdown() for t in tables(outcome, summary))),
    }
    if "latency_mean" in summary:
        writers["latency.png"] = lambda path: plots.latency(outcome.suite, summary, path)
        writers["frontier.png"] = lambda path: plots.frontier(outcome.suite, summary, path)
    with ExitStack() as stack:
        for name, write in writers.items():
            write(stack.enter_context(writing(folder / name)))
    return [folder / name for name in writers]
