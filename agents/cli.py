"""The command line `llmsched`. Each subcommand imports what it needs when it is called."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from baselines.optimal import Instance, Solution
    from llmsched_env import EngineConfig
    from llmsched_env.profiles import Profile
    from llmsched_env.simulation import Result

app = typer.Typer(
    name="llmsched",
    help="Scheduling of LLM inference: simulate engines, compare schedulers, find the optimum.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 1 (some runs of a benchmark failed), 2 (bad input:
    one line on the standard error stream), 130 (interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    warnings.showwarning = lambda message, *_: print("warning:", message, file=sys.stderr)
    try:
        code = app(arguments, prog_name="llmsched", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        code = 1
    except OSError as error:
        what = error.strerror or str(error)
        return _complain(f"{error.filename}: {what}" if error.filename else what)
    except Exception as error:
        from llmsched_env.errors import InputError

        if isinstance(error, InputError):
            return _complain(str(error))
        # What click raises for wrong usage; some versions of typer have a copy of click.
        if hasattr(error, "format_message"):
            return _complain(error.format_message())
        raise
    if code == 130:
        print("interrupted", file=sys.stderr)
    return code


def _complain(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


# -- list
# ----------------------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    what: Annotated[
        str | None,
        typer.Argument(help="schedulers, workloads, profiles, scenarios, presets or pretrained; else all"),
    ] = None,
) -> None:
    """List what there is by name."""
    from llmsched_env.errors import unknown

    kinds = {
        "schedulers": _schedulers,
        "workloads": _workloads,
        "profiles": _profiles,
        "scenarios": _scenarios,
        "presets": _presets,
        "pretrained": _pretrained,
    }
    if what is not None and what not in kinds:
        raise unknown("list", what, kinds)
    for kind, rows in kinds.items():
        if what in (None, kind):
            columns = ("requests", "load", "profile") if kind == "scenarios" else ()
            _print_table(kind, ("name", *columns, "what it is"), rows())


def _schedulers() -> Iterator[tuple[str, ...]]:
    import baselines

    for name in baselines.names():
        yield name, baselines.get(name).summary


def _workloads() -> Iterator[tuple[str, ...]]:
    from llmsched_env import workloads

    for name in workloads.names():
        yield name, workloads.summary(name)


def _profiles() -> Iterator[tuple[str, ...]]:
    from llmsched_env import profiles

    for name in profiles.names():
        profile = profiles.get(name)
        yield name, f"{profile.form}: {profile.model} on {profile.gpus} x {profile.gpu}"


def _scenarios() -> Iterator[tuple[str, ...]]:
    from llmsched_env import scenarios

    for name in scenarios.names():
        scenario = scenarios.get(name)
        profile = scenario.profile if isinstance(scenario.profile, str) else scenario.profile.name
        if scenario.workload.load is not None:
            load = f"{scenario.workload.load:g}"
        else:
            rate = scenario.workload.rate_rps()
            load = f"{rate:.3g}/s" if math.isfinite(rate) else "at once"
        yield name, str(scenario.num_requests), load, profile, scenario.summary


def _presets() -> Iterator[tuple[str, ...]]:
    from agents.config import Config, preset_names

    for name in preset_names():
        found = Config.preset(name)
        yield name, f"{found.steps:,} decisions of {found.scenario} in {found.env} for {found.metric}"


def _pretrained() -> Iterator[tuple[str, ...]]:
    from agents.agent import Agent, pretrained_names

    for name in pretrained_names():
        found = Agent.pretrained(name)
        yield name, f"acts in {found.env_id} on {found.scenario}, trained for {found.metric}"


# -- profiles
# ------------------------------------------------------------------------------------------------------

profiles_app = typer.Typer(rich_markup_mode=None)
app.add_typer(profiles_app, name="profiles")


@profiles_app.callback(invoke_without_command=True)
def profiles_(context: typer.Context) -> None:
    """List the cost profiles, or show one: how long an iteration takes."""
    if context.invoked_subcommand is not None:
        return
    from llmsched_env import profiles

    rows = []
    for name in profiles.names():
        profile = profiles.get(name)
        capacity = "" if profile.kv_tokens is None else f"{profile.kv_tokens:,}"
        rows.append((name, profile.form, profile.gpu, str(profile.gpus), profile.model, capacity))
    _print_table("profiles", ("name", "form", "GPU", "GPUs", "model", "KV tokens"), rows)


@profiles_app.command("show")
def show_profile(
    name: Annotated[str, typer.Argument(help="a profile's name, or the path of a profile's JSON file")],
    output: Annotated[Path | None, typer.Option(help="the picture to write; default: NAME.png")] = None,
) -> None:
    """Show a cost profile, and plot iteration time over load."""
    from baselines import plots
    from llmsched_env import profiles
    from llmsched_env.errors import InputError
    from llmsched_env.files import require_writable_file, writing

    profile = profiles.get(name)
    path = Path(f"{profile.name}.png") if output is None else output
    if path.suffix != ".png":
        raise InputError(f"--output {path} must end in .png")
    require_writable_file(path)
    _print_table(profile.name, ("", ""), _describe(profile))
    _print(profile.provenance)
    with writing(path) as temporary:
        plots.profile(profile, temporary)
    print(f"iteration time over load: {path}")


def _describe(profile: Profile) -> Iterator[tuple[str, ...]]:
    import numpy as np

    yield "model", f"{profile.model} on {profile.gpus} x {profile.gpu}"
    yield "form", profile.form
    for key, value in profile.params.items():
        size = np.size(value)
        yield (
            f"  {key}",
            f"{value:g}" if size == 1 else f"{size} values, {np.min(value):g} to {np.max(value):g}",
        )
    if profile.kv_tokens is not None:
        yield "KV cache", f"{profile.kv_tokens:,} tokens"
    if profile.kv_bytes_per_token is not None:
        yield "KV cache of a token", f"{profile.kv_bytes_per_token:,.0f} bytes"
    yield "CPU time", f"{profile.cpu_s:g} s an iteration, {profile.cpu_s_per_request:g} s a request in it"
    for key, value in profile.fit.items():
        yield f"fit: {key}", f"{value:g}" if isinstance(value, (int, float)) else str(value)
    for label, batch in (
        ("1 decode, 1,024 tokens each", (0, 0, 0, 0, 1, 1024)),
        ("64 decodes, 1,024 tokens each", (0, 0, 0, 0, 64, 64 * 1024)),
        ("a prompt of 512 tokens", (512, 1, 512 * 256, 0, 0, 0)),
        ("a prompt of 2,048 tokens", (2048, 1, 2048 * 1024, 0, 0, 0)),
        ("both: 2,048 and 64 decodes", (2048, 1, 2048 * 1024, 0, 64, 64 * 1024)),
    ):
        yield f"iteration: {label}", f"{1000 * float(profile.time(*batch)):.3f} ms"


# -- simulate
# ------------------------------------------------------------------------------------------------------


@app.command()
def simulate(
    scheduler: Annotated[str, typer.Option(help="its name; see `llmsched list schedulers`")],
    profile: Annotated[str, typer.Option(help="a cost profile: its name, or a JSON file")],
    workload: Annotated[str | None, typer.Option(help="its name; see `llmsched list workloads`")] = None,
    trace: Annotated[Path | None, typer.Option(help="a trace: CSV, CSV.gz or JSONL")] = None,
    drop_bad: Annotated[
        bool, typer.Option("--drop-bad", help="leave out what cannot be used of a trace")
    ] = False,
    sort: Annotated[bool, typer.Option("--sort", help="sort a trace by arrival")] = False,
    num_requests: Annotated[int | None, typer.Option(help="how many; of a trace: the first so many")] = None,
    load: Annotated[
        float | None, typer.Option(help="offered load as a share of the engine's capacity")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="requests per second, in place of a load")] = None,
    seed: Annotated[int, typer.Option(help="of the workload, and of schedulers that draw lots")] = 0,
    kv_tokens: Annotated[int | None, typer.Option(help="KV cache in tokens; default: the profile's")] = None,
    token_budget: Annotated[int | None, typer.Option(help="most tokens of an iteration")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="most requests running at once")] = None,
    block_size: Annotated[int | None, typer.Option(help="tokens of a block of the KV cache: 16")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="a setting of the scheduler or of the engine; may be given several times",
        ),
    ] = None,
    workload_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--workload-set",
            metavar="KEY=VALUE",
            help="an option of the workload or the trace, such as arrivals=gamma:3; repeatable",
        ),
    ] = None,
    ttft_target: Annotated[float | None, typer.Option(help="seconds, for goodput")] = None,
    tpot_target: Annotated[float | None, typer.Option(help="seconds, for goodput")] = None,
    requests_csv: Annotated[Path | None, typer.Option(help="write a row per request")] = None,
    iterations_csv: Annotated[Path | None, typer.Option(help="write a row per iteration")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Run requests through an engine under a scheduler and print the metrics."""
    from llmsched_env import InputError
    from llmsched_env import simulate as run
    from llmsched_env.files import require_writable_file, writing

    for path in (requests_csv, iterations_csv):
        if path is not None:
            require_writable_file(path)
    if (
        requests_csv is not None
        and iterations_csv is not None
        and requests_csv.resolve() == iterations_csv.resolve()
    ):
        raise InputError(f"--requests-csv and --iterations-csv are both {requests_csv}; name two files")
    for path in (requests_csv, iterations_csv):
        for what, read in (("trace", trace), ("profile", Path(profile))):
            if path is not None and read is not None and path.resolve() == read.resolve():
                raise InputError(f"{path} is the {what}; name another file for the output")
    options = {"num_requests": num_requests, "load": load, "rate": rate}
    options |= {"drop_bad": drop_bad or None, "sort": sort or None}
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    extra = {key: _value(value) for key, value in _pairs("--workload-set", workload_settings)}
    for key in given.keys() & extra.keys():
        raise InputError(f"--workload-set gives {key}, which has an option of its own; give one of them")
    source = _source(workload, trace, seed, {**given, **extra})
    limits = {"token_budget": token_budget, "max_num_seqs": max_num_seqs, "block_size": block_size}
    policy, engine = _policy_and_engine(scheduler, _pairs("--set", settings), kv_tokens, limits)
    result = run(
        source,
        policy,
        profile,
        engine,
        seed=seed,
        record="iterations" if iterations_csv is not None else None,
    )
    metrics = result.metrics(ttft_target=ttft_target, tpot_target=tpot_target)
    with ExitStack() as stack:  # both files or none
        if requests_csv is not None:
            _write_requests(result, stack.enter_context(writing(requests_csv)))
        if iterations_csv is not None:
            _write_iterations(result, stack.enter_context(writing(iterations_csv)))
    head = {"scheduler": result.scheduler, "profile": result.profile}
    if result.capacity is not None:  # what the load was relative to
        metrics["capacity_rps"] = result.capacity.rps
        metrics["compute_capacity_rps"] = result.capacity.compute_rps
        metrics["kv_capacity_rps"] = result.capacity.kv_rps
    if as_json:
        print(json.dumps(_jsonable(head | metrics), allow_nan=False))
    else:
        _print_metrics(head, metrics)


