"""LightLLM: admission by the memory that requests will reach together, by declared or by sampled lengths."""

from __future__ import annotations

import dataclasses

import numpy as np

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.engine import grant, grant_error
from llmsched_env.core.facts import known_tokens, random_unit
from llmsched_env.core.state import Engine, Status
from llmsched_env.errors import InputError
from llmsched_env.scheduling.common import (
    fits_alone,
    insert_pair,
    next_tokens,
    peak_with,
    set_pair,
    sort_pairs,
)
from llmsched_env.scheduling.routine import chunk_cap, make_room, visit_running
from llmsched_env.scheduling.settings import Pass

_DECODES = int(Pass.DECODES)
_RUNNING, _FINISHED = int(Status.RUNNING), int(Status.FINISHED)


@dataclasses.dataclass(frozen=True)
class LightLLM:
    """Parameters of LightLLM.

    Its `batch_max_tokens` is the token budget, its `running_max_req_size` the engine's `max_num_seqs`.

    Attributes:
        chunk: most tokens of one chunk.
        max_wait_steps: decode iterations after which unfinished prefills get their next chunk.
        token_ratio: share of the KV cache in use from which declared maxima are believed; 0: always, so that
            nobody is ever paused.
        shorter_output: below it, the answer is taken to end at so many tokens, or 1.1 times what it has, if
            that is less than declared.
        past_future: whether lengths are sampled from those of the last 200 answers instead.
        reserve: share of the KV cache that sampled lengths must leave free.
        first_output: what the 100 lengths are that this history begins with.
    """

    chunk: int = 4096
    max_wait_steps: int = 6
    token_ratio: float = 0.0
    shorter_output: int = 1024
    past_future: bool = False
    reserve: float = 0.05
    first_output: int = 1024

    def __post_init__(self) -> None:
        if not (
            self.chunk >= 1 and self.max_wait_steps >= 0 and 0 <= self.reserve < 1 and self.first_output >= 1
        ):
            raise InputError(
                f"chunk >= 1, max_wait_steps >= 0, 0 <= reserve < 1 and first_output >= 1 must hold: {self}"
            )


_CHUNK, _MAX_WAIT, _TOKEN_RATIO, _SHORTER, _PAST_FUTURE, _RESERVE, _FIRST = range(7)
_SPARE = 6  # tokens added to what a request may still produce
_WINDOW = 200
_LISTS = 5  # sampled lists, at most

# `work`: for the past-future variant how many requests ran when last seen, the lengths of the last answers
# (how many, the oldest, in order of finishing, sorted), and which ran; then lists of pairs for the peak.
_SEEN, _HISTORY_SIZE, _OLDEST, _HISTORY = range(4)
_SORTED = _HISTORY + _WINDOW
_RUNNING_BEFORE = _SORTED + _WINDOW


def lightllm_size(num_requests: int, num_clients: int) -> int:
    """float64 numbers of workspace."""
    return _RUNNING_BEFORE + num_requests + 2 * _LISTS * (num_requests + 1)


@njit
def plan_lightllm(e: Engine) -> None:
    """Plan one iteration: after decodes, admissions and chunks where they are due, alone; else all decodes.

    A step of LightLLM decodes and then perhaps prefills: two iterations here.
    """
    s, work = e.s, e.work
    if s.x[_PAST_FUTURE] > 0.0:
        _learn(e)
    decodes = 0
    for k in range(s.num_running):
        q = e.req[e.running[k]]
        if q.computed >= q.target and next_tokens(q) > 0:
            decodes += 1
    if decodes == 0 or s.last_prefill != s.iterations - 1:
        late = s.iterations - s.last_prefill > s.x[_MAX_WAIT]
        _prefill(e, decodes, late or decodes == 0)
    if s.prefill_requests > 0:
        s.last_prefill = s.iterations
    else:
        visit_running(e, _DECODES, chunk_cap(e), False)
    if s.x[_PAST_FUTURE] > 0.0:
        work[_SEEN] = s.num_running
        for k in range(s.num_running):
            work[_RUNNING_BEFORE + k] = e.running[k]


@njit
def _prefill(e: Engine, decodes: int, due: bool) -> None:
    """Admit what fits; if somebody was admitted, or it is due, unfinished prefills get a chunk too."""
    s = e.s
    _admit(e, decodes)
    if s.num_planned == 0 and not due:
        return
    i = 0
    while i < s.num_running:
        r = e.running[i]
        q = e.req[r]
        if q.granted > 0 or q.computed >= q.target:
            i += 1
            continue
        want = min(q.target - q.computed, int(s.x[_CHUNK]), s.token_budget)
        i = make_room(e, i, want)
        if i < 0:  # it had to go itself
            i = -1 - i
            continue
        grant(e, r, want)
        i += 1


