"""Workloads: fidelity to the traces, reproducibility, distributions, mixtures, bad options."""

import csv
import gzip
import math
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llmsched_env import workloads
from llmsched_env.errors import InputError
from llmsched_env.workloads import arrivals, lengths, predictions
from llmsched_env.workloads.lengths import Cells, Fixed, Lengths, Lognormal, Rank, Table, Uniform, Zipf
from llmsched_env.workloads.workload import RequestClass

TRACES = {
    "azure-conv": "azure_llm_2023_conv",
    "azure-code": "azure_llm_2023_code",
    "mooncake-conversation": "mooncake_fast25_conversation",
    "deepseek-r1": "servegen_deepseek_r1_6h_sample",
    "chatbot-arena": "vtc_chatbot_arena_10min",
    "arxiv-summarization": "arxiv_summarization_lengths",
}
TIMED = [name for name in TRACES if name != "arxiv-summarization"]
RENEWALS = [
    arrivals.Poisson(),
    arrivals.Gamma(0.5),
    arrivals.Gamma(3),
    arrivals.Weibull(0.5),
    arrivals.Weibull(3),
]
PROCESSES = [
    *RENEWALS,
    arrivals.Deterministic(),
    arrivals.Bursts(),
    arrivals.Bursts(10, 0.1, 20),
    arrivals.Ramp(),
    arrivals.Ramp(1, 0.2),
    arrivals.Diurnal(1, 500),
    arrivals.Profile((5, 0, 0, 90, 5), 10, 4, arrivals.Gamma(2)),
]


@lru_cache(maxsize=2)
def recorded(name: str) -> dict[str, np.ndarray]:
    """The columns of the trace that a table was fitted to."""
    path = Path(os.environ.get("LLMSCHED_SHARED", "/nowhere"), "data", "traces", f"{TRACES[name]}.csv.gz")
    if not path.exists():
        pytest.skip("set LLMSCHED_SHARED to the folder with data/traces")
    wanted = ("timestamp", "input_tokens", "output_tokens", "client")
    with gzip.open(path, "rt", newline="") as file:
        rows = csv.reader(file)
        header = next(rows)
        columns = [i for i, name in enumerate(header) if name in wanted]
        table = np.array([[float(row[i]) for i in columns] for row in rows])
    return {header[i]: table[:, k] for k, i in enumerate(columns)}


# -- fidelity


@pytest.mark.parametrize("name", TRACES)
def test_lengths_are_near_the_trace(name):
    trace = recorded(name)
    drawn = workloads.get(name, num_requests=100_000, rate=1.0).draw()
    pairs = ((trace["input_tokens"], drawn.prompt_tokens), (trace["output_tokens"], drawn.output_tokens))
    for real, ours in pairs:
        assert stats.ks_2samp(real, ours).statistic < 0.02
        assert ours.mean() == pytest.approx(real.mean(), rel=0.02)
        assert real.min() <= ours.min() and ours.max() <= real.max()
    real = stats.spearmanr(trace["input_tokens"], trace["output_tokens"]).statistic
    assert stats.spearmanr(drawn.prompt_tokens, drawn.output_tokens).statistic == pytest.approx(
        real, abs=0.03
    )
    moments = workloads.get(name).moments()
    expected = workloads.Moments.of(trace["input_tokens"], trace["output_tokens"])
    assert moments.kv_token_iterations == pytest.approx(expected.kv_token_iterations, rel=0.05)
    assert moments.prompt_squared == pytest.approx(expected.prompt_squared, rel=0.02)


@pytest.mark.parametrize("name", TIMED)
def test_arrivals_are_near_the_trace(name):
    times = np.sort(recorded(name)["timestamp"])
    drawn = workloads.get(name, num_requests=len(times)).draw().arrival_s
    minutes = np.arange(0, times[-1] + 60, 60)
    real, ours = np.histogram(times, minutes)[0], np.histogram(drawn, minutes)[0]
    assert abs(ours - real).sum() < 0.13 * real.sum()
    if name not in ("mooncake-conversation", "chatbot-arena"):  # nearly constant rates: mostly noise
        assert np.corrcoef(real, ours)[0, 1] > 0.9
    if name != "mooncake-conversation":  # its time stamps are rounded to 3 s
        gaps = np.diff(times)
        assert np.diff(drawn).std() / np.diff(drawn).mean() == pytest.approx(
            gaps.std() / gaps.mean(), rel=0.12
        )
    assert drawn[-1] == pytest.approx(times[-1], rel=0.05)


