"""The code a sweep was submitted with: a copy beside the results, named by its content, that jobs run hours later.

results/code/<digest>/
    dpgbench/ methods/ tasks/ configs/    as they were at submission
    plugins/                              the user's own folder, if there was one
    COMMIT                                the checkout's commit, for env.json
Submitting the same code again finds the same folder. Installed packages are not copied; every cell's env.json has their versions.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dpgbench.core.errors import UserError
from dpgbench.core.files import replacing
from dpgbench.core.paths import PACKAGE, home

PARTS = ("dpgbench", "methods", "tasks", "configs")
# Rooms whose code makes no number of a cell: what decides which cells there are, where they run and how results are shown.
ROOMS_WITHOUT_EFFECT = ("cli", "config", "launch", "report", "stats", "configs", "bundled/configs")
SKIPPED = {"__pycache__", ".git", ".venv", "results", "runs", ".pytest_cache", ".ruff_cache"}


def digest(plugins: Path | None = None) -> str:
    """Twelve hex digits over the code that makes a cell's numbers: what half a cell and its other half must share. About 10 ms."""
    return _digest(_code(plugins))


def _digest(files: dict[str, Path]) -> str:
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name} {hashlib.sha256(files[name].read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:12]


def _code(plugins: Path | None) -> dict[str, Path]:
    def counts(name: str) -> bool:
        inside = name.removeprefix("dpgbench/")
        return name.endswith(".py") and not inside.startswith(tuple(f"{room}/" for room in ROOMS_WITHOUT_EFFECT))

    return {name: path for name, path in _everything(plugins).items() if counts(name)}


def _everything(plugins: Path | None) -> dict[str, Path]:
    """All files a job needs, by their name in the copy."""
    files = {f"dpgbench/{name}": path for name, path in _walk(PACKAGE)}
    for part in PARTS[1:]:
        if home() != PACKAGE / "bundled":  # an installed wheel carries them inside the package
            files |= {f"{part}/{name}": path for name, path in _walk(home() / part)}
    if plugins is not None:
        for part in PARTS[1:]:
            files |= {f"plugins/{part}/{name}": path for name, path in _walk(plugins / part)}
    return files


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for name in sorted(names):
            path = Path(parent) / name
            if not name.endswith((".pyc", ".partial")):
                yield path.relative_to(folder).as_posix(), path


def pin(results: Path, plugins: Path | None, commit: str) -> Path:
    """Copy the running code under `results/code/`, or find the copy that is there already. Returns its folder.

    Raises UserError if a copy of that name was changed since.
    """
    files = _everything(plugins)
    name = _digest(files)
    there = results.resolve() / "code" / name
    if there.is_dir():
        verify(there)
        return there
    with replacing(there, first_wins=True) as partial:  # another sweep may be first with the same content
        for inside, path in files.items():
            (partial / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, partial / inside)
        (partial / "COMMIT").write_text(commit, encoding="utf-8")
    return there


def verify(there: Path) -> None:
    """Raises UserError if a copy is not what it was when it was made: its name is the digest of its content."""
    files = {name: path for name, path in _walk(there) if name != "COMMIT"}
    found = _digest(files)
    if found != there.name:
        raise UserError(f"{there}: changed since it was pinned (its content is {found} now); delete the folder and run `sweep` again")
