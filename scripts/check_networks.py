"""Networks of engines, recomputed: python scripts/check_networks.py [SECTION ...] [--seeds 8] [--quick]

Sections: rybko-stolyar, threshold, programs, jsq, acyclic, agents, speed; all of them by default. Intervals
are 95 % by Student's t over seeds. `published` are figures of Dai, Deng, Li and Peng (arXiv 2504.07347v3) as
reproduced in adolgert/Concourse.jl; `SIM` is an earlier, independent simulation of the same models (unit
rounds, few seeds, within 10 to 20 %).

- rybko-stolyar: its network at nominal load 0.9 from empty, horizon 4,500 units: the highest backlog, the
  growth of peaks from one cycle to the next, and jobs in system.
- threshold: exit-first at other loads, from empty, and from many jobs of one kind that wait at the first
  engine. In the fluid limit M jobs of one kind leave lambda M / (mu - lambda) of the other when they are
  gone, mu = 768 / 544 the rate of long tasks: a factor of 1 where lambda = mu / 2, at load 0.559. What is
  measured is that factor; the threshold is where it passes 1.
- programs: every discipline at load 0.9, begun with M jobs of one kind: the share of M that is left in the
  system after a time in which a stable network is empty in the fluid limit.
- jsq: two engines behind a router, (100, 100), backlog and its slope against theory; other routings with
  unequal requests.
- acyclic: fork-join and tandem under FCFS, at loads of 0.95 and 1.05, on engines of the theory, where loads
  are exact, begun with M jobs: the share of M that is in the system at the end, and by how many tokens the
  work grows, calls still to come included.
- agents: what program-level disciplines do for short and long programs, below and above capacity.
- speed: a million calls on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baselines.intervals import mean_interval
from llmsched_env import EngineConfig, networks
from llmsched_env.networks import (
    Edge,
    Jobs,
    Network,
    NetworkResult,
    Node,
    Pool,
    Station,
    Workflow,
    disciplines,
    loads,
    simulate_network,
)
from llmsched_env.networks.ready import CODELLAMA, unlimited
from llmsched_env.networks.workflow import mean_of
from llmsched_env.workloads.lengths import Fixed, Lengths, Lognormal, Uniform

MU = 768 / 544  # long tasks that an engine serves in a unit of time
RATE = 768 / 608  # jobs of each kind at load 1


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Mean and half of its interval."""
    mean, low, high = mean_interval(values)
    return (
        f"{mean:,.{digits}g} +- {(high - low) / 2:,.{digits}g}" if len(values) > 1 else f"{mean:,.{digits}g}"
    )


def thousands(values: Sequence[float]) -> str:
    """Mean and interval in thousands."""
    mean, low, high = mean_interval(values)
    return f"{mean / 1000:,.1f} +- {(high - low) / 2000:,.1f} k"


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


# ---------------------------------------------------------------------- Rybko and Stolyar


def cycle_peaks(result: NetworkResult) -> list[float]:
    """The highest backlog of each cycle: a cycle ends when the engine with the larger backlog changes, for
    backlogs that are large (above 5,000 tokens)."""
    peaks: list[float] = []
    which = -1
    for tokens in result.backlog_tokens:
        k = int(np.argmax(tokens))
        if tokens[k] < 5000:
            continue
        if k != which:
            which = k
            peaks.append(0.0)
        peaks[-1] = max(peaks[-1], float(tokens.sum()))
    return peaks


def check_rybko_stolyar(seeds: int, quick: bool) -> None:
    title("Rybko-Stolyar at load 0.9, from empty, 4,500 units")
    published = {
        "exit-first": "1,400,284 (peaks 85 k, 340 k, 1.40 M: x4)",
        "entry-first": "22,168",
    }
    simulated = {
        "exit-first": "772 k, 1.08 M",
        "entry-first": "20.9 k",
        "fcfs": "23 k",
        "oldest": "87-128 k (20,000)",
    }
    print(
        f"{'discipline':14s} {'highest backlog':>20s} {'last peak / one before':>24s} {'mean jobs':>16s}  "
        f"{'published':42s} SIM"
    )
    horizon = 1500.0 if quick else 4500.0
    for name in disciplines.names():
        if name == "priority":  # the same as exit-first
            continue
        highest, growth, inside = [], [], []
        for seed in range(seeds):
            result = simulate_network(
                networks.get("rybko-stolyar"), name, horizon_s=horizon, seed=seed, samples=int(horizon) + 1
            )
            highest.append(float(result.backlog.max()))
            peaks = cycle_peaks(result)[:-1]  # the last cycle is not over
            growth += [b / a for a, b in zip(peaks[-3:], peaks[-2:], strict=False) if a > 50_000]
            inside.append(result.mean_jobs)
        ratio = interval(growth) if len(growth) > 2 else "no such peaks"
        print(
            f"{name:14s} {thousands(highest):>20s} {ratio:>24s} {interval(inside):>16s}  "
            f"{published.get(name, ''):42s} {simulated.get(name, '')}",
            flush=True,
        )


