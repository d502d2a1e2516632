"""Pictures of runs on networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from baselines.plots import _STYLE, COLOURS, _save
from llmsched_env.networks import NetworkResult


def backlogs(results: Mapping[str, NetworkResult], path: Path) -> None:
    """Backlog of tokens, of all stations and of each, and jobs in system over time; a line for each run.

    Args:
        results: by label, of one network.
    """
    stations = next(iter(results.values())).stations
    panels = ["all stations", *stations] if len(stations) in (2, 3) else ["all stations"]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(1.2 + 3.6 * (len(panels) + 1), 3.6), layout="constrained")
        axes = figure.subplots(1, len(panels) + 1)
        for (label, result), i in zip(results.items(), range(len(results)), strict=True):
            look = {"color": COLOURS[i % len(COLOURS)], "label": label, "linewidth": 1.1}
            columns = [result.backlog, *(result.backlog_tokens.T if len(panels) > 1 else ())]
            for ax, tokens in zip(axes, columns, strict=False):
                ax.plot(result.time_s, tokens, **look)
            axes[-1].plot(result.time_s, result.jobs_in_system, **look)
        for ax, name in zip(axes, panels, strict=False):
            ax.set_title(f"backlog (tokens), {name}", loc="left")
        axes[-1].set_title("jobs in system", loc="left")
        for ax in axes:
            ax.set_xlabel("time (s)")
            ax.set_ylim(bottom=0)
            ax.set_xlim(0, max(float(np.max(result.time_s)) for result in results.values()))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        _save(figure, path)
