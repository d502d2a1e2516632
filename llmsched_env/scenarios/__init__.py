"""Scenarios: scheduling problems by name, for environments and for comparing schedulers.

A `Scenario` says which requests arrive at which engine; its `resolve()` gives a `Problem`, in which all is
settled once and episodes are drawn fast.

>>> import numpy as np
>>> problem = get("azure-conv", load=0.9, num_requests=50).resolve()
>>> requests = problem.draw(np.random.default_rng(0))
>>> len(requests), problem.engine.max_model_len
(50, 5120)

The optimum of `toy` is known by hand. Six requests arrive at once, with answers of 1, 2, 4, 8, 16 and 32
tokens in random order; one runs at a time, and each token takes a second. The sum of the times at which they
finish is least when the shortest goes first: exchange two neighbours of which the longer one is in front, and
the sum falls by the difference; to pause one helps nobody. They finish at 1, 3, 7, 15, 31 and 63 s, 120 s
together: a mean latency of 20 s. In order of arrival each waits for half of the others on average: 36.75 s.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from llmsched_env.errors import InputError, unknown
from llmsched_env.scenarios.reference import Reference
from llmsched_env.scenarios.scenario import Problem, Scenario

__all__ = ["Problem", "Reference", "Scenario", "get", "load", "names", "register"]

_DATA = Path(__file__).with_name("data")
_registered: dict[str, Scenario] = {}


def names() -> list[str]:
    """The names that `get` knows, sorted."""
    return sorted({*_ready_made(), *_registered})


def get(scenario: str | Path | Scenario, **changes: Any) -> Scenario:
    """A scenario by name, with some settings changed.

    Args:
        scenario: one of `names()`, the path of a YAML file (see `load`), or a scenario.
        changes: as in `Scenario.replace`, such as `load=0.9`, `num_requests=200`, `kv_blocks=1000`.

    Raises:
        InputError: an unknown name or setting, with the nearest match, or a bad file or value.
    """
    if isinstance(scenario, Scenario):
        found = scenario
    elif scenario in _registered:
        found = _registered[str(scenario)]
    elif scenario in _ready_made():
        found = _load_ready_made(str(scenario))
    elif str(scenario).endswith((".yaml", ".yml")) or Path(str(scenario)).is_file():
        found = load(scenario)
    else:
        raise unknown("scenario", scenario, [*names(), "a YAML file's path"])
    return found.replace(**changes) if changes else found


def register(scenario: Scenario) -> None:
    """Add a scenario of your own to the names; one of the same name gives way.

    Raises:
        InputError: if the name is one of the package's.
    """
    if not isinstance(scenario, Scenario):
        raise InputError(f"{scenario!r} is not a Scenario")
    if scenario.name in _ready_made():
        raise InputError(f"scenario {scenario.name!r} is the package's own; choose another name")
    _registered[scenario.name] = scenario


def load(path: str | Path) -> Scenario:
    """The scenario in a YAML file, such as this one; `workload` and `profile` are needed, the rest is not:

        name: evening-chats      # default: the file's name
        summary: what it is
        source: where its numbers are from
        profile: a100-llama3-8b  # a name, a JSON file, or a mapping of the attributes of Profile
        engine: {kv_blocks: 2000, token_budget: 1024}
        horizon_s: 60            # an endless stream, cut at this time
        references: chats.json   # what scripts/make_references.py wrote; or a list of mappings: see Reference
        workload:
          name: azure-conv       # and any option of workloads.get
          num_requests: 100
          load: 1.1
          arrivals: gamma:2

    In place of `name` a workload has `classes`, a list of mappings with the attributes of RequestClass, whose
    `lengths` are those of a workload by its name, or {prompt: "lognormal:150,0.8", output: "uniform:20,200",
    rank_correlation: 0.3}; or `trace`, a file, with any option of workloads.trace; or `outputs` and
    `prompt_tokens` of requests that arrive at once, in random order. Paths are relative to the file's folder.

    Raises:
        InputError: one line that names the file and what is wrong with it.
    """
    from llmsched_env.scenarios import form

    return form.read(Path(path))


@cache
def _ready_made() -> tuple[str, ...]:
    return tuple(path.stem for path in _DATA.glob("*.yaml"))


@cache
def _load_ready_made(name: str) -> Scenario:
    return load(_DATA / f"{name}.yaml")
