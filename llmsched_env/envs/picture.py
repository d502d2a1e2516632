"""The layout of a picture: lanes of requests, KV cache and queue over one time axis."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from llmsched_env.core.run import SWAPPED_OUT
from llmsched_env.envs.page import Colour, Page, Points, shorten, text_width
from llmsched_env.envs.scene import Kind, Scene, State

# Nine colours that stay apart for most colour-blind readers (Paul Tol's muted scheme), one a request.
COLOURS: tuple[Colour, ...] = tuple(
    to_rgb(name)
    for name in (
        "#332288",
        "#CC6677",
        "#117733",
        "#DDAA33",
        "#88CCEE",
        "#882255",
        "#44AA99",
        "#999933",
        "#AA4499",
    )
)
_INK, _GREY, _FAINT, _WHITE = to_rgb("#222222"), to_rgb("#777777"), to_rgb("#E4E4E4"), to_rgb("#FFFFFF")
_RED, _BLUE, _FOCUS, _SHADE = to_rgb("#CC3311"), to_rgb("#4477AA"), to_rgb("#FFF3C4"), to_rgb("#F4F4F4")


def _tint(colour: Colour, share: float) -> Colour:
    """`colour` mixed with white, of which it keeps `share`."""
    r, g, b = (1 - share + share * c for c in colour)
    return r, g, b


_SOLID = np.array(COLOURS)
_LIGHT = np.array([_tint(c, 0.5) for c in COLOURS])
_GHOST = np.array([_tint(c, 0.14) for c in COLOURS])
_DARK_TEXT = np.array([0.299 * r + 0.587 * g + 0.114 * b > 0.6 for r, g, b in COLOURS])

_TINY, _SMALL, _BODY, _LARGE = 6.5, 7.5, 8.5, 10.5  # font sizes, points
_DECODE, _PREFILL = 0.36, 0.8  # heights of bars, shares of the lane
_WIDEST_LANE = 26.0  # points
_LANES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


# ---------------------------------------------------------------------- the time axis


class _Clock:
    """Time on the x axis, from seconds to points; long idle stretches are cut short.

    Attributes:
        idle: (start, end) in seconds of the stretches that are cut short and begin on the picture.
        first, last: iterations [first, last) are on the picture, in part at least.
        now: points.
    """

    def __init__(
        self,
        scene: Scene,
        left: float,
        right: float,
        *,
        recent: int | None = None,
        between: tuple[float, float] | None = None,
    ) -> None:
        """Map to `left` to `right` points the last `recent` iterations or so, all that has been, or what was
        `between` two times.
        """
        n = len(scene.rows)
        seen = n if recent is None else min(n, 3 * recent)
        start, end = scene.rows["start_s"][n - seen :], scene.rows["end_s"][n - seen :]
        origin = float(min(scene.now, scene.workload.arrival_s[0], *start[:1]))
        if between is not None:
            origin = min(origin, between[0])
        # Break points: idle and busy stretches by turns, and idle up to now.
        times = np.empty(2 * seen + 2)
        times[0] = origin if seen == n else start[0]
        times[1:-1:2], times[2:-1:2] = start, end
        times[-1] = max([scene.now, *times[-2:-1].tolist()])
        if between is not None:
            times[-1] = max(times[-1], between[1])
        length = np.diff(times)
        busy = float(length[1::2][-recent:].sum() if recent else length[1::2].sum())
        limit = 0.1 * (busy if recent is None else _rounded(busy, 4)) if busy > 0 else math.inf
        cut = length > limit
        cut[1::2] = False
        length[cut] = limit
        shown = np.concatenate([[0.0], np.cumsum(length)])

        begin, until = 0.0, float(shown[-1])
        if between is not None:
            begin, until = np.interp(between, times, shown).tolist()
        span = until - begin
        if recent is not None:
            whole = n <= recent
            span = _rounded(
                until - (0.0 if whole else float(shown[2 * (seen - recent) + 1])), 1 if whole else 4
            )
            begin = max(0.0, until - span)
        span = span if span > 0 else 1.0
        self._times, self._at = times, left + (shown - begin) * (right - left) / span
        self.left, self.right = left, right
        self.seconds = span / (right - left)  # of a point
        self.begin_s, self.end_s = np.interp([begin, until], shown, times).tolist()
        self.now = float(self.x(scene.now)) if n else left
        self.first = n - seen + int(np.searchsorted(end, self.begin_s, side="right"))
        self.last = n - seen + int(np.searchsorted(start, self.end_s, side="left"))
        self.idle = [
            (float(times[i]), float(times[i + 1]))
            for i in np.flatnonzero(cut)
            if self.begin_s <= times[i] and times[i + 1] <= self.end_s
        ]
        self._pieces = self._uncut(np.flatnonzero(cut))

    def x(self, seconds: Any) -> Any:
        """Points; what is off the picture lies on its edge."""
        return np.clip(np.interp(seconds, self._times, self._at), self.left, self.right)

    def _uncut(self, cut: NDArray[np.int64]) -> list[tuple[float, float]]:
        """The pieces of the time on the picture that are to scale."""
        edges = [self.begin_s]
        for i in cut:
            edges += [float(self._times[i]), float(self._times[i + 1])]
        edges.append(self.end_s)
        pieces = [
            (max(a, self.begin_s), min(b, self.end_s)) for a, b in zip(edges[::2], edges[1::2], strict=True)
        ]
        return [(a, b) for a, b in pieces if a < b or (a == b and len(pieces) == 1)]

    def ticks(self, apart: float = 50.0) -> list[tuple[float, str]]:
        """Points and labels of round times, at least `apart` points from each other."""
        exponent = math.floor(math.log10(apart * self.seconds))
        base = 10.0**exponent
        step = next(m * base for m in (1, 2, 5, 10, 20) if m * base >= apart * self.seconds)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        found: list[tuple[float, str]] = []
        for a, b in self._pieces:
            for k in range(math.ceil(a / step - 1e-6), math.floor(b / step + 1e-6) + 1):
                x = float(self.x(k * step))
                label = f"{k * step:.{digits}f}"
                gap = text_width(label, _TINY) + 6
                if not found or x - found[-1][0] >= gap:
                    found.append((x, label))
        return found


def _rounded(span: float, steps: int) -> float:
    """The next larger power of 2 ** (1 / steps): so that the scale does not change with every frame."""
    return 2.0 ** (math.ceil(steps * math.log2(span) - 1e-9) / steps) if span > 0 else 0.0


def seconds(value: float) -> str:
    """A duration in words: 850 ms, 12.3 s, 5.2 min, 3.1 h."""
    if value < 0.9995:
        return f"{1000 * value:.3g} ms"
    if value < 99.95:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 5997 else f"{value / 3600:,.1f} h"


def number(value: float) -> str:
    """A number for a corner: four digits, no more."""
    if value is None or not math.isfinite(value):
        return "–" if value is None or math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def _short(tokens: float) -> str:
    """Tokens on an axis: 800, 12k, 1.5M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name}"
    return f"{tokens:g}"


