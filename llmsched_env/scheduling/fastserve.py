"""FastServe: a multi-level feedback queue of all requests, whole prompts, and swapping ahead of need."""

from __future__ import annotations

import dataclasses

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.cost import batch_time
from llmsched_env.core.engine import evict, grant, grant_error, swap_in
from llmsched_env.core.facts import known_tokens
from llmsched_env.core.state import Engine, Status
from llmsched_env.errors import InputError
from llmsched_env.scheduling.common import more_blocks, next_tokens

_WAITING, _RUNNING, _SWAPPED, _FINISHED = (
    int(x) for x in (Status.WAITING, Status.RUNNING, Status.SWAPPED, Status.FINISHED)
)


@dataclasses.dataclass(frozen=True)
class FastServe:
    """Parameters of FastServe.

    Attributes:
        quantum_s: seconds of the highest level; level k has quantum_s * ratio ** k.
        ratio: of the quanta of neighbouring levels.
        skip_join: whether a request joins at the level whose quantum covers its prefill; else at the highest.
        starvation_s: who has not run for so long goes to the front of the highest level,
        starvation_period: looked at after so many iterations.
        reserve_blocks: KV blocks kept free ahead of need, if more than one for each place in the batch.
        proactive: whether blocks are kept free, and requests brought back before their turn.
    """

    quantum_s: float = 0.01
    ratio: float = 2.0
    skip_join: bool = True
    starvation_s: float = 3.0
    starvation_period: int = 1000
    reserve_blocks: int = 0
    proactive: bool = True

    def __post_init__(self) -> None:
        if not (
            self.quantum_s > 0 and self.ratio > 1 and self.starvation_period >= 1 and self.reserve_blocks >= 0
        ):
            raise InputError(
                f"quantum_s > 0, ratio > 1, starvation_period >= 1 and reserve_blocks >= 0 must hold: {self}"
            )


_QUANTUM, _RATIO, _SKIP_JOIN, _STARVATION, _PERIOD, _RESERVE, _PROACTIVE = range(7)

# Every unfinished request that is not in the batch is in a list: two for each level, those that never ran
# and the others, so that the former can be left out. `req.count` is the place within the level, over both
# lists; `req.level` the level; `req.score` the attained time. `work`: numbers, heads and tails of the lists
# (a request plus 1; 0: empty), the batch.
_LEVELS = 32
_CLOCK, _BATCH, _SEEN, _FRONT, _BACK = range(5)
_HEAD = 5
_TAIL = _HEAD + 2 * _LEVELS
_MEMBERS = _TAIL + 2 * _LEVELS


def fastserve_size(num_requests: int, num_clients: int) -> int:
    """float64 numbers of workspace."""
    return _MEMBERS + num_requests


@njit
def plan_fastserve(e: Engine) -> None:
    """Plan one iteration."""
    _take_back(e)
    _join(e)
    n = _form_batch(e)
    n = _reserve(e, n)
    if (e.s.iterations + 1) % int(e.s.x[_PERIOD]) == 0:
        _prevent_starvation(e)
    for i in range(n):
        r = int(e.work[_MEMBERS + i])
        q = e.req[r]
        q.chosen = 0
        tokens = known_tokens(q) if q.status == _WAITING else next_tokens(q)
        if tokens > 0 and grant_error(e, r, tokens) == 0:
            grant(e, r, tokens)
    e.work[_BATCH] = n
    e.work[_CLOCK] = e.s.clock


# -------------------------------------------------------------------------------------------------- the lists


@njit
def _list_of(q) -> int:  # type: ignore[no-untyped-def]
    return 2 * q.level + (0 if np.isnan(q.first_scheduled) else 1)


