"""Stability: what is measured, how often a verdict is false, and the largest rates that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pandas as pd
import pytest

import baselines
from agents.cli import main
from baselines import stability
from baselines.intervals import mean_interval, student_quantile
from baselines.stability import Case, Procedure, critical_drift, drift_of, judge, search
from llmsched_env import EngineConfig, InputError, Requests, Scheduler, profiles, simulate, workloads
from llmsched_env.core.run import EVICTED, SWAPPED_IN, SWAPPED_OUT
from llmsched_env.scheduling.own import can_grant, first, grant, known_tokens
from llmsched_env.simulation import Backlog, watch
from llmsched_env.theory.limits import full_slots_rps, prices, token_time, vanilla_vllm_rps
from llmsched_env.workloads import Replay
from llmsched_env.workloads.lengths import Lengths, Uniform
from llmsched_env.workloads.workload import RequestClass, Synthetic

DAI = "a100-codellama-34b"
BUDGET = EngineConfig(token_budget=512)


def case(name: str, workload: str, engine: EngineConfig | None = BUDGET, **settings: Any) -> Case:
    return Case.of(baselines.get(name, **settings), workloads.get(workload), DAI, engine)


# ------------------------------------------------------------------------------ Student's t


def test_student_quantiles() -> None:
    stats = pytest.importorskip("scipy.stats")
    for p in (0.2, 0.6, 0.975, 0.995, 0.99999):
        for freedom in (1, 2, 3, 4, 7, 10, 31, 200):
            assert student_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-8)


def test_mean_interval_covers() -> None:
    x = np.random.default_rng(0).normal(3, 2, (4000, 6))
    found = np.array([mean_interval(row, 0.9) for row in x])
    assert ((found[:, 1] < 3) & (found[:, 2] > 3)).mean() == pytest.approx(0.9, abs=0.015)
    assert np.isnan(mean_interval([1.0])[1])
    with pytest.raises(InputError, match="confidence must be between"):
        mean_interval([1, 2], 1.0)


# ------------------------------------------------------------------------------ the backlog


def backlog_by_hand(work: Requests, result: Any, time_s: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """Requests that are left and the five sums of their work, at the ends of iterations, from a schedule."""
    prompt, output = work.prompt_tokens.tolist(), work.output_tokens.tolist()
    computed, generated, prefilled = ([0] * len(work) for _ in range(3))
    rows, schedule = result.iterations, result.schedule
    counts, sums = [], []
    j = 0
    for now in time_s:
        while j < len(rows) and rows["end_s"][j] <= now:
            begin = schedule.ends[j - 1] if j else 0
            for r, t in zip(
                schedule.requests[begin : schedule.ends[j]],
                schedule.tokens[begin : schedule.ends[j]],
                strict=True,
            ):
                if t == EVICTED:
                    computed[r] = prefilled[r] = 0
                elif t not in (SWAPPED_OUT, SWAPPED_IN):
                    computed[r] += t
                    if computed[r] == prompt[r] + generated[r]:
                        generated[r] += 1
                        prefilled[r] = 1
            j += 1
        total, count = np.zeros(5), 0
        for r in range(len(work)):
            if work.arrival_s[r] <= now and generated[r] < output[r]:
                count += 1
                known = prompt[r] + generated[r]
                if not prefilled[r]:
                    total[0] += 1
                    total[1] += known - computed[r]
                    total[2] += known**2 - computed[r] ** 2
                total[3] += output[r] - generated[r]
                total[4] += sum(prompt[r] + j for j in range(generated[r], output[r]))
        counts.append(count)
        sums.append(total)
    return counts, sums


@pytest.mark.parametrize("name", ["vllm-v1", "sarathi", "vllm-v0-swap", "srpt", "dai-orca"])
def test_backlog_is_what_the_schedule_says(name: str) -> None:
    for seed in range(3):
        g = np.random.default_rng(seed)
        n = 60
        work = Requests.of(g.exponential(0.1, n).cumsum(), g.integers(1, 300, n), g.integers(1, 80, n))
        engine = EngineConfig(kv_blocks=60, block_size=8, max_model_len=470)
        kind = baselines.get(name)
        result = simulate(work, kind, "a100-llama3-8b", engine, record="schedule")
        assert name in ("dai-orca",) or result.preemptions_total > 0 or seed > 0
        at = np.linspace(0.3, 0.8 * result.makespan_s, 25)
        seen = watch(work, kind, "a100-llama3-8b", engine, at=at)
        counts, sums = backlog_by_hand(work, result, seen.time_s)
        np.testing.assert_array_equal(seen.requests, counts)
        np.testing.assert_array_equal(seen.left, sums)
        there = work.arrival_s <= seen.time_s[-1]
        i, o = (x[there].astype(float) for x in (work.prompt_tokens, work.output_tokens))
        expected = [there.sum(), i.sum(), (i * i).sum(), o.sum(), (i * o + o * (o - 1) / 2).sum()]
        np.testing.assert_allclose(seen.arrived[-1], expected)
        np.testing.assert_allclose(seen.arrived_tokens[-1], (i + o - 1).sum())


def test_backlog_ends_at_nothing() -> None:
    work = Requests.of([0, 1], [10, 10], [5, 5])
    seen = watch(work, baselines.get("vllm-v1"), at=np.array([1000.0, 2000.0]))
    assert seen.left.sum() == 0 and seen.requests.tolist() == [0, 0]
    assert seen.time_s.tolist() == [1000, 2000]
    with pytest.raises(InputError, match="increasing seconds above 0"):
        watch(work, baselines.get("vllm-v1"), at=np.array([2.0, 1.0]))


def test_prices_add_up_to_the_time_of_a_request() -> None:
    for name in ("a100-llama3-8b", "a100-llama2-7b", DAI):
        profile = profiles.get(name)
        engine = EngineConfig(token_budget=2048, max_num_seqs=256, kv_blocks=(profile.kv_tokens or 0) // 16)
        for of in ("azure-conv", "azure-code", "deepseek-r1"):
            c = Case.of(baselines.get("vllm-v1"), workloads.get(of), profile, engine)
            m = c.moments
            means = np.array([1, m.prompt, m.prompt_squared, m.output, m.kv_token_iterations])
            assert prices(m, profile, engine) @ means == pytest.approx(1 / c.limit.rps, rel=1e-9)
            assert c.weights @ means == pytest.approx(m.prompt + m.output - 1)
    np.testing.assert_allclose(case("dai-sarathi", "fixed-100-101").weights, [-1, 1, 0, 1, 0])


# ------------------------------------------------------------------------------ the verdict


class Walk:
    """A case made of random numbers: tokens arrive at random, and are served at a rate that varies.

    Its drift, when filled, is `excess` (a share of what arrives); runs last as long as `requests` arrivals.
    """

    weights = np.array([0.0, 1.0, 0.0, 0.0, 0.0])
    tokens = 1.0

    class limit:
        rps = 1.0

    def __init__(self, excess: float, noise: float, seed: int) -> None:
        self.excess, self.noise, self.seed = excess, noise, seed

    def least_requests(self, procedure: Procedure) -> int:
        return procedure.requests

    def run(self, rate: float, p: Procedure, n: int, seed: int) -> Backlog:
        g = np.random.default_rng((self.seed, n, seed))
        k = p.samples
        time = np.arange(1, k + 1) * (n / rate / k)
        gained = g.normal(n / k, np.sqrt(n / k), k)
        served = (1 - self.excess) * n / k + g.normal(0, self.noise * np.sqrt(n / k), k)
        waiting = p.fill * n if p.start == "filled" else 0.0
        left, now = np.empty(k), waiting
        for i in range(k):
            now = max(0.0, now + gained[i] - served[i])
            left[i] = now
        work, arrived = np.zeros((k, 5)), np.zeros((k, 5))
        work[:, 1], arrived[:, 1] = left, waiting + gained.cumsum()
        return Backlog(time, np.zeros(k, np.int64), work, arrived)


def verdicts(excess: float, noise: float = 1.0, trials: int = 300, **options: Any) -> dict[str, float]:
    """Shares of the verdicts."""
    p = Procedure(requests=400, samples=32, **options)
    cases: list[Any] = [Walk(excess, noise, seed) for seed in range(trials)]
    found = [stability.test(one, 1.0, p).verdict for one in cases]
    return {v: found.count(v) / trials for v in ("stable", "unstable", "undecided")}


def test_few_verdicts_are_false() -> None:
    """At the limit itself every verdict is false: at most 5 %, over all looks, by chance 3 % more of 300."""
    critical = verdicts(0.0)
    assert critical["stable"] + critical["unstable"] <= 0.08
    # A resolution counts as part of the limit; a drift beyond it is found, and on the right side.
    growing, falling = verdicts(0.1, 0.5), verdicts(-0.1, 0.5)
    assert growing["unstable"] > 0.9 and growing["stable"] <= 0.05
    assert falling["stable"] > 0.9 and falling["unstable"] <= 0.05


def test_few_verdicts_are_false_from_empty() -> None:
    """A critical walk grows like a square root of time, and a stable one at first: neither is unstable."""
    assert verdicts(0.0, start="empty")["unstable"] <= 0.05
    for excess in (-0.01, -0.05):
        assert verdicts(excess, trials=60, start="empty")["unstable"] <= 0.05
    assert verdicts(0.2, trials=60, start="empty")["unstable"] > 0.9  # of 0.15, nine in ten are found
    assert verdicts(-0.3, trials=60, start="empty")["stable"] > 0.9


def test_confidence_is_shared_by_the_looks() -> None:
    assert Procedure(looks=3, confidence=0.94).level == pytest.approx(0.98)
    assert judge(np.array([-1.0, -1.1, -0.9]), 0.9, 0, 0)[0] == "stable"
    assert judge(np.array([1.0, 1.1, 0.9]), 0.9, 0, 0)[0] == "unstable"
    assert judge(np.array([1.0, 1.1, -0.9]), 0.9, 0, 0)[0] == "undecided"
    assert judge(np.array([0.1, 0.1, 0.1]), 0.9, -0.2, 0.2)[0] == "undecided"  # all equal, and next to none


def test_what_levels_off_is_not_unstable() -> None:
    """A backlog that fills up towards a large one, over more than the first look."""

    class Filling(Walk):
        def run(self, rate: float, p: Procedure, n: int, seed: int) -> Backlog:
            seen = super().run(rate, p, n, seed)
            grown = 500 * (1 - np.exp(-seen.time_s / 400)) + np.random.default_rng(seed).normal(0, 1, 32)
            seen.left[:, 1] = p.fill * n + grown
            seen.arrived[:, 1] = p.fill * n + seen.time_s
            return seen

    filling: Any = Filling(0, 0, 0)
    p = Procedure(requests=400, samples=32)
    one_look = stability.test(filling, 1.0, Procedure(requests=400, samples=32, looks=1))
    assert one_look.verdict == "unstable"
    assert stability.test(filling, 1.0, p).verdict == "undecided"


def test_drift_of_a_run() -> None:
    t = np.arange(1.0, 101)
    arrived = 50 + 2 * t + np.sin(t)
    assert drift_of(t, 50 + 0.5 * t + np.sin(t), arrived, 2.0) == pytest.approx(0.5)
    assert drift_of(t, 0.5 * t, 2 * t, 2.0, "empty") == pytest.approx(0.5)
    short = 1e-200 * t
    assert drift_of(short, 0.5 * t, 2 * t, 2e200, "empty") == pytest.approx(0.5e200)
    # 1 token/s more is served than arrives; half is gone after 25 s, all after 50.
    assert drift_of(t, np.maximum(50 - t, 0), 50 + 2 * t, 2.0) == pytest.approx(-1, abs=0.05)
    # Of a critical walk: the slope of sqrt(2 t / pi) over the second half.
    g = np.random.default_rng(0)
    walks = np.abs(g.normal(size=(4000, 256)).cumsum(axis=1))
    time = np.arange(1.0, 257)
    slopes = [drift_of(time, walk, walk, 0.0, "empty") for walk in walks]
    one = critical_drift([time] * 9, list(g.normal(10, 1, (9, 256)).cumsum(axis=1)))
    assert np.mean(slopes) == pytest.approx(one, rel=0.08)


# ------------------------------------------------------------------------------ largest rates

QUICK = Procedure(seeds=4, requests=1500, looks=2)


@pytest.mark.parametrize("name", ["dai-sarathi", "dai-orca", "vllm-v1", "sarathi", "sjf", "srpt"])
def test_theorem_2(name: str) -> None:
    """Work-conserving schedulers are stable up to the limit of arXiv 2504.07347v3, and nobody is above."""
    engine = BUDGET.replace(max_num_seqs=100_000)
    c = case(name, "fixed-100-101", engine)
    assert c.limit.kind == "exact"
    assert stability.test(c, 0.97 * c.limit.rps, QUICK).verdict == "stable"
    found = stability.test(c, 1.03 * c.limit.rps, QUICK)
    assert found.verdict == "unstable"
    # A token served is b_max / t of a second: the drift is what arrives beyond that.
    assert found.drift.value == pytest.approx(0.03 / 1.03 * found.offered, rel=0.02)


def test_published_slopes_from_empty() -> None:
    """Slopes of the backlog at 0.9, 1.1 and 1.2 of the limit: 0, 0.334 and 0.669 tokens/ms in theory."""
    c = case("dai-sarathi", "fixed-100-101")
    p = Procedure(seeds=6, requests=4000, looks=1, start="empty")
    for load, slope in ((0.9, 0.0), (1.1, 0.3343), (1.2, 0.6686)):
        found = stability.test(c, load * c.limit.rps, p)
        assert found.verdict == ("stable" if load < 1 else "unstable")
        assert found.drift.low / 1000 - 0.02 <= slope <= found.drift.high / 1000 + 0.02


def test_faster_transformer() -> None:
    found = search(case("dai-faster-transformer", "fixed-129-113"), QUICK)
    assert found.max_stable_rate < 0.55667 < found.unstable_rate
    assert found.estimate == pytest.approx(0.55667, rel=2e-3)
    assert found.limit.rps == pytest.approx(13.87, abs=0.005)
    assert found.share == pytest.approx(0.04, abs=1e-3)


def test_vanilla_vllm_loses_a_quarter() -> None:
    """The threshold is that of the Markov chain of its batches; at 10.4 requests/s it levels off."""
    c = case("dai-vllm", "fixed-129-113")
    p = Procedure(seeds=4, requests=2000, looks=2)
    rate = vanilla_vllm_rps(token_time(profiles.get(DAI)), 129, 112, 512)
    assert 0.74 < rate / c.limit.rps < 0.78
    assert stability.test(c, 0.96 * rate, p).verdict == "stable"
    assert stability.test(c, 1.04 * rate, p).verdict == "unstable"


@pytest.mark.parametrize(("budget", "share"), [(128, 1.0), (256, 0.874)])
def test_a_capped_batch(budget: int, share: float) -> None:
    """Section 6: with 100 requests in a batch a work-conserving scheduler can be unstable below load 1."""
    c = case("dai-sarathi", "fixed-290-991", EngineConfig(token_budget=budget), max_batch_requests=100)
    found = search(c, QUICK)
    assert found.estimate * 0.4675 == pytest.approx(share, abs=0.004)
    theory = full_slots_rps(token_time(profiles.get(DAI)), 290, 990, budget, 100, decodes_first=True)
    assert found.max_stable_rate < theory < found.unstable_rate


def test_searches_agree_with_the_limit_on_a_realistic_profile() -> None:
    found = search(Case.of(baselines.get("sarathi"), workloads.get("azure-conv")), QUICK)
    assert found.limit.kind == "bound"
    assert found.estimate == pytest.approx(found.limit.rps, rel=0.003)


def test_nothing_is_stable_where_nothing_is_served() -> None:
    """Whole prompts of 290 tokens and a budget of 128: blocked for ever, or turned away."""
    blocked = Case.of(
        baselines.get("dai-vllm"),
        workloads.get("fixed-290-991"),
        DAI,
        EngineConfig(token_budget=128),
        blocking=True,
    )
    found = search(blocked, Procedure(seeds=2, requests=200, looks=2))
    assert found.max_stable_rate == 0
    assert found.unstable_rate < 2e-3 * found.limit.rps
    with pytest.raises(InputError, match="can serve no request"):
        case("dai-vllm", "fixed-290-991", EngineConfig(token_budget=128))


def test_who_is_turned_away_is_no_work() -> None:
    """Prompts of up to 600 tokens, uncut, with a budget of 512: those that fit are half of all."""
    lengths = Lengths(Uniform(425, 600), Uniform(20, 20))
    recipe = Synthetic("half", (RequestClass(lengths),))
    c = Case.of(baselines.get("dai-vllm"), recipe, DAI, BUDGET)
    assert c.served_share == pytest.approx(0.5, abs=2e-3)
    assert c.moments.prompt == pytest.approx(468.5, abs=0.2)
    assert c.tokens == pytest.approx(0.5 * (468.5 + 19), rel=5e-3)
    assert c.draw(3.0, 500, 50, 0).prompt_tokens.max() <= 512
    found = stability.test(c, 0.3 * c.limit.rps, Procedure(seeds=3, requests=400, looks=1))
    assert found.verdict == "stable"


def test_a_trace_is_drawn_from() -> None:
    work = Requests.of([0, 1, 2], [100, 200, 300], [10, 20, 30])
    c = Case.of(baselines.get("sarathi"), Replay("mine", work), DAI)
    drawn = c.draw(5.0, 3000, 500, 1)
    assert len(drawn) == 3500 and (drawn.arrival_s[:500] == 0).all()
    assert drawn.arrival_s[-1] == pytest.approx(600, rel=0.1)
    pairs = set(zip(drawn.prompt_tokens.tolist(), drawn.output_tokens.tolist(), strict=True))
    assert pairs == {(100, 10), (200, 20), (300, 30)}
    assert drawn.prompt_tokens.mean() == pytest.approx(c.moments.prompt, rel=0.03)
    some = Case.of(baselines.get("dai-vllm"), Replay("mine", work), DAI, EngineConfig(token_budget=250))
    assert some.served_share == pytest.approx(2 / 3, rel=1e-12)
    assert (some.moments.prompt, some.moments.output) == (150, 15)
    with pytest.raises(InputError, match="without a rate"):
        Case.of(baselines.get("sarathi"), workloads.Shuffled("s", (1, 2, 3)))


@numba.njit
def only_one(e):  # type: ignore[no-untyped-def]
    """One request at a time."""
    if e.s.num_running > 0:
        q = e.req[e.running[0]]
        grant(e, e.running[0], max(1, q.target - q.computed))
    elif e.s.num_waiting > 0 and can_grant(e, first(e), known_tokens(e.req[first(e)])):
        grant(e, first(e), known_tokens(e.req[first(e)]))


def test_a_scheduler_of_ones_own() -> None:
    """One after the other: a prefill and nine decodes, each a batch of 46.75 ms."""
    mine = Scheduler("one", plan=only_one, engine={"token_budget": 512})
    c = Case.of(mine, workloads.get("fixed-100-10"), DAI)
    found = search(c, Procedure(seeds=3, requests=400, looks=2))
    assert found.max_stable_rate < 1 / 0.4675 < found.unstable_rate


def test_threads_change_nothing() -> None:
    c = case("dai-vllm", "fixed-129-113")
    p = Procedure(seeds=3, requests=300, looks=1)
    assert stability.test(c, 9.0, p, threads=1) == stability.test(c, 9.0, p, threads=3)


def test_procedures_refuse() -> None:
    for options, match in (
        ({"seeds": 1}, "seeds must be a whole number of at least 2"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1"),
        ({"start": "full"}, "unknown start 'full'; did you mean 'filled'"),
        ({"requests": 1.5}, "requests must be a whole number"),
    ):
        with pytest.raises(InputError, match=match):
            Procedure(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rate must be positive"):
        stability.test(case("dai-orca", "fixed-10-10"), 0.0)


# ------------------------------------------------------------------------------ command line

COMMAND = ["stability", "--profile", DAI, "--workload", "fixed-129-113", "--token-budget", "512"]
SMALL = ["--seeds", "3", "--requests", "600", "--looks", "2"]


def test_command_judges_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, *SMALL, "--scheduler", "dai-faster-transformer", "--rate", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "unstable"
    assert found["drift_interval"][0] <= found["drift"] <= found["drift_interval"][1]
    assert found["drift"] == pytest.approx((1 - 0.55667) * 241, rel=0.01)
    assert found["limit"] == pytest.approx(13.871, abs=1e-3)
    assert (found["scheduler"], found["seeds"], found["confidence"]) == ("dai-faster-transformer", 3, 0.95)


def test_command_searches_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    who = ["--scheduler", "dai-faster-transformer", "--scheduler", "dai-sarathi"]
    assert main([*COMMAND, *SMALL, *who, "--loads", "0.5,1.1", "--output", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["schedulers"]
    assert [one["scheduler"] for one in found] == ["dai-faster-transformer", "dai-sarathi"]
    assert found[0]["share"] == pytest.approx(0.04, abs=0.001)
    assert found[1]["share_interval"][0] <= 1 <= found[1]["share_interval"][1]
    assert found[1]["max_stable_rate"] == pytest.approx(13.82, abs=0.02)
    tests = pd.read_csv(tmp_path / "tests.csv")
    assert set(tests["verdict"]) <= {"stable", "unstable", "undecided"}
    assert {"drift_low", "drift_high", "rate", "load"} <= set(tests)
    lines = pd.read_csv(tmp_path / "backlog.csv")
    assert set(lines["seed"]) == {0, 1, 2} and (lines["tokens"] >= 0).all()
    for name in ("backlog.png", "drift.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    who = ["--scheduler", "dai-faster-transformer,dai-orca"]
    assert main([*COMMAND, *SMALL, *who, "--load", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "unstable" in text and "stable" in text.replace("unstable", "")
    assert main([*COMMAND, *SMALL, "--scheduler", "dai-faster-transformer"]) == 0
    assert "stable up to /s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheduler", "orka"], "unknown scheduler 'orka'; did you mean 'orca'"),
        (["--scheduler", "orca", "--rate", "1", "--load", "1"], "either --rate or --load"),
        (["--scheduler", "orca", "--rate", "-1"], "rate must be positive requests/s"),
        (["--scheduler", "orca", "--load", "0"], "--load must be a positive share"),
        (["--scheduler", "orca,"], "empty name"),
        (["--scheduler", "orca", "--seeds", "1"], "seeds must be a whole number of at least 2"),
        (["--scheduler", "orca", "--jobs", "0"], "--jobs must be at least 1"),
        (["--scheduler", "orca", "--loads", "a", "--output", "x"], "--loads takes shares"),
        (["--scheduler", "orca", "--loads", "1"], "give --output FOLDER"),
        (["--scheduler", "orca", "--loads", "1", "--rate", "1"], "--loads is of a search"),
        (["--scheduler", "orca", "--tolerance", "0.1", "--load", "1"], "--tolerance is of a search"),
        (["--scheduler", "orca", "--workload-set", "rate=3"], "it is the test that sets it"),
        (["--scheduler", "dai-vllm", "--token-budget", "100"], "can serve no request"),
    ],
)
def test_command_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["stability", "--profile", DAI, "--workload", "fixed-129-113"]
    assert main([*base, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
