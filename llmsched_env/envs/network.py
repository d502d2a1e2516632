"""The dynamics of `llmsched/AgentNetwork-v0`: at a station that forms a batch, which class is served next; or
to which station a call goes.

Actions, for K classes and pools of up to M stations:

    0 .. K-1     SERVE class c: its hops at the station get tokens in the plan as far as budget, places and KV
                 cache go: decodes, then unfinished prompts, then those that wait, each in order of arrival.
    K            RUN the plan.
    K+1 .. K+M   ROUTE the hop that was released to the station that its pool has there.

An action that is not legal counts as the first that is. Where forced steps are skipped, nothing is asked
where one action only is legal: a class that is alone, a plan that is full.

Between two decisions the network goes on by itself. What is rewarded is summed up from moment to moment,
since nothing changes in between.
"""

from __future__ import annotations

import enum
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.span import span, span_at
from llmsched_env.core.state import REQUEST, padded
from llmsched_env.envs.crew import BLOCK, claim, finish
from llmsched_env.networks.core import loop, state
from llmsched_env.networks.core.loop import (
    advance_levels,
    deciding_station,
    finish_plan,
    hop_to_route,
    send,
    serve_class,
    tokens_left,
)
from llmsched_env.networks.core.route import remaining_tokens
from llmsched_env.networks.core.state import Net, engine_of
from llmsched_env.scheduling import ENGINE
from llmsched_env.scheduling.levels import first_at

MOST_CLASSES = 62  # they are bits of a number

NUM_GLOBAL, NUM_STATION, NUM_CLASS = 6, 5, 4  # features of the network, of a station, of a class at a station


class Objective(enum.IntEnum):
    """What is rewarded."""

    JOBS = 0  # minus jobs in the system, over time
    LATENCY = 1  # minus the latency of a job, when it is done
    BACKLOG = 2  # minus the tokens that are left to compute, over time


class Ask(enum.IntEnum):
    """What the next action is about."""

    PLAN = 0
    ROUTE = 1
    OVER = 2  # the episode has ended


_JOBS, _LATENCY, _BACKLOG = (int(x) for x in Objective)
_PLAN, _ROUTE, OVER = (int(x) for x in Ask)
_ASK_PLAN, _ASK_ROUTE = int(loop.Outcome.PLAN), int(loop.Outcome.ROUTE)
_MORE, _HORIZON, _ERROR = int(loop.Outcome.MORE), int(loop.Outcome.HORIZON), int(loop.Outcome.ERROR)
_BUSY = int(state.Standing.BUSY)

# What the environment keeps beside its network.
LANE = padded(
    np.dtype(
        [
            # -- options --
            ("objective", "i8"),
            ("work_conserving", "i8"),
            ("skip_forced", "i8"),
            ("telling", "i8"),  # whether the tokens that are left are seen, or what they are in the mean
            ("discount_rate", "f8"),
            ("horizon", "f8"),
            ("max_steps", "i8"),
            ("time_scale", "f8"),
            ("unit", "f8"),  # job-seconds, or token-seconds, that make one unit of reward
            # -- the decision --
            ("ask", "i8"),
            ("station", "i8"),
            ("hop", "i8"),
            ("served", "i8"),  # classes served in this plan, a bit each
            # -- the step --
            ("reward", "f8"),
            ("dt", "f8"),
            ("factor", "f8"),  # of the continuous discount at this point of the step
            ("terminated", "i8"),
            ("truncated", "i8"),
            # -- the episode --
            ("begun", "i8"),  # episodes begun so far
            ("clock", "f8"),
            ("job_seconds", "f8"),  # integral of the jobs in the system
            ("steps", "i8"),
            ("illegal", "i8"),
            ("total", "f8"),
            ("token_seconds", "f8"),
        ],
        align=True,
    )
)

_RECORDS: tuple[tuple[str, Any], ...] = (
    ("g", state.NET),
    ("engines", ENGINE),
    ("req", REQUEST),
    ("lists", np.int32),
    ("work", np.float64),
    ("cost", np.float64),
    ("station", state.STATION),
    ("pool", state.POOL),
    ("members", np.int32),
    ("node", state.NODE),
    ("cell", state.CELL),
    ("flow", np.float64),
    ("hop", state.HOP),
    ("successors", np.int32),
    ("job", state.JOB),
    ("first_hop", np.int64),
    ("timed", state.TIMED),
    ("ready", np.int32),
    ("samples", np.int64),
)
assert tuple(name for name, _ in _RECORDS) == Net._fields
_OWN = 2 * len(_RECORDS)  # where the environment's own addresses begin
COLUMNS = _OWN + 5  # lane, observation, its size, mask, its size

