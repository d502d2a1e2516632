"""The checker of work conservation: against plain definitions, the engine itself, and cases by hand."""

from __future__ import annotations

import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import baselines
from agents.cli import main
from baselines.conserving import RULES, check, observe
from llmsched_env import EngineConfig, InputError, Requests, Result, Scheduler, simulate, workloads
from llmsched_env.core.run import EVICTED, SWAPPED_IN, SWAPPED_OUT
from llmsched_env.profiles import Profile
from llmsched_env.scheduling.own import can_grant, evict, first, following, grant

UNIT = Profile("unit", "staircase", {"c": 1.0, "a": 0.0, "b0": 1.0})
DAI = "a100-codellama-34b"


def run(
    name: str, rows: list[tuple[float, int, int]], engine: dict[str, Any], k: int | None = None
) -> tuple[Any, Result]:
    """A report on requests (arrival, prompt, output) that a named scheduler serves."""
    work = Requests.of(*zip(*rows, strict=True), names=[chr(65 + i) for i in range(len(rows))])
    config = EngineConfig(**{"kv_blocks": 10_000, "block_size": 1, "token_budget": 8} | engine)
    result = simulate(work, baselines.get(name), UNIT, config, record="schedule")
    return check(result, k=k), result


# ------------------------------------------------------------------------------ by hand


def test_first_breach_of_faster_transformer() -> None:
    """While A decodes, B's prompt waits: 1 token of the 5 that could have filled the batch."""
    report, _ = run("dai-faster-transformer", [(0, 2, 3), (0.5, 4, 1)], {"token_budget": 4})
    found = report.breaches["work-conserving"]
    assert found is not None and not report.work_conserving
    assert (found.iteration, found.start_s, found.demand, found.due, found.tokens) == (1, 1.0, 5, 4, 1)
    assert (found.plan, found.preempted, found.waiting) == ((("A", 1),), (), 1)
    assert str(found) == (
        "work-conserving fails in iteration 1 at 1 s: of 5 tokens in demand the batch has 1, not 4; "
        "1 requests got none; plan: A: 1"
    )
    assert report.broken == {"work-conserving": 2, "greedy": 2, "greedy-kv": 2, "k-fcfs": 0}


def test_too_little_demand_is_no_breach_of_the_papers_rule() -> None:
    """Under vLLM's rule A waits for B's prompt: a breach of greedy only, for 3 tokens fill nothing."""
    report, _ = run("dai-vllm", [(0, 2, 3), (0.5, 2, 1)], {"token_budget": 4})
    assert report.work_conserving
    found = report.breaches["greedy"]
    assert found is not None
    assert (found.iteration, found.demand, found.due, found.tokens) == (1, 3, 3, 2)


@pytest.mark.parametrize("name", ["dai-sarathi", "dai-orca", "sarathi", "sjf", "srpt", "area-backfill"])
def test_work_conserving_ones(name: str) -> None:
    work = workloads.get("fixed-129-113", num_requests=900, rate=16.0)
    report = observe(baselines.get(name), work, DAI, EngineConfig(token_budget=512, max_num_seqs=4096))
    assert report.broken["work-conserving"] == report.broken["greedy"] == report.broken["greedy-kv"] == 0
    assert report.full > 0.2 * report.iterations


def test_the_witness_of_faster_transformer() -> None:
    """Two requests of (290, 990), 467.5 ms apart: demand 291 of 128 tokens, and a batch of one.

    With whole prompts a budget of 128 never takes one of 290; with 512 the batch is the same.
    """
    work = Requests.of([0, 0.4675], [290, 290], [991, 991])
    report = observe(baselines.get("dai-faster-transformer"), work, DAI, EngineConfig(token_budget=512))
    found = report.breaches["greedy"]
    assert found is not None
    assert (found.demand, found.tokens, found.plan) == (291, 1, (("0", 1),))
    assert report.work_conserving  # 291 do not fill 512


def test_memory_is_an_excuse_under_the_third_rule_only() -> None:
    """A holds all three blocks of the cache: B's prompt of 9 could fill the batch, but has no room."""
    engine = {"kv_blocks": 3, "block_size": 4, "token_budget": 9}
    report, _ = run("vllm-v1", [(0, 9, 3), (0.5, 9, 1)], engine)
    found = report.breaches["work-conserving"]
    assert found is not None and found.demand == 10 and found.tokens == 1
    assert report.breaches["greedy-kv"] is None
    # Blocks that are reserved but hold nothing are room.
    reserved, _ = run("dai-orca", [(0, 4, 9), (0.5, 6, 1)], engine | {"token_budget": 6})
    found = reserved.breaches["greedy-kv"]
    assert found is not None
    assert (found.plan, found.tokens, found.due) == ((("A", 1),), 1, 5)  # one more block of 4 tokens
    # Slots are an excuse too.
    slots, _ = run("dai-orca", [(0, 4, 9), (0.5, 6, 1)], {"max_num_seqs": 1, "token_budget": 6})
    assert slots.breaches["greedy-kv"] is None and not slots.work_conserving


