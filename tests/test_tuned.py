"""The priority rule, held against a plain version and against the rules that it contains; and its tuning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import baselines
from agents.cli import main
from agents.contenders import METRICS, Episodes, Scheduled
from agents.evaluation import evaluate
from agents.tuning import best_named, tune
from baselines import tuned
from baselines.tuned import Params
from llmsched_env import EngineConfig, InputError, scenarios, simulate
from llmsched_env.core.cost import batch_time
from llmsched_env.core.requests import Requests
from llmsched_env.profiles import Profile
from llmsched_env.scheduling import Scheduler
from llmsched_env.scheduling.own import evict, grant

LINEAR = Profile(name="linear", form="linear", params={"c0": 0.01, "c1": 1e-4, "c2": 0, "c3": 0, "c4": 1e-6})
ROOMY = EngineConfig(kv_blocks=1000)
WAITING = 1
INF = math.inf


def load(seed: int, n: int = 40, **columns: Any) -> Requests:
    """Requests of three priorities, some with targets, some with predictions."""
    g = np.random.default_rng(seed)
    output = np.clip(g.lognormal(3, 1, n), 1, 150).astype(int)
    given: dict[str, Any] = {
        "predicted_tokens": np.where(
            g.random(n) < 0.8, np.maximum(1, output * np.exp(g.normal(0, 0.5, n))), np.nan
        ),
        "declared_tokens": 200,
        "priority": g.integers(0, 3, n),
        "ttft_target_s": g.choice([0.3, 2, INF], n),
        "tpot_target_s": g.choice([0.015, 0.1, INF], n),
    }
    arrival, prompt = g.exponential(0.05, n).cumsum(), g.integers(1, 700, n)
    return Requests.of(arrival, prompt, output, **{**given, **columns})


def random_params(seed: int) -> Params:
    g = np.random.default_rng(seed)

    def some(value: float, other: float) -> float:
        return float(g.choice([value, other]))

    return Params(
        area=some(0.0, 2 * g.random()),
        prompt=some(0.0, 2 * g.random()),
        age=some(0.0, g.random()),
        urgency=some(0.0, 5 * g.random()),
        late=some(0.0, 5 * g.random()),
        priority=some(0.0, 5 * g.random()),
        trust=some(0.0, g.random()),
        headroom=some(0.0, 0.2 * g.random()),
        margin=some(INF, g.random()),
        budget=some(INF, g.integers(1, 500)),
        pace=some(INF, 2 * g.random()),
    )


# ---------------------------------------------------------------------- a plain version


def plain(p: Params) -> Callable[[Any], None]:
    """The rule, as one would write it down."""

    def plan(e: Any) -> None:
        s, req, size = e.s, e.req, int(e.s.block_size)

        def blocks(tokens: int) -> int:
            return -(-int(tokens) // size)

        def running() -> list[int]:
            return e.running[: s.num_running].tolist()

        def unfinished() -> list[int]:
            return [r for r in running() if req[r].computed < req[r].target]

        def time(*batch: float) -> float:
            return float(batch_time(e.cost, *map(float, batch)))

        def score(r: int) -> float:
            q = req[r]
            known = float(q.prompt + q.generated)
            left = max(1.0, q.predicted - q.generated)
            area = known if math.isnan(q.predicted) else left * known + 0.5 * left * left
            total = p.area * math.log(area) + p.prompt * math.log(known)
            total += p.priority * q.priority - p.age * (s.clock - q.arrival)
            if q.ttft_target == INF:
                return total + p.urgency
            due = q.arrival + q.ttft_target
            if q.generated > 0:
                return total + p.late * (q.first_token > due)
            rest = int(q.prompt - q.computed)
            late = s.clock + time(rest, 1, rest * (q.computed + 0.5 * rest), q.computed, 0, 0) > due
            return total + p.late * late + p.urgency * max(0.0, (due - s.clock) / q.ttft_target)

        def promised() -> int:
            return sum(blocks(req[r].target) - int(req[r].blocks) for r in unfinished())

        def wanted() -> int:
            new = [r for r in running() if req[r].computed == req[r].blocks * size and r not in unfinished()]
            return len(new) + promised()

        while wanted() > s.free:
            evict(e, max(running(), key=lambda r: (score(r), r)))
        decodes = [r for r in running() if r not in unfinished()]
        for r in decodes:
            grant(e, r, 1)

        left = int(max(0, min(s.budget, p.budget - len(decodes))))
        limits = [
            max(q.first_token + q.generated * q.tpot_target - s.clock, p.pace * q.tpot_target)
            for q in (req[r] for r in decodes)
            if q.first_token - q.arrival <= q.ttft_target and q.tpot_target < INF
        ]
        seconds = min(limits, default=INF)
        while left and time(left, 1, 0.5 * left * left, 0, s.decodes, s.decode_context) > seconds:
            left //= 2

        def pair(r: int) -> tuple[float, float]:
            """Tokens that r will still add, and those that it holds by then but for these."""
            q = req[r]
            coming = 1.0
            if not math.isnan(q.predicted):
                length = math.ceil(min(max(p.trust * q.predicted, q.generated + 1.0), q.limit))
                coming = max(1.0, float(length - q.generated))
            decoding = q.computed >= q.target > 0
            return coming, float((q.computed if decoding else q.prompt + q.generated - 1) + size - 1)

        def peak(r: int) -> float:
            """Most tokens held at a completion, if r comes in and all decode in step."""
            pairs = [pair(i) for i in [*running(), r]]
            return max(sum(held + n for left, held in pairs if left >= n) for n, _ in pairs)

        headroom = int(p.headroom * s.kv_blocks)
        room = int(s.free) - promised()
        waiting = [r for r in range(s.arrived) if req[r].status == WAITING]
        waiting.sort(key=lambda r: (score(r), r))
        if s.num_victims or all(req[r].need > room - headroom * (s.num_running > 0) for r in waiting):
            waiting = []
        begun = sorted(unfinished(), key=score)
        of = {r: score(r) for r in [*waiting, *begun]}
        misfits, last = 0, INF
        while left > 0:
            if waiting and (of[waiting[0]] > last or s.num_running >= s.max_num_seqs):
                waiting = []
            head = begun and (not waiting or of[begun[0]] <= of[waiting[0]])
            if not head and not waiting:
                break
            r = begun[0] if head else waiting[0]
            q = req[r]
            tokens = min(left, int(q.target - q.computed if head else q.prompt + q.generated))
            del (begun if head else waiting)[0]
            fits = True
            if not head:
                fits = q.need <= room - headroom * (s.num_running > 0)
                if fits and p.trust > 0 and s.num_running > 0 and not math.isnan(q.predicted):
                    fits = peak(r) <= s.kv_blocks * size
            if fits:
                room -= 0 if head else int(q.need)
                grant(e, r, tokens)
                left -= tokens
            else:
                last = of[r] + p.margin if misfits == 0 else last
                misfits += 1
            if misfits:
                waiting = [i for i in waiting if req[i].need <= room - headroom]

    return plan


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_plain_version(seed: int) -> None:
    work, params = load(seed), random_params(seed)
    size = 1 + 15 * (seed % 2)
    config = EngineConfig(kv_blocks=1400 // size, block_size=size, token_budget=512, max_num_seqs=8)
    scheduler = tuned.rule(params)
    own = Scheduler("plain", scheduler.settings, plan=plain(params))
    found, wanted = (simulate(work, one, LINEAR, config, record="schedule") for one in (scheduler, own))
    assert found.schedule is not None and wanted.schedule is not None
    np.testing.assert_array_equal(found.schedule.ends, wanted.schedule.ends)
    np.testing.assert_array_equal(found.schedule.requests, wanted.schedule.requests)
    np.testing.assert_array_equal(found.schedule.tokens, wanted.schedule.tokens)
    np.testing.assert_array_equal(found.finish_s, wanted.finish_s)


# ---------------------------------------------------------------------- what it contains


def snug(seed: int) -> Requests:
    """Requests whose answers end in the last block of their prompts, so that nobody is ever preempted."""
    g = np.random.default_rng(seed)
    n = 60
    return Requests.of(g.exponential(0.02, n).cumsum(), 16 * g.integers(1, 30, n) + 1, g.integers(1, 16, n))


@pytest.mark.parametrize("seed", range(4))
def test_first_come_first_served(seed: int) -> None:
    """Age alone is the order of arrival: with backfilling where the margin is unlimited, else without."""
    config = EngineConfig(kv_blocks=80, token_budget=100_000)
    for margin, backfill in ((INF, 64), (0.0, 0)):
        rule = tuned.rule(Params(area=0, age=1, trust=0, margin=margin))
        known = baselines.get("fcfs-backfill", backfill=backfill)
        runs = [simulate(snug(seed), one, LINEAR, config) for one in (rule, known)]
        assert runs[0].preemptions_total == runs[1].preemptions_total == 0
        np.testing.assert_array_equal(runs[0].finish_s, runs[1].finish_s)


@pytest.mark.parametrize("seed", range(4))
def test_least_area_first(seed: int) -> None:
    """The parameters by default are `area-backfill`, where prompts are not cut and lengths are known."""
    g = np.random.default_rng(seed)
    n = 80
    output = np.clip(g.lognormal(3.5, 1, n), 1, 400).astype(int)
    work = Requests.of(g.exponential(0.03, n).cumsum(), g.integers(1, 500, n), output)
    config = EngineConfig(kv_blocks=150, token_budget=100_000)
    runs = [simulate(work, one, LINEAR, config) for one in (tuned.rule(), baselines.get("area-backfill"))]
    assert runs[1].preemptions_total == 0
    np.testing.assert_array_equal(runs[0].finish_s, runs[1].finish_s)


def test_priorities_are_strict_when_their_weight_is_large() -> None:
    work = Requests.of([0, 0.001, 0.001, 0.001], [10] * 4, [20] * 4, priority=[0, 2, 1, 0])
    params = Params(area=0, priority=5)
    run = simulate(work, tuned.rule(params), LINEAR, EngineConfig(kv_blocks=100, max_num_seqs=1))
    assert np.argsort(run.finish_s).tolist() == [0, 3, 2, 1]


def test_who_is_late_comes_last() -> None:
    """B is served at once although A came first: A's first token is late in any case."""
    work = Requests.of([0, 0.001, 0.002], [10, 500, 10], [50, 5, 5], ttft_target_s=[INF, 0.02, 5])
    firsts = [
        simulate(work, tuned.rule(params), LINEAR, EngineConfig(kv_blocks=100, max_num_seqs=1)).first_token_s
        for params in (Params(area=0, age=1), Params(area=0, age=1, late=9))
    ]
    assert firsts[0][1] < firsts[0][2] and firsts[1][2] < firsts[1][1]


