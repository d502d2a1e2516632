"""A whole run as a file: `gantt` (a picture for a paper) and `chrome_trace` (for Perfetto and Chrome)."""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.run import SWAPPED_OUT
from llmsched_env.envs.page import Painter
from llmsched_env.envs.picture import Picture, stretches
from llmsched_env.envs.scene import Kind, Scene
from llmsched_env.errors import InputError, unknown
from llmsched_env.files import require_writable_file, writing

if TYPE_CHECKING:
    from llmsched_env.simulation import Result

_FORMATS = ("png", "pdf", "svg")
_LANES_FIT = 48  # requests that have a lane each in a picture of a run


def gantt(
    source: Scene | Result,
    path: str | Path,
    *,
    width: float = 7.2,
    height: float | None = None,
    dpi: float = 200.0,
    title: str | None = None,
    between: tuple[float, float] | None = None,
) -> None:
    """Write a picture of a run: who computed when, KV cache and queue, over time.

    Args:
        source: a scene, or a result that was simulated with record="schedule".
        path: a file; its suffix says which: .png, .pdf or .svg. The same run gives the same bytes.
        width: inches; the full text width of most papers by default.
        height: inches; by default as much as the lanes need.
        dpi: pixels of an inch in a PNG.
        title: a line above; by default scheduler and profile. "": none.
        between: seconds from and to which it is shown; by default all.

    Raises:
        InputError: if the file cannot be written, the run has no schedule or the times are none.
    """
    path = Path(path)
    kind = path.suffix[1:].lower()
    if kind not in _FORMATS:
        raise unknown("picture format", kind, _FORMATS)
    if between is not None and not (all(map(math.isfinite, between)) and between[0] < between[1]):
        raise InputError(f"between must be two times in seconds, the earlier first, not {between!r}")
    scene = Scene.of(source, title)
    require_writable_file(path)
    high = _height(scene) if height is None else height
    if not (width >= 2.5 and high >= 1.5 and dpi > 0):
        raise InputError(f"a picture of {width:g} x {high:g} inches is too small; make it 2.5 x 1.5 at least")
    page = Picture(scene, 72 * width, 72 * high, live=False, between=between).page
    painter = Painter(page.width, page.height)
    painter.set(page)
    # Fonts as text, as publishers ask for; nothing that differs from run to run.
    settings: dict[str, Any] = {"pdf.fonttype": 42, "svg.hashsalt": "llmsched", "svg.fonttype": "path"}
    stamps: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    drawn = io.BytesIO()
    with matplotlib.rc_context(settings):
        painter.figure.savefig(drawn, format=kind, dpi=dpi, metadata=stamps.get(kind))
    with writing(path) as temporary:
        temporary.write_bytes(drawn.getbuffer())


def _height(scene: Scene) -> float:
    """Inches that the lanes of a whole run need."""
    n = len(scene.workload)
    if n <= _LANES_FIT:
        lanes = max(9.0 * n, 60.0)
    else:
        lanes = min(max(9.0 * scene.story.lanes, 60.0), 360.0)
    return (lanes + 190.0) / 72


# ---------------------------------------------------------------------- traces

_ENGINE = 1  # the process
_ITERATIONS, _ARRIVALS, _FIRST_THREAD = 0, 1, 2
_EACH = 200  # requests that have a thread each by default


