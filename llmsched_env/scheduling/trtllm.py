"""TensorRT-LLM: who has memory, by a capacity scheduler, then who takes part, by a micro-batch scheduler."""

from __future__ import annotations

import dataclasses
import enum

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.engine import evict, grant
from llmsched_env.core.facts import blocks_for, known_tokens
from llmsched_env.core.state import Engine, Status
from llmsched_env.errors import InputError
from llmsched_env.scheduling.common import more_blocks, next_tokens
from llmsched_env.scheduling.routine import sort_running

_WAITING, _RUNNING = int(Status.WAITING), int(Status.RUNNING)


class Capacity(enum.IntEnum):
    """The capacity scheduler's policy."""

    NO_EVICT = 0  # who starts can finish: memory for the declared maximum
    MAX_UTILIZATION = 1  # memory for the next step; the last started is paused when it is short
    STATIC_BATCH = 2  # as NO_EVICT, and nobody starts before the whole batch is done


@dataclasses.dataclass(frozen=True)
class TensorRT:
    """Parameters of TensorRT-LLM. Whether prompts are cut is `chunked`; `max_num_tokens` is the token budget.

    Attributes:
        capacity: the capacity scheduler's policy.
        chunk_unit: a cut chunk is a multiple of so many tokens.
    """

    capacity: Capacity = Capacity.NO_EVICT
    chunk_unit: int = 32

    def __post_init__(self) -> None:
        if self.chunk_unit < 1:
            raise InputError(f"chunk_unit must be at least 1 token, not {self.chunk_unit}")


_CAPACITY, _UNIT = range(2)
_MAX_UTILIZATION, _STATIC_BATCH = int(Capacity.MAX_UTILIZATION), int(Capacity.STATIC_BATCH)

# `work`: members of the static batch that have not started; the requests that have memory.
_UNSTARTED, _FITTING = 0, 1


def trtllm_size(num_requests: int, num_clients: int) -> int:
    """float64 numbers of workspace."""
    return _FITTING + num_requests


@njit
def plan_trtllm(e: Engine) -> None:
    """Plan one iteration."""
    sort_running(e)
    n = _fit_step(e) if e.s.x[_CAPACITY] == _MAX_UTILIZATION else _fit_whole(e)
    if e.s.chunked:
        _batch_chunks(e, n)
    else:
        _batch_prompts(e, n)


# --------------------------------------------------------------------------------------------------- capacity


@njit
def _fit_whole(e: Engine) -> int:
    """All that have started, then from the queue while the declared maximum of all fits; returns how many.

    An idle engine takes its first request in any case.
    """
    s, req, work = e.s, e.req, e.work
    n, room = 0, s.free
    for k in range(s.num_running):
        q = req[e.running[k]]
        room -= max(0, blocks_for(e, q.prompt + q.limit) - q.blocks)
        work[_FITTING + n] = e.running[k]
        n += 1
    static = s.x[_CAPACITY] == _STATIC_BATCH
    fresh = s.num_running == 0 and work[_UNSTARTED] == 0.0
    most = s.max_num_seqs if not static or fresh else n + int(work[_UNSTARTED])
    r = queue.first(e)
    while r >= 0 and n < most:
        need = blocks_for(e, req[r].prompt + req[r].limit)
        if need > room and (n > 0 or req[r].need > room):
            break
        room -= need
        work[_FITTING + n] = r
        n += 1
        r = queue.following(e, r)
    if static and fresh:
        work[_UNSTARTED] = n
    return n


@njit
def _fit_step(e: Engine) -> int:
    """In order of arrival, who has memory for the next step; returns how many.

    When it is short, the last started is paused, and who comes after it gets nothing in this iteration.
    """
    s, req, work = e.s, e.req, e.work
    n, taken, started = 0, 0, s.num_running
    i, r = 0, queue.first(e)
    while n < s.max_num_seqs:
        running = i < s.num_running and (r < 0 or req[e.running[i]].rank < req[r].rank)
        if not running and (r < 0 or req[r].evicted_at == s.iterations):
            break  # nobody is left, or only those just paused
        at = e.running[i] if running else r
        q = req[at]
        need = more_blocks(e, q, next_tokens(q)) if running else blocks_for(e, known_tokens(q))
        if taken + need <= s.free and (running or started < s.max_num_seqs):
            taken += need
            work[_FITTING + n] = at
            n += 1
            if running:
                i += 1
            else:
                started += 1
                r = queue.following(e, r)
            continue
        last = e.running[s.num_running - 1] if i < s.num_running else -1
        if last < 0:
            break
        evict(e, last)
        started -= 1
        if r < 0 or req[last].rank < req[r].rank:
            r = last
        if last == at:
            break
    return n


# ------------------------------------------------------------------------------------------------ micro-batch


@njit
def _batch_prompts(e: Engine, n: int) -> None:
    """Of the n with memory, in order, decodes and whole prompts, up to the first that exceeds the budget."""
    s = e.s
    for k in range(n):
        r = int(e.work[_FITTING + k])
        q = e.req[r]
        want = next_tokens(q) if q.status == _RUNNING else known_tokens(q)
        if want > s.budget:
            break
        if want > 0:
            _start(e, r, want)


@njit
def _batch_chunks(e: Engine, n: int) -> None:
    """All decodes, then prompts in order; one that is cut gets a multiple of the chunk unit, perhaps none."""
    s = e.s
    unit = int(s.x[_UNIT])
    for k in range(n):
        r = int(e.work[_FITTING + k])
        q = e.req[r]
        if q.status == _RUNNING and q.computed >= q.target and next_tokens(q) > 0:
            if s.budget < 1:
                return
            grant(e, r, 1)
    for k in range(n):
        r = int(e.work[_FITTING + k])
        q = e.req[r]
        if s.budget < 1:
            return
        if q.status == _WAITING or q.computed < q.target:
            rest = known_tokens(q) if q.status == _WAITING else q.target - q.computed
            want = rest if rest <= s.budget else s.budget // unit * unit
            if want == 0 and s.num_planned == 0:
                want = s.budget
            if want > 0:
                _start(e, r, want)


@njit
def _start(e: Engine, r: int, tokens: int) -> None:
    if e.req[r].status == _WAITING and e.s.x[_CAPACITY] == _STATIC_BATCH:
        e.work[_UNSTARTED] -= 1.0
    grant(e, r, tokens)