def test_budget_and_pace_cut_prompts() -> None:
    work = Requests.of([0, 0.012], [10, 2000], [100, 2], tpot_target_s=[0.012, INF])

    def chunks(**params: float) -> list[int]:
        run = simulate(work, tuned.rule(Params(**params)), LINEAR, ROOMY, record="iterations")
        assert run.iterations is not None
        return [n for n in run.iterations["prefill_tokens"].tolist()[1:] if n]

    assert chunks() == [2000]
    assert chunks(budget=300) == [299] * 6 + [206]
    # An iteration with 127 tokens takes 0.031 s, with 255 0.068 s; three times the target is 0.036 s.
    assert chunks(pace=3) == [127] * 15 + [95]


# ---------------------------------------------------------------------- what it knows


@pytest.mark.parametrize("told", ["class", "none"])
def test_it_does_not_peek(told: str) -> None:
    """Other lengths, of which nothing is told, change no plan before an answer ends."""
    predicted = {"class": 40.0, "none": math.nan}[told]
    g = np.random.default_rng(1)
    for seed in range(4):
        runs = []
        for _ in range(2):
            work = load(seed, predicted_tokens=predicted)
            work = work.replace(output_tokens=g.integers(30, 150, len(work)).astype(np.int32))
            config = EngineConfig(kv_blocks=90, token_budget=512, max_model_len=1400)
            runs.append(simulate(work, tuned.rule(random_params(seed)), LINEAR, config, record="schedule"))
        first = min(float(run.finish_s.min()) for run in runs)
        assert runs[0].schedule is not None and runs[1].schedule is not None
        n = int(np.searchsorted(runs[0].schedule.start_s, first))  # plans made before
        assert n > 30
        ends = runs[0].schedule.ends[:n]
        np.testing.assert_array_equal(ends, runs[1].schedule.ends[:n])
        for column in ("requests", "tokens"):
            one, other = (getattr(run.schedule, column)[: ends[-1]] for run in runs)
            np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------------- files


