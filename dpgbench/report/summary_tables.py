"""The tables over all tasks: the ranking, the means, and every method against all others at equal FLOPs."""

from __future__ import annotations

from collections import Counter

import numpy as np

from dpgbench.report import task_tables
from dpgbench.report.format import DASH, amount, and_more, decimals_for, interval, number, plural, probability
from dpgbench.report.over_tasks import Across, ahead_of_all
from dpgbench.report.pooled import primary_findings
from dpgbench.report.results import BASE, ORACLE, SuiteResults, TaskResults
from dpgbench.report.table import Cell, Column, Row, Table, escape, markdown, text_cell
from dpgbench.stats.aggregates import OverTasks
from dpgbench.stats.multiple_testing import holm
from dpgbench.stats.over_seeds import Interval, mean_interval


def overview_table(results: SuiteResults, across: Across) -> Table:
    """A ranking of the methods over tasks; those that lack tasks below those that do not, references last."""
    total = len(across.scaled_tasks)
    body = []
    for label, style in results.styles.items():
        iqm = across.iqm.get(label)
        over = len(iqm.n_by_task) if iqm else 0
        finals = [task.final_values(label, "flops") for task in results.tasks]
        flops = sum(float(values.median()) for values in finals if len(values))
        ahead = [ahead_of_all(label, across.pairs[task.label]) for task in results.tasks] if style.role == "method" else []
        compared = [answer for answer in ahead if answer is not None]
        mean_rank = across.ranks.ranks.loc[label] if label in across.ranks.ranks.index else None
        cells = (
            text_cell(label, small={BASE: "(reference)", ORACLE: "(not a competitor)"}.get(style.role, ""), method=label),
            Cell(f"{over} of {total}" if over != total else str(total), "", over, {"tasks": over, "of": total}),
            Cell(str(iqm.n if iqm else 0), "", iqm.n if iqm else 0, {"runs": iqm.n if iqm else 0}),
            _over_tasks_cell(iqm, 3),
            Cell(DASH) if mean_rank is None else Cell(
                number(mean_rank["mean"], 2), interval(mean_rank["low"], mean_rank["high"], 2).replace(DASH, ""), float(mean_rank["mean"]),
                dict(mean_rank)),
            _over_tasks_cell(across.improvement.get(label), 2),
            Cell(f"{sum(compared)} of {len(compared)}" if compared else DASH, "", float(sum(compared)) if compared else None,
                 {"ahead": sum(compared), "of": len(compared)}),
            Cell(amount(flops) if any(map(len, finals)) else DASH, "", flops, {"sum of medians": flops}),
        )  # fmt: skip
        order = (style.role == ORACLE, style.role == BASE, over != total, -iqm.value if iqm and np.isfinite(iqm.value) else np.inf)
        body.append((order, style.index, Row(cells, (label,), style.role)))
    body.sort(key=lambda item: item[:2])
    columns = (
        Column("method", numeric=False, best="ascending"), Column("tasks"), Column("runs"),
        Column("normalised score", tip="interquartile mean over tasks and seeds; 0 is base, 1 the oracle or the best final mean"),
        Column("mean rank", best="ascending"), Column("P(better than base)"),
        Column("ahead at equal FLOPs", tip="tasks on which its mean is better than that of every other method"),
        Column("FLOPs", best="ascending", tip="sum over tasks of the median"),
    )  # fmt: skip
    caption = (
        "Final snapshots over all tasks. Normalised score: (value - base) / (oracle - base), interquartile mean over tasks and seeds with "
        "a 95% bootstrap interval that draws seeds within tasks; mean rank over tasks with such an interval; probability that a run is "
        "better than a run of base; tasks on which the mean at equal FLOPs is ahead of that of every other method; "
        "FLOPs summed over tasks."
    )
    notes = list(across.notes)
    few = [n for over in across.iqm.values() for n in over.n_by_task.values()]
    if few and 1 < min(few) < 10:
        notes.append(
            f"With {min(few)} seeds these bootstrap intervals are too narrow: simulated 95% ones cover about 72% with 2 seeds, 85% with 3, "
            "90% with 5 and 93% with 10. They are no test."
        )
    left = [f"{name} ({why})" for name, why in across.ranks.left_out.items()]
    if left:
        notes.append(f"Not part of the ranking: {and_more(left, limit=6)}.")
    return Table("overview", f"{results.name}: over all tasks", caption, columns, tuple(row for *_, row in body), tuple(notes))


