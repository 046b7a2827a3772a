"""The page's first answer: at each of three budgets, the best method of every task, its lead over the next, and whether a test shows it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dpgbench.report import task_tables
from dpgbench.report.format import DASH, amount, and_more, interval, number, plural, probability
from dpgbench.report.results import ORACLE, SuiteResults, TaskResults, natural
from dpgbench.report.table import Cell, Column, Row, Table, text_cell
from dpgbench.report.task_tables import MethodRow
from dpgbench.stats.curves import CurveTable
from dpgbench.stats.multiple_testing import BetterThanAll, better_than_all, holm
from dpgbench.stats.over_seeds import PairedDifference, paired_difference

SHARES = ((0.1, "a tenth"), (1 / 3, "a third"), (1.0, "all"))
SLACK = 1.01  # of any of the three: an answer may end a hair above its budget, as a run's own may
SIGNIFICANT = 0.05
# In a stored configuration. Read as text: a YAML parser takes longer for five hundred of them than all the rest of this table.
DECLARED = re.compile(r"(?m)^budget:\n(?:[ ]+[^\n]*\n)*?[ ]+flops: ([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)[ ]*$")


@dataclass(frozen=True)
class Best:
    """The best answer to a task at a budget: who gave it, who is next, the lead, and whether it is better than every other's."""

    label: str
    next_label: str
    score: float
    lead: PairedDifference
    verdict: BetterThanAll


def budget_of(task: TaskResults) -> float:
    """The FLOPs that the task's cells were given, where all name the same; else the most that a finished cell which competes has spent.

    NaN where nothing that competes has a result.
    """
    competing = task.finals[task.finals["method_label"].isin(task.competing())]
    declared = {match[1] if (match := DECLARED.search(str(spec))) else None for spec in competing["spec"]}
    if len(declared) == 1 and (only := declared.pop()):
        return float(only)
    spent = competing["flops"][competing["flops"] > 0]
    return float(spent.max()) if len(spent) else float("nan")


def curves_of(task: TaskResults) -> dict[str, CurveTable]:
    """Of every method but the oracle, which is no answer one could have, and those of which a seed has no snapshot at a known price."""
    labels = task.snapshots.loc[task.snapshots["method"] != ORACLE, "method_label"].unique()
    curves = {label: CurveTable.of(task.curves(label)) for label in sorted(labels, key=natural)}
    return {label: curve for label, curve in curves.items() if len(curve.seeds) == len(task.rows_of_finals[label])}


def answers_at(curves: CurveTable, flops: float) -> pd.Series | None:
    """What a method answers with `flops` to spend, by seed: its last snapshot that they pay for, also after it has ended.

    None where one of its seeds has no snapshot yet, or no value: a mean over fewer seeds than beside it would not compare.
    """
    values = curves.at(np.full(len(curves.seeds), SLACK * flops))
    return pd.Series(values, index=curves.seeds) if len(values) and np.isfinite(values).all() else None


def best_at(task: TaskResults, curves: Mapping[str, CurveTable], flops: float) -> Best | None:
    """None with fewer than two methods that have an answer by then."""
    values = {label: task.sign * found for label, curve in curves.items() if (found := answers_at(curve, flops)) is not None}
    if len(values) < 2:
        return None
    first, second = sorted(values, key=lambda label: -values[label].mean())[:2]
    differences = {
        label: paired_difference(
            values[first], values[label], generator=task_tables.generator_for("best at", f"{flops:.6g}", task.label, first, label)
        )
        for label in values
        if label != first
    }
    return Best(first, second, task.sign * float(values[first].mean()), differences[second], better_than_all(differences))


