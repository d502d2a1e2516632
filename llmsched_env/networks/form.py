"""Networks as JSON: every key and type is checked when read, and what is written reads back the same.

    {"name": "review",
     "stations": [{"name": "a", "profile": "a100-llama3-8b", "engine": {"token_budget": 512}},
                  {"name": "b", "profile": "a100-llama3-8b", "scheduler": "vllm-v1"}],
     "pools": [{"name": "gpus", "stations": ["a", "b"], "routing": "jsq"}],
     "workflows": [{"name": "draft and critique", "rate": 0.5, "arrivals": "poisson", "start": ["draft"],
       "nodes": [{"name": "draft", "pool": "gpus", "prompt": "lognormal:400,0.6", "output": 200,
                  "max_visits": 4},
                 {"name": "critique", "pool": "gpus", "prompt": 80, "output": "uniform:20,120"}],
       "edges": [{"from": "draft", "to": "critique", "context": "all"},
                 {"from": "critique", "to": "draft", "probability": 0.6, "context": "all"},
                 {"from": "critique", "to": "end", "probability": 0.4}]}]}

Stations: name, profile (a name, the path of a profile's JSON file, or an object), engine (`EngineConfig`),
scheduler (a name). Pools: name, stations, routing. Workflows: name, rate, arrivals, start, nodes, edges.
Nodes: name, pool, prompt and output (`lengths.get`), or lengths (the name of a workload that has one class),
copies, priority, weight, delay_s (`delays.get`), max_visits. Edges: from, to, probability, context.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmsched_env import profiles, workloads
from llmsched_env.core.config import EngineConfig
from llmsched_env.errors import InputError
from llmsched_env.networks import delays
from llmsched_env.networks.network import Network, Pool, Station
from llmsched_env.networks.workflow import Edge, Node, Workflow
from llmsched_env.profiles import Profile
from llmsched_env.scenarios.form import check, read_profile
from llmsched_env.scheduling import Scheduler
from llmsched_env.workloads import arrivals, lengths
from llmsched_env.workloads.lengths import Fixed, Lengths

Schedulers = Callable[[str], Scheduler]

_NETWORK = {
    "name": "str",
    "summary": "str",
    "source": "str",
    "stations": "list",
    "pools": "list",
    "workflows": "list",
}
_STATION = {"name": "str", "profile": "str | dict", "engine": "dict", "scheduler": "str"}
_ENGINE = dict(EngineConfig.__annotations__)
_POOL = {"name": "str", "stations": "list", "routing": "str"}
_WORKFLOW = {
    "name": "str",
    "rate": "float",
    "arrivals": "str",
    "start": "list",
    "nodes": "list",
    "edges": "list",
}
_NODE = {
    "name": "str",
    "pool": "str",
    "lengths": "str",
    "prompt": "str | int",
    "output": "str | int",
    "copies": "str | int",
    "priority": "int",
    "weight": "float",
    "delay_s": "str | float",
    "max_visits": "int",
}
_EDGE = {"from": "str", "to": "str", "probability": "float", "context": "str"}


def read(path: Path, schedulers: Schedulers | None) -> Network:
    """The network in a file; see `Network.from_json`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"network {path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"network {path}: is not a text file") from None
    try:
        data = json.loads(text, object_pairs_hook=_without_repeats)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"network {path}: is not JSON: {error}") from None
    except InputError as error:
        raise InputError(f"network {path}: {error}") from None
    try:
        return _network(data, path.stem, path.absolute().parent, schedulers)
    except InputError as error:
        raise InputError(f"network {path}: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise InputError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is given twice")
    return data


def _network(data: Any, name: str, folder: Path, schedulers: Schedulers | None) -> Network:
    check("the network", data, _NETWORK)
    _needs("the network", data, "stations", "workflows")
    data = {"name": name, **data}
    data["stations"] = [_station(one, folder, schedulers) for one in data["stations"]]
    data["pools"] = [_pool(one) for one in data.get("pools", [])]
    data["workflows"] = [_workflow(one) for one in data["workflows"]]
    return Network(**data)


