"""Experts: the named schedulers, and schedules, answering with the environments' own actions.

    env = gym.make("llmsched/Decision-v0", scenario="azure-conv")
    expert = baselines.expert("vllm-v1")
    env.reset(seed=0)
    done = False
    while not done:
        *_, terminated, truncated, _ = env.step(expert(env))
        done = terminated or truncated

An episode driven by an expert has the finish times that `simulate` gives for its requests. The expert keeps
an engine of its own that its scheduler drives, iteration by iteration, and translates each plan. Where
somebody else has acted, it starts anew from the state of the environment, so that it can be asked at any time
(as a teacher is).

The expert of a schedule, such as the optimum that `baselines.optimal` found, drives its engine by that
schedule and so repeats it action by action: a demonstration to imitate. It knows nothing of states beside its
path.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from baselines.registry import get
from llmsched_env.core import queue
from llmsched_env.core.compile import njit
from llmsched_env.core.engine import FINISHED, FUTURE, RUNNING, WAITING, Place, enter_queue, evict, grant
from llmsched_env.core.facts import blocks_for
from llmsched_env.core.lanes import LaneSpec, make_lanes
from llmsched_env.core.requests import Requests
from llmsched_env.core.run import ITERATION as _ROW
from llmsched_env.core.run import READY, Log, after_plan, before_plan
from llmsched_env.core.schedule import Schedule
from llmsched_env.core.span import copy_record, span
from llmsched_env.core.state import Lanes, engine_at
from llmsched_env.envs import dispatch
from llmsched_env.envs.episode import FORCED
from llmsched_env.envs.lane import env_at
from llmsched_env.envs.options import hold_of
from llmsched_env.errors import InputError
from llmsched_env.scheduling import ENGINE, Peak, Scheduler, plan
from llmsched_env.simulation import replay

if TYPE_CHECKING:
    from baselines.optimal import Solution

_KEY, _END = int(Place.KEY), int(Place.END)
_NEVER = 2**62
_EPISODE, _PLANNED = 0, 1  # what is kept of each lane: the episode it follows, whether its plan is made

# Why a plan cannot be said in actions.
_TOKENS, _HIDDEN, _ILLEGAL, _PARTIAL, _BACK, _SWAP, _STOPPED, _FORCED, _IDLES, _LEFT, _MORE = range(
    -2, -13, -1
)
_WHY = {
    _TOKENS: "it gives request {r} {n} tokens, which is no chunk level and not all that fits; change "
    "chunk_levels or token_budget",
    _HIDDEN: "request {r} is not visible; raise waiting_slots or running_slots, or change which are visible "
    "(waiting_order, running_order)",
    _ILLEGAL: "what it does with request {r} is not allowed here; check the options preempt, hold and idle",
    _PARTIAL: "it lets some requests decode and passes over request {r}; here all decode, or none",
    _BACK: "it preempts request {r} and admits it again in the same iteration; Decision-v0 can with "
    "readmit=True, Batch-v0 cannot",
    _SWAP: "it swaps request {r}; here preempted requests are recomputed",
    _STOPPED: "it has no plan, as if nobody were left to serve",
    _FORCED: "decodes find no KV block, so that somebody must be preempted here, and it preempts nobody",
    _IDLES: "it idles, which is possible here until the next arrival (and with idle=True)",
    _LEFT: "the episode is not where it would be; somebody else has acted, or a step was passed through in "
    "which it does what is not legal (make it with skip_forced=False to see where)",
    _MORE: "it runs a plan in which others could be given tokens; make it with work_conserving=False",
}


class _Rows(NamedTuple):
    """The arrays of a `Schedule`; of length 0: none is followed."""

    start_s: Any
    ends: Any
    requests: Any
    tokens: Any


# ---------------------------------------------------------------------- the scheduler's own engine


@njit
def _start(lanes: Lanes, lane: int, table, template) -> None:  # type: ignore[no-untyped-def]
    """The episode of the environment from its beginning."""
    e, env = engine_at(lanes, lane), env_at(span(table), lane)
    copy_record(e.s, span(template)[0])
    for r in range(len(e.req)):
        q = e.req[r]
        copy_record(q, env.e.req[r])
        q.status = FUTURE
        q.computed = q.target = q.generated = q.blocks = q.granted = q.in_flight = q.hold = 0
        q.last_token = q.first_token = q.first_scheduled = q.finish = np.nan
        q.key = 0.0
        q.order = 0
        q.up = q.left = q.right = -1
        q.need = q.least = 0
        q.evicted_at = q.returned_at = -1
        q.recomputed = 0
        q.preemptions = q.swaps = q.evicted_rest = q.cpu_blocks = 0
        q.level = q.count = q.before = q.after = q.chosen = 0
        q.score = 0.0
    for i in range(len(e.work)):
        e.work[i] = 0.0


@njit
def _copy(lanes: Lanes, lane: int, table, template) -> None:  # type: ignore[no-untyped-def]
    """The state of the environment as it was when the present plan was begun (but who was preempted since has
    lost what it had)."""
    e, env = engine_at(lanes, lane), env_at(span(table), lane)
    s, other = e.s, env.e
    iterations = s.iterations
    random = s.random
    copy_record(s, span(template)[0])
    s.iterations = max(iterations, other.s.iterations)
    s.random = random
    s.clock, s.visible, s.arrived = other.s.clock, other.s.visible, other.s.arrived
    s.num_finished, s.num_dropped = other.s.num_finished, other.s.num_dropped
    s.total_generated, s.total_prefill = other.s.total_generated, other.s.total_prefill
    s.last_progress = s.iterations
    for r in range(len(e.req)):
        q, o = e.req[r], other.req[r]
        level, count, score, before, after = q.level, q.count, q.score, q.before, q.after
        copy_record(q, o)
        q.level, q.count, q.score, q.before, q.after = level, count, score, before, after
        q.evicted_at = q.returned_at = -1
        if q.status == FINISHED:
            k = 0
            while q.prompt >> (k + 1):
                k += 1
            s.class_count[k] += 1.0
            s.class_total[k] += q.prompt + q.generated
        if q.status == RUNNING:
            if q.computed == 0:  # admitted in this plan
                q.status = WAITING
                q.blocks = q.granted = q.hold = 0
            else:
                q.granted = 0
                q.blocks = blocks_for(e, max(q.computed, q.hold))
                s.free -= q.blocks
                s.kv_tokens += q.computed
    for k in range(other.s.num_running):
        r = other.running[k]
        if e.req[r].status == RUNNING:
            e.running[s.num_running] = r
            s.num_running += 1
        else:
            enter_queue(e, r, _END if s.order == 0 else _KEY)
    r = queue.first(other)
    while r >= 0:
        enter_queue(e, r, _END if s.order == 0 else _KEY)
        r = queue.following(other, r)


@njit
def _plan(e, rows: _Rows) -> bool:  # type: ignore[no-untyped-def]
    """The next plan: the scheduler's, or that of the schedule; with nothing in it, the engine idles until the
    next arrival. False if the schedule waits for something else."""
    if len(rows.ends) == 0:
        plan(e)
        return True
    s = e.s
    j = s.iterations
    if j < len(rows.ends) and rows.start_s[j] > s.clock:
        return s.arrived < len(e.req) and e.req[s.arrived].arrival <= rows.start_s[j]
    if j < len(rows.ends):
        for k in range(rows.ends[j - 1] if j > 0 else 0, rows.ends[j]):
            r, tokens = rows.requests[k], rows.tokens[k]
            if tokens > 0:
                grant(e, r, tokens)
            else:
                evict(e, r)
    return True


@njit
def _make_plan(  # type: ignore[no-untyped-def]
    lanes: Lanes, lane: int, table, template, kept, log: Log, rows: _Rows
) -> int:
    """Bring the scheduler's plan up to the iteration that the environment is planning; READY, or why not."""
    e, env = engine_at(lanes, lane), env_at(span(table), lane)
    s, other = e.s, env.e.s
    spans = Log(span(log.rows), span(log.requests), span(log.tokens), span(log.used))
    if kept[lane, _EPISODE] != env.v.begun:
        _start(lanes, lane, table, template)
        kept[lane, _EPISODE] = env.v.begun
        kept[lane, _PLANNED] = 0
    while True:
        if kept[lane, _PLANNED]:
            if s.clock >= other.clock:
                break
            kept[lane, _PLANNED] = 0
            if after_plan(e, spans, _NEVER, np.inf, 0) != READY:
                break
        elif s.clock > other.clock or (s.clock == other.clock and not _same(e, env.e)):
            break
        else:
            if before_plan(e, spans, _NEVER, np.inf) != READY:
                break
            if not _plan(e, rows):
                return _IDLES
            kept[lane, _PLANNED] = 1
    if kept[lane, _PLANNED] and s.clock == other.clock and s.error == 0:
        waiting = s.num_planned == 0 and len(rows.ends) > 0
        return _IDLES if waiting and env.v.idle == 0 else READY
    if len(rows.ends) > 0:
        return _LEFT
    _copy(lanes, lane, table, template)
    kept[lane, _PLANNED] = 0
    if before_plan(e, spans, _NEVER, np.inf) != READY:
        return _STOPPED
    plan(e)
    kept[lane, _PLANNED] = 1
    return READY


