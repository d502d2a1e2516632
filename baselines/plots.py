"""Pictures of benchmarks and cost profiles, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from numpy.typing import NDArray

    from baselines.bench import Suite
    from baselines.stability import Verdict
    from llmsched_env.profiles import Profile

# Ten colours that stay apart for most colour-blind readers (Paul Tol's muted scheme and black).
COLOURS = (
    "#332288",
    "#CC6677",
    "#117733",
    "#DDAA33",
    "#88CCEE",
    "#882255",
    "#44AA99",
    "#999933",
    "#AA4499",
    "#000000",
)
MARKERS = "osD^vP*Xp<"
OTHERS = "#BBBBBB"

CUT = 30
"""Pictures leave out what is more than so many times worse than the best, lest all others fall together."""

# Metric: label, and what its seconds are multiplied with.
_PANELS: dict[str, tuple[str, int]] = {
    "latency_mean": ("mean latency (s)", 1),
    "ttft_p99": ("99th percentile of TTFT (s)", 1),
    "tpot_p99": ("99th percentile of TPOT (ms)", 1000),
}

_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "savefig.dpi": 200,
}


def latency(suite: Suite, summary: pd.DataFrame, path: Path) -> None:
    """Mean latency, p99 TTFT and p99 TPOT against load, a row for each case; bands are 95 % intervals.

    Panels are cut at `CUT` times the best scheduler's value; who turned requests away is left out.
    """
    summary = summary[summary["finished"] == suite.num_requests]
    with matplotlib.rc_context(_STYLE):
        rows = len(suite.cases)
        figure = Figure(figsize=(10.5, 0.4 + 2.9 * rows), layout="constrained")
        grid = figure.subplots(rows, len(_PANELS), squeeze=False)
        looks = _looks(suite)
        for axes, (workload, profile) in zip(grid, suite.cases, strict=True):
            axes[0].set_title(f"{workload} on {profile}", loc="left")
            case = summary.query("workload == @workload and profile == @profile")
            if case.empty:
                continue
            for ax, (metric, (label, scale)) in zip(axes, _PANELS.items(), strict=True):
                for name, look in looks.items():
                    line = case[case["scheduler"] == name].sort_values("load")
                    x, y, half = line["load"], scale * line[metric], scale * line[f"{metric}_ci"]
                    ax.plot(x, y, **look)
                    if look["label"]:
                        # A band that reaches below zero has no place on a logarithmic axis.
                        low = np.maximum(y - half, y / 10)
                        ax.fill_between(x, low, y + half, color=look["color"], alpha=0.15, linewidth=0)
                ax.set_yscale("log")
                highest = CUT * scale * case.groupby("load")[metric].min().max()
                if highest < ax.get_ylim()[1]:
                    ax.set_ylim(top=highest)
                _plain_ticks(ax.yaxis)
                ax.set_xlabel("offered load (share of capacity)")
                ax.set_ylabel(label)
        _legend(figure, grid.ravel())
        _save(figure, path)


def frontier(suite: Suite, summary: pd.DataFrame, path: Path) -> None:
    """p99 TTFT against p99 TPOT of each scheduler at the suite's table load; the line joins the best.

    Schedulers beyond `CUT` times the best are named below the picture; who turned requests away is left out.
    """
    summary = summary[summary["finished"] == suite.num_requests]
    (ttft, (ttft_label, _)), (tpot, (tpot_label, ms)) = list(_PANELS.items())[1:]
    with matplotlib.rc_context(_STYLE):
        columns = min(len(suite.cases), 2)
        rows = -(-len(suite.cases) // columns)
        figure = Figure(figsize=(2.0 + 4.6 * columns, 0.4 + 3.8 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in grid[len(suite.cases) :]:
            ax.set_visible(False)
        looks = _looks(suite)
        for ax, (workload, profile) in zip(grid, suite.cases, strict=False):
            case = summary.query(
                "workload == @workload and profile == @profile and load == @suite.table_load"
            )
            case = case.set_index("scheduler").dropna(subset=[tpot, ttft])
            ax.set_title(f"{workload} on {profile}, load {suite.table_load:g}", loc="left")
            if case.empty:
                continue
            beyond = case.index[(case[ttft] > CUT * case[ttft].min()) | (case[tpot] > CUT * case[tpot].min())]
            if len(beyond) == len(case):
                beyond = beyond[:0]
            for name, look in looks.items():
                if name in case.index and name not in beyond:
                    row = case.loc[name]
                    bars = (
                        {"xerr": ms * row[f"{tpot}_ci"], "yerr": row[f"{ttft}_ci"]} if look["label"] else {}
                    )
                    ax.errorbar(ms * row[tpot], row[ttft], **(look | bars), elinewidth=0.8, linestyle="none")
            near = case.drop(index=beyond)
            best = pareto(list(zip(ms * near[tpot], near[ttft], strict=True)))
            ax.step(*zip(*best, strict=True), where="post", color=OTHERS, linewidth=1.0, zorder=0)
            ax.set_xscale("log")
            ax.set_yscale("log")
            _plain_ticks(ax.xaxis)
            _plain_ticks(ax.yaxis)
            ax.set_xlabel(tpot_label)
            ax.set_ylabel(ttft_label)
            away = [
                f"{name} ({ms * case[tpot][name]:,.0f} ms, {case[ttft][name]:,.0f} s)"
                for name in beyond
                if looks[name]["label"]
            ]
            if len(away) < len(beyond):
                away.append(f"{len(beyond) - len(away)} others")
            if away:
                note = textwrap.fill("Outside: " + ", ".join(away), 80)
                below = {"xycoords": "axes fraction", "xytext": (0, -34), "textcoords": "offset points"}
                ax.annotate(note, (0, 0), va="top", fontsize=7, **below)
        _legend(figure, grid)
        _save(figure, path)


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates (smaller is better), by the first."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def profile(profile: Profile, path: Path) -> None:
    """Iteration time over load: of decode batches by their size and context, and of prefill by its tokens."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        decode, prefill = figure.subplots(1, 2)

        batch = np.arange(1.0, 513.0)
        for context, colour in zip((256, 1024, 4096, 16384), COLOURS, strict=False):
            size = batch[batch * context <= (profile.kv_tokens or np.inf)]
            zero = np.zeros_like(size)
            seconds = profile.time(zero, zero, zero, zero, size, size * context)
            decode.plot(size, 1000 * seconds, color=colour, label=f"{context:,} tokens of context")
        decode.set_xlabel("requests that decode")
        decode.set_title("decode, until the KV cache is full", loc="left")

        tokens = np.arange(1.0, 8193.0)
        for cached, colour in zip((0, 4096, 16384), COLOURS, strict=False):
            zero, one = np.zeros_like(tokens), np.ones_like(tokens)
            seconds = profile.time(tokens, one, tokens * (cached + tokens / 2), cached * one, zero, zero)
            prefill.plot(tokens, 1000 * seconds, color=colour, label=f"{cached:,} tokens cached before")
        prefill.set_xlabel("prompt tokens in one chunk")
        prefill.set_title("prefill of one request", loc="left")

        for ax in (decode, prefill):
            ax.set_ylabel("iteration time (ms)")
            ax.set_xlim(left=0)
            ax.set_ylim(bottom=0)
            ax.legend()
        figure.suptitle(profile.name, x=0.01, ha="left")
        _save(figure, path)


