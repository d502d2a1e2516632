"""The packed arrays of networks, made from stations, pools, classes and jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.compile import njit
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.lanes import fill_engine, write_requests
from llmsched_env.core.state import REQUEST, aligned_zeros
from llmsched_env.networks.core.state import (
    CELL,
    COLUMNS,
    HOP,
    JOB,
    NET,
    NODE,
    POOL,
    STATION,
    TIMED,
    Networks,
    Phase,
    Standing,
)
from llmsched_env.scheduling import ENGINE


@dataclasses.dataclass(frozen=True)
class StationSpec:
    """What one station starts from: resolved settings, the scheduler's packer and workspace, packed costs."""

    config: EngineConfig
    pack: Callable[[Any], None]
    cost: NDArray[np.float64]
    workspace: int
    s_per_token: float
    kv_bytes_per_token: float = 0.0
    outside: bool = False


@dataclasses.dataclass(frozen=True)
class PoolSpec:
    """Which stations, by number, and the rule (`Routing`)."""

    stations: tuple[int, ...]
    routing: int


@dataclasses.dataclass(frozen=True)
class NetSpec:
    """What one network starts from.

    Attributes:
        stations: S of them; each is in one pool.
        pools: P of them.
        node_pool: (K,) the pool of each class. node_key, node_weight, node_tokens: (K,) float64, see NODE.
        flow: (K, K) float64.
        jobs: of N hops (`networks.jobs.Jobs`).
        stop_tokens, limit_tokens: (N,) int32, as in `core.lanes.LaneSpec`.
        priority: (N,) int32; client: (N,) int32: of the records of requests.
        rule: `Rule`. quantum: tokens of its first level.
        seed: of routing and of the engines' own generators.
        sample_s, samples: seconds between samples, and how many are taken at most.
    """

    stations: Sequence[StationSpec]
    pools: Sequence[PoolSpec]
    node_pool: NDArray[np.int64]
    node_key: NDArray[np.float64]
    node_weight: NDArray[np.float64]
    node_tokens: NDArray[np.float64]
    flow: NDArray[np.float64]
    jobs: Any
    stop_tokens: NDArray[np.int32]
    limit_tokens: NDArray[np.int32]
    priority: NDArray[np.int32]
    client: NDArray[np.int32]
    rule: int
    quantum: int
    seed: int
    sample_s: float = 1.0
    samples: int = 0


def make_networks(specs: Sequence[NetSpec]) -> Networks:
    """Networks at time 0 with all their jobs still to come."""
    sizes = np.array([_sizes(spec) for spec in specs], dtype=np.int64)
    first = np.zeros((len(specs) + 1, len(COLUMNS)), np.int64)
    np.cumsum(sizes, axis=0, out=first[1:])
    total = dict(zip(COLUMNS, first[-1].tolist(), strict=True))
    networks = Networks(
        g=np.zeros(total["g"], NET),
        engines=np.zeros(total["engines"], ENGINE),
        req=aligned_zeros(total["req"], REQUEST),
        lists=np.zeros(total["lists"], np.int32),
        work=np.zeros(total["work"]),
        cost=np.zeros(total["cost"]),
        station=np.zeros(total["station"], STATION),
        pool=np.zeros(total["pool"], POOL),
        members=np.zeros(total["members"], np.int32),
        node=np.zeros(total["node"], NODE),
        cell=np.zeros(total["cell"], CELL),
        flow=np.zeros(total["flow"]),
        hop=np.zeros(total["hop"], HOP),
        successors=np.zeros(total["successors"], np.int32),
        job=np.zeros(total["job"], JOB),
        first_hop=np.zeros(total["first_hop"], np.int64),
        timed=np.zeros(total["timed"], TIMED),
        ready=np.zeros(total["ready"], np.int32),
        samples=np.zeros(total["samples"], np.int64),
        first=first,
    )
    for i, spec in enumerate(specs):
        _fill(part_of(networks, i), spec)
    return networks


def part_of(networks: Networks, i: int) -> dict[str, Any]:
    """The arrays of network i by name, views; its own record `g` is one of them."""
    a, b = networks.first[i], networks.first[i + 1]
    parts: dict[str, Any] = {
        name: getattr(networks, name)[a[c] : b[c]] for c, name in enumerate(COLUMNS) if name != "g"
    }
    parts["g"] = networks.g[i]
    return parts


