"""Scheduling: the one routine and its settings, and the compiled functions that plan an iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmsched_env.core.compile import njit
from llmsched_env.core.engine import (
    SWAPPED,
    arrive,
    begin_plan,
    collect,
    end_plan,
    evict,
    execute,
    execute_behind,
    grant,
    grant_error,
    swap_in,
)
from llmsched_env.core.lanes import EngineView
from llmsched_env.core.run import (
    DONE,
    READY,
    SWAPPED_IN,
    Log,
    after_plan,
    before_plan,
    begin_run,
    end_run,
    log_plan,
    write_log,
)
from llmsched_env.core.span import span
from llmsched_env.core.state import Engine, Lanes, engine_at
from llmsched_env.scheduling.fastserve import plan_fastserve
from llmsched_env.scheduling.levels import plan_levels
from llmsched_env.scheduling.lightllm import plan_lightllm
from llmsched_env.scheduling.lots import plan_random
from llmsched_env.scheduling.priority_rule import plan_rule
from llmsched_env.scheduling.ranked import plan_ranked
from llmsched_env.scheduling.routine import plan_unified
from llmsched_env.scheduling.scheduler import ENGINE, Scheduler
from llmsched_env.scheduling.settings import Budget, Pass, Peak, Routine, Settings, Sort, Victim
from llmsched_env.scheduling.sglang import plan_sglang
from llmsched_env.scheduling.simple_chunking import plan_simple_chunking
from llmsched_env.scheduling.slai import plan_slai
from llmsched_env.scheduling.sorted_f import plan_sorted_f
from llmsched_env.scheduling.tgi import plan_tgi
from llmsched_env.scheduling.trtllm import plan_trtllm
from llmsched_env.scheduling.vtc import plan_vtc
from llmsched_env.scheduling.wait import plan_wait

__all__ = [
    "ENGINE",
    "Budget",
    "Pass",
    "Peak",
    "Routine",
    "Scheduler",
    "Settings",
    "Sort",
    "Victim",
    "plan",
    "run_compiled",
    "run_iteration",
    "run_lane",
    "run_python",
    "run_schedule",
    "run_unified",
]

_RANDOM, _FASTSERVE, _SGLANG, _TRTLLM, _LIGHTLLM, _TGI, _VTC, _RANKED = (int(r) for r in list(Routine)[1:9])
_SORTED_F, _WAIT, _SLAI, _SIMPLE_CHUNKING, _PRIORITY_RULE, _LEVELS = (int(r) for r in list(Routine)[9:])


@njit
def plan(e: Engine) -> None:
    """Plan the next iteration by the routine that the engine's settings name."""
    routine = e.s.routine
    if routine == _RANDOM:
        plan_random(e)
    elif routine == _FASTSERVE:
        plan_fastserve(e)
    elif routine == _SGLANG:
        plan_sglang(e)
    elif routine == _TRTLLM:
        plan_trtllm(e)
    elif routine == _LIGHTLLM:
        plan_lightllm(e)
    elif routine == _TGI:
        plan_tgi(e)
    elif routine == _VTC:
        plan_vtc(e)
    elif routine == _RANKED:
        plan_ranked(e)
    elif routine == _SORTED_F:
        plan_sorted_f(e)
    elif routine == _WAIT:
        plan_wait(e)
    elif routine == _SLAI:
        plan_slai(e)
    elif routine == _SIMPLE_CHUNKING:
        plan_simple_chunking(e)
    elif routine == _PRIORITY_RULE:
        plan_rule(e)
    elif routine == _LEVELS:
        plan_levels(e)
    else:
        plan_unified(e)


@njit(inline="always")
def run_compiled(
    lanes: Lanes, lane: int, decide: Callable[[Engine], None], log: Log, most: int, horizon: float, skip: int
) -> int:
    """Advance one engine under the compiled scheduler `decide(e)` for at most `most` iterations, or until
    `horizon` (s); returns an `Outcome`.
    """
    e = engine_at(lanes, lane)
    spans = Log(span(log.rows), span(log.requests), span(log.tokens), span(log.used))
    last = e.s.iterations + most
    outcome = READY
    begin_run(e, spans, skip)
    while outcome == READY:
        outcome = before_plan(e, spans, last, horizon)
        if outcome == READY:
            decide(e)
            outcome = after_plan(e, spans, last, horizon, skip)
    end_run(e)
    return outcome


