"""Who is compared, and on what: schedulers, agents, chance and the optimum, each on the same requests.

`resolve` makes a `Policy` of whatever names one; its members play `Episodes`, which hold the requests once
for all.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import baselines
from agents.evaluation import make, play, random_policy
from llmsched_env import InputError, simulate
from llmsched_env.core.requests import Requests
from llmsched_env.envs import IDS
from llmsched_env.envs.lane import MOST_CLIENTS
from llmsched_env.envs.options import NAMES, split
from llmsched_env.errors import unknown
from llmsched_env.scenarios import Problem, Scenario
from llmsched_env.scheduling import Scheduler
from llmsched_env.simulation import Result

Metrics = dict[str, NDArray[np.float64]]

# What is kept of an episode; each is of `llmsched_env.envs.fleet.Fleet.metrics`.
METRICS = (
    "latency_s",
    "goodput",
    "ttft_s",
    "tpot_s",
    "throughput_tps",
    "gpu_s",
    "makespan_s",
    "fairness",
    "finished",
    "preemptions",
)
# What the solvers minimise or maximise, by metric; where all tokens come out, throughput is a matter of time.
_OBJECTIVES = {
    "latency_s": "total_latency",
    "goodput": "slo_goodput",
    "ttft_s": "mean_ttft",
    "gpu_s": "gpu_time",
    "makespan_s": "makespan",
    "throughput_tps": "makespan",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Episodes:
    """E episodes of a scenario, to be played by any policy. Build with `of`.

    Attributes:
        scenario: with all settings as they are to be; `problem` is what it resolves to.
        seeds: episode i is the first after `reset(seed=seeds[i])`.
        metric: what it is about; fairness is only measured where it is asked for.
        env_id, options: the environment of those who bring none, without the scenario.
        action_space: of that environment.
        requests: of each, with what a scheduler is told of lengths.
        horizons_s: (E,) when each is cut.
        best_known: (E,) the least mean latency that is known, seconds; nan where nothing is.
    """

    scenario: Scenario
    problem: Problem
    seeds: range
    metric: str
    env_id: str
    options: dict[str, Any]
    action_space: gym.Space[Any]
    requests: tuple[Requests, ...]
    horizons_s: NDArray[np.float64]
    best_known: NDArray[np.float64]

    @staticmethod
    def of(scenario: Scenario, seeds: range, metric: str, env_id: str, keywords: dict[str, Any]) -> Episodes:
        """
        Args:
            keywords: of the environment: its options, and settings of the scenario to change.

        Raises:
            InputError: an unknown environment or keyword, or a value that does not fit.
        """
        if env_id not in IDS:
            raise unknown("environment", env_id, IDS)
        _, changed = split(keywords, scenario)
        options = {name: value for name, value in keywords.items() if name in NAMES}
        env: Any = gym.make(env_id, scenario=changed, **options).unwrapped
        drawn: list[tuple[Requests, float, float]] = []
        for seed in seeds:
            env.reset(seed=seed)
            # No answer passes the limit, which is not always what was declared: that may tell too much.
            requests = env.requests.replace(declared_tokens=env.fleet.bank.req["limit"][0])
            reference = env.fleet.references[0]
            best = math.nan if reference is None else reference.best_known
            drawn.append((requests, float(env.fleet.bank.lane["horizon"][0]), best))
        found, horizons, best_known = zip(*drawn, strict=True)
        return Episodes(
            scenario=changed,
            problem=env.problem,
            seeds=seeds,
            metric=metric,
            env_id=env_id,
            options=options,
            action_space=env.action_space,
            requests=found,
            horizons_s=np.array(horizons),
            best_known=np.array(best_known),
        )

    def __len__(self) -> int:
        return len(self.seeds)

    def complete(self, found: Metrics) -> NDArray[np.bool_]:
        """Which of the episodes were played to their end: all requests finished, or the scenario's own
        horizon came."""
        in_time: NDArray[np.bool_] = found["finished"] == self.problem.num_requests
        return in_time | (found["makespan_s"] >= self.scenario.horizon_s)

    def play(self, policy: Any, env_id: str | None = None, options: dict[str, Any] | None = None) -> Metrics:
        """What comes of a policy, as `agents.evaluation.play` takes it, in an environment of its own id and
        options, if it has them."""
        asked = dict(self.options if options is None else options)
        if self.metric == "fairness":
            asked["objective"] = "fairness"  # it is measured where it is rewarded
        env = make(env_id or self.env_id, len(self), scenario=self.scenario, **asked)
        try:
            found = play(policy, env, self.seeds.start)
            served = env.unwrapped.fleet.bank.req
            for name, wanted in (
                ("arrival", [r.arrival_s for r in self.requests]),
                ("prompt", [r.prompt_tokens for r in self.requests]),
                ("stop", [np.minimum(r.output_tokens, r.declared_tokens) for r in self.requests]),
            ):
                assert np.array_equal(served[name], wanted), f"{name}: other requests than those compared"
        finally:
            env.close()
        return {name: np.asarray(found[name], np.float64) for name in METRICS}


class Member(Protocol):
    """One training of a policy, or what needs none."""

    def play(self, episodes: Episodes) -> Metrics:
        """What it achieves: metric -> (E,), nan for what is not known."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """Something to compare.

    Attributes:
        label: for tables.
        members: trainings that differ in their seed only; of what is not trained, one.
    """

    label: str
    members: tuple[Member, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Played:
    """A policy that acts in an environment: a function, a model, an expert, or an agent, which brings the
    environment that it knows."""

    policy: Any

    def play(self, episodes: Episodes) -> Metrics:
        if not (hasattr(self.policy, "env_id") and hasattr(self.policy, "env_options")):
            return episodes.play(self.policy)
        # What it sees and may do is its own; the scenario and when an episode is cut are the comparison's.
        own = {k: v for k, v in self.policy.env_options.items() if k in NAMES}
        own["max_steps"] = episodes.options.get("max_steps")
        return episodes.play(self.policy, self.policy.env_id, own)


@dataclasses.dataclass(frozen=True)
class _Chance:
    """Any legal action."""

    seed: int = 0

    def play(self, episodes: Episodes) -> Metrics:
        return episodes.play(random_policy(episodes.action_space, self.seed))


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A named scheduler, simulated: the very run that its expert makes in an environment, whose actions not
    every plan can be said in."""

    scheduler: Scheduler

    def play(self, episodes: Episodes) -> Metrics:
        problem, rows = episodes.problem, []
        record = "schedule" if episodes.metric == "fairness" else None
        for requests, horizon in zip(episodes.requests, episodes.horizons_s, strict=True):
            result = simulate(
                requests,
                self.scheduler,
                problem.profile,
                problem.engine,
                oversized="drop",
                horizon_s=float(horizon),
                record=record,
            )
            rows.append(metrics_of(result))
        return {name: np.array([row[name] for row in rows]) for name in METRICS}


