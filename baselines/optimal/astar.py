"""The compiled part of the exact search: states, the batches that may follow one, bounds, and the best-first
loop. `search` is its face.

A state says of every request how many tokens of its prompt (after a preemption: of prompt and answer so far)
are computed, how much of its answer is out, and whether it decodes: one small number, its phase, and the
phases of all requests packed into W words of 64 bits. A label is a state with the clock t at which it is
reached and the cost f so far. Every batch that the rules allow is an edge to another label.

Objectives differ in three functions: what a batch adds to f; how much f will grow for each second that
everything happens later, `weight`; and the bound.

    total latency   f: sum of finish times so far       weight: unfinished requests
    mean TTFT       f: sum of first-token times so far  weight: requests without a first token
    GPU time        f: seconds of iterations so far     weight: 0
    makespan        f: 0, and t at the end              weight: 1

Dominance. Let two labels have the same state, and g = f + weight * t. Whatever batches follow the second
label can follow the first:

1. t1 >= t2 and g1 <= g2: each batch is run as soon as its requests are there and the one before has ended,
   which is at most t1 - t2 later than after the second label. Every cost falls at most so much later, and the
   first label is that much ahead. No idling is put in that was not there, so this holds without "idle" too.
2. t1 <= t2 and f1 <= f2, with "idle": wait until t2. (Waiting is no label of its own, which the label that
   waits would dominate, but part of the batch that it is for.)
3. all requests have arrived by both times, and g1 <= g2: the clock no longer matters.

In each case the second label can be dropped.
"""

# mypy: disable-error-code="arg-type,assignment,return-value"
# (numpy's integers are no int to it, and all the same to numba)

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from llmsched_env.core.compile import njit
from llmsched_env.core.cost import batch_time
from llmsched_env.core.span import span

# numba compiles a function anew for each constant among its arguments; np.int64(0) is no constant to it.

# Kinds of phases.
WAITING, PREFILLING, DECODING, FINISHED = range(4)
TOTAL_LATENCY, MEAN_TTFT, GPU_TIME, MAKESPAN = range(4)
# What came of a call of `expand_best`.
MORE, FULL, EMPTY, SOLVED = range(4)
SHARES = 4  # steps from 0 to 1 of the part of c0 that is spread over pairs, see `_bound_flexible`
MAX_REQUESTS = 62  # evictions of a batch are kept in the bits of a word

RULES = np.dtype(
    [
        (name, "i8")
        for name in (
            "objective",
            "blocks",
            "block_size",
            "token_budget",
            "max_num_seqs",
            "chunk",
            "pause",
            "preempt",
            "idle",
            "rigid",  # none of chunk, pause, preempt is allowed, and the objective is the total latency
            "refill_pays",  # whether dropping and recomputing may ever be cheaper than one decode
            "requests",  # N
            "phases",  # S, at most, of a request
            "tokens",  # T: the most output tokens, and one
            "rows",  # R linear minorants of the cost model
            "words",  # W of a key
        )
    ]
)
REQUEST = np.dtype(
    [
        ("arrival", "f8"),
        ("prompt", "i8"),
        ("output", "i8"),
        ("last", "i8"),  # tokens of its answer that count for the objective
        ("finished", "i8"),  # the phase in which it has ended
        ("word", "i8"),  # where its phase lies in the key
        ("shift", "u8"),
        ("mask", "u8"),
    ]
)
PHASE = np.dtype(
    [
        ("kind", "i4"),
        ("computed", "i4"),
        ("generated", "i4"),
        ("done", "i4"),  # nothing of the request counts any more
        ("batches", "i4"),  # least iterations that it still has to be in
        ("area", "i4"),  # least KV blocks, summed over those iterations
        ("tokens", "i4"),  # least tokens that are still to be computed
        ("skip", "i4"),
    ]
)
LABEL = np.dtype(
    [
        ("t", "f8"),
        ("f", "f8"),
        ("priority", "f8"),  # f and the bound on what follows
        ("evicted", "u8"),  # requests preempted before the batch that led here
        ("parent", "i4"),
        ("next", "i4"),  # the next label of the same state
        ("dead", "i4"),  # expanded or dominated
        ("open", "i4"),  # place in the heap: its element of this record array is the label there
    ]
)
DEPTH = np.dtype(
    [
        (name, "i8")
        for name in (
            "present",  # the request that is decided on
            "choice",
            "tokens",
            "blocks",
            "seqs",
            "P",
            "NP",
            "KP",
            "D",
            "KV",
            "evicted",
        )
    ]
    + [("CX", "f8")]
)
COUNTS = ("labels", "open", "expanded", "generated", "dominated", "states", "pruned", "solved_by", "overflow")
COUNTERS = np.dtype([(name, "i8") for name in COUNTS])


