"""The dynamics of `llmsched/Dispatch-v0`: each step sets the one scheduling routine for the next iteration.

An action has five entries:

    order        of the queue. 0 FIFO: first come first served, and who is preempted goes to the head;
                 1 OUTPUT: shortest predicted output first; 2 AREA: least predicted KV area; 3 PROMPT:
                 shortest prompt; 4 DEADLINE: earliest deadline of the first token.
    budget       l: at most `levels[l]` tokens in the iteration (decodes use them up, but none is left out for
                 them); the last: all of the engine's token budget.
    mixing       0 MIXED: running requests in list order, then admissions, in one batch; 1 PREFILLS:
                 unfinished prefills, then admissions, and decodes only if there are none; 2 DECODES: decodes,
                 then prefills, then admissions, in one batch; 3 ALONE: decodes, and the others only if nobody
                 decodes.
    victim       who is preempted when KV blocks run out: 0 the newest; 1 who has the fewest KVs; 2 the most.
    reservation  KV cache that an admission reserves. 0 CHUNK: for its chunk (if its whole prompt would fit);
                 1 KNOWN: for prompt, and answer so far; 2 PREDICTED: for prompt and predicted output;
                 3 LONGEST: for the model length.

The mask lies flat, one part after the other. What needs predictions (OUTPUT, AREA, PREDICTED) is legal where
the length regime gives any, budgets below all where the engine cuts prompts, LONGEST if it fits into the KV
cache, everything else always. In place of an entry that is not legal stands the first legal one.

All other settings are the rules that the engine's template was packed with: `RULES`, which are vLLM V1's, or
those of another scheduler. With its own rules and engine a scheduler is a constant action, if it is one at
all (`express` finds it, or says what is missing):

    vllm-v1   FIFO, all, MIXED, newest, CHUNK          srf, lrf            the same with victim 1, 2
    sarathi   FIFO, all (512), DECODES, newest, KNOWN  sarathi-nohy        the same with ALONE
    orca      FIFO, all, DECODES, newest, LONGEST      faster-transformer  the same with ALONE
    vllm-v0   FIFO, all, PREFILLS, newest, KNOWN       sjf, edf            as sarathi with OUTPUT, DEADLINE

With `RULES`, vLLM V1, SRF and LRF are exact, and so is Sarathi, with 512 as the budget, as long as the KV
cache does not run short: that its decodes want a free block even inside their last one, and that it admits
while it preempts, are rules of its own. So it is with Orca's prompts, which are never cut and may exceed the
budget. What no action has: other orders and victims (priorities, attained service, scores), a reservation of
the declared length, admission by forecast or by preemption, and routines of their own (TensorRT-LLM, SGLang,
...).

Where forced steps are skipped, an iteration is no step in which all choices give the same plan: all decode,
all have blocks, and nobody waits who could be admitted; nor is waiting for an arrival.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.engine import Order, Place, _need, queue_key
from llmsched_env.core.facts import blocks_for
from llmsched_env.core.run import _log_full
from llmsched_env.core.state import Hold
from llmsched_env.envs.episode import BUILDING, FORCED, begin_step, end_step, load, over, run_iteration
from llmsched_env.envs.frame import new_plan, pass_time, reset_frame, step_frame
from llmsched_env.envs.lane import Env
from llmsched_env.envs.observation import LengthInfo, find_running, find_waiting
from llmsched_env.errors import InputError
from llmsched_env.scheduling.routine import plan_unified
from llmsched_env.scheduling.settings import Pass, Routine, Settings, Victim

RULES = Settings(resume=Place.KEY, admit_after_preemption=False, watermark_when_idle=False)


class Queue(enum.IntEnum):
    """The choices of the first entry."""

    FIFO = 0
    OUTPUT = 1
    AREA = 2
    PROMPT = 3
    DEADLINE = 4


class Mixing(enum.IntEnum):
    """The choices of the third entry."""

    MIXED = 0
    PREFILLS = 1
    DECODES = 2
    ALONE = 3


class Reserve(enum.IntEnum):
    """The choices of the fifth entry."""

    CHUNK = 0
    KNOWN = 1
    PREDICTED = 2
    LONGEST = 3


VICTIMS = (Victim.NEWEST, Victim.SHORTEST, Victim.LONGEST)  # the choices of the fourth entry
PARTS = 5

_FIFO, _OUTPUT, _AREA, _PROMPT, _DEADLINE = (int(x) for x in Queue)
_MIXED, _PREFILLS, _DECODES, _ALONE = (int(x) for x in Mixing)
_CHUNK, _KNOWN, _PREDICTED, _LONGEST = (int(x) for x in Reserve)
_NUM_ORDERS, _NUM_MIXINGS, _NUM_VICTIMS, _NUM_RESERVES = len(Queue), len(Mixing), len(VICTIMS), len(Reserve)
_ORDERS = tuple(int(x) for x in (Order.FIFO, Order.OUTPUT, Order.AREA, Order.PROMPT, Order.DEADLINE))
_RULES = tuple(int(x) for x in VICTIMS)
_TESTS = tuple(int(x) for x in (Hold.KNOWN, Hold.KNOWN, Hold.PREDICTED, Hold.MODEL_LEN))
_HOLDS = tuple(int(x) for x in (Hold.CHUNK, Hold.KNOWN, Hold.PREDICTED, Hold.MODEL_LEN))
_HEAD = int(Place.HEAD)
_HOLD_KNOWN = int(Hold.KNOWN)
_NO_PASS, _RUNNING = int(Pass.NONE), int(Pass.RUNNING)
_PASS_DECODES, _CHUNKS, _ADMIT = int(Pass.DECODES), int(Pass.CHUNKS), int(Pass.ADMIT)
_NOTHING = int(LengthInfo.NONE)


def nvec(num_levels: int) -> NDArray[np.int64]:
    """(5,) choices of each entry of an action."""
    return np.array([_NUM_ORDERS, num_levels, _NUM_MIXINGS, _NUM_VICTIMS, _NUM_RESERVES], np.int64)


def mask_size(num_levels: int) -> int:
    """Length of the mask."""
    return int(nvec(num_levels).sum())


# ---------------------------------------------------------------------- named schedulers


def express(settings: Settings, num_levels: int) -> NDArray[np.int64]:
    """The action that, taken always, is the scheduler with these settings, if the engine's template has them,
    too.

    A reservation of the peak is that of the prediction: the same where lengths are predicted by an oracle.

    Raises:
        InputError: if there is none, naming the setting that no action has.
    """
    s = settings
    if s.routine is not Routine.UNIFIED:
        raise _inexpressible("routine", s.routine)
    passes: tuple[Pass, ...] = tuple(p for p in s.passes if p is not Pass.SWAP_IN)  # nobody is swapped
    if not (s.chunked and s.limit_prefills) and s.chunk_cap == 0 and Pass.CHUNKS not in passes:
        passes = _WITH_CHUNKS.get(passes, passes)  # there are none
    if (passes, s.mixed) not in _MIXINGS:
        raise _inexpressible("passes", ",".join(p.name for p in s.passes) + f" with mixed={s.mixed}")
    order = {_ORDERS[q]: q for q in Queue}.get(int(s.order))
    if order is None:
        raise _inexpressible("order", s.order)
    if order is Queue.FIFO and s.resume is not Place.HEAD:
        raise _inexpressible("resume", s.resume)
    if s.victim not in VICTIMS:
        raise _inexpressible("victim", s.victim)
    reserve = _reserve_of(s)
    for name in _UNCHANGED:
        if getattr(s, name) != getattr(Settings, name):
            raise _inexpressible(name, getattr(s, name))
    mixing, victim = _MIXINGS[passes, s.mixed], VICTIMS.index(s.victim)
    return np.array([order, num_levels - 1, mixing, victim, reserve], np.int64)


_RUN_ALL = (Pass.RUNNING, Pass.ADMIT)
_PREFILLS_FIRST = (Pass.CHUNKS, Pass.ADMIT, Pass.DECODES)
_DECODES_FIRST = (Pass.DECODES, Pass.CHUNKS, Pass.ADMIT)
_MIXINGS: dict[tuple[tuple[Pass, ...], bool], Mixing] = {
    (_RUN_ALL, True): Mixing.MIXED,
    (_PREFILLS_FIRST, False): Mixing.PREFILLS,
    (_DECODES_FIRST, True): Mixing.DECODES,
    (_DECODES_FIRST, False): Mixing.ALONE,
}
_WITH_CHUNKS: dict[tuple[Pass, ...], tuple[Pass, ...]] = {
    (Pass.ADMIT, Pass.DECODES): _PREFILLS_FIRST,
    (Pass.DECODES, Pass.ADMIT): _DECODES_FIRST,
}
# With any of these a plan may change while all decode.
_UNCHANGED = ("admission_preempts", "preempt_for_priority", "prefill_interval", "budget_rule", "peak")


def _reserve_of(s: Settings) -> Reserve:
    """The reservation that comes to the same as a test and a hold together."""
    if s.hold is Hold.CHUNK and s.test is Hold.KNOWN:
        return Reserve.CHUNK
    if s.hold is Hold.KNOWN and s.test in (Hold.CHUNK, Hold.KNOWN):
        return Reserve.KNOWN
    if s.hold in (Hold.PREDICTED, Hold.PEAK) and s.test in (Hold.CHUNK, Hold.KNOWN, s.hold):
        return Reserve.PREDICTED
    if s.hold is Hold.MODEL_LEN:
        return Reserve.LONGEST
    raise _inexpressible("hold", f"{s.hold.name} with test={s.test.name}")


def _inexpressible(name: str, value: Any) -> InputError:
    text = value.name if isinstance(value, enum.Enum) else value
    return InputError(f"no action of Dispatch has {name}={str(text).lower().replace('_', '-')}")


# ---------------------------------------------------------------------- the mask


@njit
def legal(env: Env) -> None:
    """Write the mask, which is the same all through an episode."""
    e, v, mask = env.e, env.v, env.mask
    s = e.s
    for i in range(len(mask)):
        mask[i] = 1
    predictions = 0 if v.length_info == _NOTHING else 1
    mask[_OUTPUT] = mask[_AREA] = predictions
    if not s.chunked:
        for k in range(v.num_levels - 1):
            mask[_NUM_ORDERS + k] = 0
    at = len(mask) - _NUM_RESERVES
    mask[at + _PREDICTED] = predictions
    mask[at + _LONGEST] = 1 if blocks_for(e, s.max_model_len) + s.watermark_blocks <= s.kv_blocks else 0


@njit
def matters(env: Env) -> bool:
    """Whether the next plan depends on the settings; notes whether decodes lack blocks."""
    e, v = env.e, env.v
    s = e.s
    prefills, need = 0, 0
    for k in range(s.num_running):
        q = e.req[e.running[k]]
        if q.computed < q.target:
            prefills += 1
        elif q.computed >= q.blocks * s.block_size:
            need += 1
    v.phase = FORCED if need > s.free else BUILDING
    if s.num_running == 0:
        return s.num_waiting > 0 or s.arrived == len(e.req)
    if prefills > 0 or need + (1 if s.free_block_for_decode else 0) > s.free:
        return True
    if s.limit_decodes and s.num_running > s.token_budget:
        return True
    if s.num_waiting == 0 or s.num_running >= s.max_num_seqs:
        return False
    # No test asks for less than the tokens that are known.
    return s.test != _HOLD_KNOWN or e.req[s.root].least + s.watermark_blocks <= s.free


# ---------------------------------------------------------------------- the settings


@njit
def sort_queue(env: Env, anew: bool) -> None:
    """Bring the waiting queue into line with the settings: each request's need of blocks, and with `anew` its
    place."""
    e = env.e
    s, n = e.s, 0
    r = queue.first(e)
    while r >= 0:
        e.pending[n] = r
        n += 1
        r = queue.following(e, r)
    s.root = -1
    s.num_waiting = 0
    for k in range(n):
        r = e.pending[k]
        q = e.req[r]
        q.need = _need(e, q)
        if anew:
            q.key = queue_key(e, r)
            q.order = q.rank
        queue.insert(e, r)


@njit
def choose(env: Env, order: int, budget: int, mixing: int, victim: int, reserve: int) -> None:
    """Set the engine's record to the choices of an action, for the plan that begins."""
    e, v = env.e, env.v
    s = e.s
    anew = s.order != _ORDERS[order]
    if anew or s.test != _TESTS[reserve] or s.hold != _HOLDS[reserve]:
        s.order = _ORDERS[order]
        s.resume = _HEAD if order == _FIFO else env.template.resume
        s.test, s.hold = _TESTS[reserve], _HOLDS[reserve]
        sort_queue(env, anew)
        v.stale_wait = 1
    s.victim = _RULES[victim]
    s.mixed = 1 if mixing == _MIXED or mixing == _DECODES else 0
    if mixing == _MIXED:
        s.pass0, s.pass1, s.pass2 = _RUNNING, _ADMIT, _NO_PASS
    elif mixing == _PREFILLS:
        s.pass0, s.pass1, s.pass2 = _CHUNKS, _ADMIT, _PASS_DECODES
    else:
        s.pass0, s.pass1, s.pass2 = _PASS_DECODES, _CHUNKS, _ADMIT
    s.pass3 = _NO_PASS
    if budget < v.num_levels - 1:
        s.budget = min(s.budget, v.levels[budget])
        s.limit_decodes = 0


