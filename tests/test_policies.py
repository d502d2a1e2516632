"""The schedulers from papers: a case that pins each rule, the formulas behind some, what holds for all."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import baselines
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.requests import Requests
from llmsched_env.errors import InputError
from llmsched_env.profiles import Profile
from llmsched_env.scheduling import Scheduler
from llmsched_env.simulation import simulate

UNIT = Profile(name="unit", form="staircase", params={"c": 1.0, "a": 0.0, "b0": 1.0})
LINEAR = Profile(
    name="line", form="linear", params={"c0": 0.01, "c1": 1e-4, "c2": 1e-4, "c3": 1e-7, "c4": 0.0}
)

Batch = dict[str, int]


def serve(scheduler: Scheduler, requests: Requests, kv: int = 100_000, **engine: Any) -> list[Batch]:
    """The batches of a run with iterations of one second: tokens by request, -1 for a preempted one."""
    config = EngineConfig(kv_blocks=kv, block_size=1, **engine)
    schedule = simulate(requests, scheduler, UNIT, config, record="schedule").schedule
    assert schedule is not None
    batches, start = [], 0
    for end in schedule.ends.tolist():
        entries = zip(schedule.requests[start:end].tolist(), schedule.tokens[start:end].tolist(), strict=True)
        batches.append({requests.name(r): t for r, t in entries})
        start = end
    return batches


def requests(*rows: tuple[str, float, int, int], **more: Any) -> Requests:
    """Requests from rows (name, arrival, prompt, output)."""
    names, arrival, prompt, output = zip(*rows, strict=True)
    return Requests.of(arrival, prompt, output, names=names, **more)


def firsts(batches: list[Batch]) -> str:
    """The requests' names in the order in which they first got tokens."""
    return "".join(dict.fromkeys(name for batch in batches for name, t in batch.items() if t > 0))


def evicted(batches: list[Batch]) -> list[str]:
    """Who was preempted, in order."""
    return [name for batch in batches for name, t in batch.items() if t < 0]


# ------------------------------------------------------------------------------ Dai et al.


@pytest.mark.parametrize(
    ("name", "budget", "expected"),
    [
        ("dai-vllm", 4, "Ad Bd Cd, Dp Ep, Ad Bd Cd Dd, Bd Cd Ed, Bd"),
        ("dai-orca", 5, "Ad Bd Cd, Ad Bd Cd Dp Ep, Bd Cd Dd Ed, Bd"),
        ("dai-faster-transformer", 4, "Ad Bd Cd, Ad Bd Cd, Bd Cd, Bd, Dp Ep, Dd Ed"),
        ("dai-sarathi", 4, "Ad Bd Cd, Ad Bd Cd Dp, Bd Cd Dd Ep, Bd Ed"),
    ],
)
def test_worked_example_of_dai(name: str, budget: int, expected: str) -> None:
    """arXiv 2504.07347v3, Fig. 8: A, B, C decode 2, 4 and 3 tokens; D and E (1 + 1) arrive during a batch."""
    work = requests(("A", 0, 1, 3), ("B", 0, 1, 5), ("C", 0, 1, 4), ("D", 1.5, 1, 2), ("E", 1.5, 1, 2))
    batches = serve(baselines.get(name), work, token_budget=budget)
    prefilled: set[str] = set()
    written = []
    for batch in batches:
        written.append(" ".join(sorted(n + ("d" if n in prefilled else "p") for n in batch)))
        prefilled |= set(batch)
    assert written[0] == "Ap Bp Cp"
    assert ", ".join(written[1:]) == expected


@pytest.mark.parametrize(("budget", "stable"), [(128, True), (512, False)])
def test_point_c(budget: int, stable: bool) -> None:
    """Section 6: with at most 100 requests in a batch, Sarathi is stable with b_max = 128, not with 512."""
    n = 400
    work = Requests.of(0.4675 * np.arange(n), np.full(n, 290), np.full(n, 991))
    profile = Profile(name="dai", form="staircase", params={"c": 0.01128, "a": 0.03547, "b0": 128.0})
    scheduler = baselines.get("dai-sarathi", max_batch_requests=100)
    config = EngineConfig(kv_blocks=1_000_000, block_size=16, token_budget=budget)
    result = simulate(work, scheduler, profile, config, record="iterations", horizon_s=0.4675 * n)
    rows = result.iterations
    assert rows is not None
    waiting = n - int(np.isfinite(result.finish_s).sum())
    if stable:
        assert waiting <= 101
        assert (rows["prefill_tokens"][-50:] == 29).all()
        assert (rows["decode_requests"][-50:] == 99).all()
    else:
        assert waiting > 115