def _source(workload: str | None, trace: Path | None, seed: int, options: dict[str, Any]) -> Any:
    """The workload or trace that the options name."""
    from llmsched_env import workloads
    from llmsched_env.errors import InputError, unknown

    if (workload is None) == (trace is None):
        raise InputError("give either --workload NAME or --trace FILE" + (", not both" if workload else ""))
    if {"load", "rate"} <= options.keys():
        raise InputError("give either --load or --rate, not both")
    if seed < 0:
        raise InputError(f"--seed must not be negative, not {seed}")
    for key in ("drop_bad", "sort"):
        if key in options and trace is None:
            raise InputError(f"--{key.replace('_', '-')} mends a trace; give it with --trace FILE")
    if trace is not None:
        readers = (workloads.trace, workloads.traces.read)
        known = {key for reader in readers for key in reader.__kwdefaults__ or {}}
        for key in options.keys() - known:
            raise unknown("trace option", key, known)
    try:
        if trace is not None:
            return workloads.trace(trace, seed=seed, **options)
        return workloads.get(str(workload), seed=seed, **options)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise InputError(
            f"an option of the workload has a value of the wrong kind: {given} ({error})"
        ) from error


def _pairs(option: str, items: list[str] | None) -> list[tuple[str, str]]:
    """KEY=VALUE items, each key once."""
    from llmsched_env import InputError

    pairs: dict[str, str] = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if not (equals and key):
            raise InputError(f"{option} takes KEY=VALUE, not {item!r}")
        if key in pairs:
            raise InputError(f"{option} gives {key} twice")
        pairs[key] = value
    return list(pairs.items())


