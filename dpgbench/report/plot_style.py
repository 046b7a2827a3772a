"""What all figures share: the look, the two formats, labels at the curves' ends, marks that the page's filter finds."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np
import seaborn
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dpgbench.report.results import Style

INK, FAINT = "#24292f", "#d0d7de"  # inline_svg.py swaps exactly these two for the dark mode's, so nothing else may use them
FLOPS_AXIS = "compute charged to the method (FLOPs, log scale)"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Inches. On the page a wide figure (curves, with their labels) stands beside a narrow one; both are scaled alike, to 1.3 px a point.
WIDE, NARROW, WIDTH = 8.2, 5.6, 6.4
LABEL_POINTS = 12.5  # from one label to the next at the end of curves; their font has 9.5
LOOK = {
    **seaborn.axes_style("ticks"),
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10.5, "axes.labelsize": 10.5, "legend.fontsize": 10,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": FAINT,
    "axes.linewidth": 0.8, "xtick.major.width": 0.8, "ytick.major.width": 0.8, "xtick.minor.width": 0.5, "ytick.minor.width": 0.5,
    "axes.grid": True, "grid.linewidth": 0.6, "text.parse_math": False,  # a label with dollars in it is a label
    # Text stays text in the SVG: a third of the bytes, and readers, searches and screen readers find it.
    "svg.hashsalt": "dpgbench", "svg.fonttype": "none", "path.simplify": True,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class DrawnFigure:
    """One figure, and its bytes in two formats. `alt` says what is in it, `caption` how to read it and what could not be drawn."""

    file_name: str
    figure: Figure
    alt: str
    caption: str

    @property
    def wide(self) -> bool:
        """Whether it is to have the larger place on the page."""
        return self.figure.get_figwidth() > WIDTH

    @cached_property
    def png(self) -> bytes:
        return self._saved("png", dpi=130, metadata={"Software": None})

    @cached_property
    def svg(self) -> bytes:
        return _shorter(self._saved("svg", metadata={"Date": None, "Creator": None}))

    def _saved(self, kind: str, **more) -> bytes:
        """The look must hold while a figure is saved, as it did while it was drawn."""
        buffer = io.BytesIO()
        with rc_context(LOOK):
            self.figure.savefig(buffer, format=kind, facecolor="white", **more)
        return buffer.getvalue()


class Canvas:
    """One figure with one pair of axes. Without pyplot: no global figure list, no backend choice, nothing for the caller to close."""

    def __init__(self, height: float, width: float):
        self.width = width
        self.figure = Figure(figsize=(width, height), layout="constrained")
        self.figure.get_layout_engine().set(w_pad=0.1)  # inches; letters are a little wider at some resolutions than at others
        self.axes = self.figure.add_subplot()
        for side in ("top", "right"):
            self.axes.spines[side].set_visible(False)
        self._names = count()

    def mark(self, style: Style) -> str:
        """A new id for an element of this method: what the page's filter hides it by."""
        return f"method-{style.index}-{next(self._names)}"

    def title(self, text: str) -> None:
        self.axes.set_title(cut(text, 60), loc="left", fontsize=12, fontweight="bold", pad=10)

    def legend(self, entries: list[tuple[object, str, Style]], height: float) -> None:
        """Below the axes, in as many columns as fit; the figure grows with it."""
        if not entries:
            return
        columns = 3 if sum(sorted(len(text) for _, text, _ in entries)[-3:]) < 48 else 2
        self.figure.set_size_inches(self.width, height + 0.24 * math.ceil(len(entries) / columns))
        legend = self.figure.legend(
            [handle for handle, _, _ in entries], [text for _, text, _ in entries],
            loc="outside lower center", ncols=min(columns, len(entries)), frameon=False, handlelength=2.6, columnspacing=1.8,
        )  # fmt: skip
        for text, drawn, (_, _, style) in zip(legend.get_texts(), legend.legend_handles, entries, strict=True):
            text.set_gid(self.mark(style))
            drawn.set_gid(self.mark(style))

    def label_ends(self, ends: Sequence[tuple[float, str, Style]]) -> None:
        """Each (y, text, style) to the right of the axes, at its y or as near as the others let it, with the method's mark and a line to y.

        The limits of the y axis must be set. The figure grows where its labels would not fit one below the other.
        """
        if not ends:
            return
        shortest = 0.9 + (len(ends) + 1) * LABEL_POINTS / 72  # what title, ticks and axis label leave must hold all labels
        self.figure.set_figheight(max(self.figure.get_figheight(), shortest))
        low, high = self.axes.get_ylim()
        wanted = np.array([(y - low) / (high - low) for y, _, _ in ends])
        gap = LABEL_POINTS / (72 * (self.figure.get_figheight() - 0.9))
        for y, place, (_, text, style) in zip(wanted, spread(wanted, gap), ends, strict=True):
            line = {"color": style.color, "linewidth": 0.8, "transform": self.axes.transAxes, "clip_on": False}
            self.axes.plot([1.0, 1.03], [min(max(y, 0.0), 1.0), place], gid=self.mark(style), **line)
            look = line_look(style) | {"linestyle": "none", "transform": self.axes.transAxes, "clip_on": False}
            self.axes.plot(1.045, place, gid=self.mark(style), **look)
            words = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9.5, "annotation_clip": False}
            self.axes.annotate(cut(text, 32), (1.045, place), xycoords="axes fraction", gid=self.mark(style), **words)

    def drawn(self, file_name: str, alt: str, caption: str) -> DrawnFigure:
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # laid out once, for both formats
        return DrawnFigure(file_name, self.figure, alt, caption)


