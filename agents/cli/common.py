"""What the subcommands share: the application, what options name, printing."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llmsched_env import EngineConfig


app = typer.Typer(
    name="llmsched",
    help="Scheduling of LLM inference: simulate engines, compare schedulers, find the optimum, train agents.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Options that several subcommands have.
Profile = Annotated[str, typer.Option(help="a cost profile: its name, or a JSON file")]
Workload = Annotated[str | None, typer.Option(help="its name; see `llmsched list workloads`")]
KvTokens = Annotated[int | None, typer.Option(help="KV cache in tokens; default: the profile's")]
TokenBudget = Annotated[int | None, typer.Option(help="most tokens of an iteration")]
MaxNumSeqs = Annotated[int | None, typer.Option(help="most requests running at once")]
BlockSize = Annotated[int | None, typer.Option(help="tokens of a block of the KV cache: 16")]
EngineSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="a setting of scheduler or engine; repeatable"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


def pairs_of(option: str, items: list[str] | None) -> list[tuple[str, str]]:
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


def value_of(text: str) -> Any:
    """A setting's value: true, false, none, a number, numbers with commas between, or text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    parts = tuple(value_of(part) for part in text.split(",")) if "," in text else ()
    return parts if parts and not any(isinstance(part, str) for part in parts) else text


def source_of(workload: str | None, trace: Path | None, seed: int, options: dict[str, Any]) -> Any:
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


def policy_and_engine(
    scheduler: str,
    settings: list[str] | None,
    *,
    kv_tokens: int | None = None,
    **limits: int | None,
) -> tuple[Any, EngineConfig]:
    """The scheduler and the engine with their settings.

    Args:
        settings: KEY=VALUE items of --set; a KEY is the engine's if the engine has it.
        limits: settings of the engine that have an option of their own, None where it is not given.
    """
    import baselines
    from llmsched_env import EngineConfig, InputError
    from llmsched_env.errors import unknown

    policy = baselines.get(scheduler)
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    known = fields.union(policy.settings.names())
    pairs = pairs_of("--set", settings)
    for key, _ in pairs:
        if key not in known:
            raise unknown("setting", key, [*known, "--kv-tokens"])
    for_engine = {key: value_of(value) for key, value in pairs if key in fields}
    for_scheduler = {key: value for key, value in pairs if key not in fields}
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


def jsonable(value: Any) -> Any:
    """nan and infinities, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress_bar(total: int) -> Iterator[Any]:
    """A progress bar on the standard error stream, where that is a terminal; gives the function that moves
    it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def interruptible() -> Iterator[None]:
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


def show(what: Any) -> None:
    """Print something of rich's: on a terminal in its width, else in lines as long as they need to be."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    with console.capture() as capture:
        console.print(what)
    for line in capture.get().splitlines():
        print(line.rstrip())


def show_table(title: str, columns: Sequence[str], rows: Any) -> None:
    """Print rows of text under headings; without any heading, just the rows."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=title or None, title_justify="left", show_header=any(columns), box=None, pad_edge=False
    )
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0, justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    show(table)
