"""Fitting a cost profile to measured iterations.

Least squares on the relative error, with parameters of at least 0. Given its one breakpoint, each form is
linear in the rest, which non-negative least squares solves exactly; the breakpoint is searched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env.errors import InputError, unknown
from llmsched_env.profiles import columns
from llmsched_env.profiles.profile import Profile

Array = NDArray[np.float64]

FEATURES = {
    "prefill_tokens": "P",
    "prefill_requests": "NP",
    "prefill_context": "CX",
    "prefill_cached": "KP",
    "decodes": "D",
    "decode_context": "KV",
}
"""Columns of a file of measured iterations, in the order of `core.cost`; beside them `seconds`."""


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a form is fitted: columns given the breakpoint, candidates of it, the parameters in the end."""

    design: Callable[[Array, float], Array]
    breakpoints: Callable[[Array], Array]
    params: Callable[[Array, float], dict[str, float]]
    refine: bool = False


def _tokens(f: Array) -> Array:
    """Tokens of each batch, b = P + D."""
    return f[:, 0] + f[:, 4]


def _stack(*parts: Array) -> Array:
    return np.stack(np.broadcast_arrays(*parts), axis=1)


_ONE = np.ones(1)

FORMS = {
    "linear": _Form(
        lambda f, at: _stack(_ONE, f[:, 0], f[:, 4], f[:, 5], f[:, 2]),
        lambda b: np.zeros(1),
        lambda x, at: {f"c{i}": value for i, value in enumerate(x)},
    ),
    "hinge": _Form(  # max(h1, h2*b) is h2 * max(b0, b) with b0 = h1 / h2
        lambda f, at: _stack(_ONE, np.maximum(at, _tokens(f)), f[:, 5], f[:, 2], f[:, 4]),
        lambda b: np.geomspace(1, max(2, b.max()), 60),
        lambda x, at: {"h0": x[0], "h1": x[1] * at, "h2": x[1], "h3": x[2], "h4": x[3], "h5": x[4]},
        refine=True,
    ),
    "staircase": _Form(
        lambda f, at: _stack(_ONE, np.ceil(_tokens(f) / at)),
        lambda b: np.arange(1.0, min(1024.0, b.max()) + 1),
        lambda x, at: {"c": x[0], "a": x[1], "b0": at},
    ),
    "piecewise": _Form(
        lambda f, at: _stack(_ONE, np.maximum(0, _tokens(f) - at)),
        lambda b: np.geomspace(1, max(2, b.max()), 60),
        lambda x, at: {"c": x[0], "a": x[1], "b0": at},
        refine=True,
    ),
}


def read(path: str | Path) -> tuple[Array, Array]:
    """Measured iterations from a CSV (or .gz): features (n, 6) in the order of `core.cost`, seconds (n,).

    Columns: seconds, and those of `FEATURES`, of which the missing are 0; where prefill_requests or
    prefill_context is missing, the prefill tokens of a batch are taken for one chunk after prefill_cached.

    Raises:
        InputError: names the line.
    """
    absent = -1.0
    data = columns.read(path, ("seconds",), dict.fromkeys(FEATURES, absent))
    missing = {name for name in FEATURES if data[name][0] == absent}
    for name in missing:
        data[name][:] = 0.0
    tokens = data["prefill_tokens"]
    if "prefill_requests" in missing:
        data["prefill_requests"] = np.where(tokens > 0, 1.0, 0.0)
    if "prefill_context" in missing:
        data["prefill_context"] = tokens * (data["prefill_cached"] + tokens / 2)
    features = np.stack([data[name] for name in FEATURES], axis=1)
    for problem, bad in (
        ("takes no time", data["seconds"] <= 0),
        ("has neither prefill_tokens nor decodes", _tokens(features) <= 0),
    ):
        if bad.any():
            raise InputError(f"{path}: row {int(np.argmax(bad)) + 1} {problem}; leave it out")
    return features, data["seconds"]


def fit(
    features: Array,
    seconds: Array,
    form: str = "hinge",
    *,
    held_out: float = 0.2,
    seed: int = 0,
    **attributes: Any,
) -> Profile:
    """The profile of `form` with the least sum of squared relative errors on the measured iterations.

    Args:
        features: (n, 6), in the order of `core.cost`.
        seconds: (n,), of each iteration.
        form: one of `FORMS`.
        held_out: part of the rows, drawn at random, that is kept from the fit and only judges it.
        seed: of that draw.
        attributes: of the Profile: name, kv_tokens and so on.

    Returns:
        A Profile whose `fit` has the errors of `judge` on the rows held out, rows_held_out of them; rows were
        fitted.

    Raises:
        InputError: too few rows, an unknown form, or scipy is not installed.
    """
    try:
        from scipy.optimize import minimize_scalar, nnls
    except ImportError:
        raise InputError("fitting needs scipy; install it: pip install 'llmsched-env[fit]'") from None
    if form not in FORMS:
        raise unknown("form to fit", form, FORMS)
    if not 0 < held_out < 1:
        raise InputError(f"held_out {held_out} must be between 0 and 1")
    if seed < 0:
        raise InputError(f"seed {seed} must not be negative")
    order = np.random.default_rng(seed).permutation(len(seconds))
    judged, fitted = np.split(order, [round(held_out * len(order))])
    if len(judged) < 2 or len(fitted) < 10:
        raise InputError(
            f"{len(seconds)} rows are too few to fit {form} and to judge it; measure at least 15"
        )

    how = FORMS[form]
    f, t = features[fitted], seconds[fitted]

    def solve(at: float) -> tuple[Array, float]:
        """The best parameters with the breakpoint `at`, and their error."""
        relative = how.design(f, at) / t[:, None]
        scale = np.maximum(relative.max(axis=0), 1e-300)  # columns of like size
        x, error = nnls(relative / scale, np.ones(len(t)))
        return x / scale, error

    candidates = how.breakpoints(_tokens(f))
    best = int(np.argmin([solve(at)[1] for at in candidates]))
    at = float(candidates[best])
    if how.refine:
        low, high = candidates[max(0, best - 1)], candidates[min(len(candidates) - 1, best + 1)]
        found = minimize_scalar(
            lambda x: solve(x)[1], bounds=(low, high), method="bounded", options={"xatol": 1e-6}
        )
        if found.fun < solve(at)[1]:
            at = float(found.x)
    params = {name: float(value) for name, value in how.params(solve(at)[0], at).items()}
    attributes = {
        "name": f"fitted-{form}",
        "provenance": f"{form} fitted to {len(t)} iterations",
        **attributes,
    }
    profile = Profile(form=form, params=params, **attributes)
    errors = judge(profile, features[judged], seconds[judged])
    return profile.replace(fit={**errors, "rows": len(fitted), "rows_held_out": len(judged)})


def judge(profile: Profile, features: Array, seconds: Array) -> dict[str, float]:
    """Errors of a profile on measured iterations.

    Returns:
        R2 of the seconds; of the relative errors the median, 95th percentile and maximum of their size
        (median_rel, p95_rel, max_rel) and their mean with its sign (mean_bias).
    """
    predicted = profile.time(*features.T)
    relative = predicted / seconds - 1
    spread = ((seconds - seconds.mean()) ** 2).sum()
    return {
        "R2": float(1 - ((predicted - seconds) ** 2).sum() / spread) if spread > 0 else float("nan"),
        "median_rel": float(np.median(np.abs(relative))),
        "p95_rel": float(np.quantile(np.abs(relative), 0.95)),
        "max_rel": float(np.abs(relative).max()),
        "mean_bias": float(relative.mean()),
    }
