"""Scenarios: all resolve, repeat and draw what fits; the toy's optimum; YAML there and back; errors."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import baselines
from agents.cli import main
from llmsched_env import EngineConfig, InputError, Requests, profiles, scenarios, simulate, workloads
from llmsched_env.profiles import Profile
from llmsched_env.scenarios import Problem, Reference, Scenario, get, load, reference
from llmsched_env.scenarios.scenario import first_episode_seed
from llmsched_env.workloads import RequestClass, Shuffled, Synthetic
from llmsched_env.workloads.lengths import Fixed, Lengths, Lognormal, Rank, Uniform

NAMES = scenarios.names()
FIELDS = [f.name for f in dataclasses.fields(Requests) if f.name != "names"]


@pytest.fixture(scope="module", params=NAMES)
def problem(request: pytest.FixtureRequest) -> Problem:
    return scenarios.get(request.param).resolve()


def same(a: Requests, b: Requests) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f), equal_nan=True) for f in FIELDS)


# -- the ready-made ones


def test_what_there_is() -> None:
    assert {
        "toy",
        "infermax-contention",
        "azure-conv",
        "azure-code",
        "long-context",
        "reasoning",
        "multi-tenant",
        "slo-mix",
        "priorities",
        "point-c",
        "summarization",
        "stream",
    } <= set(NAMES)


def test_draws_repeat_one_by_one_and_in_blocks(problem: Problem) -> None:
    rng = np.random.default_rng(5)
    episodes = [problem.draw(rng) for _ in range(6)]
    rng = np.random.default_rng(5)
    first, rest = [problem.draw(rng) for _ in range(2)], [problem.draw(rng) for _ in range(4)]
    assert all(same(a, b) for a, b in zip(episodes, first + rest, strict=True))
    if problem.scenario.name != "point-c":  # always the same
        assert not same(episodes[0], episodes[1])


def test_every_request_of_many_draws_fits(problem: Problem) -> None:
    engine, rng = problem.engine, np.random.default_rng(1)
    assert engine.max_model_len is not None and engine.kv_blocks is not None
    longest = 0
    for _ in range(200):
        r = problem.draw(rng)
        assert len(r) == problem.num_requests == problem.scenario.num_requests
        total = r.prompt_tokens.astype(np.int64) + r.declared_tokens
        longest = max(longest, int(total.max()))
        assert r.class_id.max() < len(problem.class_means) and r.client.max() < problem.num_clients
        assert not np.isnan(r.predicted_tokens).any()
        if math.isfinite(problem.scenario.horizon_s):
            assert r.arrival_s[-1] > problem.scenario.horizon_s
    assert longest <= engine.max_model_len
    assert -(-longest // engine.block_size) < engine.kv_blocks


def test_what_is_settled(problem: Problem) -> None:
    settled = {k: v for k, v in dataclasses.asdict(problem.engine).items() if k != "cpu_blocks"}
    assert None not in settled.values()
    rng, drawn = np.random.default_rng(2), []
    while sum(map(len, drawn)) < 20_000:
        drawn.append(problem.draw(rng))
    output, kind = (np.concatenate([getattr(r, f) for r in drawn]) for f in ("output_tokens", "class_id"))
    for i, mean in enumerate(problem.class_means):
        assert output[kind == i].mean() == pytest.approx(mean, rel=0.05)
    if math.isfinite(problem.rate_rps):
        span = sum(r.arrival_s[-1] for r in drawn)
        assert len(output) / span == pytest.approx(problem.rate_rps, rel=0.1)
        if problem.scenario.workload.load is not None:
            load = problem.scenario.workload.load
            assert problem.rate_rps == pytest.approx(load * problem.capacity.rps)
    else:
        assert all((r.arrival_s == 0).all() for r in drawn)
    assert problem.class_means.dtype == np.float64
    reseeded = problem.scenario.replace(seed=99) if "seed" in problem.workload.options() else problem.scenario
    assert reseeded.resolve().engine == problem.engine
    again = pickle.loads(pickle.dumps(problem))
    assert same(again.draw(np.random.default_rng(3)), problem.draw(np.random.default_rng(3)))


def test_time_scale_is_that_of_a_request_alone(problem: Problem) -> None:
    moments = problem.workload.moments()
    alone = Requests.of([0.0], [round(moments.prompt)], [round(moments.output)])
    took = simulate(alone, baselines.get("vllm-v1"), problem.profile, problem.engine).finish_s[0]
    assert problem.time_scale_s == pytest.approx(took, rel=0.15)


def test_an_episode_is_served(problem: Problem) -> None:
    horizon = problem.scenario.horizon_s
    requests = problem.draw(np.random.default_rng(0))
    done = simulate(
        requests, baselines.get("vllm-v1"), problem.profile, problem.engine, horizon_s=horizon
    ).finish_s
    assert np.isfinite(done).all() == math.isinf(horizon)


def test_targets_tell_good_from_bad(problem: Problem) -> None:
    if problem.scenario.name != "toy":
        r = problem.draw(np.random.default_rng(0))
        assert np.isfinite(r.ttft_target_s).all() and np.isfinite(r.tpot_target_s).all()


# -- the toy


def test_the_optimum_of_the_toy_by_brute_force() -> None:
    problem = scenarios.get("toy").resolve()
    fcfs, outputs = baselines.get("vllm-v1"), problem.draw(np.random.default_rng(0)).output_tokens
    assert sorted(outputs) == [1, 2, 4, 8, 16, 32]
    means = []
    for order in itertools.permutations(outputs):
        requests = Requests.of(np.zeros(6), np.full(6, 8), order)
        means.append(simulate(requests, fcfs, problem.profile, problem.engine).finish_s.mean())
    assert min(means) == problem.scenario.optimum == 20.0
    assert np.mean(means) == 36.75
    rng = np.random.default_rng(1)
    for _ in range(10):
        requests = problem.draw(rng)
        for name in ("sjf", "srpt"):
            served = simulate(requests, baselines.get(name), problem.profile, problem.engine)
            assert served.finish_s.mean() == 20.0


def test_orders_of_the_toy_are_equally_likely() -> None:
    problem, rng = scenarios.get("toy").resolve(), np.random.default_rng(0)
    first = np.array([problem.draw(rng).output_tokens for _ in range(3000)])
    assert first.mean(axis=0) == pytest.approx([10.5] * 6, rel=0.07)


# -- what the others are about


def mean_latency(scenario: Scenario, scheduler: str, episodes: int = 2) -> float:
    problem, rng = scenario.resolve(), np.random.default_rng(0)
    latency = 0.0
    for _ in range(episodes):
        requests = problem.draw(rng)
        served = simulate(requests, baselines.get(scheduler), problem.profile, problem.engine)
        latency += float((served.finish_s - requests.arrival_s).mean()) / episodes
    return latency


def test_preempting_beats_reserving_under_contention() -> None:
    scenario = scenarios.get("infermax-contention")
    reserving = mean_latency(scenario, "infermax-vllm-no-evict")
    assert reserving > 1.7 * mean_latency(scenario, "infermax-vllm")


def test_batches_of_point_c_should_be_small() -> None:
    greedy, small = (scenarios.get("point-c", token_budget=c) for c in (1024, 128))
    assert mean_latency(greedy, "dai-sarathi", 1) > 1.2 * mean_latency(small, "dai-sarathi", 1)
    problem = small.resolve()
    assert problem.rate_rps == pytest.approx(1 / 0.4675, rel=1e-12)
    assert problem.capacity.rps == pytest.approx(problem.rate_rps, rel=1e-6)


@pytest.mark.parametrize("name", ["azure-conv", "long-context", "multi-tenant", "slo-mix", "priorities"])
def test_the_order_matters(name: str) -> None:
    scenario = scenarios.get(name)
    assert mean_latency(scenario, "vllm-v1", 4) > 1.1 * mean_latency(scenario, "svf", 4)


# -- changes


def test_changes() -> None:
    changed = scenarios.get("azure-conv", load=0.8, num_requests=20, kv_blocks=2000, prediction="oracle")
    workload = changed.workload
    assert isinstance(workload, Synthetic)
    assert (workload.load, changed.num_requests, changed.engine.kv_blocks) == (0.8, 20, 2000)
    problem = changed.resolve()
    drawn = problem.draw(np.random.default_rng(0))
    assert len(drawn) == 20 and (drawn.predicted_tokens == drawn.output_tokens).all()
    assert problem.rate_rps == pytest.approx(0.8 * problem.capacity.rps)
    assert scenarios.get("azure-conv").workload.load == 1.1  # a copy
    at_rate = changed.replace(rate=3.0)
    assert at_rate.workload.load is None and at_rate.resolve().rate_rps == 3.0
    assert at_rate.replace(load=0.5).workload.rate is None
    at_once = changed.replace(load=None, arrivals="at-once")
    assert at_once.resolve().rate_rps == math.inf
    for scenario in (changed.replace(ttft_target_s=0.5), changed.replace(workload=at_once.workload)):
        assert isinstance(scenario, Scenario)
    assert scenarios.get(changed) is changed and scenarios.get(changed, horizon_s=5).horizon_s == 5


def test_an_optimum_is_of_its_own_problem() -> None:
    toy = scenarios.get("toy")
    assert toy.replace(summary="the same").optimum == 20.0
    assert toy.replace(outputs=(1, 1)).optimum is None
    assert toy.replace(outputs=(1, 1), optimum=1.5).optimum == 1.5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lod": 0.9}, "unknown setting of scenario azure-conv 'lod'; did you mean 'load'?"),
        ({"kv_block": 9}, "did you mean 'kv_blocks'?"),
        ({"load": "much"}, "load must be a positive number, not 'much'"),
        ({"load": 0.9, "rate": 1.0}, "exclude each other"),
        ({"arrivals": "at-once"}, "a load means nothing"),
        ({"num_requests": 0}, "num_requests must be a whole number"),
        ({"horizon_s": -1}, "horizon_s must be positive seconds, not -1"),
        ({"horizon_s": math.nan}, "horizon_s must be positive"),
        ({"optimum": "low"}, "optimum must be positive seconds"),
        ({"workload": "azure-conv"}, "workload cannot be 'azure-conv'"),
        ({"profile": 3}, "profile cannot be 3"),
        ({"name": None}, "name cannot be None"),
        ({"prediction": "lognormel"}, "did you mean 'lognormal'?"),
        ({"arrivals": 3}, "arrivals 3 is no process"),
        ({"cv": "x"}, "cv must be a positive number"),
        ({"max_prompt": "x"}, "max_prompt must be a whole number"),
    ],
)
def test_bad_changes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        scenarios.get("azure-conv", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"profile": "a100-lama"}, "did you mean"),
        ({"max_model_len": 1024}, "declared with up to 1024 tokens, which leaves no room for prompts"),
        ({"kv_blocks": 60}, "cut them with max_output"),
        ({"declared": 10}, "below the longest output"),
        ({"profile": "roofline:llama-3-8b@h100", "kv_blocks": 1}, "leaves no room"),
    ],
)
def test_what_does_not_fit_is_said_when_it_is_resolved(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        scenarios.get("azure-conv", **changes).resolve()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_prompts_are_cut_to_what_fits() -> None:
    problem = scenarios.get("azure-conv", max_model_len=1500).resolve()
    rng = np.random.default_rng(0)
    assert max(problem.draw(rng).prompt_tokens.max() for _ in range(20)) == 1500 - 1024
    problem = scenarios.get("azure-conv", kv_blocks=100, watermark=0.05).resolve()
    assert problem.engine.max_model_len == (100 - 5 - 1) * 16
    with pytest.raises(InputError, match="do not fit in the engine's 16"):
        scenarios.get("toy", kv_blocks=2, max_model_len=31).resolve()


def test_declared_maxima_bound_the_model_length() -> None:
    for declared, longest in (("exact", 5096), (2000, 6096), ("lognormal:1", 5120), ("power-of-two", 5120)):
        problem = scenarios.get("azure-conv", declared=declared).resolve()
        assert problem.engine.max_model_len == longest
    assert (
        scenarios.get("azure-conv", declared="exact", max_total=3000).resolve().engine.max_model_len == 3000
    )


def test_recorded_requests_make_a_scenario(tmp_path: Path) -> None:
    requests = Requests.of(
        [1.0, 2.0, 4.0],
        [10, 20, 30],
        [5, 6, 7],
        declared_tokens=[9, 9, 9],
        client=[0, 4, 0],
        class_id=[0, 2, 2],
    )
    scenario = Scenario("recorded", workloads.Replay("trace", requests), "a100-llama3-8b")
    problem = scenario.resolve()
    assert (problem.num_requests, problem.num_clients, problem.engine.max_model_len) == (3, 5, 39)
    assert problem.class_means.tolist() == [5, 6, 6.5]
    assert problem.rate_rps == pytest.approx(2 / 3)
    assert same(problem.draw(np.random.default_rng(0)), requests)
    assert scenario.replace(num_requests=2, load=0.5, prediction="lognormal:1").resolve().num_requests == 2
    for declared, longest in (("exact", 37), ("power-of-two", 38), (100, 130)):
        problem = scenario.replace(declared=declared).resolve()
        assert problem.engine.max_model_len == longest
        total = [r.prompt_tokens + r.declared_tokens for r in (problem.draw(np.random.default_rng(0)),)]
        assert np.max(total) <= longest
    with pytest.raises(InputError, match="from 1 to 3"):
        scenario.replace(num_requests=4)
    with pytest.raises(InputError, match="cannot be written as YAML"):
        scenario.to_yaml()


def test_a_workload_of_ones_own() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(workloads.Workload):
        name: str = "mine"
        size: int = 3
        load: float | None = None
        rate: float | None = None

        def draw(self, capacity_rps: float | None = None, rng: np.random.Generator | None = None) -> Requests:
            return Requests.of(np.zeros(self.size), np.full(self.size, 10), np.full(self.size, 4))

        def moments(self) -> workloads.Moments:
            return workloads.Moments.of([10], [4])

    problem = Scenario("mine", Mine(), "a100-llama3-8b").replace(size=5).resolve()
    assert problem.num_requests == problem.scenario.num_requests == 5
    assert problem.engine.max_model_len == 14 and problem.class_means.tolist() == [4]
    assert problem.rate_rps == math.inf
    with pytest.raises(InputError, match="did you mean 'size'"):
        problem.scenario.replace(sise=5)
    with pytest.raises(InputError, match="a Mine cannot be written as YAML"):
        problem.scenario.to_yaml()


def test_shuffled_lengths_are_checked() -> None:
    with pytest.raises(InputError, match="at least 1"):
        Shuffled("mine", (3, 0))
    with pytest.raises(InputError, match="at least one request"):
        Shuffled("mine", ())
    assert same(Shuffled("mine", (3, 1, 2), seed=1).draw(), Shuffled("mine", (3, 1, 2), seed=1).draw())


# -- the registry


def test_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "_registered", {})
    mine = scenarios.get("azure-conv", name="mine", load=0.9)
    scenarios.register(mine)
    assert scenarios.get("mine") is mine and "mine" in scenarios.names()
    scenarios.register(mine.replace(load=0.8))
    assert scenarios.get("mine").workload.load == 0.8
    with pytest.raises(InputError, match="package's own"):
        scenarios.register(mine.replace(name="toy"))
    with pytest.raises(InputError, match="is not a Scenario"):
        scenarios.register("toy")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown scenario 'toi'; did you mean 'toy'"):
        scenarios.get("toi")
    with pytest.raises(InputError, match="unknown scenario 'None'"):
        scenarios.get(None)  # type: ignore[arg-type]


def test_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "scenarios"]) == 0
    out = capsys.readouterr().out
    assert all(any(line.startswith(f"{name} ") for line in out.splitlines()) for name in NAMES)
    for text in ("requests", "load", "profile", "at once", "2.14/s", "a100-codellama-34b"):
        assert text in out
    assert main(["list"]) == 0
    assert out in capsys.readouterr().out


# -- YAML


@pytest.mark.parametrize("name", NAMES)
def test_yaml_there_and_back(name: str, tmp_path: Path) -> None:
    scenario = scenarios.get(name)
    scenario.save(tmp_path / "again.yaml")
    again = scenarios.get(tmp_path / "again.yaml")
    assert again == scenario
    ours, theirs = (s.resolve().draw(np.random.default_rng(0)) for s in (scenario, again))
    assert same(ours, theirs)


def test_yaml_of_scenarios_made_in_python(tmp_path: Path) -> None:
    lengths = Lengths(Lognormal(150, 0.8), Uniform(20, 200), Rank(0.3))
    classes = (
        RequestClass(lengths, share=2.5, client=3, ttft_target_s=1e-3),
        RequestClass(Lengths(Fixed(3), Fixed(4))),
    )
    workload = Synthetic("mine", classes, num_requests=7).replace(
        rate=0.1,
        arrivals="bursts:5,0.15",
        prediction="bucket:64,0.9",
        declared="lognormal:0.5",
        max_total=100,
    )
    profile = profiles.get("a100-llama3-8b")
    made = Scenario("mine", workload, profile, EngineConfig(swap_overlap=True, watermark=0.01), 1e-5, "é: #")
    path = tmp_path / "mine.yml"
    made.save(path)
    again = scenarios.load(path)
    assert again == made.replace(profile="a100-llama3-8b")
    assert again.workload == workload
    odd = made.replace(profile=profile.replace(name="odd", cpu_s=0.25))
    odd.save(path)
    assert scenarios.load(path) == odd
    custom = Profile.custom(lambda P, NP, CX, KP, D, KV: 0.01, kv_tokens=1000)
    with pytest.raises(InputError, match="custom, a function"):
        made.replace(profile=custom).to_yaml()
    table = workloads.get("azure-conv").classes[0].lengths
    with pytest.raises(InputError, match="cannot be written as YAML"):
        made.replace(
            workload=Synthetic("x", (RequestClass(Lengths(table.prompt, Fixed(3))),), rate=1)
        ).to_yaml()
    with pytest.raises(InputError, match=r"arrivals .* cannot be written as YAML"):
        made.replace(arrivals=workloads.get("azure-conv").arrivals).to_yaml()


def test_yaml_files_next_to_the_scenario(tmp_path: Path) -> None:
    profiles.save(profiles.get("a100-llama3-8b").replace(name="beside", kv_tokens=5000), tmp_path / "p.json")
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,2\n1,10,2\n9,10,2\n")
    text = "profile: p.json\nworkload: {trace: t.csv, window: [0, 5], load: 1e-1}\nhorizon_s: 1e3\n"
    (tmp_path / "mine.yaml").write_text(text)
    scenario = scenarios.load(tmp_path / "mine.yaml")
    assert (scenario.name, scenario.horizon_s, scenario.workload.load) == ("mine", 1000.0, 0.1)
    problem = scenario.resolve()
    assert problem.profile.name == "beside" and problem.num_requests == 2


def test_classes_of_a_named_workload_share_its_share(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(
        "profile: a100-llama3-8b\n"
        "workload:\n"
        "  classes:\n"
        "    - &chat {lengths: chatbot-arena, share: 3, class_id: 1}\n"
        "    - {<<: *chat, lengths: fixed-5-5, share: 1, class_id: 0, client: 40}\n"
        "  rate: 1\n"
    )
    workload = scenarios.load(tmp_path / "mix.yaml").workload
    assert isinstance(workload, Synthetic)
    assert sum(c.share for c in workload.classes if c.class_id == 1) == pytest.approx(3)
    assert len({c.client for c in workload.classes}) == 28


GOOD = "profile: a100-llama3-8b\nworkload: {name: azure-conv, load: 0.9}\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must be a mapping"),
        ("- 1", "must be a mapping"),
        ("profile: x", "lacks workload"),
        ("workload: {name: azure-conv}", "lacks profile"),
        (GOOD + "horizn_s: 3", "unknown key of the scenario 'horizn_s'; did you mean 'horizon_s'?"),
        (GOOD + "horizon_s: long", "horizon_s must be a number, not 'long'"),
        (GOOD + "horizon_s: true", "horizon_s must be a number, not True"),
        (GOOD + "horizon_s: 0", "horizon_s must be positive seconds, not 0"),
        (GOOD + "optimum: [1]", "optimum must be a number, not [1]"),
        (GOOD + "name: 3", "name must be a text, not 3"),
        (GOOD + "engine: {kv_block: 3}", "unknown key of engine 'kv_block'; did you mean 'kv_blocks'?"),
        (GOOD + "engine: {kv_blocks: many}", "kv_blocks must be a whole number, not 'many'"),
        (GOOD + "engine: {kv_blocks: 0}", "kv_blocks must be a whole number from 1"),
        (GOOD + "engine: {swap_overlap: 1}", "swap_overlap must be true or false, not 1"),
        (GOOD + "engine: {preemption: drop}", "unknown preemption 'drop'"),
        (GOOD + "engine: 3", "engine must be a mapping, not 3"),
        (GOOD + "profile: h100", "line 3: profile is given twice"),
        (GOOD.replace("llama3", "lama3"), "did you mean 'a100-llama3-8b'?"),
        (GOOD.replace("a100-llama3-8b", "p.json"), "cannot read profile"),
        (GOOD.replace("a100-llama3-8b", "{name: x, form: linear}"), "profile lacks params"),
        (GOOD.replace("a100-llama3-8b", "{nam: x}"), "unknown key of profile 'nam'; did you mean 'name'?"),
        (GOOD.replace("a100-llama3-8b", "{name: x, form: custom, params: {}}"), "a function"),
        (GOOD.replace("azure-conv", "azure-con"), "unknown workload 'azure-con'; did you mean 'azure-conv'?"),
        (GOOD.replace("load: 0", "lod: 0"), "unknown key of workload 'lod'; did you mean 'load'?"),
        (GOOD.replace("0.9", "high"), "load must be a number, not 'high'"),
        (GOOD.replace("0.9", "-1"), "load must be a positive number"),
        (GOOD.replace("0.9", "0.9, arrivals: gama"), "unknown arrivals 'gama'; did you mean 'gamma'?"),
        (GOOD.replace("0.9", "0.9, rate: 1"), "exclude each other"),
        (GOOD.replace("name: azure-conv, ", ""), "needs one of name, classes, trace, outputs"),
        (GOOD.replace("name", "trace: t.csv, name"), "it has name and trace"),
        (GOOD.replace("name: azure-conv", "trace: t.csv"), "there is no such file"),
        (GOOD.replace("name: azure-conv", "trace: t.csv, limit: 3"), "unknown key of workload 'limit'"),
        (GOOD.replace("name: azure-conv", "classes: []"), "give one or more classes"),
        (GOOD.replace("name: azure-conv", "classes: {a: 1}"), "classes must be a list"),
        (GOOD.replace("name: azure-conv", "classes: [1]"), "a class must be a mapping"),
        (GOOD.replace("name: azure-conv", "classes: [{share: 1}]"), "a class lacks lengths"),
        (GOOD.replace("name: azure-conv", "classes: [{lengths: azure}]"), "unknown workload 'azure'"),
        (GOOD.replace("name: azure-conv", "classes: [{lengths: {prompt: 3}}]"), "lack prompt or output"),
        (
            GOOD.replace("name: azure-conv", "classes: [{lengths: {prompt: unifrm, output: 3}}]"),
            "unknown lengths 'unifrm'; did you mean 'uniform'?",
        ),
        (
            GOOD.replace("name: azure-conv", "classes: [{lengths: {prompt: 'uniform:3', output: 3}}]"),
            "missing 1 required positional argument: 'high'",
        ),
        (
            GOOD.replace("name: azure-conv", "classes: [{lengths: {prompt: 'uniform:1,2.5', output: 3}}]"),
            "high must be a whole number of tokens, not 2.5",
        ),
        (GOOD.replace("name: azure-conv, load: 0.9", "outputs: [1, x]"), "each must be a whole number"),
        (GOOD.replace("name: azure-conv, load: 0.9", "outputs: [0]"), "at least 1"),
        ("profile: [", "is not YAML: line 1: "),
        ("a: b: c", "is not YAML: line 1: "),
        ("? [1]\n: 2", "is not a text"),
        ("profile: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("profile: \x00", "is not YAML"),
        ("profile: " + "[" * 3000, "is not YAML"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        scenarios.get(path)
    assert str(error.value).startswith(f"scenario {path}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        scenarios.get(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        scenarios.load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="is not a text file"):
        scenarios.get(str(tmp_path / "binary.yaml"))


# -- references ----------------------------------------------------------------------------------------------


def test_references_there_and_back(tmp_path: Path) -> None:
    rows = (
        Reference(2.0, 1.5, 3.0, "search", seed=1_000_000),
        Reference(1.0, 1.0, seed=1_000_001),
    )
    made = get("azure-conv", num_requests=5).replace(references=rows)
    assert Reference(2.0, 1.5).summary().keys() == {"best_known", "bound", "vllm_v1", "method"}
    assert rows[1].summary()["optimum"] == 1.0
    path = tmp_path / "one.yaml"
    made.save(path)
    assert repr(load(path).references) == repr(rows)  # nan is not equal to itself
    reference.save(rows, tmp_path / "rows.json", made_with="this test")
    text = path.read_text().split("references:")[0]
    path.write_text(text + "references: rows.json\n" + "workload: {name: azure-conv, num_requests: 5}\n")
    assert repr(load(path).references) == repr(rows)
    problem = made.resolve()
    assert problem.reference(first_episode_seed(1_000_000)) is rows[0]
    assert problem.reference(1_000_000) is None  # the seed of its requests is another
    assert problem.reference(None) is None
    assert get("toy").resolve().reference(5).best_known == 20.0  # type: ignore[union-attr]


def test_references_are_of_their_own_problem() -> None:
    toy = get("toy")
    assert toy.replace(summary="the same").references == toy.references != ()
    assert toy.replace(outputs=(1, 1)).references == ()
    with pytest.raises(InputError, match="is not a Reference"):
        toy.replace(references=(1.0,))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (3.0, "a mapping with best_known, not 3.0"),
        ({"best_known": 1.0, "bond": 1.0}, "did you mean 'bound'"),
        ({"best_known": 0.0}, "best_known must be positive seconds, not 0.0"),
        ({"best_known": "1"}, "best_known must be seconds from 0, not '1'"),
        ({"best_known": 1.0, "bound": 2.0}, "bound of 2 s is above the best known 1 s"),
        ({"best_known": 1.0, "vllm_v1": -1.0}, "vllm_v1 must be seconds from 0"),
        ({"best_known": 1.0, "seed": -1}, "seed must be a whole number from 0"),
        ({"best_known": 1.0, "method": 1}, "method must be a text"),
    ],
)
def test_bad_references(given: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        Reference.of(given)


def test_bad_files_of_references(tmp_path: Path) -> None:
    for text, match in (("{", "not references in JSON"), ('{"references": [{}]}', "mapping with best_known")):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(InputError, match=match):
            reference.load(tmp_path / "rows.json")
    with pytest.raises(InputError, match="cannot be read"):
        reference.load(tmp_path / "nothing.json")
