"""Iteration times measured on a grid: prefill tokens x decodes x mean context of a decode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env.errors import InputError
from llmsched_env.profiles import columns

AXES = ("prefill_tokens", "decodes", "context")


def read(path: str | Path) -> dict[str, Any]:
    """The parameters of form "table" from a CSV: see `Profile.from_table`."""
    data = columns.read(path, ("prefill_tokens", "decodes", "seconds"), {"context": 0.0})
    axes = [np.unique(data[name]) for name in AXES]
    if 0 in axes[2] and len(axes[2]) > 1 and (data["context"][data["decodes"] > 0] > 0).all():
        axes[2] = axes[2][1:]  # context 0 only stands beside batches without decodes, where it says nothing
    sizes = tuple(map(len, axes))
    samples: dict[tuple[int, ...], list[float]] = {}
    for p, d, context, seconds in zip(*(data[name] for name in (*AXES, "seconds")), strict=True):
        at = (int(np.searchsorted(axes[0], p)), int(np.searchsorted(axes[1], d)))
        contexts = range(sizes[2]) if d == 0 else (int(np.searchsorted(axes[2], context)),)
        for k in contexts:
            samples.setdefault((*at, k), []).append(seconds)
    grid = np.full(sizes, np.nan)
    for index, values in samples.items():
        grid[index] = np.median(values)
    if axes[0][0] == 0 and axes[1][0] == 0 and min(sizes[:2]) > 1:
        # The empty batch is a corner that only interpolation looks at: what remains of the smallest batches.
        grid[0, 0] = np.where(np.isnan(grid[0, 0]), np.fmin(grid[0, 1], grid[1, 0]), grid[0, 0])
    if np.isnan(grid).any():
        i, j, k = np.argwhere(np.isnan(grid))[0]
        point = f"prefill_tokens {axes[0][i]:g}, decodes {axes[1][j]:g}, context {axes[2][k]:g}"
        raise InputError(f"{path} is no full grid: no row with {point}")
    return {**{name: axis.tolist() for name, axis in zip(AXES, axes, strict=True)}, "seconds": grid.tolist()}


def check(profile: str, params: Mapping[str, Any]) -> None:
    """Raises InputError unless `params` are three increasing axes and a positive time at each grid point."""
    axes = []
    for name in AXES:
        axis = _array(profile, name, params[name])
        if axis.ndim != 1 or len(axis) == 0 or not (axis >= 0).all() or not (np.diff(axis) > 0).all():
            raise InputError(f"profile {profile}: {name} must be a list of increasing numbers of at least 0")
        if name != "context" and (axis[0] != 0 or len(axis) < 2):
            other = "decode-only" if name == "prefill_tokens" else "prefill-only"
            raise InputError(f"profile {profile}: {name} must be 0 ({other} batches) and more; measure both")
        axes.append(axis)
    seconds = _array(profile, "seconds", params["seconds"])
    shape = tuple(map(len, axes))
    if seconds.shape != shape:
        raise InputError(f"profile {profile}: seconds has shape {seconds.shape}, but the axes say {shape}")
    if not ((seconds > 0) & np.isfinite(seconds)).all():
        raise InputError(f"profile {profile}: every time in seconds must be positive and finite")


def pack(params: Mapping[str, Any]) -> list[float]:
    """The parameters in the order of `core.cost._table`."""
    axes = [np.asarray(params[name], dtype=np.float64) for name in AXES]
    seconds = np.asarray(params["seconds"], dtype=np.float64)
    return [*map(len, axes), seconds.min(), *np.concatenate(axes), *seconds.ravel()]


def _array(profile: str, name: str, values: Any) -> NDArray[np.float64]:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"profile {profile}: {name} is not a regular array of numbers") from None
