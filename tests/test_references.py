"""What is known of the best schedules, in the infos of the environments; the normalised score."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import baselines
from llmsched_env import InputError, scenarios, simulate
from llmsched_env.scenarios import Reference

DECISION = "llmsched/Decision-v0"
ROWS = (Reference(2.0, 1.0, 4.0, "search", seed=8), Reference(3.0, 3.0, 5.0, "astar", seed=9))


def play(env: Any, expert: Any, **reset: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last info of an episode."""
    _, first = env.reset(**reset)
    over, info = False, first
    while not over:
        *_, terminated, truncated, info = env.step(expert(env))
        over = terminated or truncated
    return first, info


def test_toy() -> None:
    for name, hold, score in (("sjf", "known", 1.0), ("vllm-v1", "chunk", None)):
        env = gym.make(DECISION, scenario="toy", length_info="oracle", hold=hold)
        first, last = play(env, baselines.expert(name), seed=3)
        assert first["reference"] == last["reference"]
        assert first["reference"] == {
            "optimum": 20.0, "bound": 20.0, "vllm_v1": 36.75, "method": "shortest first"
        }  # fmt: skip
        latency = last["metrics"]["latency_s"]
        assert last["metrics"]["normalised_score"] == pytest.approx(score or (36.75 - latency) / 16.75)


def scenario() -> Any:
    return scenarios.get("azure-conv", num_requests=8).replace(references=ROWS)


def test_by_seed() -> None:
    env = gym.make(DECISION, scenario=scenario())
    for row in ROWS:
        _, info = env.reset(seed=row.seed)
        assert info["reference"] == row.summary()
        _, info = env.reset(options={"seed": env.unwrapped.episode_seed})
        assert info["reference"] == row.summary()
        _, info = env.reset()  # the next episode is another
        assert "reference" not in info
    _, last = play(env, baselines.expert("vllm-v1", strict=False), seed=8)
    latency = last["metrics"]["latency_s"]
    assert last["metrics"]["normalised_score"] == pytest.approx((4.0 - latency) / 2.0)
    _, last = play(env, baselines.expert("vllm-v1", strict=False), seed=7)
    assert math.isnan(last["metrics"]["normalised_score"])
    _, info = env.reset(seed=8, options={"load": 0.5})  # another problem
    assert "reference" not in info


def test_given_at_reset() -> None:
    env = gym.make(DECISION, scenario="toy")
    _, info = env.reset(seed=0, options={"reference": {"best_known": 25.0, "method": "mine"}})
    assert info["reference"]["best_known"] == 25.0
    _, info = env.reset(seed=0)
    assert info["reference"]["optimum"] == 20.0
    _, info = env.reset(options={"requests": env.unwrapped.requests})  # of which nothing is known
    assert "reference" not in info
    with pytest.raises(InputError, match="a mapping with best_known"):
        env.reset(options={"reference": 20.0})


@pytest.mark.parametrize("mode", ["next-step", "same-step", "disabled"])
def test_vector(mode: str) -> None:
    made = scenario().replace(references=ROWS)
    env = gym.make_vec(DECISION, num_envs=3, scenario=made, autoreset_mode=mode)
    _, info = env.reset(seed=7)  # environments with seeds 7, 8 and 9
    told = info["reference"]
    np.testing.assert_array_equal(info["_reference"], [False, True, True])
    np.testing.assert_array_equal(told["_optimum"], [False, False, True])
    np.testing.assert_array_equal(told["bound"], [0.0, 1.0, 3.0])
    assert (told["best_known"][1], told["optimum"][2], told["method"][2]) == (2.0, 3.0, "astar")
    expert = baselines.expert("vllm-v1", strict=False)
    ended = np.zeros(3, bool)
    while not ended.all():
        *_, terminated, _, info = env.step(expert(env))
        if not terminated.any():
            assert "reference" not in info
            continue
        last = info["final_info"] if mode == "same-step" else info
        for i in np.flatnonzero(terminated & ~ended):
            metrics = last["metrics"]
            if i == 0:
                assert math.isnan(metrics["normalised_score"][0])
            else:
                row = ROWS[i - 1]
                assert metrics["normalised_score"][i] == pytest.approx(row.score(metrics["latency_s"][i]))
                assert last["_reference"][i] and last["reference"]["bound"][i] == row.bound
        if mode == "same-step":
            assert "reference" not in info  # of the episodes that have begun nothing is known
        ended |= terminated
    if mode != "same-step":
        _, info = env.reset(seed=[None, 9, None], options={"reset_mask": np.array([False, True, False])})
        np.testing.assert_array_equal(info["_reference"], [False, True, False])
    _, info = env.reset(seed=0, options={"reference": Reference(1.0)})
    assert info["_reference"].all()


def test_score() -> None:
    assert ROWS[0].score(4.0) == 0.0
    assert ROWS[0].score(2.0) == 1.0
    assert ROWS[0].score(6.0) == -1.0
    assert math.isnan(Reference(1.0).score(1.0))
    assert math.isnan(Reference(1.0, vllm_v1=1.0).score(1.0))


SHIPPED = [name for name in scenarios.names() if name != "toy" and scenarios.get(name).references]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped(name: str) -> None:
    """Each is of the episode that its seed draws, and vLLM V1 does there what it says."""
    problem = scenarios.get(name).resolve()
    assert [row.seed for row in problem.scenario.references] == list(range(1_000_000, 1_000_016))
    for row in problem.scenario.references:
        assert 0 < row.bound <= row.best_known < row.vllm_v1
    row = problem.scenario.references[-1]
    requests = problem.first_episode(row.seed)
    result = simulate(requests, baselines.get("vllm-v1"), problem.profile, problem.engine)
    assert (result.finish_s - requests.arrival_s).mean() == pytest.approx(row.vllm_v1)
    _, info = gym.make(DECISION, scenario=name).reset(seed=row.seed)
    assert info["reference"] == row.summary()
