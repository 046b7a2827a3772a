"""The claims of a suite: which method is best on each task, and each method against every other over all tasks at equal FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from dpgbench.report import task_tables
from dpgbench.report.format import DASH, amount, and_more, interval, number, plural, probability
from dpgbench.report.over_tasks import Across
from dpgbench.report.results import ORACLE, SuiteResults, TaskResults, natural
from dpgbench.report.table import Cell, Column, Row, Table, text_cell
from dpgbench.stats.multiple_testing import BetterThanAll, OverTasksDifference, better_than_all, difference_over_tasks, holm
from dpgbench.stats.over_seeds import PairedDifference, mean_interval, paired_difference

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Winner:
    """The method with the best mean of final answers on a task, the next best, and the first one's lead over it."""

    label: str
    next_label: str
    lead: PairedDifference
    verdict: BetterThanAll
    flops: float
    next_flops: float


def winners_table(results: SuiteResults, across: Across) -> Table:
    """For every task the method whose answer is best on average, and whether it is better than every other's, base's among them."""
    found = {task.label: winner for task in results.tasks if (winner := _winner(task))}
    adjusted = dict(zip(found, holm([winner.verdict.p for winner in found.values()]).p, strict=True))
    adjusted_t = dict(zip(found, holm([winner.verdict.t_p for winner in found.values()]).p, strict=True))
    body = []
    for task in results.tasks:
        head = text_cell(task.label, small=f"{task.headline} {task.arrow}")
        if task.label not in found:
            body.append(Row((head, *[Cell(DASH)] * 8)))
            continue
        winner, p, t_p = found[task.label], adjusted[task.label], adjusted_t[task.label]
        decimals = task_tables.table_decimals(across.rows[task.label])
        score, lead, verdict = mean_interval(task.final_values(winner.label)), winner.lead, winner.verdict
        hardest = "" if np.isnan(verdict.p) else f"hardest: {verdict.hardest}"
        body.append(Row((
            head, text_cell(winner.label, method=winner.label),
            Cell(number(score.mean, decimals), interval(score.low, score.high, decimals).replace(DASH, ""), score.mean,
                 {"mean": score.mean, "low": score.low, "high": score.high, "n": score.n}),
            text_cell(winner.next_label, method=winner.next_label),
            Cell(number(lead.mean, decimals, sign=True), interval(lead.low, lead.high, decimals, sign=True).replace(DASH, ""), lead.mean,
                 {"mean": lead.mean, "low": lead.low, "high": lead.high, "n": lead.n}),
            Cell(amount(winner.flops), f"next: {amount(winner.next_flops)}", winner.flops,
                 {"best": winner.flops, "next": winner.next_flops}),
            Cell(str(verdict.n), "", verdict.n, {"n": verdict.n}),
            Cell(probability(p), f"one task: {probability(verdict.p)}; {hardest}".rstrip("; "), p,
                 {"holm_p": p, "p": verdict.p, "hardest": verdict.hardest}, bold=bool(p < SIGNIFICANT)),
            Cell(probability(t_p), "" if np.isnan(verdict.t_p) else f"one task: {probability(verdict.t_p)}", t_p,
                 {"holm_p": t_p, "p": verdict.t_p}, bold=bool(t_p < SIGNIFICANT)),
        )))  # fmt: skip
    columns = (
        Column("task", numeric=False, best="ascending"), Column("best", numeric=False, best="ascending"), Column("mean"),
        Column("next", numeric=False, best="ascending"), Column("lead"),
        Column("FLOPs", best="ascending", tip="median of the best method's answers, and of the next one's"),
        Column("n", tip="the smallest number of paired seeds"),
        Column("p", best="ascending", tip="better than every other: the largest of its sign-flip p's, Holm-adjusted over tasks"),
        Column("t test p", best="ascending", tip="the same by paired t tests, which take the differences to be Gaussian"),
    )  # fmt: skip
    tests = sum(not np.isnan(p) for p in adjusted.values())
    caption = (
        "The method with the best mean of final answers on each task, and its lead over the next best with 95% t interval. p: that it is "
        "better than every other, base included (the largest of its sign-flip p's, seeds paired), Holm-adjusted over "
        f"{plural(tests, 'task')}, and beside it the same by paired t tests; below 0.05 in bold. An answer is what a method ended with "
        "inside its budget; FLOPs are its median cost."
    )
    notes = task_tables.reachable_note((winner.verdict.n for winner in found.values()), tests)
    said = tuple(_said(found, adjusted, adjusted_t))
    return Table("winners", f"{results.name}: the best on each task", caption, columns, tuple(body), notes, said)


def _winner(task: TaskResults) -> Winner | None:
    """None with fewer than two methods to compare."""
    labels = sorted(task.finals.loc[task.finals["method"] != ORACLE, "method_label"].unique(), key=natural)
    values = {label: task.sign * task.final_values(label) for label in labels}
    means = {label: series.mean() for label, series in values.items() if np.isfinite(series.mean())}
    if len(means) < 2:
        return None
    first, second = sorted(means, key=lambda label: -means[label])[:2]
    differences = {
        label: paired_difference(values[first], values[label], generator=task_tables.generator_for("winner", task.label, first, label))
        for label in means
        if label != first
    }
    flops = task.finals.groupby("method_label")["flops"].median()
    return Winner(first, second, differences[second], better_than_all(differences), float(flops[first]), float(flops[second]))


