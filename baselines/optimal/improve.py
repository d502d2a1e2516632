"""`incumbent`, the best of what is quickly made, and `improve`, the best schedule that a search finds in a
given time, for instances of any size.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baselines import registry
from baselines.optimal import listing
from baselines.optimal.annealing import MOVES, Search
from baselines.optimal.instance import Instance, mixed
from baselines.optimal.listing import Knobs, Memory, Plan, Task
from baselines.optimal.solution import Solution, replay
from llmsched_env import simulation
from llmsched_env.core.schedule import Schedule
from llmsched_env.errors import InputError

_SMALL = 200  # requests; for so many all named schedulers are tried
_NAMED = (  # else those that are good at one of the objectives
    "area-backfill",
    "edf",
    "fcfs-backfill",
    "mc-sf",
    "sarathi",
    "sjf-backfill",
    "sorted-f",
    "srpt",
    "svf",
    "trail",
    "vllm-v0",
    "vllm-v1",
)
# Temperatures, as shares of the objective per request: what a move changes is about that. Completions are
# many and shift by little, iterations saved are few and count whole.
_HOT = {"total_latency": 0.003, "mean_ttft": 0.003, "gpu_time": 0.1, "makespan": 0.1, "slo_goodput": 0.1}
_COLD = 0.02  # of the hot one
_MUCH_THE_SAME = 1.002  # what the search makes up for at once
_ROUND = 2_000  # evaluations a request of an annealing, at most
_PATIENCE = 40_000  # evaluations a request without an improvement after which the search gives up
_CHUNK = 200_000  # requests times evaluations between two looks at the clock: some tenth of a second


def incumbent(instance: Instance) -> Solution:
    """The best of the named schedulers, where their schedules are legal, and of greedy list schedules, which
    always are; lengths are known to all. A tenth of a second for ten requests, seconds for 5,000.
    """
    began = time.perf_counter()
    task = listing.task_of(instance)
    memory = Memory.of(task)
    _, plan = _greedy(instance, task, memory)
    schedule, origin = _or_better_named(instance, task, memory, plan)
    return Solution.of(
        instance,
        schedule or listing.schedule_of(task, memory, plan),
        _bound(instance)[1],
        "search",
        time.perf_counter() - began,
        origin=origin,
    )


def improve(
    instance: Instance,
    *,
    time_limit_s: float = 60.0,
    seed: int = 0,
    start: Schedule | Solution | None = None,
    max_evaluations: int | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Solution:
    """The best schedule that simulated annealing over list schedules (`listing`, `annealing`) finds.

    It is legal whatever the instance allows, and never worse than `incumbent` or `start`. Interrupted
    (Ctrl-C), it gives the best so far.

    Args:
        time_limit_s: wall seconds; the incumbent is made in any case.
        seed: of the moves.
        start: a schedule to improve on.
        max_evaluations: of list schedules; the same number with the same seed gives the same solution, as
            long as time suffices.
        progress: called a few times a second with seconds, objective, bound, evaluations.

    Raises:
        InputError: `start` breaks a rule of the instance.
    """
    began = time.perf_counter()
    sign = -1.0 if instance.maximise else 1.0
    given = start.schedule if isinstance(start, Solution) else start
    task = listing.task_of(instance)
    memory = Memory.of(task)
    plan = Plan.of(listing.knobs_of(task, depth=0), np.arange(len(instance), dtype=np.int32))
    bound, bound_name = -sign * math.inf, "none"
    other: Schedule | None = None  # one that is no list schedule
    other_cost, origin = math.inf, "list"
    search: Search | None = None
    stopped = "gap"
    try:
        if given is not None:
            other, origin = given, "start"
            other_cost = sign * instance.value(replay(instance, given))
        bound_name, bound = _bound(instance)
        guide, plan = _greedy(instance, task, memory)
        if given is not None:
            guide, plan = _like(task, memory, given, guide, plan)
        named, name = _or_better_named(instance, task, memory, plan)
        if named is not None:
            cost = sign * instance.value(replay(instance, named))
            guide, plan = _like(task, memory, named, guide, plan)
            if cost < other_cost:
                other, other_cost, origin = named, cost, name
        guide, plan = _in_order_of_admission(task, memory, guide, plan)
        search = Search.of(task, plan, seed, instance.allows("pause"), instance.allows("preempt"))
        hot = _HOT[instance.objective] * (1.0 if instance.maximise else guide / len(instance))
        clock = _Clock(began, time_limit_s, max_evaluations, len(instance))
        for temperature in clock.rounds(search, hot):
            search.run(clock.chunk(search), temperature, temperature)
            cost = min(other_cost, float(search.scores[2]))
            if progress is not None:
                progress(
                    {
                        "seconds": time.perf_counter() - began,
                        "objective": sign * cost,
                        "bound": bound,
                        "evaluations": search.evaluations,
                    }
                )
            if cost <= sign * bound + 1e-9 * abs(bound):
                break
        stopped = clock.stopped
    except KeyboardInterrupt:
        stopped = "interrupted"
    details: dict[str, Any] = {"bound_name": bound_name, "origin": origin}
    if search is not None:
        plan = search.best
        details |= {"evaluations": search.evaluations, **_told(search)}
    cost, _ = listing.evaluate(task, memory, plan)
    if other is None or cost <= other_cost:
        other, details["origin"] = listing.schedule_of(task, memory, plan), "list"
    seconds = time.perf_counter() - began
    return Solution.of(instance, other, bound, "search", seconds, stopped, **details)


def warm_up() -> None:
    """Compile, or load, what `incumbent` and `improve` run, so that their time limits are for the search."""
    tiny = mixed(2, 0)
    incumbent(tiny)
    task = listing.task_of(tiny)
    plan = Plan.of(listing.knobs_of(task), np.arange(len(tiny), dtype=np.int32))
    Search.of(task, plan, 0, pause=False, preempt=False).run(1, 1.0, 1.0)


class _Clock:
    """When to stop, and how hot it is: rounds of annealing, each from the best so far, each of half the time
    or the evaluations that are left or of as many evaluations as pay."""

    def __init__(self, began: float, seconds: float, evaluations: int | None, num_requests: int) -> None:
        self.end = began + seconds
        self.most = evaluations
        self.n = num_requests
        self.stopped = "gap"

    def chunk(self, search: Search) -> int:
        """Evaluations until the next look at the clock; independent of the clock itself."""
        most = max(16, _CHUNK // max(10, self.n))
        return most if self.most is None else max(1, min(most, self.most - search.evaluations))

    def rounds(self, search: Search, hot: float) -> Iterator[float]:
        """The temperature of each chunk."""
        best, since = float(search.scores[2]), 0
        while True:
            first, begin = search.evaluations, time.perf_counter()
            planned = _ROUND * self.n
            if self.most is not None:
                planned = min(planned, max(_CHUNK // self.n, (self.most - first) // 2))
            seconds = max(0.5 * (self.end - begin), 0.2)
            while True:
                done = search.evaluations
                now = time.perf_counter()
                if self.most is not None and done >= self.most:
                    return
                if now >= self.end:
                    self.stopped = "timeout"
                    return
                if search.scores[2] < best:
                    best, since = float(search.scores[2]), done
                if done - since > _PATIENCE * self.n:
                    return
                share = (done - first) / planned
                if self.most is None:  # else the clock must not matter
                    share = max(share, (now - begin) / seconds)
                if share >= 1.0:
                    break
                yield hot * _COLD**share
            search.restart()


def _told(search: Search) -> dict[str, Any]:
    """The best list schedule's settings, and how often each move was tried and accepted."""
    best = search.best
    told: dict[str, Any] = dict(zip(Knobs._fields, best.knobs.tolist(), strict=True))
    told |= {"delayed": int((best.delay > 0).sum()), "paced": int((best.pace > 0).sum())}
    for move, tried, accepted in zip(MOVES, *search.counts[:2].tolist(), strict=True):
        told[f"{move}_tried"], told[f"{move}_accepted"] = tried, accepted
    return told