class Rules(NamedTuple):
    """The instance: arrays for the caller, spans within."""

    s: Any  # (1,) RULES
    request: Any  # (N,) REQUEST
    phase: Any  # (N * S,) PHASE
    waiting: Any  # (N * T,) int32: phase of a request that waits with g tokens out
    decoding: Any  # (N * T,) int32: phase of a request that decodes with g tokens out
    cost: Any  # packed cost model
    minorant: Any  # (R * 5,)
    work: Any  # (R * N * S,) float64: least work still to do, in seconds, without the constant of iterations
    work_after: Any  # (R * N * T,) float64: least work once g tokens are out
    token_work: Any  # (R * N * T,) float64: work of the iteration that brings token g + 1, not preempted
    pair_cost: Any  # (R * SHARES * N * N * N,) float64, see `_bound_rigid`


class Labels(NamedTuple):
    """Labels, the heap of those open, and the table of states; grown by the caller."""

    counts: Any  # (1,) COUNTERS
    of: Any  # (L,) LABEL
    key: Any  # (L * W,) uint64
    table: Any  # (2**k,) int32: the newest label of a state, or -1


class Scratch(NamedTuple):
    """Memory of one expansion. Depth d has decided over the first d requests of those present."""

    best: Any  # (1,) float64: the incumbent's cost
    phase: Any  # (N,) int32: of the label that is expanded
    child: Any  # (N,) int32
    depth: Any  # (N + 1,) DEPTH
    profile: Any  # ((N + 1) * T,) int64: KV blocks of coming iterations by those who cannot stop
    area: Any  # (N,) float64, sorted; tokens and batches too
    tokens: Any
    batches: Any
    waiting: Any  # (N,) int64
    begun: Any  # (N,) int64: given its prompt in the iteration that is being decided on
    alive: Any  # (T,) float64
    done_work: Any  # (T,) float64


@njit(inline="always")
def _rules(rules: Rules) -> Rules:
    return Rules(
        rules.s[0],
        span(rules.request),
        span(rules.phase),
        span(rules.waiting),
        span(rules.decoding),
        span(rules.cost),
        span(rules.minorant),
        span(rules.work),
        span(rules.work_after),
        span(rules.token_work),
        span(rules.pair_cost),
    )


@njit(inline="always")
def _labels(labels: Labels) -> Labels:
    return Labels(labels.counts[0], span(labels.of), span(labels.key), span(labels.table))


@njit(inline="always")
def _scratch(scratch: Scratch) -> Scratch:
    return Scratch(
        span(scratch.best),
        span(scratch.phase),
        span(scratch.child),
        span(scratch.depth),
        span(scratch.profile),
        span(scratch.area),
        span(scratch.tokens),
        span(scratch.batches),
        span(scratch.waiting),
        span(scratch.begun),
        span(scratch.alive),
        span(scratch.done_work),
    )


# ---------------------------------------------------------------------- keys


@njit
def _unpack(rules: Rules, labels: Labels, label: int, phase) -> None:  # type: ignore[no-untyped-def]
    for i in range(rules.s.requests):
        q = rules.request[i]
        phase[i] = np.int32((labels.key[label * rules.s.words + q.word] >> q.shift) & q.mask)


@njit
def _write_key(rules: Rules, labels: Labels, label: int, phase) -> None:  # type: ignore[no-untyped-def]
    first = label * rules.s.words
    for w in range(rules.s.words):
        labels.key[first + w] = np.uint64(0)
    for i in range(rules.s.requests):
        q = rules.request[i]
        labels.key[first + q.word] |= np.uint64(phase[i]) << q.shift


@njit
def _slot(labels: Labels, label: int, words: int) -> int:
    """The place of a label's state in the table: that of its newest label, or a free one."""
    h = np.uint64(0x9E3779B97F4A7C15)
    for w in range(words):
        h ^= labels.key[label * words + w]
        h ^= h >> np.uint64(30)
        h *= np.uint64(0xBF58476D1CE4E5B9)
        h ^= h >> np.uint64(27)
        h *= np.uint64(0x94D049BB133111EB)
        h ^= h >> np.uint64(31)
    size = len(labels.table)
    slot = np.int64(h >> np.uint64(1)) & (size - 1)
    while True:
        other = np.int64(labels.table[slot])
        if other < 0:
            return slot
        same = True
        for w in range(words):
            same = same and labels.key[other * words + w] == labels.key[label * words + w]
        if same:
            return slot
        slot = (slot + 1) & (size - 1)


