"""The schedulers of real systems with routines of their own: cases by hand, and twins in plain Python."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import baselines
from baselines.recorded import check
from llmsched_env import EngineConfig, Requests, simulate
from llmsched_env.errors import InputError
from llmsched_env.profiles import Profile
from llmsched_env.simulation import replay

UNIT = Profile(
    name="unit", form="staircase", params={"c": 1.0, "a": 0.0, "b0": 1.0}
)  # an iteration is a second
NAMES = (
    "simple-chunking",
    "fastserve",
    "fastserve-mlfq",
    "sglang",
    "sglang-mixed",
    "trtllm-no-evict",
    "trtllm-max-utilization",
    "trtllm-static-batch",
    "tgi",
    "tgi-nonchunked",
    "lightllm",
    "lightllm-past-future",
    "vtc",
    "vtc-lcf",
    "ltr",
    "ltr-srtf",
)


def decide(
    name: str, requests: Requests, engine: EngineConfig, profile: Profile = UNIT, **settings: Any
) -> Any:
    """What the scheduler decides, iteration by iteration: (tokens by request, preempted requests)."""
    result = simulate(
        requests, baselines.get(name, **settings), profile, engine, record="schedule", skip="none"
    )
    assert (result.generated_tokens == requests.output_tokens).all()
    return [(dict(d.granted), d.preempted) for d in result.schedule]


def tight(seed: int, n: int = 60) -> tuple[Requests, EngineConfig]:
    """A random workload on an engine that holds little more than the largest request."""
    rng = np.random.default_rng(seed)
    output = rng.integers(1, 60, n)
    declared = output + rng.integers(0, 30, n) * rng.integers(0, 2, n)
    prompt = rng.integers(1, 120, n)
    size = int(rng.choice([1, 4, 16]))
    most = int((prompt + declared).max())
    requests = Requests.of(
        np.sort(rng.uniform(0, 100, n)),
        prompt,
        output,
        declared_tokens=declared,
        predicted_tokens=np.maximum(1.0, output * rng.lognormal(0, 0.5, n)),
        client=rng.integers(0, 5, n),
    )
    return requests, EngineConfig(
        block_size=size,
        kv_blocks=int(-(-most // size) * rng.uniform(1.1, 3.0)) + 2,
        token_budget=int(rng.choice([256, 512])),
        max_num_seqs=int(rng.choice([3, 16, 64])),
        cpu_blocks=[None, 20, 0][seed % 3],
    )


@pytest.mark.parametrize("name", NAMES)
def test_tight_memory_neither_blocks_nor_loses_tokens(name: str) -> None:
    for seed in range(12):
        requests, engine = tight(seed)
        for asynchronous in (False, True):
            engine = engine.replace(async_scheduling=asynchronous)
            result = simulate(requests, baselines.get(name), UNIT, engine, seed=seed)
            assert (result.generated_tokens == requests.output_tokens).all()
            assert np.isfinite(result.finish_s).all()


@pytest.mark.parametrize("name", NAMES)
def test_who_can_never_fit_waits_and_harms_nobody_before(name: str) -> None:
    requests = Requests.of([0, 1, 2], [10, 60, 10], [5, 60, 5])
    engine = EngineConfig(kv_blocks=100, block_size=1, token_budget=128, max_model_len=1000, max_num_seqs=8)
    result = simulate(requests, baselines.get(name), UNIT, engine, oversized="keep", horizon_s=1000)
    assert np.isfinite(result.finish_s[0]) and np.isnan(result.finish_s[1])
    assert result.iterations_total < 1000  # it does not run again and again


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_gives_the_same_times(name: str) -> None:
    requests, engine = tight(3)
    scheduler = baselines.get(name)
    profile = Profile(
        name="linear", form="linear", params={"c0": 0.01, "c1": 1e-4, "c2": 1e-3, "c3": 1e-6, "c4": 1e-8}
    )
    result = simulate(requests, scheduler, profile, engine, record="schedule")
    again = replay(result.schedule, requests, profile, engine, scheduler=scheduler)
    assert np.array_equal(again.finish_s, result.finish_s)
    assert np.array_equal(again.first_token_s, result.first_token_s)


@pytest.mark.parametrize("name", NAMES)
def test_decodes_taken_in_one_go_change_nothing(name: str) -> None:
    requests, engine = tight(4)
    requests = requests.replace(arrival_s=np.sort(np.random.default_rng(0).uniform(0, 3000, len(requests))))
    exact = simulate(requests, baselines.get(name), UNIT, engine, skip="exact")
    none = simulate(requests, baselines.get(name), UNIT, engine, skip="none")
    assert np.array_equal(exact.finish_s, none.finish_s)
    assert exact.iterations_total == none.iterations_total


@pytest.mark.parametrize("name", NAMES)
def test_a_long_queue_costs_nothing(name: str) -> None:
    """30,000 requests at once: iterations may cost by who runs, not by who waits."""
    n = 30_000
    rng = np.random.default_rng(1)
    requests = Requests.of(
        np.zeros(n), rng.integers(1, 30, n), rng.integers(1, 4, n), client=rng.integers(0, 3000, n)
    )
    engine = EngineConfig(kv_blocks=2000, max_num_seqs=32, token_budget=512)
    start = time.process_time()
    result = simulate(requests, baselines.get(name), UNIT, engine)
    assert (result.generated_tokens == requests.output_tokens).all()
    assert (
        time.process_time() - start < 10
    )  # a few tenths of a second; minutes if every iteration saw all who wait


def test_settings_of_a_routine_are_changed_by_name() -> None:
    assert baselines.get("fastserve", quantum_s="0.02").settings.x.quantum_s == 0.02
    assert baselines.get("trtllm-no-evict", capacity="static-batch").settings.x.capacity == 2
    with pytest.raises(InputError, match="quantum_s"):
        baselines.get("fastserve", quantum=1)
    with pytest.raises(InputError, match="ratio > 1"):
        baselines.get("fastserve", ratio=0.5)


def test_every_system_says_what_it_is_and_where_from() -> None:
    for name in NAMES:
        made = baselines.get(name)
        assert made.summary and made.source


# -------------------------------------------------------------------------------------------- simple chunking


def _simple_chunking_case(seed: int) -> dict[str, Any]:
    """A case as recorded from Sarathi-Serve, by its rules in plain Python."""
    rng = np.random.default_rng(seed)
    n, size, chunk, seats = 25, 16, int(rng.choice([32, 64, 100])), int(rng.choice([3, 8]))
    requests = [
        {
            "id": f"r{i}",
            "arrival_iter": int(a),
            "prompt_len": int(rng.integers(1, 150)),
            "output_len": int(rng.integers(1, 40)),
        }
        for i, a in enumerate(np.sort(rng.integers(0, 60, n)))
    ]
    blocks = 14 + int(rng.integers(0, 10))
    watermark = int(0.01 * blocks)

    def need(tokens: int) -> int:
        return -(-tokens // size)

    free, turn = blocks, "prefill"
    waiting: deque[Any] = deque()
    running: list[Any] = []
    iterations = []
    for i in range(100_000):
        for r in requests:
            if r["arrival_iter"] == i:
                waiting.append({**r, "done": 0, "g": 0, "rank": int(r["id"][1:]), "target": r["prompt_len"]})
        before = free
        running.sort(key=lambda q: q["rank"])
        scheduled, preempted = [], []
        used = 0
        if turn == "prefill":
            for q in running:
                c = min(q["target"] - q["done"], chunk - used)
                if q["done"] < q["target"] and c > 0:
                    scheduled.append((q, c))
                    used += c
            while not any(q["done"] > 0 for q, _ in scheduled) and waiting:
                q = waiting[0]
                total = q["prompt_len"] + q["g"]
                c = min(total, chunk - used)
                if free - need(total) < watermark or len(running) >= seats or c <= 0:
                    break
                waiting.popleft()
                q["target"], q["blocks"] = total, need(total)
                free -= q["blocks"]
                running.append(q)
                scheduled.append((q, c))
                used += c
        if scheduled:
            turn = "decode"
        else:
            k = 0
            while k < len(running):
                q = running[k]
                if q["done"] < q["target"]:
                    k += 1
                    continue
                while free < 1:
                    victim = running.pop()
                    free += victim["blocks"]
                    victim["done"] = 0
                    waiting.appendleft(victim)
                    preempted.append(victim["id"])
                    if victim is q:
                        break
                else:
                    more = need(q["prompt_len"] + q["g"]) - q["blocks"]
                    free -= more
                    q["blocks"] += more
                    scheduled.append((q, 1))
                    k += 1
            turn = "prefill"
        planned = free
        finished = []
        for q, c in scheduled:
            q["done"] += c
            if q["done"] >= q["prompt_len"] + q["g"]:
                q["g"] += 1
                if q["g"] == q["output_len"]:
                    finished.append(q["id"])
                    free += q["blocks"]
                    running.remove(q)
        iterations.append(
            {
                "iter": i,
                "scheduled": [[q["id"], c] for q, c in scheduled],
                "preempted": preempted,
                "finished": finished,
                "free_blocks_before": before,
                "free_blocks_after_schedule": planned,
                "free_blocks_after_update": free,
            }
        )
        if not running and not waiting and i >= 60:
            break
    return {
        "name": f"twin {seed}",
        "engine": "sarathi-serve",
        "usable_blocks": blocks,
        "watermark_blocks": watermark,
        "config": {
            "scheduler": "simple_chunking",
            "chunk_size": chunk,
            "block_size": size,
            "max_num_seqs": seats,
            "max_model_len": 1000,
            "num_gpu_blocks": blocks,
        },
        "requests": requests,
        "iterations": iterations,
    }


@pytest.mark.parametrize("seed", range(8))
def test_simple_chunking_decides_as_its_twin(tmp_path: Path, seed: int) -> None:
    case = _simple_chunking_case(seed)
    path = tmp_path / "case.json"
    path.write_text(json.dumps(case))
    assert check(path).difference == ""
    assert sum(len(i["preempted"]) for i in case["iterations"]) > 0 or seed not in (0, 1)


def test_simple_chunking_takes_turns() -> None:
    plans = decide(
        "simple-chunking", Requests.of([0, 0], [20, 5], [3, 3]), EngineConfig(kv_blocks=50, token_budget=10)
    )
    # A turn of the decodes without one takes no time; r1's chunk comes with the last of r0's.
    assert [p for p, _ in plans] == [{0: 10}, {0: 10}, {0: 1}, {1: 5}, {0: 1, 1: 1}, {1: 1}]


# -------------------------------------------------------------------------------------------------- FastServe


class _Queues:
    """FastServe's batches in plain Python, where memory is plenty."""

    def __init__(self, seconds: Any, skip_join: bool, batch: int, budget: int) -> None:
        self.levels: list[list[Any]] = [[] for _ in range(32)]
        self.seconds, self.skip_join, self.batch, self.budget = seconds, skip_join, batch, budget

    def join(self, r: Any) -> None:
        r["level"] = 0
        while self.skip_join and 0.01 * 2.0 ** r["level"] < self.seconds([(r["prompt"], 0)]):
            r["level"] += 1
        r["attained"] = 0.0
        self.levels[r["level"]].append(r)

    def form(self) -> list[Any]:
        members: list[Any] = []
        for level in self.levels:
            while level:
                r = level[0]
                prompts = sum(m["prompt"] for m in members if m["g"] == 0)
                own = r["prompt"] if r["g"] == 0 else 1
                if members and (prompts + own > self.budget or len(members) >= self.batch):
                    return members
                members.append(level.pop(0))
        return members

    def take_back(self, members: list[Any], spent: float) -> None:
        for r in members:
            if r["g"] == r["output"]:
                continue
            r["attained"] += spent
            if r["attained"] > 0.01 * 2.0 ** r["level"]:
                r["level"] += 1
                r["attained"] = 0.0
            self.levels[r["level"]].insert(0, r)

    def starvation(self, now: float) -> None:
        promoted = []
        for level in self.levels:
            promoted += [r for r in level if now - r["last"] >= 3.0]
            level[:] = [r for r in level if now - r["last"] < 3.0]
        for r in promoted:
            r["level"] = 0
            self.levels[0].insert(0, r)


