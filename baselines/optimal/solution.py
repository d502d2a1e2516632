"""`Solution`: a schedule of an instance with what is known of it; `replay`, which believes nothing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from baselines.optimal.instance import Instance
from llmsched_env import simulation
from llmsched_env.core.run import SWAPPED_IN, SWAPPED_OUT
from llmsched_env.core.schedule import Schedule
from llmsched_env.errors import InputError
from llmsched_env.files import writing
from llmsched_env.scheduling import Scheduler
from llmsched_env.simulation import Result

_FORMAT = "llmsched-solution-1"
_FREE = Scheduler("schedule")  # reserves nothing but what it uses
_PROVED = 1e-9  # relative gap that rounding explains
STATUSES = {
    "optimal": "the bound is the objective",
    "gap": "stopped with a schedule and a bound that differ: all that the method can do, or memory is full",
    "timeout": "stopped by its time limit with a schedule and a bound that differ",
    "interrupted": "stopped by the user with a schedule and a bound that differ",
    "infeasible": "no schedule serves these requests",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """What a method found for an instance.

    Attributes:
        instance: the problem.
        schedule: all decisions, or None if there is none.
        objective: what `replay` of the schedule gives; nan if there is none.
        bound: no schedule does better (below for what is minimised, above for what is maximised).
        status: of `STATUSES`.
        method: cpsat, astar, search, or the scheduler's name.
        seconds: that it took.
        details: figures of the method, such as labels expanded; plain numbers and texts.
        versions: of what computed it.
    """

    instance: Instance
    schedule: Schedule | None
    objective: float
    bound: float
    status: str
    method: str
    seconds: float
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: versions())

    @staticmethod
    def of(
        instance: Instance,
        schedule: Schedule | None,
        bound: float,
        method: str,
        seconds: float,
        stopped: str = "gap",
        **details: Any,
    ) -> Solution:
        """A solution whose schedule is replayed, and whose status follows from the bound.

        Args:
            bound: a bound on the objective; may miss the objective of an optimal schedule by rounding.
            stopped: the status if the bound does not prove the schedule optimal.
        """
        if schedule is None:
            worst = -math.inf if instance.maximise else math.inf
            none = "infeasible" if bound == worst else stopped
            return Solution(instance, None, math.nan, bound, none, method, seconds, details)
        objective = instance.value(replay(instance, schedule))
        tolerance = _PROVED * max(1.0, abs(objective))
        proved = bound <= objective + tolerance if instance.maximise else bound >= objective - tolerance
        if proved:
            bound = objective
        status = "optimal" if proved else stopped
        return Solution(instance, schedule, objective, bound, status, method, seconds, details)

    @property
    def gap(self) -> float:
        """How far the bound is from the objective, as a share of the objective; 0 if it is proved."""
        if self.objective == self.bound:
            return 0.0
        return abs(self.objective - self.bound) / abs(self.objective) if self.objective else math.inf

    def result(self) -> Result:
        """The run of the schedule, checked.

        Raises:
            InputError: there is no schedule, or it breaks a rule.
        """
        if self.schedule is None:
            raise InputError(f"there is no schedule: {self.status}")
        return replay(self.instance, self.schedule)

    def summary(self) -> dict[str, Any]:
        """What there is to say in JSON: status, objective, bound, gap, method, seconds, iterations."""

        def plain(x: float) -> float | None:
            return x if math.isfinite(x) else None

        return {
            "name": self.instance.name,
            "objective_name": self.instance.objective,
            "status": self.status,
            "objective": plain(self.objective),
            "bound": plain(self.bound),
            "gap": plain(self.gap),
            "method": self.method,
            "seconds": self.seconds,
            "num_iterations": 0 if self.schedule is None else len(self.schedule),
            "details": dict(self.details),
            "versions": dict(self.versions),
        }

    def iterations(self) -> list[dict[str, Any]]:
        """The schedule, one dictionary an iteration: start_s, end_s, granted [[request, tokens], ...] and
        preempted [request, ...]."""
        if self.schedule is None:
            return []
        rows = self.result().iterations
        assert rows is not None
        return [
            {
                "start_s": float(row["start_s"]),
                "end_s": float(row["end_s"]),
                "granted": [list(pair) for pair in decisions.granted],
                "preempted": decisions.preempted,
            }
            for decisions, row in zip(self.schedule, rows, strict=True)
        ]

    def save(self, path: str | Path) -> None:
        """Write a compressed npz file with the instance in it, whole or not at all.

        Raises:
            InputError: there is no schedule, or the file cannot be written.
        """
        if self.schedule is None:
            raise InputError(
                f"{self.instance.name or 'instance'}: there is no schedule to save: {self.status}"
            )
        text = {"instance": self.instance.to_json(), **self.summary()}
        with writing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                format=np.array(_FORMAT),
                solution=np.array(json.dumps(text)),
                start_s=self.schedule.start_s,
                ends=self.schedule.ends,
                requests=self.schedule.requests,
                tokens=self.schedule.tokens,
            )

    @staticmethod
    def load(path: str | Path) -> Solution:
        """Read what `save` wrote, and replay it.

        Raises:
            InputError: the file is missing or damaged, its schedule breaks a rule, or does not give the
                objective that it claims.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
                if str(data["format"]) != _FORMAT:
                    raise InputError(f"{path}: format {data['format']}, not {_FORMAT}; write it again")
                text = json.loads(str(data["solution"]))
                schedule = Schedule(data["start_s"], data["ends"], data["requests"], data["tokens"])
            schedule.check(path)
            instance = Instance.from_json(text["instance"], text["name"])
            found = Solution(
                instance,
                schedule,
                float(text["objective"]),
                math.nan if text["bound"] is None else float(text["bound"]),
                str(text["status"]),
                str(text["method"]),
                float(text["seconds"]),
                dict(text["details"]),
                dict(text["versions"]),
            )
        except InputError as error:
            raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
        except Exception as error:  # a damaged file makes NumPy and its decompressor raise all kinds
            raise InputError(
                f"{path}: not a solution file ({error}); give one that `llmsched optimum --save` wrote"
            ) from None
        try:
            objective = instance.value(found.result())
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if not math.isclose(objective, found.objective, rel_tol=_PROVED):
            raise InputError(
                f"{path}: the schedule gives {instance.objective} {objective!r}, the file claims "
                f"{found.objective!r}; it was changed, or made by another version"
            )
        sign = -1.0 if instance.maximise else 1.0
        if sign * (found.bound - objective) > _PROVED * max(1.0, abs(objective)):
            raise InputError(f"{path}: the schedule is better than the bound that it claims, {found.bound!r}")
        if found.status not in STATUSES or (found.status == "optimal" and found.gap > _PROVED):
            raise InputError(f"{path}: status {found.status!r} does not go with a gap of {found.gap:.3g}")
        return found