@njit
def _same(e, other) -> bool:  # type: ignore[no-untyped-def]
    """Whether both engines have done the same so far."""
    s, o = e.s, other.s
    return (
        s.total_generated == o.total_generated
        and s.total_prefill == o.total_prefill
        and s.num_finished == o.num_finished
        and s.busy == o.busy
    )


# ---------------------------------------------------------------------- Decision-v0


@njit
def _decide(  # type: ignore[no-untyped-def]
    lanes: Lanes, lane: int, table, template, kept, log: Log, rows: _Rows, strict: bool
):
    """The next action of Decision-v0 towards the plan, the request it is about, and its tokens; below 0: why
    there is none. What is not strict does as much of the plan as can be done."""
    outcome = _make_plan(lanes, lane, table, template, kept, log, rows)
    e, env = engine_at(lanes, lane), env_at(span(table), lane)
    v, mask = env.v, env.mask
    levels = v.num_levels
    preempt = 2 + (v.waiting_slots + v.running_slots) * levels
    if outcome != READY:
        return (outcome if strict else _any(mask)), 0, 0
    for k in range(e.s.num_victims):
        r = e.victims[k]
        why = 0
        if e.req[r].status == RUNNING and not v.readmit:
            why = _BACK
        elif e.req[r].cpu_blocks > 0:
            why = _SWAP
        elif env.e.req[r].status == RUNNING and env.e.req[r].evicted_at != env.e.s.iterations:
            slot = _find(v.run, v.num_run, r)
            why = _HIDDEN if slot < 0 else _ILLEGAL if mask[preempt + slot] == 0 else 0
            if why == 0:
                return preempt + slot, r, 0
        if why < 0 and strict:
            return why, r, 0
    if v.phase == FORCED:
        return (_FORCED if strict else _any(mask)), 0, 0
    passed_over, decodes = -1, 0
    for k in range(env.e.s.num_running):
        r = env.e.running[k]
        q = env.e.req[r]
        if q.computed >= q.target:
            if e.req[r].granted > 0:
                decodes += 1
            else:
                passed_over = r
    if passed_over >= 0:
        if decodes > 0:
            if strict:
                return _PARTIAL, passed_over, 0
        elif env.e.s.decodes > 0:
            if mask[1]:
                return 1, passed_over, 0
            if strict:
                return _ILLEGAL, passed_over, 0
    why, who, amount = 0, 0, 0
    for k in range(e.s.num_planned):
        r = e.plan[k]
        tokens, q = e.req[r].granted, env.e.req[r]
        if tokens == 0 or q.granted > 0:
            continue
        if q.status == RUNNING:
            slot = _find(v.run, v.num_run, r)
            first = 2 + (v.waiting_slots + slot) * levels
            rest = q.target - q.computed
        else:
            slot = _find(v.wait, v.num_wait, r)
            first = 2 + slot * levels
            rest = q.prompt + q.generated
        last = first + levels - 1
        if slot < 0 or mask[last] == 0:
            why, who = _HIDDEN if slot < 0 else _ILLEGAL, r
            continue
        most = _all_that_fits(env, r, rest)
        if tokens == most or (tokens > most and not strict):
            return last, r, tokens
        best = -1
        for level in range(levels - 1):
            if mask[first + level] and v.levels[level] <= tokens:
                best = level
        if best >= 0 and (v.levels[best] == tokens or not strict):
            return first + best, r, tokens
        why, who, amount = _TOKENS, r, tokens  # once the others have theirs, it may be all that fits
    if strict and why < 0:
        return why, who, amount
    if mask[0]:
        return 0, 0, 0
    if strict:
        return _MORE, 0, 0
    for slot in range(v.waiting_slots + v.running_slots):  # the plan must be filled: whoever comes first
        last = 1 + (slot + 1) * levels
        if mask[last]:
            return last, 0, 0
    return _any(mask), 0, 0