def test_k_fcfs() -> None:
    """Shortest first: C goes before B, the older, and A and B are the 2 oldest."""
    rows = [(0.0, 4, 3), (0.5, 20, 2), (0.6, 3, 2)]
    for k, broken in ((1, 0), (2, 1), (3, 0)):
        report, _ = run("sjf-prompt", rows, {"token_budget": 4}, k)
        # With K = 1, A alone has all it wants; with 3 nobody is another.
        assert (report.broken["k-fcfs"] > 0) == bool(broken), k
        assert report.k_needed == 3
    report, _ = run("sjf-prompt", rows, {"token_budget": 4}, 2)
    found = report.breaches["k-fcfs"]
    assert found is not None and found.iteration == 1
    assert (found.due, found.tokens, dict(found.plan)) == (21, 1, {"A": 1, "C": 3})
    in_order, _ = run("dai-sarathi", rows, {"token_budget": 4})
    assert in_order.k_needed == 1 and in_order.broken["k-fcfs"] == 0


# ------------------------------------------------------------------------------ against definitions


def by_definition(work: Requests, result: Result, k: int) -> tuple[dict[str, list[int]], int]:
    """The iterations that break each rule, written as the definitions read."""
    engine, schedule = result.engine, result.schedule
    assert schedule is not None and engine.token_budget and engine.max_num_seqs and engine.kv_blocks
    n = len(work)
    prompt, output = work.prompt_tokens.tolist(), work.output_tokens.tolist()
    computed, generated, resident = [0] * n, [0] * n, [False] * n
    broken: dict[str, list[int]] = {rule: [] for rule in RULES}
    valid = set(range(1, n + 1))
    for j, decisions in enumerate(schedule):
        begin = schedule.ends[j - 1] if j else 0
        present = [r for r in range(n) if work.arrival_s[r] <= decisions.start_s and generated[r] < output[r]]
        wants = {r: prompt[r] + generated[r] - computed[r] for r in present}
        gets = dict.fromkeys(present, 0) | dict(decisions.granted)
        batch, demand = sum(gets.values()), sum(wants.values())
        if demand >= engine.token_budget and batch < engine.token_budget:
            broken["work-conserving"].append(j)
        if batch < min(demand, engine.token_budget):
            broken["greedy"].append(j)
        for some in range(1, n + 1):
            old = present[:some]
            if any(gets[r] for r in present[some:]) and any(gets[r] < wants[r] for r in old):
                valid.discard(some)
                if some == k:
                    broken["k-fcfs"].append(j)
        entries = list(
            zip(
                schedule.requests[begin : schedule.ends[j]].tolist(),
                schedule.tokens[begin : schedule.ends[j]].tolist(),
                strict=True,
            )
        )
        swapped = [r for r in present if not resident[r] and computed[r] > 0]
        for r, t in entries:
            resident[r] = t > 0 or t == SWAPPED_IN
            if t == EVICTED:
                computed[r] = 0
            if t == SWAPPED_OUT:
                swapped.append(r)
        held = {r: -(-(computed[r] + gets[r]) // engine.block_size) for r in present if resident[r]}
        free, slots = engine.kv_blocks - sum(held.values()), engine.max_num_seqs - len(held)
        for r in present:
            if batch >= engine.token_budget or gets[r] >= wants[r] or r in decisions.preempted:
                continue
            if resident[r]:
                room = (computed[r] + gets[r]) % engine.block_size != 0 or free > 0
            else:
                room = r not in swapped and free > 0 and slots > 0
            if room:
                broken["greedy-kv"].append(j)
                break
        for r, t in entries:
            if t > 0:
                computed[r] += t
                if computed[r] == prompt[r] + generated[r]:
                    generated[r] += 1
                    resident[r] = resident[r] and generated[r] < output[r]
    largest = max(set(range(1, n + 1)) - valid, default=0)
    return broken, largest + 1


@pytest.mark.parametrize(
    "name",
    ["random-feasible", "vllm-v1", "vllm-v0", "vllm-v0-swap", "orca", "srpt", "dai-vllm", "sglang", "las"],
)
def test_equals_the_definitions(name: str) -> None:
    for seed in range(4):
        g = np.random.default_rng(seed)
        n = 40
        work = Requests.of(
            g.exponential(0.02, n).cumsum(), g.integers(1, 120, n), g.integers(1, 60, n), client=0
        )
        engine = EngineConfig(kv_blocks=40, block_size=8, max_model_len=320, token_budget=200, max_num_seqs=9)
        result = simulate(work, baselines.get(name), "a100-llama3-8b", engine, record="schedule")
        for k in (1, 4, 40):
            expected, needed = by_definition(work, result, k)
            report = check(result, k=k)
            assert report.broken == {rule: len(some) for rule, some in expected.items()}
            assert report.k_needed == needed
            for rule, some in expected.items():
                found = report.breaches[rule]
                assert (None if found is None else found.iteration) == (some[0] if some else None)


def test_room_is_what_the_engine_would_grant() -> None:
    """Random plans, and after each the engine is asked whether anybody could be given one token more."""
    for seed in range(5):
        g = np.random.default_rng(seed)
        said: list[bool] = []

        def plan(e: Any, g: Any = g, said: list[bool] = said) -> None:
            given: dict[int, int] = {}
            everybody = [int(r) for r in e.running[: e.s.num_running]]
            r = first(e)
            while r >= 0:
                everybody.append(int(r))
                r = following(e, r)
            victims = set()
            for r in g.permutation(everybody).tolist():
                q = e.req[r]
                if (g.random() < 0.03 or e.s.free == 0) and q.status == 2 and not victims:
                    evict(e, r)
                    victims.add(r)
                    continue
                wants = int(q.prompt + q.generated - q.computed)
                tokens = min(int(g.integers(1, wants + 1)), int(e.s.budget))
                if (g.random() < 0.8 or not given) and tokens > 0 and can_grant(e, r, tokens):
                    grant(e, r, tokens)
                    given[r] = tokens
            for r in everybody:  # somebody has to be served
                if not given and r not in victims and can_grant(e, r, 1):
                    grant(e, r, 1)
                    given[r] = 1
            if not given and not victims:
                assert not everybody
                return
            more = False
            for r in everybody:
                q = e.req[r]
                if r in given:
                    left = q.prompt + q.generated - q.computed - given[r] > 0
                    room = (q.computed + given[r]) % e.s.block_size != 0 or e.s.free > 0
                    more = more or bool(e.s.budget > 0 and left and room)
                elif r not in victims and e.s.budget > 0:
                    more = more or bool(can_grant(e, r, 1))
            said.append(more)

        n = 30
        work = Requests.of(g.exponential(1.0, n).cumsum(), g.integers(1, 60, n), g.integers(1, 20, n))
        engine = EngineConfig(kv_blocks=24, block_size=4, max_model_len=96, token_budget=40, max_num_seqs=6)
        result = simulate(work, Scheduler("random", plan=plan), UNIT, engine, record="schedule")
        assert result.preemptions_total > 0 and 0 < sum(said) < len(said) == result.iterations_total
        assert check(result).broken["greedy-kv"] == sum(said)


def test_asynchronous_scheduling_is_not_blamed_for_what_it_cannot_see() -> None:
    work = workloads.get("azure-conv", num_requests=300, rate=6.0, arrivals="poisson")
    for name in ("vllm-v1", "vllm-v1-async"):
        report = observe(baselines.get(name), work, "a100-llama3-8b")
        assert report.broken["greedy-kv"] == 0, name


def test_a_policy_in_a_recorded_episode() -> None:
    env: Any = gym.make("llmsched/Decision-v0", scenario="toy", record=True).unwrapped
    expert = baselines.expert("vllm-v1")
    env.reset(seed=0)
    over = False
    while not over:
        *_, terminated, truncated, _ = env.step(expert(env))
        over = terminated or truncated
    report = check(env.result())
    again = by_definition(env.requests, env.result(), report.k)[0]
    assert report.broken == {rule: len(some) for rule, some in again.items()}
    env.close()


def test_check_refuses() -> None:
    work = Requests.of([0], [5], [5])
    with pytest.raises(InputError, match="no schedule to check"):
        check(simulate(work, baselines.get("orca")))
    with pytest.raises(InputError, match="must be at least 1"):
        observe(baselines.get("orca"), work, k=0)
    with pytest.raises(InputError, match="can serve none"):
        observe(
            baselines.get("dai-vllm"), Requests.of([0], [600], [5]), engine=EngineConfig(token_budget=512)
        )


# ------------------------------------------------------------------------------ command line


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["conserving", "--profile", DAI, "--workload", "fixed-129-113", "--token-budget", "512"]
    assert main([*base, "--scheduler", "dai-sarathi", "--num-requests", "200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["work_conserving"] and found["breaches"]["work-conserving"] is None
    assert main([*base, "--scheduler", "dai-sarathi,dai-vllm", "--num-requests", "200", "--k", "3"]) == 0
    text = capsys.readouterr().out
    assert "dai-vllm: work-conserving fails in iteration" in text
    assert "dai-sarathi: " not in text


def test_command_watches_an_agent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conserving", "--agent", "pretrained:slo-mix", "--seed", "1000000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["iterations"] > 100 and found["scheduler"] == "pretrained:slo-mix"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --scheduler NAME"),
        (["--agent", "x", "--scheduler", "orca"], "an --agent has its scenario"),
        (["--agent", "x", "--rate", "5"], "leave --rate out"),
        (["--agent", "x", "--token-budget", "512"], "leave --token-budget out"),
        (["--scheduler", "orca", "--profile", DAI], "give either --workload NAME or --trace FILE"),
        (["--scheduler", "orca", "--profile", DAI, "--workload", "fixed-1-1", "--rate", "0"], "positive"),
        (["--scheduler", "orca", "--profile", DAI, "--workload", "fixed-1-1", "--k", "0"], "at least 1"),
    ],
)
def test_command_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conserving", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