def test_silences_of_the_code_trace_are_there():
    gaps = np.diff(workloads.get("azure-code", num_requests=8819).draw().arrival_s)
    assert 190 < gaps.max() < 230


def test_tenants_of_chatbot_arena():
    trace = recorded("chatbot-arena")
    drawn = workloads.get("chatbot-arena", num_requests=30_000).draw()
    assert set(drawn.client) == set(range(27))
    real = np.bincount(trace["client"].astype(int)) / len(trace["client"])
    assert np.bincount(drawn.client) / 30_000 == pytest.approx(real, abs=0.01)
    for tenant in (1, 19, 2):
        mine = drawn.client == tenant
        theirs = trace["client"] == tenant
        assert stats.ks_2samp(drawn.prompt_tokens[mine], trace["input_tokens"][theirs]).statistic < 0.06


def test_tables_are_small_and_tell_their_source():
    import json

    folder = Path(workloads.__file__).parent / "data"
    assert {p.stem for p in folder.glob("*.json")} == set(TRACES)
    for path in folder.glob("*.json"):
        assert path.stat().st_size < 60_000
        table = json.loads(path.read_text())
        assert table["source"].startswith("github.com/") and table["licence"] and table["citation"]


# -- drawing


@pytest.mark.parametrize("name", [n for n in workloads.names() if n in TRACES or n.startswith("fixed")])
def test_every_name_draws_and_repeats(name):
    recipe = workloads.get(name, num_requests=300, rate=2.0, seed=7)
    one, two = recipe.draw(), recipe.draw()
    for column in ("arrival_s", "prompt_tokens", "output_tokens", "declared_tokens", "client"):
        assert np.array_equal(getattr(one, column), getattr(two, column))
    assert len(one) == 300
    assert workloads.summary(name)
    if not name.startswith("fixed"):
        other = workloads.get(name, num_requests=300, rate=2.0, seed=8).draw()
        assert not np.array_equal(one.prompt_tokens, other.prompt_tokens)
    assert (one.declared_tokens == predictions.power_of_two(one.declared_tokens[0])).all()
    assert (one.declared_tokens >= one.output_tokens).all()
    assert np.array_equal(one.predicted_tokens, one.output_tokens)


@pytest.mark.parametrize("name", ["azure-code", "fixed-7-9"])
def test_another_load_is_the_same_sequence_on_another_scale(name):
    low = workloads.get(name, num_requests=200, load=0.5, seed=3).draw(capacity_rps=10)
    high = workloads.get(name, num_requests=200, load=0.8, seed=3).draw(capacity_rps=10)
    rate = workloads.get(name, num_requests=200, rate=5.0, seed=3).draw()
    assert low.arrival_s == pytest.approx(high.arrival_s * 1.6)
    assert np.array_equal(low.arrival_s, rate.arrival_s)
    assert np.array_equal(low.prompt_tokens, high.prompt_tokens)


def test_streams_are_separate():
    base = workloads.get("azure-conv", rate=1.0, num_requests=100)
    other = workloads.get(
        "azure-conv", rate=1.0, num_requests=100, prediction="lognormal", arrivals="gamma:4"
    )
    assert np.array_equal(base.draw().output_tokens, other.draw().output_tokens)
    shorter = workloads.get("azure-conv", rate=1.0, num_requests=50)
    assert np.array_equal(base.draw().output_tokens[:50], shorter.draw().output_tokens)


def test_a_generator_of_the_caller_is_used_and_moves_on():
    recipe = workloads.get("azure-conv", num_requests=50)
    rng = np.random.default_rng(1)
    one, two = recipe.draw(rng=rng), recipe.draw(rng=rng)
    assert not np.array_equal(one.output_tokens, two.output_tokens)
    assert np.array_equal(one.output_tokens, recipe.draw(rng=np.random.default_rng(1)).output_tokens)