@njit
def _link(e: Engine, r: int, in_front: bool) -> None:
    """Put request r to the front or the back of its level."""
    req, work = e.req, e.work
    q = req[r]
    which = _list_of(q)
    head, tail = int(work[_HEAD + which]) - 1, int(work[_TAIL + which]) - 1
    if in_front:
        work[_FRONT] -= 1.0
        q.count = int(work[_FRONT])
        q.before, q.after = -1, head
        work[_HEAD + which] = r + 1
        if head >= 0:
            req[head].before = r
        else:
            work[_TAIL + which] = r + 1
    else:
        work[_BACK] += 1.0
        q.count = int(work[_BACK])
        q.before, q.after = tail, -1
        work[_TAIL + which] = r + 1
        if tail >= 0:
            req[tail].after = r
        else:
            work[_HEAD + which] = r + 1


@njit
def _unlink(e: Engine, r: int) -> None:
    """Take request r out of its list."""
    q = e.req[r]
    which = _list_of(q)
    if q.before >= 0:
        e.req[q.before].after = q.after
    else:
        e.work[_HEAD + which] = q.after + 1
    if q.after >= 0:
        e.req[q.after].before = q.before
    else:
        e.work[_TAIL + which] = q.before + 1


@njit
def _earlier(e: Engine, a: int, b: int) -> int:
    """The one of a and b (-1: none) that comes first in its level."""
    if a < 0 or b < 0:
        return max(a, b)
    return a if e.req[a].count < e.req[b].count else b


# ----------------------------------------------------------------------------------------------- an iteration


@njit
def _take_back(e: Engine) -> None:
    """After an iteration: its time counts for all members, who go to the front of their level, in turn.

    Who has used up its quantum goes down a level first.
    """
    s, work = e.s, e.work
    spent = s.clock - work[_CLOCK]
    for i in range(int(work[_BATCH])):
        r = int(work[_MEMBERS + i])
        q = e.req[r]
        if q.status == _FINISHED:
            continue
        q.score += spent
        if q.score > s.x[_QUANTUM] * s.x[_RATIO] ** q.level and q.level < _LEVELS - 1:
            q.level += 1
            q.score = 0.0
        _link(e, r, True)
    work[_BATCH] = 0.0


@njit
def _join(e: Engine) -> None:
    """Put what has arrived into its level."""
    s = e.s
    for r in range(int(e.work[_SEEN]), s.arrived):
        q = e.req[r]
        if q.status != _WAITING:
            continue
        q.level = 0
        if s.x[_SKIP_JOIN] > 0.0:
            p = np.float64(q.prompt)
            seconds = batch_time(e.cost, p, 1.0, 0.5 * p * p, 0.0, 0.0, 0.0)
            while q.level < _LEVELS - 1 and s.x[_QUANTUM] * s.x[_RATIO] ** q.level < seconds:
                q.level += 1
        _link(e, r, False)
    e.work[_SEEN] = s.arrived


@njit
def _form_batch(e: Engine) -> int:
    """Take requests out of the highest levels while prompts and places allow; returns how many.

    The first is taken in any case.
    """
    s, req, work = e.s, e.req, e.work
    most = _batch_size(e)
    no_new = s.swap != 0 and 10 * s.cpu_free < s.cpu_blocks
    n, prompts = 0, 0
    for level in range(_LEVELS):
        while True:
            new = -1 if no_new else int(work[_HEAD + 2 * level]) - 1
            r = _earlier(e, new, int(work[_HEAD + 2 * level + 1]) - 1)
            if r < 0:
                break
            q = req[r]
            if q.status == _FINISHED:  # while it was out of the batch (asynchronous scheduling)
                _unlink(e, r)
                continue
            prefills = q.status == _WAITING or q.computed < q.target
            tokens = known_tokens(q) if q.status == _WAITING else next_tokens(q)
            if n > 0 and (prompts + tokens > s.token_budget or n >= most):
                return n
            _unlink(e, r)
            q.chosen = 1
            work[_MEMBERS + n] = r
            n += 1
            if prefills:
                prompts += tokens
    return n


@njit
def _batch_size(e: Engine) -> int:
    return min(e.s.max_num_seqs, e.s.max_batch_requests if e.s.max_batch_requests > 0 else e.s.max_num_seqs)


