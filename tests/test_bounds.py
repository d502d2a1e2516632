"""No row falls above its cost model, no bound above what a schedule reaches."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optimal_oracle import optimum

import baselines
from baselines.optimal import ALLOWANCES, OBJECTIVES, Instance, replay
from baselines.optimal.bounds import best_bound, capacity, lower_bounds, report
from baselines.optimal.instance import mixed
from baselines.optimal.minorant import blends, linear_minorants
from baselines.optimal.search import search
from llmsched_env import profiles, simulate, workloads
from llmsched_env.errors import InputError
from llmsched_env.profiles import Profile

# ---------------------------------------------------------------------- minorants

TABLE: dict[str, Any] = {
    "prefill_tokens": [0, 100, 400],
    "decodes": [0, 4, 32],
    "context": [10, 200],
    "seconds": [
        [[0.9, 1.0], [1.0, 1.5], [1.5, 3.0]],
        [[1.1, 1.1], [1.2, 1.9], [1.6, 3.4]],
        [[2.0, 2.0], [2.2, 2.5], [2.6, 4.5]],
    ],
}
FORMS = [
    Profile("staircase", "staircase", {"c": 3.0, "a": 2.0, "b0": 7}),
    Profile("staircase-fraction", "staircase", {"c": 0.1, "a": 2.0, "b0": 3.3}),
    Profile("piecewise", "piecewise", {"c": 3.0, "a": 2.0, "b0": 7}),
    Profile("piecewise-flat", "piecewise", {"c": 30.0, "a": 2.0, "b0": 7}),
    Profile("table", "table", TABLE),
    Profile(
        "table-one-context",
        "table",
        {**TABLE, "context": [50], "seconds": np.array(TABLE["seconds"])[:, :, :1].tolist()},
    ),
    Profile("table-falling", "table", {**TABLE, "seconds": np.array(TABLE["seconds"])[::-1].tolist()}),
    *(
        Profile(
            "noise", "table", {**TABLE, "seconds": np.random.default_rng(k).uniform(1, 2, (3, 3, 2)).tolist()}
        )
        for k in range(5)
    ),
]
ALL = [
    *map(profiles.get, profiles.names()),
    profiles.get("roofline:llama-3-8b@h100"),
    profiles.get("roofline:llama-3-70b@a100:tp4"),
    *FORMS,
]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), cpu=st.booleans())
@pytest.mark.parametrize("profile", ALL, ids=lambda p: p.name)
def test_no_batch_is_faster_than_a_row_says(profile: Profile, seed: int, cpu: bool) -> None:
    rng = np.random.default_rng(seed)
    if cpu:
        profile = profile.replace(cpu_s=0.1, cpu_s_per_request=0.01)
    chunk, prefills, decodes, context = (int(2 ** rng.uniform(0, k)) for k in (11, 4, 10, 14))
    prefill = int(rng.integers(chunk, chunk * prefills + 1))
    rows = linear_minorants(
        profile, max_prefill_tokens=prefill, max_decodes=decodes, max_context=context, max_chunk=chunk
    )
    assert rows.shape[1] == 5 and (rows >= 0).all()
    least = rng.choice([0.0, 0.9])  # all batches, or those near the limits
    features = []
    for _ in range(100):
        D = int(rng.integers(int(least * decodes), decodes + 1))
        reads = rng.integers(max(1, int(least * context)), context + 1, D)
        P, NP, CX, KP = 0, 0, 0.0, 0
        for _ in range(rng.integers(0 if D else 1, prefills + 2)):
            c = min(int(rng.integers(max(1, int(least * chunk)), chunk + 1)), prefill - P)
            if c < 1:
                break
            k = int(rng.integers(0, context))
            P, NP, CX, KP = P + c, NP + 1, CX + c * (k + c / 2), KP + k
        if P + D:
            features.append((P, NP, CX, KP, D, int(reads.sum())))
    f = np.array(features, np.float64)
    seconds = profile.time(*f.T)
    linear = np.stack([np.ones(len(f)), f[:, 0], f[:, 4], f[:, 5], f[:, 2]])
    assert (blends(rows) @ linear <= seconds * (1 + 1e-12)).all()


def test_rows_of_a_linear_model_are_the_model() -> None:
    profile = Profile("linear", "linear", {"c0": 1.0, "c1": 2.0, "c2": 3.0, "c3": 4.0, "c4": 5.0}, cpu_s=0.5)
    rows = linear_minorants(profile, max_prefill_tokens=9, max_decodes=9, max_context=9)
    assert rows.tolist() == [[1.5, 2.0, 3.0, 4.0, 5.0]]


def test_rows_reach_the_model() -> None:
    """Some row is exact, or nearly so, for a decode alone, and for the largest batch."""
    for name, (D, P) in itertools.product(
        ["a100-llama3-8b", "infermax-7b", "roofline:llama-3-8b@h100"], [(1, 0), (64, 448)]
    ):
        profile = profiles.get(name)
        rows = linear_minorants(profile, max_prefill_tokens=448, max_decodes=64, max_context=1000)
        seconds = profile.time(P, 1 if P else 0, P * P / 2, 0, D, D * 500)
        found = (rows @ np.array([1, P, D, D * 500, P * P / 2])).max()
        assert 0.9 * seconds <= found <= seconds * (1 + 1e-12)


def test_a_function_says_nothing() -> None:
    profile = Profile.custom(lambda P, NP, CX, KP, D, KV: 1.0 + P + D)
    rows = linear_minorants(profile, max_prefill_tokens=9, max_decodes=9, max_context=9)
    assert rows.tolist() == [[0.0] * 5]


# ---------------------------------------------------------------------- bounds


def random_instance(seed: int, *, requests: int, tokens: int, objective: str | None = None) -> Instance:
    """Tiny instances of all kinds: cost models, blocks, slots, budgets, arrivals, allowances, objectives."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, requests + 1))
    prompt, output = rng.integers(1, tokens + 1, n), rng.integers(1, tokens + 1, n)
    costs: list[dict[str, Any]] = [
        {"form": "linear", "c0": 10, "c1": 2, "c2": 1, "c3": 1, "c4": 0.5},
        {"form": "linear", "c0": 3, "c1": 0.5, "c2": 4, "c3": 2, "c4": 0},  # to recompute is cheaper
        {"form": "linear", "c0": 1},
        {"form": "linear", "c0": 0.1, "c1": 1, "c2": 0, "c3": 0.3},
        {"form": "hinge", "h0": 2, "h1": 6, "h2": 1.5, "h3": 0.2, "h4": 0.1, "h5": 0.3},
        {"form": "hinge", "h0": 0, "h1": 9, "h2": 3, "h3": 0, "h4": 0.0, "h5": 0},
        {"form": "staircase", "c": 2, "a": 3, "b0": 3},
        {"form": "staircase", "c": 0, "a": 3, "b0": 2.5},
        {"form": "piecewise", "c": 4, "a": 2, "b0": 3},
        {"form": "infermax", "layers": 100, "a_o": 2, "b_o": 5, "a_d": 1, "b_d": 9, "s_d": 2, "a_p": 0.5,
         "b_p": 4, "s_p": 3, "m_p": 1, "floor": 9},
        {"form": "table", **TABLE},
    ]  # fmt: skip
    cost = costs[rng.integers(len(costs))]
    if rng.random() < 0.2:
        cost = {**cost, "cpu_s": 0.5, "cpu_s_per_request": 0.7}
    cost_scale = 8.0 if cost["form"] != "table" else 1.0
    arrival = np.zeros(n)
    if rng.random() < 0.7:
        gaps = rng.integers(0, 5, n) * cost_scale * rng.choice([0.2, 1.0, 3.0])
        arrival = gaps.cumsum() - gaps[0] * rng.integers(0, 2)
    block = int(rng.choice([1, 1, 2, 3]))
    needed = max(-(-(prompt + output - 1) // block)) * block
    objective = objective or str(rng.choice(list(OBJECTIVES)))
    allow = [what for what in ("chunk", "pause", "preempt", "idle") if rng.random() < 0.5]
    budget = int(rng.integers(1, 9) if "chunk" in allow else rng.integers(prompt.max(), prompt.sum() + 2))
    targets: dict[str, Any] = {}
    if objective == "slo_goodput":
        targets = {
            "ttft_target_s": rng.choice([10.0, 20.0, 40.0], n) * cost_scale / 8,
            "tpot_target_s": rng.choice([5.0, 15.0, 30.0], n) * cost_scale / 8,
        }
    return Instance.of(
        np.stack([arrival, prompt, output], axis=1).tolist(),
        int(needed + rng.integers(0, 2 * tokens)),
        budget,
        cost,
        allow=allow,
        objective=objective,
        name=f"random-{seed}",
        block_size=block,
        max_num_seqs=int(rng.integers(1, n + 1)) if rng.random() < 0.3 else None,
        **targets,
    )


def check(instance: Instance, reached: float, rounds: int = 8) -> None:
    """No bound of the instance's objective is beyond what a schedule reached."""
    for name, bound in lower_bounds(instance, rounds=rounds).items():
        short = reached - bound if instance.maximise else bound - reached
        assert short <= 1e-9 * abs(reached), f"{instance.name}: {name} says {bound}, {reached} was reached"


def try_everything(seed: int) -> None:
    instance = random_instance(seed, requests=2, tokens=3)
    if "preempt" in instance.allow and "chunk" in instance.allow and len(instance) > 1:
        instance = random_instance(seed, requests=2, tokens=2)
    check(instance, optimum(instance))


@pytest.mark.parametrize("seed", range(40))
def test_no_bound_is_above_the_optimum(seed: int) -> None:
    try_everything(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 600))
def test_no_bound_is_above_the_optimum_of_many(seed: int) -> None:
    try_everything(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_no_bound_is_above_what_the_exact_search_finds(seed: int) -> None:
    objective = ("total_latency", "total_latency", "gpu_time", "makespan", "mean_ttft")[seed % 5]
    instance = random_instance(seed, requests=5, tokens=5, objective=objective)
    solution = search(instance, time_limit_s=2.0)
    check(instance, solution.objective, rounds=20)


SOME = ["area-backfill", "fastserve", "mc-sf", "sarathi", "sjf", "srpt", "tgi", "vllm-v0", "vllm-v1"]


def test_no_bound_is_above_what_a_scheduler_reaches() -> None:
    schedulers_on(Instance.of_scenario("slo-mix", num_requests=50, allow=ALLOWANCES), SOME)


def test_no_bound_is_above_what_a_scheduler_reaches_with_little_memory() -> None:
    for seed in range(3):
        schedulers_on(mixed(40, seed, load=0.8, allow=ALLOWANCES), SOME)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "azure-conv", "reasoning", "infermax-contention", "slo-mix"])
