"""`llmsched optimum`, `bounds` and `replay`: what is the best possible."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agents.cli.common import (
    AsJson,
    BlockSize,
    KvTokens,
    MaxNumSeqs,
    TokenBudget,
    Workload,
    app,
    interruptible,
    jsonable,
    policy_and_engine,
    show_table,
    source_of,
)

if TYPE_CHECKING:
    from baselines.optimal import Instance, Solution


_INSTANCE = typer.Option("--instance", help="a JSON file; see baselines/optimal/instance.py")
_SCENARIO = typer.Option(help="requests of a scenario: its name or YAML file; see `llmsched list scenarios`")
_SEED = typer.Option(help="of the scenario's requests, as `reset(seed=...)`, or of the workload")
_FIRST = typer.Option(help="keep the first so many")
_OBJECTIVE = typer.Option(help="total_latency, gpu_time, makespan, mean_ttft or slo_goodput")
_ALLOW = typer.Option(
    help="what a schedule may do, with commas between: chunk, pause, preempt, idle; or none"
)


@app.command()
def optimum(
    instance: Annotated[Path | None, _INSTANCE] = None,
    scenario: Annotated[str | None, _SCENARIO] = None,
    seed: Annotated[int, _SEED] = 0,
    num_requests: Annotated[int | None, _FIRST] = None,
    objective: Annotated[str | None, _OBJECTIVE] = None,
    allow: Annotated[str | None, _ALLOW] = None,
    method: Annotated[str, typer.Option(help="auto, astar, cpsat or search")] = "auto",
    time_limit: Annotated[float, typer.Option(help="seconds")] = 60.0,
    save: Annotated[Path | None, typer.Option(help="write the solution, for `llmsched replay`")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, with the schedule")] = False,
) -> None:
    """Find the best schedule of a few requests, and prove how good it is. Ctrl-C ends the search: what it has
    found is printed, and the exit code is 130."""
    from baselines import optimal
    from llmsched_env.files import require_writable_file

    problem = _instance(instance, scenario, seed, num_requests, objective, allow)
    if save is not None:
        require_writable_file(save)
    with interruptible(), _figures() as progress:
        found = optimal.solve(problem, method, time_limit_s=time_limit, seed=seed, progress=progress)
    _print_solution(found, as_json)
    if save is not None:
        found.save(save)
        if not as_json:
            print(f"wrote {save}")
    if found.status == "interrupted":
        raise typer.Exit(130)


@app.command()
def bounds(
    instance: Annotated[Path | None, _INSTANCE] = None,
    scenario: Annotated[str | None, _SCENARIO] = None,
    workload: Workload = None,
    trace: Annotated[Path | None, typer.Option(help="a trace: CSV, CSV.gz or JSONL")] = None,
    seed: Annotated[int, _SEED] = 0,
    num_requests: Annotated[int | None, _FIRST] = None,
    objective: Annotated[str | None, _OBJECTIVE] = None,
    allow: Annotated[str | None, _ALLOW] = None,
    load: Annotated[float | None, typer.Option(help="of a workload or trace: share of the capacity")] = None,
    rate: Annotated[float | None, typer.Option(help="requests per second, in place of a load")] = None,
    profile: Annotated[
        str | None, typer.Option(help="of a workload or trace: a cost profile, its name or a JSON file")
    ] = None,
    kv_tokens: KvTokens = None,
    token_budget: TokenBudget = None,
    max_num_seqs: MaxNumSeqs = None,
    block_size: BlockSize = None,
    as_json: AsJson = False,
) -> None:
    """What no schedule of these requests can beat, by each of the bounds."""
    from baselines.optimal.bounds import BOUNDS, best_bound, lower_bounds
    from llmsched_env.errors import InputError

    limits = {"kv_tokens": kv_tokens, "token_budget": token_budget}
    limits |= {"max_num_seqs": max_num_seqs, "block_size": block_size}
    of_engine = {"load": load, "rate": rate, "profile": profile, **limits}
    if workload is None and trace is None:
        for key, value in of_engine.items():
            if value is not None:
                raise InputError(f"--{key.replace('_', '-')} goes with --workload or --trace")
        problem = _instance(instance, scenario, seed, num_requests, objective, allow)
    else:
        from baselines.optimal import Instance

        if instance is not None or scenario is not None or profile is None:
            raise InputError(
                "give one of --instance, --scenario, --workload and --trace; the latter two with --profile"
            )
        asked = {"num_requests": num_requests, "load": load, "rate": rate}
        options = {key: value for key, value in asked.items() if value is not None}
        _, engine = policy_and_engine("vllm-v1", None, **limits)
        problem = _changed(
            Instance.of_workload(source_of(workload, trace, seed, options), profile, engine), objective, allow
        )
    found = lower_bounds(problem)
    name, value = best_bound(problem)
    if as_json:
        head = {"name": problem.name, "objective_name": problem.objective, "num_requests": len(problem)}
        rest = {"bound": value, "best": name, "bounds": dict(found)}
        print(json.dumps(jsonable(head | rest), allow_nan=False))
        return
    rows = [
        (key, f"{bound:,.6g}", "the best" if key == name else "", BOUNDS.get(key, ""))
        for key, bound in found.items()
    ]
    above = "at most" if problem.maximise else "at least"
    columns = ("bound", above, "", "what it counts")
    show_table(f"{problem.objective} of {len(problem)} requests", columns, rows)


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="what `llmsched optimum --save` wrote")],
    output: Annotated[Path | None, typer.Option(help="draw the schedule: .png, .pdf or .svg")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, with the schedule")] = False,
) -> None:
    """Run a schedule again, every rule checked, and print what it comes to."""
    from baselines.optimal import Solution

    found = Solution.load(file)
    if output is not None:
        from llmsched_env.envs import export
        from llmsched_env.errors import InputError

        if output.resolve() == file.resolve():
            raise InputError(f"{output} is the solution; name another file for the picture")
        name = found.instance.name or file.stem
        title = f"{name}: {found.instance.objective} {found.objective:.6g}"
        export.gantt(found.result(), output, title=title)
    _print_solution(found, as_json)
    if output is not None and not as_json:
        print(f"wrote {output}")


def _instance(
    file: Path | None,
    scenario: str | None,
    seed: int,
    num_requests: int | None,
    objective: str | None,
    allow: str | None,
) -> Instance:
    """The instance that the options describe."""
    from baselines.optimal import Instance
    from llmsched_env.errors import InputError

    if (file is None) == (scenario is None):
        raise InputError("give either --instance FILE or --scenario NAME" + (", not both" if file else ""))
    if seed < 0:
        raise InputError(f"--seed must not be negative, not {seed}")
    if num_requests is not None and num_requests < 1:
        raise InputError(f"--num-requests must be at least 1, not {num_requests}")
    if scenario is not None:
        found = Instance.of_scenario(scenario, seed, num_requests=num_requests)
    else:
        assert file is not None
        found = Instance.load(file)
        if num_requests is not None:
            found = found.replace(requests=found.requests.take(slice(num_requests)))
    return _changed(found, objective, allow)


def _changed(found: Instance, objective: str | None, allow: str | None) -> Instance:
    changes: dict[str, Any] = {}
    if objective is not None:
        changes["objective"] = objective
    if allow is not None:
        changes["allow"] = [] if allow == "none" else [what.strip() for what in allow.split(",")]
    return found.replace(**changes)


def _print_solution(found: Solution, as_json: bool) -> None:
    summary = found.summary()
    if as_json:
        print(json.dumps(jsonable({**summary, "iterations": found.iterations()}), allow_nan=False))
        return
    rows = [("instance", found.instance.name)] if found.instance.name else []
    rows += [("requests", str(len(found.instance))), ("status", found.status)]
    if found.schedule is not None:
        rows.append((found.instance.objective, f"{found.objective:,.9g}"))
    if not math.isnan(found.bound):
        rows.append(("bound", f"{found.bound:,.9g}"))
    if math.isfinite(found.gap):
        rows.append(("gap", f"{100 * found.gap:.3g} %"))
    rows += [("method", found.method), ("seconds", f"{found.seconds:.3g}")]
    rows += [("iterations", str(summary["num_iterations"]))]
    show_table("", ("", ""), rows)


@contextmanager
def _figures() -> Iterator[Any]:
    """A line on the standard error stream, where that is a terminal, with the figures of a search; gives the
    function that takes them."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with console.status("searching") as status:

        def show(figures: dict[str, Any]) -> None:
            shown = [str(figures.get("method", ""))]
            for key in ("seconds", "objective", "bound"):
                value = figures.get(key)
                if isinstance(value, int | float) and math.isfinite(value):
                    shown.append(f"{key} {value:,.6g}")
            status.update(", ".join(shown))

        yield show
