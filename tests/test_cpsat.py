"""CP-SAT: against the oracle, horizons, rounding, hints, packings, bad inputs."""

from __future__ import annotations

import builtins
import itertools
import math
from typing import Any

import numpy as np
import pytest
from optimal_oracle import optimum

from baselines.optimal import ALLOWANCES, OBJECTIVES, Instance, Solution
from baselines.optimal.cpsat import feasible, solve
from baselines.optimal.csp import Csp, batches_of, one_by_one, schedule_of
from baselines.optimal.instance import infermax, mixed, unit_time
from baselines.optimal.packing import Bars, fewest_batches, least_rounds
from baselines.optimal.runner import Runner
from baselines.optimal.ticks import Ticks
from llmsched_env.core.schedule import Schedule
from llmsched_env.errors import InputError

pytest.importorskip("ortools")

LINEAR = {"form": "linear", "c0": 10, "c1": 1, "c2": 2, "c3": 1}
FORMS: list[dict[str, Any]] = [
    {"form": "linear", "c0": 10, "c1": 1, "c2": 2, "c3": 0.5, "c4": 0.25, "cpu_s": 1, "cpu_s_per_request": 2},
    {"form": "hinge", "h0": 2, "h1": 5, "h2": 1.5, "h3": 0.25, "h4": 0.5, "h5": 1},
    {"form": "piecewise", "c": 5, "a": 3, "b0": 2},
    {"form": "staircase", "c": 5, "a": 3, "b0": 2.5},
    {
        "form": "infermax",
        **dict(zip(("layers", "a_o", "b_o", "a_d", "b_d", "s_d"), (32, 100, 60, 8, 20, 3), strict=True)),
        **dict(zip(("a_p", "b_p", "s_p", "m_p", "floor"), (10, 90, 5, 7, 300), strict=True)),
    },
    {
        "form": "roofline",
        **{"t0": 1, "weights": 5, "token": 1.5, "head_weights": 2, "head_token": 0.5, "attention": 0.25},
        **{"kv_prefill": 0.5, "kv_decode": 0.25, "communication": 0.125},
    },
]
ALLOWED = [c for k in range(5) for c in itertools.combinations(sorted(ALLOWANCES), k)]


def simple(instance: Instance) -> Schedule:
    """A poor schedule, so that the solver has something to do."""
    ticks = Ticks.of(instance, 1000.0)
    return schedule_of(ticks, one_by_one(ticks))


def solved(instance: Instance, **options: Any) -> Solution:
    return solve(instance, time_limit_s=60, hint=simple(instance), **options)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("allow", ALLOWED, ids="+".join)
def test_two_requests(allow: tuple[str, ...], objective: str) -> None:
    if objective == "slo_goodput" and {"chunk", "preempt"} <= set(allow):
        pytest.skip("takes the oracle a minute")
    targets: dict[str, Any] = {"ttft_target_s": 30, "tpot_target_s": 16}
    instance = Instance.of([[0, 3, 3], [7, 2, 2]], 8, 4, LINEAR, allow=allow, objective=objective, **targets)
    found = solved(instance)
    assert found.status == "optimal"
    assert found.objective == pytest.approx(optimum(instance), rel=1e-9)


@pytest.mark.parametrize("cost", FORMS, ids=lambda c: c["form"])
def test_forms(cost: dict[str, Any]) -> None:
    for allow, objective in ((("chunk", "preempt"), "gpu_time"), (("pause",), "total_latency")):
        instance = Instance.of([[0, 3, 2], [4, 2, 3]], 7, 4, cost, allow=allow, objective=objective)
        found = solved(instance)
        assert found.status == "optimal"
        assert found.objective == pytest.approx(optimum(instance), rel=1e-9)


def test_blocks_and_seats() -> None:
    for limits in ({"block_size": 2}, {"max_num_seqs": 2}):
        instance = Instance.of([[0, 3, 3], [0, 2, 2], [5, 1, 2]], 10, 6, LINEAR, **limits)  # type: ignore
        found = solved(instance)
        assert found.status == "optimal"
        assert found.objective == pytest.approx(optimum(instance), rel=1e-9)


@pytest.mark.slow
def test_at_random() -> None:
    rng = np.random.default_rng(0)
    for _ in range(25):
        n = int(rng.integers(2, 4))
        rows = sorted([float(rng.choice([0, 0, 7, 13.5])), *rng.integers(1, 4, 2).tolist()] for _ in range(n))
        allow = ALLOWED[rng.integers(len(ALLOWED))]
        objective = list(OBJECTIVES)[rng.integers(4)]
        cost = FORMS[rng.integers(len(FORMS))]
        instance = Instance.of(
            rows, int(rng.integers(6, 12)), int(rng.integers(3, 7)), cost, allow=allow, objective=objective
        )
        found = solved(instance)
        # Who is preempted more than once may do better.
        best = optimum(instance, preemptions=1)
        assert found.bound <= best * (1 + 1e-9), instance.to_json()
        assert found.objective <= best * (1 + 1e-9), instance.to_json()


