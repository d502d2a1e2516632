"""The state of one or many networks of engines, as packed arrays that compiled code advances in place.

A *job* (a program: one run of an agent's workflow) is a set of *hops*, calls of an LLM, each of which may
wait for others of the job. A hop is a request of `core.state`; it is served by one *station*, an engine with
its own cost model, settings and scheduler. Stations that may serve the same hops form a *pool*, in which a
hop is routed when it is released. Hops of a kind, such as the planner's of a workflow, are a *class* (a node
of the workflow).

All stations of a network share one array of request records, since a hop is in one queue or batch at most.
Networks lie one behind the other in shared arrays (`Networks`), so that a batch of them is advanced by one
compiled call; `network_at` gives the view of one (`Net`) that every compiled function works on.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.span import part, span
from llmsched_env.core.state import Engine


class Standing(enum.IntEnum):
    """What a station is doing."""

    IDLE = 0  # nothing is planned: it waits for a hop
    DUE = 1  # at a boundary between iterations: its next one is to be planned at this moment
    PLANNED = 2  # at a boundary, its plan begun and to be completed from outside
    BUSY = 3  # an iteration runs


class Phase(enum.IntEnum):
    """How far a network is in what happens at one moment."""

    WAIT = 0  # all has happened: time may pass
    ROUTE = 1  # iterations have ended and hops are released: they are routed, one by one
    PLAN = 2  # stations that are due plan their iterations, one by one


class Routing(enum.IntEnum):
    """How a pool chooses the station of a hop. Ties go to the station that the pool has first."""

    JSQ = 0  # join the shortest queue: fewest remaining tokens
    ROUND_ROBIN = 1
    RANDOM = 2
    POWER_OF_TWO = 3  # of two different ones drawn at random, that with fewer remaining tokens
    BY_CLASS = 4  # the number of its class modulo the number of stations
    BY_PROGRAM = 5  # the number of its job modulo the number of stations: a job's hops stay together
    LEAST_TIME = 6  # fewest remaining tokens in seconds of the station at its largest rate
    OUTSIDE = 7  # `loop.advance` stops and asks


class Rule(enum.IntEnum):
    """What gives a hop its key at a station; the group of the lowest key is served first
    (`scheduling.levels`)."""

    FCFS = 0  # all alike: in order of arrival at the station
    CLASS = 1  # a number of its class (`node.key`)
    DEPTH = 2  # hops before it on its longest path through the job
    OLDEST = 3  # the number of its job, in order of arrival
    PLAS = 4  # tokens that its job has been served, in levels (program-level attained service)
    ATLAS = 5  # tokens served on the longest path that led to it, in levels
    MAX_WEIGHT = 6  # by class, the class with most weight * remaining tokens first
    PRESSURE = 7  # by class, that with the highest pressure first (back-pressure)


class Failure(enum.IntEnum):
    """Why a network cannot go on, besides the errors of its engines."""

    NONE = 0
    ENGINE = 1  # a rule of an engine was broken: see its record
    STUCK = 2  # nothing runs, nothing more comes, and jobs are unfinished
    STATION = 3  # a hop was sent to a station that is not in its pool
    LIVELOCK = 4


NET = np.dtype(
    [
        ("clock", "f8"),
        ("phase", "i8"),
        ("at", "i8"),  # how far the phase is: of the hops to be routed, or of the stations
        ("next_job", "i8"),  # jobs [0, next_job) have arrived
        ("num_ready", "i8"),  # hops released at this moment
        ("num_timed", "i8"),  # hops that are released later
        ("timed", "i8"),  # how many there were so far
        ("sent", "i8"),  # hops that have come to a station
        ("jobs_in", "i8"),  # jobs that have arrived and are not done
        ("jobs_done", "i8"),
        ("hops_done", "i8"),
        ("area", "f8"),  # integral of jobs in system over time
        ("latency", "f8"),  # sum over jobs done, seconds
        ("events", "i8"),  # moments at which something happened
        ("random", "u8"),  # state of the generator of routing
        # settings
        ("rule", "i8"),
        ("quantum", "i8"),  # tokens of the first level of PLAS and ATLAS
        ("sample_s", "f8"),  # seconds between samples, the first being at 0
        # samples taken
        ("samples", "i8"),
        ("error", "i8"),
        ("error_at", "i8"),  # the station, or the hop
    ],
    align=True,
)

STATION = np.dtype(
    [
        ("standing", "i8"),
        ("until", "f8"),  # end of the iteration that runs; inf: none
        ("pool", "i8"),
        ("outside", "i8"),  # whether its plans are made from outside
        ("tokens_in", "i8"),  # of all hops that ever came
        ("hops_in", "i8"),
        ("s_per_token", "f8"),  # at its largest rate
        ("iterations", "i8"),  # of its record, when a token last came out
        # where its parts of shared arrays begin, and how long they are
        ("work", "i8"),
        ("work_size", "i8"),
        ("cost", "i8"),
        ("cost_size", "i8"),
    ],
    align=True,
)

POOL = np.dtype(
    [
        ("routing", "i8"),
        ("first", "i8"),  # its stations are members[first : first + size]
        ("size", "i8"),
        ("turn", "i8"),  # of round robin
    ],
    align=True,
)

NODE = np.dtype(
    [
        ("pool", "i8"),
        ("key", "f8"),
        ("weight", "f8"),
        ("mean_tokens", "f8"),  # of a hop
        ("present", "i8"),  # hops at stations, waiting or running
        ("tokens", "i8"),  # that these have left
    ],
    align=True,
)

CELL = np.dtype(  # a class at a station
    [("present", "i8"), ("tokens", "i8"), ("pressure", "f8"), ("served", "i8")], align=True
)

HOP = np.dtype(
    [
        ("job", "i4"),
        ("node", "i4"),
        ("waits", "i4"),  # hops before it that are not done
        ("station", "i4"),  # -1: has come to none
        ("depth", "i4"),  # hops on the longest path before it
        ("first", "i4"),  # its successors are successors[first : last]
        ("last", "i4"),
        ("delay", "f8"),  # seconds until its release, once the last of those before it has ended
        ("attained", "i8"),  # tokens served on the longest path before it
        ("base", "i8"),  # tokens attained when it came, as PLAS or ATLAS count
        ("recomputed", "i8"),  # of these its class knows
    ],
    align=True,
)

JOB = np.dtype(
    [
        ("arrival", "f8"),
        ("finish", "f8"),  # nan: not done
        ("workflow", "i4"),
        ("left", "i4"),  # hops that are not done
        ("attained", "i8"),  # tokens that its hops done were served
    ],
    align=True,
)

TIMED = np.dtype([("when", "f8"), ("order", "i8"), ("hop", "i8")], align=True)


class Net(NamedTuple):
    """One network, as compiled code sees it: a record and spans (`core.span`).

    Attributes:
        g: the network's own record (NET).
        engines: (S,) engine records (`scheduling.ENGINE`), one for each station.
        req: (N,) request records (`core.state.REQUEST`), one for each hop. `arrival` is when it came to its
            station, `rank` its place in the order in which hops came to stations, `class_id` its class.
        lists: int32, the lists of the engines, 6 N for each station.
        work, cost: float64, the workspaces and cost models of the stations.
        station: (S,) STATION.
        pool: (P,) POOL; members: (S,) int32, the stations of all pools, one pool behind the other.
        node: (K,) NODE, one for each class.
        cell: (S * K,) CELL: class c at station k is k * K + c.
        flow: (K * K,) float64: hops of class j for each hop of class i before them, at i * K + j.
        hop: (N,) HOP. Those of a job lie together, in an order in which none comes before one it waits for.
        successors: int32, hops.
        job: (J,) JOB, in order of arrival; first_hop: (J + 1,) int64, where its hops begin.
        timed: (N,) TIMED: the first `g.num_timed` are a binary heap of hops that are released later.
        ready: (N,) int32: the first `g.num_ready` hops were released at this moment, in order.
        samples: int64, a row (remaining tokens of each station, jobs in system) for each sample.
    """

    g: Any
    engines: Any
    req: Any
    lists: Any
    work: Any
    cost: Any
    station: Any
    pool: Any
    members: Any
    node: Any
    cell: Any
    flow: Any
    hop: Any
    successors: Any
    job: Any
    first_hop: Any
    timed: Any
    ready: Any
    samples: Any


class Networks(NamedTuple):
    """Networks one behind the other: the arrays of `Net`, of all of them. Network i owns
    `x[first[i, c] : first[i + 1, c]]` of the array x whose column c is that of `COLUMNS`.
    """

    g: Any
    engines: Any
    req: Any
    lists: Any
    work: Any
    cost: Any
    station: Any
    pool: Any
    members: Any
    node: Any
    cell: Any
    flow: Any
    hop: Any
    successors: Any
    job: Any
    first_hop: Any
    timed: Any
    ready: Any
    samples: Any
    first: Any  # (L + 1, 19) int64


COLUMNS = Net._fields


@njit(inline="always")  # numba cannot return a record from a function
def network_at(networks: Networks, i: int) -> Net:
    """The view of network i."""
    a, b = networks.first[i], networks.first[i + 1]
    return Net(
        networks.g[i],
        span(networks.engines[a[1] : b[1]]),
        span(networks.req[a[2] : b[2]]),
        span(networks.lists[a[3] : b[3]]),
        span(networks.work[a[4] : b[4]]),
        span(networks.cost[a[5] : b[5]]),
        span(networks.station[a[6] : b[6]]),
        span(networks.pool[a[7] : b[7]]),
        span(networks.members[a[8] : b[8]]),
        span(networks.node[a[9] : b[9]]),
        span(networks.cell[a[10] : b[10]]),
        span(networks.flow[a[11] : b[11]]),
        span(networks.hop[a[12] : b[12]]),
        span(networks.successors[a[13] : b[13]]),
        span(networks.job[a[14] : b[14]]),
        span(networks.first_hop[a[15] : b[15]]),
        span(networks.timed[a[16] : b[16]]),
        span(networks.ready[a[17] : b[17]]),
        span(networks.samples[a[18] : b[18]]),
    )


@njit(inline="always")
def engine_of(net: Net, k: int) -> Engine:
    """The engine of station k, as the functions of `core.engine` and the schedulers take it."""
    n = len(net.req)
    at = 6 * n * k
    place = net.station[k]
    return Engine(
        net.engines[k],
        net.req,
        part(net.lists, at, n),
        part(net.lists, at + n, n),
        part(net.lists, at + 2 * n, n),
        part(net.lists, at + 3 * n, n),
        part(net.lists, at + 4 * n, n),
        part(net.lists, at + 5 * n, n),
        part(net.work, place.work, place.work_size),
        part(net.cost, place.cost, place.cost_size),
        part(net.first_hop, 0, 0),
        part(net.first_hop, 0, 0),
    )