def _said(found: dict[str, Winner], adjusted: dict[str, float], adjusted_t: dict[str, float]) -> list[str]:
    """The wins that sign flips show, those that only the paired t test shows, and the tasks where neither shows one."""
    won: dict[str, list[str]] = {}
    won_by_t: dict[str, list[str]] = {}
    undecided = []
    for task, winner in found.items():
        if adjusted[task] < SIGNIFICANT:
            won.setdefault(winner.label, []).append(task)
        elif adjusted_t[task] < SIGNIFICANT:
            won_by_t.setdefault(winner.label, []).append(task)
        else:
            ps = " ".join(filter(None, [f"p {probability(adjusted[task])}", task_tables.t_words(adjusted_t[task])]))
            undecided.append(f"{task} ({winner.label} leads, {ps})")

    def listed(tasks_by_label: dict[str, list[str]]) -> str:
        return "; ".join(f"{label} on {and_more(tasks, 20)}" for label, tasks in sorted(tasks_by_label.items()))

    said = [f"Better than every other (adjusted p < 0.05): {listed(won)}."] if won else []
    if won_by_t:
        said.append(
            f"Better than every other by the paired t test (adjusted p < 0.05), which takes the differences to be Gaussian, but not by "
            f"sign flips: {listed(won_by_t)}."
        )
    return said + ([f"No method is shown to be better than every other on {and_more(undecided, 20)}."] if undecided else [])


def over_tasks_table(label: str, results: SuiteResults, across: Across) -> Table | None:
    """One method against each other over all tasks at equal FLOPs, the seed as the unit; None where nothing can be put together."""
    found = {other: _over_tasks(label, other, results, across) for other in results.labels("method") if other != label}
    found = {other: over for other, over in found.items() if over.difference.n}
    if not found:
        return None
    adjusted = dict(zip(found, holm([over.difference.p for over in found.values()]).p, strict=True))
    adjusted_t = dict(zip(found, holm([over.difference.t_p for over in found.values()]).p, strict=True))
    body = []
    for other, over in sorted(found.items(), key=lambda item: -item[1].difference.mean):
        d, p = over.difference, adjusted[other]
        body.append(Row((
            text_cell(other, method=other),
            Cell(str(len(over.tasks)), "", len(over.tasks), {"tasks": list(over.tasks)}), Cell(str(d.n), "", d.n, {"n": d.n}),
            Cell(number(d.mean, 3, sign=True), interval(d.low, d.high, 3, sign=True).replace(DASH, ""), d.mean,
                 {"mean": d.mean, "low": d.low, "high": d.high}),
            task_tables.p_cell(d), task_tables.holm_cell(p, adjusted_t[other], bold=bool(p < SIGNIFICANT)),
        ), (other,)))  # fmt: skip
    columns = (
        Column("against", numeric=False, best="ascending"), Column("tasks"), Column("n"), Column("advantage"),
        Column("p", best="ascending"), Column("Holm p", best="ascending"),
    )  # fmt: skip
    caption = (
        f"Advantage of {label} in normalised score, each seed's mean over the tasks that both have, at the FLOPs of whichever spent "
        f"more; 95% t interval, sign-flip test and paired t test (t) over the seeds that all these tasks have, a seed's tasks as one unit, "
        f"Holm-adjusted over {plural(len(found), 'comparison')}. The anchors of the normalised scores are taken as known."
    )
    said = []
    for ps, test in ((adjusted, "sign flips"), (adjusted_t, "the paired t test")):
        better, worse = ([other for other in found if ps[other] < SIGNIFICANT and found[other].difference.mean * turn > 0]
                         for turn in (1, -1))  # fmt: skip
        listed = f"better than {and_more(better, 20) or 'none'}; worse than {and_more(worse, 20) or 'none'}"
        said.append(f"Over tasks, adjusted p < 0.05 by {test}: {listed}.")
    notes = list(task_tables.reachable_note((over.difference.n for over in found.values()), len(found)))
    left = {other: over.left_out for other, over in found.items() if over.left_out}
    if left:
        notes.append(
            "Seeds that some of the tasks lack: " + and_more((f"{other}: {and_more(seeds)}" for other, seeds in left.items()), 6) + "."
        )
    return Table(f"over-tasks-{label}", f"{label} over all tasks at equal FLOPs", caption, columns, tuple(body), tuple(notes), tuple(said))


def _over_tasks(label: str, other: str, results: SuiteResults, across: Across) -> OverTasksDifference:
    advantages: dict[str, pd.Series] = {}
    for task in across.scaled_tasks:
        pairs, anchors = across.pairs[task], across.anchors[task]
        turn, key = (1, (label, other)) if (label, other) in pairs else (-1, (other, label))
        if key in pairs and pairs[key].difference.n:
            seeds, scale = pairs[key].by_seed, abs(anchors.ceiling - anchors.base)
            advantages[task] = pd.Series(turn * (seeds["a"].to_numpy() - seeds["b"].to_numpy()) / scale, index=seeds.index)
    first, second = sorted((label, other))
    return difference_over_tasks(advantages, generator=task_tables.generator_for("over tasks", first, second))
