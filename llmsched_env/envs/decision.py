"""The dynamics of `llmsched/Decision-v0`: the next iteration's plan is built by one small decision after the
other.

Actions are numbered, with W waiting slots, R running slots and L chunk levels, the last of which is all that
fits:

    0                     RUN: execute the plan
    1                     HOLD: keep the decodes out of this plan
    2 + k*L + l           ADMIT the request in waiting slot k with chunk level l
    2 + (W + r)*L + l     CHUNK: go on with the prefill in running slot r with chunk level l
    2 + (W + R)*L + r     PREEMPT the request in running slot r
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.engine import evict, grant, grant_decodes, refund
from llmsched_env.core.facts import blocks_for, hold_tokens
from llmsched_env.core.run import _log_full
from llmsched_env.core.span import WORD, less_than, ones, store_word
from llmsched_env.envs import frame
from llmsched_env.envs.episode import (
    BUILDING,
    FORCED,
    OVER,
    begin_step,
    decode_on,
    end_step,
    load,
    over,
    run_iteration,
)
from llmsched_env.envs.frame import reset_frame, step_frame
from llmsched_env.envs.lane import Env
from llmsched_env.envs.observation import (
    drop_waiting,
    find_running,
    find_waiting,
    running_changed,
    running_joined,
    running_left,
)
from llmsched_env.scheduling.forecast import fits_forecast, forecast
from llmsched_env.scheduling.settings import Peak

RUN, HOLD, FIRST_SLOT = 0, 1, 2
NO_PEAK = int(Peak.NONE)
CLOSED = 2**31 - 1  # as many KV blocks as there never are


def num_actions(waiting_slots: int, running_slots: int, num_levels: int) -> int:
    """How many actions there are."""
    return FIRST_SLOT + (waiting_slots + running_slots) * num_levels + running_slots


# ---------------------------------------------------------------------- what a request could get


@njit(forceinline=True)
def room_to_admit(env: Env) -> int:
    """KV blocks that an admission may take, the watermark kept free while somebody runs; 0: nobody can be
    admitted."""
    s = env.e.s
    if s.num_running >= s.max_num_seqs or s.budget <= 0:
        return 0
    return max(0, s.free - (s.watermark_blocks if s.num_running > 0 else 0))


@njit
def foresee(env: Env, all_may_go: bool) -> None:
    """Where admissions must fit the forecast of memory: close the slots of those waiting who do not,
    unless those who run may all go."""
    e, v = env.e, env.v
    s = e.s
    rows = forecast(e) if s.num_running > 0 and not all_may_go else 0  # alone they fit
    for k in range(v.num_wait):
        r = v.wait[k]
        fits = rows == 0 or fits_forecast(e, r, rows)
        env.brief[k].hold = blocks_for(e, hold_tokens(e, e.req[r], s.hold)) if fits else CLOSED


@njit(forceinline=True)
def most_to_admit(env: Env, slot: int, blocks: int) -> int:
    """Most tokens that the request in this waiting slot could get with so many KV blocks; 0: none."""
    s, b = env.e.s, env.brief[slot]
    return _most_to_admit(b.rest, b.hold, s.budget, blocks, s.block_size, s.chunked != 0)


@njit(forceinline=True)
def _most_to_admit(rest: int, hold: int, budget: int, blocks: int, size: int, chunked: bool) -> int:
    if hold > blocks:
        return 0
    most = min(rest, budget)
    if hold == 0:
        most = min(most, blocks * size)
    return most if chunked or most == rest else 0


@njit(forceinline=True)
def most_to_chunk(env: Env, slot: int) -> int:
    """Most tokens that the prefill in this running slot could get; 0: none."""
    s, b = env.e.s, env.brief[env.v.waiting_slots + slot]
    return _most_to_chunk(b.rest, b.room + s.free * s.block_size, max(0, s.budget), s.chunked != 0)


@njit(forceinline=True)
def _most_to_chunk(rest: int, room: int, budget: int, chunked: bool) -> int:
    most = min(rest, min(budget, room))
    return most if chunked or most == rest else 0


# ---------------------------------------------------------------------- the mask


@njit(forceinline=True)
def legal(env: Env) -> int:
    """Write which actions are legal; returns the only one, or -1 if there are several."""
    e, v, mask = env.e, env.v, env.mask
    s = e.s
    for i in range(len(mask)):
        mask[i] = 0
    running = v.waiting_slots
    preempt = FIRST_SLOT + (v.waiting_slots + v.running_slots) * v.num_levels
    if v.phase == FORCED:
        for k in range(v.num_run):
            mask[preempt + k] = 1
        return preempt if v.num_run == 1 else -1
    if s.peak != NO_PEAK and v.num_wait > 0:
        foresee(env, False)
    num_levels, chunked, budget, size = v.num_levels, s.chunked != 0, s.budget, s.block_size
    # Which bytes of a word are levels that can be chosen: only all that fits unless there are chunks.
    last = np.uint64(8 * (num_levels - 1))
    choices = ~np.uint64(0) >> (np.uint64(56) - last) if chunked else np.uint64(255) << last
    count = 0
    blocks = room_to_admit(env)
    if blocks > 0:
        for k in range(v.num_wait):
            b = env.brief[k]
            most = _most_to_admit(b.rest, b.hold, budget, blocks, size, chunked)
            count += _allow_levels(mask, v.levels, FIRST_SLOT + k * num_levels, choices, most)
    prefills = s.prefill_requests
    short = False  # a prefill lacks blocks
    if s.decodes + prefills < s.num_running and budget > 0:  # somebody is not in the plan
        free = s.free * size
        for k in range(v.num_run):
            b = env.brief[running + k]
            rest = max(0, b.rest)
            most = _most_to_chunk(rest, b.room + free, budget, chunked)
            short |= most < min(rest, budget)
            count += _allow_levels(mask, v.levels, FIRST_SLOT + (running + k) * num_levels, choices, most)
    fill = count
    if s.decodes > 0 and not v.held and (fill > 0 or prefills > 0 or _room_without_decodes(env)):
        mask[HOLD] = 1
        count += 1
    planned = s.decodes + prefills > 0
    stuck = not planned and fill == 0
    # Somebody must wait who could be admitted in this plan, or lack blocks, or nothing else is possible.
    waits = s.num_waiting > (0 if v.readmit else s.num_victims)
    if (v.voluntary and (waits or short)) or stuck:
        for k in range(v.num_run):
            may = 1 - env.brief[running + k].fixed
            mask[preempt + k] = may
            count += may
    if planned:
        go = not (v.work_conserving and fill > 0)
    else:
        go = count == 0 or (v.idle and s.arrived < len(e.req))
    if go:
        mask[RUN] = 1
        count += 1
    if count > 1:
        return -1
    only = RUN
    while mask[only] == 0:
        only += 1
    return only


@njit
def _room_without_decodes(env: Env) -> bool:
    """Whether anybody could be given tokens if the decodes of this plan were held."""
    s, v = env.e.s, env.v
    taken = 0
    for k in range(s.num_planned):
        taken += _taken(env, env.e.req[env.e.plan[k]])
    budget, chunked = s.budget + s.decodes, s.chunked != 0
    free = s.free + taken
    for k in range(v.num_run):
        b = env.brief[v.waiting_slots + k]
        room = b.room + free * s.block_size
        if b.rest > 0 and _most_to_chunk(b.rest, room, budget, chunked) > 0:
            return True
    blocks = free - s.watermark_blocks
    if s.num_running < s.max_num_seqs and blocks > 0:
        for k in range(v.num_wait):
            b = env.brief[k]
            if _most_to_admit(b.rest, b.hold, budget, blocks, s.block_size, chunked) > 0:
                return True
    return False


@njit(forceinline=True)
def _taken(env: Env, q) -> int:  # type: ignore[no-untyped-def]
    """KV blocks that q took for its decode in this plan."""
    if q.computed < q.target:
        return 0
    return q.blocks - blocks_for(env.e, max(q.computed, q.hold))


@njit(forceinline=True)
def _allow_levels(mask, levels, at: int, choices: np.uint64, most: int) -> int:  # type: ignore[no-untyped-def]
    """Allow the levels that are less than `most`, all that fits being level 0; returns how many.

    What lies behind them in the mask is written later.
    """
    word = less_than(levels, most) & choices
    if at + WORD <= len(mask):
        store_word(mask, at, word)
    else:
        for i in range(at, len(mask)):
            mask[i] = (word >> np.uint64(8 * (i - at))) & np.uint64(1)
    return ones(word)


# ---------------------------------------------------------------------- the decisions


@njit
def decode_all(env: Env) -> None:
    """Put all decodes into the plan, if there are blocks for their next tokens; else somebody must go."""
    e, v = env.e, env.v
    s = e.s
    if s.free < s.num_running:
        need = 0
        for k in range(s.num_running):
            q = e.req[e.running[k]]
            if q.computed >= q.target and q.computed >= q.blocks * s.block_size:
                need += 1
        if need > s.free:
            v.phase = FORCED
            return
    v.phase = BUILDING
    grant_decodes(e, 0, True)
    v.stale_run = 1


@njit
def new_plan(env: Env) -> None:
    """Begin to plan the next iteration."""
    env.v.held = 0
    frame.new_plan(env)
    decode_all(env)


@njit(forceinline=True)
def apply(env: Env, action: int) -> None:
    """Do what a legal action says."""
    e, v = env.e, env.v
    s = e.s
    if action == RUN:
        run_iteration(env)
        if not over(env):
            new_plan(env)
        return
    if action == HOLD:
        v.held = 1
        for k in range(s.num_planned - 1, -1, -1):
            q = e.req[e.plan[k]]
            if q.computed >= q.target:
                taken = _taken(env, q)
                refund(e, e.plan[k])
                q.blocks -= taken
                s.free += taken
        v.stale_run = 1
        return
    slot, level = divmod(action - FIRST_SLOT, v.num_levels)
    if slot < v.waiting_slots:
        r = v.wait[slot]
        tokens = _tokens(env, most_to_admit(env, slot, room_to_admit(env)), level)
        drop_waiting(env, slot)
        grant(e, r, tokens)
        running_joined(env)
    elif slot < v.waiting_slots + v.running_slots:
        slot -= v.waiting_slots
        grant(e, v.run[slot], _tokens(env, most_to_chunk(env, slot), level))
        running_changed(env, slot)
    else:
        slot = action - FIRST_SLOT - (v.waiting_slots + v.running_slots) * v.num_levels
        evict(e, v.run[slot])
        if v.readmit:
            v.stale_wait = 1  # else it is not visible as waiting before the next plan
        running_left(env, slot)
        if v.phase == FORCED:
            decode_all(env)


@njit(forceinline=True)
def _tokens(env: Env, most: int, level: int) -> int:
    """Tokens of a chunk of this level where at most so many fit."""
    return most if level == env.v.num_levels - 1 else min(most, env.v.levels[level])


@njit(forceinline=True)
def settle(env: Env) -> None:
    """Find who is visible and what is legal; do it, as long as it is a single action and such are skipped."""
    v = env.v
    while v.phase != OVER:
        if v.stale_wait:
            find_waiting(env)
        if v.stale_run:
            find_running(env)
        only = legal(env)
        if only < 0 or not v.skip_forced or _log_full(env.e, env.log):
            return
        if only == RUN and decode_on_from(env):
            if not over(env):
                new_plan(env)
            continue
        apply(env, only)


@njit(forceinline=True)
def decode_on_from(env: Env) -> bool:
    """`apply` RUN to a plan in which all decode, and all that follows until somebody arrives."""
    e = env.e
    s = e.s
    if s.num_waiting > 0 or s.decodes != s.num_running or s.decodes == 0 or s.prefill_requests > 0:
        return False
    run_iteration(env)
    if s.num_running > 0 and s.clock < env.v.horizon and not _log_full(e, env.log):
        decode_on(env)
    return True


@njit(forceinline=True)
def decide(env: Env, given: Any, lane: int) -> None:
    """One step: an action of any number, and what follows of itself."""
    v = env.v
    begin_step(env)
    v.steps += 1
    action = given[lane]
    if action < 0 or action >= len(env.mask) or env.mask[action] == 0:
        v.illegal += 1
        action = RUN
        while env.mask[action] == 0 and action < len(env.mask) - 1:
            action += 1
    v.last_action = action
    apply(env, action)
    settle(env)
    end_step(env)


@njit
def begin(env: Env) -> None:
    """Begin the episode that is drawn."""
    load(env)
    new_plan(env)
    settle(env)
    end_step(env)


@njit
def step_decision(table, actions, first: int, stop: int) -> None:  # type: ignore[no-untyped-def]
    """A step of the environments [first, stop), each with its action, and the resets that fall due."""
    step_frame(table, actions, first, stop, begin, decide)


@njit
def reset_decision(table, chosen) -> None:  # type: ignore[no-untyped-def]
    """Begin an episode in each of the environments that are chosen (a bool each)."""
    reset_frame(table, chosen, begin)