def _station(data: Any, folder: Path, schedulers: Schedulers | None) -> Station:
    check("a station", data, _STATION)
    _needs("a station", data, "name", "profile")
    where = f"station {data['name']}"
    check(f"the engine of {where}", data.get("engine", {}), _ENGINE)
    try:
        profile = read_profile(data["profile"], folder)
        engine = EngineConfig(**data.get("engine", {}))
        scheduler = None
        if "scheduler" in data:
            if schedulers is None:
                raise InputError("names a scheduler; pass what finds it, schedulers=baselines.get")
            scheduler = schedulers(data["scheduler"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return Station(data["name"], profile, engine, scheduler)


def _pool(data: Any) -> Pool:
    check("a pool", data, _POOL)
    _needs("a pool", data, "name", "stations")
    return Pool(**data)


def _workflow(data: Any) -> Workflow:
    check("a workflow", data, _WORKFLOW)
    _needs("a workflow", data, "name", "rate", "nodes")
    try:
        nodes = [_node(one) for one in data["nodes"]]
        edges = [_edge(one) for one in data.get("edges", [])]
        process = arrivals.get(data.get("arrivals", "poisson"))
    except InputError as error:
        raise InputError(f"workflow {data['name']}: {error}") from None
    return Workflow(data["name"], nodes, edges, float(data["rate"]), process, data.get("start", ()))


def _node(data: Any) -> Node:
    check("a node", data, _NODE)
    _needs("a node", data, "name", "pool")
    options = {k: data[k] for k in ("priority", "weight", "max_visits") if k in data}
    try:
        if ("lengths" in data) == ("prompt" in data or "output" in data):
            raise InputError("give either lengths, or prompt and output")
        if "lengths" in data:
            of_call = _named_lengths(data["lengths"])
        else:
            _needs("it", data, "prompt", "output")
            of_call = Lengths(lengths.get(data["prompt"]), lengths.get(data["output"]))
        if "copies" in data:
            options["copies"] = lengths.get(data["copies"])
        if "delay_s" in data:
            options["delay"] = delays.get(data["delay_s"])
    except InputError as error:
        raise InputError(f"node {data['name']}: {error}") from None
    return Node(data["name"], data["pool"], of_call, **options)


def _named_lengths(name: str) -> Lengths:
    classes = workloads.get(name).classes
    if len(classes) != 1:
        raise InputError(f"workload {name} has {len(classes)} classes; give prompt and output")
    return classes[0].lengths


def _edge(data: Any) -> Edge:
    check("an edge", data, _EDGE)
    _needs("an edge", data, "from", "to")
    options = {k: data[k] for k in ("probability", "context") if k in data}
    return Edge(data["from"], data["to"], **options)


def _needs(what: str, data: dict[str, Any], *keys: str) -> None:
    for key in keys:
        if key not in data:
            raise InputError(f"{what} lacks {key}")


# ---------------------------------------------------------------------- writing


def write(network: Network) -> str:
    """The text from which `read` makes an equal network; see `Network.to_json`."""
    data: dict[str, Any] = {"name": network.name}
    data |= {key: getattr(network, key) for key in ("summary", "source") if getattr(network, key)}
    data["stations"] = [_described_station(station) for station in network.stations]
    if network.pools:
        data["pools"] = [
            {"name": pool.name, "stations": list(pool.stations), "routing": pool.routing}
            for pool in network.pools
        ]
    data["workflows"] = [_described_workflow(workflow) for workflow in network.workflows]
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _described_station(station: Station) -> dict[str, Any]:
    data: dict[str, Any] = {"name": station.name}
    profile = station.profile
    if isinstance(profile, Profile):
        if profile.form == "custom":
            raise InputError(f"profile {profile.name} is custom, a function: it cannot be written as JSON")
        if profile.name in profiles.names() and profiles.get(profile.name) == profile:
            profile = profile.name
        else:
            defaults = {f.name: f.default for f in dataclasses.fields(Profile)} | {"fit": {}}
            profile = {k: v for k, v in dataclasses.asdict(profile).items() if v != defaults[k]}  # type: ignore[assignment]
    data["profile"] = profile
    plain = EngineConfig()
    engine = {
        f.name: getattr(station.engine, f.name)
        for f in dataclasses.fields(EngineConfig)
        if getattr(station.engine, f.name) != getattr(plain, f.name)
    }
    if engine:
        data["engine"] = engine
    if station.scheduler is not None:
        data["scheduler"] = station.scheduler.name
    return data


def _described_workflow(workflow: Workflow) -> dict[str, Any]:
    data: dict[str, Any] = {"name": workflow.name, "rate": workflow.rate}
    data["arrivals"] = _spelled(arrivals.KNOWN, workflow.arrivals, f"arrivals of {workflow.name}")
    if workflow.start:
        data["start"] = list(workflow.start)
    data["nodes"] = [_described_node(node) for node in workflow.nodes]
    data["edges"] = [_described_edge(edge) for edge in workflow.edges]
    return data


def _described_node(node: Node) -> dict[str, Any]:
    data: dict[str, Any] = {"name": node.name, "pool": node.pool}
    named = [name for name in workloads.names() if _is_named(name, node.lengths)]
    if named:
        data["lengths"] = named[0]
    else:
        if node.lengths.dependence != Lengths(node.lengths.prompt, node.lengths.output).dependence:
            raise InputError(f"node {node.name}: dependent lengths that no workload has cannot be written")
        for side in ("prompt", "output"):
            data[side] = _described_tokens(getattr(node.lengths, side), f"{side} of node {node.name}")
    if node.copies != Fixed(1):
        data["copies"] = _described_tokens(node.copies, f"copies of node {node.name}")
    if node.priority:
        data["priority"] = node.priority
    if node.weight != 1.0:
        data["weight"] = node.weight
    if node.delay != delays.Fixed(0.0):
        data["delay_s"] = _spelled(delays.KNOWN, node.delay, f"delay of node {node.name}")
    if node.max_visits is not None:
        data["max_visits"] = node.max_visits
    return data


def _is_named(name: str, made: Lengths) -> bool:
    classes = workloads.get(name).classes
    return len(classes) == 1 and classes[0].lengths == made


def _described_tokens(made: Any, what: str) -> str | int:
    return int(made.tokens) if isinstance(made, Fixed) else _spelled(lengths.KNOWN, made, what)


def _spelled(known: Any, made: Any, what: str) -> str:
    spec = arrivals.spell(known, made)
    if spec is None:
        raise InputError(f"{what}: {made!r} cannot be written as JSON; keep it in Python")
    return spec


def _described_edge(edge: Edge) -> dict[str, Any]:
    data: dict[str, Any] = {"from": edge.source, "to": edge.target}
    if edge.probability is not None:
        data["probability"] = edge.probability
    if edge.context != "none":
        data["context"] = edge.context
    return data
