"""Reading a suite's frame: what was done, what is missing, which metric leads. The rest of the report sees only these types.

The frame has one row per (cell, snapshot) and one row per cell without a result. Needed: cell, task_label, method,
method_label, seed, status, step. Used where present: reason, flops, flops_by_phase, tokens_generated, tokens_trained, seconds,
phi, headline, higher_is_better, `metric:<name>`, texts, picture, spec, env, task_description, method_description. Rows with a number in
`deployment_texts` are no snapshots but points of another axis (deployment_size.py).
"""

from __future__ import annotations

import colorsys
import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from dpgbench.report.format import and_more, file_names, plural
from dpgbench.store.parquet import NEEDED

NUMBERS = ("step", "flops", "tokens_generated", "tokens_trained", "seconds", "phi")
OPTIONAL = (
    "reason", "headline", "higher_is_better", "flops_by_phase", "deployment_texts", "texts", "picture", "spec", "env", "task_description",
)  # fmt: skip
BASE, ORACLE = "base", "oracle"  # plug-in names with a role on the page: the control, and the ceiling that does not compete

# seaborn's colorblind palette without its grey (kept for the reference methods) and with its pale yellow last; then all of it, darker.
# Written out, because tables need the colours' order and no figure: importing seaborn takes a second.
PALETTE = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#56b4e9", "#ca9161", "#fbafe4", "#ece133")
DARK = 0.22
SHAPES = {"o": "circle", "s": "square", "D": "diamond", "^": "up", "v": "down", "P": "plus", "X": "cross"}
MARKERS = tuple(SHAPES)  # 18 colours and 7 markers: 126 methods before a pair repeats
REFERENCE_MARKERS = {BASE: "h", ORACLE: "*"}  # grey, with marks that no method has
SHAPES |= {"h": "hexagon", "*": "star"}


@dataclass(frozen=True)
class Style:
    """How one method looks in every figure and on the page. `index` names its elements inside the SVGs."""

    index: int
    color: str
    marker: str
    role: str  # "method", "base" or "oracle"

    @property
    def shape(self) -> str:
        """The marker's name in the page's style sheet."""
        return SHAPES[self.marker]


