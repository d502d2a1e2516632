"""What an engine can do, one compiled function each: let requests arrive, give tokens, preempt, swap in, run
the iteration.

A scheduler plans an iteration by calling `grant` and `evict` (`swap_in`, `refund`), which take effect on the
KV cache at once, as in the real engines; `execute` then runs the planned batch: the clock advances by the
cost model, tokens come out, what finished is freed. Every rule is checked where it could be broken: a
function that would break one changes nothing, notes the error in the engine's record and returns False.
"""

from __future__ import annotations

import enum

import numpy as np

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.cost import batch_time
from llmsched_env.core.cruise import join, step
from llmsched_env.core.facts import (
    blocks_for,
    finish,
    hold_tokens,
    known_tokens,
    length_class,
    random_unit,
)
from llmsched_env.core.histogram import itl_bin
from llmsched_env.core.span import prefetch
from llmsched_env.core.state import Engine, Error, Status

# Plain integers: compiled code compares them fastest.
FUTURE, WAITING, RUNNING, SWAPPED, EVICTED, FINISHED, DROPPED = (int(x) for x in Status)


class Order(enum.IntEnum):
    """The order of the waiting queue. Ties go to the earlier arrival."""

    FIFO = 0  # as they entered
    ARRIVAL = 1
    PRIORITY = 2  # lower value first
    PROMPT = 3  # shortest prompt first
    OUTPUT = 4  # shortest predicted output first
    TOTAL = 5  # fewest prompt and predicted output tokens first
    AREA = 6  # least predicted KV area first: O * I + O^2 / 2 token-iterations
    REMAINING = 7  # least predicted output left first
    DEADLINE = 8  # earliest time-to-first-token deadline first
    BOOST = 9  # arrival less a bonus for little prefill
    ATTAINED = 10  # fewest tokens of the answer first, in levels that double: up to 31, 95, 223, ...
    SCORE = 11  # by the score that the scheduler itself keeps
    RANDOM = 12
    LONGEST = 13  # longest prompt first
    LOWER_BOUND = 14  # least output that is sure first: a share of the prediction, or what has come out


class Place(enum.IntEnum):
    """Where a preempted request enters the queue again."""

    HEAD = 0
    KEY = 1
    END = 2


_FIFO, _ARRIVAL, _PRIORITY, _PROMPT, _OUTPUT, _TOTAL, _AREA, _REMAINING = range(8)
_DEADLINE, _BOOST, _ATTAINED, _SCORE, _RANDOM, _LONGEST, _LOWER_BOUND = range(8, 15)
_HEAD, _KEY, _END = (int(x) for x in Place)
_UNKNOWN_REQUEST, _NOT_SCHEDULABLE = int(Error.UNKNOWN_REQUEST), int(Error.NOT_SCHEDULABLE)
_TWICE = int(Error.TWICE)
_TOKENS, _BUDGET, _KV = int(Error.TOKENS), int(Error.BUDGET), int(Error.KV)
_SEQS, _NOT_RESIDENT, _NOT_PLANNED = int(Error.SEQS), int(Error.NOT_RESIDENT), int(Error.NOT_PLANNED)


@njit
def _fail(e: Engine, error: int, r: int, value: int, limit: int) -> bool:
    if e.s.error == 0:
        e.s.error = error
        e.s.error_request = r
        e.s.error_value = value
        e.s.error_limit = limit
    return False


# ---------------------------------------------------------------------- the queue


@njit
def queue_key(e: Engine, r: int) -> float:
    """The key of request r in the order of the engine's queue, from its present state."""
    q = e.req[r]
    order = e.s.order
    if order == _FIFO:
        return 0.0
    if order == _ARRIVAL:
        return q.arrival
    if order == _PRIORITY:
        return np.float64(q.priority)
    if order == _PROMPT:
        return np.float64(q.prompt)
    if order == _LONGEST:
        return -np.float64(q.prompt)
    if order == _OUTPUT:
        return q.predicted
    if order == _TOTAL:
        return q.prompt + q.predicted
    if order == _AREA:
        return q.predicted * q.prompt + 0.5 * q.predicted * q.predicted
    if order == _REMAINING:
        return q.predicted - q.generated
    if order == _DEADLINE:
        return q.arrival + q.ttft_target
    if order == _BOOST:
        # gamma-boost: arrival - ln(1 / (1 - exp(-gamma * w))) / gamma, w the seconds of its prefill
        w = e.s.boost_s_per_token * known_tokens(q)
        return q.arrival + np.log(-np.expm1(-e.s.boost_gamma * w)) / e.s.boost_gamma
    if order == _ATTAINED:
        return np.float64(length_class(1 + (q.generated >> 5)))
    if order == _LOWER_BOUND:
        return max(e.s.lower_bound * q.predicted, np.float64(q.generated))
    if order == _RANDOM:
        return random_unit(e)
    return q.score


