"""The one scheduling routine: up to four passes over running and waiting requests, their settings making the
system.

After INFERMAX's unified GetNextBatch (arXiv 2411.07447, section 3), widened until the recorded decisions of
vLLM v0 and V1, Sarathi-Serve, Orca and FasterTransformer come out token by token. See `settings.Settings` for
what each setting means.
"""

from __future__ import annotations

import numpy as np

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.cruise import cruise, rest
from llmsched_env.core.engine import Place, drop, enter_queue, evict, grant, grant_decodes, queue_key, swap_in
from llmsched_env.core.facts import CHUNK, blocks_for, known_tokens, length_class
from llmsched_env.core.state import Engine, Level, Listing, Status
from llmsched_env.scheduling.forecast import add_to_forecast, fits_forecast, forecast
from llmsched_env.scheduling.settings import Budget, Pass, Peak, Sort, Victim

_WAITING = int(Status.WAITING)
_HEAD, _KEY, _END = int(Place.HEAD), int(Place.KEY), int(Place.END)
_PASS_RUNNING, _DECODES, _CHUNKS = int(Pass.RUNNING), int(Pass.DECODES), int(Pass.CHUNKS)
_ADMIT, _SWAP_IN, _MERGED = int(Pass.ADMIT), int(Pass.SWAP_IN), int(Pass.MERGED)
_NEWEST, _BY_PRIORITY, _SHORTEST, _LONGEST, _WORST_KEY, _LEAST_KEY = (int(v) for v in Victim)
_SORT_ADMISSION, _SORT_ARRIVAL, _SORT_KV, _SORT_KEY = (int(v) for v in Sort)
_PRESSURE = int(Budget.PRESSURE)
_PEAK_NONE = int(Peak.NONE)

_NEW_FIRST = int(Listing.NEW_FIRST)
_LEFT_OVER, _SWAPPED_IN, _DECODED, _PREFILLED, _NEW = (int(v) for v in Level)


@njit
def plan_unified(e: Engine) -> None:
    """Plan one iteration by the engine's settings."""
    s = e.s
    if s.sort != _SORT_ADMISSION:
        sort_running(e)
    if s.reorder_chunked or s.listing == _NEW_FIRST:
        for k in range(s.num_running):
            e.req[e.running[k]].level = _LEFT_OVER
    cap = chunk_cap(e)
    held = s.prefill_interval > 1 and _prefill_held(e)
    if s.budget_rule == _PRESSURE and _under_pressure(e):
        s.budget = min(s.budget, s.budget_low)
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
            visit_running(e, what, cap, held)
        elif what == _ADMIT:
            if (s.mixed or s.decodes == 0) and not held:
                admit(e, cap)
            if s.preempt_for_priority and s.prefill_requests == 0:
                _preempt_for_priority(e)
        elif what == _SWAP_IN:
            _swap_in(e)
        elif what == _MERGED:
            _visit_merged(e, cap)
    if s.reorder_chunked:
        _reorder_chunked(e)
    if s.prefill_interval > 1 and not held:
        s.saturated = s.num_waiting > 0
        if s.prefill_requests > 0:
            s.last_prefill = s.iterations


# ---------------------------------------------------------------------- running requests


@njit
def visit_running(e: Engine, what: int, cap: int, held: bool) -> None:
    """Give running requests their next tokens, in list order: decodes, chunks, or both."""
    s, req, running = e.s, e.req, e.running
    if not s.mixed and ((what == _DECODES and s.prefill_requests > 0) or (what == _CHUNKS and s.decodes > 0)):
        return
    if s.cruising > 0 and s.cruised == 0 and what != _CHUNKS and not cruise(e):
        rest(e)
    i = s.cruising
    while i < s.num_running:
        if what != _CHUNKS:
            i = grant_decodes(e, i, what == _DECODES or held)
            if i >= s.num_running:
                break
        if s.budget <= 0 and s.limit_decodes and s.limit_prefills:
            break
        if _batch_full(e):
            break
        r = running[i]
        q = req[r]
        passed_over = (what == _DECODES or held) if q.computed < q.target else what == _CHUNKS
        want = 0 if passed_over or q.granted > 0 else _wanted(e, q, cap)
        if want <= 0:
            i += 1
            continue
        i = make_room(e, i, want)
        if i < 0:  # it had to go itself
            i = -1 - i
            continue
        grant(e, r, want)
        i += 1


@njit(forceinline=True)
def _chunk(e: Engine, rest: int, cap: int) -> int:
    """Tokens of the next chunk of a prefill of which `rest` are left; 0: none now."""
    s = e.s
    want = min(rest, cap)
    if not s.limit_prefills or want <= s.budget:
        return want
    return max(0, s.budget) if s.chunked else 0


