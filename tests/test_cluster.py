"""Many trainings: in processes, and on Ray where it is installed: pip install "llmsched-env[ray]"."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsched_env.errors import InputError

pytest.importorskip("torch")
pytest.importorskip("sb3_contrib")

from agents import cluster, training
from agents.cli import main
from agents.cluster import Failed, best_gain, spread, sweep, train_all
from agents.config import Config
from agents.runs import Run

ROOT = Path(__file__).parents[1]
TINY = Config(
    "toy", steps=4 * 8 * 32, num_envs=8, n_steps=32, batch_size=64, epochs=1, segment=2,
    validation_episodes=2, width=8, slot_width=4,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Killer:
    """Kills the process that trains this run, once, in the middle of its second segment."""

    name: str
    folder: Path

    def __call__(self, name: str, now: training.Progress) -> None:
        mark = self.folder / "killed"
        if name == self.name and now.steps == 256 * 3 and not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)


def assert_as_unbroken(run: Run, folder: Path) -> None:
    """That the run came to what a training comes to that nothing ended."""
    unbroken, found = training.train(run.config, folder).load(), run.load()
    assert unbroken is not None and found is not None and found.state["steps"] == 1024
    for part in ("weights", "optimizer", "lanes"):
        mine, other = getattr(found, part), getattr(unbroken, part)
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name])
    assert [int(row["steps"]) for row in run.read_rows("metrics")] == [256, 512, 768, 1024]


def test_what_is_killed_goes_on_and_who_fails_fails_alone(tmp_path: Path) -> None:
    configs = {"killed": TINY, "wrong": TINY.replace(teacher="vllm-v9")}
    with pytest.raises(Failed, match=r"1 of 2 failed: wrong: unknown scheduler 'vllm-v9'") as caught:
        train_all(configs, tmp_path / "runs", jobs=2, progress=Killer("killed", tmp_path))
    assert (tmp_path / "killed").exists() and list(caught.value.done) == ["killed"]
    run = Run.open(tmp_path / "runs" / "killed")
    assert_as_unbroken(run, tmp_path / "unbroken")
    assert best_gain(run) > -1
    with pytest.raises(InputError, match="begun with another learning_rate"):
        train_all({"killed": TINY.replace(learning_rate=0.1)}, tmp_path / "runs")


def test_calls_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_RETRIES", 1)
    ended: list[int] = []
    tasks = {"a": ("7 / 2",), "b": ("1 / 0",), "c": ("__import__('os')._exit(7)",)}
    with pytest.raises(Failed) as caught:
        spread(eval, tasks, jobs=2, progress=ended.append)
    assert caught.value.done == {"a": 3.5} and ended == [1, 2, 3]
    assert caught.value.failures == {
        "b": "ZeroDivisionError: division by zero",
        "c": "its process died 2 times, at last with code 7",
    }


def test_a_sweep_names_what_it_tries() -> None:
    assert list(sweep(TINY, seeds=[0, 3])) == ["seed-0", "seed-3"]
    found = sweep(TINY, {"learning_rate": [1e-3, 1e-4], "idle": [True]}, [1])
    assert list(found) == ["learning_rate-0.001_idle-True/seed-1", "learning_rate-0.0001_idle-True/seed-1"]
    last = found["learning_rate-0.0001_idle-True/seed-1"]
    assert (last.learning_rate, last.env_options["idle"], last.seed) == (1e-4, True, 1)


@pytest.mark.parametrize(
    ("settings", "seeds", "said"),
    [
        ({"learning_rat": [1]}, [0], "did you mean 'learning_rate'"),
        ({"learning_rate": 1e-3}, [0], "list of values"),
        ({"learning_rate": []}, [0], "list of values"),
        ({"learning_rate": [1e-3, 1e-3]}, [0], "two trainings would be called learning_rate-0.001/seed-0"),
        ({}, [], "one seed"),
        ({}, [-1], "seed must be"),
    ],
)
def test_bad_sweeps_are_refused(settings: Any, seeds: list[int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        sweep(TINY, settings, seeds)


def test_what_cannot_be_spread_is_refused() -> None:
    with pytest.raises(InputError, match="jobs must be"):
        spread(divmod, {"a": (7, 2)}, jobs=0)
    with pytest.raises(InputError, match="ask for Ray"):
        spread(divmod, {"a": (7, 2)}, address="auto")
    with pytest.raises(InputError, match="cannot be sent"):
        spread(divmod, {"a": (lambda: 1, 2)})


def test_without_ray_one_error_names_the_extra() -> None:
    code = "import sys; sys.modules['ray'] = None; from agents import cluster as c\n"
    code += "try: c.spread(divmod, {'a': (7, 2)}, use_ray=True)\nexcept c.InputError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 'pip install "llmsched-env[ray]"' in done.stdout, done.stderr


def test_several_seeds_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(function: Any, tasks: Any, jobs: int, **_: Any) -> None:
        assert jobs == 2
        for arguments in tasks.values():
            function(*arguments)

    (tmp_path / "c.yaml").write_text(TINY.to_yaml())
    command = ["train", "--config", str(tmp_path / "c.yaml"), "--run", str(tmp_path / "runs")]
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "spread", here)
        assert main([*command, "--seeds", "0,3", "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    for seed in (0, 3):
        assert f"{tmp_path}/runs/seed-{seed}: latency_s on validation episodes" in said
        assert Run.open(tmp_path / "runs" / f"seed-{seed}").config.seed == seed
    assert f'--policy "learned={tmp_path}/runs/seed-*" --scenario toy' in said
    for wrong, why in (
        (["--seeds", "0-3"], "whole numbers"),
        (["--seeds", "0,0"], "two trainings"),
        (["--seeds", "0", "--seed", "1"], "leave out --seed"),
        (["--jobs", "2"], "--seeds 0,1,2"),
        (["--seeds", "0,3", "--set", "epochs=7"], "begun with another epochs"),
    ):
        assert main([*command, *wrong]) == 2
        assert why in capsys.readouterr().err


# ---------------------------------------------------------------------- Ray


def run_apart(script: str, folder: Path) -> str:
    """What a script prints in a process of its own: Ray starts processes and warns of much."""
    (folder / "script.py").write_text(f"folder = {str(folder)!r}\n{script}")
    command = [sys.executable, "-W", "ignore", str(folder / "script.py")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment["RAY_worker_niceness"] = "0"  # by default 15: on a busy machine they would hardly move
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def need_ray() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("ray.tune")


@pytest.mark.slow
def test_what_is_killed_on_ray_goes_on(tmp_path: Path) -> None:
    need_ray()
    script = """
