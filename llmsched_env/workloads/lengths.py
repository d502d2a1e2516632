"""Prompt and output lengths: marginals, their dependence, and what both sum to.

Every marginal is an inverse distribution function, so any pair can be tied together by a dependence of the
ranks, and the same uniform numbers give the same requests under every arrival process and load.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsched_env.errors import InputError
from llmsched_env.workloads import quantiles
from llmsched_env.workloads.arrivals import build

Uniforms = NDArray[np.float64]
Tokens = NDArray[np.int64]


class Marginal(Protocol):
    """A distribution of token counts >= 1."""

    @property
    def largest(self) -> int:
        """The largest possible count."""
        ...

    def quantile(self, u: Uniforms) -> Tokens:
        """The inverse distribution function at u in [0, 1): int64, same shape."""
        ...


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Always the same number of tokens."""

    tokens: int

    def __post_init__(self) -> None:
        _range("fixed", self.tokens, self.tokens)

    @property
    def largest(self) -> int:
        return self.tokens

    def quantile(self, u: Uniforms) -> Tokens:
        return np.full(u.shape, self.tokens, dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Each whole number from `low` to `high`, both included, equally likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _range("uniform", self.low, self.high)

    @property
    def largest(self) -> int:
        return self.high

    def quantile(self, u: Uniforms) -> Tokens:
        return self.low + np.minimum(
            np.floor(u * (self.high - self.low + 1)).astype(np.int64), self.high - self.low
        )


@dataclasses.dataclass(frozen=True)
class Lognormal:
    """exp(N(log median, sigma^2)), rounded to whole tokens and cut at `largest`."""

    median: float
    sigma: float
    largest: int = 32768

    def __post_init__(self) -> None:
        _range("lognormal", 1, self.largest)
        if not (0 < self.median < math.inf and 0 <= self.sigma < math.inf):
            raise InputError(
                f"lognormal: median {self.median!r} must be positive and sigma {self.sigma!r} not negative"
            )

    def quantile(self, u: Uniforms) -> Tokens:
        raw = self.median * np.exp(self.sigma * normal_quantile(u))
        return np.clip(np.rint(raw), 1, self.largest).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Zipf:
    """P(k) proportional to k^-exponent on low..largest: many short, few very long."""

    exponent: float
    largest: int
    low: int = 1

    def __post_init__(self) -> None:
        _range("zipf", self.low, self.largest)
        if self.largest > 2**22:
            raise InputError(f"zipf: largest {self.largest} is above 4194304; take less")

    def quantile(self, u: Uniforms) -> Tokens:
        return self.low + np.minimum(np.searchsorted(_zipf(self), u, side="right"), self.largest - self.low)


@lru_cache(maxsize=16)
def _zipf(zipf: Zipf) -> NDArray[np.float64]:
    weights = np.arange(zipf.low, zipf.largest + 1, dtype=np.float64) ** -zipf.exponent
    return np.cumsum(weights) / weights.sum()


@dataclasses.dataclass(frozen=True)
class Poisson:
    """`plus` and a Poisson number of tokens; 0 tokens count as 1."""

    mean: float
    plus: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.mean <= 2**20:
            raise InputError(f"poisson: mean {self.mean!r} is not between 0 and {2**20}")
        if not 0 <= self.plus <= 2**20:
            raise InputError(f"poisson: plus {self.plus!r} is not a whole number from 0 to {2**20}")

    @property
    def largest(self) -> int:
        return self.plus + len(_poisson(self))

    def quantile(self, u: Uniforms) -> Tokens:
        return np.maximum(1, self.plus + np.searchsorted(_poisson(self), u, side="right")).astype(np.int64)


@lru_cache(maxsize=64)
def _poisson(poisson: Poisson) -> NDArray[np.float64]:
    """The distribution function from 0 on, to where what is left is lost in rounding."""
    mean = poisson.mean
    k = np.arange(int(mean + 12 * math.sqrt(mean) + 40))
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, len(k))))])
    return np.cumsum(np.exp(k * math.log(mean) - mean - log_factorial))


