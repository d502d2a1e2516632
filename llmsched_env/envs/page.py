"""A page that a picture is laid out on, in points and without a renderer, and who paints it.

It is painted by a handful of matplotlib collections that are kept from frame to frame; nothing uses pyplot or
its global state.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.path import Path
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray

Colour = tuple[float, float, float]
Points = NDArray[np.float64]


@lru_cache(maxsize=4)
def _font(bold: bool) -> FontProperties:
    return FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal", size=10)


@lru_cache(maxsize=32)
def _sized(size: float, bold: bool) -> FontProperties:
    font = _font(bold).copy()
    font.set_size(size)
    return font


@lru_cache(maxsize=4096)
def _clean(text: str) -> str:
    """`text` in one line and with what the font has."""
    glyphs: Any = get_font(findfont(_font(False)))
    return "".join(c if c.isprintable() and glyphs.get_char_index(ord(c)) else "?" for c in text)


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width of a line of text in points."""
    measured: Any = text_to_path
    return float(measured.get_text_width_height_descent(text, _font(bold), ismath=False)[0]) * size / 10


def shorten(text: str, width: float, size: float, bold: bool = False) -> str:
    """`text`, cut off with an ellipsis if it is wider than `width` points."""
    text = _clean(text)
    if text_width(text, size, bold) <= width:
        return text
    while text and text_width(text + "…", size, bold) > width:
        text = text[:-1]
    return text + "…" if text else ""


class Page:
    """What is on a picture of `width` x `height` points, by layer; the origin is the lower left corner."""

    LAYERS = ("backs", "grid", "waits", "bars", "cuts", "hatches", "boxes", "fills", "lines", "marks")
    FILLED = ("backs", "bars", "boxes", "fills")

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.shapes: dict[str, list[Points]] = {layer: [] for layer in self.LAYERS}
        self.strokes: dict[str, list[tuple[Path, Any, float]]] = {layer: [] for layer in self.LAYERS}
        self.colours: dict[str, list[NDArray[np.float64]]] = {layer: [] for layer in self.LAYERS}
        self.texts: list[tuple[float, float, str, float, bool, Colour]] = []

    def rects(self, layer: str, x0: Any, y0: Any, x1: Any, y1: Any, colours: Any) -> None:
        """Filled rectangles; `colours` (n, 3) or one for all."""
        x0, y0, x1, y1 = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in (x0, y0, x1, y1)))
        corners = np.stack([x0, y0, x1, y0, x1, y1, x0, y1], axis=-1).reshape(-1, 4, 2)
        self.shapes[layer].append(corners)
        self.colours[layer].append(np.broadcast_to(np.asarray(colours, float), (len(corners), 3)))

    def polygon(self, points: Points, colour: Colour) -> None:
        """A filled polygon."""
        self.shapes["fills"].append(points[None])
        self.colours["fills"].append(np.array([colour]))

    def lines(self, layer: str, x0: Any, y0: Any, x1: Any, y1: Any, colours: Any, width: float = 0.6) -> None:
        """Straight lines; `colours` (n, 3) or one for all. Those of one colour are painted as one shape."""
        x0, y0, x1, y1 = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in (x0, y0, x1, y1)))
        ends = np.stack([x0, y0, x1, y1], axis=-1).reshape(-1, 2, 2)
        colours = np.asarray(colours, float)
        if colours.ndim == 1:
            each, which = colours[None], np.zeros(len(ends), int)
        else:
            each, which = np.unique(colours, axis=0, return_inverse=True)
        for k, colour in enumerate(each):
            own = ends[which.ravel() == k]
            if len(own):
                codes = np.tile(np.array([Path.MOVETO, Path.LINETO], np.uint8), len(own))
                self._stroke(layer, Path(own.reshape(-1, 2), codes), colour, width)

    def path(self, layer: str, points: Points, colour: Colour, width: float = 0.6) -> None:
        """A line through points."""
        self._stroke(layer, Path(points), colour, width)

    def _stroke(self, layer: str, path: Path, colour: Any, width: float) -> None:
        self.strokes[layer].append((path, tuple(colour), width))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        colour: Colour = (0.13, 0.13, 0.13),
        *,
        bold: bool = False,
        align: str = "left",
        middle: bool = False,
    ) -> float:
        """A line of text with its baseline at y, or (`middle`) its middle; returns its width."""
        text = _clean(text)
        width = text_width(text, size, bold)
        if text:
            x -= {"left": 0.0, "centre": width / 2, "right": width}[align]
            self.texts.append((x, y - 0.36 * size if middle else y, text, size, bold, colour))
        return width

    def hatch(self, x0: Any, y0: Any, x1: Any, y1: Any, colours: Any, step: float) -> None:
        """Diagonal lines, `step` points apart, in rectangles; `colours` (n, 3) or one for all."""
        x0, y0, x1, y1 = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in (x0, y0, x1, y1)))
        colours = np.broadcast_to(np.asarray(colours, float), (len(x0), 3))
        shift = np.arange(0.0, float((x1 - x0 + y1 - y0).max(initial=0.0)), step)
        # x - y = c, from the lower right to the upper left corner of each rectangle
        c = (x0 - y1)[:, None] + shift[None, :]
        left = np.maximum(x0[:, None], c + y0[:, None])
        right = np.minimum(x1[:, None], c + y1[:, None])
        which, _ = keep = np.nonzero(left < right - 0.1)
        left, right, c = left[keep], right[keep], c[keep]
        self.lines("hatches", left, left - c, right, right - c, colours[which], 0.7)


