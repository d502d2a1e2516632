"""What an agent sees: some numbers of the whole engine, and a row for each visible request.

Everything is float32 within [0, 1], a slack within [-1, 1]. What the length regime hides appears nowhere.
"""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.cost import batch_time
from llmsched_env.core.engine import iteration_time
from llmsched_env.core.facts import blocks_for, hold_tokens
from llmsched_env.core.span import move
from llmsched_env.envs.lane import MOST_CLASSES, Env


class LengthInfo(enum.IntEnum):
    """What is known of the length of an answer before it ends."""

    NONE = 0
    CLASS = 1  # the mean of its class
    PREDICTED = 2  # what the workload's predictor said
    ORACLE = 3  # its true length


class RunningOrder(enum.IntEnum):
    """Which running requests are visible, and in which order."""

    OLDEST = 0  # by admission
    NEWEST = 1
    SHORTEST = 2  # fewest KVs
    LONGEST = 3


# Each feature is x / (a |x| + b) of a raw number x: with a = 0 a share of b, with a = 1 a number that is one
# half at b and below 1 for ever. Names in place of b are looked up when an environment is made (`scales`).
GLOBAL_FEATURES: dict[str, tuple[float, float | str]] = {
    "kv_used": (0, "kv_blocks"),  # KV blocks in use, those of the plan included
    "budget_left": (0, "token_budget"),  # tokens that the plan leaves
    "seats_used": (0, "max_num_seqs"),  # running requests
    "waiting": (1, 16),  # requests
    "waiting_tokens": (1, 4096),  # prefill tokens of the visible waiting requests
    "running": (1, 16),  # requests
    "hidden_waiting": (1, 16),  # requests that wait beyond the visible ones
    "hidden_running": (1, 16),
    "hidden_kv": (0, "kv_blocks"),  # KV blocks of the hidden running requests
    "planned_prefill": (0, "token_budget"),  # tokens
    "planned_decodes": (0, "max_num_seqs"),
    "planned_requests": (1, 4),  # requests with a chunk in the plan
    "planned_time": (1, 0.05),  # s that the plan would take
    "held": (0, 1),  # 1: decodes are kept out of the plan
    "forced": (0, 1),  # 1: somebody must be preempted
    "victims": (1, 4),  # preempted in this plan
    "arrivals": (1, 1),  # that the time scale would bring, at the rate over the window
    "departures": (1, 1),
    "iteration_time": (1, 0.05),  # s of the last iteration
    "elapsed": (1, "ten_times"),  # s since the episode began
}
SLOT_FEATURES: dict[str, tuple[float, float | str]] = {
    "present": (0, 1),
    "prefill_left": (1, 512),  # tokens
    "context": (1, 1024),  # tokens in the KV cache
    "generated": (1, 256),  # tokens
    "expected_left": (1, 256),  # output tokens still expected by the length regime; 0 if nothing is known
    "age": (1, "time_scale"),  # s since arrival
    "slack": (1, "time_scale"),  # s until its next deadline, below 0 if missed; 1 without target
    "class": (1, 1),
    "preemptions": (1, 1),
    "refill": (1, "tenth"),  # s to compute its KVs anew
    "granted": (0, "token_budget"),  # tokens in the plan
    "blocks": (0, "kv_blocks"),  # KV blocks that it holds
}
NUM_GLOBAL, NUM_SLOT = len(GLOBAL_FEATURES), len(SLOT_FEATURES)
SLACK = list(SLOT_FEATURES).index("slack")  # the one feature that may be negative
TIMES, ALL = 1, 2  # of the visible requests, only what time changes has to be written anew, or everything
_ENDLESS = 1e30  # the slack of a request without target


def scales(slots: int, units: dict[str, float]) -> NDArray[np.float32]:
    """(2, D) float32: a and b of each feature, `units` saying what stands in place of names."""
    features = [*GLOBAL_FEATURES.values(), *list(SLOT_FEATURES.values()) * slots]
    pairs = [(a, units[b] if isinstance(b, str) else b) for a, b in features]
    return np.ascontiguousarray(np.array(pairs, np.float32).T)


