"""Stability: the figures of Dai, Deng, Li and Peng (arXiv 2504.07347v3) beside ours, and what becomes of
their picture on realistic engines.

    python scripts/check_stability.py [fig8] [point-c] [theorem2] [ft-vllm] [k-max] [realistic]
        [--seeds 8] [--confidence 0.95] [--jobs 1] [--json FILE]
        [--profiles a,b] [--workloads a,b] [--schedulers a,b] [--tolerance 0.02]

Without names all parts but `realistic`, which takes hours for all schedulers, workloads and profiles; with
--json it writes down what it has and goes on from there. Published figures carry a tag: [CJ] adolgert's
Concourse.jl and [SQ] servingQ's serQ, two reproductions of v3 that quote it; [derived] from the rules, by
formula; [SIM] an independent simulation with few seeds, good to 10 or 20 %.

    fig8       the batches of four schedulers in the example of Fig. 8
    point-c    one request (290, 990) every 467.5 ms with at most 100 requests in a batch: who keeps up
    theorem2   slopes of the backlog below and above the limit; who is work-conserving is stable below it
    ft-vllm    up to what rate FasterTransformer and vanilla vLLM are stable
    k-max      what is left of the capacity when all slots of a batch are taken; corners of the region
    realistic  the largest stable rate of named schedulers on embedded workloads and fitted profiles
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import baselines
from agents.cli.common import jsonable, show_table
from baselines import stability
from baselines.conserving import observe
from baselines.intervals import mean_interval
from baselines.stability import Case, Procedure, drift_of
from llmsched_env import EngineConfig, Requests, profiles, simulate, workloads
from llmsched_env.errors import InputError, unknown
from llmsched_env.files import require_writable_file, writing
from llmsched_env.simulation import watch
from llmsched_env.theory.limits import (
    best_batch,
    faster_transformer_rps,
    full_slots_rps,
    token_time,
    vanilla_vllm_rps,
)
from llmsched_env.theory.region import region
from llmsched_env.workloads import RequestClass, Synthetic
from llmsched_env.workloads.lengths import Fixed, Lengths, Uniform

DAI = profiles.get("a100-codellama-34b")
TIME = token_time(DAI)
POINT_C = 1 / 0.4675  # requests/s

# Some of the named schedulers: the systems, and the orders and victims that they differ by.
SOME = (
    "vllm-v1",
    "vllm-v0",
    "sarathi",
    "orca",
    "faster-transformer",
    "sglang",
    "trtllm-no-evict",
    "lightllm",
    "tgi",
    "fastserve",
    "srpt",
    "area-backfill",
)


class Part:
    """One part of the check: what it prints, and what of it is written down."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.procedure = Procedure(seeds=options.seeds, confidence=options.confidence)
        self.found: dict[str, Any] = {}

    def case(self, name: str, workload: str, budget: int, *, blocking: bool = False, **settings: Any) -> Case:
        """A case on the paper's engine."""
        engine = EngineConfig(token_budget=budget)
        scheduler = baselines.get(name, **settings)
        return Case.of(scheduler, workloads.get(workload), DAI, engine, blocking=blocking)

    # -------------------------------------------------------------------- parts

    def fig8(self) -> None:
        published = {
            ("dai-vllm", 4): "Ad Bd Cd, Dp Ep, Ad Bd Cd Dd, Bd Cd Ed, Bd",
            ("dai-orca", 5): "Ad Bd Cd, Ad Bd Cd Dp Ep, Bd Cd Dd Ed, Bd",
            ("dai-faster-transformer", 4): "Ad Bd Cd, Ad Bd Cd, Bd Cd, Bd, Dp Ep, Dd Ed",
            ("dai-sarathi", 4): "Ad Bd Cd, Ad Bd Cd Dp, Bd Cd Dd Ep, Bd Ed",
        }
        rows = []
        for (name, budget), batches in published.items():
            ours = fig8_batches(name, budget)
            self.found[name] = {"published": batches, "ours": ours}
            rows.append((name, str(budget), batches, ours, "same" if ours == batches else "DIFFERENT"))
        headings = ("scheduler", "b_max", "Fig. 8 [CJ]", "ours", "")
        show_table("A, B, C decode 2, 4, 3 tokens; D, E (1 + 1) arrive in batch 1", headings, rows)

    def point_c(self) -> None:
        """Everything is deterministic: one seed, no interval."""
        systems = {  # in the system after 70 and 140 s [SIM]
            ("dai-sarathi", 128): "99, 100",
            ("dai-faster-transformer", 128): "148, 298",
            ("dai-vllm", 128): "148, 298",
            ("dai-orca", 128): "124, 149",
            ("dai-sarathi", 1024): "117, 141",
            ("dai-sarathi", 256): "113, 129",
            ("dai-sarathi", 512): "117, 141",
            ("dai-orca", 1024): "122, 152",
            ("dai-vllm", 1024): "132, 165",
            ("dai-faster-transformer", 1024): "148, 292",
        }
        paper = {key: "bounded" if key == ("dai-sarathi", 128) else "grows" for key in list(systems)[:5]}
        n = 3000
        work = Requests.of(0.4675 * np.arange(n), np.full(n, 290), np.full(n, 991))
        rows = []
        for (name, budget), seen in systems.items():
            scheduler = baselines.get(name, max_batch_requests=100)
            engine = EngineConfig(token_budget=budget)
            at = np.append([70.0, 140.0], np.arange(1, 101) * (0.4675 * n / 100))
            at = np.unique(at)
            run = watch(work, scheduler, DAI, engine, at=at, oversized="keep")
            slope = drift_of(run.time_s, run.tokens, run.arrived_tokens, POINT_C * 1280, "empty")
            ours = ", ".join(str(run.requests[np.searchsorted(at, s)]) for s in (70, 140))
            verdict = "bounded" if slope < 0.002 * POINT_C * 1280 else "grows"
            said = paper.get((name, budget), "")
            self.found[f"{name}-{budget}"] = {"ours": ours, "tokens_per_s": slope, "verdict": verdict}
            share = f"{slope / (POINT_C * 1280):.1%}"
            rows.append((name, str(budget), said, verdict, share, seen, ours))
        headings = (
            "scheduler",
            "b_max",
            "paper [CJ, SQ]",
            "ours",
            "slope of arrivals",
            "in system [SIM]",
            "ours",
        )
        title = "Point C, k_max 100, (290, 990) every 467.5 ms from empty; 1,400 s; in system after 70, 140 s"
        show_table(title, headings, rows)
        engine = EngineConfig(token_budget=128)
        scheduler = baselines.get("dai-sarathi", max_batch_requests=100)
        result = simulate(work.take(slice(600)), scheduler, DAI, engine, record="iterations", horizon_s=280)
        assert result.iterations is not None
        last = result.iterations[-200:]
        locked = {
            (int(p), int(d)) for p, d in zip(last["prefill_tokens"], last["decode_requests"], strict=True)
        }
        self.found["locked"] = sorted(locked)
        print(
            "Sarathi-128 locks into batches of 29 prefill and 99 decode tokens [CJ, SQ]; "
            f"ours: {sorted(locked)}"
        )

    def theorem2(self) -> None:
        case = self.case("dai-sarathi", "fixed-100-101", 512)
        published = {
            0.9: ("0.008 ± 0.014", 0.0),
            1.1: ("0.338 ± 0.046", 0.3343),
            1.2: ("0.668 ± 0.036", 0.6686),
        }
        rows = []
        for load, (said, theory) in published.items():
            cells = [f"{load:g}", said, f"{theory:.3f}"]
            for seconds, seeds in ((120, 6), (1200, self.options.seeds)):
                rate = load * case.limit.rps
                p = Procedure(seeds=seeds, start="empty")
                runs = [case.run(rate, p, max(100, round(seconds * rate)), seed) for seed in range(seeds)]
                slopes = [
                    drift_of(run.time_s, run.left @ case.weights, run.arrived @ case.weights, 0.0, "empty")
                    / 1000
                    for run in runs
                ]
                mean, low, high = mean_interval(slopes, self.options.confidence)
                self.found[f"slope {load} {seconds} s"] = [mean, low, high]
                cells.append(f"{mean:.3f} ± {high - mean:.3f}")
            rows.append(cells)
        headings = (
            "load",
            "[CJ], 120 s, 6 seeds",
            "theory",
            "ours, 120 s, 6 seeds",
            f"ours, 1200 s, {seeds} seeds",
        )
        limit = f"limit {case.limit.rps:.2f} requests/s, paper [CJ] 16.71"
        show_table(
            f"Slope of the backlog from empty, tokens/ms; (100, 100), b_max 512, {limit}", headings, rows
        )
        self._conserving()

    def _conserving(self) -> None:
        """Who is work-conserving on this engine, and whether that is stable at 0.95 of the limit."""
        engine = EngineConfig(token_budget=512, max_num_seqs=10_000)
        recipe = workloads.get("fixed-100-101")
        rows, kept = [], 0
        for name in baselines.names():
            scheduler = baselines.get(name)
            try:
                case = Case.of(scheduler, recipe, DAI, engine)
                if case.limit.kind != "exact":
                    raise InputError("its batches have no token budget")
                work = case.draw(1.2 * case.limit.rps, 1500, 0, 0)
                report = observe(scheduler, work, DAI, engine)
                below = stability.test(case, 0.95 * case.limit.rps, self.procedure, threads=self.options.jobs)
                above = stability.test(case, 1.05 * case.limit.rps, self.procedure, threads=self.options.jobs)
            except InputError as error:
                rows.append((name, "-", "-", "-", str(error)[:60]))
                continue
            kept += report.work_conserving
            broken = report.broken["work-conserving"]
            says = "yes" if report.work_conserving else f"no, {broken:,} of {report.iterations:,} batches"
            self.found[name] = {"work_conserving": report.work_conserving}
            self.found[name] |= {"below": below.to_dict(), "above": above.to_dict()}
            share = f"{below.drift.value / below.offered:+.2%}"
            rows.append((name, says, below.verdict, above.verdict, share))
            print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
        headings = ("scheduler", "work-conserving", "at 0.95", "at 1.05", "drift at 0.95 (theory -5.26 %)")
        show_table(
            f"Theorem 2: {kept} work-conserving schedulers, b_max 512, no cap on requests", headings, rows
        )
        wrong = [r[0] for r in rows if r[1] == "yes" and (r[2], r[3]) != ("stable", "unstable")]
        print(
            f"work-conserving and not stable at 0.95, or not unstable at 1.05: {', '.join(wrong) or 'none'}"
        )

    def ft_vllm(self) -> None:
        rows = []
        for budget, said in ((512, 0.557), (1024, 1.27), (2048, 2.58)):
            found = self._search(self.case("dai-faster-transformer", "fixed-129-113", budget))
            theory = faster_transformer_rps(TIME, 129, 112, budget)
            rows.append(
                (f"FasterTransformer, {budget}", f"{said} [derived]", f"{theory:.4f}", *self._cells(found))
            )
            self.found[f"ft {budget}"] = found.to_dict()
        found = self._search(self.case("dai-vllm", "fixed-129-113", 512))
        chain = vanilla_vllm_rps(TIME, 129, 112, 512)
        rows.append(("vanilla vLLM, 512", "about 10.7 [SIM]", f"{chain:.4f}", *self._cells(found)))
        self.found["vllm 512"] = found.to_dict()
        for name in ("dai-sarathi", "dai-orca"):
            found = self._search(self.case(name, "fixed-129-113", 512))
            theory = best_batch(TIME, 512)[1] / 241
            rows.append((f"{name}, 512", "13.87 [CJ]", f"{theory:.4f}", *self._cells(found)))
            self.found[name] = found.to_dict()
        headings = ("b_max", "published", "formula", "ours", "stable to, unstable from", "of the limit")
        show_table("Largest stable rate, requests/s, of (129, 112)", headings, rows)
        self._levels()

    def _levels(self) -> None:
        """Vanilla vLLM from empty: does it level off?"""
        case = self.case("dai-vllm", "fixed-129-113", 512)
        said = {10.4: "470 to 640, level", 10.6: "490 to 770", 11.0: "720 to 2,010", 11.5: "870 to 3,380"}
        rows = []
        at = np.array([300.0, 600.0, 1200.0, 2400.0, 4800.0])
        for rate, seen in said.items():
            runs = []
            for seed in range(self.options.seeds):
                work = case.draw(rate, round(rate * 4900), 0, seed)
                runs.append(watch(work, case.scheduler, DAI, case.engine, at=at, seed=seed).requests)
            mean = np.mean(runs, axis=0)
            self.found[f"in system at {rate}"] = mean.tolist()
            rows.append((f"{rate:g}", seen, *(f"{x:,.0f}" for x in mean)))
        headings = ("requests/s", "over 1,200 s [SIM]", *(f"{t:,.0f} s" for t in at))
        show_table(
            f"Vanilla vLLM from empty: requests in system, mean of {self.options.seeds} seeds", headings, rows
        )

    def k_max(self) -> None:
        """With answers of one length requests that were prefilled together also end together, and are
        replaced in one batch; the formula has them one by one, as they are where lengths vary."""
        varied = Lengths(Fixed(290), Uniform(496, 1486))
        recipes = {
            "990": workloads.get("fixed-290-991"),
            "495 to 1,485": Synthetic("varied", (RequestClass(varied),)),
        }
        rows = []
        for name, budget, said in (
            ("dai-sarathi", 128, "100 %"),
            ("dai-sarathi", 256, "87.4 %"),
            ("dai-sarathi", 512, "82.1 %"),
            ("dai-sarathi", 1024, "82.1 %"),
            ("dai-orca", 128, "83.6 %"),
        ):
            formula = full_slots_rps(TIME, 290, 990, budget, 100, decodes_first=name == "dai-sarathi")
            for decodes, recipe in recipes.items():
                scheduler = baselines.get(name, max_batch_requests=100)
                found = self._search(Case.of(scheduler, recipe, DAI, EngineConfig(token_budget=budget)))
                self.found[f"{name}-{budget} {decodes}"] = found.to_dict()
                low, high = found.max_stable_rate / POINT_C, found.unstable_rate / POINT_C
                ours = (f"{found.estimate / POINT_C:.1%}", f"{low:.1%} to {high:.1%}")
                rows.append((name, str(budget), decodes, said, f"{formula / POINT_C:.1%}", *ours))
        headings = ("scheduler", "b_max", "decodes", "derived", "formula", "ours", "stable to, unstable from")
        show_table("Largest stable rate of (290, 990) with k_max 100, as a share of point C", headings, rows)
        corners = region(DAI, 1024, 100)
        said_at = {(1024, 0): "A", (925, 99): "B", (29, 99): "C", (0, 100): "D"}
        show_table(
            "Corners of the region of Theorem 10 with b_max 1024, k_max 100",
            ("batch (prefill, decode)", "", "prefill tokens/ms", "decode tokens/ms"),
            [
                (str(tuple(b)), said_at.get(tuple(b), "origin"), f"{v[0] / 1000:.4f}", f"{v[1] / 1000:.4f}")
                for b, v in zip(corners.batches.tolist(), corners.vertices, strict=True)
            ],
        )

    # -------------------------------------------------------------------- realistic engines

    def realistic(self) -> None:
        o = self.options
        names = o.schedulers or [name for name in baselines.names() if not name.startswith("dai-")]
        kinds = o.workloads or workloads.names()
        path: Path | None = o.json
        procedure = Procedure(seeds=o.seeds, confidence=o.confidence, tolerance=o.tolerance, most_tests=12)
        how = {"seeds": o.seeds, "confidence": o.confidence, "tolerance": o.tolerance}
        lock = threading.Lock()
        jobs = [(p, w, s) for p in o.profiles for w in kinds for s in names]
        left = [job for job in jobs if self.found.get("/".join(job), {}).get("how") != how]

        def work(job: tuple[str, str, str]) -> None:
            began = time.perf_counter()
            row = self._realistic(job, procedure) | {"how": how, "seconds": time.perf_counter() - began}
            with lock:
                self.found["/".join(job)] = row
                if path is not None:
                    save(path, {"realistic": self.found})
                done = len(jobs) - len(left) + sum("/".join(one) in self.found for one in left)
                print(
                    f"{done}/{len(jobs)} {'/'.join(job)}: {summary(row)} ({row['seconds']:.0f} s)", flush=True
                )

        with ThreadPoolExecutor(o.jobs) as pool:
            list(pool.map(work, left))
        tables: list[str] = []
        for profile in o.profiles:
            rows = []
            for name in names:
                cells = [summary(self.found[f"{profile}/{kind}/{name}"]) for kind in kinds]
                rows.append((name, *cells))
            title = (
                f"{profile}: largest stable rate as a share of the limit, %, {o.seeds} seeds, "
                f"{o.confidence:.0%} confidence a verdict; * leaves room that demand could fill, "
                "m stable from empty at 1.1 times that rate, (t) share of requests turned away"
            )
            show_table(title, ("scheduler", *kinds), rows)
            if o.markdown is not None:
                tables.append(markdown(title, ("scheduler", *kinds), rows))
            self._absolute(profile, kinds, names)
            self._failures(profile, kinds, names)
        if o.markdown is not None:
            with writing(o.markdown) as temporary:
                temporary.write_text(_HEAD + "\n".join(tables), encoding="utf-8")

    def _realistic(self, job: tuple[str, str, str], procedure: Procedure) -> dict[str, Any]:
        profile, kind, name = job
        scheduler = baselines.get(name)
        try:
            case = Case.of(scheduler, workloads.get(kind, arrivals="poisson"), profile)
            found = stability.search(case, procedure)
            row = found.to_dict()
            del row["tests"]
            work = case.draw(1.1 * case.limit.rps, 1000, 0, 0)
            report = observe(scheduler, work, profile, case.engine)
            row |= {"work_conserving": report.work_conserving, "broken": report.broken, "full": report.full}
            row |= {"iterations": report.iterations, "k_needed": report.k_needed}
            if 0 < found.unstable_rate < math.inf:
                empty = dataclasses.replace(procedure, start="empty", looks=2)
                row["from_empty"] = stability.test(case, 1.1 * found.unstable_rate, empty).verdict
        except InputError as error:
            return {"error": str(error)}
        result: dict[str, Any] = jsonable(row)
        return result

    def _absolute(self, profile: str, kinds: list[str], names: list[str]) -> None:
        """The same in requests/s: limits differ between schedulers, with their budgets."""
        rows = []
        for name in names:
            cells = []
            for kind in kinds:
                row = self.found[f"{profile}/{kind}/{name}"]
                cells.append("-" if "error" in row else f"{row['max_stable_rate']:.3g} of {row['limit']:.3g}")
            rows.append((name, *cells))
        show_table(f"{profile}: the same, requests/s", ("scheduler", *kinds), rows)

    def _failures(self, profile: str, kinds: list[str], names: list[str]) -> None:
        """Where work conservation does not decide."""
        rows = [
            (kind, name, self.found[f"{profile}/{kind}/{name}"])
            for kind in kinds
            for name in names
            if "error" not in self.found[f"{profile}/{kind}/{name}"]
        ]

        def tell(what: str, chosen: Callable[[dict[str, Any]], bool]) -> None:
            some = [f"{name} on {kind} ({row['share']:.0%})" for kind, name, row in rows if chosen(row)]
            text = ", ".join(some[:12]) + (f" and {len(some) - 12} more" if len(some) > 12 else "")
            print(f"{profile}: {what}: {len(some)} of {len(rows)}{': ' if some else ''}{text}")

        def top(row: dict[str, Any]) -> float:
            high = row["share_interval"][1]
            return math.inf if high is None else float(high)

        tell(
            "work-conserving, and unstable below 0.97 of the limit",
            lambda row: bool(row["work_conserving"]) and top(row) < 0.97,
        )
        tell(
            "not work-conserving, and stable up to 0.97 of the limit",
            lambda row: not row["work_conserving"] and row["share"] >= 0.97,
        )
        tell("unstable below 0.9 of the limit", lambda row: top(row) < 0.9)
        tell(
            "unstable when filled, yet stable from empty at 1.1 times that rate",
            lambda row: row.get("from_empty") == "stable",
        )

    # -------------------------------------------------------------------- helpers

    def _search(self, case: Case) -> stability.Found:
        return stability.search(case, self.procedure, threads=self.options.jobs)

    @staticmethod
    def _cells(found: stability.Found) -> Iterator[str]:
        rps = found.limit.rps
        yield f"{found.estimate:.4g}"
        yield f"{found.max_stable_rate:.4g}, {found.unstable_rate:.4g}"
        yield f"{found.max_stable_rate / rps:.1%} to {found.unstable_rate / rps:.1%}"


