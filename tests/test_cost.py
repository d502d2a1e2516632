"""Batch times: published values, and the compiled forms against their plain twin."""

from __future__ import annotations

import csv
import itertools
import math

import numpy as np
import oracle_cost
import pytest

from llmsched_env import profiles
from llmsched_env.core import cost
from llmsched_env.core.compile import njit
from llmsched_env.core.span import span
from llmsched_env.errors import InputError
from llmsched_env.profiles import Profile


def decodes(n, context):
    return (0, 0, 0, 0, n, n * context)


def prefills(n, c, m=0):
    return (n * c, n, n * c * (m + c / 2), n * m, 0, 0)


def both(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


# Milliseconds of the published formula, 7B and 70B on 4 GPUs.
INFERMAX = [
    (decodes(1, 1), "2.7753", "19.3915"),
    (decodes(1, 1000), "3.0475", "19.4891"),
    (decodes(256, 400), "52.294", "78.199"),
    (decodes(1000, 100), "114.732", "220.336"),
    (prefills(1, 1024), "73.303", "197.143"),
    (prefills(4, 1024), "278.095", "699.724"),
    (prefills(1, 512, 3584), "58.544", "125.272"),
    (both(prefills(1, 512), decodes(128, 500)), "66.692", "149.743"),
]


@pytest.mark.parametrize(("batch", "small", "large"), INFERMAX)
def test_infermax_test_vectors(batch, small, large):
    for name, expected in (("infermax-7b", small), ("infermax-70b-tp4", large)):
        half_a_digit = 0.5 * 10.0 ** -len(expected.partition(".")[2])
        assert 1000 * profiles.get(name).time(*batch) == pytest.approx(
            float(expected), abs=1.001 * half_a_digit
        )


def test_infermax_floor_holds_for_small_batches_only():
    free, floored = profiles.get("infermax-7b"), profiles.get("infermax-7b-floor")
    assert floored.time(*decodes(1, 1)) == pytest.approx(
        free.time(*decodes(1, 1)) + 32e-3 * (0.29 - (0.00191 + 0.06486))
    )
    assert floored.time(*decodes(256, 400)) == free.time(*decodes(256, 400))


@pytest.mark.parametrize(
    ("b", "ms"),
    [(1, 46.75), (128, 46.75), (129, 82.22), (256, 82.22), (384, 117.69), (512, 153.16), (1024, 295.04)],
)
def test_staircase_of_codellama_34b(b, ms):
    profile = profiles.get("a100-codellama-34b")
    assert 1000 * profile.time(*decodes(b, 77)) == pytest.approx(ms, rel=1e-12)
    assert 1000 * profile.time(*prefills(1, b, 99)) == pytest.approx(ms, rel=1e-12)


@pytest.mark.parametrize(("b", "ms"), [(1, 45.5), (64, 45.5), (65, 45.8), (512, 45.5 + 0.3 * 448)])
def test_piecewise(b, ms):
    assert 1000 * profiles.get("piecewise-example").time(*decodes(b, 3)) == pytest.approx(ms, rel=1e-12)


def test_hinge_by_hand():
    profile = Profile("p", "hinge", {"h0": 1, "h1": 10, "h2": 2, "h3": 0.5, "h4": 0.25, "h5": 3})
    assert profile.time(0, 0, 0, 0, 4, 100) == 1 + 10 + 50 + 12
    assert profile.time(8, 1, 32, 0, 4, 100) == 1 + 24 + 50 + 8 + 12


def pretend_gpu(P, NP, CX, KP, D, KV):
    return max(0.004, 1e-5 * (P + D)) + 2e-9 * CX + 1e-7 * KV + 1e-8 * KP + 1e-6 * NP


TABLE = {
    "prefill_tokens": [0, 128, 1024],
    "decodes": [0, 1, 16, 64],
    "context": [100, 2000],
    "seconds": np.random.default_rng(1).uniform(0.01, 0.1, (3, 4, 2)).tolist(),
}
MADE = [
    *map(profiles.get, profiles.names()),
    profiles.get("roofline:llama-3-8b@h100"),
    profiles.get("roofline:llama-3-70b@a100:tp4"),
    profiles.get("a100-llama3-8b").replace(name="with-cpu", cpu_s=1e-3, cpu_s_per_request=1e-5),
    Profile("table", "table", TABLE),
    Profile.custom(pretend_gpu),
]
named = pytest.mark.parametrize("profile", MADE, ids=lambda p: p.name)


def batches(n, seed=0):
    """Random batches, with and without prefills and decodes, as whole numbers but for the prefill context."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        kinds = rng.integers(1, 4)
        chunks = [
            (int(rng.integers(1, 2000)), int(rng.integers(0, 5000)))
            for _ in range(rng.integers(1, 5) if kinds & 1 else 0)
        ]
        contexts = rng.integers(1, 8000, rng.integers(1, 300) if kinds & 2 else 0)
        yield (
            sum(c for c, _ in chunks),
            len(chunks),
            float(sum(c * (k + c / 2) for c, k in chunks)),
            sum(k for _, k in chunks),
            len(contexts),
            int(contexts.sum()),
        )


@named
def test_compiled_equals_the_plain_twin(profile):
    many = list(batches(300))
    found = profile.time(*np.array(many).T)
    expected = [oracle_cost.batch_time(profile, *batch) for batch in many]
    if profile.form == "table":  # sums the same corners in another order
        np.testing.assert_allclose(found, expected, rtol=1e-13)
    else:
        assert found.tolist() == expected
    packed = profile.pack()
    assert packed.dtype == np.float64
    for batch, t in zip(many[:20], found[:20], strict=True):
        assert cost.batch_time(packed, *map(float, batch)) == t


@njit(cache=False)
def through_a_span(packed, P, NP, CX, KP, D, KV):
    view = span(packed)
    return cost.batch_time(view, P, NP, CX, KP, D, KV), cost.decode_line(view, D)


@named
def test_integers_and_spans_give_the_same(profile):
    packed = profile.pack()
    for P, NP, CX, KP, D, KV in batches(20, seed=1):
        t, line = through_a_span(packed, P, NP, CX, KP, D, KV)
        assert t == cost.batch_time(packed, float(P), float(NP), CX, float(KP), float(D), float(KV))
        np.testing.assert_equal(line, cost.decode_line(packed, float(D)))


@named
def test_decode_line_is_the_batch_time(profile):
    packed = profile.pack()
    for D, context in itertools.product((1, 2, 7, 100, 128, 129, 1000), (1, 500, 30000)):
        a, b = cost.decode_line(packed, D)
        if profile.form in ("table", "custom"):
            assert math.isnan(a) and math.isnan(b)
        else:
            assert a + b * D * context == pytest.approx(profile.time(*decodes(D, context)), rel=1e-12)
    if profile.form not in ("table", "custom"):
        assert cost.decode_line(packed, 0) == (0.0, 0.0)


@named
def test_an_empty_batch_takes_no_time(profile):
    assert profile.time(0, 0, 0, 0, 0, 0) == 0.0
    assert cost.batch_time(profile.pack(), 0, 0, 0.0, 0, 0, 0) == 0.0


@named
def test_time_grows_with_the_load(profile):
    if profile.name == "table":
        pytest.skip("random times")
    sizes = np.arange(1, 600)
    assert (np.diff(profile.time(0, 0, 0, 0, sizes, 1000 * sizes)) >= 0).all()
    assert (np.diff(profile.time(sizes, 1, sizes * sizes / 2, 0, 8, 8000)) >= 0).all()


def test_cpu_time_is_added():
    plain = profiles.get("h100-llama3-8b")
    slow = plain.replace(cpu_s=0.002, cpu_s_per_request=1e-4)
    batch = both(prefills(2, 100), decodes(5, 10))
    assert slow.time(*batch) - plain.time(*batch) == pytest.approx(0.002 + 7e-4, rel=1e-9)


def test_table_hits_its_points_and_goes_on_beyond():
    profile = Profile("t", "table", TABLE)
    for (i, p), (j, d), (k, c) in itertools.product(
        *(enumerate(TABLE[axis]) for axis in ("prefill_tokens", "decodes", "context"))
    ):
        if p + d > 0 and (d > 0 or k == 0):
            assert profile.time(p, p > 0, 0, 0, d, d * c) == pytest.approx(
                TABLE["seconds"][i][j][k], rel=1e-12
            )
    low = profile.time(0, 0, 0, 0, 16, 16 * 5)
    assert low == profile.time(0, 0, 0, 0, 16, 16 * 100)
    at, beyond = (profile.time(0, 0, 0, 0, 16, 16 * c) for c in (2000, 2095))
    slope = (TABLE["seconds"][0][2][1] - TABLE["seconds"][0][2][0]) / 1900
    assert beyond == pytest.approx(at + 95 * slope)
    assert profile.time(10**6, 9, 0, 0, 10**4, 10**9) >= np.min(TABLE["seconds"])


def test_table_from_a_file(tmp_path):
    path = tmp_path / "grid.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prefill_tokens", "decodes", "context", "seconds"])
        for p, d, c in itertools.product((0, 512), (0, 8, 32), (100, 1000)):
            if p + d and (d or c == 100):
                rows.writerow([p, d, c, 0.01 + 1e-4 * p + 1e-3 * d + 1e-6 * d * c])
        rows.writerow([512, 8, 100, 9])  # measured thrice
        rows.writerow([512, 8, 100, 0.001])
    profile = Profile.from_table(path, kv_tokens=5000)
    assert (profile.form, profile.name, profile.kv_tokens) == ("table", "grid", 5000)
    assert profile.time(512, 1, 0, 0, 0, 0) == pytest.approx(0.01 + 0.0512)
    assert profile.time(512, 1, 0, 0, 8, 800) == pytest.approx(0.01 + 0.0512 + 0.008 + 0.0008)
    assert profile.time(256, 1, 0, 0, 20, 20 * 550) == pytest.approx(0.01 + 0.0256 + 0.02 + 0.011)
    copy = tmp_path / "copy.json"
    profiles.save(profile, copy)
    assert (profiles.get(copy).pack() == profile.pack()).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks the column prefill_tokens"),
        ("prefill_tokens,decodes\n1,2\n", "lacks the column seconds"),
        ("prefill_tokens,decode,seconds\n1,2,3\n", "did you mean 'decodes'"),
        ("prefill_tokens,decodes,seconds\n", "no rows"),
        ("prefill_tokens,decodes,seconds\n0,1,x\n", "line 2: seconds 'x'"),
        ("prefill_tokens,decodes,seconds\n0,1\n", "line 2: 2 cells, but 3 columns"),
        ("prefill_tokens,decodes,seconds\n0,1,-1\n", "line 2: seconds '-1'"),
        ("prefill_tokens,decodes,seconds\n0,1,1\n8,0,1\n", "no row with prefill_tokens 8, decodes 1"),
        ("prefill_tokens,decodes,seconds\n0,1,1\n0,2,1\n", "measure both"),
        ("prefill_tokens,decodes,seconds\n0,1,0\n8,0,1\n8,1,1\n", "must be positive"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        Profile.from_table(path)
    assert message in str(raised.value)


def test_custom_takes_what_numba_compiled():
    numba = pytest.importorskip("numba")
    profile = Profile.custom(numba.njit(pretend_gpu), kv_tokens=1000, name="mine")
    assert (profile.name, profile.kv_tokens) == ("mine", 1000)
    assert profile.time(100, 1, 5000, 0, 3, 90) == pretend_gpu(100, 1, 5000, 0, 3, 90)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda P: P, "cannot compile"),
        (lambda P, NP, CX, KP, D, KV: "text", "cannot compile"),
        (lambda P, NP, CX, KP, D, KV: nowhere + P, "nowhere"),  # noqa: F821
        (lambda P, NP, CX, KP, D, KV: 0.0 * P, "must take time"),
        (lambda P, NP, CX, KP, D, KV: P / 0.0 - P / 0.0, "must take time"),
        (7, "is no function"),
    ],
)
def test_bad_custom_functions(function, message):
    with pytest.raises(InputError, match=r"^[^\n]+$") as raised:
        Profile.custom(function, name="f")
    assert message in str(raised.value)
