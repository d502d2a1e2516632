"""List schedules and their search: legal, valued as the engine values them, repeatable, and no worse than
what is named."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import registry
from baselines.optimal import listing, replay
from baselines.optimal.annealing import Search
from baselines.optimal.improve import improve, incumbent
from baselines.optimal.instance import ALLOWANCES, OBJECTIVES, Instance, mixed, unit_time
from baselines.optimal.listing import Memory, Plan
from llmsched_env import scenarios, simulation
from llmsched_env.errors import InputError

_QUICK = settings(max_examples=40)


@st.composite
def instances(draw: st.DrawFn, most: int = 12) -> Instance:
    """Small instances under all allowances and objectives, tight and loose in every limit."""
    allow = draw(st.sets(st.sampled_from(sorted(ALLOWANCES))))
    made = mixed(
        draw(st.integers(1, most)),
        draw(st.integers(0, 999)),
        load=draw(st.sampled_from([None, 0.5, 1.5])),
        allow=allow,
    )
    block_size = draw(st.sampled_from([1, 4]))
    engine = made.engine.replace(
        block_size=block_size,
        kv_blocks=draw(st.integers(32, 120)) // block_size,
        token_budget=draw(st.integers(4 if "chunk" in allow else 26, 64)),
        max_num_seqs=draw(st.integers(1, 8)),
    )
    requests = made.requests.replace(ttft_target_s=1000.0, tpot_target_s=200.0)
    return made.replace(requests=requests, engine=engine, objective=draw(st.sampled_from(sorted(OBJECTIVES))))


def _cost(instance: Instance, value: float) -> float:
    return -value if instance.maximise else value


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12)


def _plan(instance: Instance, seed: int) -> Plan:
    """Any list schedule that the instance allows."""
    rng = np.random.default_rng(seed)
    n, task = len(instance), listing.task_of(instance)
    plan = Plan.of(
        listing.knobs_of(
            task,
            cap=int(rng.integers(1, 64)),
            batch=int(rng.integers(1, 8)),
            depth=int(rng.integers(0, n + 1)),
            alone=int(instance.allows("pause") and rng.random() < 0.5),
            reach=int(rng.integers(0, 3)) if instance.allows("preempt") else 0,
        ),
        rng.permutation(n).astype(np.int32),
    )
    plan.delay[:] = rng.integers(0, 5, n) * (rng.random(n) < 0.3)
    paces = np.clip(rng.integers(1, 64, n), listing.least_cap(task), instance.token_budget)
    plan.pace[:] = paces * (rng.random(n) < 0.3)
    return plan


@given(instances(), st.integers(0, 999))
@_QUICK
def test_list_schedules_are_legal_and_their_values_those_of_the_engine(instance: Instance, seed: int) -> None:
    task, plan = listing.task_of(instance), _plan(instance, seed)
    memory = Memory.of(task)
    value, _ = listing.evaluate(task, memory, plan)
    schedule = listing.schedule_of(task, memory, plan)
    assert _close(_cost(instance, value), instance.value(replay(instance, schedule)))


@given(instances(most=60), st.integers(0, 999))
@_QUICK
def test_a_search_knows_what_it_has_without_running_all_of_it(instance: Instance, seed: int) -> None:
    task, plan = listing.task_of(instance), _plan(instance, seed)
    memory = Memory.of(task)
    value, guide = listing.evaluate(task, memory, plan)
    search = Search.of(task, plan, seed, instance.allows("pause"), instance.allows("preempt"))
    search.run(100, 0.1 * guide / len(instance), 0.01 * guide / len(instance))
    assert _close(listing.evaluate(task, memory, search.now)[1], search.scores[0])
    best, _ = listing.evaluate(task, memory, search.best)
    assert best <= value and _close(best, search.scores[2])
    schedule = listing.schedule_of(task, memory, search.best)
    assert _close(_cost(instance, best), instance.value(replay(instance, schedule)))


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("allow", [(), tuple(ALLOWANCES)])
def test_an_incumbent_is_no_worse_than_any_named_scheduler(objective: str, allow: tuple[str, ...]) -> None:
    instance = mixed(10, 3, load=1.5, allow=allow)
    requests = instance.requests.replace(ttft_target_s=500.0, tpot_target_s=200.0)
    instance = instance.replace(requests=requests, objective=objective)
    found = incumbent(instance)
    assert found.objective == instance.value(found.result())
    for name in registry.names():
        try:
            result = simulation.simulate(
                instance.requests, registry.get(name), instance.profile, instance.engine, record="schedule"
            )
            assert result.schedule is not None
            value = instance.value(replay(instance, result.schedule))
        except InputError:
            continue
        assert _cost(instance, found.objective) <= _cost(instance, value) + 1e-12 * value


def test_improving_is_no_worse_than_the_start_and_the_incumbent() -> None:
    instance = mixed(24, 1)
    start = improve(instance, max_evaluations=20_000, time_limit_s=60)
    assert start.objective <= incumbent(instance).objective
    for given_start in (start, start.schedule):
        again = improve(instance, start=given_start, max_evaluations=10, seed=1)
        assert again.objective <= start.objective
    short = mixed(3, 0)
    with pytest.raises(InputError, match="request"):
        improve(short, start=start, time_limit_s=1)


def test_the_same_seed_and_number_of_evaluations_give_the_same_schedule() -> None:
    instance = mixed(20, 2, load=1.0, allow=("chunk", "pause", "preempt", "idle"))
    one, two = (improve(instance, seed=5, max_evaluations=3_000, time_limit_s=100) for _ in range(2))
    assert one.schedule is not None and two.schedule is not None
    for column in ("start_s", "ends", "requests", "tokens"):
        assert np.array_equal(getattr(one.schedule, column), getattr(two.schedule, column))
    assert one.details == two.details and one.details["evaluations"] == 3_000


def test_interrupted_it_gives_the_best_so_far() -> None:
    told = []

    def interrupt(figures: dict[str, float]) -> None:
        told.append(figures)
        if len(told) == 2:
            raise KeyboardInterrupt

    instance = mixed(16, 0)
    found = improve(instance, progress=interrupt, time_limit_s=60)
    assert found.status in ("interrupted", "optimal") and len(told) == 2
    assert found.objective == told[-1]["objective"]
    assert {"seconds", "objective", "bound", "evaluations"} <= set(told[-1])


def test_interrupted_before_anything_is_there_it_still_gives_a_schedule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("baselines.optimal.improve._greedy", interrupt)
    assert improve(mixed(16, 0)).schedule is not None


def test_the_time_limit_ends_it() -> None:
    found = improve(unit_time(64, 0), time_limit_s=0.5)
    assert found.status == "timeout" and found.schedule is not None


def test_tiny_instances_are_mostly_solved() -> None:
    from optimal_oracle import optimum

    solved = 0
    for seed in range(8):
        allow = [(), ("pause",), ("idle",), ("preempt",)][seed % 4]
        instance = mixed(3, seed, load=None if seed % 2 else 1.5, allow=allow)
        best, found = optimum(instance), improve(instance, max_evaluations=5_000)
        assert found.objective >= best * (1 - 1e-9)
        solved += found.objective <= best * (1 + 1e-9)
    assert solved >= 7


@pytest.mark.slow
def test_a_thousand_requests() -> None:
    instance = Instance.of_scenario(scenarios.get("azure-code").replace(num_requests=1000), allow=["chunk"])
    first = incumbent(instance)
    found = improve(instance, time_limit_s=20)
    assert found.objective < first.objective
    assert found.details["evaluations"] > 200
