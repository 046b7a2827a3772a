"""What a person sees while cells run: a bar per cell (step, Phi, tokens, time left) and one for the sweep. Used by cli/ alone."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpgbench.api import RunSpec


class Display:
    """Call it with every event of a launch, inside `with`. On a terminal it draws bars; elsewhere it prints a line per finished cell."""

    def __init__(self, console: Console, cells: int):
        self.console = console
        self.failed: list[RunSpec] = []
        self.busy: list[RunSpec] = []
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._sweep = self._progress.add_task("cells", total=cells, state="")
        self._bars: dict[str, Any] = {}
        self._latest: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, spec: RunSpec, event: dict[str, Any]) -> None:
        state = event.get("state")
        if state == "started":
            steps = (spec.method.get("policy") or {}).get("steps")
            self._bars[spec.folder] = self._progress.add_task(_name(spec), total=steps or 1, state="loading")
        elif state is not None:
            self._finish(spec, state)
        else:
            latest = self._latest.setdefault(spec.folder, {})
            latest.update(event)
            if spec.folder in self._bars:
                phi, tokens = latest.get("phi"), latest.get("tokens_generated", 0)
                words = (f"Phi {phi:.4g}  " if phi is not None else "") + f"{_short(tokens)} tokens"
                self._progress.update(self._bars[spec.folder], completed=latest.get("step", 0), state=words)

    def _finish(self, spec: RunSpec, state: str) -> None:
        if spec.folder in self._bars:
            self._progress.remove_task(self._bars.pop(spec.folder))
        self._progress.advance(self._sweep)
        measures = self._latest.pop(spec.folder, {}).get("measures", {})
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in measures.items())
        mark = {"done": "[green]done[/]  ", "busy": "[yellow]busy[/]  ", "interrupted": "[yellow]stopped[/]"}.get(state, "[red]failed[/]")
        {"failed": self.failed, "busy": self.busy}.get(state, []).append(spec)
        self.console.print(f"{mark} {_name(spec)}  {numbers}", highlight=False)


def _name(spec: RunSpec) -> str:
    return f"{spec.task.label} {spec.method.label} seed {spec.seed}"


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"
