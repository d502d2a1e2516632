"""The command line, called as a function (which is all that the console script does) and as a program."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import baselines
from agents.cli import main
from llmsched_env import EngineConfig, profiles, simulate, workloads

WHO = ["--scheduler", "sarathi", "--profile", "a100-llama3-8b"]
WORKLOAD = ["--workload", "azure-conv", "--num-requests", "40", "--load", "0.8", "--seed", "3"]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0.0,100,5\n0.5,200,10\n0.75,50,1\n")
    return path


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# -- what it does --------------------------------------------------------------------------------------------


def test_simulate_prints_what_the_python_interface_gives(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *WORKLOAD, *WHO, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    workload = workloads.get("azure-conv", num_requests=40, load=0.8, seed=3)
    result = simulate(workload, baselines.get("sarathi"), "a100-llama3-8b", seed=3)
    expected = json.loads(json.dumps(result.metrics()))
    for key in ("requests", "iterations", "preemptions", "recomputed_tokens", "makespan_s", "gpu_busy_s"):
        assert got[key] == expected[key], key
    for key in ("latency", "ttft", "tpot"):
        assert list(got[key]) == ["mean", "p50", "p90", "p99"]
        assert got[key] == expected[key], key
    assert (got["scheduler"], got["profile"], got["requests"]) == ("sarathi", "a100-llama3-8b", 40)


def test_csv_files_add_up(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests, iterations = tmp_path / "requests.csv", tmp_path / "iterations.csv"
    arguments = ["simulate", "--trace", str(trace), *WHO, "--json"]
    assert main([*arguments, "--requests-csv", str(requests), "--iterations-csv", str(iterations)]) == 0
    summary = json.loads(capsys.readouterr().out)

    rows = lines(requests)
    assert list(rows[0]) == (
        [
            "request_id",
            "arrival_s",
            "prompt_tokens",
            "output_tokens",
            "first_token_s",
            "finish_s",
            "preemptions",
        ]
    )
    latencies = [float(row["finish_s"]) - float(row["arrival_s"]) for row in rows]
    assert [row["prompt_tokens"] for row in rows] == ["100", "200", "50"]
    assert summary["latency"]["mean"] == pytest.approx(sum(latencies) / 3)

    steps = lines(iterations)
    assert list(steps[0]) == [
        "start_s",
        "end_s",
        "prefill_tokens",
        "decode_requests",
        "kv_tokens",
        "preempted",
    ]
    assert len(steps) == summary["iterations"]
    assert sum(int(step["prefill_tokens"]) for step in steps) == 350
    assert sum(int(step["decode_requests"]) for step in steps) == 4 + 9 + 0
    busy = sum(float(step["end_s"]) - float(step["start_s"]) for step in steps)
    assert busy == pytest.approx(summary["gpu_busy_s"])
    assert {path.name for path in tmp_path.iterdir()} == {"trace.csv", "requests.csv", "iterations.csv"}


def test_settings_reach_the_run(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kv-tokens", "1000", "--block-size", "8", "--token-budget", "64", "--max-num-seqs", "2"]
    extra = ["--set", "watermark=0.05", "--set", "resume=end"]
    assert main(["simulate", "--trace", str(trace), *WHO, *options, *extra, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    engine = EngineConfig(kv_blocks=125, block_size=8, token_budget=64, max_num_seqs=2, watermark=0.05)
    result = simulate(
        workloads.trace(trace), baselines.get("sarathi", resume="end"), "a100-llama3-8b", engine
    )
    assert got["makespan_s"] == result.makespan_s
    assert got["iterations"] == result.iterations_total


def test_workload_options(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--trace", str(trace), *WHO, "--json"]
    assert main([*arguments, "--workload-set", "window=0.5,2", "--workload-set", "max_prompt=60"]) == 0
    got = json.loads(capsys.readouterr().out)
    result = simulate(workloads.trace(trace, window=(0.5, 2), max_prompt=60), baselines.get("sarathi"))
    assert got["requests"] == 2
    assert got["makespan_s"] == result.makespan_s


@pytest.mark.filterwarnings("always::llmsched_env.workloads.traces.TraceWarning")
def test_a_trace_is_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n5,10,2\n0,10,2\n7,0,2\n")
    arguments = ["simulate", "--trace", str(path), *WHO, "--json"]
    for options, hint in (([], "(--sort)"), (["--sort"], "(--drop-bad)")):
        assert main([*arguments, *options]) == 2
        assert hint in capsys.readouterr().err
    for options, served in ((["--drop-bad"], 1), (["--sort", "--drop-bad"], 2)):
        assert main([*arguments, *options]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)["requests"] == served
        assert captured.err.startswith("warning: ") and captured.err.count("\n") == 1


def test_simulate_prints_a_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--trace", str(trace), *WHO, "--ttft-target", "1"]) == 0
    out = capsys.readouterr().out
    for word in ("makespan_s", "goodput_rps", "ttft s", "p99"):
        assert word in out


def test_nothing_that_json_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "one.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,1\n")  # one token: no TPOT
    assert main(["simulate", "--trace", str(trace), *WHO, "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["tpot"]["mean"] is None
    assert "NaN" not in out


@pytest.mark.parametrize("kind", ["schedulers", "workloads", "profiles"])
def test_list(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"schedulers": baselines.names, "workloads": workloads.names, "profiles": profiles.names}[kind]()
    assert main(["list", kind]) == 0
    out = capsys.readouterr().out
    assert all(any(line.startswith(f"{name} ") for line in out.splitlines()) for name in names)
    assert main(["list"]) == 0
    assert out in capsys.readouterr().out


def test_profiles_are_listed_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles"]) == 0
    assert "a100-llama3-8b" in capsys.readouterr().out
    picture = tmp_path / "profile.png"
    assert main(["profiles", "show", "a100-llama3-8b", "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "483,328" in capsys.readouterr().out


@pytest.mark.slow
def test_every_profile_can_be_shown(tmp_path: Path) -> None:
    for name in profiles.names():
        assert main(["profiles", "show", name, "--output", str(tmp_path / f"{name}.png")]) == 0


# -- bad input: one line, exit code 2, nothing written -------------------------------------------------------

GOOD = "arrival_s,prompt_tokens,output_tokens\n0.0,100,5\n"

BAD = {
    "unknown scheduler": (["--scheduler", "sarathy"], "did you mean 'sarathi'?"),
    "unknown profile": (["--profile", "a100-lama3-8b"], "did you mean 'a100-llama3-8b'?"),
    "unknown setting of the scheduler": (["--set", "victm=newest"], "did you mean 'victim'?"),
    "unknown setting of the engine": (["--set", "watermrk=1"], "did you mean 'watermark'?"),
    "misspelt option": (["--set", "token_budgt=512"], "did you mean 'token_budget'?"),
    "option that is no setting": (["--set", "kv_tokens=1600"], "did you mean '--kv-tokens'?"),
    "setting that does nothing": (["--set", "backfill_within=2"], "does nothing without backfill; set that"),
    "setting without a value": (["--set", "watermark"], "KEY=VALUE"),
    "setting twice": (["--set", "watermark=0.1", "--set", "watermark=0.2"], "twice"),
    "setting out of range": (["--set", "watermark=2"], "watermark"),
    "setting of a wrong type": (["--set", "max_model_len=long"], "max_model_len"),
    "no token budget": (["--token-budget", "0"], "token_budget"),
    "no slots": (["--max-num-seqs", "-1"], "max_num_seqs"),
    "no block": (["--block-size", "0"], "block_size"),
    "less than a block": (["--kv-tokens", "15"], "one block"),
    "negative KV": (["--kv-tokens", "-16"], "kv"),
    "KV twice": (["--kv-tokens", "1600", "--set", "kv_blocks=100"], "not both"),
    "trace and workload": (["--workload", "azure-conv"], "not both"),
    "load and rate": (["--load", "0.5", "--rate", "2"], "not both"),
    "workload option that there is not": (["--workload-set", "jiter_s=1"], "jitter_s"),
    "workload option twice": (["--num-requests", "1", "--workload-set", "num_requests=2"], "num_requests"),
    "workload option of a wrong type": (["--workload-set", "window=1"], "window"),
    "option of a trace twice": (["--sort", "--workload-set", "sort=true"], "--workload-set gives sort"),
    "negative load": (["--load", "-0.5"], "load"),
    "nan load": (["--load", "nan"], "load"),
    "no requests": (["--num-requests", "0"], "number of requests"),
    "negative seed": (["--seed", "-1"], "seed"),
    "not a number": (["--seed", "x"], "seed"),
    "unknown option": (["--sede", "1"], "--sede"),
    "target": (["--ttft-target", "-1"], "ttft_target"),
    "too small a cache": (["--kv-tokens", "64"], "can never fit"),
    "folder that is not there": (["--requests-csv", "none/out.csv"], "no folder"),
    "a folder for a file": (["--iterations-csv", "."], "is a folder"),
    "the trace as output": (["--iterations-csv", "./trace.csv"], "trace.csv is the trace; name another file"),
    "the profile as output": (["--profile", "x.json", "--iterations-csv", "x.json"], "x.json is the profile"),
    "token budget twice": (["--token-budget", "64", "--set", "token-budget=64"], "not both"),
    "slots twice": (["--max-num-seqs", "2", "--set", "max_num_seqs=2"], "not both"),
    "block size twice": (["--block-size", "8", "--set", "block_size=8"], "not both"),
    "two tables in one file": (["--requests-csv", "a.csv", "--iterations-csv", "./a.csv"], "name two files"),
}


def complains(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err


@pytest.mark.parametrize("name", BAD)
def test_bad_options(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trace.csv").write_text(GOOD)
    options, expected = BAD[name]
    complains(
        ["simulate", *WHO, "--trace", "trace.csv", "--requests-csv", "out.csv", *options], expected, capsys
    )
    assert os.listdir() == ["trace.csv"]


BAD_TRACES = {
    "empty": ("", ""),
    "no rows": ("arrival_s,prompt_tokens,output_tokens\n", "no usable rows"),
    "missing column": ("arrival_s,prompt_tokens\n0,1\n", "output_tokens"),
    "no number": (GOOD + "x,1,1\n", ""),
    "nan": (GOOD + "nan,1,1\n", ""),
    "infinite": (GOOD + "inf,1,1\n", ""),
    "negative time": ("arrival_s,prompt_tokens,output_tokens\n-1,1,1\n", "not a time from 0"),
    "unsorted": (GOOD + "5,1,1\n4,1,1\n", "sort"),
    "no prompt": (GOOD + "1,0,1\n", "prompt_tokens"),
    "negative prompt": (GOOD + "1,-5,1\n", "prompt_tokens"),
    "no output": (GOOD + "1,1,0\n", "output_tokens"),
    "fraction of a token": (GOOD + "1,1.5,1\n", "prompt_tokens"),
    "late": (GOOD + "1e11,1,1\n", "1e+11 s, more than 1e+10 s; if they are in another unit"),
    "oversized": (GOOD + "1,900000,1\n", "can never fit"),
    "huge": (GOOD + "1,99999999999,1\n", "prompt_tokens"),
    "ragged": (GOOD + "1,1\n", ""),
    "binary": ("\x00\x01\x02", ""),
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_bad_traces(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text, expected = BAD_TRACES[name]
    Path("trace.csv").write_text(text)
    complains(
        ["simulate", *WHO, "--trace", "trace.csv", "--requests-csv", "a.csv", "--iterations-csv", "b.csv"],
        expected,
        capsys,
    )
    assert os.listdir() == ["trace.csv"]


@pytest.mark.parametrize("full", ["requests.csv", "iterations.csv"])
def test_a_full_disk_is_named_and_no_file_is_left_or_lost(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trace.csv").write_text(GOOD)
    Path("requests.csv").write_text("old")
    write = pd.DataFrame.to_csv

    def write_half(self: pd.DataFrame, path: Path, **options: object) -> None:
        write(self, path, **options)
        if full.removesuffix(".csv") in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pd.DataFrame, "to_csv", write_half)
    options = ["--requests-csv", "requests.csv", "--iterations-csv", "iterations.csv"]
    complains(["simulate", *WHO, "--trace", "trace.csv", *options], f"cannot write {full}: No space", capsys)
    assert sorted(os.listdir()) == ["requests.csv", "trace.csv"]
    assert Path("requests.csv").read_text() == "old"


@pytest.mark.filterwarnings("always::llmsched_env.workloads.traces.TraceWarning")
def test_a_trace_of_which_no_row_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,0,1\n1,1\n")
    expected = "none of its 2 rows can be used; the first: line 2, column 'prompt_tokens': 0 is not a count"
    complains(["simulate", *WHO, "--trace", str(path), "--drop-bad"], expected, capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["simulate", *WHO], "--workload"),
        (["simulate", *WORKLOAD, "--scheduler", "sarathi"], "--profile"),
        (["simulate", *WHO, "--trace", "none.csv"], "none.csv"),
        (["simulate", *WHO, *WORKLOAD, "--drop-bad"], "--drop-bad mends a trace; give it with --trace"),
        (["simulate", *WHO, "--trace", "."], "."),
        (["simulate", *WHO, "--workload", "azure-conw", "--load", "0.5"], "did you mean 'azure-conv'?"),
        (["list", "scheduler"], "did you mean 'schedulers'?"),
        (["profiles", "show", "a100-lama3-8b"], "did you mean 'a100-llama3-8b'?"),
        (["profiles", "show", "a100-llama3-8b", "--output", "none/x.png"], "no folder"),
        (["profiles", "show", "a100-llama3-8b", "--output", "x.txt"], ".png"),
        (["bench", "--suite", "quik"], "did you mean 'quick'?"),
        (["bench", "--schedulers", "vllm-v1,sarathy"], "did you mean 'sarathi'?"),
        (["bench", "--schedulers", ""], "--schedulers '' holds an empty name"),
        (["bench", "--schedulers", "vllm-v1, ,sarathi"], "'vllm-v1, ,sarathi' holds an empty name"),
        (["bench", "--seeds", "0"], "seeds"),
        (["bench", "--output", "/proc/none"], "/proc/none"),
        (["benhc"], "benhc"),
        (["--version-of-what"], "--version-of-what"),
    ],
)
def test_bad_calls(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    complains(arguments, expected, capsys)
    assert os.listdir() == []


def test_an_interrupt_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(baselines, "names", interrupt)
    assert main(["list", "schedulers"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# -- as a program --------------------------------------------------------------------------------------------

PROGRAM = [sys.executable, "-m", "agents"]


def test_as_a_program(trace: Path) -> None:
    command = [*PROGRAM, "simulate", "--trace", str(trace), *WHO, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert math.isfinite(json.loads(done.stdout)["makespan_s"])
    command = [*PROGRAM, "simulate", "--trace", "none.csv", *WHO]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_full_disk_behind_the_standard_output() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, "list", "profiles"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


INTERRUPT = """
import os, signal, sys
from agents.__main__ import main

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)

class Finder:
    def find_spec(self, name, *_):
        if name == at:
            interrupt()

at = sys.argv.pop(1)
if at == "writing":
    import pandas
    pandas.DataFrame.to_csv = lambda self, path, **_: interrupt(path.write_text("half"))
sys.meta_path.insert(0, Finder())
sys.exit(main())
"""


@pytest.mark.parametrize("at", ["agents.cli", "typer", "baselines", "numba", "pandas.core.api", "writing"])
def test_an_interrupt_is_one_line_at_any_time(at: str, trace: Path) -> None:
    command = [sys.executable, "-c", INTERRUPT, at, "simulate", "--trace", str(trace), *WHO]
    command += ["--requests-csv", str(trace.with_name("out.csv"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert os.listdir(trace.parent) == [trace.name]


def test_help_imports_little() -> None:
    code = "import sys; from agents.cli import main; main(['--help']); print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "simulate" in done.stdout
    assert done.stdout.endswith("False\n")