@njit
def _any(mask) -> int:  # type: ignore[no-untyped-def]
    """The first legal action."""
    action = 0
    while mask[action] == 0:
        action += 1
    return action


@njit
def _all_that_fits(env, r: int, rest: int) -> int:  # type: ignore[no-untyped-def]
    """Tokens of the level that is all that fits."""
    s, q = env.e.s, env.e.req[r]
    most = min(rest, s.budget)
    if q.status == RUNNING:
        return min(most, (q.blocks + s.free) * s.block_size - q.computed)
    if s.hold > 0:
        return most
    free = s.free - (s.watermark_blocks if s.num_running > 0 else 0)
    return min(most, free * s.block_size)


@njit
def _find(slots, seen: int, r: int) -> int:  # type: ignore[no-untyped-def]
    for k in range(seen):
        if slots[k] == r:
            return k
    return -1


# ---------------------------------------------------------------------- Batch-v0


@njit
def _fill(  # type: ignore[no-untyped-def]
    lanes: Lanes, lane: int, table, template, kept, log: Log, rows: _Rows, strict: bool, action
):
    """Write the action of Batch-v0 that is the plan; returns 0, or why there is none, with which request."""
    outcome = _make_plan(lanes, lane, table, template, kept, log, rows)
    e, env = engine_at(lanes, lane), env_at(span(table), lane)
    v = env.v
    choices = v.num_levels + 2
    for slot in range(v.waiting_slots + v.running_slots):
        action[slot] = 0
    if outcome != READY:
        return (outcome if strict else 0), 0, 0
    for k in range(e.s.num_victims):
        r = e.victims[k]
        slot = _find(v.run, v.num_run, r)
        if strict:
            if e.req[r].status == RUNNING:
                return _BACK, r, 0
            if e.req[r].cpu_blocks > 0:
                return _SWAP, r, 0
            if slot < 0:
                return _HIDDEN, r, 0
        if slot >= 0:
            action[v.waiting_slots + slot] = v.num_levels + 1
    short = -1  # whose chunk is no level: all that fits will do, if that is as much
    for k in range(e.s.num_planned):
        r = e.plan[k]
        tokens, q = e.req[r].granted, env.e.req[r]
        if tokens == 0:
            continue
        at, rest = _place(env, r)
        if at < 0:
            # Hidden running requests go on by themselves.
            if strict and q.status != RUNNING:
                return _HIDDEN, r, 0
            continue
        action[at] = 1
        if tokens < rest:
            for level in range(v.num_levels - 1):
                if v.levels[level] == tokens:
                    action[at] = 2 + level
            if action[at] == 1:
                if strict and short >= 0:
                    return _TOKENS, r, tokens
                short = r
        elif strict and rest > 0 and tokens > _left_for(e, env, r):
            return _TOKENS, r, tokens
    if strict:
        if short >= 0 and _left_for(e, env, short) != e.req[short].granted:
            return _TOKENS, short, e.req[short].granted
        for slot in range(v.waiting_slots + v.running_slots):
            if env.mask[slot * choices + action[slot]] == 0:
                r = v.wait[slot] if slot < v.waiting_slots else v.run[slot - v.waiting_slots]
                return _ILLEGAL, r, 0
        if len(rows.ends) > 0:
            for k in range(env.e.s.num_running):
                r = env.e.running[k]
                if e.req[r].granted == 0 and _find(v.run, v.num_run, r) < 0:
                    return _HIDDEN, r, 0
    return 0, 0, 0


