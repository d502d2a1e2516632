"""The environments as Gymnasium sees them: scalar and native vector, over all kinds."""

from __future__ import annotations

import copy
import doctest
import gc
import importlib
import inspect
import itertools
import pickle
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

import baselines
from llmsched_env import InputError, Requests, envs, replay, scenarios
from llmsched_env.envs import single
from llmsched_env.envs.objective import Objective
from llmsched_env.envs.observation import GLOBAL_FEATURES, SLOT_FEATURES
from llmsched_env.envs.options import NAMES, Options
from llmsched_env.envs.wrappers import MaskInObservation

IDS = [*envs.IDS]
DECISION, BATCH, DISPATCH = IDS
MODES = [*AutoresetMode]


@pytest.fixture(params=IDS, ids=[name.split("/")[1] for name in IDS])
def env_id(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(env_id: str = DECISION, **keywords: Any) -> Any:
    return gym.make(env_id, **keywords)


def flat(observation: Any) -> NDArray[np.float32]:
    """An observation in one piece."""
    if isinstance(observation, dict):
        return np.concatenate([observation[part] for part in ("engine", "waiting", "running")], axis=-1)
    return np.asarray(observation)


def flat_mask(mask: Any) -> NDArray[np.int8]:
    """A mask, or an array of masks, in one piece."""
    if isinstance(mask, tuple):
        return np.concatenate(mask)
    if mask.dtype == object:
        width = next(len(np.concatenate(m)) for m in mask if m is not None)
        return np.array([np.zeros(width, np.int8) if m is None else np.concatenate(m) for m in mask])
    return np.asarray(mask)


def parts(env: Any) -> list[int]:
    """Choices of each entry of an action."""
    space = getattr(env, "single_action_space", env.action_space)
    return [int(space.n)] if isinstance(space, gym.spaces.Discrete) else space.nvec.tolist()


def some_action(env: Any, mask: NDArray[np.int8], g: np.random.Generator, wild: float = 0.05) -> Any:
    """A random legal action, or now and then any at all."""
    chosen, start = [], 0
    for size in parts(env):
        legal = np.flatnonzero(mask[start : start + size])
        chosen.append(int(g.integers(size) if g.random() < wild else g.choice(legal)))
        start += size
    return chosen[0] if len(chosen) == 1 else np.array(chosen)


Step = tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]


def play(env: Any, steps: int, seed: int, info: dict[str, Any]) -> Iterator[Step]:
    """Random steps; episodes follow each other."""
    g = np.random.default_rng(seed)
    for _ in range(steps):
        step = env.step(some_action(env, flat_mask(info["action_mask"]), g))
        yield step
        info = step[-1]
        if step[2] or step[3]:
            _, info = env.reset()


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, whatever it is."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, tuple | list) or (isinstance(a, np.ndarray) and a.dtype.hasobject):
        for i, (x, y) in enumerate(itertools.zip_longest(a, b)):
            assert_same(x, y, f"{where}/{i}")
    else:
        np.testing.assert_array_equal(a, b, err_msg=where)


# ---------------------------------------------------------------------- as Gymnasium expects


