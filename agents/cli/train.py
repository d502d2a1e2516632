"""`llmsched train` and `llmsched watch`: train an agent, and see what it does."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from agents.cli.common import app, pairs_of, value_of


@app.command()
def train(
    scenario: Annotated[
        str | None, typer.Option(help="its name or YAML file; the preset for it is used if there is one")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of a configuration, see `agents.config.Config`")
    ] = None,
    env: Annotated[str | None, typer.Option(help="llmsched/Decision-v0, Batch-v0 or Dispatch-v0")] = None,
    algo: Annotated[str | None, typer.Option(help="maskable-ppo or ppo")] = None,
    steps: Annotated[int | None, typer.Option(help="decisions in all")] = None,
    seed: Annotated[int | None, typer.Option(help="of all that is random")] = None,
    run: Annotated[Path | None, typer.Option(help="folder of the run; default: runs/SCENARIO-SEED")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in that folder")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="any other setting of the configuration, option of the environment or setting of the "
            "scenario; repeatable",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,2",
            help="a training with each of these seeds, in RUN/seed-0, ...; those that were begun go on",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="of these at a time")] = 1,
    use_ray: Annotated[bool, typer.Option("--ray", help="make these on Ray: one of JOBS cores here")] = False,
    address: Annotated[
        str | None, typer.Option(help="or on the Ray cluster at this address; auto: the one of this machine")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end")] = False,
) -> int:
    """Train an agent. Stop it at any moment (Ctrl-C); --resume goes on as if it had not been stopped."""
    training = _training()
    from agents.config import Config
    from agents.runs import Run
    from llmsched_env.errors import InputError

    given = {"scenario": scenario, "env": env, "algo": algo, "steps": steps, "seed": seed}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changes |= {name: value_of(value) for name, value in pairs_of("--set", settings)}
    if seeds is None and (jobs != 1 or use_ray or address is not None):
        raise InputError("--jobs, --ray and --address are for several trainings; say which: --seeds 0,1,2")
    if seeds is not None and (resume or "seed" in changes):
        raise InputError("with --seeds leave out --seed, and --resume: the same command again goes on")
    if resume:
        if run is None:
            raise InputError("say which run to go on with: --run DIR --resume")
        Run.open(run)  # refuses what is none
        if changes or config is not None:
            raise InputError(
                f"a run goes on as it began ({run / 'config.yaml'}); leave out "
                f"{', '.join([*changes, *(['config'] if config else [])])}, or begin another one"
            )
        settled, folder = Run.open(run).config, run
    else:
        if config is not None:
            settled = Config.from_yaml(config)
        else:
            settled = Config.of_scenario(changes.pop("scenario", "toy"))
        settled = settled.replace(**changes)
        if seeds is not None:
            where = {"jobs": jobs, "use_ray": use_ray, "address": address}
            return _train_all(settled, _numbers(seeds), run or _folder(settled), where, as_json)
        folder = run or _folder(settled).with_name(f"{_folder(settled).name}-{settled.seed}")
    if not as_json:
        print(f"{folder}: {settled.steps:,} decisions of {settled.scenario} in {settled.env}")
        rounds, episodes = settled.teacher_rounds + 1, settled.teacher_episodes
        taught = (
            f", {settled.teacher} to be imitated ({rounds} x {episodes} episodes)" if settled.teacher else ""
        )
        print(f"first: code to be compiled (a minute or two, once){taught}, a validation", flush=True)
    with _bar(settled, as_json) as show:
        try:
            done = (
                training.resume(folder, progress=show)
                if resume
                else training.train(settled, folder, progress=show)
            )
        except training.Diverged as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if as_json:
        print(json.dumps(_summary(done)))
    else:
        print(_line(done))
        print(f"compare: llmsched evaluate --policy vllm-v1 --policy {folder} {_same(settled)}")
        print(f"look:    tensorboard --logdir {folder}; llmsched watch {folder}")
    return 0


def _train_all(config: Any, seeds: list[int], folder: Path, where: dict[str, Any], as_json: bool) -> int:
    """A training with each seed."""
    from agents.cluster import Failed, sweep, train_all
    from agents.runs import Run

    configs, failures = sweep(config, seeds=seeds), {}
    if not as_json:
        print(
            f"{folder}: {len(configs)} trainings of {config.steps:,} decisions of {config.scenario} in "
            f"{config.env}",
            flush=True,
        )
    try:
        runs = train_all(configs, folder, progress=None if as_json else _Lines(config.metric), **where)
    except Failed as error:
        failures = error.failures
        runs = [Run(folder / name, configs[name]) for name in error.done]
    if as_json:
        print(json.dumps({"runs": [_summary(run) for run in runs], "failures": failures}))
    else:
        for run in runs:
            print(f"{run.folder}: {_line(run)}")
    for name, why in failures.items():
        print(f"error: {folder / name}: {why}", file=sys.stderr)
    if runs and not as_json:
        learned = ",".join(str(run.folder) for run in runs) if failures else folder / "seed-*"
        policies = f'--policy vllm-v1 --policy "learned={learned}"'
        print(f"compare: llmsched evaluate {policies} {_same(config)}")
        print(f"look:    tensorboard --logdir {folder}")
    return 1 if failures else 0


def _training() -> Any:
    """The module, which needs more to be installed than the rest."""
    from llmsched_env.errors import InputError

    try:
        from agents import training
    except ImportError as error:
        raise InputError(str(error)) from None
    return training


def _same(config: Any) -> str:
    """What `evaluate` has to be told to compare on the same terms."""
    return f"--scenario {config.scenario} --metric {config.metric}"


def _folder(config: Any) -> Path:
    """Of a run for which none was given."""
    return Path("runs") / Path(config.scenario).stem


def _numbers(text: str) -> list[int]:
    from llmsched_env.errors import InputError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--seeds takes whole numbers with commas between, not {text!r}") from None


def _summary(run: Any) -> dict[str, Any]:
    """What has come of a run."""
    from agents.agent import Agent

    kept = Agent.load(run.folder).about["steps"]
    rows = run.read_rows("validation")
    last = next((row for row in rows if int(row["steps"]) == kept), rows[-1])
    metric = run.config.metric
    return {
        "run": str(run.folder),
        "agent": str(run.folder / "agent"),
        "steps": int(rows[-1]["steps"]),
        "best_at": int(last["steps"]),
        "metric": metric,
        **{name: float(last[name]) for name in (metric, "vllm_v1", "gain")},
    }


def _line(run: Any) -> str:
    said = _summary(run)
    return (
        f"{said['metric']} on validation episodes: {said[said['metric']]:.4g}, vLLM V1 {said['vllm_v1']:.4g} "
        f"({100 * said['gain']:+.1f} % better)"
    )


class _bar:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, config: Any, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True)
        self._terminal = console.is_terminal and not quiet
        self._quiet, self._told, self._name = quiet, 0.0, config.metric
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
        self._bar = Progress(*columns, console=console, disable=not self._terminal)
        self._task = self._bar.add_task("training", total=config.updates * config.rollout, said="")

    def __enter__(self) -> Any:
        self._bar.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self, now: Any) -> None:
        said = _standing(now, self._name)
        if self._terminal:
            self._bar.update(self._task, completed=now.steps, said=said)
        elif not self._quiet and now.steps / now.total >= self._told:
            self._told = now.steps / now.total + 0.1
            print(said, file=sys.stderr, flush=True)


class _Lines:
    """A line now and then for each of several trainings, from the processes that train."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._told: dict[str, float] = {}

    def __call__(self, name: str, now: Any) -> None:
        if now.steps / now.total >= self._told.get(name, 0.0):
            self._told[name] = now.steps / now.total + 0.1
            print(f"{name}: {_standing(now, self._metric)}", file=sys.stderr, flush=True)


