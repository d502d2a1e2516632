"""`Config`: everything that decides how a training goes, from one frozen dataclass.

The same names are keys of a YAML file and of `llmsched train --set`. Presets (`agents/presets/*.yaml`) are
configurations for the scenarios that are trained most.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import yaml

import llmsched_env.envs  # noqa: F401  (registers the ids)
from llmsched_env import scenarios
from llmsched_env.envs.objective import Objective
from llmsched_env.envs.options import NAMES, settings, split
from llmsched_env.errors import InputError, unknown

ALGORITHMS = ("maskable-ppo", "ppo")
_NETWORKS = ("pointer", "attention", "mlp")  # as agents.networks, which needs PyTorch
SCALES = ("none", "trace")
SCHEDULES = ("linear", "constant")
# Metrics of an episode of which less is better, and those of which more is.
COSTS = ("latency_s", "gpu_s", "makespan_s", "preemptions")
GAINS = ("goodput", "throughput_tps", "fairness")


@dataclasses.dataclass(frozen=True)
class Config:
    """A training.

    Attributes:
        scenario: its name or YAML file. env: the environment's id.
        env_options: further keywords of the environment: what is visible (`length_info`, ...), what may be
            done (`preempt`, `chunk_levels`, ...), and settings of the scenario (`load`, ...).
        objective: what is rewarded, see `llmsched_env.envs.objective`.
        metric: of an episode, by which the best agent is chosen on validation episodes.
        algo: "maskable-ppo", or "ppo", to which illegal actions are not hidden.
        steps: decisions in all. seed: of all that is random.
        num_envs: lanes. num_threads: that step them.
        lanes_per_trace: lanes that share their requests, for the leave-one-out baseline (`agents.ppo`); 1:
            there is none.
        reward_scale: "trace": rewards are divided by what vLLM V1 gets of them on the same requests, where
            the objective is latency; "none".
        curriculum: (share of the training, load) pairs: the load of the episodes from there on; empty: the
            scenario's.
        network: "pointer", "attention" or "mlp". width, slot_width: its units, see `agents.networks.Spec`.
        n_steps: decisions of each lane between updates. batch_size: of a gradient step. epochs: over what was
            collected. learning_rate, and its schedule: "linear" (to 0) or "constant".
        clip_range, entropy, value_weight, max_grad_norm, target_kl: of PPO; target_kl 0: none.
        gae_lambda: fading of advantages in each step in which time passes.
        horizon: time constant of the discount, in the scenario's time scales (what a request of mean size
            takes alone); inf: no discount.
        teacher: a scheduler's name, or "optimum" for small episodes: the network first learns to act as it
            does, in `teacher_episodes` episodes, `teacher_epochs` times; "": none.
        teacher_rounds: how often after that it plays as many episodes itself, the first time half of the
            decisions, and learns from all so far what its teacher would have done there (DAgger).
        stagger: decisions of each lane before the first is learned from, in which it begins anew at a random
            one: as many as an episode has, so that lanes are in all its parts.
        segment: updates between checkpoints.
        fresh: whether all lanes begin new episodes at each checkpoint, as they have to where they share
            traces; let `n_steps` be those of some episodes then, or all are at their beginnings together.
        validation_episodes: by which agents are chosen, at each checkpoint.
    """

    scenario: str = "toy"
    env: str = "llmsched/Decision-v0"
    env_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    objective: Any = "latency"
    metric: str = "latency_s"
    algo: str = "maskable-ppo"
    steps: int = 1_000_000
    seed: int = 0
    num_envs: int = 128
    num_threads: int = 1
    lanes_per_trace: int = 1
    reward_scale: str = "none"
    curriculum: tuple[tuple[float, float], ...] = ()
    network: str = "pointer"
    width: int = 64
    slot_width: int = 32
    n_steps: int = 128
    batch_size: int = 2048
    epochs: int = 4
    learning_rate: float = 5e-4
    schedule: str = "linear"
    clip_range: float = 0.2
    entropy: float = 0.003
    value_weight: float = 0.5
    max_grad_norm: float = 0.5
    target_kl: float = 0.03
    gae_lambda: float = 0.97
    horizon: float = 30.0
    teacher: str = ""
    teacher_episodes: int = 64
    teacher_epochs: int = 4
    teacher_rounds: int = 0
    stagger: int = 0
    segment: int = 10
    fresh: bool = False
    validation_episodes: int = 32

    def __post_init__(self) -> None:
        for name in ("scenario", "env", "metric", "algo", "reward_scale", "network", "schedule", "teacher"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} must be a name, not {getattr(self, name)!r}")
        scenarios.get(self.scenario)
        for name, known in (
            ("algo", ALGORITHMS),
            ("network", _NETWORKS),
            ("reward_scale", SCALES),
            ("schedule", SCHEDULES),
            ("metric", (*COSTS, *GAINS)),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if self.env not in gym.registry or not self.env.startswith("llmsched/"):
            raise unknown(
                "environment", self.env, [key for key in gym.registry if key.startswith("llmsched/")]
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number from {least}, not {value!r}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, str):  # as YAML has 1e-3, without a dot
                try:
                    value = float(value)
                except ValueError:
                    pass
                object.__setattr__(self, name, value)
            elif isinstance(value, np.floating | np.integer):
                object.__setattr__(self, name, value := value.item())
            good = isinstance(value, int | float) and not isinstance(value, bool)
            if not (good and low <= value <= high):
                raise InputError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
        if not isinstance(self.fresh, bool):
            raise InputError(f"fresh must be true or false, not {self.fresh!r}")
        if self.rollout % min(self.batch_size, self.rollout) == 1:
            raise InputError(f"batch_size={self.batch_size} leaves a batch of one; take another")
        objective = Objective.get(self.objective)
        if self.metric == "fairness" and not objective.fairness:
            raise InputError("fairness is only measured where it is rewarded; give objective a weight of it")
        if self.reward_scale == "trace" and objective != Objective(latency=objective.latency):
            raise InputError('reward_scale="trace" is for the objective "latency" alone')
        if self.teacher_rounds and not self.teacher:
            raise InputError("teacher_rounds has no effect without a teacher; set teacher_rounds=0")
        if self.teacher == "optimum" and self.teacher_rounds:
            raise InputError(
                "the optimum knows one schedule, not what to do where a student gets; set teacher_rounds=0"
            )
        if self.fresh and self.stagger:
            raise InputError("stagger has no effect where fresh=true begins all lanes anew; leave one out")
        if self.num_envs % self.lanes_per_trace:
            raise InputError(
                f"num_envs={self.num_envs} lanes cannot be shared out by {self.lanes_per_trace} to a trace"
            )
        if self.lanes_per_trace > 1 and not self.fresh:
            raise InputError(
                f"lanes_per_trace={self.lanes_per_trace} needs fresh=true: lanes soon drift apart"
            )
        try:
            pairs = tuple((float(share), float(load)) for share, load in self.curriculum)
        except (TypeError, ValueError):
            pairs = ((-1.0, 0.0),)
        if any(not (0 <= share < 1 and 0 < load < math.inf) for share, load in pairs) or sorted(
            pairs
        ) != list(pairs):
            raise InputError(
                f"curriculum must be (share of the training, load) pairs in order, not {self.curriculum!r}"
            )
        object.__setattr__(self, "curriculum", pairs)
        if not isinstance(self.env_options, Mapping):
            raise InputError(f"env_options must be names and values, not {self.env_options!r}")
        for name in ("observation", "objective", "scenario", "discount_rate"):
            if name in self.env_options:
                raise InputError(f"env_options cannot have {name}: a training settles that itself")
        split(dict(self.env_options), scenarios.get(self.scenario))  # refuses what is unknown

    @property
    def rollout(self) -> int:
        """Decisions between two updates."""
        return self.num_envs * self.n_steps

    @property
    def updates(self) -> int:
        """Updates in all."""
        return math.ceil(self.steps / self.rollout)

    def replace(self, **changes: Any) -> Config:
        """A copy with some attributes changed; a name that is none of them is an option of the environment.

        Raises:
            InputError: an unknown name, with the nearest match, or a value that does not fit.
        """
        own = {name: value for name, value in changes.items() if name in _FIELDS}
        options = {name: value for name, value in changes.items() if name not in _FIELDS}
        known = [*_FIELDS, *NAMES, *settings(scenarios.get(own.get("scenario", self.scenario)))]
        for name in options:
            if name not in known:
                raise unknown("setting of a training", name, known)
        if options:
            own["env_options"] = {**own.get("env_options", self.env_options), **options}
        return dataclasses.replace(self, **own)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for YAML and JSON."""
        found = {name: getattr(self, name) for name in _FIELDS}
        found["env_options"] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.env_options.items()
        }
        found["curriculum"] = [list(pair) for pair in self.curriculum]
        if dataclasses.is_dataclass(self.objective):
            found["objective"] = dataclasses.asdict(self.objective)  # type: ignore[arg-type]
        return found

    def to_yaml(self) -> str:
        """As a YAML file has it."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text

    @staticmethod
    def from_yaml(path: str | Path) -> Config:
        """What a YAML file says, the rest as it is by default.

        Raises:
            InputError: no such file, no YAML, an unknown key or a value that does not fit; names the file.
        """
        try:
            said = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(said, Mapping):
            raise InputError(f"{path} must say `name: value` line by line; keys: {', '.join(_FIELDS)}")
        for name in said:
            if name not in _FIELDS:
                raise InputError(f"{path}: {unknown('key', name, _FIELDS)}")
        try:
            return Config(**said)
        except (InputError, TypeError) as error:
            raise InputError(f"{path}: {error}") from None

    @staticmethod
    def preset(name: str) -> Config:
        """A configuration that ships with the package.

        Raises:
            InputError: an unknown name, with the nearest match.
        """
        if name not in preset_names():
            raise unknown("preset", name, preset_names())
        with resources.as_file(_PRESETS / f"{name}.yaml") as path:
            return Config.from_yaml(path)

    @staticmethod
    def of_scenario(scenario: str) -> Config:
        """The preset for a scenario; the defaults if there is none."""
        return Config.preset(scenario) if scenario in preset_names() else Config(scenario=scenario)


_PRESETS = resources.files("agents") / "presets"
_FIELDS = tuple(field.name for field in dataclasses.fields(Config))
_LEAST = {
    "steps": 1,
    "seed": 0,
    "num_envs": 1,
    "num_threads": 1,
    "lanes_per_trace": 1,
    "width": 1,
    "slot_width": 1,
    "n_steps": 2,
    "batch_size": 2,
    "epochs": 1,
    "teacher_episodes": 1,
    "teacher_epochs": 1,
    "teacher_rounds": 0,
    "stagger": 0,
    "segment": 1,
    "validation_episodes": 1,
}
_RANGES = {
    "learning_rate": (1e-8, 1.0),
    "clip_range": (1e-6, 10.0),
    "entropy": (0.0, 10.0),
    "value_weight": (0.0, 100.0),
    "max_grad_norm": (1e-6, 1e6),
    "target_kl": (0.0, 10.0),
    "gae_lambda": (0.0, 1.0),
    "horizon": (1e-3, math.inf),
}


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in _PRESETS.iterdir() if entry.name.endswith(".yaml")
    )