@dataclasses.dataclass(frozen=True)
class _Optimum:
    """The best schedule that is known, or can be found in some seconds an episode."""

    seconds: float = 2.0

    def play(self, episodes: Episodes) -> Metrics:
        from baselines import optimal

        if math.isfinite(episodes.scenario.horizon_s):
            name = episodes.scenario.name
            raise InputError(f"scenario {name} is a window of an endless stream: it has no optimum")
        if episodes.metric == "latency_s" and not np.isnan(episodes.best_known).any():
            unknown_ones = np.full(len(episodes), np.nan)
            finished = np.full(len(episodes), float(episodes.problem.num_requests))
            known = {"latency_s": episodes.best_known, "finished": finished}
            return {name: known.get(name, unknown_ones) for name in METRICS}
        if episodes.metric not in _OBJECTIVES:
            raise InputError(
                f"the optimum can be asked for of {', '.join(_OBJECTIVES)}, not {episodes.metric}"
            )
        rows = []
        for seed in episodes.seeds:
            instance = optimal.Instance.of_scenario(
                episodes.scenario, seed, objective=_OBJECTIVES[episodes.metric]
            )
            rows.append(metrics_of(optimal.solve(instance, time_limit_s=self.seconds).result()))
        return {name: np.array([row[name] for row in rows]) for name in METRICS}


# ---------------------------------------------------------------------- names


def resolve(spec: Any, label: str = "") -> Policy:
    """The policy that is meant.

    Args:
        spec: an object that acts (see `agents.evaluation.evaluate`), a `Scheduler` or an agent; a sequence of
            such, trainings of one configuration; or a text:

            - a scheduler's name (`baselines.names()`), or "tuned:FILE.json";
            - "random", any legal action;
            - "optimum", the best schedule that is known, or that is found in 2 s an episode; "optimum:10" in
              10 s;
            - the path of an agent or of a run's folder; "pretrained:NAME", an agent of the package;
            - "untrained:" before either: the same agent with fresh weights;
            - several of the latter, with commas between, or with * in their path: trainings of one policy.

            "LABEL=" before a text gives it a name.
        label: for tables; by default the text, of a path its end.

    Raises:
        InputError: what is no policy, with the nearest match, or no agent.
    """
    if isinstance(spec, Policy):
        return dataclasses.replace(spec, label=label or spec.label)
    if isinstance(spec, str | Path):
        text = str(spec)
        named = re.fullmatch(r"([^=/*]+)=(.+)", text)
        if named and not Path(text).exists():
            label, text = label or named[1].strip(), named[2].strip()
        return Policy(label or _short(text), _named(text))
    several = spec if isinstance(spec, Sequence) else [spec]
    members = tuple(Scheduled(one) if isinstance(one, Scheduler) else Played(one) for one in several)
    for one in several:
        if not (isinstance(one, Scheduler) or callable(one) or hasattr(one, "predict")):
            raise InputError(f"a policy is a name, a scheduler, an agent, a model or a function, not {one!r}")
    if not members:
        raise InputError("a policy needs a training at least, not an empty list")
    one = several[0]
    name = getattr(one, "name", getattr(one, "__name__", type(one).__name__))
    return Policy(label or str(name), members)


