"""The figures over all tasks: what a budget buys, the ranking with its critical difference, performance profiles."""

from __future__ import annotations

import numpy as np
from matplotlib.lines import Line2D

from dpgbench.report.format import and_more, number, plural
from dpgbench.report.over_tasks import THRESHOLDS, Across
from dpgbench.report.plot_style import FLOPS_AXIS, INK, NARROW, WIDE, DrawnFigure, canvas, cut, flops_scale, line_look
from dpgbench.report.results import ORACLE, SuiteResults


def draw_summary_figures(results: SuiteResults, across: Across) -> list[DrawnFigure]:
    """Those that there is something to draw for, in this order: budget, ranks, profile."""
    drawn = []
    if across.budget:
        drawn.append(_budget(results, across))
    if len(across.ranks.ranks):
        drawn.append(_ranks(results, across))
    if across.profile and across.scaled_tasks:
        drawn.append(_profile(results, across))
    return drawn


def _not_drawn(results: SuiteResults, shown: object) -> list[str]:
    left = [label for label in results.labels("method") if label not in shown]
    return [f"Without a score on every task, so not drawn: {and_more(left)}."] if left else []


def _budget(results: SuiteResults, across: Across) -> DrawnFigure:
    with canvas(4.2, WIDE) as on:
        every = [curve.flops for curve in across.budget.values()]
        flops_scale(on.axes, min(flops.min() for flops in every), max(flops.max() for flops in every), room=False)
        bounds = []
        for label, curve in across.budget.items():
            style, line = results.styles[label], line_look(results.styles[label])
            look = {"color": style.color, "zorder": 4, "linewidth": 2.2}
            whole, held = curve.flops <= curve.all_until, curve.flops >= curve.all_until
            if whole.sum() > 1:
                on.axes.plot(curve.flops[whole], curve.value[whole], gid=on.mark(style), **look)
            if held.sum() > 1:
                dotted = look | {"linewidth": 1.5, "linestyle": (0, (1, 1.6))}
                on.axes.plot(curve.flops[held], curve.value[held], gid=on.mark(style), **dotted)
            band = {"color": style.color, "alpha": 0.12, "linewidth": 0, "zorder": 1, "gid": on.mark(style)}
            on.axes.fill_between(curve.flops, curve.low, curve.high, **band)
            end = int(np.flatnonzero(whole)[-1])
            on.axes.plot(curve.flops[end], curve.value[end], zorder=5, gid=on.mark(style), **line | {"linestyle": "none", "markersize": 8})
            bounds += [curve.value, curve.low, curve.high]
        on.axes.axhline(0, color=INK, linewidth=0.8, linestyle=(0, (6, 3)), zorder=0)
        seen = np.concatenate([*bounds, [0.0]])
        low, high = np.nanmin(seen[np.isfinite(seen)]), np.nanmax(seen[np.isfinite(seen)])
        on.axes.set_ylim(low - 0.04 * (high - low or 1.0), high + 0.04 * (high - low or 1.0))
        ends = [(float(curve.value[np.isfinite(curve.value)][-1]), label, results.styles[label])
                for label, curve in across.budget.items() if np.isfinite(curve.value).any()]  # fmt: skip
        on.label_ends(ends)
        on.axes.set_xlabel(FLOPS_AXIS, labelpad=6)
        on.axes.set_ylabel("normalised score (IQM)", labelpad=6)
        on.axes.grid(False, which="both", axis="x")
        on.title("what a budget buys, over all tasks")
        only_oracles = all(found.ceiling_label == ORACLE for found in across.anchors.values())
        caption = (
            f"Interquartile mean over {plural(len(across.scaled_tasks), 'task')} and their seeds; 0 is base (dashed), 1 the oracle"
            f"{'' if only_oracles else ' or best final mean'}. From where all of a method's runs have a first snapshot; dotted after its "
            "marker, where some runs had ended and keep their last value. Bands: 95% bootstrap, seeds drawn within tasks, too narrow for "
            "few seeds."
        )
        ends = and_more((f"{label} {number(curve.value[-1], 2)}" for label, curve in across.budget.items()), 20)
        alt = f"Normalised score over FLOPs (log scale) for each method. At the largest budget: {ends}."
        return on.drawn("summary_budget", alt, " ".join([caption, *_not_drawn(results, across.budget)]))