@contextmanager
def canvas(height: float, width: float = WIDTH) -> Iterator[Canvas]:
    """A canvas in the common look."""
    with rc_context(LOOK):
        yield Canvas(height, width)


def spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Places in [0, 1] at least `gap` apart, in the order of `wanted`, whose squared distances to `wanted` are least.

    With z_i = place_i - i gap the rule is that z does not fall: isotonic regression, cut off where places would leave [0, 1]. Where all
    do not fit, they stand as far apart as they can.
    """
    from scipy.optimize import isotonic_regression

    n = len(wanted)
    gap = min(gap, 1 / max(n - 1, 1))
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(n)
    z = np.clip(isotonic_regression(wanted[order] - steps).x, 0.0, max(1.0 - gap * (n - 1), 0.0))
    places = np.empty(n)
    places[order] = z + steps
    return places


def _shorter(svg: bytes) -> bytes:
    """Coordinates to a hundredth of a point: a third of the bytes less, nothing to see. Inside tags only: text is a reader's number."""
    return re.sub(rb"<[^>]*>", lambda tag: re.sub(rb"(?<=[0-9]\.[0-9]{2})[0-9]+", b"", tag.group()), svg)


def line_look(style: Style) -> dict[str, object]:
    """How a method's line and its markers look, everywhere."""
    # A star's and a hexagon's areas are smaller than a square's of the same size.
    size = {"*": 9.5, "h": 7.0}.get(style.marker, 6.0)
    return {"color": style.color, "marker": style.marker, "markersize": size, "markeredgecolor": "white", "markeredgewidth": 0.6}


def flops_scale(axes: Axes, low: float, high: float, *, room: bool = True) -> None:
    """A log axis that shows all of [low, high] and at least one decade, with ticks at 1, 2 and 5 times powers of ten.

    Up to 1.7 decades every tick has its number, up to 4 decades those between powers their digit, beyond only powers of ten. Without
    `room` the axis ends at `high`, where labels begin.
    """
    low, high = math.log10(low), math.log10(high)
    if high - low < 1.1:  # less than about a decade would leave a log axis with one labelled tick, or none
        missing = 1.1 - (high - low)
        low, high = (low - missing / 2, high + missing / 2) if room else (low - missing, high)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,), numticks=12))
    axes.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(_times_ten))
    decades = high - low
    axes.xaxis.set_minor_formatter(NullFormatter() if decades > 4 else FuncFormatter(_times_ten if decades <= 1.7 else _digit))
    axes.tick_params(axis="x", which="minor", labelsize=10.5 if decades <= 1.7 else 8.5)
    axes.set_xlim(10 ** (low - 0.05 * decades), 10 ** (high + (0.06 if room else 0.012) * decades))


def _digit(value: float, _position: int | None = None) -> str:
    return f"{value / 10 ** math.floor(math.log10(value) + 1e-9):.0f}"


def _times_ten(value: float, _position: int | None = None) -> str:
    """10¹¹ and 2×10¹¹ in plain characters: math text is off, because labels from data may hold dollars and backslashes."""
    if value <= 0:
        return ""
    power = "10" + f"{math.floor(math.log10(value) + 1e-9)}".translate(SUPERSCRIPTS)
    return power if _digit(value) == "1" else f"{_digit(value)}×{power}"


def cut(text: str, limit: int = 36) -> str:
    """One printable line: newlines and control characters have no glyph, and a very long label would squeeze the plot."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
