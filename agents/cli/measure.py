"""`llmsched profiles measure`: a cost profile from the GPU at hand."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agents.cli.common import jsonable, show_table
from agents.cli.listing import profiles_app

if TYPE_CHECKING:
    from llmsched_env.measure import Outcome, Settings
    from llmsched_env.measure.report import Report
    from llmsched_env.measure.session import Plan, Progress


@profiles_app.command("measure")
def measure(
    model: Annotated[
        str, typer.Option(help="a decoder: llama-3-8b, qwen2.5-7b, ...; or the path of a model's config.json")
    ],
    output: Annotated[Path, typer.Option(help="NAME.json, the profile to write; NAME.csv has the times")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32")] = "bf16",
    device: Annotated[str, typer.Option(help="cuda; or cpu, to try the program (--model tiny)")] = "cuda",
    layers: Annotated[
        int | None, typer.Option(help="build and time so many, scale to all; default: all of the model")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a coarser grid, for a first look")] = False,
    max_tokens: Annotated[int, typer.Option(help="most tokens of an iteration")] = 8192,
    max_context: Annotated[int, typer.Option(help="longest sequence, in tokens")] = 16384,
    max_decodes: Annotated[int, typer.Option(help="most decodes of an iteration")] = 256,
    warmup: Annotated[int, typer.Option(help="untimed iterations of each batch")] = 3,
    repeats: Annotated[int, typer.Option(help="timed iterations of each batch, at least")] = 10,
    seconds: Annotated[float, typer.Option(help="of which there are more, up to so long a batch")] = 1.0,
    seed: Annotated[int, typer.Option(help="of weights, and of the batches that judge")] = 0,
    graph_tokens: Annotated[
        int, typer.Option(help="batches up to so many tokens are replayed as a CUDA graph; 0: none")
    ] = 512,
    fuse: Annotated[
        bool | None,
        typer.Option("--fuse/--no-fuse", help="compile the small operations; default: on a GPU"),
    ] = None,
    attention: Annotated[
        str,
        typer.Option(help="auto: the fastest; or paged-flash, paged-flash3, sdpa-cudnn, sdpa-flash, sdpa"),
    ] = "auto",
    flash: Annotated[
        str | None, typer.Option(help="an installed implementation of flash attention, such as FA3")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="part of the memory for weights, activations and KV cache, as in vLLM")
    ] = 0.9,
    memory_gib: Annotated[
        float | None, typer.Option(help="memory of the device to plan with; default: all it has")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="of the profile: linear, hinge, staircase or roofline; default: what fits best"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with what was measured to --output")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the batches and the memory needed; measure nothing")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end")] = False,
) -> int:
    """Measure how long iterations take on this machine's GPU, and fit a cost profile to that.

    Builds a decoder with random weights and times it over batches of prefills, decodes and both. Stop it at
    any moment (Ctrl-C); the same command with --resume goes on.
    """
    from llmsched_env.errors import unknown
    from llmsched_env.measure import Interrupted, Settings, plan, run
    from llmsched_env.measure.report import FORMS, of, write
    from llmsched_env.measure.session import open_device
    from llmsched_env.measure.settings import GIB

    if form is not None and form not in FORMS:
        raise unknown("form", form, FORMS)
    settings = Settings(
        model=model,
        dtype=dtype,
        device=device,
        layers=layers,
        quick=quick,
        max_tokens=max_tokens,
        max_context=max_context,
        max_decodes=max_decodes,
        seed=seed,
        warmup=warmup,
        repeats=repeats,
        seconds=seconds,
        graph_tokens=graph_tokens,
        fuse=fuse,
        attention=attention,
        flash=flash,
        utilization=gpu_memory_utilization,
        memory_gib=memory_gib,
    )
    if dry_run:
        total = memory_gib * GIB if memory_gib is not None else open_device(settings)[1]
        _show_plan(settings, plan(settings, total), as_json)
        return 0

    def say(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    try:
        with _asked_to_stop() as stop, _Bar(quiet=as_json) as progress:
            outcome = run(settings, output, resume=resume, say=say, progress=progress, stop=stop)
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 130
    report = of(outcome, form)
    write(report, outcome)
    _draw(report, outcome)
    if as_json:
        print(json.dumps(jsonable(_summary(report, outcome)), allow_nan=False))
    else:
        _show(report, outcome)
    return 0


def _show_plan(settings: Settings, found: Plan, as_json: bool) -> None:
    from llmsched_env.measure.settings import GIB

    memory = found.memory
    sizes = {
        "weights": memory.weights,
        "activations": memory.activations,
        "KV cache": found.pages * memory.page,
        "needed": found.needed,
        "to be used": memory.total,
    }
    if as_json:
        names = {part: list(map(str, batches)) for part, batches in found.parts.items()}
        print(json.dumps({"batches": names, "memory_bytes": sizes, "kv_tokens": memory.capacity_tokens}))
        return
    for part, batches in found.parts.items():
        rows = []
        for batch in batches:
            P, NP, CX, KP, D, KV = batch.features
            rows.append((str(batch), batch.kind, *(f"{x:,.0f}" for x in (P, NP, CX, KP, D, KV))))
        show_table(
            f"{part}: {len(batches)} batches", ("batch", "kind", "P", "NP", "CX", "KP", "D", "KV"), rows
        )
        print()
    built, layers = settings.built_layers, settings.shape.layers
    scaled = "" if built == layers else f", scaled to {layers}"
    print(f"{found.batches} batches; {built} layers of {settings.shape.name} in {settings.dtype}{scaled}")
    show_table("memory", ("", "GiB"), [(name, f"{size / GIB:.2f}") for name, size in sizes.items()])
    if memory.capacity_tokens is None:
        print("all weights do not fit: the profile will have no KV capacity; engines need --kv-tokens then")
    else:
        print(f"an engine would have a KV cache of about {memory.capacity_tokens:,} tokens")


def _summary(report: Report, outcome: Outcome) -> dict[str, Any]:
    files = outcome.files
    return {
        "profile": str(files.profile),
        "rows": str(files.rows),
        "about": str(files.about),
        "picture": str(files.picture),
        "form": report.chosen,
        "params": dict(report.profile.params),
        "kv_tokens": report.profile.kv_tokens,
        "checks": outcome.about["checks"],
        "errors": report.errors,
        "measured": len(outcome.rows),
        "measured_now": outcome.fresh,
        "skipped": {str(batch): why for batch, why in outcome.skipped.items()},
        "launching": sorted(str(row.batch) for row in outcome.rows.values() if row.launching),
    }


def _show(report: Report, outcome: Outcome) -> None:
    rows = []
    for name, by_kind in report.errors.items():
        for kind in ("mix", "decode", "prefill"):
            found = by_kind.get(kind)
            if found is not None:
                cells = (f"{found['R2']:.4f}", *(f"{100 * found[k]:.1f}" for k in ("median_rel", "p95_rel")))
                chosen = name == report.chosen and kind == "mix"
                rows.append((f"{name} *" if chosen else name if kind == "mix" else "", kind, *cells))
    title = "errors on held-out batches (* the profile's form)"
    show_table(title, ("form", "batches", "R2", "median %", "95th percentile %"), rows)
    kv = report.profile.kv_tokens
    if kv is None:
        print("KV cache: all weights do not fit this device; say how much an engine has with --kv-tokens")
    else:
        print(f"KV cache of an engine: {kv:,} tokens")
    for batch, why in outcome.skipped.items():
        print(f"skipped: {batch}, {why}")
    launching = [row for row in outcome.rows.values() if row.launching]
    if launching:
        most = max(row.batch.tokens for row in launching)
        print(
            f"careful: {len(launching)} batches of up to {most} tokens took as long as launching their "
            f"kernels one by one, which engines do faster; --graph-tokens {most} measures the GPU "
            "alone"
        )
    files = outcome.files
    print(f"times: {files.rows}; settings, hardware, checks: {files.about}; picture: {files.picture}")
    print(
        f"written: {files.profile}; try it: llmsched simulate --profile {files.profile} --scheduler vllm-v1 "
        "--workload azure-conv --load 0.8"
    )


def _draw(report: Report, outcome: Outcome) -> None:
    from baselines import plots
    from llmsched_env.files import writing

    with writing(outcome.files.picture) as temporary:
        plots.measurement(report.fits, report.chosen, report.measured, temporary)


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Gives the function that says whether Ctrl-C or SIGTERM came; at the second one the program leaves."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            os._exit(130)
        asked.set()
        os.write(2, b"\nstopping after this iteration; once more to leave at once\n")

    for name in before:
        signal.signal(name, ask)
    try:
        yield asked.is_set
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class _Bar:
    """A progress bar with the time left on a terminal, a line now and then elsewhere."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._terminal, self._quiet, self._told = console.is_terminal and not quiet, quiet, 0.0
        columns = (
            TextColumn("measuring"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self._bar = Bar(*columns, console=console, disable=not self._terminal, transient=True)
        self._task: Any = None

    def __enter__(self) -> Callable[[Progress], None]:
        return self._show

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self, now: Progress) -> None:
        took = "skipped: out of memory" if now.seconds is None else f"{1000 * now.seconds:.2f} ms"
        said = f"{int(now.left_s // 60)}:{int(now.left_s % 60):02d} left, {now.batch}: {took}"
        if self._terminal:
            if self._task is None:  # what is found before is printed without a bar below it
                self._task = self._bar.add_task("", total=now.total, said="")
                self._bar.start()
            self._bar.update(self._task, completed=now.done, said=said)
        elif now.seconds is None or (not self._quiet and now.done / now.total >= self._told):
            self._told = now.done / now.total + 0.1
            print(f"{now.done} of {now.total}, {said}", file=sys.stderr, flush=True)
