"""The figures of one task: the headline against FLOPs, and where every method ended. The same bytes for the same frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.ticker import MaxNLocator

from dpgbench.report.format import and_more, decimals_for, number
from dpgbench.report.plot_style import FLOPS_AXIS, NARROW, WIDE, Canvas, DrawnFigure, canvas, cut, flops_scale, line_look
from dpgbench.report.results import BASE, ORACLE, Style, TaskResults
from dpgbench.report.task_tables import MethodRow
from dpgbench.stats.over_seeds import mean_interval

REFERENCE_LINES = {BASE: (0, (6, 3)), ORACLE: (0, (1.2, 2.2))}
HELD = (0, (1, 1.8))  # after a method's last snapshot
SEEDS_DRAWN = 3  # with more, single seeds of a dozen methods are a thicket, and the band says how far they lie apart


@dataclass(frozen=True)
class Curve:
    """One method on one task: every seed's points, and the mean where all of the method's seeds have a value."""

    label: str
    style: Style
    by_seed: dict[int, pd.DataFrame]  # columns x, value; sorted by step
    mean: pd.DataFrame  # columns x, value, low, high; sorted by step


def draw_figures(task: TaskResults, styles: dict[str, Style], rows: list[MethodRow]) -> list[DrawnFigure]:
    """Over FLOPs first, endings second. None where no finished cell has a finite score."""
    return [draw_over_flops(task, styles), draw_endings(task, styles, rows)] if has_scores(task) else []


def has_scores(task: TaskResults) -> bool:
    """Whether there is anything to draw: a finished cell with a finite score."""
    return bool(np.isfinite(task.snapshots["value"].to_numpy(dtype=float)).any())


def method_curves(task: TaskResults, styles: dict[str, Style]) -> list[Curve]:
    """The curves over FLOPs in the order of `styles`; a point without a finite value is a hole in them.

    A mean is over the seeds' snapshots at one step, and in the end over their final ones, which a budget may end at different steps.
    """
    curves = []
    for label, style in styles.items():
        rows = task.snapshots[task.snapshots["method_label"] == label]
        if rows.empty:
            continue
        rows = rows.assign(x=rows["flops"], value=rows["value"].where(np.isfinite(rows["value"])))
        if style.role != "method":  # references are levels, not curves: where they ended
            rows = rows.drop_duplicates("cell", keep="last")
        seeds = rows["seed"].nunique()
        means = []
        final = ~rows.duplicated("cell", keep="last")
        for _, at_step in [*rows[~final].groupby("step"), ("final", rows[final])]:
            score = mean_interval(at_step["value"])
            if score.n == seeds:
                means.append((at_step["x"].mean(), score.mean, score.low, score.high))
        by_seed = {int(seed): seed_rows.dropna(subset=["value"])[["x", "value"]] for seed, seed_rows in rows.groupby("seed")}
        mean = pd.DataFrame(means, columns=["x", "value", "low", "high"], dtype=float).sort_values("x", kind="stable", ignore_index=True)
        curves.append(Curve(label, style, by_seed, mean))
    return curves


def draw_over_flops(task: TaskResults, styles: dict[str, Style]) -> DrawnFigure:
    """The headline against FLOPs: a curve a method, its name at its end, base and oracle as levels."""
    curves = method_curves(task, styles)
    remarks: list[str] = []
    with canvas(4.2, WIDE) as on:
        x = np.concatenate([_drawable(points)["x"].to_numpy() for curve in curves for points in curve.by_seed.values()] or [[]])
        if len(x):
            flops_scale(on.axes, x.min(), x.max(), room=False)
        else:
            on.axes.set_xticks([])
            on.axes.text(0.5, 0.5, "no positive FLOPs recorded", transform=on.axes.transAxes, ha="center", va="center")
        for curve in curves:
            draw = _draw_reference if curve.style.role != "method" else _draw_method
            draw(on, curve, remarks)
        beyond = _limit_y(on.axes, curves, remarks)
        # A reference is a level, whatever it cost; a method stands where its last point on the axis is.
        shown = [(curve, curve.mean if curve.style.role != "method" else _drawable(curve.mean)) for curve in curves]
        several = len({len(curve.by_seed) for curve in curves}) > 1
        tails = {curve.label: f" (n={len(curve.by_seed)})" if several else "" for curve in curves} | beyond
        on.label_ends(
            [(mean["value"].iloc[-1], f"{cut(curve.label, 30)}{tails[curve.label]}", curve.style) for curve, mean in shown if len(mean)]
        )
        on.axes.set_xlabel(FLOPS_AXIS, labelpad=6)
        on.axes.set_ylabel(f"{cut(task.headline)} ({task.direction})", labelpad=6)
        on.axes.grid(False, which="both", axis="x")
        on.title(task.label)
        return on.drawn(f"{task.file_name}_flops", _alt_text(task, curves), _caption(task, curves, remarks))


def _draw_method(on: Canvas, curve: Curve, remarks: list[str]) -> None:
    """Few seeds faint behind; mean and band where all seeds have a value; an error bar for a single point; the last value held, dotted."""
    axes, style, line = on.axes, curve.style, line_look(curve.style)
    hidden, points = 0, 0
    for seed_points in curve.by_seed.values():
        drawable = _drawable(seed_points)
        hidden += len(seed_points) - len(drawable)
        points += len(drawable)
        if 1 < len(curve.by_seed) <= SEEDS_DRAWN or curve.mean.empty:
            # A lone point is a dash, wider than the mean's marker in front of it.
            single = {"marker": "_", "markersize": 16, "markeredgewidth": 1.4} if len(drawable) == 1 else {}
            look = {"color": style.color, "alpha": 0.4, "linewidth": 1.0, "zorder": 2, "gid": on.mark(style)}
            axes.plot(drawable["x"], drawable["value"], **look, **single)
    if hidden:
        remarks.append(f"{curve.label}: {hidden} point{'s' if hidden > 1 else ''} without positive FLOPs cannot stand on a log axis.")
    mean = _drawable(curve.mean)
    if mean.empty and points:
        remarks.append(f"{curve.label}: no step at which all its seeds have a value, so no mean is drawn.")
    if mean.empty:
        return
    if len(mean) == 1:
        point = mean.iloc[0]
        if np.isfinite(point["low"]):
            bars: ErrorbarContainer = axes.errorbar(
                point["x"], point["value"], yerr=[[point["value"] - point["low"]], [point["high"] - point["value"]]],
                color=style.color, fmt="none", capsize=4, linewidth=1.5, zorder=4,
            )  # fmt: skip
            for artist in (*bars.lines[1], *bars.lines[2]):
                artist.set_gid(on.mark(style))
    banded = mean.dropna(subset=["low", "high"])
    if len(banded) > 1:
        look = {"color": style.color, "alpha": 0.12, "linewidth": 0, "zorder": 1, "gid": on.mark(style)}
        axes.fill_between(banded["x"], banded["low"], banded["high"], **look)
    end, right = mean.iloc[-1], axes.get_xlim()[1]
    held = {"color": style.color, "linewidth": 1.1, "linestyle": HELD, "zorder": 3, "gid": on.mark(style)}
    axes.plot([end["x"], right], [end["value"]] * 2, **held)
    axes.plot(mean["x"], mean["value"], linewidth=2.0, zorder=4, gid=on.mark(style), **line)


def _draw_reference(on: Canvas, curve: Curve, remarks: list[str]) -> None:
    """base and oracle: a level across the whole axis, with its interval as a band and its mark where it was paid."""
    if curve.mean.empty:
        remarks.append(f"{curve.label}: a seed has no value, so its level is not drawn.")
        return
    level = curve.mean.iloc[0]
    look = {"color": curve.style.color, "linestyle": REFERENCE_LINES[curve.style.role], "linewidth": 1.4}
    if np.isfinite(level["low"]):
        band = {"color": curve.style.color, "alpha": 0.10, "linewidth": 0, "zorder": 0, "gid": on.mark(curve.style)}
        on.axes.axhspan(level["low"], level["high"], **band)
    on.axes.axhline(level["value"], zorder=3, gid=on.mark(curve.style), **look)
    paid = _drawable(curve.mean)
    on.axes.plot(paid["x"], paid["value"], zorder=5, gid=on.mark(curve.style), **line_look(curve.style) | {"linestyle": "none"})


def _drawable(points: pd.DataFrame) -> pd.DataFrame:
    finite = points[np.isfinite(points["x"])]
    return finite[finite["x"] > 0]


def _limit_y(axes: Axes, curves: list[Curve], remarks: list[str]) -> dict[str, str]:
    """Every value is inside; intervals may widen the view by 35% a side: at n=2 (t = 12.7) they would flatten all else.

    So would an oracle far above: it is left out, and {its label: what its label says then} returned.
    """
    competing = [curve for curve in curves if curve.style.role != ORACLE]
    low, high, beyond = _limits_of(competing) if competing else (0.0, 0.0, False)
    outside = {}
    for oracle in (curve for curve in curves if curve.style.role == ORACLE):
        values = np.concatenate([points["value"].to_numpy() for points in oracle.by_seed.values()])
        if low == high or (values.min() > low - (high - low) and values.max() < high + (high - low)):
            low, high, beyond = _limits_of(curves)
        elif len(oracle.mean):
            level = oracle.mean["value"].iloc[0]
            outside[oracle.label] = f" {'↑' if level > high else '↓'} at {level:.3g}"
    if low == high:
        around = 0.05 * abs(high) or 1.0
        remarks.append("All values are equal.")
        axes.set_ylim(low - around, high + around)
        return {}
    if beyond:
        remarks.append("Some intervals reach beyond the axis.")
    remarks += [f"{label} lies beyond the axis." for label in outside]
    margin = 0.05 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    return outside


def _limits_of(curves: list[Curve]) -> tuple[float, float, bool]:
    values = np.concatenate([points["value"].to_numpy() for curve in curves for points in curve.by_seed.values()])
    bounds = np.concatenate([curve.mean[["low", "high"]].to_numpy().ravel() for curve in curves])
    return limits(values, bounds) if len(values) else (0.0, 0.0, False)


def limits(values: np.ndarray, bounds: np.ndarray) -> tuple[float, float, bool]:
    """(low, high, whether a bound lies beyond): all values, and the bounds as far as 35% of their spread outside of them."""
    bounds = bounds[np.isfinite(bounds)]
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return high, high, False
    room = 0.35 * (high - low)
    bottom, top = max(min([low, *bounds]), low - room), min(max([high, *bounds]), high + room)
    return bottom, top, bool(len(bounds) and (bounds.min() < bottom or bounds.max() > top))


def draw_endings(task: TaskResults, styles: dict[str, Style], all_rows: list[MethodRow]) -> DrawnFigure:
    """A line per method, best on top: the mean and its interval at the final snapshot, seeds faint behind."""
    rows = [row for row in all_rows if np.isfinite(row.score.mean)]
    values = {row.label: task.final_values(row.label).dropna() for row in rows}
    remarks = []
    with canvas(max(1.3 + 0.25 * len(rows), 2.2), NARROW) as on:
        axes = on.axes
        for position, row in enumerate(rows):
            style = styles[row.label]
            look = {"color": style.color, "alpha": 0.45, "s": 60, "linewidths": 1.2, "marker": "|", "zorder": 2, "gid": on.mark(style)}
            axes.scatter(values[row.label], [position] * len(values[row.label]), **look)
            if np.isfinite(row.score.low):
                span = {"color": style.color, "linewidth": 2.0, "zorder": 3, "gid": on.mark(style)}
                axes.plot([row.score.low, row.score.high], [position] * 2, **span)
            axes.plot(row.score.mean, position, linestyle="none", zorder=4, gid=on.mark(style), **line_look(style))
        low, high, beyond = limits(
            np.concatenate([*values.values(), [row.score.mean for row in rows]]) if rows else np.zeros(1),
            np.array([bound for row in rows for bound in (row.score.low, row.score.high)]),
        )
        margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_xlim(low - margin, high + margin)
        axes.set_yticks(range(len(rows)), [cut(row.label, 30) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(False, axis="y")
        axes.set_xlabel(f"{cut(task.headline)} ({task.direction})", labelpad=6)
        on.title("where every method ended")
        if beyond:
            remarks.append("Some intervals reach beyond the axis.")
        unscored = [row.label for row in all_rows if not np.isfinite(row.score.mean)]
        if unscored:
            remarks.append(f"Without a finite mean: {and_more(unscored)}.")
        caption = " ".join(["Mean and 95% t interval at the final snapshot, best on top; ticks: single seeds.", *remarks])
        decimals = decimals_for(row.score.mean for row in rows)
        levels = and_more((f"{row.label} {number(row.score.mean, decimals)}" for row in rows), limit=20)
        return on.drawn(
            f"{task.file_name}_final", f"{task.label}: {task.headline} at the final snapshot. Means: {levels or 'none'}.", caption
        )


def _alt_text(task: TaskResults, curves: list[Curve]) -> str:
    """The figure for those who cannot see it: where every method ended."""
    ends = [(curve.label, curve.mean["value"].iloc[-1]) for curve in curves if len(curve.mean)]
    decimals = decimals_for(value for _, value in ends)
    levels = and_more((f"{label} {number(value, decimals)}" for label, value in ends), limit=20)
    return f"{task.label}: {task.headline} ({task.direction}) over FLOPs (log scale). Last mean of each method: {levels or 'none'}."


def _caption(task: TaskResults, curves: list[Curve], remarks: list[str]) -> str:
    parts = [f"{task.headline}, {task.direction}."]
    several = any(len(curve.by_seed) > 1 for curve in curves)
    few = any(1 < len(curve.by_seed) <= SEEDS_DRAWN for curve in curves)
    spread = (
        f"Mean over seeds, 95% t interval{', faint: single seeds' if few else ''}; dotted: a method that has ended holds its last value."
    )
    parts.append(spread if several else "One seed per method: no intervals.")
    roles = {curve.style.role for curve in curves if len(curve.mean)}
    if BASE in roles:
        parts.append("Dashed level: base, the untouched generator.")
    if ORACLE in roles:
        parts.append("Dotted level: oracle, which does not compete.")
    return " ".join([*parts, *remarks])
