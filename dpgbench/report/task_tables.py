"""The tables of one task: where every method ended, methods compared at equal FLOPs, what a level costs; and its holes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from dpgbench.report.format import DASH, amount, and_more, decimals_for, duration, interval, number, plural, probability
from dpgbench.report.results import BASE, ORACLE, TaskResults, natural
from dpgbench.report.table import Cell, Column, Row, Table, escape, markdown, text_cell
from dpgbench.stats.aggregates import Anchors
from dpgbench.stats.curves import CurveTable, area_over_seeds, reach_over_seeds, shared_span
from dpgbench.stats.effect_size import EffectSize, paired_effect_size
from dpgbench.stats.equal_compute import MatchedComparison, compare_at_equal_compute
from dpgbench.stats.multiple_testing import holm
from dpgbench.stats.over_seeds import Interval, PairedDifference, mean_interval, paired_difference, smallest_sign_flip_p

LEVELS = (0.5, 0.9)  # ours: half way and most of the way from base to the ceiling


@dataclass(frozen=True)
class MethodRow:
    """One method on one task at the final snapshot. `cells` counts the cells that should have a score (skipped ones should not)."""

    label: str
    role: str  # "method", "base" or "oracle"
    cells: int
    score: Interval
    difference: PairedDifference | None  # to base, paired by seed; None for base itself and where there is no base
    effect: EffectSize | None
    flops: float
    tokens_generated: float
    tokens_trained: float
    seconds: float

    @property
    def n(self) -> str:
        return str(self.score.n) if self.score.n == self.cells else f"{self.score.n} of {self.cells}"

    @property
    def remark(self) -> str:
        return {BASE: "reference", ORACLE: "not a competitor"}.get(self.role, "")


@dataclass(frozen=True)
class Gap:
    """Cells of one method that share a status and a reason."""

    method_label: str
    status: str
    seeds: tuple[int, ...]
    reason: str


def generator_for(*names: str) -> np.random.Generator:
    """The draws of one number belong to it alone: same page, same number, whatever else is on it."""
    return np.random.default_rng(zlib.crc32(" ".join(names).encode()))


def method_rows(task: TaskResults) -> list[MethodRow]:
    """Best mean first in the direction of the headline; methods without a score and the oracle last."""
    expected = task.unfinished[task.unfinished["status"] != "skipped"]
    present = pd.concat([task.finals[["method", "method_label", "cell"]], expected[["method", "method_label", "cell"]]])
    numbers = task.finals[["value", "flops", "tokens_generated", "tokens_trained", "seconds"]]
    rows = []
    for (method, label), cells in present.groupby(["method", "method_label"]):
        finals = numbers.iloc[task.rows_of_finals.get(label, [])]
        medians = {name: _median(finals[name]) for name in ("flops", "tokens_generated", "tokens_trained", "seconds")}
        difference = effect = None
        if task.base_label is not None and label != task.base_label and len(finals):
            sides = task.final_values(label), task.final_values(task.base_label)
            difference = paired_difference(*sides, generator=generator_for("sign-flip", task.label, label))
            effect = paired_effect_size(*sides)
        role = method if method in (BASE, ORACLE) else "method"
        rows.append(MethodRow(label, role, cells["cell"].nunique(), mean_interval(finals["value"]), difference, effect, **medians))

    def rank(row: MethodRow) -> tuple:
        unscored = bool(np.isnan(row.score.mean))
        return (row.role == ORACLE, unscored, 0.0 if unscored else -task.sign * row.score.mean, natural(row.label))

    return sorted(rows, key=rank)


def best_label(rows: list[MethodRow]) -> str | None:
    """The method with the best mean, references aside; None where nothing competes or the best is shared."""
    competing = [row for row in rows if row.role == "method" and np.isfinite(row.score.mean)]
    if not competing or (len(competing) > 1 and competing[0].score.mean == competing[1].score.mean):
        return None
    return competing[0].label


def table_decimals(rows: list[MethodRow]) -> int | None:
    """One number of decimals for all scores of a task, from the spread of the means."""
    return decimals_for(row.score.mean for row in rows)


def score_cell(score: Interval, decimals: int | None, **more) -> Cell:
    """A mean with its interval below; the status instead where there is no score."""
    numbers = {"mean": score.mean, "low": score.low, "high": score.high, "n": score.n}
    return Cell(number(score.mean, decimals), _interval(score, decimals), score.mean, numbers, **more)


def results_table(task: TaskResults, rows: list[MethodRow]) -> Table:
    """Every method at its final snapshot, and its difference to base with a test; Holm over the methods that compete."""
    decimals, best = table_decimals(rows), best_label(rows)
    ps = [row.difference.p if row.role == "method" and row.difference is not None else np.nan for row in rows]
    adjusted = holm(ps)
    body = []
    adjusted_t = holm([row.difference.t_p if row.role == "method" and row.difference is not None else np.nan for row in rows]).p
    for row, adjusted_p, t_p in zip(rows, adjusted.p, adjusted_t, strict=True):
        d = row.difference if row.difference is not None and row.difference.n else None
        difference, p = Cell(DASH), Cell(DASH)
        if d:
            facts = {"mean": d.mean, "low": d.low, "high": d.high, "n": d.n}
            difference = Cell(number(d.mean, decimals, sign=True), _interval(d, decimals, sign=True), d.mean, facts)
            p = p_cell(d)
        body.append(Row((
            text_cell(row.label, small=row.remark and f"({row.remark})", method=row.label),
            Cell(row.n, "", row.score.n, {"n": row.score.n, "cells": row.cells}),
            score_cell(row.score, decimals, bold=row.label == best),
            difference, effect_cell(row.effect), p,
            holm_cell(adjusted_p, t_p),
            *(Cell(words(value), "", value, {"median": value}) for words, value in (
                (amount, row.flops), (amount, row.tokens_generated), (amount, row.tokens_trained), (duration, row.seconds))),
        ), (row.label,), row.role))  # fmt: skip
    columns = (
        Column("method", numeric=False, best="ascending"), Column("n", tip="seeds with a score"),
        Column(task.headline, best="descending" if task.higher_is_better else "ascending", tip=task.direction),
        Column("difference to base", best="descending" if task.higher_is_better else "ascending"),
        Column("effect size", tip="Hedges’ g of the paired differences; the exact interval is of d, uncorrected for few seeds"),
        Column("p", best="ascending", tip="two-sided sign-flip test over the seeds, enumerated up to 12; t: paired t test"),
        Column("Holm p", best="ascending", tip="adjusted for the competing methods of this table"),
        Column("FLOPs", best="ascending"), Column("tokens generated", best="ascending"), Column("tokens trained", best="ascending"),
        Column("time", best="ascending"),
    )  # fmt: skip
    caption = (
        f"{task.headline} at the final snapshot, {task.direction}: mean over n seeds with 95% Student t interval; difference to "
        f"{task.base_label or BASE} paired by seed; effect size: Hedges' g with the interval of d; p of the two-sided sign-flip test and "
        f"of the paired t test (t), Holm-adjusted over the {plural(adjusted.tests, 'comparison')} of this table; medians of the compute."
    )
    notes = reachable_note([row.difference.n for row in rows if row.role == "method" and row.difference is not None], adjusted.tests)
    return Table(f"{task.file_name}-results", f"{task.label}: where every method ended", caption, columns, tuple(body), notes)


def effect_cell(effect: EffectSize | None) -> Cell:
    """g where there are 3 pairs or more, else d; the interval of d below, since that is the exact one."""
    if effect is None or effect.why_undefined:
        return Cell(DASH, numbers={"why": effect.why_undefined} if effect else {})
    shown = effect.g if effect.n > 2 else effect.d
    facts = {"g": effect.g, "d": effect.d, "low": effect.low, "high": effect.high, "n": effect.n}
    return Cell(number(shown, 1, sign=True), interval(effect.low, effect.high, 1, sign=True).replace(DASH, ""), shown, facts)


def p_cell(difference: PairedDifference) -> Cell:
    """p of the sign-flip test, that of the paired t test beside it."""
    d = difference
    return Cell(probability(d.p), t_words(d.t_p), d.p, {"p": d.p, "smallest": d.smallest_p, "exact": d.exact, "t_p": d.t_p})


def holm_cell(p: float, t_p: float, **more) -> Cell:
    """Holm's adjusted p of the sign-flip tests of a table, that of its paired t tests beside it."""
    return Cell(probability(p), t_words(t_p), p, {"p": p, "t_p": t_p}, **more)


