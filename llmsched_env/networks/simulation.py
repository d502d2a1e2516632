"""`simulate_network`: programs of agents on a network of engines, run to the end; and what came of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env import profiles
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.lanes import served
from llmsched_env.core.requests import Requests
from llmsched_env.errors import InputError
from llmsched_env.metrics import distribution
from llmsched_env.networks import disciplines
from llmsched_env.networks.core.assemble import NetSpec, PoolSpec, StationSpec, make_networks
from llmsched_env.networks.core.loop import Outcome, run_network, run_network_levels
from llmsched_env.networks.core.state import Failure, Networks, Rule, Standing
from llmsched_env.networks.disciplines import Discipline
from llmsched_env.networks.jobs import Jobs
from llmsched_env.networks.load import PoolLoad, loads, resolved
from llmsched_env.networks.network import ROUTINGS, TOKEN_LEVEL, Network, Station
from llmsched_env.scheduling import Routine, Scheduler
from llmsched_env.simulation import _broken_rule, _fitted, _misfit

if TYPE_CHECKING:
    import pandas as pd

_MOST_SAMPLES = 10_000_000
_OFTEN = 1_000_000  # moments between two looks at the keyboard


@dataclasses.dataclass(frozen=True)
class NetworkResult:
    """What a run gave. J jobs, N hops, S stations, T samples; times are seconds from the start of the run.

    Attributes:
        network, discipline: names. seed: of jobs, routing and lots.
        jobs: what arrived: J jobs of N hops, each of a class (`class_names`).
        stations: S names. class_names: of the classes.
        loads: nominal load of each pool by name.
        end_s: the horizon, or when the last job was done.
        job_finish_s: (J,) float64, nan: not done.
        released_s: (N,) float64: when each hop came to its station; nan: it did not. station: (N,) int32: its
            number; -1: none.
        first_scheduled_s, first_token_s, finish_s: (N,) float64, nan where it did not come to that.
        preemptions: (N,) int32.
        time_s: (T,) float64: when samples were taken, evenly from 0.
        backlog_tokens: (T, S) int64: tokens that the hops at each station had left.
        jobs_in_system: (T,) int64.
        mean_jobs: jobs in system, averaged over time until `end_s`.
        iterations: (S,) int64. utilisation: (S,) float64: share of the time in which an iteration ran.
        batch_mean: (S,) float64: hops in an iteration.
    """

    network: str
    discipline: str
    seed: int
    jobs: Jobs
    stations: tuple[str, ...]
    class_names: tuple[str, ...]
    loads: dict[str, float]
    end_s: float
    job_finish_s: NDArray[np.float64]
    released_s: NDArray[np.float64]
    station: NDArray[np.int32]
    first_scheduled_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    preemptions: NDArray[np.int32]
    time_s: NDArray[np.float64]
    backlog_tokens: NDArray[np.int64]
    jobs_in_system: NDArray[np.int64]
    mean_jobs: float
    iterations: NDArray[np.int64]
    utilisation: NDArray[np.float64]
    batch_mean: NDArray[np.float64]

    @property
    def job_latency_s(self) -> NDArray[np.float64]:
        """(J,) from the arrival of each job until its last hop is done; nan: not done."""
        return self.job_finish_s - self.jobs.arrival_s

    @property
    def backlog(self) -> NDArray[np.int64]:
        """(T,) tokens left at all stations together."""
        total: NDArray[np.int64] = self.backlog_tokens.sum(axis=1)
        return total

    def metrics(self) -> dict[str, Any]:
        """As plain numbers: jobs, finished (jobs), hops, hops_finished, end_s, jobs_per_s, mean_jobs,
        peak_backlog_tokens, final_backlog_tokens (of the samples), preemptions; latency, of jobs, and
        hop_latency, from release to finish: mean, p50, p90 and p99 over those that are done; by station:
        utilisation, iterations, batch_size; loads by pool.
        """
        done = int(np.count_nonzero(~np.isnan(self.job_finish_s)))
        return {
            "jobs": len(self.jobs),
            "finished": done,
            "hops": self.jobs.num_hops,
            "hops_finished": int(np.count_nonzero(~np.isnan(self.finish_s))),
            "end_s": self.end_s,
            "jobs_per_s": done / self.end_s if self.end_s > 0 else math.nan,
            "mean_jobs": self.mean_jobs,
            "peak_backlog_tokens": int(self.backlog.max(initial=0)),
            "final_backlog_tokens": int(self.backlog[-1]) if len(self.backlog) else 0,
            "preemptions": int(self.preemptions.sum()),
            "latency": distribution(self.job_latency_s),
            "hop_latency": distribution(self.finish_s - self.released_s),
            "stations": {
                name: {
                    "utilisation": float(self.utilisation[k]),
                    "iterations": int(self.iterations[k]),
                    "batch_size": float(self.batch_mean[k]),
                }
                for k, name in enumerate(self.stations)
            },
            "loads": dict(self.loads),
        }

    def to_frame(self) -> pd.DataFrame:
        """A pandas table with a row a job."""
        import pandas as pd

        return pd.DataFrame(
            {
                "job": np.arange(len(self.jobs)),
                "workflow": self.jobs.workflow,
                "hops": np.diff(self.jobs.first_hop),
                "arrival_s": self.jobs.arrival_s,
                "finish_s": self.job_finish_s,
                "latency_s": self.job_latency_s,
            }
        )

    def hops_frame(self) -> pd.DataFrame:
        """A pandas table with a row a hop."""
        import pandas as pd

        names = np.array([*self.stations, ""], dtype=object)
        return pd.DataFrame(
            {
                "job": self.jobs.job_of_hop,
                "class": np.array(self.class_names, dtype=object)[self.jobs.node],
                "station": names[self.station],
                "prompt_tokens": self.jobs.prompt_tokens,
                "output_tokens": self.jobs.output_tokens,
                "released_s": self.released_s,
                "first_scheduled_s": self.first_scheduled_s,
                "first_token_s": self.first_token_s,
                "finish_s": self.finish_s,
                "preemptions": self.preemptions,
            }
        )


def simulate_network(
    network: Network,
    discipline: str | Discipline = "fcfs",
    *,
    jobs: int | Jobs | None = None,
    horizon_s: float = math.inf,
    seed: int = 0,
    samples: int = 1000,
) -> NetworkResult:
    """Serve programs of agents on a network and measure.

    Args:
        network: e.g. `networks.get("rybko-stolyar")`.
        discipline: in which order hops are served; `disciplines.names()`.
        jobs: how many are drawn, or those themselves; None: those that arrive up to the horizon.
        horizon_s: the run ends then; inf: when every job is done.
        seed: of the jobs, of random routing, and of schedulers that draw lots.
        samples: points of the time grid on which backlogs are noted, at least 2. Without a horizon there are
            as many or up to half as few.

    Raises:
        InputError: for contradictory settings, a call that can never fit at a station, a scheduler that
            cannot work in a network, breaks a rule of the engine or stops making progress.
    """
    prepared = prepare(network, discipline, jobs=jobs, horizon_s=horizon_s, seed=seed, samples=samples)
    networks = make_networks([prepared.spec])
    run: Any = run_network_levels if prepared.levels_only else run_network
    while True:
        outcome = run(networks, 0, horizon_s, _OFTEN)
        if outcome == Outcome.ERROR:
            raise InputError(failure(prepared.network, prepared.jobs, networks))
        if outcome != Outcome.MORE:
            return _result(prepared, networks)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A network and its jobs, resolved and checked: what `core.assemble.make_networks` takes, and names.

    Attributes:
        levels_only: whether every station has the routine LEVELS, for which `loop.advance_levels` suffices.
    """

    network: Network
    discipline: Discipline
    jobs: Jobs
    spec: NetSpec
    loads: dict[str, float]
    seed: int
    levels_only: bool


