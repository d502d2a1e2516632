"""A histogram of seconds with a fixed relative resolution, whose bin is read off the bits of the float.

A float64 is sign, 11 bits of exponent and 52 of fraction, so its bits shifted right by 44 count 256 equal
steps within each octave [2^e, 2^(e+1)). 40 octaves from 2^-24 s (60 ns) to 2^16 s (18 h) make 10,240 bins,
each at most 1/256 of its own value wide: a value read back from its bin is off by less than 0.4 %. What lies
outside falls into the first or last bin.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.compile import njit

LOWEST = -24  # the first octave starts at 2**LOWEST seconds
BINS = 40 * 256
_SHIFT = 52 - 8
_OFFSET = (1023 + LOWEST) << 8  # the shifted bits of 2**LOWEST


@njit(forceinline=True)
def itl_bin(x: float) -> int:
    """The bin of `x` seconds, in [0, BINS)."""
    i = (int(np.float64(x).view(np.int64)) >> _SHIFT) - _OFFSET
    return 0 if i < 0 else BINS - 1 if i >= BINS else i


@njit
def itl_bin_start(i: int) -> float:
    """The lower edge of bin i in seconds."""
    return np.int64((i + _OFFSET) << _SHIFT).view(np.float64)


def itl_bins(x: NDArray[np.float64]) -> NDArray[np.int64]:
    """`itl_bin` of each value of an array, by numpy."""
    shifted = np.ascontiguousarray(x, dtype=np.float64).view(np.int64) >> _SHIFT
    return np.clip(shifted - _OFFSET, 0, BINS - 1)


def itl_bin_edges() -> NDArray[np.float64]:
    """The edges of the bins in seconds, shape (BINS + 1,): bin i holds edges[i] <= x < edges[i + 1]."""
    return ((np.arange(BINS + 1, dtype=np.int64) + _OFFSET) << _SHIFT).view(np.float64)


def quantiles(counts: NDArray[np.int64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """The `q`-quantiles (0 to 1) of a histogram with `itl_bin_edges`, nan when it is empty.

    As with `numpy.quantile`, the quantile lies at position q * (n - 1) of the sorted values; those of a bin
    are taken to lie evenly in it. Off by at most 0.4 % of itself.
    """
    total = int(counts.sum())
    if total == 0:
        return np.full(len(q), np.nan)
    edges = itl_bin_edges()
    used = np.flatnonzero(counts)
    upto = np.cumsum(counts[used])
    position = np.asarray(q, dtype=np.float64) * (total - 1)
    i = np.minimum(np.searchsorted(upto, np.floor(position), side="right"), len(used) - 1)
    inside = (position - (upto[i] - counts[used[i]]) + 0.5) / counts[used[i]]
    low, high = edges[used[i]], edges[used[i] + 1]
    return low + np.clip(inside, 0.0, 1.0) * (high - low)