def t_words(t_p: float) -> str:
    """`t 0.012`, or nothing where there is no such p."""
    return "" if np.isnan(t_p) else f"t {probability(t_p)}"


def reachable_note(pairs: Iterable[int], tests: int) -> tuple[str, ...]:
    """Where sign flips could not reach 0.05 in a family of tests: what they could reach, and how many seeds it would take.

    That is a bound on this test, not on what the data show: the paired t test, which assumes more, has none.
    """
    pairs = sorted(n for n in pairs if n)
    if not pairs or not tests:
        return ()
    most = pairs[-1]
    smallest = smallest_sign_flip_p(most)
    if tests * smallest < 0.05:
        return ()
    needed = next(n for n in range(1, 99) if tests * smallest_sign_flip_p(n) < 0.05)
    seeds = f"{most}" if pairs[0] == most else f"at most {most}"
    said = f"With {seeds} paired seed{'s' if most > 1 else ''} the smallest p that sign flips can reach is {probability(smallest)}"
    said += f", {probability(min(1.0, tests * smallest))} after Holm's correction for {tests} comparisons" if tests > 1 else ""
    return (
        f"{said}, whatever the data: below 0.05 needs {needed} seeds. The paired t test (t) has no such bound, but takes the differences "
        "to be Gaussian.",
    )


