"""The dynamics of `llmsched/Batch-v0`: one step is one whole iteration.

An action has an entry for each visible slot, the W waiting ones and then the R running ones. With L chunk
levels, the last of which is all that fits, an entry is one of L + 2 choices:

    0          SKIP: no tokens in this iteration
    1          RUN: a decode gets its token, a prefill or an admission all tokens that fit
    2 + l      LEVEL, l < L - 1: as RUN, with at most `levels[l]` tokens
    L + 1      PREEMPT (running slots only)

The mask lies flat, L + 2 numbers a slot, the waiting slots first. SKIP is always legal, for an empty slot
nothing else. A running request may always RUN, since preempting another may free the blocks that it lacks; a
waiting one if the engine has a seat and blocks for it, those of the visible running requests included where
these may be preempted (and if it fits the forecast of memory, where admissions have to and nobody may be
preempted). A LEVEL is legal where RUN is, of a prefill only if the engine cuts prompts. PREEMPT
is legal in all running slots if somebody must go (decodes lack blocks, or nobody decodes and no prefill has
room to go on), or, where voluntary preemption is allowed, while somebody waits or the blocks do not suffice
for all tokens that the running requests can use. An entry that is not legal counts as SKIP.

What does not fit together is resolved in this order, each entry getting what the budget, the seats and the KV
blocks (and the forecast) then allow, and nothing if that is no token:

    1. preemptions, in slot order;
    2. visible running requests, in slot order;
    3. running requests beyond the visible ones, which go on as if they said RUN, in the order of admission;
    4. visible waiting requests, in slot order: one that does not fit holds up nobody behind it. Those
       preempted in this step cannot be admitted in it, and those beyond the visible ones wait.

If that leaves the plan empty, and not just because all entries say SKIP where the engine may idle until the
next arrival, then so that time goes on:

    5. the requests admitted last are preempted until all decodes have their blocks, and somebody has a token;
       those that are left go on as if all said RUN;
    6. if nobody runs, the first visible waiting request that fits is admitted with all that fits.

Where forced steps are skipped, an iteration in which all can only decode, and all fit, is no step, nor is
waiting for an arrival.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.compile import njit
from llmsched_env.core.engine import evict, grant
from llmsched_env.core.facts import blocks_for
from llmsched_env.core.run import _log_full
from llmsched_env.envs.decision import NO_PEAK, foresee, most_to_admit, most_to_chunk, room_to_admit
from llmsched_env.envs.episode import (
    BUILDING,
    FORCED,
    begin_step,
    end_step,
    load,
    over,
    run_iteration,
)
from llmsched_env.envs.frame import new_plan, pass_time, reset_frame, step_frame
from llmsched_env.envs.lane import Env
from llmsched_env.envs.observation import find_running, find_waiting
from llmsched_env.scheduling.forecast import add_to_forecast, fits_forecast, forecast

SKIP, RUN, FIRST_LEVEL = 0, 1, 2


def num_choices(num_levels: int) -> int:
    """How many choices there are for a slot; the last is PREEMPT."""
    return num_levels + 2


def nvec(waiting_slots: int, running_slots: int, num_levels: int) -> NDArray[np.int64]:
    """(W + R,) choices of each entry of an action."""
    return np.full(waiting_slots + running_slots, num_choices(num_levels), np.int64)


def mask_size(waiting_slots: int, running_slots: int, num_levels: int) -> int:
    """Length of the mask."""
    return (waiting_slots + running_slots) * num_choices(num_levels)


# ---------------------------------------------------------------------- the mask


@njit
def look(env: Env) -> bool:
    """Find out whether somebody must be preempted, and write the mask; whether anything is to be decided."""
    e, v = env.e, env.v
    s = e.s
    decodes, able = 0, 0
    need, wish = 0, 0  # KV blocks that the decodes lack, and that all lack who run
    for k in range(s.num_running):
        q = e.req[e.running[k]]
        lacks = q.computed >= q.blocks * s.block_size
        if q.computed >= q.target:
            decodes += 1
            need += 1 if lacks else 0
        else:
            able += 0 if lacks and s.free == 0 else 1
            wish += max(0, blocks_for(e, min(q.target, q.computed + s.budget)) - q.blocks)
    wish += need
    stuck = need > s.free or (s.num_running > 0 and decodes + able == 0)
    v.phase = FORCED if stuck else BUILDING
    preempt = stuck or (v.voluntary and (s.num_waiting > 0 or wish > s.free))
    some = _write_mask(env, preempt)
    crowded = s.limit_decodes and s.num_running > s.budget
    return some or decodes < s.num_running or crowded or (preempt and s.num_running > 0)


@njit(forceinline=True)
def _write_mask(env: Env, preempt: bool) -> bool:
    """Write which choices are legal; whether a waiting request could be admitted."""
    e, v, mask = env.e, env.v, env.mask
    s = e.s
    chunked = s.chunked != 0
    blocks = room_to_admit(env)
    if s.peak != NO_PEAK:
        foresee(env, preempt)
    if preempt:
        blocks = s.free - (s.watermark_blocks if s.num_running > v.num_run else 0)
        for k in range(v.num_run):
            blocks += e.req[v.run[k]].blocks
    some = False
    at, choices, running = 0, v.num_levels + 2, v.waiting_slots
    for k in range(v.waiting_slots):
        fits = k < v.num_wait and most_to_admit(env, k, blocks) > 0
        some = some or fits
        _write_slot(mask, at, choices, fits, fits and chunked, False)
        at += choices
    for k in range(v.running_slots):
        there = k < v.num_run
        less = there and (chunked or env.brief[running + k].rest <= 0)
        _write_slot(mask, at, choices, there, less, there and preempt)
        at += choices
    return some


@njit(forceinline=True)
def _write_slot(mask: Any, at: int, choices: int, run: bool, levels: bool, preempt: bool) -> None:
    mask[at + SKIP] = 1
    mask[at + RUN] = run
    for i in range(at + FIRST_LEVEL, at + choices - 1):
        mask[i] = levels
    mask[at + choices - 1] = preempt


# ---------------------------------------------------------------------- the plan


@njit(forceinline=True)
def _choice(env: Env, given: Any, at: int, slot: int) -> int:
    """What the action says of this slot, SKIP in place of what is not legal."""
    choices = env.v.num_levels + 2
    choice = given[at + slot]
    if 0 <= choice < choices and env.mask[slot * choices + choice] != 0:
        return choice
    return SKIP


@njit(forceinline=True)
def _at_most(env: Env, choice: int, most: int) -> int:
    """Tokens of a chunk where at most so many fit."""
    return most if choice == RUN else min(most, env.v.levels[choice - FIRST_LEVEL])


@njit(forceinline=True)
def may_decode(env: Env) -> bool:
    """Whether the token budget lets another request decode."""
    s = env.e.s
    return s.budget > 0 or not s.limit_decodes


@njit
def go_on(env: Env) -> None:
    """Give the running requests that have no tokens yet, and are not marked as chosen, all that fits."""
    e = env.e
    s = e.s
    for k in range(s.num_running):
        r = e.running[k]
        q = e.req[r]
        if q.chosen or q.granted > 0:
            continue
        room = q.blocks * s.block_size - q.computed + s.free * s.block_size
        rest = q.target - q.computed
        if rest <= 0:
            if room > 0 and may_decode(env):
                grant(e, r, 1)
            continue
        most = min(rest, min(room, max(0, s.budget)))
        if most > 0 and (s.chunked or most == rest):
            grant(e, r, most)


@njit
def build(env: Env, given: Any, at: int) -> None:
    """Build the plan that the action asks for."""
    e, v = env.e, env.v
    s = e.s
    running, choices = v.waiting_slots, v.num_levels + 2
    asked = False
    illegal = 0
    for slot in range(v.waiting_slots + v.running_slots):
        choice = _choice(env, given, at, slot)
        asked = asked or choice != SKIP
        if choice != given[at + slot]:
            illegal = 1
    v.illegal += illegal
    hidden = s.num_running > v.num_run
    if hidden:
        for k in range(v.num_run):
            e.req[v.run[k]].chosen = 1
    for k in range(v.num_run):
        if _choice(env, given, at, running + k) == choices - 1:
            evict(e, v.run[k])
    for k in range(v.num_run):
        choice = _choice(env, given, at, running + k)
        if choice == SKIP or choice == choices - 1:
            continue
        b = env.brief[running + k]
        if b.rest <= 0:
            if may_decode(env) and (b.room > 0 or s.free > 0):
                grant(e, v.run[k], 1)
        else:
            tokens = _at_most(env, choice, most_to_chunk(env, k))
            if tokens > 0:
                grant(e, v.run[k], tokens)
    if hidden:
        go_on(env)
        for k in range(v.num_run):
            e.req[v.run[k]].chosen = 0
    rows = forecast(e) if s.peak != NO_PEAK and s.num_running > 0 else 0
    for k in range(v.num_wait):
        choice, r = _choice(env, given, at, k), v.wait[k]
        if choice == SKIP or (rows > 0 and not fits_forecast(e, r, rows)):
            continue
        tokens = _at_most(env, choice, most_to_admit(env, k, room_to_admit(env)))
        if tokens > 0:
            if s.peak != NO_PEAK:
                rows = add_to_forecast(e, r, rows)
            grant(e, r, tokens)
            v.stale_wait = 1
    if s.num_planned == 0 and (asked or not v.idle or s.arrived == len(e.req)):
        keep_going(env)


@njit
def keep_going(env: Env) -> None:
    """The plan is empty: let somebody be served, if there is anybody."""
    e, v = env.e, env.v
    s = e.s
    while s.num_running > 0:
        need = 0
        for k in range(s.num_running):
            q = e.req[e.running[k]]
            if q.computed >= q.target and q.computed >= q.blocks * s.block_size:
                need += 1
        if need <= s.free:
            go_on(env)
            if s.num_planned > 0:
                return
        evict(e, e.running[s.num_running - 1])
    if s.peak != NO_PEAK:
        foresee(env, False)
    for k in range(v.num_wait):
        most = most_to_admit(env, k, room_to_admit(env))
        if most > 0:
            grant(e, v.wait[k], most)
            v.stale_wait = 1
            return


# ---------------------------------------------------------------------- the step


@njit(forceinline=True)
def settle(env: Env) -> None:
    """Find who is visible and what is legal; go on as long as nothing is to decide and that is skipped."""
    e, v = env.e, env.v
    s = e.s
    while True:
        if v.stale_wait:
            find_waiting(env)
        if v.stale_run:
            find_running(env)
        if look(env) or not v.skip_forced or _log_full(e, env.log):
            return
        if s.num_running == 0 and s.arrived == len(e.req):
            return  # who waits can never be served
        pass_time(env)
        if over(env):
            return
        new_plan(env)


@njit
def begin(env: Env) -> None:
    """Begin the episode that is drawn."""
    load(env)
    new_plan(env)
    settle(env)
    end_step(env)


@njit(forceinline=True)
def decide(env: Env, given: Any, lane: int) -> None:
    """One step: an action of any numbers, and what follows of itself."""
    v = env.v
    begin_step(env)
    v.steps += 1
    build(env, given, lane * (v.waiting_slots + v.running_slots))
    run_iteration(env)
    if not over(env):
        new_plan(env)
        settle(env)
    end_step(env)


@njit
def step_batch(table, actions, first: int, stop: int) -> None:  # type: ignore[no-untyped-def]
    """A step of the environments [first, stop), and the resets that fall due; `actions`: (E, W + R) int64."""
    step_frame(table, actions, first, stop, begin, decide)


@njit
def reset_batch(table, chosen) -> None:  # type: ignore[no-untyped-def]
    """Begin an episode in each of the environments that are chosen (a bool each)."""
    reset_frame(table, chosen, begin)
