"""The capacity of an engine: published values, both limits, and what it must not depend on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsched_env import workloads
from llmsched_env.core.config import EngineConfig
from llmsched_env.errors import InputError
from llmsched_env.theory.capacity import capacity
from llmsched_env.workloads.lengths import Moments


def staircase(P, NP, CX, KP, D, KV):
    """CodeLlama-34B on an A100, arXiv 2504.07347v3 section 2.3."""
    return 0.01128 + 0.03547 * np.ceil((P + D) / 128)


def linear(P, NP, CX, KP, D, KV):
    return 0.006 + 5e-5 * (P + D) + 1e-7 * KV + 1e-8 * CX


@pytest.mark.parametrize(("prompt", "output", "rps"), [(100, 100, 16.71), (129, 112, 13.87)])
def test_theorem_2(prompt, output, rps):
    moments = workloads.get(f"fixed-{prompt}-{output}").moments()
    found = capacity(moments, staircase, EngineConfig(token_budget=512))
    assert found.rps == pytest.approx(rps, abs=0.005)
    assert found.rps == pytest.approx(512 / 0.15316 / (prompt + output), rel=1e-8)
    assert found.bound == "compute"
    assert np.isinf(found.kv_rps)


def test_a_budget_between_steps_takes_the_best_full_step():
    moments = Moments.of([100], [100])
    at = {b: capacity(moments, staircase, EngineConfig(token_budget=b)).rps for b in (512, 513, 600, 640)}
    assert at[513] == pytest.approx(at[512]) == pytest.approx(at[600])
    assert at[640] > at[512]


def test_memory_limit_is_m_over_t_and_token_iterations():
    moments = workloads.get("fixed-500-200").moments()
    engine = EngineConfig(token_budget=8192, kv_blocks=20_000, block_size=1)
    found = capacity(moments, lambda *_: 0.02, engine)
    lifetime = sum(500 + j for j in range(200))
    assert moments.kv_token_iterations == pytest.approx(lifetime)
    assert found.kv_rps == pytest.approx(20_000 / (0.02 * lifetime))
    assert found.bound == "kv"
    assert found.decodes == pytest.approx(20_000 / (lifetime / 200))
    assert found.iteration_s == 0.02


def test_the_number_of_requests_limits_too():
    moments = Moments.of([100], [100])
    found = capacity(moments, linear, EngineConfig(token_budget=10_000, max_num_seqs=8))
    assert found.decodes == pytest.approx(8)
    assert found.compute_rps == pytest.approx(8 / (100 * linear(8, 0, 8 / 100 * 5000, 0, 8, 8 * 150.5)))


def test_a_rate_that_falls_is_cut_at_its_maximum():
    moments = Moments.of([1], [99])

    def crowded(P, NP, CX, KP, D, KV):
        return 0.01 + 1e-4 * D**2

    found = capacity(moments, crowded, EngineConfig(token_budget=1000))
    assert found.decodes == pytest.approx(10, abs=1)
    assert found.rps == capacity(moments, crowded, EngineConfig(token_budget=5000)).rps


def test_long_prompts_reread_their_context_in_chunks():
    seen = {}

    def watch(P, NP, CX, KP, D, KV):
        seen.update(NP=NP[-1], KP=KP[-1], P=P[-1], D=D[-1])
        return 0.01

    capacity(Moments.of([8192], [256]), watch, EngineConfig(token_budget=512))
    assert seen["P"] + seen["D"] == pytest.approx(512)
    chunk = seen["P"]
    assert seen["NP"] == pytest.approx(seen["D"] / 256 * 8192 / chunk)
    # k = 0, c, 2c, ... up to I - c: I / c chunks of mean (I - c) / 2
    assert seen["KP"] == pytest.approx(seen["NP"] * (8192 - chunk) / 2)


@given(
    st.integers(1, 20_000),
    st.integers(1, 5000),
    st.integers(64, 16_384),
    st.integers(1, 2000),
    st.integers(1, 50_000),
)
def test_more_of_anything_never_lowers_it(prompt, output, budget, seqs, blocks):
    moments = Moments.of([prompt], [output])
    engine = EngineConfig(token_budget=budget, max_num_seqs=seqs, kv_blocks=blocks)
    base = capacity(moments, linear, engine)
    assert 0 < base.rps == min(base.compute_rps, base.kv_rps)
    for more in ({"token_budget": 2 * budget}, {"max_num_seqs": 2 * seqs}, {"kv_blocks": 2 * blocks}):
        # Another budget also means other chunks, and other grid points: a small slack.
        assert capacity(moments, linear, engine.replace(**more)).rps >= base.rps * (1 - 1e-3)


def test_errors():
    moments = Moments.of([1], [1])
    with pytest.raises(InputError, match="nothing limits"):
        capacity(moments, linear, EngineConfig())
    with pytest.raises(InputError, match="no time"):
        capacity(moments, lambda *_: 0.0, EngineConfig(token_budget=8))
