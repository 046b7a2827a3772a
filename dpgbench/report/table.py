"""One table, shown four ways: Markdown and LaTeX here, HTML by the page's template, records for machines."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from itertools import accumulate

from dpgbench.core.text import visible
from dpgbench.report.format import DASH


@dataclass(frozen=True)
class Cell:
    """What one cell shows. `small` stands below `text` on the page and behind it in Markdown and LaTeX.

    `value` is what the page sorts by (None: always last). `numbers` are the same facts unrounded, for machines. `method` is the label
    whose mark stands before the text, `bar` a share (0 to 1) that the page draws below it.
    """

    text: str
    small: str = ""
    value: float | str | None = None
    numbers: dict[str, object] = field(default_factory=dict)
    bold: bool = False
    method: str | None = None
    bar: float | None = None

    @property
    def sortable(self) -> str:
        """Ten digits: the last bits of a mean are the machine's, and a page should not change by them."""
        if self.value is None or (isinstance(self.value, float) and math.isnan(self.value)):
            return ""
        if isinstance(self.value, str):
            return self.value
        value = float(self.value)
        return f"{value:.10g}" if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"

    @property
    def plain(self) -> str:
        return f"{self.text} {self.small}" if self.small else self.text


@dataclass(frozen=True)
class Column:
    """A heading. `best` is the order that a first click gives, `tip` explains it on the page, `method` is what the filter hides it by."""

    name: str
    small: str = ""
    numeric: bool = True
    best: str = "descending"
    tip: str = ""
    method: str | None = None

    @property
    def plain(self) -> str:
        return f"{self.name}: {self.small}" if self.small else self.name


@dataclass(frozen=True)
class Row:
    """`methods` are the labels that the filter hides the row by; `role` greys references ("base", "oracle")."""

    cells: tuple[Cell, ...]
    methods: tuple[str, ...] = ()
    role: str = "method"


@dataclass(frozen=True)
class Table:
    """`name` is a key and part of LaTeX's label. The caption says how to read it, the findings what it says in
    words, the notes what to know before trusting it.
    """

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()


def text_cell(text: str, **more) -> Cell:
    return Cell(text, value=text, **more)


def markdown(table: Table, heading: str = "##") -> str:
    """Heading, caption, table and notes; ends with one newline."""
    lines = [f"{heading} {escape(table.title)}", "", escape(table.caption), ""]
    if table.rows:
        header = tuple(column.plain for column in table.columns)
        body = [[f"**{cell.plain}**" if cell.bold else cell.plain for cell in row.cells] for row in table.rows]
        lines += [*_padded(header, body, [column.numeric for column in table.columns]), ""]
    for sentence in table.findings:
        lines += [escape(sentence), ""]
    for note in table.notes:
        lines += [f"> {escape(note)}", ""]
    return "\n".join(lines)


def _padded(header: tuple[str, ...], body: list[list[str]], right: list[bool]) -> list[str]:
    """A GitHub table with padded columns, readable as plain text; numbers to the right."""
    cells = [[escape(text) for text in line] for line in (header, *body)]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(header))]
    padded = [
        "| " + " | ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in zip(line, widths, right, strict=True)) + " |" for line in cells
    ]
    rule = "|" + "|".join("-" * (w + 1) + ":" if r else "-" * (w + 2) for w, r in zip(widths, right, strict=True)) + "|"
    return [padded[0], rule, *padded[1:]]


def escape(text: str) -> str:
    """Data shown as itself in Markdown: no table cell, tag, link, image, heading, list, fence or line break of its own."""
    text = visible(" ".join(text.split()))
    text = re.sub(r"(\\*)\|", r"\1\1\|", text.replace("&", "&amp;").replace("<", "&lt;"))  # "\|" alone would be a backslash and a border
    text = re.sub(r"\](?=[(\[:])", r"]\\", text)
    return re.sub(r"^(?=(#{1,6}|[-+*]|\d{1,9}[.)])(\s|$)|>|```|~~~|===|---|\*\*\*|___)", r"\\", text)