@njit(forceinline=True)
def _need(e: Engine, q) -> int:  # type: ignore[no-untyped-def]
    """Blocks that must be free to admit q, those that it holds included; for a test on the chunk alone at
    least one.
    """
    return max(1, blocks_for(e, max(hold_tokens(e, q, e.s.test), hold_tokens(e, q, e.s.hold))))


@njit
def enter_queue(e: Engine, r: int, place: int) -> None:
    """Put request r into the waiting queue: at the head, by its key, or at the end."""
    s, q = e.s, e.req[r]
    q.status = WAITING
    q.need = _need(e, q)
    if place == _HEAD:
        s.queue_front -= 1
        q.key = queue.FRONT
        q.order = s.queue_front
    elif place == _END or s.order == _FIFO:
        s.queue_back += 1
        q.key = np.inf if s.order != _FIFO else 0.0
        q.order = len(e.req) + s.queue_back  # behind those with an infinite key of their own
    else:
        q.key = queue_key(e, r)
        q.order = q.rank
    queue.insert(e, r)


@njit(forceinline=True)
def arrive(e: Engine, until: float) -> None:
    """Let the requests that arrive up to `until` (s) enter the queue; one that can never be admitted is
    dropped.
    """
    s, req = e.s, e.req
    while s.arrived < len(req) and req[s.arrived].arrival <= until:
        prefetch(req, s.arrived + 2)
        if req[s.arrived].status == FUTURE:
            enter_queue(e, s.arrived, _END if s.preempt_for_priority else _KEY)
        s.arrived += 1


# ---------------------------------------------------------------------- the plan


@njit(forceinline=True)
def begin_plan(e: Engine) -> None:
    """Start an empty plan for the next iteration."""
    s = e.s
    s.num_planned = 0
    s.cruised = 0
    s.num_victims = 0
    s.num_swapped_in = 0
    s.budget = s.token_budget
    s.prefill_tokens = 0
    s.prefill_requests = 0
    s.prefill_context = 0.0
    s.prefill_cached = 0
    s.decodes = 0
    s.decode_context = 0
    s.swapped_tokens = 0


@njit(forceinline=True)
def _demand(e: Engine, r: int) -> tuple[int, int]:
    """Most tokens that request r can use in this iteration, and tokens of KV that it reserves in any case."""
    q = e.req[r]
    if q.status == WAITING:
        return q.prompt + q.generated, hold_tokens(e, q, e.s.hold)
    return max(1, q.target - q.computed), q.hold


@njit
def grant_error(e: Engine, r: int, tokens: int) -> int:
    """The rule (`Error`) that `grant(e, r, tokens)` would break, NONE if it would succeed."""
    s = e.s
    if r < 0 or r >= len(e.req):
        return _UNKNOWN_REQUEST
    q = e.req[r]
    if q.status != WAITING and q.status != RUNNING:
        return _NOT_SCHEDULABLE
    if q.granted > 0:
        return _TWICE
    if s.enforce_budget and tokens > s.budget:
        return _BUDGET
    if q.status == WAITING and (q.in_flight > 0 or s.num_running >= s.max_num_seqs):
        return _SEQS
    rest, hold = _demand(e, r)
    if tokens < 1 or tokens > rest:
        return _TOKENS
    held = max(q.computed + tokens, hold)
    if held > q.blocks * s.block_size and blocks_for(e, held) - q.blocks > s.free:
        return _KV
    return 0


@njit
def _refuse(e: Engine, r: int, tokens: int, error: int) -> bool:
    """Note which rule `grant(e, r, tokens)` would break, with the figures for the message."""
    s = e.s
    if error == _UNKNOWN_REQUEST:
        return _fail(e, error, r, tokens, len(e.req))
    q = e.req[r]
    if error == _BUDGET:
        return _fail(e, error, r, tokens, s.budget)
    if error == _SEQS:
        return _fail(e, error, r, s.num_running, s.max_num_seqs)
    if error == _TOKENS or error == _KV:
        rest, hold = _demand(e, r)
        if error == _TOKENS:
            return _fail(e, error, r, tokens, rest)
        return _fail(e, error, r, blocks_for(e, max(q.computed + tokens, hold)) - q.blocks, s.free)
    return _fail(e, error, r, q.status, 0)