# ---------------------------------------------------------------------- the picture


class Picture:
    """Lays a scene out on a page: lanes of requests, KV cache and queue over one time axis."""

    def __init__(
        self,
        scene: Scene,
        width: float,
        height: float,
        *,
        live: bool,
        between: tuple[float, float] | None = None,
    ) -> None:
        """A page of `width` x `height` points: live, the last iterations with clock, plan and metrics; else
        the whole run, or what was `between` two times.
        """
        self.scene, self.story, self.live = scene, scene.story, live
        self.page = page = Page(width, height)
        self.n = len(scene.workload)
        self.colour = np.arange(self.n) % len(COLOURS)

        top = self._header(height - 7) if live else self._title(height - 5)
        bottom = 15.0 if live and width > 350 else 23.0
        room = top - bottom
        panels = 1 + (room > 80) + (room > 125)
        avail = room - 13.0 * panels
        kv = min(max(0.20 * avail, 18.0), 80.0) if panels > 1 else 0.0
        queue = min(max(0.13 * avail, 14.0), 50.0) if panels > 2 else 0.0
        self.gantt_top = top - 13.0
        self.heading = self.gantt_top + 4.0
        self.gantt_bottom = self.gantt_top - (avail - kv - queue)
        self.panels = [(self.gantt_bottom, self.heading - 4.0)]  # bottoms and tops
        self.bottom = bottom

        room = self.gantt_top - self.gantt_bottom
        self.by_request = self.n * 8.0 <= room
        if not self.by_request:  # a strip for the arrivals
            self.gantt_top -= 6.0
            room -= 6.0
        self.left = 44.0 if width > 250 else 34.0
        self.right = width - (56.0 if live and width > 350 else 9.0)
        planning = live and (len(scene.planned) > 0 or bool(scene.decision))
        self.ghost = min(max(0.13 * (self.right - self.left), 34.0), 110.0) if planning else 0.0
        recent = int(min(max((self.right - self.left) / 12, 12), 60)) if live else None
        self.clock = _Clock(scene, self.left, self.right - self.ghost, recent=recent, between=between)
        self.plan_right = min(self.clock.now + self.ghost, self.right)

        self._entries()
        self._choose_lanes(room)
        self._background()
        self._lane_labels()
        self._bars()
        self._pauses()
        self._arrivals()
        self._plan()
        if panels > 1:
            self._kv(self.gantt_bottom - 13.0 - kv, kv)
        if panels > 2:
            self._queue(self.bottom, queue)
        self._axis()
        heading = "requests" if self.by_request else "running slots"
        if self.hidden:
            heading += f" ({self.hidden} more not shown)"
        used = page.text(self.left, self.heading, heading, _SMALL, _GREY)
        self._legend(self.left + used + 12)

    # ------------------------------------------------------------ text above

    def _title(self, top: float) -> float:
        if self.scene.title:
            title = shorten(self.scene.title, self.page.width - 20, _BODY, True)
            self.page.text(9, top - _BODY, title, _BODY, bold=True)
            return top - 13
        return top

    def _header(self, top: float) -> float:
        """Title, clock and latest action on the left, metrics in the right corner; returns what is left."""
        scene, page, story = self.scene, self.page, self.story
        state = np.bincount(story.state, minlength=len(State))
        status = [
            f"t = {scene.now:.3f} s",
            f"iteration {len(scene.rows):,}",
            f"running {state[State.RUNNING]:,}",
            f"waiting {state[State.WAITING] + state[State.PREEMPTED] + state[State.SWAPPED]:,}",
            f"finished {state[State.FINISHED]:,} of {self.n:,}",
        ]
        lines = [(scene.title, _LARGE, True)] if scene.title else []
        edge = self._metrics(top, 2 + len(lines))
        while len(status) > 1 and text_width("    ".join(status), _BODY) > edge - 20:
            status.pop()
        lines += [("    ".join(status), _BODY, False), (scene.decision, _BODY, True)]
        for text, size, bold in lines:
            top -= size + 4
            page.text(9, top, shorten(text, edge - 20, size, bold), size, bold=bold)
        return top - 4

    def _metrics(self, top: float, lines: int) -> float:
        """Metrics in columns from the right; returns where the first column begins."""
        page, edge = self.page, self.page.width - 9
        items = [(shorten(str(k), 90, _SMALL), number(v)) for k, v in self.scene.metrics.items()]
        columns = [items[i : i + lines] for i in range(0, len(items), lines)]
        placed: list[tuple[list[tuple[str, str]], float, float]] = []
        total = 0.0
        for column in columns:
            names = max(text_width(name, _SMALL) for name, _ in column)
            values = max(text_width(value, _SMALL, True) for _, value in column)
            if total + names + values + 20 > min(0.55 * page.width, page.width - 200):
                break
            placed.append((column, names, values))
            total += names + values + 20
        x = edge - total + 14
        for column, names, values in placed:
            for i, (name, value) in enumerate(column):
                y = top - (i + 1) * (_SMALL + 5)
                page.text(x, y, name, _SMALL, _GREY)
                page.text(x + names + 6 + values, y, value, _SMALL, bold=True, align="right")
            x += names + values + 20
        return edge - total

    # ------------------------------------------------------------ lanes

    def _entries(self) -> None:
        """The decisions that are on the picture, those that compute, one by one."""
        rows, first, last = self.scene.rows, self.clock.first, self.clock.last
        ends = rows["entries"][first:last]
        begin = int(rows["entries"][first - 1]) if first > 0 else 0
        until = int(ends[-1]) if len(ends) else begin
        kind = self.story.kind[begin:until]
        row = np.repeat(np.arange(first, last), np.diff(ends, prepend=begin))
        keep = kind <= Kind.DECODE
        self.kind, self.row = kind[keep], row[keep]
        self.request = self.scene.requests[begin:until][keep]
        self.tokens = self.scene.tokens[begin:until][keep]

    def _on_lanes(self) -> NDArray[np.int64]:
        """Requests that need a lane on the picture."""
        kept = [State.RUNNING, State.PREEMPTED, State.SWAPPED]
        held = np.flatnonzero(np.isin(self.story.state, kept)) if self.live else np.zeros(0, np.int64)
        planned = np.array([r for r, _ in self.scene.planned], np.int64)
        return np.concatenate([self.request, held, planned])

    def _choose_lanes(self, room: float) -> None:
        """A lane for each request if they fit, else for each running slot."""
        self.hidden = 0
        self.lane: NDArray[Any]
        if self.by_request:
            self.lane = np.arange(self.n)
            self.lanes = self.n
        else:
            self.lane = self.story.lane
            used = np.unique(self._on_lanes())
            highest = int(self.lane[used].max(initial=-1)) + 1
            most = max(1, int(room / (1.5 if self.live else 0.75)))
            quantum = [k for k in _LANES if k >= highest] if self.live else [max(highest, 1)]
            self.lanes = min(quantum[0] if quantum else highest, most)
            self.hidden = int(np.count_nonzero(self.lane[used] >= self.lanes))
        self.pitch = min(room / self.lanes, _WIDEST_LANE)

    def _middle(self, lane: Any) -> Any:
        return self.gantt_top - (np.asarray(lane) + 0.5) * self.pitch

    def _background(self) -> None:
        page, clock = self.page, self.clock
        base = self.gantt_top - self.lanes * self.pitch
        if self.ghost:
            page.rects("backs", clock.now, self.bottom, self.plan_right, self.gantt_top, _SHADE)
        for a, b in clock.idle:
            page.rects("backs", clock.x(a), self.bottom, clock.x(b), self.gantt_top, _SHADE)
            for label in (f"idle {seconds(b - a)}", seconds(b - a)):
                if text_width(label, _TINY) + 3 <= clock.x(b) - clock.x(a):
                    x = float(clock.x(a) + clock.x(b)) / 2
                    page.text(x, self.gantt_bottom + 3, label, _TINY, _GREY, align="centre")
                    break
        focus = self.scene.focused if self.live else None
        if focus is not None and 0 <= focus < self.n and 0 <= self.lane[focus] < self.lanes:
            y = float(self._middle(self.lane[focus]))
            page.rects("backs", self.left, y - self.pitch / 2, self.right, y + self.pitch / 2, _FOCUS)
        if self.pitch >= 5:
            edges = self.gantt_top - np.arange(1, self.lanes + 1) * self.pitch
            page.lines("grid", self.left, edges, self.right, edges, _FAINT, 0.5)
        page.lines("lines", self.left, base, self.left, self.gantt_top, _GREY, 0.6)

    def _lane_labels(self) -> None:
        """Who has each lane: names on the left, and how far they are on the right."""
        if self.pitch < 7.5:
            return
        story, scene = self.story, self.scene
        there = np.isin(story.state, [State.RUNNING, State.PREEMPTED, State.SWAPPED])
        planned = [r for r, _ in scene.planned]
        there[planned] = True
        if self.by_request:
            shown = story.state != State.FUTURE if self.live else np.ones(self.n, bool)
        else:
            shown = there & (story.lane >= 0) & self.live
        size = min(_SMALL, 0.8 * self.pitch)
        for r in np.flatnonzero(shown):
            if self.lane[r] >= self.lanes:
                continue
            y = float(self._middle(self.lane[r]))
            name = shorten(scene.workload.name(int(r)), self.left - 14, size)
            self.page.text(self.left - 6, y, name, size, align="right", middle=True)
            x, half = self.left - 3.5, 0.32 * self.pitch
            self.page.rects("bars", x, y - half, x + 2, y + half, _SOLID[self.colour[r]])
            if self.live and self.right < self.page.width - 40:
                label, colour = self._progress(int(r))
                self.page.text(self.right + 5, y, label, min(_TINY, size), colour, middle=True)

    def _progress(self, r: int) -> tuple[str, Colour]:
        """Where a request is, in a word or two."""
        story = self.story
        state = story.state[r]
        if state == State.RUNNING:
            if story.cached[r] < story.target[r]:
                return f"prefill {100 * int(story.cached[r]) // int(story.target[r])} %", _INK
            return f"{story.generated[r]:,} out", _INK
        if state == State.WAITING:
            return "waits", _GREY
        if state == State.PREEMPTED:
            return "preempted", _RED
        if state == State.SWAPPED:
            return "swapped", _RED
        return {int(State.FINISHED): "done", int(State.DROPPED): "dropped"}.get(int(state), ""), _GREY

    # ------------------------------------------------------------ bars

    def _bars(self) -> None:
        """Prefill chunks as solid bars, stretches of decoding as thin and light ones."""
        page, clock, rows = self.page, self.clock, self.scene.rows
        start, end = rows["start_s"], rows["end_s"]
        lane = self.lane[self.request]
        keep = (lane >= 0) & (lane < self.lanes)
        lane = lane[keep]
        row, request, kind, tokens = self.row[keep], self.request[keep], self.kind[keep], self.tokens[keep]

        decode = kind == Kind.DECODE
        who, first, last = stretches(request[decode], row[decode], start, end)
        x0, x1, y = clock.x(start[first]), clock.x(end[last]), self._middle(self.lane[who])
        thin = self.pitch < 5
        half = (0.6 if thin else _DECODE) * self.pitch / 2
        ends = [(x0, x1, self.lane[who])]
        x0, x1, y, who = _visible(x0, x1, y, who, 0.1)
        page.rects("bars", x0, y - half, x1, y + half, _LIGHT[self.colour[who]])

        prefill = ~decode
        row, who, tokens = row[prefill], request[prefill], tokens[prefill]
        x0, x1, y = clock.x(start[row]), clock.x(end[row]), self._middle(self.lane[who])
        half = (1.0 if thin else _PREFILL) * self.pitch / 2
        ends.append((x0, x1, self.lane[who]))
        a, b, mid, by = _visible(x0, x1, y, who, 0.3)
        page.rects("bars", a, mid - half, b, mid + half, _SOLID[self.colour[by]])
        self._labels(who, row, tokens, x0, x1, y, ends)

        # A white line between iterations: of chunks if the chunk, of decodes if most iterations are wide.
        if not thin and len(lane):
            x, y = clock.x(start[self.row[keep]]), self._middle(lane)
            width = clock.x(end[self.row[keep]]) - x
            reach = np.where(prefill, _PREFILL, _DECODE) * self.pitch / 2 + 0.2
            cut = (width >= 3) & (prefill | (np.median(width) >= 3.5)) & (x > self.left)
            page.lines("cuts", x[cut], (y - reach)[cut], x[cut], (y + reach)[cut], _WHITE, 0.6)

    def _labels(
        self,
        who: NDArray[np.int32],
        row: NDArray[np.int64],
        tokens: NDArray[np.int32],
        x0: Points,
        x1: Points,
        y: Points,
        ends: list[tuple[Points, Points, NDArray[Any]]],
    ) -> None:
        """Tokens on the chunks, and in slots the name of who begins there."""
        size = min(_TINY, 0.62 * self.pitch)
        if size < 4.6:
            return
        page = self.page
        names = not self.by_request
        before = _before(x0, self.lane[who], ends, self.left) if names else x0
        begins = self.scene.rows["start_s"][row] == self.story.first_scheduled_s[who]
        wide = x1 - x0 >= 4.0
        for k in np.flatnonzero(wide | (begins if names else False)):
            r, colour = int(who[k]), self.colour[who[k]]
            room, label = float(x1[k] - x0[k]) - 2.5, str(tokens[k])
            if names and begins[k]:
                name = shorten(self.scene.workload.name(r), 40, size, True)
                width = text_width(name, size, True)
                if x0[k] - before[k] >= width + 4:
                    page.text(
                        float(x0[k]) - 2, float(y[k]), name, size, tuple(0.8 * _SOLID[colour]),
                        bold=True, align="right", middle=True,
                    )  # fmt: skip
                elif text_width(f"{name}: {label}", size) <= room:
                    label = f"{name}: {label}"
            if text_width(label, size) <= room:
                ink = _INK if _DARK_TEXT[colour] else _WHITE
                x = float(x0[k] + x1[k]) / 2
                page.text(x, float(y[k]), label, size, ink, align="centre", middle=True)

    def _pauses(self) -> None:
        """Preempted requests: a cross or an arrow, and a dotted line until they come back."""
        scene, story, clock = self.scene, self.story, self.clock
        self.swaps = bool((scene.tokens == SWAPPED_OUT).any())
        pauses = story.pauses
        if len(pauses) == 0:
            return
        r, out, back = pauses.T
        start = scene.rows["start_s"]
        a = start[out]
        b = np.where(back >= 0, start[np.maximum(back, 0)], scene.now)
        b = np.fmin(b, scene.finish_s[r])
        lane = self.lane[r]
        keep = (b >= clock.begin_s) & (a <= clock.end_s) & (lane >= 0) & (lane < self.lanes)
        if not keep.any():
            return
        r, out, back, a, b, lane = r[keep], out[keep], back[keep], a[keep], b[keep], lane[keep]
        y = self._middle(lane)
        self.page.lines("waits", clock.x(a), y, clock.x(b), y, _RED, min(1.2, 0.12 * self.pitch))
        swapped = self._swapped(r, out)
        size = min(3.4, 0.36 * self.pitch)
        inside = (a >= clock.begin_s) & (clock.x(a) > self.left)
        self._cross(clock.x(a[inside & ~swapped]), y[inside & ~swapped], size)
        self._arrow(clock.x(a[inside & swapped]), y[inside & swapped], size, -1)
        home = (back >= 0) & swapped & (b >= clock.begin_s) & (b <= clock.end_s) & (clock.x(b) > self.left)
        self._arrow(clock.x(b[home]), y[home], size, 1)

    def _swapped(self, r: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the preemptions of requests r in iterations `row` went to the CPU tier."""
        if not self.swaps:
            return np.zeros(len(r), bool)
        where = np.flatnonzero(self.scene.tokens == SWAPPED_OUT)
        at = np.searchsorted(self.scene.rows["entries"], where, side="right")
        key = at * self.n + self.scene.requests[where]
        return np.isin(row * self.n + r, key)

    def _cross(self, x: Any, y: Any, size: float) -> None:
        for slope in (-1, 1):
            self.page.lines("marks", x - size, y - slope * size, x + size, y + slope * size, _RED, 1.4)

    def _arrow(self, x: Any, y: Any, size: float, way: int) -> None:
        for side in (-1, 1):
            colour = _RED if way < 0 else _BLUE
            self.page.lines("marks", x + side * size, y - way * size, x, y + way * size, colour, 1.4)

    def _arrivals(self) -> None:
        """A tick where a request arrives; on its lane, with a dotted line until it is admitted."""
        scene, clock = self.scene, self.clock
        arrival = scene.workload.arrival_s
        first = int(np.searchsorted(arrival, clock.begin_s, side="left"))
        last = int(np.searchsorted(arrival, min(scene.now, clock.end_s), side="right"))
        x = clock.x(arrival[first:last])
        colours = _SOLID[self.colour[first:last]]
        if not self.by_request:
            width = 1.2 if len(x) < 100 else 0.5
            if len(x) > 2 * (self.right - self.left):
                colours = _GREY
            self.page.lines("marks", x, self.gantt_top + 1, x, self.gantt_top + 5.5, colours, width)
            return
        y, half = self._middle(np.arange(first, last)), 0.42 * self.pitch
        self.page.lines("marks", x, y - half, x, y + half, colours, 1.3)
        until = np.where(np.isnan(self.story.first_scheduled_s), scene.now, self.story.first_scheduled_s)
        if scene.dropped is not None:
            until = np.where(scene.dropped, arrival, until)
        waits = np.flatnonzero((arrival <= min(scene.now, clock.end_s)) & (until > clock.begin_s))
        y = self._middle(waits)
        self.page.lines("waits", clock.x(arrival[waits]), y, clock.x(until[waits]), y, _GREY, 0.8)

    def _plan(self) -> None:
        """What is planned and not yet executed: hatched, behind the line of now."""
        scene, page = self.scene, self.page
        if not self.ghost:
            return
        left, right = self.clock.now + 2.0, self.plan_right - 2.0
        size = min(_TINY, 0.62 * self.pitch)
        kinds = self.story.planned
        final = {r: k for k, (r, _) in enumerate(scene.planned)}  # the last word counts
        chosen = [k for k in final.values() if self.lane[scene.planned[k][0]] < self.lanes]
        given = np.array([k for k in chosen if kinds[k] <= Kind.DECODE], np.int64)
        who = np.array([scene.planned[k][0] for k in given], np.int64)
        y = self._middle(self.lane[who])
        prefill = np.array([kinds[k] == Kind.PREFILL for k in given], bool)
        half = np.where(prefill, _PREFILL, _DECODE) * self.pitch / 2
        x0, x1 = np.full(len(y), left), np.full(len(y), right)
        fill = _GHOST if self.pitch >= 5 else _LIGHT
        page.rects("bars", x0, y - half, x1, y + half, fill[self.colour[who]])
        if self.pitch >= 5:
            page.hatch(x0, y - half, x1, y + half, _LIGHT[self.colour[who]], 4.5)
        for i, k in enumerate(given.tolist()):
            r, tokens = scene.planned[k]
            outlined = r == scene.focused
            if self.pitch >= 4:
                self._outline(left, y[i] - half[i], right, y[i] + half[i], r, outlined)
            label = f"{tokens:,}"
            if prefill[i] and size >= 4.6 and text_width(label, size, True) + 8 <= right - left:
                width = text_width(label, size, True) / 2 + 2.5
                middle, white = (left + right) / 2, 0.5 * size + 0.6
                page.rects("boxes", middle - width, y[i] - white, middle + width, y[i] + white, _WHITE)
                page.text(middle, y[i], label, size, bold=True, align="centre", middle=True)
        for k in chosen:
            if kinds[k] <= Kind.DECODE:
                continue
            r, _ = scene.planned[k]
            at = float(self._middle(self.lane[r]))
            mark = min(3.4, 0.36 * self.pitch)
            if kinds[k] == Kind.EVICTED:
                self._cross(left + 6, at, mark)
            else:
                self._arrow(left + 6, at, mark, -1 if kinds[k] == Kind.SWAPPED_OUT else 1)
            words = {Kind.EVICTED: "preempt", Kind.SWAPPED_OUT: "swap out", Kind.SWAPPED_IN: "swap in"}[
                kinds[k]
            ]
            if size >= 4.6 and text_width(words, size) + 14 <= right - left:
                page.text(left + 12, at, words, size, _RED, middle=True)

    def _outline(self, x0: float, y0: float, x1: float, y1: float, r: int, strong: bool) -> None:
        colour = _INK if strong else tuple(_SOLID[self.colour[r]])
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]])
        self.page.path("lines", corners, colour, 1.3 if strong else 0.6)

    # ------------------------------------------------------------ the panels below

    def _panel(self, bottom: float, height: float, heading: str, top_label: str) -> None:
        page = self.page
        self.panels.append((bottom, bottom + height))
        page.text(self.left, bottom + height + 4, heading, _SMALL, _GREY)
        page.lines("grid", self.left, bottom + height / 2, self.right, bottom + height / 2, _FAINT, 0.5)
        page.lines("lines", self.left, bottom, self.left, bottom + height, _GREY, 0.6)
        page.lines("lines", self.left, bottom, self.right, bottom, _GREY, 0.6)
        page.text(self.left - 5, bottom + 0.5, "0", _TINY, _GREY, align="right")
        page.text(self.left - 5, bottom + height - 2, top_label, _TINY, _GREY, align="right", middle=True)

    def _area(self, x: Points, y: Points, bottom: float, colour: Colour) -> None:
        if len(x) < 2:
            return
        x, y = _envelope(x, y)
        ends = np.array([[x[-1], bottom], [x[0], bottom]])
        self.page.polygon(np.concatenate([np.stack([x, y], 1), ends]), _tint(colour, 0.3))
        self.page.path("lines", np.stack([x, y], 1), colour, 1.0)

    def _kv(self, bottom: float, height: float) -> None:
        """KV tokens against the capacity."""
        scene, story, clock, page = self.scene, self.story, self.clock, self.page
        held = int(story.kv_after[-1]) if len(story.kv_after) else 0
        words = f"KV cache: {scene.kv_tokens:,} tokens"
        if self.live:
            share = 100 * held / max(1, scene.kv_tokens)
            words = f"KV cache: {held:,} of {scene.kv_tokens:,} tokens ({share:.0f} %)"
        self._panel(bottom, height, words, _short(scene.kv_tokens))
        unit = (height - 2) / max(1, scene.kv_tokens)
        first, last = clock.first, clock.last
        rows = scene.rows[first:last]
        if last > first:
            # While an iteration runs its tokens count; until the next starts, what is left then.
            x: Points = np.stack([rows["start_s"], rows["end_s"]], 1).ravel()
            y: Points = np.repeat(rows["kv_tokens"].astype(float), 2)
            gaps = np.flatnonzero(rows["start_s"][1:] > rows["end_s"][:-1])
            left = np.repeat(story.kv_after[first:last][gaps].astype(float), 2)
            x = np.insert(x, np.repeat(2 * gaps + 2, 2), x[np.stack([2 * gaps + 1, 2 * gaps + 2], 1).ravel()])
            y = np.insert(y, np.repeat(2 * gaps + 2, 2), left)
            if scene.now > rows["end_s"][-1] and last == len(scene.rows):
                x = np.append(x, [rows["end_s"][-1], scene.now])
                y = np.append(y, [held, held])
            self._area(clock.x(x), bottom + unit * y, bottom, _BLUE)
        if self.ghost and scene.planned:
            after = self._after_plan(held)
            y0, y1 = bottom, bottom + unit * min(after, scene.kv_tokens)
            x0, x1 = self.clock.now, self.plan_right
            edge = np.array([[x0, y1], [x1, y1]])
            page.path("lines", edge, _BLUE, 0.8)
            page.hatch(x0, y0, x1, y1, _tint(_BLUE, 0.5), 4.5)
        page.lines("lines", self.left, bottom + height - 2, self.right, bottom + height - 2, _RED, 0.9)

    def _after_plan(self, held: int) -> int:
        """KV tokens when the plan has run."""
        cached = self.story.cached
        for (r, tokens), kind in zip(self.scene.planned, self.story.planned, strict=True):
            if kind in (Kind.EVICTED, Kind.SWAPPED_OUT):
                held -= int(cached[r])
            else:
                held += tokens if kind != Kind.SWAPPED_IN else int(cached[r])
        return max(held, 0)

    def _queue(self, bottom: float, height: float) -> None:
        """Requests that wait."""
        scene, clock = self.scene, self.clock
        until = min(scene.now, clock.end_s)
        arrival = scene.workload.arrival_s
        low, high = np.searchsorted(arrival, [clock.begin_s, until])
        edges = np.array([clock.begin_s, until])
        times = np.unique(
            np.concatenate([edges, scene.rows["start_s"][clock.first : clock.last], arrival[low:high]])
        )
        times = times[(times >= clock.begin_s) & (times <= until)]
        length = scene.waiting_at(times).astype(float)
        now = int(scene.waiting_at(np.array([scene.now]))[0])
        top = _round_up(float(length.max(initial=1.0)))
        words = "queue: " + (f"{now:,} waiting" if self.live else "requests waiting")
        self._panel(bottom, height, words, f"{top:,}")
        x = np.repeat(clock.x(times), 2)[1:]
        y = np.repeat(bottom + length * (height - 2) / top, 2)[:-1]
        self._area(x, y, bottom, to_rgb("#555555"))

    def _axis(self) -> None:
        page, clock = self.page, self.clock
        bottoms, tops = np.array(self.panels).T
        y = self.bottom - 9
        beside = self.page.width - self.right > 40
        if beside:
            page.text(page.width - 7, y, "time (s)", _TINY, _GREY, align="right")
        else:
            page.text((self.left + self.right) / 2, y - 9, "time (s)", _TINY, _GREY, align="centre")
        if self.ghost:
            page.text((clock.now + self.plan_right) / 2, y, "plan", _TINY, bold=True, align="centre")
        for x, label in clock.ticks():
            page.lines("grid", x, bottoms, x, tops, _FAINT, 0.5)
            page.lines("lines", x, self.bottom, x, self.bottom - 2.5, _GREY, 0.6)
            half = text_width(label, _TINY) / 2
            if x + half <= (clock.now + 6 if self.ghost else page.width - (40 if beside else 0)):
                page.text(min(x, page.width - half - 2), y, label, _TINY, _GREY, align="centre")
        if self.live and (self.ghost or clock.now < self.right - 1):
            page.lines("lines", clock.now, bottoms, clock.now, tops, _INK, 0.9)

    def _legend(self, left: float) -> None:
        """What is what, right above the lanes as far as there is room."""
        page, y = self.page, self.heading + 2.6
        items = ["prefill", "decode"]
        items += ["planned"] if self.ghost else []
        items += ["preempted"] if len(self.story.pauses) or self.live else []
        items += ["swapped out", "swapped in"] if self.swaps else []
        items += ["arrival"]
        items += ["waiting"] if self.by_request else []
        size, swatch = _TINY, 13.0
        widths = [swatch + 3 + text_width(item, size) + 10 for item in items]
        while items and left + sum(widths) > self.right + 10:
            items.pop()
            widths.pop()
        x = self.right + 10 - sum(widths)
        grey, light = to_rgb("#666666"), to_rgb("#B9B9B9")
        for item, width in zip(items, widths, strict=True):
            middle = x + swatch / 2
            if item == "prefill":
                page.rects("bars", x, y - 3, x + swatch, y + 3, grey)
            elif item == "decode":
                page.rects("bars", x, y - 1.4, x + swatch, y + 1.4, light)
            elif item == "planned":
                page.hatch(x, y - 3, x + swatch, y + 3, light, 3.0)
                corners = np.array(
                    [[x, y - 3], [x + swatch, y - 3], [x + swatch, y + 3], [x, y + 3], [x, y - 3]]
                )
                page.path("lines", corners, grey, 0.6)
            elif item == "preempted":
                self._cross(middle, y, 3.0)
            elif item in ("swapped out", "swapped in"):
                self._arrow(middle, y, 3.0, -1 if item == "swapped out" else 1)
            elif item == "arrival":
                page.lines("marks", middle, y - 3.2, middle, y + 3.2, grey, 1.3)
            else:
                page.lines("waits", x, y, x + swatch, y, _GREY, 0.8)
            page.text(x + swatch + 3, y, item, size, _GREY, middle=True)
            x += width


def stretches(
    request: NDArray[Any], row: NDArray[Any], start: NDArray[np.float64], end: NDArray[np.float64]
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Runs of successive iterations, without a pause between them, of the same request: the requests, the
    first and the last iterations.
    """
    order = np.lexsort((row, request))
    request, row = request[order], row[order].astype(np.int64)
    if len(row) == 0:
        return request, row, row
    goes_on = (request[1:] == request[:-1]) & (row[1:] == row[:-1] + 1)
    goes_on &= start[row[1:]] <= end[row[:-1]]
    first = np.concatenate([[True], ~goes_on])
    last = np.concatenate([~goes_on, [True]])
    return request[first], row[first], row[last]


def _before(
    x0: Points, lane: NDArray[Any], bars: list[tuple[Points, Points, NDArray[Any]]], left: float
) -> Points:
    """Where, on its lane, the last bar before each that begins at x0 ends; `left` if there is none."""
    begins, ends, lanes = (np.concatenate(column) for column in zip(*bars, strict=True))
    order = np.lexsort((begins, lanes))
    # One axis for all lanes, so that one search serves them.
    wide = 2.0 * float(max(ends.max(initial=0.0), left, 1.0))
    at = np.searchsorted((lanes * wide + begins)[order], lane * wide + x0, side="left") - 1
    found = order[np.maximum(at, 0)]
    return np.where((at >= 0) & (lanes[found] == lane), ends[found], left)


def _visible(
    x0: Points, x1: Points, y: Points, who: NDArray[Any], least: float
) -> tuple[Points, Points, Points, NDArray[Any]]:
    """Bars, at least `least` points wide; of those that fall together only one."""
    x1 = np.maximum(x1, x0 + least)
    if len(x0) > 20_000:
        cells = np.stack([np.round(x0 / 0.25), np.round(x1 / 0.25), y], 1)
        _, index = np.unique(cells, axis=0, return_index=True)
        x0, x1, y, who = x0[index], x1[index], y[index], who[index]
    return x0, x1, y, who


def _envelope(x: Points, y: Points) -> tuple[Points, Points]:
    """A line of many points as the first, lowest, highest and last in each half of a typographic point."""
    if len(x) < 4000:
        return x, y
    cell = np.floor(2 * x)
    first = np.flatnonzero(np.concatenate([[True], cell[1:] != cell[:-1]]))
    last = np.append(first[1:], len(x)) - 1
    low, high = np.minimum.reduceat(y, first), np.maximum.reduceat(y, first)
    across = np.stack([x[first], x[first], x[last], x[last]], 1)
    return across.ravel(), np.stack([y[first], low, high, y[last]], 1).ravel()


def _round_up(value: float) -> int:
    """1, 2, 3, 5, 10, 20, 30, 50, ...: the next one, not smaller."""
    scale = 1
    while True:
        for step in (1, 2, 3, 5):
            if step * scale >= value:
                return step * scale
        scale *= 10