@njit
def rehash(arrays: Labels, words: int) -> None:
    """Fill a new, larger table of states (all -1)."""
    labels = _labels(arrays)
    for label in range(labels.counts.labels):
        labels.table[_slot(labels, label, words)] = label  # the newest comes last


# ---------------------------------------------------------------------- heap


@njit
def _before(labels: Labels, a: int, b: int) -> bool:
    """The smaller bound first; of equal ones that with more cost behind it."""
    x, y = labels.of[a], labels.of[b]
    if x.priority != y.priority:
        return x.priority < y.priority
    return x.f > y.f


@njit
def _push(labels: Labels, label: int) -> None:
    k = labels.counts.open
    labels.counts.open += 1
    while k > 0:
        up = (k - 1) >> 1
        other = labels.of[up].open
        if not _before(labels, label, other):
            break
        labels.of[k].open = other
        k = up
    labels.of[k].open = label


@njit
def _pop(labels: Labels) -> int:
    first = np.int64(labels.of[0].open)
    labels.counts.open -= 1
    n = labels.counts.open
    last = np.int64(labels.of[n].open)
    k = 0
    while True:
        down = 2 * k + 1
        if down >= n:
            break
        if down + 1 < n and _before(labels, labels.of[down + 1].open, labels.of[down].open):
            down += 1
        if not _before(labels, labels.of[down].open, last):
            break
        labels.of[k].open = labels.of[down].open
        k = down
    labels.of[k].open = last
    return first


# ---------------------------------------------------------------------- bounds


@njit
def _bound(  # type: ignore[no-untyped-def]
    rules: Rules, scratch: Scratch, phase, t: float, f: float, depth: int
) -> float:
    """No way on from a label costs less in all; once it is known to reach the incumbent's cost it may be less
    than it could be.

    Args:
        depth: of the decisions whose KV profile holds; -1: nothing runs.
    """
    if rules.s.objective == GPU_TIME or rules.s.objective == MAKESPAN:
        return _bound_machine(rules, phase, t, f)
    limit = scratch.best[0] - f
    best = 0.0
    later = rules.request[rules.s.requests - 1].arrival > t
    for row in range(rules.s.rows):
        for apart in range(2 if later else 1):
            if rules.s.rigid:
                value = _bound_rigid(rules, scratch, phase, t, row, apart, depth, np.int64(0), limit)
            else:
                value = _bound_flexible(rules, scratch, phase, t, row, apart, limit)
            if value >= limit:
                return f + value
            best = max(best, value)
    return f + best


