"""The settings of schedulers: what would do nothing, or contradicts the rest, is one clear line."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import baselines
from llmsched_env import EngineConfig, InputError, Requests, Scheduler, Settings, simulate
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.state import Hold
from llmsched_env.profiles import Profile
from llmsched_env.scheduling import Budget, Pass, Peak, Routine, Sort, Victim, settings

MERGED = {"passes": (Pass.MERGED,)}
SRPT = {"admission_preempts": True, "order": Order.REMAINING, "resume": Place.KEY}
PRIORITY = {"preempt_for_priority": True, "order": Order.PRIORITY}
WHOLE = {"passes": (Pass.ADMIT, Pass.DECODES), "chunked": False}

LACKING: list[tuple[dict[str, Any], str]] = [
    ({"backfill_within": 2.0}, "backfill_within=2 does nothing without backfill; set that, or leave"),
    ({"protect_after": 0.8}, "protect_after=0.8 does nothing without admission_preempts"),
    ({"chunk_cap_adaptive": True}, "chunk_cap_adaptive=true does nothing without chunk_cap"),
    ({"budget_low": 64}, "budget_low=64 does nothing without budget_rule=pressure"),
    ({"hist_threshold": 8}, "hist_threshold=8 does nothing without length_classes"),
    ({"boost_gamma": 1.0}, "boost_gamma=1 does nothing without order=boost"),
    ({"boost_s_per_token": 1e-4}, "boost_s_per_token=0.0001 does nothing without order=boost"),
    ({"lower_bound": 0.5}, "lower_bound=0.5 does nothing without order=lower-bound or peak=lower-bound"),
    ({"admit_while_swapped": True}, "admit_while_swapped=true does nothing without the pass swap-in"),
    ({"free_block_for_chunk": True, **WHOLE}, "without the pass running, chunks or merged"),
    (
        {"backfill": 8, **MERGED},
        "without the pass admit; set that, or leave backfill=0",
    ),
    ({"peak": Peak.TRUE, **MERGED}, "peak=true does nothing without the pass admit"),
    ({"pass_over": True, **MERGED}, "pass_over=true does nothing without the pass admit"),
    ({"drop_unfit": True, **MERGED}, "drop_unfit=true does nothing without the pass admit or swap-in"),
    (
        {"admit_after_preemption": False, **MERGED},
        "admit_after_preemption=false does nothing",
    ),
    ({**SRPT, **MERGED}, "admission_preempts=true does nothing without the pass admit"),
    ({**PRIORITY, **MERGED}, "preempt_for_priority=true does nothing without the pass admit"),
    (
        {"limit_decodes": False, **MERGED},
        "without the pass running or decodes",
    ),
]
CONTRADICTING: list[tuple[dict[str, Any], str]] = [
    ({**SRPT, "resume": Place.HEAD}, "admission_preempts with resume=head"),
    ({**SRPT, "order": Order.FIFO}, "admission_preempts with order=fifo"),
    ({**SRPT, **PRIORITY}, "admission_preempts and preempt_for_priority"),
    ({**PRIORITY, "order": Order.PROMPT}, "preempt_for_priority with order=prompt; set order=priority"),
    ({**PRIORITY, "resume": Place.END}, "preempt_for_priority with resume=end"),
    ({"backfill": 8, "backfill_within": 2.0}, "backfill_within with order=fifo"),
    ({"backfill": 8, "backfill_within": 2.0, "order": Order.LONGEST}, "backfill_within with order=longest"),
    ({"backfill": 8, "backfill_within": 0.5}, "backfill_within must be at least 1, not 0.5"),
    ({**SRPT, "protect_after": 0.0}, "protect_after must be above 0, not 0.0"),
    ({"passes": (Pass.NONE, Pass.RUNNING, Pass.ADMIT)}, "passes holds none"),
    ({"passes": (Pass.ADMIT, Pass.CHUNKS)}, "passes never let anybody decode; add running, or decodes"),
    ({"passes": (Pass.RUNNING,)}, "passes never admit anybody; add admit"),
    ({"passes": (Pass.ADMIT, Pass.DECODES)}, "passes never go on with a prompt that was cut; add chunks"),
    ({**WHOLE, "chunk_cap": 64}, "passes never go on with a prompt that was cut"),
    ({"mixed": False}, "mixed=false with a pass that mixes prefills and decodes; set passes=decodes"),
    ({"mixed": False, **MERGED}, "mixed=false with a pass that mixes prefills and decodes"),
    ({"prefill_interval": 4, **MERGED}, "prefill_interval with the pass merged"),
    ({"reorder_chunked": True, "sort": Sort.KEY}, "reorder_chunked and sort=key both order the running list"),
]


@pytest.mark.parametrize(("fields", "said"), LACKING + CONTRADICTING, ids=str)
def test_what_would_do_nothing_or_contradicts_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        Settings(**fields)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_goes_together_is_accepted() -> None:
    Settings(**SRPT, protect_after=0.8, backfill=8, backfill_within=1.0)
    Settings(**PRIORITY, resume=Place.KEY)
    Settings(**WHOLE, limit_prefills=False, drop_unfit=True)
    Settings(passes=(Pass.MERGED, Pass.SWAP_IN), drop_unfit=True, length_classes=True, hist_threshold=8)
    Settings(peak=Peak.LOWER_BOUND, lower_bound=0.5, budget_rule=Budget.PRESSURE, budget_low=64)
    Settings(passes=(Pass.DECODES, Pass.CHUNKS, Pass.ADMIT), mixed=False, prefill_interval=4)


def test_scores_are_for_a_plan_that_keeps_them() -> None:
    rules = Settings(order=Order.SCORE)
    Scheduler("mine", rules, plan=lambda e: None)
    with pytest.raises(InputError, match=r"order=score is for a plan of one's own .*; set another order"):
        Scheduler("mine", rules)


def test_every_named_scheduler_is_consistent() -> None:
    for name in baselines.names():
        made = baselines.get(name).settings
        assert dataclasses.replace(made) == made


# -- routines of their own

OWN = [name for name in baselines.names() if baselines.get(name).settings.routine is not Routine.UNIFIED]
OTHERS: dict[str, Any] = {
    "victim": Victim.SHORTEST,
    "max_batch_requests": 3,
    "chunk_cap": 16,
    "backfill": 8,
    "peak": Peak.TRUE,
    "passes": (Pass.RUNNING, Pass.ADMIT, Pass.SWAP_IN),
    "sort": Sort.LONGEST_KV,
    "prefill_interval": 3,
    "order": Order.OUTPUT,
    "resume": Place.END,
}
FLAGS = [f.name for f in dataclasses.fields(Settings) if isinstance(f.default, bool)]
PROFILE = Profile(name="linear", form="linear", params={f"c{i}": 10.0 ** -(2 + 2 * i) for i in range(5)})


def pressed(scheduler: Scheduler) -> list[Any]:
    """What a scheduler decides on two engines that are short of memory."""
    rng = np.random.default_rng(1)
    n = 40
    output = rng.integers(1, 60, n)
    requests = Requests.of(
        np.cumsum(rng.exponential(0.05, n)),
        rng.integers(1, 90, n),
        output,
        predicted_tokens=output * rng.choice([0.6, 1.7], n),
        client=rng.integers(0, 3, n),
        class_id=rng.integers(0, 3, n),
    )
    decisions = []
    for blocks, budget in ((60, 256), (120, 64)):
        engine = EngineConfig(kv_blocks=blocks, block_size=4, max_num_seqs=12, token_budget=budget)
        result = simulate(requests, scheduler, PROFILE, engine, oversized="drop", record="schedule")
        assert result.schedule is not None
        decisions += [result.finish_s.tobytes(), result.schedule.requests.tolist(), result.preemptions_total]
    return decisions


@pytest.mark.parametrize("name", OWN)
def test_a_routine_refuses_only_settings_that_it_does_not_read(name: str) -> None:
    scheduler = baselines.get(name)
    rules = scheduler.settings
    unread = settings._UNREAD.get(rules.routine, set())
    expected = pressed(scheduler)
    for setting in unread & {*OTHERS, *FLAGS}:
        with pytest.raises(InputError, match=f"{setting} does nothing in the routine .*; leave it out"):
            scheduler.replace(**{setting: getattr(rules, setting)})
        if setting in ("admission_preempts", "preempt_for_priority", "chunk_cap_adaptive"):
            continue  # they need others
        value = OTHERS.get(setting, not getattr(rules, setting))
        changed = dataclasses.replace(scheduler, settings=dataclasses.replace(rules, **{setting: value}))
        assert pressed(changed) == expected, setting


@pytest.mark.parametrize("name", OWN)
def test_a_routine_takes_the_settings_that_it_reads(name: str) -> None:
    scheduler = baselines.get(name)
    assert scheduler.replace(hold="peak", test="peak").settings.hold is Hold.PEAK
    assert scheduler.replace(chunked=False).settings.chunked is False
