#!/usr/bin/env python3
"""Which conclusions about schedulers survive another GPU, or another cost model of the same?

    python scripts/compare_hardware.py [--seeds 10] [--profiles a.json,b.json,...] [--json]

Three questions are asked of each cost profile, of the same requests (lengths and arrivals drawn by seed; the
rate is the same share of the capacity that the profile gives):

* the order of the schedulers by mean latency and by goodput, the share of requests in time. What is in time
  goes by the profile's own speed, since on a faster GPU all would be: TPOT up to 5 and TTFT up to 100
  iterations of 32 decodes that read 4,096 tokens each (0.12 and 2.4 s on an A100), or as given in seconds;
* the best token budget of Sarathi-Serve, by both;
* with a tight KV cache, whether to preempt or to reserve each request's peak (its length known), at several
  shares of the capacity with that cache.

Then profiles are compared by pairs. Kendall's tau (b) says how alike two orders are, 1 the same and -1
reversed, with a 95 % bootstrap interval over seeds; "noise" is the tau between two halves of the seeds of one
profile: two orders that are the same, of half as many runs, are no more alike. A pair of schedulers is
reversed if each profile says significantly (paired by seed, 95 %) the opposite of the other. "Costs" is the
regret: how much worse it is, on the second profile, to choose what is best on the first. A decision between
preempting and reserving is reversed if both profiles are significant and disagree.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

import baselines
from agents.cli.common import jsonable, progress_bar, show_table
from baselines.bench import BASELINE, QUICK, interval
from llmsched_env import EngineConfig, profiles, simulate, workloads
from llmsched_env.errors import InputError, unknown
from llmsched_env.simulation import resolve
from llmsched_env.theory.capacity import capacity

Array = NDArray[Any]  # of float64
Case = tuple[str, int, float]

PAIRS = {
    "hardware": (
        ("a100-llama3.1-8b", "h100-llama3.1-8b"),
        ("a100-llama3.1-8b", "h200-llama3.1-8b"),
        ("h100-llama3.1-8b", "h200-llama3.1-8b"),
        ("a100-llama3-8b", "h100-llama3-8b"),
        ("a100-llama3-8b-linear", "h100-llama3-8b-linear"),
        ("roofline:llama-3-8b@a100", "roofline:llama-3-8b@h100"),
        ("roofline:llama-3-8b@a100", "roofline:llama-3-8b@h200"),
    ),
    "cost model": (
        ("a100-llama3-8b", "a100-llama3-8b-linear"),
        ("h100-llama3-8b", "h100-llama3-8b-linear"),
        ("a100-llama3-8b", "a100-llama3.1-8b"),
        ("h100-llama3-8b", "h100-llama3.1-8b"),
        ("a100-llama3.1-8b", "roofline:llama-3-8b@a100"),
        ("h100-llama3.1-8b", "roofline:llama-3-8b@h100"),
        ("h200-llama3.1-8b", "roofline:llama-3-8b@h200"),
    ),
}
"""What is compared: one thing differs in each, the GPU, or the form or source of its cost model."""

BUDGETS = (128, 256, 512, 1024, 2048, 4096)
PREEMPT_OR_RESERVE = (("vllm-v0", "vllm-v0-no-evict"), ("sarathi", "sarathi-no-evict"))
METRICS = ("latency", "goodput")

_RESAMPLES = 2000
_SPLITS = 200
_EQUAL = 1e-9  # relative, of two means


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is run on each profile.

    Attributes:
        load: share of the capacity.
        kv_tokens, tight_loads: sizes of a tight KV cache, and shares of the capacity with it.
        ttft_target, tpot_target: seconds, for goodput; None: by the profile's own speed.
    """

    workload: str = "azure-conv"
    load: float = 0.9
    num_requests: int = 2000
    seeds: int = 10
    schedulers: tuple[str, ...] = QUICK
    kv_tokens: tuple[int, ...] = (16_000, 48_000)
    tight_loads: tuple[float, ...] = (0.5, 0.7, 0.9)
    ttft_target: float | None = None
    tpot_target: float | None = None

    def __post_init__(self) -> None:
        if self.seeds < 3:
            raise InputError(f"--seeds {self.seeds} are too few for intervals; give at least 3")
        if len(self.schedulers) < 2:
            raise InputError("an order is of at least two schedulers; give more --schedulers")
        if min(self.kv_tokens, default=0) < 16:
            raise InputError(f"--kv-tokens {self.kv_tokens} must be at least 16 each, with commas between")
        if not all(load > 0 for load in (self.load, *self.tight_loads)):
            raise InputError("loads must be above 0")
        for name in self.schedulers:
            if name not in baselines.names():
                raise unknown("scheduler", name, baselines.names())

    def targets(self, cost: profiles.Profile) -> dict[str, float]:
        """Seconds of the targets on a profile."""
        iteration = float(cost.time(0, 0, 0, 0, 32, 32 * 4096))
        ttft = 100 * iteration if self.ttft_target is None else self.ttft_target
        return {
            "ttft_target": ttft,
            "tpot_target": 5 * iteration if self.tpot_target is None else self.tpot_target,
        }

    @property
    def runs(self) -> int:
        """Simulations on one profile."""
        tight = 2 * len(PREEMPT_OR_RESERVE) * len(self.kv_tokens) * len(self.tight_loads)
        return self.seeds * (len(self.schedulers) + len(BUDGETS) + tight)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one profile says; smaller is better everywhere.

    Attributes:
        targets: seconds.
        order: by metric (schedulers, seeds): mean latency in seconds; share of the requests not in time.
        budgets: by metric (budgets, seeds).
        tight: by preempting scheduler, KV tokens and load (2, seeds): mean latency preempting and reserving.
    """

    targets: dict[str, float]
    order: dict[str, Array]
    budgets: dict[str, Array]
    tight: dict[Case, Array]


# ---------------------------------------------------------------------- runs


def ask(profile: str, setup: Setup, pool: ThreadPoolExecutor, count: Any) -> Answers:
    """Run all of a setup on one profile."""
    S, B, n = len(setup.schedulers), len(BUDGETS), setup.seeds
    order: dict[str, Array] = {metric: np.full((S, n), np.nan) for metric in METRICS}
    budgets: dict[str, Array] = {metric: np.full((B, n), np.nan) for metric in METRICS}
    tight: dict[Case, Array] = {
        (first, kv, load): np.full((2, n), np.nan)
        for first, _ in PREEMPT_OR_RESERVE
        for kv in setup.kv_tokens
        for load in setup.tight_loads
    }
    cost = profiles.get(profile)
    targets = setup.targets(cost)

    def one(seed: int) -> None:
        def serve(requests: Any, name: str, engine: EngineConfig) -> dict[str, float]:
            result = simulate(requests, baselines.get(name), cost, engine, seed=seed, oversized="drop")
            found = result.metrics(**targets)
            count()
            if np.isnan(found["latency"]["mean"]):
                raise InputError(
                    f"{profile}: {name} can serve no request of {setup.workload} with its KV cache; give "
                    "larger --kv-tokens"
                )
            in_time = found["goodput_rps"] / found["throughput_rps"]
            return {"latency": found["latency"]["mean"], "goodput": 1 - in_time}

        requests = _draw(setup, cost, EngineConfig(), setup.load, seed)
        for i, name in enumerate(setup.schedulers):
            for metric, value in serve(requests, name, EngineConfig()).items():
                order[metric][i, seed] = value
        for i, budget in enumerate(BUDGETS):
            for metric, value in serve(requests, "sarathi", EngineConfig(token_budget=budget)).items():
                budgets[metric][i, seed] = value
        for kv, load in itertools.product(setup.kv_tokens, setup.tight_loads):
            engine = EngineConfig(kv_blocks=kv // 16)
            requests = _draw(setup, cost, engine, load, seed)
            for pair in PREEMPT_OR_RESERVE:
                for i, name in enumerate(pair):
                    tight[pair[0], kv, load][i, seed] = serve(requests, name, engine)["latency"]

    list(pool.map(one, range(n)))
    return Answers(targets, order, budgets, tight)


def _draw(setup: Setup, cost: profiles.Profile, engine: EngineConfig, load: float, seed: int) -> Any:
    """The requests of a seed, at a share of the engine's capacity as the baseline sets it up."""
    recipe = workloads.get(setup.workload, num_requests=setup.num_requests, load=load, seed=seed)
    resolved = resolve(engine, baselines.get(BASELINE), cost)
    return recipe.draw(capacity(recipe.moments(), cost.time, resolved).rps)