def test_gymnasium_finds_nothing_to_complain_of(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    check_env(make(env_id, num_requests=5).unwrapped)


@pytest.mark.parametrize("observation", ["dict", "flat"])
def test_stable_baselines_finds_nothing_to_complain_of(env_id: str, observation: str) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(make(env_id, num_requests=5, observation=observation).unwrapped)


def test_a_spec_survives_json(env_id: str) -> None:
    env = make(env_id, scenario="toy", chunk_levels=(4,), objective={"latency": 1, "goodput": 2})
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.spec.kwargs["scenario"] == "toy"
    assert again.unwrapped.options == env.unwrapped.options
    assert_same(again.reset(seed=1), env.reset(seed=1))
    many = gym.make_vec(env_id, 3, scenario="toy", autoreset_mode="same-step")
    assert EnvSpec.from_json(many.spec.to_json()).kwargs["autoreset_mode"] == "same-step"


def test_it_is_found_by_its_module_in_a_new_process() -> None:
    code = "import gymnasium as g; print(g.make('llmsched_env:llmsched/Decision-v0').reset(seed=0)[1]['dt'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0


@pytest.mark.slow
def test_it_is_made_in_processes_that_are_spawned() -> None:
    many = gym.make_vec(
        f"llmsched_env:{DECISION}",
        2,
        vectorization_mode="async",
        vector_kwargs={"context": "spawn"},
        num_requests=4,
    )
    native = gym.make_vec(DECISION, 2, num_requests=4)
    assert_same(many.reset(seed=0)[0], native.reset(seed=0)[0])
    many.close()


def test_importing_twice_registers_once(recwarn: pytest.WarningsRecorder) -> None:
    before = dict(gym.registry)
    envs.register()
    assert gym.registry == before
    assert not recwarn.list


def test_numbers_are_pythons_own(env_id: str) -> None:
    env = make(env_id, num_requests=4)
    _, info = env.reset(seed=0)
    assert type(info["dt"]) is float
    for _, reward, terminated, truncated, last in play(env, 50, 0, info):
        assert [type(x) for x in (reward, terminated, truncated)] == [float, bool, bool]
        assert type(last["dt"]) is float
        for value in last.get("metrics", {}).values():
            assert type(value) in (int, float)


def test_the_same_seed_gives_the_same_episodes(env_id: str) -> None:
    env = make(env_id, num_requests=6)

    def episodes(seed: int) -> list[Any]:
        first = env.reset(seed=seed)
        return [first, list(play(env, 80, 3, first[1]))]

    assert_same(episodes(4), episodes(4))
    assert episodes(4)[0][1]["dt"] != episodes(5)[0][1]["dt"]


def test_reset_again_and_again(env_id: str) -> None:
    env = make(env_id, num_requests=6)
    seeds = set()
    for seed in (3, None, None):
        _, info = env.reset(seed=seed)
        list(itertools.islice(play(env, 5, 0, info), 5))
        seeds.add(env.unwrapped.episode_seed)
    assert len(seeds) == 3


def test_close_again_and_again(env_id: str) -> None:
    for env in (make(env_id), gym.make_vec(env_id, 2), gym.make_vec(env_id, 40, num_threads=2)):
        env.reset(seed=0)
        env.close()
        env.close()


def test_a_step_before_the_first_reset_is_an_error(env_id: str) -> None:
    env = gym.make(env_id).unwrapped
    with pytest.raises(gym.error.ResetNeeded):
        env.step(env.action_space.sample())
    with pytest.raises(gym.error.ResetNeeded):
        env.result()
    many = gym.make_vec(env_id, 2)
    with pytest.raises(gym.error.ResetNeeded):
        many.step(many.action_space.sample())


@pytest.mark.parametrize("record", [False, True])
def test_any_action_is_a_step(env_id: str, record: bool) -> None:
    env = make(env_id, num_requests=6, disable_env_checker=True, record=record)
    env.reset(seed=0)
    wild = [-1, 10**9, -(2**40)]
    for value in wild:
        env.step(value if env.action_space.shape == () else np.full(env.action_space.shape, value))
    assert env.unwrapped.metrics()["illegal"] == len(wild)


def test_what_is_over_stays_over(env_id: str) -> None:
    env = make(env_id, num_requests=2).unwrapped
    _, info = env.reset(seed=0)
    last = next(step for step in play(env, 500, 0, info) if step[2])
    env.reset(seed=0)  # `play` began another
    info = env.reset(seed=0)[1]
    last = None
    g = np.random.default_rng(0)
    while last is None or not last[2]:
        last = env.step(some_action(env, flat_mask(info["action_mask"]), g))
        info = last[-1]
    for _ in range(3):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert_same(observation, last[0])
        assert (reward, terminated, truncated, info["dt"]) == (0.0, True, False, 0.0)
        assert "metrics" not in info
        assert flat_mask(info["action_mask"]).all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("keywords", [{}, {"record": True, "observation": "flat"}])
def test_a_copy_has_the_same_future(env_id: str, duplicate: Callable[[Any], Any], keywords: Any) -> None:
    env = make(env_id, num_requests=8, **keywords)
    _, info = env.reset(seed=2)
    *_, (_, _, _, _, info) = play(env, 40, 0, info)
    info = env.reset()[1]
    *_, step = itertools.islice(play(env, 9, 1, info), 9)
    twin = duplicate(env)
    futures = [list(play(each, 120, 5, step[-1])) for each in (env, twin)]
    assert_same(futures[0], futures[1])
    assert any(step[2] for step in futures[0])


def test_a_copy_of_many_has_the_same_future(env_id: str) -> None:
    many = gym.make_vec(env_id, 3, num_requests=5, copy=False, num_threads=2)
    many.reset(seed=1)
    g = np.random.default_rng(0)
    for _ in range(20):
        many.step(actions(many, g))
    twin = pickle.loads(pickle.dumps(many))
    for _ in range(60):
        chosen = actions(many, g)
        assert_same(many.step(chosen), twin.step(chosen))
    many.close()
    twin.close()


def test_a_saved_state_has_the_same_future(env_id: str) -> None:
    def make_many(**changes: Any) -> Any:
        given = {"num_requests": 5, "autoreset_mode": "same-step", **changes}
        return gym.make_vec(env_id, 3, vectorization_mode="vector_entry_point", **given).unwrapped

    many, twin = make_many(), make_many()
    with pytest.raises(gym.error.ResetNeeded):
        many.save_state()
    many.reset(seed=1)
    g = np.random.default_rng(0)
    for _ in range(20):
        many.step(actions(many, g))
    state = many.save_state()
    assert not any(array.dtype.hasobject for array in state.values())
    assert_same(twin.load_state(state), many._observation())
    for _ in range(200):  # over the ends of episodes, and into those drawn after
        chosen = actions(many, g)
        assert_same(many.step(chosen), twin.step(chosen))
    with pytest.raises(InputError, match="does not fit"):
        make_many(num_requests=4).load_state(state)
    with pytest.raises(InputError, match="another version"):
        twin.load_state({**state, "layout": state["layout"] ^ 1})
    del state["generators"]
    with pytest.raises(InputError, match="lacks the generators"):
        twin.load_state(state)


def test_videos_can_be_recorded(env_id: str, tmp_path: Any) -> None:
    pytest.importorskip("moviepy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        video = gym.wrappers.RecordVideo(make(env_id, scenario="toy", render_mode="rgb_array"), str(tmp_path))
        _, info = video.reset(seed=0)
        for _ in range(3):
            video.step(some_action(video, flat_mask(info["action_mask"]), np.random.default_rng(0)))
        video.close()
    assert [*tmp_path.glob("*.mp4")]


# ---------------------------------------------------------------------- many at a time

KEYWORDS: list[dict[str, Any]] = [
    {"scenario": "toy"},
    {"scenario": "slo-mix", "num_requests": 6, "observation": "flat", "objective": "mix"},
    {"scenario": "azure-conv", "num_requests": 1, "objective": "makespan"},
    {"scenario": "azure-conv", "num_requests": 2, "chunk_levels": (), "discount_rate": 0.1},
    {"scenario": "stream", "horizon_s": 2.0},
    {"scenario": "multi-tenant", "num_requests": 5, "objective": {"fairness": 1, "makespan": 1}},
]


def actions(many: Any, g: np.random.Generator) -> NDArray[np.int64]:
    return np.array([some_action(many, mask, g) for mask in many.action_masks().view(np.int8)])


def assert_same_infos(a: dict[str, Any], b: dict[str, Any], where: str = "") -> None:
    """Those of environments one by one, and of many."""
    assert a.keys() == b.keys(), where
    for key, value in a.items():
        if key.startswith("_"):
            assert (b[key] == value).all(), where
            continue
        there = a[f"_{key}"]
        if isinstance(value, dict):
            assert_same_infos(value, b[key], f"{where}{key}/")
        elif key == "final_obs":
            for i in np.flatnonzero(there):
                assert_same(value[i], b[key][i], key)
        else:
            one = flat_mask(value) if key == "action_mask" else value
            assert one.dtype == b[key].dtype
            np.testing.assert_array_equal(one[there], b[key][there], err_msg=where + key)


@pytest.mark.parametrize("mode", MODES, ids=[mode.value for mode in MODES])
@pytest.mark.parametrize("keywords", KEYWORDS, ids=lambda keywords: keywords["scenario"])
@pytest.mark.parametrize("limit", [None, 9])
def test_many_are_as_one_and_one(
    env_id: str, mode: AutoresetMode, keywords: dict[str, Any], limit: int | None
) -> None:
    keywords = keywords | ({} if env_id == DISPATCH else {"preempt": "forced"})
    fns = [lambda: gym.make(env_id, max_steps=limit, **keywords)] * 4
    ones = SyncVectorEnv(fns, autoreset_mode=mode)
    many = gym.make_vec(env_id, 4, max_steps=limit, autoreset_mode=mode, **keywords)
    assert many.observation_space == ones.observation_space
    assert many.action_space == ones.action_space
    assert many.metadata["autoreset_mode"] is many.unwrapped.autoreset_mode is mode
    a, b = ones.reset(seed=7), many.reset(seed=7)
    g, ends = np.random.default_rng(7), 0
    for _ in range(70):
        assert_same(a[0], b[0])
        assert_same_infos(a[-1], b[-1])
        chosen = actions(many, g)
        a, b = ones.step(chosen), many.step(chosen)
        assert_same(a[1:4], b[1:4])
        over = a[2] | a[3]
        ends += int(over.sum())
        if mode is AutoresetMode.DISABLED and over.any():
            assert_same(a[0], b[0])
            assert_same_infos(a[-1], b[-1])
            a, b = (each.reset(options={"reset_mask": over.copy()}) for each in (ones, many))
    assert ends > 0


def test_limits_of_steps(env_id: str) -> None:
    """One's own, which ends an episode as others end, and Gymnasium's."""
    few = {"num_requests": 30, "length_info": "none"}  # where no mask allows everything
    ones = [make(env_id, record=record, max_steps=7, **few) for record in (False, True)]
    ones.append(make(env_id, max_episode_steps=7, **few))
    many = [
        gym.make_vec(env_id, 1, autoreset_mode="disabled", **limits, **few)
        for limits in ({"max_steps": 7}, {"max_episode_steps": 7}, {"max_steps": 7, "max_episode_steps": 90})
    ]
    for each in (*ones, *many):
        each.reset(seed=0)
    g = np.random.default_rng(0)
    for step in range(1, 8):
        action = some_action(many[0], many[0].action_masks()[0], g)
        steps = [each.step(action) for each in ones]
        steps += [each.step(np.array([action])) for each in many]
        assert all(each[2:4] == (False, step == 7) for each in steps)
        infos = [each[-1] for each in steps]
        at_the_end = [step == 7] * len(steps)
        at_the_end[2] = False  # Gymnasium's wrapper says nothing to the environment
        assert ["metrics" in info for info in infos] == at_the_end
        assert [bool(flat_mask(info["action_mask"]).all()) for info in infos] == at_the_end
    assert_same(infos[0]["metrics"], infos[1]["metrics"])
    assert infos[0]["metrics"]["return"] == infos[3]["metrics"]["return"][0]
    assert ones[0].step(action)[1:4] == (0.0, False, True)
    assert ones[0].reset(seed=0)[1]["dt"] == ones[1].reset(seed=0)[1]["dt"]


def test_threads_and_shared_memory_change_nothing(env_id: str) -> None:
    kinds = [
        gym.make_vec(env_id, 70, scenario="toy", autoreset_mode="same-step", **keywords)
        for keywords in ({}, {"num_threads": 2}, {"num_threads": 3, "copy": False})
    ]
    steps = [each.reset(seed=0) for each in kinds]
    g = np.random.default_rng(0)
    for _ in range(150):
        for step in steps[1:]:
            assert_same(steps[0][0], step[0])
            assert_same(steps[0][-1], step[-1])
        chosen = actions(kinds[0], g)
        steps = [each.step(chosen) for each in kinds]
        for step in steps[1:]:
            assert_same(steps[0][1:4], step[1:4])
    for each in kinds:
        each.close()


def test_threads_go_home() -> None:
    def helpers() -> int:
        return sum(thread.name == "llmsched step" for thread in threading.enumerate())

    for end in (lambda many: many.close(), lambda many: many.reset(options={"load": 0.5}), lambda many: None):
        many = gym.make_vec(DECISION, 20, num_threads=3)
        many.reset(seed=0)
        many.step(np.zeros(20, int))
        assert helpers() == 2
        end(many)
        del many
        gc.collect()
        for _ in range(100):
            if helpers() == 0:
                break
            time.sleep(0.05)
        assert helpers() == 0


def test_gymnasiums_wrappers_take_many() -> None:
    many = gym.make_vec(DECISION, 3, scenario="toy", autoreset_mode="same-step")
    wrapped = gym.wrappers.vector.RecordEpisodeStatistics(many)
    wrapped.reset(seed=0)
    g = np.random.default_rng(0)
    for _ in range(200):
        *_, infos = wrapped.step(actions(many, g))
        if "episode" in infos:
            break
    i = int(np.argmax(infos["_episode"]))
    assert infos["episode"]["r"][i] == pytest.approx(infos["final_info"]["metrics"]["return"][i], rel=1e-9)


def test_what_is_not_copied_is_the_same_memory() -> None:
    shared, own = (gym.make_vec(DECISION, 3, copy=copied, observation="flat") for copied in (False, True))
    for many, same in ((shared, True), (own, False)):
        first = many.reset(seed=0)[0]
        a, b = many.step(np.zeros(3, int)), many.step(np.zeros(3, int))
        assert np.shares_memory(first, a[0]) is np.shares_memory(a[0], b[0]) is same
        assert np.shares_memory(a[1], b[1]) is np.shares_memory(a[2], b[2]) is same
        assert np.shares_memory(a[-1]["action_mask"], b[-1]["action_mask"]) is same


@pytest.mark.parametrize(
    "mode, after",
    [
        ("next-step", (0.0, False, True)),
        ("same-step", (None, False, False)),
        ("disabled", (0.0, True, False)),
    ],
)
def test_the_step_after_the_last(mode: str, after: tuple[float | None, bool, bool]) -> None:
    many = gym.make_vec(DECISION, 1, scenario="toy", autoreset_mode=mode)
    many.reset(seed=0)
    seeds = [int(many.unwrapped.episode_seeds[0])]
    g = np.random.default_rng(0)
    while True:
        observation, rewards, terminated, truncated, infos = many.step(actions(many, g))
        if terminated[0]:
            break
        assert "metrics" not in infos
    same = mode == "same-step"
    assert not truncated[0]
    assert ("final_obs" in infos) == ("final_info" in infos) == same
    last = infos["final_info"] if same else infos
    assert last["metrics"]["finished"].tolist() == [6]
    assert last["_metrics"].tolist() == [True]
    assert last["action_mask"].all()
    assert (many.unwrapped.episode_seeds[0] != seeds[0]) == same
    if same:
        assert infos["final_obs"][0].keys() == observation.keys()
        assert not infos["action_mask"].all()
    was = flat(observation).copy()
    observation, rewards, terminated, truncated, infos = many.step(actions(many, g))
    reward, ended, begun = after
    assert reward is None or rewards[0] == reward
    assert terminated[0] == ended
    assert (many.unwrapped.episode_seeds[0] != seeds[0]) == (begun or same)
    assert (flat(observation) == was).all() == (mode == "disabled")
    assert "metrics" not in infos


def test_seeds_one_by_one() -> None:
    many = gym.make_vec(DECISION, 3, num_requests=4)
    by_one = many.reset(seed=[5, 6, 7])
    assert_same(by_one, many.reset(seed=5))
    assert many.unwrapped.np_random_seed == (5, 6, 7)
    before = many.unwrapped.episode_seeds.copy()
    many.reset(seed=[5, None, None])
    assert (many.unwrapped.episode_seeds == before).tolist() == [True, False, False]
    with pytest.raises(InputError, match="give 3 seeds"):
        many.reset(seed=[1, 2])
    for seed in (1.5, "abc"):
        with pytest.raises(InputError, match="seed must be a whole number"):
            many.reset(seed=seed)
    with pytest.raises(InputError, match=r"whole numbers or None, not 1\.5"):
        many.reset(seed=[1, 1.5, 2])
    with pytest.raises(gym.error.Error, match="greater or equal to zero"):
        many.reset(seed=[1, -1, 2])


def test_episodes_replay_from_their_seeds(env_id: str) -> None:
    many = gym.make_vec(env_id, 3, num_requests=4)
    first, _ = many.reset(seed=1)
    env = make(env_id, num_requests=4)
    for i, seed in enumerate(many.unwrapped.episode_seeds.tolist()):
        observation, _ = env.reset(options={"seed": seed})
        np.testing.assert_array_equal(flat(observation), flat(first)[i])


def test_options_of_a_reset_of_many() -> None:
    ones = SyncVectorEnv([lambda: gym.make(DECISION, num_requests=4)] * 2)
    many = gym.make_vec(DECISION, 2, num_requests=4)
    g = np.random.default_rng(0)
    given = scenarios.get("azure-conv", num_requests=5).resolve().draw(g)
    for each in (ones, many):
        each.reset(seed=2)
    changes = ({}, {"load": 2.0}, {}, {"seed": 3}, {}, {"num_requests": 5}, {"requests": given}, {})
    for change in changes:
        a, b = (each.reset(options=dict(change)) for each in (ones, many))
        assert_same(a[0], b[0])
        for _ in range(60):
            chosen = actions(many, g)
            a, b = ones.step(chosen), many.step(chosen)
            assert_same(a[:4], b[:4])
    mask = np.array([True, False])
    with pytest.raises(InputError, match="all environments together"):
        many.reset(options={"load": 1.0, "reset_mask": mask})
    with pytest.raises(InputError, match="reset_mask must be a bool array"):
        many.reset(options={"reset_mask": [True, False]})
    with pytest.raises(InputError, match="5 requests"):
        many.reset(options={"requests": given.take(slice(0, 2))})


# ---------------------------------------------------------------------- what may be done


@pytest.mark.parametrize("keywords", [{}, {"preempt": "forced", "hold": "known"}, {"idle": True}])
def test_the_mask_is_what_is_legal(env_id: str, keywords: dict[str, Any]) -> None:
    if env_id == DISPATCH:
        keywords = {"length_info": "none"} if keywords else {}
    env = make(
        env_id, scenario="infermax-contention", num_requests=12, waiting_slots=3, running_slots=3, **keywords
    )
    env = env.unwrapped
    _, info = env.reset(seed=0)
    g = np.random.default_rng(0)
    tried = 0
    for _ in range(12):
        for _ in range(int(g.integers(1, 12))):
            _, _, over, _, info = env.step(some_action(env, flat_mask(info["action_mask"]), g))
            if over:
                _, info = env.reset()
        mask, sizes = flat_mask(info["action_mask"]), parts(env)
        assert mask.dtype == np.int8
        assert (mask == env.action_masks()).all()
        starts = np.cumsum([0, *sizes])[:-1]
        legal = [int(np.flatnonzero(mask[a : a + n])[0]) for a, n in zip(starts, sizes, strict=True)]
        assert env.action_space.contains(env.action_space.sample(mask=info["action_mask"]))
        for entry, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            for choice in range(size):
                chosen = [*legal]
                chosen[entry] = choice
                twin = copy.deepcopy(env)
                twin.step(chosen[0] if len(sizes) == 1 else np.array(chosen))
                illegal = twin.metrics()["illegal"] - env.metrics()["illegal"]
                assert illegal == 1 - mask[start + choice], (entry, choice)
                tried += 1
    assert tried > 100


def test_a_single_request_still_asks_once(env_id: str) -> None:
    env = make(env_id, num_requests=1, chunk_levels=())
    for seed in range(5):
        env.reset(seed=seed)
        assert not env.unwrapped._over
        steps, total, over = 0, 0.0, False
        while not over:
            _, reward, over, _, info = env.step(
                0 if env.action_space.shape == () else env.action_space.sample()
            )
            steps, total = steps + 1, total + reward
            assert steps < 200
        assert total == pytest.approx(info["metrics"]["return"], rel=1e-12)


@pytest.mark.parametrize("scenario", scenarios.names())
def test_whatever_the_policy_episodes_end(env_id: str, scenario: str) -> None:
    """Also if it preempts whom it can."""
    env = make(env_id, scenario=scenario, **({} if scenario == "toy" else {"num_requests": 3}))
    random = np.random.default_rng(0)
    for choose in (random.choice, lambda legal: legal[-1]):
        _, info = env.reset(seed=0)
        over, steps = False, 0
        while not over:
            masks = info["action_mask"] if isinstance(info["action_mask"], tuple) else [info["action_mask"]]
            chosen = [int(choose(np.flatnonzero(mask))) for mask in masks]
            *_, terminated, truncated, info = env.step(chosen[0] if len(chosen) == 1 else chosen)
            over, steps = terminated or truncated, steps + 1
            assert steps < 20_000
        assert terminated == (info["metrics"]["finished"] == len(env.unwrapped.requests))
        assert flat_mask(info["action_mask"]).all()


def test_an_episode_is_cut_after_ten_times_what_its_requests_take_alone() -> None:
    env = make(num_requests=3).unwrapped
    _, info = env.reset(seed=0)
    over = False
    while not over:
        *_, over, info = env.step(int(np.flatnonzero(info["action_mask"])[-1]))
    alone, arrival = env.fleet.alone[0] * 3, env.requests.arrival_s.max()
    assert 0 <= info["metrics"]["makespan_s"] - (arrival + 10 * alone) < 1
    env.reset(options={"horizon_s": 1e6})
    assert env.fleet.bank.lane["horizon"][0] == 1e6


@pytest.mark.parametrize("env_id", [BATCH, DISPATCH])
def test_masks_of_several_entries(env_id: str) -> None:
    """A tuple as the action space takes it, and the same in one array."""
    env, many = make(env_id), gym.make_vec(env_id, 1)
    _, info = env.reset(seed=0)
    _, infos = many.reset(seed=0)
    mask = info["action_mask"]
    assert [(type(part), part.dtype, len(part)) for part in mask] == [
        (np.ndarray, np.int8, n) for n in env.action_space.nvec
    ]
    whole = np.concatenate(mask)
    for other in (env.unwrapped.action_masks(), many.action_masks()[0], infos["action_mask"][0]):
        np.testing.assert_array_equal(whole, other)
    assert env.unwrapped.action_masks().dtype == many.action_masks().dtype == np.bool_


@pytest.mark.parametrize(
    "action",
    [np.nan, 0.7, 1.0, "a", None, [], [1, 2, 3], np.array([1]), np.full(32, np.nan), np.zeros(31), 2**70],
    ids=str,
)
def test_what_is_no_action_is_an_error(env_id: str, action: Any) -> None:
    """Nothing is rounded, and nothing repeated to fit."""
    env = make(env_id, disable_env_checker=True)
    env.reset(seed=0)
    with pytest.raises(InputError, match="actions must be whole numbers of shape"):
        env.step(action)
    many = gym.make_vec(env_id, 2)
    many.reset(seed=0)
    with pytest.raises(InputError, match="actions must be whole numbers of shape"):
        many.step(action)
    assert env.unwrapped.metrics()["decisions"] == 0


def test_forced_steps_can_be_asked_for() -> None:
    """Both ways lead to the same finish times if the only action is always taken."""
    finishes = []
    for skip in (True, False):
        env = make(
            num_requests=8, chunk_levels=(), skip_forced=skip, work_conserving=True, preempt="forced"
        ).unwrapped
        _, info = env.reset(seed=0)
        over, asked = False, 0
        while not over:
            legal = np.flatnonzero(info["action_mask"])
            asked += 1
            _, _, over, _, info = env.step(int(legal[legal != 1][-1]))
        finishes.append((env.result().finish_s, asked))
    np.testing.assert_array_equal(finishes[0][0], finishes[1][0])
    assert finishes[0][1] < finishes[1][1]


# ---------------------------------------------------------------------- what is seen


def longer(requests: Requests, g: np.random.Generator) -> Requests:
    """The same requests, but for their true lengths."""
    most = requests.declared_tokens
    return requests.replace(
        output_tokens=np.minimum(most, requests.output_tokens + g.integers(1, 200, len(most)))
    )


@pytest.mark.parametrize("info", ["none", "class", "predicted", "oracle"])
def test_hidden_lengths_are_hidden(env_id: str, info: str) -> None:
    env, twin = (
        make(env_id, scenario="slo-mix", num_requests=30, length_info=info).unwrapped for _ in range(2)
    )
    g = np.random.default_rng(0)
    requests = env.problem.draw(g)
    requests = requests.replace(predicted_tokens=np.maximum(1.0, requests.output_tokens + 10.0))
    a, b = env.reset(options={"requests": requests}), twin.reset(options={"requests": longer(requests, g)})
    compared, same = 0, True
    for _ in range(400):
        if any(np.isfinite(each.fleet.bank.req["finish"]).any() for each in (env, twin)):
            break
        same = same and (flat(a[0]) == flat(b[0])).all()
        if info != "oracle":
            assert_same(a, b)
        compared += 1
        action = some_action(env, flat_mask(a[-1]["action_mask"]), g)
        a, b = env.step(action), twin.step(action)
    assert compared > 5
    assert same == (info != "oracle")


def test_what_the_engine_is_told() -> None:
    """The predictions of an episode are what its length regime allows."""
    for info in ("none", "class", "predicted", "oracle"):
        env = make(scenario="slo-mix", length_info=info).unwrapped
        env.reset(seed=0)
        told, drawn = env.requests, env.problem.draw(np.random.default_rng(env.episode_seed))
        expected = {
            "none": np.full(len(drawn), np.nan),
            "class": env.problem.class_means[drawn.class_id],
            "predicted": drawn.predicted_tokens,
            "oracle": drawn.output_tokens.astype(float),
        }[info]
        np.testing.assert_array_equal(told.predicted_tokens, expected)
        np.testing.assert_array_equal(told.arrival_s, drawn.arrival_s)


def test_observations_are_within_their_bounds(env_id: str) -> None:
    for scenario in scenarios.names():
        env = make(env_id, scenario=scenario, disable_env_checker=True)
        observation, info = env.reset(seed=0)
        assert env.observation_space.contains(observation)
        for observation, *_ in play(env, 60, 0, info):
            assert env.observation_space.contains(observation), scenario


def test_an_observation_is_the_agents_own() -> None:
    env = make()
    first, _ = env.reset(seed=0)
    was = copy.deepcopy(first)
    env.step(0)
    assert_same(first, was)


def test_a_mask_in_the_observation(env_id: str) -> None:
    env = MaskInObservation(make(env_id, num_requests=4, observation="flat"))
    observation, info = env.reset(seed=0)
    assert observation.keys() == {"observation", "action_mask"}
    observation, info = env.reset(seed=0)
    for _ in range(20):
        assert env.observation_space.contains(observation)
        np.testing.assert_array_equal(observation["action_mask"], flat_mask(info["action_mask"]))
        observation, _, over, _, info = env.step(env.action_space.sample())
        if over:
            break


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("module", ["objective", "options", "single", "vector", "wrappers"])
def test_examples_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"llmsched_env.envs.{module}")).failed == 0