def summary(row: dict[str, Any]) -> str:
    """One cell of the table of realistic engines."""
    if "error" in row:
        return "-"
    low, high = row["share_interval"]
    marks = ("" if row["work_conserving"] else "*") + ("m" if row.get("from_empty") == "stable" else "")
    away = f" ({100 * (1 - row['served_share']):.2g}% t)" if row["served_share"] < 0.9995 else ""
    end = "" if high is None else f"{100 * high:.0f}"
    return f"{100 * low:.0f}-{end}{marks}{away}"


_HEAD = """# Largest stable rates

Made by `python scripts/check_stability.py realistic --json FILE --markdown docs/stability.md`: every named
scheduler with its own engine settings, on every workload that ships, arrivals being Poisson. A cell says
between which shares of the limit (`llmsched_env/theory/limits.py`) the scheduler turns unstable. What is
offered comes from the workload's moments; where requests are turned away, it is the mean of a million drawn
ones, with a standard error of 0.1 % where lengths vary by as much as their mean.

"""


def markdown(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table with its title."""
    lines = [columns, ("---",) + ("--:",) * (len(columns) - 1), *rows]
    cells = ("| " + " | ".join(line).replace("*", "\\*") + " |" for line in lines)
    return title.replace("*", "\\*") + ".\n\n" + "\n".join(cells) + "\n"


def fig8_batches(name: str, budget: int) -> str:
    """The batches after the first, in which A, B and C are prefilled."""
    work = Requests.of([0, 0, 0, 1.5, 1.5], np.ones(5), [3, 5, 4, 2, 2], names=list("ABCDE"))
    unit = profiles.Profile("unit", "staircase", {"c": 1.0, "a": 0.0, "b0": 1.0})
    engine = EngineConfig(kv_blocks=1000, block_size=1, token_budget=budget)
    schedule = simulate(work, baselines.get(name), unit, engine, record="schedule").schedule
    assert schedule is not None
    batches: list[str] = []
    prefilled: set[int] = set()
    for decisions in schedule:
        batch = [r for r, _ in decisions.granted]
        batches.append(" ".join(sorted(work.name(r) + ("d" if r in prefilled else "p") for r in batch)))
        prefilled |= set(batch)
    return ", ".join(batches[1:])


PARTS = {
    "fig8": Part.fig8,
    "point-c": Part.point_c,
    "theorem2": Part.theorem2,
    "ft-vllm": Part.ft_vllm,
    "k-max": Part.k_max,
    "realistic": Part.realistic,
}


def save(path: Path, found: dict[str, Any]) -> None:
    """Add parts to the file."""
    there = json.loads(path.read_text()) if path.exists() else {}
    with writing(path) as temporary:
        temporary.write_text(json.dumps(jsonable({**there, **found}), indent=1, default=float) + "\n")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--json", type=Path, help="write the results here; realistic goes on from it")
    parser.add_argument("--markdown", type=Path, help="write the tables of realistic here")
    parser.add_argument("--profiles", type=_names, default=["a100-llama3-8b", "a100-llama2-7b"])
    parser.add_argument("--workloads", type=_names, help="default: all")
    parser.add_argument("--schedulers", type=_names, help="default: all but the paper's; some: a dozen")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the search in realistic")
    options = parser.parse_args()
    if options.schedulers == ["some"]:
        options.schedulers = list(SOME)
    for part in options.parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    for name in options.schedulers or ():
        baselines.get(name)
    for name in options.workloads or ():
        workloads.get(name)
    for path in (options.json, options.markdown):
        if path is not None:
            require_writable_file(path)
    return options


def main() -> None:
    options = arguments()
    for name in options.parts or [name for name in PARTS if name != "realistic"]:
        part = Part(options)
        if options.json is not None and options.json.exists() and name == "realistic":
            part.found = json.loads(options.json.read_text()).get(name, {})
        PARTS[name](part)
        if options.json is not None:
            save(options.json, {name: part.found})
        print()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
