"""The one scheduling routine: up to four passes over running and waiting requests, their settings making the system.

After INFERMAX's unified GetNextBatch (arXiv 2411.07447, section 3), widened until the recorded decisions of vLLM v0 and V1, Sarathi-Serve,
Orca and FasterTransformer come out token by token. See `settings.Settings` for what each setting means.
"""

from __future__ import annotations

import numpy as np

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.engine import (
    CHUNK,
    Place,
    blocks_for,
    enter_queue,
    evict,
    grant,
    grant_decodes,
    known_tokens,
    length_class,
    queue_key,
    swap_in,
)
from llmsched_env.core.state import Engine, Level, Status
from llmsched_env.scheduling.settings import Budget, Pass, Peak, Sort, Victim

_WAITING, _RUNNING = int(Status.WAITING), int(Status.RUNNING)
_HEAD, _KEY, _END = int(Place.HEAD), int(Place.KEY), int(Place.END)
_PASS_RUNNING, _DECODES, _CHUNKS = int(Pass.RUNNING), int(Pass.DECODES), int(Pass.CHUNKS)
_ADMIT, _SWAP_IN, _MERGED = int(Pass.ADMIT), int(Pass.SWAP_IN), int(Pass.MERGED)
_NEWEST, _BY_PRIORITY, _SHORTEST, _LONGEST, _WORST_KEY = (int(v) for v in Victim)
_SORT_ADMISSION, _SORT_ARRIVAL, _SORT_KV, _SORT_KEY = (int(v) for v in Sort)
_FIXED, _LOAD_ADAPTIVE = int(Budget.FIXED), int(Budget.LOAD_ADAPTIVE)
_PEAK_NONE, _PEAK_PREDICTED, _PEAK_TRUE = (int(v) for v in Peak)

_LEFT_OVER, _SWAPPED_IN, _DECODED, _PREFILLED, _NEW = (int(v) for v in Level)


@njit
def plan_unified(e: Engine) -> None:
    """Plan one iteration by the engine's settings."""
    s = e.s
    if s.sort != _SORT_ADMISSION:
        _sort_running(e)
    if s.reorder_chunked:
        for k in range(s.num_running):
            e.req[e.running[k]].level = _LEFT_OVER
    cap = _chunk_cap(e)
    held = s.prefill_interval > 1 and _prefill_held(e)
    if s.budget_rule == _LOAD_ADAPTIVE:
        _adapt_budget(e)
    for turn in range(4):
        if turn == 0:
            what = s.pass0
        elif turn == 1:
            what = s.pass1
        elif turn == 2:
            what = s.pass2
        else:
            what = s.pass3
        if what == _PASS_RUNNING or what == _DECODES or what == _CHUNKS:
            _visit_running(e, what, cap, held)
        elif what == _ADMIT:
            if (s.mixed or s.decodes == 0) and not held:
                _admit(e, cap)
            if s.preempt_for_priority and s.prefill_requests == 0:
                _preempt_for_priority(e)
        elif what == _SWAP_IN:
            if s.mixed or s.prefill_requests == 0:
                _swap_in(e)
        elif what == _MERGED:
            _visit_merged(e, cap)
    if s.reorder_chunked:
        _reorder_chunked(e)
    if s.prefill_interval > 1 and not held:
        s.saturated = s.num_waiting > 0
        if s.prefill_requests > 0:
            s.last_prefill = s.iterations


# ---------------------------------------------------------------------------------------------------------------- running requests


