"""Cruising: requests that decode in lock-step, advanced together at the price of one.

Most running requests do nothing but decode, a token an iteration, until their answers end. The first
`cruising` of the running list are advanced by counting `steps` alone. While they cruise,

- their records hold `computed` and `generated` less `steps`, so that adding `steps` gives what is true now,
  and the KV blocks they began with; `last_token` is `cruised_at` for all of them;
- `due[k]` is the step after which the k-th must be looked at, because its answer ends or the blocks that it
  reserved are used up; `next_due` is the smallest;
- `crossings[i]` counts those that take a KV block in the steps that leave remainder i when divided by the
  block size, `crossers` all of them;
- `cruise_context` is the sum of the tokens that their next decodes read.

Whoever needs their records as they are calls `wake` first. What comes out is equal to the last bit.
"""

from __future__ import annotations

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.facts import blocks_for, finish
from llmsched_env.core.state import CROSSINGS, Engine

NEVER = 2**31 - 1
_REST = 16  # iterations without cruising after blocks or budget ran short: joining costs a walk


@njit(forceinline=True)
def _crosses(e: Engine, q) -> bool:  # type: ignore[no-untyped-def]
    """Whether q, by the blocks it began with, will ever need another."""
    return q.blocks * e.s.block_size < q.prompt + q.stop - 1


@njit(forceinline=True)
def _crossing(e: Engine, q) -> int:  # type: ignore[no-untyped-def]
    """The remainder of the steps in which cruising q takes a block."""
    return -q.computed % e.s.block_size  # computed may be below 0


@njit(forceinline=True)
def join(e: Engine) -> None:
    """Let running requests cruise, from the first that does not yet, as long as each got the last token of
    its decode, or its first token, at this moment.
    """
    s, req, running = e.s, e.req, e.running
    if s.block_size > CROSSINGS or s.iterations < s.rest_until:
        return
    if s.cruising == 0:
        s.steps = 0
        s.next_due = NEVER
        s.cruised_at = s.clock
    elif s.cruised_at != s.clock:
        return
    k = s.cruising
    steps = s.steps
    while k < s.num_running:
        q = req[running[k]]
        if q.computed < q.target or q.last_token != s.clock:
            break
        s.cruise_context += q.computed + 1
        unused = q.blocks * s.block_size - q.computed
        q.computed -= steps
        q.generated -= steps
        due = q.stop - q.generated
        if _crosses(e, q):
            if unused < s.block_size:
                s.crossings[_crossing(e, q)] += 1
                s.crossers += 1
            else:
                due = steps + unused
        e.due[k] = due
        s.next_due = min(s.next_due, due)
        k += 1
    s.cruising = k


@njit(forceinline=True)
def cruise(e: Engine) -> bool:
    """Plan one token for each request that cruises; False if budget, batch or blocks might not suffice."""
    s = e.s
    n = s.cruising
    if s.limit_decodes and n > s.budget:
        return False
    if s.max_batch_requests > 0 and s.num_planned + n > s.max_batch_requests:
        return False
    need = s.crossings[np.uint32(s.steps) % np.uint32(s.block_size)] if s.crossers > 0 else 0
    if need + (1 if s.free_block_for_decode else 0) > s.free:
        return False
    s.free -= need
    s.cruised = n
    s.decodes += n
    s.decode_context += s.cruise_context
    s.budget -= n
    return True


@njit
def wake(e: Engine) -> None:
    """Bring the records of those that cruise up to date; none does then. What `cruise` planned for them in
    this iteration becomes ordinary grants."""
    s, req = e.s, e.req
    granted = 1 if s.cruised > 0 else 0
    for k in range(s.cruising):
        r = e.running[k]
        _surface(e, req[r], granted)
        if granted:
            req[r].granted = 1
            e.plan[s.num_planned] = r
            s.num_planned += 1
    s.cruising = 0
    s.cruised = 0
    _forget(e)


@njit
def rest(e: Engine) -> None:
    """`wake`, and cruise no more for a while: what they need runs short."""
    wake(e)
    e.s.rest_until = e.s.iterations + _REST


@njit(forceinline=True)
def _surface(e: Engine, q, granted: int) -> None:  # type: ignore[no-untyped-def]
    """Bring one record up to date, with the blocks that it took and those that `granted` tokens take."""
    s = e.s
    q.computed += s.steps
    q.generated += s.steps
    q.last_token = s.cruised_at
    q.blocks = max(q.blocks, blocks_for(e, q.computed + granted))


@njit
def _forget(e: Engine) -> None:
    s = e.s
    s.cruise_context = 0
    if s.crossers > 0:
        s.crossers = 0
        for i in range(s.block_size):
            s.crossings[i] = 0


@njit(forceinline=True)
def step(e: Engine, steps: int, now: float) -> None:
    """Those that cruise have decoded in `steps` iterations, the last of which ended at `now`; their blocks
    are taken already."""
    s = e.s
    s.steps += steps
    s.cruise_context += steps * s.cruising
    s.cruised_at = now
    if s.steps >= s.next_due:
        _look(e)


@njit
def _look(e: Engine) -> None:
    """Look at those that are due: finish them, or let them take blocks from now on."""
    s, req, running, due = e.s, e.req, e.running, e.due
    kept = 0
    soonest = NEVER
    for k in range(s.cruising):
        r, when = running[k], due[k]
        if when == s.steps:
            q = req[r]
            when = q.stop - q.generated
            if when == s.steps:
                s.cruise_context -= q.computed + s.steps + 1
                if _crosses(e, q):
                    s.crossings[_crossing(e, q)] -= 1
                    s.crossers -= 1
                _surface(e, q, 0)
                finish(e, r, s.clock)
                continue
            s.crossings[_crossing(e, q)] += 1
            s.crossers += 1
        running[kept] = r
        due[kept] = when
        kept += 1
        soonest = min(soonest, when)
    gone = s.cruising - kept
    if gone > 0:
        for k in range(s.cruising, s.num_running):
            running[k - gone] = running[k]
        s.num_running -= gone
        s.cruising = kept
    s.next_due = soonest


@njit(forceinline=True)
def steps_with_blocks(e: Engine, most: int) -> int:
    """In how many of the next `most` steps the free blocks suffice."""
    s = e.s
    spare = s.free - (1 if s.free_block_for_decode else 0)
    if spare < 0:
        return 0
    if s.crossers == 0:
        return most
    laps = spare // s.crossers
    spare -= laps * s.crossers
    steps = laps * s.block_size
    while steps < most:
        need = s.crossings[(s.steps + steps) % s.block_size]
        if need > spare:
            return steps
        spare -= need
        steps += 1
    return most


@njit(forceinline=True)
def take_blocks(e: Engine, steps: int) -> None:
    """Take the blocks of the next `steps` steps."""
    s = e.s
    if s.crossers == 0:
        return
    laps = steps // s.block_size
    s.free -= laps * s.crossers
    for j in range(laps * s.block_size, steps):
        s.free -= s.crossings[(s.steps + j) % s.block_size]