def _policy_and_engine(
    scheduler: str, settings: list[tuple[str, str]], kv_tokens: int | None, limits: dict[str, int | None]
) -> tuple[Any, EngineConfig]:
    """The scheduler and the engine with their settings; a KEY is the engine's if the engine has it.

    `limits` are settings of the engine that have an option of their own, None where it is not given.
    """
    import baselines
    from llmsched_env import EngineConfig, InputError
    from llmsched_env.errors import unknown

    policy = baselines.get(scheduler)
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    known = fields.union(policy.settings.names())
    for key, _ in settings:
        if key not in known:
            raise unknown("setting", key, [*known, "--kv-tokens"])
    for_engine = {key: _value(value) for key, value in settings if key in fields}
    for_scheduler = {key: value for key, value in settings if key not in fields}
    for key, value in limits.items():
        if value is not None:
            if key in for_engine:
                raise InputError(f"give either --{key.replace('_', '-')} or --set {key}=, not both")
            for_engine[key] = value
    block_size = for_engine.setdefault("block_size", 16)
    if kv_tokens is not None:
        if "kv_blocks" in for_engine:
            raise InputError("give either --kv-tokens or --set kv_blocks=, not both")
        EngineConfig(block_size=block_size)  # complains of a size that is none
        if kv_tokens < block_size:
            raise InputError(f"--kv-tokens {kv_tokens} is less than one block of {block_size} tokens")
        for_engine["kv_blocks"] = kv_tokens // block_size
    return policy.replace(**for_scheduler), EngineConfig(**for_engine)


