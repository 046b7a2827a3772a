"""What the commands share: which sweep is meant, how the console looks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from dpgbench import config
from dpgbench.errors import UserError, did_you_mean
from dpgbench.registry import Registry


def place_of(words: list[str]) -> tuple[Path, str, bool]:
    """The results folder, the sweep's name, and whether the words say nothing but these two."""
    given = config.parse(words)
    results, name = (
        str(given.get(key, [default])[0]) for key, default in (("results", "results"), ("suite", given.get("name", ["sweep"])[0]))
    )
    return Path(results), name, set(given) <= {"results", "suite", "name"}


def full_words(words: list[str]) -> list[str]:
    """The words of the sweep that is meant: its name alone stands for what was said when it ran."""
    results, name, nothing_else = place_of(words)
    saved = results / "runs" / f"{name}.sweep.json"
    return [*json.loads(saved.read_text()), f"results={results}"] if nothing_else and saved.exists() else words


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


def first_comment(path: Path) -> str:
    lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    return lines[0] if lines else ""
