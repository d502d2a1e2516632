"""`llmsched/AgentNetwork-v0`: it is the network that `simulate_network` runs, decision by decision."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_env import InputError, networks
from llmsched_env.networks import simulate_network

ID = "llmsched/AgentNetwork-v0"


def make(**keywords: Any) -> Any:
    return gym.make(ID, **{"observation": "flat", **keywords}).unwrapped


def make_vec(num_envs: int, **keywords: Any) -> Any:
    options = {"observation": "flat", "vectorization_mode": "vector_entry_point", **keywords}
    return gym.make_vec(ID, num_envs, **options).unwrapped


def play(env: Any, choose: Any, **keywords: Any) -> tuple[list[float], list[float], dict[str, float]]:
    """Rewards, seconds that steps took, and metrics of an episode."""
    _, info = env.reset(**keywords)
    rewards, dts, over = [], [info["dt"]], False
    while not over:
        _, reward, terminated, truncated, info = env.step(choose(info["action_mask"]))
        rewards.append(reward)
        dts.append(info["dt"])
        over = terminated or truncated
    return rewards, dts, info["metrics"]


def by_order(order: list[int]) -> Any:
    """The first class of an order that is legal, or else whatever is."""
    return lambda mask: next((c for c in order if mask[c]), int(mask.argmax()))


@pytest.mark.parametrize("observation", ["flat", "dict"])
def test_gymnasium_accepts_it(observation: str) -> None:
    check_env(make(observation=observation, horizon_s=30.0), skip_render_check=True)


@pytest.mark.parametrize(
    ("discipline", "order"), [("entry-first", [0, 2, 1, 3]), ("exit-first", [1, 3, 0, 2])]
)
def test_classes_by_priority_are_the_discipline(discipline: str, order: list[int]) -> None:
    env = make(horizon_s=300.0)
    rewards, dts, metrics = play(env, by_order(order), options={"seed": 5})
    jobs = env.jobs_of(5)
    found = simulate_network(env.network, discipline, jobs=jobs, horizon_s=300.0)
    assert metrics["finished"] == np.isfinite(found.job_finish_s).sum() > 100
    assert metrics["jobs_mean"] == pytest.approx(found.mean_jobs, rel=1e-12)
    assert metrics["illegal"] == 0
    assert sum(dts) == pytest.approx(300.0)
    assert sum(rewards) == pytest.approx(metrics["return"])


@pytest.mark.parametrize("name", ["rybko-stolyar", "fork-join"])
def test_returns_are_latencies(name: str) -> None:
    """By Little's law, both as time passes and job by job; the units are those of the class."""
    ends = {}
    for objective in ("jobs", "latency"):
        env = make(network=name, num_jobs=40, load=0.7, objective=objective)
        rewards, _, metrics = play(env, by_order([0, 1]), options={"seed": 3})
        assert metrics["finished"] == metrics["arrived"] == 40
        ends[objective] = sum(rewards), metrics["latency_s"]
    assert ends["jobs"] == pytest.approx(ends["latency"])
    total, latency = ends["jobs"]
    assert total < 0.0 and latency > 0.0


@pytest.mark.parametrize("skip", [True, False])
def test_discounted_rewards_are_those_of_continuous_time(skip: bool) -> None:
    """The sum of discounted rewards is the integral of exp(-rate t) jobs(t) from the first decision on, and
    what was before that from 0 on."""
    rate = 0.02
    env = make(num_jobs=30, load=0.8, discount_rate=rate, skip_forced=skip)
    rewards, dts, _ = play(env, by_order([1, 3, 0, 2]), options={"seed": 1})
    found = float((np.array(rewards) * np.exp(-rate * (np.cumsum(dts[:-1]) - dts[0]))).sum())
    job, first = env._lanes.made[0].job, dts[0]

    def area(begin: float, end: float) -> float:
        """Integral over that time, discounted from its beginning."""
        arrival, finish = (np.clip(job[name], begin, end) - begin for name in ("arrival", "finish"))
        return float((np.exp(-rate * arrival) - np.exp(-rate * finish)).sum() / rate)

    assert found == pytest.approx(-(area(0.0, first) + area(first, np.inf)) / env._lanes.problem.unit())


@pytest.mark.parametrize("objective", ["jobs", "latency"])
def test_what_is_not_done_at_the_horizon_counts(objective: str) -> None:
    """Also the time between the last event and the horizon; both objectives come to the same."""
    env = make(horizon_s=1000.0, load=1.5, objective=objective)
    jobs = env.network.draw(30, seed=1)
    rewards, _, _ = play(env, by_order([1, 3, 0, 2]), options={"jobs": jobs})
    g, job = env._lanes.made[0].g[0], env._lanes.made[0].job
    there = np.where(np.isnan(job["finish"]), 1000.0, job["finish"]) - job["arrival"]
    assert float(g["area"]) == pytest.approx(there.sum())
    assert sum(rewards) * env._lanes.problem.unit() == pytest.approx(-there.sum())
    cut = make(horizon_s=100.0, load=1.5, objective=objective)
    total = sum(play(cut, by_order([1, 3, 0, 2]), options={"seed": 2})[0])
    assert cut._lanes.made[0].g[0]["jobs_in"] > 50
    assert total * cut._lanes.problem.unit() == pytest.approx(-float(cut._lanes.made[0].g[0]["area"]))