@njit
def _visit_running(e: Engine, what: int, cap: int, held: bool) -> None:
    """Give running requests their next tokens, in list order: decodes, chunks, or both."""
    s, req, running = e.s, e.req, e.running
    if not s.mixed and ((what == _DECODES and s.prefill_requests > 0) or (what == _CHUNKS and s.decodes > 0)):
        return
    i = 0
    while i < s.num_running:
        if what != _CHUNKS:
            i = grant_decodes(e, i, what == _DECODES or held)
            if i >= s.num_running:
                break
        if s.budget <= 0 and s.limit_decodes:
            break
        if s.max_batch_requests > 0 and s.num_planned >= s.max_batch_requests:
            break
        r = running[i]
        q = req[r]
        if q.granted > 0:
            i += 1
            continue
        want = 1
        if q.computed < q.target:
            if what == _DECODES or held:
                i += 1
                continue
            want = _chunk(e, q.target - q.computed, cap)
            if want <= 0:
                i += 1
                continue
        else:
            if what == _CHUNKS or q.generated + q.in_flight >= q.limit:  # nothing of it is left to compute
                i += 1
                continue
        i = _make_room(e, i, want)
        if i < 0:  # it had to go itself
            i = -1 - i
            continue
        grant(e, r, want)
        i += 1


@njit
def _chunk(e: Engine, rest: int, cap: int) -> int:
    """Tokens of the next chunk of a prefill of which `rest` are left; 0: none now."""
    s = e.s
    want = min(rest, cap)
    if not s.limit_prefills or want <= s.budget:
        return want
    return max(0, s.budget) if s.chunked else 0


@njit
def _make_room(e: Engine, i: int, want: int) -> int:
    """Preempt until the running request at index i finds the blocks for `want` tokens.

    Returns its index afterwards, or -1 - i, where i is the index of the one after it, if it had to go itself.
    """
    s = e.s
    q = e.req[e.running[i]]
    tokens = max(q.computed + want, q.hold)
    need = 0 if tokens <= q.blocks * s.block_size else blocks_for(e, tokens) - q.blocks
    if q.computed >= q.target:
        if s.free_block_for_decode:
            need = max(need, 1)
    elif s.free_block_for_chunk and q.target % s.block_size != 0:
        need = max(need, 1)
    while s.free < need:
        k = _victim(e, i)
        evict(e, e.running[k])
        if k == i:
            return -1 - i
        if k < i:
            i -= 1
    return i


@njit
def _victim(e: Engine, i: int) -> int:
    """Index of the running request that makes room for the one at index i; i itself if nobody else can."""
    s, req, running = e.s, e.req, e.running
    if s.victim == _NEWEST:
        return s.num_running - 1
    worst = i
    for k in range(s.num_running):
        v, w = running[k], running[worst]
        if s.victim == _BY_PRIORITY:
            if _outranks(e, w, v):
                worst = k
        elif req[v].granted == 0:
            if s.victim == _SHORTEST:
                a, b = -float(req[v].computed), -float(req[w].computed)
            elif s.victim == _LONGEST:
                a, b = float(req[v].computed), float(req[w].computed)
            else:
                a, b = queue_key(e, v), queue_key(e, w)
            if a > b or (a == b and v > w):
                worst = k
    return worst


@njit
def _sort_running(e: Engine) -> None:
    """Order the running list as `sort` says; a stable insertion sort, since it is nearly in order from one iteration to the next."""
    running = e.running
    for i in range(1, e.s.num_running):
        r = running[i]
        k = i - 1
        while k >= 0 and _sorts_after(e, running[k], r):
            running[k + 1] = running[k]
            k -= 1
        running[k + 1] = r


@njit
def _sorts_after(e: Engine, a: int, b: int) -> bool:
    sort = e.s.sort
    if sort == _SORT_ARRIVAL:
        return e.req[a].rank > e.req[b].rank
    if sort == _SORT_KV:
        return e.req[a].computed < e.req[b].computed
    x, y = queue_key(e, a), queue_key(e, b)
    return x > y or (x == y and a > b)