def prepare(
    network: Network,
    discipline: str | Discipline = "fcfs",
    *,
    jobs: int | Jobs | None = None,
    horizon_s: float = math.inf,
    seed: int = 0,
    samples: int = 1000,
    known: tuple[PoolLoad, ...] | None = None,
) -> Prepared:
    """Everything that `simulate_network` does before it runs; the arguments and errors are the same.

    `known` are the network's loads, for whoever prepares it many times.
    """
    if not isinstance(network, Network):
        raise InputError(f"{network!r} is not a Network; pass networks.get({str(network)!r})")
    found = disciplines.get(discipline)
    if not (isinstance(horizon_s, Real) and horizon_s > 0):
        raise InputError(f"horizon_s must be positive seconds, not {horizon_s!r}")
    if isinstance(samples, bool) or not isinstance(samples, int) or not 2 <= samples <= _MOST_SAMPLES:
        raise InputError(f"samples must be a whole number from 2 to {_MOST_SAMPLES}, not {samples!r}")
    if not isinstance(jobs, Jobs):
        jobs = network.draw(jobs, horizon_s=horizon_s, seed=seed)
    elif jobs.node.max(initial=0) >= len(network.classes):
        raise InputError(
            f"jobs have hops of class {int(jobs.node.max())}; network {network.name} has "
            f"{len(network.classes)}"
        )
    of_pool = {load.pool: load for load in known or loads(network)}
    stations, stop, limit = _stations(network, found, jobs, seed, of_pool)
    nodes = network.classes
    numbers = {pool.name: p for p, pool in enumerate(network.all_pools)}
    places = {station.name: k for k, station in enumerate(network.stations)}
    keys = _keys(network, found)
    mean_tokens, flow = _flow(jobs, len(nodes))
    last = horizon_s if horizon_s < math.inf else max(float(jobs.arrival_s[-1]), 1e-9)
    sample_s = last / (samples - 1)
    if sample_s * (samples - 1) > last:  # by rounding; the last sample is at the horizon
        sample_s = math.nextafter(sample_s, 0.0)
    priority = np.array([node.priority for _, node in nodes], dtype=np.int32)
    spec = NetSpec(
        stations=stations,
        pools=[
            PoolSpec(tuple(places[name] for name in pool.stations), ROUTINGS[pool.routing])
            for pool in network.all_pools
        ],
        node_pool=np.array([numbers[node.pool] for _, node in nodes]),
        node_key=keys,
        node_weight=np.array([float(node.weight) for _, node in nodes]),
        node_tokens=mean_tokens,
        flow=flow,
        jobs=jobs,
        stop_tokens=stop,
        limit_tokens=limit,
        priority=priority[jobs.node],
        client=jobs.workflow[jobs.job_of_hop],
        rule=found.rule,
        quantum=found.quantum,
        seed=seed,
        sample_s=sample_s,
        samples=samples,
    )
    levels = all(_scheduler(station).settings.routine is Routine.LEVELS for station in network.stations)
    nominal = {name: load.load for name, load in of_pool.items()}
    return Prepared(network, found, jobs, spec, nominal, seed, levels)


