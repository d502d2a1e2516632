"""`incumbent`, the best of what is quickly made, and `improve`, the best schedule that a search finds in a given
time, for instances of any size.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from baselines import registry
from baselines.optimal import listing
from baselines.optimal.instance import Instance
from baselines.optimal.listing import Knobs, Memory, Task
from baselines.optimal.solution import Solution, replay
from llmsched_env import simulation
from llmsched_env.core.schedule import Schedule
from llmsched_env.errors import InputError

_SMALL = 200  # requests; for so many all named schedulers are tried
_NAMED = (  # else those that are good at one of the objectives
    "area-backfill",
    "fcfs-backfill",
    "mc-sf",
    "sarathi",
    "sjf-backfill",
    "sorted-f",
    "srpt",
    "svf",
    "trail",
    "uniboost",
    "vllm-v0",
    "vllm-v1",
)


def incumbent(instance: Instance) -> Solution:
    """The best of the named schedulers, where their schedules are legal, and of greedy list schedules, which
    always are; lengths are known to all. Milliseconds for ten requests, seconds for 5,000.
    """
    start = time.perf_counter()
    task = listing.task_of(instance)
    memory = Memory.of(task)
    _, made = _greedy(instance, task, memory)
    best = listing.schedule_of(task, memory, *made)
    value = instance.value(replay(instance, best))
    method = "list"
    for name, schedule in _better_named(instance, value):
        best, method = schedule, name
        break
    return Solution.of(
        instance, best, _bound(instance)[1], "search", time.perf_counter() - start, start=method
    )


# ---------------------------------------------------------------------- named schedulers


def _better_named(instance: Instance, value: float) -> Iterator[tuple[str, Schedule]]:
    """Named schedulers whose schedules are legal and better than `value`, the best first."""
    known = instance.replace(
        requests=instance.requests.replace(predicted_tokens=instance.requests.output_tokens)
    )
    found: list[tuple[float, str, Schedule]] = []
    sign = -1.0 if instance.maximise else 1.0
    for name in registry.names() if len(instance) <= _SMALL else _NAMED:
        try:
            result = simulation.simulate(
                known.requests, registry.get(name), instance.profile, instance.engine, record="schedule"
            )
        except InputError:  # it swaps, or cannot serve some request
            continue
        if result.preemptions_total and not instance.allows("preempt"):
            continue
        got = sign * instance.value(result)
        if got < sign * value:
            assert result.schedule is not None
            found.append((got, name, result.schedule))
    for _, name, schedule in sorted(found, key=lambda f: f[:2]):
        try:
            if sign * instance.value(replay(instance, schedule)) < sign * value:
                yield name, schedule
        except InputError:  # breaks a rule of the instance
            continue


# ---------------------------------------------------------------------- list schedules

_List = tuple[Knobs, NDArray[np.int32], NDArray[np.int32]]  # knobs, order, delay


def _orders(task: Task) -> Iterator[NDArray[np.int32]]:
    """The classic orders, ties by arrival."""
    prompt, output = task.prompt.astype(np.float64), task.output.astype(np.float64)
    area = prompt * output + output * output / 2
    keys = [task.arrival, output, area, prompt + output, prompt, -area]
    for targets in (task.ttft_target,):
        if np.isfinite(targets).any():
            keys.append(task.arrival + targets)
    for key in keys:
        yield np.argsort(key, kind="stable").astype(np.int32)


def _knobs(instance: Instance, task: Task) -> Iterator[Knobs]:
    """Settings to try with every order."""
    n = len(instance)
    for alone in (False, True) if instance.allows("pause") else (False,):
        for reach in (0, 1) if instance.allows("preempt") else (0,):
            for depth in (0, n):
                yield listing.knobs_of(task, depth=depth, alone=alone, reach=reach)


def _greedy(instance: Instance, task: Task, memory: Memory) -> tuple[float, _List]:
    """The best list schedule over the classic orders and settings, with the number that says how good."""
    best: tuple[float, _List] | None = None

    def look(knobs: Knobs, order: NDArray[np.int32]) -> None:
        nonlocal best
        _, guide = listing.evaluate(task, memory, knobs, order, delay)
        if best is None or guide < best[0]:
            best = guide, (knobs, order, delay)

    delay = np.zeros(len(instance), np.int32)
    for knobs in _knobs(instance, task):
        for order in _orders(task):
            look(knobs, order)
    assert best is not None
    knobs, order, _ = best[1]
    for share in (0.75, 0.5, 0.35, 0.25, 0.12):
        look(listing.knobs_of(task, **{**knobs._asdict(), "cap": int(share * task.limits.budget)}), order)
        look(listing.knobs_of(task, **{**knobs._asdict(), "depth": int(share * len(instance) / 4)}), order)
        look(
            listing.knobs_of(
                task, **{**knobs._asdict(), "batch": int(share * min(task.limits.seqs, len(instance)))}
            ),
            order,
        )
    return best


def _bound(instance: Instance) -> tuple[str, float]:
    """A bound on the objective, and its name."""
    try:
        bounds = importlib.import_module("baselines.optimal.bounds")
    except ImportError:
        return "none", float(len(instance)) if instance.maximise else 0.0
    name, bound = bounds.best_bound(instance)
    return str(name), float(bound)
