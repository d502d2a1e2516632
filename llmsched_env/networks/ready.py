"""Networks by name: the ready-made ones, and those that were registered."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmsched_env.core.config import EngineConfig
from llmsched_env.errors import InputError, unknown
from llmsched_env.networks import delays
from llmsched_env.networks.network import ROUTINGS, Network, Pool, Station
from llmsched_env.networks.workflow import END, Edge, Node, Workflow
from llmsched_env.profiles import Profile
from llmsched_env.workloads.arrivals import Poisson as PoissonArrivals
from llmsched_env.workloads.lengths import Fixed, Lengths, Lognormal, Poisson, Uniform

_makers: dict[str, Callable[[], Network]] = {}
_registered: dict[str, Network] = {}


def names() -> list[str]:
    """The names that `get` knows, sorted."""
    return sorted({*_makers, *_registered})


def get(
    name: str | Path | Network,
    *,
    load: float | None = None,
    routing: str | None = None,
    schedulers: Any = None,
) -> Network:
    """A network by name: one of `names()`, the path of a JSON file, or a network itself.

    Args:
        load: rates are scaled so that the pool with the highest nominal load has this.
        routing: of all its pools.
        schedulers: gives schedulers by name, for files (`Network.from_json`).

    Raises:
        InputError: an unknown name, with the nearest match, or a bad file or value.
    """
    if isinstance(name, Network):
        found = name
    elif name in _registered:
        found = _registered[str(name)]
    elif name in _makers:
        make = _makers[str(name)]
        text = inspect.getdoc(make) or ""
        source = [p.removeprefix("Source:") for p in text.split("\n\n") if p.startswith("Source:")]
        found = dataclasses.replace(
            make(), summary=" ".join(text.split("\n\n")[0].split()), source=" ".join(" ".join(source).split())
        )
    elif str(name).endswith(".json") or Path(str(name)).is_file():
        found = Network.from_json(name, schedulers)
    else:
        raise unknown("network", name, [*names(), "a JSON file's path"])
    if routing is not None:
        if routing not in ROUTINGS or routing == "outside":
            raise unknown("routing", routing, [r for r in ROUTINGS if r != "outside"])
        found = found.routed(routing)
    return found if load is None else found.at_load(load)


def register(network: Network) -> None:
    """Make a network known by its name.

    Raises:
        InputError: if the name is taken.
    """
    if network.name in names():
        raise InputError(f"a network {network.name!r} is known already; choose another name")
    _registered[network.name] = network


def _ready(name: str) -> Callable[[Callable[[], Network]], Callable[[], Network]]:
    """Register a function that makes the network `name`; its docstring says what it is."""

    def add(make: Callable[[], Network]) -> Callable[[], Network]:
        _makers[name] = make
        return make

    return add


# ---------------------------------------------------------------------- of the theory

UNIT = Profile("unit", "staircase", {"c": 1.0, "a": 0.0, "b0": 1.0}, provenance="every batch takes 1")
"""A batch takes one unit of time, whatever its size."""

CODELLAMA = Profile(
    "codellama-34b-a100",
    "staircase",
    {"c": 0.01128, "a": 0.03547, "b0": 128.0},
    gpu="A100-80GB",
    model="CodeLlama-34B",
    provenance="Dai, Deng, Li and Peng, arXiv 2504.07347v3, section 2.3: t_b = c + a ceil(b / b0)",
)


def unlimited(token_budget: int) -> EngineConfig:
    """An engine of the theory: a token budget, and neither a limit of memory nor of requests."""
    return EngineConfig(
        kv_blocks=2**30, block_size=16, token_budget=token_budget, max_num_seqs=1_000_000, watermark=0.0
    )


@_ready("rybko-stolyar")
def rybko_stolyar() -> Network:
    """Two engines, two kinds of programs through both in opposite directions: a cycle, at load 0.9.

    A program of kind A calls the first engine with a short task and then the second with a long one; one of
    kind B the second with a short and then the first with a long one. Priority to the long tasks, which exit,
    makes it unstable above a load of 0.559.

    Source: Rybko and Stolyar (1992); parameters of Dai, Deng, Li and Peng, arXiv 2504.07347v3, section 5.4,
    as reproduced in adolgert/Concourse.jl: prefill Poisson(32) and decode Poisson(32), then prefill
    Poisson(512) and decode Poisson(32); batches of up to 768 tokens that take one unit of time.
    """
    decodes = Poisson(32, 1)  # the first token of an answer comes out of the prefill
    short, long = Lengths(Poisson(32), decodes), Lengths(Poisson(512), decodes)
    rate = 0.9 * 768 / (64 + 544)

    def through(kind: str, one: str, two: str) -> Workflow:
        nodes = [Node("short", one, short, priority=1), Node("long", two, long)]
        return Workflow(kind, nodes, [Edge("short", "long")], rate)

    return Network(
        "rybko-stolyar",
        [Station("S1", UNIT, unlimited(768)), Station("S2", UNIT, unlimited(768))],
        [through("A", "S1", "S2"), through("B", "S2", "S1")],
    )


@_ready("jsq")
def two_engines() -> Network:
    """Two equal engines behind a router that joins the shortest queue, requests of 100 + 100 tokens.

    Source: Dai, Deng, Li and Peng, arXiv 2504.07347v3, proposition 3, as reproduced in adolgert/Concourse.jl.
    """
    call = Node("call", "engines", Lengths(Fixed(100), Fixed(101)))
    return Network(
        "jsq",
        [Station(f"engine-{i}", CODELLAMA, unlimited(512)) for i in (1, 2)],
        [Workflow("requests", [call], rate=0.9 * 2 * 512 / (0.01128 + 4 * 0.03547) / 200)],
        [Pool("engines", ["engine-1", "engine-2"], "jsq")],
    ).at_load(0.9)


@_ready("disaggregation")
def disaggregation() -> Network:
    """Prefill on one engine, decodes on another that takes the cache over: a tandem, stable where both are.

    The second call has a prompt of one token: the cache that is handed over takes no time to move and no
    room, which is why these are engines of the theory, whose time depends on the tokens of a batch alone.

    Source: neither Dai, Deng, Li and Peng nor their reproductions describe it: two stations in tandem, one
    with decodes of length 0, the other with prefills of length 0.
    """
    prefill = Node("prefill", "prefill", Lengths(Lognormal(160, 0.7, 4096), Fixed(1)))
    decode = Node("decode", "decode", Lengths(Fixed(1), Lognormal(160, 0.7, 4096)))
    stations = [Station(name, CODELLAMA, unlimited(512)) for name in ("prefill", "decode")]
    flow = Workflow("requests", [prefill, decode], [Edge("prefill", "decode")])
    return Network("disaggregation", stations, [flow]).at_load(0.9)


# ---------------------------------------------------------------------- of agents

_GPU = "a100-llama3-8b"


def _fleet(size: int, token_budget: int = 2048) -> tuple[list[Station], list[Pool]]:
    stations = [
        Station(f"gpu-{i}", _GPU, EngineConfig(token_budget=token_budget)) for i in range(1, size + 1)
    ]
    return stations, [Pool("gpus", [station.name for station in stations], "jsq")]


def _network(
    name: str, parts: tuple[Sequence[Station], Sequence[Pool]], nodes: Sequence[Node], **workflow: Any
) -> Network:
    stations, pools = parts
    flow = Workflow(name, nodes, arrivals=PoissonArrivals(), **workflow)
    return Network(name, stations, [flow], pools).at_load(0.8)


@_ready("fork-join")
def planner_workers() -> Network:
    """A planner, two to six workers in parallel that read its plan, a writer that reads their answers."""
    nodes = [
        Node("plan", "gpus", Lengths(Lognormal(600, 0.5, 4096), Uniform(80, 320))),
        Node("work", "gpus", Lengths(Lognormal(800, 0.7, 8192), Uniform(60, 400)), copies=Uniform(2, 6)),
        Node("write", "gpus", Lengths(Fixed(200), Uniform(200, 600))),
    ]
    edges = [Edge("plan", "work", context="answer"), Edge("work", "write", context="answer")]
    return _network("fork-join", _fleet(2), nodes, edges=edges)


@_ready("reflection")
def reflection() -> Network:
    """A draft, its critique, and with probability 0.6 a new draft that reads both; four drafts at most."""
    nodes = [
        Node("draft", "gpus", Lengths(Lognormal(400, 0.6, 4096), Uniform(100, 400)), max_visits=4),
        Node("critique", "gpus", Lengths(Fixed(120), Uniform(40, 160))),
    ]
    edges = [
        Edge("draft", "critique", context="answer"),
        Edge("critique", "draft", 0.6, context="all"),
        Edge("critique", END, 0.4),
    ]
    return _network("reflection", _fleet(2), nodes, edges=edges, start=["draft"])


@_ready("tool-calling")
def tool_calling() -> Network:
    """An agent that calls a tool after each step and reads what it says, its whole context growing: with
    probability 0.8 another step, twelve at most; tools take 1.5 s in the mean.
    """
    nodes = [
        Node("ask", "gpus", Lengths(Lognormal(700, 0.5, 4096), Uniform(30, 120))),
        Node(
            "step",
            "gpus",
            Lengths(Lognormal(150, 0.9, 2048), Uniform(30, 120)),
            delay=delays.Exponential(1.5),
            max_visits=12,
        ),
        Node("answer", "gpus", Lengths(Fixed(50), Uniform(100, 400))),
    ]
    edges = [
        Edge("ask", "step", context="all"),
        Edge("step", "step", 0.8, context="all"),
        Edge("step", "answer", 0.2, context="all"),
    ]
    return _network("tool-calling", _fleet(2), nodes, edges=edges)
