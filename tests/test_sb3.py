"""The adapter for Stable-Baselines3, and the quick policies."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing torch and its friends warns of what is old in them
    import torch as th
    from sb3_contrib import MaskablePPO
    from sb3_contrib.common.maskable.distributions import (
        MaskableCategoricalDistribution,
        MaskableMultiCategoricalDistribution,
    )
    from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_maskable
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecMonitor, VecNormalize

import llmsched_env.envs  # noqa: F401  (registers the ids)
from agents.sb3 import SB3VecEnv
from agents.sb3_policies import MaskablePolicy, Policy, QuickCategorical, QuickMultiCategorical
from llmsched_env.errors import InputError

IDS = ("llmsched/Decision-v0", "llmsched/Batch-v0", "llmsched/Dispatch-v0")
SMALL: dict[str, Any] = {"waiting_slots": 3, "running_slots": 2, "scenario": "infermax-contention"}
SMALL |= {"num_requests": 8}
TOY: dict[str, Any] = {
    "waiting_slots": 6,
    "running_slots": 1,
    "chunk_levels": (),
    "scenario": "toy",
    "preempt": "forced",
}


def small(env_id: str = IDS[0], num_envs: int = 5, **keywords: Any) -> SB3VecEnv:
    return SB3VecEnv.make(env_id, num_envs, **{**SMALL, **keywords})


def some_actions(env: SB3VecEnv, rng: np.random.Generator) -> np.ndarray:
    """Random actions, legal ones where they can be told from the mask alone."""
    if isinstance(env.action_space, gym.spaces.Discrete):
        masks = env.action_masks()
        return np.argmax(rng.random(masks.shape) * masks, axis=1)
    return rng.integers(0, env.action_space.nvec, (env.num_envs, len(env.action_space.nvec)))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return bool(np.array_equal(a, b))


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("observation", ["dict", "flat"])
def test_is_sb3s_own_vector_of_scalar_environments(env_id: str, observation: str) -> None:
    """To the last bit, with all that SB3 reads of the infos."""

    def make_one() -> gym.Env[Any, Any]:
        made = gym.make(
            env_id, disable_env_checker=True, max_episode_steps=9, observation=observation, **SMALL
        )
        return Monitor(made)

    ours = small(env_id, 3, observation=observation, max_episode_steps=9)
    theirs = DummyVecEnv([make_one] * 3)
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    ours.seed(4), theirs.seed(4)
    assert equal(ours.reset(), theirs.reset())
    rng, ends = np.random.default_rng(0), 0
    for _ in range(60):
        assert np.array_equal(ours.env_method("action_masks"), np.stack(theirs.env_method("action_masks")))
        actions = some_actions(ours, rng)
        seen, rewards, done, infos = ours.step(actions)
        also_seen, also_rewards, also_done, also_infos = theirs.step(actions)
        assert equal(seen, also_seen) and np.array_equal(done, also_done)
        assert np.array_equal(rewards, also_rewards) and rewards.dtype == np.float32
        for i in np.flatnonzero(done):
            ends += 1
            assert equal(infos[i]["terminal_observation"], also_infos[i]["terminal_observation"])
            assert infos[i]["TimeLimit.truncated"] == also_infos[i]["TimeLimit.truncated"]
            assert infos[i]["episode"].keys() == also_infos[i]["episode"].keys()
            for name in "rl":
                assert infos[i]["episode"][name] == also_infos[i]["episode"][name]
    assert ends > 6


def test_metrics_of_an_episode_come_with_its_end() -> None:
    env = small(num_envs=2)
    env.reset()
    rng = np.random.default_rng(0)
    while True:
        _, _, done, infos = env.step(some_actions(env, rng))
        if done.any():
            break
    info = infos[int(np.argmax(done))]
    assert info["metrics"]["return"] == pytest.approx(info["episode"]["r"], abs=1e-6)
    assert info["metrics"]["decisions"] == info["episode"]["l"]
    assert info["metrics"]["finished"] == 8 and type(info["metrics"]["latency_s"]) is float
    assert info["TimeLimit.truncated"] is False


def test_rows_that_go_on_share_an_empty_info() -> None:
    env = small()
    env.reset()
    *_, infos = env.step(some_actions(env, np.random.default_rng(0)))
    assert all(info is infos[0] for info in infos) and infos[0] == {}
    with pytest.raises(TypeError, match="put a copy in its place"):
        infos[0]["mine"] = 1
    with pytest.raises(TypeError, match="shared"):
        infos[0].update(mine=1)
    for mine in (
        infos[0].copy(),
        copy.copy(infos[0]),
        copy.deepcopy(infos)[0],
        pickle.loads(pickle.dumps(infos[0])),
    ):
        mine["mine"] = 1
    infos[1] = {"mine": 1}  # the list is the caller's
    *_, again = env.step(some_actions(env, np.random.default_rng(0)))
    assert again[1] == {}


@pytest.mark.parametrize("share", [True, False])
def test_what_a_step_returns_stays(share: bool) -> None:
    env = small(copy=not share)
    first = env.reset()
    kept, rng = copy.deepcopy(first), np.random.default_rng(0)
    second, rewards, *_ = env.step(some_actions(env, rng))
    before = copy.deepcopy((second, rewards))
    rewards_seen = rewards
    for _ in range(3):
        env.step(some_actions(env, rng))
    assert equal(first, kept) and equal(second, before[0]) and np.array_equal(rewards_seen, before[1])


def test_seeds_and_options() -> None:
    env = small(num_envs=3)
    assert list(env.seed(7)) == [7, 8, 9]
    first = env.reset()
    seeds = env.get_attr("episode_seeds")
    assert not equal(first, env.reset())  # seeds hold once
    env.seed(7)
    assert equal(first, env.reset()) and env.get_attr("episode_seeds") == seeds
    assert env.get_attr("np_random_seed", [1]) == [8]
    env.set_options({"num_requests": 4})
    env.reset()
    assert env.get_attr("problem")[0].num_requests == 4
    env.set_options([{}, {}, {"num_requests": 5}])
    with pytest.raises(InputError, match="share their options"):
        env.reset()


def test_masks_come_as_one_array() -> None:
    env = small()
    env.reset()
    masks = env.env_method("action_masks")
    assert isinstance(masks, np.ndarray) and masks.dtype == np.bool_
    assert masks.shape == (5, env.action_space.n) and masks.any(axis=1).all() and not masks.all()
    assert is_masking_supported(env) and np.array_equal(get_action_masks(env), masks)
    assert np.array_equal(env.env_method("action_masks", indices=[3, 1]), masks[[3, 1]])
    assert np.array_equal(env.env_method("action_masks", indices=2), masks[[2]])
    with pytest.raises(AttributeError, match="no method 'rest'"):
        env.env_method("rest")


def test_attributes() -> None:
    env = small()
    assert env.get_attr("action_space", [0, 1]) == [env.action_space] * 2
    assert env.get_attr("observation_space")[0] == env.observation_space
    assert env.get_attr("render_mode") == [None] * 5 and env.render_mode is None
    assert len(env.get_attr("options")) == 5 and env.has_attr("problem") and not env.has_attr("colour")
    with pytest.raises(AttributeError):
        env.get_attr("colour")
    env.set_attr("colour", "blue")
    assert env.get_attr("colour", 3) == ["blue"]
    with pytest.raises(InputError, match="share colour"):
        env.set_attr("colour", "red", indices=[1])
    assert env.spec.id == IDS[0] and env.unwrapped is env
    assert env.env_is_wrapped(Monitor) == [True] * 5 and env.env_is_wrapped(
        gym.wrappers.FlattenObservation, 0
    ) == [False]
    with pytest.raises(InputError, match="pictures"):
        env.get_images()
    env.close()
    env.close()


def test_refuses_what_does_not_reset_in_the_same_step() -> None:
    made = gym.make_vec(IDS[0], 2, vectorization_mode="vector_entry_point", **SMALL)
    with pytest.raises(InputError, match='autoreset_mode="same-step", not NextStep'):
        SB3VecEnv(made)
    with pytest.raises(InputError, match="waiting_slots"):
        small(wating_slots=3)


def test_a_vector_environment_of_gymnasiums_own() -> None:
    """Anything that resets in the same step."""
    made = gym.make_vec(
        "CartPole-v1", 3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": "SameStep"}
    )
    env = SB3VecEnv(made)
    env.seed(0)
    env.reset()
    ended = []
    for _ in range(60):
        *_, infos = env.step(np.ones(3, np.int64))
        ended += [info for info in infos if info]
    assert ended and {info["episode"]["r"] == info["episode"]["l"] for info in ended} == {True}
    assert all(info["terminal_observation"].shape == (4,) for info in ended)
    assert not env.has_attr("action_masks") and not is_masking_supported(env)


# ---------------------------------------------------------------------- with Stable-Baselines3


@pytest.mark.parametrize("observation", ["dict", "flat"])
def test_wrappers_of_sb3(observation: str) -> None:
    keywords = {**TOY, "observation": observation}
    plain, wrapped = (SB3VecEnv.make(IDS[0], 5, monitor=monitor, **keywords) for monitor in (True, False))
    env = VecMonitor(VecNormalize(VecCheckNan(wrapped, raise_exception=True)))
    plain.seed(1), env.seed(1)
    plain.reset(), env.reset()
    rng, ends = np.random.default_rng(0), 0
    for _ in range(150):
        assert np.array_equal(get_action_masks(env), get_action_masks(plain))
        actions = some_actions(plain, rng)
        *_, infos = plain.step(actions)
        _, _, done, their_infos = env.step(actions)
        for i in np.flatnonzero(done):
            ends += 1
            assert their_infos[i]["episode"]["l"] == infos[i]["episode"]["l"]
            final, normal = infos[i]["terminal_observation"], their_infos[i]["terminal_observation"]
            assert not equal(final, normal)  # normalised, too
    assert ends and is_masking_supported(env)


@pytest.mark.parametrize(
    ("algorithm", "policy"),
    [
        (PPO, "MultiInputPolicy"),
        (PPO, Policy),
        (A2C, Policy),
        (MaskablePPO, "MultiInputPolicy"),
        (MaskablePPO, MaskablePolicy),
    ],
)
def test_algorithms_train(algorithm: Any, policy: Any, tmp_path: Path) -> None:
    env = SB3VecEnv.make(IDS[0], 4, **TOY)
    more = {} if algorithm is A2C else {"batch_size": 64}
    model = algorithm(policy, env, n_steps=64, seed=0, device="cpu", **more).learn(512)
    assert len(model.ep_info_buffer) > 20  # from which rollout/ep_rew_mean is logged
    assert all(info["l"] > 0 and info["r"] < 0 for info in model.ep_info_buffer)
    seen = env.reset()
    masks = {"action_masks": env.action_masks()} if algorithm is MaskablePPO else {}
    actions, _ = model.predict(seen, deterministic=True, **masks)
    if masks:
        assert env.action_masks()[np.arange(4), actions].all()
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", env=env)
    assert type(again.policy) is type(model.policy)
    assert np.array_equal(again.predict(seen, deterministic=True, **masks)[0], actions)
    evaluate = evaluate_maskable if algorithm is MaskablePPO else evaluate_policy
    mean, _ = evaluate(again, env, n_eval_episodes=4)
    assert mean < 0


@pytest.mark.parametrize("env_id", IDS[1:])
def test_other_actions(env_id: str) -> None:
    for algorithm, policy in ((PPO, Policy), (MaskablePPO, MaskablePolicy)):
        algorithm(policy, small(env_id), n_steps=8, batch_size=40, n_epochs=1, device="cpu").learn(40)


# ---------------------------------------------------------------------- the quick distribution


@pytest.mark.parametrize("masked", [True, False])
def test_distribution_is_that_of_sb3(masked: bool) -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((50, 30)) < 0.3
    masks[:, 3] = True
    actions = th.as_tensor(np.argmax(rng.random(masks.shape) * masks, axis=1))
    weights = th.as_tensor(rng.normal(size=(2, 50)))
    found = []
    for make in (MaskableCategoricalDistribution, QuickCategorical):
        logits = th.as_tensor(np.random.default_rng(1).normal(size=(50, 30)) * 3).requires_grad_()
        one = make(30).proba_distribution(action_logits=logits * 1.0)
        if masked:
            one.apply_masking(masks)
        log_prob, entropy = one.log_prob(actions), one.entropy()
        (weights[0] * log_prob + weights[1] * entropy).sum().backward()
        found.append([x.detach().numpy() for x in (log_prob, entropy, logits.grad, one.mode())])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("masked", [True, False])
def test_distribution_of_entries_is_that_of_sb3(masked: bool) -> None:
    rng, sizes = np.random.default_rng(0), [4, 1, 7]
    masks = rng.random((50, 12)) < 0.5
    masks[:, [0, 4, 6]] = True
    parts = np.split(rng.random(masks.shape) * masks, [4, 5], axis=1)
    actions = th.as_tensor(np.stack([part.argmax(1) for part in parts], 1))
    weights = th.as_tensor(rng.normal(size=(2, 50)))
    found = []
    for make in (MaskableMultiCategoricalDistribution, QuickMultiCategorical):
        logits = th.as_tensor(np.random.default_rng(1).normal(size=(50, 12)) * 3).requires_grad_()
        one = make(sizes).proba_distribution(action_logits=logits * 1.0)
        one.apply_masking(masks if masked else None)
        log_prob, entropy = one.log_prob(actions), one.entropy()
        (weights[0] * log_prob + weights[1] * entropy).sum().backward()
        found.append([x.detach().numpy() for x in (log_prob, entropy, logits.grad, one.mode())])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_distribution_of_entries_samples_its_probabilities() -> None:
    th.manual_seed(0)
    logits = th.tensor([[0.0, 2.0, 1.0, -1.0, 3.0]]).repeat(200_000, 1)
    one = QuickMultiCategorical([2, 3]).proba_distribution(logits)
    one.apply_masking(np.array([[1, 1, 1, 1, 0]], bool).repeat(200_000, 0))
    sampled = one.sample().numpy()
    for entry, shares in ((0, np.exp([0, 2])), (1, np.exp([1, -1]))):
        counts = np.bincount(sampled[:, entry], minlength=2)
        np.testing.assert_allclose(counts / 200_000, shares / shares.sum(), atol=0.004)


def test_distribution_samples_its_probabilities() -> None:
    th.manual_seed(0)
    logits = th.tensor([[0.0, 2.0, 1.0, -1.0, 3.0]]).repeat(200_000, 1)
    one = QuickCategorical(5).proba_distribution(logits)
    one.apply_masking(np.array([[1, 1, 1, 0, 0]], bool).repeat(200_000, 0))
    counts = np.bincount(one.sample().numpy(), minlength=5)
    shares = np.exp([0, 2, 1]) / np.exp([0, 2, 1]).sum()
    assert counts[3:].sum() == 0
    np.testing.assert_allclose(counts[:3] / 200_000, shares, atol=0.004)


def test_without_sb3_one_error_names_the_extra() -> None:
    for module in ("agents.sb3", "agents.sb3_policies"):
        code = "import sys; sys.modules['stable_baselines3'] = sys.modules['sb3_contrib'] = None; import "
        code += module
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 1
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith(f"ImportError: {module} needs") and 'pip install "llmsched-env[train]"' in last
        assert "During handling" not in run.stderr
