"""Where every cell stands, once or until all are through."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpgbench import config
from dpgbench.cli.arguments import inert, known_words, place_of, say, show_rows, terminal, without
from dpgbench.config.request import Request
from dpgbench.core.cell import Cell
from dpgbench.launch import slurm
from dpgbench.launch.cell_states import OPEN, standings
from dpgbench.store.run_folder import RunFolder, State

WATCH_SECONDS = 2.0
PATIENCE_SECONDS = 1800.0  # with a controller that is restarted, moved or overloaded; who watches for days is not sent away for that

Answer = TypeVar("Answer")


def show_status(words: list[str]) -> int:
    """Where every cell stands, from files and, where cells were given to SLURM, its queue."""
    words, watch = without("--watch", words)
    results, _, nothing_else = place_of(words)
    if nothing_else and not any(word.startswith(("suite=", "name=")) for word in words):

        def rows() -> list[tuple[str, tuple[str, str]]]:
            folders = [RunFolder(path) for path in sorted((results / "runs").glob("*")) if path.is_dir()]
            return [(f.path.name, (s.name, s.detail)) for f, s in zip(folders, standings(folders), strict=True)]
    else:
        request = config.read(known_words(words), sweep=True)

        def rows() -> list[tuple[str, tuple[str, str]]]:
            return [(cell.spec.folder, described(cell, state)) for cell, state in with_states(request)]

    console = terminal()
    if watch:
        watch_rows(rows, console)
    found = patiently(rows, console) if watch else rows()
    if found:
        show_rows(console, ("cell", "state", ""), [(name, *state) for name, state in found])
    else:
        say(console, f"no runs in {results / 'runs'}")
    return 0


def watch_rows(rows: Callable[[], list[tuple[str, tuple[str, str]]]], console: Console) -> None:
    """Show how it goes until no cell is queued or running; on a terminal all open cells, elsewhere a line whenever a count changes."""
    from rich.live import Live

    told = ""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            found = patiently(rows, console)
            names = [state for _, (state, _) in found]
            counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
            if console.is_terminal:
                table = Table("cell", "state", "", box=None, pad_edge=False, caption=counts)
                for name, (state, detail) in [row for row in found if row[1][0] in OPEN][: max(5, console.height - 5)]:
                    table.add_row(Text(inert(name)), state, Text(inert(detail)))
                live.update(table, refresh=True)
            elif counts != told:
                print(counts, flush=True)
            told = counts
            if not set(names) & set(OPEN):
                return
            time.sleep(WATCH_SECONDS)


def patiently(ask: Callable[[], Answer], console: Console) -> Answer:
    """What `ask` returns. While SLURM does not answer it is asked again, for PATIENCE_SECONDS; that this is so is said once."""
    began = time.monotonic()
    told = False
    while True:
        try:
            return ask()
        except slurm.NoAnswer as error:
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise
            if not told:
                say(console, f"{str(error).removesuffix('; try again later')}; asking again for {PATIENCE_SECONDS / 60:.0f} minutes")
            told = True
        time.sleep(WATCH_SECONDS)


def with_states(request: Request) -> list[tuple[Cell, State]]:
    folders = [RunFolder.of(request.results, cell.spec) for cell in request.cells]
    return list(zip(request.cells, standings(folders), strict=True))


def described(cell: Cell, state: State) -> tuple[str, str]:
    return ("skipped", cell.skip) if cell.skip else (state.name, state.detail)
