"""The numbers of a table, computed once, and their Markdown; page.py shows the same rows as HTML."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dpgbench.report.frame import BASE, ORACLE, SuiteResults, TaskResults, natural
from dpgbench.report.writing import DASH, amount, and_more, decimals_for, duration, interval, number, plural, probability
from dpgbench.stats import Interval, PairedDifference, mean_interval, paired_difference

SEEDS_FOR_FIVE_PERCENT = 6  # 2 / 2**6 = 0.031 is the first below 0.05


@dataclass(frozen=True)
class MethodRow:
    """One method on one task at the final snapshot. `cells` counts the cells that should have a score (skipped ones should not)."""

    label: str
    role: str  # "method", "base" or "oracle"
    cells: int
    score: Interval
    difference: PairedDifference | None  # to base, paired by seed; None for base itself and where there is no base
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


def method_rows(task: TaskResults) -> list[MethodRow]:
    """Best mean first in the direction of the headline; methods without a score and the oracle last."""
    expected = task.unfinished[task.unfinished["status"] != "skipped"]
    present = pd.concat([task.finals[["method", "method_label", "cell"]], expected[["method", "method_label", "cell"]]])
    rows = []
    for (method, label), cells in present.groupby(["method", "method_label"]):
        finals = task.finals[task.finals["method_label"] == label]
        medians = {name: _median(finals[name]) for name in ("flops", "tokens_generated", "tokens_trained", "seconds")}
        difference = None
        if task.base_label is not None and label != task.base_label and len(finals):
            # The draws of the Monte-Carlo test (above 12 seeds) belong to this comparison: same page, same p, whatever else is on it.
            generator = np.random.default_rng(zlib.crc32(f"sign-flip {task.label} {label}".encode()))
            difference = paired_difference(task.final_values(label), task.final_values(task.base_label), generator=generator)
        role = method if method in (BASE, ORACLE) else "method"
        rows.append(MethodRow(label, role, cells["cell"].nunique(), mean_interval(finals["value"]), difference, **medians))

    def rank(row: MethodRow) -> tuple:
        unscored = bool(np.isnan(row.score.mean))
        better_first = 0.0 if unscored else -row.score.mean if task.higher_is_better else row.score.mean
        return (row.role == ORACLE, unscored, better_first, natural(row.label))

    return sorted(rows, key=rank)


def best_label(rows: list[MethodRow]) -> str | None:
    """The method with the best mean, references aside; None where nothing competes or the best is shared."""
    competing = [row for row in rows if row.role == "method" and np.isfinite(row.score.mean)]
    if not competing or (len(competing) > 1 and competing[0].score.mean == competing[1].score.mean):
        return None
    return competing[0].label


def gaps(task: TaskResults) -> list[Gap]:
    """Cells without a result, grouped by method, status and reason."""
    reasons = task.unfinished["reason"].fillna("").astype(str).str.strip()
    grouped = task.unfinished.assign(reason=reasons).groupby(["method_label", "status", "reason"])["seed"]
    found = [Gap(label, status, tuple(sorted(seeds)), reason or "no reason recorded") for (label, status, reason), seeds in grouped]
    return sorted(found, key=lambda gap: (natural(gap.method_label), gap.status, gap.reason))


def table_decimals(rows: list[MethodRow]) -> int | None:
    """One number of decimals for all scores of a task, from the spread of the means."""
    return decimals_for(row.score.mean for row in rows)


def notes_on(task: TaskResults, rows: list[MethodRow]) -> list[str]:
    """What a reader must know before trusting the table, in words."""
    notes = list(task.notes)
    pairs = sorted({row.difference.n for row in rows if row.difference is not None and row.difference.n})
    few = [n for n in pairs if n < SEEDS_FOR_FIVE_PERCENT]
    if few:
        number_of_pairs = f"{few[0]}" if len(few) == 1 else f"{few[0]} to {few[-1]}"
        notes.append(
            f"With {number_of_pairs} paired seed{'s' if few[-1] > 1 else ''} the smallest p this test can reach is "
            f"{probability(2.0 ** (1 - few[-1]))}: fewer than {SEEDS_FOR_FIVE_PERCENT} seeds cannot reach 0.05, whatever the data."
        )
    if any(row.score.n == 1 for row in rows):
        notes.append("One seed has no interval: a single run says nothing about the spread between runs.")
    drawn = [row.label for row in rows if row.difference is not None and not row.difference.exact]
    if drawn:
        notes.append(f"More than 12 pairs: p estimated from 20,000 drawn sign patterns for {and_more(drawn)}.")
    unpaired = [f"{row.label} ({row.difference.unpaired})" for row in rows if row.difference is not None and row.difference.unpaired]
    if unpaired:
        notes.append(f"Seeds without a partner, left out of the difference to {task.base_label}: {and_more(unpaired)}.")
    return notes


HEADER = ("method", "n", "mean", "95% interval", "difference to base", "95% interval of the difference", "p", "smallest possible p",
          "FLOPs", "tokens generated", "tokens trained", "time")  # fmt: skip


def row_texts(row: MethodRow, decimals: int | None) -> list[str]:
    """The cells of one row as shown, the method's name first."""
    difference = [DASH] * 4
    if row.difference is not None and row.difference.n:
        d = row.difference
        difference = [number(d.mean, decimals, sign=True), interval(d.low, d.high, decimals, sign=True)]
        difference += [probability(d.p), probability(d.smallest_p)]
    name = f"{row.label} ({row.remark})" if row.remark else row.label
    score = [number(row.score.mean, decimals), interval(row.score.low, row.score.high, decimals)]
    compute = [amount(row.flops), amount(row.tokens_generated), amount(row.tokens_trained), duration(row.seconds)]
    return [name, row.n, *score, *difference, *compute]


