"""An episode: its beginning, the passing of time and what that is worth, its end.

The same for all environments. What is rewarded is summed as time passes. By Little's law the integral of the
number of requests in the system is the sum of their latencies.
"""

from __future__ import annotations

import numpy as np

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.engine import arrive, begin_plan, end_plan, execute
from llmsched_env.core.run import _settled, _stretch, log_plan, write_log
from llmsched_env.core.span import copy_record
from llmsched_env.core.state import Status
from llmsched_env.envs.lane import MOST_CLIENTS, Env, Phase

_FUTURE, _FINISHED = int(Status.FUTURE), int(Status.FINISHED)
FORCED, BUILDING, OVER = (int(p) for p in Phase)
LATENCY, GOODPUT, THROUGHPUT, GPU_TIME, MAKESPAN, FAIRNESS, VIOLATIONS = range(7)
_NEVER = 2**62


# ---------------------------------------------------------------------- the beginning


@njit
def load(env: Env) -> None:
    """Begin the episode that `pool` holds, at time 0."""
    e, v = env.e, env.v
    copy_record(e.s, env.template)
    for i in range(len(e.bits)):
        e.bits[i] = 0
    clients = 0
    for r in range(len(e.req)):
        d, q = env.pool[r], e.req[r]
        q.status = _FUTURE
        q.computed = q.target = q.generated = q.blocks = q.granted = q.in_flight = q.hold = 0
        q.prompt, q.stop, q.limit = d.prompt, d.stop, d.limit
        q.last_token = q.first_token = q.first_scheduled = q.finish = np.nan
        q.key = 0.0
        q.order = 0
        q.up = q.left = q.right = -1
        q.need = q.least = 0
        q.arrival = d.arrival
        q.evicted_at = -1
        q.predicted, q.ttft_target, q.tpot_target = d.predicted, d.ttft_target, d.tpot_target
        q.rank = r
        q.priority, q.client, q.class_id = d.priority, d.client, d.class_id
        q.recomputed = 0
        q.preemptions = q.swaps = q.evicted_rest = q.cpu_blocks = q.level = q.count = 0
        clients = max(clients, d.client + 1)
    v.drawn = 0
    v.horizon = v.next_horizon
    v.was_reset = 1
    v.begun += 1
    v.held = 0
    v.stale_wait = v.stale_run = 1
    v.see_wait = v.see_run = 2
    v.num_wait = v.num_run = 0
    v.last_action = -1
    v.steps = v.illegal = 0
    v.iteration_time = v.arrival_rate = v.departure_rate = 0.0
    v.request_seconds = 0.0
    v.met = v.with_tpot = 0
    v.ttft_seconds = v.tpot_seconds = 0.0
    v.num_clients = min(clients, MOST_CLIENTS)
    for c in range(MOST_CLIENTS):
        v.service[c] = 0.0
    v.fairness = 1.0
    v.total = 0.0
    if len(env.log.rows) > 0:
        env.log.used[0] = env.log.used[1] = 0
    begin_step(env)


@njit(forceinline=True)
def begin_step(env: Env) -> None:
    """Nothing has happened in this step yet."""
    v = env.v
    v.reward = v.dt = 0.0
    v.factor = 1.0
    v.terminated = v.truncated = 0
    for i in range(len(v.terms)):
        v.terms[i] = 0.0


@njit(forceinline=True)
def end_step(env: Env) -> None:
    """The reward of the step: the terms by their weights."""
    v = env.v
    reward = 0.0
    for i in range(len(v.terms)):
        if v.weights[i] != 0.0:
            reward += v.weights[i] * v.terms[i]
    v.reward = reward
    v.total += reward


# ---------------------------------------------------------------------- time passes


@njit(forceinline=True)
def in_system(env: Env) -> int:
    """Requests that have arrived and not finished."""
    s = env.e.s
    return s.arrived - s.num_finished - s.num_dropped


@njit(forceinline=True)
def _spend(env: Env, seconds: float, requests: float) -> None:
    """`seconds` pass, at whose beginning so many requests are in the system."""
    v = env.v
    v.request_seconds += requests * seconds
    v.dt += seconds
    beta = v.discount_rate
    worth = seconds  # discounted
    if beta > 0.0:
        worth = v.factor * -np.expm1(-beta * seconds) / beta
        v.factor *= np.exp(-beta * seconds)
    v.terms[LATENCY] -= requests * worth / v.unit_time
    v.terms[MAKESPAN] -= worth / v.unit_time
    v.mean_factor = worth / seconds if seconds > 0.0 else v.factor


