"""The waiting queue against a sorted list, and its depth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmsched_env.core import engine, queue
from llmsched_env.core.config import EngineConfig
from llmsched_env.core.engine import Order, Place
from llmsched_env.core.lanes import EngineView, LaneSpec, engine_view, make_lanes
from llmsched_env.core.requests import Requests
from llmsched_env.scheduling import ENGINE, Scheduler, Settings


def empty_queue(requests: Requests, settings: Settings | None = None) -> EngineView:
    scheduler = Scheduler("queue", settings or Settings())
    config = scheduler.resolve(EngineConfig(kv_blocks=1_000_000, max_model_len=1_000_000))
    spec = LaneSpec(
        requests=requests,
        config=config,
        pack=scheduler.pack,
        cost=np.zeros(12),
        kv_bytes_per_token=0.0,
        stop_tokens=requests.output_tokens,
        limit_tokens=requests.declared_tokens,
        dropped=np.zeros(len(requests), bool),
    )
    return engine_view(make_lanes([spec], ENGINE), 0)


def many(n: int) -> Requests:
    return Requests.of(np.zeros(n), np.arange(1, n + 1), np.ones(n))


N = 20
KEYS = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, math.inf])
STEPS = st.lists(st.tuples(st.integers(0, N - 1), KEYS, st.integers(-3, 30), st.integers(1, 8)), max_size=60)


@given(STEPS)
def test_the_queue_is_a_sorted_list(steps: list[tuple[int, float, int, int]]) -> None:
    """Each step puts a request in, or takes it out if it is there; then everything is asked."""
    view = empty_queue(many(N))
    e, req = view.compiled, view.req
    inside: dict[int, tuple[float, int]] = {}
    for i, key, order, need in steps:
        if i in inside:
            queue.remove(e, i)
            del inside[i]
        else:
            order = order * N + i  # no two alike
            req[i].key, req[i].order, req[i].need = key, order, need
            queue.insert(e, i)
            inside[i] = (key, order)
        expected = sorted(inside, key=lambda r: inside[r])
        assert walk(e) == expected
        assert view.s.num_waiting == len(expected)
        for free in range(9):
            fitting = [r for r in expected if req[r].need <= free]
            assert queue.first_fit(e, free) == (fitting[0] if fitting else -1)
            for at, r in enumerate(expected):
                later = [x for x in expected[at + 1 :] if req[x].need <= free]
                assert queue.following_fit(e, r, free) == (later[0] if later else -1)


def walk(e: Any) -> list[int]:
    found, r = [], queue.first(e)
    while r >= 0:
        found.append(r)
        r = queue.following(e, r)
    return found


def test_a_long_queue_is_shallow_whatever_the_order_of_entry() -> None:
    """100,000 requests, keys rising, falling, equal and random: no path is longer than a few times log2 n.

    Every operation follows a path or two, so that this bounds its steps.
    """
    n = 100_000
    requests = many(n)
    random = requests.replace(predicted_tokens=np.random.default_rng(1).random(n) + 0.5)
    for settings, each in (
        (Settings(order=Order.FIFO), requests),
        (Settings(order=Order.PROMPT), requests),
        (Settings(order=Order.LONGEST), requests),
        (Settings(order=Order.OUTPUT), random),
    ):
        view = empty_queue(each, settings)
        engine.arrive(view.compiled, 0.0)
        assert view.s.num_waiting == n
        assert depth(view) < 4 * math.log2(n)
        for i in range(0, n, 2):
            queue.remove(view.compiled, i)
        assert view.s.num_waiting == n // 2
        assert depth(view) < 4 * math.log2(n)


def depth(view: EngineView) -> int:
    """Nodes on the longest path from the root."""
    left, right = np.asarray(view.req["left"]), np.asarray(view.req["right"])
    level, levels = np.array([int(view.s.root)]), 0
    while len(level):
        below = np.concatenate([left[level], right[level]])
        level, levels = below[below >= 0], levels + 1
    return levels


def test_who_enters_at_the_head_or_the_end_keeps_out_of_the_order() -> None:
    """Heads are last in first out, ends first in first out, even next to an infinite key."""
    view = empty_queue(
        Requests.of(np.zeros(8), np.ones(8), np.ones(8), ttft_target_s=[3, np.inf, 1, np.inf, 2, 5, 5, 5]),
        Settings(order=Order.DEADLINE),
    )
    e = view.compiled
    for r in (0, 1, 2):
        engine.enter_queue(e, r, Place.KEY)
    engine.enter_queue(e, 4, Place.END)
    engine.enter_queue(e, 5, Place.END)
    engine.enter_queue(e, 6, Place.HEAD)
    engine.enter_queue(e, 7, Place.HEAD)
    engine.enter_queue(e, 3, Place.KEY)
    assert walk(e) == [7, 6, 2, 0, 1, 3, 4, 5]
