"""The tuned rule, the rival of learned policies: a priority rule whose numbers are searched for (CMA-ES), in
as many simulated episodes as a training gets.

    from agents.tuning import tune

    found = tune("slo-mix", metric="goodput", budget=4000)
    found.save("slo-mix.json")  # then baselines.get("tuned:slo-mix.json")

Candidates of a generation serve the same training episodes, which are new in each. After each generation its
mean serves the validation episodes; what does best there is the result. Reports are on others still.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import baselines
from agents.comparison import METRICS
from agents.contenders import Episodes, Scheduled
from agents.evaluation import VALIDATION_SEED
from baselines import tuned
from baselines.tuned import Params
from llmsched_env import scenarios
from llmsched_env.core.requests import Requests
from llmsched_env.core.state import Hold
from llmsched_env.errors import InputError, unknown
from llmsched_env.scenarios import Problem, Scenario
from llmsched_env.scheduling import Peak, Scheduler

METHODS = ("cma",)
BATCH = 16  # training episodes of a generation
VALIDATION = 48  # episodes
_STEP = 0.25  # of the search at first, where the whole range of a parameter is 1
_ENV = "llmsched/Decision-v0"  # says what is told of lengths; nothing is played in it


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a search has found.

    Attributes:
        params: of the rule.
        scenario, metric: what they are tuned for; settings: of the scenario, where they were changed, and
            `length_info` if it was given.
        value, start: mean of the metric on the validation episodes with these parameters, and with those that
            the search began with.
        episodes: that were simulated, validation included.
        seed: of the search.
        interrupted: whether it ended before its budget did.
    """

    params: Params
    scenario: str
    metric: str
    settings: dict[str, Any]
    value: float
    start: float
    episodes: int
    seed: int
    interrupted: bool = False

    def scheduler(self, name: str = "tuned") -> Scheduler:
        """The rule with these parameters."""
        return tuned.rule(self.params, name)

    def summary(self) -> dict[str, Any]:
        """All but the parameters, as JSON has it."""
        return {k: v for k, v in vars(self).items() if k != "params"}

    def save(self, path: str | Path) -> None:
        """Write a file that is a scheduler by the name `tuned:PATH`."""
        tuned.save(self.params, path, **self.summary())


def tune(
    scenario: str | Path | Scenario,
    *,
    metric: str = "latency_s",
    budget: int = 4000,
    seed: int = 0,
    method: str = "cma",
    start: Params = Params(),
    progress: Callable[[int], None] = lambda done: None,
    **settings: Any,
) -> Tuned:
    """Search for the parameters of the rule that do best in a scenario.

    Parameters that do nothing there (weights of priorities or targets where there are none) stay as they are
    at the start. Ctrl-C ends the search; the result is the best so far.

    Args:
        metric: of `agents.comparison.METRICS`, its mean over episodes.
        budget: episodes to simulate at most, validation included.
        seed: of the search; the same gives the same result.
        method: "cma", the evolution strategy.
        start: where it begins.
        progress: called with the number of episodes simulated so far.
        settings: of the scenario, such as load=0.9, and `length_info`, what is told of lengths.

    Raises:
        InputError: an unknown scenario, metric, method or setting, or a budget for not even a generation.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    for name, value in (("budget", budget), ("seed", seed)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
            raise InputError(f"{name} must be a whole number from 0, not {value!r}")
    named = scenarios.get(scenario)
    sign = -1.0 if METRICS[metric].larger else 1.0
    spent = 0  # episodes

    def episodes(first: int, count: int) -> Episodes:
        return Episodes.of(named, range(first, first + count), metric, _ENV, dict(settings))

    def cost(params: Params, on: Episodes) -> float:
        nonlocal spent
        found = Scheduled(tuned.rule(params)).play(on)
        progress(spent := spent + len(on))
        value = float(found[metric].mean())
        if math.isnan(value):
            raise InputError(
                f"{metric} cannot be told of all episodes of {named.name}; tune for another metric"
            )
        return sign * value

    held_out = episodes(VALIDATION_SEED, VALIDATION)
    axes = _axes(held_out.problem, held_out.requests)
    search = _search(np.array([axis.at(getattr(start, name)) for name, axis in axes.items()]), seed)
    needed = search.population_size * BATCH + VALIDATION
    if budget < needed + VALIDATION:
        raise InputError(f"budget must be at least {needed + VALIDATION} episodes, not {budget}")
    best, interrupted = start, False
    least = first = math.nan
    try:
        least = first = cost(start, held_out)
        generation = 0
        while spent + needed <= budget:
            batch = episodes(generation * BATCH, BATCH)
            points = [search.ask() for _ in range(search.population_size)]
            search.tell([(point, cost(_params(point, axes, start), batch)) for point in points])
            candidate = _params(search.mean, axes, start)
            found = cost(candidate, held_out)
            if found < least:
                best, least = candidate, found
            generation += 1
    except KeyboardInterrupt:
        interrupted = True
    return Tuned(
        params=best,
        scenario=named.name,
        metric=metric,
        settings=dict(settings),
        value=sign * least,
        start=sign * first,
        episodes=spent,
        seed=int(seed),
        interrupted=interrupted,
    )


def best_named(
    scenario: str | Path | Scenario,
    *,
    metric: str = "latency_s",
    progress: Callable[[int], None] = lambda done: None,
    **settings: Any,
) -> str:
    """The named scheduler that does best on the validation episodes, of those that need to know no more of
    lengths than is told.

    Raises:
        InputError: an unknown scenario, metric or setting.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    on = Episodes.of(
        scenarios.get(scenario), range(VALIDATION_SEED, VALIDATION_SEED + VALIDATION), metric, _ENV, settings
    )
    sign = -1.0 if METRICS[metric].larger else 1.0
    found: dict[str, float] = {}
    for i, name in enumerate(baselines.names()):
        scheduler = baselines.get(name)
        if _entitled(scheduler, settings.get("length_info", "predicted")):
            try:
                played = Scheduled(scheduler).play(on)
            except InputError:  # such as prompts that it does not cut, and that exceed the budget
                continue
            if (played["finished"] == played["finished"].max()).all() or METRICS[metric].larger:
                found[name] = sign * float(played[metric].mean())
        progress(i + 1)
    return min(found, key=lambda name: found[name])