# ---------------------------------------------------------------------- before the run


def _scheduler(station: Station) -> Scheduler:
    return station.scheduler or TOKEN_LEVEL


def _stations(
    network: Network, discipline: Discipline, jobs: Jobs, seed: int, of_pool: dict[str, Any]
) -> tuple[list[StationSpec], NDArray[np.int32], NDArray[np.int32]]:
    """The stations, and where answers end, and would end at the latest, at the stations of their pools."""
    stop, limit = jobs.output_tokens.copy(), jobs.output_tokens.copy()
    made: dict[str, StationSpec] = {}
    by_name = {station.name: station for station in network.stations}
    for pool in network.all_pools:
        classes = [c for c, (_, node) in enumerate(network.classes) if node.pool == pool.name]
        hops = np.flatnonzero(np.isin(jobs.node, classes))
        for name, s_per_token in zip(pool.stations, of_pool[pool.name].s_per_token, strict=True):
            station = by_name[name]
            scheduler = _scheduler(station)
            _check_scheduler(station, discipline)
            longest = 2
            if len(hops):
                tokens = jobs.prompt_tokens[hops].astype(np.int64) + jobs.output_tokens[hops]
                longest = int(tokens.max())
            config = resolved(station, longest)
            if config.async_scheduling:
                raise InputError(
                    f"station {name}: asynchronous scheduling is not there in networks; "
                    "set async_scheduling=False"
                )
            if len(hops):
                ends, at_most = _fit(network, station, scheduler, config, jobs, hops)
                stop[hops] = np.minimum(stop[hops], ends)
                limit[hops] = np.minimum(limit[hops], at_most)
            profile = profiles.get(station.profile)
            made[name] = StationSpec(
                config=config,
                pack=_packer(station, discipline),
                cost=profile.pack(),
                workspace=scheduler.work_size(jobs.num_hops, int(jobs.workflow.max()) + 1),
                s_per_token=s_per_token,
                kv_bytes_per_token=profile.kv_bytes_per_token or 0.0,
            )
    return [made[station.name] for station in network.stations], stop, limit


