"""How long what happens between two calls takes, such as a tool: distributions of seconds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from llmsched_env.errors import InputError
from llmsched_env.workloads.arrivals import build

Seconds = NDArray[np.float64]


@runtime_checkable
class Delay(Protocol):
    """What a distribution of delays offers."""

    def draw(self, n: int, rng: np.random.Generator) -> Seconds:
        """n delays: float64 (n,), seconds, >= 0."""
        ...


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Always so many seconds."""

    seconds: float = 0.0

    def __post_init__(self) -> None:
        _check("fixed", self, least=0.0)

    def draw(self, n: int, rng: np.random.Generator) -> Seconds:
        return np.full(n, float(self.seconds))


@dataclasses.dataclass(frozen=True)
class Exponential:
    """Exponential with this mean, seconds."""

    mean: float

    def __post_init__(self) -> None:
        _check("exponential", self)

    def draw(self, n: int, rng: np.random.Generator) -> Seconds:
        return rng.exponential(self.mean, n)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Between `low` and `high` seconds."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check("uniform", self, least=0.0)
        if self.high < self.low:
            raise InputError(f"delay uniform: low {self.low:g} is above high {self.high:g}")

    def draw(self, n: int, rng: np.random.Generator) -> Seconds:
        return rng.uniform(self.low, self.high, n)


@dataclasses.dataclass(frozen=True)
class Lognormal:
    """exp(N(log median, sigma^2)) seconds."""

    median: float
    sigma: float

    def __post_init__(self) -> None:
        _check("lognormal", self)

    def draw(self, n: int, rng: np.random.Generator) -> Seconds:
        return rng.lognormal(math.log(self.median), self.sigma, n)


KNOWN: dict[str, Any] = {
    "fixed": Fixed,
    "exponential": Exponential,
    "uniform": Uniform,
    "lognormal": Lognormal,
}


def get(spec: str | float | Delay) -> Delay:
    """A distribution by name, with its settings after a colon ("exponential:2.5", "uniform:1,3"), or a fixed
    number of seconds.

    Raises:
        InputError: an unknown name, or settings that do not fit.
    """
    if isinstance(spec, int | float) and not isinstance(spec, bool):
        return Fixed(float(spec))
    if not isinstance(spec, str):
        if not isinstance(spec, Delay):
            raise InputError(f"delay {spec!r} is none; give seconds, or a name such as 'exponential:2.5'")
        return spec
    try:
        made: Delay = build("delay", KNOWN, spec)
    except TypeError as error:  # names the settings that are missing
        raise InputError(f"delay {spec!r}: {str(error).split('__init__() ')[-1]}") from None
    return made


def _check(kind: str, made: Any, least: float | None = None) -> None:
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (number and (value > 0 if least is None else value >= least)):
            limit = "above 0" if least is None else f"of at least {least:g}"
            raise InputError(f"delay {kind}: {field.name} must be a finite number {limit}, not {value!r}")
