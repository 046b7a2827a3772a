"""The self-contained HTML page: data shaped for the template, which autoescapes everything that is not `Markup` made here."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import string
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import pandas as pd
from markupsafe import Markup

from dpgbench.core.documents import Unreadable, json_of, yaml_of
from dpgbench.core.options import leaves_of
from dpgbench.core.text import visible
from dpgbench.report import task_tables
from dpgbench.report.format import DASH, and_more, decimals_for, file_names, number, plural
from dpgbench.report.inline_svg import StyleSheet, inline_svg
from dpgbench.report.plot_style import DrawnFigure
from dpgbench.report.pooled import shown_over_tasks
from dpgbench.report.results import BASE, SuiteResults, TaskResults
from dpgbench.report.summary_tables import findings
from dpgbench.report.table import Cell, Column, Row, Table, text_cell
from dpgbench.stats.over_seeds import mean_interval

if TYPE_CHECKING:
    from dpgbench.report import Contents

TEMPLATES = Path(__file__).parent / "template"
TEXTS_SHOWN = 3  # of a method and seed; the parquet has them all
SEEDS_SHOWN = 2  # texts of the first ones; pictures of the very first, because they are heavy
COLORS_SHOWN = 16  # of a picture: plots and patterns of few colours, a third of the bytes
VERSUS_SHOWN = 2  # methods, from the top of the ranking, whose comparisons stand on the page; the others' are a file away
MEASURES_SHOWN = 4  # beside the headline, below a picture
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def render_page(contents: Contents, overall: list[DrawnFigure], figures: dict[str, list[DrawnFigure]], *, command: str, title: str) -> str:
    """The page as one string: no resource is loaded from anywhere, all images are inside, and its policy lets no other script run.

    Whatever comes from the frame (labels, texts of models, reasons, settings) is escaped, and shows its control characters as escapes.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=_inert,
    )  # fmt: skip
    environment.tests["sorted_by_text"] = _sorted_by_text
    environment.filters["without_findings"] = lambda table: replace(table, findings=())
    results = contents.results
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    stems = file_names([*(task.file_name for task in results.tasks), *(f"versus_{label}" for label in contents.versus)])
    names = stems | {label: stems[f"versus_{label}"] for label in contents.versus}
    sheet = StyleSheet()
    overall_plots = {figure.file_name.removeprefix("summary_"): _inline(figure, f"s{at}-", sheet) for at, figure in enumerate(overall)}
    tasks = [
        _task(task, contents, figures[task.label], names[task.file_name], position, sheet) | {"specs": specs}
        for position, (task, specs) in enumerate(zip(results.tasks, _specs(results.tasks, results.styles), strict=True))
    ]
    page = environment.get_template("page.html").render(
        title=title,
        suite=results.name,
        command=command,
        policy=policy(script),
        css=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")) + sheet.css(),
        script=Markup(script),
        explanation=_explanation(results),
        shown=shown_over_tasks(contents.across.pooled),
        findings=findings(results, contents.across, contents.winners),
        statuses=list(results.cells_by_status.items()),
        styles=results.styles,
        budgets=contents.budgets,
        overview=contents.overview,
        winners=contents.winners,
        means=contents.means,
        phi=contents.phi,
        versus=_versus(contents)[:VERSUS_SHOWN],
        versus_files=[(item["label"], f"tables/{names[item['label']]}.md") for item in _versus(contents)[VERSUS_SHOWN:]],
        overall=overall_plots,
        tasks=tasks,
        versions=_versions(results),
    )
    return re.sub(r"\n\s+(?=<)", "\n", page)  # the template's indentation: a tenth of the page


