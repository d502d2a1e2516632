"""Fitting a cost profile to measured iterations.

Least squares on the relative error, with parameters of at least 0. Given its breakpoints, each form is linear
in the rest, which non-negative least squares solves exactly; the breakpoints are searched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
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

ANNOTATIONS = ("batch", "part", "spread_s", "repeats", "launch_s")
"""Columns that such a file may have for people and programs; they are not fitted."""


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a form is fitted: columns given the breakpoints, candidates of each, the parameters in the end.

    Attributes:
        design: features (n, 6) and breakpoints (k,) -> columns (n, m), of which the time is a sum.
        breakpoints: features -> candidates of each breakpoint, k increasing arrays.
        params: the m factors and the k breakpoints -> the form's parameters.
        refine: whether a breakpoint may lie between the candidates.
    """

    design: Callable[[Array, Array], Array]
    breakpoints: Callable[[Array], tuple[Array, ...]]
    params: Callable[[Array, Array], dict[str, float]]
    refine: bool = False


def _tokens(f: Array) -> Array:
    """Tokens of each batch, b = P + D."""
    return f[:, 0] + f[:, 4]


def _stack(*parts: Array) -> Array:
    return np.stack(np.broadcast_arrays(*parts), axis=1)


_ONE = np.ones(1)


def _up_to(values: Array) -> Array:
    """Candidates of a breakpoint in quantities like `values`."""
    return np.geomspace(1, max(2, values.max()), 60)


def _roofline_breakpoints(f: Array) -> tuple[Array, ...]:
    """Tokens from which the layers compute for longer than they read their weights; rows from which the head
    does; and the pairs of tokens that attention of prefills computes while it reads one token (0: its reading
    never counts)."""
    heads, prefills = f[:, 1] + f[:, 4], f[f[:, 0] > 0]
    most = (prefills[:, 2] / (prefills[:, 3] + prefills[:, 0])).max() if len(prefills) else 1.0
    return _up_to(_tokens(f)), _up_to(heads), np.append(0.0, np.geomspace(1, max(2.0, most), 30))


_SWEEPS = 30  # over several breakpoints, at most; a handful do

FORMS = {
    "linear": _Form(
        lambda f, at: _stack(_ONE, f[:, 0], f[:, 4], f[:, 5], f[:, 2]),
        lambda f: (),
        lambda x, at: {f"c{i}": value for i, value in enumerate(x)},
    ),
    "hinge": _Form(  # max(h1, h2*b) is h2 * max(b0, b) with b0 = h1 / h2
        lambda f, at: _stack(_ONE, np.maximum(at[0], _tokens(f)), f[:, 5], f[:, 2], f[:, 4]),
        lambda f: (_up_to(_tokens(f)),),
        lambda x, at: {"h0": x[0], "h1": x[1] * at[0], "h2": x[1], "h3": x[2], "h4": x[3], "h5": x[4]},
        refine=True,
    ),
    "staircase": _Form(
        lambda f, at: _stack(_ONE, np.ceil(_tokens(f) / at[0])),
        lambda f: (np.arange(1.0, min(1024.0, _tokens(f).max()) + 1),),
        lambda x, at: {"c": x[0], "a": x[1], "b0": at[0]},
    ),
    "piecewise": _Form(
        lambda f, at: _stack(_ONE, np.maximum(0, _tokens(f) - at[0])),
        lambda f: (_up_to(_tokens(f)),),
        lambda x, at: {"c": x[0], "a": x[1], "b0": at[0]},
        refine=True,
    ),
    # Each maximum as in the hinge. Of one GPU: between several, communication cannot be told from compute.
    "roofline": _Form(
        lambda f, at: _stack(
            _ONE,
            np.maximum(at[0], _tokens(f)),
            np.maximum(at[1], f[:, 1] + f[:, 4]),
            np.maximum(f[:, 2], at[2] * (f[:, 3] + f[:, 0])),
            f[:, 5],
        ),
        _roofline_breakpoints,
        lambda x, at: {
            "t0": x[0],
            "weights": x[1] * at[0],
            "token": x[1],
            "head_weights": x[2] * at[1],
            "head_token": x[2],
            "attention": x[3],
            "kv_prefill": x[3] * at[2],
            "kv_decode": x[4],
            "communication": 0.0,
        },
        refine=True,
    ),
}