# ---------------------------------------------------------------------- named schedulers


def _or_better_named(
    instance: Instance, task: Task, memory: Memory, plan: Plan
) -> tuple[Schedule | None, str]:
    """The best legal schedule of a named scheduler that is better than a list schedule, and its name; else
    None and "list"."""
    sign = -1.0 if instance.maximise else 1.0
    mine, _ = listing.evaluate(task, memory, plan)
    known = instance.requests.replace(predicted_tokens=instance.requests.output_tokens)
    promising: list[tuple[float, str]] = []

    def run(name: str, record: str | None) -> simulation.Result:
        return simulation.simulate(
            known, registry.get(name), instance.profile, instance.engine, record=record
        )

    for name in registry.names() if len(instance) <= _SMALL else _NAMED:
        try:
            result = run(name, None)
        except InputError:  # it swaps, or cannot serve some request
            continue
        cost = sign * instance.value(result)
        if cost < mine * (1.0 - sign * 1e-12) and (
            instance.allows("preempt") or not result.preemptions_total
        ):
            promising.append((cost, name))
    for _, name in sorted(promising):
        schedule = run(name, "schedule").schedule
        assert schedule is not None
        try:
            replay(instance, schedule)
        except InputError:  # breaks a rule of the instance
            continue
        return schedule, name
    return None, "list"


