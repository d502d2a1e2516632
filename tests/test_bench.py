"""The benchmark with a few small runs."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import baselines
from agents.cli import main
from baselines import bench, plots
from llmsched_env.errors import InputError

SMALL = bench.Suite(
    "small",
    cases=(("azure-conv", "a100-llama3-8b"),),
    loads=(0.5, 0.9),
    table_load=0.9,
    schedulers=("vllm-v1", "sarathi", "orca"),
    num_requests=60,
    seeds=3,
)


@pytest.fixture(scope="module")
def outcome() -> bench.Outcome:
    return bench.run(SMALL)


def test_every_scheduler_runs_on_every_load_and_seed(outcome: bench.Outcome) -> None:
    assert len(outcome.runs) == SMALL.runs == 2 * 3 * 3
    assert outcome.failures == []
    assert (outcome.runs["finished"] == 60).all()
    # Common random numbers: within a load and seed all have served the same tokens.
    served = (outcome.runs["total_tokens_per_s"] / outcome.runs["throughput_rps"]).round(6)
    assert served.groupby([outcome.runs["load"], outcome.runs["seed"]]).nunique().eq(1).all()


def test_the_result_does_not_depend_on_threads(outcome: bench.Outcome) -> None:
    pd.testing.assert_frame_equal(outcome.runs, bench.run(SMALL, threads=1).runs)


def test_progress_counts_up() -> None:
    seen: list[int] = []
    bench.run(dataclasses.replace(SMALL, loads=(0.5,), seeds=1), progress=seen.append)
    assert seen == [1, 2, 3]


def test_summary_gives_means_intervals_and_paired_differences(outcome: bench.Outcome) -> None:
    summary = bench.summarise(outcome)
    assert len(summary) == 6
    runs = outcome.runs.query("load == 0.9").set_index(["scheduler", "seed"])["latency_mean"]
    row = summary.query("load == 0.9 and scheduler == 'orca'").iloc[0]
    values = runs["orca"].to_numpy()
    half = stats.t.ppf(0.975, 2) * stats.sem(values)
    assert row["latency_mean"] == pytest.approx(values.mean())
    assert row["latency_mean_ci"] == pytest.approx(half, rel=1e-4)
    change = values / runs["vllm-v1"].to_numpy() - 1
    assert row["latency_mean_change"] == pytest.approx(change.mean())
    assert row["latency_mean_change_ci"] == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(change), rel=1e-4)
    base = summary.query("scheduler == 'vllm-v1'")
    assert (base["latency_mean_change"] == 0).all() and (base["latency_mean_change_ci"] == 0).all()


@pytest.mark.parametrize("n", [2, 3, 5, 11, 12, 20, 40, 200])
def test_interval_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(3, 2, n)
    mean, half = bench.interval(values)
    assert mean == pytest.approx(values.mean())
    assert half == pytest.approx(stats.t.ppf(0.975, n - 1) * stats.sem(values), rel=1e-4)


def test_interval_of_few_values() -> None:
    assert all(map(math.isnan, bench.interval([])))
    mean, half = bench.interval([2.0])
    assert mean == 2.0 and math.isnan(half)


def failing(monkeypatch: pytest.MonkeyPatch, *broken: str) -> None:
    get = baselines.get

    def get_or_fail(name: str, **settings: Any) -> Any:
        if name in broken:
            raise RuntimeError("it broke")
        return get(name, **settings)

    monkeypatch.setattr(baselines, "get", get_or_fail)


def test_a_failed_run_is_reported_and_nothing_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, "orca")
    outcome = bench.run(SMALL)
    what = "6 runs failed, the first (load 0.5, seed 0) with RuntimeError: it broke"
    assert outcome.failures == [f"orca on azure-conv, a100-llama3-8b: {what}"]
    summary = bench.summarise(outcome)
    assert summary.query("scheduler == 'sarathi'")["latency_mean"].notna().all()
    assert summary.query("scheduler == 'orca'")["failed"].tolist() == [3, 3]
    assert len(bench.save(outcome, summary, tmp_path)) == 5
    (table,) = bench.tables(outcome, summary)
    assert len(table.rows) == table.rich().row_count == 3
    assert table.rows[-1] == ["orca"] + ["failed"] * (len(table.headings) - 1)
    assert table.markdown().count("\n") == 7


def test_when_all_fail_there_are_no_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "simulate", lambda *a, **k: (_ for _ in ()).throw(InputError("no")))
    outcome = bench.run(SMALL)
    summary = bench.summarise(outcome)
    assert (outcome.runs["error"] == "InputError: no").all()
    assert len(outcome.failures) == 3
    assert [path.name for path in bench.save(outcome, summary, tmp_path)] == [
        "runs.csv",
        "summary.csv",
        "table.md",
    ]
    assert len(bench.tables(outcome, summary)[0].rows) == 3


def test_saved_files(outcome: bench.Outcome, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    paths = bench.save(outcome, bench.summarise(outcome), folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths)
    assert {path.name for path in paths} == {
        "runs.csv",
        "summary.csv",
        "table.md",
        "latency.png",
        "frontier.png",
    }
    back = pd.read_csv(folder / "runs.csv", float_precision="round_trip")
    np.testing.assert_array_equal(back["latency_mean"], outcome.runs["latency_mean"])
    for name in ("latency.png", "frontier.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_all_files_are_saved_or_none(
    outcome: bench.Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(suite: bench.Suite, summary: pd.DataFrame, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plots, "frontier", write_half)  # the last of them
    (tmp_path / "runs.csv").write_text("old")
    with pytest.raises(InputError, match=r"cannot write .*frontier\.png: No space left on device"):
        bench.save(outcome, bench.summarise(outcome), tmp_path)
    assert os.listdir(tmp_path) == ["runs.csv"]
    assert (tmp_path / "runs.csv").read_text() == "old"


@pytest.mark.parametrize(
    "changes", [{"seeds": 1}, {"loads": (0.9,)}, {"schedulers": ("sarathi",)}, {"num_requests": 1}]
)
def test_the_smallest_suites_can_be_drawn(changes: dict[str, Any], tmp_path: Path) -> None:
    outcome = bench.run(dataclasses.replace(SMALL, **changes))
    summary = bench.summarise(outcome)
    assert len(bench.save(outcome, summary, tmp_path)) == 5
    assert bench.tables(outcome, summary)


def test_who_turns_requests_away_is_counted_and_not_drawn(tmp_path: Path) -> None:
    suite = dataclasses.replace(SMALL, schedulers=("sarathi-nocp",), num_requests=200)
    outcome = bench.run(suite)
    summary = bench.summarise(outcome)
    assert (summary["finished"] < 200).all()
    (table,) = bench.tables(outcome, summary)
    assert table.headings[-1] == "served %" and 50 < float(table.rows[0][-1]) < 100
    assert len(bench.save(outcome, summary, tmp_path)) == 5


def test_schedulers_far_from_each_other_can_be_drawn(tmp_path: Path, outcome: bench.Outcome) -> None:
    summary = bench.summarise(outcome)
    first, second = (summary["scheduler"] == name for name in ("sarathi", "orca"))
    summary.loc[first, "ttft_p99"] *= 1000
    summary.loc[second, "tpot_p99"] *= 1000
    plots.frontier(SMALL, summary[first | second], tmp_path / "far.png")
    assert (tmp_path / "far.png").stat().st_size > 0


def test_pareto() -> None:
    points = [(1.0, 9.0), (2.0, 9.5), (3.0, 4.0), (3.0, 5.0), (4.0, 4.0), (9.0, 1.0)]
    assert plots.pareto(points) == [(1.0, 9.0), (3.0, 4.0), (9.0, 1.0)]
    assert plots.pareto([]) == []


@pytest.mark.parametrize("name", ["quick", "full"])
def test_suites(name: str) -> None:
    suite = bench.suite(name)
    assert suite.table_load in suite.loads
    assert bench.BASELINE in suite.schedulers
    assert bench.suite(name, schedulers=["sarathi", "sarathi"], seeds=2).schedulers == ("sarathi",)
    assert bench.suite(name, seeds=2).seeds == 2
    assert set(bench.suite("full").schedulers) | set(bench.UNSTABLE) == set(baselines.names())


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "suite", lambda name, schedulers, seeds: SMALL)
    assert main(["bench", "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "vllm-v1" in out and str(tmp_path / "out" / "latency.png") in out
    failing(monkeypatch, "sarathi")
    assert main(["bench", "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("failed: sarathi on azure-conv, a100-llama3-8b: 6 runs")
