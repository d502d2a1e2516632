import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsched_env.core.histogram import BINS, itl_bin, itl_bin_edges, itl_bins, quantiles


def twin(x: float) -> int:
    """The bin from the definition: 256 equal steps per octave, from 2^-24."""
    fraction, exponent = math.frexp(x)  # x = fraction * 2**exponent, 1/2 <= fraction < 1
    return min(max((exponent - 1 + 24) * 256 + math.floor((2 * fraction - 1) * 256), 0), BINS - 1)


@given(st.floats(min_value=5e-324, max_value=1e300))
def test_compiled_vectorised_and_plain_bins_agree(x: float) -> None:
    assert itl_bin(x) == itl_bins(np.array([x]))[0] == twin(x)


def test_zero_and_negative_fall_into_the_first_bin() -> None:
    assert itl_bin(0.0) == itl_bin(-0.0) == itl_bin(-3.0) == 0
    assert itl_bin(math.inf) == BINS - 1


def test_edges_bound_their_bins() -> None:
    edges = itl_bin_edges()
    assert edges[0] == 2.0**-24 and edges[-1] == 2.0**16 and len(edges) == BINS + 1
    assert np.all(np.diff(edges) / edges[:-1] <= 1 / 256)
    np.testing.assert_array_equal(itl_bins(edges[:-1]), np.arange(BINS))
    np.testing.assert_array_equal(itl_bins(np.nextafter(edges[1:], 0)), np.arange(BINS))
    assert struct.unpack("<q", struct.pack("<d", edges[0]))[0] >> 44 == (1023 - 24) << 8


@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0])
def test_quantiles_within_0_4_percent(sigma: float) -> None:
    x = np.random.default_rng(1).lognormal(-4, sigma, 100_001)
    counts = np.bincount(itl_bins(x), minlength=BINS)
    q = np.array([0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0])
    np.testing.assert_allclose(quantiles(counts, q), np.quantile(x, q), rtol=0.004)


def test_quantiles_of_one_value_and_of_none() -> None:
    counts = np.zeros(BINS, dtype=np.int64)
    assert np.isnan(quantiles(counts, np.array([0.5]))).all()
    counts[itl_bin(0.03)] = 7
    np.testing.assert_allclose(quantiles(counts, np.array([0.5, 0.99])), 0.03, rtol=0.004)
