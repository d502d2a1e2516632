"""Workloads by name: fitted to public traces, synthetic, your own, or a trace read from a file.

>>> requests = get("azure-conv", num_requests=500, rate=4.0, seed=1).draw()
>>> len(requests), int(requests.declared_tokens.max())
(500, 1024)
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from llmsched_env.errors import InputError, unknown
from llmsched_env.workloads import arrivals as _arrivals
from llmsched_env.workloads import predictions as _predictions
from llmsched_env.workloads import traces
from llmsched_env.workloads.arrivals import Arrivals
from llmsched_env.workloads.lengths import Cells, Fixed, Lengths, Moments, Rank, Table
from llmsched_env.workloads.predictions import Declared, Prediction
from llmsched_env.workloads.workload import Replay, RequestClass, Shuffled, Synthetic, Workload, at_rate

__all__ = [
    "Lengths",
    "Moments",
    "Replay",
    "RequestClass",
    "Shuffled",
    "Synthetic",
    "Workload",
    "at_rate",
    "get",
    "names",
    "register",
    "summary",
    "trace",
]

_FIXED = re.compile(r"fixed-(\d{1,9})-(\d{1,9})")
_EXAMPLE = "fixed-100-100"


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a name stands for."""

    summary: str
    classes: tuple[RequestClass, ...]
    arrivals: Arrivals
    rate: float | None


_registered: dict[str, _Source] = {}


def names() -> list[str]:
    """The names that `get` knows; "fixed-100-100" stands for every "fixed-P-D"."""
    return sorted({*_embedded(), *_registered, _EXAMPLE})


def summary(name: str) -> str:
    """One line on a workload: what it is and where it comes from."""
    return _source(name).summary


def get(
    name: str,
    *,
    num_requests: int = 1000,
    load: float | None = None,
    rate: float | None = None,
    seed: int = 0,
    arrivals: str | Arrivals | None = None,
    cv: float | None = None,
    prediction: str | Prediction = "oracle",
    declared: str | int | Declared = "power-of-two",
    max_prompt: int | None = None,
    max_output: int | None = None,
    max_total: int | None = None,
    ttft_target_s: float | None = None,
    tpot_target_s: float | None = None,
    **other: Any,
) -> Synthetic:
    """A workload by name.

    Args:
        name: one of `names()`, or "fixed-P-D": Poisson arrivals of requests with P prompt and D output
            tokens.
        num_requests: how many. A recorded rate profile is followed from its start and repeated as needed.
        load: offered load, a share of the engine's capacity (`theory.capacity`), resolved when it is drawn.
        rate: mean requests/s, in place of `load`. With neither, the trace's own rate.
        seed: of all that is drawn.
        arrivals: another arrival process: "poisson", "gamma:3", "weibull:3", "bursts:4,0.1,50",
            "ramp:0.5,1.5", "diurnal:0.5,1000", "deterministic", "at-once", or an object of
            `workloads.arrivals`.
        cv: coefficient of variation of the gaps, for "gamma" (the default where `cv` is given) and "weibull".
        prediction: "oracle", "lognormal:0.5", "bucket:128", "bucket:128,0.9", "one-bit", "one-bit:0,0.1",
            "none".
        declared: the clients' `max_tokens`: "power-of-two" (one for all that no output passes), a number,
            "lognormal:1" (over-declared), "exact".
        max_prompt, max_output, max_total: cut lengths (a total is cut at the prompt's side).
        ttft_target_s, tpot_target_s: targets of all requests, in place of the classes' own.

    Raises:
        InputError: unknown name or option (with the nearest match), or settings that contradict each other.
    """
    if other:
        options = [*(get.__kwdefaults__ or {})]
        raise unknown("workload option", next(iter(other)), options)
    source = _source(name)
    made = Synthetic(name, source.classes, arrivals=source.arrivals, own_rate=source.rate)
    return made.replace(
        num_requests=num_requests,
        load=load,
        rate=rate,
        seed=seed,
        arrivals=arrivals,
        cv=cv,
        prediction=prediction,
        declared=declared,
        max_prompt=max_prompt,
        max_output=max_output,
        max_total=max_total,
        ttft_target_s=ttft_target_s,
        tpot_target_s=tpot_target_s,
    )


