"""The primary tests of a suite: each reference method of its protocol against every rival, pooled over tasks (docs/protocol.md)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from dpgbench.core.protocol import Protocol
from dpgbench.report.format import DASH, and_more, interval, number, plural, probability
from dpgbench.report.results import BASE, ORACLE, SuiteResults, TaskResults
from dpgbench.report.table import Cell, Column, Row, Table, text_cell
from dpgbench.stats.aggregates import Anchors
from dpgbench.stats.over_seeds import smallest_sign_flip_p
from dpgbench.stats.pooled import PooledComparison, advantages_by_seed, pooled_family, task_unit

Family = dict[tuple[str, str], PooledComparison]
"""By (reference, rival), in the order shown."""
Outcome = Mapping[str, tuple[str, bool]]
"""By task: the column of the finals, and whether higher is better."""


def outcomes_of(results: SuiteResults) -> dict[str, Outcome]:
    """What the primary tests are about, first, and what they are repeated on, by name."""
    found: dict[str, Outcome] = {"headline": {task.label: ("value", task.higher_is_better) for task in results.tasks}}
    by_phi: Outcome = {task.label: ("phi", True) for task in results.tasks if np.isfinite(task.finals["phi"]).any()}
    if by_phi and any(task.headline != "phi" for task in results.tasks):
        found["Φ"] = by_phi
    return found


def pooled_comparisons(results: SuiteResults, anchors: Mapping[str, Anchors], protocol: Protocol) -> Family:
    """One family: every reference against every method that both have a task with, base included and the oracle not; two references once.

    Compared are final answers: at the suite's budget a method that stopped earlier has its last. Empty without a reference.
    """
    primary, *others = outcomes_of(results).items()
    base = [task.base_label for task in results.tasks if task.base_label is not None][:1]
    rivals = [*results.labels("method"), *base]
    pairs: list[tuple[str, str]] = []
    for reference in protocol.references:
        pairs += [(reference, rival) for rival in rivals if rival != reference and (rival, reference) not in pairs]
    values = _values(results, primary[1])
    questions = {pair: found for pair in pairs if (found := _advantages(values, *pair, primary[1]))}
    gaps = {task.label: _gap(task, anchors) for task in results.tasks}
    units = {
        (a, b): {task: task_unit(values[task][a], values[task][b], gaps[task]) for task in found} for (a, b), found in questions.items()
    }
    repeated = {}
    for name, outcome in others:
        values = _values(results, outcome)
        repeated[name] = {pair: advantages for pair in questions if (advantages := _advantages(values, *pair, outcome))}
    frame = results.frame
    plug_ins = dict(zip(frame["task_label"], frame["task" if "task" in frame.columns else "task_label"].astype(str), strict=True))
    return pooled_family(questions, units, meaningful=protocol.meaningful, families=plug_ins, other_outcomes=repeated)


def _values(results: SuiteResults, outcome: Outcome) -> dict[str, dict[str, pd.Series]]:
    """The outcome at the final snapshot, by task, method and seed; read once, since picking rows is what takes the time."""
    found = {}
    for task in results.tasks:
        if task.label in outcome:
            finals = task.finals.set_index("seed")[outcome[task.label][0]].groupby(task.finals["method_label"].to_numpy())
            found[task.label] = {str(label): series for label, series in finals}
    return found


def _advantages(values: Mapping[str, Mapping[str, pd.Series]], reference: str, rival: str, outcome: Outcome) -> dict[str, pd.Series]:
    """By task, for the tasks on which both have a value with a common seed."""
    found = {}
    for task, by_method in values.items():
        if reference in by_method and rival in by_method:
            advantages = advantages_by_seed(by_method[reference], by_method[rival], higher_is_better=outcome[task][1])
            if len(advantages):
                found[task] = advantages
    return found


def _gap(task: TaskResults, anchors: Mapping[str, Anchors]) -> float:
    """|oracle - base|; NaN without an oracle that is better than base."""
    found = anchors.get(task.label)
    return abs(found.ceiling - found.base) if found and not found.why_undefined and found.ceiling_label == ORACLE else np.nan


def pooled_tables(results: SuiteResults, anchors: Mapping[str, Anchors], family: Family, protocol: Protocol) -> list[Table]:
    """For every reference two tables: what is shown, and what of it would be if the question were asked in another way."""
    tables = []
    for reference in protocol.references:
        found = {rival: comparison for (first, rival), comparison in family.items() if first == reference}
        if found:
            tables += [_table(reference, found, results, anchors, family, protocol), _sensitivity_table(reference, found, family)]
    return tables


def primary_findings(family: Family) -> list[str]:
    """What the primary tests show, in sentences: two a reference at most, and what they do not."""
    said = []
    for reference in dict.fromkeys(reference for reference, _ in family):
        by_direction = {1: [], -1: [], 0: []}
        for (first, rival), comparison in family.items():
            if first == reference:
                by_direction[comparison.direction].append(rival)
        for direction, words in ((1, "is shown to be better than"), (-1, "is shown to be worse than"), (0, "is not shown to differ from")):
            if by_direction[direction]:
                said.append(f"Over all tasks {reference} {words} {and_more(by_direction[direction], 20)}.")
    return said


def shown_over_tasks(family: Family) -> tuple[str, ...]:
    """Of `primary_findings` what is shown, for the page's first answer, where single tasks may be too few seeds to decide."""
    return tuple(primary_findings({pair: found for pair, found in family.items() if found.direction}))


