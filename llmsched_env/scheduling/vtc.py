"""VTC: fair among clients, by counters of the tokens that each was served."""

from __future__ import annotations

import dataclasses

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.engine import grant, grant_error
from llmsched_env.core.facts import known_tokens
from llmsched_env.core.state import Engine, Status
from llmsched_env.errors import InputError
from llmsched_env.scheduling.common import insert_pair, peak_with, set_pair, sort_pairs
from llmsched_env.scheduling.routine import chunk_cap, visit_running
from llmsched_env.scheduling.settings import Pass

_DECODES = int(Pass.DECODES)
_WAITING = int(Status.WAITING)


@dataclasses.dataclass(frozen=True)
class VTC:
    """Parameters of VTC.

    Its `batch_max_tokens` is the token budget, its `running_max_req_size` the engine's `max_num_seqs`.

    Attributes:
        input_price, output_price: what a token of a prompt, of an answer, adds to its client's counter.
        wait_steps: decode iterations between two admissions.
        lift: whether a client who comes back starts no lower than the lowest who waits; without it an idle
            client saves up credit.
    """

    input_price: float = 1.0
    output_price: float = 2.0
    wait_steps: int = 10
    lift: bool = True

    def __post_init__(self) -> None:
        if not (self.input_price >= 0 and self.output_price >= 0 and self.wait_steps >= 0):
            raise InputError(f"input_price, output_price and wait_steps must not be negative, not {self}")


_INPUT, _OUTPUT, _WAIT, _LIFT = range(4)

# `work`: requests seen, size of the heap; for each client its counter, the heap of those with waiting
# requests by counter, for each client its place in it plus 1 (0: none waits), and the first and the last of
# those requests, which `req.after` links; pairs for the peak.
_SEEN, _SIZE, _TABLES = 0, 1, 2


def vtc_size(num_requests: int, num_clients: int) -> int:
    """float64 numbers of workspace."""
    return _TABLES + 5 * num_clients + 2 * (num_requests + 1)


@njit
def _tables(e: Engine):  # type: ignore[no-untyped-def]
    """Where each table begins: counters, heap, places, first, last, pairs."""
    pairs = len(e.work) - 2 * (len(e.req) + 1)
    clients = (pairs - _TABLES) // 5
    return (
        _TABLES,
        _TABLES + clients,
        _TABLES + 2 * clients,
        _TABLES + 3 * clients,
        _TABLES + 4 * clients,
        pairs,
    )


@njit
def plan_vtc(e: Engine) -> None:
    """Plan one iteration: admissions alone, if it is idle or has decoded for long; else all decodes."""
    s = e.s
    _see_arrivals(e)
    if s.num_running == 0 or s.iterations - s.last_prefill > s.x[_WAIT]:
        _admit(e)
        s.last_prefill = s.iterations if s.prefill_requests > 0 else s.iterations - 1
    if s.prefill_requests > 0:
        return
    visit_running(e, _DECODES, chunk_cap(e), False)
    for k in range(s.num_planned):
        _charge(e, e.req[e.plan[k]].client, s.x[_OUTPUT])
    for k in range(s.num_victims):  # never with whole answers declared; what is asynchronous may be late
        _join(e, e.victims[k], True)


# ---------------------------------------------------------------------------------------------------- clients


@njit
def _see_arrivals(e: Engine) -> None:
    """Put what has arrived into its client's list."""
    for r in range(int(e.work[_SEEN]), e.s.arrived):
        if e.req[r].status == _WAITING:
            _join(e, r, False)
    e.work[_SEEN] = e.s.arrived


@njit
def _join(e: Engine, r: int, in_front: bool) -> None:
    """Put request r into its client's list.

    A client of whom none waits catches up with the lowest counter of those of whom some do.
    """
    work, q = e.work, e.req[r]
    counters, heap, places, first, last, _ = _tables(e)
    c = q.client
    if work[places + c] == 0.0:
        if work[_SIZE] > 0.0 and e.s.x[_LIFT] > 0.0:
            work[counters + c] = max(work[counters + c], work[counters + int(work[heap])])
        work[_SIZE] += 1.0
        _settle(e, c, int(work[_SIZE]) - 1)
        work[first + c] = work[last + c] = r
        q.after = -1
    elif in_front:
        q.after = int(work[first + c])
        work[first + c] = r
    else:
        e.req[int(work[last + c])].after = r
        work[last + c] = r
        q.after = -1


