"""Two stored results side by side: what changed, by how much, and whether the change is within the noise between seeds."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special

from dpgbench.core.documents import Unreadable, settings_of
from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.options import leaves_of
from dpgbench.core.text import json_text
from dpgbench.report.format import DASH, and_more, decimals_for, interval, number, plural, probability
from dpgbench.report.results import SuiteResults, TaskResults, natural, read_frame
from dpgbench.report.table import Cell, Column, Row, Table, escape, markdown, records, text_cell
from dpgbench.report.task_tables import generator_for
from dpgbench.stats.multiple_testing import holm
from dpgbench.stats.over_seeds import Interval, mean_interval, paired_difference
from dpgbench.store.parquet import read_parquet


def read_side(name: str, results: Path) -> SuiteResults:
    """`name` is a suite, `suite@revision` for what a git revision holds of it, or a parquet file. UserError if there is none."""
    if name.endswith(".parquet"):
        if not Path(name).exists():
            raise UserError(f"--compare {name}: there is no such file; give a suite, suite@revision or an existing parquet")
        return read_frame(read_parquet(Path(name))[0], name)
    suite, _, revision = name.partition("@")
    if not revision:
        path = results / f"{suite}.parquet"
        if not path.exists():
            stored = [file.stem for file in results.glob("*.parquet")]
            raise UserError(f"--compare {name}: there is no {path}; {did_you_mean(suite, stored)}")
        return read_frame(read_parquet(path)[0], name)
    try:
        # "./" makes git look beside `results`, wherever that lies in its repository.
        shown = subprocess.run(["git", "show", f"{revision}:./{suite}.parquet"], cwd=results, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--compare {name}: git could not be asked ({error}); compare files instead") from None
    if shown.returncode:
        said = shown.stderr.decode(errors="replace").strip().splitlines()
        why = said[0] if said else "no reason given"
        raise UserError(f"--compare {name}: git has no {suite}.parquet at {revision} ({why}); see `git log -- {results / suite}.parquet`")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name.replace('/', '_')}.parquet"
        path.write_bytes(shown.stdout)
        return read_frame(read_parquet(path)[0], name)


def compare(a: SuiteResults, b: SuiteResults) -> Table:
    """A row for every method on every task that both have finished cells of: b - a at the final snapshots.

    Seeds that both have are paired; without two of them the difference is between independent means (Welch), and has no p. A change is
    beyond noise where its t interval excludes 0 at a level that holds for the whole table (Bonferroni), within noise otherwise.
    """
    tasks_a, tasks_b = ({task.label: task for task in side.tasks} for side in (a, b))
    found, notes = [], []
    for label in sorted(set(tasks_a) & set(tasks_b), key=natural):
        task_a, task_b = tasks_a[label], tasks_b[label]
        if (task_a.headline, task_a.sign) != (task_b.headline, task_b.sign):
            notes.append(f"{label}: the headline was {task_a.headline} and is {task_b.headline}; not compared.")
            continue
        methods_a, methods_b = (set(task.finals["method_label"]) for task in (task_a, task_b))
        found += [_change(task_a, task_b, method) for method in sorted(methods_a & methods_b, key=natural)]
    tested = sum(change.tested for change in found)
    adjusted = holm([change.p for change in found])
    rows = []
    for change, holm_p in zip(found, adjusted.p, strict=True):
        rows.append(_row(change, holm_p, _verdict(change, tested)))
        if change.settings:
            notes.append(f"{change.task}, {change.method}: {and_more(change.settings, 4)}.")
    for one, other, where in ((a, b, a.name), (b, a, b.name)):
        only = sorted(_keys(one) - _keys(other))
        if only:
            notes.append(f"Only in {where}: {and_more((f'{method} on {task}' for task, method in only), 8)}.")
    computed = [_machines(side) for side in (a, b)]
    if computed[0] != computed[1]:
        sides = zip((a, b), computed, strict=True)
        said = "; ".join(f"{side.name}: {and_more(sorted(machines), 4) or 'not said'}" for side, machines in sides)
        notes.append(
            f"Not computed alike ({said}): sums differ in their last bits, and so may texts; a small change says nothing of the code."
        )
    columns = (
        Column("task", numeric=False), Column("method", numeric=False), Column("n"), Column(a.name), Column(b.name), Column("change"),
        Column("p"), Column("Holm p"), Column("FLOPs", small="ratio"), Column("settings", numeric=False), Column("verdict", numeric=False),
    )  # fmt: skip
    caption = (
        f"{b.name} minus {a.name} at the final snapshot, mean and 95% t interval, paired by seed where seeds are shared, with the "
        f"sign-flip p, Holm-adjusted over {plural(adjusted.tests, 'comparison')}. Beyond noise: the t interval excludes 0 at 5% for the "
        f"whole table ({plural(tested, 'change')}); within noise: it does not, which is no proof that nothing changed."
    )
    counts = pd.Series([row.cells[-1].text for row in rows], dtype=object).value_counts()
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts.index))
    findings = (f"{plural(len(rows), 'comparison')}: {said}.",) if rows else ("Nothing to compare: no task and method in both.",)
    return Table("compare", f"{a.name} and {b.name}", caption, columns, tuple(rows), tuple(notes), findings)


def as_markdown(table: Table) -> str:
    return markdown(table, "#").rstrip("\n") + "\n"


def as_json(table: Table) -> str:
    return json_text(records(table))


def _keys(side: SuiteResults) -> set[tuple[str, str]]:
    return {(task.label, method) for task in side.tasks for method in task.finals["method_label"]}


def _machines(side: SuiteResults) -> set[str]:
    """What decides the last bits of a side's sums: torch and the processor or card, as its cells' environments say."""
    found = set()
    for text in side.frame["env"].dropna().unique():
        try:
            env = json.loads(text)
            packages, processor = env.get("packages") or {}, env.get("processor") or {}
            card = env.get("device", "cpu")
            where = card if card != "cpu" else " ".join(processor.get(key, "") for key in ("model", "vectors")).strip() or "cpu"
            found.add(f"torch {packages.get('torch', '?')} on {where}")
        except (ValueError, AttributeError, TypeError):
            found.add("unreadable")
    return found


@dataclass(frozen=True)
class _Change:
    """One method's final values on one task, side b minus side a."""

    task: str
    method: str
    sign: int
    """1 where higher is better, -1 where lower is."""
    sides: tuple[Interval, Interval]
    mean: float
    error: float
    """Standard error of the mean change; NaN with one seed."""
    degrees: float
    """Of freedom of the t distribution; 0 where nothing can be told."""
    p: float
    seeds: int
    count: str
    """How many seeds, as it is shown."""
    same: bool
    """The same seeds with the same values."""
    settings: list[str]
    flops: float
    """Ratio of the medians."""
    decimals: int

    @property
    def tested(self) -> bool:
        return not self.same and self.degrees > 0 and bool(np.isfinite(self.error))

    def bounds(self, level: float) -> tuple[float, float]:
        """The t interval of the mean change; NaN where there is none."""
        if not self.tested:
            return np.nan, np.nan
        half = float(special.stdtrit(self.degrees, 0.5 + level / 2) * self.error)
        return self.mean - half, self.mean + half