@njit
def _bound_machine(  # type: ignore[no-untyped-def]
    rules: Rules, phase, t: float, f: float
) -> float:
    """Of the machine's time: all that is left, and for the makespan also what arrives from some time on."""
    s = rules.s
    best = 0.0
    for row in range(s.rows):
        c0 = rules.minorant[5 * row]
        work, area, tokens, turns, longest = 0.0, 0, 0, 0, 0
        for i in range(s.requests - 1, -1, -1):  # those that arrive last first
            at = i * s.phases + phase[i]
            left = rules.phase[at]
            work += rules.work[row * s.requests * s.phases + at]
            area += left.area
            tokens += left.tokens
            turns += left.batches
            longest = max(longest, left.batches)
            if i > 0 and (
                s.objective == GPU_TIME or rules.request[i].arrival == rules.request[i - 1].arrival
            ):
                continue
            count = max(longest, -(-area // s.blocks))
            count = max(count, max(-(-tokens // s.token_budget), -(-turns // s.max_num_seqs)))
            value = c0 * count + work
            if s.objective == MAKESPAN:
                value += max(t, rules.request[i].arrival) if count > 0 else t
            best = max(best, value)
    return f + best


@njit
def _insert_sorted(row, n: int, value: float) -> None:  # type: ignore[no-untyped-def]
    while n > 0 and row[n - 1] > value:
        row[n] = row[n - 1]
        n -= 1
    row[n] = value


@njit
def _count_in(scratch: Scratch, left, i: int, count: int) -> None:  # type: ignore[no-untyped-def]
    """Request i is one of those whose latencies are bounded together; `left` is what it needs."""
    _insert_sorted(scratch.area, count, np.float64(left.area))
    _insert_sorted(scratch.tokens, count, np.float64(left.tokens))
    _insert_sorted(scratch.batches, count, np.float64(left.batches))
    scratch.waiting[count] = i


@njit
def _late_starts(rules: Rules, scratch: Scratch, count: int, profile: int, longest: int, first: int) -> float:
    """Iterations, summed over `count` requests, that they must end later than if each were in every one.

    Until the k-th completion the KV cache, the token budget and the running slots have to pass the least
    area, the fewest tokens, the fewest turns of k requests (which are sorted); paired with the requests' own
    iterations, sorted too, the sum of the larger of both is least.

    Args:
        profile: where the KV blocks of others in the `longest` coming iterations begin.
        first: KV blocks of others in the one before these; -1: there is none.
    """
    s = rules.s
    areas, token_sum, turns, late = 0.0, 0.0, 0.0, 0.0
    at, room = 0, 0.0
    skipped = 1 if first >= 0 else 0
    for k in range(count):
        areas += scratch.area[k]
        token_sum += scratch.tokens[k]
        turns += scratch.batches[k]
        while room < areas:
            room += s.blocks
            if at < skipped:
                room -= first
            elif at < longest:
                room -= scratch.profile[profile + at - skipped]
            at += 1
        passed = max(np.ceil(token_sum / s.token_budget), np.ceil(turns / s.max_num_seqs))
        late += max(0.0, max(passed, np.float64(at)) - scratch.batches[k])
    return late


@njit
def _bound_flexible(  # type: ignore[no-untyped-def]
    rules: Rules, scratch: Scratch, phase, t: float, row: int, apart: int, limit: float
) -> float:
    """The sum of the times at which requests end (or get their first token), at least.

    Request i ends l_i iterations from now, at least its own b_i. The sum of latencies is

        c0 * sum of l_i + the work that is done until l_i, summed over i.

    Say i ends before q, and q brings x of its tokens until then. Then the whole work of i is in q's latency
    and the work of x tokens of q in that of i, and l_q >= b_i + (tokens of q) - x. A part `share` of
    c0 * (l_q - b_q) is spread evenly over the pairs that q is in; each pair costs at least the least over x
    and over who ends first. The rest of it counts as in `_late_starts`.

    Args:
        apart: requests yet to arrive count alone, from their arrival on.
        limit: the sum beyond which it does not matter.
    """
    s = rules.s
    c0 = rules.minorant[5 * row]
    count = 0
    value = 0.0
    for i in range(s.requests):
        at = i * s.phases + phase[i]
        left = rules.phase[at]
        if left.done:
            continue
        value += c0 * left.batches + rules.work[row * s.requests * s.phases + at]
        if apart and rules.request[i].arrival > t:
            value += rules.request[i].arrival
            continue
        value += t
        _count_in(scratch, left, i, count)
        count += 1
    if count < 2:
        return value
    late = _late_starts(rules, scratch, count, np.int64(0), np.int64(0), np.int64(-1))
    best = 0.0
    for level in range(SHARES - 1, -1, -1):
        share = level / (SHARES - 1)
        part = (1.0 - share) * c0 * late
        rate = share * c0 / (count - 1)
        for a in range(count):
            i = scratch.waiting[a]
            for b in range(a):
                q = scratch.waiting[b]
                part += min(
                    _ends_first(rules, row, i, phase[i], q, phase[q], rate),
                    _ends_first(rules, row, q, phase[q], i, phase[i], rate),
                )
        if value + part >= limit:
            return value + part
        best = max(best, part)
    return value + best


@njit
def _ends_first(rules: Rules, row: int, i: int, si: int, q: int, sq: int, rate: float) -> float:
    """The least cost of a pair of which i ends first, see `_bound_flexible`."""
    s = rules.s
    mine, other = rules.phase[i * s.phases + si], rules.phase[q * s.phases + sq]
    left = rules.request[q].last - other.generated
    late = mine.batches - (other.batches - left)
    least = rate * max(0, late)
    whole = rules.work[(row * s.requests + q) * s.phases + sq]
    after = (row * s.requests + q) * s.tokens + other.generated
    for x in range(1, left + 1):
        if late <= x - 1:
            break
        least = min(least, whole - rules.work_after[after + x] + rate * max(0, late - x))
    return rules.work[(row * s.requests + i) * s.phases + si] + least


@njit
def _bound_rigid(  # type: ignore[no-untyped-def]
    rules: Rules,
    scratch: Scratch,
    phase,
    t: float,
    row: int,
    apart: int,
    depth: int,
    begun: int,
    limit: float,
) -> float:
    """`_bound_flexible` where nothing can be stopped once it runs, so that a schedule is a start s_i >= 0 for
    each waiting request, counted in iterations from now.

    Two requests cost each other the work that each has done when the other ends, which depends on the
    difference of their starts alone; what the running ones cost each other is known. So the sum of latencies
    is

        c0 * (own iterations + sum of s_i) + own work + sum over pairs of cost(s_q - s_i).

    A part `share` of c0 * s_i is spread evenly over the pairs that i is in, and each pair then costs at least
    its least cost over all differences: `pair_cost`, a table. The rest of it counts as in `_late_starts`.

    Args:
        depth: of the decisions whose KV profile holds; -1: nothing runs.
        begun: the next iteration is being decided on, and the requests in `scratch.begun` are in it.
    """
    s = rules.s
    n = s.requests
    c0 = rules.minorant[5 * row]
    alive, done_work = scratch.alive, scratch.done_work
    longest, running, count = 0, 0, 0
    value = 0.0
    for i in range(n):
        at = i * s.phases + phase[i]
        left = rules.phase[at]
        if left.kind == DECODING or (begun and scratch.begun[i]):
            running += 1
            g = (row * n + i) * s.tokens + left.generated
            iterations = rules.request[i].output - left.generated
            while longest < iterations:
                alive[longest] = 0.0
                done_work[longest] = 0.0
                longest += 1
            for k in range(iterations):
                alive[k] += 1.0
                done_work[k] += rules.token_work[g + k]
        elif left.kind == WAITING:
            value += c0 * left.batches + rules.work[row * n * s.phases + at]
            if apart and rules.request[i].arrival > t:
                value += rules.request[i].arrival
                continue
            value += t
            _count_in(scratch, left, i, count)
            count += 1
    passed = 0.0
    for k in range(longest):
        value += alive[k] * (c0 + done_work[k])
        passed += done_work[k]
        done_work[k] = passed
    value += running * t
    if count == 0:
        return value
    first = scratch.depth[depth].blocks if begun else -1
    late = _late_starts(rules, scratch, count, max(0, depth) * s.tokens, longest if depth >= 0 else 0, first)
    mates = count - 1 + running
    best = 0.0
    for level in range(SHARES - 1, -1, -1):
        share = level / (SHARES - 1)
        part = (1.0 - share) * c0 * late
        rate = share * c0 / max(1, mates)  # of a start, to each of the mates
        table = ((row * SHARES + level) * n + mates) * n
        for a in range(count):
            i = scratch.waiting[a]
            if running > 0:
                part += _beside(rules, scratch, row, i, longest, rate * running)
            for b in range(a):
                part += rules.pair_cost[(table + scratch.waiting[b]) * n + i]
        if value + part >= limit:
            return value + part
        best = max(best, part)
    return value + best


@njit
def _beside(rules: Rules, scratch: Scratch, row: int, i: int, longest: int, rate: float) -> float:
    """Least over the starts of request i of: the work of the running requests until it ends, its own work
    while they live, and `rate` an iteration that it starts later."""
    own = rules.request[i].output
    work = (row * rules.s.requests + i) * rules.s.tokens
    least = np.inf
    for start in range(longest + 1):
        if rate * start >= least:
            break
        cost = rate * start + scratch.done_work[min(longest, start + own) - 1]
        if cost >= least:
            continue
        for k in range(min(own, longest - start)):
            cost += scratch.alive[start + k] * rules.token_work[work + k]
        least = min(least, cost)
    return least


@njit
def fill_pair_costs(arrays: Rules) -> None:
    """`pair_cost`: see `_bound_rigid`."""
    rules = _rules(arrays)
    n = rules.s.requests
    at = 0
    for row in range(rules.s.rows):
        for level in range(SHARES):
            for mates in range(n):
                rate = level / (SHARES - 1) * rules.minorant[5 * row] / max(1, mates)
                for i in range(n):
                    for q in range(n):
                        rules.pair_cost[at] = _pair_cost(rules, row, i, q, rate) if i != q else 0.0
                        at += 1


@njit
def _pair_cost(rules: Rules, row: int, i: int, q: int, rate: float) -> float:
    """Least over d, the start of q less that of i, of: rate * abs(d), the work that q has done when i ends,
    and that i has done when q ends."""
    own, other = rules.request[i].output, rules.request[q].output
    at_i = (row * rules.s.requests + i) * rules.s.tokens
    at_q = (row * rules.s.requests + q) * rules.s.tokens
    least = np.inf
    for d in range(-other, own + 1):
        cost = rate * abs(d)
        for k in range(max(0, min(other, own - d))):
            cost += rules.token_work[at_q + k]
        for k in range(max(0, min(own, other + d))):
            cost += rules.token_work[at_i + k]
        least = min(least, cost)
    return least


# ---------------------------------------------------------------------- labels


@njit
def _dominates(rules: Rules, t1: float, f1: float, t2: float, f2: float, weight: float) -> bool:
    """Whether the first label, (t1, f1), dominates the second; see the top of this module."""
    g1, g2 = f1 + weight * t1, f2 + weight * t2
    if g1 <= g2:
        last = rules.request[rules.s.requests - 1].arrival
        if t1 >= t2 or t1 >= last:
            return True
    return rules.s.idle and t1 <= t2 and f1 <= f2


@njit
def _add_label(  # type: ignore[no-untyped-def]
    rules: Rules,
    labels: Labels,
    scratch: Scratch,
    phase,
    t: float,
    f: float,
    parent: int,
    evicted: int,
    opened: int,
    depth: int,
) -> int:
    """The new label of a state, or -1: dominated, or no better than the incumbent."""
    counts = labels.counts
    counts.generated += 1
    priority = _bound(rules, scratch, phase, t, f, depth)
    if parent >= 0:
        priority = max(priority, labels.of[parent].priority)
    if priority >= scratch.best[0]:
        counts.pruned += 1
        return -1
    new = counts.labels
    if new >= len(labels.of) or 2 * counts.states >= len(labels.table):
        counts.overflow = 1
        return -1
    _write_key(rules, labels, new, phase)
    weight = 0.0
    if rules.s.objective == MAKESPAN:
        weight = 1.0
    elif rules.s.objective != GPU_TIME:
        for i in range(rules.s.requests):
            if not rules.phase[i * rules.s.phases + phase[i]].done:
                weight += 1.0
    slot = _slot(labels, new, rules.s.words)
    head = np.int64(labels.table[slot])
    other = head
    while other >= 0:
        x = labels.of[other]
        if _dominates(rules, x.t, x.f, t, f, weight):
            counts.dominated += 1
            return -1
        if not x.dead and _dominates(rules, t, f, x.t, x.f, weight):
            x.dead = 1
            counts.dominated += 1
        other = np.int64(x.next)
    if head < 0:
        counts.states += 1
    labels.table[slot] = new
    q = labels.of[new]
    q.t = t
    q.f = f
    q.priority = priority
    q.parent = parent
    q.next = head
    q.evicted = np.uint64(evicted)
    q.dead = 0
    counts.labels += 1
    if opened:
        _push(labels, new)
    return np.int64(new)


@njit
def add_first(instance: Rules, store: Labels, memory: Scratch) -> None:
    """Add the label of the beginning: nobody has got anything, at time 0."""
    rules, labels, scratch = _rules(instance), _labels(store), _scratch(memory)
    for i in range(rules.s.requests):
        scratch.phase[i] = rules.waiting[i * rules.s.tokens]
    start, no, yes, none = np.float64(0), np.int64(0), np.int64(1), np.int64(-1)
    _add_label(rules, labels, scratch, scratch.phase, start, start, none, no, yes, none)


# ---------------------------------------------------------------------- batches


@njit
def _expand(rules: Rules, labels: Labels, scratch: Scratch, label: int, opened: int) -> None:
    """Add every label that one batch leads to, begun now or, with "idle", at a later arrival."""
    labels.of[label].dead = 1
    labels.counts.expanded += 1
    phase = scratch.phase
    _unpack(rules, labels, label, phase)
    t, waited = labels.of[label].t, np.int64(0)
    while True:
        # Who is there, the running ones first: they are the most constrained.
        count = 0
        upcoming = np.inf
        for waits in range(2):
            for i in range(rules.s.requests):
                kind = rules.phase[i * rules.s.phases + phase[i]].kind
                if kind == FINISHED or (kind == WAITING) != (waits == 1):
                    continue
                if waits and rules.request[i].arrival > t:
                    upcoming = min(upcoming, rules.request[i].arrival)
                else:
                    scratch.depth[count].present = i
                    count += 1
        if count > 0:
            _batches(rules, labels, scratch, label, t, count, waited, opened)
            if not rules.s.idle:
                return
            waited = np.int64(1)
        if upcoming == np.inf:
            return
        t = upcoming


@njit
def _batches(
    rules: Rules, labels: Labels, scratch: Scratch, label: int, t: float, count: int, waited: int, opened: int
) -> None:
    """Add the label of every batch of the `count` requests present that may begin at `t`.

    One that the engine has waited for has a request that has just arrived; without, it could have begun
    before. Where it may not wait and somebody is still to come, recomputing in place of a decode is a way to.
    """
    s = rules.s
    no, yes = np.int64(0), np.int64(1)
    phase, child, row = scratch.phase, scratch.child, scratch.depth
    f = labels.of[label].f
    refill = s.refill_pays or (not s.idle and rules.request[s.requests - 1].arrival > t)
    for i in range(s.requests):
        child[i] = phase[i]
        scratch.begun[i] = 0
    begin = row[0]
    begin.tokens = begin.blocks = begin.seqs = begin.P = begin.NP = begin.KP = 0
    begin.D = begin.KV = begin.evicted = 0
    begin.CX = 0.0
    for k in range(s.tokens):
        scratch.profile[k] = 0
    depth = 0
    row[0].choice = -1
    while depth >= 0:
        if depth == count:
            fits = row[depth].tokens > 0
            if waited and fits:
                fits = False
                for d in range(count):
                    i = row[d].present
                    fits = fits or (rules.request[i].arrival == t and child[i] != phase[i])
            if fits:
                _close(rules, labels, scratch, label, t, f, depth, opened)
            depth -= 1
            continue
        i = row[depth].present
        row[depth].choice += 1
        scratch.begun[i] = 0
        if not _choose(rules, scratch, depth, i, phase[i], row[depth].choice, refill):
            child[i] = phase[i]
            depth -= 1
            continue
        depth += 1
        row[depth].choice = -1
        if s.rigid and child[i] != phase[i] and rules.phase[i * s.phases + phase[i]].kind == WAITING:
            # Whoever else is in the batch: can it still lead to something better?
            scratch.begun[i] = 1
            limit = scratch.best[0] - f
            for minorant in range(s.rows):
                if _bound_rigid(rules, scratch, phase, t, minorant, no, depth, yes, limit) >= limit:
                    scratch.begun[i] = 0
                    depth -= 1
                    break


@njit
def _choose(
    rules: Rules, scratch: Scratch, depth: int, i: int, phase: int, choice: int, refill: bool
) -> bool:
    """Write into depth + 1 what choice number `choice` for request i makes of the batch; False: there are no
    more choices. Choices that the limits forbid are passed over.

    Args:
        refill: whether to recompute everything in place of a decode is a choice.
    """
    s = rules.s
    q = rules.phase[i * s.phases + phase]
    known = rules.request[i].prompt + q.generated
    before, after = scratch.depth[depth], scratch.depth[depth + 1]
    room = s.token_budget - before.tokens
    while True:
        # Which choice is it? `tokens` are given; `drop`: preempted before.
        tokens, drop = 0, False
        if q.kind == WAITING:
            parts = min(known - 1, room) if s.chunk else 0
            if choice == 1:
                tokens = known
            elif choice > 1:
                tokens = choice - 1
                if tokens > parts:
                    return False
        elif q.kind == PREFILLING:
            rest = known - q.computed
            parts = max(0, min(rest - 1, room))
            if choice == 1:
                tokens = rest
            elif 2 <= choice <= parts + 1:
                tokens = choice - 1
            elif choice > 1:
                tokens, drop = choice - 2 - parts, True
                if not s.preempt or tokens > min(known, room):
                    return False
        else:
            first = 2 if s.pause else 1
            if choice == 0:
                tokens = 1
            elif choice >= first:
                tokens, drop = choice - first, True
                most = 0
                if s.chunk:
                    most = min(known if refill else known - 1, room)
                elif refill:
                    most = 1
                if not s.preempt or tokens > most:
                    return False
                if tokens > 0 and not s.chunk:
                    tokens = known
        scratch.depth[depth].choice = choice
        choice += 1
        computed = 0 if drop else q.computed
        held = (computed + tokens + s.block_size - 1) // s.block_size
        if tokens > room or before.blocks + held > s.blocks or (held > 0 and before.seqs >= s.max_num_seqs):
            continue
        after.tokens = before.tokens + tokens
        after.blocks = before.blocks + held
        after.seqs = before.seqs + (1 if held > 0 else 0)
        after.P, after.NP, after.KP, after.CX = before.P, before.NP, before.KP, before.CX
        after.D, after.KV = before.D, before.KV
        after.evicted = before.evicted | (1 << i if drop else 0)
        then = phase
        if tokens > 0:
            if q.kind == DECODING and not drop:
                after.D += 1
                after.KV += computed + 1
            else:
                after.P += tokens
                after.NP += 1
                after.KP += computed
                after.CX += tokens * (computed + 0.5 * tokens)
            g = q.generated
            if computed + tokens < known:
                then = rules.waiting[i * s.tokens + g] + computed + tokens
            elif g + 1 == rules.request[i].output:
                then = rules.request[i].finished
            else:
                then = np.int64(rules.decoding[i * s.tokens + g + 1])
        elif drop:
            then = np.int64(rules.waiting[i * s.tokens + q.generated])
        scratch.child[i] = then
        if not (s.pause or s.preempt) and not _goes_on(rules, scratch, depth, i, then):
            continue
        return True


@njit
def _goes_on(rules: Rules, scratch: Scratch, depth: int, i: int, phase: int) -> bool:
    """Where nobody can be stopped: whether the KV cache will hold what runs until it ends."""
    s = rules.s
    before, after = depth * s.tokens, (depth + 1) * s.tokens
    for k in range(s.tokens):
        scratch.profile[after + k] = scratch.profile[before + k]
    q = rules.phase[i * s.phases + phase]
    iterations = 0
    if q.kind == DECODING:
        iterations = rules.request[i].output - q.generated
    elif q.kind == PREFILLING:
        iterations = s.tokens
    for k in range(iterations):
        held = rules.request[i].prompt + q.generated + k if q.kind == DECODING else q.computed
        scratch.profile[after + k] += (held + s.block_size - 1) // s.block_size
        if scratch.profile[after + k] > s.blocks:
            return False
    return True


@njit
def _close(
    rules: Rules, labels: Labels, scratch: Scratch, label: int, t: float, f: float, depth: int, opened: int
) -> None:
    """Run the batch that is decided and add its label; it may be a new incumbent."""
    s = rules.s
    x = scratch.depth[depth]
    dt = batch_time(rules.cost, float(x.P), float(x.NP), x.CX, float(x.KP), float(x.D), float(x.KV))
    now = t + dt
    unfinished = 0
    for i in range(s.requests):
        unfinished |= scratch.child[i] != rules.request[i].finished
    if s.objective == GPU_TIME:
        f += dt
    elif s.objective != MAKESPAN:
        for d in range(depth):
            i = scratch.depth[d].present
            first = i * s.phases
            if rules.phase[first + scratch.child[i]].done and not rules.phase[first + scratch.phase[i]].done:
                f += now
    new = _add_label(
        rules, labels, scratch, scratch.child, now, f, label, x.evicted, opened * unfinished, depth
    )
    if new >= 0 and not unfinished:
        scratch.best[0] = now if s.objective == MAKESPAN else f
        labels.counts.solved_by = new


@njit
def expand_best(instance: Rules, store: Labels, memory: Scratch, most: int) -> int:
    """Expand up to `most` labels, the least bound first.

    Returns:
        MORE; FULL: the labels or their table need more room; EMPTY: all are expanded; SOLVED: none that is
        left can beat the incumbent.
    """
    rules, labels, scratch = _rules(instance), _labels(store), _scratch(memory)
    counts, yes = labels.counts, np.int64(1)
    for _ in range(most):
        while counts.open > 0 and labels.of[labels.of[0].open].dead:
            _pop(labels)
        if counts.open == 0:
            return EMPTY
        if labels.of[labels.of[0].open].priority >= scratch.best[0]:
            return SOLVED
        label = _pop(labels)
        _expand(rules, labels, scratch, label, yes)
        if counts.overflow:  # once more when there is room; what was added is dominated by itself
            counts.overflow = 0
            labels.of[label].dead = 0
            _push(labels, label)
            return FULL
    return MORE


@njit
def beam(instance: Rules, store: Labels, memory: Scratch, width: int) -> None:
    """From label 0, batch by batch, expand the `width` labels with the least bounds; the incumbent is in
    `scratch.best` and `counts.solved_by`."""
    rules, labels, scratch = _rules(instance), _labels(store), _scratch(memory)
    counts = labels.counts
    frontier, no = np.zeros(1, np.int64), np.int64(0)
    while len(frontier) > 0:
        begin = counts.labels
        for k in range(len(frontier)):
            if labels.of[frontier[k]].priority < scratch.best[0]:
                _expand(rules, labels, scratch, frontier[k], no)
            if counts.overflow:
                counts.overflow = 0
                return
        alive = 0
        for label in range(begin, counts.labels):
            alive += 1 - labels.of[label].dead
        added, priority = np.empty(alive, np.int64), np.empty(alive)
        alive = 0
        for label in range(begin, counts.labels):
            if not labels.of[label].dead:
                added[alive], priority[alive] = label, labels.of[label].priority
                alive += 1
        frontier = added[np.argsort(priority)[:width]]
