"""The registry of named schedulers: a function each, whose docstring says what it is, which version, and
where its rules are from.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from llmsched_env.errors import InputError, unknown
from llmsched_env.scheduling import Scheduler

Maker = Callable[[], Scheduler]
_MAKERS: dict[str, Maker] = {}
_FAMILIES: dict[str, Callable[[str], Scheduler]] = {}


def scheduler(name: str) -> Callable[[Maker], Maker]:
    """Register a function that makes the scheduler `name`. Its docstring's first line is the summary, its
    paragraph `Source: ...` the source.
    """

    def register(make: Maker) -> Maker:
        if name in _MAKERS:
            raise InputError(f"a scheduler {name!r} is registered already; choose another name")
        _MAKERS[name] = make
        return make

    return register


def family(name: str) -> Callable[[Callable[[str], Scheduler]], Callable[[str], Scheduler]]:
    """Register a function that makes a scheduler of what comes after `name:`, such as a file's path."""

    def register(make: Callable[[str], Scheduler]) -> Callable[[str], Scheduler]:
        _FAMILIES[name] = make
        return make

    return register


def get(name: str, **settings: Any) -> Scheduler:
    """The scheduler `name`, or `tuned:FILE.json` (`baselines.tuned`), with some of its settings changed.

    >>> get("sarathi").name
    'sarathi'

    Raises:
        InputError: for an unknown name or setting, with the nearest match.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind in _FAMILIES:
        return _FAMILIES[kind](rest).replace(**settings)
    if name not in _MAKERS:
        raise unknown("scheduler", name, [*_MAKERS, *(f"{kind}:FILE.json" for kind in _FAMILIES)])
    make = _MAKERS[name]
    text = inspect.getdoc(make) or ""
    source = " ".join(
        p.removeprefix("Source:").strip() for p in text.split("\n\n") if p.startswith("Source:")
    )
    made = dataclasses.replace(
        make(), name=name, summary=" ".join(text.split("\n\n", 1)[0].split()), source=" ".join(source.split())
    )
    return made.replace(**settings) if settings else made


def has(name: str) -> bool:
    """Whether `get` takes the name: one of `names()`, or one such as `tuned:FILE.json`."""
    kind, colon, _ = name.partition(":")
    return name in _MAKERS or (bool(colon) and kind in _FAMILIES)


def names() -> list[str]:
    """The names of all schedulers, sorted."""
    return sorted(_MAKERS)
