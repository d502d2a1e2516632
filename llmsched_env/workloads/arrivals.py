"""Arrival processes, each at unit mean rate: one request per unit of time on average.

`Workload.draw` divides the times by the rate, so that the same seed at another load gives the same sequence
on another time scale (common random numbers). A time that a process takes as a setting (a period, the length
of a burst) is therefore counted in requests, the mean number that arrive in it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from llmsched_env.errors import InputError, unknown

Times = NDArray[np.float64]


@runtime_checkable
class Arrivals(Protocol):
    """What an arrival process offers."""

    def unit_times(self, n: int, rng: np.random.Generator) -> Times:
        """The first n arrival times: float64 (n,), non-decreasing, >= 0, at a mean rate of one."""
        ...


@dataclasses.dataclass(frozen=True)
class AtOnce:
    """All requests at time 0: the offline problem. It has no rate."""

    def unit_times(self, n: int, rng: np.random.Generator) -> Times:
        return np.zeros(n)


@dataclasses.dataclass(frozen=True)
class Deterministic:
    """Equal gaps, the first request at time 0."""

    def unit_times(self, n: int, rng: np.random.Generator) -> Times:
        return np.arange(n, dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class Poisson:
    """Independent exponential gaps (coefficient of variation 1)."""

    def unit_times(self, n: int, rng: np.random.Generator) -> Times:
        return np.cumsum(rng.standard_exponential(n))


@dataclasses.dataclass(frozen=True)
class Gamma:
    """Independent Gamma gaps with coefficient of variation `cv`; above 1 the usual model of bursts."""

    cv: float = 2.0

    def __post_init__(self) -> None:
        _positive("gamma", "cv", self.cv)
        if not 0.001 <= self.cv <= 1000:
            raise InputError(f"gamma: cv {self.cv:g} is out of range; take 0.001 to 1000")

    def unit_times(self, n: int, rng: np.random.Generator) -> Times:
        shape = self.cv**-2
        return np.cumsum(rng.standard_gamma(shape, n) / shape)


@dataclasses.dataclass(frozen=True)
class Weibull:
    """Independent Weibull gaps with coefficient of variation `cv`; ServeGen has some clients with them."""

    cv: float = 2.0

    def __post_init__(self) -> None:
        _positive("weibull", "cv", self.cv)
        if not 0.02 <= self.cv <= 50:
            raise InputError(f"weibull: cv {self.cv:g} is out of range; take 0.02 to 50")

    def unit_times(self, n: int, rng: np.random.Generator) -> Times:
        shape = self.shape
        return np.cumsum(rng.weibull(shape, n) / math.gamma(1 + 1 / shape))

    @cached_property
    def shape(self) -> float:
        """The shape k at which Gamma(1 + 2/k) / Gamma(1 + 1/k)^2 = 1 + cv^2, by bisection on log k."""
        target = math.log1p(self.cv**2)
        low, high = math.log(0.05), math.log(200.0)
        for _ in range(80):
            middle = 0.5 * (low + high)
            inverse = math.exp(-middle)
            if math.lgamma(1 + 2 * inverse) - 2 * math.lgamma(1 + inverse) > target:
                low = middle
            else:
                high = middle
        return math.exp(0.5 * (low + high))


@dataclasses.dataclass(frozen=True)
class Bursts:
    """A Poisson process whose rate alternates between a quiet and a burst level (Markov-modulated, two
    states).

    Attributes:
        factor: rate inside a burst over the mean rate, > 1.
        share: share of the time spent in bursts; share * factor <= 1, and at 1 nothing arrives between
            bursts.
        requests: mean number of requests in one burst. Sojourns in both states are exponential.
    """

    factor: float = 4.0
    share: float = 0.1
    requests: float = 50.0

    def __post_init__(self) -> None:
        _positive("bursts", "requests", self.requests)
        if not (self.factor > 1 and 0 < self.share < 1 and self.factor * self.share <= 1):
            raise InputError(
                f"bursts: factor {self.factor:g} and share {self.share:g} do not fit; "
                "take factor > 1, 0 < share < 1, factor * share <= 1"
            )

    def unit_times(self, n: int, rng: np.random.Generator) -> Times:
        work = np.cumsum(rng.standard_exponential(n))
        burst = self.requests / self.factor  # mean sojourns, in time
        quiet = burst * (1 - self.share) / self.share
        low = max(0.0, (1 - self.share * self.factor) / (1 - self.share))
        in_burst = bool(rng.random() < self.share)
        cycles = int(n / (burst + quiet) * 1.2) + 8
        time, done = np.zeros(1), np.zeros(1)
        while done[-1] <= work[-1]:  # usually once
            lengths = rng.standard_exponential((cycles, 2)) * ((burst, quiet) if in_burst else (quiet, burst))
            rates = np.array((self.factor, low) if in_burst else (low, self.factor))
            time = np.concatenate((time, time[-1] + np.cumsum(lengths)))
            done = np.concatenate((done, done[-1] + np.cumsum(lengths * rates)))
        return np.interp(work, done, time)


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A rate that grows (or falls) linearly over the run from `start` to `end`, relative to each other.

    `inner` has the gaps; they are drawn at unit rate and mapped through the cumulative rate (time change).
    """

    start: float = 0.5
    end: float = 1.5
    inner: Arrivals = Poisson()

    def __post_init__(self) -> None:
        if not (self.start >= 0 and self.end >= 0 and self.start + self.end > 0):
            raise InputError(
                f"ramp: rates from {self.start:g} to {self.end:g}; neither may be negative nor both zero"
            )

    def unit_times(self, n: int, rng: np.random.Generator) -> Times:
        work = self.inner.unit_times(n, rng) / n
        mean = 0.5 * (self.start + self.end)
        first, slope = self.start / mean, (self.end - self.start) / mean
        # Solve first * t + slope * t^2 / 2 = work; what is left after the run (t > 1) arrives at the mean
        # rate.
        inside = np.minimum(work, 1.0)
        root = np.sqrt(np.maximum(first * first + 2 * slope * inside, 0.0))
        return n * (2 * inside / np.maximum(first + root, 1e-300) + (work - inside))


