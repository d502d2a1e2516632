"""No row falls above its cost model, no bound above what a schedule reaches."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.optimal.minorant import blends, linear_minorants
from llmsched_env import profiles
from llmsched_env.profiles import Profile

# ---------------------------------------------------------------------- minorants

TABLE: dict[str, Any] = {
    "prefill_tokens": [0, 100, 400],
    "decodes": [0, 4, 32],
    "context": [10, 200],
    "seconds": [
        [[0.9, 1.0], [1.0, 1.5], [1.5, 3.0]],
        [[1.1, 1.1], [1.2, 1.9], [1.6, 3.4]],
        [[2.0, 2.0], [2.2, 2.5], [2.6, 4.5]],
    ],
}
FORMS = [
    Profile("staircase", "staircase", {"c": 3.0, "a": 2.0, "b0": 7}),
    Profile("staircase-fraction", "staircase", {"c": 0.1, "a": 2.0, "b0": 3.3}),
    Profile("piecewise", "piecewise", {"c": 3.0, "a": 2.0, "b0": 7}),
    Profile("piecewise-flat", "piecewise", {"c": 30.0, "a": 2.0, "b0": 7}),
    Profile("table", "table", TABLE),
    Profile(
        "table-one-context",
        "table",
        {**TABLE, "context": [50], "seconds": np.array(TABLE["seconds"])[:, :, :1].tolist()},
    ),
    Profile("table-falling", "table", {**TABLE, "seconds": np.array(TABLE["seconds"])[::-1].tolist()}),
    *(
        Profile(
            "noise", "table", {**TABLE, "seconds": np.random.default_rng(k).uniform(1, 2, (3, 3, 2)).tolist()}
        )
        for k in range(5)
    ),
]
ALL = [
    *map(profiles.get, profiles.names()),
    profiles.get("roofline:llama-3-8b@h100"),
    profiles.get("roofline:llama-3-70b@a100:tp4"),
    *FORMS,
]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), cpu=st.booleans())
@pytest.mark.parametrize("profile", ALL, ids=lambda p: p.name)
def test_no_batch_is_faster_than_a_row_says(profile: Profile, seed: int, cpu: bool) -> None:
    rng = np.random.default_rng(seed)
    if cpu:
        profile = profile.replace(cpu_s=0.1, cpu_s_per_request=0.01)
    chunk, prefills, decodes, context = (int(2 ** rng.uniform(0, k)) for k in (11, 4, 10, 14))
    prefill = int(rng.integers(chunk, chunk * prefills + 1))
    rows = linear_minorants(
        profile, max_prefill_tokens=prefill, max_decodes=decodes, max_context=context, max_chunk=chunk
    )
    assert rows.shape[1] == 5 and (rows >= 0).all()
    least = rng.choice([0.0, 0.9])  # all batches, or those near the limits
    features = []
    for _ in range(100):
        D = int(rng.integers(int(least * decodes), decodes + 1))
        reads = rng.integers(max(1, int(least * context)), context + 1, D)
        P, NP, CX, KP = 0, 0, 0.0, 0
        for _ in range(rng.integers(0 if D else 1, prefills + 2)):
            c = min(int(rng.integers(max(1, int(least * chunk)), chunk + 1)), prefill - P)
            if c < 1:
                break
            k = int(rng.integers(0, context))
            P, NP, CX, KP = P + c, NP + 1, CX + c * (k + c / 2), KP + k
        if P + D:
            features.append((P, NP, CX, KP, D, int(reads.sum())))
    f = np.array(features, np.float64)
    seconds = profile.time(*f.T)
    linear = np.stack([np.ones(len(f)), f[:, 0], f[:, 4], f[:, 5], f[:, 2]])
    assert (blends(rows) @ linear <= seconds * (1 + 1e-12)).all()


def test_rows_of_a_linear_model_are_the_model() -> None:
    profile = Profile("linear", "linear", {"c0": 1.0, "c1": 2.0, "c2": 3.0, "c3": 4.0, "c4": 5.0}, cpu_s=0.5)
    rows = linear_minorants(profile, max_prefill_tokens=9, max_decodes=9, max_context=9)
    assert rows.tolist() == [[1.5, 2.0, 3.0, 4.0, 5.0]]


def test_rows_reach_the_model() -> None:
    """Some row is exact, or nearly so, for a decode alone, and for the largest batch."""
    for name, (D, P) in itertools.product(
        ["a100-llama3-8b", "infermax-7b", "roofline:llama-3-8b@h100"], [(1, 0), (64, 448)]
    ):
        profile = profiles.get(name)
        rows = linear_minorants(profile, max_prefill_tokens=448, max_decodes=64, max_context=1000)
        seconds = profile.time(P, 1 if P else 0, P * P / 2, 0, D, D * 500)
        found = (rows @ np.array([1, P, D, D * 500, P * P / 2])).max()
        assert 0.9 * seconds <= found <= seconds * (1 + 1e-12)


def test_a_function_says_nothing() -> None:
    profile = Profile.custom(lambda P, NP, CX, KP, D, KV: 1.0 + P + D)
    rows = linear_minorants(profile, max_prefill_tokens=9, max_decodes=9, max_context=9)
    assert rows.tolist() == [[0.0] * 5]