def test_a_page_for_each_environment(env_id: str) -> None:
    page = inspect.getdoc(type(make(env_id).unwrapped)) or ""
    headings = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert headings == [
        "Description",
        "Action space",
        "Observation space",
        "Rewards",
        "Starting state",
        "Episode end",
        "Arguments",
        "Vectorised environment",
        "Version history",
        "References",
    ]


def test_the_page_has_all_there_is() -> None:
    page = inspect.getdoc(single.DecisionEnv) or ""
    rows = [line for line in page.splitlines() if re.match(r"\| \d+ \| `\w+`: ", line)]
    features = [*enumerate(GLOBAL_FEATURES), *enumerate(SLOT_FEATURES)]
    assert [row.split(":")[0] for row in rows] == [f"| {i} | `{name}`" for i, name in features]
    arguments = page.split("## Arguments")[1].split("## Vec")[0]
    for name in NAMES:
        assert f"`{name}`" in arguments
        assert name in (Options.__doc__ or "")


# ---------------------------------------------------------------------- what is rewarded


def whole_episode(env: Any, seed: int, **options: Any) -> tuple[float, dict[str, Any]]:
    """The sum of the rewards, and the metrics."""
    _, info = env.reset(seed=seed, options=options or None)
    g = np.random.default_rng(seed)
    rewards, dt, over = [], info["dt"], False
    while not over:
        action = some_action(env, flat_mask(info["action_mask"]), g, wild=0.0)
        _, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        dt += info["dt"]
        over = terminated or truncated
    assert dt == pytest.approx(info["metrics"]["makespan_s"], rel=1e-9)
    return float(np.sum(rewards)), info["metrics"]


