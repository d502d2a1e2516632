"""Statistics of comparisons: against scipy's and hand-computed values; whether intervals hold the truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from agents.statistics import (
    Bootstrap,
    Estimate,
    difference,
    iqm,
    mean,
    normalised,
    performance_profile,
    probability_of_improvement,
    relative_difference,
)
from llmsched_env import InputError

NAN = math.nan
X = np.array([[1.0, 2.0, 3.0], [3.0, NAN, 5.0]])  # two trainings, three traces
Y = np.array([[2.0, 2.0, NAN]])

tables = st.tuples(st.integers(1, 5), st.integers(1, 7)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-5, 5).map(float))
)


@st.composite
def two(draw: Any) -> Any:
    """Values of two policies on the same traces."""
    x = draw(tables)
    shape = (draw(st.integers(1, 5)), x.shape[1])
    return x, draw(arrays(np.float64, shape, elements=st.integers(-5, 5).map(float)))


# ---------------------------------------------------------------------- values


def test_by_hand() -> None:
    assert mean(X) == 14 / 5
    assert iqm(X) == (2 + 3 + 3) / 3  # of 1 2 3 3 5 the first and the last are cut
    assert difference(X, Y) == ((1 - 2) + (2 - 2) + (3 - 2)) / 3
    assert relative_difference(X, Y) == 0.0
    assert relative_difference(X + 1, Y) == 3 / 6
    assert relative_difference(-X - 1, -Y) == -3 / 6  # of what is to be small
    # 1 < 2, 3 > 2; 2 = 2, not finished; anything is better than not to finish
    assert probability_of_improvement(X, Y) == (0 + 1 + 0.5 + 0 + 1 + 1) / 6
    profile = performance_profile(np.array([0.0, 2.0, 2.5, 9.0]))(X)
    assert profile.tolist() == [5 / 6, 3 / 6, 3 / 6, 0.0]


def test_normalised_is_a_ratio_of_means() -> None:
    zero, one = np.array([[10.0, 10.0, 20.0]]), np.array([[0.0, 10.0, NAN]])
    assert normalised(zero, zero, one) == 0.0 and normalised(one, zero, one) == 1.0
    assert normalised(np.array([[5.0, 9.0, 0.0]]), zero, one) == (5 + 1) / 10
    assert np.isnan(normalised(zero, zero, zero))


def test_what_differs_by_rounding_is_equal() -> None:
    x = np.array([[0.1 + 0.2, 1.0]])
    assert probability_of_improvement(x, np.array([[0.3, 1.0 + 1e-12]])) == 0.5
    assert probability_of_improvement(x, np.array([[0.3, 1.0 + 1e-6]])) == 0.25
    gone = np.full((1, 2), NAN)
    assert probability_of_improvement(x, gone) == 1.0 and probability_of_improvement(gone, gone) == 0.5


def test_nothing_is_known_of_nothing() -> None:
    gone = np.full((2, 3), NAN)
    for found in (mean(gone), iqm(gone), difference(gone, X), relative_difference(X, 0 * X)):
        assert np.isnan(found)


@given(tables)
def test_iqm_is_the_trimmed_mean(x: Any) -> None:
    assert iqm(x) == pytest.approx(scipy.stats.trim_mean(x, 0.25, axis=None), abs=1e-12)
    padded = np.concatenate([x, np.full_like(x, NAN)])
    assert iqm(padded) == pytest.approx(iqm(x), abs=1e-12)


@given(two())
def test_probability_of_improvement_is_that_of_mann_and_whitney(values: Any) -> None:
    x, y = values
    per_trace = [
        scipy.stats.mannwhitneyu(x[:, t], y[:, t]).statistic / (len(x) * len(y)) for t in range(x.shape[1])
    ]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(per_trace))


@given(two())
def test_two_ways_to_look_at_two_policies(values: Any) -> None:
    x, y = values
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1)
    assert difference(x, y) == pytest.approx(-difference(y, x))
    assert difference(x, y) == pytest.approx(mean(x) - mean(y), abs=1e-12)
    assert difference(x + 1, y) == pytest.approx(1 + difference(x, y))


@given(arrays(np.float64, (3, 2, 4), elements=st.integers(-5, 5).map(float)))
def test_many_at_once_are_each_alone(x: Any) -> None:
    profile = performance_profile(np.array([-1.0, 0.0, 2.0]))
    for statistic in (mean, iqm, profile):
        assert statistic(x).tolist() == [statistic(one).tolist() for one in x]
    for of_two in (difference, probability_of_improvement):
        assert of_two(x, x[:, :1]).tolist() == [of_two(one, one[:1]).tolist() for one in x]


# ---------------------------------------------------------------------- intervals


@given(tables, st.integers(0, 3))
@settings(max_examples=30)
def test_intervals_lie_within_the_values(x: Any, seed: int) -> None:
    found = Bootstrap(repeats=50, seed=seed).estimate(mean, x)
    if x.size == 1:
        assert math.isnan(found.low) and math.isnan(found.high)
    else:
        assert x.min() <= found.low <= found.high <= x.max()
    assert found.value == mean(x)


def test_intervals_are_reproducible_and_grow_with_their_level() -> None:
    x = np.random.default_rng(0).normal(size=(3, 20))
    narrow, same, wide = (Bootstrap(500, level).estimate(mean, x) for level in (0.5, 0.5, 0.95))
    assert narrow == same
    assert wide.low < narrow.low < narrow.high < wide.high
    assert Bootstrap(500, seed=1).estimate(mean, x) != wide


def test_the_width_is_the_standard_error() -> None:
    x = np.random.default_rng(1).normal(3.0, 2.0, size=(1, 200))
    found = Bootstrap(4000).estimate(mean, x)
    half = 1.96 * x.std() / math.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)
    assert found.high + found.low == pytest.approx(2 * x.mean(), abs=0.1 * half)


def test_traces_stay_paired() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(0.0, 10.0, size=(1, 40))  # traces differ far more than policies do
    x, y = hard + 1.0 + rng.normal(0.0, 0.1, (2, 40)), hard + rng.normal(0.0, 0.1, (3, 40))
    level, gain = Bootstrap().estimate(mean, x), Bootstrap().estimate(difference, x, y)
    assert gain.sign == 1 and level.sign == 0
    assert gain.high - gain.low < 0.05 * (level.high - level.low)


def test_no_memory_is_lost_on_many_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn some at a time, which does not change how many there are."""
    seen: list[int] = []

    def spy(x: Any) -> Any:
        seen.append(len(x) if x.ndim == 3 else 0)
        return mean(x)

    monkeypatch.setattr("agents.statistics._AT_ONCE", 70)
    Bootstrap(101).estimate(spy, np.ones((2, 5)))
    assert sum(seen) == 101 and max(seen) < 20


