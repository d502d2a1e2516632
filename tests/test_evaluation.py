"""`evaluate`: what policies of all kinds come to on the same episodes."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing torch and its friends warns of what is old in them
    from sb3_contrib import MaskablePPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecNormalize

import baselines
from agents.evaluation import FIRST_SEED, evaluate
from agents.sb3 import SB3VecEnv, StopAfter
from llmsched_env import InputError, simulate

DECISION, BATCH, DISPATCH = "llmsched/Decision-v0", "llmsched/Batch-v0", "llmsched/Dispatch-v0"
SMALL: dict[str, Any] = {"scenario": "infermax-contention", "num_requests": 12}
SMALL |= {"waiting_slots": 12, "running_slots": 12, "running_order": "oldest"}


def first_legal(seen: Any, masks: Any) -> Any:
    return masks.argmax(axis=1)


def latencies(model: Any, prepare: Any = None, num_episodes: int = 6, seed: int = FIRST_SEED) -> Any:
    """Of a model on toy, an episode after the other in the scalar environment."""
    env: Any = gym.make(DECISION, scenario="toy", observation="flat")
    found = []
    for i in range(num_episodes):
        seen, _ = env.reset(seed=seed + i)
        over = False
        while not over:
            masks = env.unwrapped.action_masks()[None]
            keywords = {"action_masks": masks} if isinstance(model, MaskablePPO) else {}
            shown = prepare(seen[None]) if prepare else seen[None]
            seen, _, over, _, info = env.step(model.predict(shown, deterministic=True, **keywords)[0][0])
        found.append(info["metrics"]["latency_s"])
    return found


@pytest.mark.parametrize("env_id", [DECISION, BATCH, DISPATCH])
def test_expert_is_the_simulation_of_the_same_requests(env_id: str) -> None:
    found = evaluate("vllm-v1", env_id, num_episodes=5, seed=7, **SMALL)
    env: Any = gym.make(env_id, **SMALL)
    for i in range(5):
        env.reset(seed=7 + i)
        inner = env.unwrapped
        result = simulate(
            inner.requests, baselines.get("vllm-v1"), inner.problem.profile, inner.problem.engine
        )
        assert found["latency_s"][i] == pytest.approx(result.metrics()["latency"]["mean"], rel=1e-12)
        assert found["makespan_s"][i] == result.makespan_s
        assert found["preemptions"][i] == result.preemptions_total
        assert found["iterations"][i] == result.iterations_total
    assert len(set(found["decisions"])) > 1  # some end sooner than others
    assert {values.shape for values in found.values()} == {(5,)} and (found["finished"] == 12).all()


def test_a_name_and_its_expert_are_the_same() -> None:
    one, other = (evaluate(policy, num_episodes=3, **SMALL) for policy in ("srf", baselines.expert("srf")))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)


def test_a_function_is_given_what_the_scalar_environment_shows() -> None:
    """Each episode is played once, whatever becomes of the others, and does not depend on their number."""
    rng = np.random.default_rng(0)
    weights = rng.random(10_000)

    def policy(seen: Any, masks: Any) -> Any:
        assert seen["engine"].shape[0] == masks.shape[0] and masks.dtype == np.bool_
        return (masks * weights[: masks.shape[1]]).argmax(axis=1)

    cut = {"max_episode_steps": 200}  # who preempts whenever it is legal is never done
    many, few = (evaluate(policy, num_episodes=n, seed=3, **cut, **SMALL) for n in (9, 4))
    for name in many:
        np.testing.assert_array_equal(many[name][:4], few[name])
    env: Any = gym.make(DECISION, **SMALL)
    for i in range(9):
        env.reset(seed=3 + i)
        over, steps = False, 0
        while not over and steps < 200:
            mask = env.unwrapped.action_masks()
            *_, over, _, _ = env.step(int((mask * weights[: len(mask)]).argmax()))
            steps += 1
        expected = env.unwrapped.metrics()
        assert {name: values[i] for name, values in many.items()} == pytest.approx(expected, nan_ok=True)


def test_random_policy() -> None:
    rng = np.random.default_rng(0)

    def policy(seen: Any, masks: Any) -> Any:
        return (rng.random(masks.shape) * masks).argmax(axis=1)

    found = evaluate(policy, num_episodes=64, scenario="toy", observation="flat")
    assert (found["finished"] == 6).all() and (found["illegal"] == 0).all()
    assert 25 < found["latency_s"].mean() < 45  # in order of arrival 36.75
    assert found["latency_s"].min() >= 20


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO])
def test_models_are_taken_at_their_best(algorithm: Any) -> None:
    env = VecNormalize(SB3VecEnv.make(DECISION, 4, scenario="toy", observation="flat"))
    model = algorithm("MlpPolicy", env, n_steps=16, batch_size=64, seed=0, device="cpu").learn(64)
    prepare = env.normalize_obs
    keywords: dict[str, Any] = {"scenario": "toy", "observation": "flat", "num_episodes": 6}
    assert evaluate(model, prepare=prepare, **keywords)["latency_s"].tolist() == latencies(model, prepare)
    assert evaluate(model, **keywords)["latency_s"].tolist() == latencies(model)


def test_long_episodes_are_cut() -> None:
    found = evaluate(first_legal, num_episodes=3, max_episode_steps=5, **SMALL)
    assert (found["decisions"] == 5).all() and (found["finished"] < 12).all()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("vllm-v11", "vllm-v1"),
        (3, "a policy is a scheduler's name"),
        (None, "a policy is a scheduler's name"),
        (lambda seen, masks: masks, r"actions of shape \(2,\), not \(2, "),
    ],
)
def test_what_is_no_policy_is_refused(policy: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(policy, num_episodes=2, **SMALL)


def test_options_that_there_are_not() -> None:
    with pytest.raises(InputError, match="waiting_slots"):
        evaluate(first_legal, wating_slots=4)
    with pytest.raises(InputError, match="num_envs must be a whole number from 1, not 0"):
        evaluate(first_legal, num_episodes=0)


def test_training_stops_after_some_seconds() -> None:
    env = SB3VecEnv.make(DECISION, 4, scenario="toy", observation="flat")
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=64, device="cpu")
    model.learn(10**9, callback=StopAfter(0.2))
    assert 0 < model.num_timesteps < 10**6