@njit(forceinline=True)
def _wanted(e: Engine, q, cap: int) -> int:  # type: ignore[no-untyped-def]
    """Tokens that running request q can use now: a chunk, or 1; 0 if the budget is used up, or nothing of it
    is left to compute.
    """
    s = e.s
    if q.computed < q.target:
        return _chunk(e, q.target - q.computed, cap)
    return 0 if q.generated + q.in_flight >= q.limit or (s.limit_decodes and s.budget <= 0) else 1


@njit(forceinline=True)
def _batch_full(e: Engine) -> bool:
    return 0 < e.s.max_batch_requests <= e.s.num_planned + e.s.cruised


@njit
def make_room(e: Engine, i: int, want: int) -> int:
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
    if s.free < need and s.cruising > 0:
        rest(e)
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
    worst = i
    if s.victim == _NEWEST:
        worst = s.num_running - 1
        while req[running[worst]].granted > 0:  # admitted in this iteration, before the decodes
            worst -= 1
        return worst
    for k in range(s.num_running):
        v, w = running[k], running[worst]
        if s.victim == _BY_PRIORITY:
            if _outranks(e, w, v):
                worst = k
        elif s.victim == _LEAST_KEY:
            a, b = queue_key(e, v), queue_key(e, w)
            if a < b or (a == b and v < w):
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
def sort_running(e: Engine) -> None:
    """Order the running list as `sort` says; a stable insertion sort, since it is nearly in order from one
    iteration to the next.
    """
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
    """vLLM v0's running list after a chunked iteration: left-overs, swapped in, decodes, prefills, new
    prefills.
    """
    req, running = e.req, e.running
    for i in range(e.s.num_running):
        r = running[i]
        q = req[r]
        if q.level != _SWAPPED_IN and q.level != _NEW:
            q.level = _LEFT_OVER if q.granted == 0 else _DECODED if q.computed >= q.target else _PREFILLED
        place = _list_place(q)
        k = i - 1
        while k >= 0 and _list_place(req[running[k]]) > place:
            running[k + 1] = running[k]
            k -= 1
        running[k + 1] = r


@njit
def _list_place(q) -> int:  # type: ignore[no-untyped-def]
    """The place of q's kind in that list; of those swapped in, decodes come before prefills."""
    return 2 * q.level + (1 if q.level == _SWAPPED_IN and q.computed < q.target else 0)


# ---------------------------------------------------------------------- admission


@njit
def admit(e: Engine, cap: int) -> None:
    """Admit waiting requests in queue order while they fit."""
    s, req = e.s, e.req
    if (s.num_victims > 0 and not s.admit_after_preemption) or (
        s.num_swapped > 0 and not s.admit_while_swapped
    ):
        return
    misfits = 0
    passed_over = False
    last_key = np.inf  # of those that may be tried behind the first that does not fit
    rows = 0  # of the forecast of memory; 0: it is not made yet
    r = queue.first(e)
    while r >= 0 and req[r].key <= last_key:
        if s.limit_prefills and s.budget <= 0:
            break
        if _batch_full(e):
            break
        q = req[r]
        if s.drop_unfit and q.need + s.watermark_blocks > s.kv_blocks:
            drop(e, r)
            r = queue.first(e)
            continue
        rest = q.evicted_rest if q.evicted_at == s.iterations else known_tokens(q)
        want = _chunk(e, rest, cap)
        if want <= 0:
            if not s.pass_over:
                break
            passed_over = True
            r = queue.following(e, r)
            continue
        room = s.num_running < s.max_num_seqs and _fits(e, r, want, s.free, s.num_running)
        if not room and s.admission_preempts:
            room = _preempt_for(e, r, want)
            if room:
                rows = 0
        if room and s.peak != _PEAK_NONE and s.num_running > 0:  # alone it fits
            if rows == 0:
                rows = forecast(e)
            room = fits_forecast(e, r, rows)
        if room:
            after = queue.following(e, r) if s.backfill > 0 or passed_over else -1
            if rows > 0:
                rows = add_to_forecast(e, r, rows)
            if s.reorder_chunked or s.listing == _NEW_FIRST:
                q.level = _NEW
            if not grant(e, r, want):
                break
            if misfits > 0:
                r = _at_or_after(e, after)
            else:
                r = after if passed_over else queue.first(e)
            continue
        if misfits >= s.backfill or s.num_running >= s.max_num_seqs:
            break
        if misfits == 0 and s.backfill_within < np.inf:
            last_key = s.backfill_within * q.key
        misfits += 1
        r = _at_or_after(e, queue.following(e, r))


@njit(forceinline=True)
def watermark(e: Engine) -> int:
    return e.s.watermark_blocks if e.s.watermark_when_idle or e.s.num_running > 0 else 0


@njit(forceinline=True)
def _at_or_after(e: Engine, r: int) -> int:
    """The first request from r on, in queue order, that the free blocks could take; -1: none."""
    if r < 0:
        return -1
    room = e.s.free - watermark(e)
    return r if e.req[r].need <= room else queue.following_fit(e, r, room)


