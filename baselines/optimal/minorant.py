"""Linear lower bounds on the time of an iteration, the common ground of every bound on a schedule.

A cost model is replaced by rows (c0, c1, c2, c3, c4), all of them >= 0, such that each non-empty batch that
keeps the limits takes, in seconds and with the features of `llmsched_env.core.cost`,

    T >= c0 + c1*P + c2*D + c3*KV + c4*CX        for every row.

As all rows hold at once, so does every convex combination of them (`blends`). What a row leaves out (the
number of prefills and the tokens that they read again) only adds time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from llmsched_env.profiles import Profile

_SAFE = 1 - 1e-12  # of what is found by division: rounding must not carry a row above the cost model


def linear_minorants(
    profile: Profile,
    *,
    max_prefill_tokens: int,
    max_decodes: int,
    max_context: int,
    max_chunk: int | None = None,
) -> NDArray[np.float64]:
    """Rows that no batch within the limits falls below.

    * linear: the model itself.
    * hinge, staircase, piecewise, infermax, roofline: a row for each choice of a branch in each maximum; a
      term that is there or not (infermax) is spread over the tokens that bring it, with and without what
      all batches share.
    * table: within a cell of the grid both the interpolation and a row are linear in each of P, D and KV/D,
      so that their difference is least at a corner, and rows that hold at all corners hold everywhere. Beyond
      the grid the last cell goes on, here as far as the limits.
    * custom: a row of zeros. Nothing is known of a function but the batches that were tried.

    Args:
        max_prefill_tokens: most prefill tokens of an iteration, all requests together.
        max_decodes: most decodes of an iteration.
        max_context: most tokens that one decode reads, the new one included.
        max_chunk: most prefill tokens of one request in an iteration; None: all of them.

    Returns:
        float64 (n, 5), n >= 1, none at most another.
    """
    prefill, decodes = max(1, max_prefill_tokens), max(1, max_decodes)
    chunk = min(prefill, max_chunk or prefill)
    p = profile.params
    rows: Iterable[tuple[float, ...]]
    if profile.form == "linear":
        rows = [tuple(p[f"c{k}"] for k in range(5))]
    elif profile.form == "hinge":
        branches = [(p["h1"], 0.0), (0.0, p["h2"])]
        rows = [(p["h0"] + flat, a, a + p["h5"], p["h3"], p["h4"]) for flat, a in branches]
    elif profile.form == "staircase":
        slope = p["a"] / p["b0"] * _SAFE
        rows = [(p["c"] + p["a"], 0.0, 0.0, 0.0, 0.0), (p["c"], slope, slope, 0.0, 0.0)]
    elif profile.form == "piecewise":
        # Through (b0, c); no steeper than a, nor so steep that it is negative without tokens.
        slope = min(p["a"], p["c"] / p["b0"]) * _SAFE
        flat = max(0.0, p["c"] - slope * p["b0"])
        rows = [(p["c"], 0.0, 0.0, 0.0, 0.0), (flat * _SAFE, slope, slope, 0.0, 0.0)]
    elif profile.form == "infermax":
        rows = _infermax(profile, prefill, decodes, chunk)
    elif profile.form == "roofline":
        rows = _roofline(profile, chunk)
    elif profile.form == "table":
        rows = _table(profile, prefill, decodes, max(1, max_context))
    else:
        rows = [(0.0,) * 5]
    found = np.array(list(rows), np.float64)
    # Each request of a batch brings at least one decode, or at most `chunk` prefill tokens.
    found += np.array([profile.cpu_s, profile.cpu_s_per_request / chunk, profile.cpu_s_per_request, 0, 0])
    if profile.form == "custom":
        found[:] = 0.0  # the function may be negative, and what is added to it says nothing
    return _undominated(found)


def blends(rows: NDArray[np.float64], steps: int = 4) -> NDArray[np.float64]:
    """The rows, and convex combinations of each two of them in so many steps: float64 (m, 5)."""
    shares = np.arange(1, steps) / steps
    between = [a + shares[:, None] * (b - a) for a, b in itertools.combinations(rows, 2)]
    return np.concatenate([rows, *between])


def _infermax(profile: Profile, prefill: int, decodes: int, chunk: int) -> list[tuple[float, ...]]:
    p = {"floor": 0.0, **profile.params}
    rows = []
    for flat, token in ((p["b_o"], p["a_o"]), (p["floor"], 0.0)):
        # b_d is paid by batches with decodes, b_p by those with prefills: each batch pays the lesser of them.
        for both in (0.0, min(p["b_d"], p["b_p"])):
            rows.append(
                (
                    flat + both,
                    token + (p["b_p"] - both) / prefill + p["s_p"] / chunk,
                    token + (p["b_d"] - both) / decodes + p["s_d"],
                    p["a_d"],
                    2 * p["a_p"],
                )
            )
    scale = p["layers"] * 1e-3 * _SAFE
    return [tuple(scale * x for x in row) for row in rows]


def _roofline(profile: Profile, chunk: int) -> list[tuple[float, ...]]:
    p = profile.params
    rows = []
    for weights, token in ((p["weights"], 0.0), (0.0, p["token"])):
        for head_weights, head_token in ((p["head_weights"], 0.0), (0.0, p["head_token"])):
            for context, read in ((p["attention"], 0.0), (0.0, p["kv_prefill"])):
                linear = token + p["communication"]
                rows.append(
                    (
                        p["t0"] + weights + head_weights,
                        linear + head_token / chunk + read,
                        linear + head_token,
                        p["kv_decode"],
                        context,
                    )
                )
    return [tuple(_SAFE * x for x in row) for row in rows]


def _table(profile: Profile, prefill: int, decodes: int, context: int) -> list[tuple[float, ...]]:
    """Rows that start at a share of the least time and are raised, one coefficient after the other, until a
    corner stops them: for each order of the coefficients another."""
    axes = [np.asarray(profile.params[name], np.float64) for name in ("prefill_tokens", "decodes", "context")]
    seconds = np.asarray(profile.params["seconds"], np.float64)
    least = float(seconds.min())
    for k, limit in enumerate((prefill, decodes, context)):
        axes[k], seconds = _until(axes[k], seconds, k, float(limit))
    P, D, mean = (x.ravel() for x in np.meshgrid(*axes, indexing="ij"))
    corners = {1: P, 2: D, 3: D * mean}
    rows: list[tuple[float, ...]] = [(least * _SAFE, 0.0, 0.0, 0.0, 0.0)]
    for share, order in itertools.product((0.0, 0.5, 0.8, 1.0), itertools.permutations(corners)):
        row = np.zeros(5)
        row[0] = share * least
        rest = seconds.ravel() - row[0]
        if rest.min() < 0:  # the last cell goes on downwards: only the least time is sure
            break
        for k in order:
            touched = corners[k] > 0
            row[k] = np.min(rest[touched] / corners[k][touched], initial=np.inf)
            row[k] = max(0.0, row[k]) * _SAFE if np.isfinite(row[k]) else 0.0
            rest = rest - row[k] * corners[k]
        rows.append(tuple(row * _SAFE))
    return rows


def _until(
    axis: NDArray[np.float64], seconds: NDArray[np.float64], k: int, limit: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The grid along axis k cut, or with its last cell continued, at `limit`."""
    if len(axis) == 1:
        # Nothing is known along this axis: the same time everywhere, so that its far end is the worst corner.
        return np.array([max(limit, axis[0])]), seconds
    kept = max(2, int(np.searchsorted(axis, limit, "right")))
    kept = min(kept + 1, len(axis)) if limit > axis[kept - 1] else kept
    axis, seconds = axis[:kept].copy(), np.moveaxis(seconds, k, 0)[:kept].copy()
    if limit > axis[-1]:
        weight = (limit - axis[-2]) / (axis[-1] - axis[-2])
        end = seconds[-2] + weight * (seconds[-1] - seconds[-2])
        axis, seconds = np.append(axis, limit), np.concatenate([seconds, end[None]])
    return axis, np.moveaxis(seconds, 0, k)


def _undominated(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows that are not at most another one, each once."""
    rows = np.unique(rows, axis=0)
    at_most = np.array([[bool((a <= b).all()) for b in rows] for a in rows])
    np.fill_diagonal(at_most, False)
    return rows[~at_most.any(axis=1)]