@pytest.mark.parametrize("seed", range(6))
def test_fastserve_batches_as_its_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, skip_join = 80, seed % 2 == 0
    arrival = np.sort(rng.uniform(0, 2, n))
    prompt, output = rng.integers(1, 300, n), rng.integers(1, 120, n)
    params = {"c0": 0.002, "c1": 2e-4, "c2": 1e-4, "c3": 0.0, "c4": 0.0}
    profile = Profile(name="linear", form="linear", params=params)

    def seconds(parts: list[tuple[int, int]]) -> float:
        return 0.002 + 2e-4 * sum(p for p, _ in parts) + 1e-4 * sum(d for _, d in parts)

    plans = decide(
        "fastserve",
        Requests.of(arrival, prompt, output),
        EngineConfig(kv_blocks=10_000, block_size=16, token_budget=400),
        profile,
        max_batch_requests=4,
        skip_join=skip_join,
        starvation_period=100,
    )
    twin = _Queues(seconds, skip_join, 4, 400)
    rows = [
        {"id": i, "prompt": int(prompt[i]), "output": int(output[i]), "g": 0, "last": 0.0} for i in range(n)
    ]
    now, arrived, j = 0.0, 0, 0
    while j < len(plans):
        while arrived < n and arrival[arrived] <= now:
            twin.join(rows[arrived])
            arrived += 1
        members = twin.form()
        if not members:
            now = float(arrival[arrived])
            continue
        if (j + 1) % 100 == 0:
            twin.starvation(now)
        granted = {m["id"]: m["prompt"] if m["g"] == 0 else 1 for m in members}
        assert list(plans[j][0].items()) == list(granted.items()), j
        start = now
        prompts = [(m["prompt"], 0) if m["g"] == 0 else (0, 1) for m in members]
        now += seconds(prompts)
        for m in members:
            m["g"] += 1
            m["last"] = now
        twin.take_back(members, now - start)
        j += 1
    assert all(r["g"] == r["output"] for r in rows)