_NONE, _CLASS, _PREDICTED, _ORACLE = (int(x) for x in LengthInfo)
_OLDEST, _NEWEST, _SHORTEST, _LONGEST = (int(x) for x in RunningOrder)


# ---------------------------------------------------------------------- who is visible

# Records of requests lie far apart, and hundreds of environments do not fit into the caches. So what the mask
# and the observation ask of the visible requests is kept together, in `brief`.


@njit
def find_waiting(env: Env) -> None:
    """The first waiting requests in queue order, except those preempted in this plan where they cannot be
    admitted in it."""
    e, v = env.e, env.v
    n = 0
    r = queue.first(e)
    while r >= 0 and n < v.waiting_slots:
        if v.readmit or e.req[r].evicted_at != e.s.iterations:
            _put_waiting(env, n, r)
            n += 1
        r = queue.following(e, r)
    v.num_wait = n
    v.stale_wait = 0
    v.see_wait = ALL


@njit(forceinline=True)
def _put_waiting(env: Env, k: int, r: int) -> None:
    e, v = env.e, env.v
    q = e.req[r]
    hold = hold_tokens(e, q, e.s.hold)
    v.wait[k] = r
    b = env.brief[k]
    b.rest = q.prompt + q.generated
    b.hold = blocks_for(e, hold) if hold > 0 else 0
    _sum_up(env, k, q)


@njit(forceinline=True)
def _sum_up(env: Env, slot: int, q) -> None:  # type: ignore[no-untyped-def]
    """What stays as it is while the request keeps this slot; running slots count on from the waiting ones."""
    v, b = env.v, env.brief[slot]
    b.arrival = q.arrival
    b.tpot = q.tpot_target
    if v.length_info == _NONE:
        b.length = 0.0
    elif v.length_info == _ORACLE:
        b.length = np.float64(q.stop)
    elif v.length_info == _PREDICTED:
        b.length = q.predicted
    else:
        b.length = v.class_means[min(q.class_id, MOST_CLASSES - 1)]
    b.class_id = q.class_id
    b.preemptions = q.preemptions
    b.generated = q.generated
    first_due = q.arrival + q.ttft_target
    b.due = first_due if q.generated == 0 else q.first_token + q.generated * q.tpot_target


@njit(forceinline=True)
def _move(env: Env, to: int, slot: int, count: int) -> None:
    """Move `count` visible requests from `slot` on to other slots, with their rows of the observation."""
    move(env.brief, to, slot, count)
    move(env.observation, NUM_GLOBAL + to * NUM_SLOT, NUM_GLOBAL + slot * NUM_SLOT, count * NUM_SLOT)


@njit(forceinline=True)
def drop_waiting(env: Env, slot: int) -> None:
    """The request in this slot is about to be admitted: the others move up, and the next becomes visible."""
    e, v = env.e, env.v
    last = v.num_wait - 1
    after = -1
    if v.num_wait == v.waiting_slots:
        after = queue.following(e, v.wait[last])
        while after >= 0 and e.req[after].evicted_at == e.s.iterations and not v.readmit:
            after = queue.following(e, after)
    move(v.wait, slot, slot + 1, last - slot)
    _move(env, slot, slot + 1, last - slot)
    if after >= 0:
        _put_waiting(env, last, after)
        _write_waiting(env, last)
    else:
        v.num_wait = last
        _write_nobody(env, last, 1)


@njit
def find_running(env: Env) -> None:
    """The visible running requests."""
    e, v = env.e, env.v
    n = e.s.num_running
    seen = min(n, v.running_slots)
    before = v.num_run
    v.num_run = seen
    if v.running_order == _SHORTEST or v.running_order == _LONGEST:
        _find_by_length(env)
        before = 0
    for k in range(seen):
        if v.running_order == _OLDEST:
            r = e.running[k]
        elif v.running_order == _NEWEST:
            r = e.running[n - 1 - k]
        else:
            r = v.run[k]
        if k >= before or v.run[k] != r:
            v.run[k] = r
            _sum_up(env, v.waiting_slots + k, e.req[r])
        _ask_running(env, k)
    v.stale_run = 0
    v.see_run = ALL


