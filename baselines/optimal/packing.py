"""Two problems that need no clock, only batches 0, 1, 2, ...: requests that are never cut, paused or
preempted are bars that begin in some batch and go on for as many batches as they have tokens in their
answers.

    batches  the last bar ends as early as possible
    rounds   the sum over the bars of their ends, the hindsight optimum of MC-SF (Jaillet et al., arXiv
             2502.07115), is as small as possible

A bar holds the KV blocks of I + r tokens in its batch r = 0, 1, ..., O - 1, takes I tokens of the budget in
its first batch and one in every other, and one of the running requests. Orders of the bars, each put where
it first fits, are improved by late acceptance hill climbing (Burke, Bykov, EJOR 258, 2017): it finds good
packings, CP-SAT on one Boolean for each bar and beginning proves them.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from baselines.optimal.runner import Answer, Runner
from baselines.optimal.ticks import Ticks
from llmsched_env.core.compile import njit

_HISTORY = 500  # steps after which a worse order may be accepted
_STEPS = 20_000  # between two looks at the clock
_FIRST = 0.25  # of the time left, for the first proof; then packings are looked for again
_LP_MS = 30_000
_ROUNDING = 1e-6  # of sums of some thousand terms, generously
_PATIENCE = 12  # so many times `_STEPS` without a better packing end the climb


class Bars(NamedTuple):
    """What is packed, and in what.

    Attributes:
        prompt, output: (N,) int64.
        held: (N, max O) int64, KV blocks in each batch of a bar.
        blocks, budget, seqs: of a batch.
    """

    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    held: NDArray[np.int64]
    blocks: int
    budget: int
    seqs: int

    @staticmethod
    def of(ticks: Ticks) -> Bars:
        """The bars of an instance."""
        engine = ticks.instance.engine
        assert engine.kv_blocks and engine.token_budget and engine.max_num_seqs
        prompt, output = np.array(ticks.prompt, np.int64), np.array(ticks.output, np.int64)
        tokens = prompt[:, None] + np.arange(output.max())
        held = np.where(np.arange(output.max()) < output[:, None], -(-tokens // engine.block_size), 0)
        return Bars(prompt, output, held, engine.kv_blocks, engine.token_budget, engine.max_num_seqs)


def fewest_batches(
    bars: Bars, runner: Runner, starts: NDArray[np.int64], low: int, enough: int = 0
) -> tuple[NDArray[np.int64], int]:
    """A packing whose last end is as early as possible, and a bound on it.

    Args:
        starts: a packing to begin with: the batches in which bars begin.
        low: a bound that is known.
        enough: stop when this many batches do, or are shown to be too few.
    """
    best = starts
    share, attempt = _FIRST, 0
    while True:
        best = _climb(bars, runner, False, best, max(low, enough), attempt)
        batches = _last_end(bars, best)
        if batches <= max(low, enough) or low > enough > 0 or runner.over:
            return best, low
        # One batch less, and so on: the last of these has no solution, and that is the proof.
        model, begins = _model(bars, runner, [range(batches - n) for n in bars.output.tolist()])
        answer = runner.run(model, share=share)
        share, attempt = min(1.0, 2 * share), attempt + 1
        if answer.value is not None:
            best = _read(answer, begins)
        elif answer.proved:
            low = batches


def least_rounds(
    bars: Bars, runner: Runner, starts: NDArray[np.int64], low: int, enough: int = 0
) -> tuple[NDArray[np.int64], int]:
    """A packing with the least sum of ends, and a bound on it; arguments as in `fewest_batches`."""
    best = _climb(bars, runner, True, starts, max(low, enough), 0)
    total = _sum_of_ends(bars, best)
    if total <= max(low, enough) or runner.over:
        return best, low
    bound, may_begin = _dual_bound(bars, _last_end(bars, best), total)
    low = max(low, bound)
    if total <= low or low > enough > 0:
        return best, low
    model, begins = _model(bars, runner, may_begin, best)
    ends = sum((s + int(n)) * x for n, row in zip(bars.output, begins, strict=True) for s, x in row.items())
    model.add(ends >= low)
    model.add(ends <= total)
    model.minimize(ends)
    answer = runner.run(model, enough)
    if answer.value is not None:
        best = _read(answer, begins)
    return best, max(low, answer.bound)


def _last_end(bars: Bars, starts: NDArray[np.int64]) -> int:
    return int((starts + bars.output).max())


def _sum_of_ends(bars: Bars, starts: NDArray[np.int64]) -> int:
    return int((starts + bars.output).sum())


# ---------------------------------------------------------------------- CP-SAT


def _model(
    bars: Bars, runner: Runner, may_begin: Sequence[Sequence[int]], hint: NDArray[np.int64] | None = None
) -> tuple[Any, list[dict[int, Any]]]:
    """The model of packings in which bar i begins in one of the batches may_begin[i], and its Booleans: bar i
    begins in batch s."""
    model = runner.cp_model.CpModel()
    begins = []
    horizon = max(max(batches, default=0) for batches in may_begin) + int(bars.output.max())
    loads: list[list[list[Any]]] = [[[] for _ in range(horizon)] for _ in range(3)]
    for i, (n, prompt) in enumerate(zip(bars.output.tolist(), bars.prompt.tolist(), strict=True)):
        row = {s: model.new_bool_var(f"x{i},{s}") for s in may_begin[i]}
        model.add_exactly_one(row.values())
        for s, x in row.items():
            if hint is not None:
                model.add_hint(x, s == hint[i])
            for r in range(n):
                loads[0][s + r].append(int(bars.held[i, r]) * x)
                loads[1][s + r].append((prompt if r == 0 else 1) * x)
                loads[2][s + r].append(x)
        begins.append(row)
    for resource, most in zip(loads, (bars.blocks, bars.budget, bars.seqs), strict=True):
        if resource is loads[2] and most >= len(begins):
            continue
        for terms in resource:
            if terms:
                model.add(sum(terms) <= most)
    _order_equals(bars, model, begins, hint)
    return model, begins


def _order_equals(
    bars: Bars, model: Any, begins: list[dict[int, Any]], hint: NDArray[np.int64] | None
) -> None:
    """Of equal bars, the one that is first in the hint begins first."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, shape in enumerate(zip(bars.prompt.tolist(), bars.output.tolist(), strict=True)):
        groups.setdefault(shape, []).append(i)
    for group in groups.values():
        if hint is not None:
            group.sort(key=lambda i: int(hint[i]))
        for a, b in itertools.pairwise(group):
            first, second = (sum(s * x for s, x in begins[i].items()) for i in (a, b))
            model.add(first <= second)


