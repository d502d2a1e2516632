"""A `Scene` as pixels (`draw`), on a terminal (`text`) and on a screen (`Window`)."""

from __future__ import annotations

import importlib
import math
import os
import threading
import warnings
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from llmsched_env.core.run import EVICTED, SWAPPED_IN, SWAPPED_OUT
from llmsched_env.envs.page import Painter as PagePainter
from llmsched_env.envs.picture import Picture, number
from llmsched_env.envs.scene import Scene, State
from llmsched_env.errors import InputError

_LEAST = (150, 100)  # points


class Painter:
    """Draws scenes as pictures of one size, for a video: the figure is kept from frame to frame."""

    def __init__(self, width: int = 960, height: int = 600, dpi: float = 100.0) -> None:
        """Pictures of `width` x `height` pixels; `dpi` scales what is on them (fonts are 6.5 to 10.5 points).

        Raises:
            InputError: if they are too small to show anything.
        """
        if not (
            0 < dpi < math.inf
            and all(72 * n / dpi >= m for n, m in zip((width, height), _LEAST, strict=True))
        ):
            raise InputError(
                f"a picture of {width} x {height} pixels at {dpi:g} dpi is too small to read; {_LEAST[0]} x "
                f"{_LEAST[1]} points are the least, and a point is dpi / 72 pixels"
            )
        self.width, self.height, self.dpi = int(width), int(height), float(dpi)
        self._points = (72 * self.width / self.dpi, 72 * self.height / self.dpi)
        self._painter = PagePainter(*self._points)

    def draw(self, scene: Scene) -> NDArray[np.uint8]:
        """The (height, width, 3) pixels of a scene."""
        page = Picture(scene, *self._points, live=True).page
        return self._painter.pixels(page, self.width, self.height, self.dpi)


def draw(scene: Scene, width: int = 960, height: int = 600, dpi: float = 100.0) -> NDArray[np.uint8]:
    """One picture, (height, width, 3) pixels.

    The last iterations as bars on a lane for each request (or, if those do not fit, each running slot):
    prefill chunks solid with their tokens, decodes thin and light, the plan being built hatched behind the
    line of now, preemptions as red crosses (arrows: to and from the CPU tier). Below are the KV cache and the
    queue on the same time axis, on which long idle stretches are cut short.
    """
    painter: Painter | None = getattr(_kept, "painter", None)
    if painter is None or (painter.width, painter.height, painter.dpi) != (width, height, dpi):
        painter = _kept.painter = Painter(width, height, dpi)
    return painter.draw(scene)


_kept = threading.local()  # the painter that `draw` last used in this thread


# ---------------------------------------------------------------------- a terminal

_BOLD, _DIM, _RED, _YELLOW = "1", "2", "31", "33"
_CYCLE = ("34", "35", "32", "33", "36", "31")  # of requests


def text(scene: Scene, width: int = 80, most: int = 12, colour: bool = False, plain: bool = False) -> str:
    """A scene for a terminal: clock, KV cache, queue, running requests, the plan so far, the last decision.

    Args:
        scene: what to show.
        width: columns, at least 40.
        most: running requests that are listed at most.
        colour: whether to use ANSI colours.
        plain: ASCII only.
    """
    return _Text(scene, max(40, width), max(1, most), colour, plain).show()