def test_the_mean_rate_is_the_one_asked_for_at_any_length():
    for n in (500, 2000):
        last = [
            workloads.get("azure-conv", num_requests=n, rate=4, seed=s).draw().arrival_s[-1] for s in range(8)
        ]
        assert n / np.mean(last) == pytest.approx(4, rel=0.05)


# -- arrivals


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_unit_rate_and_order(process):
    n = 20_000
    times = np.array([process.unit_times(n, np.random.default_rng(s)) for s in range(6)])
    assert times.shape == (6, n)
    assert (times >= 0).all() and (np.diff(times) >= 0).all()
    assert times[:, -1].mean() / n == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("process", RENEWALS, ids=repr)
def test_variation_of_gaps(process):
    gaps = np.diff(process.unit_times(200_000, np.random.default_rng(0)))
    assert gaps.std() / gaps.mean() == pytest.approx(getattr(process, "cv", 1), rel=0.05)


def test_bursts_ramp_and_diurnal_have_their_shape():
    rng = np.random.default_rng(0)
    bursts = arrivals.Bursts(10, 0.1, 100).unit_times(100_000, rng)
    counts = np.histogram(bursts, np.arange(0, bursts[-1], 1.0))[0]
    assert (counts == 0).mean() == pytest.approx(0.9, abs=0.03)  # silent in between
    times = arrivals.Ramp(0.5, 1.5).unit_times(50_000, rng) / 50_000
    halves = np.histogram(times, [0, 0.5, 1])[0] / 50_000
    assert halves == pytest.approx([0.375, 0.625], abs=0.01)
    day = arrivals.Diurnal(0.8, 1000).unit_times(100_000, rng) % 1000
    up, down = np.histogram(day, [0, 500, 1000])[0] / 100_000
    assert (up, down) == pytest.approx((0.5 + 0.8 / np.pi, 0.5 - 0.8 / np.pi), abs=0.01)


def test_a_profile_keeps_its_counts_and_repeats():
    process = arrivals.Profile((20, 0, 0, 100), 10.0, 5.0, arrivals.Deterministic())
    times = process.unit_times(240, np.random.default_rng(0)) / process.rate_rps(240)
    counts = np.histogram(times, [0, 10, 20, 30, 35, 45, 55, 65, 70])[0]
    assert counts.tolist() == [20, 0, 0, 100] * 2
    assert process.rate_rps(120) == pytest.approx(120 / 35)


def test_at_once_and_deterministic():
    assert (workloads.get("azure-conv", arrivals="at-once").draw().arrival_s == 0).all()
    even = workloads.get("fixed-5-5", num_requests=4, arrivals="deterministic", rate=2).draw()
    assert even.arrival_s.tolist() == [0, 0.5, 1.0, 1.5]


# -- lengths

MARGINALS = [
    Fixed(7),
    Uniform(3, 9),
    Lognormal(100, 1.2, 5000),
    Zipf(1.3, 1000),
    Table((4, 5, 9, 100), (0, 5, 5, 10)),
]


@pytest.mark.parametrize("marginal", MARGINALS, ids=repr)
def test_marginals_are_monotone_whole_and_bounded(marginal):
    u = np.linspace(0, 1, 5001)[:-1]
    x = marginal.quantile(u)
    assert x.dtype == np.int64 and (np.diff(x) >= 0).all()
    assert x[0] >= 1 and marginal.quantile(np.array([np.nextafter(1, 0)]))[0] <= marginal.largest


def test_marginal_values():
    u = (np.arange(70_000) + 0.5) / 70_000
    assert np.bincount(Uniform(3, 9).quantile(u))[3:].tolist() == [10_000] * 7
    drawn = np.log(Lognormal(1000, 0.5, 10**6).quantile(u))
    assert (np.median(drawn), drawn.std()) == pytest.approx((math.log(1000), 0.5), abs=2e-3)
    counts = np.bincount(Zipf(2, 50).quantile(u))
    assert counts[1] / counts[2] == pytest.approx(4, rel=1e-3)
    table = Table((4, 5, 9, 100), (0, 5, 5, 10)).quantile(u)
    assert (table == 5).mean() == 0.5 and table.max() == 100 and table[table > 5].min() == 10


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=300), st.sampled_from([0.001, 0.01, 0.05]))
@settings(max_examples=60)
def test_a_fitted_table_is_within_its_tolerance(values, tolerance):
    table = Table.of(values, tolerance)
    drawn = table.quantile((np.arange(60_000) + 0.5) / 60_000)
    at = np.arange(0, 3002)
    real = np.searchsorted(np.sort(values), at, "right") / len(values)
    ours = np.searchsorted(drawn, at, "right") / len(drawn)
    assert np.abs(real - ours).max() <= tolerance + 1e-4
    assert drawn.min() == min(values) and drawn.max() == max(values) == table.largest