def test_fastserve_joins_at_the_level_of_the_prefill() -> None:
    profile = Profile(
        name="linear", form="linear", params={"c0": 0.0, "c1": 1e-3, "c2": 1e-3, "c3": 0.0, "c4": 0.0}
    )
    requests = Requests.of([0, 0, 0], [100, 15, 5], [1, 1, 1])
    engine = EngineConfig(kv_blocks=1000, block_size=16)
    joined = decide("fastserve", requests, engine, profile, max_batch_requests=1)
    assert [list(p) for p, _ in joined] == [[2], [1], [0]]  # 5 ms, 15 ms, 100 ms: levels 0, 1, 4
    plain = decide("fastserve-mlfq", requests, engine, profile, max_batch_requests=1)
    assert [list(p) for p, _ in plain] == [[0], [1], [2]]


def test_fastserve_swaps_out_the_lowest_level_and_brings_it_back() -> None:
    # Iterations of 1 s use up any low level. Request 0 has sunk when 1 arrives, which needs its blocks.
    requests = Requests.of([0, 3.5], [40, 40], [8, 2])
    engine = EngineConfig(kv_blocks=70, block_size=1)
    plans = decide("fastserve-mlfq", requests, engine, max_batch_requests=1)
    assert [list(p) for p, _ in plans] == [[0], [0], [0], [0], [1], [1], [0], [0], [0], [0]]
    assert [v for _, v in plans][4] == [0] and sum(len(v) for _, v in plans) == 1
    assert all(tokens in (1, 40) for p, _ in plans for tokens in p.values())  # nothing is computed twice