_LISTENING = (Routine.RANKED, Routine.FASTSERVE, Routine.VTC, Routine.WAIT)


def _check_scheduler(station: Station, discipline: Discipline) -> None:
    """Complain of a scheduler that cannot work in a network, or not under this discipline."""
    scheduler = _scheduler(station)
    settings = scheduler.settings
    where = f"station {station.name}: scheduler {scheduler.name}"
    if scheduler.plan is not None:
        raise InputError(f"{where} is a function of one's own, which networks do not take; name another")
    if settings.routine in _LISTENING or settings.preempt_for_priority:
        raise InputError(
            f"{where} goes by the order in which requests arrive at its engine, which a network does not "
            "know in advance; name another"
        )
    if discipline.rule is Rule.FCFS or station.scheduler is None:
        return
    if discipline.token_level:
        raise InputError(
            f"{where}: the discipline {discipline.name} plans iterations itself; leave the scheduler out"
        )
    if settings.routine not in (Routine.UNIFIED, Routine.LEVELS):
        raise InputError(
            f"{where} has an order of its own, which the discipline {discipline.name} cannot change; "
            "take the discipline fcfs, or another scheduler"
        )


def _packer(station: Station, discipline: Discipline) -> Callable[[Any], None]:
    """What writes the scheduler's settings into the record of the engine: ordered by the network's keys,
    unless the discipline leaves the order to the scheduler."""
    scheduler = _scheduler(station)

    def pack(record: Any) -> None:
        scheduler.pack(record)
        if discipline.rule is not Rule.FCFS:
            record["order"], record["resume"] = Order.SCORE, Place.KEY

    return pack