@pytest.mark.parametrize("correlation", [-1, -0.6, 0, 0.3, 0.9, 1])
def test_rank_correlation(correlation):
    u = np.random.default_rng(0).random((50_000, 2))
    prompt, output = Lengths(Lognormal(500, 1), Lognormal(200, 1), Rank(correlation)).tokens(u)
    assert stats.spearmanr(prompt, output).statistic == pytest.approx(correlation, abs=0.015)
    assert lengths.rank_correlation(prompt, output) == pytest.approx(
        stats.spearmanr(prompt, output).statistic
    )
    assert stats.kstest(Rank(correlation).pair(u)[:, 1], "uniform").statistic < 0.01


def test_cells_keep_the_margins_and_the_dependence():
    rng = np.random.default_rng(0)
    x = rng.integers(1, 500, 20_000)
    y = np.where(x < 50, 1000, x // 2 + rng.integers(1, 100, 20_000))
    cells = Cells.of(x, y, np.linspace(0, 1, 21))
    pair = cells.pair(rng.random((50_000, 2)))
    assert stats.kstest(pair[:, 1], "uniform").statistic < 0.01
    assert stats.spearmanr(*pair.T).statistic == pytest.approx(stats.spearmanr(x, y).statistic, abs=0.03)


def test_dependences_are_those_of_numpy_to_the_last_bit():
    u = np.random.default_rng(0).random((5000, 2))
    levels, counts = (0.0, 0.1, 0.6, 1.0), ((0, 5, 2), (1, 0, 0), (0, 0, 0))
    row = np.searchsorted(levels, u[:, 0], side="right") - 1
    sums = np.cumsum([(0, *c) for c in counts], axis=1)
    second = [np.interp(v * sums[k][-1], sums[k], levels) for k, v in zip(row, u[:, 1], strict=True)]
    assert (Cells(levels, counts).pair(u)[:, 1] == np.minimum(second, np.nextafter(1, 0))).all()
    r = 2 * math.sin(math.pi * 0.4 / 6)
    normal = r * lengths.normal_quantile(u[:, 0]) + math.sqrt(1 - r * r) * lengths.normal_quantile(u[:, 1])
    assert (Rank(0.4).pair(u)[:, 1] == lengths.normal_cdf(normal)).all()


def test_classes_are_drawn_together_as_one_by_one():
    table, short = Table((0, 9, 50), (0, 3, 7)), Table((4, 5), (0, 1))
    ties = (Rank(0.5), Cells((0.0, 0.5, 1.0), ((1, 2), (3, 0))), Rank(), Cells((0.0, 1.0), ((1,),)))
    classes = [Lengths(table, short if i % 2 else table, tie) for i, tie in enumerate(ties)]
    rng = np.random.default_rng(0)
    kind, u = rng.integers(0, 4, 2000), rng.random((2000, 2))
    for mixed in (classes, [*classes[:3], Lengths(Uniform(3, 9), table)]):
        prompt, output = lengths.Mixture(mixed).tokens(kind, u)
        for k, one in enumerate(mixed):
            alone = one.tokens(u[kind == k])
            assert (prompt[kind == k] == alone[0]).all() and (output[kind == k] == alone[1]).all()


@pytest.mark.parametrize(
    "name, prompt, output, client",
    [
        ("azure-conv", [4077, 392, 1009, 374], [64, 97, 404, 87], [0, 0, 0, 0]),
        ("chatbot-arena", [551, 12, 69, 8], [512, 254, 425, 206], [19, 19, 1, 2]),
        ("deepseek-r1", [4114, 19, 50, 16], [346, 1260, 1469, 1396], [0, 0, 0, 0]),
    ],
)
def test_what_a_seed_draws_stays(name, prompt, output, client):
    drawn = workloads.get(name, num_requests=4, rate=1.0, seed=7).draw()
    assert drawn.prompt_tokens.tolist() == prompt and drawn.output_tokens.tolist() == output
    assert drawn.client.tolist() == client


def test_normal_tables():
    u = np.array([1e-6, 0.01, 0.3, 0.5, 0.9, 0.9999])
    assert lengths.normal_quantile(u) == pytest.approx(stats.norm.ppf(u), abs=1e-4)
    z = np.linspace(-5, 5, 101)
    assert lengths.normal_cdf(z) == pytest.approx(stats.norm.cdf(z), abs=1e-6)


# -- predictions and declared maxima

OUTPUT = np.random.default_rng(0).integers(1, 1000, 50_000)


def predicted(spec):
    return predictions.get(spec).predict(OUTPUT, np.random.default_rng(1))


def test_predictions():
    assert np.array_equal(predicted("oracle"), OUTPUT)
    assert np.isnan(predicted("none")).all()
    error = np.log(predicted("lognormal:0.4")[OUTPUT > 20] / OUTPUT[OUTPUT > 20])
    assert (error.mean(), error.std()) == pytest.approx((0, 0.4), abs=0.01)
    bucket = predicted("bucket:100")
    assert ((bucket >= OUTPUT) & (bucket - OUTPUT < 100) & (bucket % 100 == 0)).all()
    assert (predicted("bucket:100,0.8") == bucket).mean() == pytest.approx(0.8, abs=0.02)
    bit = predicted("one-bit")
    is_long = np.median(OUTPUT) < OUTPUT
    assert np.unique(bit).tolist() == pytest.approx([OUTPUT[~is_long].mean(), OUTPUT[is_long].mean()])
    wrong = (predicted("one-bit:0,0.1") != bit).mean()
    assert wrong == pytest.approx(0.1, abs=0.01)


def test_declared_maxima():
    def declare(spec):
        return predictions.get_declared(spec).declare(OUTPUT, 999, np.random.default_rng(2))

    assert (declare("power-of-two") == 1024).all()
    assert (declare(2000) == 2000).all() and (declare("cap:999") == 999).all()
    assert np.array_equal(declare("exact"), OUTPUT)
    over = declare("lognormal:0.7")
    assert (over >= OUTPUT).all() and over.max() <= 1024 and (over > OUTPUT).mean() > 0.8
    assert [predictions.power_of_two(n) for n in (1, 2, 3, 1024, 1025)] == [1, 2, 4, 1024, 2048]


# -- mixtures, limits, moments


@pytest.fixture
def mixture():
    classes = [
        RequestClass(
            Lengths(Fixed(10), Fixed(2)), share=3, client=4, class_id=0, priority=1, ttft_target_s=0.5
        ),
        RequestClass(Lengths(Fixed(30), Uniform(5, 9)), share=1, client=9, class_id=1, tpot_target_s=0.1),
    ]
    workloads.register("two-classes", classes, arrivals="gamma:2", rate=3.0, summary="for tests")
    yield "two-classes"
    workloads._registered.pop("two-classes")


def test_mixture(mixture):
    drawn = workloads.get(mixture, num_requests=20_000).draw()
    first = drawn.class_id == 0
    assert first.mean() == pytest.approx(0.75, abs=0.01)
    assert (drawn.prompt_tokens[first] == 10).all() and (drawn.prompt_tokens[~first] == 30).all()
    assert (drawn.client[first] == 4).all() and (drawn.client[~first] == 9).all()
    assert (drawn.priority[first] == 1).all() and (drawn.ttft_target_s[first] == 0.5).all()
    assert np.isinf(drawn.ttft_target_s[~first]).all() and (drawn.tpot_target_s[~first] == 0.1).all()
    assert (drawn.declared_tokens == 16).all()
    assert drawn.arrival_s[-1] == pytest.approx(20_000 / 3, rel=0.05)
    moments = workloads.get(mixture).moments()
    assert moments.prompt == pytest.approx(0.75 * 10 + 0.25 * 30, rel=1e-3)
    assert moments.output == pytest.approx(0.75 * 2 + 0.25 * 7, rel=1e-3)
    assert "two-classes" in workloads.names() and workloads.summary(mixture) == "for tests"
    everyone = workloads.get(mixture, num_requests=100, ttft_target_s=2.0).draw()
    assert (everyone.ttft_target_s == 2).all()


def test_limits_cut_lengths():
    drawn = workloads.get(
        "azure-conv", num_requests=5000, max_prompt=2000, max_output=300, max_total=2100
    ).draw()
    assert drawn.prompt_tokens.max() <= 2000 and drawn.output_tokens.max() == 300
    assert (drawn.prompt_tokens + drawn.output_tokens).max() == 2100
    assert (drawn.declared_tokens == 512).all()
    assert (
        workloads.get("azure-conv", max_output=300).moments().output
        < workloads.get("azure-conv").moments().output
    )


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_moments_of_fixed_lengths_are_exact(prompt, output):
    moments = workloads.Moments.of([prompt], [output])
    assert moments.kv_token_iterations == sum(prompt + j for j in range(output))
    assert moments.prefill_context == prompt**2 / 2
    assert moments.kv_held == pytest.approx(prompt + (output - 1) / 2)


def test_moments_agree_with_draws():
    drawn = workloads.get("mooncake-conversation", num_requests=200_000).draw()
    ours = workloads.get("mooncake-conversation").moments()
    sample = workloads.Moments.of(drawn.prompt_tokens, drawn.output_tokens)
    assert ours.prompt == pytest.approx(sample.prompt, rel=0.02)
    assert ours.kv_token_iterations == pytest.approx(sample.kv_token_iterations, rel=0.02)


# -- what users get wrong


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("azure-con", {}, "did you mean 'azure-conv'"),
        ("fixed-100", {}, "did you mean 'fixed-100-100'"),
        ("fixed-0-5", {}, "1 <= low"),
        ("azure-conv", {"load": 0.5, "rate": 1.0}, "exclude each other"),
        ("azure-conv", {"num_request": 5}, "did you mean 'num_requests'"),
        ("azure-conv", {"num_requests": 0}, "num_requests"),
        ("azure-conv", {"num_requests": 2.5}, "num_requests"),
        ("azure-conv", {"load": -1}, "load must be a positive"),
        ("azure-conv", {"rate": math.nan}, "rate must be a positive"),
        ("azure-conv", {"arrivals": "poison"}, "did you mean 'poisson'"),
        ("azure-conv", {"arrivals": "gamma:x"}, "must be numbers"),
        ("azure-conv", {"arrivals": "gamma:1,2"}, "takes 1"),
        ("azure-conv", {"arrivals": "poisson", "cv": 2}, "goes with"),
        ("azure-conv", {"cv": -2}, "cv must be a positive"),
        ("azure-conv", {"arrivals": "at-once", "rate": 2}, "at once"),
        ("azure-conv", {"arrivals": "bursts:9,0.5"}, "do not fit"),
        ("azure-conv", {"prediction": "oracel"}, "did you mean 'oracle'"),
        ("azure-conv", {"prediction": "lognormal:-1"}, "sigma"),
        ("azure-conv", {"prediction": "bucket:0"}, "width"),
        ("azure-conv", {"declared": "exacty"}, "did you mean 'exact'"),
        ("azure-conv", {"declared": "cap"}, "needs its tokens"),
        ("azure-conv", {"max_total": 1}, "max_total"),
        ("azure-conv", {"ttft_target_s": 0}, "ttft_target_s"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(InputError, match=message) as error:
        workloads.get(name, **options)
    assert "\n" not in str(error.value)


def test_bad_draws():
    with pytest.raises(InputError, match="no rate of its own"):
        workloads.get("fixed-5-5").draw()
    with pytest.raises(InputError, match="capacity"):
        workloads.get("fixed-5-5", load=0.5).draw()
    with pytest.raises(InputError, match="below the longest output"):
        workloads.get("azure-conv", declared=100).draw()
    with pytest.raises(InputError, match="package's own"):
        workloads.register("azure-conv", Lengths(Fixed(1), Fixed(1)))
    with pytest.raises(InputError, match="shares"):
        workloads.register("mine", [RequestClass(Lengths(Fixed(1), Fixed(1)), share=0)])
    for wrong in (lambda: Fixed(0), lambda: Uniform(5, 2), lambda: Rank(2), lambda: Table((1, 1), (0, 1))):
        with pytest.raises(InputError):
            wrong()
