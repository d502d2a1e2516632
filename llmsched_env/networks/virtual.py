"""Virtual stations of a network: classes that a discipline lets exclude each other, and their load."""

from __future__ import annotations

import dataclasses

from llmsched_env.networks import disciplines
from llmsched_env.networks.core.state import Rule
from llmsched_env.networks.disciplines import Discipline
from llmsched_env.networks.load import loads, node_moments
from llmsched_env.networks.network import Network
from llmsched_env.networks.workflow import END, Workflow
from llmsched_env.theory.networks import exclusive_sets, virtual_station_load
from llmsched_env.workloads.lengths import Fixed


@dataclasses.dataclass(frozen=True)
class VirtualStation:
    """Classes at different stations of which any two come to exclude each other.

    Attributes:
        classes: their names, as in `Network.class_names`.
        load: what is asked of all together. Above 1 the network is unstable under the discipline, even where
            each station has a nominal load below 1 (`theory.networks.virtual_station_load`). Below 1 proves
            nothing.
    """

    classes: tuple[str, ...]
    load: float


def virtual_stations(network: Network, discipline: str | Discipline) -> tuple[VirtualStation, ...]:
    """The virtual stations of a network under a discipline, the largest load first.

    Found are those of `theory.networks.exclusive_sets`, for disciplines that give each class a fixed priority
    ("priority", "exit-first", "entry-first"), on workflows that are chains of single calls, where every pool
    is one station without a scheduler of its own. There may be others: an empty result proves nothing.

    Raises:
        InputError: an unknown discipline.
    """
    chosen = disciplines.get(discipline)
    routes = [_chain(workflow) for workflow in network.workflows]
    single = all(len(pool.stations) == 1 for pool in network.all_pools)
    own = any(station.scheduler is not None for station in network.stations)
    if chosen.rule not in (Rule.CLASS, Rule.DEPTH) or not single or own or not all(routes):
        return ()
    pools = loads(network)
    of_pool = {pool.pool: i for i, pool in enumerate(pools)}
    numbers, priorities, rates, tokens = [], [], [], []
    first = 0
    for workflow, route in zip(network.workflows, routes, strict=True):
        moments, left = node_moments(workflow), workflow.hops_left()
        place = {name: i for i, name in enumerate(route)}
        at = {node.name: first + i for i, node in enumerate(workflow.nodes)}
        numbers.append([at[name] for name in route])
        first += len(workflow.nodes)
        for node in workflow.nodes:
            rates.append(workflow.rate * workflow.visits()[node.name])
            tokens.append(moments[node.name].prompt + moments[node.name].output - 1)
            if chosen.rule == Rule.DEPTH:
                priorities.append(float(place[node.name]))
            else:
                priorities.append(left[node.name] if chosen.keys == "left" else float(node.priority))
    stations = [of_pool[node.pool] for _, node in network.classes]
    capacities = [pool.capacity_tokens_per_s for pool in pools]
    names = network.class_names()
    found = [
        VirtualStation(
            tuple(names[k] for k in members),
            virtual_station_load(rates, tokens, stations, capacities, members),
        )
        for members in exclusive_sets(numbers, stations, priorities)
    ]
    return tuple(sorted(found, key=lambda one: -one.load))


def _chain(workflow: Workflow) -> list[str]:
    """The nodes in the order in which every job calls each once; empty if jobs fork, choose or go back."""
    if len(workflow.starts) != 1 or any(node.copies != Fixed(1) for node in workflow.nodes):
        return []
    route = [workflow.starts[0]]
    while edges := workflow.edges_from(route[-1]):
        target = workflow.edges[edges[0]].target
        if len(edges) > 1 or target in route:
            return []
        if target == END:
            break
        route.append(target)
    return route
