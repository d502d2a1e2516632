"""`llmsched bench`: schedulers side by side over loads and seeds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from agents.cli.common import app, progress_bar, show


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
    with progress_bar(what.runs) as progress:
        outcome = bench.run(what, progress=progress)
    summary = bench.summarise(outcome)
    written = bench.save(outcome, summary, folder)
    for table in bench.tables(outcome, summary):
        show(table.rich())
    for path in written:
        print(f"wrote {path}")
    if outcome.failures:
        for line in outcome.failures:
            print(f"failed: {line}", file=sys.stderr)
        raise typer.Exit(1)