@njit
def _before_now(env: Env, seconds: float, sign: float) -> None:
    """A request was in the system for `seconds` up to now and is not counted yet (sign 1), or is and was not
    (-1)."""
    v = env.v
    v.request_seconds += sign * seconds
    beta = v.discount_rate
    area = seconds if beta <= 0.0 else v.factor * np.expm1(beta * seconds) / beta
    v.terms[LATENCY] -= sign * area / v.unit_time


@njit(forceinline=True)
def see_arrivals(env: Env) -> None:
    """Let what has arrived enter the queue."""
    e, v = env.e, env.v
    s = e.s
    first = s.arrived
    arrive(e, s.visible)
    for r in range(first, s.arrived):
        _before_now(env, s.clock - e.req[r].arrival, 1.0)
        if _is_late(e.req[r], s.clock):
            _miss(env, e.req[r].arrival + e.req[r].ttft_target)
    if s.arrived > first:
        v.stale_wait = 1
        v.arrival_rate += (s.arrived - first) / v.rate_window


@njit(forceinline=True)
def begin_iteration(env: Env) -> None:
    """Arrivals are seen, and the next plan is begun."""
    see_arrivals(env)
    begin_plan(env.e)


@njit(forceinline=True)
def run_iteration(env: Env) -> None:
    """Execute the plan; with nothing planned, wait for the next arrival."""
    e, v = env.e, env.v
    s, log = e.s, env.log
    start, busy, output = s.clock, s.busy, s.total_generated
    finished = s.num_finished
    requests = in_system(env)
    end_plan(e)
    planned = s.num_planned
    if planned == 0 and s.num_victims == 0:
        if s.arrived < len(e.req):
            s.clock = max(s.clock, e.req[s.arrived].arrival)
            s.visible = s.clock
        s.iterations += 1  # a new plan, in which those preempted in this one may be admitted
    else:
        if v.weights[FAIRNESS] != 0.0:
            _serve(env)
        if len(log.rows) > 0:
            log_plan(e, log)
        execute(e)
        if len(log.rows) > 0:
            write_log(e, log, start)
        v.iteration_time = s.clock - start
    _spend(env, s.clock - start, requests)
    if s.num_finished > finished:
        for k in range(planned):
            q = e.req[e.plan[k]]
            if q.status == _FINISHED and q.finish == s.clock:
                _judge(env, q, start)
    if v.weights[VIOLATIONS] != 0.0:
        _find_late(env, start)
    _sum_up(env, start, busy, output, finished)


@njit
def decode_on(env: Env) -> bool:
    """Nobody waits and all decode: run until an event, in one go. Whether time passed."""
    e, v = env.e, env.v
    s = e.s
    if s.num_running == 0 or s.num_waiting > 0 or s.error != 0 or v.weights[FAIRNESS] != 0.0:
        return False
    if v.discount_rate > 0.0 and v.weights[THROUGHPUT] != 0.0:  # each token is worth what it is in its time
        return False
    if not _settled(e):
        return False
    start, busy, output, iterations = s.clock, s.busy, s.total_generated, s.iterations
    finished, n = s.num_finished, s.num_running
    for k in range(n):
        e.pending[k] = e.running[k]
    requests = in_system(env)
    _stretch(e, env.log, _NEVER, v.horizon, False)
    if s.iterations == iterations:
        return False
    v.iteration_time = (s.clock - start) / (s.iterations - iterations)
    _spend(env, s.clock - start, requests)
    if s.num_finished > finished:
        for k in range(n):
            q = e.req[e.pending[k]]
            if q.status == _FINISHED:
                _before_now(env, s.clock - q.finish, -1.0)
                _judge(env, q, start)
    _sum_up(env, start, busy, output, finished)
    return True


@njit(forceinline=True)
def _sum_up(env: Env, start: float, busy: float, output: int, finished: int) -> None:
    """What an iteration, or several, have brought since."""
    e, v = env.e, env.v
    s = e.s
    v.terms[GPU_TIME] -= v.mean_factor * (s.busy - busy) / v.unit_time
    v.terms[THROUGHPUT] += v.factor * (s.total_generated - output) / v.unit_tokens
    fade = np.exp(-(s.clock - start) / v.rate_window)
    v.arrival_rate *= fade
    v.departure_rate = v.departure_rate * fade + (s.num_finished - finished) / v.rate_window