# ----------------------------------------------------------------------------------------------------- SGLang


class _SGLang:
    """SGLang in plain Python, memory in tokens."""

    def __init__(self, kv: int, chunk: int, seats: int, mixed: bool) -> None:
        self.kv, self.chunk, self.seats, self.mixed = kv, chunk, seats, mixed
        self.waiting: list[Any] = []
        self.running: list[Any] = []
        self.ratio, self.full = 0.7, False

    def plan(self) -> tuple[dict[int, int], list[int]]:
        """An iteration: tokens by request, and who is retracted."""
        self.granted: dict[int, int] = {}
        self.retracted: list[int] = []
        if self.mixed:
            self.decode()
            prefilled = self.prefill()
        else:
            prefilled = self.prefill()
            if not prefilled:
                self.decode()
        if not prefilled and not self.retracted:
            self.ratio = max(0.098, self.ratio - (0.7 - 0.098) / 600)
        return self.granted, self.retracted

    def run(self) -> None:
        for r in list(self.running):
            r["done"] += self.granted.get(r["id"], 0)
            if r["id"] in self.granted and r["done"] >= r["prompt"] + r["g"]:
                r["g"] += 1
                if r["g"] == r["output"]:
                    self.running.remove(r)
                    self.full = False

    def free(self) -> int:
        return self.kv - sum(r["done"] for r in self.running)

    def retract(self, r: Any) -> None:
        self.running.remove(r)
        r["done"] = 0
        self.waiting.append(r)
        self.retracted.append(r["id"])

    def decode(self) -> None:
        decodes = [r for r in self.running if r["done"] >= r["target"]]
        if len(decodes) > self.free():
            while len(decodes) > 1 and (not self.retracted or self.free() < 20 * len(decodes)):
                worst = min(reversed(decodes), key=lambda r: (r["g"], -r["prompt"]))
                decodes.remove(worst)
                self.retract(worst)
            for r in [r for r in reversed(self.running) if r["done"] < r["target"]]:
                if len(decodes) > self.free():
                    self.retract(r)
            used = sum(r["g"] for r in decodes) + 20 * len(decodes)
            self.ratio = min(1.0, used / sum(r["declared"] for r in decodes))
            self.full = False
        self.granted |= {r["id"]: 1 for r in decodes}

    def prefill(self) -> bool:
        decodes = len(self.granted)
        chunk, left, memory = self.chunk - decodes, 16384 - decodes, self.free() - decodes
        expected = 0.0
        for r in self.running:
            if r["done"] >= r["target"]:
                expected += self.ratio * _to_come(r)
        for r in self.running:
            if r["done"] < r["target"]:
                want = min(r["target"] - r["done"], chunk, memory)
                if want > 0:
                    self.granted[r["id"]] = want
                if r["done"] + want < r["target"]:
                    return want > 0
                chunk, left, memory = chunk - want, left - want, memory - want
                expected += _to_come(r)
        while self.waiting and not self.full and len(self.running) < self.seats and not self.retracted:
            r = self.waiting[0]
            total = r["prompt"] + r["g"]
            if self.running and total + _to_come(r) >= memory - expected:
                self.full = True
                break
            if (total > left and len(self.granted) > decodes) or chunk < 1:
                break
            want = min(total, chunk)
            self.waiting.pop(0)
            r["target"] = total
            self.running.append(r)
            self.granted[r["id"]] = want
            if want < total:
                break
            chunk, left, memory = chunk - want, left - want, memory - want
            expected += _to_come(r)
        return len(self.granted) > decodes


