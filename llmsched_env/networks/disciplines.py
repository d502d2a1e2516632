"""Disciplines by name: in which order the hops at a station are served, whatever station it is.

Under all of them a station composes its iterations as Sarathi-Serve does, group by group
(`scheduling.levels`): the group that comes first takes its tokens first. A station with a scheduler of its
own keeps to that; all but `max-weight` and `back-pressure`, which order classes anew in each iteration, then
give it the order of its queue.

Of Autellix (arXiv 2502.13965) `plas` and `atlas` have the two notions of attained service, counted in tokens
computed. That levels double, and that a call falls to the next while it is served, is a choice of this
package; the promotion of those that wait long is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llmsched_env.errors import InputError, unknown
from llmsched_env.networks.core.state import Rule


@dataclasses.dataclass(frozen=True)
class Discipline:
    """How hops at a station are ordered.

    Attributes:
        name: as in tables and on the command line.
        rule: what gives a hop its key.
        keys: with the rule CLASS, the key of each node, lowest first: "priority" (the node's own) or "left"
            (expected hops after it, `Workflow.hops_left`).
        quantum: with the rules PLAS and ATLAS, tokens of the first level; each further one is twice as large.
        summary: what it is, and where it is from.
    """

    name: str
    rule: Rule
    keys: str = "priority"
    quantum: int = 32
    summary: str = ""

    def __post_init__(self) -> None:
        if self.keys not in ("priority", "left"):
            raise unknown("keys of a discipline", self.keys, ("priority", "left"))
        q = self.quantum
        if isinstance(q, bool) or not isinstance(q, int) or not 1 <= q < 2**31:
            raise InputError(f"quantum must be a whole number of tokens from 1 to 2^31 - 1, not {q!r}")

    @property
    def token_level(self) -> bool:
        """Whether it plans iterations itself, so that a station can have no scheduler of its own."""
        return self.rule in (Rule.MAX_WEIGHT, Rule.PRESSURE)


_ALL = (
    Discipline(
        "fcfs", Rule.FCFS, summary="in order of arrival at the station; a station's own scheduler as it is"
    ),
    Discipline("priority", Rule.CLASS, summary="the nodes' own priorities, lower first"),
    Discipline(
        "exit-first",
        Rule.CLASS,
        "left",
        summary="classes with the fewest hops to go first: unstable on the Rybko-Stolyar network",
    ),
    Discipline(
        "entry-first", Rule.DEPTH, summary="hops with the fewest hops before them in their program first"
    ),
    Discipline("oldest", Rule.OLDEST, summary="the program that arrived first comes first"),
    Discipline(
        "plas",
        Rule.PLAS,
        summary="least attained service of the program first, in levels (Autellix, arXiv 2502.13965)",
    ),
    Discipline(
        "atlas",
        Rule.ATLAS,
        summary="least service attained on the path to the hop first, in levels (Autellix, arXiv 2502.13965)",
    ),
    Discipline(
        "max-weight",
        Rule.MAX_WEIGHT,
        summary="the class with most weight * remaining tokens first, each time",
    ),
    Discipline(
        "back-pressure",
        Rule.PRESSURE,
        summary="the class with most hops here less those downstream first (Dai and Lin 2005), each time",
    ),
)
_BY_NAME: Mapping[str, Discipline] = {discipline.name: discipline for discipline in _ALL}


def names() -> list[str]:
    """The names of all disciplines, sorted."""
    return sorted(_BY_NAME)


def get(name: str | Discipline) -> Discipline:
    """A discipline by name; `plas:256` and `atlas:256` have a first level of 256 tokens.

    Raises:
        InputError: an unknown name, with the nearest match, or a quantum that is none.
    """
    if isinstance(name, Discipline):
        return name
    head, colon, tail = str(name).partition(":")
    if head not in _BY_NAME:
        raise unknown("discipline", name, _BY_NAME)
    found = _BY_NAME[head]
    if not colon:
        return found
    if found.rule not in (Rule.PLAS, Rule.ATLAS) or not tail.isdecimal():
        raise InputError(f"discipline {name!r}: only plas and atlas take a number of tokens, as in plas:256")
    return dataclasses.replace(found, name=str(name), quantum=int(tail))