def _over_tasks_cell(over: OverTasks | None, decimals: int) -> Cell:
    if over is None or (isinstance(over.value, float) and np.isnan(over.value)):
        return Cell(DASH)
    facts = {"value": over.value, "low": over.low, "high": over.high, "n": over.n, "why_no_interval": over.why_no_interval}
    return Cell(number(over.value, decimals), interval(over.low, over.high, decimals).replace(DASH, ""), float(over.value), facts)


def means_table(results: SuiteResults, across: Across) -> Table:
    """Methods x tasks, the mean of each headline; a status where there is none."""
    rows = across.rows
    best = {label: task_tables.best_label(task_rows) for label, task_rows in rows.items()}
    body = []
    for method, style in results.styles.items():
        cells = [text_cell(method, method=method)]
        for task in results.tasks:
            row = _row_of(method, rows[task.label])
            bar = _bar(row, rows[task.label], task) if row else None
            decimals = task_tables.table_decimals(rows[task.label])
            cells.append(_mean_cell(task, method, row, row and row.score, decimals, bold=best[task.label] == method, bar=bar))
        body.append(Row(tuple(cells), (method,), style.role))
    columns = [Column("method", numeric=False, best="ascending")]
    for task in results.tasks:
        columns.append(Column(task.label, f"{task.headline} {task.arrow}", best="descending" if task.higher_is_better else "ascending"))
    caption = (
        "Mean of the headline at the final snapshot and its 95% t interval; the best mean of each task, references aside, in bold "
        "(a ranking, not a test)."
    )
    return Table("means", f"{results.name}: every task", caption, tuple(columns), tuple(body))


def phi_table(results: SuiteResults, across: Across) -> Table | None:
    """Methods x tasks, the mean of Phi, the metric that a metagradient is taken of; None where every headline is Phi, or none is known."""
    tasks = [task for task in results.tasks if task.headline != "phi" and np.isfinite(task.finals["phi"]).any()]
    if not tasks:
        return None
    found = {task.label: {method: mean_interval(task.final_values(method, "phi")) for method in results.styles} for task in tasks}
    best = {label: _highest({method: means[method].mean for method in results.labels("method")}) for label, means in found.items()}
    body = []
    for method, style in results.styles.items():
        cells = [text_cell(method, method=method)]
        for task in tasks:
            means = found[task.label]
            decimals = decimals_for(mean.mean for mean in means.values())
            row = _row_of(method, across.rows[task.label])
            cells.append(_mean_cell(task, method, row, means[method], decimals, bold=best[task.label] == method))
        body.append(Row(tuple(cells), (method,), style.role))
    columns = (Column("method", numeric=False, best="ascending"), *(Column(task.label, "Φ ↑") for task in tasks))
    caption = (
        "Mean of Φ, the differentiable metric that a task defines, at the final snapshot and its 95% t interval; the best of each task, "
        "references aside, in bold (a ranking, not a test). The headline is what people read, and it can move where Φ does not."
    )
    leads = Counter(method for method in best.values() if method is not None)
    said = and_more((f"{method} on {count}" for method, count in leads.most_common()), 20)
    told = (f"Best mean Φ, of {plural(len(tasks), 'task')}: {said}.",) if leads else ()
    return Table("phi", f"{results.name}: every task, by Φ", caption, columns, tuple(body), findings=told)


def _highest(means: dict[str, float]) -> str | None:
    """None where there is none or it is shared."""
    top = max((mean for mean in means.values() if np.isfinite(mean)), default=None)
    first = [method for method, mean in means.items() if mean == top]
    return first[0] if len(first) == 1 else None


def _row_of(method: str, rows: list[task_tables.MethodRow]) -> task_tables.MethodRow | None:
    return next((row for row in rows if row.label == method), None)