@njit
def _place(env, r: int) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    """The entry of an action that is about request r, -1 if there is none, and the tokens that it can use."""
    q, v = env.e.req[r], env.v
    if q.status == RUNNING:
        slot = _find(v.run, v.num_run, r)
        return (-1 if slot < 0 else v.waiting_slots + slot), q.target - q.computed
    return _find(v.wait, v.num_wait, r), q.prompt + q.generated


@njit
def _left_for(e, env, r: int) -> int:  # type: ignore[no-untyped-def]
    """Tokens of the budget that are left for request r when it is its turn: after the running requests in
    slots before it, and all of them if it waits."""
    v = env.v
    own, _ = _place(env, r)
    left = env.e.s.token_budget
    for k in range(e.s.num_planned):
        other = e.plan[k]
        at, _ = _place(env, other)
        running = at < 0 or at >= v.waiting_slots
        alike = running == (own >= v.waiting_slots)
        before = 0 <= at < own if alike else running
        if other != r and before:
            left -= e.req[other].granted
    return left


# ---------------------------------------------------------------------- the expert


class Expert:
    """A scheduler as a policy: `expert(env)` is the next action of the environment, scalar or vector.

    It may be asked at any time, by any environment of its kind; it follows one at a time. States in which
    only one action is legal are passed through without asking anybody (`skip_forced`), so a scheduler that
    does something else in them (preempts where nobody waits, idles) is not followed there. In Dispatch-v0 a
    scheduler is a constant action, and as exact as `llmsched_env.envs.dispatch` says.

    Of a schedule, every episode has to have the requests, which is checked when it is first asked in it:
    the schedule is replayed. `baselines.optimal.make_env` makes an environment in which it can be said.

    Attributes:
        scheduler: who decides; of a schedule one that reserves no more KV cache than is used.
        schedule: what is followed, or None.
        strict: as given.

    Raises:
        InputError: when it is asked for what the actions of the environment cannot express, with the reason;
            if it is not `strict`, it does as much of its plan as can be done instead.
    """

    def __init__(self, source: Scheduler | Schedule, seed: int = 0, strict: bool = True) -> None:
        self.schedule = source if isinstance(source, Schedule) else None
        self.scheduler = Scheduler("schedule") if isinstance(source, Schedule) else source
        if self.scheduler.plan is not None:
            raise InputError(
                f"scheduler {self.scheduler.name} is a function of its own; experts are named ones"
            )
        self.seed = seed
        self.strict = strict
        self._fleet: Any = None

    def __call__(self, env: Any) -> Any:
        """The next action: an int for a scalar environment, an array (n, ...) for a vector one."""
        inner = env.unwrapped
        fleet = inner.fleet
        if fleet is not self._fleet:
            self.bind(env)
        actions = [self._action(lane) for lane in range(len(fleet.bank.table))]
        return np.asarray(actions) if hasattr(inner, "num_envs") else actions[0]

    def bind(self, env: Any) -> None:
        """Follow this environment from now on, as asking does.

        Raises:
            InputError: it reserves KV cache, or orders requests, in another way.
        """
        fleet = env.unwrapped.fleet
        problem, options = fleet.problem, fleet.options
        settings = self.scheduler.settings
        if fleet.kind.name == "DISPATCH":
            if self.schedule is not None:
                raise InputError("Dispatch chooses among rules and cannot follow a schedule; use Batch-v0")
            self._fleet = fleet  # a constant action
            return
        hold = hold_of(settings)
        if options.hold not in (hold, hold_of(dataclasses.replace(settings, peak=Peak.NONE))):
            raise InputError(
                f"{self.scheduler.name} reserves KV cache for {hold!r}, this environment for "
                f"{options.hold!r}; make it with hold={hold!r}"
            )
        in_order = self.strict and self.schedule is None and fleet.kind.name == "BATCH"
        if in_order and options.running_order != "oldest":
            raise InputError(
                "Batch serves requests in the order of their slots, schedulers those admitted first; "
                "make it with running_order='oldest'"
            )
        n = fleet.num_requests
        some = Requests.of(np.zeros(n), np.ones(n), np.ones(n))
        spec = LaneSpec(
            requests=some,
            config=problem.engine,
            pack=self.scheduler.pack,
            cost=problem.profile.pack(),
            kv_bytes_per_token=problem.kv_bytes_per_token,
            stop_tokens=some.output_tokens,
            limit_tokens=some.output_tokens,
            dropped=np.zeros(n, bool),
            seed=self.seed,
            workspace=self.scheduler.work_size(n, problem.num_clients),
            histogram=False,
        )
        num_envs = len(fleet.bank.table)
        self._lanes = make_lanes([spec] * num_envs, ENGINE)
        self._template: NDArray[Any] = self._lanes.s[:1].copy()
        self._kept = np.zeros((num_envs, 2), np.int64)
        nothing = np.zeros(0, np.int32)
        self._log = Log(np.zeros(0, _ROW), nothing, nothing, np.zeros(2, np.int64))
        self._rows = [_Rows(np.zeros(0), np.zeros(0, np.int64), nothing, nothing)] * num_envs
        self._fleet = fleet

    def _action(self, lane: int) -> Any:
        fleet = self._fleet
        translate = _TRANSLATORS.get(fleet.kind.name)
        if translate is None:
            raise InputError(f"experts do not know the actions of {fleet.kind.name}")
        if self.schedule is not None and self._kept[lane, _EPISODE] != fleet.bank.lane["begun"][lane]:
            self._rows[lane] = self._replayed(self.schedule, lane)
        return translate(self, lane)

    def _replayed(self, schedule: Schedule, lane: int) -> _Rows:
        """The schedule with the times that it has for the requests of this episode."""
        problem, req = self._fleet.problem, self._fleet.bank.req[lane]
        requests = Requests.of(req["arrival"], req["prompt"], req["stop"])
        made = replay(schedule, requests, problem.profile, problem.engine, scheduler=self.scheduler).schedule
        assert made is not None
        if self.strict and self._fleet.kind.name == "DECISION":
            _require_together(made, requests)
        return _Rows(made.start_s, made.ends, made.requests, made.tokens)

    def _fail(self, why: int, r: int, tokens: int, lane: int) -> InputError:
        what = self.scheduler.name
        if self.schedule is not None:
            what = f"iteration {int(self._lanes.s['iterations'][lane])} of the schedule"
        return InputError(f"{what} cannot be said in actions here: " + _WHY[why].format(r=r, n=tokens))

    def _decide(self, lane: int) -> int:
        action, r, tokens = _decide(
            self._lanes,
            lane,
            self._fleet.bank.table,
            self._template,
            self._kept,
            self._log,
            self._rows[lane],
            self.strict,
        )
        if action < 0:
            raise self._fail(action, r, tokens, lane)
        return int(action)

    def _fill(self, lane: int) -> NDArray[np.int64]:
        options = self._fleet.options
        action = np.zeros(options.waiting_slots + options.running_slots, np.int64)
        why, r, tokens = _fill(
            self._lanes,
            lane,
            self._fleet.bank.table,
            self._template,
            self._kept,
            self._log,
            self._rows[lane],
            self.strict,
            action,
        )
        if why < 0:
            raise self._fail(why, r, tokens, lane)
        return action

    def _express(self, lane: int) -> NDArray[np.int64]:
        return dispatch.express(self.scheduler.settings, len(self._fleet.options.chunk_levels) + 1)