def jain(tokens: NDArray[np.float64]) -> float:
    return float(tokens.sum() ** 2 / (len(tokens) * (tokens**2).sum()))


@pytest.mark.parametrize(
    "objective", ["latency", "goodput", "throughput", "gpu_time", "makespan", "fairness", "violations"]
)
@pytest.mark.parametrize("scenario", ["slo-mix", "multi-tenant"])
def test_rewards_sum_up_to_the_metric(env_id: str, objective: str, scenario: str) -> None:
    keywords: dict[str, Any] = {} if env_id == DISPATCH else {"preempt": "forced"}
    env = make(
        env_id, scenario=scenario, num_requests=15, objective=objective, record=True, **keywords
    ).unwrapped
    for seed in range(3):
        total, metrics = whole_episode(env, seed)
        result, problem = env.result(), env.problem
        requests, n = result.requests, 15
        unit_time = n * problem.time_scale_s
        latency = (result.finish_s - requests.arrival_s).sum()
        gaps = np.maximum(result.generated_tokens - 1, 1)
        met = (result.first_token_s - requests.arrival_s <= requests.ttft_target_s) & (
            (result.finish_s - result.first_token_s) / gaps <= requests.tpot_target_s
        )
        rows = result.iterations
        busy = (rows["end_s"] - rows["start_s"]).sum()
        expected = {
            "latency": -latency / unit_time,
            "goodput": met.mean(),
            "throughput": requests.output_tokens.sum() / (n * problem.workload.moments().output),
            "gpu_time": -busy / unit_time,
            "makespan": -result.finish_s.max() / unit_time,
            "violations": met.mean() - 1,
        }
        if objective == "fairness":
            served = np.zeros(requests.client.max() + 1)
            schedule = result.schedule
            computed, generated = np.zeros(n, int), np.zeros(n, int)
            target = requests.prompt_tokens.astype(int)
            for r, tokens in zip(schedule.requests, schedule.tokens, strict=True):
                if tokens < 0:
                    computed[r], target[r] = 0, requests.prompt_tokens[r] + generated[r]
                    continue
                served[requests.client[r]] += tokens if computed[r] < target[r] else 2
                computed[r] += tokens
                generated[r] += computed[r] >= target[r]
            expected["fairness"] = jain(served) - 1
            assert metrics["fairness"] == pytest.approx(jain(served), rel=1e-9)
        assert total == pytest.approx(expected[objective], rel=1e-9)
        assert metrics["return"] == pytest.approx(total, rel=1e-9)
        assert metrics["latency_s"] == pytest.approx(latency / n, rel=1e-9)
        assert metrics["goodput"] == pytest.approx(met.mean(), rel=1e-9)
        assert metrics["ttft_s"] == pytest.approx(
            (result.first_token_s - requests.arrival_s).mean(), rel=1e-9
        )
        tpot = ((result.finish_s - result.first_token_s) / gaps)[result.generated_tokens > 1]
        assert metrics["tpot_s"] == pytest.approx(tpot.mean(), rel=1e-9)
        assert metrics["gpu_s"] == pytest.approx(busy, rel=1e-9)
        assert 0 < metrics["score"] <= 1