def read(path: str | Path) -> tuple[Array, Array]:
    """Measured iterations from a CSV (or .gz): features (n, 6) in the order of `core.cost`, seconds (n,).

    Columns: seconds, and those of `FEATURES`, of which the missing are 0; where prefill_requests or
    prefill_context is missing, the prefill tokens of a batch are taken for one chunk after prefill_cached.
    Columns of `ANNOTATIONS` are passed over.

    Raises:
        InputError: names the line.
    """
    absent = -1.0
    data = columns.read(path, ("seconds",), dict.fromkeys(FEATURES, absent), ignored=ANNOTATIONS)
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
    judged: tuple[Array, Array] | None = None,
    **attributes: Any,
) -> Profile:
    """The profile of `form` with the least sum of squared relative errors on the measured iterations.

    Args:
        features: (n, 6), in the order of `core.cost`.
        seconds: (n,), of each iteration.
        form: one of `FORMS`.
        held_out: part of the rows, drawn at random, that is kept from the fit and only judges it.
        seed: of that draw.
        judged: features and seconds of other iterations that judge the fit, to which then all rows go.
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
    if judged is None:
        order = np.random.default_rng(seed).permutation(len(seconds))
        out, kept = np.split(order, [round(held_out * len(order))])
        judged = features[out], seconds[out]
        features, seconds = features[kept], seconds[kept]
    if len(judged[1]) < 2 or len(seconds) < 10:
        raise InputError(
            f"{len(judged[1]) + len(seconds)} rows are too few to fit {form} and to judge it; measure at "
            "least 15"
        )

    how, f, t = FORMS[form], features, seconds

    def solve(at: Sequence[float]) -> tuple[Array, float]:
        """The best parameters with the breakpoints `at`, and their error."""
        relative = how.design(f, np.asarray(at, dtype=np.float64)) / t[:, None]
        scale = np.maximum(relative.max(axis=0), 1e-300)  # columns of like size
        x, error = nnls(relative / scale, np.ones(len(t)), maxiter=100 * relative.shape[1])
        return x / scale, error

    # One breakpoint after the other, each searched with the others as they are, until that gains nothing.
    candidates = how.breakpoints(f)
    at = [float(values[len(values) // 2]) for values in candidates]
    least = math.inf
    for _ in range(_SWEEPS if len(candidates) > 1 else 1):
        before = least
        for i, values in enumerate(candidates):

            def error(x: float, i: int = i) -> float:
                return solve([*at[:i], x, *at[i + 1 :]])[1]

            tried = [error(float(x)) for x in values]
            best = int(np.argmin(tried))
            if tried[best] < least:
                at[i], least = float(values[best]), tried[best]
            if how.refine:
                low, high = values[max(0, best - 1)], values[min(len(values) - 1, best + 1)]
                found = minimize_scalar(error, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
                if found.fun < least:
                    at[i], least = float(found.x), float(found.fun)
        if not least < before * (1 - 1e-7):
            break
    found_params = how.params(solve(at)[0], np.asarray(at, dtype=np.float64))
    attributes = {
        "name": f"fitted-{form}",
        "provenance": f"{form} fitted to {len(t)} iterations",
        **attributes,
    }
    params = {name: float(value) for name, value in found_params.items()}
    profile = Profile(form=form, params=params, **attributes)
    return profile.replace(fit={**judge(profile, *judged), "rows": len(t), "rows_held_out": len(judged[1])})


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
