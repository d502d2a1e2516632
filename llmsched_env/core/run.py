"""The loop: arrivals, plan, iteration, again; and the stretches in which nothing but decoding happens, taken
in one go.

Between two events (an arrival, a completion, a shortage of blocks) a batch that only decodes stays the same,
so its iterations differ in their KV reads alone. `EXACT` adds their durations one by one, in the order in
which iterating would, and so gives the same bits; `CLOSED` sums them in closed form where the cost model is
linear in the KV reads, equal within rounding.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import numpy as np

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.cost import batch_time, decode_line
from llmsched_env.core.cruise import join, step, steps_with_blocks, take_blocks, wake
from llmsched_env.core.engine import arrive, begin_plan, collect, end_plan, execute, execute_behind
from llmsched_env.core.histogram import itl_bin, itl_bin_start
from llmsched_env.core.state import Engine, Error, Level, Listing

ITERATION = np.dtype(
    [
        ("start_s", "f8"),
        ("end_s", "f8"),
        ("prefill_tokens", "i4"),
        ("decode_requests", "i4"),
        ("kv_tokens", "i8"),  # resident when the iteration ends, before what finished is freed
        ("preempted", "i4"),
        ("swapped_in", "i4"),
        ("entries", "i8"),  # end of its decisions in the log
    ],
    align=True,
)
EVICTED, SWAPPED_OUT, SWAPPED_IN = -1, -2, -3  # in place of tokens in a log entry


class Skip(enum.IntEnum):
    """How stretches of pure decoding are run."""

    NONE = 0
    EXACT = 1
    CLOSED = 2


class Log(NamedTuple):
    """What a run writes down: a row an iteration, and the decisions behind it. Arrays of length 0 switch it
    off.

    Attributes:
        rows: ITERATION records.
        requests, tokens: (E,) int32: decisions; victims first, with EVICTED or SWAPPED_OUT for tokens, then
            those that come back from the CPU tier without getting tokens, with SWAPPED_IN.
        used: (2,) int64: rows and entries written.
    """

    rows: Any
    requests: Any
    tokens: Any
    used: Any


class Outcome(enum.IntEnum):
    """Why a run returned."""

    DONE = 0
    MORE = 1  # the iterations allowed are used up
    LOG_FULL = 2
    ERROR = 3
    HORIZON = 4
    WAITING = 5  # only requests that can never be scheduled are left


DONE, MORE, LOG_FULL, ERROR, HORIZON, STALLED = (int(x) for x in Outcome)
_PREFILLS_FIRST, _NEW_FIRST = int(Listing.PREFILLS_FIRST), int(Listing.NEW_FIRST)
_SWAPPED_IN, _NEW = int(Level.SWAPPED_IN), int(Level.NEW)
READY = -1  # none of these: the run goes on
STUCK, LIVELOCK = int(Error.STUCK), int(Error.LIVELOCK)
_LIVELOCK = 1_000_000  # iterations without a token


@njit
def write_log(e: Engine, log: Log, start: float) -> None:
    """Write the row of the iteration that has just been executed."""
    s = e.s
    row = log.rows[log.used[0]]
    log.used[0] += 1
    row.start_s = start
    row.end_s = s.clock
    row.prefill_tokens = s.prefill_tokens
    row.decode_requests = s.decodes
    row.kv_tokens = s.logged_kv
    row.preempted = s.num_victims
    row.swapped_in = s.num_swapped_in
    row.entries = log.used[1]


@njit
def log_plan(e: Engine, log: Log) -> None:
    """Write the decisions of the plan before it is executed."""
    s = e.s
    if len(log.requests) == 0:
        return
    at = log.used[1]
    for k in range(s.num_victims):
        v = e.victims[k]
        log.requests[at] = v
        log.tokens[at] = SWAPPED_OUT if e.req[v].cpu_blocks > 0 else EVICTED
        at += 1
    if s.num_swapped_in > 0:
        for k in range(s.num_running):
            q = e.req[e.running[k]]
            if q.granted == 0 and q.returned_at == s.iterations and q.swaps > 0:
                log.requests[at] = e.running[k]
                log.tokens[at] = SWAPPED_IN
                at += 1
    for group in range(5 if s.listing == _NEW_FIRST else 2 if s.listing == _PREFILLS_FIRST else 1):
        for k in range(s.num_planned):
            q = e.req[e.plan[k]]
            prefill = q.computed < q.target
            if s.listing == _NEW_FIRST:
                if q.level == _SWAPPED_IN:
                    own = 2 if prefill else 4
                else:
                    own = 3 if not prefill else 0 if q.level == _NEW else 1
            elif s.listing == _PREFILLS_FIRST:
                own = 0 if prefill else 1
            else:
                own = 0
            if own == group:
                log.requests[at] = e.plan[k]
                log.tokens[at] = q.granted
                at += 1
    log.used[1] = at


@njit(forceinline=True)
def _log_full(e: Engine, log: Log) -> bool:
    """Whether the next iteration might not find room in the log."""
    if len(log.rows) == 0:
        return False
    if log.used[0] >= len(log.rows):
        return True
    return len(log.requests) > 0 and log.used[1] + 2 * len(e.req) > len(log.requests)


@njit(forceinline=True)
def _next_arrival(e: Engine) -> float:
    return e.req[e.s.arrived].arrival if e.s.arrived < len(e.req) else np.inf


@njit(forceinline=True)
def _settled(e: Engine) -> bool:
    """Whether the scheduler, asked now, could only let all running requests decode, and so on until an event.

    Either nobody else is there; or the queue was found blocked in the iteration before, which only decoded,
    and nothing that could unblock it has happened since. (That all running requests decode is left to
    `_stretch` to find out.)
    """
    s = e.s
    if s.steady == 0 or s.num_running == 0 or _next_arrival(e) <= s.clock:
        return False
    if s.limit_decodes and s.num_running > s.token_budget:
        return False
    if s.max_batch_requests > 0 and s.num_running > s.max_batch_requests:
        return False
    if s.num_waiting == 0 and s.num_swapped == 0:
        return True
    return (
        s.steady == 2
        and s.decodes == s.num_running
        and s.prefill_requests == 0
        and s.num_victims == 0
        and s.num_swapped_in == 0
    )


@njit(forceinline=True)
def _stretch(e: Engine, log: Log, last: int, horizon: float, closed: bool) -> None:
    """Run the coming iterations of pure decoding in one go, until something arrives, or finishes while others
    wait, or blocks might run short, or iteration `last` or the time `horizon` is reached.
    """
    s = e.s
    join(e)
    # Else one prefills, or was passed over: its next gap is longer than the iteration.
    if s.cruising == s.num_running and s.cruised_at == s.clock:
        _cruise_on(e, log, last, horizon, closed)
    if not s.may_cruise:
        wake(e)


@njit(forceinline=True)
def _cruise_on(e: Engine, log: Log, last: int, horizon: float, closed: bool) -> None:
    s = e.s
    alone = s.num_waiting == 0 and s.num_swapped == 0
    first = s.iterations
    while True:
        n = s.cruising
        steps = steps_with_blocks(e, min(s.next_due - s.steps, last - s.iterations))
        if n == 0 or steps < 1:
            break
        if s.iterations == first:
            begin_plan(e)
        s.decodes = n
        if len(log.requests) > 0:
            s.num_planned = n
            for k in range(n):
                e.plan[k] = e.running[k]
        context = s.cruise_context
        until = min(_next_arrival(e), horizon)
        base, slope = decode_line(e.cost, n) if closed else (np.nan, np.nan)
        if closed and not np.isnan(base) and len(log.rows) == 0:
            done = _sum_closed(e, steps, until, n, base + slope * context, slope * n)
        else:
            done = _sum_exact(e, log, steps, until, n, context)
        take_blocks(e, done)
        s.decode_context = context + (done - 1) * n
        s.iterations += done
        s.total_decode += done * n
        s.total_generated += done * n
        s.batch_sum += done * n
        step(e, done, s.clock)
        if s.clock >= until or _log_full(e, log) or (s.num_running < n and not alone):
            break
    if s.iterations > first:
        s.visible = s.clock
        s.last_progress = s.iterations


@njit(forceinline=True)
def _sum_exact(e: Engine, log: Log, steps: int, until: float, batch: int, context: int) -> int:
    """Advance the clock iteration by iteration, until `steps` are done or one ends at `until` or later;
    returns how many.
    """
    s = e.s
    for done in range(steps):
        start = s.clock
        dt = batch_time(e.cost, 0, 0, 0.0, 0, batch, context + done * batch)
        now = start + dt
        s.clock = now
        s.busy += dt
        s.kv_tokens += batch
        s.kv_seconds += s.kv_tokens * dt
        if len(e.itl) > 0:
            e.itl[itl_bin(now - start)] += batch
        if len(log.rows) > 0:
            if len(log.requests) > 0:
                for k in range(s.num_planned):
                    log.requests[log.used[1] + k] = e.plan[k]
                    log.tokens[log.used[1] + k] = 1
                log.used[1] += s.num_planned
            s.logged_kv = s.kv_tokens
            write_log(e, log, start)
        if now >= until or (len(log.rows) > 0 and _log_full(e, log)):
            return done + 1
    return steps


@njit
def _sum_closed(e: Engine, steps: int, until: float, batch: int, first: float, slope: float) -> int:
    """As `_sum_exact`, where iteration j takes first + slope * j seconds."""
    s = e.s
    if s.clock + _series(first, slope, steps) > until:
        # The smallest number of iterations that ends at `until` or later: the root of a parabola, set right
        # by a step or two.
        linear = first - 0.5 * slope
        gap = until - s.clock
        root = 2.0 * gap / (linear + np.sqrt(linear * linear + 2.0 * slope * gap))
        n = min(steps, max(1, int(np.ceil(root))))
        while n > 1 and s.clock + _series(first, slope, n - 1) >= until:
            n -= 1
        while n < steps and s.clock + _series(first, slope, n) < until:
            n += 1
        steps = n
    total = _series(first, slope, steps)
    kv = float(s.kv_tokens + batch)
    one = 0.5 * steps * (steps - 1.0)
    two = one * (2.0 * steps - 1.0) / 3.0
    s.kv_seconds += steps * kv * first + (kv * slope + batch * first) * one + batch * slope * two
    s.busy += total
    s.clock += total
    s.kv_tokens += steps * batch
    if len(e.itl) > 0:
        j = 0
        while j < steps:
            b = itl_bin(first + slope * j)
            end = steps
            if slope > 0.0:
                end = min(steps, max(j + 1, int(np.ceil((itl_bin_start(b + 1) - first) / slope))))
            e.itl[b] += batch * (end - j)
            j = end
    return steps


@njit
def _series(first: float, slope: float, n: int) -> float:
    """Sum of first + slope * j for j < n."""
    return n * (first + 0.5 * slope * (n - 1.0))


@njit
def begin_run(e: Engine, log: Log, skip: int) -> None:
    """Before the first `before_plan` of a run."""
    s = e.s
    s.may_cruise = s.lockstep and skip != 0 and not s.asynchronous and len(log.requests) == 0


@njit
def end_run(e: Engine) -> None:
    """After the last `after_plan` of a run: everything is as it would be without cruising."""
    wake(e)


@njit(forceinline=True)
def before_plan(e: Engine, log: Log, last: int, horizon: float) -> int:
    """Begin an iteration: requests arrive, the plan is empty. READY, or the `Outcome` that ends the run."""
    s = e.s
    if s.error != 0:
        return ERROR
    if s.iterations >= last:
        return MORE
    if s.clock >= horizon:
        return HORIZON
    if _log_full(e, log):
        return LOG_FULL
    arrive(e, s.visible)
    begin_plan(e)
    return READY


@njit(forceinline=True)
def after_plan(e: Engine, log: Log, last: int, horizon: float, skip: int) -> int:
    """Run the planned iteration, or wait for the next arrival if nothing is planned, and the stretch of
    decoding that follows.

    READY, or the `Outcome` that ends the run.
    """
    s = e.s
    end_plan(e)
    if s.error != 0:
        return ERROR
    idle = s.num_planned == 0 and s.cruised == 0 and s.num_victims == 0 and s.num_swapped_in == 0
    if len(log.rows) > 0 and not idle:
        log_plan(e, log)
    seen = s.visible
    if s.asynchronous:
        collect(e)
        seen = s.clock
    if idle:
        if s.visible < seen:  # plan again with what has been seen meanwhile
            s.visible = seen
        elif s.arrived < len(e.req):
            s.clock = max(s.clock, e.req[s.arrived].arrival)
            s.visible = s.clock
        elif s.num_finished + s.num_dropped == len(e.req):
            return DONE
        elif s.patient:
            s.clock = horizon
            return STALLED
        else:
            return _give_up(e, STUCK)
        return READY
    start = s.clock
    if s.asynchronous:
        execute_behind(e)
    else:
        execute(e)
    if len(log.rows) > 0:
        write_log(e, log, start)
    if s.iterations - s.last_progress > _LIVELOCK:
        return _give_up(e, LIVELOCK)
    # A stretch keeps the running list as it is, which a schedule would show.
    reordered = len(log.requests) > 0 and (s.sort != 0 or s.preempt_for_priority != 0)
    if skip != 0 and not s.asynchronous and not reordered:
        if s.iterations < last and s.clock < horizon and not _log_full(e, log) and _settled(e):
            _stretch(e, log, last, horizon, skip == 2)
    return READY


@njit
def _give_up(e: Engine, error: int) -> int:
    """Note that nothing moves any more, and the request to name in the message."""
    s = e.s
    s.error = error
    if s.num_waiting > 0:
        s.error_request = queue.first(e)
    else:
        s.error_request = e.running[0] if s.num_running > 0 else e.swapped[0]
    return ERROR