from pathlib import Path
from test_cluster import TINY, Failed, Killer, train_all
configs = {"killed": TINY, "other": TINY.replace(seed=1), "wrong": TINY.replace(teacher="vllm-v9")}
try:
    train_all(configs, Path(folder) / "runs", jobs=2, use_ray=True, progress=Killer("killed", Path(folder)))
except Failed as error:
    print(list(error.done), error)
"""
    said = run_apart(script, tmp_path)
    assert "['killed', 'other'] 1 of 3 failed: wrong: unknown scheduler 'vllm-v9'" in said
    assert (tmp_path / "killed").exists()
    assert_as_unbroken(Run.open(tmp_path / "runs" / "killed"), tmp_path / "unbroken")


@pytest.mark.slow
def test_a_search(tmp_path: Path) -> None:
    need_ray()
    script = """
from ray import tune as rt
from test_cluster import TINY
from agents.cluster import best_gain, tune
space = {"learning_rate": rt.loguniform(1e-4, 1e-2), "width": [8, 12]}
for run in tune(TINY, space, folder + "/search", samples=4, jobs=2):
    print(run.folder.name, run.config.width, best_gain(run))
"""
    rows = [line.split() for line in run_apart(script, tmp_path).splitlines() if line.startswith("sample-")]
    assert sorted(name for name, _, _ in rows) == [f"sample-0000{i}" for i in range(4)]
    gains = [float(gain) for _, _, gain in rows]
    assert gains == sorted(gains, reverse=True)
    assert {width for _, width, _ in rows} <= {"8", "12"}
    ended = [Run.open(tmp_path / "search" / name).checkpoints()[-1].name for name, _, _ in rows]
    assert max(ended) == f"{1024:012d}"