def policy(*scripts: str) -> str:
    """The Content-Security-Policy: nothing is loaded but pictures inside the page, and only these scripts run, told by their hashes."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {hashes}; base-uri 'none'; form-action 'none'"


def _sorted_by_text(cell: Cell) -> bool:
    """Whether the text of a cell is enough to sort by: a word that stands for itself, or a number, whose last shown digit decides."""
    if isinstance(cell.value, (int, float)) and math.isfinite(cell.value):
        return re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?", cell.text) is not None
    return cell.sortable == cell.text


def _inert(value: object) -> object:
    return visible(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


def _explanation(results: SuiteResults) -> str:
    competing = [label for label, style in results.styles.items() if style.role == "method"]
    references = [label for label, style in results.styles.items() if style.role != "method"]
    seeds = results.frame["seed"].nunique()
    done, total = results.cells_by_status.get("done", 0), sum(results.cells_by_status.values())
    beside = f" beside the reference{'s' if len(references) > 1 else ''} {' and '.join(references)}" if references else ""
    return (
        f"{plural(len(competing), 'way')} of producing training text{beside}, on {plural(len(results.tasks), 'task')} with "
        f"{plural(seeds, 'seed')}: {done} of {plural(total, 'cell')} finished. Every method ends with a dataset of texts; a fresh copy of "
        f"the target model is trained on it and scored on data the method never saw. All compute a method spends is charged to it, drawing "
        f"that dataset included. The seed is the unit: intervals are 95% Student t over seeds, and differences are paired by seed."
    )


def _versus(contents: Contents) -> list[dict]:
    """Each method against the others, in the order of the ranking; its summary says how often it is ahead."""
    shown = []
    for row in contents.overview.rows:
        label = row.methods[0]
        if label in contents.versus:
            ahead = next(cell for cell, column in zip(row.cells, contents.overview.columns, strict=True) if column.name.startswith("ahead"))
            shown.append({"label": label, "style": contents.results.styles[label], "table": contents.versus[label],
                          "over_tasks": contents.over_tasks.get(label), "ahead": ahead.text})  # fmt: skip
    return shown


def _task(task: TaskResults, contents: Contents, figures: list[DrawnFigure], file_name: str, position: int, sheet: StyleSheet) -> dict:
    results, rows = contents.results, contents.across.rows[task.label]
    present = [label for label in results.styles if (task.finals["method_label"] == label).any()]
    # What a method's texts are compared with stands first.
    before_first = sorted(present, key=lambda label: results.styles[label].role != BASE)
    seeds = sorted(int(seed) for seed in task.finals["seed"].unique())
    more = f"the first {SEEDS_SHOWN} of {len(seeds)} seeds; the parquet has all" if len(seeds) > SEEDS_SHOWN else ""
    seeds = seeds[:SEEDS_SHOWN]
    return {
        "anchor": f"task-{position}", "task": task, "notes": task_tables.notes_on(task, rows), "file": f"tables/{file_name}.md",
        "answer": contents.budgets.rows[position].cells[-1],
        "tables": [_led_by(table, rows[0].label if rows else None) for table in contents.by_task[task.label]],
        "figures": [_inline(figure, f"f{position}{kind}-", sheet) for kind, figure in zip(string.ascii_lowercase, figures, strict=False)],
        "metrics": _all_metrics(task, present), "phases": _phases(task, present), "seeds": seeds, "more_seeds": more,
        "gallery": [_samples(task, label, results, seeds) for label in before_first],
        "has_pictures": task.finals["picture"].map(_is_png).any(), "has_texts": task.finals["texts"].map(lambda t: bool(_texts(t))).any(),
        "gaps": [{"gap": gap, "seeds": and_more(gap.seeds), "short": task_tables.shortened(gap.reason),
                  "full": gap.reason if task_tables.shortened(gap.reason) != " ".join(gap.reason.split()) else None,
                  "style": results.styles[gap.method_label]} for gap in task_tables.gaps(task)],
    }  # fmt: skip


def _led_by(table: Table, best: str | None) -> dict:
    """A table of pairs is as long as the square of the methods: those with the best method here, all in the file of the task's tables."""
    pairs = [row for row in table.rows if len(row.methods) == 2]
    kept = tuple(row for row in table.rows if len(row.methods) != 2 or best in row.methods)
    if best is None or len(pairs) < 12 or len(kept) == len(table.rows):
        return {"table": table, "left_out": 0, "of": best}
    return {"table": replace(table, rows=kept), "left_out": len(table.rows) - len(kept), "of": best}


def _inline(figure: DrawnFigure, prefix: str, sheet: StyleSheet) -> dict:
    return {"svg": inline_svg(figure.svg, prefix, figure.alt, sheet), "caption": figure.caption, "wide": figure.wide}


