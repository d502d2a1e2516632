"""Comparisons: the same requests for all, metrics that agree, honest figures, and `llmsched evaluate`."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import agents
import baselines
from agents.cli import main
from agents.comparison import METRICS, Comparison, compare, matrix, resolve
from agents.contenders import Episodes, metrics_of
from agents.evaluation import FIRST_SEED, evaluate, make, play, random_policy
from agents.statistics import Bootstrap
from llmsched_env import InputError, scenarios, simulate

DECISION, BATCH, DISPATCH = "llmsched/Decision-v0", "llmsched/Batch-v0", "llmsched/Dispatch-v0"
SMALL: dict[str, Any] = {"scenario": "infermax-contention", "num_requests": 12, "kv_blocks": 200}
QUICK = Bootstrap(repeats=100)


class Agent:
    """What an agent looks like from outside: a file with the seed of its weights."""

    env_id = DECISION

    def __init__(self, seed: int, name: str = "stub") -> None:
        self.seed, self.name = seed, name
        self.env_options = {"observation": "flat", "waiting_slots": 6, "running_slots": 6, "max_steps": 3}
        self.env_options |= {"preempt": "forced", "load": 0.1}  # a load that it was trained on

    def __call__(self, seen: Any, masks: Any) -> Any:
        assert seen.shape[0] == masks.shape[0] and seen.ndim == 2
        weights = 1 + np.random.default_rng(self.seed).random(masks.shape[1])
        weights[1] = 0.5  # who holds decodes whenever he can is never done
        return (masks * weights).argmax(axis=1)

    @staticmethod
    def load(path: Any) -> Agent:
        try:
            return Agent(int(Path(path).read_text()), Path(path).name)
        except ValueError:
            raise InputError(f"{path} is no agent") from None

    @staticmethod
    def pretrained(name: str) -> Agent:
        if name != "small":
            raise InputError(f"unknown agent {name!r}")
        return Agent(7, name)

    def untrained(self, seed: int) -> Agent:
        return Agent(1000 + seed, self.name)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with agents of three trainings, and the module that reads them."""
    module: Any = types.ModuleType("agents.agent")
    module.Agent, module.pretrained_names = Agent, lambda: ["small"]
    monkeypatch.setitem(sys.modules, "agents.agent", module)
    monkeypatch.setattr(agents, "agent", module, raising=False)
    for seed in range(3):
        (tmp_path / f"run-{seed}").write_text(str(seed))
    return tmp_path


def last_legal(seen: Any, masks: Any) -> Any:
    return masks.shape[1] - 1 - masks[:, ::-1].argmax(axis=1)


# ---------------------------------------------------------------------- the same for all


@pytest.mark.parametrize(
    ("name", "env_id", "options"),
    [
        ("vllm-v1", DECISION, SMALL),
        ("srf", BATCH, SMALL | {"running_order": "oldest", "waiting_slots": 12, "running_slots": 12}),
        ("vllm-v1", DISPATCH, {"scenario": "azure-conv", "num_requests": 30}),
        ("vllm-v1", DISPATCH, {"scenario": "stream"}),
        ("vllm-v1", DISPATCH, {"scenario": "multi-tenant", "num_requests": 40, "objective": "fairness"}),
    ],
)
def test_a_simulation_is_the_episode_of_the_expert(name: str, env_id: str, options: dict[str, Any]) -> None:
    expected = evaluate(name, env_id, num_episodes=3, seed=5, **options)
    metric = "fairness" if options.get("objective") == "fairness" else "latency_s"
    options = {key: value for key, value in options.items() if key != "objective"}
    found = compare([name], num_episodes=3, seed=5, env_id=env_id, metric=metric, **options)
    for key, values in found.found[name].items():
        np.testing.assert_allclose(values[0], expected[key], rtol=1e-9, err_msg=key)


def test_all_kinds_are_given_the_same_requests(runs: Path) -> None:
    """Which `Episodes.play` asserts, and would not if an agent brought its own load or horizon."""
    specs = ["vllm-v1", "random", f"{runs}/run-0", f"untrained:{runs}/run-0", "pretrained:small"]
    found = compare([*specs, last_legal], num_episodes=4, max_steps=500, **SMALL)
    labels = ["vllm-v1", "random", "run-0", "untrained:run-0", "small", "last_legal"]
    assert list(found.found) == labels
    frame = found.to_frame()
    assert len(frame) == 24 and frame["seed"].unique().tolist() == list(range(FIRST_SEED, FIRST_SEED + 4))
    # an agent is not cut as in its training
    assert frame["finished"].max() == 12 and (frame[frame["policy"] == "run-0"]["finished"] == 12).all()
    tokens = frame[frame["complete"]].eval("throughput_tps * makespan_s").round(6)
    assert len(tokens.groupby(frame["seed"]).unique().explode()) == 4  # the same answers