def measurement(
    fits: Mapping[str, Profile],
    chosen: str,
    measured: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    path: Path,
) -> None:
    """Fits of several forms to measured iterations: measured against fitted, how large the errors are, and
    iteration time over tokens.

    Args:
        fits: profiles by form; `chosen` is one of them.
        measured: by part, "grid" that was fitted and "held-out" that was not, features (n, 6) in the order of
            `core.cost` and seconds (n,).
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12.5, 3.8), layout="constrained")
        against, errors, tokens = figure.subplots(1, 3)
        profile = fits[chosen]

        ends: list[float] = []
        for (part, (features, seconds)), colour, marker in zip(
            measured.items(), COLOURS, MARKERS, strict=False
        ):
            fitted = profile.time(*features.T)
            against.plot(
                1000 * seconds, 1000 * fitted, marker, color=colour, alpha=0.6, markersize=3.5, label=part
            )
            ends += [*(1000 * seconds), *(1000 * fitted)]
        against.plot([min(ends), max(ends)], [min(ends), max(ends)], color=OTHERS, zorder=0)
        against.set_xscale("log")
        against.set_yscale("log")
        _plain_ticks(against.xaxis)
        _plain_ticks(against.yaxis)
        against.set_xlabel("measured (ms)")
        against.set_ylabel(f"{chosen} (ms)")
        against.set_title("iterations", loc="left")

        features, seconds = measured["held-out"]
        mixes = (features[:, 0] > 0) & (features[:, 4] > 0)
        for (form, fit), colour in zip(fits.items(), COLOURS, strict=False):
            sizes = np.sort(100 * np.abs(fit.time(*features[mixes].T) / seconds[mixes] - 1))
            share = np.arange(1, len(sizes) + 1) / len(sizes)
            errors.step(sizes, share, where="post", color=colour, label=form)
        errors.set_xscale("symlog", linthresh=1)
        errors.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        errors.set_xlim(left=0)
        errors.set_ylim(0, 1.02)
        errors.set_xlabel("size of the error (%)")
        errors.set_ylabel("share of the held-out mixes")
        errors.set_title("forms", loc="left")

        features, seconds = measured["grid"]
        alone = (features[:, 1] == 1) & (features[:, 3] == 0) & (features[:, 4] == 0)
        decodes = features[:, 0] == 0
        context = np.where(decodes, features[:, 5] / np.maximum(features[:, 4], 1), np.nan)
        seen = np.unique(context[decodes])
        cases = [(alone, "a prompt")]
        cases += [(context == c, f"decodes that read {c:,.0f}") for c in (seen[0], seen[-1])[: len(seen)]]
        for (rows, label), colour, marker in zip(cases, COLOURS, MARKERS, strict=False):
            order = np.argsort(features[rows, 0] + features[rows, 4])
            found = features[rows][order]
            size = found[:, 0] + found[:, 4]
            tokens.plot(size, 1000 * seconds[rows][order], marker, color=colour, label=label)
            tokens.plot(size, 1000 * profile.time(*found.T), color=colour, linewidth=1.0)
        tokens.set_xscale("log")
        tokens.set_yscale("log")
        _plain_ticks(tokens.xaxis)
        _plain_ticks(tokens.yaxis)
        tokens.set_xlabel("tokens of the iteration")
        tokens.set_ylabel("time (ms)")
        tokens.set_title(f"measured, and {chosen} (lines)", loc="left")

        for ax in (against, errors, tokens):
            ax.legend()
        figure.suptitle(f"{profile.name}: {profile.model} on {profile.gpu}", x=0.01, ha="left")
        _save(figure, path)


VERDICTS = {"stable": COLOURS[2], "unstable": COLOURS[1], "undecided": OTHERS}
"""The colours of verdicts on stability."""


def backlog(tests: Mapping[str, Sequence[Verdict]], path: Path) -> None:
    """Backlog over time, a panel for each scheduler: a thick line for the mean of each rate, thin ones for
    its seeds, coloured by the verdict. Of many rates the ones next to where it becomes unstable, and the
    outermost.

    Args:
        tests: by label, each at one rate or several.
    """
    with matplotlib.rc_context(_STYLE):
        columns = min(len(tests), 3)
        rows = -(-len(tests) // columns)
        figure = Figure(figsize=(1.0 + 3.6 * columns, 0.4 + 2.8 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in grid[len(tests) :]:
            ax.set_visible(False)
        for ax, (name, some) in zip(grid, tests.items(), strict=False):
            ax.set_title(name, loc="left")
            for one in _telling(some):
                colour = VERDICTS[one.verdict]
                for run in one.runs:
                    ax.plot(run.time_s, run.tokens, color=colour, alpha=0.2, linewidth=0.5)
                tokens = np.mean([run.tokens for run in one.runs], axis=0)
                time = np.mean([run.time_s for run in one.runs], axis=0)
                ax.plot(time, tokens, color=colour, label=one.verdict)
                ax.annotate(f"{one.load:.3f}", (time[-1], tokens[-1]), fontsize=7, color=colour)
            ax.set_xlim(left=0)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,g}"))
            ax.set_ylim(bottom=0)
            ax.set_xlabel("time (s)")
            ax.set_ylabel("backlog (thousand tokens)")
        figure.suptitle("figures at the lines: load, the rate as a share of the limit", fontsize=8)
        _legend(figure, grid)
        _save(figure, path)


def _telling(tests: Sequence[Verdict]) -> list[Verdict]:
    """Up to four of the tests, by rate."""
    ordered = sorted(tests, key=lambda one: one.rate)
    if len(ordered) <= 4:
        return ordered
    stable = [one for one in ordered if one.verdict == "stable"][-1:]
    unstable = [one for one in ordered if one.verdict == "unstable"][:1]
    kept = [ordered[0], *stable, *unstable, ordered[-1]]
    return [one for one in ordered if any(one is other for other in kept)]


def drift(tests: Mapping[str, Sequence[Verdict]], path: Path) -> None:
    """Drift of the backlog over load, a line for each scheduler, with intervals.

    Args:
        tests: by label, each at one rate or several.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 4.0), layout="constrained")
        ax = figure.subplots()
        lowest = -0.3
        for i, (name, some) in enumerate(tests.items()):
            points = sorted(some, key=lambda one: one.rate)
            load = [one.load for one in points]
            share, low, high = (
                100 * np.array([getattr(one.drift, key) / one.offered for one in points])
                for key in ("value", "low", "high")
            )
            look: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKERS[i % len(MARKERS)],
                "label": name,
            }
            ax.errorbar(load, share, yerr=np.stack([share - low, high - share]), **look, elinewidth=0.8)
        bottom, top = ax.get_ylim()
        ax.set_ylim(max(bottom, 100 * lowest), top)  # far below the limit a backlog is gone at once
        ax.axhline(0, color="black", linewidth=0.8)
        ax.axvline(1, color=OTHERS, linewidth=0.8, linestyle="--")
        ax.set_xlabel("load (rate as a share of the limit)")
        ax.set_ylabel("drift of the backlog (% of what arrives)")
        ax.legend()
        _save(figure, path)


def _looks(suite: Suite) -> dict[str, dict[str, Any]]:
    """How each scheduler is drawn: up to ten, or those of the quick suite, its own way, others in grey."""
    from baselines.bench import BASELINE, QUICK

    named = [name for name in suite.schedulers if len(suite.schedulers) <= len(COLOURS) or name in QUICK]
    looks: dict[str, dict[str, Any]] = {}
    for name in suite.schedulers:
        if name not in named:
            looks[name] = {"color": OTHERS, "marker": ".", "linewidth": 0.7, "zorder": 1, "label": None}
    for i, name in enumerate(named):
        above = 3 if name == BASELINE else 2
        looks[name] = {"color": COLOURS[i], "marker": MARKERS[i], "zorder": above, "label": name}
    return looks


def _save(figure: Figure, path: Path) -> None:
    """As a PNG with a palette of 256 colours, a third of the size."""
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png")
    Image.open(pixels).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


def _plain_ticks(axis: Axis) -> None:
    """Numbers such as 0.2, 5 and 100 at 1, 2 and 5 of each decade of a logarithmic axis; more if short."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, each scheduler once."""
    handles: dict[str, Any] = {}
    for ax in panels:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