def versions() -> dict[str, str]:
    """Versions of what a solution depends on."""
    found = {"python": platform.python_version(), "numpy": np.__version__}
    for name in ("llmsched-env", "ortools"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


# ---------------------------------------------------------------------- replay


def replay(instance: Instance, schedule: Schedule) -> Result:
    """Run a schedule through the simulator's engine, every rule of the instance checked.

    Returns:
        the run, with iterations and schedule.

    Raises:
        InputError: names the iteration and the rule that the schedule breaks, or the requests left
            unfinished.
    """
    result = simulation.replay(
        schedule, instance.requests, instance.profile, instance.engine, scheduler=_FREE
    )
    broken = _broken_rule(instance, schedule, result)
    if broken:
        raise InputError(f"schedule of {instance.name or 'an instance'}, {broken}")
    return result


def _broken_rule(instance: Instance, schedule: Schedule, result: Result) -> str:
    """The first rule of the instance that a schedule breaks which the engine itself follows; or ''."""
    requests = instance.requests
    prompt, output = requests.prompt_tokens.tolist(), requests.output_tokens.tolist()
    computed, generated = [0] * len(requests), [0] * len(requests)
    decoding: set[int] = set()
    unfinished = set(range(len(requests)))
    assert result.iterations is not None
    start, end = result.iterations["start_s"], result.iterations["end_s"]
    for j, decisions in enumerate(schedule):
        where = f"iteration {j} at {start[j]:.6g} s"
        if schedule.start_s[j] < start[j] - _PROVED * max(1.0, start[j]):
            return f"{where}: it is to start at {schedule.start_s[j]:.6g} s, while the one before still runs"
        begin = schedule.ends[j - 1] if j else 0
        for mark in schedule.tokens[begin : schedule.ends[j]]:
            if mark in (SWAPPED_OUT, SWAPPED_IN):
                return f"{where}: requests are recomputed here, not swapped"
        for r in decisions.preempted:
            if not instance.allows("preempt"):
                return f'{where}: request {r} is preempted, and "preempt" is not allowed'
            computed[r] = 0
            decoding.discard(r)
        used = sum(tokens for _, tokens in decisions.granted)
        if used > instance.token_budget:
            return f"{where}: {used} tokens exceed the token budget of {instance.token_budget}"
        if used == 0:
            return f"{where}: nobody gets a token"
        served = {r for r, _ in decisions.granted}
        if not instance.allows("pause") and not decoding <= served:
            r = min(decoding - served)
            return f'{where}: request {r} decodes and is left out, and "pause" is not allowed'
        if not instance.allows("idle") and unfinished:
            free = max(end[j - 1] if j else 0.0, min(float(requests.arrival_s[r]) for r in unfinished))
            if start[j] > free:
                return f'{where}: the engine waits since {free:.6g} s, and "idle" is not allowed'
        for r, tokens in decisions.granted:
            rest = prompt[r] + generated[r] - computed[r]
            if tokens < rest and not instance.allows("chunk"):
                return f'{where}: request {r} gets {tokens} of {rest} tokens, and "chunk" is not allowed'
            computed[r] += tokens
            if tokens == rest:
                generated[r] += 1
                decoding.add(r)
            if generated[r] == output[r]:
                decoding.discard(r)
                unfinished.discard(r)
    return ""
