"""Simulated annealing over list schedules, compiled."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baselines.optimal.listing import (
    ADMITTED,
    ALONE,
    BATCH,
    CAP,
    DEPTH,
    LATENCY,
    NO_LOG,
    SEEN,
    Memory,
    Plan,
    Task,
    least_cap,
    most_batch,
    reset,
    run,
    score,
)
from llmsched_env.core.compile import njit

MOVES = ("earlier", "later", "swap", "block", "shuffle", "delay", "pace", "knob")
LEEWAY = (
    1.0  # of the objective per request: how far a move may fall behind on its way to be better in the end
)
_EARLIER, _LATER, _SWAP, _BLOCK, _SHUFFLE, _DELAY, _PACE, _KNOB = range(len(MOVES))


@dataclasses.dataclass
class Search:
    """A local search over list schedules: simulated annealing whose moves cost only what they change.

    After each accepted move the list becomes the order in which requests were in fact admitted, so that
    neighbours in the list are neighbours in time. States are kept along the present run; a move that changes
    the list from some place on is run from the last state in which nobody from there on had been looked at.

    Attributes:
        now, trial, best: list schedules; trial is scratch.
        serial, admitted: (N,) the requests in the order in which the run of `now` admits them, and when (s).
        scores: guides of now and best, the best objective, and its sums.
        counts: (3, len(MOVES)) int64 of each move: tried, accepted, bettered the present one.
        kept, kept_floats: states along the run of `now`.
        random: (1,) uint64, state of the generator.
        free: of each knob its least (cap) or largest (batch) value, or whether it may be moved at all.
    """

    task: Task
    memory: Memory
    now: Plan
    trial: Plan
    best: Plan
    serial: NDArray[np.int32]
    admitted: NDArray[np.float64]
    scores: NDArray[np.float64]
    counts: NDArray[np.int64]
    kept: NDArray[np.int32]
    kept_floats: NDArray[np.float64]
    random: NDArray[np.uint64]
    free: NDArray[np.int64]

    @staticmethod
    def of(task: Task, start: Plan, seed: int, pause: bool, preempt: bool) -> Search:
        """A search that starts from a list schedule; `pause` and `preempt`: whether they are allowed."""
        n = len(task.arrival)
        memory = Memory.of(task)
        states = max(1, min(64, n // 8))
        search = Search(
            task,
            memory,
            start.copy(),
            start.copy(),
            start.copy(),
            np.zeros(n, np.int32),
            np.zeros(n),
            np.zeros(3),
            np.zeros((3, len(MOVES)), np.int64),
            np.zeros((states, len(memory.state)), np.int32),
            np.zeros((states, len(memory.floats))),
            np.array([seed], np.uint64),
            np.array([least_cap(task), most_batch(task), 1, pause, preempt], np.int64),
        )
        search._begin()
        return search

    def _begin(self) -> None:
        """Run `now`, the best so far, from the start and keep its states."""
        m = self.memory
        reset(self.task, m.state, m.floats)
        run(
            self.task, self.now, m.state, m.floats, m.bits, m.sequence, m.admitted, NO_LOG, self.kept,
            self.kept_floats, 0, math.inf,
        )  # fmt: skip
        self.serial[:] = m.sequence[: len(self.serial)]
        self.admitted[:] = m.admitted
        value, guide = score(self.task, m.floats)
        self.scores[:] = guide, guide, value

    def _arrays(self) -> tuple[Any, ...]:
        m = self.memory
        return (
            self.task, self.now, self.trial, self.best, m.state, m.floats, m.bits, m.sequence, m.admitted,
            NO_LOG, self.serial, self.admitted, self.scores, self.counts, self.kept, self.kept_floats,
            self.random, self.free,
        )  # fmt: skip

    def run(self, evaluations: int, hot: float, cold: float) -> None:
        """Try so many moves while the temperature falls from `hot` to `cold` (in units of the guide)."""
        anneal(*(*self._arrays(), evaluations, hot, cold))

    def restart(self) -> None:
        """Go on from the best."""
        for plan in (self.now, self.trial):
            for name in Plan._fields:
                getattr(plan, name)[:] = getattr(self.best, name)
        self._begin()

    @property
    def evaluations(self) -> int:
        """Moves tried."""
        return int(self.counts[0].sum())


@njit
def _uniform(random) -> float:  # type: ignore[no-untyped-def]
    """A uniform number in [0, 1) (SplitMix64)."""
    state = random[0] + np.uint64(0x9E3779B97F4A7C15)
    random[0] = state
    x = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return np.float64(x >> np.uint64(11)) * 2.0**-53


@njit
def _below(random, n: int) -> int:  # type: ignore[no-untyped-def]
    """A whole number in [0, n)."""
    return min(n - 1, int(_uniform(random) * n))


@njit
def _scale(random, n: int) -> int:  # type: ignore[no-untyped-def]
    """A whole number in [1, n], all orders of magnitude alike."""
    return min(n, int(np.exp(_uniform(random) * np.log(n + 1.0))))


@njit
def _copy(target, source) -> None:  # type: ignore[no-untyped-def]
    target.order[:] = source.order
    target.rank[:] = source.rank
    target.delay[:] = source.delay
    target.pace[:] = source.pace
    target.knobs[:] = source.knobs


@njit
def _shift(order, a: int, b: int) -> None:  # type: ignore[no-untyped-def]
    """Move what is at place a to place b; what is between makes room."""
    r = order[a]
    if a < b:
        for p in range(a, b):
            order[p] = order[p + 1]
    else:
        for p in range(a, b, -1):
            order[p] = order[p - 1]
    order[b] = r


@njit
def _first_after(admitted, moment: float, n: int) -> int:  # type: ignore[no-untyped-def]
    """The first place of those admitted after a moment."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        if admitted[middle] > moment:
            high = middle
        else:
            low = middle + 1
    return low


