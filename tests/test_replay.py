"""A schedule gives the same times in the engine, in Decision-v0 and in Batch-v0; a broken one is refused."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import baselines
from baselines.optimal import Instance, Solution, replay
from baselines.optimal.env import make_env, scenario_of
from baselines.optimal.instance import mixed
from llmsched_env import InputError, Scheduler, simulate
from llmsched_env.core.schedule import Schedule
from llmsched_env.core.state import Status
from llmsched_env.scheduling.own import can_grant, evict, first, grant

DECISION, BATCH = "llmsched/Decision-v0", "llmsched/Batch-v0"
ALL = ("chunk", "pause", "preempt", "idle")


def play(env: Any, expert: Any, seed: int = 0) -> tuple[float, dict[str, Any]]:
    """An episode: what its rewards add up to, and its last info."""
    env.reset(seed=seed)
    total = 0.0
    while True:
        _, reward, terminated, truncated, info = env.step(expert(env))
        total += float(reward)
        if terminated or truncated:
            return total, info


def solved(instance: Instance, scheduler: str | Scheduler) -> Solution:
    """What a scheduler makes of an instance."""
    made = baselines.get(scheduler) if isinstance(scheduler, str) else scheduler
    run = simulate(instance.requests, made, instance.profile, instance.engine, record="schedule")
    return Solution.of(instance, run.schedule, 0.0, made.name, 0.0)


def assert_the_same(solution: Solution, env_id: str, **options: Any) -> Any:
    """Follow the schedule in an environment; returns that, at the end of the episode."""
    env, instance = make_env(solution, env_id, **options), solution.instance
    total, _ = play(env, baselines.expert(solution))
    found, expected = env.unwrapped.result(), solution.result()
    for name in ("finish_s", "first_token_s", "preemptions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert instance.value(found) == solution.objective
    unit = len(instance) * (env.unwrapped.problem.time_scale_s if not instance.maximise else 1)
    assert total * unit == pytest.approx(solution.objective * (1 if instance.maximise else -1), rel=1e-9)
    return env


# ---------------------------------------------------------------------- schedules of all kinds


@pytest.mark.parametrize("env_id", [DECISION, BATCH])
@pytest.mark.parametrize("scheduler", ["vllm-v1", "sjf", "mc-sf", "sarathi", "sglang", "area-backfill"])
def test_heuristics(scheduler: str, env_id: str) -> None:
    for seed in range(3):
        for load in (None, 1.0):
            assert_the_same(solved(mixed(8, seed, load=load, allow=ALL), scheduler), env_id)


def anything(seed: int, *, together: bool) -> Scheduler:
    """A scheduler that does whatever comes to its mind; `together`: all decode, or none."""
    rng = np.random.default_rng(seed)

    def give(e: Any, r: int, most: int) -> None:
        q = e.req[r]
        rest = q.prompt + q.generated if q.status == Status.WAITING else q.target - q.computed
        tokens = min(max(1, rest), most, e.s.budget)
        if tokens > 0 and q.granted == 0 and can_grant(e, r, tokens):
            grant(e, r, tokens)

    def lack(e: Any) -> bool:
        decoding = [e.req[r] for r in e.running[: e.s.num_running] if e.req[r].computed >= e.req[r].target]
        return sum(q.computed >= q.blocks * e.s.block_size for q in decoding) > e.s.free

    def plan(e: Any) -> None:
        while lack(e) or (e.s.num_running and e.s.num_waiting > e.s.num_victims and rng.random() < 0.1):
            evict(e, e.running[rng.integers(e.s.num_running)])
        gone = e.victims[: e.s.num_victims].tolist()
        running = e.running[: e.s.num_running].tolist()
        waiting = [r for r in range(len(e.req)) if e.req[r].status == Status.WAITING and r not in gone]
        decode = rng.random() < 0.8
        for r in running:
            if e.req[r].computed >= e.req[r].target and (decode if together else rng.random() < 0.7):
                give(e, r, 1)
        for r in running + waiting:
            if (r in waiting or e.req[r].computed < e.req[r].target) and rng.random() < 0.7:
                give(e, r, int(rng.choice([3, 7, 64])))
        idle = not running and not gone and e.s.arrived < len(e.req)
        if e.s.num_planned == 0 and not idle:  # time has to go on
            for r in running if together else running[:1]:
                give(e, r, 64)
            for r in waiting + gone:
                give(e, r, 64)

    return Scheduler("anything", plan=plan)


@pytest.mark.parametrize("together", [True, False])
def test_whatever_a_schedule_does(together: bool) -> None:
    """Pauses, chunks, preemptions, idling: what Batch-v0 can say; Decision-v0 where all decode or none."""
    followed = {DECISION: 0, BATCH: 0}
    for seed in range(30):
        instance = mixed(6, seed, load=(None, 1.0, 0.4)[seed % 3], allow=ALL)
        solution = solved(instance, anything(seed, together=together))
        for env_id in followed:
            try:
                assert_the_same(solution, env_id)
                followed[env_id] += 1
            except InputError as error:
                what = "in the same iteration" if env_id == BATCH else "all decode, or none"
                assert what in str(error)
    assert followed[BATCH] > 20
    assert followed[DECISION] > 25 if together else followed[DECISION] < 5


@pytest.mark.parametrize("objective", ["gpu_time", "makespan", "slo_goodput"])
def test_rewards_add_up_to_the_objective(objective: str) -> None:
    instance = mixed(6, 3, load=0.8, allow=ALL)
    targets = {"ttft_target_s": 300.0, "tpot_target_s": 200.0} if objective == "slo_goodput" else {}
    instance = instance.replace(requests=instance.requests.replace(**targets), objective=objective)
    for env_id in (DECISION, BATCH):
        assert_the_same(solved(instance, "srf"), env_id)


def test_more_sizes_of_chunks_than_levels() -> None:
    """Those that use the budget up need no level; others do."""
    rng = np.random.default_rng(0)
    rows = [[0.0, int(p), 3] for p in rng.integers(20, 60, 12)]
    instance = Instance.of(rows, 500, 37, {"form": "linear", "c0": 1.0, "c1": 0.01}, allow=ALL)
    for env_id in (DECISION, BATCH):
        env = assert_the_same(solved(instance, "vllm-v1"), env_id)
        assert env.unwrapped.options.chunk_levels == ()
    with pytest.raises(InputError, match="sizes, environments have up to 7"):
        make_env(solved(instance, crumbs()))


def crumbs() -> Scheduler:
    """A scheduler that serves one request at a time in chunks of 1, 2, 3, ... tokens."""

    def plan(e: Any) -> None:
        chunk = 1 + e.s.iterations % 12
        if e.s.num_running:
            q = e.req[e.running[0]]
            grant(e, e.running[0], max(1, min(q.target - q.computed, chunk)))
        elif e.s.num_waiting:
            grant(e, first(e), min(e.req[first(e)].prompt, chunk))

    return Scheduler("crumbs", plan=plan)


def test_a_vector_of_environments() -> None:
    solution = solved(mixed(6, 1, allow=ALL), "srf")
    env = gym.make_vec(
        DECISION, num_envs=3, scenario=scenario_of(solution.instance), chunk_levels=(), length_info="oracle"
    )
    env.reset(seed=0)
    expert = baselines.expert(solution)
    ended = np.zeros(3, bool)
    while not ended.any():
        *_, ended, _, info = env.step(expert(env))
    assert info["metrics"]["latency_s"] == pytest.approx(np.full(3, solution.objective / 6))


def test_reset_draws_the_instance_of_the_seed() -> None:
    env = gym.make(DECISION, scenario="azure-conv", num_requests=10)
    env.reset(seed=7)
    scenario = env.unwrapped.problem.scenario
    requests = Instance.of_scenario(scenario, 7).requests
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(requests, name), getattr(env.unwrapped.requests, name))


# ---------------------------------------------------------------------- what cannot be followed


def test_where_it_cannot_be_followed() -> None:
    solution = solved(mixed(4, 0, allow=ALL), "vllm-v1")
    with pytest.raises(InputError, match="Dispatch chooses among rules"):
        play(make_env(solution, "llmsched/Dispatch-v0"), baselines.expert(solution))
    with pytest.raises(InputError, match="hold='chunk'"):
        play(make_env(solution, hold="known"), baselines.expert(solution))
    with pytest.raises(InputError, match="no reward adds up to mean_ttft"):
        make_env(solution.instance.replace(objective="mean_ttft"))
    with pytest.raises(InputError, match="no settings, such as chunked"):
        baselines.expert(solution, chunked=False)
    with pytest.raises(InputError, match="has no schedule"):
        baselines.expert(Solution.of(solution.instance, None, 0.0, "none", 0.0))
    with pytest.raises(InputError, match="waiting_slots"):
        play(make_env(last := solved(mixed(8, 0, allow=ALL), "sjf"), waiting_slots=1), baselines.expert(last))
    with pytest.raises(InputError, match=r"request .* tokens|unfinished"):  # another episode
        play(make_env(mixed(4, 1, allow=ALL)), baselines.expert(solution))


def test_off_its_path() -> None:
    """It says so; one that is not strict takes any legal action."""
    solution = solved(mixed(6, 0, allow=ALL), "vllm-v1")
    env, strict, lenient = (
        make_env(solution),
        baselines.expert(solution),
        baselines.expert(solution, strict=False),
    )
    _, info = env.reset(seed=0)
    strict(env)
    env.step(int(np.flatnonzero(info["action_mask"])[-1]))
    env.step(0)  # before the others are admitted
    with pytest.raises(InputError, match="somebody else has acted"):
        strict(env)
    over = False
    while not over:
        action = lenient(env)
        assert env.unwrapped.action_masks()[action]
        *_, over, _, _ = env.step(action)


# ---------------------------------------------------------------------- broken schedules

ROWS = [[0.0, 8, 3], [0.0, 6, 2]]
Entries = list[list[tuple[int, int]]]
GOOD: Entries = [[(0, 8)], [(0, 1), (1, 6)], [(0, 1), (1, 1)]]


def scheduled(entries: Entries, start_s: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0)) -> Schedule:
    flat = [pair for row in entries for pair in row]
    return Schedule(
        np.array(start_s[: len(entries)]),
        np.cumsum([len(row) for row in entries]),
        np.array([r for r, _ in flat], np.int32),
        np.array([tokens for _, tokens in flat], np.int32),
    )


def small(*allow: str, kv_tokens: int = 20, token_budget: int = 10) -> Instance:
    return Instance.of(ROWS, kv_tokens, token_budget, {"form": "linear", "c0": 1.0}, allow=allow)


def test_a_good_schedule() -> None:
    solution = Solution.of(small(), scheduled(GOOD), 6.0, "by hand", 0.0)
    assert (solution.objective, solution.status) == (6.0, "optimal")
    assert_the_same(solution, DECISION)


LAST = [(0, 1), (1, 1)]
BROKEN: dict[str, tuple[Entries, dict[str, Any], str]] = {
    "more tokens than it can use": ([[(0, 9)], *GOOD[1:]], {}, r"iteration 0 .* given 9 tokens .* 1 to 8"),
    "more decodes than one": ([GOOD[0], [(0, 2), (1, 6)]], {}, r"iteration 1 .* given 2 tokens"),
    "an unknown request": ([[(7, 8)]], {}, "iteration 0 .* no request 7"),
    "a negative request": ([[(-1, 8)]], {}, "iteration 0 .* no request -1"),
    "twice": ([[(0, 4), (0, 4)]], {}, "iteration 0 .* request 0 was given tokens twice"),
    "no room": ([GOOD[0], [(0, 1), (1, 6)]], {"kv_tokens": 14}, r"iteration 1 .* needs 6 more KV blocks"),
    "budget": ([[(0, 8), (1, 6)], LAST, [(0, 1)]], {}, "iteration 0 .* 14 tokens exceed .* budget of 10"),
    "a chunk": ([[(0, 3)], [(0, 5)], *GOOD[1:]], {}, 'iteration 0 .* 3 of 8 tokens, and "chunk" is not'),
    "a pause": ([GOOD[0], [(1, 6)], LAST, [(0, 1)]], {}, 'iteration 1 .* left out, and "pause" is not'),
    "a preemption": (
        [GOOD[0], [(0, -1), (1, 6)], [(1, 1), (0, 9)], [(0, 1)]],
        {},
        'iteration 1 .* "preempt"',
    ),
    "nobody": (
        [GOOD[0], [(0, -1)], [(0, 9)], [(0, 1), (1, 6)], [(1, 1)]],
        {"allow": ("preempt",)},
        "iteration 1 .* nobody gets a token",
    ),
    "preempting who waits": ([GOOD[0], [(1, -1)]], {}, "iteration 1 .* only running ones"),
    "after the end": ([GOOD[0], GOOD[1], [(0, 1)], [(0, 1), (1, 1)]], {}, "iteration 3 .* is finished"),
    "missing requests": (GOOD[:2], {}, "ends after 2 iterations with 2 requests unfinished"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case: str) -> None:
    entries, settings, match = BROKEN[case]
    instance = small(*settings.get("allow", ()), **{k: v for k, v in settings.items() if k != "allow"})
    with pytest.raises(InputError, match=match):
        replay(instance, scheduled(entries))


def test_wrong_times() -> None:
    with pytest.raises(InputError, match=r"iteration 1 at 1 s: it is to start at 0.5 s"):
        replay(small(), scheduled(GOOD, (0.0, 0.5, 2.0)))
    with pytest.raises(InputError, match=r'iteration 1 at 4 s: the engine waits since 1 s, and "idle"'):
        replay(small(), scheduled(GOOD, (0.0, 4.0, 5.0)))
    replay(small("idle"), scheduled(GOOD, (0.0, 4.0, 5.0)))
    late = small().replace(requests=small().requests.replace(arrival_s=[0.0, 1.5]))
    with pytest.raises(InputError, match="iteration 1 at 1 s: request 1 is not there yet"):
        replay(late, scheduled(GOOD))


def test_in_an_environment_it_is_refused_too() -> None:
    broken = scheduled([GOOD[0], [(0, 2), (1, 6)]])
    with pytest.raises(InputError, match=r"iteration 1 .* given 2 tokens"):
        play(make_env(small()), baselines.expert(broken))
    waits = scheduled(GOOD, (0.0, 4.0, 5.0))  # until nobody arrives
    with pytest.raises(InputError, match="possible here until the next arrival"):
        play(make_env(small("idle")), baselines.expert(waits))
