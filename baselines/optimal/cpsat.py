"""`solve`: exact optima by constraint programming (CP-SAT of OR-tools), for all objectives and most forms of
cost; `feasible`: whether there is a schedule that is good enough.

Three models, the most special one that applies:

    batches  GPU time where the work is the same whatever is done: the fewest batches (`packing`)
    rounds   total latency of requests that come at once, in batches that all take the same time (`packing`)
    csp      all else: the constraint satisfaction problem of INFERMAX (`csp`)

A model with too few batches makes a solver prove what is wrong. So the csp's models take turns: the first has
schedules of up to J batches, the next those of more than J, and so on until `Ticks.most_batches` shows that
no schedule of still more batches is better. Where that is not reached, `Ticks.least` bounds the rest.

OR-tools is the optional extra `optimal`, imported when a model is solved.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baselines.optimal.csp import Batch, Csp, batches_of, schedule_of
from baselines.optimal.improve import incumbent
from baselines.optimal.instance import Instance
from baselines.optimal.packing import Bars, fewest_batches, least_rounds
from baselines.optimal.runner import Progress, Runner
from baselines.optimal.solution import Solution, replay
from baselines.optimal.ticks import Ticks
from llmsched_env.core.schedule import Schedule
from llmsched_env.errors import InputError

_CELLS = 6000  # requests times batches of the largest model, some 50 variables and constraints each
_BATCHES = 300  # of the largest model
_MARGIN = 4  # batches more than those of the schedule that is known, in the first model


def solve(
    instance: Instance,
    *,
    time_limit_s: float = 60.0,
    seed: int = 0,
    workers: int = 2,
    hint: Schedule | None = None,
    bound: float | None = None,
    deterministic_limit: float | None = None,
    progress: Progress | None = None,
) -> Solution:
    """The optimum, or as much as can be proved of it within the time.

    Times are whole ticks in the model. Where no tick that is small enough divides all coefficients and
    arrivals, they are rounded down: the bound stays one, and details["quantisation_error_s"] says by how much
    the model's objective of the schedule is off.

    Args:
        time_limit_s: wall seconds, from when there is a hint.
        seed, workers: of CP-SAT.
        hint: a schedule to begin with; None: the best that is quickly made.
        bound: one on the objective that is known.
        deterministic_limit: most work, in CP-SAT's own measure (about seconds): runs that it ends before the
            time does are the same every time.
        progress: called at every better schedule of a model with figures: seconds, objective, bound.

    Returns:
        method "cpsat"; details: model, quantisation_error_s, runs, batches (that the models reached).

    Raises:
        InputError: OR-tools is missing, the cost form is not one of `ticks.FORMS`, or the hint is no schedule
            of the instance.
    """
    hint = hint or _legal(instance)
    runner = Runner(
        time_limit_s,
        seed=seed,
        workers=workers,
        deterministic_limit=deterministic_limit,
        progress=progress,
    )
    return _Search(instance, runner, hint, bound).solve()


def feasible(
    instance: Instance,
    at_most: float,
    *,
    time_limit_s: float = 60.0,
    seed: int = 0,
    workers: int = 2,
    hint: Schedule | None = None,
    deterministic_limit: float | None = None,
) -> Solution | None:
    """A schedule whose objective is `at_most` (for what is maximised: at least) so much; arguments as for
    `solve`.

    Returns:
        None if it is proved that there is no such schedule. A solution without schedule, its status timeout,
        interrupted or gap, if that could not be found out.
    """
    hint = hint or _legal(instance)
    runner = Runner(time_limit_s, seed=seed, workers=workers, deterministic_limit=deterministic_limit)
    search = _Search(instance, runner, hint, None, enough=at_most)
    found = search.solve()
    sign = -1.0 if instance.maximise else 1.0
    tolerance = 1e-9 * max(1.0, abs(at_most))
    if sign * found.objective <= sign * at_most + tolerance:
        return found
    if sign * found.bound > sign * at_most + tolerance:
        return None
    return Solution.of(
        instance, None, found.bound, "cpsat", found.seconds, runner.stopped or "gap", **found.details
    )


class _Search:
    """What is known of an instance, and how more is found out."""

    def __init__(
        self,
        instance: Instance,
        runner: Runner,
        hint: Schedule,
        bound: float | None,
        enough: float | None = None,
    ) -> None:
        self.instance, self.runner = instance, runner
        run = replay(instance, hint)
        self.schedule, self.objective = hint, instance.value(run)
        self.ticks = Ticks.of(instance, run.makespan_s)
        self.given = bound
        self.enough = -1 if enough is None else self.ticks.ticks_at_most(enough)
        self.wanted = enough
        self.details: dict[str, Any] = {}

    def solve(self) -> Solution:
        """Choose a model and solve it."""
        bound = self.ticks.value(self.ticks.least())
        if self.wanted is None or not (self._reached() or self.enough < self.ticks.least()):
            model = self._model()
            self.details["model"] = model
            bound = {"batches": self._batches, "rounds": self._rounds, "csp": self._csp}[model]()
        if self.given is not None:
            bound = min(bound, self.given) if self.instance.maximise else max(bound, self.given)
        stopped = "gap"
        if self.runner.over:
            stopped = self.runner.stopped
        return Solution.of(
            self.instance,
            self.schedule,
            bound,
            "cpsat",
            self.runner.seconds,
            stopped,
            **self.details,
            runs=self.runner.runs,
        )

    def _model(self) -> str:
        """The most special model of the instance."""
        instance, ticks = self.instance, self.ticks
        if ticks.exact and instance.allow <= {"idle"} and ticks.cost.linear:
            if instance.objective == "gpu_time" and (ticks.together or instance.allows("idle")):
                return "batches"
            work = {f for f, k in ticks.cost.line.items() if k} - {"U"}
            if instance.objective == "total_latency" and ticks.together and not work:
                return "rounds"
        return "csp"

    def _reached(self) -> bool:
        assert self.wanted is not None
        sign = -1.0 if self.instance.maximise else 1.0
        return sign * self.objective <= sign * self.wanted

    def _offer(self, plan: list[Batch]) -> None:
        """Take a schedule if it is better than the one that is known, and legal.

        It may be illegal where the model has rounded numbers; with exact ones if requests arrive just when
        a batch ends, but for the rounding of the engine's clock.
        """
        try:
            schedule = schedule_of(self.ticks, plan)
            objective = self.instance.value(replay(self.instance, schedule))
        except InputError as error:
            self.details["not_replayed"] = str(error)
            return
        sign = -1.0 if self.instance.maximise else 1.0
        if sign * objective < sign * self.objective:
            self.schedule, self.objective = schedule, objective

    # ------------------------------------------------------------------ packings

    def _starts(self) -> NDArray[np.int64]:
        """The batch in which each request begins in the schedule that is known."""
        starts = np.full(len(self.instance), -1, np.int64)
        for j, decisions in enumerate(self.schedule):
            for r, _ in decisions.granted:
                if starts[r] < 0:
                    starts[r] = j
        return starts

    def _offer_starts(self, starts: NDArray[np.int64]) -> None:
        end = int((starts + np.array(self.ticks.output)).max())
        plan: list[Batch] = [({}, set()) for _ in range(end)]
        for i, s in enumerate(starts.tolist()):
            plan[s][0][i] = self.ticks.prompt[i]
            for j in range(s + 1, s + self.ticks.output[i]):
                plan[j][0][i] = 1
        self._offer([batch for batch in plan if batch[0]])

    def _batches(self) -> float:
        """The bound on GPU time from the fewest batches."""
        ((base, work),) = self.ticks.least_work()
        low, total = self.ticks.fewest(range(len(self.instance))), sum(work)
        enough = max(0, (self.enough - total) // base) if base else 0
        starts, low = fewest_batches(Bars.of(self.ticks), self.runner, self._starts(), low, enough)
        self._offer_starts(starts)
        return self.ticks.value(base * low + total)

    def _rounds(self) -> float:
        """The bound on total latency from the sum of ends."""
        ((base, _),) = self.ticks.least_work()
        arrived = sum(self.ticks.arrival)
        low = (self.ticks.least() - arrived) // base
        enough = max(0, (self.enough - arrived) // base)
        starts, low = least_rounds(Bars.of(self.ticks), self.runner, self._starts(), low, enough)
        self._offer_starts(starts)
        return self.ticks.value(base * low + arrived)

    # ------------------------------------------------------------------ the csp

    def _csp(self) -> float:
        """The bound from models of more and more batches."""
        ticks, limit = self.ticks, min(_BATCHES, max(1, _CELLS // len(self.instance)))
        low = ticks.least()
        if self.given is not None and ticks.exact:
            low = max(low, ticks.ticks_at_least(self.given))
        error = 0.0
        reached, found = 0, math.inf  # all schedules of so many batches do no better than this
        while not self.runner.over:
            below = self._below()
            most = ticks.most_batches(below)
            if below < low or (most is not None and most <= reached):
                break
            if reached >= limit:
                self.details["horizon"] = "schedules of more batches are bounded by sums only"
                break
            batches = len(self.schedule) + _MARGIN if reached == 0 else limit
            batches = min(limit, batches, batches if most is None else most)
            hint = batches_of(self.schedule)
            if reached == 0 and self.wanted is None and len(hint) <= limit:
                batches = max(batches, len(hint))  # the hint has to fit
            hinted = reached == 0 and self.wanted is None and len(hint) <= batches
            csp = Csp(ticks, batches, hint if hinted else None)
            model = csp.model
            if low > 0:
                model.add(csp.objective >= low)
            if hinted:
                at_hint = csp.hinted_objective()
                error = abs(self.objective - ticks.value(at_hint))
                model.add(csp.objective <= at_hint)
            else:
                model.add(csp.objective <= below)
            if reached:
                model.add(csp.used[reached] == 1)
            if self.wanted is None:
                model.minimize(csp.objective)
            answer = self.runner.run(model)
            if answer.value is not None:
                value = csp.value(answer.of)
                before = self.objective
                self._offer(csp.plan(answer.of))
                if not ticks.exact and self.objective != before:
                    error = abs(self.objective - ticks.value(value))
                if self.wanted is not None:
                    if self._reached():
                        break
                    found = min(found, value)  # good enough in the model only
                    break
                found = min(found, value if answer.proved else answer.bound)
            elif not answer.proved:
                found = min(found, max(low, answer.bound))
                if self.wanted is not None:
                    found = min(found, low)
            reached = batches
            if not answer.proved:
                break
        self.details["batches"] = reached
        if not ticks.exact:
            self.details["quantisation_error_s"] = error
        below = self._below()
        most = ticks.most_batches(below)
        if most is None or most > reached:  # the schedules of more batches than the models had
            found = min(found, max(ticks.least(reached + 1), low))
        if found == math.inf:  # nothing better is left
            found = below + 1
        return ticks.value(found)

    def _below(self) -> int:
        """The most that is still of interest."""
        below = self.ticks.ticks_below(self.objective)
        return below if self.wanted is None else min(below, self.enough)


def _legal(instance: Instance) -> Schedule:
    """The best schedule that is quickly made: of the named schedulers, and of lists, which are always
    legal."""
    schedule = incumbent(instance).schedule
    assert schedule is not None
    return schedule