def matched_pairs(task: TaskResults) -> dict[tuple[str, str], MatchedComparison]:
    """Every two competing methods at equal FLOPs, as the advantage of the first (positive: it is better)."""
    curves = {label: CurveTable.of(task.curves(label).assign(value=lambda f: task.sign * f["value"])) for label in task.competing()}
    return {
        (a, b): compare_at_equal_compute(curves[a], curves[b], generator=generator_for("equal FLOPs", task.label, a, b))
        for a, b in combinations(curves, 2)
    }


def matched_table(task: TaskResults, pairs: dict[tuple[str, str], MatchedComparison], decimals: int | None) -> Table:
    """The pairs with an answer each, the better of the two first, the largest advantage first; the others named in a note."""
    compared = {names: found for names, found in pairs.items() if found.difference.n}
    adjusted = holm([found.difference.p for found in compared.values()])
    body = []
    adjusted_t = holm([found.difference.t_p for found in compared.values()]).p
    for ((a, b), found), adjusted_p, t_p in zip(compared.items(), adjusted.p, adjusted_t, strict=True):
        turn = -1 if found.difference.mean < 0 else 1
        first, second = (a, b) if turn > 0 else (b, a)
        d, compute = found.difference, found.by_seed["compute"].to_numpy()
        low, high = sorted((turn * d.low, turn * d.high))
        advantage = turn * d.mean + 0.0  # + 0.0: no negative zero
        effect = found.effect if turn > 0 else _turned(found.effect)
        body.append((advantage, Row((
            text_cell(first, method=first), text_cell(second, method=second), Cell(str(d.n), "", d.n, {"n": d.n}),
            Cell(amount(found.median_compute), "", found.median_compute,
                 {"median": found.median_compute, "low": compute.min(), "high": compute.max()}),
            Cell(number(advantage, decimals, sign=True), interval(low, high, decimals, sign=True).replace(DASH, ""), advantage,
                 {"mean": advantage, "low": low, "high": high, "n": d.n}),
            effect_cell(effect), p_cell(d), holm_cell(adjusted_p, t_p, bold=bool(adjusted_p < 0.05)),
        ), (first, second))))  # fmt: skip
    body.sort(
        key=lambda item: (
            bool(np.isnan(item[0])),
            -item[0] if item[0] == item[0] else 0.0,
            [natural(cell.text) for cell in item[1].cells[:2]],
        )
    )
    columns = (
        Column("method", numeric=False, best="ascending"), Column("against", numeric=False, best="ascending"), Column("n"),
        Column("FLOPs", tip="median over seeds of what the costlier of the two has spent", best="ascending"),
        Column("advantage"), Column("effect size"), Column("p", best="ascending"), Column("Holm p", best="ascending"),
    )  # fmt: skip
    caption = (
        f"Advantage in {task.headline} of the first method over the second (positive: better) for every pair of competing methods, at the "
        f"FLOPs of whichever spent more with the same seed (one that stopped earlier holds its last answer), with 95% t interval; Hedges' "
        f"g; p of the sign-flip test and of the paired t test (t), Holm-adjusted over the {plural(adjusted.tests, 'comparison')} of this "
        "table."
    )
    notes = list(reachable_note((found.difference.n for found in compared.values()), adjusted.tests))
    never = [f"{a} and {b} ({next(iter(found.left_out.values()), 'no seed')})" for (a, b), found in pairs.items() if not found.difference.n]
    if never:
        notes.append(f"Not compared: {and_more(never, limit=6)}.")
    part = [f"{a} and {b} ({len(found.left_out)})" for (a, b), found in compared.items() if found.left_out]
    if part:
        notes.append(f"Pairs of which some seeds could not be compared: {and_more(part, limit=6)}.")
    rows = tuple(row for _, row in body)
    return Table(f"{task.file_name}-equal-flops", f"{task.label}: at equal FLOPs", caption, columns, rows, tuple(notes))


