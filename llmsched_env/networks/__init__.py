"""Networks of engines that serve programs of agents: several stations, routing, workflows, disciplines.

>>> result = simulate_network(get("rybko-stolyar", load=0.5), "fcfs", horizon_s=200.0)
>>> result.stations, result.metrics()["hops"] > 0
(('S1', 'S2'), True)

A `Network` has stations (engines with their own cost profile, settings and scheduler), pools of stations with
a routing rule, and workflows: graphs of LLM calls with forks, joins, choices and loops, which are run once
for each job that arrives. `disciplines` say in which order calls are served. `networks.core` is the compiled
part: `core.state` has the arrays, `core.loop` what happens when, `core.assemble` makes the arrays.
"""

from __future__ import annotations

from llmsched_env.networks import delays, disciplines
from llmsched_env.networks.jobs import Jobs
from llmsched_env.networks.load import PoolLoad, loads
from llmsched_env.networks.network import ROUTINGS, TOKEN_LEVEL, Network, Pool, Station
from llmsched_env.networks.ready import get, names, register
from llmsched_env.networks.simulation import NetworkResult, Prepared, prepare, simulate_network
from llmsched_env.networks.virtual import VirtualStation, virtual_stations
from llmsched_env.networks.workflow import END, Edge, Node, Workflow

__all__ = [
    "END",
    "ROUTINGS",
    "TOKEN_LEVEL",
    "Edge",
    "Jobs",
    "Network",
    "NetworkResult",
    "Node",
    "Pool",
    "PoolLoad",
    "Prepared",
    "Station",
    "VirtualStation",
    "Workflow",
    "delays",
    "disciplines",
    "get",
    "loads",
    "names",
    "prepare",
    "register",
    "simulate_network",
    "virtual_stations",
]