# ------------------------------------------------------------------------------ orders


FOUR = requests(("A", 0, 10, 30), ("B", 0, 30, 10), ("C", 0, 20, 22), ("D", 0, 120, 9))


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("fcfs-backfill", "ABCD"),
        ("mc-benchmark", "ABCD"),
        ("rank-id", "ABCD"),
        ("sjf", "DBCA"),
        ("sjf-backfill", "DBCA"),
        ("mc-sf", "DBCA"),
        ("srpt", "DBCA"),
        ("trail", "DBCA"),
        ("a-min", "DBCA"),
        ("rank-o", "DBCA"),
        ("sjf-prompt", "ACBD"),
        ("slai", "ACBD"),
        ("uniboost", "ACBD"),
        ("rank-i", "ACBD"),
        ("svf", "BCAD"),
        ("area-backfill", "BCAD"),
    ],
)
def test_order_of_admission(name: str, order: str) -> None:
    assert firsts(serve(baselines.get(name), FOUR, max_num_seqs=1)) == order


def test_edf() -> None:
    work = requests(
        ("A", 0, 5, 5), ("B", 0, 5, 5), ("C", 0, 5, 5), ("D", 1, 5, 5), ttft_target_s=[np.inf, 90, np.inf, 20]
    )
    assert firsts(serve(baselines.get("edf"), work, max_num_seqs=1)) == "BDAC"


def test_boost_is_bounded() -> None:
    """A short prompt overtakes a long one that is a little older, not one that is much older."""
    first = ("A", 0.0, 5000, 4)
    late = requests(("R", 0.0, 5, 30), first, ("B", 1.0, 50, 4))
    later = requests(("R", 0.0, 5, 30), first, ("B", 20.0, 50, 4))
    scheduler = baselines.get("uniboost")
    assert firsts(serve(scheduler, late, max_num_seqs=1)) == "RBA"
    assert firsts(serve(scheduler, later, max_num_seqs=1)) == "RAB"


def test_backfilling() -> None:
    """Behind a request that does not fit, others are tried."""
    work = requests(("R", 0, 60, 9), ("A", 1, 60, 4), ("B", 1, 20, 4))
    assert firsts(serve(baselines.get("fcfs-backfill"), work, kv=100)) == "RBA"
    assert firsts(serve(baselines.get("fcfs-backfill", backfill=0), work, kv=100)) == "RAB"


@pytest.mark.parametrize(("output", "order"), [(9, "RBA"), (20, "RAB")])
def test_bounded_backfilling(output: int, order: str) -> None:
    """`area-backfill` tries only requests of up to twice the area (248) of the first that does not fit."""
    work = requests(("R", 0, 60, 9), ("A", 1, 60, 4), ("B", 1, 25, output))
    assert firsts(serve(baselines.get("area-backfill"), work, kv=100)) == order


# ------------------------------------------------------------------------------ preemption


def test_srpt_preempts_and_trail_protects() -> None:
    early = requests(("L", 0, 5, 50), ("S", 4.5, 5, 3))
    late = requests(("L", 0, 5, 50), ("S", 44.5, 5, 3))
    for name in ("srpt", "trail"):
        assert evicted(serve(baselines.get(name), early, max_num_seqs=1)) == ["L"]
    assert evicted(serve(baselines.get("srpt"), late, max_num_seqs=1)) == ["L"]
    assert evicted(serve(baselines.get("trail"), late, max_num_seqs=1)) == []
    assert evicted(serve(baselines.get("sjf"), early, max_num_seqs=1)) == []


def test_las_preempts_by_levels() -> None:
    work = requests(("L", 0, 5, 60), ("S", 10.5, 5, 40), ("T", 40.5, 5, 4), predicted_tokens=np.nan)
    batches = serve(baselines.get("las"), work, max_num_seqs=1)
    # With 32 tokens L falls behind S, and S behind T; then they go on in order of arrival.
    assert evicted(batches) == ["L", "S"]
    assert firsts(batches) == "LST"
    assert [batches[32], batches[64]] == [{"L": -1, "S": 5}, {"S": -1, "T": 5}]
    assert [batches[68], batches[96]] == [{"L": 37}, {"S": 37}]


def victim_of(name: str, **engine: Any) -> str:
    """Who is preempted first, when A (large), B (small) and C (in between, last) outgrow the KV cache."""
    work = requests(("A", 0, 50, 40), ("B", 0, 10, 40), ("C", 0, 30, 40), predicted_tokens=[16, 30, 60])
    return evicted(serve(baselines.get(name), work, kv=129, **engine))[0]