def test_files(tmp_path: Path) -> None:
    params = Params(area=0.5, budget=256, margin=INF)
    tuned.save(params, tmp_path / "mine.json", scenario="toy")
    assert tuned.read(tmp_path / "mine.json") == params
    scheduler = baselines.get(f"tuned:{tmp_path}/mine.json", headroom="0.1")
    assert scheduler.settings.x == Params(area=0.5, budget=256, margin=INF, headroom=0.1)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{}", 'not JSON with "params"'),
        ("what", 'not JSON with "params"'),
        ('{"params": [1]}', "unknown parameter '1'"),
        ('{"params": {"aria": 1}}', "did you mean 'area'"),
        ('{"params": {"area": "x"}}', "area must be a number, not 'x'"),
        ('{"params": {"trust": 2}}', "trust must be from 0 to 1, not 2"),
        ('{"params": {"budget": 0}}', "budget must be from 1 to inf, not 0"),
        ('{"params": {"late": "inf"}}', "the weight late must be finite"),
        ('{"params": {"age": NaN}}', "age must be a number, not nan"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=complaint) as error:
        baselines.get(f"tuned:{tmp_path}/bad.json")
    assert "bad.json" in str(error.value)


def test_bad_names() -> None:
    with pytest.raises(InputError, match="cannot be read"):
        baselines.get("tuned:nowhere.json")
    with pytest.raises(InputError, match="unknown scheduler 'tuned'"):
        baselines.get("tuned")
    with pytest.raises(InputError, match="order does nothing"):
        tuned.rule().replace(order="area")
    with pytest.raises(InputError, match="must be Params"):
        tuned.rule(3)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- tuning

