"""`llmsched network`: programs of agents on a network of engines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agents.cli.common import AsJson, app, jsonable, show, show_table

if TYPE_CHECKING:
    from llmsched_env.networks import Network, NetworkResult


@app.command()
def network(
    name: Annotated[
        str, typer.Argument(help="see `llmsched list networks`, or a JSON file; see llmsched_env/networks")
    ],
    disciplines: Annotated[
        list[str] | None,
        typer.Option(
            "--discipline",
            help="in which order calls are served, see `llmsched list disciplines`; repeatable",
        ),
    ] = None,
    load: Annotated[
        float | None, typer.Option(help="scale all rates to this nominal load of the busiest pool")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="how many programs; they are served to the end")] = None,
    horizon: Annotated[float | None, typer.Option(help="seconds until the run ends")] = None,
    seed: Annotated[int, typer.Option(help="of the programs, of routing and of lots")] = 0,
    routing: Annotated[
        str | None,
        typer.Option(
            help="of all pools: jsq, least-time, round-robin, random, power-of-two, by-class, by-program"
        ),
    ] = None,
    schedulers: Annotated[
        list[str] | None,
        typer.Option(
            "--scheduler",
            metavar="[STATION=]NAME",
            help="of one station or of all, in place of token-level service; repeatable",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="points in time at which backlogs are noted")] = 1000,
    output: Annotated[
        Path | None,
        typer.Option(help="a folder for backlog.png, network.json, and per discipline tables of all calls"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run programs of agents through a network of engines, and print how long they take."""
    import baselines
    from llmsched_env import InputError, networks
    from llmsched_env.files import require_writable_folder

    names = disciplines or ["fcfs"]
    for one in names:
        networks.disciplines.get(one)
        if names.count(one) > 1:
            raise InputError(f"--discipline {one} is given twice; give it once")
    if jobs is None and horizon is None:
        jobs = 1000
    if output is not None:
        require_writable_folder(output)
    found = networks.get(name, load=load, routing=routing, schedulers=baselines.get)
    found = _scheduled(found, schedulers or [])
    results = {
        one: networks.simulate_network(
            found,
            one,
            jobs=jobs,
            horizon_s=float("inf") if horizon is None else horizon,
            seed=seed,
            samples=samples,
        )
        for one in names
    }
    if output is not None:
        _write(found, results, output)
    if as_json:
        print(json.dumps(jsonable(_described(found, results, seed)), allow_nan=False))
        return
    _print(found, results)
    if output is not None:
        print(f"wrote {output}")


def _scheduled(network: Network, schedulers: list[str]) -> Network:
    """With the schedulers that the options name."""
    import baselines

    for text in schedulers:
        station, equals, name = text.partition("=")
        network = network.scheduled(baselines.get(name if equals else station), station if equals else None)
    return network


def _described(network: Network, results: dict[str, NetworkResult], seed: int) -> dict[str, Any]:
    from llmsched_env.networks import loads, virtual_stations

    return {
        "network": network.name,
        "seed": seed,
        "pools": {
            pool.pool: {
                "load": pool.load,
                "calls_per_s": pool.hops_per_s,
                "tokens_per_s": pool.tokens_per_s,
                "capacity_tokens_per_s": pool.capacity_tokens_per_s,
            }
            for pool in loads(network)
        },
        "disciplines": {
            name: result.metrics()
            | {"virtual_stations": [dataclasses.asdict(one) for one in virtual_stations(network, name)]}
            for name, result in results.items()
        },
    }


def _print(network: Network, results: dict[str, NetworkResult]) -> None:
    from rich.markup import escape

    from llmsched_env.networks import loads, virtual_stations

    print(network.name + (f": {network.summary}" if network.summary else ""))
    pools = loads(network)
    rows = [
        (pool.pool, f"{pool.load:.3f}", f"{pool.hops_per_s:.4g}", f"{pool.tokens_per_s:,.0f}")
        for pool in pools
    ]
    show_table("", ("pool", "nominal load", "calls/s", "tokens/s"), rows)
    columns = ["discipline", "done", "jobs in system", "mean latency s", "p99 latency s", "peak backlog"]
    columns += ["final backlog", "busy"]
    table = []
    for name, result in results.items():
        m = result.metrics()
        busy = " ".join(f"{share:.0%}" for share in result.utilisation)
        table.append(
            (
                name,
                f"{m['finished']:,} of {m['jobs']:,}",
                f"{m['mean_jobs']:,.1f}",
                f"{m['latency']['mean']:,.2f}",
                f"{m['latency']['p99']:,.2f}",
                f"{m['peak_backlog_tokens']:,}",
                f"{m['final_backlog_tokens']:,}",
                busy,
            )
        )
    show_table("", columns, table)
    ends = sorted({f"{result.end_s:,.1f}" for result in results.values()})
    show(f"after {' / '.join(ends)} s; backlogs in tokens, latencies of the programs that are done")
    show("busy: time in which a batch ran, be it small; load: tokens, as a share of what full batches serve")
    for name in results:
        for one in virtual_stations(network, name):
            who = escape(" and ".join(one.classes))
            so = "unstable" if one.load > 1 else "no proof of anything up to 1"
            show(f"{name}: {who} come to exclude each other; their load together is {one.load:.3f}: {so}")
    if max(pool.load for pool in pools) >= 1.0:
        show("a pool has a nominal load of 1 or more: what waits grows for as long as programs come")


def _write(network: Network, results: dict[str, NetworkResult], folder: Path) -> None:
    from baselines.network_plots import backlogs
    from llmsched_env import InputError
    from llmsched_env.files import writing

    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / "backlog.png") as temporary:
        backlogs(results, temporary)
    try:
        text = network.to_json()
    except InputError:  # a scheduler or a profile that has no name: the picture and the tables remain
        text = ""
    if text:
        with writing(folder / "network.json") as temporary:
            temporary.write_text(text, encoding="utf-8")
    for name, result in results.items():
        stem = name.replace(":", "-")
        with writing(folder / f"{stem}-jobs.csv") as temporary:
            result.to_frame().to_csv(temporary, index=False)
        with writing(folder / f"{stem}-calls.csv") as temporary:
            result.hops_frame().to_csv(temporary, index=False)