def _mean_cell(
    task: TaskResults, method: str, row: task_tables.MethodRow | None, score: Interval | None, decimals: int | None, *, bold: bool,
    bar: float | None = None,
) -> Cell:  # fmt: skip
    """A mean, with n where a cell lacks its number; what became of the cells where none has one."""
    if row is not None and score.n:
        cell = task_tables.score_cell(score, decimals, bold=bold)
        n = "" if score.n == row.cells else f"n={score.n}"
        return Cell(cell.text, " ".join(filter(None, [cell.small, n])), cell.value, cell.numbers, bold, bar=bar)
    statuses = sorted({gap.status for gap in task_tables.gaps(task) if gap.method_label == method})
    return Cell(", ".join(statuses) if statuses else "NaN" if row is not None else "not planned")


def _bar(row: task_tables.MethodRow, rows: list[task_tables.MethodRow], task: TaskResults) -> float | None:
    """How far from base (0) towards the best mean of the table (1); None without a base or a spread."""
    base = next((other.score.mean for other in rows if other.label == task.base_label), np.nan)
    top = max((task.sign * (other.score.mean - base) for other in rows if np.isfinite(other.score.mean)), default=0.0)
    if not (np.isfinite(base) and np.isfinite(row.score.mean) and top > 0):
        return None
    return float(np.clip(task.sign * (row.score.mean - base) / top, 0, 1))


def findings(results: SuiteResults, across: Across, winners: Table) -> list[str]:
    """What the numbers over tasks say, in sentences; none where there is nothing to compare."""
    competing = [label for label in across.complete if results.styles[label].role == "method"]
    if len(competing) < 2:
        return []
    said = []
    scores = {label: across.iqm[label] for label in competing if np.isfinite(across.iqm[label].value)}
    if scores:
        best = max(scores, key=lambda label: scores[label].value)
        spread = interval(scores[best].low, scores[best].high, 2).replace(DASH, "")
        level = f"{number(scores[best].value, 2)} {spread}".strip()
        said.append(f"Best normalised score at the final snapshot: {best}, {level} over {plural(len(across.scaled_tasks), 'task')}.")
    ranks = across.ranks.ranks["mean"]
    if len(ranks):
        first = ranks.index[0]
        with_it = next((group for group in across.ranks.groups if first in group), ())
        others = and_more(label for label in with_it if label != first)
        told = f"the tasks do not tell it apart from {others}" if others else "the tasks tell it apart from every other"
        said.append(f"Best mean rank: {first}, {number(ranks.iloc[0], 2)}; {told}.")
    said += primary_findings(across.pooled)
    said += winners.findings
    ahead = {}
    for label in results.labels("method"):
        answers = [ahead_of_all(label, across.pairs[task.label]) for task in results.tasks]
        if any(answer is not None for answer in answers):
            ahead[label] = sum(bool(answer) for answer in answers)
    if ahead:
        most = sorted((label for label in ahead if ahead[label]), key=lambda label: (-ahead[label], results.styles[label].index))
        listed = and_more((f"{label} on {ahead[label]}" for label in most), 6)
        said.append(f"At equal FLOPs, ahead of every other method: {listed or 'none anywhere'} of {plural(len(results.tasks), 'task')}.")
    return said


def versus_tables(results: SuiteResults, across: Across) -> dict[str, Table]:
    """For every competing method: it against each other at equal FLOPs, tasks x others, one family of tests. {label: table}"""
    competing = results.labels("method")
    return {label: _versus_table(label, results, across) for label in competing} if len(competing) > 1 else {}


