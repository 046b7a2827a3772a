"""From run folders to one table: the frame behind `results/<suite>.parquet` and everything the report shows."""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpgbench.core.cell import Cell
from dpgbench.core.documents import json_of
from dpgbench.core.errors import UserError
from dpgbench.core.files import write_atomically
from dpgbench.core.options import leaves_of
from dpgbench.store.run_folder import RunFolder

if TYPE_CHECKING:
    import pandas
    import pyarrow

SCHEMA = "1"


def frame_of(
    cells: Sequence[Cell], results: Path, descriptions: Mapping[str, str], kept: pandas.DataFrame | None = None
) -> pandas.DataFrame:
    """One row per (cell, snapshot), and one for each cell without a result, with the reason.

    `kept` is what an earlier call gave, from a parquet: a cell that is finished there and has no finished run folder here keeps its rows,
    so that a stored suite is extended seed by seed, on one machine after another. Only its labels are made anew.

    A cell with `scale.more_deployments` has rows of its last answer's deployment datasets besides, its own among them, with their sizes in
    `deployment_texts`: no part of the curve, whose rows have nothing there (`report.results` keeps them apart).
    `descriptions` says in a line what each task is.
    Raises UserError on a damaged cell.
    """
    import pandas

    labels = _labels(cells)
    stored = _finished_rows(kept)
    rows: list[dict[str, Any]] = []
    for cell in cells:
        task_label, method_label = labels[cell.spec.folder]
        row = {
            "cell": cell.spec.folder, "task": cell.spec.task.name, "task_label": task_label,
            "task_description": descriptions.get(cell.spec.task.name, ""), "method": cell.spec.method.name,
            "method_label": method_label, "seed": cell.spec.seed,
        }  # fmt: skip
        folder = RunFolder.of(results, cell.spec)
        state = folder.state()
        if cell.skip or state.name != "done":
            if state.name == "damaged":
                folder.result()  # says what is wrong and how to mend it
            if cell.spec.folder in stored:
                rows += [{**line, **row} for line in stored[cell.spec.folder]]
                continue
            reason = cell.skip or state.detail or ("not run yet" if state.name == "missing" else None)
            rows.append(
                {**row, "status": "skipped" if cell.skip else "missing" if state.name == "interrupted" else state.name, "reason": reason}
            )
            continue
        rows += _snapshot_rows(row, folder)
    frame = pandas.DataFrame(rows)
    measures = sorted(column for column in frame.columns if column.startswith("metric:"))
    own = [SIZE] if SIZE in frame.columns else []
    return frame.reindex(columns=[*COLUMNS, *own, *measures, *BLOBS])


def _finished_rows(frame: pandas.DataFrame | None) -> dict[str, list[dict[str, Any]]]:
    """The rows of each finished cell of a stored frame, without what is empty there."""
    if frame is None:
        return {}
    done = frame[frame["status"] == "done"]
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in done.to_dict("records"):
        rows[line["cell"]].append({name: value for name, value in line.items() if not _is_empty(value)})
    return rows


def _is_empty(value: Any) -> bool:
    return value is None or value != value  # the second for NaN


SIZE = "deployment_texts"
NEEDED = ("cell", "task_label", "method", "method_label", "seed", "status", "step")
WORDS = (
    "cell", "task", "task_label", "task_description", "method", "method_label", "status", "reason", "flops_by_phase", "headline",
    "method_description",
)  # fmt: skip


COLUMNS = [
    "cell", "task", "task_label", "task_description", "method", "method_label", "seed", "status", "reason",
    "step", "flops", "flops_by_phase", "tokens_generated", "tokens_trained", "seconds", "phi", "headline", "higher_is_better",
]  # fmt: skip
BLOBS = ["texts", "picture", "spec", "env"]


def _snapshot_rows(row: dict[str, Any], folder: RunFolder) -> list[dict[str, Any]]:
    result = folder.scored()

    def scored(line: dict[str, Any]) -> dict[str, Any]:
        return {
            **row, "status": "done", "step": line["snapshot"], "flops": line["flops"],
            "flops_by_phase": json.dumps(line["flops_by_phase"]), "tokens_generated": line["tokens_generated"],
            "tokens_trained": line["tokens_trained"], "seconds": line["seconds"], "phi": line["phi"],
            "headline": result["headline"], "higher_is_better": result["higher_is_better"],
            **{f"metric:{name}": value for name, value in line["measures"].items()},
        }  # fmt: skip

    rows = [scored(snapshot) for snapshot in result["snapshots"]]
    drawn = (folder.path / "picture.png").exists()
    rows[-1] |= {
        "texts": json.dumps(result["texts"], ensure_ascii=False),
        "picture": folder.whole("picture.png").read_bytes() if drawn else None,
        **{name.partition(".")[0]: folder.text(name) for name in ("spec.yaml", "env.json")},
    }
    return rows + [{**scored(line), SIZE: line[SIZE]} for line in result.get("deployments", [])]