def chrome_trace(source: Scene | Result, path: str | Path, *, threads: str = "auto") -> None:
    """Write a run as a trace in the JSON format of Chrome, which ui.perfetto.dev and chrome://tracing show.

    The engine is a process with a thread for each request (or running slot) and one of iterations. Prefill
    chunks and stretches of decoding are complete events with their tokens; arrivals, first tokens,
    preemptions, returns and finishes are instants; KV tokens, queue and batch are counters. Times are
    microseconds.

    Args:
        source: a scene, or a result that was simulated with record="schedule".
        path: a file; .gz compresses it (Perfetto reads that too).
        threads: "request", "slot", or "auto": requests, if there are at most 200.

    Raises:
        InputError: if the file cannot be written or the run has no schedule.
    """
    if threads not in ("auto", "request", "slot"):
        raise unknown("threads", threads, ("auto", "request", "slot"))
    scene = Scene.of(source)
    require_writable_file(path)
    each = threads == "request" or (threads == "auto" and len(scene.workload) <= _EACH)
    events = _Trace(scene, each).events()
    zipped = Path(path).suffix == ".gz"
    with writing(path) as temporary, open(temporary, "wb") as raw, ExitStack() as stack:
        packed: Any = raw
        if zipped:  # without name and time, so that the same run gives the same bytes
            packed = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
        with io.TextIOWrapper(packed, encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [')
            for k, event in enumerate(events):
                file.write(",\n" if k else "\n")
                file.write(json.dumps(event, ensure_ascii=False, allow_nan=False))
            file.write("\n]}\n")


class _Trace:
    """The events of a scene."""

    def __init__(self, scene: Scene, each: bool) -> None:
        self.scene, self.story, self.each = scene, scene.story, each
        self.start = scene.rows["start_s"].astype(float)
        self.end = scene.rows["end_s"].astype(float)
        self.found: list[tuple[float, dict[str, Any]]] = []

    def events(self) -> Iterator[dict[str, Any]]:
        """Names first, then everything in order of time."""
        yield from self._names()
        self._iterations()
        self._computed()
        self._instants()
        self._counters()
        self.found.sort(key=lambda item: item[0])
        for _, event in self.found:
            yield event

    def _thread(self, r: int) -> int:
        return _FIRST_THREAD + (r if self.each else int(self.story.lane[r]))

    def _names(self) -> Iterator[dict[str, Any]]:
        scene = self.scene
        yield _name("process_name", 0, "engine: " + scene.title if scene.title else "engine")
        threads = {_ITERATIONS: "iterations", _ARRIVALS: "arrivals"}
        if self.each:
            threads |= {
                _FIRST_THREAD + r: f"request {scene.workload.name(r)}" for r in range(len(scene.workload))
            }
        else:
            threads |= {_FIRST_THREAD + k: f"slot {k}" for k in range(self.story.lanes)}
        for thread, name in threads.items():
            yield _name("thread_name", thread, name)
            yield {**_name("thread_sort_index", thread, ""), "args": {"sort_index": thread}}

    def _add(self, phase: str, name: str, category: str, at: float, thread: int, **more: Any) -> None:
        event: dict[str, Any] = {
            "ph": phase,
            "name": name,
            "cat": category,
            "ts": _micro(at),
            "pid": _ENGINE,
            "tid": thread,
        }
        self.found.append((event["ts"], event | more))

    def _complete(self, name: str, category: str, a: float, b: float, thread: int, **args: Any) -> None:
        length = round(_micro(b) - _micro(a), 3)
        self._add("X", name, category, a, thread, dur=length, args=args)

    def _iterations(self) -> None:
        rows = self.scene.rows
        columns = [rows[name].tolist() for name in ("prefill_tokens", "decode_requests", "preempted")]
        spans = zip(self.start.tolist(), self.end.tolist(), *columns, strict=True)
        for j, (a, b, prefill, decodes, preempted) in enumerate(spans):
            args = {"iteration": j, "prefill_tokens": prefill, "decodes": decodes, "preempted": preempted}
            self._complete("iteration", "iteration", a, b, _ITERATIONS, **args)

    def _computed(self) -> None:
        """Chunks one by one, decodes and what was computed in vain in stretches."""
        scene, kind = self.scene, self.story.kind
        row = self._row()
        requests, tokens = scene.requests[: len(row)], scene.tokens[: len(row)]
        for k in np.flatnonzero(kind == Kind.PREFILL):
            r, j = int(requests[k]), int(row[k])
            done = int(self.story.computed[k])
            self._complete(
                self._called("prefill", r), "prefill", self.start[j], self.end[j], self._thread(r),
                request=scene.workload.name(r), tokens=int(tokens[k]), cached=done - int(tokens[k]),
            )  # fmt: skip
        for which, name in ((Kind.DECODE, "decode"), (Kind.WASTED, "wasted")):
            own = kind == which
            runs = stretches(requests[own], row[own], self.start, self.end)
            for r, first, last in zip(*(column.tolist() for column in runs), strict=True):
                self._complete(
                    self._called(name, r), name, self.start[first], self.end[last], self._thread(r),
                    request=scene.workload.name(r), tokens=last - first + 1, first_iteration=first,
                )  # fmt: skip

    def _called(self, what: str, r: int) -> str:
        return what if self.each else f"{self.scene.workload.name(r)} {what}"

    def _row(self) -> NDArray[np.int64]:
        """The iteration of each decision."""
        return np.repeat(np.arange(len(self.start)), np.diff(self.scene.rows["entries"], prepend=0))

    def _instants(self) -> None:
        scene, story = self.scene, self.story
        for r, at in enumerate(scene.workload.arrival_s.tolist()):
            if at <= scene.now:
                self._instant("arrival", at, _FIRST_THREAD + r if self.each else _ARRIVALS, r)
        for name, times in (("first token", story.first_token_s), ("finish", scene.finish_s)):
            for r in np.flatnonzero(~np.isnan(times)):
                self._instant(name, float(times[r]), self._thread(int(r)), int(r))
        row = self._row()
        swapped = scene.tokens[: len(row)] == SWAPPED_OUT
        to_cpu = set(zip(scene.requests[: len(row)][swapped].tolist(), row[swapped].tolist(), strict=True))
        for r, out, back in story.pauses.tolist():
            swap = (r, out) in to_cpu
            self._instant("swapped out" if swap else "preempted", float(self.start[out]), self._thread(r), r)
            if back >= 0:
                name = "swapped in" if swap else "resumed"
                self._instant(name, float(self.start[back]), self._thread(r), r)

    def _instant(self, name: str, at: float, thread: int, r: int) -> None:
        self._add("i", name, "request", at, thread, s="t", args={"request": self.scene.workload.name(r)})

    def _counters(self) -> None:
        scene, rows = self.scene, self.scene.rows
        held, kept = rows["kv_tokens"].tolist(), self.story.kv_after.tolist()
        prefill, decodes = rows["prefill_tokens"].tolist(), rows["decode_requests"].tolist()
        for j, (a, b) in enumerate(zip(self.start.tolist(), self.end.tolist(), strict=True)):
            self._counter("KV tokens", a, tokens=held[j])
            self._counter("batch tokens", a, prefill=prefill[j], decode=decodes[j])
            if j + 1 == len(self.start) or self.start[j + 1] > b:  # idle
                self._counter("KV tokens", b, tokens=kept[j])
                self._counter("batch tokens", b, prefill=0, decode=0)
        arrival = scene.workload.arrival_s
        times = np.unique(np.concatenate([self.start, arrival[arrival <= scene.now]]))
        for at, waiting in zip(times.tolist(), scene.waiting_at(times).tolist(), strict=True):
            self._counter("queue length", at, waiting=waiting)

    def _counter(self, name: str, at: float, **values: int) -> None:
        self._add("C", name, "engine", at, 0, args=values)


def _name(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": _ENGINE, "tid": thread, "args": {"name": name}}


def _micro(seconds: float) -> float:
    return round(1e6 * seconds, 3)


__all__ = ["chrome_trace", "gantt"]