@dataclasses.dataclass(frozen=True)
class Table:
    """An empirical distribution, as knots of its distribution function; between knots the mass is even.

    Attributes:
        tokens: K increasing whole numbers, the first one below the smallest possible count.
        counts: K non-decreasing cumulative counts of observations <= tokens, from 0.
    """

    tokens: tuple[int, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        tokens, counts = np.array(self.tokens), np.array(self.counts)
        if not (len(tokens) == len(counts) >= 2 and tokens[0] >= 0 and counts[0] == 0 and counts[-1] > 0):
            raise InputError("table: needs two or more tokens and as many cumulative counts from 0")
        if (np.diff(tokens) < 1).any() or (np.diff(counts) < 0).any():
            raise InputError("table: tokens must increase and cumulative counts must not fall")

    @property
    def largest(self) -> int:
        return self.tokens[-1]

    def quantile(self, u: Uniforms) -> Tokens:
        return quantiles.table(*self._knots, u.ravel()).reshape(u.shape)

    @cached_property
    def _knots(self) -> tuple[Tokens, NDArray[np.float64]]:
        return np.array(self.tokens, dtype=np.int64), np.array(self.counts, dtype=np.float64)

    @staticmethod
    def of(values: ArrayLike, tolerance: float = 0.001, tail: float = 0.02) -> Table:
        """The table with few knots whose distribution function is near that of `values` everywhere.

        The distribution function of whole numbers is piecewise linear through the points just before and at
        each value; one pass keeps the points after which no line stays within min(tolerance, tail * (1 - F))
        of it. So atoms, the smallest and the largest value are kept exactly.

        Args:
            values: whole numbers >= 1.
            tolerance: largest error of the distribution function (so also the Kolmogorov-Smirnov distance).
            tail: largest error relative to the probability of a longer request.
        """
        unique, each = np.unique(np.asarray(values, dtype=np.int64), return_counts=True)
        if len(unique) == 0 or unique[0] < 1:
            raise InputError("table: needs whole numbers >= 1")
        after = np.cumsum(each)
        total = int(after[-1])
        x: NDArray[np.int64] = np.stack((unique - 1, unique), axis=1).ravel()
        y: NDArray[np.int64] = np.stack((after - each, after), axis=1).ravel()
        x, first = np.unique(x, return_index=True)  # a value right after another: one point
        y = y[first]
        slack = np.minimum(tolerance * total, tail * (total - y))
        knots = [0]
        while knots[-1] < len(x) - 1:
            a = knots[-1]
            low, high, best = -math.inf, math.inf, a + 1
            for j in range(a + 1, len(x)):
                run, rise = float(x[j] - x[a]), float(y[j] - y[a])
                if low <= rise / run <= high:
                    best = j
                low, high = max(low, (rise - slack[j]) / run), min(high, (rise + slack[j]) / run)
                if low > high:
                    break
            knots.append(best)
        return Table(tuple(int(v) for v in x[knots]), tuple(int(v) for v in y[knots]))


KNOWN: dict[str, Any] = {
    "fixed": Fixed,
    "uniform": Uniform,
    "lognormal": Lognormal,
    "zipf": Zipf,
    "poisson": Poisson,
}


def get(spec: str | int | Marginal) -> Marginal:
    """A distribution of lengths by name, with its settings after a colon ("uniform:20,200",
    "lognormal:150,0.8"), or a fixed number of tokens.
    """
    if isinstance(spec, int):
        return Fixed(spec)
    if not isinstance(spec, str):
        return spec
    try:
        made = build("lengths", KNOWN, spec)
    except TypeError as error:  # names the settings that are missing
        raise InputError(f"lengths {spec!r}: {str(error).split('__init__() ')[-1]}") from None
    whole = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.type == "int"}
    for name, value in whole.items():
        if value != int(value):
            raise InputError(f"lengths {spec!r}: {name} must be a whole number of tokens, not {value:g}")
    return dataclasses.replace(made, **{name: int(value) for name, value in whole.items()})


class Dependence(Protocol):
    """How the ranks of prompt and output go together."""

    def pair(self, u: Uniforms) -> Uniforms:
        """Independent uniforms (n, 2) -> dependent ones (n, 2), each column uniform on [0, 1)."""
        ...


