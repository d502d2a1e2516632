"""The optimum of a tiny instance by trying everything, in plain Python, to be read.

Written from the docstring of `Instance` alone: a state, every iteration that may come next, and the best of
what follows. Good for two or three requests of a few tokens; slo_goodput with "preempt" and "chunk" takes a
minute where the others take a second.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from baselines.optimal import Instance


class Request(NamedTuple):
    """What has become of one request."""

    cached: int = 0  # tokens of KV cache that it holds
    out: int = 0  # tokens of its answer that are out
    decodes: bool = False  # its prefill is complete
    preempted: int = 0  # how often it was
    first: float | None = None  # slo_goodput: when its first token came; inf if that was too late


def optimum(instance: Instance, preemptions: int = 2) -> float:
    """The best objective of all schedules that preempt no request more than `preemptions` times."""
    engine, goal = instance.engine, instance.objective
    n, limit, seats = len(instance), instance.token_budget, engine.max_num_seqs
    arrival = instance.requests.arrival_s.tolist()
    prompt = instance.requests.prompt_tokens.tolist()
    answer = instance.requests.output_tokens.tolist()
    ttft = instance.requests.ttft_target_s.tolist()
    tpot = instance.requests.tpot_target_s.tolist()
    slack = 1 + 1e-9  # targets are met but for rounding
    worst = -math.inf if instance.maximise else math.inf
    seconds = functools.cache(lambda *batch: float(instance.profile.time(*batch)))

    def blocks(tokens: int) -> int:
        return math.ceil(tokens / engine.block_size)

    def choices(i: int, r: Request, clock: float) -> Iterator[tuple[Request, int]]:
        """What may become of request i as the iteration is planned: preempted or not, and tokens given."""
        if r.out == answer[i] or arrival[i] > clock:
            yield r, 0
            return
        ways = [r]
        if r.cached and r.preempted < preemptions and instance.allows("preempt"):
            ways.append(r._replace(cached=0, decodes=False, preempted=r.preempted + 1))
        for way in ways:
            rest = prompt[i] + way.out - way.cached
            if not way.decodes or instance.allows("pause"):
                yield way, 0
            for tokens in range(1, rest) if instance.allows("chunk") else ():
                yield way, tokens
            yield way, rest

    def iterations(state: tuple[Request, ...], clock: float) -> Iterator[tuple[tuple[Request, ...], float]]:
        """Every iteration that may start at `clock`: what it leaves behind, and how long it takes."""
        for plan in itertools.product(*(choices(i, r, clock) for i, r in enumerate(state))):
            if not 1 <= sum(tokens for _, tokens in plan) <= limit:
                continue
            held = [blocks(r.cached + tokens) for r, tokens in plan]
            if sum(held) > engine.kv_blocks or sum(h > 0 for h in held) > seats:
                continue
            chunks = [(r, tokens) for r, tokens in plan if tokens and not r.decodes]
            reads = [r.cached + 1 for r, tokens in plan if tokens and r.decodes]
            took = seconds(
                sum(tokens for _, tokens in chunks),
                len(chunks),
                sum(tokens * (r.cached + tokens / 2) for r, tokens in chunks),
                sum(r.cached for r, _ in chunks),
                len(reads),
                sum(reads),
            )
            yield tuple(after(i, r, tokens, clock + took) for i, (r, tokens) in enumerate(plan)), took

    def after(i: int, r: Request, tokens: int, end: float) -> Request:
        """Request i when the iteration that gave it `tokens` ends."""
        if tokens == 0:
            return r
        if r.cached + tokens < prompt[i] + r.out:
            return r._replace(cached=r.cached + tokens)
        if r.out + 1 == answer[i]:
            return r._replace(cached=0, out=answer[i], decodes=False, first=None)
        first = r.first
        if goal == "slo_goodput" and r.out == 0:
            first = end if end - arrival[i] <= ttft[i] * slack else math.inf
        return r._replace(cached=r.cached + tokens, out=r.out + 1, decodes=True, first=first)

    def price(old: tuple[Request, ...], new: tuple[Request, ...], start: float, end: float) -> float:
        """What the objective changes by from `start` to `end`, which is an iteration unless old is new."""
        if goal == "gpu_time":
            return end - start if old is not new else 0.0
        if goal == "makespan":
            return end - start
        here = [max(0.0, end - max(start, a)) for a in arrival]
        if goal == "total_latency":
            return sum(s for s, r, o in zip(here, old, answer, strict=True) if r.out < o)
        if goal == "mean_ttft":
            return sum(s for s, r in zip(here, old, strict=True) if r.out == 0) / n
        met = 0
        for i in range(n):
            if old[i].out < new[i].out == answer[i]:
                first = end if answer[i] == 1 else old[i].first
                left = tpot[i] * (answer[i] - 1) if answer[i] > 1 else 0.0
                met += first - arrival[i] <= ttft[i] * slack and end - first <= left * slack
        return met

    def open_targets(state: tuple[Request, ...]) -> int:
        """Requests that may still meet their targets."""
        return sum(r.out < o and r.first != math.inf for r, o in zip(state, answer, strict=True))

    @functools.cache
    def best(state: tuple[Request, ...], clock: float | None) -> float:
        """The best that can come from here on. The clock is None when it no longer matters."""
        if all(r.out == o for r, o in zip(state, answer, strict=True)):
            return 0.0
        start = arrival[-1] if clock is None else clock
        found: list[float] = []
        most = open_targets(state) if instance.maximise else -math.inf
        for new, took in iterations(state, start):
            if most in found:  # it cannot be better
                break
            found.append(price(state, new, start, start + took) + then(new, start + took))
        coming = [a for a in arrival if a > start]
        somebody = any(a <= start and r.out < o for a, r, o in zip(arrival, state, answer, strict=True))
        if coming and (instance.allows("idle") or not somebody):  # to wait for less than that gains nothing
            found.append(price(state, state, start, min(coming)) + then(state, min(coming)))
        return (max if instance.maximise else min)(found, default=worst)

    def then(state: tuple[Request, ...], clock: float) -> float:
        timeless = clock >= arrival[-1] and (goal != "slo_goodput" or open_targets(state) == 0)
        return best(state, None if timeless else clock)

    none = (Request(),) * n
    return then(none, 0.0)