def _to_come(r: Any) -> int:
    return int(min(r["declared"] - r["g"], 4096))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["sglang", "sglang-mixed"])
def test_sglang_decides_as_its_twin(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 60
    arrival = np.sort(rng.uniform(0, 150, n))
    prompt, output = rng.integers(1, 100, n), rng.integers(1, 150, n)
    declared = output + rng.integers(0, 20, n)
    kv, chunk, seats = 600, int(rng.choice([40, 128])), int(rng.choice([6, 30]))
    plans = decide(
        name,
        Requests.of(arrival, prompt, output, declared_tokens=declared),
        EngineConfig(kv_blocks=kv, block_size=1, token_budget=chunk, max_num_seqs=seats),
    )
    rows = [
        {
            "id": i,
            "arrival": float(arrival[i]),
            "prompt": int(prompt[i]),
            "output": int(output[i]),
            "declared": int(declared[i]),
            "g": 0,
            "done": 0,
            "target": 0,
        }
        for i in range(n)
    ]
    twin = _SGLang(kv, chunk, seats, name == "sglang-mixed")
    now, arrived, retractions = 0.0, 0, 0
    for j, (granted, victims) in enumerate(plans):
        if not twin.running and not twin.waiting and now < rows[arrived]["arrival"]:
            now, twin.ratio = rows[arrived]["arrival"], 0.7
        while arrived < n and rows[arrived]["arrival"] <= now:
            twin.waiting.append(rows[arrived])
            arrived += 1
        assert (granted, victims) == twin.plan(), j
        twin.run()
        now += 1.0
        retractions += len(victims)
    assert retractions > 0 or seed > 3


def test_sglang_retracts_who_has_least_and_queues_it_last() -> None:
    # Admitted for 70 % of their answers, four outgrow the cache. Request 3 began last, request 4 waits.
    requests = Requests.of(
        [0, 1, 2, 3, 4], [20, 20, 20, 20, 20], [300, 300, 300, 300, 5], declared_tokens=[300] * 5
    )
    plans = decide("sglang", requests, EngineConfig(kv_blocks=1100, block_size=1))
    victims = [v for _, v in plans if v]
    assert victims[0] == [3]  # fewest tokens
    first = next(j for j, (_, v) in enumerate(plans) if v)
    admissions = [r for p, _ in plans[first:] for r, tokens in p.items() if tokens > 1]
    assert admissions[:2] == [4, 3]  # who waited goes before who was retracted


# ----------------------------------------------------------------------------------------------- TensorRT-LLM


def test_trtllm_no_evict_starts_only_what_can_finish() -> None:
    # 2 * (10 + 20) fit into 64 tokens, a third does not, though it would for now.
    requests = Requests.of([0, 0, 0], [10, 10, 10], [5, 8, 5], declared_tokens=[20, 20, 20])
    plans = decide("trtllm-no-evict", requests, EngineConfig(kv_blocks=64, block_size=1))
    assert plans[0][0] == {0: 10, 1: 10}
    third = next(j for j, (p, _) in enumerate(plans) if 2 in p)
    assert third == 5  # when request 0 is done
    assert not any(v for _, v in plans)


def test_trtllm_micro_batch_stops_at_the_first_prompt_that_exceeds_the_tokens() -> None:
    requests = Requests.of([0, 0, 0], [60, 60, 10], [3, 3, 3])
    plans = decide("trtllm-no-evict", requests, EngineConfig(kv_blocks=1000, block_size=1, token_budget=100))
    assert [p for p, _ in plans[:3]] == [{0: 60}, {0: 1, 1: 60, 2: 10}, {0: 1, 1: 1, 2: 1}]


def test_trtllm_cuts_chunks_to_multiples_of_the_unit() -> None:
    requests = Requests.of([0, 0, 0], [20, 100, 5], [3, 1, 1])
    engine = EngineConfig(kv_blocks=1000, block_size=1, token_budget=60)
    plans = decide("trtllm-no-evict", requests, engine, chunked=True)
    # 40 are left beside request 0: one unit of 32; the 5 of request 2 still fit behind.
    assert [p for p, _ in plans[:3]] == [{0: 20, 1: 32, 2: 5}, {0: 1, 1: 32}, {0: 1, 1: 36}]


def test_trtllm_max_utilization_pauses_the_last_started_which_keeps_its_place() -> None:
    requests = Requests.of([0, 1, 2], [10, 10, 1], [30, 30, 1])
    plans = decide("trtllm-max-utilization", requests, EngineConfig(kv_blocks=41, block_size=1))
    victims = [(j, v) for j, (_, v) in enumerate(plans) if v]
    assert victims[0][1] == [1]
    after = plans[victims[0][0] + 1][0]
    assert 1 not in after and 0 in after  # it waits until its prompt and answer fit again
    back = next(p for p, _ in plans[victims[0][0] + 1 :] if 1 in p)
    assert back[1] > 10  # what it has said is part of its prompt


def test_trtllm_static_batch_waits_for_the_whole_batch() -> None:
    requests = Requests.of([0, 0, 1], [10, 10, 10], [3, 9, 2])
    plans = decide("trtllm-static-batch", requests, EngineConfig(kv_blocks=1000, block_size=1))
    assert next(j for j, (p, _) in enumerate(plans) if 2 in p) == 9


# -------------------------------------------------------------------------------------------------------- TGI


def test_tgi_reserves_the_declared_maximum_and_cuts_the_last_prompt() -> None:
    requests = Requests.of([0, 0, 0], [10, 10, 10], [5, 6, 5], declared_tokens=[21, 21, 21])
    plans = decide("tgi", requests, EngineConfig(kv_blocks=60, block_size=1, token_budget=15))
    assert [p for p, _ in plans[:3]] == [
        {0: 10, 1: 5},
        {0: 1, 1: 5},
        {0: 1, 1: 1},
    ]  # 10 + 21 - 1 each: a third has no room
    assert next(j for j, (p, _) in enumerate(plans) if 2 in p) == 5


def test_tgi_interrupts_decodes_when_enough_wait_or_for_long() -> None:
    # 10 run; 2 wait: less than floor(0.3 * 10) = 3, until 20 decodes have gone by.
    requests = Requests.of([0] * 10 + [2.5] * 2, [5] * 12, [40] * 12)
    plans = decide("tgi-nonchunked", requests, EngineConfig(kv_blocks=2000, block_size=1))
    prefills = [j for j, (p, _) in enumerate(plans) if max(p.values()) > 1]
    assert prefills == [0, 21] and len(plans[21][0]) == 2
    three = Requests.of([0] * 10 + [2.5] * 3, [5] * 13, [40] * 13)
    plans = decide("tgi-nonchunked", three, EngineConfig(kv_blocks=2000, block_size=1))
    assert [j for j, (p, _) in enumerate(plans) if max(p.values()) > 1] == [0, 3]


# ---------------------------------------------------------------------------------------------- LightLLM, VTC


def peak(pairs: list[tuple[float, float]]) -> float:
    """The most tokens that requests (held, left) hold at once, in the words of the paper."""
    order = sorted(pairs, key=lambda p: -p[1])
    return max(left * (i + 1) + sum(held for held, _ in order[: i + 1]) for i, (_, left) in enumerate(order))


@pytest.mark.parametrize("seed", range(5))
def test_lightllm_admits_while_the_peak_fits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, kv = 40, 1500
    prompt, output = rng.integers(1, 200, n), rng.integers(1, 80, n)
    declared = output + rng.integers(0, 80, n)
    requests = Requests.of(np.zeros(n), prompt, output, declared_tokens=declared)
    plans = decide("lightllm", requests, EngineConfig(kv_blocks=kv, block_size=1))
    assert not any(v for _, v in plans)  # the safe schedule never pauses

    def pair(i: int, g: int, prefill: bool) -> tuple[float, float]:
        return prompt[i] + g + 1, declared[i] - g - 1 + 6 + (7 if prefill else 0)

    generated = np.zeros(n, int)
    running: list[int] = []
    head, decoded = 0, False
    for granted, _ in plans:
        new = [i for i in granted if generated[i] == 0]
        if decoded or not running:  # admissions are considered
            pairs = [pair(i, generated[i], False) for i in running]
            expected = []
            while head < n:
                fits = peak([*pairs, pair(head, 0, True)]) < kv
                if pairs and not fits:
                    break
                pairs.append(pair(head, 0, True))
                expected.append(head)
                head += 1
            assert new == expected
        decoded = not new
        for i in granted:
            generated[i] += 1
        running = [i for i in [*running, *new] if generated[i] < output[i]]


def test_lightllm_decodes_between_prefill_passes() -> None:
    # Chunks of 10: request 1 gets one when it is admitted, then one after every 6 decodes.
    requests = Requests.of([0, 1], [5, 25], [30, 2])
    plans = decide("lightllm", requests, EngineConfig(kv_blocks=500, block_size=1), chunk=10)
    chunks = [(j, p[1]) for j, (p, _) in enumerate(plans) if 1 in p]
    assert chunks[:3] == [(2, 10), (9, 10), (16, 5)]
    assert plans[1][0] == {0: 1}


def test_past_future_learns_lengths() -> None:
    # All answers have 10 tokens and 1,000 declared. At first they are taken for 1,000 long, later for 10.
    n = 400
    requests = Requests.of(np.zeros(n), np.full(n, 10), np.full(n, 10), declared_tokens=1000)
    engine = EngineConfig(kv_blocks=4000, block_size=1)
    batches = [len(p) for p, _ in decide("lightllm-past-future", requests, engine)]
    assert max(batches[:20]) <= 4 and max(batches) > 30
    declared = [len(p) for p, _ in decide("lightllm", requests, engine)]
    assert max(declared) <= 4
    pauses = simulate(requests, baselines.get("lightllm-past-future"), UNIT, engine).preemptions_total
    assert pauses < 40


def test_vtc_serves_the_client_served_least() -> None:
    # One at a time. Client 0 sends three, client 1 two: they alternate, the heavier prompt counts.
    requests = Requests.of([0] * 5, [10, 10, 10, 50, 5], [2] * 5, client=[0, 0, 0, 1, 1])
    plans = decide("vtc", requests, EngineConfig(kv_blocks=500, block_size=1, max_num_seqs=1))
    served = [next(iter(p)) for p, _ in plans if max(p.values()) > 1]
    # Counters: 0 pays 10 + 2 each (the first token of an answer comes with its prompt), 1 pays 50 + 2.
    assert served == [0, 3, 1, 2, 4]


@pytest.mark.parametrize(("name", "order"), [("vtc", [0, 1, 3, 2, 4]), ("vtc-lcf", [0, 1, 3, 4, 2])])
def test_vtc_lifts_a_client_who_was_idle(name: str, order: list[int]) -> None:
    # Client 1 comes late. Lifted to client 0's counter it gets its turn, and no more.
    requests = Requests.of([0, 0, 0, 4.5, 4.5], [10] * 5, [3] * 5, client=[0, 0, 0, 1, 1])
    plans = decide(name, requests, EngineConfig(kv_blocks=500, block_size=1, max_num_seqs=1))
    served = [next(iter(p)) for p, _ in plans if max(p.values()) > 1]
    assert served == order


def test_vtc_stops_at_the_first_that_does_not_fit() -> None:
    # The least client's request does not fit beside the running one; the other's would, and is not tried.
    requests = Requests.of([0, 1, 1], [50, 60, 5], [30, 5, 5], client=[0, 1, 2])
    plans = decide("vtc", requests, EngineConfig(kv_blocks=100, block_size=1))
    assert [sorted(p) for p, _ in plans if max(p.values()) > 1] == [[0], [1, 2]]


# -------------------------------------------------------------------------------------------------------- LTR


def test_ltr_swaps_out_the_longest_for_the_shortest() -> None:
    requests = Requests.of([0, 2.5], [40, 40], [20, 4])
    plans = decide("ltr", requests, EngineConfig(kv_blocks=70, block_size=1))
    assert [v for _, v in plans][3] == [0]
    assert [sorted(p) for p, _ in plans] == [[0]] * 3 + [[1]] * 4 + [[0]] * 17
    assert sum(tokens for p, _ in plans for tokens in p.values()) == 40 + 19 + 40 + 3


def test_ltr_puts_the_starving_first_for_a_while() -> None:
    # Short requests keep coming, one at a time; the long one is due after 20 idle iterations, for 5.
    n = 30
    requests = Requests.of([0.0, *(2.0 * np.arange(n))], [5] * (n + 1), [30] + [2] * n)
    plans = decide(
        "ltr", requests, EngineConfig(kv_blocks=500, block_size=1, max_num_seqs=1), starvation=20, period=5
    )
    assert [j for j, (p, _) in enumerate(plans) if 0 in p][:6] == [20, 21, 22, 23, 24, 45]


def test_ltr_srtf_lets_finish_who_is_nearly_done() -> None:
    # Predicted 20 and 10: after 15 tokens the first has less left.
    requests = Requests.of([0, 14.5], [5, 5], [20, 10])
    engine = EngineConfig(kv_blocks=500, block_size=1, max_num_seqs=1)
    assert next(j for j, (p, _) in enumerate(decide("ltr", requests, engine)) if 1 in p) == 15
    assert next(j for j, (p, _) in enumerate(decide("ltr-srtf", requests, engine)) if 1 in p) == 20
