"""What is rewarded: a weighted sum of terms, each of which adds up to a metric of the episode.

With N the requests of an episode, unit_time = N x the scenario's time scale (what a request of mean size
takes alone), and unit_tokens = the output tokens that N requests are expected to bring, the rewards of an
episode that serves everybody sum up to

    latency      - sum over requests of (finish - arrival) / unit_time
    goodput      + requests that meet both their targets / N
    throughput   + output tokens / unit_tokens
    gpu_time     - seconds in which an iteration runs / unit_time
    makespan     - end of the last iteration / unit_time
    fairness     + Jain's index of what the clients have got at the end - 1
    violations   - requests that miss a target or both / N

Of an episode that is cut before, the first is minus the integral over time of the requests in the system,
which by Little's law is the same once all are served; the others count what has come to pass.

Goodput and violations are two ways to tell the same: undiscounted, and if everybody is served, they differ by
1. A request in time counts as such when it finishes; a violation is told when the first token is due and not
there, however long the request goes on after that, or, where only the time per token was too long, when it
finishes. So the latter is meant to say what came of a decision sooner. What is cut before it finishes is no
violation unless its first token was late.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llmsched_env.errors import InputError, unknown


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of what is rewarded, see above; a reward is the sum of weight times term.

    Raises:
        InputError: a weight that is not finite, or no weight at all.
    """

    latency: float = 0.0
    goodput: float = 0.0
    throughput: float = 0.0
    gpu_time: float = 0.0
    makespan: float = 0.0
    fairness: float = 0.0
    violations: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in dataclasses.asdict(self).items():
            good = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
            if not good:
                raise InputError(f"objective: the weight of {name} must be a finite number, not {weight!r}")
        if not any(self.weights):
            raise InputError("objective: all weights are 0; give one, such as latency=1")

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in the order of the fields, which is that of the compiled code."""
        return dataclasses.astuple(self)

    @staticmethod
    def get(objective: str | Mapping[str, float] | Objective) -> Objective:
        """An objective by name, the terms' or "mix" (latency and goodput alike), or weights by name of term.

        >>> Objective.get({"latency": 1, "fairness": 0.2}).weights
        (1, 0.0, 0.0, 0.0, 0.0, 0.2, 0.0)

        Raises:
            InputError: an unknown name, with the nearest match.
        """
        if isinstance(objective, Objective):
            return objective
        given: Any = _NAMED.get(objective) if isinstance(objective, str) else objective
        if not isinstance(given, Mapping):
            raise unknown("objective", objective, _NAMED)
        for name in given:
            if name not in _TERMS:
                raise unknown("term of an objective", name, _TERMS)
        return Objective(**given)


_TERMS = tuple(field.name for field in dataclasses.fields(Objective))
_NAMED: dict[str, dict[str, float]] = {
    **{name: {name: 1.0} for name in _TERMS},
    "mix": {"latency": 0.5, "goodput": 0.5},
}
