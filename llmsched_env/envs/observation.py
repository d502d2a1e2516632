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
# half at b and below 1 for ever. What stands in place of b is looked up when an environment is made (`scales`).
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
_ENDLESS = 1e30  # the slack of a request without target


def scales(slots: int, units: dict[str, float]) -> NDArray[np.float32]:
    """(2, D) float32: a and b of each feature, `units` saying what stands in place of names."""
    features = [*GLOBAL_FEATURES.values(), *list(SLOT_FEATURES.values()) * slots]
    pairs = [(a, units[b] if isinstance(b, str) else b) for a, b in features]
    return np.ascontiguousarray(np.array(pairs, np.float32).T)


_NONE, _CLASS, _PREDICTED, _ORACLE = (int(x) for x in LengthInfo)
_OLDEST, _NEWEST, _SHORTEST, _LONGEST = (int(x) for x in RunningOrder)


# ---------------------------------------------------------------------- who is visible


@njit
def find_waiting(env: Env) -> None:
    """The first waiting requests in queue order, but for those preempted in this plan, which cannot be admitted
    in it."""
    e, v = env.e, env.v
    n = 0
    r = queue.first(e)
    while r >= 0 and n < v.waiting_slots:
        if e.req[r].evicted_at != e.s.iterations:
            v.wait[n] = r
            n += 1
        r = queue.following(e, r)
    v.num_wait = n
    v.stale = 0


@njit
def drop_waiting(env: Env, slot: int) -> None:
    """The request in this slot is about to be admitted: the others move up, and the next becomes visible."""
    e, v = env.e, env.v
    last = v.num_wait - 1
    after = -1
    if v.num_wait == v.waiting_slots:
        after = queue.following(e, v.wait[last])
        while after >= 0 and e.req[after].evicted_at == e.s.iterations:
            after = queue.following(e, after)
    for k in range(slot, last):
        v.wait[k] = v.wait[k + 1]
    if after >= 0:
        v.wait[last] = after
    else:
        v.num_wait = last


@njit
def find_running(env: Env) -> None:
    """The visible running requests."""
    e, v = env.e, env.v
    n = e.s.num_running
    seen = min(n, v.running_slots)
    v.num_run = seen
    if v.running_order == _OLDEST:
        for k in range(seen):
            v.run[k] = e.running[k]
    elif v.running_order == _NEWEST:
        for k in range(seen):
            v.run[k] = e.running[n - 1 - k]
    else:
        sign = 1 if v.running_order == _SHORTEST else -1
        have = 0
        for k in range(n):
            r = e.running[k]
            key = sign * e.req[r].computed
            if have < seen:
                at = have
                have += 1
            elif key < sign * e.req[v.run[seen - 1]].computed:
                at = seen - 1
            else:
                continue
            while at > 0 and sign * e.req[v.run[at - 1]].computed > key:
                v.run[at] = v.run[at - 1]
                at -= 1
            v.run[at] = r


# ---------------------------------------------------------------------- what is seen of them


@njit
def observe(env: Env) -> None:
    """Write all features into `observation`; the visible requests have been found."""
    v = env.v
    _see_engine(env)
    at = NUM_GLOBAL
    at = _see_requests(env, v.wait, v.num_wait, v.waiting_slots, at)
    _see_requests(env, v.run, v.num_run, v.running_slots, at)
    out, n = env.observation, len(env.observation)
    for i in range(n):
        x = out[i]
        out[i] = x / (env.scales[i] * abs(x) + env.scales[n + i])


@njit(forceinline=True)
def _see_requests(env: Env, slots, seen: int, all_slots: int, at: int) -> int:  # type: ignore[no-untyped-def]
    for k in range(seen):
        _see_request(env, slots[k], at)
        at += NUM_SLOT
    for i in range(at, at + (all_slots - seen) * NUM_SLOT):
        env.observation[i] = 0.0
    return at + (all_slots - seen) * NUM_SLOT


@njit
def _see_engine(env: Env) -> None:
    e, v, out = env.e, env.v, env.observation
    s = e.s
    hidden_kv = 0
    if s.num_running > v.num_run:
        hidden_kv = s.kv_blocks - s.free
        for k in range(v.num_run):
            hidden_kv -= e.req[v.run[k]].blocks
    tokens = 0
    for k in range(v.num_wait):
        q = e.req[v.wait[k]]
        tokens += q.prompt + q.generated
    out[0] = s.kv_blocks - s.free
    out[1] = max(0, s.budget)
    out[2] = s.num_running
    out[3] = s.num_waiting
    out[4] = tokens
    out[5] = s.num_running
    out[6] = s.num_waiting - v.num_wait
    out[7] = s.num_running - v.num_run
    out[8] = hidden_kv
    out[9] = s.prefill_tokens
    out[10] = s.decodes
    out[11] = s.prefill_requests
    out[12] = iteration_time(e)
    out[13] = v.held
    out[14] = 1.0 if v.phase == 0 else 0.0
    out[15] = s.num_victims
    out[16] = v.time_scale * v.arrival_rate
    out[17] = v.time_scale * v.departure_rate
    out[18] = v.iteration_time
    out[19] = s.clock


@njit(forceinline=True)
def _see_request(env: Env, r: int, at: int) -> None:
    e, out = env.e, env.observation
    s, q = e.s, e.req[r]
    out[at] = 1.0
    out[at + 1] = max(0, q.target - q.computed) if q.blocks > 0 else q.prompt + q.generated
    out[at + 2] = q.computed
    out[at + 3] = q.generated
    out[at + 4] = _expected(env, q)
    out[at + 5] = s.clock - q.arrival
    out[at + 6] = _slack(env, q)
    out[at + 7] = q.class_id
    out[at + 8] = q.preemptions
    have = np.float64(q.computed)
    out[at + 9] = batch_time(e.cost, have, 1.0, 0.5 * have * have, 0.0, 0.0, 0.0) if have > 0.0 else 0.0
    out[at + 10] = q.granted
    out[at + 11] = q.blocks


@njit(forceinline=True)
def _expected(env: Env, q) -> float:  # type: ignore[no-untyped-def]
    """Output tokens still expected, at least 1; 0 if nothing is known."""
    v = env.v
    if v.length_info == _NONE:
        return 0.0
    if v.length_info == _ORACLE:
        length = np.float64(q.stop)
    elif v.length_info == _PREDICTED:
        length = q.predicted
    else:
        length = v.class_means[min(q.class_id, MOST_CLASSES - 1)]
    return max(1.0, length - q.generated)


@njit(forceinline=True)
def _slack(env: Env, q) -> float:  # type: ignore[no-untyped-def]
    """Seconds left until the next token is due."""
    if q.generated == 0:
        due = q.arrival + q.ttft_target
    else:
        due = q.first_token + q.generated * q.tpot_target
    return min(due - env.e.s.clock, _ENDLESS)