@njit
def _vary(task, plan, admitted, kind: int, random, free) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    """Make a move of a kind on `plan`, but for `rank`. Returns the place from which on the schedule may
    differ and the last at which the list does; (-1, -1) if nothing has changed."""
    n = len(plan.order)
    order = plan.order
    a = _below(random, n)
    r = order[a]
    if kind == _KNOB:
        knob = _below(random, 5)
        limits = task.limits
        was = plan.knobs[knob]
        if knob == CAP:
            value = np.int64(was * np.exp(_uniform(random) - 0.5) + 0.5)
            plan.knobs[CAP] = max(free[CAP], min(limits.budget, value))
        elif knob == BATCH:
            value = np.int64(was * np.exp(_uniform(random) - 0.5) + 0.5) + _below(random, 3) - 1
            plan.knobs[BATCH] = max(1, min(free[BATCH], value))
        elif knob == DEPTH:
            plan.knobs[DEPTH] = 0 if _uniform(random) < 0.5 else _scale(random, n) - 1
        elif free[knob]:
            plan.knobs[knob] = (
                1 - was if knob == ALONE else (0 if _uniform(random) < 0.5 else _scale(random, n))
            )
        return (-1, -1) if plan.knobs[knob] == was else (0, -1)
    if kind == _DELAY:
        was = plan.delay[r]
        plan.delay[r] = 0 if was > 0 and _uniform(random) < 0.6 else _scale(random, 64)
        return a, a - 1
    if kind == _PACE:
        was = plan.pace[r]
        if was > 0 and _uniform(random) < 0.4:
            plan.pace[r] = 0
        else:
            value = (was if was > 0 else plan.knobs[CAP]) * np.exp(3.0 * _uniform(random) - 1.5)
            plan.pace[r] = max(free[CAP], min(task.limits.budget, np.int64(value + 0.5)))
        return a, a - 1
    if kind == _EARLIER:
        # Places before those admitted before it came are all the same.
        least = _first_after(admitted, task.arrival[r], n)
        if least >= a:
            return -1, -1
        b = a - _scale(random, a - least)
        _shift(order, a, b)
        return b, a
    if kind == _LATER:
        b = min(n - 1, a + _scale(random, n))
        if b == a or task.arrival[order[a + 1]] > admitted[a]:
            return -1, -1
        _shift(order, a, b)
        return a, b
    if kind == _SWAP:
        b = a + _scale(random, n)
        if b >= n or task.arrival[order[b]] > admitted[a]:
            return -1, -1
        order[a], order[b] = order[b], order[a]
        return a, b
    if kind == _BLOCK:
        length = 1 + _scale(random, 8)
        b = a + _scale(random, n)
        if b + length > n or task.arrival[order[b]] > admitted[a]:
            return -1, -1
        for k in range(length):
            _shift(order, b + k, a + k)
        return a, b + length - 1
    length = 2 + _below(random, 5)
    if a + length > n:
        return -1, -1
    for k in range(length - 1, 0, -1):
        j = _below(random, k + 1)
        order[a + k], order[a + j] = order[a + j], order[a + k]
    return a, a + length - 1


