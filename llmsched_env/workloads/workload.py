"""Workloads: recipes for requests, drawn at a rate, a share of the engine's capacity, or as recorded."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.requests import Requests
from llmsched_env.errors import InputError, unknown
from llmsched_env.workloads import arrivals, predictions
from llmsched_env.workloads.lengths import Clip, Lengths, Mixture, Moments

_SAMPLE = 2**18  # points of the quasi-random sample behind the moments

SomeWorkload = TypeVar("SomeWorkload", bound="Workload")


class Workload(abc.ABC):
    """A recipe for requests. `load` is the offered load as a share of the engine's capacity, or None."""

    name: str
    load: float | None
    rate: float | None

    @abc.abstractmethod
    def draw(self, capacity_rps: float | None = None, rng: np.random.Generator | None = None) -> Requests:
        """Requests; the same ones each time unless `rng` is given.

        Args:
            capacity_rps: requests/s the engine can sustain; needed, and used, only where the workload has a
                `load`.
            rng: draw with this generator and not with the workload's own seed.
        """

    @abc.abstractmethod
    def moments(self) -> Moments:
        """The moments of the lengths that a capacity depends on."""

    def rate_rps(self, capacity_rps: float | None = None) -> float:
        """Mean requests/s of `draw`; inf where all arrive at once."""
        rate = self._rate(capacity_rps)
        return math.inf if rate is None else rate

    def longest(self) -> int:
        """Tokens, of prompt and declared answer together, that no request of any draw passes.

        Here of one draw: right for a recipe whose lengths are the same in each.
        """
        requests = self.draw(1.0)
        return int((requests.prompt_tokens.astype(np.int64) + requests.declared_tokens).max())

    def fit(self: SomeWorkload, limit: int) -> SomeWorkload:
        """The recipe with no request longer than `limit` tokens, prompt and declared answer together.

        Raises:
            InputError: if it has longer ones and cannot cut them.
        """
        if self.longest() > limit:
            raise InputError(
                f"workload {self.name}: requests of up to {self.longest()} tokens, prompt and declared "
                f"answer, do not fit in the engine's {limit}; cut them, or raise kv_blocks or max_model_len"
            )
        return self

    def options(self) -> tuple[str, ...]:
        """What `replace` can change."""
        fields: Any = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        return tuple(field.name for field in fields if field.name != "name")

    def replace(self: SomeWorkload, **changes: Any) -> SomeWorkload:
        """A copy with some options changed, in the forms that `workloads.get` takes. A load takes the place
        of a rate, and a rate that of a load; None removes a load, a rate or a limit and means nothing
        elsewhere.

        Raises:
            InputError: an option that there is not, with the nearest match, or a value that does not fit.
        """
        for name in changes:
            if name not in self.options():
                raise unknown(f"option of workload {self.name}", name, self.options())
        for one, other in (("load", "rate"), ("rate", "load")):
            if changes.get(one) is not None and getattr(self, other) is not None:
                changes.setdefault(other, None)
        if changes.get("prediction") is not None:
            changes["prediction"] = predictions.get(changes["prediction"])
        if changes.get("declared") is not None:
            changes["declared"] = predictions.get_declared(changes["declared"])
        return self._replaced(changes)

    def _replaced(self: SomeWorkload, changes: dict[str, Any]) -> SomeWorkload:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def _rate(self, capacity_rps: float | None) -> float | None:
        """Requests/s asked for, or None for the workload's own."""
        if self.load is None:
            return self.rate
        if capacity_rps is None or not 0 < capacity_rps < math.inf:
            raise InputError(
                f"workload {self.name} is at load {self.load:g}, a share of the engine's capacity, "
                "and the capacity is "
                f"{capacity_rps}; give capacity_rps, or a rate in place of the load"
            )
        return self.load * capacity_rps


@dataclasses.dataclass(frozen=True)
class RequestClass:
    """A class of requests, or a tenant: its share of all, its lengths, and its requests' marks."""

    lengths: Lengths
    share: float = 1.0
    client: int = 0
    class_id: int = 0
    priority: int = 0
    ttft_target_s: float = math.inf
    tpot_target_s: float = math.inf


