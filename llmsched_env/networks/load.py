"""The nominal load of each pool of a network: what comes to it as a share of what it can serve."""

from __future__ import annotations

import dataclasses

import numpy as np

from llmsched_env import profiles
from llmsched_env.core.config import EngineConfig
from llmsched_env.errors import InputError
from llmsched_env.networks.draw import draw
from llmsched_env.networks.network import TOKEN_LEVEL, Network, Station
from llmsched_env.networks.workflow import Workflow
from llmsched_env.simulation import resolve
from llmsched_env.theory.limits import limit
from llmsched_env.workloads.lengths import Moments

_SAMPLE = 2**16  # pairs of lengths behind the moments of a class
_JOBS = 4000  # drawn for those of a workflow whose edges carry context


@dataclasses.dataclass(frozen=True)
class PoolLoad:
    """What is asked of a pool.

    Attributes:
        pool: its name.
        hops_per_s: calls that come to it.
        tokens_per_s: that these bring: prompts, and answers but for their first tokens.
        capacity_tokens_per_s: that its stations serve at most, of calls like these (`theory.limits.limit`).
        s_per_token: (stations,) of each station at its largest rate.
    """

    pool: str
    hops_per_s: float
    tokens_per_s: float
    capacity_tokens_per_s: float
    s_per_token: tuple[float, ...]

    @property
    def load(self) -> float:
        """The nominal load. Above 1 the network is unstable, whatever the scheduler and the routing; below 1
        for each pool is not enough where routes have cycles.

        The former assumes that time depends on the tokens of a batch alone, or that it is convex
        (`theory.limits.limit`) and the stations of the pool are alike: of unlike ones, each might get the
        calls that it is best at. Else it is an estimate.
        """
        return self.tokens_per_s / self.capacity_tokens_per_s


def loads(network: Network) -> tuple[PoolLoad, ...]:
    """The nominal load of each pool, in their order.

    Expected visits are exact (`Workflow.visits`), and so are loads of profiles whose time depends on tokens
    alone, within 1e-4. Moments of lengths are taken from a sample where edges carry context.
    """
    moments: dict[str, list[tuple[float, Moments]]] = {pool.name: [] for pool in network.all_pools}
    for workflow in network.workflows:
        of_node = node_moments(workflow)
        for node in workflow.nodes:
            moments[node.pool].append((workflow.rate * workflow.visits()[node.name], of_node[node.name]))
    stations = {station.name: station for station in network.stations}
    found = []
    for pool in network.all_pools:
        rate = sum(weight for weight, _ in moments[pool.name])
        mean = _mixed(moments[pool.name])
        tokens = mean.prompt + mean.output - 1
        capacities = [
            tokens * limit(mean, profiles.get(stations[k].profile), resolved(stations[k])).rps
            for k in pool.stations
        ]
        found.append(
            PoolLoad(
                pool.name,
                rate,
                rate * tokens,
                sum(capacities),
                tuple(1 / capacity for capacity in capacities),
            )
        )
    return tuple(found)


def resolved(station: Station, longest: int = 2**31 - 1) -> EngineConfig:
    """The settings that hold at a station whose longest request has so many tokens.

    Raises:
        InputError: names the station.
    """
    try:
        return resolve(
            station.engine, station.scheduler or TOKEN_LEVEL, profiles.get(station.profile), longest
        )
    except InputError as error:
        raise InputError(f"station {station.name}: {error}") from None


def node_moments(workflow: Workflow) -> dict[str, Moments]:
    """The moments of the lengths of each node's calls."""
    if any(edge.context != "none" for edge in workflow.edges):
        jobs = draw([workflow], num_jobs=_JOBS, horizon_s=np.inf, seed=0)
        return {
            node.name: Moments.of(jobs.prompt_tokens[jobs.node == i], jobs.output_tokens[jobs.node == i])
            if (jobs.node == i).any()
            else _moments_of(workflow, node.name)
            for i, node in enumerate(workflow.nodes)
        }
    return {node.name: _moments_of(workflow, node.name) for node in workflow.nodes}


def _moments_of(workflow: Workflow, name: str) -> Moments:
    # Roberts' generalised golden ratio in two dimensions: g^3 = g + 1.
    g = 1.324717957244746
    u = (0.5 + np.outer(np.arange(1, _SAMPLE + 1), [1 / g, 1 / g**2])) % 1.0
    return Moments.of(*workflow.node[name].lengths.tokens(u))


def _mixed(parts: list[tuple[float, Moments]]) -> Moments:
    """The moments of a mixture."""
    total = sum(weight for weight, _ in parts)
    columns = np.array([[weight / total, *dataclasses.astuple(m)] for weight, m in parts])
    return Moments(*(columns[:, 0] @ columns[:, 1:]).tolist())
