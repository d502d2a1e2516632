"""The script that asks which conclusions survive another profile: its statistics, and a small run."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_hardware.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_hardware", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("ties", [False, True])
def test_tau_is_that_of_scipy(script, ties):
    kendalltau = pytest.importorskip("scipy.stats").kendalltau
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = rng.random((2, 8))
        if ties:
            x, y = np.round(3 * x) + 1, np.round(3 * y) + 1
        assert script.tau(x, y) == pytest.approx(kendalltau(x, y).statistic)
    many = rng.random((3, 5, 8))
    for i, j in itertools.product(range(3), range(5)):
        assert script.tau(many, many[0, 0])[i, j] == script.tau(many[i, j], many[0, 0])


def test_tau_of_the_same_and_of_the_reverse_has_no_width(script):
    means = np.arange(6.0)[:, None] + np.zeros((6, 9))
    assert script.tau_with_interval(means, means + 5) == (1, 1, 1)
    assert script.tau_with_interval(means, -means) == (-1, -1, -1)
    assert script.noise(means) == 1
    rng = np.random.default_rng(1)
    assert abs(script.noise(rng.random((6, 40)))) < 0.3  # nothing but noise
    low, high = script.tau_with_interval(rng.random((6, 9)), rng.random((6, 9)))[1:]
    assert high - low > 0.3


def test_reversals_are_those_that_both_sides_are_sure_of(script):
    rng = np.random.default_rng(2)
    common = rng.random(20)  # luck that all share: paired differences do not see it
    x = np.stack([common, common + 0.01, common + 0.02]) + 1e-3 * rng.random((3, 20))
    y = x[[0, 2, 1]]
    assert script.reversals(x, y) == [(1, 2)]
    assert script.reversals(x, x) == []
    vague = y + 5 * rng.normal(size=(3, 20))
    assert script.reversals(x, vague) == []
    same = np.stack([common, common])
    assert script.significant(same).tolist() == [[0, 0], [0, 0]]
    assert script.significant(x)[0].tolist() == [0, -1, -1]


def test_best_regret_and_decision(script):
    rng = np.random.default_rng(3)
    common = 1 + rng.random(20)
    noise = 0.2 * rng.normal(size=20)
    x = np.stack([2 * common, common, common + noise - noise.mean() + 1e-4])
    assert script.best(x) == (1, [1, 2])
    assert script.regret(x, 0) == pytest.approx((1.0, 0.0))
    assert script.regret(x, 1) == (0.0, 0.0)
    assert script.decision(x[[1, 0]]) == "preempt" and script.decision(x[[0, 1]]) == "reserve"
    assert script.decision(x[[1, 2]]) == "even"


QUICK = ["--num-requests", "60", "--seeds", "3", "--kv-tokens", "20000", "--tight-loads", "0.9"]
QUICK += ["--schedulers", "vllm-v1,sarathi,faster-transformer"]
TWO = "a100-llama3.1-8b,h100-llama3.1-8b"


def test_a_small_run(script, capsys):
    assert script.main([*QUICK, "--profiles", TWO, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (compared,) = said["comparisons"]["profiles"]
    assert (compared["from"], compared["to"]) == tuple(TWO.split(","))
    a, b = (said["profiles"][name] for name in TWO.split(","))
    means = [np.mean(profile["order"]["latency"], axis=1) for profile in (a, b)]
    assert compared["latency"]["tau"] == pytest.approx(float(script.tau(*means)))
    assert compared["latency"]["pairs"] == 3
    names = said["setup"]["schedulers"]
    assert compared["latency"]["best"] == [names[int(np.argmin(x))] for x in means]
    assert len(compared["tight"]) == 2 and {case["load"] for case in compared["tight"]} == {0.9}
    assert a["targets"]["tpot_target"] > 1.5 * b["targets"]["tpot_target"]
    assert 0 <= np.min(a["order"]["goodput"]) <= np.max(a["order"]["goodput"]) <= 1
    # The same requests whatever the thread, and as text.
    assert script.main([*QUICK, "--profiles", TWO, "--threads", "2"]) == 0
    text = capsys.readouterr().out
    assert f"{compared['latency']['tau']:.2f} ({compared['latency']['tau_low']:.2f} to" in text
    assert said["verdict"][0] in text


def test_a_measured_profile_can_be_compared(script, tmp_path, capsys):
    from llmsched_env import profiles

    path = tmp_path / "mine.json"
    profiles.save(profiles.get("h200-llama3.1-8b").replace(name="mine"), path)
    assert script.main([*QUICK, "--profiles", f"h200-llama3.1-8b,{path}", "--json"]) == 0
    (compared,) = json.loads(capsys.readouterr().out)["comparisons"]["profiles"]
    for metric in ("latency", "goodput"):
        assert compared[metric]["reversed"] == [] and not compared[metric]["best_changes"]
        assert compared[metric]["costs"] == 0
    assert compared["latency"]["tau"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "2"], "--seeds 2 are too few for intervals"),
        (["--schedulers", "sarathi"], "an order is of at least two schedulers"),
        (["--schedulers", "sarathi,orka"], "did you mean 'orca'"),
        (["--profiles", "a100-llama3-8b"], "give at least two --profiles"),
        (["--profiles", "a100-llama3-8b,a100-lama3-8b"], "did you mean 'a100-llama3-8b'"),
        (["--kv-tokens", "3"], "must be at least 16 each"),
        ([*QUICK, "--profiles", TWO, "--kv-tokens", "16"], "can serve no request of azure-conv with its KV"),
        (["--kv-tokens", "many"], "'many' is no list of whole numbers"),
        (["--load", "0"], "loads must be above 0"),
        (["--workload", "azure-con"], "did you mean 'azure-conv'"),
    ],
    ids=str,
)
def test_complaints_are_one_line(script, capsys, arguments, said):
    try:
        code = script.main(arguments)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("error: ") and said in captured.err


def test_what_is_compared_differs_in_one_thing(script):
    from llmsched_env import profiles

    for what, pairs in script.PAIRS.items():
        for a, b in pairs:
            first, second = profiles.get(a), profiles.get(b)
            if what == "hardware":
                assert first.gpu != second.gpu and first.form == second.form
                assert first.model == second.model
            else:
                assert first.gpu == second.gpu and (first.form, a) != (second.form, b)