@njit
def _row_before(kept, place: int) -> int:  # type: ignore[no-untyped-def]
    """The last kept state in which no place from `place` on had been looked at; -1: none."""
    low, high = 0, len(kept)
    while low < high:
        middle = (low + high) // 2
        if kept[middle, SEEN] < place:
            low = middle + 1
        else:
            high = middle
    return low - 1


@njit
def anneal(  # type: ignore[no-untyped-def]
    task, now, trial, best, state, floats, bits, sequence, times, log, serial, admitted, scores, counts,
    kept, kept_floats, random, free, evaluations, hot, cold,
) -> None:  # fmt: skip
    """Try so many moves; see `Search`."""
    n = len(now.order)
    spare = np.empty_like(now.order)
    weights = np.zeros(len(counts[0]))
    for j in range(evaluations):
        if j % 64 == 0:
            # Moves that have bettered the schedule are tried more, none is forgotten.
            for k in range(len(weights)):
                weights[k] = 0.02 + (counts[2, k] + 1.0) / (counts[0, k] + 20.0)
            total = weights.sum()
        temperature = hot * (cold / hot) ** (j / evaluations)
        first, last, kind = -1, -1, 0
        for _ in range(50):
            pick = _uniform(random) * total
            kind = 0
            while kind < len(weights) - 1 and pick >= weights[kind]:
                pick -= weights[kind]
                kind += 1
            first, last = _vary(task, trial, admitted, kind, random, free)
            if first >= 0:
                break
        counts[0, kind] += 1
        if first < 0:
            continue
        for p in range(first, last + 1):
            trial.rank[trial.order[p]] = p
        # The last kept state in which no place from `first` on had been looked at.
        row = -1 if kind == _KNOB else _row_before(kept, first)
        if row < 0:
            reset(task, state, floats)
        else:
            state[:] = kept[row]
            floats[:] = kept_floats[row]
        margin = -temperature * np.log(1.0 - _uniform(random))
        # Where no integral can be compared, no kept state is.
        compared = task.limits.objective == LATENCY
        whole = run(task, trial, state, floats, bits, sequence, times, log, kept, kept_floats,
                    row + 1 if compared else len(kept),
                    margin + LEEWAY * scores[0] / n if compared else np.inf)  # fmt: skip
        value, guide = score(task, floats)
        better = whole and guide < scores[0]
        accepted = better or (whole and guide > scores[0] and guide - scores[0] < margin)
        if accepted:
            counts[1, kind] += 1
            counts[2, kind] += better
            if value < scores[2] or (value == scores[2] and guide < scores[1]):
                scores[1], scores[2] = guide, value
                _copy(best, trial)
            # From now on the list is the order of admission, if that gives the same: neighbours are near in
            # time.
            spare[:] = trial.order
            if row >= 0:
                sequence[: kept[row, ADMITTED]] = serial[: kept[row, ADMITTED]]
            start = first
            for p in range(n):
                if sequence[p] != now.order[p]:
                    start = min(first, p)
                    break
            trial.order[:] = sequence[:n]
            for p in range(n):
                trial.rank[trial.order[p]] = p
            again = -1 if kind == _KNOB else min(row, _row_before(kept, start))
            for attempt in range(2):
                if again < 0:
                    reset(task, state, floats)
                else:
                    state[:] = kept[again]
                    floats[:] = kept_floats[again]
                run(task, trial, state, floats, bits, sequence,
                    times, log, kept, kept_floats, again + 1, np.inf)  # fmt: skip
                value, same = score(task, floats)
                if same <= guide or attempt == 1:
                    break
                trial.order[:] = spare
                for p in range(n):
                    trial.rank[trial.order[p]] = p
                again = -1  # the states kept are of another list
            done = 0 if again < 0 else kept[again, ADMITTED]
            serial[done:] = sequence[done:n]
            admitted[done:] = times[done:]
            scores[0] = same
            if value < scores[2] or (value == scores[2] and same < scores[1]):
                scores[1], scores[2] = same, value
                _copy(best, trial)
            _copy(now, trial)
        else:
            for p in range(first, last + 1):
                trial.order[p] = now.order[p]
                trial.rank[now.order[p]] = p
            if kind == _DELAY:
                trial.delay[:] = now.delay
            elif kind == _PACE:
                trial.pace[:] = now.pace
            elif kind == _KNOB:
                trial.knobs[:] = now.knobs
