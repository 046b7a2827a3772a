"""What the commands share: how one is described, which sweep is meant, how the console looks."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpgbench import config
from dpgbench.bench import distributed
from dpgbench.config.overrides import for_shell, one, quoted
from dpgbench.core.cell import RunSpec
from dpgbench.core.documents import Unreadable, json_of, text_of
from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.text import visible
from dpgbench.plugins.registry import Registry

FEW = 200
SHOWN = 1000  # characters of a line that is somebody else's
CODES = """\
  0    it is done{own}
  2    it cannot be understood, or not be done; one line says why
  130  interrupted
  141  nobody reads what it prints"""


@dataclass(frozen=True)
class Command:
    """A command: what it does with the words after its name, and what its help says."""

    run: Callable[[list[str]], int]
    takes: str
    says: str
    arguments: str
    """A line each."""
    examples: tuple[str, str]
    one: str = ""
    """What exit code 1 says."""
    flags: tuple[str, ...] = ()
    """The arguments beginning with -- that it knows."""

    def help(self, name: str) -> str:
        examples = "\n".join(f"  python -m dpgbench {name} {example}".rstrip() for example in self.examples)
        codes = CODES.format(own=f"\n  1    {self.one}" if self.one else "")
        parts = (
            f"{self.says[0].upper()}{self.says[1:]}.",
            f"arguments:\n{self.arguments}",
            f"examples:\n{examples}",
            f"exit codes:\n{codes}",
        )
        return "\n\n".join((f"usage: python -m dpgbench {name} {self.takes}", *parts))


def place_of(words: list[str]) -> tuple[Path, str, bool]:
    """The results folder, the sweep's name, and whether the words say nothing but these two and where plug-ins are."""
    given = config.parse(words)
    results, name = one(given, "results", "results"), one(given, "suite") or one(given, "name", "sweep")
    return Path(results), config.checked_name(name), set(given) <= {"results", "suite", "name", "plugins"}


def full_words(words: list[str]) -> list[str]:
    """The words of the sweep that is meant: its name alone stands for what was said when it ran.

    Raises UserError for a file of words that is none, and for one that came with its own plug-ins: those are programs, and whoever names a
    sweep has not asked to run somebody's.
    """
    results, name, nothing_else = place_of(words)
    saved = results / "runs" / f"{name}.sweep.json"
    if not nothing_else or not saved.exists():
        return words
    here = one(config.parse(words), "plugins")
    try:
        said = json_of(text_of(saved))
    except Unreadable as reason:
        raise UserError(f"{saved}: cannot be read ({reason}); delete it, and say again which cells are meant") from None
    if not isinstance(said, list) or not all(isinstance(word, str) for word in said):
        raise UserError(f"{saved}: not the words of a sweep; delete it, and say again which cells are meant")
    plugins = one(config.parse(said), "plugins")
    if here is not None:
        said = [word for word in said if not word.startswith("plugins=")] + [quoted("plugins", str(here))]
    elif plugins is not None and Path(plugins).resolve().is_relative_to(results.resolve()):
        raise UserError(f"{saved}: its plug-ins came with the results; to run them write it yourself: {for_shell('plugins', plugins)}")
    return [*said, quoted("results", str(results))]


def known_words(words: list[str]) -> list[str]:
    """`full_words`. Raises UserError for the name of a sweep that was never run there."""
    results, name, nothing_else = place_of(words)
    there = {path.name.removesuffix(".sweep.json") for path in (results / "runs").glob("*.sweep.json")}
    if nothing_else and name not in there and "name" in config.parse(words) and name not in config.suites(Registry()):
        raise UserError(f"name={name}: no sweep of this name was run with results={results}; {did_you_mean(name, there)}")
    return full_words(words)


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


def without(flag: str, words: list[str]) -> tuple[list[str], bool]:
    """The other words, and whether the flag was among them."""
    return [word for word in words if word != flag], flag in words


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The end, and not an exception that a cell could take for a failure of its own."""
        self.quiet = True
        raise SystemExit(reader_gone())


def terminal() -> Console:
    """Colours and the terminal's width on a terminal; plain unwrapped lines into a file or a pipe."""
    return _Console() if sys.stdout.isatty() else _Console(width=240)


def reader_gone() -> int:
    """Nobody reads standard output: let what is still to be written to it vanish. Returns the exit code of what SIGPIPE ends."""
    with contextlib.suppress(OSError, ValueError):  # of a stream that is none of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def inert(text: str) -> str:
    """Text as it can be shown: what a terminal would act on by its escapes, and not too much of it."""
    text = visible(text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def say(console: Console, text: str, mark: str = "", style: str = "") -> None:
    """A line as it is, whatever is in it: no markup, no wrapping. With a coloured word before it."""
    console.print(Text.assemble((f"{mark} ", style), inert(text)) if mark else Text(inert(text)), highlight=False, soft_wrap=True)


def show_rows(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that fits the console; beyond FEW rows plain columns, because laying out thousands takes rich a second."""
    rows = [[inert(text) for text in row] for row in rows]
    if len(rows) <= FEW:
        table = Table(*headings, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in (headings, *rows))
    console.out("\n".join(lines), highlight=False)


def warn_of_threads(specs: Sequence[RunSpec]) -> None:
    """That OMP_NUM_THREADS is not followed, where it says something else: sums on more threads differ in their last bits."""
    given, wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip(), {str(spec.scale.threads) for spec in specs}
    if given and wanted - {given} and distributed.size() == 1:  # torchrun sets it unasked
        threads = " and ".join(sorted(wanted - {given}))
        print(
            f"dpgbench: OMP_NUM_THREADS={inert(given)} is not followed: numbers depend on the threads, so they are the cell's own, "
            f"scale.threads={threads}; scale.threads={inert(given)} makes other cells",
            file=sys.stderr,
        )


def first_comment(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    return lines[0] if lines else ""