@pytest.mark.parametrize(
    ("name", "victim"),
    [
        ("vllm-v1", "C"),
        ("srf", "B"),
        ("lrf", "A"),
        ("infermax-sarathi", "C"),
        ("infermax-sarathi-srf", "B"),
        ("infermax-vllm", "C"),
        ("rank-i", "A"),
        ("rank-o", "C"),
        ("rank-id", "C"),
        ("srpt", "C"),
    ],
)
def test_victim(name: str, victim: str) -> None:
    assert victim_of(name) == victim


def test_a_min_evicts_the_least_bound() -> None:
    """B (bound 5) and A (bound 20) run; at overflow B has put out less than 20 tokens and goes."""
    work = requests(("A", 0, 20, 40), ("B", 0, 20, 40), predicted_tokens=[40, 10])
    batches = serve(baselines.get("a-min"), work, kv=70)
    assert firsts(batches) == "BA"
    assert evicted(batches)[0] == "B"


@pytest.mark.parametrize(("name", "base"), [("vllm-v0-no-evict", "vllm-v0"), ("sarathi-no-evict", "sarathi")])
def test_eviction_free(name: str, base: str) -> None:
    work = requests(*((chr(65 + i), 0, 40, 40) for i in range(10)))
    assert evicted(serve(baselines.get(name), work, kv=320, token_budget=512)) == []
    assert evicted(serve(baselines.get(base), work, kv=320, token_budget=512))


@pytest.mark.parametrize(
    ("kv", "prompt", "output", "vllm", "sarathi"),
    [(100, 8, 32, 1.54, 1.60), (100, 1, 64, 2.29, 2.29), (10_000, 8, 64, 0.72, 0.84)],
)
def test_preempting_pays_when_memory_is_tight(
    kv: int, prompt: int, output: int, vllm: float, sarathi: float
) -> None:
    """INFERMAX: latency of never preempting over that of preempting, 1,024 equal requests at once.

    With little memory preempting wins, up to some two times; with more it loses. The values are those of an
    independent simulation with the same cost model.
    """
    work = Requests.of(np.zeros(1024), np.full(1024, prompt), np.full(1024, output))
    config = EngineConfig(kv_blocks=kv, block_size=1, token_budget=4096)
    for name, ratio in (("infermax-vllm", vllm), ("infermax-sarathi", sarathi)):
        runs = [simulate(work, baselines.get(n), "infermax-7b", config) for n in (f"{name}-no-evict", name)]
        assert runs[0].makespan_s / runs[1].makespan_s == pytest.approx(ratio, abs=0.01)


def test_srf_hist_waits_for_the_mean_of_the_class() -> None:
    """After A (total 50) finished, D of the same class is held back while fewer than 50 KVs are free."""
    work = requests(("A", 0, 10, 40), ("B", 0, 65, 60), ("D", 41.5, 10, 10))
    for name, begin in (("srf", 42), ("srf-hist", 60)):  # B holds 107 tokens at 42 s and ends at 60 s
        batches = serve(baselines.get(name), work, kv=155)
        assert next(i for i, batch in enumerate(batches) if "D" in batch) == begin


def test_hybrid_vllm_mixes_whole_prompts_with_decodes() -> None:
    work = requests(("A", 0, 10, 5), ("B", 1.5, 20, 5))
    assert serve(baselines.get("vllm-hybrid"), work)[2] == {"B": 20, "A": 1}
    assert serve(baselines.get("vllm-v0"), work)[2] == {"B": 20}


# ------------------------------------------------------------------------------ admission tests


def mc_sf_by_hand(work: Requests, kv: int) -> list[int]:
    """Start of each request under MC-SF, iterations of one second: does all fit in every later iteration?"""
    prompt, output = work.prompt_tokens.tolist(), work.output_tokens.tolist()
    start: dict[int, int] = {}
    t = 0
    while len(start) < len(work):
        running = [i for i, p in start.items() if p + output[i] > t]
        waiting = [i for i in range(len(work)) if i not in start and work.arrival_s[i] <= t]
        for i in sorted(waiting, key=lambda i: (output[i], i)):
            trial = {**{j: start[j] for j in running}, i: t}
            end = max(p + output[j] for j, p in trial.items())
            held = ({j: u - p for j, p in trial.items() if p <= u < p + output[j]} for u in range(t, end))
            if max(sum(prompt[j] + grown for j, grown in usage.items()) for usage in held) > kv:
                break
            start[i] = t
            running.append(i)
        t += 1
    return [start[i] for i in range(len(work))]


