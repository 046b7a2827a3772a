"""The same cells are the same bytes in whatever order, process, place, language and time zone they are run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL

TIMES = {"timings.jsonl", "result.json", "env.json", "log.txt", "picture.png"}  # they say when, how long or where


def sweep(results: Path, tasks: str, methods: str, *words: str, cwd: Path = ROOT, **variables: str) -> dict[str, bytes]:
    """The cells' files, but for those that have a time in them."""
    command = [sys.executable, "-m", "dpgbench", "sweep", f"task={tasks}", f"method={methods}", "n=2", *SMALL, *words, f"results={results}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    files = [path for path in (results / "runs").glob("*.s0.*/*") if path.name not in TIMES and not path.name.startswith("lock")]
    return {str(path.relative_to(results)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_circumstances_change_no_byte(tmp_path):
    """In order in one process; and turned round, in two workers, from another folder, with other hashes, language, clock and threads."""
    quiet = sweep(tmp_path / "quiet", "language,l2_norm", "dpg_token,active_inheritance")
    strange = {"PYTHONHASHSEED": "77", "LANG": "C", "LC_ALL": "C", "TZ": "Pacific/Kiritimati", "OMP_NUM_THREADS": "2"}
    workers = ["launcher=local", "launcher.workers=2"]
    elsewhere = sweep(tmp_path / "elsewhere", "l2_norm,language", "active_inheritance,dpg_token", *workers, cwd=tmp_path, **strange)
    assert len(quiet) >= 4 * 4 and any(name.endswith("generator.safetensors") for name in quiet)
    assert quiet == elsewhere
