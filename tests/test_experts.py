"""Experts: a scheduler that acts in an environment serves every request when `simulate` says it does."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import baselines
from llmsched_env import InputError, simulate
from llmsched_env.envs.options import hold_of

WIDE = {"waiting_slots": 64, "running_slots": 64, "length_info": "oracle"}


def play(env: Any, expert: Any, seed: int) -> int:
    """An episode; returns the number of decisions."""
    env.reset(seed=seed)
    decisions, over = 0, False
    while not over:
        _, _, terminated, truncated, _ = env.step(expert(env))
        over = terminated or truncated
        decisions += 1
    return decisions


def make(name: str, **options: Any) -> Any:
    """An environment in which this scheduler can act."""
    fitting = {"hold": hold_of(baselines.get(name).settings), "idle": True, "readmit": True}
    return gym.make("llmsched/Decision-v0", scenario="azure-conv", **{**WIDE, **fitting, **options})


def assert_as_simulated(env: Any, name: str, **settings: Any) -> None:
    inner = env.unwrapped
    problem = inner.problem
    expected = simulate(inner.requests, baselines.get(name, **settings), problem.profile, problem.engine)
    result = inner.result()
    np.testing.assert_array_equal(result.finish_s, expected.finish_s)
    np.testing.assert_array_equal(result.first_token_s, expected.first_token_s)


# Whose plans Decision-v0 can say, on this scenario.
ALWAYS = [
    *(
        "vllm-v1",
        "vllm-v1-priority",
        "srf",
        "srf-hist",
        "sjf",
        "sjf-backfill",
        "fcfs-backfill",
        "area-backfill",
    ),
    *(
        "mc-sf",
        "mc-benchmark",
        "edf",
        "sglang",
        "sglang-mixed",
        "tgi",
        "wait",
        "slai",
        "sorted-f",
        "svf",
        "a-min",
    ),
]
# With room for whole prompts in a batch.
WHOLE = ["orca", "sarathi", "sarathi-nohy", "faster-transformer", "simple-chunking", "srpt", "rad"]


@pytest.mark.parametrize("name", ALWAYS)
def test_an_episode_is_what_simulate_gives(name: str) -> None:
    env, expert = make(name), baselines.expert(name)
    for seed in range(2):
        assert play(env, expert, seed) > 50
        assert_as_simulated(env, name)
    env.close()


@pytest.mark.parametrize("name", WHOLE)
def test_with_a_budget_for_whole_prompts(name: str) -> None:
    env = make(name, token_budget=65536)
    assert play(env, baselines.expert(name), 0) > 50
    assert_as_simulated(env, name)
    env.close()


def test_reservations() -> None:
    env = make("dai-orca", token_budget=65536)
    play(env, baselines.expert("dai-orca"), 0)
    assert_as_simulated(env, "dai-orca")
    with pytest.raises(InputError, match="hold='chunk'"):
        baselines.expert("vllm-v1")(env)


def test_it_can_be_asked_off_its_path() -> None:
    """After the actions of somebody else it goes on from there."""
    env = gym.make("llmsched/Decision-v0", scenario="azure-conv", **WIDE)
    expert, g = baselines.expert("vllm-v1", strict=False), np.random.default_rng(0)
    for seed in range(3):
        env.reset(seed=seed)
        mask, over = env.unwrapped.action_masks(), False
        while not over:
            action = expert(env)
            assert mask[action]
            if g.random() < 0.2:
                action = int(g.choice(np.flatnonzero(mask)))
            *_, terminated, truncated, info = env.step(action)
            mask, over = info["action_mask"], terminated or truncated


def test_what_cannot_be_said_is_an_error() -> None:
    env = make("sjf", waiting_slots=1)
    with pytest.raises(InputError, match="raise waiting_slots"):
        play(env, baselines.expert("sjf"), 0)


def test_vector_environments() -> None:
    many = gym.make_vec("llmsched/Decision-v0", num_envs=3, scenario="azure-conv", **WIDE)
    one = gym.make("llmsched/Decision-v0", scenario="azure-conv", **WIDE)
    experts = baselines.expert("vllm-v1"), baselines.expert("vllm-v1")
    many.reset(seed=5)
    one.reset(seed=5)
    for _ in range(200):
        actions = experts[0](many)
        assert actions[0] == experts[1](one)
        many.step(actions)
        *_, terminated, _, _ = one.step(int(actions[0]))
        if terminated:
            break


@pytest.mark.parametrize("scenario", ["infermax-contention", "slo-mix", "azure-code", "reasoning"])
@pytest.mark.parametrize("name", ["vllm-v1", "srf"])
def test_where_memory_is_short(scenario: str, name: str) -> None:
    env = gym.make("llmsched/Decision-v0", scenario=scenario, idle=True, readmit=True, **WIDE)
    play(env, baselines.expert(name), 1)
    assert_as_simulated(env, name)


@pytest.mark.parametrize("name", ["vllm-v1", "srf", "lrf"])
def test_dispatch(name: str) -> None:
    env = gym.make("llmsched/Dispatch-v0", scenario="azure-conv")
    assert play(env, baselines.expert(name), 0) > 50
    assert_as_simulated(env, name)


def test_prompts_above_the_budget_cannot_be_said_in_batch() -> None:
    env = gym.make(
        "llmsched/Batch-v0", scenario="azure-conv", running_order="oldest", hold="model-len", **WIDE
    )
    with pytest.raises(InputError, match="no chunk level and not all that fits"):
        play(env, baselines.expert("orca"), 0)


@pytest.mark.parametrize("name", ["area-backfill", "mc-sf"])
def test_an_admission_test_of_its_own_does_without_that_of_the_environment(name: str) -> None:
    env = make(name, hold="known")
    assert play(env, baselines.expert(name), 0) > 50
    assert_as_simulated(env, name)
    with pytest.raises(InputError, match="hold='known'"):
        play(make("sjf", hold="forecast"), baselines.expert("sjf"), 0)


@pytest.mark.parametrize("settings", [{}, {"peak": "predicted", "hold": "known", "backfill": 64}])
@pytest.mark.parametrize("name", ["vllm-v1", "srf"])
def test_batch(name: str, settings: dict[str, Any]) -> None:
    hold = "forecast" if settings else "chunk"
    env = gym.make(
        "llmsched/Batch-v0", scenario="azure-conv", kv_blocks=900, running_order="oldest", hold=hold, **WIDE
    )
    assert play(env, baselines.expert(name, **settings), 0) > 50
    assert_as_simulated(env, name, **settings)


def test_a_teacher_fills_a_plan_that_must_be_filled() -> None:
    """Where the plan may not be run yet, and not with what it never does."""
    env = make("area-backfill", work_conserving=True, chunk_levels=(), preempt="forced", idle=False)
    teacher = baselines.expert("area-backfill", strict=False)
    env.reset(seed=1)
    over, held = False, 0
    while not over:
        action = teacher(env)
        held += action == 1
        _, _, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
    assert held == 0
    env.reset(seed=1)
    with pytest.raises(InputError, match="work_conserving=False"):
        play(env, baselines.expert("area-backfill"), 1)
