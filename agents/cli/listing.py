"""`llmsched list` and `llmsched profiles`: what there is by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agents.cli.common import app, show, show_table

if TYPE_CHECKING:
    from llmsched_env.profiles import Profile


@app.command("list")
def list_(
    what: Annotated[
        str | None,
        typer.Argument(
            help="schedulers, workloads, profiles, scenarios, networks, disciplines, presets or pretrained; "
            "else all"
        ),
    ] = None,
) -> None:
    """List what there is by name."""
    from llmsched_env.errors import unknown

    kinds = {
        "schedulers": _schedulers,
        "workloads": _workloads,
        "profiles": _profiles,
        "scenarios": _scenarios,
        "networks": _networks,
        "disciplines": _disciplines,
        "presets": _presets,
        "pretrained": _pretrained,
    }
    if what is not None and what not in kinds:
        raise unknown("list", what, kinds)
    for kind, rows in kinds.items():
        if what in (None, kind):
            columns = ("requests", "load", "profile") if kind == "scenarios" else ()
            show_table(kind, ("name", *columns, "what it is"), rows())


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


def _networks() -> Iterator[tuple[str, ...]]:
    from llmsched_env import networks

    for name in networks.names():
        yield name, networks.get(name).summary


def _disciplines() -> Iterator[tuple[str, ...]]:
    from llmsched_env.networks import disciplines

    for name in disciplines.names():
        yield name, disciplines.get(name).summary


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


profiles_app = typer.Typer(rich_markup_mode=None)
app.add_typer(profiles_app, name="profiles")


@profiles_app.callback(invoke_without_command=True)
def profiles_(context: typer.Context) -> None:
    """List the cost profiles; show one, or measure one: how long an iteration takes."""
    if context.invoked_subcommand is not None:
        return
    from llmsched_env import profiles

    rows = []
    for name in profiles.names():
        profile = profiles.get(name)
        capacity = "" if profile.kv_tokens is None else f"{profile.kv_tokens:,}"
        rows.append((name, profile.form, profile.gpu, str(profile.gpus), profile.model, capacity))
    show_table("profiles", ("name", "form", "GPU", "GPUs", "model", "KV tokens"), rows)


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
    show_table(profile.name, ("", ""), _describe(profile))
    show(profile.provenance)
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