@njit
def _reorder_chunked(e: Engine) -> None:
    """vLLM v0's running list after a chunked iteration: left-overs, swapped in, decodes, prefills, new prefills."""
    s, req, running, scratch = e.s, e.req, e.running, e.pending
    for k in range(s.num_running):
        q = req[running[k]]
        if q.level != _SWAPPED_IN and q.level != _NEW:
            q.level = _LEFT_OVER if q.granted == 0 else _DECODED if q.computed >= q.target else _PREFILLED
    n = 0
    for level in range(5):
        for k in range(s.num_running):
            if req[running[k]].level == level:
                scratch[n] = running[k]
                n += 1
    for k in range(n):
        running[k] = scratch[k]


# ---------------------------------------------------------------------------------------------------------------- admission


@njit
def _admit(e: Engine, cap: int) -> None:
    """Admit waiting requests in queue order while they fit."""
    s, req = e.s, e.req
    if (s.num_victims > 0 and not s.admit_after_preemption) or (s.num_swapped > 0 and not s.admit_while_swapped):
        return
    misfits = 0
    profile = 0  # entries of the memory profile that the forward-looking test keeps in `work`; 0: not built
    r = queue.first(e)
    while r >= 0:
        if s.limit_prefills and s.budget <= 0:
            break
        if s.max_batch_requests > 0 and s.num_planned >= s.max_batch_requests:
            break
        q = req[r]
        rest = q.evicted_rest if q.evicted_at == s.iterations else known_tokens(q)
        want = _chunk(e, rest, cap)
        if want <= 0:
            break
        room = s.num_running < s.max_num_seqs and _fits(e, r, want)
        if not room and s.admission_preempts:
            room = _preempt_for(e, r, want)
        if room and s.peak != _PEAK_NONE and s.num_running > 0:  # alone it fits
            if profile == 0:
                profile = _build_profile(e)
            room = _peak_fits(e, r, profile)
        if room:
            after = queue.following(e, r) if s.backfill > 0 else -1
            if profile > 0:
                profile = _add_to_profile(e, r, profile)
            q.level = _NEW
            if not grant(e, r, want):
                break
            r = _at_or_after(e, after) if misfits > 0 else queue.first(e)
            continue
        if misfits >= s.backfill or s.num_running >= s.max_num_seqs:
            break
        misfits += 1
        r = _at_or_after(e, queue.following(e, r))


@njit
def _watermark(e: Engine) -> int:
    return e.s.watermark_blocks if e.s.watermark_when_idle or e.s.num_running > 0 else 0


@njit
def _at_or_after(e: Engine, r: int) -> int:
    """The first request from r on, in queue order, that the free blocks could take; -1: none."""
    if r < 0:
        return -1
    room = e.s.free - _watermark(e)
    return r if e.req[r].need <= room else queue.following_fit(e, r, room)


@njit
def _fits(e: Engine, r: int, want: int) -> bool:
    """Whether the free blocks take request r, as `test` asks, above the watermark."""
    s, q = e.s, e.req[r]
    need = max(q.need, blocks_for(e, want)) if s.test == CHUNK else q.need
    if need + _watermark(e) > s.free:
        return False
    if s.length_classes and q.prompt >= s.hist_threshold:
        k = length_class(q.prompt)
        if s.class_count[k] > 0:
            return blocks_for(e, int(s.class_total[k] / s.class_count[k])) + _watermark(e) <= s.free
    return True


