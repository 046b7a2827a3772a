"""The LaTeX tables, compiled: the stored ones, and tables whose texts are hostile or in other languages."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from conftest import ROOT
from test_hostile import TEXTS

from dpgbench.report.table import LATEX, Cell, Column, Row, Table, latex, latex_file, tex, text_cell

STORED = sorted((ROOT / "results").glob("*/tables/*.tex"))
LETTERS = {
    "accents": "déjà vu, Łódź, ąęș, ñandú, ß, ﬁ",
    "quotes": "„a“ «b» ‚c‘ “d” – — … ’ ¡¿",
    "signs": "€ £ ¥ § © ® ° µ · ÷ ¼ ² ™ ‰ † • → ⇒ ≈ ≠ ∞ √ ∑ ∂ π ω Ω − ±",
    "Cyrillic": "Привет, мир",
    "Greek": "Καλημέρα Φ φ",
    "Arabic and Hebrew": "مرحبا שלום",
    "Indic": "नमस्ते வணக்கம்",
    "East Asian": "标题 日本語 한국어 ，。「」",
    "emoji": "😀 👩‍💻 🇩🇪 ☺️",
    "combining": "e\u0301 a\u0308\u0301 \u0301",
    "invisible": "a\u200bb\u200dc\u00add\ufefef\u00a0g\u2060h\ufeff",
    "no character": "\ufffd \uffff \U0010ffff \ue000",
    "half a pair": "\ud800",
    "control": "\x00\x01\x08\x0b\x7f\x85",
    "carets": "^^M ^^5c ^^^^005c",
    "joined": "--dry-run --- `` '' ?` !` ,, << >> \"a\" -- '",
    "conditional": r"\fi\else\iftrue\end{tabular}\end{document}",
    "definition": r"\def\x{\x}\x \csname x\endcsname \catcode`\%=12 \openin1=/etc/passwd",
    "braces": "}}}{{{",
    "rows": r"\\ & \\[1cm] \hline \cr",
    "empty": "",
    "a word without end": "x" * 3000,
    "long": "a word " * 500,
    "long, of numbers": "标题" * 300,
}
HOSTILE = TEXTS | LETTERS
COMPILES = pytest.mark.skipif(not shutil.which("pdflatex"), reason="compiling needs pdflatex (Debian: texlive-latex-recommended)")


def table_of(text: str, name: str = "t") -> Table:
    """The text in every place that a table has, a row's start and end above all."""
    columns = (Column(text, numeric=False), Column("a", small=text), Column(text))
    rows = (Row((text_cell(text), Cell(text, small=text), Cell(text))), Row((Cell(text, bold=True), text_cell("b"), text_cell("c"))))
    return Table(name, text, text, columns, rows, (text,), (text,))


def compiled(folder, *files: str) -> str:
    """pdflatex on a document that loads what the tables' first line names and has them one after the other; its log."""
    packages = files[0].splitlines()[0].removeprefix("% ")
    body = "\\clearpage\n".join(rf"\input{{t{number}}}" for number in range(len(files)))
    for number, text in enumerate(files):
        (folder / f"t{number}.tex").write_bytes(text.encode("utf-8", "replace"))
    (folder / "all.tex").write_text(f"\\documentclass{{article}}\n{packages}\n\\begin{{document}}\n{body}\n\\end{{document}}\n")
    words = ["pdflatex", "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error", "-recorder", "all.tex"]
    for _ in range(2):  # the second reads captions and labels back from what the first wrote
        done = subprocess.run(words, cwd=folder, capture_output=True, timeout=300)
        log = (folder / "all.log").read_text(encoding="utf-8", errors="replace")
        assert done.returncode == 0, log[log.find("\n!") :][:600]
    return log


@COMPILES
@pytest.mark.parametrize("suite", sorted({path.parts[-3] for path in STORED}))
def test_stored_tables_compile_and_none_is_wider_than_the_text(tmp_path, suite):
    files = [path.read_text(encoding="utf-8") for path in STORED if path.parts[-3] == suite]
    log = compiled(tmp_path, *files)
    assert len(files) > 5 and "Overfull \\hbox" not in log


def printed(folder) -> str:
    return subprocess.run(["pdftotext", "-layout", "all.pdf", "-"], cwd=folder, capture_output=True, check=True).stdout.decode()


@COMPILES
def test_hostile_tables_compile_and_read_no_file(tmp_path):
    """All in one document, which is quick; a failure says where."""
    compiled(tmp_path, *(latex_file([table_of(text, name)]) for name, text in HOSTILE.items()))
    read = {line.split()[1] for line in (tmp_path / "all.fls").read_text().splitlines() if line.startswith(("INPUT", "OUTPUT"))}
    assert not [path for path in read if "passwd" in path] and any(path.endswith("t0.tex") for path in read)
    written = {path.name for path in tmp_path.iterdir() if path.suffix != ".tex"}
    assert written == {"all.pdf", "all.log", "all.aux", "all.fls"}


@COMPILES
@pytest.mark.skipif(not shutil.which("pdftotext"), reason="reads the page with pdftotext (Debian: poppler-utils)")
def test_a_page_shows_what_the_text_says(tmp_path):
    """Letters that pdflatex has as they are, others by their number, and no two characters joined into one."""
    text = r"--dry-run \input{x} 50% a_b [1] été 标 😀"
    compiled(tmp_path, latex_file([Table("t", "T", "C", (Column("a", numeric=False),), (Row((text_cell(text),)),))]))
    assert r"--dry-run \input{x} 50% a_b [1] été [U+6807] [U+1F600]" in printed(tmp_path)


@COMPILES
def test_a_document_that_knows_a_letter_keeps_it(tmp_path):
    """What the document declares, or a package of its for that language, is not replaced by a number."""
    text = latex_file([Table("t", "T", "C", (Column("标", numeric=False),), ())])
    first, rest = text.split("\n", 1)
    compiled(tmp_path, first + r" \DeclareUnicodeCharacter{6807}{\typeout{asked for}known}" + "\n" + rest)
    assert "asked for" in (tmp_path / "all.log").read_text()


@COMPILES
@pytest.mark.parametrize("character", "\\%#_{}^&$")
def test_a_character_that_is_not_escaped_is_seen(tmp_path, monkeypatch, character):
    """These tests can fail."""
    monkeypatch.delitem(LATEX, character)
    text = {"{": "{", "}": "}", "\\": r"\nothing", "&": "a & b & c & d & e"}.get(character, f"a {character} b")
    with pytest.raises(AssertionError):
        compiled(tmp_path, latex_file([table_of(text)]))
        assert text in printed(tmp_path)  # a lone % compiles, but swallows what stands behind it


def test_the_guard_has_every_letter_that_is_not_ascii():
    """Without pdflatex as well: one line for each, and none for what is printed by a command."""
    text = latex_file([table_of("Φ é 标 é →")])
    found = re.findall(r"^\\@ifundefined\{u8:\\detokenize\{(.)\}\}.*\{\[\}U\+([0-9A-F]+)\{\]\}\\allowbreak\}\}\{\}$", text, re.MULTILINE)
    assert found == [("é", "00E9"), ("→", "2192"), ("标", "6807")]
    assert "makeatletter" not in latex_file([table_of("a")]) and latex(table_of("a")) in latex_file([table_of("a")])
    assert tex("--a ---b ,,") == "-{}-a -{}-{}-b ,{},"
