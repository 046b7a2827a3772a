"""What the commands share: which sweep is meant, how the console looks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpgbench import config
from dpgbench.arguments import one, quoted
from dpgbench.errors import UserError, did_you_mean
from dpgbench.registry import Registry

FEW = 200


def place_of(words: list[str]) -> tuple[Path, str, bool]:
    """The results folder, the sweep's name, and whether the words say nothing but these two."""
    given = config.parse(words)
    results, name = one(given, "results", "results"), one(given, "suite") or one(given, "name", "sweep")
    return Path(results), config.checked_name(name), set(given) <= {"results", "suite", "name"}


def full_words(words: list[str]) -> list[str]:
    """The words of the sweep that is meant: its name alone stands for what was said when it ran."""
    results, name, nothing_else = place_of(words)
    saved = results / "runs" / f"{name}.sweep.json"
    return [*json.loads(saved.read_text()), quoted("results", str(results))] if nothing_else and saved.exists() else words


def selector(name: str) -> str:
    return "suite" if name in config.suites(Registry()) else "name"


def take_format(words: list[str]) -> tuple[list[str], bool]:
    """The other words, and whether `--format json` was among them."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--format=") else [word])]
    if "--format" not in words:
        return words, False
    at = words.index("--format")
    given = words[at + 1] if at + 1 < len(words) else "nothing"
    if given not in ("json", "html"):
        raise UserError(f"--format {given}: {did_you_mean(given, ['html', 'json'])}")
    return words[:at] + words[at + 2 :], given == "json"


def terminal() -> Console:
    """Colours and the terminal's width on a terminal; plain unwrapped lines into a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=240)


def show_rows(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that fits the console; beyond FEW rows plain columns, because laying out thousands takes rich a second."""
    if len(rows) <= FEW:
        table = Table(*headings, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in (headings, *rows))
    console.out("\n".join(lines), highlight=False)


def first_comment(path: Path) -> str:
    lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    return lines[0] if lines else ""
