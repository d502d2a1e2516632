"""`Reference`: what is known of the best schedule of an episode, to hold other schedules against."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env.errors import InputError, unknown
from llmsched_env.files import writing


@dataclasses.dataclass(frozen=True)
class Reference:
    """Mean latencies of an episode, in seconds: what has been reached, what cannot be, and what vLLM V1 does.

    Attributes:
        best_known: of the best schedule that is known.
        bound: no schedule has less; 0 if nothing is known.
        vllm_v1: of vLLM V1's scheduler on the same requests and engine; nan if it is not known.
        method: how the schedule was found.
        seed: the episode is the first after `reset(seed=seed)`; None: every episode of the scenario.

    Raises:
        InputError: numbers that contradict each other.
    """

    best_known: float
    bound: float = 0.0
    vllm_v1: float = math.nan
    method: str = ""
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("best_known", "bound", "vllm_v1"):
            value = getattr(self, name)
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            unsaid = name == "vllm_v1" and number and math.isnan(value)
            if not unsaid and not (number and 0 <= value < math.inf):
                raise InputError(f"reference: {name} must be seconds from 0, not {value!r}")
        if not isinstance(self.method, str):
            raise InputError(f"reference: method must be a text, not {self.method!r}")
        whole = isinstance(self.seed, int | np.integer) and not isinstance(self.seed, bool)
        if self.seed is not None and not (whole and self.seed >= 0):
            raise InputError(f"reference: seed must be a whole number from 0, or None, not {self.seed!r}")
        if self.best_known <= 0:
            raise InputError(f"reference: best_known must be positive seconds, not {self.best_known!r}")
        if self.bound > self.best_known * (1 + 1e-9):
            raise InputError(
                f"reference: the bound of {self.bound:g} s is above the best known {self.best_known:g} s"
            )

    @staticmethod
    def of(given: Any) -> Reference:
        """From a mapping with the attributes, or a reference itself.

        Raises:
            InputError: if it is neither, or has an unknown or a wrong attribute.
        """
        if isinstance(given, Reference):
            return given
        if not isinstance(given, dict) or "best_known" not in given:
            raise InputError(f"a reference is a Reference or a mapping with best_known, not {given!r}")
        names = [field.name for field in dataclasses.fields(Reference)]
        for name in given:
            if name not in names:
                raise unknown("attribute of a reference", name, names)
        return Reference(**given)

    @property
    def optimal(self) -> bool:
        """Whether the bound proves the best known schedule optimal."""
        return self.bound >= self.best_known * (1 - 1e-9)

    def score(self, latency_s: float) -> float:
        """How far a mean latency has come from vLLM V1's, 0, to the best known, 1; nan where there is nothing
        between them."""
        way = self.vllm_v1 - self.best_known
        return (self.vllm_v1 - latency_s) / way if way > 0 else math.nan

    def summary(self) -> dict[str, Any]:
        """For infos: best_known, or optimum if it is one; bound, vllm_v1 and method."""
        best = "optimum" if self.optimal else "best_known"
        return {best: self.best_known, "bound": self.bound, "vllm_v1": self.vllm_v1, "method": self.method}


def described(references: Iterable[Reference]) -> list[dict[str, Any]]:
    """As JSON and YAML have them: the attributes that are not as by default."""
    plain = dataclasses.asdict(Reference(1.0))
    return [
        {k: v for k, v in dataclasses.asdict(r).items() if k == "best_known" or not _equal(v, plain[k])}
        for r in references
    ]


def _equal(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)  # nan is nan


def load(path: Path) -> tuple[Reference, ...]:
    """The references in a JSON file that `save` wrote.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["references"]
        return tuple(Reference.of(row) for row in rows)
    except OSError as error:
        raise InputError(f"references {path}: cannot be read: {error.strerror or error}") from None
    except InputError as error:
        raise InputError(f"references {path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"references {path}: not references in JSON: {error}") from None


def save(references: Iterable[Reference], path: Path, **about: str) -> None:
    """Write a JSON file with a line a reference, whole or not at all; `about` says what made them."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in described(references))
    head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
    with writing(path) as temporary:
        temporary.write_text(f'{{\n{head}  "references": [\n{rows}\n  ]\n}}\n', encoding="utf-8")