def _standing(now: Any, metric: str) -> str:
    """How a training stands."""
    said = f"{now.steps:,} decisions, {now.rate:,.0f}/s, {_minutes(now.left_s)} left"
    if not math.isnan(now.metric):
        said += f", {metric} {now.metric:.4g}"
    if not math.isnan(now.validated):
        said += f", best validated {now.validated:.4g} (vLLM V1 {now.baseline:.4g})"
    return said


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="folder of a run or of an agent, or pretrained:NAME")],
    output: Annotated[
        Path | None, typer.Option(help="FILE.mp4, FILE.gif or FILE.png (the end); default: RUN/episode.mp4")
    ] = None,
    scenario: Annotated[str | None, typer.Option(help="another than it was trained on")] = None,
    seed: Annotated[int, typer.Option(help="of the episode")] = 1_000_000,
    most_frames: Annotated[int, typer.Option(help="pictures at most, spread evenly over the episode")] = 300,
    fps: Annotated[int, typer.Option(help="pictures a second")] = 15,
) -> None:
    """Draw an episode as an agent plays it."""
    from agents.agent import Agent
    from agents.watching import record

    name = str(run)
    agent = (
        Agent.pretrained(name.removeprefix("pretrained:"))
        if name.startswith("pretrained:")
        else Agent.load(run)
    )
    path = output or (Path("episode.mp4") if name.startswith("pretrained:") else run / "episode.mp4")
    metrics = record(agent, path, scenario=scenario, seed=seed, most_frames=most_frames, fps=fps)
    print(
        f"{path}: "
        + ", ".join(f"{key} {metrics[key]:.4g}" for key in ("latency_s", "goodput", "preemptions"))
    )