def test_no_bound_is_above_what_any_scheduler_reaches(name: str) -> None:
    schedulers_on(Instance.of_scenario(name, allow=ALLOWANCES), baselines.names())


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.5, 0.85, 1.1])
@pytest.mark.parametrize("workload", workloads.names())
def test_no_bound_is_above_what_a_scheduler_reaches_on_a_trace(workload: str, load: float) -> None:
    schedulers_on(trace(workload, load, 200), SOME)


def trace(workload: str, load: float, num_requests: int) -> Instance:
    """Requests of an embedded workload on the profile that is the default."""
    profile = profiles.get("a100-llama3-8b")
    assert profile.kv_tokens is not None
    drawn = workloads.get(workload, num_requests=num_requests, load=load, seed=1)
    requests = simulate(drawn, baselines.get("sarathi"), profile).requests
    return Instance.of(
        requests, profile.kv_tokens, 2048, profile, allow=ALLOWANCES, block_size=16, max_num_seqs=256
    )


def schedulers_on(instance: Instance, names: list[str]) -> None:
    """The bounds of all objectives hold for every scheduler whose schedule the instance allows."""
    wanted = [name for name in OBJECTIVES if name != "slo_goodput" or name == instance.objective]
    found = {name: lower_bounds(instance, name) for name in wanted}
    requests = instance.requests.replace(predicted_tokens=instance.requests.output_tokens)
    checked = 0
    for name, budget in itertools.product(
        names, {instance.token_budget, max(16, instance.token_budget // 8)}
    ):
        engine = instance.engine.replace(token_budget=budget)
        try:
            run = simulate(requests, baselines.get(name), instance.profile, engine, record="schedule")
            assert run.schedule is not None
            result = replay(instance, run.schedule)
        except InputError:  # it swaps, passes the token budget, or cannot serve these requests
            continue
        checked += 1
        for objective in wanted:
            value = instance.replace(objective=objective).value(result)
            for bound, least in found[objective].items():
                if objective == "slo_goodput":
                    assert value <= least, f"{name}: {value} meet their targets, {bound} says {least}"
                else:
                    assert least <= value * (1 + 1e-9), f"{name}: {objective} {value}, {bound} says {least}"
    assert checked >= len(names)  # of twice as many


# ---------------------------------------------------------------------- what is assumed


def test_bounds_know_what_is_allowed() -> None:
    """A recomputation in place of a decode makes a schedule shorter than bounds without preemption say."""
    cost = {
        "form": "linear",
        "c0": 1,
        "c1": 0,
        "c2": 0,
        "c3": 10,
        "c4": 0,
    }  # prefills are free, reads are not
    instance = Instance.of([[0, 4, 3]], kv_tokens=8, token_budget=8, cost=cost, allow=["preempt"])
    assert optimum(instance) == 3
    check(instance, 3)
    without = instance.replace(allow=[])
    assert all(bound > 3 for bound in lower_bounds(without).values())
    check(without, optimum(without))
    assert optimum(without) == 3 + 10 * 5 + 10 * 6


def test_blocks_are_whole() -> None:
    """Two requests of 5 tokens fit into 10 tokens of cache, but not into blocks of 4."""
    cost = {"form": "linear", "c0": 1}
    for size, iterations in ((1, 1), (4, 2)):
        instance = Instance.of(
            [[0, 5, 1]] * 2, 12, 64, cost, block_size=size, objective="gpu_time", allow=ALLOWANCES
        )
        assert lower_bounds(instance)["area"] == pytest.approx(iterations)
        assert optimum(instance) == iterations


def test_seats_and_the_token_budget_are_resources() -> None:
    cost = {"form": "linear", "c0": 1}
    rows = [[0, 1, 4]] * 6
    seats = Instance.of(rows, 1000, 1000, cost, max_num_seqs=2, objective="gpu_time")
    assert lower_bounds(seats)["area"] == pytest.approx(12)
    budget = Instance.of(rows, 1000, 3, cost, objective="gpu_time")
    assert lower_bounds(budget)["area"] == pytest.approx(8)
    prompts = Instance.of([[0, 30, 1]] * 6, 1000, 9, cost, objective="gpu_time", allow=["chunk"])
    assert lower_bounds(prompts)["area"] == pytest.approx(20)


def test_the_order_of_the_toy_is_its_optimum() -> None:
    instance = Instance.of_scenario("toy")
    assert lower_bounds(instance, rounds=0)["order"] == pytest.approx(6 * 20.0)


def test_pairs_are_exact_for_two_equal_requests_at_once() -> None:
    """Both yield in every iteration, and each is in the way of the other."""
    cost = {"form": "linear", "c0": 100, "c1": 3, "c2": 7, "c3": 1}
    instance = Instance.of([[0, 5, 9]] * 2, 1000, 64, cost, allow=["pause", "idle"])
    assert lower_bounds(instance)["pairs"] == pytest.approx(optimum(instance))


def test_arrivals_after_a_pause_count_from_then() -> None:
    cost = {"form": "linear", "c0": 1, "c1": 1}
    instance = Instance.of([[5, 3, 2], [100, 3, 2]], 100, 64, cost, objective="makespan")
    assert lower_bounds(instance) == pytest.approx({"area": 105.0, "alone": 105.0})


def test_a_custom_cost_model_has_no_bounds() -> None:
    profile = Profile.custom(lambda P, NP, CX, KP, D, KV: 1.0 + P + D)
    for objective in ("total_latency", "mean_ttft", "gpu_time", "makespan"):
        instance = Instance.of([[0, 3, 2]] * 3, 100, 64, profile, objective=objective)
        found = lower_bounds(instance)
        assert all(value == 0.0 for name, value in found.items() if objective != "makespan"), found
    assert capacity(instance) == np.inf


def test_slo_goodput_is_bounded_from_above() -> None:
    cost = {"form": "linear", "c0": 1, "c1": 1}
    instance = Instance.of(
        [[0, 3, 2]] * 4, 100, 64, cost, objective="slo_goodput", ttft_target_s=[3.0, 4.0, 9.0, 9.0]
    )
    assert lower_bounds(instance)["alone"] == 3
    assert best_bound(instance) == ("alone", 3) and optimum(instance) <= 3
    tight = instance.replace(
        requests=instance.requests.replace(ttft_target_s=[4.0] * 4, tpot_target_s=[1.0] * 4)
    )
    assert best_bound(tight) == ("area", 1) and optimum(tight) == 1


def test_an_unknown_objective_is_named() -> None:
    with pytest.raises(InputError, match="did you mean 'makespan'"):
        lower_bounds(mixed(3, 0), "makspan")


def test_report_has_all_bounds() -> None:
    rows = report(mixed(4, 0), rounds=2)
    assert {row["objective"] for row in rows} == set(OBJECTIVES) - {"slo_goodput"}
    for row in rows:
        assert row["value"] > 0 and row["unit"] and row["what"]
    assert sum(row["best"] for row in rows) >= 4


@pytest.mark.slow
def test_prices_are_the_tightest_in_overload() -> None:
    found = lower_bounds(trace("fixed-100-100", 1.1, 500))
    assert found["prices"] > 1.15 * max(found["pairs"], found["order"], found["alone"])