# ---------------------------------------------------------------------- horizons


def tight() -> Instance:
    """Its optimum takes 6 batches; the fewest batches that serve it are 5."""
    return Instance.of([[0, 6, 2], [0, 1, 4], [0, 5, 1]], 9, 8, {"form": "linear", "c0": 1, "c1": 10})


def test_a_short_horizon_gives_a_wrong_optimum() -> None:
    instance = tight()
    best = optimum(instance)
    values = {}
    for batches in range(3, 10):
        ticks = Ticks.of(instance, 1000.0)
        csp = Csp(ticks, batches)
        csp.model.minimize(csp.objective)
        answer = Runner(60).run(csp.model)
        if answer.value is not None:
            values[batches] = ticks.value(answer.value)
    assert max(values.values()) > best  # proved "optimal" with too few batches
    assert values[9] == best
    found = solved(instance)
    assert (found.status, found.objective) == ("optimal", best)
    assert found.details["batches"] >= min(b for b, v in values.items() if v == best)


def test_no_schedule_of_more_batches_is_better_than_least_says() -> None:
    for allow, objective in itertools.product(((), ("chunk", "pause"), ("preempt",)), list(OBJECTIVES)[:4]):
        instance = Instance.of(
            [[0, 3, 3], [0, 2, 2], [9, 2, 1]], 8, 4, LINEAR, allow=allow, objective=objective
        )
        schedule = simple(instance)
        ticks = Ticks.of(instance, 1000.0)
        value = Solution.of(instance, schedule, -math.inf, "", 0.0).objective
        assert ticks.value(ticks.least(len(schedule))) <= value
        assert ticks.value(ticks.least()) <= optimum(instance, preemptions=1)


# ---------------------------------------------------------------------- rounding


def test_decimals_are_exact() -> None:
    instance = Instance.of([[0, 3, 3], [0.7, 2, 2]], 8, 4, {**LINEAR, "c0": 0.1, "c3": 0.003})
    assert Ticks.of(instance, 2.0).exact
    found = solved(instance)
    assert found.status == "optimal" and "quantisation_error_s" not in found.details
    assert found.objective == pytest.approx(optimum(instance), rel=1e-12)


@pytest.mark.parametrize("objective", list(OBJECTIVES)[:4])
def test_what_is_rounded_stays_a_bound(objective: str) -> None:
    cost = {"form": "linear", "c0": math.pi, "c1": 1 / 3, "c2": 1 / 7, "c3": math.e / 10, "c4": 1 / 9}
    instance = Instance.of(
        [[0, 3, 3], [math.sqrt(2), 2, 2]], 8, 4, cost, allow=("chunk", "pause"), objective=objective
    )
    assert not Ticks.of(instance, 100.0).exact
    found = solved(instance)
    best = optimum(instance)
    assert found.bound <= best * (1 + 1e-12)
    assert found.bound == pytest.approx(best, rel=1e-6)
    assert found.objective == pytest.approx(best, rel=1e-9) or found.status != "optimal"
    assert found.details["quantisation_error_s"] < 1e-6 * best


# ---------------------------------------------------------------------- hints


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_hints_are_complete_and_right(objective: str) -> None:
    for cost in (FORMS[0], FORMS[4]):
        instance = Instance.of(
            [[0, 3, 3], [0, 3, 3], [20, 2, 2]], 9, 5, cost, allow=ALLOWED[-1], objective=objective,
            ttft_target_s=30, tpot_target_s=16,
        )  # fmt: skip
        start = solve(instance, time_limit_s=1, hint=simple(instance))  # chunks, preempts, pauses
        assert start.schedule is not None
        ticks = Ticks.of(instance, 1000.0)
        csp = Csp(ticks, len(start.schedule) + 2, batches_of(start.schedule))
        assert csp.hint_is_complete()
        assert ticks.value(csp.hinted_objective()) == pytest.approx(start.objective, rel=1e-9)
        answer = Runner(30).run(csp.model, fix_variables_to_their_hinted_value=True)
        assert answer.value is not None


def test_a_hint_must_be_a_schedule() -> None:
    instance = mixed(4, 0)
    with pytest.raises(InputError, match="unfinished"):
        solve(instance, hint=simple(instance.replace(requests=instance.requests.take(np.arange(3)))))


# ---------------------------------------------------------------------- feasible


def test_feasible() -> None:
    instance = Instance.of([[0, 3, 3], [7, 2, 2]], 8, 4, LINEAR, allow=("preempt",))
    found = feasible(instance, 95, hint=simple(instance))
    assert found is not None and found.objective <= 95
    assert feasible(instance, 94.5, hint=simple(instance)) is None


