"""The committed results: their tables are what this code makes of the committed parquet, byte for byte."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys

import pytest
from conftest import README, ROOT

from dpgbench import config
from dpgbench.plugins.registry import Registry
from dpgbench.report import read_contents, table_files
from dpgbench.store.parquet import read_parquet

SUITES = sorted((ROOT / "results").glob("*.parquet"))
COMMITTED = [path for path in SUITES if (path.parent / path.stem / "tables").is_dir()]


@functools.cache
def contents_of(parquet):
    frame, about = read_parquet(parquet)
    return read_contents(frame, about["suite"], config.protocol_of(Registry(), about["suite"]))


@pytest.mark.slow
@pytest.mark.parametrize("parquet", COMMITTED, ids=lambda path: path.stem)
def test_the_parquet_alone_rebuilds_every_committed_table(parquet):
    tables = parquet.parent / parquet.stem / "tables"
    stored = {path.name: path.read_bytes() for path in tables.iterdir()}
    made = {name: text.encode("utf-8", "replace") for name, text in table_files(contents_of(parquet)).items()}
    assert sorted(made) == sorted(stored), "`report` leaves files of an earlier build alone: remove those it no longer makes"
    assert [name for name in made if made[name] != stored[name]] == []


@pytest.mark.slow
def test_ten_numbers_are_recomputed_without_the_package():
    """tests/recompute.py: pandas and scipy alone; also that it would see a wrong number."""
    script, parquet = ROOT / "tests" / "recompute.py", ROOT / "results" / "methods.parquet"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 60 and "import dpgbench" not in script.read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, str(script), str(parquet)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("ok ") == 10, done.stdout + done.stderr


@pytest.mark.slow
def test_the_recomputation_sees_a_wrong_number(tmp_path):
    tables = tmp_path / "tables"
    shutil.copytree(ROOT / "results" / "methods" / "tables", tables)
    summary = (tables / "summary.md").read_text(encoding="utf-8")
    line = next(line for line in summary.splitlines() if line.startswith("| dpg ") and "e+12" in line)
    (tables / "summary.md").write_text(summary.replace(line, re.sub(r"\d\.\d\d \[", "9.87 [", line, count=1)), encoding="utf-8")
    words = [sys.executable, str(ROOT / "tests" / "recompute.py"), str(ROOT / "results" / "methods.parquet"), str(tables)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout.count("WRONG") == 1 and "WRONG mean rank" in done.stdout, done.stdout + done.stderr


def test_there_is_something_committed():
    assert COMMITTED


@pytest.mark.slow
def test_the_readme_quotes_what_was_computed():
    """The report's findings word for word, those of the primary tests among them, and a table: a row per method, a column per task, rounded
    as the README chose to."""
    contents = contents_of(ROOT / "results" / "methods.parquet")
    tasks = {task.label: task for task in contents.results.tasks if task.competing()}
    said = " ".join(README.replace("\n>", "\n").split())
    primary = [finding for table in contents.pooled for finding in table.findings]
    assert len(primary) >= 2 and all(finding in said for finding in (*contents.winners.findings, *contents.phi.findings, *primary))
    lines = README.split("## A first result")[1].split("\n## ")[0].splitlines()
    head, _, *rows = [[cell.strip().strip("*`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert sorted(head[1:]) == sorted(tasks)
    assert {row[0] for row in rows} == {label for task in tasks.values() for label in task.finals["method_label"].unique()}
    for label, *quoted in rows:
        for task, text in zip(head[1:], quoted, strict=True):
            values = tasks[task].final_values(label)
            computed = f"{values.mean():.{len(text.partition('.')[2])}f}" if len(values) else ""
            assert text == computed, f"{label} on {task}"
