"""Rollouts: as they were when they were written down, per id and version; and anything may be done, anyhow.

python tests/test_rollouts.py       # write tests/rollouts.json anew, where a version has changed on purpose
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import llmsched_env

WRITTEN = Path(__file__).with_name("rollouts.json")
IDS = ["llmsched/Decision-v0", "llmsched/Batch-v0", "llmsched/Dispatch-v0"]
SCENARIOS = ["toy", "azure-conv", "slo-mix"]


def legal(env: Any, info: dict[str, Any], g: np.random.Generator) -> Any:
    """A random legal action, drawn with g alone."""
    space, mask = env.action_space, info["action_mask"]
    if isinstance(space, gym.spaces.Discrete):
        return int(g.choice(np.flatnonzero(mask)))
    parts = mask if isinstance(mask, tuple) else np.split(mask, np.cumsum(space.nvec)[:-1])
    return np.array([g.choice(np.flatnonzero(part)) for part in parts])


def rollout(name: str, scenario: str) -> dict[str, Any]:
    """Figures of 400 random legal steps."""
    env = gym.make(name, scenario=scenario, observation="flat")
    g = np.random.default_rng(0)
    observation, info = env.reset(seed=0)
    rewards, seen, legal_actions, episodes = 0.0, np.zeros(observation.shape), 0, 0
    for _ in range(400):
        observation, reward, terminated, truncated, info = env.step(legal(env, info, g))
        rewards += reward
        seen += observation
        legal_actions += int(sum(np.sum(part) for part in info["action_mask"]))
        if terminated or truncated:
            episodes += 1
            observation, info = env.reset()
    inner = env.unwrapped
    return {
        "reward": rewards,
        "observations": [float(seen[:20].sum()), float(seen[20:].sum())],
        "legal": legal_actions,
        "episodes": episodes,
        "clock_s": float(inner.fleet.bank.s["clock"][0]),
        "requests": [float(inner.requests.arrival_s.sum()), int(inner.requests.output_tokens.sum())],
    }


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", IDS)
def test_a_version_does_what_it_did(name: str, scenario: str) -> None:
    written = json.loads(WRITTEN.read_text())[f"{name} {scenario}"]
    found = rollout(name, scenario)
    for key, value in written.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key


class Anything(RuleBasedStateMachine):
    """Resets and steps with any actions of the space, legal or not."""

    @initialize(name=st.sampled_from(IDS), scenario=st.sampled_from(SCENARIOS), seed=st.integers(0, 99))
    def begin(self, name: str, scenario: str, seed: int) -> None:
        self.env = gym.make(name, scenario=scenario, waiting_slots=4, running_slots=4)
        self.env.action_space.seed(seed)
        self.observation, self.info = self.env.reset(seed=seed)
        self.over = False
        self.clock = 0.0

    @rule(times=st.integers(1, 20))
    def act(self, times: int) -> None:
        for _ in range(times):
            if self.over:
                return
            result = self.env.step(self.env.action_space.sample())
            self.observation, reward, terminated, truncated, self.info = result
            assert type(reward) is float and type(terminated) is bool and type(truncated) is bool
            assert np.isfinite(reward)
            self.over = terminated or truncated

    @rule(times=st.integers(1, 20), seed=st.integers(0, 1000))
    def act_legally(self, times: int, seed: int) -> None:
        g = np.random.default_rng(seed)
        for _ in range(times):
            if self.over:
                return
            before = int(self.env.unwrapped.fleet.bank.lane["illegal"][0])
            self.observation, _, terminated, truncated, self.info = self.env.step(
                legal(self.env, self.info, g)
            )
            assert int(self.env.unwrapped.fleet.bank.lane["illegal"][0]) == before
            self.over = terminated or truncated

    @rule(seed=st.none() | st.integers(0, 99))
    def again(self, seed: int | None) -> None:
        self.observation, self.info = self.env.reset(seed=seed)
        self.over = False
        self.clock = 0.0

    @invariant()
    def all_is_well(self) -> None:
        assert self.env.observation_space.contains(self.observation)
        bank = self.env.unwrapped.fleet.bank
        s, req = bank.s[0], bank.req[0]
        assert s["error"] == 0
        assert s["clock"] >= self.clock
        self.clock = float(s["clock"])
        assert req["blocks"].sum() + s["free"] == s["kv_blocks"]
        assert (req["generated"] <= req["stop"]).all()
        mask = self.info["action_mask"]
        assert all(np.any(part) for part in (mask if isinstance(mask, tuple) else (mask,)))

    def teardown(self) -> None:
        if hasattr(self, "env"):
            self.env.close()


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


if __name__ == "__main__":
    assert llmsched_env.__version__
    figures = {f"{name} {scenario}": rollout(name, scenario) for name in IDS for scenario in SCENARIOS}
    WRITTEN.write_text(json.dumps(figures, indent=1) + "\n")