(
    _g_span,
    _engines_span,
    _req_span,
    _i4_span,
    _f8_span,
    _station_span,
    _pool_span,
    _node_span,
    _cell_span,
    _hop_span,
    _job_span,
    _i8_span,
    _timed_span,
) = (
    span_at(dtype)
    for dtype in (
        state.NET,
        ENGINE,
        REQUEST,
        np.int32,
        np.float64,
        state.STATION,
        state.POOL,
        state.NODE,
        state.CELL,
        state.HOP,
        state.JOB,
        np.int64,
        state.TIMED,
    )
)
_lane_span, _f4_span, _i1_span = span_at(LANE), span_at(np.float32), span_at(np.int8)


class NetEnv(NamedTuple):
    """One environment, as compiled code sees it.

    Attributes:
        net: its network.
        v: its LANE record.
        observation: (D,) float32. mask: (A,) int8.
    """

    net: Net
    v: Any
    observation: Any
    mask: Any


@njit(inline="always")
def env_at(table, lane: int) -> NetEnv:  # type: ignore[no-untyped-def]
    """The environment of one row of the table of addresses, a span of int64."""
    t = lane * COLUMNS
    own = t + _OWN
    return NetEnv(
        Net(
            _g_span(table[t], 1)[0],
            _engines_span(table[t + 2], table[t + 3]),
            _req_span(table[t + 4], table[t + 5]),
            _i4_span(table[t + 6], table[t + 7]),
            _f8_span(table[t + 8], table[t + 9]),
            _f8_span(table[t + 10], table[t + 11]),
            _station_span(table[t + 12], table[t + 13]),
            _pool_span(table[t + 14], table[t + 15]),
            _i4_span(table[t + 16], table[t + 17]),
            _node_span(table[t + 18], table[t + 19]),
            _cell_span(table[t + 20], table[t + 21]),
            _f8_span(table[t + 22], table[t + 23]),
            _hop_span(table[t + 24], table[t + 25]),
            _i4_span(table[t + 26], table[t + 27]),
            _job_span(table[t + 28], table[t + 29]),
            _i8_span(table[t + 30], table[t + 31]),
            _timed_span(table[t + 32], table[t + 33]),
            _i4_span(table[t + 34], table[t + 35]),
            _i8_span(table[t + 36], table[t + 37]),
        ),
        _lane_span(table[own], 1)[0],
        _f4_span(table[own + 1], table[own + 2]),
        _i1_span(table[own + 3], table[own + 4]),
    )


def put_network(row: NDArray[np.int64], networks: state.Networks) -> None:
    """Write the addresses of a single network's arrays into its row of the table; they have to outlive it."""
    for i, (name, dtype) in enumerate(_RECORDS):
        array = getattr(networks, name)
        assert array.dtype == np.dtype(dtype) and array.flags.c_contiguous, name
        row[2 * i], row[2 * i + 1] = array.ctypes.data, len(array)


def put_own(
    table: NDArray[np.int64], lane: NDArray[Any], observation: NDArray[np.float32], mask: NDArray[np.int8]
) -> None:
    """Write the addresses of what the environments keep themselves, a row each."""
    rows = np.arange(len(table))
    for at, array in ((0, lane), (1, observation), (3, mask)):
        table[:, _OWN + at] = array.ctypes.data + array.strides[0] * rows
    table[:, _OWN + 2], table[:, _OWN + 4] = observation.shape[1], mask.shape[1]


def observation_size(stations: int, classes: int) -> int:
    """Length of the observation."""
    return NUM_GLOBAL + classes + stations * (NUM_STATION + classes * NUM_CLASS)


# ---------------------------------------------------------------------- what is seen

_LOG = 1.0 / math.log(1e6)


@njit(forceinline=True)
def _many(x: float) -> np.float32:
    """A number from 0 to a million and above, as 0 to 1."""
    return np.float32(min(1.0, np.log(1.0 + max(0.0, x)) * _LOG))


@njit(forceinline=True)
def _long(seconds: float, scale: float) -> np.float32:
    """A time as 0 to 1: one half is `scale`."""
    x = max(0.0, seconds)
    return np.float32(x / (x + scale))


