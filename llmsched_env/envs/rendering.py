"""Pictures of a schedule as it happens: `draw` (pixels), `text` (a terminal) and `Window` (a screen).

A picture is first laid out on a `Page`, in points and without a renderer, and then painted by a handful of
matplotlib collections that are kept from frame to frame (`Painter`). Nothing uses pyplot or its global state.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray

Colour = tuple[float, float, float]
Points = NDArray[np.float64]

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


# ---------------------------------------------------------------------- a page


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

    LAYERS = ("backs", "grid", "waits", "bars", "cuts", "fills", "lines", "marks")
    FILLED = ("backs", "bars", "fills")

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.shapes: dict[str, list[Points]] = {layer: [] for layer in self.LAYERS}
        self.colours: dict[str, list[NDArray[np.float64]]] = {layer: [] for layer in self.LAYERS}
        self.widths: dict[str, list[float]] = {layer: [] for layer in self.LAYERS}
        self.texts: list[tuple[float, float, str, float, bool, Colour]] = []

    def rects(self, layer: str, x0: Any, y0: Any, x1: Any, y1: Any, colours: Any) -> None:
        """Filled rectangles; `colours` (n, 3) or one for all."""
        x0, y0, x1, y1 = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in (x0, y0, x1, y1)))
        corners = np.stack([x0, y0, x1, y0, x1, y1, x0, y1], axis=-1).reshape(-1, 4, 2)
        self.shapes[layer].extend(corners)
        self.colours[layer].append(np.broadcast_to(np.asarray(colours, float), (len(corners), 3)))

    def polygon(self, points: Points, colour: Colour) -> None:
        """A filled polygon."""
        self.shapes["fills"].append(points)
        self.colours["fills"].append(np.array([colour]))

    def lines(self, layer: str, x0: Any, y0: Any, x1: Any, y1: Any, colours: Any, width: float = 0.6) -> None:
        """Straight lines; `colours` (n, 3) or one for all."""
        x0, y0, x1, y1 = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in (x0, y0, x1, y1)))
        ends = np.stack([x0, y0, x1, y1], axis=-1).reshape(-1, 2, 2)
        self.shapes[layer].extend(ends)
        self.colours[layer].append(np.broadcast_to(np.asarray(colours, float), (len(ends), 3)))
        self.widths[layer].extend([width] * len(ends))

    def path(self, layer: str, points: Points, colour: Colour, width: float = 0.6) -> None:
        """A line through points."""
        self.shapes[layer].append(points)
        self.colours[layer].append(np.array([colour]))
        self.widths[layer].append(width)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = _SMALL,
        colour: Colour = _INK,
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

    def hatch(self, x0: Points, y0: Points, x1: Points, y1: Points, colours: Points, step: float) -> None:
        """Diagonal lines in rectangles."""
        shift = np.arange(0.0, float((x1 - x0 + y1 - y0).max(initial=0.0)), step)
        # x - y = c, from the lower right to the upper left corner of each rectangle
        c = (x0 - y1)[:, None] + shift[None, :]
        left = np.maximum(x0[:, None], c + y0[:, None])
        right = np.minimum(x1[:, None], c + y1[:, None])
        which, _ = keep = np.nonzero(left < right - 0.1)
        left, right, c = left[keep], right[keep], c[keep]
        self.lines("cuts", left, left - c, right, right - c, colours[which], 0.7)


class _Labels(Artist):
    """All texts of a page, without the layout engine of matplotlib's own text."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[tuple[float, float, str, float, bool, Colour]] = []

    def draw(self, renderer: Any) -> None:
        scale = self.figure.dpi / 72  # type: ignore[union-attr]
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
                artist = PolyCollection([], closed=True, linewidths=0)
            else:
                artist = LineCollection([])
                artist.set_capstyle("butt")
                if layer == "waits":
                    artist.set_linestyle((0, (1, 1.6)))
            artist.set(transform=points, zorder=depth)
            self.figure.add_artist(artist, clip=False)
            self._layers[layer] = artist
        self._labels = _Labels()
        self._labels.set(zorder=len(Page.LAYERS))
        self.figure.add_artist(self._labels)

    def set(self, page: Page) -> None:
        """Make `page` what is painted next."""
        for layer, artist in self._layers.items():
            artist.set_visible(bool(page.shapes[layer]))
            if not page.shapes[layer]:
                continue
            colours = np.concatenate(page.colours[layer])
            if layer in Page.FILLED:
                artist.set_verts(page.shapes[layer])
                artist.set_facecolor(colours)
            else:
                artist.set_segments(page.shapes[layer])
                artist.set_color(colours)
                artist.set_linewidth(page.widths[layer])
        self._labels.texts = page.texts

    def pixels(self, page: Page, width: int, height: int, dpi: float) -> NDArray[np.uint8]:
        """(height, width, 3) pixels of `page`."""
        self.figure.set_dpi(dpi)
        # A little more than needed, for matplotlib rounds down.
        self.figure.set_size_inches((width + 0.01) / dpi, (height + 0.01) / dpi, forward=False)
        self.set(page)
        self.canvas.draw()
        return np.array(np.asarray(self.canvas.buffer_rgba())[:, :, :3])