@dataclasses.dataclass(frozen=True)
class Synthetic(Workload):
    """Requests drawn from distributions: a mixture of classes, an arrival process, a predictor, declared
    maxima.

    Each request is of a class by chance, independently (shares are relative). Arrivals, lengths, predictions
    and declared maxima have separate streams of random numbers, so that changing one of them leaves the
    others as they are.

    Attributes:
        arrivals: the arrival process; its times are scaled to the rate.
        load, rate: at most one of them; neither: `own_rate`, or the rate of a recorded `arrivals.Profile`.
        clip: limits that the lengths are cut to.
    """

    name: str
    classes: tuple[RequestClass, ...]
    num_requests: int = 1000
    arrivals: arrivals.Arrivals = arrivals.Poisson()  # noqa: RUF009  (frozen)
    load: float | None = None
    rate: float | None = None
    own_rate: float | None = None
    prediction: predictions.Prediction = predictions.Oracle()  # noqa: RUF009
    declared: predictions.Declared = predictions.PowerOfTwo()  # noqa: RUF009
    clip: Clip = Clip()  # noqa: RUF009
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)
        n = self.num_requests
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n < 2**31:
            raise InputError(f"num_requests must be a whole number from 1 to 2147483647, not {n!r}")
        shares = [c.share for c in self.classes]
        if not shares or min(shares) < 0 or not 0 < sum(shares) < math.inf:
            raise InputError(
                f"workload {self.name}: give one or more classes, with shares not negative, nor all zero"
            )
        asked = "load" if self.load is not None else "rate"
        if isinstance(self.arrivals, arrivals.AtOnce) and getattr(self, asked) is not None:
            raise InputError(
                f"workload {self.name}: all requests arrive at once, so a {asked} means nothing; drop it"
            )

    def draw(self, capacity_rps: float | None = None, rng: np.random.Generator | None = None) -> Requests:
        rng = _generator(self.seed) if rng is None else rng
        rules = (self.arrivals, None, self.prediction, self.declared)
        streams = list(map(_stream, rng.integers(0, 2**63, size=4), rules))
        n = int(self.num_requests)
        arrival = self.arrivals.unit_times(n, streams[0])
        if not isinstance(self.arrivals, arrivals.AtOnce):
            arrival = arrival / self.rate_rps(capacity_rps)
        kind, prompt, output = self._mixture.draw(streams[1].random((n, 3)))
        declared = self.declared.declare(output, self._longest_output, streams[3])
        return Requests.of(
            arrival,
            *self._mixture.narrow(prompt, output),
            predicted_tokens=self.prediction.predict(output, streams[2]),
            declared_tokens=_narrow(declared),
            **self._mixture.columns(kind),
        )

    def moments(self) -> Moments:
        """Over the distributions, from a fixed low-discrepancy sample (about 1e-4 relative error); kept."""
        return _moments(self.classes, self.clip)

    @cached_property
    def _mixture(self) -> _Mixture:
        return _Mixture(self.classes, self.clip)

    @cached_property
    def _longest_output(self) -> int:
        return self.clip.longest(max(c.lengths.output.largest for c in self.classes))

    def rate_rps(self, capacity_rps: float | None = None) -> float:
        if isinstance(self.arrivals, arrivals.AtOnce):
            return math.inf
        rate = self._rate(capacity_rps)
        if rate is None and isinstance(self.arrivals, arrivals.Profile):
            rate = self.arrivals.rate_rps(int(self.num_requests))
        if rate is None:
            rate = self.own_rate
        if rate is None:
            raise InputError(
                f"workload {self.name} has no rate of its own; "
                "give load (a share of the engine's capacity) or rate (requests/s)"
            )
        return rate

    def longest(self) -> int:
        prompt = max(c.lengths.prompt.largest for c in self.classes)
        prompt = min(limit for limit in (prompt, self.clip.max_prompt) if limit is not None)
        total = prompt + self._most_declared
        if self.clip.max_total is not None and isinstance(self.declared, predictions.Exact):
            return min(total, self.clip.max_total)
        return total

    def fit(self, limit: int) -> Synthetic:
        """The recipe with prompts cut so that no request is longer than `limit` tokens, prompt and declared
        answer together.
        """
        if self.longest() <= limit:
            return self
        room = limit - self._most_declared
        if room < 1:
            raise InputError(
                f"workload {self.name}: answers are declared with up to {self._most_declared} tokens, which "
                f"leaves no room for prompts in the engine's {limit}; cut them with max_output, or raise "
                "kv_blocks or max_model_len"
            )
        return self.replace(max_prompt=room)

    @property
    def _most_declared(self) -> int:
        return int(self.declared.most(self._longest_output))

    def options(self) -> tuple[str, ...]:
        own = ("num_requests", "load", "rate", "seed", "arrivals", "cv", "prediction", "declared")
        return (*own, *_CLIPS, *_TARGETS)

    def _replaced(self, changes: dict[str, Any]) -> Synthetic:
        removable = ("load", "rate", *_CLIPS)
        changes = {name: value for name, value in changes.items() if value is not None or name in removable}
        clip = {name: changes.pop(name) for name in _CLIPS if name in changes}
        targets = {name: changes.pop(name) for name in _TARGETS if name in changes}
        for name, value in targets.items():
            if not (_is_number(value) and value > 0):
                raise InputError(f"{name} must be a positive number of seconds, not {value!r}")
        process, cv = changes.pop("arrivals", None), changes.pop("cv", None)
        if process is not None or cv is not None:
            changes["arrivals"] = _process(process, cv)
        if clip:
            changes["clip"] = dataclasses.replace(self.clip, **clip)
        if targets:
            changes["classes"] = tuple(dataclasses.replace(c, **targets) for c in self.classes)
        return dataclasses.replace(self, **changes)


