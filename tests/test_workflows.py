"""Workflows: expected visits are exact, drawn jobs follow the rules, bad graphs are told apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_env import InputError
from llmsched_env.networks import END, Edge, Network, Node, Station, Workflow, delays
from llmsched_env.workloads.lengths import Fixed, Lengths, Poisson, Uniform

CALL = Lengths(Fixed(10), Fixed(3))


def node(name: str, **options) -> Node:
    return Node(name, "gpu", options.pop("lengths", CALL), **options)


def flow(nodes, edges=(), **options) -> Workflow:
    nodes = [node(n) if isinstance(n, str) else n for n in nodes]
    return Workflow("w", nodes, [Edge(*e) if isinstance(e, tuple) else e for e in edges], **options)


def network(*workflows: Workflow) -> Network:
    return Network("n", [Station("gpu")], workflows)


def drawn_visits(workflow: Workflow, jobs: int = 20_000) -> dict[str, float]:
    drawn = network(workflow).draw(jobs, seed=1)
    counts = np.bincount(drawn.node, minlength=len(workflow.nodes)) / jobs
    return {n.name: c for n, c in zip(workflow.nodes, counts, strict=True)}


CASES = {
    "chain": (flow("abc", [("a", "b"), ("b", "c")]), {"a": 1, "b": 1, "c": 1}),
    "fork and join": (
        flow("abcd", [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]),
        {"a": 1, "b": 1, "c": 1, "d": 1},
    ),
    "alternatives that meet": (
        flow("abcd", [("a", "b", 0.3), ("a", "c", 0.7), ("b", "d"), ("c", "d")]),
        {"a": 1, "b": 0.3, "c": 0.7, "d": 1},
    ),
    "a branch that may end": (
        flow(
            "abcd",
            [("a", "b"), ("a", "c"), ("b", "d", 0.5), ("b", END, 0.5), ("c", "d", 0.5), ("c", END, 0.5)],
        ),
        {"a": 1, "b": 1, "c": 1, "d": 0.75},
    ),
    "a loop": (
        flow("ab", [("a", "b"), ("b", "a", 0.6), ("b", END, 0.4)], start=["a"]),
        {"a": 2.5, "b": 2.5},
    ),
    "a loop on itself, at most 3 times": (
        flow([node("a", max_visits=3), "b"], [("a", "a", 0.5), ("a", "b", 0.5)], start=["a"]),
        {"a": 1.75, "b": 1},
    ),
    "three times exactly": (
        flow([node("a", max_visits=3), "b"], [("a", "a", 1.0), ("a", "b", 0.0)], start=["a"]),
        {"a": 3, "b": 1},
    ),
    "a fork in a loop": (
        flow(
            "abcd",
            [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", "a", 0.25), ("d", END, 0.75)],
            start=["a"],
        ),
        {"a": 4 / 3, "b": 4 / 3, "c": 4 / 3, "d": 4 / 3},
    ),
    "a loop in a loop": (
        flow(
            "abc",
            [("a", "b"), ("b", "b", 0.5), ("b", "c", 0.5), ("c", "a", 0.2), ("c", END, 0.8)],
            start=["a"],
        ),
        {"a": 1.25, "b": 2.5, "c": 1.25},
    ),
    "two ways out of a loop": (
        flow(
            "abcd",
            [("a", "b", 0.5), ("a", "c", 0.5), ("b", "a", 0.5), ("b", "d", 0.5), ("c", "d")],
            start=["a"],
        ),
        {"a": 4 / 3, "b": 2 / 3, "c": 2 / 3, "d": 1},
    ),
    "copies": (
        flow(["a", node("b", copies=Uniform(2, 6)), "c"], [("a", "b"), ("b", "c")]),
        {"a": 1, "b": 4, "c": 1},
    ),
    "an inner loop that goes back further": (
        flow(
            [node("a", max_visits=3), node("b"), node("c")],
            [("a", "b"), ("b", "b", 0.5), ("b", "a", 0.25), ("b", "c", 0.25)],
            start=["a"],
        ),
        # An inner loop takes 2 rounds; where it may not go further back, 1 / (1 - 2/3) = 3 of them.
        {"a": 1.75, "b": 2 + 0.5 * 2 + 0.25 * 3, "c": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_expected_visits(name):
    workflow, expected = CASES[name]
    visits = workflow.visits()
    assert visits == pytest.approx(expected)
    assert drawn_visits(workflow) == pytest.approx(visits, rel=0.04)


@st.composite
def graphs(draw: st.DrawFn) -> Workflow:
    """Random graphs with forks, choices, copies and loops on single nodes or back over two."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = int(rng.integers(1, 7))
    names = "abcdefg"[:n]
    nodes, edges = [], []
    for i, name in enumerate(names):
        later = [other for other in names[i + 1 :] if rng.random() < 0.5]
        chooses = rng.random() < 0.5 and later
        back = chooses and rng.random() < 0.5
        targets = ([names[max(0, i - int(rng.integers(0, 2)))]] if back else []) + later
        copies = Fixed(1) if chooses or rng.random() < 0.7 else Uniform(1, 3)
        nodes.append(
            node(name, copies=copies, max_visits=int(rng.integers(1, 5)) if rng.random() < 0.5 else None)
        )
        if chooses:
            weights = rng.random(len(targets)) + 0.1
            edges += [(name, t, float(w)) for t, w in zip(targets, weights / weights.sum(), strict=True)]
        else:
            edges += [(name, t) for t in targets]
    try:
        return flow(nodes, edges, start=[names[0]])
    except InputError as error:
        known = ("never reached", "go on at once", "entered at", "never ends")
        assert any(text in str(error) for text in known), error
        return flow("a")


