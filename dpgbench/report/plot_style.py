"""What all figures share: the look, the two formats, marks that the page's filter finds, labels that cannot break a plot."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import seaborn
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from dpgbench.report.results import Style

INK, FAINT = "#24292f", "#d0d7de"  # html.py swaps exactly these two for the dark mode's, so nothing else may use them
FLOPS_AXIS = "compute charged to the method (FLOPs, log scale)"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
WIDTH = 6.4  # inches: two stand side by side on the page, so text must survive being shown at half the page's width
LOOK = {
    **seaborn.axes_style("ticks"),
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 11, "axes.labelsize": 11, "legend.fontsize": 10,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": FAINT,
    "axes.linewidth": 0.8, "xtick.major.width": 0.8, "ytick.major.width": 0.8, "xtick.minor.width": 0.5, "ytick.minor.width": 0.5,
    "axes.grid": True, "grid.linewidth": 0.6, "text.parse_math": False,  # a label with dollars in it is a label
    # Text stays text in the SVG: a third of the bytes, and readers, searches and screen readers find it.
    "svg.hashsalt": "dpgbench", "svg.fonttype": "none", "path.simplify": True,
}  # fmt: skip


@dataclass(frozen=True)
class DrawnFigure:
    """One figure in both formats. `alt` says what is in it, `caption` how to read it and what could not be drawn."""

    file_name: str
    png: bytes
    svg: bytes
    alt: str
    caption: str


class Canvas:
    """One figure with one pair of axes. Without pyplot: no global figure list, no backend choice, nothing for the caller to close."""

    def __init__(self, height: float):
        self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
        self.axes = self.figure.add_subplot()
        for side in ("top", "right"):
            self.axes.spines[side].set_visible(False)
        self._names = count()

    def mark(self, style: Style) -> str:
        """A new id for an element of this method: what the page's filter hides it by."""
        return f"method-{style.index}-{next(self._names)}"

    def title(self, text: str) -> None:
        self.axes.set_title(cut(text, 60), loc="left", fontsize=12.5, fontweight="bold", pad=10)

    def legend(self, entries: list[tuple[object, str, Style]], height: float) -> None:
        """Below the axes, in as many columns as fit; the figure grows with it."""
        if not entries:
            return
        columns = 3 if sum(sorted(len(text) for _, text, _ in entries)[-3:]) < 48 else 2
        self.figure.set_size_inches(WIDTH, height + 0.24 * math.ceil(len(entries) / columns))
        legend = self.figure.legend(
            [handle for handle, _, _ in entries], [text for _, text, _ in entries],
            loc="outside lower center", ncols=min(columns, len(entries)), frameon=False, handlelength=2.6, columnspacing=1.8,
        )  # fmt: skip
        for text, drawn, (_, _, style) in zip(legend.get_texts(), legend.legend_handles, entries, strict=True):
            text.set_gid(self.mark(style))
            drawn.set_gid(self.mark(style))

    def drawn(self, file_name: str, alt: str, caption: str) -> DrawnFigure:
        png, svg = io.BytesIO(), io.BytesIO()
        look = {"facecolor": "white"}
        self.figure.savefig(png, format="png", dpi=130, metadata={"Software": None}, **look)
        self.figure.set_layout_engine("none")  # laid out once, for both
        self.figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None}, **look)
        return DrawnFigure(file_name, png.getvalue(), _shorter(svg.getvalue()), alt, caption)


@contextmanager
def canvas(height: float) -> Iterator[Canvas]:
    """A canvas in the common look; the look must also hold while the figure is saved."""
    with rc_context(LOOK):
        yield Canvas(height)


def _shorter(svg: bytes) -> bytes:
    """Coordinates to a hundredth of a point: a third of the bytes less, nothing to see. Inside tags only: text is a reader's number."""
    return re.sub(rb"<[^>]*>", lambda tag: re.sub(rb"(?<=[0-9]\.[0-9]{2})[0-9]+", b"", tag.group()), svg)


def line_look(style: Style) -> dict[str, object]:
    """How a method's line and its markers look, everywhere."""
    return {"color": style.color, "marker": style.marker, "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}


def flops_scale(axes: Axes, low: float, high: float) -> None:
    """A log axis that shows all of [low, high] and at least one labelled decade."""
    low, high = math.log10(low), math.log10(high)
    if high - low < 1.1:  # less than about a decade would leave a log axis with one labelled tick, or none
        low, high = (low + high) / 2 - 0.55, (low + high) / 2 + 0.55
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(10 ** (low - 0.06 * (high - low)), 10 ** (high + 0.06 * (high - low)))


def _power_of_ten(value: float, _position: int | None = None) -> str:
    """10¹¹ in plain characters: math text is off, because labels from data may hold dollars and backslashes."""
    return "10" + f"{round(math.log10(value))}".translate(SUPERSCRIPTS) if value > 0 else ""


def cut(text: str, limit: int = 36) -> str:
    """One printable line: newlines and control characters have no glyph, and a very long label would squeeze the plot."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
