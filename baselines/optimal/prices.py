"""A lower bound on total latency from prices of time: the Lagrangian dual of serving many requests at once.

Time is cut into buckets. A second of bucket k costs mu[r, k] for each minorant r of the cost model, and an
iteration in it costs request i, if it yields a token of i, nu[i, k], and kappa[k] a share of the KV cache (or
of the slots, or of the token budget) that is in use. Requests pay for the work that they bring. If the prices
of an iteration add up to no more than its fixed cost,

    sum_i nu[i, k] + kappa[k] <= sum_r c0[r] * mu[r, k]                                         (1)

then all that is paid for an iteration from s to e is at most the integral of sum_r mu[r] over [s, e]: the
iteration takes at least c0[r] + W[r] seconds for every r, of which the work pays W[r], and (1) covers what
its requests pay besides. Prices within an iteration are averages over it. So for every schedule

    sum_i F_i >= sum_i min over i's own courses of (F_i + what i pays) - integral of sum_r mu[r].

A course says when each token of one request is made; alone it is limited only by its arrival and its pace,
as token j takes at least d_j = max_r (c0[r] + w[r, j]) seconds. Its minimum is found by dynamic programming:

* The decodes are cut into units that take a bucket or longer each at this pace, so that at most one unit's
  worth of tokens falls into a bucket. Choose a number z in [0, 1) at random and look in each unit at the
  token that is at share 1 - z of it: the buckets of these tokens strictly increase, and on average over z
  they pay what all tokens pay. So a course costs at least as much as the cheapest choice of increasing
  buckets, one for each unit, where a unit pays for its number of tokens at its longest d_j and its least w_j
  (these grow with j). The last token comes z * (length of the last unit) after the one looked at, which
  makes half a unit on average.
* In the first bucket, of which a share phi is left at arrival, at most phi units are served: at least
  1 - phi of the choices of z have no unit in it.
* The prefill has work but yields nothing until it ends, in units of its own. What takes less than a bucket
  (a short prefill, a short answer) is one unit that may share its bucket.
* Preempted, a request makes its next token from a prefill of everything so far, whose last token is computed
  when that token comes out, and the rest in any bucket since the token before.

The dual is concave. The prices start from the run of a good scheduler: a request whose iterations cost
(E - t) / O at time t is indifferent to when it is served until E, and in a steady state the best E is when as
many iterations have passed as it needs. From there they follow the supergradient with momentum: an iteration
becomes dearer to a request that has more tokens in a bucket than there is time for iterations in it.

How tight it is: the relaxation lets a request be split into parts that run at full pace one after the other,
where a whole one would run slowly from beginning to end. For equal requests in steady state, of which S is
the time alone and F the time shared, the best prices give (F + S) / 2.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.compile import njit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_STEP, _AIM, _MOMENTUM = 3.0, 0.2, 0.95  # of the ascent


class Courses(NamedTuple):
    """The requests, cut into units. Arrays of N requests, of all their units (request after request), and of
    all buckets of their windows, in which they have prices of their own.

    Attributes:
        bucket: seconds of a bucket.
        arrival: seconds.
        alone: least seconds from arrival to finish.
        first_unit: (N + 1) where a request's units begin.
        prefills: units of the prefill.
        prefill_s, decode_s: length of a unit of the prefill, and of the decodes (0: there are none).
        tokens: of a unit.
        work: (units, R) seconds, by each row. last_work, earlier_work: of a recomputation instead, with its
            last token, and before.
        share: of the shared resource, all tokens of the unit together.
        window: (N + 1) where a request's window begins.
    """

    bucket: float
    arrival: Floats
    alone: Floats
    first_unit: Ints
    prefills: Ints
    prefill_s: Floats
    decode_s: Floats
    tokens: Floats
    work: Floats
    last_work: Floats
    earlier_work: Floats
    share: Floats
    window: Ints


@njit
def _cut(
    arrival: Floats,
    prompt: Ints,
    output: Ints,
    shares: Floats,
    rows: Floats,
    alone: Floats,
    bucket: float,
    window: Ints,
) -> Courses:
    """Cut the requests into units for buckets of so many seconds.

    shares: (N, 2) of the shared resource: the least that a token after the first takes, and the growth of it
        with each token (0 is always right).
    """
    n, R = len(arrival), len(rows)
    first_unit = np.zeros(n + 1, np.int64)
    prefills, prefill_s, decode_s = np.zeros(n, np.int64), np.zeros(n), np.zeros(n)
    pace = np.zeros(n, np.int64)  # the row that says how long a prefill takes
    for i in range(n):
        length = float(prompt[i])
        for r in range(R):
            took = rows[r, 0] + rows[r, 1] * length + rows[r, 4] * length * length / 2
            if took > prefill_s[i]:
                prefill_s[i], pace[i] = took, r
        prefills[i] = max(1, int(prefill_s[i] / bucket))
        prefill_s[i] /= prefills[i]
        total = 0.0
        for j in range(1, output[i]):
            total += _decode_s(rows, length + j)
        units = 0
        if output[i] > 1:
            units = max(1, int(total / max(bucket, _decode_s(rows, length + output[i] - 1))))
            decode_s[i] = total / units
        first_unit[i + 1] = first_unit[i] + prefills[i] + units
    count = first_unit[n]
    tokens, share = np.zeros(count), np.zeros(count)
    work, last_work, earlier_work = np.zeros((count, R)), np.zeros((count, R)), np.zeros((count, R))
    for i in range(n):
        length, u = float(prompt[i]), first_unit[i]
        by = rows[pace[i]]
        pace_work = by[1] * length + by[4] * length * length / 2
        for _ in range(prefills[i]):
            for r in range(R):
                # Of the work of row `by`, at least so many seconds of row r at any place of the prompt.
                if pace_work > 0:
                    start = rows[r, 1] / by[1] if by[1] > 0 else np.inf
                    end = (rows[r, 1] + rows[r, 4] * length) / (by[1] + by[4] * length)
                    if by[1] == 0 and rows[r, 1] == 0:
                        start = end
                    work[u, r] = min(start, end) * pace_work / prefills[i]
                else:
                    work[u, r] = rows[r, 1] * length / prefills[i]
            u += 1
        j, done = 1, 0.0  # the token that the unit begins in, and seconds of it in earlier units
        while u < first_unit[i + 1]:
            last = u + 1 == first_unit[i + 1]
            begin, room = j, decode_s[i]
            while not last:
                left = _decode_s(rows, length + j) - done
                if left > room:
                    done += room
                    break
                room -= left
                done = 0.0
                j += 1
            longest = _decode_s(rows, length + (output[i] - 1 if last else min(j, output[i] - 1)))
            tokens[u] = decode_s[i] / longest
            share[u] = tokens[u] * (shares[i, 0] + shares[i, 1] * (begin - 1))
            L = length + begin
            before = max(0.0, np.floor(L / 2) - 1)  # tokens of the later half but the last
            for r in range(R):
                work[u, r] = tokens[u] * (rows[r, 2] + rows[r, 3] * L)
                last_work[u, r] = tokens[u] * (rows[r, 1] + rows[r, 4] * (L - 0.5))
                earlier_work[u, r] = tokens[u] * before * (rows[r, 1] + rows[r, 4] * L / 2)
            u += 1
    return Courses(
        bucket,
        arrival,
        alone,
        first_unit,
        prefills,
        prefill_s,
        decode_s,
        tokens,
        work,
        last_work,
        earlier_work,
        share,
        window,
    )


@njit(inline="always")
def _decode_s(rows, L):  # type: ignore[no-untyped-def]
    """Least seconds of an iteration that makes a token from L others: decoded or, at the least, prefilled."""
    seconds = 0.0
    for r in range(len(rows)):
        work = min(rows[r, 2] + rows[r, 3] * L, rows[r, 1] + rows[r, 4] * (L - 0.5))
        seconds = max(seconds, rows[r, 0] + work)
    return seconds


@njit
def _dual(
    c: Courses,
    recompute: bool,
    time: Floats,
    iteration: Floats,
    shared: Floats,
    used_tokens: Floats,
    used_work: Floats,
    used_share: Floats,
) -> float:
    """The value of the dual at these prices, and what the cheapest courses use, which is its supergradient.

    Args:
        time: (R, H) prices mu of seconds; nothing costs anything after the last bucket.
        iteration: of all windows, nu. shared: (H), kappa.
        used_tokens, used_work, used_share: outputs like iteration, time, shared.
    """
    n, R, H = len(c.arrival), time.shape[0], time.shape[1]
    used_tokens[:] = 0.0
    used_work[:] = 0.0
    used_share[:] = 0.0
    most = 0
    for i in range(n):
        most = max(most, c.first_unit[i + 1] - c.first_unit[i])
    # The least paid with so many units done, and with the next one begun besides, if units that fill a bucket
    # may be served in the first bucket (0), or only after it (1).
    done, begun = np.empty((2, most + 1)), np.empty((2, most + 1))
    here, last, before = np.empty(most), np.empty(most), np.empty(most)
    how = np.zeros(
        (H + most + 2, 2, most), np.int8
    )  # a unit is served in a bucket: 1, begun earlier: 2, not: 0
    begins = np.zeros((H + most + 2, 2, most), np.bool_)
    path, begin = np.empty(most, np.int64), np.empty(most, np.int64)
    best, end = np.empty(2), np.empty(2, np.int64)
    paid, gained = c.bucket * time.sum(), 0.0
    for i in range(n):
        u0, P = c.first_unit[i], c.prefills[i]
        units = c.first_unit[i + 1] - u0
        lone_prefill = c.prefill_s[i] < c.bucket
        lone_decode = units > P and c.decode_s[i] < c.bucket
        lag = 0.5 * (c.decode_s[i] if units > P else c.prefill_s[i]) - c.arrival[i]
        k0 = int(c.arrival[i] / c.bucket)
        seen = c.window[i + 1] - c.window[i]
        done[:] = np.inf
        begun[:] = np.inf
        done[:, 0] = 0.0
        best[:] = np.inf
        for k in range(max(H - k0, 0) + units + 2):
            at = k0 + k
            if at * c.bucket + lag >= best[1]:
                break
            nu = iteration[c.window[i] + k] if k < seen else 0.0
            kappa = shared[at] if at < H else 0.0
            how[k] = 0
            reached = min(units, k + 2)
            for u in range(reached):
                tokens = c.tokens[u0 + u] * nu + c.share[u0 + u] * kappa
                whole = 0.0
                if at < H:
                    for r in range(R):
                        whole += c.work[u0 + u, r] * time[r, at]
                if recompute and u >= P:
                    last[u], before[u] = 0.0, 0.0
                    if at < H:
                        for r in range(R):
                            last[u] += c.last_work[u0 + u, r] * time[r, at]
                            before[u] += c.earlier_work[u0 + u, r] * time[r, at]
                    whole = min(whole, last[u] + before[u])
                    last[u] += tokens
                here[u] = whole + tokens
            for late in range(2):
                paying, waiting = done[late], begun[late]
                # The last unit first, so that a bucket serves one; what does not fill a bucket may share it.
                if lone_prefill and here[0] < paying[1]:
                    paying[1] = here[0]
                    how[k, late, 0] = 1
                for turn in range(reached + 1):
                    u = reached - 1 - turn if turn < reached else P
                    lone = (u == 0 and lone_prefill) or (u == units - 1 and lone_decode)
                    if lone != (turn == reached) or (k < late and not lone) or u >= reached:
                        continue
                    if u == 0 and lone_prefill:
                        continue
                    if paying[u] + here[u] < paying[u + 1]:
                        paying[u + 1] = paying[u] + here[u]
                        how[k, late, u] = 1
                    if recompute and u >= P and waiting[u] + last[u] < paying[u + 1]:
                        paying[u + 1] = waiting[u] + last[u]
                        how[k, late, u] = 2
                if recompute:
                    for u in range(P, reached):
                        begins[k, late, u] = paying[u] + before[u] < waiting[u]
                        waiting[u] = min(waiting[u], paying[u] + before[u])
                if how[k, late, units - 1] > 0 and paying[units] + at * c.bucket + lag < best[late]:
                    best[late], end[late] = paying[units] + at * c.bucket + lag, k
        left = min(1.0, max(0.0, k0 + 1 - c.arrival[i] / c.bucket))  # of the first bucket
        least = left * min(best[0], best[1]) + (1.0 - left) * best[1]
        for late in range(2):
            part = 1.0 - left if late else left
            k = end[late]
            for turn in range(units):
                u = units - 1 - turn
                while how[k, late, u] == 0:
                    k -= 1
                path[u] = begin[u] = k
                if how[k, late, u] == 2:
                    k -= 1
                    while not begins[k, late, u]:
                        k -= 1
                    begin[u] = k
                elif not ((u == 1 and lone_prefill) or (u == units - 1 and lone_decode)):
                    k -= 1
            for u in range(units):
                k, at = path[u], k0 + path[u]
                if k < seen:
                    used_tokens[c.window[i] + k] += part * c.tokens[u0 + u]
                if at < H:
                    used_share[at] += part * c.share[u0 + u]
                    for r in range(R):
                        if how[k, late, u] == 1:
                            used_work[r, at] += part * c.work[u0 + u, r]
                        else:
                            used_work[r, at] += part * c.last_work[u0 + u, r]
                            used_work[r, k0 + begin[u]] += part * c.earlier_work[u0 + u, r]
        gained += max(least, c.alone[i])
    return gained - paid - 1e-11 * (gained + paid)


def dual_bound(
    arrival: Floats,
    prompt: Ints,
    output: Ints,
    rows: Floats,
    recompute: bool,
    alone: Floats,
    shares: Floats,
    finish: Floats,
    ends: Floats,
    *,
    rounds: int = 60,
    buckets: int = 20,
) -> float:
    """The best value of the dual that so many rounds of ascent find: a lower bound on total latency, seconds.

    Args:
        arrival, prompt, output: of the requests.
        rows: minorants of the cost model (R, 5).
        recompute: whether requests may be preempted.
        alone: least seconds from arrival to finish.
        shares: (N, 2), see `_cut`.
        finish, ends: when the requests, and the iterations, of some schedule end. The better the schedule,
            the better the bound; it holds whatever they are.
        rounds: passes over all requests.
        buckets: in the mean time from arrival to finish.
    """
    rows = np.ascontiguousarray(rows[rows[:, 0] > 1e-6 * rows[:, 0].max()])
    if len(rows) == 0:
        return float(alone.sum())
    stay = np.maximum(finish - arrival, alone)
    bucket = float(stay.mean()) / buckets
    first = (arrival / bucket).astype(np.int64)
    H = int(float((arrival + stay).max()) * 1.1 / bucket) + 2
    lengths = np.minimum((1.3 * stay / bucket).astype(np.int64) + 2, H)
    window = np.concatenate([[0], np.cumsum(lengths)])
    c = _cut(arrival, prompt, output, shares, rows, alone, bucket, window)

    owner = np.repeat(np.arange(len(arrival)), lengths)
    at = np.minimum(first[owner] + np.arange(window[-1]) - window[owner], H - 1)
    served = np.searchsorted(ends, arrival, "right") + output - 1
    until = np.minimum(ends[np.minimum(served, len(ends) - 1)], finish)
    nu: Floats = np.maximum(until[owner] - (at + 0.5) * bucket, 0.0) / output[owner]
    nu *= np.clip((at + 1) - arrival[owner] / bucket, 0.0, 1.0)
    kappa: Floats = np.zeros(H)
    # How much of the seconds' price each row has in a bucket, as a logarithm: all as much, or one the most.
    favours = [np.zeros((len(rows), H)), *(np.tile(4.0 * one, (H, 1)).T for one in np.eye(len(rows)))]
    c0 = rows[:, :1]
    used = np.zeros(len(nu)), np.zeros((len(rows), H)), np.zeros(H)

    def value(nu: Floats, kappa: Floats, favour: Floats) -> tuple[float, Floats]:
        """Of the dual, and the seconds' share of each row."""
        weights = np.exp(favour - favour.max(axis=0))
        weights /= (weights * c0).sum(axis=0)
        mu = weights * (np.bincount(at, nu, H) + kappa)
        return _dual(c, recompute, mu, nu, kappa, *used), weights

    # Start from a share of these prices, or from one machine's, on which a second at time t delays all that
    # are there, or all that finish later; by the row that serves best.
    later = len(finish) - np.searchsorted(np.sort(finish), np.arange(H) * bucket)
    there = later - (len(finish) - np.searchsorted(arrival, (np.arange(H) + 1) * bucket))
    starts: list[tuple[Floats, Floats]] = [(share * nu, kappa) for share in (0.1, 0.3, 0.6, 1.0)]
    for count, share in itertools.product((there, later), (0.5, 1.5)):
        starts.append((np.zeros_like(nu), (share * float(c0.min()) * count).astype(np.float64)))
    rated = {
        value(nu, kappa, favour)[0]: (nu, kappa, favour)
        for (nu, kappa), favour in itertools.product(starts, favours)
    }
    best = max(rated)
    prices = rated[best]
    best = max(best, float(alone.sum()))
    share = float((shares[:, 0] * output).mean())
    per_token, per_share = (stay / output)[owner], float(stay.mean()) / share if share > 0 else 0.0
    usual = bucket / float(c0.max())
    speeds = [np.zeros_like(x) for x in prices]
    for _ in range(rounds):
        found, weights = value(*prices)
        best = max(best, found)
        free = (bucket - used[1]) / c0  # iterations that each row leaves time for
        spare = (weights * c0 * free).sum(axis=0)
        slopes = ((used[0] - spare[at]), (used[2] - spare), np.clip(spare - free, -usual, usual))
        # Polyak's step, for a value a little above the best so far, on the way to that of the schedule.
        square = float((per_token * slopes[0] ** 2).sum() + per_share * (slopes[1] ** 2).sum())
        step = _STEP * (best + _AIM * (float(stay.sum()) - best) - found) / max(square, 1e-300)
        moves = (per_token * slopes[0], per_share * slopes[1], 10.0 * slopes[2])
        for speed, move in zip(speeds, moves, strict=True):
            speed *= _MOMENTUM
            speed += (1 - _MOMENTUM) * step * move
        nu, kappa, favour = (x + speed for x, speed in zip(prices, speeds, strict=True))
        prices = np.maximum(nu, 0.0), np.maximum(kappa, 0.0), favour
    return best