def test_a_cut_episode_is_judged_up_to_then() -> None:
    env = make(scenario="stream", horizon_s=3.0).unwrapped
    total, metrics = whole_episode(env, 0)
    result, end = env.result(), metrics["makespan_s"]
    assert end >= 3.0
    until = np.where(np.isnan(result.finish_s), end, result.finish_s)
    seen = result.requests.arrival_s <= end
    seconds = np.maximum(0, until - result.requests.arrival_s)[seen].sum()
    assert total == pytest.approx(-seconds / (len(until) * env.problem.time_scale_s), rel=2e-2)
    assert metrics["finished"] == np.isfinite(result.finish_s).sum() < len(until)


def test_a_discount_is_that_of_continuous_time() -> None:
    rate = 0.3
    env = make(num_requests=6, discount_rate=rate, preempt="forced").unwrapped
    _, info = env.reset(seed=0)
    g = np.random.default_rng(0)
    total, factor, over = 0.0, np.exp(-rate * info["dt"]), False
    while not over:
        _, reward, over, _, info = env.step(some_action(env, info["action_mask"], g))
        total += factor * reward
        factor *= np.exp(-rate * info["dt"])
    result = env.result()
    start, end = result.requests.arrival_s, result.finish_s
    expected = -((np.exp(-rate * start) - np.exp(-rate * end)) / rate).sum() / (6 * env.problem.time_scale_s)
    assert total == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "objective", ["latency", "goodput", "throughput", "gpu_time", "makespan", "violations"]
)
def test_all_that_is_rewarded_is_discounted(env_id: str, objective: str) -> None:
    rate, n = 0.3, 24
    env = make(
        env_id,
        scenario="slo-mix",
        load=4.0,
        num_requests=n,
        objective=objective,
        discount_rate=rate,
        record=True,
        **({} if env_id == DISPATCH else {"preempt": "forced"}),
    ).unwrapped
    _, info = env.reset(seed=0)
    g = np.random.default_rng(0)
    before = float(env.fleet.bank.lane["total"][0])  # the first step brings this, too, which came before it
    factor, over = np.exp(-rate * info["dt"]), False
    total = before * (1 - factor)
    while not over:
        _, reward, over, _, info = env.step(some_action(env, flat_mask(info["action_mask"]), g))
        total += factor * reward
        factor *= np.exp(-rate * info["dt"])
    result, problem = env.result(), env.problem
    requests, rows = result.requests, result.iterations

    def worth(start: Any, end: Any) -> Any:
        return (np.exp(-rate * np.asarray(start)) - np.exp(-rate * np.asarray(end))) / rate

    ttft = result.first_token_s - requests.arrival_s
    tpot = (result.finish_s - result.first_token_s) / np.maximum(result.generated_tokens - 1, 1)
    met = (ttft <= requests.ttft_target_s) & (tpot <= requests.tpot_target_s)
    missed_at = np.where(  # a late first token when it was due, a slow answer at its end
        ttft > requests.ttft_target_s, requests.arrival_s + requests.ttft_target_s, result.finish_s
    )
    unit_time = n * problem.time_scale_s
    expected = {
        "latency": lambda: -worth(requests.arrival_s, result.finish_s).sum() / unit_time,
        "goodput": lambda: np.exp(-rate * result.finish_s)[met].sum() / n,
        "throughput": lambda: (
            np.exp(-rate * token_times(result)).sum() / (n * problem.workload.moments().output)
        ),
        "gpu_time": lambda: -worth(rows["start_s"], rows["end_s"]).sum() / unit_time,
        "makespan": lambda: -worth(0.0, result.finish_s.max()) / unit_time,
        "violations": lambda: -np.exp(-rate * missed_at)[~met].sum() / n,
    }[objective]()
    assert 0 < met.sum() < n, "a case that tells nothing"
    assert total == pytest.approx(expected, rel=1e-9)