@njit
def grant(e: Engine, r: int, tokens: int) -> bool:
    """Give request r `tokens` tokens in this iteration; admits it if it waits.

    A decoding request gets 1; a prefilling one a chunk of its prompt (after a preemption: of prompt and
    answer so far). KV blocks for the chunk are taken now, at admission also those that the engine's `hold`
    rule reserves. False, with the error noted, if r cannot be scheduled, the tokens are not what it can use,
    or blocks, running slots or (where enforced) the token budget do not suffice.
    """
    s = e.s
    error = grant_error(e, r, tokens)
    if error != 0:
        return _refuse(e, r, tokens, error)
    q = e.req[r]
    rest, hold = _demand(e, r)
    after = q.computed + tokens
    if max(after, hold) > q.blocks * s.block_size:
        need = blocks_for(e, max(after, hold)) - q.blocks
        s.free -= need
        q.blocks += need
    if q.status == WAITING:
        queue.remove(e, r)
        q.status = RUNNING
        q.target = rest
        q.hold = hold
        e.running[s.num_running] = r
        s.num_running += 1
        if np.isnan(q.first_scheduled):
            q.first_scheduled = s.clock
    if q.computed < q.target:
        s.prefill_tokens += tokens
        s.prefill_requests += 1
        s.prefill_context += tokens * (q.computed + 0.5 * tokens)
        s.prefill_cached += q.computed
    else:
        s.decodes += 1
        s.decode_context += after
    q.granted = tokens
    s.budget -= tokens
    e.plan[s.num_planned] = r
    s.num_planned += 1
    return True


@njit
def grant_decodes(e: Engine, i: int, skip_prefills: bool) -> int:
    """`grant` one token each to the running requests from index i on, as long as they decode and find a KV
    block if they need one.

    The same as granting them one by one, for the case that is by far the most frequent. Returns the index of
    the first request that is another case: it prefills (unless those are skipped), finds no block, has a
    token in flight or a place in the plan, or finds the budget used up where decodes are limited by it.
    """
    s, req, running, plan = e.s, e.req, e.running, e.plan
    n, size = s.num_planned, s.block_size
    last = s.num_running
    if s.limit_decodes:
        last = min(last, i + max(0, s.budget))  # one token each
    if s.max_batch_requests > 0:
        last = min(last, i + max(0, s.max_batch_requests - n - s.cruised))
    if s.free_block_for_decode and s.free < 1:
        return i
    start, context = n, 0
    while i < last:
        r = running[i]
        q = req[r]
        computed = q.computed
        if computed < q.target and skip_prefills:
            i += 1
            continue
        if computed < q.target or q.in_flight > 0 or q.granted > 0:
            break
        if computed >= q.blocks * size:
            if s.free < 1:
                break
            s.free -= 1
            q.blocks += 1
            if s.free_block_for_decode and s.free < 1:
                last = i + 1  # the next decode would find no free block
        q.granted = 1
        context += computed + 1
        plan[n] = r
        n += 1
        i += 1
    s.num_planned = n
    s.decodes += n - start
    s.decode_context += context
    s.budget -= n - start
    return i


@njit
def refund(e: Engine, r: int) -> bool:
    """Take the tokens of this iteration back from request r (its KV blocks stay).

    False, with the error noted, if it has none.
    """
    s = e.s
    if r < 0 or r >= len(e.req):
        return _fail(e, _UNKNOWN_REQUEST, r, r, len(e.req))
    q = e.req[r]
    if q.granted == 0:
        return _fail(e, _NOT_PLANNED, r, q.status, 0)
    if q.computed < q.target:
        s.prefill_tokens -= q.granted
        s.prefill_requests -= 1
        s.prefill_context -= q.granted * (q.computed + 0.5 * q.granted)
        s.prefill_cached -= q.computed
    else:
        s.decodes -= 1
        s.decode_context -= q.computed + q.granted
    s.budget += q.granted
    q.granted = 0
    k = s.num_planned - 1
    while e.plan[k] != r:
        k -= 1
    for j in range(k, s.num_planned - 1):
        e.plan[j] = e.plan[j + 1]
    s.num_planned -= 1
    return True


@njit
def _leave_running(e: Engine, r: int) -> None:
    """Take r out of the running list; looked for from its end, where victims mostly are."""
    s = e.s
    k = s.num_running - 1
    while e.running[k] != r:
        k -= 1
    for j in range(k, s.num_running - 1):
        e.running[j] = e.running[j + 1]
    s.num_running -= 1