@njit
def _need(e: Engine, r: int) -> int:
    """KV blocks that request r must get to run."""
    q = e.req[r]
    return more_blocks(e, q, known_tokens(q) if q.status == _WAITING else next_tokens(q))


@njit
def _reserve(e: Engine, n: int) -> int:
    """Swap out others, then members from the end, until batch and reserve fit; returns how many members stay.

    The reserve gives way to the first member.
    """
    s, req, work = e.s, e.req, e.work
    reserve = max(_batch_size(e), int(s.x[_RESERVE])) if s.x[_PROACTIVE] > 0.0 else 0
    need, places = 0, 0
    for i in range(n):
        r = int(work[_MEMBERS + i])
        need += _need(e, r)
        places += 0 if req[r].status == _RUNNING else 1
    short = reserve + need > s.free or s.num_running + places > s.max_num_seqs
    while reserve + need > s.free or s.num_running + places > s.max_num_seqs:
        lowest = -1
        for k in range(s.num_running):
            v = e.running[k]
            if req[v].chosen == 0 and (lowest < 0 or _lower(e, v, lowest)):
                lowest = v
        if lowest < 0:
            break
        evict(e, lowest)
    kept = n
    while kept > 1 and (reserve + need > s.free or s.num_running + places > s.max_num_seqs):
        kept -= 1
        r = int(work[_MEMBERS + kept])
        need -= _need(e, r)
        if req[r].status == _RUNNING:
            evict(e, r)
        else:
            places -= 1
    for i in range(kept, n):
        r = int(work[_MEMBERS + i])
        req[r].chosen = 0
        _link(e, r, True)
    for i in range(kept):
        r = int(work[_MEMBERS + i])
        if req[r].status == _SWAPPED and req[r].cpu_blocks <= s.free:
            swap_in(e, r)
            places -= 1
    if not short and s.x[_PROACTIVE] > 0.0:
        _bring_back(e, reserve + need, places)
    return kept


@njit
def _lower(e: Engine, a: int, b: int) -> bool:
    p, q = e.req[a], e.req[b]
    return p.level > q.level or (p.level == q.level and p.count > q.count)


@njit
def _bring_back(e: Engine, spare: int, places: int) -> None:
    """Swap in requests ahead of their turn, while `spare` blocks and `places` places stay free.

    Looked at are the first requests of the highest levels, as many as a batch holds.
    """
    s, req, work = e.s, e.req, e.work
    left = _batch_size(e)
    for level in range(_LEVELS):
        new, old = int(work[_HEAD + 2 * level]) - 1, int(work[_HEAD + 2 * level + 1]) - 1
        while left > 0 and (new >= 0 or old >= 0):
            r = _earlier(e, new, old)
            if r == new:
                new = req[r].after
            else:
                old = req[r].after
            fits = req[r].status == _SWAPPED and s.free >= spare + req[r].cpu_blocks
            if fits and s.num_running + places < s.max_num_seqs:
                swap_in(e, r)
            left -= 1


@njit
def _prevent_starvation(e: Engine) -> None:
    """Who has not run for long goes to the front of the highest level; who never ran, last ran at time 0."""
    s, req, work = e.s, e.req, e.work
    first, last = -1, -1
    for level in range(_LEVELS):
        new, old = int(work[_HEAD + 2 * level]) - 1, int(work[_HEAD + 2 * level + 1]) - 1
        while new >= 0 or old >= 0:
            r = _earlier(e, new, old)
            q = req[r]
            if r == new:
                new = q.after
            else:
                old = q.after
            ran = 0.0 if np.isnan(q.last_token) else q.last_token
            if s.clock - ran >= s.x[_STARVATION]:
                _unlink(e, r)
                q.after = -1
                if last >= 0:
                    req[last].after = r
                else:
                    first = r
                last = r
    r = first
    while r >= 0:
        following = req[r].after
        req[r].level = 0
        _link(e, r, True)
        r = following
