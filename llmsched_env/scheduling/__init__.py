"""Scheduling: the one routine and its settings, and the compiled functions that plan an iteration."""

from __future__ import annotations

from llmsched_env.core.compile import njit
from llmsched_env.core.run import READY, Log, after_plan, before_plan
from llmsched_env.core.span import span
from llmsched_env.core.state import Engine, Lanes, engine_at
from llmsched_env.scheduling.routine import plan_unified
from llmsched_env.scheduling.scheduler import ENGINE, Scheduler
from llmsched_env.scheduling.settings import Budget, Pass, Peak, Routine, Settings, Sort, Victim

__all__ = ["ENGINE", "Budget", "Pass", "Peak", "Routine", "Scheduler", "Settings", "Sort", "Victim", "plan", "run_lane"]

_UNIFIED = int(Routine.UNIFIED)


@njit
def plan(e: Engine) -> None:
    """Plan the next iteration by the routine that the engine's settings name."""
    plan_unified(e)


@njit
def run_lane(lanes: Lanes, lane: int, log: Log, most: int, horizon: float, skip: int) -> int:
    """Advance one engine under its built-in scheduler; see `core.run.advance`, whose loop this is."""
    e = engine_at(lanes, lane)
    spans = Log(span(log.rows), span(log.requests), span(log.tokens), span(log.used))
    last = e.s.iterations + most
    outcome = READY
    while outcome == READY:
        outcome = before_plan(e, spans, last, horizon)
        if outcome == READY:
            plan(e)
            outcome = after_plan(e, spans, last, horizon, skip)
    return outcome