def _read(answer: Answer, begins: list[dict[int, Any]]) -> NDArray[np.int64]:
    return np.array([next(s for s, x in row.items() if answer.of(x)) for row in begins], np.int64)


def _dual_bound(bars: Bars, horizon: int, total: int) -> tuple[int, list[list[int]]]:
    """A bound on the sum of ends, and the batches in which each bar may begin if the sum is at most `total`.

    Prices for a block and a token in each batch, none from `horizon` on, make the bars independent: the sum
    of ends is at least what each bar pays at its cheapest (its end, and for what it uses), less the price of
    everything there is. That holds for any prices, and for any horizon of the packings; the best prices are
    the dual values of the linear program. A bar that begins where it pays more than its cheapest and the rest
    of the way to `total` is in no such packing.
    """
    prices = _prices(bars, horizon)
    most = horizon + total  # nobody ends later
    padded = np.zeros((2, most + bars.held.shape[1] + 1))
    padded[:, :horizon] = prices
    pays = []
    for n, prompt, held in zip(bars.output.tolist(), bars.prompt.tolist(), bars.held, strict=True):
        s = np.arange(most)
        cost = (s + n).astype(np.float64) + (prompt - 1) * padded[1, s]
        for r in range(n):
            cost += held[r] * padded[0, s + r] + padded[1, s + r]
        pays.append(cost)
    everything = float(prices[0].sum()) * bars.blocks + float(prices[1].sum()) * bars.budget
    bound = math.fsum(float(cost.min()) for cost in pays) - everything
    room = total - bound + _ROUNDING
    return math.ceil(bound - _ROUNDING), [np.flatnonzero(c <= c.min() + room).tolist() for c in pays]


def _prices(bars: Bars, horizon: int) -> NDArray[np.float64]:
    """(2, horizon): dual values of blocks and tokens in the linear relaxation of `_model`."""
    from ortools.linear_solver import pywraplp

    solver = pywraplp.Solver.CreateSolver("GLOP")
    rows = [[solver.Constraint(0, most) for _ in range(horizon)] for most in (bars.blocks, bars.budget)]
    objective = solver.Objective()
    for n, prompt, held in zip(bars.output.tolist(), bars.prompt.tolist(), bars.held.tolist(), strict=True):
        once = solver.Constraint(1, 1)
        for s in range(horizon - n + 1):
            x = solver.NumVar(0, solver.infinity(), "")
            once.SetCoefficient(x, 1)
            objective.SetCoefficient(x, s + n)
            for r in range(n):
                rows[0][s + r].SetCoefficient(x, held[r])
                rows[1][s + r].SetCoefficient(x, prompt if r == 0 else 1)
    objective.SetMinimization()
    solver.SetTimeLimit(_LP_MS)
    if solver.Solve() != solver.OPTIMAL:
        return np.zeros((2, horizon))
    return np.array([[max(0.0, -row.dual_value()) for row in resource] for resource in rows])


