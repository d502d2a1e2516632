"""What a run is judged by, defined as in vLLM's serving benchmark (`benchmarks/benchmark_serving.py`).

For a request with n tokens in its answer, in seconds:

    TTFT                 time to first token: first token - arrival
    latency              end to end: finish - arrival
    TPOT                 time per output token: (latency - TTFT) / (n - 1), for n > 1
    ITL                  inter-token latencies: the n - 1 gaps between its tokens; distributed over all tokens
    normalised latency   latency / n (Orca, vLLM's paper)
    scheduling delay     first scheduled - arrival

and for a run: throughput in requests, output tokens and all tokens per second; goodput, the requests per
second that meet every target given (a TPOT of a single token counts as 0, a value equal to its target meets
it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.histogram import itl_bin, itl_bin_edges, quantiles
from llmsched_env.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from llmsched_env.simulation import Result

__all__ = ["distribution", "itl_bin", "itl_bin_edges", "request_times", "summary", "to_frame"]

QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}


def distribution(values: NDArray[np.float64]) -> dict[str, float]:
    """Mean, p50, p90 and p99 of the `values` that are not nan, interpolated as `numpy.percentile` does; nan
    if there are none."""
    ordered = np.sort(values)
    n = int(np.searchsorted(ordered, np.nan))  # nan comes last
    if n == 0:
        return dict.fromkeys(("mean", *QUANTILES), float("nan"))
    position = np.array(list(QUANTILES.values())) * (n - 1)
    low = position.astype(np.int64)
    high = np.minimum(low + 1, n - 1)
    at = ordered[low] + (position - low) * (ordered[high] - ordered[low])
    return {"mean": float(ordered[:n].mean()), **dict(zip(QUANTILES, at.tolist(), strict=True))}


def request_times(result: Result) -> dict[str, NDArray[np.float64]]:
    """Times of each request in seconds, float64 of shape (N,), nan where it did not come so far.

    Keys: ttft, tpot (nan for answers of one token), latency, normalised_latency, scheduling_delay.
    """
    arrival, tokens = result.requests.arrival_s, result.generated_tokens
    latency = result.finish_s - arrival
    gaps = np.where(tokens > 1, tokens - 1.0, np.nan)
    return {
        "ttft": result.first_token_s - arrival,
        "tpot": (result.finish_s - result.first_token_s) / gaps,
        "latency": latency,
        "normalised_latency": latency / np.maximum(tokens, 1),
        "scheduling_delay": result.first_scheduled_s - arrival,
    }


def summary(
    result: Result,
    *,
    ttft_target: float | None = None,
    tpot_target: float | None = None,
    latency_target: float | None = None,
    trim: tuple[float, float] = (0.0, 0.0),
) -> dict[str, Any]:
    """The metrics of a run, as plain Python numbers.

    Args:
        ttft_target, tpot_target, latency_target: seconds; those given define goodput, for every request
            alike. When none is given, each request's own TTFT and TPOT targets do.
        trim: shares of the requests, first and last by arrival, to leave out (warm-up and drain). Then
            distributions are of the arrivals kept, and rates count what completes between the first arrival
            kept and the first dropped at the end. Counts and the figures of the engine (preemptions, ITL, KV
            use, batch size, GPU time) are always of the whole run.

    Returns:
        requests, finished, iterations, preemptions, recomputed_tokens; makespan_s, gpu_busy_s;
        throughput_rps, output_tokens_per_s, total_tokens_per_s; goodput_rps (None without any target);
        kv_use (mean share of the KV cache, over busy time), batch_size (mean requests in an iteration),
        gpu_s_per_1k_tokens (busy seconds times GPUs, for 1,000 output tokens);
        ttft, tpot, itl, latency, normalised_latency, scheduling_delay: each mean, p50, p90 and p99 over the
        finished requests, nan where there is none. The mean ITL is exact, its quantiles are read from a
        histogram and off by at most 0.4 %.

    Raises:
        InputError: a target that is not positive, or shares that leave no request.
    """
    targets = {"ttft_target": ttft_target, "tpot_target": tpot_target, "latency_target": latency_target}
    for name, target in targets.items():
        if target is not None and not target > 0:
            raise InputError(f"{name} must be a positive number of seconds, not {target!r}")
    requests = result.requests
    n = len(requests)
    shares = np.clip(np.nan_to_num(trim, nan=1.0), 0, 1)
    first, stop = round(shares[0] * n), n - round(shares[1] * n)
    if min(trim) < 0 or first >= stop:
        raise InputError(f"trim {trim} leaves none of {n} requests; give shares from 0, together below 1")

    arrival = requests.arrival_s
    times = request_times(result)
    finished = ~np.isnan(result.finish_s)
    kept = finished.copy()
    kept[:first] = kept[stop:] = False

    until = float(arrival[stop]) if stop < n else float(np.max(result.finish_s[finished], initial=arrival[0]))
    duration = until - float(arrival[first])
    completed = finished & (result.finish_s >= arrival[first]) & (result.finish_s <= until)
    output = float(result.generated_tokens[completed].sum())
    prompts = float(requests.prompt_tokens[completed].sum(dtype=np.int64))

    def per_second(count: float) -> float:
        return count / duration if duration > 0 else float("nan")

    limits = [np.array(np.inf if target is None else target) for target in targets.values()]
    if not any(np.isfinite(limits)):
        limits[:2] = requests.ttft_target_s, requests.tpot_target_s
    goodput = None
    if any(np.isfinite(limit).any() for limit in limits):
        met = completed.copy()
        for name, limit in zip(("ttft", "tpot", "latency"), limits, strict=True):
            met &= ~(times[name] > limit)  # the TPOT of a single token, nan, meets any target
        goodput = per_second(float(np.count_nonzero(met)))

    generated = int(result.generated_tokens.sum())
    gaps = int(result.itl_counts.sum())
    itl = quantiles(result.itl_counts, np.array(list(QUANTILES.values())))
    nan = float("nan")
    return {
        "requests": n,
        "finished": int(np.count_nonzero(finished)),
        "iterations": int(result.iterations_total),
        "preemptions": int(result.preemptions.sum()),
        "recomputed_tokens": int(result.recomputed_tokens.sum()),
        "makespan_s": float(result.makespan_s),
        "gpu_busy_s": float(result.busy_s),
        "throughput_rps": per_second(float(np.count_nonzero(completed))),
        "output_tokens_per_s": per_second(output),
        "total_tokens_per_s": per_second(output + prompts),
        "goodput_rps": goodput,
        "kv_use": float(result.kv_mean),
        "batch_size": float(result.batch_mean),
        "gpu_s_per_1k_tokens": float(result.busy_s) * result.gpus / generated * 1000 if generated else nan,
        **{name: distribution(values if kept.all() else values[kept]) for name, values in times.items()},
        "itl": {
            "mean": float(result.itl_sum) / gaps if gaps else nan,
            **dict(zip(QUANTILES, itl.tolist(), strict=True)),
        },
    }


def to_frame(result: Result) -> pd.DataFrame:
    """One row per request, in order of arrival: the request, when it was served, and its times in seconds."""
    import pandas as pd

    requests = result.requests
    return pd.DataFrame(
        {
            "request_id": [requests.name(i) for i in range(len(requests))],
            "arrival_s": requests.arrival_s,
            "prompt_tokens": requests.prompt_tokens,
            "output_tokens": requests.output_tokens,
            "generated_tokens": result.generated_tokens,
            "priority": requests.priority,
            "client": requests.client,
            "class_id": requests.class_id,
            "first_scheduled_s": result.first_scheduled_s,
            "first_token_s": result.first_token_s,
            "finish_s": result.finish_s,
            "preemptions": result.preemptions,
            "recomputed_tokens": result.recomputed_tokens,
            **{f"{name}_s": values for name, values in request_times(result).items()},
        }
    )