def task_markdown(task: TaskResults, heading: str = "#") -> str:
    """One task: a row per method, notes and gaps below. Ends with one newline; the same frame gives the same bytes."""
    rows = method_rows(task)
    decimals = table_decimals(rows)
    lines = [f"{heading} {_escape(task.label)}", ""]
    if task.description:
        lines += [_escape(task.description), ""]
    if rows:
        lines += [
            f"{_escape(task.headline)} at the final snapshot, {task.direction}; n seeds, Student t intervals, differences paired by "
            f"seed with a two-sided sign-flip p, medians of the compute.", "",
        ]  # fmt: skip
        lines += markdown_table(HEADER, [row_texts(row, decimals) for row in rows])
    for note in notes_on(task, rows):
        lines += ["", f"> {_escape(note)}"]
    missing = gaps(task)
    if missing:
        lines += ["", "Without a result:", ""]
        for gap in missing:
            seeds = f"seed{'s' if len(gap.seeds) > 1 else ''} {and_more(gap.seeds)}"
            lines.append(f"- {_escape(gap.method_label)}: {len(gap.seeds)} {gap.status} ({seeds}): {_escape(shortened(gap.reason))}")
    return "\n".join(lines) + "\n"


def summary_markdown(results: SuiteResults) -> str:
    """Methods x tasks first, then every task's own table."""
    lines = [f"# Summary of {_escape(results.name)}", ""]
    if not results.tasks:
        return "\n".join([*lines, "The frame is empty: no cell was run or planned."]) + "\n"
    counts = ", ".join(f"{count} {status}" for status, count in results.cells_by_status.items())
    lines += [
        f"{plural(sum(results.cells_by_status.values()), 'cell')}: {counts}. Mean of the headline at the final snapshot and its "
        "95% t interval; the best mean of each task, references aside, in bold (a ranking, not a test).", "",
    ]  # fmt: skip
    tables = {task.label: method_rows(task) for task in results.tasks}
    best = {label: best_label(rows) for label, rows in tables.items()}
    body = []
    for method in results.styles:
        cells = [method]
        for task in results.tasks:
            text = summary_text(task, tables[task.label], method)
            cells.append(f"**{text}**" if best[task.label] == method else text)
        body.append(cells)
    lines += markdown_table(("method", *(f"{task.label}: {task.headline} {task.arrow}" for task in results.tasks)), body)
    for task in results.tasks:
        lines += ["", task_markdown(task, heading="##").rstrip("\n")]
    return "\n".join(lines) + "\n"


def summary_text(task: TaskResults, rows: list[MethodRow], method: str) -> str:
    """`mean [low, high]`, or the status of a method that has no score on this task."""
    row = next((row for row in rows if row.label == method), None)
    if row is not None and row.score.n:
        decimals = table_decimals(rows)
        score = number(row.score.mean, decimals)
        return score if np.isnan(row.score.low) else f"{score} {interval(row.score.low, row.score.high, decimals)}"
    statuses = sorted({gap.status for gap in gaps(task) if gap.method_label == method})
    return ", ".join(statuses) if statuses else "NaN" if row is not None else "not planned"


def markdown_table(header: tuple[str, ...], body: list[list[str]]) -> list[str]:
    """A GitHub table with padded columns (readable as plain text), the first to the left and the rest to the right."""
    cells = [[_escape(text) for text in line] for line in (header, *body)]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(header))]
    padded = []
    for first, *others in cells:
        aligned = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        padded.append("| " + " | ".join(aligned) + " |")
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [padded[0], rule, *padded[1:]]


def shortened(text: str, limit: int = 300) -> str:
    """One line of at most `limit` characters: a reason can be a whole traceback, whose last line says most."""
    text = text.strip()
    if text.startswith("Traceback") and "\n" in text:
        text = text.splitlines()[-1]
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _escape(text: str) -> str:
    """Data shown as itself in Markdown: no table cell, tag or line break of its own."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())


def _median(values: pd.Series) -> float:
    present = values.dropna()
    return float(present.median()) if len(present) else float("nan")