# ---------------------------------------------------------------------- packings


def _climb(
    bars: Bars, runner: Runner, rounds: bool, starts: NDArray[np.int64], low: int, attempt: int
) -> NDArray[np.int64]:
    """The best packing that late acceptance finds, from the best of some orders and of `starts`.

    Its steps are counted, so that it takes the same way every time, unless half of the time is up.
    """
    n = len(starts)
    area = bars.held.sum(1)
    load = np.zeros((3, int(bars.output.sum() + bars.output.max())), np.int64)
    work = np.empty(n, np.int64)
    keys = (starts, area, -area, bars.output, -bars.output, -bars.prompt)
    orders = [np.argsort(key, kind="stable") for key in keys]
    values = [_place(bars, order, load, work, rounds) for order in orders]
    k = int(np.argmin(values))
    order, best = orders[k], orders[k].copy()
    state = np.array([values[k], values[k], 0], np.int64)
    history = np.full(_HISTORY, values[k], np.int64)

    def bound() -> int:
        return low if rounds else (low * 4 + 4) * bars.blocks - 1

    waited, until = 0, time.perf_counter() + 0.5 * runner.seconds_left
    while n > 1 and waited < _PATIENCE and state[1] > bound() and time.perf_counter() < until:
        before = state[1]
        seed = (runner.seed * 1009 + attempt) * 1_000_003 + int(state[2])
        _steps(bars, order, best, state, history, load, work, rounds, _STEPS, seed % 2**32)
        waited = 0 if state[1] < before else waited + 1
    _place(bars, best, load, work, rounds)
    measure = _sum_of_ends if rounds else _last_end
    return work if measure(bars, work) <= measure(bars, starts) else starts


@njit
def _place(bars, order, load, starts, rounds: bool) -> int:  # type: ignore[no-untyped-def]
    """Put the bars one by one where they first fit; returns what is to be minimised.

    Args:
        load: (3, T) int64: blocks, tokens and requests in each batch; overwritten.
        starts: (N,) int64, the result.
    """
    load[:] = 0
    last, total = 0, 0
    for i in order:
        n, prompt = bars.output[i], bars.prompt[i]
        s = 0
        while True:
            skip = 0
            # From the end, so that a batch that is too full is passed at once.
            for r in range(n - 1, -1, -1):
                t = s + r
                tokens = prompt if r == 0 else 1
                if (
                    load[0, t] + bars.held[i, r] > bars.blocks
                    or load[1, t] + tokens > bars.budget
                    or load[2, t] + 1 > bars.seqs
                ):
                    skip = 1
                    break
            if skip == 0:
                break
            s += skip
        starts[i] = s
        for r in range(n):
            load[0, s + r] += bars.held[i, r]
            load[1, s + r] += prompt if r == 0 else 1
            load[2, s + r] += 1
        last = max(last, s + n)
        total += s + n
    if rounds:
        return total
    # Between packings with the same end, the one that has less to move out of the last batches.
    tail = 2 * load[0, last - 1] + (load[0, last - 2] if last > 1 else 0)
    return last * 4 * bars.blocks + tail


@njit
def _steps(  # type: ignore[no-untyped-def]
    bars, order, best_order, state, history, load, starts, rounds: bool, n: int, seed: int
) -> None:
    """n steps of late acceptance; state: present value, best value, steps so far."""
    np.random.seed(seed)  # noqa: NPY002 (numba's own generator)
    N = len(order)
    for _ in range(n):
        a, b = np.random.randint(N), np.random.randint(N)  # noqa: NPY002
        if a == b:
            continue
        swap = np.random.randint(2) == 0  # noqa: NPY002
        if swap:
            order[a], order[b] = order[b], order[a]
        else:
            _move(order, a, b)
        value = _place(bars, order, load, starts, rounds)
        at = state[2] % len(history)
        state[2] += 1
        if value <= state[0] or value <= history[at]:
            state[0] = value
            if value < state[1]:
                state[1] = value
                best_order[:] = order
        elif swap:
            order[a], order[b] = order[b], order[a]
        else:
            _move(order, b, a)
        history[at] = state[0]


@njit
def _move(order, a: int, b: int) -> None:  # type: ignore[no-untyped-def]
    x = order[a]
    while a < b:
        order[a] = order[a + 1]
        a += 1
    while a > b:
        order[a] = order[a - 1]
        a -= 1
    order[b] = x
