"""`llmsched stability`: up to what rate schedulers are stable; `llmsched conserving`: who leaves room."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

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
    show,
    source_of,
    value_of,
)


@app.command()
def stability(
    scheduler: Annotated[list[str], typer.Option(help="its name; repeatable, or with commas between")],
    profile: Profile,
    workload: Workload = None,
    trace: Annotated[Path | None, typer.Option(help="a trace whose requests are drawn at random")] = None,
    rate: Annotated[
        float | None, typer.Option(help="requests per second to judge, in place of a search")
    ] = None,
    load: Annotated[float | None, typer.Option(help="the same as a share of the limit of each")] = None,
    token_budget: TokenBudget = None,
    max_num_seqs: MaxNumSeqs = None,
    kv_tokens: KvTokens = None,
    block_size: BlockSize = None,
    settings: EngineSettings = None,
    workload_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--workload-set",
            metavar="KEY=VALUE",
            help="an option of the workload, such as arrivals=gamma:3; repeatable. Arrivals are Poisson "
            "unless it says otherwise",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="independent runs of each test")] = 8,
    confidence: Annotated[float, typer.Option(help="of each verdict")] = 0.95,
    start: Annotated[
        str, typer.Option(help="filled: with requests waiting, does the backlog shrink? empty: does it grow?")
    ] = "filled",
    requests: Annotated[
        int | None, typer.Option(help="in a run of the first look; doubled while undecided")
    ] = None,
    looks: Annotated[
        int | None, typer.Option(help="how often a test looks, each time at twice the length")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="relative distance of rates at which the search ends: 0.01")
    ] = None,
    blocking: Annotated[
        bool, typer.Option("--blocking", help="keep requests that can never be served, to block the queue")
    ] = False,
    loads: Annotated[
        str | None,
        typer.Option(
            help="further shares of the limit to test after a search, for the pictures of --output: "
            "0.25,0.5,0.75,1"
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="folder for CSV and PNG")] = None,
    jobs: Annotated[int, typer.Option(help="runs at once")] = 1,
    as_json: AsJson = False,
) -> None:
    """Find the largest rate at which schedulers are stable, or judge one, by the drift of the backlog."""
    from baselines import stability as tests
    from llmsched_env.errors import InputError
    from llmsched_env.files import require_writable_folder

    if rate is not None and load is not None:
        raise InputError("give either --rate or --load, not both")
    if load is not None and not load > 0:
        raise InputError(f"--load must be a positive share of the limit, not {load}")
    if rate is not None or load is not None:
        for option, value in (("tolerance", tolerance), ("loads", loads)):
            if value is not None:
                raise InputError(f"--{option} is of a search; leave it out, or --rate and --load")
    elif loads is not None and output is None:
        raise InputError("--loads is for pictures; give --output FOLDER with it")
    further = _shares("0.25,0.5,0.75,1" if loads is None else loads)
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, not {jobs}")
    if output is not None:
        require_writable_folder(output)
    options = {"requests": requests, "looks": looks, "tolerance": tolerance}
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    procedure = tests.Procedure(seeds=seeds, confidence=confidence, start=start, **given)
    names = _names(scheduler)
    source = _recipe(workload, trace, workload_settings)
    limits = {"kv_tokens": kv_tokens, "token_budget": token_budget}
    limits |= {"max_num_seqs": max_num_seqs, "block_size": block_size}
    cases = {}
    for name in names:
        policy, engine = policy_and_engine(name, settings, **limits)
        cases[name] = tests.Case.of(policy, source, profile, engine, blocking=blocking)
    found: dict[str, Any] = {}
    more: dict[str, list[Any]] = {name: [] for name in names}
    with _telling(len(cases)) as tell:
        for i, (name, case) in enumerate(cases.items()):
            told = tell(i, name)
            if rate is None and load is None:
                found[name] = tests.search(case, procedure, threads=jobs, told=told)
                if output is not None:
                    near = [share * found[name].estimate / case.limit.rps for share in (0.8, 0.9, 1.1, 1.25)]
                    some = sorted(share for share in {*further, *near} if share > 0)
                    more[name] = tests.sweep(case, some, procedure, threads=jobs, told=told)
            else:
                at = rate if rate is not None else case.limit.rps * (load or 0)
                found[name] = tests.test(case, at, procedure, threads=jobs, told=told)
    written = []
    if output is not None:
        written = tests.save(
            {name: [*getattr(one, "tests", (one,)), *more[name]] for name, one in found.items()}, output
        )
    if as_json:
        head = {"profile": cases[names[0]].profile.name, "workload": source.name}
        head |= {"start": start, "seeds": seeds, "confidence": confidence}
        each = [{"scheduler": name, **head, **one.to_dict()} for name, one in found.items()]
        what = each[0] if len(each) == 1 else {"schedulers": each}
        print(json.dumps(jsonable(what), allow_nan=False))
        return
    show(tests.table(found) if rate is None and load is None else tests.verdict_table(found))
    for path in written:
        print(f"wrote {path}")


def _names(schedulers: list[str]) -> list[str]:
    """The schedulers' names, each once."""
    from llmsched_env.errors import InputError

    names = [name.strip() for item in schedulers for name in item.split(",")]
    if "" in names:
        raise InputError(
            f"--scheduler {','.join(schedulers)!r} holds an empty name; give names, with commas between"
        )
    return list(dict.fromkeys(names))