class _Text:
    def __init__(self, scene: Scene, width: int, most: int, colour: bool, plain: bool) -> None:
        self.scene, self.story = scene, scene.story
        self.width, self.most, self.colour, self.plain = width, most, colour, plain

    def show(self) -> str:
        scene, state = self.scene, self.story.state
        finished = int(np.count_nonzero(state == State.FINISHED))
        clock = (
            f"t {scene.now:.3f} s   iteration {len(scene.rows):,}   finished {finished:,} of {len(state):,}"
        )
        lines = [self._fit(scene.title, _BOLD)] if scene.title else []
        lines += [self._fit(clock, _BOLD), self._kv(), self._queue(), *self._running(), self._plan()]
        if scene.decision:
            lines.append(self._fit(f"last    {scene.decision}", _YELLOW))
        lines += self._metrics()
        return "\n".join(lines)

    def _fit(self, line: str, code: str = "") -> str:
        """One line of at most `width` columns."""
        if self.plain:
            for sign, instead in (("−", "-"), ("–", "-"), ("∞", "inf"), ("…", "...")):
                line = line.replace(sign, instead)
        line = "".join(c if c.isprintable() and not (self.plain and ord(c) > 126) else "?" for c in line)
        if len(line) > self.width:
            dots = "..." if self.plain else "…"
            line = line[: self.width - len(dots)] + dots
        return self._paint(line, code)

    def _paint(self, part: str, code: str) -> str:
        return f"\x1b[{code}m{part}\x1b[0m" if self.colour and code else part

    def _bar(self, share: float, width: int) -> str:
        """A bar of `width` columns, in eighths of a column where there is Unicode."""
        share = min(max(share, 0.0), 1.0)
        if self.plain:
            full = round(share * width)
            return "#" * full + "." * (width - full)
        eighths = round(8 * share * width)
        full, part = divmod(eighths, 8)
        bar = "█" * full + ("▏▎▍▌▋▊▉"[part - 1] if part else "")
        return bar + "░" * (width - len(bar))

    def _kv(self) -> str:
        scene = self.scene
        held = int(self.story.kv_after[-1]) if len(scene.rows) else 0
        share = held / max(1, scene.kv_tokens)
        label = f" {held:,} of {scene.kv_tokens:,} tokens, {100 * share:.0f} %"
        if len(label) + 20 > self.width:
            label = f" {100 * share:.0f} %"
        room = max(4, self.width - 8 - len(label))
        line = "KV      " + self._paint(self._bar(share, room), _RED if share > 0.9 else "") + label
        return line

    def _name(self, r: int) -> str:
        return self.scene.workload.name(r)

    def _listed(self, head: str, names: list[str]) -> str:
        """`head` and as many names as fit."""
        line = head
        for k, name in enumerate(names):
            left = len(names) - k - 1
            more = f" and {left:,} more" if left else ""
            if k and len(f"{line} {name}{more}") > self.width:
                return self._fit(f"{line} and {left + 1:,} more")
            line = f"{line} {name}"
        return self._fit(line)

    def _metrics(self) -> list[str]:
        """Metrics, in as many lines as they need."""
        lines: list[str] = []
        for name, value in self.scene.metrics.items():
            item = f"{name} {number(value)}"
            if lines and len(lines[-1]) + 2 + len(item) <= self.width:
                lines[-1] += f"  {item}"
            else:
                lines.append(("        " if lines else "metrics ") + item)
        return [self._fit(line, _DIM) for line in lines]

    def _queue(self) -> str:
        """Who waits, in order of arrival."""
        state = self.story.state
        waiting = np.flatnonzero(np.isin(state, [State.WAITING, State.PREEMPTED, State.SWAPPED]))
        names = [self._name(int(r)) + self._why(int(state[r])) for r in waiting]
        return self._listed(f"queue   {len(waiting):,} waiting{':' if names else ''}", names)

    @staticmethod
    def _why(state: int) -> str:
        return {int(State.PREEMPTED): "(preempted)", int(State.SWAPPED): "(swapped)"}.get(state, "")

    def _running(self) -> list[str]:
        """The running requests, in order of their lanes."""
        story, scene = self.story, self.scene
        running = np.flatnonzero(story.state == State.RUNNING)
        running = running[np.argsort(story.lane[running])]
        lines = [self._fit(f"running {len(running):,}")]
        focus = scene.focused
        listed = running[: self.most].tolist()
        if focus in running and focus not in listed:
            listed[-1] = focus
        names = [self._name(r)[:12] for r in listed]
        wide = max(map(len, names), default=0)
        room = max(8, min(30, self.width - wide - 36))
        for r, name in zip(listed, names, strict=True):
            prefill = story.cached[r] < story.target[r]
            if prefill:
                share = story.cached[r] / story.target[r]
                words = f"{story.cached[r]:,} of {story.target[r]:,}"
            else:
                limit = int(scene.workload.declared_tokens[r])
                share = story.generated[r] / max(1, limit)
                words = f"{story.generated[r]:,} of {limit:,}"
            mark = ">" if r == focus else " "
            bar = self._paint(self._bar(share, room), _CYCLE[r % len(_CYCLE)])
            lines.append(f"{mark} {name:>{wide}} {'prefill' if prefill else 'decode ':7} {bar} {words}")
        if len(running) > self.most:
            lines.append(f"  and {len(running) - self.most:,} more")
        return lines

    def _plan(self) -> str:
        """The plan being built."""
        planned = self.scene.planned
        if not len(planned):
            return "plan    nothing yet"
        words = {EVICTED: "preempt", SWAPPED_OUT: "swap out", SWAPPED_IN: "swap in"}
        total = sum(t for _, t in planned if t > 0)
        parts = [f"{words[t]} {self._name(r)}" for r, t in planned if t < 0]
        parts += [f"{self._name(r)}:{t:,}" for r, t in planned if t > 1]
        ones = [self._name(r) for r, t in planned if t == 1]
        if ones:
            parts.append(f"{len(ones):,} x 1 token:")
        return self._listed(f"plan    {total:,} token{'' if total == 1 else 's'}, {', '.join(parts)}", ones)


# ---------------------------------------------------------------------- a screen


class Window:
    """A window that shows pictures, by pygame; a process has one at a time, a second takes its place."""

    _latest: ClassVar[Window | None] = None

    def __init__(self, width: int = 960, height: int = 600, title: str = "llmsched") -> None:
        """Open a window of `width` x `height` pixels.

        Raises:
            InputError: if pygame is not installed, or there is no display.
        """
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it imports what is deprecated
                self._pygame: Any = importlib.import_module("pygame")
        except ImportError:
            raise InputError('no window without pygame; pip install "llmsched-env[render]"') from None
        self._screen: Any = None
        Window._latest = self
        try:
            self._pygame.display.init()
            self._screen = self._pygame.display.set_mode((width, height))
            self._pygame.display.set_caption(title)
        except self._pygame.error as error:
            self._pygame.display.quit()
            raise InputError(
                f"no window: {error}; on a machine without a display take the pixels of draw() instead"
            ) from None

    @property
    def open(self) -> bool:
        """Whether it still stands: `close` and the window's own button end it."""
        return self._screen is not None and Window._latest is self and bool(self._pygame.display.get_init())

    def show(self, frame: NDArray[np.uint8]) -> bool:
        """Show (H, W, 3) pixels, scaled to the window, and see to its events; returns `open`."""
        if not self.open:
            return False
        pygame = self._pygame
        for event in pygame.event.get():
            if event.type == pygame.QUIT:
                self.close()
                return False
        height, width = frame.shape[:2]
        pixels = np.ascontiguousarray(frame)
        surface = pygame.image.frombuffer(pixels.tobytes(), (width, height), "RGB")
        if surface.get_size() != self._screen.get_size():
            surface = pygame.transform.smoothscale(surface.convert(), self._screen.get_size())
        self._screen.blit(surface, (0, 0))
        pygame.display.flip()
        return True

    def close(self) -> None:
        """Close it; again does nothing."""
        if self.open:
            self._pygame.display.quit()
        self._screen = None

    def __enter__(self) -> Window:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["Painter", "Scene", "Window", "draw", "text"]