@njit(forceinline=True)
def _ask_running(env: Env, k: int) -> None:
    """What the mask asks of the request in running slot k."""
    e, v = env.e, env.v
    q, b = e.req[v.run[k]], env.brief[v.waiting_slots + k]
    rest = q.target - q.computed
    b.rest = rest if q.granted == 0 else 0
    b.room = q.blocks * e.s.block_size - q.computed
    b.fixed = 1 if q.granted > 0 and rest > 0 else 0


@njit
def _find_by_length(env: Env) -> None:
    """The running requests with the fewest, or most, KVs."""
    e, v = env.e, env.v
    sign = 1 if v.running_order == _SHORTEST else -1
    have = 0
    for k in range(e.s.num_running):
        r = e.running[k]
        key = sign * e.req[r].computed
        if have < v.num_run:
            at = have
            have += 1
        elif key < sign * e.req[v.run[have - 1]].computed:
            at = have - 1
        else:
            continue
        while at > 0 and sign * e.req[v.run[at - 1]].computed > key:
            v.run[at] = v.run[at - 1]
            at -= 1
        v.run[at] = r


@njit(forceinline=True)
def running_joined(env: Env) -> None:
    """A request was admitted, and of the running ones nothing else has changed."""
    e, v = env.e, env.v
    n = e.s.num_running
    if v.stale_run or v.running_order > _NEWEST:
        find_running(env)
        return
    seen = min(n, v.running_slots)
    k = 0
    if v.running_order == _NEWEST:
        _move_running(env, 1, 0, seen - 1)
    else:
        k = n - 1
        if k >= seen:
            return
    v.num_run = seen
    _put_running(env, k, e.running[n - 1])


@njit(forceinline=True)
def _move_running(env: Env, to: int, k: int, count: int) -> None:
    move(env.v.run, to, k, count)
    _move(env, env.v.waiting_slots + to, env.v.waiting_slots + k, count)


@njit(forceinline=True)
def _put_running(env: Env, k: int, r: int) -> None:
    """The request in running slot k is r now."""
    env.v.run[k] = r
    _sum_up(env, env.v.waiting_slots + k, env.e.req[r])
    running_changed(env, k)


@njit(forceinline=True)
def running_changed(env: Env, slot: int) -> None:
    """The request in this slot got tokens, and of the running ones nothing else has changed."""
    _ask_running(env, slot)
    _write_running(env, slot)


@njit(forceinline=True)
def running_left(env: Env, slot: int) -> None:
    """The request in this slot was preempted, and of the running ones nothing else has changed."""
    e, v = env.e, env.v
    n = e.s.num_running
    if v.stale_run or v.running_order > _NEWEST:
        find_running(env)
        return
    last = v.num_run - 1
    _move_running(env, slot, slot + 1, last - slot)
    if n > last:  # one more becomes visible
        _put_running(env, last, e.running[last if v.running_order == _OLDEST else n - 1 - last])
    else:
        v.num_run = last
        _write_nobody(env, v.waiting_slots + last, 1)


# ---------------------------------------------------------------------- what is seen of them


@njit(forceinline=True)
def observe(env: Env) -> None:
    """Bring `observation` up to date; the visible requests have been found."""
    v = env.v
    if v.see_wait == ALL:
        for k in range(v.num_wait):
            _write_waiting(env, k)
        _write_nobody(env, v.num_wait, v.waiting_slots - v.num_wait)
    elif v.see_wait == TIMES:
        for k in range(v.num_wait):
            _write_times(env, k, env.brief[k].due)
    v.see_wait = 0
    if v.see_run:
        for k in range(v.num_run):
            _write_running(env, k)
        _write_nobody(env, v.waiting_slots + v.num_run, v.running_slots - v.num_run)
        v.see_run = 0
    _see_engine(env)


@njit(forceinline=True)
def _write_nobody(env: Env, slot: int, slots: int) -> None:
    at = NUM_GLOBAL + slot * NUM_SLOT
    for i in range(at, at + slots * NUM_SLOT):
        env.observation[i] = 0.0


@njit(forceinline=True)
def _put(out, scales, i: int, raw: float) -> None:  # type: ignore[no-untyped-def]
    """Write feature i, normalised; one by one: reading back as a vector what was just written stalls."""
    x = np.float32(raw)
    out[i] = x / (scales[i] * abs(x) + scales[len(out) + i])