_CLIPS = ("max_prompt", "max_output", "max_total")
_TARGETS = ("ttft_target_s", "tpot_target_s")


def _process(process: str | arrivals.Arrivals | None, cv: float | None) -> arrivals.Arrivals:
    if cv is None:
        return arrivals.get(process or "poisson")
    if process not in (None, "gamma", "weibull"):
        raise InputError(f"cv={cv:g} goes with arrivals 'gamma' or 'weibull', not with {process!r}")
    return arrivals.get(str(process or "gamma"), cv=cv)


@dataclasses.dataclass(frozen=True, eq=False)
class Replay(Workload):
    """Recorded requests, on their own time scale or stretched to a load or rate.

    Attributes:
        requests: what was recorded.
        prediction, declared: replace the recorded columns, drawn with `seed`; None keeps them.
    """

    name: str
    requests: Requests
    load: float | None = None
    rate: float | None = None
    prediction: predictions.Prediction | None = None
    declared: predictions.Declared | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def draw(self, capacity_rps: float | None = None, rng: np.random.Generator | None = None) -> Requests:
        requests, rate = self.requests, self._rate(capacity_rps)
        rng = _generator(self.seed) if rng is None else rng
        streams = [np.random.default_rng(int(s)) for s in rng.integers(0, 2**63, size=2)]
        output = requests.output_tokens.astype(np.int64)
        if rate is not None:
            requests = at_rate(requests, rate)
        if self.prediction is not None:
            requests = requests.replace(predicted_tokens=self.prediction.predict(output, streams[0]))
        if self.declared is not None:
            declared = self.declared.declare(output, int(output.max()), streams[1])
            requests = requests.replace(declared_tokens=declared)
        return requests

    def moments(self) -> Moments:
        return Moments.of(self.requests.prompt_tokens, self.requests.output_tokens)

    def rate_rps(self, capacity_rps: float | None = None) -> float:
        rate, times = self._rate(capacity_rps), self.requests.arrival_s
        if rate is not None:
            return rate
        return (len(times) - 1) / float(times[-1] - times[0]) if times[-1] > times[0] else math.inf

    def longest(self) -> int:
        requests = self.requests
        prompt, output = requests.prompt_tokens.astype(np.int64), requests.output_tokens
        if self.declared is None:
            return int((prompt + requests.declared_tokens).max())
        if isinstance(self.declared, predictions.Exact):
            return int((prompt + output).max())
        return int(prompt.max()) + int(self.declared.most(int(output.max())))

    def options(self) -> tuple[str, ...]:
        return ("num_requests", "load", "rate", "prediction", "declared", "seed")

    def _replaced(self, changes: dict[str, Any]) -> Replay:
        most = changes.pop("num_requests", None)
        if most is not None:
            if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= len(self.requests):
                raise InputError(
                    f"num_requests must be a whole number from 1 to {len(self.requests)}, as many as "
                    f"workload {self.name} has, not {most!r}"
                )
            changes["requests"] = self.requests.take(slice(most))
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Shuffled(Workload):
    """The same requests in each draw, all at time 0, in an order drawn at random.

    Attributes:
        outputs: tokens of their answers, which are declared and predicted exactly.
        prompt_tokens: of each of them.
    """

    name: str
    outputs: tuple[int, ...]
    prompt_tokens: int = 1
    seed: int = 0
    load: None = None
    rate: None = None

    def __post_init__(self) -> None:
        self.draw()  # complains of lengths that are none

    def draw(self, capacity_rps: float | None = None, rng: np.random.Generator | None = None) -> Requests:
        rng = _generator(self.seed) if rng is None else rng
        outputs = rng.permutation(np.asarray(self.outputs))
        return Requests.of(np.zeros(len(outputs)), np.full(len(outputs), self.prompt_tokens), outputs)

    def moments(self) -> Moments:
        outputs = np.asarray(self.outputs)
        return Moments.of(np.full(len(outputs), self.prompt_tokens), outputs)

    def options(self) -> tuple[str, ...]:
        return ("outputs", "prompt_tokens", "seed")


