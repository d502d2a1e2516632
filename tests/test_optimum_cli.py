"""`llmsched optimum`, `bounds` and `replay`, called as functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.cli import main
from baselines import optimal
from baselines.optimal import Instance, Solution
from baselines.optimal.instance import mixed
from llmsched_env import InputError

SMALL = mixed(4, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an instance and its solution."""
    made: Path = tmp_path_factory.mktemp("optimum")
    SMALL.save(made / "small.json")
    optimal.solve(SMALL, "search", time_limit_s=1.0).save(made / "small.npz")
    return made


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def failed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line of a command that fails."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


# ---------------------------------------------------------------------- what they print


@pytest.mark.parametrize("method", ["auto", "astar", "search"])
def test_optimum(method: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--instance", folder / "small.json", "--method", method, "--time-limit", 10]
    code, out, err = run(capsys, "optimum", *arguments, "--json", "--save", tmp_path / "found.npz")
    assert (code, err) == (0, "")
    told = json.loads(out)
    found = Solution.load(tmp_path / "found.npz")
    assert told["iterations"] == found.iterations()
    for key, value in found.summary().items():
        assert told[key] == value
    assert {"status", "objective", "bound", "gap", "method", "seconds", "versions"} <= told.keys()
    assert told["objective_name"] == "total_latency"
    if method != "search":
        assert (told["status"], told["gap"]) == ("optimal", 0.0)
    code, out, _ = run(capsys, "optimum", *arguments)
    assert code == 0
    assert "total_latency" in out and f"{told['objective']:,.9g}" in out


def test_optimum_of_a_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--scenario", "toy", "--seed", 3, "--num-requests", 3, "--allow", "none", "--time-limit", 10]
    code, out, _ = run(capsys, "optimum", *arguments, "--json")
    outputs = np.sort(Instance.of_scenario("toy", 3, num_requests=3).requests.output_tokens)
    assert (code, json.loads(out)["objective"]) == (0, float(np.cumsum(outputs).sum()))
    code, out, _ = run(capsys, "optimum", *arguments, "--objective", "makespan", "--json")
    assert json.loads(out)["objective"] == outputs.sum()


def test_bounds(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "bounds", "--instance", folder / "small.json", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["bounds"][told["best"]] == told["bound"] == max(told["bounds"].values())
    assert told["bound"] <= Solution.load(folder / "small.npz").objective
    code, out, _ = run(capsys, "bounds", "--instance", folder / "small.json", "--objective", "gpu_time")
    assert code == 0 and "gpu_time of 4 requests" in out and "the best" in out
    code, out, _ = run(capsys, "bounds", "--scenario", "toy", "--json")
    assert 0 < json.loads(out)["bound"] <= 120.0
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0.0,100,5\n0.5,200,10\n0.75,50,1\n")
    engine = ["--profile", "a100-llama3-8b", "--kv-tokens", 4096]
    code, out, _ = run(capsys, "bounds", "--trace", trace, *engine, "--json")
    assert json.loads(out)["num_requests"] == 3
    workload = ["--workload", "azure-conv", "--num-requests", 20, "--load", 0.8]
    engine[-1] = 65536
    code, out, _ = run(capsys, "bounds", *workload, *engine, "--objective", "makespan", "--json")
    assert json.loads(out)["num_requests"] == 20


def test_replay(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Solution.load(folder / "small.npz")
    code, out, _ = run(capsys, "replay", folder / "small.npz", "--json", "--output", tmp_path / "small.png")
    told = json.loads(out)
    assert (code, told["objective"], told["iterations"]) == (0, found.objective, found.iterations())
    assert (tmp_path / "small.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = run(capsys, "replay", folder / "small.npz")
    assert code == 0 and f"{found.objective:,.9g}" in out


def test_interrupted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What there is is printed and saved."""
    import baselines.optimal.improve as improve

    def stop(*_: Any, **__: Any) -> Solution:
        raise KeyboardInterrupt

    monkeypatch.setattr(improve, "improve", stop)
    chunks = ["--allow", "chunk,preempt", "--save", tmp_path / "best.npz"]
    hard = mixed(20, 0)
    hard.save(tmp_path / "hard.json")
    code, out, err = run(capsys, "optimum", "--instance", tmp_path / "hard.json", *chunks, "--json")
    assert (code, err) == (130, "interrupted\n")
    assert json.loads(out)["status"] == "interrupted"
    assert Solution.load(tmp_path / "best.npz").status == "interrupted"
    code, out, err = run(capsys, "optimum", "--instance", tmp_path / "hard.json", "--method", "search")
    assert (code, out, err) == (130, "", "interrupted\n")


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "give either --instance FILE or --scenario NAME"),
        (["--instance", "{f}/small.json", "--scenario", "toy"], "not both"),
        (["--instance", "{f}/none.json"], "cannot read"),
        (["--instance", "{f}/small.npz"], "not JSON"),
        (["--scenario", "tay"], "did you mean 'toy'"),
        (["--scenario", "toy", "--seed", "-1"], "--seed must not be negative"),
        (["--scenario", "toy", "--num-requests", "0"], "--num-requests must be at least 1"),
        (["--scenario", "toy", "--objective", "latency"], "did you mean 'total_latency'"),
        (["--scenario", "toy", "--objective", "slo_goodput"], "needs targets"),
        (["--scenario", "toy", "--allow", "chunks"], "did you mean 'chunk'"),
        (["--scenario", "toy", "--method", "magic"], "unknown method 'magic'"),
        (["--scenario", "toy", "--time-limit", "0"], "time_limit_s must be positive seconds"),
        (["--scenario", "toy", "--save", "{f}/no/where.npz"], "there is no folder"),
    ],
)
def test_bad_options_of_optimum(
    arguments: list[str], match: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert match in failed(capsys, "optimum", *(a.replace("{f}", str(folder)) for a in arguments))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "give either --instance FILE or --scenario NAME"),
        (["--workload", "azure-conv"], "with --profile"),
        (["--workload", "azure-conv", "--scenario", "toy", "--profile", "a100-llama3-8b"], "give one of"),
        (["--scenario", "toy", "--load", "0.5"], "--load goes with --workload or --trace"),
        (["--trace", "{f}/none.csv", "--profile", "a100-llama3-8b"], "none.csv"),
        (["--workload", "azure-conv", "--profile", "a100-llama3-8b", "--kv-tokens", "100"], "can never fit"),
    ],
)
def test_bad_options_of_bounds(
    arguments: list[str], match: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert match in failed(capsys, "bounds", *(a.replace("{f}", str(folder)) for a in arguments))


GOOD: dict[str, Any] = {
    "requests": [[0, 8, 4], [0, 6, 2]],
    "kv_tokens": 20,
    "token_budget": 10,
    "cost": {"form": "linear", "c0": 1.0},
}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"requests": [[0, 8]]}, "request 0 must be [arrival, prompt, output]"),
        ({"requests": "many"}, "requests must be a list"),
        ({"requests": []}, "at least one request"),
        ({"kv_tokens": 5}, "request 0 can never fit"),
        ({"kv_tokens": "much"}, "kv_tokens must be a whole number"),
        ({"token_budget": 7}, "exceeds the token budget"),
        ({"block_size": "big"}, "block_size"),
        ({"block_size": 0}, "block_size"),
        ({"max_num_seqs": 1.5}, "max_num_seqs"),
        ({"cost": "a100"}, "unknown profile"),
        ({"cost": {"form": "linear", "c9": 1}}, "c9"),
        ({"cost": {"form": "linear", "c0": "one"}}, "c0"),
        ({"allow": "chunk"}, "allow must be a list"),
        ({"allow": [1]}, "allow must be a list of names"),
        ({"allow": 3}, "allow"),
        ({"objective": "speed"}, "unknown objective"),
        ({"objective": ["gpu_time"]}, "objective must be a text"),
        ({"colour": "blue"}, "colour"),
        ({"ttft_target_s": [1.0]}, "ttft_target_s"),
        ({"ttft_target_s": "soon"}, "ttft_target_s"),
        ({"name": 5}, "name"),
    ],
)
def test_bad_instances(
    change: dict[str, Any], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({**GOOD, **change}))
    assert match in failed(capsys, "optimum", "--instance", tmp_path / "bad.json")


def damage(path: Path, to: Path, **changes: Any) -> Path:
    """The solution file with some of its arrays changed; text: of keys of its JSON."""
    with np.load(path) as data:
        arrays = dict(data)
    text = json.loads(str(arrays["solution"]))
    text.update({key: value for key, value in changes.items() if key not in arrays})
    arrays.update({key: value for key, value in changes.items() if key in arrays})
    with to.open("wb") as file:
        np.savez(file, **{**arrays, "solution": np.array(json.dumps(text))})
    return to


def test_broken_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = folder / "small.npz", tmp_path / "bad.npz"
    found = Solution.load(good)
    assert found.schedule is not None
    tokens, requests = found.schedule.tokens, found.schedule.requests
    more = tokens + (np.arange(len(tokens)) == 0)
    for changes, match in (
        ({"tokens": more.astype(np.int32)}, "iteration 0 "),
        ({"requests": np.full_like(requests, 99)}, "there is no request 99"),
        ({"start_s": found.schedule.start_s + 1.0}, '"idle" is not allowed'),
        ({"start_s": found.schedule.start_s - 1.0}, "it is to start at"),
        ({"start_s": found.schedule.start_s.astype(str)}, "do not fit together"),
        ({"tokens": tokens.astype(float)}, "do not fit together"),
        ({"tokens": tokens[:-1]}, "do not fit together"),
        ({"ends": found.schedule.ends[:1], "start_s": found.schedule.start_s[:1]}, "do not fit together"),
        ({"objective": 1.0}, "the file claims 1.0"),
        ({"objective": None}, "not a solution file"),
        ({"bound": 1e9}, "better than the bound"),
        ({"status": "optimal", "bound": 0.0}, "does not go with a gap"),
        ({"status": "splendid"}, "does not go with"),
        ({"details": None}, "not a solution file"),
        ({"instance": {}}, "missing"),
        ({"format": np.array("llmsched-solution-0")}, "write it again"),
    ):
        assert match in failed(capsys, "replay", damage(good, bad, **changes)), changes
    raw = good.read_bytes()
    for cut in (0, 10, len(raw) // 2, len(raw) - 5):
        bad.write_bytes(raw[:cut])
        failed(capsys, "replay", bad)
    np.save(tmp_path / "array.npy", tokens)
    failed(capsys, "replay", tmp_path / "array.npy")
    failed(capsys, "replay", folder / "small.json")
    assert "cannot read" in failed(capsys, "replay", tmp_path / "nothing.npz")
    assert "cannot read" in failed(capsys, "replay", tmp_path)
    assert "unknown picture format" in failed(capsys, "replay", good, "--output", tmp_path / "a.txt")
    assert "no folder" in failed(capsys, "replay", good, "--output", tmp_path / "no" / "a.png")


def test_a_cut_schedule_is_refused(folder: Path) -> None:
    found = Solution.load(folder / "small.npz")
    assert found.schedule is not None
    with pytest.raises(InputError, match="unfinished"):
        schedule = found.schedule
        stop = int(schedule.ends[-2])
        optimal.replay(
            SMALL,
            type(schedule)(
                schedule.start_s[:-1], schedule.ends[:-1], schedule.requests[:stop], schedule.tokens[:stop]
            ),
        )
