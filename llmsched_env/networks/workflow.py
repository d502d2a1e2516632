"""Workflows of agents: graphs of LLM calls, with forks, joins, choices and loops.

A workflow is run once for each job. What happens at a node does not depend on scheduling, so that a job can
be drawn in advance (`networks.draw`). The rules, for any graph:

- When a node is done, all its edges fire; if they have probabilities, exactly one of them does, at random.
- A node that at least one edge to it fires for is called, once, when everything that those edges come from is
  done. Where branches join, it waits for all that lead to it in this job; where one of several alternatives
  was chosen, for that one.
- Edges back form a loop, which is entered at one node, its head. When one of them fires, the loop is gone
  through once more, whatever lies behind it waiting. `max_visits` of the head limits how often.
- A node with `copies` is that many calls in parallel.

>>> chat = Workflow("chat", [Node("ask", "gpu", Lengths(Fixed(100), Fixed(20)))], rate=2.0)
>>> chat.visits()
{'ask': 1.0}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from llmsched_env.errors import InputError, unknown
from llmsched_env.networks import delays
from llmsched_env.networks.delays import Delay
from llmsched_env.workloads import arrivals as _arrivals
from llmsched_env.workloads.arrivals import Arrivals
from llmsched_env.workloads.lengths import Fixed, Lengths, Marginal

END = "end"
CONTEXTS = ("none", "answer", "all")
_MOST_STATES = 20_000  # combinations of choices that are looked at together
_ENDLESS = 1e-9  # a loop that ends with no greater probability never does


@dataclasses.dataclass(frozen=True)
class Node:
    """A class of calls: one step of an agent.

    Attributes:
        name: within the workflow.
        pool: the pool, or the station, that serves it.
        lengths: tokens of prompt and answer. Of a prompt, without what edges carry over.
        copies: calls in parallel, a number of tokens' distribution: 1, or what `lengths.get` makes.
        priority: lower is served first, under the discipline `priority` and by schedulers that heed it.
        weight: under `max-weight` and `back-pressure`.
        delay: seconds from when what it waits for is done (or the job arrives) until it is called, such as
            the time of a tool.
        max_visits: of the head of a loop: how often it is called at most, each time that the loop is entered.
            Then no edge back fires: another edge of the node does, by its share of the rest.
    """

    name: str
    pool: str
    lengths: Lengths
    copies: Marginal = Fixed(1)  # noqa: RUF009  (frozen)
    priority: int = 0
    weight: float = 1.0
    delay: Delay = delays.Fixed(0.0)  # noqa: RUF009
    max_visits: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or self.name == END:
            raise InputError(f"a node is called {self.name!r}; give it a name other than {END!r}")
        if not (isinstance(self.weight, int | float) and 0 < self.weight < math.inf):
            raise InputError(f"node {self.name}: weight must be a positive number, not {self.weight!r}")
        rank = self.priority
        if isinstance(rank, bool) or not isinstance(rank, int) or not -(2**31) <= rank < 2**31:
            raise InputError(
                f"node {self.name}: priority must be a whole number from -2^31 to 2^31 - 1, not {rank!r}"
            )
        visits = self.max_visits
        if visits is not None and (isinstance(visits, bool) or not isinstance(visits, int) or visits < 1):
            raise InputError(f"node {self.name}: max_visits must be a whole number >= 1, not {visits!r}")
        if self.copies.largest > 10_000:
            raise InputError(f"node {self.name}: up to {self.copies.largest} copies; take at most 10000")


@dataclasses.dataclass(frozen=True)
class Edge:
    """From one node to another that waits for it, or to the end of the workflow.

    Attributes:
        source, target: names of nodes; the target may be `END`, where a choice leads nowhere.
        probability: that this edge fires rather than another of the source's; None: it fires in any case.
        context: what the prompt of the target begins with: "answer" is the answer of the source, "all" its
            prompt and answer.
    """

    source: str
    target: str
    probability: float | None = None
    context: str = "none"

    def __post_init__(self) -> None:
        p = self.probability
        if p is not None and not (isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1):
            raise InputError(f"edge {self}: probability must be a number from 0 to 1, not {p!r}")
        if self.context not in CONTEXTS:
            raise unknown(f"context of edge {self}", self.context, CONTEXTS)
        if self.target == END and p is None:
            raise InputError(f"edge {self}: nothing has to lead to the end but a choice; leave it out")

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@dataclasses.dataclass(frozen=True)
class Loop:
    """A part of a workflow that may be gone through several times: its head, the edges back to that (by
    number), what it consists of, in order, and how often it may be gone through."""

    head: str
    back: frozenset[int]
    body: tuple[str | Loop, ...]
    max_visits: int | None

    def nodes(self) -> list[str]:
        """The names of all nodes in it."""
        return [name for item in self.body for name in ([item] if isinstance(item, str) else item.nodes())]


@dataclasses.dataclass(frozen=True)
class Workflow:
    """A graph of calls, and how often it is run.

    Attributes:
        name: for tables and messages.
        nodes, edges: the graph, see the module.
        rate: jobs/s.
        arrivals: the process of their arrivals, which is scaled to the rate.
        start: the nodes that are called when a job arrives; by default those that no edge leads to.

    Raises:
        InputError: a name that there is not or is there twice, probabilities that do not sum to 1, a node
            that is never reached, a loop that is entered at two nodes, that has no end, or that goes on
            behind and goes back at once.
    """

    name: str
    nodes: Sequence[Node]
    edges: Sequence[Edge] = ()
    rate: float = 1.0
    arrivals: Arrivals = _arrivals.Poisson()  # noqa: RUF009
    start: Sequence[str] = ()

    def __post_init__(self) -> None:
        for field in ("nodes", "edges", "start"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not (isinstance(self.rate, int | float) and 0 < self.rate < math.inf):
            raise self._error(f"rate must be a positive number of jobs/s, not {self.rate!r}")
        if not self.nodes:
            raise self._error("has no node; give it at least one")
        names = [node.name for node in self.nodes]
        for name in names:
            if names.count(name) > 1:
                raise self._error(f"two nodes are called {name!r}; rename one")
        for edge in self.edges:
            if edge.source not in names:
                raise unknown(f"source of edge {edge} in workflow {self.name}", edge.source, names)
            if edge.target not in (*names, END):
                raise unknown(f"target of edge {edge} in workflow {self.name}", edge.target, [*names, END])
        pairs = [(edge.source, edge.target) for edge in self.edges]
        for pair in pairs:
            if pairs.count(pair) > 1:
                raise self._error(f"edge {pair[0]} -> {pair[1]} is there twice; give it once")
        for name in self.start:
            if name not in names:
                raise unknown(f"start of workflow {self.name}", name, names)
        if not self.starts:
            raise self._error("every node has an edge to it, so that none begins; name some as start")
        self._check_choices()
        self._check_reach()

    def _error(self, problem: str) -> InputError:
        return InputError(f"workflow {self.name}: {problem}")

    def _check_choices(self) -> None:
        for node in self.nodes:
            given = [e.probability for e in self.edges if e.source == node.name]
            chances = [p for p in given if p is not None]
            if not chances:
                continue
            if len(chances) < len(given):
                raise self._error(
                    f"of the edges from {node.name} some have a probability and some do not; "
                    "give all of them one, or none"
                )
            if abs(sum(chances) - 1) > 1e-9:
                raise self._error(
                    f"the probabilities of the edges from {node.name} sum to {sum(chances):g}; they must sum "
                    f"to 1 (an edge to {END!r} may take the rest)"
                )
            if node.copies.largest > 1:
                raise self._error(
                    f"node {node.name} has copies and chooses among edges; let a node behind it choose"
                )

    def _check_reach(self) -> None:
        """And of loops, which `visits` complains of."""
        reached = set(self.starts)
        while True:
            more = {edge.target for edge in self.edges if edge.source in reached} - {END}
            if more <= reached:
                break
            reached |= more
        known = len(reached) == len(self.nodes)  # else what is not reached has no visits to speak of
        for node in self.nodes:
            if node.name not in reached or (known and self.visits()[node.name] == 0):
                raise self._error(
                    f"node {node.name} is never reached; lead an edge to it, or name it a start"
                )

    # ------------------------------------------------------------------------------------------ structure

    @cached_property
    def starts(self) -> tuple[str, ...]:
        """The nodes that are called when a job arrives."""
        targets = {edge.target for edge in self.edges}
        return tuple(self.start) or tuple(n.name for n in self.nodes if n.name not in targets)

    @cached_property
    def node(self) -> dict[str, Node]:
        """The nodes by name."""
        return {node.name: node for node in self.nodes}

    def edges_from(self, name: str) -> list[int]:
        """Numbers of the edges from a node."""
        return [i for i, edge in enumerate(self.edges) if edge.source == name]

    def edges_to(self, name: str) -> list[int]:
        """Numbers of the edges to a node."""
        return [i for i, edge in enumerate(self.edges) if edge.target == name]

    @cached_property
    def parts(self) -> tuple[str | Loop, ...]:
        """The nodes in an order in which none comes before one that it may wait for; loops as `Loop`s."""
        inside = frozenset(i for i, edge in enumerate(self.edges) if edge.target != END)
        return self._parts([node.name for node in self.nodes], inside, set(self.starts))

    def _parts(self, names: list[str], inside: frozenset[int], starts: set[str]) -> tuple[str | Loop, ...]:
        """Of the nodes `names` with the edges `inside`, entered at `starts`."""
        parts: list[str | Loop] = []
        for component in _components(names, [(self.edges[i].source, self.edges[i].target) for i in inside]):
            within = {
                i for i in inside if self.edges[i].source in component and self.edges[i].target in component
            }
            if not within:
                parts.append(component[0])
                continue
            entered = {self.edges[i].target for i in inside - within} | starts
            heads = [name for name in component if name in entered]
            if len(heads) != 1:
                raise self._error(
                    f"the loop of {', '.join(component)} is entered at {' and '.join(heads)}; "
                    "enter it at one node"
                )
            back = frozenset(i for i in within if self.edges[i].target == heads[0])
            body = self._parts(component, frozenset(within - back), {heads[0]})
            parts.append(Loop(heads[0], back, body, self.node[heads[0]].max_visits))
        return tuple(parts)

    # ------------------------------------------------------------------------------------------ expectation

    def visits(self) -> dict[str, float]:
        """Expected calls of each node in a job, exactly: probabilities times mean copies."""
        return dict(self._visits)

    @cached_property
    def _visits(self) -> dict[str, float]:
        times, _ = self._expect(self.parts, frozenset(self.starts), frozenset())
        copies = {node.name: mean_of(node.copies) for node in self.nodes}
        return {node.name: times.get(node.name, 0.0) * copies[node.name] for node in self.nodes}

    def chances(self, name: str, closed: frozenset[int]) -> list[tuple[int, float]]:
        """The edges that a node chooses one of, by number, and with what probability; `closed` do not fire.

        Empty if its edges all fire (but for those closed), or none does.
        """
        found = [(i, self.edges[i].probability) for i in self.edges_from(name)]
        chances = [(i, p) for i, p in found if p is not None and i not in closed]
        total = math.fsum(p for _, p in chances)
        if total > 0:
            return [(i, p / total) for i, p in chances]
        return [(i, 1 / len(chances)) for i, _ in chances]

    def _expect(
        self, parts: Iterable[str | Loop], starts: frozenset[str], closed: frozenset[int]
    ) -> tuple[dict[str, float], dict[frozenset[int], float]]:
        """Expected calls of nodes when `starts` are called, and the distribution of the edges that fire and
        lead out of these parts.

        Goes through all combinations of choices, those alike together: a state is the set of edges that
        have fired and whose targets are still to come.
        """
        visits: dict[str, float] = {}
        states = {frozenset[int](): 1.0}
        for part in parts:
            loop = part if isinstance(part, Loop) else None
            head = loop.head if loop is not None else str(part)
            incoming = frozenset(self.edges_to(head))
            if loop is not None:
                incoming -= loop.back
                times, exits = self._expect_loop(loop, closed)
            else:
                times, exits = {head: 1.0}, self._fired(head, closed)
            after: dict[frozenset[int], float] = {}
            for state, chance in states.items():
                left = state - incoming
                if head in starts or left != state:
                    for name, count in times.items():
                        visits[name] = visits.get(name, 0.0) + chance * count
                    for fired, share in exits.items():
                        key = left | fired
                        after[key] = after.get(key, 0.0) + chance * share
                else:
                    after[left] = after.get(left, 0.0) + chance
            states = after
            if len(states) > _MOST_STATES:
                raise self._error(
                    f"more than {_MOST_STATES} combinations of choices lie beside each other at {head}; "
                    "use copies, or split the workflow"
                )
        return visits, states

    def _fired(self, name: str, closed: frozenset[int]) -> dict[frozenset[int], float]:
        """What fires after a node, edges to the end left out."""
        chances = self.chances(name, closed)
        if not chances:
            plain = [i for i in self.edges_from(name) if self.edges[i].probability is None]
            return {frozenset(i for i in plain if i not in closed): 1.0}
        fired: dict[frozenset[int], float] = {}
        for i, p in chances:
            key = frozenset([i]) if self.edges[i].target != END else frozenset[int]()
            if p > 0:
                fired[key] = fired.get(key, 0.0) + p
        return fired

    def _expect_loop(
        self, loop: Loop, closed: frozenset[int]
    ) -> tuple[dict[str, float], dict[frozenset[int], float]]:
        """`_expect` of a loop that is entered once."""
        who = ", ".join(loop.nodes())
        once, fired = self._expect(loop.body, frozenset([loop.head]), closed)
        again = 0.0
        leaves: dict[frozenset[int], float] = {}
        for edges, chance in fired.items():
            if edges & loop.back:
                if edges - loop.back:
                    both = [str(self.edges[i]) for i in sorted(edges)]
                    raise self._error(
                        f"the loop of {who} can go back and go on at once ({' and '.join(both)}); "
                        "let one node choose between the two"
                    )
                again += chance
            else:
                leaves[edges] = chance
        if loop.max_visits is None:
            if again > 1 - _ENDLESS:
                raise self._error(
                    f"the loop of {who} never ends: the expected number of visits is infinite; let a node of "
                    "it choose to leave, or set max_visits"
                )
            return (
                {name: count / (1 - again) for name, count in once.items()},
                {edges: chance / (1 - again) for edges, chance in leaves.items()},
            )
        rounds = loop.max_visits - 1
        factor = float(rounds) if again == 1 else (1 - again**rounds) / (1 - again)
        last, out = self._expect(loop.body, frozenset([loop.head]), closed | loop.back)
        visits = {name: factor * count for name, count in once.items()}
        for name, count in last.items():
            visits[name] = visits.get(name, 0.0) + again**rounds * count
        exits = {edges: factor * chance for edges, chance in leaves.items()}
        for edges, chance in out.items():
            exits[edges] = exits.get(edges, 0.0) + again**rounds * chance
        return visits, {edges: chance for edges, chance in exits.items() if chance > 0}

    def hops_left(self) -> dict[str, float]:
        """Expected calls after each node, on the longer branch where it forks.

        `max_visits` is left out: a loop that would have no end without it counts as a thousand rounds.
        """
        left = {node.name: 0.0 for node in self.nodes} | {END: -1.0}
        for _ in range(1000 * len(self.nodes)):
            change = 0.0
            for node in self.nodes:
                edges = [self.edges[i] for i in self.edges_from(node.name)]
                if not edges:
                    continue
                if edges[0].probability is None:
                    value = max(1 + left[e.target] for e in edges)
                else:
                    value = sum((e.probability or 0.0) * (1 + left[e.target]) for e in edges)
                change = max(change, abs(value - left[node.name]))
                left[node.name] = value
            if change < 1e-12:
                break
        del left[END]
        return left


def mean_of(marginal: Marginal) -> float:
    """The mean of a distribution of numbers; of one that is not fixed by 65,536 quantiles."""
    if isinstance(marginal, Fixed):
        return float(marginal.tokens)
    return float(marginal.quantile((np.arange(65536) + 0.5) / 65536).mean())


def _components(names: list[str], edges: list[tuple[str, str]]) -> list[list[str]]:
    """Strongly connected components, each in the order of `names`, none before one that leads to it."""
    targets: dict[str, list[str]] = {name: [] for name in names}
    for source, target in edges:
        targets[source].append(target)

    def reach(name: str) -> set[str]:
        seen, left = {name}, [name]
        while left:
            for target in targets[left.pop()]:
                if target not in seen:
                    seen.add(target)
                    left.append(target)
        return seen

    reached = {name: reach(name) for name in names}
    components: list[list[str]] = []
    for name in names:
        if not any(name in component for component in components):
            components.append([other for other in names if name in reached[other] and other in reached[name]])
    # Whoever reaches a component reaches all that it does, and itself: it comes first.
    components.sort(key=lambda component: -len(reached[component[0]]))
    return components
