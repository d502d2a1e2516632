"""Compiled: from uniform numbers to token counts, through tables and the dependences of ranks.

All of it is in one file: numba's cache sees a change in a callee only there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.compile import njit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_BELOW_ONE = float(np.nextafter(1, 0))


class Packed(NamedTuple):
    """K classes of lengths: tables of tokens, tied by recorded cells or by a Gaussian copula.

    Attributes:
        tokens, counts: knots of the distribution functions of prompt and output of class 0, 1, ...
        table: (2 K + 1,) where each of them begins.
        levels: edges of the cells' ranks, one class after another; below: of each row of cells, the counts
            up to each edge.
        level, cell: (K + 1,) where each class begins in `levels` and `below`; the same as the next where it
            has none.
        pearson: (K,) correlation of the normals behind the copula, for classes without cells.
    """

    tokens: Ints
    counts: Floats
    table: Ints
    levels: Floats
    below: Floats
    level: Ints
    cell: Ints
    pearson: Floats


@njit
def lengths(kind: Ints, u: Floats, packed: Packed, normal_z: Floats, normal_p: Floats) -> tuple[Ints, Ints]:
    """Prompt and output tokens (n,) of requests of these classes (n,), from independent uniforms (n, 2).

    `normal_z` and `normal_p` are the standard normal distribution function as a table.
    """
    prompt, output = np.empty(len(u), np.int64), np.empty(len(u), np.int64)
    p = packed
    for i in range(len(u)):
        k = kind[i]
        first, second = u[i, 0], u[i, 1]
        if p.level[k] < p.level[k + 1]:
            levels = p.levels[p.level[k] : p.level[k + 1]]
            second = _cell(levels, p.below[p.cell[k] : p.cell[k + 1]], first, second)
        elif p.pearson[k] != 0:
            second = _copula(p.pearson[k], first, second, normal_z, normal_p)
        a, b, c = p.table[2 * k], p.table[2 * k + 1], p.table[2 * k + 2]
        prompt[i] = _tokens(p.tokens[a:b], p.counts[a:b], first)
        output[i] = _tokens(p.tokens[b:c], p.counts[b:c], second)
    return prompt, output


@njit
def table(tokens: Ints, counts: Floats, u: Floats) -> Ints:
    """The quantiles (n,) of a table at u (n,)."""
    drawn = np.empty(len(u), np.int64)
    for i in range(len(u)):
        drawn[i] = _tokens(tokens, counts, u[i])
    return drawn


@njit
def cells(levels: Floats, below: Floats, u: Floats) -> Floats:
    """Uniforms (n,) tied to u[:, 0] by recorded cells, from independent uniforms u (n, 2)."""
    tied = np.empty(len(u))
    for i in range(len(u)):
        tied[i] = _cell(levels, below, u[i, 0], u[i, 1])
    return tied


@njit
def copula(pearson: float, u: Floats, normal_z: Floats, normal_p: Floats) -> Floats:
    """Uniforms (n,) tied to u[:, 0] by a Gaussian copula, from independent uniforms u (n, 2)."""
    tied = np.empty(len(u))
    for i in range(len(u)):
        tied[i] = _copula(pearson, u[i, 0], u[i, 1], normal_z, normal_p)
    return tied


@njit
def _tokens(tokens: Ints, counts: Floats, u: float) -> int:
    """A table's quantile: between knots the mass is even."""
    rank = u * counts[-1]
    i = min(_knot(counts, rank), len(counts) - 2)
    width = tokens[i + 1] - tokens[i]
    share = (rank - counts[i]) / max(counts[i + 1] - counts[i], 1.0)
    return tokens[i] + 1 + min(int(share * width), width - 1)


@njit
def _cell(levels: Floats, below: Floats, first: float, second: float) -> float:
    edges = len(levels)
    row = min(_knot(levels, first), edges - 2)
    counts = below[row * edges : (row + 1) * edges]
    return min(_line(counts, levels, second * counts[-1]), _BELOW_ONE)


@njit
def _copula(pearson: float, first: float, second: float, normal_z: Floats, normal_p: Floats) -> float:
    rest = np.sqrt(max(0.0, 1 - pearson * pearson))
    mixed = pearson * _line(normal_p, normal_z, first) + rest * _line(normal_p, normal_z, second)
    return min(_line(normal_z, normal_p, mixed), _BELOW_ONE)


@njit
def _line(x: Floats, y: Floats, at: float) -> float:
    """np.interp(at, x, y), the same bits."""
    i = _knot(x, at)
    if i < 0:
        return y[0]
    if i >= len(x) - 1:
        return y[-1]
    return (y[i + 1] - y[i]) / (x[i + 1] - x[i]) * (at - x[i]) + y[i]


@njit
def _knot(x: Floats, at: float) -> int:
    """The last i with x[i] <= at, or -1."""
    low, high = 0, len(x)
    while low < high:
        middle = (low + high) // 2
        if x[middle] <= at:
            low = middle + 1
        else:
            high = middle
    return low - 1
