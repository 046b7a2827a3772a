"""report and export: what finished cells become."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from dpgbench import config
from dpgbench.cli.arguments import full_words, inert, place_of, selector, take_format
from dpgbench.config.overrides import one
from dpgbench.core.errors import UserError
from dpgbench.core.text import json_text
from dpgbench.plugins.registry import Registry
from dpgbench.store import run_folder


def write_report(words: list[str]) -> int:
    """Collect a sweep into its parquet (where there are run folders) and build the page from that, or say it in JSON."""
    words, as_json = take_format(words)
    if "--compare" in words:
        return compare(words, as_json)
    results, name, nothing_else = place_of(words)
    parquet = results / f"{name}.parquet"
    full = full_words(words)
    known = full != words or name in config.suites(Registry()) or not nothing_else
    # Where there is no run folder at all, the cells need not be put together, which takes seconds for a large suite.
    folders = not nothing_else or any(path.is_dir() for path in (results / "runs").glob("*"))
    request = config.read(full, sweep=True) if known and folders else None
    has_runs = request is not None and any((results / "runs" / cell.spec.folder).exists() for cell in request.cells)
    if not has_runs and not parquet.exists():
        raise UserError(
            f"{selector(name)}={name}: nothing to report: no run folders of it under {results / 'runs'} and no {parquet}; run `sweep` first"
        )
    from dpgbench.report import build, machine_readable
    from dpgbench.store import parquet as collect

    run_folder.check_writable(results)
    if has_runs:
        said = shlex.join(
            word for word in request.arguments if not word.startswith(("results=", "launcher", "workers=", "plugins=", "retry="))
        )
        descriptions = {file.name: file.summary for file in request.registry.files("task")}
        stored = collect.stored_frame(parquet)
        if stored is None and parquet.exists():
            aside = parquet.with_name(f"{parquet.name}.damaged")
            parquet.replace(aside)  # it may have had cells that are nowhere else
            print(inert(f"{parquet}: cannot be read; kept as {aside}, collecting anew"), file=sys.stderr if as_json else sys.stdout)
        frame = collect.frame_of(request.cells, results, descriptions, kept=stored)
        lost = collect.finished(stored) - collect.finished(frame)
        if lost:
            print(inert(_not_collected(lost, parquet, results)), file=sys.stderr if as_json else sys.stdout)
        else:
            collect.write_parquet(frame, parquet, suite=name, title=request.title, command=f"python -m dpgbench sweep {said}")
    frame, about = collect.read_parquet(parquet)
    command = f"{about['command']}\npython -m dpgbench report {selector(name)}={name}"
    protocol = config.protocol_of(request.registry if request is not None else Registry(), about["suite"])
    what = {"suite": about["suite"], "command": command, "title": about["title"] or None, "protocol": protocol}
    if as_json:
        print(json_text(machine_readable(frame, **what)))
    else:
        print(f"report: {inert(str(build(frame, results / name, **what)))}")
    return 0


def _not_collected(lost: set[str], parquet: Path, results: Path) -> str:
    """Why the parquet stays as it is: collecting anew would lose these finished cells, which the line does not name."""
    from dpgbench.report.format import plural

    why = f"{parquet} has {plural(len(lost), 'finished cell')} that this line, or the last sweep, does not name: reporting from it"
    if any((results / "runs" / cell).exists() for cell in lost):
        return f"{why}; name all of them in one line, as in seed=0,1,2, or delete {parquet} to leave these out"
    return f"{why}; name them too, or delete {parquet} to leave these out"


def export_cell(words: list[str]) -> int:
    """Generator and dataset of a finished cell, in a folder of their own."""
    runs = [word for word in words if not word.startswith("to=")]
    if len(runs) != 1 or len(words) > 2:
        raise UserError(f"export {' '.join(words)}: takes one run folder, and to=DIR if you like; write export results/runs/CELL to=mine")
    from dpgbench.run.export import export

    to = one(config.parse(word for word in words if word not in runs), "to")
    print(f"exported to {inert(str(export(Path(runs[0]), None if to is None else Path(to))))}")
    return 0


def compare(words: list[str], as_json: bool) -> int:
    """Two stored suites, or two commits of one, on standard output."""
    at = words.index("--compare")
    sides, rest = words[at + 1 : at + 3], words[:at] + words[at + 3 :]
    if len(sides) < 2 or any("=" in side for side in sides):
        raise UserError(
            "--compare: needs two sides, each a suite, suite@revision or a parquet file; write --compare methods@HEAD~1 methods"
        )
    unknown = [word for word in rest if not word.startswith("results=")]
    if unknown:
        raise UserError(f"{unknown[0]}: --compare takes two sides and nothing else but results=DIR and --format json")
    results = place_of(rest)[0]
    if not results.is_dir():
        raise UserError(f"results={results}: there is no such folder; give the one that holds the parquet files")
    from dpgbench.report import compare

    table = compare.compare(*(compare.read_side(side, results) for side in sides))
    print(compare.as_json(table) if as_json else compare.as_markdown(table), end="\n" if as_json else "")
    return 0