@dataclasses.dataclass(frozen=True)
class Rank:
    """A Gaussian copula with Spearman rank correlation `correlation` (0: independent)."""

    correlation: float = 0.0

    def __post_init__(self) -> None:
        if not -1 <= self.correlation <= 1:
            raise InputError(f"rank correlation {self.correlation!r} is not between -1 and 1")

    def pair(self, u: Uniforms) -> Uniforms:
        if self.correlation == 0:
            return u
        return np.stack((u[:, 0], quantiles.copula(self._pearson, u, *_normal_table())), axis=1)

    @property
    def _pearson(self) -> float:
        """Pearson correlation of the normals behind the copula."""
        return 2 * math.sin(math.pi * self.correlation / 6)


@dataclasses.dataclass(frozen=True)
class Cells:
    """A recorded dependence: how many requests have their prompt rank in cell i and their output rank in cell
    j.

    Finer than one correlation where long outputs belong to short prompts (a shared context limit).

    Attributes:
        levels: K + 1 increasing ranks from 0 to 1.
        counts: K rows of K counts.
    """

    levels: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]

    def pair(self, u: Uniforms) -> Uniforms:
        return np.stack((u[:, 0], quantiles.cells(*self._rows, u)), axis=1)

    @cached_property
    def _rows(self) -> tuple[Uniforms, NDArray[np.float64]]:
        """The levels, and row after row the counts up to each of them."""
        up_to = [[0.0, *np.cumsum(row)] for row in self.counts]
        return np.array(self.levels), np.array(up_to).ravel()

    @staticmethod
    def of(prompt: ArrayLike, output: ArrayLike, levels: ArrayLike) -> Cells:
        """Count the pairs of ranks (ties broken at random, by a fixed seed, so that margins are even)."""
        edges = np.asarray(levels, dtype=np.float64)
        rng = np.random.default_rng(0)
        ranks = []
        for column in (np.asarray(prompt), np.asarray(output)):
            order = np.lexsort((rng.random(len(column)), column))
            rank = np.empty(len(column))
            rank[order] = (np.arange(len(column)) + 0.5) / len(column)
            ranks.append(rank)
        table = np.histogram2d(ranks[0], ranks[1], bins=(edges, edges))[0].astype(int)
        return Cells(tuple(edges.tolist()), tuple(tuple(row) for row in table.tolist()))


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Prompt and output lengths of a class: two marginals and the dependence between their ranks."""

    prompt: Marginal
    output: Marginal
    dependence: Dependence = Rank()

    def tokens(self, u: Uniforms) -> tuple[Tokens, Tokens]:
        """Prompt and output tokens, int64 (n,) each, from independent uniforms (n, 2)."""
        ranks = self.dependence.pair(u)
        return self.prompt.quantile(ranks[:, 0]), self.output.quantile(ranks[:, 1])

    @staticmethod
    def of(prompt: ArrayLike, output: ArrayLike, tolerance: float = 0.001) -> Lengths:
        """Lengths like the observed pairs: fitted tables and their rank correlation (ties at mean rank)."""
        return Lengths(
            Table.of(prompt, tolerance), Table.of(output, tolerance), Rank(rank_correlation(prompt, output))
        )


class Mixture:
    """Lengths of several classes, drawn together: the same tokens as by `Lengths.tokens` class by class, and
    in one compiled loop where all of them are tables.
    """

    def __init__(self, classes: Sequence[Lengths]) -> None:
        self._classes = tuple(classes)
        tables = all(type(x) is Table for c in classes for x in (c.prompt, c.output))
        known = all(type(c.dependence) in (Rank, Cells) for c in classes)
        self._packed = self._pack() if tables and known else None

    def tokens(self, kind: NDArray[np.int64], u: Uniforms) -> tuple[Tokens, Tokens]:
        """Prompt and output tokens, int64 (n,) each, of requests of class `kind` (n,) from independent
        uniforms (n, 2).
        """
        if self._packed is not None:
            return quantiles.lengths(kind, u, self._packed, *_normal_table())
        if len(self._classes) == 1:
            return self._classes[0].tokens(u)
        prompt, output = np.empty(len(u), dtype=np.int64), np.empty(len(u), dtype=np.int64)
        for i, lengths in enumerate(self._classes):
            mine = np.flatnonzero(kind == i)
            if len(mine):
                prompt[mine], output[mine] = lengths.tokens(u[mine])
        return prompt, output

    def _pack(self) -> quantiles.Packed:
        nothing = (np.empty(0), np.empty(0))
        ties: list[Any] = [c.dependence for c in self._classes]
        knots = [x._knots for c in self._classes for x in (c.prompt, c.output)]  # type: ignore[attr-defined]
        rows = [tie._rows if isinstance(tie, Cells) else nothing for tie in ties]
        tokens, counts = zip(*knots, strict=True)
        levels, below = zip(*rows, strict=True)
        return quantiles.Packed(
            tokens=np.concatenate(tokens),
            counts=np.concatenate(counts),
            table=_begins(tokens),
            levels=np.concatenate(levels),
            below=np.concatenate(below),
            level=_begins(levels),
            cell=_begins(below),
            pearson=np.array([tie._pearson if isinstance(tie, Rank) else 0.0 for tie in ties]),
        )


def _begins(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Where each part begins in all of them together, and the end."""
    return np.cumsum([0, *map(len, parts)])