def _change(task_a: TaskResults, task_b: TaskResults, method: str) -> _Change:
    """Paired by seed where two or more are shared, else Welch's."""
    values_a, values_b = task_a.final_values(method), task_b.final_values(method)
    paired = paired_difference(values_b, values_a, generator=generator_for("compare", task_a.label, method))
    sides = mean_interval(values_a), mean_interval(values_b)
    same = bool(values_a.index.equals(values_b.index) and values_a.equals(values_b))
    mean, error, degrees, p = sides[1].mean - sides[0].mean, np.nan, 0.0, np.nan
    seeds, count = min(side.n for side in sides), f"{sides[0].n} and {sides[1].n}, unpaired"
    if paired.n > 1:
        mean, degrees, p, seeds, count = paired.mean, paired.n - 1, np.nan if same else paired.p, paired.n, f"{paired.n}"
        error = float((values_b - values_a).dropna().std(ddof=1)) / np.sqrt(paired.n)
    elif seeds > 1:
        parts = [float(values.var(ddof=1)) / len(values) for values in (values_a.dropna(), values_b.dropna())]
        spread = sum(part**2 / (side.n - 1) for part, side in zip(parts, sides, strict=True))
        error, degrees = np.sqrt(sum(parts)), sum(parts) ** 2 / spread if spread else sides[0].n + sides[1].n - 2
    return _Change(
        task=task_a.label, method=method, sign=task_a.sign, sides=sides, mean=mean, error=error, degrees=degrees, p=p, seeds=seeds,
        count=count, same=same, settings=_settings(task_a, task_b, method), flops=_flops(task_b, method) / _flops(task_a, method),
        decimals=decimals_for([*values_a.dropna(), *values_b.dropna()]),
    )  # fmt: skip


