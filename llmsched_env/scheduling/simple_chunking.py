"""Sarathi-Serve's simple chunking: prefill chunks and decodes take turns."""

from __future__ import annotations

import dataclasses

from llmsched_env.core.compile import njit
from llmsched_env.core.state import Engine
from llmsched_env.scheduling.routine import admit, chunk_cap, sort_running, visit_running
from llmsched_env.scheduling.settings import Pass

_DECODES, _CHUNKS = int(Pass.DECODES), int(Pass.CHUNKS)


@dataclasses.dataclass(frozen=True)
class SimpleChunking:
    """Parameters of simple chunking.

    Attributes:
        empty_turns: whether a decodes' turn that finds nothing leaves the plan empty, as in Sarathi-Serve,
            where that takes next to no time; `simulate` would take an empty plan for idleness.
    """

    empty_turns: bool = False


_EMPTY_TURNS = 0

# `work`: whether it is the decodes' turn, and the iteration after the one planned last.
_TURN, _NEXT = 0, 1
SIMPLE_CHUNKING_SIZE = 2


@njit
def plan_simple_chunking(e: Engine) -> None:
    """Plan one iteration: in the prefills' turn unfinished prefills, else admissions; else all decodes.

    A prefills' turn that finds nothing becomes the decodes' at once.
    """
    s, work = e.s, e.work
    if s.iterations > work[_NEXT]:  # decodes that were taken in one go
        work[_TURN] = 0.0
    work[_NEXT] = s.iterations + 1.0
    sort_running(e)
    if work[_TURN] > 0.0:
        visit_running(e, _DECODES, chunk_cap(e), False)
        work[_TURN] = 0.0
        if s.num_planned + s.num_victims > 0 or s.x[_EMPTY_TURNS] > 0.0:
            return
    visit_running(e, _CHUNKS, chunk_cap(e), False)
    if s.prefill_requests == 0:
        admit(e, chunk_cap(e))
    if s.prefill_requests > 0:
        work[_TURN] = 1.0
    else:
        visit_running(e, _DECODES, chunk_cap(e), False)
