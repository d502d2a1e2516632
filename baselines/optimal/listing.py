"""List schedules: a schedule from an order of the requests, fast enough to be made thousands of times a
second.

A list schedule admits requests in the order of a list, each as soon as its whole future fits: its prefill and
every token of its answer, one an iteration, in the KV cache beside the futures of those admitted before. So
nobody is ever short of memory, and the schedule is legal whatever is allowed. What else may differ:

    delay     iterations that a request is held back after it could first be admitted
    cap       most tokens of an iteration with prefills; prompts are cut to it where chunks are allowed
    pace      the same for the iterations in which one request prefills; 0: the cap
    batch     most requests that hold KV cache at once
    depth     places of the list behind the first that waits which are looked at (backfilling); 0: none
    alone     prefills run in iterations of their own, in which decodes sit out (where pauses are allowed)
    reach     a request that does not fit preempts those that come at least so many places later in the list
              (where preemption is allowed); 0: never

Why it is fast: futures are kept as a profile of KV blocks over coming decode steps ("ticks"), to which
admissions only add. A request that does not fit now therefore knows the tick before which it cannot fit, and
is not looked at until then; between such ticks an iteration costs one evaluation of the cost model. The clock
advances as the engine's does, by the same compiled `batch_time`, so that values agree with a replay's but for
the rounding of sums over requests.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from baselines.optimal.instance import OBJECTIVES, Instance
from llmsched_env.core.compile import njit
from llmsched_env.core.cost import batch_time
from llmsched_env.core.run import EVICTED
from llmsched_env.core.schedule import Schedule
from llmsched_env.core.span import span, trailing_zeros

LATENCY, _GPU, _MAKESPAN, _TTFT, _GOODPUT = range(len(OBJECTIVES))
_i64: Any = np.int64  # its stubs say that it is no float
_CHUNKS = 256  # pieces that a prompt may be cut into: bounds how far the profile looks ahead
_NEVER = 2**31 - 1


class Limits(NamedTuple):
    """What the engine and the instance fix."""

    blocks: int
    block_size: int
    budget: int
    seqs: int
    chunk: bool
    idle: bool
    objective: int  # place in OBJECTIVES


class Task(NamedTuple):
    """An instance as plain arrays of shape (N,)."""

    arrival: NDArray[np.float64]
    prompt: NDArray[np.int32]
    output: NDArray[np.int32]
    ttft_target: NDArray[np.float64]
    tpot_target: NDArray[np.float64]
    cost: NDArray[np.float64]  # packed cost model
    limits: Limits


class Knobs(NamedTuple):
    """The settings of a list schedule that hold for all requests; see the top of this module."""

    cap: int
    batch: int
    depth: int
    alone: int
    reach: int


CAP, BATCH, DEPTH, ALONE, REACH = range(5)  # in the array that compiled code gets


class Plan(NamedTuple):
    """A list schedule: (N,) int32 arrays, and the array of the knobs."""

    order: NDArray[np.int32]  # the list
    rank: NDArray[np.int32]  # the place of each request in it
    delay: NDArray[np.int32]
    pace: NDArray[np.int32]
    knobs: NDArray[np.int64]

    @staticmethod
    def of(knobs: Knobs, order: NDArray[np.int32]) -> Plan:
        """That of a list, without delays and paces."""
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order), dtype=np.int32)
        return Plan(order, rank, np.zeros_like(order), np.zeros_like(order), np.array(knobs, np.int64))

    def copy(self) -> Plan:
        """One that shares no array with this one."""
        order, rank, delay, pace, knobs = self
        return Plan(order.copy(), rank.copy(), delay.copy(), pace.copy(), knobs.copy())


class Log(NamedTuple):
    """Where a run writes its decisions; arrays of length 0: nowhere."""

    start: NDArray[np.float64]  # (J,) seconds, of each iteration
    tick: NDArray[np.int32]  # (J,) whose decodes it runs; -1: none
    chunks: NDArray[np.int32]  # (E, 3) iteration, request, tokens; EVICTED for a victim
    spells: NDArray[np.int32]  # (S, 3) request, first and last tick of a spell of decoding


# A state is one int32 array, so that keeping and restoring one is a copy: numbers, three rings over ticks (KV
# blocks held, decodes, first of the list of requests that end), and columns over requests.
_TICK, _ARRIVED, _FINISHED, _DECODES, _CONTEXT, _RESIDENT, _HELD = range(7)
_PREFILLING, _COMPUTED, _NEXT, SEEN, ADMITTED = range(7, 12)
_ITERATIONS, _CHUNKED, _SPELLS, _RING = range(12, 16)
_NUMBERS, _RINGS, _COLUMNS = 16, 3, 6
_FUTURE, _WAITING, _DUE, _RUNNING, _DONE = range(5)  # DUE: waits, and its delay is over
_CLOCK, _BUSY, _LATENCIES, _TTFTS, _MISSED, _EXCESS, _ARRIVALS = range(7)  # the last of those who are there
_FLOATS = 7


def task_of(instance: Instance) -> Task:
    """The arrays of an instance."""
    r, e = instance.requests, instance.engine
    assert e.kv_blocks and e.token_budget and e.max_num_seqs and e.max_model_len
    limits = Limits(
        e.kv_blocks,
        e.block_size,
        e.token_budget,
        e.max_num_seqs,
        instance.allows("chunk"),
        instance.allows("idle"),
        list(OBJECTIVES).index(instance.objective),
    )
    output = np.minimum(r.output_tokens, np.maximum(1, e.max_model_len - r.prompt_tokens)).astype(np.int32)
    return Task(
        r.arrival_s,
        r.prompt_tokens,
        output,
        r.ttft_target_s,
        r.tpot_target_s,
        instance.profile.pack(),
        limits,
    )


def knobs_of(task: Task, **changes: Any) -> Knobs:
    """Knobs as free as the engine, with changes, brought into range."""
    limits, n = task.limits, len(task.arrival)
    made = Knobs(limits.budget, limits.seqs, n, 0, 0)._replace(**changes)
    return Knobs(
        int(min(limits.budget, max(least_cap(task), made.cap))),
        int(max(1, min(most_batch(task), made.batch))),
        int(max(0, min(n, made.depth))),
        int(made.alone),
        int(made.reach),
    )


def least_cap(task: Task) -> int:
    """Tokens of an iteration with which no prompt takes more chunks than the profile looks ahead."""
    return -(-int((task.prompt + task.output).max()) // _CHUNKS)


def most_batch(task: Task) -> int:
    """Requests that may be there at once: all who decode need a token in each iteration."""
    return min(task.limits.seqs, task.limits.budget, len(task.arrival))


@dataclasses.dataclass
class Memory:
    """What runs of one task work in.

    Attributes:
        state, floats: see above; floats ends with the N times of first tokens.
        bits: (2, W) int64, the waiting and the running requests as sets of places in the list.
        sequence: (2 N,) int32, the requests in the order in which they were first admitted, and scratch.
        admitted: (N,) float64, seconds: when.
    """

    state: NDArray[np.int32]
    floats: NDArray[np.float64]
    bits: NDArray[np.int64]
    sequence: NDArray[np.int32]
    admitted: NDArray[np.float64]

    @staticmethod
    def of(task: Task) -> Memory:
        """Memory for a task, its state as before anything has happened."""
        n = len(task.arrival)
        ring = 1 << (int(task.output.max()) + 2 * _CHUNKS + 2).bit_length()
        state = np.zeros(_NUMBERS + _RINGS * ring + _COLUMNS * n, np.int32)
        state[_RING] = ring
        bits = np.zeros((2, n // 64 + 1), np.int64)
        # Behind the sequence there is room for victims.
        memory = Memory(state, np.zeros(_FLOATS + n), bits, np.zeros(2 * n, np.int32), np.zeros(n))
        reset(task, memory.state, memory.floats)
        return memory


@njit
def reset(task, state, floats) -> None:  # type: ignore[no-untyped-def]
    """The state before anything has happened."""
    n, ring = len(task.arrival), state[_RING]
    state[:] = 0
    floats[:] = 0.0
    state[_RING] = ring
    state[_PREFILLING] = -1
    state[SEEN] = -1
    heads = _NUMBERS + 2 * ring
    state[heads : heads + ring] = -1
    at = _NUMBERS + _RINGS * ring
    for r in range(n):
        state[at + n + r] = task.prompt[r]
        state[at + 2 * n + r] = task.output[r]


# ---------------------------------------------------------------------- one run


@njit(inline="always")
def _blocks(tokens: int, size: int) -> int:
    return (tokens + size - 1) // size


@njit
def _shortfall(limits, held, load, tick, base, left, budget, cap, alone) -> int:  # type: ignore[no-untyped-def]
    """For how many ticks from now a request cannot be admitted, for all that the profile says; at most 0: it
    fits now.

    It holds `base` tokens after its prefill and one more after each further one. Starting t ticks later, it
    would hold t tokens less at each tick.
    """
    mask, size = len(held) - 1, limits.block_size
    start, worst = tick, 0
    if alone:
        start = tick - 1
    elif base > budget:
        done = budget
        if _blocks(done, size) > limits.blocks - held[tick & mask]:
            worst = 1
        while done < base:
            start += 1
            if start - tick > 2 * _CHUNKS:
                return 1
            done += min(base - done, max(0, cap - load[start & mask]))
            if _blocks(done, size) > limits.blocks - held[start & mask]:
                worst = start - tick + 1
    j = 1 if alone else 0
    while j < left:
        # A stretch of the ring without a wrap, and without divisions: this is the innermost loop.
        at = (start + j) & mask
        stretch = min(left - j, len(held) - at)
        lack = base + j - limits.blocks * size
        over = start - tick + j + 1
        for i in range(stretch):
            worst = max(worst, min(over + i, lack + i + held[at + i] * size))
        j += stretch
    return worst


@njit
def _change(limits, held, load, base, since, first, last, sign) -> None:  # type: ignore[no-untyped-def]
    """Take the decodes of ticks first to last of a request, whose prefill ended at `since`, out of the
    profile, or put them back."""
    mask, size = len(held) - 1, limits.block_size
    blocks = _blocks(base + first - since, size)
    room = blocks * size - (base + first - since)
    for t in range(first, last + 1):
        if room < 0:
            blocks += 1
            room += size
        held[t & mask] += sign * blocks
        load[t & mask] += sign
        room -= 1


@njit
def _reserve(limits, held, load, tick, base, left, budget, cap, alone) -> int:  # type: ignore[no-untyped-def]
    """Enter the future of a request that `_shortfall` lets in; returns the tick of its first token."""
    mask, size = len(held) - 1, limits.block_size
    start = tick
    if alone:
        start = tick - 1
    elif base > budget:
        done = budget
        while done < base:
            held[start & mask] += _blocks(done, size)
            start += 1
            done += min(base - done, max(0, cap - load[start & mask]))
    if not alone:
        held[start & mask] += _blocks(base, size)
    _change(limits, held, load, base, start, start + 1, start + left - 1, 1)
    return start


@njit
def _set(bits, place: int) -> None:  # type: ignore[no-untyped-def]
    bits[place >> 6] |= _i64(1) << _i64(place & 63)


@njit
def _clear(bits, place: int) -> None:  # type: ignore[no-untyped-def]
    bits[place >> 6] &= ~(_i64(1) << _i64(place & 63))


@njit
def _last(bits, below: int, least: int) -> int:  # type: ignore[no-untyped-def]
    """The last place before `below` and not before `least` in the set, -1 if there is none."""
    for p in range(below - 1, least - 1, -1):
        if (bits[p >> 6] >> _i64(p & 63)) & 1:
            return p
    return -1


@njit
def _finish(task, state, floats, status, r, clock) -> None:  # type: ignore[no-untyped-def]
    """Request r got its last token."""
    status[r] = _DONE
    state[_FINISHED] += 1
    state[_RESIDENT] -= 1
    floats[_LATENCIES] += clock - task.arrival[r]
    floats[_ARRIVALS] -= task.arrival[r]
    first = floats[_FLOATS + r]
    over = max(
        (first - task.arrival[r]) / task.ttft_target[r],
        (clock - first) / max(1, task.output[r] - 1) / task.tpot_target[r],
    )
    if over > 1.0:
        floats[_MISSED] += 1.0
        floats[_EXCESS] += min(1.0, over - 1.0)


@njit
def score(task, floats) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """What a search minimises: the objective (less of it where more is better), and the same with a little of
    what says, between equals, which is nearer to something better."""
    n = len(task.arrival)
    objective = task.limits.objective
    latency = floats[_LATENCIES]
    if objective == LATENCY:
        return latency, latency
    if objective == _TTFT:
        value = floats[_TTFTS] / n
    elif objective == _GPU:
        value = floats[_BUSY]
    elif objective == _MAKESPAN:
        value = floats[_CLOCK]
    else:
        return floats[_MISSED] - n, floats[_MISSED] + 0.2 * floats[_EXCESS]
    return value, value + 1e-3 * latency / n


@njit
def run(  # type: ignore[no-untyped-def]
    task, plan, state, floats, bits, sequence, admitted, log, kept, kept_floats, first_kept, bar
) -> bool:
    """Run a list schedule from `state` to the end.

    Args:
        sequence, admitted: the requests in the order in which they are first admitted, and when (s).
        kept, kept_floats: (S, ...) where states are kept whenever N / S more requests have been admitted,
            from row `first_kept` on; of length 0: nowhere.
        bar: inf, or the run is compared with the one whose states are kept, and left when the integral of
            the requests in the system exceeds that one's by so much (request-seconds) at such a moment.

    Returns:
        whether it was run to the end.
    """
    # Spans: passing arrays on would cost more than most of what is done with them.
    limits = task.limits
    whole = task
    order, rank, delay, pace, knobs = (
        span(plan.order),
        span(plan.rank),
        span(plan.delay),
        span(plan.pace),
        span(plan.knobs),
    )
    task = Task(
        span(whole.arrival),
        span(whole.prompt),
        span(whole.output),
        span(whole.ttft_target),
        span(whole.tpot_target),
        span(whole.cost),
        limits,
    )
    n, ring = len(order), state[_RING]
    mask, size = ring - 1, limits.block_size
    held = span(state[_NUMBERS : _NUMBERS + ring])
    load = span(state[_NUMBERS + ring : _NUMBERS + 2 * ring])
    heads = span(state[_NUMBERS + 2 * ring : _NUMBERS + 3 * ring])
    at = _NUMBERS + 3 * ring
    status = span(state[at : at + n])
    base = span(state[at + n : at + 2 * n])  # tokens that its next prefill computes
    left = span(state[at + 2 * n : at + 3 * n])  # tokens of the answer that its next prefill and decodes give
    ready = span(state[at + 3 * n : at + 4 * n])  # tick before which it cannot be admitted
    behind = span(state[at + 4 * n : at + 5 * n])  # next in the list of those that end at the same tick
    since = span(state[at + 5 * n : at + 6 * n])  # tick of the first token
    whole_state, state = state, span(state)
    whole_floats, floats = floats, span(floats)
    bits[:] = 0
    waiting, running = span(bits[0]), span(bits[1])
    cap, batch, alone = knobs[CAP], knobs[BATCH], knobs[ALONE] != 0
    depth, reach = knobs[DEPTH], knobs[REACH]
    logged = len(log.start) > 0
    stride = max(1, n // max(1, len(kept)))

    for p in range(n):
        if status[order[p]] == _WAITING or status[order[p]] == _DUE:
            _set(waiting, p)
        elif status[order[p]] == _RUNNING:
            _set(running, p)

    clock = floats[_CLOCK]
    while state[_FINISHED] < n:
        if first_kept < len(kept) and state[ADMITTED] >= first_kept * stride:
            if bar < np.inf:
                other = kept_floats[first_kept]
                if kept[first_kept, SEEN] < _NEVER:
                    here = kept[first_kept, _ARRIVED] - kept[first_kept, _FINISHED]
                    mine = floats[_LATENCIES] - floats[_ARRIVALS]
                    mine += (state[_ARRIVED] - state[_FINISHED]) * clock
                    its = other[_LATENCIES] - other[_ARRIVALS] + here * other[_CLOCK]
                    if mine - its - here * (clock - other[_CLOCK]) > bar:
                        return False
                first_kept += 1
                continue
            floats[_CLOCK] = clock
            kept[first_kept] = whole_state
            kept_floats[first_kept] = whole_floats
            first_kept += 1
        tick = state[_TICK]
        while state[_ARRIVED] < n and task.arrival[state[_ARRIVED]] <= clock:
            r = state[_ARRIVED]
            state[_ARRIVED] += 1
            floats[_ARRIVALS] += task.arrival[r]
            status[r] = _WAITING
            _set(waiting, rank[r])
            state[_NEXT] = tick

        # ---- nothing but decoding until the next event
        if state[_PREFILLING] < 0 and tick < state[_NEXT] and state[_DECODES] > 0:
            D, KV = _i64(state[_DECODES]), _i64(state[_CONTEXT])
            until = task.arrival[state[_ARRIVED]] if state[_ARRIVED] < n else np.inf
            first = tick
            busy = floats[_BUSY]
            while tick < state[_NEXT] and clock < until and heads[tick & mask] < 0:
                dt = batch_time(task.cost, 0, 0, 0.0, 0, D, KV)
                if logged:
                    log.start[state[_ITERATIONS] + tick - first] = clock
                    log.tick[state[_ITERATIONS] + tick - first] = tick
                clock += dt
                busy += dt
                KV += D
                tick += 1
            if tick > first:
                floats[_BUSY] = busy
                state[_ITERATIONS] += tick - first
                state[_CONTEXT] = KV
                state[_TICK] = tick
                state[_HELD] = held[(tick - 1) & mask]
                for t in range(first, tick):
                    held[t & mask] = 0
                    load[t & mask] = 0
                continue

        # ---- who prefills
        P, NP, CX, KP = _i64(0), _i64(0), 0.0, _i64(0)
        decodes = 0 if alone else state[_DECODES]
        joined = -1  # list of those whose first token comes out
        evictions = 0
        r = state[_PREFILLING]
        if r >= 0:
            done = state[_COMPUTED]
            c = min(base[r] - done, (pace[r] if pace[r] > 0 else cap) - decodes)
            if c > 0:
                P, NP, CX, KP = _i64(c), _i64(1), c * (done + 0.5 * c), _i64(done)
                state[_HELD] += _blocks(done + c, size) - _blocks(done, size)
                state[_COMPUTED] = done + c
                if logged:
                    log.chunks[state[_CHUNKED], 0] = state[_ITERATIONS]
                    log.chunks[state[_CHUNKED], 1] = r
                    log.chunks[state[_CHUNKED], 2] = c
                state[_CHUNKED] += 1
                if done + c == base[r]:
                    behind[r] = joined
                    joined = r
                    state[_PREFILLING] = -1
        if state[_PREFILLING] < 0 and tick >= state[_NEXT]:
            soon = tick if alone else tick + 1
            soonest = _NEVER
            head = -1
            tried = False
            w = 0
            word = waiting[0]
            while True:
                while word == 0 and w + 1 < len(waiting):
                    w += 1
                    word = waiting[w]
                if word == 0:
                    break
                p = 64 * w + trailing_zeros(word)
                word &= word - _i64(1)
                if head < 0:
                    head = p
                if p > head + depth:
                    break
                state[SEEN] = max(state[SEEN], p)
                r = order[p]
                if ready[r] > tick:
                    soonest = min(soonest, ready[r])
                    continue
                if state[_RESIDENT] >= batch:
                    soonest = tick + 1
                    break
                own = pace[r] if pace[r] > 0 else cap
                budget = own - decodes - P
                if limits.chunk:
                    if budget < 1:
                        soonest = soon
                        if pace[r] > 0:
                            continue
                        break
                elif base[r] > budget and (P > 0 or base[r] > limits.budget - decodes):
                    soonest = soon if P > 0 else tick + 1
                    continue
                else:
                    budget = max(budget, base[r])
                if alone and state[_HELD] + _blocks(base[r], size) > limits.blocks:
                    soonest = soon if P > 0 else tick + 1
                    continue
                late = _shortfall(limits, held, load, tick, base[r], left[r], budget, own, alone)
                if late > 0 and reach > 0 and not tried and (status[r] == _DUE or delay[r] == 0):
                    # Take victims out of the profile, last in the list first, until r fits.
                    tried = True
                    taken, q = 0, n
                    while late > 0:
                        q = _last(running, q, p + reach)
                        if q < 0:
                            break
                        v = order[q]
                        if since[v] >= soon - 1:  # its prefill is not over
                            continue
                        if not limits.chunk and base[v] + tick - since[v] > limits.budget:
                            continue
                        _change(limits, held, load, base[v], since[v], tick, since[v] + left[v] - 1, -1)
                        sequence[n + taken] = v
                        taken += 1
                        late = _shortfall(limits, held, load, tick, base[r], left[r], budget, own, alone)
                    for k in range(taken):
                        v = sequence[n + k]
                        if late > 0:
                            _change(limits, held, load, base[v], since[v], tick, since[v] + left[v] - 1, 1)
                            continue
                        end = (since[v] + left[v] - 1) & mask
                        if heads[end] == v:
                            heads[end] = behind[v]
                        else:
                            u = heads[end]
                            while behind[u] != v:
                                u = behind[u]
                            behind[u] = behind[v]
                        out = tick - since[v]
                        state[_DECODES] -= 1
                        state[_CONTEXT] -= base[v] + out
                        state[_HELD] -= _blocks(base[v] + out - 1, size)
                        state[_RESIDENT] -= 1
                        if logged:
                            log.chunks[state[_CHUNKED], 0] = state[_ITERATIONS]
                            log.chunks[state[_CHUNKED], 1] = v
                            log.chunks[state[_CHUNKED], 2] = EVICTED
                            log.spells[state[_SPELLS], 0] = v
                            log.spells[state[_SPELLS], 1] = since[v] + 1
                            log.spells[state[_SPELLS], 2] = tick - 1
                        state[_CHUNKED] += 1
                        state[_SPELLS] += 1
                        base[v] += out
                        left[v] -= out
                        status[v] = _DUE
                        _clear(running, rank[v])
                        _set(waiting, rank[v])
                        evictions += 1
                    if late <= 0:
                        if not alone:
                            decodes = state[_DECODES]
                        # More is free than the waiting know.
                        for k in range(len(waiting)):
                            some = waiting[k]
                            while some != 0:
                                ready[order[64 * k + trailing_zeros(some)]] = soon
                                some &= some - _i64(1)
                        soonest = soon
                if late > 0:
                    ready[r] = tick + late
                    soonest = min(soonest, ready[r])
                    continue
                if delay[r] > 0 and status[r] == _WAITING:
                    status[r] = _DUE
                    ready[r] = tick + delay[r]
                    soonest = min(soonest, ready[r])
                    continue
                # Admit it.
                if p == head:
                    head = -1
                _clear(waiting, p)
                _set(running, p)
                status[r] = _RUNNING
                since[r] = _reserve(limits, held, load, tick, base[r], left[r], budget, own, alone)
                if left[r] == task.output[r]:
                    sequence[state[ADMITTED]] = r
                    admitted[state[ADMITTED]] = clock
                    state[ADMITTED] += 1
                state[_RESIDENT] += 1
                c = min(base[r], budget)
                P += c
                NP += 1
                CX += c * (0.5 * c)
                state[_HELD] += _blocks(c, size)
                if logged:
                    log.chunks[state[_CHUNKED], 0] = state[_ITERATIONS]
                    log.chunks[state[_CHUNKED], 1] = r
                    log.chunks[state[_CHUNKED], 2] = c
                state[_CHUNKED] += 1
                if c == base[r]:
                    behind[r] = joined
                    joined = r
                else:
                    state[_PREFILLING] = r
                    state[_COMPUTED] = c
                    soonest = soon
                    break
            state[_NEXT] = soonest
            if state[_PREFILLING] >= 0:
                state[_NEXT] = tick

        # ---- the iteration
        D, KV = _i64(state[_DECODES]), _i64(state[_CONTEXT])
        pure = alone and P > 0
        if pure:
            D, KV = 0, 0
        if P + D == 0:
            # Nobody is here, or all who wait are held back.
            first = -1
            for k in range(len(waiting)):
                if waiting[k] != 0:
                    first = order[64 * k + trailing_zeros(waiting[k])]
                    break
            if first >= 0 and not (limits.idle and state[_ARRIVED] < n):
                status[first] = _DUE
                ready[first] = tick
                state[_NEXT] = tick
            else:
                clock = max(clock, task.arrival[state[_ARRIVED]])
                held[tick & mask] = 0
                load[tick & mask] = 0
                state[_TICK] += 1
            continue
        dt = batch_time(task.cost, P, NP, CX, KP, D, KV)
        if logged:
            log.start[state[_ITERATIONS]] = clock
            log.tick[state[_ITERATIONS]] = -1 if pure else tick
        state[_ITERATIONS] += 1
        clock += dt
        floats[_BUSY] += dt
        if not pure:
            state[_HELD] = held[tick & mask]
            held[tick & mask] = 0
            load[tick & mask] = 0
            r = heads[tick & mask]
            heads[tick & mask] = -1
            while r >= 0:
                last = base[r] + left[r] - 1
                state[_DECODES] -= 1
                state[_CONTEXT] -= last
                state[_HELD] -= _blocks(last, size)
                _finish(task, state, floats, status, r, clock)
                _clear(running, rank[r])
                if logged:
                    log.spells[state[_SPELLS], 0] = r
                    log.spells[state[_SPELLS], 1] = since[r] + 1
                    log.spells[state[_SPELLS], 2] = tick
                state[_SPELLS] += 1
                r = behind[r]
            state[_CONTEXT] += state[_DECODES]
            state[_TICK] += 1
        while joined >= 0:
            r = joined
            joined = behind[r]
            if left[r] == task.output[r]:
                floats[_FLOATS + r] = clock
                floats[_TTFTS] += clock - task.arrival[r]
            if left[r] == 1:
                state[_HELD] -= _blocks(base[r], size)
                _finish(task, state, floats, status, r, clock)
                _clear(running, rank[r])
            else:
                state[_DECODES] += 1
                state[_CONTEXT] += base[r] + 1
                end = (since[r] + left[r] - 1) & mask
                behind[r] = heads[end]
                heads[end] = r
    floats[_CLOCK] = clock
    if bar == np.inf:
        for row in range(first_kept, len(kept)):
            kept[row, SEEN] = _NEVER
    return True


# ---------------------------------------------------------------------- from Python

NO_LOG = Log(np.zeros(0), np.zeros(0, np.int32), np.zeros((0, 3), np.int32), np.zeros((0, 3), np.int32))
NOWHERE: tuple[NDArray[np.int32], NDArray[np.float64]] = (np.zeros((0, 0), np.int32), np.zeros((0, 0)))


def evaluate(task: Task, memory: Memory, plan: Plan, log: Log = NO_LOG) -> tuple[float, float]:
    """`score` of a list schedule; its run stays in `memory`."""
    reset(task, memory.state, memory.floats)
    m = memory
    run(task, plan, m.state, m.floats, m.bits, m.sequence, m.admitted, log, *NOWHERE, 0, math.inf)
    value, guide = score(task, memory.floats)
    return float(value), float(guide)


def schedule_of(task: Task, memory: Memory, plan: Plan) -> Schedule:
    """All decisions of a list schedule."""
    evaluate(task, memory, plan)
    iterations, chunked, spells = (int(memory.state[i]) for i in (_ITERATIONS, _CHUNKED, _SPELLS))
    log = Log(
        np.zeros(iterations),
        np.zeros(iterations, np.int32),
        np.zeros((chunked, 3), np.int32),
        np.zeros((spells, 3), np.int32),
    )
    evaluate(task, memory, plan, log)
    iteration = np.zeros(int(log.tick.max()) + 2, np.int64)  # of a tick
    iteration[log.tick] = np.arange(iterations)
    length = np.maximum(0, log.spells[:, 2] - log.spells[:, 1] + 1)
    # The ticks of all spells, one behind the other.
    ticks = np.arange(length.sum()) + np.repeat(log.spells[:, 1] - np.cumsum(length) + length, length)
    at = np.concatenate([log.chunks[:, 0], iteration[ticks]])
    requests = np.concatenate([log.chunks[:, 1], np.repeat(log.spells[:, 0], length)])
    tokens = np.concatenate([log.chunks[:, 2], np.ones(len(ticks), np.int32)])
    kind = np.where(tokens == EVICTED, 0, np.where(np.arange(len(at)) < chunked, 2, 1))
    sorted_ = np.lexsort((np.arange(len(at)), kind, at))  # victims, decodes, prefills
    ends = np.searchsorted(at[sorted_], np.arange(iterations), side="right")
    return Schedule(
        log.start, ends.astype(np.int64), requests[sorted_].astype(np.int32), tokens[sorted_].astype(np.int32)
    )