def token_times(result: Any) -> NDArray[np.float64]:
    """When each output token came, by the schedule."""
    prompt, schedule = result.requests.prompt_tokens, result.schedule
    computed, generated, times = np.zeros(len(prompt), int), np.zeros(len(prompt), int), []
    iteration = np.searchsorted(schedule.ends, np.arange(len(schedule.requests)), side="right")
    target = prompt.astype(int)
    for i, r, tokens in zip(iteration, schedule.requests, schedule.tokens, strict=True):
        if tokens < 0:
            computed[r], target[r] = 0, prompt[r] + generated[r]
            continue
        computed[r] += tokens
        if computed[r] >= target[r]:
            generated[r] += 1
            times.append(result.iterations["end_s"][i])
    assert (generated == result.generated_tokens).all()
    return np.array(times)


@pytest.mark.parametrize("targets", [(1e-4, 20.0), (1e9, 1e-9), (0.5, 0.05), (np.inf, np.inf)])
@pytest.mark.parametrize("horizon_s", [np.inf, 3.0])
def test_each_violation_is_told_once(env_id: str, targets: tuple[float, float], horizon_s: float) -> None:
    """Targets that are over before an iteration is, that nobody meets, and that some meet; requests that are
    preempted before and after their first token; and episodes that are cut."""
    ttft_target, tpot_target = targets
    options: dict[str, Any] = {} if env_id == DISPATCH else {"preempt": "free"}
    options |= {"ttft_target_s": ttft_target, "tpot_target_s": tpot_target, "horizon_s": horizon_s}
    env = make(env_id, scenario="stream", num_requests=30, objective="violations", **options).unwrapped
    for seed in range(2):
        total, metrics = whole_episode(env, seed)
        result, end = env.result(), metrics["makespan_s"]
        arrival, first = result.requests.arrival_s, result.first_token_s
        late = np.where(np.isnan(first), end, first) - arrival > ttft_target
        gaps = np.maximum(result.generated_tokens - 1, 1)
        slow = (result.finish_s - first) / gaps > tpot_target  # nan of those that were cut
        assert total == pytest.approx(-np.count_nonzero(late | slow) / 30, abs=1e-12)


