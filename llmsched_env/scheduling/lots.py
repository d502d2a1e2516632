"""Drawing lots: any feasible schedule that never preempts, at random; what a scheduler has to beat first."""

from __future__ import annotations

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.engine import grant
from llmsched_env.core.facts import known_tokens, random_unit
from llmsched_env.core.state import Engine
from llmsched_env.scheduling.routine import watermark


@njit
def plan_random(e: Engine) -> None:
    """Plan one iteration by drawing lots.

    Running requests are visited in random order, each takes part with probability 1/2; then requests are
    admitted in the queue's random order as long as a coin says so and they fit. Prefills get a chunk of
    random length. If the lots leave everybody out, they are drawn again with all coins up. The settings have
    to reserve each request's peak at admission.
    """
    if not _draw(e, 0.5):
        _draw(e, 1.0)


@njit
def _draw(e: Engine, chance: float) -> bool:
    """One round of lots; whether anything came of it."""
    s, req, order = e.s, e.req, e.victims
    n = s.num_running
    for k in range(n):
        order[k] = e.running[k]
    for k in range(n - 1, 0, -1):
        j = int(random_unit(e) * (k + 1))
        order[k], order[j] = order[j], order[k]
    for k in range(n):
        q = req[order[k]]
        if s.budget <= 0:
            break
        short = s.free < 1 and q.computed >= q.blocks * s.block_size  # ended, unseen as yet (async)
        if short or q.generated + q.in_flight >= q.limit or random_unit(e) >= chance:
            continue
        grant(e, order[k], _random_chunk(e, q.target - q.computed) if q.computed < q.target else 1)
    while s.budget > 0 and s.num_running < s.max_num_seqs and random_unit(e) < chance:
        r = queue.first_fit(e, s.free - watermark(e))
        if r < 0 or not grant(e, r, _random_chunk(e, known_tokens(req[r]))):
            break
    return s.num_planned > 0


@njit
def _random_chunk(e: Engine, rest: int) -> int:
    """From 1 to what is left of the prefill and the budget, each as likely."""
    return 1 + int(random_unit(e) * min(rest, e.s.budget))