def filled(network: Network, jobs: int, horizon: float, seed: int, workflow: int | None = None) -> Jobs:
    """The jobs of a network up to a horizon, and so many at time 0, of one workflow or of all."""
    first = network.draw(4 * jobs + 100, seed=seed + 1_000_000)
    kept = np.arange(len(first)) if workflow is None else np.flatnonzero(first.workflow == workflow)
    coming = network.draw(horizon_s=horizon, seed=seed)
    return Jobs.merged(first.take(kept[:jobs]).arriving(0.0), coming)


def inside_at(result: NetworkResult, kind: int, t: NDArray[Any]) -> NDArray[np.int64]:
    """Jobs of a workflow in the system at these times."""
    mine = result.jobs.workflow == kind
    finish = np.sort(np.nan_to_num(result.job_finish_s[mine], nan=np.inf))
    came = np.searchsorted(result.jobs.arrival_s[mine], t, side="right")
    return np.asarray(came - np.searchsorted(finish, t, side="right"))


def switch_factor(load: float, sizes: tuple[int, int], seed: int) -> float:
    """Jobs of kind B that are there when those of kind A are gone, for each of kind A more at the beginning.

    The difference of two sizes leaves out those that are there anyway: a job takes at least 64 units.
    """
    rate = load * RATE
    network = networks.get("rybko-stolyar", load=load)
    most = []
    for size in sizes:
        horizon = 1.15 * size / (MU - rate)
        drawn = filled(network, size, horizon, seed, workflow=0)
        result = simulate_network(network, "exit-first", jobs=drawn, horizon_s=horizon, seed=seed)
        most.append(float(inside_at(result, 1, np.linspace(0.0, horizon, 20_000)).max()))
    return (most[1] - most[0]) / (sizes[1] - sizes[0])