def latex_file(tables: list[Table]) -> str:
    """Tables that a document can input; the first line names the packages that it must load.

    pdflatex stops at a character that neither LaTeX nor the document's packages know. The lines after the first make it print that
    character's number; XeLaTeX and LuaLaTeX take no notice of them.
    """
    shown = "\n".join(latex(table) for table in tables)
    names = [(rf"u8:\detokenize{{{character}}}", ord(character)) for character in sorted(set(shown)) if not character.isascii()]
    numbers = [rf"\@ifundefined{{{name}}}{{\@namedef{{{name}}}{{{{[}}U+{code:04X}{{]}}\allowbreak}}}}{{}}" for name, code in names]
    guard = [r"\makeatletter", *numbers, r"\makeatother"] if numbers else []
    return "\n".join([r"% \usepackage[T1]{fontenc} \usepackage{booktabs,graphicx}", *guard, shown])


# A table wider than the text is made smaller until it fits; it would be cut off at the page's edge. A long cell has lines of about 40
# characters, because a smaller one is hard to read, and because TeX knows no width beyond 16383pt.
LONG = 60
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}"


def latex(table: Table) -> str:
    """A floating booktabs table with caption and label; ends with one newline. Findings and notes stand below the caption."""
    columns = "".join("r" if column.numeric else "l" for column in table.columns)
    lines = [r"\begin{table}", r"\centering\small", rf"{FIT}{{\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(_lines(column.plain) for column in table.columns) + r" \\", r"\midrule"]
    for row in table.rows:
        texts = [rf"\textbf{{{_lines(cell.plain)}}}" if cell.bold else _lines(cell.plain) for cell in row.cells]
        lines.append(" & ".join(texts) + r" \\")
    caption, rest = _split(f"{table.title}. {table.caption}")
    below = " ".join([*filter(None, [rest]), *table.findings, *table.notes])
    label = re.sub(r"[^A-Za-z0-9]+", "-", table.name).strip("-")
    lines += [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{tex(caption)}}}", rf"\label{{tab:{label}}}"]
    lines += [rf"\par\smallskip\parbox{{\linewidth}}{{\footnotesize {tex(below)}}}"] if below else []
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _split(text: str, most: int = 1500) -> tuple[str, str]:
    """What a caption can hold, and the rest. LaTeX first tries to set a caption in one line, and stops where that is beyond 16383pt."""
    widths = accumulate(1 if character.isascii() else 9 for character in text)  # 9: a number in brackets, at worst
    room = sum(width <= most for width in widths)
    at = len(text) if room == len(text) else text.rfind(" ", 1, room) if " " in text[1:room] else room
    return text[:at], text[at:].strip()


def _lines(text: str) -> str:
    return tex(text) if len(text) <= LONG else rf"\parbox[t]{{20em}}{{\raggedright {tex(text)}}}"


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", DASH: "--", "−": "$-$", "±": r"$\pm$", "≤": r"$\leq$", "≥": r"$\geq$", "×": r"$\times$",
    "[": "{[}", "]": "{]}", "*": "{*}",  # at the start of a row they would belong to the line break before it
    "…": r"\dots{}", "’": "'", "Φ": r"$\Phi$",
}  # fmt: skip


def tex(text: str) -> str:
    """Data as LaTeX prints it; letters of other languages are left to the document's encoding (UTF-8) and to `latex_file`.

    An empty group keeps two characters apart that a font would join: "--" is an option's start and no dash.
    """
    text = re.sub(r"(?<=[-',`!?])(?=[-',`])", "\0", visible(" ".join(text.split())))
    return "".join("{}" if character == "\0" else LATEX.get(character, character) for character in text)


def records(table: Table) -> dict[str, object]:
    """The table for machines: every row's columns by name, each with the text shown and the unrounded numbers behind it."""
    rows = []
    for row in table.rows:
        shown = {}
        for column, cell in zip(table.columns, row.cells, strict=True):
            shown[column.plain] = {"text": cell.plain, **{key: _plain_number(value) for key, value in cell.numbers.items()}}
        rows.append(shown)
    return {"title": table.title, "caption": table.caption, "rows": rows, "findings": list(table.findings), "notes": list(table.notes)}


def _plain_number(value: object) -> object:
    """JSON has no NaN and no infinity: null and a word."""
    if isinstance(value, (list, tuple)):
        return [_plain_number(item) for item in value]
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, int) or (hasattr(value, "dtype") and value.dtype.kind in "iu"):
        return int(value)
    number = float(value)
    return None if math.isnan(number) else number if math.isfinite(number) else ("inf" if number > 0 else "-inf")
