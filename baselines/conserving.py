"""Whether a scheduler keeps batches as full as it could: where it first does not, and what it did instead.

A request that prefills could be given all that is left of its prompt, one that decodes a single token; the
sum over the requests that are present is the demand. Three rules, each with more in view than the one before:

* work-conserving (Dai, Deng, Li and Peng, arXiv 2504.07347v3, Eqs. 8 and 9): when the demand reaches the
  token budget, the batch has exactly so many tokens. Nothing is asked where it does not. Of such schedulers
  the paper's Theorem 2 says that they are stable up to the limit.
* greedy: the batch has min(budget, demand) tokens.
* greedy-kv: greedy within the KV cache. The batch has all tokens that could still be added to it, up to the
  budget, in the blocks without any token and the slots (`max_num_seqs`) that are left once it is planned,
  without preempting anybody, or admitting again who was just preempted. Blocks that a scheduler reserves, or
  leaves as a watermark, count as free, and a chunk may be as small as a token: that a scheduler does
  otherwise is its choice. So it is broken wherever memory could hold more, if only a part of one prompt.

A cap on the requests in a batch is no excuse under any of them.

K-FCFS: tokens go to others than the K oldest requests only if these get all that they demand. The paper's
stability in networks (the abstract of v3) is for work-conserving K-FCFS. Its definition was not at hand; this
is a working reading of it, with K to be chosen. `k_needed` is the smallest K with which a run is K-FCFS, and
with any larger one too.

All is read from a schedule, who got how many tokens in which iteration, so that it does not matter who made
it: a named scheduler, a function of one's own (`observe`), or a policy, learned or not, in a recorded episode
(`check` of its result).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llmsched_env import EngineConfig, Requests, Result, Scheduler, profiles, simulate
from llmsched_env.core.compile import njit
from llmsched_env.core.run import EVICTED, SWAPPED_OUT
from llmsched_env.errors import InputError
from llmsched_env.profiles import Profile
from llmsched_env.simulation import resolve, servable
from llmsched_env.workloads import Workload

if TYPE_CHECKING:
    from rich.table import Table

RULES = ("work-conserving", "greedy", "greedy-kv", "k-fcfs")


@dataclasses.dataclass(frozen=True)
class Breach:
    """The first iteration in which a rule was broken.

    Attributes:
        rule: of `RULES`. iteration: from 0. start_s: when it began.
        demand: tokens that the requests present could have been given.
        due: tokens that the rule asks for in the batch; under k-fcfs, what the K oldest should have got.
        tokens: of the batch; under k-fcfs, what the K oldest got.
        plan: (name, tokens) of each request in the batch, in order. preempted: names.
        waiting: requests that were present and got nothing.
    """

    rule: str
    iteration: int
    start_s: float
    demand: int
    due: int
    tokens: int
    plan: tuple[tuple[str, int], ...]
    preempted: tuple[str, ...]
    waiting: int

    def __str__(self) -> str:
        """A sentence."""
        plan = ", ".join(f"{name}: {tokens}" for name, tokens in self.plan[:8])
        if len(self.plan) > 8:
            plan += f", and {len(self.plan) - 8} more"
        who = "the K oldest got" if self.rule == "k-fcfs" else "the batch has"
        return (
            f"{self.rule} fails in iteration {self.iteration} at {self.start_s:.4g} s: of {self.demand:,} "
            f"tokens in demand {who} {self.tokens:,}, not {self.due:,}; {self.waiting:,} requests got none; "
            f"plan: {plan or 'nothing'}"
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """What was seen of a run.

    Attributes:
        iterations: of the run. full: those with a batch of the whole token budget.
        breaches: by rule, the first; None where it was kept throughout.
        broken: by rule, the number of iterations in which it was broken.
        k: of the rule k-fcfs. k_needed: the smallest K with which the run is K-FCFS.
    """

    iterations: int
    full: int
    breaches: dict[str, Breach | None]
    broken: dict[str, int]
    k: int
    k_needed: int

    @property
    def work_conserving(self) -> bool:
        """Whether the paper's rule was kept throughout."""
        return self.breaches["work-conserving"] is None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dataclasses.asdict(self) | {"work_conserving": self.work_conserving}


