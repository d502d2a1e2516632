"""RLlib and TorchRL, where they are installed: pip install "llmsched-env[interop]"."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def latency(printed: str) -> float:
    """Of what was learnt, beside that of vLLM V1."""
    found = re.findall(r"mean latency ([\d.]+) s, score [\d.]+$", printed, re.MULTILINE)
    assert len(found) == 2 and float(found[1]) == pytest.approx(37.24, abs=0.01), printed
    return float(found[0])


def run_apart(name: str, arguments: str) -> str:
    """What an example prints in a process of its own: these libraries start processes and warn of much."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "scripts" / "examples" / f"{name}.py"),
        *arguments.split(),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def need(*modules: str) -> None:
    """Skip the test unless these can be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            pytest.importorskip(module)


@pytest.mark.slow
def test_rllib() -> None:
    need("ray.rllib")
    learnt = latency(run_apart("rllib_ppo", "--timesteps 2048 --batch 1024 --num-envs 4"))
    assert learnt >= 20


@pytest.mark.slow
def test_torchrl() -> None:
    need("torchrl", "tensordict")
    learnt = latency(run_apart("torchrl_ppo", "--timesteps 2048 --batch 1024 --num-envs 4"))
    assert learnt >= 20


@pytest.mark.slow
def test_rllib_takes_only_what_is_legal() -> None:
    """In all three environments, sampled and at its best."""
    need("ray.rllib")
    code = """
import gymnasium as gym, numpy as np, torch
from agents.rllib import MaskedModule, make
for env_id in ("llmsched/Decision-v0", "llmsched/Batch-v0", "llmsched/Dispatch-v0"):
    env = make({"env_id": env_id, "scenario": "toy", "waiting_slots": 6, "running_slots": 2})
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    module = MaskedModule(**spaces, model_config={})
    assert module.observation_space == env.observation_space
    seen, _ = env.reset(seed=0)
    over = False
    while not over:
        batch = {"obs": {name: torch.as_tensor(part)[None] for name, part in seen.items()}}
        for outputs in (module.forward_exploration(batch), module.forward_train(batch)):
            logits = outputs["action_dist_inputs"][0]
            assert (logits[torch.as_tensor(seen["action_mask"]) == 0] < -1e7).all()
        chosen = module.get_exploration_action_dist_cls().from_logits(logits[None]).sample()
        action = np.asarray(chosen[0] if isinstance(chosen, torch.Tensor) else chosen)
        seen, _, terminated, truncated, info = env.step(action.reshape(env.action_space.shape))
        over = terminated or truncated
    assert info["metrics"]["illegal"] == 0 and np.isfinite(module.compute_values(batch).item())
print("well")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.stdout.endswith("well\n"), done.stderr[-3000:]


def test_without_rllib_one_error_names_the_extra() -> None:
    code = "import sys; sys.modules['ray'] = None; import agents.rllib"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "During handling" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("ImportError: agents.rllib needs") and 'pip install "llmsched-env[interop]"' in last
    )
