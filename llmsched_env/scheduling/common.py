"""What several routines share: what a request can use next, and the memory that requests reach together."""

from __future__ import annotations

from llmsched_env.core.compile import njit
from llmsched_env.core.facts import blocks_for
from llmsched_env.core.state import Engine

# ------------------------------------------------------------------------------------------------ one request


@njit
def next_tokens(q) -> int:  # type: ignore[no-untyped-def]
    """Tokens that running request q can use: the rest of its prefill, or 1, or 0 if it has no more to do."""
    if q.computed < q.target:
        return q.target - q.computed
    return 0 if q.generated + q.in_flight >= q.limit else 1


@njit
def fits_alone(e: Engine, q) -> bool:  # type: ignore[no-untyped-def]
    """Whether the whole of q fits into the KV cache; one that does not may wait for ever, but not start."""
    return blocks_for(e, q.prompt + q.stop - 1) <= e.s.kv_blocks


@njit
def more_blocks(e: Engine, q, tokens: int) -> int:  # type: ignore[no-untyped-def]
    """KV blocks that q needs for `tokens` further tokens, beyond those it holds."""
    return max(0, blocks_for(e, q.computed + tokens) - q.blocks)


@njit
def decode_blocks(e: Engine) -> int:
    """KV blocks that all decodes together need for their next tokens."""
    need = 0
    for k in range(e.s.num_running):
        q = e.req[e.running[k]]
        if q.computed >= q.target and next_tokens(q) > 0:
            need += more_blocks(e, q, 1)
    return need


# ----------------------------------------------------------------------------------------- the peak of memory

# Requests as pairs (tokens still to come, tokens held) in `work`, from an offset `at` on, most tokens to
# come first. While all of them decode in lock-step, memory peaks when one of them completes: at the i-th
# pair i requests have grown by its `left` tokens each.


@njit
def set_pair(e: Engine, at: int, i: int, left: float, held: float) -> None:
    """Write pair i."""
    e.work[at + 2 * i] = left
    e.work[at + 2 * i + 1] = held


@njit
def sort_pairs(e: Engine, at: int, n: int) -> None:
    """Put n pairs in order: a heap sort, in place."""
    for top in range(n // 2 - 1, -1, -1):
        _sift(e, at, top, n)
    for end in range(n - 1, 0, -1):
        _swap(e, at, 0, end)
        _sift(e, at, 0, end)


@njit
def _swap(e: Engine, at: int, i: int, j: int) -> None:
    work = e.work
    left, held = work[at + 2 * i], work[at + 2 * i + 1]
    set_pair(e, at, i, work[at + 2 * j], work[at + 2 * j + 1])
    set_pair(e, at, j, left, held)


@njit
def _sift(e: Engine, at: int, i: int, n: int) -> None:
    """Let pair i sink in a heap of n whose root has the fewest tokens to come."""
    work = e.work
    while True:
        child = 2 * i + 1
        if child >= n:
            return
        if child + 1 < n and work[at + 2 * child + 2] < work[at + 2 * child]:
            child += 1
        if work[at + 2 * i] <= work[at + 2 * child]:
            return
        _swap(e, at, i, child)
        i = child


@njit
def insert_pair(e: Engine, at: int, n: int, left: float, held: float) -> None:
    """Add a pair to n that are in order."""
    work = e.work
    i = n
    while i > 0 and work[at + 2 * i - 2] < left:
        set_pair(e, at, i, work[at + 2 * i - 2], work[at + 2 * i - 1])
        i -= 1
    set_pair(e, at, i, left, held)


@njit
def peak_with(e: Engine, at: int, n: int, left: float, held: float) -> float:
    """Most tokens that n requests in order and one more hold at once.

    The maximum over i of i * left_i + (held_1 + ... + held_i).
    """
    work = e.work
    total, peak = 0.0, 0.0
    count = 0
    placed = False
    for i in range(n + 1):
        if not placed and (i == n or work[at + 2 * i] < left):
            placed = True
            total += held
            count += 1
            peak = max(peak, total + count * left)
        if i < n:
            total += work[at + 2 * i + 1]
            count += 1
            peak = max(peak, total + count * work[at + 2 * i])
    return peak
