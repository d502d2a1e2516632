"""Instances as environments, in which their schedules can be said action by action."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym

import llmsched_env.envs  # noqa: F401  (registers the ids)
from baselines.optimal.instance import Instance
from baselines.optimal.solution import Solution
from llmsched_env.core.schedule import Schedule
from llmsched_env.envs.lane import MOST_LEVELS, MOST_SLOTS
from llmsched_env.errors import InputError
from llmsched_env.scenarios import Scenario
from llmsched_env.workloads import Replay

# By objective: the environments' objective whose rewards add up to it.
_REWARDS = {
    "total_latency": "latency",
    "gpu_time": "gpu_time",
    "makespan": "makespan",
    "slo_goodput": "goodput",
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Given(Replay):
    """The requests of an instance, which has seen to it that each fits."""

    def fit(self, limit: int) -> _Given:
        return self


def scenario_of(instance: Instance) -> Scenario:
    """The scenario whose every episode is this instance, for `gym.make_vec` and `agents.evaluation`."""
    name = instance.name or "instance"
    return Scenario(name, _Given(name, instance.requests), instance.profile, instance.engine)


def make_env(problem: Instance | Solution, env_id: str = "llmsched/Decision-v0", **options: Any) -> Any:
    """An environment whose every episode is this instance, and in which its schedules can be followed
    (`baselines.expert`): everybody is visible, lengths are known, and what the instance allows is allowed.

    Its rewards add up to the objective U of the instance, with N requests and T = `env.problem.time_scale_s`:
    to -U / (N T) for total_latency, gpu_time and makespan, to U / N for slo_goodput.

    Environments always let requests pause and prompts be cut; instances that do not allow it have fewer
    schedules. In Decision-v0 all decode in an iteration or none; Batch-v0 can pause them one by one, and asks
    in every iteration where the instance allows it, but who is preempted there waits for the next one. Both
    idle until the next arrival only.

    Args:
        problem: an instance, or a solution, for whose schedule the chunk levels are chosen.
        env_id: of the environment.
        options: keywords of the environment that are to be otherwise.

    Raises:
        InputError: an objective that no reward adds up to (mean_ttft), unless `objective` is given; a
            schedule with more sizes of chunks than there are levels; an unknown option.
    """
    instance = problem.instance if isinstance(problem, Solution) else problem
    if "objective" not in options and instance.objective not in _REWARDS:
        raise InputError(
            f"no reward adds up to {instance.objective}; give an objective of the environment, such as "
            'objective="latency"'
        )
    slots = min(len(instance), MOST_SLOTS)
    chosen: dict[str, Any] = {
        "waiting_slots": slots,
        "running_slots": slots,
        "length_info": "oracle",
        "objective": _REWARDS.get(instance.objective),
    }
    if not instance.allows("chunk"):
        chosen["chunk_levels"] = ()
    elif isinstance(problem, Solution) and problem.schedule is not None:
        chosen["chunk_levels"] = _levels(instance, problem.schedule)
    if "Dispatch" not in env_id:
        chosen["preempt"] = "free" if instance.allows("preempt") else "forced"
        chosen["idle"] = instance.allows("idle")
    if "Decision" in env_id:
        chosen["readmit"] = instance.allows("preempt")
    if "Batch" in env_id:
        chosen["running_order"] = (
            "oldest"  # those that go on with a prefill, and may use the budget up, come last
        )
        chosen["skip_forced"] = not instance.allows("pause")
    return gym.make(env_id, scenario=scenario_of(instance), **{**chosen, **options})


def _levels(instance: Instance, schedule: Schedule) -> tuple[int, ...]:
    """The chunk levels that the schedule needs: tokens of the chunks that leave some of a prefill, except, if
    they are too many, of those that are said as all that fits, being alone in using the budget up."""
    prompt = instance.requests.prompt_tokens.tolist()
    left, generated = list(prompt), [0] * len(prompt)
    sizes: set[int] = set()
    needed: set[int] = set()
    for decisions in schedule:
        for r in decisions.preempted:
            left[r] = prompt[r] + generated[r]
        partial = [tokens for r, tokens in decisions.granted if tokens < left[r]]
        sizes.update(partial)
        if len(partial) > 1 or sum(tokens for _, tokens in decisions.granted) < instance.token_budget:
            needed.update(partial)
        for r, tokens in decisions.granted:
            left[r] -= tokens
            generated[r] += left[r] <= 0
    most = MOST_LEVELS - 1
    if len(sizes) > most:
        sizes = needed
    if len(sizes) > most:
        raise InputError(
            f"the schedule cuts prompts into chunks of {len(sizes)} sizes, environments have up to {most} "
            "levels; follow a schedule with fewer, or without chunk"
        )
    return tuple(sorted(sizes))
