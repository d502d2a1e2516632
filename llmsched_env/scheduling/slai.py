"""SLAI: decodes that would miss their deadline first, then prefills, then the other decodes."""

from __future__ import annotations

import dataclasses

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.cost import batch_time
from llmsched_env.core.engine import grant
from llmsched_env.core.state import Engine
from llmsched_env.errors import InputError
from llmsched_env.scheduling.routine import admit, chunk_cap, make_room, visit_running
from llmsched_env.scheduling.settings import Pass

_CHUNKS = int(Pass.CHUNKS)
_TARGET = 0


@dataclasses.dataclass(frozen=True)
class SlaiSettings:
    """tpot_target_s: time between tokens (s) for requests without a target of their own."""

    tpot_target_s: float = 0.1

    def __post_init__(self) -> None:
        if not self.tpot_target_s > 0:
            raise InputError(f"tpot_target_s must be positive seconds, not {self.tpot_target_s}")


@njit
def plan_slai(e: Engine) -> None:
    """Plan one iteration. A decode is urgent if its next token is due before a second full iteration ends."""
    s = e.s
    tokens = np.float64(s.token_budget)
    decodes, context = np.float64(s.num_running), np.float64(s.kv_tokens)
    full = batch_time(e.cost, tokens, 1.0, 0.5 * tokens * tokens, 0.0, decodes, context)
    _decode(e, s.clock + 2.0 * full)
    visit_running(e, _CHUNKS, chunk_cap(e), False)
    admit(e, chunk_cap(e))
    _decode(e, np.inf)


@njit
def _decode(e: Engine, until: float) -> None:
    """Grant the decodes whose next token is due before `until` (s), in running order."""
    s = e.s
    i = 0
    while i < s.num_running and s.budget > 0:
        r = e.running[i]
        q = e.req[r]
        decodes = q.granted == 0 and q.computed >= q.target and q.generated + q.in_flight < q.limit
        target = q.tpot_target if q.tpot_target < np.inf else s.x[_TARGET]
        if not decodes or q.last_token + target >= until:
            i += 1
            continue
        i = make_room(e, i, 1)
        if i < 0:  # it had to go itself
            i = -1 - i
            continue
        grant(e, r, 1)
        i += 1