def _samples(task: TaskResults, label: str, results: SuiteResults, seeds: list[int]) -> dict:
    """One method's texts for every seed of the task, and its picture for the first; a seed it lacks is shown as such."""
    rows = task.finals[task.finals["method_label"] == label].set_index("seed")
    shown = []
    for position, seed in enumerate(seeds):
        row = rows.loc[seed] if seed in rows.index else None
        picture = row["picture"] if row is not None else None
        texts = _texts(row["texts"]) if row is not None else []
        broken = row is not None and isinstance(picture, bytes) and not _is_png(picture)
        drawn = _picture(picture) if position == 0 and isinstance(picture, bytes) and _is_png(picture) else None
        shown.append({
            "seed": seed, "finished": row is not None, "picture": drawn, "broken": broken,
            "texts": texts[:TEXTS_SHOWN], "total": len(texts),
            "score": number(float(row["value"]), decimals_for(task.finals["value"])) if row is not None else DASH,
            "measures": _measures(task, row) if row is not None and _is_png(picture) else "",
        })  # fmt: skip
    before = "before: the untouched generator" if results.styles[label].role == BASE else ""
    return {"label": label, "style": results.styles[label], "seeds": shown, "before": before}


def _measures(task: TaskResults, row: pd.Series) -> str:
    """What was measured beside the headline (whether a reader reads the picture, say); changes are differences of these."""
    names = [name for name in row.index if name.startswith("metric:") and not name.endswith(("_change", "_relative"))]
    names = [name for name in names if pd.notna(row[name]) and name != f"metric:{task.headline}"]
    return " · ".join(f"{name.removeprefix('metric:')} {row[name]:.4g}" for name in names[:MEASURES_SHOWN])


def _all_metrics(task: TaskResults, present: list[str]) -> Table | None:
    """Everything measured at the final snapshot: methods x metrics, mean and interval; metrics nobody has are left out."""
    columns = ["phi", *sorted(column for column in task.finals.columns if column.startswith("metric:"))]
    columns = [column for column in columns if task.finals[column].notna().any()]
    if not columns or columns == ["phi"] == [task.headline]:
        return None
    body = []
    for label in present:
        finals = task.finals[task.finals["method_label"] == label]
        cells: list[Cell] = [text_cell(label, method=label)]
        for column in columns:
            score = mean_interval(finals[column])
            cell = task_tables.score_cell(score, decimals_for(task.finals[column].groupby(task.finals["method_label"]).mean()))
            missing = f" (n={score.n})" if score.n and score.missing else ""
            cells.append(Cell(cell.text + missing, cell.small, cell.value))
        body.append(Row(tuple(cells), (label,)))
    heads = (Column("method", numeric=False, best="ascending"), *(Column(column.removeprefix("metric:")) for column in columns))
    return Table("metrics", f"{task.label}: every metric", "Means at the final snapshot and 95% t intervals.", heads, tuple(body))


def _phases(task: TaskResults, present: list[str]) -> list[dict]:
    """Where each method's FLOPs went: the share of every phase in the sum over its seeds, largest first."""
    shares = []
    for label in present:
        total: Counter[str] = Counter()
        for text in task.finals.loc[task.finals["method_label"] == label, "flops_by_phase"]:
            phases = _json(text)
            if isinstance(phases, dict):
                total.update({str(k): float(v) for k, v in phases.items() if isinstance(v, (int, float)) and 0 < v < 1e300})
        if total:
            sum_of_all = sum(total.values())
            largest_first = sorted(total.items(), key=lambda item: (-item[1], item[0]))
            parts = [{"phase": phase, "share": 100 * value / sum_of_all} for phase, value in largest_first]
            shares.append({"label": label, "parts": parts})
    return shares