def budgets_table(results: SuiteResults, rows: Mapping[str, list[MethodRow]]) -> Table:
    """Tasks x budgets: who is best, by how much, and whether that is shown. Each budget's tests are a family of their own.

    `rows` has every task's methods, whose means say how many decimals its scores need.
    """
    budgets = {task.label: budget_of(task) for task in results.tasks}
    same = len({f"{budget:.3g}" for budget in budgets.values()}) == 1
    found = {}
    for task in results.tasks:
        curves = curves_of(task) if np.isfinite(budgets[task.label]) else {}
        for share, _ in SHARES:
            if best := best_at(task, curves, share * budgets[task.label]):
                found[task.label, share] = best
    adjusted: dict[tuple[str, float], float] = {}
    for share, _ in SHARES:
        family = [key for key in found if key[1] == share]
        adjusted |= dict(zip(family, holm([found[key].verdict.p for key in family]).p, strict=True))
    body = []
    for task in results.tasks:
        budget = budgets[task.label]
        given = "" if same or not np.isfinite(budget) else f"; all: {amount(budget)} FLOPs"
        cells = [text_cell(task.label, small=f"{task.headline} {task.arrow}{given}")]
        decimals = task_tables.table_decimals(rows[task.label])
        for share, _ in SHARES:
            best = found.get((task.label, share))
            cells.append(_cell(best, adjusted[task.label, share], decimals, share * budget) if best else Cell(DASH))
        body.append(Row(tuple(cells)))
    columns = (
        Column("task", numeric=False, best="ascending"),
        *(Column(f"{words} of the budget", amount(share * next(iter(budgets.values()))) + " FLOPs" if same else "", numeric=False,
                 best="ascending") for share, words in SHARES),
    )  # fmt: skip
    caption = (
        "The method with the best mean answer at each budget, its lead over the next best with 95% t interval (positive: better), and "
        "whether it is shown to be better than every other, base included: the largest of its paired sign-flip p's, Holm-adjusted over the "
        f"tasks of a column, below {SIGNIFICANT}. An answer at a budget is the last snapshot that it pays for, to within 1%; a "
        "method that ends early keeps its last one, and one without a snapshot on every seed by then does not take part."
    )
    pairs = {share: [best.verdict.n for (_, at), best in found.items() if at == share] for share, _ in SHARES}
    most = max(pairs.values(), key=len, default=[])
    notes = task_tables.reachable_note(most, len(most))
    return Table("budgets", f"{results.name}: the best at three budgets", caption, columns, tuple(body), notes, _said(found, adjusted))


def _cell(best: Best, p: float, decimals: int | None, flops: float) -> Cell:
    lead = best.lead
    bounds = interval(lead.low, lead.high, decimals, sign=True).replace(DASH, "")
    shown = bool(p < SIGNIFICANT)
    verdict = "no test" if np.isnan(p) else f"{'shown' if shown else 'not shown'}, p {probability(p)}"
    small = f"{number(lead.mean, decimals, sign=True)} {bounds}".rstrip() + f" over {best.next_label}; {verdict}"
    numbers = {
        "method": best.label, "next": best.next_label, "flops": flops, "mean": best.score, "lead": lead.mean, "low": lead.low,
        "high": lead.high, "n": best.verdict.n, "p": best.verdict.p, "holm_p": p, "shown": shown,
    }  # fmt: skip
    return Cell(best.label, small, best.label, numbers, bold=shown, method=best.label)


def _said(found: dict[tuple[str, float], Best], adjusted: dict[tuple[str, float], float]) -> tuple[str, ...]:
    """A sentence a budget: what is shown, then who leads how often without that being shown."""
    said = []
    for share, words in SHARES:
        column = {task: best for (task, at), best in found.items() if at == share}
        if not column:
            continue
        shown = {task: best.label for task, best in column.items() if adjusted[task, share] < SIGNIFICANT}
        leads = Counter(best.label for task, best in column.items() if task not in shown)
        ordered = sorted(leads.items(), key=lambda item: (-item[1], natural(item[0])))
        parts = [f"shown best: {and_more((f'{label} on {task}' for task, label in shown.items()), 20)}"] if shown else []
        if ordered:
            most = and_more((f"{label} on {count}" for label, count in ordered), 6)
            parts.append(f"{'leading' if shown else 'no lead is shown; leading'}: {most} of {plural(len(column), 'task')}")
        said.append(f"With {words} of the budget, {'; '.join(parts)}.")
    return tuple(said)