def _versus_table(label: str, results: SuiteResults, across: Across) -> Table:
    others = [other for other in results.labels("method") if other != label]
    found = {}
    for task in results.tasks:
        for (a, b), comparison in across.pairs[task.label].items():
            if label in (a, b) and comparison.difference.n:
                found[task.label, b if label == a else a] = (comparison, 1 if label == a else -1)
    adjusted = dict(zip(found, holm([comparison.difference.p for comparison, _ in found.values()]).p, strict=True))
    adjusted_t = dict(zip(found, holm([comparison.difference.t_p for comparison, _ in found.values()]).p, strict=True))
    body, ahead, behind = [], [], []
    for task in results.tasks:
        decimals = task_tables.table_decimals(across.rows[task.label])
        cells = [text_cell(task.label, small=f"{task.headline} {task.arrow}")]
        means = {}
        for other in others:
            if (task.label, other) not in found:
                cells.append(Cell(DASH))
                continue
            comparison, turn = found[task.label, other]
            d, p, t_p = comparison.difference, adjusted[task.label, other], adjusted_t[task.label, other]
            low, high = sorted((turn * d.low, turn * d.high))
            means[other] = turn * d.mean + 0.0
            below = interval(low, high, decimals, sign=True).replace(DASH, "")
            facts = {"mean": means[other], "low": low, "high": high, "n": d.n, "p": d.p, "holm_p": p, "t_p": d.t_p, "holm_t_p": t_p,
                     "flops": comparison.median_compute}  # fmt: skip
            small = " ".join(filter(None, [below, f"p {probability(p)}", task_tables.t_words(t_p), f"n={d.n}"]))
            cells.append(Cell(number(means[other], decimals, sign=True), small, means[other], facts, bool(p < 0.05)))
        if means and all(mean > 0 for mean in means.values()):
            ahead.append(task.label)
        elif any(mean < 0 for mean in means.values()):
            behind.append(f"{task.label} ({and_more((other for other, mean in means.items() if mean < 0), limit=4)})")
        body.append(Row(tuple(cells)))
    columns = (Column("task", numeric=False, best="ascending"), *(Column(other, method=other) for other in others))
    tests = sum(not np.isnan(p) for p in adjusted.values())
    caption = (
        f"Advantage of {label} over each other method at the FLOPs of whichever spent more, one that stopped earlier holding its "
        f"last answer (positive: {label} is better), with 95% t interval, p of the sign-flip test and of the paired t test (t), each "
        f"Holm-adjusted over the {plural(tests, 'comparison')} of this table, and n paired seeds; sign-flip p < 0.05 in bold."
    )
    counts = []
    for ps in (adjusted, adjusted_t):
        significant = [key for key, p in ps.items() if p < 0.05]
        won = sum(found[key][0].difference.mean * found[key][1] > 0 for key in significant)
        counts.append(f"better in {won}, worse in {len(significant) - won}")
    on, off = (f": {and_more(names, 20)}" if names else "" for names in (ahead, behind))
    said = (
        f"Ahead of every other method it can be compared with on {len(ahead)} of {plural(len(results.tasks), 'task')}{on}. "
        f"Behind at least one on {len(behind)}{off}.",
        f"Holm-adjusted p < 0.05, of {plural(tests, 'comparison')}: {counts[0]} by sign flips; {counts[1]} by the paired t test.",
    )
    notes = list(task_tables.reachable_note((comparison.difference.n for comparison, _ in found.values()), tests))
    holes = [f"{task.label} with {and_more(missing, 3)}" for task in results.tasks
             if (missing := [other for other in others if (task.label, other) not in found])]  # fmt: skip
    if holes:
        notes.append(f"Not compared (no cell, or no answer within those FLOPs): {and_more(holes, 8)}.")
    return Table(f"versus-{label}", f"{label} against every other method at equal FLOPs", caption, columns, tuple(body), tuple(notes), said)


def summary_markdown(results: SuiteResults, shown: list[Table], task_files: list[str]) -> str:
    """The tables over all tasks, and where each task's own are."""
    lines = [f"# Summary of {escape(results.name)}", ""]
    if not results.tasks:
        return "\n".join([*lines, "The frame is empty: no cell was run or planned."]) + "\n"
    counts = ", ".join(f"{count} {status}" for status, count in results.cells_by_status.items())
    lines += [f"{plural(sum(results.cells_by_status.values()), 'cell')}: {counts}.", ""]
    lines += [markdown(table) for table in shown]
    lines += ["## Each task on its own", "", *(f"- [{name}]({name}.md)" for name in task_files)]
    return "\n".join(lines).rstrip("\n") + "\n"
