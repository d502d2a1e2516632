"""WAIT: a class of requests runs when enough of it has gathered."""

from __future__ import annotations

import dataclasses

from llmsched_env.core.compile import njit
from llmsched_env.core.engine import grant
from llmsched_env.core.facts import blocks_for, known_tokens
from llmsched_env.core.state import Engine, Status
from llmsched_env.errors import InputError
from llmsched_env.scheduling.routine import make_room, watermark

_WAITING = int(Status.WAITING)
_CLASSES = 64  # classes by class_id; higher ones share the last

# `work`: requests seen so far, then for each class how many wait and the first and the last of them.
# `req.count` links a class's list.
_SEEN, _COUNT, _FIRST, _LAST = 0, 1, 1 + _CLASSES, 1 + 2 * _CLASSES
WAIT_SIZE = 1 + 3 * _CLASSES
_THRESHOLD = 0


@dataclasses.dataclass(frozen=True)
class WaitSettings:
    """threshold: requests of a class that have to wait before it runs, and that are admitted at a time."""

    threshold: int = 8

    def __post_init__(self) -> None:
        if self.threshold < 1:
            raise InputError(f"threshold must be at least 1 request, not {self.threshold}")


@njit
def plan_wait(e: Engine) -> None:
    """Plan one iteration.

    Classes of which `threshold` requests wait, run: all their running requests get tokens, and so many are
    admitted. If none does, those that run go on without admissions. When nothing more arrives, a single
    waiting request is enough.
    """
    s = e.s
    _see_arrivals(e)
    threshold = 1 if s.arrived == len(e.req) else int(s.x[_THRESHOLD])
    due = 0
    for c in range(_CLASSES):
        if e.work[_COUNT + c] >= threshold:
            due += 1
    if due > 0:
        _continue(e, threshold)
        for c in range(_CLASSES):
            if e.work[_COUNT + c] >= threshold:
                _admit(e, c)
    if s.num_planned == 0:  # no class is due, or what is due finds no room
        _continue(e, 0)
    for k in range(s.num_victims):
        _join(e, e.victims[k], True)


@njit
def _class(e: Engine, r: int) -> int:
    return min(e.req[r].class_id, _CLASSES - 1)


@njit
def _see_arrivals(e: Engine) -> None:
    """Put what has arrived since the last time into its class's list."""
    for r in range(int(e.work[_SEEN]), e.s.arrived):
        if e.req[r].status == _WAITING:
            _join(e, r, False)
    e.work[_SEEN] = e.s.arrived


@njit
def _join(e: Engine, r: int, in_front: bool) -> None:
    work, c = e.work, _class(e, r)
    if work[_COUNT + c] == 0:
        work[_FIRST + c] = work[_LAST + c] = r
    elif in_front:
        e.req[r].count = int(work[_FIRST + c])
        work[_FIRST + c] = r
    else:
        e.req[int(work[_LAST + c])].count = r
        work[_LAST + c] = r
    work[_COUNT + c] += 1


@njit
def _continue(e: Engine, threshold: int) -> None:
    """Grant the next tokens of the running requests whose class is due, decodes before chunks."""
    s = e.s
    for chunks in range(2):
        i = 0
        while i < s.num_running and s.budget > 0:
            r = e.running[i]
            q = e.req[r]
            prefills = q.computed < q.target
            idle = q.granted > 0 or (not prefills and q.generated + q.in_flight >= q.limit)
            if idle or prefills != (chunks == 1) or e.work[_COUNT + _class(e, r)] < threshold:
                i += 1
                continue
            want = min(q.target - q.computed, s.budget) if prefills else 1
            i = make_room(e, i, want)
            if i < 0:  # it had to go itself
                i = -1 - i
                continue
            grant(e, r, want)
            i += 1


@njit
def _admit(e: Engine, c: int) -> None:
    """Admit up to `threshold` requests of class c, in order of arrival, while they fit."""
    s, work = e.s, e.work
    for _ in range(int(s.x[_THRESHOLD])):
        if work[_COUNT + c] == 0 or s.budget <= 0 or s.num_running >= s.max_num_seqs or s.num_victims > 0:
            return
        r = int(work[_FIRST + c])
        q = e.req[r]
        if q.status == _WAITING:
            want = min(known_tokens(q), s.budget)
            if max(q.need, blocks_for(e, want)) + watermark(e) > s.free or not grant(e, r, want):
                return
        work[_COUNT + c] -= 1
        work[_FIRST + c] = q.count
