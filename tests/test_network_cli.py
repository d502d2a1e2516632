"""`llmsched network`: what it prints and writes is what the Python interface gives; bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import baselines
from agents.cli import main
from llmsched_env import networks
from llmsched_env.networks import simulate_network

RUN = ["network", "fork-join", "--jobs", "40", "--seed", "3", "--load", "0.9"]


def test_json_is_what_the_python_interface_gives(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--discipline", "plas", "--discipline", "oldest", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    result = simulate_network(networks.get("fork-join", load=0.9), "plas", jobs=40, seed=3)
    assert got["disciplines"]["plas"].pop("virtual_stations") == []  # known of fixed priorities only
    assert got["disciplines"]["plas"] == json.loads(json.dumps(result.metrics()))
    assert list(got["disciplines"]) == ["plas", "oldest"]
    assert got["pools"]["gpus"]["load"] == pytest.approx(0.9) and got["seed"] == 3


def test_virtual_stations_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["network", "rybko-stolyar", "--load", "0.9", "--discipline", "exit-first", "--jobs", "20"]
    assert main(run) == 0
    assert "come to exclude each other; their load together is 1.611: unstable" in capsys.readouterr().out
    assert main([*run, "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["disciplines"]["exit-first"]["virtual_stations"]
    assert one["load"] == pytest.approx(1.611, abs=1e-3) and len(one["classes"]) == 2


def test_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert main([*RUN, "--discipline", "plas:64", "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "nominal load" in printed and "plas:64" in printed and "40 of 40" in printed
    result = simulate_network(networks.get("fork-join", load=0.9), "plas:64", jobs=40, seed=3)
    jobs, calls = (pd.read_csv(folder / f"plas-64-{name}.csv") for name in ("jobs", "calls"))
    assert jobs["finish_s"].to_numpy() == pytest.approx(result.job_finish_s)
    assert calls["released_s"].to_numpy() == pytest.approx(result.released_s)
    assert (folder / "backlog.png").stat().st_size > 5000
    assert networks.get(folder / "network.json") == networks.get("fork-join", load=0.9)


def test_a_file_with_schedulers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    network = networks.get("fork-join", load=0.5).scheduled(baselines.get("vllm-v1"), "gpu-1")
    path.write_text(network.to_json(), encoding="utf-8")
    options = ["--jobs", "30", "--scheduler", "gpu-2=sarathi", "--json"]
    assert main(["network", str(path), *options]) == 0
    got = json.loads(capsys.readouterr().out)["disciplines"]["fcfs"]
    both = network.scheduled(baselines.get("sarathi"), "gpu-2")
    assert got["latency"] == simulate_network(both, jobs=30).metrics()["latency"]


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "networks"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in networks.names())
    assert main(["list", "disciplines"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in networks.disciplines.names())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["rybko"], "unknown network 'rybko'; did you mean 'rybko-stolyar'"),
        (["jsq", "--discipline", "fifo"], "unknown discipline 'fifo'"),
        (["jsq", "--discipline", "fcfs", "--discipline", "fcfs"], "is given twice"),
        (["jsq", "--scheduler", "engine-3=vllm-v1"], "unknown station of network jsq 'engine-3'"),
        (["jsq", "--scheduler", "vllm-v2"], "unknown scheduler 'vllm-v2'"),
        (["jsq", "--routing", "longest"], "unknown routing 'longest'"),
        (["jsq", "--load", "-1"], "load must be a positive number"),
        (["jsq", "--jobs", "0"], "num_jobs must be a whole number from 1"),
        (["jsq", "--horizon", "0"], "horizon_s must be positive seconds"),
        (["missing.json"], "cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["network", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and problem in said