def write_parquet(frame: pandas.DataFrame, path: Path, *, suite: str, title: str, command: str) -> None:
    """The frame and what a page needs besides, atomically."""
    import io

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    about = {"schema": SCHEMA, "suite": suite, "title": title, "command": command}
    about["checksum"] = _checksum(about, table)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"dpgbench": json.dumps(about).encode()})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    write_atomically(path, buffer.getvalue())


def read_parquet(path: Path) -> tuple[pandas.DataFrame, dict[str, str]]:
    """The frame and {"suite", "title", "command"}. Raises UserError if the file is not one of ours.

    Columns have the types that are stored, whatever the file's own notes for pandas say; pages are held to their checksums where they have
    some.
    """
    import pyarrow.parquet

    fix = "restore it or run the suite again"
    try:
        table = pyarrow.parquet.read_table(path, page_checksum_verification=True)
        about = json_of((table.schema.metadata or {}).get(b"dpgbench", b"{}"))
        checksum = about.pop("checksum", None) if isinstance(about, dict) else None  # none: written before there were any
        if checksum not in (None, _checksum(about, table)):
            raise ValueError("its checksum differs")
        frame = table.to_pandas(ignore_metadata=True)
    except Exception as error:  # of whatever kind: a flipped bit of the footer is a key that is missing, or a length beyond all memory
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as parquet ({said}); {fix}") from None
    schema = about.get("schema") if isinstance(about, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: written with schema {schema}, this dpgbench reads {SCHEMA}; run `report` where its run folders are")
    if about.keys() != {"schema", "suite", "title", "command"} or not all(isinstance(value, str) for value in about.values()):
        raise UserError(f"{path}: does not say what it is of; {fix}")
    flaw = _flaw_of(frame)
    if flaw:
        raise UserError(f"{path}: {flaw}; {fix}")
    return frame, about


def _checksum(about: Mapping[str, str], table: pyarrow.Table) -> str:
    """Of what the pages' own checksums leave out: what the file says of itself, its columns' names, and which of them pandas is to see."""
    for_pandas = (table.schema.metadata or {}).get(b"pandas", b"")
    return f"{zlib.crc32(json.dumps([dict(about), table.column_names]).encode() + for_pandas):08x}"


def _flaw_of(frame: pandas.DataFrame) -> str:
    """What a stored frame lacks for a report; "" if nothing."""
    import pandas

    if not frame.columns.is_unique:
        return "two columns have one name"
    if not len(frame):
        return ""
    lacking = [name for name in NEEDED if name not in frame.columns]
    if lacking:
        return f"it has no column {lacking[0]}"
    for name in frame.columns:
        column = frame[name]
        if name in (*WORDS, *BLOBS):
            what, kinds = ("pictures", bytes) if name == "picture" else ("text", str)
        elif (name in COLUMNS or name.startswith("metric:")) and not pandas.api.types.is_numeric_dtype(column):
            what, kinds = "numbers", (bool, int, float)
        else:
            continue
        if not all(value is None or isinstance(value, kinds) or (isinstance(value, float) and value != value) for value in column):
            return f"its column {name} holds something else than {what}"
    if frame[[*NEEDED[:-1]]].isna().any().any():
        return "a row does not say which cell it is of"
    if not (frame["seed"].astype(float).abs() < 2.0**63).all():
        return "a seed is no whole number"
    return ""


def stored_frame(path: Path) -> pandas.DataFrame | None:
    """The frame of a parquet; None where there is none that can be read."""
    try:
        return read_parquet(path)[0]
    except UserError:
        return None


def finished(frame: pandas.DataFrame | None) -> set[str]:
    """The finished cells of a frame."""
    return set() if frame is None else set(frame.cell[frame.status == "done"])


def _labels(cells: Sequence[Cell]) -> dict[str, tuple[str, str]]:
    """What to call each cell's task and method. Settings that vary within one label (a sweep over policy.lr, say) are spelled out.

    So are budgets, but only where one seed has several: those of `budget=match:METHOD` differ from seed to seed.
    """
    by_label: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        by_label[cell.spec.task.label, cell.spec.method.label].append(cell)
    labels = {}
    for (task_label, method_label), alike in by_label.items():
        settings = {cell.spec.folder: _flat(cell.spec.config) for cell in alike}
        if len({(repr(settings[cell.spec.folder]), cell.spec.seed) for cell in alike}) < len(settings):
            for cell in alike:
                settings[cell.spec.folder] |= {f"budget.{name}": f"{limit:g}" for name, limit in cell.spec.budget.items()}
        keys = sorted({key for values in settings.values() for key in values})
        varying = [key for key in keys if len({repr(values.get(key)) for values in settings.values()}) > 1 and not key.endswith("_sha256")]
        for folder, values in settings.items():

            def suffix(belongs: bool, values: dict[str, Any] = values, varying: list[str] = varying) -> str:
                return "".join(f" {key.rpartition('.')[2]}={values.get(key)}" for key in varying if key.startswith("task.") is belongs)

            labels[folder] = task_label + suffix(True), method_label + suffix(False)
    return labels


def _flat(config: Any) -> dict[str, Any]:
    return leaves_of({section: config[section] for section in ("task", "method", "training", "scale")})
