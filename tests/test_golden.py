"""The golden suite: its optima are found again, no bound is above one, no scheduler below."""

from __future__ import annotations

import pytest

import baselines
from baselines.optimal import bounds, golden, replay
from baselines.optimal.search import search
from llmsched_env import simulate
from llmsched_env.errors import InputError

SUITE = golden.load()


def test_two_hundred_instances_of_every_kind() -> None:
    assert len(SUITE) == 200
    assert {made.objective for made, _ in SUITE} == {"total_latency", "gpu_time", "makespan", "mean_ttft"}
    assert {made.profile.form for made, _ in SUITE} == {"linear", "hinge", "staircase", "infermax"}
    for allowance in ("chunk", "pause", "preempt", "idle"):
        assert sum(made.allows(allowance) for made, _ in SUITE) >= 10


@pytest.mark.parametrize("part", range(10))
def test_optima_are_found_again(part: int) -> None:
    for made, optimum in SUITE[part::20]:
        found = search(made)
        assert found.status == "optimal" and found.schedule is not None
        assert found.objective == pytest.approx(optimum, rel=1e-9)
        assert made.value(replay(made, found.schedule)) == found.objective


@pytest.mark.slow
def test_no_bound_is_above() -> None:
    for made, optimum in SUITE:
        for name, value in bounds.lower_bounds(made).items():
            assert value <= optimum * (1 + 1e-9), (made.name, name)


@pytest.mark.parametrize("name", ["vllm-v1", "sarathi-nocp", "srpt", "mc-sf", "random-feasible"])
def test_no_scheduler_is_below(name: str) -> None:
    legal = 0
    for made, optimum in SUITE:
        engine = made.engine.replace(watermark=None)
        try:
            run = simulate(made.requests, baselines.get(name), made.profile, engine, record="schedule")
            assert run.schedule is not None
            replay(made, run.schedule)
        except InputError:
            continue  # cannot serve it, or does what it forbids
        legal += 1
        assert made.value(run) >= optimum * (1 - 1e-9), made.name
    assert legal >= 10