@dataclass(frozen=True)
class TaskResults:
    """Everything known about one task. `snapshots` and `finals` hold finished cells only, with the headline in `value`."""

    label: str
    file_name: str
    description: str | None
    headline: str
    higher_is_better: bool
    snapshots: pd.DataFrame
    finals: pd.DataFrame
    unfinished: pd.DataFrame
    base_label: str | None
    notes: tuple[str, ...]

    @property
    def arrow(self) -> str:
        return "↑" if self.higher_is_better else "↓"

    @property
    def direction(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"

    @property
    def sign(self) -> int:
        """What turns a difference of the headline into an advantage."""
        return 1 if self.higher_is_better else -1

    def final_values(self, method_label: str, column: str = "value") -> pd.Series:
        """The headline (or another column) at the final snapshot, indexed by seed."""
        rows = self.rows_of_finals.get(method_label, [])
        return pd.Series(self.finals[column].to_numpy()[rows], index=self.finals["seed"].to_numpy()[rows]).sort_index()

    @cached_property
    def rows_of_finals(self) -> dict[str, np.ndarray]:
        """The rows of `finals` that each method has. Looked up some hundred times a report: selecting whole rows would copy their texts."""
        return self.finals.groupby("method_label").indices

    def curves(self, method_label: str) -> pd.DataFrame:
        """seed, flops, value of the snapshots that can stand on a log axis; of several at the same FLOPs the last. Not to be written to."""
        return self._curves[method_label] if method_label in self._curves else self.snapshots[["seed", "flops", "value"]].iloc[:0]

    @cached_property
    def _curves(self) -> dict[str, pd.DataFrame]:
        rows = self.snapshots[["method_label", "seed", "flops", "value"]]
        rows = rows[np.isfinite(rows["flops"]) & (rows["flops"] > 0)].drop_duplicates(["method_label", "seed", "flops"], keep="last")
        return {
            label: group.drop(columns="method_label").reset_index(drop=True) for label, group in rows.groupby("method_label", sort=False)
        }

    def competing(self) -> list[str]:
        """The labels with a finished cell, references aside, in natural order."""
        labels = self.finals.loc[~self.finals["method"].isin((BASE, ORACLE)), "method_label"].unique()
        return sorted(labels, key=natural)


@dataclass(frozen=True)
class SuiteResults:
    name: str
    tasks: tuple[TaskResults, ...]
    styles: dict[str, Style]  # by method label, in the order shown
    cells_by_status: dict[str, int]
    frame: pd.DataFrame
    deployments: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Rows of last answers deployed at several sizes (`deployment_size`), which `frame`, a row per snapshot, does not have."""

    def labels(self, *roles: str) -> list[str]:
        """The method labels of these roles ("method", "base", "oracle"), in the order shown."""
        return [label for label, style in self.styles.items() if style.role in roles]


def natural(text: str) -> list[object]:
    """A sort key that puts n4 before n16."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"([0-9]+)", text)] + [text]


def read_frame(frame: pd.DataFrame, suite: str) -> SuiteResults:
    """Sort, check and split the frame. ValueError names the columns that a non-empty frame lacks."""
    lacking = [name for name in NEEDED if name not in frame.columns]
    if lacking and len(frame):
        raise ValueError(f"the frame lacks the column(s) {', '.join(lacking)}; a report needs {', '.join(NEEDED)}")
    frame = frame.reset_index(drop=True).copy()
    for name in (*NEEDED, *NUMBERS, *OPTIONAL):
        if name not in frame.columns:
            frame[name] = np.nan if name in NUMBERS else pd.Series([None] * len(frame), dtype=object)
    for name in (*NUMBERS, *(column for column in frame.columns if column.startswith("metric:"))):
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
    for name in ("cell", "task_label", "method", "method_label", "status"):
        frame[name] = frame[name].astype(str)
    # Python ints where seeds are ints: parquet with holes turns them into floats, and "seed 0.0" is nobody's name for it.
    frame["seed"] = pd.Series([int(seed) if pd.notna(seed) else -1 for seed in frame["seed"]], dtype=int)
    frame = frame.sort_values(["task_label", "method_label", "seed", "cell", "step"], kind="stable").reset_index(drop=True)
    of_sizes = frame["deployment_texts"].notna()
    frame, deployments = frame[~of_sizes].reset_index(drop=True), frame[of_sizes].reset_index(drop=True)

    tasks_in_order = sorted(frame["task_label"].unique(), key=natural)
    names = file_names(tasks_in_order)
    tasks = tuple(_read_task(frame[frame["task_label"] == label], label, names[label]) for label in tasks_in_order)
    status = frame.drop_duplicates("cell")["status"].value_counts()
    return SuiteResults(suite, tasks, _styles(frame), {name: int(status[name]) for name in sorted(status.index)}, frame, deployments)


def _read_task(rows: pd.DataFrame, label: str, file_name: str) -> TaskResults:
    notes: list[str] = []
    finished = rows[rows["status"] == "done"]
    unfinished = rows[rows["status"] != "done"].drop_duplicates("cell")
    headline, higher_is_better = _headline(finished, notes)
    column = headline if headline == "phi" else f"metric:{headline}"
    if len(finished) and column not in finished.columns:
        notes.append(f"The frame has no column {column!r}, which this task names as its headline: no score can be shown.")
    finished = finished.assign(value=finished[column] if column in finished.columns else np.nan)
    finished = finished.drop_duplicates(["cell", "step"], keep="last")

    # One cell per method and seed: averaging two versions of a configuration, or picking one silently, would both mislead.
    last_cell = finished.groupby(["method_label", "seed"])["cell"].transform("max")
    superseded = finished[finished["cell"] != last_cell]
    if len(superseded):
        cells = sorted(superseded["cell"].unique())
        notes.append(f"More than one cell for the same method and seed; the last by name is used, left out: {and_more(cells)}.")
    finished = finished[finished["cell"] == last_cell]
    finals = finished.drop_duplicates("cell", keep="last")  # sorted by step: the last row is the final snapshot

    for method_label, group in finals[finals["value"].isna()].groupby("method_label"):
        seeds = and_more(group["seed"])
        notes.append(f"{method_label}: the final {headline} is NaN for seed {seeds}; counted as missing, not averaged.")
    bases = sorted(finals.loc[finals["method"] == BASE, "method_label"].unique(), key=natural)
    base_label = (BASE if BASE in bases else bases[0]) if bases else None
    if len(bases) > 1:
        notes.append(f"Several controls ({', '.join(bases)}); differences are taken to {base_label}.")
    if base_label is None:
        notes.append("No finished cell of base (the untouched generator): differences to it cannot be shown.")
    if finals.empty:
        notes.insert(0, f"No finished cell on this task ({plural(len(unfinished), 'cell')} without a result, listed below).")
    descriptions = rows["task_description"].dropna()
    description = str(descriptions.iloc[0]).strip() if len(descriptions) else None
    return TaskResults(
        label, file_name, description, headline, higher_is_better,
        finished.reset_index(drop=True), finals.reset_index(drop=True), unfinished.reset_index(drop=True), base_label, tuple(notes),
    )  # fmt: skip


def _headline(finished: pd.DataFrame, notes: list[str]) -> tuple[str, bool]:
    """The metric that leads and its direction; where cells disagree the most frequent answer, with a note."""
    pairs = finished[["headline", "higher_is_better"]].dropna(subset=["headline"])
    if pairs.empty:
        if len(finished):
            notes.append("No cell names a headline metric: phi is shown.")
        return "phi", True
    counts = pairs.value_counts(dropna=False)
    (headline, higher), most = counts.index[0], counts.iloc[0]
    if len(counts) > 1:
        headline, higher = min((key for key, count in counts.items() if count == most), key=str)
        named = and_more(sorted(f"{name} ({'higher' if up else 'lower'} is better)" for name, up in counts.index))
        notes.append(f"Cells of this task disagree on the headline metric: {named}; {headline} is shown.")
    return str(headline), bool(higher) if pd.notna(higher) else True


def _styles(frame: pd.DataFrame) -> dict[str, Style]:
    """Colour and marker per method label: one mapping for the whole suite, in natural order, references last."""
    palette = [*PALETTE, *map(darker, PALETTE)]
    methods = zip(frame["method_label"], frame["method"], strict=True)
    roles = {label: (method if method in (BASE, ORACLE) else "method") for label, method in methods}
    order = {"method": 0, BASE: 1, ORACLE: 2}
    styles: dict[str, Style] = {}
    for index, label in enumerate(sorted(roles, key=lambda name: (order[roles[name]], natural(name)))):
        color = "#6e7781" if roles[label] != "method" else palette[index % len(palette)]
        marker = REFERENCE_MARKERS.get(roles[label], MARKERS[index % len(MARKERS)])
        styles[label] = Style(index, color, marker, roles[label])
    return styles


def darker(color: str) -> str:
    """A colour (#rrggbb) of the same hue and saturation, at lightness `DARK`."""
    red, green, blue = (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    hue, _, saturation = colorsys.rgb_to_hls(red, green, blue)
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, DARK, saturation))