def _sizes(spec: NetSpec) -> list[int]:
    stations, nodes, hops, jobs = (
        len(spec.stations),
        len(spec.node_pool),
        spec.jobs.num_hops,
        len(spec.jobs),
    )
    sizes = dict.fromkeys(("req", "hop", "timed", "ready"), hops)
    sizes |= dict.fromkeys(("engines", "station", "members"), stations)
    sizes |= {"g": 1, "node": nodes, "cell": stations * nodes, "flow": nodes * nodes}
    sizes |= {"lists": 6 * hops * stations, "pool": len(spec.pools)}
    sizes["work"] = sum(station.workspace for station in spec.stations)
    sizes["cost"] = sum(len(station.cost) for station in spec.stations)
    sizes |= {"successors": len(spec.jobs.before), "job": jobs, "first_hop": jobs + 1}
    sizes["samples"] = spec.samples * (stations + 1)
    return [sizes[name] for name in COLUMNS]


def _fill(to: dict[str, Any], spec: NetSpec) -> None:
    jobs = spec.jobs
    n = jobs.num_hops
    numbers = (jobs.prompt_tokens, spec.stop_tokens, spec.limit_tokens, spec.priority, spec.client, jobs.node)
    measures = (np.zeros(n), np.asarray(spec.stop_tokens, np.float64), np.full(n, np.inf), np.full(n, np.inf))
    columns: list[Any] = [*(np.ascontiguousarray(x, np.int32) for x in numbers), *measures]
    write_requests(to["req"], np.zeros(n, bool), *columns)
    _fill_stations(to, spec)
    to["node"]["pool"] = spec.node_pool
    to["node"]["key"] = spec.node_key
    to["node"]["weight"] = spec.node_weight
    to["node"]["mean_tokens"] = spec.node_tokens
    to["flow"][:] = spec.flow.ravel()
    to["hop"]["job"] = jobs.job_of_hop
    to["hop"]["node"] = jobs.node
    to["hop"]["delay"] = jobs.delay_s
    to["hop"]["station"] = -1
    _link(to["hop"], to["successors"], jobs.before, jobs.after)
    to["first_hop"][:] = jobs.first_hop
    to["job"]["arrival"] = jobs.arrival_s
    to["job"]["finish"] = np.nan
    to["job"]["workflow"] = jobs.workflow
    to["job"]["left"] = np.diff(jobs.first_hop)
    g = to["g"]
    # An engine is asked once before anybody is there (`core.run`), unless somebody is there from the start.
    g["phase"] = Phase.WAIT if jobs.arrival_s[0] == 0 else Phase.PLAN
    g["rule"], g["quantum"] = spec.rule, spec.quantum
    g["sample_s"] = spec.sample_s
    g["random"] = (spec.seed * 0x9E3779B97F4A7C15 + 1) & (2**64 - 1)


def _fill_stations(to: dict[str, Any], spec: NetSpec) -> None:
    work = cost = 0
    for k, station in enumerate(spec.stations):
        s, place = to["engines"][k], to["station"][k]
        station.pack(s)
        fill_engine(s, station.config, station.kv_bytes_per_token, spec.seed + k)
        s["arrived"] = spec.jobs.num_hops  # nobody comes by himself
        place["standing"] = Standing.DUE
        place["until"] = np.inf
        place["outside"] = station.outside
        place["s_per_token"] = station.s_per_token
        place["work"], place["work_size"] = work, station.workspace
        place["cost"], place["cost_size"] = cost, len(station.cost)
        to["cost"][cost : cost + len(station.cost)] = station.cost
        work += station.workspace
        cost += len(station.cost)
    members = 0
    for p, pool in enumerate(spec.pools):
        record = to["pool"][p]
        record["routing"], record["first"], record["size"] = pool.routing, members, len(pool.stations)
        for k in pool.stations:
            to["members"][members] = k
            to["station"][k]["pool"] = p
            members += 1


@njit
def _link(hop, successors, before, after) -> None:  # type: ignore[no-untyped-def]
    """Successors by hop, in order of edges; how many hops each waits for, and its depth."""
    for i in range(len(before)):
        hop[before[i]].last += 1
        hop[after[i]].waits += 1
    at = 0
    for h in range(len(hop)):
        count = hop[h].last
        hop[h].first = hop[h].last = at
        at += count
    for i in range(len(before)):
        b = hop[before[i]]
        successors[b.last] = after[i]
        b.last += 1
    for h in range(len(hop)):  # none comes before one it waits for
        for i in range(hop[h].first, hop[h].last):
            a = hop[successors[i]]
            a.depth = max(a.depth, hop[h].depth + 1)