@dataclasses.dataclass(frozen=True)
class Diurnal:
    """A rate 1 + swing * sin(2 pi t / period), starting at the mean on the way up; renewal gaps `inner`.

    Attributes:
        swing: 0 (constant) to 1 (down to nothing).
        period: mean number of requests in one cycle.
    """

    swing: float = 0.5
    period: float = 1000.0
    inner: Arrivals = Poisson()

    def __post_init__(self) -> None:
        _positive("diurnal", "period", self.period)
        if not 0 <= self.swing <= 1:
            raise InputError(f"diurnal: swing {self.swing:g} is not between 0 and 1")

    def unit_times(self, n: int, rng: np.random.Generator) -> Times:
        turns, phase = np.divmod(self.inner.unit_times(n, rng) / self.period, 1.0)
        return self.period * (turns + np.interp(phase, *self._cycle))

    @cached_property
    def _cycle(self) -> tuple[Times, Times]:
        """The share of a cycle's requests that has arrived at 4097 points of it, and the points."""
        grid: Times = np.arange(4097) / 4096
        return grid + self.swing * (1 - np.cos(2 * np.pi * grid)) / (2 * np.pi), grid


@dataclasses.dataclass(frozen=True)
class Profile:
    """A recorded rate, constant within bins and repeated when the run is longer; renewal gaps `inner` in
    between.

    The gaps are drawn at unit rate in the time in which the recorded rate is constant and mapped back (time
    change), so the expected count in each bin is the recorded one. A run of fewer requests takes the first
    part of the record, at the record's own burstiness; `unit_times` scales this part to unit mean rate and
    `rate_rps` tells its own.

    Attributes:
        counts: recorded requests in each bin.
        bin_s: width of a bin in seconds.
        last_s: width of the last bin, which a record may leave unfinished.
    """

    counts: tuple[int, ...]
    bin_s: float
    last_s: float
    inner: Arrivals = Poisson()

    def __post_init__(self) -> None:
        _positive("profile", "bin_s", self.bin_s)
        _positive("profile", "last_s", self.last_s)
        if sum(self.counts) <= 0 or min(self.counts) < 0:
            raise InputError("profile: counts must not be negative, nor all zero")

    def unit_times(self, n: int, rng: np.random.Generator) -> Times:
        return self._seconds(self.inner.unit_times(n, rng)) * self.rate_rps(n)

    def rate_rps(self, n: int) -> float:
        """Mean rate in requests/s over the part of the record (repeated) in which n requests arrive."""
        return n / float(self._seconds(np.array([float(n)]))[0])

    def _seconds(self, work: Times) -> Times:
        """When the recorded cumulative count, repeated, reaches `work` (after silence: at its end)."""
        done, time, widths = self._recorded
        turns, rest = np.divmod(work, done[-1])
        i = np.searchsorted(done, rest, side="right") - 1  # counts[i] > 0, as done[i] <= rest < done[i + 1]
        return turns * time[-1] + time[i] + (rest - done[i]) / (done[i + 1] - done[i]) * widths[i]

    @cached_property
    def _recorded(self) -> tuple[Times, Times, Times]:
        """Recorded requests up to the edges of the bins, these edges, and the widths of the bins, seconds."""
        widths = np.full(len(self.counts), self.bin_s)
        widths[-1] = self.last_s
        done = np.concatenate(([0.0], np.cumsum(self.counts)))
        return done, np.concatenate(([0.0], np.cumsum(widths))), widths


