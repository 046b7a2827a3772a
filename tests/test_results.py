"""The committed results: their tables are what this code makes of the committed parquet, byte for byte."""

from __future__ import annotations

import pytest
from conftest import ROOT

from dpgbench.collect import read_parquet
from dpgbench.report import read_contents, table_files

SUITES = sorted((ROOT / "results").glob("*.parquet"))
COMMITTED = [path for path in SUITES if (path.parent / path.stem / "tables").is_dir()]


@pytest.mark.parametrize("parquet", COMMITTED, ids=lambda path: path.stem)
def test_the_parquet_alone_rebuilds_every_committed_table(parquet):
    frame, about = read_parquet(parquet)
    tables = parquet.parent / parquet.stem / "tables"
    stored = {path.name: path.read_bytes() for path in tables.iterdir()}
    made = {name: text.encode("utf-8", "replace") for name, text in table_files(read_contents(frame, about["suite"])).items()}
    assert sorted(made) == sorted(stored), "`report` leaves files of an earlier build alone: remove those it no longer makes"
    assert [name for name in made if made[name] != stored[name]] == []


def test_there_is_something_committed():
    assert COMMITTED