def observe(
    scheduler: Scheduler,
    workload: Requests | Workload,
    profile: str | Profile = "a100-llama3-8b",
    engine: EngineConfig | None = None,
    *,
    k: int | None = None,
    seed: int = 0,
) -> Report:
    """Run a scheduler and check what it does. Requests that it could never serve are left out.

    Args:
        k: of K-FCFS; None: the token budget, with which K requests always fill a batch.
        The rest is as in `simulate`; a workload needs a rate.
    """
    profile = profiles.get(profile)
    requests = workload if isinstance(workload, Requests) else workload.draw()
    kept = servable(requests, scheduler, profile, engine)
    if not kept.any():
        raise InputError(
            f"scheduler {scheduler.name} can serve none of these requests: all are too large for the KV "
            "cache or, uncut, for the token budget; raise kv_blocks or token_budget"
        )
    requests = requests.take(np.flatnonzero(kept))
    longest = int((requests.prompt_tokens.astype(np.int64) + requests.declared_tokens).max())
    made = resolve(engine or EngineConfig(), scheduler, profile, longest)
    return check(simulate(requests, scheduler, profile, made, seed=seed, record="schedule"), k=k)


def check(result: Result, *, k: int | None = None) -> Report:
    """Check a run that was recorded (`simulate(record="schedule")`, or `result()` of an environment made with
    record=True).

    Requests that never got a token in a run that served all others count as turned away.

    Raises:
        InputError: if nothing was recorded, or K is less than 1.
    """
    schedule, requests, engine = result.schedule, result.requests, result.engine
    if schedule is None:
        raise InputError(
            'the run has no schedule to check; simulate it with record="schedule", or record=True'
        )
    assert (
        engine.token_budget is not None and engine.max_num_seqs is not None and engine.kv_blocks is not None
    )
    k = engine.token_budget if k is None else k
    if k < 1:
        raise InputError(f"K of K-FCFS must be at least 1, not {k}")
    done = np.isfinite(result.finish_s)
    never = np.isnan(result.first_scheduled_s)
    away = never if (done | never).all() else np.zeros_like(never)
    stop = np.where(done, result.generated_tokens, np.iinfo(np.int64).max // 4)
    seen = _Seen(np.full((4, 5), -1, np.int64), np.zeros(4, np.int64), np.array([0, 1]))
    _check(
        requests.arrival_s,
        requests.prompt_tokens.astype(np.int64),
        stop.astype(np.int64),
        away,
        schedule.start_s,
        schedule.ends,
        schedule.requests,
        schedule.tokens,
        _Bounds(engine.token_budget, engine.max_num_seqs, engine.kv_blocks, engine.block_size, k),
        bool(engine.async_scheduling),
        seen,
    )
    breaches: dict[str, Breach | None] = {}
    for rule, (at, demand, due, tokens, idle) in zip(RULES, seen.first.tolist(), strict=True):
        breaches[rule] = None
        if at >= 0:
            said = schedule[at]
            plan = tuple((requests.name(r), t) for r, t in said.granted)
            victims = tuple(requests.name(r) for r in said.preempted)
            breaches[rule] = Breach(rule, at, said.start_s, demand, due, tokens, plan, victims, idle)
    broken = dict(zip(RULES, seen.broken.tolist(), strict=True))
    return Report(len(schedule), int(seen.totals[0]), breaches, broken, k, int(seen.totals[1]))


def table(found: Mapping[str, Report]) -> Table:
    """How often each rule was broken, by label, for a terminal."""
    from rich.table import Table

    view = Table(box=None, pad_edge=False)
    view.add_column("scheduler", no_wrap=True)
    headings = ("iterations", "full", *(f"not {rule}" for rule in RULES), "K", "K needed")
    for heading in headings:
        view.add_column(heading, justify="right")
    for name, one in found.items():
        broken = (one.broken[rule] for rule in RULES)
        view.add_row(name, *(f"{n:,}" for n in (one.iterations, one.full, *broken, one.k, one.k_needed)))
    return view


class _Bounds(NamedTuple):
    """Of the engine; and the K of K-FCFS."""

    token_budget: int
    max_num_seqs: int
    kv_blocks: int
    block_size: int
    k: int


class _Seen(NamedTuple):
    """What `_check` writes down.

    Attributes:
        first: (4, 5) int64: of each rule the first iteration that breaks it, or -1; demand, due tokens,
            tokens, requests that got none.
        broken: (4,) int64: how many do.
        totals: (2,) int64: full iterations; the K that is needed.
    """

    first: Any
    broken: Any
    totals: Any


_ABSENT, _WAITING, _RESIDENT, _SWAPPED, _VICTIM, _LEAVING = range(6)


@njit
def _check(  # type: ignore[no-untyped-def]
    arrival, prompt, stop, away, start_s, ends, requests, tokens, bounds, late: bool, seen
) -> None:
    """Go through a schedule with what each request has computed and put out.

    A request of `prompt` tokens that has put out `generated` and computed `computed` can be given the
    difference: the rest of its prefill, or 1. Without `late`, an iteration is planned when it starts; with
    it, when the one before does, and of what arrives later nothing is asked.
    """
    n = len(arrival)
    computed, generated = np.zeros(n, np.int64), np.zeros(n, np.int64)
    granted, status = np.zeros(n, np.int64), np.full(n, _ABSENT)
    oldest, arrived, begin = 0, 0, 0
    for j in range(len(ends)):
        until = start_s[j - 1] if late and j > 0 else start_s[j]
        while arrived < n and arrival[arrived] <= until:
            if not away[arrived]:
                status[arrived] = _WAITING
            arrived += 1
        batch = 0
        for i in range(begin, ends[j]):
            r = requests[i]
            while arrived <= r:  # seen after all, and those before it too
                if not away[arrived]:
                    status[arrived] = _WAITING
                arrived += 1
            if tokens[i] > 0:
                granted[r] = tokens[i]
                batch += tokens[i]
        while oldest < arrived and status[oldest] == _ABSENT:
            oldest += 1
        # From the oldest on: the demand, what the K oldest demand and get, who is passed over by whom.
        demand, of_k, to_k, to_others, rank, unserved, last, idle = 0, 0, 0, 0, 0, 0, 0, 0
        for r in range(oldest, arrived):
            if status[r] == _ABSENT or status[r] == _LEAVING:
                continue
            rank += 1
            wants, gets = prompt[r] + generated[r] - computed[r], granted[r]
            demand += wants
            if rank <= bounds.k:
                of_k += wants
                to_k += gets
            else:
                to_others += gets
            if gets < wants and unserved == 0:
                unserved = rank
            if gets > 0:
                last = rank
            else:
                idle += 1
        if 0 < unserved < last:
            seen.totals[1] = max(seen.totals[1], last)
        for i in range(begin, ends[j]):
            r = requests[i]
            if tokens[i] == _EVICTED:
                status[r], computed[r] = _VICTIM, 0
            elif tokens[i] == _SWAPPED_OUT:
                status[r] = _SWAPPED
            elif generated[r] < stop[r]:
                status[r] = _RESIDENT
        budget = bounds.token_budget
        if batch >= budget:
            seen.totals[0] += 1
        else:
            if demand >= budget:
                _note(seen, 0, j, demand, budget, batch, idle)
            if demand > batch:
                _note(seen, 1, j, demand, min(budget, demand), batch, idle)
                state = (status, prompt, generated, computed, granted)
                more = _room(oldest, arrived, state, bounds, budget - batch)
                if more > 0:
                    _note(seen, 2, j, demand, batch + more, batch, idle)
        if to_others > 0 and to_k < of_k:
            _note(seen, 3, j, demand, of_k, to_k, idle)
        if late:  # who ended in the iteration before held its blocks while this one was planned
            for r in range(oldest, arrived):
                if status[r] == _LEAVING:
                    status[r] = _ABSENT
        for i in range(begin, ends[j]):
            r = requests[i]
            granted[r] = 0
            if status[r] == _VICTIM:
                status[r] = _WAITING
            elif tokens[i] > 0 and generated[r] < stop[r]:
                computed[r] += tokens[i]
                if computed[r] >= prompt[r] + generated[r]:
                    generated[r] += 1
                    if generated[r] >= stop[r]:
                        status[r] = _LEAVING if late else _ABSENT
        begin = ends[j]


@njit
def _room(oldest: int, arrived: int, state: Any, bounds: _Bounds, left: int) -> int:
    """Tokens, up to `left`, that could be added to a plan in the blocks and slots that it leaves free;
    perhaps not all, but each of them could."""
    status, prompt, generated, computed, granted = state
    size = bounds.block_size
    free, slots = bounds.kv_blocks, bounds.max_num_seqs
    for r in range(oldest, arrived):
        if status[r] == _RESIDENT or status[r] == _LEAVING:
            free -= -(-(computed[r] + granted[r]) // size)
            slots -= 1
    more = 0
    for r in range(oldest, arrived):
        rest = prompt[r] + generated[r] - computed[r] - granted[r]
        if status[r] == _WAITING and slots > 0 and free > 0:
            slots -= 1
        elif status[r] != _RESIDENT:
            continue
        within = min(rest, -(computed[r] + granted[r]) % size)  # what fits in its last block
        blocks = min(free, -(-(rest - within) // size))
        free -= blocks
        more += min(rest, within + blocks * size)
        if more >= left:
            return left
    return more


@njit
def _note(seen: _Seen, rule: int, j: int, demand: int, due: int, batch: int, idle: int) -> None:
    """One more iteration that breaks a rule."""
    seen.broken[rule] += 1
    if seen.first[rule, 0] < 0:
        seen.first[rule, 0] = j
        seen.first[rule, 1] = demand
        seen.first[rule, 2] = due
        seen.first[rule, 3] = batch
        seen.first[rule, 4] = idle


_EVICTED, _SWAPPED_OUT = int(EVICTED), int(SWAPPED_OUT)