# ---------------------------------------------------------------------- the step


@njit(forceinline=True)
def settle(env: Env) -> None:
    """Go on as long as the settings do not matter and that is skipped; find who is visible, what is legal."""
    v = env.v
    while not matters(env) and v.skip_forced and not _log_full(env.e, env.log):
        pass_time(env)
        if over(env):
            return
        new_plan(env)
    if v.stale_wait:
        find_waiting(env)
    find_running(env)
    legal(env)


@njit
def begin(env: Env) -> None:
    """Begin the episode that is drawn."""
    load(env)
    s = env.e.s
    s.by_arrival = 0
    s.order, s.resume = _ORDERS[_FIFO], _HEAD
    s.test, s.hold = _TESTS[_CHUNK], _HOLDS[_CHUNK]
    new_plan(env)
    settle(env)
    end_step(env)


@njit(forceinline=True)
def _part(env: Env, choice: int, first: int, size: int) -> int:
    """The choice of a part of the action whose mask begins at `first`; in place of an illegal one the first
    that is legal."""
    if 0 <= choice < size and env.mask[first + choice] != 0:
        return choice
    k = 0
    while env.mask[first + k] == 0 and k < size - 1:
        k += 1
    return k


@njit(forceinline=True)
def decide(env: Env, given: Any, lane: int) -> None:
    """One step: an action of any numbers, and what follows of itself."""
    e, v = env.e, env.v
    s, levels, at = e.s, v.num_levels, lane * PARTS
    begin_step(env)
    v.steps += 1
    order = _part(env, given[at], 0, _NUM_ORDERS)
    budget = _part(env, given[at + 1], _NUM_ORDERS, levels)
    first = _NUM_ORDERS + levels
    mixing = _part(env, given[at + 2], first, _NUM_MIXINGS)
    victim = _part(env, given[at + 3], first + _NUM_MIXINGS, _NUM_VICTIMS)
    reserve = _part(env, given[at + 4], first + _NUM_MIXINGS + _NUM_VICTIMS, _NUM_RESERVES)
    if (
        order != given[at]
        or budget != given[at + 1]
        or mixing != given[at + 2]
        or victim != given[at + 3]
        or reserve != given[at + 4]
    ):
        v.illegal += 1
    v.last_action = (
        ((order * levels + budget) * _NUM_MIXINGS + mixing) * _NUM_VICTIMS + victim
    ) * _NUM_RESERVES + reserve
    choose(env, order, budget, mixing, victim, reserve)
    waiting = s.num_waiting
    plan_unified(e)
    if s.num_waiting != waiting:
        v.stale_wait = 1
    if s.num_victims > 0:
        v.num_run = 0  # one may be back in its place, and yet not what it was
    s.limit_decodes = env.template.limit_decodes
    run_iteration(env)
    if not over(env):
        new_plan(env)
        settle(env)
    end_step(env)


@njit
def step_dispatch(table, actions, first: int, stop: int) -> None:  # type: ignore[no-untyped-def]
    """A step of the environments [first, stop), and the resets that fall due; `actions` is (E, 5) int64."""
    step_frame(table, actions, first, stop, begin, decide)


@njit
def reset_dispatch(table, chosen) -> None:  # type: ignore[no-untyped-def]
    """Begin an episode in each of the environments that are chosen (a bool each)."""
    reset_frame(table, chosen, begin)