def test_other_requests_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(policy: Any, env: Any, seed: int) -> Any:
        return play(policy, env, seed + 1)

    monkeypatch.setattr("agents.contenders.play", other)
    with pytest.raises(AssertionError, match="other requests"):
        compare(["random"], num_episodes=2, **SMALL)


@pytest.mark.parametrize("env_id", [DECISION, BATCH, DISPATCH])
def test_chance_takes_legal_actions(env_id: str) -> None:
    env = make(env_id, 8, max_episode_steps=60, **SMALL)
    once, again, other = (play(random_policy(env.single_action_space, seed), env, 3) for seed in (0, 0, 1))
    assert (once["illegal"] == 0).all() and once["decisions"].max() > 5
    assert all(np.array_equal(once[name], again[name], equal_nan=True) for name in once)
    assert not np.array_equal(once["return"], other["return"])
    masks = env.unwrapped.action_masks()[:1] * np.ones(
        (4000, 1), bool
    )  # of what all is legal, each as likely
    drawn = random_policy(env.single_action_space)(None, masks).reshape(4000, -1)[:, 0]
    share = np.bincount(drawn) / 4000
    assert share == pytest.approx(np.full(len(share), 1 / len(share)), abs=0.05 if len(share) < 20 else 0.01)


# ---------------------------------------------------------------------- what is told


def test_the_optimum_of_toy() -> None:
    found = compare(["optimum", "vllm-v1", "random"], "toy", 6, bootstrap=QUICK)
    best, vllm, chance = found.rows
    assert best.mean.value == 20.0 and best.score.value == pytest.approx(1.0)
    assert vllm.score.value == 0.0 and vllm.improvement.value == 0.0 and found.baseline == "vllm-v1"
    way = vllm.mean.value - 20.0
    assert best.difference.value == pytest.approx(way) and best.difference.low > 0
    assert best.improvement.value == pytest.approx(100 * way / vllm.mean.value)
    assert best.probability.value >= 11 / 12 and best.finished == best.complete == 1.0
    assert chance.score.value == pytest.approx((vllm.mean.value - chance.mean.value) / way)
    assert chance.score.low <= chance.score.value <= chance.score.high


def test_the_optimum_is_searched_where_it_is_not_known() -> None:
    sizes: dict[str, Any] = {"num_requests": 3, "num_episodes": 2, "bootstrap": QUICK}
    for metric in ("latency_s", "gpu_s"):
        found = compare(["optimum:0.3", "vllm-v1"], "infermax-contention", metric=metric, **sizes)
        best, vllm = (found.values(label) for label in found.found)
        assert (best <= vllm + 1e-9).all() and (found.found["optimum:0.3"]["finished"] == 3).all()
        assert math.isnan(found.rows[0].score.value)


@pytest.mark.parametrize("metric", METRICS)
def test_an_improvement_is_positive(metric: str) -> None:
    if metric == "finished":
        found = compare(["vllm-v1", "faster-transformer"], "stream", 4, metric=metric, bootstrap=QUICK)
    else:
        found = compare(
            ["vllm-v1", "faster-transformer"],
            "azure-conv",
            3,
            num_requests=40,
            metric=metric,
            bootstrap=QUICK,
        )
    a, b = (found.values(label).mean() for label in found.found)
    other = found.rows[1]
    better = b > a if METRICS[metric].larger else b < a
    assert other.difference.value == pytest.approx((b - a) * (1 if METRICS[metric].larger else -1))
    assert (other.difference.value > 0) == better
    if a > 0:
        assert other.improvement.value == pytest.approx(100 * other.difference.value / a)
    assert found.rows[0].mean.value == pytest.approx(a)


def test_differences_are_to_the_baseline() -> None:
    keywords: dict[str, Any] = {"num_episodes": 4, "num_requests": 30, "bootstrap": QUICK}
    default = compare(["srf", "sarathi"], "azure-conv", **keywords)
    chosen = compare(["srf", "sarathi"], "azure-conv", baseline="sarathi", **keywords)
    assert (default.baseline, chosen.baseline) == ("srf", "sarathi")
    way = (default.values("srf") - default.values("sarathi")).mean()  # seconds that sarathi saves
    assert default.rows[1].difference.value == pytest.approx(way) and default.rows[0].difference.value == 0
    assert chosen.rows[0].difference.value == pytest.approx(-way) and chosen.rows[1].difference.value == 0
    assert default.rows[0].improvement == chosen.rows[0].improvement  # which is over vLLM V1 in either
    assert default.against("sarathi").rows == chosen.rows  # the same play, told anew
    with pytest.raises(InputError, match="unknown baseline 'sarath'"):
        default.against("sarath")


