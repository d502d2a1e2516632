"""Requests: what arrives, as equally long arrays, validated once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsched_env.core.compile import njit
from llmsched_env.errors import InputError

_LARGEST = 2**30  # tokens; leaves room for sums of two lengths in 32 bits


@dataclasses.dataclass(frozen=True)
class Requests:
    """N requests in order of arrival. Build with `Requests.of`, which fills defaults and validates.

    All arrays have shape (N,).

    Attributes:
        arrival_s: float64, seconds, finite, >= 0, non-decreasing.
        prompt_tokens: int32, >= 1.
        output_tokens: int32, >= 1: the true output length, where the answer ends by itself or at the declared
            maximum.
        declared_tokens: int32, >= output: the `max_tokens` a client asked for; what TensorRT-LLM, TGI and
            LightLLM decide with.
        predicted_tokens: float64, > 0 or nan (no prediction): the output length a predictor announces.
        priority: int32, lower is served first.
        client: int32, >= 0: the tenant, for fairness.
        class_id: int32, >= 0: the class of service.
        ttft_target_s, tpot_target_s: float64, seconds, > 0; inf where there is no target.
        names: N strings, or None (then a request's name is its index).
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    declared_tokens: NDArray[np.int32]
    predicted_tokens: NDArray[np.float64]
    priority: NDArray[np.int32]
    client: NDArray[np.int32]
    class_id: NDArray[np.int32]
    ttft_target_s: NDArray[np.float64]
    tpot_target_s: NDArray[np.float64]
    names: tuple[str, ...] | None = None

    @staticmethod
    def of(
        arrival_s: ArrayLike,
        prompt_tokens: ArrayLike,
        output_tokens: ArrayLike,
        *,
        declared_tokens: ArrayLike | None = None,
        predicted_tokens: ArrayLike | None = None,
        priority: ArrayLike = 0,
        client: ArrayLike = 0,
        class_id: ArrayLike = 0,
        ttft_target_s: ArrayLike = np.inf,
        tpot_target_s: ArrayLike = np.inf,
        names: Sequence[str] | None = None,
    ) -> Requests:
        """Requests from array-likes; scalars are repeated.

        `declared_tokens` defaults to the true output (each answer ends at its declared maximum) and
        `predicted_tokens` to the true output (an oracle); pass nan for "no prediction".

        Raises:
            InputError: names the first bad row and what is wrong with it.
        """
        arrival = _column("arrival_s", arrival_s, None, np.float64)
        n = len(arrival)
        if n == 0:
            raise InputError("no requests: the workload is empty; give at least one request")
        output = _column("output_tokens", output_tokens, n, np.int32)
        return Requests(
            arrival_s=arrival,
            prompt_tokens=_column("prompt_tokens", prompt_tokens, n, np.int32),
            output_tokens=output,
            declared_tokens=_column(
                "declared_tokens", output if declared_tokens is None else declared_tokens, n, np.int32
            ),
            predicted_tokens=_column(
                "predicted_tokens", output if predicted_tokens is None else predicted_tokens, n, np.float64
            ),
            priority=_column("priority", priority, n, np.int32),
            client=_column("client", client, n, np.int32),
            class_id=_column("class_id", class_id, n, np.int32),
            ttft_target_s=_column("ttft_target_s", ttft_target_s, n, np.float64),
            tpot_target_s=_column("tpot_target_s", tpot_target_s, n, np.float64),
            names=None if names is None else tuple(map(str, names)),
        )

    def __post_init__(self) -> None:
        n = len(self.arrival_s)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and len(value) != n:
                raise InputError(
                    f"{field.name} has {len(value)} values for {n} requests; give one for each request"
                )
        columns = [getattr(self, field.name) for field in dataclasses.fields(self)[:-1]]
        if all(c.flags.c_contiguous for c in columns) and _valid(*columns):
            return
        arrival = self.arrival_s
        self._require(
            np.isfinite(arrival), "arrival_s", "is not a finite number; give seconds from the start"
        )
        self._require(arrival >= 0, "arrival_s", "is negative; shift the trace so that it starts at 0")
        self._require(
            np.diff(arrival, prepend=arrival[:1]) >= 0,
            "arrival_s",
            "is before the one above; sort by arrival",
        )
        for name in ("prompt_tokens", "output_tokens"):
            self._require(getattr(self, name) >= 1, name, "must be at least 1; drop requests without tokens")
            self._require(getattr(self, name) <= _LARGEST, name, "is too large; is the column right?")
        self._require(
            self.declared_tokens >= self.output_tokens,
            "declared_tokens",
            "is below output_tokens; an answer cannot pass its maximum",
        )
        self._require(
            ~(self.predicted_tokens <= 0) & (self.predicted_tokens != np.inf),
            "predicted_tokens",
            "must be positive and finite, or nan for no prediction",
        )
        for name in ("client", "class_id"):
            self._require(getattr(self, name) >= 0, name, "must not be negative; number them from 0")
        for name in ("ttft_target_s", "tpot_target_s"):
            self._require(getattr(self, name) > 0, name, "must be positive, or inf for no target")

    def __len__(self) -> int:
        return len(self.arrival_s)

    def name(self, i: int) -> str:
        """The name of request i, for messages and tables."""
        return self.names[i] if self.names is not None else str(i)

    def replace(self, **changes: Any) -> Requests:
        """A copy with some columns replaced (scalars are repeated), validated anew."""
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Requests.of(**{**columns, **changes})

    def take(self, index: NDArray[np.int64] | slice) -> Requests:
        """The requests at `index` (in arrival order), as a new object."""
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        names = columns.pop("names")
        if names is not None:
            names = tuple(np.asarray(names, dtype=object)[index])
        return Requests(**{k: v[index] for k, v in columns.items()}, names=names)

    def _require(self, good: NDArray[np.bool_], column: str, problem: str) -> None:
        if not good.all():
            i = int(np.argmin(good))
            raise InputError(f"request {self.name(i)}: {column} {getattr(self, column)[i]} {problem}")


@njit
def _valid(  # type: ignore[no-untyped-def]
    arrival, prompt, output, declared, predicted, priority, client, class_id, ttft, tpot
) -> bool:
    """Whether all is as it should be; one pass, for environments draw requests often."""
    before = 0.0
    for i in range(len(arrival)):
        good = before <= arrival[i] < np.inf
        good &= 1 <= prompt[i] <= _LARGEST and 1 <= output[i] <= _LARGEST and declared[i] >= output[i]
        good &= not predicted[i] <= 0.0 and predicted[i] != np.inf and client[i] >= 0 and class_id[i] >= 0
        good &= ttft[i] > 0.0 and tpot[i] > 0.0
        if not good:
            return False
        before = arrival[i]
    return True


def _column(name: str, values: ArrayLike, n: int | None, dtype: type) -> NDArray[Any]:
    """`values` as a contiguous array of `dtype` and length n; an integer column refuses fractions, nan and
    overflow.
    """
    if isinstance(values, np.ndarray) and values.dtype == dtype and values.shape == (n,):
        return np.ascontiguousarray(values)
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "iufb":
            array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not a column of numbers: {error}") from None
    if array.ndim == 0 and n is not None:
        array = np.full(n, array)
    if array.ndim != 1:
        raise InputError(f"{name} must be one-dimensional, not of shape {array.shape}")
    if np.issubdtype(dtype, np.integer) and array.dtype != dtype:
        limits = np.iinfo(dtype)
        if array.dtype.kind in "iu":
            good = len(array) == 0 or (array.min() >= limits.min and array.max() <= limits.max)
        else:
            good = False
        if not good:
            with np.errstate(invalid="ignore"):
                bad = ~((array >= limits.min) & (array <= limits.max) & (array == np.floor(array)))
        if not good and bad.any():
            i = int(np.argmax(bad))
            raise InputError(
                f"request {i}: {name} {array[i]} is not a whole number in range; give a count of tokens"
            )
    return np.ascontiguousarray(array, dtype=dtype)