def trace(
    path: str | Path,
    *,
    num_requests: int | None = None,
    load: float | None = None,
    rate: float | None = None,
    prediction: str | Prediction | None = None,
    declared: str | int | Declared | None = None,
    seed: int = 0,
    **options: Any,
) -> Replay:
    """The requests of a trace file, replayed as recorded or stretched to a load or rate.

    Args:
        path: CSV, CSV.gz or JSONL; see `traces.read`.
        num_requests: only the first so many.
        load, rate: stretch all gaps to a share of the engine's capacity, or to requests/s.
        prediction, declared: as in `get`; None keeps the trace's columns (by default the true output).
        options: further options of `traces.read`.
    """
    requests = traces.read(path, limit=num_requests, seed=seed, **options)
    return Replay(
        name=Path(path).name,
        requests=requests,
        load=load,
        rate=rate,
        prediction=None if prediction is None else _predictions.get(prediction),
        declared=None if declared is None else _predictions.get_declared(declared),
        seed=seed,
    )


def register(
    name: str,
    classes: RequestClass | Lengths | Iterable[RequestClass],
    *,
    arrivals: str | Arrivals = "poisson",
    rate: float | None = None,
    summary: str = "",
) -> None:
    """Add a workload of your own to the names.

    Args:
        classes: a mixture of classes or tenants, or the lengths of the only class.
        arrivals: its arrival process.
        rate: its own rate in requests/s, taken where neither load nor rate is asked for.

    Raises:
        InputError: if the name is one of the package's.
    """
    if name in _embedded() or _FIXED.fullmatch(name):
        raise InputError(f"workload {name!r} is the package's own; choose another name")
    if isinstance(classes, Lengths):
        classes = RequestClass(classes)
    kinds = (classes,) if isinstance(classes, RequestClass) else tuple(classes)
    process = _arrivals.get(arrivals)
    Synthetic(name, kinds, arrivals=process)  # complains of what it cannot draw from
    _registered[name] = _Source(summary or f"registered; {len(kinds)} class(es)", kinds, process, rate)


def _source(name: str) -> _Source:
    if name in _registered:
        return _registered[name]
    if name in _embedded():
        return _load(name)
    match = _FIXED.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise unknown("workload", name, names())
    prompt, output = int(match[1]), int(match[2])
    lengths = Lengths(Fixed(prompt), Fixed(output))
    text = f"synthetic: Poisson arrivals, {prompt} prompt and {output} output tokens (any fixed-P-D)"
    return _Source(text, (RequestClass(lengths),), _arrivals.Poisson(), None)


@lru_cache(maxsize=1)
def _embedded() -> tuple[str, ...]:
    files = resources.files(__name__).joinpath("data").iterdir()
    return tuple(sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json")))


@lru_cache(maxsize=32)
def _load(name: str) -> _Source:
    """A table written by scripts/fit_workload.py."""
    data = json.loads(resources.files(__name__).joinpath("data").joinpath(f"{name}.json").read_text("utf-8"))
    classes = []
    for c in data["classes"]:
        if "cells" in c:
            levels, counts = c["cells"]["levels"], c["cells"]["counts"]
            dependence: Cells | Rank = Cells(tuple(levels), tuple(tuple(row) for row in counts))
        else:
            dependence = Rank(c["rank_correlation"])
        prompt, output = (Table(tuple(c[k]["tokens"]), tuple(c[k]["counts"])) for k in ("prompt", "output"))
        classes.append(RequestClass(Lengths(prompt, output, dependence), c["share"], c["client"]))
    recorded = data.get("arrivals")
    if recorded is None:
        process: Arrivals = _arrivals.Poisson()
    else:
        inner = _arrivals.get(recorded["gaps"], cv=recorded["cv"])
        process = _arrivals.Profile(tuple(recorded["counts"]), recorded["bin_s"], recorded["last_s"], inner)
    rate = data.get("rate_rps")
    text = f"{data['summary']}; {data['source']}, {data['licence']}"
    return _Source(text, tuple(classes), process, None if rate is None or math.isnan(rate) else rate)
