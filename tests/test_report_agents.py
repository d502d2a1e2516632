"""The report on what agents learned, on trainings of a second."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("stable_baselines3")

from agents.config import Config

TINY = Config("toy", steps=1024).replace(
    num_envs=8,
    lanes_per_trace=4,
    fresh=True,
    n_steps=64,
    batch_size=128,
    segment=1,
    epochs=1,
    width=16,
    slot_width=8,
    validation_episodes=2,
    teacher="vllm-v1",
    teacher_episodes=2,
    teacher_epochs=1,
    teacher_rounds=1,
    metric="goodput",
    objective="violations",
    waiting_slots=5,
    running_slots=3,
    chunk_levels=[],
)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "report_agents.py"
    spec = importlib.util.spec_from_file_location("report_agents", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RIVALS", ("toy",))
    monkeypatch.setattr(module, "_LONG", 500)
    monkeypatch.setattr(Config, "preset", staticmethod(lambda name: TINY))
    return module


def told(module: Any, arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What it writes as JSON."""
    options = f"--episodes 3 --jobs 1 --runs {folder} --json {folder}/told.json"
    monkeypatch.setattr(sys, "argv", f"report_agents.py --seeds 2 {arguments} {options}".split())
    assert module.main() == 0
    found: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return found


@pytest.mark.slow
def test_parts(report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(report, "rivals gap ablations curves --only mlp", tmp_path, monkeypatch)
    best, tuned = found["rivals"]
    policies = {row["policy"]: row for row in best["policies"]}
    assert {"trained", "tuned rule", "vllm-v1", best["baseline"]} <= set(policies)
    assert policies["trained"]["trainings"] == 2 and tuned["baseline"] == "tuned rule"
    named = [row["mean"]["value"] for row in best["policies"] if "trained" not in row["policy"]]
    assert policies[best["baseline"]]["mean"]["value"] == max(named)
    assert found["gap"][0]["metric"] == "latency_s" and found["gap"][0]["references"] == 16
    assert [row["policy"] for row in found["ablations"][0]["policies"]] == ["mlp"]
    curve = found["curves"][0]["toy"]
    assert len(curve["values"]) == 2 and curve["decisions"] == [0, 512, 1024]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    made = sorted(folder.name for folder in tmp_path.iterdir() if folder.is_dir())
    assert made == ["ablation-mlp", "known-lengths", "toy"]
    before = (tmp_path / "toy" / "seed-0" / "metrics.csv").read_bytes()
    told(report, "curves", tmp_path, monkeypatch)  # trains nothing anew
    assert (tmp_path / "toy" / "seed-0" / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("rival", "unknown part 'rival'"),
        ("ablations --only mpl", "did you mean 'mlp'"),
        ("curves --seeds 0", "--seeds must be at least 1"),
    ],
)
def test_bad_words(
    report: Any, arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["report_agents.py", *arguments.split(), "--runs", str(tmp_path / "r")])
    with pytest.raises(report.InputError, match=message):
        report.main()
    assert not (tmp_path / "r").exists()
