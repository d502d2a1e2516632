"""What the exact methods prove, and how far the schedulers are from it.

    python scripts/bench_optimum.py [infermax] [latency] [gpu-time] [unit-time] [agreement] [scale]
        [--seeds 10] [--seconds 60] [--json]

Without names all parts are run, which takes about an hour. Times are wall seconds on this machine,
everything compiled before; medians over the seeds.

    infermax   four requests of four output tokens (INFERMAX's instance): preempting against reserving
    latency    total latency, affine iteration times, mixed sizes: N = 8, 10, 12; with idling; with preemption
    gpu-time   fewest batches: N = 32, 64
    unit-time  the setting of MC-SF: N = 64
    agreement  CP-SAT against the search; schedulers and random policies against the optimum; bounds below it
    scale      1,000 requests of the embedded workloads: schedulers, best known, bounds
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

import baselines
from baselines.optimal import Instance, Solution, bounds, instance, replay
from baselines.optimal.cpsat import solve as cpsat
from baselines.optimal.improve import improve, incumbent
from baselines.optimal.search import search
from llmsched_env import profiles, simulate, workloads
from llmsched_env.errors import InputError

Row = dict[str, Any]


def told(row: Row) -> Row:
    """Print a row as soon as it is there."""
    print(
        "  ".join(
            f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
        ),
        flush=True,
        file=sys.stderr,
    )
    return row


def summed(name: str, solutions: Iterable[Solution]) -> Row:
    """Medians over solutions."""
    found = list(solutions)
    return told(
        {
            "case": name,
            "instances": len(found),
            "proved": sum(s.status == "optimal" for s in found),
            "median_s": statistics.median(s.seconds for s in found),
            "largest_s": max(s.seconds for s in found),
            "median_gap": statistics.median(s.gap for s in found),
            "largest_gap": max(s.gap for s in found),
        }
    )


# ---------------------------------------------------------------------- parts


def infermax(seeds: int, seconds: float) -> Iterator[Row]:
    """The optimum with preemption, against the best schedule that reserves a request's peak when it starts,
    and against the schedulers that always preempt.

    The four requests are alike, so that reserving a peak is the same as a cache in blocks of its size.
    """
    for prompt in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        peak = prompt + 3
        for share in (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5):
            kv_tokens = int(share * peak)
            best = search(instance.infermax(prompt, kv_tokens), time_limit_s=seconds)
            never = search(instance.infermax(prompt, kv_tokens, allow=()), time_limit_s=seconds)
            made = instance.infermax(prompt, kv_tokens, allow=())
            blocks = made.engine.replace(block_size=peak, kv_blocks=kv_tokens // peak)
            reserving = search(made.replace(engine=blocks), time_limit_s=seconds)
            preempting = simulate(
                made.requests,
                baselines.get("infermax-vllm"),
                made.profile,
                made.engine.replace(watermark=None),
            )
            yield told(
                {
                    "case": f"I {prompt}, M {kv_tokens}",
                    "optimum_ms": 1e3 * best.objective,
                    "proved": best.status == "optimal",
                    "seconds": best.seconds,
                    "reserving_over_optimum": reserving.objective / best.objective - 1,
                    "never_preempting_over_optimum": never.objective / best.objective - 1,
                    "always_preempting_over_reserving": preempting.busy_s / reserving.objective - 1,
                    "preemptions_of_optimum": best.result().preemptions_total,
                }
            )


def latency(seeds: int, seconds: float) -> Iterator[Row]:
    """Total latency by the exact search."""
    for n in (8, 10, 12, 14):
        yield summed(f"N {n}", (search(instance.mixed(n, s), time_limit_s=seconds) for s in range(seeds)))
    cases: tuple[tuple[int, tuple[str, ...]], ...] = (
        (10, ("idle",)),
        (12, ("idle",)),
        (7, ("preempt",)),
        (8, ("preempt",)),
        (7, ("preempt", "pause", "idle")),
    )
    for n, allow in cases:
        made = [
            instance.mixed(n, s, load=1.0 if "idle" in allow else None, allow=allow) for s in range(seeds)
        ]
        yield summed(f"N {n} with {', '.join(allow)}", (search(m, time_limit_s=seconds) for m in made))


def gpu_time(seeds: int, seconds: float) -> Iterator[Row]:
    """GPU time without preemption by CP-SAT."""
    for n in (16, 32, 64):
        made = [instance.mixed(n, s, objective="gpu_time") for s in range(seeds)]
        yield summed(f"N {n}", (cpsat(m, time_limit_s=min(seconds, 40.0)) for m in made))


def unit_time(seeds: int, seconds: float) -> Iterator[Row]:
    """Total latency of unit iterations by CP-SAT."""
    for n in (32, 64):
        made = [instance.unit_time(n, s) for s in range(seeds)]
        yield summed(f"N {n}", (cpsat(m, time_limit_s=min(seconds, 40.0)) for m in made))


def random_instance(rng: np.random.Generator) -> Instance:
    """Three to six short requests, any objective and allowances that both methods finish."""
    allow = [a for a, p in (("pause", 0.2), ("preempt", 0.3), ("idle", 0.3)) if rng.random() < p]
    n = int(rng.integers(3, 5 if allow else 7))
    load = None if rng.random() < 0.5 else float(rng.choice([0.5, 1.0, 2.0]))
    objective = str(rng.choice(["total_latency", "gpu_time", "makespan", "mean_ttft"]))
    made = instance.mixed(n, int(rng.integers(1 << 30)), load=load, allow=allow, objective=objective)
    kv_tokens = int(rng.integers(31, 80))
    output = np.minimum(made.requests.output_tokens, 4)
    rows = np.stack([made.requests.arrival_s, made.requests.prompt_tokens, output], axis=1)
    return Instance.of(
        rows.tolist(), kv_tokens, 64, made.profile, allow=allow, objective=objective, name=made.name
    )


def agreement(seeds: int, seconds: float) -> Iterator[Row]:
    """Two methods, and everybody else, on the same instances."""
    rng = np.random.default_rng(0)
    both = same = below = 0
    worst = 0.0
    for _ in range(500):
        made = random_instance(rng)
        exact = search(made, time_limit_s=seconds)
        if exact.status != "optimal" or exact.schedule is None:
            continue
        replay(made, exact.schedule)  # refuses what breaks a rule
        values = bounds.lower_bounds(made)
        below += all(value <= exact.objective * (1 + 1e-9) for value in values.values())
        worst = max(worst, *(value / exact.objective for value in values.values()))
        if both < 200:
            other = cpsat(made, time_limit_s=seconds)
            if other.status == "optimal":
                both += 1
                same += abs(other.objective - exact.objective) <= 1e-9 * exact.objective
                if abs(other.objective - exact.objective) > 1e-9 * exact.objective:
                    print(
                        "differ:",
                        json.dumps(made.to_json()),
                        exact.objective,
                        other.objective,
                        file=sys.stderr,
                    )
    yield told({"case": "CP-SAT and search", "both_prove": both, "agree": same})
    yield told({"case": "bounds", "instances": 500, "below_the_optimum": below, "closest": worst})
    beaten = runs = 0
    for seed in range(10):
        made = instance.mixed(6, seed, allow=("chunk", "pause", "preempt"))
        free = made.replace(allow=("pause", "preempt"))
        exact = search(free, time_limit_s=seconds)
        engine = made.engine.replace(watermark=None)
        for k in range(1000):
            result = simulate(
                made.requests, baselines.get("random-feasible", chunked=False), made.profile, engine, seed=k
            )
            runs += 1
            beaten += free.value(result) < exact.bound * (1 - 1e-9)
        for name in baselines.names():
            try:
                result = simulate(made.requests, baselines.get(name), made.profile, engine, record="schedule")
                replay(free, result.schedule)  # type: ignore[arg-type]
            except InputError:
                continue  # does what the instance forbids
            runs += 1
            beaten += free.value(result) < exact.bound * (1 - 1e-9)
    yield told({"case": "random policies and schedulers", "runs": runs, "better_than_the_optimum": beaten})


def scale(seeds: int, seconds: float) -> Iterator[Row]:
    """Long traces: mean latencies in seconds of 1,000 requests."""
    for name in (
        "azure-conv",
        "azure-code",
        "arxiv-summarization",
        "chatbot-arena",
        "deepseek-r1",
        "mooncake-conversation",
    ):
        for load in (0.5, 0.85, 1.1):
            recipe = workloads.get(name, num_requests=1000, load=load, seed=0)
            first = simulate(recipe, baselines.get("vllm-v1"), "a100-llama3-8b")
            runs = {"vllm-v1": first}  # the same requests for all, each with its own engine settings
            for scheduler in ("sarathi", "orca", "srf", "mc-sf", "area-backfill", "srpt"):
                try:
                    runs[scheduler] = simulate(first.requests, baselines.get(scheduler), first.profile)
                except InputError as error:
                    print(f"{scheduler}: {error}", file=sys.stderr)
            made = Instance(
                first.requests,
                first.engine.replace(watermark=0.0),
                profiles.get(first.profile),
                frozenset(("chunk", "pause", "preempt")),
                name=f"{name}-{load:g}",
            )
            best = improve(made, time_limit_s=seconds)
            lower = bounds.lower_bounds(made)
            bound = max(lower.values())
            yield told(
                {
                    "case": made.name,
                    **{f"{s}_s": float((r.finish_s - r.requests.arrival_s).mean()) for s, r in runs.items()},
                    "best_known_s": best.objective / 1000,
                    "bound_s": bound / 1000,
                    "bound": max(lower, key=lambda key: lower[key]),
                    "best_known_over_bound": best.objective / bound,
                    "label": "tight" if best.objective < 1.05 * bound else "loose",
                }
            )


PARTS: dict[str, Callable[[int, float], Iterator[Row]]] = {
    "infermax": infermax,
    "latency": latency,
    "gpu-time": gpu_time,
    "unit-time": unit_time,
    "agreement": agreement,
    "scale": scale,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, default=10, help="instances of each case")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of each solution")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}; known: {', '.join(PARTS)}")
    tiny = instance.mixed(3, 0)
    search(tiny)
    incumbent(tiny)
    rows = {name: list(PARTS[name](options.seeds, options.seconds)) for name in options.parts or PARTS}
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
