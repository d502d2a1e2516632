"""`llmsched tune`: search for the best numbers of a priority rule, and hold them against other schedulers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from agents.cli.common import (
    AsJson,
    app,
    interruptible,
    jsonable,
    pairs_of,
    progress_bar,
    show,
    show_table,
    value_of,
)


@app.command()
def tune(
    output: Annotated[Path, typer.Option(help="the JSON file to write; then a scheduler as tuned:FILE")],
    scenario: Annotated[str, typer.Option(help="its name or YAML file; see `llmsched list scenarios`")],
    metric: Annotated[
        str, typer.Option(help="latency_s, goodput, throughput_tps, gpu_s, makespan_s, ...")
    ] = "latency_s",
    budget: Annotated[int, typer.Option(help="episodes to simulate, at most")] = 4000,
    seed: Annotated[int, typer.Option(help="of the search")] = 0,
    episodes: Annotated[int, typer.Option(help="of the comparison, which the search has not seen")] = 40,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="a setting of the scenario, such as load=0.9, or length_info=oracle, predicted, class or "
            "none; repeatable",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tune a priority rule by simulation (CMA-ES), and compare it with vLLM V1 and the best named scheduler.
    Ctrl-C ends the search: what it has found is written, and the exit code is 130."""
    import baselines
    from agents.comparison import compare
    from agents.tuning import best_named
    from agents.tuning import tune as search
    from llmsched_env.errors import InputError
    from llmsched_env.files import require_writable_file

    require_writable_file(output)
    options: dict[str, Any] = {key: value_of(value) for key, value in pairs_of("--set", settings)}
    for key in ("metric", "budget", "seed", "method", "start", "progress", "scenario"):
        if key in options:
            raise InputError(f"--set takes settings of the scenario, not {key}")
    options["metric"] = metric
    with interruptible(), progress_bar(budget) as progress:
        found = search(scenario, budget=budget, seed=seed, progress=progress, **options)
    found.save(output)
    report = None
    if not found.interrupted:
        with progress_bar(len(baselines.names())) as progress:
            rival = best_named(scenario, progress=progress, **options)
        policies = {name: baselines.get(name) for name in dict.fromkeys(("vllm-v1", rival))}
        report = compare({**policies, "tuned": found.scheduler()}, scenario, episodes, **options)
    if as_json:
        summary: dict[str, Any] = {"params": dataclasses.asdict(found.params), **found.summary()}
        if report is not None:
            summary["report"] = report.to_dict()
        print(json.dumps(jsonable(summary), allow_nan=False))
    else:
        rows = [(name, f"{value:.4g}") for name, value in dataclasses.asdict(found.params).items()]
        rows += [
            (f"{metric}, validation", f"{found.value:.4g}, at the start {found.start:.4g}"),
            ("simulated", f"{found.episodes:,} episodes"),
        ]
        show_table("", ("", ""), rows)
        if report is not None:
            show(report.table())
        print(f"wrote {output}; a scheduler as tuned:{output}")
    if found.interrupted:
        raise typer.Exit(130)
