"""`llmsched evaluate`: policies side by side on the same requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from agents.cli.common import AsJson, app, pairs_of, progress_bar, show, value_of

# Arguments of `agents.comparison.compare` that are neither settings of a scenario nor of an environment.
_OWN = {"policies", "scenario", "scenarios", "grid", "num_episodes", "seed", "metric", "baseline", "env_id"}
_OWN |= {"bootstrap", "progress"}


@app.command()
def evaluate(
    policy: Annotated[
        list[str],
        typer.Option(
            metavar="[LABEL=]POLICY",
            help="a scheduler, random, optimum, pretrained:NAME, the path of an agent or a run, or "
            "untrained: before one of these two; several trainings of it with commas between, or with * in "
            "the path; repeatable",
        ),
    ],
    scenario: Annotated[
        list[str], typer.Option(help="its name or YAML file; several are compared on each")
    ] = ["azure-conv"],  # noqa: B006  (typer copies it)
    episodes: Annotated[int, typer.Option(help="how many, of each scenario")] = 32,
    seed: Annotated[
        int | None, typer.Option(help="of the first episode; default: the first of those kept for reports")
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="latency_s, goodput, ttft_s, tpot_s, throughput_tps, gpu_s, makespan_s, fairness, "
            "finished or preemptions"
        ),
    ] = "latency_s",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="a setting of the scenario, such as load=0.9, or an option of the environment; repeatable",
        ),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="compare under each of several values of a setting, such as load=0.9; repeatable",
        ),
    ] = None,
    env: Annotated[
        str, typer.Option(help="the environment of policies that have none of their own")
    ] = "llmsched/Decision-v0",
    baseline: Annotated[
        str | None, typer.Option(help="the label that differences are to; default: vllm-v1, or the first")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="folder for CSV, JSON and PNG")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare policies, learned and not, on the same requests: means, by how much they are better than a
    baseline, and how sure that is."""
    from agents import comparison
    from agents.evaluation import FIRST_SEED
    from llmsched_env.errors import InputError
    from llmsched_env.files import require_writable_folder

    if output is not None:
        require_writable_folder(output)
    options: dict[str, Any] = {key: value_of(value) for key, value in pairs_of("--set", settings)}
    grid: dict[str, list[Any]] = {}
    for item in vary or []:
        [(key, value)] = pairs_of("--vary", [item])
        grid.setdefault(key, []).append(value_of(value))
    for key in (*options, *grid):
        if key in _OWN:
            raise InputError(f"{key} is no setting of the scenario or the environment; see --help")
    options |= {"metric": metric, "env_id": env, "baseline": baseline}
    options["seed"] = FIRST_SEED if seed is None else seed
    contenders = [comparison.resolve(spec) for spec in policy]
    trainings = sum(len(one.members) for one in contenders)
    found: comparison.Comparison | comparison.Matrix
    if len(scenario) == 1 and not grid:
        with progress_bar(trainings) as progress:
            found = comparison.compare(contenders, scenario[0], episodes, progress=progress, **options)
    else:
        conditions = len(scenario)
        for values in grid.values():
            conditions *= len(values)
        with progress_bar(trainings * conditions) as progress:
            found = comparison.matrix(contenders, scenario, grid, episodes, progress=progress, **options)
    if as_json:
        print(json.dumps(found.to_dict(), allow_nan=False))
    else:
        show(found.table())
    if output is not None:
        for path in found.save(output):
            if not as_json:
                print(f"wrote {path}")