def _fit(
    network: Network,
    station: Station,
    scheduler: Scheduler,
    config: EngineConfig,
    jobs: Jobs,
    hops: NDArray[np.int64],
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Where the answers of these hops end at a station, and would end at the latest."""
    names = network.class_names()
    requests = Requests.of(np.zeros(len(hops)), jobs.prompt_tokens[hops], jobs.output_tokens[hops])
    stop, limit, bad = _fitted(requests, scheduler, config)
    if bad.any():
        i = int(np.argmax(bad))
        problem = _misfit(requests, i, scheduler, config, stop)
        raise InputError(f"station {station.name}, a call of {names[jobs.node[hops[i]]]}: {problem}")
    return stop, limit


def _keys(network: Network, discipline: Discipline) -> NDArray[np.float64]:
    """The key of each class under the rule CLASS."""
    if discipline.keys == "left":
        left = {id(workflow): workflow.hops_left() for workflow in network.workflows}
        return np.array([left[id(workflow)][node.name] for workflow, node in network.classes])
    return np.array([float(node.priority) for _, node in network.classes])


def _flow(jobs: Jobs, classes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(K,) mean tokens of a hop of each class, and (K, K) hops of class j for each hop of class i, a hop that
    waits for several being shared among them; over the jobs drawn."""
    node = jobs.node.astype(np.int64)
    count = np.bincount(node, minlength=classes).astype(np.float64)
    tokens = jobs.prompt_tokens.astype(np.float64) + jobs.output_tokens - 1
    mean = np.bincount(node, weights=tokens, minlength=classes) / np.maximum(count, 1)
    waits = np.bincount(jobs.after, minlength=jobs.num_hops)
    flow = np.bincount(
        node[jobs.before] * classes + node[jobs.after],
        weights=1 / waits[jobs.after],
        minlength=classes * classes,
    )
    return np.maximum(mean, 1.0), flow.reshape(classes, classes) / np.maximum(count, 1)[:, None]


# ---------------------------------------------------------------------- after the run


def failure(network: Network, jobs: Jobs, networks: Networks) -> str:
    """The message for what went wrong."""
    g = networks.g[0]
    at, clock = int(g["error_at"]), float(g["clock"])
    if g["error"] == Failure.STUCK:
        left = len(jobs) - int(g["jobs_done"])
        waiting = [
            s.name for s, e in zip(network.stations, networks.engines, strict=True) if e["num_waiting"]
        ]
        return (
            f"network {network.name} at {clock:.6g} s: {left} jobs are not done, nothing runs and nothing "
            f"more comes; calls wait at {', '.join(waiting)}; a scheduler must always serve somebody"
        )
    station = network.stations[at]
    if g["error"] == Failure.LIVELOCK:
        return (
            f"station {station.name} at {clock:.6g} s: no token came out for 1000000 iterations of scheduler "
            f"{_scheduler(station).name}; calls are preempted again and again"
        )
    problem = _broken_rule(
        Requests.of(np.zeros(jobs.num_hops), 1, 1),
        _scheduler(station),
        _Alone(networks.engines[at : at + 1]),  # type: ignore[arg-type]
    )
    return f"station {station.name}: {problem}"


@dataclasses.dataclass(frozen=True)
class _Alone:
    """The record of one engine, where `simulate` looks for it."""

    s: NDArray[Any]


def _result(prepared: Prepared, networks: Networks) -> NetworkResult:
    g, engines = networks.g[0], networks.engines
    done = served(networks.req)
    stations = len(engines)
    station = networks.hop["station"].copy()
    count = int(g["samples"])
    rows = networks.samples[: count * (stations + 1)].reshape(count, stations + 1)
    end = float(g["clock"])
    busy = engines["busy"].copy()
    running = networks.station["standing"] == Standing.BUSY
    busy[running] += end - engines["clock"][running]  # the part of an iteration until the horizon
    iterations = engines["iterations"].astype(np.int64)
    return NetworkResult(
        network=prepared.network.name,
        discipline=prepared.discipline.name,
        seed=prepared.seed,
        jobs=prepared.jobs,
        stations=tuple(one.name for one in prepared.network.stations),
        class_names=tuple(prepared.network.class_names()),
        loads=prepared.loads,
        end_s=end,
        job_finish_s=networks.job["finish"].copy(),
        released_s=np.where(station >= 0, networks.req["arrival"], np.nan),
        station=station,
        first_scheduled_s=done.first_scheduled_s,
        first_token_s=done.first_token_s,
        finish_s=done.finish_s,
        preemptions=done.preemptions,
        time_s=np.arange(count, dtype=np.float64) * float(g["sample_s"]),
        backlog_tokens=rows[:, :stations].copy(),
        jobs_in_system=rows[:, stations].copy(),
        mean_jobs=float(g["area"]) / end if end > 0 else 0.0,
        iterations=iterations,
        utilisation=busy / end if end > 0 else np.zeros(stations),
        batch_mean=engines["batch_sum"] / np.maximum(iterations, 1),
    )