def test_objectives_weigh_their_terms() -> None:
    def total(objective: Any) -> float:
        keywords = {"num_requests": 8, "preempt": "forced"}
        return whole_episode(make(scenario="slo-mix", objective=objective, **keywords).unwrapped, 1)[0]

    latency, goodput = total("latency"), total("goodput")
    assert total("mix") == pytest.approx(0.5 * latency + 0.5 * goodput, rel=1e-9)
    assert total(Objective(latency=2, goodput=-1)) == pytest.approx(2 * latency - goodput, rel=1e-9)
    with pytest.raises(InputError, match="did you mean 'latency'"):
        Objective.get("latencies")
    with pytest.raises(InputError, match="did you mean 'goodput'"):
        Objective.get({"godput": 1})
    with pytest.raises(InputError, match="finite number"):
        Objective(latency=float("nan"))
    with pytest.raises(InputError, match="all weights are 0"):
        Objective()


# ---------------------------------------------------------------------- what is recorded


def test_recording_changes_nothing_and_replays(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "_LOG_ROWS", 1)
    keywords: dict[str, Any] = {} if env_id == DISPATCH else {"preempt": "forced"}
    keywords |= {"scenario": "infermax-contention", "num_requests": 12}
    plain, recorded = make(env_id, **keywords), make(env_id, record=True, **keywords)
    a, b = plain.reset(seed=3), recorded.reset(seed=3)
    g = np.random.default_rng(0)
    while len(a) == 2 or not a[2]:
        assert_same(a, b)
        action = some_action(plain, flat_mask(a[-1]["action_mask"]), g)
        a, b = plain.step(action), recorded.step(action)
    result, env = recorded.unwrapped.result(), recorded.unwrapped
    assert plain.unwrapped.result().schedule is None
    again = replay(result.schedule, result.requests, env.problem.profile, env.problem.engine)
    np.testing.assert_array_equal(again.finish_s, result.finish_s)
    np.testing.assert_array_equal(again.first_token_s, result.first_token_s)
    assert result.metrics()["latency"]["mean"] == pytest.approx(b[-1]["metrics"]["latency_s"], rel=1e-9)


@pytest.mark.parametrize("mode", ["rgb_array", "ansi"])
def test_pictures(env_id: str, mode: str) -> None:
    env = make(env_id, scenario="infermax-contention", num_requests=10, render_mode=mode)
    _, info = env.reset(seed=0)
    shown = [env.render()]
    for i, _ in enumerate(play(env, 30, 0, info)):
        if i % 10 == 9:
            shown.append(env.render())
    if mode == "ansi":
        assert all(isinstance(text, str) for text in shown)
        assert "last" in shown[-1]
    else:
        assert all(frame.shape == shown[0].shape and frame.dtype == np.uint8 for frame in shown)
        assert (shown[0] != shown[-1]).any()


