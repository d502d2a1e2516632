"""Metrics against a plain-Python reading of their definitions, on hand-made results."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmsched_env.core.histogram import BINS, itl_bins
from llmsched_env.core.requests import Requests
from llmsched_env.errors import InputError
from llmsched_env.metrics import distribution, request_times, summary, to_frame


@dataclasses.dataclass
class FakeResult:
    """What `metrics` reads of a `Result`."""

    requests: Requests
    first_scheduled_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    generated_tokens: NDArray[np.int64]
    preemptions: NDArray[np.int32]
    recomputed_tokens: NDArray[np.int64]
    itl_counts: NDArray[np.int64]
    itl_sum: float
    iterations_total: int = 40
    makespan_s: float = 12.0
    busy_s: float = 10.0
    gpus: int = 2
    kv_mean: float = 0.5
    batch_mean: float = 3.0


def made(seed: int = 0, n: int = 50, **targets: Any) -> tuple[Any, list[list[float]]]:
    """A result, and the times at which each request's tokens came."""
    rng = np.random.default_rng(seed)
    output = rng.integers(1, 30, n)
    requests = Requests.of(np.sort(rng.uniform(0, 10, n)), rng.integers(1, 500, n), output, **targets)
    scheduled = requests.arrival_s + rng.exponential(0.3, n)
    tokens = [(scheduled[i] + np.cumsum(rng.exponential(0.05, output[i]))).tolist() for i in range(n)]
    gaps = np.concatenate([np.diff(t) for t in tokens])
    result = FakeResult(
        requests,
        scheduled,
        np.array([t[0] for t in tokens]),
        np.array([t[-1] for t in tokens]),
        output.astype(np.int64),
        rng.integers(0, 3, n).astype(np.int32),
        rng.integers(0, 99, n),
        np.bincount(itl_bins(gaps), minlength=BINS),
        float(gaps.sum()),
    )
    return result, tokens


def naive(values: list[float]) -> dict[str, float]:
    p50, p90, p99 = (float(np.percentile(values, p)) for p in (50, 90, 99))
    return {"mean": sum(values) / len(values), "p50": p50, "p90": p90, "p99": p99}


@pytest.mark.parametrize("seed", range(3))
def test_as_the_serving_benchmark_computes_them(seed: int) -> None:
    result, tokens = made(seed)
    arrival = result.requests.arrival_s.tolist()
    ttft, tpot, latency, normalised, itl, good = [], [], [], [], [], 0
    for start, times in zip(arrival, tokens, strict=True):
        ttft.append(times[0] - start)
        latency.append(times[-1] - start)
        normalised.append(latency[-1] / len(times))
        per_token = 0.0
        if len(times) > 1:
            per_token = (latency[-1] - ttft[-1]) / (len(times) - 1)
            tpot.append(per_token)
        itl += np.diff(times).tolist()
        good += ttft[-1] <= 0.35 and per_token <= 0.05 and latency[-1] <= 1.0
    duration = max(times[-1] for times in tokens) - arrival[0]
    produced = sum(map(len, tokens))

    got = summary(result, ttft_target=0.35, tpot_target=0.05, latency_target=1.0)
    for name, values in (
        ("ttft", ttft),
        ("tpot", tpot),
        ("latency", latency),
        ("normalised_latency", normalised),
    ):
        assert got[name] == pytest.approx(naive(values)), name
    assert got["itl"]["mean"] == pytest.approx(sum(itl) / len(itl), rel=1e-12)
    # At most 0.4 % from a value of the list; between two neighbours of few values any is right.
    exact = {p: np.percentile(itl, q, method="nearest") for p, q in (("p50", 50), ("p90", 90), ("p99", 99))}
    for p, value in exact.items():
        assert any(got["itl"][p] == pytest.approx(v, rel=0.004) for v in np.sort(itl)), (p, value)
    assert 0 < good < len(tokens)
    assert got["goodput_rps"] == pytest.approx(good / duration)
    assert got["throughput_rps"] == pytest.approx(len(tokens) / duration)
    assert got["output_tokens_per_s"] == pytest.approx(produced / duration)
    assert got["total_tokens_per_s"] == pytest.approx(
        (produced + result.requests.prompt_tokens.sum()) / duration
    )
    assert got["gpu_s_per_1k_tokens"] == pytest.approx(10.0 * 2 / produced * 1000)
    delay = [s - a for s, a in zip(result.first_scheduled_s, arrival, strict=True)]
    assert got["scheduling_delay"] == pytest.approx(naive(delay))


def test_targets_of_the_requests_define_goodput_when_none_is_given() -> None:
    result, _ = made(ttft_target_s=0.35, tpot_target_s=0.05)
    assert (
        summary(result)["goodput_rps"] == summary(result, ttft_target=0.35, tpot_target=0.05)["goodput_rps"]
    )
    assert summary(made()[0])["goodput_rps"] is None


def test_unfinished_requests_are_counted_and_left_out() -> None:
    result, _ = made()
    whole = summary(result)
    last = int(np.argmax(result.finish_s))
    result.finish_s[last] = math.nan
    result.first_token_s[0] = result.finish_s[0] = result.first_scheduled_s[0] = math.nan
    got = summary(result)
    assert (whole["finished"], got["finished"], got["requests"]) == (50, 48, 50)
    others = np.delete(np.arange(50), [0, last])
    assert got["latency"]["mean"] == pytest.approx(request_times(result)["latency"][others].mean())
    assert np.isfinite(list(got["scheduling_delay"].values())).all()


def test_none_finished_gives_nan_and_no_warning() -> None:
    result, _ = made()
    result.finish_s[:] = result.first_token_s[:] = math.nan
    result.generated_tokens[:] = 0
    result.itl_counts[:] = 0
    got = summary(result, ttft_target=1.0)
    assert got["finished"] == 0
    assert (
        math.isnan(got["ttft"]["mean"])
        and math.isnan(got["itl"]["p50"])
        and math.isnan(got["gpu_s_per_1k_tokens"])
    )


def test_trim_leaves_out_the_first_and_the_last_arrivals() -> None:
    result, _ = made(n=100)
    got = summary(result, trim=(0.1, 0.2))
    times = request_times(result)
    assert got["latency"]["mean"] == pytest.approx(times["latency"][10:80].mean())
    start, end = result.requests.arrival_s[10], result.requests.arrival_s[80]
    inside = (result.finish_s >= start) & (result.finish_s <= end)
    assert got["throughput_rps"] == pytest.approx(inside.sum() / (end - start))


@pytest.mark.parametrize("trim", [(0.5, 0.5), (1.0, 0.0), (-0.1, 0.0), (0.0, 1.5), (math.nan, 0.0)])
def test_trim_that_leaves_nothing_is_refused(trim: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="trim"):
        summary(made()[0], trim=trim)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan])
def test_targets_must_be_positive(target: float) -> None:
    with pytest.raises(InputError, match="tpot_target must be a positive number"):
        summary(made()[0], tpot_target=target)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_distribution_is_numpys(n: int) -> None:
    values = np.random.default_rng(n).lognormal(size=n)
    assert distribution(values) == pytest.approx(naive(values.tolist()))


def test_to_frame_has_a_row_per_request() -> None:
    result, _ = made(n=5)
    frame = to_frame(result)
    assert len(frame) == 5
    assert frame["request_id"].tolist() == ["0", "1", "2", "3", "4"]
    np.testing.assert_allclose(frame["latency_s"], result.finish_s - result.requests.arrival_s)
