"""The compiled engine: equal to the oracle bit for bit, the same however it is run, true to its own rules."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Oracle, Stuck

import baselines
from llmsched_env.core import engine
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.lanes import LaneSpec, engine_view, make_lanes
from llmsched_env.core.requests import Requests
from llmsched_env.core.run import EVICTED, ITERATION, SWAPPED_OUT, Log, Outcome
from llmsched_env.core.state import Error, Hold, Listing, Status
from llmsched_env.errors import InputError
from llmsched_env.profiles import Profile
from llmsched_env.scheduling import (
    ENGINE,
    Budget,
    Pass,
    Peak,
    Routine,
    Scheduler,
    Settings,
    Sort,
    Victim,
    run_lane,
)
from llmsched_env.simulation import Result, replay, resolve, simulate

PROFILES = [
    Profile(
        name="linear",
        form="linear",
        params={"c0": 0.007, "c1": 1.1e-4, "c2": 3.3e-5, "c3": 1.7e-7, "c4": 1.3e-8},
        kv_bytes_per_token=131072.0,
    ),
    Profile(
        name="hinge",
        form="hinge",
        params={"h0": 0.002, "h1": 0.009, "h2": 9.1e-5, "h3": 1.1e-7, "h4": 1.9e-8, "h5": 2.3e-5},
        kv_bytes_per_token=524288.0,
        cpu_s=0.0011,
        cpu_s_per_request=1.3e-5,
    ),
    Profile(name="staircase", form="staircase", params={"c": 0.004, "a": 0.013, "b0": 24.0}),
]
MORE = 4 * settings.default.max_examples
MOST = 3000  # iterations of a test case; a few settings, odd together, preempt without end


# -------------------------------------------------------------------------------------- what is tested


@st.composite
def workloads(draw: st.DrawFn) -> Requests:
    n = draw(st.sampled_from([1, 2, 6, 10, 14]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))  # spreads wider than values drawn singly
    gap = draw(st.sampled_from([0.0, 0.0, 0.01, 0.1, 3.0]))
    longest_prompt = draw(st.sampled_from([3, 12, 40, 300]))
    longest_output = draw(st.sampled_from([1, 25, 60, 120]))
    output = rng.integers(1, longest_output + 1, n)
    return Requests.of(
        np.cumsum(rng.choice([0.0, 0.3, 1.0, 1.7], n)) * gap,
        rng.integers(1, longest_prompt + 1, n),
        output,
        declared_tokens=output + draw(st.sampled_from([0, 1])) * rng.choice([0, 0, 1, 30], n),
        predicted_tokens=output * rng.choice([1.0, 1.0, 0.31, 1.77, 40.0], n),
        priority=rng.integers(0, 3, n),
        ttft_target_s=rng.choice([np.inf, 0.05, 0.5], n),
    )


PASSES = [
    (Pass.RUNNING, Pass.ADMIT),
    (Pass.ADMIT, Pass.RUNNING),
    (Pass.DECODES, Pass.CHUNKS, Pass.ADMIT),
    (Pass.DECODES, Pass.ADMIT, Pass.CHUNKS),
    (Pass.CHUNKS, Pass.ADMIT, Pass.DECODES),
    (Pass.ADMIT, Pass.CHUNKS, Pass.DECODES),
    (Pass.MERGED,),
]


HOLDS = st.sampled_from([Hold.CHUNK, Hold.KNOWN] * 4 + list(Hold))  # the two that over-commit more often


@st.composite
def schedulers(draw: st.DrawFn) -> Scheduler:
    """Settings of the unified routine, each field drawn; some that contradict each other are left out."""
    often, seldom = st.sampled_from([True, True, True, False]), st.sampled_from([False, False, False, True])
    passes = draw(st.sampled_from(PASSES))
    merged = passes == (Pass.MERGED,)
    order = draw(st.sampled_from([o for o in Order if o not in (Order.RANDOM, Order.SCORE)]))
    fields: dict[str, Any] = {
        "order": order,
        "resume": draw(st.sampled_from(Place)),
        "chunked": draw(often),
        "chunk_cap": draw(st.sampled_from([0, 0, 3, 40])),
        "chunk_cap_alone": draw(st.booleans()),
        "test": draw(HOLDS),
        "hold": draw(HOLDS),
        "watermark_when_idle": draw(st.booleans()),
        "defer_victims": draw(seldom),
        "victim": draw(st.sampled_from(Victim)),
        "sort": draw(st.sampled_from(Sort)),
        "free_block_for_decode": draw(seldom),
        "free_block_for_chunk": draw(seldom),
        "listing": draw(st.sampled_from(Listing)),
        "max_batch_requests": draw(st.sampled_from([0, 0, 0, 1, 3])),
        "budget_rule": draw(st.sampled_from(Budget)),
        "length_classes": draw(seldom),
        "stop_one_later": draw(st.booleans()),
    }
    if not merged:  # its passes alone, with the budget for all, and nothing but the queue's head
        limit_decodes = draw(st.booleans())
        fields |= {
            "mixed": draw(often) or Pass.RUNNING in passes,
            "limit_decodes": limit_decodes,
            "limit_prefills": draw(often),
            "admit_after_preemption": draw(st.booleans()),
            "backfill": draw(st.sampled_from([0, 0, 1, 5])),
            "prefill_interval": draw(st.sampled_from([1, 1, 1, 3])),
            "peak": draw(st.sampled_from(Peak)),
        }
        if draw(seldom):
            fields |= {"order": Order.PRIORITY, "preempt_for_priority": True, "resume": Place.HEAD}
        elif draw(seldom) and fields["resume"] is not Place.HEAD and order is not Order.FIFO:
            fields |= {"admission_preempts": True, "protect_after": draw(st.sampled_from([np.inf, 0.6]))}
    if draw(st.booleans()):
        at = draw(st.integers(0, len(passes)))
        passes = (*passes[:at], Pass.SWAP_IN, *passes[at:])
        fields["admit_while_swapped"] = draw(st.booleans())
    # What means something only beside another setting.
    order = fields["order"]
    if fields["chunk_cap"] > 0:
        fields["chunk_cap_adaptive"] = draw(st.booleans())
    if fields["sort"] is Sort.ADMISSION:
        fields["reorder_chunked"] = draw(seldom)
    if fields["budget_rule"] is Budget.PRESSURE:
        fields["budget_low"] = 7
    if fields["length_classes"]:
        fields["hist_threshold"] = draw(st.sampled_from([0, 8]))
    if order is Order.BOOST:
        fields |= {"boost_gamma": 2.0, "boost_s_per_token": 1e-3}
    if order is Order.LOWER_BOUND or fields.get("peak") is Peak.LOWER_BOUND:
        fields["lower_bound"] = draw(st.sampled_from([0.5, 1.0]))
    if fields.get("backfill") and order not in (Order.FIFO, Order.LONGEST):
        fields["backfill_within"] = draw(st.sampled_from([np.inf, np.inf, 1.5]))
    return Scheduler("drawn", Settings(passes=passes, **fields))


@dataclasses.dataclass(frozen=True)
class Case:
    requests: Requests
    scheduler: Scheduler
    profile: Profile
    engine: EngineConfig  # resolved
    dropped: frozenset[int]

    def simulate(self, **options: Any) -> Result:
        options = {"record": "schedule", "skip": "none", "max_iterations": MOST, **options}
        return simulate(self.requests, self.scheduler, self.profile, self.engine, oversized="drop", **options)

    def oracle(self) -> Oracle:
        return Oracle(self.requests, self.scheduler.settings, self.engine, self.profile, self.dropped)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    requests, scheduler, profile = draw(workloads()), draw(schedulers()), draw(st.sampled_from(PROFILES))
    size = draw(st.sampled_from([1, 2, 3, 16, 32]))
    largest = int((requests.prompt_tokens + requests.declared_tokens).max())
    swaps = Pass.SWAP_IN in scheduler.settings.passes and not scheduler.settings.preempt_for_priority
    engine = EngineConfig(
        kv_blocks=-(-largest // size) + draw(st.integers(0, 4)) * draw(st.sampled_from([1, 1, 3, 40])),
        block_size=size,
        token_budget=draw(st.sampled_from([512, 64, 17, 4, 1])),
        max_num_seqs=draw(st.sampled_from([256, 256, 4, 2, 1])),
        max_model_len=draw(st.sampled_from([None, None, 60])),
        watermark=draw(st.sampled_from([0.0, 0.0, 0.1])),
        preemption="swap" if swaps and draw(st.booleans()) else "recompute",
        cpu_blocks=draw(st.sampled_from([None, 0, 4, 30])),
        swap_bandwidth=draw(st.sampled_from([1e9, np.inf])),
        swap_overlap=draw(st.booleans()),
        async_scheduling=draw(st.sampled_from([False, False, True])),
    )
    config = resolve(engine, scheduler, profile, largest)
    room = config.max_model_len - requests.prompt_tokens + (1 if scheduler.settings.stop_one_later else 0)
    limit = np.maximum(np.minimum(requests.declared_tokens, room), 1).astype(np.int32)
    stop = np.minimum(requests.output_tokens, limit)
    blocks = scheduler.least_blocks(requests, stop, limit, config)
    budget = scheduler.least_budget(requests, stop)
    bad = (room < 1) | (blocks > config.kv_blocks) | (budget > config.token_budget)
    assume(not bad.all())
    return Case(requests, scheduler, profile, config, frozenset(np.flatnonzero(bad).tolist()))


# ------------------------------------------------------------------------------------------ the oracle


@settings(max_examples=MORE)
@given(cases())
def test_the_engine_is_the_oracle(case: Case) -> None:
    """Bit for bit: clock, tokens, preemptions, every batch, KV, busy time, gaps between tokens."""
    oracle = case.oracle()
    try:
        oracle.run(MOST)
    except Stuck:
        with pytest.raises(InputError, match="nothing is planned"):
            case.simulate()
        return
    assert_equal(case.simulate(), oracle)


def assert_equal(result: Result, oracle: Oracle) -> None:
    rows, batches = result.iterations, batches_of(result)
    assert rows is not None
    assert len(oracle.rows) == len(rows) == result.iterations_total == oracle.iterations
    for ours, row, batch in zip(oracle.rows, rows, batches, strict=True):
        assert batch == [(r, SWAPPED_OUT if cpu else EVICTED) for r, cpu in ours.victims] + ours.granted
        assert (ours.start, ours.end) == (row["start_s"], row["end_s"])
        assert (ours.prefill_tokens, ours.decodes) == (row["prefill_tokens"], row["decode_requests"])
        assert (ours.kv_tokens, len(ours.victims)) == (row["kv_tokens"], row["preempted"])
        assert ours.swapped_in == row["swapped_in"]

    def column(name: str) -> Any:
        return [getattr(r, name) for r in oracle.req]

    np.testing.assert_array_equal(result.first_scheduled_s, column("first_scheduled"))
    np.testing.assert_array_equal(result.first_token_s, column("first_token"))
    np.testing.assert_array_equal(result.finish_s, column("finish"))
    assert result.generated_tokens.tolist() == column("generated")
    assert result.preemptions.tolist() == column("preemptions")
    assert result.recomputed_tokens.tolist() == column("recomputed")
    assert result.preemptions_total == sum(column("preemptions"))
    assert result.busy_s == oracle.busy
    assert (result.prefill_tokens, result.decode_tokens) == (oracle.prefill_tokens, oracle.decode_tokens)
    assert result.wasted_tokens == oracle.wasted
    assert result.batch_mean == oracle.batch_sum / oracle.iterations
    if oracle.busy > 0:
        assert result.kv_mean == oracle.kv_seconds / (oracle.busy * result.engine.kv_tokens)
    np.testing.assert_array_equal(result.itl_counts, oracle.itl_counts())


def batches_of(result: Result) -> list[list[tuple[int, int]]]:
    """The entries of each iteration: request and tokens, or the code of its preemption."""
    schedule = result.schedule
    assert schedule is not None
    entries = list(zip(schedule.requests.tolist(), schedule.tokens.tolist(), strict=True))
    ends = schedule.ends.tolist()
    return [entries[a:b] for a, b in zip([0, *ends], ends, strict=False)]


UNIFIED = [name for name in baselines.names() if baselines.get(name).settings.routine is Routine.UNIFIED]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", UNIFIED)
def test_every_scheduler_of_the_one_routine_is_the_oracle_under_pressure(
    name: str, asynchronous: bool
) -> None:
    rng = np.random.default_rng(5)
    n = 30
    output = rng.integers(1, 60, n)
    requests = Requests.of(
        np.cumsum(rng.exponential(0.05, n)),
        rng.integers(1, 90, n),
        output,
        declared_tokens=output + 20,
        predicted_tokens=output * rng.choice([0.6, 1.0, 1.7], n),
        priority=rng.integers(0, 3, n),
        ttft_target_s=rng.choice([0.1, np.inf], n),
    )
    scheduler = baselines.get(name)
    sizes = {"kv_blocks": 60, "block_size": 4, "max_num_seqs": 12, "watermark": 0.02, "cpu_blocks": 30}
    budget = 48 if scheduler.settings.chunked else 256
    config = EngineConfig(**sizes, token_budget=budget, async_scheduling=asynchronous)
    resolved = resolve(config, scheduler, PROFILES[1], longest=200)
    case = Case(requests, scheduler, PROFILES[1], resolved, frozenset())
    oracle = case.oracle().run(MOST)
    assert oracle.iterations < MOST
    assert_equal(case.simulate(), oracle)
    assert_same(case.simulate(record=None), case.simulate(record=None, skip="exact"))


def test_the_horizon_ends_a_run_where_the_oracle_ends() -> None:
    requests = Requests.of(np.arange(6) * 0.05, [30, 5, 80, 9, 1, 40], [20, 30, 5, 9, 40, 2])
    scheduler = Scheduler("v1")
    engine = resolve(EngineConfig(kv_blocks=20, block_size=8, token_budget=16), scheduler, PROFILES[1])
    for horizon in (0.013, 0.2, 0.4):
        case = Case(requests, scheduler, PROFILES[1], engine, frozenset())
        oracle = case.oracle().run(horizon=horizon)
        for skip in ("none", "exact"):
            result = case.simulate(horizon_s=horizon, skip=skip)
            assert result.iterations_total == oracle.iterations > 0
            np.testing.assert_array_equal(result.finish_s, [r.finish for r in oracle.req])


# ----------------------------------------------------------------------------------- however it is run


def run_or_discard(case: Case, **options: Any) -> Result:
    try:
        return case.simulate(**options)
    except InputError as error:
        assert "nothing is planned" in str(error)
        assume(False)
        raise AssertionError from None


def assert_same(a: Result, b: Result) -> None:
    """Bit for bit, but for names."""
    for field in dataclasses.fields(Result):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "schedule":
            if x is not None and y is not None:
                for name in ("start_s", "ends", "requests", "tokens"):
                    np.testing.assert_array_equal(getattr(x, name), getattr(y, name), err_msg=name)
        elif isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, y, err_msg=field.name)
        elif field.name not in ("requests", "scheduler", "iterations"):
            assert x == y, field.name


@settings(max_examples=MORE)
@given(cases())
def test_stretches_in_one_go_are_the_iterations_one_by_one(case: Case) -> None:
    plain = run_or_discard(case)
    assert_same(plain, case.simulate(skip="exact"))
    assert_same(case.simulate(record=None), case.simulate(skip="exact", record=None))


@given(cases())
def test_stretches_in_closed_form_are_equal_within_rounding(case: Case) -> None:
    plain = run_or_discard(case, record=None)
    assume(not np.isnan(np.delete(plain.finish_s, list(case.dropped))).any())
    closed = case.simulate(skip="closed", record=None)
    for name in ("first_token_s", "finish_s", "busy_s", "makespan_s", "kv_mean", "itl_sum"):
        np.testing.assert_allclose(getattr(closed, name), getattr(plain, name), rtol=1e-9, err_msg=name)
    for name in ("generated_tokens", "preemptions", "recomputed_tokens", "iterations_total"):
        np.testing.assert_array_equal(getattr(closed, name), getattr(plain, name), err_msg=name)
    assert (closed.prefill_tokens, closed.decode_tokens) == (plain.prefill_tokens, plain.decode_tokens)
    # A gap at the edge of a bin may fall to the other side.
    edges = np.cumsum(closed.itl_counts) - np.cumsum(plain.itl_counts)
    assert closed.itl_counts.sum() == plain.itl_counts.sum() and np.abs(edges).max() <= 14


def assume_told(result: Result) -> None:
    """A schedule does not tell of who was admitted, or swapped in, and preempted in the same iteration."""
    running: set[int] = set()
    assert result.iterations is not None
    for batch, row in zip(batches_of(result), result.iterations, strict=True):
        victims = {r for r, tokens in batch if tokens < 0}
        assume(victims <= running and not (victims and row["swapped_in"]))
        running = running - victims | {r for r, tokens in batch if tokens > 0}


@settings(max_examples=MORE)
@given(cases())
def test_a_replayed_schedule_gives_the_same_bits(case: Case) -> None:
    result = run_or_discard(case)
    assert result.schedule is not None and result.iterations is not None
    assume(not case.dropped and not np.isnan(result.finish_s).any())
    assume_told(result)
    again = replay(result.schedule, case.requests, case.profile, case.engine, scheduler=case.scheduler)
    assert_same(result, again)
    np.testing.assert_array_equal(result.iterations, again.iterations)


@given(cases())
def test_a_run_in_pieces_and_the_rules_that_hold_in_between(case: Case) -> None:
    """Iteration by iteration the same result, and each time blocks and tokens add up."""
    whole = run_or_discard(case, record=None)
    lanes = make_lanes([spec_of(case)], ENGINE)
    s, req = lanes.s[0], lanes.req
    for _ in range(whole.iterations_total):
        clock = float(s["clock"])
        assert run_lane(lanes, 0, NO_LOG, 1, np.inf, 0) == Outcome.MORE
        assert s["clock"] >= clock
        assert_adds_up(s, req, case.engine)
    if whole.iterations_total < MOST:
        assert run_lane(lanes, 0, NO_LOG, 1, np.inf, 0) == Outcome.DONE
        served = req[req["status"] == Status.FINISHED]
        computed = int(s["total_prefill"] + s["total_decode"] - s["total_wasted"])
        assert computed == int((served["prompt"] + served["generated"] - 1 + served["recomputed"]).sum())
        assert s["free"] == s["kv_blocks"] and s["cpu_free"] == s["cpu_blocks"] and s["kv_tokens"] == 0
        assert (served["generated"] == served["stop"]).all() and len(served) == len(req) - len(case.dropped)
        assert (served["arrival"] <= served["first_scheduled"]).all()
        assert (served["first_scheduled"] < served["first_token"]).all()
        assert (served["first_token"] <= served["finish"]).all()
    for name, ours in (("finish", whole.finish_s), ("first_token", whole.first_token_s)):
        np.testing.assert_array_equal(req[name], ours)
    assert (s["busy"], s["iterations"]) == (whole.busy_s, whole.iterations_total)
    np.testing.assert_array_equal(lanes.itl, whole.itl_counts)


NO_LOG = Log(np.zeros(0, ITERATION), np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(2, np.int64))


def assert_adds_up(s: Any, req: Any, config: EngineConfig) -> None:
    """Blocks, tokens and numbers of requests that the engine counts are those that its requests have."""
    running, swapped = req[req["status"] == Status.RUNNING], req[req["status"] == Status.SWAPPED]
    assert s["free"] + running["blocks"].sum() == s["kv_blocks"] and s["free"] >= 0
    assert s["cpu_free"] + swapped["cpu_blocks"].sum() == s["cpu_blocks"] and s["cpu_free"] >= 0
    assert s["kv_tokens"] == running["computed"].sum()
    assert (running["computed"] <= running["blocks"] * config.block_size).all()
    assert (swapped["computed"] <= swapped["cpu_blocks"] * config.block_size).all()
    elsewhere = req[(req["status"] != Status.RUNNING) & (req["status"] != Status.SWAPPED)]
    assert not elsewhere["blocks"].any() and not elsewhere["cpu_blocks"].any()
    assert s["num_running"] == len(running) <= s["max_num_seqs"]
    assert s["num_swapped"] == len(swapped)
    assert s["num_waiting"] == np.count_nonzero(req["status"] == Status.WAITING)
    assert not req["granted"].any()


def spec_of(case: Case, histogram: bool = True) -> LaneSpec:
    requests, config = case.requests, case.engine
    assert config.max_model_len is not None
    late = 1 if case.scheduler.settings.stop_one_later else 0
    room = config.max_model_len - requests.prompt_tokens + late
    limit = np.maximum(np.minimum(requests.declared_tokens, room), 1).astype(np.int32)
    return LaneSpec(
        requests=requests,
        config=config,
        pack=case.scheduler.pack,
        cost=case.profile.pack(),
        kv_bytes_per_token=case.profile.kv_bytes_per_token or 0.0,
        stop_tokens=np.minimum(requests.output_tokens, limit),
        limit_tokens=limit,
        dropped=np.isin(np.arange(len(requests)), list(case.dropped)),
        workspace=case.scheduler.work_size(len(requests), 1),
        histogram=histogram,
    )


@given(st.lists(cases(), min_size=2, max_size=5))
def test_lanes_side_by_side_are_engines_of_their_own(several: list[Case]) -> None:
    """Any number of engines in one set of arrays, advanced in turns or by two threads."""
    alone = [run_or_discard(case, record=None, max_iterations=200) for case in several]

    def advance(mine: list[int], most: int) -> None:
        for _ in range(200 // most):
            for i in mine:
                run_lane(lanes, i, NO_LOG, most, np.inf, 1)

    every = list(range(len(several)))
    for threads, most in ((1, 1), (1, 200), (2, 200), (2, 40)):
        lanes = make_lanes([spec_of(case, histogram=i % 2 == 0) for i, case in enumerate(several)], ENGINE)
        running = [threading.Thread(target=advance, args=(every[i::threads], most)) for i in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        for i, result in enumerate(alone):
            req = lanes.req[lanes.first[i] : lanes.first[i + 1]]
            np.testing.assert_array_equal(req["finish"], result.finish_s)
            np.testing.assert_array_equal(req["preemptions"], result.preemptions)
            assert lanes.s[i]["busy"] == result.busy_s
            counts = lanes.itl[lanes.first_itl[i] : lanes.first_itl[i + 1]]
            if i % 2 == 0:
                np.testing.assert_array_equal(counts, result.itl_counts)


# ----------------------------------------------------------------------------------- the primitives


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, int, int]:
    """A primitive, a request (of 6, or none), and a number of tokens."""
    name = draw(st.sampled_from(["grant", "grant", "grant", "evict", "swap_in", "refund", "execute"]))
    return name, draw(st.integers(-1, 6)), draw(st.sampled_from([1, 1, 2, 7, 30, 0, -1]))


@given(
    st.lists(calls(), max_size=60),
    st.sampled_from(list(Hold)),
    st.sampled_from(["recompute", "swap"]),
    st.sampled_from([1, 4]),
    st.booleans(),
)
def test_primitives_do_what_is_allowed_and_nothing_else(
    script: list[tuple[str, int, int]], hold: Hold, preemption: str, size: int, budgeted: bool
) -> None:
    """Random calls: a legal one does its job, an illegal one changes nothing and says what it breaks."""
    requests = Requests.of([0, 0, 0, 0, 0, 9e9], [1, 7, 12, 3, 30, 5], [3, 1, 9, 30, 4, 5])
    rules = Settings(passes=(Pass.RUNNING, Pass.ADMIT, Pass.SWAP_IN), hold=hold, test=hold)
    scheduler = Scheduler("free", rules, plan=(lambda e: None) if budgeted else None)
    config = resolve(
        EngineConfig(
            kv_blocks=48 // size,
            block_size=size,
            token_budget=20,
            max_num_seqs=3,
            preemption=preemption,
            cpu_blocks=20 // size,
        ),
        scheduler,
        PROFILES[0],
    )
    lanes = make_lanes([spec_of(Case(requests, scheduler, PROFILES[0], config, frozenset()))], ENGINE)
    view = engine_view(lanes, 0)
    e, s, req = view.compiled, view.s, view.req
    engine.arrive(e, 0.0)
    engine.begin_plan(e)
    for name, r, tokens in script:
        if name == "execute":
            engine.end_plan(e)
            engine.execute(e)
            assert_adds_up(lanes.s[0], lanes.req, config)
            engine.begin_plan(e)
            continue
        before = [part.tobytes() for part in (lanes.s, lanes.req, lanes.lists)]
        expected = broken_rule(s, req, name, r, tokens)
        arguments = (r, tokens) if name == "grant" else (r,)
        assert bool(getattr(engine, name)(e, *arguments)) == (expected is Error.NONE)
        assert Error(int(s.error)) is expected
        for field in ("error", "error_request", "error_value", "error_limit"):
            if expected is not Error.NONE and field == "error_request":
                assert s.error_request == r
            setattr(s, field, 0)
        if expected is not Error.NONE:
            for part, old in zip((lanes.s, lanes.req, lanes.lists), before, strict=True):
                assert part.tobytes() == old
            continue
        running = req[req.status == Status.RUNNING]
        assert s.free == s.kv_blocks - running.blocks.sum() >= 0
        assert s.cpu_free == s.cpu_blocks - req.cpu_blocks.sum() >= 0
        assert s.kv_tokens == running.computed.sum()
        assert s.budget == s.token_budget - req.granted.sum()
        assert sorted(view.plan[: s.num_planned]) == np.flatnonzero(req.granted).tolist()
        assert sorted(view.running[: s.num_running]) == np.flatnonzero(req.status == Status.RUNNING).tolist()
        prefilling = (req.granted > 0) & (req.computed < req.target)
        assert s.prefill_tokens == req.granted[prefilling].sum()
        assert (s.prefill_requests, s.decodes) == (prefilling.sum(), s.num_planned - prefilling.sum())
        assert s.prefill_cached == req.computed[prefilling].sum()
        decoding = (req.granted > 0) & ~prefilling
        assert s.decode_context == (req.computed + 1)[decoding].sum()


def broken_rule(s: Any, req: Any, name: str, r: int, tokens: int) -> Error:
    """The rule that a call would break, from the engine's state as it stands."""
    if not 0 <= r < len(req):
        return Error.UNKNOWN_REQUEST
    q = req[r]
    size = int(s.block_size)
    if name == "refund":
        return Error.NONE if q.granted else Error.NOT_PLANNED
    if name == "evict":
        return Error.NONE if q.status == Status.RUNNING else Error.NOT_RESIDENT
    if name == "swap_in":
        if q.status != Status.SWAPPED:
            return Error.NOT_SCHEDULABLE
        if q.cpu_blocks > s.free:
            return Error.KV
        return Error.SEQS if s.num_running >= s.max_num_seqs else Error.NONE
    if q.status not in (Status.WAITING, Status.RUNNING):
        return Error.NOT_SCHEDULABLE
    if q.granted:
        return Error.TWICE
    if s.enforce_budget and tokens > s.budget:
        return Error.BUDGET
    waits = q.status == Status.WAITING
    if waits and s.num_running >= s.max_num_seqs:
        return Error.SEQS
    rest = q.prompt + q.generated if waits else max(1, q.target - q.computed)
    if not 1 <= tokens <= rest:
        return Error.TOKENS
    held = q.hold
    if waits:
        known = int(q.prompt + q.generated)
        held = {
            Hold.CHUNK: 0,
            Hold.KNOWN: known,
            Hold.PEAK: q.prompt + q.stop - 1,
            Hold.PREDICTED: max(known, q.prompt + q.predicted - 1),
            Hold.DECLARED: max(known, q.prompt + q.limit - 1),
            Hold.MODEL_LEN: s.max_model_len,
        }[Hold(int(s.hold))]
    need = -(-int(max(q.computed + tokens, held)) // size) - q.blocks
    return Error.KV if need > 0 and need > s.free else Error.NONE
