"""TGI without chunking: new prompts run alone, when enough of them wait or the decodes have run for long."""

from __future__ import annotations

import dataclasses

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.state import Engine
from llmsched_env.errors import InputError
from llmsched_env.scheduling.routine import admit, chunk_cap, visit_running
from llmsched_env.scheduling.settings import Pass

_DECODES = int(Pass.DECODES)


@dataclasses.dataclass(frozen=True)
class TGI:
    """Parameters of TGI.

    Attributes:
        waiting_served_ratio: requests that must wait for each one running before the decodes are interrupted
            for them.
        max_waiting_tokens: decode iterations after which they are in any case.
    """

    waiting_served_ratio: float = 0.3
    max_waiting_tokens: int = 20

    def __post_init__(self) -> None:
        if not (self.waiting_served_ratio >= 0 and self.max_waiting_tokens >= 0):
            raise InputError(f"waiting_served_ratio and max_waiting_tokens must not be negative, not {self}")


_RATIO, _MOST = range(2)


@njit
def plan_tgi(e: Engine) -> None:
    """Plan one iteration: admissions alone, if they are due and fit; else all decodes."""
    s = e.s
    enough = s.num_waiting >= np.floor(s.x[_RATIO] * s.num_running)
    late = s.iterations - s.last_prefill > s.x[_MOST]
    if s.num_running == 0 or enough or late:
        admit(e, chunk_cap(e))
    if s.prefill_requests > 0:
        s.last_prefill = s.iterations
    else:
        visit_running(e, _DECODES, chunk_cap(e), False)