def test_answers_are_cut_as_in_simulate_network() -> None:
    plain = networks.get("jsq")
    station = dataclasses.replace(plain.stations[0].engine, max_model_len=120)
    stations = [dataclasses.replace(one, engine=station) for one in plain.stations]
    short = dataclasses.replace(plain, stations=stations)
    env = make(network=short, num_jobs=50, route=False)
    _, _, metrics = play(env, by_order([0]), options={"seed": 0})
    found = simulate_network(env.network, jobs=env.jobs_of(0))
    assert metrics["latency_s"] == pytest.approx(found.job_latency_s.mean())
    whole = simulate_network(plain, jobs=env.jobs_of(0))
    assert found.job_latency_s.mean() < 0.9 * whole.job_latency_s.mean()


@pytest.mark.parametrize("mode", ["next-step", "same-step", "disabled"])
def test_an_episode_without_decisions_ends_with_the_first_action(mode: str) -> None:
    late = networks.Jobs.of([500.0], 1, 0, 10, 10)
    vec = make_vec(2, horizon_s=100.0, autoreset_mode=mode)
    vec.reset(seed=0, options={"jobs": late})
    _, rewards, terminated, truncated, info = vec.step([0, 0])
    assert truncated.all() and not terminated.any() and not rewards.any()
    metrics = info["final_info"]["metrics"] if mode == "same-step" else info["metrics"]
    assert metrics["decisions"].tolist() == [1, 1] and metrics["arrived"].tolist() == [0, 0]
    _, _, terminated, truncated, _ = vec.step([0, 0])
    assert truncated.all() == (mode == "disabled")


def test_after_an_error_a_reset_is_needed() -> None:
    vec = make_vec(3, horizon_s=30.0)
    vec.reset(seed=0)
    vec._lanes.made[1].g["error"] = 4
    with pytest.raises(InputError, match="no token came out"):
        for _ in range(200):
            vec.step([0, 0, 0])
    with pytest.raises(gym.error.ResetNeeded):
        vec.step([0, 0, 0])
    vec.reset(seed=0)
    vec.step([0, 0, 0])


def test_vectorised_it_is_each_with_its_seed() -> None:
    n, rng = 3, np.random.default_rng(0)
    vec = make_vec(n, horizon_s=25.0, autoreset_mode="disabled")
    singles = [make(horizon_s=25.0) for _ in range(n)]
    seen, info = vec.reset(seed=7)
    for i, env in enumerate(singles):
        first, _ = env.reset(seed=7 + i)
        np.testing.assert_array_equal(first, seen[i])
    over = np.zeros(n, bool)
    while not over.all():
        actions = rng.integers(vec.single_action_space.n, size=n)
        seen, rewards, terminated, truncated, info = vec.step(actions)
        for i, env in enumerate(singles):
            if over[i]:
                assert rewards[i] == 0.0
                continue
            own = env.step(int(actions[i]))
            np.testing.assert_array_equal(own[0], seen[i])
            assert own[1:4] == (rewards[i], terminated[i], truncated[i])
            np.testing.assert_array_equal(own[4]["action_mask"], info["action_mask"][i])
            if own[2] or own[3]:
                for name, value in own[4]["metrics"].items():
                    assert info["metrics"][name][i] == value
        over |= terminated | truncated