def at_rate(requests: Requests, rate: float) -> Requests:
    """The same requests, the first at time 0 and all gaps stretched to a mean of `rate` requests/s."""
    if not 0 < rate < math.inf:
        raise InputError(f"rate must be a positive number of requests/s, not {rate!r}")
    times = requests.arrival_s - requests.arrival_s[0]
    if len(requests) > 1:
        if times[-1] <= 0:
            raise InputError("cannot stretch to a rate: all requests arrive at the same time")
        times = times * ((len(requests) - 1) / times[-1] / rate)
    return requests.replace(arrival_s=times)


def _check(workload: Workload) -> None:
    """Load and rate are positive and not both there."""
    if workload.load is not None and workload.rate is not None:
        raise InputError(
            f"workload {workload.name}: load {workload.load} and rate {workload.rate} "
            "exclude each other; give one"
        )
    for name in ("load", "rate"):
        value = getattr(workload, name)
        if value is not None and not (_is_number(value) and 0 < value < math.inf):
            raise InputError(f"workload {workload.name}: {name} must be a positive number, not {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


class _Mixture:
    """Classes and the limits of their lengths, made ready for drawing."""

    def __init__(self, classes: tuple[RequestClass, ...], clip: Clip) -> None:
        self._shares = np.cumsum([c.share for c in classes])
        self._lengths = Mixture([c.lengths for c in classes])
        self._clip = clip
        self._small = max(x.largest for c in classes for x in (c.lengths.prompt, c.lengths.output)) < 2**31
        names = ("client", "class_id", "priority", "ttft_target_s", "tpot_target_s")
        self._marks = {name: _narrow(np.array([getattr(c, name) for c in classes])) for name in names}

    def draw(self, u: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Class, prompt and output tokens of each row of uniforms (n, 3)."""
        shares = self._shares
        if len(shares) == 1:
            kind = np.zeros(len(u), np.int64)
        else:
            kind = np.minimum(shares.searchsorted(u[:, 0] * shares[-1], side="right"), len(shares) - 1)
        return kind, *self._clip(*self._lengths.tokens(kind, u[:, 1:]))

    def narrow(self, *columns: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """Drawn lengths as int32 if they all fit: `Requests.of` then need not look at each."""
        return (column.astype(np.int32) if self._small else column for column in columns)

    def columns(self, kind: NDArray[np.int64]) -> dict[str, Any]:
        """What all requests of a class have in common, for requests of these classes: arrays (n,) by name."""
        return {name: of_class[kind] for name, of_class in self._marks.items()}


def _narrow(column: NDArray[Any]) -> NDArray[Any]:
    """int64 as int32 where no value is lost."""
    if column.dtype == np.int64 and column.min() >= -(2**31) and column.max() < 2**31:
        return column.astype(np.int32)
    return column


@lru_cache(maxsize=256)
def _moments(classes: tuple[RequestClass, ...], clip: Clip) -> Moments:
    # Roberts' generalised golden ratio in three dimensions: g^4 = g + 1.
    g = 1.2207440846057596
    u = (0.5 + np.outer(np.arange(1, _SAMPLE + 1), [1 / g, 1 / g**2, 1 / g**3])) % 1.0
    return Moments.of(*_Mixture(classes, clip).draw(u)[1:])


# Rules that draw no random numbers, and the generator that they are given: to make one takes 6 microseconds.
_CERTAIN = (
    arrivals.AtOnce,
    arrivals.Deterministic,
    predictions.Oracle,
    predictions.NoPrediction,
    predictions.PowerOfTwo,
    predictions.Cap,
    predictions.Exact,
)
_UNUSED = np.random.default_rng(0)


def _stream(seed: np.int64, rule: object) -> np.random.Generator:
    """The random numbers of a rule."""
    return _UNUSED if type(rule) in _CERTAIN else np.random.default_rng(int(seed))


def _generator(seed: int) -> np.random.Generator:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed {seed!r} is not a whole number of at least 0")
    return np.random.default_rng(seed)