@njit
def _leave(e: Engine, c: int) -> None:
    """Take the first request out of the list of client c, which has the lowest counter."""
    work = e.work
    _, heap, places, first, _, _ = _tables(e)
    after = e.req[int(work[first + c])].after
    work[first + c] = after
    if after < 0:
        work[places + c] = 0.0
        work[_SIZE] -= 1.0
        n = int(work[_SIZE])
        if n > 0:
            _settle(e, int(work[heap + n]), 0)


@njit
def _charge(e: Engine, c: int, price: float) -> None:
    """Raise the counter of client c."""
    work = e.work
    counters, _, places, _, _, _ = _tables(e)
    work[counters + c] += price
    if work[places + c] > 0.0:
        _settle(e, c, int(work[places + c]) - 1)


@njit
def _settle(e: Engine, c: int, i: int) -> None:
    """Put client c, whose place in the heap would be i, where its counter belongs."""
    work = e.work
    _, heap, places, _, _, _ = _tables(e)
    n = int(work[_SIZE])
    while i > 0 and _below(e, c, int(work[heap + (i - 1) // 2])):
        up = int(work[heap + (i - 1) // 2])
        work[heap + i] = up
        work[places + up] = i + 1.0
        i = (i - 1) // 2
    while 2 * i + 1 < n:
        child = 2 * i + 1
        if child + 1 < n and _below(e, int(work[heap + child + 1]), int(work[heap + child])):
            child += 1
        down = int(work[heap + child])
        if not _below(e, down, c):
            break
        work[heap + i] = down
        work[places + down] = i + 1.0
        i = child
    work[heap + i] = c
    work[places + c] = i + 1.0


@njit
def _below(e: Engine, a: int, b: int) -> bool:
    """Whether a has the lower counter; ties go to the lower client."""
    x, y = e.work[_TABLES + a], e.work[_TABLES + b]
    return x < y or (x == y and a < b)


# -------------------------------------------------------------------------------------------------- admission


@njit
def _admit(e: Engine) -> None:
    """Admit the first request of the client with the lowest counter, again and again, until one does not fit.

    An idle engine takes its first request in any case.
    """
    s, req, work = e.s, e.req, e.work
    _, heap, _, first, _, pairs = _tables(e)
    if work[_SIZE] == 0.0 or s.num_running >= s.max_num_seqs:
        return
    n = s.num_running
    for k in range(n):
        q = req[e.running[k]]
        set_pair(e, pairs, k, _left(q), _held(e, q))
    sort_pairs(e, pairs, n)
    capacity = np.float64(s.kv_blocks * s.block_size)
    while work[_SIZE] > 0.0 and s.num_running < s.max_num_seqs:
        c = int(work[heap])
        r = int(work[first + c])
        q = req[r]
        left, held, tokens = _left(q), _held(e, q), known_tokens(q)
        if s.num_running > 0 and (tokens > s.budget or peak_with(e, pairs, n, left, held) >= capacity):
            return
        if grant_error(e, r, tokens) != 0:
            return
        grant(e, r, tokens)
        insert_pair(e, pairs, n, left, held)
        n += 1
        _leave(e, c)
        _charge(e, c, s.x[_INPUT] * q.prompt)


@njit
def _held(e: Engine, q) -> float:  # type: ignore[no-untyped-def]
    """Tokens of KV that q holds, the next one included; blocks are taken whole."""
    return np.float64(known_tokens(q) + 1 + e.s.block_size - 1)


@njit
def _left(q) -> float:  # type: ignore[no-untyped-def]
    """Tokens that q may still add."""
    return np.float64(q.limit - q.generated - 1)
