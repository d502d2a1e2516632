"""LTR: all requests in one order, by predicted length; who is not among the first makes room, by swapping."""

from __future__ import annotations

import dataclasses

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.engine import evict, grant, grant_error, swap_in
from llmsched_env.core.facts import known_tokens
from llmsched_env.core.state import Engine, Status
from llmsched_env.errors import InputError
from llmsched_env.scheduling.common import more_blocks, next_tokens

_WAITING, _RUNNING, _SWAPPED, _FINISHED = (
    int(x) for x in (Status.WAITING, Status.RUNNING, Status.SWAPPED, Status.FINISHED)
)


@dataclasses.dataclass(frozen=True)
class LTR:
    """Parameters of LTR.

    Attributes:
        remaining: whether the order is by the predicted length that is left (SRTF), rather than by the whole.
        starvation: iterations without a token after which a request comes before all others,
        period: for so many iterations in which it gets one.
    """

    remaining: bool = False
    starvation: int = 200
    period: int = 10

    def __post_init__(self) -> None:
        if self.starvation < 1 or self.period < 1:
            raise InputError(f"starvation and period must be at least 1 iteration, not {self}")


_REMAINING, _STARVATION, _PERIOD = range(3)

# Every unfinished request is in one list, linked by `req.before` and `req.after`, in order of `req.count`,
# the iteration since which it is idle. The queue holds those that wait, by score. `req.level`: for how many
# of its iterations it still comes first. `work`: requests seen, head and tail of the list (a request plus 1;
# 0: empty), a heap of those that run or are swapped out, the selected requests, their tokens.
_SEEN, _FIRST, _LAST, _HEAP = range(4)


def ranked_size(num_requests: int, num_clients: int) -> int:
    """float64 numbers of workspace."""
    return _HEAP + 3 * num_requests


@njit
def plan_ranked(e: Engine) -> None:
    """Plan one iteration: the first in order, as many as token budget, places and memory allow.

    Takes O(n log n) for n requests that run or are swapped out.
    """
    s, req, work = e.s, e.req, e.work
    _see_arrivals(e)
    _prevent_starvation(e)
    n = _select(e)
    n = _make_room(e, n)
    chosen, tokens = _HEAP + len(req), _HEAP + 2 * len(req)
    for i in range(n):
        r = int(work[chosen + i])
        q = req[r]
        q.chosen = 0
        if q.status == _SWAPPED and q.cpu_blocks <= s.free:
            swap_in(e, r)
        if grant_error(e, r, int(work[tokens + i])) == 0:
            grant(e, r, int(work[tokens + i]))
            q.level = max(0, q.level - 1)
            _move_to_end(e, r, s.iterations + 1)
    for k in range(s.num_victims):
        if req[e.victims[k]].status == _WAITING:  # the CPU tier is full
            _requeue(e, e.victims[k])


@njit
def _score(e: Engine, q) -> float:  # type: ignore[no-untyped-def]
    """What the order is by, least first; below 0 for requests that come before all others."""
    score = max(0.0, q.predicted - q.generated) if e.s.x[_REMAINING] > 0.0 else q.predicted
    return -1.0 / (1.0 + score) if q.level > 0 else score


# ------------------------------------------------------------------------------------------------- starvation


@njit
def _see_arrivals(e: Engine) -> None:
    for r in range(int(e.work[_SEEN]), e.s.arrived):
        if e.req[r].status == _WAITING:
            _append(e, r, e.s.iterations)
    e.work[_SEEN] = e.s.arrived


@njit
def _append(e: Engine, r: int, since: int) -> None:
    q = e.req[r]
    q.count = since
    last = int(e.work[_LAST]) - 1
    q.before, q.after = last, -1
    if last >= 0:
        e.req[last].after = r
    else:
        e.work[_FIRST] = r + 1
    e.work[_LAST] = r + 1


@njit
def _remove(e: Engine, r: int) -> None:
    q = e.req[r]
    if q.before >= 0:
        e.req[q.before].after = q.after
    else:
        e.work[_FIRST] = q.after + 1
    if q.after >= 0:
        e.req[q.after].before = q.before
    else:
        e.work[_LAST] = q.before + 1


@njit
def _move_to_end(e: Engine, r: int, since: int) -> None:
    _remove(e, r)
    _append(e, r, since)