@dataclasses.dataclass(frozen=True)
class Clip:
    """Limits of lengths, or None. `max_total` cuts the prompt, and an output that passes it alone."""

    max_prompt: int | None = None
    max_output: int | None = None
    max_total: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_prompt", 1), ("max_output", 1), ("max_total", 2)):
            value = getattr(self, name)
            good = (
                isinstance(value, int | float | np.number) and least <= value < 2**31 and value == int(value)
            )
            if value is not None and not good:
                raise InputError(
                    f"{name} must be a whole number of tokens, from {least} to 2147483647, not {value!r}"
                )

    def __call__(self, prompt: NDArray[Any], output: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Prompt and output tokens, cut."""
        if self.max_prompt is not None:
            prompt = np.minimum(prompt, self.max_prompt)
        output = np.minimum(output, self.longest(2**30))
        if self.max_total is not None:
            prompt = np.minimum(prompt, self.max_total - output)
        return prompt, output

    def longest(self, output: int) -> int:
        """What an output of so many tokens is cut to."""
        limits = (output, self.max_output, None if self.max_total is None else self.max_total - 1)
        return min(limit for limit in limits if limit is not None)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Means over requests that capacities are made of; I = prompt, O = output tokens.

    Attributes:
        prompt, output: E[I], E[O].
        prompt_squared, output_squared: E[I^2], E[O^2].
        kv_token_iterations: E[sum over j < O of (I + j)], the KV tokens a request holds, summed over its
            decode tokens.
    """

    prompt: float
    output: float
    prompt_squared: float
    output_squared: float
    kv_token_iterations: float

    @property
    def prefill_context(self) -> float:
        """E[I^2 / 2]: context read by the attention of a whole prompt."""
        return 0.5 * self.prompt_squared

    @property
    def kv_held(self) -> float:
        """Mean KV tokens held by a request at a decode token, weighted by lifetime: E[sum (I + j)] / E[O]."""
        return self.kv_token_iterations / self.output

    @staticmethod
    def of(prompt: ArrayLike, output: ArrayLike) -> Moments:
        """The moments of observed pairs, e.g. of the columns of a `Requests`."""
        i, o = np.asarray(prompt, dtype=np.float64), np.asarray(output, dtype=np.float64)
        kv = i * o + 0.5 * o * (o - 1)
        return Moments(*(float(x.mean()) for x in (i, o, i * i, o * o, kv)))


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where a column is constant."""
    ranks = []
    for column in (x, y):
        _, inverse, each = np.unique(np.asarray(column), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(each) - 0.5 * (each - 1))[inverse])
    if min(np.ptp(r) for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@lru_cache(maxsize=1)
def _normal_table() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    z = -8.5 + np.arange(8705) / 512
    return z, np.array([NormalDist().cdf(x) for x in z])


def normal_quantile(u: Uniforms) -> Uniforms:
    """The standard normal quantile, from a table (error below 1e-4 for 1e-9 < u < 1 - 1e-9)."""
    z, p = _normal_table()
    return np.interp(u, p, z)


def normal_cdf(z: Uniforms) -> Uniforms:
    """The standard normal distribution function, by interpolation in a table (error below 1e-6), below 1."""
    grid, p = _normal_table()
    return np.minimum(np.interp(z, grid, p), np.nextafter(1, 0))


def _range(kind: str, low: int, high: int) -> None:
    if not (1 <= low <= high <= 2**30):
        raise InputError(f"{kind}: tokens from {low!r} to {high!r}; take 1 <= low <= high <= {2**30}")