FCFS = Params(area=0, age=1, trust=0, margin=INF)
SMALL = {"num_requests": 20, "load": 1.5}


def test_tuning_finds_shortest_first() -> None:
    found = tune("toy", budget=640, start=FCFS)
    assert found.start > 30 and found.value == pytest.approx(20, rel=0.02)
    assert found.episodes <= 640
    assert found == tune("toy", budget=640, start=FCFS)


def test_an_interrupted_search_returns_its_best() -> None:
    def stop(done: int) -> None:
        if done > 400:
            raise KeyboardInterrupt

    found = tune("toy", start=FCFS, progress=stop)
    assert found.interrupted and 400 < found.episodes < 500
    assert found.value < found.start


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"scenario": "tyo"}, "did you mean 'toy'"),
        ({"metric": "latency"}, "did you mean 'latency_s'"),
        ({"method": "cmaes"}, "did you mean 'cma'"),
        ({"budget": 10}, "budget must be at least"),
        ({"seed": -1}, "seed must be a whole number from 0, not -1"),
        ({"lode": 1.0}, "unknown option 'lode'"),
    ],
)
def test_bad_tuning(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        tune(**{"scenario": "toy", **options})


def test_metrics_are_those_of_the_environments() -> None:
    """What is tuned by is what an environment reports when the rule acts in it (whose prompts are cut by the
    engine's budget alone: other cuts are no chunk levels)."""
    options: dict[str, Any] = {**SMALL, "waiting_slots": 32, "running_slots": 32}
    rule = tuned.rule(Params(area=0.1, urgency=3, late=4, trust=0.6))
    episodes = Episodes.of(scenarios.get("slo-mix"), range(5, 9), "goodput", "llmsched/Decision-v0", options)
    found = Scheduled(rule).play(episodes)
    played = evaluate(baselines.expert(rule), scenario="slo-mix", num_episodes=4, seed=5, **options)
    for name in METRICS:
        if name == "fairness":  # which is not measured here
            continue
        np.testing.assert_allclose(found[name], played[name], rtol=1e-9)


def test_best_named_knows_no_more() -> None:
    best = best_named("toy", length_info="none")
    assert not baselines.get(best).needs_predictions()
    assert best_named("toy", length_info="oracle") != best


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rule.json"
    options = ["--scenario", "toy", "--budget", "400", "--episodes", "8", "--output", str(path), "--json"]
    assert main(["tune", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["value"] <= printed["start"]
    assert [row["policy"] for row in printed["report"]["policies"]][-1] == "tuned"
    assert json.loads(path.read_text())["metric"] == "latency_s"
    run = ["simulate", "--workload", "fixed-500-100", "--num-requests", "9", "--rate", "2"]
    assert main([*run, "--scheduler", f"tuned:{path}", "--profile", "a100-llama3-8b"]) == 0
    assert f"tuned:{path}" in capsys.readouterr().out
    assert main(["tune", "--scenario", "toy", "--output", str(tmp_path)]) == 2
    assert main(["tune", "--scenario", "toy", "--output", str(path), "--set", "seed=3"]) == 2