@njit(forceinline=True)
def _see_engine(env: Env) -> None:
    e, v, out, scales = env.e, env.v, env.observation, env.scales
    s = e.s
    hidden_kv = 0
    if s.num_running > v.num_run:
        hidden_kv = s.kv_blocks - s.free
        for k in range(v.num_run):
            hidden_kv -= e.req[v.run[k]].blocks
    tokens = 0
    for k in range(v.num_wait):
        tokens += env.brief[k].rest
    _put(out, scales, 0, s.kv_blocks - s.free)
    _put(out, scales, 1, max(0, s.budget))
    _put(out, scales, 2, s.num_running)
    _put(out, scales, 3, s.num_waiting)
    _put(out, scales, 4, tokens)
    _put(out, scales, 5, s.num_running)
    _put(out, scales, 6, s.num_waiting - v.num_wait)
    _put(out, scales, 7, s.num_running - v.num_run)
    _put(out, scales, 8, hidden_kv)
    _put(out, scales, 9, s.prefill_tokens)
    _put(out, scales, 10, s.decodes)
    _put(out, scales, 11, s.prefill_requests)
    _put(out, scales, 12, iteration_time(e))
    _put(out, scales, 13, v.held)
    _put(out, scales, 14, 1.0 if v.phase == 0 else 0.0)
    _put(out, scales, 15, s.num_victims)
    _put(out, scales, 16, v.time_scale * v.arrival_rate)
    _put(out, scales, 17, v.time_scale * v.departure_rate)
    _put(out, scales, 18, v.iteration_time)
    _put(out, scales, 19, s.clock)


@njit(forceinline=True)
def _write_times(env: Env, slot: int, due: float) -> None:
    out, scales, now = env.observation, env.scales, env.e.s.clock
    at = NUM_GLOBAL + slot * NUM_SLOT
    _put(out, scales, at + 5, now - env.brief[slot].arrival)
    _put(out, scales, at + 6, min(due - now, _ENDLESS))


@njit(forceinline=True)
def _write_waiting(env: Env, k: int) -> None:
    """Write the row of waiting slot k."""
    out, scales, b = env.observation, env.scales, env.brief[k]
    at = NUM_GLOBAL + k * NUM_SLOT
    out[at] = 1.0
    _put(out, scales, at + 1, b.rest)
    out[at + 2] = 0.0
    _put(out, scales, at + 3, b.generated)
    _put(out, scales, at + 4, max(1.0, b.length - b.generated) if b.length > 0.0 else 0.0)
    _write_times(env, k, b.due)
    _put(out, scales, at + 7, b.class_id)
    _put(out, scales, at + 8, b.preemptions)
    out[at + 9] = out[at + 10] = out[at + 11] = 0.0


@njit(forceinline=True)
def _write_running(env: Env, k: int) -> None:
    """Write the row of running slot k."""
    slot = env.v.waiting_slots + k
    _write_row(env.e.req[env.v.run[k]], env.brief[slot], env.e.cost, env.observation, env.scales, slot)
    q, b = env.e.req[env.v.run[k]], env.brief[slot]
    _write_times(env, slot, b.due if q.generated == 0 else q.first_token + q.generated * b.tpot)


@njit
def _write_row(q, b, cost, out, scales, slot: int) -> None:  # type: ignore[no-untyped-def]
    """All of a running request's row but the times."""
    at = NUM_GLOBAL + slot * NUM_SLOT
    out[at] = 1.0
    _put(out, scales, at + 1, max(0, q.target - q.computed))
    _put(out, scales, at + 2, q.computed)
    _put(out, scales, at + 3, q.generated)
    _put(out, scales, at + 4, max(1.0, b.length - q.generated) if b.length > 0.0 else 0.0)
    _put(out, scales, at + 7, b.class_id)
    _put(out, scales, at + 8, b.preemptions)
    have = np.float64(q.computed)
    _put(
        out,
        scales,
        at + 9,
        batch_time(cost, have, 1.0, 0.5 * have * have, 0.0, 0.0, 0.0) if have > 0.0 else 0.0,
    )
    _put(out, scales, at + 10, q.granted)
    _put(out, scales, at + 11, q.blocks)