@njit
def observe(env: NetEnv) -> None:
    """Write the observation: the network, the class of the hop that is routed, each station, and each class
    at each of them."""
    net, v, seen = env.net, env.v, env.observation
    g, scale = net.g, v.time_scale
    stations, classes = len(net.station), len(net.node)
    seen[0] = 1.0 if v.ask == _PLAN else 0.0
    seen[1] = 1.0 if v.ask == _ROUTE else 0.0
    seen[2] = _many(np.float64(g.jobs_in))
    seen[3] = np.float32(min(1.0, g.clock / v.horizon)) if v.horizon < np.inf else np.float32(0.0)
    seen[4] = seen[5] = 0.0
    if v.ask == _PLAN:
        seen[4] = np.float32(max(0, tokens_left(net, v.station)) / net.engines[v.station].token_budget)
    elif v.ask == _ROUTE:
        seen[5] = _many(np.float64(net.req[v.hop].prompt))
    for c in range(classes):
        seen[NUM_GLOBAL + c] = 1.0 if v.ask == _ROUTE and net.hop[v.hop].node == c else 0.0
    at = NUM_GLOBAL + classes
    for k in range(stations):
        place, s = net.station[k], net.engines[k]
        deciding = v.ask == _PLAN and k == v.station
        seen[at] = 1.0 if deciding else 0.0
        seen[at + 1] = 1.0 if place.standing == _BUSY else 0.0
        seen[at + 2] = _long(place.until - g.clock, scale) if place.standing == _BUSY else np.float32(0.0)
        seen[at + 3] = np.float32(1.0 - s.free / s.kv_blocks)
        seen[at + 4] = _many(np.float64(_tokens(env, k, -1)))
        at += NUM_STATION
    for k in range(stations):
        deciding = v.ask == _PLAN and k == v.station
        for c in range(classes):
            cell = net.cell[k * classes + c]
            seen[at] = _many(np.float64(cell.present))
            seen[at + 1] = _many(_tokens(env, k, c))
            seen[at + 2] = _long(g.clock - _oldest(net, k, c), scale) if cell.present > 0 else np.float32(0.0)
            seen[at + 3] = 1.0 if deciding and (v.served >> c) & 1 == 1 else 0.0
            at += NUM_CLASS


@njit
def _tokens(env: NetEnv, k: int, c: int) -> float:
    """Tokens that class c (-1: all) has left at station k, or what so many hops have in the mean."""
    net = env.net
    classes = len(net.node)
    if c >= 0:
        cell = net.cell[k * classes + c]
        return np.float64(cell.tokens) if env.v.telling else cell.present * net.node[c].mean_tokens
    if env.v.telling:
        return np.float64(remaining_tokens(net, k))
    total = 0.0
    for i in range(classes):
        total += net.cell[k * classes + i].present * net.node[i].mean_tokens
    return total


@njit
def _oldest(net: Net, k: int, c: int) -> float:
    """When the first of the hops of class c that are at station k came there, of those that run and those
    that wait."""
    e = engine_of(net, k)
    key = np.float64(c)
    came = np.inf
    i = first_at(e, key)
    if i < e.s.ordered and e.req[e.running[i]].key == key:
        came = e.req[e.running[i]].arrival
    r = queue.first_from(e, key)
    if r >= 0 and e.req[r].key == key:
        came = min(came, e.req[r].arrival)
    return came if came < np.inf else net.g.clock


@njit
def legal(env: NetEnv) -> int:
    """Write the mask; returns how many actions are legal."""
    net, v, mask = env.net, env.v, env.mask
    classes = len(net.node)
    for i in range(len(mask)):
        mask[i] = 0
    count = 0
    if v.ask == _ROUTE:
        pool = net.pool[net.node[net.hop[v.hop].node].pool]
        for j in range(pool.size):
            mask[classes + 1 + j] = 1
        return int(pool.size)
    k = v.station
    room = tokens_left(net, k) > 0
    for c in range(classes):
        if room and net.cell[k * classes + c].present > 0 and (v.served >> c) & 1 == 0:
            mask[c] = 1
            count += 1
    if count == 0 or (net.engines[k].num_planned > 0 and v.work_conserving == 0):
        mask[classes] = 1
        count += 1
    return count


# ---------------------------------------------------------------------- time passes


@njit(forceinline=True)
def _spend(env: NetEnv, seconds: float, jobs: float, tokens: float) -> None:
    """`seconds` pass in which so many jobs are in the system and so many tokens are left."""
    v = env.v
    v.dt += seconds
    v.token_seconds += tokens * seconds
    beta = v.discount_rate
    worth = seconds
    if beta > 0.0:
        worth = v.factor * -np.expm1(-beta * seconds) / beta
        v.factor *= np.exp(-beta * seconds)
    if v.objective == _JOBS:
        v.reward -= jobs * worth / v.unit
    elif v.objective == _BACKLOG:
        v.reward -= tokens * worth / v.unit