# ---------------------------------------------------------------------- list schedules


def _orders(task: Task) -> Iterator[NDArray[np.int32]]:
    """The classic orders, ties by arrival."""
    prompt, output = task.prompt.astype(np.float64), task.output.astype(np.float64)
    area = prompt * output + output * output / 2
    keys = [task.arrival, output, area, prompt + output, prompt, -area]
    if np.isfinite(task.ttft_target).any():
        keys.append(task.arrival + task.ttft_target)
    for key in keys:
        yield np.argsort(key, kind="stable").astype(np.int32)


def _knobs(instance: Instance, task: Task) -> Iterator[Knobs]:
    """Settings to try with every order."""
    n = len(instance)
    for alone in (0, 1) if instance.allows("pause") else (0,):
        for reach in (0, 1) if instance.allows("preempt") else (0,):
            for depth in (0, n):
                yield listing.knobs_of(task, depth=depth, alone=alone, reach=reach)


def _greedy(instance: Instance, task: Task, memory: Memory) -> tuple[float, Plan]:
    """The best list schedule over the classic orders and settings, with the number that says how good."""
    plan = Plan.of(listing.knobs_of(task), np.arange(len(instance), dtype=np.int32))
    _, guide = listing.evaluate(task, memory, plan)
    best = guide, plan
    for knobs in _knobs(instance, task):
        for order in _orders(task):
            best = _better(task, memory, Plan.of(knobs, order), *best)
    return _tuned(task, memory, *best)


def _better(task: Task, memory: Memory, plan: Plan, guide: float, other: Plan) -> tuple[float, Plan]:
    """The better of two list schedules, `guide` that of the other."""
    _, own = listing.evaluate(task, memory, plan)
    return (own, plan) if own < guide else (guide, other)


def _tuned(task: Task, memory: Memory, guide: float, plan: Plan) -> tuple[float, Plan]:
    """The same with the best caps on tokens and on requests, looked for in all orders of magnitude."""
    best = guide, plan
    for name, largest in (("cap", task.limits.budget), ("batch", listing.most_batch(task)), ("cap", None)):
        knobs, order = Knobs(*best[1].knobs.tolist()), best[1].order
        for k in range(1, 13):
            value = getattr(knobs, name) * 0.85 ** (k - 5) if largest is None else largest * 0.65**k
            changed = listing.knobs_of(task, **{**knobs._asdict(), name: int(value)})
            best = _better(task, memory, Plan.of(changed, order), *best)
    return best


def _in_order_of_admission(task: Task, memory: Memory, guide: float, plan: Plan) -> tuple[float, Plan]:
    """The list in the order in which its schedule admits, looked at no deeper than it must be: much the same
    schedule in a fraction of the time, with neighbours in the list that are neighbours in time."""
    listing.evaluate(task, memory, plan)
    order = memory.sequence[: len(plan.order)].copy()
    knobs = Knobs(*plan.knobs.tolist())
    for depth in (0, 4, 16, 64):
        shallow = Plan.of(knobs._replace(depth=depth), order)
        _, own = listing.evaluate(task, memory, shallow)
        if own <= guide * _MUCH_THE_SAME:
            return own, shallow
    return guide, plan


def _like(task: Task, memory: Memory, schedule: Schedule, guide: float, plan: Plan) -> tuple[float, Plan]:
    """A list schedule in the order in which a schedule first serves the requests, if it is better."""
    granted = schedule.requests[schedule.tokens > 0]
    first, at = np.unique(granted, return_index=True)
    order = first[np.argsort(at)].astype(np.int32)
    best = guide, plan
    for knobs in (Knobs(*plan.knobs.tolist()), listing.knobs_of(task, depth=0)):
        best = _better(task, memory, Plan.of(knobs._replace(depth=0), order), *best)
    return _tuned(task, memory, *best)


def _bound(instance: Instance) -> tuple[str, float]:
    """A bound on the objective, and its name."""
    try:
        best_bound = importlib.import_module("baselines.optimal.bounds").best_bound
    except (ImportError, AttributeError):
        return "none", float(len(instance)) if instance.maximise else 0.0
    name, bound = best_bound(instance)
    return str(name), float(bound)