def check_threshold(seeds: int, quick: bool) -> None:
    title("Rybko-Stolyar, exit-first: from empty, 4,500 units; highest backlog in the first and second half")
    simulated = {
        0.50: "5.8 k / 11.7 k",
        0.55: "43 k / 54 k",
        0.60: "178 k / 313 k",
        0.70: "338 k / 592 k",
        0.80: "572 k / 690 k",
        0.90: "216 k / 1.08 M",
    }
    print(f"{'load':>5s} {'first half':>20s} {'second half':>22s}  SIM")
    horizon = 1500.0 if quick else 4500.0
    for load in (0.45, 0.50, 0.55, 0.60, 0.70, 0.80, 0.90):
        halves = []
        for seed in range(seeds):
            network = networks.get("rybko-stolyar", load=load)
            backlog = simulate_network(network, "exit-first", horizon_s=horizon, seed=seed).backlog
            halves.append((backlog[: len(backlog) // 2].max(), backlog[len(backlog) // 2 :].max()))
        one, two = (thousands([float(h[i]) for h in halves]) for i in (0, 1))
        print(f"{load:5.2f} {one:>20s} {two:>22s}  {simulated.get(load, '')}", flush=True)

    sizes = (500, 1500) if quick else (2000, 8000)
    title(
        "the same begun with jobs of one kind: jobs of the other kind when these are gone, for each of them"
    )
    print(f"{'load':>6s} {'factor':>20s} {'fluid limit':>12s}")
    grid = (0.45, 0.50, 0.53, 0.55, 0.56, 0.57, 0.60, 0.70, 0.80, 0.90)
    factors = {load: [switch_factor(load, sizes, seed) for seed in range(seeds)] for load in grid}
    for load, found in factors.items():
        rate = load * RATE
        print(f"{load:6.2f} {interval(found, 4):>20s} {rate / (MU - rate):12.4f}")
    crossings = []
    for seed in range(seeds):
        values = np.array([factors[load][seed] for load in grid])
        above = int(np.argmax(values > 1))
        if values[above] <= 1 or above == 0:  # by noise, in runs that are too short
            continue
        a, b = grid[above - 1], grid[above]
        share = (1 - values[above - 1]) / (values[above] - values[above - 1])
        crossings.append(a + share * (b - a))
    station = 768 / (544 + 544) / RATE
    where = interval(crossings, 4) if crossings else "none of these"
    print(f"factor 1 at load {where}; virtual station: {station:.4f}; SIM 0.559")


def check_programs(seeds: int, quick: bool) -> None:
    sizes = (250, 500) if quick else (500, 2000)
    title("Rybko-Stolyar at load 0.9, begun with M jobs of one kind: share of M left after 12 M units")
    print(f"{'discipline':14s}" + "".join(f"{f'M = {m:,}':>22s}" for m in sizes) + "  verdict")
    for name in [*disciplines.names(), "plas:256", "atlas:1024"]:
        if name == "priority":
            continue
        left: dict[int, list[float]] = {}
        for m in sizes:
            left[m] = []
            for seed in range(seeds):
                network = networks.get("rybko-stolyar")
                drawn = filled(network, m, 12.0 * m, seed, workflow=0)
                result = simulate_network(network, name, jobs=drawn, horizon_s=12.0 * m, seed=seed)
                left[m].append(float(result.jobs_in_system[-1]) / m)
        columns = "".join(f"{interval(left[m]):>22s}" for m in sizes)
        low, high = mean_interval(left[sizes[-1]])[1:]
        verdict = "stable" if high < 0.5 else "unstable" if low > 0.5 else "undecided"
        print(f"{name:14s}{columns}  {verdict}", flush=True)


# ---------------------------------------------------------------------- routers


def slope(result: NetworkResult) -> float:
    """Tokens for each millisecond by which the backlog grows, over the second half."""
    half = len(result.time_s) // 2
    return float(np.polyfit(result.time_s[half:], result.backlog[half:].astype(np.float64), 1)[0] / 1000)


def work_growth(result: NetworkResult, rate: float) -> float:
    """Tokens for each millisecond by which the work of the jobs that are there grows, over the second half;
    calls still to come are work as well. How far what arrived is off its mean is known, and taken out."""
    jobs = result.jobs
    tokens = jobs.prompt_tokens.astype(np.int64) + jobs.output_tokens - 1
    came = np.repeat(jobs.arrival_s, np.diff(jobs.first_hop))
    gone = np.nan_to_num(result.finish_s, nan=np.inf)
    middle, end = 0.5 * result.end_s, result.end_s
    work = [int(tokens[(came <= t) & (gone > t)].sum()) for t in (middle, end)]
    arrived = int(tokens[came > middle].sum()) / (end - middle)
    expected = rate * float(tokens.sum()) / len(jobs)
    return ((work[1] - work[0]) / (end - middle) - (arrived - expected)) / 1000


def check_jsq(seeds: int, quick: bool) -> None:
    title("two engines, (100, 100), join the shortest queue: backlog at 60 s, its slope over 60-120 s")
    published = {0.9: "bounded, below 30 k tokens", 1.1: "0.67 tokens/ms"}
    print(
        f"{'load':>5s} {'backlog at 60 s':>18s} {'slope tokens/ms':>20s} {'noise of arrivals out':>22s} "
        f"{'theory':>7s}  published"
    )
    for load in (0.9, 1.1, 1.2):
        network = networks.get("jsq", load=load)
        rate = network.workflows[0].rate
        capacity = loads(network)[0].capacity_tokens_per_s / 1000
        runs = [simulate_network(network, horizon_s=120.0, seed=seed) for seed in range(seeds)]
        at = thousands([float(r.backlog[len(r.backlog) // 2]) for r in runs])
        plain, clean = (interval(x) for x in ([slope(r) for r in runs], [work_growth(r, rate) for r in runs]))
        if load < 1:
            clean = ""
        print(
            f"{load:5.2f} {at:>18s} {plain:>20s} {clean:>22s} {max(0.0, load - 1) * capacity:7.3f}  "
            f"{published.get(load, '')}",
            flush=True,
        )
    title("the same engines, one with half the speed, requests of unequal size, load 0.9: mean latency s")
    slow = dataclasses.replace(CODELLAMA, params={"c": 0.02256, "a": 0.07094, "b0": 128.0})
    stations = [Station("fast", CODELLAMA, unlimited(512)), Station("slow", slow, unlimited(512))]
    call = Node("call", "engines", Lengths(Lognormal(80, 1.0, 4096), Lognormal(80, 1.0, 2048)))
    flow = [Workflow("requests", [call], rate=1.0)]
    for routing in ("least-time", "jsq", "power-of-two", "round-robin", "random"):
        pool = Pool("engines", ["fast", "slow"], routing)
        network = Network("unequal", stations, flow, [pool]).at_load(0.9)
        runs = [simulate_network(network, jobs=2000 if quick else 10_000, seed=seed) for seed in range(seeds)]
        print(f"{routing:14s} {interval([float(np.mean(r.job_latency_s)) for r in runs]):>22s}", flush=True)


# ---------------------------------------------------------------------- no cycles


def acyclic() -> dict[str, tuple[Network, Sequence[str]]]:
    """Networks without cycles on engines of the theory; and the calls that a job has before it when it waits
    where most do."""
    call = {
        "plan": Lengths(Lognormal(200, 0.5, 4096), Uniform(80, 320)),
        "work": Lengths(Lognormal(300, 0.7, 8192), Uniform(60, 400)),
        "write": Lengths(Fixed(200), Uniform(200, 600)),
    }
    stations = [Station(name, CODELLAMA, unlimited(512)) for name in ("a", "b", "c")]
    edges = [Edge("plan", "work"), Edge("work", "write")]
    on_pool = [
        Node(name, "gpus", lengths, copies=Uniform(2, 6) if name == "work" else Fixed(1))
        for name, lengths in call.items()
    ]
    apart = [
        dataclasses.replace(node, pool=pool) for node, pool in zip(on_pool, ("a", "b", "c"), strict=True)
    ]
    return {
        "tandem (disaggregation)": (networks.get("disaggregation"), ["prefill", "decode"]),
        "fork-join, three engines in a pool": (
            Network("pool", stations, [Workflow("w", on_pool, edges)], [Pool("gpus", ["a", "b", "c"])]),
            ["plan", "work", "write"],
        ),
        "fork-join, an engine for each step": (
            Network("apart", stations, [Workflow("w", apart, edges)]),
            ["work", "write"],
        ),
    }


def expected_growth(network: Network, ahead: Sequence[str]) -> float:
    """Tokens for each millisecond by which work grows when jobs wait with these calls before them: those that
    the busiest pool cannot take, with all that each of them brings."""
    busiest = max(loads(network), key=lambda one: one.load)
    (workflow,) = network.workflows
    tokens = {
        node.name: workflow.visits()[node.name]
        * (mean_of(node.lengths.prompt) + mean_of(node.lengths.output) - 1)
        for node in workflow.nodes
    }
    more = (1 - 1 / busiest.load) * workflow.rate
    return more * sum(tokens[name] for name in ahead) / 1000


def check_acyclic(seeds: int, quick: bool) -> None:
    sizes = (50, 200) if quick else (500, 2000)
    title("no cycles, FCFS, begun with M jobs: jobs in system at the end of 30 M / rate, for each of the M")
    heads = "".join(f"{f'M = {m}':>20s}" for m in sizes)
    print(f"{'network':36s} {'load':>5s}{heads} {'growth of work/ms':>22s} {'theory':>8s}  verdict")
    for name, (network, ahead) in acyclic().items():
        for load in (0.95, 1.05):
            at = network.at_load(load)
            rate = sum(workflow.rate for workflow in at.workflows)
            left: list[list[float]] = []
            for m in sizes:
                horizon = 30.0 * m / rate
                runs = [
                    simulate_network(at, jobs=filled(at, m, horizon, seed), horizon_s=horizon, seed=seed)
                    for seed in range(seeds)
                ]
                left.append([float(r.jobs_in_system[-1]) / m for r in runs])
            found, theory = "", ""
            if load > 1:
                found = interval([work_growth(r, rate) for r in runs])
                theory = f"{expected_growth(at, ahead):8.3f}"
            low, high = mean_interval(left[1])[1:]
            verdict = "stable" if high < 1 else "unstable" if low > 1 else "undecided"
            columns = "".join(f"{interval(x):>20s}" for x in left)
            print(f"{name:36s} {load:5.2f}{columns} {found:>22s} {theory:8s}  {verdict}", flush=True)


# ---------------------------------------------------------------------- agents


def check_agents(seeds: int, quick: bool) -> None:
    title("chats and agents that call tools on two A100s, 32 calls at once each: latency of programs, s")
    heads = "".join(f"{head:>17s}" for head in ("mean, chats", "mean, agents", "mean, all", "p99, all"))
    print(f"{'load':>5s} {'discipline':14s}{heads}")
    call = Lengths(Lognormal(300, 0.9, 4096), Lognormal(120, 0.8, 1024))
    (agent,) = networks.get("tool-calling").workflows
    flows = [
        Workflow("chat", [Node("call", "gpus", call)], rate=3.0),
        dataclasses.replace(agent, name="agent", rate=1.0),
    ]
    engine = EngineConfig(token_budget=2048, max_num_seqs=32)
    stations = [Station(f"gpu-{i}", "a100-llama3-8b", engine) for i in (1, 2)]
    network = Network("mixed", stations, flows, [Pool("gpus", ["gpu-1", "gpu-2"])])
    for load in (0.8, 1.2):
        for name in ("fcfs", "plas", "atlas", "oldest", "exit-first", "back-pressure"):
            rows = []
            for seed in range(seeds):
                jobs = 500 if quick else 4000
                result = simulate_network(network.at_load(load), name, jobs=jobs, seed=seed)
                latency, kind = result.job_latency_s, result.jobs.workflow
                rows.append(
                    (
                        latency[kind == 0].mean(),
                        latency[kind == 1].mean(),
                        latency.mean(),
                        np.percentile(latency, 99),
                    )
                )
            columns = "".join(f"{interval(column):>17s}" for column in zip(*rows, strict=True))
            print(f"{load:5.2f} {name:14s}{columns}", flush=True)


# ---------------------------------------------------------------------- speed


def check_speed(seeds: int, quick: bool) -> None:
    title("a million calls, CPU seconds of one core (second run; target 5 s)")
    print(f"{'network':16s} {'discipline':14s} {'calls':>10s} {'draw':>7s} {'simulate':>9s} {'calls/s':>11s}")
    for name, load, discipline in (
        ("rybko-stolyar", 0.9, "fcfs"),
        ("rybko-stolyar", 0.9, "plas"),
        ("rybko-stolyar", 0.9, "back-pressure"),
        ("jsq", 0.9, "fcfs"),
        ("fork-join", 0.9, "fcfs"),
    ):
        network = networks.get(name, load=load)
        calls = 100_000 if quick else 1_000_000
        count = round(calls / sum(network.workflows[0].visits().values()))
        simulate_network(network, discipline, jobs=10)
        began = time.process_time()
        drawn = network.draw(count, seed=0)
        between = time.process_time()
        simulate_network(network, discipline, jobs=drawn)
        ended = time.process_time()
        print(
            f"{name:16s} {discipline:14s} {drawn.num_hops:10,d} {between - began:7.2f} "
            f"{ended - between:9.2f} {drawn.num_hops / (ended - between):11,.0f}",
            flush=True,
        )


SECTIONS: dict[str, Callable[[int, bool], None]] = {
    "rybko-stolyar": check_rybko_stolyar,
    "threshold": check_threshold,
    "programs": check_programs,
    "jsq": check_jsq,
    "acyclic": check_acyclic,
    "agents": check_agents,
    "speed": check_speed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Networks of engines, recomputed.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; default: all")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="shorter runs, to see that it works")
    arguments = parser.parse_args()
    if arguments.seeds < 2:  # one has no spread
        parser.error(f"--seeds must be at least 2, not {arguments.seeds}")
    for name in arguments.sections:
        if name not in SECTIONS:
            parser.error(f"unknown section {name!r}; known: {', '.join(SECTIONS)}")
    for name in arguments.sections or SECTIONS:
        SECTIONS[name](arguments.seeds, arguments.quick)


if __name__ == "__main__":
    main()
