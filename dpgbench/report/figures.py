"""Metric against compute: one figure over FLOPs and one over steps per task, as PNG and SVG, the same bytes for the same frame."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from itertools import count

import numpy as np
import pandas as pd
import seaborn
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from dpgbench.report.frame import BASE, ORACLE, Style, TaskResults
from dpgbench.report.writing import and_more, decimals_for, number
from dpgbench.stats import mean_interval

INK, FAINT = "#24292f", "#d0d7de"  # page.py swaps exactly these two for the dark mode's, so nothing else may use them
AXES = {"flops": "compute charged to the method (FLOPs, log scale)", "steps": "step (each method's own counter)"}
REFERENCE_LINES = {BASE: (0, (6, 3)), ORACLE: (0, (1.2, 2.2))}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
WIDTH = 6.4  # inches: two stand side by side on the page, so text must survive being shown at half the page's width
LOOK = {
    **seaborn.axes_style("ticks"),
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 11, "axes.labelsize": 11, "legend.fontsize": 10,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": FAINT,
    "axes.linewidth": 0.8, "xtick.major.width": 0.8, "ytick.major.width": 0.8, "xtick.minor.width": 0.5, "ytick.minor.width": 0.5,
    "axes.grid": True, "grid.linewidth": 0.6, "text.parse_math": False,  # a label with dollars in it is a label
    "svg.hashsalt": "dpgbench", "svg.fonttype": "path", "path.simplify": True,
}  # fmt: skip


@dataclass(frozen=True)
class DrawnFigure:
    """One figure in both formats. `alt` says what is in it, `caption` how to read it and what could not be drawn."""

    file_name: str
    png: bytes
    svg: bytes
    alt: str
    caption: str


@dataclass(frozen=True)
class Curve:
    """One method on one task: every seed's points, and the mean where all of the method's seeds have a value."""

    label: str
    style: Style
    by_seed: dict[int, pd.DataFrame]  # columns x, value; sorted by step
    mean: pd.DataFrame  # columns x, value, low, high; sorted by step


def draw_figures(task: TaskResults, styles: dict[str, Style]) -> list[DrawnFigure]:
    """The figures of one task: over FLOPs first, over steps second. None where no finished cell has a finite score."""
    if not np.isfinite(task.snapshots["value"].to_numpy(dtype=float)).any():
        return []
    return [_draw(task, styles, axis) for axis in AXES]


def _curves(task: TaskResults, styles: dict[str, Style], column: str) -> list[Curve]:
    curves = []
    for label, style in styles.items():
        rows = task.snapshots[task.snapshots["method_label"] == label]
        if rows.empty:
            continue
        rows = rows.assign(x=rows[column], value=rows["value"].where(np.isfinite(rows["value"])))
        if style.role != "method":  # references are levels, not curves: where they ended
            rows = rows.drop_duplicates("cell", keep="last")
        seeds = rows["seed"].nunique()
        means = []
        for _, at_step in rows.groupby("step") if style.role == "method" else [(0, rows)]:
            score = mean_interval(at_step["value"])
            if score.n == seeds:
                means.append((at_step["x"].mean(), score.mean, score.low, score.high))
        by_seed = {int(seed): seed_rows.dropna(subset=["value"])[["x", "value"]] for seed, seed_rows in rows.groupby("seed")}
        curves.append(Curve(label, style, by_seed, pd.DataFrame(means, columns=["x", "value", "low", "high"], dtype=float)))
    return curves


def _draw(task: TaskResults, styles: dict[str, Style], axis: str) -> DrawnFigure:
    curves = _curves(task, styles, "flops" if axis == "flops" else "step")
    remarks: list[str] = []
    with rc_context(LOOK):
        # Without pyplot: no global figure list, no backend choice, nothing for the caller to close.
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        axes = figure.add_subplot()
        names = count()
        handles = []
        for curve in curves:
            draw = _draw_reference if curve.style.role != "method" else _draw_method
            handle = draw(axes, curve, axis, remarks, lambda index=curve.style.index: f"method-{index}-{next(names)}")
            if handle is not None:
                handles.append((handle, curve))
        _limit_y(axes, curves, remarks)
        _label_axes(axes, task, axis, curves)
        columns = 3 if sum(sorted(len(_legend_text(curve)) for _, curve in handles)[-3:]) < 48 else 2
        figure.set_size_inches(WIDTH, 3.9 + 0.24 * math.ceil(len(handles) / columns))
        legend = figure.legend(
            [handle for handle, _ in handles], [_legend_text(curve) for _, curve in handles],
            loc="outside lower center", ncols=min(columns, len(handles)), frameon=False, handlelength=2.6, columnspacing=1.8,
        ) if handles else None  # fmt: skip
        if legend is not None:
            for text, drawn, (_, curve) in zip(legend.get_texts(), legend.legend_handles, handles, strict=True):
                text.set_gid(f"method-{curve.style.index}-{next(names)}")
                drawn.set_gid(f"method-{curve.style.index}-{next(names)}")
        png, svg = _bytes(figure)
    return DrawnFigure(f"{task.file_name}_{axis}", png, svg, _alt_text(task, axis, curves), _caption(task, curves, remarks))


def _draw_method(axes: Axes, curve: Curve, axis: str, remarks: list[str], name) -> Line2D | None:
    """Seeds faint behind; mean and band where all seeds have a value; a marker with an error bar for a single point."""
    style = curve.style
    line = {"color": style.color, "marker": style.marker, "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
    hidden, points = 0, 0
    for seed_points in curve.by_seed.values():
        drawable = _drawable(seed_points, axis)
        hidden += len(seed_points) - len(drawable)
        points += len(drawable)
        if len(curve.by_seed) > 1 or curve.mean.empty:
            # A lone point is a dash, wider than the mean's marker in front of it.
            single = {"marker": "_", "markersize": 16, "markeredgewidth": 1.4} if len(drawable) == 1 else {}
            axes.plot(drawable["x"], drawable["value"], color=style.color, alpha=0.4, linewidth=1.0, zorder=2, gid=name(), **single)
    if hidden:
        remarks.append(f"{curve.label}: {hidden} point{'s' if hidden > 1 else ''} without positive FLOPs cannot stand on a log axis.")
    mean = _drawable(curve.mean, axis)
    if mean.empty and points:
        remarks.append(f"{curve.label}: no step at which all its seeds have a value, so no mean is drawn.")
    if len(mean) == 1:
        point = mean.iloc[0]
        if np.isfinite(point["low"]):
            bars: ErrorbarContainer = axes.errorbar(
                point["x"], point["value"], yerr=[[point["value"] - point["low"]], [point["high"] - point["value"]]],
                color=style.color, fmt="none", capsize=4, linewidth=1.5, zorder=4,
            )  # fmt: skip
            for artist in (*bars.lines[1], *bars.lines[2]):
                artist.set_gid(name())
        axes.plot(mean["x"], mean["value"], linestyle="none", zorder=5, gid=name(), **{**line, "markersize": 8.5})
        return Line2D([], [], linestyle="none", **{**line, "markersize": 8.5})
    if len(mean):
        banded = mean.dropna(subset=["low", "high"])
        if len(banded):
            axes.fill_between(banded["x"], banded["low"], banded["high"], color=style.color, alpha=0.15, linewidth=0, zorder=1, gid=name())
        axes.plot(mean["x"], mean["value"], linewidth=2.2, zorder=4, gid=name(), **line)
    return Line2D([], [], linewidth=2.2, **line) if points else None


def _draw_reference(axes: Axes, curve: Curve, axis: str, remarks: list[str], name) -> Line2D | None:
    """base and oracle: a level across the whole axis, with its interval as a band."""
    if curve.mean.empty:
        remarks.append(f"{curve.label}: a seed has no value, so its level is not drawn.")
        return None
    level = curve.mean.iloc[0]
    look = {"color": curve.style.color, "linestyle": REFERENCE_LINES[curve.style.role], "linewidth": 1.6}
    if np.isfinite(level["low"]):
        axes.axhspan(level["low"], level["high"], color=curve.style.color, alpha=0.10, linewidth=0, zorder=0, gid=name())
    axes.axhline(level["value"], zorder=3, gid=name(), **look)
    return Line2D([], [], **look)


def _drawable(points: pd.DataFrame, axis: str) -> pd.DataFrame:
    finite = points[np.isfinite(points["x"])]
    return finite[finite["x"] > 0] if axis == "flops" else finite


def _limit_y(axes: Axes, curves: list[Curve], remarks: list[str]) -> None:
    """Every value is inside; intervals may widen the view by 35% a side: at n=2 (t = 12.7) they would flatten all else."""
    values = np.concatenate([points["value"].to_numpy() for curve in curves for points in curve.by_seed.values()])
    bounds = np.concatenate([curve.mean[["low", "high"]].to_numpy().ravel() for curve in curves])
    bounds = bounds[np.isfinite(bounds)]
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        around = 0.05 * abs(high) or 1.0
        remarks.append("All values are equal.")
        axes.set_ylim(low - around, high + around)
        return
    room = 0.35 * (high - low)
    bottom = max(min([low, *bounds]), low - room)
    top = min(max([high, *bounds]), high + room)
    if len(bounds) and (bounds.min() < bottom or bounds.max() > top):
        remarks.append("Some intervals reach beyond the axis.")
    margin = 0.05 * (top - bottom)
    axes.set_ylim(bottom - margin, top + margin)


def _label_axes(axes: Axes, task: TaskResults, axis: str, curves: list[Curve]) -> None:
    x = np.concatenate([_drawable(points, axis)["x"].to_numpy() for curve in curves for points in curve.by_seed.values()] or [[]])
    if axis == "flops":
        if len(x):
            low, high = math.log10(x.min()), math.log10(x.max())
            if high - low < 1.1:  # less than about a decade would leave a log axis with one labelled tick, or none
                low, high = (low + high) / 2 - 0.55, (low + high) / 2 + 0.55
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(_power_of_ten))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlim(10 ** (low - 0.06 * (high - low)), 10 ** (high + 0.06 * (high - low)))
        else:
            axes.set_xticks([])
            axes.text(0.5, 0.5, "no positive FLOPs recorded", transform=axes.transAxes, ha="center", va="center")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(AXES[axis], labelpad=6)
    axes.set_ylabel(f"{_cut(task.headline)} ({task.direction})", labelpad=6)
    axes.set_title(_cut(task.label, 60), loc="left", fontsize=12.5, fontweight="bold", pad=10)
    axes.grid(True, which="major", axis="y")
    axes.grid(False, which="both", axis="x")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _power_of_ten(value: float, _position: int | None = None) -> str:
    """10¹¹ in plain characters: math text is off, because labels from data may hold dollars and backslashes."""
    return "10" + f"{round(math.log10(value))}".translate(SUPERSCRIPTS) if value > 0 else ""


def _legend_text(curve: Curve) -> str:
    return f"{_cut(curve.label)} (n={len(curve.by_seed)})"


def _bytes(figure: Figure) -> tuple[bytes, bytes]:
    png, svg = io.BytesIO(), io.BytesIO()
    look = {"bbox_inches": "tight", "pad_inches": 0.08, "facecolor": "white"}
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None}, **look)
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None}, **look)
    return png.getvalue(), svg.getvalue()


def _alt_text(task: TaskResults, axis: str, curves: list[Curve]) -> str:
    """The figure for those who cannot see it: where every method ended."""
    ends = [(curve.label, curve.mean["value"].iloc[-1]) for curve in curves if len(curve.mean)]
    decimals = decimals_for(value for _, value in ends)
    levels = and_more((f"{label} {number(value, decimals)}" for label, value in ends), limit=20)
    over = "FLOPs (log scale)" if axis == "flops" else "steps"
    return f"{task.label}: {task.headline} ({task.direction}) over {over}. Last mean of each method: {levels or 'none'}."


def _caption(task: TaskResults, curves: list[Curve], remarks: list[str]) -> str:
    parts = [f"{task.headline}, {task.direction}."]
    several = any(len(curve.by_seed) > 1 for curve in curves)
    spread = "Bold: mean over seeds; band or bar: 95% t interval; faint: single seeds."
    parts.append(spread if several else "One seed per method: no intervals.")
    roles = {curve.style.role for curve in curves if len(curve.mean)}
    if BASE in roles:
        parts.append("Dashed: base, the untouched generator.")
    if ORACLE in roles:
        parts.append("Dotted: oracle, which does not compete.")
    return " ".join([*parts, *remarks])


def _cut(text: str, limit: int = 36) -> str:
    """One printable line: newlines and control characters have no glyph, and a very long label would squeeze the plot."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