def _entitled(scheduler: Scheduler, length_info: str) -> bool:
    """Whether a scheduler decides with nothing that it is not told."""
    s = scheduler.settings
    omniscient = s.peak is Peak.TRUE or Hold.PEAK in (s.test, s.hold)
    if length_info == "oracle":
        return True
    return not omniscient and not (length_info == "none" and scheduler.needs_predictions())


# ---------------------------------------------------------------------- where it is searched


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A parameter as a place from 0 to 1: high * place^power, or what overrides it."""

    high: float = 1.0
    power: float = 1.0

    def value(self, place: float) -> float:
        return self.high * place**self.power

    def at(self, value: float) -> float:
        return min(1.0, max(0.0, value / self.high)) ** (1 / self.power)


@dataclasses.dataclass(frozen=True)
class _Tokens(_Axis):
    """From 16 tokens, by factors, to `high`, and there no limit."""

    def value(self, place: float) -> float:
        return math.inf if place >= 0.98 else round(16 * (self.high / 16) ** place)

    def at(self, value: float) -> float:
        return 1.0 if value >= self.high else math.log(max(1.0, value / 16)) / math.log(self.high / 16)


@dataclasses.dataclass(frozen=True)
class _Ratio(_Axis):
    """From 0 over 1, in the middle, to no limit."""

    def value(self, place: float) -> float:
        return math.inf if place >= 0.98 else place / (1 - place)

    def at(self, value: float) -> float:
        return 1.0 if value == math.inf else value / (1 + value)


def _axes(problem: Problem, requests: Iterable[Requests]) -> dict[str, _Axis]:
    """The parameters that can make a difference."""
    budget = problem.engine.token_budget
    assert budget is not None

    def has(column: str, differ: Callable[[NDArray[Any]], Any]) -> bool:
        return any(bool(differ(getattr(r, column))) for r in requests)

    axes = {"area": _Axis(2.0), "age": _Axis(10.0 / problem.time_scale_s, 3.0)}
    if has("ttft_target_s", lambda x: np.isfinite(x).any()):
        axes |= {"urgency": _Axis(10.0, 2.0), "late": _Axis(10.0, 2.0)}
    if has("priority", lambda x: x.max() > x.min()):
        axes["priority"] = _Axis(10.0, 2.0)
    if has("predicted_tokens", lambda x: np.isfinite(x).any()):
        axes |= {"prompt": _Axis(4.0, 2.0), "trust": _Axis()}
    axes |= {"headroom": _Axis(0.5, 2.0), "margin": _Axis(20.0, 3.0)}
    if budget > 16:
        axes["budget"] = _Tokens(float(budget))
    if has("tpot_target_s", lambda x: np.isfinite(x).any()):
        axes["pace"] = _Ratio()
    return axes


def _params(point: NDArray[np.float64], axes: dict[str, _Axis], start: Params) -> Params:
    """The parameters at a point, to three digits; beyond 0 and 1 the range is mirrored."""
    places = np.abs((point + 1.0) % 2.0 - 1.0)
    values = {
        name: axis.value(float(place)) for (name, axis), place in zip(axes.items(), places, strict=True)
    }
    return dataclasses.replace(start, **{name: float(f"{value:.3g}") for name, value in values.items()})


def _search(start: NDArray[np.float64], seed: int) -> Any:
    """CMA-ES, to be asked for points and told their costs."""
    try:
        import cmaes
    except ImportError:
        raise InputError('tuning needs the package cmaes: pip install "llmsched-env[train]"') from None
    return cmaes.CMA(mean=start, sigma=_STEP, seed=seed)
