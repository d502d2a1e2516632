"""The example scripts run, reduced; the longer ones, marked slow, learn."""

from __future__ import annotations

import importlib.util
import math
import re
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing torch and its friends warns of what is old in them
    import sb3_contrib  # noqa: F401
    import stable_baselines3  # noqa: F401
    import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "scripts" / "examples"
BUDGET = 300_000  # decisions
FOUND = re.compile(r"mean latency ([\d.]+) s, score ([\d.]+)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


def run(name: str, arguments: str, monkeypatch: Any, capsys: Any) -> str:
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return str(capsys.readouterr().out)


def latencies(printed: str) -> tuple[float, float]:
    """Of what was learnt, and of vLLM V1."""
    found = [float(latency) for latency, _ in FOUND.findall(printed)]
    assert len(found) == 2, printed
    return found[0], found[1]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sb3_ppo", "--scenario toy --timesteps 512 --num-envs 4"),
        ("sb3_maskable_ppo", "--scenario toy --timesteps 1024 --num-envs 8"),
        ("cleanrl_ppo", "--timesteps 2048 --num-envs 32"),
    ],
)
def test_runs(name: str, arguments: str, monkeypatch: Any, capsys: Any) -> None:
    learnt, vllm = latencies(run(name, arguments, monkeypatch, capsys))
    assert learnt >= 20 and vllm == pytest.approx(37.24, abs=0.01)


def test_a_model_is_saved(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    arguments = f"--scenario toy --timesteps 512 --num-envs 4 --save {tmp_path / 'model.zip'}"
    run("sb3_maskable_ppo", arguments, monkeypatch, capsys)
    assert (tmp_path / "model.zip").is_file()


def test_toy_runs(monkeypatch: Any, capsys: Any) -> None:
    printed = run("toy", "--seconds 0.1 --seeds 1", monkeypatch, capsys)
    assert re.search(r"^masked   seed 0: untrained .* above the optimum; within 2 % never$", printed, re.M)
    assert "unmasked seed 0" in printed


def test_the_readme_names_each() -> None:
    text = (ROOT / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"`scripts/examples/{path.name}`" in text or f"`{path.name}`" in text


def test_advantages_end_with_the_episode() -> None:
    """By hand: gamma 0.5, lambda 0.5; a cut episode counts on the value of what was seen last, a terminated
    one on nothing, and the step in which an environment begins anew gets nothing from before or after."""
    example = load("cleanrl_ppo")
    np = example.np
    settings = example.Settings(gamma=0.5, lam=0.5)
    rewards = np.array([[1, 1], [2, 2], [0, 0], [4, 4]], np.float32)
    values = np.array([[1, 1], [2, 2], [8, 8], [3, 3], [6, 6]], np.float32)
    terminated = np.array([[0, 0], [1, 0], [0, 0], [0, 0]], bool)
    over = np.array([[0, 0], [1, 1], [0, 0], [0, 0]], bool)
    found = example.advantages(rewards, values, terminated, over, settings)
    last = 4 + 0.5 * 6 - 3
    assert found[3].tolist() == [last, last]
    assert found[1].tolist() == [2 - 2, 2 + 0.5 * 8 - 2]
    assert found[0].tolist() == [1 + 0.5 * 2 - 1 + 0.25 * 0, 1 + 0.5 * 2 - 1 + 0.25 * 4]


# ---------------------------------------------------------------------- what they learn


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_finds_the_optimum_of_toy_sooner_with_the_mask(seed: int) -> None:
    """With it within 2 %, on requests it has not seen. The budget is counted in decisions, those of some 15
    to 30 s of a core: seconds depend on who else is at work."""
    example = load("toy")
    torch.set_num_threads(1)
    needed = {}
    for masked in (True, False):
        curve = example.train(masked, seed, decisions=BUDGET)
        near = [point.decisions for point in curve if point.latency <= 1.02 * 20.0]
        needed[masked] = min(near, default=math.inf)
        assert curve[0].latency > 30.0
        assert not masked or curve[-1].latency <= 1.02 * 20.0, curve
    assert needed[True] < needed[False]


@pytest.mark.slow
def test_the_single_file_finds_it_too(monkeypatch: Any, capsys: Any) -> None:
    learnt, _ = latencies(run("cleanrl_ppo", "--timesteps 400000", monkeypatch, capsys))
    assert learnt <= 1.02 * 20.0


@pytest.mark.slow
def test_maskable_ppo_learns(monkeypatch: Any, capsys: Any) -> None:
    learnt, vllm = latencies(run("sb3_maskable_ppo", "--timesteps 250000", monkeypatch, capsys))
    assert learnt < 0.8 * vllm
