"""`llmsched simulate`: one run of one scheduler."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agents.cli.common import (
    AsJson,
    BlockSize,
    EngineSettings,
    KvTokens,
    MaxNumSeqs,
    Profile,
    TokenBudget,
    Workload,
    app,
    jsonable,
    pairs_of,
    policy_and_engine,
    show_table,
    source_of,
    value_of,
)

if TYPE_CHECKING:
    from llmsched_env.simulation import Result


@app.command()
def simulate(
    scheduler: Annotated[str, typer.Option(help="its name; see `llmsched list schedulers`")],
    profile: Profile,
    workload: Workload = None,
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
    kv_tokens: KvTokens = None,
    token_budget: TokenBudget = None,
    max_num_seqs: MaxNumSeqs = None,
    block_size: BlockSize = None,
    settings: EngineSettings = None,
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
    as_json: AsJson = False,
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
    extra = {key: value_of(value) for key, value in pairs_of("--workload-set", workload_settings)}
    for key in given.keys() & extra.keys():
        raise InputError(f"--workload-set gives {key}, which has an option of its own; give one of them")
    source = source_of(workload, trace, seed, {**given, **extra})
    limits = {"kv_tokens": kv_tokens, "token_budget": token_budget}
    limits |= {"max_num_seqs": max_num_seqs, "block_size": block_size}
    policy, engine = policy_and_engine(scheduler, settings, **limits)
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
        print(json.dumps(jsonable(head | metrics), allow_nan=False))
    else:
        _print_metrics(head, metrics)


def _write_requests(result: Result, path: Path) -> None:
    columns = ["request_id", "arrival_s", "prompt_tokens", "output_tokens"]
    columns += ["first_token_s", "finish_s", "preemptions"]
    result.to_frame()[columns].to_csv(path, index=False)


def _write_iterations(result: Result, path: Path) -> None:
    import pandas as pd

    columns = ["start_s", "end_s", "prefill_tokens", "decode_requests", "kv_tokens", "preempted"]
    assert result.iterations is not None
    pd.DataFrame({name: result.iterations[name] for name in columns}).to_csv(path, index=False)


def _print_metrics(head: dict[str, Any], metrics: dict[str, Any]) -> None:
    single = {k: v for k, v in metrics.items() if not isinstance(v, dict)}
    rows = [(k, str(v)) for k, v in head.items()]
    for name, value in single.items():
        if value is not None:
            rows.append((name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"))
    show_table("", ("", ""), rows)
    times = [
        (f"{name} s", *(f"{v:.4f}" for v in value.values()))
        for name, value in metrics.items()
        if isinstance(value, dict)
    ]
    show_table("", ("", "mean", "p50", "p90", "p99"), times)