def test_mc_sf_is_its_formula() -> None:
    for seed in range(12):
        g = np.random.default_rng(seed)
        n = 40
        work = Requests.of(np.sort(g.integers(0, 60, n)), g.integers(1, 30, n), g.integers(1, 40, n))
        config = EngineConfig(kv_blocks=120, block_size=1, token_budget=100_000)
        result = simulate(work, baselines.get("mc-sf"), UNIT, config)
        assert result.preemptions_total == 0
        np.testing.assert_array_equal(result.first_scheduled_s, mc_sf_by_hand(work, 120))
        np.testing.assert_array_equal(result.finish_s, result.first_scheduled_s + work.output_tokens)


def test_sorted_f_prefers_the_batch_of_least_f() -> None:
    """X has the shortest output, but a prompt that takes the whole memory; many others fit together."""
    work = requests(("X", 0, 95, 2), *((chr(97 + i), 0, 2, 3) for i in range(15)))
    assert firsts(serve(baselines.get("mc-sf"), work, kv=100))[0] == "X"
    assert firsts(serve(baselines.get("sorted-f"), work, kv=100))[-1] == "X"


# ------------------------------------------------------------------------------ rules of their own


def test_wait_gathers_a_class() -> None:
    work = requests(*((chr(65 + i), i + 0.5, 5, 3) for i in range(3)), ("Z", 30, 5, 3), ("Y", 40, 5, 3))
    result = simulate(work, baselines.get("wait", threshold=3), UNIT, EngineConfig(kv_blocks=1000))
    # A, B, C start together when C is there; Y and Z when nothing more arrives.
    np.testing.assert_array_equal(result.first_scheduled_s, [2.5, 2.5, 2.5, 40, 40])


def test_wait_serves_only_classes_that_are_due() -> None:
    """While two of class 1 wait, the running requests of class 0 pause."""
    rows = [("A", 0, 5, 9), ("B", 0, 5, 9), ("C", 2.5, 5, 3), ("D", 2.5, 5, 3), ("E", 99, 5, 1)]
    work = requests(*rows, class_id=[0, 0, 1, 1, 0])
    batches = serve(baselines.get("wait", threshold=2), work)
    assert [set(b) for b in batches[2:5]] == [{"A", "B"}, {"C", "D"}, {"A", "B", "C", "D"}]


def test_rad_never_mixes() -> None:
    work = requests(("A", 0, 256, 20), ("B", 0, 256, 20), ("C", 6.5, 100, 20))
    batches = serve(baselines.get("rad"), work)
    assert batches[:5] == [{"A": 128}, {"A": 128}, {"B": 128}, {"B": 128}, {"A": 1, "B": 1}]
    assert batches[7] == {"C": 100}
    full = requests(*((f"{i}", 0, 1, 9) for i in range(130)))
    sizes = [sum(b.values()) for b in serve(baselines.get("rad"), full)]
    assert sizes[:9] == [128] * 9  # one tile of prefills, and as many decodes until the first 128 are done


def test_slai_lets_decodes_with_time_wait() -> None:
    work = requests(("A", 0, 10, 5), ("B", 0, 10, 5), ("C", 1, 3000, 2), tpot_target_s=[1.5, 60, np.inf])
    batches = serve(baselines.get("slai", tpot_target_s=100), work, token_budget=512)
    assert [set(b) for b in batches[1:6]] == [{"A", "C"}] * 4 + [{"C"}]
    assert batches[1] == {"A": 1, "C": 511}


def test_p_pas_lowers_the_budget_under_pressure() -> None:
    work = requests(("A", 0, 10, 50), ("B", 1, 9000, 2), ("C", 1, 9000, 2))
    sizes = [sum(b.values()) for b in serve(baselines.get("p-pas", budget_low=1000), work)]
    assert sizes[:2] == [10, 1000]
    alone = sizes.index(1000, 9) + 1  # B is done: one prefill is left
    assert max(sizes[alone:]) > 5000


def test_who_never_swaps_says_so() -> None:
    with pytest.raises(InputError, match=r"scheduler sjf does not swap; choose preemption='recompute'"):
        serve(baselines.get("sjf"), FOUR, preemption="swap")


def test_random_feasible_is_the_seed_s() -> None:
    work = requests(*((chr(65 + i), 0, 30, 20) for i in range(12)))
    config = EngineConfig(kv_blocks=200, block_size=1)
    runs = [simulate(work, baselines.get("random-feasible"), UNIT, config, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0].finish_s, runs[1].finish_s)
    assert not np.array_equal(runs[0].finish_s, runs[2].finish_s)
    assert runs[0].preemptions_total == 0