@njit
def evict(e: Engine, r: int) -> bool:
    """Preempt running request r: its KV blocks are freed, and it waits again, or is swapped to the CPU tier
    where the engine does so.

    With recomputation it enters the queue where the scheduler's `resume` says, at once or (`defer_victims`)
    when the plan is complete. One for which the CPU tier has no room is recomputed.
    """
    s = e.s
    if r < 0 or r >= len(e.req):
        return _fail(e, _UNKNOWN_REQUEST, r, r, len(e.req))
    q = e.req[r]
    if q.status != RUNNING:
        return _fail(e, _NOT_RESIDENT, r, q.status, 0)
    if q.granted > 0:
        refund(e, r)
    _leave_running(e, r)
    if q.evicted_at != s.iterations:  # else it is listed already: admitted again, and preempted again
        e.victims[s.num_victims] = r
        s.num_victims += 1
    s.preemptions += 1
    q.preemptions += 1
    q.evicted_at = s.iterations
    q.evicted_rest = max(0, q.target - q.computed)
    s.free += q.blocks
    s.kv_tokens -= q.computed
    if s.swap and q.blocks <= s.cpu_free:
        q.cpu_blocks = q.blocks
        s.cpu_free -= q.blocks
        q.blocks = 0
        q.swaps += 1
        q.status = SWAPPED
        s.swapped_tokens += q.computed
        e.swapped[s.num_swapped] = r
        s.num_swapped += 1
        return True
    q.blocks = 0
    q.recomputed += q.computed
    s.total_recomputed += q.computed
    q.computed = 0
    q.hold = 0
    if s.defer_victims:
        q.status = EVICTED
    else:
        enter_queue(e, r, s.resume)
    return True


@njit
def swap_in(e: Engine, r: int) -> bool:
    """Bring swapped request r back: it takes its KV blocks and runs again (it still has to be granted a
    token).
    """
    s = e.s
    if r < 0 or r >= len(e.req):
        return _fail(e, _UNKNOWN_REQUEST, r, r, len(e.req))
    q = e.req[r]
    if q.status != SWAPPED:
        return _fail(e, _NOT_SCHEDULABLE, r, q.status, 0)
    if q.cpu_blocks > s.free:
        return _fail(e, _KV, r, q.cpu_blocks, s.free)
    if s.num_running >= s.max_num_seqs:
        return _fail(e, _SEQS, r, s.num_running, s.max_num_seqs)
    k = 0
    while e.swapped[k] != r:
        k += 1
    for j in range(k, s.num_swapped - 1):
        e.swapped[j] = e.swapped[j + 1]
    s.num_swapped -= 1
    s.free -= q.cpu_blocks
    s.cpu_free += q.cpu_blocks
    q.blocks = q.cpu_blocks
    q.cpu_blocks = 0
    q.status = RUNNING
    s.kv_tokens += q.computed
    s.swapped_tokens += q.computed
    s.num_swapped_in += 1
    q.returned_at = s.iterations
    e.running[s.num_running] = r
    s.num_running += 1
    return True


@njit
def drop(e: Engine, r: int) -> None:
    """Give up request r, which waits or is in the CPU tier: it could never be served."""
    s, q = e.s, e.req[r]
    if q.status == WAITING:
        queue.remove(e, r)
    else:
        _leave_swapped(e, r)
        s.kv_tokens -= q.computed
    q.status = DROPPED
    s.num_dropped += 1


@njit(forceinline=True)
def end_plan(e: Engine) -> None:
    """Complete the plan: deferred victims enter the queue, in the order that keeps the running order."""
    s = e.s
    if s.defer_victims:
        for k in range(s.num_victims):
            if e.req[e.victims[k]].status == EVICTED:
                enter_queue(e, e.victims[k], s.resume)


# ---------------------------------------------------------------------- the iteration


@njit(forceinline=True)
def iteration_time(e: Engine) -> float:
    """Seconds that the planned iteration takes: the cost model, and what is swapped."""
    s = e.s
    t = batch_time(
        e.cost,
        s.prefill_tokens,
        s.prefill_requests,
        s.prefill_context,
        s.prefill_cached,
        s.decodes,
        s.decode_context,
    )
    if s.swapped_tokens > 0:
        transfer = s.swapped_tokens * s.swap_s_per_token
        t = max(t, transfer) if s.swap_overlap else t + transfer
    return t


@njit
def _token_out(e: Engine, q, now: float) -> None:  # type: ignore[no-untyped-def]
    """One token of q's answer appears at `now`."""
    s = e.s
    q.generated += 1
    s.total_generated += 1
    if q.generated == 1:
        q.first_token = now
    elif len(e.itl) > 0:
        e.itl[itl_bin(now - q.last_token)] += 1
    q.last_token = now


