"""Rooms and the arrows between them, as docs/architecture.md shows them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib

from conftest import ROOT

PACKAGE = ROOT / "dpgbench"
# Where users import from, beside the rooms: re-exports, and the program itself.
DOORS = {"__init__", "__main__", "api", "score_task", "training"}


def layers() -> list[str]:
    """As pyproject.toml has them, from top to bottom."""
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    return contract["layers"]


def test_imports_go_one_way():
    """From a room to the rooms below it, inside functions and for types as well. In a process of its own: it switches all loggers off."""
    lint = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_has_its_place():
    """A folder that no layer names could import, and be imported, as it likes; so could a file beside the rooms."""
    named = {name.strip().removeprefix("dpgbench.") for layer in layers() for name in layer.split("|")}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert named == rooms | {"api"}
    assert {path.stem for path in PACKAGE.glob("*.py")} == DOORS


def test_the_picture_shows_every_room():
    """docs/architecture.md: in its table and in its diagram."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room in {path.parent.name for path in PACKAGE.glob("*/__init__.py")}:
        assert f"| `{room}/` |" in text and re.search(rf'\["{room}/ ', text), room


def imported(path) -> set[str]:
    """The modules that a file imports, wherever it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_plugins_do_not_know_each_other_and_one_file_knows_trl():
    """Nobody imports a plug-in, not even another one; only `bench/grpo.py` imports TRL."""
    plugins = [*(ROOT / "methods").glob("*.py"), *(ROOT / "tasks").glob("*.py")]
    for path in [*plugins, *PACKAGE.rglob("*.py")]:
        names = imported(path)
        assert not any(name.split(".")[0] in ("methods", "tasks", "dpgbench_plugins") for name in names), path
        assert path.name == "grpo.py" or not any(name.split(".")[0] == "trl" for name in names), path
