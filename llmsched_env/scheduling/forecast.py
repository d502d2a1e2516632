"""The forecast of memory: whether the KV cache will suffice at every coming completion.

MC-SF (arXiv 2502.07115) admits by it. It believes the lengths that the setting `peak` names, and that all
running requests decode in lock-step.
"""

from __future__ import annotations

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.facts import known_tokens
from llmsched_env.core.state import Engine, Status
from llmsched_env.scheduling.settings import Peak

_RUNNING = int(Status.RUNNING)
_TRUE, _LOWER_BOUND = int(Peak.TRUE), int(Peak.LOWER_BOUND)


@njit
def _remaining(e: Engine, q) -> int:  # type: ignore[no-untyped-def]
    """Output tokens still to come, by the length that the forward-looking test believes; at least 1."""
    if e.s.peak == _TRUE:
        return max(1, q.stop - q.generated)
    length = q.predicted
    if e.s.peak == _LOWER_BOUND:
        length = max(e.s.lower_bound * length, np.float64(q.generated))
    return max(1, int(np.ceil(min(length, np.float64(q.limit)))) - q.generated)


@njit
def _held(e: Engine, q) -> int:  # type: ignore[no-untyped-def]
    """Tokens of KV of q before its next token comes out, as if a prefill ended with this iteration; blocks
    are taken whole.
    """
    held = q.computed if q.status == _RUNNING and q.computed >= q.target else known_tokens(q) - 1
    return held + e.s.block_size - 1


# The forecast in `work`: five columns, a row for each running request, most remaining tokens first. Its ids
# stay from one iteration to the next, so that sorting it again is cheap.
_ROWS, _WORST, _COLUMNS = 0, 1, 2  # rows in use; the highest usage at any completion; where the columns begin


@njit
def _columns(e: Engine):  # type: ignore[no-untyped-def]
    """Where each column begins: ids; tokens left; tokens held; their sum down to a row; and, from a row
    downwards, the highest usage at a completion plus the tokens until then (what a request held all that time
    would have to fit in, less what it holds now)."""
    n = len(e.req)
    return _COLUMNS, _COLUMNS + n, _COLUMNS + 2 * n, _COLUMNS + 3 * n, _COLUMNS + 4 * n


def forecast_size(num_requests: int) -> int:
    """float64 numbers of workspace that the forward-looking test needs."""
    return _COLUMNS + 5 * num_requests


@njit
def forecast(e: Engine) -> int:
    """Bring the forecast up to date with the running requests; returns how many they are."""
    s, req, work = e.s, e.req, e.work
    ids = _columns(e)[0]
    stamp = np.int32(s.iterations & 0x7FFFFFFF) + 1
    n = 0
    for k in range(int(work[_ROWS])):
        r = int(work[ids + k])
        if req[r].status == _RUNNING:
            req[r].count = stamp
            work[ids + n] = r
            n += 1
        else:
            req[r].count = 0  # it may come back in this very iteration
    for k in range(s.num_running):
        r = e.running[k]
        if req[r].count != stamp:
            work[ids + n] = r
            n += 1
    for k in range(n):
        _insert(e, int(work[ids + k]), k)
    _sum_up(e, n)
    return n


@njit
def _insert(e: Engine, r: int, n: int) -> None:
    """Put request r in its place among n rows, those with most tokens left first; row n is free."""
    work = e.work
    ids, lefts, helds, _, _ = _columns(e)
    held, left = np.float64(_held(e, e.req[r])), np.float64(_remaining(e, e.req[r]))
    k = n
    while k > 0 and work[lefts + k - 1] < left:
        work[ids + k] = work[ids + k - 1]
        work[lefts + k] = work[lefts + k - 1]
        work[helds + k] = work[helds + k - 1]
        k -= 1
    work[ids + k], work[lefts + k], work[helds + k] = r, left, held


@njit
def _sum_up(e: Engine, n: int) -> None:
    """Fill the last two columns."""
    work = e.work
    _, lefts, helds, sums, needs = _columns(e)
    total, worst = 0.0, 0.0
    for k in range(n):
        total += work[helds + k]
        usage = total + (k + 1) * work[lefts + k]
        worst = max(worst, usage)
        work[sums + k] = total
        work[needs + k] = usage + work[lefts + k]
    for k in range(n - 2, -1, -1):
        work[needs + k] = max(work[needs + k], work[needs + k + 1])
    work[_ROWS], work[_WORST] = n, worst


@njit
def add_to_forecast(e: Engine, r: int, n: int) -> int:
    """Add request r, which is about to be admitted, to n rows; returns how many there are then."""
    _insert(e, r, n)
    _sum_up(e, n + 1)
    return n + 1


@njit
def fits_forecast(e: Engine, r: int, n: int) -> bool:
    """Whether the KV cache suffices at every coming completion if r is admitted and all decode in lock-step.

    Memory only grows between completions, so these are the times to check (MC-SF, arXiv 2502.07115): when the
    request with d tokens left completes, those with at least as many left hold what they hold now plus d
    tokens each. O(log n), by bisection.
    """
    work = e.work
    _, lefts, _, sums, needs = _columns(e)
    held, left = np.float64(_held(e, e.req[r])), np.float64(_remaining(e, e.req[r]))
    capacity = np.float64(e.s.kv_blocks * e.s.block_size)
    if work[_WORST] > capacity:
        return False
    longer = _rows_above(work, lefts, n, left)
    if longer < n and work[needs + longer] + held > capacity:  # those that complete while r is there
        return False
    with_r = _rows_above(
        work, lefts, n, left - 0.5
    )  # those that are there when r completes; lengths are whole numbers
    total = work[sums + with_r - 1] if with_r > 0 else 0.0
    return bool(total + held + (with_r + 1) * left <= capacity)


@njit
def _rows_above(work, column: int, n: int, value: float) -> int:  # type: ignore[no-untyped-def]
    """How many of the first n numbers of a descending column are greater than `value`."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        if work[column + middle] > value:
            low = middle + 1
        else:
            high = middle
    return low