def _turned(effect: EffectSize) -> EffectSize:
    return EffectSize(effect.n, -effect.d, -effect.g, -effect.high, -effect.low, effect.unpaired, effect.why_undefined)


def compute_table(task: TaskResults, anchors: Anchors | None, decimals: int | None) -> Table:
    """How much each competing method's answers yield over the FLOPs from where all have one, and what a level costs it."""
    labels = [label for label in task.competing() if len(task.curves(label))]
    several = [label for label in labels if (task.curves(label).groupby("seed").size() > 1).all()]
    low, high = shared_span(task.curves(label) for label in several) if several else (np.nan, np.nan)
    levels = {}
    if anchors is not None and not anchors.why_undefined:
        levels = {share: anchors.base + share * (anchors.ceiling - anchors.base) for share in LEVELS}
    body = []
    for label in labels:
        curves = task.curves(label)
        snapshots = int(curves.groupby("seed").size().median())
        span = float(curves["flops"].min()), float(curves["flops"].max())
        area = Cell(DASH)
        if label in several and np.isfinite(low):
            height = area_over_seeds(curves, low, high).height
            area = score_cell(height, decimals)
        reached = [_reach_cell(curves, level, task.higher_is_better) for level in levels.values()]
        span_cell = Cell(f"{amount(span[0])} to {amount(span[1])}", "", span[1], {"low": span[0], "high": span[1]})
        cells = (text_cell(label, method=label), Cell(str(snapshots), "", snapshots, {"snapshots": snapshots}), span_cell, area, *reached)
        body.append(Row(cells, (label,)))
    columns = (
        Column("method", numeric=False, best="ascending"), Column("snapshots"), Column("FLOPs"),
        Column("mean over log FLOPs", best="descending" if task.higher_is_better else "ascending", tip="area under the curve / decades"),
        *(Column(f"FLOPs to {number(level, decimals)}", small=f"{share:.0%}", best="ascending") for share, level in levels.items()),
    )  # fmt: skip
    notes = []
    spanned = ""
    if np.isfinite(low):
        spanned = f"from {amount(low)} FLOPs, where every seed of every method with a curve has an answer, to {amount(high)}"
    if not spanned:
        notes.append("There is no span of FLOPs in which all have an answer, so there are no areas to compare.")
    if set(labels) - set(several):
        notes.append(f"One snapshot is a point, not a curve: {and_more(label for label in labels if label not in several)}.")
    caption = (
        f"Mean over log FLOPs: the area under {task.headline} over log FLOPs per decade{', ' + spanned if spanned else ''}. At every "
        "budget a method has the answer of its last snapshot within it."
    )
    if levels:
        ceiling = "the oracle" if anchors.ceiling_label == ORACLE else f"the best final mean ({anchors.ceiling_label})"
        caption += (
            f" Levels: shares of the way from base to {ceiling}; median FLOPs of the first snapshot that reaches it, a seed that never "
            "does counting as more than any other, and how many seeds do."
        )
    elif anchors is not None:
        notes.append(f"No level to reach: {anchors.why_undefined}.")
    return Table(f"{task.file_name}-compute", f"{task.label}: what it takes", caption, columns, tuple(body), tuple(notes))


