"""Networks: stations, pools of them, and the workflows that they serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

from llmsched_env import profiles
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.state import Hold
from llmsched_env.errors import InputError, unknown
from llmsched_env.networks.core.state import Routing
from llmsched_env.networks.draw import draw
from llmsched_env.networks.jobs import Jobs
from llmsched_env.networks.workflow import Node, Workflow
from llmsched_env.profiles import Profile
from llmsched_env.scheduling import Routine, Scheduler, Settings

ROUTINGS: dict[str, Routing] = {r.name.lower().replace("_", "-"): r for r in Routing}
"""Routing rules by name; see `core.state.Routing`."""

_MOST_JOBS = 100_000_000

TOKEN_LEVEL = Scheduler(
    "token-level",
    Settings(routine=Routine.LEVELS, order=Order.SCORE, resume=Place.KEY, test=Hold.PEAK, hold=Hold.PEAK),
    summary="the composition of Sarathi-Serve, group by group in the order of the network's discipline",
)
"""The scheduler of stations that have none of their own; it holds room for the whole answer, and so preempts
nobody."""


@dataclasses.dataclass(frozen=True)
class Station:
    """One engine.

    Attributes:
        name: for tables and pools.
        profile: its cost profile, or the name of one.
        engine: its settings; what is None comes from the profile and the scheduler.
        scheduler: its own; None: `TOKEN_LEVEL`, by the discipline of the network.
    """

    name: str
    profile: str | Profile = "a100-llama3-8b"
    engine: EngineConfig = EngineConfig()  # noqa: RUF009  (frozen)
    scheduler: Scheduler | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a station is called {self.name!r}; give it a name")
        if self.scheduler is not None and not isinstance(self.scheduler, Scheduler):
            raise InputError(f"station {self.name}: scheduler {self.scheduler!r} is not a Scheduler")


@dataclasses.dataclass(frozen=True)
class Pool:
    """Stations that may serve the same hops, and how one of them is chosen when a hop is released.

    Attributes:
        name: nodes name it.
        stations: names; each station is in one pool.
        routing: one of `ROUTINGS`: jsq (fewest remaining tokens), least-time (the same in seconds of each
            station), round-robin, random, power-of-two, by-class, by-program.
    """

    name: str
    stations: Sequence[str]
    routing: str = "jsq"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stations", tuple(self.stations))
        if not self.stations:
            raise InputError(f"pool {self.name}: has no station; give it at least one")
        known = [name for name in ROUTINGS if name != "outside"]
        if self.routing not in known:
            raise unknown(f"routing of pool {self.name}", self.routing, known)


@dataclasses.dataclass(frozen=True)
class Network:
    """Engines and the programs of agents that they serve. Validated when made.

    Attributes:
        name: for tables and messages.
        stations, pools, workflows: its parts. A station that is in none of the pools is one by itself, with
            its own name. Units of time are seconds, or whatever the cost profiles count in.
        summary, source: what it is, and where it is from.

    Raises:
        InputError: a name that there is not or is there twice, a station in two pools or that serves nobody.
    """

    name: str
    stations: Sequence[Station]
    workflows: Sequence[Workflow]
    pools: Sequence[Pool] = ()
    summary: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("stations", "workflows", "pools"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for kind, parts in (("station", self.stations), ("workflow", self.workflows)):
            if not parts:
                raise self._error(f"has no {kind}; give it at least one")
        self._check_names()
        known = [pool.name for pool in self.all_pools]
        used = set()
        for workflow in self.workflows:
            for node in workflow.nodes:
                if node.pool not in known:
                    where = f"pool of node {node.name} of workflow {workflow.name}"
                    raise unknown(where, node.pool, known)
                used.add(node.pool)
        for pool in self.all_pools:
            if pool.name not in used:
                kind = "pool" if pool in self.pools else "station"
                raise self._error(f"{kind} {pool.name} serves no node; leave it out, or have a node name it")
        for station in self.stations:
            profiles.get(station.profile)  # complains of a name that there is not

    def _check_names(self) -> None:
        stations = [station.name for station in self.stations]
        for kind, parts in (
            ("station", stations),
            ("workflow", [workflow.name for workflow in self.workflows]),
            ("pool or station", [pool.name for pool in self.pools] + stations),
        ):
            for name in parts:
                if parts.count(name) > 1:
                    raise self._error(f"two of a kind ({kind}) are called {name!r}; rename one")
        seen: set[str] = set()
        for pool in self.pools:
            for name in pool.stations:
                if name not in stations:
                    raise unknown(f"station of pool {pool.name}", name, stations)
                if name in seen:
                    raise self._error(f"station {name} is in two pools, or twice in one; it can be in one")
                seen.add(name)

    def _error(self, problem: str) -> InputError:
        return InputError(f"network {self.name}: {problem}")

    @cached_property
    def all_pools(self) -> tuple[Pool, ...]:
        """The pools, those of a single station included that nobody named."""
        pooled = {name for pool in self.pools for name in pool.stations}
        single = [Pool(s.name, (s.name,)) for s in self.stations if s.name not in pooled]
        return (*self.pools, *single)

    @cached_property
    def classes(self) -> tuple[tuple[Workflow, Node], ...]:
        """All nodes of all workflows; their place here is the number of the class."""
        return tuple((workflow, node) for workflow in self.workflows for node in workflow.nodes)

    def class_names(self) -> list[str]:
        """Names of the classes: those of their nodes, with the workflow's where there are several."""
        if len(self.workflows) == 1:
            return [node.name for _, node in self.classes]
        return [f"{workflow.name}/{node.name}" for workflow, node in self.classes]

    def draw(self, num_jobs: int | None = None, *, horizon_s: float = float("inf"), seed: int = 0) -> Jobs:
        """Jobs of its workflows: so many, or those that arrive up to the horizon; the same for a seed.

        Raises:
            InputError: if neither says how many, none arrives, or more than 100 million in the mean.
        """
        _whole("seed", seed, least=0)
        if num_jobs is not None:
            _whole("num_jobs", num_jobs, least=1)
        if not (isinstance(horizon_s, Real) and horizon_s > 0):
            raise InputError(f"horizon_s must be positive seconds, not {horizon_s!r}")
        rate = sum(workflow.rate for workflow in self.workflows)
        mean = horizon_s * rate if num_jobs is None else num_jobs
        if _MOST_JOBS < mean < float("inf"):
            raise self._error(
                f"{mean:.3g} jobs are more than fit in memory; draw up to {_MOST_JOBS:,} "
                f"({_MOST_JOBS / rate:.3g} s)"
            )
        return draw(self.workflows, num_jobs=num_jobs, horizon_s=horizon_s, seed=seed)

    def scaled(self, factor: float) -> Network:
        """The network with all rates multiplied."""
        scaled = [dataclasses.replace(w, rate=w.rate * factor) for w in self.workflows]
        return dataclasses.replace(self, workflows=scaled)

    def at_load(self, load: float) -> Network:
        """The network with all rates scaled alike, so that the pool with the highest nominal load has `load`
        (`networks.loads`)."""
        from llmsched_env.networks.load import loads

        if not (isinstance(load, int | float) and 0 < load < float("inf")):
            raise InputError(f"load must be a positive number, not {load!r}")
        return self.scaled(load / max(one.load for one in loads(self)))

    def routed(self, routing: str) -> Network:
        """The network with this routing in all its pools."""
        return dataclasses.replace(self, pools=[dataclasses.replace(p, routing=routing) for p in self.pools])

    def scheduled(self, scheduler: Scheduler | None, station: str | None = None) -> Network:
        """The network with this scheduler at one station, or at all of them."""
        names = [one.name for one in self.stations]
        if station is not None and station not in names:
            raise unknown(f"station of network {self.name}", station, names)
        changed = [
            dataclasses.replace(one, scheduler=scheduler) if station in (None, one.name) else one
            for one in self.stations
        ]
        return dataclasses.replace(self, stations=changed)

    @staticmethod
    def from_json(path: str | Path, schedulers: Any = None) -> Network:
        """The network in a JSON file; see `networks.form` for its keys.

        Args:
            schedulers: a function that gives a scheduler by name, such as `baselines.get`; needed where a
                station names one.

        Raises:
            InputError: names the file, and the key that is unknown, missing or of the wrong kind.
        """
        from llmsched_env.networks import form

        return form.read(Path(path), schedulers)

    def to_json(self) -> str:
        """The text from which `from_json` makes an equal network.

        Raises:
            InputError: if it has a scheduler with settings of its own, or parts that have no name.
        """
        from llmsched_env.networks import form

        return form.write(self)


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise InputError(f"{name} must be a whole number from {least}, not {value!r}")