@njit
def _chunk_cap(e: Engine) -> int:
    """Most tokens of one chunk in this iteration."""
    s = e.s
    present = s.num_running + s.num_waiting
    if s.chunk_cap <= 0 or (present <= 1 and not s.chunk_cap_alone):
        return 2**31 - 1
    cap = s.chunk_cap
    if s.chunk_cap_adaptive:
        cap = max(cap, s.token_budget // max(1, present))
    return cap


@njit
def _prefill_held(e: Engine) -> bool:
    """vLLM V1's prefill_schedule_interval: whether prefills wait in this iteration."""
    s = e.s
    if s.last_prefill < 0 or s.saturated or s.iterations - s.last_prefill >= s.prefill_interval:
        return False
    for k in range(s.num_running):
        q = e.req[e.running[k]]
        if q.computed >= q.target:
            return True
    return False


@njit
def _adapt_budget(e: Engine) -> None:
    """A budget that grows with the prompt tokens in the engine, between its two limits; decodes come on top."""
    s = e.s
    backlog = 0
    for k in range(s.num_running):
        q = e.req[e.running[k]]
        backlog += max(0, q.target - q.computed)
    r = queue.first(e)
    seen = 0
    while r >= 0 and backlog < s.budget_high and seen < 64:
        backlog += known_tokens(e.req[r])
        seen += 1
        r = queue.following(e, r)
    s.budget = s.num_running + min(max(backlog, s.budget_low), s.budget_high)


@njit
def _preempt_for(e: Engine, r: int, want: int) -> bool:
    """Preempt running requests that come after waiting request r in the order until r fits; nobody, if that would not do."""
    s, req, running = e.s, e.req, e.running
    key = req[r].key
    room = s.free - _watermark(e)
    seats = s.max_num_seqs - s.num_running
    need = max(req[r].need, blocks_for(e, want))
    for k in range(s.num_running):
        v = running[k]
        if _preemptable(e, v) and queue_key(e, v) > key:
            room += req[v].blocks
            seats += 1
    if room < need or seats < 1:
        return False
    while s.num_running >= s.max_num_seqs or not _fits(e, r, want):
        worst = -1
        for k in range(s.num_running):
            v = running[k]
            if _preemptable(e, v) and (worst < 0 or queue_key(e, v) > queue_key(e, worst)):
                worst = v
        if worst < 0 or queue_key(e, worst) <= key:
            return False
        evict(e, worst)
    return True


@njit
def _preemptable(e: Engine, v: int) -> bool:
    """Whether an admission may preempt running request v (TRAIL protects a request that is far enough)."""
    q = e.req[v]
    return q.generated < e.s.protect_after * q.predicted


@njit
def _preempt_for_priority(e: Engine) -> None:
    """vLLM v0's priority policy, after an iteration that admitted nobody: both lists are sorted, and running requests of lower rank
    than the queue's head make room for it; it is admitted in the next iteration at the earliest."""
    s, req = e.s, e.req
    for i in range(1, s.num_running):
        r = e.running[i]
        k = i - 1
        while k >= 0 and _outranks(e, r, e.running[k]):
            e.running[k + 1] = e.running[k]
            k -= 1
        e.running[k + 1] = r
    head = queue.first(e)
    if head >= 0:
        while s.num_running > 0 and _outranks(e, head, e.running[s.num_running - 1]):
            tokens = known_tokens(req[head])
            fits = req[head].need + _watermark(e) <= s.free
            if fits and tokens <= s.budget and s.num_running < s.max_num_seqs:
                break
            evict(e, e.running[s.num_running - 1])
    # Sort what entered since the last time: victims at the front, arrivals at the end.
    r = queue.first(e)
    while r >= 0 and req[r].key == queue.FRONT:
        queue.remove(e, r)
        enter_queue(e, r, _KEY)
        r = queue.first(e)
    for r in range(s.unsorted, s.arrived):
        if req[r].status == _WAITING and req[r].key == np.inf:
            queue.remove(e, r)
            enter_queue(e, r, _KEY)
    s.unsorted = s.arrived


@njit
def _outranks(e: Engine, a: int, b: int) -> bool:
    """Whether a comes before b in (priority, arrival)."""
    p, q = e.req[a], e.req[b]
    return p.priority < q.priority or (p.priority == q.priority and p.rank < q.rank)


@njit
def _swap_in(e: Engine) -> None:
    """Bring back requests from the CPU tier, oldest first, while they fit with room for their next token."""
    s = e.s
    if s.num_victims > 0:
        return
    while s.num_swapped > 0 and s.num_running < s.max_num_seqs:
        r = e.swapped[0]
        q = e.req[r]
        want = max(1, q.target - q.computed)
        if want > s.budget or s.free - (q.computed // s.block_size + 1) < s.watermark_blocks:
            break
        if not swap_in(e, r):
            break
        q.level = _SWAPPED_IN
        if not grant(e, r, want):
            break


@njit
def _visit_merged(e: Engine, cap: int) -> None:
    """Serve running and waiting requests together, in the order of the queue's key (INFERMAX's rank schedulers)."""
    s, req = e.s, e.req
    closed = False  # whether a waiting request has failed to fit
    i = 0
    while s.budget > 0:
        while i < s.num_running and req[e.running[i]].granted > 0:
            i += 1
        head = -1 if closed else queue.first(e)
        running = i < s.num_running
        if not running and head < 0:
            break
        if running and (head < 0 or queue_key(e, e.running[i]) <= req[head].key):
            r = e.running[i]
            q = req[r]
            want = min(q.target - q.computed, min(cap, s.budget)) if q.computed < q.target else 1
            i = _make_room(e, i, want)
            if i >= 0:
                grant(e, r, want)
            else:
                i = -1 - i
        else:
            q = req[head]
            want = _chunk(e, q.evicted_rest if q.evicted_at == s.iterations else known_tokens(q), cap)
            if want <= 0 or s.num_running >= s.max_num_seqs or not _fits(e, head, want) or not grant(e, head, want):
                closed = True


# ---------------------------------------------------------------------------------------------------------------- looking ahead


@njit
def _remaining(e: Engine, q) -> float:  # type: ignore[no-untyped-def]
    """Output tokens still to come, by the length that the forward-looking test believes; at least 1."""
    length = np.float64(q.stop) if e.s.peak == _PEAK_TRUE else min(q.predicted, np.float64(q.limit))
    return max(1.0, length - q.generated)


@njit
def _held_and_left(e: Engine, r: int) -> tuple[float, float]:
    """Tokens of KV that r holds when its decoding begins or goes on, and decode steps left after that."""
    q = e.req[r]
    slack = e.s.block_size - 1  # a block is taken whole
    if q.status == _RUNNING and q.computed >= q.target:
        return np.float64(q.computed + slack), _remaining(e, q)
    return np.float64(known_tokens(q) + slack), _remaining(e, q) - 1.0


@njit
def _build_profile(e: Engine) -> int:
    """The running requests as (decode steps left, tokens held), longest first, in `work`; returns how many."""
    n = 0
    for k in range(e.s.num_running):
        held, left = _held_and_left(e, e.running[k])
        n = _insert_profile(e, n, held, left)
    return n


@njit
def _insert_profile(e: Engine, n: int, held: float, left: float) -> int:
    work = e.work
    k = n
    while k > 0 and work[2 * k - 2] < left:
        work[2 * k] = work[2 * k - 2]
        work[2 * k + 1] = work[2 * k - 1]
        k -= 1
    work[2 * k] = left
    work[2 * k + 1] = held
    return n + 1


@njit
def _add_to_profile(e: Engine, r: int, n: int) -> int:
    held, left = _held_and_left(e, r)
    return _insert_profile(e, n, held, left)


@njit
def _peak_fits(e: Engine, r: int, n: int) -> bool:
    """Whether the KV cache suffices at every coming completion if r is admitted and all decode in lock-step.

    Memory only grows between completions, so these are the times to check (MC-SF, arXiv 2502.07115): when the request with d decode
    steps left completes, those with at least as many left hold what they hold now plus d tokens each.
    """
    held, left = _held_and_left(e, r)
    work = e.work
    capacity = np.float64(e.s.kv_blocks * e.s.block_size)
    total = 0.0
    count = 0.0
    placed = False
    for k in range(n + 1):
        if not placed and (k == n or work[2 * k] < left):
            placed = True
            total += held
            count += 1.0
            if total + count * left > capacity:
                return False
        if k < n:
            total += work[2 * k + 1]
            count += 1.0
            if total + count * work[2 * k] > capacity:
                return False
    return True
