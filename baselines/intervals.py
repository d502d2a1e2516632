"""Student's t, and the interval of a mean, at any confidence."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from llmsched_env.errors import InputError


@lru_cache(maxsize=256)
def student_quantile(p: float, freedom: int) -> float:
    """The quantile p of Student's t with a whole number of degrees of freedom, by bisection of the closed
    form of its distribution function.

    >>> round(student_quantile(0.975, 7), 4)
    2.3646
    """
    if not (0 < p < 1 and freedom >= 1):
        raise InputError(f"Student's t takes 0 < p < 1 and 1 degree of freedom or more, not {p}, {freedom}")
    if p < 0.5:
        return -student_quantile(1 - p, freedom)
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < p:
        high *= 2
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _student_cdf(middle, freedom) < p else (low, middle)
    return 0.5 * (low + high)


def _student_cdf(t: float, freedom: int) -> float:
    """For t >= 0: a finite series in cos(theta), theta = atan(t / sqrt(freedom))."""
    theta = math.atan(t / math.sqrt(freedom))
    sin, cos = math.sin(theta), math.cos(theta)
    odd = freedom % 2 == 1
    term = cos if odd else 1.0
    total = term if freedom > 1 or not odd else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    inside = (theta + sin * total) * 2 / math.pi if odd else sin * total
    return 0.5 + 0.5 * inside


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """The mean of independent values, and the ends of its interval by Student's t; nan for fewer than two."""
    x = np.asarray(values, dtype=np.float64)
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, not {confidence}")
    if len(x) < 2:
        return (float(x[0]) if len(x) else math.nan), math.nan, math.nan
    mean = float(x.mean())
    half = student_quantile(0.5 + 0.5 * confidence, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return mean, mean - half, mean + half