def _shares(text: str) -> list[float]:
    """Positive numbers with commas between."""
    from llmsched_env.errors import InputError

    try:
        shares = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        shares = [0.0]
    if not all(0 < share < 100 for share in shares):
        raise InputError(
            f"--loads takes shares of the limit with commas between, such as 0.8,1, not {text!r}"
        )
    return shares


def _recipe(workload: str | None, trace: Path | None, items: list[str] | None) -> Any:
    """The workload, at no rate, or the trace."""
    from llmsched_env.errors import InputError

    extra = {key: value_of(value) for key, value in pairs_of("--workload-set", items)}
    for key in ("rate", "load", "num_requests", "seed"):
        if key in extra:
            raise InputError(f"--workload-set {key}= means nothing here; it is the test that sets it")
    if trace is None:
        extra = {"arrivals": "poisson", **extra} if "cv" not in extra else extra
    return source_of(workload, trace, 0, extra)


@contextmanager
def _telling(total: int) -> Iterator[Callable[[int, str], Callable[[str], None]]]:
    """A line on the standard error stream, where that is a terminal, of who is tested how."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def tell(done: int, name: str) -> Callable[[str], None]:
            bar.update(task, completed=done, description=name)
            return lambda text: bar.update(task, description=f"{name}: {text}")

        yield tell


@app.command()
def conserving(
    profile: Annotated[str | None, typer.Option(help="a cost profile: its name, or a JSON file")] = None,
    scheduler: Annotated[list[str] | None, typer.Option(help="its name; repeatable, or with commas")] = None,
    agent: Annotated[
        str | None,
        typer.Option(help="instead, a folder of a run or an agent, or pretrained:NAME"),
    ] = None,
    workload: Workload = None,
    trace: Annotated[Path | None, typer.Option(help="a trace: CSV, CSV.gz or JSONL")] = None,
    num_requests: Annotated[int | None, typer.Option(help="how many of a workload: 1000")] = None,
    rate: Annotated[float | None, typer.Option(help="requests per second")] = None,
    load: Annotated[float | None, typer.Option(help="the same as a share of the limit; default: 1.1")] = None,
    scenario: Annotated[str | None, typer.Option(help="of the agent; default: its own")] = None,
    seed: Annotated[int, typer.Option(help="of the requests, or of the agent's episode")] = 0,
    token_budget: TokenBudget = None,
    max_num_seqs: MaxNumSeqs = None,
    kv_tokens: KvTokens = None,
    block_size: BlockSize = None,
    settings: EngineSettings = None,
    workload_settings: Annotated[
        list[str] | None,
        typer.Option("--workload-set", metavar="KEY=VALUE", help="as of stability"),
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="K of K-FCFS; default: the token budget")] = None,
    as_json: AsJson = False,
) -> None:
    """Watch schedulers, or an agent, and show the first batch that they could have filled and did not."""
    from baselines import conserving as rules
    from baselines.stability import Case
    from llmsched_env.errors import InputError

    found: dict[str, rules.Report] = {}
    if agent is not None:
        if scheduler or profile or workload or trace:
            raise InputError("an --agent has its scenario; leave --scheduler, --profile and --workload out")
        others: dict[str, Any] = {
            "num-requests": num_requests,
            "rate": rate,
            "load": load,
            "token-budget": token_budget,
        }
        others |= {"max-num-seqs": max_num_seqs, "kv-tokens": kv_tokens, "block-size": block_size}
        others |= {"set": settings or None, "workload-set": workload_settings or None}
        for option, value in others.items():
            if value is not None:
                raise InputError(f"an --agent has its scenario; leave --{option} out, or name a --scenario")
        from agents.agent import Agent
        from agents.watching import episode

        name = agent.removeprefix("pretrained:")
        loaded = Agent.pretrained(name) if agent.startswith("pretrained:") else Agent.load(agent)
        found[agent] = rules.check(episode(loaded, scenario=scenario, seed=seed), k=k)
    else:
        if not scheduler or profile is None:
            raise InputError("give --scheduler NAME with --profile and --workload, or --agent FOLDER")
        if rate is not None and load is not None:
            raise InputError("give either --rate or --load, not both")
        if scenario is not None:
            raise InputError("--scenario is of an --agent; a scheduler takes --workload and --profile")
        source = _recipe(workload, trace, workload_settings)
        limits = {"kv_tokens": kv_tokens, "token_budget": token_budget}
        limits |= {"max_num_seqs": max_num_seqs, "block_size": block_size}
        for name in _names(scheduler):
            policy, engine = policy_and_engine(name, settings, **limits)
            case = Case.of(policy, source, profile, engine)
            at = rate if rate is not None else case.limit.rps * (1.1 if load is None else load)
            count = 1000 if num_requests is None else num_requests
            if not 0 < at < math.inf or count < 1:
                raise InputError("--rate, --load and --num-requests must be positive")
            drawn = case.draw(at, count, 0, seed)
            found[name] = rules.observe(policy, drawn, profile, engine, k=k, seed=seed)
    if as_json:
        each = [{"scheduler": name, **one.to_dict()} for name, one in found.items()]
        print(json.dumps(jsonable(each[0] if len(each) == 1 else {"schedulers": each}), allow_nan=False))
        return
    show(rules.table(found))
    for name, one in found.items():
        for breach in one.breaches.values():
            if breach is not None:
                print(f"{name}: {breach}")
