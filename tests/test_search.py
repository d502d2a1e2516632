"""The exact search: against trying everything, its bounds, its limits."""

from __future__ import annotations

import itertools

import numpy as np
import optimal_oracle
import pytest

from baselines.optimal import Instance, instance, replay
from baselines.optimal.search import search
from llmsched_env.errors import InputError

COSTS = {
    "linear": {"form": "linear", "c0": 5.0, "c1": 1.0, "c2": 1.0, "c3": 0.5, "c4": 0.25},
    "reads dear": {"form": "linear", "c0": 1.0, "c1": 0.25, "c2": 1.0, "c3": 3.0, "c4": 0.0},
    "no constant": {"form": "linear", "c0": 0.0, "c1": 1.0, "c2": 2.0, "c3": 0.25, "c4": 0.0},
    "hinge": {"form": "hinge", "h0": 1.0, "h1": 4.0, "h2": 1.5, "h3": 0.5, "h4": 0.125, "h5": 0.25},
    "staircase": {"form": "staircase", "c": 3.0, "a": 2.0, "b0": 4},
}
ALLOW = [
    allow for k in range(5) for allow in itertools.combinations(("chunk", "pause", "preempt", "idle"), k)
]


def draw(rng: np.random.Generator, allow: tuple[str, ...], objective: str, n: int = 3) -> Instance:
    """A tiny instance whose KV cache is short."""
    longest = 3 if "chunk" in allow else 5
    rows, arrival = [], 0
    for _ in range(n):
        rows.append([float(arrival), int(rng.integers(1, longest)), int(rng.integers(1, 4))])
        arrival += int(rng.integers(0, 2)) * int(rng.integers(1, 15))
    peak = max(i + o - 1 for _, i, o in rows)
    return Instance.of(
        rows,
        kv_tokens=peak + int(rng.integers(0, 5)),
        token_budget=max(i for _, i, _ in rows) + int(rng.integers(0, 4)),
        cost=COSTS[list(COSTS)[rng.integers(len(COSTS))]],
        allow=allow,
        objective=objective,
        block_size=1 if rng.random() < 0.8 else 2,
        max_num_seqs=None if rng.random() < 0.8 else 2,
    )


@pytest.mark.parametrize("allow", ALLOW, ids=["+".join(a) or "nothing" for a in ALLOW])
def test_equals_trying_everything(allow: tuple[str, ...]) -> None:
    rng = np.random.default_rng([ALLOW.index(allow), 1])
    heavy = "chunk" in allow and "preempt" in allow
    for objective in ("total_latency", "gpu_time", "makespan", "mean_ttft"):
        for _ in range(1 if heavy else 3):
            try:
                made = draw(rng, allow, objective, n=2 if heavy else 3)
            except InputError:  # a block more is needed
                continue
            found = search(made, time_limit_s=30)
            assert found.status == "optimal", made.to_json()
            best = optimal_oracle.optimum(made)
            assert found.objective == pytest.approx(best, rel=1e-9), made.to_json()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_equals_trying_everything_at_length(seed: int) -> None:
    rng = np.random.default_rng([seed, 2])
    allow = ALLOW[rng.integers(len(ALLOW))]
    objective = ("total_latency", "gpu_time", "makespan", "mean_ttft")[rng.integers(4)]
    try:
        made = draw(rng, allow, objective, n=2 if "chunk" in allow else 3)
    except InputError:
        return
    found = search(made, time_limit_s=60)
    assert found.status == "optimal"
    assert found.objective == pytest.approx(optimal_oracle.optimum(made), rel=1e-9), made.to_json()


def test_recomputing_passes_the_time_where_waiting_is_not_allowed() -> None:
    """Longer iterations let later requests join earlier ones. (CP-SAT finds the same.)"""
    rows = [[0, 20, 4], [403, 8, 4], [751, 17, 4], [803, 17, 4]]
    cost = {"form": "linear", "c0": 100, "c1": 2, "c2": 2, "c3": 1}
    made = Instance.of(rows, 57, 64, cost, allow=["preempt"], objective="makespan")
    found = search(made)
    assert (found.status, found.objective) == ("optimal", 1412.0)
    assert found.result().preemptions_total == 4


def test_ten_requests_are_proved_and_replay() -> None:
    made = instance.mixed(10, 4)
    found = search(made)
    assert found.status == "optimal" and found.gap == 0 and found.schedule is not None
    assert made.value(replay(made, found.schedule)) == found.objective == found.bound
    assert found.objective == 15296.0  # three implementations of the bound gave it


def test_more_freedom_is_never_worse() -> None:
    for seed in range(5):
        best = None
        for allow in ((), ("idle",), ("idle", "pause"), ("idle", "pause", "preempt")):
            made = instance.mixed(5, seed, load=1.0, allow=allow)
            found = search(made, time_limit_s=30)
            assert found.status == "optimal"
            assert best is None or found.objective <= best * (1 + 1e-12)
            best = found.objective


def test_bound_holds_when_time_is_up() -> None:
    made = instance.mixed(14, 2)
    cut, whole = search(made, time_limit_s=0.0), search(instance.mixed(9, 2))
    assert cut.status == "timeout" and cut.schedule is not None
    assert 0 < cut.bound < cut.objective
    assert whole.status == "optimal"


def test_memory_that_is_used_up_leaves_a_bound() -> None:
    found = search(instance.mixed(14, 2), memory_limit_bytes=1 << 20, time_limit_s=60)
    assert found.status == "gap" and found.bound < found.objective


def test_begins_with_a_solution() -> None:
    made = instance.mixed(8, 3)
    first = search(made)
    again = search(made, start=first)
    assert again.status == "optimal" and again.objective == first.objective


def test_interruption_keeps_what_was_found() -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    found = search(instance.mixed(14, 2), progress=interrupt)
    assert found.status == "interrupted" and found.schedule is not None and found.bound < found.objective


def test_complains_of_what_it_cannot_do() -> None:
    goodput = Instance.of([[0, 1, 1]], 10, 10, COSTS["linear"], objective="slo_goodput", ttft_target_s=1.0)
    with pytest.raises(InputError, match=r"no objective slo_goodput.*use method cpsat"):
        search(goodput)
    with pytest.raises(InputError, match="at most 62 requests, not 63"):
        search(instance.mixed(63, 0))