@njit
def run_lane(lanes: Lanes, lane: int, log: Log, most: int, horizon: float, skip: int) -> int:
    """`run_compiled` under the routine that the engine's settings name."""
    return run_compiled(lanes, lane, plan, log, most, horizon, skip)


@njit
def run_unified(lanes: Lanes, lane: int, log: Log, most: int, horizon: float, skip: int) -> int:
    """`run_lane` for the one routine, which most schedulers are settings of; compiled in half the time."""
    return run_compiled(lanes, lane, plan_unified, log, most, horizon, skip)


def run_python(
    view: EngineView, own: Callable[[Any], None], log: Log, most: int, horizon: float, skip: int
) -> int:
    """`run_compiled` for a scheduler `own(e)` in plain Python."""
    e = view.compiled
    last = int(view.s.iterations) + most
    outcome = READY
    while outcome == READY:
        outcome = before_plan(e, log, last, horizon)
        if outcome == READY:
            own(view)
            outcome = after_plan(e, log, last, horizon, skip)
    return int(outcome)


@njit
def run_schedule(  # type: ignore[no-untyped-def]
    lanes: Lanes, lane: int, log: Log, most: int, horizon: float, start_s, ends, requests, tokens
) -> int:
    """Advance one engine by the decisions of a schedule (`core.schedule.Schedule`), from the iteration that
    the engine stands at.
    """
    e = engine_at(lanes, lane)
    s = e.s
    spans = Log(span(log.rows), span(log.requests), span(log.tokens), span(log.used))
    last = s.iterations + most
    outcome = READY
    while outcome == READY:
        if s.iterations >= len(ends):  # used up
            collect(e)
            return DONE
        outcome = before_plan(e, spans, last, horizon)
        if outcome == READY:
            j = s.iterations
            if start_s[j] > s.clock:  # the engine idled
                collect(e)
                s.clock = s.visible = start_s[j]
                arrive(e, s.clock)
            for k in range(ends[j - 1] if j > 0 else 0, ends[j]):
                r = requests[k]
                if s.visible < s.clock and not _possible(e, r, tokens[k]):
                    collect(e)  # asynchronous: it waited for what the iteration before brings
                    s.visible = s.clock
                    arrive(e, s.clock)
                if tokens[k] == SWAPPED_IN:
                    swap_in(e, r)
                elif tokens[k] <= 0:
                    evict(e, r)
                else:
                    if 0 <= r < len(e.req) and e.req[r].status == SWAPPED:
                        swap_in(e, r)
                    grant(e, r, tokens[k])
            outcome = after_plan(e, spans, last, horizon, 0)
    return outcome


@njit
def _possible(e: Engine, r: int, tokens: int) -> bool:
    """Whether the engine can follow a decision of a schedule as it stands."""
    s = e.s
    if 0 <= r < len(e.req) and e.req[r].status == SWAPPED:
        return e.req[r].cpu_blocks <= s.free and s.num_running < s.max_num_seqs
    return tokens <= 0 or grant_error(e, r, tokens) == 0


@njit
def run_iteration(lanes: Lanes, lane: int, log: Log, until: float) -> int:
    """Exactly one iteration, arrivals up to `until` (s) seen, even if nothing is planned; returns the blocks
    free once it is planned.

    For holding an engine against a recording, iteration by iteration.
    """
    e = engine_at(lanes, lane)
    s = e.s
    spans = Log(span(log.rows), span(log.requests), span(log.tokens), span(log.used))
    arrive(e, until)
    begin_plan(e)
    plan(e)
    end_plan(e)
    free = s.free
    log_plan(e, spans)
    start = s.clock
    if s.asynchronous:
        collect(e)
        execute_behind(e)
    else:
        execute(e)
    write_log(e, spans, start)
    return free
