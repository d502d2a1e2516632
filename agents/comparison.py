"""Policies side by side on the same requests: schedulers, agents, chance and the optimum.

    from agents.comparison import compare

    found = compare(["vllm-v1", "srf", "slo=runs/slo-*", "random"], "slo-mix", metric="goodput")
    print(found.table())
    found.save("my-comparison")

What is said of a policy is a mean over traces and over its trainings, with an interval of 95 % (see
`agents.statistics`), and by how much it is better than a baseline on the very same traces. An improvement is
positive whether the metric is to be small or large. Where some requests of an episode were not finished its
seconds mean nothing: such episodes are left out of means and differences, their share is told, and the
probability of improvement counts them as worse than any that was finished.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import baselines
from agents import statistics
from agents.contenders import Episodes, Metrics, Policy, Scheduled, resolve
from agents.evaluation import FIRST_SEED
from agents.statistics import Bootstrap, Estimate
from llmsched_env import InputError, scenarios
from llmsched_env.errors import unknown
from llmsched_env.files import require_writable_folder, writing

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

__all__ = ["METRICS", "Comparison", "Matrix", "Metric", "Row", "compare", "matrix", "resolve"]

VLLM = "vllm-v1"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of an episode.

    Attributes:
        name: for people.
        unit: of it, if there is one.
        larger: whether more is better.
        whole: whether it only means something where the episode was played to its end.
    """

    name: str
    unit: str = ""
    larger: bool = False
    whole: bool = True

    @property
    def what(self) -> str:
        """The name and the unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


METRICS: dict[str, Metric] = {
    "latency_s": Metric("mean latency", "s"),
    "goodput": Metric("share of requests in time", larger=True, whole=False),
    "ttft_s": Metric("mean time to first token of finished requests", "s"),
    "tpot_s": Metric("mean time per output token of finished requests", "s"),
    "throughput_tps": Metric("throughput", "output tokens/s", larger=True),
    "gpu_s": Metric("busy time", "s"),
    "makespan_s": Metric("makespan", "s"),
    "fairness": Metric("Jain's index between clients", larger=True),
    "finished": Metric("requests finished", larger=True, whole=False),
    "preemptions": Metric("preemptions"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What there is to say of a policy.

    Attributes:
        policy: its label.
        trainings: how many.
        finished: share of all requests that finished.
        complete: share of the episodes that were played to their end.
        mean, iqm: of the metric, over trainings and complete episodes; iqm: without the lowest and the
            highest quarter.
        improvement: over vLLM V1, percent of its mean on the same traces.
        score: 0 for the mean of vLLM V1, 1 for that of the best known schedules; nan where none is known.
        difference: how much better than the baseline, in units of the metric, by trace.
        probability: that it is better than the baseline on a trace; an equal one counts half.
    """

    policy: str
    trainings: int
    finished: float
    complete: float
    mean: Estimate
    iqm: Estimate
    improvement: Estimate
    score: Estimate
    difference: Estimate
    probability: Estimate


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """What policies came to on the same E episodes.

    Attributes:
        episodes: what was played.
        found: label -> metric -> (S, E), a row a training.
        vllm_v1: metric -> (1, E), what vLLM V1 came to.
        baseline: the label that differences are to.
        bootstrap: how intervals are made.
    """

    episodes: Episodes
    found: Mapping[str, Metrics]
    vllm_v1: Metrics
    baseline: str
    bootstrap: Bootstrap = Bootstrap()  # noqa: RUF009  (frozen)

    @property
    def metric(self) -> str:
        """Its name."""
        return self.episodes.metric

    def against(self, baseline: str) -> Comparison:
        """The same with differences to another label.

        Raises:
            InputError: an unknown label.
        """
        if baseline not in self.found:
            raise unknown("baseline", baseline, self.found)
        return dataclasses.replace(self, baseline=baseline)

    def values(self, label: str) -> NDArray[np.float64]:
        """The metric of a policy, (S, E), nan where it means nothing.

        Raises:
            InputError: an unknown label.
        """
        if label not in self.found:
            raise unknown("policy", label, self.found)
        return self._valid(self.found[label])

    @cached_property
    def rows(self) -> list[Row]:
        """A row a policy, in the order that they were given in."""
        return [self._row(label) for label in self.found]

    def _valid(self, found: Metrics) -> NDArray[np.float64]:
        values = found[self.metric]
        if not METRICS[self.metric].whole:
            return values
        return np.where(self.episodes.complete(found), values, np.nan)

    def _row(self, label: str) -> Row:
        found, sign = self.found[label], 1.0 if METRICS[self.metric].larger else -1.0
        x, base = sign * self.values(label), sign * self.values(self.baseline)
        vllm, best = sign * self._valid(self.vllm_v1), sign * self.episodes.best_known[None]
        estimate = self.bootstrap.estimate
        same = Estimate(0.0, 0.0, 0.0)
        is_base = label == self.baseline
        score = Estimate(math.nan)
        if self.metric == "latency_s" and not np.isnan(best).all():
            score = estimate(statistics.normalised, x, vllm, best)
        return Row(
            policy=label,
            trainings=len(x),
            finished=float(found["finished"].mean()) / self.episodes.problem.num_requests,
            complete=float(self.episodes.complete(found).mean()),
            mean=estimate(statistics.mean, sign * x),
            iqm=estimate(statistics.iqm, sign * x),
            improvement=estimate(lambda a, b: 100 * statistics.relative_difference(a, b), x, vllm),
            score=score,
            difference=same if is_base else estimate(statistics.difference, x, base),
            probability=Estimate(0.5, 0.5, 0.5)
            if is_base
            else estimate(statistics.probability_of_improvement, x, base),
        )

    # ------------------------------------------------------------------ as data

    def to_frame(self) -> pd.DataFrame:
        """A row for each policy, training and episode: its seed, whether it was played to its end, and its
        metrics, as they are."""
        import pandas as pd

        frames = []
        for label, found in self.found.items():
            complete = self.episodes.complete(found)
            for s in range(len(complete)):
                row: dict[str, Any] = {"policy": label, "training": s, "seed": list(self.episodes.seeds)}
                row |= {"complete": complete[s]} | {name: values[s] for name, values in found.items()}
                frames.append(pd.DataFrame(row))
        return pd.concat(frames, ignore_index=True)

    def to_dict(self) -> dict[str, Any]:
        """What the table tells, and the settings, as JSON has it: null where something is not known."""
        e, b = self.episodes, self.bootstrap
        head: dict[str, Any] = {
            "scenario": e.scenario.name,
            "metric": self.metric,
            "unit": METRICS[self.metric].unit,
        }
        head |= {"larger_is_better": METRICS[self.metric].larger, "episodes": len(e)}
        head |= {"seed": e.seeds.start, "requests": e.problem.num_requests, "baseline": self.baseline}
        head |= {"intervals": {"level": b.level, "resamples": b.repeats, "seed": b.seed}}
        head |= {"references": int(np.count_nonzero(~np.isnan(e.best_known)))}
        return _plain({**head, "policies": [dataclasses.asdict(row) for row in self.rows]})

    # ------------------------------------------------------------------ for people

    @property
    def _what(self) -> str:
        return METRICS[self.metric].what

    def table(self) -> Table:
        """For a terminal, the best mean first; a * where the interval of a difference does not hold 0."""
        from rich.markup import escape
        from rich.table import Table

        e = self.episodes
        scored = any(not math.isnan(row.score.value) for row in self.rows)
        trained = any(row.trainings > 1 for row in self.rows)
        few = any(1 < row.trainings < 5 for row in self.rows)
        better = "larger" if METRICS[self.metric].larger else "smaller"
        view = Table(
            title=f"{e.scenario.name}: {self._what}, {better} is better; {len(e)} episodes of "
            f"{e.problem.num_requests} requests from seed {e.seeds.start}, "
            f"{100 * self.bootstrap.level:g} % intervals",
            caption=f"better than {self.baseline}: by trace, positive is better; *: the interval holds no 0"
            + "; score: 0 is vLLM V1, 1 the best known" * scored
            + "; intervals of fewer than 5 trainings are too narrow" * few,
            title_justify="left",
            caption_justify="left",
        )
        columns: dict[str, Callable[[Row], str]] = {
            "policy": lambda r: r.policy,
            "trainings": lambda r: str(r.trainings),
            "mean": lambda r: _text(r.mean),
            "IQM": lambda r: _text(r.iqm),
            "score": lambda r: _text(r.score),
            "over vLLM V1 %": lambda r: _text(r.improvement, "{:+.1f}"),
            f"better than {self.baseline}": lambda r: (
                ""
                if r.policy == self.baseline
                else _text(r.difference, "{:+.4g}") + "*" * abs(r.difference.sign)
            ),
            "probability": lambda r: "" if r.policy == self.baseline else _text(r.probability, "{:.2f}"),
            "finished %": lambda r: f"{100 * r.finished:.4g}",
            "complete %": lambda r: f"{100 * r.complete:.4g}",
        }
        for name, shown in (
            ("score", scored),
            ("trainings", trained),
            ("complete %", any(row.complete < 1 for row in self.rows)),
        ):
            if not shown:
                del columns[name]
        for i, heading in enumerate(columns):
            view.add_column(heading, justify="right" if i else "left", no_wrap=i == 0)
        for row in self._ranked():
            view.add_row(*(escape(cell(row)) for cell in columns.values()))
        return view

    def _ranked(self) -> list[Row]:
        """The best mean first, those who have none last."""
        sign = -1.0 if METRICS[self.metric].larger else 1.0
        return sorted(self.rows, key=lambda r: (math.isnan(r.mean.value), sign * r.mean.value))

    # ------------------------------------------------------------------ pictures and files

    def draw_intervals(self, path: str | Path) -> None:
        """Each policy's mean, and how much better it is than the baseline, with their intervals, as PNG."""
        import matplotlib
        from matplotlib.figure import Figure

        from baselines.plots import _STYLE, _save

        rows = self._ranked()[::-1]
        colours = self._colours()
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(9.0, 1.1 + 0.32 * len(rows)), layout="constrained")
            left, right = figure.subplots(1, 2, sharey=True)
            for y, row in enumerate(rows):
                for axes, found in ((left, row.mean), (right, row.difference)):
                    if math.isnan(found.value):
                        continue
                    axes.plot(found.value, y, "o", color=colours[row.policy])
                    if not math.isnan(found.low):
                        axes.plot((found.low, found.high), (y, y), color=colours[row.policy])
            left.set_yticks(range(len(rows)), [row.policy for row in rows])
            left.set_ylim(-0.6, len(rows) - 0.4)
            left.set_xlabel(self._what)
            right.axvline(0.0, color="#888888", linewidth=0.8, zorder=0)
            right.set_xlabel(f"better than {self.baseline} by")
            figure.suptitle(
                f"{self.episodes.scenario.name}, {len(self.episodes)} episodes", x=0.01, ha="left"
            )
            _save(figure, Path(path))

    def draw_profile(self, path: str | Path) -> None:
        """Performance profiles as PNG: the share of episodes in which a policy improves on vLLM V1 by more
        than so many percent of its mean. One that lies above another is better everywhere."""
        import matplotlib
        from matplotlib.figure import Figure

        from baselines.plots import _STYLE, _save

        sign = 1.0 if METRICS[self.metric].larger else -1.0
        vllm = self._valid(self.vllm_v1)
        name = METRICS[self.metric].name
        percent = float(abs(statistics.mean(vllm))) / 100
        scale, unit = (percent, f"% of its {name}") if percent > 0 else (1.0, name)
        gains = {label: sign * (self.values(label) - vllm) / scale for label in self.found}
        known = np.concatenate([gain[~np.isnan(gain)] for gain in gains.values()])
        low, high = (known.min(), known.max()) if len(known) else (-1.0, 1.0)
        if percent > 0:  # worse than -100 % lies outside, lest all others fall together
            low = min(max(low, -100.0), high)
        margin = 0.02 * (high - low) or 1.0
        thresholds = np.linspace(low - margin, high + margin, 200)
        colours = self._colours()
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(6.5, 3.6), layout="constrained")
            axes = figure.subplots()
            for label, gain in gains.items():
                line, under, over = self.bootstrap.bands(statistics.performance_profile(thresholds), gain)
                axes.plot(thresholds, line, color=colours[label], label=label)
                axes.fill_between(thresholds, under, over, color=colours[label], alpha=0.15, linewidth=0)
            axes.set_xlabel(f"improvement on vLLM V1 ({unit})")
            axes.set_ylabel("share of episodes above it")
            axes.set_ylim(-0.02, 1.02)
            axes.set_title(f"{self.episodes.scenario.name}, {len(self.episodes)} episodes", loc="left")
            figure.legend(loc="outside right upper")
            _save(figure, Path(path))

    def _colours(self) -> dict[str, str]:
        from baselines.plots import COLOURS

        return dict(zip(self.found, itertools.cycle(COLOURS), strict=False))

    def save(self, folder: str | Path) -> list[Path]:
        """Write episodes.csv, comparison.json, intervals.png and profile.png into `folder`: all, or none.

        Raises:
            InputError: the folder cannot be made or written.
        """
        return _write(
            folder,
            {
                "episodes.csv": lambda path: self.to_frame().to_csv(path, index=False),
                "comparison.json": lambda path: _write_json(path, self.to_dict()),
                "intervals.png": self.draw_intervals,
                "profile.png": self.draw_profile,
            },
        )