@njit
def drop_finished(e: Engine) -> None:
    """Close the gaps that finished requests left in the running list, behind those that cruise."""
    s = e.s
    kept = s.cruising
    for k in range(kept, s.num_running):
        r = e.running[k]
        if e.req[r].status == RUNNING:
            e.running[kept] = r
            kept += 1
    s.num_running = kept


@njit(forceinline=True)
def _account(e: Engine, dt: float) -> None:
    """Totals of an iteration of `dt` seconds; `kv_tokens` already counts its tokens."""
    s = e.s
    s.iterations += 1
    s.busy += dt
    s.total_prefill += s.prefill_tokens
    s.total_decode += s.decodes
    s.batch_sum += s.num_planned + s.cruised
    s.kv_seconds += s.kv_tokens * dt
    s.logged_kv = s.kv_tokens


@njit(forceinline=True)
def execute(e: Engine) -> float:
    """Run the planned iteration (synchronous scheduling) and return its duration (s)."""
    s, req, plan = e.s, e.req, e.plan
    dt = iteration_time(e)
    now = s.clock + dt
    s.clock = now
    s.visible = now
    s.kv_tokens += s.prefill_tokens + s.decodes
    _account(e, dt)
    before = s.num_finished
    produced = s.cruised
    # Most requests got their last token together, so that their gaps fall into one bin: count them, then
    # write.
    counted = len(e.itl) > 0
    last, same, slot = np.nan, 0, 0
    for k in range(s.num_planned):
        q = req[plan[k]]
        q.computed += q.granted
        q.granted = 0
        if q.computed < q.prompt + q.generated:
            continue
        produced += 1
        q.generated += 1
        if q.generated == 1:
            q.first_token = now
        elif counted:
            if q.last_token != last:
                if same > 0:
                    e.itl[slot] += same
                last, same, slot = q.last_token, 0, itl_bin(now - q.last_token)
            same += 1
        q.last_token = now
        if q.generated >= q.stop:
            finish(e, plan[k], now)
    if same > 0:
        e.itl[slot] += same
    if s.num_finished > before:
        drop_finished(e)
    if s.cruised > 0:
        if counted:
            e.itl[itl_bin(now - s.cruised_at)] += s.cruised
        s.cruised = 0
        step(e, 1, now)
    if s.may_cruise and s.num_running > s.cruising:
        join(e)
    if produced > 0:
        s.total_generated += produced
        s.last_progress = s.iterations
    return dt


@njit
def collect(e: Engine) -> None:
    """Asynchronous scheduling: see the tokens of the iteration that ended at `clock`."""
    s, req = e.s, e.req
    before = s.num_finished
    for k in range(s.num_pending):
        r = e.pending[k]
        q = req[r]
        q.in_flight -= 1
        waiting = q.status == WAITING
        if waiting:
            queue.remove(e, r)
        _token_out(e, q, s.clock)
        s.last_progress = s.iterations
        if q.generated >= q.stop:
            if q.granted > 0:  # the answer ended by itself: one more token is computed in vain
                q.granted = 0
                s.total_wasted += 1
            if q.status == SWAPPED:
                _leave_swapped(e, r)
            elif waiting:  # what was dropped is not needed again
                q.recomputed -= known_tokens(q) - 1
            finish(e, r, s.clock)
        elif waiting:
            q.need = _need(e, q)
            queue.insert(e, r)
    s.num_pending = 0
    if s.num_finished > before:
        drop_finished(e)


@njit
def _leave_swapped(e: Engine, r: int) -> None:
    s, q = e.s, e.req[r]
    kept = 0
    for k in range(s.num_swapped):
        if e.swapped[k] != r:
            e.swapped[kept] = e.swapped[k]
            kept += 1
    s.num_swapped = kept
    s.cpu_free += q.cpu_blocks
    q.cpu_blocks = 0
    s.kv_tokens += q.computed  # `finish` takes them off again


@njit
def execute_behind(e: Engine) -> float:
    """Run the planned iteration (asynchronous scheduling): its tokens are seen by `collect`, after the next
    plan is made.
    """
    s, req = e.s, e.req
    dt = iteration_time(e)
    s.visible = s.clock
    s.clock += dt
    for k in range(s.num_planned):
        r = e.plan[k]
        q = req[r]
        tokens = q.granted
        if tokens == 0:  # finished while this plan was made
            continue
        q.granted = 0
        q.computed += tokens
        s.kv_tokens += tokens
        if q.computed >= q.prompt + q.generated + q.in_flight:
            q.in_flight += 1
            e.pending[s.num_pending] = r
            s.num_pending += 1
    _account(e, dt)
    return dt
