"""The tuned rule: a priority rule whose numbers were found by search (`agents.tuning`), in a JSON file.

    scheduler = baselines.get("tuned:mine.json")
    scheduler = baselines.get("tuned:slo-mix-goodput")  # one that ships with the package, see `names`
    scheduler = tuned.rule(tuned.Params(area=0.5, urgency=2.0))

A file holds `{"params": {...}}` with the attributes of `Params` that are not as by default, and whatever else
its writer wants to say of them (where they were tuned, for what).
"""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

from baselines.registry import family
from llmsched_env.core.state import Hold
from llmsched_env.errors import InputError, unknown
from llmsched_env.files import writing
from llmsched_env.scheduling import Routine, Scheduler, Settings
from llmsched_env.scheduling.priority_rule import PriorityRule as Params
from llmsched_env.scheduling.priority_rule import rule_size

__all__ = ["Params", "load", "names", "rule", "save"]

SUMMARY = "A priority rule: least weighted score of KV area, prompt, age, slack, lateness and priority first."
SOURCE = "ours; the start of the search is `area-backfill`."


def rule(params: Params = Params(), name: str = "rule") -> Scheduler:
    """The scheduler with these parameters. Of lengths it knows what the requests' predictions tell; where
    they tell nothing, it goes by prompts."""
    if not isinstance(params, Params):
        raise InputError(f"the parameters of the rule must be Params, not {params!r}")
    settings = Settings(
        routine=Routine.PRIORITY_RULE,
        test=Hold.KNOWN,
        hold=Hold.CHUNK,
        watermark_when_idle=False,
        admit_after_preemption=False,
        x=params,
    )
    return Scheduler(name, settings, workspace=rule_size, summary=SUMMARY, source=SOURCE)


def save(params: Params, path: str | Path, **about: Any) -> None:
    """Write parameters to a JSON file, whole or not at all; `about` says what they are good for."""
    given = {k: _text(v) for k, v in dataclasses.asdict(params).items()}
    with writing(path) as temporary:
        temporary.write_text(
            json.dumps({"params": given, **about}, indent=2, default=str) + "\n", encoding="utf-8"
        )


_SHIPPED = resources.files("baselines") / "rules"


def names() -> list[str]:
    """Rules that ship with the package: of a scenario, for a metric, as `llmsched tune` found them."""
    return sorted(f.name.removesuffix(".json") for f in _SHIPPED.iterdir() if f.name.endswith(".json"))


@family("tuned")
def load(path: str) -> Scheduler:
    """The rule with the parameters of a JSON file that `save` wrote, or by a name that ships.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    if path in names() and not Path(path).exists():
        with resources.as_file(_SHIPPED / f"{path}.json") as file:
            return rule(read(file), name=f"tuned:{path}")
    return rule(read(path), name=f"tuned:{path}")


def read(path: str | Path) -> Params:
    """The parameters in a JSON file that `save` wrote.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))["params"]
        known = [field.name for field in dataclasses.fields(Params)]
        for name in given:
            if name not in known:
                raise unknown("parameter", name, known)
        return Params(**{name: math.inf if value == "inf" else value for name, value in given.items()})
    except OSError as error:
        raise InputError(f"tuned rule {path}: cannot be read: {error.strerror or error}") from None
    except InputError as error:
        raise InputError(f"tuned rule {path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            f'tuned rule {path}: not JSON with "params" in it; write it with `llmsched tune`'
        ) from None


def _text(value: float) -> Any:
    """JSON has no infinity."""
    return "inf" if value == math.inf else value
