"""The compiled dynamics of Decision-v0, driven without Gymnasium: what is brought up to date by what changes
is what a look at everything gives, memory and tokens are accounted for, the mask is what can be done.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from llmsched_env import scenarios
from llmsched_env.core.compile import njit
from llmsched_env.core.span import span
from llmsched_env.envs.decision import legal, step_decision
from llmsched_env.envs.fleet import Fleet
from llmsched_env.envs.frame import DISABLED
from llmsched_env.envs.kinds import DECISION
from llmsched_env.envs.lane import Phase, env_at
from llmsched_env.envs.observation import find_running, find_waiting, observe
from llmsched_env.envs.options import split

RUNNING = 2


@njit(cache=False)
def look_at_everything(table: Any) -> None:
    """Find and write all that is visible anew, and the mask."""
    env = env_at(span(table), 0)
    find_waiting(env)
    for k in range(len(env.v.run)):
        env.v.run[k] = -1
    env.v.num_run = 0
    find_running(env)
    observe(env)
    legal(env)


def fleet(scenario: str = "azure-conv", num_envs: int = 1, **keywords: Any) -> Fleet:
    options, found = split(keywords, scenarios.get(scenario))
    made = Fleet(DECISION, found.resolve(), options, num_envs, autoreset=DISABLED)
    return made


def begin(made: Fleet, seed: int) -> None:
    for lane in range(len(made.bank.table)):
        made.put(lane, made.problem.draw(np.random.default_rng([seed, lane])))
    made.reset(np.ones(len(made.bank.table), bool))


def act(made: Fleet, action: int) -> None:
    step_decision(made.bank.table, np.array([action]), 0, 1)


CASES = [
    {},
    {"running_order": "oldest", "waiting_slots": 3, "running_slots": 4},
    {"running_order": "shortest", "running_slots": 5},
    {"running_order": "longest", "running_slots": 5, "waiting_order": "prompt"},
    {"waiting_order": "area", "hold": "predicted", "waiting_slots": 5},
    {"work_conserving": True, "chunk_levels": ()},
    {"readmit": True, "idle": True, "preempt": "forced", "length_info": "none"},
    {"skip_forced": False, "length_info": "oracle", "waiting_order": "deadline"},
    {"hold": "forecast", "waiting_order": "area", "readmit": True},
]


@pytest.mark.parametrize("scenario", ["azure-conv", "infermax-contention", "slo-mix"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "default")
def test_random_decisions(scenario: str, case: dict[str, Any]) -> None:
    made = fleet(scenario, **case)
    bank, g = made.bank, np.random.default_rng(0)
    begin(made, 0)
    s, lane, req = bank.s[0], bank.lane[0], bank.req[0]
    rewards = 0.0
    for step in range(1500):
        legal_now = np.flatnonzero(bank.mask[0])
        assert len(legal_now) > 0
        if step % 7 == 0:
            assert_consistent(made)
        clock = float(s["clock"])
        # Runs and admissions more often than preemptions, so that something gets done.
        weights = np.where(
            legal_now == 0, 4.0, np.where(legal_now < len(bank.mask[0]) - lane["running_slots"], 1, 0.2)
        )
        act(made, int(g.choice(legal_now, p=weights / weights.sum())))
        rewards += float(lane["reward"])
        assert s["error"] == 0
        assert lane["illegal"] == 0
        assert s["clock"] >= clock
        held = req["blocks"][req["status"] == RUNNING].sum()
        assert held + s["free"] == s["kv_blocks"]
        assert s["free"] >= 0
        if lane["terminated"] or lane["truncated"]:
            assert req["generated"].sum() == req["stop"].sum()
            latency = (req["finish"] - req["arrival"]).sum()
            assert rewards == pytest.approx(-latency / lane["unit_time"], rel=1e-9)
            begin(made, step)
            rewards = 0.0


@pytest.mark.parametrize("info", ["oracle", "predicted", "class"])
def test_the_forecast_closes_the_slots_of_who_would_not_fit(info: str) -> None:
    made = fleet(
        kv_blocks=700,
        num_requests=120,
        hold="forecast",
        length_info=info,
        waiting_order="area",
    )
    g = np.random.default_rng(1)
    begin(made, 0)
    lane, seen = made.bank.lane[0], {True: 0, False: 0}
    for step in range(2500):
        if lane["phase"] == Phase.BUILDING:
            for k in range(lane["num_wait"]):
                slot = slice(2 + k * lane["num_levels"], 2 + (k + 1) * lane["num_levels"])
                fits = can_be_admitted(made, lane["wait"][k])
                if fits is not None:
                    assert made.bank.mask[0][slot].any() == fits
                    seen[fits] += 1
        act(made, int(g.choice(np.flatnonzero(made.bank.mask[0]))))
        if lane["terminated"] or lane["truncated"]:
            begin(made, step)
    assert min(seen.values()) > 500


def can_be_admitted(made: Fleet, r: int) -> bool | None:
    """Whether request r will fit at every coming completion, found in the plainest way; None: without that it
    could not be admitted anyway."""
    s, req = made.bank.s[0], made.bank.req[0]
    q, size = req[r], s["block_size"]
    known = q["prompt"] + q["generated"]
    least = -(-known // size) + (s["watermark_blocks"] if s["num_running"] else 0)
    if s["num_running"] >= s["max_num_seqs"] or s["budget"] <= 0 or least > s["free"]:
        return None
    running = req[req["status"] == RUNNING]
    if len(running) == 0:
        return True
    left, held = [], []
    for v in [*running, q]:
        left.append(max(1, int(np.ceil(min(v["predicted"], v["limit"]))) - v["generated"]))
        decodes = v["status"] == RUNNING and v["computed"] >= v["target"]
        held.append((v["computed"] if decodes else v["prompt"] + v["generated"] - 1) + size - 1)
    together = np.array(left), np.array(held)
    return all((together[1] + d)[together[0] >= d].sum() <= s["kv_blocks"] * size for d in left)


def assert_consistent(made: Fleet) -> None:
    """What is shown is what a look at everything gives."""
    twin = copy.deepcopy(made.bank)
    look_at_everything(twin.table)
    np.testing.assert_array_equal(twin.observation, made.bank.observation)
    np.testing.assert_array_equal(twin.mask, made.bank.mask)
    assert (made.bank.observation <= 1).all() and (made.bank.observation >= -1).all()


@pytest.mark.parametrize("case", CASES[:3] + CASES[5:], ids=lambda case: "-".join(case) or "default")
def test_the_mask_says_what_can_be_done(case: dict[str, Any]) -> None:
    made = fleet("azure-conv", **case)
    g = np.random.default_rng(1)
    begin(made, 1)
    for _ in range(8):
        for _ in range(int(g.integers(1, 30))):
            act(made, int(g.choice(np.flatnonzero(made.bank.mask[0]))))
        before = copy.deepcopy(made)
        if before.bank.lane[0]["phase"] == 2:
            begin(made, int(g.integers(100)))
            continue
        for action in range(len(made.bank.mask[0])):
            tried = copy.deepcopy(before)
            tried.bank.lane["skip_forced"] = 0
            act(tried, action)
            assert tried.bank.lane[0]["illegal"] == before.bank.lane[0]["illegal"] + (
                not before.bank.mask[0, action]
            )
            assert tried.bank.s[0]["error"] == 0
            if before.bank.mask[0, action]:
                assert changed(before, tried), action


def changed(before: Fleet, after: Fleet) -> bool:
    """Whether anything but the count of decisions is another."""
    a, b = before.bank, after.bank
    return bool(
        a.s.tobytes() != b.s.tobytes()
        or a.req.tobytes() != b.req.tobytes()
        or a.lane["held"] != b.lane["held"]
    )