@settings(max_examples=60)
@given(graphs())
def test_drawn_jobs_follow_the_graph(workflow):
    jobs = network(workflow).draw(3000, seed=2)
    visits = np.bincount(jobs.node, minlength=len(workflow.nodes)) / 3000
    assert visits == pytest.approx(list(workflow.visits().values()), rel=0.25, abs=0.08)
    names = [n.name for n in workflow.nodes]
    pairs = {(e.source, e.target) for e in workflow.edges}
    assert {
        (names[jobs.node[b]], names[jobs.node[a]]) for b, a in zip(jobs.before, jobs.after, strict=True)
    } <= pairs
    # The first hop of each job is the start; every other one waits for somebody.
    first = jobs.first_hop[:-1]
    assert (jobs.node[first] == 0).all()
    waits = np.bincount(jobs.after, minlength=jobs.num_hops) > 0
    assert waits[np.setdiff1d(np.arange(jobs.num_hops), first)].sum() == waits.sum()
    for n in workflow.nodes:  # the head of a loop is not called more often than it may be
        if n.max_visits is not None and all(e.source == n.name for e in workflow.edges if e.target == n.name):
            calls = np.bincount(jobs.job_of_hop[jobs.node == names.index(n.name)], minlength=3000)
            assert calls.max() <= n.max_visits * n.copies.largest


def test_joins_wait_for_all_copies():
    workflow = flow(["a", node("b", copies=Fixed(3)), node("c", copies=Fixed(2))], [("a", "b"), ("b", "c")])
    jobs = network(workflow).draw(5)
    assert np.diff(jobs.first_hop).tolist() == [6] * 5 and jobs.node[:6].tolist() == [0, 1, 1, 1, 2, 2]
    of_first = jobs.after < 6
    edges = sorted(zip(jobs.before[of_first].tolist(), jobs.after[of_first].tolist(), strict=True))
    assert edges == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (2, 4), (2, 5), (3, 4), (3, 5)]


def test_context_is_carried():
    workflow = flow(
        ["a", node("b", copies=Fixed(2)), "c"],
        [Edge("a", "b", context="answer"), Edge("b", "c", context="all")],
    )
    jobs = network(workflow).draw(2)
    assert jobs.prompt_tokens[:4].tolist() == [10, 13, 13, 10 + 2 * (13 + 3)]
    loop = flow([node("a", max_visits=4)], [Edge("a", "a", 1.0, "all"), Edge("a", END, 0.0)], start=["a"])
    assert network(loop).draw(1).prompt_tokens.tolist() == [10, 23, 36, 49]


def test_arrivals_of_several_workflows():
    two = network(flow("a", rate=3.0), Workflow("v", [node("a")], rate=1.0, arrivals=_even()))
    jobs = two.draw(horizon_s=500.0, seed=4)
    assert (np.diff(jobs.arrival_s) >= 0).all() and jobs.arrival_s[-1] <= 500.0
    assert np.bincount(jobs.workflow).tolist()[1] == 501 and abs(np.bincount(jobs.workflow)[0] - 1500) < 150
    first = two.draw(100, seed=4)
    assert np.array_equal(first.arrival_s, jobs.arrival_s[:100])
    assert np.array_equal(first.prompt_tokens, jobs.prompt_tokens[:100])
    faster = two.scaled(2.0).draw(100, seed=4)
    assert np.allclose(2 * faster.arrival_s, first.arrival_s)


def _even():
    from llmsched_env.workloads.arrivals import Deterministic

    return Deterministic()


