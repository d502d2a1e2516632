"""`Scene`: a schedule as it happens, as plain arrays; and what pictures of it need to know beyond them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.compile import njit
from llmsched_env.core.requests import Requests
from llmsched_env.core.run import EVICTED, SWAPPED_IN, SWAPPED_OUT
from llmsched_env.errors import InputError

if TYPE_CHECKING:
    from llmsched_env.simulation import Result


class Kind(enum.IntEnum):
    """What a decision did."""

    PREFILL = 0
    DECODE = 1
    WASTED = 2  # a token after the answer had ended (asynchronous scheduling)
    EVICTED = 3
    SWAPPED_OUT = 4
    SWAPPED_IN = 5


class State(enum.IntEnum):
    """Where a request is when the picture is taken."""

    FUTURE = 0
    WAITING = 1
    RUNNING = 2
    PREEMPTED = 3  # waits again, has to be computed again
    SWAPPED = 4  # waits in the CPU tier
    FINISHED = 5
    DROPPED = 6


@dataclasses.dataclass(frozen=True)
class Story:
    """What follows from a scene's decisions, for J iterations, E decisions, N requests and V preemptions.

    Attributes:
        kind: (E,) int8, `Kind`; computed: (E,) int32, tokens of the request in the KV cache afterwards.
        waiting: (J,) int64: requests that wait while the iteration runs, preempted ones included.
        running: (J,) int64. kv_after: (J,) int64: KV tokens left when what finished has been freed.
        lane: (N,) int32: a running slot, the lowest that was free at the first admission and its own until
            the request finishes; -1: none yet. Requests first admitted by the plan being built have one.
        state: (N,) int8, `State`.
        cached, target, generated, preemptions: (N,) int32: tokens computed, tokens at which the prefill is
            done, tokens of the answer.
        first_scheduled_s, first_token_s: (N,) float64, nan where it has not come to that.
        pauses: (V, 3) int64: request, iteration of the preemption, iteration of the return (-1: none).
        planned: kinds of the decisions of the plan being built.
        lanes: how many slots have been in use.
    """

    kind: NDArray[np.int8]
    computed: NDArray[np.int32]
    waiting: NDArray[np.int64]
    running: NDArray[np.int64]
    kv_after: NDArray[np.int64]
    lane: NDArray[np.int32]
    state: NDArray[np.int8]
    cached: NDArray[np.int32]
    target: NDArray[np.int32]
    generated: NDArray[np.int32]
    preemptions: NDArray[np.int32]
    first_scheduled_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    pauses: NDArray[np.int64]
    planned: list[Kind]
    lanes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """What a picture of a schedule needs: J iterations so far, their E decisions, N requests. Times are
    seconds.

    Attributes:
        rows: (J,) ITERATION records (`llmsched_env.core.run`).
        requests, tokens: (E,) int32: the decisions, as in `Schedule`.
        workload: the N requests.
        kv_tokens: capacity of the KV cache in tokens.
        now: the clock.
        finish_s: (N,) float64, nan where a request has not finished.
        planned: (request, tokens) of the plan being built, not yet executed; tokens as in `tokens`.
        decision: the latest action in words, such as "ADMIT request 7, 256 tokens".
        title: a line above the picture. metrics: numbers shown in a corner.
        focus: the request that the latest action concerns; None: the last one in `planned`.
        dropped: (N,) bool: requests that will never be served and so do not wait; None: none.
    """

    rows: NDArray[Any]
    requests: NDArray[np.int32]
    tokens: NDArray[np.int32]
    workload: Requests
    kv_tokens: int
    now: float
    finish_s: NDArray[np.float64]
    planned: Sequence[tuple[int, int]] = ()
    decision: str = ""
    title: str = ""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    focus: int | None = None
    dropped: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        entries = int(self.rows["entries"][-1]) if len(self.rows) else 0
        if len(self.requests) < entries or len(self.tokens) < entries:
            raise InputError(
                f"a scene of {entries} decisions with {len(self.requests)} requests and {len(self.tokens)} "
                "tokens; give one of each for each decision"
            )
        n = len(self.workload)
        for name in ("finish_s", "dropped"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise InputError(f"{name} has {len(value)} values for {n} requests; give one for each")

    @staticmethod
    def of(source: Scene | Result, title: str | None = None) -> Scene:
        """The scene at the end of a run; a scene is returned as it is, but for the title.

        Raises:
            InputError: if the run's decisions were not recorded.
        """
        if isinstance(source, Scene):
            return source if title is None else dataclasses.replace(source, title=title)
        rows, schedule = source.iterations, source.schedule
        if rows is None or schedule is None:
            raise InputError('the run has no schedule to show; simulate it with record="schedule"')
        return Scene(
            rows=rows,
            requests=schedule.requests,
            tokens=schedule.tokens,
            workload=source.requests,
            kv_tokens=source.engine.kv_tokens,
            now=max(float(rows["end_s"][-1]), float(source.makespan_s)) if len(rows) else 0.0,
            finish_s=source.finish_s,
            title=f"{source.scheduler} on {source.profile}" if title is None else title,
        )

    @property
    def focused(self) -> int | None:
        """The request that the latest action concerns, if any."""
        if self.focus is not None:
            return self.focus
        return int(self.planned[-1][0]) if len(self.planned) else None

    @property
    def waiting(self) -> NDArray[np.int64]:
        """(J,) int64: requests that wait while each iteration runs, preempted ones included."""
        return self.story.waiting

    def waiting_at(self, times: NDArray[np.float64]) -> NDArray[np.int64]:
        """Requests that wait at `times`, which need not be those of iterations."""
        if len(self.rows) == 0:
            return self._arrived(times)
        start = self.rows["start_s"]
        j = np.searchsorted(start, times, side="right") - 1
        at = np.maximum(j, 0)
        more = self._arrived(times) - np.where(j < 0, 0, self._arrived(start)[at])
        return np.where(j < 0, 0, self.waiting[at]) + more

    def _arrived(self, times: NDArray[np.float64]) -> NDArray[np.int64]:
        arrival = self.workload.arrival_s
        if self.dropped is not None:
            arrival = arrival[~self.dropped]
        return np.searchsorted(arrival, times, side="right")

    @cached_property
    def story(self) -> Story:
        """What follows from the decisions; computed once."""
        n, rows = len(self.workload), self.rows
        entries = int(rows["entries"][-1]) if len(rows) else 0
        requests = np.ascontiguousarray(self.requests[:entries], np.int32)
        tokens = np.ascontiguousarray(self.tokens[:entries], np.int32)
        kind, computed = np.zeros(entries, np.int8), np.zeros(entries, np.int32)
        per_row = np.zeros((3, len(rows)), np.int64)
        facts = np.zeros((5, n), np.int32)  # lane, cached, target, generated, preemptions
        facts[0] = -1
        times = np.full((2, n), np.nan)
        state = np.zeros(n, np.int8)
        pauses = np.full((int(np.count_nonzero((tokens == EVICTED) | (tokens == SWAPPED_OUT))), 3), -1)
        taken = np.zeros(n + 1, np.bool_)
        start, end = np.ascontiguousarray(rows["start_s"]), np.ascontiguousarray(rows["end_s"])
        _follow(
            start,
            end,
            np.ascontiguousarray(rows["entries"]),
            requests,
            tokens,
            self.workload.prompt_tokens,
            np.ascontiguousarray(self.finish_s, np.float64),
            self._arrived(start),
            kind,
            computed,
            per_row,
            facts,
            times,
            state,
            pauses,
            taken,
        )
        per_row[2] = rows["kv_tokens"] - per_row[2]
        future = state == State.FUTURE
        state[future & (self.workload.arrival_s <= self.now)] = State.WAITING
        if self.dropped is not None:
            state[self.dropped] = State.DROPPED
        lane, cached, target, generated, preemptions = facts
        planned = self._plan(lane, cached, target, taken)
        return Story(
            kind=kind,
            computed=computed,
            waiting=per_row[0],
            running=per_row[1],
            kv_after=per_row[2],
            lane=lane,
            state=state,
            cached=cached,
            target=target,
            generated=generated,
            preemptions=preemptions,
            first_scheduled_s=times[0],
            first_token_s=times[1],
            pauses=pauses,
            planned=planned,
            lanes=int(lane.max(initial=-1)) + 1,
        )

    def _plan(
        self,
        lane: NDArray[np.int32],
        cached: NDArray[np.int32],
        target: NDArray[np.int32],
        taken: NDArray[np.bool_],
    ) -> list[Kind]:
        """The kinds of the planned decisions; who is admitted by them gets a lane."""
        kinds = []
        again: set[int] = set()
        for r, tokens in self.planned:
            if tokens == EVICTED:
                again.add(r)
                kinds.append(Kind.EVICTED)
            elif tokens in (SWAPPED_OUT, SWAPPED_IN):
                kinds.append(Kind.SWAPPED_OUT if tokens == SWAPPED_OUT else Kind.SWAPPED_IN)
            else:
                decode = target[r] > 0 and cached[r] >= target[r] and r not in again
                kinds.append(Kind.DECODE if decode else Kind.PREFILL)
            if lane[r] < 0:
                lane[r] = np.argmin(taken)
                taken[lane[r]] = True
        return kinds


_PREFILL, _DECODE, _WASTED = int(Kind.PREFILL), int(Kind.DECODE), int(Kind.WASTED)
_EVICTED, _SWAPPED_OUT, _SWAPPED_IN = int(Kind.EVICTED), int(Kind.SWAPPED_OUT), int(Kind.SWAPPED_IN)
_RUNNING, _PREEMPTED = int(State.RUNNING), int(State.PREEMPTED)
_SWAPPED, _FINISHED = int(State.SWAPPED), int(State.FINISHED)


@njit
def _follow(  # type: ignore[no-untyped-def]
    start,
    end,
    ends,
    requests,
    tokens,
    prompt,
    finish,
    arrived,
    kind,
    computed,
    per_row,
    facts,
    times,
    state,
    pauses,
    taken,
) -> None:
    """Fill the arrays of a `Story` by following the decisions one by one."""
    lane, cached, target, generated, preemptions = facts[0], facts[1], facts[2], facts[3], facts[4]
    n = len(prompt)
    pause = np.full(n, -1, np.int64)  # the request's latest
    seen = np.full(n, -1, np.int64)  # iteration
    leaving = np.empty(n, np.int32)
    num_leaving, num_pauses, lowest = 0, 0, 0
    admitted, paused, running = 0, 0, 0
    at = 0
    for j in range(len(ends)):
        for k in range(at, ends[j]):
            seen[requests[k]] = j
        kept = 0
        for k in range(num_leaving):  # a lane is free when its request has finished and computes no more
            r = leaving[k]
            if seen[r] == j:
                leaving[kept] = r
                kept += 1
            else:
                taken[lane[r]] = False
                lowest = min(lowest, lane[r])
        num_leaving = kept
        freed = 0
        for k in range(at, ends[j]):
            r, t = requests[k], tokens[k]
            done = finish[r] <= start[j]
            if t < 0:
                back = t == SWAPPED_IN
                kind[k] = _SWAPPED_IN if back else _EVICTED if t == EVICTED else _SWAPPED_OUT
                if not back:
                    preemptions[r] += 1
                    pauses[num_pauses, 0] = r
                    pauses[num_pauses, 1] = j
                    pause[r] = num_pauses
                    num_pauses += 1
                    if state[r] == _RUNNING:
                        running -= 1
                        paused += 1
                    state[r] = _PREEMPTED if t == EVICTED else _SWAPPED
                    if t == EVICTED:
                        cached[r] = 0
            else:
                back = True
            if back and not done:
                if lane[r] < 0:
                    while taken[lowest]:
                        lowest += 1
                    taken[lowest] = True
                    lane[r] = lowest
                    times[0, r] = start[j]
                    admitted += 1
                    running += 1
                    target[r] = prompt[r]
                elif state[r] != _RUNNING:
                    if state[r] == _PREEMPTED:
                        target[r] = prompt[r] + generated[r]
                    pauses[pause[r], 2] = j
                    paused -= 1
                    running += 1
                state[r] = _RUNNING
            if t > 0:
                if done:
                    kind[k] = _WASTED
                else:
                    prefill = cached[r] < target[r]
                    kind[k] = _PREFILL if prefill else _DECODE
                    cached[r] += t
                    if cached[r] >= target[r]:
                        generated[r] += 1
                        if generated[r] == 1:
                            times[1, r] = end[j]
            computed[k] = cached[r]
        for k in range(at, ends[j]):
            r = requests[k]
            if state[r] != _FINISHED and finish[r] <= end[j]:
                if state[r] == _RUNNING:
                    running -= 1
                    freed += cached[r]
                else:  # preempted when its last token had been computed, but was not seen yet
                    paused -= 1
                state[r] = _FINISHED
                leaving[num_leaving] = r
                num_leaving += 1
        per_row[0, j] = arrived[j] - admitted + paused
        per_row[1, j] = running
        per_row[2, j] = freed
        at = ends[j]
    for k in range(num_leaving):
        taken[lane[leaving[k]]] = False