def compare(
    policies: Mapping[str, Any] | Iterable[Any],
    scenario: Any = "azure-conv",
    num_episodes: int = 32,
    *,
    seed: int = FIRST_SEED,
    metric: str = "latency_s",
    baseline: str | None = None,
    env_id: str = "llmsched/Decision-v0",
    bootstrap: Bootstrap = Bootstrap(),
    progress: Callable[[int], None] = lambda n: None,
    **options: Any,
) -> Comparison:
    """Let policies play the same episodes.

    Args:
        policies: what `resolve` takes, each once, or such by label.
        scenario: its name, its YAML file, or a `Scenario`.
        num_episodes, seed: episode i is the first of an environment after `reset(seed=seed + i)`.
        metric: of `METRICS`.
        baseline: the label that differences are to; by default vllm-v1 if it is among them, else the first.
        env_id: the environment of policies that have none of their own.
        bootstrap: how intervals are made.
        progress: called with the number of trainings that have played, after each.
        options: settings of the scenario, such as load=0.9, which hold for all; and options of the
            environment, for policies that have none of their own: but for schedulers `length_info`, what
            they are told of lengths, and for all `max_steps`, after which those who act are cut.

    Raises:
        InputError: what is no policy, two of a label, an unknown scenario, metric, baseline or option, or
            one that does not fit; a policy that cannot play the scenario.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    for name, value, least in (("num_episodes", num_episodes, 1), ("seed", seed, 0)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} must be a whole number from {least}, not {value!r}")
    contenders = _resolved(policies)
    labels = [policy.label for policy in contenders]
    if baseline is None:
        baseline = VLLM if VLLM in labels else labels[0]
    elif baseline not in labels:
        raise unknown("baseline", baseline, labels)
    episodes = Episodes.of(
        scenarios.get(scenario), range(int(seed), int(seed) + int(num_episodes)), metric, env_id, options
    )
    done = 0
    found: dict[str, Metrics] = {}
    for policy in contenders:
        trainings = []
        for member in policy.members:
            try:
                trainings.append(member.play(episodes))
            except InputError as error:
                raise InputError(f"policy {policy.label}: {error}") from None
            progress(done := done + 1)
        found[policy.label] = _stacked(trainings)
    vllm = _stacked([Scheduled(baselines.get(VLLM)).play(episodes)])
    return Comparison(episodes, found, vllm, baseline, bootstrap)


def _resolved(policies: Mapping[str, Any] | Iterable[Any]) -> list[Policy]:
    if isinstance(policies, str):
        raise InputError(f"give a list of policies, such as [{policies!r}]")
    if isinstance(policies, Mapping):
        found = [resolve(spec, label) for label, spec in policies.items()]
    else:
        found = [resolve(spec) for spec in policies]
    labels = [policy.label for policy in found]
    if not labels:
        raise InputError("there are no policies to compare; give one at least")
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"two policies are called {label!r}; give them labels, as in {label}-2=...")
    return found


def _stacked(trainings: Sequence[Metrics]) -> Metrics:
    return {name: np.stack([found[name] for found in trainings]) for name in trainings[0]}


# ---------------------------------------------------------------------- over conditions


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """What policies came to under several conditions.

    Attributes:
        comparisons: by condition, such as "azure-conv, load=0.8".
    """

    comparisons: Mapping[str, Comparison]

    @property
    def metric(self) -> str:
        """Its name."""
        return next(iter(self.comparisons.values())).metric

    def to_frame(self) -> pd.DataFrame:
        """A row for each condition and policy: the mean of the metric, its improvement over vLLM V1 in
        percent, the score, each with the ends of its interval, and the shares finished and complete."""
        import pandas as pd

        rows = []
        for condition, found in self.comparisons.items():
            for r in found.rows:
                row: dict[str, Any] = {"condition": condition, "policy": r.policy, "trainings": r.trainings}
                for name in ("mean", "improvement", "score"):
                    estimate = getattr(r, name)
                    row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
                rows.append(row | {"finished": r.finished, "complete": r.complete})
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: `Comparison.to_dict` by condition."""
        return {"conditions": {name: found.to_dict() for name, found in self.comparisons.items()}}

    def table(self) -> Table:
        """For a terminal: policies by conditions, improvements over vLLM V1 in percent with intervals."""
        from rich.markup import escape
        from rich.table import Table

        first = next(iter(self.comparisons.values()))
        view = Table(
            title=f"improvement over vLLM V1 in {METRICS[self.metric].what}, %; "
            f"{len(first.episodes)} episodes from seed {first.episodes.seeds.start}, "
            f"{100 * first.bootstrap.level:g} % intervals",
            caption="(n): only n % of its episodes were played to their end, of which the figure is",
            title_justify="left",
            caption_justify="left",
        )
        view.add_column("condition", no_wrap=True)
        for label in first.found:
            view.add_column(escape(label), justify="right")
        for condition, found in self.comparisons.items():
            cells = [
                _text(r.improvement, "{:+.1f}") + (f" ({100 * r.complete:.0f})" if r.complete < 1 else "")
                for r in found.rows
            ]
            view.add_row(*map(escape, (condition, *cells)))
        return view

    def save(self, folder: str | Path) -> list[Path]:
        """Write matrix.csv and matrix.json into `folder`: both, or none.

        Raises:
            InputError: the folder cannot be made or written.
        """
        return _write(
            folder,
            {
                "matrix.csv": lambda path: self.to_frame().to_csv(path, index=False),
                "matrix.json": lambda path: _write_json(path, self.to_dict()),
            },
        )