def test_delays_and_lengths_are_drawn():
    workflow = flow(
        [
            "a",
            node("b", delay=delays.get("exponential:2"), lengths=Lengths(Poisson(32), Poisson(8, 1))),
        ],
        [("a", "b")],
    )
    jobs = network(workflow).draw(20_000)
    b = jobs.node == 1
    assert jobs.delay_s[~b].max() == 0 and jobs.delay_s[b].mean() == pytest.approx(2.0, rel=0.03)
    prompt, output = jobs.prompt_tokens[b], jobs.output_tokens[b]
    assert prompt.mean() == pytest.approx(32, rel=0.01) and prompt.var() == pytest.approx(32, rel=0.05)
    assert output.mean() == pytest.approx(9, rel=0.01) and output.var() == pytest.approx(8, rel=0.05)
    assert delays.get("uniform:1,3").draw(1000, np.random.default_rng(0)).min() >= 1
    assert np.median(delays.get("lognormal:3,0.5").draw(9999, np.random.default_rng(0))) == pytest.approx(
        3, rel=0.05
    )


def test_hops_left():
    loop, _ = CASES["a loop"]
    # b: with 0.6 a and b again, 1.5 rounds of two more.
    assert loop.hops_left() == pytest.approx({"a": 4.0, "b": 3.0})
    fork = flow("abcd", [("a", "b"), ("a", "c"), ("c", "d")])
    assert fork.hops_left() == {"a": 2, "b": 0, "c": 1, "d": 0}


@pytest.mark.parametrize(
    ("nodes", "edges", "start", "problem"),
    [
        ([], [], [], "has no node"),
        ("aa", [], [], "two nodes are called 'a'"),
        ("ab", [("a", "x")], [], "unknown target of edge a -> x"),
        ("ab", [("a", "b", 0.5), ("a", END, 0.4)], [], "sum to 0.9; they must sum to 1"),
        ("abc", [("a", "b", 0.5), ("a", "c")], [], "some have a probability and some do not"),
        ("ab", [("a", "b"), ("b", "a")], [], "every node has an edge to it"),
        ("ab", [("a", "b"), ("b", "a")], ["a"], "the loop of a, b never ends"),
        ("ab", [("a", "a", 1.0), ("a", "b", 0.0)], ["a"], "the loop of a never ends"),
        (
            "abc",
            [("a", "b"), ("b", "a", 0.5), ("b", "c", 0.5), ("c", "b")],
            ["a"],
            "the loop of a, b, c never ends",
        ),
        (
            "abc",
            [("a", "b"), ("a", "c"), ("b", "c", 0.5), ("b", END, 0.5), ("c", "b")],
            [],
            "entered at b and c",
        ),
        ("abc", [("a", "b"), ("c", "c", 0.5), ("c", END, 0.5)], ["a"], "node c is never reached"),
        ("ab", [("a", "a", 0.5), ("a", END, 0.5)], ["a"], "node b is never reached"),
        ("abc", [("a", "b"), ("b", "a"), ("b", "c")], ["a"], "can go back and go on at once"),
        ("ab", [("a", "b"), ("a", "b")], [], "edge a -> b is there twice"),
        ("ab", [("a", "b")], ["c"], "unknown start of workflow w 'c'"),
    ],
)
def test_bad_graphs(nodes, edges, start, problem):
    with pytest.raises(InputError, match=problem):
        flow(nodes, edges, start=start)


def test_bad_parts():
    for problem, make in (
        (
            "has copies and chooses",
            lambda: flow([node("a", copies=Fixed(2)), "b"], [("a", "b", 0.5), ("a", END, 0.5)]),
        ),
        ("give it a name other than 'end'", lambda: node("end")),
        ("nothing has to lead to the end but a choice", lambda: Edge("a", END)),
        ("probability must be a number from 0 to 1", lambda: Edge("a", "b", 1.5)),
        ("max_visits must be a whole number", lambda: node("a", max_visits=0)),
        ("weight must be a positive number", lambda: node("a", weight=-1.0)),
        ("priority must be a whole number", lambda: node("a", priority=2**31)),
        ("priority must be a whole number", lambda: node("a", priority=0.5)),
        ("unknown delay 'exp'", lambda: delays.get("exp:3")),
        ("delay uniform: low 3 is above high 1", lambda: delays.get("uniform:3,1")),
        ("mean must be a finite number above 0", lambda: delays.get("exponential:0")),
        ("give seconds, or a name", lambda: delays.get(None)),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=problem):
            make()


def test_too_many_choices_at_once():
    many = [f"n{i}" for i in range(20)]
    edges = [("a", n) for n in many]
    edges += [(n, t, 0.5) for n in many for t in (f"x{n}", f"y{n}")]
    with pytest.raises(InputError, match="combinations of choices lie beside each other"):
        flow(["a", *many, *(f"x{n}" for n in many), *(f"y{n}" for n in many)], edges)