def _specs(tasks: Sequence[TaskResults], styles: Iterable[str]) -> list[list[dict]]:
    """For each task the exact configuration of every finished cell: a method's first on the page in full, then what is not as in it.

    Texts that differ in nothing but the line `seed: ...` are shown once.
    """
    first: dict[str, tuple[str, dict[str, object]]] = {}  # of each method: what it is called, and its settings
    by_task = []
    for task in tasks:
        shown = []
        for label in (label for label in styles if (task.finals["method_label"] == label).any()):
            rows = task.finals[task.finals["method_label"] == label]
            groups: dict[str, list[tuple[int, str, str]]] = {}
            for seed, cell, spec in zip(rows["seed"], rows["cell"], rows["spec"], strict=True):
                text = spec if isinstance(spec, str) else ""
                groups.setdefault(re.sub(r"(?m)^(\s*seed:).*$", r"\1", text), []).append((int(seed), cell, text))
            for group in groups.values():
                text = group[0][2].strip()
                settings = _settings(text)
                name, known = first.get(label, ("", {}))
                unlike = _unlike(settings, known) if known and settings else ""
                if settings and not known:
                    first[label] = f"seed {group[0][0]} on {task.label}", settings
                cells = " ".join(".".join(cell.split(".")[-2:]) for _, cell, _ in group)
                shown.append({"label": label, "seeds": and_more(seed for seed, _, _ in group), "several": len(group) > 1, "cells": cells,
                              "text": unlike or text or "no specification recorded", "unlike": name if unlike else ""})  # fmt: skip
        by_task.append(shown)
    return by_task


def _settings(spec: str) -> dict[str, object]:
    """By dotted key; nothing where the text is no configuration."""
    try:
        parsed = yaml_of(spec)
    except Unreadable:
        return {}
    return leaves_of(parsed) if isinstance(parsed, dict) else {}


def _unlike(settings: dict[str, object], first: dict[str, object]) -> str:
    """A line for every setting that is not as in the first configuration."""
    other = [key for key, value in settings.items() if key not in first or first[key] != value]
    lines = [f"{key}: {json.dumps(settings[key], ensure_ascii=False, default=str)}" for key in other]
    return "\n".join([*lines, *(f"{key}: (none)" for key in first if key not in settings)])


def _versions(results: SuiteResults) -> list[dict]:
    """Every setting of the environments with its distinct values; how many cells have each where they differ."""
    finals = results.frame[results.frame["status"] == "done"].drop_duplicates("cell", keep="last")
    counts: dict[str, Counter[str]] = {}
    for text in finals["env"].dropna():
        parsed = _json(text)
        for key, value in _flat(parsed if isinstance(parsed, dict) else {"unreadable": str(text)}):
            counts.setdefault(key, Counter())[value] += 1
    total = len(finals)
    lines = []
    for key in sorted(counts):
        values = sorted(counts[key].items(), key=lambda item: (-item[1], item[0]))
        same = len(values) == 1 and values[0][1] == total
        shown = values[0][0] if same else and_more((f"{value} ({plural(count, 'cell')})" for value, count in values), limit=6)
        lines.append({"key": key, "value": shown, "same": same})
    return lines


def _flat(tree: dict, prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        pairs += _flat(value, name + ".") if isinstance(value, dict) else [(name, value if isinstance(value, str) else json.dumps(value))]
    return pairs


def _texts(text: object) -> list[str]:
    """The sample texts; a field that is not a JSON list is shown as the one text it is."""
    if not isinstance(text, str) or not text:
        return []
    parsed = _json(text)
    return [str(item) for item in parsed] if isinstance(parsed, list) else [text]


def _json(text: object) -> object:
    try:
        return json_of(text) if isinstance(text, str) else None
    except Unreadable:
        return None


def _is_png(data: object) -> bool:
    return isinstance(data, bytes) and data.startswith(PNG_SIGNATURE) and len(data) >= 24


def _picture(data: bytes) -> dict:
    """A data URI; small pictures are enlarged with hard pixel edges, because their pixels are the content."""
    width, height = struct.unpack(">II", data[16:24])
    uri = "data:image/png;base64," + base64.b64encode(_fewer_colors(data)).decode("ascii")
    return {"uri": uri, "width": width, "height": height, "small": width <= 120}


def _fewer_colors(png: bytes) -> bytes:
    """The same picture with a palette, where that is smaller; as it is where it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(png)) as opened:
            seen = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):  # a damaged PNG: the browser says so by its empty frame
        return png
    paper = Image.new("RGBA", seen.size, "white")
    paper.alpha_composite(seen)
    small = io.BytesIO()
    paper.convert("RGB").quantize(COLORS_SHOWN, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return min(png, small.getvalue(), key=len)
