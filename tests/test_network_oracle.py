"""The compiled network: equal to the plain one to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from network_oracle import Oracle

from llmsched_env import EngineConfig
from llmsched_env.core.state import Hold
from llmsched_env.networks import (
    ROUTINGS,
    TOKEN_LEVEL,
    Jobs,
    Network,
    Node,
    Pool,
    Station,
    Workflow,
    disciplines,
    simulate_network,
)
from llmsched_env.profiles import Profile
from llmsched_env.workloads.lengths import Fixed, Lengths

PROFILES = [
    Profile("unit", "staircase", {"c": 1.0, "a": 0.0, "b0": 1.0}),
    Profile("staircase", "staircase", {"c": 0.011, "a": 0.035, "b0": 8.0}),
    Profile("linear", "linear", {"c0": 0.007, "c1": 1.1e-4, "c2": 3.3e-5, "c3": 1.7e-7, "c4": 1.3e-8}),
]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Network, Jobs, str, int]:
    """A network of up to four stations, and jobs whose hops wait for one another at random."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))  # spreads wider than values drawn singly
    num_stations = draw(st.sampled_from([1, 2, 3, 4]))
    classes = draw(st.sampled_from([1, 2, 4]))
    preempting = draw(st.booleans())
    profile = draw(st.sampled_from(PROFILES))
    discipline = draw(st.sampled_from([*disciplines.names(), "plas:4", "atlas:200"]))
    stations = []
    for k in range(num_stations):
        scheduler = TOKEN_LEVEL.replace(max_batch_requests=int(rng.choice([0, 0, 0, 2, 5])))
        if preempting:
            scheduler = scheduler.replace(test=Hold.KNOWN, hold=Hold.CHUNK)
        block_size = int(rng.choice([1, 4]))
        engine = EngineConfig(
            kv_blocks=int(rng.choice([28, 28, 40, 1000])) // block_size,
            block_size=block_size,
            token_budget=int(rng.choice([6, 16, 64])),
            max_num_seqs=int(rng.choice([3, 100])),
        )
        plain = not preempting and scheduler == TOKEN_LEVEL.replace()
        stations.append(
            Station(f"s{k}", profile, engine, None if plain or _orders(discipline) else scheduler)
        )
    cut = int(rng.integers(0, num_stations + 1))
    pools = [Pool("p", [f"s{k}" for k in range(cut)], draw(st.sampled_from(_ROUTINGS)))] if cut else []
    served = [*(["p"] if cut else []), *(f"s{k}" for k in range(cut, num_stations))]
    nodes = [
        Node(
            f"c{c}",
            served[c % len(served)],
            Lengths(Fixed(3), Fixed(3)),
            priority=int(rng.integers(0, 3)),
            weight=float(rng.choice([1.0, 0.5])),
        )
        for c in range(max(classes, len(served)))
    ]
    network = Network("random", stations, [Workflow("w", nodes)], pools)
    return network, _jobs(rng, len(nodes)), discipline, int(rng.integers(0, 1000))


_ROUTINGS = sorted(set(ROUTINGS) - {"outside"})


def _orders(discipline: str) -> bool:
    """Whether it leaves no room for a scheduler of the station's own."""
    return disciplines.get(discipline).token_level


def _jobs(rng: np.random.Generator, classes: int) -> Jobs:
    """With hops of up to 29 tokens; some arrive or are due at the same moment."""
    count = int(rng.integers(1, 12))
    hops = rng.integers(1, 6, count)
    total = int(hops.sum())
    before, after = [], []
    first = 0
    for n in hops:
        for a in range(first, first + n):
            for b in range(first, a):
                if rng.random() < 0.4:
                    before.append(b)
                    after.append(a)
        first += n
    return Jobs.of(
        np.cumsum(rng.choice([0.0, 0.01, 0.3, 1.0], count)),
        hops,
        rng.integers(0, classes, total),
        rng.integers(1, 20, total),
        rng.integers(1, 10, total),
        before=before,
        after=after,
        delay_s=rng.choice([0.0, 0.0, 0.02, 1.0], total),
    )


@given(cases())
def test_the_compiled_network_equals_the_oracle(case):
    network, jobs, discipline, seed = case
    oracle = Oracle(network, discipline, jobs, seed).run()
    result = simulate_network(network, discipline, jobs=jobs, seed=seed, samples=40)
    for name, own in (
        ("released_s", "released"),
        ("first_scheduled_s", "first_scheduled"),
        ("first_token_s", "first_token"),
        ("finish_s", "finish"),
        ("preemptions", "preemptions"),
    ):
        theirs = [getattr(call, own) for call in oracle.calls]
        assert np.array_equal(getattr(result, name), theirs, equal_nan=True), name
    assert result.station.tolist() == [call.station.number for call in oracle.calls]
    assert np.array_equal(result.job_finish_s, oracle.job_finish)
    assert result.iterations.tolist() == [engine.iterations for engine in oracle.engines]
    assert np.allclose(result.utilisation * result.end_s, [e.busy for e in oracle.engines], rtol=1e-12)
    for time, tokens, inside in zip(result.time_s, result.backlog_tokens, result.jobs_in_system, strict=True):
        if time < result.end_s:
            assert (tokens.tolist(), inside) == oracle.at(time)


def test_cases_preempt():
    """The random cases are not all without trouble."""
    preempted = []

    @given(cases())
    def note(case):
        network, jobs, discipline, seed = case
        result = simulate_network(network, discipline, jobs=jobs, seed=seed)
        preempted.append(result.preemptions.sum() > 0)

    note()
    assert 5 < sum(preempted) < len(preempted) - 5


if __name__ == "__main__":
    pytest.main([__file__])