def _ranks(results: SuiteResults, across: Across) -> DrawnFigure:
    """Critical-difference style: a line per method, bars on the right join those that the tasks do not tell apart."""
    found = across.ranks
    tasks, methods = len(found.seeds_by_task), len(found.ranks)
    with canvas(1.5 + 0.3 * methods, NARROW) as on:
        axes = on.axes
        for position, (label, rank) in enumerate(found.ranks.iterrows()):
            style = results.styles[label]
            axes.plot([1, rank["mean"]], [position] * 2, color=style.color, linewidth=0.9, alpha=0.5, zorder=2, gid=on.mark(style))
            if np.isfinite(rank["low"]):
                span = {"color": style.color, "linewidth": 3.2, "alpha": 0.45, "solid_capstyle": "butt", "zorder": 3}
                axes.plot([rank["low"], rank["high"]], [position] * 2, gid=on.mark(style), **span)
            axes.plot(rank["mean"], position, linestyle="none", zorder=4, gid=on.mark(style), **line_look(style))
        for column, group in enumerate(found.groups):
            at = methods + 0.22 + 0.16 * column
            ends = [found.ranks.index.get_loc(label) for label in (group[0], group[-1])]
            axes.plot([at, at], [ends[0] - 0.22, ends[1] + 0.22], color=INK, linewidth=3, solid_capstyle="butt", zorder=5)
        last = methods + 0.22 + 0.16 * max(len(found.groups), 1)
        shown = min(found.critical_difference, last - 1)
        axes.plot([1, 1 + shown], [-0.75] * 2, color=INK, linewidth=1.2, marker="|", markersize=7)
        more = " (wider than the axis)" if shown < found.critical_difference else ""
        axes.text(
            1 + shown / 2, -0.87, f"critical difference {found.critical_difference:.2f}{more}", ha="center", va="bottom", fontsize=9.5
        )
        axes.set_yticks(range(methods), [cut(label, 30) for label in found.ranks.index])
        axes.set_ylim(methods - 0.5, -1.35)
        axes.set_xlim(0.85, last + 0.1)
        axes.set_xticks(range(1, methods + 1))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(False, axis="y")
        axes.set_xlabel(f"mean rank over {plural(tasks, 'task')} (1 is best)", labelpad=6)
        on.title("ranking over tasks")
        joined = "; ".join(", ".join(group) for group in found.groups)
        named = f": {joined}" if len(found.groups) < 3 else ""
        alone = f"Black bars join methods whose mean ranks lie within it{named}." if joined else "Every two methods lie further apart."
        p = f" Friedman p {found.friedman_p:.2g}." if np.isfinite(found.friedman_p) else ""
        caption = (
            "Final snapshots; thick: 95% bootstrap over seeds. The critical difference (Nemenyi, 5%) takes tasks as independent blocks, "
            f"which related ones are not. {alone}{p}"
        )
        left = [f"{name} ({why})" for name, why in found.left_out.items()]
        caption += f" Left out: {and_more(left, 6)}." if left else ""
        ranks = and_more((f"{label} {rank:.2f}" for label, rank in found.ranks["mean"].items()), 20)
        return on.drawn("summary_ranks", f"Mean ranks over tasks: {ranks}.", caption)


def _profile(results: SuiteResults, across: Across) -> DrawnFigure:
    shown = [label for label in across.profile if results.styles[label].role == "method"]
    with canvas(4.4) as on:
        entries = []
        for label in shown:
            style, found = results.styles[label], across.profile[label]
            on.axes.plot(THRESHOLDS, found.value, color=style.color, linewidth=2.2, zorder=4, gid=on.mark(style))
            every = slice(style.index % 6, None, 12)  # shifted, so that markers of curves on top of each other stay visible
            marks = line_look(style) | {"linestyle": "none", "zorder": 5}
            on.axes.plot(THRESHOLDS[every], found.value[every], gid=on.mark(style), **marks)
            if np.isfinite(found.low).all():
                band = {"color": style.color, "alpha": 0.13, "linewidth": 0, "zorder": 1, "gid": on.mark(style)}
                on.axes.fill_between(THRESHOLDS, found.low, found.high, **band)
            entries.append((Line2D([], [], linewidth=2.2, **line_look(style)), cut(label), style))
        on.axes.set_ylim(-0.03, 1.03)
        on.axes.set_xlabel("normalised score τ (0: base, 1: ceiling)", labelpad=6)
        on.axes.set_ylabel("share of runs above τ", labelpad=6)
        on.title("performance profile")
        on.legend(entries, 3.9)
        caption = (
            "The share of runs whose normalised score at the final snapshot is above τ, every task weighing the same; "
            f"{plural(len(across.scaled_tasks), 'task')}. Higher is better everywhere. Bands: pointwise 95% bootstrap, seeds drawn within "
            "tasks."
        )
        half = int(np.argmin(np.abs(THRESHOLDS - 0.5)))
        at_half = and_more((f"{label} {across.profile[label].value[half]:.2f}" for label in shown), 20)
        alt = f"Performance profiles. Share of runs above half of the way to the ceiling: {at_half}."
        return on.drawn("summary_profile", alt, " ".join([caption, *_not_drawn(results, shown)]))