def _value(text: str) -> Any:
    """A setting's value: true, false, none, a number, numbers with commas between, or text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    parts = tuple(_value(part) for part in text.split(",")) if "," in text else ()
    return parts if parts and not any(isinstance(part, str) for part in parts) else text


def _write_requests(result: Result, path: Path) -> None:
    columns = ["request_id", "arrival_s", "prompt_tokens", "output_tokens"]
    columns += ["first_token_s", "finish_s", "preemptions"]
    result.to_frame()[columns].to_csv(path, index=False)


def _write_iterations(result: Result, path: Path) -> None:
    import pandas as pd

    columns = ["start_s", "end_s", "prefill_tokens", "decode_requests", "kv_tokens", "preempted"]
    assert result.iterations is not None
    pd.DataFrame({name: result.iterations[name] for name in columns}).to_csv(path, index=False)


def _jsonable(value: Any) -> Any:
    """nan and infinities, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_metrics(head: dict[str, Any], metrics: dict[str, Any]) -> None:
    single = {k: v for k, v in metrics.items() if not isinstance(v, dict)}
    rows = [(k, str(v)) for k, v in head.items()]
    for name, value in single.items():
        if value is not None:
            rows.append((name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"))
    _print_table("", ("", ""), rows)
    times = [
        (f"{name} s", *(f"{v:.4f}" for v in value.values()))
        for name, value in metrics.items()
        if isinstance(value, dict)
    ]
    _print_table("", ("", "mean", "p50", "p90", "p99"), times)


# -- bench
# ---------------------------------------------------------------------------------------------------------


@app.command()
def bench(
    suite: Annotated[str, typer.Option(help="quick or full")] = "quick",
    schedulers: Annotated[str | None, typer.Option(help="names, with commas; default: the suite's")] = None,
    seeds: Annotated[int | None, typer.Option(help="how many; default: the suite's")] = None,
    output: Annotated[Path | None, typer.Option(help="folder for CSV and PNG; default: bench/SUITE")] = None,
) -> None:
    """Compare schedulers on the same requests, over loads and seeds: a table, CSV files and pictures."""
    from baselines import bench
    from llmsched_env.errors import InputError
    from llmsched_env.files import require_writable_folder

    names = [] if schedulers is None else [name.strip() for name in schedulers.split(",")]
    if "" in names:
        raise InputError(
            f"--schedulers {schedulers!r} holds an empty name; give names with commas between, "
            "such as vllm-v1,sarathi"
        )
    what = bench.suite(suite, schedulers=names, seeds=seeds)
    folder = Path("bench", suite) if output is None else output
    require_writable_folder(folder)
    with _progress(what.runs) as progress:
        outcome = bench.run(what, progress=progress)
    summary = bench.summarise(outcome)
    written = bench.save(outcome, summary, folder)
    for table in bench.tables(outcome, summary):
        _print(table.rich())
    for path in written:
        print(f"wrote {path}")
    if outcome.failures:
        for line in outcome.failures:
            print(f"failed: {line}", file=sys.stderr)
        raise typer.Exit(1)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A progress bar on the standard error stream, where that is a terminal; gives the function that moves
    it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


# -- the optimum
# ---------------------------------------------------------------------------------------------------

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
    with _interruptible(), _figures() as progress:
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
    workload: Annotated[str | None, typer.Option(help="its name; see `llmsched list workloads`")] = None,
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
    kv_tokens: Annotated[int | None, typer.Option(help="KV cache in tokens; default: the profile's")] = None,
    token_budget: Annotated[int | None, typer.Option(help="most tokens of an iteration")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="most requests running at once")] = None,
    block_size: Annotated[int | None, typer.Option(help="tokens of a block of the KV cache: 16")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """What no schedule of these requests can beat, by each of the bounds."""
    from baselines.optimal.bounds import BOUNDS, best_bound, lower_bounds
    from llmsched_env.errors import InputError

    limits = {"token_budget": token_budget, "max_num_seqs": max_num_seqs, "block_size": block_size}
    of_engine = {"load": load, "rate": rate, "profile": profile, "kv_tokens": kv_tokens, **limits}
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
        _, engine = _policy_and_engine("vllm-v1", [], kv_tokens, limits)
        problem = _changed(
            Instance.of_workload(_source(workload, trace, seed, options), profile, engine), objective, allow
        )
    found = lower_bounds(problem)
    name, value = best_bound(problem)
    if as_json:
        head = {"name": problem.name, "objective_name": problem.objective, "num_requests": len(problem)}
        rest = {"bound": value, "best": name, "bounds": dict(found)}
        print(json.dumps(_jsonable(head | rest), allow_nan=False))
        return
    rows = [
        (key, f"{bound:,.6g}", "the best" if key == name else "", BOUNDS.get(key, ""))
        for key, bound in found.items()
    ]
    above = "at most" if problem.maximise else "at least"
    columns = ("bound", above, "", "what it counts")
    _print_table(f"{problem.objective} of {len(problem)} requests", columns, rows)


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
        print(json.dumps(_jsonable({**summary, "iterations": found.iterations()}), allow_nan=False))
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
    _print_table("", ("", ""), rows)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in here, which solvers catch to give what they have; the program's own
    way (`agents.__main__`) is to leave at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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


# -- printing
# ------------------------------------------------------------------------------------------------------


def _print(what: Any) -> None:
    """Print something of rich's: on a terminal in its width, else in lines as long as they need to be."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    with console.capture() as capture:
        console.print(what)
    for line in capture.get().splitlines():
        print(line.rstrip())


def _print_table(title: str, columns: Sequence[str], rows: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=title or None, title_justify="left", show_header=any(columns), box=None, pad_edge=False
    )
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0, justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    _print(table)


import agents.cli_evaluate  # noqa: E402
import agents.cli_train  # noqa: E402
import agents.cli_tune  # noqa: E402, F401  (they add their commands)
