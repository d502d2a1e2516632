"""The frame of a step, the same for all environments: autoreset, what is shown.

Each environment brings two compiled functions:

    begin(env): load an episode and go on to its first decision.
    decide(env, given, lane): one step, with the environment's action in `given` (all actions, one after the
        other), and on to the next decision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmsched_env.core.compile import njit
from llmsched_env.core.engine import grant_decodes
from llmsched_env.core.run import _log_full
from llmsched_env.core.span import span
from llmsched_env.envs.episode import OVER, begin_iteration, close, decode_on, run_iteration
from llmsched_env.envs.lane import Env, env_at
from llmsched_env.envs.observation import TIMES, find_running, find_waiting, observe

NEXT_STEP, SAME_STEP, DISABLED = 0, 1, 2


@njit
def show(env: Env) -> None:
    """Write the observation; at the end of an episode every action is legal."""
    if env.v.phase == OVER:
        find_waiting(env)
        find_running(env)
        for i in range(len(env.mask)):
            env.mask[i] = 1
    observe(env)


@njit(inline="always")
def step_frame(  # type: ignore[no-untyped-def]
    table,
    actions,
    first: int,
    stop: int,
    begin: Callable[[Env], None],
    decide: Callable[[Env, Any, int], None],
) -> None:
    """A step of the environments [first, stop), each with its action, and the resets that fall due."""
    addresses, given = span(table), span(actions)
    for lane in range(first, stop):
        env = env_at(addresses, lane)
        v = env.v
        v.was_reset = 0
        if v.phase == OVER:
            if v.autoreset == NEXT_STEP:
                begin(env)
                v.reward = 0.0
                v.terminated = v.truncated = 0
                show(env)
            continue
        decide(env, given, lane)
        show(env)
        if v.phase == OVER:
            close(env)
            if v.autoreset == SAME_STEP:
                for i in range(len(env.final)):
                    env.final[i] = env.observation[i]
                reward, dt, terminated, truncated = v.reward, v.dt, v.terminated, v.truncated
                begin(env)
                v.reward, v.dt, v.terminated, v.truncated = reward, dt, terminated, truncated
                show(env)


@njit(inline="always")
def reset_frame(table, chosen, begin: Callable[[Env], None]) -> None:  # type: ignore[no-untyped-def]
    """Begin an episode in each of the environments that are chosen (a bool each)."""
    addresses = span(table)
    for lane in range(len(chosen)):
        if chosen[lane]:
            env = env_at(addresses, lane)
            begin(env)
            show(env)


# ---------------------------------------------------------------------- where a step is a whole iteration


@njit
def new_plan(env: Env) -> None:
    """Begin to plan the next iteration."""
    v = env.v
    if env.e.s.num_victims > 0:
        v.stale_wait = 1
    begin_iteration(env)
    v.stale_run = 1  # time has passed
    v.see_wait = max(v.see_wait, TIMES)


@njit
def pass_time(env: Env) -> None:
    """All decode, in this iteration and until something happens; if nobody runs, wait for an arrival."""
    e = env.e
    s = e.s
    grant_decodes(e, 0, True)
    decodes = s.num_planned
    run_iteration(env)
    if decodes > 0 and s.num_running > 0 and s.clock < env.v.horizon and not _log_full(e, env.log):
        decode_on(env)