@njit
def _judge(env: Env, q, start: float) -> None:  # type: ignore[no-untyped-def]
    """Whether a request that has finished, in what began at `start`, met its targets."""
    v = env.v
    late = _is_late(q, q.first_token)
    tpot = 0.0
    v.ttft_seconds += q.first_token - q.arrival
    if q.generated > 1:
        tpot = (q.finish - q.first_token) / (q.generated - 1)
        v.tpot_seconds += tpot
        v.with_tpot += 1
    if not late and tpot <= q.tpot_target:
        v.met += 1
        v.terms[GOODPUT] += _worth_at(env, q.finish) / len(env.e.req)
    elif not late:
        _miss(env, q.finish)
    elif not _is_late(q, start):  # else it is told already
        _miss(env, q.arrival + q.ttft_target)


@njit(forceinline=True)
def _is_late(q, now: float) -> bool:  # type: ignore[no-untyped-def]
    """Whether a first token that comes now, or later, is late."""
    return now - q.arrival > q.ttft_target


@njit
def _find_late(env: Env, start: float) -> None:
    """Tell of those in the system whose first token came due since `start` and was not there."""
    e = env.e
    r = queue.first(e)
    while r >= 0:
        _note_late(env, e.req[r], start)
        r = queue.following(e, r)
    for k in range(e.s.num_running):
        _note_late(env, e.req[e.running[k]], start)


@njit(forceinline=True)
def _note_late(env: Env, q, start: float) -> None:  # type: ignore[no-untyped-def]
    until = env.e.s.clock if q.generated == 0 else q.first_token
    if _is_late(q, until) and not _is_late(q, start):
        _miss(env, q.arrival + q.ttft_target)


@njit(forceinline=True)
def _miss(env: Env, when: float) -> None:
    """A request missed a target at a time (s), in this step or before the request was seen."""
    env.v.terms[VIOLATIONS] -= _worth_at(env, when) / len(env.e.req)


@njit(forceinline=True)
def _worth_at(env: Env, when: float) -> float:
    """The discount at a time (s), relative to the beginning of the step."""
    v = env.v
    return v.factor * np.exp(v.discount_rate * (env.e.s.clock - when))


@njit
def _serve(env: Env) -> None:
    """Count what each client gets in this plan, in tokens (an output token as two), and how evenly."""
    e, v = env.e, env.v
    for k in range(e.s.num_planned):
        q = e.req[e.plan[k]]
        v.service[q.client % MOST_CLIENTS] += q.granted if q.computed < q.target else 2.0
    total, squares = 0.0, 0.0
    for c in range(v.num_clients):
        total += v.service[c]
        squares += v.service[c] * v.service[c]
    fairness = total * total / (v.num_clients * squares) if squares > 0.0 else 1.0
    v.terms[FAIRNESS] += v.factor * (fairness - v.fairness)
    v.fairness = fairness


# ---------------------------------------------------------------------- the end


@njit(forceinline=True)
def over(env: Env) -> bool:
    """Whether the episode has ended; notes how."""
    e, v = env.e, env.v
    s = e.s
    if s.num_finished + s.num_dropped == len(e.req):
        v.terminated = 1
    elif s.clock >= v.horizon:
        see_arrivals(env)  # those who came in the last iteration have been in the system, too
        v.truncated = 1
    else:
        return False
    v.phase = OVER
    return True


@njit
def close(env: Env) -> None:
    """Keep the figures of the episode that has ended."""
    e, v = env.e, env.v
    s = e.s
    v.episodes += 1
    v.done_return = v.total
    v.done_steps = v.steps
    v.done_latency = v.request_seconds / len(e.req)
    v.done_goodput = v.met / len(e.req)
    v.done_ttft = v.ttft_seconds / s.num_finished if s.num_finished > 0 else np.nan
    v.done_tpot = v.tpot_seconds / v.with_tpot if v.with_tpot > 0 else np.nan
    v.done_finished = s.num_finished
    v.done_clock = s.clock
    v.done_busy = s.busy
    v.done_iterations = s.iterations
    v.done_preemptions = s.preemptions
    v.done_illegal = v.illegal
    v.done_fairness = v.fairness
    v.done_tokens = s.total_generated