class _Strokes(Artist):
    """The lines of a layer, each with a colour and a width."""

    def __init__(self, transform: Any, *, dotted: bool, snap: bool) -> None:
        super().__init__()
        self._transform_of_page, self._dotted, self._snap = transform, dotted, snap or None
        self.strokes: list[tuple[Path, Any, float]] = []

    def draw(self, renderer: Any) -> None:
        gc = renderer.new_gc()
        gc.set_snap(self._snap)
        gc.set_capstyle("butt")
        gc.set_joinstyle("miter")
        for path, colour, width in self.strokes:
            gc.set_foreground(colour, isRGBA=False)
            gc.set_linewidth(width)
            if self._dotted:
                gc.set_dashes(0, [1.2 * width, 1.8 * width])
            renderer.draw_path(gc, path, self._transform_of_page, None)
        gc.restore()


class _Labels(Artist):
    """All texts of a page, without the layout engine of matplotlib's own text."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[tuple[float, float, str, float, bool, Colour]] = []

    def draw(self, renderer: Any) -> None:
        scale = self.figure.dpi / 72
        top = renderer.height if renderer.flipy() else None
        gc = renderer.new_gc()
        for x, y, text, size, bold, colour in self.texts:
            gc.set_foreground(colour, isRGBA=False)
            at = y * scale if top is None else top - y * scale
            renderer.draw_text(gc, x * scale, at, text, _sized(size, bold), 0, ismath=False)
        gc.restore()


class Painter:
    """Paints pages of one size, keeping the figure from frame to frame."""

    def __init__(self, width: float, height: float) -> None:
        """A painter for pages of `width` x `height` points."""
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        self._layers: dict[str, Any] = {}
        points = Affine2D().scale(1 / 72) + self.figure.dpi_scale_trans
        for depth, layer in enumerate(Page.LAYERS):
            artist: Any
            if layer in Page.FILLED:
                artist = PolyCollection([], closed=True, linewidths=0, transform=points)
            else:
                artist = _Strokes(points, dotted=layer == "waits", snap=layer in ("grid", "cuts"))
            artist.set_zorder(depth)
            self.figure.add_artist(artist, clip=False)
            self._layers[layer] = artist
        self._labels = _Labels()
        self._labels.set(zorder=len(Page.LAYERS))
        self.figure.add_artist(self._labels)

    def set(self, page: Page) -> None:
        """Make `page` what is painted next."""
        for layer, artist in self._layers.items():
            if layer not in Page.FILLED:
                artist.strokes = page.strokes[layer]
                continue
            shapes = page.shapes[layer]
            artist.set_visible(any(map(len, shapes)))
            if artist.get_visible():
                same = layer != "fills"
                artist.set_verts(np.concatenate(shapes) if same else [s for group in shapes for s in group])
                artist.set_facecolor(np.concatenate(page.colours[layer]))
        self._labels.texts = page.texts

    def pixels(self, page: Page, width: int, height: int, dpi: float) -> NDArray[np.uint8]:
        """(height, width, 3) pixels of `page`."""
        self.figure.set_dpi(dpi)
        # A little more than needed, for matplotlib rounds down.
        self.figure.set_size_inches((width + 0.01) / dpi, (height + 0.01) / dpi, forward=False)
        self.set(page)
        self.canvas.draw()
        return np.array(np.asarray(self.canvas.buffer_rgba())[:, :, :3])
