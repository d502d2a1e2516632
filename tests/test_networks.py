"""Networks: one station is one engine, bit for bit; Rybko and Stolyar's network."""

from __future__ import annotations

import numpy as np
import pytest

import baselines
from llmsched_env import EngineConfig, profiles, simulate, workloads
from llmsched_env.core.compile import njit
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.state import Hold
from llmsched_env.networks import Jobs, disciplines
from llmsched_env.networks.core.assemble import NetSpec, PoolSpec, StationSpec, make_networks
from llmsched_env.networks.core.loop import Outcome, advance, advance_levels
from llmsched_env.networks.core.state import Routing, Rule, network_at
from llmsched_env.profiles import Profile
from llmsched_env.scheduling import Routine, Scheduler, Settings
from llmsched_env.simulation import _fitted, resolve

FOREVER = 2**60


@njit(cache=False)
def run(networks, i, horizon, most):
    return advance(network_at(networks, i), horizon, most)


@njit(cache=False)
def run_levels(networks, i, horizon, most):
    return advance_levels(network_at(networks, i), horizon, most)


def of_one(requests, scheduler, profile, engine) -> NetSpec:
    """One station."""
    profile = profiles.get(profile)
    longest = int((requests.prompt_tokens + requests.declared_tokens).max())
    config = resolve(engine, scheduler, profile, longest)
    stop, limit, _ = _fitted(requests, scheduler, config)
    station = StationSpec(
        config, scheduler.pack, profile.pack(), scheduler.work_size(len(requests), 1), s_per_token=1.0
    )
    return NetSpec(
        stations=[station],
        pools=[PoolSpec((0,), Routing.JSQ)],
        node_pool=np.zeros(1, np.int64),
        node_key=np.zeros(1),
        node_weight=np.ones(1),
        node_tokens=np.ones(1),
        flow=np.zeros((1, 1)),
        jobs=Jobs.from_requests(requests),
        stop_tokens=stop,
        limit_tokens=limit,
        priority=requests.priority,
        client=requests.client,
        rule=Rule.FCFS,
        quantum=32,
        seed=0,
    )


@pytest.mark.parametrize("kv_blocks", [None, 700])
@pytest.mark.parametrize(
    "name", ["vllm-v1", "sarathi", "vllm-v0", "dai-sarathi", "dai-orca", "sglang", "mc-sf"]
)
def test_a_network_of_one_station_is_one_engine(name, kv_blocks):
    workload = workloads.get("azure-conv", num_requests=200, load=1.5, seed=3, max_prompt=3000)
    scheduler, engine = baselines.get(name), EngineConfig(kv_blocks=kv_blocks)
    alone = simulate(workload, scheduler, "a100-llama3-8b", engine)
    networks = make_networks([of_one(alone.requests, scheduler, "a100-llama3-8b", engine)])
    assert run(networks, 0, np.inf, FOREVER) == Outcome.DONE
    assert np.array_equal(networks.req["finish"], alone.finish_s)
    assert np.array_equal(networks.req["first_token"], alone.first_token_s)
    assert np.array_equal(networks.req["first_scheduled"], alone.first_scheduled_s)
    assert np.array_equal(networks.req["preemptions"], alone.preemptions)
    assert int(networks.engines[0]["iterations"]) == alone.iterations_total
    assert float(networks.engines[0]["busy"]) == alone.busy_s
    if kv_blocks and name in ("vllm-v1", "sarathi", "vllm-v0"):
        assert alone.preemptions_total > 0


LEVELS = Scheduler(
    "levels",
    Settings(routine=Routine.LEVELS, order=Order.SCORE, resume=Place.KEY, test=Hold.PEAK, hold=Hold.PEAK),
)
UNIT = Profile("unit", "staircase", {"c": 1.0, "a": 0.0, "b0": 1.0})


def rybko_stolyar(load: float, horizon: float, seed: int, discipline: str) -> NetSpec:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(load * 768 / 608 * horizon, 2)
    arrival = np.concatenate([rng.random(n) * horizon for n in counts])
    kind = np.repeat([0, 1], counts)
    order = np.argsort(arrival)
    arrival, kind = arrival[order], kind[order]
    hops = 2 * len(arrival)
    node = np.stack([2 * kind, 2 * kind + 1], 1).ravel()
    prompt = np.maximum(1, np.where(node % 2 == 0, rng.poisson(32, hops), rng.poisson(512, hops)))
    output = (1 + rng.poisson(32, hops)).astype(np.int32)
    first, second = np.arange(0, hops, 2), np.arange(1, hops, 2)
    jobs = Jobs.of(arrival, 2, node, prompt, output, before=first, after=second, workflow=kind)
    config = EngineConfig(
        kv_blocks=2**30,
        token_budget=768,
        max_num_seqs=10**6,
        max_model_len=2**30,
        watermark=0.0,
        preemption="recompute",
        async_scheduling=False,
    )
    flow = np.zeros((4, 4))
    flow[0, 1] = flow[2, 3] = 1.0
    return NetSpec(
        stations=[StationSpec(config, LEVELS.pack, UNIT.pack(), 0, 1 / 768)] * 2,
        pools=[PoolSpec((0,), Routing.JSQ), PoolSpec((1,), Routing.JSQ)],
        node_pool=np.array([0, 1, 1, 0]),
        node_key=np.array([1.0, 0.0, 1.0, 0.0]),
        node_weight=np.ones(4),
        node_tokens=np.array([64.0, 544.0, 64.0, 544.0]),
        flow=flow,
        jobs=jobs,
        stop_tokens=output,
        limit_tokens=output,
        priority=np.zeros(hops, np.int32),
        client=np.zeros(hops, np.int32),
        rule=disciplines.get(discipline).rule,
        quantum=32,
        seed=seed,
        sample_s=1.0,
        samples=int(horizon) + 1,
    )


@pytest.mark.parametrize(
    ("discipline", "low", "high"),
    [
        ("exit-first", 200_000, np.inf),
        ("entry-first", 0, 40_000),
        ("fcfs", 0, 40_000),
        ("back-pressure", 0, 40_000),
        ("oldest", 0, 150_000),
    ],
)
def test_rybko_stolyar(discipline, low, high):
    networks = make_networks([rybko_stolyar(0.9, 2000.0, 0, discipline)])
    assert run_levels(networks, 0, 2000.0, FOREVER) == Outcome.HORIZON
    samples = networks.samples.reshape(-1, 3)
    assert int(networks.g[0]["samples"]) == len(samples)
    backlog = samples[:, 0] + samples[:, 1]
    assert low < backlog.max() < high
