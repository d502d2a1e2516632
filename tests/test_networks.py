"""Networks: one station is one engine, bit for bit; what is conserved; Rybko and Stolyar; errors."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import baselines
from llmsched_env import EngineConfig, InputError, networks, simulate, workloads
from llmsched_env.networks import (
    Jobs,
    Network,
    Node,
    Pool,
    Station,
    Workflow,
    disciplines,
    simulate_network,
    virtual_stations,
)
from llmsched_env.workloads.lengths import Fixed, Lengths

CALL = Lengths(Fixed(100), Fixed(20))


def of_one(scheduler, engine: EngineConfig | None = None, profile: str = "a100-llama3-8b") -> Network:
    """One station, one class."""
    station = Station("gpu", profile, engine or EngineConfig(), scheduler)
    return Network("one", [station], [Workflow("requests", [Node("call", "gpu", CALL)])])


# ---------------------------------------------------------------------- one station


@pytest.mark.parametrize("kv_blocks", [None, 700])
@pytest.mark.parametrize(
    "name",
    [
        *("vllm-v1", "sarathi", "vllm-v0", "vllm-v0-swap", "dai-sarathi", "dai-orca", "sglang", "mc-sf"),
        *("slai", "trtllm-max-utilization", "tgi", "lightllm", "random-feasible"),
    ],
)
def test_a_network_of_one_station_is_one_engine(name, kv_blocks):
    workload = workloads.get(
        "azure-conv", num_requests=200, load=1.5, seed=3, max_prompt=3000, declared="exact"
    )
    scheduler, engine = baselines.get(name), EngineConfig(kv_blocks=kv_blocks)
    alone = simulate(workload, scheduler, "a100-llama3-8b", engine, seed=4)
    result = simulate_network(of_one(scheduler, engine), jobs=Jobs.from_requests(alone.requests), seed=4)
    assert np.array_equal(result.finish_s, alone.finish_s)
    assert np.array_equal(result.first_token_s, alone.first_token_s)
    assert np.array_equal(result.first_scheduled_s, alone.first_scheduled_s)
    assert np.array_equal(result.preemptions, alone.preemptions)
    assert result.iterations[0] == alone.iterations_total
    assert result.utilisation[0] * result.end_s == pytest.approx(alone.busy_s, rel=1e-12)
    assert result.batch_mean[0] == pytest.approx(alone.batch_mean)
    if kv_blocks and name in ("vllm-v1", "sarathi", "vllm-v0", "vllm-v0-swap"):
        assert alone.preemptions_total > 0


def test_token_level_fcfs_is_sarathi():
    """One group of equal key: the composition of Sarathi-Serve, as the one routine has it."""
    workload = workloads.get("azure-conv", num_requests=300, load=0.9, seed=1, declared="exact")
    engine = EngineConfig(token_budget=512, max_num_seqs=100)
    alone = simulate(workload, baselines.get("dai-sarathi"), "a100-llama3-8b", engine)
    result = simulate_network(of_one(None, engine), jobs=Jobs.from_requests(alone.requests))
    assert np.array_equal(result.finish_s, alone.finish_s)


def test_priorities_token_by_token_on_one_engine():
    """The routine LEVELS without a network: by priority, exact however it is run."""
    workload = workloads.get("azure-conv", num_requests=300, load=1.2, seed=1, declared="exact")
    requests = simulate(workload, baselines.get("sarathi")).requests
    requests = requests.replace(priority=np.arange(len(requests)) % 3)
    scheduler = baselines.get("dai-sarathi-priority")
    runs = [simulate(requests, scheduler, skip=skip) for skip in ("none", "exact")]
    assert np.array_equal(runs[0].finish_s, runs[1].finish_s)
    latency = runs[0].finish_s - requests.arrival_s
    by_class = [latency[requests.priority == c].mean() for c in range(3)]
    assert by_class[0] < by_class[1] < by_class[2]


# ---------------------------------------------------------------------- what is conserved


@st.composite
def runs(draw: st.DrawFn):
    name = draw(st.sampled_from(networks.names()))
    network = networks.get(name, load=draw(st.sampled_from([0.3, 0.9, 1.5])))
    discipline = draw(st.sampled_from(disciplines.names()))
    seed, jobs = draw(st.integers(0, 1000)), draw(st.sampled_from([1, 30, 200]))
    return network, simulate_network(network, discipline, jobs=jobs, seed=seed, samples=50)


@settings(max_examples=40)
@given(runs())
def test_what_is_conserved(run):
    network, result = run
    jobs = result.jobs
    assert not np.isnan(result.finish_s).any() and not np.isnan(result.job_finish_s).any()
    # Nobody is served before those it waits for, nor before its delay and its job's arrival.
    ready = np.repeat(jobs.arrival_s, np.diff(jobs.first_hop))
    np.maximum.at(ready, jobs.after, result.finish_s[jobs.before])
    assert np.allclose(result.released_s, ready + jobs.delay_s, rtol=1e-12)
    assert (result.first_scheduled_s >= result.released_s).all()
    assert (result.first_token_s <= result.finish_s).all()
    last = np.maximum.reduceat(result.finish_s, jobs.first_hop[:-1])
    assert np.array_equal(last, result.job_finish_s)
    assert result.end_s == pytest.approx(last.max())
    # Little's law, over the whole run.
    assert result.mean_jobs * result.end_s == pytest.approx(result.job_latency_s.sum(), rel=1e-9)
    # Every call is served by a station of its pool, and stations are never busier than all the time.
    stations = {s.name: k for k, s in enumerate(network.stations)}
    pools = {p.name: {stations[name] for name in p.stations} for p in network.all_pools}
    for c, (_, node) in enumerate(network.classes):
        assert set(result.station[jobs.node == c].tolist()) <= pools[node.pool]
    assert ((result.utilisation > -1e-9) & (result.utilisation < 1 + 1e-9)).all()
    # Backlogs: nothing at the beginning but what arrives then, and never more than came.
    assert result.time_s[0] == 0 and np.allclose(np.diff(result.time_s), result.time_s[1], rtol=1e-9)
    arrived = np.searchsorted(jobs.arrival_s, result.time_s, side="right")
    assert (result.jobs_in_system <= arrived).all() and (result.jobs_in_system >= 0).all()
    assert (result.backlog_tokens >= 0).all()
    tokens = jobs.prompt_tokens.sum(dtype=np.int64) + (jobs.output_tokens - 1).sum(dtype=np.int64)
    assert result.backlog.max(initial=0) <= tokens


def test_a_horizon_cuts_the_same_run():
    network = networks.get("fork-join", load=0.9)
    whole = simulate_network(network, "plas", jobs=200, seed=2)
    cut = simulate_network(network, "plas", jobs=whole.jobs, seed=2, horizon_s=30.0, samples=31)
    done = whole.finish_s <= 30.0
    assert np.array_equal(cut.finish_s[done], whole.finish_s[done]) and np.isnan(cut.finish_s[~done]).all()
    assert cut.end_s == 30.0 and cut.time_s[-1] == pytest.approx(30.0) and len(cut.time_s) == 31
    inside = (whole.jobs.arrival_s <= 30.0) & (whole.job_finish_s > 30.0)
    assert cut.jobs_in_system[-1] == inside.sum()


def test_the_same_seed_gives_the_same_run():
    network = networks.get("reflection", load=0.8, routing="random")
    one, two = (simulate_network(network, "atlas", jobs=100, seed=7) for _ in range(2))
    assert np.array_equal(one.finish_s, two.finish_s) and np.array_equal(one.station, two.station)
    other = simulate_network(network, "atlas", jobs=one.jobs, seed=8)
    assert not np.array_equal(one.station, other.station)


# ---------------------------------------------------------------------- routing and disciplines


@pytest.mark.parametrize("routing", sorted(set(networks.ROUTINGS) - {"outside"}))
def test_routing_uses_all_stations(routing):
    network = networks.get("fork-join", load=0.7, routing=routing)
    result = simulate_network(network, jobs=300, seed=1)
    share = np.bincount(result.station) / len(result.station)
    assert len(share) == 2 and share.min() > 0.1
    if routing == "by-program":
        assert all(len(set(part)) == 1 for part in np.split(result.station, result.jobs.first_hop[1:-1]))
    if routing == "round-robin":
        order = np.lexsort((np.arange(len(result.station)), result.released_s))
        assert abs(share[0] - 0.5) < 0.01 and len(order)


def test_least_time_sends_more_to_the_faster_engine():
    slow, fast = (
        Station(name, profile, EngineConfig(token_budget=512))
        for name, profile in (("slow", "a100-llama2-7b"), ("fast", "roofline:llama-3-8b@h100:tp2"))
    )
    flow = Workflow("requests", [Node("call", "both", CALL)])
    network = Network("unequal", [slow, fast], [flow], [Pool("both", ["slow", "fast"], "least-time")])
    result = simulate_network(network.at_load(0.9), jobs=2000)
    counts = np.bincount(result.station, minlength=2)
    assert counts[1] > 1.5 * counts[0]


def test_oldest_programs_first_shortens_the_worst_wait():
    """In a network with loops the oldest program is not overtaken; least attained service favours short
    ones in the mean."""
    network = networks.get("tool-calling", load=1.0)
    results = {name: simulate_network(network, name, jobs=800, seed=3) for name in ("fcfs", "oldest", "plas")}
    worst = {name: np.nanmax(result.job_latency_s) for name, result in results.items()}
    assert worst["oldest"] < worst["fcfs"] and worst["oldest"] < worst["plas"]


@pytest.mark.parametrize(
    ("discipline", "low", "high"),
    [
        ("exit-first", 200_000, np.inf),
        ("entry-first", 0, 40_000),
        ("fcfs", 0, 40_000),
        ("back-pressure", 0, 40_000),
        ("plas", 0, 60_000),
        ("oldest", 0, 150_000),
    ],
)
def test_rybko_stolyar_at_load_nine_tenths(discipline, low, high):
    result = simulate_network(networks.get("rybko-stolyar"), discipline, horizon_s=2000.0, seed=1)
    assert low < result.backlog.max() < high


def test_rybko_stolyar_below_its_threshold():
    """Exit-first is stable below a nominal load of 0.559: the two long tasks exclude each other."""
    network = networks.get("rybko-stolyar", load=0.5)
    result = simulate_network(network, "exit-first", horizon_s=2000.0, seed=1)
    assert result.backlog.max() < 20_000


def test_explicit_priorities_are_those_of_the_nodes():
    """In `rybko-stolyar` the long task has the better priority: the same as exit-first."""
    network = networks.get("rybko-stolyar")
    one, two = (
        simulate_network(network, name, horizon_s=300.0, seed=5) for name in ("priority", "exit-first")
    )
    assert np.array_equal(one.finish_s, two.finish_s, equal_nan=True)


def test_disciplines_order_the_queue_of_other_schedulers():
    """vLLM with the oldest program first: the order of its queue changes, and nothing else of it."""
    network = networks.get("tool-calling", load=1.2).scheduled(baselines.get("vllm-v1"))
    few = [dataclasses.replace(s, engine=EngineConfig(max_num_seqs=8)) for s in network.stations]
    network = dataclasses.replace(network, stations=few)  # so that calls wait
    one, two = (simulate_network(network, name, jobs=300, seed=3) for name in ("fcfs", "oldest"))
    assert not np.array_equal(one.finish_s, two.finish_s)
    assert np.nanmax(two.job_latency_s) < np.nanmax(one.job_latency_s)


def test_jobs_taken_and_merged():
    network = networks.get("tool-calling")
    jobs = network.draw(50, seed=1)
    some = jobs.take([3, 10, 11])
    assert np.diff(some.first_hop).tolist() == np.diff(jobs.first_hop)[[3, 10, 11]].tolist()
    first = slice(jobs.first_hop[10], jobs.first_hop[11])
    mine = slice(some.first_hop[1], some.first_hop[2])
    for name in ("node", "prompt_tokens", "output_tokens", "delay_s"):
        assert np.array_equal(getattr(some, name)[mine], getattr(jobs, name)[first])
    assert len(some.before) == sum(np.diff(jobs.first_hop)[[3, 10, 11]] - 1)  # chains
    whole = Jobs.merged(jobs.take(np.arange(0, 50, 2)), jobs.take(np.arange(1, 50, 2)))
    for field in dataclasses.fields(Jobs):
        if field.name not in ("before", "after"):
            assert np.array_equal(getattr(whole, field.name), getattr(jobs, field.name)), field.name
    edges = [sorted(zip(x.before.tolist(), x.after.tolist(), strict=True)) for x in (whole, jobs)]
    assert edges[0] == edges[1]
    assert Jobs.merged(jobs, some.arriving(0.0)).arrival_s[:3].tolist() == [0.0] * 3


# ---------------------------------------------------------------------- loads


def test_nominal_loads():
    network = networks.get("rybko-stolyar")
    assert [round(load.load, 3) for load in networks.loads(network)] == [0.9, 0.9]
    assert networks.loads(network)[0].capacity_tokens_per_s == pytest.approx(768, rel=1e-9)
    pair = networks.loads(networks.get("jsq"))[0]
    assert pair.capacity_tokens_per_s == pytest.approx(2 * 3342.9, rel=1e-4) and pair.load == pytest.approx(
        0.9
    )


@pytest.mark.parametrize("load", [0.4, 0.9])
def test_the_virtual_station_of_rybko_and_stolyar(load: float) -> None:
    network = networks.get("rybko-stolyar", load=load)
    (one,) = virtual_stations(network, "exit-first")
    assert len(one.classes) == 2
    assert one.load == pytest.approx(load / 0.5588, rel=1e-3)  # 544 of 608 tokens are of the second calls
    assert virtual_stations(network, "entry-first") == ()
    assert virtual_stations(network, "fcfs") == ()


def test_no_virtual_station_is_claimed_where_none_is_known() -> None:
    for name in ("fork-join", "reflection", "jsq", "disaggregation"):
        assert virtual_stations(networks.get(name), "exit-first") == ()
    scheduled = networks.get("rybko-stolyar").scheduled(baselines.get("sarathi"))
    assert virtual_stations(scheduled, "exit-first") == ()
    with pytest.raises(InputError, match="unknown discipline"):
        virtual_stations(scheduled, "exit-frist")


def test_at_load_scales_the_busiest_pool():
    network = networks.get("disaggregation", load=0.37)
    assert max(load.load for load in networks.loads(network)) == pytest.approx(0.37)


# ---------------------------------------------------------------------- bad input


def test_bad_runs():
    network = networks.get("jsq")
    for problem, arguments in (
        ("unknown discipline 'exit-frist'; did you mean 'exit-first'", {"discipline": "exit-frist"}),
        ("give a number of jobs or a horizon", {}),
        ("horizon_s must be positive", {"horizon_s": 0.0}),
        ("num_jobs must be a whole number from 1", {"jobs": 0}),
        ("seed must be a whole number", {"jobs": 1, "seed": -1}),
        ("samples must be a whole number", {"jobs": 1, "samples": 1}),
        ("only plas and atlas take a number of tokens", {"discipline": "oldest:3", "jobs": 1}),
        ("no job arrives within", {"horizon_s": 1e-9}),
        ("horizon_s must be positive", {"horizon_s": "9"}),
        ("jobs are more than fit in memory", {"horizon_s": 1e13}),
        ("jobs are more than fit in memory", {"jobs": 2_000_000_000}),
        ("samples must be a whole number", {"jobs": 1, "samples": 10**9}),
        ("quantum must be a whole number", {"jobs": 1, "discipline": f"plas:{10**20}"}),
    ):
        with pytest.raises(InputError, match=problem):
            simulate_network(network, **arguments)
    with pytest.raises(InputError, match="is not a Network"):
        simulate_network("jsq", jobs=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheduler", "discipline", "problem"),
    [
        ("vtc", "fcfs", "goes by the order in which requests arrive"),
        ("vllm-v0-priority", "fcfs", "goes by the order in which requests arrive"),
        ("vllm-v1-async", "fcfs", "asynchronous scheduling is not there in networks"),
        ("sglang", "oldest", "has an order of its own"),
        ("vllm-v1", "max-weight", "plans iterations itself"),
    ],
)
def test_schedulers_that_do_not_work(scheduler, discipline, problem):
    with pytest.raises(InputError, match=f"station gpu.*{problem}"):
        simulate_network(of_one(baselines.get(scheduler)), discipline, jobs=3)


def test_a_call_that_never_fits():
    network = of_one(None, EngineConfig(kv_blocks=4))
    with pytest.raises(InputError, match=r"station gpu, a call of call: .*can never fit"):
        simulate_network(network, jobs=3)


def test_a_station_without_memory_is_named():
    network = of_one(None)
    unknown_memory = dataclasses.replace(network.stations[0], profile=networks.ready.UNIT)
    with pytest.raises(InputError, match=r"station gpu: .*kv_blocks"):
        simulate_network(dataclasses.replace(network, stations=[unknown_memory]), jobs=3)


def test_bad_jobs():
    for problem, arguments in (
        ("job 1: arrives before the one above", {"arrival_s": [1.0, 0.5]}),
        ("hop 0: prompt_tokens", {"prompt_tokens": [0, 1]}),
        ("edge 0: joins hops of two jobs", {"before": [0], "after": [1]}),
        ("edge 0: must go from a hop to a later one", {"before": [1], "after": [0]}),
        ("job 0: has no hop", {"hops": [0, 2]}),
    ):
        given = {"arrival_s": [0.0, 1.0], "hops": 1, "node": 0, "prompt_tokens": 5, "output_tokens": 5}
        with pytest.raises(InputError, match=problem):
            Jobs.of(**{**given, **arguments})
    with pytest.raises(InputError, match="hops of class 3; network jsq has 1"):
        simulate_network(networks.get("jsq"), jobs=Jobs.of(0.0, 1, 3, 5, 5))


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("name", networks.names())
def test_what_is_written_reads_back_the_same(name, tmp_path):
    network = networks.get(name).scheduled(None)
    path = tmp_path / "network.json"
    path.write_text(network.to_json(), encoding="utf-8")
    assert networks.get(path) == network


def test_a_file_may_name_schedulers(tmp_path):
    network = networks.get("fork-join").scheduled(baselines.get("vllm-v1"), "gpu-1")
    path = tmp_path / "network.json"
    path.write_text(network.to_json(), encoding="utf-8")
    assert networks.get(path, schedulers=baselines.get) == network
    with pytest.raises(InputError, match=r"network\.json: station gpu-1: names a scheduler"):
        networks.get(path)


def described() -> dict:
    return {
        "stations": [{"name": "a", "profile": "a100-llama3-8b"}, {"name": "b", "profile": "a100-llama3-8b"}],
        "pools": [{"name": "gpus", "stations": ["a", "b"], "routing": "jsq"}],
        "workflows": [
            {
                "name": "w",
                "rate": 1.0,
                "nodes": [
                    {"name": "x", "pool": "gpus", "prompt": 10, "output": "uniform:1,5"},
                    {"name": "y", "pool": "gpus", "lengths": "azure-conv"},
                ],
                "edges": [{"from": "x", "to": "y", "context": "all"}],
            }
        ],
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.update(staions=[]), "unknown key of the network 'staions'; did you mean 'stations'"),
        (lambda d: d.pop("workflows"), "the network lacks workflows"),
        (lambda d: d["stations"][0].update(profile="a101"), "unknown profile 'a101'"),
        (lambda d: d["stations"][0].update(engine={"kv_blocks": "many"}), "kv_blocks must be a whole number"),
        (lambda d: d["stations"][1].update(name="a"), "two of a kind .* are called 'a'"),
        (lambda d: d["pools"][0].update(stations=["a", "c"]), "unknown station of pool gpus 'c'"),
        (lambda d: d["pools"][0].update(stations=["a", "a"]), "station a is in two pools, or twice in one"),
        (lambda d: d["pools"][0].update(stations=["a"]), "station b serves no node"),
        (lambda d: d["pools"][0].update(routing="shortest"), "unknown routing of pool gpus 'shortest'"),
        (lambda d: d["workflows"][0].update(rate=0), "rate must be a positive number"),
        (lambda d: d["workflows"][0].update(arrivals="poison"), "did you mean 'poisson'"),
        (lambda d: d["workflows"][0]["nodes"][0].update(pool="gpu"), "unknown pool of node x"),
        (lambda d: d["workflows"][0]["nodes"][0].update(output="uniform:9,5"), "node x: uniform: tokens"),
        (lambda d: d["workflows"][0]["nodes"][0].pop("prompt"), "node x: it lacks prompt"),
        (lambda d: d["workflows"][0]["nodes"][1].update(prompt=3), "give either lengths, or prompt"),
        (lambda d: d["workflows"][0]["nodes"][0].update(delay_s="exponential"), "node x: delay"),
        (lambda d: d["workflows"][0]["edges"][0].update(to="z"), "unknown target of edge x -> z"),
        (lambda d: d["workflows"][0]["edges"][0].update(context="some"), "unknown context of edge x -> y"),
    ],
)
def test_bad_files(change, problem, tmp_path):
    path = tmp_path / "bad.json"
    data = described()
    path.write_text(json.dumps(data), encoding="utf-8")
    networks.get(path)  # is good as it is
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError, match=problem) as caught:
        networks.get(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "bad.json"
    for text, problem in (
        ("{", "is not JSON"),
        ('{"name": 1, "name": 2}', "the key 'name' is given twice"),
        ("[]", "the network must be a mapping"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=problem):
            networks.get(path)
    with pytest.raises(InputError, match="cannot be read"):
        networks.get(tmp_path / "missing.json")
    with pytest.raises(InputError, match="unknown network 'rybko'; did you mean 'rybko-stolyar'"):
        networks.get("rybko")


def test_results_as_tables():
    result = simulate_network(networks.get("fork-join"), jobs=20, seed=1)
    assert len(result.to_frame()) == 20 and result.to_frame()["latency_s"].gt(0).all()
    hops = result.hops_frame()
    assert len(hops) == result.jobs.num_hops and set(hops["class"]) == {"plan", "work", "write"}
    metrics = result.metrics()
    assert metrics["finished"] == 20 and metrics["latency"]["mean"] == pytest.approx(
        result.job_latency_s.mean()
    )
    json.dumps(metrics)