def matrix(
    policies: Mapping[str, Any] | Iterable[Any],
    scenarios: Sequence[Any],
    grid: Mapping[str, Sequence[Any]] | None = None,
    num_episodes: int = 32,
    *,
    progress: Callable[[int], None] = lambda n: None,
    **options: Any,
) -> Matrix:
    """`compare` on each scenario under each combination of settings: how well what was trained on one holds
    on others.

    Args:
        scenarios: as `compare` takes them, each once.
        grid: values by setting of the scenarios: loads ("load"), GPUs ("profile"), how wrong predictions of
            lengths are ("prediction": "oracle", "lognormal:0.5", ...), or any other option of `compare`.
        progress: as in `compare`, counted over all conditions.
        options: as in `compare`, for all.

    Raises:
        InputError: as `compare`, and what leaves no condition, or gives one twice.
    """
    contenders = _resolved(policies)
    varied = dict(grid or {})
    for name, values in varied.items():
        if name in options:
            raise InputError(f"{name} is given for all conditions and varied among them; give one of the two")
        if not isinstance(values, list | tuple) or not values:
            raise InputError(f"{name} is varied over a list of values, not {values!r}")
    found: dict[str, Comparison] = {}
    done = 0
    for scenario in scenarios:
        for values in itertools.product(*varied.values()):
            settings = dict(zip(varied, values, strict=True))
            parts = [str(getattr(scenario, "name", scenario))]
            parts += [f"{name}={getattr(value, 'name', value)}" for name, value in settings.items()]
            condition = ", ".join(parts)
            if condition in found:
                raise InputError(f"the condition {condition} is given twice")
            found[condition] = compare(
                contenders,
                scenario,
                num_episodes,
                progress=_after(progress, done),
                **settings,
                **options,
            )
            done += sum(len(policy.members) for policy in contenders)
    if not found:
        raise InputError("there is no scenario to compare on; give one at least")
    return Matrix(found)


def _after(progress: Callable[[int], None], before: int) -> Callable[[int], None]:
    """Progress that goes on from there."""
    return lambda n: progress(before + n)


# ---------------------------------------------------------------------- writing


def _text(found: Estimate, form: str = "{:.4g}") -> str:
    """A value and its interval."""
    if math.isnan(found.value):
        return "-"
    if math.isnan(found.low):
        return form.format(found.value)
    return f"{form.format(found.value)} [{form.format(found.low)}, {form.format(found.high)}]"


def _plain(value: Any) -> Any:
    """nan, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write(folder: str | Path, writers: Mapping[str, Callable[[Path], object]]) -> list[Path]:
    """Files of these names: all, or none."""
    folder = Path(folder)
    require_writable_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for name, write in writers.items():
            write(stack.enter_context(writing(folder / name)))
    return [folder / name for name in writers]