def _verdict(change: _Change, tested: int) -> str:
    if change.same:
        return "same numbers"
    if not change.tested:
        return "cannot tell: needs two seeds a side" if change.seeds < 2 else "cannot tell: not finite"
    low, high = change.bounds(1 - 0.05 / tested)
    if low <= 0 <= high:
        return "within noise"
    return "beyond noise, better" if change.mean * change.sign > 0 else "beyond noise, worse"


def _row(change: _Change, holm_p: float, verdict: str) -> Row:
    decimals = change.decimals
    low, high = change.bounds(0.95)
    sides = [Cell(number(side.mean, decimals), "", side.mean, {"mean": side.mean, "n": side.n}) for side in change.sides]
    settings = f"{len(change.settings)} differ" if change.settings else "same"
    return Row((
        text_cell(change.task), text_cell(change.method, method=change.method),
        Cell(change.count, "", float(change.seeds), {"n": change.seeds}), *sides,
        Cell(number(change.mean, decimals, sign=True), interval(low, high, decimals, sign=True).replace(DASH, ""), change.mean,
             {"mean": change.mean, "low": low, "high": high}),
        Cell(probability(change.p), "", change.p, {"p": change.p}), Cell(probability(holm_p), "", holm_p, {"p": holm_p}),
        Cell(DASH if np.isnan(change.flops) else f"{change.flops:.3g}", "", change.flops, {"ratio": change.flops}),
        text_cell(settings, numbers={"differ": list(change.settings)}), text_cell(verdict),
    ), (change.method,))  # fmt: skip


def _flops(task: TaskResults, method: str) -> float:
    median = task.finals.loc[task.finals["method_label"] == method, "flops"].median()
    return float(median) if median > 0 else np.nan


def _settings(task_a: TaskResults, task_b: TaskResults, method: str) -> list[str]:
    """`policy.steps: 60 -> 90` for every setting in which the stored configurations of the first seeds differ."""
    settings_a, settings_b = (_first_spec(task, method) for task in (task_a, task_b))
    keys = sorted(key for key in set(settings_a) | set(settings_b) if settings_a.get(key) != settings_b.get(key) and key != "seed")
    return [escape(f"{key}: {settings_a.get(key, 'absent')} → {settings_b.get(key, 'absent')}") for key in keys]


def _first_spec(task: TaskResults, method: str) -> dict[str, object]:
    specs = task.finals.loc[task.finals["method_label"] == method, "spec"].dropna()
    try:
        parsed = settings_of(specs.iloc[0]) if len(specs) else {}
    except Unreadable:  # there are no settings to compare
        parsed = {}
    return leaves_of(parsed) if isinstance(parsed, dict) else {}
