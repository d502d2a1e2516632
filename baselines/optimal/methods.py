"""`solve`: one door to all methods, and the choice between them."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any

from baselines.optimal.instance import Instance, mixed
from baselines.optimal.solution import Solution
from llmsched_env.errors import InputError, unknown

Progress = Callable[[dict[str, Any]], None]
METHODS: dict[str, str] = {
    "auto": "astar where requests are few, cpsat for gpu_time, search for what they leave and for the rest",
    "astar": "exact search over the engine's states; proves about ten requests optimal",
    "cpsat": "OR-Tools CP-SAT; proves about ten requests optimal, more for gpu_time",
    "search": "the best schedule found in the time, of any number of requests, and a bound",
}
# Of more requests, or of longer prompts where they may be cut anywhere, exact search proves next to nothing.
_FEW, _SHORT = 16, 32
_EXACT_SHARE = 0.75  # of the time, for exact search where it does not suffice


def solve(
    instance: Instance,
    method: str = "auto",
    *,
    time_limit_s: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Solution:
    """The best schedule that a method finds, a bound, and whether they meet.

    Interrupted (Ctrl-C), it gives the best so far.

    Args:
        method: of `METHODS`.
        time_limit_s: wall seconds, about; without those of compiling, at the first call of a version.
        seed: of what is drawn by lot.
        progress: called a few times a second with what there is to tell: method, seconds, objective, bound.

    Raises:
        InputError: an unknown method, one that cannot do this instance, or a time limit that is none.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    number = isinstance(time_limit_s, int | float) and not isinstance(time_limit_s, bool)
    if not (number and time_limit_s > 0):
        raise InputError(f"time_limit_s must be positive seconds, not {time_limit_s!r}")
    _compile(method == "astar" or (method == "auto" and _is_small(instance)))
    if method != "auto":
        return _Run(instance, seed, progress).stage(method, time_limit_s)
    return _auto(instance, time_limit_s, _Run(instance, seed, progress))


@cache
def _compile(exact: bool) -> None:
    """What the methods run: up to a minute at the first time, a second from the cache."""
    from baselines.optimal.improve import warm_up
    from baselines.optimal.search import search

    warm_up()
    if exact:
        search(mixed(2, 0))


def _auto(instance: Instance, time_limit_s: float, run: _Run) -> Solution:
    from baselines.optimal.improve import incumbent

    began = time.perf_counter()
    best = incumbent(instance)
    stages: list[tuple[str, float]] = [("search", 1.0)]
    if instance.objective == "gpu_time" and importlib.util.find_spec("ortools"):
        stages.insert(0, ("cpsat", _EXACT_SHARE))
    elif _is_small(instance):
        stages.insert(0, ("astar", _EXACT_SHARE))
    for method, share in stages:
        left = share * time_limit_s - (time.perf_counter() - began)
        if best.status in ("optimal", "interrupted") or left <= 0:
            break
        try:
            best = _merged(best, run.stage(method, left, best))
        except InputError:  # an exact method may not know the objective, or so many requests
            if method == "search":
                raise
        except KeyboardInterrupt:
            best = dataclasses.replace(best, status="interrupted")
    return dataclasses.replace(best, seconds=time.perf_counter() - began)


def _is_small(instance: Instance) -> bool:
    cuts = instance.allows("chunk") and instance.requests.prompt_tokens.max() > _SHORT
    return len(instance) <= _FEW and not cuts


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all stages have in common."""

    instance: Instance
    seed: int
    progress: Progress | None

    def stage(self, method: str, time_limit_s: float, start: Solution | None = None) -> Solution:
        """One method, for so long."""

        def tell(figures: dict[str, Any]) -> None:
            if self.progress is not None:
                self.progress({"method": method, **figures})

        common: dict[str, Any] = {"time_limit_s": time_limit_s, "progress": tell}
        if method == "astar":
            from baselines.optimal.search import search

            return search(self.instance, start=start, **common)
        if method == "cpsat":
            from baselines.optimal.cpsat import solve as cpsat

            known: dict[str, Any] = {}
            if start is not None:
                known = {"hint": start.schedule, "bound": start.bound}
            return cpsat(self.instance, seed=self.seed, **known, **common)
        from baselines.optimal.improve import improve

        return improve(self.instance, seed=self.seed, start=start, **common)


def _merged(a: Solution, b: Solution) -> Solution:
    """The better schedule and the better bound of two solutions of one instance; the status of the second."""
    sign = -1.0 if a.instance.maximise else 1.0

    def cost(s: Solution) -> float:
        return math.inf if s.schedule is None else sign * s.objective

    best = a if cost(a) <= cost(b) else b
    bounds = [sign * s.bound for s in (a, b) if not math.isnan(s.bound)]
    bound = sign * max(bounds) if bounds else -sign * math.inf
    exact = b if b.status == "optimal" else best
    return Solution.of(
        a.instance, best.schedule, bound, exact.method, a.seconds + b.seconds, b.status, **exact.details
    )
