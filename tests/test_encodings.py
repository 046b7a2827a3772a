"""Everything is read and written as UTF-8, whatever the locale."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = sorted(path for folder in ("dpgbench", "methods", "tasks", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
READ_TEXT = {"open", "fdopen", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile"}


def without_encoding(source: str) -> list[int]:
    """Lines of calls that open a file, or read a process's output, as text in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        words = [value.value for value in [*node.args, *given.values()] if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        if ast.unparse(node.func) in ("os.open", "Image.open"):  # a descriptor, a picture: no text
            continue
        binary = any("b" in word and set(word) <= set("rwaxb+") for word in words)
        opens = name in READ_TEXT and not binary
        if "encoding" not in given and (opens or {"text", "universal_newlines"} & set(given)):
            found.append(node.lineno)
    return found


def test_no_file_is_opened_in_the_locales_encoding():
    """The test sees what it is meant to see, and the tree has none of it."""
    assert without_encoding("open(p)\nopen(p, 'rb')\np.read_text()\np.write_text('a', encoding='utf-8')\nrun(w, text=True)") == [1, 3, 5]
    bad = {str(path.relative_to(ROOT)): lines for path in SOURCES if (lines := without_encoding(path.read_text(encoding="utf-8")))}
    assert bad == {}


PLUGIN = '''\
"""Ü."""
from dpgbench.api import Method, Snapshot


class Echo(Method):
    def run(self, bench):
        yield Snapshot(0, lambda prompts: ["ein Mädchen 猫"] * len(prompts))
'''


C_LOCALE = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def own_plugin(tmp_path: Path) -> Path:
    own = tmp_path / "größer"
    for name, text in (("methods/echo.py", PLUGIN), ("configs/method/echo.yaml", "name: echo\nlabel: écho\n")):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(text, encoding="utf-8")
    return own


def test_names_in_a_locale_that_is_not_utf8(tmp_path):
    """Read from the command line and from files, and written, with Python's own UTF-8 mode switched off."""
    own = own_plugin(tmp_path)
    done = subprocess.run([sys.executable, "-m", "dpgbench", "list", f"plugins='{own}'"], cwd=ROOT, env=C_LOCALE, capture_output=True)
    assert done.returncode == 0 and re.search(r"^echo +Ü\.", done.stdout.decode("utf-8"), re.MULTILINE), done


@pytest.mark.slow
def test_a_cell_and_its_report_in_a_locale_that_is_not_utf8(tmp_path):
    """Names, texts, paths and output beyond ASCII."""
    own = own_plugin(tmp_path)
    (own / "Texte.txt").write_text("\n".join(f"ein Mädchen sieht {number} Häuser" for number in range(20)), encoding="utf-8")
    name, place = "name='größe'", f"results='{own / 'r'}'"
    few = ["deployment_texts=8", "deployment_steps=null"]
    words = ["task=language", f"file='{own / 'Texte.txt'}'", "method=echo", *few, f"plugins='{own}'", name, place]
    for command in (["sweep", *words], ["report", *words], ["status", place]):
        line = [sys.executable, "-m", "dpgbench", *command]
        done = subprocess.run(line, cwd=ROOT, env=C_LOCALE, capture_output=True, timeout=120)
        assert done.returncode == 0, (command, done.stderr.decode())
    assert "écho" in done.stdout.decode("utf-8")
    (folder,) = (own / "r" / "runs").glob("language_de_Texte.écho.s0.*")
    assert json.loads((folder / "deployment.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"] == "ein Mädchen 猫"
    assert "ein Mädchen 猫" in (own / "r" / "größe" / "index.html").read_text(encoding="utf-8")
