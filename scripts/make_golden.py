"""Solve the golden suite anew: 200 small instances of every kind, each proved optimal by the exact search.

    python scripts/make_golden.py [--output baselines/optimal/data/golden.json]

Half of the instances that CP-SAT takes are solved by it too, and have to agree.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from baselines.optimal import Instance, golden
from baselines.optimal.instance import ALLOWANCES
from baselines.optimal.search import search
from llmsched_env.files import writing

COSTS = {
    "linear": {"form": "linear", "c0": 100, "c1": 2, "c2": 2, "c3": 1, "c4": 0},
    "attention": {"form": "linear", "c0": 8, "c1": 1, "c2": 1, "c3": 0.5, "c4": 0.125},
    "unit": {"form": "linear", "c0": 1},
    "hinge": {"form": "hinge", "h0": 4, "h1": 16, "h2": 0.5, "h3": 0.25, "h4": 0.0625, "h5": 0.5},
    "staircase": {"form": "staircase", "c": 10, "a": 5, "b0": 16},
    "infermax": {
        "form": "infermax",
        "layers": 32,
        "a_o": 0.00191,
        "b_o": 0.06486,
        "a_d": 8.513e-06,
        "b_d": 0.01921,
        "s_d": 7.4e-04,
        "a_p": 1.6773e-07,
        "b_p": 0.0926,
        "s_p": 0.001534,
        "m_p": 9.224e-06,
    },
}
OBJECTIVES = ("total_latency", "gpu_time", "makespan", "mean_ttft")


def draw(number: int) -> Instance:
    """Instance `number` of the suite."""
    rng = np.random.default_rng([2026, number])
    allow = sorted(name for name in ALLOWANCES if rng.random() < (0.15 if name == "chunk" else 0.35))
    free = len(allow)
    n = int(rng.integers(3, 5)) if "chunk" in allow else int(rng.integers(4, 9 - free))
    longest = 6 if "chunk" in allow else 24
    prompt, output = rng.integers(2, longest + 1, n), rng.integers(1, 6 if free else 9, n)
    kind = str(rng.choice(list(COSTS)))
    step = {"linear": 150, "attention": 20, "unit": 2, "hinge": 25, "staircase": 18, "infermax": 0.01}[kind]
    gaps = rng.integers(0, 3, n) if rng.random() < 0.5 else np.zeros(n, np.int64)
    arrival = step * np.cumsum(gaps).astype(np.float64)
    peak = int((prompt + output - 1).max())
    return Instance.of(
        np.stack([arrival, prompt, output], axis=1).tolist(),
        kv_tokens=peak + int(rng.integers(0, 3 * peak)),
        token_budget=int(prompt.max()) + int(rng.integers(0, 33)),
        cost=COSTS[kind],
        allow=allow,
        objective=str(rng.choice(OBJECTIVES)),
        name=f"golden-{number:03d}",
        max_num_seqs=None if rng.random() < 0.8 else 3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=golden.PATH)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    from baselines.optimal.cpsat import solve

    solved: list[str] = []
    number = checked = 0
    while len(solved) < options.count:
        made = draw(number)
        number += 1
        found = search(made, time_limit_s=60)
        if found.status != "optimal":
            print(f"{made.name}: {found.status}, left out", flush=True)
            continue
        text = made.to_json() | {"optimum": found.objective}
        solved.append(json.dumps(text))
        if number % 2 == 0 and made.profile.form in ("linear", "infermax"):
            other = solve(made, time_limit_s=10)
            if other.status == "optimal":
                checked += 1
                difference = abs(other.objective - found.objective)
                assert difference <= 1e-9 * found.objective, (text, other.objective)
        print(f"{made.name}: {found.objective:.6g} in {found.seconds:.2f} s", flush=True)
    with writing(options.output) as temporary:
        temporary.write_text("[\n" + ",\n".join(solved) + "\n]\n", encoding="utf-8")
    print(f"{len(solved)} instances, {checked} of them proved by CP-SAT too: {options.output}")


if __name__ == "__main__":
    main()