def _coverage(trainings: int, traces: int, spread: float, pooled: bool = False) -> float:
    """How often an interval holds the true mean, 0, where trainings differ by `spread` and cells by 1."""
    rng = np.random.default_rng(3)
    bootstrap, held = Bootstrap(repeats=400), 0
    for _ in range(300):
        x = rng.normal(size=(trainings, traces)) + spread * rng.normal(size=(trainings, 1))
        x += 0.5 * rng.normal(size=(1, traces))
        found = bootstrap.estimate(mean, x.mean(axis=0, keepdims=True) if pooled else x)
        held += found.low <= 0.0 <= found.high
    return held / 300


def test_intervals_hold_the_truth() -> None:
    assert 0.91 <= _coverage(1, 32, 0.0) <= 0.98
    assert 0.90 <= _coverage(10, 32, 1.0) <= 0.98
    assert 0.88 <= _coverage(5, 32, 1.0) <= 0.97
    assert 0.78 <= _coverage(3, 32, 1.0) <= 0.90  # too few
    assert _coverage(5, 32, 1.0, pooled=True) < 0.7  # as if there were no other trainings: far too narrow


def test_profiles_have_bands() -> None:
    x = np.random.default_rng(4).normal(size=(2, 30))
    shares, low, high = Bootstrap(300).bands(performance_profile(np.linspace(-4, 4, 9)), x)
    assert shares.shape == low.shape == high.shape == (9,)
    assert (np.diff(shares) <= 0).all() and shares[0] == 1 and shares[-1] == 0
    assert (low <= shares).all() and (shares <= high).all()


def test_unknown_resamples_are_left_out() -> None:
    x = np.array([[1.0, NAN, NAN]])
    found = Bootstrap(100).estimate(mean, x)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    gone = Bootstrap(100).estimate(mean, np.full((1, 3), NAN))
    assert math.isnan(gone.value) and math.isnan(gone.low) and gone.sign == 0


def test_signs() -> None:
    assert [Estimate(1, 0.5, 2).sign, Estimate(1, -0.5, 2).sign, Estimate(-1, -2, -0.5).sign] == [1, 0, -1]
    assert Estimate(1.0).sign == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bootstrap(repeats=0), "repeats must be at least 1, not 0"),
        (lambda: Bootstrap(level=1.0), "level must be between 0 and 1"),
        (lambda: Bootstrap().estimate(difference, np.ones((1, 3)), np.ones((1, 4))), "the same traces"),
        (lambda: Bootstrap().estimate(mean, np.ones((1, 0))), "one at least"),
    ],
)
def test_what_cannot_be_estimated(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
