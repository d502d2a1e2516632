"""Certified bounds on what any schedule of an instance can reach, for instances of any size.

A bound holds for every schedule that the instance allows: chunked prompts, paused decodes, requests that are
preempted and recomputed, inserted idle time, decisions that know the future. All start from the rows of
`minorant.linear_minorants`: an iteration that serves the requests S takes, for each row,

    T >= c0 + W,    W = c1*P + c2*D + c3*KV + c4*CX, a sum over S.

What every request brings along, whatever the schedule:

* O iterations that yield a token, no two the same, and ceil(I/C) - 1 more of a prompt that exceeds the token
  budget C;
* work w_j for token j: c1*I + c4*I^2/2 for the prefill, whatever its chunks, then c2 + c3*(I + j) for a
  decode or, if that is less and "preempt" is allowed, c1*(I + j) + c4*(I + j)^2/2 for a recomputation;
* shares of an iteration: ceil((I + j)/b) of the KV blocks, one of the running slots, one token of the budget
  (I for the first). No iteration has more than one of each to give, so c0 may be divided by any of them.

The last token of an answer is never written to the cache and needs nothing.

How tight they are. GPU time: 99 % of the optimum on `instance.mixed(7)`, 71 to 90 % of what the best
scheduler needs on 1,000 requests of real lengths at a load of 0.85 or more. Total latency: 88 to 98 % of the
optimum on `mixed(7)`, 76 to 96 % where requests arrive over time, all by "pairs"; of the best scheduler's on
1,000 requests at least 46 to 90 % at load 0.5, 27 to 70 % at 0.85, 33 to 71 % at 1.1
(scripts/bench_bounds.py). "order" is best where a queue forms of requests with short answers, "prices" for
long answers in overload, "pairs" at low load and where requests are few. What is missing lies on both
sides: schedulers pay more for prefills than they have to, and the bounds let a decode slow the others too
little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import baselines
from baselines.optimal.instance import OBJECTIVES, Instance
from baselines.optimal.minorant import blends, linear_minorants
from baselines.optimal.prices import dual_bound
from llmsched_env.core.compile import njit
from llmsched_env.errors import InputError, unknown
from llmsched_env.simulation import simulate

BOUNDS: dict[str, str] = {
    "area": "what all requests bring: work, and shares of iterations",
    "alone": "every request as if it were alone",
    "order": "the k-th to finish, on one machine that serves the least remaining need first",
    "pairs": "alone, and what each two requests cost each other",
    "prices": "the Lagrangian dual: prices of seconds and iterations, the cheapest course of each request",
}

_SAFE = 1 - 1e-10  # sums of many terms are rounded
_SLACK = 1e-9  # of a target, as `Instance.value` has it

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def lower_bounds(
    instance: Instance, objective: str | None = None, *, rounds: int | None = None
) -> dict[str, float]:
    """Bounds by name, see `BOUNDS`: no schedule does better. Above the objective for slo_goodput, else below.

    Nothing is certain of a custom cost model, whose bounds are 0.

    Args:
        objective: of `OBJECTIVES`; None: the instance's own.
        rounds: of the ascent of "prices", about 20 ms each for 1,000 requests; 0: without it; None: 60, and
            fewer for more than 1,000 requests.

    Raises:
        InputError: an unknown objective.
    """
    objective = instance.objective if objective is None else objective
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    need = _Need.of(instance)
    if objective == "slo_goodput":
        return _slo_goodput(instance, need)
    found = {
        "total_latency": lambda: _total_latency(instance, need, rounds),
        "mean_ttft": lambda: _mean_ttft(need),
        "gpu_time": lambda: {"area": _area(need)},
        "makespan": lambda: _makespan(need),
    }[objective]()
    return {name: max(0.0, float(value) * _SAFE) for name, value in found.items()}


def best_bound(
    instance: Instance, objective: str | None = None, *, rounds: int | None = None
) -> tuple[str, float]:
    """The name and the value of the tightest of `lower_bounds`."""
    found = lower_bounds(instance, objective, rounds=rounds)
    most = min if (objective or instance.objective) == "slo_goodput" else max
    name = most(found, key=lambda name: found[name])
    return name, found[name]


def capacity(instance: Instance) -> float:
    """Requests/s that no schedule can sustain more of, if requests like these keep coming.

    What all requests bring, divided by their number: the fluid limit of the bound "area".
    """
    need = _Need.of(instance)
    seconds = [
        row[0] * need.shares.sum(axis=1).max() + work.sum()
        for row, work in zip(need.rows, need.works(), strict=True)
    ]
    return len(instance) / max(seconds) if max(seconds) > 0 else math.inf


def report(instance: Instance, *, rounds: int | None = None) -> list[dict[str, Any]]:
    """All bounds of an instance, a row each: objective, bound, value, unit, best (of its objective), what.

    A request without targets has no bound on slo_goodput.
    """
    rows = []
    targets = np.isfinite(instance.requests.ttft_target_s) | np.isfinite(instance.requests.tpot_target_s)
    for objective in OBJECTIVES:
        if objective == "slo_goodput" and not targets.any():
            continue
        found = lower_bounds(instance, objective, rounds=rounds)
        best = (min if objective == "slo_goodput" else max)(found.values())
        for name, value in found.items():
            rows.append(
                {
                    "objective": objective,
                    "bound": name,
                    "value": value,
                    "unit": "requests, at most" if objective == "slo_goodput" else "s, at least",
                    "best": value == best,
                    "what": BOUNDS[name],
                }
            )
    return rows


# ---------------------------------------------------------------------- what requests need


class _Need(NamedTuple):
    """What the requests bring, whatever the schedule; arrays of N requests, in order of arrival.

    Attributes:
        arrival: seconds. prompt, output: tokens.
        rows: minorants of the cost model, (R, 5).
        recompute: whether a token may come from a recomputation.
        chunks: least iterations of the prefill.
        shares, first_shares: (3, N), of an iteration's KV blocks, running slots and token budget, for all
            tokens and for the first.
        growth: (3), of the share of a decode with each token.
        most: requests that can get a token in the same iteration.
        durations: least seconds of each token, request after request.
        first, alone: least seconds from the start of a request's service to its first and to its last token.
    """

    arrival: Floats
    prompt: Ints
    output: Ints
    rows: Floats
    recompute: bool
    chunks: Ints
    shares: Floats
    first_shares: Floats
    growth: Floats
    most: int
    durations: Floats
    first: Floats
    alone: Floats

    @staticmethod
    def of(instance: Instance) -> _Need:
        r, engine = instance.requests, instance.engine
        prompt, output = r.prompt_tokens.astype(np.int64), r.output_tokens.astype(np.int64)
        budget, size, blocks = instance.token_budget, engine.block_size, engine.kv_blocks
        assert engine.max_num_seqs is not None and blocks is not None
        slots = min(engine.max_num_seqs, len(r), budget)
        longest = int((prompt + output).max()) - 1
        rows = linear_minorants(
            instance.profile,
            max_prefill_tokens=budget,
            max_decodes=slots,
            max_context=longest,
            max_chunk=min(budget, longest),
        )
        limits = np.array([[blocks], [slots], [budget]], np.float64)
        first = np.stack([-(-prompt // size), np.ones_like(prompt), prompt]) / limits
        decodes = output - 1
        rest = np.stack([_blocks(prompt + decodes, size) - _blocks(prompt, size), decodes, decodes]) / limits
        chunks = -(-prompt // budget)
        recompute = instance.allows("preempt")
        durations = _durations(prompt, output, chunks, rows, recompute)
        begin = np.cumsum(output) - output
        growth = np.array([1 / (size * blocks), 0.0, 0.0])
        most = min(slots, max(1, blocks // int((-(-prompt // size)).min())))
        arrival = np.ascontiguousarray(r.arrival_s)
        return _Need(
            arrival,
            prompt,
            output,
            rows,
            recompute,
            chunks,
            first + rest,
            first,
            growth,
            most,
            durations,
            durations[begin],
            np.add.reduceat(durations, begin),
        )

    def works(self, rows: Floats | None = None) -> Iterator[Floats]:
        """The least work of the requests by each row, seconds."""
        for row in self.rows if rows is None else rows:
            yield _works(self.prompt, self.output, row, self.recompute)


def _blocks(tokens: Ints, size: int) -> Ints:
    """The sum over t = 1..tokens of ceil(t / size)."""
    full, rest = tokens // size, tokens % size
    return np.asarray(full * (full + 1) // 2 * size + rest * (full + 1))


@njit(inline="always")
def _token_work(row, prompt, j, recompute):  # type: ignore[no-untyped-def]
    """Least work of token j of an answer, seconds."""
    L = float(prompt + j)
    prefill = row[1] * L + row[4] * L * L * 0.5
    if j == 0:
        return prefill
    decode = row[2] + row[3] * L
    return min(decode, prefill) if recompute else decode


@njit
def _works(prompt: Ints, output: Ints, row: Floats, recompute: bool) -> Floats:
    """Least work of each request, seconds."""
    work = np.zeros(len(prompt))
    for i in range(len(prompt)):
        for j in range(output[i]):
            work[i] += _token_work(row, prompt[i], j, recompute)
    return work


@njit
def _durations(prompt: Ints, output: Ints, chunks: Ints, rows: Floats, recompute: bool) -> Floats:
    """Least seconds for each token of each request, request after request.

    A token takes at least what the best row says of its own work, for a batch has the features of its
    members at least.
    """
    seconds = np.zeros(output.sum())
    at = 0
    for i in range(len(prompt)):
        for j in range(output[i]):
            for r in range(len(rows)):
                c0 = rows[r, 0] * chunks[i] if j == 0 else rows[r, 0]
                seconds[at] = max(seconds[at], c0 + _token_work(rows[r], prompt[i], j, recompute))
            at += 1
    return seconds


# ---------------------------------------------------------------------- one machine


@njit
def _completions(arrival: Floats, size: Floats) -> Floats:
    """When the k-th job is done, k = 1..N, on a machine that always works on the job with the least left."""
    n = len(arrival)
    heap, held = np.empty(n), 0  # seconds left of the jobs that have arrived
    done = np.empty(n)
    clock, coming = 0.0, 0
    for k in range(n):
        while True:
            if held == 0:
                clock = max(clock, arrival[coming])
            while coming < n and arrival[coming] <= clock:
                at = held
                held += 1
                while at > 0 and heap[(at - 1) >> 1] > size[coming]:
                    heap[at] = heap[(at - 1) >> 1]
                    at = (at - 1) >> 1
                heap[at] = size[coming]
                coming += 1
            if coming == n or clock + heap[0] <= arrival[coming]:
                break
            heap[0] -= arrival[coming] - clock  # still the least of those here
            clock = arrival[coming]
        clock += heap[0]
        done[k] = clock
        held -= 1
        last, at = heap[held], 0
        while True:
            child = 2 * at + 1
            if child >= held:
                break
            if child + 1 < held and heap[child + 1] < heap[child]:
                child += 1
            if heap[child] >= last:
                break
            heap[at] = heap[child]
            at = child
        heap[at] = last
    return done


@njit
def _interference(
    arrival: Floats,
    prompt: Ints,
    output: Ints,
    durations: Floats,
    row: Floats,
    recompute: bool,
    rate: float,
    work: Floats,
) -> float:
    """The sum over pairs of the least that two requests cost each other, seconds; see `_pairs`.

    Args:
        rate: seconds for each iteration in which only one of the two yields a token.
    """
    n = len(arrival)
    # [at + i + k]: least of y tokens' work less y*rate, y up to k. All of a request's tokens are within the
    # other's life (`whole`), or the work for the first one may lie before (`later`).
    whole, later = np.zeros(output.sum() + n), np.zeros(output.sum() + n)
    at = 0
    for i in range(n):
        full, part = 0.0, 0.0
        for k in range(1, output[i] + 1):
            own = _token_work(row, prompt[i], k - 1, recompute)
            full += own - rate
            part += (own if k > 1 else 0.0) - rate
            whole[at + k] = min(whole[at + k - 1], full)
            later[at + k] = min(later[at + k - 1], part)
        at += output[i] + 1
    total, begin, at = 0.0, 0, 0
    for i in range(n):
        # The tokens that i can have begun before q arrives, and what they leave.
        begun, clock, rest = 0, 0.0, work[i]
        at_q = at + output[i] + 1
        for q in range(i + 1, n):
            while begun < output[i] and clock < arrival[q] - arrival[i]:
                rest -= _token_work(row, prompt[i], begun, recompute)
                clock += durations[begin + begun]
                begun += 1
            if begun == output[i]:
                break
            left = output[i] - begun
            i_first = max(0.0, rest) + rate * left + whole[at_q + min(left, output[q])]
            mine = whole if arrival[q] == arrival[i] else later
            q_first = work[q] + rate * output[q] + mine[at + min(output[i], output[q])]
            total += min(i_first, q_first)
            at_q += output[q] + 1
        begin += output[i]
        at += output[i] + 1
    return total


# ---------------------------------------------------------------------- the objectives


def _area(need: _Need, begin: int = 0) -> float:
    """Seconds in which an iteration runs, for the requests from index `begin` on.

    There are at least as many iterations as the requests have shares of one, whatever the share is of, and as
    any one request needs. Each takes c0, and the work of all requests has to be done.
    """
    shares = need.shares[:, begin:].sum(axis=1)
    longest = (need.output + need.chunks - 1)[begin:].max()
    iterations = max(float(longest), *(math.ceil(x * (1 - 1e-12)) for x in shares))
    works = need.works()
    return max(row[0] * iterations + work[begin:].sum() for row, work in zip(need.rows, works, strict=True))


def _makespan(need: _Need) -> dict[str, float]:
    """After the arrival of request k there is the area of it and of all later ones to serve; and each request
    takes its time alone."""
    shares, works = need.shares[:, ::-1].cumsum(axis=1)[:, ::-1], np.stack(list(need.works()))
    longest = np.maximum.accumulate((need.output + need.chunks - 1)[::-1])[::-1]
    iterations = np.maximum(longest, np.ceil(shares * (1 - 1e-12)).max(axis=0))
    area = need.rows[:, :1] * iterations + works[:, ::-1].cumsum(axis=1)[:, ::-1]
    return {
        "area": (need.arrival + area.max(axis=0)).max(),
        "alone": (need.arrival + need.alone).max(),
    }


def _mean_ttft(need: _Need) -> dict[str, float]:
    """As the total latency, for requests of which only the prefill has to be served."""
    ones = np.ones_like(need.output)
    order = _order(need, ones, need.first_shares, need.first)
    return {"alone": need.first.mean(), "order": order / len(ones)}


def _total_latency(instance: Instance, need: _Need, rounds: int | None) -> dict[str, float]:
    if rounds is None:
        rounds = max(10, min(60, 60_000 // len(instance)))
    found = {
        "alone": need.alone.sum(),
        "order": _order(need, need.output, need.shares, need.alone),
        "pairs": _pairs(need),
    }
    if rounds > 0:
        found["prices"] = _prices(instance, need, rounds)
    return found


def _slo_goodput(instance: Instance, need: _Need) -> dict[str, float]:
    """Requests that can meet their targets.

    alone: those that can if nobody else is there. area: of these, at most as many as have their needs (see
    `_order`) fit between the first arrival and the last moment at which one may still finish in time.
    """
    r = instance.requests
    left = np.maximum(need.output - 1, 1)
    ttft, tpot = r.ttft_target_s * (1 + 2 * _SLACK), r.tpot_target_s * (1 + 2 * _SLACK)
    can = (need.first * _SAFE <= ttft) & ((need.alone - need.first) * _SAFE <= left * tpot)
    alone = int(can.sum())
    area = alone
    if alone:
        latest = (need.arrival + ttft + (need.output - 1) * np.where(need.output > 1, tpot, 0.0))[can].max()
        for size in _sizes(need, need.output, need.shares):
            fit = np.cumsum(np.sort(size[can])) * _SAFE <= latest - need.arrival[can].min()
            area = min(area, int(fit.sum()))
    return {"alone": float(alone), "area": float(area)}


def _sizes(need: _Need, output: Ints, shares: Floats) -> Iterator[Floats]:
    """Seconds of the engine that are each request's own, for every row and several divisions of c0.

    An iteration takes c0 + W or more, and hands out at most the whole of c0 if every request gets as much of
    it as it has of a resource, or of a mixture of them. So the needs of all that it serves fit into it.
    """
    mixtures = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.0), (0.5, 0.0, 0.5)]
    for row in blends(need.rows):
        work = _works(need.prompt, output, row, need.recompute)
        for mixture in mixtures:
            yield work + row[0] * (np.array(mixture) @ shares)


def _order(need: _Need, output: Ints, shares: Floats, alone: Floats) -> float:
    """Sum over k of a bound on when the k-th request to finish does, less all arrivals.

    On one machine that may interrupt a job at any time, serving the one with the least left has at any time
    finished as many jobs as any schedule; and a schedule of the engine is one of this machine, for the needs
    of `_sizes`. This holds for each of them, and for each k the largest counts. Nor can k requests be done
    before the k-th least arrival plus time alone, nor before the k shortest answers, shares and works are,
    counted from the first arrival on.
    """
    done = np.sort(need.arrival + alone)
    for size in _sizes(need, output, shares):
        done = np.maximum(done, _completions(need.arrival, size))
    iterations = np.sort(output)
    for share in shares:
        iterations = np.maximum(iterations, np.ceil(np.sort(share).cumsum() * (1 - 1e-12)))
    for row in need.rows:
        work = np.sort(_works(need.prompt, output, row, need.recompute)).cumsum()
        done = np.maximum(done, need.arrival[0] + row[0] * iterations + work)
    return float(done.sum() - need.arrival.sum())


def _pairs(need: _Need) -> float:
    """Every request alone by one row, and what each two cost each other.

    Let L be the life of request i, from arrival to finish. Of the iterations in it O yield a token of i; x do
    not. With the work W(L) of all requests in these iterations,

        F_i >= c0*O_i + W(L) + c0*x.

    At most `most` requests yield in an iteration, all but i in one of its x: c0/most of it, or c0/(N - 1), is
    each pair's. Let q arrive in L.

    i finishes first: the tokens that it could not have begun before q came are in the life of q, work and
    all. In their iterations q yields too, y times, which is the work of its first y tokens at least, in L; or
    it does not, and this is one of its x.

    q finishes first: all its work is in L. In its iterations i yields y times, work in the life of q, but for
    what recomputes (or, where it came before q, prefills) the first token of these; the rest are x of i.

    What is least over y and over who is first is certain.
    """
    rows = blends(need.rows)
    return max(
        float(
            row[0] * need.output.sum()
            + work.sum()
            + _interference(
                need.arrival,
                need.prompt,
                need.output,
                need.durations,
                row,
                need.recompute,
                row[0] / min(need.most, max(1, len(work) - 1)),
                work,
            )
        )
        for row, work in zip(rows, need.works(rows), strict=True)
    )


def _prices(instance: Instance, need: _Need, rounds: int) -> float:
    """See `prices`. c0 is also divided by the scarcest resource."""
    decodes = need.shares - need.first_shares
    k = int(np.argmax(decodes.sum(axis=1)))
    # A decode has at least the blocks that its tokens fill, and there is one more each time.
    least = [
        (need.prompt + 1) * need.growth[0],
        *(need.shares - need.first_shares)[1:] / np.maximum(need.output - 1, 1),
    ]
    shares = np.stack([least[k], np.full(len(instance), need.growth[k])], axis=1)
    finish, ends = _good_run(instance, need)
    return dual_bound(
        need.arrival,
        need.prompt,
        need.output,
        need.rows,
        need.recompute,
        need.alone,
        shares,
        finish,
        ends,
        rounds=rounds,
    )


def _good_run(instance: Instance, need: _Need) -> tuple[Floats, Floats]:
    """When requests and iterations end in the run of a good scheduler, at the best of some token budgets."""
    requests = instance.requests.replace(predicted_tokens=instance.requests.output_tokens)
    best = need.arrival + 2 * need.alone, np.sort(need.arrival + need.alone)
    least = math.inf
    for budget in (instance.token_budget, *(b for b in (128, 256, 512) if b < instance.token_budget)):
        engine = instance.engine.replace(
            token_budget=budget, max_num_seqs=min(budget, instance.engine.max_num_seqs or budget)
        )
        try:
            run = simulate(
                requests, baselines.get("area-backfill"), instance.profile, engine, record="iterations"
            )
        except InputError:  # a prompt that fits only whole, or a cost model out of its range
            continue
        if (total := float((run.finish_s - need.arrival).sum())) < least and run.iterations is not None:
            least, best = total, (run.finish_s, run.iterations["end_s"].astype(np.float64))
    return best