def test_feasible_packings() -> None:
    instance = mixed(8, 0, objective="gpu_time")
    best = solved(instance)
    assert best.status == "optimal" and best.details["model"] == "batches"
    found = feasible(instance, best.objective, hint=simple(instance))
    assert found is not None and found.objective == best.objective
    assert feasible(instance, best.objective - 1, hint=simple(instance)) is None


# ---------------------------------------------------------------------- packings


def test_the_packing_models_agree_with_the_csp() -> None:
    for instance in (mixed(4, 0, objective="gpu_time"), unit_time(4, 0)):
        special = solved(instance)
        assert special.status == "optimal"
        assert special.details["model"] in ("batches", "rounds")
        ticks = Ticks.of(instance, 1e4)
        csp = Csp(ticks, sum(ticks.output))
        csp.model.add(csp.objective >= ticks.least())
        csp.model.minimize(csp.objective)
        answer = Runner(60).run(csp.model)
        assert answer.value is not None and answer.bound <= answer.value
        assert special.objective <= ticks.value(answer.value)
        assert special.objective == ticks.value(answer.value) or not answer.proved


def test_waiting_for_all_when_idling_is_free() -> None:
    instance = mixed(5, 0, objective="gpu_time", load=1.0, allow=("idle",))
    found = solved(instance)
    assert (found.status, found.details["model"]) == ("optimal", "batches")


def test_packings_of_oracle_size() -> None:
    for rows in ([[0, 3, 3], [0, 2, 2], [0, 1, 2]], [[0, 4, 1], [0, 4, 2], [0, 2, 3]]):
        for cost, objective in ((LINEAR, "gpu_time"), ({"form": "linear", "c0": 2}, "total_latency")):
            instance = Instance.of(rows, 7, 4, cost, objective=objective)
            assert solved(instance).objective == optimum(instance)


@pytest.mark.slow
def test_thirty_two_requests() -> None:
    instance = mixed(32, 1, objective="gpu_time")
    assert solve(instance, time_limit_s=40).status == "optimal"
    bars = Bars.of(Ticks.of(unit_time(32, 1), 100.0))
    begin = np.concatenate([[0], np.cumsum(bars.output)[:-1]])
    starts, low = least_rounds(bars, Runner(30), begin, 0)
    assert low <= (starts + bars.output).sum() <= 1.04 * low
    starts, low = fewest_batches(bars, Runner(30), begin, 0)
    assert low <= (starts + bars.output).max()


# ---------------------------------------------------------------------- the rest


def test_infermax() -> None:
    """In coefficients of many digits: the bound holds for what is found."""
    found = solve(infermax(4, 24), time_limit_s=3, hint=simple(infermax(4, 24)))
    assert found.bound <= found.objective
    assert found.details["model"] == "csp"


def test_the_same_every_time() -> None:
    instance = mixed(5, 0)
    runs = [
        solve(instance, hint=simple(instance), deterministic_limit=0.2, workers=1, time_limit_s=120)
        for _ in range(2)
    ]
    assert runs[0].objective == runs[1].objective and runs[0].bound == runs[1].bound


def test_progress_and_a_bound_that_is_known() -> None:
    instance = Instance.of([[0, 3, 3], [7, 2, 2]], 8, 4, LINEAR)
    seen: list[dict[str, Any]] = []
    best = solved(instance, progress=seen.append)
    assert seen and {"seconds", "objective", "bound"} <= set(seen[0])
    assert solved(instance, bound=best.objective).status == "optimal"


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = mixed(8, 0)
    calls = itertools.count()

    def interrupt(
        self: Any, timeout: float | None = None, join: Any = __import__("threading").Thread.join
    ) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        join(self, timeout)

    monkeypatch.setattr("threading.Thread.join", interrupt)
    found = solved(instance)
    assert found.status == "interrupted"
    assert found.schedule is not None and found.bound <= found.objective


def test_bad_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = mixed(3, 0)
    with pytest.raises(InputError, match="time_limit_s must be positive"):
        solve(instance, time_limit_s=0, hint=simple(instance))
    with pytest.raises(InputError, match="workers must be at least 1"):
        solve(instance, workers=0, hint=simple(instance))
    with pytest.raises(InputError, match="not table; the search takes any"):
        table = {"prefill_tokens": [0, 8], "decodes": [0, 8], "context": [0, 8]}
        times = np.arange(1, 9, dtype=float).reshape(2, 2, 2).tolist()
        Ticks.of(Instance.of([[0, 2, 2]], 8, 4, {"form": "table", **table, "seconds": times}), 1.0)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("ortools"):
            raise ImportError("No module named 'ortools'")
        return real(name, *args, **kwargs)

    schedule = simple(instance)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install \"llmsched-env\[optimal\]\""):
        solve(instance, hint=schedule)