def test_unfinished_episodes_are_told() -> None:
    """A policy that is cut looks quick, as it has only been in the system for so long."""
    found = compare(
        {"cut": last_legal, "vllm-v1": "vllm-v1"}, num_episodes=3, max_steps=20, bootstrap=QUICK, **SMALL
    )
    cut, vllm = found.rows
    raw = found.found["cut"]["latency_s"].mean()
    assert raw < vllm.mean.value and cut.finished < 1 and cut.complete == 0
    for estimate in (cut.mean, cut.iqm, cut.difference, cut.improvement):
        assert math.isnan(estimate.value)
    assert cut.probability.value == 0.0
    assert found._ranked()[0].policy == "vllm-v1"
    assert "complete %" in [column.header for column in found.table().columns]
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_scenarios_own_horizon_cuts_nobody_short() -> None:
    found = compare(["vllm-v1"], "stream", 3, bootstrap=QUICK)
    assert found.rows[0].complete == 1 and found.rows[0].finished < 1
    assert not math.isnan(found.rows[0].mean.value)


def test_trainings_of_one_policy(runs: Path) -> None:
    together = compare([f"all={runs}/run-*", "vllm-v1"], num_episodes=5, bootstrap=QUICK, **SMALL)
    listed = compare([f"{runs}/run-0,{runs}/run-1, {runs}/run-2"], num_episodes=5, bootstrap=QUICK, **SMALL)
    alone = [compare([f"{runs}/run-{i}"], num_episodes=5, bootstrap=QUICK, **SMALL) for i in range(3)]
    assert together.rows[0].trainings == 3 and together.found["all"]["latency_s"].shape == (3, 5)
    expected = np.concatenate([found.values(f"run-{i}") for i, found in enumerate(alone)])
    assert together.values("all").tolist() == expected.tolist()
    assert next(iter(listed.found.values()))["latency_s"].tolist() == expected.tolist()
    assert len(together.to_frame()) == 20
    fresh = resolve(f"fresh=untrained:{runs}/run-*")
    assert [member.policy.seed for member in fresh.members] == [1000, 1001, 1002]  # type: ignore[attr-defined]
    several = resolve([Agent(1), Agent(2)], "two")
    assert (several.label, len(several.members)) == ("two", 2)


def test_goodput_counts_what_is_unfinished_as_late() -> None:
    scenario = scenarios.get("slo-mix", num_requests=20)
    episodes = Episodes.of(scenario, range(1), "goodput", DECISION, {})
    requests, problem = episodes.requests[0], episodes.problem
    whole = simulate(requests, baselines.get("sarathi"), problem.profile, problem.engine)
    cut = simulate(
        requests, baselines.get("sarathi"), problem.profile, problem.engine, horizon_s=whole.makespan_s / 2
    )
    all_in, some = metrics_of(whole), metrics_of(cut)
    assert all_in["goodput"] * 20 == round(whole.metrics()["goodput_rps"] * whole.makespan_s)
    assert some["goodput"] <= some["finished"] / 20 < 1
    assert all_in["latency_s"] == pytest.approx(whole.metrics()["latency"]["mean"])
    assert all_in["ttft_s"] == pytest.approx(whole.metrics()["ttft"]["mean"])
    assert all_in["tpot_s"] == pytest.approx(whole.metrics()["tpot"]["mean"])
    done = ~np.isnan(cut.finish_s)
    assert some["ttft_s"] == pytest.approx((cut.first_token_s - requests.arrival_s)[done].mean())
    assert all_in["throughput_tps"] == pytest.approx(requests.output_tokens.sum() / whole.makespan_s)


def test_files(tmp_path: Path) -> None:
    found = compare(["vllm-v1", "random"], "toy", 4, bootstrap=QUICK)
    paths = found.save(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [
        "episodes.csv",
        "comparison.json",
        "intervals.png",
        "profile.png",
    ]
    pd.testing.assert_frame_equal(pd.read_csv(paths[0]), found.to_frame(), check_exact=False)
    assert json.loads(paths[1].read_text()) == found.to_dict()
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths[2:])
    told = found.to_dict()
    assert told["policies"][1]["policy"] == "random" and told["references"] == 4
    assert told["policies"][1]["difference"].keys() == {"value", "low", "high"}