@njit
def _requeue(e: Engine, r: int) -> None:
    """Put waiting request r where its score belongs."""
    queue.remove(e, r)
    e.req[r].key = _score(e, e.req[r])
    e.req[r].order = e.req[r].rank
    queue.insert(e, r)


@njit
def _prevent_starvation(e: Engine) -> None:
    """Who got no token for long comes first from now on."""
    s, req = e.s, e.req
    while e.work[_FIRST] > 0.0:
        r = int(e.work[_FIRST]) - 1
        q = req[r]
        if q.status == _FINISHED:
            _remove(e, r)
            continue
        if s.iterations - q.count < s.x[_STARVATION]:
            return
        q.level = int(s.x[_PERIOD])
        _move_to_end(e, r, s.iterations)
        if q.status == _WAITING:
            _requeue(e, r)


# -------------------------------------------------------------------------------------------------- selection


@njit
def _select(e: Engine) -> int:
    """Note the first in order and their tokens, while budget and places last; returns how many."""
    s, req, work = e.s, e.req, e.work
    chosen, tokens = _HEAP + len(req), _HEAP + 2 * len(req)
    size = 0
    for k in range(s.num_running + s.num_swapped):
        r = e.running[k] if k < s.num_running else e.swapped[k - s.num_running]
        if next_tokens(req[r]) > 0:
            req[r].score = _score(e, req[r])
            work[_HEAP + size] = r
            size += 1
    for i in range(size // 2 - 1, -1, -1):
        _sink(e, int(work[_HEAP + i]), i, size)
    n, left = 0, s.token_budget
    waiting = queue.first(e)
    while n < s.max_num_seqs and left > 0:
        top = int(work[_HEAP]) if size > 0 else -1
        if top < 0 and waiting < 0:
            break
        if top < 0 or (waiting >= 0 and req[waiting].key < req[top].score):
            r = waiting
            want = known_tokens(req[r])
            waiting = queue.following(e, waiting)
        else:
            r = top
            want = next_tokens(req[r])
            size -= 1
            _sink(e, int(work[_HEAP + size]), 0, size)
        want = min(want, left)
        req[r].chosen = 1
        work[chosen + n] = r
        work[tokens + n] = want
        n += 1
        left -= want
    return n


@njit
def _sink(e: Engine, r: int, i: int, size: int) -> None:
    """Put r at place i of the heap, or as far below as its score belongs."""
    work = e.work
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and _ahead(e, int(work[_HEAP + child + 1]), int(work[_HEAP + child])):
            child += 1
        if not _ahead(e, int(work[_HEAP + child]), r):
            break
        work[_HEAP + i] = work[_HEAP + child]
        i = child
    if i < size:
        work[_HEAP + i] = r


@njit
def _ahead(e: Engine, a: int, b: int) -> bool:
    p, q = e.req[a], e.req[b]
    return p.score < q.score or (p.score == q.score and a < b)


@njit
def _make_room(e: Engine, n: int) -> int:
    """Swap out others, last in order first, then selected ones from the end, until the rest fits.

    Returns how many stay.

    As in vLLM v0 a running request counts as one block, and a watermark stays free; the very first needs no
    more than it needs.
    """
    s, req, work = e.s, e.req, e.work
    chosen = _HEAP + len(req)
    need, places = 0, 0
    for i in range(n):
        r = int(work[chosen + i])
        need += _need(e, r)
        places += 0 if req[r].status == _RUNNING else 1
    while n > 0 and (need + s.watermark_blocks > s.free or s.num_running + places > s.max_num_seqs):
        worst = -1
        for k in range(s.num_running):
            v = e.running[k]
            if req[v].chosen == 0 and (worst < 0 or _ahead(e, worst, v)):
                worst = v
        if worst >= 0:
            evict(e, worst)
            continue
        if n == 1:
            break
        n -= 1
        r = int(work[chosen + n])
        req[r].chosen = 0
        need -= _need(e, r)
        if req[r].status == _RUNNING:
            evict(e, r)
        else:
            places -= 1
    return n


@njit
def _need(e: Engine, r: int) -> int:
    """KV blocks that count for request r."""
    q = e.req[r]
    if q.status == _RUNNING:
        return 1
    return q.cpu_blocks + 1 if q.status == _SWAPPED else more_blocks(e, q, known_tokens(q))