def _named(text: str) -> tuple[Member, ...]:
    if baselines.has(text):
        return (Scheduled(baselines.get(text)),)
    if text == "random":
        return (_Chance(),)
    word, _, seconds = text.partition(":")
    if word == "optimum":
        try:
            limit = float(seconds) if seconds else _Optimum.seconds
        except ValueError:
            limit = math.nan
        if not 0 < limit < math.inf:
            raise InputError(f"optimum:SECONDS takes positive seconds an episode, not {seconds!r}")
        return (_Optimum(limit),)
    untrained = text.startswith("untrained:")
    text = text.removeprefix("untrained:")
    parts = [text] if Path(text).exists() else [part.strip() for part in text.split(",")]
    agents = [agent for part in parts for agent in _agents(part)]
    if untrained:
        try:
            agents = [agent.untrained(i) for i, agent in enumerate(agents)]
        except ImportError:
            raise InputError('fresh weights need PyTorch; pip install "llmsched-env[train]"') from None
    return tuple(Played(agent) for agent in agents)


def _agents(text: str) -> list[Any]:
    """The agents at a path, or of a name."""
    from agents.agent import Agent, pretrained_names

    if text.startswith("pretrained:"):
        return [Agent.pretrained(text.removeprefix("pretrained:"))]
    paths = [text] if Path(text).exists() else sorted(glob.glob(text))
    if not paths:
        if glob.has_magic(text):
            raise InputError(f"nothing matches {text}; give the path of an agent")
        shipped = [f"pretrained:{name}" for name in pretrained_names()]
        known = [*baselines.names(), *shipped, "random", "optimum", "untrained:PATH", "an agent's PATH"]
        raise unknown("policy", text, known)
    return [Agent.load(path) for path in paths]


def _short(text: str) -> str:
    """What a policy is called that was given no label."""
    if "," in text:
        return text
    word, colon, rest = text.rpartition(":")
    return word + colon + Path(rest).name if "/" in rest else text.removeprefix("pretrained:")


# ---------------------------------------------------------------------- metrics


def metrics_of(result: Result) -> dict[str, float]:
    """The metrics of a run as those of an episode (`Fleet.metrics`); fairness is nan unless the schedule was
    recorded."""
    r, end = result.requests, result.makespan_s
    finish, arrival = result.finish_s, r.arrival_s
    finished = ~np.isnan(finish)
    in_system = np.where(finished, finish - arrival, np.maximum(0.0, end - arrival))
    gaps = result.generated_tokens - 1
    ttft = result.first_token_s - arrival
    tpot = np.where(gaps > 0, (finish - result.first_token_s) / np.maximum(gaps, 1), 0.0)
    met = finished & (ttft <= r.ttft_target_s) & (tpot <= r.tpot_target_s)
    several = finished & (gaps > 0)
    return {
        "latency_s": float(in_system.sum()) / len(r),
        "goodput": np.count_nonzero(met) / len(r),
        "ttft_s": float(ttft[finished].mean()) if finished.any() else math.nan,
        "tpot_s": float(tpot[several].mean()) if several.any() else math.nan,
        "throughput_tps": float(result.generated_tokens.sum()) / end if end > 0 else math.nan,
        "gpu_s": float(result.busy_s),
        "makespan_s": float(end),
        "fairness": _fairness(result),
        "finished": float(np.count_nonzero(finished)),
        "preemptions": float(result.preemptions_total),
    }


def _fairness(result: Result) -> float:
    """Jain's index of the tokens that clients have got, those of answers counted twice."""
    if result.schedule is None:
        return math.nan
    r = result.requests
    clients = min(int(r.client.max()) + 1, MOST_CLIENTS)
    client, prompt = r.client.tolist(), r.prompt_tokens.tolist()
    left, generated = list(prompt), [0] * len(r)  # of the prefill; of the answer
    service = np.zeros(MOST_CLIENTS)
    for decisions in result.schedule:
        for i in decisions.preempted:
            left[i] = prompt[i] + generated[i]
        for i, tokens in decisions.granted:
            service[client[i] % MOST_CLIENTS] += tokens if left[i] > 0 else 2.0
            left[i] = max(0, left[i] - tokens)
            generated[i] += left[i] == 0
    squares = float((service**2).sum())
    return float(service.sum()) ** 2 / (clients * squares) if squares > 0 else 1.0
