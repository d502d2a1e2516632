"""Requests that decode in lock-step are advanced together; what comes out is what iterating gives."""

from __future__ import annotations

import numpy as np
import pytest

import baselines
from llmsched_env import EngineConfig, Requests, Result, simulate

PER_REQUEST = (
    "first_scheduled_s",
    "first_token_s",
    "finish_s",
    "generated_tokens",
    "preemptions",
    "recomputed_tokens",
    "itl_counts",
)
IN_TOTAL = (
    "iterations_total",
    "preemptions_total",
    "busy_s",
    "makespan_s",
    "prefill_tokens",
    "decode_tokens",
    "batch_mean",
    "kv_mean",
)


def contended(g: np.random.Generator) -> tuple[Requests, EngineConfig]:
    """Up to 120 requests on an engine that is too small for them: preemptions, full blocks, short budgets."""
    n = int(g.integers(5, 120))
    prompt = g.integers(1, 200, n)
    output = g.integers(1, int(g.choice([3, 30, 300])), n)
    declared = output + g.integers(0, 20, n)
    requests = Requests.of(
        np.sort(g.uniform(0, float(g.choice([0.001, 1, 20])), n)),
        prompt,
        output,
        declared_tokens=declared,
        predicted_tokens=np.maximum(1, output + g.integers(-10, 10, n)).astype(float),
        priority=g.integers(0, 3, n),
        client=g.integers(0, 3, n),
        ttft_target_s=1.0,
        tpot_target_s=0.1,
    )
    size = int(g.choice([1, 4, 16, 16, 128, 256]))
    tokens = (prompt + declared).max() * g.uniform(1.05, 6)
    engine = EngineConfig(
        kv_blocks=int(tokens) // size + 3,
        block_size=size,
        token_budget=int(g.choice([64, 256, 2048])),
        max_num_seqs=int(g.choice([4, 32, 256])),
        async_scheduling=False,
    )
    return requests, engine


def assert_same(one: Result, other: Result) -> None:
    for name in PER_REQUEST:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for name in IN_TOTAL:
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("name", baselines.names())
def test_cruising_changes_nothing(name: str) -> None:
    scheduler = baselines.get(name)
    for seed in range(50):
        g = np.random.default_rng([seed, baselines.names().index(name)])
        requests, engine = contended(g)
        limit = int(g.integers(1, 400)) if g.random() < 0.3 else 5_000
        horizon = float(g.uniform(0.01, 10)) if g.random() < 0.2 else np.inf
        iterated, cruised = (
            simulate(
                requests,
                scheduler,
                engine=engine,
                oversized="drop",
                skip=skip,
                max_iterations=limit,
                horizon_s=horizon,
            )
            for skip in ("none", "exact")
        )
        assert_same(iterated, cruised)


def test_what_a_run_leaves_behind_is_up_to_date() -> None:
    """A run that is cut while requests cruise says of each how far it came."""
    requests = Requests.of(np.zeros(8), np.full(8, 20), np.full(8, 100))
    result = simulate(
        requests, baselines.get("vllm-v1"), max_iterations=40, engine=EngineConfig(kv_blocks=200)
    )
    assert result.generated_tokens.tolist() == [40] * 8
    assert result.itl_sum == pytest.approx(8 * (result.busy_s - result.first_token_s[0]))