@njit
def _admit(e: Engine, decodes: int) -> None:
    """Admit requests in turn while the peak of all stays below the KV cache.

    An idle engine takes its first in any case.
    """
    s, work = e.s, e.work
    if s.num_waiting == 0 or s.num_running >= s.max_num_seqs:
        return
    n = s.num_running
    lists = 1
    capacity = np.float64(s.kv_blocks * s.block_size)
    if s.x[_PAST_FUTURE] > 0.0:
        lists = max(1, min(_LISTS, _WINDOW // max(1, n)))
        capacity *= 1.0 - s.x[_RESERVE]
    first, stride = _RUNNING_BEFORE + len(e.req), 2 * (len(e.req) + 1)
    for j in range(lists):
        for k in range(n):
            set_pair(e, first + j * stride, k, _left(e, e.running[k]), _held(e, e.running[k]))
        sort_pairs(e, first + j * stride, n)
    tokens = s.token_budget - decodes
    while s.num_waiting > 0 and s.num_running < s.max_num_seqs:
        r = queue.first(e)
        want = min(known_tokens(e.req[r]), int(s.x[_CHUNK]), s.token_budget)
        idle = s.num_running == 0
        if (want > tokens and not idle) or not fits_alone(e, e.req[r]):
            return
        peak = 0.0
        last = stride - 2  # where a list keeps the length that was drawn for r
        for j in range(lists):
            at = first + j * stride
            work[at + last] = _left(e, r)
            peak = max(peak, peak_with(e, at, n, work[at + last], _held(e, r)))
        if (peak >= capacity and not idle) or grant_error(e, r, want) != 0:
            return
        grant(e, r, want)
        for j in range(lists):
            at = first + j * stride
            insert_pair(e, at, n, work[at + last], _held(e, r))
        n += 1
        tokens -= want


@njit
def _held(e: Engine, r: int) -> float:
    """Tokens of KV that r holds, the next one included; blocks are taken whole."""
    return np.float64(known_tokens(e.req[r]) + 1 + e.s.block_size - 1)


@njit
def _left(e: Engine, r: int) -> float:
    """Tokens that r may still add, and those that others add while its prefill is unfinished."""
    s, q = e.s, e.req[r]
    if s.x[_PAST_FUTURE] > 0.0:
        length = _sample(e, q)
    elif s.kv_tokens >= s.x[_TOKEN_RATIO] * s.kv_blocks * s.block_size:
        length = np.float64(q.limit)
    else:
        length = min(np.float64(q.limit), max(1.1 * q.generated, s.x[_SHORTER]))
    rest = max(0, q.target - q.computed) if q.status == _RUNNING else known_tokens(q)
    chunks = np.ceil(rest / s.x[_CHUNK])
    return max(0.0, length - q.generated - 1.0) + _SPARE + chunks * (s.x[_MAX_WAIT] + 1.0)


# ------------------------------------------------------------------------------------------------ past-future


@njit
def _learn(e: Engine) -> None:
    """Note the lengths of the answers that have ended since the last time."""
    work = e.work
    if work[_HISTORY_SIZE] == 0.0:
        for _ in range(_WINDOW // 2):
            _note(e, e.s.x[_FIRST])
    for k in range(int(work[_SEEN])):
        q = e.req[int(work[_RUNNING_BEFORE + k])]
        if q.status == _FINISHED:
            _note(e, np.float64(q.generated))
    work[_SEEN] = 0.0


@njit
def _note(e: Engine, length: float) -> None:
    """Add a length to the history, in place of the oldest if it is full."""
    work = e.work
    n, oldest = int(work[_HISTORY_SIZE]), int(work[_OLDEST])
    if n == _WINDOW:
        gone = work[_HISTORY + oldest]
        k = _above(e, n, gone) - 1
        for j in range(k, n - 1):
            work[_SORTED + j] = work[_SORTED + j + 1]
        n -= 1
    work[_HISTORY + oldest] = length
    work[_OLDEST] = (oldest + 1) % _WINDOW
    k = n
    while k > 0 and work[_SORTED + k - 1] > length:
        work[_SORTED + k] = work[_SORTED + k - 1]
        k -= 1
    work[_SORTED + k] = length
    work[_HISTORY_SIZE] = n + 1.0


@njit
def _above(e: Engine, n: int, value: float) -> int:
    """Index of the first of n sorted lengths that exceeds `value`."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        if e.work[_SORTED + middle] > value:
            high = middle
        else:
            low = middle + 1
    return low


@njit
def _sample(e: Engine, q) -> float:  # type: ignore[no-untyped-def]
    """A length for q's answer: one of the history, or, if it has begun, one from what it has to its maximum.

    The latter interpolates at random among the lengths that it has, those of the history beyond, and its
    declared maximum.
    """
    work = e.work
    n = int(work[_HISTORY_SIZE])
    if q.generated == 0:
        return min(np.float64(q.limit), work[_SORTED + int(random_unit(e) * n)])
    k = _above(e, n, np.float64(q.generated))
    at = random_unit(e) * (n - k + 1)  # among q.generated, the n - k lengths beyond, q.limit
    i = int(at)
    low = np.float64(q.generated) if i == 0 else work[_SORTED + k + i - 1]
    high = np.float64(q.limit) if i == n - k else work[_SORTED + k + i]
    return min(np.float64(q.limit), low + (at - i) * (high - low))
