"""What can be said without simulating: the limit, closed forms, the region of a capped batch, networks.

Published values are those of Dai, Deng, Li and Peng, arXiv 2504.07347v3.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_env import EngineConfig, InputError, profiles, workloads
from llmsched_env.profiles import Profile
from llmsched_env.theory.capacity import capacity
from llmsched_env.theory.limits import (
    best_batch,
    faster_transformer_rps,
    full_slots_rps,
    limit,
    token_time,
    vanilla_vllm_rps,
)
from llmsched_env.theory.networks import exclusive_pairs, exclusive_sets, nominal_loads, virtual_station_load
from llmsched_env.theory.region import Contexts, region
from llmsched_env.workloads.lengths import Moments

DAI = profiles.get("a100-codellama-34b")
T = token_time(DAI)


def tokens_only(**params: float) -> Profile:
    return Profile("p", "staircase", params)


# ------------------------------------------------------------------------------ the limit


@pytest.mark.parametrize(("prompt", "decodes", "rps"), [(100, 100, 16.71), (129, 112, 13.87)])
def test_theorem_2(prompt: int, decodes: int, rps: float) -> None:
    assert best_batch(T, 512) == (512, pytest.approx(512 / 0.15316))
    found = limit(
        workloads.get(f"fixed-{prompt}-{decodes + 1}").moments(), DAI, EngineConfig(token_budget=512)
    )
    assert found.rps == pytest.approx(rps, abs=0.005)
    assert found.rps == pytest.approx(512 / 0.15316 / (prompt + decodes))
    assert (found.bound, found.kind, found.kv_rps) == ("compute", "exact", np.inf)
    assert (found.tokens, found.iteration_s) == (pytest.approx(512), pytest.approx(0.15316))


def test_a_budget_between_the_steps() -> None:
    """b_max need not be a multiple of b0: the best batch is then a smaller one."""
    assert best_batch(T, 640) == (640, pytest.approx(640 / 0.18863))
    assert best_batch(T, 600) == best_batch(T, 512) == best_batch(T, 513)
    assert best_batch(lambda b: 0.01 + 1e-6 * b**2, 4000)[0] == 100


@pytest.mark.parametrize(("budget", "kind"), [(512, "exact"), (600, "bound"), (640, "exact"), (130, "bound")])
def test_exact_only_where_a_full_batch_is_the_best(budget: int, kind: str) -> None:
    """Work-conserving schedulers fill the batch: between two steps that is slower than the limit."""
    m = workloads.get("fixed-100-101").moments()
    assert limit(m, DAI, EngineConfig(token_budget=budget)).kind == kind
    flat = tokens_only(c=0.0, a=1.0, b0=100)  # as good at each whole step
    assert limit(m, flat, EngineConfig(token_budget=1000)).kind == "exact"


def test_kinds_of_limits() -> None:
    m = workloads.get("azure-conv").moments()
    engine = EngineConfig(token_budget=2048, max_num_seqs=256)
    assert limit(m, profiles.get("a100-llama3-8b"), engine).kind == "bound"
    assert limit(m, profiles.get("infermax-7b"), engine).kind == "estimate"
    # Few slots: batches of different numbers of tokens could be mixed.
    assert limit(m, DAI, engine.replace(max_num_seqs=2048)).kind == "exact"
    assert limit(m, DAI, engine).kind == "estimate"
    short = workloads.get("fixed-500-50").moments()
    assert limit(short, DAI, EngineConfig(token_budget=512, max_num_seqs=256)).kind == "bound"


def test_memory() -> None:
    """M / (T E[g]) of Nie, Si and Zhou (arXiv 2605.04595) with a constant iteration."""
    m = workloads.get("fixed-500-200").moments()
    constant = tokens_only(c=0.02, a=0.0, b0=1)
    found = limit(m, constant, EngineConfig(token_budget=8192, kv_blocks=20_000, block_size=1))
    assert found.kv_rps == pytest.approx(20_000 / (0.02 * sum(500 + j for j in range(200))))
    assert found.bound == "kv"
    blocks = limit(m, constant, EngineConfig(token_budget=8192, kv_blocks=1250, block_size=16))
    assert blocks.kv_rps == pytest.approx(20_000 / (0.02 * sum(500 + j + 7.5 for j in range(200))))


def test_slots() -> None:
    """A request is in as many batches as it has output tokens, or more."""
    found = limit(Moments.of([100], [50]), tokens_only(c=0.02, a=0.0, b0=1), EngineConfig(max_num_seqs=8))
    assert found.rps == pytest.approx(8 / (50 * 0.02))


@settings(max_examples=60)
@given(
    st.integers(1, 5000),
    st.integers(1, 2000),
    st.integers(64, 8192),
    st.integers(1, 500),
    st.integers(1, 50_000),
    st.sampled_from(["a100-llama3-8b", "a100-llama2-7b-linear", "roofline:llama-3-8b@h100"]),
)
def test_never_below_the_capacity(
    prompt: int, output: int, budget: int, seqs: int, blocks: int, name: str
) -> None:
    profile, moments = profiles.get(name), Moments.of([prompt], [output])
    engine = EngineConfig(token_budget=budget, max_num_seqs=seqs, kv_blocks=blocks)
    bound, estimate = limit(moments, profile, engine), capacity(moments, profile.time, engine)
    # Where slots are few the capacity does not count the batch that ends the prefill.
    if output > 20 and seqs > 20:
        assert bound.rps >= 0.95 * estimate.rps
    for more in ({"token_budget": 2 * budget}, {"max_num_seqs": 2 * seqs}, {"kv_blocks": 2 * blocks}):
        assert limit(moments, profile, engine.replace(**more)).rps >= bound.rps * (1 - 1e-3)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 60)), min_size=1, max_size=20))
def test_no_sequence_of_batches_passes_a_bound(batches: list[tuple[int, int]]) -> None:
    """Batches that hold the work of one request, in whatever way, take no less than 1 / limit."""
    profile = profiles.get("a100-llama3-8b")
    batches = [(p, d) for p, d in batches if p + d > 0] or [(10, 1)]
    prompt, decodes = sum(p for p, _ in batches), sum(d for _, d in batches)
    if prompt == 0:
        return
    # One request cannot decode twice at once: the work is that of many alike, each batch so many times.
    context = prompt**2 / 2 / prompt
    kv = prompt + (decodes + 1) / 2
    seconds = sum(float(profile.time(p, p > 0, p * context, 0, d, d * kv)) for p, d in batches)
    budget = max(p + d for p, d in batches)
    assert 1 / seconds <= limit(
        Moments.of([prompt], [decodes + 1]), profile, EngineConfig(token_budget=budget)
    ).rps * (1 + 1e-9)


def test_errors() -> None:
    m = Moments.of([1], [1])
    with pytest.raises(InputError, match="nothing limits the batch"):
        limit(m, DAI, EngineConfig())
    with pytest.raises(InputError, match="no time"):
        best_batch(lambda b: 0 * b, 8)
    with pytest.raises(InputError, match="token_budget must be at least 1"):
        best_batch(T, 0)


# ------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize(
    ("budget", "rps"), [(512, 0.557), (1024, 1.27), (2048, 2.58), (4096, 4.86), (8192, 8.38)]
)
def test_faster_transformer(budget: int, rps: float) -> None:
    assert faster_transformer_rps(T, 129, 112, budget) == pytest.approx(rps, rel=0.005)


def test_faster_transformer_of_short_requests() -> None:
    assert faster_transformer_rps(T, 100, 100, 512) == pytest.approx(1.04, abs=0.005)
    assert faster_transformer_rps(T, 129, 112, 128) == 0  # a prompt does not fit
    assert faster_transformer_rps(T, 129, 112, 8192, 3) == faster_transformer_rps(T, 129, 112, 512)


def vllm_by_simulation(rate: float, prefill: int, decodes: int, budget: int, batches: int) -> float:
    """Decodes that vanilla vLLM serves while there are always enough of them, over those that arrive."""
    g = np.random.default_rng(1)
    waiting, seconds, served = 0, 0.0, 0
    for _ in range(batches):
        k = min(waiting, budget // prefill)
        t = float(T(k * prefill if k else budget))
        served += 0 if k else budget
        waiting += g.poisson(rate * t) - k
        seconds += t
    return served / (seconds * rate * decodes)


def test_vanilla_vllm() -> None:
    rate = vanilla_vllm_rps(T, 129, 112, 512)
    assert rate == pytest.approx(10.7, rel=0.03)
    assert vllm_by_simulation(rate, 129, 112, 512, 40_000) == pytest.approx(1, abs=0.02)
    assert vanilla_vllm_rps(T, 129, 112, 128) == 0
    # With a large budget decodes cost next to nothing, and prompts gather.
    assert vanilla_vllm_rps(T, 129, 112, 8192) > 0.9 * best_batch(T, 8192)[1] / 241


@pytest.mark.parametrize(
    ("budget", "first", "ms"),
    [
        (128, True, 467.5),
        (256, True, 534.7),
        (512, True, 569.7),
        (1024, True, 569.7),
        (128, False, 559.1),
    ],
)
def test_full_slots(budget: int, first: bool, ms: float) -> None:
    """Section 6 with k_max 100 and requests of (290, 990)."""
    rate = full_slots_rps(T, 290, 990, budget, 100, decodes_first=first)
    assert 1000 / rate == pytest.approx(ms, abs=0.06)


def test_closed_forms_refuse() -> None:
    for bad in ((0, 112, 512, 100), (129, -1, 512, 100), (129, 112, 0, 100), (129, 112, 512, 0)):
        with pytest.raises(InputError, match="must be at least"):
            faster_transformer_rps(T, *bad)
        with pytest.raises(InputError, match="must be at least"):
            vanilla_vllm_rps(T, *bad)
        with pytest.raises(InputError, match="must be at least"):
            full_slots_rps(T, *bad, decodes_first=True)


# ------------------------------------------------------------------------------ the region


def test_region_of_theorem_10() -> None:
    """Corners A to D for k_max 100; point C is (29, 99) every 46.75 ms."""
    found = region(DAI, 1024, 100)
    assert found.batches.tolist() == [[0, 0], [1024, 0], [925, 99], [29, 99], [0, 100]]
    b, c = found.vertices[2] / 1000, found.vertices[3] / 1000
    np.testing.assert_allclose(c, [29 / 46.75, 99 / 46.75])
    slope = (b[0] - c[0]) / (c[1] - b[1])
    assert slope == pytest.approx(1.4112, abs=1e-4)
    assert c[0] + slope * c[1] == pytest.approx(3.6087, abs=2e-4)
    assert found.multiple([29 / 0.04675, 99 / 0.04675]) == pytest.approx(1)
    assert found.contains([29 / 0.04675, 99 / 0.04675])
    assert not found.contains([29 / 0.0467, 99 / 0.0467])


def test_region_without_a_cap_is_theorem_2() -> None:
    found = region(DAI, 512)
    rates = np.array([[1.0, 0.0], [100, 100], [129, 112], [0.0, 1.0]])
    np.testing.assert_allclose(found.multiple(rates), 512 / 0.15316 / rates.sum(1))
    assert found.area == pytest.approx((512 / 0.15316) ** 2 / 2)


def by_enumeration(profile: Profile, budget: int, cap: int, rates: tuple[float, float]) -> float:
    """The largest multiple, over all pairs of batches mixed in all proportions."""
    points = []
    for y in range(cap + 1):
        for x in range(budget - y + 1):
            if x + y > 0 and y + (x > 0) <= cap:
                t = float(profile.time(x, x > 0, 0, 0, y, 0))
                points.append((x / t, y / t))
    p = np.array(points)
    best = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        for a in p:
            # a + s (b - a) parallel to the rates
            d = p - a
            s = -(a[0] * rates[1] - a[1] * rates[0]) / (d[:, 0] * rates[1] - d[:, 1] * rates[0])
            hit = a + np.clip(s, 0, 1)[:, None] * d
            on = np.abs(hit[:, 0] * rates[1] - hit[:, 1] * rates[0]) <= 1e-9 * sum(rates) * hit.sum(1).clip(1)
            c = (hit.sum(1) / sum(rates))[on & np.isfinite(s)]
            best = max(best, float(c.max(initial=0)))
    return best


@settings(max_examples=12)
@given(
    st.integers(3, 12),
    st.integers(1, 8),
    st.integers(1, 4),
    st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(any),
    st.sampled_from(["staircase", "linear"]),
)
def test_region_is_the_hull_of_all_batches(
    budget: int, cap: int, b0: int, rates: tuple[int, int], form: str
) -> None:
    params = (
        {"c": 0.3, "a": 1.0, "b0": b0}
        if form == "staircase"
        else {"c0": 1.0, "c1": 0.2, "c2": 0.5, "c3": 0.1, "c4": 0.1}
    )
    profile = Profile("p", form, params)
    found = region(profile, budget, cap)
    expected = by_enumeration(profile, budget, min(cap, budget), rates)
    assert found.multiple(rates) == pytest.approx(expected, rel=1e-6)
    corners = found.vertices
    assert (corners[0] == 0).all()
    assert found.contains(corners[1:]).all()


def test_region_with_contexts_is_near_the_limit() -> None:
    m = workloads.get("azure-conv").moments()
    profile = profiles.get("a100-llama3-8b")
    found = region(profile, 2048, 256, Contexts.of(m)).multiple([m.prompt, m.output - 1])
    bound = limit(m, profile, EngineConfig(token_budget=2048, max_num_seqs=256)).rps
    assert found == pytest.approx(bound, rel=1e-3)
    assert region(profile, 2048, 256).multiple([m.prompt, m.output - 1]) > found


def test_region_refuses() -> None:
    with pytest.raises(InputError, match="max_batch must be at least 1"):
        region(DAI, 512, 0)
    for bad in ([1, 2, 3], [-1, 2], [0, 0], [np.nan, 1]):
        with pytest.raises(InputError, match="rates must be pairs"):
            region(DAI, 16).multiple(bad)


# ------------------------------------------------------------------------------ networks


RATE = 0.9 * 768 / 608  # Rybko-Stolyar: hops (32 + 32) and (512 + 32) tokens, engines of 768 a unit of time
NETWORK = ([RATE] * 4, [64, 544, 64, 544], [0, 1, 1, 0], [768, 768])


def test_rybko_stolyar() -> None:
    np.testing.assert_allclose(nominal_loads(*NETWORK), [0.9, 0.9])
    exit_first, entry_first = [1, 0, 1, 0], [0, 1, 0, 1]
    routes = [[0, 1], [2, 3]]
    assert exclusive_pairs(routes, NETWORK[2], exit_first) == [(1, 3)]
    assert exclusive_pairs(routes, NETWORK[2], entry_first) == []
    assert exclusive_pairs(routes, NETWORK[2], [0, 0, 0, 0]) == []
    load = virtual_station_load(*NETWORK, members=(1, 3))
    assert load == pytest.approx(0.9 * 1088 / 608)
    assert 0.9 / load == pytest.approx(0.559, abs=5e-4)  # the nominal load at which it is 1


def test_three_classes_may_exclude_each_other() -> None:
    """A ring of three stations: programs enter at one, and leave at the other two, with priority there."""
    routes, stations = [[0, 1, 2], [3, 4, 5], [6, 7, 8]], [0, 1, 2, 1, 2, 0, 2, 0, 1]
    exit_first = [2, 1, 0] * 3
    sets = exclusive_sets(routes, stations, exit_first)
    pairs = exclusive_pairs(routes, stations, exit_first)
    assert pairs and sets
    for members in sets:
        assert all(pair in pairs for pair in itertools.combinations(members, 2))
        assert not any(  # there is none larger
            all(tuple(sorted((k, m))) in pairs for m in members) for k in range(9) if k not in members
        )
    assert {pair for members in sets for pair in itertools.combinations(members, 2)} == set(pairs)
    assert max(map(len, sets)) == 3
    assert exclusive_sets([[0, 1]], [0, 1], [0, 0]) == []


def test_tandem_has_no_virtual_station() -> None:
    assert exclusive_pairs([[0, 1]], [0, 1], [0, 0]) == []
    # Two kinds of requests that go the same way.
    assert exclusive_pairs([[0, 1], [2, 3]], [0, 1, 0, 1], [0, 1, 1, 0]) == []


def test_networks_refuse() -> None:
    for change, match in (
        ({0: [1]}, "as many as there are classes"),
        ({2: [0, 1, 1, 2]}, "from 0 to 1"),
        ({1: [64, -1, 64, 544]}, "must not be negative"),
        ({3: [768, 0]}, "must be positive"),
    ):
        bad: list[Any] = list(NETWORK)
        for i, value in change.items():
            bad[i] = value
        with pytest.raises(InputError, match=match):
            nominal_loads(*bad)
    with pytest.raises(InputError, match="members must name"):
        virtual_station_load(*NETWORK, members=(4,))
    with pytest.raises(InputError, match="members must name"):
        virtual_station_load(*NETWORK, members=[0.7])  # type: ignore[list-item]
    with pytest.raises(InputError, match="stations must be whole numbers"):
        exclusive_pairs([[0, 1]], [0.5, 1], [0, 0])
    with pytest.raises(InputError, match="each of the classes"):
        exclusive_pairs([[0, 1]], [0, 1, 0], [0, 0, 0])