# ---------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    "keywords, complaint",
    [
        ({"waiting_slot": 4}, "unknown option 'waiting_slot'; did you mean 'waiting_slots'"),
        ({"kv_block": 4}, "did you mean 'kv_blocks'"),
        ({"scenario": "azure-cov"}, "did you mean 'azure-conv'"),
        ({"waiting_slots": 0}, "waiting_slots must be a whole number from 1 to 64, not 0"),
        ({"running_slots": 65}, "not 65"),
        ({"waiting_order": ["arrival"]}, "unknown waiting_order"),
        ({"length_info": {}}, "unknown length_info"),
        ({"max_steps": 0}, "max_steps must be"),
        ({"max_steps": True}, "max_steps must be"),
        ({"waiting_order": "arival"}, "did you mean 'arrival'"),
        ({"running_order": "newst"}, "did you mean 'newest'"),
        ({"length_info": "prediction"}, "did you mean 'predicted'"),
        ({"observation": "dictionary"}, "did you mean 'dict'"),
        ({"objective": "lateny"}, "did you mean 'latency'"),
        ({"chunk_levels": (256, 128)}, "ascending"),
        ({"chunk_levels": 128}, "ascending"),
        ({"chunk_levels": range(1, 10)}, "up to 7"),
        ({"skip_forced": "yes"}, "True or False"),
        ({"preempt": "never"}, "unknown preempt"),
        ({"hold": "peak"}, 'length_info="oracle"'),
        ({"hold": "predicted", "length_info": "none"}, "nothing is known"),
        ({"hold": "forecast", "length_info": "none"}, "nothing is known"),
        ({"waiting_order": "area", "length_info": "none"}, "nothing is known"),
        ({"discount_rate": -1}, "from 0"),
        ({"rate_window_s": 0}, "positive seconds"),
        ({"render_mode": "rgb"}, "did you mean 'rgb_array'"),
        ({"load": -1.0}, "load"),
        ({"preemption": "swap"}, "choose preemption='recompute'"),
        ({"async_scheduling": True}, "async_scheduling=False"),
        ({"prediction": "none"}, "no predicted length"),
    ],
)
def test_mistakes_are_one_line(keywords: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError) as error:
        single.DecisionEnv(**keywords).reset(seed=0)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_options_without_a_meaning_are_an_error() -> None:
    with pytest.raises(InputError, match="hold has no meaning"):
        make(DISPATCH, hold="known")
    with pytest.raises(InputError, match="readmit has no meaning"):
        make(BATCH, readmit=True)


@pytest.mark.parametrize(
    "keywords, complaint",
    [
        ({"num_envs": 0}, "num_envs must be"),
        ({"num_threads": 1.5}, "num_threads must be"),
        ({"autoreset_mode": "same"}, "did you mean 'same-step'"),
        ({"render_mode": "rgb_array"}, "the scalar environment only"),
        ({"max_episode_steps": 0}, "max_episode_steps must be"),
        ({"max_episode_steps": True}, "max_episode_steps must be"),
    ],
)
def test_mistakes_with_many(keywords: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        gym.make_vec(DECISION, **keywords)


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"lod": 1.0}, "did you mean 'load'"),
        ({"scenario": "toyy"}, "did you mean 'toy'"),
        ({"requests": 5}, "must be Requests"),
        ({"seed": -1}, "whole number from 0"),
        ({"seed": True}, "whole number from 0"),
        ({"requests": Requests.of([0.0], [5], [5]).take(slice(0, 0))}, "a request at least"),
        ({"seed": 1, "requests": Requests.of([0.0], [5], [5])}, "one of them"),
        ({"requests": Requests.of([0.0], [10**6], [5])}, "can never be served"),
        ({"requests": Requests.of([0.0], [5], [5], predicted_tokens=np.nan)}, "no predicted length"),
    ],
)
def test_mistakes_in_a_reset(options: dict[str, Any], complaint: str) -> None:
    env = make()
    with pytest.raises(InputError) as error:
        env.reset(options=options)
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"prediction": "none"},
        {"num_requests": 7, "prediction": "none"},
        {"requests": Requests.of([0.0] * 2, [10**6] * 2, [5] * 2)},
        {"async_scheduling": True},
    ],
    ids="-".join,
)
def test_after_a_reset_that_fails_all_goes_on(options: dict[str, Any]) -> None:
    scalar, twin = (make(num_requests=5).unwrapped for _ in range(2))
    many, twins = (gym.make_vec(DECISION, 2, num_requests=5) for _ in range(2))
    for each, other, action in ((scalar, twin, 0), (many, twins, np.zeros(2, int))):
        each.reset(seed=1)
        other.reset(seed=1)
        with pytest.raises(InputError):
            each.reset(options=dict(options))
        for _ in range(3):
            assert_same(each.step(action), other.step(action))
        each.reset(seed=2)
        assert each.problem.scenario == other.problem.scenario
        assert_same(each.step(action), (other.reset(seed=2), other.step(action))[1])
    with pytest.raises(gym.error.Error):
        many.reset(seed=[5, -1])
    assert many.unwrapped.np_random_seed == (2, 3)


def test_a_reset_changes_the_scenario_from_then_on(env_id: str) -> None:
    env = make(env_id).unwrapped
    env.reset(seed=0, options={"scenario": "toy"})
    assert len(env.requests) == 6
    env.reset()
    assert env.problem.scenario.name == "toy"
    env.reset(options={"scenario": "azure-conv", "num_requests": 7, "load": 0.5})
    assert (len(env.requests), env.problem.scenario.workload.load) == (7, 0.5)
    given = env.problem.draw(np.random.default_rng(0)).take(slice(0, 3))
    env.reset(options={"requests": given})
    assert len(env.requests) == 3
    assert env.episode_seed is None
    env.reset()
    assert len(env.requests) == 7


def test_options_are_equal_if_they_say_the_same() -> None:
    assert Options(chunk_levels=[1, 2], objective="latency") == Options(  # type: ignore[arg-type]
        chunk_levels=(1, 2), objective={"latency": 1.0}
    )


def test_an_expert_acts_in_many() -> None:
    many = gym.make_vec(DECISION, 3, num_requests=8, waiting_slots=64, running_slots=64, chunk_levels=())
    many.reset(seed=0)
    expert = baselines.expert("vllm-v1")
    for _ in range(20):
        many.step(expert(many))
    assert (many.unwrapped.fleet.bank.lane["illegal"] == 0).all()