# ------------------------------------------------------------------------------ who is better


def load(seed: int, n: int, rate: float) -> Requests:
    g = np.random.default_rng(seed)
    prompt = np.clip(g.lognormal(5.2, 1.0, n), 4, 3000).astype(int)
    output = np.clip(g.lognormal(4.9, 1.0, n), 2, 1500).astype(int)
    return Requests.of(g.exponential(1 / rate, n).cumsum(), prompt, output)


def latencies(name: str, kv: int, rate: float) -> np.ndarray:
    """Mean latency (s) by seed."""
    config = EngineConfig(kv_blocks=kv // 16)
    loads = [load(seed, 400, rate) for seed in range(4)]
    runs = [simulate(work, baselines.get(name), "a100-llama3-8b", config) for work in loads]
    return np.array([(run.finish_s - work.arrival_s).mean() for work, run in zip(loads, runs, strict=True)])


@pytest.mark.parametrize(("kv", "rate"), [(8000, 12.0), (30000, 25.0)])
def test_least_area_is_the_best_of_those_that_know_lengths(kv: int, rate: float) -> None:
    best = latencies("area-backfill", kv, rate)
    others = "fcfs-backfill sjf sjf-prompt sjf-backfill srpt trail mc-sf mc-benchmark sorted-f a-min"
    for name in others.split():
        assert best.mean() < latencies(name, kv, rate).mean(), name
    assert best.mean() < 1.02 * latencies("svf", kv, rate).mean()


def test_shortest_first_beats_first_come_in_overload() -> None:
    assert (latencies("sjf", 30000, 25.0) < 0.8 * latencies("vllm-v1", 30000, 25.0)).all()
    assert (latencies("random-feasible", 30000, 25.0) > latencies("sjf", 30000, 25.0)).all()


# ------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", baselines.names())
def test_named(name: str) -> None:
    made = baselines.get(name)
    assert made.name == name
    assert made.summary.endswith((".", ")"))
    assert made.source


def tight(seed: int) -> Requests:
    """60 requests, about three at a time in 700 tokens of KV cache; wrong predictions, classes, targets."""
    g = np.random.default_rng(seed)
    n = 60
    output = np.clip(g.lognormal(3, 1.2, n), 1, 200).astype(int)
    return Requests.of(
        g.exponential(0.05, n).cumsum(),
        g.integers(1, 300, n),
        output,
        declared_tokens=2 * output,
        predicted_tokens=np.maximum(1, output * np.exp(g.normal(0, 0.8, n))),
        priority=g.integers(0, 3, n),
        client=g.integers(0, 3, n),
        class_id=g.integers(0, 3, n),
        ttft_target_s=g.choice([0.5, 2, np.inf], n),
        tpot_target_s=g.choice([0.05, np.inf], n),
    )


@pytest.mark.parametrize("name", baselines.names())
def test_all_is_served_exactly(name: str) -> None:
    for seed, size in ((0, 1), (1, 16)):
        work = tight(seed)
        config = EngineConfig(kv_blocks=700 // size, block_size=size, max_model_len=688)
        result = simulate(work, baselines.get(name), LINEAR, config, max_iterations=100_000)
        again = simulate(work, baselines.get(name), LINEAR, config, skip="none")
        assert np.isfinite(result.finish_s).all()
        np.testing.assert_array_equal(result.generated_tokens, work.output_tokens)
        np.testing.assert_array_equal(result.finish_s, again.finish_s)


@pytest.mark.parametrize("name", ["area-backfill", "srpt", "sorted-f", "wait", "las", "random-feasible"])
def test_a_long_queue_is_no_slower(name: str) -> None:
    """An iteration with 50,000 waiting requests takes little longer than one with 1,000."""

    def seconds(n: int) -> float:
        g = np.random.default_rng(0)
        work = Requests.of(np.zeros(n), g.integers(50, 400, n), g.integers(20, 400, n))
        config = EngineConfig(kv_blocks=2000)
        took = []
        for _ in range(3):
            runs = []
            for iterations in (1, 201):
                start = time.perf_counter()
                simulate(work, baselines.get(name), LINEAR, config, max_iterations=iterations)
                runs.append(time.perf_counter() - start)
            took.append(runs[1] - runs[0])
        return float(np.median(took)) / 200

    seconds(1000)
    assert seconds(50_000) < 10 * max(seconds(1000), 20e-6)