def test_a_matrix_of_conditions() -> None:
    grid = {"load": (0.5, 1.2), "prediction": ("oracle", "lognormal:1")}
    options: dict[str, Any] = {"num_episodes": 2, "num_requests": 20, "bootstrap": QUICK}
    done: list[int] = []
    found = matrix(["vllm-v1", "srf"], ["azure-conv", "slo-mix"], grid, progress=done.append, **options)
    assert len(found.comparisons) == 8 and done == list(range(1, 17))
    one: Comparison = found.comparisons["slo-mix, load=1.2, prediction=lognormal:1"]
    alone = compare(["vllm-v1", "srf"], "slo-mix", load=1.2, prediction="lognormal:1", **options)
    assert one.to_dict() == alone.to_dict()
    frame = found.to_frame()
    assert len(frame) == 16 and frame["mean_low"].le(frame["mean"]).all()
    calm, busy = (
        frame[frame["condition"].str.contains(f"load={load}")]["mean"].mean() for load in (0.5, 1.2)
    )
    assert calm < busy
    assert found.table().row_count == 8
    json.dumps(found.to_dict(), allow_nan=False)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("policies", "options", "message"),
    [
        (["vllm-v11"], {}, "unknown policy 'vllm-v11'; did you mean 'vllm-v1'"),
        (["nowhere/*"], {}, "nothing matches nowhere/*"),
        (["vllm-v1,sarathi"], {}, "unknown policy 'vllm-v1'"),
        (["pretrained:big"], {}, "unknown agent 'big'"),
        (["optimum:soon"], {}, "takes positive seconds an episode, not 'soon'"),
        ([3], {}, "a policy is a name, a scheduler, an agent, a model or a function, not 3"),
        ([[]], {}, "needs a training at least"),
        ([], {}, "there are no policies"),
        ("vllm-v1", {}, "give a list of policies"),
        (["vllm-v1", "vllm-v1"], {}, "two policies are called 'vllm-v1'"),
        (["vllm-v1"], {"metric": "latency"}, "did you mean 'latency_s'"),
        (["vllm-v1"], {"baseline": "srf"}, "unknown baseline 'srf'"),
        (["vllm-v1"], {"env_id": "llmsched/Decision-v1"}, "did you mean 'llmsched/Decision-v0'"),
        (["vllm-v1"], {"scenario": "toys"}, "did you mean 'toy'"),
        (["vllm-v1"], {"wating_slots": 4}, "did you mean 'waiting_slots'"),
        (["vllm-v1"], {"num_episodes": 0}, "num_episodes must be a whole number from 1, not 0"),
        (["vllm-v1"], {"seed": -1}, "seed must be a whole number from 0, not -1"),
        (["optimum"], {"scenario": "stream"}, "policy optimum: scenario stream is a window"),
        (["optimum"], {"metric": "preemptions"}, "policy optimum: the optimum can be asked for of latency_s"),
        ([lambda seen, masks: masks], {}, "policy <lambda>: the policy must return actions of shape"),
    ],
)
def test_what_cannot_be_compared(runs: Path, policies: Any, options: dict[str, Any], message: str) -> None:
    keywords: dict[str, Any] = {"scenario": "toy", "num_episodes": 2, **options}
    with pytest.raises(InputError) as error:
        compare(policies, **keywords)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "grid", "options", "message"),
    [
        ([], {}, {}, "there is no scenario"),
        (["toy", "toy"], {}, {}, "the condition toy is given twice"),
        (["azure-conv"], {"load": 0.9}, {}, "load is varied over a list of values, not 0.9"),
        (["azure-conv"], {"load": [0.9]}, {"load": 1.0}, "load is given for all conditions"),
    ],
)
def test_what_is_no_matrix(names: Any, grid: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        matrix(["vllm-v1"], names, grid, 2, **options)


# ---------------------------------------------------------------------- the command


def test_evaluate_on_the_command_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "evaluate",
        "--policy",
        "vllm-v1",
        "--policy",
        f"mine={runs}/run-*",
        "--scenario",
        SMALL["scenario"],
    ]
    asked += [
        "--episodes",
        "3",
        "--seed",
        "11",
        "--set",
        "num-requests=12",
        "--set",
        "kv_blocks=200",
        "--metric",
        "makespan_s",
    ]
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = compare(["vllm-v1", f"mine={runs}/run-*"], num_episodes=3, seed=11, metric="makespan_s", **SMALL)
    assert told == found.to_dict()
    assert main([*asked, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "mine" in shown and "makespan" in shown and "wrote" in shown and "profile.png" in shown
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == told


def test_evaluate_under_several_conditions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["evaluate", "--policy", "srf", "--scenario", "azure-conv", "--scenario", "slo-mix"]
    asked += ["--vary", "load=0.5", "--vary", "load=1.1", "--set", "num_requests=10", "--episodes", "2"]
    assert main([*asked, "--output", str(tmp_path)]) == 0
    assert "slo-mix, load=1.1" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "matrix.csv")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "policy"),
        (["--policy", "vllm-v1", "--set", "seed=3"], "seed is no setting"),
        (["--policy", "vllm-v1", "--vary", "metric=goodput"], "metric is no setting"),
        (["--policy", "vllm-v1", "--set", "load"], "--set takes KEY=VALUE"),
        (["--policy", "vllm-v1", "--scenario", "toys"], "did you mean 'toy'"),
    ],
)
def test_evaluate_complains_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint and complaint.count("\n") == 1