KNOWN: dict[str, Callable[..., Arrivals]] = {
    "at-once": AtOnce,
    "deterministic": Deterministic,
    "poisson": Poisson,
    "gamma": Gamma,
    "weibull": Weibull,
    "bursts": Bursts,
    "ramp": Ramp,
    "diurnal": Diurnal,
}


def names() -> list[str]:
    """The arrival processes that can be asked for by name."""
    return sorted(KNOWN)


def get(spec: str | Arrivals, **settings: Any) -> Arrivals:
    """An arrival process by name, with its settings after a colon ("gamma:3", "bursts:4,0.1,50") or as
    keywords.

    Raises:
        InputError: unknown name, or settings the process does not take.
    """
    if not isinstance(spec, str):
        if settings:
            raise InputError(
                f"arrivals: settings {', '.join(settings)} go with a name; put them in the object"
            )
        if not isinstance(spec, Arrivals):
            raise InputError(f"arrivals {spec!r} is no process; give a name such as 'gamma:2', or an object")
        return spec
    return build("arrivals", KNOWN, spec, settings)


def build(
    kind: str, known: dict[str, Callable[..., Any]], spec: str, settings: dict[str, Any] | None = None
) -> Any:
    """`known[name](*numbers, **settings)` for a spec "name" or "name:number,number"."""
    name, _, rest = spec.partition(":")
    if name not in known:
        raise unknown(kind, name, known)
    try:
        numbers = [float(x) for x in rest.split(",")] if rest else []
    except ValueError:
        raise InputError(
            f"{kind} {spec!r}: what follows the colon must be numbers, as in 'gamma:3'"
        ) from None
    maker = known[name]
    takes = [f.name for f in dataclasses.fields(maker)] if dataclasses.is_dataclass(maker) else []
    for setting in settings or {}:
        if setting not in takes:
            raise unknown(f"setting of {kind} {name!r}", setting, takes or ["(none)"])
    if len(numbers) > len(takes):
        raise InputError(
            f"{kind} {spec!r}: {len(numbers)} settings given, "
            f"{name} takes {len(takes)} ({', '.join(takes) or 'none'})"
        )
    return maker(*numbers, **(settings or {}))


def spell(known: dict[str, Callable[..., Any]], made: object) -> str | None:
    """The spec from which `build` makes an equal object, or None if there is none."""
    for name, maker in known.items():
        if type(made) is maker:
            fields: Any = dataclasses.fields(maker)  # type: ignore[arg-type]
            values = [(getattr(made, f.name), f.default) for f in fields]
            while values and values[-1][0] == values[-1][1]:
                values.pop()
            if all(isinstance(value, int | float) for value, _ in values):
                return name + ":" * bool(values) + ",".join(f"{value:.17g}" for value, _ in values)
    return None


def _positive(kind: str, name: str, value: float) -> None:
    if not (isinstance(value, int | float | np.number) and 0 < value < math.inf):
        raise InputError(f"{kind}: {name} must be a positive number, not {value!r}")