# ---------------------------------------------------------------------- statistics


def signs(values: Array) -> NDArray[np.int64]:
    """(..., S, S): 1 where the first of two is larger, -1 where it is smaller, 0 where they are equal."""
    a, b = values[..., :, None], values[..., None, :]
    equal = np.abs(a - b) <= _EQUAL * np.maximum(np.abs(a), np.abs(b))
    return np.where(equal, 0, np.sign(a - b)).astype(np.int64)


def tau(x: Array, y: Array) -> Array:
    """Kendall's tau-b of values (..., S) and (..., S); nan where one of them are all equal."""
    a, b = signs(x), signs(y)
    both = (a * b).sum((-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return both / np.sqrt((a * a).sum((-2, -1)) * (b * b).sum((-2, -1)))


def tau_with_interval(x: Array, y: Array, seed: int = 0) -> tuple[float, float, float]:
    """Tau of the means over seeds of (S, n) and (S, n), and its 95 % bootstrap interval over seeds."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, x.shape[1], (_RESAMPLES, x.shape[1]))
    resampled = tau(x[:, picks].mean(-1).T, y[:, picks].mean(-1).T)
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    return float(tau(x.mean(-1), y.mean(-1))), float(low), float(high)


def noise(x: Array, seed: int = 0) -> float:
    """Mean tau between two halves of the seeds of (S, n)."""
    rng = np.random.default_rng(seed)
    half = x.shape[1] // 2
    found = []
    for _ in range(_SPLITS):
        order = rng.permutation(x.shape[1])
        found.append(float(tau(x[:, order[:half]].mean(-1), x[:, order[half : 2 * half]].mean(-1))))
    return float(np.nanmean(found))


def significant(x: Array) -> NDArray[np.int64]:
    """(S, S) of (S, n): 1 where the first of two is larger, -1 where smaller, paired over seeds at 95 %; else
    0."""
    S = len(x)
    found = np.zeros((S, S), dtype=np.int64)
    for i in range(S):
        for j in range(S):
            mean, half = interval(x[i] - x[j])
            if abs(mean) > half and abs(mean) > _EQUAL * abs(float(x[i].mean())):
                found[i, j] = 1 if mean > 0 else -1
    return found


def reversals(x: Array, y: Array) -> list[tuple[int, int]]:
    """Pairs of which the first is significantly smaller by x (S, n), and larger by y."""
    a, b = significant(x), significant(y)
    return [(int(i), int(j)) for i, j in np.argwhere((a < 0) & (b > 0))]


def best(x: Array) -> tuple[int, list[int]]:
    """Of (S, n) that with the least mean, and those that are not significantly worse."""
    least = int(np.argmin(x.mean(-1)))
    return least, [i for i in range(len(x)) if significant(x[[i, least]])[0, 1] <= 0]


def regret(x: Array, chosen: int) -> tuple[float, float]:
    """How much worse the chosen of (S, n) is than the best, as a share of it; and half its 95 % interval."""
    return interval(x[chosen] / x[int(np.argmin(x.mean(-1)))] - 1)


def decision(pair: Array) -> str:
    """Of (2, n) latencies, preempting and reserving: preempt, reserve or even."""
    sign = int(significant(pair)[0, 1])
    return ("preempt", "even", "reserve")[sign + 1]


# ---------------------------------------------------------------------- comparisons


def compare(a: Answers, b: Answers, setup: Setup) -> dict[str, Any]:
    """Which conclusions of the first profile hold on the second."""
    names = setup.schedulers
    found: dict[str, Any] = {}
    for metric in METRICS:
        x, y = a.order[metric], b.order[metric]
        middle, low, high = tau_with_interval(x, y)
        mine, others = best(x)[0], best(y)
        found[metric] = {
            "tau": middle,
            "tau_low": low,
            "tau_high": high,
            "noise": (noise(x) + noise(y)) / 2,
            "reversed": [[names[i], names[j]] for i, j in reversals(x, y)],
            "pairs": len(names) * (len(names) - 1) // 2,
            "best": [names[mine], names[others[0]]],
            "best_changes": mine not in others[1],
            **_costs(y, mine, metric),
        }
        x, y = a.budgets[metric], b.budgets[metric]
        mine, others = best(x)[0], best(y)
        found[f"budget_{metric}"] = {
            "best": [BUDGETS[mine], BUDGETS[others[0]]],
            "as_good": [[BUDGETS[i] for i in best(z)[1]] for z in (x, y)],
            "best_changes": mine not in others[1],
            **_costs(y, mine, metric),
        }
    found["tight"] = [
        {
            "scheduler": scheduler,
            "kv_tokens": kv,
            "load": load,
            "decisions": (said := [decision(z.tight[scheduler, kv, load]) for z in (a, b)]),
            "changes": set(said) == {"preempt", "reserve"},
        }
        for scheduler, kv, load in a.tight
    ]
    return found


def _costs(y: Array, chosen: int, metric: str) -> dict[str, float]:
    """The regret; of goodput in shares of all requests."""
    if metric == "latency":
        mean, half = regret(y, chosen)
    else:
        mean, half = interval(y[chosen] - y[int(np.argmin(y.mean(-1)))])
    return {"costs": mean, "costs_ci": half}


# ---------------------------------------------------------------------- output


def show(answers: dict[str, Answers], found: dict[str, list[dict[str, Any]]], setup: Setup) -> None:
    """All tables."""
    names = setup.schedulers
    print(
        f"{setup.workload}, {setup.num_requests} requests at {setup.load:g} of each profile's capacity, "
        f"{setup.seeds} seeds\n"
    )
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = []
    for profile, said in answers.items():
        for metric in METRICS:
            means = said.order[metric].mean(-1)
            ranked = " < ".join(names[i] for i in np.argsort(means, kind="stable"))
            ttft, tpot = said.targets.values()
            by = metric if metric == "latency" else f"in time: {ttft:.2f} s, {1000 * tpot:.0f} ms"
            rows.append((profile if metric == "latency" else "", by, ranked))
    show_table("order of the schedulers, best first", ("profile", "by", "order"), rows)
    print()

    rows = []
    for profile, said in answers.items():
        cells = []
        for metric in METRICS:
            least, good = best(said.budgets[metric])
            others = [str(BUDGETS[i]) for i in good if i != least]
            cells.append(f"{BUDGETS[least]}" + (f" (or {', '.join(others)})" if others else ""))
        rows.append((profile, *cells))
    columns = ("profile", "by latency", "by goodput")
    show_table("best token budget of Sarathi (or as good)", columns, rows)
    print()

    for scheduler, _ in PREEMPT_OR_RESERVE:
        cases = [case for case in next(iter(answers.values())).tight if case[0] == scheduler]
        rows = []
        for profile, said in answers.items():
            cells = []
            for case in cases:
                change, half = interval(said.tight[case][1] / said.tight[case][0] - 1)
                cells.append(f"{100 * change:+.1f} ± {100 * half:.1f} {decision(said.tight[case])}")
            rows.append((profile, *cells))
        columns = ("profile", *(f"{kv // 1000}k at {load:g}" for _, kv, load in cases))
        show_table(f"{scheduler}, KV tokens at load: % more latency if it reserves", columns, rows)
        print()

    for what, comparisons in found.items():
        for metric in METRICS:
            rows = [_order_row(c, metric) for c in comparisons]
            columns = (
                "from",
                "to",
                "tau",
                "noise",
                "reversed",
                "best on each",
                "choosing by the first costs",
            )
            show_table(f"{what}: order of the schedulers by {metric}", columns, rows)
            print()
        rows = []
        for c in comparisons:
            budgets = [c[f"budget_{metric}"] for metric in METRICS]
            cells = [
                f"{b['best'][0]} -> {b['best'][1]}: {_costs_text(b, m)}"
                for b, m in zip(budgets, METRICS, strict=True)
            ]
            changed = [t for t in c["tight"] if t["changes"]]
            same = sum(t["decisions"][0] == t["decisions"][1] for t in c["tight"])
            text = f"{same} of {len(c['tight'])} the same, {len(changed)} reversed"
            rows.append((c["from"], c["to"], *cells, text))
        columns = ("from", "to", "budget by latency", "budget by goodput", "preempt or reserve")
        show_table(f"{what}: best budget, and preempt or reserve", columns, rows)
        print()
    print(verdict(found))


def _order_row(c: dict[str, Any], metric: str) -> tuple[str, ...]:
    order = c[metric]
    pairs = "; ".join(f"{a}, {b}" for a, b in order["reversed"][:3])
    more = f" and {len(order['reversed']) - 3} more" if len(order["reversed"]) > 3 else ""
    return (
        c["from"],
        c["to"],
        f"{order['tau']:.2f} ({order['tau_low']:.2f} to {order['tau_high']:.2f})",
        f"{order['noise']:.2f}",
        f"{len(order['reversed'])} of {order['pairs']}" + (f": {pairs}{more}" if pairs else ""),
        " -> ".join(dict.fromkeys(order["best"])),
        _costs_text(order, metric),
    )


def _costs_text(found: dict[str, Any], metric: str) -> str:
    if found["best"][0] == found["best"][1]:
        return "same"
    if metric == "latency":
        return f"{100 * found['costs']:.1f} ± {100 * found['costs_ci']:.1f} %"
    return f"{100 * found['costs']:.1f} ± {100 * found['costs_ci']:.1f} points"


def verdict(found: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each kind of change: what survives it, and what does not."""
    lines = []
    for what, comparisons in found.items():
        n = len(comparisons)
        parts = []
        for metric in METRICS:
            taus = [c[metric]["tau"] for c in comparisons]
            flips = sum(len(c[metric]["reversed"]) for c in comparisons)
            pairs = sum(c[metric]["pairs"] for c in comparisons)
            parts.append(
                f"order by {metric}: tau {min(taus):.2f} to {max(taus):.2f}, {flips} of {pairs} pairs "
                f"reversed, the best changes in {sum(c[metric]['best_changes'] for c in comparisons)} of {n}"
            )
        changed = [sum(c[f"budget_{metric}"]["best_changes"] for c in comparisons) for metric in METRICS]
        parts.append(f"best budget changes in {changed[0]} (latency) and {changed[1]} (goodput) of {n}")
        tight = [t for c in comparisons for t in c["tight"]]
        parts.append(f"preempt or reserve is reversed in {sum(t['changes'] for t in tight)} of {len(tight)}")
        lines.append(f"{what}: " + "; ".join(parts))
    return "\n".join(lines)


# ---------------------------------------------------------------------- the program


class _Parser(argparse.ArgumentParser):
    """A parser that complains in one line, as the command line `llmsched` does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _texts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _texts(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, as 16000,48000") from None


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _texts(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, as 0.5,0.9") from None


def main(arguments: Sequence[str] | None = None) -> int:
    base = Setup()
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("--profiles", type=_texts, help="names or files, compared with the first of them")
    parser.add_argument("--workload", default=base.workload)
    parser.add_argument("--load", type=float, default=base.load)
    parser.add_argument("--num-requests", type=int, default=base.num_requests)
    parser.add_argument("--seeds", type=int, default=base.seeds)
    parser.add_argument("--schedulers", type=_texts, default=base.schedulers)
    parser.add_argument("--kv-tokens", type=_numbers, default=base.kv_tokens, help="of tight KV caches")
    parser.add_argument("--tight-loads", type=_shares, default=base.tight_loads, help="shares with these")
    parser.add_argument("--ttft-target", type=float, default=base.ttft_target)
    parser.add_argument("--tpot-target", type=float, default=base.tpot_target)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = vars(parser.parse_args(arguments))
    chosen, threads, as_json = (options.pop(name) for name in ("profiles", "threads", "json"))
    try:
        setup = Setup(**options)
        pairs = PAIRS if chosen is None else {"profiles": _with_first(chosen)}
        wanted = list(dict.fromkeys(name for some in pairs.values() for pair in some for name in pair))
        for name in wanted:
            profiles.get(name)
        answers = dict(_ask_all(wanted, setup, threads))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {
        what: [{"from": a, "to": b, **compare(answers[a], answers[b], setup)} for a, b in some]
        for what, some in pairs.items()
    }
    if as_json:
        print(json.dumps(jsonable(_report(answers, found, setup)), allow_nan=False))
    else:
        show(answers, found, setup)
    return 0


def _with_first(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    if len(names) < 2:
        raise InputError("give at least two --profiles, with commas between")
    return tuple((names[0], name) for name in names[1:])


def _ask_all(names: Sequence[str], setup: Setup, threads: int) -> Iterator[tuple[str, Answers]]:
    done = 0
    with ThreadPoolExecutor(max(1, threads)) as pool, progress_bar(len(names) * setup.runs) as progress:

        def count() -> None:
            nonlocal done
            done += 1  # a bar may miss one
            progress(done)

        for name in names:
            yield name, ask(name, setup, pool, count)


def _report(
    answers: dict[str, Answers], found: dict[str, list[dict[str, Any]]], setup: Setup
) -> dict[str, Any]:
    return {
        "setup": dataclasses.asdict(setup),
        "budgets": BUDGETS,
        "profiles": {
            name: {
                "targets": said.targets,
                "order": {metric: values.tolist() for metric, values in said.order.items()},
                "budgets": {metric: values.tolist() for metric, values in said.budgets.items()},
                "tight": [
                    {"scheduler": name, "kv_tokens": kv, "load": load, "latency": values.tolist()}
                    for (name, kv, load), values in said.tight.items()
                ],
            }
            for name, said in answers.items()
        },
        "comparisons": found,
        "verdict": verdict(found).split("\n"),
    }


if __name__ == "__main__":
    sys.exit(main())
