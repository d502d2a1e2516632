"""The loop over all stations: what happens at a moment, routing, plans, and on to the next moment.

At each moment, in this order:

1. every iteration that ends now counts, station by station: tokens come out, hops that are done let those go
   that wait for them alone; a job with no hop left is done;
2. hops whose delay is over are released, in the order in which they are due (then of entry), and jobs arrive,
   in order: all hops of theirs that wait for nobody are released, or their delay begins;
3. the hops released are routed and sent to their stations, one by one, in the order of release;
4. every station that is at a boundary, or idle and has got a hop, plans its next iteration, in the order of
   stations; one that can plan nothing is idle until it gets a hop.

An iteration changes nothing that others can see until it ends: whoever looks at a station in between, such as
a router, sees it as it was when the iteration began. A network of one station behaves as one engine does
(`core.run`), to the last bit.

`advance` runs that until a decision from outside is due. To decide, a pool's routing is `Routing.OUTSIDE`, or
a station's `outside` is 1:

    outcome = advance(net, horizon, most)        # or advance_levels, see there
    while outcome == PLAN or outcome == ROUTE:
        if outcome == PLAN:
            k = deciding_station(net)            # its plan is empty and begun
            serve_class(net, k, c)               # class c as far as budget, places and KV cache go; repeat
            finish_plan(net, k)                  # the iteration starts
        else:
            h = hop_to_route(net)
            send(net, h, k)                      # k: one of members[pool.first : pool.first + pool.size]
        outcome = advance(net, horizon, most)

`serve_class` asks for keys that are classes: a rule of MAX_WEIGHT or PRESSURE (whose order is then not
asked for), or CLASS with `node.key` the number of the class.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.engine import Place, begin_plan, end_plan, enter_queue, execute, iteration_time
from llmsched_env.core.state import Engine, Status
from llmsched_env.networks.core.keys import key_of, plan_by_pressure, raise_keys
from llmsched_env.networks.core.route import ASK, choose_station, remaining_tokens
from llmsched_env.networks.core.state import (
    Failure,
    Net,
    Networks,
    Phase,
    Rule,
    Standing,
    engine_of,
    network_at,
)
from llmsched_env.networks.core.timed import pop_timed, push_timed
from llmsched_env.scheduling import plan as plan_any
from llmsched_env.scheduling.levels import begin_levels, end_levels, plan_full, plan_levels, serve_level
from llmsched_env.scheduling.settings import Routine


class Outcome(enum.IntEnum):
    """Why `advance` returned."""

    DONE = 0  # every job is done
    MORE = 1  # the moments allowed are used up
    HORIZON = 2
    PLAN = 3  # `deciding_station` is to be given a plan
    ROUTE = 4  # `hop_to_route` is to be sent somewhere
    ERROR = 5  # see g.error (`Failure`) and g.error_at


DONE, MORE, HORIZON, PLAN, ROUTE, ERROR = (int(x) for x in Outcome)
_IDLE, _DUE, _PLANNED, _BUSY = (int(x) for x in Standing)
_WAIT, _ROUTE_PHASE, _PLAN_PHASE = (int(x) for x in Phase)
_ENGINE, _STUCK, _STATION, _LIVELOCK = (int(x) for x in list(Failure)[1:])
_PLAS, _ATLAS, _MAX_WEIGHT, _PRESSURE = (int(x) for x in list(Rule)[4:])
_LEVELS = int(Routine.LEVELS)
_FINISHED, _KEY = int(Status.FINISHED), int(Place.KEY)
_NO_TOKEN = 1_000_000  # iterations of a station without a token: it preempts without end


# ---------------------------------------------------------------------- hops


@njit
def release(net: Net, h: int, now: float) -> None:
    """Hop h waits for nobody any more: it is ready to be routed, at once or after its delay."""
    delay = net.hop[h].delay
    if delay > 0.0:
        push_timed(net, h, now + delay)
    else:
        net.ready[net.g.num_ready] = h
        net.g.num_ready += 1


@njit
def send(net: Net, h: int, k: int) -> bool:
    """Send hop h, which is the next to be routed, to station k; False, with the error noted, if that is not
    in its pool.
    """
    g, hop, place, q = net.g, net.hop[h], net.station[k], net.req[h]
    node = net.node[hop.node]
    if place.pool != node.pool:
        return _fail(net, _STATION, h)
    g.at += 1
    hop.station = k
    q.arrival = g.clock
    q.rank = g.sent
    g.sent += 1
    q.score = key_of(net, h)
    tokens = q.prompt + q.stop - 1
    place.tokens_in += tokens
    place.hops_in += 1
    _count(net, k, hop.node, 1, tokens)
    enter_queue(engine_of(net, k), h, _KEY)
    if place.standing == _IDLE:
        place.standing = _DUE
    return True


@njit(forceinline=True)
def _count(net: Net, k: int, c: int, hops: int, tokens: int) -> None:
    """So many hops, and tokens, of class c more at station k."""
    cell, node = net.cell[k * len(net.node) + c], net.node[c]
    cell.present += hops
    node.present += hops
    cell.tokens += tokens
    node.tokens += tokens


@njit
def _finish_hop(net: Net, h: int, now: float) -> None:
    """Hop h is done: its job has been served that, and hops that waited for it alone are released."""
    g, hop, q = net.g, net.hop[h], net.req[h]
    job = net.job[hop.job]
    served = q.computed + q.recomputed
    job.attained += served
    path = hop.attained + served
    for i in range(hop.first, hop.last):
        after = net.successors[i]
        following = net.hop[after]
        following.waits -= 1
        following.attained = max(following.attained, path)
        if following.waits == 0:
            release(net, after, now)
    _count(net, hop.station, hop.node, -1, 0)
    g.hops_done += 1
    job.left -= 1
    if job.left == 0:
        job.finish = now
        g.jobs_in -= 1
        g.jobs_done += 1
        g.latency += now - job.arrival


# ---------------------------------------------------------------------- one station


@njit(inline="always")  # what takes a function as argument cannot be cached
def plan_station(net: Net, k: int, decide: Callable[[Engine], None]) -> bool:
    """Plan and start the next iteration of station k by the discipline and its scheduler; False after an
    error."""
    begin_station(net, k)
    rule = net.g.rule
    if rule == _MAX_WEIGHT or rule == _PRESSURE:
        plan_by_pressure(net, k)
    else:
        decide(engine_of(net, k))
    return start_station(net, k)


@njit
def begin_station(net: Net, k: int) -> None:
    """Begin an empty plan at station k, which is at a boundary at this moment."""
    e = engine_of(net, k)
    e.s.clock = net.g.clock
    e.s.visible = net.g.clock
    if (net.g.rule == _PLAS or net.g.rule == _ATLAS) and e.s.routine == _LEVELS:
        raise_keys(net, k)
    begin_plan(e)
    begin_levels(e)


@njit
def start_station(net: Net, k: int) -> bool:
    """Start the planned iteration of station k, or leave the station idle if nothing is planned; False after
    an error.
    """
    e = engine_of(net, k)
    s, place = e.s, net.station[k]
    end_plan(e)
    if s.error != 0:
        return _fail(net, _ENGINE, k)
    if s.num_planned == 0 and s.num_victims == 0 and s.num_swapped_in == 0:
        place.standing = _IDLE
        return True
    if s.iterations - s.last_progress > _NO_TOKEN:
        return _fail(net, _LIVELOCK, k)
    for i in range(s.num_victims):
        r = e.victims[i]
        hop, lost = net.hop[r], net.req[r].recomputed
        _count(net, k, hop.node, 0, lost - hop.recomputed)
        hop.recomputed = lost
    place.standing = _BUSY
    place.until = s.clock + iteration_time(e)
    return True


@njit
def complete(net: Net, k: int) -> None:
    """The iteration of station k ends: its tokens come out, and hops that are done release others."""
    e = engine_of(net, k)
    s, place = e.s, net.station[k]
    for i in range(s.num_planned):
        r = e.plan[i]
        _count(net, k, net.hop[r].node, 0, -e.req[r].granted)
    before = s.num_finished
    execute(e)
    if s.num_finished > before:
        for i in range(s.num_planned):
            r = e.plan[i]
            if e.req[r].status == _FINISHED:
                _finish_hop(net, r, s.clock)
    place.standing = _DUE
    place.until = np.inf


# ---------------------------------------------------------------------- all stations


@njit
def next_event(net: Net) -> float:
    """When something happens next, seconds; inf: never."""
    g = net.g
    t = np.inf
    for k in range(len(net.station)):
        t = min(t, net.station[k].until)
    if g.num_timed > 0:
        t = min(t, net.timed[0].when)
    if g.next_job < len(net.job):
        t = min(t, net.job[g.next_job].arrival)
    return float(t)


@njit
def pass_time(net: Net, t: float, last: bool) -> None:
    """Let time go by until t, during which nothing happens: take samples of what is there, those due at t
    only if nothing happens then either (`last`).

    When there is no room for another one, every second sample is dropped, and from then on they are taken
    half as often.
    """
    g = net.g
    stations = len(net.station)
    room = len(net.samples) // (stations + 1)
    while room > 1:
        when = g.samples * g.sample_s
        if when > t or (when == t and not last):
            break
        if g.samples == room:
            _thin(net)
            continue
        row = g.samples * (stations + 1)
        for k in range(stations):
            net.samples[row + k] = remaining_tokens(net, k)
        net.samples[row + stations] = g.jobs_in
        g.samples += 1
    g.area += g.jobs_in * (t - g.clock)
    g.clock = t


@njit
def _thin(net: Net) -> None:
    """Keep every second sample."""
    g, width = net.g, len(net.station) + 1
    g.samples = (g.samples + 1) // 2
    for i in range(1, g.samples):
        for k in range(width):
            net.samples[i * width + k] = net.samples[2 * i * width + k]
    g.sample_s *= 2.0


@njit
def happen(net: Net, t: float) -> None:
    """All that happens at moment t before hops are routed."""
    g = net.g
    g.num_ready = 0
    for k in range(len(net.station)):
        if net.station[k].until == t:
            complete(net, k)
    while g.num_timed > 0 and net.timed[0].when <= t:
        h = pop_timed(net)
        net.ready[g.num_ready] = h
        g.num_ready += 1
    while g.next_job < len(net.job) and net.job[g.next_job].arrival <= t:
        j = g.next_job
        g.next_job += 1
        g.jobs_in += 1
        for h in range(net.first_hop[j], net.first_hop[j + 1]):
            if net.hop[h].waits == 0:
                release(net, h, t)
    g.events += 1


@njit
def _fail(net: Net, error: int, where: int) -> bool:
    g = net.g
    if g.error == 0:
        g.error = error
        g.error_at = where
    return False


@njit(inline="always")
def advance_by(net: Net, horizon: float, most: int, decide: Callable[[Engine], None]) -> int:
    """`advance` under the compiled scheduler `decide(e)` at every station."""
    g = net.g
    outcome = -1
    last = g.events + most
    while outcome < 0:
        if g.error != 0:
            outcome = ERROR
        elif g.phase == _WAIT and g.events >= last:
            outcome = MORE
        elif g.phase == _WAIT:
            t = next_event(net)
            if t > horizon or t == np.inf:
                if g.jobs_done == len(net.job):
                    outcome = DONE
                elif t == np.inf:
                    _fail(net, _STUCK, 0)
                    outcome = ERROR
                else:
                    outcome = HORIZON
                if horizon < np.inf:
                    pass_time(net, max(horizon, g.clock), True)
            else:
                pass_time(net, t, False)
                happen(net, t)
                g.phase = _ROUTE_PHASE
                g.at = 0
        elif g.phase == _ROUTE_PHASE:
            if g.at >= g.num_ready:
                g.phase = _PLAN_PHASE
                g.at = 0
            else:
                h = net.ready[g.at]
                k = choose_station(net, h)
                if k == ASK:
                    outcome = ROUTE
                else:
                    send(net, h, k)
        elif g.at >= len(net.station):
            g.phase = _WAIT
        else:
            place = net.station[g.at]
            if place.standing == _PLANNED:
                outcome = PLAN
            elif place.standing == _DUE:
                if place.outside != 0 and net.engines[g.at].num_waiting + net.engines[g.at].num_running > 0:
                    begin_station(net, g.at)
                    place.standing = _PLANNED
                    outcome = PLAN
                else:
                    plan_station(net, g.at, decide)
                    g.at += 1
            else:
                g.at += 1
    return outcome


@njit
def advance(net: Net, horizon: float, most: int) -> int:
    """Run the network until a decision from outside is due, all jobs are done, `horizon` (s) is reached, or
    so many more moments have passed at which something happened; returns an `Outcome`.

    What happens at the horizon itself is still done. May be called again, whatever it returned.
    """
    return advance_by(net, horizon, most, plan_any)


@njit
def advance_levels(net: Net, horizon: float, most: int) -> int:
    """`advance` where the scheduler of every station is the routine LEVELS; compiled far faster."""
    return advance_by(net, horizon, most, plan_levels)


@njit
def run_network(networks: Networks, i: int, horizon: float, most: int) -> int:
    """`advance` of network i."""
    return advance(network_at(networks, i), horizon, most)


@njit
def run_network_levels(networks: Networks, i: int, horizon: float, most: int) -> int:
    """`advance_levels` of network i."""
    return advance_levels(network_at(networks, i), horizon, most)


# ---------------------------------------------------------------------- from outside


@njit
def deciding_station(net: Net) -> int:
    """The station whose plan is asked for (`PLAN`)."""
    return int(net.g.at)


@njit
def hop_to_route(net: Net) -> int:
    """The hop whose station is asked for (`ROUTE`)."""
    return int(net.ready[net.g.at])


@njit
def serve_class(net: Net, k: int, c: int) -> bool:
    """Serve the hops of class c at station k into its plan, as far as budget, places and KV cache go:
    decodes, then unfinished prompts, then those that wait, each in order of arrival.

    Whoever is in the plan already gets no more, so that a second call does nothing. False if one that waits
    found no room.
    """
    return serve_level(engine_of(net, k), np.float64(c))


@njit
def tokens_left(net: Net, k: int) -> int:
    """Tokens that the plan being built at station k still takes; 0 if its places are used up."""
    e = engine_of(net, k)
    return 0 if plan_full(e) else int(e.s.budget)


@njit
def finish_plan(net: Net, k: int) -> bool:
    """Start the iteration of station k with the plan as it is; False after an error.

    An empty plan leaves the station idle until it gets a hop.
    """
    end_levels(engine_of(net, k))
    net.g.at += 1
    return start_station(net, k)
