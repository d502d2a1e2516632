"""The rates of prefill and of decode tokens that an engine can sustain together: a convex polygon.

Theorem 10 of Dai, Deng, Li and Peng (arXiv 2504.07347v3, section 6) is about a cap of k_max requests in a
batch. A batch of x prefill and y decode tokens then has to have y + 1{x > 0} <= k_max, x + y <= b_max, and
the rates that some scheduler can sustain are the convex hull of (x, y) / t over all such batches. (The
theorem's wording was not at hand; this is its reconstruction, which agrees with the published corner.)
Without a cap the hull meets the ray of a workload at Theorem 2's limit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsched_env.errors import InputError
from llmsched_env.profiles import Profile
from llmsched_env.workloads.lengths import Moments

_MOST = 4_000_000  # batches that are looked at
_AT_ONCE = 500_000


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Tokens of KV cache that attention reads, where it has its price.

    Attributes:
        prefill: for each prefill token: E[I^2] / (2 E[I]).
        decode: for each decode.
    """

    prefill: float = 0.0
    decode: float = 0.0

    @staticmethod
    def of(moments: Moments) -> Contexts:
        """The means of a workload."""
        decodes = moments.output - 1
        read = moments.kv_token_iterations - moments.prompt
        return Contexts(moments.prefill_context / moments.prompt, read / decodes if decodes > 0 else 0.0)


@dataclasses.dataclass(frozen=True)
class Region:
    """A convex polygon of rates (prefill tokens/s, decode tokens/s) with the origin as its first corner.

    Attributes:
        vertices: (V, 2) float64, counter-clockwise from the origin.
        batches: (V, 2) int64: the batch (prefill, decode tokens) that each is the rate of; (0, 0) first.
    """

    vertices: NDArray[np.float64]
    batches: NDArray[np.int64]

    def multiple(self, rates: ArrayLike) -> Any:
        """The largest c with c * rates inside: above 1 the rates can be sustained, below 1 they cannot.

        Args:
            rates: (..., 2) tokens/s, not negative and not both 0.

        Returns:
            float64 of shape (...), or a number.
        """
        r = np.asarray(rates, dtype=np.float64)
        if r.shape[-1:] != (2,) or not np.isfinite(r).all() or (r < 0).any() or (r.sum(-1) <= 0).any():
            raise InputError("rates must be pairs (prefill, decode tokens/s), not negative, not both 0")
        corners = self.vertices[1:]
        a, b = corners[:-1], corners[1:]
        # Each edge between two corners is the line normal . x = offset, the origin on its side below.
        normal = np.stack([b[:, 1] - a[:, 1], a[:, 0] - b[:, 0]], axis=-1)
        offset = (normal * a).sum(-1)
        with np.errstate(divide="ignore"):
            along = r @ normal.T
            found = np.where(along > 1e-15 * np.abs(offset).max(), offset / along, np.inf)
        return found.min(-1)[()]

    def contains(self, rates: ArrayLike, tolerance: float = 1e-9) -> Any:
        """Whether rates (..., 2) lie in the polygon, its border included: bool of shape (...)."""
        return self.multiple(rates) >= 1 - tolerance

    @property
    def area(self) -> float:
        """(tokens/s)^2."""
        x, y = self.vertices.T
        return float(0.5 * (x * np.roll(y, -1) - y * np.roll(x, -1)).sum())


def region(
    profile: Profile,
    token_budget: int,
    max_batch: int | None = None,
    contexts: Contexts = Contexts(),
) -> Region:
    """The polygon of an engine.

    Exact for time that depends on the tokens of a batch alone. Else it is taken at the given contexts: with
    none, a bound that no scheduler passes; with those of a workload, a fixed point at the mean context, which
    prefill and decode batches of unlike contexts may pass. A batch's prefill counts as one chunk that reads
    nothing again.

    Args:
        token_budget: b_max.
        max_batch: k_max, most requests in a batch; None: no limit.
        contexts: what attention reads.

    Above 4 million batches a grid of them is looked at, with the largest of each side in it.
    """
    if token_budget < 1:
        raise InputError(f"token_budget must be at least 1, not {token_budget}")
    cap = token_budget if max_batch is None else min(max_batch, token_budget)
    if cap < 1:
        raise InputError(f"max_batch must be at least 1, not {max_batch}")
    step = max(1, math.ceil(math.sqrt(token_budget * (cap + 1) / _MOST)))
    decodes = np.unique(np.append(np.arange(0, cap + 1, step), [max(cap - 1, 0), cap])).astype(np.float64)
    best: NDArray[np.float64] = np.zeros((1, 4))  # prefill and decode rate; prefill and decode tokens
    rows = max(1, _AT_ONCE * step // token_budget)
    for first in range(0, len(decodes), rows):
        more = _rates(profile, decodes[first : first + rows], token_budget, cap, step, contexts)
        best = _hull(np.concatenate([best, more]))
    return Region(best[:, :2].copy(), best[:, 2:].astype(np.int64))


def _rates(
    profile: Profile, decodes: NDArray[np.float64], budget: int, cap: int, step: int, contexts: Contexts
) -> NDArray[np.float64]:
    """(n, 4): rates and tokens of all feasible batches with these numbers of decodes."""
    room = np.where(decodes + 1 <= cap, budget - decodes, 0).astype(np.int64)
    prefills = np.arange(0, budget + 1, step)
    x, y = (grid.ravel() for grid in np.meshgrid(prefills, decodes))
    kept = x <= np.repeat(room, len(prefills))
    tokens = np.concatenate([np.stack([x[kept], y[kept]], axis=1), np.stack([room, decodes], axis=1)])
    tokens = tokens[tokens.sum(1) > 0]
    x, y = tokens.T
    seconds = profile.time(x, x > 0, x * contexts.prefill, 0, y, y * contexts.decode)
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise InputError("region: the cost profile gives an iteration that takes no time, or an infinite one")
    return np.concatenate([tokens / seconds[:, None], tokens], axis=1)


def _hull(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The corners of the convex hull by the first two columns, counter-clockwise from the origin, which is
    the lowest and leftmost of the points (Andrew's monotone chain, once most inner points are sorted out)."""
    points = points[_outer(points[:, :2])]
    points = points[np.lexsort((points[:, 1], points[:, 0]))]
    lower: list[NDArray[np.float64]] = []
    upper: list[NDArray[np.float64]] = []
    for chain, order in ((lower, points), (upper, points[::-1])):
        for p in order:
            while len(chain) > 1 and _turn(chain[-2], chain[-1], p) <= 1e-12 * (abs(p[0]) + abs(p[1])) ** 2:
                chain.pop()
            chain.append(p)
    return np.array(lower[:-1] + upper[:-1])


def _outer(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points are not in the polygon of those that are extreme in some directions."""
    angles = np.linspace(0, math.pi / 2, 33)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    extreme = np.unique((points @ directions.T).argmax(axis=0))
    inside = np.ones(len(points), np.bool_)
    corners = points[extreme]
    corners = corners[np.argsort(np.arctan2(corners[:, 1], corners[:, 0]))]
    for a, b in itertools.pairwise(np.concatenate([np.zeros((1, 2)), corners, np.zeros((1, 2))])):
        slack = 1e-12 * (np.abs(a).sum() + np.abs(b).sum()) ** 2
        inside &= (b[0] - a[0]) * (points[:, 1] - a[1]) - (b[1] - a[1]) * (points[:, 0] - a[0]) > -slack
    inside[extreme] = False
    inside[~points.any(axis=1)] = False
    return ~inside


def _turn(a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]) -> float:
    """Above 0 where a, b, c turn left."""
    return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))
