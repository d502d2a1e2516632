"""The kinds of environments: the actions of each, and the compiled code behind a step of one or of many.

A step writes what it brought into `out`, float64 (4, E): reward, seconds that passed, 1 if the episode has
terminated, 1 if it was truncated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gymnasium import spaces

from llmsched_env.core.compile import njit
from llmsched_env.core.engine import Place
from llmsched_env.core.span import span
from llmsched_env.envs import batch, decision, dispatch
from llmsched_env.envs.crew import BLOCK, claim, finish
from llmsched_env.envs.episode import OVER, close
from llmsched_env.envs.frame import NEXT_STEP
from llmsched_env.envs.lane import env_at
from llmsched_env.envs.options import HOLDS, WAITING_ORDERS, Options
from llmsched_env.scheduling import Settings

REWARD, DT, TERMINATED, TRUNCATED = range(4)


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """What tells the environments of one id from those of another.

    Attributes:
        name: of the global variable below that holds it.
        action_space: of one environment, by options. The mask has a number for each choice of each entry.
        settings: of the engine that a step finds, by options.
        unread: options that have no meaning here.
        reset: compiled (table, chosen): begin the drawn episode in the environments chosen, a bool each.
        step: compiled (table, actions, out, first, stop, max_steps) -> events: a step of the environments
            [first, stop), whose episodes are cut after `max_steps` steps (0: never); returns in how many an
            episode has ended or begun.
        share: compiled (state, who, table, actions, out, max_steps, patience): steps of all environments,
            together with other threads, see `crew`.
    """

    name: str
    action_space: Callable[[Options], spaces.Discrete | spaces.MultiDiscrete]
    settings: Callable[[Options], Settings]
    unread: tuple[str, ...]
    reset: Callable[..., None]
    step: Callable[..., int]
    share: Callable[..., None]

    def mask_parts(self, options: Options) -> tuple[int, ...]:
        """Numbers of the mask for each entry of an action."""
        space = self.action_space(options)
        return (int(space.n),) if isinstance(space, spaces.Discrete) else tuple(space.nvec.tolist())

    def __reduce__(self) -> str:
        return self.name  # pickled as what it is: the same for all


@njit
def _harvest(table, out, first: int, stop: int, max_steps: int) -> int:  # type: ignore[no-untyped-def]
    """Write what the step of these environments brought, and cut episodes that are long enough.

    The first step of an episode also brings what came before its decision.
    """
    addresses = span(table)
    events = 0
    for lane in range(first, stop):
        env = env_at(addresses, lane)
        v = env.v
        ended = out[TERMINATED, lane] + out[TRUNCATED, lane] > 0.0
        if v.was_reset == 0 and not ended:
            out[REWARD, lane] = v.total if v.steps == 1 else v.reward
            out[DT, lane] = v.dt
            if v.phase == OVER or 0 < max_steps <= v.steps:
                out[TERMINATED, lane] = v.terminated
                out[TRUNCATED, lane] = 1.0 if 0 < max_steps <= v.steps else v.truncated
                events += 1
                if v.phase != OVER:
                    v.phase = OVER
                    for i in range(len(env.mask)):
                        env.mask[i] = 1
                    close(env)
        elif v.was_reset == 0 or v.autoreset == NEXT_STEP:  # it stays as it ended, or has begun anew
            out[REWARD, lane] = 0.0
            out[DT, lane] = 0.0
            if v.was_reset != 0:
                out[DT, lane] = env.e.s.clock
                out[TERMINATED, lane] = out[TRUNCATED, lane] = 0.0
                events += 1
        else:  # it ended, and has begun anew
            out[REWARD, lane] = v.done_return if v.done_steps == 1 else v.reward
            out[DT, lane] = v.dt
            out[TERMINATED, lane] = v.terminated
            out[TRUNCATED, lane] = 1.0 if 0 < max_steps <= v.done_steps else v.truncated
            events += 1
    return events


@njit
def tally(table, lane: int) -> None:  # type: ignore[no-untyped-def]
    """Keep the figures of the episode of an environment as if it ended now."""
    close(env_at(span(table), lane))


def _queue(options: Options) -> Settings:
    """Where actions name requests: what is visible in which order, and what an admission reserves."""
    hold, peak = HOLDS[options.hold]
    return Settings(
        order=WAITING_ORDERS[options.waiting_order],
        resume=Place.KEY,
        hold=hold,
        peak=peak,
        watermark_when_idle=False,
    )


# ---------------------------------------------------------------------- Decision-v0


@njit
def _step_decision(table, actions, out, first: int, stop: int, max_steps: int) -> int:  # type: ignore[no-untyped-def]
    events = 0
    for at in range(first, stop, BLOCK):  # read while it is still in the processor's cache
        end = min(at + BLOCK, stop)
        decision.step_decision(table, actions, at, end)
        events += _harvest(table, out, at, end, max_steps)
    return events


@njit
def _share_decision(state, who: int, table, actions, out, max_steps: int, patience: int) -> None:  # type: ignore[no-untyped-def]
    first = claim(state, who, patience)
    while first >= 0:
        stop = min(first + BLOCK, len(table))
        finish(state, _step_decision(table, actions, out, first, stop, max_steps))
        first = claim(state, who, patience)


def _decisions(options: Options) -> spaces.Discrete:
    levels = len(options.chunk_levels) + 1
    return spaces.Discrete(decision.num_actions(options.waiting_slots, options.running_slots, levels))


DECISION = Kind(
    name="DECISION",
    action_space=_decisions,
    settings=_queue,
    unread=(),
    reset=decision.reset_decision,
    step=_step_decision,
    share=_share_decision,
)


# ---------------------------------------------------------------------- Batch-v0


@njit
def _step_batch(table, actions, out, first: int, stop: int, max_steps: int) -> int:  # type: ignore[no-untyped-def]
    events = 0
    for at in range(first, stop, BLOCK):
        end = min(at + BLOCK, stop)
        batch.step_batch(table, actions, at, end)
        events += _harvest(table, out, at, end, max_steps)
    return events


@njit
def _share_batch(state, who: int, table, actions, out, max_steps: int, patience: int) -> None:  # type: ignore[no-untyped-def]
    first = claim(state, who, patience)
    while first >= 0:
        stop = min(first + BLOCK, len(table))
        finish(state, _step_batch(table, actions, out, first, stop, max_steps))
        first = claim(state, who, patience)


def _batches(options: Options) -> spaces.MultiDiscrete:
    levels = len(options.chunk_levels) + 1
    return spaces.MultiDiscrete(batch.nvec(options.waiting_slots, options.running_slots, levels))


BATCH = Kind(
    name="BATCH",
    action_space=_batches,
    settings=_queue,
    unread=("readmit", "work_conserving"),
    reset=batch.reset_batch,
    step=_step_batch,
    share=_share_batch,
)


# ---------------------------------------------------------------------- Dispatch-v0


@njit
def _step_dispatch(table, actions, out, first: int, stop: int, max_steps: int) -> int:  # type: ignore[no-untyped-def]
    events = 0
    for at in range(first, stop, BLOCK):
        end = min(at + BLOCK, stop)
        dispatch.step_dispatch(table, actions, at, end)
        events += _harvest(table, out, at, end, max_steps)
    return events


@njit
def _share_dispatch(state, who: int, table, actions, out, max_steps: int, patience: int) -> None:  # type: ignore[no-untyped-def]
    first = claim(state, who, patience)
    while first >= 0:
        stop = min(first + BLOCK, len(table))
        finish(state, _step_dispatch(table, actions, out, first, stop, max_steps))
        first = claim(state, who, patience)


def _dispatches(options: Options) -> spaces.MultiDiscrete:
    return spaces.MultiDiscrete(dispatch.nvec(len(options.chunk_levels) + 1))


DISPATCH = Kind(
    name="DISPATCH",
    action_space=_dispatches,
    settings=lambda options: dispatch.RULES,
    unread=("waiting_order", "hold", "preempt", "readmit", "idle", "work_conserving"),
    reset=dispatch.reset_dispatch,
    step=_step_dispatch,
    share=_share_dispatch,
)
