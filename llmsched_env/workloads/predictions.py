"""What a scheduler is told of an output length: a prediction, and the maximum that the client declares."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from llmsched_env.errors import InputError
from llmsched_env.workloads.arrivals import build
from llmsched_env.workloads.lengths import normal_quantile


@runtime_checkable
class Prediction(Protocol):
    """A predictor of output lengths."""

    def predict(self, output: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
        """Predicted output tokens, float64 (n,), > 0 or nan, for true outputs (n,)."""
        ...


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The true length."""

    def predict(self, output: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
        return output.astype(np.float64)


@dataclasses.dataclass(frozen=True)
class NoPrediction:
    """nan: nothing is announced."""

    def predict(self, output: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
        return np.full(len(output), np.nan)


@dataclasses.dataclass(frozen=True)
class LognormalError:
    """The true length times exp(sigma Z), Z standard normal: right in the median; at least one token."""

    sigma: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise InputError(f"prediction 'lognormal': sigma must be 0 or more, not {self.sigma!r}")

    def predict(self, output: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
        return np.maximum(1.0, output * np.exp(self.sigma * rng.standard_normal(len(output))))


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The upper end of the length's bucket of `width` tokens, as by a classifier that is right with
    probability `accuracy`.

    A wrong answer is a neighbouring bucket, either with equal chance (below the first: the first).
    """

    width: float = 128
    accuracy: float = 1.0

    def __post_init__(self) -> None:
        if not (self.width >= 1 and 0 <= self.accuracy <= 1):
            raise InputError(
                f"prediction 'bucket': width {self.width!r} must be 1 or more "
                f"and accuracy {self.accuracy!r} in 0..1"
            )

    def predict(self, output: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
        draw = rng.random(len(output))
        step = np.where(draw < self.accuracy, 0, np.where(draw < 0.5 * (1 + self.accuracy), 1, -1))
        return np.maximum(np.ceil(output / self.width) + step, 1.0) * self.width


@dataclasses.dataclass(frozen=True)
class OneBit:
    """Short or long, told wrongly with probability `error`: the mean of the truly short (or long) outputs of
    the draw.

    Attributes:
        threshold: an output above it is long; 0 takes the median of the draw.
    """

    threshold: float = 0.0
    error: float = 0.0

    def __post_init__(self) -> None:
        if not (self.threshold >= 0 and 0 <= self.error <= 1):
            raise InputError(
                f"prediction 'one-bit': threshold {self.threshold!r} must be 0 or more "
                f"and error {self.error!r} in 0..1"
            )

    def predict(self, output: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
        is_long = output > (self.threshold or np.median(output))
        means = [
            float(output[side].mean()) if side.any() else float(output.mean()) for side in (~is_long, is_long)
        ]
        told_long = is_long ^ (rng.random(len(output)) < self.error)
        return np.where(told_long, means[1], means[0])


@runtime_checkable
class Declared(Protocol):
    """A rule for the `max_tokens` that clients ask for."""

    def declare(self, output: NDArray[np.int64], largest: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Declared maxima, int64 (n,), >= output (n,), where no output of the workload passes `largest`."""
        ...

    def most(self, largest: int) -> int:
        """What no declared maximum passes, where no output passes `largest`."""
        ...


@dataclasses.dataclass(frozen=True)
class PowerOfTwo:
    """The same for all: the smallest power of two that no output of the workload passes."""

    def declare(self, output: NDArray[np.int64], largest: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return np.full(len(output), power_of_two(largest), dtype=np.int64)

    def most(self, largest: int) -> int:
        return power_of_two(largest)


@dataclasses.dataclass(frozen=True)
class Cap:
    """The same for all: `tokens`, not below the longest output that the workload can have."""

    tokens: float

    def declare(self, output: NDArray[np.int64], largest: int, rng: np.random.Generator) -> NDArray[np.int64]:
        if self.tokens < largest:
            raise InputError(
                f"declared maximum {self.tokens:g} is below the longest output {largest}; "
                "take at least that, or cut outputs with "
                f"max_output={self.tokens:g}"
            )
        return np.full(len(output), int(self.tokens), dtype=np.int64)

    def most(self, largest: int) -> int:
        return int(self.tokens)


@dataclasses.dataclass(frozen=True)
class OverDeclared:
    """The true output times exp(sigma |Z|), rounded up, at most the power of two."""

    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise InputError(f"declared 'lognormal': sigma must be 0 or more, not {self.sigma!r}")

    def declare(self, output: NDArray[np.int64], largest: int, rng: np.random.Generator) -> NDArray[np.int64]:
        factor = np.exp(self.sigma * np.abs(normal_quantile(rng.random(len(output)))))
        return np.minimum(np.ceil(output * factor), power_of_two(largest)).astype(np.int64)

    def most(self, largest: int) -> int:
        return power_of_two(largest)


@dataclasses.dataclass(frozen=True)
class Exact:
    """The true output: every answer ends at its declared maximum."""

    def declare(self, output: NDArray[np.int64], largest: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return output.astype(np.int64)

    def most(self, largest: int) -> int:
        return largest


PREDICTIONS: dict[str, Any] = {
    "oracle": Oracle,
    "none": NoPrediction,
    "lognormal": LognormalError,
    "bucket": Bucket,
    "one-bit": OneBit,
}
DECLARED: dict[str, Any] = {
    "power-of-two": PowerOfTwo,
    "cap": Cap,
    "lognormal": OverDeclared,
    "exact": Exact,
}


def get(spec: str | Prediction) -> Prediction:
    """A predictor by name, with its settings after a colon, as in "lognormal:0.5" and "bucket:128,0.9"."""
    if isinstance(spec, str):
        return build("prediction", PREDICTIONS, spec)
    if not isinstance(spec, Prediction):
        raise InputError(f"prediction {spec!r} is none; give a name such as 'lognormal:0.5', or an object")
    return spec


def get_declared(spec: str | int | Declared) -> Declared:
    """A rule for declared maxima: "power-of-two", a number of tokens, "lognormal:1", "exact"."""
    if isinstance(spec, (int, np.integer)):
        return Cap(int(spec))
    if spec == "cap":
        raise InputError("declared 'cap' needs its tokens, as in 'cap:1024'")
    if isinstance(spec, str):
        return build("declared", DECLARED, spec)
    if not hasattr(spec, "declare"):
        raise InputError(f"declared {spec!r} is no rule; give a name such as 'exact', a number, or an object")
    return spec


def power_of_two(largest: int) -> int:
    """The smallest power of two >= largest."""
    return 1 << (int(largest) - 1).bit_length()
