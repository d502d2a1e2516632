"""Jobs drawn from workflows: choices made, loops unrolled, tokens and delays drawn.

All jobs of a workflow are drawn together, node after node in the order of `Workflow.parts`. Arrivals, and for
each node choices, copies, lengths and delays, have their own streams of random numbers: another rate gives
the same jobs at other times, other lengths leave the structure as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.compile import njit
from llmsched_env.errors import InputError
from llmsched_env.networks.jobs import Jobs
from llmsched_env.networks.workflow import CONTEXTS, END, Loop, Workflow
from llmsched_env.workloads.arrivals import AtOnce
from llmsched_env.workloads.lengths import Fixed

Ints = NDArray[np.int64]
_MOST_HOPS = 2**31 - 2


class _Streams:
    """The random numbers of one workflow, by what they are for."""

    def __init__(self, seed: int, number: int, workflow: Workflow) -> None:
        self._seed, self._number = seed, number
        self._nodes = {node.name: i + 1 for i, node in enumerate(workflow.nodes)}

    def get(self, node: str | None, purpose: int) -> np.random.Generator:
        key = (self._number, 0 if node is None else self._nodes[node], purpose)
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))


_ARRIVALS, _CHOICE, _COPIES, _LENGTHS, _DELAY = range(5)


def draw(workflows: Sequence[Workflow], *, num_jobs: int | None, horizon_s: float, seed: int) -> Jobs:
    """Jobs of these workflows, in order of arrival; of two at once, the first workflow's first.

    Args:
        num_jobs: how many, the first so many of all; None: those that arrive up to `horizon_s`.
        horizon_s: seconds; inf where `num_jobs` is given.

    Raises:
        InputError: if neither says how many, or nothing arrives.
    """
    streams = [_Streams(seed, i, workflow) for i, workflow in enumerate(workflows)]
    times = _arrivals(workflows, streams, num_jobs, horizon_s)
    first_node = np.cumsum([0, *(len(workflow.nodes) for workflow in workflows)])
    parts = [
        _draw_workflow(workflow, len(t), stream)
        for workflow, t, stream in zip(workflows, times, streams, strict=True)
    ]
    kind = np.repeat(np.arange(len(workflows)), [len(t) for t in times])
    arrival = np.concatenate(times)
    order = np.lexsort((kind, arrival))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))  # of each job, among all
    first_job = np.cumsum([0, *map(len, times)])
    job = np.concatenate([place[part.job + first] for part, first in zip(parts, first_job, strict=False)])
    node = np.concatenate([part.node + first for part, first in zip(parts, first_node, strict=False)])
    sizes = [len(part.job) for part in parts]
    offsets = np.cumsum([0, *sizes])
    before, after = (
        np.concatenate([getattr(part, name) + first for part, first in zip(parts, offsets, strict=False)])
        for name in ("before", "after")
    )
    carried = np.concatenate([part.context for part in parts])
    prompt, output, delay = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("prompt", "output", "delay")
    )
    # Number the hops by job; within a job they keep their order, in which none comes before one it waits for.
    hops = np.argsort(job, kind="stable")
    number = np.empty(len(hops), np.int64)
    number[hops] = np.arange(len(hops))
    before, after = number[before], number[after]
    edges = np.lexsort((before, after))
    before, after, carried = before[edges], after[edges], carried[edges]
    prompt, output = prompt[hops], output[hops]
    _carry(prompt, output, before, after, carried)
    if len(prompt) and prompt.max() > 2**30:
        raise InputError("a prompt grows beyond 2^30 tokens; limit the loops that carry context (max_visits)")
    return Jobs.of(
        arrival[order],
        np.bincount(job, minlength=len(order)),
        node[hops],
        prompt,
        output,
        before=before,
        after=after,
        delay_s=delay[hops],
        workflow=kind[order],
    )


def _arrivals(
    workflows: Sequence[Workflow], streams: Sequence[_Streams], num_jobs: int | None, horizon_s: float
) -> list[NDArray[np.float64]]:
    """The times at which the jobs of each workflow arrive."""
    if num_jobs is None and not horizon_s < np.inf:
        raise InputError("give a number of jobs or a horizon in seconds")
    total = sum(workflow.rate for workflow in workflows)
    counts = []
    for workflow in workflows:
        if isinstance(workflow.arrivals, AtOnce) and num_jobs is None:
            raise InputError(
                f"workflow {workflow.name}: all jobs arrive at once; say how many, not a horizon"
            )
        # So many that no more are needed, but for odd processes.
        mean = workflow.rate * horizon_s if num_jobs is None else num_jobs * workflow.rate / total
        counts.append(int(mean + 6 * np.sqrt(mean) + 10))
    while True:
        times = [
            workflow.arrivals.unit_times(n, stream.get(None, _ARRIVALS)) / workflow.rate
            for workflow, n, stream in zip(workflows, counts, streams, strict=True)
        ]
        until = horizon_s
        if num_jobs is not None and sum(counts) >= num_jobs:
            until = min(until, float(np.sort(np.concatenate(times))[num_jobs - 1]))
        short = [t[-1] < until < np.inf for t in times]
        if not any(short):
            break
        counts = [2 * n if more else n for n, more in zip(counts, short, strict=True)]
    times = [t[t <= until] for t in times]
    if num_jobs is not None:
        times = _first(times, num_jobs)
    if not sum(map(len, times)):
        raise InputError(f"no job arrives within {horizon_s:g} s; take a longer horizon, or a number of jobs")
    return times


def _first(times: list[NDArray[np.float64]], count: int) -> list[NDArray[np.float64]]:
    """The first `count` of all times, of equal ones those of the first workflow."""
    kind = np.repeat(np.arange(len(times)), [len(t) for t in times])
    kept = np.lexsort((kind, np.concatenate(times)))[:count]
    number = np.bincount(kind[kept], minlength=len(times))
    return [t[:n] for t, n in zip(times, number, strict=True)]


class _Drawn(NamedTuple):
    """The hops of all jobs of a workflow, in the order in which they were drawn."""

    job: Ints
    node: Ints
    prompt: Ints
    output: Ints
    delay: NDArray[np.float64]
    before: Ints
    after: Ints
    context: Ints


def _draw_workflow(workflow: Workflow, jobs: int, streams: _Streams) -> _Drawn:
    drawing = _Drawing(workflow, jobs, streams)
    drawing.parts(workflow.parts, frozenset(workflow.starts), np.ones(jobs, bool), frozenset())
    job, node = _joined(drawing.job), _joined(drawing.node)
    prompt, output = np.ones(len(job), np.int64), np.ones(len(job), np.int64)
    delay = np.zeros(len(job))
    for i, one in enumerate(workflow.nodes):
        mine = np.flatnonzero(node == i)
        rng = streams.get(one.name, _LENGTHS)
        prompt[mine], output[mine] = one.lengths.tokens(rng.random((len(mine), 2)))
        delay[mine] = one.delay.draw(len(mine), streams.get(one.name, _DELAY))
    before, after, context = (_joined(x) for x in (drawing.before, drawing.after, drawing.context))
    return _Drawn(job, node, prompt, output, delay, before, after, context)


def _joined(parts: list[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class _Drawing:
    """The structure of all jobs of a workflow as it is drawn, one node of all of them at a time.

    Of each edge and job it keeps whether the edge has fired, and the hops that it comes from: `count` of them
    from `first` on.
    """

    def __init__(self, workflow: Workflow, jobs: int, streams: _Streams) -> None:
        self.workflow, self.jobs = workflow, jobs
        edges = len(workflow.edges)
        self.fired: NDArray[np.bool_] = np.zeros((edges, jobs), bool)
        self.first: Ints = np.zeros((edges, jobs), np.int64)
        self.count: Ints = np.zeros((edges, jobs), np.int64)
        self.hops = 0
        self.job: list[Ints] = []
        self.node: list[Ints] = []
        self.before: list[Ints] = []
        self.after: list[Ints] = []
        self.context: list[Ints] = []
        self._index = {node.name: i for i, node in enumerate(workflow.nodes)}
        self._choices = {node.name: streams.get(node.name, _CHOICE) for node in workflow.nodes}
        self._copies = {node.name: streams.get(node.name, _COPIES) for node in workflow.nodes}

    def parts(
        self,
        parts: Sequence[str | Loop],
        starts: frozenset[str],
        on: NDArray[np.bool_],
        closed: frozenset[int],
    ) -> None:
        """Go through parts of the workflow in the jobs `on`, which call `starts`."""
        for part in parts:
            if isinstance(part, Loop):
                self._loop(part, starts, on, closed)
            else:
                incoming = self.workflow.edges_to(part)
                called = self._called(incoming)
                self._visit(part, called | on if part in starts else called, incoming, closed)

    def _called(self, edges: Sequence[int]) -> NDArray[np.bool_]:
        """(jobs,) whether any of these edges has fired."""
        called: NDArray[np.bool_] = np.logical_or.reduce(self.fired[list(edges)], axis=0)
        return called

    def _loop(
        self, loop: Loop, starts: frozenset[str], on: NDArray[np.bool_], closed: frozenset[int]
    ) -> None:
        """Go through a loop until no job goes back."""
        outer = [i for i in self.workflow.edges_to(loop.head) if i not in loop.back]
        incoming: Sequence[int] = outer
        called = self._called(outer)
        if loop.head in starts:
            called = called | on
        visits = 0
        while called.any():
            visits += 1
            last = loop.max_visits is not None and visits >= loop.max_visits
            shut = closed | loop.back if last else closed
            self._visit(loop.head, called, incoming, shut)
            rest = [part for part in loop.body if part != loop.head]
            self.parts(rest, frozenset(), called, shut)
            called = self._called(sorted(loop.back))
            incoming = sorted(loop.back)

    def _visit(
        self,
        name: str,
        called: NDArray[np.bool_],
        incoming: Sequence[int],
        closed: frozenset[int],
    ) -> None:
        """Call a node in the jobs `called`; edges to it that have fired are used up."""
        workflow = self.workflow
        node = workflow.node[name]
        jobs = np.flatnonzero(called)
        copies: Ints = np.ones(len(jobs), np.int64)
        if not (isinstance(node.copies, Fixed) and node.copies.tokens == 1):
            copies = node.copies.quantile(self._copies[name].random(len(jobs)))
        first = self.hops + np.concatenate([[0], np.cumsum(copies)[:-1]]).astype(np.int64)
        self.hops += int(copies.sum())
        if self.hops > _MOST_HOPS:
            raise InputError(f"workflow {workflow.name}: more than {_MOST_HOPS} hops; draw fewer jobs")
        self.job.append(np.repeat(jobs, copies))
        self.node.append(np.full(int(copies.sum()), self._index[name]))
        for i in incoming:
            fired = self.fired[i, jobs]
            if fired.any():
                sources = (self.first[i, jobs][fired], self.count[i, jobs][fired])
                self._join(sources, (first[fired], copies[fired]), CONTEXTS.index(workflow.edges[i].context))
        self.fired[list(incoming)] = False
        outgoing = workflow.edges_from(name)
        for i in outgoing:
            self.first[i, jobs], self.count[i, jobs] = first, copies
        chances = workflow.chances(name, closed)
        if chances:
            edges = np.array([i for i, _ in chances])
            bounds = np.cumsum([p for _, p in chances])
            taken = np.searchsorted(bounds[:-1], self._choices[name].random(len(jobs)), side="right")
            self.fired[edges[taken], jobs] = True
        else:
            for i in outgoing:
                if i not in closed:
                    self.fired[i, jobs] = True
        for i in outgoing:
            if workflow.edges[i].target == END:
                self.fired[i] = False

    def _join(self, sources: tuple[Ints, Ints], targets: tuple[Ints, Ints], context: int) -> None:
        """Have all targets wait for all sources: of each job `count` hops from `first` on."""
        pairs = sources[1] * targets[1]
        which = np.repeat(np.arange(len(pairs)), pairs)
        place = np.arange(len(which)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        self.before.append(sources[0][which] + place % sources[1][which])
        self.after.append(targets[0][which] + place // sources[1][which])
        self.context.append(np.full(len(which), context, np.int64))


@njit
def _carry(prompt: Any, output: Any, before: Any, after: Any, context: Any) -> None:
    """Add to prompts what edges carry over; edges lie in the order of their targets."""
    for i in range(len(before)):
        if context[i] >= 1:
            prompt[after[i]] += output[before[i]]
        if context[i] == 2:
            prompt[after[i]] += prompt[before[i]]