_TRANSLATORS = {"DECISION": Expert._decide, "BATCH": Expert._fill, "DISPATCH": Expert._express}


def _require_together(schedule: Schedule, requests: Requests) -> None:
    """Decision-v0 passes through states in which only RUN is legal, so that a pause in one would go unseen.

    Raises:
        InputError: if some requests decode in an iteration that passes over others.
    """
    prompt, output = requests.prompt_tokens.tolist(), requests.output_tokens.tolist()
    left = list(prompt)  # of the prefill, by request
    generated = [0] * len(prompt)
    decoding: set[int] = set()
    for j, decisions in enumerate(schedule):
        for r in decisions.preempted:
            left[r] = prompt[r] + generated[r]
            decoding.discard(r)
        served = {r for r, _ in decisions.granted}
        if decoding & served and decoding - served:
            raise InputError(
                f"iteration {j} of the schedule at {decisions.start_s:.6g} s lets request "
                f"{min(decoding & served)} decode and passes over request {min(decoding - served)}; in "
                "Decision-v0 all decode, or none: follow it in Batch-v0"
            )
        for r, tokens in decisions.granted:
            left[r] -= tokens
            if left[r] <= 0:
                generated[r] += 1
                (decoding.add if generated[r] < output[r] else decoding.discard)(r)


def expert(
    source: str | Scheduler | Schedule | Solution, *, seed: int = 0, strict: bool = True, **settings: Any
) -> Expert:
    """The expert of a scheduler, by name or made before, or of a schedule.

    Args:
        source: a scheduler, or its name as in `baselines.names()`; or a schedule, or a solution with one
            (`baselines.optimal`): the optimum as a policy, to be imitated.
        seed: of a scheduler that draws lots.
        strict: whether a plan that the actions cannot express is an error. (A teacher that is asked in the
            middle of somebody else's plan had better not be strict.)
        settings: changes of the scheduler's settings.

    Raises:
        InputError: an unknown name or setting, or a solution without a schedule.
    """
    if isinstance(source, str):
        return Expert(get(source, **settings), seed, strict)
    if isinstance(source, Scheduler):
        return Expert(source.replace(**settings), seed, strict)
    schedule = source if isinstance(source, Schedule) else source.schedule
    if schedule is None:
        raise InputError("the solution has no schedule that an expert could follow")
    if settings:
        raise InputError(f"a schedule has no settings, such as {next(iter(settings))}; leave them out")
    return Expert(schedule, seed, strict)