def _reach_cell(curves: pd.DataFrame, level: float, higher_is_better: bool) -> Cell:
    found = reach_over_seeds(curves, level, higher_is_better=higher_is_better)
    facts = {"median": found.median, "reached": found.reached, "n": found.n}
    count = f"({found.reached} of {found.n})"
    if not found.reached:
        return Cell("not reached", count, np.inf, facts)
    if np.isnan(found.median):
        return Cell("not reached by half", count, 1e300, facts)
    at_first = all(crossing.at_first for crossing in found.by_seed.values() if crossing.reached)
    return Cell(("≤ " if at_first else "") + amount(found.median), count, found.median, facts)


def tables_of_task(
    task: TaskResults, rows: list[MethodRow], pairs: Mapping[tuple[str, str], MatchedComparison], anchors: Anchors | None
) -> list[Table]:
    """The tables of a task that have a row."""
    decimals = table_decimals(rows)
    tables = [results_table(task, rows), matched_table(task, dict(pairs), decimals), compute_table(task, anchors, decimals)]
    return [table for table in tables if table.rows or (table.notes and pairs)]


def gaps(task: TaskResults) -> list[Gap]:
    """Cells without a result, grouped by method, status and reason."""
    reasons = task.unfinished["reason"].fillna("").astype(str).str.strip()
    grouped = task.unfinished.assign(reason=reasons).groupby(["method_label", "status", "reason"])["seed"]
    found = [Gap(label, status, tuple(sorted(seeds)), reason or "no reason recorded") for (label, status, reason), seeds in grouped]
    return sorted(found, key=lambda gap: (natural(gap.method_label), gap.status, gap.reason))


def notes_on(task: TaskResults, rows: list[MethodRow]) -> list[str]:
    """What a reader must know before trusting a task's tables, in words."""
    notes = list(task.notes)
    if any(row.score.n == 1 for row in rows):
        notes.append("One seed has no interval: a single run says nothing about the spread between runs.")
    drawn = [row.label for row in rows if row.difference is not None and not row.difference.exact]
    if drawn:
        notes.append(f"More than 12 pairs: p estimated from 20,000 drawn sign patterns for {and_more(drawn)}.")
    unpaired = [f"{row.label} ({row.difference.unpaired})" for row in rows if row.difference is not None and row.difference.unpaired]
    if unpaired:
        notes.append(f"Seeds without a partner, left out of the difference to {task.base_label}: {and_more(unpaired)}.")
    return notes


def task_markdown(task: TaskResults, tables: list[Table], rows: list[MethodRow]) -> str:
    """One task: its tables, notes and gaps. Ends with one newline; the same frame gives the same bytes."""
    lines = [f"# {escape(task.label)}", ""]
    if task.description:
        lines += [escape(task.description), ""]
    for note in notes_on(task, rows):
        lines += [f"> {escape(note)}", ""]
    lines += [markdown(table) for table in tables]
    missing = gaps(task)
    if missing:
        lines += ["## Without a result", ""]
        for gap in missing:
            seeds = f"seed{'s' if len(gap.seeds) > 1 else ''} {and_more(gap.seeds)}"
            lines.append(f"- {escape(gap.method_label)}: {len(gap.seeds)} {gap.status} ({seeds}): {escape(shortened(gap.reason))}")
    return "\n".join(lines).rstrip("\n") + "\n"


def shortened(text: str, limit: int = 300) -> str:
    """One line of at most `limit` characters: a reason can be a whole traceback, whose last line says most."""
    text = text.strip()
    if text.startswith("Traceback") and "\n" in text:
        text = text.splitlines()[-1]
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _interval(found: Interval | PairedDifference, decimals: int | None, *, sign: bool = False) -> str:
    return interval(found.low, found.high, decimals, sign=sign).replace(DASH, "")


def _median(values: pd.Series) -> float:
    present = values.dropna()
    return float(present.median()) if len(present) else float("nan")