def _table(
    reference: str, found: dict[str, PooledComparison], results: SuiteResults, anchors: Mapping[str, Anchors], family: Family,
    protocol: Protocol,
) -> Table:  # fmt: skip
    body = []
    for rival, comparison in sorted(found.items(), key=lambda item: -item[1].test.statistic):
        test, effect, left = comparison.test, comparison.effect, comparison.without
        spread = [without.effect for without in left.values() if np.isfinite(without.effect)]
        span = f"{number(min(spread), 3, sign=True)} to {number(max(spread), 3, sign=True)}" if spread else DASH
        breaks = comparison.breaks_without
        holds = "" if not left else f"not without {and_more(breaks, 3)}" if breaks else "holds without any"
        body.append(Row((
            text_cell(rival, small="(reference)" if rival in results.labels(BASE) else "", method=rival),
            Cell(str(len(test.tasks)), "", len(test.tasks), {"tasks": list(test.tasks)}),
            Cell(str(test.n), "", test.n, {"n": test.n}),
            Cell(number(effect.mean, 3, sign=True), interval(effect.low, effect.high, 3, sign=True).replace(DASH, ""), effect.mean,
                 {"mean": effect.mean, "low": effect.low, "high": effect.high}),
            Cell(number(test.statistic, 2, sign=True), "", test.statistic, {"statistic": test.statistic}),
            Cell(probability(test.p), "", test.p, {"p": test.p, "p_from": test.p_from, "smallest": test.smallest_p}),
            Cell(probability(comparison.holm_p), "", comparison.holm_p, {"p": comparison.holm_p}, bold=bool(comparison.direction)),
            text_cell(comparison.verdict),
            Cell(span, holds, max(spread, default=None),
                 {task: [without.effect, without.statistic, without.holm_p] for task, without in left.items()}),
        ), (rival,)))  # fmt: skip
    columns = (
        Column("against", numeric=False, best="ascending"), Column("tasks"), Column("pairs", tip="of task and seed"),
        Column("effect", tip="mean over tasks of the mean advantage, as a share of the way from base to oracle"),
        Column("S", tip="mean over tasks of mean advantage over root mean square advantage, -1 to 1"),
        Column("p", best="ascending", tip="two-sided sign flips of all pairs"),
        Column("Holm p", best="ascending"), Column("conclusion", numeric=False),
        Column("effect, one task left out", tip="the range over the tasks left out; whether the conclusion stays"),
    )  # fmt: skip
    matters = f"; a difference of {protocol.meaningful:g} or more was said beforehand to matter" if protocol.meaningful is not None else ""
    caption = (
        f"The primary tests: {reference} against every rival over all tasks that both have, final answers, paired by task and seed "
        f"(positive: {reference} is better). Effect: mean advantage as a share of the way from base to oracle, with 95% t interval"
        f"{matters}. S: the advantage of each task over its root mean square, averaged; p: its two-sided sign-flip test over all pairs, "
        f"every pattern counted; Holm-adjusted over the {plural(len(family), 'comparison')} of this family. Last column: each task left "
        "out."
    )
    notes = []
    without_gap = [task.label for task in results.tasks if task.competing() and np.isnan(_gap(task, anchors))]
    if without_gap:
        notes.append(f"No oracle better than base on {and_more(without_gap, 8)}: the effect's unit there is the spread between seeds.")
    if protocol.meaningful is not None:
        notes.append(
            "Conclusions: better or worse where Holm's p < 0.05; then meaningful where the whole interval is beyond "
            f"{protocol.meaningful:g}, below {protocol.meaningful:g} where it is within it on both sides, size open otherwise."
        )
    absent = [label for label in protocol.references if label not in results.styles]
    if absent:
        notes.append(f"References of the protocol without a cell here: {and_more(absent)}.")
    return Table(
        f"pooled-{reference}",
        f"{reference} over all tasks",
        caption,
        columns,
        tuple(body),
        tuple(notes),
        tuple(primary_findings({(reference, rival): comparison for rival, comparison in found.items()})),
    )


def _sensitivity_table(reference: str, found: dict[str, PooledComparison], family: Family) -> Table:
    """S and Holm's p of the same questions asked in other ways."""
    ways = list(dict.fromkeys(way for comparison in found.values() for way in comparison.sensitivity))
    body = []
    for rival, comparison in sorted(found.items(), key=lambda item: -item[1].test.statistic):
        answers = [(comparison.test.statistic, comparison.holm_p), *(comparison.sensitivity.get(way, (np.nan, np.nan)) for way in ways)]
        cells = [
            Cell(number(statistic, 2, sign=True), f"p {probability(p)}", statistic, {"S": statistic, "holm_p": p}, bold=bool(p < 0.05))
            if np.isfinite(statistic) else Cell(DASH)
            for statistic, p in answers
        ]  # fmt: skip
        body.append(Row((text_cell(rival, method=rival), *cells), (rival,)))
    caption = (
        "S and Holm's p of the primary tests, and of the same questions asked in other ways: a seed's pairs of all tasks flipped together "
        "(which allows for luck that a seed brings to all of them); every task's advantage in the effect's unit instead of over its root "
        "mean square (then tasks with large differences weigh more); tasks of one family weighing as one, where some share a plug-in; by "
        "other measures. Adjusted p < 0.05 in bold."
    )
    seeds = max((comparison.seeds for comparison in found.values()), default=0)
    least = smallest_sign_flip_p(seeds)
    adjusted = min(1.0, least * len(family))
    notes = ()
    if adjusted >= 0.05:
        notes = (
            f"With {seeds} seeds the smallest p that whole seeds can reach is {probability(least)}, {probability(adjusted)} "
            f"after Holm's correction for {plural(len(family), 'comparison')}, whatever the data.",
        )
    columns = (Column("against", numeric=False, best="ascending"), Column("as fixed"), *(Column(way) for way in ways))
    return Table(f"pooled-{reference}-sensitivity", f"{reference}: the same, asked otherwise", caption, columns, tuple(body), notes)
