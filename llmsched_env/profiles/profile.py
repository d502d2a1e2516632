"""A cost profile: a form of `core.cost` with its parameters, and the KV capacity."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsched_env.core.cost import CODES, PARAMETERS, batch_times
from llmsched_env.errors import InputError, unknown
from llmsched_env.files import writing
from llmsched_env.profiles import table

UNITS = {"infermax": "milliseconds per layer; tokens"}
"""The units of a form's parameters, where not seconds and tokens."""

_OPTIONAL = {"floor": 0.0}
_POSITIVE = {"layers", "b0"}


class Custom(Protocol):
    """A cost model of the user: pure arithmetic on six floats that numba can compile."""

    def __call__(self, P: float, NP: float, CX: float, KP: float, D: float, KV: float, /) -> float:
        """Seconds that a batch takes; the features are those of `core.cost`."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """How long an iteration takes, and how much KV cache there is. Validated when made.

    Attributes:
        name: for tables and error messages.
        form: hinge, linear, staircase, piecewise, infermax, roofline, table or custom; see `core.cost`.
        params: the form's parameters by name; in seconds and tokens, but for infermax milliseconds per layer.
        kv_tokens: KV cache in tokens, all GPUs together; None: unknown, the engine's settings have to say.
        kv_bytes_per_token: bytes of a token's KV cache, all GPUs together; None: unknown, swaps take no time.
        gpus: how many GPUs the engine spans (tensor parallel).
        gpu, model: what was measured, for people.
        cpu_s: CPU seconds of every iteration, added to the GPU's.
        cpu_s_per_request: CPU seconds for each request in a batch.
        provenance: where the numbers are from.
        fit: errors of the fit, such as `median_rel`, the median relative error on held-out batches.
    """

    name: str
    form: str
    params: Mapping[str, Any]
    kv_tokens: int | None = None
    kv_bytes_per_token: float | None = None
    gpus: int = 1
    gpu: str = "unknown"
    model: str = "unknown"
    cpu_s: float = 0.0
    cpu_s_per_request: float = 0.0
    provenance: str = "given by the user"
    fit: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in ("name", "form", "gpu", "model", "provenance"):
            if not isinstance(getattr(self, field), str):
                raise self._error(f"{field} {getattr(self, field)!r} is not a text")
        if self.form not in CODES:
            raise unknown(f"form of profile {self.name}", self.form, CODES)
        for field in ("params", "fit"):
            if not isinstance(getattr(self, field), Mapping):
                raise self._error(f"{field} must map names to numbers")
        wanted = PARAMETERS[self.form]
        for key in self.params:
            if key not in wanted:
                raise unknown(f"parameter of form {self.form} in profile {self.name}", key, wanted)
        missing = [key for key in wanted if key not in self.params and key not in _OPTIONAL]
        if missing:
            raise self._error(f"form {self.form} also needs the parameters {', '.join(missing)}")
        self._require("cpu_s", self.cpu_s)
        self._require("cpu_s_per_request", self.cpu_s_per_request)
        self._require("gpus", self.gpus, positive=True, whole=True)
        if self.kv_tokens is not None:
            self._require("kv_tokens", self.kv_tokens, positive=True, whole=True)
        if self.kv_bytes_per_token is not None:
            self._require("kv_bytes_per_token", self.kv_bytes_per_token, positive=True)
        if self.form == "custom":
            _address(self.params["function"])  # compiles, or says why not
        elif self.form == "table":
            table.check(self.name, self.params)
        else:
            for key, value in self.params.items():
                self._require(f"parameter {key}", value, positive=key in _POSITIVE)
        least = self.time([1, 0], [1, 0], [0.5, 0], [0, 0], [0, 1], [0, 1])
        if not (np.isfinite(least) & (least > 0)).all():
            raise self._error(
                f"one token takes {least[0]} s (prefill), {least[1]} s (decode); both must take time: "
                "give parameters, or measurements, of prefills and of decodes"
            )

    def pack(self) -> NDArray[np.float64]:
        """The float64 vector of `core.cost.batch_time`; of a custom profile, good in this process only."""
        head = [CODES[self.form], self.cpu_s, self.cpu_s_per_request]
        if self.form == "custom":
            bits = np.array([_address(self.params["function"])], dtype=np.int64).view(np.float64)
            return np.concatenate([np.array(head, dtype=np.float64), bits])
        if self.form == "table":
            return np.array([*head, *table.pack(self.params)], dtype=np.float64)
        values = [self.params.get(key, _OPTIONAL.get(key)) for key in PARAMETERS[self.form]]
        return np.array(head + values, dtype=np.float64)

    def time(
        self, P: ArrayLike, NP: ArrayLike, CX: ArrayLike, KP: ArrayLike, D: ArrayLike, KV: ArrayLike
    ) -> Any:
        """Seconds that batches take; arrays of the six features of `core.cost` are broadcast.

        Returns:
            float64 of the broadcast shape; a number if all features are numbers.
        """
        columns = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (P, NP, CX, KP, D, KV)))
        seconds = np.empty(columns[0].size)
        features = np.stack([column.ravel() for column in columns], axis=1)
        batch_times(self.pack(), features, seconds)
        return seconds.reshape(columns[0].shape)[()]

    def replace(self, **changes: Any) -> Profile:
        """A copy with some attributes changed, validated anew."""
        return dataclasses.replace(self, **changes)

    @staticmethod
    def custom(function: Callable[..., float], kv_tokens: int | None = None, **attributes: Any) -> Profile:
        """A profile from a function of the user: f(P, NP, CX, KP, D, KV) -> seconds, compiled by numba.

        The six features are float64, see `core.cost`. The compiled loop calls its machine code.

        Args:
            function: a Python function, or one that numba.njit compiled.
            kv_tokens: KV cache in tokens.
            attributes: any other attribute of a Profile.

        Raises:
            InputError: numba cannot compile the function, or a batch of one token takes no positive time.
        """
        attributes = {"name": getattr(function, "__name__", "custom"), **attributes}
        return Profile(form="custom", params={"function": function}, kv_tokens=kv_tokens, **attributes)

    @staticmethod
    def from_table(path: str | Path, kv_tokens: int | None = None, **attributes: Any) -> Profile:
        """A profile from a CSV of iteration times measured on a grid, interpolated: see `core.cost._table`.

        Columns: prefill_tokens, decodes, context (tokens that each decode reads; may be missing), seconds.
        Times measured repeatedly at one point give their median. Every combination has to be there, with two
        exceptions: without decodes any one context will do, and the empty batch (0, 0) may be missing. The
        context of prefills is no dimension: measure with prompts and chunks like those that you simulate.

        Raises:
            InputError: names the column, row or grid point that is missing or wrong.
        """
        attributes = {"name": Path(path).stem, "provenance": f"measured: {Path(path).name}", **attributes}
        return Profile(form="table", params=table.read(path), kv_tokens=kv_tokens, **attributes)

    def _require(self, what: str, value: Any, positive: bool = False, whole: bool = False) -> None:
        kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
        good = isinstance(value, kinds) and not isinstance(value, bool)
        good = good and math.isfinite(value) and (value > 0 if positive else value >= 0)
        if not good:
            kind = "whole number" if whole else "finite number"
            limit = "above 0" if positive else "of at least 0"
            raise self._error(f"{what} is {value!r}; it must be a {kind} {limit}")

    def _error(self, problem: str) -> InputError:
        return InputError(f"profile {self.name}: {problem}")


def load(path: str | Path) -> Profile:
    """The profile in a JSON file: the attributes of Profile by name; what has a default may be left out.

    Raises:
        InputError: no such file, no JSON, a missing, unknown or impossible value.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read profile {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"profile {path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"profile {path} must be a JSON object with name, form, params")
    data.pop("units", None)
    fields = {field.name: field for field in dataclasses.fields(Profile)}
    for key in data:
        if key not in fields:
            raise unknown(f"key in profile {path}", key, fields)
    missing = [key for key in ("name", "form", "params") if key not in data]
    if missing:
        raise InputError(f"profile {path} lacks {', '.join(missing)}")
    if data["form"] == "custom":
        raise InputError(f"profile {path}: a custom function cannot come from a file; use Profile.custom")
    return Profile(**data)


def save(profile: Profile, path: str | Path) -> None:
    """Write `profile` as JSON, whole or not at all.

    Raises:
        InputError: a custom profile, which is code.
    """
    if profile.form == "custom":
        raise InputError(f"profile {profile.name} is custom, a function: it cannot be saved as JSON")
    data = {"units": UNITS.get(profile.form, "seconds, tokens, bytes"), **dataclasses.asdict(profile)}
    order = ["name", "form", "params", "units"]
    data = {key: data[key] for key in (*order, *(k for k in data if k not in order))}
    with writing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, default=float) + "\n", encoding="utf-8")


@cache
def _compiled(function: Callable[..., float]) -> Any:
    """`function` as machine code, kept as long as the process."""
    inner = function if hasattr(function, "py_func") else numba.njit(error_model="numpy")(function)

    def outer(P: float, NP: float, CX: float, KP: float, D: float, KV: float) -> float:
        return float(inner(P, NP, CX, KP, D, KV))

    number = numba.types.float64
    return numba.cfunc(number(*[number] * 6), error_model="numpy")(outer)


def _address(function: Any) -> int:
    if not callable(function):
        raise InputError(f"custom cost model {function!r} is no function f(P, NP, CX, KP, D, KV) -> seconds")
    try:
        return int(_compiled(function).address)
    except Exception as error:  # numba raises its own, and what the function's constants raise
        name = getattr(function, "__name__", "?")
        lines = [line for line in str(error).splitlines() if line and not line.startswith("Failed in")]
        reason = lines[0] if lines else type(error).__name__
        call = f"{name}(P, NP, CX, KP, D, KV)"
        raise InputError(f"numba cannot compile the custom cost model {call}: {reason}") from None