@njit
def _go_on(env: NetEnv) -> None:
    """Let the network run until something is asked or the episode ends."""
    net, v = env.net, env.v
    g = net.g
    outcome = _MORE
    while outcome == _MORE:
        clock, jobs, latency, tokens = g.clock, np.float64(g.jobs_in), g.latency, 0.0
        for k in range(len(net.station)):
            tokens += np.float64(remaining_tokens(net, k))
        outcome = advance_levels(net, v.horizon, 1)
        _spend(env, g.clock - clock, jobs, tokens)
        if v.objective == _LATENCY:
            v.reward -= v.factor * (g.latency - latency) / v.unit
    v.served = 0
    if outcome == _ASK_PLAN:
        v.ask = _PLAN
        v.station = deciding_station(net)
    elif outcome == _ASK_ROUTE:
        v.ask = _ROUTE
        v.hop = hop_to_route(net)
    else:
        v.ask = OVER
        v.truncated = 1 if outcome != loop.DONE or v.horizon < np.inf else 0
        v.terminated = 1 - v.truncated
        if v.truncated == 1:
            _cut(env)


@njit
def _cut(env: NetEnv) -> None:
    """The episode is cut: jobs that are not done have been there, too."""
    g, v = env.net.g, env.v
    if v.objective == _LATENCY:
        v.reward -= v.factor * (g.area - g.latency) / v.unit


@njit
def _act(env: NetEnv, action: int) -> None:
    """Take a legal action, and let time pass up to the next decision."""
    net, v = env.net, env.v
    classes = len(net.node)
    if v.ask == _ROUTE:
        pool = net.pool[net.node[net.hop[v.hop].node].pool]
        send(net, v.hop, net.members[pool.first + action - classes - 1])
        _go_on(env)
    elif action < classes:
        serve_class(net, v.station, action)
        v.served |= 1 << action
    else:
        finish_plan(net, v.station)
        _go_on(env)


@njit
def _settle(env: NetEnv) -> None:
    """Take what is forced; write what is seen and what is legal."""
    v, mask = env.v, env.mask
    while v.ask != OVER:
        if legal(env) > 1 or v.skip_forced == 0:
            break
        only = 0
        while mask[only] == 0:
            only += 1
        _act(env, only)
    if v.ask == OVER:
        for i in range(len(mask)):
            mask[i] = 1
    v.clock = env.net.g.clock
    v.job_seconds = env.net.g.area
    observe(env)


@njit(forceinline=True)
def _begin_step(v) -> None:  # type: ignore[no-untyped-def]
    v.reward = v.dt = 0.0
    v.factor = 1.0
    v.terminated = v.truncated = 0


@njit
def begin_networks(table, chosen) -> None:  # type: ignore[no-untyped-def]
    """Begin the episode of each network that is chosen (a bool each), at time 0, up to its first decision."""
    addresses = span(table)
    for lane in range(len(chosen)):
        if chosen[lane]:
            env = env_at(addresses, lane)
            v = env.v
            v.begun += 1
            v.steps = v.illegal = 0
            v.total = v.token_seconds = 0.0
            _begin_step(v)
            _go_on(env)
            _settle(env)
            v.total = v.reward  # what came before the first decision is of the first step


@njit
def step_networks(table, actions, out, first: int, stop: int) -> int:  # type: ignore[no-untyped-def]
    """A step of the environments [first, stop) that are not over, each with its action.

    `out` is float64 (4, E): reward, seconds that passed, 1 if the episode has terminated, 1 if it was
    truncated. Returns how many have ended in this step.
    """
    addresses = span(table)
    ended = 0
    for lane in range(first, stop):
        env = env_at(addresses, lane)
        v = env.v
        if v.ask == OVER:
            out[0, lane] = out[1, lane] = 0.0
            if v.steps == 0:  # nothing is decided in this episode: the first action ends it
                v.steps = 1
                out[0, lane] = v.total
                out[2, lane] = v.terminated
                out[3, lane] = v.truncated
                ended += 1
            continue
        before = v.total if v.steps == 0 else 0.0
        _begin_step(v)
        action = actions[lane]
        if action < 0 or action >= len(env.mask) or env.mask[action] == 0:
            v.illegal += 1
            action = 0
            while env.mask[action] == 0:
                action += 1
        v.steps += 1
        _act(env, action)
        _settle(env)
        if 0 < v.max_steps <= v.steps and v.ask != OVER:
            v.ask = OVER
            v.truncated = 1
            _cut(env)
            for i in range(len(env.mask)):
                env.mask[i] = 1
        v.total += v.reward
        out[0, lane] = v.reward + before
        out[1, lane] = v.dt
        out[2, lane] = v.terminated
        out[3, lane] = v.truncated
        ended += v.ask == OVER
    return ended


@njit
def share_networks(state, who: int, table, actions, out, patience: int) -> None:  # type: ignore[no-untyped-def]
    """Steps of all environments, together with other threads, see `crew`."""
    first = claim(state, who, patience)
    while first >= 0:
        stop = min(first + BLOCK, len(table))
        finish(state, step_networks(table, actions, out, first, stop))
        first = claim(state, who, patience)
