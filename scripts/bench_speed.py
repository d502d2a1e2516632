"""How fast the simulator is: iterations and requests per CPU-second, with full metrics, and how that scales.

    python scripts/bench_speed.py [--requests 200000] [--load 0.8] [--profile a100-llama3-8b] [--repeats 5]
    [--json]

Everything is warmed up first. A figure is the median over the repeats of one whole `simulate` and `metrics`
on requests drawn before; `iterations_per_cpu_s` and `requests_per_cpu_s` are of the default mode, whose
results are those of iterating to the last bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import memory
import numba

import baselines
from llmsched_env import EngineConfig, Requests, Result, profiles, simulate, workloads
from llmsched_env.simulation import resolve
from llmsched_env.theory.capacity import capacity


def draw(num_requests: int, load: float, profile: str, scheduler: str) -> Requests:
    """Requests of azure-conv at a load of this engine."""
    workload = workloads.get("azure-conv", num_requests=num_requests, load=load, seed=0)
    chosen = profiles.get(profile)
    limit = capacity(
        workload.moments(), chosen.time, resolve(EngineConfig(), baselines.get(scheduler), chosen)
    )
    return workload.draw(limit.rps)


def measure(requests: Requests, profile: str, scheduler: str, skip: str, repeats: int) -> dict[str, Any]:
    """Medians over the repeats."""
    cpu, wall = [], []
    result: Result | None = None
    for _ in range(repeats):
        result = None
        gc.collect()
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        result = simulate(requests, baselines.get(scheduler), profile, skip=skip)
        result.metrics()
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    assert result is not None
    seconds, passed = statistics.median(cpu), statistics.median(wall)
    return {
        "iterations_per_cpu_s": result.iterations_total / seconds,
        "requests_per_cpu_s": len(requests) / seconds,
        "request_iterations_per_cpu_s": result.iterations_total * result.batch_mean / seconds,
        "iterations_per_wall_s": result.iterations_total / passed,
        "requests_per_wall_s": len(requests) / passed,
        "cpu_s": seconds,
        "wall_s": passed,
        "iterations": result.iterations_total,
        "mean_batch": result.batch_mean,
        "preemptions": result.preemptions_total,
        "mean_latency_s": float((result.finish_s - requests.arrival_s).mean()),
    }


def peak_of(num_requests: int, load: float, profile: str, scheduler: str) -> float:
    """Peak memory of a process of its own that draws and serves so many requests."""
    arguments = [
        sys.executable,
        __file__,
        "--only-memory",
        "--requests",
        str(num_requests),
        "--load",
        str(load),
    ]
    arguments += ["--profile", profile, "--scheduler", scheduler]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def import_seconds() -> float:
    """Wall seconds of a warm `import llmsched_env` in a process of its own, the interpreter's start not
    counted.
    """
    code = "import time; t = time.perf_counter(); import llmsched_env; print(time.perf_counter() - t)"
    return min(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--profile", default="a100-llama3-8b")
    parser.add_argument("--scheduler", default="vllm-v1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    of_engine = (options.profile, options.scheduler)

    requests = draw(options.requests, options.load, *of_engine)
    if options.only_memory:
        simulate(requests, baselines.get(options.scheduler), options.profile)
        print(memory.peak_rss_mb())
        return
    simulate(
        requests.take(slice(0, 1000)), baselines.get(options.scheduler), options.profile
    ).metrics()  # compiled and warm

    modes = {
        skip: measure(requests, *of_engine, skip, options.repeats) for skip in ("exact", "closed", "none")
    }
    overloaded = measure(draw(options.requests, 2.0, *of_engine), *of_engine, "exact", options.repeats)
    quarter = measure(
        draw(options.requests // 4, options.load, *of_engine), *of_engine, "exact", options.repeats
    )
    trace = measure(draw(2000, options.load, *of_engine), *of_engine, "exact", 20)
    default = modes["exact"]
    report = {
        **default,
        "profile": options.profile,
        "scheduler": options.scheduler,
        "load": options.load,
        "requests": options.requests,
        "peak_rss_mb": peak_of(options.requests, options.load, *of_engine),
        "peak_rss_1m_mb": peak_of(1_000_000, options.load, *of_engine),
        "modes": modes,
        "speedup_exact_over_none": modes["none"]["cpu_s"] / default["cpu_s"],
        "speedup_closed_over_none": modes["none"]["cpu_s"] / modes["closed"]["cpu_s"],
        "closed_latency_relative_difference": abs(
            modes["closed"]["mean_latency_s"] / default["mean_latency_s"] - 1
        ),
        "load_2": overloaded,
        "load_2_time_per_request_over_this_load": overloaded["cpu_s"] / default["cpu_s"],
        "time_per_request_over_that_of_a_quarter": (default["cpu_s"] / options.requests)
        / (quarter["cpu_s"] / (options.requests // 4)),
        "trace_of_2000_requests_s": trace["wall_s"],
        "import_s": import_seconds(),
        "python": platform.python_version(),
        "numba": numba.__version__,
    }
    if options.json:
        print(json.dumps(report, indent=1))
        return
    for skip, figures in modes.items():
        print(
            f"{skip:7s} {figures['iterations_per_cpu_s'] / 1e6:6.2f} M iterations, "
            f"{figures['requests_per_cpu_s'] / 1e6:5.2f} M requests, "
            f"{figures['request_iterations_per_cpu_s'] / 1e6:6.1f} M request-iterations per CPU-second; "
            f"mean batch {figures['mean_batch']:.1f}"
        )
    for name in (
        "speedup_exact_over_none",
        "speedup_closed_over_none",
        "closed_latency_relative_difference",
        "load_2_time_per_request_over_this_load",
        "time_per_request_over_that_of_a_quarter",
        "trace_of_2000_requests_s",
        "peak_rss_mb",
        "peak_rss_1m_mb",
        "import_s",
    ):
        print(f"{name.replace('_', ' '):42s} {report[name]:.4g}")


if __name__ == "__main__":
    main()