@njit(forceinline=True)
def _fits(e: Engine, r: int, want: int, free: int, running: int) -> bool:
    """Whether `free` blocks take request r, as `test` asks, above the watermark, while so many requests
    run.
    """
    s, q = e.s, e.req[r]
    need = max(q.need, blocks_for(e, want)) if s.test == CHUNK else q.need
    if s.length_classes and running > 0 and q.prompt >= s.hist_threshold:  # alone it fits
        k = length_class(q.prompt)
        if s.class_count[k] > 0:
            need = max(need, blocks_for(e, int(s.class_total[k] / s.class_count[k])))
    if s.watermark_when_idle or running > 0:
        need += s.watermark_blocks
    return need <= free


@njit(forceinline=True)
def chunk_cap(e: Engine) -> int:
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
def _under_pressure(e: Engine) -> bool:
    """Whether at least two prefills are under way or wait, and somebody decodes (P-PAS, arXiv 2608.15171)."""
    s = e.s
    prefills = 0
    for k in range(s.num_running):
        q = e.req[e.running[k]]
        if q.computed < q.prompt:
            prefills += 1
    return prefills + s.num_waiting >= 2 and prefills < s.num_running


@njit
def _preempt_for(e: Engine, r: int, want: int) -> bool:
    """Preempt running requests whose key is above that of waiting request r, the last in the order first,
    until r fits; nobody, if that would not do."""
    s, req, running = e.s, e.req, e.running
    key = req[r].key
    free, left = s.free, s.num_running
    for k in range(s.num_running):
        v = running[k]
        if _preemptable(e, v) and queue_key(e, v) > key:
            free += req[v].blocks
            left -= 1
    if left >= s.max_num_seqs or not _fits(e, r, want, free, left):
        return False
    while s.num_running >= s.max_num_seqs or not _fits(e, r, want, s.free, s.num_running):
        worst, worst_key = -1, key
        for k in range(s.num_running):
            v = running[k]
            if _preemptable(e, v):
                own = queue_key(e, v)
                if own > worst_key or (own == worst_key and v > worst >= 0):
                    worst, worst_key = v, own
        evict(e, worst)
    return True


@njit
def _preemptable(e: Engine, v: int) -> bool:
    """Whether an admission may preempt running request v (TRAIL protects a request that is far enough)."""
    q = e.req[v]
    return e.s.protect_after == np.inf or q.generated < e.s.protect_after * q.predicted


@njit
def _preempt_for_priority(e: Engine) -> None:
    """vLLM v0's priority policy, after an iteration that admitted nobody: both lists are sorted, and running
    requests of lower rank than the queue's head make room for it; it is admitted in the next iteration at the
    earliest."""
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
            fits = req[head].need + watermark(e) <= s.free
            if fits and tokens <= s.budget and s.num_running < s.max_num_seqs:
                break
            swap, s.swap = s.swap, 0  # by recomputation in any case: the queue takes no swapped ones
            evict(e, e.running[s.num_running - 1])
            s.swap = swap
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
        if want > s.budget or _batch_full(e):
            break
        if not s.mixed and (s.decodes if q.computed < q.target else s.prefill_requests) > 0:
            break
        need = max(q.computed // s.block_size + 1, blocks_for(e, max(q.computed + want, q.hold)))
        if s.drop_unfit and need > s.kv_blocks:
            drop(e, r)
            continue
        if need + watermark(e) > s.free:
            break
        swap_in(e, r)
        q.level = _SWAPPED_IN
        grant(e, r, want)


@njit
def _visit_merged(e: Engine, cap: int) -> None:
    """Serve running and waiting requests together, in the order of the queue's key (INFERMAX's rank
    schedulers).
    """
    s, req = e.s, e.req
    closed = False  # whether a waiting request has failed to fit
    i = 0
    while s.budget > 0 and not _batch_full(e):
        while i < s.num_running and req[e.running[i]].granted > 0:
            i += 1
        head = -1 if closed else queue.first(e)
        running = i < s.num_running
        if not running and head < 0:
            break
        if running and (head < 0 or queue_key(e, e.running[i]) <= req[head].key):
            r = e.running[i]
            want = _wanted(e, req[r], cap)
            if want <= 0:
                i += 1
                continue
            i = make_room(e, i, want)
            if i >= 0:
                grant(e, r, want)
            else:
                i = -1 - i
        else:
            q = req[head]
            want = _chunk(e, q.evicted_rest if q.evicted_at == s.iterations else known_tokens(q), cap)
            if (
                want <= 0
                or s.num_running >= s.max_num_seqs
                or not _fits(e, head, want, s.free, s.num_running)
            ):
                closed = True
            else:
                q.level = _NEW
                grant(e, head, want)