@pytest.mark.parametrize("threads", [1, 2])
def test_autoreset_modes_agree(threads: int) -> None:
    """The same actions by episode give the same rewards, whenever the next one begins."""

    def episodes(mode: str) -> list[list[float]]:
        n = 20
        vec = make_vec(n, horizon_s=12.0, autoreset_mode=mode, num_threads=threads)
        vec.reset(seed=3)
        done: list[list[float]] = []
        now: list[list[float]] = [[] for _ in range(n)]
        fresh = np.zeros(n, bool)
        lengths = []
        while len(done) < 40:
            masks = vec.action_masks()
            _, rewards, terminated, truncated, info = vec.step(masks.argmax(axis=1))
            for i in range(n):
                if not fresh[i]:
                    now[i].append(float(rewards[i]))
                if terminated[i] or truncated[i]:
                    done.append([i, *now[i]])
                    now[i] = []
            fresh = (terminated | truncated) if mode == "next-step" else np.zeros(n, bool)
            if mode == "same-step" and (terminated | truncated).any():
                i = int(np.argmax(terminated | truncated))
                assert info["final_obs"][i].shape == vec.single_observation_space.shape
                assert info["final_info"]["metrics"]["decisions"][i] == len(done[-1]) - 1 or lengths
                lengths.append(i)
        vec.close()
        return sorted(done[:20])

    assert episodes("next-step") == episodes("same-step")


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(networks.names()), conserving=st.booleans())
def test_invariants_under_random_actions(seed: int, name: str, conserving: bool) -> None:
    rng = np.random.default_rng(seed)
    env = make(network=name, num_jobs=12, load=0.9, work_conserving=conserving)
    seen, info = env.reset(seed=seed)
    over, last, illegal = False, 0.0, 0
    while not over:
        assert env.observation_space.contains(seen)
        mask = info["action_mask"]
        assert mask.any()
        action = int(rng.integers(len(mask)))
        illegal += mask[action] == 0
        seen, reward, terminated, truncated, info = env.step(action)
        assert reward <= 0.0 and info["dt"] >= 0.0
        over = terminated or truncated
    metrics = info["metrics"]
    assert terminated and metrics["finished"] == 12
    assert metrics["illegal"] == illegal
    made = env._lanes.made[0]
    for s in made.engines:  # nothing is left anywhere
        assert s["num_running"] == s["num_waiting"] == 0 and s["free"] == s["kv_blocks"]
    tokens = made.req["prompt"].sum() + made.req["stop"].sum() - len(made.req)
    computed = made.engines["total_prefill"].sum() + made.engines["total_decode"].sum()
    assert computed - made.req["recomputed"].sum() == tokens
    assert last == 0.0


def test_routes_can_be_asked_for() -> None:
    """Joining the shortest queue by hand is the pool's rule of that name."""
    settings: dict[str, Any] = {"network": "jsq", "load": 0.9, "num_jobs": 300}
    env = make(**settings, route=True)
    _, info = env.reset(options={"seed": 4})
    over, asked = False, 0
    while not over:
        made = env._lanes.made[0]
        mask = info["action_mask"]
        routes = np.flatnonzero(mask[-2:])
        if len(routes) == 2:
            left = [
                made.station["tokens_in"][k] - s["total_prefill"] - s["total_decode"] + s["total_recomputed"]
                for k, s in enumerate(made.engines)
            ]
            action = len(mask) - 2 + int(np.argmin(left))
            asked += 1
        else:
            action = int(mask.argmax())
        _, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
    assert asked == 300
    finish = env._lanes.made[0].job["finish"].copy()
    own = make(**settings, route=False)
    _, info = own.reset(options={"seed": 4})
    over = own._lanes.lane["ask"][0] == 2
    while not over:
        _, _, terminated, truncated, info = own.step(int(info["action_mask"].argmax()))
        over = terminated or truncated
    np.testing.assert_array_equal(finish, own._lanes.made[0].job["finish"])


def test_copies_go_on_alike() -> None:
    env = make(horizon_s=60.0)
    env.reset(seed=1)
    for _ in range(30):
        env.step(0)
    others = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    mine = [env.step(1)[1] for _ in range(40)]
    for other in others:
        assert [other.step(1)[1] for _ in range(40)] == mine


def test_an_episode_can_be_cut_and_pictured() -> None:
    env = make(max_steps=25, render_mode="rgb_array", horizon_s=60.0)
    env.reset(seed=0)
    for step in range(25):
        *_, terminated, truncated, info = env.step(0)
        assert (terminated, truncated) == (False, step == 24)
    assert info["metrics"]["decisions"] == 25
    frame = env.render()
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.std() > 5
    text = make(render_mode="ansi", horizon_s=60.0)
    text.reset(seed=0)
    assert "jobs" in text.render()
    assert len(env.action_meanings()) == env.action_space.n


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"network": "rybko"}, "did you mean 'rybko-stolyar'"),
        ({"objectiv": "jobs"}, "did you mean 'objective'"),
        ({"objective": "job"}, "did you mean 'jobs'"),
        ({"load": -1.0}, "load"),
        ({"load": 1e9}, "load"),
        ({"horizon_s": 0.5}, "jobs arrive in the mean"),
        ({"horizon_s": True}, "horizon_s"),
        ({"num_jobs": 0}, "num_jobs"),
        ({"horizon_s": float("nan")}, "horizon_s"),
        ({"discount_rate": -1}, "discount_rate"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_bad_input_is_named(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**keywords)


def test_misuse_is_named() -> None:
    env = make()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    with pytest.raises(InputError, match="unknown option 'laod'"):
        env.reset(options={"laod": 0.5})
    with pytest.raises(InputError, match="give one of them"):
        env.reset(options={"seed": 1, "jobs": env.jobs_of(0)})
    with pytest.raises(InputError, match="4 classes and 2 workflows"):
        env.reset(options={"jobs": networks.Jobs.of([0.0], 1, 7, 10, 10)})
    env.reset(seed=0)
    with pytest.raises(InputError):
        env.step(0.5)
